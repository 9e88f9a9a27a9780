"""What every candidate at full depth says of the text that was served, after the run.

While serving, a token that leaves early never meets the full model, so whether the two agree is
unknown until the text is read again, teacher-forced and outside the clock. The same reading gives
exit traces of exactly the served tokens: a simulation on them has no exit left to guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.model.early_exit import EarlyExitLM
from calibration.serving.batching import Life, Rule
from calibration.serving.record import Judgement
from calibration.serving.tally import TokenEntry
from calibration.training.scoring import MAX_LOGITS
from helios_sim.exits import ExitTraces
from helios_sim.policy.rules import leaves_here

_BATCH_TOKENS: Final = 4096
"""Tokens of requests that are read again together, short ones' padding included."""


@dataclass(frozen=True)
class Reread:
    """One candidate's word on every output position of the requests, concatenated by request.

    Arrays are [positions, exits]; `first` is each request's first position.
    """

    tokens: NDArray[np.int32]
    confidence: NDArray[np.float32]
    nll_nats: NDArray[np.float32]
    first: NDArray[np.int64]


def sequence(life: Life, free_running: bool) -> list[int]:
    """The tokens a request went through: its true text, or its prompt and what it emitted."""
    if free_running:
        return life.text[: life.prompt_tokens] + life.emitted
    return life.text[: life.prompt_tokens + life.generated]


@torch.inference_mode()
def reread(model: EarlyExitLM, lives: Sequence[Life], free_running: bool) -> Reread:
    """Read what was served again with a whole model, several requests of like length at once.

    A model says nothing of requests beyond its context, which it would refuse: zeros stay. Heads
    take as many positions at once as logits are allowed, so that a large vocabulary takes no more
    memory than a small one.
    """
    most = max(1, MAX_LOGITS // model.spec.shape.vocab)
    counts = np.array([life.generated for life in lives], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    shape = (int(counts.sum()), len(model.exit_layers))
    tokens = np.zeros(shape, np.int32)
    confidence = np.zeros(shape, np.float32)
    nll = np.zeros(shape, np.float32)
    texts = {
        life.request_id: sequence(life, free_running)
        for life in lives
        if life.generated
        and life.prompt_tokens + life.output_tokens <= model.backbone.max_positions
    }
    for group in _groups(texts):
        width = max(len(texts[name]) for name in group)
        ids = torch.zeros((len(group), width), dtype=torch.int64)
        for place, name in enumerate(group):
            ids[place, : len(texts[name])] = torch.tensor(texts[name])
        ids = ids.to(model.device)
        states = model.backbone.forward_dense(ids)
        places = [
            (place, position)
            for place, name in enumerate(group)
            for position in range(len(texts[name]) - int(counts[name]) - 1, len(texts[name]) - 1)
        ]
        rows = torch.tensor(places, device=model.device)
        targets = ids[rows[:, 0], rows[:, 1] + 1]
        where = np.concatenate([np.arange(first[n], first[n] + counts[n]) for n in group])
        for level, layer in enumerate(model.exit_layers):
            hidden = states[layer - 1][rows[:, 0], rows[:, 1]]
            for begin in range(0, len(rows), most):
                piece = slice(begin, begin + most)
                decided = model.decide(model.logits(hidden[piece], level), level)
                tokens[where[piece], level] = decided.tokens.cpu().numpy()
                confidence[where[piece], level] = decided.confidence.float().cpu().numpy()
                nll[where[piece], level] = decided.nll(targets[piece]).cpu().numpy()
    return Reread(tokens, np.clip(confidence, 0.0, 1.0), np.maximum(nll, 0.0), first)


def judge(
    reread_by: Mapping[str, Reread],
    lives: Sequence[Life],
    log: Sequence[TokenEntry],
    thresholds: Mapping[str, float],
    domains: Sequence[int],
    recomputed_kv: bool = False,
    leaves: Rule = leaves_here,
) -> Judgement:
    """Agreement and relative breaches of the logged tokens, and each request's trace place.

    A token that the whole model gave agrees with it, whatever other kernels make of it later: one
    of the last exit over KV that no exit skipped. Filled KV (unless `recomputed_kv`) is not the
    whole model's, and tokens of the last exit over it are compared like all others. A breach is
    relative where a deeper exit's confidence would have let the token leave, by the rule `leaves`.
    """
    agrees = np.zeros(len(log), np.bool_)
    relative = np.zeros(len(log), np.bool_)
    skipped: set[int] = set()
    num_whole = num_reread_otherwise = 0
    for row, one in enumerate(log):
        found = reread_by[one.model]
        at = found.first[one.request_id] + one.place
        agrees[row] = found.tokens[at, -1] == one.token
        is_last = one.level == found.tokens.shape[1] - 1
        if one.prefilled:
            skipped.discard(one.request_id)
        elif not is_last and not recomputed_kv:
            skipped.add(one.request_id)
        if is_last and one.request_id not in skipped:
            num_whole += 1
            num_reread_otherwise += not agrees[row]
            agrees[row] = True
        if one.breached:
            deeper = found.confidence[at, one.level + 1 :]
            relative[row] = any(leaves(float(sure), thresholds[one.model]) for sure in deeper)
    starts = np.zeros(len(lives), np.int64)
    filled: dict[int, int] = {}
    for life, domain in zip(lives, domains, strict=True):
        starts[life.request_id] = filled.get(domain, 0)
        filled[domain] = filled.get(domain, 0) + life.generated
    return Judgement(agrees, relative, starts, num_whole, num_reread_otherwise)


def served_traces(
    reread_by: Mapping[str, Reread],
    exit_layers: Mapping[str, tuple[int, ...]],
    lives: Sequence[Life],
    domains: Sequence[int],
    names: Sequence[str],
) -> ExitTraces:
    """Exit traces of the served tokens, request after request in each domain.

    Domains of fewer tokens than the longest are repeated to its length; a domain without any
    holds zeros, and agrees.
    """
    sizes = [0] * len(names)
    for life, domain in zip(lives, domains, strict=True):
        sizes[domain] += life.generated
    length = max(1, *sizes)
    places = []
    for domain in range(len(names)):
        mine = [
            np.arange(life.generated) + next(iter(reread_by.values())).first[life.request_id]
            for life, its in zip(lives, domains, strict=True)
            if its == domain
        ]
        places.append(np.concatenate(mine) if sizes[domain] else np.zeros(0, np.int64))

    def shaped(values: NDArray[np.generic], empty: float = 0.0) -> NDArray[np.generic]:
        table = np.full((len(names), length, values.shape[1]), empty, values.dtype)
        for domain, rows in enumerate(places):
            if len(rows):
                table[domain] = values[np.resize(rows, length)]
        return table

    return ExitTraces(
        domains=tuple(names),
        num_positions=length,
        exit_layers=dict(exit_layers),
        confidence={n: shaped(found.confidence) for n, found in reread_by.items()},  # type: ignore[misc]
        agrees={
            n: shaped(found.tokens == found.tokens[:, -1:], True)  # type: ignore[misc]
            for n, found in reread_by.items()
        },
        nll_nats={n: shaped(found.nll_nats) for n, found in reread_by.items()},  # type: ignore[misc]
        origin="trace",
    )


def _groups(texts: Mapping[int, list[int]]) -> Iterator[list[int]]:
    """Requests by length, as many at once as the tokens allow."""
    group: list[int] = []
    for name in sorted(texts, key=lambda one: (len(texts[one]), one)):
        if group and (len(group) + 1) * len(texts[name]) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(name)
    if group:
        yield group
