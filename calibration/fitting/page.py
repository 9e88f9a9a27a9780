"""The calibration's page: what was measured, how far off the profile is, and what stands behind it.

Drawn beside the profile rather than into it, so that a redrawn page changes no profile's hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting import drawings
from calibration.fitting.anchors import SOURCE, beside_anchors
from calibration.fitting.check import (
    MEDIAN_BAR,
    NAMES,
    P95_BAR,
    CheckRow,
    check_rows,
    compare,
    has_readings,
    measurement_of,
    on_cuda,
    percent,
    verdict,
)
from calibration.fitting.fit import device_floors
from calibration.fitting.points import (
    DECODE_WINDOWS,
    HELD_OUT,
    gather,
    of_quantity,
    read_points,
    sound,
)
from calibration.fitting.predict import Predictor, predictor_of
from calibration.measuring.readings import LINK, MEMORY_KINDS
from calibration.training.exit_quality import (
    NUM_BINS,
    deep_and_early,
    early_of_deep,
    expected_calibration_error,
    reliability,
)
from helios_sim.errors import InputError
from helios_sim.exits import ExitTraces, load_traces
from helios_sim.profile import Profile, TraceExits
from helios_sim.profiles.roofline import REFERENCE_CONTEXT_TOKENS
from helios_sim.report import markup
from helios_sim.report.document import add_figure, document, opening, section
from helios_sim.report.page_files import write_page_text
from helios_sim.report.plotting import Figure
from helios_sim.runs.records import flat_items
from helios_sim.wording import listed, number, size, span

MAX_MEMORY_ROWS: Final = 24


def page_path(profile_folder: Path) -> Path:
    """Where a profile's page is drawn unless said otherwise: beside its folder."""
    return profile_folder.parent / f"{profile_folder.name}.calibration.html"


def write_page(profile: Profile, path: Path, points: Path | None = None) -> Path:
    """Draw the page of a profile with readings, and return where it lies.

    `points` is the folder the readings came from, whose name the page states. Raises `InputError`
    where no page may be written.
    """
    write_page_text(render(profile, points), path)
    return path


def render(profile: Profile, points: Path | None = None) -> str:
    """The page as one self-contained file."""
    if not has_readings(profile):
        raise InputError(
            f"Profile {profile.name!r} is {profile.provenance.origin} and holds no readings, so "
            "there is no calibration to draw; give a measured profile.",
            where=str(profile.folder),
        )
    readings = gather(sound(read_points(profile.folder)))
    compared = compare(profile, readings)
    rows = check_rows(profile, compared)
    drawn: dict[str, Figure] = {}
    sections = [
        _opening(profile, rows),
        _errors(rows, compared, drawn),
        _layers(profile, readings, drawn),
        _energy(profile, readings, drawn),
        _memory(profile),
        _loading(profile, compared, drawn),
        _exits(profile, drawn),
        _provenance(profile, points),
    ]
    return document(f"Calibration of {profile.name}", sections, drawn)


def _opening(profile: Profile, rows: Sequence[CheckRow]) -> str:
    held_out = [row for row in rows if row.has_bars and row.purpose == HELD_OUT]
    headline = verdict(rows, on_cuda(profile))
    if held_out:
        worst = max(held_out, key=lambda row: row.median)
        headline = (
            f"{profile.device.name}: times held out of the fit are predicted within a median of "
            f"{percent(min(row.median for row in held_out))} to {percent(worst.median)}, by kind."
        )
    remarks = [verdict(rows, on_cuda(profile))]
    fitted = measurement_of(profile).get("models", {})
    for name, model in profile.models.items():
        kept = fitted.get(name, {})
        if model.hull is not None:
            remarks.append(
                f"{name}: measured up to batch {number(model.hull.max_batch)} and "
                f"{number(model.hull.max_context_tokens)} tokens of context; beyond, a prediction "
                "extrapolates."
            )
        shares = (kept.get("launch_bound_share") or {}).get("by_batch")
        if shares:
            first, last = shares[0], shares[-1]
            remarks.append(
                f"{name}: launching takes {percent(first[1])} of eager decode time at batch "
                f"{first[0]} and {percent(last[1])} at batch {last[0]}; graphs save it."
            )
        if kept.get("falls"):
            remarks.append(f"{name}: a predicted time falls {kept['falls']}.")
    if not profile.has_energy:
        why = profile.quantities["device.active_w"].source
        remarks.append(f"Energy is unavailable, which is not zero: {why}.")
    return opening(
        f"Calibration of {profile.name}",
        headline,
        remarks,
        question="What does this device really do with these models, and how far off is the "
        "profile?",
    )


