"""Energy meters behind one protocol: a window opens, closes and yields a typed measurement.

Absence is an object: a window that cannot count yields an `Absence` with its reason. What is
known of the NVIDIA counters is measured in "Part-time Power Measurements" (arXiv 2312.02741) and
by Zeus (github.com/ml-energy/zeus): ticks of 20 to 100 ms, so windows run from tick to tick, and
a sensor that sees part of the time, so two sources are read and both words are kept.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Protocol

from calibration.measuring.board import Board, BoardError, NoBoard
from helios_sim.errors import InputError

MIN_WINDOW_S: Final = 5.0
"""Unaligned windows of one second spread by about 4 %, of five seconds by 0.8 %."""

MIN_WINDOW_TICKS: Final = 50
_PROBE_CHANGES: Final = 12
_PROBE_LIMIT_S: Final = 3.0
_PROBE_POLL_S: Final = 0.0005
_POWER_INTERVAL_S: Final = 0.01
_SPARING_INTERVAL_S: Final = 0.01
"""Seconds between two readings of a counter at the least, for who must not be slowed by them."""
_SPARING_POWER_INTERVAL_S: Final = 0.1
"""A board's power is a new one about as often."""


@dataclass(frozen=True)
class Measurement:
    """Energy of a window.

    `joules` were counted during `seconds`, which lie within the `wall_s` the window was open:
    from the first tick of the counter to the last where `aligned`. `watts` is their quotient and
    is what steady work is judged by. `idle_share` is the part of the wall time in which no work
    ran, None where the caller did not say. `short` marks a window below the source's minimum.
    `cross_watts` and `cross_source` are a second source's word on the same window.
    """

    source: str
    joules: float
    seconds: float
    watts: float
    wall_s: float
    ticks: int
    aligned: bool
    short: bool
    idle_share: float | None = None
    cross_source: str | None = None
    cross_watts: float | None = None


@dataclass(frozen=True)
class Absence:
    """No measurement, and why: energy is unavailable, which is not zero."""

    source: str
    reason: str


class Window(Protocol):
    """An open window of a meter."""

    def close(self, busy_s: float | None = None) -> Measurement | Absence:
        """End the window; `busy_s` are the seconds within it in which work ran, if known."""

    def curve(self) -> list[tuple[float, float]]:
        """Readings so far: seconds of `time.perf_counter` and joules since the first of them.

        A counter gives the readings at which it moved. Empty where nothing is measured, and once
        the source has stopped answering; it may be asked for while the window is open, which costs
        what came since it was asked for before.
        """


class Meter(Protocol):
    """A source of energy readings. Windows of one meter must not overlap."""

    @property
    def source(self) -> str:
        """The source's name in every reading."""

    @property
    def explanation(self) -> str:
        """How it measures, or why it cannot: one sentence."""

    @property
    def tick_s(self) -> float | None:
        """Seconds between two changes of the source, as probed; None where it has no ticks."""

    @property
    def min_window_s(self) -> float:
        """Shortest window worth trusting; 0 for a meter that never measures."""

    def open(self, sparing: bool = False) -> Window:
        """Open a window; it counts from now on.

        A `sparing` one is read less often, so as not to slow what it measures: for long windows.
        """


@contextmanager
def window_of(meter: Meter, sparing: bool = False) -> Iterator[Window]:
    """A window for the block to close; where the block raises it is closed, so nobody reads on."""
    window = meter.open(sparing)
    try:
        yield window
    except BaseException:
        window.close()
        raise


@dataclass(frozen=True)
class TickProbe:
    """How often a counter moves: median seconds between changes, and how far they spread."""

    period_s: float
    mad_s: float


