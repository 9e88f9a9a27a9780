"""The figures that the study judges and lays beside each other, and what it calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Judged:
    """A figure whose errors are told.

    `name` is for tables, `said` for sentences; `target` is the median absolute error that a GPU is
    held to.
    """

    key: str
    name: str
    said: str
    target: float


JUDGED: Final = {
    one.key: one
    for one in (
        Judged("output_throughput", "Throughput", "throughput", 0.03),
        Judged("mean_tpot_ms", "TPOT, mean", "mean TPOT", 0.03),
        Judged("p50_e2el_ms", "E2E, p50", "median E2E", 0.05),
        Judged("p90_ttft_ms", "TTFT, p90", "p90 TTFT", 0.10),
        Judged("total_gpu_energy", "Energy", "energy", 0.05),
        Judged("mean_batch_size", "Batch size", "batch size", 0.03),
    )
}
"""Figures by their keys, in the order in which they are told."""


@dataclass(frozen=True)
class Beside:
    """A figure of every policy of a group, laid beside vanilla's.

    `factor` leads to the unit of `title`; `over_vanilla` says whether multiples of vanilla's are
    shown.
    """

    key: str
    title: str
    factor: float
    over_vanilla: bool


BESIDE: Final = (
    Beside("output_throughput", "Throughput, tokens/s", 1.0, over_vanilla=True),
    Beside("mean_e2el_ms", "Mean E2E, s", 1e-3, over_vanilla=True),
    Beside("p50_ttft_ms", "Median TTFT, s", 1e-3, over_vanilla=False),
    Beside("mean_batch_size", "Batch", 1.0, over_vanilla=False),
    Beside("perplexity", "Perplexity", 1.0, over_vanilla=True),
)
