"""Records become figures: latency, goodput, energy, quality, with intervals and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.special import stdtrit

from helios_sim.errors import InputError
from helios_sim.records import SCHEMA_VERSION, RunData
from helios_sim.slo import SloLimit, SloSpec, parse_slo, reaches

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

NUM_BATCHES: Final = 20
CONFIDENCE: Final = 0.95
LATENCIES: Final = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}
"""SLO metric names, and the name of each in the summary's keys."""

DEFINITIONS: Final[dict[str, str]] = {
    "schema_version": "version of the run's files",
    "label": "name of the run",
    "policy": "policy that was asked",
    "objective": "service level objective the policy optimises for",
    "origin": "simulated, or measured on a real backend",
    "seed": "seed of the run's random numbers",
    "num_replicas": "replicas that served",
    "num_gpus": "GPUs they used",
    "duration": "seconds from the start of the run to its last event",
    "num_requests": "requests sent in the whole run",
    "completed": "requests that finished in the whole run",
    "failed": "requests that did not finish: refused, or still in the system at the end",
    "num_refused": "requests refused because they can never fit",
    "num_unfinished": "requests running or waiting at the end",
    "num_preemptions": "times a request was preempted or recomputed",
    "warmup_s": "arrivals before this second are left out of the measured requests",
    "warmup_requests": "so many first arrivals are left out of the measured requests",
    "num_measured": "requests sent after the warm-up",
    "total_input_tokens": "prompt tokens of requests that emitted a token, whole run",
    "total_output_tokens": "tokens emitted in the whole run",
    "request_throughput": "requests finished per second of the whole run",
    "request_goodput": "requests per second of the whole run that finished and met every limit",
    "output_throughput": "tokens emitted per second of the whole run",
    "total_token_throughput": "prompt and output tokens per second of the whole run",
    "max_concurrent_requests": "most requests in the system (waiting or running) at once",
    "mean_running": "running requests, averaged over the whole run and all replicas together",
    "mean_wait_ms": "mean time from arrival to admission of measured, admitted requests",
    "ttft_ms": "arrival to first token, queueing included; measured, finished requests",
    "tpot_ms": "(E2E - TTFT) / (output tokens - 1) per request; measured, finished requests of two "
    "or more tokens",
    "itl_ms": "gaps between consecutive tokens, pooled over every request of the whole run; "
    "percentiles from bins about 1 % wide, mean and deviation exact",
    "e2el_ms": "arrival to last token; measured, finished requests",
    "slo": "the limits, written out; null without an SLO",
    "slo_attainment": "share of the measured requests sent that finished and met every limit",
    "slo_attainment_by_metric": "the same for each metric alone",
    "slo_limits": "each limit with its own attainment; a percentile limit passes when at least "
    "that share of the measured requests sent meets it (of the pooled gaps, for ITL)",
    "slo_passed": "whether every percentile limit passes; null where none asks for a percentile",
    "total_gpu_energy": "joules of all GPUs over the whole run, idling included",
    "average_gpu_power": "watts of all GPUs together: total_gpu_energy / duration",
    "energy_per_output_token": "millijoules (joules on the page): total_gpu_energy over the tokens "
    "emitted",
    "energy_per_request": "joules: total_gpu_energy over the requests finished",
    "output_tokens_per_joule": "tokens emitted over total_gpu_energy",
    "energy_idle_j": "joules spent while no iteration ran and none was held up by weights on their "
    "way",
    "energy_load_j": "joules spent while iterations were held up by weights on their way; of "
    "weights that arrive beside them what moving draws above idle power, in simulated runs",
    "mean_executed_layers": "layers executed per decoded token (prefill tokens left out)",
    "exit_histogram": "share of all decoded tokens by the model and exit layer they left at",
    "agreement": "share of the emitted tokens equal to those of the same model at full depth",
    "perplexity": "exp of the mean negative log-likelihood (nats) of the true token at each "
    "emitted position",
    "breach_rate": "share of the emitted tokens below the confidence threshold at the loaded depth "
    "that a deeper exit of the same model would have satisfied",
    "breach_rate_observed": "share of the emitted tokens below the confidence threshold at a "
    "loaded depth under full depth, whether or not deeper exits would have satisfied it",
    "num_breach_events": "times the breaches in the window exceeded its limit and the policy was "
    "asked",
    "mean_batch_size": "requests that decode together per decode iteration; under rebatch a part "
    "of those that run",
    "max_batch_size": "most requests running at once on one replica",
    "max_batch_size_supported": "requests of the workload's mean length that fit on one replica "
    "beside the weights, at the model and depth that served longest",
    "weight_bytes_loaded": "bytes of weights loaded on a replica, averaged over time; those still "
    "arriving are left out",
    "weight_bytes_peak": "most bytes of weights on a replica at once, those arriving beside "
    "running requests included",
    "mean_kv_use": "share of the KV blocks in use, averaged over time",
    "num_switches": "times another model was brought in to serve",
    "num_loads": "decisions `load-layers` that were carried out",
    "num_evaluations": "evaluations of candidates on real requests",
    "switch_time_s": "seconds from each decision to load, switch or serve until it was carried "
    "out, summed over replicas; a replica may serve or drain in the meantime. The first load is in "
    "it where a policy serves at once; evaluations are not, nor the first load where a policy "
    "evaluates first",
    "depth_share": "share of serving time by model and loaded layers",
    "regime": "share of busy time whose layer time is bound by launch, memory or compute",
    "time_shares": "seconds busy, idle and loading over all replicas' time; draining and "
    "evaluating are shares of the same time and overlap them",
    "saturation": "stable, backlogged or overloaded",
    "backlog_growth_per_s": "requests by which the backlog grew each second of the arrival span "
    "(slope of the regression)",
    "drain_after_arrivals_s": "seconds from the last arrival until the system was empty "
    "(estimated from the finish rate where the run ended before)",
    "intervals": "95 % confidence intervals from 20 batches of consecutive arrivals (batch means, "
    "Student t; cut to what the figure can be); null with fewer than 40 requests",
}
"""What every key of a summary means; `ttft_ms` stands for mean_, median_, std_, p50_ ... p99_."""

