"""A GPU that is made up: a host that launches work, and a device that works through it.

It is no sum of the terms that are fitted. Layers take the larger of launching, reading and
computing; graphs pad rows, and take their time to be captured; the host works on beside the device
until it has to hear an exit's word; weights come over a link; and the device draws other watts at
work than while it waits. So a fit is held to something that it was not made from. Its figures are
chosen, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.measuring.grid import Bounds, Job
from calibration.measuring.readings import Reading
from helios_sim.model import EarlyExitModel

BYTES_PER_S, FLOPS = 2.6e12, 4e14
GRAPH_LAUNCH_S, EAGER_LAUNCH_S, DEVICE_LAUNCH_S = 14e-6, 9e-6, 2e-6
LAUNCHES_PER_LAYER, LAUNCHES_PER_FILLED_LAYER = 10, 3
IDLE_W, WAITING_W, WORKING_W, LOADING_W = 120.0, 125.0, 200.0, 150.0
J_PER_BYTE, J_PER_FLOP = 4e-11, 5e-13
HOST_LINK, DISK_LINK = (3e-4, 2e10), (2e-3, 2.5e9)
"""Seconds to begin and bytes a second, from page-locked host memory and from disk."""
CAPTURE_S, CAPTURE_EXIT_S = 8e-4, 1.1e-3
CAPTURE_LAYER_S, CAPTURE_FILLED_LAYER_S = 1.6e-4, 6e-5
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def bounds_of(model: EarlyExitModel) -> Bounds:
    """All that its contexts and the largest bucket allow, with graphs and without."""
    most, longest = BUCKETS[-1], model.shape.max_positions
    modes = ("eager", "graph")
    return Bounds(model.name, model.exit_layers, most, longest, most * longest, 4096, modes)


@dataclass
class MadeUpGpu:
    """A model on such a device; `slowness` multiplies what its host takes."""

    model: EarlyExitModel
    slowness: float = 1.0
    host_s: float = 0.0
    """Until when the host is busy."""
    device_s: float = 0.0
    """Until when the device is."""
    worked_s: float = 0.0
    work_j: float = 0.0
    idle_s: float = 0.0
    loaded_s: float = 0.0
    exits: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.exits = self.model.exit_layers

    @property
    def joules(self) -> float:
        """Drawn since the host began, the work launched by now included."""
        held_s = self.host_s - self.worked_s - self.idle_s - self.loaded_s
        told_j = WORKING_W * self.worked_s + IDLE_W * self.idle_s + LOADING_W * self.loaded_s
        return self.work_j + told_j + WAITING_W * held_s

    def take_up(self, model: EarlyExitModel) -> None:
        """Run another model, or another depth of it, from now on."""
        self.model, self.exits = model, model.exit_layers
        self.hosts(80)

    def idle_until(self, time_s: float) -> None:
        """Have nothing to do."""
        self.idle_s += max(0.0, time_s - max(self.host_s, self.device_s))
        self.host_s = max(self.host_s, time_s)

    def wait(self) -> None:
        """Let the host wait until the device is done."""
        self.host_s = max(self.host_s, self.device_s)

    def load(self, num_bytes: int, link: tuple[float, float]) -> float:
        """Move weights while nothing runs; returns the seconds."""
        self.wait()
        seconds = link[0] + num_bytes / link[1]
        self.loaded_s += seconds
        self.host_s += seconds
        return seconds

    def capture(self, kind: str, layers: int = 0) -> float:
        """Capture a graph of a kind, while the device waits; returns the seconds."""
        seconds = CAPTURE_EXIT_S if kind == "tell" else CAPTURE_S
        seconds += layers * {"run": CAPTURE_LAYER_S, "fill": CAPTURE_FILLED_LAYER_S}.get(kind, 0.0)
        self.wait()
        self.host_s += seconds
        return seconds

    def measured(self, job: Job, depth: int, times: int = 12) -> tuple[float, float]:
        """Seconds and joules of a repetition of a job that runs over and over."""
        work = self.work(job, depth)
        for _ in range(3):
            work()
        begin_s = self.host_s = self.device_s = max(self.host_s, self.device_s)
        self.worked_s = self.work_j = 0.0
        for _ in range(times):
            work()
        end_s = self.host_s = self.device_s = max(self.host_s, self.device_s)
        waited_s = end_s - begin_s - self.worked_s
        joules = self.work_j + WORKING_W * self.worked_s + WAITING_W * waited_s
        return (end_s - begin_s) / times, joules / times

    def work(self, job: Job, depth: int) -> Callable[[], None]:
        """One repetition of what a job measures."""
        rows, mean, prompt = job.batch or 1, job.context_tokens or 0, job.prompt_tokens
        graphed = job.mode == "graph"
        whole = self.exits[-1]
        kind = job.quantity.replace("_energy", "")
        if prompt and kind == "iteration":
            return lambda: self.prefill(rows, prompt, depth)
        if prompt:
            return lambda: self.prompt_layers(rows, prompt, mean, depth)
        if kind in ("decode_layers", "decode"):
            return lambda: self.stack(rows, rows * mean, depth, graphed)
        if kind == "iteration":
            return lambda: self.decode(rows, rows * mean, depth, depth, graphed, asks=False)
        if kind == "exit_iteration":
            return lambda: self.decode(rows, rows * mean, depth, whole, graphed, asks=True)
        if kind == "split_iteration":
            return lambda: self.split(rows, mean, depth)
        if kind in ("head", "check"):
            return lambda: self.ask(rows)
        assert kind == "kv_fill", kind
        return lambda: self.fill(rows, whole - depth)

    def decode(
        self, rows: int, context: int, leave: int, depth: int, graphed: bool, *, asks: bool
    ) -> None:
        """An iteration of rows that leave after a layer; exits before the depth may be asked."""
        self.plan(rows)
        self.begin(rows)
        for first, last in self.segments(0, leave):
            self.layers(rows, context, last - first, graphed)
            if asks or last == depth:
                self.ask(rows)
        self.fill(rows, leave, depth)
        self.emit(rows)

    def split(self, rows: int, mean: int, leave: int) -> None:
        """A token of every row, half of which leave after a layer."""
        leaving, staying = rows // 2, rows - rows // 2
        self.plan(rows)
        self.begin(rows)
        for first, last in self.segments(0, leave):
            self.layers(rows, rows * mean, last - first, True)
            self.ask(rows)
        self.part(leaving)
        self.fill(leaving, leave)
        self.hold(staying)
        self.emit(leaving)
        self.plan(staying)
        self.go_on(staying)
        for first, last in self.segments(leave, self.exits[-1]):
            self.layers(staying, staying * mean, last - first, True)
            self.ask(staying)
        self.emit(staying)

    def prefill(self, rows: int, tokens: int, depth: int) -> None:
        """An iteration of requests that come, are told a token, and go."""
        self.plan(rows)
        self.take_in(rows)
        self.prompt_layers(rows, tokens, 0, depth)
        self.ask(rows)
        self.emit(rows)

    def prompt_layers(self, rows: int, tokens: int, cached: int, count: int) -> None:
        """Layers of prompts of as many tokens each."""
        new = rows * tokens
        self.packed_layers(rows, new, new * (cached + tokens / 2), count)

    def packed_layers(self, rows: int, new: int, pairs: float, count: int) -> None:
        """Layers of prompts, launched one operator after another."""
        self.hosts(40 + 2 * rows + 0.005 * new)
        self.launch(5e-6)
        shape = self.model.shape
        flops = new * self.layer_bytes + 4.0 * pairs * shape.heads * shape.head_dim
        seconds = max(2.5e-5, flops / FLOPS + self.layer_bytes / BYTES_PER_S)
        joules = J_PER_BYTE * self.layer_bytes + J_PER_FLOP * flops
        self.eagerly(count * LAUNCHES_PER_LAYER, count * seconds, count * joules)

    def stack(self, rows: int, context: int, depth: int, graphed: bool) -> None:
        """Layers alone, of rows that were found beforehand; nobody waits for them."""
        for first, last in self.segments(0, depth):
            self.layers(rows, context, last - first, graphed)

    def layers(self, rows: int, context: int, count: int, graphed: bool) -> None:
        """Some layers of a decode."""
        computed = next(bucket for bucket in BUCKETS if bucket >= rows) if graphed else rows
        shape = self.model.shape
        read = self.layer_bytes + 4.0 * context * shape.kv_heads * shape.head_dim
        flops = computed * self.layer_bytes
        least_s = LAUNCHES_PER_LAYER * DEVICE_LAUNCH_S
        seconds = max(least_s, read / BYTES_PER_S + 7e-6, flops / FLOPS + 7e-6)
        joules = J_PER_BYTE * read + J_PER_FLOP * flops
        if graphed:
            self.launch(count * seconds, count * joules)
        else:
            self.eagerly(count * LAUNCHES_PER_LAYER, count * seconds, count * joules)

    def ask(self, rows: int) -> None:
        """What an exit says of the rows, which the host waits for and books."""
        read = 2.0 * self.model.shape.vocab * self.model.shape.hidden
        self.launch(5e-6 + read / BYTES_PER_S, J_PER_BYTE * read + J_PER_FLOP * rows * read)
        self.wait()
        self.hosts(16 + rows)

    def fill(self, rows: int, leave: int, depth: int | None = None) -> None:
        """KV beyond the layer after which rows left; nobody waits for it."""
        read = 0.12 * self.layer_bytes
        seconds = max(
            LAUNCHES_PER_FILLED_LAYER * DEVICE_LAUNCH_S, read / BYTES_PER_S + 4e-6 + 1e-8 * rows
        )
        for first, last in self.segments(leave, depth or self.exits[-1]):
            self.launch((last - first) * seconds, (last - first) * J_PER_BYTE * read)

    def plan(self, rows: int) -> None:
        """What the host does before an iteration."""
        self.hosts(15 + 0.3 * rows)

    def take_in(self, rows: int) -> None:
        """Give new rows their places."""
        self.hosts(20 + 2 * rows)

    def part(self, leaving: int) -> None:
        """Find those who leave a batch that is split."""
        self.hosts(52 + 0.5 * leaving)

    def hold(self, staying: int) -> None:
        """Keep where those who stay stand."""
        self.hosts(20 + 0.2 * staying)
        self.launch(3e-6)

    def go_on(self, staying: int) -> None:
        """Begin where they stood."""
        self.hosts(40 + 1.2 * staying)
        self.launch(4e-6)

    def begin(self, rows: int) -> None:
        """Find the rows and embed their tokens."""
        self.hosts(45 + 1.7 * rows)
        self.launch(4e-6)

    def emit(self, rows: int) -> None:
        """Give the rows their tokens."""
        self.hosts(8 + 1.6 * rows)

    def segments(self, first: int, last: int) -> list[tuple[int, int]]:
        """Layer ranges from exit to exit."""
        ends = [layer for layer in self.exits if first < layer <= last]
        return list(zip([first, *ends], ends, strict=False))

    def hosts(self, microseconds: float) -> None:
        """Keep the host busy."""
        self.host_s += self.slowness * microseconds * 1e-6

    def launch(self, seconds: float, joules: float = 0.0) -> None:
        """Launch a graph, or anything else in one go."""
        self.host_s += self.slowness * GRAPH_LAUNCH_S
        self._run(seconds, joules)

    def eagerly(self, launches: int, seconds: float, joules: float) -> None:
        """Launch operators one by one, which take as long as each other."""
        for _ in range(launches):
            self.host_s += self.slowness * EAGER_LAUNCH_S
            self._run(seconds / launches, joules / launches)

    def _run(self, seconds: float, joules: float) -> None:
        self.device_s = max(self.device_s, self.host_s + DEVICE_LAUNCH_S) + seconds
        self.worked_s += seconds
        self.work_j += joules

    @property
    def layer_bytes(self) -> float:
        """Weight bytes of a layer."""
        return 2.0 * self.model.shape.layer_params()


def readings_of(gpu: MadeUpGpu, jobs: Sequence[Job], noise: float, seed: int = 0) -> list[Reading]:
    """Readings of jobs on it, with relative noise in all of it."""
    random = np.random.default_rng(seed)
    readings: list[Reading] = []
    for job in jobs:
        for depth in job.depths or (None,):
            seconds, joules = gpu.measured(job, depth or gpu.exits[-1])
            off = np.exp(noise * random.standard_normal(2))
            metered = job.quantity.endswith("_energy")
            readings.append(
                job.reading(
                    depth,
                    seconds=seconds if metered else float(seconds * off[0]),
                    joules=float(joules * off[1]) if metered else None,
                )
            )
    return readings
