"""A plan in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from helios_sim.report.words import extrapolated, large_batches, launch_bound, worth
from helios_sim.search.bench import FleetAnswer
from helios_sim.search.capacity import Capacity
from helios_sim.search.goals import in_words
from helios_sim.search.plan import Plan, miss_in_words
from helios_sim.search.prices import grades_of
from helios_sim.search.quality import fleet_pays
from helios_sim.search.verdict import Criterion
from helios_sim.search.words import (
    ALIKE,
    FULL_AGREEMENT,
    SAME_MODEL,
    TIMES,
    assumed_everywhere,
    assumed_words,
    few_rounds_words,
    grades_by_name,
    headroom_words,
    shared_words,
    short_words,
)
from helios_sim.settings.questions import MAX_PEAK_FACTOR
from helios_sim.wording import counted, limits, listed, number


def fleet_words(answer: FleetAnswer, replicas: int | None = None) -> str:
    """A fleet as people say it: '3 x static-depth, opt-6.7b on opt-a100-40gb, round-robin'."""
    num = replicas or answer.capacity_replicas
    return f"{num} {TIMES} {answer.fleet.name}"


def bracket(capacity: Capacity) -> str:
    """The bounds of a capacity."""
    high = "beyond" if math.isinf(capacity.high_per_s) else number(capacity.high_per_s, 4)
    low = number(capacity.low_per_s, 4) if capacity.low_per_s else "0"
    return f"{low} to {high}"


def plan_headline(plan: Plan) -> str:
    """The answer in one sentence."""
    if plan.why_none:
        return plan.why_none
    best, target = plan.best, plan.question.target_per_s
    assert best.capacity is not None and best.planned is not None
    agreement = best.agreement
    quality = ""
    if agreement is not None and agreement < FULL_AGREEMENT:
        quality = f", at {number(100 * agreement)} % agreement"
    if target is None:
        return (
            f"{fleet_words(best)} carries {number(best.capacity.rate_per_s, 4)} requests/s under "
            f"the SLO{' and the constraints' * (best.for_slo is not None)} "
            f"({bracket(best.capacity)}){quality}."
        )
    mean = plan.question.mean_per_s(target)
    peak = f" on average, {number(target, 4)} at the peak," if mean != target else ""
    return f"{number(mean, 4)} requests/s{peak} take {_sized(plan, best)}{quality}."


def _sized(plan: Plan, answer: FleetAnswer) -> str:
    """The devices of a fleet for the target, and the fleet."""
    assert answer.planned is not None
    devices = counted(answer.num_gpus or 0, plan.question.device)
    return f"{devices}: {fleet_words(answer, answer.planned.num_replicas)}"


def _in_full(plan: Plan) -> str:
    """What the best fleet is whose tokens all equal those at full depth, or the nearest to that."""
    known = [one for one in plan.answers if one.agreement is not None and not one.broken]
    best = max(known, key=lambda one: min(one.agreement or 0.0, FULL_AGREEMENT))
    share = f"{number(100 * (best.agreement or 0.0))} % agreement"
    if best.fleet == plan.best.fleet:
        return f"No fleet compared has more than {share}."
    if plan.question.target_per_s is not None:
        return f"At {share} they take {_sized(plan, best)}."
    assert best.capacity is not None
    return (
        f"At {share} {fleet_words(best)} carries {number(best.capacity.rate_per_s, 4)} "
        f"({bracket(best.capacity)})."
    )


def plan_remarks(plan: Plan) -> list[str]:
    """What has to be said beside the headline."""
    parts = _NO_PLAN_REMARKS if plan.why_none else _PLAN_REMARKS
    return [text for part in parts for text in part(plan)]


def _held_alike(plan: Plan) -> list[str]:
    """The device and the models, where no fleet's name has them since all have the same."""
    fleets, found = plan.question.fleets, []
    if len({one.profile for one in fleets}) == 1:
        one = fleets[0]
        kind = plan.question.device
        each = f", {counted(one.gpus_per_replica, kind)} a replica" * (one.gpus_per_replica > 1)
        found.append(f"Device: {one.device}{each}, profile {one.profile}.")
    if len({one.candidates for one in fleets}) == 1:
        found += _serving(plan)
    return found


