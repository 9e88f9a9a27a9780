"""A calibration's figures: plain plotly data and layouts in the style of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting.check import MEDIAN_BAR, MEMORY, NAMES, P95_BAR, place_of
from calibration.fitting.points import DECODE_WINDOWS, HELD_OUT, WHOLE_WINDOWS, of_quantity
from calibration.fitting.predict import Predictor
from helios_sim.profile import curve
from helios_sim.report.figures import (
    Figure,
    base_layout,
    log_ticks,
    plain_axis,
    policy_colour,
    rounded,
    top_legend,
)
from helios_sim.wording import number

_COLUMNS: Final = 3
_PANEL_HEIGHT: Final = 190
_UNITS: Final = {"time": ("ms", 1e3), "energy": ("J", 1.0)}
_FIT_COLOUR: Final = "@c1"
_HELD_OUT_COLOUR: Final = "@c2"


def _kind(quantity: str) -> str:
    return "energy" if quantity.endswith("_energy") else "time"


def error_figure(compared: pl.DataFrame) -> Figure:
    """A panel a quantity: relative error over the measured value, fitted and held-out points.

    Memory is left to its table: few values, far apart.
    """
    quantities = [
        name for name in NAMES if name not in MEMORY and (compared["quantity"] == name).any()
    ]
    rows = math.ceil(len(quantities) / _COLUMNS)
    layout = base_layout(
        40 + _PANEL_HEIGHT * rows,
        legend=top_legend(y=1.0 + 34 / (_PANEL_HEIGHT * rows)),
        hovermode="closest",
        shapes=[],
        annotations=[],
        margin={"l": 60, "r": 16, "t": 62, "b": 4},
    )
    data: list[Figure] = []
    for at, quantity in enumerate(quantities):
        suffix = "" if at == 0 else str(at + 1)
        part = compared.filter(pl.col("quantity") == quantity)
        layout |= _error_axes(part, quantity, suffix, at, rows)
        layout["annotations"].append(_panel_title(quantity, suffix))
        if _kind(quantity) == "time":
            layout["shapes"] += _bands(suffix)
        data += _error_points(part, quantity, suffix)
    # The legend names each kind of point once, by the first panel that has any.
    for first in {trace["name"]: trace for trace in reversed(data)}.values():
        first["showlegend"] = True
    return {"data": data, "layout": layout}


def _error_axes(part: pl.DataFrame, quantity: str, suffix: str, at: int, rows: int) -> Figure:
    """The axes of the panel at a place of so many rows."""
    unit, scale = _UNITS[_kind(quantity)]
    column, row = at % _COLUMNS, at // _COLUMNS
    left = column / _COLUMNS + (0.045 if column else 0.0)
    high = 1.0 - row / rows
    low = high - 0.64 / rows
    high -= 0.04 / rows
    values = part["measured"].to_numpy() * scale
    largest = max(0.1, 1.15 * float(part["error"].abs().max() or 0.0))  # type: ignore[arg-type]
    ticks = log_ticks(float(values.min()) * 0.8, float(values.max()) * 1.25)
    shown = ticks[:: max(1, math.ceil(len(ticks) / 6))]
    return {
        f"xaxis{suffix}": plain_axis(
            unit,
            type="log",
            domain=[left, (column + 1) / _COLUMNS],
            anchor=f"y{suffix}",
            tickvals=shown,
            ticktext=[number(tick) for tick in shown],
        ),
        f"yaxis{suffix}": plain_axis(
            None,
            domain=[low, high],
            anchor=f"x{suffix}",
            range=[-largest, largest],
            tickformat=".0%",
            nticks=5,
        ),
    }


def _panel_title(quantity: str, suffix: str) -> Figure:
    """A quantity's name above its panel."""
    return {
        "xref": f"x{suffix} domain",
        "yref": f"y{suffix} domain",
        "x": 0,
        "y": 1.02,
        "text": escape(NAMES[quantity]),
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "bottom",
        "font": {"size": 12.5, "color": "@ink"},
    }


def _bands(suffix: str) -> list[Figure]:
    """Bands across a panel: the bars that the median and 95th percentile of times are held to."""
    return [
        {
            "type": "rect",
            "xref": f"x{suffix} domain",
            "yref": f"y{suffix}",
            "x0": 0,
            "x1": 1,
            "y0": -bar,
            "y1": bar,
            "line": {"width": 0},
            "fillcolor": f"@c3/{shade}",
            "layer": "below",
        }
        for bar, shade in ((P95_BAR, 0.10), (MEDIAN_BAR, 0.16))
    ]


