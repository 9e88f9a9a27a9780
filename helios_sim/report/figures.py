"""Runs become figures: plain plotly data and layouts, thinned out so that a page stays small."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import numpy as np
import polars as pl

from helios_sim.report.plotting import (
    Figure,
    bars,
    base_layout,
    line,
    line_at,
    marks,
    panel,
    plain_axis,
    policy_colour,
    rounded,
    row_axis,
    stacked,
    text_beside,
    text_inside,
    ticks,
    top_legend,
)
from helios_sim.report.style import NUM_MODEL_COLOURS
from helios_sim.report.thinning import drawn_decisions, thinned
from helios_sim.runs.latencies import Columns
from helios_sim.runs.records import RunData
from helios_sim.settings.slo import SloSpec

MAX_CURVE_POINTS: Final = 400
MAX_SEGMENTS: Final = 2000
MAX_REPLICA_ROWS: Final = 8
MAX_MS_SECONDS: Final = 10.0
"""Latencies beyond it are drawn in seconds: in milliseconds their ticks would not fit."""

_DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
_MARKS: Final = {
    "evaluate": ("circle", "@c6"),
    "serve": ("circle", "@c1"),
    "load-layers": ("triangle-up", "@c3"),
    "switch": ("diamond", "@c2"),
    "keep": ("square", "@c7"),
}
"""Symbol and colour of each decision, in the order of their lanes."""
_GAP: Final = {"color": "@panel", "width": 1.5}
"""Between the parts of a bar."""
_STATE_COLOURS: Final = {
    "evaluating": "@c6",
    "draining": "@c7",
    "loading": "@t4",
    "idle": "@t5",
}


def model_colours(runs: Sequence[RunData]) -> dict[str, str]:
    """One colour a model, the same in every figure."""
    names: dict[str, None] = {}
    for run in runs:
        names.update(dict.fromkeys(sorted(run.totals.exit_layers)))
        loaded = run.timeline.filter(pl.col("depth") > 0)["model"]
        names.update(dict.fromkeys(loaded.drop_nulls().unique().sort().to_list()))
    return {name: f"@m{i % NUM_MODEL_COLOURS + 1}" for i, name in enumerate(names)}


def latency_figure(
    columns: Sequence[Columns], labels: Sequence[str], slo: SloSpec | None
) -> Figure:
    """Cumulative shares of TTFT, TPOT and E2E side by side, with the SLO's limits."""
    data: list[Figure] = []
    layout = base_layout(
        372,
        legend=top_legend(y=1.08),
        yaxis=plain_axis("requests within", range=[0, 1.02], tickformat=".0%", dtick=0.25),
        shapes=[],
        annotations=[],
        margin={"l": 60, "r": 16, "t": 40, "b": 50},
    )
    domains = {"ttft": (0.0, 0.315), "tpot": (0.345, 0.655), "e2e": (0.685, 1.0)}
    for at, (metric, domain) in enumerate(domains.items()):
        suffix = panel(at)
        curves = [_latency_curve(one, metric) for one in columns]
        limit_s = slo.limit_s(metric) if slo is not None else None
        ends_s = [second for seconds, _ in curves for second in seconds[:1] + seconds[-1:]]
        ends_s += [] if limit_s is None else [limit_s]
        in_ms = metric != "e2e" and max(ends_s, default=0.0) <= MAX_MS_SECONDS
        unit, scale = ("ms", 1e3) if in_ms else ("s", 1.0)
        layout[f"xaxis{suffix}"] = plain_axis(
            f"{metric.upper()} ({unit})", type="log", domain=list(domain), tickangle=0
        )
        for place, ((seconds, shares), label) in enumerate(zip(curves, labels, strict=True)):
            data.append(
                line(
                    rounded([scale * second for second in seconds]),
                    rounded(shares, 4),
                    policy_colour(place),
                    2.1,
                    dash=_DASHES[place % len(_DASHES)],
                    name=escape(label),
                    legendgroup=str(place),
                    showlegend=at == 0,
                    xaxis=f"x{suffix}",
                    yaxis="y",
                    hover=f"<b>{escape(label)}</b><br>%{{y:.1%}} within %{{x:.4~g}} {unit}",
                )
            )
        if limit_s is not None:
            layout["shapes"].append(
                line_at(1.3, x=limit_s * scale) | {"xref": f"x{suffix}", "yref": "y", "y1": 1.02}
            )
            layout["annotations"].append(
                {
                    "xref": f"x{suffix}",
                    "yref": "y",
                    "x": math.log10(limit_s * scale),
                    "y": 0.03,
                    "text": f"limit {limit_s * scale:.12g} {unit}",
                    "showarrow": False,
                    "textangle": -90,
                    "xanchor": "right",
                    "yanchor": "bottom",
                    "font": {"size": 11, "color": "@muted"},
                }
            )
        if ends_s and min(ends_s) > 0.0:
            layout[f"xaxis{suffix}"] |= ticks(scale * min(ends_s), scale * max(ends_s))
    return {"data": data, "layout": layout}


