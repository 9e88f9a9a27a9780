"""The pages of searches: the answer first, then the evidence it stands on."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from html import escape
from typing import Final

from helios_sim.profile import Profile
from helios_sim.report import markup
from helios_sim.report.document import add_figure, document, notes_section, opening, section
from helios_sim.report.plotting import Figure
from helios_sim.report.words import device_of_all
from helios_sim.scenario import Scenario, resolved
from helios_sim.search import drawings
from helios_sim.search.bench import LONGER, SAMPLE_ANSWERS, FleetAnswer
from helios_sim.search.fleets import PlanQuestion
from helios_sim.search.goals import Breaking, in_samples, in_words
from helios_sim.search.plan import Plan
from helios_sim.search.plan_words import plan_headline, plan_remarks
from helios_sim.search.prices import words_of
from helios_sim.search.quality import fleet_perplexities, trial_perplexities, uncompared
from helios_sim.search.results import RESULTS
from helios_sim.search.tables import (
    Cells,
    finalist_rows,
    fleet_rows,
    setting_rows,
    trial_rows,
    whatif_best,
    whatif_rows,
)
from helios_sim.search.traffic import FEW_ROUNDS, MAX_RUN_REQUESTS, Traffic
from helios_sim.search.tune import Tuned, TuneVerdict
from helios_sim.search.tune_words import tune_headline, tune_remarks
from helios_sim.search.verdict import Verdict
from helios_sim.search.whatif import Cell
from helios_sim.search.whatif_words import whatif_answer, whatif_remarks
from helios_sim.search.words import signed
from helios_sim.settings.toml_writer import toml_text
from helios_sim.wording import counted, limits, number, span

MAX_TRIALS: Final = 20
"""Trials in the table of a page."""


def plan_page(plan: Plan, scenario: Scenario | None = None) -> str:
    """The page of a plan; `scenario` is the recommended one, if one is."""
    question = plan.question
    drawn: dict[str, Figure] = {}
    settings = question.settings
    sized = question.target_per_s is not None
    compared = [one for one in plan.answers if one.loads]
    shown = ": the recommended one whole, one replica of the others." if sized else "."
    if plan.why_none:
        shown = ": one replica of each." if sized else "."
    sections = [
        _opening(question.scenario, plan_headline(plan), plan_remarks(plan)),
        section(
            "Fleets, in order of merit",
            _ranking(plan),
            _table(fleet_rows(plan), swatches=len(compared) > 1),
            "".join(
                f'<p class="small">{escape(one.fleet.name)} cannot serve: '
                f"{escape(str(one.refusal))}</p>"
                for one in plan.answers
                if one.refusal
            ),
        ),
        section(
            "Attainment against rate",
            f"Where each fleet stops carrying its load{shown}",
            add_figure(
                drawn,
                "attainment",
                drawings.attainment_figure(compared, question.target_per_s),
                "Share of requests that meet the limit, against requests per second",
                "The limit that is met least, averaged over replications, with its "
                f"{100 * settings.confidence:g} % bounds on either side. Dotted: the share that "
                "is needed" + (", and the target rate." if sized else "."),
            ),
        )
        if compared
        else "",
        _plan_frontiers(compared, question.device, drawn) if compared else "",
        _day(plan, drawn),
        _evidence(plan.best) if plan.best.loads else "",
        notes_section(question.scenario.notes),
        section(
            "How it was found",
            "",
            f"<p>{escape(_method(plan))}</p>",
            *(
                [f"<p>Prices: {escape(words_of(question.prices))}.</p>"]
                if question.prices is not None
                else []
            ),
            _scenario("The recommended scenario", scenario) if scenario is not None else "",
        ),
    ]
    return document(f"{question.scenario.name}: plan", sections, drawn)


def _plan_frontiers(compared: Sequence[FleetAnswer], device: str, drawn: dict[str, Figure]) -> str:
    figure = drawings.plan_frontiers(compared, device)
    lead, label = _frontier_words("a rate", "Goodput", device, figure)
    caption = "Every rate that was measured; open marks miss the SLO. "
    if drawings.draws_energy(figure["layout"]):
        caption += "Up and to the left is better in the first, up and to the right in the second."
    else:
        caption += "Up and to the right is better."
    return section("Frontiers", lead, add_figure(drawn, "frontiers", figure, label, caption))


def _frontier_words(what: str, against: str, device: str, figure: Figure) -> tuple[str, str]:
    """The lead of a section on frontiers, and what its figure is."""
    lead = f"what users see against what a {device} gives."
    label = f"tokens per second per user against per {device}"
    if drawings.draws_energy(figure["layout"]):
        return f"What {what} costs in energy, and {lead}", f"{against} against energy, and {label}"
    return f"{lead[0].upper()}{lead[1:]} Energy is not known.", f"{label[0].upper()}{label[1:]}"


_NAMES: Final[Mapping[TuneVerdict, str]] = {
    "better": "The recommended scenario",
    "unsure": "The scenario with the winner's settings, not shown to be better",
    "no better": "The scenario as it stands",
}


def tune_page(tuned: Tuned, scenario: Scenario) -> str:
    """The page of a search; `scenario` has the winner's settings, or stands as it is."""
    question = tuned.question
    goal = question.judge.goals[0]
    drawn: dict[str, Figure] = {}
    name = _NAMES[tuned.verdict]
    sections = [
        _opening(question.scenario, tune_headline(tuned), tune_remarks(tuned)),
        section(
            "Settings",
            "What the scenario says, what the winner says instead, and what each setting changes "
            "as it alone varies around the winner.",
            _table(setting_rows(tuned)),
        )
        if tuned.winner is not None
        else "",
        _finals(tuned),
        _held_out(tuned),
        _trials(tuned),
        _tune_frontier(tuned, drawn),
    ]
    if tuned.sensitivity:
        sections.append(
            section(
                "Sensitivity",
                "One setting at a time around the winner, which is marked.",
                add_figure(
                    drawn,
                    "sensitivity",
                    drawings.sensitivity_figure(tuned.sensitivity, goal.unit),
                    f"{goal.name} as each setting varies alone",
                    f"{goal.name} ({goal.unit or 'no unit'}) on the tuning traffic; a cross breaks "
                    "a constraint, and a gap is a combination that cannot be. A flat line says "
                    "that the setting does not matter here.",
                ),
            )
        )
    sections += [
        notes_section(question.scenario.notes),
        section(
            "How it was found", "", f"<p>{escape(_search(tuned))}</p>", _scenario(name, scenario)
        ),
    ]
    return document(f"{question.scenario.name}: tune", sections, drawn)


