"""Every figure of a summary follows its definition, on numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from helios_sim.errors import InputError
from helios_sim.runs.comparison import COMPARED, compare, comparison_rows, distinct_labels, gain
from helios_sim.runs.latencies import columns_of, meets_all
from helios_sim.runs.metrics import (
    DEFINITIONS,
    aggregate,
    batch_interval,
    figure_at,
    gap_percentile_s,
    gap_share_met,
    rounded_figures,
    start_figures,
    summarise,
    user_figures,
)
from helios_sim.runs.records import RunData, conformed
from helios_sim.runs.saturation import saturation_of
from helios_sim.settings.slo import parse_slo
from tests.counted_lines import lines_of
from tests.factories import ITL_EDGES_S, fifo_admission, make_run

SLO = parse_slo("ttft:300 tpot:200")


def pencil_run(**changes: Any) -> RunData:
    """Four requests worked out by hand: 5 tokens, 1 token, refused, 3 tokens."""
    run = make_run(num_requests=4)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", [0.0, 0.2, 1.0, 2.0]),
        pl.Series("admitted_s", [0.0, 0.5, None, 2.0]),
        pl.Series("first_token_s", [0.1, 0.6, None, 2.2]),
        pl.Series("finished_s", [0.5, 0.6, None, 3.2]),
        pl.Series("prompt_tokens", [10, 20, 40, 30]),
        pl.Series("output_tokens", [5, 1, 7, 3]),
        pl.Series("generated_tokens", [5, 1, 0, 3]),
        pl.Series("decoded_tokens", [4, 0, 0, 2]),
        pl.Series("executed_layers", [24, 0, 0, 64]),
        pl.Series("agree_tokens", [4, 1, 0, 3]),
        pl.Series("nll_nats", [5.0, 1.0, 0.0, 3.0]),
        pl.Series("breaches", [2, 0, 0, 1]),
        pl.Series("breaches_relative", [1, 0, 0, 0]),
        pl.Series("status", ["finished", "finished", "refused", "finished"]),
    )
    totals = replace(
        run.totals,
        end_s=4.0,
        energy_j=90.0,
        exit_layers={"opt-6.7b": (9, 32)},
        exit_counts={"opt-6.7b": (4, 2)},
        itl_bins_s=(0.1, 0.2, 0.4, 0.8),
        itl_counts=(4, 0, 2),
        itl_sum_s=1.4,
        itl_sum_square_s2=0.54,
        decode_rows=6,
        num_decode_iterations=4,
    )
    return conformed(replace(run, requests=requests, totals=replace(totals, **changes)))


def test_a_user_of_a_closed_loop_is_active_from_its_first_request_until_its_last_has_left() -> None:
    """One user from 0 s until refused at 1 s, the other from 0.2 s to 3.2 s; 4 s in all.

    They think for 0.5 s and 1.4 s in between. With its last request left unfinished the second is
    active until the end.
    """
    run, times_s = pencil_run(), np.array([0.0, 0.2, 0.5, 1.4])
    assert user_figures(run, 2, times_s) == {"num_users": 2, "mean_active_users": 1.0}
    cut = run.requests.with_columns(
        pl.Series("status", ["finished", "finished", "refused", "running"]),
        pl.Series("finished_s", [0.5, 0.6, None, None]),
    )
    cut_run = conformed(replace(run, requests=cut))
    assert user_figures(cut_run, 2, times_s) == {"num_users": 2, "mean_active_users": 1.2}
    assert user_figures(run, None, times_s) == {}


def test_requests_that_came_before_their_replica_served_are_counted() -> None:
    """Replica 0 admits first at 3 s: two measured ones came before; replica 1 serves at once.

    A refused request waits for nothing, and what lies in the warm-up is not counted.
    """
    run = pencil_run()
    late = run.requests.with_columns(
        pl.Series("admitted_s", [3.0, 3.5, None, 2.0]), pl.Series("replica", [0, 0, 0, 1])
    )
    started = conformed(replace(run, requests=late))
    assert start_figures(started, 0.0, 0) == {"num_before_start": 2, "start_s": 3.0}
    assert start_figures(started, 0.1, 0) == {"num_before_start": 1, "start_s": 3.0}
    assert start_figures(started, 0.0, 2) == {"num_before_start": 0, "start_s": 0.0}


def test_every_figure_of_the_pencil_run() -> None:
    """The definitions, applied by hand to four requests, give the summary's figures."""
    summary = summarise(pencil_run(), SLO)
    expected = {
        "duration": 4.0,
        "num_requests": 4,
        "completed": 3,
        "failed": 1,
        "num_refused": 1,
        "num_unfinished": 0,
        "num_preemptions": 1,
        "total_input_tokens": 60,
        "total_output_tokens": 9,
        "request_throughput": 0.75,
        "output_throughput": 2.25,
        "total_token_throughput": 17.25,
        "max_concurrent_requests": 2,
        "mean_wait_ms": 100.0,
        "mean_ttft_ms": 1e3 * (0.1 + 0.4 + 0.2) / 3,
        "median_ttft_ms": 200.0,
        "p50_ttft_ms": 200.0,
        "mean_tpot_ms": 300.0,
        "std_tpot_ms": 200.0,
        "p90_tpot_ms": 460.0,
        "mean_e2el_ms": 700.0,
        "mean_itl_ms": 1e3 * 1.4 / 6,
        "std_itl_ms": 1e3 * math.sqrt(0.54 / 6 - (1.4 / 6) ** 2),
        "p50_itl_ms": 1e3 * 0.1 * 2**0.75,
        "p90_itl_ms": 1e3 * 0.4 * 2**0.7,
        "request_goodput": 0.25,
        "slo": "ttft<=300ms;tpot<=200ms",
        "slo_attainment": 0.25,
        "slo_attainment_by_metric": {"ttft": 0.5, "tpot": 0.5},
        "slo_passed": None,
        "total_gpu_energy": 90.0,
        "average_gpu_power": 22.5,
        "energy_per_output_token": 10_000.0,
        "energy_per_request": 30.0,
        "output_tokens_per_joule": 0.1,
        "mean_executed_layers": 88 / 6,
        "exit_histogram": {"opt-6.7b": {"9": 4 / 6, "32": 2 / 6}},
        "agreement": 8 / 9,
        "perplexity": math.e,
        "breach_rate": 1 / 9,
        "breach_rate_observed": 3 / 9,
        "mean_batch_size": 1.5,
        "saturation": "stable",
        "backlog_growth_per_s": 0.0,
        "drain_after_arrivals_s": 1.2,
    }
    for key, value in expected.items():
        if isinstance(value, float | int):
            assert summary[key] == pytest.approx(value, rel=1e-11), key
        else:
            assert summary[key] == rounded_figures(value), key


