"""Pieces of a page in HTML: tables, terms, notes, tabs. Texts are escaped, markup is named so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from helios_sim.report.plotting import policy_colour


def notes(texts: Sequence[str], look: str = "notes") -> str:
    """Sentences one below the other; nothing without any."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="{look}">{items}</ul>' if texts else ""


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they mean, or hold."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f"<dl>{items}</dl>"


def folded(summary: str, markup: str) -> str:
    """Markup behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{markup}</details>"


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{escape(text)}</pre>"


def tabs(group: str, legend: str, panes: Sequence[tuple[str, str]], first: int = 0) -> str:
    """Panes of which one is shown, each a tab's label and content in markup; one alone has none."""
    options, shown = "", ""
    for place, (label, content) in enumerate(panes):
        name = f"pane{place}"
        checked, hidden = (" checked", "") if place == first else ("", " hidden")
        options += (
            f'<label><input type="radio" name="{group}" value="{name}"{checked}>{label}</label>'
        )
        shown += f'<div id="{name}" data-tabs="{group}"{hidden}>{content}</div>'
    if len(panes) < 2:
        return shown
    legend = f'<legend class="hidden">{escape(legend)}</legend>'
    return f'<fieldset class="tabs">{legend}{options}</fieldset>{shown}'


def swatch(place: int) -> str:
    """A square in the colour of the run at this place of the comparison."""
    name = policy_colour(place).removeprefix("@")
    return f'<span class="swatch" style="background:var(--{name})"></span>'


def table(look: str, head: Iterable[str], rows: Iterable[str], caption: str = "") -> str:
    """A table in a panel that scrolls; `look` are its attributes, head and rows markup."""
    named = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
    return (
        f'<div class="panel scroll"><table {look}>{named}<thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def titles(texts: Iterable[str]) -> list[str]:
    """The titles of a table's columns."""
    return [f'<th scope="col">{escape(text)}</th>' for text in texts]


def row(title: str, cells: Iterable[str], unit: str = "") -> str:
    """A row of a table under its title; `cells` are markup."""
    shown = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return f'<tr><th scope="row">{escape(title)}{shown}</th>{"".join(cells)}</tr>'


def group_row(title: str, num_columns: int) -> str:
    """The title of the rows below it."""
    return (
        f'<tr class="group"><th scope="rowgroup" colspan="{num_columns}">{escape(title)}</th></tr>'
    )


def cell(text: str, attributes: str = "") -> str:
    """A cell of a table."""
    return f"<td{attributes}>{escape(text)}</td>"