def _serving(plan: Plan) -> list[str]:
    """Which of the candidates served, in which fleets where they differ in that."""
    held: dict[str, list[str]] = {}
    for answer in plan.answers:
        num = len(answer.fleet.candidates)
        models = answer.fleet.candidates if num == 1 else answer.models
        of_all = f" of {num} candidates" if len(models) < num else ""
        if models:
            held.setdefault(f"{listed(models)}{of_all}", []).append(answer.fleet.name)
    if not held:
        return []
    if len(held) == 1:
        return [f"Serving: {next(iter(held))}."]
    each = [f"{models} ({', '.join(names)})" for models, names in held.items()]
    return [f"Serving: {'; '.join(each)}."]


def _target(plan: Plan) -> list[str]:
    """What the target is made of, where it is not a rate that the scenario gives."""
    settings, target = plan.question.settings, plan.question.target_per_s
    if target is None:
        return []
    factor, mean = settings.peak_factor, plan.question.mean_per_s(target)
    times = f" times the peak factor of {factor:g}" if factor != 1.0 else ""
    if settings.users is not None and settings.requests_per_user_per_min is not None:
        num = settings.requests_per_user_per_min
        each = f"{num:g} request{'s' * (num != 1.0)}"
        said = f"Target: {counted(settings.users, 'user')} with {each} a minute each"
        if times:
            said += f", or {number(mean, 4)} requests/s,{times}"
    elif times:
        said = f"Target: {number(mean, 4)} requests/s{times}"
    else:
        return []
    said += f", which is {number(target, 4)} requests/s."
    if times and not plan.why_none:
        said += (
            " Fleets are sized for that peak; scenario.toml, energy and cost are of the mean of "
            f"{number(mean, 4)}."
        )
    return [said]


def _objective(plan: Plan) -> list[str]:
    """The SLO, and the share of the requests that it asks for where it names none."""
    slo, share = plan.question.slo, plan.question.settings.attainment
    said = f"SLO: {limits(str(slo))}"
    if any(limit.percentile is None for limit in slo.limits):
        said += f", by {100 * share:g} % of the requests sent"
    return [f"{said}."]


def _carried(plan: Plan) -> list[str]:
    """What the recommended fleet carries, against what is asked of it."""
    capacity, question = plan.best.capacity, plan.question
    assert capacity is not None
    if question.target_per_s is not None:
        return [
            f"That fleet carries {number(capacity.rate_per_s, 4)} requests/s in all "
            f"({bracket(capacity)}): {headroom_words(plan.headroom)}."
        ]
    return [
        f"The scenario's own rate is {number(question.traffic.rate_per_s, 4)} requests/s: "
        f"{headroom_words(plan.headroom)}."
    ]


def _as_it_stands(plan: Plan) -> list[str]:
    """That the recommended scenario, run once as it stands, misses the SLO, and what helps."""
    question, planned, whole = plan.question, plan.best.planned, plan.best.whole
    if planned is None or whole is None or whole.carried:
        return []
    at = number(question.mean_per_s(planned.rate_per_s), 4)
    what = f"that fleet misses {listed([_missed(one) for one in whole.broken])}"
    if not question.traffic.replays:
        return [
            f"In one run of scenario.toml, at {at} requests/s, {what}; over samples it carries "
            "that rate on average."
        ]
    factor, given = question.traffic.peak_factor, question.settings.peak_factor
    why = ""
    if factor >= 1.0 + ALIKE:
        why = f": its busiest window has {factor:.2f} times that rate"
        helps = question.target_per_s is not None and given < factor <= MAX_PEAK_FACTOR
        if helps and not _peak_missed(plan):
            why += f"; plan.peak_factor = {_peak_asked(factor)} plans for it"
    said = f"On the trace as it is, at {at} requests/s on average, {what}{why}."
    if (num := plan.best.num_for_whole) is not None:
        said += f" {counted(num, 'replica')} meet the SLO there."
    return [said]


def _missed(one: Criterion) -> str:
    """A criterion that a run misses, and what it reaches."""
    if not one.limit:
        return one.words
    reached = f"{number(100 * one.mean)} %"
    if one.value_ms is not None:
        reached = f"{number(one.value_ms, 4)} ms"
    return f"{one.words} ({reached})"


