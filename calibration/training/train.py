"""Training of one early-exit Llama model of bytes on text the interpreter ships.

Norm and head are shared by all exits (LayerSkip, arXiv 2404.16710). Every iteration adds the loss
of one early exit, in turn, to the loss at full depth, so that each exit learns to predict.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.random import PCG64, Generator, SeedSequence
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from calibration.model.checkpoint import WEIGHTS_FILE, EarlyExitSettings, write_json
from calibration.model.early_exit import EarlyExitLM, from_stock, save
from calibration.model.family import Backbone, LlamaBackbone, backbone_of
from calibration.model.kv import to_device
from calibration.training.optimiser import Optimiser
from calibration.training.presets import ModelPlan, Preset
from calibration.training.scoring import Windows, score
from calibration.training.text import DOMAINS, ByteTokenizer, Corpus, corpus
from helios_sim.errors import InputError
from helios_sim.folders import folder_in_place

TRAINING_FILE: Final = "training.json"
"""What a model's folder says of its training."""

_WARM_UP: Final = 0.03
_LAST_LEARNING_RATE: Final = 0.02
_GRADIENT_NORM: Final = 1.0
_WEIGHT_DECAY: Final = 0.1
_READING_INTERVAL_S: Final = 1.0
_CLOCK_LEAD: Final = 0.05

# Wide enough that the signals of narrow layers survive; the usual 0.02 suits widths of thousands.
_EMBEDDING_STD: Final = 0.5
_MATRIX_STD_ROOT_WIDTH: Final = 0.6


@dataclass(frozen=True)
class Reading:
    """How far a training is: losses in nats of the latest iteration."""

    model: str
    iteration: int
    progress: float
    seconds: float
    tokens: int
    loss: float
    early_loss: float
    early_layer: int
    learning_rate: float


def train_model(
    plan: ModelPlan,
    preset: Preset,
    out: Path,
    *,
    seed: int,
    device: torch.device,
    budget_s: float,
    on_reading: Callable[[Reading], None],
) -> dict[str, Any]:
    """Train one model and write its folder `out/<name>`, whole or not at all.

    Returns what `training.json` in that folder says. A folder that is there already is kept if it
    was trained alike, and otherwise an `InputError`. Raises `InputError` where training diverges.
    """
    texts = {
        domain: corpus(
            domain,
            "train",
            max_bytes=preset.max_train_bytes,
            min_bytes=4 * preset.long_window_tokens,
            packages=preset.packages,
        )
        for domain in plan.domains
    }
    target = out / plan.name
    alike = _fingerprint(plan, preset, seed, texts)
    finished = _finished(target, alike)
    if finished is not None:
        return finished
    began_s = time.perf_counter()
    torch.manual_seed(_seed_of(seed, plan.name, "weights"))
    backbone = backbone_of(_new_model(plan, preset.long_window_tokens))
    backbone.model.to(device)
    if device.type == "cuda" and isinstance(backbone, LlamaBackbone):
        # Norms of single precision in many kernels take a GPU as long as its products do.
        backbone.fuse_norms()
    last, num_by_clock = _train(backbone, plan, preset, texts, seed, device, budget_s, on_reading)
    stock = backbone.model.eval().requires_grad_(False)
    if device.type == "cuda":
        stock = stock.to(torch.bfloat16)
    model = from_stock(stock, plan.exit_layers, name=plan.name, tokenizer=ByteTokenizer.name)
    document: dict[str, Any] = {
        "name": plan.name,
        "settings": alike,
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": sum(weight.numel() for weight in stock.parameters()),
        "iterations": last.iteration,
        "ended_by": "iterations" if last.iteration >= preset.iterations else "budget",
        "iterations_by_clock": num_by_clock,
        "tokens": last.tokens,
        "seconds": round(time.perf_counter() - began_s, 3),
        "text": {domain: text.facts() for domain, text in texts.items()},
    }
    document["held_out"] = held_out(model, preset)
    settings = EarlyExitSettings(
        plan.name,
        plan.exit_layers,
        tokenizer=ByteTokenizer.name,
        corpus={"train": document["text"]},
    )
    try:
        with folder_in_place(target) as draft:
            save(model, draft, settings)
            weights = (draft / WEIGHTS_FILE).read_bytes()
            document["weights_sha256"] = hashlib.sha256(weights).hexdigest()
            write_json(draft / TRAINING_FILE, document)
    except OSError as error:
        raise InputError(
            f"The model {plan.name} cannot be written: {error.strerror}. Free some space or give "
            "another folder; the readings of its training are kept.",
            where=str(out),
        ) from error
    return document


