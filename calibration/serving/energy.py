"""Joules drawn over the course of a run: one window of a meter, read at any time within it."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from calibration.measuring.meters import Absence, Measurement, Meter, NoMeter, Window

_MARGIN_TICKS: Final = 3
"""Ticks before the start and after the end, so that the run lies between two readings."""
_LEAST_MARGIN_S: Final = 0.03
"""A counter that ticks faster is not read at every tick."""
_RECENT_READINGS: Final = 2
"""Joules go on after the last reading as they did over so many before it."""
_BLURRED_TICKS: Final = 2
"""A span shorter than that has, in a straight line between ticks, joules of what lies around it."""

Spans: TypeAlias = Sequence[tuple[float, float]]
"""Stretches of a run's time, from and to, in seconds."""


class RunEnergy:
    """What a meter says of a run that starts at `start_s` on the clock of `time.perf_counter`.

    Without a meter every answer is NaN, and so it is where the meter does not last the run:
    unavailable is not zero. As a context it ends the reading of a run that fails.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.measures = not isinstance(meter, NoMeter)
        self.start_s = 0.0
        self.outcome: Measurement | Absence | None = None
        self._window: Window | None = None
        self._curve: list[tuple[float, float]] = []

    def __enter__(self) -> RunEnergy:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._window is not None and self.outcome is None:
            self._window.close()

    def open(self) -> None:
        """Begin to read, a little before the run, and no oftener than it takes."""
        self._window = self.meter.open(sparing=True)
        self._wait()

    def started(self, start_s: float) -> None:
        """The run starts now."""
        self.start_s = start_s

    def close(self, busy_s: float) -> Measurement | Absence:
        """End the reading, a little after the run; `busy_s` are the seconds it worked."""
        assert self._window is not None
        self._wait()
        self.outcome = self._window.close(busy_s)
        # A curve that ends within the run would be read as if nothing more had been drawn.
        self._curve = [] if isinstance(self.outcome, Absence) else self._window.curve()
        return self.outcome

    def drawn_so_far_j(self, spans: Spans, most_w: float | None = None) -> float | None:
        """Joules within spans of the run's time, while a meter is read.

        None where there is no reading, as of a meter that has stopped answering. Between readings
        they run in a straight line, and after the last one on at the rate of the latest: a span
        that ends now would miss up to a tick, and no later one would make up for it. `most_w` are
        the watts that short spans draw at most, as in `within_j`.
        """
        assert self.measures and self._window is not None
        curve = self._window.curve()
        if not curve:
            return None
        last_s, last_j = curve[-1]
        before_s, before_j = curve[max(0, len(curve) - 1 - _RECENT_READINGS)]
        watts = (last_j - before_j) / (last_s - before_s) if last_s > before_s else 0.0

        def joules_at(time_s: float) -> float:
            at_s = self.start_s + time_s
            return _between(curve, at_s) + watts * max(0.0, at_s - last_s)

        return self._within_j(joules_at, spans, most_w)

    def at(self, time_s: float) -> float:
        """Joules up to a time of the run, between readings in a straight line; NaN if unknown."""
        if len(self._curve) < 2:
            return math.nan
        return _between(self._curve, self.start_s + time_s)

    def within_j(self, spans: Spans, most_w: float | None = None) -> float:
        """Joules within spans of a run that is over; NaN if unknown.

        A span shorter than the counter's ticks draws `most_w` at most where that is known: a
        straight line over a tick spreads what is drawn around a pause into the pause.
        """
        return math.nan if len(self._curve) < 2 else self._within_j(self.at, spans, most_w)

    def _within_j(
        self, joules_at: Callable[[float], float], spans: Spans, most_w: float | None
    ) -> float:
        blurred_s = 0.0 if most_w is None else _BLURRED_TICKS * (self.meter.tick_s or 0.0)

        def joules(start_s: float, stop_s: float) -> float:
            in_line_j = joules_at(stop_s) - joules_at(start_s)
            if most_w is None or stop_s - start_s >= blurred_s:
                return in_line_j
            return min(in_line_j, most_w * (stop_s - start_s))

        return math.fsum(joules(start_s, stop_s) for start_s, stop_s in spans)

    def _wait(self) -> None:
        if self.measures:
            time.sleep(max(_LEAST_MARGIN_S, _MARGIN_TICKS * (self.meter.tick_s or 0.02)))


def _between(curve: Sequence[tuple[float, float]], at_s: float) -> float:
    """Joules at a time, in a straight line between readings; those of the ends beyond them."""
    place = bisect_right(curve, (at_s, math.inf))
    if place in (0, len(curve)):
        return curve[min(place, len(curve) - 1)][1]
    (before_s, before_j), (after_s, after_j) = curve[place - 1], curve[place]
    return before_j + (after_j - before_j) * (at_s - before_s) / (after_s - before_s)
