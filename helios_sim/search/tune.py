"""Tuning: settings proposed in batches, judged on common traffic, the best tried on other."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal

from helios_sim.errors import InputError
from helios_sim.policy.registry import make_policy
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile
from helios_sim.report.words import device_of_all
from helios_sim.scenario import Scenario
from helios_sim.search.goals import (
    Breaking,
    Broken,
    Goal,
    Judge,
    check_countable,
    in_words,
    parse_constraints,
    parse_goal,
)
from helios_sim.search.means import Means, clauses_beyond, mean_figures, models_served
from helios_sim.search.pareto import best_first, ranks
from helios_sim.search.points import Figures, Point, point_of
from helios_sim.search.prices import check_prices, load_prices
from helios_sim.search.samplers import Sampler, Values, make_sampler
from helios_sim.search.space import Space, read_space, with_settings
from helios_sim.search.studies import Outcome, Steps, Study, figures_of
from helios_sim.search.traffic import FEW_ROUNDS, Traffic, at_rate, rounds_in_sample
from helios_sim.search.verdict import half_width
from helios_sim.settings.questions import SearchSettings
from helios_sim.wording import listed

State = Literal["full", "stopped", "impossible"]

SENSITIVITY_POINTS: Final = 5
RANKED_TRIALS: Final = 500
"""Trials that a new one is ranked among: peeling fronts takes time that grows with their square."""


@dataclass(frozen=True)
class First:
    """What a trial gave on the first sample, the one that every trial meets.

    Stretches of a trace differ in pace and lengths, so figures of one sample and means over several
    do not compare: what ranks trials of both kinds, or learns from them, takes these.
    """

    scores: tuple[float, ...]
    violation: float = 0.0


@dataclass(frozen=True)
class Trial:
    """Settings and what they gave.

    `full` trials ran on every sample of the tuning traffic, `stopped` ones on the first alone,
    `impossible` ones not at all, for the reason in `why`. `beyond` says what the profile can only
    extrapolate.
    """

    number: int
    values: Values
    state: State
    first: First | None = None
    scores: tuple[float, ...] | None = None
    broken: tuple[Broken, ...] = ()
    means: Means = field(default_factory=dict)
    why: str = ""
    beyond: tuple[str, ...] = ()
    reached: tuple[float | None, ...] = ()
    """What each constraint bounds, as it is judged: latency limits in ms, then other bounds."""
    models: tuple[str, ...] = ()
    """The models that served."""
    breaking: Breaking = (0, 0)
    """The mean may keep constraints that single samples break."""

    @property
    def is_feasible(self) -> bool:
        """Whether it ran on all samples and no constraint is broken."""
        return self.state == "full" and not self.broken


@dataclass(frozen=True)
class Finalist:
    """One of the best trials, on the samples on which one of them is chosen.

    `scores` is None where it cannot run there or leaves an objective undefined.
    """

    trial: Trial
    scores: tuple[float, ...] | None
    broken: tuple[Broken, ...] = ()
    breaking: Breaking = (0, 0)

    @property
    def keeps(self) -> bool:
        """Whether it has a value of every objective there and breaks no constraint."""
        return self.scores is not None and not self.broken

    @property
    def violation(self) -> float:
        """By how much it breaks constraints in all."""
        return math.inf if self.scores is None else sum(one.violation for one in self.broken)


Interval = tuple[float, float, float]
"""A mean and its bounds."""

TuneVerdict = Literal["better", "unsure", "no better"]

REASSESSING: Final = "policy.reassess_requests"
"""The setting that says how often a policy reassesses."""

SAID: Final[Mapping[TuneVerdict, str]] = {
    "better": "Settings found by helios tune",
    "unsure": "Settings found by helios tune, not shown to be better than the scenario as it stood",
    "no better": "As it stood: helios tune found nothing better",
}
"""What the scenario file of a search says of itself."""


@dataclass(frozen=True)
class HeldOut:
    """The winner and the scenario as it stands, on traffic that nothing was tuned or chosen on.

    An objective is None where a sample leaves it undefined: nothing was served, say.
    """

    rate_scale: float
    base: tuple[float | None, ...]
    tuned: tuple[float | None, ...]
    base_broken: tuple[Broken, ...]
    tuned_broken: tuple[Broken, ...]
    gains: tuple[Interval | None, ...]
    """For each objective the mean paired gain with its 95 % interval; positive is better, and None
    is where either has no value."""
    worth: Interval | None = None
    """The gains as shares of what the scenario has, added up over the objectives, in the same way;
    None where one of them is."""
    tuned_breaking: Breaking = (0, 0)


@dataclass(frozen=True)
class Sensitivity:
    """One setting varied around the winner's others: its values, and the first objective's.

    `breaks` says which values break constraints; a score is None where a value cannot be.
    """

    key: str
    chosen: Any
    values: tuple[Any, ...]
    scores: tuple[float | None, ...]
    breaks: tuple[bool, ...]


@dataclass(frozen=True)
class TuneQuestion:
    """A scenario's search with all it names read."""

    scenario: Scenario
    settings: SearchSettings
    base_dir: Path
    where: str
    space: Space
    traffic: Traffic
    judge: Judge
    device: str
    """What the fleets stand on: GPU, processor, or device where they differ."""
    profiles: tuple[Profile, ...] = ()
    """The profiles that trials may stand on, the scenario's own first."""


