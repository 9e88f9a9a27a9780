"""A grid of what-ifs in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from helios_sim.profile import Profile
from helios_sim.report.words import (
    REQUEST_COST,
    extrapolated,
    idle_users,
    large_batches,
    launch_bound,
    mean_batches,
    waited_for_start,
    worth,
)
from helios_sim.scenario import Scenario
from helios_sim.search.goals import Goal
from helios_sim.search.quality import cell_perplexities, is_worse
from helios_sim.search.whatif import Cell, carries_as, compared_by, leaders, short_names
from helios_sim.search.words import (
    CANDIDATES,
    FULL_AGREEMENT,
    SAME_MODEL,
    assumed_everywhere,
    assumed_words,
    candidates_of,
    grades_by_name,
)
from helios_sim.wording import counted, limits, listed, number

MAX_NAMED: Final = 4
"""Cells that one clause names, at most."""

_TOKENS: Final = "output_throughput"
_FAR_APART: Final = 1.2
"""Seeds lie far apart where the most tokens a second are so many times the least."""
_DOMAINS: Final = "workload.domains"
_OTHER_TEXTS: Final = 0.05
"""Cells meet other texts where a domain's shares of the requests differ by so much."""


def whatif_answer(cells: Sequence[Cell], replications: int) -> list[str]:
    """Which cell is best in which figure, a sentence for each; the first is the headline.

    It speaks of the first figure that cells are compared by.
    """
    able = [cell for cell in cells if cell.can_be]
    if not able:
        return [f"None of {counted(len(cells), 'cell')} can be run."]
    names, goals = short_names(able), compared_by(able)
    if len(able) == 1:
        figures = [f"{goal.name} {_best_value(able[0], goal)}" for goal in goals]
        return [f"{names[0]} has {listed(figures)}; there is no other to compare it with."]
    names = [
        f"{name} ({cell.saturation})" if cell.saturation == "overloaded" else name
        for name, cell in zip(names, able, strict=True)
    ]
    told: dict[tuple[int, ...], list[str]] = {}
    for goal in goals:
        best, *others = leaders(able, goal)
        figure = f"{goal.name} ({_best_value(able[best], goal)})"
        carrying = [carries_as(able[one], able[best], goal) for one in others]
        if any(carrying):
            same = ", of the same load" * all(carrying)
            figure = f"{goal.name} (up to {_best_value(able[best], goal)}{same})"
        told.setdefault(tuple(sorted([best, *others])), []).append(figure)
    intervals = " beyond their 95 % intervals" if replications > 1 else ""
    sentences = []
    for places, figures in told.items():
        if len(places) == len(able):
            sentences.append(
                f"The {len(able)} cells do not differ{intervals} in {listed(figures)}."
            )
            continue
        who = [names[place] for place in places]
        if len(who) > MAX_NAMED:
            who = [*who[: MAX_NAMED - 1], f"{len(who) - MAX_NAMED + 1} more"]
        rank = "Best" if len(who) == 1 else "Level at the top"
        sentences.append(f"{rank} in {listed(figures)}: {listed(who)}.")
    return sentences


def _best_value(cell: Cell, goal: Goal) -> str:
    """A cell's figure in its unit."""
    value = cell.means.get(goal.key)
    return f"{number(None if value is None else goal.scale * value)} {goal.unit}"


