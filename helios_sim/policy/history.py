"""The Performance History Table, and what one evaluation in it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from helios_sim.policy.contract import Telemetry

KEPT: Final = 4
"""Evaluations of each candidate in the table."""


class PerformanceHistory:
    """The latest evaluations of each candidate, oldest first.

    Keeping `KEPT` of them bounds what a snapshot carries into the decision log on long runs;
    request streams are similar only over a short time anyway, so older ones mislead.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._rows: dict[str, tuple[Telemetry, ...]] = {name: () for name in names}

    def add(self, telemetry: Telemetry) -> None:
        """Append an evaluation to its model's row."""
        name = telemetry.assignment.model
        self._rows[name] = (*self._rows[name], telemetry)[-KEPT:]

    def table(self) -> dict[str, tuple[Telemetry, ...]]:
        """A copy that nobody can damage."""
        return dict(self._rows)


def latest(history: Mapping[str, tuple[Telemetry, ...]], name: str) -> Telemetry | None:
    """The most recent evaluation of a candidate, or None before the first."""
    rows = history.get(name, ())
    return rows[-1] if rows else None


def exit_shares(evaluation: Telemetry | None) -> tuple[float, ...] | None:
    """Shares of the decoded tokens by the exit at which they left; None without any."""
    if evaluation is None:
        return None
    total = sum(evaluation.exit_counts)
    return tuple(count / total for count in evaluation.exit_counts) if total else None


def mean_executed_layers(evaluation: Telemetry) -> float | None:
    """Layers executed per decoded token, waiting for neighbours included; None if unknown."""
    total = sum(evaluation.exit_counts)
    return evaluation.executed_layers / total if total else None
