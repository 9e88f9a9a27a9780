"""Arrivals have the rate, the burstiness and the schedule they were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from helios_sim.errors import InputError
from helios_sim.streams import stream
from helios_sim.workload.arrivals import (
    MAX_RATE_PER_S,
    ArrivalSettings,
    ClosedArrivals,
    RateProfile,
    Renewal,
    closed_arrivals,
    mean_rate_per_s,
    open_arrivals,
    peak_rate_per_s,
    weibull_shape,
)

ADAPTER: TypeAdapter[Any] = TypeAdapter(ArrivalSettings)
OFFICE_DAY = [2, 1, 1, 1, 1, 2, 4, 7, 10, 12, 13, 13, 12, 12, 13, 13, 12, 11, 9, 8, 7, 6, 4, 3]


def arrivals(
    table: dict[str, Any], num: int | None = None, duration_s: float | None = None, seed: int = 7
) -> np.ndarray:
    """Arrival times of a table of settings."""
    return open_arrivals(ADAPTER.validate_python(table), seed, num, duration_s)


MOMENTS = [
    ({"kind": "poisson", "rate_per_s": 4.0}, 1.0),
    ({"kind": "gamma", "rate_per_s": 4.0, "cv": 0.3}, 0.3),
    ({"kind": "gamma", "rate_per_s": 4.0, "cv": 1.0}, 1.0),
    ({"kind": "gamma", "rate_per_s": 4.0, "cv": 3.0}, 3.0),
    ({"kind": "weibull", "rate_per_s": 4.0, "cv": 0.3}, 0.3),
    ({"kind": "weibull", "rate_per_s": 4.0, "cv": 3.0}, 3.0),
]


@pytest.mark.parametrize(("table", "cv"), MOMENTS)
def test_intervals_have_the_asked_rate_and_cv(table: dict[str, Any], cv: float) -> None:
    """100,000 intervals: the mean within 4.5 standard errors, the CV within 4 %."""
    gaps = np.diff(arrivals(table, num=100_001))
    assert abs(gaps.mean() * 4.0 - 1) < 4.5 * cv / np.sqrt(gaps.size)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.04)
    assert gaps.min() >= 0


def test_constant_arrivals_are_evenly_spaced_from_zero() -> None:
    """Request i arrives at i / rate, and 60 s at 10 per second hold 600."""
    assert arrivals({"kind": "constant", "rate_per_s": 10.0}, num=4).tolist() == [0, 0.1, 0.2, 0.3]
    minute = arrivals({"kind": "constant", "rate_per_s": 10.0}, duration_s=60.0)
    assert minute.size == 600
    assert minute[-1] == 59.9


def test_a_duration_holds_every_constant_arrival_before_its_end() -> None:
    """At 2.5 a second the third comes at 0.8 s, and the fourth after the first second."""
    times = arrivals({"kind": "constant", "rate_per_s": 2.5}, duration_s=1.0)
    assert times.tolist() == [0.0, 0.4, 0.8]


@pytest.mark.parametrize("cv", [0.02, 0.5, 1.0, 1.09, 4.0, 13.15, 50.0])
def test_weibull_shape_inverts_the_cv(cv: float) -> None:
    """The solved shape has the asked CV, and shape 1 is the exponential."""
    assert Renewal("weibull", weibull_shape(cv)).cv == pytest.approx(cv, rel=1e-9)
    assert weibull_shape(1.0) == pytest.approx(1.0, rel=1e-10)


@pytest.mark.parametrize("family", ["gamma", "weibull"])
def test_a_bursty_process_is_stationary_from_the_first_second(family: str) -> None:
    """At CV 4 a window of 2 expected arrivals holds 2 on average; starting on one would add 7.5."""
    renewal = Renewal.gamma_of_cv(4.0) if family == "gamma" else Renewal.weibull_of_cv(4.0)
    counts = np.array(
        [
            renewal.arrivals(stream(1, "gaps", i), stream(1, "phase", i), before=2.0).size
            for i in range(4000)
        ]
    )
    assert abs(counts.mean() - 2.0) < 4.5 * counts.std() / np.sqrt(counts.size)


@pytest.mark.parametrize(("table", "cv"), MOMENTS)
def test_a_duration_is_a_prefix_of_the_same_arrivals(table: dict[str, Any], cv: float) -> None:
    """Asking by duration or by number cuts one and the same sequence."""
    many = arrivals(table, num=3000)
    few = arrivals(table, duration_s=200.0)
    assert few.size > 0
    assert np.array_equal(few, many[many < 200.0])
    assert np.array_equal(arrivals(table, num=10), many[:10])


@pytest.mark.parametrize(("table", "cv"), MOMENTS)
def test_how_many_intervals_are_drawn_at_once_changes_no_arrival(
    table: dict[str, Any], cv: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time or all: a workload of millions is drawn in parts."""
    whole = arrivals(table, num=100), arrivals(table, duration_s=20.0)
    monkeypatch.setattr("helios_sim.workload.arrivals._CHUNK", 3)
    assert np.array_equal(arrivals(table, num=100), whole[0])
    assert np.array_equal(arrivals(table, duration_s=20.0), whole[1])


