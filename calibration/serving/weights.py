"""Candidates from their checkpoints: read once, brought in to a depth, and given a KV pool."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from calibration.model.decode import Decoder, generate, kernels_of
from calibration.model.early_exit import EarlyExitLM, load
from calibration.model.file_cache import forget, read_through
from calibration.model.graphs import CaptureError
from calibration.model.kv import (
    CONTEXT_GRANULE_TOKENS,
    KvMemory,
    PagedPool,
    Pool,
    SlotPool,
    round_up,
)
from calibration.model.loading import side_stream
from calibration.model.memory import TooLittleMemory, available_bytes
from calibration.serving.host import NoRoomBeside
from calibration.serving.machine import ModelMachine
from calibration.serving.replica import Clock
from helios_sim.cards import Room
from helios_sim.wording import counted

KvKind = Literal["slots", "pages"]

KvChoice = Literal["auto", "slots", "pages"]
"""What may be asked for: "auto" takes slots unless they hold fewer rows than may run."""

_POLL_S: Final = 0.0002
_SLOT_SHARE: Final = 0.8
"""Share of the memory that is really free which slots may take."""
_COPY_SHARE: Final = 0.25
"""Share of it that a copy of a candidate may take on a processor, where it is memory twice over."""


@dataclass(frozen=True)
class WeightSettings:
    """How candidates are held: where, in which precision, with which KV cache.

    `max_tokens` is the longest row that is to be served. `graphs` asks for CUDA graphs.
    """

    device: torch.device
    dtype: torch.dtype
    kv: KvKind
    max_tokens: int
    graphs: bool
    free_running: bool


def slot_tokens(room: Room, max_tokens: int, pool_blocks: int) -> int:
    """Tokens of a slot: the longest row's, in whole granules, since attention reads by those."""
    return round_up(
        min(max_tokens, pool_blocks * room.serving.block_tokens), CONTEXT_GRANULE_TOKENS
    )


