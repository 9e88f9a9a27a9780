"""Traces generated from ServeGen's statistics of clients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from helios_sim.errors import InputError
from helios_sim.streams import Floats, stream, whole_ns
from helios_sim.workload.arrivals import MAX_RATE_PER_S, MAX_REQUESTS, Renewal
from helios_sim.workload.trace import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    Trace,
    TraceSettings,
    nothing_in_window,
)
from helios_sim.workload.trace_tables import first_bad, parquet_table

SERVEGEN_TRACE = {
    "client_id": "whole numbers",
    "window_start_s": "whole numbers",
    "rate_rps": "numbers",
    "pattern": "text",
    "arg1": "numbers",
}
SERVEGEN_DATASET = {
    "client_id": "whole numbers",
    "window_start_s": "whole numbers",
    "field": "text",
    "value": "numbers",
    "prob": "numbers",
}

# Shapes of coefficients of variation of about 50 down to 0.01, as for other arrivals: beyond,
# nearly all intervals are 0 and sampling does not end.
_GAMMA_SHAPES = (4e-4, 1e4)
_WEIBULL_SHAPES = (0.15, 130.0)

_ONE_WINDOW_S = 600.0
"""Seconds of a window in a trace that holds one, as in ServeGen's own data."""


@dataclass(frozen=True)
class _Histogram:
    """Token counts and their cumulative probabilities."""

    tokens: NDArray[np.int32]
    cumulative: Floats

    def sample(self, uniforms: Floats) -> NDArray[np.int32]:
        place = np.searchsorted(self.cumulative, uniforms * self.cumulative[-1], side="right")
        sampled: NDArray[np.int32] = self.tokens[np.minimum(place, len(self.tokens) - 1)]
        return sampled


def read_servegen(path: Path, settings: TraceSettings, seed: int) -> Trace:
    """Sample ServeGen's clients (arXiv 2505.09999) over the windows that are asked for.

    Each client and window has streams of its own, so a window holds the same requests whichever
    others are read. The file's shape is kept and the intervals are scaled to its rate, since the
    fitted scales do not always give the recorded rate. Prompts and outputs are independent: the
    file holds their marginal distributions only.
    """
    if not path.name.endswith("_trace.parquet"):
        raise InputError(
            "A ServeGen trace must be named NAME_trace.parquet, with NAME_dataset.parquet beside.",
            where=str(path),
        )
    dataset_path = path.with_name(path.name.removesuffix("_trace.parquet") + "_dataset.parquet")
    if not dataset_path.is_file():
        raise InputError(
            f"ServeGen's length distributions do not exist; {path.name} needs them beside it.",
            where=str(dataset_path),
        )
    windows = _servegen_windows(path)
    lengths = _servegen_lengths(dataset_path)
    starts = windows["window_start_s"].unique().sort().to_numpy()
    width_s = _window_width_s(starts, path)
    end_s = math.inf if settings.end_s is None else settings.end_s
    pieces: list[tuple[Floats, NDArray[np.int32], NDArray[np.int32]]] = []
    asked = windows.filter(
        (pl.col("rate_rps") > 0)
        & (pl.col("window_start_s") + width_s > settings.start_s)
        & (pl.col("window_start_s") < end_s)
    )
    # A window's requests are drawn from its start on, so what lies beyond the end can be left out;
    # the microsecond keeps those that only rounding brings before the end.
    asked = asked.with_columns(
        (end_s - pl.col("window_start_s") + 1e-6).clip(upper_bound=width_s).alias("drawn_s")
    )
    expected = float((asked["rate_rps"] * asked["drawn_s"]).sum())
    if expected > MAX_REQUESTS:
        raise InputError(
            f"The windows asked for hold about {expected:.3g} requests; at most {MAX_REQUESTS} "
            "are allowed: set trace.end_s, or an earlier one (a window is drawn from its start).",
            where=str(path),
        )
    for client, start_s, rate, pattern, shape, drawn_s in asked.iter_rows():
        renewal = Renewal("gamma" if pattern == "Gamma" else "weibull", shape)
        units = renewal.arrivals(
            stream(seed, "servegen-arrivals", client, start_s),
            stream(seed, "servegen-arrivals-phase", client, start_s),
            before=rate * drawn_s,
        )
        columns = []
        for field in ("input_tokens", "output_tokens"):
            uniforms = stream(seed, f"servegen-{field}", client, start_s).random(units.size)
            columns.append(_lengths_at(lengths, client, start_s, field, dataset_path, uniforms))
        pieces.append((start_s + units / rate, columns[0], columns[1]))
    if not sum(piece[0].size for piece in pieces):
        raise nothing_in_window(path, settings, float(starts[0]), float(starts[-1]) + width_s)
    arrival_s = whole_ns(np.concatenate([piece[0] for piece in pieces]))
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        format="servegen",
        file=path,
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([piece[1] for piece in pieces])[order],
        output_tokens=np.concatenate([piece[2] for piece in pieces])[order],
    )


