"""Seconds of a piece of work with their spread: CUDA events on a GPU, the wall clock elsewhere.

A sample is a run of repetitions long enough to be told from the timer's own cost; what counts is
the median of several samples and their median absolute deviation. Pieces of work that are to be
compared are sampled in turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

Work = Callable[[], object]

CUDA_SAMPLE_S: Final = 0.02
"""Work in one sample on a GPU: far above the event timer's resolution of about a microsecond."""

CPU_SAMPLE_S: Final = 0.005


@dataclass(frozen=True)
class Timing:
    """Median seconds of one repetition, their median absolute deviation, and how they came about.

    `repetitions` were run in each of `samples` samples; `spent_s` is the wall time all of it took,
    warm-up included.
    """

    seconds: float
    mad_s: float
    repetitions: int
    samples: int
    spent_s: float


class Timer(Protocol):
    """A clock for work on one device."""

    @property
    def min_sample_s(self) -> float:
        """Seconds of work that one sample holds at least."""

    def sample_s(self, work: Work, repetitions: int) -> float:
        """Seconds that `repetitions` of the work take together, the device idle before."""


class WallTimer:
    """The wall clock; on a GPU the device is waited for before and after, so host time counts."""

    def __init__(self, device: torch.device, min_sample_s: float | None = None) -> None:
        cuda = device.type == "cuda"
        self.min_sample_s = min_sample_s or (CUDA_SAMPLE_S if cuda else CPU_SAMPLE_S)
        self._device = device

    def sample_s(self, work: Work, repetitions: int) -> float:
        """Seconds from an idle device to an idle device."""
        synchronise(self._device)
        begin_s = time.perf_counter()
        for _ in range(repetitions):
            work()
        synchronise(self._device)
        return time.perf_counter() - begin_s


class CudaTimer:
    """CUDA events around the work on the current stream: what the device sees."""

    def __init__(self, min_sample_s: float = CUDA_SAMPLE_S) -> None:
        self.min_sample_s = min_sample_s

    def sample_s(self, work: Work, repetitions: int) -> float:
        """Seconds between two events on the stream."""
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repetitions):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def timer_for(device: torch.device, min_sample_s: float | None = None) -> Timer:
    """CUDA events on a GPU, the wall clock elsewhere."""
    if device.type == "cuda":
        return CudaTimer(min_sample_s or CUDA_SAMPLE_S)
    return WallTimer(device, min_sample_s)


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    works: Sequence[Work],
    timer: Timer,
    *,
    samples: int = 5,
    warmups: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time several pieces of work in turns; one `Timing` each, in the order given.

    Every round samples each piece once, in a random order. Repetitions are chosen for each piece
    so that a sample holds at least the timer's `min_sample_s`.
    """
    if samples < 1 or warmups < 1:
        raise ValueError(f"timed() was given {samples} samples and {warmups} warm-ups; 1 at least.")
    spent_s = [0.0] * len(works)
    repetitions = [1] * len(works)
    for index, work in enumerate(works):
        begin_s = clock()
        repetitions[index] = _repetitions(work, timer, warmups)
        spent_s[index] += clock() - begin_s
    found: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    shuffle = random.Random(seed).shuffle
    for _ in range(samples):
        shuffle(order)
        for index in order:
            begin_s = clock()
            seconds = timer.sample_s(works[index], repetitions[index])
            found[index].append(seconds / repetitions[index])
            spent_s[index] += clock() - begin_s
    return [
        Timing(*median_and_mad(values), repetitions[index], samples, spent_s[index])
        for index, values in enumerate(found)
    ]


def median_and_mad(values: Sequence[float]) -> tuple[float, float]:
    """The median and the median absolute deviation from it."""
    middle = statistics.median(values)
    return middle, statistics.median(abs(value - middle) for value in values)


def _repetitions(work: Work, timer: Timer, warmups: int) -> int:
    """Warm up, then raise the repetitions until a sample is long enough."""
    timer.sample_s(work, warmups)
    repetitions = 1
    while True:
        seconds = timer.sample_s(work, repetitions)
        if seconds >= timer.min_sample_s:
            return repetitions
        # A tenth on top, so that the usual sample is not just too short.
        wanted = math.ceil(1.1 * repetitions * timer.min_sample_s / max(seconds, 1e-7))
        repetitions = min(max(wanted, repetitions + 1), 100 * repetitions)


@dataclass(frozen=True)
class Captured:
    """Work captured once in a CUDA graph; calling `replay` runs it again on the same tensors."""

    replay: Work
    seconds: float


@dataclass(frozen=True)
class NotCaptured:
    """Work that could not be captured, and why."""

    reason: str


def capture(work: Work, device: torch.device) -> Captured | NotCaptured:
    """Capture work in a CUDA graph after a warm-up on a side stream; never raises for failure.

    The work must keep to static tensors and not wait for the device. `seconds` is what the
    capture itself took.
    """
    if device.type != "cuda":
        return NotCaptured("CUDA graphs need a CUDA device")
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        begin_s = time.perf_counter()
        with torch.cuda.graph(graph):
            work()
        torch.cuda.synchronize(device)
        return Captured(graph.replay, time.perf_counter() - begin_s)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return NotCaptured(f"the capture failed: {str(error).splitlines()[0]}")