def held_out(model: EarlyExitLM, preset: Preset) -> dict[str, Any]:
    """Loss and accuracy at every exit on text of every domain that was not trained on.

    The text is the split that confidence is fitted on, so that nothing of the traces is seen.
    """
    found = {}
    for domain in DOMAINS:
        tokens = corpus(domain, "calibration", max_bytes=preset.held_out_tokens).tokens()
        window = preset.long_window_tokens // 2
        traced = window // 2
        positions = (len(tokens) - window) // traced * traced
        scores = score(model, tokens, Windows(window, traced, positions))
        found[domain] = {
            "positions": positions,
            "nll_nats": [round(float(nll), 4) for nll in scores.nll_nats.mean(0)],
            "accuracy": [round(float(share), 4) for share in scores.right.mean(0)],
        }
    return found


def _new_model(plan: ModelPlan, max_positions: int) -> LlamaForCausalLM:
    """A stock model with fresh weights; drawn on the CPU, so that a seed means the same there."""
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=plan.hidden,
        num_hidden_layers=plan.layers,
        intermediate_size=plan.ffn,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    # Each layer adds twice to the stream, so its outputs start smaller the deeper the model is.
    small = 1.0 / math.sqrt(2 * plan.layers)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            std = _MATRIX_STD_ROOT_WIDTH / math.sqrt(plan.hidden)
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, 0.0, std * small if is_output else std)
        elif "embed_tokens" in name:
            nn.init.normal_(weight, 0.0, _EMBEDDING_STD)
    return model


def _train(
    backbone: Backbone,
    plan: ModelPlan,
    preset: Preset,
    texts: Mapping[str, Corpus],
    seed: int,
    device: torch.device,
    budget_s: float,
    on_reading: Callable[[Reading], None],
) -> tuple[Reading, int]:
    """Run the iterations; returns the last reading, and how many had the clock set their rate."""
    named = list(backbone.model.named_parameters())
    in_layers = {name for name, weight in named if ".layers." in name and weight.dim() == 2}
    optimiser = Optimiser(
        [weight for name, weight in named if name in in_layers],
        [weight for name, weight in named if name not in in_layers],
        _WEIGHT_DECAY,
    )
    draw = _Windows(plan, texts, Generator(PCG64(_seed_of(seed, plan.name, "windows"))), device)
    early_layers = plan.exit_layers[:-1]
    began_s = read_s = time.perf_counter()
    tokens = num_by_clock = 0
    for iteration in range(1, preset.iterations + 1):
        spent = (time.perf_counter() - began_s) / budget_s
        progress = (iteration - 1) / preset.iterations
        # The clock counts only where it is clearly ahead: else a seed would not repeat itself.
        if spent > progress + _CLOCK_LEAD:
            progress = spent
            num_by_clock += 1
        share = preset.long_share
        is_long = math.floor(iteration * share) > math.floor((iteration - 1) * share)
        batch = (
            draw(preset.long_rows, preset.long_window_tokens)
            if is_long
            else draw(preset.rows, preset.window_tokens)
        )
        early_layer = early_layers[iteration % len(early_layers)] if early_layers else plan.layers
        early_loss, loss = _losses(backbone, batch, (early_layer, plan.layers))
        total = loss + preset.early_weight * early_loss
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(optimiser.parameters, _GRADIENT_NORM)
        learning_rate = preset.learning_rate * _schedule(progress)
        optimiser.update(learning_rate)
        tokens += batch.shape[0] * (batch.shape[1] - 1)
        now_s = time.perf_counter()
        ends = iteration == preset.iterations or now_s - began_s >= budget_s
        # A reading waits for the device, so it is not taken at every iteration.
        if not ends and now_s - read_s < _READING_INTERVAL_S:
            continue
        read_s = now_s
        reading = Reading(
            model=plan.name,
            iteration=iteration,
            progress=round(max(iteration / preset.iterations, (now_s - began_s) / budget_s), 4),
            seconds=round(now_s - began_s, 3),
            tokens=tokens,
            loss=round(loss.item(), 4),
            early_loss=round(early_loss.item(), 4),
            early_layer=early_layer,
            learning_rate=learning_rate,
        )
        on_reading(reading)
        if not math.isfinite(reading.loss):
            raise InputError(
                f"The training of {plan.name} diverged: its loss was {reading.loss} at iteration "
                f"{iteration}. Give another seed.",
                where=plan.name,
            )
        if ends:
            return reading, num_by_clock
    raise AssertionError("the last iteration ends the training")


