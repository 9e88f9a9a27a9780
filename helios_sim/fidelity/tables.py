"""A comparison of real and simulated runs in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from rich.text import Text

from helios_sim.console.terminal import FittedTable
from helios_sim.fidelity.assessment import Fidelity
from helios_sim.fidelity.figures import FigureRow
from helios_sim.fidelity.swaps import Attribution
from helios_sim.fidelity.words import TOLD, signed_percent, spanned_errors, spread_text
from helios_sim.wording import number

_STYLES: Final = {"within": "green", "same": "green", "above": "yellow", "below": "yellow"}


def figures_table(fidelity: Fidelity) -> FittedTable:
    """Figure by figure: real, its spread, simulated, error and verdict."""
    titles = ("", "real", "spread", "simulated", "error", "verdict")
    rows: list[list[Text]] = []
    for group, members in groupby(fidelity.figures, key=lambda row: row.group):
        rows.append([Text(group, style="dim")])
        for row in members:
            values = (real_text(row), spread_text(row), number(row.simulated))
            rows.append(
                [
                    Text(f"  {row.title}" + (f" ({row.unit})" if row.unit else "")),
                    *(Text(value) for value in (*values, signed_percent(row.error))),
                    Text(TOLD[row.verdict], style=_STYLES.get(row.verdict, "")),
                ]
            )
    return FittedTable(titles, rows, words=frozenset({0, len(titles) - 1}))


def real_text(row: FigureRow) -> str:
    """The real side's value: the median over its repeats, or its words."""
    texts = list(dict.fromkeys(one for one in row.real if isinstance(one, str)))
    return ", ".join(texts) if texts else number(row.median)


def requests_table(fidelity: Fidelity) -> FittedTable:
    """Request by request: errors, correlations, and what two repeats differ by."""
    titles = (
        "request by request",
        "requests",
        "MAPE",
        "median",
        "bias",
        "Pearson",
        "Spearman",
        "repeats",
    )
    rows = []
    for row in fidelity.requests:
        values = (
            f"  {row.title}",
            number(row.num_requests),
            *(_percent(one) for one in (row.mape, row.median_error)),
            signed_percent(row.bias),
            *(number(one) for one in (row.pearson, row.spearman)),
            _percent(row.noise_mape),
        )
        rows.append([Text(value) for value in values])
    return FittedTable(titles, rows)


def attribution_table(fidelity: Fidelity, attribution: Attribution) -> FittedTable:
    """The error of each headline figure with nothing, each ingredient and everything swapped."""
    swaps = attribution.telling
    rows = []
    for cause in attribution.causes:
        row = fidelity.row(cause.key)
        errors = (signed_percent(attribution.error(one, cause.key)) for one in swaps)
        name = cause.key if row is None else row.title
        middle = signed_percent(attribution.middle_error(cause.key))
        told = (*errors, spanned_errors(attribution.chance_errors(cause.key)), middle)
        rows.append([Text(f"  {name}"), *(Text(error) for error in told)])
    titles = ["error with this swapped", *(one.name for one in swaps), "by chance", "middle text"]
    return FittedTable(titles, rows)


def _percent(share: float | None) -> str:
    return "\N{EN DASH}" if share is None else f"{number(100.0 * share)} %"
