"""Readings made from a cost model that is known, so that a fit can be held against the truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from calibration.fitting.points import gather
from calibration.measuring.readings import ENVIRONMENT_FILE, POINTS_FILE, SCHEMA, Reading
from helios_sim import cost
from helios_sim.cost import COEFFICIENTS
from helios_sim.model import EarlyExitModel, ModelShape

SHAPE = ModelShape(
    family="llama",
    layers=12,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    ffn=160,
    vocab=256,
    max_positions=1024,
    tied_head=True,
)

GPU_LIKE: Mapping[str, float] = {
    "decode.launch_s": 3.0e-5,
    "decode.memory_s_per_layer": 2.0e-5,
    "decode.memory_s_per_row": 4.0e-7,
    "decode.memory_s_per_context_token": 1.6e-9,
    "prefill.launch_s": 4.0e-5,
    "prefill.compute_s_per_layer": 5.0e-6,
    "prefill.compute_s_per_token": 3.0e-7,
    "prefill.compute_s_per_pair": 5.0e-11,
    "decode.fixed_s": 3.0e-4,
    "prefill.fixed_s": 4.0e-4,
    "head.base_s": 4.0e-5,
    "head.s_per_row": 3.0e-7,
    "check.base_s": 5.0e-5,
    "check.s_per_row": 3.5e-7,
    "kv_fill.base_s_per_layer": 1.0e-5,
    "kv_fill.s_per_row_layer": 1.0e-7,
    "power.active_w": 140.0,
    "decode.j_per_layer": 5.0e-3,
    "decode.j_per_row_layer": 1.0e-4,
    "decode.j_per_context_token_layer": 4.0e-7,
    "prefill.j_per_layer": 5.0e-3,
    "prefill.j_per_token_layer": 1.0e-4,
    "prefill.j_per_pair_layer": 2.0e-8,
    "head.j_base": 1.0e-2,
    "head.j_per_row": 1.5e-4,
    "power.limit_w": 700.0,
}
CAPTURE: Mapping[str, float] = {
    "capture.s_per_graph": 8.0e-4,
    "capture.s_per_exit": 5.0e-4,
    "capture.s_per_layer": 2.0e-4,
    "capture.s_per_filled_layer": 7.0e-5,
}
"""Planted wherever graphs are."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (16, 128, 512, 1000)
HELD_OUT_BATCHES = (3, 24, 96)
DEPTHS = (3, 6, 12)
CAPTURED = (("embed", 0), ("run", 3), ("run", 6), ("tell", 0), ("fill", 3), ("fill", 6))
"""Kinds of graphs and the layers in them."""

CAPTURES_HELD_OUT = (2, 16, 128)
LOAD_W = 95.0
IDLE_W = 70.0
STACK_S = 2.0e-5
DISK = (4.0e-3, 2.0e9)
HOST = (5.0e-5, 2.5e10)


def model(name: str = "planted") -> EarlyExitModel:
    """A small model of two early exits."""
    return EarlyExitModel(name, SHAPE, (3, 6, 12), "bytes", 4, 4)


def array(coefficients: Mapping[str, float]) -> np.ndarray:
    """Coefficients as the cost functions read them; what is not named is 0."""
    return np.array([coefficients.get(name, 0.0) for name in COEFFICIENTS])


@dataclass
class Plan:
    """What is planted: coefficients, noise (relative), factors, and what was measured.

    `factor` goes by batch, `depth_factor` by loaded depth. `ragged` adds rows of unequal contexts
    to stacks and iterations; `prompts` are the numbers of prompts of whole prefill iterations;
    `captures` says whether capturing was timed where there are graphs, `leaving` whether rows were
    let leave, and `within` which coefficients are other ones in an iteration than alone.
    """

    coefficients: Mapping[str, float] = field(default_factory=lambda: GPU_LIKE)
    noise: float = 0.0
    seed: int = 0
    factor: Mapping[int, float] = field(default_factory=dict)
    depth_factor: Mapping[int, float] = field(default_factory=dict)
    ragged: bool = False
    prompts: tuple[int, ...] = (1,)
    modes: tuple[str, ...] = ("eager",)
    captures: bool = True
    leaving: bool = True
    within: Mapping[str, float] = field(default_factory=dict)
    eager_slowdown_s: float = 0.0
    energy: bool = True
    trials: int = 1
    name: str = "planted"


