"""The KV cache of the loaded layers: rows of tokens in slots, or in blocks of a shared pool.

Each layer has one store of keys and one of values, [tokens, kv_heads, head_dim]; a pool maps a
row's position to a token of the store. Rows in use are numbered 0 to `num_rows` - 1 without gaps:
a released row's number goes to the last row. Slots then serve the first rows as a plain view,
without copying; any other selection is gathered. A row that is only vacated leaves a gap that
another may fill.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.model.memory import require

CONTEXT_GRANULE_TOKENS: Final = 16
"""Attention reads contexts in multiples of this: masked kernels copy masks of other widths."""

SCRATCH_TOKENS: Final = 16
"""Tokens behind each store that take what padding rows write."""

Indices = NDArray[np.int64]


class PoolExhausted(RuntimeError):
    """There is no place for the tokens asked for: wait, preempt, or make the pool larger."""


@dataclass(frozen=True)
class KvDims:
    """What one token's keys and values are."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token_layer(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


def to_device(values: Indices, device: torch.device) -> Tensor:
    """Host integers on a device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class KvMemory:
    """Memory that one pool after another is cut from.

    Zeroing new memory takes longer than loading a small model's weights. What an earlier pool
    left in it are numbers, which masks hide as they hide zeros. Pools of one memory must not be
    in use at the same time.
    """

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes that it holds."""
        return 0 if self._flat is None else self._flat.nbytes

    def stores(self, count: int, shape: Sequence[int], dims: KvDims) -> list[Tensor]:
        """So many stores of a shape; the memory grows where they do not fit."""
        size = math.prod(shape)
        flat = self._flat
        if flat is None or flat.numel() < count * size or flat.dtype != dims.dtype:
            # The old memory goes first: both need not fit.
            flat = self._flat = None
            flat = self._flat = torch.zeros(count * size, dtype=dims.dtype, device=dims.device)
        return [flat[place * size : (place + 1) * size].view(*shape) for place in range(count)]