@dataclass(frozen=True)
class Tuned:
    """What a search found. `winner` is None where no trial keeps the constraints.

    `finalists` are empty where there was nothing to choose: one trial or none.
    """

    question: TuneQuestion
    base: Trial
    trials: tuple[Trial, ...]
    winner: Trial | None
    held_out: tuple[HeldOut, ...]
    sensitivity: tuple[Sensitivity, ...]
    finalists: tuple[Finalist, ...] = ()

    @property
    def own_rate(self) -> HeldOut | None:
        """The comparison on held-out traffic at the scenario's own rate."""
        return next((one for one in self.held_out if one.rate_scale == 1.0), None)

    @property
    def lost(self) -> Finalist | None:
        """The winner among the finalists where even the best of them breaks the constraints."""
        found = next((one for one in self.finalists if one.trial is self.winner), None)
        return None if found is None or found.keeps else found

    @property
    def verdict(self) -> TuneVerdict:
        """What held-out traffic says of the winner against the scenario as it stands.

        A winner is no better if it breaks the constraints there or on the traffic that it was
        chosen on. A scenario that breaks its constraints as it stands is worse than one that keeps
        them, and one without a value of an objective is worse than one with. Otherwise a gain
        counts as shown where its whole interval is one.
        """
        held = self.own_rate
        if held is None or self.lost is not None or held.tuned_broken or None in held.tuned:
            return "no better"
        if held.base_broken or None in held.base:
            return "better"
        assert held.worth is not None
        mean, low, _ = held.worth
        if mean <= 0.0:
            return "no better"
        return "better" if low > 0.0 else "unsure"


