"""Capacity planning: the highest rate a fleet carries, the smallest fleet for one, and its day."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from helios_sim.errors import InputError, did_you_mean
from helios_sim.experiment import choose_policies
from helios_sim.policy.registry import make_policy
from helios_sim.profile import Profile, load_profile, where_to_find
from helios_sim.questions import PlanSettings
from helios_sim.report.words import device_of_all
from helios_sim.scenario import PolicySettings, Router, Scenario
from helios_sim.search.bottleneck import Bottleneck, find_bottleneck
from helios_sim.search.capacity import (
    Capacity,
    FleetSize,
    find_capacity,
    find_fleet,
)
from helios_sim.search.goals import (
    Broken,
    Constraints,
    Judge,
    check_countable,
    in_words,
    parse_constraints,
)
from helios_sim.search.means import Means, clauses_beyond, mean_figures, models_served
from helios_sim.search.points import Figures, Point, point_of
from helios_sim.search.prices import Cost, Prices, check_prices, cost_of, load_prices
from helios_sim.search.studies import Outcome, Steps, Study, figures_of
from helios_sim.search.traffic import (
    FEW_ROUNDS,
    MAX_RUN_REQUESTS,
    Traffic,
    at_rate,
    rounds_in_sample,
)
from helios_sim.search.verdict import BACKLOG, Verdict, judge
from helios_sim.slo import SloSpec
from helios_sim.wording import counted

Asked = TypeVar("Asked", int, float)
Found = TypeVar("Found")

MAX_WHOLE_REQUESTS: Final = 2_000_000
"""Requests of a workload that is played whole, at most: some seconds each time it is played."""
MIN_REQUESTS: Final = 2000
"""Requests of a sample for each replica, at least, where no number is asked for."""
SAMPLE_ANSWERS: Final = 20.0
"""How many times as long as an answer (the 99th percentile) a sample has to last.

A sample begins empty, and a fleet is full only once the first answers end: a shorter sample shows
it on the way there. A tenth of the sample, two answers, is not measured.
"""
LONGER: Final = 4
"""How many times as long a sample has to agree with an answer before it is given.

Near the boundary a queue grows more slowly than answers end, and replications cannot see what all
of them are too short for.
"""


@dataclass(frozen=True)
class Fleet:
    """One way to serve: which devices, which models, who decides, who routes.

    Its name says what tells it from the other fleets of a plan.
    """

    name: str
    profile: str
    device: str
    gpus_per_replica: int
    candidates: tuple[str, ...]
    policy: PolicySettings
    router: str
    is_of_processor: bool = False


@dataclass(frozen=True)
class Load:
    """A number of replicas at a rate: the verdict, and the figures' means over replications.

    `saturations` are those of the replications; `beyond` says what the profile can only
    extrapolate. Its samples are `lengthened` times as long as at first and last `sample_s`, in
    which answers take up to `answer_s`; they are `longer` times as long as answers ask for. They
    hold so many `rounds` of reassessment, infinitely many for a policy that does not reassess.
    """

    num_replicas: int
    rate_per_s: float
    verdict: Verdict
    means: Means
    saturations: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()
    lengthened: int = 1
    longer: int = 1
    sample_s: float = math.inf
    answer_s: float = 0.0
    rounds: float = math.inf

    @property
    def is_short(self) -> bool:
        """Whether samples are shorter than answers ask for, so that they flatter the fleet."""
        return self.sample_s < SAMPLE_ANSWERS * self.answer_s

    @property
    def has_few_rounds(self) -> bool:
        """Whether samples hold too few rounds of reassessment to show what these cost."""
        return self.rounds < FEW_ROUNDS * (1.0 - 1e-9)

    @property
    def enough_s(self) -> float:
        """How long a run has to last to tell as much as a sample that is no longer than asked."""
        for_rounds = 0.0 if math.isinf(self.rounds) else FEW_ROUNDS / self.rounds * self.sample_s
        return min(max(SAMPLE_ANSWERS * self.answer_s, for_rounds), self.sample_s)


@dataclass(frozen=True)
class FleetAnswer:
    """What was found for one fleet; `refusal` says why it cannot serve at all.

    `capacity` is that of `capacity_replicas` replicas. With a target, `size` is the smallest
    number that carries it and `planned` what that number does at the target; without one
    `planned` is the load at the capacity. `loads` are all that was measured. `figures` are of a
    run of the planned scenario, or means over samples where `is_one_run` is False, in which
    `models` served; `broken` are the constraints that they break.
    """

    fleet: Fleet
    capacity_replicas: int
    capacity: Capacity | None = None
    bottleneck: Bottleneck | None = None
    size: FleetSize | None = None
    planned: Load | None = None
    loads: tuple[Load, ...] = ()
    refusal: InputError | None = None
    cost: Cost | None = None
    figures: Means = field(default_factory=dict)
    is_one_run: bool = False
    models: tuple[str, ...] = ()
    broken: tuple[Broken, ...] = ()

    @property
    def agreement(self) -> float | None:
        """Share of the planned load's tokens that equal those of their own model at full depth."""
        return self.figures.get("agreement")

    @property
    def num_gpus(self) -> int | None:
        """GPUs of the planned fleet."""
        if self.planned is None:
            return None
        return self.planned.num_replicas * self.fleet.gpus_per_replica

    @property
    def beyond(self) -> tuple[str, ...]:
        """What the profile can only extrapolate of the planned load, or of that at the capacity."""
        return next((load.beyond for load in self._shown if load.beyond), ())

    @property
    def short(self) -> Load | None:
        """The planned load, or that at the capacity, where its samples are too short."""
        return next((load for load in self._shown if load.is_short), None)

    @property
    def of_few_rounds(self) -> Load | None:
        """The planned load, or that at the capacity, where its samples hold too few rounds."""
        return next((load for load in self._shown if load.has_few_rounds), None)

    @property
    def _shown(self) -> tuple[Load, ...]:
        """The loads that the answer stands on."""
        rate = None if self.capacity is None else self.capacity.rate_per_s
        at_capacity = (
            one
            for one in self.loads
            if (one.num_replicas, one.rate_per_s) == (self.capacity_replicas, rate)
        )
        return tuple(load for load in (self.planned, *at_capacity) if load is not None)


