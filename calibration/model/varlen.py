"""Torch's native paged attention, used only where it exists and has proved itself.

`torch.nn.attention.varlen.varlen_attn` reads the blocks of a paged pool in place. It needs a
CUDA GPU, a 16-bit type, block sizes in multiples of 256 and a torch that knows `block_table`;
split-KV once gave wrong numbers in silence (pytorch issue 194167), so splitting is switched off
and a self-test against SDPA decides before first use.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from calibration.model.attention import DecodeAttend, ExtendAttend, PoolWriter, Span, span_mask
from calibration.model.kv import Indices, KvDims, PagedPool, to_device

BLOCK_GRANULE_TOKENS: Final = 256
NEEDED: Final = frozenset({"scale", "window_size", "enable_gqa", "seqused_k", "block_table"})
TOLERANCE: Final = 2e-2

Varlen = Callable[..., Tensor]


@dataclass(frozen=True)
class Choice:
    """The attention over a paged pool: torch's own where `varlen` is there, else SDPA.

    `reason` is a clause that says why.
    """

    varlen: Varlen | None
    reason: str


class VarlenAttend(PoolWriter):
    """Packed tokens of rows attend to their blocks in place.

    `row_ends` [rows + 1] are the rows' limits in the packed tokens, `lengths` [rows] the tokens
    each row holds with the new ones, `blocks` [rows, blocks] where they are, all int32.
    """

    def __init__(
        self,
        varlen: Varlen,
        pool: PagedPool,
        addresses: Tensor,
        row_ends: Tensor,
        lengths: Tensor,
        blocks: Tensor,
        longest_new: int,
    ) -> None:
        super().__init__(pool, addresses)
        self.paged = pool
        self.varlen = varlen
        self.row_ends = row_ends
        self.lengths = lengths
        self.blocks = blocks.contiguous()
        self.longest_new = longest_new

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """[1, N, heads, head_dim] of queries [1, heads, N, head_dim]."""
        pages = self.paged.pages(layer)
        tokens = query[0].transpose(0, 1).contiguous()
        output = self.varlen(
            tokens,
            *pages,
            self.row_ends,
            None,
            self.longest_new,
            self.blocks.shape[1] * self.paged.block_tokens,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=tokens.shape[1] != pages[0].shape[2],
            seqused_k=self.lengths,
            block_table=self.blocks,
            num_splits=1,
        )
        return output[None]


def decode_attend(
    varlen: Varlen, pool: PagedPool, addresses: Tensor, positions: Tensor, located: Tensor
) -> VarlenAttend:
    """One new token a row."""
    ends = torch.arange(positions.shape[0] + 1, dtype=torch.int32, device=positions.device)
    lengths = (positions + 1).to(torch.int32)
    return VarlenAttend(varlen, pool, addresses, ends, lengths, located.to(torch.int32), 1)


def extend_attend(
    varlen: Varlen,
    pool: PagedPool,
    addresses: Tensor,
    starts: Indices,
    counts: Indices,
    located: Tensor,
) -> VarlenAttend:
    """`counts` new tokens of each row behind the `starts` it holds; host integers."""
    ends = np.concatenate(([0], np.cumsum(counts)))
    both = to_device(np.concatenate((ends, starts + counts)), pool.dims.device).to(torch.int32)
    row_ends, lengths = both[: len(ends)], both[len(ends) :]
    blocks = located.to(torch.int32)
    return VarlenAttend(varlen, pool, addresses, row_ends, lengths, blocks, int(counts.max()))


def find_varlen() -> Varlen | str:
    """Torch's function, or why it cannot be used."""
    try:
        function: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return f"torch {torch.__version__} has no varlen_attn"
    missing = sorted((NEEDED | {"num_splits"}) - set(inspect.signature(function).parameters))
    if missing:
        return f"varlen_attn of torch {torch.__version__} knows no {', '.join(missing)}"
    found: Varlen = function
    return found


