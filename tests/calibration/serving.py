"""Tiny checkpoints, a profile that names them and a scenario, as files and in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.model.confidence import Confidence
from calibration.model.decode import Decoder
from calibration.model.early_exit import EarlyExitLM, from_stock, save
from calibration.model.kv import PagedPool, SlotPool
from calibration.serving.batching import Decode, Life
from calibration.serving.host import Host
from calibration.serving.machine import ModelMachine
from calibration.serving.serve import WallClock
from helios_sim.cards import Room
from helios_sim.cost import COEFFICIENTS
from helios_sim.exits import ExitTraces, write_traces
from helios_sim.policy.contract import Slo
from helios_sim.policy.registry import make_policy
from helios_sim.profile import Confidence as ProfileConfidence
from helios_sim.profile import ModelProfile, Profile, quantity
from helios_sim.profiles.files import load_profile, save_profile
from helios_sim.scenario import FleetSettings, ServingSettings
from tests.calibration.tiny import prompt, stock_model
from tests.engine.factories import SECONDS, profile_of

DOMAINS = ("code", "prose")


def model_of(
    name: str = "small",
    exits: Sequence[int] = (2, 4),
    family: str = "llama",
    seed: int = 0,
    positions: int = 256,
) -> EarlyExitLM:
    """A random model of as many layers as its last exit."""
    stock = stock_model(family, exits[-1], seed, max_position_embeddings=positions)
    return from_stock(stock, exits, name=name, tokenizer="bytes")


def profile_for(*models: EarlyExitLM, threshold: float, overhead_s: float = 0.0) -> Profile:
    """A profile in memory that names these models, with round costs and plenty of memory.

    Going on from an exit costs `overhead_s`, and filling nothing.
    """
    costs = dict.fromkeys(COEFFICIENTS, 0.0) | SECONDS
    costs |= {"rebatch.overhead_s": overhead_s, "kv_fill.base_s_per_layer": 0.0}
    return profile_of(
        *(
            ModelProfile(
                model=model.spec,
                coefficients=costs,
                batch_buckets=(),
                batch_residual=(),
                hull=None,
                workspace_bytes=0,
                confidence=ProfileConfidence("max-softmax", threshold),
            )
            for model in models
        ),
        memory_bytes=2**26,
    )


class KeptWeights:
    """Models that are in memory already; what the host loads is a new pool."""

    in_memory: frozenset[str] = frozenset()
    loaded_bytes = 1

    def __init__(
        self, models: Mapping[str, EarlyExitLM], kv: str, max_tokens: int, free_running: bool
    ) -> None:
        self.models, self.kv, self.max_tokens = models, kv, max_tokens
        self.free_running = free_running
        self.max_rows = 8
        self.block_tokens = 4
        self.pools: list[Any] = []

    def bring_in(self, name: str, depth: int) -> None:
        self.in_memory |= {name}

    def fits_beside(self, num_bytes: int) -> bool:
        return False

    def begin(self, name: str, depth: int) -> Any:
        raise AssertionError("nothing is loaded beside serving here")

    def take_up(self, name: str, depth: int, level: int, pool_blocks: int) -> ModelMachine:
        model = self.models[name]
        pool: Any
        if self.kv == "slots":
            pool = SlotPool(model.kv_dims, depth, self.max_rows, self.max_tokens)
        else:
            blocks = min(pool_blocks, 64) * 2
            pool = PagedPool(model.kv_dims, depth, blocks, self.block_tokens, max_rows=8)
        self.pools.append(pool)
        decoder = Decoder(model, pool)
        return ModelMachine(model, pool, decoder, depth=depth, free_running=self.free_running)


class CheckedHost(Host):
    """A host that asserts the law of blocks and the pool's own books at every iteration."""

    def step(self, plan: Any) -> Any:
        outcome = super().step(plan)
        batch = self.batch
        held = sum(row.blocks for row in batch.rows)
        assert batch.free_blocks >= 0
        assert held + batch.free_blocks + batch.staged_blocks == batch.pool_blocks
        assert isinstance(self.machine, ModelMachine)
        self.machine.pool.check()
        occupants = self.machine.occupants
        assert len(occupants) == self.machine.pool.num_rows
        assert all(row.slot == place for place, row in enumerate(occupants) if row is not None)
        if isinstance(plan, Decode):
            assert None not in occupants
        return outcome