def read_tune(scenario: Scenario, base_dir: Path, where: str) -> TuneQuestion:
    """Read the `[search]` table and all it names."""
    space = read_space(scenario, base_dir, where)
    settings = scenario.search
    assert settings is not None
    place = f"{where}, search"
    goals = tuple(parse_goal(text, f"{place}.objectives") for text in settings.objectives)
    if len({goal.name for goal in goals}) < len(goals):
        raise InputError("An objective is given twice.", f"{place}.objectives")
    constraints = parse_constraints(settings.constraints, f"{place}.constraints")
    used = [*goals, *(bound.goal for bound in constraints.bounds)]
    has_prices = settings.prices is not None
    check_countable(used, scenario.slo_spec is not None, has_prices, where, "search")
    prices = None
    if settings.prices is not None and any(goal.name == "cost" for goal in used):
        prices = load_prices(settings.prices, base_dir, f"{place}.prices")
    profiles = _profiles(space, place)
    if prices is not None:
        for profile in profiles:
            check_prices(prices, profile, f"{place}.prices")
    needed = held_out_samples(settings).stop
    traffic = Traffic(
        space.base,
        base_dir,
        where,
        settings.num_requests,
        settings.windows,
        settings.warmup_share,
        "search",
        most_samples=needed,
    )
    if traffic.num_samples is not None and needed > traffic.num_samples:
        parts = [f"{settings.replications} replications"]
        if finals_samples(settings):
            parts.append(f"{settings.finals} finals")
        parts.append(f"{settings.held_out} held out")
        raise InputError(
            f"{listed(parts)} are {needed} samples, but the trace is cut into {settings.windows} "
            "windows; give at least as many windows, or fewer samples.",
            f"{place}.windows",
        )
    traffic.check()
    judge = Judge(goals, constraints, prices, f"{place}.prices")
    device = device_of_all(profile.is_of_processor for profile in profiles)
    question = TuneQuestion(
        scenario=scenario,
        settings=settings,
        base_dir=base_dir,
        where=where,
        space=space,
        traffic=traffic,
        judge=judge,
        device=device,
        profiles=tuple(profiles),
    )
    for scale in settings.held_out_rates if traffic.replays else ():
        # A rate that the trace does not go down to is told before hours of trials.
        try:
            samples_of(question, space.base, held_out_samples(settings), scale)
        except InputError as error:
            raise error.at(error.where or f"{place}.held_out_rates") from error
    return question


def finals_samples(settings: SearchSettings) -> range:
    """The samples on which the winner is chosen, after those tuned on; none for one finalist."""
    num = settings.finals if settings.finalists > 1 else 0
    return range(settings.replications, settings.replications + num)


def held_out_samples(settings: SearchSettings) -> range:
    """The samples that nothing was tuned or chosen on."""
    start = finals_samples(settings).stop
    return range(start, start + settings.held_out)


def _profiles(space: Space, place: str) -> list[Profile]:
    """The profiles that trials may stand on, the scenario's own first."""
    assumed = space.base.fleet.assume
    found = [load_profile(space.base.fleet.profile, space.base_dir, assumed)]
    for one in space.ranges:
        if one.key == "fleet.profile":
            for name in one.choices:
                try:
                    found.append(load_profile(str(name), space.base_dir, assumed))
                except InputError as error:
                    raise error.at(f"{place}.ranges.fleet.profile") from error
    return found


def tune_study(question: TuneQuestion, journal: Path | None = None) -> Study[Tuned]:
    """The whole search as one study."""
    settings = question.settings
    expected = settings.replications
    num_trials = _num_trials(question)
    more = (settings.replications - 1) * settings.go_on_share
    expected += int(num_trials * (1.0 + more))
    expected += settings.finalists * len(finals_samples(settings))
    expected += 2 * settings.held_out * len(settings.held_out_rates)
    expected += len(question.space.ranges) * SENSITIVITY_POINTS * settings.replications
    sampler = make_sampler(
        question.space,
        settings.sampler,
        settings.seed,
        settings.batch,
        num_trials,
        [goal.better for goal in question.judge.goals],
        journal,
    )
    return Study(_tune_steps(question, sampler, num_trials), expected)


def _num_trials(question: TuneQuestion) -> int:
    if question.settings.sampler == "grid":
        return question.space.grid_size
    return question.settings.num_trials


def known_points(question: TuneQuestion) -> list[Point]:
    """Every point of a search whose trials are known beforehand, for a shard of it."""
    if question.settings.sampler not in ("grid", "sobol"):
        raise InputError(
            f"The sampler {question.settings.sampler!r} proposes each batch from the answers to "
            'the last, so a search with it has no shards; use "grid" or "sobol".',
            f"{question.where}, search.sampler",
        )
    settings = question.settings
    num = _num_trials(question)
    sampler = make_sampler(question.space, settings.sampler, settings.seed, 1, num, (), None)
    points = []
    for values in sampler.propose(num):
        try:
            scenario = question.space.scenario(values)
        except InputError:
            continue
        points += samples_of(question, scenario, range(settings.replications))
    return points


