"""Attention of the stock layers over our own KV pools, behind transformers' attention interface.

A stock layer hands its new keys and values to a cache's `update` and then calls the attention
function its configuration names. An `Attend` plays the cache and holds what the attention of one
call needs; `attention` finds it in the keyword arguments that a layer passes through. Without
one the function is transformers' SDPA attention, so a wrapped model still works as stock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from calibration.model.kv import Pool

NAME: Final = "helios"
"""Name under which the attention function is registered with transformers."""


class Attend(Protocol):
    """What one pass through some layers does with keys and values."""

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values of a layer; shapes [batch, kv_heads, tokens, head_dim]."""
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """Attention output [batch, tokens, heads, head_dim] of queries [batch, heads, ...].

        `key` and `value` are what `update` returned.
        """
        ...


class DenseAttend:
    """Causal attention over whole sequences, nothing cached; gradients flow."""

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass on what came."""
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """Each token attends to itself and the tokens before it in its sequence."""
        return causal(query, key, value, scaling).transpose(1, 2)


class PoolWriter:
    """Writes new keys and values of packed tokens to a pool at `addresses` [N]."""

    def __init__(self, pool: Pool, addresses: Tensor) -> None:
        self.pool = pool
        self.addresses = addresses

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, N, head_dim] to the pool and pass it on."""
        self.pool.write(layer, self.addresses, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """Refuse: filling writes and attends to nothing."""
        raise NotImplementedError("This writer fills a pool and does not attend.")


class DecodeAttend(PoolWriter):
    """One new token a row, each attending to its row's cached tokens, all rows at once.

    `positions` [N] are the new tokens' places, `located` finds the rows in the pool, and
    `context_tokens` is the width read of every row; what a row does not have is masked.
    """

    def __init__(
        self,
        pool: Pool,
        addresses: Tensor,
        positions: Tensor,
        located: Tensor | None,
        context_tokens: int,
    ) -> None:
        super().__init__(pool, addresses)
        # Made contiguous once here, so that no layer has to.
        self.located = None if located is None else located.contiguous()
        self.context_tokens = context_tokens
        self.mask = prefix_mask(positions, context_tokens, pool.dims.dtype)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """[1, N, heads, head_dim] of queries [1, heads, N, head_dim]."""
        tokens = query[0].transpose(0, 1)
        cached = self.pool.gather(layer, self.located, tokens.shape[0], self.context_tokens)
        return one_token(tokens, *cached, self.mask, scaling)[None]


@dataclass(frozen=True)
class Span:
    """The new tokens of one row within a packed batch: `count` of them from `begin` on.

    `located` and `context_tokens` find what the row holds; `mask` is additive over it, [1, 1,
    query heads a key head x count, context]. A row that starts at 0 needs neither.
    """

    begin: int
    count: int
    starts_at_zero: bool
    row: Tensor | None = None
    context_tokens: int = 0
    mask: Tensor | None = None


class ExtendAttend(PoolWriter):
    """Several new tokens a row, packed; each attends to its row's cached and earlier tokens."""

    def __init__(self, pool: Pool, addresses: Tensor, spans: Sequence[Span]) -> None:
        super().__init__(pool, addresses)
        self.spans = tuple(spans)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, scaling: float
    ) -> Tensor:
        """[1, N, heads, head_dim] of queries [1, heads, N, head_dim], row after row."""
        _, heads, num_tokens, head_dim = query.shape
        output = query.new_empty((1, num_tokens, heads, head_dim))
        for span in self.spans:
            here = slice(span.begin, span.begin + span.count)
            if span.starts_at_zero:
                found = causal(query[:, :, here], key[:, :, here], value[:, :, here], scaling)
            else:
                cached = self.pool.gather(layer, span.row, 1, span.context_tokens)
                grouped = query[:, :, here].reshape(1, cached[0].shape[1], -1, head_dim)
                found = scaled_dot_product_attention(
                    grouped, *cached, attn_mask=span.mask, scale=scaling
                ).reshape(1, heads, span.count, head_dim)
            output[:, here] = found.transpose(1, 2)
        return output


def span_mask(start: int, count: int, context_tokens: int, groups: int, pool: Pool) -> Tensor:
    """Additive mask of tokens start..start+count-1 over their row, repeated for grouped heads."""
    positions = torch.arange(start, start + count, device=pool.dims.device)
    mask = prefix_mask(positions, context_tokens, pool.dims.dtype)
    return mask.reshape(1, 1, count, context_tokens).repeat(1, 1, groups, 1)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: the call's `attend`, or stock SDPA without one."""
    if attend is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend.attend(query, key, value, int(module.layer_idx), scale), None


def register() -> None:
    """Make the attention function known to transformers; doing it again changes nothing.

    Of a GPU's kernels cuDNN's are left out in this process: they build a plan for every new shape,
    and contexts change their width all the time. For good, since torch keeps the choice for all
    threads at once, and weights may be checked in one while another serves.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    torch.backends.cuda.enable_cudnn_sdp(False)


def share_heads(keys_or_values: Tensor, num_query_heads: int) -> Tensor:
    """[batch, kv_heads, ...] with each head repeated for the query heads that share it."""
    groups = num_query_heads // keys_or_values.shape[1]
    return keys_or_values if groups == 1 else keys_or_values.repeat_interleave(groups, dim=1)


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of whole sequences; [batch, heads, tokens, head_dim] in and out."""
    heads = query.shape[1]
    if query.is_cuda and query.element_size() == 2:
        # Flash attention shares key heads by itself; elsewhere that option means slow kernels.
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != heads
        )
    key, value = share_heads(key, heads), share_heads(value, heads)
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention of one new token a row over its cached tokens.

    `query` is [rows, heads, head_dim], `key` and `value` [rows, kv_heads, tokens, head_dim] in
    any strides, `mask` additive [rows, 1, 1, tokens] or None. Returns [rows, heads, head_dim].
    The query heads that share a key head stand as the queries of that head, so that no key or
    value is copied.
    """
    rows, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    if mask is not None:
        mask = mask.expand(rows, kv_heads, heads // kv_heads, key.shape[2])
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(rows, heads, head_dim)


def prefix_mask(positions: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [rows, 1, 1, num_tokens]: a row sees the tokens up to its own position."""
    seen = torch.arange(num_tokens, device=positions.device) <= positions[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(~seen, float("-inf"))[:, None, None, :]


register()
