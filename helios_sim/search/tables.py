"""Searches as rows: for the terminal, for pages, and for files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from rich.text import Text

from helios_sim.console.terminal import FittedTable
from helios_sim.policy.registry import policy_names, policy_options
from helios_sim.search.bench import FleetAnswer, Load
from helios_sim.search.goals import in_samples, in_words, limit_words
from helios_sim.search.means import Means, gpu_rate, joules, user_rate
from helios_sim.search.pareto import front
from helios_sim.search.plan import Plan
from helios_sim.search.plan_words import bracket
from helios_sim.search.quality import fleet_perplexities, trial_perplexities
from helios_sim.search.tune import Trial, Tuned, by_violation, mean_at, reached_at, score_at
from helios_sim.search.whatif import Cell, compared_by, leaders, short_keys, values_in_short
from helios_sim.wording import between, number

Cells: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Titles and rows; the first column names the row."""

Rows: TypeAlias = list[dict[str, Any]]

_DASH = "\N{EN DASH}"


def terminal_table(cells: Cells, best_first: bool = False) -> FittedTable:
    """Rows in the terminal, the first one marked where rows are ranked."""
    titles, rows = cells
    best = "bold green" if best_first and len(rows) > 1 else ""
    shown = [
        [Text(value, best if place == 0 else "") for value in row] for place, row in enumerate(rows)
    ]
    return FittedTable(titles, shown, names_above=True)


def fleet_rows(plan: Plan, brief: bool = False) -> Cells:
    """Fleets in order of merit; in brief, for a narrow terminal, without what users see."""
    question = plan.question
    target = question.target_per_s is not None
    titles = ["Fleet"]
    if target:
        devices = f"{question.device}s"
        titles += [devices] if brief else ["replicas", devices]
    capacity = "req/s" if brief else "capacity req/s"
    # Capacities are of as many replicas as they were measured for, which differs by fleet.
    titles += [f"{capacity} of n" if target else capacity, "bounds", "held by"]
    titles += ["J/tok", "agree %"] if brief else ["tok/s per user", "J/token", "agreement %"]
    perplexities = fleet_perplexities(plan)
    has_perplexities = any(one is not None for one in perplexities)
    titles += ["perplexity"] * has_perplexities
    if question.prices is not None:
        titles += [f"{question.prices.currency}/h", f"{question.prices.currency}/Mtok"]
    rows = []
    for answer, perplexity in zip(plan.answers, perplexities, strict=True):
        row = [answer.fleet.name]
        if answer.broken:
            row[0] += f", breaks {', '.join(one.constraint for one in answer.broken)}"
        if target:
            planned = answer.planned
            most = f">{question.settings.max_replicas}"
            unknown = most if answer.is_too_small else _DASH
            if brief:
                row += [str(answer.num_gpus) if planned else unknown]
            else:
                row += [str(planned.num_replicas) if planned else unknown]
                row += [str(answer.num_gpus) if planned else _DASH]
        row += _capacity_cells(answer, target)
        row += [] if brief else [number(user_rate(answer.figures))]
        row += [number(joules(answer.figures)), _percent(answer.agreement)]
        row += [number(perplexity, 4)] * has_perplexities
        if question.prices is not None:
            cost = answer.cost
            row += [number(cost.per_hour if cost else None)]
            row += [number(cost.per_million_tokens if cost else None)]
        rows.append(row)
    return titles, rows


def _capacity_cells(answer: FleetAnswer, target: bool) -> list[str]:
    if answer.capacity is None:
        return ["cannot serve", _DASH, _DASH]
    if answer.capacity.outcome == "none carried":
        return ["none", _DASH, _DASH]
    many = f" of {answer.capacity_replicas}" if target or answer.capacity_replicas > 1 else ""
    return [
        f"{number(answer.capacity.rate_per_s, 4)}{many}",
        bracket(answer.capacity),
        answer.bottleneck.cause if answer.bottleneck else _DASH,
    ]


def setting_rows(tuned: Tuned) -> Cells:
    """The winner's settings beside the scenario's own, with what each alone changes.

    That is the first objective as the setting varies around the winner, and at which values
    constraints break.
    """
    assert tuned.winner is not None
    judge, rows = tuned.question.judge, []
    varied = {one.key: one for one in tuned.sensitivity}
    for one in tuned.question.space.ranges:
        own = _as_it_stands(tuned, one.key)
        row = [one.key, "default" if own is None else str(own), str(tuned.winner.values[one.key])]
        part = varied[one.key]
        known = [score for score in part.scores if score is not None]
        row.append(between(min(known), max(known), 4) if known else _DASH)
        broken = [at for at, breaks in zip(part.values, part.breaks, strict=True) if breaks]
        rows.append([*row, ", ".join(_setting(at) for at in broken) or "none"])
    titles = ["Setting", "as it stands", "winner", f"{judge.goals[0].name} as it varies"]
    if str(judge.constraints):
        return [*titles, "breaks at"], rows
    return titles, [row[:-1] for row in rows]


