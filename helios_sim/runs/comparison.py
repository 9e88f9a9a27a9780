"""Runs of one workload compared: figure by figure, and where that can be request by request."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import polars as pl

from helios_sim.errors import InputError
from helios_sim.runs.latencies import Floats, columns_of, meets_all
from helios_sim.runs.metrics import batch_interval, possible_range, summarise
from helios_sim.runs.records import TOKENIZERS, RunData
from helios_sim.settings.slo import parse_slo

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference to the first run on the same requests, with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparisonRow:
    """One figure across runs.

    `better` is "higher" or "lower", or None where neither is better. `ratios` are to the first
    run; `best` are the positions of the best value; `differences` are paired by request and None
    where the figure is not a mean over requests.
    """

    key: str
    title: str
    unit: str
    group: str
    better: Better | None
    values: tuple[float | str | None, ...]
    ratios: tuple[float | None, ...]
    best: tuple[int, ...]
    differences: tuple[PairedDifference | None, ...]


COMPARED: Final[tuple[tuple[str, str, str, str, Better | None], ...]] = (
    ("output_throughput", "Output tokens", "tokens/s", "Load", "higher"),
    ("request_throughput", "Requests finished", "requests/s", "Load", "higher"),
    ("request_goodput", "Goodput", "requests/s", "Load", "higher"),
    ("slo_attainment", "SLO attainment", "%", "Load", "higher"),
    ("num_refused", "Refused", "", "Load", "lower"),
    ("num_unfinished", "Unfinished", "", "Load", "lower"),
    ("saturation", "Saturation", "", "Load", None),
    ("mean_ttft_ms", "TTFT, mean", "ms", "Latency", "lower"),
    ("median_ttft_ms", "TTFT, median", "ms", "Latency", "lower"),
    ("p99_ttft_ms", "TTFT, p99", "ms", "Latency", "lower"),
    ("mean_tpot_ms", "TPOT, mean", "ms", "Latency", "lower"),
    ("median_tpot_ms", "TPOT, median", "ms", "Latency", "lower"),
    ("p99_tpot_ms", "TPOT, p99", "ms", "Latency", "lower"),
    ("p99_itl_ms", "ITL, p99", "ms", "Latency", "lower"),
    ("mean_e2el_ms", "E2E, mean", "ms", "Latency", "lower"),
    ("median_e2el_ms", "E2E, median", "ms", "Latency", "lower"),
    ("p99_e2el_ms", "E2E, p99", "ms", "Latency", "lower"),
    ("energy_per_output_token", "Energy per output token", "J", "Energy", "lower"),
    ("average_gpu_power", "Power, mean", "W", "Energy", "lower"),
    ("mean_batch_size", "Batch size, mean", "", "Memory and batching", None),
    ("max_batch_size_supported", "Batch size supported", "", "Memory and batching", "higher"),
    ("weight_bytes_loaded", "Weights loaded, mean", "GiB", "Memory and batching", "lower"),
    ("num_preemptions", "Preemptions", "", "Memory and batching", "lower"),
    ("mean_executed_layers", "Executed layers, mean", "", "Exits and quality", "lower"),
    ("agreement", "Agreement with full depth", "%", "Exits and quality", "higher"),
    ("perplexity", "Perplexity", "", "Exits and quality", "lower"),
    ("breach_rate", "Breaches, relative", "%", "Exits and quality", "lower"),
    ("num_evaluations", "Evaluations", "", "Decisions", None),
    ("num_switches", "Switches", "", "Decisions", None),
    ("num_loads", "Loads of more layers", "", "Decisions", None),
    ("switch_time_s", "Serves, switches, loads", "s", "Decisions", None),
)
"""Figures that a comparison shows: key, title, unit, group, and which direction is better."""

_OF_OTHER_WORK: Final = frozenset({"switch_time_s"})
"""Figures without a ratio, since they leave out what a policy that evaluates first loads for it."""

_LESS_IS_BETTER: Final = frozenset(
    {
        "failed",
        "duration",
        "max_concurrent_requests",
        "mean_running",
        "weight_bytes_peak",
        "total_gpu_energy",
        "energy_per_request",
        "energy_idle_j",
        "energy_load_j",
        "breach_rate_observed",
        "num_breach_events",
        "num_switches",
        "num_loads",
        "num_evaluations",
        "switch_time_s",
        "backlog_growth_per_s",
        "drain_after_arrivals_s",
    }
)
"""Figures of which less counts as the gain though COMPARED does not say so.

