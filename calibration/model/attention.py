"""Attention of the stock layers over our own KV pools, behind transformers' attention interface.

A stock layer hands its new keys and values to a cache's `update` and then calls the attention
function its configuration names. An `Attend` plays the cache and holds what the attention of one
call needs; `attention` finds it in the keyword arguments that a layer passes through. Without
one the function is transformers' SDPA attention, so a wrapped model still works as stock.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    """Make the attention function known to transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def share_heads(keys_or_values: Tensor, num_query_heads: int) -> Tensor:
    """[batch, kv_heads, ...] with each head repeated for the query heads that share it."""
    groups = num_query_heads // keys_or_values.shape[1]
    return keys_or_values if groups == 1 else keys_or_values.repeat_interleave(groups, dim=1)


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of whole sequences; [batch, heads, tokens, head_dim] in and out."""
    heads = query.shape[1]
    if query.is_cuda:
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