def samples_of(
    question: TuneQuestion, scenario: Scenario, samples: Sequence[int], scale: float = 1.0
) -> list[Point]:
    """A scenario on samples of the traffic, at its own rate times `scale`."""
    traffic = question.traffic
    # The scenario's own rate is left as it is, to the last bit.
    rate = None if scale == 1.0 else traffic.rate_per_s * scale
    if rate is not None and traffic.replays:
        # Stretches keep their own paces: all at one rate would differ from them in more than scale.
        scenario, rate = at_rate(scenario, traffic, rate), None
    # Lengthened windows are repeated ones, which say nothing new.
    num_replicas = 1 if traffic.replays else scenario.fleet.num_replicas
    return [
        point_of(
            traffic.sample(scenario, index, rate, num_replicas),
            question.base_dir,
            question.judge.constraints.limits,
        )
        for index in samples
    ]


def _tune_steps(question: TuneQuestion, sampler: Sampler, num_trials: int) -> Steps[Tuned]:
    settings = question.settings
    judge = question.judge
    own = figures_of(
        (yield samples_of(question, question.space.base, range(settings.replications)))
    )
    base = _trial(judge, -1, {}, "full", own)
    trials: list[Trial] = []
    while len(trials) < num_trials:
        proposed = sampler.propose(min(settings.batch, num_trials - len(trials)))
        if not proposed:
            break
        batch = yield from _judge_batch(question, proposed, trials)
        firsts = [trial.first for trial in batch]
        sampler.learn(
            [None if first is None else first.scores for first in firsts],
            [0.0 if first is None else first.violation for first in firsts],
        )
        trials += batch
    feasible = [trial for trial in trials if trial.is_feasible]
    finalists: tuple[Finalist, ...] = ()
    winner = None
    if feasible:
        best = _best(judge, feasible, settings.finalists)
        winner = best[0]
        if len(best) > 1:
            finalists = yield from _finals(question, best)
            winner = _chosen(judge, finalists).trial
    held_out: list[HeldOut] = []
    sensitivity: list[Sensitivity] = []
    if winner is not None:
        for scale in settings.held_out_rates:
            held_out.append((yield from _hold_out(question, winner, scale)))
        sensitivity = yield from _vary(question, winner)
    return Tuned(
        question=question,
        base=base,
        trials=tuple(trials),
        winner=winner,
        held_out=tuple(held_out),
        sensitivity=tuple(sensitivity),
        finalists=finalists,
    )


def _judge_batch(
    question: TuneQuestion, proposed: Sequence[Values], before: Sequence[Trial]
) -> Generator[Sequence[Point], list[Outcome], list[Trial]]:
    """A batch on the first sample; those that look well among all so far on the others too."""
    settings, judge = question.settings, question.judge
    numbers = range(len(before), len(before) + len(proposed))
    found: dict[int, Trial] = {}
    scenarios: dict[int, Scenario] = {}

    def refuse(place: int, error: InputError) -> None:
        found[place] = Trial(numbers[place], proposed[place], "impossible", why=str(error))

    for place, values in enumerate(proposed):
        try:
            scenarios[place] = question.space.scenario(values)
        except InputError as error:
            refuse(place, error)
    asked = [samples_of(question, scenario, range(1))[0] for scenario in scenarios.values()]
    outcomes = (yield asked) if asked else []
    first: dict[int, Figures] = {}
    for place, outcome in zip(scenarios, outcomes, strict=True):
        if isinstance(outcome, InputError):
            refuse(place, outcome)
            continue
        found[place] = _trial(judge, numbers[place], proposed[place], "stopped", [outcome])
        if found[place].state == "stopped":
            first[place] = outcome
    if settings.replications == 1:
        chosen = list(first)
    else:
        chosen = _promising(judge, found, before, settings.go_on_share)
    rest = range(1, settings.replications)
    asked = [point for place in chosen for point in samples_of(question, scenarios[place], rest)]
    outcomes = (yield asked) if asked else []
    for place, mine in zip(chosen, _in_turn(outcomes, len(chosen)), strict=True):
        refused = next((one for one in mine if isinstance(one, InputError)), None)
        if refused is not None:
            refuse(place, refused)
            continue
        figures = [first[place], *figures_of(mine)]
        found[place] = _trial(judge, numbers[place], proposed[place], "full", figures)
    return [found[place] for place in range(len(proposed))]