def _latency_curve(columns: Columns, metric: str) -> tuple[list[float], list[float]]:
    """The distribution of a latency over the requests that it is defined for."""
    counted = columns.measured & columns.finished
    if metric == "tpot":
        counted = counted & columns.several_tokens
    return cumulative_curve(getattr(columns, f"{metric}_s")[counted])


def cumulative_curve(values: Any) -> tuple[list[float], list[float]]:
    """At most 400 points of an empirical distribution, denser towards the tail."""
    positive = np.sort(np.asarray(values, dtype=np.float64))
    positive = positive[positive > 0.0]
    if positive.size == 0:
        return [], []
    if positive.size <= MAX_CURVE_POINTS:
        return positive.tolist(), (np.arange(1, positive.size + 1) / positive.size).tolist()
    body = np.linspace(0.0, 0.98, 300)
    tail = 1.0 - np.geomspace(0.02, 1.0 / positive.size, 99)
    shares = np.append(np.append(body, tail[1:]), 1.0)
    return np.quantile(positive, shares).tolist(), shares.tolist()


def _exit_counts(run: RunData, name: str) -> dict[int, int]:
    """Tokens of a model by the layer at which they left; empty where the run has no such model."""
    layers = run.totals.exit_layers.get(name, ())
    counts = run.totals.exit_counts.get(name, (0,) * len(layers))
    return dict(zip(layers, counts, strict=True))


def timeline_figure(run: RunData, colours: Mapping[str, str]) -> Figure:
    """Batch and queue, model and depth, KV use, power and breaches over one time axis."""
    frame = thinned(run.timeline)
    time = rounded(frame["time_s"])
    replicas = run.timeline["replica"].unique().sort().to_list()
    single = len(replicas) == 1
    num_rows = min(len(replicas), MAX_REPLICA_ROWS)
    lanes = [name for name in _MARKS if name in set(run.decisions["decision"])]
    panels = [
        ("batch", 0.85),
        ("waiting", 0.6),
        ("loaded layers", 1.15) if single else ("replica", 0.3 + 0.16 * num_rows),
        ("decisions", 0.14 + 0.15 * len(lanes)),
        ("KV use", 0.7),
    ]
    has_power = frame["power_w"].null_count() < frame.height
    if has_power:
        panels.append(("power (W)", 0.7))
    panels.append(("breaches", 0.7))
    layout = base_layout(
        int(170 + 100 * sum(share for _, share in panels)),
        legend=top_legend(y=1.01),
        barmode="overlay",
        bargap=0.25,
        margin={"l": 66, "r": 16, "t": 60, "b": 46},
    )
    stacked(layout, panels, 0.035)
    layout["xaxis"] = plain_axis(
        "seconds since the start",
        anchor=f"y{len(panels)}",
        range=[0, run.totals.end_s],
        showspikes=True,
        spikemode="across",
        spikethickness=1,
        spikedash="solid",
        spikecolor="@line",
    )
    curves: list[tuple[str, str, int, str, str]] = [
        ("running", "mean_running", 1, "@c1", "%{y:.3~g} running"),
        ("waiting", "waiting", 2, "@c2", "%{y} waiting"),
        ("KV use", "kv_use", 5, "@c3", "%{y:.1%} of KV blocks"),
    ]
    if has_power:
        curves.append(("power", "power_w", 6, "@c5", "%{y:.4~g} W"))
    curves.append(("breaches", "breach_share", len(panels), "@c4", "%{y:.1%} of tokens"))
    data = [
        line(
            time,
            rounded(frame[column].cast(pl.Float64).fill_null(math.nan), 4),
            colour,
            1.4,
            name=name,
            yaxis="y" if axis == 1 else f"y{axis}",
            showlegend=False,
            hover=f"{hover} at %{{x:.4~g}} s",
            fill="tozeroy",
            fillcolor=f"{colour}/0.16",
        )
        for name, column, axis, colour, hover in curves
    ]
    for axis in (5, len(panels)):
        layout[f"yaxis{axis}"]["tickformat"] = ".2~%"
    shown = replicas[:MAX_REPLICA_ROWS]
    if single:
        data += _depth_steps(run, replicas[0], colours)
        data += _state_strip(run, replicas[0])
    else:
        data += _depth_rows(run, shown, colours)
        layout["yaxis3"] |= {"type": "category", "autorange": "reversed", "rangemode": "normal"}
    data += _decision_marks(run)
    layout["yaxis4"] = {
        **layout["yaxis4"],
        "title": {"text": ""},
        "type": "category",
        "categoryorder": "array",
        "categoryarray": lanes[::-1],
        "range": [-0.6, len(lanes) - 0.4],
        "rangemode": "normal",
    }
    return {"data": data, "layout": layout}


