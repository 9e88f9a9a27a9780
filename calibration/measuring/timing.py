"""Seconds of a piece of work with their spread: CUDA events on a GPU, the wall clock elsewhere.

A sample is a run of repetitions long enough to be told from the timer's own cost; what counts is
the median of several samples and their median absolute deviation. Pieces of work that are to be
compared are sampled in turns, so that a machine that slows down slows all of them.

On a processor that others use too, the seconds are those in which the process ran, and a sample
is taken again, a few times at most, if others were let run during it or if a known piece of work
beside it ran slower than it can.
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

DISTURBED_SHARE: Final = 0.05
"""Of a sample's time; where more was lost to others, the sample is taken again."""

MAX_TRIES: Final = 3
"""Samples taken for each one that is wanted."""


_REFERENCE_JITTER: Final = 1.08
"""The reference's own time varies by so much on a quiet machine."""


@dataclass(frozen=True)
class Sample:
    """Seconds of a sample, and the share of its time that was lost to others, as far as seen."""

    seconds: float
    lost_share: float = 0.0


@dataclass(frozen=True)
class Timing:
    """Median seconds of one repetition, their median absolute deviation, and how they came about.

    `repetitions` were run in each of `samples` samples. `lost_share` is the mean share of the
    samples' time that was lost to others, on a processor.
    """

    seconds: float
    mad_s: float
    repetitions: int
    samples: int
    lost_share: float


class Timer(Protocol):
    """A clock for work on one device."""

    @property
    def min_sample_s(self) -> float:
        """Seconds of work that one sample holds at least."""

    def sample(self, work: Work, repetitions: int) -> Sample:
        """Time `repetitions` of the work together, the device idle before."""


class Reference:
    """A known piece of work whose time tells whether a processor is shared at the moment.

    Small products and sums, as small models are made of; the quickest time so far is what it
    takes alone.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(16, 96, generator=generator)
        self._weights = torch.randn(96, 96, generator=generator)
        self._best_s = math.inf
        for _ in range(20):
            self.slowdown()

    def slowdown(self) -> float:
        """How many times longer it takes now than alone; 1 or more."""
        begin_s = time.perf_counter()
        for _ in range(30):
            torch.mm(self._rows, self._weights)
            self._rows.add(1.0)
        seconds = time.perf_counter() - begin_s
        self._best_s = min(self._best_s, seconds)
        return seconds / self._best_s


class WallTimer:
    """The wall clock; on a GPU the device is waited for before and after, so host time counts.

    On a processor with one thread the time in which others were let run is left out.
    """

    def __init__(self, device: torch.device, min_sample_s: float | None = None) -> None:
        cuda = device.type == "cuda"
        self.min_sample_s = min_sample_s or (CUDA_SAMPLE_S if cuda else CPU_SAMPLE_S)
        self._device = device
        self._reference = None if cuda else Reference()

    def sample(self, work: Work, repetitions: int) -> Sample:
        """Seconds from an idle device to an idle device."""
        if self._reference is None:
            return Sample(self._timed(work, repetitions)[0])
        before = self._reference.slowdown()
        seconds, running_s = self._timed(work, repetitions)
        slowdown = max(before, self._reference.slowdown())
        waited = 1.0 - running_s / seconds if seconds > 0.0 else 0.0
        slowed = 1.0 - _REFERENCE_JITTER / slowdown
        if torch.get_num_threads() == 1:
            seconds = min(seconds, running_s)
        # Several threads run for more seconds than the clock counts: what they wait is not seen.
        return Sample(seconds, max(0.0, waited, slowed))

    def _timed(self, work: Work, repetitions: int) -> tuple[float, float]:
        """Seconds on the clock, and those in which this process ran."""
        synchronise(self._device)
        begin_s, begin_running_s = time.perf_counter(), time.process_time()
        for _ in range(repetitions):
            work()
        synchronise(self._device)
        return time.perf_counter() - begin_s, time.process_time() - begin_running_s


class CudaTimer:
    """CUDA events around the work on the current stream: what the device sees."""

    def __init__(self, min_sample_s: float = CUDA_SAMPLE_S) -> None:
        self.min_sample_s = min_sample_s

    def sample(self, work: Work, repetitions: int) -> Sample:
        """Seconds between two events on the stream."""
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repetitions):
            work()
        end.record()
        end.synchronize()
        return Sample(float(begin.elapsed_time(end)) / 1e3)


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
) -> list[Timing]:
    """Time several pieces of work in turns; one `Timing` each, in the order given.

    Every round samples each piece once, in a random order, until each has `samples` that were
    not disturbed, or `MAX_TRIES` times as many in all; the least disturbed then count.
    Repetitions are chosen for each piece so that a sample holds at least the timer's
    `min_sample_s`.
    """
    if samples < 1 or warmups < 1:
        raise ValueError(f"timed() was given {samples} samples and {warmups} warm-ups; 1 at least.")
    repetitions = [_repetitions(work, timer, warmups) for work in works]
    taken: list[list[Sample]] = [[] for _ in works]
    shuffle = random.Random(seed).shuffle
    for _ in range(samples * MAX_TRIES):
        order = [index for index, found in enumerate(taken) if _num_quiet(found) < samples]
        if not order:
            break
        shuffle(order)
        for index in order:
            taken[index].append(timer.sample(works[index], repetitions[index]))
    return [
        _timing(found, samples, number) for found, number in zip(taken, repetitions, strict=True)
    ]


def quiet_share(timer: Timer, work: Work, looks: int = 10) -> float:
    """Share of samples of the work that nothing disturbs, from a few looks; above 0."""
    repetitions = _repetitions(work, timer, 1)
    found = [timer.sample(work, repetitions) for _ in range(looks)]
    return max(1, _num_quiet(found)) / looks


def _num_quiet(found: Sequence[Sample]) -> int:
    return sum(sample.lost_share <= DISTURBED_SHARE for sample in found)


def _timing(found: Sequence[Sample], samples: int, repetitions: int) -> Timing:
    """The figures of the least disturbed samples."""
    kept = sorted(found, key=lambda sample: sample.lost_share)[:samples]
    middle, spread = median_and_mad([sample.seconds / repetitions for sample in kept])
    waited = statistics.fmean(sample.lost_share for sample in kept)
    return Timing(middle, spread, repetitions, len(kept), waited)


def median_and_mad(values: Sequence[float]) -> tuple[float, float]:
    """The median and the median absolute deviation from it."""
    middle = statistics.median(values)
    return middle, statistics.median(abs(value - middle) for value in values)


def _repetitions(work: Work, timer: Timer, warmups: int) -> int:
    """Warm up, then raise the repetitions until a sample is long enough."""
    timer.sample(work, warmups)
    repetitions = 1
    while True:
        found = timer.sample(work, repetitions)
        seconds = found.seconds
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
