"""Decoding with few launches: our kernels for the small steps, where they have proved themselves.

A layer's products stay torch's. Between them torch needs some twenty launches a layer, each a
microsecond of a GPU however little it does, and its attention with masks reads a row's context on
one multiprocessor. Here a layer takes four products and four to six launches, and every row reads
its own tokens, in slots or in pages, in as many shares as keep the device busy.

A 16-bit type on a CUDA GPU with Triton is needed; a self-test against the stock steps decides
before first use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from calibration.model import launches
from calibration.model.attention import DecodeAttend, ExtendAttend, PoolWriter, Span, span_mask
from calibration.model.confidence import PiecewiseLinear, confidence_of
from calibration.model.kv import Indices, KvDims, PagedPool, Pool, SlotPool, to_device
from calibration.model.launches import (
    GATE_BLOCK,
    MOST_SPLITS,
    Rotary,
    add_and_norm,
    gated,
    splits_for,
)
from helios_sim.errors import InputError, first_line

EVERY_DIVISION: Final = tuple(1 << power for power in range(MOST_SPLITS.bit_length()))
"""Shares that a row may be divided into."""

TOLERANCE: Final = 2e-2
"""Relative distance from the stock steps: 16 bits and another order of sums."""

_LENGTHS: Final = (1, 300, 517, 130)
"""Rows of a self-test."""

_SUBJECT: Final = "our kernels"

Flash = Callable[[Tensor, Tensor, Tensor, "Packed", float], Tensor]
"""Causal attention [N, heads, head_dim] of packed queries over their rows' keys and values."""


@dataclass(frozen=True)
class Packed:
    """New tokens of several rows, packed; where each row's tokens lie in keys and values.

    `row_ends` [rows + 1] limit the rows among the packed tokens, `begins` [rows + 1] say where a
    row's tokens begin, `lengths` [rows] how many it holds with the new ones; all int32. The last
    of `begins` is unused.
    """

    row_ends: Tensor
    begins: Tensor
    lengths: Tensor
    longest_new: int
    longest: int


@dataclass(frozen=True)
class Fusion:
    """Whether our kernels are used, and why; `processors` of the device share the work.

    `failed` says that they could be had and did not agree with the stock steps. `flash` attends
    from several new tokens a row; without it prompts take the stock layers, and `flash_reason`
    says why.
    """

    usable: bool
    reason: str
    processors: int = 1
    flash: Flash | None = None
    flash_reason: str = ""
    failed: bool = False


