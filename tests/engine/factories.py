"""Setups, profiles, exit traces and requests built in code: small models with round numbers.

The models are thumbnails (kilobytes, milliseconds), so that a figure can be checked by pencil.
Two of them share a tokenizer: `small` (exits after layers 2 and 4) and `large` (2, 4 and 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.cost import COEFFICIENTS
from helios_sim.engine import DecisionEntry, Run, Setup, simulate
from helios_sim.exits import ExitTraces
from helios_sim.model import EarlyExitModel, ModelShape
from helios_sim.outcome import run_data
from helios_sim.policy.contract import Policy, Slo, Snapshot
from helios_sim.policy.registry import make_policy
from helios_sim.policy.snapshot_json import read_snapshots
from helios_sim.profile import (
    Confidence,
    Device,
    Link,
    Loading,
    ModelProfile,
    Profile,
    Provenance,
    TraceExits,
)
from helios_sim.runs.records import RunData
from helios_sim.scenario import FleetSettings, MeasureSettings, ServingSettings
from helios_sim.streams import stream
from helios_sim.workload.arrivals import ArrivalSettings, PoissonArrivals, open_arrivals
from helios_sim.workload.requests import Requests

SECONDS = {
    "decode.fixed_s": 0.010,
    "decode.launch_s": 0.010,
    "prefill.fixed_s": 0.010,
    "prefill.launch_s": 0.008,
    "prefill.compute_s_per_token": 0.001,
    "check.base_s": 0.002,
    "head.base_s": 0.005,
    "kv_fill.base_s_per_layer": 0.001,
    "rebatch.overhead_s": 0.003,
}
JOULES = {
    "power.active_w": 100.0,
    "power.limit_w": 1e6,
    "decode.j_per_layer": 1.0,
    "decode.j_per_row_layer": 0.5,
    "prefill.j_per_layer": 1.0,
    "prefill.j_per_token_layer": 0.1,
    "check.j_base": 0.2,
    "head.j_base": 0.5,
    "kv_fill.j_per_layer": 0.1,
}
"""Costs of the thumbnail models; what is not named costs nothing."""

PADDING = {
    "decode.memory_s_per_padded_token": 2e-5,
    "decode.compute_s_per_padded_token": 1e-5,
    "decode.fixed_s_per_row": 0.0007,
    "rebatch.overhead_s_per_row": 0.0004,
    "prefill.fixed_s_per_prompt": 0.0013,
}
"""Costs that grow with the longest row and with what the host does for each row and prompt."""

DOMAINS = ("easy", "hard")


def thumbnail(
    name: str = "small",
    exit_layers: Sequence[int] = (2, 4),
    *,
    max_positions: int = 1000,
    threshold: float = 0.5,
    buckets: Sequence[int] = (),
    residual: Sequence[tuple[float, float]] = (),
    depth_residual: Sequence[tuple[float, float]] = (),
    costs: Mapping[str, float] | None = None,
) -> ModelProfile:
    """A model of 1,200 B a layer and 1,200 B beside them, and 40 B of KV a token and layer."""
    shape = ModelShape(
        family="llama",
        layers=exit_layers[-1],
        hidden=10,
        heads=1,
        kv_heads=1,
        head_dim=10,
        ffn=6,
        vocab=59,
        max_positions=max_positions,
        tied_head=True,
    )
    coefficients = dict.fromkeys(COEFFICIENTS, 0.0) | SECONDS | JOULES | dict(costs or {})
    return ModelProfile(
        model=EarlyExitModel(name, shape, tuple(exit_layers), "thumbnail"),
        coefficients=coefficients,
        batch_buckets=tuple(buckets),
        batch_residual=tuple(residual),
        depth_residual=tuple(depth_residual),
        hull=None,
        workspace_bytes=0,
        confidence=Confidence("max-softmax", threshold),
    )


def profile_of(
    *models: ModelProfile,
    memory_bytes: int = 100_000,
    disk: Link | None = None,
    host: Link | None = None,
) -> Profile:
    """A device with these models, as if it had been read from a folder."""
    return Profile(
        name="thumbnail",
        description="round numbers",
        device=Device("pencil", memory_bytes, 1, idle_w=50.0, active_w=100.0, load_w=80.0),
        models={model.model.name: model for model in models},
        loading=Loading(disk or Link(0.2, 30_000.0), host or Link(0.1, 12_000.0)),
        exits=TraceExits(Path("nowhere")),
        provenance=Provenance("published", (), (), {}),
        quantities={},
        document={},
        folder=Path("nowhere"),
        hash="0" * 64,
    )


def both_models(**changes: Any) -> Profile:
    """The two models on a device with room for either, loaded within a tenth of a second."""
    options: dict[str, Any] = {
        "disk": Link(0.02, 300_000.0),
        "host": Link(0.01, 120_000.0),
        **changes,
    }
    return profile_of(thumbnail("small", (2, 4)), thumbnail("large", (2, 4, 8)), **options)


def padding_models() -> Profile:
    """The two models where rows are padded, the host counts and a cache holds few layers."""
    options: dict[str, Any] = {
        "costs": PADDING,
        "residual": ((1.0, 1.0), (8.0, 1.3)),
        "depth_residual": ((2.0, 0.6), (4.0, 0.7), (8.0, 1.1)),
    }
    return profile_of(
        thumbnail("small", (2, 4), **options),
        thumbnail("large", (2, 4, 8), **options),
        disk=Link(0.02, 300_000.0),
        host=Link(0.01, 120_000.0),
    )


def graph_models() -> Profile:
    """The two models where graphs are captured for 1, 2 and 4 rows, at some milliseconds each."""
    options: dict[str, Any] = {
        "buckets": (1, 2, 4),
        "costs": {
            "capture.s_per_graph": 0.004,
            "capture.s_per_exit": 0.002,
            "capture.s_per_layer": 0.001,
            "capture.s_per_filled_layer": 0.0003,
            "decode.fixed_s_per_row": 0.0007,
            "rebatch.overhead_s_per_row": 0.0004,
        },
    }
    return profile_of(
        thumbnail("small", (2, 4), **options),
        thumbnail("large", (2, 4, 8), **options),
        disk=Link(0.02, 300_000.0),
        host=Link(0.01, 120_000.0),
    )


def traces_from(
    confidence: Mapping[str, Sequence[Sequence[float]]],
    exit_layers: Mapping[str, Sequence[int]],
    domains: Sequence[str] = ("only",),
) -> ExitTraces:
    """Traces of written confidences, domain after domain: each token agrees from 0.5 on."""
    shaped = {
        name: np.array(rows, np.float32).reshape(len(domains), -1, len(exit_layers[name]))
        for name, rows in confidence.items()
    }
    return ExitTraces(
        domains=tuple(domains),
        num_positions=next(iter(shaped.values())).shape[1],
        exit_layers={name: tuple(layers) for name, layers in exit_layers.items()},
        confidence=shaped,
        agrees={name: rows >= np.float32(0.5) for name, rows in shaped.items()},
        nll_nats={name: (2.0 - rows).astype(np.float32) for name, rows in shaped.items()},
        origin="trace",
    )


def drifting_traces(profile: Profile, num_positions: int = 257, seed: int = 3) -> ExitTraces:
    """Random traces of two domains: `easy` suits the small model, `hard` only the large one."""
    early = {("easy", "small"): 0.9, ("easy", "large"): 0.8, ("hard", "small"): 0.15}
    confidence, exit_layers = {}, {}
    for name, model in profile.models.items():
        exits = model.model.exit_layers
        rows = []
        for domain in DOMAINS:
            draws = stream(seed, f"{name} {domain}").random((num_positions, len(exits)))
            confident = draws < early.get((domain, name), 0.75)
            rows.append(np.where(confident, 0.5 + draws / 2, draws / 2))
        confidence[name] = np.concatenate(rows)
        exit_layers[name] = exits
    return traces_from(confidence, exit_layers, DOMAINS)


def requests_of(
    arrival_s: Sequence[float] | np.ndarray,
    prompt_tokens: Sequence[int] | np.ndarray,
    output_tokens: Sequence[int] | np.ndarray,
    *,
    trace_start: Sequence[int] | np.ndarray | None = None,
    domain: Sequence[int] | np.ndarray | None = None,
    domains: Sequence[str] = ("only",),
    num_users: int | None = None,
) -> Requests:
    """Requests from columns; without further word all of the first domain, from place 0."""
    num = len(arrival_s)
    zeros = np.zeros(num, np.int64)
    return Requests(
        arrival_s=np.asarray(arrival_s, np.float64),
        prompt_tokens=np.asarray(prompt_tokens, np.int32),
        output_tokens=np.asarray(output_tokens, np.int32),
        domain=np.asarray(zeros if domain is None else domain, np.int16),
        trace_start=np.asarray(zeros if trace_start is None else trace_start, np.int32),
        domains=tuple(domains),
        num_users=num_users,
    )


def arrivals_of(num: int, rate_per_s: float, seed: int) -> np.ndarray:
    """Poisson arrivals."""
    settings: ArrivalSettings = PoissonArrivals(kind="poisson", rate_per_s=rate_per_s)
    return open_arrivals(settings, seed, num, None)


def drifting_requests(
    num: int = 240,
    *,
    seed: int = 5,
    rate_per_s: float = 6.0,
    max_prompt: int = 24,
    max_output: int = 20,
    num_users: int = 0,
) -> Requests:
    """Easy requests that give way to hard ones; with users, a closed loop of them."""
    draws = stream(seed, "toy requests").random((4, num))
    arrival_s = arrivals_of(num, rate_per_s, seed)
    if num_users:
        # The first rows of a closed loop are starts, the others think times.
        arrival_s = np.round(draws[3], 3)
        arrival_s[:num_users] = np.round(np.arange(num_users) * 0.01, 3)
    return requests_of(
        arrival_s,
        1 + np.floor(draws[0] * max_prompt),
        1 + np.floor(draws[1] * max_output),
        trace_start=np.floor(draws[2] * 2**31),
        domain=(draws[3] < np.linspace(0.0, 1.0, num)).astype(int),
        domains=DOMAINS,
        num_users=num_users or None,
    )


def setup_of(
    profile: Profile,
    traces: ExitTraces,
    *,
    candidates: Sequence[str] | None = None,
    slo: Slo | None = None,
    seed: int = 1,
    timeline_interval_s: float = 1.0,
    fleet: Mapping[str, Any] | None = None,
    **serving: Any,
) -> Setup:
    """A setup with the thumbnails' small blocks and lengths; keywords go to `[serving]`."""
    options: dict[str, Any] = {
        "max_batch": 8,
        "block_tokens": 4,
        "expected_prompt_tokens": 12,
        "expected_output_tokens": 10,
        "chunk_tokens": 16,
        **serving,
    }
    return Setup(
        profile=profile,
        traces=traces,
        candidates=tuple(profile.models if candidates is None else candidates),
        fleet=FleetSettings(profile=profile.name, **(fleet or {})),
        serving=ServingSettings(**options),
        measure=MeasureSettings(timeline_interval_s=timeline_interval_s),
        slo=slo or Slo(),
        seed=seed,
    )


