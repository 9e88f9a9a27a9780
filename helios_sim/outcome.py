"""What a played run amounts to: the world's arrays become the records of a run."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import polars as pl

from helios_sim import __version__
from helios_sim.cost import REGIMES
from helios_sim.engine import DecisionEntry, Run, decided
from helios_sim.loop.state import (
    FINISHED,
    NLL_UNITS_PER_NAT,
    NOBODY,
    REFUSED,
    RUNNING,
    STATE_NAMES,
    UNSENT,
    WAITING,
    itl_edges,
)
from helios_sim.policy.contract import DECISION_NAMES
from helios_sim.policy.objective import objective_of
from helios_sim.profile import STAND_INS
from helios_sim.profiles.files import assumed_in
from helios_sim.runs.columns import STATUSES
from helios_sim.runs.records import RunData, RunTotals
from helios_sim.steward import evaluation_seconds, held_by

_STATUS_OF = np.zeros(5, np.uint32)
for _code, _name in (
    (UNSENT, "waiting"),
    (WAITING, "waiting"),
    (RUNNING, "running"),
    (FINISHED, "finished"),
    (REFUSED, "refused"),
):
    _STATUS_OF[_code] = STATUSES.index(_name)

_AS_THEY_ARE = (
    "replica",
    "arrival_s",
    "admitted_s",
    "first_token_s",
    "finished_s",
    "prompt",
    "output",
    "generated",
    "trace_start",
    "depth",
    "preemptions",
    "decoded",
    "executed_layers",
    "agree",
    "breaches",
    "relative_breaches",
)
"""Fields of a request's record that are columns of its table without a change."""


def run_data(run: Run, label: str, policy: str, seed: int, scenario: Mapping[str, Any]) -> RunData:
    """The records of a finished run."""
    return RunData(
        label=label,
        policy=policy,
        objective=objective_of(run.policy),
        seed=seed,
        scenario=dict(scenario),
        environment=environment(run),
        requests=requests_table(run),
        decisions=decisions_table(run),
        timeline=timeline_table(run),
        totals=totals(run),
        closed_loop=run.requests.num_users is not None,
    )


def environment(run: Run) -> dict[str, Any]:
    """Versions and the profile's identity: what a reader needs to get the same bytes again.

    Candidates whose exits are another model's are named under `stand_ins`, where there are any.
    """
    profile = run.setup.profile
    stand_ins = {
        name: like for name, like in profile.stand_ins.items() if name in run.setup.candidates
    }
    return {
        "versions": dict(_versions()),
        "device": profile.device.name,
        "device_kind": "processor" if profile.is_of_processor else "GPU",
        "profile": profile.name,
        "profile_hash": profile.hash,
        "profile_origin": profile.provenance.origin,
        "profile_grades": profile.grade_counts(),
        **assumed_in(profile),
        "exit_traces": run.setup.traces.origin,
        **({STAND_INS: stand_ins} if stand_ins else {}),
        "confidence_thresholds": dict(run.thresholds),
    }


