"""Bytes that a process and its work really take on a device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from calibration.measuring.board import Board, NoBoard
from calibration.measuring.timing import Work, synchronise

_STATUS: Final = Path("/proc/self/status")
_STANDARD_ERROR: Final = 2
_ALLOCATION: Final = "[memory]"
"""What torch's profiler calls taking memory, and giving it back, which has negative bytes."""


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

    They are those of tensors, as torch's allocators count them. The resident memory of a process
    would not do: it does not rise for pages that earlier work has left to it. Run the work once
    before, so that libraries have made what they keep.
    """
    if device.type != "cuda":
        return _allocated_peak(work)
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = int(torch.cuda.memory_allocated(device))
    work()
    synchronise(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _allocated_peak(work: Work) -> int | None:
    """The peak over what the profiler saw taken and given back while the work ran."""
    if not torch.profiler.kineto_available():
        return None
    with _quiet_library(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    found: Any = profile.kineto_results
    moves = [event for event in found.events() if event.name() == _ALLOCATION]
    taken = peak = 0
    for move in sorted(moves, key=lambda one: one.start_ns()):
        taken += int(move.nbytes())
        peak = max(peak, taken)
    return peak


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep from standard error what the profiler's library says there, past Python."""
    sys.stderr.flush()
    kept = os.dup(_STANDARD_ERROR)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), _STANDARD_ERROR)
        yield
    finally:
        os.dup2(kept, _STANDARD_ERROR)
        os.close(kept)


def _status_bytes(name: str) -> int | None:
    """A line of /proc/self/status in bytes, None where there is none."""
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None