def _as_it_stands(tuned: Tuned, key: str) -> Any:
    """What the scenario says of a setting, or its policy's default; None of what has neither."""
    own = tuned.question.space.own(key)
    if own is not None:
        return own
    use = tuned.question.space.base.policy[0].use
    options = policy_options(use) if use in policy_names() else {}
    default, _ = options.get(key.split(".")[-1], (None, ""))
    return list(default) if isinstance(default, tuple) else default


def trial_rows(tuned: Tuned, most: int = 10, with_settings: bool = False) -> Cells:
    """The winner, other good trials, and the scenario as it stands.

    Where no trial keeps the constraints, those that break them least stand there.
    """
    goal = tuned.question.judge.goals[0]
    shown = [one for one in tuned.trials if one.is_feasible]
    shown.sort(key=lambda one: (goal.cost((one.scores or (0.0,))[0]), one.number))
    if not shown:
        shown = by_violation(tuned.trials)
    if tuned.winner is not None:
        shown = [tuned.winner, *(one for one in shown if one is not tuned.winner)]
    columns = _figure_columns(tuned)
    keys = [one.key for one in tuned.question.space.ranges] if with_settings else []
    rows = []
    for trial in [*shown[:most], tuned.base]:
        own = [trial.values.get(key, _as_it_stands(tuned, key)) for key in keys]
        rows.append(
            [
                f"{trial.number}" if trial.number >= 0 else "as it stands",
                *(_told(value(trial), scale, digits) for _, value, scale, digits in columns),
                *("default" if one is None else _setting(one) for one in own),
                "; ".join(in_words(one) for one in trial.broken)
                or in_samples(trial.breaking)
                or "nothing",
            ]
        )
    return ["Trial", *(title for title, *_ in columns), *keys, "breaks"], rows


def _setting(value: Any) -> str:
    """A setting's value, not longer than it has to be."""
    return number(value, 4) if isinstance(value, float) else str(value)


def _told(value: float | None, scale: float, digits: int) -> str:
    return number(None if value is None else scale * value, digits)


Column: TypeAlias = tuple[str, Callable[[Trial], float | None], float, int]
"""A title, a trial's figure, the factor to the unit of the title, and digits."""


def _figure_columns(tuned: Tuned) -> list[Column]:
    """Objectives, what the constraints bound, and the main figures that neither has named."""
    judge = tuned.question.judge
    found: list[Column] = []
    for place, goal in enumerate(judge.goals):
        found.append((f"{goal.name} {goal.unit}".strip(), score_at(place), 1.0, 4))
    limits = judge.constraints.slo.limits if judge.constraints.slo else ()
    for place, limit in enumerate(limits):
        found.append((f"{limit_words(limit)} ms", reached_at(place), 1.0, 3))
    for place, bound in enumerate(judge.constraints.bounds, len(limits)):
        if bound.goal in judge.goals:
            continue
        title, scale = f"{bound.goal.name} {bound.goal.unit}".strip(), 1.0
        if bound.goal.name == "agreement":
            title, scale = "agree %", 100.0
        found.append((title, reached_at(place), scale, 3))
    named = {goal.name.partition(":")[0] for goal in judge.goals}
    named |= {limit.metric for limit in limits}
    named |= {bound.goal.name for bound in judge.constraints.bounds}
    others = (
        ("energy", "J/tok", "energy_per_output_token", 1e-3),
        ("agreement", "agree %", "agreement", 100.0),
        ("ttft", "TTFT p99 ms", "p99_ttft_ms", 1.0),
        ("tpot", "TPOT p99 ms", "p99_tpot_ms", 1.0),
    )
    found += [
        (title, mean_at(key), scale, 3) for name, title, key, scale in others if name not in named
    ]
    perplexities = trial_perplexities(tuned)
    if "perplexity" not in named and any(one is not None for one in perplexities.values()):
        found.append(("perplexity", lambda trial: perplexities[trial.number], 1.0, 4))
    return found


