"""Searches in sentences: what is recommended, on what evidence, and what it does not say."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from helios_sim.assumptions import means
from helios_sim.profile import MarkovExits, Profile
from helios_sim.questions import MAX_PEAK_FACTOR
from helios_sim.report.words import extrapolated, idle_users, launch_bound, standing_in, worth
from helios_sim.scenario import Scenario
from helios_sim.search.bench import SAMPLE_ANSWERS, FleetAnswer, Load
from helios_sim.search.capacity import Capacity
from helios_sim.search.goals import Goal, in_words
from helios_sim.search.plan import Plan, miss_in_words
from helios_sim.search.prices import grades_of
from helios_sim.search.quality import cell_perplexities, fleet_pays, is_worse, winner_pays
from helios_sim.search.traffic import FEW_ROUNDS, Traffic
from helios_sim.search.tune import (
    Finalist,
    HeldOut,
    Tuned,
    TuneQuestion,
    few_rounds,
    nearest_miss,
)
from helios_sim.search.whatif import Cell, carries_as, compared_by, leaders, short_names
from helios_sim.wording import counted, limits, listed, number, span

FULL_AGREEMENT: Final = 0.9995
"""Agreement that is shown as 100 %."""
SAME_MODEL: Final = "same model at full depth"
"""With what agreement compares a token: a small model agrees with itself."""
ALIKE: Final = 0.03
"""By how much of it mean lengths may differ and still be alike."""
CANDIDATES: Final = "fleet.candidates"
ASSUME: Final = "fleet.assume"
MAX_NAMED: Final = 4
"""Cells that one clause names, at most."""
TIMES = "\N{MULTIPLICATION SIGN}"


def fleet_words(answer: FleetAnswer, replicas: int | None = None) -> str:
    """A fleet as people say it: '3 x static-depth, opt-6.7b on opt-a100-40gb, round-robin'."""
    num = replicas or answer.capacity_replicas
    return f"{num} {TIMES} {answer.fleet.name}"


def bracket(capacity: Capacity) -> str:
    """The bounds of a capacity."""
    high = "beyond" if math.isinf(capacity.high_per_s) else number(capacity.high_per_s, 4)
    low = number(capacity.low_per_s, 4) if capacity.low_per_s else "0"
    return f"{low} to {high}"


def plan_headline(plan: Plan) -> str:
    """The answer in one sentence."""
    if plan.why_none:
        return plan.why_none
    best, target = plan.best, plan.question.target_per_s
    assert best.capacity is not None and best.planned is not None
    agreement = best.agreement
    quality = ""
    if agreement is not None and agreement < FULL_AGREEMENT:
        quality = f", at {number(100 * agreement)} % agreement"
    if target is None:
        return (
            f"{fleet_words(best)} carries {number(best.capacity.rate_per_s, 4)} requests/s under "
            f"the SLO ({bracket(best.capacity)}){quality}."
        )
    return f"{number(target, 4)} requests/s take {_sized(plan, best)}{quality}."


def _sized(plan: Plan, answer: FleetAnswer) -> str:
    """The devices of a fleet for the target, and the fleet."""
    assert answer.planned is not None
    devices = counted(answer.num_gpus or 0, plan.question.device)
    return f"{devices}: {fleet_words(answer, answer.planned.num_replicas)}"


def _in_full(plan: Plan) -> str:
    """What the best fleet is whose tokens all equal those at full depth, or the nearest to that."""
    known = [one for one in plan.answers if one.agreement is not None and not one.broken]
    best = max(known, key=lambda one: min(one.agreement or 0.0, FULL_AGREEMENT))
    share = f"{number(100 * (best.agreement or 0.0))} % agreement"
    if best.fleet == plan.best.fleet:
        return f"No fleet compared has more than {share}."
    if plan.question.target_per_s is not None:
        return f"At {share} they take {_sized(plan, best)}."
    assert best.capacity is not None
    return (
        f"At {share} {fleet_words(best)} carries {number(best.capacity.rate_per_s, 4)} "
        f"({bracket(best.capacity)})."
    )


def plan_remarks(plan: Plan) -> list[str]:
    """What has to be said beside the headline."""
    parts = _NO_PLAN_REMARKS if plan.why_none else _PLAN_REMARKS
    return [text for part in parts for text in part(plan)]


def _held_alike(plan: Plan) -> list[str]:
    """The device and the models, where no fleet's name has them since all have the same."""
    fleets, found = plan.question.fleets, []
    if len({one.profile for one in fleets}) == 1:
        one = fleets[0]
        kind = plan.question.device
        each = f", {counted(one.gpus_per_replica, kind)} a replica" * (one.gpus_per_replica > 1)
        found.append(f"Device: {one.device}{each}, profile {one.profile}.")
    if len({one.candidates for one in fleets}) == 1:
        found += _serving(plan)
    return found


