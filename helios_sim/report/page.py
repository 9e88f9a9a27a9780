"""The page: headline, comparison, figures, decisions, definitions and provenance in one file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from typing import Any, Final

import numpy as np
import polars as pl

from helios_sim.errors import InputError
from helios_sim.profile import STAND_INS
from helios_sim.report import figures, markup
from helios_sim.report.document import add_figure, document, notes_section, opening, section
from helios_sim.report.plotting import Figure
from helios_sim.report.thinning import MAX_TIMELINE_POINTS, is_thinned, thinned_decisions
from helios_sim.report.words import (
    device_of,
    grades_of,
    headline,
    judged_alike,
    large_batches,
    launch_bound,
    limits_of,
    mean_batches,
    noun_of,
    ratios_said,
    remarks,
    seeds_of,
    seeds_said,
    serving,
    standing_in,
    taken_otherwise,
)
from helios_sim.runs.comparison import (
    COMPARED,
    ComparisonRow,
    carry_alike,
    check_comparable,
    comparison_rows,
    distinct_labels,
    gain,
    paired_differences,
    seed_by_seed,
    shown_in,
)
from helios_sim.runs.latencies import columns_of
from helios_sim.runs.metrics import DEFINITIONS, figure_at
from helios_sim.runs.records import RunData, flat_items
from helios_sim.settings.slo import parse_slo
from helios_sim.settings.toml_writer import toml_text
from helios_sim.wording import between, counted, limits, listed, number, size, span, times

Summary = Mapping[str, Any]

NUM_DECISIONS: Final = 12
MAX_DECISIONS: Final = 300
MAX_WIDE_COLUMNS: Final = 5

_PAIRED: Final = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "slo_attainment")
_NOT_IN_TABLE: Final = ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")
_DEFINED: Final = (
    ("TTFT", "ttft_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("E2E", "e2el_ms"),
    ("Output tokens", "output_throughput"),
    ("Goodput", "request_goodput"),
    ("SLO attainment", "slo_attainment"),
    ("Energy per output token", "energy_per_output_token"),
    ("Batch size, mean", "mean_batch_size"),
    ("Batch size supported", "max_batch_size_supported"),
    ("Weights loaded", "weight_bytes_loaded"),
    ("Executed layers", "mean_executed_layers"),
    ("Agreement", "agreement"),
    ("Perplexity", "perplexity"),
    ("Breaches, relative", "breach_rate"),
    ("Launch-, memory-, compute-bound", "regime"),
    ("Intervals", "intervals"),
)
_SATURATION: Final = (
    "overloaded: while requests arrive the backlog grows significantly, and afterwards it takes "
    "longer to drain than bad luck explains; backlogged: requests wait longer than they are "
    "served; stable: neither; a closed loop is never overloaded"
)


def render(runs: Sequence[RunData], summaries: Sequence[Summary]) -> str:
    """The page of one run, or of several policies compared; the first is what ratios refer to.

    Title, question and notes are those of their scenario, if they share one.
    """
    if not runs or len(runs) != len(summaries):
        raise InputError(
            f"A report was asked of {len(runs)} runs with {len(summaries)} summaries; at "
            "least one run is needed, with a summary each."
        )
    scenario = _common_scenario(runs)
    title = str(scenario.get("name", _title_of(runs)))
    runs, summaries = _told_apart(runs, summaries)
    drawn: dict[str, Figure] = {}
    sections = [
        _opening(runs, summaries, title, str(scenario.get("question", ""))),
        _comparison(runs, summaries),
        _replications(summaries),
        _published(runs, summaries),
        _latencies(runs, summaries, drawn),
        _attainment(summaries, drawn),
        _timelines(runs, drawn),
        _exits(runs, drawn),
        _time(summaries, drawn),
        _decisions(runs),
        notes_section([str(note) for note in scenario.get("notes", [])]),
        _definitions(),
        _provenance(runs),
    ]
    return document(title, sections, drawn)


def _common_scenario(runs: Sequence[RunData]) -> Mapping[str, Any]:
    """The scenario of runs that differ in their policies alone; nothing of runs of several."""
    first, *others = (
        {key: value for key, value in run.scenario.items() if key != "policy"} for run in runs
    )
    return first if all(other == first for other in others) else {}


def _title_of(runs: Sequence[RunData]) -> str:
    """What the page of runs of several scenarios is called."""
    labels = [run.label for run in runs]
    if len(labels) == 1:
        return labels[0]
    return f"{listed(labels) if len(labels) <= 3 else f'{len(labels)} runs'} compared"


def _told_apart(
    runs: Sequence[RunData], summaries: Sequence[Summary]
) -> tuple[list[RunData], list[dict[str, Any]]]:
    """Runs whose labels are alike get a number, in tables and figures alike."""
    labels = distinct_labels([run.label for run in runs])
    told = [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    return told, [
        {**summary, "label": run.label} for run, summary in zip(told, summaries, strict=True)
    ]


def _opening(
    runs: Sequence[RunData], summaries: Sequence[Summary], title: str, question: str
) -> str:
    by_all = _num_refused_by_all(runs)
    environments = [run.environment for run in runs]
    grades = grades_of(environments)
    return opening(
        title,
        headline(summaries, _offered_tokens_per_s(runs), by_all),
        [
            *remarks(summaries, by_all),
            *launch_bound(grades, summaries),
            *large_batches(grades, mean_batches(summaries), taken_otherwise(environments)),
        ],
        question=question,
        setting=" ".join(serving(environments, summaries)),
    )


def _offered_tokens_per_s(runs: Sequence[RunData]) -> float | None:
    """Output tokens asked for each second; None where it is not one load that all runs met."""
    rates = set()
    for run in runs:
        span_s = float(np.ptp(run.requests["arrival_s"].to_numpy()))
        if run.closed_loop or span_s <= 0.0:
            return None
        rates.add(float(run.requests["output_tokens"].sum()) / span_s)
    return rates.pop() if len(rates) == 1 else None


def _num_refused_by_all(runs: Sequence[RunData]) -> int:
    """How many requests every one of several runs refused; 0 where their requests differ."""
    if len(runs) < 2:
        return 0
    try:
        check_comparable(runs)
    except InputError:
        return 0
    refused = (
        set(run.requests.filter(pl.col("status") == "refused")["request_id"]) for run in runs
    )
    return len(set.intersection(*refused))


def _labels(summaries: Sequence[Summary], first: int = 0) -> list[str]:
    """The titles of a table of runs from one on, in the colours of the figures if several are."""
    several = len(summaries) > 1
    return [
        '<th scope="col">Figure</th>',
        *(
            f'<th scope="col">{markup.swatch(place) if several else ""}{escape(one["label"])}</th>'
            for place, one in enumerate(summaries[first:], first)
        ),
    ]


def _comparison(runs: Sequence[RunData], summaries: Sequence[Summary]) -> str:
    several = len(runs) > 1
    shown = [row for row in comparison_rows(summaries) if row.key not in _NOT_IN_TABLE]
    body: list[str] = []
    for group, members in groupby(shown, key=lambda row: row.group):
        body.append(markup.group_row(group, len(runs) + 1))
        body += [_row(row, several) for row in members]
    caption = (
        f"Ratios are to {summaries[0]['label']}; a green dot marks the best of a row."
        if several
        else "Figures of the run."
    )
    if any(carry_alike("output_throughput", summaries[0], one) for one in summaries[1:]):
        caption += (
            " Rates are per second of the whole run, the last answers included: those who carry "
            "the same load are level in them."
        )
    compared = markup.table(_columns(len(runs), "figures"), _labels(summaries), body, caption)
    if not several:
        return section("Figures", _sent(runs, summaries), compared)
    paired, same = _paired(runs, summaries)
    lead = _sent(runs, summaries)
    if same:
        lead += f" Every {noun_of(summaries)} met the same requests."
    return section("Comparison", lead, compared, paired)


def _columns(num: int, css: str) -> str:
    """A table's class and the least width at which its columns are readable; beyond, it scrolls.

    More than five are set in smaller type, so that seven fit a page of 1,120 pixels.
    """
    if num > MAX_WIDE_COLUMNS:
        return f'class="{css} many" style="min-width:{200 + 114 * num}px"'
    return f'class="{css}" style="min-width:{220 + 150 * num}px"'


def _sent(runs: Sequence[RunData], summaries: Sequence[Summary]) -> str:
    """What was asked of the system, and what the figures leave out."""
    first = summaries[0]
    text = (
        f"{counted(first['num_requests'], 'request')} sent {_sending(runs)} to "
        f"{counted(first['num_replicas'], 'replica')} "
        f"({counted(first['num_gpus'], device_of(runs[0].environment))})."
    )
    cut = first["num_requests"] - first["num_measured"]
    if cut:
        text += (
            f" Latencies and attainment leave out the first {counted(cut, 'request')} (warm-up); "
            "throughput and energy are of the whole run."
        )
    return text


def _sending(runs: Sequence[RunData]) -> str:
    """Within what time requests were sent; in a closed loop that depends on the policy."""
    spans_s = [float(np.ptp(run.requests["arrival_s"].to_numpy())) for run in runs]
    shortest, longest = span(min(spans_s)), span(max(spans_s))
    said = "by a closed loop " if any(run.closed_loop for run in runs) else ""
    if shortest == longest:
        return f"{said}within {shortest}"
    return f"{said}within {shortest} to {longest}, depending on the policy,"


def _row(row: ComparisonRow, several: bool) -> str:
    cells = []
    for place, value in enumerate(row.values):
        css = " ".join(
            name
            for name, holds in (
                ("best", place in row.best),
                ("overloaded", value == "overloaded"),
                ("word", isinstance(value, str)),
            )
            if holds
        )
        ratio = ""
        if several:
            shown = times(row.ratios[place]) if place and row.better is not None else ""
            ratio = f'<span class="ratio">{shown}</span>'
        best = '<span class="hidden"> (best)</span>' if place in row.best else ""
        text = escape(number(value, _digits(row.key)))
        cells.append(f'<td class="{css}"><span class="value">{text}</span>{best}{ratio}</td>')
    return markup.row(row.title, cells, row.unit)


def _paired(runs: Sequence[RunData], summaries: Sequence[Summary]) -> tuple[str, bool]:
    """The table of paired differences or why there is none, and whether requests are the same."""
    try:
        check_comparable(runs)
    except InputError as error:
        return f'<p class="small">No paired differences: {escape(str(error))}</p>', False
    rows = comparison_rows(summaries, paired_differences(runs, summaries))
    shown = [row for row in rows if row.key in _PAIRED and any(row.differences)]
    if not shown:
        return '<p class="small">No paired differences: fewer than 40 common requests.</p>', True
    body = []
    for row in shown:
        cells = [
            "<td>\N{EN DASH}</td>"
            if one is None
            else f"<td>{_signed(one.mean)} <span class='unit'>[{_signed(one.low)}, "
            f"{_signed(one.high)}]</span></td>"
            for one in row.differences[1:]
        ]
        body.append(markup.row(row.title, cells, row.unit))
    caption = (
        f"Mean difference to {summaries[0]['label']}, request by request, with its 95 % interval; "
        "an interval that holds 0 shows no difference."
    )
    look = _columns(len(runs) - 1, "figures paired")
    return markup.table(look, _labels(summaries, first=1), body, caption), True


def _replications(summaries: Sequence[Summary]) -> str:
    """Means and intervals over the seeds that were run; nothing unless all ran the same ones."""
    seeds = seeds_of(summaries)
    if seeds is None:
        return ""
    replicated = [summary["replications"] for summary in summaries]
    body = []
    for key, title, usual, _, better in COMPARED:
        found = [one["figures"].get(key) for one in replicated]
        if not any(found):
            continue
        unit, scale = shown_in(key, usual, [one["mean"] for one in found if one])
        digits = _digits(key)
        cells = [
            f"<td>{_over_seeds(scale, digits, one, len(seeds))}"
            f"{_ratios(key, summary, summaries[0]) if better and place else ''}</td>"
            for place, (one, summary) in enumerate(zip(found, summaries, strict=True))
        ]
        body.append(markup.row(title, cells, unit))
    words = [one.get("saturation") or () for one in replicated]
    body.append(markup.row("Saturation", [markup.cell(_counted_words(said)) for said in words]))
    return section(
        "Over all seeds",
        f"Means over {seeds_said(seeds)} with their 95 % intervals (Student's t) and, below, from "
        "the least run to the most; neither where all look alike. "
        + (
            f"Ratios are to the run of {summaries[0]['label']} under the same seed, from the least "
            "to the largest, with the median where they lie far apart. "
            if len(summaries) > 1
            else ""
        )
        + "All else on this page is the run of the first.",
        markup.table(_columns(len(summaries), "figures paired"), _labels(summaries), body),
    )


def _over_seeds(scale: float, digits: int, figure: Mapping[str, Any] | None, num_seeds: int) -> str:
    """A mean over those seeds in which the figure is defined, with its interval."""
    if figure is None:
        return "\N{EN DASH}"
    said = number(scale * figure["mean"], digits)
    notes = []
    if figure["low"] != figure["high"]:
        low, high = (number(scale * figure[end], digits) for end in ("low", "high"))
        notes += [f"[{low}, {high}]"] if low != high else []
        if "least" in figure:
            ends = between(scale * figure["least"], scale * figure["most"], digits)
            notes += [f"<br>{ends}"] if ends != said else []
    if figure["num"] < num_seeds:
        notes.append(f"in {figure['num']} of {num_seeds}")
    return " ".join([said, *(f"<span class='unit'>{note}</span>" for note in notes)])


def _ratios(key: str, summary: Summary, first: Summary) -> str:
    """A line with the ratios to the first policy, seed by seed; nothing where there are none."""
    said = ratios_said(key, summary, first)
    return f" <span class='unit'><br>{said}</span>" if said else ""


def _counted_words(said: Sequence[str | None]) -> str:
    """Each word and how often it was said, the most frequent first: "stable 4, backlogged 1"."""
    counts = Counter(word for word in said if word is not None)
    if len(counts) <= 1:
        return next(iter(counts), "\N{EN DASH}")
    return ", ".join(f"{word} {count}" for word, count in counts.most_common())


def _digits(key: str) -> int:
    """Quality differs in later digits than the rest and matters there."""
    return 4 if key in {"perplexity", "agreement"} else 3


def _signed(value: float) -> str:
    if abs(value) < 1e-6:
        return "0"
    sign = "+" if value > 0 else "\N{MINUS SIGN}"
    return f"{sign}{number(abs(value))}"


def _published(runs: Sequence[RunData], summaries: Sequence[Summary]) -> str:
    """Published figures beside ours, with what explains the difference."""
    by_label = {summary["label"]: summary for summary in summaries}
    seeds = seeds_of(summaries)
    rows = []
    for entry in runs[0].scenario.get("published", ()):
        own = _own_figure(entry, by_label)
        if own is None or not math.isfinite(own):
            continue
        what = f"{entry['figure'].replace('_', ' ')} of {entry['policy']}"
        if entry.get("against"):
            what = f"gain in {what} over {entry['against']}"
        unit = entry.get("unit") or ("x" if entry.get("against") else "")
        told = (
            f"{number(entry['published'])} {unit}",
            f"{number(own)} {unit}",
            *([_own_over_seeds(entry, by_label, len(seeds))] if seeds else ()),
            number(_ratio(own, entry["published"])),
            entry["source"],
            entry.get("why", ""),
        )
        rows.append(markup.row(what, map(markup.cell, told)))
    if not rows:
        return ""
    ours = runs[0].origin.capitalize()
    others = (f"Seeds {seeds[0]} to {seeds[-1]}",) if seeds else ()
    titles = ("Figure", "Published", ours, *others, "Ratio", "Source", "Why it differs")
    return section(
        "Beside the published figures",
        "Nothing is fitted to these figures; they are printed to show where the model stands.",
        markup.table('class="published"', markup.titles(titles), rows),
    )


def _ratio(own: float, published: float) -> float | None:
    """Ours over the published figure; None where no number says it."""
    ratio = own / published if published else math.inf
    return ratio if math.isfinite(ratio) else None


def _own_figure(entry: Mapping[str, Any], by_label: Mapping[str, Summary]) -> float | None:
    """Our value of a published figure, or None where these runs do not have it."""
    labels = [label for label in (entry["policy"], entry.get("against")) if label is not None]
    values = [figure_at(by_label.get(label), entry["figure"]) for label in labels]
    known = [value for value in values if value is not None]
    return _told(entry, *known) if len(known) == len(labels) else None


def _told(entry: Mapping[str, Any], own: float, other: float | None = None) -> float | None:
    """A figure in the unit in which it is published, or the gain over another one's."""
    if other is not None:
        return gain(entry["figure"], own, other)
    return own * float(entry.get("scale", 1.0))


