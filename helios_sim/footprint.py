"""Whether a run fits in this machine's memory: asked before it starts, not found out later."""

from __future__ import annotations

import os
from pathlib import Path

from helios_sim.errors import InputError

BASE_BYTES = 300_000_000
"""Modules, compiled code and trace tables."""

BYTES_PER_REQUEST = 250
"""A request's record and its row in the tables, at the run's peak."""

BYTES_PER_DECISION = 2_500
"""A logged decision with its snapshot's line, as objects and in the table."""

BYTES_PER_REPLICA = 300_000
"""A replica's state: above all the samples of its timeline that wait to become rows."""

BYTES_PER_ROW = 84
"""A running request's place in a replica: its record, its turn and its lane."""


def estimated_bytes(
    num_requests: int,
    reassess_requests: int | None,
    num_candidates: int,
    num_replicas: int,
    num_rows: int,
) -> int:
    """Peak memory of one policy's run on replicas of `num_rows` running requests at most.

    A round of reassessment decides once for each candidate, and once more at its end.
    """
    rounds = 0 if reassess_requests is None else num_requests // reassess_requests + 1
    decisions = rounds * (num_candidates + 1)
    return (
        BASE_BYTES
        + num_requests * BYTES_PER_REQUEST
        + decisions * BYTES_PER_DECISION
        + num_replicas * (BYTES_PER_REPLICA + num_rows * BYTES_PER_ROW)
    )


def available_bytes() -> int | None:
    """Memory that programs can still take, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def check_fits(
    num_requests: int,
    reassess_requests: int | None,
    num_candidates: int,
    num_replicas: int,
    num_rows: int,
) -> None:
    """Raise `InputError` with the estimate and the setting that helps, if memory is too small."""
    needed = estimated_bytes(
        num_requests, reassess_requests, num_candidates, num_replicas, num_rows
    )
    available = available_bytes()
    if available is None or needed <= available:
        return
    gib = 2**30
    raise InputError(
        f"A run of {num_requests:,} requests with num_replicas = {num_replicas} takes about "
        f"{needed / gib:.1f} GiB of memory and {available / gib:.1f} GiB are free; give fewer "
        "requests (num_requests, duration_s or trace.max_requests), fewer replicas "
        "(fleet.num_replicas), smaller batches (serving.max_batch), or reassess less often "
        "(reassess_requests).",
        "workload",
    )