def test_the_rate_only_stretches_the_pattern() -> None:
    """The same seed at twice the rate gives the same arrivals in half the time."""
    slow = arrivals({"kind": "gamma", "rate_per_s": 2.0, "cv": 2.0}, num=500)
    fast = arrivals({"kind": "gamma", "rate_per_s": 4.0, "cv": 2.0}, num=500)
    assert np.allclose(slow, 2 * fast, rtol=0, atol=2e-9)


def test_times_are_whole_nanoseconds() -> None:
    """Rounding to nanoseconds again changes nothing, at whatever hour a run starts."""
    day = {"kind": "daily", "mean_rate_per_s": 3.3, "hourly_weights": [1.0] * 24, "start_hour": 9.5}
    for table in ({"kind": "poisson", "rate_per_s": 3.3}, day):
        times = arrivals(table, num=10_000)
        assert np.array_equal(times, np.round(times * 1e9) / 1e9)


points = st.lists(
    st.tuples(st.floats(1.0, 100.0), st.floats(0.0, 20.0)), min_size=1, max_size=6
).map(
    lambda pieces: [
        (float(sum(width for width, _ in pieces[:i])), rate) for i, (_, rate) in enumerate(pieces)
    ]
)


@given(points=points, interpolate=st.booleans(), periodic=st.booleans())
@settings(max_examples=150)
def test_when_inverts_expected(
    points: list[tuple[float, float]], interpolate: bool, periodic: bool
) -> None:
    """For any schedule, E(when(x)) = x wherever x arrivals are ever expected."""
    points = [*points[:-1], (points[-1][0], points[-1][1] + 0.5)]
    period_s = points[-1][0] + 10.0 if periodic else None
    profile = RateProfile.from_points(points, interpolate, period_s)
    asked = np.linspace(0.01, 2.5 * profile.expected(points[-1][0] + 10.0), 40)
    times = profile.when(asked)
    assert np.all(np.diff(times) >= 0)
    back = np.array([profile.expected(float(time_s)) for time_s in times])
    assert np.allclose(back, asked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("table", "num", "duration_s", "peak"),
    [
        pytest.param({"rate_per_s": 3.0}, None, 9.0, 3.0, id="one rate"),
        pytest.param({"points": [[0, 2], [10, 8], [20, 1]]}, None, 15.0, 8.0, id="within time"),
        pytest.param({"points": [[0, 2], [10, 8], [20, 1]]}, None, 10.0, 2.0, id="before it"),
        pytest.param({"points": [[0, 2], [10, 8], [20, 1]]}, 20, None, 2.0, id="few requests"),
        pytest.param({"points": [[0, 2], [10, 8], [20, 1]]}, 21, None, 8.0, id="one more"),
        pytest.param({"points": [[0, 2], [10, 8], [20, 0]]}, 100, None, 8.0, id="all there are"),
        pytest.param(
            {"points": [[0, 2], [10, 8]], "interpolate": True}, None, 5.0, 5.0, id="half way up"
        ),
        pytest.param({"weights": OFFICE_DAY}, None, 86400.0, 13.0, id="a day"),
        pytest.param({"weights": OFFICE_DAY}, None, 3600.0, 2.0, id="its first hour"),
        pytest.param({"weights": OFFICE_DAY, "start": 23.5}, None, 2700.0, 3.0, id="midnight"),
        pytest.param({"weights": OFFICE_DAY, "start": 19.5}, None, 36000.0, 8.0, id="a night"),
        pytest.param(
            {"weights": OFFICE_DAY, "start": 23.5}, None, 36000.0, 12.0, id="next morning"
        ),
        pytest.param({"weights": OFFICE_DAY, "start": 20}, None, 100000.0, 13.0, id="for longer"),
        pytest.param({"weights": OFFICE_DAY, "start": 20}, 7200, None, 7.0, id="few by night"),
    ],
)
def test_the_peak_of_a_changing_rate_is_the_highest_that_a_run_comes_to(
    table: dict[str, Any], num: int | None, duration_s: float | None, peak: float
) -> None:
    """Rates of the office day are its weights: its mean rate is theirs."""
    if "weights" in table:
        weights, mean = table["weights"], sum(OFFICE_DAY) / 24
        table = {"kind": "daily", "mean_rate_per_s": mean, "start_hour": table.get("start", 0)}
        table["hourly_weights"] = weights
    else:
        table = {"kind": "schedule" if "points" in table else "poisson", **table}
    found = peak_rate_per_s(ADAPTER.validate_python(table), num, duration_s)
    assert found == pytest.approx(peak)


