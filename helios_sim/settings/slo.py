"""Service level objectives: the text people write, the presets they know, one frozen meaning."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation, Overflow
from typing import Any, Final

from helios_sim.errors import InputError, did_you_mean

METRICS: Final = ("ttft", "tpot", "itl", "e2e")
"""Metrics a limit may be set on; `e2el`, the key of `vllm bench serve`, is read as `e2e`."""

_ALIASES: Final = {"e2el": "e2e"}
_UNIT_S: Final = {"us": Decimal("0.000001"), "ms": Decimal("0.001"), "s": Decimal(1)}
_TABLE_KEYS: Final = ("text", "preset", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")

_CLAUSE: Final = re.compile(
    r"""(?:(?P<before>p[0-9.]+|median)_)?     # p99_e2el_ms<=200
        (?P<metric>[a-z][a-z0-9]*?)
        (?:_(?P<suffix>us|ms|s))?
        (?P<operator>:|<=|<)
        (?:(?P<inside>p[0-9.]+|median)(?:<=|<))?  # ttft:p99<500ms
        (?P<number>[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)
        (?P<unit>us|ms|s)?""",
    re.VERBOSE,
)
_FORMS: Final = "'ttft:200 tpot:50' (ms), 'p99_e2el_ms<=200' and 'ttft:p99<500ms;tpot:p95<50ms'"


@dataclass(frozen=True)
class SloLimit:
    """One upper limit in seconds.

    Without a percentile every request is held to it. With one, a request still has to meet it to
    count as good, and the run as a whole passes when that share of the requests sent does.
    """

    metric: str
    limit_s: float
    percentile: float | None = None

    def __str__(self) -> str:
        milliseconds = _plain(Decimal(repr(self.limit_s)) * 1000)
        if self.percentile is None:
            return f"{self.metric}<={milliseconds}ms"
        return f"{self.metric}:p{_plain(Decimal(repr(self.percentile)))}<={milliseconds}ms"


@dataclass(frozen=True)
class SloSpec:
    """The limits a run is judged by; `parse_slo(str(spec)) == spec`."""

    limits: tuple[SloLimit, ...]

    def __str__(self) -> str:
        return ";".join(str(limit) for limit in self.limits)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics with a limit, in the order of `METRICS`."""
        named = {limit.metric for limit in self.limits}
        return tuple(metric for metric in METRICS if metric in named)

    def limit_s(self, metric: str) -> float | None:
        """The tightest limit on a metric; None where it has none."""
        return min((one.limit_s for one in self.limits if one.metric == metric), default=None)


_ROUNDING: Final = 1e-12
"""More than a share is off by rounding (99.9 / 100 is above 0.999), less than any request is."""


def reaches(share: float, target: float) -> bool:
    """Whether a share is as large as asked for, but for rounding."""
    return share >= target - _ROUNDING


def needed(percentile: float, num: int) -> int:
    """The fewest of so many requests that are a percentile's share of them."""
    return math.ceil((percentile / 100.0 - _ROUNDING) * num)


def _preset(ttft_ms: int, tpot_ms: int) -> SloSpec:
    return SloSpec(
        (
            SloLimit("ttft", float(Decimal(ttft_ms) / 1000), 99.0),
            SloLimit("tpot", float(Decimal(tpot_ms) / 1000), 99.0),
        )
    )


PRESETS: Final[dict[str, SloSpec]] = {
    "llama3.1-8b": _preset(2000, 100),
    "llama3.1-8b-interactive": _preset(500, 30),
    "llama2-70b": _preset(2000, 200),
    "llama2-70b-interactive": _preset(450, 40),
    "llama3.1-405b": _preset(6000, 175),
    "llama3.1-405b-interactive": _preset(4500, 80),
    "deepseek-r1": _preset(2000, 80),
    "deepseek-r1-interactive": _preset(1500, 15),
}
"""Limits of MLPerf Inference's server and interactive scenarios, judged at the 99th percentile."""


def parse_slo(text: str, where: str | None = None) -> SloSpec:
    """Read SLO text in any of its three dialects.

    A number without a unit is in milliseconds; `<` and `<=` mean the same, since no measured
    latency tells them apart.
    """
    tidy = re.sub(r"\s*(<=|<|:|=|>)\s*", r"\1", text.strip().lower())
    tidy = re.sub(r"([0-9.])\s+(us|ms|s)\b", r"\1\2", tidy)
    clauses = [clause for clause in re.split(r"[;,\s]+", tidy) if clause]
    if not clauses:
        raise InputError(f"The SLO text is empty; it is written as {_FORMS}.", where)
    return _spec([_limit(clause, where) for clause in clauses], where)


def preset_slo(name: str, where: str | None = None) -> SloSpec:
    """The MLPerf preset of this name."""
    key = name.strip().lower()
    if key not in PRESETS:
        raise InputError(
            f"{name!r} is no SLO preset.{did_you_mean(key, PRESETS)} "
            f"Allowed are {', '.join(PRESETS)}.",
            where,
        )
    return PRESETS[key]


def slo_from_table(table: Mapping[str, Any], where: str | None = None) -> SloSpec:
    """Read a scenario's `[slo]` table: `text`, or `preset`, or limits such as `ttft_ms`."""
    for key in table:
        if key not in _TABLE_KEYS:
            raise InputError(
                f"{key!r} is no key of an SLO.{did_you_mean(key, _TABLE_KEYS)} "
                f"Allowed are {', '.join(_TABLE_KEYS)}.",
                where,
            )
    given = [key for key in _TABLE_KEYS if table.get(key) is not None]
    if not given:
        raise InputError(f"The SLO names no limit; allowed are {', '.join(_TABLE_KEYS)}.", where)
    if len(given) > 1 and ("text" in given or "preset" in given):
        raise InputError(
            f"The SLO was given {', '.join(given)} together; allowed is either text, or preset, "
            "or limits such as ttft_ms.",
            where,
        )
    if given in (["text"], ["preset"]):
        value = table[given[0]]
        place = f"{where}.{given[0]}" if where else given[0]
        if not isinstance(value, str):
            raise InputError(f"It was given {value!r}; allowed is text.", place)
        return parse_slo(value, place) if given == ["text"] else preset_slo(value, place)
    limits = []
    for key in given:
        value = table[key]
        place = f"{where}.{key}" if where else key
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"It was given {value!r}; allowed is a number of ms.", place)
        limits.append(
            SloLimit(key.removesuffix("_ms"), _seconds(repr(value), "ms", str(value), place))
        )
    return _spec(limits, where)


