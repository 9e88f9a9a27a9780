"""Named streams of random numbers, and the rounding by which no machine shows in sampled times."""

from __future__ import annotations

from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import InputError

Floats = NDArray[np.float64]

NS_PER_S: Final = 1e9


def stream(seed: int, name: str, *keys: int) -> np.random.Generator:
    """The random stream called `name`: other streams and their use never shift it."""
    if seed < 0:
        raise InputError(f"The seed is {seed}; it must be an integer of at least 0.")
    sequence = np.random.SeedSequence([seed, crc32(name.encode()), *keys])
    return np.random.Generator(np.random.PCG64(sequence))


def whole_ns(seconds: Floats) -> Floats:
    """Seconds rounded to whole nanoseconds, where a last-digit difference no longer shows."""
    rounded: Floats = np.round(seconds * NS_PER_S) / NS_PER_S
    return rounded
