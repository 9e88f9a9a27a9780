"""One model on the bench: its trials become readings.

Rows of the KV pool hold keys and values of real tokens before anything is timed, hidden states
are those of real tokens, and every layer of a stack has weights of its own: caches are not what
is measured, and values move a GPU's power. A decode's `context_tokens` count the new token.

What is timed follows the serving loop. A stack of layers runs as the device works through its
queue; what an exit says ends with the decision on the host, since the loop waits for it there. An
iteration is one of the loop itself, and asking exits and filling KV are its own steps
(`served.py`).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from torch import Tensor

from calibration.measuring.floors import count_launches
from calibration.measuring.grid import (
    SAMPLES,
    WARMUPS,
    Bounds,
    Job,
    Probe,
    ragged_lengths,
    timing_s,
)
from calibration.measuring.meters import Measurement, Meter, window_of
from calibration.measuring.occupancy import peak_bytes, taken_bytes
from calibration.measuring.readings import Reading
from calibration.measuring.served import ServedLoad
from calibration.measuring.timing import (
    MAX_TRIES,
    Timer,
    WallTimer,
    Work,
    quiet_share,
    synchronise,
    timed,
    timer_for,
)
from calibration.model.decode import Decoder, kernels_of, slot_pool
from calibration.model.early_exit import EarlyExitLM
from calibration.model.graphs import Recorder
from calibration.serving.machine import ModelMachine
from helios_sim.errors import InputError
from helios_sim.policy.contract import ExitMode

MAX_PREFILL_TOKENS: Final = 4096
"""Tokens of one prefill; what a server would take in chunks."""

STEADY_S: Final = 0.5
"""Work before an energy window opens: power follows load with a delay."""

_WAITING: Final = frozenset(("head", "check", "iteration", "exit_iteration", "split_iteration"))
"""Quantities whose result is awaited on the host, so that the wall clock is what counts."""


@dataclass(frozen=True)
class Load:
    """Rows of one load: their numbers, the new tokens' positions and hidden states."""

    rows: list[int]
    positions: list[int]
    hidden: Tensor


