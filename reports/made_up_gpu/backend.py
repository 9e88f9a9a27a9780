"""Serving on the made-up GPU: real models and real decisions, by a clock that the device moves.

Tokens, confidences, admission, decisions and books are the real backend's. What each step takes is
the made-up device's, whatever this machine takes for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from calibration.measuring.meters import Measurement
from calibration.serving.batching import Decode, Prefill, Row
from calibration.serving.host import Host
from calibration.serving.iteration import NOTHING_CAPTURED, Answer, Captures, Machine, Outcome
from calibration.serving.prepared import Prepared, weight_settings
from calibration.serving.serve import Backend, WallClock
from calibration.serving.tally import IterationEntry
from calibration.serving.weights import CheckpointWeights, WeightSettings
from helios_sim.errors import InputError
from helios_sim.model import EarlyExitModel
from reports.made_up_gpu.device import BUCKETS, DISK_LINK, HOST_LINK, MadeUpGpu

NAME = "Made-up GPU"
ORIGIN = "made up"


class DeviceClock(WallClock):
    """Seconds that the device's host has spent, with the joules at each time it was read."""

    def __init__(self, gpu: MadeUpGpu) -> None:
        self.gpu = gpu
        self.start_s = gpu.host_s
        self.curve: list[tuple[float, float]] = []

    def restart(self) -> None:
        """Begin at zero."""
        self.start_s = self.gpu.host_s
        self.curve = [(self.start_s, self.gpu.joules)]

    def now_s(self) -> float:
        """The present."""
        self.curve.append((self.gpu.host_s, self.gpu.joules))
        return self.gpu.host_s - self.start_s

    def sleep_until(self, time_s: float) -> None:
        """Be idle until a time."""
        self.gpu.idle_until(self.start_s + time_s)


class DeviceWindow:
    """A reading of all that a run draws."""

    def __init__(self, clock: DeviceClock) -> None:
        self.clock = clock

    def close(self, busy_s: float | None = None) -> Measurement:
        """What was drawn from the run's start on."""
        self.clock.now_s()
        (begun_s, begun_j), (ended_s, ended_j) = self.clock.curve[0], self.clock.curve[-1]
        seconds, joules = ended_s - begun_s, ended_j - begun_j
        return Measurement(
            source=DeviceMeter.source,
            joules=joules,
            seconds=seconds,
            watts=joules / seconds if seconds else 0.0,
            wall_s=seconds,
            ticks=len(self.clock.curve),
            aligned=True,
            short=False,
        )

    def curve(self) -> list[tuple[float, float]]:
        """Joules since the run's start, at each time the clock was read."""
        self.clock.now_s()
        begun_j = self.clock.curve[0][1]
        return [(at_s, joules - begun_j) for at_s, joules in self.clock.curve]


class DeviceMeter:
    """A meter that knows what the device draws, without ticks and without noise."""

    source = "made-up"
    explanation = "The made-up device says what it draws."
    tick_s = 1e-6
    min_window_s = 0.0

    def __init__(self, clock: DeviceClock) -> None:
        self.clock = clock

    def open(self, sparing: bool = False) -> DeviceWindow:
        """Open a window."""
        return DeviceWindow(self.clock)