def _in_turn(outcomes: Sequence[Outcome], num: int) -> list[Sequence[Outcome]]:
    """The outcomes of each of so many that asked for equally many points, one after another."""
    each = len(outcomes) // max(1, num)
    return [outcomes[at * each : (at + 1) * each] for at in range(num)]


def _trial(
    judge: Judge, number: int, values: Values, state: State, figures: list[Figures]
) -> Trial:
    """A trial by its figures, the first sample's first."""
    first, scores = _known(judge.scores(figures[:1])), _known(judge.scores(figures))
    if first is None or scores is None:
        return Trial(number, values, "impossible", why="An objective is undefined.")
    return Trial(
        number,
        values,
        state,
        First(first, sum(one.violation for one in judge.broken(figures[:1]))),
        scores,
        judge.broken(figures),
        mean_figures(figures),
        beyond=clauses_beyond(figures),
        reached=_reached(judge, figures),
        models=models_served(figures),
        breaking=judge.breaking(figures),
    )


def _reached(judge: Judge, figures: Sequence[Figures]) -> tuple[float | None, ...]:
    """What each constraint bounds, on average; None where a sample gives it no value."""
    found: list[float | None] = []
    for place in range(len(judge.constraints.slo.limits) if judge.constraints.slo else 0):
        values = [one["judged"][place]["value_ms"] for one in figures]
        found.append(None if None in values else fmean(values))
    return (*found, *(judge.value(bound.goal, figures) for bound in judge.constraints.bounds))


def _known(scores: Sequence[float | None]) -> tuple[float, ...] | None:
    known = tuple(score for score in scores if score is not None)
    return known if len(known) == len(scores) else None


def score_at(place: int) -> Callable[[Trial], float | None]:
    """What reads a trial's value of an objective."""
    return lambda trial: None if trial.scores is None else trial.scores[place]


def mean_at(key: str) -> Callable[[Trial], float | None]:
    """What reads a plain figure of a trial."""
    return lambda trial: trial.means.get(key)


def reached_at(place: int) -> Callable[[Trial], float | None]:
    """What reads what a trial reached of the figure that a constraint bounds."""
    return lambda trial: trial.reached[place] if place < len(trial.reached) else None


def _promising(
    judge: Judge, batch: Mapping[int, Trial], before: Sequence[Trial], share: float
) -> list[int]:
    """Places of the trials that rank within the share of all so far, by their first sample.

    Trials that keep the constraints come before those that do not, which rank by how much they
    break; within the kept ones fronts count.
    """
    mine = [
        (place, trial.number, trial.first)
        for place, trial in batch.items()
        if trial.first is not None
    ]
    others = [(one.number, one.first) for one in before if one.first is not None]
    everyone = [*((number, first) for _, number, first in mine), *others[-RANKED_TRIALS:]]
    costs = [judge.costs(first.scores) for _, first in everyone]
    # Of equals the earlier trial ranks first: a tie is no reason to spend runs on a later one.
    keys = [
        (first.violation, rank, number)
        for (number, first), rank in zip(everyone, ranks(costs), strict=True)
    ]
    order = sorted(range(len(everyone)), key=keys.__getitem__)
    kept = set(order[: max(1, math.ceil(share * len(everyone)))])
    return sorted(place for at, (place, _, _) in enumerate(mine) if at in kept)