def _own_over_seeds(
    entry: Mapping[str, Any], by_label: Mapping[str, Summary], num_seeds: int
) -> str:
    """Our value of a published figure over the seeds that have it, from the least to the most."""
    key, own = entry["figure"], by_label[entry["policy"]]
    against = entry.get("against")
    pairs = seed_by_seed(key, own, by_label[against] if against else own)
    told = [_told(entry, one, two if against else None) for one, two in pairs]
    values = [value for value in told if value is not None and math.isfinite(value)]
    if not values:
        return ""
    some = "" if len(values) == num_seeds else f" in {len(values)} of {num_seeds}"
    return f"{between(min(values), max(values))}{some}"


def _latencies(
    runs: Sequence[RunData], summaries: Sequence[Summary], drawn: dict[str, Figure]
) -> str:
    columns = [
        columns_of(run, summary.get("warmup_s", 0.0), summary.get("warmup_requests", 0))
        for run, summary in zip(runs, summaries, strict=True)
    ]
    text = summaries[0].get("slo") if judged_alike(summaries) else None
    figure = figures.latency_figure(
        columns, [run.label for run in runs], parse_slo(text) if text else None
    )
    return section(
        "Latency",
        "How many requests were answered within a given time. Further left is better.",
        add_figure(
            drawn,
            "latency",
            figure,
            "Cumulative distributions of TTFT, TPOT and E2E",
            "Cumulative share of finished requests by TTFT, TPOT (requests of two or more tokens) "
            "and E2E, on logarithmic scales."
            + (" The thin vertical lines are the limits of the SLO." if text else ""),
        ),
    )


