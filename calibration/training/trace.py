"""Exit traces of checkpoints: teacher-forced on held-out text, all on the same positions.

Writes `exits.parquet`, which a profile takes as it stands, with a report of quality: perplexity,
agreement and calibration error at every exit, and how far the candidates complement each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.device import dtype_name
from calibration.model.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    open_checkpoint,
    write_json,
)
from calibration.model.confidence import ALL_DOMAINS, Confidence
from calibration.model.early_exit import load
from calibration.model.family import shape_of
from calibration.serving.prompts import shared_tokenizer
from calibration.training.exit_quality import (
    NUM_BINS,
    deep_and_early,
    early_of_deep,
    expected_calibration_error,
)
from calibration.training.scoring import PIECES, Scores, Windows, score
from calibration.training.text import DOMAINS, corpus
from calibration.training.thresholds import (
    TARGET_AGREEMENT,
    FittingOptions,
    choose_threshold,
    confidence_at_exits,
    exit_levels,
    fit_maps,
    fitting_scores,
    joined,
    name_of,
    own_domains,
)
from calibration.training.trace_report import REPORT_FILE, TRACES_SHA256, is_of, sha256_of
from helios_sim.errors import InputError
from helios_sim.exits import ExitTraces, stickiness_of, write_traces
from helios_sim.folders import check_writable, file_in_place, write_whole
from helios_sim.loop.state import NLL_UNITS_PER_NAT
from helios_sim.profile import PROFILE_FILE, TRACES_FILE
from helios_sim.runs.records import TOTALS_FILE

PAGE_FILE: Final = "trace.md"

_OF_OTHERS: Final[Mapping[str, str]] = {
    PROFILE_FILE: "a profile",
    TOTALS_FILE: "a run",
    CONFIG_FILE: "a checkpoint",
}
"""Files that tell a folder in which traces would replace what is there, or mix with it."""

DEFINITIONS: Final[Mapping[str, str]] = {
    "right": "the exit's most likely token is the text's own next token",
    "agrees": "the exit's most likely token is the one at the full depth of the same model",
    "perplexity": "exp of the mean negative log-likelihood of the text's own tokens, in nats",
    "share": "tokens that leave at the exit at the threshold: the first whose confidence reaches "
    "it, else the last",
    "stickiness": "how often a token leaves at the exit of the token before, beyond chance: 0 for "
    "independent exits, 1 for exits that hardly change",
    "calibration error": f"mean distance between confidence and share right over {NUM_BINS} bins "
    "of equal width, weighted by tokens (Guo et al. 2017)",
    "complementarity of B for A": "of the tokens that leave A at its last exit, the share that "
    "leaves B at its first one; right: of these, the share where B's exit is right",
}


@dataclass(frozen=True)
class TraceOptions:
    """Which text is traced: positions of each domain, in windows with context.

    A window's first half is context alone; None takes windows of 512 tokens, or as many as the
    smallest candidate allows. Of the calibration text no more positions are read than are traced.
    """

    num_positions: int = 16384
    window_tokens: int | None = None
    domains: tuple[str, ...] = DOMAINS
    fitting: FittingOptions = field(default_factory=FittingOptions)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.domains) - set(DOMAINS))
        if unknown or not self.domains or len(set(self.domains)) != len(self.domains):
            raise InputError(
                f"The domains {list(self.domains)} were given; name some of "
                f"{', '.join(map(repr, DOMAINS))}, none twice.",
                "--domain",
            )


@dataclass(frozen=True)
class _Candidate:
    """One checkpoint's scores by domain on trace text and on calibration text, and its type."""

    name: str
    dtype: str
    confidence: Confidence
    own: tuple[str, ...]
    traced: dict[str, Scores]
    fitted: dict[str, Scores]

    @property
    def calibrated(self) -> Confidence:
        """The same kind with maps: those it holds, or fitted on the calibration text."""
        if self.confidence.is_calibrated:
            return self.confidence
        maps = {ALL_DOMAINS: fit_maps(joined(list(self.fitted.values())), self.confidence.kind)}
        return Confidence(self.confidence.kind, self.confidence.threshold, maps)

    @property
    def raw(self) -> Confidence:
        """The same kind without maps."""
        return Confidence(self.confidence.kind, self.confidence.threshold)