def probe_ticks(read: Callable[[], float]) -> TickProbe | None:
    """Watch a counter until it has changed often enough; None if it hardly moves in 3 s."""
    end = time.perf_counter() + _PROBE_LIMIT_S
    last = read()
    moved: list[float] = []
    while len(moved) < _PROBE_CHANGES and time.perf_counter() < end:
        time.sleep(_PROBE_POLL_S)
        value = read()
        if value != last:
            moved.append(time.perf_counter())
            last = value
    if len(moved) < 3:
        return None
    gaps = [later - earlier for earlier, later in itertools.pairwise(moved)]
    period_s = statistics.median(gaps)
    return TickProbe(period_s, statistics.median(abs(gap - period_s) for gap in gaps))


class _Sampler:
    """Reads a source in a thread of its own: a list of (seconds, value)."""

    def __init__(self, read: Callable[[], float], interval_s: float) -> None:
        self._read = read
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.samples: list[tuple[float, float]] = []
        self.opened_s = time.perf_counter()
        self._take()
        self._thread = threading.Thread(target=self._run, name="energy-meter", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a reading raised: samples end there, and whatever was drawn later is unknown."""
        return self._failure is not None

    def stop(self) -> None:
        """End the thread with a last sample; raises what a reading raised."""
        self._stop.set()
        self._thread.join()
        if self._failure is None:
            self._take()
        self.closed_s = time.perf_counter()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while self._failure is None and not self._stop.wait(self._interval_s):
            self._take()

    def _take(self) -> None:
        before_s = time.perf_counter()
        try:
            value = self._read()
        except (BoardError, OSError, ValueError) as error:
            self._failure = error
            return
        # A call takes up to milliseconds; the value belongs to its middle.
        self.samples.append(((before_s + time.perf_counter()) / 2, value))


class CounterMeter:
    """A meter over a cumulative counter of joules; windows run from tick to tick.

    `read` yields joules since some origin. Raises `MeterUnavailable` if the counter cannot be
    read or does not move.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[], float],
        explanation: str,
        *,
        min_window_s: float = MIN_WINDOW_S,
        min_ticks: int = MIN_WINDOW_TICKS,
    ) -> None:
        self._source = source
        self._read = read
        try:
            probe = probe_ticks(read)
        except (BoardError, OSError, ValueError) as error:
            raise MeterUnavailable(f"{source}: {error}") from error
        if probe is None:
            raise MeterUnavailable(f"{source}: the counter did not move in three seconds")
        self.probe = probe
        self._min_window_s = max(min_window_s, min_ticks * probe.period_s)
        self._explanation = (
            f"{explanation}; the counter ticks every {probe.period_s * 1e3:.1f} ms "
            f"(spread {probe.mad_s * 1e3:.1f} ms), windows run from tick to tick and at least "
            f"{self._min_window_s:.1f} s"
        )

    @property
    def source(self) -> str:
        """The source's name in every reading."""
        return self._source

    @property
    def explanation(self) -> str:
        """How it measures, with the tick it found."""
        return self._explanation

    @property
    def tick_s(self) -> float | None:
        """Median seconds between two changes of the counter."""
        return self.probe.period_s

    @property
    def min_window_s(self) -> float:
        """Five seconds, or fifty ticks where that is longer."""
        return self._min_window_s

    def open(self, sparing: bool = False) -> Window:
        """Open a window; joules count from the counter's next change.

        A sparing one reads the counter four times a tick, and every 10 ms at most.
        """
        interval_s = min(0.01, max(0.001, self.probe.period_s / 10))
        if sparing:
            interval_s = max(_SPARING_INTERVAL_S, self.probe.period_s / 4)
        return _CounterWindow(self, _Sampler(self._read, interval_s))


