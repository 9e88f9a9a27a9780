"""Our kernels as functions of tensors: what each takes, and how it is divided over a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from calibration.model.kernels import (
    add_norm_kernel,
    attend_kernel,
    gate_kernel,
    merge_kernel,
    store_kernel,
    tell_kernel,
)

try:
    import triton
except ImportError:
    triton = None

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each [positions, head_dim]."""

MOST_SPLITS: Final = 32
PROGRAMS_PER_PROCESSOR: Final = 2
"""Programs that keep a multiprocessor's memory busy."""

ATTEND_WARPS: Final = 4
SLOT_STAGES: Final = 3
PAGED_STAGES: Final = 5
"""Tiles under way at once: of pages the blocks' numbers are one more link of the chain, and with
three stages only one tile of keys and values would be fetched ahead instead of two."""

GATE_BLOCK: Final = 1024
TELL_BLOCK: Final = 2048
TELL_STAGES: Final = 4
LEAST_KNOTS: Final = 64
"""Knots of a map of confidence are padded to so many: all maps then share one variant, which the
first exit compiles before any graph is captured."""

_LOG2_E: Final = 1.4426950408889634


def can_compile() -> bool:
    """Whether Triton is installed."""
    return triton is not None


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
        (add_norm_kernel, [], []),
        (tell_kernel, ["num_knots"], ["targets"]),
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


def splits_for(rows: int, kv_heads: int, processors: int) -> int:
    """Shares that each row's tokens are divided into, a power of two that keeps the device busy.

    Lengths have no say: a graph is for rows of any length, and a pool of short rows must take the
    launches that were measured over one of long rows. Shares without tokens end at once.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // (rows * kv_heads))
    return 1 << (min(MOST_SPLITS, wanted).bit_length() - 1)


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
        asking,
        key,
        value,
        cosine,
        sine,
        rotated,
        keys,
        values,
        addresses,
        positions,
        asking.stride(0),
        key.stride(0),
        value.stride(0),
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
    is_paged = places is not None and places.dim() == 2
    _launch(
        attend_kernel,
        (kv_heads, rows, splits),
        query,
        keys,
        values,
        positions,
        positions if places is None else places,
        parts,
        weights,
        scaling * _LOG2_E,
        query.stride(0),
        0 if places is None else places.stride(0),
        place_tokens,
        GROUPS=groups,
        GROUP_BLOCK=group_block(groups),
        HEAD_DIM=head_dim,
        LANES=lanes,
        TOKENS=tokens_at_once(lanes),
        PLACED=places is not None and places.dim() == 1,
        PAGED=is_paged,
        SPLIT=splits > 1,
        num_warps=ATTEND_WARPS,
        num_stages=PAGED_STAGES if is_paged else SLOT_STAGES,
    )
    if splits > 1:
        _launch(
            merge_kernel,
            (rows * kv_heads * groups,),
            parts,
            weights,
            output,
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
        (rows, -(-width // GATE_BLOCK)),
        gate,
        up,
        output,
        gate.stride(0),
        width,
        BLOCK=GATE_BLOCK,
        num_warps=4,
    )
    return output


def add_and_norm(
    hidden: Tensor, product: Tensor, norm: nn.LayerNorm, in_place: bool
) -> tuple[Tensor, Tensor]:
    """The sum of [N, hidden] states and a product, and its layer norm; the sum `in_place` if asked.

    Both inputs lie without gaps, and the norm has weights and biases.
    """
    rows, width = hidden.shape
    total = hidden if in_place else torch.empty_like(hidden)
    normed = torch.empty_like(hidden)
    block = power_of_two(width)
    _launch(
        add_norm_kernel,
        (rows,),
        *(hidden, product, norm.weight, norm.bias, total, normed, width, norm.eps),
        BLOCK=block,
        num_warps=norm_warps(block),
    )
    return total, normed


def tell(logits: Tensor, targets: Tensor | None, knots: Tensor | None) -> Tensor:
    """What logits [N, vocab] say: [3, N] of token, confidence, and the nats of a token.

    Confidence is the largest softmax probability, through the piecewise linear map of `knots`
    [2, K] where they are given. The nats are those of `targets` [N], or of the token itself.
    """
    rows, vocab = logits.shape
    said = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    count = 0 if knots is None else knots.shape[1]
    _launch(
        tell_kernel,
        (rows,),
        logits,
        said if targets is None else targets,
        said if knots is None else knots,
        said,
        logits.stride(0),
        vocab,
        count,
        TARGETED=targets is not None,
        KNOTS=0 if knots is None else max(LEAST_KNOTS, power_of_two(count)),
        BLOCK=TELL_BLOCK,
        STAGES=TELL_STAGES,
        num_warps=8,
    )
    return said


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


def group_block(groups: int) -> int:
    """Queries that one program of attention holds: matrix units take 16 at least."""
    return max(16, power_of_two(groups))


def tokens_at_once(lanes: int) -> int:
    """Tokens that one program of attention reads at once, of heads of so many lanes.

    Few enough for several programs on a multiprocessor, each fetching ahead.
    """
    return max(16, min(64, 8192 // lanes))


def norm_warps(block: int) -> int:
    """Warps that share a row of so many units, each lane with eight where 32 are enough."""
    return max(4, min(32, block // 256))


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()