def _table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    texts: int = 1,
    ends_in_words: bool = False,
) -> str:
    """A table whose first `texts` columns are text and whose others are figures.

    Titles take several lines where they are long, and so does a last column of words.
    """
    words = len(titles) - 1 if ends_in_words else len(titles)
    head = [
        f'<th scope="col"{_TITLE if texts <= at < words else ""}>{escape(title)}</th>'
        for at, title in enumerate(titles)
    ]
    body = [
        markup.row(
            first,
            [
                markup.cell(text, _aligned(at, texts) if at < words else _WORDS)
                for at, text in enumerate(others, 1)
            ],
        )
        for first, *others in rows
    ]
    return markup.table('style="font-size:.86rem"', head, body, caption)


_TITLE: Final = ' style="text-align:right"'
_WORDS: Final = ' style="min-width:12em"'


def _aligned(column: int, texts: int) -> str:
    numeric = "text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap"
    return ' style="white-space:nowrap"' if column < texts else f' style="{numeric}"'


def _errors(rows: Sequence[CheckRow], compared: pl.DataFrame, drawn: dict[str, Figure]) -> str:
    told = [
        (
            NAMES[row.quantity],
            row.model or "device",
            row.mode or "\N{EN DASH}",
            f"{row.purpose}, {row.n}",
            percent(row.median),
            percent(row.p95),
            percent(row.left_out_median),
            percent(row.noise),
            ("+" if row.worst >= 0 else "") + percent(row.worst),
            row.where,
        )
        for row in rows
    ]
    titles = (
        "Quantity", "Model", "Mode", "Points", "Median", "p95", "Left out", "Noise", "Worst",
        "Where it lies",
    )  # fmt: skip
    shown = _table(
        titles,
        told,
        "Sizes of relative errors. Left out: median error of fits that did not see the point. "
        "Noise: median deviation among the trials of one point, which no fit goes below.",
        texts=3,
        ends_in_words=True,
    )
    figure = add_figure(
        drawn,
        "errors",
        drawings.error_figure(compared),
        "Relative error of every point by quantity",
        "(predicted \N{MINUS SIGN} measured) / measured over the measured value. Bands: "
        f"{MEDIAN_BAR:.0%} and {P95_BAR:.0%}, the bars for the median and the 95th percentile of "
        "times on a GPU. Hover for a point's place.",
    )
    return section("Predicted against measured", "", figure, shown)


