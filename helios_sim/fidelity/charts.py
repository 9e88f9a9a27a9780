"""Figures of a comparison of real and simulated runs, as plain plotly data and layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final

import numpy as np
import polars as pl

from helios_sim.fidelity.assessment import Fidelity
from helios_sim.fidelity.figures import FigureRow, per_request, real_per_request
from helios_sim.fidelity.sides import Side, Sides
from helios_sim.fidelity.swaps import SMALL, Attribution
from helios_sim.fidelity.timing import TimingRow
from helios_sim.fidelity.words import TOLD, signed_percent
from helios_sim.report.plotting import (
    Figure,
    axes_of,
    bars,
    base_layout,
    error_bars,
    line,
    logarithmic,
    marks,
    panel,
    plain_axis,
    rounded,
    row_axis,
    stacked,
    top_legend,
)
from helios_sim.report.thinning import drawn_decisions, thinned
from helios_sim.wording import number

MAX_POINTS: Final = 2500
REAL: Final = "@c1"
OURS: Final = "@c2"
_SYMBOLS: Final = {
    "evaluate": "circle",
    "serve": "circle-open",
    "load-layers": "triangle-up",
    "switch": "diamond",
    "keep": "square-open",
}


def errors_figure(rows: Sequence[FigureRow]) -> Figure:
    """Each figure's error as a dot, with the run-to-run spread of the real side as a bar."""
    shown = [row for row in rows if row.median and row.error is not None]
    names = [escape(row.title) for row in shown]
    low = [percent_off(row.low, row.median) for row in shown]
    high = [percent_off(row.high, row.median) for row in shown]
    errors: list[float | None] = [100.0 * (row.error or 0.0) for row in shown]
    reach = max((abs(one) for one in (*errors, *low, *high) if one is not None), default=1.0)
    # Beyond this the small errors, which matter, could not be told apart.
    reach = min(1.15 * max(reach, 1.0), 60.0)
    return {
        "data": [
            spread_bars(names, low, high, 0.62) | {"name": "run-to-run spread of the real side"},
            error_marks(names, errors, reach, 9)
            | {
                "name": "simulated",
                "text": [
                    f"<b>{escape(row.title)}</b><br>real {number(row.median)} {escape(row.unit)}, "
                    f"simulated {number(row.simulated)}<br>{signed_percent(row.error)}, "
                    f"{TOLD[row.verdict]}"
                    for row in shown
                ],
                "hovertemplate": "%{text}<extra></extra>",
            },
        ],
        "layout": base_layout(
            96 + 21 * len(shown),
            barmode="overlay",
            legend=top_legend(y=1.005),
            xaxis=plain_axis(
                "difference to the median of the real runs",
                range=[-reach, reach],
                ticksuffix=" %",
                zeroline=True,
                zerolinecolor="@muted",
            ),
            yaxis=row_axis(showgrid=True),
        ),
    }


def spread_bars(
    rows: Sequence[str], low: Sequence[float | None], high: Sequence[float | None], width: float
) -> Figure:
    """The run-to-run spread of each row, in per cent; nothing where it is unknown."""
    ends = [(one or 0.0, other or 0.0) for one, other in zip(low, high, strict=True)]
    return bars(
        rounded([other - one for one, other in ends]),
        rows,
        f"{REAL}/0.28",
        edge={"width": 0},
        base=rounded([one for one, _ in ends]),
        width=width,
        hoverinfo="skip",
    )


def error_marks(
    rows: Sequence[str], errors: Sequence[float | None], reach: float, size: float
) -> Figure:
    """The error of each row, in per cent; an arrow at the end of the axis lies beyond it."""
    symbols = [
        "circle"
        if one is None or abs(one) <= reach
        else f"triangle-{'right' if one > 0 else 'left'}"
        for one in errors
    ]
    x = [None if one is None else max(-reach, min(reach, one)) for one in errors]
    return marks(rounded(x), rows, OURS, size, symbols, cliponaxis=False)


def percent_off(value: float | None, median: float | None) -> float | None:
    """How far a value lies from a median, in per cent of it; None where that is undefined."""
    if value is None or not median:
        return None
    return 100.0 * (value - median) / abs(median)