def _peak_asked(factor: float) -> str:
    """A peak factor as a setting that is no less than it."""
    return f"{math.ceil(100 * factor) / 100:g}"


def _mean(plan: Plan) -> list[str]:
    """That rates are means, where the workload changes with time, and what its peak is."""
    traffic, planned = plan.question.traffic, plan.best.planned
    assert planned is not None
    factor = traffic.peak_factor
    if traffic.replays or factor < 1.0 + ALIKE:
        return []
    return [
        "Rates are means of a workload that changes with time, which samples play whole: its peak "
        f"is {factor:.2f} times the mean, {number(factor * planned.rate_per_s, 4)} requests/s "
        f"where the mean is {number(planned.rate_per_s, 4)}."
    ]


def _breaks_first(plan: Plan) -> list[str]:
    """Which limit is missed at the first rate that is, and what is short there."""
    capacity, bottleneck = plan.best.capacity, plan.best.bottleneck
    assert capacity is not None
    if capacity.outcome == "all carried":
        found = ["No rate tried was missed: the search ended before the SLO broke."]
    else:
        first = capacity.first_missed
        what = listed([one.words for one in first.verdict.broken])
        found = [f"First to break, at {number(first.rate_per_s, 4)}: {what}."]
    if bottleneck is not None:
        found.append(f"Bottleneck: {bottleneck.cause}; {bottleneck.evidence}.")
    return found


def _too_short(plan: Plan) -> list[str]:
    """That the samples behind the answer are too short for it, if they are."""
    short, few = plan.best.short, plan.best.of_few_rounds
    found = [] if short is None else [short_words(plan.question.traffic, short)]
    return found if few is None else [*found, few_rounds_words(plan.question.traffic, few)]


def _shortened(plan: Plan) -> list[str]:
    """How many requests are longer than what every fleet has a place for, and are cut."""
    num, of = (plan.best.figures.get(key) for key in ("num_shortened", "num_requests"))
    if not num or not of:
        return []
    return [
        f"{number(100 * num / of)} % of the requests are shortened to "
        f"{number(plan.question.context_tokens)} tokens, for all fleets alike."
    ]


def _quality(plan: Plan) -> list[str]:
    """What full agreement takes, where nobody has set a floor and the best fleet has less."""
    agreement = plan.best.agreement
    if agreement is None or agreement >= FULL_AGREEMENT or plan.question.has_floor:
        return fleet_pays(plan)
    return [_in_full(plan), *fleet_pays(plan)]


def _constraints(plan: Plan) -> list[str]:
    """The constraints, and which fleets break them."""
    constraints = plan.question.constraints
    if not str(constraints):
        return []
    kept = "" if plan.why_none else f"; kept by what is recommended{_kept_if(plan)}"
    found = [f"Constraints: {constraints}{kept}."]
    if not plan.why_none:
        found += [*_taken_by_constraints(plan), *_kept_by_chance(plan.best)]
    for one in plan.answers:
        if one.broken:
            what = listed([in_words(each) for each in one.broken])
            found.append(f"Not recommended: {one.fleet.name}, which breaks {what}.")
    return found


def _kept_if(plan: Plan) -> str:
    """Whose quality the constraints are kept with, where that of a model is another model's.

    Tokens at full depth agree with themselves, whoever the model is.
    """
    best, bounds = plan.best, plan.question.constraints.bounds
    rests = {"perplexity": True, "agreement": best.agreement != 1.0}
    named = [bound.goal.name for bound in bounds if rests.get(bound.goal.name)]
    stand_ins = plan.question.profiles[best.fleet.profile].stand_ins
    models = [name for name in best.models or best.fleet.candidates if name in stand_ins]
    if not named or not models:
        return ""
    what = listed(list(dict.fromkeys(named)))
    each = listed([f"{name} has the {what} of {stand_ins[name]}" for name in models])
    return f" if {each}, which nobody observed"


def _taken_by_constraints(plan: Plan) -> list[str]:
    """What the SLO alone would take, or allow, where the constraints take more or allow less."""
    load, planned = plan.best.for_slo, plan.best.planned
    if load is None or planned is None:
        return []
    if plan.question.target_per_s is None:
        return [
            f"The SLO alone allows {number(load.rate_per_s, 4)} requests/s; the constraints lower "
            f"that to {number(planned.rate_per_s, 4)}."
        ]
    return [
        f"The SLO alone takes {counted(load.num_replicas, 'replica')}; the constraints take "
        f"{planned.num_replicas}."
    ]


