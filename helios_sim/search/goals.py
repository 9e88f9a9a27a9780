"""What a search is to make best, and what must hold: objectives and constraints as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from helios_sim.errors import InputError, did_you_mean
from helios_sim.runs.comparison import Better
from helios_sim.runs.metrics import LATENCIES, PERCENTILES
from helios_sim.search.points import Figures
from helios_sim.search.prices import Prices, cost_of, steadily
from helios_sim.settings.slo import SloLimit, SloSpec, parse_slo
from helios_sim.wording import counted, number


@dataclass(frozen=True)
class Goal:
    """A figure of a run with a direction; `scale` brings the summary's unit to the shown one."""

    name: str
    key: str
    better: Better
    unit: str
    scale: float = 1.0

    def cost(self, value: float) -> float:
        """The value as a number of which less is better."""
        return value if self.better == "lower" else -value


_PLAIN: Final = {
    goal.name: goal
    for goal in (
        Goal("goodput", "request_goodput", "higher", "requests/s"),
        Goal("throughput", "output_throughput", "higher", "tokens/s"),
        Goal("attainment", "slo_attainment", "higher", "share"),
        Goal("energy", "energy_per_output_token", "lower", "J/token", 1e-3),
        Goal("perplexity", "perplexity", "lower", ""),
        Goal("agreement", "agreement", "higher", "share"),
        Goal("cost", "", "lower", "per million tokens"),
    )
}
_STATISTICS: Final = ("mean", "median", *(f"p{one}" for one in PERCENTILES))
NAMES: Final = (*_PLAIN, *LATENCIES)

_ROUNDING: Final = 1e-12
_CLAUSE: Final = re.compile(
    r"(?P<name>[a-z]+)(?P<sign>>=|<=|>|<)(?P<number>[-+0-9.e]+)(?P<percent>%?)"
)


@dataclass(frozen=True)
class Bound:
    """A constraint on a figure that is no latency."""

    goal: Goal
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.goal.name}{self.sign}{self.limit:g}"


@dataclass(frozen=True)
class Constraints:
    """What must hold: latency limits as an SLO, and bounds on other figures."""

    slo: SloSpec | None
    bounds: tuple[Bound, ...]

    @property
    def limits(self) -> str:
        """The latency limits as text that a point judges."""
        return str(self.slo) if self.slo is not None else ""

    def __str__(self) -> str:
        return ";".join(part for part in (self.limits, *map(str, self.bounds)) if part)


@dataclass(frozen=True)
class Broken:
    """A constraint that does not hold, with what was reached; infinite where nothing was."""

    constraint: str
    reached: float
    violation: float


Breaking = tuple[int, int]
"""In how many samples some constraint is broken, and of how many."""


def parse_goal(text: str, where: str) -> Goal:
    """An objective by its name: `goodput`, `energy`, or a latency such as `ttft:p95` (else p99)."""
    name, _, statistic = text.strip().lower().partition(":")
    name = {"e2el": "e2e", "j/token": "energy"}.get(name, name)
    if name in _PLAIN and not statistic:
        return _PLAIN[name]
    if name in LATENCIES:
        chosen = statistic or "p99"
        if chosen not in _STATISTICS:
            raise InputError(
                f"{text!r} names no statistic of a latency; allowed are {', '.join(_STATISTICS)}.",
                where,
            )
        return Goal(f"{name}:{chosen}", f"{chosen}_{LATENCIES[name]}_ms", "lower", "ms")
    hint = did_you_mean(name, NAMES)
    raise InputError(f"{text!r} is no objective.{hint} Allowed are {', '.join(NAMES)}.", where)


def parse_constraints(text: str, where: str) -> Constraints:
    """Read constraints: SLO text in any dialect, and bounds such as `agreement>=0.98`."""
    tidy = re.sub(r"\s*(<=|>=|<|>|:)\s*", r"\1", text.strip().lower())
    tidy = re.sub(r"([0-9.])\s+(us|ms|s|%)(?![a-z0-9])", r"\1\2", tidy)
    latencies: list[str] = []
    bounds: list[Bound] = []
    for clause in re.split(r"[;,\s]+", tidy):
        if not clause:
            continue
        match = _CLAUSE.fullmatch(clause)
        if match is not None and match["name"] in _PLAIN:
            bounds.append(_bound(match, clause, where))
            continue
        word = re.split(r"[:<>=]", clause)[0]
        if word in _PLAIN:
            raise InputError(
                f"{clause!r} gives no bound; write a sign and a number, such as {_example(word)}.",
                where,
            )
        if re.fullmatch(r"(p[0-9.]+_|median_)?[a-z0-9]+(_(us|ms|s))?", word) is None or (
            _metric(word) not in (*LATENCIES, "e2el")
        ):
            hint = did_you_mean(word, NAMES)
            raise InputError(
                f"{clause!r} bounds nothing that is known.{hint} Allowed are {', '.join(NAMES)}.",
                where,
            )
        latencies.append(clause)
    slo = parse_slo(";".join(latencies), where) if latencies else None
    return Constraints(slo, tuple(bounds))


def check_countable(
    goals: Sequence[Goal], has_slo: bool, has_prices: bool, where: str, table: str
) -> None:
    """Refuse goals for which a scenario lacks an SLO, or its table the prices."""
    needs_slo = [goal.name for goal in goals if goal.name in ("goodput", "attainment")]
    if needs_slo and not has_slo:
        raise InputError(
            f"{needs_slo[0]} is counted under an SLO, and the scenario has none; give it a table "
            "[slo], or another objective, such as throughput.",
            f"{where}, slo",
        )
    if not has_prices and any(goal.name == "cost" for goal in goals):
        raise InputError(
            'cost needs a prices file; give its name, such as "prices.toml".',
            f"{where}, {table}.prices",
        )