def _serving(plan: Plan) -> list[str]:
    """Which of the candidates served, in which fleets where they differ in that."""
    held: dict[str, list[str]] = {}
    for answer in plan.answers:
        num = len(answer.fleet.candidates)
        models = answer.fleet.candidates if num == 1 else answer.models
        of_all = f" of {num} candidates" if len(models) < num else ""
        if models:
            held.setdefault(f"{listed(models)}{of_all}", []).append(answer.fleet.name)
    if not held:
        return []
    if len(held) == 1:
        return [f"Serving: {next(iter(held))}."]
    each = [f"{models} ({', '.join(names)})" for models, names in held.items()]
    return [f"Serving: {'; '.join(each)}."]


def _target(plan: Plan) -> list[str]:
    """What the target is made of, where it is not a rate that the scenario gives."""
    settings, target = plan.question.settings, plan.question.target_per_s
    if target is None:
        return []
    factor, mean = settings.peak_factor, target / settings.peak_factor
    times = f" times the peak factor of {factor:g}" if factor != 1.0 else ""
    if settings.users is not None and settings.requests_per_user_per_min is not None:
        num = settings.requests_per_user_per_min
        each = f"{num:g} request{'s' * (num != 1.0)}"
        said = f"Target: {counted(settings.users, 'user')} with {each} a minute each"
        if times:
            said += f", or {number(mean, 4)} requests/s,{times}"
    elif times:
        said = f"Target: {number(mean, 4)} requests/s{times}"
    else:
        return []
    return [f"{said}, which is {number(target, 4)} requests/s."]


def _objective(plan: Plan) -> list[str]:
    """The SLO, and the share of the requests that it asks for where it names none."""
    slo, share = plan.question.slo, plan.question.settings.attainment
    said = f"SLO: {limits(str(slo))}"
    if any(limit.percentile is None for limit in slo.limits):
        said += f", by {100 * share:g} % of the requests sent"
    return [f"{said}."]


def _carried(plan: Plan) -> list[str]:
    """What the recommended fleet carries, against what is asked of it."""
    capacity, question = plan.best.capacity, plan.question
    assert capacity is not None
    if question.target_per_s is not None:
        return [
            f"That fleet carries {number(capacity.rate_per_s, 4)} requests/s in all "
            f"({bracket(capacity)}): {headroom_words(plan.headroom)}."
        ]
    return [
        f"The scenario's own rate is {number(question.traffic.rate_per_s, 4)} requests/s: "
        f"{headroom_words(plan.headroom)}."
    ]


def _mean(plan: Plan) -> list[str]:
    """That rates are means, where the workload changes with time, and what its peak is."""
    traffic, planned = plan.question.traffic, plan.best.planned
    assert planned is not None
    factor = traffic.peak_factor
    if traffic.replays or factor < 1.0 + ALIKE:
        return []
    return [
        "Rates are means of a workload that changes with time, which samples play whole: its peak "
        f"is {factor:.2f} times the mean, {number(factor * planned.rate_per_s, 4)} requests/s "
        f"where the mean is {number(planned.rate_per_s, 4)}."
    ]


def _breaks_first(plan: Plan) -> list[str]:
    """Which limit is missed at the first rate that is, and what is short there."""
    capacity, bottleneck = plan.best.capacity, plan.best.bottleneck
    assert capacity is not None
    if capacity.outcome == "all carried":
        found = ["No rate tried was missed: the search ended before the SLO broke."]
    else:
        first = capacity.first_missed
        what = listed([one.words for one in first.verdict.broken])
        found = [f"First to break, at {number(first.rate_per_s, 4)}: {what}."]
    if bottleneck is not None:
        found.append(f"Bottleneck: {bottleneck.cause}; {bottleneck.evidence}.")
    return found


def _too_short(plan: Plan) -> list[str]:
    """That the samples behind the answer are too short for it, if they are."""
    short, few = plan.best.short, plan.best.of_few_rounds
    found = [] if short is None else [short_words(plan.question.traffic, short)]
    return found if few is None else [*found, few_rounds_words(plan.question.traffic, few)]


