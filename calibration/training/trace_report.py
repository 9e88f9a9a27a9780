"""The report beside exit traces: its name, and whether it is of the traces that lie there.

Reading it needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

REPORT_FILE: Final = "trace.json"
TRACES_SHA256: Final = "traces_sha256"
"""The report's key for the hash of the traces that it is of."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_of(report: Mapping[str, Any], traces: Path) -> bool:
    """Whether a report is of a trace file, as far as it tells; one without a hash is believed."""
    told = report.get(TRACES_SHA256)
    return told is None or told == sha256_of(traces)