def _tune_frontier(tuned: Tuned, drawn: dict[str, Figure]) -> str:
    figure = drawings.tune_frontiers(tuned)
    against = drawings.against_energy(tuned).name
    _, label = _frontier_words("a trial", against, tuned.question.device, figure)
    unknown = "" if drawings.draws_energy(figure["layout"]) else " Energy is not known."
    return section(
        "Frontier",
        f"Every trial, on the tuning traffic.{unknown}",
        add_figure(
            drawn,
            "frontier",
            figure,
            label,
            "Hover for the settings. Trials that were stopped early show their first sample "
            "of traffic alone.",
        ),
    )


def whatif_page(
    scenario: Scenario, cells: Sequence[Cell], replications: int, profiles: Sequence[Profile]
) -> str:
    """The page of a grid on these profiles."""
    drawn: dict[str, Figure] = {}
    device = device_of_all(profile.is_of_processor for profile in profiles)
    said = whatif_answer(cells, replications)[0]
    best = whatif_best(cells)
    sections = [
        _opening(scenario, said, whatif_remarks(scenario, cells, replications, profiles)),
        section(
            "Side by side",
            "Bold: the best of a column, and what is level with it." if best else "",
            _table(whatif_rows(cells), best=best),
        ),
        _cell_frontiers(cells, device, drawn) if best else "",
        notes_section(scenario.notes),
        section("The scenario", "", _scenario("As it stands, in full", scenario)),
    ]
    return document(f"{scenario.name}: what if", sections, drawn)


def _cell_frontiers(cells: Sequence[Cell], device: str, drawn: dict[str, Figure]) -> str:
    figure = drawings.cells_figure(cells, device)
    lead, label = _frontier_words("throughput", "Throughput", device, figure)
    caption = "A mark a cell; hover for its settings and figures."
    return section("Frontiers", lead, add_figure(drawn, "cells", figure, label, caption))


