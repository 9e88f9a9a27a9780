"""A comparison of real and simulated runs in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from rich.table import Table
from rich.text import Text

from helios_sim.fidelity.assessment import Fidelity
from helios_sim.fidelity.figures import FigureRow
from helios_sim.fidelity.swaps import Attribution
from helios_sim.fidelity.words import TOLD, signed_percent, spread_text
from helios_sim.report.words import number

_STYLES: Final = {"within": "green", "same": "green", "above": "yellow", "below": "yellow"}


def figures_table(fidelity: Fidelity) -> Table:
    """Figure by figure: real, its spread, simulated, error and verdict."""
    table = _table("", "real", "spread", "simulated", "error", "verdict")
    for group, members in groupby(fidelity.figures, key=lambda row: row.group):
        table.add_row(Text(group, style="dim"))
        for row in members:
            table.add_row(
                Text(f"  {row.title}" + (f" ({row.unit})" if row.unit else "")),
                real_text(row),
                spread_text(row),
                number(row.simulated),
                signed_percent(row.error),
                Text(TOLD[row.verdict], style=_STYLES.get(row.verdict, "")),
            )
    return table


def real_text(row: FigureRow) -> str:
    """The real side's value: the median over its repeats, or its words."""
    texts = list(dict.fromkeys(one for one in row.real if isinstance(one, str)))
    return ", ".join(texts) if texts else number(row.median)


def requests_table(fidelity: Fidelity) -> Table:
    """Request by request: errors, correlations, and what two repeats differ by."""
    table = _table(
        "request by request", "requests", "MAPE", "median", "bias", "Pearson", "Spearman", "repeats"
    )
    for row in fidelity.requests:
        table.add_row(
            f"  {row.title}",
            number(row.num_requests),
            *(_percent(one) for one in (row.mape, row.median_error)),
            signed_percent(row.bias),
            *(number(one) for one in (row.pearson, row.spearman)),
            _percent(row.noise_mape),
        )
    return table


def attribution_table(fidelity: Fidelity, attribution: Attribution) -> Table:
    """The error of each headline figure with nothing, each ingredient and everything swapped."""
    swaps = attribution.telling
    table = _table("error with this swapped", *(one.name for one in swaps))
    for cause in attribution.causes:
        row = fidelity.row(cause.key)
        table.add_row(
            f"  {cause.key if row is None else row.title}",
            *(signed_percent(attribution.error(one, cause.key)) for one in swaps),
        )
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, title in enumerate(titles):
        words = place == 0 or title == "verdict"
        table.add_column(Text(title), justify="left" if words else "right")
    return table


def _percent(share: float | None) -> str:
    return "\N{EN DASH}" if share is None else f"{number(100.0 * share)} %"