def trace_checkpoints(
    folders: Sequence[Path],
    out: Path,
    options: TraceOptions | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Trace checkpoints into `out/exits.parquet` and write the report beside it.

    They compute in `dtype`, by default what is usual on the device. Confidence is what each
    checkpoint's early_exit.json says. Raises `InputError` where the
    candidates do not share a tokenizer or a name is there twice, and for a folder that is a
    profile, a run or a checkpoint. Returns the report.
    """
    chosen = options or TraceOptions()
    check_target(out)
    check_writable(out / REPORT_FILE)
    where = device or torch.device("cpu")
    opened = _check_alike(folders)
    max_positions = min(shape_of(one.config).max_positions for one in opened)
    window = chosen.window_tokens or min(512, max_positions)
    if window > max_positions:
        raise InputError(
            f"Windows of {window} tokens were asked for; the smallest candidate takes "
            f"{max_positions}.",
            "--window",
        )
    windows = Windows(window, max(1, window // 2), chosen.num_positions, PIECES)
    texts = {domain: corpus(domain, "trace") for domain in chosen.domains}
    encoder = shared_tokenizer(opened)
    tokens = {domain: text.tokens(encoder) for domain, text in texts.items()}
    candidates = [_score(folder, tokens, windows, chosen, where, dtype) for folder in folders]
    traces = _traces(candidates, chosen)
    report: dict[str, Any] = {
        "positions_by_domain": chosen.num_positions,
        "dtype": candidates[0].dtype,
        "window_tokens": window,
        "min_context_tokens": windows.min_context_tokens,
        "tokenizer": opened[0].tokenizer,
        "text": {domain: text.facts() for domain, text in texts.items()},
        "definitions": dict(DEFINITIONS),
        "candidates": {found.name: _quality(found) for found in candidates},
        "complementarity": _complementarity(candidates),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with file_in_place(out / TRACES_FILE) as partial:
            write_traces(traces, partial)
            report[TRACES_SHA256] = sha256_of(partial)
        write_whole(out / PAGE_FILE, trace_page(report).encode())
        # The last one, so that a report never stands beside traces older than itself.
        write_json(out / REPORT_FILE, report)
    except OSError as error:
        raise InputError(f"The traces cannot be written: {error.strerror}.", str(out)) from error
    return report


def traced_as_now(folders: Sequence[Path], out: Path) -> bool:
    """Whether a folder holds traces of these checkpoints' confidence as they have it now.

    Traces without a report on them are taken for theirs; those beside a report on others are not.
    """
    if not (out / TRACES_FILE).is_file():
        return False
    try:
        report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
        if not is_of(report, out / TRACES_FILE):
            return False
        traced = {
            name: (said["confidence"], said["threshold"], said.get("maps_sha256"))
            for name, said in report["candidates"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True
    for found in map(open_checkpoint, folders):
        confidence = Confidence() if found.settings is None else found.settings.confidence
        own = name_of(confidence), confidence.threshold, confidence.maps_sha256
        if traced.get(found.name, own) != own:
            return False
    return True


def check_target(out: Path) -> None:
    """Raise `InputError` for a folder that is a profile, a run or a checkpoint."""
    for name, what in _OF_OTHERS.items():
        if (out / name).exists():
            raise InputError(
                f"It holds {name}, so it is {what}, and traces would mix with what belongs to it; "
                "give a folder of their own, or one of readings.",
                str(out),
            )


def check_traceable(folders: Sequence[Path]) -> None:
    """Raise `InputError` for checkpoints that `trace_checkpoints` refuses; nothing is loaded."""
    shared_tokenizer(_check_alike(folders))


def _check_alike(folders: Sequence[Path]) -> list[Checkpoint]:
    """The candidates opened; no two have one name."""
    if not folders:
        raise InputError("No checkpoint was given; name at least one folder.")
    names: dict[str, Path] = {}
    found = [open_checkpoint(folder) for folder in folders]
    for folder, opened in zip(folders, found, strict=True):
        name = opened.name
        if name in names:
            raise InputError(
                f"Two checkpoints are named {name!r}: {names[name]} and {folder}; a trace holds "
                "each name once."
            )
        names[name] = folder
    return found


def _score(
    folder: Path,
    tokens: Mapping[str, NDArray[np.int64]],
    windows: Windows,
    options: TraceOptions,
    device: torch.device,
    dtype: torch.dtype | None,
) -> _Candidate:
    model = load(folder, device=device, dtype=dtype)
    settings = open_checkpoint(folder).settings
    kinds = (model.confidence.kind,)
    fitting = replace(
        options.fitting,
        domains=options.domains,
        num_positions=min(options.fitting.num_positions, options.num_positions),
    )
    try:
        return _Candidate(
            name=model.name,
            dtype=dtype_name(model.dtype),
            confidence=model.confidence,
            own=own_domains(settings.corpus if settings else None),
            traced={name: score(model, ids, windows, kinds) for name, ids in tokens.items()},
            fitted=fitting_scores(model, folder, fitting, kinds),
        )
    finally:
        model.unload()


def _traces(candidates: Sequence[_Candidate], options: TraceOptions) -> ExitTraces:
    def stacked(found: _Candidate, field: str) -> NDArray[Any]:
        parts: list[NDArray[Any]] = []
        for domain in options.domains:
            scores = found.traced[domain]
            if field == "confidence":
                parts.append(confidence_at_exits(scores, found.confidence))
            elif field == "agrees":
                parts.append(scores.agrees)
            else:
                # In the simulator's steps, so that its sums are exact.
                steps = np.round(scores.nll_nats.astype(np.float64) * NLL_UNITS_PER_NAT)
                parts.append((steps / NLL_UNITS_PER_NAT).astype(np.float32))
        return np.stack(parts)

    return ExitTraces(
        domains=options.domains,
        num_positions=options.num_positions,
        exit_layers={found.name: _layers(found) for found in candidates},
        confidence={found.name: stacked(found, "confidence") for found in candidates},
        agrees={found.name: stacked(found, "agrees") for found in candidates},
        nll_nats={found.name: stacked(found, "nll") for found in candidates},
        origin="trace",
    )


def _layers(found: _Candidate) -> tuple[int, ...]:
    return next(iter(found.traced.values())).exit_layers


def _quality(found: _Candidate) -> dict[str, Any]:
    """A candidate's figures by domain and exit."""
    calibrated = found.calibrated
    domains = {}
    for domain, scores in found.traced.items():
        confidence = confidence_at_exits(scores, found.confidence)
        levels = exit_levels(confidence, found.confidence.threshold)
        rows = np.arange(len(levels))
        early = levels < len(scores.exit_layers) - 1
        agrees = scores.agrees[rows, levels]
        nll = scores.nll_nats.mean(0, dtype=np.float64)
        sticks = stickiness_of(levels)
        domains[domain] = {
            "nll_nats": _rounded(nll),
            "perplexity": _rounded(np.exp(nll)),
            "right": _rounded(scores.right.mean(0)),
            "agrees": _rounded(scores.agrees.mean(0)),
            "calibration_error_raw": _errors(scores, found.raw),
            "calibration_error_calibrated": _errors(scores, calibrated),
            "share": _rounded(np.bincount(levels, minlength=len(scores.exit_layers)) / len(levels)),
            "mean_exit_layer": round(float(np.array(scores.exit_layers)[levels].mean()), 3),
            "stickiness": None if sticks is None else round(sticks, 4),
            "early_agreement": round(float(agrees[early].mean()), 4) if early.any() else None,
            "perplexity_at_own_exit": round(
                math.exp(float(scores.nll_nats[rows, levels].mean(dtype=np.float64))), 4
            ),
        }
    return {
        "exit_layers": list(_layers(found)),
        "confidence": name_of(found.confidence),
        "threshold": found.confidence.threshold,
        "maps_sha256": found.confidence.maps_sha256,
        "own_domains": list(found.own),
        "domains": domains,
    }


def _errors(scores: Scores, confidence: Confidence) -> list[float]:
    values = confidence_at_exits(scores, confidence)
    return [
        round(expected_calibration_error(values[:, level], scores.right[:, level]), 4)
        for level in range(values.shape[1])
    ]


def _complementarity(candidates: Sequence[_Candidate]) -> dict[str, Any]:
    """Raw and calibrated: the pairs' figures at a threshold chosen the same way for both."""
    found: dict[str, Any] = {}
    for variant in ("raw", "calibrated"):
        views = {
            one.name: one.calibrated if variant == "calibrated" else one.raw for one in candidates
        }
        own = {
            one.name: joined([one.fitted[name] for name in one.own if name in one.fitted]
                             or list(one.fitted.values()))
            for one in candidates
        }  # fmt: skip
        threshold = choose_threshold(
            [confidence_at_exits(own[name], views[name]) for name in views],
            [own[name].agrees for name in views],
            TARGET_AGREEMENT,
        )
        pairs = []
        for a, b in permutations(candidates, 2):
            for domain in a.traced:
                pairs.append(_pair(a, b, domain, views, threshold))
        found[variant] = {"threshold": threshold, "pairs": pairs}
    return found


def _pair(
    a: _Candidate, b: _Candidate, domain: str, views: Mapping[str, Confidence], threshold: float
) -> dict[str, Any]:
    """How far B serves early what A takes deep, in one domain."""
    levels = {
        one.name: exit_levels(confidence_at_exits(one.traced[domain], views[one.name]), threshold)
        for one in (a, b)
    }
    num_exits = len(a.traced[domain].exit_layers)
    deep, both = deep_and_early(levels[a.name], num_exits, levels[b.name])
    return {
        "deep_in": a.name,
        "early_in": b.name,
        "domain": domain,
        "deep_share": round(float(deep.mean()), 4),
        "early_of_deep": round(early_of_deep(deep, both), 4),
        "right_of_early": (
            round(float(b.traced[domain].right[both, 0].mean()), 4) if both.any() else None
        ),
    }


def _rounded(values: NDArray[Any]) -> list[float]:
    return [round(float(value), 4) for value in values]


def trace_page(report: Mapping[str, Any]) -> str:
    """The report as a short Markdown page."""
    lines = [
        "# Exit traces",
        "",
        f"{report['positions_by_domain']:,} positions of each domain, the same for every "
        f"candidate, with at least {report['min_context_tokens']} tokens of context; tokenizer "
        f"{report['tokenizer']}, computed in {report['dtype']}. The text is the split 'trace', "
        "which no model was trained or calibrated on.",
        "",
        *(f"- *{name}*: {text}." for name, text in report["definitions"].items()),
        "",
        "| candidate | domain | exit | perplexity | nats | right | agrees | error raw | "
        "error calibrated | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in report["candidates"].items():
        for domain, figures in found["domains"].items():
            own = " (own)" if domain in found["own_domains"] else ""
            for level, layer in enumerate(found["exit_layers"]):
                lines.append(
                    f"| {name} | {domain}{own} | L{layer} | {figures['perplexity'][level]:.3f} | "
                    f"{figures['nll_nats'][level]:.3f} | {figures['right'][level]:.1%} | "
                    f"{figures['agrees'][level]:.1%} | "
                    f"{figures['calibration_error_raw'][level]:.3f} | "
                    f"{figures['calibration_error_calibrated'][level]:.3f} | "
                    f"{figures['share'][level]:.1%} |"
                )
    lines += [
        "",
        "| candidate | confidence | threshold | domain | mean exit layer | stickiness "
        "| early tokens that agree | perplexity at own exit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in report["candidates"].items():
        for domain, figures in found["domains"].items():
            agreement, sticks = figures["early_agreement"], figures["stickiness"]
            lines.append(
                f"| {name} | {found['confidence']} | {found['threshold']:g} | {domain} | "
                f"{figures['mean_exit_layer']:.2f} | "
                f"{'all alike' if sticks is None else f'{sticks:.2f}'} | "
                f"{'none leave' if agreement is None else f'{agreement:.1%}'} | "
                f"{figures['perplexity_at_own_exit']:.3f} |"
            )
    for variant, found in report["complementarity"].items():
        lines += [
            "",
            f"Complementarity, {variant} confidence, threshold {found['threshold']:g} (the lowest "
            f"at which each candidate's early tokens agree in {TARGET_AGREEMENT:.0%} of cases on "
            "its own domains' calibration text):",
            "",
            "| domain | deep in A | early in B | tokens deep in A | of these early in B | of those "
            "right |",
            "|---|---|---|---|---|---|",
        ]
        for pair in found["pairs"]:
            right = pair["right_of_early"]
            lines.append(
                f"| {pair['domain']} | {pair['deep_in']} | {pair['early_in']} | "
                f"{pair['deep_share']:.1%} | {pair['early_of_deep']:.1%} | "
                f"{'none' if right is None else f'{right:.1%}'} |"
            )
    return "\n".join(lines) + "\n"
