"""Whether weights or a KV pool fit on a device: asked before any memory is touched."""

from __future__ import annotations

from typing import Final

import torch

from helios_sim.errors import InputError
from helios_sim.footprint import available_bytes as available_host_bytes

GIB: Final = 2**30


class TooLittleMemory(InputError):
    """A device has too little memory; nothing of it was touched."""


def available_bytes(device: torch.device) -> int | None:
    """Bytes this process can still take on a device, or None where the system does not say."""
    if device.type != "cuda":
        return available_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and does not use is free to it, though the driver counts it as taken.
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + idle)


def require(device: torch.device, needed_bytes: int, what: str, remedy: str) -> None:
    """Raise `TooLittleMemory` for what does not fit, with needed and available bytes."""
    available = available_bytes(device)
    if available is None or needed_bytes <= available:
        return
    raise TooLittleMemory(
        f"{what} needs {needed_bytes:,} bytes ({needed_bytes / GIB:.2f} GiB) on {device} and "
        f"{available:,} bytes ({available / GIB:.2f} GiB) are available; {remedy}."
    )