def _example(name: str) -> str:
    """A constraint on this figure as it may be written."""
    sign = ">=" if _PLAIN[name].better == "higher" else "<="
    return f"{name}{sign}{'0.98' if _PLAIN[name].unit == 'share' else '10'}"


def _metric(word: str) -> str:
    return re.sub(r"_(us|ms|s)$", "", re.sub(r"^(p[0-9.]+|median)_", "", word))


def _bound(match: re.Match[str], clause: str, where: str) -> Bound:
    goal = _PLAIN[match["name"]]
    sign = {">": ">=", "<": "<="}.get(match["sign"], match["sign"])
    if (sign == ">=") != (goal.better == "higher"):
        allowed = ">=" if goal.better == "higher" else "<="
        raise InputError(
            f"{clause!r} bounds {goal.name} from the wrong side: {goal.better} is better; write "
            f"{allowed}.",
            where,
        )
    if match["percent"] and goal.unit != "share":
        raise InputError(f"{clause!r} is in per cent, and {goal.name} is no share.", where)
    try:
        limit = float(match["number"]) / (100.0 if match["percent"] else 1.0)
    except ValueError:
        raise InputError(f"{clause!r} holds no number.", where) from None
    if not (math.isfinite(limit) and limit > 0.0):
        raise InputError(f"The bound {clause!r} is not positive and finite.", where)
    if goal.unit == "share" and limit > 1.0:
        raise InputError(
            f"{clause!r} asks for a share above 1; write 0.98 or 98%.",
            where,
        )
    return Bound(goal, sign, limit)


@dataclass(frozen=True)
class Judge:
    """Scores runs by the objectives and says which constraints they break.

    Cost is that of a run as long as it lasts, or of a fleet that is never empty where requests
    arrive at `rate_per_s`.
    """

    goals: tuple[Goal, ...]
    constraints: Constraints
    prices: Prices | None
    where: str
    rate_per_s: float | None = None

    def value(self, goal: Goal, figures: Sequence[Figures]) -> float | None:
        """A goal's mean over replications; None where one of them has none."""
        values = []
        for one in figures:
            value = self._one(goal, one)
            if value is None:
                return None
            values.append(value)
        return fmean(values)

    def _one(self, goal: Goal, figures: Figures) -> float | None:
        summary = figures["summary"]
        if goal.name == "cost":
            assert self.prices is not None
            given = summary["average_gpu_power"], summary["output_throughput"]
            if self.rate_per_s is not None:
                given = steadily(summary, self.rate_per_s)
            cost = cost_of(self.prices, figures["device"], summary["num_gpus"], *given, self.where)
            return None if cost is None else cost.per_million_tokens
        value = summary[goal.key]
        return None if value is None else goal.scale * float(value)

    def costs(self, scores: Sequence[float]) -> tuple[float, ...]:
        """Values of the objectives as numbers of which less is better."""
        return tuple(goal.cost(score) for goal, score in zip(self.goals, scores, strict=True))

    def scores(self, figures: Sequence[Figures]) -> tuple[float | None, ...]:
        """One value an objective."""
        return tuple(self.value(goal, figures) for goal in self.goals)

    def broken(self, figures: Sequence[Figures]) -> tuple[Broken, ...]:
        """The constraints that do not hold on average over replications, the worst first.

        A latency's percentile is over the requests sent: one that did not finish is infinitely
        late.
        """
        found = []
        limits = () if self.constraints.slo is None else self.constraints.slo.limits
        for place, limit in enumerate(limits):
            # In [slo] the same text leaves some requests out, so who is held to it is said here.
            told = str(limit) if limit.percentile is not None else f"{limit} by every request"
            judged = [one["judged"][place] for one in figures]
            values = [one["value_ms"] for one in judged]
            if any(value is None for value in values):
                share = fmean(one["share"] for one in judged)
                found.append(Broken(told, math.inf, 10.0 + (1.0 - share)))
                continue
            violation = fmean(values) / (1e3 * limit.limit_s) - 1.0
            if violation > 0.0:
                found.append(Broken(told, fmean(values), violation))
        for bound in self.constraints.bounds:
            value = self.value(bound.goal, figures)
            if value is None:
                found.append(Broken(str(bound), math.inf, 10.0))
                continue
            over = value - bound.limit if bound.sign == "<=" else bound.limit - value
            # Means of the same figure may round differently.
            if over > _ROUNDING * bound.limit:
                found.append(Broken(str(bound), value, over / bound.limit))
        return tuple(sorted(found, key=lambda one: -one.violation))

    def breaking(self, figures: Sequence[Figures]) -> Breaking:
        """In how many of the replications alone a constraint does not hold."""
        return sum(1 for one in figures if self.broken([one])), len(figures)


def limit_words(limit: SloLimit) -> str:
    """A latency limit's figure: 'TPOT p90', and of one that holds for each request the worst."""
    at = "max" if limit.percentile is None else f"p{limit.percentile:g}"
    return f"{limit.metric.upper()} {at}"


def in_samples(breaking: Breaking) -> str:
    """Where constraints are broken, as a clause; empty where they are in no sample."""
    num, of = breaking
    return f"in {num} of {counted(of, 'sample')}" if num else ""


def in_words(broken: Broken) -> str:
    """A broken constraint and by how much, as a clause."""
    if math.isinf(broken.reached):
        return f"{broken.constraint} (requests did not finish)"
    off = number(100 * broken.violation, 2)
    return f"{broken.constraint} (reached {number(broken.reached, 4)}, {off} % off)"