class _CounterWindow:
    def __init__(self, meter: CounterMeter, sampler: _Sampler) -> None:
        self._meter = meter
        self._sampler = sampler
        self._seen = 1
        self._begun_j: float | None = None
        self._curve: list[tuple[float, float]] = []

    def curve(self) -> list[tuple[float, float]]:
        if self._sampler.has_failed:
            return []
        samples = self._sampler.samples
        count = len(samples)
        for place in range(self._seen, count):
            at_s, value = samples[place]
            if value != samples[place - 1][1]:
                self._begun_j = value if self._begun_j is None else self._begun_j
                self._curve.append((at_s, value - self._begun_j))
        self._seen = max(self._seen, count)
        return self._curve

    def close(self, busy_s: float | None = None) -> Measurement | Absence:
        sampler, source = self._sampler, self._meter.source
        try:
            sampler.stop()
        except (BoardError, OSError, ValueError) as error:
            return Absence(source, f"the counter stopped answering: {error}")
        changes = [
            later
            for earlier, later in itertools.pairwise(sampler.samples)
            if later[1] != earlier[1]
        ]
        if not changes:
            return Absence(source, "the counter did not move while the window was open")
        aligned = len(changes) >= 2
        counted = changes if aligned else sampler.samples
        first, last = counted[0], counted[-1]
        seconds = last[0] - first[0]
        joules = last[1] - first[1]
        if any(later < earlier for (_, earlier), (_, later) in itertools.pairwise(sampler.samples)):
            return Absence(source, "the counter fell while the window was open: it began anew")
        wall_s = sampler.closed_s - sampler.opened_s
        return Measurement(
            source=source,
            joules=joules,
            seconds=seconds,
            watts=joules / seconds,
            wall_s=wall_s,
            ticks=max(0, len(changes) - 1),
            aligned=aligned,
            short=wall_s < self._meter.min_window_s,
            idle_share=_idle_share(busy_s, wall_s),
        )


class MeterUnavailable(Exception):
    """A meter that cannot be used here; the message is the reason."""


class NvmlCounter(CounterMeter):
    """The board's energy counter (nvmlDeviceGetTotalEnergyConsumption)."""

    def __init__(self, board: Board, **limits: Any) -> None:
        super().__init__("nvml-counter", board.energy_j, "The board's own energy counter", **limits)


class NvmlPower:
    """The board's power, sampled in a thread and integrated by trapezoids."""

    tick_s: float | None = None

    def __init__(self, board: Board, *, min_window_s: float = MIN_WINDOW_S) -> None:
        self.min_window_s = min_window_s
        try:
            board.instant_power_w()
            self._read, self.source = board.instant_power_w, "nvml-power-instant"
            self.explanation = "The board's instantaneous power, sampled and integrated"
        except (BoardError, AttributeError) as no_instant:
            try:
                board.mean_power_w()
            except BoardError as error:
                raise MeterUnavailable(f"nvml-power: {error}") from no_instant
            self._read, self.source = board.mean_power_w, "nvml-power-mean"
            self.explanation = (
                "The board's power averaged over about one second, sampled and integrated: "
                "edges of a window are smeared by that second"
            )

    def open(self, sparing: bool = False) -> Window:
        """Open a window; power is sampled every 10 ms, every 100 ms in a sparing one."""
        interval_s = _SPARING_POWER_INTERVAL_S if sparing else _POWER_INTERVAL_S
        return _PowerWindow(self.source, self.min_window_s, _Sampler(self._read, interval_s))


class _PowerWindow:
    def __init__(self, source: str, min_window_s: float, sampler: _Sampler) -> None:
        self._source = source
        self._min_window_s = min_window_s
        self._sampler = sampler
        self._curve: list[tuple[float, float]] = []

    def curve(self) -> list[tuple[float, float]]:
        if self._sampler.has_failed:
            return []
        samples, points = self._sampler.samples, self._curve
        for place in range(len(points), len(samples)):
            at_s, watts = samples[place]
            if place == 0:
                points.append((at_s, 0.0))
                continue
            before_s, watts_before = samples[place - 1]
            joules = (at_s - before_s) * (watts + watts_before) / 2
            points.append((at_s, points[-1][1] + joules))
        return points

    def close(self, busy_s: float | None = None) -> Measurement | Absence:
        sampler = self._sampler
        try:
            sampler.stop()
        except (BoardError, OSError, ValueError) as error:
            return Absence(self._source, f"the power sensor stopped answering: {error}")
        samples = sampler.samples
        seconds = samples[-1][0] - samples[0][0]
        if len(samples) < 2 or seconds <= 0.0:
            return Absence(self._source, "the window was too short for two samples of power")
        joules = sum(
            (later[0] - earlier[0]) * (later[1] + earlier[1]) / 2
            for earlier, later in itertools.pairwise(samples)
        )
        wall_s = sampler.closed_s - sampler.opened_s
        return Measurement(
            source=self._source,
            joules=joules,
            seconds=seconds,
            watts=joules / seconds,
            wall_s=wall_s,
            ticks=len(samples) - 1,
            aligned=False,
            short=wall_s < self._min_window_s,
            idle_share=_idle_share(busy_s, wall_s),
        )


