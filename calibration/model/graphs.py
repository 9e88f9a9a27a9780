"""CUDA graphs of decoding: captured once per bucket, replayed without launching kernels.

One graph for each (segment between exits, batch bucket, context bucket), and one a batch bucket for
embedding, for each exit's word, and for filling each skipped segment's KV. All lie in one memory
pool: every one before anything is served, the largest first, or each when it is first wanted.
Graphs read their inputs from buffers that all of them share, and leave the states of rows in one;
rows that pad a bucket write to the pool's scratch tokens. Whether a token leaves at an exit is
decided on the host between two replays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from calibration.model.attention import Attend
from calibration.model.kv import Indices, PagedPool, Pool
from helios_sim.errors import first_line
from helios_sim.garbage import uncollected

if TYPE_CHECKING:
    from calibration.model.decode import Place
    from calibration.model.early_exit import EarlyExitLM

SMALLEST_CONTEXT_TOKENS: Final = 256
WARM_UPS: Final = 2
"""Runs before capturing, so that libraries have made their workspaces."""

CAPTURING: Final = threading.Lock()
"""Held while a graph is captured, and by what no thread may do then: CUDA lets none wait for a
device of which a stream is being captured, nor give its memory back."""


DecodeAttends = Callable[[Tensor, Tensor, Tensor | None, int], Attend]
"""Makes the attention of one token a row: addresses, positions, located rows, context tokens."""

DecodeWriters = Callable[[Tensor, Tensor], Attend]
"""Makes what writes one token a row: addresses, positions."""


class CaptureError(RuntimeError):
    """A graph could not be captured."""


class Recording(Protocol):
    """A captured computation."""

    def replay(self) -> Tensor:
        """Compute anew from what the inputs hold now; the output is overwritten every time."""
        ...


class Recorder(Protocol):
    """Captures computations."""

    def record(self, body: Callable[[], Tensor], warm_ups: int) -> Recording:
        """Capture `body`, whose inputs stay where they are, after so many runs of it.

        Raises CaptureError.
        """
        ...


@dataclass(frozen=True)
class CudaRecording:
    """A CUDA graph and its output."""

    graph: Any
    output: Tensor

    def replay(self) -> Tensor:
        """Launch the graph on the current stream."""
        self.graph.replay()
        return self.output


@lru_cache(maxsize=8)
def capture_stream(device_index: int) -> Any:
    """The stream of a GPU on which everything is captured.

    One for all: libraries keep tens of megabytes of workspace for every stream they have met.
    """
    new_stream: Any = torch.cuda.Stream
    return new_stream(device_index)


@lru_cache(maxsize=8)
def warm_loads(device_index: int | None) -> set[object]:
    """What has run on a GPU's capturing stream: its kernels are loaded, its workspaces made."""
    return set()


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], Tensor], warm_ups: int) -> Recording:
        """Warm up on the capturing stream, then capture.

        `torch.cuda.graph` would wait for the device and give all cached memory back before each
        of hundreds of captures. Weights may arrive in another thread meanwhile, which is why
        only this thread must keep to what may be captured; what that thread may not do either
        waits for `CAPTURING`.
        """
        serving = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device):
                stream = capture_stream(torch.cuda.current_device())
                stream.wait_stream(serving)
                try:
                    output = self._captured(graph, stream, body, warm_ups)
                finally:
                    serving.wait_stream(stream)
        except RuntimeError as error:
            end_allocating(self.device, self.pool)
            raise CaptureError(first_cause(error)) from error
        return CudaRecording(graph, output)

    def _captured(
        self, graph: Any, stream: Any, body: Callable[[], Tensor], warm_ups: int
    ) -> Tensor:
        """The output of `body` as it is captured on the stream."""
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                body()
            with CAPTURING:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    return body()
                finally:
                    graph.capture_end()


def end_allocating(device: torch.device, pool: Any) -> None:
    """Let no more memory be taken from a pool whose capture has failed.

    Before torch 2.12 ending such a capture raises before it does this, and giving cached memory
    back then fails for as long as the process lives.
    """
    end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    # Where the capture has done it itself there is nothing to end.
    with suppress(RuntimeError):
        end(index, pool)


def first_cause(error: BaseException) -> str:
    """The first line of what went wrong first.

    Ending a capture that has failed is an error of its own, which hides why it has.
    """
    while error.__context__ is not None:
        error = error.__context__
    return first_line(error)


