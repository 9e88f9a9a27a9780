"""Seconds of a piece of work with their spread: CUDA events on a GPU, the wall clock elsewhere.

A sample is a run of repetitions long enough to be told from the timer's own cost; what counts is
the median of several samples and their median absolute deviation. Pieces of work that are to be
compared are sampled in turns, so that a machine that slows down slows all of them.

On a processor that others use too, the seconds are those in which the process ran, and a sample
is taken again, a few times at most, if others were let run during it or if a known piece of work
beside it ran slower than it can.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from calibration.measuring.pace import MOST_SETTLING, SETTLED, Pace, reference
from helios_sim.garbage import uncollected

Work = Callable[[], object]

CUDA_SAMPLE_S: Final = 0.02
"""Work in one sample on a GPU: far above the event timer's resolution of about a microsecond, and
long enough for clocks to follow the load."""

CPU_SAMPLE_S: Final = 0.03
"""On a processor: caches shared between cores fill over many passes, and serving never lets go of
them; a stack that was timed after another's sample looks up to a third slower when it is timed
for 5 ms only."""

DISTURBED_SHARE: Final = 0.05
"""Of a sample's time; where more was lost to others, the sample is taken again."""

MAX_TRIES: Final = 6
"""Samples taken at most for each one that is wanted."""

_HEADROOM: Final = 1.1
"""Samples are planned longer than they must be, so that the usual one is not just too short."""

_LONG_S: Final = 0.05
"""Work this long hardly feels caches that it finds taken."""

_USUAL_SETTLING: Final = 4
"""Repetitions that settling usually takes."""

_PACE_REPETITIONS: Final = 8
"""Products and copies of one look at a GPU's pace."""

_LOOK_HOLDS_S: Final = 0.0005
"""A look at the reference tells of what begins within this time too."""


@dataclass(frozen=True)
class Sample:
    """Seconds of a sample, and the share of its time that was lost to others, as far as seen.

    `reference_s` are the seconds of a processor's known arithmetic around it.
    """

    seconds: float
    lost_share: float = 0.0
    reference_s: float | None = None


@dataclass(frozen=True)
class Timing:
    """Median seconds of one repetition, their median absolute deviation, and how they came about.

    `repetitions` were run in each of `samples` samples. `lost_share` is the mean share of the
    samples' time that was lost to others, and `reference_s` what known arithmetic took around them,
    on a processor.
    """

    seconds: float
    mad_s: float
    repetitions: int
    samples: int
    lost_share: float
    reference_s: float | None = None


class Timer(Protocol):
    """A clock for work on one device."""

    @property
    def min_sample_s(self) -> float:
        """Seconds of work that one sample holds at least."""

    def sample(self, work: Work, repetitions: int) -> Sample:
        """Time `repetitions` of the work together, the device idle before."""

    def sample_s(self, pass_s: float) -> float:
        """Seconds that a sample of repetitions this long takes, all in all."""


def measure_pace(device: torch.device) -> Pace:
    """The device's pace now, from looks over about 50 ms."""
    if device.type != "cuda":
        return reference().pace()
    matrix = torch.ones(2048, 2048, device=device)
    source = torch.ones(2**24, device=device)
    target = torch.empty_like(source)
    timer = CudaTimer()

    def seconds(work: Work) -> float:
        # Of one alone, the launch from an idle stream would be a good part.
        return timer.sample(work, _PACE_REPETITIONS).seconds / _PACE_REPETITIONS

    looks = [
        Pace(seconds(lambda: torch.mm(matrix, matrix)), seconds(lambda: target.copy_(source)))
        for _ in range(20)
    ]
    return functools.reduce(Pace.quickest, looks)


