"""A known piece of work beside the one that is timed, and the pace of a machine that it tells.

How quick it is while nobody disturbs is the machine's pace, by which two runs on it can be
compared; how much slower it is at the moment says what others cost.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

SETTLED: Final = 0.95
"""Caches are as full as they get when a repetition takes more than this share of the one before."""

MOST_SETTLING: Final = 16
"""Repetitions that settling takes at most."""

_CORE_JITTER: Final = 1.08
_MEMORY_JITTER: Final = 1.15
"""The reference's own times vary by so much on a quiet machine."""

QUIET_SHARE: Final = 0.1
"""The share of all looks that find the machine quiet, at least.

The very quickest of thousands is luck: on a machine that others hardly use, looks usually take a
seventh longer than that, and work beside them does not.
"""

_PACE_S: Final = 0.05
"""Spent on one look at a machine's pace."""

_MATRIX: Final = 512
"""Rows and columns of the reference's larger matrices, 1 MiB each."""

_CACHED_MATRICES: Final = 4
"""More than a core's own cache holds, less than the cores' common one."""

_STREAMED_MATRICES: Final = 64
"""More than any cache keeps beside other work."""


@dataclass(frozen=True)
class Pace:
    """Seconds that known pieces of work take on a machine that nobody disturbs.

    `core_s` is arithmetic within a core, `memory_s` reading from the common cache and from memory
    (on a GPU a product of matrices, and a copy).
    """

    core_s: float
    memory_s: float

    def against(self, other: Pace) -> float:
        """How many times longer it takes than another: the larger of the two ratios."""
        return max(self.core_s / other.core_s, self.memory_s / other.memory_s)

    def quickest(self, other: Pace) -> Pace:
        """The better of two, part by part."""
        return Pace(min(self.core_s, other.core_s), min(self.memory_s, other.memory_s))


class Looks:
    """Paces seen so far, and what they tell of the machine while nobody disturbs it."""

    def __init__(self) -> None:
        self._core_s: list[float] = []
        self._memory_s: list[float] = []

    def __len__(self) -> int:
        return len(self._core_s)

    def add(self, pace: Pace) -> None:
        """See one more."""
        insort(self._core_s, pace.core_s)
        insort(self._memory_s, pace.memory_s)

    @property
    def quiet(self) -> Pace:
        """The slowest of the quickest tenth, part by part; at least one must have been seen."""
        place = int(QUIET_SHARE * len(self))
        return Pace(self._core_s[place], self._memory_s[place])


class Reference:
    """A known piece of work whose time tells whether a processor is shared at the moment.

    Small products and sums, as small models are made of; then products of vectors with matrices
    that lie in the common cache, and with others that lie in memory. What the quickest tenth of all
    looks so far took at most is what they take alone.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(16, 96, generator=generator)
        self._weights = torch.randn(96, 96, generator=generator)
        self._vector = torch.ones(_MATRIX)
        matrices = torch.ones(_CACHED_MATRICES + _STREAMED_MATRICES, _MATRIX, _MATRIX).unbind()
        self._cached, self._streamed = matrices[:_CACHED_MATRICES], matrices[_CACHED_MATRICES:]
        self._next = 0
        self._looks = Looks()
        self.latest = Pace(math.nan, math.nan)
        """The last look."""
        for _ in range(20):
            self.look()

    def core_look_s(self) -> float:
        """Seconds that its arithmetic takes now: a quarter of a millisecond that leaves caches.

        The middle of three parts counts thrice, so that who is kept waiting once sees no slow core.
        """
        self._compute_s(3)
        return 3.0 * statistics.median(self._compute_s(10) for _ in range(3))

    def look(self) -> Pace:
        """What it takes now."""
        core_s = self.core_look_s()
        streamed = self._streamed[self._next : self._next + _CACHED_MATRICES]
        self._next = (self._next + _CACHED_MATRICES) % _STREAMED_MATRICES
        streamed_s = self._read_s(streamed)
        # What ran before has taken the cache, which comes back little by little.
        cached_s = math.inf
        for _ in range(MOST_SETTLING):
            before_s, cached_s = cached_s, min(cached_s, self._read_s(self._cached))
            if cached_s > SETTLED * before_s:
                break
        self.latest = Pace(core_s, cached_s + streamed_s)
        self._looks.add(self.latest)
        return self.latest

    @property
    def quiet(self) -> Pace:
        """What it takes while nobody disturbs, as far as is known."""
        return self._looks.quiet

    def lost_share(self) -> float:
        """Share of its time that others cost it now, beyond what varies anyway."""
        now, quiet = self.look(), self.quiet
        core = 1.0 - _CORE_JITTER * quiet.core_s / now.core_s
        memory = 1.0 - _MEMORY_JITTER * quiet.memory_s / now.memory_s
        return max(0.0, core, memory)

    def pace(self) -> Pace:
        """The best of looks over some time, whatever was seen before."""
        found = self.look()
        until_s = time.perf_counter() + _PACE_S
        while time.perf_counter() < until_s:
            found = found.quickest(self.look())
        return found

    def _compute_s(self, times: int) -> float:
        begin_s = time.perf_counter()
        for _ in range(times):
            torch.mm(self._rows, self._weights)
            self._rows.add(1.0)
        return time.perf_counter() - begin_s

    def _read_s(self, matrices: Sequence[torch.Tensor]) -> float:
        begin_s = time.perf_counter()
        for matrix in matrices:
            torch.mv(matrix, self._vector)
        return time.perf_counter() - begin_s


@functools.cache
def reference() -> Reference:
    """The processor's reference: one for all timers, so that it knows all looks of the run."""
    return Reference()