def scatter_figure(sides: Sides) -> Figure:
    """Predicted against real seconds of each request: TTFT, TPOT and E2E side by side."""
    real = real_per_request([per_request(side) for side in sides.reals])
    ours = per_request(sides.simulated)
    layout = base_layout(400, showlegend=False, margin={"l": 62, "r": 16, "t": 28, "b": 50})
    data: list[Figure] = []
    domains = ((0.0, 0.29), (0.355, 0.645), (0.71, 1.0))
    for at, (metric, title, unit, scale) in enumerate(
        (("ttft", "TTFT", "ms", 1e3), ("tpot", "TPOT", "ms", 1e3), ("e2e", "E2E", "s", 1.0))
    ):
        suffix = panel(at)
        both = (real[metric] > 0.0) & (ours[metric] > 0.0)
        x, y = scale * real[metric][both], scale * ours[metric][both]
        ids = np.flatnonzero(both)
        if x.size > MAX_POINTS:
            kept = np.linspace(0, x.size - 1, MAX_POINTS).astype(int)
            x, y, ids = x[kept], y[kept], ids[kept]
        least = float(min(x.min(), y.min())) if x.size else 1.0
        most = float(max(x.max(), y.max())) if x.size else 10.0
        least, most = least / 1.1, most * 1.1
        ends, axes = [least, most], axes_of(at)
        dots = marks(
            rounded(x, 4),
            rounded(y, 4),
            f"{OURS}/0.45",
            5,
            type="scattergl" if x.size > 1000 else "scatter",
            customdata=ids.tolist(),
            hover=f"request %{{customdata}}<br>real %{{x:.4~g}} {unit}, "
            f"simulated %{{y:.4~g}} {unit}",
            **axes,
        )
        dots["marker"]["line"] = {"width": 0}
        data += [line(ends, ends, "@muted", 1, dash="dot", hoverinfo="skip", **axes), dots]
        shared = {"range": [math.log10(least), math.log10(most)], **logarithmic(ends)}
        layout[f"xaxis{suffix}"] = plain_axis(
            f"{title} real ({unit})", domain=list(domains[at]), anchor=f"y{suffix}", **shared
        )
        layout[f"yaxis{suffix}"] = plain_axis(
            "simulated" if at == 0 else None, anchor=f"x{suffix}", **shared
        )
    return {"data": data, "layout": layout}


def timing_figure(rows: Sequence[TimingRow]) -> Figure:
    """Iteration times by batch: recorded with their middle 80 %, and predicted."""
    layout = base_layout(
        380,
        legend=top_legend(y=1.06),
        margin={"l": 62, "r": 16, "t": 40, "b": 50},
    )
    data: list[Figure] = []
    models = list(dict.fromkeys(row.model for row in rows))
    for at, (kind, title) in enumerate(
        (("decode", "decode, rows computed"), ("prefill", "prefill, prompt tokens up to"))
    ):
        suffix = panel(at)
        for place, model in enumerate(models):
            mine = [row for row in rows if row.model == model and row.kind == kind]
            if not mine:
                continue
            colour = f"@m{place % 4 + 1}"
            shared = {"showlegend": at == 0, "legendgroup": model, **axes_of(at)}
            x = [row.batch for row in mine]
            above = rounded([row.high_ms - row.recorded_ms for row in mine])
            below = rounded([row.recorded_ms - row.low_ms for row in mine])
            data += [
                marks(
                    x,
                    rounded([row.recorded_ms for row in mine]),
                    colour,
                    6,
                    name=f"{escape(model)}, recorded",
                    error_y=error_bars(above, below, f"{colour}/0.5", thickness=1.4, width=0),
                    text=[f"{row.num_iterations:,}" for row in mine],
                    hover=f"<b>{escape(model)}</b>, recorded<br>%{{x}}: %{{y:.4~g}} ms "
                    "(%{text} iterations)",
                    **shared,
                ),
                line(
                    x,
                    rounded([row.predicted_ms for row in mine]),
                    colour,
                    1.8,
                    dash="dash",
                    mode="lines" if len(mine) > 1 else "markers",
                    name=f"{escape(model)}, predicted",
                    marker={"color": colour, "symbol": "line-ew-open", "size": 11},
                    hover=f"<b>{escape(model)}</b>, predicted<br>%{{x}}: %{{y:.4~g}} ms",
                    **shared,
                ),
            ]
        layout[f"xaxis{suffix}"] = plain_axis(
            title,
            domain=[0.0, 0.47] if at == 0 else [0.55, 1.0],
            anchor=f"y{suffix}",
            **({"rangemode": "tozero"} if at == 0 else {"type": "log"}),
        )
        layout[f"yaxis{suffix}"] = plain_axis(
            "median ms" if at == 0 else None, anchor=f"x{suffix}", rangemode="tozero"
        )
        if at == 1:
            classes = sorted({row.batch for row in rows if row.kind == kind})
            layout["xaxis2"] |= {"tickvals": classes, "ticktext": list(map(number, classes))}
    return {"data": data, "layout": layout}