def _shortened(plan: Plan) -> list[str]:
    """How many requests are longer than what every fleet has a place for, and are cut."""
    num, of = (plan.best.figures.get(key) for key in ("num_shortened", "num_requests"))
    if not num or not of:
        return []
    return [
        f"{number(100 * num / of)} % of the requests are shortened to "
        f"{number(plan.question.context_tokens)} tokens, for all fleets alike."
    ]


def _quality(plan: Plan) -> list[str]:
    """What full agreement takes, where nobody has set a floor and the best fleet has less."""
    agreement = plan.best.agreement
    if agreement is None or agreement >= FULL_AGREEMENT or plan.question.has_floor:
        return fleet_pays(plan)
    return [_in_full(plan), *fleet_pays(plan)]


def _constraints(plan: Plan) -> list[str]:
    """The constraints, and which fleets break them."""
    constraints = plan.question.constraints
    if not str(constraints):
        return []
    kept = "" if plan.why_none else "; kept by what is recommended"
    found = [f"Constraints: {constraints}{kept}."]
    for one in plan.answers:
        if one.broken:
            what = listed([in_words(each) for each in one.broken])
            found.append(f"Not recommended: {one.fleet.name}, which breaks {what}.")
    return found


def _energy(plan: Plan) -> list[str]:
    """Energy a token, and beside it the quality of those tokens."""
    energy, agreement = plan.best.figures.get("energy_per_output_token"), plan.best.agreement
    if energy is None:
        return []
    assert plan.best.planned is not None
    at = number(plan.best.planned.rate_per_s, 4)
    said = f"Energy at {at} requests/s: {number(1e-3 * energy)} J an output token"
    if agreement is not None:
        said += f"; {number(100 * agreement)} % of the tokens equal those of the {SAME_MODEL}"
    return [f"{said}."]


def _cost(plan: Plan) -> list[str]:
    """What the fleet costs, at which prices, and what its day does."""
    cost, prices, planned = plan.best.cost, plan.question.prices, plan.best.planned
    if cost is None or prices is None or planned is None:
        return []
    currency = prices.currency
    grades = listed(grades_of(prices, [plan.best.fleet.device]))
    found = [
        f"Cost at {number(planned.rate_per_s, 4)} requests/s: {number(cost.per_hour)} {currency} "
        f"an hour, {number(cost.per_million_tokens)} {currency} a million output tokens, at the "
        f"{grades} prices of {plan.question.settings.prices}."
    ]
    if plan.hours:
        day = sum(hour.cost_per_hour or 0.0 for hour in plan.hours)
        always = 24 * cost.per_hour
        saved = 1.0 - day / always if always else 0.0
        said = (
            f"Over the day: {number(day)} {currency} instead of {number(always)} with the fleet "
            f"always on, {100 * saved:.0f} % less"
        )
        if cost.per_million_tokens is not None:
            # Tokens are as many for each request of the day as at its busiest.
            tokens_m = cost.per_hour / cost.per_million_tokens
            tokens_m *= sum(hour.rate_per_s for hour in plan.hours) / planned.rate_per_s
            said += f"; {number(day / tokens_m)} {currency} a million output tokens"
        found.append(f"{said}.")
    return found


def _left_out(plan: Plan) -> list[str]:
    """Which profiles are not compared, since they lack models."""
    skipped = plan.question.skipped
    return [f"Left out: {'; '.join(skipped)}."] if skipped else []


def _failures(plan: Plan) -> list[str]:
    """The fleets that are not enough."""
    return [_failure(plan, one) for one in plan.answers if one.planned is None]


def _grades(plan: Plan) -> list[str]:
    """What the numbers of the profiles are worth."""
    profiles = plan.question.profiles.values()
    planned = {name for one in plan.answers for name in one.fleet.candidates}
    grades = grades_by_name(profiles)
    played = [{**one.figures, "label": one.fleet.name} for one in plan.answers]
    return [
        worth(grades, "fleets"),
        *launch_bound(grades, played, "fleets", "At the planned load"),
        *_assumed(profiles, planned),
    ]


def _extrapolations(plan: Plan) -> list[str]:
    """What the profiles can only extrapolate."""
    return _beyond([(one.fleet.name, one.beyond) for one in plan.answers])