def finalist_rows(tuned: Tuned) -> Cells:
    """The finalists where they were tuned and where one of them was chosen."""
    goals = tuned.question.judge.goals
    titles = ["Trial"]
    for goal in goals:
        titles += [f"{goal.name} {goal.unit}".strip() + ", tuned on", "there"]
    rows = []
    for one in tuned.finalists:
        mark = ", the winner" if one.trial is tuned.winner else ""
        row = [f"{one.trial.number}{mark}"]
        for place in range(len(goals)):
            row.append(number((one.trial.scores or (None,) * len(goals))[place], 4))
            row.append(number(None if one.scores is None else one.scores[place], 4))
        broken = "; ".join(in_words(part) for part in one.broken)
        broken = broken or in_samples(one.breaking)
        rows.append([*row, broken or ("nothing" if one.keeps else "cannot be told")])
    return [*titles, "breaks there"], rows


def whatif_rows(cells: Sequence[Cell]) -> Cells:
    """A grid side by side: settings, policy, main figures."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.values))
    has_slo = any(cell.means.get("slo_attainment") is not None for cell in cells)
    titles = ["Policy", *short_keys(keys).values(), "tok/s"]
    if has_slo:
        titles += ["goodput req/s", "SLO met %"]
    titles += ["TTFT p99 ms", "TPOT p50 ms", "J/tok", "agree %", "load"]
    rows = []
    for cell, told in zip(cells, values_in_short(cells), strict=True):
        row = [cell.policy, *(told.get(key, _DASH) for key in keys)]
        if not cell.can_be:
            rows.append([*row, *[_DASH] * (len(titles) - len(row) - 1), "cannot be"])
            continue
        means = cell.means
        row.append(number(means.get("output_throughput")))
        if has_slo:
            row.append(number(means.get("request_goodput")))
            row.append(_percent(means.get("slo_attainment")))
        row += [
            number(means.get("p99_ttft_ms")),
            number(means.get("median_tpot_ms")),
            number(joules(means)),
            _percent(means.get("agreement")),
            cell.saturation,
        ]
        rows.append(row)
    return titles, rows


_COLUMNS = {
    "goodput": "goodput req/s",
    "throughput": "tok/s",
    "TTFT p99": "TTFT p99 ms",
    "TPOT p50": "TPOT p50 ms",
    "energy a token": "J/tok",
}
"""The titles under which the main figures of cells stand."""


def whatif_best(cells: Sequence[Cell]) -> set[tuple[int, int]]:
    """Rows and columns of the best main figures, where not all cells are level."""
    titles, _ = whatif_rows(cells)
    num_able = sum(cell.can_be for cell in cells)
    found: set[tuple[int, int]] = set()
    for goal in compared_by(cells):
        places, title = leaders(cells, goal), _COLUMNS[goal.name]
        if len(places) < num_able and title in titles:
            column = list(titles).index(title)
            found |= {(place, column) for place in places}
    return found


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def plan_records(plan: Plan) -> Rows:
    """Every load of every fleet, for `results.parquet`."""
    rows: Rows = []
    for rank, answer in enumerate(plan.answers, 1):
        for load in sorted(answer.loads, key=lambda one: (one.num_replicas, one.rate_per_s)):
            rows.append(_fleet_record(rank, answer) | _load_record(plan, answer, load))
        if not answer.loads:
            rows.append(
                _fleet_record(rank, answer)
                | {"refusal": None if answer.refusal is None else str(answer.refusal)}
            )
    return rows


def _fleet_record(rank: int, answer: FleetAnswer) -> dict[str, Any]:
    fleet = answer.fleet
    return {
        "rank": rank,
        "policy": fleet.policy.name,
        "profile": fleet.profile,
        "device": fleet.device,
        "candidates": "+".join(fleet.candidates),
        "router": fleet.router,
    }


def _load_record(plan: Plan, answer: FleetAnswer, load: Load) -> dict[str, Any]:
    planned = answer.planned
    is_planned = planned is not None and (planned.num_replicas, planned.rate_per_s) == (
        load.num_replicas,
        load.rate_per_s,
    )
    worst = load.verdict.worst
    worst_low, worst_high = worst.bounds
    mean_per_s = plan.question.mean_per_s(load.rate_per_s) if is_planned else None
    # Figures of the mean are no figures of the peak, at which the load was measured.
    means = answer.figures if mean_per_s == load.rate_per_s else load.means
    return {
        "num_replicas": load.num_replicas,
        "num_gpus": load.num_replicas * answer.fleet.gpus_per_replica,
        "rate_per_s": load.rate_per_s,
        "carried": load.verdict.carried,
        "sure": load.verdict.is_sure,
        "num_replications": load.verdict.num_replications,
        "worst_limit": worst.words,
        "worst_share": worst.mean,
        "worst_share_low": worst_low,
        "worst_share_high": worst_high,
        "planned": is_planned,
        "mean_rate_per_s": mean_per_s,
        "cost_per_hour": answer.cost.per_hour if is_planned and answer.cost else None,
        "cost_per_million_tokens": (
            answer.cost.per_million_tokens if is_planned and answer.cost else None
        ),
        "broken": "; ".join(in_words(one) for one in answer.broken) if is_planned else None,
        "tokens_per_s_per_user": user_rate(means),
        "tokens_per_s_per_gpu": gpu_rate(means),
        **_figures(means),
    }


_LEFT_OUT = ("schema_version", "seed", "num_gpus", "num_replicas", "warmup_s", "warmup_requests")


def _figures(means: Means) -> dict[str, float | None]:
    return {key: value for key, value in means.items() if key not in _LEFT_OUT}


def plan_front(plan: Plan) -> Rows:
    """Carried loads that no other beats in energy, tokens per user and tokens per GPU."""
    rows = [row for row in plan_records(plan) if row.get("carried")]
    keys = ("energy_per_output_token", "tokens_per_s_per_user", "tokens_per_s_per_gpu")
    known = [row for row in rows if all(row[key] is not None for key in keys)]
    costs = [(row[keys[0]], -row[keys[1]], -row[keys[2]]) for row in known]
    shown = (
        "policy",
        "profile",
        "candidates",
        "router",
        "num_replicas",
        "num_gpus",
        "rate_per_s",
        "request_goodput",
        "energy_per_output_token",
        "tokens_per_s_per_user",
        "tokens_per_s_per_gpu",
        "agreement",
    )
    return [{key: known[place][key] for key in shown} for place in front(costs)]


def trial_records(tuned: Tuned) -> Rows:
    """Every trial, for `results.parquet`; the scenario as it stands is number -1."""
    return [_trial_record(tuned, trial) for trial in (tuned.base, *tuned.trials)]


def _trial_record(tuned: Tuned, trial: Trial) -> dict[str, Any]:
    goals = tuned.question.judge.goals
    scores = trial.scores or (None,) * len(goals)
    finalist = next((one for one in tuned.finalists if one.trial is trial), None)
    own = {one.key: _as_it_stands(tuned, one.key) for one in tuned.question.space.ranges}
    return {
        "trial": trial.number,
        "state": trial.state,
        "feasible": trial.is_feasible,
        "winner": tuned.winner is not None and trial.number == tuned.winner.number,
        "finalist": finalist is not None,
        "broken_in_finals": "" if finalist is None else "; ".join(map(in_words, finalist.broken)),
        **{goal.name: score for goal, score in zip(goals, scores, strict=True)},
        "violation": sum(one.violation for one in trial.broken),
        "broken": "; ".join(in_words(one) for one in trial.broken),
        "num_breaking": trial.breaking[0],
        "num_samples": trial.breaking[1],
        "why_impossible": trial.why,
        **{f"setting {key}": value for key, value in (trial.values or own).items()},
        "tokens_per_s_per_user": user_rate(trial.means),
        "tokens_per_s_per_gpu": gpu_rate(trial.means),
        **_figures(trial.means),
    }


def tune_front(tuned: Tuned) -> Rows:
    """Trials that keep the constraints and that no other beats in the objectives and energy."""
    goals = tuned.question.judge.goals
    feasible = [one for one in tuned.trials if one.is_feasible and one.scores is not None]
    costs = []
    for trial in feasible:
        energy = joules(trial.means)
        own = tuned.question.judge.costs(trial.scores or ())
        costs.append((*own, math.inf if energy is None else energy))
    shown = ["trial", *(goal.name for goal in goals), "energy_per_output_token", "agreement"]
    rows = []
    for place in front(costs):
        record = _trial_record(tuned, feasible[place])
        names = [*shown, *(key for key in record if key.startswith("setting "))]
        rows.append({key: record.get(key) for key in names})
    return rows


def cell_records(cells: Sequence[Cell]) -> Rows:
    """Every cell of a grid, for `results.parquet`."""
    return [
        {
            "policy": cell.policy,
            **{f"setting {key}": value for key, value in cell.values.items()},
            "saturation": cell.saturation,
            "why_impossible": cell.why,
            "tokens_per_s_per_user": user_rate(cell.means),
            "tokens_per_s_per_gpu": gpu_rate(cell.means),
            **_figures(cell.means),
        }
        for cell in cells
    ]
