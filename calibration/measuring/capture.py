"""A piece of work captured in a CUDA graph, or why it could not be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from calibration.measuring.timing import Work
from calibration.model.graphs import end_allocating, first_cause


@dataclass(frozen=True)
class Captured:
    """Work captured once in a CUDA graph; calling `replay` runs it again on the same tensors.

    The work is kept with it: a graph does not hold the memory that it reads and writes.
    """

    graph: Any
    work: Work

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()


@dataclass(frozen=True)
class NotCaptured:
    """Work that could not be captured, and why."""

    reason: str


def capture(work: Work, device: torch.device) -> Captured | NotCaptured:
    """Capture work in a CUDA graph after a warm-up on a side stream; never raises for failure.

    The work must keep to static tensors and not wait for the device.
    """
    if device.type != "cuda":
        return NotCaptured("CUDA graphs need a CUDA device")
    graph = torch.cuda.CUDAGraph()
    pool: Any = torch.cuda.graph_pool_handle()
    current = torch.cuda.current_stream(device)
    try:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        current.wait_stream(side)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, pool=pool):
            work()
        torch.cuda.synchronize(device)
        return Captured(graph, work)
    except RuntimeError as error:
        # A capture that fails leaves its own stream the current one.
        torch.cuda.set_stream(current)
        torch.cuda.synchronize(device)
        end_allocating(device, pool)
        return NotCaptured(f"the capture failed: {first_cause(error)}")
