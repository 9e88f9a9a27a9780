"""Figures in the terminal, in tables that fit its width: names are broken, numbers never."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from helios_sim.profile import ProfileSummary
from helios_sim.runs.comparison import ComparisonRow, comparison_rows
from helios_sim.wording import number, size, times

if TYPE_CHECKING:
    from helios_sim.profiles.derive_model import ModelFigures

_SHORT: Final[Mapping[str, str]] = {
    "output_throughput": "Tokens/s",
    "request_throughput": "Requests/s",
    "request_goodput": "Goodput/s",
    "slo_attainment": "SLO met %",
    "num_refused": "Refused",
    "num_unfinished": "Unfinished",
    "saturation": "Saturation",
    "mean_ttft_ms": "TTFT mean ms",
    "median_ttft_ms": "TTFT p50 ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "mean_tpot_ms": "TPOT mean ms",
    "median_tpot_ms": "TPOT p50 ms",
    "p99_tpot_ms": "TPOT p99 ms",
    "p99_itl_ms": "ITL p99 ms",
    "mean_e2el_ms": "E2E mean ms",
    "median_e2el_ms": "E2E p50 ms",
    "p99_e2el_ms": "E2E p99 ms",
    "energy_per_output_token": "J/token",
    "average_gpu_power": "Power W",
    "mean_batch_size": "Batch mean",
    "max_batch_size_supported": "Batch fits",
    "weight_bytes_loaded": "Weights",
    "num_preemptions": "Preemptions",
    "mean_executed_layers": "Layers/token",
    "agreement": "Agreement %",
    "perplexity": "Perplexity",
    "breach_rate": "Breaches %",
    "num_evaluations": "Evaluations",
    "num_switches": "Switches",
    "num_loads": "Layer loads",
    "switch_time_s": "Switching s",
}
"""Titles of a comparison, with their units, for a terminal that the whole ones do not fit.

