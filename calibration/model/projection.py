"""Logits told apart by a few numbers: their sums under signs that are the same everywhere.

The sign of a logit follows from its token's place among others, its entry in the vocabulary and
the sum's number, by arithmetic on whole numbers. Two projections lie as far apart, relative to
their length, as the logits themselves do, give or take a quarter: signs are as good as random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_SUMS: Final = 16
"""Sums of a projection; no more than the bits of a mixed number."""

_ENTRIES, _PLACES = 1, 2
"""What signs are of: entries of a vocabulary, and places of tokens."""


def project(logits: Tensor, first_place: int = 0) -> Tensor:
    """The projection [NUM_SUMS] in float64 of logits [N, vocab] of tokens at successive places."""
    count, vocab = logits.shape
    of_entries = torch.from_numpy(signs(vocab, _ENTRIES)).to(logits.device, torch.float64)
    of_places = torch.from_numpy(signs(first_place + count, _PLACES)[first_place:])
    by_token = logits.double() @ of_entries
    return (by_token * of_places.to(logits.device, torch.float64)).sum(0)


@lru_cache(maxsize=4)
def signs(count: int, kind: int) -> NDArray[np.int8]:
    """Signs [count, NUM_SUMS], each 1 or -1, the same in every process and on every device."""
    # The finaliser of splitmix64, of which every bit depends on every bit of the number.
    mixed = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(kind << 32)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    bits = (mixed[:, None] >> np.arange(NUM_SUMS, dtype=np.uint64)) & np.uint64(1)
    return bits.astype(np.int8) * np.int8(2) - np.int8(1)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two projections lie apart, relative to the length of the first."""
    apart, length = math.dist(one, other), math.hypot(*one)
    if length > 0.0:
        return apart / length
    return 0.0 if apart == 0.0 else math.inf
