"""The frame of a page: one self-contained file with its style, its figures and its script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

from helios_sim.report import markup
from helios_sim.report.plotting import Figure
from helios_sim.report.script import COLLECTOR, SCRIPT
from helios_sim.report.style import STYLE

CONTENT_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
"""Forbids the page every request to the network, so that it provably stands alone."""

_HEAD: Final = (
    "<!doctype html>",
    '<html lang="en">',
    "<head>",
    f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
)
"""How every page begins, and as good as no page of others."""


def is_own_page(path: Path) -> bool:
    """Whether a file is a page of this program, so that another may take its place."""
    if not path.is_file():
        return False
    head = "\n".join(_HEAD).encode()
    with path.open("rb") as file:
        return file.read(len(head)) == head


def document(title: str, sections: Sequence[str], drawn: Mapping[str, Figure]) -> str:
    """A whole page of sections, and the figures that they have places for."""
    data = json.dumps(drawn, allow_nan=False, sort_keys=True, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    return "\n".join(
        (
            *_HEAD,
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<script>{COLLECTOR}</script>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *(one for one in sections if one),
            "</main>",
            f'<script type="application/json" id="figures">{data}</script>',
            f"<script>{_plotly()}</script>",
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        )
    )


def _plotly() -> str:
    """The drawing library's own file, read without importing its Python side."""
    resource = files("plotly").joinpath("package_data", "plotly.min.js")
    return resource.read_text(encoding="utf-8").replace("</script", "<\\/script")


def opening(
    title: str, headline: str, remarks: Sequence[str], *, question: str = "", setting: str = ""
) -> str:
    """The head of a page: what was asked, in which setting, the answer, and what to know of it."""
    asked = f'<p class="question">{escape(question)}</p>' if question else ""
    where = f'<p class="small setting">{escape(setting)}</p>' if setting else ""
    return (
        f"<header><h1>{escape(title)}</h1>{asked}{where}"
        f'<p class="headline">{escape(headline)}</p>{markup.notes(remarks, "remarks")}</header>'
    )


def notes_section(texts: Sequence[str]) -> str:
    """The notes of whoever asked; nothing without any."""
    return section("Notes", "", markup.notes(texts)) if texts else ""


def section(title: str, lead: str, *parts: str) -> str:
    """A titled part of a page; `parts` are markup, title and lead plain text."""
    opening = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{opening}{''.join(parts)}</section>"


def add_figure(
    drawn: dict[str, Figure], name: str, figure: Figure, label: str, caption: str
) -> str:
    """Put a figure on the page, with what stands below it."""
    drawn[name] = figure
    height = int(figure["layout"]["height"])
    return (
        f'<figure class="panel"><div class="plot" id="{name}" role="img" '
        f'aria-label="{escape(label)}" style="height:{height}px"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
