"""Records become figures: latency, goodput, energy, quality, with intervals and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import polars as pl
from scipy.special import stdtrit

from helios_sim.errors import InputError
from helios_sim.runs.latencies import Columns, Floats, columns_of, meets, meets_all
from helios_sim.runs.records import SCHEMA_VERSION, RunData
from helios_sim.runs.saturation import saturation_of
from helios_sim.settings.slo import SloSpec, reaches

NUM_BATCHES: Final = 20
CONFIDENCE: Final = 0.95
LATENCIES: Final = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}
"""SLO metric names, and the name of each in the summary's keys."""

DEFINITIONS: Final[dict[str, str]] = {
    "schema_version": "version of the run's files",
    "label": "name of the run",
    "policy": "policy that was asked",
    "objective": (
        "what the policy optimises for, such as throughput; none for a policy that does not choose"
    ),
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
    "that share of the measured requests sent meets it (of the pooled gaps, for ITL, and at most "
    "the share of these requests that finished)",
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
    "num_evaluations": "evaluations of candidates that were begun; each waits for the requests "
    "that it is to meet",
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
        "slo_attainment",
        "slo_attainment_by_metric",
        "agreement",
        "breach_rate",
        "breach_rate_observed",
        "mean_kv_use",
        "exit_histogram",
        "depth_share",
        "regime",
        "time_shares",
    }
)
"""Figures between 0 and 1, and groups of such."""


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
    # A limit, not a figure: rounded it could let another request count.
    rounded["warmup_s"] = warmup_s
    return rounded


def start_figures(run: RunData, warmup_s: float, warmup_requests: int) -> dict[str, Any]:
    """How many measured requests found their replica not serving yet, and until when that was.

    A replica starts when it first admits a request: before that its weights are on their way, and
    who arrives waits for them. `start_s` is when the last of these replicas started.
    """
    columns = columns_of(run, warmup_s, warmup_requests)
    started = ~np.isnan(columns.admitted_s) & (columns.replica >= 0)
    starts_s = np.full(int(columns.replica.max(initial=0)) + 1, math.inf)
    np.minimum.at(starts_s, columns.replica[started], columns.admitted_s[started])
    waited = columns.measured & started & (columns.arrival_s < starts_s[columns.replica])
    until_s = float(starts_s[columns.replica[waited]].max(initial=0.0))
    found: dict[str, Any] = rounded_figures(
        {"num_before_start": int(waited.sum()), "start_s": until_s}
    )
    return found


def user_figures(run: RunData, num_users: int | None, think_s: Floats) -> dict[str, Any]:
    """How many users a closed loop has, and how many are active on average over the whole run.

    A user is active from the first request on until the last one has left. `think_s` is how long
    somebody thought before each request, in the order in which they are numbered, the first
    `num_users` of them left out. An open loop has no users, and nothing to say.
    """
    if num_users is None:
        return {}
    columns, end_s = columns_of(run), run.totals.end_s
    left_s = np.where(columns.finished, columns.finished_s, end_s)
    left_s = np.where(columns.refused, columns.arrival_s, left_s)
    is_first = columns.request_id < num_users
    begun_s = columns.arrival_s - np.where(is_first, 0.0, think_s[columns.request_id])
    active_s = float(np.maximum(left_s - begun_s, 0.0).sum())
    found: dict[str, Any] = rounded_figures(
        {"num_users": num_users, "mean_active_users": _ratio(active_s, end_s)}
    )
    return found


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


def gap_share_met(run: RunData, columns: Columns, limit_s: float) -> float:
    """Share of the pooled gaps within a limit, at most the share of measured requests that finish.

    Requests that are refused or do not finish have no gaps, or too few, and miss every limit; one
    token has none, and keeps it.
    """
    finished = float(columns.finished[columns.measured].mean())
    return min(finished, _gap_share_within(run, limit_s))


def _gap_share_within(run: RunData, limit_s: float) -> float:
    """Share of the pooled gaps within a limit, geometric inside its bin; 1 where there is none."""
    counts = np.asarray(run.totals.itl_counts, dtype=np.int64)
    if int(counts.sum()) == 0:
        return 1.0
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
        attained = float(meets(columns, limit)[measured].mean())
        passed: bool | None = None
        if limit.percentile is not None:
            is_gap = limit.metric == "itl"
            share = gap_share_met(run, columns, limit.limit_s) if is_gap else attained
            passed = reaches(share, limit.percentile / 100.0)
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


def _max_outstanding(columns: Columns) -> int:
    arrived = np.arange(1, len(columns.arrival_s) + 1)
    left = np.searchsorted(columns.departures_s, columns.arrival_s, "right")
    return int((arrived - left).max())


def batch_interval(
    numerator: Floats, denominator: Floats | None = None
) -> dict[str, float | int] | None:
    """Mean and its 95 % interval from batches of consecutive values.

    With a denominator the figure is the ratio of sums, and a batch's value its own ratio. None
    with fewer than two values a batch, or a batch without a denominator.
    """
    if len(numerator) < 2 * NUM_BATCHES:
        return None
    starts = np.arange(NUM_BATCHES) * len(numerator) // NUM_BATCHES
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
        float(stdtrit(NUM_BATCHES - 1, 0.5 + CONFIDENCE / 2))
        * float(batches.std(ddof=1))
        / math.sqrt(NUM_BATCHES)
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_batches": NUM_BATCHES}


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

    Nested figures have dotted names. `values` are those of the replications in the order of
    `seeds`, None where a figure is undefined, and `num` counts the others; the interval is cut to
    the possible range, and None with fewer than two. `least` and `most` are the ends of what was
    seen: a policy that decides on few tokens may have gone two ways, and a mean is then what no run
    has.
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
    collected: dict[str, list[float | None]] = {}
    for place, summary in enumerate(summaries):
        kept = {key: value for key, value in summary.items() if key not in skipped}
        for name, value in _numeric_items(kept):
            collected.setdefault(name, [None] * len(summaries))[place] = value
    figures = {}
    for name, by_seed in collected.items():
        values = [value for value in by_seed if value is not None]
        num = len(values)
        mean = sum(values) / num
        std = float(np.std(values, ddof=1)) if num > 1 else None
        low = high = None
        if std is not None:
            half = float(stdtrit(num - 1, 0.5 + CONFIDENCE / 2)) * std / math.sqrt(num)
            low, high = _cut(name, mean - half, mean + half)
        figures[name] = {
            **{"mean": mean, "std": std, "low": low, "high": high},
            **{"least": min(values), "most": max(values), "num": num, "values": by_seed},
        }
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
