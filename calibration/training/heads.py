"""Auxiliary exit heads trained on a frozen backbone, the way OPT models get their early exits.

Each head is a norm and an output matrix of its own, started from the model's final ones. The
backbone runs without gradients, so all heads learn from one pass.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy

from calibration.model.checkpoint import (
    HEADS_FILE,
    SETTINGS_FILE,
    UNKNOWN,
    Checkpoint,
    EarlyExitSettings,
    check_exits,
    open_checkpoint,
    read_settings,
    write_json,
    write_settings,
)
from calibration.model.confidence import Confidence
from calibration.model.early_exit import EarlyExitLM, load, save_tensors
from calibration.model.exit_heads import ExitHead, head_weights, new_exit_heads
from calibration.serving.prompts import tokenizer_of
from calibration.training.scoring import Windows, score
from calibration.training.text import DOMAINS, ByteTokenizer, Tokenizer, corpus
from calibration.training.thresholds import name_of
from helios_sim.errors import InputError
from helios_sim.folders import check_writable, folder_in_place

REPORT_FILE: Final = "heads.json"
_BETAS: Final = (0.9, 0.95)


@dataclass(frozen=True)
class HeadOptions:
    """How heads are trained: text, windows, iterations.

    An iteration is `rows` windows of `window_tokens` (or the model's longest); the learning rate
    falls linearly. `text_bytes` bounds the text of each domain.
    """

    domains: tuple[str, ...] = DOMAINS
    seed: int = 0
    iterations: int = 400
    rows: int = 4
    window_tokens: int = 256
    learning_rate: float = 1e-3
    text_bytes: int = 2_000_000
    held_out_positions: int = 4096

    def __post_init__(self) -> None:
        unknown = sorted(set(self.domains) - set(DOMAINS))
        if unknown or not self.domains:
            raise InputError(
                f"The domains {list(self.domains)} were given; there are "
                f"{', '.join(map(repr, DOMAINS))}.",
                "--domain",
            )
        if self.iterations < 1:
            raise InputError(
                f"{self.iterations} iterations were asked for; at least 1 is needed.",
                "--iterations",
            )


def train_heads(
    checkpoint: Path,
    exit_layers: Sequence[int],
    options: HeadOptions,
    *,
    out: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train a head for every exit before the full depth and write them beside the weights.

    Writes `exit_heads.safetensors` and `early_exit.json` into the checkpoint's folder, or into a
    copy of it at `out`. The full depth is added to `exit_layers` if it is missing. Calibration maps
    go, since they are of other heads, and with them the threshold that was chosen for what they
    say; the report tells what is replaced. Raises `InputError` for exits that the model does not
    have, heads that are there already, and a tokenizer that cannot be read.
    """
    where = device or torch.device("cpu")
    opened = open_checkpoint(checkpoint)
    layers = int(opened.config.num_hidden_layers)
    exits = check_exits(sorted({*exit_layers, layers}), layers, str(checkpoint))
    _check_target(checkpoint, opened, exits, out)
    # Exits of an earlier early_exit.json are replaced; its guard knows the full depth still.
    model = load(checkpoint, exits=exits, device=where, dtype=torch.float32)
    tokenizer = _tokenizer(model, checkpoint)
    began_s = time.perf_counter()
    heads = new_exit_heads(model.backbone, exits)
    shared = _held_out(model, tokenizer, options)
    text = {name: corpus(name, "train", max_bytes=options.text_bytes) for name in options.domains}
    tokens = [text[name].tokens(tokenizer) for name in options.domains]
    _train(model, heads, tokens, options)
    model.exit_heads = {layer: head.requires_grad_(False) for layer, head in heads.items()}
    model.heads_kind = "auxiliary"
    before = opened.settings
    confidence = _without_maps(model.confidence)
    report: dict[str, Any] = {
        "exit_layers": list(exits),
        "domains": list(options.domains),
        "iterations": options.iterations,
        "seed": options.seed,
        "seconds": round(time.perf_counter() - began_s, 3),
        "text": {name: found.facts() for name, found in text.items()},
        "held_out_nll_nats": _held_out(model, tokenizer, options),
        "held_out_nll_nats_shared_head": shared,
        "replaced": {
            "exit_layers": None if before is None else list(before.exit_layers),
            "confidence": None if before is None else _told(before.confidence),
        },
        "confidence": _told(confidence),
    }
    known = {} if before is None else before.corpus or {}
    settings = EarlyExitSettings(
        name=model.name,
        exit_layers=exits,
        heads="auxiliary",
        tokenizer=tokenizer.name,
        confidence=confidence,
        guard=model.new_guard(),
        corpus={**known, "heads": report["text"]},
    )
    _write(checkpoint, out, model.exit_heads, settings, report)
    return report


def _check_target(
    checkpoint: Path, opened: Checkpoint, exits: Sequence[int], out: Path | None
) -> None:
    """Raise `InputError` unless heads of these exits may be written, before they are trained."""
    if len(exits) == 1:
        raise InputError(
            f"Only the full depth of {exits[-1]} layers was named; name an exit before it.",
            "--exits",
        )
    if opened.settings is not None and opened.settings.heads == "auxiliary":
        raise InputError(
            f"The checkpoint has auxiliary heads for {list(opened.settings.exit_layers)} already; "
            f"remove {HEADS_FILE} and {SETTINGS_FILE} to train others.",
            str(checkpoint),
        )
    if out is None and (checkpoint / HEADS_FILE).exists():
        raise InputError(
            f"The folder holds {HEADS_FILE} already, though {SETTINGS_FILE} does not name its "
            "heads as in use; remove the file, or give --out FOLDER for a copy with new heads.",
            str(checkpoint),
        )
    if out is not None and out.exists():
        raise InputError("The folder exists already; give a new one.", str(out))
    if out is not None and out.resolve().is_relative_to(checkpoint.resolve()):
        raise InputError(
            "The folder lies within the checkpoint that is copied into it; give one outside.",
            str(out),
        )
    check_writable(out or checkpoint / HEADS_FILE)


def _without_maps(confidence: Confidence) -> Confidence:
    """Raw confidence of the same kind; a threshold on what maps say means nothing without them."""
    if not confidence.is_calibrated:
        return confidence
    return Confidence(confidence.kind)


def _told(confidence: Confidence) -> dict[str, Any]:
    """Confidence as the report tells it."""
    return {
        "kind": name_of(confidence),
        "threshold": confidence.threshold,
        "maps_sha256": confidence.maps_sha256,
    }


def _tokenizer(model: EarlyExitLM, folder: Path) -> Tokenizer:
    """The checkpoint's tokenizer: the folder's, or bytes where it says so or has 256 ids."""
    name = model.spec.tokenizer
    if name == UNKNOWN and model.spec.shape.vocab == ByteTokenizer.vocab_size:
        name = ByteTokenizer.name
    return tokenizer_of(name, folder, model.spec.shape.vocab)


def _train(
    model: EarlyExitLM,
    heads: Mapping[int, ExitHead],
    tokens: Sequence[NDArray[np.int64]],
    options: HeadOptions,
) -> None:
    window = min(options.window_tokens, model.spec.shape.max_positions)
    if min(len(part) for part in tokens) <= window:
        raise InputError(
            f"A domain's text has {min(len(part) for part in tokens)} tokens; a window takes "
            f"{window + 1}. Give more text or a shorter window."
        )
    parameters = [weight for head in heads.values() for weight in head.parameters()]
    optimiser = torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=_BETAS, weight_decay=0.0
    )
    generator = Generator(PCG64(options.seed))
    for iteration in range(options.iterations):
        batch = _draw(tokens, options.rows, window, generator).to(model.device)
        targets = batch[:, 1:].reshape(-1)
        with torch.no_grad():
            states = model.backbone.forward_dense(batch[:, :-1])
        losses = [
            cross_entropy(head(states[layer - 1]).flatten(0, 1).float(), targets)
            for layer, head in heads.items()
        ]
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * (1.0 - iteration / options.iterations)
        optimiser.step()
        optimiser.zero_grad()


