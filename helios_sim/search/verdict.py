"""Whether replicated runs carry their load under an SLO, how surely, and what breaks first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any, Final

from helios_sim.settings.slo import SloSpec, reaches
from helios_sim.wording import limits

BACKLOG: Final = "backlog"
"""The criterion that no backlog grows: a short run may meet an SLO while it drowns.

It is missed where most runs are overloaded, which a run no longer than its own answers can hardly
show; there the limits are missed long before.
"""


@dataclass(frozen=True)
class Criterion:
    """A share that has to reach its target, with its confidence bounds over replications.

    `value_ms` and `limit_ms` say by how much a latency limit is met or missed, where one is
    behind the share; `limit` is that limit, the one that is met least where several are.
    """

    name: str
    mean: float
    low: float
    high: float
    target: float
    value_ms: float | None = None
    limit_ms: float | None = None
    limit: str = ""

    @property
    def words(self) -> str:
        """The criterion as a sentence names it: by the limit behind it."""
        if not self.limit:
            return "keeping up with the arrivals"
        told = limits(self.limit)
        if self.limit == self.name:
            return told
        return f"{told} for {100 * self.target:g} % of the requests"

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds as the shares that they are of: Student's t reaches beyond 0 and 1."""
        return max(0.0, self.low), min(1.0, self.high)

    @property
    def holds(self) -> bool:
        """Whether the share reaches the target on average."""
        return reaches(self.mean, self.target)

    @property
    def shortfall(self) -> float:
        """What is missing to the target, as a share of it; negative where it is reached."""
        return (self.target - self.mean) / self.target


@dataclass(frozen=True)
class Verdict:
    """Criteria of one load. `mean_running` says how much there was to do at all."""

    criteria: tuple[Criterion, ...]
    num_replications: int
    mean_running: float = math.inf

    @property
    def carried(self) -> bool:
        """Whether every criterion holds on average."""
        return all(one.holds for one in self.criteria)

    @property
    def surely_carried(self) -> bool:
        """Whether every criterion holds at its lower bound."""
        return all(reaches(one.low, one.target) for one in self.criteria)

    @property
    def surely_missed(self) -> bool:
        """Whether some criterion fails even at its upper bound."""
        return any(not reaches(one.high, one.target) for one in self.criteria)

    @property
    def is_sure(self) -> bool:
        """Whether the bounds leave no doubt."""
        return self.surely_carried or self.surely_missed

    @property
    def worst(self) -> Criterion:
        """The criterion with the largest shortfall."""
        return max(self.criteria, key=lambda one: one.shortfall)

    @property
    def broken(self) -> tuple[Criterion, ...]:
        """The criteria that fail, the worst first."""
        missed = [one for one in self.criteria if not one.holds]
        return tuple(sorted(missed, key=lambda one: -one.shortfall))


def criterion(
    name: str,
    values: Sequence[float],
    target: float,
    confidence: float,
    value_ms: float | None = None,
    limit_ms: float | None = None,
    limit: str = "",
) -> Criterion:
    """A criterion from one share a replication, bounded on either side by Student's t."""
    mean = fmean(values)
    half = half_width(values, confidence) if len(values) > 1 else 0.0
    return Criterion(name, mean, mean - half, mean + half, target, value_ms, limit_ms, limit)


def half_width(values: Sequence[float], confidence: float) -> float:
    """Half the width of the interval of a mean of two values or more, by Student's t.

    `confidence` is one-sided: 0.975 gives an interval of 95 %.
    """
    return _t_quantile(len(values) - 1, confidence) * stdev(values) / math.sqrt(len(values))


@lru_cache(maxsize=1000)
def _t_quantile(degrees: int, confidence: float) -> float:
    """The one-sided quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, confidence))


def judge(
    figures: Sequence[dict[str, Any]], spec: SloSpec, attainment: float, confidence: float
) -> Verdict:
    """Judge replications of one load.

    A limit at a percentile needs that share of the requests sent. Limits that hold for each
    request share one criterion: the share of requests that meet them all reaches `attainment`.
    Beside them the system has to keep up with its arrivals.
    """
    summaries = [one["summary"] for one in figures]
    criteria = []
    plain: list[tuple[float, str]] = []
    for place, limit in enumerate(spec.limits):
        judged = [one["judged"][place] for one in figures]
        if limit.percentile is None:
            plain.append((fmean(one["share"] for one in judged), str(limit)))
        else:
            criteria.append(
                criterion(
                    str(limit),
                    [one["share"] for one in judged],
                    limit.percentile / 100.0,
                    confidence,
                    _mean_or_none([one["value_ms"] for one in judged]),
                    1e3 * limit.limit_s,
                    str(limit),
                )
            )
    if plain:
        _, worst = min(plain)
        criteria.append(
            criterion(
                "every limit",
                [one["together"] for one in figures],
                attainment,
                confidence,
                limit=worst,
            )
        )
    drowned = [summary["saturation"] == "overloaded" for summary in summaries]
    kept_up = [0.0 if one else 1.0 for one in drowned]
    criteria.append(Criterion(BACKLOG, fmean(kept_up), min(kept_up), max(kept_up), 0.5))
    running = fmean(summary["mean_running"] or 0.0 for summary in summaries)
    return Verdict(tuple(criteria), len(figures), running)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
