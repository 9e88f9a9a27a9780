"""When requests arrive: renewal processes, rate schedules and their exact sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.special import gammaincinv, gammaln

from helios_sim.errors import InputError
from helios_sim.settings.strict import Numbers, Pairs, StrictSettings
from helios_sim.streams import NS_PER_S, Floats, stream, whole_ns

MAX_REQUESTS = 50_000_000
"""Requests of one workload; columns beyond this no longer fit a usual machine."""

MAX_RATE_PER_S = 1e6
"""Requests per second of one source of arrivals."""

_DAY_S = 86_400.0
_CHUNK = 1 << 21

Rate = Annotated[float, Field(ge=1e-6, le=MAX_RATE_PER_S)]
Cv = Annotated[float, Field(ge=0.01, le=50)]


class PoissonArrivals(StrictSettings):
    """Independent users: exponential intervals."""

    kind: Literal["poisson"]
    rate_per_s: Rate


class GammaArrivals(StrictSettings):
    """Gamma intervals of the given coefficient of variation; 1 is Poisson, more is burstier."""

    kind: Literal["gamma"]
    rate_per_s: Rate
    cv: Cv


class WeibullArrivals(StrictSettings):
    """Weibull intervals of the given coefficient of variation; its shape is solved for."""

    kind: Literal["weibull"]
    rate_per_s: Rate
    cv: Cv


class ConstantArrivals(StrictSettings):
    """One request every 1/rate seconds, the first at 0."""

    kind: Literal["constant"]
    rate_per_s: Rate


class ClosedArrivals(StrictSettings):
    """Users who each wait for their answer, think, and ask again.

    User u starts at `ramp_s` x u / `num_users`.
    """

    kind: Literal["closed"]
    num_users: Annotated[int, Field(ge=1, le=1_000_000)]
    think_s: Annotated[float, Field(ge=0, le=1e6)]
    think_distribution: Literal["constant", "exponential"] = "exponential"
    ramp_s: Annotated[float, Field(ge=0, le=1e6)] = 0.0


class ScheduleArrivals(StrictSettings):
    """A rate given by points [at_s, rate_per_s]: steps, or straight lines with `interpolate`.

    The last rate holds from the last point on.
    """

    kind: Literal["schedule"]
    points: Annotated[Pairs, Field(min_length=1)]
    interpolate: bool = False
    cv: Cv = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        times = [at_s for at_s, _ in self.points]
        if times[0] != 0:
            raise ValueError(f"The first point is at {times[0]:g} s; the schedule must begin at 0.")
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise ValueError(f"The points are at {times} s; they must be strictly ascending.")
        for at_s, rate in self.points:
            if not 0 <= rate <= MAX_RATE_PER_S:
                raise ValueError(
                    f"The rate at {at_s:g} s is {rate:g} per second; allowed are 0 to 1e6."
                )
        if all(rate == 0 for _, rate in self.points):
            raise ValueError("Every rate of the schedule is 0; at least one must be positive.")
        return self


class DailyArrivals(StrictSettings):
    """A day of 24 hourly weights around a mean rate, repeated; `start_hour` is the run's start.

    A weight holds for its hour, or with `interpolate` at its full hour with straight lines
    between.
    """

    kind: Literal["daily"]
    mean_rate_per_s: Rate
    hourly_weights: Numbers
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 0.0
    interpolate: bool = False
    cv: Cv = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.hourly_weights) != 24:
            raise ValueError(
                f"{len(self.hourly_weights)} hourly weights were given; exactly 24 are needed."
            )
        if min(self.hourly_weights) < 0 or sum(self.hourly_weights) <= 0:
            raise ValueError(
                f"The hourly weights are {list(self.hourly_weights)}; "
                "none may be negative and at least one must be positive."
            )
        return self


class TraceArrivals(StrictSettings):
    """The arrival times of the workload's trace."""

    kind: Literal["trace"]


OpenArrivals = (
    PoissonArrivals
    | GammaArrivals
    | WeibullArrivals
    | ConstantArrivals
    | ScheduleArrivals
    | DailyArrivals
)

ArrivalSettings = Annotated[
    PoissonArrivals
    | GammaArrivals
    | WeibullArrivals
    | ConstantArrivals
    | ClosedArrivals
    | ScheduleArrivals
    | DailyArrivals
    | TraceArrivals,
    Field(discriminator="kind"),
]


