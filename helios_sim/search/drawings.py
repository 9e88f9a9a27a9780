"""Searches become figures: attainment against rate, frontiers, importance, sensitivity, the day."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

from helios_sim.report.figures import (
    Figure,
    base_layout,
    panel,
    plain_axis,
    policy_colour,
    rounded,
    ticks,
    top_legend,
)
from helios_sim.search.bench import FleetAnswer, Load
from helios_sim.search.plan import Hour
from helios_sim.search.tune import Sensitivity, Trial, Tuned
from helios_sim.search.whatif import Cell, short_names
from helios_sim.slo import SloLimit

MAX_LABELS: Final = 12
"""Cells whose marks have their names beside them: those of more would cover one another."""
NEAR_HEIGHT: Final = 0.08
"""Share of a panel's height within which two labels beside each other would touch."""
MAX_FLEETS: Final = 8
"""Fleets that a figure shows: as many as there are colours."""


def user_rate(means: Any) -> float | None:
    """Tokens per second that one user sees."""
    tpot = means.get("mean_tpot_ms")
    return None if not tpot else 1e3 / tpot


def gpu_rate(means: Any) -> float | None:
    """Tokens per second of one device."""
    tokens, gpus = means.get("output_throughput"), means.get("num_gpus")
    return None if tokens is None or not gpus else tokens / gpus


def joules(means: Any) -> float | None:
    """Joules per output token."""
    value = means.get("energy_per_output_token")
    return None if value is None else 1e-3 * value


def attainment_figure(answers: Sequence[FleetAnswer], target_per_s: float | None) -> Figure:
    """The worst criterion's share against the rate, a line a fleet, with its bounds."""
    data: list[Figure] = []
    for place, answer in enumerate(answers[:MAX_FLEETS]):
        loads = _at_capacity(answer)
        rates = [one.rate_per_s for one in loads]
        worst = [min(one.verdict.criteria[:-1], key=lambda c: c.mean - c.target) for one in loads]
        colour, name = policy_colour(place), escape(_label(answer))
        common = {"type": "scatter", "legendgroup": str(place), "x": rounded(rates)}
        data += [
            common
            | {
                "mode": "lines",
                "y": rounded([one.bounds[1] for one in worst], 4),
                "line": {"width": 0},
                "showlegend": False,
                "hoverinfo": "skip",
            },
            common
            | {
                "mode": "lines",
                "y": rounded([one.bounds[0] for one in worst], 4),
                "line": {"width": 0},
                "fill": "tonexty",
                "fillcolor": f"{colour}/0.13",
                "showlegend": False,
                "hoverinfo": "skip",
            },
            common
            | {
                "mode": "lines+markers",
                "name": name,
                "y": rounded([one.mean for one in worst], 4),
                "line": {"color": colour, "width": 2},
                "marker": {"color": colour, "size": 6},
                "customdata": [escape(one.words) for one in worst],
                "hovertemplate": f"<b>{name}</b><br>%{{x:.4~g}} requests/s: %{{y:.1%}} meet "
                "%{customdata}<extra></extra>",
            },
        ]
    layout = base_layout(
        400,
        legend=top_legend(),
        hovermode="closest",
        xaxis=plain_axis("requests per second", type="log"),
        yaxis=plain_axis("share that meets the limit", tickformat=".0%", range=[0, 1.03]),
        shapes=[],
        annotations=[],
    )
    layout["margin"]["t"] = 34 + 10 * min(len(answers), MAX_FLEETS)
    rates = [load.rate_per_s for answer in answers for load in answer.loads]
    if rates:
        layout["xaxis"] |= ticks(min(rates), max(rates))
    targets = {
        one.target
        for answer in answers
        for load in answer.loads
        for one in load.verdict.criteria[:-1]
    }
    for share in sorted(targets):
        layout["shapes"].append(_line(y=share))
    if target_per_s is not None:
        layout["shapes"].append(_line(x=target_per_s))
    return {"data": data, "layout": layout}


