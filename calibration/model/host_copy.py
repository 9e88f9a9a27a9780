"""One buffer in host memory for a model's parts, page-locked where a GPU can make use of it.

Page-locking is done once for the whole buffer: tensor by tensor it can cost more than it saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from calibration.model.memory import require


class HostCopy:
    """Parts of known sizes, in elements, one after another in one buffer.

    `is_pinned` says whether the buffer is page-locked, `note` why it is not where it was asked.
    """

    def __init__(
        self, sizes: Sequence[int], dtype: torch.dtype, pinned: bool, device: torch.device
    ) -> None:
        self.begins = [0, *accumulate(sizes)]
        self.held: set[int] = set()
        needed = self.begins[-1] * dtype.itemsize
        require(
            torch.device("cpu"),
            needed,
            "A copy of the weights in host memory",
            "do without the copy, or choose a smaller model",
        )
        self.buffer = torch.empty(self.begins[-1], dtype=dtype)
        self.is_pinned, self.note = False, ""
        if pinned:
            self.note = self._pin(device)
            self.is_pinned = not self.note

    @property
    def bytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.nbytes

    def part(self, number: int) -> Tensor:
        """A part's elements."""
        return self.buffer[self.begins[number] : self.begins[number + 1]]

    def holds(self, number: int) -> bool:
        """Whether a part has been kept."""
        return number in self.held

    def keep(self, number: int) -> None:
        """Say that a part's elements are now the weights."""
        self.held.add(number)

    def _pin(self, device: torch.device) -> str:
        """Page-lock the buffer where it lies; returns why not, or nothing.

        torch's own pinned allocations are rounded up to a power of two, which for a model's
        weights can be gigabytes.
        """
        if device.type != "cuda":
            return f"memory is page-locked for a CUDA GPU only, not for {device}"
        cuda: Any = torch.cuda
        runtime = cuda.cudart()
        address = self.buffer.data_ptr()
        failed = int(runtime.cudaHostRegister(address, self.bytes, 0))
        if failed:
            # CUDA keeps the error until it is asked, and the next kernel would be blamed for it.
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
            return f"the system refused to page-lock {self.bytes:,} bytes (CUDA error {failed})"
        weakref.finalize(self, _unpin, runtime, address, self.buffer)
        return ""


def _unpin(runtime: Any, address: int, buffer: Tensor) -> None:
    """Undo page-locking; `buffer` is held until then."""
    runtime.cudaHostUnregister(address)
    del buffer
