"""How good exits are, counted from what they say: calibration, and how candidates complement.

Traces and the page of a profile count alike, and the page needs no torch.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NUM_BINS: Final = 15
"""Bins of equal width over confidence."""

Flags = NDArray[np.bool_]


def reliability(confidence: NDArray[Any], right: Flags) -> list[tuple[float, float, int]]:
    """(Mean confidence, share right, tokens) of each bin of confidence; empty ones left out."""
    values = confidence.ravel()
    place = np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    counts = np.bincount(place, minlength=NUM_BINS)
    sure = np.bincount(place, weights=values, minlength=NUM_BINS)
    hits = np.bincount(place, weights=right.ravel(), minlength=NUM_BINS)
    return [
        (float(sure[at] / counts[at]), float(hits[at] / counts[at]), int(counts[at]))
        for at in np.flatnonzero(counts)
    ]


def expected_calibration_error(confidence: NDArray[Any], right: Flags) -> float:
    """Mean distance of confidence and share right over the bins, weighted by tokens.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), section 2.
    """
    bins = reliability(confidence, right)
    return sum(count * abs(sure - share) for sure, share, count in bins) / confidence.size


def deep_and_early(
    levels: NDArray[Any], num_exits: int, other_levels: NDArray[Any]
) -> tuple[Flags, Flags]:
    """Tokens that leave a candidate at its last exit, and those of them that leave another's first.

    Levels are those at which the same tokens leave each of the two.
    """
    deep = levels == num_exits - 1
    return deep, deep & (other_levels == 0)


def early_of_deep(deep: Flags, early: Flags) -> float:
    """Complementarity: the share of deep tokens that are early in the other; 0 where none is."""
    return float(early.sum() / max(1, deep.sum()))
