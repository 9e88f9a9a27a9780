"""Capacity planning: the highest rate a fleet carries, the smallest fleet for one, and its day."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from helios_sim.errors import InputError
from helios_sim.scenario import Scenario
from helios_sim.search.bench import FleetAnswer, Load, planned_scenario
from helios_sim.search.fleets import PlanQuestion
from helios_sim.search.goals import in_words
from helios_sim.wording import counted, number


@dataclass(frozen=True)
class Hour:
    """One hour of the day: its rate, the replicas it needs, what they cost."""

    hour: int
    rate_per_s: float
    num_replicas: int
    cost_per_hour: float | None


@dataclass(frozen=True)
class Plan:
    """Answers in order of merit, the first recommended, with its own capacity and its day.

    Where none is enough, `why_none` says so, and the first is the one that comes nearest.
    """

    question: PlanQuestion
    answers: tuple[FleetAnswer, ...]
    best: FleetAnswer
    headroom: float
    hours: tuple[Hour, ...] = field(default=())
    why_none: str = ""


def ranked(question: PlanQuestion, answers: Sequence[FleetAnswer]) -> tuple[FleetAnswer, ...]:
    """Answers in order of merit: those that plan something and keep the constraints first.

    Among them the cheapest comes first.
    """

    def merit(answer: FleetAnswer) -> tuple[Any, ...]:
        planned = answer.planned
        if planned is None or answer.num_gpus is None:
            near = answer.capacity.rate_per_s if answer.capacity else -1.0
            return 2, -near, 0.0, 0.0
        joules = answer.figures.get("energy_per_output_token") or 0.0
        tier = 1 if answer.broken else 0
        if question.target_per_s is None:
            carried = planned.rate_per_s / answer.num_gpus
            price = answer.cost.per_million_tokens if answer.cost else None
            return tier, -carried if price is None else price, joules, 0.0
        price = answer.cost.per_hour if answer.cost else float(answer.num_gpus)
        return tier, price, answer.num_gpus, joules

    return tuple(sorted(answers, key=merit))


def check_answerable(question: PlanQuestion, answers: Sequence[FleetAnswer]) -> FleetAnswer:
    """The best answer; if none plans anything, an `InputError` with the nearest miss."""
    best = ranked(question, answers)[0]
    if best.broken:
        able = [one for one in answers if one.planned is not None]
        near = min(able, key=lambda one: sum(broken.violation for broken in one.broken))
        raise InputError(
            f"None of {len(able)} fleet{'s' if len(able) != 1 else ''} that meet the SLO keeps the "
            f"constraints {question.constraints}. {near.fleet.name!r} comes nearest and breaks "
            f"{', '.join(in_words(one) for one in near.broken)}. Give a looser constraint, or "
            "other policies.",
            f"{question.where}, plan.constraints",
        )
    if best.planned is not None:
        return best
    refusals = [answer.refusal for answer in answers if answer.refusal is not None]
    if len(refusals) == len(answers):
        raise _no_fleet(question, refusals)
    if best.capacity is not None and best.capacity.rate_per_s > 0.0:
        raise InputError(
            f"No fleet of up to {counted(question.settings.max_replicas, 'replica')} carries "
            f"{question.target_per_s:.4g} requests/s; one replica of {best.fleet.name!r} carries "
            f"{best.capacity.rate_per_s:.4g}. Raise max_replicas.",
            f"{question.where}, plan.max_replicas",
        )
    missed = [one for one in answers if one.capacity is not None and one.capacity.probes]
    nearest = min(missed, key=lambda one: _lowest(one).verdict.worst.shortfall)
    refused = share_refused(_lowest(nearest))
    remedy = "Give a looser limit, or models and devices that answer sooner."
    if refused > 1.0 - _lowest(nearest).verdict.worst.target:
        remedy = (
            'No limit mends that: give models with a longer context, or over_context = "truncate" '
            "or more memory, so that fewer requests are refused."
        )
    raise InputError(
        f"The SLO is met by none of {len(answers)} fleet{'s' if len(answers) != 1 else ''}, even "
        f"at the lowest rate. {nearest.fleet.name!r} comes nearest: {miss_in_words(nearest)}. "
        f"{remedy}",
        f"{question.where}, slo",
    )


def _no_fleet(question: PlanQuestion, refusals: Sequence[InputError]) -> InputError:
    """Why no fleet could be tried: the fleets, or something else in what all of them were asked."""
    first = refusals[0]
    # A point calls the scenario it plays "scenario", whatever the file.
    places = [(one.where or "").removeprefix("scenario, ") for one in refusals]
    if any(place.startswith(("fleet", "policy")) for place in places):
        where = f"{question.where}, {places[0]}" if places[0] else question.where
        return InputError(f"No fleet can serve this at all. {first.message}", where)
    if first.where is None or first.where == places[0]:
        return first
    return InputError(first.message, f"{question.where}, {places[0]}")


def _lowest(answer: FleetAnswer) -> Load:
    return min(answer.loads, key=lambda load: load.rate_per_s)


def share_refused(load: Load) -> float:
    """The share of a load's requests that are refused, since they can never fit."""
    refused, of = load.means.get("num_refused"), load.means.get("num_requests")
    return refused / of if refused and of else 0.0


