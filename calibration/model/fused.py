"""Decoding with few launches: our kernels for the small steps, where they have proved themselves.

A layer's products stay torch's. Between them torch needs some twenty launches a layer, each a
microsecond of a GPU however little it does, and its attention with masks reads a row's context on
one multiprocessor. Here a layer takes four products and five or six launches, and every row reads
its own tokens, in slots or in pages, in as many shares as keep the device busy.

A 16-bit type on a CUDA GPU with Triton is needed; a self-test against the stock steps decides
before first use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from calibration.model.attention import DecodeAttend, ExtendAttend, PoolWriter, Span, span_mask
from calibration.model.kernels import attend_kernel, gate_kernel, merge_kernel, store_kernel
from calibration.model.kv import Indices, KvDims, PagedPool, Pool, SlotPool, to_device

try:
    import triton
except ImportError:
    triton = None

MOST_SPLITS: Final = 32
LEAST_SPLIT_TOKENS: Final = 128
"""Tokens of a row that one program reads at least: merging what splits found is a launch too."""

PROGRAMS_PER_PROCESSOR: Final = 2
"""Programs that keep a multiprocessor's memory busy."""

TOLERANCE: Final = 2e-2
"""Relative distance from the stock steps: 16 bits and another order of sums."""

_LENGTHS: Final = (1, 300, 517, 130)
"""Rows of a self-test."""

_GATE_BLOCK: Final = 1024
_LOG2_E: Final = 1.4426950408889634
_SUBJECT: Final = "our kernels"

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each [positions, head_dim]."""


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
        return store(
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

    `located` finds the rows in the pool, and `context_tokens` bounds what any of them holds.
    """

    def __init__(
        self,
        pool: Pool,
        addresses: Tensor,
        positions: Tensor,
        located: Tensor | None,
        context_tokens: int,
        rotary: Rotary | None,
        processors: int,
    ) -> None:
        super().__init__(pool, addresses, positions, rotary)
        self.located = located
        self.place_tokens = pool.block_tokens if isinstance(pool, PagedPool) else pool.max_tokens
        self.splits = splits_for(positions.shape[0], pool.dims.kv_heads, context_tokens, processors)

    def read(self, query: Tensor, layer: int, scaling: float) -> Tensor:
        """Attention [N, heads x head_dim] of queries of that shape over what the pool holds."""
        return attend(
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
            *(query, keys, values, packed.row_ends, packed.begins),
            *(packed.longest_new, packed.longest, 0.0, True, False),
            scale=scale,
            seqused_k=packed.lengths,
        )[0]
        return output

    return flash


def choose(pool: Pool, num_heads: int) -> Fusion:
    """Whether to use our kernels over a pool, and why; tests them on the device first."""
    dims = pool.dims
    if dims.device.type != "cuda":
        return Fusion(False, f"{_SUBJECT} need a CUDA GPU and the pool is on {dims.device}")
    if dims.dtype.itemsize != 2:
        return Fusion(False, f"{_SUBJECT} are for 16-bit types and the pool holds {dims.dtype}")
    if triton is None:
        return Fusion(False, f"{_SUBJECT} need Triton, which is not installed")
    return _tested(dims, num_heads, isinstance(pool, PagedPool))


@lru_cache(maxsize=32)
def _tested(dims: KvDims, num_heads: int, is_paged: bool) -> Fusion:
    try:
        off = self_test(dims, num_heads, is_paged)
    except Exception as failure:  # Whatever it raises, they cannot be used.
        first = (str(failure) or type(failure).__name__).splitlines()[0]
        return Fusion(False, f"{_SUBJECT} failed their self-test: {first}", failed=True)
    if not off <= TOLERANCE:
        why = f"{_SUBJECT} failed their self-test: they are off by {off:.3g}"
        return Fusion(False, why, failed=True)
    processors = torch.cuda.get_device_properties(dims.device).multi_processor_count
    reason = f"{_SUBJECT} passed their self-test: within {off:.1e} of the stock steps"
    flash, flash_reason = _tested_flash(dims, num_heads, is_paged)
    return Fusion(True, reason, processors, flash, flash_reason)