def _weibull_cv(shape: float) -> float:
    """Coefficient of variation of a Weibull interval: cv^2 = G(1 + 2/k) / G(1 + 1/k)^2 - 1."""
    return math.sqrt(math.expm1(float(gammaln(1 + 2 / shape) - 2 * gammaln(1 + 1 / shape))))


def weibull_shape(cv: float) -> float:
    """The shape whose Weibull intervals have this coefficient of variation."""
    # The optimisers take longer to import than a small simulation takes to run.
    from scipy.optimize import brentq

    log_shape = brentq(lambda x: math.log(_weibull_cv(math.exp(x)) / cv), -2.5, 6.0, xtol=1e-14)
    # Twelve digits are far beyond any use and the same on every machine.
    return float(f"{math.exp(log_shape):.11e}")


@dataclass(frozen=True)
class Renewal:
    """Independent intervals of mean 1: gamma or Weibull of a shape; gamma of shape 1 is Poisson."""

    family: Literal["gamma", "weibull"]
    shape: float

    @classmethod
    def gamma_of_cv(cls, cv: float) -> Renewal:
        """Gamma intervals of a coefficient of variation."""
        return cls("gamma", 1.0 if cv == 1 else 1.0 / (cv * cv))

    @classmethod
    def weibull_of_cv(cls, cv: float) -> Renewal:
        """Weibull intervals of a coefficient of variation."""
        return cls("weibull", 1.0 if cv == 1 else weibull_shape(cv))

    @property
    def is_memoryless(self) -> bool:
        """Whether the intervals are exponential."""
        return self.shape == 1

    @property
    def cv(self) -> float:
        """Coefficient of variation of the intervals."""
        return self.shape**-0.5 if self.family == "gamma" else _weibull_cv(self.shape)

    def intervals(self, uniforms: Floats) -> Floats:
        """Intervals by inverse transform, one for each uniform number in [0, 1)."""
        if self.is_memoryless:
            return -np.log1p(-uniforms)
        if self.family == "gamma":
            return np.asarray(gammaincinv(self.shape, uniforms) / self.shape, dtype=np.float64)
        scale = math.exp(-float(gammaln(1 + 1 / self.shape)))
        return scale * np.power(-np.log1p(-uniforms), 1 / self.shape)

    def first(self, uniforms: Floats) -> float:
        """The time to the first arrival of a process that has been running for ever.

        An observer falls into an interval in proportion to its length, and anywhere in it: a
        uniform share (second number) of a length-biased interval (first number). Only then does
        every window hold rate x length arrivals on average; starting on an arrival would add
        (cv^2 - 1)/2 of them.
        """
        if self.family == "gamma":
            biased = float(gammaincinv(self.shape + 1, uniforms[0])) / self.shape
        else:
            scale = math.exp(-float(gammaln(1 + 1 / self.shape)))
            inverse = 1 / self.shape
            biased = scale * float(gammaincinv(1 + inverse, uniforms[0])) ** inverse
        return biased * float(uniforms[1])

    def arrivals(
        self,
        intervals: np.random.Generator,
        phase: np.random.Generator,
        *,
        num: int | None = None,
        before: float = math.inf,
    ) -> Floats:
        """Arrivals of the stationary process of rate 1: the first `num`, or those under `before`.

        Asking for more continues the same sequence. Intervals are whole nano-units and add up as
        integers, so that rounding never accumulates.
        """
        ticks: list[NDArray[np.int64]] = []
        last = 0
        if not self.is_memoryless:
            last = round(self.first(phase.random(2)) * NS_PER_S)
            ticks.append(np.array([last], dtype=np.int64))
        drawn = len(ticks)
        while (num is None and last / NS_PER_S < before) or (num is not None and drawn < num):
            left = before - last / NS_PER_S
            wanted = left + 4 * self.cv * math.sqrt(left) + 16 if num is None else num - drawn
            size = int(min(_CHUNK, wanted))
            gaps = np.rint(self.intervals(intervals.random(size)) * NS_PER_S).astype(np.int64)
            chunk = last + np.cumsum(gaps)
            last = int(chunk[-1])
            drawn += size
            ticks.append(chunk)
        units = np.concatenate(ticks) / NS_PER_S if ticks else np.empty(0)
        return units[:num] if num is not None else units[: np.searchsorted(units, before)]


