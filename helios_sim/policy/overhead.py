"""What a reaction to breaches costs: moving weights, and serving on afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from helios_sim.policy.contract import Candidate, ExitMode, Snapshot, Telemetry
from helios_sim.policy.history import exit_shares
from helios_sim.policy.objective import (
    iteration_s,
    predicted_token_s,
    prompt_share_s,
    slowdown,
)

OverheadRule = Literal["expected", "transfer"]
OVERHEAD_RULES: Final = ("expected", "transfer")


@dataclass(frozen=True)
class Overhead:
    """Seconds of an option: the transfer, and emitting the expected tokens under it."""

    transfer_s: float
    serving_s: float

    def total_s(self, rule: OverheadRule) -> float:
        """The seconds a rule compares."""
        return self.transfer_s if rule == "transfer" else self.transfer_s + self.serving_s


def _power(base: float, exponent: int) -> float:
    """`base ** exponent` by multiplication alone: the same bits on every machine, unlike pow."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def iteration_shares(shares: Sequence[float], exit_mode: ExitMode, batch: int) -> list[float]:
    """How often an iteration runs to each exit level when tokens leave by `shares`.

    Alone or rebatched a token runs to its own exit; a waiting batch runs to the deepest of its
    tokens (taken as independent); without exits every token runs to full depth.
    """
    last = len(shares) - 1
    if exit_mode in (ExitMode.FULL, ExitMode.LOADED_DEPTH):
        return [0.0] * last + [1.0]
    if exit_mode is not ExitMode.WAIT:
        return list(shares)
    covered = [
        1.0 if level == last else _power(min(1.0, math.fsum(shares[: level + 1])), batch)
        for level in range(last + 1)
    ]
    return [here - below for here, below in zip(covered, [0.0, *covered[:-1]], strict=True)]


def batch_of(candidate: Candidate, level: int, snapshot: Snapshot) -> int:
    """Requests that would run together: as many as there are, up to what fits."""
    demand = snapshot.num_running + snapshot.num_waiting
    return max(1, min(candidate.batch_limit[level], snapshot.max_batch, demand))


def overhead_of_load(
    candidate: Candidate, evaluation: Telemetry | None, exit_mode: ExitMode, snapshot: Snapshot
) -> Overhead:
    """Load the remaining layers: tokens then leave by the candidate's own exit histogram.

    Exits are asked and skipped KV is filled, unless no token leaves early.
    Where nothing was measured every token is taken to need full depth. Prompts run through all
    layers that are loaded.
    """
    last = len(candidate.exit_layers) - 1
    batch = 1 if exit_mode is ExitMode.SOLO else batch_of(candidate, last, snapshot)
    shares = exit_shares(evaluation) or (0.0,) * last + (1.0,)
    run_to = iteration_shares(shares, exit_mode, batch)
    card_s = math.fsum(
        share * iteration_s(candidate, level, batch, exit_mode)
        for level, share in enumerate(run_to)
    )
    shared_s = card_s / batch + prompt_share_s(candidate, last)
    token_s = shared_s * slowdown(candidate, evaluation)
    return Overhead(snapshot.load_s[candidate.name][last], snapshot.expected_tokens * token_s)


def overhead_of_switch(
    candidate: Candidate, level: int, evaluation: Telemetry | None, snapshot: Snapshot
) -> Overhead:
    """Bring in another candidate partially: every token then leaves at that depth."""
    batch = batch_of(candidate, level, snapshot)
    token_s = predicted_token_s(candidate, level, evaluation, batch)
    return Overhead(snapshot.load_s[candidate.name][level], snapshot.expected_tokens * token_s)