def _opening(scenario: Scenario, headline: str, remarks: Sequence[str]) -> str:
    return opening(scenario.name, headline, remarks, question=scenario.question)


def _table(
    cells: Cells, swatches: bool = False, best: Container[tuple[int, int]] = frozenset()
) -> str:
    """A table whose first column is a heading and whose others are figures.

    `best` are the figures that are marked, by row and column.
    """
    titles, rows = cells
    body = []
    for place, row in enumerate(rows):
        mark = markup.swatch(place) if swatches and place < drawings.MAX_FLEETS else ""
        named = f"{mark}{escape(row[0])}"
        first = f'<th scope="row" style="white-space:normal;min-width:11rem">{named}</th>'
        rest = "".join(
            f'<td class="best">{escape(value)}<span class="hidden"> (best)</span></td>'
            if (place, column) in best
            else markup.cell(value)
            for column, value in enumerate(row[1:], 1)
        )
        body.append(f"<tr>{first}{rest}</tr>")
    width = 240 + 72 * (len(titles) - 1)
    look = f'class="figures many" style="table-layout:auto;min-width:{width}px"'
    return markup.table(look, markup.titles(titles), body)


def _ranking(plan: Plan) -> str:
    device, has_prices = plan.question.device, plan.question.prices is not None
    if plan.why_none:
        return "None is enough; the nearest comes first. Capacities have their bounds."
    others = uncompared(fleet_perplexities(plan), [one.figures for one in plan.answers])
    if plan.question.target_per_s is None:
        by = "cost a million tokens" if has_prices else f"requests/s carried by a {device}"
        return f"Ranked by {by}; capacities with their bounds.{others}"
    by = "cost an hour" if has_prices else f"{device}s"
    return (
        f"The fewest replicas of each that surely carry {plan.question.target_per_s:.4g} "
        f"requests/s, ranked by {by}. Capacities are of the replicas named behind them.{others}"
    )


def _day(plan: Plan, drawn: dict[str, Figure]) -> str:
    if not plan.hours:
        return ""
    each = plan.best.fleet.gpus_per_replica
    return section(
        "A day",
        "How many replicas each hour needs.",
        add_figure(
            drawn,
            "day",
            drawings.day_figure(plan.hours),
            "Replicas and requests per second by hour",
            "Reckoned from what a replica surely carries alone and what it does in the fleet, the "
            "smaller of the two; the busiest hour has the fleet that was measured. "
            f"{counted(each, plan.question.device)} a replica. Starting and stopping replicas is "
            "not simulated.",
        ),
    )


def _evidence(best: FleetAnswer) -> str:
    """Every load that the recommendation was measured at."""
    names: list[str] = []
    for load in best.loads:
        names += [one.name for one in load.verdict.criteria if one.limit and one.name not in names]
    rows: list[list[str]] = []
    for load in sorted(best.loads, key=lambda one: (one.num_replicas, one.rate_per_s)):
        by_name = {one.name: one for one in load.verdict.criteria}
        shares = []
        for name in names:
            one = by_name.get(name)
            if one is None:
                shares.append("\N{EN DASH}")
            else:
                low, high = one.bounds
                shares.append(f"{100 * one.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        rows.append(
            [
                f"{load.num_replicas} at {number(load.rate_per_s, 4)}/s",
                str(load.verdict.num_replications),
                span(load.sample_s),
                *shares,
                number(load.means.get("p99_ttft_ms")),
                number(load.means.get("p99_tpot_ms")),
                _tally(load.saturations),
                _verdict(load.verdict),
            ]
        )
    titles = ["Replicas, rate", "runs", "length", *(f"within {name}, %" for name in names)]
    titles += ["TTFT p99 ms", "TPOT p99 ms", "saturation", "verdict"]
    return section(
        "Evidence",
        f"Every load at which {best.fleet.name} was measured, with so many replicas as each row "
        "says: how long the shortest run lasts, the share of requests within the limits with its "
        "bounds, the saturation, and why a "
        "load is missed. Saturation asks only whether the backlog grows for good (overloaded) or "
        "requests wait longer than their answers take (backlogged): a stable load can still be too "
        "late for its limits.",
        _table((titles, rows)),
    )


