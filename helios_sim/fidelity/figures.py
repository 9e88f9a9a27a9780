"""Figure by figure, request by request: real against simulated, beside the run-to-run spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from helios_sim.fidelity.sides import Side, Sides
from helios_sim.runs.comparison import factor_to, shown_in
from helios_sim.runs.latencies import columns_of

Floats = npt.NDArray[np.float64]
Value = float | str | None
Verdict = Literal["within", "above", "below", "same", "differs", "unknown", "not measured"]

_LATENCIES: Final = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E"))

COMPARED: Final[tuple[tuple[str, str, str, str], ...]] = (
    ("output_throughput", "Output tokens", "tokens/s", "Load"),
    ("request_throughput", "Requests finished", "requests/s", "Load"),
    ("request_goodput", "Goodput", "requests/s", "Load"),
    ("slo_attainment", "SLO attainment", "%", "Load"),
    ("duration", "Duration", "s", "Load"),
    ("saturation", "Saturation", "", "Load"),
    *(
        (f"{statistic}_{name}_ms", f"{title}, {statistic}", "ms", "Latency")
        for name, title in _LATENCIES
        for statistic in ("mean", "p50", "p90", "p99")
    ),
    ("mean_batch_size", "Batch size, mean", "", "Memory and batching"),
    ("max_batch_size", "Batch size, most", "", "Memory and batching"),
    ("mean_kv_use", "KV blocks in use", "%", "Memory and batching"),
    ("weight_bytes_loaded", "Weights loaded, mean", "GiB", "Memory and batching"),
    ("num_preemptions", "Preemptions", "", "Memory and batching"),
    ("mean_executed_layers", "Executed layers, mean", "", "Exits and quality"),
    ("breach_rate", "Breaches, relative", "%", "Exits and quality"),
    ("breach_rate_observed", "Breaches, observed", "%", "Exits and quality"),
    ("agreement", "Agreement with full depth", "%", "Exits and quality"),
    ("perplexity", "Perplexity", "", "Exits and quality"),
    ("total_gpu_energy", "Energy", "J", "Energy"),
    ("energy_per_output_token", "Energy per output token", "J", "Energy"),
    ("average_gpu_power", "Power, mean", "W", "Energy"),
    ("num_evaluations", "Evaluations", "", "Decisions"),
    ("num_switches", "Switches", "", "Decisions"),
    ("num_loads", "Loads of more layers", "", "Decisions"),
    ("switch_time_s", "Time of serves, switches and loads", "s", "Decisions"),
)
"""Figures set beside each other: key of the summary, title, usual unit, group."""

_EQUAL: Final = 1e-9


@dataclass(frozen=True)
class FigureRow:
    """One figure of both sides.

    `real` holds a value a repeat, `median` their median, which one disturbed repeat hardly moves;
    `low` to `high` is the run-to-run spread: the wider of the range met and of two standard
    deviations about the median, None with one repeat. `error` is (simulated - median) / median,
    None where that is undefined; `error_in_spreads` the distance over half the width of the spread.
    """

    key: str
    title: str
    unit: str
    group: str
    real: tuple[Value, ...]
    simulated: Value
    median: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    error_in_spreads: float | None = None
    verdict: Verdict = "not measured"


@dataclass(frozen=True)
class RequestRow:
    """How well one latency is predicted request by request, over those finished on both sides.

    Errors are relative to the real value (the median over its repeats): `mape` the mean of their
    absolute values, `median_error` the median of those, `bias` the mean with its sign.
    `noise_mape` is the same between two repeats of the real side, None with one.
    """

    metric: str
    title: str
    num_requests: int
    mape: float | None
    median_error: float | None
    bias: float | None
    pearson: float | None
    spearman: float | None
    noise_mape: float | None


def relative_error(simulated: float, real: float) -> float | None:
    """(simulated - real) / |real|; 0 where they are equal, None where only the real one is 0."""
    if simulated == real:
        return 0.0
    return (simulated - real) / abs(real) if real != 0.0 else None


def scaled(key: str, value: Any, unit: str = "") -> Value:
    """A value of a summary in the unit that is shown; bytes need its name."""
    if value is None or isinstance(value, str):
        return value
    return float(value) * factor_to(unit, key)


def figure_rows(sides: Sides) -> list[FigureRow]:
    """Every figure that either side has."""
    rows = []
    for key, title, usual, group in COMPARED:
        values = [side.summary.get(key) for side in (*sides.reals, sides.simulated)]
        unit, _ = shown_in(key, usual, values)
        *real, ours = (scaled(key, value, unit) for value in values)
        if ours is None and all(value is None for value in real):
            continue
        rows.append(figure_row(key, title, unit, group, tuple(real), ours))
    return rows


def figure_row(
    key: str, title: str, unit: str, group: str, real: tuple[Value, ...], ours: Value
) -> FigureRow:
    """One figure of the real side's repeats and of the simulated side."""
    row = FigureRow(key, title, unit, group, real, ours)
    texts = [value for value in real if isinstance(value, str)]
    if texts or isinstance(ours, str):
        return replace(row, verdict="same" if ours in texts else "differs")
    known = [float(value) for value in real if value is not None]
    median = float(np.median(known)) if known else None
    if median is None or ours is None:
        return replace(row, median=median)
    row = replace(row, median=median, error=relative_error(ours, median), verdict="unknown")
    if len(known) < 2:
        return row
    double = 2.0 * float(np.std(known, ddof=1))
    low, high = min(min(known), median - double), max(max(known), median + double)
    slack = _EQUAL * max(abs(low), abs(high))
    side: Verdict = "below" if ours < low - slack else "above" if ours > high + slack else "within"
    # Repeats that lie to one side widen the spread there alone.
    half = median - low if ours < median else high - median
    spreads = abs(ours - median) / half if half > slack else (0.0 if side == "within" else None)
    return replace(row, low=low, high=high, error_in_spreads=spreads, verdict=side)


