"""Timelines and decisions, thinned out to what a figure of a page's width can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl

from helios_sim.wording import number

MAX_TIMELINE_POINTS: Final = 400
MAX_MARKERS: Final = 800


def is_thinned(timeline: pl.DataFrame) -> bool:
    """Whether a figure shows averages over a timeline's intervals and not the intervals."""
    return timeline["time_s"].n_unique() > MAX_TIMELINE_POINTS


def thinned(timeline: pl.DataFrame) -> pl.DataFrame:
    """All replicas together in at most 400 buckets of time, which end at `time_s`.

    An interval counts in each bucket that it covers, by its time there; its tokens are spread
    evenly over it. Means over a bucket are summed over its replicas, and a replica that is there
    for half of a bucket counts half. Power is null where a replica's is unknown. Of the waiting
    requests a bucket holds each replica's most at the end of an interval.
    """
    edges_s = _grid_s(timeline)
    seconds = pl.col("seconds")
    power_known = seconds.filter(pl.col("power_w").is_not_null()).sum()
    by_replica = (
        _spread(timeline, edges_s)
        .group_by("bucket", "replica")
        .agg(
            seconds.sum(),
            (pl.col("mean_running", "kv_blocks_used", "kv_blocks") * seconds).sum(),
            (pl.col("tokens", "breaches") * pl.col("share")).sum(),
            # A replica without an end in the bucket is amid an interval, which speaks for it.
            waiting=pl.coalesce(
                pl.col("waiting").filter(pl.col("ends_here")).max(), pl.col("waiting").max()
            ),
            power_w=pl.when(power_known > 0.0).then(
                (pl.col("power_w") * seconds).sum() / power_known
            ),
        )
    )
    return (
        by_replica.group_by("bucket")
        .agg(
            pl.col("mean_running", "waiting").sum(),
            power_w=pl.when(pl.col("power_w").is_not_null().all()).then(
                (pl.col("power_w") * seconds).sum()
            ),
            kv_use=pl.col("kv_blocks_used").sum() / pl.col("kv_blocks").sum(),
            breach_share=pl.when(pl.col("tokens").sum() > 0.0).then(
                pl.col("breaches").sum() / pl.col("tokens").sum()
            ),
        )
        .join(
            pl.DataFrame(
                {
                    "bucket": np.arange(len(edges_s) - 1),
                    "start_s": edges_s[:-1],
                    "time_s": edges_s[1:],
                }
            ),
            on="bucket",
        )
        .with_columns(
            pl.col("mean_running", "power_w") / (pl.col("time_s") - pl.col("start_s")),
        )
        .sort("bucket")
    )


def _grid_s(timeline: pl.DataFrame) -> np.ndarray:
    """Edges of buckets for all replicas: every interval's end, or equal steps where too many."""
    ends_s = timeline["time_s"].unique().sort().to_numpy()
    ends_s = ends_s[ends_s > 0.0]
    if len(ends_s) > MAX_TIMELINE_POINTS:
        return np.linspace(0.0, ends_s[-1], MAX_TIMELINE_POINTS + 1)
    return np.append(0.0, ends_s)


def _spread(timeline: pl.DataFrame, edges_s: np.ndarray) -> pl.DataFrame:
    """A row for each bucket that an interval covers, with its time and its share there."""
    rows = timeline.filter(pl.col("time_s") > 0.0).sort("replica", "time_s")
    ends_s = rows["time_s"].to_numpy()
    # The rounding of a length does not reach back into the interval before.
    starts_s = rows.select(
        pl.max_horizontal(
            pl.col("time_s") - pl.col("interval_s"),
            pl.col("time_s").shift(1, fill_value=0.0).over("replica"),
        )
    )["time_s"].to_numpy()
    firsts = np.searchsorted(edges_s, starts_s, "right") - 1
    lasts = np.searchsorted(edges_s, ends_s, "left") - 1
    firsts = np.minimum(firsts, lasts)
    counts = lasts - firsts + 1
    which = np.repeat(np.arange(len(counts)), counts)
    buckets = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts - firsts, counts)
    starts_s, ends_s = starts_s[which], ends_s[which]
    seconds = np.minimum(ends_s, edges_s[buckets + 1]) - np.maximum(starts_s, edges_s[buckets])
    lengths_s = ends_s - starts_s
    return rows[which].with_columns(
        bucket=pl.Series(buckets),
        seconds=pl.Series(np.maximum(seconds, 0.0)),
        share=pl.Series(np.where(lengths_s > 0.0, seconds / np.maximum(lengths_s, 1e-300), 1.0)),
        ends_here=pl.Series(buckets == lasts[which]),
    )


def drawn_decisions(decisions: pl.DataFrame) -> pl.DataFrame:
    """At most 800 decisions, evenly over time, with the first and last of each kind.

    Kinds share the places equally; one that does not need its places leaves them to the others.
    """
    if decisions.height <= MAX_MARKERS:
        return decisions
    kinds = sorted(
        decisions.sort("time_s", maintain_order=True).partition_by("decision"),
        key=lambda rows: rows.height,
    )
    kept: list[pl.DataFrame] = []
    places = MAX_MARKERS
    for num_before, rows in enumerate(kinds):
        own = places // (len(kinds) - num_before)
        kept.append(rows if rows.height <= own else _evenly(rows, own))
        places -= kept[-1].height
    return pl.concat(kept).sort("time_s", maintain_order=True)


def thinned_decisions(tables: Sequence[pl.DataFrame]) -> str:
    """How many decisions a figure shows of how many; empty where it shows all."""
    num = sum(decisions.height for decisions in tables)
    num_drawn = sum(drawn_decisions(decisions).height for decisions in tables)
    if num_drawn == num:
        return ""
    return f" Of {number(num)} decisions {number(num_drawn)} are drawn, evenly over time."


def _evenly(rows: pl.DataFrame, most: int) -> pl.DataFrame:
    """The first row of each of equal steps of time, and the last row."""
    time_s = rows["time_s"].to_numpy()
    length_s = time_s[-1] - time_s[0]
    steps = (time_s - time_s[0]) / (length_s or 1.0) * (most - 1)
    steps = np.minimum(steps.astype(np.int64), most - 2)
    kept = np.append(True, np.diff(steps) > 0)
    kept[-1] = True
    return rows.filter(pl.Series(kept))