def _tally(saturations: Sequence[str]) -> str:
    """The saturation of replications, the worst first; how many of each where they differ."""
    found = [
        (saturations.count(name), name)
        for name in ("overloaded", "backlogged", "stable")
        if name in saturations
    ]
    return found[0][1] if len(found) == 1 else ", ".join(f"{num} {name}" for num, name in found)


def _verdict(verdict: Verdict) -> str:
    """Carried, or missed and by what."""
    doubt = "" if verdict.is_sure else ", in doubt"
    if verdict.carried:
        return f"carried{doubt}"
    why = [limits(one.limit) if one.limit else "the backlog grows" for one in verdict.broken]
    return f"missed{doubt}: {', '.join(why)}"


def _finals(tuned: Tuned) -> str:
    if not tuned.finalists:
        return ""
    num = counted(tuned.question.settings.finals, "sample")
    return section(
        "Finalists",
        f"The best trials on {num} that no trial was tuned on. The best of those that keep the "
        "constraints there is the winner.",
        _table(finalist_rows(tuned)),
    )


def _trials(tuned: Tuned) -> str:
    kept = sum(one.is_feasible for one in tuned.trials)
    said = "The trials that break the constraints least"
    if kept:
        said = f"The best of the {kept:,} trials that keep the constraints, the winner first"
        if kept <= MAX_TRIALS:
            said = "The trials that keep the constraints, the winner first"
    known, trials = trial_perplexities(tuned), [tuned.base, *tuned.trials]
    others = uncompared([known[one.number] for one in trials], [one.means for one in trials])
    return section(
        "Trials",
        f"{said}, and the scenario as it stands, on the tuning traffic. All trials are in "
        f"{RESULTS}.{others}",
        _table(trial_rows(tuned, MAX_TRIALS, with_settings=True)),
    )


def _held_out(tuned: Tuned) -> str:
    if not tuned.held_out:
        return ""
    judge = tuned.question.judge
    titles = ["Traffic"]
    for goal in judge.goals:
        unit = f" {goal.unit}" if goal.unit else ""
        titles += [f"{goal.name}{unit}, as it stands", "tuned", "difference, 95 % interval"]
    titles.append("constraints")
    rows = []
    for held in tuned.held_out:
        row = [f"held out, rate \N{MULTIPLICATION SIGN} {held.rate_scale:g}"]
        for place, goal in enumerate(judge.goals):
            sign = 1.0 if goal.better == "higher" else -1.0
            difference = number(None)
            if (known := held.gains[place]) is not None:
                gain, low, high = known
                ends = sorted((sign * low, sign * high))
                difference = f"{signed(sign * gain)} [{signed(ends[0])}, {signed(ends[1])}]"
            row += [number(held.base[place], 4), number(held.tuned[place], 4), difference]
        broken = [in_words(one) for one in held.tuned_broken]
        row.append("breaks " + ", ".join(broken) if broken else _kept(held.tuned_breaking))
        rows.append(row)
    if tuned.winner is not None and tuned.winner.scores is not None and tuned.base.scores:
        row = ["tuned on, rate \N{MULTIPLICATION SIGN} 1"]
        for place in range(len(judge.goals)):
            mine, own = tuned.winner.scores[place], tuned.base.scores[place]
            row += [number(own, 4), number(mine, 4), signed(mine - own)]
        rows.append([*row, _kept(tuned.winner.breaking)])
    settings = tuned.question.settings
    return section(
        "On traffic it was not tuned on",
        f"The winner beside the scenario as it stands, on {counted(settings.held_out, 'sample')} "
        f"that no trial was tuned{' or chosen' if tuned.finalists else ''} on, paired sample by "
        "sample.",
        _table((titles, rows)),
    )


def _kept(breaking: Breaking) -> str:
    """That constraints are kept, and in how many samples they are not."""
    where = in_samples(breaking)
    return f"kept on average, broken {where}" if where else "kept"


