"""The highest rate that is carried, and the smallest fleet that carries one: probe and bisect.

Both are generators over verdicts: they yield a rate (or a number of replicas), are sent its
verdict and return what they found. They know nothing of how a verdict comes about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final, Literal

from helios_sim.search.verdict import Verdict

MAX_DOUBLINGS: Final = 20
MAX_OUTSIDE: Final = 6
"""Doublings (or halvings) of a rate tried in search of one where a bound is sure."""
BOUNDS_FACTOR: Final = 3.0
"""How much coarser than the capacity itself its bounds are closed in."""
IDLE_RUNNING: Final = 0.02
"""Requests running on average below which they hardly meet: a lower rate changes nothing."""


@dataclass(frozen=True)
class Probe:
    """A rate that was tried, and its verdict."""

    rate_per_s: float
    verdict: Verdict


@dataclass(frozen=True)
class Capacity:
    """The highest rate that is carried on average, between bounds that leave no doubt.

    `low_per_s` is the highest rate that is surely carried below every rate that is not,
    `high_per_s` the lowest that is surely missed above every rate that is not. `found` is False
    where no rate is carried at all, or none missed: the last probe then says why.
    """

    rate_per_s: float
    low_per_s: float
    high_per_s: float
    probes: tuple[Probe, ...]
    outcome: Literal["found", "none carried", "all carried"] = "found"

    @property
    def first_missed(self) -> Probe:
        """The lowest rate that was missed on average: what breaks there breaks first."""
        return min(
            (one for one in self.probes if not one.verdict.carried),
            key=lambda one: one.rate_per_s,
        )


def find_capacity(start_per_s: float, precision: float) -> Generator[float, Verdict, Capacity]:
    """Double or halve from a start until a rate is carried and its double is not, then bisect.

    Three boundaries are closed in: where the mean verdict turns, to within `precision`, and up to
    where a rate is surely carried and from where it is surely missed, to within three times that,
    since replications blur these anyway. Where no rate tried is sure, rates beyond them are tried.
    """
    known: dict[float, Verdict] = {}
    yield from _bracket(known, start_per_s)
    carried = any(one.carried for one in known.values())
    missed = any(not one.carried for one in known.values())
    if not (carried and missed):
        probes = _sorted(known)
        place = probes[-1].rate_per_s if carried else probes[0].rate_per_s
        if carried:
            return Capacity(place, place, math.inf, probes, "all carried")
        return Capacity(0.0, 0.0, place, probes, "none carried")

    bound = BOUNDS_FACTOR * precision
    yield from _close_in(known, _carried, precision)
    low, _ = yield from _close_in(known, lambda one: one.surely_carried, bound)
    _, high = yield from _close_in(known, lambda one: not one.surely_missed, bound)
    # Probes for the bounds may have moved where the mean turns.
    rate, _ = _edge(known, _carried)
    return Capacity(rate, low, high, _sorted(known))


def _carried(verdict: Verdict) -> bool:
    return verdict.carried


def _ask(known: dict[float, Verdict], rate: float) -> Generator[float, Verdict, Verdict]:
    """The verdict on a rate, which is tried at most once."""
    place = _round(rate)
    if place not in known:
        known[place] = yield place
    return known[place]


def _bracket(known: dict[float, Verdict], start_per_s: float) -> Generator[float, Verdict, None]:
    """Double or halve from a start until a rate is carried and its double is not."""
    rate = _round(start_per_s)
    verdict = yield from _ask(known, rate)
    step = 2.0 if verdict.carried else 0.5
    for _ in range(MAX_DOUBLINGS):
        if verdict.carried != (step > 1.0):
            break
        if not verdict.carried and verdict.mean_running < IDLE_RUNNING:
            break
        rate = _round(rate * step)
        verdict = yield from _ask(known, rate)


def _close_in(
    known: dict[float, Verdict], test: Callable[[Verdict], bool], within: float
) -> Generator[float, Verdict, tuple[float, float]]:
    """The rates between which a test turns, from beyond the rates tried where need be, bisected."""
    for _ in range(MAX_OUTSIDE):
        low, high = _edge(known, test)
        if math.isinf(high):
            yield from _ask(known, 2.0 * max(known))
        elif low == 0.0 and known[min(known)].mean_running >= IDLE_RUNNING:
            yield from _ask(known, 0.5 * min(known))
        else:
            break
    while True:
        low, high = _edge(known, test)
        if low == 0.0 or math.isinf(high) or high / low <= 1.0 + within:
            return low, high
        middle = _round(math.sqrt(low * high))
        if middle in (low, high):
            return low, high
        yield from _ask(known, middle)


def _edge(known: dict[float, Verdict], test: Callable[[Verdict], bool]) -> tuple[float, float]:
    """The lowest rate that fails a test, and the highest below it that passes (0 without one)."""
    high = min((rate for rate, one in known.items() if not test(one)), default=math.inf)
    low = max((rate for rate, one in known.items() if test(one) and rate < high), default=0.0)
    return low, high


def _sorted(known: dict[float, Verdict]) -> tuple[Probe, ...]:
    return tuple(Probe(rate, known[rate]) for rate in sorted(known))


def _round(rate: float) -> float:
    """Four significant digits: rates that people can repeat."""
    return float(f"{rate:.4g}")


def find_fleet(guess: int, most: int) -> Generator[int, Verdict, int | None]:
    """The smallest surely carried number near a guess: downwards while carried, else upwards.

    None where not even the most replicas surely carry it. More replicas are taken never to carry
    less, so that one carried above one missed is the answer. Steps double while nothing is
    bracketed.
    """
    low, high = 0, most + 1
    at, step = max(1, min(guess, most)), 1
    while high - low > 1:
        verdict = yield at
        if verdict.surely_carried:
            high = at
        else:
            low = at
        if low == 0:
            at, step = max(1, at - step), 2 * step
        elif high == most + 1:
            at, step = min(most, at + step), 2 * step
        else:
            at = (low + high) // 2
    return high if high <= most else None
