"""The device that a command works on, and the precision it computes in, by their names."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

import torch

from helios_sim.errors import InputError

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that models can be run in."""


def device_of(name: str) -> torch.device:
    """The device of auto (a GPU where there is one), cpu or cuda.

    Raises `InputError` for another name, and where CUDA is asked for and cannot be had.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"{name!r} was given; allowed are auto, cpu and cuda.", "--device")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else f"torch is built for CUDA {torch.version.cuda} and finds no device"
        )
        raise InputError(
            f"CUDA was asked for but is not available: {built}. Give --device cpu, or install a "
            "torch that fits the machine's driver.",
            "--device",
        )
    return torch.device("cuda", torch.cuda.current_device())


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The precision of a name; of None, bfloat16 on a GPU and float32 on a processor.

    A processor computes 16 bits many times slower. Raises `InputError` for another name.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"{name!r} was given; allowed are {', '.join(DTYPES)}.", "--dtype")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """What a precision is called, without torch."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """A GPU as its driver calls it; a processor by its model and how many cores there are."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return platform.processor() or platform.machine()