def overlay_figure(sides: Sides) -> Figure:
    """Running and waiting requests and power over time, both sides over each other."""
    frames = [thinned(side.run.timeline) for side in (*sides.reals, sides.simulated)]
    panels = [("mean_running", "running", 1.0), ("waiting", "waiting", 0.8)]
    if any(frame["power_w"].null_count() < frame.height for frame in frames):
        panels.append(("power_w", "power (W)", 0.8))
    end_s = max(side.run.totals.end_s for side in (*sides.reals, sides.simulated))
    layout = base_layout(
        90 + int(160 * sum(share for _, _, share in panels)),
        legend=top_legend(y=1.03),
        margin={"l": 66, "r": 16, "t": 44, "b": 46},
    )
    stacked(layout, [(title, share) for _, title, share in panels], 0.05)
    data: list[Figure] = []
    num = len(sides.reals)
    for at, (column, title, _) in enumerate(panels):
        suffix = panel(at)
        for place, frame in enumerate(frames):
            is_real = place < num
            steps = line(
                rounded(frame["start_s"]),
                rounded(frame[column].cast(pl.Float64).fill_null(math.nan), 4),
                (REAL if num == 1 else f"{REAL}/0.55") if is_real else OURS,
                1.3 if is_real else 1.7,
                name=("real" if num == 1 else f"real, {num} runs") if is_real else "simulated",
                legendgroup="real" if is_real else "simulated",
                showlegend=at == 0 and place in (0, num),
                yaxis=f"y{suffix}",
                hover=f"%{{y:.4~g}} {title} at %{{x:.4~g}} s",
            )
            steps["line"]["shape"] = "hv"
            data.append(steps)
    layout["xaxis"] = plain_axis(
        "seconds since the start", anchor=f"y{len(panels)}", range=[0, end_s]
    )
    return {"data": data, "layout": layout}


def decisions_figure(sides: Sides) -> Figure:
    """What each side decided and when: a lane a run, a mark a decision."""
    lanes: list[tuple[str, Side, str]] = []
    for place, side in enumerate(sides.reals):
        name = "real" if len(sides.reals) == 1 else f"real {place + 1}"
        lanes.append((name, side, REAL))
    lanes.append(("simulated", sides.simulated, OURS))
    drawn = [drawn_decisions(side.run.decisions) for _, side, _ in lanes]
    data: list[Figure] = []
    present = {kind for decisions in drawn for kind in decisions["decision"].unique()}
    for kind, symbol in _SYMBOLS.items():
        if kind not in present:
            continue
        x: list[float | None] = []
        y, text, colours = [], [], []
        for (name, _, colour), decisions in zip(lanes, drawn, strict=True):
            rows = decisions.filter(pl.col("decision") == kind)
            x += rounded(rows["time_s"], 7)
            y += [name] * rows.height
            colours += [colour] * rows.height
            text += [
                f"<b>{kind}</b> {escape(row['model'] or '')} at {row['depth']} layers<br>"
                f"{row['time_s']:,.2f} s, asked on {escape(row['event'])}"
                for row in rows.iter_rows(named=True)
            ]
        found = marks(
            x, y, colours, 10, symbol, name=kind, text=text, cliponaxis=False, hover="%{text}"
        )
        found["marker"]["line"] = {"width": 1.4, "color": colours}
        data.append(found)
    end_s = max(side.run.totals.end_s for _, side, _ in lanes)
    return {
        "data": data,
        "layout": base_layout(
            110 + 34 * len(lanes),
            legend=top_legend(y=1.06),
            xaxis=plain_axis("seconds since the start", range=[-0.01 * end_s, 1.01 * end_s]),
            yaxis=plain_axis(
                type="category",
                categoryorder="array",
                categoryarray=[name for name, _, _ in lanes][::-1],
                range=[-0.6, len(lanes) - 0.4],
                tickfont={"color": "@ink", "size": 12.5},
            ),
        ),
    }


def attribution_figure(fidelity: Fidelity, attribution: Attribution) -> Figure:
    """The error of each headline figure with nothing, each ingredient and everything swapped."""
    swaps = attribution.telling
    causes = [one for one in attribution.causes if one.error and abs(one.error) > SMALL]
    names = []
    for cause in causes:
        row = fidelity.row(cause.key)
        names.append(escape(cause.key if row is None else row.title))
    colours = ["@ink", "@c1", "@c3", "@c2", "@c5", "@c4", "@m1", "@c7", "@c6"]
    every = [
        abs(error)
        for swap in swaps
        for cause in causes
        if (error := attribution.error(swap, cause.key)) is not None
    ]
    reach = min(100.0 * max(every, default=0.01) * 1.15 + 0.1, 120.0)
    swapped = [swap.name for swap in attribution.swaps]
    colour_of = dict(zip(swapped, colours, strict=True))
    data: list[Figure] = []
    for swap in swaps:
        errors = [attribution.error(swap, cause.key) for cause in causes]
        x = [None if one is None else max(-reach, min(reach, 100.0 * one)) for one in errors]
        data.append(
            bars(
                rounded(x, 4),
                names,
                colour_of[swap.name],
                name=escape(swap.title),
                text=[signed_percent(one) for one in errors],
                textposition="none",
                hover=f"<b>%{{y}}</b><br>{escape(swap.title)}: %{{text}}",
            )
        )
    return {
        "data": data,
        "layout": base_layout(
            130 + len(names) * (14 + 10 * len(swaps)),
            barmode="group",
            bargap=0.28,
            legend=top_legend(y=1.01, traceorder="normal"),
            xaxis=plain_axis(
                f"difference to {attribution.repeat}",
                range=[-reach, reach],
                ticksuffix=" %",
                zeroline=True,
                zerolinecolor="@muted",
            ),
            yaxis=row_axis(),
            margin={"l": 60, "r": 16, "t": 66, "b": 46},
        ),
    }