POWERCAP: Final = Path("/sys/class/powercap")


class RaplCounter:
    """Joules of the processor packages and their memory under `root`, across wrap-arounds.

    Linux powercap: `energy_uj` rises to `max_energy_range_uj` and starts again at 0. Raises
    `MeterUnavailable` with the reason where there is nothing to read.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = []
        if root.is_dir():
            for zone in sorted(root.glob("intel-rapl:*")):
                name = _text(zone / "name")
                if name is not None and (name.startswith("package") or name == "dram"):
                    zones.append(zone)
        if not zones:
            raise MeterUnavailable(f"rapl: {root} lists no processor package")
        self.num_zones = len(zones)
        self._files = [zone / "energy_uj" for zone in zones]
        try:
            self._range_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
            self._last_uj = [int(file.read_text()) for file in self._files]
        except PermissionError as error:
            raise MeterUnavailable(
                f"rapl: {error.filename} may not be read by this user; run as a user who may"
            ) from error
        except (OSError, ValueError) as error:
            raise MeterUnavailable(
                f"rapl: the counters under {root} cannot be read: {error}"
            ) from error
        self._total_uj = 0

    def read_j(self) -> float:
        """Joules since this counter was made."""
        for index, file in enumerate(self._files):
            now_uj = int(file.read_text())
            moved_uj = now_uj - self._last_uj[index]
            if moved_uj < 0:
                moved_uj += self._range_uj[index]
            self._total_uj += moved_uj
            self._last_uj[index] = now_uj
        return self._total_uj / 1e6


class Rapl(CounterMeter):
    """The processor's energy counters: all packages of the machine, whoever uses them."""

    def __init__(self, root: Path = POWERCAP, **limits: Any) -> None:
        counter = RaplCounter(root)
        super().__init__(
            "rapl",
            counter.read_j,
            f"The processor's energy counters ({counter.num_zones} zones, the whole machine)",
            **limits,
        )


@dataclass(frozen=True)
class NoMeter:
    """No meter: every window yields an `Absence`."""

    reason: str
    source: str = "none"
    tick_s: float | None = None
    min_window_s: float = 0.0

    @property
    def explanation(self) -> str:
        """Why nothing is measured."""
        return f"No energy meter: {self.reason}"

    def open(self, sparing: bool = False) -> Window:
        """Open a window that measures nothing."""
        return _GivenWindow(Absence(self.source, self.reason))


@dataclass(frozen=True)
class _GivenWindow:
    outcome: Measurement | Absence

    def curve(self) -> list[tuple[float, float]]:
        return []

    def close(self, busy_s: float | None = None) -> Measurement | Absence:
        if isinstance(self.outcome, Absence) or busy_s is None:
            return self.outcome
        return replace(self.outcome, idle_share=_idle_share(busy_s, self.outcome.wall_s))


class CrossChecked:
    """A meter whose every window is also read by a second one; both words are kept."""

    def __init__(self, first: Meter, second: Meter) -> None:
        self._first = first
        self._second = second
        self.source = first.source
        self.tick_s = first.tick_s
        self.min_window_s = max(first.min_window_s, second.min_window_s)
        self.explanation = f"{first.explanation}. Beside it: {_lowered(second.explanation)}"

    def open(self, sparing: bool = False) -> Window:
        """Open a window of both."""
        with window_of(self._first, sparing) as first:
            return _CrossWindow(first, self._second.open(sparing))