def test_times_of_two_replicas_are_shares_of_both_and_running_requests_are_added() -> None:
    """Of eight seconds three are busy; 6 request-seconds in 4 s are 1.5 requests at a time."""
    seconds = {"busy_s": 3.0, "idle_s": 3.0, "load_s": 2.0, "drain_s": 1.0, "evaluation_s": 0.8}
    summary = summarise(pencil_run(num_replicas=2, batch_seconds=6.0, **seconds))
    assert summary["time_shares"] == {
        "busy": 0.375,
        "idle": 0.375,
        "loading": 0.25,
        "draining": 0.125,
        "evaluating": 0.1,
    }
    assert summary["mean_running"] == 1.5


def test_what_a_run_counts_itself_stands_under_the_key_of_its_own() -> None:
    """Each total is another number here."""
    total_of = {
        "energy_idle_j": "energy_idle_j",
        "energy_load_j": "energy_load_j",
        "num_breach_events": "num_breach_events",
        "max_batch_size": "max_running",
        "max_batch_size_supported": "max_batch_size_supported",
        "weight_bytes_loaded": "mean_weight_bytes",
        "weight_bytes_peak": "peak_weight_bytes",
        "mean_kv_use": "mean_kv_use",
        "num_switches": "num_switches",
        "num_loads": "num_loads",
        "num_evaluations": "num_evaluations",
        "switch_time_s": "switch_time_s",
    }
    given = {total: place for place, total in enumerate(total_of.values())}
    summary = summarise(pencil_run(**given))
    assert {key: summary[key] for key in total_of} == dict(
        zip(total_of, given.values(), strict=True)
    )
    shared = {"depth_seconds": {"small@2": 1.0, "small@4": 3.0}}
    shared["regime_s"] = {"launch": 3.0, "memory": 1.0, "compute": 0.0}
    summary = summarise(pencil_run(**shared))
    assert summary["depth_share"] == {"small@2": 0.25, "small@4": 0.75}
    assert summary["regime"] == {"launch": 0.75, "memory": 0.25, "compute": 0.0}


def test_every_key_is_defined_and_documented() -> None:
    """Each key of a summary has a definition, and the documentation holds the same words."""
    summary = summarise(pencil_run(), SLO)
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = set()
    for key in summary:
        tail = key.split("_", 1)[-1]
        names.add(tail if tail in DEFINITIONS and key not in DEFINITIONS else key)
    assert names == set(DEFINITIONS)
    for name, meaning in DEFINITIONS.items():
        assert f"| `{name}` | {meaning} |" in page, name


def test_figures_are_json_rounded_to_twelve_digits() -> None:
    """No figure is NaN or infinite, and none carries more than 12 significant digits."""
    summary = summarise(make_run("helios", num_refused=2), SLO)
    json.dumps(summary, allow_nan=False)
    floats = [value for value in summary.values() if isinstance(value, float)]
    assert len(floats) > 30
    assert all(value == float(f"{value:.12g}") for value in floats)


def test_undefined_figures_are_null() -> None:
    """A run that emitted nothing, without a meter, has nulls and not zeros."""
    run = pencil_run(energy_j=math.nan, itl_counts=(0, 0, 0), exit_counts={"opt-6.7b": (0, 0)})
    nothing = run.requests.with_columns(
        pl.lit("waiting").alias("status"),
        *(pl.lit(None, dtype=pl.Float64).alias(name) for name in ("finished_s", "first_token_s")),
        *(pl.lit(0, dtype=pl.Int32).alias(name) for name in ("generated_tokens", "decoded_tokens")),
    )
    summary = summarise(replace(run, requests=nothing), SLO)
    for key in (
        "mean_ttft_ms",
        "p99_tpot_ms",
        "mean_itl_ms",
        "total_gpu_energy",
        "average_gpu_power",
        "energy_per_request",
        "perplexity",
        "agreement",
        "exit_histogram",
        "drain_after_arrivals_s",
    ):
        assert summary[key] is None, key
    assert summary["slo_attainment"] == 0.0
    assert summary["num_unfinished"] == 4


def test_one_token_requests_meet_tpot_but_stay_out_of_its_statistics() -> None:
    """A one-token request counts as a TPOT of 0 for goodput and is no sample of TPOT."""
    columns = columns_of(pencil_run())
    assert meets_all(columns, parse_slo("tpot:1 e2e:500")).tolist() == [False, True, False, False]
    assert summarise(pencil_run())["median_tpot_ms"] == 300.0


def test_a_limit_that_is_reached_to_the_bit_is_met() -> None:
    """The first token of the first request comes after exactly 100 ms."""
    met = meets_all(columns_of(pencil_run()), parse_slo("ttft<100"))
    assert met.tolist() == [True, False, False, False]


def test_refused_requests_count_against_attainment() -> None:
    """Refusing half of the requests halves attainment, though the rest meet every limit."""
    run = make_run(num_requests=100, num_refused=50)
    summary = summarise(run, parse_slo("e2e:10000s"))
    assert summary["slo_attainment"] == 0.5
    assert summary["slo_attainment_by_metric"] == {"e2e": 0.5}


