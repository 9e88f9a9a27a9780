"""A served run becomes the tables of a run folder, and the extra ones that only a real run has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from calibration.serving.energy import RunEnergy
from calibration.serving.host import Host
from calibration.serving.tally import gap_counts
from helios_sim.loop.state import NLL_UNITS_PER_NAT, itl_edges
from helios_sim.policy.contract import DECISION_NAMES
from helios_sim.policy.objective import objective_of
from helios_sim.policy.snapshot_json import SnapshotLog
from helios_sim.runs.columns import write_table
from helios_sim.runs.records import RunData, RunTotals
from helios_sim.steward import evaluation_seconds, held_by
from helios_sim.workload.requests import Requests

ITERATIONS_FILE: Final = "iterations.parquet"
TOKENS_FILE: Final = "tokens.parquet"


@dataclass(frozen=True)
class Judgement:
    """What the full models say of the served tokens; columns follow the log of tokens.

    `agrees`: the token is the one that the model which served it gives at full depth. Of tokens
    that it gave at full depth itself, over KV that no exit had skipped, `num_reread_otherwise` of
    `num_whole` are another one when they are read again: noise of the arithmetic, and they agree.
    `relative`: a breach that some deeper exit of that model would have satisfied. `trace_start`
    is the place of each request's first token in the run's exit traces, by request id.
    """

    agrees: NDArray[np.bool_]
    relative: NDArray[np.bool_]
    trace_start: NDArray[np.int64]
    num_whole: int = 0
    num_reread_otherwise: int = 0


def run_data(
    host: Host,
    requests: Requests,
    judgement: Judgement,
    energy: RunEnergy,
    *,
    label: str,
    policy: str,
    seed: int,
    scenario: Mapping[str, Any],
    environment: Mapping[str, Any],
    origin: str,
) -> RunData:
    """The records of a served run; `origin` says what it was served on."""
    return RunData(
        label=label,
        policy=policy,
        objective=objective_of(host.policy),
        seed=seed,
        scenario=dict(scenario),
        environment=dict(environment),
        requests=requests_table(host, requests, judgement),
        decisions=decisions_table(host),
        timeline=timeline_table(host, energy),
        totals=totals(host, requests, energy),
        origin=origin,
        closed_loop=requests.num_users is not None,
    )


def requests_table(host: Host, requests: Requests, judgement: Judgement) -> pl.DataFrame:
    """One row a request, in order of arrival."""
    lives = host.lives
    sums = host.tally.request_sums(len(lives))
    owners = np.array([one.request_id for one in host.tally.tokens], dtype=np.int64)
    agree = np.bincount(owners, weights=judgement.agrees, minlength=len(lives)).astype(np.int64)
    relative = np.bincount(owners, weights=judgement.relative, minlength=len(lives))
    return pl.DataFrame(
        {
            "request_id": [life.request_id for life in lives],
            "replica": [0] * len(lives),
            "domain": [requests.domains[domain] for domain in requests.domain.tolist()],
            "arrival_s": [life.arrival_s for life in lives],
            "admitted_s": [life.admitted_s for life in lives],
            "first_token_s": [life.first_token_s for life in lives],
            "finished_s": [life.finished_s for life in lives],
            "prompt_tokens": [life.prompt_tokens for life in lives],
            "output_tokens": [life.output_tokens for life in lives],
            "generated_tokens": [life.generated for life in lives],
            "trace_start": judgement.trace_start,
            "status": [life.status for life in lives],
            "model": [life.model for life in lives],
            "depth": [life.depth for life in lives],
            "evaluated": [life.evaluated for life in lives],
            "num_preemptions": [life.num_preemptions for life in lives],
            "decoded_tokens": sums.decoded,
            "executed_layers": sums.executed_layers,
            "agree_tokens": agree,
            "nll_nats": [units / NLL_UNITS_PER_NAT for units in sums.nll_units],
            "breaches": sums.breaches,
            "breaches_relative": relative.astype(np.int64),
        },
        schema_overrides={
            "admitted_s": pl.Float64,
            "first_token_s": pl.Float64,
            "finished_s": pl.Float64,
            "model": pl.String,
            "depth": pl.Int32,
        },
    )


def decisions_table(host: Host) -> pl.DataFrame:
    """One row a decision, in order of time."""
    entries = host.decisions
    log = SnapshotLog()
    return pl.DataFrame(
        {
            "time_s": [entry.time_s for entry in entries],
            "replica": [0] * len(entries),
            "event": [entry.event.value for entry in entries],
            "decision": [DECISION_NAMES[type(entry.decision)] for entry in entries],
            "model": [entry.assignment.model for entry in entries],
            "depth": [entry.assignment.depth for entry in entries],
            "exit_mode": [entry.assignment.exit_mode.value for entry in entries],
            "reason": [entry.decision.reason for entry in entries],
            "ready_s": [entry.ready_s for entry in entries],
            "moved_bytes": [entry.moved_bytes for entry in entries],
            "snapshot": [log.write(entry.snapshot) for entry in entries],
        },
        schema_overrides={"ready_s": pl.Float64},
    )


def timeline_table(host: Host, energy: RunEnergy) -> pl.DataFrame:
    """One row an interval; running sums become means and counts over it."""
    lines = [line for line in host.tally.samples if line.time_s > 0.0]
    # Of several lines at one instant the last holds all that happened until then.
    lines = [
        line
        for line, after in zip(lines, [*lines[1:], None], strict=True)
        if after is None or after.time_s > line.time_s
    ]
    times_s = np.array([0.0, *(line.time_s for line in lines)])
    interval_s = np.diff(times_s)
    joules = np.array([energy.at(float(time_s)) for time_s in times_s])
    power_w = np.diff(joules) / interval_s

    def counted(values: Sequence[float]) -> NDArray[np.float64]:
        return np.diff(np.array([0, *values], dtype=np.float64))

    return pl.DataFrame(
        {
            "replica": [0] * len(lines),
            "time_s": times_s[1:],
            "interval_s": interval_s,
            "mean_running": counted([line.batch_seconds for line in lines]) / interval_s,
            "waiting": [line.waiting for line in lines],
            "kv_blocks_used": [line.used_blocks for line in lines],
            "kv_blocks": [line.pool_blocks for line in lines],
            "model": [line.model for line in lines],
            "depth": [line.depth for line in lines],
            "state": [line.state for line in lines],
            "power_w": power_w,
            "tokens": counted([line.tokens for line in lines]).astype(np.int64),
            "breaches": counted([line.breaches for line in lines]).astype(np.int64),
        }
    ).with_columns(
        pl.col("power_w").fill_nan(None), model=pl.when(pl.col("depth") > 0).then("model")
    )


def totals(host: Host, requests: Requests, energy: RunEnergy) -> RunTotals:
    """Sums of the run; the regimes of layer times are the simulator's notion and stay empty."""
    tally, room, steward = host.tally, host.room, host.steward
    held, device = steward.depth_seconds, room.profile.device
    model, depth = held_by(max(held, key=lambda name: held[name]))
    per_request = requests.mean_prompt_tokens + requests.mean_output_tokens
    pool_seconds = 0.0
    for name, seconds in held.items():
        pool_seconds += seconds * room.pool_blocks(*held_by(name))
    gaps_s = tally.gaps_s
    return RunTotals(
        end_s=host.end_s,
        num_replicas=1,
        num_gpus=device.num_gpus,
        energy_j=energy.at(host.end_s) - energy.at(0.0),
        energy_idle_j=_drawn_j(host, energy, "idle", device.idle_w),
        energy_load_j=_drawn_j(host, energy, "load", device.load_w),
        busy_s=tally.spent_s["busy"],
        idle_s=tally.spent_s["idle"],
        load_s=tally.spent_s["load"],
        drain_s=tally.drain_s,
        evaluation_s=evaluation_seconds(host.decisions, host.end_s),
        num_iterations=tally.num_iterations,
        num_decode_iterations=tally.num_decode_iterations,
        decode_rows=tally.decode_rows,
        decode_s=tally.decode_s,
        batch_seconds=tally.batch_seconds,
        max_running=host.batch.max_running,
        max_batch_size_supported=room.requests_that_fit(model, depth, per_request),
        peak_weight_bytes=steward.peak_weight_bytes,
        mean_weight_bytes=steward.weight_byte_seconds / host.end_s,
        num_switches=steward.num_switches,
        num_loads=steward.num_loads,
        num_evaluations=steward.num_evaluations,
        num_breach_events=steward.num_breach_events,
        switch_time_s=steward.switch_time_s,
        regime_s={},
        exit_layers={card.name: card.exit_layers for card in steward.cards.values()},
        exit_counts={name: tuple(counts) for name, counts in tally.exit_counts.items()},
        depth_seconds=dict(held),
        kv_block_tokens=room.serving.block_tokens,
        mean_kv_use=tally.kv_block_seconds / pool_seconds if pool_seconds else 0.0,
        itl_bins_s=itl_edges(),
        itl_counts=gap_counts(gaps_s),
        itl_sum_s=math.fsum(gaps_s),
        itl_sum_square_s2=math.fsum(gap * gap for gap in gaps_s),
    )