def readings(plan: Plan) -> list[Reading]:
    """Every reading of a measurement of the planted model."""
    rng = np.random.default_rng(plan.seed)
    c = array(plan.coefficients)
    found: list[Reading] = []

    def noisy(value: float) -> float:
        return float(value * np.exp(plan.noise * rng.standard_normal()))

    def add(quantity: str, seconds: float, **values: Any) -> None:
        for trial in range(plan.trials):
            known = {"model": plan.name, **values}
            found.append(Reading(quantity=quantity, seconds=noisy(seconds), trial=trial, **known))

    def factor(batch: int, depth: int) -> float:
        return plan.factor.get(batch, 1.0) * plan.depth_factor.get(depth, 1.0)

    def decode(batch: int, context: int, purpose: str, longest: int | None = None) -> None:
        wide = longest or context
        for mode in plan.modes:
            slow = plan.eager_slowdown_s if mode == "eager" and len(plan.modes) > 1 else 0.0
            rows = min(b for b in BATCHES if b >= batch) if mode == "graph" else batch
            held, read = batch * context, rows * wide
            values = {
                "mode": mode,
                "batch": batch,
                "context_tokens": context,
                "longest_context_tokens": longest,
                "purpose": purpose,
            }
            for depth in DEPTHS:
                layer = cost.layer_seconds(c, rows, held, read, 0, 0, 0)[0] * factor(batch, depth)
                add("decode_layers", STACK_S + depth * (layer + slow), layers=depth, **values)
                if longest or (context == 512 and depth == DEPTHS[-1]):
                    whole, _ = cost.decode_seconds(
                        c, rows, held, read, depth, 0, 1, 0, rows, batch, factor(batch, depth)
                    )
                    add("iteration", whole + depth * slow, layers=depth, **values)

    def leave(batch: int, context: int, purpose: str) -> None:
        """All rows at each exit, and half of them at each but the last."""
        known = array({**plan.coefficients, **plan.within})
        mode = plan.modes[-1]
        values = {
            "mode": mode,
            "batch": batch,
            "context_tokens": context,
            "longest_context_tokens": context,
            "purpose": purpose,
        }

        def computed(batch: int) -> int:
            return min(b for b in BATCHES if b >= batch) if mode == "graph" else batch

        def one_pass(batch: int, layers: int, checks: int, heads: int) -> float:
            rows = computed(batch)
            layer, _ = cost.layer_seconds(known, rows, batch * context, rows * context, 0, 0, 0)
            found = cost.begin_seconds(known) + layers * layer * factor(batch, DEPTHS[-1])
            found += checks * cost.check_seconds(known, batch)
            return found + heads * cost.head_seconds(known, batch)

        for level, layers in enumerate(DEPTHS):
            is_last = layers == DEPTHS[-1]
            rows, filled = computed(batch), DEPTHS[-1] - layers
            whole = one_pass(batch, layers, level + (not is_last), is_last)
            whole += cost.told_seconds(known, batch) + cost.kv_fill_seconds(known, rows, filled)
            add("exit_iteration", whole, layers=layers, **values)
            if is_last or batch == 1:
                continue
            gone, left = batch // 2, batch - batch // 2
            split = one_pass(batch, layers, level + 1, 0) + one_pass(left, filled, 1 - level, 1)
            split += cost.told_seconds(known, batch)
            split += cost.kv_fill_seconds(known, computed(gone), filled)
            split += cost.going_on_seconds(known, left)
            add("split_iteration", split, layers=layers, **values)

    for batch in BATCHES:
        for context in CONTEXTS:
            decode(batch, context, "fit")
        if plan.leaving:
            leave(batch, 128, "fit")
        if plan.ragged and batch > 1:
            decode(batch, 300, "fit", longest=520)
            decode(batch, 150, "fit", longest=290)
        add("head", cost.head_seconds(c, batch), batch=batch)
        add("check", cost.check_seconds(c, batch), batch=batch)
        add("kv_fill", cost.kv_fill_seconds(c, batch, 6), batch=batch, layers=6)
        if "graph" in plan.modes and plan.captures:
            for kind, layers in CAPTURED:
                is_exit = float(kind == "tell")
                of_layers = [layers * (kind == which) for which in ("run", "fill")]
                spent = cost.capture_seconds(array(CAPTURE), 1.0 - is_exit, is_exit, *of_layers)
                purpose = "held-out" if batch in CAPTURES_HELD_OUT else "fit"
                values = {"mode": "graph", "layers": layers or None, "batch": batch}
                add(f"capture_{kind}", spent, purpose=purpose, **values)
    for batch in HELD_OUT_BATCHES if not plan.factor else BATCHES[1:-1:2]:
        for context in (64, 700):
            decode(batch, context, "held-out")
        if plan.ragged:
            decode(batch, 260, "held-out", longest=500)
        if plan.leaving:
            leave(batch, 400, "held-out")
    for prompt, purpose in [(n, "fit") for n in (16, 32, 64, 128, 256, 512, 1000)] + [
        (n, "held-out") for n in (48, 400)
    ]:
        pairs = prompt * (prompt + 1) / 2
        seconds = cost.layer_seconds(c, 0, 0, 0, prompt, 0, pairs)[0]
        for depth in DEPTHS:
            add(
                "prefill_layers",
                STACK_S + depth * seconds,
                mode="eager",
                layers=depth,
                batch=1,
                prompt_tokens=prompt,
                context_tokens=0,
                purpose=purpose,
            )
        for count in plan.prompts:
            whole, _ = cost.mixed_seconds(
                c, 0, 0, 0, count * prompt, 0, count * pairs, 12, 0, count, count, 1
            )
            add(
                "iteration",
                whole,
                mode="eager",
                layers=12,
                batch=count,
                prompt_tokens=prompt,
                context_tokens=0,
                purpose=purpose,
            )
    for size in (2**20, 2**22, 2**24, 2**26):
        add("load_disk", DISK[0] + size / DISK[1], bytes=size)
        add("load_host_pinned", HOST[0] + size / HOST[1], bytes=size)
        add("copy_bandwidth", size / 4.0e10, bytes=size, model="")
        add("copy_bandwidth", size / 2.0 / HOST[1], bytes=size, model="", mode="link")
    add("launch_floor", 2.5e-5, layers=1, model="", mode="eager")
    weights = model().weight_bytes(12)
    found.append(
        Reading(
            "memory_weights", plan.name, layers=12, bytes=weights + 4096, predicted_bytes=weights
        )
    )
    for batch, taken in ((1, 1_000_000), (128, 3_000_000)):
        found.append(Reading("memory_workspace", plan.name, batch=batch, bytes=taken))
    if plan.energy:
        found += energy_readings(plan, c, noisy)
    return found


