"""The optimiser of the small family: orthogonalised momentum for matrices, AdamW for the rest.

Muon (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a weight
matrix by the nearest orthogonal matrix, found with five Newton-Schulz iterations; updates are
scaled to AdamW's size (Moonshot, arXiv 2502.16982), so that one learning rate serves both. On
a few million tokens of text it reaches AdamW's loss in less than half the iterations. The stock
torch.optim.Muon iterates in bfloat16, which a CPU does slowly, and one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
_NUM_NEWTON_SCHULZ: Final = 5
_MOMENTUM: Final = 0.95
_ADAMW_BETAS: Final = (0.9, 0.95)
_ADAMW_RMS: Final = 0.2
_SMALLEST_NORM: Final = 1e-7


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular values brought close to 1."""
    a, b, c = _NEWTON_SCHULZ
    # bfloat16 is the fast type of a GPU and the slow one of a CPU.
    dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_NUM_NEWTON_SCHULZ):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    answer: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return answer


class Optimiser:
    """Muon for `matrices` and AdamW for `others`, at one learning rate.

    `weight_decay` shrinks matrices only; embeddings, heads, norms and biases belong to `others`.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], weight_decay: float
    ) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        # Matrices of one shape are iterated on together: one batched product instead of dozens.
        self._groups = list(by_shape.values())
        self._momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self._groups]
        self._weight_decay = weight_decay
        self._adamw = torch.optim.AdamW(
            others, lr=0.0, betas=_ADAMW_BETAS, weight_decay=0.0, fused=True
        )
        self.parameters: tuple[nn.Parameter, ...] = (*matrices, *others)

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """Apply the gradients that are there and clear them."""
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            gradient = torch.stack([_gradient_of(parameter) for parameter in group])
            momentum.lerp_(gradient, 1.0 - _MOMENTUM)
            update = orthogonalised(gradient.lerp_(momentum, _MOMENTUM))
            size = _ADAMW_RMS * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(group, 1.0 - learning_rate * self._weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-learning_rate * size)
        for adamw_group in self._adamw.param_groups:
            adamw_group["lr"] = learning_rate
        self._adamw.step()
        for parameter in self.parameters:
            parameter.grad = None


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("A parameter has no gradient; every one must take part in the loss.")
    return parameter.grad
