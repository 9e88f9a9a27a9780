"""The study's page: how far off, where from, and what HELIOS gains for real."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from helios_sim.fidelity.charts import error_marks, percent_off, spread_bars
from helios_sim.fidelity.words import signed_percent, spanned
from helios_sim.report import markup
from helios_sim.report.document import add_figure, document, notes_section, opening, section
from helios_sim.report.plotting import Figure, base_layout, panel, plain_axis
from helios_sim.runs.records import flat_items
from helios_sim.wording import listed, number, times
from reports.fidelity.figures import BESIDE, JUDGED
from reports.fidelity.quality import BOUND
from reports.fidelity.summary import (
    TITLES,
    WITHIN_BAR,
    equal_quality_said,
    group_of,
    measure_of,
    percent,
    summary_rows,
    typical_said,
    typical_table,
)

_BEYOND: Final = ("above", "below", "differs")


def render(results: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """The page of a study, one self-contained file."""
    drawn: dict[str, Figure] = {}
    title = f"Fidelity on {results['device']}"
    return document(
        title,
        [
            _opening(results, title),
            _targets(results),
            _beyond(results),
            _cases(results, drawn),
            _causes(results),
            _gains(results),
            _equal_quality(results),
            notes_section(remarks),
            _provenance(results),
        ],
        drawn,
    )


def _opening(results: Mapping[str, Any], title: str) -> str:
    known = [one for one in results["targets"] if one["num_cases"]]
    said = [f"{JUDGED[one['key']].said} {number(100 * one['median_error'])} %" for one in known]
    num = len(results["cases"])
    remarks = [
        f"The verdict on saturation is the same on both sides in {results['same_saturation']} of "
        f"{num} cases.",
        _repeats_remark(results["num_repeats"]),
        *_anew_remarks(results),
    ]
    made_up = results.get("made_up")
    remarks = [made_up, *remarks] if made_up else remarks + _pace_remarks(results)
    missing = [JUDGED[one["key"]].said for one in results["targets"] if not one["num_cases"]]
    if missing:
        remarks.append(f"Not measured here: {listed(missing)}.")
    kind = "scenarios on a device that is made up" if made_up else "real scenarios"
    return opening(
        title,
        f"Median absolute error over {num} {kind}: {', '.join(said)}.",
        remarks,
        question="How far is the simulation from the real backend?",
    )


def _repeats_remark(num: int) -> str:
    if num == 1:
        return "Every case was served once."
    return f"Every case was served {num} times; errors are against the median."


def _anew_remarks(results: Mapping[str, Any]) -> list[str]:
    """That the simulations are newer than the real runs, and what that leaves untold."""
    anew = results["simulated_anew"]
    if anew is None:
        return []
    said = (
        "Simulated anew beside the real runs that the study recorded, by a model changed since, "
        "in the knowledge of them"
    )
    changed, kept = anew["changed"], anew.get("kept", [])
    others = (
        [
            f"{listed(kept)} {'stay' if len(kept) > 1 else 'stays'} as simulated with the policy "
            "that was served, which decides otherwise since."
        ]
        if kept
        else []
    )
    if not changed:
        return [f"{said}: every figure is the same to the last bit.", *others]
    return [
        f"{said}. {listed(changed)} changed, and what their errors come from was not told anew; "
        "the other cases are the same to the last bit.",
        *others,
    ]


def _pace_remarks(results: Mapping[str, Any]) -> list[str]:
    """How slow the machine was for the runs that count, and how many were discarded for it."""
    slowed = [one for case in results["cases"] for one in _slowest(case) if one is not None]
    if not slowed:
        return ["How slow the machine was around the real runs is unknown."]
    when = "around and during" if _has_paces(results) else "around"
    bound, num = results["max_slowdown"], results["num_discarded"]
    beyond = sum(1 for one in slowed if one > bound)
    said = (
        f"The machine was {spanned(slowed)} times as slow {when} the real runs as while the "
        "profile was measured. "
    )
    if num:
        said += (
            f"{num} run{'s were' if num != 1 else ' was'} discarded, whatever came of "
            f"{'them' if num != 1 else 'it'}, and served again, because the machine was more than "
            f"{bound:g} times as slow"
        )
        said += f"; of those kept {beyond} still are." if beyond else "."
    else:
        said += (
            f"No run was discarded for it, though for {beyond} it was more than {bound:g} times."
            if beyond
            else f"No run was discarded: that would take more than {bound:g} times."
        )
    return [said, *_typical_remarks(results)]


def _has_paces(results: Mapping[str, Any]) -> bool:
    """Whether the pace of some real run was seen."""
    return any(one is not None for case in results["cases"] for one in case.get("pace_factors", ()))


def _slowest(case: Mapping[str, Any]) -> list[float | None]:
    """How slow the machine was for each real run of a case: around it or, where told, during it."""
    paces = case.get("pace_factors") or [None] * len(case["slowdowns"])
    return [
        max((one for one in both if one is not None), default=None)
        for both in zip(case["slowdowns"], paces, strict=True)
    ]


def _typical_remarks(results: Mapping[str, Any]) -> list[str]:
    """How far off simulations at the pace of the typical runs, and of the middle text, are."""
    found = []
    for name, said in (
        ("paced", "At the pace of the typical real runs"),
        ("text", f"With the middle of several texts{', at that pace' * _has_paces(results)}"),
    ):
        told = [
            f"{JUDGED[one['key']].said} {percent(typical[f'{name}_median'])} instead of "
            f"{percent(typical['plain_median'])}"
            for one in results["targets"]
            if f"{name}_median" in (typical := one.get("typical", {}))
        ]
        if told:
            found.append(f"{said}, median absolute errors are {listed(told)}.")
    return found


def _targets(results: Mapping[str, Any]) -> str:
    typical = typical_table(results)
    return section(
        "Errors over all cases",
        measure_of(results),
        _table(TITLES, summary_rows(results)),
        *(
            (
                f'<p class="small">{escape(typical_said(results))}</p>',
                _table(typical[0], typical[1:]),
            )
            if typical
            else ()
        ),
    )


def _beyond(results: Mapping[str, Any]) -> str:
    """By how much cases fall short of twice the spread, and which ingredient causes it."""
    if not any(one.get("num_judged") for one in results["targets"]):
        return ""
    rows = [
        (
            case["case"],
            JUDGED[one["key"]].name,
            signed_percent(case["error"]),
            f"\N{PLUS-MINUS SIGN}{percent(case['half_width'])}",
            number(case["error_in_spreads"]),
            signed_percent(case["error_without"]),
            case["cause"],
        )
        for one in results["targets"]
        for case in one.get("beyond", ())
        if case["cause"] != WITHIN_BAR
    ]
    titles = ("Case", "Figure", "Error", "Spread", "In spreads", "Without it", "Cause")
    return section(
        "Beyond twice the spread",
        "Where the simulation falls short, by how much, and the likely cause: the one ingredient "
        "that takes most of the error away when it is taken from the real run. Errors that a GPU "
        "may have are left out.",
        _table(titles, rows) if rows else "<p>Nothing does.</p>",
    )


def _cases(results: Mapping[str, Any], drawn: dict[str, Figure]) -> str:
    rows = []
    names = {one["key"]: JUDGED[one["key"]].name for one in results["targets"] if one["num_cases"]}
    for case in results["cases"]:
        figures = {row["key"]: row for row in case["figures"]}
        saturation = figures.get("saturation", {})
        real = listed(sorted({str(one) for one in saturation.get("real", ())}))
        ours = str(saturation.get("simulated"))
        cells = [_cell(figures.get(key)) for key in names]
        verdict = ours if saturation.get("verdict") == "same" else f"{ours} (real: {real})"
        rows.append((case["name"], *cells, verdict))
    paced = _has_paces(results)
    sent = [
        (
            case["name"],
            f"{number(case['rate_per_s'])}/s",
            number(case["num_requests"]),
            ", ".join(map(number, case["slowdowns"])),
            *([", ".join(map(number, case["pace_factors"]))] if paced else ()),
            number(case["num_discarded"]),
        )
        for case in results["cases"]
    ]
    told = ("Slowdowns", "Paces") if paced else ("Slowdowns",)
    pace = (
        " at what pace it was served (times that known arithmetic took as long as around the "
        "profile's readings),"
        if paced
        else ""
    )
    return section(
        "Cases",
        "Error of the simulation in each case; a star marks one beyond the run-to-run spread. "
        f"Below, what was sent, how slow the machine was around each real run that counts,{pace} "
        "and how many were discarded.",
        add_figure(
            drawn,
            "cases",
            _cases_figure(results),
            "Errors of every case by figure",
            "A dot is a case's error, a bar the run-to-run spread of its real runs. Arrows lie "
            "beyond the axis.",
        ),
        _table(("Case", *names.values(), "Saturation"), rows),
        _table(("Case", "Rate", "Requests", *told, "Discarded"), sent),
    )


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["error"] is None:
        return "\N{EN DASH}"
    star = "*" if row["verdict"] in _BEYOND else ""
    return f"{signed_percent(row['error'])}{star}"


def _cases_figure(results: Mapping[str, Any]) -> Figure:
    """A panel a figure, a row a case."""
    cases = [_in_two_lines(case["name"]) for case in results["cases"]]
    shown = [
        key
        for key in JUDGED
        if any(
            row["key"] == key and row["error"] is not None
            for case in results["cases"]
            for row in case["figures"]
        )
    ]
    data: list[Figure] = []
    layout = base_layout(110 + 31 * len(cases), barmode="overlay", showlegend=False)
    width = 1.0 / max(len(shown), 1)
    for at, key in enumerate(shown):
        rows: list[Mapping[str, Any]] = [
            next((row for row in case["figures"] if row["key"] == key), {})
            for case in results["cases"]
        ]
        told = [row.get("error") for row in rows]
        errors = [None if one is None else 100 * one for one in told]
        low, high = (
            [percent_off(row.get(end), row.get("median")) for row in rows]
            for end in ("low", "high")
        )
        every = [abs(one) for one in (*errors, *low, *high) if one is not None]
        reach = min(1.15 * max([*every, 1.0]), 60.0)
        edge = _round_below(reach)
        axis = {"xaxis": f"x{panel(at)}"}
        data += [
            spread_bars(cases, low, high, 0.6) | axis,
            error_marks(cases, errors, reach, 8)
            | axis
            | {
                "text": [signed_percent(one) for one in told],
                "hovertemplate": f"<b>%{{y}}</b><br>{JUDGED[key].name}: %{{text}}<extra></extra>",
            },
        ]
        layout[f"xaxis{panel(at)}"] = plain_axis(
            JUDGED[key].name,
            domain=[at * width + 0.02, (at + 1) * width - 0.02],
            range=[-reach, reach],
            tickvals=[-edge, 0, edge],
            ticktext=[f"\N{MINUS SIGN}{edge:g} %", "0 %", f"{edge:g} %"],
            tickangle=0,
            zeroline=True,
            zerolinecolor="@muted",
        )
    layout["yaxis"] = plain_axis(
        type="category", autorange="reversed", tickfont={"color": "@ink", "size": 11.5}
    )
    return {"data": data, "layout": layout}


def _round_below(value: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not above a positive number."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(step * power for step in (1.0, 2.0, 5.0) if step * power <= value)


def _in_two_lines(name: str) -> str:
    """A case's name with a break near its middle, so that it fits a narrow page."""
    parts = name.split("-")
    halves = (("-".join(parts[:at]), "-".join(parts[at:])) for at in range(1, len(parts)))
    best = min(halves, key=lambda pair: max(map(len, pair)), default=(name,))
    return "-<br>".join(map(escape, best))