@dataclass(frozen=True)
class Hour:
    """One hour of the day: its rate, the replicas it needs, what they cost."""

    hour: int
    rate_per_s: float
    num_replicas: int
    cost_per_hour: float | None


@dataclass(frozen=True)
class PlanQuestion:
    """A scenario's plan with all it names read: what every study needs to know."""

    scenario: Scenario
    settings: PlanSettings
    base_dir: Path
    where: str
    slo: SloSpec
    traffic: Traffic
    prices: Prices | None
    constraints: Constraints
    fleets: tuple[Fleet, ...]
    profiles: Mapping[str, Profile]
    skipped: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """What the fleets stand on: GPU, processor, or device where they differ."""
        return device_of_all(one.is_of_processor for one in self.fleets)

    @property
    def context_tokens(self) -> int:
        """Tokens that every fleet has a place for: to so many a longer request is shortened."""
        given = self.scenario.workload.context_tokens
        least = min(_contexts(self.fleets, self.profiles))
        return least if given is None else min(given, least)

    @property
    def target_per_s(self) -> float | None:
        """The rate to carry; None where the highest is asked."""
        return self.settings.target

    @property
    def judge(self) -> Judge:
        """What says which constraints figures break."""
        return Judge((), self.constraints, self.prices, f"{self.where}, plan.prices")

    @property
    def has_floor(self) -> bool:
        """Whether a constraint says how often tokens have to equal those at full depth."""
        return any(bound.goal.name == "agreement" for bound in self.constraints.bounds)


@dataclass(frozen=True)
class Plan:
    """Answers in order of merit, the first recommended, with its own capacity and its day.

    Where none is enough, `why_none` says so, and the first is the one that comes nearest.
    """

    question: PlanQuestion
    answers: tuple[FleetAnswer, ...]
    best: FleetAnswer
    headroom: float
    hours: tuple[Hour, ...] = field(default=())
    why_none: str = ""