def _tested_flash(dims: KvDims, num_heads: int, is_paged: bool) -> tuple[Flash | None, str]:
    """Torch's flash attention where it agrees with SDPA here, and why."""
    found = find_flash()
    if isinstance(found, str):
        return None, found
    try:
        off = flash_self_test(found, dims, num_heads, is_paged)
    except Exception as failure:  # Whatever it raises, it cannot be used.
        first = (str(failure) or type(failure).__name__).splitlines()[0]
        return None, f"flash attention failed its self-test: {first}"
    if not off <= TOLERANCE:
        return None, f"flash attention failed its self-test: it is off by {off:.3g}"
    return found, f"flash attention passed its self-test: within {off:.1e} of SDPA"


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
        found = pool.locate(np.asarray([row]), width)
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
def self_test(dims: KvDims, num_heads: int, is_paged: bool) -> float:
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
        addresses = to_device(
            pool.addresses(numbers, np.asarray([_LENGTHS[row] - 1 for row in rows])), dims.device
        )
        query = random(1, num_heads, len(rows), head_dim)
        stock = DecodeAttend(pool, addresses, positions, located, context)
        expected = stock.attend(query, query, query, 0, head_dim**-0.5)
        ours = FusedAttend(pool, addresses, positions, located, context, None, 1)
        for splits in (1 << power for power in range(MOST_SPLITS.bit_length())):
            ours.splits = splits
            errors.append(_distance(ours.attend(query, query, query, 0, head_dim**-0.5), expected))
    errors.append(_stores(pool, addresses, positions, width, random))
    gate, up = random(3, 2 * _GATE_BLOCK + 32).chunk(2, dim=1)
    errors.append(_distance(gated(gate, up), silu(gate) * up))
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


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance; infinite for what is no number."""
    off = (found.float() - expected.float()).norm() / expected.float().norm()
    return float(torch.nan_to_num(off, nan=torch.inf))


@lru_cache(maxsize=1)
def compiled() -> dict[str, Any]:
    """The kernels by name as Triton runs them.

    What changes from batch to batch compiles none anew.
    """
    changing: list[tuple[Any, list[str], list[str]]] = [
        (store_kernel, [], ["addresses", "positions"]),
        (attend_kernel, ["places_stride", "place_tokens"], ["positions", "places"]),
        (merge_kernel, [], []),
        (gate_kernel, [], []),
    ]
    return {
        kernel.__name__: triton.jit(
            kernel, do_not_specialize=values, do_not_specialize_on_alignment=pointers
        )
        for kernel, values, pointers in changing
    }


_launched: Counter[str] = Counter()


def launched() -> int:
    """Launches of our kernels so far; torch does not see them where it counts its own."""
    return _launched.total()


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    _launched[kernel.__name__] += 1
    compiled()[kernel.__name__][grid](*arguments, **constants)


def splits_for(rows: int, kv_heads: int, context_tokens: int, processors: int) -> int:
    """Shares that each row's tokens are divided into, a power of two.

    As many as keep the multiprocessors busy, with `LEAST_SPLIT_TOKENS` in each.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // (rows * kv_heads))
    most = min(MOST_SPLITS, wanted, context_tokens // LEAST_SPLIT_TOKENS)
    return 1 << max(0, most.bit_length() - 1)


def store(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    addresses: Tensor,
) -> Tensor:
    """Put keys and values [N, kv_heads x head_dim] at `addresses` [N]; returns the queries.

    The inputs' rows may be apart. With `rotary` queries [N, heads x head_dim] and keys are rotated
    for `positions` [N]; without, the queries come back as they are. Without queries the keys do.
    """
    rows, (kv_heads, head_dim) = key.shape[0], keys.shape[1:]
    asking = key if query is None else query
    rotates = rotary is not None
    rotated = asking.new_empty(asking.shape) if rotates and query is not None else asking
    cosine, sine = rotary if rotary is not None else (asking, asking)
    _launch(
        store_kernel,
        (rows, kv_heads),
        *(asking, key, value, cosine, sine, rotated, keys, values, addresses, positions),
        *(asking.stride(0), key.stride(0), value.stride(0)),
        GROUPS=0 if query is None else query.shape[1] // (kv_heads * head_dim),
        HEAD_DIM=head_dim,
        LANES=power_of_two(head_dim),
        ROTATE=rotates,
        num_warps=1,
    )
    return rotated


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    places: Tensor | None,
    place_tokens: int,
    scaling: float,
    splits: int,
) -> Tensor:
    """One new token a row over its own tokens of the stores: [N, heads x head_dim] of such queries.

    Row r holds positions 0..positions[r]. `places` are the rows' slots [N] or blocks [N, blocks]
    of `place_tokens` tokens each; None means slots 0, 1, 2, ...
    """
    rows, (kv_heads, head_dim) = query.shape[0], keys.shape[1:]
    groups = query.shape[1] // (kv_heads * head_dim)
    output = query.new_empty(query.shape)
    parts, weights = output, output
    if splits > 1:
        shape = (rows * kv_heads * groups, splits)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        weights = torch.empty(shape, dtype=torch.float32, device=query.device)
    lanes = power_of_two(head_dim)
    _launch(
        attend_kernel,
        (rows, kv_heads, splits),
        *(query, keys, values, positions, positions if places is None else places, parts, weights),
        scaling * _LOG2_E,
        query.stride(0),
        0 if places is None else places.stride(0),
        place_tokens,
        GROUPS=groups,
        # Matrix units take 16 rows at least.
        GROUP_BLOCK=1 if groups == 1 else max(16, power_of_two(groups)),
        HEAD_DIM=head_dim,
        LANES=lanes,
        TOKENS=max(16, min(128, 8192 // lanes)),
        PLACED=places is not None and places.dim() == 1,
        PAGED=places is not None and places.dim() == 2,
        SPLIT=splits > 1,
        num_warps=4,
    )
    if splits > 1:
        _launch(
            merge_kernel,
            (rows * kv_heads * groups,),
            *(parts, weights, output),
            HEAD_DIM=head_dim,
            LANES=lanes,
            SPLITS=splits,
            num_warps=4,
        )
    return output


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up of [N, units] each, whose rows may be apart alike."""
    rows, width = gate.shape
    output = gate.new_empty((rows, width))
    _launch(
        gate_kernel,
        (rows, -(-width // _GATE_BLOCK)),
        *(gate, up, output, gate.stride(0), width),
        BLOCK=_GATE_BLOCK,
        num_warps=4,
    )
    return output


def project(hidden: Tensor, modules: Sequence[nn.Linear]) -> list[Tensor]:
    """The modules' products of [N, hidden], as one where their weights lie one behind another."""
    weight = _joined([module.weight for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    bias = _joined(biases) if biases else None
    if weight is None or (biases and bias is None):
        return [linear(hidden, module.weight, module.bias) for module in modules]
    widths = [module.out_features for module in modules]
    return list(torch.split(linear(hidden, weight, bias), widths, dim=1))


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors as one along their first dimension, without copying; None where they lie apart."""
    first = tensors[0]
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return torch.as_strided(first, shape, first.stride(), first.storage_offset())


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()