@dataclass(frozen=True)
class RateProfile:
    """A piecewise linear rate over time, its integral, and the integral's exact inverse.

    Piece i begins at `at_s[i]` with `rate_per_s[i]` and changes by `slope[i]` each second. With
    `period_s` it repeats; without, the last piece lasts for ever.
    """

    at_s: Floats
    rate_per_s: Floats
    slope: Floats
    expected_at: Floats
    period_s: float | None
    period_expected: float

    @classmethod
    def from_points(
        cls, points: Iterable[tuple[float, float]], interpolate: bool, period_s: float | None = None
    ) -> RateProfile:
        """Steps or straight lines through points (at_s, rate_per_s) that begin at 0 s."""
        given = list(points)
        at_s = np.array([at for at, _ in given])
        rate = np.array([value for _, value in given])
        until = at_s[-1] if period_s is None else period_s
        widths = np.diff(np.append(at_s, until))
        following = np.append(rate[1:], rate[-1] if period_s is None else rate[0])
        rises = following - rate if interpolate else np.zeros_like(rate)
        slope = np.divide(rises, widths, out=np.zeros_like(rate), where=widths > 0)
        areas = widths * (rate + 0.5 * slope * widths)
        totals = np.append(0.0, np.cumsum(areas))
        return cls(at_s, rate, slope, totals[:-1], period_s, float(totals[-1]))

    @property
    def total_expected(self) -> float:
        """Arrivals expected in all time; infinite unless the rate ends at 0."""
        if self.period_s is not None or self.rate_per_s[-1] > 0:
            return math.inf
        return float(self.expected_at[-1])

    def expected(self, time_s: float) -> float:
        """Arrivals expected before `time_s`."""
        periods = 0.0
        if self.period_s is not None:
            periods, time_s = divmod(time_s, self.period_s)
        piece = int(np.searchsorted(self.at_s, time_s, side="right")) - 1
        into_s = time_s - float(self.at_s[piece])
        area = into_s * (float(self.rate_per_s[piece]) + 0.5 * float(self.slope[piece]) * into_s)
        return periods * self.period_expected + float(self.expected_at[piece]) + area

    def highest(self, since_s: float, until_s: float) -> float:
        """The highest rate between two times."""
        laps_s, last_s = [0.0], math.inf
        if self.period_s is not None:
            laps_s, last_s = [0.0, self.period_s], self.period_s
            until_s -= since_s
            since_s %= self.period_s
            until_s += since_s
            if until_s - since_s >= self.period_s:
                since_s, until_s = 0.0, self.period_s
        most = 0.0
        for lap_s in laps_s:
            at_s = self.at_s + lap_s
            begin_s = np.maximum(at_s, since_s)
            end_s = np.minimum(np.append(at_s[1:], lap_s + last_s), until_s)
            # A rate that holds for ever has no slope, so that its begin says it all.
            for time_s in (begin_s, np.where(np.isinf(end_s), begin_s, end_s)):
                rates = self.rate_per_s + self.slope * (time_s - at_s)
                most = max([most, *rates[begin_s < end_s]])
        return float(most)

    def when(self, expected: Floats) -> Floats:
        """The times before which so many arrivals are expected: the inverse of `expected`."""
        periods: Floats | float = 0.0
        if self.period_s is not None:
            periods = np.floor(expected / self.period_expected)
            expected = expected - periods * self.period_expected
        piece = np.searchsorted(self.expected_at, expected, side="right") - 1
        area = expected - self.expected_at[piece]
        rate = self.rate_per_s[piece]
        # The root of slope/2 t^2 + rate t = area, in the form that also serves a slope of 0.
        root = np.sqrt(np.maximum(rate * rate + 2 * self.slope[piece] * area, 0.0))
        below = rate + root
        into_s = np.divide(2 * area, below, out=np.zeros_like(area), where=below > 0)
        times: Floats = self.at_s[piece] + into_s
        return times if self.period_s is None else periods * self.period_s + times


def _daily_profile(settings: DailyArrivals) -> RateProfile:
    mean_weight = sum(settings.hourly_weights) / 24
    points = (
        (3600.0 * hour, settings.mean_rate_per_s * weight / mean_weight)
        for hour, weight in enumerate(settings.hourly_weights)
    )
    return RateProfile.from_points(points, settings.interpolate, _DAY_S)