def whatif_remarks(
    scenario: Scenario, cells: Sequence[Cell], replications: int, profiles: Sequence[Profile]
) -> list[str]:
    """What has to be said beside a grid on these profiles, the answer beyond its headline first."""
    runs = f"means over {replications} runs each"
    if replications == 1:
        runs = "one run each: what is chance shows only over several, which --replications gives"
    found = [*whatif_answer(cells, replications)[1:], f"{counted(len(cells), 'cell')}, {runs}."]
    slo = scenario.slo_spec
    if slo is not None and not any(key.startswith("slo") for cell in cells for key in cell.values):
        found.append(f"SLO: {limits(str(slo))}; a request that meets all of it is good.")
    found += [f"{cell.name} cannot be run: {cell.why}" for cell in cells if cell.why]
    able = [cell for cell in cells if cell.can_be]
    found += _seeds_apart(able)
    found += _other_texts(scenario, able)
    found += _qualities(able, profiles)
    played = [{**cell.means, "label": cell.name} for cell in able]
    found += [*waited_for_start(played), *idle_users(played)]
    beyond = extrapolated([(cell.name, cell.beyond) for cell in cells])
    grades = []
    if profiles:
        counts = grades_by_name(profiles)
        free = [
            one
            for one, cell in zip(played, able, strict=True)
            if not any(REQUEST_COST in key for key in cell.values)
        ]
        grades = [
            worth(counts, "cells"),
            *launch_bound(counts, played, "cells"),
            *large_batches(counts, mean_batches(free), assumed_everywhere(profiles)),
        ]
    varied = [cell.values[CANDIDATES] for cell in cells if CANDIDATES in cell.values]
    keys = {key for cell in cells for key in cell.values}
    assumed = assumed_words(profiles, candidates_of(scenario, varied), keys)
    return [*found, *grades, *assumed, *beyond]


def _seeds_apart(able: Sequence[Cell]) -> list[str]:
    """The cell whose seeds lie furthest apart: its mean may be what no run has."""
    ends = []
    for name, cell in zip(short_names(able), able, strict=True):
        tokens = [one for run in cell.runs if (one := run.get(_TOKENS)) is not None]
        if tokens and min(tokens) > 0.0:
            ends.append((max(tokens) / min(tokens), min(tokens), max(tokens), name))
    if not ends or max(ends)[0] < _FAR_APART:
        return []
    _, least, most, name = max(ends)
    return [f"Seeds lie far apart with {name}: {number(least)} to {number(most)} tokens/s."]


def _other_texts(scenario: Scenario, able: Sequence[Cell]) -> list[str]:
    """That cells meet other texts, where it is not the texts that are varied."""
    if not able or any(key.startswith(_DOMAINS) for cell in able for key in cell.values):
        return []
    names, apart = short_names(able), []
    for domain in dict.fromkeys(domain for cell in able for domain in cell.mix):
        shares = [cell.mix.get(domain, 0.0) for cell in able]
        apart.append((max(shares) - min(shares), domain, min(shares), max(shares), shares))
    if not apart or max(apart)[0] < _OTHER_TEXTS:
        return []
    _, domain, low, high, shares = max(apart)
    said = (
        f"Texts differ: {domain} has {number(100 * low)} % of the requests with "
        f"{names[shares.index(low)]} and {number(100 * high)} % with {names[shares.index(high)]}, "
        "so quality, and what exits save, differ for that too."
    )
    if any(one.shares is not None for one in scenario.workload.domains):
        said += (
            f" Shares over time are in seconds of the run: give {_DOMAINS} fixed shares, or "
            "simulate each rate alone, with their times divided by how much faster it is."
        )
    return [said]


def _qualities(able: Sequence[Cell], profiles: Sequence[Profile]) -> list[str]:
    """In what quality cells differ: tokens unlike those at full depth, and other perplexities."""
    names, said = short_names(able), []
    agreements = [
        (agreement, name)
        for name, cell in zip(names, able, strict=True)
        if (agreement := cell.means.get("agreement")) is not None
    ]
    if agreements and max(agreements)[0] - min(agreements)[0] >= 1.0 - FULL_AGREEMENT:
        (low, least), (high, most) = min(agreements), max(agreements)
        said.append(
            f"{number(100 * low)} % of the tokens equal those of the {SAME_MODEL} with {least}, "
            f"{number(100 * high)} % with {most}"
        )
    known = cell_perplexities(able, profiles)
    each = [(value, name) for name, value in zip(names, known, strict=True) if value is not None]
    if each and is_worse(max(each)[0], min(each)[0]):
        (low, best), (high, worst) = min(each), max(each)
        said.append(f"perplexity is {number(low, 4)} with {best}, {number(high, 4)} with {worst}")
    return [f"Quality differs: {'; '.join(said)}."] if said else []
