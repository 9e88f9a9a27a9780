"""Confidence fitted on held-out text: a calibration per exit, and the threshold of a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from calibration.model.checkpoint import SETTINGS_FILE, open_checkpoint, update_settings
from calibration.model.confidence import ALL_DOMAINS, KINDS, Confidence, Kind, PiecewiseLinear
from calibration.model.early_exit import EarlyExitLM, load
from calibration.serving.prompts import tokenizer_of
from calibration.training.scoring import PIECES, Scores, Windows, score
from calibration.training.text import DOMAINS, corpus
from helios_sim.errors import InputError
from helios_sim.folders import check_writable
from helios_sim.policy.rules import leaves_here
from helios_sim.profiles.parsing import CONFIDENCE_KINDS

CALIBRATED: Final = "calibrated-"
TARGET_AGREEMENT: Final = 0.9
"""Early tokens that equal the full model's, at the threshold that is chosen by default."""

_MAX_KNOTS: Final = 64
_MIN_TOKENS_PER_KNOT: Final = 32
_THRESHOLDS: Final = np.round(np.arange(0.0, 1.0, 0.01), 2)

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


def kind_of(name: str, option: str = "--kind") -> tuple[Kind, bool]:
    """A profile's confidence kind as (raw kind, calibrated); `option` is where it was given."""
    raw = name.removeprefix(CALIBRATED)
    for kind in KINDS:
        if kind == raw and name in CONFIDENCE_KINDS:
            return kind, name != raw
    raise InputError(
        f"The confidence kind {name!r} is unknown; allowed are {', '.join(CONFIDENCE_KINDS)}.",
        option,
    )


def check_choice(threshold: float | None, target_agreement: float) -> None:
    """Raise `InputError` for a threshold or a target agreement that none can be."""
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise InputError(f"The threshold {threshold} was given; it lies in 0 to 1.", "--threshold")
    if not 0.0 < target_agreement <= 1.0:
        raise InputError(
            f"A target agreement of {target_agreement} was given; it lies above 0 and up to 1.",
            "--target-agreement",
        )


def name_of(confidence: Confidence) -> str:
    """The kind as profiles and traces name it."""
    return (CALIBRATED if confidence.is_calibrated else "") + confidence.kind


