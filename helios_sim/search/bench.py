"""One fleet measured: its loads, the highest it carries, the replicas that carry a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, TypeVar

from helios_sim.errors import InputError
from helios_sim.policy.registry import make_policy
from helios_sim.scenario import Scenario
from helios_sim.search.bottleneck import Bottleneck, find_bottleneck
from helios_sim.search.capacity import Capacity, find_capacity, find_fleet
from helios_sim.search.fleets import Fleet, PlanQuestion, fleet_scenario
from helios_sim.search.goals import Broken
from helios_sim.search.means import Means, clauses_beyond, mean_figures, models_served
from helios_sim.search.points import Figures, Point, point_of
from helios_sim.search.prices import Cost, cost_of, steadily
from helios_sim.search.studies import Outcome, Steps, Study, figures_of
from helios_sim.search.traffic import FEW_ROUNDS, MAX_RUN_REQUESTS, at_rate, rounds_in_sample
from helios_sim.search.verdict import BACKLOG, Verdict, judge

Asked = TypeVar("Asked", int, float)
Found = TypeVar("Found")

SAMPLE_ANSWERS: Final = 20.0
"""How many times as long as an answer (the 99th percentile) a sample has to last.

A sample begins empty, and a fleet is full only once the first answers end: a shorter sample shows
it on the way there. A tenth of the sample, two answers, is not measured.
"""
_MOST_HALVINGS: Final = 6
"""Halvings of a rate in search of one that keeps the constraints."""
_FEW_MORE: Final = 4
"""Replicas that are added, at most, in search of a fleet that carries a trace as it is."""
LONGER: Final = 4
"""How many times as long a sample has to agree with an answer before it is given.

Near the boundary a queue grows more slowly than answers end, and replications cannot see what all
of them are too short for.
"""


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

    `capacity` is that of `capacity_replicas` replicas. With a target, `planned` is what the
    smallest number that carries it does at the target, and `is_too_small` says that there is none;
    without one `planned` is the load at the capacity. `loads` are all that was measured. `figures`
    are of a run of the planned scenario, or means over samples where `is_one_run` is False, in
    which `models` served; `broken` are the constraints that they break, or that samples do where a
    policy decides on what it evaluated: `num_breaking` of `num_judged` such samples break some.
    `for_slo` is the planned load under the SLO alone, where constraints took more replicas or
    allowed a lower rate. `whole` says whether the planned scenario, run once as it stands, meets
    the SLO; None where it is not run. `num_for_whole` is with how many replicas a trace does, where
    it does not and a few more are enough.
    """

    fleet: Fleet
    capacity_replicas: int
    capacity: Capacity | None = None
    bottleneck: Bottleneck | None = None
    is_too_small: bool = False
    planned: Load | None = None
    loads: tuple[Load, ...] = ()
    refusal: InputError | None = None
    cost: Cost | None = None
    figures: Means = field(default_factory=dict)
    is_one_run: bool = False
    models: tuple[str, ...] = ()
    broken: tuple[Broken, ...] = ()
    num_breaking: int = 0
    num_judged: int = 0
    for_slo: Load | None = None
    whole: Verdict | None = None
    num_for_whole: int | None = None

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


def plan_studies(question: PlanQuestion) -> list[Study[FleetAnswer]]:
    """A study a fleet."""
    expected = 45 if question.target_per_s is None else 65
    return [Study(_fleet_steps(question, fleet), expected) for fleet in question.fleets]


def planned_scenario(question: PlanQuestion, fleet: Fleet, planned: Load) -> Scenario:
    """The whole scenario with a fleet in place of its own, at the mean of what it is planned for.

    At the peak, a trace's own peaks would count twice, and tokens that nobody asks for would be
    paid. It leaves out the share of its requests that samples leave out: a fleet that is cold at
    first was not judged by those.
    """
    traffic, rate_per_s = question.traffic, question.mean_per_s(planned.rate_per_s)
    scenario = fleet_scenario(question, fleet, planned.num_replicas)
    num = traffic.num_in_run(rate_per_s)
    return traffic.warmed(at_rate(scenario, traffic, rate_per_s), num, rate_per_s)


@dataclass(frozen=True)
class Served:
    """What the planned scenario does, and the constraints that it breaks."""

    load: Load
    figures: list[Figures]
    broken: tuple[Broken, ...]
    num_breaking: int = 0
    num_judged: int = 0

    @property
    def violation(self) -> float:
        """By how much constraints are broken, in all; 0 where all are kept."""
        return math.fsum(one.violation for one in self.broken)