def _at_capacity(answer: FleetAnswer) -> list[Load]:
    """The loads of as many replicas as a fleet's capacity is of, by rate."""
    loads = (one for one in answer.loads if one.num_replicas == answer.capacity_replicas)
    return sorted(loads, key=lambda one: one.rate_per_s)


def _label(answer: FleetAnswer) -> str:
    text, replicas = answer.fleet.name, answer.capacity_replicas
    return text if replicas == 1 else f"{replicas} \N{MULTIPLICATION SIGN} {text}"


def _line(x: float | None = None, y: float | None = None) -> Figure:
    """A dotted line across a figure, at a place on one of its axes."""
    across = {"type": "line", "line": {"color": "@muted", "width": 1.2, "dash": "dot"}}
    if x is not None:
        return across | {"xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1}
    return across | {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": y, "y1": y}


def limit_words(limit: SloLimit) -> str:
    """A latency limit's figure: 'TPOT p90', and of one that holds for each request the worst."""
    at = "max" if limit.percentile is None else f"p{limit.percentile:g}"
    return f"{limit.metric.upper()} {at}"


def _logarithmic(values: Sequence[float | None]) -> Figure:
    """What makes an axis logarithmic where its values span more than a decade."""
    known = [one for one in values if one is not None and math.isfinite(one)]
    if not known or min(known) <= 0.0 or max(known) <= 10.0 * min(known):
        return {}
    return {"type": "log", "rangemode": "normal", **ticks(min(known), max(known))}


def plan_frontiers(answers: Sequence[FleetAnswer], device: str) -> Figure:
    """Goodput against energy and tokens per user against tokens per device, a line a fleet."""
    data: list[Figure] = []
    for place, answer in enumerate(answers[:MAX_FLEETS]):
        loads = _at_capacity(answer)
        colour, name = policy_colour(place), escape(_label(answer))
        symbols = ["circle" if one.verdict.carried else "circle-open" for one in loads]
        for axis, pairs in (("", _energy_points(loads)), ("2", _user_points(loads))):
            data.append(
                _marks(axis, pairs)
                | {
                    "mode": "lines+markers",
                    "name": name,
                    "legendgroup": str(place),
                    "line": {"color": colour, "width": 1.4},
                    "marker": {"color": colour, "size": 7, "symbol": symbols},
                    "customdata": rounded([one.rate_per_s for one in loads]),
                    "hovertemplate": f"<b>{name}</b><br>at %{{customdata:.4~g}} requests/s: "
                    "%{x:.4~g}, %{y:.4~g}<extra></extra>",
                }
            )
    data, layout = _frontiers(data, f"goodput (requests/s and {device})", device)
    if draws_energy(layout):
        energies = [x for one in data if one["xaxis"] == "x" for x in one["x"]]
        layout["xaxis"] |= _logarithmic(energies)
    layout["margin"]["t"] = 34 + 10 * min(len(answers), MAX_FLEETS)
    layout["height"] = 370 + 10 * min(len(answers), MAX_FLEETS)
    return {"data": data, "layout": layout}


def _marks(axis: str, pairs: Sequence[tuple[float | None, float | None]]) -> Figure:
    """Points of one of two panels ("" and "2"), of which the first is in the legend."""
    return {
        "type": "scatter",
        "showlegend": axis == "",
        "x": rounded([x for x, _ in pairs]),
        "y": rounded([y for _, y in pairs]),
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
    }


def _energy_points(loads: Sequence[Load]) -> list[tuple[float | None, float | None]]:
    points: list[tuple[float | None, float | None]] = []
    for load in loads:
        goodput, gpus = load.means.get("request_goodput"), load.means.get("num_gpus")
        per_gpu = None if goodput is None or not gpus else goodput / gpus
        points.append((joules(load.means), per_gpu))
    return points


def _user_points(loads: Sequence[Load]) -> list[tuple[float | None, float | None]]:
    return [(user_rate(load.means), gpu_rate(load.means)) for load in loads]


def _frontiers(data: list[Figure], against: str, device: str) -> tuple[list[Figure], Figure]:
    """Marks and layout of two panels, against energy and per user against per device.

    Where no mark has an energy, what is against it is left out.
    """
    common = base_layout(400, legend=top_legend(), hovermode="closest")
    users, devices = "tokens/s per user", f"tokens/s per {device}"
    if all(x is None for one in data if one["xaxis"] == "x" for x in one["x"]):
        shown = [
            right | {"xaxis": "x", "yaxis": "y", "showlegend": left["showlegend"]}
            for left, right in zip(data[::2], data[1::2], strict=True)
        ]
        return shown, common | {
            "xaxis": plain_axis(users),
            "yaxis": plain_axis(devices, rangemode="tozero"),
        }
    return data, common | {
        "xaxis": plain_axis("energy per output token (J)", domain=[0, 0.455]),
        "yaxis": plain_axis(against, rangemode="tozero"),
        "xaxis2": plain_axis(users, domain=[0.565, 1], anchor="y2"),
        "yaxis2": plain_axis(devices, anchor="x2", rangemode="tozero"),
    }


def draws_energy(layout: Figure) -> bool:
    """Whether a figure of frontiers has the panel against energy, which needs one."""
    return "xaxis2" in layout


def day_figure(hours: Sequence[Hour]) -> Figure:
    """Replicas hour by hour, and the rate they carry."""
    return {
        "data": [
            {
                "type": "bar",
                "name": "replicas",
                "x": [hour.hour for hour in hours],
                "y": [hour.num_replicas for hour in hours],
                "marker": {"color": "@c1/0.55"},
                "hovertemplate": "%{x}:00, %{y} replicas<extra></extra>",
            },
            {
                "type": "scatter",
                "mode": "lines",
                "name": "requests/s",
                "x": [hour.hour for hour in hours],
                "y": rounded([hour.rate_per_s for hour in hours]),
                "yaxis": "y2",
                "line": {"color": "@c2", "width": 2, "shape": "hvh"},
                "hovertemplate": "%{x}:00, %{y:.4~g} requests/s<extra></extra>",
            },
        ],
        "layout": base_layout(
            320,
            legend=top_legend(),
            bargap=0.12,
            xaxis=plain_axis("hour of the day", dtick=3),
            yaxis=plain_axis("replicas", rangemode="tozero"),
            yaxis2=plain_axis(
                "requests per second",
                overlaying="y",
                side="right",
                rangemode="tozero",
                showgrid=False,
            ),
            margin={"l": 60, "r": 60, "t": 34, "b": 44},
        ),
    }


@dataclass(frozen=True)
class Against:
    """What stands against energy: a name, its unit, a trial's value, and the bound it has."""

    name: str
    unit: str
    value: Callable[[Trial], float | None]
    bound: float | None = None


def against_energy(tuned: Tuned) -> Against:
    """The first objective; where that is energy, the next, or what the first constraint bounds."""
    judge = tuned.question.judge
    for place, goal in enumerate(judge.goals):
        if goal.name != "energy":
            return Against(goal.name, goal.unit, _score(place))
    limits = judge.constraints.slo.limits if judge.constraints.slo else ()
    if limits:
        bound = 1e3 * limits[0].limit_s
        return Against(limit_words(limits[0]), "ms", _reached(0), bound)
    for place, one in enumerate(judge.constraints.bounds):
        if one.goal.name != "energy":
            return Against(one.goal.name, one.goal.unit, _reached(place), one.limit)
    return Against("throughput", "tokens/s", lambda one: (one.means or {}).get("output_throughput"))


def _score(place: int) -> Callable[[Trial], float | None]:
    return lambda trial: None if trial.scores is None else trial.scores[place]


def _reached(place: int) -> Callable[[Trial], float | None]:
    return lambda trial: trial.reached[place] if place < len(trial.reached) else None


def tune_frontiers(tuned: Tuned) -> Figure:
    """All trials by energy and what stands against it, and by tokens per user and per device."""
    against = against_energy(tuned)
    groups: list[tuple[str, str, str, float, list[Trial]]] = [
        (
            "stopped early",
            "@c7/0.45",
            "circle-open",
            6,
            [one for one in tuned.trials if one.state == "stopped"],
        ),
        (
            "breaks a constraint",
            "@c2",
            "x-thin-open",
            7,
            [one for one in tuned.trials if one.state == "full" and one.broken],
        ),
        (
            "keeps the constraints",
            "@c1",
            "circle",
            7,
            [one for one in tuned.trials if one.is_feasible],
        ),
        ("as it stands", "@c8", "diamond", 12, [tuned.base]),
    ]
    if tuned.winner is not None:
        groups.append(("winner", "@c3", "star", 15, [tuned.winner]))
    data: list[Figure] = []
    for name, colour, symbol, size, trials in groups:
        known = [one for one in trials if one.means is not None and one.scores is not None]
        for axis in ("", "2"):
            pairs = [
                (joules(one.means), against.value(one))
                if axis == ""
                else (user_rate(one.means), gpu_rate(one.means))
                for one in known
            ]
            data.append(
                _marks(axis, pairs)
                | {
                    "mode": "markers",
                    "name": name,
                    "legendgroup": name,
                    "marker": {"color": colour, "size": size, "symbol": symbol},
                    "text": [_settings(one) for one in known],
                    "hovertemplate": "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
                }
            )
    unit = f" ({against.unit})" if against.unit else ""
    data, layout = _frontiers(data, f"{against.name}{unit}", tuned.question.device)
    if against.bound is not None and draws_energy(layout):
        layout["shapes"] = [_line(y=against.bound) | {"xref": "x domain"}]
        values = [y for one in data if one["yaxis"] == "y" for y in one["y"]]
        layout["yaxis"] |= _logarithmic([*values, against.bound])
    return {"data": data, "layout": layout}


def _settings(trial: Trial) -> str:
    if trial.number < 0:
        return "<b>as it stands</b>"
    rows = "<br>".join(f"{escape(key)} = {escape(str(one))}" for key, one in trial.values.items())
    return f"<b>trial {trial.number}</b><br>{rows}"


def importance_figure(tuned: Tuned) -> Figure:
    """What mattered, the most important setting on top."""
    found = sorted(tuned.importance.items(), key=lambda pair: -pair[1])
    return {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "y": [escape(key) for key, _ in found],
                "x": rounded([share for _, share in found], 4),
                "marker": {"color": "@c1"},
                "text": [f"{100 * share:.0f} %" for _, share in found],
                "textposition": "outside",
                "textfont": {"size": 11, "color": "@ink"},
                "cliponaxis": False,
                "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
            }
        ],
        "layout": base_layout(
            70 + 27 * max(1, len(found)),
            bargap=0.35,
            margin={"l": 60, "r": 56, "t": 28, "b": 44},
            xaxis=plain_axis("share of what told good trials from the rest", tickformat=".0%"),
            yaxis=plain_axis(
                autorange="reversed",
                type="category",
                showgrid=False,
                tickfont={"color": "@ink", "size": 12.5},
            ),
        ),
    }


