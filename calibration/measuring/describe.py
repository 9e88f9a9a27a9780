"""Where readings come from: device, models and packages, as environment.json holds them."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

import torch

from calibration.device import device_name
from calibration.measuring.bench import Bench
from calibration.measuring.board import Board, BoardError, BoardState, NoBoard
from calibration.measuring.meters import Meter
from calibration.measuring.sources import Source
from calibration.model.memory import available_bytes


def describe_device(device: torch.device, state: BoardState) -> dict[str, Any]:
    """The device as a profile names it; nothing is set."""
    memory = available_bytes(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return {
        "name": device_name(device),
        "kind": device.type,
        "num_gpus": 1,
        "memory_bytes": memory,
        "power_limit_w": state.power_limit_w,
    }


def describe_meter(meter: Meter, window_s: float) -> dict[str, Any]:
    """How joules are read, or why they are not."""
    return {
        "source": meter.source,
        "explanation": meter.explanation,
        "tick_s": meter.tick_s,
        "min_window_s": meter.min_window_s,
        "window_s": window_s,
    }


def describe_system(board: Board | NoBoard) -> dict[str, Any]:
    """Versions of the packages, the driver and the system, and the threads at work."""
    return {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "driver": _driver(board),
        "threads": torch.get_num_threads(),
    }


def describe_model(source: Source, bench: Bench) -> dict[str, Any]:
    """What a fit needs to know of a model, and the grid that it is measured on."""
    model = bench.model
    return {
        **asdict(model.spec),
        "confidence": {
            "kind": model.confidence.kind,
            "threshold": model.confidence.threshold,
            "calibrated": model.confidence.is_calibrated,
        },
        "weights": "random" if source.folder is None else "checkpoint",
        "exits_chosen": source.exits_chosen,
        "loaded_layers": model.depth,
        "heads": model.heads_kind,
        "guard": None if model.guard is None else model.guard.to_json(),
        "kernels": bench.kernels,
        "max_batch": bench.max_batch,
        "max_context_tokens": bench.max_context,
        **bench.buckets,
    }


def _driver(board: Board | NoBoard) -> str | None:
    if isinstance(board, NoBoard):
        return None
    try:
        return board.driver()
    except BoardError:
        return None
