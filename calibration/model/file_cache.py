"""What of a file the system holds in memory: all of it, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

_READ_BYTES: Final = 1 << 23


def read_through(files: Iterable[Path]) -> None:
    """Read files to their ends, so that the system holds them in memory."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(_READ_BYTES):
                pass


def forget(files: Iterable[Path]) -> bool:
    """Ask the system to drop files from its memory, so that the next read meets the disk.

    False where it cannot be asked.
    """
    advise: Any = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    for file in files:
        with file.open("rb") as stream:
            advise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
