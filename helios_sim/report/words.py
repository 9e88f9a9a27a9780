"""Figures as text: numbers as people read them, and the sentences that answer the question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helios_sim.slo import parse_slo

Summary = Mapping[str, Any]


def number(value: float | str | None, digits: int = 3) -> str:
    """A figure with about so many significant digits; a dash where it is undefined."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, str):
        return value
    if value == int(value):
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 1:
        whole_digits = len(str(int(size)))
        return f"{value:,.{max(0, digits - whole_digits)}f}"
    return f"{value:.{digits}g}" if size >= 1e-3 else f"{value:.1e}"


def times(ratio: float | None) -> str:
    """A ratio as '1.32x', with the multiplication sign; empty where it is undefined."""
    if ratio is None:
        return ""
    if 0 < ratio < 0.1:
        return (
            f"{ratio:.1g}\N{MULTIPLICATION SIGN}"
            if ratio >= 1e-3
            else "<0.001\N{MULTIPLICATION SIGN}"
        )
    digits = 0 if ratio >= 100 else 1 if ratio >= 10 else 2
    return f"{ratio:.{digits}f}\N{MULTIPLICATION SIGN}"


def limits(text: str) -> str:
    """An SLO's text as people read it: 'TTFT p95 at most 500 ms, ...', with the sign for it."""
    said = []
    for limit in parse_slo(text).limits:
        at = "" if limit.percentile is None else f" p{limit.percentile:g}"
        said.append(f"{limit.metric.upper()}{at} \N{LESS-THAN OR EQUAL TO} {span(limit.limit_s)}")
    return ", ".join(said)