def _kept_by_chance(best: FleetAnswer) -> list[str]:
    """That constraints are kept on average and broken in some samples, where chance decides."""
    if not best.num_breaking:
        return []
    return [
        f"{best.fleet.name} decides on few evaluated requests: it keeps the constraints on "
        f"average, and breaks them in {best.num_breaking} of {counted(best.num_judged, 'sample')}."
    ]


def _energy(plan: Plan) -> list[str]:
    """Energy a token, and beside it the quality of those tokens."""
    energy, agreement = plan.best.figures.get("energy_per_output_token"), plan.best.agreement
    if energy is None:
        return []
    assert plan.best.planned is not None
    at = number(plan.question.mean_per_s(plan.best.planned.rate_per_s), 4)
    said = f"Energy at {at} requests/s: {number(1e-3 * energy)} J an output token"
    if agreement is not None:
        said += f"; {number(100 * agreement)} % of the tokens equal those of the {SAME_MODEL}"
    return [f"{said}."]


def _cost(plan: Plan) -> list[str]:
    """What the fleet costs, at which prices, and what its day does."""
    cost, prices, planned = plan.best.cost, plan.question.prices, plan.best.planned
    if cost is None or prices is None or planned is None:
        return []
    currency = prices.currency
    at = number(plan.question.mean_per_s(planned.rate_per_s), 4)
    grades = listed(grades_of(prices, [plan.best.fleet.device]))
    found = [
        f"Cost at {at} requests/s: {number(cost.per_hour)} {currency} an hour, "
        f"{number(cost.per_million_tokens)} {currency} a million output tokens, at the {grades} "
        f"prices of {plan.question.settings.prices}."
    ]
    if plan.hours:
        day = sum(hour.cost_per_hour or 0.0 for hour in plan.hours)
        always = 24 * cost.per_hour
        saved = 1.0 - day / always if always else 0.0
        said = (
            f"Over the day: {number(day)} {currency} instead of {number(always)} with the fleet "
            f"always on, {100 * saved:.0f} % less"
        )
        if cost.per_million_tokens is not None:
            # Tokens are as many for each request of the day as at its busiest.
            tokens_m = cost.per_hour / cost.per_million_tokens
            tokens_m *= sum(hour.rate_per_s for hour in plan.hours) / planned.rate_per_s
            said += f"; {number(day / tokens_m)} {currency} a million output tokens"
        found.append(f"{said}.")
    return found


def _left_out(plan: Plan) -> list[str]:
    """Which profiles are not compared, since they lack models."""
    skipped = plan.question.skipped
    return [f"Left out: {'; '.join(skipped)}."] if skipped else []


def _failures(plan: Plan) -> list[str]:
    """The fleets that are not enough."""
    return [_failure(plan, one) for one in plan.answers if one.planned is None]


def _grades(plan: Plan) -> list[str]:
    """What the numbers of the profiles are worth."""
    profiles = plan.question.profiles.values()
    planned = {name for one in plan.answers for name in one.fleet.candidates}
    grades = grades_by_name(profiles)
    played = [{**one.figures, "label": one.fleet.name} for one in plan.answers]
    broken = {one.fleet.name: one.bottleneck.batch for one in plan.answers if one.bottleneck}
    return [
        worth(grades, "fleets"),
        *launch_bound(grades, played, "fleets", "At the planned load"),
        *large_batches(grades, broken, assumed_everywhere(profiles), "Where the SLO breaks"),
        *assumed_words(profiles, planned),
    ]


def _extrapolations(plan: Plan) -> list[str]:
    """What the profiles can only extrapolate."""
    return extrapolated([(one.fleet.name, one.beyond) for one in plan.answers])