def lives_for(
    lengths: Sequence[tuple[int, int]], arrival_s: float = 0.0, seed: int = 0
) -> list[Life]:
    """Requests of these prompt and output lengths over random text, all at once."""
    return [
        Life(
            row,
            arrival_s,
            prompt_tokens,
            output_tokens,
            prompt(prompt_tokens + output_tokens, row + seed),
        )
        for row, (prompt_tokens, output_tokens) in enumerate(lengths)
    ]


LENGTHS = ((9, 12), (3, 7), (14, 1), (5, 16), (8, 9), (2, 11))


def serve_kept(
    models: Sequence[EarlyExitLM],
    use: str,
    options: Mapping[str, Any] | None = None,
    *,
    threshold: float,
    lives: Sequence[Life] | None = None,
    kv: str = "slots",
    free_running: bool = False,
    memory_bytes: int | None = None,
    overhead_s: float = 0.0,
    **serving: Any,
) -> CheckedHost:
    """Serve requests with models in memory under a shipped policy."""
    profile = profile_for(*models, threshold=threshold, overhead_s=overhead_s)
    settings = {
        "max_batch": 4,
        "block_tokens": 4,
        "max_prefill_tokens": 24,
        "expected_prompt_tokens": 8,
        "expected_output_tokens": 8,
        **serving,
    }
    room = Room(
        profile=profile,
        candidates=tuple(profile.models),
        fleet=FleetSettings(profile="kept", memory_bytes=memory_bytes),
        serving=ServingSettings(**settings),
    )
    given = list(lives or lives_for(LENGTHS))
    longest = max(life.prompt_tokens + life.output_tokens for life in given) - 1
    weights = KeptWeights({m.name: m for m in models}, kv, longest, free_running)
    host = CheckedHost(
        room=room,
        policy=make_policy(use, dict(options or {})),
        slo=Slo(),
        lives=given,
        weights=weights,
        clock=WallClock(),
        timeline_interval_s=0.01,
    )
    host.play()
    for pool in weights.pools:
        pool.check()
        assert pool.num_rows == 0
    return host


@torch.inference_mode()
def first_exit_threshold(model: EarlyExitLM, share: float = 0.5) -> float:
    """A threshold that about this share of random tokens reaches at the first exit."""
    ids = torch.tensor([prompt(200, 77)])
    hidden = model.backbone.forward_dense(ids)[model.exit_layers[0] - 1][0]
    confidence = model.decide(model.logits(hidden, 0), 0).confidence
    return float(torch.quantile(confidence, 1.0 - share))


def family(folder: Path, threshold: float = 0.05) -> dict[str, Path]:
    """Two checkpoints on disk that share a tokenizer."""
    places = {}
    for model in (model_of("small", (2, 4), seed=1), model_of("large", (2, 4, 6), seed=2)):
        name = model.spec.name
        model.confidence = Confidence("max-softmax", threshold)
        save(model, folder / name)
        places[name] = folder / name
    return places


def write_profile(folder: Path, models: Sequence[EarlyExitLM], threshold: float) -> Profile:
    """A profile folder of these models, with traces of noise."""
    document = copy.deepcopy(dict(load_profile("opt-a100-40gb").document))
    template = document["models"]["opt-1.3b"]
    document |= {"name": folder.name, "models": {}}
    document["device"] |= {"memory_bytes": quantity("memory_bytes", 2**27, "assumed", "a test")}
    for model in models:
        spec = model.spec
        entry = copy.deepcopy(template)
        entry["shape"] = asdict(spec.shape) | {"grade": "measured", "source": "the checkpoint"}
        for key, value in (
            ("exit_layers", list(spec.exit_layers)),
            ("exit_head_params", spec.exit_head_params),
            ("workspace_bytes", 0),
        ):
            entry[key]["value"] = value
        entry |= {"tokenizer": spec.tokenizer, "bytes_per_param": 4, "bytes_per_kv_element": 4}
        entry["confidence"]["default_threshold"]["value"] = threshold
        document["models"][spec.name] = entry
    document["exits"] = {"kind": "trace", "file": "exits.parquet"}
    draws = np.random.Generator(np.random.PCG64(3))
    shape = (len(DOMAINS), 64)
    traces = ExitTraces(
        domains=DOMAINS,
        num_positions=64,
        exit_layers={m.name: m.exit_layers for m in models},
        confidence={m.name: draws.random((*shape, len(m.exit_layers)), np.float32) for m in models},
        agrees={m.name: np.ones((*shape, len(m.exit_layers)), np.bool_) for m in models},
        nll_nats={m.name: np.ones((*shape, len(m.exit_layers)), np.float32) for m in models},
        origin="trace",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}-exits.parquet"
    write_traces(traces, path)
    return save_profile(document, folder, traces=path)