_SHARES: Final = frozenset(
    {
        *("slo_attainment", "slo_attainment_by_metric", "agreement", "breach_rate"),
        *("breach_rate_observed", "mean_kv_use", "exit_histogram", "depth_share", "regime"),
        "time_shares",
    }
)
"""Figures between 0 and 1, and groups of such."""

Saturation = Literal["stable", "backlogged", "overloaded"]


@dataclass(frozen=True)
class Columns:
    """A run's request columns as numpy arrays, in order of arrival, times NaN where null."""

    request_id: npt.NDArray[np.int64]
    arrival_s: Floats
    admitted_s: Floats
    first_token_s: Floats
    finished_s: Floats
    generated: npt.NDArray[np.int64]
    finished: Bools
    refused: Bools
    measured: Bools
    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats

    @property
    def several_tokens(self) -> Bools:
        """Requests that emitted two tokens or more, so that they have a TPOT."""
        return self.generated > 1


@dataclass(frozen=True)
class Verdict:
    """Whether the system carried the load, and the two numbers that say so."""

    saturation: Saturation
    growth_per_s: float
    drain_s: float


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
    better: Literal["higher", "lower"] | None
    values: tuple[float | str | None, ...]
    ratios: tuple[float | None, ...]
    best: tuple[int, ...]
    differences: tuple[PairedDifference | None, ...]