def _failure(plan: Plan, answer: FleetAnswer) -> str:
    """Why a fleet is not enough, in one line."""
    name, capacity = answer.fleet.name, answer.capacity
    if answer.refusal is not None or capacity is None:
        return f"{name} cannot serve this: {answer.refusal}"
    if capacity.outcome == "none carried":
        why = miss_in_words(answer)
        if answer.bottleneck is not None:
            why += f"; {answer.bottleneck.cause}: {answer.bottleneck.evidence}"
        return f"{name} meets the SLO at no rate that was tried: {why}."
    most = plan.question.settings.max_replicas
    why = "" if answer.bottleneck is None else f": {answer.bottleneck.evidence}"
    return (
        f"{name} does not surely carry it with {counted(most, 'replica')}; one carries "
        f"{number(capacity.rate_per_s, 4)} requests/s{why}."
    )


def _peak_missed(plan: Plan) -> list[str]:
    """That the busiest window is not carried at the mean rate asked for, where it is not.

    A peak factor says how far above the mean the target lies, so that the mean is below it.
    """
    question, capacity = plan.question, plan.best.capacity
    assert capacity is not None
    if not question.traffic.replays:
        return []
    target = question.target_per_s
    mean = question.traffic.rate_per_s if target is None else question.mean_per_s(target)
    factor = question.traffic.peak_factor
    if factor < 1.0 + ALIKE or mean * factor <= capacity.rate_per_s:
        return []
    whose = "The scenario's own rate is a mean of" if target is None else "The target is a mean of"
    helps = ""
    if factor <= MAX_PEAK_FACTOR:
        asked = f"plan.target_rate_per_s = {mean:.4g} and " if target is None else ""
        peak = f"plan.peak_factor = {_peak_asked(factor)}"
        helps = f"; give {asked}{peak} for a fleet that carries that window too"
    return [
        f"{whose} {number(mean, 4)} requests/s, at which the busiest window of the trace has "
        f"{number(mean * factor, 4)} and is not carried{helps}."
    ]


def _peak(plan: Plan) -> list[str]:
    """That every window is played at one rate, and which mean rate the busiest one allows."""
    assert plan.best.capacity is not None
    if not plan.question.traffic.replays:
        return []
    factor = plan.question.traffic.peak_factor
    if factor < 1.0 + ALIKE:
        return []
    most = plan.best.capacity.rate_per_s / factor
    return [
        "Windows are each played at the rate asked for, but the busiest has "
        f"{factor:.2f} times the mean rate of the trace: a mean of {number(most, 4)} keeps it "
        "within what is carried."
    ]


def _unlike_the_trace(plan: Plan) -> list[str]:
    """That the windows which were tried hold other lengths than the whole trace, if they do."""
    if not plan.question.traffic.replays:
        return []
    used = max((load.verdict.num_replications for load in plan.best.loads), default=0)
    tried = plan.question.traffic.mean_lengths(used)
    whole = plan.question.traffic.mean_lengths()
    if all(abs(mine / all_ - 1.0) <= ALIKE for mine, all_ in zip(tried, whole, strict=True)):
        return []
    return [
        f"The {used} windows on which loads were measured have prompts of "
        f"{number(tried[0])} and answers of {number(tried[1])} tokens on average; the whole trace "
        f"{number(whole[0])} and {number(whole[1])}."
    ]


def _shared_rows(plan: Plan) -> list[str]:
    """That samples meet lengths which others met, where the trace is too short for all of them."""
    traffic = plan.question.traffic
    nums = [
        num
        for load in plan.best.loads
        if (num := load.means.get("num_requests"))
        and traffic.share_rows(num, load.verdict.num_replications)
    ]
    return [shared_words(traffic, max(nums), "bounds tell less of other lengths")] if nums else []


_PLAN_REMARKS: Final[tuple[Callable[[Plan], list[str]], ...]] = (
    _held_alike,
    _target,
    _objective,
    _carried,
    _as_it_stands,
    _mean,
    _peak_missed,
    _breaks_first,
    _too_short,
    _peak,
    _unlike_the_trace,
    _shared_rows,
    _shortened,
    _quality,
    _constraints,
    _energy,
    _cost,
    _left_out,
    _failures,
    _grades,
    _extrapolations,
)
"""What is said of a plan, in this order."""

_NO_PLAN_REMARKS: Final[tuple[Callable[[Plan], list[str]], ...]] = (
    _held_alike,
    _target,
    _objective,
    _constraints,
    _left_out,
    _failures,
    _grades,
    _extrapolations,
)
"""What is said of a plan that recommends nothing, in this order."""
