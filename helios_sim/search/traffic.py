"""Samples of a scenario's traffic, at any rate: other seeds, or other stretches of its trace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from helios_sim.errors import InputError
from helios_sim.experiment import expected_serving
from helios_sim.scenario import EXPECTED_LENGTHS, Scenario, ServingSettings
from helios_sim.streams import whole_ns
from helios_sim.workload.arrivals import (
    ClosedArrivals,
    DailyArrivals,
    ScheduleArrivals,
    mean_rate_per_s,
    peak_rate_per_s,
)
from helios_sim.workload.requests import MAX_SPAN_S, DomainSettings, first_of
from helios_sim.workload.trace import Trace, TraceSettings
from helios_sim.workload.traces import is_drawn, read_trace

MIN_WINDOW_REQUESTS = 40
MAX_RUN_REQUESTS: Final = 200_000
"""Requests of one run of a large fleet; beyond, each replica sees fewer."""


_MOST_WARMUP: Final = 0.9
"""Share of a run, at most, that the scenario's own seconds of warm-up may take at another rate."""
FEW_ROUNDS: Final = 5
"""Rounds of reassessment in a sample, below which what they cost or buy is measured on few."""


def rounds_in_sample(
    num_measured: float, num_replicas: float, reassess_requests: int | None
) -> float:
    """Rounds of reassessment that each replica has among the measured requests of a sample.

    Infinitely many for a policy that never reassesses: no sample is too short for it.
    """
    if reassess_requests is None:
        return math.inf
    return num_measured / num_replicas / reassess_requests


@dataclass(frozen=True)
class Stretch:
    """A part of a trace: from, to (seconds of the trace) and the requests in it."""

    start_s: float
    end_s: float
    num_requests: int

    @property
    def rate_per_s(self) -> float:
        """Requests per second at the trace's own pace."""
        return self.num_requests / (self.end_s - self.start_s)


