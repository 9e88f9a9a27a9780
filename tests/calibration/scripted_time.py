"""Time that goes on only where it is told to, so that a busy machine is no part of a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from calibration.measuring import meters, timing
from calibration.measuring.meters import _Sampler
from calibration.measuring.pace import Pace
from tests.calibration import fake_nvml


class ScriptedTime:
    """Stands for the module `time`, and for the threads that read meters as it goes on."""

    def __init__(self) -> None:
        self._now_s = 100.0
        self._running_s = 10.0
        self._readers: list[_Reader] = []

    def perf_counter(self) -> float:
        return self._now_s

    def process_time(self) -> float:
        return self._running_s

    def sleep(self, seconds: float) -> None:
        """Let time pass in which others run, and whoever reads a meter."""
        end_s = self._now_s + seconds
        while due := [reader for reader in self._readers if reader.next_s <= end_s]:
            first = min(due, key=lambda reader: reader.next_s)
            self._now_s = max(self._now_s, first.next_s)
            first.read()
        # Whoever read may have taken longer.
        self._now_s = max(self._now_s, end_s)

    def work(self, seconds: float) -> None:
        """Let time pass in which this process runs."""
        self._running_s += seconds
        self._now_s += seconds

    def reads(self, read: Callable[[], None], interval_s: float) -> None:
        """Have something read every so many seconds that are slept."""
        self._readers.append(_Reader(read, interval_s, self._now_s + interval_s))


class _Reader:
    def __init__(self, take: Callable[[], None], interval_s: float, next_s: float) -> None:
        self.take = take
        self.interval_s = interval_s
        self.next_s = next_s

    def read(self) -> None:
        self.take()
        self.next_s += self.interval_s


def of_meters(monkeypatch: pytest.MonkeyPatch) -> ScriptedTime:
    """The time of meters and of the board they read."""
    time = ScriptedTime()

    class Scripted(_Sampler):
        def __init__(self, read: Callable[[], float], interval_s: float) -> None:
            super().__init__(read, interval_s)
            time.reads(self._take_unless_stopped, interval_s)

        def _run(self) -> None:
            self._stop.wait()

        def _take_unless_stopped(self) -> None:
            if self._failure is None and not self._stop.is_set():
                self._take()

    monkeypatch.setattr(meters, "_Sampler", Scripted)
    monkeypatch.setattr(meters, "time", time)
    monkeypatch.setattr(fake_nvml, "time", time)
    return time


class QuietReference:
    """A reference that nobody disturbs."""

    quiet = Pace(0.0005, 0.001)
    latest = quiet

    def lost_share(self) -> float:
        return 0.0


def of_timers(monkeypatch: pytest.MonkeyPatch) -> ScriptedTime:
    """The time of timers, on a processor that nobody else uses but while it is slept."""
    time = ScriptedTime()
    monkeypatch.setattr(timing, "reference", QuietReference)
    monkeypatch.setattr(timing, "time", time)
    return time
