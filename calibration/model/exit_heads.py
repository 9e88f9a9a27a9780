"""Auxiliary exit heads: a norm and an output matrix of their own at every early exit.

They are trained on a frozen backbone and kept in `exit_heads.safetensors` beside it, under the
names `exit.<layer>.norm.weight` (and `.bias`) and `exit.<layer>.head.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from calibration.model.family import Backbone


class ExitHead(nn.Module):
    """An auxiliary exit head: a norm like the model's final one and an output matrix."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hidden, vocab = int(backbone.config.hidden_size), int(backbone.config.vocab_size)
        self.norm = backbone.new_norm()
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., hidden]."""
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def new_exit_heads(backbone: Backbone, exit_layers: Sequence[int]) -> dict[int, ExitHead]:
    """Trainable heads for the exits before the full depth, starting as the final norm and head."""
    heads = {}
    for layer in exit_layers[:-1]:
        head = ExitHead(backbone).to(backbone.head_weight)
        with torch.no_grad():
            head.head.weight.copy_(backbone.head_weight)
            norm = backbone.norm()
            if norm is not None:
                head.norm.load_state_dict(norm.state_dict())
        heads[layer] = head
    return heads


def head_weights(heads: Mapping[int, ExitHead]) -> dict[str, Tensor]:
    """The heads' weights under their names in exit_heads.safetensors."""
    return {
        f"exit.{layer}.{name}": weight.detach()
        for layer, head in heads.items()
        for name, weight in head.state_dict().items()
    }


def one_head_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """Shapes of one head's weights by their names within the head; no memory is taken."""
    with torch.device("meta"):
        head = ExitHead(backbone)
    return {name: tuple(weight.shape) for name, weight in head.state_dict().items()}


def head_shapes(backbone: Backbone, layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the heads at exit layers, by their names in the file."""
    one = one_head_shapes(backbone)
    return {f"exit.{layer}.{name}": shape for layer in layers for name, shape in one.items()}
