"""What `helios-calibrate measure` would leave of the made-up GPU: readings of its planned grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from calibration.measuring.grid import plan_energy, plan_latency
from calibration.measuring.readings import Reading, Readings
from calibration.model.checkpoint import Checkpoint
from calibration.model.early_exit import EarlyExitLM, load
from calibration.training.trace import trace_checkpoints
from helios_sim.model import EarlyExitModel
from helios_sim.profile import TRACES_FILE
from reports.made_up_gpu.backend import NAME
from reports.made_up_gpu.device import (
    BUCKETS,
    DISK_LINK,
    HOST_LINK,
    IDLE_W,
    MadeUpGpu,
    bounds_of,
    readings_of,
)

NOISE: Final = 0.004
"""Relative spread of a reading, about that of CUDA events on a board of its own."""

TRIAL_S: Final = 0.05
MEMORY_BYTES: Final = 24 * 2**20
"""So little that the largest of the small family has room for few requests at full depth."""

_LOADED_BYTES: Final = (2**20, 2**22, 2**24, 2**26)


def measure(
    checkpoints: Mapping[str, Checkpoint], gpus: Mapping[str, MadeUpGpu], out: Path, budget_s: float
) -> None:
    """Leave readings, their environment and exit traces of the checkpoints in a folder.

    `budget_s` are seconds of the made-up device, by which the planner chooses its grid.
    """
    readings = Readings(out)
    nodes = {}
    for name, found in checkpoints.items():
        model = load(found.folder, dtype=torch.float32, name=name)
        nodes[name] = _described(model)
        for reading in _timed(gpus[name], budget_s / len(checkpoints)):
            readings.append(reading)
        model.unload()
    for reading in _of_the_device():
        readings.append(reading)
    readings.write_environment(
        {
            "device": {"name": NAME, "kind": "gpu", "num_gpus": 1, "memory_bytes": MEMORY_BYTES},
            "dtype": "float32",
            "models": nodes,
        }
    )
    readings.export()
    if not (out / TRACES_FILE).is_file():
        trace_checkpoints([found.folder for found in checkpoints.values()], out)


def _described(model: EarlyExitLM) -> dict[str, Any]:
    confidence = model.confidence
    return {
        **asdict(model.spec),
        "confidence": {
            "kind": confidence.kind,
            "threshold": confidence.threshold,
            "calibrated": confidence.is_calibrated,
        },
        "weights": "checkpoint",
        "batch_buckets": list(BUCKETS),
    }


def _timed(gpu: MadeUpGpu, budget_s: float) -> list[Reading]:
    """Timings and energy windows of a model's planned grid, and of capturing its graphs."""
    bounds = bounds_of(gpu.model)
    plan = plan_latency(
        bounds, lambda job: TRIAL_S * len(job.depths or (1,)), budget_s, 20.0 * budget_s, 0
    )
    windows = plan_energy(bounds, window_s=1.0, allowed_s=budget_s, seed=0)
    found = readings_of(gpu, [*plan.jobs, *windows.jobs], NOISE)
    return found + _captures(gpu)


def _captures(gpu: MadeUpGpu) -> list[Reading]:
    """Every graph captured once, one by one."""
    random = np.random.default_rng(1)

    def taken(kind: str, layers: int | None, batch: int) -> Reading:
        seconds = gpu.capture(kind, layers or 0) * np.exp(NOISE * random.standard_normal())
        return Reading(
            f"capture_{kind}",
            gpu.model.name,
            "graph",
            layers=layers,
            batch=batch,
            seconds=float(seconds),
        )

    found = []
    segments = gpu.segments(0, gpu.exits[-1])
    for batch, (first, last) in product(BUCKETS, segments):
        found.append(taken("run", last - first, batch))
        if first:
            found.append(taken("fill", last - first, batch))
    for batch in BUCKETS:
        found += [taken("embed", None, batch), taken("tell", None, batch)]
    return found


def _of_the_device() -> list[Reading]:
    """Loading over both links, and power with nothing to do."""
    found = [Reading("idle_power", watts=IDLE_W, seconds=5.0, trial=trial) for trial in range(2)]
    for quantity, link in (("load_host_pinned", HOST_LINK), ("load_disk", DISK_LINK)):
        found += [
            Reading(quantity, bytes=size, seconds=link[0] + size / link[1])
            for size in _LOADED_BYTES
        ]
    return found


def gpus_of(models: Sequence[EarlyExitModel]) -> dict[str, MadeUpGpu]:
    """A made-up device for each model."""
    return {model.name: MadeUpGpu(model) for model in models}