def sensitivity_figure(parts: Sequence[Sensitivity], goal: str, unit: str) -> Figure:
    """One small panel a setting: the objective as it alone varies around the winner."""
    columns = 3
    rows = -(-len(parts) // columns)
    layout = base_layout(60 + 190 * rows, showlegend=False, hovermode="closest", annotations=[])
    known = [score for one in parts for score in one.scores if score is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    gap = 0.06 * (high - low or abs(high) or 1.0)
    data: list[Figure] = []
    for place, part in enumerate(parts):
        row, column = divmod(place, columns)
        suffix = panel(place)
        left = column / columns + (0.02 if column else 0.0)
        top = 1.0 - row / rows
        height = 1.0 / rows
        numeric = all(isinstance(one, int | float) for one in part.values)
        numeric = numeric and not any(isinstance(one, bool) for one in part.values)
        layout[f"xaxis{suffix}"] = plain_axis(
            domain=[left, (column + 1) / columns - 0.03], anchor=f"y{suffix}", nticks=5
        )
        if numeric and min(part.values) > 0 and max(part.values) > 30 * min(part.values):
            layout[f"xaxis{suffix}"] |= {"type": "log", "dtick": 1}
        if not numeric:
            layout[f"xaxis{suffix}"]["type"] = "category"
        layout[f"yaxis{suffix}"] = plain_axis(
            domain=[top - height * 0.72, top - height * 0.12],
            anchor=f"x{suffix}",
            range=[low - gap, high + gap],
            nticks=4,
        )
        layout["annotations"].append(
            {
                "xref": f"x{suffix} domain",
                "yref": f"y{suffix} domain",
                "x": 0,
                "y": 1.02,
                "xanchor": "left",
                "yanchor": "bottom",
                "text": escape(part.key),
                "showarrow": False,
                "font": {"size": 12, "color": "@ink"},
            }
        )
        shown = list(part.values) if numeric else [escape(str(one)) for one in part.values]
        chosen = part.values.index(part.chosen) if part.chosen in part.values else -1
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if numeric else "markers",
                "x": shown,
                "y": rounded(part.scores),
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "line": {"color": "@c1", "width": 1.6},
                "marker": {
                    "color": ["@c3" if at == chosen else "@c1" for at in range(len(shown))],
                    "size": [11 if at == chosen else 6 for at in range(len(shown))],
                },
                "hovertemplate": f"{escape(part.key)} = %{{x}}: %{{y:.4~g}} {escape(unit)}"
                "<extra></extra>",
            }
        )
    return {"data": data, "layout": layout}