def _layers(profile: Profile, readings: pl.DataFrame, drawn: dict[str, Figure]) -> str:
    measurement = measurement_of(profile)
    floors, fitted = measurement.get("floors", {}), measurement.get("models", {})
    panes: list[tuple[str, str]] = []
    facts: list[tuple[str, ...]] = []
    parts: list[tuple[str, ...]] = []
    deep: list[tuple[str, pl.DataFrame, Predictor, str]] = []
    for place, name in enumerate(profile.models):
        kept = fitted.get(name, {})
        mode = kept.get("modes", {}).get("decode_layers", "")
        mine = readings.filter(pl.col("model") == name)
        if not of_quantity(mine, "decode_layers", mode).height:
            continue
        rate, launch_s = device_floors(floors, name, mode)
        plot = add_figure(
            drawn,
            f"layers{place}",
            drawings.layer_figure(mine, predictor_of(profile, name), mode, rate, launch_s),
            f"Decode time per layer of {name} against batch",
            f"Measured at full depth ({mode or 'one mode'}), less what a stack takes beside its "
            "layers; lines are the profile. Dashed: the layer's weights and the KV it reads at the "
            "measured memory rate. Dotted: launching as many kernels without work.",
        )
        panes.append((escape(name), plot))
        facts.append(_layer_facts(name, kept))
        parts.append(_part_facts(profile, name))
        if kept.get("depth_residual", {}).get("left_out_mean_with") is not None:
            deep.append((name, mine, predictor_of(profile, name), mode))
    if not panes:
        return ""
    shown = _table(
        ("Model", "Decode is bounded by", "Prefill by", "By batch", "By loaded depth",
         "Over the floor"),
        facts,
        "What was kept of the candidates (a floor, a second plane or a factor only where it "
        "clearly lowers the left-out error), and decode time per layer over the larger floor: "
        "median, least to most.",
        texts=5,
    )  # fmt: skip
    fixed = _table(
        ("Model", "Context read to the longest row", "Decode starts in", "and a row adds",
         "Prefill starts in", "and a prompt adds", "A graph is captured in"),
        parts,
        "Share of a KV token's price that is paid up to the longest row's end, and what whole "
        "iterations take beside layers and head.",
    )  # fmt: skip
    depths = ""
    if deep:
        depths = add_figure(
            drawn,
            "depths",
            drawings.depth_figure(deep),
            "Decode time per layer against loaded layers",
            "Over what the profile has with all of them loaded: layers of which few are loaded "
            "find their weights and keys in a cache. Points: median over all loads, bars the "
            "middle half. Lines: the profile's factor, 1 where none was kept.",
        )
    return section("Decode time per layer", "What one layer takes, and what bounds it.",
                   markup.tabs("layers", "Model", panes), depths, shown, fixed)  # fmt: skip


def _layer_facts(name: str, kept: Mapping[str, Any]) -> tuple[str, ...]:
    planes = kept.get("planes", {})
    ratios = [row[-1] for row in kept.get("against_floor", [])]
    over = "\N{EN DASH}"
    if ratios:
        over = (
            f"{number(float(np.median(ratios)))}\N{MULTIPLICATION SIGN} "
            f"({number(min(ratios))} to {number(max(ratios))})"
        )
    return (
        name,
        listed(planes.get("decode", {}).get("kept", [])),
        listed(planes.get("prefill", {}).get("kept", [])),
        *(_factor_fact(kept.get(factor, {})) for factor in ("batch_residual", "depth_residual")),
        over,
    )


def _factor_fact(residual: Mapping[str, Any]) -> str:
    """Whether a factor was kept, and the left-out errors that decided it."""
    without, found = (residual.get(f"left_out_mean_{key}") for key in ("without", "with"))
    if found is None:
        return f"not kept: {residual.get('why', 'not tried')}"
    change = f"{percent(without)} left out \N{RIGHTWARDS ARROW} {percent(found)}"
    return f"{'kept' if residual.get('kept') else 'not kept'}: {change}"


def _part_facts(profile: Profile, name: str) -> tuple[str, ...]:
    """How context is read, and what an iteration takes beside its layers and captures."""
    found = profile.models[name].coefficients
    sums = [
        sum(found[f"decode.{plane}_s_per_{what}_token"] or 0.0 for plane in ("memory", "compute"))
        for what in ("context", "padded")
    ]
    share = percent(sums[1] / sum(sums)) if sum(sums) > 0.0 else "\N{EN DASH}"
    fixed = (
        "decode.fixed_s", "decode.fixed_s_per_row", "prefill.fixed_s", "prefill.fixed_s_per_prompt",
    )  # fmt: skip
    graph, layer = (found[f"capture.s_per_{part}"] or 0.0 for part in ("graph", "layer"))
    captured = f"{span(graph)} + {span(layer)} a layer" if graph or layer else "\N{EN DASH}"
    return (name, share, *(span(found[part] or 0.0) for part in fixed), captured)