class Bench:
    """A loaded model with a filled KV pool of `max_batch` rows of `max_context` tokens.

    `tokens` are ids of a real text. Raises InputError where the pool does not fit.
    """

    def __init__(
        self,
        model: EarlyExitLM,
        tokens: Sequence[int],
        *,
        max_batch: int,
        max_context: int,
    ) -> None:
        self.model = model
        self.name = model.spec.name
        self.device = model.device
        self.depths = tuple(layer for layer in model.exit_layers if layer <= model.depth)
        self.max_batch = max_batch
        self.max_context = max_context
        self._tokens = tokens
        self.pool = slot_pool(model, max_batch, max_context)
        self.decoders = {"eager": Decoder(model, self.pool)}
        self._graph_bytes = 0
        self.timer = timer_for(self.device)
        self._wall = WallTimer(self.device)
        self._fill_pool()

    @property
    def bounds(self) -> Bounds:
        """What may be asked of it."""
        return Bounds(
            self.name,
            self.depths,
            self.max_batch,
            self.max_context,
            self.max_batch * self.max_context,
            max(self.max_context, min(MAX_PREFILL_TOKENS, self.max_batch * self.max_context)),
            self.modes,
            self.depths[-1] == self.model.exit_layers[-1],
            self._can_split,
        )

    @property
    def _can_split(self) -> bool:
        """Whether graphs, where there are any, serve some of the rows too."""
        graphed = self.decoders.get("graph")
        if graphed is None or graphed.graphs is None:
            return True
        settings = graphed.graphs.settings
        return settings.finds_rows or settings.subsets

    @property
    def modes(self) -> tuple[str, ...]:
        """How decoding can run here."""
        return tuple(self.decoders)

    @property
    def kernels(self) -> dict[str, str]:
        """Which kernels all of its decoders may take, and why, as `kernels_of` says."""
        return kernels_of(self.decoders["eager"])

    def capture_graphs(self, recorder: Recorder | None = None) -> Reading | str:
        """Capture CUDA graphs for every segment and bucket; the reason where that cannot be.

        `recorder` captures them in place of CUDA's own.
        """
        decoder = self._another()
        before = taken_bytes(self.device)
        begin_s = time.perf_counter()
        captured = decoder.use_graphs(max_context=self.max_context, recorder=recorder)
        if not captured or decoder.graphs is None:
            return decoder.graphs_off_reason
        seconds = time.perf_counter() - begin_s
        self._graph_bytes = max(0, taken_bytes(self.device) - before)
        self.decoders["graph"] = decoder
        return Reading(
            "graph_capture",
            model=self.name,
            mode="graph",
            layers=self.model.depth,
            batch=self.max_batch,
            context_tokens=self.max_context,
            seconds=seconds,
            repetitions=decoder.graphs.num_graphs,
            note=f"{decoder.graphs.num_graphs} graphs",
        )

    def captures(self, recorder: Recorder | None = None) -> Iterator[Reading]:
        """What capturing each graph takes, in the order in which growing batches want them.

        As when serving everything has been captured once before, so that kernels are loaded and
        libraries have their workspaces. Every other bucket is held out. Raises CaptureError.
        """
        decoder = self._another()
        decoder.use_graphs(max_context=self.max_context, on_demand=True, recorder=recorder)
        if decoder.graphs is None:
            return
        for place, rows in enumerate(decoder.graphs.settings.batch_buckets):
            for trial, (key, seconds) in enumerate(decoder.graphs.capture_for(rows)):
                yield Reading(
                    f"capture_{key.kind.value}",
                    model=self.name,
                    mode="graph",
                    layers=key.last - key.first or None,
                    batch=rows,
                    trial=trial,
                    purpose="held-out" if place % 2 else "fit",
                    seconds=seconds,
                    repetitions=1,
                )

    @property
    def buckets(self) -> dict[str, list[int]]:
        """Batches and contexts that graphs pad to; empty without graphs."""
        decoder = self.decoders.get("graph")
        if decoder is None or decoder.graphs is None:
            return {"batch_buckets": [], "context_buckets": []}
        settings = decoder.graphs.settings
        return {
            "batch_buckets": list(settings.batch_buckets),
            "context_buckets": list(settings.context_buckets),
        }

    def close(self) -> None:
        """Give the graphs and the pool back."""
        for decoder in self.decoders.values():
            decoder.drop_graphs()
        self.decoders.clear()
        self.pool.clear()
        self.pool.resize(0)

    def memory(self) -> Iterator[Reading]:
        """Bytes of the KV pool and of the largest work's workspace, captured graphs included."""
        spec, depth = self.model.spec, self.depths[-1]
        tokens = self.max_batch * self.max_context
        yield Reading(
            "memory_kv",
            self.name,
            layers=depth,
            batch=self.max_batch,
            context_tokens=self.max_context,
            bytes=self.pool.bytes,
            predicted_bytes=tokens * spec.kv_bytes_per_token(depth),
        )
        prompt = min(self.max_context, MAX_PREFILL_TOKENS)
        rows = max(1, min(self.max_batch, MAX_PREFILL_TOKENS // prompt))
        largest = (
            Job(
                "prefill_layers",
                self.name,
                batch=rows,
                context_tokens=0,
                prompt_tokens=prompt,
            ),
            Job(
                "iteration",
                self.name,
                batch=self.max_batch,
                context_tokens=self.max_context,
                longest_tokens=self.max_context,
            ),
        )
        for job in largest:
            work = self.work(job, depth)
            work()
            taken = peak_bytes(self.device, work)
            if taken is not None:
                # Graphs keep their memory for good, beside whatever runs.
                yield replace(
                    job.reading(depth), quantity="memory_workspace", bytes=taken + self._graph_bytes
                )

    def estimate_s(self, job: Job, probe: Probe) -> float:
        """Seconds that a latency trial is likely to take while nobody disturbs."""
        depths = job.depths or (self.depths[-1],)
        passes = [probe.pass_s(job, depth / self.depths[-1]) for depth in depths]
        return timing_s(passes, self._timer_of(job).sample_s)

    def probe(self) -> Probe:
        """A few rough looks at how long passes take."""
        depth, long = self.depths[-1], self.max_context
        short, wide = min(32, long), self.max_batch

        def seconds(quantity: str, batch: int, context: int = 0, prompt: int = 0) -> float:
            job = Job(
                quantity,
                self.name,
                "eager",
                (depth,),
                batch=batch,
                context_tokens=context or None,
                prompt_tokens=prompt or None,
            )
            return self._once(self.work(job, depth))

        one = seconds("decode_layers", 1, short)
        many = seconds("decode_layers", wide, short)
        far = seconds("decode_layers", wide, long)
        prompt = min(long, MAX_PREFILL_TOKENS)
        few = seconds("prefill_layers", 1, prompt=short)
        whole = seconds("prefill_layers", 1, prompt=prompt)
        head = seconds("head", 1)
        heads = seconds("head", wide)
        host = max(0.0, seconds("iteration", 1, short) - one - head)
        hosts = max(0.0, seconds("iteration", wide, short) - many - heads)
        short_work = self.work(Job("decode_layers", batch=1, context_tokens=short), depth)
        return Probe(
            decode_s=one,
            decode_s_per_row=_slope(one, many, wide - 1),
            decode_s_per_context_token=_slope(many, far, wide * (long - short)),
            prefill_s=few,
            prefill_s_per_token=_slope(few, whole, prompt - short),
            head_s=head,
            head_s_per_row=_slope(head, heads, wide - 1),
            samples_per_quiet_one=min(MAX_TRIES, 1.0 / quiet_share(self.timer, short_work)),
            host_s=host,
            host_s_per_row=_slope(host, hosts, wide - 1),
        )

    def time(self, job: Job, patience_s: float = math.inf) -> Iterator[Reading]:
        """Take a latency trial: its stacks in turns, one reading each.

        Once `patience_s` are over, no sample is taken again because it was disturbed.
        """
        timer = self._timer_of(job)
        works = [self.work(job, depth) for depth in job.depths or (self.depths[-1],)]
        found = timed(
            works,
            timer,
            samples=SAMPLES,
            warmups=WARMUPS,
            seed=job.trial,
            patience_s=patience_s,
        )
        # Graphs that were lost meanwhile left the time to the eager path.
        self._decoder(job)
        for depth, timing in zip(job.depths or (None,), found, strict=True):
            yield job.reading(depth).timed(timing)

    def energy(self, job: Job, meter: Meter, window_s: float) -> Reading:
        """Take an energy window: the same work over and over, joules of one repetition.

        Joules are the window's watts times the seconds of a repetition: the counter's ticks do
        not fall on repetitions.
        """
        depth = job.depths[0] if job.depths else None
        work = self.work(job, depth or self.depths[-1])
        chunk = max(1, round(0.05 / max(self._once(work), 1e-6)))
        self._repeat(work, chunk, min(STEADY_S, window_s / 4))
        with window_of(meter) as window:
            seconds, repetitions = self._repeat(work, chunk, window_s)
            found = window.close(busy_s=seconds)
        self._decoder(job)
        per_repetition_s = seconds / repetitions
        if not isinstance(found, Measurement):
            return job.reading(
                depth,
                seconds=per_repetition_s,
                repetitions=repetitions,
                meter=found.source,
                note=found.reason,
            )
        return job.reading(
            depth,
            seconds=per_repetition_s,
            repetitions=repetitions,
            joules=found.watts * per_repetition_s,
            **power_columns(found),
        )

    def work(self, job: Job, depth: int) -> Work:
        """The work of one repetition of a job at one depth.

        It holds until the work of another load is made.
        """
        is_served = job.quantity in ("iteration", "iteration_energy")
        arrive = is_served and bool(job.prompt_tokens)
        self._occupy(0 if arrive else self.max_batch)
        if is_served:
            return self._iteration(job, depth)
        if job.prompt_tokens:
            return self._prefill(job, depth)
        if job.quantity == "exit_iteration":
            return self._leaving(job, depth, ExitMode.WAIT)
        if job.quantity == "split_iteration":
            return self._leaving(job, depth, ExitMode.REBATCH)
        if job.quantity in ("head", "head_energy"):
            return self._head(job)
        if job.quantity == "check":
            return self._check(job)
        if job.quantity == "kv_fill":
            return self._kv_fill(job, depth)
        return self._decode(job, depth)

    def launches_per_layer(self, rows: int = 1, context_tokens: int = 2) -> int:
        """Operators that one decode layer launches at a load, views left out."""
        decoder = self.decoders["eager"]
        load = self._load(Job("decode_layers", batch=rows, context_tokens=context_tokens))
        first, both = (self._segments(decoder, load, [(0, last)]) for last in (1, 2))
        # What an iteration does once for all its layers is made by the first that runs, and kept.
        first()
        if self.depths[-1] == 1:
            return count_launches(first)
        return count_launches(both) - count_launches(first)

    def _decode(self, job: Job, depth: int) -> Work:
        decoder = self._decoder(job)
        return self._segments(decoder, self._load(job), self._ranges(job, depth))

    def _segments(self, decoder: Decoder, load: Load, ranges: Sequence[tuple[int, int]]) -> Work:
        # Finding rows is an iteration's, and a host that did it each time would hold layers up.
        place = decoder.place(load.rows, load.positions)

        def segments() -> Tensor:
            hidden = load.hidden
            for first, last in ranges:
                hidden = decoder.run(place, hidden, first, last)
            return hidden

        return segments

    def _prefill(self, job: Job, depth: int) -> Work:
        count, tokens, cached = job.batch or 1, job.prompt_tokens or 1, job.context_tokens or 0
        rows, starts = list(range(count)), [cached] * count
        ids = [np.asarray(self._ids(tokens, row)) for row in rows]
        decoder = self.decoders["eager"]
        return lambda: decoder.extend(rows, ids, starts, last=depth)

    def _iteration(self, job: Job, depth: int) -> Work:
        load = self._served(job, depth)
        if job.prompt_tokens:
            return load.prefilling(job.batch or 1, job.prompt_tokens)
        return load.decoding(self._lengths(job))

    def _leaving(self, job: Job, exit_layer: int, exit_mode: ExitMode) -> Work:
        load = self._served(job, self.depths[-1], exit_mode)
        return load.decoding(self._lengths(job), self.depths.index(exit_layer))

    def _head(self, job: Job) -> Work:
        load = self._served(job, self.depths[-1])
        return load.asking(self._lengths(job), len(self.depths) - 1)

    def _check(self, job: Job) -> Work:
        load = self._served(job, self.depths[-1], ExitMode.WAIT)
        return load.asking(self._lengths(job), 0)

    def _kv_fill(self, job: Job, layers: int) -> Work:
        load = self._served(job, self.depths[-1], ExitMode.WAIT)
        return load.filling(self._lengths(job), self.depths.index(self.depths[-1] - layers))

    def _served(
        self, job: Job, depth: int, exit_mode: ExitMode = ExitMode.LOADED_DEPTH
    ) -> ServedLoad:
        machine = ModelMachine(
            self.model, self.pool, self._decoder(job), depth=depth, free_running=False
        )
        return ServedLoad(machine, self.depths, self._ids, exit_mode)

    def _load(self, job: Job) -> Load:
        """Rows of a load, ready to decode one token each."""
        positions = [length - 1 for length in self._lengths(job)]
        rows, ids = list(range(len(positions))), self._ids(len(positions), job.trial)
        # A copy, since graphs leave their states where the next ones do.
        hidden = self._decoder(job).begin(rows, ids, positions).clone()
        return Load(rows, positions, hidden)

    def _lengths(self, job: Job) -> list[int]:
        """KV tokens that each row reads, its new one included."""
        context = job.context_tokens or min(32, self.max_context)
        longest = job.longest_tokens or context
        return ragged_lengths(job.batch or 1, context, longest, seed=0)

    def _ids(self, count: int, place: int) -> list[int]:
        """Token ids from somewhere in the text."""
        start = random.Random(place).randrange(max(1, len(self._tokens) - count))
        found = self._tokens[start : start + count]
        return [found[index % len(found)] for index in range(count)]

    def _timer_of(self, job: Job) -> Timer:
        return self._wall if job.quantity in _WAITING else self.timer

    def _decoder(self, job: Job) -> Decoder:
        """What runs in a job's mode; raises for a mode that there is not, or no longer."""
        found = self.decoders.get(job.mode or "eager")
        if found is None:
            raise ValueError(
                f"{self.name} was given a trial in mode {job.mode!r}; it runs in "
                f"{', '.join(self.modes)}."
            )
        if job.mode == "graph" and found.graphs is None:
            raise InputError(
                f"{self.name} has lost its CUDA graphs ({found.graphs_off_reason}), so that trials "
                "from graphs cannot be taken. Go on with --resume."
            )
        return found

    def _another(self) -> Decoder:
        """A decoder with the kernels of the first: their self-test may find no room again."""
        made, first = Decoder(self.model, self.pool), self.decoders["eager"]
        made.fusion, made.choice = first.fusion, first.choice
        return made

    def _ranges(self, job: Job, depth: int) -> list[tuple[int, int]]:
        """Layer ranges up to a depth, exit by exit as the serving loop runs, graphs or not."""
        return [(first, last) for first, last in self._decoder(job).segments() if last <= depth]

    def _occupy(self, rows: int) -> None:
        """Let so many rows of the pool be in use; slots keep the tokens they hold."""
        while self.pool.num_rows > rows:
            self.pool.release(self.pool.num_rows - 1)
        while self.pool.num_rows < rows:
            self.pool.admit(self.max_context)

    def _fill_pool(self) -> None:
        """Let every row hold keys and values of real tokens: the first row's, copied."""
        self._occupy(self.max_batch)
        chunk = MAX_PREFILL_TOKENS
        for start in range(0, self.max_context, chunk):
            count = min(chunk, self.max_context - start)
            self.decoders["eager"].extend([0], [self._ids(count, start)], [start])
        for store in (*self.pool.keys, *self.pool.values):
            slots = store[: self.pool.capacity_tokens].view(self.max_batch, self.max_context, -1)
            slots[1:] = slots[0]
        synchronise(self.device)

    def _once(self, work: Work) -> float:
        """Rough seconds of work: the quickest of a few runs after the first."""
        self._wall.sample(work, 1)
        return min(self._wall.sample(work, 1).seconds for _ in range(3))

    def _repeat(self, work: Work, chunk: int, seconds: float) -> tuple[float, int]:
        """Repeat work for some time; the seconds it took and how often it ran."""
        begin_s = time.perf_counter()
        repetitions = 0
        while time.perf_counter() - begin_s < seconds:
            for _ in range(chunk):
                work()
            synchronise(self.device)
            repetitions += chunk
        return time.perf_counter() - begin_s, repetitions


def power_columns(found: Measurement) -> dict[str, Any]:
    """Columns of a reading that a window fills."""
    return {
        "watts": found.watts,
        "meter": found.source,
        "cross_watts": found.cross_watts,
        "cross_meter": found.cross_source,
        "idle_share": found.idle_share,
        "short_window": found.short,
    }


def _slope(less: float, more: float, apart: int) -> float:
    return max(0.0, more - less) / apart if apart > 0 else 0.0