def read_plan(scenario: Scenario, base_dir: Path, where: str) -> PlanQuestion:
    """Read what the `[plan]` table names; without the table its defaults hold."""
    settings = scenario.plan or PlanSettings()
    slo = scenario.slo_spec
    if slo is None:
        raise InputError(
            "A plan asks what is carried under an SLO; give the scenario one, such as text = "
            '"ttft:p99<500ms;tpot:p95<50ms".',
            f"{where}, slo",
        )
    place = f"{where}, plan"
    constraints = parse_constraints(settings.constraints, f"{place}.constraints")
    goals = [bound.goal for bound in constraints.bounds]
    check_countable(goals, True, settings.prices is not None, where, "plan")
    fleets, skipped = _fleets(scenario, settings, base_dir, where)
    assumed = scenario.fleet.assume
    profiles = {fleet.profile: load_profile(fleet.profile, base_dir, assumed) for fleet in fleets}
    scenario = _with_one_context(scenario, _contexts(fleets, profiles))
    prices = None
    if settings.prices is not None:
        prices = load_prices(settings.prices, base_dir, f"{place}.prices")
        for profile in profiles.values():
            check_prices(prices, profile, f"{place}.prices")
    traffic = Traffic(
        scenario,
        base_dir,
        where,
        settings.num_requests or MIN_REQUESTS,
        settings.windows,
        settings.warmup_share,
        most_samples=settings.max_replications,
    )
    # A number of requests that is asked for is kept to; so is a workload that changes with time.
    grows = traffic.replays or not (traffic.is_shaped or settings.num_requests)
    traffic = replace(traffic, grows=grows)
    if traffic.num_samples is not None:
        settings = _within_windows(settings)
    if traffic.num_samples is not None and settings.max_replications > traffic.num_samples:
        raise InputError(
            f"max_replications is {settings.max_replications} but the trace is cut into "
            f"{settings.windows} windows, and a replication takes one; give at least as many "
            "windows, or leave it out.",
            f"{place}.windows",
        )
    traffic.check()
    question = PlanQuestion(
        scenario=scenario,
        settings=settings,
        base_dir=base_dir,
        where=where,
        slo=slo,
        traffic=traffic,
        prices=prices,
        constraints=constraints,
        fleets=fleets,
        profiles=profiles,
        skipped=skipped,
    )
    _check_playable(question)
    return question


def _check_playable(question: PlanQuestion) -> None:
    """Refuse a workload that is played whole and holds more requests than anybody waits for."""
    traffic = question.traffic
    if not traffic.is_shaped:
        return
    rate_per_s = question.target_per_s or traffic.rate_per_s
    num = traffic.num_in_run(rate_per_s)
    if num > MAX_WHOLE_REQUESTS:
        raise InputError(
            f"At {rate_per_s:.4g} requests/s this workload holds {num:,} requests; it changes with "
            f"time and is played whole, so at most {MAX_WHOLE_REQUESTS:,} are allowed. Give fewer "
            "(workload.num_requests, workload.duration_s), or a lower target.",
            f"{question.where}, workload",
        )


def _contexts(fleets: Sequence[Fleet], profiles: Mapping[str, Profile]) -> set[int]:
    """The tokens that fleets have a place for: the smallest context among the models of each."""
    return {
        min(profiles[one.profile].model(name).model.shape.max_positions for name in one.candidates)
        for one in fleets
    }


def _with_one_context(scenario: Scenario, contexts: set[int]) -> Scenario:
    """The scenario with requests shortened alike for fleets of several contexts.

    Each would otherwise meet prompts of its own length: the shorter its context, the easier.
    """
    workload = scenario.workload
    if workload.over_context != "truncate" or len(contexts) == 1:
        return scenario
    least = min(contexts)
    tokens = least if workload.context_tokens is None else min(workload.context_tokens, least)
    shortened = workload.model_copy(update={"context_tokens": tokens})
    return scenario.model_copy(update={"workload": shortened})


def _within_windows(settings: PlanSettings) -> PlanSettings:
    """The settings with as many replications as there are windows, where defaults ask for more."""
    lowered = {
        name: min(getattr(settings, name), settings.windows)
        for name in ("replications", "max_replications")
        if name not in settings.model_fields_set
    }
    return settings.model_copy(update=lowered)


def _fleets(
    scenario: Scenario, settings: PlanSettings, base_dir: Path, where: str
) -> tuple[tuple[Fleet, ...], tuple[str, ...]]:
    """Every combination of what the lists name; model sets that a profile lacks are left out."""
    place = f"{where}, plan"
    routers = settings.routers or (scenario.fleet.router,)
    for router in routers:
        check_word(router, get_args(Router), f"{place}.routers", "router")
    try:
        policies = choose_policies(scenario, settings.policies)
    except InputError as error:
        raise error.at(f"{place}.policies") from error
    found: list[Fleet] = []
    skipped: list[str] = []
    absent: list[tuple[str, str]] = []
    for name in settings.profiles or (scenario.fleet.profile,):
        try:
            profile = load_profile(name, base_dir, scenario.fleet.assume)
        except InputError as error:
            raise error.at(f"{place}.profiles, {error.where}") from error
        own = scenario.fleet.candidates or tuple(profile.models)
        for models in settings.candidates or (own,):
            lacking = [model for model in models if model not in profile.models]
            if lacking:
                skipped.append(f"{name} has no {', '.join(lacking)}")
                absent += [(model, name) for model in lacking]
                continue
            for policy, router in product(policies, routers):
                device = profile.device
                found.append(
                    Fleet(
                        name="",
                        profile=name,
                        device=device.name,
                        gpus_per_replica=device.num_gpus,
                        candidates=models,
                        policy=policy,
                        router=router,
                        is_of_processor=profile.is_of_processor,
                    )
                )
    if not found:
        asked_by = f"{place}.candidates" if settings.candidates else f"{where}, fleet.candidates"
        hint = where_to_find(*absent[0]) if absent else ""
        raise InputError(
            f"No profile has the models that are asked for: {'; '.join(skipped)}.{hint}", asked_by
        )
    return tuple(_named(found)), tuple(skipped)


