"""What a real run keeps beside the tables every run has: its iterations and its exits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl
from polars.exceptions import PolarsError

from helios_sim.errors import InputError, first_line
from helios_sim.exits import ExitTraces, read_traces
from helios_sim.profile import Profile
from helios_sim.runs.records import RunData

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Names = npt.NDArray[np.str_]

ITERATIONS_FILE: Final = "iterations.parquet"
EXITS_FILE: Final = "exits.parquet"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
EXITS_ACTIVE: Final = ("solo", "wait", "rebatch")

NEEDED: Final[dict[str, Any]] = {
    "start_s": pl.Float64(),
    "seconds": pl.Float64(),
    "kind": pl.String(),
    "model": pl.String(),
    "depth": pl.Float64(),
    "rows": pl.Float64(),
    "layers": pl.Float64(),
    "context_tokens": pl.Float64(),
    "longest_context_tokens": pl.Float64(),
    "prompt_tokens": pl.Float64(),
}
"""Columns that `iterations.parquet` must have; numbers of any type are taken."""


@dataclass(frozen=True)
class Iterations:
    """Iterations of a run in order of time, a column each.

    `start_s` counts from the start of the run. `layers` is the layer at which it stopped,
    `first_layer` where it began, both counted from the embedding; `depth` what was loaded. `batch`
    counts the rows that were computed, where more were than ran. `checks` and `heads` say how often
    an exit before the loaded depth and the loaded depth itself were asked, `filled_layers` and
    `filled_rows` whose KV was filled, `pending_tokens` how many tokens were fed again, `overheads`
    how often a batch was split. `captured_graphs` and those of `captured_exits` were captured on
    the way, which run `captured_layers` and fill `captured_filled_layers`. `prompt_pairs` are the
    query-key pairs of the prompts. `seconds` run from the end of the iteration before, so that what
    the host did in between is among them, as it is among those that a profile is fitted to.
    """

    start_s: Floats
    seconds: Floats
    is_decode: Bools
    model: Names
    depth: Floats
    rows: Floats
    batch: Floats
    first_layer: Floats
    layers: Floats
    checks: Floats
    heads: Floats
    filled_layers: Floats
    filled_rows: Floats
    pending_tokens: Floats
    overheads: Floats
    captured_graphs: Floats
    captured_exits: Floats
    captured_layers: Floats
    captured_filled_layers: Floats
    context_tokens: Floats
    longest_context_tokens: Floats
    prompt_tokens: Floats
    prompt_pairs: Floats

    def __len__(self) -> int:
        return len(self.start_s)


def read_iterations(folder: Path, run: RunData) -> Iterations | None:
    """A run's recorded iterations; None where none were recorded.

    What is not recorded is worked out: where an iteration began from the embedding, exits were
    asked as the decision in force says, and skipped layers were filled. Kinds other than prefill
    and decode are left out.
    """
    path = folder / ITERATIONS_FILE
    if not path.is_file():
        return None
    frame = _read_table(path)
    frame = frame.filter(pl.col("kind").is_in([PREFILL, DECODE])).sort("start_s")
    if frame.height == 0:
        return None
    start_s, seconds, depth, rows, layers, context, longest, prompts = (
        frame[name].to_numpy() for name, kind in NEEDED.items() if kind.is_numeric()
    )
    is_decode = (frame["kind"] == DECODE).to_numpy()

    def given(name: str, otherwise: Floats) -> Floats:
        if name not in frame.columns:
            return otherwise
        try:
            return frame[name].cast(pl.Float64).fill_null(pl.Series(otherwise)).to_numpy()
        except PolarsError:
            raise InputError(
                f"The column {name} is of type {frame.schema[name]}; it must hold numbers.",
                str(path),
            ) from None

    none = np.zeros(len(start_s))
    first_layer = given("first_layer", none)
    replica = given("replica", none)
    model = frame["model"].to_numpy().astype(str)
    asks = is_decode & np.isin(_exit_modes(frame, start_s, replica, run), EXITS_ACTIVE)
    checks = none.copy()
    for name, exits in run.totals.exit_layers.items():
        for layer in exits:
            passed = (first_layer < layer) & (layer <= layers) & (layer < depth)
            checks += asks & (model == name) & passed
    return Iterations(
        start_s=start_s,
        seconds=seconds,
        is_decode=is_decode,
        model=model,
        depth=depth,
        rows=rows,
        batch=given("batch", rows),
        first_layer=first_layer,
        layers=layers,
        checks=given("checks", checks),
        heads=given("heads", (~is_decode | (layers >= depth)).astype(np.float64)),
        filled_layers=given("filled_layers", np.where(is_decode, depth - layers, 0.0)),
        filled_rows=given("filled_rows", rows),
        pending_tokens=given("pending_tokens", none),
        overheads=given("overheads", none),
        captured_graphs=given("captured_graphs", none),
        captured_exits=given("captured_exits", none),
        captured_layers=given("captured_layers", none),
        captured_filled_layers=given("captured_filled_layers", none),
        context_tokens=context,
        longest_context_tokens=longest,
        prompt_tokens=prompts,
        prompt_pairs=given("prompt_pairs", prompts * (prompts / np.maximum(rows, 1) + 1) / 2),
    )


def read_exits(folder: Path, profile: Profile, candidates: tuple[str, ...]) -> ExitTraces | None:
    """The exits of the served text at every candidate; None where they were not recorded."""
    path = folder / EXITS_FILE
    if not path.is_file():
        return None
    traces = read_traces(path, candidates)
    for name in candidates:
        expected = profile.model(name).model.exit_layers
        if traces.exit_layers[name] != expected:
            raise InputError(
                f"The exits of {name!r} were recorded after layers "
                f"{list(traces.exit_layers[name])}; the profile names {list(expected)}.",
                str(path),
            )
    return traces


def _read_table(path: Path) -> pl.DataFrame:
    """The file with its needed columns in their types and without gaps."""
    try:
        frame = pl.read_parquet(path)
    except (PolarsError, OSError) as error:
        raise InputError(
            f"The file is not a Parquet table: {first_line(error)}.", str(path)
        ) from None
    missing = [name for name in NEEDED if name not in frame.columns]
    if missing:
        raise InputError(
            f"The columns {', '.join(missing)} are missing; a run needs {', '.join(NEEDED)}. A run "
            "that an older release served may lack some of them: serve it again.",
            str(path),
        )
    for name, kind in NEEDED.items():
        try:
            frame = frame.with_columns(frame[name].cast(kind))
        except PolarsError:
            raise InputError(
                f"The column {name} is of type {frame.schema[name]}; it must hold {kind}.",
                str(path),
            ) from None
        if frame[name].null_count():
            raise InputError(f"The column {name} has empty cells.", str(path))
    if not bool(((frame["seconds"] >= 0.0) & frame["seconds"].is_finite()).all()):
        raise InputError(
            "The column seconds holds values that are negative or not numbers.", str(path)
        )
    return frame


def _exit_modes(frame: pl.DataFrame, start_s: Floats, replica: Floats, run: RunData) -> Names:
    """How tokens left in each iteration: as recorded, or by the decision in force when it began."""
    if "exit_mode" in frame.columns:
        return frame["exit_mode"].cast(pl.String).fill_null("").to_numpy().astype(str)
    modes = np.full(len(start_s), "", dtype="<U16")
    done = run.decisions.filter(pl.col("ready_s").is_not_null()).sort("ready_s")
    for (at,), rows in done.group_by("replica"):
        mine = np.flatnonzero(replica == at)
        ready_s = rows["ready_s"].to_numpy()
        # Recorded clocks may differ in their last digits.
        place = np.searchsorted(ready_s, start_s[mine] + 1e-6, side="right") - 1
        known = place >= 0
        modes[mine[known]] = rows["exit_mode"].to_numpy().astype(str)[place[known]]
    return modes