def _attainment(summaries: Sequence[Summary], drawn: dict[str, Figure]) -> str:
    judged = [summary for summary in summaries if summary.get("slo")]
    if not judged:
        return section("SLO attainment", "The scenario sets no SLO.")
    verdicts = [
        f"{summary['label']}: "
        + listed(
            [
                f"{limits(one['limit'])} {'passed' if one['passed'] else 'missed'}"
                for one in summary["slo_limits"]
                if one["passed"] is not None
            ]
        )
        for summary in judged
        if summary["slo_passed"] is not None
    ]
    several = any(len(parse_slo(summary["slo"]).limits) > 1 for summary in judged)
    apart = "" if judged_alike(judged) else " Each run is judged by its own limits."
    return section(
        "SLO attainment",
        f"{limits_of(summaries)}.",
        add_figure(
            drawn,
            "attainment",
            figures.attainment_figure(summaries),
            "Share of the requests sent that met each limit",
            "Share of the requests sent (after the warm-up) that finished within "
            f"{'each limit, and within all of them' if several else 'the limit'}. Refused and "
            f"unfinished requests count as missed.{apart}",
        ),
        markup.notes(verdicts, "notes small"),
    )


def _timelines(runs: Sequence[RunData], drawn: dict[str, Figure]) -> str:
    colours = figures.model_colours(runs)
    # The run in which most is decided says most; it is shown first.
    first = max(range(len(runs)), key=lambda i: (runs[i].decisions.height, -i))
    panes = []
    for place, run in enumerate(runs):
        content = "No timeline recorded."
        if run.timeline.height > 0:
            content = add_figure(
                drawn,
                f"timeline{place}",
                figures.timeline_figure(run, colours),
                f"Timeline of {run.label}",
                _timeline_caption(run),
            )
        panes.append((f"{markup.swatch(place)}{escape(run.label)}", content))
    tabbed = markup.tabs("timeline", "Policy", panes, first)
    return section("Timeline", "What the system did, moment by moment.", tabbed)