def _causes(results: Mapping[str, Any]) -> str:
    rows, told = [], []
    for case in results["cases"]:
        attribution = case["attribution"]
        if attribution is None:
            continue
        told += attribution["causes"]
        for cause in attribution["causes"]:
            if cause["key"] not in JUDGED or not cause["error"] or abs(cause["error"]) < 0.01:
                continue
            rows.append(
                (
                    case["name"],
                    JUDGED[cause["key"]].name,
                    signed_percent(cause["error"]),
                    signed_percent(cause["error_without"]),
                    signed_percent(cause["remainder"]),
                    cause["said"],
                )
            )
    titles = ("Case", "Figure", "Error", "Without it", "All swapped", "Cause")
    chance = ""
    if any(cause.get("by_chance") for cause in told):
        chance = (
            " Within chance are real figures among those of simulations of the same requests on "
            "other texts of the traces, at the pace of the run where it was seen."
        )
    return section(
        "What the errors come from",
        "Errors of 1 % and more in the typical real run, with the one ingredient that takes most "
        f"of each away when it is taken from the real run.{chance}",
        _table(titles, rows) if rows else "<p>No error is as large.</p>",
    )


def _gains(results: Mapping[str, Any]) -> str:
    gains = results["gains"]
    if not gains:
        return ""
    names = list(dict.fromkeys(one["name"] for one in gains))
    sides = {"real": "real", "simulated": "simulated"}
    middle = ""
    if any(one.get("middle_text") for one in gains):
        sides["middle_text"] = "middle text"
        middle = (
            " The middle text is the median of simulations on several texts, without the paces of "
            "the runs, which nobody knows before"
        )
        if _has_paces(results):
            sides["middle_text_at_pace"] = "middle text, at the paces"
            middle += ", and at them"
        middle += "."
    rows = []
    for group, against in dict.fromkeys((one["group"], one["against"]) for one in gains):
        for side, said in sides.items():
            mine = {
                one["name"]: one.get(side)
                for one in gains
                if (one["group"], one["against"]) == (group, against)
            }
            rows.append(
                (
                    f"{against}, {_texts(results, group)}, {said}",
                    *(times(mine.get(name)) or "\N{EN DASH}" for name in names),
                )
            )
    return section(
        "What HELIOS gains",
        "HELIOS with its defaults over each baseline at saturation, on the same requests and the "
        "same device; above 1 HELIOS is better. Real runs first, then what the simulation says."
        f"{middle} More throughput at a higher perplexity is no gain yet: see below.",
        _table(("Against", *names), rows),
    )