def _process(settings: OpenArrivals) -> tuple[Renewal, RateProfile, float]:
    """The unit-rate process, the rate and the place in the rate where the run starts."""
    match settings:
        case ScheduleArrivals():
            profile = RateProfile.from_points(settings.points, settings.interpolate)
            return Renewal.gamma_of_cv(settings.cv), profile, 0.0
        case DailyArrivals():
            start_s = 3600.0 * settings.start_hour
            return Renewal.gamma_of_cv(settings.cv), _daily_profile(settings), start_s
    profile = RateProfile.from_points([(0.0, settings.rate_per_s)], interpolate=False)
    match settings:
        case GammaArrivals():
            return Renewal.gamma_of_cv(settings.cv), profile, 0.0
        case WeibullArrivals():
            return Renewal.weibull_of_cv(settings.cv), profile, 0.0
    return Renewal("gamma", 1.0), profile, 0.0


def mean_rate_per_s(
    settings: OpenArrivals, num_requests: int | None, duration_s: float | None
) -> float:
    """Requests a second on average before `duration_s`, or until `num_requests` are expected.

    It is the integral of the rate, so no draw has a part in it.
    """
    _, profile, start_s = _process(settings)
    offset = profile.expected(start_s)
    if duration_s is not None:
        expected = profile.expected(start_s + duration_s) - offset
        if expected <= 0.0:
            raise InputError(
                f"No request is expected within duration_s = {duration_s:g}; give a longer "
                "duration or a rate above 0 in it.",
                where="workload.arrivals",
            )
        return expected / duration_s
    assert num_requests is not None
    if offset + num_requests > profile.total_expected:
        raise InputError(
            f"The schedule ends at rate 0 after about {profile.total_expected - offset:g} "
            f"requests; num_requests = {num_requests} is not to be expected: ask for fewer, or "
            "give duration_s.",
            where="workload.arrivals",
        )
    return num_requests / (float(profile.when(np.array([offset + num_requests]))[0]) - start_s)


def open_arrivals(
    settings: OpenArrivals, seed: int, num_requests: int | None, duration_s: float | None
) -> Floats:
    """Arrival times of the first `num_requests`, or of all before `duration_s`.

    A changing rate is sampled by time rescaling: a process of rate 1 runs on the axis of
    expected arrivals, and each of its points is carried back to the time at which that many are
    expected. This is exact, and leaves the process the same whatever the rate.
    """
    renewal, profile, start_s = _process(settings)
    offset = profile.expected(start_s)
    ahead = profile.total_expected - offset
    until = ahead if duration_s is None else profile.expected(start_s + duration_s) - offset
    wanted = until if num_requests is None else num_requests
    if wanted > MAX_REQUESTS:
        raise InputError(
            f"The arrivals would make about {wanted:.3g} requests; at most {MAX_REQUESTS} are "
            "allowed: lower the rate or the duration.",
            where="workload.arrivals",
        )
    if isinstance(settings, ConstantArrivals):
        times = np.arange(int(wanted) + 2 if num_requests is None else num_requests, dtype=float)
        times = whole_ns(times / settings.rate_per_s)
    else:
        units = renewal.arrivals(
            stream(seed, "arrivals"), stream(seed, "arrivals-phase"), num=num_requests, before=until
        )
        if units.size and units[-1] >= ahead:
            raise InputError(
                f"The schedule ends at rate 0 after about {ahead:g} requests; num_requests = "
                f"{num_requests} is never reached: ask for fewer, or give duration_s.",
                where="workload.arrivals",
            )
        times = whole_ns(profile.when(units + offset) - start_s)
    return times if duration_s is None else times[times < duration_s]


def closed_arrivals(settings: ClosedArrivals, seed: int, num_requests: int) -> Floats:
    """When a closed loop's users start, and how long one thinks before each other request."""
    rows = np.arange(num_requests)
    if settings.think_distribution == "constant":
        think_s = np.full(num_requests, settings.think_s)
    else:
        think_s = -np.log1p(-stream(seed, "think").random(num_requests)) * settings.think_s
    start_s = settings.ramp_s * rows / settings.num_users
    return whole_ns(np.where(rows < settings.num_users, start_s, think_s))


def peak_rate_per_s(
    settings: OpenArrivals, num_requests: int | None, duration_s: float | None
) -> float:
    """The highest rate before `duration_s`, or until `num_requests` are expected."""
    _, profile, start_s = _process(settings)
    if duration_s is not None:
        return profile.highest(start_s, start_s + duration_s)
    until = profile.expected(start_s) + (num_requests or 0)
    if until >= profile.total_expected:
        return profile.highest(start_s, math.inf)
    return profile.highest(start_s, float(profile.when(np.array([until]))[0]))