def choose_kv(choice: KvChoice, room: Room, max_tokens: int) -> tuple[KvKind, str]:
    """The KV cache to serve with, and a sentence where slots hold fewer rows than may run.

    A slot has room for the longest row, and where memory is short the simulated blocks admit more
    of the others.
    """
    most = room.serving.max_batch + room.serving.max_held
    fewest, where = most, ""
    for name in room.candidates:
        for depth in room.profile.model(name).model.exit_layers:
            pool_blocks = room.pool_blocks(name, depth)
            if pool_blocks == 0:
                continue
            tokens = slot_tokens(room, max_tokens, pool_blocks)
            held = max(1, pool_blocks * room.serving.block_tokens // tokens)
            if held < fewest:
                fewest, where = held, f"{name} with {depth} layers"
    if fewest == most or choice == "pages":
        return ("slots" if choice == "auto" else choice), ""
    have = "has" if fewest == 1 else "have"
    slots = (
        f"{counted(fewest, 'slot')} of the longest request {have} room beside {where}, and {most} "
        "may run"
    )
    if choice == "auto":
        return "pages", f"Serving from pages: {slots}."
    return "slots", f"Warning: only {slots}, so fewer run than in a simulation; see --kv pages."


class CheckpointWeights:
    """The weights of one replica; the candidate that serves, and one on its way beside it.

    A candidate's first load reads its whole checkpoint into host memory, as `weights_start =
    "disk"` means it; what later loads copy comes from there, as it does where loads are measured.
    Its memory there, its modules and the guard's consent are got before the clock starts, so that
    a load is what the profile's links charge: reading and copying. On a processor that is short of
    memory weights come from the file, which the system holds.
    """

    def __init__(
        self, folders: Mapping[str, Path], room: Room, settings: WeightSettings, clock: Clock
    ) -> None:
        self.folders = dict(folders)
        self.room = room
        self.settings = settings
        self.clock = clock
        self.read: set[str] = set()
        self.known: dict[str, EarlyExitLM] = {}
        """Candidates met so far, with their weights loaded or not."""
        self.remembered: list[str] = []
        """Candidates whose files the system may still hold, where a load does not meet the disk."""
        self.kernels: dict[str, dict[str, str]] = {}
        """Which kernels served, by candidate and depth, as `kernels_of` says."""
        self.name: str | None = None
        self.pool: Pool | None = None
        self._rows_said: dict[str, str] = {}
        self._graphs_said: dict[str, tuple[int, float]] = {}
        self._eager_said: dict[str, str] = {}
        self._decoder: Decoder | None = None
        self._taken_up = ""
        self._arriving: str | None = None
        # On a GPU zeroing takes next to nothing, and weights need the room between two pools.
        self._memory = None if settings.device.type == "cuda" else KvMemory()

    @property
    def model(self) -> EarlyExitLM | None:
        """The candidate that serves."""
        return None if self.name is None else self.known[self.name]

    @property
    def in_memory(self) -> frozenset[str]:
        """Candidates whose weights are in host memory."""
        return frozenset(self.read)

    @property
    def copies(self) -> tuple[str, ...]:
        """Candidates of which a copy of our own is kept in host memory."""
        held = (name for name, model in self.known.items() if model.host_copy is not None)
        return tuple(sorted(held))

    @property
    def overlaps(self) -> bool:
        """Only a GPU copies beside its work; on a processor loading would take the time of it."""
        return self.settings.device.type == "cuda"

    def fits_beside(self, num_bytes: int) -> bool:
        """Whether so many bytes can come while requests run on, beside all that is held.

        What an iteration takes in passing stays free for those that run.
        """
        if not self.overlaps:
            return False
        free_bytes = available_bytes(self.settings.device)
        passing = 0 if self.name is None else self.room.profile.model(self.name).workspace_bytes
        return free_bytes is None or num_bytes + passing <= free_bytes

    @property
    def notes(self) -> dict[str, str]:
        """What there is to say of the machines taken up: rows that fit, graphs."""
        said = dict(self._rows_said)
        for key, (count, seconds) in self._graphs_so_far().items():
            said[key] += f", {count} graphs captured in {seconds:.2f} s"
        for key, reason in self._eager_so_far().items():
            said[key] += f", eagerly: {reason}"
        return said

    @property
    def loaded_bytes(self) -> int:
        """Measured bytes of the candidate that serves."""
        return 0 if self.model is None else self.model.loaded_bytes

    def prepare(self) -> None:
        """Before the clock: run every candidate once, then leave weights where they start.

        The first run of a kernel takes its time once in a process and is no part of serving.
        """
        for name in self.folders:
            model = self.whole(name)
            self._run_once(model)
            if self.settings.device.type == "cuda":
                self._warm_up(model)
            if self._memory is not None:
                self._reserve(model)
            model.unload()
        from_disk = self.room.fleet.weights_start == "disk"
        if from_disk:
            for model in self.known.values():
                model.forget_host_copy()
        self.read = set() if from_disk else set(self.folders)
        for name, folder in self.folders.items():
            files = sorted(folder.glob("*.safetensors"))
            if not from_disk:
                read_through(files)
            elif not forget(files):
                self.remembered.append(name)

    def _run_once(self, model: EarlyExitLM) -> None:
        """Decode a little over the kind of pool that serves, and ask every exit."""
        pool: Pool = SlotPool(model.kv_dims, model.depth, 2, 32)
        if self.settings.kv == "pages":
            block_tokens = self.room.serving.block_tokens
            blocks = 2 * -(-32 // block_tokens)
            pool = PagedPool(model.kv_dims, model.depth, blocks, block_tokens, max_rows=2)
        generate(Decoder(model, pool), [[0] * 8, [0] * 4], 4)
        dims = model.kv_dims
        hidden = torch.zeros((2, model.spec.shape.hidden), dtype=dims.dtype, device=dims.device)
        targets = torch.zeros(2, dtype=torch.int64, device=dims.device)
        for level in range(len(model.exit_layers)):
            logits = model.logits(hidden, level)
            for wanted in (None, targets):
                model.tell(logits, level, wanted).cpu()

    def _warm_up(self, model: EarlyExitLM) -> None:
        """Prefill and capture once what serving may, at any depth; kernels are loaded as they run.

        Shallower loads leave room for more rows, so that each has batches of its own; the layers go
        on the way.
        """
        depths = [
            depth
            for depth in reversed(model.exit_layers)
            if self.room.pool_blocks(model.name, depth)
        ]
        for depth in depths:
            model.shrink(depth)
            if depth == depths[0]:
                self._prefill_once(model)
            if self.settings.graphs:
                pool_blocks = self.room.pool_blocks(model.name, depth)
                self._warm_up_over(model, self._new_pool(model, depth, pool_blocks))

    def _prefill_once(self, model: EarlyExitLM) -> None:
        """Prefill prompts of 1, 2, 4, ... tokens: products of other sizes are other kernels."""
        serving, depth = self.room.serving, model.depth
        pool = self._new_pool(model, depth, self.room.pool_blocks(model.name, depth))
        decoder = Decoder(model, pool)
        longest = min(self.settings.max_tokens, pool.max_tokens, model.backbone.max_positions)
        # A static batch is prefilled whole.
        most = pool.capacity_tokens
        if serving.batching != "static":
            most = min(most, serving.max_prefill_tokens)
        tokens = 1
        while tokens <= most:
            each = min(tokens, longest)
            fitting = pool.capacity_tokens // round_up(each, serving.block_tokens)
            count = min(tokens // each, pool.max_rows, max(1, fitting))
            rows = [pool.admit(each) for _ in range(count)]
            hidden = decoder.extend(rows, [[0] * each] * count, [0] * count)
            model.logits(hidden, model.depth_level)
            for row in reversed(rows):
                pool.release(row)
            tokens *= 2

    def _warm_up_over(self, model: EarlyExitLM, pool: Pool) -> None:
        graphs = self._new_decoder(model, pool).graphs
        if graphs is not None:
            # What cannot be captured here cannot be when it is wanted, and `notes` say so.
            with suppress(CaptureError):
                graphs.warm_up()

    def _reserve(self, model: EarlyExitLM) -> None:
        """Let the memory of KV caches grow to what any depth of a candidate needs."""
        for depth in model.exit_layers:
            pool_blocks = self.room.pool_blocks(model.name, depth)
            if pool_blocks:
                self._new_pool(model, depth, pool_blocks)

    def whole(self, name: str) -> EarlyExitLM:
        """A candidate at full depth, outside the clock; another may be loaded beside it."""
        depth = self.room.profile.model(name).model.shape.layers
        self._load(name, depth)
        return self.known[name]

    def bring_in(self, name: str, depth: int) -> None:
        """Load a candidate's missing layers now; another candidate makes way for it first."""
        self._read_ahead(name)
        self._let_go()
        if self.name != name:
            self.drop()
        self._load(name, depth)
        self.name = name
        self._wait_for_device()

    def begin(self, name: str, depth: int) -> SideLoad:
        """Load a candidate's missing layers in a thread, on a stream of its own."""
        return SideLoad(self, name, depth)

    def load_beside(self, name: str, depth: int) -> None:
        """What the thread does: read, copy, and wait until the copy is there."""
        self._read_ahead(name)
        try:
            with side_stream(self.settings.device):
                self._load(name, depth)
        except (TooLittleMemory, torch.OutOfMemoryError) as error:
            raise NoRoomBeside(str(error)) from error
        self._arriving = name

    def take_up(self, name: str, depth: int, level: int, pool_blocks: int) -> ModelMachine:
        """The machine of what was brought in, cut to this depth, with an empty pool.

        Graphs are captured as they are wanted: all of them would take longer than the weights do.
        """
        self._let_go()
        if self._arriving == name != self.name:
            self.drop()
            self.name = name
        self._arriving = None
        assert self.model is not None and self.name == name
        if self.model.depth > depth:
            self.model.shrink(depth)
        self.pool = self._new_pool(self.model, depth, pool_blocks)
        decoder = self._new_decoder(self.model, self.pool)
        self._decoder, self._taken_up = decoder, f"{name}@{depth}"
        self.kernels[self._taken_up] = kernels_of(decoder)
        self._rows_said[self._taken_up] = f"{self.pool.max_rows} rows in {self.settings.kv}"
        self._wait_for_device()
        return ModelMachine(
            self.model,
            self.pool,
            decoder,
            depth=depth,
            free_running=self.settings.free_running,
        )

    def _new_decoder(self, model: EarlyExitLM, pool: Pool) -> Decoder:
        decoder = Decoder(model, pool)
        if self.settings.graphs:
            decoder.use_graphs(
                self.room.profile.model(model.name).batch_buckets or None,
                subsets=True,
                targeted=not self.settings.free_running,
                on_demand=True,
            )
        return decoder

    def drop(self) -> None:
        """Give the serving candidate's memory back."""
        self._let_go()
        if self.model is not None:
            self.model.unload()
        self.name = None

    def _let_go(self) -> None:
        """Keep nothing of the last machine's pool and graphs."""
        self._graphs_said = self._graphs_so_far()
        self._eager_said = self._eager_so_far()
        self._decoder = self.pool = None

    def _eager_so_far(self) -> dict[str, str]:
        """Why there are no graphs, or no more, by what was taken up; nothing on a processor."""
        found = dict(self._eager_said)
        decoder = self._decoder
        on_gpu = self.settings.device.type == "cuda"
        if on_gpu and self.settings.graphs and decoder is not None and decoder.graphs is None:
            found[self._taken_up] = decoder.graphs_off_reason
        return found

    def _graphs_so_far(self) -> dict[str, tuple[int, float]]:
        """Graphs and the seconds of capturing them, by what was taken up."""
        found = dict(self._graphs_said)
        graphs = None if self._decoder is None else self._decoder.graphs
        if graphs is not None:
            count, seconds = found.get(self._taken_up, (0, 0.0))
            found[self._taken_up] = count + graphs.num_graphs, seconds + graphs.capture_s
        return found

    def _load(self, name: str, depth: int) -> None:
        """Bring a candidate to at least a depth, from what of it is there."""
        if name in self.known:
            self.known[name].grow(max(depth, self.known[name].depth))
            return
        on_gpu = self.settings.device.type == "cuda"
        self.known[name] = load(
            self.folders[name],
            depth=depth,
            exits=self.room.profile.model(name).model.exit_layers,
            device=self.settings.device,
            dtype=self.settings.dtype,
            host_copy=on_gpu or self._has_room_for_copy(name),
            pinned=on_gpu,
            name=name,
        )

    def _has_room_for_copy(self, name: str) -> bool:
        spec = self.room.profile.model(name).model
        free_bytes = available_bytes(torch.device("cpu"))
        return (
            free_bytes is None or spec.weight_bytes(spec.shape.layers) <= _COPY_SHARE * free_bytes
        )

    def _new_pool(self, model: EarlyExitLM, depth: int, pool_blocks: int) -> Pool:
        """Room for what admission by blocks may let in, and no more than that."""
        settings, serving = self.settings, self.room.serving
        max_rows = serving.max_batch + serving.max_held
        longest = min(settings.max_tokens, pool_blocks * serving.block_tokens)
        if settings.kv == "pages":
            blocks_a_row = -(-longest // serving.block_tokens)
            # Of each row that is done a static batch keeps a token until all are.
            most = pool_blocks + (max_rows if serving.batching == "static" else 0)
            return PagedPool(
                model.kv_dims,
                depth,
                min(most, max_rows * blocks_a_row),
                serving.block_tokens,
                max_rows=max_rows,
                max_tokens=longest,
                memory=self._memory,
            )
        longest = slot_tokens(self.room, settings.max_tokens, pool_blocks)
        slots = min(max_rows, max(1, pool_blocks * serving.block_tokens // longest))
        free_bytes = available_bytes(settings.device)
        if free_bytes is not None:
            free_bytes += 0 if self._memory is None else self._memory.bytes
            slot_bytes = depth * longest * model.kv_dims.bytes_per_token_layer
            slots = max(1, min(slots, int(_SLOT_SHARE * free_bytes) // slot_bytes))
        return SlotPool(model.kv_dims, depth, slots, longest, self._memory)

    def _read_ahead(self, name: str) -> None:
        if name in self.read:
            return
        if self.known[name].host_copy is not None:
            self.known[name].read_to_host()
        else:
            read_through(sorted(self.folders[name].glob("*.safetensors")))
        self.read.add(name)

    def _wait_for_device(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize(self.settings.device)


class SideLoad:
    """A load under way in a thread of its own."""

    def __init__(self, weights: CheckpointWeights, name: str, depth: int) -> None:
        self.arrived_s = 0.0
        self._clock = weights.clock
        self._failure: BaseException | None = None
        self._done = threading.Event()

        def work() -> None:
            try:
                weights.load_beside(name, depth)
            except BaseException as error:
                self._failure = error
            finally:
                self.arrived_s = self._clock.now_s()
                self._done.set()

        self._thread = threading.Thread(target=work, name="load-weights", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether the weights have arrived; raises what went wrong on the way."""
        if self._done.is_set() and self._failure is not None:
            raise self._failure
        return self._done.is_set()

    def wait(self, until_s: float) -> None:
        """Wait until they have arrived, or until a time."""
        while not self._done.is_set() and self._clock.now_s() < until_s:
            self._done.wait(_POLL_S)