def _samples(traffic: Traffic) -> str:
    if traffic.replays:
        order, pace = "in order of time", "at its own pace, times the factor where one is named"
        if traffic.table == "plan":
            order, pace = "the first ones spread all over it", "at the rate asked for"
        return (
            f"Replications are stretches of the trace, {traffic.num_windows} of equally many "
            f"requests, {order}, each played {pace}"
        )
    rows = "" if traffic.num_rows is None else ", with the lengths from another row of the trace on"
    if traffic.is_shaped:
        return f"Replications are the whole workload under other seeds{rows}"
    least = "at least " if traffic.grows else ""
    return (
        f"Replications are {least}{traffic.num_requests:,} requests a replica under other "
        f"seeds{rows}"
    )


def _method(plan: Plan) -> str:
    settings = plan.question.settings
    return (
        "A rate is doubled or halved until one is carried and its double is not, then bisected to "
        f"{100 * settings.precision:g} %. A load is carried when every limit reaches its share on "
        "average and most of its runs are not overloaded; it is surely carried or missed when "
        f"the one-sided {100 * settings.confidence:g} % bounds over replications say so too. "
        f"{_samples(plan.question.traffic)}; {settings.replications} of them, "
        f"{settings.max_replications} where those leave doubt. {_length(plan.question)} The first "
        f"{100 * settings.warmup_share:g} % of the requests of each count toward no latency and no "
        f"attainment. All fleets meet the same traffic. {_figures_of(plan)}"
    )


def _figures_of(plan: Plan) -> str:
    """Where the figures of the planned fleets come from."""
    if all(one.planned is None for one in plan.answers):
        return ""
    alike = "Energy, agreement and cost of a fleet are those of"
    rate = "planned rate"
    if plan.question.settings.peak_factor != 1.0:
        rate = "mean rate, of which the planned one is the peak"
    again = ""
    if plan.question.traffic.replays:
        again = ", the trace played again and again where it is shorter than a sample has to be"
    if all(one.is_one_run for one in plan.answers if one.planned is not None):
        return f"{alike} one run of its whole scenario at the {rate}{again}."
    return (
        f"{alike} one run of its whole scenario at the {rate}{again}, or means over samples where "
        "that run would be too short for its answers, or too large."
    )


def _length(question: PlanQuestion) -> str:
    """How long the samples are, and why."""
    if not question.traffic.grows:
        return "Samples are as long as was asked for, however long answers and rounds."
    again = ", a stretch by being played again" if question.traffic.replays else ""
    return (
        f"A sample lasts at least {SAMPLE_ANSWERS:g} times as long as an answer takes from "
        f"admission to its end (99th percentile){again}, and holds {FEW_ROUNDS} rounds of a "
        f"policy that reassesses, as far as {MAX_RUN_REQUESTS:,} requests allow; what is "
        f"recommended is carried by samples of {LONGER * SAMPLE_ANSWERS:g} answers too."
    )


def _search(tuned: Tuned) -> str:
    settings = tuned.question.settings
    return (
        f"Sampler {settings.sampler}, seed {settings.seed}, batches of {settings.batch}; a batch "
        "is proposed and answered together, so the number of workers changes nothing. "
        f"{_samples(tuned.question.traffic)}. Every trial meets the first sample; those that rank "
        f"within the best {100 * settings.go_on_share:g} % so far meet "
        f"{settings.replications - 1} more. {_last_samples(tuned)} The first "
        f"{100 * settings.warmup_share:g} % of the requests of each count toward no latency and no "
        "attainment; rates such as goodput, energy and quality are those of whole samples. "
        "Constraints are judged on the mean over samples; a "
        "latency's percentile is over the requests sent."
    )


def _last_samples(tuned: Tuned) -> str:
    """Who meets the samples that come after those tuned on."""
    settings = tuned.question.settings
    if tuned.winner is None:
        return "None keeps the constraints, so none met others."
    last = f"{counted(settings.held_out, 'sample')} that nothing was tuned on"
    if not tuned.finalists:
        return f"The winner meets {last}."
    return (
        f"The best {len(tuned.finalists)} meet {settings.finals} others, on which the winner is "
        f"chosen; the winner meets {last} or chosen on."
    )


def _scenario(name: str, scenario: Scenario) -> str:
    return markup.folded(name, markup.preformatted(toml_text(resolved(scenario))))
