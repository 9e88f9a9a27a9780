"""What of a file the system holds in memory: all of it, or nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

_READ_BYTES: Final = 1 << 23

_MOST_KEPT: Final = 0.01
"""Of a file's pages that may stay in memory where the next read is to meet the disk."""


def read_through(files: Iterable[Path]) -> None:
    """Read files to their ends, so that the system holds them in memory."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(_READ_BYTES):
                pass


def forget(files: Iterable[Path]) -> bool:
    """Ask the system to drop files from its memory, and tell whether the next read meets the disk.

    False where it cannot be asked, where it keeps them all the same (as a file system in memory
    does), and where it does not tell.
    """
    advise: Any = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    gone = True
    for file in files:
        with file.open("rb") as stream:
            advise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        kept = cached_share(file)
        gone &= kept is not None and kept <= _MOST_KEPT
    return gone


def cached_share(file: Path) -> float | None:
    """The share of a file's pages that the system holds in memory; None where it does not tell.

    Linux tells of files that one may write to, and calls the pages of others held (mincore(2)).
    """
    if sys.platform != "linux":
        return None
    size = file.stat().st_size
    if not size:
        return 0.0
    held = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as mapped,
        ):
            # The address of a mapping, of which no page is touched.
            content = np.frombuffer(mapped, dtype=np.uint8)
            failed = mincore(
                ctypes.c_void_p(content.ctypes.data),
                ctypes.c_size_t(size),
                ctypes.c_void_p(held.ctypes.data),
            )
            # A mapping that is still looked at cannot be closed.
            del content
    except (OSError, AttributeError, ValueError):
        return None
    return None if failed else float((held & 1).mean())