def iterations_table(host: Host) -> pl.DataFrame:
    """One row an iteration: when, how long, on what, and the work it did."""
    entries = host.tally.iterations
    outcomes = [entry.outcome for entry in entries]
    return pl.DataFrame(
        {
            "replica": [0] * len(entries),
            "start_s": [entry.start_s for entry in entries],
            "seconds": [entry.seconds for entry in entries],
            "host_s": [entry.host_s for entry in entries],
            "kind": ["prefill" if entry.is_prefill else "decode" for entry in entries],
            "model": [entry.assignment.model for entry in entries],
            "depth": [entry.assignment.depth for entry in entries],
            "exit_mode": [entry.assignment.exit_mode.value for entry in entries],
            "evaluating": [entry.evaluating for entry in entries],
            "running": [entry.running for entry in entries],
            "rows": [outcome.rows for outcome in outcomes],
            "batch": [outcome.rows + outcome.ghosts for outcome in outcomes],
            "context_tokens": [outcome.context_tokens for outcome in outcomes],
            "longest_context_tokens": [outcome.longest_context_tokens for outcome in outcomes],
            "prompt_tokens": [outcome.prompt_tokens for outcome in outcomes],
            "prompt_pairs": [outcome.prompt_pairs for outcome in outcomes],
            "pending_tokens": [outcome.pending_tokens for outcome in outcomes],
            "first_layer": [outcome.first_layer for outcome in outcomes],
            "layers": [outcome.layers for outcome in outcomes],
            "checks": [outcome.checks for outcome in outcomes],
            "heads": [outcome.heads for outcome in outcomes],
            "filled_layers": [outcome.filled_layers for outcome in outcomes],
            "filled_rows": [outcome.filled_rows for outcome in outcomes],
            "overheads": [outcome.overheads for outcome in outcomes],
            "captured_graphs": [outcome.captured.graphs for outcome in outcomes],
            "captured_exits": [outcome.captured.exits for outcome in outcomes],
            "captured_layers": [outcome.captured.layers for outcome in outcomes],
            "captured_filled_layers": [outcome.captured.filled_layers for outcome in outcomes],
            "emitted": [len(outcome.emitted) for outcome in outcomes],
        },
        schema_overrides={
            name: pl.Int32
            for name in (
                "replica",
                "depth",
                "running",
                "rows",
                "batch",
                "prompt_tokens",
                "pending_tokens",
                "first_layer",
                "layers",
                "checks",
                "heads",
                "filled_layers",
                "filled_rows",
                "overheads",
                "emitted",
                "captured_graphs",
                "captured_exits",
                "captured_layers",
                "captured_filled_layers",
            )
        }
        | dict.fromkeys(("start_s", "seconds", "host_s", "prompt_pairs"), pl.Float64)
        | dict.fromkeys(("kind", "model", "exit_mode"), pl.String)
        | dict.fromkeys(("context_tokens", "longest_context_tokens"), pl.Int64)
        | {"evaluating": pl.Boolean},
    )