def test_percentile_limits_are_judged_over_the_requests_sent() -> None:
    """A p50 limit that half of the sent requests meet passes, a p51 limit does not."""
    passes = summarise(pencil_run(), parse_slo("ttft:p50<300ms"))
    fails = summarise(pencil_run(), parse_slo("ttft:p51<300ms"))
    assert passes["slo_passed"] is True
    assert fails["slo_passed"] is False
    assert passes["slo_limits"][0]["attainment"] == 0.5


def test_one_request_in_a_thousand_may_miss_a_limit_at_the_999th_permille() -> None:
    """999 of 1,000 requests sent finish, which is a share of 0.999; 99.9 / 100 rounds above it."""
    for num_refused, passed in ((1, True), (2, False)):
        run = make_run(num_requests=1000, num_refused=num_refused)
        assert summarise(run, parse_slo("e2e:p99.9<10000s"))["slo_passed"] is passed


def test_itl_percentile_limits_are_judged_on_pooled_gaps() -> None:
    """Four gaps of six lie within 200 ms, so p66 passes and p67 fails."""
    assert summarise(pencil_run(), parse_slo("itl:p66<200ms"))["slo_passed"] is True
    assert summarise(pencil_run(), parse_slo("itl:p67<200ms"))["slo_passed"] is False
    assert summarise(pencil_run(), parse_slo("itl:p75<801ms"))["slo_passed"] is True


def test_every_limit_of_a_metric_is_to_be_met_and_every_percentile_to_pass() -> None:
    """0.1, 0.4 and 0.2 s and one refused: a quarter keeps 150 ms, and half keeps 300 ms."""
    summary = summarise(pencil_run(), parse_slo("ttft:p25<150ms ttft:p99<300ms"))
    assert [limit["attainment"] for limit in summary["slo_limits"]] == [0.25, 0.5]
    assert [limit["passed"] for limit in summary["slo_limits"]] == [True, False]
    assert summary["slo_attainment_by_metric"] == {"ttft": 0.25}
    assert summary["slo_passed"] is False


def test_gaps_within_a_limit_are_told_apart_geometrically_inside_a_bin() -> None:
    """Of a bin from 1 to 100 s half of the gaps are within 10 s."""
    run = pencil_run(itl_bins_s=(1.0, 100.0), itl_counts=(8,))
    assert gap_share_met(run, columns_of(run), 10.0) == pytest.approx(0.5)


def test_itl_percentile_limits_are_missed_by_requests_that_have_no_gaps_to_judge() -> None:
    """One of four is refused, so three quarters at most meet any limit; one token has no gap."""
    assert summarise(pencil_run(), parse_slo("itl:p76<801ms"))["slo_passed"] is False
    run = pencil_run(itl_counts=(0, 0, 0))
    assert summarise(run, parse_slo("itl:p75<1ms"))["slo_passed"] is True
    late = summarise(pencil_run(), parse_slo("itl:p76<801ms"), warmup_s=2.0)
    assert late["slo_passed"] is True, "who is refused in the warm-up is none of the requests sent"
    nobody = replace(run, requests=run.requests.with_columns(pl.lit("refused").alias("status")))
    assert summarise(nobody, parse_slo("itl:p1<801ms"))["slo_passed"] is False


def test_gap_percentiles_are_within_a_bin_of_the_exact_ones() -> None:
    """Percentiles of the histogram are within one per cent of those of the gaps themselves."""
    rng = np.random.Generator(np.random.PCG64(5))
    gaps = 0.02 * np.exp(0.5 * np.sqrt(-2 * np.log(rng.random(50_000))))
    counts = tuple(int(one) for one in np.histogram(gaps, ITL_EDGES_S)[0])
    run = pencil_run(itl_bins_s=ITL_EDGES_S, itl_counts=counts)
    for percentile in (1, 50, 90, 99, 100):
        exact = float(np.percentile(gaps, percentile))
        assert gap_percentile_s(run, percentile) == pytest.approx(exact, rel=0.011)


def test_gaps_that_are_all_alike_do_not_deviate_whatever_rounding_leaves() -> None:
    """Three gaps of 0.1 s, whose mean square is less than the square of their mean."""
    sums = {"itl_sum_s": 0.1 + 0.1 + 0.1, "itl_sum_square_s2": 0.1 * 0.1 + 0.1 * 0.1 + 0.1 * 0.1}
    assert sums["itl_sum_square_s2"] / 3 < (sums["itl_sum_s"] / 3) ** 2
    assert summarise(pencil_run(itl_counts=(3, 0, 0), **sums))["std_itl_ms"] == 0.0


def test_warm_up_cuts_latencies_and_attainment_only() -> None:
    """Requests of the warm-up leave latencies and attainment; throughput stays whole."""
    whole = summarise(pencil_run(), SLO)
    by_time = summarise(pencil_run(), SLO, warmup_s=0.2)
    by_count = summarise(pencil_run(), SLO, warmup_requests=1)
    assert by_time["num_measured"] == by_count["num_measured"] == 3
    assert by_time["mean_ttft_ms"] == by_count["mean_ttft_ms"] == 300.0
    assert by_time["mean_wait_ms"] == by_count["mean_wait_ms"] == pytest.approx(150.0)
    assert by_time["slo_attainment"] == 0.0
    for key in ("duration", "output_throughput", "request_goodput", "total_gpu_energy"):
        assert by_time[key] == whole[key]


def test_the_warm_up_is_told_as_it_was_given() -> None:
    """Rounded like a figure, it could count a request that the summary did not."""
    third_s = 0.3333333333333333
    assert summarise(pencil_run(), SLO, warmup_s=third_s)["warmup_s"] == third_s


@pytest.mark.parametrize("warmup", [{"warmup_s": 9.0}, {"warmup_requests": 4}])
def test_a_warm_up_that_leaves_nothing_is_refused(warmup: dict[str, Any]) -> None:
    """A warm-up longer than the run is an error, not an empty summary."""
    with pytest.raises(InputError, match="leaves none of the 4 requests") as caught:
        summarise(pencil_run(), SLO, **warmup)
    given = {"warmup_s": 0.0, "warmup_requests": 0} | warmup
    for name, value in given.items():
        assert f"measure.{name} is {value}" in str(caught.value)


