"""Figures in the terminal: rows are figures, columns are policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from helios_sim.metrics import ComparisonRow, comparison_rows
from helios_sim.profile import ProfileSummary
from helios_sim.report.words import number


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """The figures of one run, or of several beside each other."""
    labels = [str(summary["label"]) for summary in summaries]
    return comparison_table(comparison_rows(summaries), labels)


def comparison_table(rows: Sequence[ComparisonRow], labels: Sequence[str]) -> Table:
    """Figures beside each other, the best of a row marked, with ratios to the first run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for label in labels:
        table.add_column(Text(label), justify="right")
    for group, members in groupby(rows, key=lambda row: row.group):
        table.add_row(Text(group, style="dim"))
        for row in members:
            title = f"  {row.title}" + (f" ({row.unit})" if row.unit else "")
            table.add_row(title, *(_cell(row, index) for index in range(len(labels))))
    return table


def profiles_table(profiles: Sequence[ProfileSummary]) -> Table:
    """Profiles with their device, models and how many numbers stand at each grade."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("profile", "device", "models", "numbers"):
        table.add_column(title)
    for profile in profiles:
        grades = [f"{count} {grade}" for grade, count in profile.grade_counts.items() if count]
        table.add_row(profile.name, profile.device, ", ".join(profile.models), ", ".join(grades))
    return table


def _cell(row: ComparisonRow, index: int) -> Text:
    """A value, its ratio to the first run, and a mark if it is the best."""
    value = row.values[index]
    ratio = row.ratios[index]
    shown = number(value)
    if index > 0 and ratio is not None:
        shown += f"  {ratio:.2f}x"
    return Text(shown, style="bold green" if index in row.best and len(row.values) > 1 else "")