def columns_of(run: RunData, warmup_s: float = 0.0, warmup_requests: int = 0) -> Columns:
    """Take what the figures need out of the request table."""
    requests = run.requests
    if requests.height == 0:
        raise InputError("The run is empty: it holds no request.", run.label)
    if not (math.isfinite(warmup_s) and warmup_s >= 0.0) or warmup_requests < 0:
        raise InputError(
            f"The warm-up was given as measure.warmup_s = {warmup_s} and measure.warmup_requests = "
            f"{warmup_requests}; allowed are 0 or more of each.",
            run.label,
        )
    arrival_s = requests["arrival_s"].to_numpy()
    if bool(np.any(arrival_s[1:] < arrival_s[:-1])):
        requests = requests.sort("arrival_s", "request_id", maintain_order=True)
        arrival_s = requests["arrival_s"].to_numpy()

    def times(name: str) -> Floats:
        return requests[name].cast(pl.Float64).fill_null(math.nan).to_numpy()

    admitted_s, first_s, finished_s = (
        times("admitted_s"),
        times("first_token_s"),
        times("finished_s"),
    )
    generated = requests["generated_tokens"].cast(pl.Int64).to_numpy()
    e2e_s = finished_s - arrival_s
    ttft_s = first_s - arrival_s
    return Columns(
        request_id=requests["request_id"].cast(pl.Int64).to_numpy(),
        arrival_s=arrival_s,
        admitted_s=admitted_s,
        first_token_s=first_s,
        finished_s=finished_s,
        generated=generated,
        finished=(requests["status"] == "finished").to_numpy(),
        refused=(requests["status"] == "refused").to_numpy(),
        measured=(arrival_s >= warmup_s) & (np.arange(len(arrival_s)) >= warmup_requests),
        ttft_s=ttft_s,
        tpot_s=(finished_s - first_s) / np.maximum(generated - 1, 1),
        e2e_s=e2e_s,
    )


def meets(columns: Columns, limit: SloLimit) -> Bools:
    """Which requests finished within one limit; one-token requests have a TPOT and ITL of 0.

    A request's ITL is judged by its mean gap, which is its TPOT.
    """
    if limit.metric == "ttft":
        value = columns.ttft_s
    elif limit.metric == "e2e":
        value = columns.e2e_s
    else:
        value = np.where(columns.several_tokens, columns.tpot_s, 0.0)
    met: Bools = columns.finished & (np.nan_to_num(value, nan=math.inf) <= limit.limit_s)
    return met


def meets_all(columns: Columns, slo: SloSpec) -> Bools:
    """Which requests finished within every limit."""
    met = columns.finished.copy()
    for limit in slo.limits:
        met &= meets(columns, limit)
    return met


