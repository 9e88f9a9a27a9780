"""What holds a fleet back: by pencil, from what replicas do while late requests wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from helios_sim.metrics import columns_of
from helios_sim.scenario import ServingSettings
from helios_sim.search.bottleneck import find_bottleneck
from helios_sim.search.points import late_while
from helios_sim.slo import parse_slo
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