def _best(judge: Judge, feasible: Sequence[Trial], most: int) -> list[Trial]:
    """The best trials, front by front; of several with the same figures the first.

    Settings that change nothing on the tuning traffic need not be tried twice on other.
    """
    different: list[Trial] = []
    seen: set[tuple[Any, ...]] = set()
    for trial in feasible:
        figures = tuple(sorted(trial.means.items()))
        if figures not in seen:
            seen.add(figures)
            different.append(trial)
    places = best_first([judge.costs(one.scores or ()) for one in different], most)
    return [different[place] for place in places]


def _finals(
    question: TuneQuestion, best: Sequence[Trial]
) -> Generator[Sequence[Point], list[Outcome], tuple[Finalist, ...]]:
    """The best trials on samples that come after the tuned ones."""
    judge, samples = question.judge, finals_samples(question.settings)
    asked = [
        point
        for trial in best
        for point in samples_of(question, question.space.scenario(trial.values), samples)
    ]
    outcomes = yield asked
    found = []
    for trial, mine in zip(best, _in_turn(outcomes, len(best)), strict=True):
        if any(isinstance(one, InputError) for one in mine):
            found.append(Finalist(trial, None))
            continue
        figures = figures_of(mine)
        scores = _known(judge.scores(figures))
        found.append(Finalist(trial, scores, judge.broken(figures), judge.breaking(figures)))
    return tuple(found)


def _chosen(judge: Judge, finalists: Sequence[Finalist]) -> Finalist:
    """The best of the finalists that keep the constraints, else the one that comes nearest."""
    kept = [one for one in finalists if one.keeps]
    if not kept:
        return min(finalists, key=lambda one: one.violation)
    return kept[best_first([judge.costs(one.scores or ()) for one in kept], 1)[0]]


def _hold_out(
    question: TuneQuestion, winner: Trial, scale: float
) -> Generator[Sequence[Point], list[Outcome], HeldOut]:
    """The winner and the scenario as it stands, on samples that come after all others."""
    judge, samples = question.judge, held_out_samples(question.settings)
    base = samples_of(question, question.space.base, samples, scale)
    tuned = samples_of(question, question.space.scenario(winner.values), samples, scale)
    figures = figures_of((yield [*base, *tuned]))
    own, won = figures[: len(base)], figures[len(base) :]
    gains = [_paired(judge, goal, own, won) for goal in judge.goals]
    scores = judge.scores(own)
    shares = [
        [one / (abs(score) or 1.0) for one in paired]
        for paired, score in zip(gains, scores, strict=True)
        if paired is not None and score is not None
    ]
    worth = None
    if len(shares) == len(gains):
        worth = _interval([sum(one) for one in zip(*shares, strict=True)])
    return HeldOut(
        scale,
        scores,
        judge.scores(won),
        judge.broken(own),
        judge.broken(won),
        tuple(None if paired is None else _interval(paired) for paired in gains),
        worth,
        judge.breaking(won),
    )


def _paired(
    judge: Judge, goal: Goal, own: Sequence[Figures], won: Sequence[Figures]
) -> list[float] | None:
    """What an objective gains on each sample; None where one of them leaves it undefined."""
    found = []
    for before, after in zip(own, won, strict=True):
        was, now = judge.value(goal, [before]), judge.value(goal, [after])
        if was is None or now is None:
            return None
        found.append(goal.cost(was) - goal.cost(now))
    return found