def summarise(
    run: RunData,
    slo: SloSpec | None = None,
    warmup_s: float = 0.0,
    warmup_requests: int = 0,
) -> dict[str, Any]:
    """Every figure of a run under the keys of `DEFINITIONS`; None where undefined.

    Requests that arrived in the warm-up are left out of latencies, attainment and intervals.
    Throughput, goodput, energy, gaps and the policy's figures are of the whole run, since totals
    cannot be cut exactly at a request's arrival.
    """
    columns = columns_of(run, warmup_s, warmup_requests)
    measured = columns.measured
    if not bool(measured.any()):
        raise InputError(
            f"The warm-up leaves none of the {len(measured)} requests to measure: "
            f"measure.warmup_s is {warmup_s} and measure.warmup_requests is {warmup_requests}; "
            f"allowed is a warm-up that ends by the last arrival (at {columns.arrival_s[-1]} s) "
            f"and leaves out fewer than {len(measured)} requests.",
            run.label,
        )
    totals = run.totals
    finished = columns.finished
    num_finished = int(finished.sum())
    sums = run.requests.select(
        pl.col("num_preemptions", "executed_layers", "decoded_tokens", "agree_tokens").sum(),
        pl.col("generated_tokens", "nll_nats", "breaches", "breaches_relative").sum(),
        pl.col("prompt_tokens").filter(pl.col("generated_tokens") > 0).sum(),
    ).row(0, named=True)
    emitted = int(sums["generated_tokens"])
    prompts = int(sums["prompt_tokens"])
    counted = measured & finished
    waits_s = (columns.admitted_s - columns.arrival_s)[measured & ~np.isnan(columns.admitted_s)]
    verdict = saturation_of(columns, totals.end_s, run.closed_loop)
    summary: dict[str, Any] = {
        "schema_version": run.schema_version,
        "label": run.label,
        "policy": run.policy,
        "objective": run.objective,
        "origin": run.origin,
        "seed": run.seed,
        "num_replicas": totals.num_replicas,
        "num_gpus": totals.num_gpus,
        "duration": totals.end_s,
        "num_requests": len(finished),
        "completed": num_finished,
        "failed": len(finished) - num_finished,
        "num_refused": int(columns.refused.sum()),
        "num_unfinished": int((~finished & ~columns.refused).sum()),
        "num_preemptions": int(sums["num_preemptions"]),
        "warmup_s": warmup_s,
        "warmup_requests": warmup_requests,
        "num_measured": int(measured.sum()),
        "total_input_tokens": prompts,
        "total_output_tokens": emitted,
        "request_throughput": _ratio(num_finished, totals.end_s),
        "request_goodput": None,
        "output_throughput": _ratio(emitted, totals.end_s),
        "total_token_throughput": _ratio(prompts + emitted, totals.end_s),
        "max_concurrent_requests": _max_outstanding(columns),
        "mean_running": _ratio(totals.batch_seconds, totals.end_s),
        "mean_wait_ms": None if waits_s.size == 0 else 1e3 * float(waits_s.mean()),
        **_latency_figures("ttft", columns.ttft_s[counted]),
        **_latency_figures("tpot", columns.tpot_s[counted & columns.several_tokens]),
        **_gap_figures(run),
        **_latency_figures("e2el", columns.e2e_s[counted]),
        **_slo_figures(run, columns, slo),
        "total_gpu_energy": totals.energy_j,
        "average_gpu_power": _ratio(totals.energy_j, totals.end_s),
        "energy_per_output_token": _ratio(1e3 * totals.energy_j, emitted),
        "energy_per_request": _ratio(totals.energy_j, num_finished),
        "output_tokens_per_joule": _ratio(emitted, totals.energy_j),
        "energy_idle_j": totals.energy_idle_j,
        "energy_load_j": totals.energy_load_j,
        "mean_executed_layers": _ratio(sums["executed_layers"], sums["decoded_tokens"]),
        "exit_histogram": _exit_histogram(run),
        "agreement": _ratio(sums["agree_tokens"], emitted),
        "perplexity": None if emitted == 0 else _exp(sums["nll_nats"] / emitted),
        "breach_rate": _ratio(sums["breaches_relative"], emitted),
        "breach_rate_observed": _ratio(sums["breaches"], emitted),
        "num_breach_events": totals.num_breach_events,
        "mean_batch_size": _ratio(totals.decode_rows, totals.num_decode_iterations),
        "max_batch_size": totals.max_running,
        "max_batch_size_supported": totals.max_batch_size_supported,
        "weight_bytes_loaded": totals.mean_weight_bytes,
        "weight_bytes_peak": totals.peak_weight_bytes,
        "mean_kv_use": totals.mean_kv_use,
        "num_switches": totals.num_switches,
        "num_loads": totals.num_loads,
        "num_evaluations": totals.num_evaluations,
        "switch_time_s": totals.switch_time_s,
        "depth_share": _shares(totals.depth_seconds),
        "regime": _shares(totals.regime_s),
        "time_shares": _time_shares(run),
        "saturation": verdict.saturation,
        "backlog_growth_per_s": verdict.growth_per_s,
        "drain_after_arrivals_s": verdict.drain_s,
        "intervals": _intervals(run, columns, slo),
    }
    rounded: dict[str, Any] = rounded_figures(summary)
    return rounded


def rounded_figures(value: Any) -> Any:
    """Plain data with floats at 12 significant digits and None for what is not a finite number."""
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.12g}") if math.isfinite(value) else None
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, Mapping):
        return {key: rounded_figures(one) for key, one in value.items()}
    return [rounded_figures(one) for one in value]


def _ratio(amount: float, per: float) -> float | None:
    return amount / per if per > 0 else None


def _exp(value: float) -> float | None:
    """The exponential of a value; None where it leaves the range of floats."""
    return math.exp(value) if value < 700.0 else None


def _shares(amounts: Mapping[str, float]) -> dict[str, float] | None:
    total = sum(amounts.values())
    return {name: amount / total for name, amount in amounts.items()} if total > 0 else None


PERCENTILES: Final = (50, 90, 95, 99)


def _latency_figures(name: str, seconds: Floats) -> dict[str, float | None]:
    """Mean, median, population standard deviation and percentiles (linear), in milliseconds."""
    keys = ["mean", "median", "std", *(f"p{one}" for one in PERCENTILES)]
    if seconds.size == 0:
        return {f"{key}_{name}_ms": None for key in keys}
    ordered = np.sort(seconds)
    points = np.quantile(ordered, [one / 100 for one in PERCENTILES])
    figures = [ordered.mean(), points[0], ordered.std(), *points]
    return {f"{key}_{name}_ms": 1e3 * float(one) for key, one in zip(keys, figures, strict=True)}


