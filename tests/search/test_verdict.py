"""Verdicts on pencil figures: what each limit needs, and what is blamed."""

from __future__ import annotations

from typing import Any

from helios_sim.search.verdict import judge
from helios_sim.slo import parse_slo


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