def miss_in_words(answer: FleetAnswer) -> str:
    """Which criterion a fleet misses at the lowest rate tried, and by how much."""
    load = _lowest(answer)
    worst = load.verdict.worst
    if not worst.limit:
        overloaded = load.saturations.count("overloaded")
        return (
            f"at {load.rate_per_s:.3g} requests/s the backlog grows in {overloaded} of "
            f"{len(load.saturations)} runs"
        )
    text = (
        f"at {load.rate_per_s:.3g} requests/s {worst.words} is met by {100 * worst.mean:.1f} % of "
        f"the requests, {100 * worst.target:g} % needed"
    )
    if worst.value_ms is not None and worst.limit_ms is not None:
        over = worst.value_ms / worst.limit_ms - 1.0
        text += (
            f" (that percentile is {worst.value_ms:.4g} ms, "
            f"{100 * over:.0f} % over {worst.limit_ms:g} ms)"
        )
    if refused := share_refused(load):
        text += f"; {number(100 * refused)} % are refused, since they can never fit"
    return text


def make_plan(question: PlanQuestion, answers: Sequence[FleetAnswer], best: FleetAnswer) -> Plan:
    """The plan, once the recommended fleet's own capacity is known."""
    assert best.capacity is not None
    others = [one for one in ranked(question, answers) if one.fleet != best.fleet]
    asked = question.target_per_s or question.traffic.rate_per_s
    headroom = best.capacity.rate_per_s / asked - 1.0
    return Plan(question, (best, *others), best, headroom, _hours(question, answers, best))


def no_plan(question: PlanQuestion, answers: Sequence[FleetAnswer], why: str) -> Plan:
    """The plan that recommends nothing, with what was found of every fleet."""
    every = ranked(question, answers)
    return Plan(question, every, every[0], -1.0, why_none=why)


def _hours(
    question: PlanQuestion, answers: Sequence[FleetAnswer], best: FleetAnswer
) -> tuple[Hour, ...]:
    """Replicas hour by hour, from what one surely carries alone and what it does in the fleet.

    The smaller of the two counts, so that neither pooling nor uneven routing is relied on. The
    busiest hour has the fleet that was measured for it.
    """
    weights, target = question.settings.hourly_weights, question.target_per_s
    if not weights or target is None or best.planned is None or best.capacity is None:
        return ()
    alone = next(one for one in answers if one.fleet == best.fleet).capacity
    assert alone is not None
    peak = best.planned.num_replicas
    # The fleet surely carries the target, whatever the bounds of its capacity.
    together = max(best.capacity.low_per_s, target) / best.capacity_replicas
    each = min(alone.low_per_s, together)
    found = []
    for hour, weight in enumerate(weights):
        rate = target * weight / max(weights)
        num = peak
        if weight < max(weights) and each > 0.0:
            num = min(peak, max(1, math.ceil(rate / each - 1e-9)))
        per_hour = None if best.cost is None else best.cost.per_hour * num / peak
        found.append(Hour(hour, rate, num, per_hour))
    return tuple(found)


def recommended(plan: Plan) -> Scenario:
    """The scenario that the plan recommends, at the rate it is planned for."""
    question, best = plan.question, plan.best
    assert best.planned is not None
    scenario = planned_scenario(question, best.fleet, best.planned)
    # One replica gets every request whoever routes; more of them may be tried from here.
    routed = scenario.fleet.model_copy(update={"router": best.fleet.router})
    scenario = scenario.model_copy(update={"fleet": routed})
    models = "+".join(best.fleet.candidates)
    rate_per_s, mean_per_s = best.planned.rate_per_s, question.mean_per_s(best.planned.rate_per_s)
    peak = ""
    if mean_per_s != rate_per_s:
        peak = f"; its rate is a mean of {mean_per_s:.4g}, planned for a peak of {rate_per_s:.4g}"
    said = (
        f"Recommended by helios plan: {best.planned.num_replicas} x {best.fleet.policy.name}, "
        f"{models} on {best.fleet.profile}; carries "
        f"{plan.best.capacity.rate_per_s:.4g} requests/s in all{peak}."  # type: ignore[union-attr]
    )
    return scenario.model_copy(
        update={"name": f"{scenario.name}_plan", "notes": (*scenario.notes, said)}
    )