def _named(fleets: Sequence[Fleet]) -> list[Fleet]:
    """The fleets under names of what differs among them; the policy is always named."""
    parts = [
        (fleet.policy.name, "+".join(fleet.candidates), fleet.profile, fleet.router)
        for fleet in fleets
    ]
    differs = [True, *(len(set(column)) > 1 for column in list(zip(*parts, strict=True))[1:])]
    return [
        replace(
            fleet, name=", ".join(part for part, named in zip(mine, differs, strict=True) if named)
        )
        for fleet, mine in zip(fleets, parts, strict=True)
    ]


def check_word(word: str, allowed: Sequence[str], where: str, what: str) -> None:
    """Refuse a word that is not allowed, with the nearest that is."""
    if word not in allowed:
        hint = did_you_mean(word, allowed)
        raise InputError(
            f"{word!r} is no {what}.{hint} Allowed are {', '.join(map(repr, allowed))}.", where
        )


def plan_studies(question: PlanQuestion) -> list[Study[FleetAnswer]]:
    """A study a fleet."""
    expected = 45 if question.target_per_s is None else 65
    return [Study(fleet.name, _fleet_steps(question, fleet), expected) for fleet in question.fleets]


def fleet_scenario(question: PlanQuestion, fleet: Fleet, num_replicas: int) -> Scenario:
    """The scenario with a fleet in place of its own."""
    settings = question.scenario.fleet.model_copy(
        update={
            "profile": fleet.profile,
            "candidates": fleet.candidates,
            "num_replicas": num_replicas,
            # One replica gets every request whoever routes.
            "router": fleet.router if num_replicas > 1 else "round-robin",
        }
    )
    return question.scenario.model_copy(
        update={
            "fleet": settings,
            "policy": (fleet.policy,),
            # It may be about policies that this fleet does not have.
            "published": (),
            "plan": None,
            "search": None,
        }
    )


def planned_scenario(question: PlanQuestion, fleet: Fleet, planned: Load) -> Scenario:
    """The whole scenario with a fleet in place of its own, at the rate it is planned for."""
    scenario = fleet_scenario(question, fleet, planned.num_replicas)
    return at_rate(scenario, question.traffic, planned.rate_per_s)


Measured = Generator[Sequence[Point], list[Outcome], Load]


