"""What holds a fleet back: by pencil, from what replicas do while late requests wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from helios_sim.runs.latencies import columns_of
from helios_sim.scenario import ServingSettings
from helios_sim.search.bottleneck import find_bottleneck
from helios_sim.search.points import late_while
from helios_sim.settings.slo import parse_slo
from tests.factories import make_run


def test_what_late_requests_waited_for_by_pencil() -> None:
    """Drains from 10 to 12 s, evaluates until 20 s, serves from then on.

    One request waits from 11 to 21 s and one from 25 to 27 s: of 12 s 1 is draining and 8 are
    evaluating. The third is on time, whatever the replica did.
    """
    run = make_run(num_requests=3)
    times = {
        "arrival_s": [11.0, 25.0, 30.0],
        "admitted_s": [20.0, 26.0, 30.0],
        "first_token_s": [21.0, 27.0, 30.5],
        "finished_s": [31.0, 37.0, 40.0],
    }
    requests = run.requests.with_columns(
        *(pl.Series(name, values) for name, values in times.items()),
        pl.Series("replica", [0, 0, 0], dtype=pl.Int32),
        pl.lit("finished").alias("status"),
    )
    first = run.decisions.head(1)
    decisions = pl.concat([first, first]).with_columns(
        pl.Series("time_s", [10.0, 20.0]),
        pl.Series("ready_s", [12.0, 20.0]),
        pl.Series("decision", ["evaluate", "serve"]),
        pl.lit(0, dtype=pl.Int32).alias("replica"),
    )
    totals = replace(run.totals, end_s=40.0)
    run = replace(run, requests=requests, decisions=decisions, totals=totals)
    (limit,) = parse_slo("ttft:p99<1s").limits
    spent = late_while(run, columns_of(run), limit)
    assert spent == {"evaluating": pytest.approx(8 / 12), "changing": pytest.approx(1 / 12)}
    (loose,) = parse_slo("ttft:p99<11s").limits
    assert late_while(run, columns_of(run), loose) == {}


SUMMARY: dict[str, Any] = {
    "time_shares": {"busy": 0.6, "loading": 0.0, "draining": 0.01, "evaluating": 0.04},
    "regime": {"launch": 1.0},
    "mean_kv_use": 0.1,
    "num_preemptions": 0,
    "num_requests": 100,
    "max_batch_size": 8,
    "mean_batch_size": 2.0,
    "mean_wait_ms": 900.0,
    "mean_ttft_ms": 1000.0,
}


@pytest.mark.parametrize(
    ("evaluating", "changing", "cause"),
    [(0.8, 0.1, "evaluating"), (0.2, 0.5, "loading"), (0.1, 0.1, "queueing")],
)
def test_the_cause_is_what_late_requests_waited_for_and_not_what_took_most_of_the_time(
    evaluating: float, changing: float, cause: str
) -> None:
    """A replica evaluates for a twenty-fifth of its time, in which nearly all that is late came."""
    spent = {"evaluating": evaluating, "changing": changing}
    found = find_bottleneck([SUMMARY, SUMMARY], ServingSettings(), False, [spent, {}])
    assert found.cause == cause


def test_without_a_limit_behind_a_miss_the_replica_s_own_time_says_what_holds_it_back() -> None:
    busy = {"busy": 1.0, "loading": 0.0, "draining": 0.2, "evaluating": 0.5}
    found = find_bottleneck([SUMMARY | {"time_shares": busy}], ServingSettings(), False)
    assert found.cause == "evaluating"
    assert found.evidence.startswith("a replica evaluates candidates for 50 % of the time")


SHARES = {"busy": 0.5, "idle": 0.5, "loading": 0.0, "draining": 0.0, "evaluating": 0.0}
REGIME = {"launch": 0.2, "memory": 0.7, "compute": 0.1}
CALM: dict[str, Any] = {
    "time_shares": SHARES,
    "regime": REGIME,
    "mean_kv_use": 0.2,
    "num_preemptions": 0,
    "num_requests": 100,
    "mean_wait_ms": 10.0,
    "mean_ttft_ms": 100.0,
    "mean_batch_size": 2.0,
    "max_batch_size": 4,
}
SERVING = ServingSettings(max_batch=8)


def shares(**changes: float) -> dict[str, Any]:
    return {"time_shares": SHARES | changes}


@pytest.mark.parametrize(
    ("changes", "cause", "evidence"),
    [
        pytest.param({}, "queueing", "busy only 50 %", id="nothing is short"),
        pytest.param(
            shares(loading=0.2, draining=0.2, evaluating=0.15),
            "loading",
            "evaluates candidates for 15 % of the time, and drains and loads for 40 %",
            id="loads, drains and evaluations add up to more than half",
        ),
        pytest.param(
            shares(loading=0.2, draining=0.2, evaluating=0.09),
            "queueing",
            "busy only",
            id="they add up to less than half",
        ),
        pytest.param(
            {"mean_kv_use": 0.4},
            "KV memory",
            "40 % of the KV blocks",
            id="while busy four fifths of the blocks are in use",
        ),
        pytest.param(
            {"mean_kv_use": 0.35}, "queueing", "busy only", id="while busy seven tenths are in use"
        ),
        pytest.param(
            {"num_preemptions": 2},
            "KV memory",
            "2.0 % of the requests are preempted",
            id="two in a hundred are preempted",
        ),
        pytest.param({"num_preemptions": 1}, "queueing", "busy only", id="one in a hundred is"),
        pytest.param(
            {"mean_wait_ms": 50.0, "mean_kv_use": 0.3},
            "KV memory",
            "50 % of the time to the first token",
            id="admission is blocked with places left and most blocks in use",
        ),
        pytest.param(
            {"mean_wait_ms": 50.0, "mean_kv_use": 0.2},
            "queueing",
            "busy only",
            id="requests wait with places and blocks left",
        ),
        pytest.param(
            {"mean_wait_ms": 50.0, "mean_kv_use": 0.3, "max_batch_size": 8},
            "queueing",
            "50 % of the time to the first token is waiting for a place",
            id="requests wait for a place",
        ),
        pytest.param(
            {"max_batch_size": 8}, "queueing", "busy only", id="places run out and nobody waits"
        ),
        pytest.param(
            {"mean_batch_size": 6.5, "max_batch_size": 8},
            "queueing",
            "max_batch lets 8 requests run, 6.5 do",
            id="most places are taken on average",
        ),
        pytest.param(
            shares(busy=0.85),
            "memory bandwidth",
            "70 % of that is bound by memory",
            id="the device is busy, its memory most of all",
        ),
        pytest.param(
            shares(busy=0.9) | {"regime": {"launch": 0.2, "memory": 0.3, "compute": 0.5}},
            "compute",
            "busy 90 %",
            id="the device is busy, its arithmetic most of all",
        ),
    ],
)
def test_the_rarest_cause_that_the_figures_show_is_named_with_them(
    changes: dict[str, Any], cause: str, evidence: str
) -> None:
    found = find_bottleneck([CALM | changes], SERVING, tokens_are_late=False)
    assert found.cause == cause
    assert evidence in found.evidence


@pytest.mark.parametrize("places", [4, 8])
def test_where_tokens_are_late_waiting_to_be_admitted_is_not_the_reason(places: int) -> None:
    """Requests wait for blocks or for places, but what broke is the time between their tokens."""
    waiting = CALM | {"mean_wait_ms": 90.0, "mean_kv_use": 0.3, "max_batch_size": places}
    busy = waiting | shares(busy=0.9) | {"mean_kv_use": 0.5}
    assert find_bottleneck([busy], SERVING, tokens_are_late=True).cause == "memory bandwidth"
    assert find_bottleneck([busy], SERVING, tokens_are_late=False).cause != "memory bandwidth"


def test_the_figures_of_several_runs_count_by_their_mean() -> None:
    """Of two runs one preempts three in a hundred, which is more than one in a hundred."""
    runs = [CALM, CALM | {"num_preemptions": 3}]
    assert find_bottleneck(runs, SERVING, tokens_are_late=False).cause == "KV memory"
    runs = [CALM, CALM | {"num_preemptions": 2}]
    assert find_bottleneck(runs, SERVING, tokens_are_late=False).cause == "queueing"
