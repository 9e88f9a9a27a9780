"""Synthetic runs for tests: plausible, sound by the laws, and cheap to make."""

from __future__ import annotations

import heapq
import json
from typing import Any

import numpy as np
import polars as pl

from helios_sim.model import ModelShape
from helios_sim.runs.records import RunData, RunTotals, conformed

EXIT_LAYERS = {"opt-1.3b": (6, 12, 24), "opt-6.7b": (9, 17, 32)}
ITL_EDGES_S = tuple(float(edge) for edge in np.geomspace(1e-4, 100.0, 1401))

DEPTHS = {
    "vanilla": ((("opt-6.7b", 32), 1.0),),
    "ee-single": ((("opt-6.7b", 32), 1.0),),
    "static-depth": ((("opt-1.3b", 12), 1.0),),
    "helios": (
        (("opt-1.3b", 24), 0.05),
        (("opt-1.3b", 6), 0.35),
        (("opt-6.7b", 9), 0.4),
        (("opt-1.3b", 12), 0.2),
    ),
}
"""For each policy what it serves, by consecutive shares of the run."""


def fifo_admission(arrival_s: np.ndarray, service_s: np.ndarray, slots: int) -> np.ndarray:
    """When each request is admitted: first come first served on `slots` equal places."""
    free = [0.0] * slots
    admitted = np.empty_like(arrival_s)
    for i, (arrived, lasts) in enumerate(zip(arrival_s.tolist(), service_s.tolist(), strict=True)):
        start = max(arrived, heapq.heappop(free))
        admitted[i] = start
        heapq.heappush(free, start + lasts)
    return admitted


