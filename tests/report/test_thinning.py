"""What a figure shows of a long run adds up to what the run recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from helios_sim.report.figures import timeline_figure
from helios_sim.report.page import render
from helios_sim.report.thinning import (
    MAX_MARKERS,
    MAX_TIMELINE_POINTS,
    drawn_decisions,
    thinned,
)
from helios_sim.runs.columns import TIMELINE_COLUMNS, conform
from helios_sim.runs.metrics import summarise
from tests.factories import make_run


def replica_timeline(
    replica: int, ends_s: Sequence[float], power_w: float | Sequence[float | None]
) -> pl.DataFrame:
    """A replica whose intervals end at these times, with a token and a running request a second."""
    length_s = np.diff([0.0, *ends_s])
    num = len(length_s)
    return conform(
        pl.DataFrame(
            {
                "replica": [replica] * num,
                "time_s": ends_s,
                "interval_s": length_s,
                "mean_running": [1.0] * num,
                "waiting": range(num),
                "kv_blocks_used": [10 * (replica + 1)] * num,
                "kv_blocks": [100] * num,
                "model": ["opt-6.7b"] * num,
                "depth": [32] * num,
                "state": ["serving"] * num,
                "power_w": power_w if isinstance(power_w, Sequence) else [power_w] * num,
                "tokens": [1000] * num,
                "breaches": [100] * num,
            },
            schema_overrides={"power_w": pl.Float64},
        ),
        TIMELINE_COLUMNS,
        "timeline",
    )


@pytest.mark.parametrize("num_ends", [7, 3000])
def test_replicas_with_boundaries_of_their_own_add_up_at_every_moment(num_ends: int) -> None:
    """Ten idle GPUs of 55 W draw 550 W in each bucket, though few intervals end in any of them."""
    rng = np.random.Generator(np.random.PCG64(1))
    timeline = pl.concat(
        replica_timeline(
            replica, [*np.sort(100.0 * rng.random(num_ends if replica < 3 else 2)), 100.0], 55.0
        )
        for replica in range(10)
    )
    frame = thinned(timeline)
    assert frame.height <= MAX_TIMELINE_POINTS
    assert frame["power_w"].to_numpy() == pytest.approx(np.full(frame.height, 550.0))
    assert frame["mean_running"].to_numpy() == pytest.approx(np.full(frame.height, 10.0))
    assert frame["kv_use"].to_numpy() == pytest.approx(np.full(frame.height, 0.55))
    assert frame["breach_share"].to_numpy() == pytest.approx(np.full(frame.height, 0.1))
    assert (np.diff(frame["time_s"]) > 0.0).all()
    assert frame["start_s"].to_list() == [0.0, *frame["time_s"][:-1]]
    assert frame["time_s"][-1] == 100.0


def test_an_interval_counts_in_every_bucket_by_its_time_there() -> None:
    """Two replicas of other boundaries: the sum of a bucket is that of its moments."""
    timeline = pl.concat(
        [
            replica_timeline(0, [1.0, 4.0], [100.0, 40.0]),
            replica_timeline(1, [3.0, 4.0], [10.0, 50.0]),
        ]
    )
    frame = thinned(timeline)
    assert frame["time_s"].to_list() == [1.0, 3.0, 4.0]
    assert frame["power_w"].to_list() == pytest.approx([110.0, 50.0, 90.0])
    assert frame["waiting"].to_list() == [0, 1, 2]


def test_a_replica_that_ends_early_no_longer_counts() -> None:
    """Joules under the line are the run's, whoever stopped when, and unknown watts leave a gap."""
    timeline = pl.concat(
        [
            replica_timeline(0, np.linspace(0.0, 10.0, 1001)[1:].tolist(), 60.0),
            replica_timeline(1, [3.0, 3.33], 40.0),
        ]
    )
    frame = thinned(timeline)
    seconds = frame["time_s"] - frame["start_s"]
    assert float((frame["power_w"] * seconds).sum()) == pytest.approx(60.0 * 10 + 40.0 * 3.33)
    assert frame["power_w"][-1] == pytest.approx(60.0)
    unmetered = pl.concat([timeline, replica_timeline(2, [5.0, 10.0], [None, 20.0])])
    power_w = thinned(unmetered)["power_w"]
    assert power_w[:200].null_count() == 200
    assert power_w[200:].to_numpy() == pytest.approx(np.full(200, 80.0))


def many_decisions(num: int) -> pl.DataFrame:
    """So many kept assignments, ever fewer a second, with a few switches early and late."""
    kept = pl.DataFrame({"time_s": np.linspace(0.0, 100.0, num) ** 1.2, "decision": "keep"})
    loads = pl.DataFrame({"time_s": np.linspace(5.0, 90.0, num), "decision": "load-layers"})
    switches = pl.DataFrame({"time_s": [1.0, 2.0, 249.0], "decision": "switch"})
    return pl.concat([kept, loads, switches]).sort("time_s")


def test_marks_of_decisions_reach_from_the_first_to_the_last_of_each_lane() -> None:
    """Beyond 800 they are thinned evenly over time; a lane of few keeps them all."""
    decisions = many_decisions(5000)
    drawn = drawn_decisions(decisions)
    assert 0.9 * MAX_MARKERS < drawn.height <= MAX_MARKERS
    for (kind,), rows in decisions.group_by("decision"):
        mine = drawn.filter(pl.col("decision") == kind)["time_s"]
        assert (mine.min(), mine.max()) == (rows["time_s"].min(), rows["time_s"].max())
        if rows.height == 3:
            assert mine.len() == 3
        else:
            assert np.diff(mine).max() < 0.02 * (mine[-1] - mine[0])
    assert drawn_decisions(decisions.head(MAX_MARKERS)).height == MAX_MARKERS


def test_the_caption_says_how_many_decisions_are_drawn() -> None:
    """A reader of the lanes learns that they do not show all, and of how many."""
    run = make_run("helios")
    rows = run.decisions[[k % run.decisions.height for k in range(3000)]]
    times_s = pl.Series("time_s", np.linspace(0.0, run.totals.end_s, 3000))
    run = replace(run, decisions=rows.with_columns(times_s))
    marks = sum(
        len(trace["x"])
        for trace in timeline_figure(run, {"opt-1.3b": "@m1", "opt-6.7b": "@m2"})["data"]
        if trace.get("yaxis") == "y4"
    )
    page = render([run], [summarise(run)])
    assert f"Of 3,000 decisions {marks} are drawn, evenly over time." in page
    few = make_run("helios")
    assert "evenly over time" not in render([few], [summarise(few)])
