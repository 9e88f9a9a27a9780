"""Raw readings from their file: checked, and gathered into one point a configuration.

A reading is one trial; a point is the median over the trials of one configuration, with the
spread among them, which is the noise no fit can go below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import polars as pl

from calibration.measuring import readings as raw
from calibration.measuring.readings import (
    CACHED,
    CONFIGURATION,
    ENVIRONMENT_FILE,
    LEAST_DECODE_WINDOWS,
    MOST_LOST_SHARE,
    MOVED,
    POINTS_FILE,
    busy_machine,
    usual_reference_s,
)
from helios_sim.errors import InputError

CAPTURES: Final = ("capture_embed", "capture_run", "capture_tell", "capture_fill")
PREFILL_ITERATION: Final = "prefill_iteration"
"""A whole iteration that carries prompts: another cost than a whole decode iteration."""

EXIT_ITERATION: Final = "exit_iteration"
SPLIT_ITERATION: Final = "split_iteration"
LEAVING: Final = (EXIT_ITERATION, SPLIT_ITERATION)
"""Whole decode iterations whose rows leave at the exit that `layers` names; all are loaded."""

DECODE_WINDOWS: Final = ("decode_energy", "iteration_energy")
PREFILL_WINDOWS: Final = ("prefill_energy", "prefill_iteration_energy")
WHOLE_WINDOWS: Final = ("iteration_energy", "prefill_iteration_energy")
HEAD_WINDOW: Final = "head_energy"
"""Energy windows: of decodes and prompts, as stacks of layers and as whole iterations."""

_LONG_WINDOWS: Final = {
    **dict.fromkeys(DECODE_WINDOWS, LEAST_DECODE_WINDOWS),
    **dict.fromkeys(PREFILL_WINDOWS, 3),
    HEAD_WINDOW: 2,
}
"""Different long windows that a quantity is fitted to alone: it has as many unknowns."""

MOST_LENGTHENED: Final = 1.25
"""Times the quickest trial of its configuration that an undisturbed one may take.

