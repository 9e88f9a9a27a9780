"""Joules drawn over the course of a run: one window of a meter, read at any time within it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from calibration.measuring.meters import Absence, Measurement, Meter, NoMeter, Window

_MARGIN_TICKS: Final = 3
"""Ticks before the start and after the end, so that the run lies between two readings."""


class RunEnergy:
    """What a meter says of a run that starts at `start_s` on the clock of `time.perf_counter`.

    Without a meter every answer is NaN: unavailable is not zero.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.measures = not isinstance(meter, NoMeter)
        self.start_s = 0.0
        self.outcome: Measurement | Absence | None = None
        self._window: Window | None = None
        self._times: list[float] = []
        self._joules: list[float] = []

    def open(self) -> None:
        """Begin to read, a little before the run."""
        self._window = self.meter.open()
        self._wait()

    def started(self, start_s: float) -> None:
        """The run starts now."""
        self.start_s = start_s

    def close(self, busy_s: float) -> Measurement | Absence:
        """End the reading, a little after the run; `busy_s` are the seconds it worked."""
        assert self._window is not None
        self._wait()
        self.outcome = self._window.close(busy_s)
        curve = self._window.curve()
        self._times = [at_s - self.start_s for at_s, _ in curve]
        self._joules = [joules for _, joules in curve]
        return self.outcome

    def drawn_so_far_j(self, spans: Sequence[tuple[float, float]]) -> float:
        """Joules within spans of the run's time, from and to, while a meter is read.

        Between readings they run in a straight line; after the last one nothing is known yet.
        """
        assert self.measures and self._window is not None
        curve = self._window.curve()
        if not curve or not spans:
            return 0.0
        times, joules = np.transpose(curve)
        drawn: Any = np.diff(np.interp(np.array(spans), times - self.start_s, joules))
        return float(drawn.sum())

    def at(self, time_s: float) -> float:
        """Joules up to a time of the run, between readings in a straight line; NaN if unknown."""
        if len(self._times) < 2:
            return math.nan
        return float(np.interp(time_s, self._times, self._joules))

    def _wait(self) -> None:
        if self.measures:
            time.sleep(_MARGIN_TICKS * (self.meter.tick_s or 0.02))