def _gap_figures(run: RunData) -> dict[str, float | None]:
    totals = run.totals
    keys = ["mean", "median", "std", *(f"p{one}" for one in PERCENTILES)]
    counts = np.asarray(totals.itl_counts, dtype=np.int64)
    num_gaps = int(counts.sum())
    if num_gaps == 0:
        return {f"{key}_itl_ms": None for key in keys}
    mean_s = totals.itl_sum_s / num_gaps
    variance = max(0.0, totals.itl_sum_square_s2 / num_gaps - mean_s * mean_s)
    points = [gap_percentile_s(run, one) for one in PERCENTILES]
    figures = [mean_s, points[0], math.sqrt(variance), *points]
    return {f"{key}_itl_ms": 1e3 * one for key, one in zip(keys, figures, strict=True)}


def gap_percentile_s(run: RunData, percentile: float) -> float:
    """A percentile of the pooled gaps: geometric interpolation inside its bin."""
    counts = np.asarray(run.totals.itl_counts, dtype=np.int64)
    edges = run.totals.itl_bins_s
    reached = np.cumsum(counts)
    rank = percentile / 100.0 * int(reached[-1])
    place = int(np.searchsorted(reached, rank, "left"))
    while counts[place] == 0:
        place += 1
    before = int(reached[place - 1]) if place else 0
    share = min(1.0, max(0.0, (rank - before) / int(counts[place])))
    lower, upper = edges[place], edges[place + 1]
    if lower <= 0.0:
        return lower + share * (upper - lower)
    return float(lower * (upper / lower) ** share)


def gap_share_within(run: RunData, limit_s: float) -> float | None:
    """Share of the pooled gaps within a limit, geometric inside the limit's bin."""
    counts = np.asarray(run.totals.itl_counts, dtype=np.int64)
    if int(counts.sum()) == 0:
        return None
    edges = np.asarray(run.totals.itl_bins_s)
    place = int(np.searchsorted(edges, limit_s, "right")) - 1
    if place < 0:
        return 0.0
    if place >= len(counts):
        return 1.0
    lower, upper = edges[place], edges[place + 1]
    inside = (
        (limit_s - lower) / (upper - lower)
        if lower <= 0.0
        else math.log(limit_s / lower) / math.log(upper / lower)
    )
    return float((counts[:place].sum() + inside * counts[place]) / counts.sum())


def _slo_figures(run: RunData, columns: Columns, slo: SloSpec | None) -> dict[str, Any]:
    if slo is None:
        return {
            "slo": None,
            "slo_attainment": None,
            "slo_attainment_by_metric": None,
            "slo_limits": None,
            "slo_passed": None,
        }
    measured = columns.measured
    good = meets_all(columns, slo)
    limits = []
    for limit in slo.limits:
        attained: float | None = float(meets(columns, limit)[measured].mean())
        passed: bool | None = None
        if limit.percentile is not None:
            share = gap_share_within(run, limit.limit_s) if limit.metric == "itl" else attained
            passed = share is not None and reaches(share, limit.percentile / 100.0)
        limits.append(
            {
                "limit": str(limit),
                "metric": limit.metric,
                "percentile": limit.percentile,
                "limit_ms": 1e3 * limit.limit_s,
                "attainment": attained,
                "passed": passed,
            }
        )
    judged = [one["passed"] for one in limits if one["passed"] is not None]
    return {
        "request_goodput": _ratio(int(good.sum()), run.totals.end_s),
        "slo": str(slo),
        "slo_attainment": float(good[measured].mean()),
        "slo_attainment_by_metric": {
            metric: float(
                np.logical_and.reduce(
                    [meets(columns, one) for one in slo.limits if one.metric == metric]
                )[measured].mean()
            )
            for metric in slo.metrics
        },
        "slo_limits": limits,
        "slo_passed": all(judged) if judged else None,
    }


