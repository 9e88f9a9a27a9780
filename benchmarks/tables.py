"""The tables that a run of the benchmarks prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.results import Bar, Growth, Line, Results, bars, growth

_BY_THE_CALL = ("call", "sweep")


def page(results: Results) -> Group:
    """Everything a run has to say."""
    return Group(*_parts(results))


def _parts(results: Results) -> Iterator[Table | Text]:
    speeds = [line for line in results.lines if line.case.kind not in _BY_THE_CALL]
    calls = [line for line in results.lines if line.case.kind in _BY_THE_CALL]
    found = bars(results)
    judged = [bar for bar in found if bar.excess is not None]
    tables = (
        _speed_table(speeds),
        _call_table(calls),
        _growth_table(growth(results)),
        _verdict_table(judged),
    )
    for table in tables:
        if table.row_count:
            yield table
            yield Text()
    if len(judged) < len(found):
        yield Text(f"{len(found) - len(judged)} of {len(found)} bars were not measured.")
    for name, words in results.failures.items():
        yield Text(f"{name} failed: {words}", style="red")
    yield Text(_machine_line("Measured with", results.machine))
    if results.baseline_machine and dict(results.baseline_machine) != dict(results.machine):
        yield Text(_machine_line("The baseline was measured with", results.baseline_machine))


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _speed_table(lines: list[Line]) -> Table:
    table = _table(
        "Requests a second",
        "median",
        "min",
        "max",
        "M tokens/s",
        "peak MB",
        "start s",
        "x floor",
        "x baseline",
    )
    for line in lines:
        table.add_row(
            line.case.name,
            f"{line.requests_per_s:,.0f}",
            f"{min(line.speeds):,.0f}",
            f"{max(line.speeds):,.0f}",
            _number(line.tokens_per_s, 1e-6, 1),
            f"{line.peak_bytes / 1e6:,.0f}",
            _number(line.startup_s),
            _number(line.times_floor),
            _number(line.vs_baseline),
        )
    return table


def _call_table(lines: list[Line]) -> Table:
    columns = ("median", "min", "max", "peak MB", "CPU use", "x baseline")
    table = _table("Seconds of a whole process", *columns)
    for line in lines:
        spans_s = [line.case.num_requests / speed for speed in line.speeds]
        table.add_row(
            line.case.name,
            f"{line.seconds:.2f}",
            f"{min(spans_s):.2f}",
            f"{max(spans_s):.2f}",
            f"{line.peak_bytes / 1e6:,.0f}",
            "" if line.cpu_use is None else f"{line.cpu_use:.0%}",
            _number(line.vs_baseline),
        )
    return table


def _growth_table(steps: Sequence[Growth]) -> Table:
    table = _table(
        "Growth of seconds a request (1 is linear)", "10k to 100k", "100k to 1M", "10k to 1M"
    )
    for step in steps:
        table.add_row(step.name, _number(step.first), _number(step.last), _number(step.whole))
    return table


def _verdict_table(judged: Sequence[Bar]) -> Table:
    table = _table("Bars", "measured", "verdict")
    for bar in judged:
        style = "green" if bar.verdict == "met" else "red"
        table.add_row(bar.promise, bar.measured, Text(bar.verdict, style=style))
    return table


def _number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
    return "" if value is None else f"{value * scale:,.{digits}f}"


def _machine_line(start: str, machine: Mapping[str, Any]) -> str:
    return f"{start}: " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "."