def _window_width_s(starts: NDArray[np.int64], path: Path) -> float:
    """Seconds of a window: the least between two starts, of which others are multiples."""
    if starts.size < 2:
        return _ONE_WINDOW_S
    gaps = np.diff(starts)
    width = int(gaps.min())
    odd = np.flatnonzero(gaps % width)
    if odd.size:
        at = int(odd[0])
        raise InputError(
            f"Windows begin at {starts[at]} s and at {starts[at + 1]} s, which is no multiple of "
            f"the {width} s between two others; all windows of a trace must be equally long.",
            where=str(path),
        )
    return float(width)


def _servegen_windows(path: Path) -> pl.DataFrame:
    """The clients' rates and patterns, sorted by client and window and checked."""
    frame = parquet_table(path, SERVEGEN_TRACE).with_columns(pl.col("pattern").cast(pl.String))
    good = (
        (pl.col("client_id") >= 0)
        & pl.col("window_start_s").is_between(0, MAX_ARRIVAL_S)
        & pl.col("rate_rps").is_between(0, MAX_RATE_PER_S)
        & (
            (pl.col("rate_rps") == 0)
            | (
                ((pl.col("pattern") == "Gamma") & pl.col("arg1").is_between(*_GAMMA_SHAPES))
                | ((pl.col("pattern") == "Weibull") & pl.col("arg1").is_between(*_WEIBULL_SHAPES))
            )
        )
    )
    bad = first_bad(frame, good)
    if bad is not None:
        raise InputError(
            f"The row is {frame.row(bad, named=True)}; the client must be 0 or more, the window 0 "
            f"to {MAX_ARRIVAL_S:g} s, the rate 0, or up to {MAX_RATE_PER_S:g} per second with "
            "pattern Gamma or Weibull and a shape arg1 of "
            f"{_GAMMA_SHAPES[0]:g} to {_GAMMA_SHAPES[1]:g} (Gamma) or {_WEIBULL_SHAPES[0]:g} to "
            f"{_WEIBULL_SHAPES[1]:g} (Weibull).",
            where=f"{path}, row {bad}",
        )
    if not frame.height:
        raise InputError("The trace holds no window; one at least is needed.", str(path))
    return frame.sort("client_id", "window_start_s")


def _servegen_lengths(path: Path) -> dict[tuple[int, str], list[tuple[int, _Histogram]]]:
    """For a client and field, the histograms by start of their window, ascending."""
    frame = parquet_table(path, SERVEGEN_DATASET).with_columns(pl.col("field").cast(pl.String))
    frame = frame.filter(pl.col("field").is_in(["input_tokens", "output_tokens"]))
    good = (
        pl.col("value").is_between(1, MAX_TOKENS)
        & (pl.col("prob") >= 0)
        & pl.col("prob").is_finite()
        & pl.col("client_id").is_not_null()
        & pl.col("window_start_s").is_not_null()
    )
    bad = first_bad(frame, good)
    if bad is not None:
        raise InputError(
            f"The row is {frame.row(bad, named=True)}; a token count must be at least 1 and "
            f"at most {MAX_TOKENS}, its probability at least 0 and finite, and it needs a client "
            "and a window.",
            where=f"{path}, row {bad} of its token counts",
        )
    keys = ("client_id", "field", "window_start_s")
    frame = frame.sort(*keys, "value")
    tokens = np.rint(frame["value"].to_numpy()).astype(np.int32)
    prob = frame["prob"].to_numpy().astype(np.float64)
    found: dict[tuple[int, str], list[tuple[int, _Histogram]]] = {}
    low = 0
    for client, field, start_s, num in frame.group_by(keys, maintain_order=True).len().iter_rows():
        rows = slice(low, low + num)
        histogram = _Histogram(tokens[rows], np.cumsum(prob[rows]))
        found.setdefault((client, field), []).append((start_s, histogram))
        low += num
    return found


def _lengths_at(
    lengths: dict[tuple[int, str], list[tuple[int, _Histogram]]],
    client: int,
    start_s: int,
    field: str,
    path: Path,
    uniforms: Floats,
) -> NDArray[np.int32]:
    """Token counts from the histogram in force at a window's start."""
    in_force = [hist for begin_s, hist in lengths.get((client, field), []) if begin_s <= start_s]
    if not in_force or in_force[-1].cumulative[-1] <= 0:
        raise InputError(
            f"Client {client} sends requests at {start_s} s but has no distribution of {field}; "
            "every active client needs one.",
            where=str(path),
        )
    return in_force[-1].sample(uniforms)