def _error_points(part: pl.DataFrame, quantity: str, suffix: str) -> list[Figure]:
    """A panel's points, those of the fit and those held out of it, as far as there are any."""
    unit, scale = _UNITS[_kind(quantity)]
    held_out = pl.col("purpose") == HELD_OUT
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "legendgroup": label,
            "showlegend": False,
            "x": rounded(chosen["measured"].to_numpy() * scale),
            "y": rounded(chosen["error"], 4),
            "text": [
                escape(f"{row['model']} {place_of(row)}") for row in chosen.iter_rows(named=True)
            ],
            "xaxis": f"x{suffix}",
            "yaxis": f"y{suffix}",
            "marker": {"color": f"{colour}/0.75", "size": 6.5, "symbol": symbol},
            "hovertemplate": f"%{{text}}<br>%{{x:.4~g}} {unit}, %{{y:+.1%}}<extra></extra>",
        }
        for label, colour, symbol, chosen in (
            ("fitted points", _FIT_COLOUR, "circle", part.filter(~held_out)),
            ("held-out points", _HELD_OUT_COLOUR, "diamond", part.filter(held_out)),
        )
        if chosen.height
    ]


def layer_figure(
    points: pl.DataFrame,
    predictor: Predictor,
    mode: str,
    copy_bytes_per_s: float | None,
    launch_s: float | None,
) -> Figure:
    """Decode time per layer against batch: points of equal rows, the profile, and the floors."""
    model = predictor.model.model
    decode = of_quantity(points, "decode_layers", mode)
    ragged = pl.col("longest_context_tokens") > pl.col("context_tokens")
    decode = decode.filter(~ragged.fill_null(False))
    decode = decode.filter(pl.col("layers") == pl.col("layers").max())
    contexts = decode["context_tokens"].fill_null(0).unique().sort().to_list()
    if len(contexts) > 4:
        counts = decode.group_by("context_tokens").len().sort("len", "context_tokens")
        kept = counts.tail(4)["context_tokens"].to_list()
        contexts = [context for context in contexts if context in kept]
    overhead = predictor.stack_overhead_s.get("decode", 0.0)
    largest = int(decode["batch"].max() or 1)  # type: ignore[arg-type]
    batches = np.unique(np.round(np.geomspace(1, largest, 60)).astype(int))
    data: list[Figure] = []
    for place, context in enumerate(contexts):
        colour = policy_colour(place)
        mine = decode.filter(pl.col("context_tokens").fill_null(0) == context).sort("batch")
        seconds = (mine["seconds"] - overhead) / mine["layers"]
        curve = [
            predictor.layer_seconds({"batch": int(b), "context_tokens": context, "mode": mode})
            for b in batches
        ]
        label = f"{number(context)} tokens a row"
        data += [
            {
                "type": "scatter",
                "mode": "lines",
                "name": label,
                "legendgroup": label,
                "x": batches.tolist(),
                "y": rounded([1e6 * second for second in curve]),
                "line": {"color": colour, "width": 2},
                "hovertemplate": f"profile, {label}<br>%{{y:.4~g}} us at batch %{{x}}"
                "<extra></extra>",
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "legendgroup": label,
                "showlegend": False,
                "x": mine["batch"].to_list(),
                "y": rounded(1e6 * seconds.to_numpy()),
                "marker": {"color": colour, "size": 8},
                "hovertemplate": f"measured, {label}<br>%{{y:.4~g}} us at batch %{{x}}"
                "<extra></extra>",
            },
        ]
        if copy_bytes_per_s and context in (contexts[0], contexts[-1]):
            floor = [
                (model.layer_weight_bytes() + b * context * model.kv_bytes_per_token(1))
                / copy_bytes_per_s
                for b in batches
            ]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"memory floor, {label}",
                    "x": batches.tolist(),
                    "y": rounded([1e6 * second for second in floor]),
                    "line": {"color": colour, "width": 1.3, "dash": "dash"},
                    "hovertemplate": f"memory floor, {label}<br>%{{y:.4~g}} us<extra></extra>",
                }
            )
    if launch_s:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "launch floor",
                "x": [1, largest],
                "y": rounded([1e6 * launch_s] * 2),
                "line": {"color": "@muted", "width": 1.5, "dash": "dot"},
                "hovertemplate": "launch floor<br>%{y:.4~g} us<extra></extra>",
            }
        )
    ticks = [2**power for power in range(int(math.log2(largest)) + 1)]
    layout = base_layout(
        390,
        legend=top_legend(),
        hovermode="closest",
        margin={"l": 64, "r": 16, "t": 64, "b": 50},
        xaxis=plain_axis("batch (rows)", type="log", tickvals=ticks),
        yaxis=_log_axis("microseconds per layer", data),
    )
    return {"data": data, "layout": layout}