def segments(timeline: pl.DataFrame, replica: int, by: Sequence[str]) -> pl.DataFrame:
    """Stretches of one replica's time in which the named columns stay the same.

    Beyond 2,000 stretches the shortest are left out.
    """
    mine = timeline.filter(pl.col("replica") == replica).sort("time_s")
    found = (
        mine.with_columns(part=pl.struct(by).rle_id())
        .group_by("part", maintain_order=True)
        .agg(
            *(pl.col(name).first() for name in by),
            start_s=(pl.col("time_s") - pl.col("interval_s")).min(),
            end_s=pl.col("time_s").max(),
        )
        .with_columns(length_s=pl.col("end_s") - pl.col("start_s"))
    )
    if found.height <= MAX_SEGMENTS:
        return found
    return found.sort("length_s", descending=True).head(MAX_SEGMENTS).sort("start_s")


def _depth_steps(run: RunData, replica: int, colours: Mapping[str, str]) -> list[Figure]:
    """A block as high as the loaded layers for each stretch of one model at one depth."""
    parts = segments(run.timeline, replica, ("model", "depth")).filter(pl.col("depth") > 0)
    traces = []
    for model in parts["model"].drop_nulls().unique().sort().to_list():
        x: list[float | None] = []
        y: list[float | None] = []
        for row in parts.filter(pl.col("model") == model).iter_rows(named=True):
            start, end = rounded((row["start_s"], row["end_s"]), 7)
            x += [start, start, end, end, None]
            y += [0, row["depth"], row["depth"], 0, None]
        traces.append(
            line(
                x,
                y,
                colours[model],
                0.8,
                name=escape(model),
                yaxis="y3",
                fill="toself",
                fillcolor=f"{colours[model]}/0.5",
                hoveron="points",
                hover=f"<b>{escape(model)}</b>, %{{y}} layers at %{{x:.4~g}} s",
            )
        )
    return traces


def _state_strip(run: RunData, replica: int) -> list[Figure]:
    """A thin strip under the depth that marks evaluating, draining, loading and idle time."""
    parts = segments(run.timeline, replica, ("state",))
    deepest = max((max(layers) for layers in run.totals.exit_layers.values()), default=1)
    traces: list[Figure] = []
    for state, colour in _STATE_COLOURS.items():
        rows = parts.filter(pl.col("state") == state)
        if rows.height == 0:
            continue
        traces.append(
            bars(
                rounded(rows["length_s"], 6),
                [-0.07 * deepest] * rows.height,
                colour,
                edge={"width": 0},
                name=state,
                base=rounded(rows["start_s"], 7),
                width=0.09 * deepest,
                yaxis="y3",
                customdata=rounded(rows["length_s"], 4),
                hover=f"{state} for %{{customdata}} s",
            )
        )
    return traces