def _draw(
    tokens: Sequence[NDArray[np.int64]], rows: int, window: int, generator: Generator
) -> Tensor:
    """Windows [rows, window + 1], each from a domain at random."""
    parts = []
    for domain in generator.integers(0, len(tokens), rows):
        text = tokens[int(domain)]
        start = int(generator.integers(0, len(text) - window))
        parts.append(text[start : start + window + 1])
    return torch.from_numpy(np.stack(parts))


def _held_out(
    model: EarlyExitLM, tokenizer: Tokenizer, options: HeadOptions
) -> dict[str, list[float]]:
    """Loss by exit in nats on the calibration text of each domain."""
    window = min(options.window_tokens, model.spec.shape.max_positions)
    found = {}
    for domain in options.domains:
        tokens = corpus(domain, "calibration", max_bytes=options.text_bytes).tokens(tokenizer)
        traced = max(1, window // 2)
        positions = min(options.held_out_positions, (len(tokens) - window) // traced * traced)
        scores = score(model, tokens, Windows(window, traced, positions), ())
        found[domain] = [round(float(nll), 4) for nll in scores.nll_nats.mean(0)]
    return found


def _write(
    checkpoint: Path,
    out: Path | None,
    heads: Mapping[int, ExitHead],
    settings: EarlyExitSettings,
    report: Mapping[str, Any],
) -> None:
    try:
        with nullcontext(checkpoint) if out is None else folder_in_place(out) as folder:
            if out is not None:
                mode = folder.stat().st_mode
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
                # A copy takes the mode of what it copies, which may not be written to.
                folder.chmod(mode)
            try:
                save_tensors(head_weights(heads), folder / HEADS_FILE)
                write_json(folder / REPORT_FILE, report)
                # The last one: what it names is there, and heads that it does not name are unused.
                write_settings(folder, settings)
            except BaseException:
                _take_back(folder)
                raise
    except shutil.Error as error:
        # Copying goes on after a failure: (from, to, why) of each, of which the first tells enough.
        source, _, why = error.args[0][0]
        raise InputError(
            f"{source} cannot be copied: {_short(why)}. Free some space, or give another --out.",
            str(out),
        ) from error
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The heads cannot be written: {why}.", str(out or checkpoint)) from error


def _take_back(folder: Path) -> None:
    """Remove heads that are not in effect, so that they can be trained again."""
    if not are_in_effect(folder):
        for name in (HEADS_FILE, REPORT_FILE):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)


def are_in_effect(folder: Path) -> bool:
    """Whether a checkpoint's exits go through heads of their own."""
    settings = read_settings(folder)
    return settings is not None and settings.heads == "auxiliary"


def _short(why: str) -> str:
    """What the system said of a file, without its number and the names that follow."""
    return why.partition("] ")[2].partition(": ")[0] or why