@cache
def _versions() -> Mapping[str, str]:
    """Versions of what a run is made with; reading the packages' takes as long as a short run."""
    packages = ("simpy", "numpy", "scipy", "polars", "numba")
    return {
        "helios-sim": __version__,
        **{name: version(name) for name in packages},
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def requests_table(run: Run) -> pl.DataFrame:
    """One row a request, in order of arrival; names are categories, which take a byte a row."""
    records = run.world.requests
    table = columns_of(records, _AS_THEY_ARE)
    served = records["model"] != NOBODY
    columns: dict[str, Any] = {
        "request_id": np.arange(len(records)),
        "replica": table["replica"],
        "domain": _named(records["domain"], run.setup.traces.domains),
        "arrival_s": table["arrival_s"],
        "admitted_s": table["admitted_s"],
        "first_token_s": table["first_token_s"],
        "finished_s": table["finished_s"],
        "prompt_tokens": table["prompt"],
        "output_tokens": table["output"],
        "generated_tokens": table["generated"],
        "trace_start": table["trace_start"],
        "status": _named(_STATUS_OF[records["status"]], STATUSES),
        "model": _named(np.maximum(records["model"], 0), run.setup.candidates),
        "depth": table["depth"],
        "evaluated": records["evaluated"] != 0,
        "num_preemptions": table["preemptions"],
        "decoded_tokens": table["decoded"],
        "executed_layers": table["executed_layers"],
        "agree_tokens": table["agree"],
        "nll_nats": records["nll"] / NLL_UNITS_PER_NAT,
        "breaches": table["breaches"],
        "breaches_relative": table["relative_breaches"],
    }
    frame = pl.DataFrame(columns)
    del table, columns
    frame = frame.with_columns(pl.col("admitted_s", "first_token_s", "finished_s").fill_nan(None))
    if bool(served.all()):
        return frame
    return frame.with_columns(
        pl.when(pl.Series(served)).then(pl.col(name)).otherwise(None).alias(name)
        for name in ("model", "depth")
    )


def columns_of(records: Any, names: Sequence[str], block: int = 4096) -> dict[str, Any]:
    """Fields of records as columns.

    Records are taken apart block by block: field by field, the whole table would go through the
    processor's cache as often as it has fields.
    """
    plain = records.view(records.dtype.base, np.ndarray)
    columns = {name: np.empty(len(plain), plain.dtype[name]) for name in names}
    for start in range(0, len(plain), block):
        rows = plain[start : start + block]
        for name, column in columns.items():
            column[start : start + block] = rows[name]
    return columns


def _named(codes: Any, names: Sequence[str]) -> pl.Series:
    """Names by their places, as categories."""
    return pl.Series(names, dtype=pl.Enum(names)).gather(codes.astype(np.uint32))


def decisions_table(run: Run) -> pl.DataFrame:
    """One row a decision, in order of time."""
    entries = decided(run.decisions)

    def column(pick: Any) -> list[Any]:
        return [pick(entry) for entry in entries]

    return pl.DataFrame(
        {
            "time_s": column(lambda e: e.time_s),
            "replica": column(lambda e: e.replica),
            "event": column(lambda e: e.event.value),
            "decision": column(lambda e: DECISION_NAMES[type(e.decision)]),
            "model": column(lambda e: e.assignment.model),
            "depth": column(lambda e: e.assignment.depth),
            "exit_mode": column(lambda e: e.assignment.exit_mode.value),
            "reason": column(lambda e: e.decision.reason),
            "ready_s": column(lambda e: e.ready_s),
            "moved_bytes": column(lambda e: e.moved_bytes),
            "snapshot": column(lambda e: e.snapshot),
        },
        strict=False,
    )


def timeline_table(run: Run) -> pl.DataFrame:
    """The replicas' timelines: running sums become means and counts over intervals."""
    names = np.array(run.setup.candidates)
    parts = []
    for replica in run.replicas:
        lines = run.world.samples[replica.index, : int(replica.record.num_samples)]
        # Of several lines at one instant the last holds all that happened until then.
        lasts = np.append(lines["time_s"][1:] > lines["time_s"][:-1], True)
        lines = lines[lasts & (lines["time_s"] > 0.0)]
        interval_s = _per_interval(lines, "time_s")
        parts.append(
            pl.DataFrame(
                {
                    "replica": np.full(len(lines), replica.index),
                    "time_s": np.ascontiguousarray(lines["time_s"]),
                    "interval_s": interval_s,
                    "mean_running": _per_interval(lines, "batch_seconds") / interval_s,
                    "waiting": np.ascontiguousarray(lines["waiting"]),
                    "kv_blocks_used": np.ascontiguousarray(lines["used_blocks"]),
                    "kv_blocks": np.ascontiguousarray(lines["pool_blocks"]),
                    "model": names[lines["model"]],
                    "depth": np.ascontiguousarray(lines["depth"]),
                    "state": np.array(STATE_NAMES)[lines["state"]],
                    "power_w": _per_interval(lines, "energy_j") / interval_s
                    if run.has_energy
                    else None,
                    "tokens": _per_interval(lines, "tokens"),
                    "breaches": _per_interval(lines, "breaches"),
                }
            )
        )
    # Without layers nothing is loaded, whatever model the replica's record starts with.
    return pl.concat(parts).with_columns(model=pl.when(pl.col("depth") > 0).then("model"))


def _per_interval(lines: Any, name: str) -> Any:
    """What a running sum grew by from each line of a timeline to the next, from 0 on."""
    return np.diff(np.concatenate([[0], lines[name]]))


def totals(run: Run) -> RunTotals:
    """Sums over replicas."""
    reps = run.world.replicas
    parts = [replica.totals for replica in run.replicas]
    stewards = [replica.steward for replica in run.replicas]
    setup = run.setup
    depth_seconds: dict[str, float] = {}
    for steward in stewards:
        for name, seconds in steward.depth_seconds.items():
            depth_seconds[name] = depth_seconds.get(name, 0.0) + seconds
    counts = run.world.exit_counts.sum(axis=0)
    exit_layers = {name: setup.profile.model(name).model.exit_layers for name in setup.candidates}
    per_request = run.requests.mean_prompt_tokens + run.requests.mean_output_tokens
    model, depth = held_by(max(depth_seconds, key=lambda name: depth_seconds[name]))
    held_s = run.end_s * len(reps)
    pool_seconds = sum(
        seconds * setup.pool_blocks(*held_by(name)) for name, seconds in depth_seconds.items()
    )
    return RunTotals(
        end_s=run.end_s,
        num_replicas=len(reps),
        num_gpus=len(reps) * setup.profile.device.num_gpus,
        energy_j=_sum(reps, "energy_j") if run.has_energy else math.nan,
        energy_idle_j=_sum(reps, "idle_energy_j") if run.has_energy else math.nan,
        energy_load_j=math.fsum(part.energy_load_j for part in parts)
        if run.has_energy
        else math.nan,
        busy_s=_sum(reps, "busy_s"),
        idle_s=_sum(reps, "idle_s"),
        load_s=math.fsum(part.load_s for part in parts),
        drain_s=math.fsum(part.drain_s for part in parts),
        evaluation_s=math.fsum(evaluation_seconds(one, run.end_s) for one in by_replica(run)),
        num_iterations=_count(reps, "num_iterations"),
        num_decode_iterations=_count(reps, "num_decode_iterations"),
        decode_rows=_count(reps, "decode_rows"),
        decode_s=_sum(reps, "decode_s"),
        batch_seconds=_sum(reps, "batch_seconds"),
        max_running=int(reps["max_rows"].max()),
        max_batch_size_supported=setup.requests_that_fit(model, depth, per_request),
        peak_weight_bytes=max(one.peak_weight_bytes for one in stewards),
        mean_weight_bytes=sum(one.weight_byte_seconds for one in stewards) / held_s,
        num_switches=sum(one.num_switches for one in stewards),
        num_loads=sum(one.num_loads for one in stewards),
        num_evaluations=sum(one.num_evaluations for one in stewards),
        num_breach_events=sum(one.num_breach_events for one in stewards),
        switch_time_s=math.fsum(one.switch_time_s for one in stewards),
        regime_s={
            name: math.fsum(float(rep.regime_s[k]) for rep in reps)
            for k, name in enumerate(REGIMES)
        },
        exit_layers=exit_layers,
        exit_counts={
            name: tuple(int(count) for count in counts[m, : len(exit_layers[name])])
            for m, name in enumerate(setup.candidates)
        },
        depth_seconds=depth_seconds,
        kv_block_tokens=setup.serving.block_tokens,
        mean_kv_use=_sum(reps, "kv_block_seconds") / pool_seconds if pool_seconds else 0.0,
        itl_bins_s=itl_edges(),
        itl_counts=tuple(run.world.itl_counts.sum(axis=0).tolist()),
        itl_sum_s=_sum(reps, "itl_sum_s"),
        itl_sum_square_s2=_sum(reps, "itl_sum_square_s2"),
    )


def by_replica(run: Run) -> list[list[DecisionEntry]]:
    """The decisions of each replica, in order of time."""
    logs: list[list[DecisionEntry]] = [[] for _ in run.replicas]
    for entry in run.decisions:
        logs[entry.replica].append(entry)
    return logs


def _sum(reps: Any, name: str) -> float:
    return math.fsum(float(value) for value in reps[name])


def _count(reps: Any, name: str) -> int:
    return int(reps[name].sum())