def depth_figure(models: Sequence[tuple[str, pl.DataFrame, Predictor, str]]) -> Figure:
    """Layer time by loaded depth over what it is with all layers: points and the profile.

    `models` are (name, points, predictor, mode). A point is the median over all loads of a
    depth, with the middle half of them as its bar, over what the profile has without this factor.
    """
    data: list[Figure] = []
    deepest = 1
    for place, (name, points, predictor, mode) in enumerate(models):
        decode = of_quantity(points, "decode_layers", mode)
        bare = predictor.without_depth()
        overhead = predictor.stack_overhead_s.get("decode", 0.0)
        shares: dict[int, list[float]] = {}
        for row in decode.iter_rows(named=True):
            seen = (row["seconds"] - overhead) / row["layers"]
            shares.setdefault(row["layers"], []).append(seen / bare.layer_seconds(row))
        depths = sorted(shares)
        deepest = max(deepest, *depths)
        low, middle, high = (
            np.array([np.quantile(shares[depth], part) for depth in depths])
            for part in (0.25, 0.5, 0.75)
        )
        line = np.arange(depths[0], depths[-1] + 1, dtype=np.float64)
        factors = curve(predictor.model.depth_residual, line)
        colour = policy_colour(place)
        common = {"type": "scatter", "name": escape(name), "legendgroup": name}
        data += [
            common
            | {
                "mode": "lines",
                "x": line.astype(int).tolist(),
                "y": rounded(factors.tolist(), 4),
                "line": {"color": colour, "width": 2},
                "hovertemplate": f"profile, {escape(name)}<br>%{{y:.3f}} with %{{x}} layers loaded"
                "<extra></extra>",
            },
            common
            | {
                "mode": "markers",
                "showlegend": False,
                "x": depths,
                "y": rounded(middle, 4),
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": rounded(high - middle, 4),
                    "arrayminus": rounded(middle - low, 4),
                    "thickness": 1.2,
                    "width": 4,
                    "color": colour,
                },
                "marker": {"color": colour, "size": 8},
                "hovertemplate": f"measured, {escape(name)}<br>%{{y:.3f}} with %{{x}} layers loaded"
                "<extra></extra>",
            },
        ]
    layout = base_layout(
        320,
        legend=top_legend(),
        hovermode="closest",
        margin={"l": 64, "r": 16, "t": 44, "b": 50},
        xaxis=plain_axis("layers loaded", range=[0, deepest + 0.5]),
        yaxis=plain_axis("layer time over that with all loaded", rangemode="tozero"),
    )
    return {"data": data, "layout": layout}


def _log_axis(title: str, data: Sequence[Figure]) -> Figure:
    """A logarithmic axis with round ticks over all that is drawn."""
    values = [value for trace in data for value in trace["y"] if value]
    if not values:
        return plain_axis(title, type="log")
    ticks = log_ticks(min(values), max(values))
    return plain_axis(title, type="log", tickvals=ticks, ticktext=[number(tick) for tick in ticks])


