"""What figures are made of, as plain plotly data: layouts, axes, and lines, marks and bars.

Colours are names of the style sheet's variables ("@c1", "@m2/0.5"); the page's script puts the
theme's values in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from helios_sim.report.style import NUM_POLICY_COLOURS
from helios_sim.wording import number

Figure = dict[str, Any]

_FONT: Final = 'Inter, "Segoe UI", system-ui, -apple-system, "Helvetica Neue", Arial, sans-serif'


def policy_colour(place: int) -> str:
    """Colour of the run at this place of the comparison."""
    return f"@c{place % NUM_POLICY_COLOURS + 1}"


def rounded(values: Any, digits: int = 5) -> list[float | None]:
    """Numbers at so many significant digits, None for what is unknown or not finite."""
    return [
        None if value is None or not math.isfinite(value) else float(f"{float(value):.{digits}g}")
        for value in values
    ]


def line(
    x: Any, y: Any, colour: str, width: float = 2, *, dash: str = "", hover: str = "", **more: Any
) -> Figure:
    """A line from point to point, with what is said of each on hover and `more` on top."""
    stroke = {"color": colour, "width": width} | ({"dash": dash} if dash else {})
    return _trace("scatter", x, y, hover, mode="lines", line=stroke) | more


def marks(
    x: Any, y: Any, colour: Any, size: Any, symbol: Any = "", *, hover: str = "", **more: Any
) -> Figure:
    """A mark at each point, with what is said of each on hover and `more` on top."""
    marker = {"color": colour, "size": size} | ({"symbol": symbol} if symbol else {})
    return _trace("scatter", x, y, hover, mode="markers", marker=marker) | more


def bars(
    x: Any, y: Any, colour: str, *, edge: Figure | None = None, hover: str = "", **more: Any
) -> Figure:
    """Horizontal bars of lengths `x` in rows `y`, with what is said of each and `more` on top."""
    marker = {"color": colour} | ({} if edge is None else {"line": edge})
    return _trace("bar", x, y, hover, orientation="h", marker=marker) | more


def _trace(kind: str, x: Any, y: Any, hover: str, **more: Any) -> Figure:
    told = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {}
    return {"type": kind, "x": x, "y": y, **more, **told}


def text_inside(text: Sequence[str], ink: str) -> Figure:
    """Texts in the middle of bars."""
    return {
        "text": text,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "textfont": {"color": ink, "size": 12},
    }


def text_beside(text: Sequence[str]) -> Figure:
    """Texts at the ends of bars."""
    return {
        "text": text,
        "textposition": "outside",
        "textfont": {"size": 11, "color": "@ink"},
        "cliponaxis": False,
    }


def error_bars(above: Any, below: Any, colour: str, *, thickness: float, width: float) -> Figure:
    """Bars from each mark up and down, so far each."""
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": colour,
        "thickness": thickness,
        "width": width,
    }


def line_at(width: float = 1.2, *, x: float | None = None, y: float | None = None) -> Figure:
    """A dotted line across a figure, at a place on one of its axes."""
    across = {"type": "line", "line": {"color": "@muted", "width": width, "dash": "dot"}}
    if x is not None:
        return across | {"xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1}
    return across | {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": y, "y1": y}


def panel(at: int) -> str:
    """What plotly adds to the names of the axes of a figure's panel, from 0 on."""
    return "" if at == 0 else str(at + 1)


def axes_of(at: int) -> Figure:
    """What puts a line, marks or bars into a figure's panel, from 0 on."""
    return {"xaxis": f"x{panel(at)}", "yaxis": f"y{panel(at)}"}


def panel_title(at: int, title: str, size: float) -> Figure:
    """A title above a figure's panel, from 0 on."""
    return {
        "xref": f"x{panel(at)} domain",
        "yref": f"y{panel(at)} domain",
        "x": 0,
        "y": 1.02,
        "xanchor": "left",
        "yanchor": "bottom",
        "text": title,
        "showarrow": False,
        "font": {"size": size, "color": "@ink"},
    }


def stacked(layout: Figure, panels: Sequence[tuple[str, float]], gap: float) -> None:
    """Give panels, by title and share of the height, their y axes one below the other."""
    top, whole = 1.0, sum(share for _, share in panels)
    for at, (title, share) in enumerate(panels):
        height = share / whole * (1.0 - gap * (len(panels) - 1))
        layout[f"yaxis{panel(at)}"] = plain_axis(
            title, domain=[max(0.0, top - height), top], rangemode="tozero", nticks=5
        )
        top -= height + gap


def base_layout(height: int, **more: Any) -> Figure:
    """What every figure looks like, with `more` on top."""
    return {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 28, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 12.5, "color": "@ink"},
        "hoverlabel": {
            "bgcolor": "@panel",
            "bordercolor": "@line",
            "font": {"color": "@ink", "size": 12.5, "family": _FONT},
            "align": "left",
        },
        "uirevision": "keep",
        **more,
    }


def plain_axis(title: str | None = None, **more: Any) -> Figure:
    """An axis in the page's colours, with `more` on top."""
    axis = {
        "gridcolor": "@grid",
        "linecolor": "@line",
        "zerolinecolor": "@line",
        "tickfont": {"color": "@muted", "size": 11.5},
        "automargin": True,
        **more,
    }
    if title is not None:
        axis["title"] = {"text": title, "font": {"size": 12, "color": "@muted"}, "standoff": 8}
    return axis


def row_axis(**more: Any) -> Figure:
    """The axis of horizontal rows that have names, the first on top, with `more` on top."""
    return plain_axis(
        type="category",
        autorange="reversed",
        ticks="outside",
        ticklen=6,
        tickcolor="rgba(0,0,0,0)",
        **{"tickfont": {"color": "@ink", "size": 12}, **more},
    )


def logarithmic(values: Sequence[float]) -> Figure:
    """What makes an axis logarithmic, with round ticks over positive values where there are any."""
    return {"type": "log", **(ticks(min(values), max(values)) if values else {})}


def ticks(low: float, high: float) -> Figure:
    """Round ticks of a logarithmic axis, in the words of the page."""
    places = log_ticks(low, high)
    return {"tickvals": places, "ticktext": [number(place) for place in places]}


def log_ticks(low: float, high: float) -> list[float]:
    """Round places on a logarithmic axis, the fewer a decade the more decades there are."""
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    for least, fewer in ((0.35, (1, 1.5, 2, 3, 4, 5, 7)), (0.8, (1, 2, 5)), (2.4, (1,))):
        if decades > least:
            steps = fewer
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{exponent}") for exponent in exponents for step in steps]
    return [tick for tick in ticks if 0.7 * low <= tick <= 1.4 * high]


def top_legend(**more: Any) -> Figure:
    """A legend above the figure, with `more` on top."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "font": {"size": 12.5, "color": "@ink"},
        "bgcolor": "rgba(0,0,0,0)",
        **more,
    }