def test_rows_out_of_arrival_order_change_no_figure() -> None:
    """A table sorted otherwise gives the same summary."""
    run = make_run("helios", num_refused=3)
    mixed = replace(run, requests=run.requests.sort("output_tokens", "request_id"))
    a, b = summarise(run, SLO, warmup_requests=7), summarise(mixed, SLO, warmup_requests=7)
    assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-12)
    drop = {"perplexity", "intervals"}
    assert {k: v for k, v in a.items() if k not in drop} == {
        k: v for k, v in b.items() if k not in drop
    }
    assert a["intervals"] == b["intervals"]


def test_no_row_is_gone_through_one_by_one() -> None:
    """A hundred times the requests are summarised by as many lines of Python."""
    few, many = (
        lines_of(lambda run=run: summarise(run, SLO))
        for run in (
            make_run(num_requests=1_000, rate_per_s=4.0, queueing=False),
            make_run(num_requests=100_000, rate_per_s=400.0, queueing=False),
        )
    )
    assert many < 2 * few


def md1_run(rho: float, seed: int, num_requests: int = 4000) -> RunData:
    """A single server with unit service and Poisson arrivals at load rho."""
    run = make_run(num_requests=num_requests)
    rng = np.random.Generator(np.random.PCG64(seed))
    arrival = np.cumsum(-np.log1p(-rng.random(num_requests))) / rho
    admitted = fifo_admission(arrival, np.ones(num_requests), 1)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", admitted),
        pl.Series("first_token_s", admitted),
        pl.Series("finished_s", admitted + 1.0),
    )
    return replace(
        run, requests=requests, totals=replace(run.totals, end_s=float(admitted[-1]) + 1.0)
    )


def test_what_is_refused_does_not_help_a_backlog_to_drain() -> None:
    """Of 100 requests in 100 s every second is refused; of the others ten finish, one in 10 s."""
    run = make_run(num_requests=100)
    number = np.arange(100)
    refused = number % 2 == 1
    done = (number % 20 == 0) & ~refused
    # Ten to come, one in ten seconds: what is left then takes as long as all of it before.
    requests = run.requests.with_columns(
        pl.Series("arrival_s", number.astype(float)),
        pl.Series("admitted_s", np.where(done, number.astype(float), np.nan)).fill_nan(None),
        pl.Series("first_token_s", np.where(done, number + 0.5, np.nan)).fill_nan(None),
        pl.Series("finished_s", np.where(done, number + 1.0, np.nan)).fill_nan(None),
        pl.Series("status", np.where(refused, "refused", np.where(done, "finished", "waiting"))),
    )
    run = replace(run, requests=requests)
    alone = replace(run, requests=requests.filter(pl.col("status") != "refused"))
    found, wanted = (saturation_of(columns_of(one), 100.0).drain_s for one in (run, alone))
    assert wanted > 1000.0
    assert found == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("rho", "verdict"), [(0.5, "stable"), (0.95, "backlogged"), (1.2, "overloaded")]
)
def test_saturation_of_a_single_server_queue(rho: float, verdict: str) -> None:
    """An M/D/1 queue is stable at 0.5, backlogged at 0.95 and overloaded at 1.2, on any seed."""
    for seed in range(5):
        run = md1_run(rho, seed)
        assert saturation_of(columns_of(run), run.totals.end_s).saturation == verdict


def test_saturation_verdicts_hold_on_short_runs() -> None:
    """With 200 requests at load 0.8 a queue is called overloaded at most once in fifty seeds."""
    runs = [md1_run(0.8, seed, 200) for seed in range(50)]
    verdicts = [saturation_of(columns_of(run), run.totals.end_s).saturation for run in runs]
    assert verdicts.count("overloaded") <= 1


def test_overload_is_seen_when_the_run_is_cut_at_the_last_arrival() -> None:
    """A run that ends with its arrivals is judged by the drain that its backlog would take."""
    run = md1_run(1.2, 1)
    end_s = float(run.requests["arrival_s"].max())  # type: ignore[arg-type]
    late = pl.col("finished_s") > end_s
    cut = run.requests.with_columns(
        status=pl.when(late).then(pl.lit("waiting")).otherwise("status"),
        finished_s=pl.when(~late).then("finished_s"),
        admitted_s=pl.when(pl.col("admitted_s") <= end_s).then("admitted_s"),
    )
    verdict = saturation_of(columns_of(replace(run, requests=cut)), end_s)
    whole = saturation_of(columns_of(run), run.totals.end_s)
    assert verdict.saturation == "overloaded"
    assert verdict.drain_s == pytest.approx(whole.drain_s, rel=0.1)


def test_a_backlog_that_levels_off_is_still_overload() -> None:
    """Arrivals beyond capacity that slow down later, to just what is served, leave an overload."""
    run = make_run(num_requests=3000)
    arrival = np.concatenate([np.arange(2000) / 2.0, 1000.0 + np.arange(1000)])
    admitted = fifo_admission(arrival, np.ones(3000), 1)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", admitted),
        pl.Series("first_token_s", admitted),
        pl.Series("finished_s", admitted + 1.0),
    )
    columns = columns_of(replace(run, requests=requests))
    assert saturation_of(columns, 3000.0).saturation == "overloaded"


def test_long_answers_without_a_queue_are_stable() -> None:
    """A run of answers half as long as itself ramps up and drains slowly, yet nothing waits."""
    run = make_run(num_requests=400, rate_per_s=4.0)
    arrival = run.requests["arrival_s"]
    requests = run.requests.with_columns(
        admitted_s=arrival, first_token_s=arrival, finished_s=arrival + 50.0
    )
    columns = columns_of(replace(run, requests=requests))
    assert saturation_of(columns, float(columns.finished_s.max())).saturation == "stable"


