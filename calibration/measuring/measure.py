"""Measuring models within a time budget: a plan, trials in random order, readings on disk.

Everything taken is on disk before the next trial begins, so an interruption, a full disk or a
budget that runs out loses nothing; `resume` goes on with the same plan.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from calibration.device import device_name, device_of, dtype_name, dtype_of
from calibration.measuring.bench import STEADY_S, Bench, power_columns
from calibration.measuring.board import BoardState, board_of
from calibration.measuring.clocks import WAITING_SHARE, Clocks
from calibration.measuring.describe import (
    describe_device,
    describe_meter,
    describe_model,
    describe_system,
)
from calibration.measuring.floors import COPY_BYTES, time_copy, time_launch, time_read
from calibration.measuring.grid import (
    ENERGY_SHARE,
    LEAST_CONTEXT,
    LOADING_SHARE,
    SAMPLES,
    USED_SHARE,
    Job,
    Probe,
    in_turn,
    plan_energy,
    plan_latency,
)
from calibration.measuring.load_trials import Loading, checkpoint_loads, stand_in_loads
from calibration.measuring.loading import StageTime, load_sizes, pinned_copies
from calibration.measuring.meters import Measurement, Meter, NoMeter, best_meter, window_of
from calibration.measuring.occupancy import reserve_bytes
from calibration.measuring.pace import Looks, Pace
from calibration.measuring.plan_file import (
    PLAN_FILE,
    Grid,
    ModelPlan,
    Plan,
    check_same,
    check_same_model,
    earlier_plan,
)
from calibration.measuring.readings import (
    ENVIRONMENT_FILE,
    LINK,
    MOST_LOST_SHARE,
    POINTS_FILE,
    READ,
    Key,
    Reading,
    Readings,
    alone_in,
    busy_machine,
    usual_reference_s,
)
from calibration.measuring.sources import Source, find_sources, sample_tokens
from calibration.measuring.timing import measure_pace, synchronise, timed, timer_for
from calibration.model.decode import NOT_USABLE
from calibration.model.early_exit import EarlyExitLM
from calibration.model.graphs import CaptureError
from calibration.model.memory import TooLittleMemory, available_bytes, require
from calibration.options import parse_budget, parse_exits
from calibration.training.trace import (
    check_target,
    check_traceable,
    trace_checkpoints,
    traced_as_now,
)
from helios_sim.console.command import Interrupted
from helios_sim.errors import InputError
from helios_sim.wording import counted

_LEAST_BUDGET_S: Final = 5.0
_COPY_TRIALS: Final = 3
_FLOOR_SHARE: Final = 0.005
"""Of the budget for each reading of a floor, beyond which disturbed samples will do."""
_LINK_BYTES: Final = 2**28
_LOAD_BYTES: Final = {"cpu": (2**24, 2**28), "cuda": (2**28, 2**31)}
"""Least and largest size of a stand-in file, where no checkpoint is loaded."""

_COOL_DOWN_S: Final = 0.5
"""Pause between a GPU's work and an energy window, so that one does not warm the next."""

_WINDOW_SHARE: Final = 1 / 75
"""Of a short budget that one energy window takes, so that three models get several each."""

_PACE_EVERY_S: Final = 5.0
"""Between two looks at the machine's pace."""

MOST_PLANNED_AGAIN: Final = 1.5
"""Samples planned for each one that is wanted, at most: disturbances come and go, and a plan made
during one would be coarse for good, while tries again keep to a trial's share of the time."""

MOST_FURTHER_TRIALS: Final = 3
"""Of a load that others disturb every time; a machine that is busy so long stays so."""

_GRID: Final = {"cpu": (16, 512), "cuda": (64, 2048)}
"""Largest batch and context unless asked otherwise."""

_POOL_SHARE: Final = 0.6
"""Of the memory left by the weights; the rest is for workspace and graphs."""

_LEAST_HALVED: Final = 64
"""Contexts are not halved below it, but rows."""