def cuda_recorder(device: torch.device) -> CudaRecorder | str:
    """A recorder for a device, or why there is none."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA GPU and the pool is on {device}"
    return CudaRecorder(device)


def buckets_up_to(largest: int, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """Batch buckets, ascending, up to `largest`: those asked, or 1, 2, 4, 8, 16, 24, 32, 48, ...

    The last one is `largest` itself.
    """
    if asked is None:
        asked, bucket = [1, 2, 4], 8
        while bucket < largest:
            asked += [bucket] if bucket == 8 else [bucket, bucket + bucket // 2]
            bucket *= 2
    return tuple(sorted({bucket for bucket in asked if 1 <= bucket < largest} | {largest}))


def context_buckets(longest: int) -> tuple[int, ...]:
    """Context buckets in tokens, ascending: doubling from 256 up to `longest`."""
    found, bucket = [], SMALLEST_CONTEXT_TOKENS
    while bucket < longest:
        found.append(bucket)
        bucket *= 2
    return (*found, longest)


def bucket_of(count: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds `count`, or None if none does."""
    return next((bucket for bucket in buckets if bucket >= count), None)


class Kind(Enum):
    """What a graph does with one token a row."""

    EMBED = "embed"
    RUN = "run"
    TELL = "tell"
    FILL = "fill"


@dataclass(frozen=True)
class GraphSettings:
    """Which graphs to capture; buckets ascending, segments as half-open layer ranges.

    `exits` are the layers at which an exit is asked, of given targets if `targeted`. `subsets` also
    captures segments for rows that are not the pool's first ones; where `finds_rows`, every graph
    is for any rows. `on_demand` captures each graph when it is first wanted, instead of all
    beforehand.
    """

    segments: tuple[tuple[int, int], ...]
    batch_buckets: tuple[int, ...]
    context_buckets: tuple[int, ...]
    exits: tuple[int, ...] = ()
    targeted: bool = True
    subsets: bool = False
    finds_rows: bool = False
    on_demand: bool = False


@dataclass(frozen=True)
class GraphKey:
    """One graph: layers `first` to `last` for so many rows.

    Of segments alone, `gathers` says that rows are found one by one, not as the first ones. An
    exit's word has its layer as both, embedding neither.
    """

    first: int
    last: int
    rows: int
    context_tokens: int = 0
    gathers: bool = False
    kind: Kind = Kind.RUN