@pytest.mark.parametrize(("burst", "verdict"), [(1, "overloaded"), (10, "backlogged")])
def test_arrivals_in_bursts_may_take_longer_to_drain(burst: int, verdict: str) -> None:
    """1,600 answers of 1.07 s take 7 % longer than their arrivals do.

    One a second has a variation below 1, and 5 % of the span are its luck; ten at once every ten
    seconds have 3, and three times the luck, up to 10 %.
    """
    run = make_run(num_requests=1600)
    arrival = np.arange(1600) // burst * float(burst)
    admitted = fifo_admission(arrival, np.full(1600, 1.07), 1)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", admitted),
        pl.Series("first_token_s", admitted),
        pl.Series("finished_s", admitted + 1.07),
    )
    columns = columns_of(replace(run, requests=requests))
    assert saturation_of(columns, float(columns.finished_s.max())).saturation == verdict


@pytest.mark.parametrize(("wait_s", "verdict"), [(0.9, "stable"), (1.1, "backlogged")])
def test_a_backlog_is_told_where_waiting_takes_longer_than_being_served(
    wait_s: float, verdict: str
) -> None:
    """Ten answers of a second each, whatever was waited for."""
    run = make_run(num_requests=10)
    arrival = np.arange(10.0)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", arrival + wait_s),
        pl.Series("first_token_s", arrival + wait_s),
        pl.Series("finished_s", arrival + wait_s + 1.0),
    )
    assert saturation_of(columns_of(replace(run, requests=requests)), 12.0).saturation == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.2, "backlogged"), (0.25, "overloaded")])
def test_growth_within_the_swings_of_a_backlog_is_no_overload(share: float, verdict: str) -> None:
    """In every second of ten slices requests wait longer, two seconds for each slice before.

    In the others they wait a share of a second for each. It grows by 36 requests in 1,000 s
    either way, with t values of 2.13 and 2.37 about the bound of 2.31; it drains for a minute.
    """
    run = make_run(num_requests=200)
    arrival = np.arange(200.0)
    place = arrival // 20
    left = np.minimum(arrival + place * np.where(place % 2 == 1, 2.0, share), 20.0 * (place + 1))
    left[-1] = 260.0
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", left),
        pl.Series("first_token_s", left),
        pl.Series("finished_s", left),
    )
    found = saturation_of(columns_of(replace(run, requests=requests)), 260.0)
    assert (found.saturation, found.drain_s) == (verdict, 61.0)
    assert found.growth_per_s == pytest.approx(0.0365, rel=0.05)


def test_who_is_never_admitted_has_waited_until_the_end() -> None:
    """Nine answers of a second come at once; the tenth request waits ninety seconds for nothing."""
    run = make_run(num_requests=10)
    arrival = np.arange(10.0)
    served = np.where(arrival < 9.0, arrival, math.nan)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", served).fill_nan(None),
        pl.Series("first_token_s", served).fill_nan(None),
        pl.Series("finished_s", served + 1.0).fill_nan(None),
        pl.Series("status", ["finished"] * 9 + ["waiting"]),
    )
    columns = columns_of(replace(run, requests=requests))
    verdict = saturation_of(columns, 99.0)
    assert verdict.saturation == "backlogged"
    # Five left in the last 94.5 s: at this pace the tenth goes 18.9 s after the end.
    assert verdict.drain_s == pytest.approx(90.0 + 18.9)
    assert saturation_of(columns, 10.0).saturation == "stable"


def test_refused_requests_leave_as_they_arrive() -> None:
    """Every second request is refused and the others meet nobody: nothing piles up."""
    run = make_run(num_requests=60)
    arrival, refused = np.arange(60.0), np.arange(60) % 2 == 1
    served = np.where(refused, math.nan, arrival)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", served).fill_nan(None),
        pl.Series("first_token_s", served).fill_nan(None),
        pl.Series("finished_s", served + 0.5).fill_nan(None),
        pl.Series("status", np.where(refused, "refused", "finished")),
    )
    run = replace(run, requests=requests, totals=replace(run.totals, end_s=60.0))
    verdict = saturation_of(columns_of(run), 60.0)
    assert (verdict.saturation, verdict.drain_s) == ("stable", 0.0)
    assert summarise(run)["max_concurrent_requests"] == 1


def test_who_leaves_as_another_arrives_is_not_in_the_system_with_it() -> None:
    """Answers of a second to requests a second apart."""
    run = make_run(num_requests=4)
    arrival = np.arange(4.0)
    requests = run.requests.with_columns(
        pl.Series("arrival_s", arrival),
        pl.Series("admitted_s", arrival),
        pl.Series("first_token_s", arrival),
        pl.Series("finished_s", arrival + 1.0),
    )
    assert summarise(replace(run, requests=requests))["max_concurrent_requests"] == 1


def test_a_closed_loop_is_never_overloaded() -> None:
    """Users who wait for their answers limit their own backlog."""
    run = md1_run(1.2, 1)
    assert saturation_of(columns_of(run), run.totals.end_s, closed_loop=True).saturation == (
        "backlogged"
    )


def test_batch_means_cover_the_mean_of_a_correlated_series() -> None:
    """Intervals of an autocorrelated series hold its true mean about 95 times in 100."""
    rng = np.random.Generator(np.random.PCG64(3))
    held = 0
    for _ in range(200):
        noise = rng.random(4000) - 0.5
        series = np.convolve(noise, 0.8 ** np.arange(40), "valid")
        interval = batch_interval(series)
        assert interval is not None
        held += interval["low"] <= 0.0 <= interval["high"]
    assert 180 <= held <= 199


def test_an_interval_of_twenty_batches_by_pencil() -> None:
    """Means of 0 and 2 by turns deviate by 1.026; t of 19 degrees of freedom is 2.093."""
    interval = batch_interval(np.array([0.5, -0.5, 2.5, 1.5] * 10))
    assert interval is not None
    half = 2.093024 * math.sqrt(20 / 19) / math.sqrt(20)
    assert interval["mean"] == pytest.approx(1.0)
    assert interval["low"] == pytest.approx(1.0 - half)
    assert interval["high"] == pytest.approx(1.0 + half)