@pytest.mark.parametrize(("num", "duration_s"), [(12_600, None), (None, 5400.0)])
def test_the_mean_of_a_changing_rate_is_of_the_hours_that_a_run_comes_to(
    num: int | None, duration_s: float | None
) -> None:
    """From half past ten half an hour at 1 a second and an hour at 3: 12,600 in 5,400 s."""
    weights = [1.0, 3.0] * 12
    table = {"kind": "daily", "mean_rate_per_s": 2.0, "hourly_weights": weights}
    table["start_hour"] = 10.5
    settings = ADAPTER.validate_python(table)
    assert mean_rate_per_s(settings, num, duration_s) == pytest.approx(7 / 3)


def test_the_mean_of_a_rate_that_ends_is_told_up_to_the_last_request_it_brings() -> None:
    """One a second for ten seconds brings ten, and no request comes where the rate is 0."""
    ends = ADAPTER.validate_python({"kind": "schedule", "points": [[0, 1], [10, 0]]})
    assert mean_rate_per_s(ends, 10, None) == 1.0
    with pytest.raises(InputError, match="after about 10 requests; num_requests = 11 is not to be"):
        mean_rate_per_s(ends, 11, None)
    starts = ADAPTER.validate_python({"kind": "schedule", "points": [[0, 0], [10, 1]]})
    with pytest.raises(InputError, match="No request is expected within duration_s = 10; give a"):
        mean_rate_per_s(starts, None, 10.0)


@given(points=points, interpolate=st.booleans(), seed=st.integers(0, 10_000))
@settings(max_examples=60)
def test_a_schedule_holds_its_expected_count_in_each_window(
    points: list[tuple[float, float]], interpolate: bool, seed: int
) -> None:
    """Counts lie within 6 standard deviations of the rate's integral, done here by trapezoids."""
    points = [*points[:-1], (points[-1][0], points[-1][1] + 1.0)]
    end_s = points[-1][0] + 50.0
    table = {
        "kind": "schedule",
        "points": [list(point) for point in points],
        "interpolate": interpolate,
    }
    times = arrivals(table, duration_s=end_s, seed=seed)
    grid = np.linspace(0, end_s, 20_001)
    middle = (grid[1:] + grid[:-1]) / 2
    at_s, rate = (np.array(column) for column in zip(*points, strict=True))
    if interpolate:
        rates = np.interp(middle, at_s, rate)
    else:
        rates = rate[np.searchsorted(at_s, middle, side="right") - 1]
    expected = rates * np.diff(grid)
    for low, high in ((0, 10_000), (10_000, 20_000), (0, 20_000)):
        mean = expected[low:high].sum()
        count = np.count_nonzero((times >= grid[low]) & (times < grid[high]))
        assert abs(count - mean) <= 6 * np.sqrt(mean) + 12


def test_a_pause_of_a_schedule_holds_no_arrival() -> None:
    """Between 10 s and 20 s the rate is 0."""
    table = {"kind": "schedule", "points": [[0, 50], [10, 0], [20, 50]]}
    times = arrivals(table, duration_s=30.0)
    assert np.count_nonzero((times > 10) & (times < 20)) == 0
    assert np.count_nonzero(times <= 10) == pytest.approx(500, abs=120)
    assert np.count_nonzero(times >= 20) == pytest.approx(500, abs=120)


