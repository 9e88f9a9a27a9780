"""SLO text in three dialects, presets and the scenario's table become one frozen meaning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_sim.errors import InputError
from helios_sim.settings.slo import (
    METRICS,
    PRESETS,
    SloLimit,
    SloSpec,
    needed,
    parse_slo,
    preset_slo,
    reaches,
    slo_from_table,
)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("ttft:200 tpot:50", (SloLimit("ttft", 0.2), SloLimit("tpot", 0.05))),
        ("p99_e2el_ms<=200", (SloLimit("e2e", 0.2, 99.0),)),
        (
            "ttft:p99<500ms;tpot:p95<50ms",
            (SloLimit("ttft", 0.5, 99.0), SloLimit("tpot", 0.05, 95.0)),
        ),
        (
            "TTFT : p99.9 < 1.5 s, itl <= 40",
            (SloLimit("ttft", 1.5, 99.9), SloLimit("itl", 0.04)),
        ),
        ("median_ttft_s<=2", (SloLimit("ttft", 2.0, 50.0),)),
        ("e2e:30s", (SloLimit("e2e", 30.0),)),
    ],
)
def test_every_dialect_is_read_with_its_unit(text: str, limits: tuple[SloLimit, ...]) -> None:
    """The three dialects, with units, spaces and capitals, name the same limits."""
    assert parse_slo(text).limits == limits


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("ttfb:200", "Did you mean 'ttft'"),
        ("throughput:200", "Allowed are ttft, tpot, itl, e2e"),
        ("ttft:0", "not positive"),
        ("tpot:-5", "not positive"),
        ("tpot:1e400", "not positive and finite"),
        ("ttft:1e9999999", "not positive and finite"),
        ("ttft:1e99999999999999999999", "no number"),
        ("ttft:p0<10", "out of range"),
        ("ttft:p0.9<10", "allowed is p1 to p100. Did you mean p90?"),
        ("p0.999_ttft<10", "Did you mean p99.9?"),
        ("ttft:p101<10", "out of range"),
        ("ttft>=200", "lower limit"),
        ("ttft", "no SLO limit"),
        ("ttft:fast", "no SLO limit"),
        ("ttft:1.2.3", "no number"),
        ("p99_ttft:p95<3", "two percentiles"),
        ("ttft_ms<=3s", "two units"),
        ("ttft:200 ttft:300", "twice"),
    ],
)
def test_bad_text_is_refused_with_what_is_allowed(text: str, says: str) -> None:
    """A bad SLO text is one sentence that says what is wrong and where."""
    with pytest.raises(InputError, match=r"scenario\.toml") as caught:
        parse_slo(text, "scenario.toml, slo.text")
    assert says in str(caught.value)


limits = st.builds(
    SloLimit,
    st.sampled_from(METRICS),
    st.floats(1e-6, 1e5, allow_nan=False),
    st.one_of(st.none(), st.floats(1.0, 100.0)),
)


@given(
    st.lists(
        limits,
        min_size=1,
        max_size=5,
        unique_by=lambda one: (one.metric, one.percentile),
    )
)
def test_text_of_a_spec_reads_back_as_the_spec(limits: list[SloLimit]) -> None:
    """Writing and reading a spec loses no bit of any limit."""
    spec = SloSpec(tuple(limits))
    assert parse_slo(str(spec)) == spec


def test_presets_are_the_mlperf_limits() -> None:
    """A preset is found by name and holds the published pair at the 99th percentile."""
    assert preset_slo("Llama2-70B-interactive") == parse_slo("ttft:p99<=450ms;tpot:p99<=40ms")
    assert len(PRESETS) == 8
    with pytest.raises(InputError, match="Did you mean 'llama2-70b'"):
        preset_slo("llama2-7b")


def test_tables_are_read_in_each_form() -> None:
    """The scenario's table takes text, a preset or limits in milliseconds."""
    assert slo_from_table({"text": "ttft:200"}) == parse_slo("ttft:200")
    assert slo_from_table({"preset": "deepseek-r1"}) == PRESETS["deepseek-r1"]
    assert slo_from_table({"ttft_ms": 12.3, "e2e_ms": 9}) == parse_slo("ttft:12.3 e2e:9")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "names no limit"),
        ({"ttfts_ms": 3}, "Did you mean 'ttft_ms'"),
        ({"text": "ttft:1", "tpot_ms": 4}, "together"),
        ({"ttft_ms": "200"}, "a number of ms"),
        ({"ttft_ms": True}, "a number of ms"),
        ({"ttft_ms": -1}, "not positive"),
        ({"ttft_ms": float("nan")}, "not positive"),
        ({"text": 4}, "allowed is text"),
    ],
)
def test_bad_tables_are_refused(table: dict[str, object], says: str) -> None:
    """A bad table names the place and what is allowed."""
    with pytest.raises(InputError, match="slo") as caught:
        slo_from_table(table, "slo")
    assert says in str(caught.value)


def test_tightest_limit_of_a_metric() -> None:
    """A metric limited twice answers with the smaller limit, an unlimited one with none."""
    spec = parse_slo("ttft:500 ttft:p50<200")
    assert spec.limit_s("ttft") == 0.2
    assert spec.limit_s("tpot") is None
    assert spec.metrics == ("ttft",)


@pytest.mark.parametrize(
    ("percentile", "num", "fewest"),
    [(99.9, 1000, 999), (99.9, 1001, 1000), (99.9, 10_000_000, 9_990_000), (50.0, 3, 2)],
)
def test_a_percentile_needs_its_share_of_the_requests_and_not_one_more(
    percentile: float, num: int, fewest: int
) -> None:
    assert needed(percentile, num) == fewest
    assert reaches(fewest / num, percentile / 100.0)
    assert not reaches((fewest - 1) / num, percentile / 100.0)
    assert needed(100.0, num) == num