def cells_figure(cells: Sequence[Cell], device: str) -> Figure:
    """The cells of a grid by energy and throughput, and by tokens per user and per device."""
    known = [cell for cell in cells if cell.means is not None]
    labels = short_names(known)
    policies = list(dict.fromkeys(cell.policy for cell in known))
    data: list[Figure] = []
    points = {
        "": [(joules(one.means), (one.means or {}).get("output_throughput")) for one in known],
        "2": [(user_rate(one.means), gpu_rate(one.means)) for one in known],
    }
    for place, policy in enumerate(policies):
        mine = [at for at, cell in enumerate(known) if cell.policy == policy]
        for axis, every in points.items():
            pairs, sides = [every[at] for at in mine], _sides(every)
            named = bool(sides) and len(known) <= MAX_LABELS
            data.append(
                _marks(axis, pairs)
                | {
                    "mode": "markers+text" if named else "markers",
                    "name": escape(policy),
                    "legendgroup": policy,
                    "showlegend": axis == "" and len(policies) > 1,
                    "marker": {"color": policy_colour(place), "size": 9},
                    "cliponaxis": False,
                    "customdata": [escape(known[at].name) for at in mine],
                    "hovertemplate": "<b>%{customdata}</b><br>%{x:.4~g}, %{y:.4~g}<extra></extra>",
                }
            )
            if named:
                data[-1] |= {
                    "text": [escape(labels[at]) for at in mine],
                    "textposition": [sides[at] for at in mine],
                    "textfont": {"size": 11, "color": "@ink"},
                }
    data, layout = _frontiers(data, "output tokens/s", device)
    return {"data": data, "layout": layout}


def _sides(points: Sequence[tuple[float | None, float | None]]) -> list[str]:
    """Where the labels of marks stand: to their inner sides, so that none leaves its panel.

    Of two marks at nearly one height the higher has its label above, the lower below. Where three
    are, labels would cover one another, and there are none.
    """
    xs = [0.0 if x is None else x for x, _ in points]
    ys = [0.0 if y is None else y for _, y in points]
    middle, near = (min(xs) + max(xs)) / 2, NEAR_HEIGHT * max(ys)
    sides = []
    for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
        beside = [
            (ys[other], other)
            for other in range(len(points))
            if other != at and (xs[other] <= middle) == (x <= middle) and abs(ys[other] - y) < near
        ]
        if len(beside) > 1:
            return []
        height = "middle" if not beside else "top" if (y, at) > max(beside) else "bottom"
        sides.append(f"{height} {'right' if x <= middle else 'left'}")
    return sides
