"""What the measurements amount to: medians, ratios, verdicts on the bars, and the document."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.measure import Conditions, Measured

BASE_BYTES: Final = 300e6
MAX_BYTES_PER_REQUEST: Final = 250.0
MIN_REQUESTS_PER_S: Final = 300_000.0
MAX_TIMES_FLOOR: Final = 4.0
MAX_FIRST_CALL_S: Final = 30.0
MAX_LATER_CALL_S: Final = 1.0
MIN_FLEET_REQUESTS_PER_S: Final = 60_000.0
MIN_CPU_USE: Final = 0.9
NOISE: Final = 1.2
"""What a ratio that should be 1 may reach, as two runs of the same work differ too."""


@dataclass(frozen=True)
class Line:
    """A measured case: medians of its repetitions, and how it compares.

    `speeds` are requests a second, of which one is better the higher it is. `vs_baseline` is how
    many times as fast as the stored run it is.
    """

    case: Case
    seconds: float
    speeds: tuple[float, ...]
    tokens_per_s: float | None
    peak_bytes: float
    startup_s: float | None
    cpu_use: float | None
    times_floor: float | None = None
    vs_baseline: float | None = None

    @property
    def requests_per_s(self) -> float:
        """The median."""
        return median(self.speeds)

    @property
    def seconds_per_request(self) -> float:
        """The median."""
        return self.seconds / self.case.num_requests


@dataclass(frozen=True)
class Bar:
    """A promise about speed, what was measured of it, and how that is judged.

    `excess` is how many times the limit is exceeded, at most 1 where the bar is met; None where
    the case was not measured.
    """

    promise: str
    measured: str
    excess: float | None

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        if self.excess is None:
            return "not measured"
        return "met" if self.excess <= 1 else f"missed by {self.excess:.2f}x"


@dataclass(frozen=True)
class Results:
    """A whole run of the benchmarks."""

    machine: Mapping[str, Any]
    capacity_per_s: Mapping[str, float]
    lines: tuple[Line, ...]
    failures: Mapping[str, str]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    quick: bool
    repetitions: int
    baseline_machine: Mapping[str, Any] | None

    def line(self, name: str) -> Line | None:
        """The line of a case, if it was measured."""
        return next((line for line in self.lines if line.case.name == name), None)


def gather(
    measured: Sequence[Measured],
    conditions: Conditions,
    baseline: Mapping[str, Any] | None,
    quick: bool,
    repetitions: int,
) -> Results:
    """Medians of all cases, beside the floor of this run and the stored baseline."""
    plain = {one.case.name: _line(one) for one in measured if one.samples and not one.failure}
    before = (baseline or {}).get("cases", {})
    return Results(
        machine=conditions.machine,
        capacity_per_s=conditions.capacity_per_s,
        lines=tuple(_compared(line, plain, before) for line in plain.values()),
        failures={one.case.name: one.failure for one in measured if one.failure},
        samples={one.case.name: one.samples for one in measured if one.samples},
        quick=quick,
        repetitions=repetitions,
        baseline_machine=None if baseline is None else baseline.get("machine", {}),
    )


def _line(one: Measured) -> Line:
    samples = one.samples
    num_requests = one.case.num_requests
    tokens = samples[0].get("output_tokens")
    startups = [sample["startup_s"] for sample in samples if "startup_s" in sample]
    uses = [sample["cpu_use"] for sample in samples if "cpu_use" in sample]
    seconds = median(sample["seconds"] for sample in samples)
    return Line(
        case=one.case,
        seconds=seconds,
        speeds=tuple(num_requests / sample["seconds"] for sample in samples),
        tokens_per_s=None if tokens is None else tokens / seconds,
        peak_bytes=median(sample["peak_bytes"] for sample in samples),
        startup_s=median(startups) if startups else None,
        cpu_use=median(uses) if uses else None,
    )


def _compared(line: Line, lines: Mapping[str, Line], before: Mapping[str, Any]) -> Line:
    """The line with its ratios; the floor is compared by the token, as lengths may differ."""
    floor = lines.get(cases.nearest_floor(line.case.num_requests))
    times_floor = None
    if line.tokens_per_s and floor is not None and floor.tokens_per_s:
        times_floor = floor.tokens_per_s / line.tokens_per_s
    stored = before.get(line.case.name, {}).get("seconds")
    vs_baseline = stored / line.seconds if stored else None
    return replace(line, times_floor=times_floor, vs_baseline=vs_baseline)


@dataclass(frozen=True)
class Growth:
    """How seconds a request grow over the sizes; None where the largest was not measured."""

    name: str
    first: float
    last: float | None
    whole: float | None


def growth(results: Results) -> list[Growth]:
    """Seconds a request at a larger size over those at a smaller one, for each policy."""
    found = []
    for policy in cases.POLICIES:
        for batching in ("continuous", "chunked"):
            for records in (True, False):
                names = [cases.single_name(policy, batching, records, n) for n in cases.SIZES]
                small, middle, large = (results.line(name) for name in names)
                if small is None or middle is None:
                    continue
                found.append(
                    Growth(
                        f"{policy} {batching} {'records' if records else 'play'}",
                        _growth(small, middle),
                        _growth(middle, large) if large else None,
                        _growth(small, large) if large else None,
                    )
                )
    return found


def _growth(small: Line, large: Line) -> float:
    return large.seconds_per_request / small.seconds_per_request


def bars(results: Results) -> list[Bar]:
    """Every promise with its verdict."""
    found = []
    for batching in ("continuous", "chunked"):
        line = results.line(cases.single_name("helios", batching, True, cases.HEADLINE_SIZE))
        what = f"helios, {batching}, records, 1,000,000 requests: "
        found += [
            _bar(
                f"{what}at least {MIN_REQUESTS_PER_S:,.0f} requests/s",
                line,
                lambda one: (
                    f"{one.requests_per_s:,.0f} requests/s",
                    MIN_REQUESTS_PER_S / one.requests_per_s,
                ),
            ),
            _bar(
                f"{what}within {MAX_TIMES_FLOOR:g}x of the floor",
                line if line and line.times_floor else None,
                lambda one: (
                    f"{one.times_floor:.2f}x",
                    (one.times_floor or 0.0) / MAX_TIMES_FLOOR,
                ),
            ),
            _bar(
                f"{what}at most {MAX_BYTES_PER_REQUEST:g} B a request above 300 MB",
                line,
                _memory,
            ),
        ]
    found += [
        _bar(
            f"First call, compilation included, under {MAX_FIRST_CALL_S:g} s",
            results.line(cases.FIRST_CALL),
            lambda one: (f"{one.seconds:.1f} s", one.seconds / MAX_FIRST_CALL_S),
        ),
        _bar(
            f"Later calls start in under {MAX_LATER_CALL_S:g} s",
            results.line(cases.LATER_CALL),
            lambda one: (f"{one.seconds:.2f} s", one.seconds / MAX_LATER_CALL_S),
        ),
        _bar(
            f"8 replicas, least-outstanding: at least {MIN_FLEET_REQUESTS_PER_S:,.0f} requests/s",
            results.line(cases.fleet_name("helios", 8, "least-outstanding")),
            lambda one: (
                f"{one.requests_per_s:,.0f} requests/s",
                MIN_FLEET_REQUESTS_PER_S / one.requests_per_s,
            ),
        ),
        _fleet_growth(results),
        _linearity(results),
        _bar(
            f"A sweep over 2 processes uses {MIN_CPU_USE:.0%} of two cores",
            results.line(cases.SWEEP),
            lambda one: (f"{one.cpu_use or 0.0:.0%}", MIN_CPU_USE / (one.cpu_use or 1e-9)),
        ),
    ]
    return found


def _bar(promise: str, line: Line | None, judge: Callable[[Line], tuple[str, float]]) -> Bar:
    if line is None:
        return Bar(promise, "", None)
    return Bar(promise, *judge(line))


def _memory(line: Line) -> tuple[str, float]:
    per_request = (line.peak_bytes - BASE_BYTES) / line.case.num_requests
    return f"{per_request:,.0f} B", per_request / MAX_BYTES_PER_REQUEST


def _fleet_growth(results: Results) -> Bar:
    """Each arrival is routed once, so seconds an arrival must not grow with the replicas."""
    promise = f"64 replicas: seconds an arrival as with 8, least-outstanding (within {NOISE:g}x)"
    few, many = (results.line(cases.fleet_name("helios", n, "least-outstanding")) for n in (8, 64))
    if few is None or many is None:
        return Bar(promise, "", None)
    ratio = _growth(few, many)
    return Bar(promise, f"{ratio:.2f}x", ratio / NOISE)


def _linearity(results: Results) -> Bar:
    """Judged by the worst of all policies; the fixed part of a run makes small ones dearer."""
    promise = f"Time grows linearly from 10,000 to 1,000,000 requests (within {NOISE:g}x)"
    steps = [
        (max(step.first, step.last, step.whole), step.name)
        for step in growth(results)
        if step.last is not None and step.whole is not None
    ]
    if not steps:
        return Bar(promise, "", None)
    worst, name = max(steps)
    return Bar(promise, f"{worst:.2f}x at most ({name})", worst / NOISE)


def document(results: Results) -> dict[str, Any]:
    """The run as plain data: what `--json` writes and `--baseline` reads."""
    return {
        "machine": dict(results.machine),
        "quick": results.quick,
        "repetitions": results.repetitions,
        "capacity_per_s": dict(results.capacity_per_s),
        "cases": {line.case.name: _case_document(line, results) for line in results.lines},
        "failures": dict(results.failures),
        "bars": [
            {"promise": bar.promise, "measured": bar.measured, "verdict": bar.verdict}
            for bar in bars(results)
        ],
    }


def _case_document(line: Line, results: Results) -> dict[str, Any]:
    samples = results.samples[line.case.name]
    parts_s = {
        part: median(sample["parts_s"][part] for sample in samples)
        for part in samples[0].get("parts_s", {})
    }
    figures = {
        "num_requests": line.case.num_requests,
        "seconds": line.seconds,
        "fastest_s": min(sample["seconds"] for sample in samples),
        "slowest_s": max(sample["seconds"] for sample in samples),
        "requests_per_s": line.requests_per_s,
        "output_tokens_per_s": line.tokens_per_s,
        "peak_bytes": line.peak_bytes,
        "startup_s": line.startup_s,
        "cpu_use": line.cpu_use,
        "times_floor": line.times_floor,
        "num_decisions": samples[0].get("num_decisions"),
        "parts_s": parts_s or None,
    }
    return _rounded({name: value for name, value in figures.items() if value is not None})


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures to five digits, which is more than two runs agree in."""
    rounded: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rounded[name] = _rounded(value)
        else:
            rounded[name] = float(f"{value:.5g}") if isinstance(value, float) else value
    return rounded


def read_baseline(path: Path) -> dict[str, Any] | None:
    """A stored run, if there is one; raises `ValueError` for a file that --json did not write."""
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    held = stored.get("cases") if isinstance(stored, dict) else None
    if not isinstance(held, dict) or not all(isinstance(one, dict) for one in held.values()):
        raise ValueError("it holds no cases")
    return dict(stored)


def write_document(results: Results, path: Path) -> None:
    """Write the run as JSON."""
    text = json.dumps(document(results), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