def _failure(plan: Plan, answer: FleetAnswer) -> str:
    """Why a fleet is not enough, in one line."""
    name, capacity = answer.fleet.name, answer.capacity
    if answer.refusal is not None or capacity is None:
        return f"{name} cannot serve this: {answer.refusal}"
    if capacity.outcome == "none carried":
        why = miss_in_words(answer)
        if answer.bottleneck is not None:
            why += f"; {answer.bottleneck.cause}: {answer.bottleneck.evidence}"
        return f"{name} meets the SLO at no rate that was tried: {why}."
    most = plan.question.settings.max_replicas
    why = "" if answer.bottleneck is None else f": {answer.bottleneck.evidence}"
    return (
        f"{name} does not surely carry it with {counted(most, 'replica')}; one carries "
        f"{number(capacity.rate_per_s, 4)} requests/s{why}."
    )


def _peak_missed(plan: Plan) -> list[str]:
    """That the busiest window is not carried at the mean rate asked for, where it is not.

    A peak factor says how far above the mean the target lies, so that the mean is below it.
    """
    question, capacity = plan.question, plan.best.capacity
    assert capacity is not None
    if not question.traffic.replays:
        return []
    target, settings = question.target_per_s, question.settings
    mean = question.traffic.rate_per_s if target is None else target / settings.peak_factor
    factor = question.traffic.peak_factor
    if factor < 1.0 + ALIKE or mean * factor <= capacity.rate_per_s:
        return []
    whose = "The scenario's own rate is a mean of" if target is None else "The target is a mean of"
    helps = ""
    if factor <= MAX_PEAK_FACTOR:
        asked = f"plan.target_rate_per_s = {mean:.4g} and " if target is None else ""
        peak = f"plan.peak_factor = {math.ceil(100 * factor) / 100:g}"
        helps = f"; give {asked}{peak} for a fleet that carries that window too"
    return [
        f"{whose} {number(mean, 4)} requests/s, at which the busiest window of the trace has "
        f"{number(mean * factor, 4)} and is not carried{helps}."
    ]


def _peak(plan: Plan) -> list[str]:
    """That every window is played at one rate, and which mean rate the busiest one allows."""
    assert plan.best.capacity is not None
    if not plan.question.traffic.replays:
        return []
    factor = plan.question.traffic.peak_factor
    if factor < 1.0 + ALIKE:
        return []
    most = plan.best.capacity.rate_per_s / factor
    return [
        "Windows are each played at the rate asked for, but the busiest has "
        f"{factor:.2f} times the mean rate of the trace: a mean of {number(most, 4)} keeps it "
        "within what is carried."
    ]


def _unlike_the_trace(plan: Plan) -> list[str]:
    """That the windows which were tried hold other lengths than the whole trace, if they do."""
    if not plan.question.traffic.replays:
        return []
    used = max((load.verdict.num_replications for load in plan.best.loads), default=0)
    tried = plan.question.traffic.mean_lengths(used)
    whole = plan.question.traffic.mean_lengths()
    if all(abs(mine / all_ - 1.0) <= ALIKE for mine, all_ in zip(tried, whole, strict=True)):
        return []
    return [
        f"The {used} windows on which loads were measured have prompts of "
        f"{number(tried[0])} and answers of {number(tried[1])} tokens on average; the whole trace "
        f"{number(whole[0])} and {number(whole[1])}."
    ]


def _shared_rows(plan: Plan) -> list[str]:
    """That samples meet lengths which others met, where the trace is too short for all of them."""
    traffic = plan.question.traffic
    nums = [
        num
        for load in plan.best.loads
        if (num := load.means.get("num_requests"))
        and traffic.share_rows(num, load.verdict.num_replications)
    ]
    return [_shared(traffic, max(nums), "bounds tell less of other lengths")] if nums else []


def _shared(traffic: Traffic, num_requests: float, so: str) -> str:
    """That samples of up to so many requests share rows of the trace, and what helps."""
    return (
        f"Samples of up to {number(round(num_requests))} requests take the "
        f"{number(traffic.num_rows)} rows of the trace in order, each from another one on, and "
        f'share some: {so}. Give a longer trace, or workload.trace_rows = "random".'
    )


_PLAN_REMARKS: Final[tuple[Callable[[Plan], list[str]], ...]] = (
    _held_alike,
    _target,
    _objective,
    _carried,
    _mean,
    _peak_missed,
    _breaks_first,
    _too_short,
    _peak,
    _unlike_the_trace,
    _shared_rows,
    _shortened,
    _quality,
    _constraints,
    _energy,
    _cost,
    _left_out,
    _failures,
    _grades,
    _extrapolations,
)
"""What is said of a plan, in this order."""