def span(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if 0.0 < seconds < 1.0:
        return f"{number(1e3 * seconds)} ms"
    if seconds < 120.0:
        return f"{number(seconds)} s"
    if seconds < 7200.0:
        return f"{number(seconds / 60.0)} min"
    return f"{number(seconds / 3600.0)} h"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024.0:
            return f"{number(num_bytes)} {unit}"
        num_bytes /= 1024.0
    return f"{number(num_bytes)} GiB"


def listed(names: Sequence[str]) -> str:
    """Names as 'a, b and c'."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def counted(num: int | float, noun: str) -> str:
    """A number of things: '1 GPU', '3 processors'."""
    return f"{number(num)} {noun}{'' if num == 1 else 's'}"


def device_of(environment: Mapping[str, Any]) -> str:
    """What a run's device is: GPU, or processor where its records say so."""
    kind = environment.get("device_kind") or environment.get("device") or ""
    return "processor" if str(kind).split(" ")[0] in ("processor", "cpu") else "GPU"


def device_of_all(are_processors: Iterable[bool]) -> str:
    """What several devices are called: GPU, processor, or device where they are of both kinds."""
    kinds = set(are_processors)
    return "device" if len(kinds) > 1 else "processor" if True in kinds else "GPU"


def headline(summaries: Sequence[Summary]) -> str:
    """The answer in one sentence: who carries the load, by how much, at what figure."""
    if len(summaries) == 1:
        return _single(summaries[0])
    first = summaries[0]
    key, noun, unit = _load_figure(summaries)
    values = [summary[key] or 0.0 for summary in summaries]
    best = max(range(len(values)), key=lambda i: (values[i], -i))
    if max(values) > 1.02 * min(values):
        most, base = values[best], values[0]
        if best > 0:
            name = summaries[best]["label"]
            if most > 20 * base:
                return f"{name} serves {number(most)} {unit}; {first['label']} only {number(base)}."
            return (
                f"{name} serves {times(most / base)} the {noun} of {first['label']}: "
                f"{number(most)} against {number(base)} {unit}."
            )
        second = max(range(1, len(values)), key=lambda i: values[i])
        return (
            f"{first['label']} serves the most {noun}, {number(most)} {unit}; "
            f"{summaries[second]['label']} comes next with {number(values[second])} "
            f"({times(values[second] / most)})."
        )
    everyone = "Both" if len(summaries) == 2 else f"All {len(summaries)}"
    carried = f"{everyone} policies carry the load of {number(values[0])} {unit}"
    figure = "median_tpot_ms"
    timed = [i for i, summary in enumerate(summaries) if summary.get(figure) is not None]
    if not timed or first.get(figure) is None:
        return f"{carried}."
    quick = min(timed, key=lambda i: (summaries[i][figure], i))
    tpot, base = summaries[quick][figure], first[figure]
    if quick == 0 or tpot > 0.98 * base:
        return (
            f"{carried}, and none is faster than {first['label']}: median TPOT {number(base)} ms."
        )
    return (
        f"{carried}; {summaries[quick]['label']} answers fastest, with a median TPOT of "
        f"{number(tpot)} ms, {times(tpot / base)} that of {first['label']} ({number(base)} ms)."
    )


def remarks(summaries: Sequence[Summary]) -> list[str]:
    """What has to be said beside the headline: latency, energy, quality, saturation, refusals."""
    found = []
    first = summaries[0]
    key, _, _ = _load_figure(summaries)
    star = max(summaries, key=lambda summary: summary[key] or 0.0)
    if len(summaries) > 1 and star is first:
        others = [one for one in summaries[1:] if one.get("median_tpot_ms") is not None]
        star = min(others, key=lambda one: one["median_tpot_ms"]) if others else summaries[1]
    name, against = star["label"], first["label"]
    compared = star is not first

    def beside(figure: str, scale: float = 1.0, digits: int = 3) -> str:
        own = number(_scaled(star.get(figure), scale), digits)
        if not compared:
            return own
        return f"{own} against {number(_scaled(first.get(figure), scale), digits)}"

    if compared:
        found.append(
            f"Latency of {name} against {against}: median TTFT {beside('median_ttft_ms')} ms, "
            f"p99 TTFT {beside('p99_ttft_ms')} ms, median TPOT {beside('median_tpot_ms')} ms."
        )
    if star.get("slo") and compared:
        found.append(
            f"SLO ({limits(star['slo'])}): met by {beside('slo_attainment', 100.0)} % of the "
            "requests sent."
        )
    if star.get("energy_per_output_token") is not None:
        found.append(
            f"Energy: an output token of {name} costs {beside('energy_per_output_token', 1e-3)} J, "
            "idling included."
        )
    agreement = star.get("agreement")
    if agreement is not None and agreement < 0.9995:
        found.append(
            f"Quality: {number(100 * agreement)} % of the tokens of {name} equal those of the same "
            f"model at full depth; perplexity {beside('perplexity', digits=4)}."
        )
    extrapolated = beyond_measured([str(one["label"]) for one in summaries], summaries)
    if extrapolated is not None:
        found.append(extrapolated)
    overloaded = [one["label"] for one in summaries if one.get("saturation") == "overloaded"]
    if overloaded:
        found.append(
            f"Overloaded: {listed(overloaded)}. The backlog grew while requests arrived, so "
            "latencies there depend on the length of the run."
        )
    refused = [
        f"{one['label']} {number(one['num_refused'])}" for one in summaries if one["num_refused"]
    ]
    if refused:
        found.append(f"Refused requests, which no SLO forgives: {listed(refused)}.")
    return found


def beyond_measured(names: Sequence[str], summaries: Sequence[Summary]) -> str | None:
    """Which runs leave the range that was measured and by what; None where none does."""
    return extrapolated(
        [
            (name, summary.get("beyond_measured") or ())
            for name, summary in zip(names, summaries, strict=True)
        ]
    )


def extrapolated(named: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """The same of anything that has a name and clauses; beyond three only how many there are."""
    found = [f"{name} ({'; '.join(clauses)})" for name, clauses in named if clauses]
    if not found:
        return None
    if len(found) > 4:
        found = [*found[:3], f"{len(found) - 3} more"]
    return f"Extrapolated beyond what was measured: {listed(found)}."


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _load_figure(summaries: Sequence[Summary]) -> tuple[str, str, str]:
    """What 'carrying the load' is measured by: goodput under an SLO, tokens otherwise."""
    if all(summary.get("request_goodput") is not None for summary in summaries) and any(
        summary["request_goodput"] for summary in summaries
    ):
        return "request_goodput", "goodput", "requests/s within the SLO"
    return "output_throughput", "tokens", "tokens/s"


def _single(summary: Summary) -> str:
    sentence = (
        f"{summary['label']} serves {number(summary['output_throughput'])} tokens/s "
        f"({number(summary['request_throughput'])} requests/s) at a median TTFT of "
        f"{number(summary['median_ttft_ms'])} ms and TPOT of {number(summary['median_tpot_ms'])} ms"
    )
    if summary.get("slo_attainment") is not None:
        met = number(100 * summary["slo_attainment"])
        sentence += f"; {met} % of the requests sent meet the SLO"
    return f"{sentence}; the system is {summary['saturation']}."