def energy_readings(plan: Plan, c: np.ndarray, noisy: Any) -> list[Reading]:
    """Windows of idling, decoding, prefilling, of the head and of whole iterations."""
    found = [
        Reading("idle_power", seconds=5.0, joules=5 * IDLE_W, watts=IDLE_W, trial=trial)
        for trial in range(3)
    ]
    # Copies alone take less than loads, and say nothing of how long these take.
    found.append(
        Reading("load_energy", bytes=2**24, seconds=0.5 * 2**24 / HOST[1], joules=1.0, watts=LOAD_W)
    )

    def add(quantity: str, seconds: float, work: float, **values: Any) -> None:
        joules = noisy(cost.iteration_joules(c, seconds, work))
        found.append(
            Reading(
                quantity,
                plan.name,
                seconds=seconds,
                joules=joules,
                watts=joules / seconds,
                meter="planted",
                **values,
            )
        )

    for depth in DEPTHS:
        for batch in (1, 8, 32, 128):
            for context in (128, 900):
                held = batch * context
                seconds, _ = cost.layer_seconds(c, batch, held, held, 0, 0, 0)
                work = depth * cost.layer_joules(c, batch, held, held, 0, 0)
                load = {"layers": depth, "batch": batch, "context_tokens": context}
                add("decode_energy", STACK_S + depth * seconds, work, **load)
                read = (batch, held, held)
                whole_s, _ = cost.decode_seconds(c, *read, depth, 0, 1, 0, batch, batch, 1)
                add("iteration_energy", whole_s, work + cost.head_joules(c, batch), **load)
        for prompt in (64, 256, 1000):
            pairs = prompt * (prompt + 1) / 2
            seconds, _ = cost.layer_seconds(c, 0, 0, 0, prompt, 0, pairs)
            work = depth * cost.layer_joules(c, 0, 0, 0, prompt, pairs)
            load = {"layers": depth, "batch": 1, "prompt_tokens": prompt}
            add("prefill_energy", STACK_S + depth * seconds, work, **load)
            whole_s, _ = cost.mixed_seconds(c, 0, 0, 0, prompt, 0, pairs, depth, 0, 1, 1, 1)
            add("iteration_energy", whole_s, work + cost.head_joules(c, 1), **load)
    for batch in (1, 16, 128):
        add("head_energy", cost.head_seconds(c, batch), cost.head_joules(c, batch), batch=batch)
    return found


