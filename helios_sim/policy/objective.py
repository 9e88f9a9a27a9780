"""What a candidate is worth at a depth: predictions from its card and its last evaluation."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, get_args

from helios_sim.errors import InputError
from helios_sim.policy.contract import (
    Candidate,
    ExitMode,
    Objective,
    Policy,
    Slo,
    Telemetry,
)
from helios_sim.policy.history import mean_executed_layers

OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)


def objective_of(policy: Policy) -> str:
    """What a policy strives for; "none" for one that does not choose."""
    return str(getattr(getattr(policy, "settings", policy), "objective", "none"))


def interpolate(points: Sequence[int], values: Sequence[float], at: float) -> float:
    """`values` at ascending `points` read at any place: linear between them, held outside."""
    place = bisect_left(points, at)
    if place == 0:
        return values[0]
    if place == len(points):
        return values[-1]
    low, high = points[place - 1], points[place]
    share = (at - low) / (high - low)
    return values[place - 1] + share * (values[place] - values[place - 1])


def read_card(
    candidate: Candidate, table: Sequence[Sequence[float]], layers: float, batch: float
) -> float:
    """A table of a card, by exit level and batch, read at any number of layers and any batch."""
    by_level = [interpolate(candidate.batches, row, batch) for row in table]
    return interpolate(candidate.exit_layers, by_level, layers)


def iteration_s(
    candidate: Candidate,
    level: int,
    batch: float,
    exit_mode: ExitMode = ExitMode.LOADED_DEPTH,
) -> float:
    """Seconds of a decode iteration of so many rows to `level`, by the card.

    Where tokens leave early all layers are loaded; else those up to `level`.
    """
    return interpolate(candidate.batches, _seconds_of(candidate, exit_mode)[level], batch)


def _seconds_of(candidate: Candidate, exit_mode: ExitMode) -> Sequence[Sequence[float]]:
    exiting_s = candidate.exiting_iteration_s if exit_mode.leaves_early else ()
    return exiting_s or candidate.decode_iteration_s


def slowdown(candidate: Candidate, evaluation: Telemetry | None) -> float:
    """The measured pace of decoding over the card's at its layers and rows; 1 where none is known.

    What asking exits and filling KV take is in both. What a response spends beside its own
    iterations, while prompts of others are prefilled or it waits, says nothing of the candidate.
    """
    pace = None if evaluation is None else evaluation.pace
    if evaluation is None or pace is None:
        return 1.0
    table = _seconds_of(candidate, evaluation.assignment.exit_mode)
    card_s = read_card(candidate, table, pace.layers, pace.rows)
    return pace.token_s / card_s if card_s > 0 else 1.0


def predicted_tpot_s(candidate: Candidate, level: int, evaluation: Telemetry | None) -> float:
    """Seconds per output token when every token leaves at `level` and little is to be done."""
    card_s = iteration_s(candidate, level, candidate.reference_batch)
    return card_s * slowdown(candidate, evaluation)


def prompt_share_s(candidate: Candidate, level: int) -> float:
    """Seconds of its request's prefill that fall to an output token; 0 where lengths are unknown.

    Decoding rows stand still meanwhile, so these seconds are shared with nobody.
    """
    tokens = candidate.typical_output_tokens
    return candidate.prefill_s[level] / tokens if tokens else 0.0


def predicted_token_s(
    candidate: Candidate, level: int, evaluation: Telemetry | None, batch: int
) -> float:
    """Seconds of the replica that a token takes where `batch` rows leave at `level` together."""
    card_s = iteration_s(candidate, level, batch) / batch + prompt_share_s(candidate, level)
    return card_s * slowdown(candidate, evaluation)


def predicted_ttft_s(candidate: Candidate, level: int, evaluation: Telemetry | None) -> float:
    """Seconds to the first token at `level`, without queueing.

    The measured TTFT is not used: it holds the time its requests waited for the candidate to be
    brought in, so it would rank candidates by the order of their evaluation.
    """
    return candidate.prefill_s[level] * slowdown(candidate, evaluation)


def predicted_token_j(candidate: Candidate, level: int, evaluation: Telemetry | None) -> float:
    """Joules per output token when every token leaves at `level` and little is to be done."""
    card_j = candidate.decode_iteration_j
    if card_j is None:
        raise InputError(
            f"The objective 'energy' compares joules, and none are known of {candidate.name!r}: "
            "its profile was made without an energy meter. Choose another objective, or a profile "
            "whose energy was measured."
        )
    batch = candidate.reference_batch
    predicted_j = interpolate(candidate.batches, card_j[level], batch) / batch
    working_j = None if evaluation is None else evaluation.working_energy_j
    # A meter too coarse for so short a time has counted nothing, which is no price.
    if evaluation is not None and evaluation.num_tokens and working_j:
        layers = mean_executed_layers(evaluation)
        rows = max(1.0, evaluation.mean_batch)
        if layers is not None:
            exits_active = evaluation.assignment.exit_mode.leaves_early
            ran_j = (exits_active and candidate.exiting_iteration_j) or card_j
            at_measured_j = read_card(candidate, ran_j, layers, rows) / rows
            if at_measured_j > 0:
                measured_j = working_j / evaluation.num_tokens
                return measured_j * (predicted_j / at_measured_j)
    return predicted_j


def memory_bytes(candidate: Candidate, level: int) -> int:
    """Weights at `level` and the KV cache of the reference batch of typical requests."""
    kv_tokens = candidate.typical_tokens * candidate.reference_batch
    return candidate.weight_bytes[level] + candidate.kv_bytes_per_token[level] * kv_tokens


def score(
    objective: Objective,
    candidate: Candidate,
    level: int,
    evaluation: Telemetry | None,
    max_batch: int,
) -> float:
    """How well a candidate at `level` serves the objective; more is better.

    Quality is known from an evaluation only: without one it scores minus infinity.
    """
    if objective == "throughput":
        batch = min(candidate.batch_limit[level], max_batch)
        if batch < 1:
            return 0.0
        token_s = predicted_token_s(candidate, level, evaluation, batch)
        return 1.0 / token_s if token_s > 0 else math.inf
    if objective == "response-time":
        return -predicted_ttft_s(candidate, level, evaluation)
    if objective == "energy":
        return -predicted_token_j(candidate, level, evaluation)
    if objective == "memory":
        return -float(memory_bytes(candidate, level))
    if evaluation is None or not evaluation.num_tokens:
        return -math.inf
    return -evaluation.nll_nats / evaluation.num_tokens


def brief(value: float) -> str:
    """A number to three digits as people write it: 36,300 or 0.0456, never with an exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def describe(objective: Objective, value: float) -> str:
    """A score as a person reads it, with its unit."""
    if objective == "throughput":
        return f"{brief(value)} tokens/s"
    if objective == "response-time":
        return f"{brief(-value)} s to the first token"
    if objective == "energy":
        return f"{brief(-value)} J per token"
    if objective == "memory":
        return f"{brief(-value / 1e9)} GB"
    return f"{brief(-value)} nats per token"


def predicted_e2e_s(candidate: Candidate, level: int, evaluation: Telemetry | None) -> float:
    """Seconds to the last token of a typical output at `level`, without queueing.

    Where the typical length is unknown, to the first.
    """
    num_gaps = max(0, candidate.typical_output_tokens - 1)
    first_s = predicted_ttft_s(candidate, level, evaluation)
    return first_s + num_gaps * predicted_tpot_s(candidate, level, evaluation)


def meets_slo(candidate: Candidate, level: int, evaluation: Telemetry | None, slo: Slo) -> bool:
    """Whether what is predicted at `level` keeps every limit; a mean gap between tokens is a TPOT.

    Nothing that queues and no full batch is in the predictions: who misses a limit here misses it
    with little to do.
    """
    limits = (
        (slo.ttft_s, predicted_ttft_s),
        (slo.tpot_s, predicted_tpot_s),
        (slo.itl_s, predicted_tpot_s),
        (slo.e2e_s, predicted_e2e_s),
    )
    return all(
        limit_s is None or predict_s(candidate, level, evaluation) <= limit_s
        for limit_s, predict_s in limits
    )
