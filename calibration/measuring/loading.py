"""Seconds of loading and unloading weights, stage by stage, at several sizes.

Each stage is the model loader's own work on a known number of bytes, so that seconds = alpha +
bytes / beta can be fitted: opening files and checking their headers, disk to host memory, host
memory to the device (pageable, and from one pinned buffer, since pinning tensor by tensor can be
slower than not pinning), and letting go. A checkpoint is loaded as it is; where there is none a
file of parts as large as a layer stands in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.measuring.readings import CACHED
from calibration.measuring.timing import Work, synchronise
from calibration.model.checkpoint import open_checkpoint, read_header, read_into
from calibration.model.early_exit import EarlyExitLM, load
from calibration.model.file_cache import forget
from calibration.model.host_copy import HostCopy

PART_BYTES: Final = 128 * 2**20
"""Bytes of one part of a stand-in file: a layer of a model of one to two billion parameters."""

_DRAWN_ELEMENTS: Final = 2**22


@dataclass(frozen=True)
class StageTime:
    """One stage's seconds for `num_bytes`; `note` says what the reader should know."""

    quantity: str
    seconds: float
    num_bytes: int
    note: str = ""


def time_checkpoint(
    folder: Path,
    depth: int,
    *,
    exits: Sequence[int] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[StageTime]:
    """Load a checkpoint's first `depth` layers from disk and from host memory, and let go.

    Disk counts what was waited for reading; host memory the whole load with everything that a
    switch does beside copying, the weights before that are let go included. Raises what loading
    raises.
    """
    files = sorted(folder.glob("*.safetensors"))
    note = "" if forget(files) else CACHED
    seconds = _seconds(lambda: open_checkpoint(folder))
    model = load(folder, depth=depth, exits=exits, device=device, dtype=dtype)
    yield StageTime("load_open", seconds, model.plan(depth).total_bytes, note)
    yield StageTime("unload", *_unloaded(model))
    note = "" if forget(files) else CACHED
    report = model.grow(depth)
    yield StageTime("load_disk", report.read_s, report.bytes, note)
    model.unload()
    del model
    ways = [("load_host", False)] + ([("load_host_pinned", True)] if device.type == "cuda" else [])
    for quantity, pinned in ways:
        model = load(
            folder,
            depth=depth,
            exits=exits,
            device=device,
            dtype=dtype,
            host_copy=True,
            pinned=pinned,
        )
        let_go_s = model.unload()
        report = model.grow(depth)
        copy = model.host_copy
        note = "" if copy is None else copy.note
        yield StageTime(quantity, let_go_s + report.seconds, report.bytes, note)
        model.unload()
        del model


class PartsFile:
    """A safetensors file of `num_bytes` in parts of random weights.

    Raises OSError where the disk cannot hold it.
    """

    def __init__(self, file: Path, num_bytes: int, dtype: torch.dtype) -> None:
        self.file = file
        self.dtype = dtype
        width = dtype.itemsize
        count = max(1, round(num_bytes / PART_BYTES))
        elements = max(1, num_bytes // (width * count))
        self.num_bytes = count * elements * width
        # Random values: a file of zeros may be stored sparsely. Drawn once, since that is slow.
        drawn = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
        save_file({f"part.{index}": drawn.roll(index) for index in range(count)}, file)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())

    def stages(self, device: torch.device) -> Iterator[StageTime]:
        """Open and read the file, copy its parts to the device, and let go."""
        note = "" if forget([self.file]) else CACHED
        seconds = _seconds(lambda: read_header(self.file))
        yield StageTime("load_open", seconds, self.num_bytes, note)
        entries = read_header(self.file)
        sizes = [entry.num_bytes // self.dtype.itemsize for entry in entries.values()]
        copy = HostCopy(sizes, self.dtype, False, device)

        def read() -> None:
            for number, entry in enumerate(entries.values()):
                read_into(entry, copy.part(number).view(entry.shape))

        note = "" if forget([self.file]) else CACHED
        yield StageTime("load_disk", _seconds(read), self.num_bytes, note)
        yield self._to_device("load_host", copy, len(sizes), device)
        if device.type == "cuda":
            pinned = HostCopy(sizes, self.dtype, True, device)
            pinned.buffer.copy_(copy.buffer)
            yield self._to_device("load_host_pinned", pinned, len(sizes), device)
        blocks = _copied(copy, len(sizes), device)
        yield StageTime("unload", _seconds(lambda: _let_go(blocks, device)), self.num_bytes)

    def _to_device(
        self, quantity: str, copy: HostCopy, count: int, device: torch.device
    ) -> StageTime:
        before = _copied(copy, count, device)

        def switch() -> None:
            _let_go(before, device)
            _copied(copy, count, device)

        seconds = _seconds(switch)
        return StageTime(quantity, seconds, self.num_bytes, copy.note)


def pinned_copies(num_bytes: int, dtype: torch.dtype, device: torch.device) -> Work | str:
    """Work that copies so many bytes from one pinned buffer to the device, and waits for them.

    The reason where the system refuses to pin.
    """
    elements = num_bytes // dtype.itemsize
    copy = HostCopy([elements], dtype, True, device)
    if not copy.is_pinned:
        return copy.note
    # Random values, a stretch of them again and again: drawing them all would take seconds.
    drawn = torch.randn(min(elements, _DRAWN_ELEMENTS)).to(dtype)
    for stretch in torch.split(copy.buffer, len(drawn)):
        stretch.copy_(drawn[: len(stretch)])
    block = torch.empty(elements, dtype=dtype, device=device)

    def work() -> None:
        block.copy_(copy.part(0), non_blocking=True)
        synchronise(device)

    return work


@contextmanager
def parts_file(folder: Path, num_bytes: int, dtype: torch.dtype) -> Iterator[PartsFile]:
    """A stand-in file in `folder` that is gone afterwards."""
    path = folder / f".parts-{num_bytes}.safetensors"
    try:
        yield PartsFile(path, num_bytes, dtype)
    finally:
        path.unlink(missing_ok=True)


def load_sizes(largest_bytes: int) -> tuple[int, ...]:
    """Four sizes to load at: `largest_bytes` and fourths of it, the smallest last."""
    return tuple(max(4096, largest_bytes >> (2 * place)) for place in range(4))


def _copied(copy: HostCopy, count: int, device: torch.device) -> list[Tensor]:
    """Blocks on the device, each filled from its part."""
    blocks = []
    for number in range(count):
        part = copy.part(number)
        block = torch.empty(part.shape, dtype=part.dtype, device=device)
        block.copy_(part, non_blocking=True)
        blocks.append(block)
    synchronise(device)
    return blocks


def _let_go(blocks: list[Tensor], device: torch.device) -> None:
    blocks.clear()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _unloaded(model: EarlyExitLM) -> tuple[float, int]:
    """Seconds to unload a model, and the bytes it had."""
    num_bytes = model.loaded_bytes
    return model.unload(), num_bytes


def _seconds(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s