@dataclass(frozen=True)
class MeasureSettings:
    """What is asked of a measurement.

    `models` are checkpoint folders, folders of such folders, or names of public shapes, which
    get random weights. `exits` replaces their exit layers. `max_batch` and `max_context` bound
    the grid; by default 16 rows of 512 tokens on a processor, 64 of 2048 on a GPU. `traces` asks
    for exit traces of the checkpoints at the end.
    """

    models: tuple[str, ...]
    out: Path
    device: str = "cpu"
    dtype: str | None = None
    budget_s: float = 600.0
    resume: bool = False
    exits: tuple[int, ...] | None = None
    max_batch: int | None = None
    max_context: int | None = None
    seed: int = 0
    traces: bool = True

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"The device {self.device!r} is unknown; allowed are cpu and cuda.")
        if self.budget_s < _LEAST_BUDGET_S:
            raise InputError(
                f"A budget of {self.budget_s:g} s was given; {_LEAST_BUDGET_S:g} s is the least."
            )
        for name, bound, least in (
            ("batch", self.max_batch, 1),
            ("context", self.max_context, LEAST_CONTEXT),
        ):
            if bound is not None and bound < least:
                raise InputError(f"A largest {name} of {bound} was given; {least} is the least.")


@dataclass(frozen=True)
class Outcome:
    """What a measurement amounts to; `left_out` of the plan's trials were not taken in time."""

    num_readings: int
    num_new: int
    num_trials: int
    left_out: int
    notes: tuple[str, ...]


def measure(settings: MeasureSettings, console: Console | None = None) -> Outcome:
    """Measure the models and leave readings, points.parquet and environment.json in `out`.

    An interruption (KeyboardInterrupt) passes through once the readings so far are exported.
    Raises `InputError` for what cannot be measured, on a full disk, and for a folder that another
    process measures into.
    """
    began_s = time.monotonic()
    asked = _asked(settings)
    # Nobody else adds to what is read of an earlier run.
    with alone_in(settings.out):
        session = _Session(settings, asked, console or Console(quiet=True), began_s)
        try:
            session.run()
        except BaseException:
            # What ended the run is what is told, even where the readings cannot be exported either.
            with suppress(InputError):
                session.finish()
            raise
        session.finish()
    return session.outcome()