That of weights depends on how many there are.
"""

_GAPS_AND_LINES: Final = ((2, 1), (2, 2), (2, 3), (1, 1), (1, 2), (1, 3), (1, 4))
"""Spaces between columns and lines that headings may take, from the airiest to the tightest."""
_MOST: Final = (1000, 40, 32, 24, 16)
"""Columns beyond which a value is broken; numbers are never as wide, so it is made of words."""
_NAME: Final = 24
"""Columns at which names are broken, before words among the values are."""
_KEPT_SPACE: Final = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class FittedTable:
    """A table that asks the terminal for its width and stays whole in any.

    The first column names the rows; a row of one cell is a heading between the others. Columns
    stand beside one another, under broken headings where they must. Where that is too wide,
    `short_names` replace the names; then names are broken, or get a line of their own above their
    values (`names_above`); then the columns come in parts, each with the names. Columns in `words`
    are aligned to the left.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[Text]]
    short_names: Sequence[str] = ()
    names_above: bool = False
    words: frozenset[int] = frozenset({0})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The lines in the terminal's width."""
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Text]:
        """The lines in so many columns."""
        named = [self.rows]
        if self.short_names:
            named.append(
                [_renamed(*pair) for pair in zip(self.rows, self.short_names, strict=True)]
            )
        values = range(1, len(self.titles))
        for most in _MOST:
            for rows in named:
                whole = _needed(self.titles[0], [row[0].plain for row in rows if len(row) > 1], 1)
                for name in (whole,) if self.names_above else (whole, min(whole, _NAME)):
                    sizes = self._sizes(values, width - name, most)
                    if sizes is not None:
                        return self._beside(rows, values, [name, *sizes[0]], sizes[1])
        for most in _MOST if self.names_above else ():
            sizes = self._sizes(values, width - 1, most)
            if sizes is not None:
                return self._below_names(width, *sizes)
        return self._in_parts(named[-1], width)

    def _sizes(self, columns: Sequence[int], room: int, most: int) -> tuple[list[int], int] | None:
        """Widths of columns and the gap before each; None where there is too little room."""
        for gap, lines in _GAPS_AND_LINES:
            widths = [self._width(column, lines, most) for column in columns]
            if sum(widths) + gap * len(widths) <= room:
                return widths, gap
        return None

    def _width(self, column: int, lines: int, most: int) -> int:
        values = [row[column].plain for row in self.rows if len(row) > 1]
        return _needed(self.titles[column], values, lines, most)

    def _beside(
        self,
        rows: Sequence[Sequence[Text]],
        columns: Sequence[int],
        widths: Sequence[int],
        gap: int,
    ) -> Iterator[Text]:
        """Names and these columns beside one another."""
        shown = (0, *columns)
        left = [column in self.words for column in shown]
        heads = [Text(self.titles[column], "bold") for column in shown]
        yield from _laid_out(heads, widths, gap, left, at_bottom=True)
        for row in rows:
            if len(row) == 1:
                yield row[0]
            else:
                yield from _laid_out([row[column] for column in shown], widths, gap, left)

    def _below_names(self, width: int, widths: Sequence[int], gap: int) -> Iterator[Text]:
        """Every name on a line of its own, its values below it."""
        left = [column in self.words for column in range(len(self.titles))]
        sizes = [2 - gap, *widths] if gap < 2 else [0, *widths]
        heads = [Text(title, "bold") for title in self.titles]
        yield heads[0]
        yield from _laid_out([Text(), *heads[1:]], sizes, gap, left, at_bottom=True)
        for row in self.rows:
            yield from _laid_out(row[:1], [width], gap, left)
            yield from _laid_out([Text(), *row[1:]], sizes, gap, left)

    def _in_parts(self, rows: Sequence[Sequence[Text]], width: int) -> Iterator[Text]:
        """As many columns at a time as there is room for."""
        names = [row[0].plain for row in rows if len(row) > 1]
        name = min(_needed(self.titles[0], names, 2), max(_NAME, width // 3))
        room = max(1, width - name - 2)
        left = list(range(1, len(self.titles)))
        while left:
            widths = [min(room, self._width(column, 3, _MOST[1])) for column in left]
            taken = 1
            while taken < len(left) and sum(widths[: taken + 1]) + 2 * taken <= room:
                taken += 1
            if len(left) + 1 < len(self.titles):
                yield Text()
            yield from self._beside(rows, left[:taken], [name, *widths[:taken]], 2)
            left = left[taken:]


def _renamed(row: Sequence[Text], name: str) -> Sequence[Text]:
    return row if len(row) == 1 else [Text(name), *row[1:]]


def _needed(title: str, values: Sequence[str], lines: int, most: int = _MOST[0]) -> int:
    """The least width that holds the values whole, and the title in so many lines."""
    width = max(map(cell_len, values), default=1)
    while True:
        heads = textwrap.wrap(title, max(1, width), break_long_words=False)
        if len(heads) <= lines and all(len(head) <= width for head in heads):
            return min(width, most)
        width += 1


def _laid_out(
    cells: Sequence[Text],
    widths: Sequence[int],
    gap: int,
    left: Sequence[bool],
    at_bottom: bool = False,
) -> Iterator[Text]:
    """One row, in as many lines as its highest cell takes."""
    broken = [_broken(cell.plain, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, broken))
    for at in range(height):
        line = Text()
        for place, (cell, parts) in enumerate(zip(cells, broken, strict=True)):
            own = at - (height - len(parts) if at_bottom else 0)
            text = parts[own].replace(_KEPT_SPACE, " ") if 0 <= own < len(parts) else ""
            space = " " * (widths[place] - cell_len(text))
            line.append(" " * gap if place else "")
            line.append(text + space if left[place] else space + text, cell.style)
        line.rstrip()
        yield line


def _broken(text: str, width: int) -> list[str]:
    """The text in lines, each as far from the edge as the first."""
    indent = " " * (len(text) - len(text.lstrip(" ")))
    return textwrap.wrap(text, max(1, width, len(indent) + 1), subsequent_indent=indent)


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> FittedTable:
    """The figures of one run, or of several beside each other."""
    labels = [str(summary["label"]) for summary in summaries]
    return comparison_table(comparison_rows(summaries), labels)


def comparison_table(rows: Sequence[ComparisonRow], labels: Sequence[str]) -> FittedTable:
    """Figures beside each other, the best of a row marked, with ratios to the first run."""
    columns = [_compared(rows, place) for place in range(len(labels))]
    shown: list[list[Text]] = []
    short: list[str] = []
    group = ""
    for at, row in enumerate(rows):
        if row.group != group:
            group = row.group
            shown.append([Text(group, "dim")])
            short.append(group)
        title = f"  {row.title}" + (f" ({row.unit})" if row.unit else "")
        shown.append([Text(title), *(column[at] for column in columns)])
        short.append(f"  {_SHORT[row.key]}" + (f" {row.unit}" if row.unit[1:] == "iB" else ""))
    return FittedTable(["", *labels], shown, short)


def _compared(rows: Sequence[ComparisonRow], place: int) -> list[Text]:
    """The values of one run, each with its ratio to the first one, in columns of their own."""
    values = [row.values[place] for row in rows]
    ratios = [times(row.ratios[place]) if place else "" for row in rows]
    numbers = [number(value) for value in values]
    whole = max(
        (
            len(text)
            for text, value in zip(numbers, values, strict=True)
            if not isinstance(value, str)
        ),
        default=0,
    )
    beside = max(map(len, ratios), default=0)
    cells = []
    for row, value, text, ratio in zip(rows, values, numbers, ratios, strict=True):
        if beside and not isinstance(value, str):
            text = f"{text:>{whole}} {ratio:>{beside}}".replace(" ", _KEPT_SPACE)
        is_best = place in row.best and len(row.values) > 1
        cells.append(Text(text, "bold green" if is_best else ""))
    return cells


def profiles_table(profiles: Sequence[ProfileSummary]) -> FittedTable:
    """Profiles with their device, models and how many numbers stand at each grade."""
    rows = []
    for profile in profiles:
        grades = [
            f"{count}{_KEPT_SPACE}{grade}" for grade, count in profile.grade_counts.items() if count
        ]
        cells = (profile.name, profile.device, ", ".join(profile.models), ", ".join(grades))
        rows.append([Text(cell) for cell in cells])
    titles = ("profile", "device", "models", "numbers")
    return FittedTable(titles, rows, names_above=True, words=frozenset(range(len(titles))))


def model_figures_table(figures: Sequence[ModelFigures]) -> FittedTable:
    """Models beside each other: what they take of memory and time, and how well that is known."""
    rows = []
    for one in figures:
        grades = [
            f"{count}{_KEPT_SPACE}{grade}" for grade, count in one.grade_counts.items() if count
        ]
        cells = (
            one.name,
            " ".join(str(layer) for layer in one.exit_layers),
            size(one.weight_bytes).replace(" ", _KEPT_SPACE),
            f"{one.kv_bytes_per_token:,}",
            f"{1e3 * one.decode_s:.2f}",
            "" if one.bytes_s is None else f"{1e3 * one.bytes_s:.2f}",
            ", ".join(grades),
        )
        rows.append([Text(cell) for cell in cells])
    context = figures[0].context_tokens
    titles = (
        "model",
        "exits",
        "weights",
        "KV bytes a token",
        f"decode of one row at {context} tokens, ms",
        "its bytes at full bandwidth, ms",
        "numbers",
    )
    words = frozenset({0, 1, len(titles) - 1})
    return FittedTable(titles, rows, names_above=True, words=words)