def _energy(profile: Profile, readings: pl.DataFrame, drawn: dict[str, Figure]) -> str:
    if not profile.has_energy:
        why = profile.quantities["device.active_w"].source
        return section(
            "Energy",
            f"Unavailable, which is not zero: {why}. Joules of a run on this profile are unknown; "
            "its times are not concerned.",
        )
    places = {name: f"device.{name}" for name in ("idle_w", "active_w", "load_w")}
    for model in profile.models:
        for name in ("power.active_w", "power.limit_w"):
            places[f"{model} {name}"] = f"models.{model}.coefficients.{name}"
    rows = [
        (name, _watts(found.value), _watts(found.error), found.grade, found.source)
        for name, place in places.items()
        for found in (profile.quantities[place],)
    ]
    figures = []
    for place, name in enumerate(profile.models):
        mine = readings.filter(pl.col("model") == name)
        if mine.filter(pl.col("quantity").is_in(DECODE_WINDOWS) & (pl.col("joules") > 0)).height:
            figures.append(
                add_figure(
                    drawn,
                    f"energy{place}",
                    drawings.energy_figure(mine, predictor_of(profile, name)),
                    f"Joules per token of {name} by batch",
                    f"{name}: windows of whole iterations and of stacks of layers alone, at the "
                    "greatest depth; gross joules. Both axes logarithmic.",
                )
            )
    return section(
        "Energy",
        "Windows of whole iterations and of stacks of layers, regressed on seconds, layers, rows "
        "and tokens; gross joules. Active power includes the idle one.",
        *figures,
        _anchors(profile),
        _table(("Power", "Value", "Standard error", "Grade", "Source"), rows, texts=1),
    )


def _anchors(profile: Profile) -> str:
    """Energy and rate of decoding beside published ones; nothing where no model has any."""
    found = beside_anchors(profile)
    if not found:
        return ""
    rows = [
        (
            f"{one.model}{' (extrapolated)' if one.beyond else ''}",
            str(one.anchor.batch),
            f"{number(one.joules)} J",
            f"{number(one.anchor.joules)} J",
            f"{number(one.joules / one.anchor.joules)}\N{MULTIPLICATION SIGN}",
            number(one.tokens_per_s),
            number(one.anchor.tokens_per_s),
        )
        for one in found
    ]
    titles = (
        "Model", "Batch", "A token", "Published", "Ratio", "Tokens a second", "Published rate",
    )  # fmt: skip
    return _table(
        titles,
        rows,
        f"Decoding alone, every layer, {REFERENCE_CONTEXT_TOKENS} tokens of context assumed. "
        f"Published: {SOURCE}.",
    )


