"""Models of public shapes with random weights: real sizes to time, with no checkpoint to fetch.

Dimensions are those of the models' published configurations. Weights are drawn at the scale real
models are initialised with, on the device itself and from their names, so that a layer has the
same values whenever and wherever in an order it is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import LlamaConfig, OPTConfig

from calibration.model.early_exit import EarlyExitLM, empty_model
from calibration.model.loading import Origin
from helios_sim.errors import InputError
from helios_sim.model import PUBLIC_SHAPES, ModelShape

INITIALISER_STD: Final = 0.02
"""Standard deviation of matrices, the `initializer_range` of the published configurations."""

ROPE_THETA: Final = {"llama3-8b": 500000.0, "llama3.2-1b": 500000.0, "codellama-34b": 1000000.0}
"""Bases of the rotary embedding other than 10,000."""


@dataclass(frozen=True)
class RandomSource:
    """Draws weights from a seed and their names: matrices normal, norms one, biases zero."""

    seed: int
    std: float = INITIALISER_STD
    on_device: bool = True
    kind: Origin = "made"

    def fill(self, views: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, on their own device."""
        for name, target in views.items():
            if name.endswith("bias"):
                target.zero_()
            elif target.dim() == 1:
                target.fill_(1.0)
            else:
                generator = torch.Generator(target.device)
                generator.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
                target.normal_(0.0, self.std, generator=generator)


def shape_named(name: str) -> ModelShape:
    """The shape of a public model, or an InputError that lists them."""
    if name not in PUBLIC_SHAPES:
        raise InputError(
            f"The shape {name!r} is unknown; allowed are {', '.join(sorted(PUBLIC_SHAPES))}."
        )
    return PUBLIC_SHAPES[name]


def config_of(shape: ModelShape, rope_theta: float = 10000.0) -> LlamaConfig | OPTConfig:
    """A stock configuration of a shape."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied_head,
    }
    if shape.family == "opt":
        return OPTConfig(
            ffn_dim=shape.ffn,
            word_embed_proj_dim=shape.hidden,
            do_layer_norm_before=shape.final_norm,
            **common,
        )
    return LlamaConfig(
        intermediate_size=shape.ffn,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        **common,
    )


def random_model(
    shape: str | ModelShape,
    depth: int,
    exits: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> EarlyExitLM:
    """A model of a public shape (or any other) with its first `depth` layers made.

    Exits are `depth` and the full depth unless given; `dtype` is float32 on a CPU and bfloat16
    on a GPU. Raises InputError, before memory is touched, where the device has too little.
    """
    name = shape if isinstance(shape, str) else "random"
    found = shape_named(shape) if isinstance(shape, str) else shape
    where = torch.device(device)
    model = empty_model(
        config_of(found, ROPE_THETA.get(name, 10000.0)),
        found,
        name=name,
        exits=sorted({depth, found.layers}) if exits is None else exits,
        source=RandomSource(seed),
        device=where,
        dtype=dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16),
    )
    model.grow(depth)
    return model