def test_intervals_are_of_measured_requests_and_of_breaches_that_a_deeper_exit_satisfies() -> None:
    """After a warm-up all requests have 8 layers a token, and 2 of 10 tokens, not 5, breach."""
    warm = np.arange(80) < 40
    run = make_run(num_requests=80)
    requests = run.requests.with_columns(
        pl.lit(10).alias("generated_tokens"),
        pl.lit(10).alias("decoded_tokens"),
        pl.lit(5).alias("breaches"),
        pl.Series("breaches_relative", np.where(warm, 4, 2)),
        pl.Series("executed_layers", np.where(warm, 20, 80)),
    )
    found = summarise(conformed(replace(run, requests=requests)), warmup_requests=40)["intervals"]
    for key, value in (("mean_executed_layers", 8.0), ("breach_rate", 0.2)):
        assert [found[key][part] for part in ("low", "mean", "high")] == [value] * 3


def test_intervals_of_latencies_are_of_the_requests_that_their_means_are_of() -> None:
    """A warm-up, and for the TPOT requests of one token, are left out of both."""
    run = make_run(num_requests=400, num_refused=20)
    assert (run.requests["generated_tokens"] == 1).sum() > 0
    summary = summarise(run, warmup_requests=100)
    for key in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms"):
        assert summary["intervals"][key]["mean"] == pytest.approx(summary[key])


def test_batch_interval_of_a_ratio_is_centred_on_the_ratio_of_sums() -> None:
    """With a denominator the figure is the sum over the sum, and too few values give none."""
    top, below = np.arange(1.0, 101.0), np.arange(100.0, 0.0, -1.0)
    interval = batch_interval(top, below)
    assert interval is not None
    assert interval["mean"] == pytest.approx(top.sum() / below.sum())
    assert batch_interval(np.ones(39)) is None
    assert batch_interval(np.ones(100), np.zeros(100)) is None


def test_aggregate_gives_student_intervals_over_seeds() -> None:
    """Three replications give mean, deviation and the t interval of each figure."""
    summaries = [
        {"policy": "vanilla", "schema_version": 1, "seed": seed, "a": value, "b": {"c": value}}
        for seed, value in enumerate((1.0, 2.0, 3.0))
    ]
    figures = aggregate([*summaries, {**summaries[0], "seed": 9, "a": None}])["figures"]
    assert figures["a"]["mean"] == 2.0
    assert (figures["a"]["least"], figures["a"]["most"]) == (1.0, 3.0)
    assert figures["a"]["num"] == 3
    assert figures["a"]["values"] == [1.0, 2.0, 3.0, None]
    assert figures["a"]["high"] == pytest.approx(2.0 + 4.302652729911 / math.sqrt(3))
    assert figures["b.c"]["num"] == 4


def test_intervals_over_seeds_hold_nothing_impossible() -> None:
    """Counts are not negative and shares within 0 and 1; a slope of the backlog has a sign."""
    names = ("num_preemptions", "agreement", "mean_ttft_ms", "backlog_growth_per_s", "mine")
    summaries = [
        {"policy": "vanilla", "schema_version": 1, "seed": seed}
        | dict.fromkeys(names, value)
        | {"slo_attainment_by_metric": {"ttft": value}, "perplexity": 1.0 + value}
        for seed, value in enumerate((0.0, 0.9, 1.0))
    ]
    figures = aggregate(summaries)["figures"]
    assert (figures["agreement"]["low"], figures["agreement"]["high"]) == (0.0, 1.0)
    by_metric = figures["slo_attainment_by_metric.ttft"]
    assert (by_metric["low"], by_metric["high"]) == (0.0, 1.0)
    assert figures["perplexity"]["low"] == 1.0
    for name in ("num_preemptions", "mean_ttft_ms"):
        assert figures[name]["low"] == 0.0
        assert figures[name]["high"] > 1.0
    for name in ("backlog_growth_per_s", "mine"):
        assert figures[name]["low"] < 0.0


def test_paired_shares_differ_by_no_more_than_the_whole() -> None:
    """A policy that meets nearly every limit against one that meets nearly none: within 100 %."""
    slow, fast = make_run("vanilla", tpot_s=0.2), make_run("helios", tpot_s=0.01)
    slo = parse_slo("tpot:100")
    # A single batch in which the difference is smaller widens the interval beyond the whole.
    few = pl.col("request_id") < 19
    fast = replace(
        fast,
        requests=fast.requests.with_columns(
            finished_s=pl.when(few).then(slow.requests["finished_s"]).otherwise("finished_s")
        ),
    )
    rows = compare([slow, fast], [summarise(run, slo) for run in (slow, fast)])
    difference = next(row for row in rows if row.key == "slo_attainment").differences[1]
    assert difference is not None
    assert 90.0 < difference.mean < difference.high
    assert difference.high == 100.0


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"seed": 0}, "different seeds"),
        ({"policy": "helios"}, "policy differs"),
        ({"schema_version": 2}, "schema_version differs"),
    ],
)
def test_aggregate_refuses_what_are_no_replications(second: dict[str, Any], says: str) -> None:
    """Summaries of one seed, of several policies or of several schemas are no replications."""
    first = {"policy": "vanilla", "schema_version": 1, "seed": 0}
    with pytest.raises(InputError, match=says):
        aggregate([first, {**first, "seed": 1, **second}])
    with pytest.raises(InputError, match="nothing to aggregate"):
        aggregate([])