class WallTimer:
    """The wall clock; on a GPU the device is waited for before and after, so host time counts.

    On a processor with one thread the time in which others were let run is left out.
    """

    def __init__(self, device: torch.device, min_sample_s: float | None = None) -> None:
        cuda = device.type == "cuda"
        self.min_sample_s = min_sample_s or (CUDA_SAMPLE_S if cuda else CPU_SAMPLE_S)
        self._device = device
        self._reference = None if cuda else reference()
        self._looked_s = -math.inf
        self._seen = 0.0, math.nan

    def sample(self, work: Work, repetitions: int) -> Sample:
        """Seconds from an idle device to an idle device."""
        if self._reference is None:
            return Sample(self._timed(work, repetitions)[0])
        before, core_before_s = self._look(_LOOK_HOLDS_S)
        seconds, running_s = self._settle(work)
        if repetitions > 1:
            seconds, running_s = self._timed(work, repetitions)
        after, core_after_s = self._look()
        slowed = max(before, after)
        waited = 1.0 - running_s / seconds if seconds > 0.0 else 0.0
        if torch.get_num_threads() == 1:
            seconds = min(seconds, running_s)
        # Several threads run for more seconds than the clock counts: what they wait is not seen.
        return Sample(seconds, max(waited, slowed), self._around_s(core_before_s, core_after_s))

    def _around_s(self, before_s: float, after_s: float) -> float | None:
        """What known arithmetic took around a sample; threads that wait for others tell no pace."""
        return (before_s + after_s) / 2 if torch.get_num_threads() == 1 else None

    def sample_s(self, pass_s: float) -> float:
        """Seconds that a sample of repetitions this long takes, all in all."""
        timed_s = max(_HEADROOM * self.min_sample_s, pass_s)
        if self._reference is None:
            return timed_s
        settling = _USUAL_SETTLING if pass_s < self.min_sample_s else pass_s < _LONG_S
        quiet = self._reference.quiet
        return timed_s + settling * pass_s + quiet.core_s + 3 * quiet.memory_s

    def _settle(self, work: Work) -> tuple[float, float]:
        """Let the work have the caches back that the look took; what its last repetition took."""
        spent_s, before_s = 0.0, math.inf
        for _ in range(MOST_SETTLING):
            seconds, running_s = self._timed(work, 1)
            own_s = min(seconds, running_s)
            spent_s += own_s
            if own_s > SETTLED * before_s or spent_s > _LONG_S:
                break
            before_s = own_s
        return seconds, running_s

    def _look(self, holds_s: float = 0.0) -> tuple[float, float]:
        """What others cost the reference, and its arithmetic, now or within the last `holds_s`."""
        assert self._reference is not None
        if time.perf_counter() - self._looked_s > holds_s:
            self._seen = self._reference.lost_share(), self._reference.latest.core_s
            self._looked_s = time.perf_counter()
        return self._seen

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

    def __init__(self) -> None:
        self.min_sample_s = CUDA_SAMPLE_S

    def sample_s(self, pass_s: float) -> float:
        """Seconds that a sample of repetitions this long takes."""
        return max(_HEADROOM * self.min_sample_s, pass_s)

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


def timer_for(device: torch.device) -> Timer:
    """CUDA events on a GPU, the wall clock elsewhere."""
    return CudaTimer() if device.type == "cuda" else WallTimer(device)


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
    patience_s: float = math.inf,
) -> list[Timing]:
    """Time several pieces of work in turns; one `Timing` each, in the order given.

    Every round samples each piece once, in a random order, until each has `samples` that were
    not disturbed, or `MAX_TRIES` times as many in all, or until `patience_s` are over and each has
    as many as are wanted; the least disturbed then count. Repetitions are chosen for each piece
    so that a sample holds at least the timer's `min_sample_s`.
    """
    if samples < 1 or warmups < 1:
        raise ValueError(f"timed() was given {samples} samples and {warmups} warm-ups; 1 at least.")
    taken: list[list[Sample]] = [[] for _ in works]
    shuffle = random.Random(seed).shuffle
    until_s = time.perf_counter() + patience_s
    # As when serving.
    with uncollected():
        repetitions = [_repetitions(work, timer, warmups) for work in works]
        for turn in range(samples * MAX_TRIES):
            order = [index for index, found in enumerate(taken) if _num_quiet(found) < samples]
            if not order or (turn >= samples and time.perf_counter() > until_s):
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
    paces = [sample.reference_s for sample in kept if sample.reference_s is not None]
    around_s = statistics.median(paces) if paces else None
    return Timing(middle, spread, repetitions, len(kept), waited, around_s)


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
        wanted = math.ceil(_HEADROOM * repetitions * timer.min_sample_s / max(seconds, 1e-7))
        repetitions = min(wanted, 100 * repetitions)