def _depth_rows(run: RunData, replicas: Sequence[int], colours: Mapping[str, str]) -> list[Figure]:
    """A row a replica, coloured by model, the stronger the more layers are loaded."""
    traces: list[Figure] = []
    named: set[str] = set()
    parts = pl.concat(
        segments(run.timeline, replica, ("model", "depth")).with_columns(
            row=pl.lit(str(replica), pl.String)
        )
        for replica in replicas
    ).filter(pl.col("model").is_not_null() & (pl.col("depth") > 0))
    for (model, depth), rows in sorted(parts.group_by("model", "depth"), key=lambda one: one[0]):
        full = max(run.totals.exit_layers.get(model, (depth,)))
        traces.append(
            bars(
                rounded(rows["length_s"], 6),
                rows["row"].to_list(),
                f"{colours[model]}/{0.3 + 0.7 * depth / full:.2f}",
                edge={"width": 0},
                name=escape(model),
                legendgroup=model,
                showlegend=model not in named,
                base=rounded(rows["start_s"], 7),
                yaxis="y3",
                hover=f"<b>{escape(model)}</b>, {depth} layers",
            )
        )
        named.add(model)
    return traces


def _decision_marks(run: RunData) -> list[Figure]:
    """A lane for each kind of decision, a mark where it was made, its reason on hover."""
    decisions = drawn_decisions(run.decisions)
    crowded = decisions.height > 150
    traces: list[Figure] = []
    for decision, (symbol, colour) in _MARKS.items():
        rows = decisions.filter(pl.col("decision") == decision)
        if rows.height == 0:
            continue
        found = marks(
            rounded(rows["time_s"], 7),
            [decision] * rows.height,
            colour,
            9,
            "line-ns-open" if crowded else symbol,
            name=decision,
            showlegend=False,
            yaxis="y4",
            cliponaxis=False,
            text=[_marker_text(row) for row in rows.iter_rows(named=True)],
            hover="%{text}",
        )
        found["marker"]["line"] = {"width": 1.2, "color": colour}
        traces.append(found)
    return traces


def _marker_text(decision: Mapping[str, Any]) -> str:
    layers = "" if decision["depth"] is None else f" at {decision['depth']} layers"
    reason = "<br>".join(escape(line) for line in textwrap.wrap(decision["reason"] or "", 64))
    return (
        f"<b>{decision['decision']}</b> {escape(decision['model'] or '')}{layers}<br>"
        f"{decision['time_s']:,.1f} s, replica {decision['replica']}, "
        f"asked on {escape(decision['event'])}<br>{reason}"
    )


def exits_figure(runs: Sequence[RunData], colours: Mapping[str, str]) -> Figure:
    """Where decoded tokens left: a row a policy, a block an exit, deeper exits stronger."""
    labels = [escape(run.label) for run in runs]
    names = list(
        dict.fromkeys(
            name
            for run in runs
            for name, counts in sorted(run.totals.exit_counts.items())
            if any(counts)
        )
    )
    totals = [sum(map(sum, run.totals.exit_counts.values())) for run in runs]
    # An empty bar names each model in the legend at its full strength.
    data = [bars([None], labels[:1], colours[name], name=escape(name)) for name in names]
    for name in names:
        counts = [_exit_counts(run, name) for run in runs]
        # Runs of two profiles may have other exits of a model of one name.
        layers = sorted(set().union(*counts))
        for level, layer in enumerate(layers):
            shares = [
                count.get(layer, 0) / total if total else 0.0
                for count, total in zip(counts, totals, strict=True)
            ]
            strength = 0.28 + 0.72 * (level + 1) / len(layers)
            text = [f"L{layer} {100 * share:.0f} %" if share >= 0.07 else "" for share in shares]
            data.append(
                bars(
                    rounded(shares),
                    labels,
                    f"{colours[name]}/{strength:.2f}",
                    edge=_GAP,
                    showlegend=False,
                    hover=f"<b>%{{y}}</b><br>{escape(name)}, layer {layer} of {layers[-1]}: "
                    "%{x:.2%} of decoded tokens",
                    **text_inside(text, "@ink" if strength < 0.7 else "@on"),
                )
            )
    return {"data": data, "layout": _rows_layout(len(runs), "share of decoded tokens")}