class _Bench:
    """Measures loads of one fleet and keeps them."""

    def __init__(self, question: PlanQuestion, fleet: Fleet) -> None:
        self.question, self.fleet = question, fleet
        policy = fleet.policy
        made = make_policy(policy.use, policy.options, search_path=question.base_dir)
        self.reassess_requests = made.watching.reassess_requests
        self.loads: dict[tuple[int, float], Load] = {}
        self.figures: dict[tuple[int, float], list[Figures]] = {}

    def measure(self, num_replicas: int, rate_per_s: float, longer: int = 1) -> Measured:
        """Replicated runs at a load, more of them where the first leave doubt.

        They are as long as answers at this load and the policy's rounds ask for, and `longer` times
        as long as answers do unless shorter ones, which flatter, surely miss it already.
        """
        key = num_replicas, rate_per_s
        known = self.loads.get(key)
        if known is not None and (known.longer >= longer or known.verdict.surely_missed):
            return known
        settings = self.question.settings
        scenario = fleet_scenario(self.question, self.fleet, num_replicas)
        figures: list[Figures] = [] if known is None else self.figures[key]
        lengthened = 1 if known is None else known.lengthened
        for upto in (settings.replications, settings.max_replications):
            while True:
                points = [
                    self._point(scenario, index, rate_per_s, num_replicas, lengthened)
                    for index in range(len(figures), upto)
                ]
                if points:
                    figures = figures + figures_of((yield points))
                verdict = judge(
                    figures, self.question.slo, settings.attainment, settings.confidence
                )
                wanted = self._lengthening(num_replicas, rate_per_s, figures, verdict, longer)
                if wanted <= lengthened:
                    break
                lengthened, figures = wanted, []
            if verdict.is_sure:
                break
        sample_s = lengthened * self.question.traffic.sample_s(rate_per_s, num_replicas)
        load = Load(
            num_replicas=num_replicas,
            rate_per_s=rate_per_s,
            verdict=verdict,
            means=mean_figures(figures),
            saturations=tuple(one["summary"]["saturation"] for one in figures),
            beyond=clauses_beyond(figures),
            lengthened=lengthened,
            longer=longer,
            sample_s=sample_s,
            answer_s=_answer_s(figures),
            rounds=self._rounds(num_replicas, rate_per_s * sample_s),
        )
        self.loads[key], self.figures[key] = load, figures
        return load

    def _lengthening(
        self,
        num_replicas: int,
        rate_per_s: float,
        figures: Sequence[Figures],
        verdict: Verdict,
        longer: int,
    ) -> int:
        """How many times as long as at first the samples of a load have to be.

        A load that is surely missed with a backlog that grows is left as it is: time would not
        mend it.
        """
        if verdict.surely_missed and any(one.name == BACKLOG for one in verdict.broken):
            return 1
        traffic = self.question.traffic
        sample_s = traffic.sample_s(rate_per_s, num_replicas)
        for_answers = longer * SAMPLE_ANSWERS * _answer_s(figures) / sample_s
        for_rounds = FEW_ROUNDS / self._rounds(num_replicas, rate_per_s * sample_s)
        wanted = math.ceil(max(1.0, for_answers, for_rounds))
        return min(wanted, traffic.most_lengthened(num_replicas))

    def _rounds(self, num_replicas: int, num_requests: float) -> float:
        """Rounds of reassessment of each replica in a sample of so many requests.

        A sample that ends before the first one would show the policy without its main cost.
        """
        measured = (1.0 - self.question.traffic.warmup_share) * num_requests
        return rounds_in_sample(measured, num_replicas, self.reassess_requests)

    def _point(
        self,
        scenario: Scenario,
        index: int,
        rate: float,
        num_replicas: int,
        lengthened: int,
        limits: str | None = None,
    ) -> Point:
        sample = self.question.traffic.sample(scenario, index, rate, num_replicas, lengthened)
        return point_of(sample, self.question.base_dir, limits or str(self.question.slo))

    def capacity(
        self, num_replicas: int, start_per_s: float
    ) -> Generator[Sequence[Point], list[Outcome], Capacity]:
        """The capacity of so many replicas, on which samples `LONGER` times as long agree.

        Where they do not, the search begins anew at the rate they refute, with samples as long.
        """
        longer = 1
        while True:
            found = yield from _follow(
                find_capacity(start_per_s, self.question.settings.precision),
                partial(self.measure, num_replicas, longer=longer),
            )
            longer *= LONGER
            surely = yield from self._holds(num_replicas, found.low_per_s, longer, surely=True)
            if surely:
                start_per_s = found.rate_per_s
                holds = yield from self._holds(num_replicas, start_per_s, longer, surely=False)
                if holds:
                    break
            else:
                start_per_s = found.low_per_s
            for key in [key for key in self.loads if key[0] == num_replicas]:
                self._forget(key, longer)
        probes = tuple(
            replace(one, verdict=self.loads[num_replicas, one.rate_per_s].verdict)
            for one in found.probes
        )
        return replace(found, probes=probes)

    def _holds(
        self, num_replicas: int, rate_per_s: float, longer: int, *, surely: bool
    ) -> Generator[Sequence[Point], list[Outcome], bool]:
        """Whether longer samples say too that a rate is carried; no rate is none to doubt."""
        if rate_per_s == 0.0:
            return True
        load = yield from self.measure(num_replicas, rate_per_s, longer)
        return load.verdict.surely_carried if surely else load.verdict.carried

    def _forget(self, key: tuple[int, float], longer: int) -> None:
        """Drop a load that is not surely missed by samples shorter than those that count."""
        if self.loads[key].longer < longer and not self.loads[key].verdict.surely_missed:
            del self.loads[key], self.figures[key]

    def size(
        self, guess: int, rate_per_s: float
    ) -> Generator[Sequence[Point], list[Outcome], FleetSize]:
        """The smallest number of replicas that carries a rate, as longer samples say too."""
        longer = 1
        while True:
            found = yield from _follow(
                find_fleet(guess, self.question.settings.max_replicas),
                partial(self.measure, rate_per_s=rate_per_s, longer=longer),
            )
            if found.num_replicas is None:
                return found
            longer, guess = LONGER * longer, found.num_replicas
            holds = yield from self._holds(guess, rate_per_s, longer, surely=True)
            if holds:
                verdicts = {num: self.loads[num, rate_per_s].verdict for num in found.verdicts}
                return replace(found, verdicts=verdicts)
            for key in [key for key in self.loads if key[1] == rate_per_s]:
                self._forget(key, longer)

    def as_served(self, planned: Load) -> Generator[Sequence[Point], list[Outcome], list[Figures]]:
        """A run of the planned scenario as it stands, judged by the constraints.

        Where other requests may be drawn, a run that is too short for its answers, or for its
        policy's rounds, tells less than samples do; so does one that would hold more requests than
        a sample may.
        """
        question, traffic = self.question, self.question.traffic
        limits = question.constraints.limits or str(question.slo)
        num = traffic.num_in_run(planned.rate_per_s)
        lasts_s = num / planned.rate_per_s
        is_long = traffic.replays or traffic.is_shaped or lasts_s >= planned.enough_s
        if num <= MAX_RUN_REQUESTS and is_long:
            scenario = planned_scenario(question, self.fleet, planned)
            points = [point_of(scenario, question.base_dir, limits)]
        else:
            scenario = fleet_scenario(question, self.fleet, planned.num_replicas)
            points = [
                self._point(
                    scenario,
                    index,
                    planned.rate_per_s,
                    planned.num_replicas,
                    planned.lengthened,
                    limits,
                )
                for index in range(question.settings.replications)
            ]
        return figures_of((yield points))

    def bottleneck(self, num_replicas: int, capacity: Capacity) -> Bottleneck | None:
        """What gives way at the first rate that is missed."""
        if capacity.outcome == "all carried":
            return None
        at = num_replicas, capacity.first_missed.rate_per_s
        summaries = [one["summary"] for one in self.figures[at]]
        late = capacity.first_missed.verdict.worst.limit.split(":")[0].split("<")[0] in (
            "tpot",
            "itl",
        )
        limits = [str(limit) for limit in self.question.slo.limits]
        missed = capacity.first_missed.verdict.worst.limit
        late_while = [
            one["judged"][limits.index(missed)]["late_while"]
            for one in self.figures[at]
            if missed in limits
        ]
        return find_bottleneck(summaries, self.question.scenario.serving, late, late_while)