_NO_PLAN_REMARKS: Final[tuple[Callable[[Plan], list[str]], ...]] = (
    _held_alike,
    _target,
    _objective,
    _constraints,
    _left_out,
    _failures,
    _grades,
    _extrapolations,
)
"""What is said of a plan that recommends nothing, in this order."""


def short_words(traffic: Traffic, load: Load) -> str:
    """That samples are too short for what is served, and what helps."""
    return (
        f"A sample lasts {span(load.sample_s)} and an answer up to {span(load.answer_s)}: samples "
        f"begin empty and fill for too much of their time (at least {SAMPLE_ANSWERS:g} answers are "
        f"asked for), so the capacity is optimistic. Give {_longer_by(traffic)}."
    )


def few_rounds_words(traffic: Traffic, load: Load) -> str:
    """That samples are too short for what the policy does only now and then, and what helps."""
    rounds = f"{load.rounds:.1f}"
    return (
        f"A sample holds about {rounds} round{'s' * (rounds != '1.0')} of reassessment for each "
        f"replica (at least {FEW_ROUNDS} are asked for): what reassessing costs is measured on "
        f"few. Give {_longer_by(traffic)}."
    )


def _longer_by(traffic: Traffic) -> str:
    """What makes samples longer."""
    if traffic.replays:
        return "a longer trace or fewer plan.windows"
    if traffic.is_shaped:
        return "a longer workload"
    return "a larger plan.num_requests, or none"


def whatif_answer(cells: Sequence[Cell], replications: int) -> list[str]:
    """Which cell is best in which figure, a sentence for each; the first is the headline.

    It speaks of the first figure that cells are compared by.
    """
    able = [cell for cell in cells if cell.can_be]
    if not able:
        return [f"None of {counted(len(cells), 'cell')} can be run."]
    names, goals = short_names(able), compared_by(able)
    if len(able) == 1:
        figures = [f"{goal.name} {_best_value(able[0], goal)}" for goal in goals]
        return [f"{names[0]} has {listed(figures)}; there is no other to compare it with."]
    names = [
        f"{name} ({cell.saturation})" if cell.saturation == "overloaded" else name
        for name, cell in zip(names, able, strict=True)
    ]
    told: dict[tuple[int, ...], list[str]] = {}
    for goal in goals:
        best, *others = leaders(able, goal)
        figure = f"{goal.name} ({_best_value(able[best], goal)})"
        if any(carries_as(able[one], able[best], goal) for one in others):
            figure = f"{goal.name} (up to {_best_value(able[best], goal)}, of the same load)"
        told.setdefault(tuple(sorted([best, *others])), []).append(figure)
    intervals = " beyond their 95 % intervals" if replications > 1 else ""
    sentences = []
    for places, figures in told.items():
        if len(places) == len(able):
            sentences.append(
                f"The {len(able)} cells do not differ{intervals} in {listed(figures)}."
            )
            continue
        who = [names[place] for place in places]
        if len(who) > MAX_NAMED:
            who = [*who[: MAX_NAMED - 1], f"{len(who) - MAX_NAMED + 1} more"]
        rank = "Best" if len(who) == 1 else "Level at the top"
        sentences.append(f"{rank} in {listed(figures)}: {listed(who)}.")
    return sentences


def _best_value(cell: Cell, goal: Goal) -> str:
    """A cell's figure in its unit."""
    value = cell.means.get(goal.key)
    return f"{number(None if value is None else goal.scale * value)} {goal.unit}"


def whatif_remarks(
    scenario: Scenario, cells: Sequence[Cell], replications: int, profiles: Sequence[Profile]
) -> list[str]:
    """What has to be said beside a grid on these profiles, the answer beyond its headline first."""
    runs = f"means over {replications} runs each"
    if replications == 1:
        runs = "one run each: what is chance shows only over several, which --replications gives"
    found = [*whatif_answer(cells, replications)[1:], f"{counted(len(cells), 'cell')}, {runs}."]
    slo = scenario.slo_spec
    if slo is not None and not any(key.startswith("slo") for cell in cells for key in cell.values):
        found.append(f"SLO: {limits(str(slo))}; a request that meets all of it is good.")
    found += [f"{cell.name} cannot be run: {cell.why}" for cell in cells if cell.why]
    able = [cell for cell in cells if cell.can_be]
    found += _qualities(able, profiles)
    found += idle_users([{**cell.means, "label": cell.name} for cell in able])
    beyond = _beyond([(cell.name, cell.beyond) for cell in cells])
    grades = []
    if profiles:
        counts = grades_by_name(profiles)
        played = [{**cell.means, "label": cell.name} for cell in able]
        grades = [worth(counts, "cells"), *launch_bound(counts, played, "cells")]
    varied = [cell.values[CANDIDATES] for cell in cells if CANDIDATES in cell.values]
    keys = {key for cell in cells for key in cell.values}
    assumed = _assumed(profiles, _candidates(scenario, varied), keys)
    return [*found, *grades, *assumed, *beyond]