def command(
    models: Sequence[str],
    out: Path,
    *,
    device: str,
    dtype: str | None,
    budget: str,
    resume: bool,
    exits: str | None,
    max_batch: int | None,
    max_context: int | None,
    threads: int | None,
    seed: int,
    traces: bool,
) -> None:
    """`helios-calibrate measure`: measure, tell what came of it, and keep all if interrupted."""
    device = device_of(device).type
    settings = MeasureSettings(
        models=tuple(models),
        out=out,
        device=device,
        dtype=dtype,
        budget_s=parse_budget(budget),
        resume=resume,
        exits=None if exits is None else parse_exits(exits),
        max_batch=max_batch,
        max_context=max_context,
        seed=seed,
        traces=traces,
    )
    if threads is not None or device == "cpu":
        torch.set_num_threads(threads or 1)
    try:
        done = measure(settings, Console())
    except KeyboardInterrupt:
        raise Interrupted(f"the readings so far are kept in {out}, and --resume goes on") from None
    following = f"Next: helios-calibrate fit {out} --out PROFILE"
    if done.left_out and done.left_out == done.num_trials:
        following = (
            f"None of {done.num_trials} trials was taken in time, so there is nothing to fit: the "
            "same command with --resume and a longer --budget takes them."
        )
    elif done.left_out:
        following = (
            f"{done.left_out} trials were not taken in time, so a fit may lack points: the same "
            f"command with --resume takes them. {following}"
        )
    Console().print(
        f"{done.num_new} new readings, {done.num_readings} in all, in {out / POINTS_FILE}. "
        f"{following}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True)
class _Asked:
    """What is to be measured on which device: checked, while the folder is left as it is."""

    device: torch.device
    dtype: torch.dtype
    sources: tuple[Source, ...]


def _asked(settings: MeasureSettings) -> _Asked:
    """What settings ask for; raises `InputError` for what cannot be measured."""
    device = device_of(settings.device)
    dtype = dtype_of(settings.dtype, device)
    sources = find_sources(settings.models, settings.exits)
    for source in sources:
        if source.shape.max_positions < LEAST_CONTEXT:
            raise InputError(
                f"{source.name} has {counted(source.shape.max_positions, 'position')}; "
                f"{LEAST_CONTEXT} are the least that a decode can be measured with."
            )
        shallowest = source.exit_layers[0]
        require(
            device,
            source.weight_bytes(shallowest, dtype),
            f"{source.name} with its first {shallowest} layers",
            "choose a smaller model, or earlier exits with --exits",
        )
    _check_traceable(settings, sources)
    return _Asked(device, dtype, sources)


def _to_trace(settings: MeasureSettings, sources: Sequence[Source]) -> list[Path]:
    """Checkpoints without traces of their confidence, where traces are asked for."""
    folders = [source.folder for source in sources if source.folder is not None]
    if not settings.traces or traced_as_now(folders, settings.out):
        return []
    return folders


def _check_traceable(settings: MeasureSettings, sources: Sequence[Source]) -> None:
    """Refuse checkpoints that cannot be traced together, before time is spent on them."""
    folders = _to_trace(settings, sources)
    if not folders or settings.exits is not None:
        return
    check_target(settings.out)
    try:
        check_traceable(folders)
    except InputError as error:
        raise InputError(
            f"{error.message} Or measure without exit traces: --no-traces.", error.where
        ) from error


class _Session:
    """One run of `measure`: the clock, the meter, the plan and the readings.

    Its clock stands at 0 at `began_s` of `time.monotonic`.
    """

    def __init__(
        self, settings: MeasureSettings, asked: _Asked, console: Console, began_s: float
    ) -> None:
        self.settings = settings
        self.console = console
        self.began_s = began_s
        self.began_at = _now()
        self.device, self.dtype, self.sources = asked.device, asked.dtype, asked.sources
        self.readings = Readings(settings.out)
        self.num_before = len(self.readings)
        if self.num_before and not settings.resume:
            raise InputError(
                f"The folder holds {self.num_before} readings already; give another folder, or "
                "--resume to go on with them.",
                str(settings.out),
            )
        if settings.resume and not self.num_before:
            console.print(f"There is nothing to go on with in {settings.out}: it begins anew.")
        self.plan = self._earlier_plan()
        self.environment = self._earlier_environment()
        self.board = board_of(self.device)
        self.clocks = Clocks(self.board, WAITING_SHARE * settings.budget_s)
        self.meter: Meter = best_meter(self.device.type, self.board)
        self.notes: list[str] = []
        self.left_out = 0
        self.paces = Looks()
        self.pace_seen_s = -math.inf

    def run(self) -> None:
        """The device first, then model after model, each with its share of what is left."""
        names = ", ".join(source.name for source in self.sources)
        self._say(
            f"Budget {_clock(self.settings.budget_s)} on {device_name(self.device)} for {names}."
        )
        self._say(f"{self.meter.explanation}.")
        self._describe()
        self._device_readings()
        self._look_at_pace()
        for number, source in enumerate(self.sources):
            self._model_readings(source, self._left_s() / (len(self.sources) - number))
        self._look_at_pace()
        self._idle_power(trial=1)
        lost = [one.idle_share for one in self.readings.all if one.joules is one.watts is None]
        if busy := busy_machine([share for share in lost if share is not None]):
            self._note(busy)
        if waited := self.clocks.said():
            self._note(waited)
        self._trace()

    def finish(self) -> None:
        """Export what there is, whatever ended the run."""
        if len(self.readings):
            self.environment["ended_at"] = _now()
            if len(self.paces):
                quiet, earlier = self.paces.quiet, self._earlier_pace()
                pace = quiet if earlier is None else quiet.quickest(earlier)
                self.environment["pace"] = asdict(pace)
            reference_s = usual_reference_s(self.readings.table())
            if reference_s is not None:
                self.environment["reference_s"] = reference_s
            self.environment["notes"] = [*self.environment.get("notes", []), *self.notes]
            self.readings.write_environment(self.environment)
            self.readings.export()

    def outcome(self) -> Outcome:
        """What came of it."""
        num_new = len(self.readings) - self.num_before
        notes = tuple(self.notes)
        num_trials = sum(len(planned.jobs) for planned in self.plan.models.values())
        return Outcome(len(self.readings), num_new, num_trials, self.left_out, notes)

    def _device_readings(self) -> None:
        """What belongs to the device: its reserve, tick, idle power, copies and loading."""
        reserve = reserve_bytes(self.device, self.board)
        if reserve is not None:
            self._keep(Reading("memory_reserve", bytes=reserve))
        if self.meter.tick_s is not None:
            self._keep(Reading("counter_probe", seconds=self.meter.tick_s, meter=self.meter.source))
        self._idle_power(trial=0)
        self._copies()
        self._loading()

    def _idle_power(self, trial: int) -> None:
        """Watts of the device with nothing to do, at the start and at the end."""
        reading = Reading("idle_power", trial=trial)
        if isinstance(self.meter, NoMeter) or reading.key in self.readings:
            return
        synchronise(self.device)
        time.sleep(self._cool_down_s())
        with window_of(self.meter) as window:
            time.sleep(self._window_s())
            found = window.close(busy_s=0.0)
        if isinstance(found, Measurement):
            self._keep(replace(reading, seconds=found.seconds, **power_columns(found)))

    def _copies(self) -> None:
        """Copies within the device's memory, reading it, and copies to a GPU from the host."""
        num_bytes, timer = COPY_BYTES[self.device.type], timer_for(self.device)
        patience_s = _FLOOR_SHARE * self.settings.budget_s
        for trial in range(_COPY_TRIALS):
            reading = Reading("copy_bandwidth", bytes=2 * num_bytes, trial=trial)
            if reading.key not in self.readings:
                timing, _ = time_copy(num_bytes, self.device, timer, SAMPLES, patience_s)
                self._keep(reading.timed(timing))
            reading = Reading("copy_bandwidth", mode=READ, bytes=num_bytes, trial=trial)
            if reading.key not in self.readings:
                timing = time_read(num_bytes, self.device, timer, SAMPLES, patience_s)
                self._keep(reading.timed(timing))
        linked = [
            Reading("copy_bandwidth", mode=LINK, bytes=_LINK_BYTES, trial=trial)
            for trial in range(_COPY_TRIALS if self.device.type == "cuda" else 0)
        ]
        missing = [reading for reading in linked if reading.key not in self.readings]
        if missing:
            copying = pinned_copies(_LINK_BYTES, self.dtype, self.device)
            if isinstance(copying, str):
                self._note(f"no copies over the link: {copying}")
                return
            for reading in missing:
                (timing,) = timed([copying], timer, samples=SAMPLES, patience_s=patience_s)
                self._keep(reading.timed(timing))

    def _loading(self) -> None:
        """Every stage of loading at several sizes, some of them held out, in random order."""
        until_s = self._now_s() + LOADING_SHARE * self.settings.budget_s
        loads = checkpoint_loads(self.sources) or stand_in_loads(self._load_sizes())
        with Loading(self.device, self.dtype, self.settings.out) as loading:
            for load, trial in loading.missing(loads, self.readings.all, self.settings.seed):
                if trial > 0 and self._now_s() > until_s:
                    break
                try:
                    loading.prepare(load)
                except OSError as error:
                    raise self.readings.explained(error) from error
                for found in self._possible(loading.stages(load)):
                    self._keep(load.reading(found, trial))
        self._loading_power()

    def _load_sizes(self) -> tuple[int, ...]:
        """Bytes of stand-in files: as large as the disk allows, and the same when resumed."""
        if not self.plan.load_sizes:
            low, high = _LOAD_BYTES[self.device.type]
            free = shutil.disk_usage(self.settings.out).free
            self.plan.load_sizes = load_sizes(max(low, min(high, free // 4)))
            self._write_plan()
        return self.plan.load_sizes

    def _loading_power(self) -> None:
        """Watts while weights go from host memory to a GPU, over and over."""
        num_bytes = _LOAD_BYTES["cuda"][0]
        reading = Reading("load_energy", bytes=num_bytes)
        metered = self.device.type == "cuda" and not isinstance(self.meter, NoMeter)
        if not metered or reading.key in self.readings:
            return
        copying = pinned_copies(num_bytes, self.dtype, self.device)
        if isinstance(copying, str):
            self._note(f"no power of loading: {copying}")
            return
        copying()
        with window_of(self.meter) as window:
            begin_s, repetitions = time.perf_counter(), 0
            while time.perf_counter() - begin_s < self._window_s():
                copying()
                repetitions += 1
            seconds = (time.perf_counter() - begin_s) / repetitions
            found = window.close(busy_s=seconds * repetitions)
        if isinstance(found, Measurement):
            self._keep(
                replace(
                    reading,
                    seconds=seconds,
                    repetitions=repetitions,
                    joules=found.watts * seconds,
                    **power_columns(found),
                )
            )

    def _possible(self, stages: Iterator[StageTime]) -> Iterator[StageTime]:
        """Stages up to one that cannot be had: a machine may lack memory for a copy alone."""
        try:
            yield from stages
        except TooLittleMemory as error:
            self._note(f"A stage of loading is not measured: {error.message}")

    def _model_readings(self, source: Source, share_s: float) -> None:
        """Everything of one model, within its share of the time."""
        until_s = self._now_s() + share_s
        planned = self.plan.models.get(source.name)
        if planned is not None and all(self._is_done(job) for job in planned.jobs):
            self._say(f"{source.name}: every trial of the plan is taken.")
            return
        model, depth = self._load(source)
        with ExitStack() as held:
            held.callback(model.unload)
            grid = self._grid_of(source, model, depth)
            tokens = sample_tokens(source.shape.vocab)
            bench = Bench(model, tokens, max_batch=grid.max_batch, max_context=grid.max_context)
            held.callback(bench.close)
            if changed := self._changed_kernels(bench):
                self._note(
                    f"{bench.name} is not measured further, since {changed}: times with both are "
                    "not one measurement. Its readings are kept; free memory where a self-test "
                    "found no room, or measure into another folder"
                )
                return
            self._graphs(bench)
            # After the graphs, whose buckets are part of the description.
            self._describe_model(source, bench)
            self._floors(bench)
            self._memory(bench)
            probe = bench.probe()
            if planned is None:
                jobs = self._jobs(bench, probe, until_s - self._now_s())
                planned = ModelPlan(source.exit_layers, self._asked(source), grid, jobs)
                self.plan.models[source.name] = planned
                self._write_plan()
            self._run_jobs(bench, probe, planned.jobs, until_s)

    def _changed_kernels(self, bench: Bench) -> str:
        """What kernels the run that is resumed had otherwise, as far as it says; empty if none."""
        earlier = self.environment["models"].get(bench.name, {}).get("kernels", {})
        for name, said in bench.kernels.items():
            before = earlier.get(name, said)
            if before.partition(":")[0] != said.partition(":")[0]:
                return f"its kernel {name} was {before}; now it is {said}"
        return ""

    def _describe_model(self, source: Source, bench: Bench) -> None:
        """Write down what a model is and runs as, and note kernels that a GPU should have had."""
        described = json.loads(json.dumps(describe_model(source, bench)))
        if before := self.environment["models"].get(bench.name):
            check_same_model(bench.name, before, described)
        if "graph" not in bench.modes:
            # Readings from the graphs of an earlier run were padded to its buckets.
            earlier = self.environment["models"].get(bench.name, {})
            described |= {key: earlier[key] for key in bench.buckets if earlier.get(key)}
        self.environment["models"][bench.name] = described
        self.readings.write_environment(self.environment)
        if self.device.type == "cuda":
            for name, said in bench.kernels.items():
                # A pool of slots has no pages for `varlen` to read.
                if name != "varlen" and said.startswith(NOT_USABLE):
                    self._note(f"{bench.name}: the kernel {name} is {said}")

    def _load(self, source: Source) -> tuple[EarlyExitLM, int]:
        """The model to its deepest exit that fits; weights at each exit are weighed on the way.

        Weights that cannot be read, or that the guard refuses, are no matter of memory: they end
        the run.
        """
        model: EarlyExitLM | None = None
        depth = 0
        for layers in source.exit_layers:
            try:
                if model is None:
                    model = source.load(layers, self.device, self.dtype)
                else:
                    model.grow(layers)
            except TooLittleMemory as error:
                if model is None:
                    raise
                self._note(f"{source.name} is measured to layer {depth}: {error.message}")
                break
            depth = layers
            self._keep(
                Reading(
                    "memory_weights",
                    source.name,
                    layers=depth,
                    bytes=model.loaded_bytes,
                    predicted_bytes=model.spec.weight_bytes(depth),
                )
            )
        assert model is not None
        return model, depth

    def _asked(self, source: Source) -> Grid:
        """Rows and tokens that are asked for, or usual, as far as the model has positions."""
        batch, context = _GRID[self.device.type]
        context = min(self.settings.max_context or context, source.shape.max_positions)
        return Grid(self.settings.max_batch or batch, context)

    def _grid_of(self, source: Source, model: EarlyExitLM, depth: int) -> Grid:
        """Rows and tokens of the pool: what is asked for, halved until it fits.

        What was planned stands. Raises `InputError` where memory lacks for it, or for the least.
        """
        asked = self._asked(source)
        batch, context = asked.max_batch, asked.max_context
        available = available_bytes(self.device)
        per_token = model.spec.kv_bytes_per_token(depth)
        planned = self.plan.models.get(source.name)
        if planned is not None:
            tokens = planned.grid.max_batch * planned.grid.max_context
            lacks = available is not None and tokens * per_token > available
            if lacks or depth < planned.deepest:
                raise InputError(
                    f"{source.name} was planned with {planned.grid} in {planned.deepest} layers, "
                    "for which there is too little memory now. Free some of it, or measure into "
                    "another folder."
                )
            return planned.grid
        allowed = None if available is None else int(_POOL_SHARE * available) // per_token
        while allowed is not None and batch * context > allowed:
            if context > _LEAST_HALVED and (batch == 1 or context >= 8 * batch):
                context = max(_LEAST_HALVED, context // 2)
            elif batch > 1:
                batch //= 2
            else:
                raise InputError(
                    f"{source.name} leaves room for {allowed} KV tokens on {self.device}; "
                    f"{_LEAST_HALVED} are the least. Choose a smaller model, or earlier exits."
                )
        grid = Grid(batch, context)
        if grid != asked:
            self._note(
                f"{source.name}: the grid is shrunk from {asked} to {grid}, which is what memory "
                "allows"
            )
        return grid

    def _graphs(self, bench: Bench) -> None:
        """Capture graphs on a GPU; without them everything runs eager, and the reason is noted."""
        if self.device.type != "cuda":
            return
        captured = bench.capture_graphs()
        if isinstance(captured, str):
            self._note(f"{bench.name}: no CUDA graphs, so readings are eager: {captured}")
            return
        self._keep(captured)
        try:
            for reading in bench.captures():
                self._keep(reading)
        except CaptureError as error:
            self._note(f"{bench.name}: graphs could not be captured a second time: {error}")

    def _floors(self, bench: Bench) -> None:
        """What a layer's launches take without work: the fewest, and in graphs those they hold."""
        fewest = bench.launches_per_layer()
        self.environment["models"][bench.name]["launches_per_layer"] = fewest
        for mode in ("eager", "graph") if self.device.type == "cuda" else ("eager",):
            count = fewest
            if mode == "graph":
                # A graph's kernels are chosen for the longest context that it may meet, and rows
                # that keep the device busy do without merging.
                rows, longest = bench.bounds.max_batch, bench.bounds.max_context
                count = min(bench.launches_per_layer(one, longest) for one in {1, rows})
            reading = Reading("launch_floor", bench.name, mode, layers=1, note=f"{count} launches")
            if reading.key in self.readings:
                continue
            patience_s = _FLOOR_SHARE * self.settings.budget_s
            found = time_launch(self.device, bench.timer, mode, SAMPLES, patience_s)
            if isinstance(found, str):
                self._note(f"{bench.name}: no launch floor from a graph: {found}")
            else:
                layer = replace(found, seconds=count * found.seconds, mad_s=count * found.mad_s)
                self._keep(reading.timed(layer))

    def _memory(self, bench: Bench) -> None:
        for reading in bench.memory():
            self._keep(reading)

    def _jobs(self, bench: Bench, probe: Probe, allowed_s: float) -> tuple[Job, ...]:
        """Plan a model's trials for the time there is, and tell the plan."""

        def estimate_s(job: Job) -> float:
            return bench.estimate_s(job, probe)

        bounds = bench.bounds
        usable_s = USED_SHARE * allowed_s
        energy_s = 0.0 if isinstance(self.meter, NoMeter) else ENERGY_SHARE * usable_s
        window_s = self._energy_trial_s()
        seed = self.settings.seed
        windows: tuple[Job, ...] = ()
        if energy_s:
            energy = plan_energy(bounds, window_s, energy_s, seed)
            windows = energy.jobs
            self._note(*energy.notes)
            energy_s = energy.seconds
        again = min(MOST_PLANNED_AGAIN, probe.samples_per_quiet_one)
        timings_s = (usable_s - energy_s) / again
        latency = plan_latency(bounds, estimate_s, timings_s, allowed_s, seed)
        self._note(*latency.notes)
        planned = tuple(in_turn(windows, latency.jobs, seed))
        trials = 1 + max(job.trial for job in planned)
        planned_s = latency.seconds * again + energy_s
        metered = f", {len(windows)} energy windows" if windows else ""
        takes = f"about {_clock(planned_s)}"
        if planned_s > allowed_s:
            takes += f", and {_clock(max(0.0, allowed_s))} are left"
        self._say(
            f"{bench.name}: {len(latency.jobs)} timings in {counted(trials, 'round')}{metered}; "
            f"rows up to {bounds.max_batch}, contexts up to {bounds.max_context}, layers "
            f"{', '.join(map(str, bounds.depths))}; "
            f"{takes if allowed_s > 0.0 else 'the budget is spent before they begin'}."
        )
        return planned

    def _run_jobs(self, bench: Bench, probe: Probe, jobs: Sequence[Job], until_s: float) -> None:
        """Run the trials that are not done, until the time is over.

        Time that is left over then goes to those that others disturbed.
        """
        missing = [job for job in jobs if not self._is_done(job)]
        possible = [job for job in missing if not job.mode or job.mode in bench.modes]
        if lost := len(missing) - len(possible):
            self._note(
                f"{bench.name}: {counted(lost, 'trial')} of the plan cannot be taken: they need "
                "CUDA graphs, and there are none this time; earlier readings are kept"
            )
        if isinstance(self.meter, NoMeter) and (windows := [*filter(_is_window, possible)]):
            self.left_out += len(windows)
            possible = [job for job in possible if not _is_window(job)]
            self._note(
                f"{bench.name}: {counted(len(windows), 'window')} of energy of the plan cannot be "
                f"taken: {self.meter.reason}"
            )
        left = [(job, self._least_s(bench, probe, job)) for job in possible]
        left_s = sum(least_s for _, least_s in left)
        silent: set[Job] = set()
        with self._progress(bench.name, len(left)) as advance:
            while left:
                now_s = self._now_s()
                if now_s > until_s:
                    self.left_out += len(left)
                    self._note(
                        f"{bench.name}: {len(left)} trials were not taken in time; --resume takes "
                        "them"
                    )
                    return
                if now_s - self.pace_seen_s > _PACE_EVERY_S:
                    self._look_at_pace()
                job, least_s = left.pop(0)
                share_s = least_s / left_s * USED_SHARE * (until_s - now_s)
                why = self._run_job(bench, job, min(share_s, MOST_PLANNED_AGAIN * least_s))
                left_s -= least_s
                if why is None:
                    advance()
                elif job not in silent:
                    # A meter that fell silent once may answer at the end.
                    silent.add(job)
                    left.append((job, least_s))
                    left_s += least_s
                else:
                    self.left_out += 1
                    self._note(
                        f"{bench.name}: a window of energy was lost twice ({why}); --resume takes "
                        "it"
                    )
        timings = [job for job in possible if not _is_window(job)]
        for _ in range(MOST_FURTHER_TRIALS):
            if not self._take_again(bench, probe, timings, until_s):
                break

    def _take_again(self, bench: Bench, probe: Probe, jobs: Sequence[Job], until_s: float) -> bool:
        """Take one more trial of each load that was disturbed every time; whether any is left.

        Others come in bouts of seconds, which outlast the tries of one trial.
        """
        disturbed = self._disturbed(jobs)
        for job in disturbed:
            least_s = self._least_s(bench, probe, job)
            if self._now_s() + least_s > until_s:
                return False
            self._run_job(bench, job, MOST_PLANNED_AGAIN * least_s)
        return bool(disturbed)

    def _disturbed(self, jobs: Sequence[Job]) -> list[Job]:
        """The next trial of each load that has no undisturbed one at some depth."""
        lost: dict[Key, float] = {}
        trials: dict[Key, int] = {}
        for reading in self.readings.all:
            key, share = replace(reading, trial=0).key, reading.idle_share or 0.0
            lost[key] = min(lost.get(key, share), share)
            trials[key] = max(trials.get(key, 0), reading.trial)
        loads = dict.fromkeys(replace(job, trial=0) for job in jobs)
        return [
            replace(load, trial=1 + max(trials.get(key, 0) for key in load.keys))
            for load in loads
            if max(lost.get(key, 0.0) for key in load.keys) > MOST_LOST_SHARE
        ]

    def _least_s(self, bench: Bench, probe: Probe, job: Job) -> float:
        """Seconds of a trial that nobody disturbs."""
        if _is_window(job):
            return self._energy_trial_s()
        return bench.estimate_s(job, probe)

    def _energy_trial_s(self) -> float:
        return self._window_s() + STEADY_S + self._cool_down_s()

    def _run_job(self, bench: Bench, job: Job, patience_s: float) -> str | None:
        """Take a trial and keep its readings; why not, where a meter gave no joules.

        The board is asked right after the work: before it, it tells of the trial before.
        """
        if not _is_window(job):
            # A window is long, and begins after a pause of its own.
            self.clocks.settle()
        started_at = _now()
        if _is_window(job):
            found = bench.energy(job, self.meter, self._window_s())
            state = self.board.state()
            time.sleep(self._cool_down_s())
            if found.joules is None:
                # A reading without joules would count as taken, and a fit needs every window.
                return found.note
            self._keep(found, state, started_at)
            return None
        taken = list(bench.time(job, patience_s))
        state = self.board.state()
        for reading in taken:
            self._keep(reading, state, started_at)
        return None

    def _trace(self) -> None:
        """Exit traces of the checkpoints, beside the readings; their time is not the budget's."""
        folders = _to_trace(self.settings, self.sources)
        if folders and self.settings.exits is not None:
            self._note("No exits are traced: the models were given other exits than their own")
            return
        if not folders:
            return
        self._say(f"Tracing the exits of {len(folders)} checkpoints on held-out text.")
        try:
            out, device, dtype = self.settings.out, self.device, self.dtype
            trace_checkpoints(folders, out, device=device, dtype=dtype)
        except InputError as error:
            self._note(f"No exits are traced: {error}")

    def _keep(
        self, reading: Reading, state: BoardState | None = None, started_at: str | None = None
    ) -> None:
        """Put a reading on disk with the device's state as it was taken."""
        state = state or self.board.state()
        reasons = state.throttle_reasons
        self.readings.append(
            replace(
                reading,
                temperature_c=state.temperature_c,
                sm_clock_mhz=state.sm_clock_mhz,
                throttle_reasons=None if reasons is None else "+".join(reasons),
                started_at=started_at or _now(),
            )
        )

    def _is_done(self, job: Job) -> bool:
        return all(key in self.readings for key in job.keys)

    def _window_s(self) -> float:
        """Seconds of an energy window: the meter's minimum, less where the budget is short."""
        short_s = _WINDOW_SHARE * self.settings.budget_s
        return min(self.meter.min_window_s + 2 * (self.meter.tick_s or 0.0), max(short_s, 1.0))

    def _cool_down_s(self) -> float:
        return _COOL_DOWN_S if self.device.type == "cuda" else 0.0

    def _now_s(self) -> float:
        return time.monotonic() - self.began_s

    def _left_s(self) -> float:
        """Seconds of the budget for what is left of the models."""
        closing_s = 0.0 if isinstance(self.meter, NoMeter) else self._window_s()
        return max(0.0, self.settings.budget_s - self._now_s() - closing_s)

    def _earlier_plan(self) -> Plan:
        """The plan to go on with; raises `InputError` where it was another measurement's."""
        identity = {
            "device": device_name(self.device),
            "dtype": dtype_name(self.dtype),
            "seed": self.settings.seed,
        }
        if self.device.type == "cpu":
            identity["threads"] = torch.get_num_threads()
        if not self.settings.resume:
            return Plan(identity)
        plan = earlier_plan(self.settings.out, identity)
        for source in self.sources:
            if source.name in plan.models:
                planned = plan.models[source.name]
                check_same(planned, source.name, source.exit_layers, self._asked(source))
        return plan

    def _write_plan(self) -> None:
        self.readings.write_json(PLAN_FILE, self.plan.to_json())

    def _earlier_environment(self) -> dict[str, Any]:
        file = self.settings.out / ENVIRONMENT_FILE
        if self.settings.resume and file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                self.console.print(f"{file} could not be read and is written anew.")
        return {}

    def _earlier_pace(self) -> Pace | None:
        """The pace of the run that is resumed."""
        found = self.environment.get("pace")
        try:
            return None if found is None else Pace(**found)
        except TypeError:
            return None

    def _look_at_pace(self) -> None:
        """Take the device's pace; while nobody disturbs, it is what a run is held against."""
        self.paces.add(measure_pace(self.device))
        self.pace_seen_s = self._now_s()

    def _describe(self) -> None:
        """Write down where readings come from, before the first is taken."""
        state = self.board.state()
        self.environment |= {
            "device": describe_device(self.device, state),
            "dtype": dtype_name(self.dtype),
            "meter": describe_meter(self.meter, self._window_s()),
            **describe_system(self.board),
            "commands": [*self.environment.get("commands", []), " ".join(sys.argv)],
            "budget_s": self.settings.budget_s,
            "seed": self.settings.seed,
            "state_at_start": asdict(state),
            "began_at": self.environment.get("began_at", self.began_at),
        }
        self.environment.setdefault("models", {})
        self.readings.write_environment(self.environment)

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def _note(self, *sentences: str) -> None:
        for sentence in (given.rstrip(".") for given in sentences):
            self.notes.append(sentence)
            self._say(f"Note: {sentence}.")

    @contextmanager
    def _progress(self, name: str, count: int) -> Iterator[Callable[[], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=count)
            yield lambda: progress.advance(task)


def _is_window(job: Job) -> bool:
    return job.quantity.endswith("_energy")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _clock(seconds: float) -> str:
    """Seconds as 45 s or 2 min 5 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
