"""The device's own floors, measured in the run they are compared with: launches and copies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.measuring.capture import Captured, capture
from calibration.measuring.timing import Timer, Timing, Work, timed
from calibration.model import launches

COPY_BYTES: Final = {"cpu": 2**27, "cuda": 2**30}
"""What is copied, and read, for a device's memory bandwidth: far more than caches hold."""

CHAIN_LAUNCHES: Final = 200
"""Launches of the chain that is timed for one: beginning a graph is then no part of them."""

_LAUNCH_NOTHING: Final = frozenset(
    (
        "_pin_memory",
        "alias",
        "as_strided",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "lift_fresh",
        "new_empty",
        "permute",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "_reshape_alias",
        "_unsafe_view",
    )
)
"""Operators that make views or room."""


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_launches(work: Work) -> int:
    """Operators and kernels of the work that run on the device; each is one launch or more."""
    ours = launches.launched()
    with _Count() as counted:
        work()
    theirs: int = sum(n for name, n in counted.operators.items() if name not in _LAUNCH_NOTHING)
    return theirs + launches.launched() - ours


def launch_chain(length: int, device: torch.device) -> Work:
    """A chain of operators with next to nothing to do, each waiting for the one before."""
    value = torch.ones(1, device=device)

    def chain() -> Tensor:
        for _ in range(length):
            value.mul_(1.0)
        return value

    return chain


def time_launch(
    device: torch.device, timer: Timer, mode: str, samples: int, patience_s: float = math.inf
) -> Timing | str:
    """Time one launch of a long chain, eager or from a graph; a reason where that cannot be."""
    chain = launch_chain(CHAIN_LAUNCHES, device)
    if mode == "graph":
        captured = capture(chain, device)
        if not isinstance(captured, Captured):
            return captured.reason
        chain = captured.replay
    found = timed([chain], timer, samples=samples, patience_s=patience_s)[0]
    each = found.seconds / CHAIN_LAUNCHES, found.mad_s / CHAIN_LAUNCHES
    return replace(found, seconds=each[0], mad_s=each[1])


def time_read(
    num_bytes: int,
    device: torch.device,
    timer: Timer,
    samples: int,
    patience_s: float = math.inf,
) -> Timing:
    """Time reading so many bytes of the device's memory once, as a sum."""
    source = torch.randn(num_bytes // 4, device=device)
    work: Callable[[], object] = lambda: torch.sum(source)  # noqa: E731
    return timed([work], timer, samples=samples, patience_s=patience_s)[0]


def time_copy(
    num_bytes: int,
    device: torch.device,
    timer: Timer,
    samples: int,
    patience_s: float = math.inf,
) -> tuple[Timing, int]:
    """Time one copy within the device's memory; also the bytes it moves, read and written."""
    count = num_bytes // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    work: Callable[[], object] = lambda: target.copy_(source)  # noqa: E731
    found = timed([work], timer, samples=samples, patience_s=patience_s)[0]
    return found, 2 * 4 * count