def test_comparison_pairs_requests_and_marks_the_best() -> None:
    """A policy that is faster on every request has a paired difference below zero and is marked."""
    slow, fast = make_run("vanilla", tpot_s=0.02), make_run("helios", tpot_s=0.01)
    rows = {row.key: row for row in compare([slow, fast])}
    tpot = rows["mean_tpot_ms"]
    assert tpot.best == (1,)
    assert tpot.ratios[1] == pytest.approx(0.5)
    difference = tpot.differences[1]
    assert difference is not None
    assert difference.mean == pytest.approx(-10.0, rel=0.05)
    assert difference.low < difference.mean < difference.high < 0.0
    assert tpot.differences[0] is None
    assert rows["num_evaluations"].best == ()
    assert rows["energy_per_output_token"].unit == "J"


def evenly(num_requests: int, **columns: np.ndarray) -> RunData:
    """Requests a second apart: first token after 0.1 s, then 10 more within 0.2 s."""
    run = make_run(num_requests=num_requests)
    arrival = np.arange(float(num_requests))
    usual = {
        "arrival_s": arrival,
        "admitted_s": arrival,
        "first_token_s": arrival + 0.1,
        "finished_s": arrival + 0.3,
        "output_tokens": np.full(num_requests, 11),
        "generated_tokens": np.full(num_requests, 11),
    }
    return conformed(replace(run, requests=run.requests.with_columns(**usual | columns)))


def differences(first: RunData, second: RunData, **measure: Any) -> dict[str, tuple[float, ...]]:
    """Low, mean and high of each paired difference."""
    runs = [first, second]
    rows = compare(runs, [summarise(run, **measure) for run in runs])
    found = {row.key: row.differences[1] for row in rows}
    return {key: (one.low, one.mean, one.high) for key, one in found.items() if one is not None}


def test_a_warm_up_is_left_out_of_paired_differences() -> None:
    """Of 100 requests the first 50 are slower in the second run, and none of them is measured."""
    first = evenly(100)
    warm = np.where(np.arange(100) < 50, 1.0, 0.0)
    second = evenly(
        100,
        first_token_s=first.requests["first_token_s"].to_numpy() + warm,
        finished_s=first.requests["finished_s"].to_numpy() + 2.0 * warm,
    )
    whole = differences(first, second, slo=parse_slo("ttft:500"))
    assert whole["mean_ttft_ms"][1] == pytest.approx(500.0)
    assert whole["slo_attainment"][1] == pytest.approx(-50.0)
    measured = differences(first, second, slo=parse_slo("ttft:500"), warmup_requests=50)
    assert measured == dict.fromkeys(whole, (0.0, 0.0, 0.0))


def test_a_request_of_one_token_is_no_pair_of_tpot() -> None:
    """Ten gaps take 0.1 s longer; every second request has none."""
    tokens = np.where(np.arange(100) % 2 == 1, 1, 11)
    first, second = (
        evenly(
            100,
            output_tokens=tokens,
            generated_tokens=tokens,
            finished_s=np.arange(100.0) + 0.1 + np.where(tokens > 1, decode_s, 0.0),
        )
        for decode_s in (0.2, 0.3)
    )
    assert differences(first, second)["mean_tpot_ms"] == pytest.approx((10.0,) * 3)


def test_pairs_are_batched_by_arrival_whatever_their_numbers() -> None:
    """Slower by 0 and 20 ms by turns: two neighbours in the queue always by 10 ms on average."""
    place = np.arange(40)
    numbers = place // 2 + 20 * (place % 2)
    first, second = (
        evenly(40, request_id=numbers, first_token_s=1.001 * place + 0.1 + slower_s)
        for slower_s in (0.0, 0.02 * (place % 2))
    )
    assert differences(first, second)["mean_ttft_ms"] == pytest.approx((10.0,) * 3)


def test_figures_are_compared_in_the_units_of_their_rows() -> None:
    """1,500 mJ a token are 1.5 J, and a quarter is 25 %."""
    shares = ("slo_attainment", "agreement", "breach_rate")
    rows = comparison_rows([{"energy_per_output_token": 1500.0} | dict.fromkeys(shares, 0.25)])
    assert {row.key: (*row.values, row.unit) for row in rows} == {
        "energy_per_output_token": (1.5, "J"),
        **dict.fromkeys(shares, (25.0, "%")),
    }


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((100.0, 99.5, 80.0), (0,)),
        ((80.0, 99.95, 100.0), (1, 2)),
        ((100.0, 99.95), ()),
        ((100.0, None), ()),
    ],
)
def test_the_best_shares_its_place_with_what_is_within_a_thousandth_of_it(
    values: tuple[float | None, ...], best: tuple[int, ...]
) -> None:
    (row,) = comparison_rows([{"max_batch_size_supported": value} for value in values])
    assert row.best == best


def test_the_better_direction_of_every_row_of_a_comparison() -> None:
    """Rates, shares met and room are better higher; neither way is better of what was done."""
    better: dict[str | None, set[str]] = {"higher": set(), "lower": set(), None: set()}
    for key, *_, direction in COMPARED:
        better[direction].add(key)
    assert better["higher"] == {
        "output_throughput",
        "request_throughput",
        "request_goodput",
        "slo_attainment",
        "max_batch_size_supported",
        "agreement",
    }
    assert better[None] == {
        "saturation",
        "mean_batch_size",
        "num_evaluations",
        "num_switches",
        "num_loads",
        "switch_time_s",
    }


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            make_run(num_requests=300),
            r"^vanilla \(2\) holds 300 requests and vanilla holds 400 requests;",
        ),
        (make_run(num_requests=1), "holds 1 request and"),
        (make_run(seed=2), "different workloads"),
        (
            make_run(rate_per_s=5.0),
            r"column arrival_s of vanilla \(2\) differs from that of vanilla,",
        ),
        (make_run(schema_version=2), "schema version"),
    ],
)
def test_comparison_refuses_other_workloads(other: RunData, says: str) -> None:
    """Runs of other requests, arrivals or schema versions are refused with the reason."""
    with pytest.raises(InputError, match=says):
        compare([make_run(), other])