class _CrossWindow:
    def __init__(self, first: Window, second: Window) -> None:
        self._first = first
        self._second = second
        self._counting: Window | None = None
        """Whose word counts, known once both are closed."""

    def curve(self) -> list[tuple[float, float]]:
        if self._counting is not None:
            return self._counting.curve()
        return self._first.curve() or self._second.curve()

    def close(self, busy_s: float | None = None) -> Measurement | Absence:
        second = self._second.close(busy_s)
        first = self._first.close(busy_s)
        self._counting = self._second if isinstance(first, Absence) else self._first
        if isinstance(first, Absence):
            return second
        if isinstance(second, Absence):
            return first
        return replace(first, cross_source=second.source, cross_watts=second.watts)


class Replayed:
    """Measurements read from a file, in order, one a window: for tests and second looks.

    The file has one JSON object a line, as `to_json` writes it. Raises `InputError` for a file
    that cannot be read and for a window beyond the last line.
    """

    source = "replayed"
    tick_s: float | None = None

    def __init__(self, file: Path, *, min_window_s: float = 0.0) -> None:
        self.min_window_s = min_window_s
        self.explanation = f"Measurements replayed from {file.name}"
        self._file = file
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "they are no text in UTF-8"
            raise InputError(
                f"The measurements to replay cannot be read: {why}.", str(file)
            ) from error
        self._left = [from_json(line, f"{file}, line {n}") for n, line in enumerate(lines, 1)]
        self._left.reverse()

    def open(self, sparing: bool = False) -> Window:
        """The next measurement of the file."""
        if not self._left:
            raise InputError(
                "It holds fewer measurements than windows were opened; record them anew.",
                str(self._file),
            )
        return _GivenWindow(self._left.pop())


def to_json(outcome: Measurement | Absence) -> str:
    """One line that `from_json` reads back to an equal object."""
    return json.dumps(asdict(outcome), sort_keys=True)


def from_json(line: str, where: str) -> Measurement | Absence:
    """A measurement or an absence from its line; raises `InputError` naming the place."""
    try:
        found = json.loads(line)
        kind = Absence if "reason" in found else Measurement
        return kind(**{field.name: found[field.name] for field in fields(kind)})
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"This is no measurement ({error}); allowed is a JSON object with the fields of a "
            "measurement, or with source and reason.",
            where,
        ) from error


def best_meter(
    device: str,
    board: Board | NoBoard,
    *,
    powercap: Path = POWERCAP,
    min_window_s: float = MIN_WINDOW_S,
) -> Meter:
    """The best meter there is for "cuda" or "cpu"; its `explanation` says why it was picked.

    For a GPU the counter, read beside the integrated power where both answer; for a processor
    RAPL. Raises nothing: without a meter the answer is a `NoMeter`.
    """
    if device != "cuda":
        try:
            return Rapl(powercap, min_window_s=min_window_s)
        except MeterUnavailable as error:
            return NoMeter(str(error))
    if isinstance(board, NoBoard):
        return NoMeter(board.reason)
    found: list[Meter] = []
    reasons: list[str] = []
    makers: Sequence[Callable[[], Meter]] = (
        lambda: NvmlCounter(board, min_window_s=min_window_s),
        lambda: NvmlPower(board, min_window_s=min_window_s),
    )
    for make in makers:
        try:
            found.append(make())
        except MeterUnavailable as error:
            reasons.append(str(error))
    if len(found) == 2:
        return CrossChecked(*found)
    return found[0] if found else NoMeter("; ".join(reasons))


def _idle_share(busy_s: float | None, wall_s: float) -> float | None:
    if busy_s is None or wall_s <= 0.0:
        return None
    return min(1.0, max(0.0, 1.0 - busy_s / wall_s))


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