def tokens_table(host: Host, judgement: Judgement) -> pl.DataFrame:
    """One row an emitted token, in order of emission."""
    entries = host.tally.tokens
    models = list(host.room.candidates)
    return pl.DataFrame(
        {
            "request_id": [one.request_id for one in entries],
            "place": [one.place for one in entries],
            "time_s": [one.time_s for one in entries],
            "model": pl.Series([one.model for one in entries], dtype=pl.Enum(models)),
            "depth": [one.depth for one in entries],
            "exit_level": [one.level for one in entries],
            "prefilled": [one.prefilled for one in entries],
            "token": [one.token for one in entries],
            "confidence": pl.Series([one.confidence for one in entries], dtype=pl.Float32),
            "nll_nats": pl.Series([one.nll_nats for one in entries], dtype=pl.Float32),
            "breached": [one.breached for one in entries],
            "breached_relative": judgement.relative,
            "agrees": judgement.agrees,
        },
        schema_overrides={
            "request_id": pl.Int32,
            "place": pl.Int32,
            "time_s": pl.Float64,
            "depth": pl.Int16,
            "exit_level": pl.Int8,
            "prefilled": pl.Boolean,
            "token": pl.Int32,
            "breached": pl.Boolean,
        },
    )


def write_extras(host: Host, judgement: Judgement, folder: Path) -> None:
    """Write the tables that only a real run has into a run's folder."""
    for name, frame in (
        (ITERATIONS_FILE, iterations_table(host)),
        (TOKENS_FILE, tokens_table(host, judgement)),
    ):
        write_table(frame, folder / name, compression="zstd")


def _drawn_j(host: Host, energy: RunEnergy, spent: str, usual_w: float) -> float:
    """Joules drawn while time was spent in one way, at usual watts, which are 0 if unknown."""
    spans = [(start_s, stop_s) for kind, start_s, stop_s in host.tally.spans if kind == spent]
    return energy.within_j(spans, usual_w or None)