def _watts(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{number(value)} W"


def _memory(profile: Profile) -> str:
    record = measurement_of(profile).get("memory", {})
    rows = []
    for kind in MEMORY_KINDS:
        for model, layers, batch, context, found, predicted in record.get(kind, []):
            where = [
                f"{value} {word}"
                for value, word in ((layers, "layers"), (batch, "rows"), (context, "tokens"))
                if value
            ]
            rows.append(
                (
                    kind.removeprefix("memory_"),
                    model or "device",
                    ", ".join(where),
                    size(found),
                    size(predicted) if predicted else "\N{EN DASH}",
                    percent((predicted - found) / found) if predicted and found else "\N{EN DASH}",
                )
            )
    if not rows:
        return section("Memory", "No memory was read.")
    titles = ("Memory", "Model", "At", "Measured", "Predicted", "Error")
    shown = _table(titles, rows[:MAX_MEMORY_ROWS], texts=3)
    more = rows[MAX_MEMORY_ROWS:]
    if more:
        shown += markup.folded(f"{len(more)} more", _table(titles, more, texts=3))
    return section(
        "Memory", "A wrong block count spoils more than a wrong time: bytes by the model's "
        "arithmetic beside bytes allocated.", shown
    )  # fmt: skip


def _loading(profile: Profile, compared: pl.DataFrame, drawn: dict[str, Figure]) -> str:
    record = measurement_of(profile).get("loading", {})
    host = record.get("host", {}).get("stands_for", "load_host")
    links = [("load_disk", profile.loading.disk), (host, profile.loading.host)]
    rows = []
    rates = measurement_of(profile).get("floors", {}).get("copy_bytes_per_s", {})
    link_rate = rates.get(LINK)
    for quantity, link in links:
        is_disk = quantity == "load_disk"
        grade = profile.quantities[f"loading.{'disk' if is_disk else 'host'}.bytes_per_s"].grade
        share = "\N{EN DASH}"
        if link_rate and not is_disk:
            share = percent(link.bytes_per_s / link_rate)
        rate = f"{size(link.bytes_per_s)}/s"
        rows.append((NAMES[quantity], grade, span(link.alpha_s), rate, share))
    for label, key in (("graph capture", "graph_capture"), ("unloading", "unload")):
        seconds = measurement_of(profile).get(key)
        if seconds is not None:
            rows.append((label, "measured", span(seconds), "\N{EN DASH}", "\N{EN DASH}"))
    shown = _table(
        ("Stage", "Grade", "Start", "Rate", "Of the copy rate"),
        rows,
        "Seconds = start + bytes / rate. The copy rate is that of the same pinned bytes copied to "
        "a GPU again and again. Capturing and unloading are medians, and no part of the profile's "
        "links.",
        texts=2,
    )
    if not compared["quantity"].is_in([quantity for quantity, _ in links]).any():
        return section("Loading", "No loading was measured.", shown)
    figure = add_figure(
        drawn,
        "loading",
        drawings.loading_figure(compared, links),
        "Seconds of a load against its bytes",
        "Points are medians over trials, lines the profile's links, both axes logarithmic.",
    )
    return section("Loading", "How long weights take on their way.", figure, shown)


def _exits(profile: Profile, drawn: dict[str, Figure]) -> str:
    if not isinstance(profile.exits, TraceExits):
        return section(
            "Exits", "Not measured: generated from published statistics, at their grades."
        )
    traces = load_traces(profile)
    rows, curves = [], []
    for name in traces.candidates:
        threshold = profile.models[name].confidence.default_threshold
        for domain in traces.domains:
            at = traces.domain_index(domain)
            shares = traces.share_by_exit(name, threshold, domain)
            for level, layer in enumerate(traces.exit_layers[name]):
                confidence = traces.confidence[name][at, :, level]
                agrees = traces.agrees[name][at, :, level]
                rows.append(
                    (
                        name,
                        domain,
                        str(layer),
                        number(float(np.exp(traces.nll_nats[name][at, :, level].mean())), 4),
                        percent(float(agrees.mean())),
                        percent(float(shares[level])),
                        percent(expected_calibration_error(confidence, agrees)),
                    )
                )
        first = traces.exit_layers[name][0]
        curves.append(
            (
                f"{name}, layer {first}",
                reliability(traces.confidence[name][..., 0], traces.agrees[name][..., 0]),
            )
        )
    report = measurement_of(profile).get("exit_traces", {})
    shown = _reported_exits(report.get("candidates", {})) or _table(
        ("Model", "Domain", "Exit after", "Perplexity", "Agrees", "Leave here", "Calibration"),
        rows,
        "By exit on held-out text, teacher-forced: perplexity of the text, share of tokens equal "
        "to the model's own at full depth, share that leaves at the default threshold, and the "
        "gap between confidence and that agreement (expected calibration error).",
        texts=2,
    )
    figure = add_figure(
        drawn,
        "reliability",
        drawings.reliability_figure(curves),
        "Agreement with the full model against confidence at the first exit",
        f"Over all domains, in {NUM_BINS} bins of confidence. Below the diagonal the model is "
        "over-confident.",
    )
    return section(
        "Exits",
        f"{number(traces.num_positions)} positions in each of {listed(list(traces.domains))}; all "
        "candidates on the same positions.",
        shown,
        figure,
        _complementarity(profile, traces, report.get("complementarity", {})),
    )


def _reported_exits(report: Mapping[str, Any]) -> str:
    """Quality by exit as the tracing reported it, which knows the text's own tokens too."""
    columns = (
        "perplexity",
        "right",
        "agrees",
        "share",
        "calibration_error_raw",
        "calibration_error_calibrated",
    )
    rows = []
    for name, found in report.items():
        for domain, quality in found.get("domains", {}).items():
            own = " (own)" if domain in found.get("own_domains", ()) else ""
            for level, layer in enumerate(found.get("exit_layers", ())):
                values = [(quality.get(column) or {level: None})[level] for column in columns]
                rows.append(
                    (
                        name,
                        f"{domain}{own}",
                        str(layer),
                        number(values[0], 4),
                        *(percent(value) for value in values[1:]),
                    )
                )
    if not rows:
        return ""
    titles = (
        "Model", "Domain", "Exit after", "Perplexity", "Right", "Agrees", "Leave here",
        "Off, raw", "Off, calibrated",
    )  # fmt: skip
    return _table(
        titles,
        rows,
        "By exit on held-out text, teacher-forced. Right: the exit's token is the text's own. "
        "Agrees: it is the model's own at full depth. Leave here: share of tokens at the "
        "threshold. Off: expected calibration error of the confidence as the chance of being "
        "right, raw and after isotonic calibration.",
        texts=2,
    )


def _complementarity(profile: Profile, traces: ExitTraces, report: Mapping[str, Any]) -> str:
    """How many of the tokens that go deep in one model leave another at its first exit."""
    return _reported_complementarity(report) or _counted_complementarity(profile, traces)


def _reported_complementarity(report: Mapping[str, Any]) -> str:
    """Each pair of models as the tracing reported it, by raw and by calibrated confidence."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    thresholds = []
    for variant, found in report.items():
        thresholds.append(f"{number(found['threshold'])} ({variant})")
        for pair in found["pairs"]:
            key = (pair["deep_in"], pair["early_in"], pair["domain"])
            values = (pair["deep_share"], pair["early_of_deep"], pair["right_of_early"])
            cells.setdefault(key, []).extend(percent(value) for value in values)
    if not cells:
        return ""
    titles = [f"{what}, {variant}" for variant in report for what in ("Deep", "Early", "Right")]
    return _table(
        ("Deep in", "Early in", "Domain", *titles),
        [(*key, *values) for key, values in cells.items()],
        "Complementarity. Deep: share of tokens that leave the one model at its last exit. Early: "
        "of these, the share that leaves the other at its first. Right: of those, the share whose "
        f"token there is the text's own. The threshold is {listed(thresholds)}.",
        texts=3,
    )


def _counted_complementarity(profile: Profile, traces: ExitTraces) -> str:
    """The same from the traces at each model's threshold; they do not say which token is right."""
    rows = []
    for name, other in permutations(traces.candidates, 2):
        levels, others = (
            traces.exit_level_at(one, profile.models[one].confidence.default_threshold)
            for one in (name, other)
        )
        for at, domain in enumerate(traces.domains):
            num_exits = len(traces.exit_layers[name])
            deep, early = deep_and_early(levels[at], num_exits, others[at])
            shares = (float(deep.mean()), early_of_deep(deep, early))
            rows.append((name, other, domain, *(percent(share) for share in shares)))
    if not rows:
        return ""
    return _table(
        ("Deep in", "Early in", "Domain", "Deep", "Early"),
        rows,
        "Complementarity at the default thresholds. Deep: share of tokens that leave the one model "
        "at its last exit. Early: of these, the share that leaves the other at its first.",
        texts=3,
    )


def _provenance(profile: Profile, points: Path | None) -> str:
    counts = {grade: count for grade, count in profile.grade_counts().items() if count}
    said = listed([f"{number(count)} {grade}" for grade, count in counts.items()])
    facts = [
        ("profile", profile.name),
        ("hash", profile.hash),
        ("device", profile.device.name),
        ("device memory", size(profile.device.memory_bytes)),
        ("models", ", ".join(profile.models)),
        ("sources", listed(list(profile.provenance.sources))),
    ]
    if points is not None:
        facts.append(("readings from", points.name))
    facts += list(flat_items(profile.provenance.environment))
    return section(
        "Provenance",
        f"Of the {number(sum(counts.values()))} numbers in this profile, {said}.",
        markup.notes(profile.provenance.notes),
        markup.terms(facts),
    )