def _limit(clause: str, where: str | None) -> SloLimit:
    if ">" in clause:
        raise InputError(
            f"{clause!r} is a lower limit; an SLO limits latencies from above, with '<='.",
            where,
        )
    match = _CLAUSE.fullmatch(clause)
    if match is None:
        raise InputError(f"{clause!r} is no SLO limit; allowed are {_FORMS}.", where)
    metric = _ALIASES.get(match["metric"], match["metric"])
    if metric not in METRICS:
        allowed = (*METRICS, *_ALIASES)
        raise InputError(
            f"{match['metric']!r} in {clause!r} is no SLO metric.{did_you_mean(metric, allowed)} "
            f"Allowed are {', '.join(METRICS)} (or e2el for e2e).",
            where,
        )
    if match["before"] and match["inside"]:
        raise InputError(f"{clause!r} names two percentiles; allowed is one.", where)
    if match["suffix"] and match["unit"] and match["suffix"] != match["unit"]:
        raise InputError(
            f"{clause!r} names two units, {match['suffix']} and {match['unit']}; allowed is one.",
            where,
        )
    unit = match["unit"] or match["suffix"] or "ms"
    named = match["before"] or match["inside"]
    percentile = None if named is None else _percentile(named, clause, where)
    return SloLimit(metric, _seconds(match["number"], unit, clause, where), percentile)


def _percentile(text: str, clause: str, where: str | None) -> float:
    if text == "median":
        return 50.0
    try:
        value = float(text[1:])
    except ValueError:
        value = 0.0
    if not 1.0 <= value <= 100.0:
        # p0.9 is nobody's limit and everybody's slip: one request in a hundred would meet it.
        hint = f" Did you mean p{_plain(Decimal(text[1:]) * 100)}?" if 0.0 < value < 1.0 else ""
        raise InputError(
            f"The percentile {text} in {clause!r} is out of range; allowed is p1 to p100.{hint}",
            where,
        )
    return value


def _seconds(number: str, unit: str, given: str, where: str | None) -> float:
    try:
        value = Decimal(number) * _UNIT_S[unit]
    except Overflow:
        value = Decimal("inf")
    except InvalidOperation:
        raise InputError(f"{given!r} holds no number; allowed are {_FORMS}.", where) from None
    if not value.is_finite() or float(value) <= 0.0 or float(value) == float("inf"):
        raise InputError(
            f"The limit {given!r} is not positive and finite; a latency limit must be.",
            where,
        )
    return float(value)


def _spec(limits: list[SloLimit], where: str | None) -> SloSpec:
    seen: set[tuple[str, float | None]] = set()
    for limit in limits:
        key = (limit.metric, limit.percentile)
        if key in seen:
            kind = "" if limit.percentile is None else f" at p{limit.percentile:g}"
            raise InputError(
                f"The SLO limits {limit.metric}{kind} twice; allowed is one limit each.",
                where,
            )
        seen.add(key)
    return SloSpec(tuple(limits))


def _plain(value: Decimal) -> str:
    """A decimal without exponent or trailing zeros."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