def _follow(
    search: Generator[Asked, Verdict, Found],
    measure: Callable[[Asked], Generator[Sequence[Point], list[Outcome], Load]],
) -> Generator[Sequence[Point], list[Outcome], Found]:
    """Measure whatever a search asks for until it has found what it looks for."""
    try:
        asked = next(search)
        while True:
            load = yield from measure(asked)
            asked = search.send(load.verdict)
    except StopIteration as end:
        found: Found = end.value
        return found


def _answer_s(figures: Sequence[Figures]) -> float:
    """How long answers take in the slowest of some runs; 0 where none finished."""
    return max((one["answer_s"] or 0.0 for one in figures), default=0.0)


def _fleet_steps(question: PlanQuestion, fleet: Fleet) -> Steps[FleetAnswer]:
    """Capacity of a fleet, and how many replicas the target takes."""
    bench = _Bench(question, fleet)
    target = question.target_per_s
    replicas = question.scenario.fleet.num_replicas if target is None else 1
    answer = FleetAnswer(fleet, replicas)
    try:
        capacity = yield from bench.capacity(replicas, question.traffic.rate_per_s)
        answer = replace(answer, capacity=capacity, bottleneck=bench.bottleneck(replicas, capacity))
        if target is None:
            if capacity.rate_per_s > 0.0:
                planned = bench.loads[replicas, capacity.rate_per_s]
                answer = replace(answer, planned=planned)
        elif capacity.rate_per_s > 0.0:
            guess = math.ceil(target / capacity.rate_per_s)
            size = yield from bench.size(guess, target)
            answer = replace(answer, size=size)
            if size.num_replicas is not None:
                planned = bench.loads[size.num_replicas, target]
                answer = replace(answer, planned=planned)
        if answer.planned is not None:
            served = yield from bench.as_served(answer.planned)
            answer = replace(
                answer,
                figures=mean_figures(served),
                is_one_run=len(served) == 1,
                models=models_served(served),
                broken=question.judge.broken(served),
            )
    except InputError as error:
        # What was found on the way is no plan: nobody has judged it by the constraints.
        loads = tuple(bench.loads.values())
        return replace(answer, planned=None, figures={}, refusal=error, loads=loads)
    return _priced(question, replace(answer, loads=tuple(bench.loads.values())))