def test_interpolation_ramps_the_rate() -> None:
    """A rate rising from 0 to 20 in 100 s puts a quarter of its arrivals in the first half."""
    table = {"kind": "schedule", "points": [[0, 0], [100, 20]], "interpolate": True}
    times = arrivals(table, duration_s=100.0)
    assert times.size == pytest.approx(1000, abs=150)
    assert np.mean(times < 50) == pytest.approx(0.25, abs=0.06)


def test_a_schedule_of_one_point_is_the_plain_process() -> None:
    """Constant rates give the same arrivals through both ways, with and without a CV."""
    for plain, cv in (
        ({"kind": "poisson", "rate_per_s": 5.0}, 1.0),
        ({"kind": "gamma", "rate_per_s": 5.0, "cv": 2.0}, 2.0),
    ):
        schedule = {"kind": "schedule", "points": [[0, 5.0]], "cv": cv}
        assert np.array_equal(arrivals(plain, num=1000), arrivals(schedule, num=1000))


@pytest.mark.parametrize("interpolate", [False, True])
def test_a_daily_rate_has_its_mean_and_repeats(interpolate: bool) -> None:
    """Two days hold twice the mean; 10 to 11 o'clock is busier than 2 to 3 as weighted."""
    table = {
        "kind": "daily",
        "mean_rate_per_s": 0.5,
        "hourly_weights": OFFICE_DAY,
        "interpolate": interpolate,
    }
    times = arrivals(table, duration_s=2 * 86_400.0)
    assert times.size == pytest.approx(86_400, rel=0.02)
    hour = (times // 3600 % 24).astype(int)
    busy, quiet = np.count_nonzero(hour == 10), np.count_nonzero(hour == 2)
    assert busy / quiet == pytest.approx(13, rel=0.35)
    first, second = np.count_nonzero(times < 86_400), np.count_nonzero(times >= 86_400)
    assert first == pytest.approx(second, rel=0.03)


def test_a_day_is_as_bursty_as_asked() -> None:
    """Of a day without busy hours the gaps have the CV of the process."""
    day = {"kind": "daily", "mean_rate_per_s": 4.0, "hourly_weights": [1.0] * 24, "cv": 3.0}
    gaps = np.diff(arrivals(day, num=100_001))
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.04)


def test_a_daily_rate_starts_at_its_hour() -> None:
    """A run that starts at 9:30 has its first half hour at the weight of nine o'clock."""
    weights = [0.0] * 24
    weights[9], weights[11] = 1.0, 1.0
    table = {
        "kind": "daily",
        "mean_rate_per_s": 1.0,
        "hourly_weights": weights,
        "start_hour": 9.5,
    }
    times = arrivals(table, duration_s=86_400.0)
    inside = (times < 1800) | ((times >= 5400) & (times < 9000)) | (times >= 84_600)
    assert inside.all()
    assert np.count_nonzero(times < 1800) == pytest.approx(12 * 1800, rel=0.05)


def test_a_run_that_starts_in_a_busy_hour_is_busy_though_the_day_begins_quietly() -> None:
    """All arrivals are between noon and one; a run of half an hour from noon has half of them."""
    table = {
        "kind": "daily",
        "mean_rate_per_s": 0.1,
        "hourly_weights": [0.0] * 12 + [1.0] + [0.0] * 11,
        "start_hour": 12.0,
    }
    assert arrivals(table, duration_s=1800.0).size == pytest.approx(0.1 * 43_200, rel=0.05)


def test_from_the_last_hour_of_a_day_the_rate_goes_straight_to_the_first_of_the_next() -> None:
    """A day whose only weight is at midnight rises from 23 o'clock and falls until one."""
    table = {
        "kind": "daily",
        "mean_rate_per_s": 0.1,
        "hourly_weights": [1.0] + [0.0] * 23,
        "interpolate": True,
    }
    times = arrivals(table, duration_s=2 * 86_400.0)
    assert times.size == pytest.approx(0.1 * 2 * 86_400, rel=0.03)
    rising = np.count_nonzero(times % 86_400 >= 82_800)
    assert rising == pytest.approx(times.size / 2, rel=0.05)


def test_a_schedule_that_dries_up_is_an_error() -> None:
    """More requests than a schedule ending at rate 0 can send are refused with its total."""
    table = {"kind": "schedule", "points": [[0, 1], [10, 0]]}
    with pytest.raises(InputError, match="ends at rate 0 after about 10 requests"):
        arrivals(table, num=100)