class FusedWriter(PoolWriter):
    """Writes keys and values of packed tokens, rotated where `rotary` is given, in one launch."""

    def __init__(
        self, pool: Pool, addresses: Tensor, positions: Tensor, rotary: Rotary | None
    ) -> None:
        super().__init__(pool, addresses)
        self.positions = positions
        self.rotary = rotary

    def store(self, query: Tensor | None, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """Keep keys and values [N, kv_heads x head_dim]; returns the queries, rotated."""
        return launches.store(
            query,
            key,
            value,
            self.rotary,
            self.positions,
            self.pool.keys[layer],
            self.pool.values[layer],
            self.addresses,
        )


class FusedReader(FusedWriter, ABC):
    """A writer whose tokens also attend, as the layers need it."""

    @abstractmethod
    def read(self, query: Tensor, layer: int, scaling: float) -> Tensor:
        """Attention [N, heads x head_dim] of queries of that shape over what the pool holds."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """[1, N, heads, head_dim] of queries [1, heads, N, head_dim] that are rotated already."""
        _, heads, count, head_dim = query.shape
        tokens = query[0].transpose(0, 1).reshape(count, heads * head_dim)
        return self.read(tokens, layer, scaling).view(1, count, heads, head_dim)


class FusedAttend(FusedReader):
    """One new token a row, each reading its row's own tokens in place.

    `located` finds the rows in the pool.
    """

    def __init__(
        self,
        pool: Pool,
        addresses: Tensor,
        positions: Tensor,
        located: Tensor | None,
        rotary: Rotary | None,
        processors: int,
    ) -> None:
        super().__init__(pool, addresses, positions, rotary)
        self.located = located
        self.place_tokens = pool.block_tokens if isinstance(pool, PagedPool) else pool.max_tokens
        self.splits = splits_for(positions.shape[0], pool.dims.kv_heads, processors)

    def read(self, query: Tensor, layer: int, scaling: float) -> Tensor:
        """Attention [N, heads x head_dim] of queries of that shape over what the pool holds."""
        return launches.attend(
            query,
            self.pool.keys[layer],
            self.pool.values[layer],
            self.positions,
            self.located,
            self.place_tokens,
            scaling,
            self.splits,
        )


class FusedExtend(FusedReader):
    """Several new tokens a row, packed, each reading its row's tokens up to itself.

    `gathered` [tokens] finds the rows' tokens one after another in the stores, None where they are
    read in place.
    """

    def __init__(
        self,
        pool: Pool,
        addresses: Tensor,
        positions: Tensor,
        rotary: Rotary | None,
        flash: Flash,
        packed: Packed,
        gathered: Tensor | None,
    ) -> None:
        super().__init__(pool, addresses, positions, rotary)
        self.flash = flash
        self.packed = packed
        self.gathered = gathered

    def read(self, query: Tensor, layer: int, scaling: float) -> Tensor:
        """Attention [N, heads x head_dim] of queries of that shape over what the pool holds."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if self.gathered is not None:
            keys, values = (kept.index_select(0, self.gathered) for kept in (keys, values))
        tokens = query.reshape(len(query), -1, self.pool.dims.head_dim)
        return self.flash(tokens, keys, values, self.packed, scaling).reshape(query.shape)


def extend(
    fusion: Fusion,
    pool: Pool,
    addresses: Tensor,
    positions: Tensor,
    rotary: Rotary | None,
    rows: Indices,
    starts: Indices,
    counts: Indices,
) -> FusedExtend:
    """Attention of `counts` new tokens of each row behind the `starts` it holds; host integers.

    Slots are read in place; the tokens of pages are copied together.
    """
    if fusion.flash is None:
        raise ValueError(f"Prompts cannot take our kernels: {fusion.flash_reason}.")
    lengths = starts + counts
    row_ends = np.concatenate(([0], np.cumsum(counts)))
    gathered = None
    if isinstance(pool, SlotPool):
        begins = np.append(rows * pool.max_tokens, 0)
    else:
        begins = np.concatenate(([0], np.cumsum(lengths)))
        held = np.arange(begins[-1]) - np.repeat(begins[:-1], lengths)
        gathered = to_device(pool.addresses(np.repeat(rows, lengths), held), pool.dims.device)
    whole = np.concatenate((row_ends, begins, lengths))
    # One copy to the device for all of them.
    parts = torch.split(
        to_device(whole, pool.dims.device).to(torch.int32), [len(row_ends), len(begins), len(rows)]
    )
    packed = Packed(parts[0], parts[1], parts[2], int(counts.max()), int(lengths.max()))
    return FusedExtend(pool, addresses, positions, rotary, fusion.flash, packed, gathered)


def find_flash() -> Flash | str:
    """Torch's flash attention over packed rows, or why it cannot be used."""
    try:
        found: Any = torch.ops.aten._flash_attention_forward.default
        known = {argument.name for argument in found._schema.arguments}
    except (AttributeError, RuntimeError):
        return f"torch {torch.__version__} has no _flash_attention_forward"
    if missing := sorted({"scale", "seqused_k"} - known):
        return f"_flash_attention_forward of torch {torch.__version__} knows no {missing}"

    def flash(query: Tensor, keys: Tensor, values: Tensor, packed: Packed, scale: float) -> Tensor:
        # No dropout, causal, no debug mask.
        output: Tensor = found(
            query,
            keys,
            values,
            packed.row_ends,
            packed.begins,
            packed.longest_new,
            packed.longest,
            0.0,
            True,
            False,
            scale=scale,
            seqused_k=packed.lengths,
        )[0]
        return output

    return flash


def choose(pool: Pool, num_heads: int) -> Fusion:
    """Whether to use our kernels over a pool, and why; tests them on the device first."""
    dims = pool.dims
    return _chosen(dims.device, dims.dtype, lambda: _tested(dims, num_heads, _is_paged(pool)))


def choose_telling(device: torch.device, dtype: torch.dtype) -> Fusion:
    """Whether one kernel says what logits of a type say, and why; tests it on the device first."""
    return _chosen(device, dtype, lambda: _tested_telling(device, dtype))


def _chosen(device: torch.device, dtype: torch.dtype, tested: Callable[[], Fusion]) -> Fusion:
    """What a test on the device says, or why there is none."""
    if device.type != "cuda":
        return Fusion(False, f"{_SUBJECT} need a CUDA GPU and this is {device}")
    if dtype.itemsize != 2:
        return Fusion(False, f"{_SUBJECT} are for 16-bit types and this is {dtype}")
    if not launches.can_compile():
        return Fusion(False, f"{_SUBJECT} need Triton, which is not installed")
    try:
        return tested()
    except (InputError, torch.OutOfMemoryError) as error:
        # Another time there may be room, so that this is not remembered.
        return Fusion(False, f"{_SUBJECT} found no room for the self-test: {first_line(error)}")


@lru_cache(maxsize=32)
def _tested(dims: KvDims, num_heads: int, is_paged: bool) -> Fusion:
    passed, said = _verdict(_SUBJECT, lambda: self_test(dims, num_heads, is_paged))
    if not passed:
        return Fusion(False, said, failed=True)
    processors = torch.cuda.get_device_properties(dims.device).multi_processor_count
    flash = find_flash()
    if isinstance(flash, str):
        return Fusion(True, said, processors, None, flash)
    works, flash_said = _verdict(
        "flash attention", lambda: flash_self_test(flash, dims, num_heads, is_paged)
    )
    return Fusion(True, said, processors, flash if works else None, flash_said)


@lru_cache(maxsize=8)
def _tested_telling(device: torch.device, dtype: torch.dtype) -> Fusion:
    passed, said = _verdict(_SUBJECT, lambda: telling_self_test(device, dtype))
    return Fusion(passed, said, failed=not passed)


def _verdict(subject: str, test: Callable[[], float]) -> tuple[bool, str]:
    """Whether a self-test is passed, and a clause about it; what lacks room is not judged."""
    try:
        off = test()
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as failure:  # Whatever it raises, it cannot be used.
        return False, f"{subject} failed the self-test: {first_line(failure)}"
    if not off <= TOLERANCE:
        return False, f"{subject} failed the self-test: off by {off:.3g}"
    return True, f"{subject} passed the self-test: within {off:.1e} of the stock steps"


@torch.no_grad()
def flash_self_test(flash: Flash, dims: KvDims, num_heads: int, is_paged: bool) -> float:
    """Relative distance from SDPA of prompts, of parts of prompts, and of single tokens."""
    pool, random = _filled(dims, is_paged)
    rows, starts, counts = (
        np.asarray(v) for v in ([2, 0, 1, 3], [300, 0, 36, 129], [217, 1, 64, 1])
    )
    spans, begin = [], 0
    for row, start, count in zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True):
        width = pool.context_tokens(start + count)
        found = pool.locate(np.asarray([row], dtype=np.int64), width)
        located = None if found is None else to_device(found, dims.device)
        mask = span_mask(start, count, width, num_heads // dims.kv_heads, pool)
        spans.append(Span(begin, count, False, located, width, mask))
        begin += count
    query = random(1, num_heads, begin, dims.head_dim)
    nowhere = torch.zeros(begin, dtype=torch.int64, device=dims.device)
    fusion = Fusion(True, "", flash=flash)
    ours = extend(fusion, pool, nowhere, nowhere, None, rows, starts, counts)
    scaling = dims.head_dim**-0.5
    expected = ExtendAttend(pool, nowhere, spans).attend(query, query, query, 0, scaling)
    return _distance(ours.attend(query, query, query, 0, scaling), expected)


@torch.no_grad()
def telling_self_test(device: torch.device, dtype: torch.dtype) -> float:
    """Largest distance of tokens, confidence and nats from torch's own steps."""
    generator = torch.Generator(device=device).manual_seed(0)
    knots = torch.tensor([[0.1, 0.3, 0.8], [0.2, 0.5, 0.9]], device=device)
    # Without a map, and with one.
    mapped = PiecewiseLinear((0.1, 0.3, 0.8), (0.2, 0.5, 0.9))
    errors = []
    for vocab in (256, 9001):
        logits = (4.0 * torch.randn((5, vocab), generator=generator, device=device)).to(dtype)
        targets = torch.arange(5, device=device) * 7
        raw = confidence_of(logits, "max-softmax")
        nats = logits.float().logsumexp(-1)
        for wanted, given in ((targets, targets), (logits.argmax(-1), None)):
            for sure, map_ in ((raw, None), (mapped.of_tensor(raw), knots)):
                found = launches.tell(logits, given, map_)
                right = nats - logits.float().gather(-1, wanted[:, None])[:, 0]
                best = logits.gather(-1, found[0].long()[:, None])[:, 0]
                errors += [
                    float((best - logits.amax(-1)).float().abs().max()),
                    float((found[1] - sure).abs().max()),
                    float((found[2] - right).abs().max()),
                ]
    return max(errors)


@torch.no_grad()
def self_test(
    dims: KvDims, num_heads: int, is_paged: bool, divisions: Sequence[int] = EVERY_DIVISION
) -> float:
    """Largest relative distance of any kernel from the stock steps, in every division into shares.

    Every variant is compiled by this, so that none is while a graph is captured.
    """
    pool, random = _filled(dims, is_paged)
    ends = to_device(np.asarray(_LENGTHS, dtype=np.int64) - 1, dims.device)
    head_dim, width = dims.head_dim, num_heads * dims.head_dim
    errors = []
    for rows in ([0, 1, 2, 3], [2, 0]):
        numbers = np.asarray(rows, dtype=np.int64)
        context = pool.context_tokens(max(_LENGTHS))
        found = pool.locate(numbers, context)
        located = None if found is None else to_device(found, dims.device)
        positions = ends[to_device(numbers, dims.device)]
        lasts = np.asarray([_LENGTHS[row] - 1 for row in rows], dtype=np.int64)
        addresses = to_device(pool.addresses(numbers, lasts), dims.device)
        query = random(1, num_heads, len(rows), head_dim)
        stock = DecodeAttend(pool, addresses, positions, located, context)
        expected = stock.attend(query, query, query, 0, head_dim**-0.5)
        ours = FusedAttend(pool, addresses, positions, located, None, 1)
        for splits in divisions:
            ours.splits = splits
            errors.append(_distance(ours.attend(query, query, query, 0, head_dim**-0.5), expected))
    errors.append(_stores(pool, addresses, positions, width, random))
    gate, up = random(3, 2 * GATE_BLOCK + 32).chunk(2, dim=1)
    errors.append(_distance(gated(gate, up), silu(gate) * up))
    errors.append(_sums(width, dims.device, random))
    return max(errors)


def _filled(dims: KvDims, is_paged: bool) -> tuple[Pool, Callable[..., Tensor]]:
    """A pool of rows of `_LENGTHS` with random contents, and what drew them."""
    generator = torch.Generator(device=dims.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=dims.device)
        return made.to(dims.dtype)

    pool: Pool = PagedPool(dims, 1, 160, 16) if is_paged else SlotPool(dims, 1, 4, 544)
    if isinstance(pool, PagedPool):
        pool.free.reverse()
    for length in _LENGTHS:
        pool.admit(length)
    for kept in (pool.keys[0], pool.values[0]):
        kept.copy_(random(*kept.shape))
    return pool, random


def _stores(
    pool: Pool,
    addresses: Tensor,
    positions: Tensor,
    width: int,
    random: Callable[..., Tensor],
) -> float:
    """Relative distance of what is stored and rotated from the stock rotation."""
    dims, rows = pool.dims, len(addresses)
    shape = (rows, dims.kv_heads, dims.head_dim)
    kv_width = dims.kv_heads * dims.head_dim
    rotary = random(pool.max_tokens, dims.head_dim), random(pool.max_tokens, dims.head_dim)
    query, key, value = torch.split(
        random(rows, width + 2 * kv_width), [width, kv_width, kv_width], dim=1
    )
    heads = query.reshape(rows, -1, dims.head_dim), key.reshape(shape)
    turns = (part[positions][None] for part in rotary)
    rotated = apply_rotary_pos_emb(*(part[None].transpose(1, 2) for part in heads), *turns)
    asked, kept = (part[0].transpose(0, 1) for part in rotated)
    errors = []
    for turning, queries in ((rotary, query), (rotary, None), (None, query), (None, None)):
        given = FusedWriter(pool, addresses, positions, turning).store(queries, key, value, 0)
        errors += [
            _distance(pool.keys[0][addresses], heads[1] if turning is None else kept),
            _distance(pool.values[0][addresses], value.reshape(shape)),
        ]
        if queries is not None:
            wanted = heads[0] if turning is None else asked
            errors.append(_distance(given.reshape(wanted.shape), wanted))
    return max(errors)


def _sums(width: int, device: torch.device, random: Callable[..., Tensor]) -> float:
    """Relative distance of sums and their norms from the stock steps, in place and not."""
    norm = nn.LayerNorm(width, device=device, dtype=random(1).dtype)
    for parameter in (norm.weight, norm.bias):
        parameter.copy_(random(width))
    states, product = random(3, width), random(3, width)
    total = states + product
    errors = []
    for in_place in (False, True):
        found = add_and_norm(states, product, norm, in_place)
        errors += [_distance(found[0], total), _distance(found[1], norm(total))]
        if (found[0] is states) is not in_place:
            errors.append(torch.inf)
    return max(errors)


def _is_paged(pool: Pool) -> bool:
    return isinstance(pool, PagedPool)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance; infinite for what is no number."""
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    return float(torch.nan_to_num(off, nan=torch.inf))