def _priced(question: PlanQuestion, answer: FleetAnswer) -> FleetAnswer:
    gpus = answer.num_gpus
    if question.prices is None or gpus is None:
        return answer
    cost = cost_of(
        question.prices,
        answer.fleet.device,
        gpus,
        answer.figures.get("average_gpu_power"),
        answer.figures.get("output_throughput"),
        f"{question.where}, plan.prices",
    )
    return replace(answer, cost=cost)


def ranked(question: PlanQuestion, answers: Sequence[FleetAnswer]) -> tuple[FleetAnswer, ...]:
    """Answers in order of merit: those that plan something and keep the constraints first.

    Among them the cheapest comes first.
    """

    def merit(answer: FleetAnswer) -> tuple[Any, ...]:
        planned = answer.planned
        if planned is None or answer.num_gpus is None:
            near = answer.capacity.rate_per_s if answer.capacity else -1.0
            return 2, -near, 0.0, 0.0
        joules = answer.figures.get("energy_per_output_token") or 0.0
        tier = 1 if answer.broken else 0
        if question.target_per_s is None:
            carried = planned.rate_per_s / answer.num_gpus
            price = answer.cost.per_million_tokens if answer.cost else None
            return tier, -carried if price is None else price, joules, 0.0
        price = answer.cost.per_hour if answer.cost else float(answer.num_gpus)
        return tier, price, answer.num_gpus, joules

    return tuple(sorted(answers, key=merit))


def check_answerable(question: PlanQuestion, answers: Sequence[FleetAnswer]) -> FleetAnswer:
    """The best answer; if none plans anything, an `InputError` with the nearest miss."""
    best = ranked(question, answers)[0]
    if best.broken:
        able = [one for one in answers if one.planned is not None]
        near = min(able, key=lambda one: sum(broken.violation for broken in one.broken))
        raise InputError(
            f"None of {len(able)} fleet{'s' if len(able) != 1 else ''} that meet the SLO keeps the "
            f"constraints {question.constraints}. {near.fleet.name!r} comes nearest and breaks "
            f"{', '.join(in_words(one) for one in near.broken)}. Give a looser constraint, or "
            "other policies.",
            f"{question.where}, plan.constraints",
        )
    if best.planned is not None:
        return best
    refusals = [answer.refusal for answer in answers if answer.refusal is not None]
    if len(refusals) == len(answers):
        raise _no_fleet(question, refusals)
    if best.capacity is not None and best.capacity.rate_per_s > 0.0:
        raise InputError(
            f"No fleet of up to {counted(question.settings.max_replicas, 'replica')} carries "
            f"{question.target_per_s:.4g} requests/s; one replica of {best.fleet.name!r} carries "
            f"{best.capacity.rate_per_s:.4g}. Raise max_replicas.",
            f"{question.where}, plan.max_replicas",
        )
    missed = [one for one in answers if one.capacity is not None and one.capacity.probes]
    nearest = min(missed, key=lambda one: _lowest(one).verdict.worst.shortfall)
    raise InputError(
        f"The SLO is met by none of {len(answers)} fleet{'s' if len(answers) != 1 else ''}, even "
        f"at the lowest rate. {nearest.fleet.name!r} comes nearest: {miss_in_words(nearest)}. "
        "Give a looser limit, or models and devices that answer sooner.",
        f"{question.where}, slo",
    )


def _no_fleet(question: PlanQuestion, refusals: Sequence[InputError]) -> InputError:
    """Why no fleet could be tried: the fleets, or something else in what all of them were asked."""
    first = refusals[0]
    # A point calls the scenario it plays "scenario", whatever the file.
    places = [(one.where or "").removeprefix("scenario, ") for one in refusals]
    if any(place.startswith(("fleet", "policy")) for place in places):
        where = f"{question.where}, {places[0]}" if places[0] else question.where
        return InputError(f"No fleet can serve this at all. {first.message}", where)
    if first.where is None or first.where == places[0]:
        return first
    return InputError(first.message, f"{question.where}, {places[0]}")


def _lowest(answer: FleetAnswer) -> Load:
    return min(answer.loads, key=lambda load: load.rate_per_s)


