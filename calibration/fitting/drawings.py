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
from helios_sim.report.plotting import (
    Figure,
    axes_of,
    base_layout,
    error_bars,
    line,
    log_ticks,
    logarithmic,
    marks,
    panel,
    panel_title,
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
        shapes=[],
        annotations=[],
        margin={"l": 60, "r": 16, "t": 62, "b": 4},
    )
    data: list[Figure] = []
    for at, quantity in enumerate(quantities):
        part = compared.filter(pl.col("quantity") == quantity)
        layout |= _error_axes(part, quantity, at, rows)
        layout["annotations"].append(panel_title(at, escape(NAMES[quantity]), 12.5))
        if _kind(quantity) == "time":
            layout["shapes"] += _bands(at)
        data += _error_points(part, quantity, at)
    # The legend names each kind of point once, by the first panel that has any.
    for first in {trace["name"]: trace for trace in reversed(data)}.values():
        first["showlegend"] = True
    return {"data": data, "layout": layout}


def _error_axes(part: pl.DataFrame, quantity: str, at: int, rows: int) -> Figure:
    """The axes of the panel at a place of so many rows."""
    suffix = panel(at)
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


def _bands(at: int) -> list[Figure]:
    """Bands across a panel: the bars that the median and 95th percentile of times are held to."""
    return [
        {
            "type": "rect",
            "xref": f"x{panel(at)} domain",
            "yref": f"y{panel(at)}",
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


def _error_points(part: pl.DataFrame, quantity: str, at: int) -> list[Figure]:
    """A panel's points, those of the fit and those held out of it, as far as there are any."""
    unit, scale = _UNITS[_kind(quantity)]
    held_out = pl.col("purpose") == HELD_OUT
    return [
        marks(
            rounded(chosen["measured"].to_numpy() * scale),
            rounded(chosen["error"], 4),
            f"{colour}/0.75",
            6.5,
            symbol,
            name=label,
            legendgroup=label,
            showlegend=False,
            text=[
                escape(f"{row['model']} {place_of(row)}") for row in chosen.iter_rows(named=True)
            ],
            hover=f"%{{text}}<br>%{{x:.4~g}} {unit}, %{{y:+.1%}}",
            **axes_of(at),
        )
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
        data += _measured_on(
            line(
                batches.tolist(),
                rounded([1e6 * second for second in curve]),
                colour,
                hover=f"profile, {label}<br>%{{y:.4~g}} us at batch %{{x}}",
            ),
            marks(
                mine["batch"].to_list(),
                rounded(1e6 * seconds.to_numpy()),
                colour,
                8,
                hover=f"measured, {label}<br>%{{y:.4~g}} us at batch %{{x}}",
            ),
            label,
        )
        if copy_bytes_per_s and context in (contexts[0], contexts[-1]):
            floor = [
                (model.layer_weight_bytes() + b * context * model.kv_bytes_per_token(1))
                / copy_bytes_per_s
                for b in batches
            ]
            data.append(
                line(
                    batches.tolist(),
                    rounded([1e6 * second for second in floor]),
                    colour,
                    1.3,
                    dash="dash",
                    name=f"memory floor, {label}",
                    hover=f"memory floor, {label}<br>%{{y:.4~g}} us",
                )
            )
    if launch_s:
        data.append(
            line(
                [1, largest],
                rounded([1e6 * launch_s] * 2),
                "@muted",
                1.5,
                dash="dot",
                name="launch floor",
                hover="launch floor<br>%{y:.4~g} us",
            )
        )
    layout = base_layout(
        390,
        legend=top_legend(),
        margin={"l": 64, "r": 16, "t": 64, "b": 50},
        xaxis=_batch_axis(largest),
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
        every = np.arange(depths[0], depths[-1] + 1, dtype=np.float64)
        factors = curve(predictor.model.depth_residual, every)
        colour = policy_colour(place)
        above, below = rounded(high - middle, 4), rounded(middle - low, 4)
        data += _measured_on(
            line(
                every.astype(int).tolist(),
                rounded(factors.tolist(), 4),
                colour,
                hover=f"profile, {escape(name)}<br>%{{y:.3f}} with %{{x}} layers loaded",
            ),
            marks(
                depths,
                rounded(middle, 4),
                colour,
                8,
                error_y=error_bars(above, below, colour, thickness=1.2, width=4),
                hover=f"measured, {escape(name)}<br>%{{y:.3f}} with %{{x}} layers loaded",
            ),
            escape(name),
        )
    layout = base_layout(
        320,
        legend=top_legend(),
        margin={"l": 64, "r": 16, "t": 44, "b": 50},
        xaxis=plain_axis("layers loaded", range=[0, deepest + 0.5]),
        yaxis=plain_axis("layer time over that with all loaded", rangemode="tozero"),
    )
    return {"data": data, "layout": layout}


def _measured_on(profile: Figure, measured: Figure, label: str) -> tuple[Figure, Figure]:
    """A line of the profile and marks of readings under one label in the legend."""
    together = {"name": label, "legendgroup": label}
    return profile | together, measured | together | {"showlegend": False}


def _log_axis(title: str, data: Sequence[Figure]) -> Figure:
    """A logarithmic axis with round ticks over all that is drawn."""
    return plain_axis(title, **logarithmic([one for trace in data for one in trace["y"] if one]))


def _batch_axis(largest: int) -> Figure:
    """A logarithmic axis of batches, with a tick at each power of two."""
    powers = range(int(math.log2(largest)) + 1)
    return plain_axis("batch (rows)", type="log", tickvals=[2**power for power in powers])


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
        marks(
            decode["batch"].to_list(),
            rounded(values),
            colour,
            9,
            symbol,
            name=name,
            text=places,
            hover=f"{name}, %{{text}}<br>%{{y:.4~g}} J a token",
        )
        for name, values, colour, symbol in (
            ("measured", joules, _FIT_COLOUR, "circle"),
            ("profile", predicted, _HELD_OUT_COLOUR, "x-thin-open"),
        )
    ]
    largest = int(decode["batch"].max() or 1)  # type: ignore[arg-type]
    layout = base_layout(
        340,
        legend=top_legend(),
        margin={"l": 70, "r": 16, "t": 44, "b": 50},
        xaxis=_batch_axis(largest),
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
        sizes = np.geomspace(size.min() / 1.3, size.max() * 1.3, 40)
        seconds = [link.seconds(one) for one in sizes]
        values += [1e3 * min(seconds), 1e3 * max(seconds), *(1e3 * mine["measured"]).to_list()]
        colour, name = policy_colour(place), NAMES[quantity]
        data += _measured_on(
            line(
                rounded(sizes / 2**20),
                rounded([1e3 * second for second in seconds]),
                colour,
                hoverinfo="skip",
            ),
            marks(
                rounded(size / 2**20),
                rounded(1e3 * mine["measured"].to_numpy()),
                colour,
                8,
                hover=f"{name}<br>%{{x:.4~g}} MiB in %{{y:.4~g}} ms",
            ),
            name,
        )
    layout = base_layout(
        330,
        legend=top_legend(),
        margin={"l": 64, "r": 16, "t": 44, "b": 50},
        xaxis=plain_axis("MiB moved", type="log"),
        yaxis=plain_axis("milliseconds", **logarithmic(values)),
    )
    return {"data": data, "layout": layout}


def reliability_figure(curves: Sequence[tuple[str, Sequence[tuple[float, float, int]]]]) -> Figure:
    """Share of tokens that agree with the full model against the confidence at an exit.

    Each curve is (label, [(mean confidence, agreement, tokens), ...]); a calibrated confidence
    lies on the diagonal.
    """
    ends = [0, 1]
    data = [line(ends, ends, "@muted", 1.2, dash="dot", name="calibrated", hoverinfo="skip")]
    for place, (label, bins) in enumerate(curves):
        data.append(
            line(
                rounded([one[0] for one in bins], 4),
                rounded([one[1] for one in bins], 4),
                policy_colour(place),
                1.8,
                mode="lines+markers",
                name=escape(label),
                customdata=[one[2] for one in bins],
                marker={"size": 5.5},
                hover=f"<b>{escape(label)}</b><br>confidence %{{x:.2f}}: %{{y:.1%}} agree, "
                "%{customdata} tokens",
            )
        )
    layout = base_layout(
        380,
        legend=top_legend(),
        margin={"l": 64, "r": 16, "t": 84, "b": 50},
        xaxis=plain_axis("confidence at the exit", range=[0, 1.01]),
        yaxis=plain_axis("agrees with the full model", range=[0, 1.02], tickformat=".0%"),
    )
    return {"data": data, "layout": layout}
