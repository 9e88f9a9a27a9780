"""Models for a made-up GPU, and points as they are measured on it."""

from __future__ import annotations

from dataclasses import asdict

import polars as pl

from calibration.fitting.points import gather
from calibration.measuring.grid import Job
from calibration.measuring.readings import SCHEMA
from helios_sim.model import EarlyExitModel, ModelShape
from reports.made_up_gpu.device import MadeUpGpu, readings_of

SMALL = ModelShape("llama", 12, 512, 8, 8, 64, 1376, 512, 2048, tied_head=True)
"""Its host takes as long as its layers."""
LARGE = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 2048, tied_head=False)


def model_of(shape: ModelShape) -> EarlyExitModel:
    """A model with an exit after every quarter."""
    exits = tuple(shape.layers * quarter // 4 for quarter in (1, 2, 3, 4))
    return EarlyExitModel("made-up", shape, exits, "bytes", 2, 2)


def points_of(gpu: MadeUpGpu, jobs: list[Job], noise: float, seed: int = 0) -> pl.DataFrame:
    """Gathered points of jobs as they are measured on it, with relative noise in all of it."""
    readings = readings_of(gpu, jobs, noise, seed)
    return gather(pl.DataFrame([asdict(reading) for reading in readings], schema=SCHEMA))