def test_seconds_of_serves_and_switches_have_no_best_and_no_ratio() -> None:
    """A policy that evaluates first has 0 s although it brought weights in."""
    given = [{"switch_time_s": 0.8}, {"switch_time_s": 0.0}]
    (row,) = comparison_rows(given)
    assert (row.values, row.best, row.ratios, row.better) == ((0.8, 0.0), (), (None, None), None)
    assert gain("switch_time_s", 0.4, 0.8) == 2.0


def test_perplexities_of_other_tokenizers_have_no_ratio_and_no_best() -> None:
    """They count other tokens; where nobody knows whose they are, they are taken to compare."""
    llama2, llama3 = ({"perplexity": 4.0, "tokenizers": [one]} for one in ("llama2", "llama3"))
    other = llama2 | {"perplexity": 5.0}
    (row,) = comparison_rows([llama2, other, llama3])
    assert (row.ratios, row.best) == ((1.0, 1.25, None), ())
    (row,) = comparison_rows([llama2, other])
    assert (row.ratios, row.best) == ((1.0, 1.25), (0,))
    (row,) = comparison_rows([llama2, {"perplexity": 5.0}])
    assert (row.ratios, row.best) == ((1.0, 1.25), (0,))
    # Nothing else hangs on what a token is of one's own model.
    (row,) = comparison_rows([one | {"agreement": 0.5} for one in (llama2, llama3)])[:1]
    assert (row.key, row.ratios) == ("agreement", (1.0, 1.0))


def drained(drain_s: float, **more: Any) -> dict[str, Any]:
    """100 requests of 10 tokens that arrive within 100 s, and the drain behind them."""
    duration = 100.0 + drain_s
    return {
        "saturation": "stable",
        "duration": duration,
        "drain_after_arrivals_s": drain_s,
        "num_requests": 100,
        "num_unfinished": 0,
        "completed": 100,
        "total_output_tokens": 1000,
        "output_throughput": 1000 / duration,
        "request_throughput": 100 / duration,
    } | more


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, True),
        ({"saturation": "backlogged"}, False),
        ({"num_unfinished": 1}, False),
        ({"total_output_tokens": 970}, False),
        # Of a closed loop the last arrival of the faster is earlier.
        ({"duration": 90.0}, False),
        ({"num_requests": 200}, False),
        # A burst: what was asked for in 1 s takes 9 s to answer.
        ({"duration": 10.0, "drain_after_arrivals_s": 9.0}, False),
    ],
)
def test_of_runs_that_carry_the_same_load_none_has_the_best_rate(
    changes: dict[str, Any], alike: bool
) -> None:
    """1,000 tokens in 102 s are 1.18 times the rate of 1,000 in 120 s, and the same 10 a second."""
    given = [drained(20.0), drained(2.0, **changes)]
    best = {row.key: row.best for row in comparison_rows(given)}
    assert best["output_throughput"] == (() if alike else (1,))


def test_what_the_drain_does_not_explain_makes_a_rate_the_best() -> None:
    """As long a run with 1 % fewer tokens serves fewer."""
    fewer = drained(2.0, total_output_tokens=990, output_throughput=990 / 102)
    best = {row.key: row.best for row in comparison_rows([fewer, drained(2.0)])}
    assert (best["output_throughput"], best["request_throughput"]) == ((1,), ())


def test_runs_of_the_same_load_share_the_best_rate_beside_one_that_falls_short() -> None:
    short = drained(60.0, saturation="overloaded")
    best = {row.key: row.best for row in comparison_rows([short, drained(20.0), drained(2.0)])}
    assert best["request_throughput"] == (1, 2)


def test_whatever_is_better_than_a_rate_of_the_same_load_is_level_too() -> None:
    """As long a run with 1.5 % fewer tokens serves 9.66 a second, one with 6 s of drain 9.43."""
    fewer = drained(2.0, total_output_tokens=985, output_throughput=985 / 102)
    short = drained(60.0, saturation="overloaded")
    rows = comparison_rows([drained(6.0), fewer, drained(2.0), short])
    assert {row.key: row.best for row in rows}["output_throughput"] == (0, 1, 2)


def test_equal_labels_are_numbered() -> None:
    """A label met before gets the first number that makes it one of its own."""
    assert distinct_labels(["a", "b"]) == ["a", "b"]
    assert distinct_labels(["a", "a (2)", "a", "a"]) == ["a", "a (2)", "a (3)", "a (4)"]


def test_comparison_refuses_empty_runs() -> None:
    """A run without requests, or no run at all, is refused."""
    run = make_run()
    with pytest.raises(InputError, match="empty"):
        compare([run, replace(run, requests=run.requests.clear())])
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])


def test_closed_loops_are_compared_though_arrivals_differ() -> None:
    """In a closed loop arrivals follow finishes, so only the requests have to be the same."""
    rows = compare([make_run(closed_loop=True), make_run(closed_loop=True, rate_per_s=5.0)])
    assert {row.key for row in rows} >= {"output_throughput", "mean_ttft_ms"}


@pytest.mark.parametrize(
    ("key", "better"),
    [
        ("output_throughput", 4.0),
        ("mean_batch_size", 4.0),
        ("output_tokens_per_joule", 4.0),
        ("p95_ttft_ms", 0.25),
        ("mean_wait_ms", 0.25),
        ("energy_per_request", 0.25),
        ("perplexity", 0.25),
        ("breach_rate_observed", 0.25),
    ],
)
def test_a_gain_above_one_is_better_whatever_the_figure(key: str, better: float) -> None:
    assert gain(key, 8.0, 2.0) == better
    assert gain(key, 0.0, 0.0) is None


def test_a_figure_is_found_below_keys_that_hold_dots_themselves() -> None:
    summary = {"agreement": 0.5, "exit_histogram": {"opt-1.3b": {"6": 0.75}}, "label": "a"}
    assert figure_at(summary, "agreement") == 0.5
    assert figure_at(summary, "exit_histogram.opt-1.3b.6") == 0.75
    assert figure_at(summary, "exit_histogram.opt-1.3b") is None
    assert figure_at(summary, "exit_histogram.opt-1.3b.7") is None
    assert figure_at(summary, "label") is None