@dataclass(frozen=True)
class Traffic:
    """The workload of a scenario as samples: sample i has the scenario's seed + i.

    A replayed trace brings the same arrivals whatever the seed, so its samples are stretches of
    equally many requests instead, `num_windows` of them, with the domains of that time: for a plan
    in an order in which the first few are spread over the whole trace, for a search in the order of
    time, so that what is held out comes after what was tuned on. Where
    other arrivals or domains change with time, a sample is the whole workload under another seed,
    over the same time at every rate.
    Anything else is `num_requests` requests a replica. The first `warmup_share` of the requests
    are not measured. `table` is the scenario's table that asks for the windows. `grows` says
    whether samples may be made longer than that.

    Drawn arrivals that take the rows of a trace in order would all meet the same lengths, whatever
    the seed, so each of up to `most_samples` samples begins at another row, in the order in which
    windows are taken.
    """

    scenario: Scenario
    base_dir: Path
    where: str
    num_requests: int
    num_windows: int
    warmup_share: float
    table: Literal["plan", "search"] = "plan"
    grows: bool = False
    most_samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.scenario.workload.arrivals, ClosedArrivals):
            raise InputError(
                "A closed loop has no rate of its own, since its users wait for their answers; "
                "give arrivals with a rate, such as poisson.",
                f"{self.where}, workload.arrivals",
            )

    @property
    def replays(self) -> bool:
        """Whether arrivals are those of a trace."""
        return self.scenario.workload.replays_arrivals

    @property
    def num_samples(self) -> int | None:
        """How many samples there are; None where every seed gives another."""
        return self.num_windows if self.replays else None

    @property
    def is_shaped(self) -> bool:
        """Whether the rate or the mix of domains changes over the run, so that it is kept whole."""
        workload = self.scenario.workload
        return isinstance(workload.arrivals, ScheduleArrivals | DailyArrivals) or any(
            domain.shares is not None for domain in workload.domains
        )

    def check(self) -> None:
        """Raise `InputError` where a replayed trace cannot be cut into its windows."""
        if self.replays:
            self.stretches  # noqa: B018 - cutting is the check

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """The windows of a replayed trace, one after another, equal in requests.

        They end where a run of the scenario does: with the window of the trace, or with the last
        request that `max_requests`, `num_requests` or `duration_s` leave.
        """
        settings, trace = self._trace()
        times = trace.arrival_s
        num = min(len(times), self._num_replayed(settings))
        end_s = float(times[num - 1]) + 1e-6
        if num == len(times) and settings.end_s is not None:
            end_s = settings.end_s - settings.start_s
        if num < self.num_windows * MIN_WINDOW_REQUESTS:
            raise InputError(
                f"The trace holds {num:,} requests, too few for {self.num_windows} windows of at "
                f"least {MIN_WINDOW_REQUESTS}; give fewer windows or a longer trace.",
                f"{self.where}, {self.table}.windows",
            )
        places = [num * i // self.num_windows for i in range(self.num_windows + 1)]
        edges = [*(float(times[place]) for place in places[:-1]), end_s]
        found = []
        for start_s, end_s in pairwise(edges):
            inside = int(np.searchsorted(times, end_s) - np.searchsorted(times, start_s))
            if inside < MIN_WINDOW_REQUESTS // 2 or end_s <= start_s:
                raise InputError(
                    f"A window of the trace from {start_s:g} to {end_s:g} s holds {inside} "
                    "requests; give fewer windows.",
                    f"{self.where}, {self.table}.windows",
                )
            # As the trace's own times are, so that an edge is not a last digit beyond its request.
            edges_s = whole_ns(settings.start_s + np.array([start_s, end_s]))
            found.append(Stretch(float(edges_s[0]), float(edges_s[1]), inside))
        return tuple(found)

    def _trace(self) -> tuple[TraceSettings, Trace]:
        """The replayed trace once at its own pace, whole, and its settings in the scenario."""
        settings = self.scenario.workload.trace
        assert settings is not None
        plain = settings.model_copy(update={"rate_scale": 1.0, "repeat": 1, "max_requests": None})
        return settings, read_trace(plain, self.base_dir, self.scenario.seed)

    @property
    def windows(self) -> tuple[Stretch, ...]:
        """The windows of a replayed trace in the order in which samples take them."""
        return tuple(self.stretches[place] for place in self._order(len(self.stretches)))

    def _order(self, num: int) -> list[int]:
        """The places of so many parts of a trace in the order in which samples take them."""
        if self.table == "search":
            return list(range(num))
        bits = (num - 1).bit_length()
        # Counting with the bits reversed halves the trace, then its halves, and so on.
        return sorted(range(num), key=lambda place: int(f"{place:0{bits}b}"[::-1], 2))

    @cached_property
    def num_rows(self) -> int | None:
        """Rows of a trace that drawn arrivals take in order; None where seeds bring others."""
        workload = self.scenario.workload
        trace = workload.trace
        if trace is None or not workload.takes_rows_in_order or is_drawn(trace, self.base_dir):
            return None
        once = trace.model_copy(update={"repeat": 1})
        return len(read_trace(once, self.base_dir, self.scenario.seed))

    def share_rows(self, num_requests: float, num_samples: int) -> bool:
        """Whether so many samples of so many requests take some row of the trace twice."""
        if self.num_rows is None:
            return False
        rows = sorted(self._rows_on(self.num_rows, index) for index in range(num_samples))
        return num_requests > min(
            following - row for row, following in pairwise([*rows, rows[0] + self.num_rows])
        )

    def _rows_on(self, num_rows: int, index: int) -> int:
        """How many rows of the trace a sample begins behind the first one."""
        return num_rows * self._order(self.most_samples)[index] // self.most_samples

    @property
    def peak_factor(self) -> float:
        """How many times the mean rate a trace's busiest window, or a changing rate's peak, has."""
        workload = self.scenario.workload
        if isinstance(workload.arrivals, ScheduleArrivals | DailyArrivals):
            peak = peak_rate_per_s(workload.arrivals, workload.num_requests, workload.duration_s)
            return peak / self.rate_per_s
        if not self.replays:
            return 1.0
        return max(part.rate_per_s for part in self.stretches) / self._own_rate_per_s

    def num_in_run(self, rate_per_s: float) -> int:
        """Requests of the whole scenario at another mean rate, roughly where time ends it."""
        workload = self.scenario.workload
        if self.replays:
            assert workload.trace is not None
            return self._num_replayed(workload.trace)
        num = self.num_whole(rate_per_s) if self.is_shaped else workload.num_requests
        ends = [] if num is None else [num]
        if workload.duration_s is not None:
            ends.append(int(workload.duration_s * rate_per_s))
        return min(ends)

    def mean_lengths(self, num_samples: int | None = None) -> tuple[float, float]:
        """Mean tokens of prompts and answers in the windows of the first samples, or in all."""
        settings, trace = self._trace()
        at_s = settings.start_s + trace.arrival_s
        inside = np.zeros(len(at_s), dtype=bool)
        for part in self.windows[:num_samples]:
            inside |= (part.start_s <= at_s) & (at_s < part.end_s)
        prompts, outputs = trace.prompt_tokens[inside], trace.output_tokens[inside]
        return float(prompts.mean()), float(outputs.mean())

    def _num_replayed(self, settings: TraceSettings) -> int:
        """How many requests a run of the scenario replays, its repetitions included."""
        trace = read_trace(settings, self.base_dir, self.scenario.seed)
        try:
            return len(first_of(trace, self.scenario.workload))
        except InputError as error:
            raise error.at(f"{self.where}, {error.where}") from error

    @cached_property
    def rate_per_s(self) -> float:
        """Requests per second of the scenario as it stands, on average."""
        workload = self.scenario.workload
        if self.replays:
            assert workload.trace is not None
            return self._own_rate_per_s * workload.trace.rate_scale
        given = getattr(workload.arrivals, "rate_per_s", None)
        if given is not None:
            return float(given)
        arrivals = workload.arrivals
        assert isinstance(arrivals, ScheduleArrivals | DailyArrivals)
        try:
            # Every rate asked for is a multiple of this one: a draw's would put all of them off.
            return mean_rate_per_s(arrivals, workload.num_requests, workload.duration_s)
        except InputError as error:
            raise InputError(error.message, f"{self.where}, {error.where}") from error

    @property
    def _own_rate_per_s(self) -> float:
        """Requests per second of a replayed trace at its own pace, over all windows."""
        parts = self.stretches
        span_s = parts[-1].end_s - parts[0].start_s
        return sum(part.num_requests for part in parts) / span_s

    def sample_s(self, rate_per_s: float, num_replicas: int = 1) -> float:
        """How long the shortest sample lasts at a rate, from its first arrival to its last."""
        if self.is_shaped and not self.replays:
            workload = self.scenario.workload
            return workload.duration_s or (workload.num_requests or 0) / self.rate_per_s
        times = min(num_replicas, self._most_times)
        return self._num_at_once * times / rate_per_s

    def most_lengthened(self, num_replicas: int) -> int:
        """How many times as long as it is anyway a sample of so many replicas can be."""
        if not self.grows:
            return 1
        return max(1, self._most_times // num_replicas)

    def num_whole(self, rate_per_s: float) -> int | None:
        """Requests of a whole workload that changes with time, at a rate; None where time ends it.

        As many at every rate would end it sooner at a high one: before its peak, say.
        """
        num = self.scenario.workload.num_requests
        return None if num is None else max(1, round(num * rate_per_s / self.rate_per_s))

    @property
    def _num_at_once(self) -> int:
        """Requests of the smallest sample for one replica."""
        if self.replays:
            return min(part.num_requests for part in self.stretches)
        return self.num_requests

    @property
    def _most_times(self) -> int:
        """How many times over a sample for one replica fits into one run."""
        return max(1, MAX_RUN_REQUESTS // self._num_at_once)

    def sample(
        self,
        base: Scenario,
        index: int,
        rate_per_s: float | None = None,
        num_replicas: int = 1,
        lengthened: int = 1,
    ) -> Scenario:
        """`base` under sample `index` of this traffic, at a rate or at the scenario's own.

        `num_replicas` lengthens the sample, so that each replica sees as many requests, and
        `lengthened` says how many times as long it is made beside that: with more requests drawn,
        or with its stretch of the trace played again and again. A longer sample begins like the
        shorter one.
        """
        num_replicas = min(num_replicas * lengthened, self._most_times)
        if self.num_samples is not None and index >= self.num_samples:
            raise InputError(
                f"Sample {index + 1} of the traffic was asked for; the trace has "
                f"{self.num_samples} windows.",
                f"{self.where}, {self.table}.windows",
            )
        if self.replays:
            part = self.windows[index]
            update, num = self._window(base, part, rate_per_s, num_replicas)
        else:
            update, num = self._drawn(base, rate_per_s, num_replicas)
            if self.num_rows is not None and base.workload.takes_rows_in_order:
                own = base.workload.first_trace_row or 0
                row = (own + self._rows_on(self.num_rows, index)) % self.num_rows
                update["first_trace_row"] = row or None
        measure = base.measure.model_copy(
            update={"warmup_s": 0.0, "warmup_requests": int(self.warmup_share * num)}
        )
        return base.model_copy(
            update={
                "seed": base.seed + index,
                "workload": base.workload.model_copy(update=update),
                "serving": self._expecting(base.serving),
                "measure": measure,
            }
        )

    def warmed(self, scenario: Scenario, num_requests: int, rate_per_s: float) -> Scenario:
        """A whole scenario of so many requests that measures none of the first share of them.

        A longer warm-up of its own is left as it is, unless the run is over by then: one at
        another rate may have fewer requests or last for less time.
        """
        measure, lasts_s = scenario.measure, num_requests / rate_per_s
        share = int(self.warmup_share * num_requests)
        requests, seconds = max(measure.warmup_requests, share), measure.warmup_s
        if rate_per_s != self.rate_per_s:
            requests = requests if requests < num_requests else share
            seconds = seconds if seconds < _MOST_WARMUP * lasts_s else 0.0
        measure = measure.model_copy(update={"warmup_requests": requests, "warmup_s": seconds})
        return scenario.model_copy(update={"measure": measure})

    def again(self, scenario: Scenario, num_requests: int, rate_per_s: float) -> Scenario:
        """A whole scenario that replays a trace, over and over until so many requests are in it.

        It keeps its mean rate and its peaks, and has no more requests than a sample may.
        """
        parts = self.stretches
        num = sum(part.num_requests for part in parts)
        whole = Stretch(parts[0].start_s, parts[-1].end_s, num)
        num_times = min(math.ceil(num_requests / num), max(1, MAX_RUN_REQUESTS // num))
        update, num = self._window(scenario, whole, None, num_times)
        workload = scenario.workload.model_copy(update=update)
        scenario = scenario.model_copy(update={"workload": workload})
        return self.warmed(scenario, num, rate_per_s)

    def _expecting(self, serving: ServingSettings) -> ServingSettings:
        """Settings that expect the lengths of all the traffic where they leave them open."""
        expected = {key: getattr(self._expected, key) for key in EXPECTED_LENGTHS}
        given = serving.model_dump(include=set(EXPECTED_LENGTHS), exclude_none=True)
        return serving.model_copy(update=expected | given)

    @cached_property
    def _expected(self) -> ServingSettings:
        """The scenario's own settings with the lengths that a policy reckons with."""
        return expected_serving(self.scenario, self.base_dir, self.where)

    def _window(
        self, base: Scenario, part: Stretch, rate_per_s: float | None, num_replicas: int
    ) -> tuple[dict[str, Any], int]:
        trace = base.workload.trace
        assert trace is not None
        scale = trace.rate_scale if rate_per_s is None else rate_per_s / part.rate_per_s
        if part.num_requests / part.rate_per_s / scale * num_replicas > MAX_SPAN_S:
            rate = part.rate_per_s * scale
            raise InputError(f"A rate of {rate:g} per second is too low for the trace.")
        changed = trace.model_copy(
            update={
                "start_s": part.start_s,
                "end_s": part.end_s,
                "rate_scale": scale,
                "repeat": num_replicas,
                "max_requests": None,
            }
        )
        own = trace.rate_scale
        begin_s, span_s = (part.start_s - trace.start_s) / own, (part.end_s - part.start_s) / own
        domains = tuple(
            _again(domain, begin_s, span_s, scale / own, num_replicas)
            for domain in base.workload.domains
        )
        num = part.num_requests * num_replicas
        update = {"trace": changed, "domains": domains, "num_requests": None, "duration_s": None}
        return update, num

    def _drawn(
        self, base: Scenario, rate_per_s: float | None, num_replicas: int
    ) -> tuple[dict[str, Any], int]:
        workload = base.workload
        rate = self.rate_per_s if rate_per_s is None else rate_per_s
        factor = rate / self.rate_per_s
        arrivals = _faster(workload.arrivals, factor)
        if self.is_shaped:
            changed: dict[str, Any] = {"arrivals": arrivals}
            whole = self.num_whole(rate)
            if whole is not None:
                return changed | {"num_requests": whole}, whole
            return changed, int(rate * (workload.duration_s or 0.0))
        num = self.num_requests * num_replicas
        return {"arrivals": arrivals, "num_requests": num, "duration_s": None}, num


def at_rate(scenario: Scenario, traffic: Traffic, rate_per_s: float) -> Scenario:
    """The whole scenario at another mean rate."""
    workload = scenario.workload
    factor = rate_per_s / traffic.rate_per_s
    if traffic.replays:
        assert workload.trace is not None
        scale = workload.trace.rate_scale * factor
        update: dict[str, Any] = {
            "trace": workload.trace.model_copy(update={"rate_scale": scale}),
            "domains": tuple(_paced(domain, factor) for domain in workload.domains),
        }
    else:
        update = {"arrivals": _faster(workload.arrivals, factor)}
        if traffic.is_shaped:
            update["num_requests"] = traffic.num_whole(rate_per_s)
    return scenario.model_copy(update={"workload": workload.model_copy(update=update)})


def _again(
    domain: DomainSettings, begin_s: float, span_s: float, pace: float, num_times: int
) -> DomainSettings:
    """A domain over a stretch of a run alone, `pace` times as fast and so many times over."""
    if domain.shares is None:
        return domain
    # The next repetition begins where this one ends, and times of points ascend strictly.
    last_s = (1.0 - 1e-9) * span_s
    inside = [at_s - begin_s for at_s, _ in domain.shares if 0.0 < at_s - begin_s < last_s]
    times_s = np.array([0.0, *inside, last_s])
    shares = domain.share_at(begin_s + times_s)
    points = [
        (float(number * span_s + at_s), float(share))
        for number in range(num_times)
        for at_s, share in zip(times_s, shares, strict=True)
    ]
    return _paced(domain.model_copy(update={"shares": tuple(points)}), pace)


def _paced(domain: DomainSettings, pace: float) -> DomainSettings:
    """A domain that drifts `pace` times as fast."""
    if domain.shares is None or pace == 1.0:
        return domain
    points = tuple((at_s / pace, share) for at_s, share in domain.shares)
    return domain.model_copy(update={"shares": points})


def _faster(arrivals: Any, factor: float) -> Any:
    """The same arrivals, `factor` times as many a second."""
    if factor == 1.0:
        return arrivals
    if isinstance(arrivals, ScheduleArrivals):
        points = tuple((at_s, rate * factor) for at_s, rate in arrivals.points)
        return arrivals.model_copy(update={"points": points})
    key = "mean_rate_per_s" if isinstance(arrivals, DailyArrivals) else "rate_per_s"
    return arrivals.model_copy(update={key: getattr(arrivals, key) * factor})