Whatever disturbs makes times longer, and neighbours who slow memory down cost no idle share; quiet
trials of one configuration lie a few per cent apart.
"""

FIT: Final = "fit"
HELD_OUT: Final = "held-out"


def read_points(folder: Path) -> pl.DataFrame:
    """Every reading of a folder; a number that cannot be right is refused with its row."""
    frame = raw.read_points(folder)
    unknown = frame.filter(~pl.col("quantity").is_in(raw.QUANTITIES))["quantity"].to_list()
    if unknown:
        raise InputError(
            f"The quantity {unknown[0]!r} is unknown; known are {', '.join(raw.QUANTITIES)}.",
            where=str(folder / POINTS_FILE),
        )
    for column in ("seconds", "joules", "watts", "bytes"):
        value = pl.col(column).cast(pl.Float64)
        wrong = frame.with_row_index("row").filter(
            value.is_not_null() & ~(value.is_finite() & (value >= 0.0))
        )
        if wrong.height:
            first = wrong.row(0, named=True)
            raise InputError(
                f"The reading of {first['quantity']!r} has {column} = {first[column]}; a finite "
                "number of at least 0 is needed. Take the reading again.",
                where=f"{folder / POINTS_FILE}, row {first['row']}",
            )
    return frame


def read_environment(folder: Path) -> dict[str, Any]:
    """What the measurement wrote down about itself beside its readings."""
    path = folder / ENVIRONMENT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The readings' {ENVIRONMENT_FILE} cannot be read ({error}); it names the device and "
            "the models, so measure again or restore it.",
            where=str(path),
        ) from error
    if not isinstance(found, dict):
        raise InputError("An object was expected.", where=str(path))
    return found


def neighbours(readings: pl.DataFrame) -> str | None:
    """As `busy_machine` says of the timed readings."""
    timed = readings.filter(pl.col("joules").is_null() & pl.col("watts").is_null())
    return busy_machine(timed["idle_share"].drop_nulls().to_list())


def _kind() -> pl.Expr:
    """The quantity of a point: iterations that carry prompts are one of their own."""
    carries = pl.col("prompt_tokens").fill_null(0) > 0
    whole = pl.col("quantity").is_in(("iteration", "iteration_energy"))
    return (
        pl.when(whole & carries)
        .then(pl.concat_str(pl.lit("prefill_"), pl.col("quantity")))
        .otherwise(pl.col("quantity"))
    )


def sound(readings: pl.DataFrame) -> pl.DataFrame:
    """Without energy windows below the meter's minimum, where the longer ones suffice for a fit.

    Model by model and quantity by quantity: how long windows are goes by the budget of the run
    that took them, and a resumed run may have another.
    """
    short = pl.col("short_window").fill_null(False)
    kinds = readings.with_row_index("row").with_columns(kind=_kind())
    longer = kinds.filter((pl.col("joules") > 0.0) & ~short & (pl.col("purpose") == FIT))
    counts = longer.unique(subset=CONFIGURATION).group_by("model", "kind").len()
    needed = pl.col("kind").replace_strict(_LONG_WINDOWS, default=1, return_dtype=pl.UInt32)
    enough = counts.filter(pl.col("len") >= needed)
    left_out = kinds.filter(short).join(enough, on=("model", "kind"), how="semi")["row"]
    return readings.filter(~pl.int_range(pl.len()).is_in(left_out.to_list()))


def at_usual_pace(readings: pl.DataFrame) -> pl.DataFrame:
    """Timed work as long as it would take at the usual pace of the arithmetic around it.

    A processor's clock differs by the minute, and others who share the core slow both, the work a
    little more where it needs memory. Where nobody looked, as on a GPU, times are as they were
    read; so are those of bytes that are moved, which arithmetic tells nothing of.
    """
    usual_s = usual_reference_s(readings)
    if usual_s is None:
        return readings
    timed = pl.col("reference_s").is_not_null() & ~pl.col("quantity").is_in(MOVED)
    return readings.with_columns(
        seconds=pl.when(timed)
        .then(pl.col("seconds") * usual_s / pl.col("reference_s"))
        .otherwise("seconds")
    )


def gather(readings: pl.DataFrame) -> pl.DataFrame:
    """One row a configuration: medians over its trials, `num_trials` and their `noise`.

    Times are those `at_usual_pace`. Trials that lost more than a tenth of their time to other
    processes are left out where the configuration has others, and so are those that took a quarter
    longer than its quickest (where they were taken to another pace: than the middle one). `noise`
    is the median absolute deviation among the trials left over their median, null for a single one.
    `cached` says that a load may have met the system's memory in place of the disk. A configuration
    measured for both purposes counts as held out nowhere: it was fitted.
    """
    moved = pl.col("quantity").is_in(MOVED)
    deviation = (pl.col("seconds") - pl.col("seconds").median()).abs().median()
    metered = pl.col("joules").is_not_null() | pl.col("watts").is_not_null()
    readings = at_usual_pace(readings)
    disturbed = (pl.col("idle_share") > MOST_LOST_SHARE).fill_null(False) & ~metered
    same = [*CONFIGURATION, "bytes"]
    quiet = readings.filter(~disturbed).select(*same).unique()
    kept = pl.concat(
        [
            readings.filter(~disturbed),
            readings.filter(disturbed).join(quiet, on=same, how="anti", nulls_equal=True),
        ]
    )
    # Taken to another pace, a trial may also be too short, so one alone sets no measure for others.
    quickest = (
        pl.when(pl.col("reference_s").is_null().any())
        .then(pl.col("seconds").min())
        .otherwise(pl.col("seconds").quantile(0.5, "lower"))
    )
    # How long bytes take to move differs from trial to trial for reasons of its own.
    lengthened = pl.col("seconds") > MOST_LENGTHENED * quickest.over(same)
    # Of graphs alike each is captured once, and their times are no trials of one work.
    lengthened &= ~pl.col("quantity").is_in(CAPTURES)
    kept = kept.filter(~(lengthened & ~metered & ~moved).fill_null(False))
    return (
        kept.with_columns(
            moved_bytes=pl.when(moved).then(pl.col("bytes")),
            quantity=_kind(),
        )
        .group_by(*CONFIGURATION, "moved_bytes", maintain_order=True)
        .agg(
            purpose=pl.when((pl.col("purpose") == FIT).any())
            .then(pl.lit(FIT))
            .otherwise(pl.col("purpose").first()),
            seconds=pl.col("seconds").median(),
            noise=pl.when(pl.col("seconds").count() > 1).then(
                deviation / pl.col("seconds").median()
            ),
            num_trials=pl.len(),
            joules=pl.col("joules").median(),
            watts=pl.col("watts").median(),
            bytes=pl.col("bytes").max(),
            predicted_bytes=pl.col("predicted_bytes").max(),
            cached=(pl.col("note") == CACHED).any(),
        )
        .drop("moved_bytes")
    )


def standing_mode(points: pl.DataFrame, quantity: str, wanted: str) -> str:
    """The mode a profile stands for: the one wanted, where the quantity was measured in it.

    `wanted` "auto" takes graph where it was measured. A quantity measured in one mode only, as
    prefills are, is taken in that mode.
    """
    modes = points.filter((pl.col("quantity") == quantity) & pl.col("seconds").is_not_null())
    found = modes["mode"].unique().to_list()
    order = ["eager", "graph", ""] if wanted == "eager" else ["graph", "eager", ""]
    return next((mode for mode in order if mode in found), "")


def of_quantity(
    points: pl.DataFrame, quantity: str, mode: str | None = None, purpose: str | None = None
) -> pl.DataFrame:
    """The points of one quantity that have a time, in one mode and for one purpose if asked."""
    chosen = points.filter((pl.col("quantity") == quantity) & (pl.col("seconds") > 0.0))
    if mode is not None:
        chosen = chosen.filter(pl.col("mode") == mode)
    if purpose is not None:
        chosen = chosen.filter(pl.col("purpose") == purpose)
    return chosen