def test_absurdly_many_requests_are_an_error() -> None:
    """A rate times a duration beyond memory is refused before it is drawn."""
    with pytest.raises(InputError, match=r"about 1e\+12 requests; at most 50000000"):
        arrivals({"kind": "poisson", "rate_per_s": 1e6}, duration_s=1e6)


def test_the_highest_rate_of_a_schedule_is_that_of_other_arrivals() -> None:
    table = {"kind": "schedule", "points": [[0, MAX_RATE_PER_S]]}
    assert arrivals(table, num=3).size == 3


def test_a_negative_seed_is_an_error() -> None:
    """The message says what the seed must be."""
    with pytest.raises(InputError, match="seed is -1; it must be an integer of at least 0"):
        stream(-1, "arrivals")


def closed(**keys: Any) -> ClosedArrivals:
    """Settings of a closed loop."""
    return ClosedArrivals(kind="closed", **keys)


def test_the_users_of_a_closed_loop_start_one_after_the_other_and_then_think() -> None:
    loop = closed(num_users=4, think_s=2.5, think_distribution="constant", ramp_s=8.0)
    times = closed_arrivals(loop, 3, 10)
    assert times.tolist() == [0.0, 2.0, 4.0, 6.0] + [2.5] * 6


def test_exponential_thinking_has_the_asked_mean_and_cv() -> None:
    """100,000 think times: mean within 1.5 %, CV within 2 % of 1."""
    times = closed_arrivals(closed(num_users=1, think_s=2.0), 3, 100_001)
    assert times[0] == 0.0
    assert times[1:].mean() == pytest.approx(2.0, rel=0.015)
    assert times[1:].std() / times[1:].mean() == pytest.approx(1.0, rel=0.02)


BAD_TABLES = [
    ({"kind": "poisson"}, "Field required"),
    ({"kind": "poisson", "rate_per_s": -1.0}, "greater than or equal to 0.000001"),
    ({"kind": "poisson", "rate_per_s": 2e6}, "less than or equal to 1000000"),
    ({"kind": "poisson", "rate_per_s": float("inf")}, "less than or equal|finite"),
    ({"kind": "poisson", "rate_per_s": "5"}, "valid number"),
    ({"kind": "poisson", "rate_per_s": 1.0, "cv": 2.0}, "Extra inputs"),
    ({"kind": "pareto", "rate_per_s": 1.0}, "'poisson', 'gamma', 'weibull', 'constant'"),
    ({"kind": "gamma", "rate_per_s": 1.0, "cv": 0.0}, "greater than or equal to 0.01"),
    ({"kind": "schedule", "points": []}, "at least 1 item"),
    ({"kind": "schedule", "points": [[5, 1]]}, "first point is at 5 s; the schedule must begin"),
    ({"kind": "schedule", "points": [[0, 1], [0, 2]]}, "must be strictly ascending"),
    ({"kind": "schedule", "points": [[0, -1]]}, "rate at 0 s is -1 per second; allowed are 0"),
    ({"kind": "schedule", "points": [[0, 1.1e6]]}, "is 1.1e.06 per second; allowed are 0 to 1e6"),
    ({"kind": "schedule", "points": [[0, 0]]}, "Every rate of the schedule is 0"),
    (
        {"kind": "daily", "mean_rate_per_s": 1.0, "hourly_weights": [0.0] * 24},
        "at least one must be positive",
    ),
    (
        {"kind": "daily", "mean_rate_per_s": 1.0, "hourly_weights": [1.0]},
        "1 hourly weights were given; exactly 24",
    ),
    (
        {"kind": "daily", "mean_rate_per_s": 1.0, "hourly_weights": [-1.0] + [1.0] * 23},
        "none may be negative",
    ),
    (
        {
            "kind": "daily",
            "mean_rate_per_s": 1.0,
            "hourly_weights": [1.0] * 24,
            "start_hour": 24.0,
        },
        "less than 24",
    ),
    ({"kind": "closed", "num_users": 0, "think_s": 1.0}, "greater than or equal to 1"),
    ({"kind": "closed", "num_users": 1, "think_s": -1.0}, "greater than or equal to 0"),
]


@pytest.mark.parametrize(("table", "message"), BAD_TABLES)
def test_bad_arrivals_are_refused_by_name(table: dict[str, Any], message: str) -> None:
    """Each mistake is told in its own words."""
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(table)