def frame(plan: Plan) -> pl.DataFrame:
    """The readings as a table."""
    return pl.DataFrame([asdict(reading) for reading in readings(plan)], schema=SCHEMA)


def points(plan: Plan) -> pl.DataFrame:
    """The readings gathered into points."""
    return gather(frame(plan))


def environment(*names: str, **more: Any) -> dict[str, Any]:
    """What a measurement writes beside its readings."""
    own = asdict(model())
    return {
        "device": {
            "name": "Planted GPU",
            "num_gpus": 1,
            "memory_bytes": 2**30,
            "power_limit_w": 700.0,
        },
        "dtype": "float32",
        "models": {
            name: own
            | {
                "name": name,
                "confidence": {"kind": "max-softmax", "threshold": 0.5},
                "batch_buckets": list(BATCHES),
            }
            for name in names or ("planted",)
        },
        **more,
    }


def traces(names: tuple[str, ...] = ("planted",), count: int = 64) -> pl.DataFrame:
    """Exit traces of two domains for models of three exits."""
    rng = np.random.default_rng(1)
    columns: dict[str, Any] = {
        "domain": ["code"] * count + ["prose"] * count,
        "position": [*range(count), *range(count)],
    }
    for name in names:
        for layer in (3, 6, 12):
            place = f"{name}|L{layer}"
            columns[f"{place}|confidence"] = rng.uniform(0, 1, 2 * count).astype(np.float32)
            columns[f"{place}|agrees"] = rng.uniform(0, 1, 2 * count) < 0.8 + layer / 60
            columns[f"{place}|nll_nats"] = rng.uniform(0, 3, 2 * count).astype(np.float32)
    return pl.DataFrame(columns)


def folder(path: Path, plan: Plan, with_traces: bool = True, **more: Any) -> Path:
    """A folder as `helios-calibrate measure` leaves it."""
    path.mkdir(parents=True)
    frame(plan).write_parquet(path / POINTS_FILE)
    content = environment(plan.name, **more)
    (path / ENVIRONMENT_FILE).write_text(json.dumps(content), encoding="utf-8")
    if with_traces:
        traces((plan.name,)).write_parquet(path / "exits.parquet")
    return path
