"""Verdicts on pencil figures: what each limit needs, and what is blamed."""

from __future__ import annotations

from typing import Any

import pytest

from helios_sim.search.verdict import criterion, judge
from helios_sim.settings.slo import parse_slo


def figures(shares: list[float], together: float | None) -> dict[str, Any]:
    """A point that is not overloaded: a share for each limit, and that of the plain limits."""
    return {
        "summary": {"saturation": "stable", "mean_running": 1.0},
        "judged": [{"share": share, "value_ms": 1.0} for share in shares],
        "together": together,
    }


def test_limits_without_a_percentile_are_met_together_whatever_the_percentiles_are() -> None:
    """TTFT at p50 needs half of the requests and has 60 %; TPOT needs 95 % and has all."""
    slo = parse_slo("median_ttft_ms<=100;tpot:50")
    verdict = judge([figures([0.6, 1.0], 1.0)] * 3, slo, 0.95, 0.95)
    assert verdict.carried
    verdict = judge([figures([0.6, 0.9], 0.9)] * 3, slo, 0.95, 0.95)
    assert not verdict.carried
    assert [one.limit for one in verdict.broken] == ["tpot<=50ms"]


def test_of_limits_met_together_the_one_met_least_is_blamed() -> None:
    """TTFT at p50 is met least of all, yet it is not among those that are met together."""
    slo = parse_slo("ttft:100;tpot:50;ttft:p50<10ms")
    verdict = judge([figures([0.9, 0.8, 0.6], 0.75)] * 2, slo, 0.95, 0.95)
    assert [(one.limit, one.mean) for one in verdict.broken] == [("tpot<=50ms", 0.75)]


def test_a_share_of_0_999_on_average_is_the_999th_permille() -> None:
    slo = parse_slo("ttft:p99.9<1s")
    verdict = judge([figures([share], None) for share in (0.998, 1.0)], slo, 0.95, 0.95)
    assert verdict.carried
    verdict = judge([figures([0.9989], None)] * 2, slo, 0.95, 0.95)
    assert verdict.surely_missed


def test_a_share_is_bounded_by_student_s_t_over_the_replications() -> None:
    """Three shares with a deviation of 0.04 and a quantile of 2.920: 2.920 x 0.04 / sqrt(3)."""
    one = criterion("ttft", [0.90, 0.94, 0.98], 0.9, 0.95)
    assert (one.mean, one.low, one.high) == pytest.approx((0.94, 0.87257, 1.00743), abs=1e-5)
    alone = criterion("ttft", [0.9], 0.9, 0.95)
    assert (alone.low, alone.high) == (0.9, 0.9)


def test_what_lacks_the_largest_part_of_its_target_breaks_first() -> None:
    """TPOT lacks 0.135 of 0.9, which is 15 %; TTFT lacks only 0.1, which is 20 % of its 0.5."""
    slo = parse_slo("tpot:p90<50ms;ttft:p50<100ms")
    verdict = judge([figures([0.765, 0.4], None)] * 2, slo, 0.95, 0.95)
    assert [one.limit for one in verdict.broken] == ["ttft:p50<=100ms", "tpot:p90<=50ms"]
    assert verdict.worst.limit == "ttft:p50<=100ms"
    assert verdict.worst.shortfall == pytest.approx(0.2)


@pytest.mark.parametrize(("num_drowned", "carried"), [(0, True), (2, True), (3, False)])
def test_a_load_is_carried_while_no_more_than_half_of_its_runs_are_overloaded(
    num_drowned: int, carried: bool
) -> None:
    runs = [figures([1.0], None) for _ in range(4)]
    for run in runs[:num_drowned]:
        run["summary"]["saturation"] = "overloaded"
    verdict = judge(runs, parse_slo("ttft:p50<1s"), 0.95, 0.95)
    assert verdict.carried == carried
    assert verdict.surely_carried == (num_drowned == 0)
    assert not verdict.surely_missed


def test_a_percentile_s_latency_is_told_where_every_run_reaches_it() -> None:
    """In one of the runs too many requests never finish for the percentile to be a number."""
    slo = parse_slo("ttft:p50<1s")
    runs = [figures([0.9], None), figures([0.4], None)]
    runs[0]["judged"][0]["value_ms"] = 3.0
    assert judge(runs, slo, 0.95, 0.95).criteria[0].value_ms == 2.0
    runs[1]["judged"][0]["value_ms"] = None
    assert judge(runs, slo, 0.95, 0.95).criteria[0].value_ms is None
