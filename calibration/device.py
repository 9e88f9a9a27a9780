"""The device that a command works on, chosen by its name and called by its own."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from helios_sim.errors import InputError


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