class Pool(ABC):
    """KV of the first `num_layers` layers for rows of ragged length.

    `capacity_tokens` is what all rows together can hold. Raises InputError before touching memory
    if the device has too little.
    """

    capacity_tokens: int
    max_rows: int
    max_tokens: int
    """Tokens one row may hold."""

    def __init__(self, dims: KvDims, num_layers: int, memory: KvMemory | None = None) -> None:
        self.dims = dims
        self._memory = memory
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self.generation = 0
        """Counts the times that stores were dropped: captured graphs are then void."""
        self.edition = 0
        """Counts the changes of which token belongs to which row: known addresses are then void."""
        self._add_layers(num_layers)

    @property
    def num_layers(self) -> int:
        """Layers that have stores."""
        return len(self.keys)

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        """Measured bytes of the stores, scratch included."""
        return sum(store.nbytes for store in (*self.keys, *self.values))

    def planned_bytes(self, num_layers: int) -> int:
        """Bytes of the stores of so many layers."""
        tokens = self.capacity_tokens + SCRATCH_TOKENS
        return num_layers * tokens * self.dims.bytes_per_token_layer

    @property
    def scratch_address(self) -> int:
        """Where padding rows may write: a token no row owns."""
        return self.capacity_tokens

    def admit(self, num_tokens: int = 0) -> int:
        """Begin a row with place for so many tokens; returns its number."""
        if self.num_rows >= self.max_rows:
            raise PoolExhausted(f"All {self.max_rows} rows of the pool are in use.")
        row = self.num_rows
        self.lengths.append(0)
        try:
            self.reserve(row, num_tokens)
        except PoolExhausted:
            self.lengths.pop()
            raise
        return row

    def reserve(self, row: int, num_tokens: int) -> None:
        """Make place for a row's first `num_tokens` tokens; what it holds stays."""
        self.reserve_each((row,), (num_tokens,))

    def reserve_each(self, rows: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Make place for so many tokens of each of some rows, one after the other.

        Every iteration does it for all rows, so it takes as little of the host's time as it can.
        """
        for row in (min(rows), max(rows)):
            self._known(row)
        lengths, most, take = self.lengths, self.max_tokens, self._take
        for row, tokens in zip(rows, num_tokens, strict=True):
            if tokens > lengths[row]:
                if tokens > most:
                    raise PoolExhausted(
                        f"A row was asked to hold {tokens} tokens; the pool allows {most}."
                    )
                take(row, tokens)
                self.edition += 1
                lengths[row] = tokens

    def vacate(self, row: int) -> None:
        """Give a row's tokens back; its number stays in use, for another row or until released."""
        self._known(row)
        self._give(row)
        self.edition += 1
        self.lengths[row] = 0

    def release(self, row: int) -> int | None:
        """Give a row's place back. Returns the number of the row that now bears this number.

        That is the row which was last, or None where the released row was the last.
        """
        self._known(row)
        last = self.num_rows - 1
        if row != last:
            self.swap(row, last)
        self._give(last)
        self.edition += 1
        self.lengths.pop()
        return None if row == last else last

    def clear(self) -> None:
        """Give every row's place back."""
        while self.lengths:
            self.release(self.num_rows - 1)

    @abstractmethod
    def swap(self, row: int, other: int) -> None:
        """Exchange the numbers of two rows, with all they hold."""

    @abstractmethod
    def addresses(self, rows: Indices, positions: Indices) -> Indices:
        """Tokens of the store, of reserved positions of rows; on the host."""

    @abstractmethod
    def context_tokens(self, num_tokens: int) -> int:
        """The width at which attention reads a context of so many tokens."""

    @abstractmethod
    def locate(self, rows: Indices, num_tokens: int) -> Indices | None:
        """What `gather` needs to find rows, [rows, ...] on the host; None for a plain view."""

    @abstractmethod
    def gather(
        self, layer: int, located: Tensor | None, num_rows: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, num_tokens, head_dim] of located rows.

        A view where `located` is None (the first rows of slots), else a copy. `num_tokens` is a
        width that `context_tokens` gave; what lies beyond a row's own tokens is finite and to be
        masked.
        """

    def write(self, layer: int, addresses: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values [N, kv_heads, head_dim] of a layer at token addresses [N]."""
        self.keys[layer].index_copy_(0, addresses, key)
        self.values[layer].index_copy_(0, addresses, value)

    def read(self, layer: int, rows: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, num_tokens, head_dim] of the first tokens of rows."""
        width = self.context_tokens(num_tokens)
        wanted = np.asarray(rows, dtype=np.int64)
        located = self.locate(wanted, width)
        where = None if located is None else to_device(located, self.dims.device)
        key, value = self.gather(layer, where, len(rows), width)
        return key[:, :, :num_tokens], value[:, :, :num_tokens]

    def resize(self, num_layers: int) -> None:
        """Hold the first `num_layers` layers; memory of the others is given back at once.

        Rows stay. Layers that come new hold nothing of them: fill them or feed the tokens again.
        """
        if num_layers < self.num_layers:
            self.generation += 1
            del self.keys[num_layers:], self.values[num_layers:]
            if self.dims.device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            self._add_layers(num_layers - self.num_layers)

    def check(self) -> None:
        """Assert that the pool's books are right: free + used = pool, no token of two rows.

        Raises RuntimeError with what is wrong.
        """
        if len(self.lengths) > self.max_rows:
            raise RuntimeError(f"{len(self.lengths)} rows are in use of {self.max_rows}.")
        owned: list[Indices] = []
        for row, length in enumerate(self.lengths):
            if not 0 <= length <= self.max_tokens:
                raise RuntimeError(f"Row {row} holds {length} of {self.max_tokens} tokens.")
            positions = np.arange(length, dtype=np.int64)
            owned.append(self.addresses(np.full(length, row, dtype=np.int64), positions))
        if owned:
            every = np.concatenate(owned)
            if every.size and (every.min() < 0 or every.max() >= self.capacity_tokens):
                raise RuntimeError("A row owns a token outside the pool.")
            if np.unique(every).size != every.size:
                raise RuntimeError("Two rows own the same token of the pool.")
        for stores in (self.keys, self.values):
            if any(s.shape[0] != self.capacity_tokens + SCRATCH_TOKENS for s in stores):
                raise RuntimeError("A store's size differs from the pool's.")

    def _add_layers(self, num_layers: int) -> None:
        dims = self.dims
        # Layers that come later are not cut from what the first of them lie in.
        memory = None if self.keys else self._memory
        held = 0 if memory is None else memory.bytes
        require(
            dims.device,
            max(0, self.planned_bytes(num_layers) - held),
            f"A KV pool of {self.capacity_tokens:,} tokens in {num_layers} layers",
            "use fewer rows or shorter ones, or fewer layers",
        )
        shape = (self.capacity_tokens + SCRATCH_TOKENS, dims.kv_heads, dims.head_dim)
        if memory is not None:
            stores = memory.stores(2 * num_layers, shape, dims)
            self.keys, self.values = stores[:num_layers], stores[num_layers:]
            return
        # Zeros, since attention multiplies what is masked by 0, and 0 times an old NaN is NaN.
        for _ in range(num_layers):
            self.keys.append(torch.zeros(shape, dtype=dims.dtype, device=dims.device))
            self.values.append(torch.zeros(shape, dtype=dims.dtype, device=dims.device))

    def _known(self, row: int) -> None:
        if not 0 <= row < self.num_rows:
            raise ValueError(f"Row {row} is not in use; rows 0 to {self.num_rows - 1} are.")

    @abstractmethod
    def _take(self, row: int, num_tokens: int) -> None:
        """Find place for more tokens of a row, or raise PoolExhausted."""

    @abstractmethod
    def _give(self, row: int) -> None:
        """Give a row's place back."""


class SlotPool(Pool):
    """A slot of `max_tokens` tokens for each row: simple, and attention reads it in place."""

    def __init__(
        self,
        dims: KvDims,
        num_layers: int,
        num_slots: int,
        max_tokens: int,
        memory: KvMemory | None = None,
    ) -> None:
        self.max_rows = num_slots
        self.max_tokens = max_tokens
        self.capacity_tokens = num_slots * max_tokens
        super().__init__(dims, num_layers, memory)

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows; the tokens of both are copied in every layer."""
        self._known(row)
        self._known(other)
        if row == other:
            return
        self.edition += 1
        here, there = self.lengths[row], self.lengths[other]
        longest = max(here, there)
        for store in (*self.keys, *self.values):
            slots = self._slots(store)
            if here:
                kept = slots[row, :longest].clone()
                slots[row, :longest] = slots[other, :longest]
                slots[other, :longest] = kept
            else:
                slots[row, :there] = slots[other, :there]
        self.lengths[row], self.lengths[other] = there, here

    def release(self, row: int) -> int | None:
        """Give a row's place back; the last row's tokens are copied into it."""
        self._known(row)
        # Nothing of the row is needed any more, so that its tokens need not be copied out.
        self.lengths[row] = 0
        return super().release(row)

    def addresses(self, rows: Indices, positions: Indices) -> Indices:
        """Slot after slot."""
        return rows * self.max_tokens + positions

    def context_tokens(self, num_tokens: int) -> int:
        """Rounded up to the granule, within the slot."""
        return min(self.max_tokens, round_up(num_tokens, CONTEXT_GRANULE_TOKENS))

    def locate(self, rows: Indices, num_tokens: int) -> Indices | None:
        """None for rows 0, 1, 2, ...; else the rows themselves."""
        return None if np.array_equal(rows, np.arange(len(rows))) else rows

    def gather(
        self, layer: int, located: Tensor | None, num_rows: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """The first slots as they lie, or a selection of slots copied together."""
        found = []
        for store in (self.keys[layer], self.values[layer]):
            slots = self._slots(store)[:, :num_tokens]
            rows = slots[:num_rows] if located is None else slots.index_select(0, located)
            found.append(rows.transpose(1, 2))
        return found[0], found[1]

    def _take(self, row: int, num_tokens: int) -> None:
        """Nothing: a slot holds all that its row may."""

    def _give(self, row: int) -> None:
        """Nothing: the slot is free once no row bears its number."""

    def _slots(self, store: Tensor) -> Tensor:
        return store[: self.capacity_tokens].view(self.max_rows, self.max_tokens, *store.shape[1:])


class PagedPool(Pool):
    """Blocks of `block_tokens` tokens handed out to rows as they grow."""

    def __init__(
        self,
        dims: KvDims,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        *,
        max_rows: int = 512,
        max_tokens: int | None = None,
        memory: KvMemory | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.max_rows = max_rows
        self.capacity_tokens = num_blocks * block_tokens
        self.max_tokens = min(max_tokens or self.capacity_tokens, self.capacity_tokens)
        self.table = np.zeros((max_rows, -(-self.max_tokens // block_tokens)), dtype=np.int64)
        """Block of each row's stretch of tokens; 0 beyond what the row holds."""
        self.held = [0] * max_rows
        """Blocks each row holds."""
        self.free = list(range(num_blocks - 1, -1, -1))
        """Blocks nobody holds; the last one goes out first."""
        super().__init__(dims, num_layers, memory)

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows' entries in the table; no token is copied."""
        self._known(row)
        self._known(other)
        self.edition += 1
        for books in (self.lengths, self.held):
            books[row], books[other] = books[other], books[row]
        self.table[[row, other]] = self.table[[other, row]]

    def addresses(self, rows: Indices, positions: Indices) -> Indices:
        """Each position's block and place in it."""
        blocks = self.table[rows, positions // self.block_tokens]
        found: Indices = blocks * self.block_tokens + positions % self.block_tokens
        return found

    def context_tokens(self, num_tokens: int) -> int:
        """Whole blocks."""
        return round_up(num_tokens, self.block_tokens)

    def locate(self, rows: Indices, num_tokens: int) -> Indices:
        """The rows' blocks, [rows, blocks]."""
        return self.table[rows, : num_tokens // self.block_tokens]

    def gather(
        self, layer: int, located: Tensor | None, num_rows: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """The rows' blocks copied one after another."""
        if located is None:
            raise ValueError("Rows of a paged pool are found by their blocks.")
        found = []
        for pages in self.pages(layer):
            shape = (num_rows, num_tokens, *pages.shape[2:])
            found.append(pages.index_select(0, located.reshape(-1)).view(shape).transpose(1, 2))
        return found[0], found[1]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values as [blocks, block_tokens, kv_heads, head_dim]."""
        shape = (self.num_blocks, self.block_tokens, self.dims.kv_heads, self.dims.head_dim)
        key, value = self.keys[layer], self.values[layer]
        return (
            key[: self.capacity_tokens].view(shape),
            value[: self.capacity_tokens].view(shape),
        )

    def check(self) -> None:
        """As of every pool; and free + held = all blocks, none of them twice."""
        super().check()
        in_use = [self.table[row, : self.held[row]] for row in range(self.num_rows)]
        blocks = [*self.free, *(int(block) for held in in_use for block in held)]
        if sorted(blocks) != list(range(self.num_blocks)):
            raise RuntimeError(
                f"{len(self.free)} free and {len(blocks) - len(self.free)} held blocks are not "
                f"the pool's {self.num_blocks}, each once."
            )
        for row, length in enumerate(self.lengths):
            if self.held[row] != -(-length // self.block_tokens):
                raise RuntimeError(f"Row {row} holds {self.held[row]} blocks, {length} tokens.")

    def _take(self, row: int, num_tokens: int) -> None:
        wanted = -(-num_tokens // self.block_tokens) - self.held[row]
        if wanted > len(self.free):
            raise PoolExhausted(
                f"A row needs {wanted} more blocks and {len(self.free)} of {self.num_blocks} "
                "are free."
            )
        for _ in range(wanted):
            self.table[row, self.held[row]] = self.free.pop()
            self.held[row] += 1

    def _give(self, row: int) -> None:
        held = self.held[row]
        self.free.extend(int(block) for block in self.table[row, :held][::-1])
        self.table[row] = 0
        self.held[row] = 0


def round_up(count: int, granule: int) -> int:
    """The next multiple of `granule`."""
    return -(-count // granule) * granule