def _timeline_caption(run: RunData) -> str:
    replicas = run.timeline["replica"].n_unique()
    text = (
        "Running requests (batch, mean) and waiting ones (at the end) of each interval; loaded "
        "model and layers; what the policy decided and when (hover for its reason); KV blocks in "
        "use; power; tokens emitted below the confidence threshold. Drag to zoom, double-click to "
        "go back."
    )
    if replicas > 1:
        text += f" Sums over {replicas} replicas; a row a replica, stronger with more layers."
    if replicas > figures.MAX_REPLICA_ROWS:
        text += f" Only the first {figures.MAX_REPLICA_ROWS} replicas have a row."
    if is_thinned(run.timeline):
        text += (
            f" Averaged over {MAX_TIMELINE_POINTS} equal steps of time, of the waiting requests "
            f"the most; timeline.parquet holds all {number(run.timeline.height)} intervals."
        )
    return text + thinned_decisions([run.decisions])


def _exits(runs: Sequence[RunData], drawn: dict[str, Figure]) -> str:
    figure = figures.exits_figure(runs, figures.model_colours(runs))
    return section(
        "Exits",
        "After how many layers tokens left, and in which model.",
        add_figure(
            drawn,
            "exits",
            figure,
            "Share of decoded tokens by model and exit layer",
            "Share of decoded tokens by the layer (L) at which they left; deeper exits are "
            "stronger. Tokens emitted by a prefill are not counted.",
        ),
    )