def make_run(
    policy: str = "vanilla",
    *,
    label: str | None = None,
    num_requests: int = 400,
    seed: int = 1,
    rate_per_s: float = 4.0,
    tpot_s: float = 0.015,
    slots: int = 32,
    num_refused: int = 0,
    num_replicas: int = 1,
    queueing: bool = True,
    **overrides: Any,
) -> RunData:
    """A run of one policy; requests depend on the seed alone, so that policies share them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    arrival_s = np.cumsum(-np.log1p(-rng.random(num_requests))) / rate_per_s
    prompt = rng.integers(16, 2000, num_requests)
    output = np.maximum(1, (-np.log1p(-rng.random(num_requests)) * 120.0).astype(np.int64))
    output[::50] = 1
    trace_start = rng.integers(0, 1 << 31, num_requests)
    noise = 0.8 + 0.4 * rng.random(num_requests)
    refused = np.zeros(num_requests, dtype=bool)
    refused[np.linspace(0, num_requests - 1, num_refused).astype(int)] = num_refused > 0

    prefill_s = 0.02 + prompt * 2e-5
    service_s = np.where(refused, 0.0, prefill_s + (output - 1) * tpot_s * noise)
    admitted_s = (
        fifo_admission(arrival_s, service_s, slots * num_replicas) if queueing else arrival_s
    )
    first_s = admitted_s + prefill_s
    finished_s = np.maximum(first_s, admitted_s + service_s)
    end_s = float(max(finished_s[~refused].max(), arrival_s[-1]))
    generated = np.where(refused, 0, output)
    decoded = np.maximum(generated - 1, 0)

    shares = np.cumsum([share for _, share in DEPTHS[policy]])
    stage = np.minimum(np.searchsorted(shares, finished_s / end_s, "right"), len(shares) - 1)
    models = np.array([name for (name, _), _ in DEPTHS[policy]])[stage]
    depths = np.array([depth for (_, depth), _ in DEPTHS[policy]])[stage]
    early = depths < np.where(models == "opt-1.3b", 24, 32)
    breaches = np.where(early, (generated * 0.3 * noise).astype(int), 0)
    exits = policy == "ee-single"
    executed = decoded * np.where(exits, 15, depths)
    values = {
        "request_id": np.arange(num_requests),
        "replica": np.arange(num_requests) % num_replicas,
        "domain": np.array(["prose", "code"])[np.arange(num_requests) % 2],
        "arrival_s": arrival_s,
        "admitted_s": admitted_s,
        "first_token_s": first_s,
        "finished_s": finished_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "generated_tokens": generated,
        "trace_start": trace_start,
        "status": np.where(refused, "refused", "finished"),
        "model": models,
        "depth": depths,
        "evaluated": (np.arange(num_requests) % 150 < 10) & (policy == "helios"),
        "num_preemptions": (np.arange(num_requests) % 97 == 0).astype(int),
        "decoded_tokens": decoded,
        "executed_layers": executed,
        "agree_tokens": generated - (breaches * 0.2).astype(int),
        "nll_nats": generated * 2.3 * noise,
        "breaches": breaches,
        "breaches_relative": (breaches * 0.6).astype(int),
    }
    requests = pl.DataFrame(values).with_columns(
        pl.when(pl.col("status") != "refused").then(pl.col(name)).alias(name)
        for name in ("admitted_s", "first_token_s", "finished_s", "model", "depth")
    )
    timeline = _timeline(policy, requests, end_s, num_replicas)
    energy_j = float((timeline["power_w"] * timeline["interval_s"]).sum())
    gaps = np.repeat(tpot_s * noise, decoded)
    counts = np.histogram(np.clip(gaps, 1.001e-4, 99.0), ITL_EDGES_S)[0]
    exit_counts = _exit_counts(policy, models, depths, decoded)
    busy_s = 0.8 * end_s * num_replicas
    facts = {
        "label": label or policy,
        "policy": policy,
        "objective": "throughput",
        "seed": seed,
        "scenario": {
            "name": "synthetic",
            "seed": seed,
            "policy": {"name": policy},
            "workload": {"rate_per_s": rate_per_s, "domains": ["prose", "code"]},
        },
        "environment": {
            "helios-sim": "0.1.0",
            "profiles": {
                "opt-a100": {"sha256": "9f2c" * 16},
            },
            "profile_grades": {"measured": 0, "published": 31, "assumed": 12},
        },
        "requests": requests,
        "decisions": _decisions(policy, end_s, num_replicas),
        "timeline": timeline,
        "totals": RunTotals(
            end_s=end_s,
            num_replicas=num_replicas,
            num_gpus=num_replicas,
            energy_j=energy_j,
            energy_idle_j=0.1 * energy_j,
            energy_load_j=0.02 * energy_j,
            busy_s=busy_s,
            idle_s=0.15 * end_s * num_replicas,
            load_s=0.03 * end_s * num_replicas,
            drain_s=0.01 * end_s,
            evaluation_s=0.05 * end_s if policy == "helios" else 0.0,
            num_iterations=int(decoded.sum()) // 6 + num_requests,
            num_decode_iterations=int(decoded.sum()) // 6,
            decode_rows=int(decoded.sum()),
            decode_s=0.7 * busy_s,
            batch_seconds=float((finished_s - admitted_s)[~refused].sum()),
            max_running=slots,
            max_batch_size_supported=float(np.mean([900 // int(depth) for depth in depths])),
            peak_weight_bytes=int(depths.max()) * 400_000_000,
            mean_weight_bytes=float(depths.mean()) * 400_000_000.0,
            num_switches=3 if policy == "helios" else 0,
            num_loads=1 if policy == "helios" else 0,
            num_evaluations=4 if policy == "helios" else 0,
            num_breach_events=1 if policy == "helios" else 0,
            switch_time_s=1.25 if policy == "helios" else 0.0,
            regime_s={"launch": 0.5 * busy_s, "memory": 0.4 * busy_s, "compute": 0.1 * busy_s},
            exit_layers={name: EXIT_LAYERS[name] for name in sorted(exit_counts)},
            exit_counts=exit_counts,
            depth_seconds={
                f"{name}@{depth}": share * busy_s for (name, depth), share in DEPTHS[policy]
            },
            kv_block_tokens=16,
            mean_kv_use=0.4,
            itl_bins_s=ITL_EDGES_S,
            itl_counts=tuple(int(count) for count in counts),
            itl_sum_s=float(gaps.sum()),
            itl_sum_square_s2=float((gaps**2).sum()),
        ),
    }
    return conformed(RunData(**{**facts, **overrides}))


def _exit_counts(
    policy: str, models: np.ndarray, depths: np.ndarray, decoded: np.ndarray
) -> dict[str, tuple[int, ...]]:
    """Decoded tokens by the exit they left at; `ee-single` spreads them as the paper's table."""
    counts: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(models.tolist())):
        if policy == "ee-single":
            total = int(decoded.sum())
            shallow, middle = int(0.736 * total), int(0.048 * total)
            counts[name] = (shallow, middle, total - shallow - middle)
        else:
            counts[name] = tuple(
                int(decoded[(models == name) & (depths == layer)].sum())
                for layer in EXIT_LAYERS[name]
            )
    return counts