def drifting_setup(**changes: Any) -> Setup:
    """Both models, drifting traces; keywords as for `setup_of`."""
    profile = changes.pop("profile", None) or both_models()
    return setup_of(profile, drifting_traces(profile), **changes)


QUICK = {
    "evaluation_requests": 2,
    "reassess_requests": 30,
    "breach_window_tokens": 20,
    "breach_limit": 8,
}
"""HELIOS settings for workloads of a few hundred requests."""


def policy_of(use: str, **options: Any) -> Policy:
    """A shipped policy, one that acts with quick settings."""
    if use in ("helios", "switch-only", "load-only"):
        options = QUICK | options
    if use in ("always", "clairvoyant"):
        options = {"reassess_requests": 30} | options
    if use == "never":
        options = {"evaluation_requests": 2} | options
    return make_policy(use, options)


def play(
    setup: Setup, requests: Requests, use: str = "helios", **options: Any
) -> tuple[Run, RunData]:
    """Play a shipped policy and give the run and its records."""
    return play_policy(setup, requests, lambda: policy_of(use, **options), use)


def play_policy(
    setup: Setup, requests: Requests, make: Any, label: str = "mine"
) -> tuple[Run, RunData]:
    """Play a policy that `make` builds, and give the run and its records."""
    run = simulate(setup, requests, make)
    policy: Policy = run.policy
    return run, run_data(run, label, policy.name, setup.seed, {"name": "test"})


def snapshots_of(entries: Sequence[DecisionEntry]) -> list[Snapshot]:
    """What the policy saw at each decision of a log."""
    replicas = [entry.replica for entry in entries]
    return read_snapshots(replicas, [entry.snapshot for entry in entries])


def at_memory(profile: Profile, memory_bytes: int) -> Profile:
    """The profile on a device of another memory."""
    return replace(profile, device=replace(profile.device, memory_bytes=memory_bytes))