def _interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval; no width is known of one value alone."""
    mean, half = fmean(values), half_width(values, 0.975) if len(values) > 1 else math.inf
    return mean, mean - half, mean + half


def _vary(
    question: TuneQuestion, winner: Trial
) -> Generator[Sequence[Point], list[Outcome], list[Sensitivity]]:
    """Each setting at a few values, with the winner's others, on the tuning traffic."""
    settings, judge = question.settings, question.judge
    samples = range(settings.replications)
    asked: list[Point] = []
    plan: list[tuple[str, Any, int | None]] = []
    for one in question.space.ranges:
        values = one.grid(SENSITIVITY_POINTS)
        own = winner.values[one.key]
        if own not in values:
            values = [*values, own]
        if not one.choices:
            values = sorted(values)
        for value in values:
            try:
                scenario = question.space.scenario({**winner.values, one.key: value})
            except InputError:
                plan.append((one.key, value, None))
                continue
            plan.append((one.key, value, len(asked)))
            asked += samples_of(question, scenario, samples)
    outcomes = (yield asked) if asked else []
    found: dict[str, list[tuple[Any, float | None, bool]]] = {}
    for key, value, at in plan:
        score, breaks = None, False
        if at is not None:
            mine = outcomes[at : at + len(samples)]
            if not any(isinstance(outcome, InputError) for outcome in mine):
                figures = figures_of(mine)
                score = judge.value(judge.goals[0], figures)
                breaks = bool(judge.broken(figures))
        found.setdefault(key, []).append((value, score, breaks))
    return [
        Sensitivity(key, winner.values[key], *zip(*parts, strict=True))
        for key, parts in found.items()
    ]


def few_rounds(tuned: Tuned) -> list[tuple[str, float]]:
    """Whose samples hold few rounds of reassessment, and how many for each replica.

    Asked for the winner and for the largest value that the search may give the setting: where a
    sample ends after a round or two, a longer interval is hardly another one.
    """
    question, base = tuned.question, tuned.base
    found = []
    if tuned.winner is not None:
        rounds = _rounds(question, tuned.winner.values, tuned.winner)
        found.append((f"trial {tuned.winner.number}", rounds))
    for one in question.space.ranges:
        numbers = [value for value in one.grid() if isinstance(value, int)]
        if one.key == REASSESSING and numbers:
            value = max(numbers)
            rounds = _rounds(question, {one.key: value}, base)
            found.append((f"{one.key} = {value:,}", rounds))
    return [(name, rounds) for name, rounds in found if rounds < FEW_ROUNDS]


def _rounds(question: TuneQuestion, values: Values, met: Trial) -> float:
    """Rounds of reassessment of these settings in a sample as a trial met it."""
    try:
        policy = question.space.scenario(values).policy[0]
    except InputError:
        # The value goes together with others alone.
        return math.inf
    made = make_policy(policy.use, policy.options, search_path=question.base_dir)
    measured, num_replicas = met.means.get("num_measured"), met.means.get("num_replicas")
    if measured is None or num_replicas is None:
        # A trial that could not be run met no sample.
        return math.inf
    return rounds_in_sample(measured, num_replicas, made.watching.reassess_requests)


def recommended(tuned: Tuned) -> Scenario:
    """The scenario with the winner's settings, or as it stands where they are no better.

    With the winner's settings it leaves out the share of its requests that samples leave out.
    Settings that are not shown to be better are still the best guess that there is.
    """
    question, traffic = tuned.question, tuned.question.traffic
    scenario = base = question.space.base
    said = SAID[tuned.verdict]
    if tuned.winner is not None and tuned.verdict != "no better":
        values = tuned.winner.values
        scenario = with_settings(base, values, question.base_dir, question.where)
        # No trial was judged by its first requests.
        rate_per_s = traffic.rate_per_s
        scenario = traffic.warmed(scenario, traffic.num_in_run(rate_per_s), rate_per_s)
        said += ": " + ", ".join(f"{key} = {value}" for key, value in values.items())
    return scenario.model_copy(
        update={"name": f"{base.name}_tuned", "notes": (*scenario.notes, f"{said}.")}
    )


def by_violation(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that break constraints, those of all samples first and of them the nearest."""
    return sorted(
        (trial for trial in trials if trial.broken),
        key=lambda trial: (trial.state != "full", sum(one.violation for one in trial.broken)),
    )


def nearest_miss(tuned: Tuned) -> str:
    """Where no trial keeps the constraints: the trial that comes nearest, in words."""
    tried = by_violation(tuned.trials)
    if not tried:
        return "no trial could be run"
    best = tried[0]
    return f"trial {best.number} comes nearest and breaks " + ", ".join(
        in_words(one) for one in best.broken
    )
