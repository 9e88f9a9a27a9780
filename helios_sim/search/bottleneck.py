"""What holds a fleet back at the rate it no longer carries: one word, with its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal

from helios_sim.scenario import ServingSettings

Cause = Literal[
    "evaluating", "loading", "KV memory", "queueing", "compute", "memory bandwidth", "launch"
]

PAUSED_SHARE: Final = 0.5
"""Share of what late requests wait for from which evaluating and changing are the bottleneck."""
FULL_SHARE: Final = 0.75
"""Share of the KV blocks (or of the batch's places) in use while busy that counts as full."""
WAITING_SHARE: Final = 0.4
"""Share of the time to the first token spent before admission from which admission is blocked."""
BUSY_SHARE: Final = 0.85
"""Share of the time in iterations from which the device itself is the bottleneck."""

_REGIMES: Final[Mapping[str, Cause]] = {
    "launch": "launch",
    "memory": "memory bandwidth",
    "compute": "compute",
}


@dataclass(frozen=True)
class Bottleneck:
    """What gives way first, the figures that say so, and the mean batch of a decode then."""

    cause: Cause
    evidence: str
    batch: float


def find_bottleneck(
    summaries: Sequence[Mapping[str, Any]],
    serving: ServingSettings,
    tokens_are_late: bool,
    late_while: Sequence[Mapping[str, float]] = (),
) -> Bottleneck:
    """Judge runs at a rate just above the capacity.

    `late_while` says, for each run with late requests, what replicas did while those waited; where
    no limit is behind the miss, what they did all along stands in. With `tokens_are_late` a limit
    on the time between tokens broke first: then what requests wait for before they are admitted is
    not the reason.
    """
    batch = fmean(one["mean_batch_size"] or 0.0 for one in summaries)
    cause, evidence = _cause_of(summaries, serving, tokens_are_late, late_while, batch)
    return Bottleneck(cause, evidence, batch)


def _cause_of(
    summaries: Sequence[Mapping[str, Any]],
    serving: ServingSettings,
    tokens_are_late: bool,
    late_while: Sequence[Mapping[str, float]],
    batch: float,
) -> tuple[Cause, str]:
    """The cause with its evidence, from the rarest to the commonest."""

    def mean_of(table: str, key: str) -> float:
        return fmean((one.get(table) or {}).get(key, 0.0) for one in summaries)

    busy = mean_of("time_shares", "busy")
    known = [one for one in late_while if one]
    if known:
        whose = "while late requests wait, a replica"
        evaluating = fmean(one["evaluating"] for one in known)
        changing = fmean(one["changing"] for one in known)
    else:
        whose = "a replica"
        evaluating = mean_of("time_shares", "evaluating")
        changing = mean_of("time_shares", "loading") + mean_of("time_shares", "draining")
    if evaluating + changing > PAUSED_SHARE:
        return (
            "evaluating" if evaluating >= changing else "loading",
            f"{whose} evaluates candidates for {100 * evaluating:.0f} % of the time, and drains "
            f"and loads for {100 * changing:.0f} %",
        )
    kv_use = fmean(one["mean_kv_use"] or 0.0 for one in summaries)
    preempted = fmean(one["num_preemptions"] / one["num_requests"] for one in summaries)
    waits = 0.0 if tokens_are_late else fmean(_waiting_share(one) for one in summaries)
    most = max(one["max_batch_size"] for one in summaries)
    is_blocked = waits > WAITING_SHARE and kv_use > 0.5 * busy and most < serving.max_batch
    if kv_use > FULL_SHARE * max(busy, 0.1) or preempted > 0.01 or is_blocked:
        return (
            "KV memory",
            f"{100 * kv_use:.0f} % of the KV blocks are in use on average, {100 * waits:.0f} % of "
            f"the time to the first token is waiting to be admitted, and {100 * preempted:.1f} % "
            "of the requests are preempted",
        )
    if batch > FULL_SHARE * serving.max_batch or (
        waits > WAITING_SHARE and most >= serving.max_batch
    ):
        return (
            "queueing",
            f"max_batch lets {serving.max_batch} requests run, {batch:.3g} do on average and at "
            f"times all; {100 * waits:.0f} % of the time to the first token is waiting for a place",
        )
    if busy >= BUSY_SHARE:
        shares = {name: mean_of("regime", name) for name in _REGIMES}
        bound = max(shares, key=lambda name: shares[name])
        return (
            _REGIMES[bound],
            f"a replica is busy {100 * busy:.0f} % of the time, and {100 * shares[bound]:.0f} % of "
            f"that is bound by {_REGIMES[bound]}",
        )
    return (
        "queueing",
        f"a replica is busy only {100 * busy:.0f} % of the time: requests meet in bursts, or wait "
        "for one another's prefills",
    )


def _waiting_share(summary: Mapping[str, Any]) -> float:
    """How much of the time to the first token passes before a request is admitted."""
    wait_ms, ttft_ms = summary["mean_wait_ms"], summary["mean_ttft_ms"]
    return min(1.0, wait_ms / ttft_ms) if wait_ms and ttft_ms else 0.0
