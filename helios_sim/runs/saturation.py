"""Whether a system carried its load: the verdict on the curve of outstanding requests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from scipy.special import stdtrit

from helios_sim.runs.latencies import Columns, Floats

Saturation = Literal["stable", "backlogged", "overloaded"]

_MIN_ARRIVALS: Final = 20
"""Fewer arrivals show no growth."""


@dataclass(frozen=True)
class Verdict:
    """Whether the system carried the load, and the two numbers that say so."""

    saturation: Saturation
    growth_per_s: float
    drain_s: float


def saturation_of(columns: Columns, end_s: float, closed_loop: bool = False) -> Verdict:
    """Judge the curve of outstanding requests (arrived, neither finished nor refused).

    *Overloaded*: over the arrival span the backlog grows (regression over ten slices, t above the
    one-sided 97.5 % point) and after the last arrival it takes long to drain: longer than any
    request takes from admission to finish, and than the share min(10 %, 2 max(1, CV) / sqrt(n))
    of the arrival span, the bad luck of n arrivals whose gaps have the coefficient of variation
    CV. *Backlogged*: not that, but requests wait longer on
    average than they are served. *Stable*: neither. A closed loop limits its own backlog and
    is never overloaded.
    """
    arrivals = columns.arrival_s
    departures = columns.departures_s
    first_s, last_s = float(arrivals[0]), float(arrivals[-1])
    span_s = last_s - first_s
    drain_s = _drain_seconds(columns, departures, last_s, span_s, end_s)
    served = columns.finished & ~np.isnan(columns.admitted_s)
    service_s = (columns.finished_s - columns.admitted_s)[served]
    growth = 0.0
    if span_s > 0.0 and len(arrivals) >= _MIN_ARRIVALS:
        growth, score = _backlog_growth(arrivals, departures, first_s, last_s)
        gaps = np.diff(arrivals)
        variation = max(1.0, float(gaps.std() / gaps.mean()))
        luck_s = span_s * min(0.10, 2.0 * variation / math.sqrt(len(arrivals)))
        longest_s = float(service_s.max()) if service_s.size else 0.0
        grows = score > float(stdtrit(8, 0.975))
        if grows and drain_s > max(luck_s, longest_s) and not closed_loop:
            return Verdict("overloaded", growth, drain_s)
    waited = ~columns.refused
    admitted_s = np.where(np.isnan(columns.admitted_s), end_s, columns.admitted_s)
    waits_s = (admitted_s - arrivals)[waited]
    mean_wait_s = float(waits_s.mean()) if waits_s.size else 0.0
    mean_service_s = float(service_s.mean()) if service_s.size else 0.0
    if mean_wait_s > mean_service_s:
        return Verdict("backlogged", growth, drain_s)
    return Verdict("stable", growth, drain_s)


def _backlog_growth(
    arrivals: Floats, departures: Floats, from_s: float, to_s: float
) -> tuple[float, float]:
    """Slope of the backlog (requests per second) and its t value, over ten slices' means.

    Slices of 20 points each take most of the correlation between neighbouring points out.
    """
    edges = np.linspace(from_s, to_s, 201)
    points = (edges[1:] + edges[:-1]) / 2
    backlog = np.searchsorted(arrivals, points, "right") - np.searchsorted(
        departures, points, "right"
    )
    y = backlog.reshape(10, 20).mean(axis=1)
    x = points.reshape(10, 20).mean(axis=1)
    x_off, y_off = x - x.mean(), y - y.mean()
    spread = float(x_off @ x_off)
    slope = float(x_off @ y_off) / spread
    rest = y_off - slope * x_off
    error = math.sqrt(float(rest @ rest) / 8 / spread)
    if error <= 1e-12 * max(1.0, abs(slope)):
        return slope, math.copysign(math.inf, slope) if slope else 0.0
    return slope, slope / error


def _drain_seconds(
    columns: Columns, departures: Floats, last_s: float, span_s: float, end_s: float
) -> float:
    """Seconds from the last arrival until the system is empty."""
    known = departures[np.isfinite(departures)]
    left = len(departures) - len(known)
    if left == 0:
        return max(0.0, float(known[-1]) - last_s)
    half_s = last_s - span_s / 2
    # A refusal leaves too, and serves nobody.
    done_s = columns.finished_s[columns.finished]
    finishes = int(np.count_nonzero((done_s > half_s) & (done_s <= end_s)))
    observed_s = max(0.0, end_s - last_s)
    if finishes == 0 or end_s <= half_s:
        return math.inf
    return observed_s + left * (end_s - half_s) / finishes