def fit_map(confidence: Floats, right: Flags) -> PiecewiseLinear:
    """The isotonic map of confidence [tokens] to the probability that the token is right.

    Tokens are averaged in bins of equal count first, so that no knot rests on a handful of them.
    """
    order = np.argsort(confidence, kind="stable")
    bins = min(_MAX_KNOTS, max(1, len(order) // _MIN_TOKENS_PER_KNOT))
    groups = np.array_split(order, bins)
    x = np.array([confidence[group].mean(dtype=np.float64) for group in groups])
    y = np.array([right[group].mean(dtype=np.float64) for group in groups])
    weight = np.array([len(group) for group in groups], dtype=np.float64)
    # Bins of one confidence, as exits say it, are one knot: a map has one value there.
    knots, where = np.unique(x.astype(np.float32), return_inverse=True)
    total = np.bincount(where, weights=weight)
    mean = np.bincount(where, weights=weight * y) / total
    rising = isotonic_regression(mean, weights=total).x
    clip = [tuple(float(v) for v in np.clip(values, 0.0, 1.0)) for values in (knots, rising)]
    return PiecewiseLinear(*clip)


def fit_maps(scores: Scores, kind: Kind) -> dict[int, PiecewiseLinear]:
    """One map an exit, of the scores of a text that was not trained on.

    "Right" is the token of the text, not the full model's: only that compares between models.
    """
    return {
        layer: fit_map(scores.confidence[kind][:, level], scores.right[:, level])
        for level, layer in enumerate(scores.exit_layers)
    }


def confidence_at_exits(scores: Scores, confidence: Confidence) -> Floats:
    """Confidence [positions, exits] in [0, 1], calibrated where maps are held."""
    raw = scores.confidence[confidence.kind]
    columns = []
    for level, layer in enumerate(scores.exit_layers):
        column = torch.from_numpy(np.ascontiguousarray(raw[:, level]))
        found = confidence.map_of(layer)
        columns.append((column if found is None else found.of_tensor(column)).numpy())
    return np.asarray(np.clip(np.stack(columns, axis=-1), 0.0, 1.0), dtype=np.float32)


def exit_levels(confidence: Floats, threshold: float) -> NDArray[np.intp]:
    """The exit each position leaves at: the first that suffices, else the last."""
    # In double precision, as the simulator's compiled rule compares.
    leaves = np.asarray(leaves_here(confidence.astype(np.float64), threshold)).copy()  # type: ignore[arg-type]
    leaves[:, -1] = True
    return np.asarray(np.argmax(leaves, axis=-1))


def early_agreement(confidence: Floats, agrees: Flags, threshold: float) -> float:
    """Share of the tokens leaving before the full depth that equal the full model's; 1 if none."""
    levels = exit_levels(confidence, threshold)
    early = np.flatnonzero(levels < confidence.shape[1] - 1)
    return float(agrees[early, levels[early]].mean()) if len(early) else 1.0


def choose_threshold(
    confidence: Sequence[Floats], agrees: Sequence[Flags], target_agreement: float
) -> float:
    """The lowest threshold at which early tokens of every candidate agree often enough.

    A family has one threshold, so the candidate that needs the highest decides.
    """
    for threshold in _THRESHOLDS:
        found = (
            early_agreement(own, flags, float(threshold))
            for own, flags in zip(confidence, agrees, strict=True)
        )
        if all(share >= target_agreement for share in found):
            return float(threshold)
    return 1.0


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of several texts as those of one."""
    first = parts[0]
    return Scores(
        first.exit_layers,
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.predicted for part in parts]),
        np.concatenate([part.nll_nats for part in parts]),
        {
            kind: np.concatenate([part.confidence[kind] for part in parts])
            for kind in first.confidence
        },
    )


@dataclass(frozen=True)
class FittingOptions:
    """Text that confidence is fitted on: positions of each domain, in windows with context."""

    num_positions: int = 8192
    window_tokens: int = 256
    domains: tuple[str, ...] = DOMAINS


def fitting_scores(
    model: EarlyExitLM, folder: Path, options: FittingOptions, kinds: Sequence[Kind]
) -> dict[str, Scores]:
    """A model's scores on the calibration text of each domain."""
    tokenizer = tokenizer_of(model.spec.tokenizer, folder, model.spec.shape.vocab)
    window = min(options.window_tokens, model.spec.shape.max_positions)
    windows = Windows(window, max(1, window // 2), options.num_positions, PIECES)
    found = {}
    for domain in options.domains:
        text = corpus(domain, "calibration")
        found[domain] = score(model, text.tokens(tokenizer), windows, kinds)
    return found


def own_domains(corpus_facts: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Domains that a checkpoint or else its heads were trained on; all where it does not say."""
    facts = corpus_facts or {}
    trained = facts.get("train") or facts.get("heads") or {}
    return tuple(domain for domain in DOMAINS if domain in trained) or DOMAINS


def settle(
    folders: Sequence[Path],
    *,
    kind: str = "max-softmax",
    threshold: float | None = None,
    target_agreement: float = TARGET_AGREEMENT,
    device: torch.device | None = None,
    options: FittingOptions | None = None,
) -> dict[str, Any]:
    """Fit confidence on calibration text and write it into every checkpoint's early_exit.json.

    A calibrated kind gets its maps (pooled over the domains, since a server does not know the
    domain). The threshold is one for all candidates: the given one, or the lowest at which the
    early tokens of each agree with its full model in `target_agreement` of cases on the domains
    it was trained on. Returns what was chosen and what it rests on.
    """
    raw, calibrated = kind_of(kind)
    check_choice(threshold, target_agreement)
    for folder in folders:
        check_writable(folder / SETTINGS_FILE)
    where = device or torch.device("cpu")
    chosen = options or FittingOptions()
    settings, maps, confidences, agrees = {}, {}, [], []
    for folder in folders:
        model = load(folder, device=where)
        found = fitting_scores(model, folder, chosen, (raw,))
        opened = open_checkpoint(folder).settings
        if opened is None:
            raise InputError("The checkpoint has no early_exit.json after loading.", str(folder))
        settings[folder] = opened
        pooled = joined(list(found.values()))
        maps[folder] = {ALL_DOMAINS: fit_maps(pooled, raw)} if calibrated else {}
        own = [found[name] for name in own_domains(opened.corpus) if name in found]
        scores = joined(own or list(found.values()))
        confidences.append(confidence_at_exits(scores, Confidence(raw, 0.5, maps[folder])))
        agrees.append(scores.agrees)
        model.unload()
    level = threshold
    if level is None:
        level = choose_threshold(confidences, agrees, target_agreement)
    for folder in folders:
        try:
            update_settings(folder, confidence=Confidence(raw, level, maps[folder]))
        except OSError as error:
            raise InputError(
                f"The confidence cannot be stored there: {error.strerror}. Checkpoints before it "
                "have theirs; make the folder writable, or free some space, and call again.",
                str(folder),
            ) from error
    return {
        "kind": kind,
        "threshold": level,
        "target_agreement": None if threshold is not None else target_agreement,
        "positions_by_domain": chosen.num_positions,
        "text_sha256": {name: corpus(name, "calibration").sha256 for name in chosen.domains},
        "early_agreement": {
            settings[folder].name: round(early_agreement(c, a, level), 4)
            for folder, c, a in zip(folders, confidences, agrees, strict=True)
        },
        "early_share": {
            settings[folder].name: round(float((exit_levels(c, level) < c.shape[1] - 1).mean()), 4)
            for folder, c in zip(folders, confidences, strict=True)
        },
    }