Of figures that stand neither here nor there, latencies aside, more counts as the gain.
"""


_NEARLY: Final = 1e-3
"""Share of a figure by which two values may differ and still be level."""


def gain(key: str, own: float, other: float) -> float | None:
    """How many times better a figure is than another one's; None over nothing."""
    better = next((one[4] for one in COMPARED if one[0] == key), None)
    lower = better == "lower" or key.endswith("_ms") or key in _LESS_IS_BETTER
    below, above = (own, other) if lower else (other, own)
    return above / below if below else None


def seed_by_seed(
    key: str, own: Mapping[str, Any], other: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """A figure of two runs replicated over the same seeds, in pairs of one seed.

    Seeds under which either lacks the figure have no pair.
    """
    columns = []
    for summary in (own, other):
        figure = (summary.get("replications") or {}).get("figures", {}).get(key) or {}
        columns.append(figure.get("values", ()))
    pairs = zip(*columns, strict=False)
    return [(one, two) for one, two in pairs if one is not None and two is not None]


def ratios_over_seeds(
    key: str, own: Mapping[str, Any], base: Mapping[str, Any]
) -> tuple[float, float, float] | None:
    """The least, the median and the largest ratio to another run of the same seed.

    None unless there is one under every seed.
    """
    if key in _OF_OTHER_WORK or not counts_alike(key, own, base):
        return None
    pairs = seed_by_seed(key, own, base)
    num_seeds = len((own.get("replications") or {}).get("seeds", ()))
    if not pairs or len(pairs) < num_seeds or not all(two for _, two in pairs):
        return None
    ratios = [one / two for one, two in pairs]
    if not all(map(math.isfinite, ratios)):
        return None
    return min(ratios), statistics.median(ratios), max(ratios)


_AMOUNTS: Final = {
    "output_throughput": "total_output_tokens",
    "request_throughput": "completed",
    "request_goodput": "slo_attainment",
}
"""Rates over the whole run, each with the figure that runs agree in where they do the same work."""

SCALE: Final = {
    "slo_attainment": 100.0,
    "agreement": 100.0,
    "breach_rate": 100.0,
    "mean_kv_use": 100.0,
    "breach_rate_observed": 100.0,
    "energy_per_output_token": 1e-3,
}
"""Factors from a summary's unit to the unit a comparison shows; bytes are in `BYTES_IN`."""

BYTES_IN: Final = {"GiB": 2.0**-30, "MiB": 2.0**-20}


def factor_to(unit: str, key: str) -> float:
    """The factor from a value of a summary to a unit that comparisons show it in."""
    return BYTES_IN.get(unit, SCALE.get(key, 1.0))


def shown_in(key: str, unit: str, values: Iterable[Any]) -> tuple[str, float]:
    """The unit in which a row shows these values of a summary, and the factor to it.

    Weights are shown in GiB, in MiB where none of the row fills one.
    """
    if unit == "GiB":
        most = max((one for one in values if one is not None), default=0.0)
        if 0.0 < most < 2.0**30:
            unit = "MiB"
    return unit, factor_to(unit, key)


def comparison_rows(
    summaries: Sequence[Mapping[str, Any]],
    differences: Mapping[str, tuple[PairedDifference | None, ...]] | None = None,
) -> list[ComparisonRow]:
    """The figures of several runs side by side, the first being the one ratios refer to."""
    rows = []
    for key, title, usual, group, better in COMPARED:
        unit, scale = shown_in(key, usual, [summary.get(key) for summary in summaries])
        values: list[float | str | None] = []
        for summary in summaries:
            value = summary.get(key)
            number = isinstance(value, int | float)
            values.append(value * scale if number and value is not None else value)
        if all(value is None for value in values):
            continue
        numbers = [value if isinstance(value, int | float) else None for value in values]
        base = None if key in _OF_OTHER_WORK else numbers[0]
        alike = [counts_alike(key, summaries[0], summary) for summary in summaries]
        ratios = tuple(
            value / base if value is not None and base and same else None
            for value, same in zip(numbers, alike, strict=True)
        )
        rows.append(
            ComparisonRow(
                key,
                title,
                unit,
                group,
                better,
                tuple(values),
                ratios,
                _best(key, numbers, better if all(alike) else None, summaries),
                (differences or {}).get(key, (None,) * len(values)),
            )
        )
    return rows


def counts_alike(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a figure of two runs compares: perplexities do unless their tokenizers differ."""
    if key != "perplexity":
        return True
    known = [run.get(TOKENIZERS) for run in (one, other)]
    return None in known or known[0] == known[1]


def _best(
    key: str,
    values: Sequence[float | None],
    better: Better | None,
    summaries: Sequence[Mapping[str, Any]],
) -> tuple[int, ...]:
    """Positions of the best value and of those level with it; none where all are.

    Level is what is within 0.1 %, a rate that only the last answers tell from the best, and
    whatever lies between these and the best.
    """
    known = [value for value in values if value is not None]
    if better is None or len(known) < 2:
        return ()
    best = max(known) if better == "higher" else min(known)
    leader = summaries[values.index(best)]
    furthest = max(
        abs(value - best)
        for value, summary in zip(values, summaries, strict=True)
        if value is not None and (nearly_equal(value, best) or carry_alike(key, summary, leader))
    )
    places = tuple(
        place
        for place, value in enumerate(values)
        if value is not None and abs(value - best) <= furthest
    )
    return () if len(places) == len(known) else places


def nearly_equal(a: float, b: float) -> bool:
    """Whether two values of a figure are within 0.1 % of each other."""
    return math.isclose(a, b, rel_tol=_NEARLY)


def carry_alike(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs carry the same load, so that a rate of theirs differs by the drain alone.

    Rates are per second of the whole run, and its last answers come after the last arrival: the
    faster of two policies that both keep up has the higher rate, though no more was asked of it.
    The load is the same where as many requests arrived in the same time, as they do in an open
    loop. It says nothing of a burst, whose requests arrive in less time than their answers take.
    """
    amount = _AMOUNTS.get(key)
    if amount is None or one.get("num_requests") != other.get("num_requests"):
        return False
    amounts, spans_s, durations_s = [], [], []
    for run in (one, other):
        done, drain_s, duration_s = (
            run.get(name) for name in (amount, "drain_after_arrivals_s", "duration")
        )
        if run.get("saturation") != "stable" or run.get("num_unfinished"):
            return False
        if done is None or drain_s is None or duration_s is None or 2 * drain_s > duration_s:
            return False
        amounts.append(done)
        spans_s.append(duration_s - drain_s)
        durations_s.append(duration_s)
    least, most = min(amounts), max(amounts)
    by_drain = most * min(durations_s) <= (1.0 + _NEARLY) * least * max(durations_s)
    return nearly_equal(*spans_s) and by_drain and 0 < most <= 1.02 * least


def compare(
    runs: Sequence[RunData],
    summaries: Sequence[Mapping[str, Any]] | None = None,
    names: Sequence[str] | None = None,
) -> list[ComparisonRow]:
    """Compare runs of one workload figure by figure, paired request by request where possible.

    Runs of different workloads or schema versions are refused: their requests are not the same.
    Errors call the runs by `names`, such as their folders, or else by their labels.
    """
    check_comparable(runs, names)
    given = [summarise(run) for run in runs] if summaries is None else list(summaries)
    if len(given) != len(runs):
        raise InputError(f"{len(runs)} runs were given with {len(given)} summaries.")
    return comparison_rows(given, paired_differences(runs, given))


def check_comparable(runs: Sequence[RunData], names: Sequence[str] | None = None) -> None:
    """Raise `InputError` with the reason unless the runs served the same requests."""
    if not runs:
        raise InputError("There is nothing to compare: no run was given.")
    first = runs[0]
    labels = names or distinct_labels([run.label for run in runs])
    columns = ["request_id", "domain", "prompt_tokens", "output_tokens", "trace_start"]
    if not any(run.closed_loop for run in runs):
        columns.append("arrival_s")
    for run, label in zip(runs, labels, strict=True):
        if run.requests.height == 0:
            raise InputError("The run is empty: it holds no request.", label)
        if run.schema_version != first.schema_version:
            raise InputError(
                f"{label} has schema version {run.schema_version} and {labels[0]} has "
                f"{first.schema_version}; runs are compared within one version."
            )
        if run.requests.height != first.requests.height:
            raise InputError(
                f"{label} holds {_counted(run.requests.height)} and {labels[0]} holds "
                f"{_counted(first.requests.height)}; runs are compared on the same requests."
            )
    reference = first.requests.select(columns).sort("request_id")
    for run, label in zip(runs[1:], labels[1:], strict=True):
        other = run.requests.select(columns).sort("request_id")
        for name in columns:
            if not other[name].equals(reference[name]):
                raise InputError(
                    f"The column {name} of {label} differs from that of {labels[0]}, so the runs "
                    "are of different workloads; runs are compared on the same requests."
                )


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """The labels in order, those met before with a number: vanilla, vanilla (2)."""
    told: list[str] = []
    for label in labels:
        own, again = label, 1
        while own in told:
            again += 1
            own = f"{label} ({again})"
        told.append(own)
    return told


def _counted(num_requests: int) -> str:
    return f"{num_requests} request{'s' if num_requests != 1 else ''}"


def paired_differences(
    runs: Sequence[RunData], summaries: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[PairedDifference | None, ...]]:
    """For each figure that is a mean over requests, its paired difference to the first run.

    A pair is a request measured in both runs; for latencies, finished in both. Intervals come
    from batches of consecutive arrivals, since neighbours in a queue are not independent.
    """
    tables = [
        _per_request(run, summary).sort("request_id")
        for run, summary in zip(runs, summaries, strict=True)
    ]
    order = np.argsort(runs[0].requests.sort("request_id")["arrival_s"].to_numpy(), kind="stable")
    found: dict[str, tuple[PairedDifference | None, ...]] = {}
    for key in tables[0].columns:
        if key == "request_id":
            continue
        base = tables[0][key].to_numpy()[order]
        row: list[PairedDifference | None] = [None]
        for table in tables[1:]:
            if key not in table.columns:
                row.append(None)
                continue
            difference = table[key].to_numpy()[order] - base
            pairs = difference[~np.isnan(difference)]
            row.append(_paired_difference(key, pairs))
        found[key] = tuple(row)
    return found


def _paired_difference(key: str, pairs: Floats) -> PairedDifference | None:
    """Mean and interval of a figure's differences, in the unit that a comparison shows."""
    interval = batch_interval(pairs)
    if interval is None:
        return None
    least, most = possible_range(key)
    # Two values of a figure are at most its whole range apart.
    low = max(least - most, interval["low"])
    high = min(most - least, interval["high"])
    scale = SCALE.get(key, 1.0)
    return PairedDifference(interval["mean"] * scale, low * scale, high * scale)


def _per_request(run: RunData, summary: Mapping[str, Any]) -> pl.DataFrame:
    columns = columns_of(run, summary.get("warmup_s", 0.0), summary.get("warmup_requests", 0))
    counted = columns.measured & columns.finished
    values: dict[str, Any] = {
        "request_id": columns.request_id,
        "mean_ttft_ms": np.where(counted, 1e3 * columns.ttft_s, math.nan),
        "mean_tpot_ms": np.where(counted & columns.several_tokens, 1e3 * columns.tpot_s, math.nan),
        "mean_e2el_ms": np.where(counted, 1e3 * columns.e2e_s, math.nan),
    }
    text = summary.get("slo")
    if text:
        good = meets_all(columns, parse_slo(text)).astype(np.float64)
        values["slo_attainment"] = np.where(columns.measured, good, math.nan)
    return pl.DataFrame(values)