Measured = Generator[Sequence[Point], list[Outcome], Load]
Judged = Generator[Sequence[Point], list[Outcome], Served]


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
        figures: list[Figures] = [] if known is None else self.figures[key]
        lengthened = 1 if known is None else known.lengthened
        for upto in (settings.replications, settings.max_replications):
            while True:
                indices = range(len(figures), upto)
                points = self._samples(num_replicas, rate_per_s, indices, lengthened)
                if points:
                    figures = figures + figures_of((yield points))
                verdict = judge(
                    figures, self.question.slo, settings.attainment, settings.confidence
                )
                wanted = self._lengthening(num_replicas, rate_per_s, figures, verdict, longer)
                if wanted <= lengthened:
                    break
                lengthened, figures = wanted, []
            if verdict.is_sure and not self._decides_once(figures):
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

    def _decides_once(self, figures: Sequence[Figures]) -> bool:
        """Whether each sample holds one decision, made on what was evaluated at its start.

        Three that agree by chance have no spread, and say nothing of how often others would not.
        """
        return self.reassess_requests is None and _evaluates(figures)

    def _rounds(self, num_replicas: int, num_requests: float) -> float:
        """Rounds of reassessment of each replica in a sample of so many requests.

        A sample that ends before the first one would show the policy without its main cost.
        """
        measured = (1.0 - self.question.traffic.warmup_share) * num_requests
        return rounds_in_sample(measured, num_replicas, self.reassess_requests)

    def _samples(
        self,
        num_replicas: int,
        rate_per_s: float,
        indices: Sequence[int],
        lengthened: int,
        limits: str = "",
    ) -> list[Point]:
        """So many replicas on samples of the traffic, judged by the SLO unless by other limits."""
        question = self.question
        scenario = fleet_scenario(question, self.fleet, num_replicas)
        return [
            point_of(
                question.traffic.sample(scenario, index, rate_per_s, num_replicas, lengthened),
                question.base_dir,
                limits or str(question.slo),
            )
            for index in indices
        ]

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
    ) -> Generator[Sequence[Point], list[Outcome], int | None]:
        """The smallest number of replicas that carries a rate, as longer samples say too."""
        longer = 1
        while True:
            found = yield from _follow(
                find_fleet(guess, self.question.settings.max_replicas),
                partial(self.measure, rate_per_s=rate_per_s, longer=longer),
            )
            if found is None:
                return None
            longer, guess = LONGER * longer, found
            holds = yield from self._holds(guess, rate_per_s, longer, surely=True)
            if holds:
                return found
            for key in [key for key in self.loads if key[1] == rate_per_s]:
                self._forget(key, longer)

    def as_served(self, planned: Load) -> Generator[Sequence[Point], list[Outcome], list[Figures]]:
        """A run of the planned scenario at its mean rate, judged by the constraints.

        A run that is too short for its answers, or for its policy's rounds, begins and ends for
        too much of its time: a trace is then played again and again, and where other requests may
        be drawn, samples take its place. So they do where it would hold more requests than a
        sample may.
        """
        question, traffic = self.question, self.question.traffic
        limits = question.constraints.limits or str(question.slo)
        rate_per_s = question.mean_per_s(planned.rate_per_s)
        num = traffic.num_in_run(rate_per_s)
        is_long = num >= rate_per_s * planned.enough_s
        if num > MAX_RUN_REQUESTS or not (is_long or traffic.replays or traffic.is_shaped):
            indices = range(question.settings.replications)
            points = self._samples(
                planned.num_replicas, rate_per_s, indices, planned.lengthened, limits
            )
            return figures_of((yield points))
        scenario = planned_scenario(question, self.fleet, planned)
        if traffic.replays and not is_long:
            wanted = math.ceil(rate_per_s * planned.enough_s)
            scenario = traffic.again(scenario, wanted, rate_per_s)
        return figures_of((yield [point_of(scenario, question.base_dir, limits)]))

    def judged(self, planned: Load) -> Judged:
        """A run of the planned scenario, and the constraints that it breaks, at its peak too.

        One run of a policy that decides on what it evaluated is one of many: there samples are
        judged too.
        """
        question, settings = self.question, self.question.settings
        figures = yield from self.as_served(planned)
        at_peak = yield from self._late_at_peak(planned)
        rate_per_s = question.mean_per_s(planned.rate_per_s)
        judge = question.judge(rate_per_s)
        broken = _worst_of((*judge.broken(figures), *at_peak))
        served = Served(planned, figures, broken)
        if len(figures) > 1 or not str(question.constraints) or not _evaluates(figures):
            return served
        limits = question.constraints.limits or str(question.slo)
        indices = range(settings.max_replications)
        points = self._samples(
            planned.num_replicas, rate_per_s, indices, planned.lengthened, limits
        )
        samples = figures_of((yield points))
        num_breaking, num_judged = judge.breaking(samples)
        broken = served.broken or judge.broken(samples)
        return replace(served, broken=broken, num_breaking=num_breaking, num_judged=num_judged)

    def _late_at_peak(
        self, planned: Load
    ) -> Generator[Sequence[Point], list[Outcome], tuple[Broken, ...]]:
        """The limits on latencies that samples at the peak break, where that is above the mean."""
        question = self.question
        limits = question.constraints.limits
        if not limits or question.mean_per_s(planned.rate_per_s) == planned.rate_per_s:
            return ()
        indices = range(question.settings.replications)
        points = self._samples(
            planned.num_replicas, planned.rate_per_s, indices, planned.lengthened, limits
        )
        latencies = replace(question.constraints, bounds=())
        judge = replace(question.judge(planned.rate_per_s), constraints=latencies)
        return judge.broken(figures_of((yield points)))

    def whole(self, planned: Load) -> Generator[Sequence[Point], list[Outcome], Verdict | None]:
        """Whether the planned scenario as it stands meets the SLO, its own peaks included.

        None where it holds more requests than a sample may.
        """
        question, settings = self.question, self.question.settings
        mean_per_s = question.mean_per_s(planned.rate_per_s)
        if question.traffic.num_in_run(mean_per_s) > MAX_RUN_REQUESTS:
            return None
        scenario = planned_scenario(question, self.fleet, planned)
        figures = figures_of((yield [point_of(scenario, question.base_dir, str(question.slo))]))
        return judge(figures, question.slo, settings.attainment, settings.confidence)

    def more_for_whole(
        self, planned: Load
    ) -> Generator[Sequence[Point], list[Outcome], int | None]:
        """The fewest replicas, of a few more, with which the scenario itself meets the SLO."""
        few = planned.num_replicas
        most = min(few + _FEW_MORE, self.question.settings.max_replicas)
        for num in range(few + 1, most + 1):
            verdict = yield from self.whole(replace(planned, num_replicas=num))
            if verdict is not None and verdict.carried:
                return num
        return None

    def with_more(self, served: Served) -> Judged:
        """The fewest replicas that keep the constraints too; as it was where more do not help."""
        low, rate_per_s = served, served.load.rate_per_s
        step, most = 1, self.question.settings.max_replicas
        while low.load.num_replicas < most:
            num = min(low.load.num_replicas + step, most)
            tried = yield from self._judged_at(num, rate_per_s, served)
            if not tried.broken:
                break
            if tried.violation >= low.violation:
                return served
            low, step = tried, 2 * step
        else:
            return served
        high = tried
        while high.load.num_replicas - low.load.num_replicas > 1:
            middle = (high.load.num_replicas + low.load.num_replicas) // 2
            tried = yield from self._judged_at(middle, rate_per_s, served)
            low, high = (tried, high) if tried.broken else (low, tried)
        return high

    def with_less(self, served: Served) -> Judged:
        """The highest rate that keeps the constraints too; as it was where less does not help."""
        num, high = served.load.num_replicas, served
        for _ in range(_MOST_HALVINGS):
            tried = yield from self._judged_at(num, high.load.rate_per_s / 2, served)
            if not tried.broken:
                break
            if tried.violation >= high.violation:
                return served
            high = tried
        else:
            return served
        low = tried
        while high.load.rate_per_s > (1.0 + self.question.settings.precision) * low.load.rate_per_s:
            middle = math.sqrt(high.load.rate_per_s * low.load.rate_per_s)
            tried = yield from self._judged_at(num, middle, served)
            low, high = (low, tried) if tried.broken else (tried, high)
        return low

    def _judged_at(self, num_replicas: int, rate_per_s: float, served: Served) -> Judged:
        load = yield from self.measure(num_replicas, rate_per_s, served.load.longer)
        return (yield from self.judged(load))

    def bottleneck(self, num_replicas: int, capacity: Capacity) -> Bottleneck | None:
        """What gives way at the first rate that is missed."""
        if capacity.outcome == "all carried":
            return None
        figures = self.figures[num_replicas, capacity.first_missed.rate_per_s]
        missed = capacity.first_missed.verdict.worst.limit
        limits = {str(limit): place for place, limit in enumerate(self.question.slo.limits)}
        place = limits.get(missed)
        return find_bottleneck(
            [one["summary"] for one in figures],
            self.question.scenario.serving,
            tokens_are_late=missed.startswith(("tpot", "itl")),
            late_while=[]
            if place is None
            else [one["judged"][place]["late_while"] for one in figures],
        )


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