def _exit_histogram(run: RunData) -> dict[str, dict[str, float]] | None:
    totals = run.totals
    everything = sum(sum(counts) for counts in totals.exit_counts.values())
    if everything == 0:
        return None
    return {
        model: {
            str(layer): count / everything
            for layer, count in zip(totals.exit_layers[model], counts, strict=True)
        }
        for model, counts in totals.exit_counts.items()
    }


def _time_shares(run: RunData) -> dict[str, float] | None:
    totals = run.totals
    whole_s = totals.end_s * totals.num_replicas
    if whole_s <= 0.0:
        return None
    return {
        "busy": totals.busy_s / whole_s,
        "idle": totals.idle_s / whole_s,
        "loading": totals.load_s / whole_s,
        "draining": totals.drain_s / whole_s,
        "evaluating": totals.evaluation_s / whole_s,
    }


def _departures(columns: Columns) -> Floats:
    """When each request left the system: refused on arrival, unfinished never."""
    left = np.where(columns.finished, columns.finished_s, math.inf)
    return np.sort(np.where(columns.refused, columns.arrival_s, left))


def _max_outstanding(columns: Columns) -> int:
    arrived = np.arange(1, len(columns.arrival_s) + 1)
    left = np.searchsorted(_departures(columns), columns.arrival_s, "right")
    return int((arrived - left).max())


def saturation_of(columns: Columns, end_s: float, closed_loop: bool = False) -> Verdict:
    """Judge the curve of outstanding requests (arrived, neither finished nor refused).

    *Overloaded*: over the arrival span the backlog grows (regression over ten slices, t above the
    one-sided 97.5 % point) and after the last arrival it takes long to drain: longer than any
    request takes from admission to finish, and than the share min(10 %, 2 max(1, CV) / sqrt(n))
    of the arrival span, the bad luck of n arrivals whose gaps have the coefficient of variation
    CV. *Backlogged*: not that, but requests wait longer on
    average than they are served. *Stable*: neither. A closed loop limits its own backlog and
    is never overloaded.
    """
    arrivals = columns.arrival_s
    departures = _departures(columns)
    first_s, last_s = float(arrivals[0]), float(arrivals[-1])
    span_s = last_s - first_s
    drain_s = _drain_seconds(columns, departures, last_s, span_s, end_s)
    served = columns.finished & ~np.isnan(columns.admitted_s)
    service_s = (columns.finished_s - columns.admitted_s)[served]
    growth = 0.0
    if span_s > 0.0 and len(arrivals) >= NUM_BATCHES:
        growth, score = _backlog_growth(arrivals, departures, first_s, last_s)
        gaps = np.diff(arrivals)
        variation = max(1.0, float(gaps.std() / gaps.mean()))
        luck_s = span_s * min(0.10, 2.0 * variation / math.sqrt(len(arrivals)))
        longest_s = float(service_s.max()) if service_s.size else 0.0
        grows = score > float(stdtrit(8, 0.975))
        if grows and drain_s > max(luck_s, longest_s) and not closed_loop:
            return Verdict("overloaded", growth, drain_s)
    waited = ~columns.refused
    admitted_s = np.where(np.isnan(columns.admitted_s), end_s, columns.admitted_s)
    waits_s = (admitted_s - arrivals)[waited]
    mean_wait_s = float(waits_s.mean()) if waits_s.size else 0.0
    mean_service_s = float(service_s.mean()) if service_s.size else 0.0
    if mean_wait_s > mean_service_s:
        return Verdict("backlogged", growth, drain_s)
    return Verdict("stable", growth, drain_s)


def _backlog_growth(
    arrivals: Floats, departures: Floats, from_s: float, to_s: float
) -> tuple[float, float]:
    """Slope of the backlog (requests per second) and its t value, over ten slices' means.

    Slices of 20 points each take most of the correlation between neighbouring points out.
    """
    edges = np.linspace(from_s, to_s, 201)
    points = (edges[1:] + edges[:-1]) / 2
    backlog = np.searchsorted(arrivals, points, "right") - np.searchsorted(
        departures, points, "right"
    )
    y = backlog.reshape(10, 20).mean(axis=1)
    x = points.reshape(10, 20).mean(axis=1)
    x_off, y_off = x - x.mean(), y - y.mean()
    spread = float(x_off @ x_off)
    slope = float(x_off @ y_off) / spread
    rest = y_off - slope * x_off
    error = math.sqrt(float(rest @ rest) / 8 / spread)
    if error <= 1e-12 * max(1.0, abs(slope)):
        return slope, math.copysign(math.inf, slope) if slope else 0.0
    return slope, slope / error