def energy_figure(points: pl.DataFrame, predictor: Predictor) -> Figure:
    """Joules per token of decodes at their deepest, by batch: windows and the profile."""
    decode = points.filter(
        pl.col("quantity").is_in(DECODE_WINDOWS) & (pl.col("joules") > 0.0) & (pl.col("batch") > 0)
    )
    decode = decode.filter(pl.col("layers") == pl.col("layers").max()).sort("batch")
    joules = decode["joules"].to_numpy() / decode["batch"].to_numpy()
    predicted = [
        (predictor.joules(row) or 0.0) / row["batch"] for row in decode.iter_rows(named=True)
    ]
    places = [
        f"{'whole' if row['quantity'] in WHOLE_WINDOWS else 'layers alone'}, {place_of(row)}"
        for row in decode.iter_rows(named=True)
    ]
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": decode["batch"].to_list(),
            "y": rounded(values),
            "text": places,
            "marker": {"color": colour, "size": 9, "symbol": symbol},
            "hovertemplate": f"{name}, %{{text}}<br>%{{y:.4~g}} J a token<extra></extra>",
        }
        for name, values, colour, symbol in (
            ("measured", joules, _FIT_COLOUR, "circle"),
            ("profile", predicted, _HELD_OUT_COLOUR, "x-thin-open"),
        )
    ]
    largest = int(decode["batch"].max() or 1)  # type: ignore[arg-type]
    layout = base_layout(
        340,
        legend=top_legend(),
        hovermode="closest",
        margin={"l": 70, "r": 16, "t": 44, "b": 50},
        xaxis=plain_axis(
            "batch (rows)",
            type="log",
            tickvals=[2**power for power in range(int(math.log2(largest)) + 1)],
        ),
        yaxis=_log_axis("joules per token", data),
    )
    return {"data": data, "layout": layout}


def loading_figure(compared: pl.DataFrame, links: Sequence[tuple[str, Any]]) -> Figure:
    """Seconds of a load against its bytes: points and the line alpha + bytes / rate."""
    data: list[Figure] = []
    values: list[float] = []
    for place, (quantity, link) in enumerate(links):
        mine = compared.filter(pl.col("quantity") == quantity).sort("bytes")
        if not mine.height:
            continue
        size = mine["bytes"].cast(pl.Float64).to_numpy()
        line = np.geomspace(size.min() / 1.3, size.max() * 1.3, 40)
        seconds = [link.seconds(one) for one in line]
        values += [1e3 * min(seconds), 1e3 * max(seconds), *(1e3 * mine["measured"]).to_list()]
        common = {"type": "scatter", "legendgroup": quantity, "name": NAMES[quantity]}
        colour = policy_colour(place)
        data += [
            common
            | {
                "mode": "lines",
                "x": rounded(line / 2**20),
                "y": rounded([1e3 * second for second in seconds]),
                "line": {"color": colour, "width": 2},
                "hoverinfo": "skip",
            },
            common
            | {
                "mode": "markers",
                "showlegend": False,
                "x": rounded(size / 2**20),
                "y": rounded(1e3 * mine["measured"].to_numpy()),
                "marker": {"color": colour, "size": 8},
                "hovertemplate": f"{NAMES[quantity]}<br>%{{x:.4~g}} MiB in %{{y:.4~g}} ms"
                "<extra></extra>",
            },
        ]
    ticks = log_ticks(min(values), max(values)) if values else []
    layout = base_layout(
        330,
        legend=top_legend(),
        hovermode="closest",
        margin={"l": 64, "r": 16, "t": 44, "b": 50},
        xaxis=plain_axis("MiB moved", type="log"),
        yaxis=plain_axis(
            "milliseconds", type="log", tickvals=ticks, ticktext=[number(tick) for tick in ticks]
        ),
    )
    return {"data": data, "layout": layout}


def reliability_figure(curves: Sequence[tuple[str, Sequence[tuple[float, float, int]]]]) -> Figure:
    """Share of tokens that agree with the full model against the confidence at an exit.

    Each curve is (label, [(mean confidence, agreement, tokens), ...]); a calibrated confidence
    lies on the diagonal.
    """
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "calibrated",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": "@muted", "width": 1.2, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    for place, (label, bins) in enumerate(curves):
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(label),
                "x": rounded([one[0] for one in bins], 4),
                "y": rounded([one[1] for one in bins], 4),
                "customdata": [one[2] for one in bins],
                "line": {"color": policy_colour(place), "width": 1.8},
                "marker": {"size": 5.5},
                "hovertemplate": f"<b>{escape(label)}</b><br>confidence %{{x:.2f}}: %{{y:.1%}} "
                "agree, %{customdata} tokens<extra></extra>",
            }
        )
    layout = base_layout(
        380,
        legend=top_legend(),
        hovermode="closest",
        margin={"l": 64, "r": 16, "t": 84, "b": 50},
        xaxis=plain_axis("confidence at the exit", range=[0, 1.01]),
        yaxis=plain_axis("agrees with the full model", range=[0, 1.02], tickformat=".0%"),
    )
    return {"data": data, "layout": layout}
