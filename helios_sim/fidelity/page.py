"""The page of a comparison of real and simulated runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Final

from helios_sim.fidelity import charts
from helios_sim.fidelity.assessment import Fidelity
from helios_sim.fidelity.figures import FigureRow
from helios_sim.fidelity.swaps import INGREDIENTS
from helios_sim.fidelity.tables import real_text
from helios_sim.fidelity.words import (
    TOLD,
    headline,
    remarks,
    sentence,
    signed_percent,
    spanned_errors,
    spread_text,
)
from helios_sim.report import markup
from helios_sim.report.document import add_figure, document, opening, section
from helios_sim.report.plotting import Figure
from helios_sim.report.thinning import thinned_decisions
from helios_sim.runs.records import flat_items
from helios_sim.settings.toml_writer import toml_text
from helios_sim.wording import number

_MEANINGS: Final = (
    ("Real", "the median over the real runs"),
    (
        "Spread",
        "the run-to-run spread of the real side: the wider of the range met and of two standard "
        "deviations about the median; unknown with one run",
    ),
    ("Error", "(simulated \N{MINUS SIGN} real) / real"),
    ("MAPE", "mean absolute error of single requests, relative to the real value"),
    ("Repeats", "the MAPE between two real runs: what no simulation can go below"),
)


def render(fidelity: Fidelity) -> str:
    """The page, one self-contained file."""
    drawn: dict[str, Figure] = {}
    scenario = fidelity.sides.scenario
    title = f"{scenario.name}: real and simulated"
    return document(
        title,
        [
            opening(title, headline(fidelity), remarks(fidelity), question=scenario.question),
            _figures(fidelity, drawn),
            _requests(fidelity, drawn),
            _attribution(fidelity, drawn),
            _timing(fidelity, drawn),
            _timeline(fidelity, drawn),
            _decisions(fidelity, drawn),
            _definitions(),
            _provenance(fidelity),
        ],
        drawn,
    )


def _figures(fidelity: Fidelity, drawn: dict[str, Figure]) -> str:
    num = len(fidelity.sides.reals)
    body = []
    titles = ("Figure", "Real", "Spread", "Simulated", "Error", "Verdict")
    for group, members in groupby(fidelity.figures, key=lambda row: row.group):
        body.append(markup.group_row(group, len(titles)))
        body += map(_row, members)
    return section(
        "Figures",
        f"{num} real run{'s' if num != 1 else ''} of the scenario beside the simulated one.",
        markup.table('class="figures" style="min-width:860px"', markup.titles(titles), body),
        add_figure(
            drawn,
            "errors",
            charts.errors_figure(fidelity.figures),
            "Error of each simulated figure beside the run-to-run spread of the real side",
            "A dot is the simulated value's difference to the median of the real runs; a bar is "
            "the spread between the real runs. A dot in its bar cannot be told from another real "
            "run. Arrows lie beyond the axis.",
        ),
    )


def _row(row: FigureRow) -> str:
    css = ' class="overloaded"' if row.verdict in ("above", "below", "differs") else ""
    told = (real_text(row), spread_text(row), number(row.simulated), signed_percent(row.error))
    return markup.row(
        row.title, [*map(markup.cell, told), markup.cell(TOLD[row.verdict], css)], row.unit
    )


def _requests(fidelity: Fidelity, drawn: dict[str, Figure]) -> str:
    def percent(share: float | None) -> str:
        return number(None if share is None else 100.0 * share)

    rows = [
        (
            row.title,
            number(row.num_requests),
            percent(row.mape),
            percent(row.median_error),
            signed_percent(row.bias),
            number(row.pearson),
            number(row.spearman),
            percent(row.noise_mape),
        )
        for row in fidelity.requests
    ]
    titles = (
        "Latency",
        "Requests",
        "MAPE %",
        "Median %",
        "Bias",
        "Pearson",
        "Spearman",
        "Repeats %",
    )
    return section(
        "Request by request",
        "Each request's latency on both sides; on the dotted line they are the same.",
        _plain_table(titles, rows),
        add_figure(
            drawn,
            "requests",
            charts.scatter_figure(fidelity.sides),
            "Simulated against real TTFT, TPOT and E2E of each request",
            "A point a request that finished on both sides; the real value is the median over "
            "the real runs. Logarithmic scales.",
        ),
    )


def _attribution(fidelity: Fidelity, drawn: dict[str, Figure]) -> str:
    attribution = fidelity.attribution
    if attribution is None:
        return ""
    swaps = attribution.telling
    against = ""
    if len(fidelity.sides.reals) > 1:
        against = " Errors here are against that one run, above against the median of all."
    causes, errors = [], []
    for cause in attribution.causes:
        row = fidelity.row(cause.key)
        title = cause.key if row is None else row.title
        chance = spanned_errors(attribution.chance_errors(cause.key))
        middle = signed_percent(attribution.middle_error(cause.key))
        causes.append((title, signed_percent(cause.error), chance, middle, cause.said))
        told = (signed_percent(attribution.error(one, cause.key)) for one in swaps)
        errors.append((title, *told))
    said = [
        f"{sentence(one.title)}: {one.missing}."
        for one in attribution.swaps
        if one.missing is not None
    ]
    said += [f"{sentence(one.title)}: no effect." for one in attribution.without_effect]
    return section(
        "What the error comes from",
        "The scenario simulated again with one ingredient at a time taken from the real run "
        f"({attribution.repeat}). An error that goes away came from that ingredient; what is left "
        f"with everything swapped is in none of them.{against} By chance, the same requests "
        f"have other text: from the least to the most error of {attribution.chance.num_texts} such "
        "simulations and this one, and that of the middle one, all at the pace of the run where it "
        "was seen. A real figure among them is within chance, unless its error is the pace's.",
        add_figure(
            drawn,
            "attribution",
            charts.attribution_figure(fidelity, attribution),
            "Error of each headline figure by the ingredient taken from the real run",
            f"Errors are against {attribution.repeat}: the first bar as the simulation stands, the "
            "last with everything swapped. Errors within half a per cent are left out.",
        ),
        _plain_table(("Figure", "Error", "By chance", "Middle text", "Cause"), causes),
        _plain_table(("Figure", *(one.name for one in swaps)), errors),
        markup.notes(said, "notes small"),
    )


def _timing(fidelity: Fidelity, drawn: dict[str, Figure]) -> str:
    if not fidelity.timing:
        return ""
    rows = []
    for (model, kind), members in groupby(fidelity.timing, key=lambda row: (row.model, row.kind)):
        told = list(members)
        recorded = sum(row.recorded_s for row in told)
        predicted = sum(row.predicted_s for row in told)
        rows.append(
            (
                f"{model}, {kind}",
                number(sum(row.num_iterations for row in told)),
                number(recorded),
                number(predicted),
                signed_percent((predicted - recorded) / recorded if recorded else None),
            )
        )
    return section(
        "Iteration times",
        "What the real run recorded, and what the profile predicts for the very same iterations.",
        add_figure(
            drawn,
            "timing",
            charts.timing_figure(fidelity.timing),
            "Recorded and predicted iteration times by batch and prompt",
            "Dots are recorded medians with the middle 80 %, dashed lines the profile's "
            "predictions, over all depths that were served.",
        ),
        _plain_table(
            ("Iterations", "Number", "Recorded s", "Predicted s", "Error of the sum"), rows
        ),
    )


def _timeline(fidelity: Fidelity, drawn: dict[str, Figure]) -> str:
    sides = fidelity.sides
    if any(side.run.timeline.height == 0 for side in (*sides.reals, sides.simulated)):
        return ""
    return section(
        "Timeline",
        "Both sides over the same seconds.",
        add_figure(
            drawn,
            "overlay",
            charts.overlay_figure(sides),
            "Running and waiting requests and power of both sides over time",
            "Running requests (mean), waiting ones at the end of each interval and, where it was "
            "metered, power.",
        ),
    )


def _decisions(fidelity: Fidelity, drawn: dict[str, Figure]) -> str:
    sides = fidelity.sides
    caption = "A lane a run, a mark a decision; hover for the model, its layers and the event."
    thinned = thinned_decisions([side.run.decisions for side in (*sides.reals, sides.simulated)])
    return section(
        "Decisions",
        "What the policy decided on both sides, and when.",
        add_figure(
            drawn,
            "decisions",
            charts.decisions_figure(sides),
            "Decisions of both sides over time",
            f"{caption}{thinned}",
        ),
    )


def _definitions() -> str:
    swaps = (
        ("arrivals", "requests are sent when they were sent"),
        ("exits", "tokens meet the exits of the text that was served"),
        ("times", "an iteration takes the median recorded for its model, kind and batch"),
        ("slow", "iterations are longer by what the recorded mean exceeds the median"),
        ("loads", "loads for which serving waits take as long as they took"),
        ("decisions", "the logged decisions are carried out at their times"),
    )
    taken = [(sentence(INGREDIENTS[name]), text) for name, text in swaps]
    return section("Definitions", "", markup.terms([*_MEANINGS, *taken]))


def _provenance(fidelity: Fidelity) -> str:
    sides = fidelity.sides
    facts = [
        ("simulated run", str(sides.simulated.path)),
        *((f"real run {place + 1}", str(side.path)) for place, side in enumerate(sides.reals)),
    ]
    for name, side in (("simulated", sides.simulated), ("real", sides.typical)):
        facts += [(f"{name}: {key}", text) for key, text in flat_items(side.run.environment)]
    scenario = markup.preformatted(toml_text(sides.simulated.run.scenario))
    return section(
        "Provenance",
        "What this page was made from.",
        markup.terms(facts),
        markup.folded("Scenario", scenario),
    )


def _plain_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [
        f'<th scope="col"{_words(title) if title == "Cause" else ""}>{escape(title)}</th>'
        for title in titles
    ]
    body = [
        markup.row(first, [markup.cell(one, _words(one)) for one in others])
        for first, *others in rows
    ]
    return markup.table('class="figures plain"', head, body)


def _words(cell: str) -> str:
    """Marks a cell of words, which are set to the left and may wrap."""
    return ' class="words"' if len(cell.split()) > 2 or cell == "Cause" else ""
