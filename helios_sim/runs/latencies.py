"""A run's requests as columns of numbers, and which of them meet a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from helios_sim.errors import InputError
from helios_sim.runs.records import RunData
from helios_sim.settings.slo import SloLimit, SloSpec

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """A run's request columns as numpy arrays, in order of arrival.

    Times are NaN where null; the replica is -1 where none took the request.
    """

    request_id: npt.NDArray[np.int64]
    replica: npt.NDArray[np.int64]
    arrival_s: Floats
    admitted_s: Floats
    first_token_s: Floats
    finished_s: Floats
    generated: npt.NDArray[np.int64]
    finished: Bools
    refused: Bools
    measured: Bools
    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats

    @property
    def several_tokens(self) -> Bools:
        """Requests that emitted two tokens or more, so that they have a TPOT."""
        return self.generated > 1

    @property
    def departures_s(self) -> Floats:
        """When requests left the system, in order: refused on arrival, unfinished never."""
        left = np.where(self.finished, self.finished_s, math.inf)
        return np.sort(np.where(self.refused, self.arrival_s, left))

    def latency_s(self, limit: SloLimit) -> Floats:
        """The latency of every request that a limit is of, NaN where there is none.

        A request's ITL is its mean gap, which is its TPOT; those of one token have a TPOT of 0.
        """
        if limit.metric == "ttft":
            return self.ttft_s
        if limit.metric == "e2e":
            return self.e2e_s
        return np.where(self.several_tokens, self.tpot_s, 0.0)


def columns_of(run: RunData, warmup_s: float = 0.0, warmup_requests: int = 0) -> Columns:
    """Take what the figures need out of the request table."""
    requests = run.requests
    if requests.height == 0:
        raise InputError("The run is empty: it holds no request.", run.label)
    if not (math.isfinite(warmup_s) and warmup_s >= 0.0) or warmup_requests < 0:
        raise InputError(
            f"The warm-up was given as measure.warmup_s = {warmup_s} and measure.warmup_requests = "
            f"{warmup_requests}; allowed are 0 or more of each.",
            run.label,
        )
    arrival_s = requests["arrival_s"].to_numpy()
    if bool(np.any(arrival_s[1:] < arrival_s[:-1])):
        requests = requests.sort("arrival_s", "request_id", maintain_order=True)
        arrival_s = requests["arrival_s"].to_numpy()

    def times(name: str) -> Floats:
        return requests[name].cast(pl.Float64).fill_null(math.nan).to_numpy()

    admitted_s, first_s, finished_s = (
        times("admitted_s"),
        times("first_token_s"),
        times("finished_s"),
    )
    generated = requests["generated_tokens"].cast(pl.Int64).to_numpy()
    e2e_s = finished_s - arrival_s
    ttft_s = first_s - arrival_s
    return Columns(
        request_id=requests["request_id"].cast(pl.Int64).to_numpy(),
        replica=requests["replica"].cast(pl.Int64).fill_null(-1).to_numpy(),
        arrival_s=arrival_s,
        admitted_s=admitted_s,
        first_token_s=first_s,
        finished_s=finished_s,
        generated=generated,
        finished=(requests["status"] == "finished").to_numpy(),
        refused=(requests["status"] == "refused").to_numpy(),
        measured=(arrival_s >= warmup_s) & (np.arange(len(arrival_s)) >= warmup_requests),
        ttft_s=ttft_s,
        tpot_s=(finished_s - first_s) / np.maximum(generated - 1, 1),
        e2e_s=e2e_s,
    )


def meets(columns: Columns, limit: SloLimit) -> Bools:
    """Which requests finished within one limit."""
    value = columns.latency_s(limit)
    met: Bools = columns.finished & (np.nan_to_num(value, nan=math.inf) <= limit.limit_s)
    return met


def meets_all(columns: Columns, slo: SloSpec) -> Bools:
    """Which requests finished within every limit."""
    met = columns.finished.copy()
    for limit in slo.limits:
        met &= meets(columns, limit)
    return met
