"""Rows of a trace that cannot be used: the first is refused with their number, or all are left out.

A flaw of the whole file, such as a missing column, is refused in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios_sim.errors import InputError
from helios_sim.workload.trace import Ints


def at_line(path: Path, line: int) -> str:
    """Where a flaw is."""
    return f"{path}, line {line}"


@dataclass(frozen=True)
class Flaw:
    """One thing wrong with rows of a file: their lines, and what is said of the first of them."""

    reason: str
    lines: Ints
    said: str


def by_reason(flaws: Sequence[Flaw]) -> dict[str, int]:
    """How many rows cannot be used, by what is wrong with them."""
    counts: dict[str, int] = {}
    for flaw in flaws:
        counts[flaw.reason] = counts.get(flaw.reason, 0) + len(flaw.lines)
    return counts


def counts_said(counts: Mapping[str, int]) -> str:
    """Rows by reason as text: 'empty output: 2, prompt below 1 token: 1'."""
    return ", ".join(f"{reason}: {num:,}" for reason, num in counts.items())


_OPTION: Final = "workload.trace.skip_bad_rows = true"


def refuse_flaws(flaws: Sequence[Flaw], num_rows: int, path: Path) -> None:
    """Raise `InputError` for the first row that cannot be used, saying how many there are in all.

    The file has `num_rows` rows; where none can be used, leaving them out is no way.
    """
    if not flaws:
        return
    first = min(flaws, key=lambda flaw: int(flaw.lines[0]))
    counts = by_reason(flaws)
    num = sum(counts.values())
    if num < num_rows:
        only = f"1 of {num_rows:,} rows cannot be used; {_OPTION} leaves it out."
        some = f"{num:,} of {num_rows:,} rows cannot be used ({counts_said(counts)}); {_OPTION} "
        more = f" {only if num == 1 else f'{some}leaves them out.'}"
    else:
        more = f" None of the {num_rows:,} rows can be used." if num_rows > 1 else ""
    raise InputError(f"{first.said}{more}", at_line(path, int(first.lines[0])))
