"""Bytes that a process and its work really take on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from calibration.measuring.board import Board, NoBoard
from calibration.measuring.timing import Work, synchronise

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"
"""What Linux takes as the word to forget a process's peak memory (proc(5))."""


def reserve_bytes(device: torch.device, board: Board | NoBoard) -> int | None:
    """Bytes taken beside tensors: CUDA's context and libraries, or the process without models.

    On a GPU other processes count too: the board knows no owner. None where nobody tells.
    """
    if device.type != "cuda":
        return _status_bytes("VmRSS")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    synchronise(device)
    used = board.state().memory_used_bytes
    if used is None:
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
    return max(0, int(used) - reserved_bytes(device))


def reserved_bytes(device: torch.device) -> int:
    """Bytes that torch holds of a GPU, in use or kept for use; 0 on a processor."""
    if device.type != "cuda":
        return 0
    synchronise(device)
    return int(torch.cuda.memory_reserved(device))


def taken_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are taken, whoever took them, torch's idle ones given back before.

    A captured graph takes memory of the driver's that torch does not count. 0 on a processor.
    """
    if device.type != "cuda":
        return 0
    synchronise(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def peak_bytes(device: torch.device, work: Work) -> int | None:
    """Bytes that work takes at its peak beyond what was taken before; None where untold.

    On a processor this is the rise of the resident memory, blind to pages that the process had
    already. Run the work once before, so that libraries have made what they keep.
    """
    if device.type != "cuda":
        return _resident_rise(work)
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = int(torch.cuda.memory_allocated(device))
    work()
    synchronise(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _resident_rise(work: Callable[[], object]) -> int | None:
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    work()
    peak = _status_bytes("VmHWM")
    if before is None or peak is None:
        return None
    return max(0, peak - before)


def _status_bytes(name: str) -> int | None:
    """A line of /proc/self/status in bytes, None where there is none."""
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None