def _losses(backbone: Backbone, batch: Tensor, layers: tuple[int, int]) -> list[Tensor]:
    """Mean cross entropies in nats at some layers, of windows [rows, tokens + 1]."""
    targets = batch[:, 1:].reshape(-1)
    on_gpu = batch.is_cuda
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=on_gpu):
        states = backbone.forward_dense(batch[:, :-1])
        logits = [backbone.head(backbone.final_norm(states[layer - 1])) for layer in layers]
    return [cross_entropy(exit.flatten(0, 1).float(), targets) for exit in logits]


def _schedule(progress: float) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to a small rest."""
    warm = min(1.0, (progress + 1e-3) / _WARM_UP)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm * (_LAST_LEARNING_RATE + (1.0 - _LAST_LEARNING_RATE) * cosine)


class _Windows:
    """Draws windows of the domains' texts, each row from a domain by its share."""

    def __init__(
        self,
        plan: ModelPlan,
        texts: Mapping[str, Corpus],
        generator: Generator,
        device: torch.device,
    ) -> None:
        parts = [np.frombuffer(texts[domain].data, dtype=np.uint8) for domain in plan.domains]
        self._lengths = np.array([len(part) for part in parts])
        self._offsets = np.cumsum(self._lengths) - self._lengths
        shares = np.array(list(plan.domains.values()), dtype=np.float64)
        self._shares = shares / shares.sum()
        self._text = torch.from_numpy(np.concatenate(parts)).to(device)
        self._generator = generator

    def __call__(self, rows: int, window_tokens: int) -> Tensor:
        """Token ids [rows, window_tokens + 1]."""
        domains = self._generator.choice(len(self._shares), size=rows, p=self._shares)
        room = self._lengths[domains] - window_tokens
        starts = self._offsets[domains] + self._generator.integers(0, room)
        where = to_device(starts[:, None] + np.arange(window_tokens + 1), self._text.device)
        return self._text[where].long()


def _seed_of(seed: int, *names: str) -> int:
    """The seed of a named stream."""
    key = zlib.crc32("/".join(names).encode())
    return int(SeedSequence([seed, key]).generate_state(1)[0])


def _fingerprint(
    plan: ModelPlan, preset: Preset, seed: int, texts: Mapping[str, Corpus]
) -> dict[str, Any]:
    """All that decides what is trained: two trainings that share it are alike."""
    settings = {key: value for key, value in asdict(preset).items() if key != "models"}
    document = {
        "plan": asdict(plan),
        "preset": settings,
        "seed": seed,
        "text_sha256": {domain: text.sha256 for domain, text in texts.items()},
    }
    # Through JSON and back, so that it equals what a file holds.
    found: dict[str, Any] = json.loads(json.dumps(document))
    return found


def _finished(target: Path, alike: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a folder that is already there says, if it was trained alike."""
    if not target.exists():
        return None
    try:
        document: Any = json.loads((target / TRAINING_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict) or document.get("settings") != alike:
        raise InputError(
            "The folder exists and was not made by a training with these settings and this "
            "text; remove it or give another --out.",
            where=str(target),
        )
    return document