def _time(summaries: Sequence[Summary], drawn: dict[str, Figure]) -> str:
    rows = []
    for summary in summaries:
        shares = summary.get("time_shares") or {}
        parts = [
            f"{number(100 * shares[name])} % {name}"
            for name in ("evaluating", "draining")
            if shares.get(name)
        ]
        if parts:
            rows.append(f"{summary['label']}: {listed(parts)}")
    overlap = f" Of the same time, {'; '.join(rows)}." if rows else ""
    return section(
        "Where the time went",
        "What bounds the layers, and what was not serving.",
        add_figure(
            drawn,
            "time",
            figures.time_figure(summaries),
            "Share of all replicas' time by what it was spent on",
            "Busy time by what bounds the time of a layer: launching it, moving its weights and KV "
            f"from memory, or computing; weight loading; idling.{overlap}",
        ),
    )


def _decisions(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        decisions = run.decisions.sort("time_s", maintain_order=True)
        count = decisions.height
        parts.append(f"<h3>{escape(run.label)}, {count} decision{'' if count == 1 else 's'}</h3>")
        if count == 0:
            continue
        parts.append(_decision_table(decisions.head(NUM_DECISIONS), run.label))
        rest = decisions.slice(NUM_DECISIONS, MAX_DECISIONS)
        if rest.height:
            parts.append(markup.folded(f"{rest.height} more", _decision_table(rest, run.label)))
        left = count - NUM_DECISIONS - rest.height
        if left > 0:
            parts.append(
                f'<p class="small">{number(left)} later decisions are in decisions.parquet.</p>'
            )
    return section("Decisions", "What each policy decided, in its own words.", *parts)


def _decision_table(decisions: pl.DataFrame, label: str) -> str:
    rows = []
    for row in decisions.iter_rows(named=True):
        layers = "" if row["depth"] is None else f", {row['depth']} layers"
        took = (
            "\N{EN DASH}"
            if row["ready_s"] is None
            else span(max(0.0, row["ready_s"] - row["time_s"]))
        )
        moved = size(row["moved_bytes"]) if row["moved_bytes"] else "\N{EN DASH}"
        rows.append(
            f"<tr><td>{row['time_s']:,.1f} s</td><td>{row['replica']}</td>"
            f"<td>{escape(row['event'])}</td><td>{escape(row['decision'])}</td>"
            f"<td>{escape(row['model'] or '')}{layers}</td>"
            f"<td>{escape(row['exit_mode'] or '')}</td>"
            f"<td>{moved}</td><td>{took}</td><td>{escape(row['reason'])}</td></tr>"
        )
    names = ("At", "Replica", "Asked on", "Decision", "Serves", "Exits", "Moved", "Took", "Reason")
    return (
        '<div class="scroll"><table class="decisions">'
        f'<caption class="hidden">Decisions of {escape(label)}</caption>'
        f"<thead><tr>{''.join(markup.titles(names))}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _definitions() -> str:
    defined = [(name, DEFINITIONS[key]) for name, key in _DEFINED]
    return section(
        "Definitions",
        "Tools differ on these; here they mean the following.",
        markup.terms([*defined, ("Saturation", _SATURATION)]),
    )


def _provenance(runs: Sequence[RunData]) -> str:
    parts: list[str] = []
    grades = runs[0].environment.get("profile_grades") or {}
    if sum(grades.values()):
        said = listed([f"{number(count)} {grade}" for grade, count in grades.items()])
        parts.append(
            f"<p>Of the {number(sum(grades.values()))} numbers in the profile behind this page, "
            f"{escape(said)}.</p>"
        )
    likes = {
        name: like for run in runs for name, like in (run.environment.get(STAND_INS) or {}).items()
    }
    if likes:
        parts.append(f"<p>{escape(standing_in(likes))}</p>")
    origins = listed(list(dict.fromkeys(run.origin for run in runs)))
    seeds = listed(list(dict.fromkeys(str(run.seed) for run in runs)))
    facts = [("origin", origins), ("seed", seeds), ("schema", str(runs[0].schema_version))]
    shared = all(run.environment == runs[0].environment for run in runs)
    for run in runs[:1] if shared else runs:
        prefix = "" if shared else f"{run.label}: "
        facts += [(f"{prefix}{name}", text) for name, text in flat_items(run.environment)]
    parts.append(markup.terms(facts))
    texts: dict[str, list[str]] = {}
    for run in runs:
        texts.setdefault(toml_text(run.scenario), []).append(run.label)
    for text, labels in texts.items():
        parts.append(markup.folded(f"Scenario of {listed(labels)}", markup.preformatted(text)))
    return section("Provenance", "What this page was made from.", *parts)