def miss_in_words(answer: FleetAnswer) -> str:
    """Which criterion a fleet misses at the lowest rate tried, and by how much."""
    load = _lowest(answer)
    worst = load.verdict.worst
    if not worst.limit:
        overloaded = load.saturations.count("overloaded")
        return (
            f"at {load.rate_per_s:.3g} requests/s the backlog grows in {overloaded} of "
            f"{len(load.saturations)} runs"
        )
    text = (
        f"at {load.rate_per_s:.3g} requests/s {worst.words} is met by {100 * worst.mean:.1f} % of "
        f"the requests, {100 * worst.target:g} % needed"
    )
    if worst.value_ms is not None and worst.limit_ms is not None:
        over = worst.value_ms / worst.limit_ms - 1.0
        text += (
            f" (that percentile is {worst.value_ms:.4g} ms, "
            f"{100 * over:.0f} % over {worst.limit_ms:g} ms)"
        )
    return text


def headroom_study(question: PlanQuestion, best: FleetAnswer) -> Study[FleetAnswer]:
    """The capacity of the recommended fleet itself: how much more than the target it carries."""

    def steps() -> Steps[FleetAnswer]:
        planned = best.planned
        if planned is None or question.target_per_s is None:
            return best
        bench = _Bench(question, best.fleet)
        num = planned.num_replicas
        capacity = yield from bench.capacity(num, planned.rate_per_s)
        known = {(load.num_replicas, load.rate_per_s): load for load in best.loads} | bench.loads
        return replace(
            best,
            capacity=capacity,
            capacity_replicas=num,
            bottleneck=bench.bottleneck(num, capacity),
            loads=tuple(known.values()),
        )

    expected = 0 if question.target_per_s is None else 40
    return Study("headroom", steps(), expected)


def make_plan(question: PlanQuestion, answers: Sequence[FleetAnswer], best: FleetAnswer) -> Plan:
    """The plan, once the recommended fleet's own capacity is known."""
    assert best.capacity is not None
    others = [one for one in ranked(question, answers) if one.fleet != best.fleet]
    asked = question.target_per_s or question.traffic.rate_per_s
    headroom = best.capacity.rate_per_s / asked - 1.0
    return Plan(question, (best, *others), best, headroom, _hours(question, answers, best))


def no_plan(question: PlanQuestion, answers: Sequence[FleetAnswer], why: str) -> Plan:
    """The plan that recommends nothing, with what was found of every fleet."""
    every = ranked(question, answers)
    return Plan(question, every, every[0], -1.0, why_none=why)


def _hours(
    question: PlanQuestion, answers: Sequence[FleetAnswer], best: FleetAnswer
) -> tuple[Hour, ...]:
    """Replicas hour by hour, from what one surely carries alone and what it does in the fleet.

    The smaller of the two counts, so that neither pooling nor uneven routing is relied on. The
    busiest hour has the fleet that was measured for it.
    """
    weights, target = question.settings.hourly_weights, question.target_per_s
    if not weights or target is None or best.planned is None or best.capacity is None:
        return ()
    alone = next(one for one in answers if one.fleet == best.fleet).capacity
    assert alone is not None
    peak = best.planned.num_replicas
    # The fleet surely carries the target, whatever the bounds of its capacity.
    together = max(best.capacity.low_per_s, target) / best.capacity_replicas
    each = min(alone.low_per_s, together)
    found = []
    for hour, weight in enumerate(weights):
        rate = target * weight / max(weights)
        num = peak
        if weight < max(weights) and each > 0.0:
            num = min(peak, max(1, math.ceil(rate / each - 1e-9)))
        per_hour = None if best.cost is None else best.cost.per_hour * num / peak
        found.append(Hour(hour, rate, num, per_hour))
    return tuple(found)


def recommended(plan: Plan) -> Scenario:
    """The scenario that the plan recommends, at the rate it is planned for."""
    question, best = plan.question, plan.best
    assert best.planned is not None
    scenario = planned_scenario(question, best.fleet, best.planned)
    # One replica gets every request whoever routes; more of them may be tried from here.
    routed = scenario.fleet.model_copy(update={"router": best.fleet.router})
    scenario = scenario.model_copy(update={"fleet": routed})
    models = "+".join(best.fleet.candidates)
    said = (
        f"Recommended by helios plan: {best.planned.num_replicas} x {best.fleet.policy.name}, "
        f"{models} on {best.fleet.profile}; carries "
        f"{plan.best.capacity.rate_per_s:.4g} requests/s in all."  # type: ignore[union-attr]
    )
    return scenario.model_copy(
        update={"name": f"{scenario.name}_plan", "notes": (*scenario.notes, said)}
    )
