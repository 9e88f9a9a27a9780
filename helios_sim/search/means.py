"""Figures of several samples as one: means, and what a profile can only extrapolate of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final

from helios_sim.runs.metrics import figure_at
from helios_sim.search.points import Figures

Means = dict[str, float | None]
"""Plain figures of a summary, by key; None where one of the samples has none."""


LAUNCH_SHARE: Final = "regime.launch"
"""Share of busy time in which launching bounds the layers, of the samples that were busy."""


def user_rate(means: Means) -> float | None:
    """Tokens per second that one user sees."""
    tpot = means.get("mean_tpot_ms")
    return None if not tpot else 1e3 / tpot


def gpu_rate(means: Means, key: str = "output_throughput") -> float | None:
    """Tokens per second of one device, or another rate of all devices."""
    rate, gpus = means.get(key), means.get("num_gpus")
    return None if rate is None or not gpus else rate / gpus


def joules(means: Means) -> float | None:
    """Joules per output token."""
    value = means.get("energy_per_output_token")
    return None if value is None else 1e-3 * value


def mean_figures(figures: Sequence[Figures]) -> Means:
    """The mean over replications of every plain figure; None where one of them has none.

    Beside them stands the share of time that launching bounds.
    """
    summaries = [one["summary"] for one in figures]
    means: Means = {}
    for key, first in summaries[0].items():
        if isinstance(first, bool | str | list | Mapping):
            continue
        values = [summary[key] for summary in summaries]
        known = [float(value) for value in values if isinstance(value, int | float)]
        means[key] = fmean(known) if len(known) == len(values) else None
    launching = [figure_at(summary, LAUNCH_SHARE) for summary in summaries]
    if known := [share for share in launching if share is not None]:
        means[LAUNCH_SHARE] = fmean(known)
    return means


def clauses_beyond(figures: Sequence[Figures]) -> tuple[str, ...]:
    """What of replications a profile can only extrapolate: the first clause about each model."""
    found: dict[str, str] = {}
    for one in figures:
        for clause in one["summary"].get("beyond_measured", ()):
            found.setdefault(clause.partition(":")[0], clause)
    return tuple(found.values())


def mix_of(figures: Sequence[Figures]) -> dict[str, float]:
    """The share of the requests that each domain of text has, over replications."""
    mixes = [one.get("domains") or {} for one in figures]
    return {
        name: fmean(mix.get(name, 0.0) for mix in mixes)
        for name in dict.fromkeys(name for mix in mixes for name in mix)
    }


def models_served(figures: Sequence[Figures]) -> tuple[str, ...]:
    """The models that served in any of some runs, in the order of the candidates."""
    summaries = [one["summary"] for one in figures]
    served = {
        place.rpartition("@")[0] for one in summaries for place in one.get("depth_share") or {}
    }
    candidates = [name for one in summaries for name in one.get("exit_histogram") or {}]
    return tuple(name for name in dict.fromkeys(candidates) if name in served)