class DeviceMachine:
    """A machine that computes here and is charged there: the `Machine` of `iteration.py`.

    Graphs are captured as they are wanted, as the real backend has them on a GPU.
    """

    def __init__(self, machine: Machine, gpu: MadeUpGpu, depth: int) -> None:
        self.machine = machine
        self.gpu = gpu
        self.depth = depth
        self.captures = NOTHING_CAPTURED
        self._captured: set[tuple[str, int, int]] = set()
        self._rows: Sequence[Row] = ()
        self._layer = 0
        self._prompts = False

    @property
    def max_rows(self) -> int:
        """Requests that the KV cache holds at once."""
        return self.machine.max_rows

    def prefill(self, rows: Sequence[Row]) -> None:
        """Take new rows in and run all their tokens through the loaded layers."""
        self._rows, self._prompts = rows, True
        self.machine.prefill(rows)
        tokens = [row.to_prefill for row in rows]
        self.gpu.take_in(len(rows))
        pairs = sum(count * count / 2 for count in tokens)
        self.gpu.packed_layers(len(rows), sum(tokens), pairs, self.depth)

    def begin(self, rows: Sequence[Row], passed: int, ghosts: Sequence[Row]) -> None:
        """Start a decode with the rows' last tokens, or go on from after the exit they passed."""
        self._rows, self._prompts = [*rows, *ghosts], False
        self.machine.begin(rows, passed, ghosts)
        if passed:
            self._layer = self.gpu.exits[passed - 1]
            self.gpu.go_on(len(self._rows))
            return
        self._layer = 0
        self._capture("embed", 0, len(self._rows))
        self.gpu.begin(len(self._rows))

    def begin_again(self, rows: Sequence[Row]) -> None:
        """Refuse to feed tokens again, which the made-up device has no times for."""
        raise InputError(
            'skipped_kv is "recomputed"; the made-up GPU serves "filled" alone.',
            "serving.skipped_kv",
        )

    def run_to(self, level: int) -> None:
        """Run the layers from where the rows stand to the exit."""
        self.machine.run_to(level)
        context = sum(row.context + 1 for row in self._rows)
        for first, last in self.gpu.segments(self._layer, self.gpu.exits[level]):
            self._capture("run", last, len(self._rows), last - first)
            self.gpu.layers(len(self._rows), context, last - first, graphed=True)
        self._layer = self.gpu.exits[level]

    def read(self, level: int) -> list[Answer]:
        """What the exit's head says of each row."""
        answers = self.machine.read(level)
        if not self._prompts:
            self._capture("tell", level, len(self._rows))
        self.gpu.ask(len(self._rows))
        return answers

    def fill(self, rows: Sequence[Row], level: int) -> None:
        """Fill the KV of the layers beyond the exit for these rows, from where they stand."""
        self.machine.fill(rows, level)
        if len(rows) < len(self._rows):
            self.gpu.part(len(rows))
        for first, last in self.gpu.segments(self.gpu.exits[level], self.depth):
            self._capture("fill", last, len(rows), last - first)
        self.gpu.fill(len(rows), self.gpu.exits[level], self.depth)

    def hold(self, rows: Sequence[Row]) -> None:
        """Keep where these rows stand, to go on from later."""
        self.machine.hold(rows)
        if rows:
            self.gpu.hold(len(rows))

    def release(self, row: Row) -> None:
        """Give a row's place in the KV cache back."""
        self.machine.release(row)

    def _capture(self, kind: str, place: int, rows: int, layers: int = 0) -> None:
        """Capture a graph that is not there yet; more rows than all buckets run without."""
        bucket = next((bucket for bucket in BUCKETS if bucket >= rows), None)
        if bucket is None or (kind, place, bucket) in self._captured:
            return
        self._captured.add((kind, place, bucket))
        self.gpu.capture(kind, layers)
        is_exit = kind == "tell"
        had = self.captures
        self.captures = Captures(
            graphs=had.graphs + (not is_exit),
            exits=had.exits + is_exit,
            layers=had.layers + layers * (kind == "run"),
            filled_layers=had.filled_layers + layers * (kind == "fill"),
        )


class DeviceWeights(CheckpointWeights):
    """Weights that are loaded here and charged for there."""

    def __init__(self, prepared: Prepared, settings: WeightSettings, clock: DeviceClock) -> None:
        super().__init__(prepared.folders, prepared.room, settings, clock)
        self.gpu = clock.gpu

    def bring_in(self, name: str, depth: int) -> None:
        """Load a candidate's missing layers now; another candidate makes way for it first."""
        was_read = name in self.in_memory
        held = self.loaded_bytes if self.name == name else 0
        super().bring_in(name, depth)
        if not was_read:
            model = self._model_of(name)
            self.gpu.load(model.weight_bytes(model.shape.layers), DISK_LINK)
        if self.loaded_bytes > held:
            self.gpu.load(self.loaded_bytes - held, HOST_LINK)

    def take_up(  # type: ignore[override]
        self, name: str, depth: int, level: int, pool_blocks: int
    ) -> DeviceMachine:
        """The machine of what was brought in, charged for on the device."""
        machine = super().take_up(name, depth, level, pool_blocks)
        self.gpu.take_up(self._model_of(name))
        return DeviceMachine(machine, self.gpu, depth)

    def _model_of(self, name: str) -> EarlyExitModel:
        return self.room.profile.model(name).model


class DeviceHost(Host):
    """A host whose own work is charged to the device's host."""

    clock: DeviceClock

    def step(self, plan: Prefill | Decode) -> Outcome:
        """What the machine makes of a plan, and planning it."""
        self.clock.gpu.plan(len(plan.rows))
        return super().step(plan)

    def emit(self, entry: IterationEntry) -> None:
        """Give the tokens of an iteration to their requests."""
        super().emit(entry)
        self.clock.gpu.emit(len(entry.outcome.emitted))


class MadeUpBackend(Backend):
    """What a run on the made-up device is served with; `clock` is the meter's too."""

    origin = ORIGIN
    host_class = DeviceHost
    is_this_machine = False

    def __init__(self, gpu: MadeUpGpu) -> None:
        self.device_clock = DeviceClock(gpu)
        self.meter = DeviceMeter(self.device_clock)

    def clock(self) -> WallClock:
        """The clock that the run goes by."""
        return self.device_clock

    def weights(self, prepared: Prepared, clock: WallClock) -> CheckpointWeights:
        """Where the candidates' weights come from."""
        return DeviceWeights(prepared, weight_settings(prepared), self.device_clock)

    def device_name(self, prepared: Prepared) -> str:
        """The device as the run names it."""
        return NAME