def choose(pool: Any, num_heads: int, find: Callable[[], Varlen | str] = find_varlen) -> Choice:
    """The attention to use over a pool, and why; tests torch's own on the device first."""
    if not isinstance(pool, PagedPool):
        return Choice(None, "slots are read in place by SDPA")
    dims = pool.dims
    if dims.device.type != "cuda":
        return Choice(None, f"varlen_attn needs a CUDA GPU and the pool is on {dims.device}")
    if dims.dtype not in (torch.bfloat16, torch.float16):
        return Choice(None, f"varlen_attn needs a 16-bit type and the pool holds {dims.dtype}")
    if pool.block_tokens % BLOCK_GRANULE_TOKENS:
        return Choice(
            None,
            f"varlen_attn needs blocks in multiples of {BLOCK_GRANULE_TOKENS} tokens and the pool "
            f"has {pool.block_tokens}",
        )
    function = find()
    if isinstance(function, str):
        return Choice(None, function)
    return _tested(function, dims, num_heads, pool.block_tokens)


@lru_cache(maxsize=32)
def _tested(function: Varlen, dims: KvDims, num_heads: int, block_tokens: int) -> Choice:
    try:
        error = self_test(function, dims, num_heads, block_tokens)
    except Exception as failure:  # Whatever it raises, it cannot be used.
        return Choice(None, f"varlen_attn failed its self-test: {failure}")
    if not error <= TOLERANCE:
        return Choice(None, f"varlen_attn failed its self-test: it is off by {error:.3g}")
    return Choice(function, f"varlen_attn passed its self-test: within {error:.1e} of SDPA")


@torch.no_grad()
def self_test(function: Varlen, dims: KvDims, num_heads: int, block_tokens: int) -> float:
    """Largest difference from SDPA on ragged rows over shuffled blocks, one of them long."""
    generator = torch.Generator(device=dims.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=dims.device)
        return made.to(dims.dtype)

    pool = PagedPool(dims, 1, 16, block_tokens)
    pool.free.reverse()
    lengths = (1, block_tokens, block_tokens + 1, 5 * block_tokens - 3, 7)
    for length in lengths:
        pool.admit(length)
    shape = (dims.kv_heads, dims.head_dim)
    pool.keys[0].copy_(random(pool.keys[0].shape[0], *shape))
    pool.values[0].copy_(random(pool.values[0].shape[0], *shape))
    rows = np.arange(len(lengths), dtype=np.int64)
    places = np.asarray(lengths, dtype=np.int64) - 1
    width = pool.context_tokens(max(lengths))
    blocks = pool.locate(rows, width)
    addresses = to_device(pool.addresses(rows, places), dims.device)
    positions, located = to_device(places, dims.device), to_device(blocks, dims.device)
    query = random(1, num_heads, len(lengths), dims.head_dim)
    expected = DecodeAttend(pool, addresses, positions, located, width)
    tested = decode_attend(function, pool, addresses, positions, located)
    errors = [_difference(expected, tested, query)]
    # Several new tokens a row, the last of which each row's decode has just been asked for.
    counts = np.asarray([1, 3, 2, 64, 7], dtype=np.int64)
    starts = np.asarray(lengths, dtype=np.int64) - counts
    groups = num_heads // dims.kv_heads
    spans, begin = [], 0
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        mask = span_mask(start, count, width, groups, pool)
        spans.append(Span(begin, count, False, located[row : row + 1], width, mask))
        begin += count
    query = random(1, num_heads, begin, dims.head_dim)
    extending = extend_attend(function, pool, addresses, starts, counts, located)
    errors.append(_difference(ExtendAttend(pool, addresses, spans), extending, query))
    return max(errors)


def _difference(expected: PoolWriter, tested: PoolWriter, query: Tensor) -> float:
    scaling = query.shape[-1] ** -0.5
    answers = [a.attend(query, query, query, 0, scaling).float() for a in (expected, tested)]
    return float((answers[0] - answers[1]).abs().max())
