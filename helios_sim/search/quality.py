"""Quality beyond agreement: whose perplexities compare, and who is clearly worse in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from helios_sim.profile import Profile
from helios_sim.search.goals import Constraints
from helios_sim.search.means import Means
from helios_sim.search.plan import Plan
from helios_sim.search.tune import Trial, Tuned
from helios_sim.search.whatif import Cell
from helios_sim.wording import number

CLEARLY: Final = 1.02
"""How many times another's a perplexity has to be to count as worse."""

Side = tuple[Sequence[str], Means]
"""Models that served, and the figures of those runs."""


def perplexities(
    sides: Sequence[Side], compared: Iterable[str], profiles: Iterable[Profile]
) -> list[float | None]:
    """The perplexity of each side; None for one that compares with no other model's.

    Agreement compares a model with itself, so that models differ in perplexity alone, and those of
    one tokenizer compare. It is that of the first side that shares its own with others of the
    models `compared`.
    """
    tokenizers = {
        name: entry.model.tokenizer for one in profiles for name, entry in one.models.items()
    }
    shared = [tokenizers[name] for name in set(compared) if name in tokenizers]
    own = [{tokenizers[name] for name in models if name in tokenizers} for models, _ in sides]
    chosen = next(
        (one for one in own if len(one) == 1 and all(shared.count(name) > 1 for name in one)), None
    )
    return [
        None if chosen is None or mine != chosen else means.get("perplexity")
        for mine, (_, means) in zip(own, sides, strict=True)
    ]


def fleet_perplexities(plan: Plan) -> list[float | None]:
    """The perplexity of each answer of a plan, where it compares with another model's."""
    sides = [(one.models, one.figures) for one in plan.answers]
    compared = {name for one in plan.answers for name in one.fleet.candidates}
    return perplexities(sides, compared, plan.question.profiles.values())


def trial_perplexities(tuned: Tuned) -> dict[int, float | None]:
    """The perplexity of each trial by its number, where it compares with another model's."""
    question, trials = tuned.question, [tuned.base, *tuned.trials]
    own = question.scenario.fleet.candidates
    varied = [one.choices for one in question.space.ranges if one.key == "fleet.candidates"]
    sets = [own, *(candidates for choices in varied for candidates in choices)]
    compared = {name for candidates in sets for name in candidates}
    if not all(sets):
        compared = {name for one in question.profiles for name in one.models}
    known = perplexities([(one.models, one.means) for one in trials], compared, question.profiles)
    return {trial.number: value for trial, value in zip(trials, known, strict=True)}


def cell_perplexities(cells: Sequence[Cell], profiles: Sequence[Profile]) -> list[float | None]:
    """The perplexity of each cell, where it compares with another model's that served."""
    served = {name for cell in cells for name in cell.models}
    return perplexities([(cell.models, cell.means) for cell in cells], served, profiles)


def uncompared(known: Iterable[float | None], figures: Iterable[Means]) -> str:
    """A sentence, after a space, where only some perplexities are shown beside one another."""
    shown = [
        value is not None
        for value, means in zip(known, figures, strict=True)
        if means.get("perplexity") is not None
    ]
    if all(shown) or not any(shown):
        return ""
    return " Perplexity is given for models of one tokenizer; that of others does not compare."


def is_worse(value: float | None, other: float | None) -> bool:
    """Whether a perplexity is clearly worse than another one."""
    return value is not None and other is not None and value >= CLEARLY * other


def fleet_pays(plan: Plan) -> list[str]:
    """That what is recommended has a clearly worse perplexity than another fleet."""
    question = plan.question
    mine, *others = zip(plan.answers, fleet_perplexities(plan), strict=True)
    able = [(one, value) for one, value in others if one.planned is not None and not one.broken]
    worse = [(one, value) for one, value in able if value and is_worse(mine[1], value)]
    if not worse or mine[1] is None or _is_bounded(question.constraints):
        return []
    # Of those about as good as the best in this, the first costs least.
    best = min(value for _, value in worse)
    other, value = next((one, value) for one, value in worse if not is_worse(value, best))
    differ = set(mine[0].models) != set(other.models)
    given = mine[0].fleet.name, mine[1], other.fleet.name, value
    return [_pays(*given, differ, "plan", question.constraints)]


def winner_pays(tuned: Tuned) -> list[str]:
    """That the winner's perplexity is clearly worse than the scenario's own, or another trial's."""
    winner, constraints = tuned.winner, tuned.question.judge.constraints
    known = trial_perplexities(tuned)
    if winner is None or _is_bounded(constraints):
        return []
    mine, other = known[winner.number], tuned.base
    if not is_worse(mine, known[other.number]):
        others = [one for one in tuned.trials if one.is_feasible and known[one.number]]
        other = min(others, key=lambda one: known[one.number] or math.inf, default=tuned.base)
    value = known[other.number]
    if mine is None or value is None or not is_worse(mine, value):
        return []
    differ = set(winner.models) != set(other.models)
    return [_pays(_named(winner), mine, _named(other), value, differ, "search", constraints)]


def _named(trial: Trial) -> str:
    return "the scenario as it stands" if trial.number < 0 else f"trial {trial.number}"


def _is_bounded(constraints: Constraints) -> bool:
    return any(bound.goal.name == "perplexity" for bound in constraints.bounds)


def _pays(
    who: str,
    mine: float,
    other: str,
    value: float,
    differ: bool,
    table: str,
    constraints: Constraints,
) -> str:
    """A worse perplexity beside a better one, and which constraint asks for the better."""
    blind = " Agreement does not show it: it compares each model with itself." if differ else ""
    asked = ";".join(part for part in (str(constraints), f"perplexity<={_bound(value)}") if part)
    return (
        f"Quality: perplexity is {number(mine, 4)} with {who}, and {number(value, 4)} with "
        f'{other}.{blind} {table}.constraints = "{asked}" asks for the better one.'
    )


def _bound(value: float) -> str:
    """A bound that a perplexity keeps, though others differ a little, and a worse one breaks."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value * (1.0 + CLEARLY) / 2.0 / step) * step:.4g}"