def _texts(results: Mapping[str, Any], group: str) -> str:
    found = group_of(results, group)
    return group if found is None else f"{found['texts']} texts"


def _equal_quality(results: Mapping[str, Any]) -> str:
    """Policies on the same requests, with those whose settings keep vanilla's quality."""
    if not results["groups"] and not results["equal_quality"]:
        return ""
    tables = []
    for group in results["groups"]:
        rows = []
        for one in group["policies"]:
            for side in ("real", "simulated"):
                cells = []
                for figure in BESIDE:
                    found = one["figures"].get(figure.key, {})
                    value = found.get(side)
                    cell = number(None if value is None else figure.factor * value)
                    over = times(found.get(f"{side}_over_vanilla"))
                    shown = figure.over_vanilla and over and one["policy"] != "vanilla"
                    cells.append(f"{cell} ({over})" if shown else cell)
                rows.append((f"{one['policy']}, {side}", *cells))
        titles = ("Policy", *(figure.title for figure in BESIDE))
        tables.append(
            f"<h3>{escape(group['arrivals'].capitalize())} arrivals, "
            f"{escape(group['texts'])} texts</h3>{_table(titles, rows)}"
        )
    return section(
        "At equal quality",
        "Before anything is served, simulations choose for HELIOS and for one model with exits the "
        f"smallest confidence threshold that keeps perplexity within {BOUND:g} times vanilla's on "
        "the same requests; of several variants the fastest is served for real. In parentheses: "
        "times vanilla's figure.",
        markup.notes([equal_quality_said(one, results) for one in results["equal_quality"]]),
        *tables,
    )


def _provenance(results: Mapping[str, Any]) -> str:
    anew = results["simulated_anew"]
    facts = [
        ("profile", f"{results['profile']} ({results['profile_hash'][:12]})"),
        ("models", ", ".join(results["candidates"])),
        *flat_items(results["environment"]),
    ]
    commands = [results["command"]]
    if anew is not None:
        facts.insert(1, ("simulated anew with", f"{anew['profile']} ({anew['profile_hash'][:12]})"))
        commands.append(anew["command"])
    return section(
        "Provenance",
        "What this page was made from. Results stand in results.json and results.csv beside it.",
        *map(markup.preformatted, commands),
        markup.terms(facts),
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    looks = [_words(title) for title in titles]
    head = [
        f'<th scope="col"{look}>{escape(title)}</th>'
        for title, look in zip(titles, looks, strict=True)
    ]
    body = [markup.row(first, map(markup.cell, others, looks[1:])) for first, *others in rows]
    return markup.table('class="figures plain"', head, body)


def _words(title: str) -> str:
    """Marks a column of words, which is set to the left and may wrap."""
    words = ("Cause", TITLES[-1])
    if title == "Saturation":
        return ' class="words"'
    return ' class="words" style="min-width:11rem"' if title in words else ""
