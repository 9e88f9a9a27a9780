"""Searches become figures: attainment against rate, frontiers, sensitivity, the day."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, TypeAlias

from helios_sim.report.plotting import (
    Figure,
    axes_of,
    base_layout,
    line,
    line_at,
    logarithmic,
    marks,
    panel,
    panel_title,
    plain_axis,
    policy_colour,
    rounded,
    ticks,
    top_legend,
)
from helios_sim.search.bench import FleetAnswer, Load
from helios_sim.search.goals import limit_words
from helios_sim.search.means import Means, gpu_rate, joules, user_rate
from helios_sim.search.plan import Hour
from helios_sim.search.tune import Sensitivity, Trial, Tuned, mean_at, reached_at, score_at
from helios_sim.search.whatif import Cell, short_names

MAX_LABELS: Final = 12
"""Cells whose marks have their names beside them: those of more would cover one another."""
NEAR_HEIGHT: Final = 0.08
"""Share of a panel's height within which two labels beside each other would touch."""
MAX_FLEETS: Final = 8
"""Fleets that a figure shows: as many as there are colours."""

Pair: TypeAlias = tuple[float | None, float | None]
"""Where a mark stands; nowhere where a part of it is None."""


def attainment_figure(answers: Sequence[FleetAnswer], target_per_s: float | None) -> Figure:
    """The worst criterion's share against the rate, a line a fleet, with its bounds."""
    data: list[Figure] = []
    for place, answer in enumerate(answers[:MAX_FLEETS]):
        loads = _at_capacity(answer)
        worst = [min(one.verdict.criteria[:-1], key=lambda c: c.mean - c.target) for one in loads]
        colour, name = policy_colour(place), escape(_label(answer))
        x = rounded([one.rate_per_s for one in loads])
        low, high = (rounded([one.bounds[end] for one in worst], 4) for end in (0, 1))
        edge: Figure = {"legendgroup": str(place), "showlegend": False, "hoverinfo": "skip"}
        data += [
            line(x, high, colour, 0, **edge),
            line(x, low, colour, 0, fill="tonexty", fillcolor=f"{colour}/0.13", **edge),
            line(
                x,
                rounded([one.mean for one in worst], 4),
                colour,
                mode="lines+markers",
                name=name,
                legendgroup=str(place),
                marker={"color": colour, "size": 6},
                customdata=[escape(one.words) for one in worst],
                hover=f"<b>{name}</b><br>%{{x:.4~g}} requests/s: %{{y:.1%}} meet %{{customdata}}",
            ),
        ]
    layout = base_layout(
        400,
        legend=top_legend(),
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
        layout["shapes"].append(line_at(y=share))
    if target_per_s is not None:
        layout["shapes"].append(line_at(x=target_per_s))
    return {"data": data, "layout": layout}


def _at_capacity(answer: FleetAnswer) -> list[Load]:
    """The loads of as many replicas as a fleet's capacity is of, by rate."""
    loads = (one for one in answer.loads if one.num_replicas == answer.capacity_replicas)
    return sorted(loads, key=lambda one: one.rate_per_s)


def _label(answer: FleetAnswer) -> str:
    text, replicas = answer.fleet.name, answer.capacity_replicas
    return text if replicas == 1 else f"{replicas} \N{MULTIPLICATION SIGN} {text}"


def _logarithmic_if_wide(values: Sequence[float | None]) -> Figure:
    """What makes an axis logarithmic where its values span more than a decade."""
    known = [one for one in values if one is not None and math.isfinite(one)]
    if not known or min(known) <= 0.0 or max(known) <= 10.0 * min(known):
        return {}
    return {"rangemode": "normal", **logarithmic(known)}


def plan_frontiers(answers: Sequence[FleetAnswer], device: str) -> Figure:
    """Goodput against energy and tokens per user against tokens per device, a line a fleet."""
    data: list[Figure] = []
    for place, answer in enumerate(answers[:MAX_FLEETS]):
        loads = _at_capacity(answer)
        colour, name = policy_colour(place), escape(_label(answer))
        symbols = ["circle" if one.verdict.carried else "circle-open" for one in loads]
        means = [one.means for one in loads]
        by_energy = [(joules(one), gpu_rate(one, "request_goodput")) for one in means]
        for at, pairs in enumerate((by_energy, _by_user(means))):
            data.append(
                _marks(
                    at,
                    pairs,
                    colour,
                    7,
                    symbols,
                    mode="lines+markers",
                    name=name,
                    legendgroup=str(place),
                    line={"color": colour, "width": 1.4},
                    customdata=rounded([one.rate_per_s for one in loads]),
                    hover=f"<b>{name}</b><br>at %{{customdata:.4~g}} requests/s: "
                    "%{x:.4~g}, %{y:.4~g}",
                )
            )
    data, layout = _frontiers(data, f"goodput (requests/s and {device})", device)
    if draws_energy(layout):
        energies = [x for one in data if one["xaxis"] == "x" for x in one["x"]]
        layout["xaxis"] |= _logarithmic_if_wide(energies)
    layout["margin"]["t"] = 34 + 10 * min(len(answers), MAX_FLEETS)
    layout["height"] = 370 + 10 * min(len(answers), MAX_FLEETS)
    return {"data": data, "layout": layout}


def _marks(at: int, pairs: Sequence[Pair], *look: Any, **more: Any) -> Figure:
    """Marks in one of two panels (0 and 1), of which those of the first are in the legend."""
    x, y = (rounded([pair[axis] for pair in pairs]) for axis in (0, 1))
    return marks(x, y, *look, **{"showlegend": at == 0, **axes_of(at), **more})


def _by_user(figures: Sequence[Means]) -> list[Pair]:
    """Tokens per second of a user and of a device."""
    return [(user_rate(one), gpu_rate(one)) for one in figures]


def _frontiers(data: list[Figure], against: str, device: str) -> tuple[list[Figure], Figure]:
    """Marks and layout of two panels, against energy and per user against per device.

    Where no mark has an energy, what is against it is left out.
    """
    common = base_layout(400, legend=top_legend())
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
            line(
                [hour.hour for hour in hours],
                rounded([hour.rate_per_s for hour in hours]),
                "@c2",
                name="requests/s",
                yaxis="y2",
                line={"color": "@c2", "width": 2, "shape": "hvh"},
                hover="%{x}:00, %{y:.4~g} requests/s",
            ),
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
            return Against(goal.name, goal.unit, score_at(place))
    limits = judge.constraints.slo.limits if judge.constraints.slo else ()
    if limits:
        bound = 1e3 * limits[0].limit_s
        return Against(limit_words(limits[0]), "ms", reached_at(0), bound)
    for place, one in enumerate(judge.constraints.bounds):
        if one.goal.name != "energy":
            return Against(one.goal.name, one.goal.unit, reached_at(place), one.limit)
    return Against("throughput", "tokens/s", mean_at("output_throughput"))


def tune_frontiers(tuned: Tuned) -> Figure:
    """All trials by energy and what stands against it, and by tokens per user and per device."""
    against = against_energy(tuned)
    trials = tuned.trials
    stopped = [one for one in trials if one.state == "stopped"]
    breaking = [one for one in trials if one.state == "full" and one.broken]
    keeping = [one for one in trials if one.is_feasible]
    groups: list[tuple[str, str, str, float, list[Trial]]] = [
        ("stopped early", "@c7/0.45", "circle-open", 6, stopped),
        ("breaks a constraint", "@c2", "x-thin-open", 7, breaking),
        ("keeps the constraints", "@c1", "circle", 7, keeping),
        ("as it stands", "@c8", "diamond", 12, [tuned.base]),
    ]
    if tuned.winner is not None:
        groups.append(("winner", "@c3", "star", 15, [tuned.winner]))
    data: list[Figure] = []
    for name, colour, symbol, size, members in groups:
        known = [one for one in members if one.scores is not None]
        by_energy = [(joules(one.means), against.value(one)) for one in known]
        by_user = _by_user([one.means for one in known])
        told = {
            "name": name,
            "legendgroup": name,
            "text": [_settings(one) for one in known],
            "hover": "%{text}<br>%{x:.4~g}, %{y:.4~g}",
        }
        data += [
            _marks(at, pairs, colour, size, symbol, **told)
            for at, pairs in enumerate((by_energy, by_user))
        ]
    unit = f" ({against.unit})" if against.unit else ""
    data, layout = _frontiers(data, f"{against.name}{unit}", tuned.question.device)
    if against.bound is not None and draws_energy(layout):
        layout["shapes"] = [line_at(y=against.bound) | {"xref": "x domain"}]
        values = [y for one in data if one["yaxis"] == "y" for y in one["y"]]
        layout["yaxis"] |= _logarithmic_if_wide([*values, against.bound])
    return {"data": data, "layout": layout}


def _settings(trial: Trial) -> str:
    if trial.number < 0:
        return "<b>as it stands</b>"
    rows = "<br>".join(f"{escape(key)} = {escape(str(one))}" for key, one in trial.values.items())
    return f"<b>trial {trial.number}</b><br>{rows}"


def sensitivity_figure(parts: Sequence[Sensitivity], unit: str) -> Figure:
    """One small panel a setting: the objective as it alone varies around the winner."""
    columns = 3
    rows = -(-len(parts) // columns)
    layout = base_layout(60 + 190 * rows, showlegend=False, annotations=[])
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
        layout["annotations"].append(panel_title(place, escape(part.key), 12))
        shown = list(part.values) if numeric else [escape(str(one)) for one in part.values]
        chosen = part.values.index(part.chosen) if part.chosen in part.values else -1
        plain = ["@c2" if breaks else "@c1" for breaks in part.breaks]
        data.append(
            marks(
                shown,
                rounded(part.scores),
                ["@c3" if at == chosen else colour for at, colour in enumerate(plain)],
                [
                    11 if at == chosen else 9 if breaks else 6
                    for at, breaks in enumerate(part.breaks)
                ],
                ["x-thin-open" if breaks else "circle" for breaks in part.breaks],
                mode="lines+markers" if numeric else "markers",
                line={"color": "@c1", "width": 1.6},
                hover=f"{escape(part.key)} = %{{x}}: %{{y:.4~g}} {escape(unit)}",
                **axes_of(place),
            )
        )
    return {"data": data, "layout": layout}


def cells_figure(cells: Sequence[Cell], device: str) -> Figure:
    """The cells of a grid by energy and throughput, and by tokens per user and per device."""
    known = [cell for cell in cells if cell.can_be]
    labels = short_names(known)
    policies = list(dict.fromkeys(cell.policy for cell in known))
    data: list[Figure] = []
    points = (
        [(joules(one.means), one.means.get("output_throughput")) for one in known],
        _by_user([one.means for one in known]),
    )
    for place, policy in enumerate(policies):
        mine = [at for at, cell in enumerate(known) if cell.policy == policy]
        for number, every in enumerate(points):
            pairs, sides = [every[at] for at in mine], _sides(every)
            found = _marks(
                number,
                pairs,
                policy_colour(place),
                9,
                name=escape(policy),
                legendgroup=policy,
                showlegend=number == 0 and len(policies) > 1,
                cliponaxis=False,
                customdata=[escape(known[at].name) for at in mine],
                hover="<b>%{customdata}</b><br>%{x:.4~g}, %{y:.4~g}",
            )
            if sides and len(known) <= MAX_LABELS:
                found |= {
                    "mode": "markers+text",
                    "text": [escape(labels[at]) for at in mine],
                    "textposition": [sides[at] for at in mine],
                    "textfont": {"size": 11, "color": "@ink"},
                }
            data.append(found)
    data, layout = _frontiers(data, "output tokens/s", device)
    return {"data": data, "layout": layout}


def _sides(points: Sequence[Pair]) -> list[str]:
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