def _rows_layout(num_rows: int, title: str, **more: Any) -> Figure:
    """A layout of horizontal rows, shares from 0 to 100 %, first row on top."""
    return base_layout(
        96 + 40 * num_rows,
        barmode=more.pop("barmode", "stack"),
        bargap=0.32,
        legend=top_legend(traceorder="normal"),
        xaxis=plain_axis(title, range=[0, 1.001], tickformat=".0%", dtick=0.25),
        yaxis=row_axis(showgrid=False, tickfont={"color": "@ink", "size": 12.5}),
        **more,
    )


def attainment_figure(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Shares of the requests sent that met each limit, and all of them where there are several."""
    named = list(
        dict.fromkeys(
            metric for one in summaries for metric in one["slo_attainment_by_metric"] or {}
        )
    )
    shares = [
        [
            one["slo_attainment"],
            *((one["slo_attainment_by_metric"] or {}).get(key) for key in named),
        ]
        for one in summaries
    ]
    rows = ["every limit", *(name.upper() for name in named)]
    if len(named) == 1 and all(every == alone for every, alone in shares):
        rows, shares = rows[1:], [one[1:] for one in shares]
    data = [
        bars(
            mine,
            rows,
            policy_colour(place),
            name=escape(summary["label"]),
            hover=f"<b>{escape(summary['label'])}</b><br>%{{y}}: %{{x:.2%}} of the requests sent",
            **text_beside(["" if one is None else f"{100 * one:.1f} %" for one in mine]),
        )
        for place, (summary, mine) in enumerate(zip(summaries, shares, strict=True))
    ]
    layout = _rows_layout(len(rows), "share of the requests sent", barmode="group")
    layout["height"] = 110 + len(rows) * (18 + 19 * len(summaries))
    layout["bargap"] = 0.2
    # Labels stand right of their bars, and the longest is as wide on a narrow page.
    layout["margin"]["r"] = 56
    return {"data": data, "layout": layout}


def time_figure(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Where the replicas' time went: by the bound of the layer time, loading, idle."""
    labels = [escape(summary["label"]) for summary in summaries]
    parts: list[tuple[str, str, str, list[float]]] = [
        ("busy, launch-bound", "@t1", "@on", []),
        ("busy, memory-bound", "@t2", "@ink", []),
        ("busy, compute-bound", "@t3", "@on", []),
        ("loading weights", "@t4", "@ink", []),
        ("idle", "@t5", "@ink", []),
        ("other", "@t6", "@ink", []),
    ]
    for summary in summaries:
        time = summary["time_shares"] or {}
        regime = summary["regime"] or {}
        busy = time.get("busy", 0.0)
        shares = [busy * regime.get(name, 0.0) for name in ("launch", "memory", "compute")]
        shares += [time.get("loading", 0.0), time.get("idle", 0.0)]
        for (_, _, _, row), share in zip(parts, [*shares, max(0.0, 1 - sum(shares))], strict=True):
            row.append(share)
    data = [
        bars(
            rounded(shares),
            labels,
            colour,
            edge=_GAP,
            name=name,
            hover=f"<b>%{{y}}</b><br>{name}: %{{x:.2%}} of the time",
            **text_inside([f"{100 * s:.0f} %" if s >= 0.05 else "" for s in shares], ink),
        )
        for name, colour, ink, shares in parts
        if any(share >= 5e-4 for share in shares)
    ]
    return {"data": data, "layout": _rows_layout(len(summaries), "share of all replicas' time")}