def _drain_seconds(
    columns: Columns, departures: Floats, last_s: float, span_s: float, end_s: float
) -> float:
    """Seconds from the last arrival until the system is empty."""
    known = departures[np.isfinite(departures)]
    left = len(departures) - len(known)
    if left == 0:
        return max(0.0, float(known[-1]) - last_s)
    half_s = last_s - span_s / 2
    finishes = int(np.count_nonzero((known > half_s) & (known <= end_s)))
    observed_s = max(0.0, end_s - last_s)
    if finishes == 0 or end_s <= half_s:
        return math.inf
    return observed_s + left * (end_s - half_s) / finishes


def batch_interval(
    numerator: Floats, denominator: Floats | None = None, num_batches: int = NUM_BATCHES
) -> dict[str, float | int] | None:
    """Mean and its 95 % interval from batches of consecutive values.

    With a denominator the figure is the ratio of sums, and a batch's value its own ratio. None
    with fewer than two values a batch, or a batch without a denominator.
    """
    if len(numerator) < 2 * num_batches:
        return None
    starts = np.arange(num_batches) * len(numerator) // num_batches
    sums = np.add.reduceat(numerator, starts)
    if denominator is None:
        weights = np.diff(np.append(starts, len(numerator))).astype(np.float64)
    else:
        weights = np.add.reduceat(denominator, starts)
    if not bool((weights > 0).all()):
        return None
    batches = sums / weights
    mean = float(sums.sum() / weights.sum())
    half = (
        float(stdtrit(num_batches - 1, 0.5 + CONFIDENCE / 2))
        * float(batches.std(ddof=1))
        / math.sqrt(num_batches)
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_batches": num_batches}


def _intervals(
    run: RunData, columns: Columns, slo: SloSpec | None
) -> dict[str, dict[str, float | int] | None]:
    counted = columns.measured & columns.finished
    several = counted & columns.several_tokens
    requests = run.requests
    if not np.array_equal(requests["request_id"].to_numpy(), columns.request_id):
        requests = requests.sort("arrival_s", "request_id", maintain_order=True)

    def column(name: str) -> Floats:
        return requests[name].cast(pl.Float64).to_numpy()[columns.measured]

    emitted = column("generated_tokens")
    intervals = {
        "mean_ttft_ms": batch_interval(1e3 * columns.ttft_s[counted]),
        "mean_tpot_ms": batch_interval(1e3 * columns.tpot_s[several]),
        "mean_e2el_ms": batch_interval(1e3 * columns.e2e_s[counted]),
        "mean_executed_layers": batch_interval(column("executed_layers"), column("decoded_tokens")),
        "agreement": batch_interval(column("agree_tokens"), emitted),
        "breach_rate": batch_interval(column("breaches_relative"), emitted),
    }
    if slo is not None:
        good = meets_all(columns, slo)[columns.measured].astype(np.float64)
        intervals["slo_attainment"] = batch_interval(good)
    for name, interval in intervals.items():
        if interval is not None:
            interval["low"], interval["high"] = _cut(name, interval["low"], interval["high"])
    return intervals


def possible_range(name: str) -> tuple[float, float]:
    """The least and the most that a figure can be; a dotted name is of its first part."""
    root = name.partition(".")[0]
    if root in _SHARES:
        return 0.0, 1.0
    if root == "perplexity":
        return 1.0, math.inf
    has_sign = root == "backlog_growth_per_s"
    is_ours = root in DEFINITIONS or root.partition("_")[2] in DEFINITIONS
    return (0.0 if is_ours and not has_sign else -math.inf), math.inf


def _cut(name: str, low: float, high: float) -> tuple[float, float]:
    """An interval of a figure, cut to what the figure can be."""
    least, most = possible_range(name)
    return max(least, low), min(most, high)


def aggregate(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and 95 % t interval of every numeric figure over independent replications.

    Nested figures have dotted names. `num` counts the replications in which a figure is defined;
    the interval is cut to the possible range, and None with fewer than two.
    """
    if not summaries:
        raise InputError("There is nothing to aggregate: no summary was given.")
    _same(summaries, "policy", "replications are of one policy")
    _same(summaries, "schema_version", "replications share one schema version")
    seeds = [summary.get("seed") for summary in summaries]
    if len(set(seeds)) != len(seeds):
        raise InputError(
            f"The replications have the seeds {seeds}; independent ones have different seeds."
        )
    skipped = {"schema_version", "seed", "intervals"}
    collected: dict[str, list[float]] = {}
    for summary in summaries:
        kept = {key: value for key, value in summary.items() if key not in skipped}
        for name, value in _numeric_items(kept):
            collected.setdefault(name, []).append(value)
    figures = {}
    for name, values in collected.items():
        num = len(values)
        mean = sum(values) / num
        std = float(np.std(values, ddof=1)) if num > 1 else None
        low = high = None
        if std is not None:
            half = float(stdtrit(num - 1, 0.5 + CONFIDENCE / 2)) * std / math.sqrt(num)
            low, high = _cut(name, mean - half, mean + half)
        figures[name] = {"mean": mean, "std": std, "low": low, "high": high, "num": num}
    first = summaries[0]
    aggregated: dict[str, Any] = rounded_figures(
        {
            "schema_version": first.get("schema_version", SCHEMA_VERSION),
            "label": first.get("label"),
            "policy": first.get("policy"),
            "num_replications": len(summaries),
            "seeds": seeds,
            "saturation": [summary.get("saturation") for summary in summaries],
            "figures": figures,
        }
    )
    return aggregated


def _numeric_items(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    items: list[tuple[str, float]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            items += _numeric_items(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            items.append((f"{prefix}{key}", float(value)))
    return items


def _same(summaries: Sequence[Mapping[str, Any]], key: str, rule: str) -> None:
    values = list(dict.fromkeys(summary.get(key) for summary in summaries))
    if len(values) > 1:
        raise InputError(f"{key} differs ({', '.join(map(str, values))}); {rule}.")


Better = Literal["higher", "lower"]

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
    (
        *("failed", "duration", "max_concurrent_requests", "mean_running", "weight_bytes_peak"),
        *("total_gpu_energy", "energy_per_request", "energy_idle_j", "energy_load_j"),
        *("breach_rate", "breach_rate_observed", "num_breach_events", "num_switches", "num_loads"),
        *("num_evaluations", "switch_time_s", "backlog_growth_per_s", "drain_after_arrivals_s"),
    )
)
"""Of figures that are not compared; where neither is better, more counts as the gain."""


def gain(key: str, own: float, other: float) -> float | None:
    """How many times better a figure is than another one's; None over nothing."""
    better = next((one[4] for one in COMPARED if one[0] == key), None)
    lower = better == "lower" or key.endswith("_ms") or key in _LESS_IS_BETTER
    below, above = (own, other) if lower else (other, own)
    return above / below if below else None


def figure_at(node: Any, path: str) -> float | None:
    """The number of a summary at keys joined by dots, which may be in keys too; None elsewhere."""
    if not isinstance(node, Mapping):
        return None
    if path in node:
        value = node[path]
        return float(value) if isinstance(value, int | float) else None
    found = (
        figure_at(node[key], path[len(key) + 1 :]) for key in node if path.startswith(f"{key}.")
    )
    return next((value for value in found if value is not None), None)


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
        ratios = tuple(value / base if value is not None and base else None for value in numbers)
        rows.append(
            ComparisonRow(
                key,
                title,
                unit,
                group,
                better,
                tuple(values),
                ratios,
                _best(numbers, better),
                (differences or {}).get(key, (None,) * len(values)),
            )
        )
    return rows


def _best(values: Sequence[float | None], better: Better | None) -> tuple[int, ...]:
    """Positions of the best value and of those within 0.1 % of it; none where all are."""
    known = [value for value in values if value is not None]
    if better is None or len(known) < 2:
        return ()
    best = max(known) if better == "higher" else min(known)
    places = tuple(i for i, value in enumerate(values) if value is not None and _level(value, best))
    return () if len(places) == len(known) else places


def _level(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3)


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