def _qualities(able: Sequence[Cell], profiles: Sequence[Profile]) -> list[str]:
    """In what quality cells differ: tokens unlike those at full depth, and other perplexities."""
    names, said = short_names(able), []
    agreements = [
        (agreement, name)
        for name, cell in zip(names, able, strict=True)
        if (agreement := cell.means.get("agreement")) is not None
    ]
    if agreements and max(agreements)[0] - min(agreements)[0] >= 1.0 - FULL_AGREEMENT:
        (low, least), (high, most) = min(agreements), max(agreements)
        said.append(
            f"{number(100 * low)} % of the tokens equal those of the {SAME_MODEL} with {least}, "
            f"{number(100 * high)} % with {most}"
        )
    known = cell_perplexities(able, profiles)
    each = [(value, name) for name, value in zip(names, known, strict=True) if value is not None]
    if each and is_worse(max(each)[0], min(each)[0]):
        (low, best), (high, worst) = min(each), max(each)
        said.append(f"perplexity is {number(low, 4)} with {best}, {number(high, 4)} with {worst}")
    return [f"Quality differs: {'; '.join(said)}."] if said else []


def grades_by_name(profiles: Iterable[Profile]) -> dict[str, Mapping[str, int]]:
    """How many numbers of each profile stand at each grade."""
    return {one.name: one.grade_counts() for one in profiles}


def _assumed(
    profiles: Collection[Profile],
    used: Collection[str] | None = None,
    varied: Collection[str] = (),
) -> list[str]:
    """What is assumed: of the exits of models, of all or those used, and by the scenario.

    Settings that are `varied` say themselves what they assume.
    """
    likes = {
        name: like
        for profile in profiles
        for name, like in profile.stand_ins.items()
        if used is None or name in used
    }
    found = [standing_in(likes)] if likes else []
    places = [key.removeprefix(ASSUME).lstrip(".") for key in varied if key.startswith(ASSUME)]
    parts = dict.fromkeys(
        one.said()
        for profile in profiles
        for one in profile.assumptions
        if not any(not place or means(place, one.place) for place in places)
    )
    return [*found, *([f"The scenario assumes {listed(list(parts))}."] if parts else [])]


def _generated(question: TuneQuestion) -> list[str]:
    """What tuning a threshold cannot tell where nobody observed a token."""
    tunes = any(one.key.endswith(".confidence_threshold") for one in question.space.ranges)
    steps = {
        one.exits.agreement.step_confidence
        for one in question.profiles
        if isinstance(one.exits, MarkovExits)
    }
    if not tunes or not steps:
        return []
    return [
        f"Exits are generated: from confidence {max(steps):g} on no token is likelier to agree "
        "than another, so what a higher threshold gains here in quality says little of real text."
    ]


def _candidates(scenario: Scenario, varied: Iterable[Iterable[str]]) -> set[str] | None:
    """The models that may take part; None for all of a profile."""
    sets = [scenario.fleet.candidates, *varied]
    return {name for models in sets for name in models} if all(sets) else None


