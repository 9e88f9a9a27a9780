"""Settings that keep vanilla's quality, chosen in simulation before anything is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

BOUND: Final = 1.02
"""Perplexity of a setting of equal quality, at most so many times vanilla's."""

THRESHOLDS: Final = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)

VARIANTS: Final[Mapping[str, tuple[dict[str, Any], ...]]] = {
    "helios": ({"objective": "throughput"}, {"objective": "quality"}),
    "ee-single": ({"exit_mode": "wait"}, {"exit_mode": "rebatch"}),
}
"""What is tried of a policy beside its threshold: a threshold mends no choice of a wrong model."""

Simulate = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Simulates a policy's options on the requests in question and gives the run's figures."""


@dataclass(frozen=True)
class Tried:
    """Options and what a simulation says of them: perplexity and throughput over vanilla's."""

    options: dict[str, Any]
    perplexity: float
    throughput: float


@dataclass(frozen=True)
class Choice:
    """All that was tried for a policy.

    `chosen` is, of the variants' smallest thresholds that keep the quality, the fastest; None where
    no threshold does. `nearest` has the lowest perplexity.
    """

    policy: str
    tried: tuple[Tried, ...]

    @property
    def chosen(self) -> Tried | None:
        """What is served."""
        first: dict[str, Tried] = {}
        for one in self.tried:
            if one.perplexity <= BOUND:
                first.setdefault(_variant(one.options), one)
        return max(first.values(), key=lambda one: one.throughput, default=None)

    @property
    def nearest(self) -> Tried:
        """What comes closest."""
        return min(self.tried, key=lambda one: one.perplexity)


def choose(policy: str, simulate: Simulate, vanilla: Mapping[str, Any]) -> Choice:
    """Try every variant of a policy at every threshold, in ascending order."""
    tried = []
    for variant in VARIANTS[policy]:
        for threshold in THRESHOLDS:
            options = variant | {"confidence_threshold": threshold}
            figures = simulate(options)
            tried.append(
                Tried(
                    options,
                    float(figures["perplexity"]) / float(vanilla["perplexity"]),
                    float(figures["output_throughput"]) / float(vanilla["output_throughput"]),
                )
            )
    return Choice(policy, tuple(tried))


def _variant(options: Mapping[str, Any]) -> str:
    return str({name: value for name, value in options.items() if name != "confidence_threshold"})