def _worst_of(broken: Sequence[Broken]) -> tuple[Broken, ...]:
    """What is broken, each constraint once, where it is broken most; the worst first."""
    worst: dict[str, Broken] = {}
    for one in sorted(broken, key=lambda one: -one.violation):
        worst.setdefault(one.constraint, one)
    return tuple(worst.values())


def _evaluates(figures: Sequence[Figures]) -> bool:
    """Whether a policy evaluated candidates in some of the runs."""
    return any(one["summary"]["num_evaluations"] for one in figures)


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
            sized = None if size is None else bench.loads[size, target]
            answer = replace(answer, planned=sized, is_too_small=size is None)
        if answer.planned is not None:
            under_slo = yield from bench.judged(answer.planned)
            served = under_slo
            if served.broken:
                keeping = bench.with_less if target is None else bench.with_more
                served = yield from keeping(served)
            if served is not under_slo:
                answer = replace(
                    answer,
                    planned=served.load,
                    for_slo=under_slo.load,
                    capacity=_within(answer.capacity, served.load) if target is None else capacity,
                )
            answer = replace(
                answer,
                figures=mean_figures(served.figures),
                is_one_run=len(served.figures) == 1,
                models=models_served(served.figures),
                broken=served.broken,
                num_breaking=served.num_breaking,
                num_judged=served.num_judged,
            )
    except InputError as error:
        # What was found on the way is no plan: nobody has judged it by the constraints.
        loads = tuple(bench.loads.values())
        return replace(answer, planned=None, figures={}, refusal=error, loads=loads)
    return _priced(question, replace(answer, loads=tuple(bench.loads.values())))


