"""What an early-exit model costs in bytes: layers, exits, weights and KV of k loaded layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

Family = Literal["opt", "llama"]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder-only transformer, enough to count its parameters.

    `ffn` is the width of the feed-forward layer; `tied_head` says that the output head shares
    the embedding's weights, `final_norm` that there is a norm after the last layer: an OPT model
    that normalises after its blocks has none.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    tied_head: bool
    final_norm: bool = True

    def as_table(self) -> dict[str, Any]:
        """The shape as a profile holds it, which names the final norm only where there is none."""
        table = asdict(self)
        if self.final_norm:
            del table["final_norm"]
        return table

    def attention_params(self) -> int:
        """Weights of one layer's attention: queries, keys, values, output (and OPT's biases)."""
        query_width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        weights = 2 * self.hidden * query_width + 2 * self.hidden * kv_width
        biases = query_width + 2 * kv_width + self.hidden if self.family == "opt" else 0
        return weights + biases

    def feed_forward_params(self) -> int:
        """Weights of one layer's feed-forward block: two matrices for OPT, three for Llama."""
        if self.family == "opt":
            return 2 * self.hidden * self.ffn + self.ffn + self.hidden
        return 3 * self.hidden * self.ffn

    def layer_params(self) -> int:
        """Weights of one decoder layer with its norms."""
        norms = 4 * self.hidden if self.family == "opt" else 2 * self.hidden
        return self.attention_params() + self.feed_forward_params() + norms

    def embedding_params(self) -> int:
        """Token embedding, and OPT's learned positions (two rows more than the context)."""
        positions = (self.max_positions + 2) * self.hidden if self.family == "opt" else 0
        return self.vocab * self.hidden + positions

    def head_params(self) -> int:
        """Final norm and output head; a tied head adds no weights of its own."""
        norm = 2 * self.hidden if self.family == "opt" else self.hidden
        return (norm if self.final_norm else 0) + (
            0 if self.tied_head else self.vocab * self.hidden
        )


SHAPE_COUNTS: Final = tuple(one.name for one in fields(ModelShape) if one.type == "int")
"""The whole numbers of a shape, in the order in which a profile's table has them."""


@dataclass(frozen=True)
class EarlyExitModel:
    """An early-exit model: a shape, its exit layers and the bytes they take.

    `exit_layers` counts from 1 and means "after that layer"; the last exit is the full depth.
    `exit_head_params` are the weights each early exit adds (0 where norm and head are shared,
    as in LayerSkip).
    """

    name: str
    shape: ModelShape
    exit_layers: tuple[int, ...]
    tokenizer: str
    bytes_per_param: int = 2
    bytes_per_kv_element: int = 2
    exit_head_params: int = 0

    def __post_init__(self) -> None:
        exits = self.exit_layers
        if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1:
            raise ValueError(
                f"Model {self.name!r} was given exit_layers {list(exits)}; "
                "they must be ascending, distinct and at least 1."
            )
        if exits[-1] != self.shape.layers:
            raise ValueError(
                f"Model {self.name!r} was given exit_layers {list(exits)}; "
                f"the last exit must be its full depth of {self.shape.layers} layers."
            )

    @property
    def num_exits(self) -> int:
        """Exits counted with the full depth."""
        return len(self.exit_layers)

    def resident_params(self) -> int:
        """Weights that stay loaded at any depth: embedding, head and every exit head."""
        early_exits = len(self.exit_layers) - 1
        return (
            self.shape.embedding_params()
            + self.shape.head_params()
            + early_exits * self.exit_head_params
        )

    def layer_weight_bytes(self) -> int:
        """Bytes of one decoder layer."""
        return self.shape.layer_params() * self.bytes_per_param

    def weight_bytes(self, loaded_layers: int) -> int:
        """Bytes of the weights with the first `loaded_layers` layers loaded."""
        if not 0 <= loaded_layers <= self.shape.layers:
            raise ValueError(
                f"Model {self.name!r} was asked for {loaded_layers} loaded layers; "
                f"allowed are 0 to {self.shape.layers}."
            )
        return self.resident_params() * self.bytes_per_param + (
            loaded_layers * self.layer_weight_bytes()
        )

    def kv_bytes_per_token(self, loaded_layers: int) -> int:
        """KV cache bytes that one token takes in `loaded_layers` layers."""
        per_layer = 2 * self.shape.kv_heads * self.shape.head_dim * self.bytes_per_kv_element
        return loaded_layers * per_layer


def kv_pool_blocks(
    usable_bytes: int, weight_bytes: int, workspace_bytes: int, block_bytes: int
) -> int:
    """KV blocks that fit beside the weights in the bytes that may be used at all.

    (usable - weights - workspace) / block, or 0 when nothing is left.
    """
    free = usable_bytes - weight_bytes - workspace_bytes
    return max(0, free // block_bytes)


PUBLIC_SHAPES: Final = {
    "opt-1.3b": ModelShape("opt", 24, 2048, 32, 32, 64, 8192, 50272, 2048, True),
    "opt-6.7b": ModelShape("opt", 32, 4096, 32, 32, 128, 16384, 50272, 2048, True),
    "llama2-7b": ModelShape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096, False),
    "llama2-13b": ModelShape("llama", 40, 5120, 40, 40, 128, 13824, 32000, 4096, False),
    "llama2-70b": ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 32000, 4096, False),
    "llama3-8b": ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, False),
    "llama3.2-1b": ModelShape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, True),
    "codellama-34b": ModelShape("llama", 48, 8192, 64, 8, 128, 22016, 32000, 16384, False),
}
"""Dimensions of public models, from their published configurations."""