def _timeline(policy: str, requests: pl.DataFrame, end_s: float, num_replicas: int) -> pl.DataFrame:
    """One row a replica and second; the tokens of a request are booked where it finishes."""
    edges = np.append(np.arange(0.0, end_s, 1.0), end_s)
    shares = np.cumsum([share for _, share in DEPTHS[policy]])
    tables = []
    for replica in range(num_replicas):
        mine = requests.filter((pl.col("replica") == replica) & pl.col("finished_s").is_not_null())
        end = edges[1:]
        running = np.searchsorted(np.sort(mine["admitted_s"]), end) - np.searchsorted(
            np.sort(mine["finished_s"]), end
        )
        waiting = (
            np.searchsorted(np.sort(mine["arrival_s"]), end)
            - np.searchsorted(np.sort(mine["finished_s"]), end)
            - running
        )
        slot = np.minimum(np.searchsorted(edges, mine["finished_s"], "left") - 1, len(end) - 1)
        tokens = np.bincount(slot, weights=mine["generated_tokens"], minlength=len(end))
        breaches = np.bincount(slot, weights=mine["breaches"], minlength=len(end))
        stage = np.minimum(np.searchsorted(shares, end / end_s, "right"), len(shares) - 1)
        served = [DEPTHS[policy][int(one)][0] for one in stage]
        changed = np.append(False, np.diff(stage) != 0)
        tables.append(
            pl.DataFrame(
                {
                    "replica": np.full(len(end), replica),
                    "time_s": end,
                    "interval_s": np.diff(edges),
                    "mean_running": running.astype(float),
                    "waiting": waiting,
                    "kv_blocks_used": np.minimum(running * 60, 4000),
                    "kv_blocks": np.full(len(end), 4000),
                    "model": [name for name, _ in served],
                    "depth": [depth for _, depth in served],
                    "state": np.where(
                        changed, "loading", np.where(running > 0, "serving", "idle")
                    ).tolist(),
                    "power_w": 60.0 + 8.0 * np.minimum(running, 30),
                    "tokens": tokens.astype(np.int64),
                    "breaches": breaches.astype(np.int64),
                }
            )
        )
    return pl.concat(tables)


def _decisions(policy: str, end_s: float, num_replicas: int) -> pl.DataFrame:
    """A start for every policy; for HELIOS a round of evaluations, a switch and a load."""
    rows: list[dict[str, Any]] = []
    snapshot = json.dumps({"num_waiting": 3, "num_running": 8})

    (first, depth), _ = DEPTHS[policy][0]
    mode = "loaded-depth" if policy == "helios" else "full"
    plan = [(0.0, "start", "serve", first, depth, mode, f"{policy} serves {first} throughout.")]
    if policy == "helios":
        for share in (0.01, 0.51):
            for name, layers in (("opt-1.3b", 24), ("opt-6.7b", 32)):
                reason = f"{name} has no evaluation of this round."
                plan.append((share, "reassess", "evaluate", name, layers, "solo", reason))
        plan += [
            (0.05, "evaluated", "serve", "opt-1.3b", 6, mode, "73 % of its tokens left at 6."),
            (0.4, "breached", "switch", "opt-6.7b", 9, mode, "51 of 100 breached; 0.4 s < 0.9 s."),
            (0.8, "breached", "load-layers", "opt-1.3b", 12, mode, "Loading is the smaller cost."),
        ]
    for share, event, decision, model, layers, exit_mode, reason in sorted(plan):
        rows.append(
            {
                "time_s": share * end_s,
                "replica": len(rows) % num_replicas,
                "event": event,
                "decision": decision,
                "model": model,
                "depth": layers,
                "exit_mode": exit_mode,
                "reason": reason,
                "ready_s": share * end_s + 0.4,
                "moved_bytes": 0 if decision == "evaluate" else layers * 100_000_000,
                "snapshot": snapshot,
            }
        )
    return pl.DataFrame(rows)


def total_params(shape: ModelShape) -> int:
    """All weights of the full model, without separate exit heads."""
    return shape.embedding_params() + shape.layers * shape.layer_params() + shape.head_params()