def _within(capacity: Capacity | None, planned: Load) -> Capacity:
    """A capacity that constraints limit to the rate of a load."""
    assert capacity is not None
    rate_per_s = planned.rate_per_s
    low_per_s = rate_per_s if planned.verdict.surely_carried else capacity.low_per_s
    return replace(
        capacity,
        rate_per_s=rate_per_s,
        low_per_s=min(low_per_s, rate_per_s),
        high_per_s=max(rate_per_s, min(capacity.high_per_s, capacity.rate_per_s)),
    )


def _priced(question: PlanQuestion, answer: FleetAnswer) -> FleetAnswer:
    gpus, planned = answer.num_gpus, answer.planned
    if question.prices is None or gpus is None or planned is None:
        return answer
    cost = cost_of(
        question.prices,
        answer.fleet.device,
        gpus,
        *steadily(answer.figures, question.mean_per_s(planned.rate_per_s)),
        f"{question.where}, plan.prices",
    )
    return replace(answer, cost=cost)


def headroom_study(question: PlanQuestion, best: FleetAnswer) -> Study[FleetAnswer]:
    """The recommended fleet itself: its scenario as it stands, and how much more it carries."""

    def steps() -> Steps[FleetAnswer]:
        planned = best.planned
        if planned is None:
            return best
        bench = _Bench(question, best.fleet)
        whole = yield from bench.whole(planned)
        if question.target_per_s is None:
            return replace(best, whole=whole)
        num_for_whole = None
        if question.traffic.replays and whole is not None and not whole.carried:
            num_for_whole = yield from bench.more_for_whole(planned)
        num = planned.num_replicas
        capacity = yield from bench.capacity(num, planned.rate_per_s)
        known = {(load.num_replicas, load.rate_per_s): load for load in best.loads} | bench.loads
        return replace(
            best,
            capacity=capacity,
            capacity_replicas=num,
            bottleneck=bench.bottleneck(num, capacity),
            loads=tuple(known.values()),
            whole=whole,
            num_for_whole=num_for_whole,
        )

    expected = 1 if question.target_per_s is None else 41
    return Study(steps(), expected)
