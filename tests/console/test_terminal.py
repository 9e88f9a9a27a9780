"""Tables fit the terminal: names are broken, numbers never, and none is lost."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from helios_sim.console.terminal import FittedTable, profiles_table, summary_table
from helios_sim.profiles.files import list_profiles
from helios_sim.runs.comparison import COMPARED
from helios_sim.search.tables import terminal_table
from helios_sim.wording import number

LABELS = ("vanilla", "ee-single wait", "static-depth", "helios", "helios, RI 3000")


def times(text: str) -> str:
    """A ratio as the terminal shows it."""
    return f"{text}\N{MULTIPLICATION SIGN}"


def summaries(labels: tuple[str, ...] = LABELS) -> list[dict[str, Any]]:
    """Runs whose figures are as wide as an hour of overload makes them."""
    found = []
    for place, label in enumerate(labels):
        figures = {key: 1_234_567.0 / (place + 1) ** 3 for key, *_ in COMPARED}
        found.append({"label": label, **figures, "saturation": "overloaded"})
    return found


def printed(table: FittedTable, width: int) -> str:
    """What a terminal of so many columns shows."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", [30, 60, 80, 100, 120, 200])
def test_a_comparison_keeps_within_the_terminal_and_every_number_whole(width: int) -> None:
    text = printed(summary_table(summaries()), width)
    assert max(map(len, text.splitlines())) <= width
    words = text.replace("\n", " ").split(" ")
    for summary in summaries():
        for value in (number(summary["num_switches"]), "overloaded"):
            assert words.count(value) >= 1


def test_five_policies_stand_side_by_side_in_eighty_columns_under_short_names() -> None:
    shown = summaries()
    for place, summary in enumerate(shown):
        summary.update({key: 1_234.5 * (place + 1) for key, *_ in COMPARED[:-1]})
        summary["saturation"] = "stable"
    (row,) = [line for line in printed(summary_table(shown), 80).splitlines() if "TTFT p99" in line]
    assert row.split() == [
        "TTFT",
        "p99",
        "ms",
        "1,234",
        "2,469",
        times("2.00"),
        "3,704",
        times("3.00"),
        "4,938",
        times("4.00"),
        "6,172",
        times("5.00"),
    ]
    assert "TTFT, p99 (ms)" in printed(summary_table(shown), 120)


def test_more_runs_than_fit_come_in_parts_each_with_the_names() -> None:
    labels = tuple(f"policy {place}" for place in range(12))
    text = printed(summary_table(summaries(labels)), 80)
    assert text.count("Preemptions") > 1
    assert all(label in text for label in labels)


def test_every_compared_figure_has_a_short_name_with_its_unit() -> None:
    table = summary_table(summaries())
    assert len(table.short_names) == len(table.rows)
    assert all(len(name) <= 14 for name in table.short_names if name.startswith(" "))


def test_a_name_stands_above_its_values_where_they_do_not_fit_beside_it() -> None:
    name = "helios, RI 3000, llama3-8b, layerskip-h100-80gb"
    titles = ["Fleet", "GPUs", "req/s", "bounds", "held by", "J/tok", "USD/h", "USD/Mtok"]
    values = ["12", "31.51 (2)", "31.51 to 35.12", "KV memory", "0.253", "6.19", "0.364"]
    table = terminal_table((titles, [[name, *values], ["vanilla", *values]]), best_first=True)
    lines = printed(table, 80).splitlines()
    assert lines[0] == "Fleet"
    assert lines[2] == name
    assert lines[3].split("  ")[1:] != []
    assert " ".join(lines[3].split()) == " ".join(values)
    assert printed(table, 120).splitlines()[1].startswith(f"{name}    12")


def test_headings_break_before_a_column_is_lost() -> None:
    titles = ["Policy", "reassess requests", "goodput req/s", "SLO met %", "TTFT p99 ms", "load"]
    rows = [["helios", "3000", "4.81", "87.0", "9,712", "backlogged"]]
    text = printed(terminal_table((titles, rows)), 50)
    assert text.splitlines()[-1].split() == rows[0]
    assert max(map(len, text.splitlines())) <= 50


def test_a_value_of_words_is_broken_and_its_words_are_kept() -> None:
    broken = "ttft:p99<=500ms (reached 1234, 12 % off); agreement>=0.98 (reached 0.9, 8 % off)"
    rows = [["27", "7.604", "0.126", "84.9", broken]]
    text = printed(terminal_table((["Trial", "goodput", "J/tok", "agree %", "breaks"], rows)), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert [word for word in broken.split() if word not in text] == []


def test_names_are_broken_before_words_among_the_values() -> None:
    name, verdict = "  Agreement with full depth (%)", "unknown: one repeat"
    rows = [[Text(one) for one in (name, "87.5", "0.00307", "87.5", "0 %", verdict)]]
    table = FittedTable(["", "real", "spread", "simulated", "error", "verdict"], rows)
    assert printed(table, 76).splitlines()[1:] == [
        "  Agreement with full    87.5 0.00307      87.5   0 % unknown: one repeat",
        "  depth (%)",
    ]


def test_a_count_and_its_grade_stay_on_one_line() -> None:
    for width in (60, 80, 100):
        lines = printed(profiles_table(list_profiles()), width).splitlines()
        assert max(map(len, lines)) <= width
        assert any("36 published" in line for line in lines)
        assert any("205 derived" in line for line in lines)


def test_styles_and_headings_between_rows_are_kept() -> None:
    table = FittedTable(["", "a"], [[Text("Load", "dim")], [Text("  x"), Text("1", "bold green")]])
    lines = list(table.lines(80))
    assert [line.plain for line in lines] == ["     a", "Load", "  x  1"]
    assert [str(span.style) for span in lines[2].spans] == ["bold green"]


def test_a_ratio_reads_as_on_the_page() -> None:
    """The first switches a million times as often as the second."""
    shown = summaries(("one", "two"))
    shown[1]["num_switches"] = 1.0
    (row,) = [line for line in printed(summary_table(shown), 80).splitlines() if "Switches" in line]
    assert row.split() == ["Switches", "1,234,567", "1", "<.01\N{MULTIPLICATION SIGN}"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((9.76e6, 4.88e6), ["Weights", "loaded,", "mean", "(MiB)", "9.31", "4.65", "0.50"]),
        ((9.76e9, 4.88e6), ["Weights", "loaded,", "mean", "(GiB)", "9.09", "0.00454", "<.01"]),
    ],
)
def test_weights_are_shown_in_mib_where_no_run_fills_a_gib(
    sizes: tuple[float, float], words: list[str]
) -> None:
    shown = summaries(("one", "two"))
    for summary, size in zip(shown, sizes, strict=True):
        summary["weight_bytes_loaded"] = size
    (row,) = [line for line in printed(summary_table(shown), 99).splitlines() if "Weights" in line]
    assert row.split() == [*words[:-1], times(words[-1])]
    narrow = printed(summary_table(shown), 50)
    assert f"Weights {words[3][1:-1]}" in narrow