class DecodeGraphs:
    """The captured decoding of one model over one pool.

    `capture_s`, `num_graphs`, `num_exits`, `ran_layers` and `filled_layers` say what capturing has
    taken so far: exits' words among the graphs, layers in every graph that runs or fills them. The
    graphs hold for as long as no layer and no store they read is dropped. States [rows, hidden]
    that a replay answers with lie where the next one reads and writes them: who wants to keep them
    copies them.
    """

    def __init__(
        self,
        model: EarlyExitLM,
        pool: Pool,
        decode_attend: DecodeAttends,
        decode_writer: DecodeWriters,
        settings: GraphSettings,
        recorder: Recorder,
    ) -> None:
        self.model = model
        self.pool = pool
        self.decode_attend = decode_attend
        self.decode_writer = decode_writer
        self.settings = settings
        self.captured_of = (model.generation, pool.generation)
        device = pool.dims.device
        rows = settings.batch_buckets[-1]
        self.blocks = 0
        if isinstance(pool, PagedPool):
            self.blocks = settings.context_buckets[-1] // pool.block_tokens
        hidden = int(model.backbone.config.hidden_size)
        self.hidden = torch.zeros((rows, hidden), dtype=pool.dims.dtype, device=device)
        self.filled = torch.zeros_like(self.hidden)
        """The states that skipped layers are filled from, which need not be those of all rows."""
        # Positions, addresses, targets, tokens, and rows (or their blocks): one copy an iteration.
        self.host = np.zeros(rows * (4 + max(1, self.blocks)), dtype=np.int64)
        self.host[rows : 2 * rows] = pool.scratch_address
        self.integers = torch.from_numpy(self.host.copy()).to(device)
        self.laid_out: Place | None = None
        # Layers' recordings for the place laid out: finding one takes a host as long as replaying.
        self._segments: dict[tuple[int, int], Recording] = {}
        self.recordings: dict[GraphKey, Recording] = {}
        self.capture_s = 0.0
        self.num_exits = self.ran_layers = self.filled_layers = 0
        self._finds_rows = settings.finds_rows or self.blocks > 0
        self._recorder = recorder
        self._keys = dict.fromkeys(self._all_keys())
        if settings.on_demand:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for key in self._keys:
            self._capture(key)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @property
    def num_graphs(self) -> int:
        """Graphs captured."""
        return len(self.recordings)

    @property
    def is_valid(self) -> bool:
        """Whether everything the graphs read is still there."""
        return self.captured_of == (self.model.generation, self.pool.generation)

    def warm_up(self) -> None:
        """Capture a graph of each load that nothing in this process has run; then no more warms up.

        Kernels are loaded and libraries make their workspaces. Raises CaptureError.
        """
        for key in self._keys:
            if self._load_of(key) not in warm_loads(self.hidden.device.index):
                self._capture(key)

    def capture_for(self, rows: int) -> Iterator[tuple[GraphKey, float]]:
        """Capture the graphs of a bucket of rows, one after another, with the seconds of each.

        Raises CaptureError.
        """
        for key in self._keys:
            if key.rows == rows and key not in self.recordings:
                before_s = self.capture_s
                self._capture(key)
                yield key, self.capture_s - before_s

    def key_of(self, place: Place, first: int, last: int, kind: Kind = Kind.RUN) -> GraphKey | None:
        """The graph that serves a place, or None."""
        rows = bucket_of(len(place.rows), self.settings.batch_buckets)
        # What all graphs read has room for the blocks of the longest context alone.
        context = bucket_of(place.context_tokens, self.settings.context_buckets)
        if not (place.is_decode and place.by_graphs) or rows is None or context is None:
            return None
        if kind is Kind.RUN:
            gathers = self._finds_rows or place.located_host is not None
            key = GraphKey(first, last, rows, context, gathers)
        else:
            key = GraphKey(first, last, rows, kind=kind)
        return key if key in self._keys else None

    def embed(self, place: Place, ids: Sequence[int] | Indices) -> Tensor | None:
        """States [rows, hidden] before the first layer, or None where no graph serves.

        Like all that follow it raises CaptureError where a graph is to be captured now and cannot
        be.
        """
        key = self.key_of(place, 0, 0, Kind.EMBED)
        if key is None:
            return None
        self._lay_out(place, ids)
        self._replay(key)
        return self.hidden[: len(place.rows)]

    def run(self, place: Place, hidden: Tensor, first: int, last: int) -> Tensor | None:
        """Replay a segment: states [rows, hidden] in and out, or None where no graph serves."""
        recording = None
        if self.laid_out is place and place.by_graphs:
            recording = self._segments.get((first, last))
        if recording is None:
            key = self.key_of(place, first, last)
            if key is None:
                return None
            self._find(place)
            if key not in self.recordings:
                # Warming up writes the rows' keys and values, as the replay then does again, and
                # takes states through the layers that may be the ones given.
                hidden = hidden.clone()
                self._capture(key)
            recording = self._segments[first, last] = self.recordings[key]
        self._put(hidden)
        recording.replay()
        return self.hidden[: len(place.rows)]

    def tell(self, place: Place, hidden: Tensor, exit_layer: int) -> Tensor | None:
        """What an exit says of states, [3, rows and those that pad them]; overwritten next time."""
        if self.settings.targeted != (place.targets_host is not None):
            return None
        key = self.key_of(place, exit_layer, exit_layer, Kind.TELL)
        if key is None:
            return None
        self._find(place)
        self._put(hidden)
        return self._replay(key)

    def fill(self, place: Place, hidden: Tensor, piece: tuple[int, int]) -> bool:
        """Fill a skipped segment's KV from states [rows, hidden]; False where no graph serves."""
        key = self.key_of(place, *piece, Kind.FILL)
        if key is None:
            return False
        self._find(place)
        self.filled[: len(place.rows)].copy_(hidden)
        self._replay(key)
        return True

    def _put(self, hidden: Tensor) -> None:
        """Let the graphs read these states, which they may have left there themselves."""
        if hidden.data_ptr() != self.hidden.data_ptr():
            self.hidden[: len(hidden)].copy_(hidden)

    def _replay(self, key: GraphKey) -> Tensor:
        if key not in self.recordings:
            self._capture(key)
        return self.recordings[key].replay()

    def _capture(self, key: GraphKey) -> None:
        """Capture a graph, warmed up where none like it ever was; layers are alike."""
        began_s = time.perf_counter()
        warm, load = warm_loads(self.hidden.device.index), self._load_of(key)
        # What is collected in a capture is freed without the capture knowing.
        with uncollected():
            body = self._body(key)
            self.recordings[key] = self._recorder.record(body, 0 if load in warm else WARM_UPS)
        warm.add(load)
        self.num_exits += key.kind is Kind.TELL
        self.ran_layers += key.last - key.first if key.kind is Kind.RUN else 0
        self.filled_layers += key.last - key.first if key.kind is Kind.FILL else 0
        self.capture_s += time.perf_counter() - began_s

    def _load_of(self, key: GraphKey) -> object:
        """What a graph has in common with those that run the same kernels."""
        alike = replace(key, first=0, last=0)
        return self.model.name, self.hidden.shape[1], self.hidden.dtype, self.blocks, alike

    def _all_keys(self) -> list[GraphKey]:
        """Largest first: later graphs then find their memory in the pool."""
        settings = self.settings
        keys = []
        for context, rows, (first, last) in product(
            reversed(settings.context_buckets),
            reversed(settings.batch_buckets),
            settings.segments,
        ):
            if self._finds_rows:
                keys.append(GraphKey(first, last, rows, context, True))
                continue
            keys.append(GraphKey(first, last, rows, context, False))
            if settings.subsets:
                keys.append(GraphKey(first, last, rows, context, True))
        for rows in reversed(settings.batch_buckets):
            keys += [GraphKey(exit_, exit_, rows, kind=Kind.TELL) for exit_ in settings.exits]
            # The first segment is never skipped.
            keys += [GraphKey(*skipped, rows, kind=Kind.FILL) for skipped in settings.segments[1:]]
            keys.append(GraphKey(0, 0, rows, kind=Kind.EMBED))
        return keys

    def _body(self, key: GraphKey) -> Callable[[], Tensor]:
        positions, addresses, targets, tokens = (
            part[: key.rows] for part in self._parts(self.integers)[:4]
        )
        hidden, filled = self.hidden[: key.rows], self.filled[: key.rows]
        model, backbone = self.model, self.model.backbone
        asked = targets if self.settings.targeted else None

        def embed() -> Tensor:
            return hidden.copy_(backbone.embed(tokens, positions))

        def run() -> Tensor:
            attend = self._attend(key, addresses, positions)
            return hidden.copy_(backbone.run(hidden, key.first, key.last, attend, positions))

        def tell() -> Tensor:
            level = model.exit_layers.index(key.first)
            return model.tell(model.logits(hidden, level), level, asked)

        def fill() -> Tensor:
            writer = self.decode_writer(addresses, positions)
            backbone.fill(filled, positions, key.first, key.last, writer)
            return filled

        work = {Kind.EMBED: embed, Kind.RUN: run, Kind.TELL: tell, Kind.FILL: fill}[key.kind]

        def body() -> Tensor:
            with torch.no_grad():
                return work()

        return body

    def _attend(self, key: GraphKey, addresses: Tensor, positions: Tensor) -> Attend:
        pool, rest = self.pool, self._parts(self.integers)[4]
        located: Tensor | None = None
        if isinstance(pool, PagedPool):
            blocks = key.context_tokens // pool.block_tokens
            located = rest.view(-1, self.blocks)[: key.rows, :blocks]
        elif key.gathers:
            located = rest[: key.rows]
        return self.decode_attend(addresses, positions, located, key.context_tokens)

    def _find(self, place: Place) -> None:
        """Let the graphs know where a place's rows are."""
        if self.laid_out is not place:
            self._lay_out(place)

    def _lay_out(self, place: Place, ids: Sequence[int] | Indices = ()) -> None:
        """Copy a place's integers, and its tokens if they are given, to what all graphs read."""
        count = len(place.rows)
        host = self.host.copy()
        positions, addresses, targets, tokens, rest = self._parts(host)
        positions[:count] = place.positions_host
        addresses[:count] = place.addresses_host
        tokens[: len(ids)] = ids
        if place.targets_host is not None:
            targets[:count] = place.targets_host
        located = place.located_host
        if located is not None and self.blocks:
            rest.reshape(-1, self.blocks)[:count, : located.shape[1]] = located
        elif self._finds_rows or located is not None:
            rest[:count] = place.rows
        values = torch.from_numpy(host)
        if self.integers.is_cuda:
            values = values.pin_memory()
        self.integers.copy_(values, non_blocking=True)
        self.laid_out = place
        self._segments.clear()

    def _parts(self, integers: Any) -> list[Any]:
        """Positions, addresses, targets and tokens of all rows, and what finds the rows."""
        most = self.settings.batch_buckets[-1]
        return [integers[n * most : (n + 1) * most] for n in range(4)] + [integers[4 * most :]]