def _beyond(named: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    text = extrapolated(named)
    return [] if text is None else [text]


def headroom_words(headroom: float) -> str:
    """How far a capacity lies above (or below) what is asked."""
    if headroom < 0:
        return f"{100 * -headroom:.0f} % too little"
    return f"{100 * headroom:.0f} % headroom"


def tune_headline(tuned: Tuned) -> str:
    """The answer in one sentence."""
    judge = tuned.question.judge
    if tuned.winner is None:
        tried = counted(len(tuned.trials), "trial")
        if all(trial.state == "impossible" for trial in tuned.trials):
            return f"None of {tried} can be run; the first says: {tuned.trials[0].why}"
        return f"None of {tried} keeps the constraints: {nearest_miss(tuned)}."
    held = tuned.own_rate
    assert held is not None
    goal = judge.goals[0]
    was, now = (
        "no value" if one is None else number(one, 4) for one in (held.base[0], held.tuned[0])
    )
    change = f"{was} to {now} {goal.unit}".strip()
    own = listed([in_words(one) for one in held.base_broken])
    if tuned.verdict == "no better":
        stays = "The scenario stays as it is."
        if own:
            stays = f"The scenario stays as it is and breaks {own} there."
        if tuned.lost is not None:
            return (
                f"None of the best {len(tuned.finalists)} of {len(tuned.trials):,} trials keeps "
                "the constraints on traffic it was not tuned on: trial "
                f"{tuned.winner.number} comes nearest and {_failing(tuned.lost)} there. {stays}"
            )
        why = (
            f"breaks {listed([in_words(one) for one in held.tuned_broken])}"
            if held.tuned_broken
            else f"gives no value of {goal.name}"
            if held.tuned[0] is None
            else f"takes {goal.name} from {change}"
        )
        return (
            f"No setting found is better on traffic it was not tuned on: trial "
            f"{tuned.winner.number}, the best of {len(tuned.trials):,}, {why} there. {stays}"
            f"{_nearer(tuned.winner.number, held)}"
        )
    if own:
        return (
            f"Trial {tuned.winner.number} keeps the constraints on traffic not tuned on, where the "
            f"scenario as it stands breaks {own}; {goal.name} goes from {change}."
        )
    said = f"Trial {tuned.winner.number} takes {goal.name} from {change}, on traffic not tuned on"
    return f"{said}{_unshown(tuned) if tuned.verdict == 'unsure' else '.'}"


def _unshown(tuned: Tuned) -> str:
    """Why a gain is not shown to be one, and what becomes of the settings; ends a sentence."""
    judge, settings = tuned.question.judge, tuned.question.settings
    if settings.held_out == 1:
        why = "one sample tells no interval (give search.held_out 2 or more)"
    elif len(judge.goals) == 1:
        why = "the 95 % interval of the gain holds 0"
    else:
        why = "the 95 % interval of its gains together holds 0"
    return f", but is not shown to be better: {why}. Its settings are written all the same."


def _few_rounds(tuned: Tuned) -> list[str]:
    """That samples end before reassessing has shown what it is worth, where they do."""
    few = few_rounds(tuned)
    if not few:
        return []
    each = listed([f"{number(rounds)} with {name}" for name, rounds in few])
    return [
        f"A sample holds few rounds of reassessment for each replica, {each}: what reassessing "
        f"costs or buys is measured on fewer than {FEW_ROUNDS}."
    ]


def _rows_met_again(tuned: Tuned) -> list[str]:
    """That held-out samples meet lengths which were tuned on, where the trace is too short."""
    traffic, settings = tuned.question.traffic, tuned.question.settings
    met = [one.means for one in (tuned.base, tuned.winner) if one is not None]
    num = max((means.get("num_requests") or 0.0 for means in met), default=0.0)
    if traffic.is_shaped:
        num *= max(settings.held_out_rates)
    if not traffic.share_rows(num, traffic.most_samples):
        return []
    return [_shared(traffic, num, "what is held out is not all new")]


def _together(tuned: Tuned) -> list[str]:
    """What several objectives gain together, by which the winner is judged."""
    held = tuned.own_rate
    if held is None or held.worth is None or len(held.gains) == 1:
        return []
    gain, low, high = (signed(100 * one) for one in held.worth)
    return [
        "Together its gains, as shares of what the scenario as it stands has, add up to "
        f"{gain} % [{low}, {high}]."
    ]


def _nearer(number_of: int, held: HeldOut) -> str:
    """Which of two that break the constraints comes nearer to keeping them."""
    ours, own = (
        sum(one.violation for one in broken) for broken in (held.tuned_broken, held.base_broken)
    )
    return f" Trial {number_of} comes nearer to keeping the constraints." if 0 < ours < own else ""


def _failing(finalist: Finalist) -> str:
    """What is wrong with a finalist, as a verb and its object."""
    if finalist.broken:
        return f"breaks {listed([in_words(one) for one in finalist.broken])}"
    return "leaves an objective undefined"


def _finals(tuned: Tuned) -> list[str]:
    """How the winner was chosen among the finalists."""
    if not tuned.finalists or tuned.winner is None:
        return []
    said = (
        f"The best {len(tuned.finalists)} trials met "
        f"{counted(tuned.question.settings.finals, 'further sample')}"
    )
    kept = sum(one.keeps for one in tuned.finalists)
    if not kept:
        return [f"{said}, where none keeps the constraints."]
    if not str(tuned.question.judge.constraints):
        return [f"{said}; trial {tuned.winner.number} is the best of them there."]
    keep = f"{kept} of them keep{'s' if kept == 1 else ''}"
    if kept == len(tuned.finalists):
        keep = "all keep"
    return [f"{said}, where {keep} the constraints; trial {tuned.winner.number} is the best there."]


def tune_remarks(tuned: Tuned) -> list[str]:
    """What has to be said beside the headline."""
    states = [trial.state for trial in tuned.trials]
    judge = tuned.question.judge
    found = [
        f"{counted(len(tuned.trials), 'trial')} by {tuned.question.settings.sampler}: "
        f"{states.count('full'):,} on all samples of the tuning traffic, "
        f"{states.count('stopped'):,} stopped after the first, "
        f"{counted(states.count('impossible'), 'combination')} that cannot be."
    ]
    if str(judge.constraints):
        kept = sum(one.is_feasible for one in tuned.trials)
        keep = f"{counted(kept, 'trial')} keep{'s' * (kept == 1)}"
        found.append(f"Constraints: {judge.constraints}; {keep} them.")
    if tuned.base.broken:
        broken = listed([in_words(one) for one in tuned.base.broken])
        found.append(f"The scenario as it stands breaks {broken}.")
    tried = [("the scenario as it stands", tuned.base.beyond)]
    if tuned.winner is not None:
        tried.append((f"trial {tuned.winner.number}", tuned.winner.beyond))
    grades = grades_by_name(tuned.question.profiles)
    played = [{**tuned.base.means, "label": "the scenario as it stands"}]
    found += [worth(grades, "settings"), *launch_bound(grades, played, "settings")]
    question = tuned.question
    ranged = [one.choices for one in question.space.ranges if one.key == CANDIDATES]
    varied = [candidates for choices in ranged for candidates in choices]
    found += _assumed(question.profiles, _candidates(question.scenario, varied))
    found += _generated(question)
    found += _beyond(tried) + _few_rounds(tuned) + _rows_met_again(tuned) + _finals(tuned)
    held = tuned.own_rate
    if tuned.winner is None or held is None:
        return found
    for place, goal in enumerate(judge.goals):
        known = held.gains[place]
        if known is None:
            lacking = [
                name
                for name, scores in (
                    ("the scenario as it stands", held.base),
                    (f"trial {tuned.winner.number}", held.tuned),
                )
                if scores[place] is None
            ]
            found.append(f"On held-out traffic {listed(lacking)} gave no value of {goal.name}.")
            continue
        gain, low, high = known
        sure = low > 0.0 or high < 0.0
        sign = 1.0 if goal.better == "higher" else -1.0
        ends = sorted((sign * low, sign * high))
        found.append(
            f"On held-out traffic {goal.name} changes by {signed(sign * gain)} {goal.unit} "
            f"[{signed(ends[0])}, {signed(ends[1])}] against the scenario as it stands"
            f"{'' if sure else ', which shows no difference'}; {_loss(tuned, place)}."
        )
    found += _together(tuned)
    found += winner_pays(tuned)
    if held.tuned_broken:
        found.append(
            "On held-out traffic the winner breaks "
            f"{listed([in_words(one) for one in held.tuned_broken])}."
        )
    return found


def _loss(tuned: Tuned, place: int) -> str:
    """What is left of a gain off the tuning traffic."""
    assert tuned.winner is not None and tuned.own_rate is not None
    base, best, held = tuned.base.scores, tuned.winner.scores, tuned.own_rate
    was, now = held.base[place], held.tuned[place]
    if base is None or best is None or not base[place] or not was or now is None:
        return "nothing to compare it with on the tuning traffic"
    on, off = best[place] / base[place], now / was
    share = 100 * (off / on - 1)
    than = f"{abs(share):.0f} % {'more' if share > 0 else 'less'} than"
    return (
        f"it is {off:.3g} times that, {'as much as' if abs(share) < 0.5 else than} the {on:.3g} "
        "times that the tuning traffic promised"
    )


def signed(value: float) -> str:
    """A difference with its sign, and a minus as wide as the plus."""
    if math.isinf(value):
        return "unknown"
    return f"{'+' if value >= 0 else chr(0x2212)}{number(abs(value))}"
