"""Seconds of loading and unloading weights, stage by stage, at sizes of our choosing.

Each stage is one loader's work on a file or tensors of a known size, so that seconds = alpha +
bytes / beta can be fitted: opening a safetensors file and reading its header, disk to host
memory, host memory to the device (pageable, and through one reusable pinned buffer, since
pinning tensor by tensor can be slower than not pinning), and letting go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calibration.timing import synchronise

TENSOR_BYTES: Final = 32 * 2**20
"""Size of one tensor of a test file: about a weight matrix of a model of a few billion."""

STAGES: Final = ("load_open", "load_disk", "load_host", "load_host_pinned", "unload")


@dataclass(frozen=True)
class StageTime:
    """One stage's seconds for `num_bytes`; `note` says what the reader should know."""

    seconds: float
    num_bytes: int
    note: str = ""


class WeightFile:
    """A safetensors file of random weights of about `num_bytes`, for as long as it is needed.

    Raises OSError where the disk cannot hold it.
    """

    def __init__(self, file: Path, num_bytes: int, dtype: torch.dtype) -> None:
        self.file = file
        width = torch.empty((), dtype=dtype).element_size()
        count = max(1, round(num_bytes / TENSOR_BYTES))
        elements = max(1, num_bytes // (width * count))
        # Random values: a file of zeros may be stored sparsely. Drawn once, since that is slow.
        drawn = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
        tensors = {f"layer.{index}": drawn.roll(index) for index in range(count)}
        save_file(tensors, file)
        self.num_bytes = count * elements * width
        self.dtype = dtype
        with file.open("rb") as stream:
            os.fsync(stream.fileno())

    def forget(self) -> bool:
        """Ask the system to drop the file from its cache; False where it cannot be asked."""
        if not hasattr(os, "posix_fadvise"):
            return False
        with self.file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True

    def tensors(self) -> list[Tensor]:
        """The weights in host memory of their own."""
        with safe_open(self.file, framework="pt", device="cpu") as opened:
            # A tensor of the file is a view of the mapped file: only a copy reads the disk.
            return [opened.get_tensor(name).clone() for name in opened.keys()]  # noqa: SIM118

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink(missing_ok=True)


@contextmanager
def weight_file(folder: Path, num_bytes: int, dtype: torch.dtype) -> Iterator[WeightFile]:
    """A test file in `folder` that is gone afterwards."""
    path = folder / f".weights-{num_bytes}.safetensors"
    try:
        yield WeightFile(path, num_bytes, dtype)
    finally:
        path.unlink(missing_ok=True)


def time_open(weights: WeightFile) -> StageTime:
    """Open the file and read its header."""
    note = "" if weights.forget() else "the file may have been cached"

    def read_header() -> None:
        with safe_open(weights.file, framework="pt", device="cpu") as opened:
            opened.keys()

    return StageTime(_seconds(read_header), weights.num_bytes, note)


def time_disk(weights: WeightFile) -> StageTime:
    """Read the weights into host memory, the file dropped from the system's cache before."""
    note = "" if weights.forget() else "the file may have been cached"
    return StageTime(_seconds(weights.tensors), weights.num_bytes, note)


def time_host(tensors: list[Tensor], device: torch.device) -> tuple[StageTime, list[Tensor]]:
    """Copy weights from pageable host memory to the device, tensor by tensor.

    On a processor the device's memory is host memory and the copy is one within it.
    """
    copies: list[Tensor] = []

    def copy() -> None:
        copies.extend(
            tensor.to(device) if device.type == "cuda" else tensor.clone() for tensor in tensors
        )
        synchronise(device)

    seconds = _seconds(copy)
    return StageTime(seconds, _bytes(tensors)), copies


def time_host_pinned(tensors: list[Tensor], device: torch.device) -> StageTime:
    """Copy weights to the device through two halves of one pinned buffer, made beforehand.

    While one half is on its way the other is filled. Raises RuntimeError without CUDA.
    """
    if device.type != "cuda":
        raise RuntimeError("pinned memory serves CUDA devices only")
    largest = max(tensor.numel() for tensor in tensors)
    halves = [torch.empty(largest, dtype=tensors[0].dtype, pin_memory=True) for _ in range(2)]
    sent: list[torch.cuda.Event | None] = [None, None]

    def copy() -> list[Tensor]:
        copies = []
        for number, tensor in enumerate(tensors):
            half, earlier = halves[number % 2], sent[number % 2]
            if earlier is not None:
                earlier.synchronize()
            part = half[: tensor.numel()]
            part.copy_(tensor.flatten())
            target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            target.copy_(part.view(tensor.shape), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            sent[number % 2] = event
            copies.append(target)
        synchronise(device)
        return copies

    return StageTime(_seconds(copy), _bytes(tensors))


def time_unload(copies: list[Tensor], device: torch.device) -> StageTime:
    """Let go of weights on the device and give their memory back. Empties `copies`."""
    num_bytes = _bytes(copies)

    def let_go() -> None:
        copies.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            synchronise(device)

    return StageTime(_seconds(let_go), num_bytes)


def load_sizes(largest_bytes: int, count: int = 4) -> tuple[int, ...]:
    """Sizes to load at: `largest_bytes` and fourths of it, the smallest last."""
    return tuple(max(4096, largest_bytes >> (2 * place)) for place in range(count))


def _seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
