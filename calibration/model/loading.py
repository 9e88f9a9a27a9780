"""Weights brought onto a device part by part, each part one block of memory and one copy.

The parts are what is always resident, the auxiliary exit heads, and each layer. A part comes from
its source (a checkpoint's files, tensors in memory, a maker of random weights), or from the copy
in host memory where one is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn

from calibration.model.checkpoint import Checkpoint
from calibration.model.host_copy import HostCopy

ALIGNMENT_ELEMENTS: Final = 64
"""Tensors of a part begin at multiples of this, as fast kernels want."""

Origin = Literal["disk", "host", "memory", "made"]


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a part lie in its flat block, in elements."""

    shapes: Mapping[str, tuple[int, ...]]
    begins: Mapping[str, int]
    num_elements: int

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The block's tensors by name."""
        found = {}
        for name, shape in self.shapes.items():
            begin = self.begins[name]
            found[name] = block[begin : begin + torch.Size(shape).numel()].view(shape)
        return found


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Lay tensors out one after another, each at an aligned place."""
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name] = end
        end += -(-torch.Size(shape).numel() // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
    return Layout(dict(shapes), begins, end)


class Source(Protocol):
    """Where weights come from."""

    @property
    def on_device(self) -> bool:
        """Whether it fills tensors of the model's device itself."""
        ...

    @property
    def kind(self) -> Origin:
        """What kind of place it is."""
        ...

    def fill(self, views: Mapping[str, Tensor]) -> None:
        """Fill tensors by their names; CPU tensors unless `on_device`."""
        ...


@dataclass(frozen=True)
class CheckpointSource:
    """Weights of a checkpoint's files."""

    opened: Checkpoint
    on_device: bool = False
    kind: Origin = "disk"

    def fill(self, views: Mapping[str, Tensor]) -> None:
        """Read them."""
        self.opened.fill(views)


@dataclass(frozen=True)
class MemorySource:
    """Weights that are in memory already, by name."""

    weights: Mapping[str, Tensor]
    on_device: bool = True
    kind: Origin = "memory"

    def fill(self, views: Mapping[str, Tensor]) -> None:
        """Copy them."""
        for name, target in views.items():
            target.copy_(self.weights[name])


@dataclass(frozen=True)
class Plan:
    """Bytes of the weights at a depth, before any of them is touched.

    `resident_bytes` holds embedding, final norm and head, `exit_head_bytes` the auxiliary heads.
    """

    depth: int
    resident_bytes: int
    exit_head_bytes: int
    layer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes on the device."""
        return self.resident_bytes + self.exit_head_bytes + self.depth * self.layer_bytes


@dataclass(frozen=True)
class LoadReport:
    """What a load moved and how long its stages took.

    `read_s` is disk (or maker) to host, `copy_s` host to device. With staging the two overlap and
    `copy_s` is what was still waited for. The check of the logits is not part of `seconds`.
    `source` says where the layers came from.
    """

    bytes: int
    seconds: float
    read_s: float
    copy_s: float
    source: Origin


class Loader:
    """Brings parts onto the device, through host memory where the source is on disk.

    `staging` is the buffer of an earlier loader of the same model, to be used again; where None
    is given one is made if it is needed. Work goes to the current stream.
    """

    def __init__(
        self,
        source: Source,
        host: HostCopy | None,
        staging: HostCopy | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.source = source
        self.host = host
        self.dtype = dtype
        self.device = device
        self.read_s = self.copy_s = 0.0
        self.origin: Origin = source.kind
        self.staging = staging
        self.events: list[Any] = [None, None]
        self.turn = 0

    def part(self, number: int, layout: Layout, prefix: str = "") -> dict[str, Tensor]:
        """A part's tensors on the device, by their names without `prefix`."""
        host = self.host
        if not layout.shapes:
            return {}
        block = torch.empty(layout.num_elements, dtype=self.dtype, device=self.device)
        targets = layout.views(block)
        wanted = {prefix + name: target for name, target in targets.items()}
        if host is not None and host.holds(number):
            self.origin = "host"
            self._copy(block, host.part(number))
        elif self.source.on_device:
            self._read(wanted)
            if host is not None:
                host.part(number).copy_(block)
                host.keep(number)
        elif host is not None:
            self._read_into(host.part(number), layout, prefix)
            host.keep(number)
            self._copy(block, host.part(number))
        elif self.device.type == "cpu":
            self._read(wanted)
        else:
            self._stage(block, layout, prefix)
        return targets

    def read_part(self, number: int, layout: Layout, prefix: str = "") -> None:
        """Read a part into the copy in host memory alone, unless it is there."""
        assert self.host is not None and not self.source.on_device
        if layout.shapes and not self.host.holds(number):
            self._read_into(self.host.part(number), layout, prefix)
            self.host.keep(number)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        if self.device.type == "cuda":
            began_s = time.perf_counter()
            torch.cuda.current_stream(self.device).synchronize()
            self.copy_s += time.perf_counter() - began_s

    def _read(self, views: Mapping[str, Tensor]) -> None:
        began_s = time.perf_counter()
        self.source.fill(views)
        self.read_s += time.perf_counter() - began_s

    def _read_into(self, block: Tensor, layout: Layout, prefix: str) -> None:
        self._read({prefix + name: view for name, view in layout.views(block).items()})

    def _copy(self, block: Tensor, host: Tensor) -> None:
        began_s = time.perf_counter()
        block.copy_(host, non_blocking=True)
        self.copy_s += time.perf_counter() - began_s

    def _stage(self, block: Tensor, layout: Layout, prefix: str) -> None:
        """Read into one half of a pinned buffer while the other half is still being copied."""
        if not prefix:
            host = torch.empty(layout.num_elements, dtype=self.dtype)
            self._read_into(host, layout, prefix)
            block.copy_(host)
            return
        if self.staging is None:
            self.staging = HostCopy([layout.num_elements] * 2, self.dtype, True, self.device)
        if self.events[self.turn] is not None:
            began_s = time.perf_counter()
            self.events[self.turn].synchronize()
            self.copy_s += time.perf_counter() - began_s
        cuda: Any = torch.cuda
        half = self.staging.part(self.turn)
        self._read_into(half, layout, prefix)
        self._copy(block, half)
        self.events[self.turn] = cuda.Event()
        self.events[self.turn].record()
        self.turn = 1 - self.turn


def assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of a module's weights, by name, without copying."""
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A GPU stream of its own that has done its work at the end; nothing on a processor."""
    if device.type != "cuda":
        yield
        return
    stream = loading_stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@lru_cache(maxsize=8)
def loading_stream(device: torch.device) -> Any:
    """One for all loads: libraries keep a workspace for every stream they have met."""
    new_stream: Any = torch.cuda.Stream
    return new_stream(device)