def per_request(side: Side) -> dict[str, Floats]:
    """Seconds of each measured, finished request by metric, by request_id; NaN elsewhere."""
    warmup = side.summary["warmup_s"], side.summary["warmup_requests"]
    columns = columns_of(side.run, *warmup)
    counted = columns.measured & columns.finished
    order = np.argsort(columns.request_id, kind="stable")
    return {
        "ttft": np.where(counted, columns.ttft_s, math.nan)[order],
        "tpot": np.where(counted & columns.several_tokens, columns.tpot_s, math.nan)[order],
        "e2e": np.where(counted, columns.e2e_s, math.nan)[order],
    }


def real_per_request(repeats: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    """The real side's seconds: the median over its repeats, where all of them finished it."""
    return {name: np.median([table[name] for table in repeats], axis=0) for name in repeats[0]}


def request_rows(sides: Sides) -> list[RequestRow]:
    """TTFT, TPOT and E2E request by request."""
    repeats = [per_request(side) for side in sides.reals]
    real, ours = real_per_request(repeats), per_request(sides.simulated)
    rows = []
    for metric, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E")):
        both = (real[metric] > 0.0) & ~np.isnan(ours[metric])
        theirs, own = real[metric][both], ours[metric][both]
        errors = (own - theirs) / theirs
        rows.append(
            RequestRow(
                metric=metric,
                title=title,
                num_requests=int(both.sum()),
                mape=_known(np.mean, np.abs(errors)),
                median_error=_known(np.median, np.abs(errors)),
                bias=_known(np.mean, errors),
                pearson=_correlation(theirs, own, "pearson"),
                spearman=_correlation(theirs, own, "spearman"),
                noise_mape=_noise([table[metric] for table in repeats]),
            )
        )
    return rows


def _known(statistic: Any, values: Floats) -> float | None:
    return float(statistic(values)) if values.size else None


def _correlation(x: Floats, y: Floats, method: Literal["pearson", "spearman"]) -> float | None:
    """A correlation; None with fewer than three pairs, or where a side is constant."""
    if x.size < 3 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return None
    frame = pl.DataFrame({"x": x, "y": y})
    value = float(frame.select(pl.corr("x", "y", method=method)).item())
    return value if math.isfinite(value) else None


def _noise(repeats: Sequence[Floats]) -> float | None:
    """The mean absolute relative difference between two repeats, over all pairs of them."""
    found = []
    for one, other in combinations(repeats, 2):
        both = (one > 0.0) & (other > 0.0)
        if both.any():
            gap = np.abs(one[both] - other[both])
            found.append(float(np.mean(2.0 * gap / (one[both] + other[both]))))
    return math.fsum(found) / len(found) if found else None
