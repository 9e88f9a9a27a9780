"""A GPU made of host memory: tensors that say `cuda:0`, streams, events and graphs.

`pretend(monkeypatch)` puts it in the place of torch's own for one test. Results are the
processor's, at once; what is modelled is what the device refuses:

- host tensors among its own (but for those without dimensions, as in torch);
- whatever waits for the device, and memory of the host, while a stream captures;
- work on one stream that meets another stream's before it has been waited for;
- host memory that changes while it is being copied, and events read before they are over.

A graph keeps the operators that ran while its stream captured. As on a GPU what is captured has
not run yet: memory is put back as it was and outputs are NaN until a replay. A replay runs the
operators on the same memory, refuses what is gone by then, and spoils the outputs of later graphs
of its pool, which may lie where it keeps what it needs in between.

`syncs` counts what waited for the device, `allocated` is what live tensors take, `problems` lists
memory that went while another stream was using it. Speed, kernels' own numbers and limits, and
what the driver says are not to be had from it.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from calibration.model.graphs import capture_stream, warm_loads
from calibration.model.loading import loading_stream

TORCH = "2.13."
"""The release whose inside this reaches into; another may lay it out anew."""
DEVICE = torch.device("cuda:0")
TOTAL_BYTES = 8 * 2**30
CONTEXT_BYTES = 500 * 2**20
"""What CUDA's context and libraries would take."""

_WAITS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero"))
"""Operators whose result the host needs before it can go on."""
_CROSSES = frozenset(("copy_", "_to_copy"))
_TAKE_HOST_INDICES = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm"))
_CUDA_TYPE, _META_TYPE = 1, 14
"""The numbers of device types in torch's C++ side."""
_OF_STREAMS = (5, 6, 8, 9)
"""The places of what a guard says of streams, which backward passes ask."""
_DEFAULT_STREAM = {
    # Type and index of the device in the one register, 0 for the default stream in the other.
    "x86_64": bytes.fromhex("b801000000 31d2 c3"),
    "aarch64": bytes.fromhex("200080d2 010080d2 c0035fd6"),
}
_IS_THERE, _HAS_CONTEXT = (2, 3, 16), 4
"""Among the hooks' functions `isBuilt`, `isAvailable` and `hasCUDA`, and `hasPrimaryContext`."""
_ALLOCATES = frozenset(("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"))


class Gpu:
    """The state of the pretended device."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self.problems: list[str] = []
        self.allocated = self.peak = self.reserved = 0
        self.pinned: dict[int, int] = {}
        """Bytes of page-locked memory by where it begins."""
        self.host_knows: dict[int, int] = {}
        """How far the host knows each stream to have come."""
        self.copies: list[tuple[Stream, int, torch.Tensor, torch.Tensor]] = []
        """Copies from page-locked memory that nobody has waited for, with what was there."""
        self.capturing: Graph | None = None
        self.registered: list[int] = []
        self.refuses_to_register = 0
        """The error that page-locking comes back with."""
        self.last_pool = 0
        self.default = Stream()
        self.local = threading.local()

    @property
    def stream(self) -> Stream:
        """The calling thread's current stream."""
        return getattr(self.local, "stream", self.default)

    @property
    def records(self) -> Graph | None:
        """The graph that captures what the calling thread does."""
        found = self.capturing
        return found if found is not None and self.stream is found.stream else None

    def wait(self, what: str, streams: dict[int, int] | None = None) -> None:
        """The host waits for the device, or for how far some streams have come."""
        graph = self.capturing if streams is None else self.records
        if graph is not None:
            graph.fail(f"{what} was asked for")
        self.syncs[what] += 1
        if streams is None:
            streams = {number: stream.tick for number, stream in Stream.all.items()}
        _merge(self.host_knows, streams)
        waiting = []
        for stream, tick, source, held in self.copies:
            if self.host_knows.get(stream.number, 0) < tick:
                waiting.append((stream, tick, source, held))
            elif not _same(source, held):
                raise RuntimeError("Host memory was written to while it was being copied.")
        self.copies = waiting

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor lies in page-locked memory."""
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        return any(first <= begin and end <= first + size for first, size in self.pinned.items())

    def take(self, num_bytes: int) -> None:
        """Count memory that a tensor takes."""
        if self.allocated + num_bytes > TOTAL_BYTES - CONTEXT_BYTES:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes}.")
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)


class Memory:
    """One piece of device memory, held by every tensor that lies in it."""

    def __init__(self, gpu: Gpu, num_bytes: int, graph: Graph | None) -> None:
        self.gpu = gpu
        self.bytes = num_bytes
        self.graph = graph
        self.of = gpu.stream
        self.written = (gpu.stream, gpu.stream.tick)
        self.reads: dict[Stream, int] = {}
        gpu.take(num_bytes)
        if graph is not None:
            graph.own.append(self)

    def meet(self, writes: bool) -> None:
        """Work on the current stream reads it or writes to it."""
        stream, gpu = self.gpu.stream, self.gpu
        before = [self.written, *(self.reads.items() if writes else ())]
        for other, tick in before:
            if other is not stream and tick > max(
                stream.knows.get(other.number, 0), gpu.host_knows.get(other.number, 0)
            ):
                raise RuntimeError(
                    f"Stream {stream.number} meets memory that stream {other.number} is still "
                    "working on; let it wait."
                )
        if writes:
            self.written, self.reads = (stream, stream.tick), {}
        else:
            self.reads[stream] = stream.tick

    def __del__(self) -> None:
        self.gpu.allocated -= self.bytes
        for other, tick in (self.written, *self.reads.items()):
            known = max(
                self.of.knows.get(other.number, 0), self.gpu.host_knows.get(other.number, 0)
            )
            if other is not self.of and self.graph is None and tick > known:
                self.gpu.problems.append(
                    f"{self.bytes} bytes of stream {self.of.number} were given back while stream "
                    f"{other.number} was using them."
                )


class Stream:
    """A queue of work; `tick` counts what was put on it."""

    all: ClassVar[weakref.WeakValueDictionary[int, Stream]] = weakref.WeakValueDictionary()
    made = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        assert device is None or torch.device(device).type == "cuda"
        Stream.made += 1
        self.number = Stream.made
        Stream.all[self.number] = self
        self.device, self.device_index, self.device_type = DEVICE, 0, 1
        self.stream_id = self.cuda_stream = self.number
        self.tick = 0
        self.knows: dict[int, int] = {}

    @property
    def come(self) -> dict[int, int]:
        """What is known to be done once the stream is."""
        return {**self.knows, self.number: self.tick}

    def wait_stream(self, other: Stream) -> None:
        _merge(self.knows, other.come)

    def wait_event(self, event: Event) -> None:
        _merge(self.knows, event.come)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _gpu().wait("Stream.synchronize", self.come)

    def query(self) -> bool:
        return True


class Event:
    """A mark on a stream."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.enable_timing = enable_timing
        self.come: dict[int, int] = {}
        self.at_s: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _gpu().stream
        stream.tick += 1
        self.of, self.tick, self.come = stream, stream.tick, stream.come
        self.at_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _gpu().stream).wait_event(self)

    def synchronize(self) -> None:
        _gpu().wait("Event.synchronize", self.come)

    def query(self) -> bool:
        return self.at_s is None or _gpu().host_knows.get(self.of.number, 0) >= self.tick

    def elapsed_time(self, end: Event) -> float:
        if not (self.enable_timing and end.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.at_s is None or end.at_s is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready")
        return (end.at_s - self.at_s) * 1e3


class Graph:
    """What `torch.cuda.CUDAGraph` is: operators kept while capturing, run again by `replay`."""

    pools: ClassVar[dict[Any, list[weakref.ref[Graph]]]] = {}

    def __init__(self, keep_graph: bool = False) -> None:
        self.ops: list[tuple[Any, Any, Any, Any, bool]] = []
        self.stream: Stream | None = None
        self.error = ""
        self.ended = False
        self.own: list[Memory] = []
        self.outer: dict[int, weakref.ref[Memory]] = {}
        self.written: set[int] = set()
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: Any = None
    ) -> None:
        gpu = _gpu()
        if gpu.capturing is not None or gpu.stream is gpu.default:
            raise RuntimeError("CUDA graphs must be captured one by one, on a non-default stream.")
        self.handle = pool if pool is not None else torch.cuda.graph_pool_handle()
        self.stream, gpu.capturing = gpu.stream, self

    def fail(self, what: str) -> None:
        """Refuse what may not be done while a stream captures; the capture is lost."""
        self.error = what
        raise RuntimeError(
            f"CUDA error: operation not permitted when stream is capturing\n{what} in a capture."
        )

    def capture_end(self) -> None:
        _gpu().capturing = None
        for target, held in self.before:
            target.copy_(held)
        self.before.clear()
        if self.error:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        self.ended = True
        self.spoil()
        Graph.pools.setdefault(self.handle, []).append(weakref.ref(self))

    def meets(self, tensor: PretendTensor, writes: bool) -> None:
        """An operator that is captured works on a tensor."""
        memory = tensor.memory
        if memory.graph is self:
            return
        self.outer[id(memory)] = weakref.ref(memory)
        if writes and id(memory) not in self.written:
            self.written.add(id(memory))
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.inner.untyped_storage())
            self.before.append((whole, whole.clone()))

    def spoil(self) -> None:
        """Let outputs hold nothing."""
        for _, _, _, found, writes in self.ops:
            for one in _tensors(found):
                if not writes and one.is_floating_point():
                    one.fill_(float("nan"))

    def replay(self) -> None:
        gpu = _gpu()
        assert self.ended, "a graph is captured before it is replayed"
        if gpu.records is not None:
            gpu.records.fail("A replay was asked for")
        gpu.stream.tick += 1
        for held in self.outer.values():
            memory = held()
            if memory is None:
                raise RuntimeError("A graph was replayed after memory it reads was given back.")
            memory.meet(id(memory) in self.written)
        for memory in self.own:
            memory.meet(True)
        with torch.no_grad():
            later = False
            for known in Graph.pools[self.handle]:
                other = known()
                if other is self:
                    later = True
                elif other is not None and later:
                    other.spoil()
            for func, args, kwargs, found, writes in self.ops:
                again = func(*args, **kwargs)
                if writes:
                    continue
                for old, new in zip(_tensors(found), _tensors(again), strict=True):
                    old.copy_(new)

    def pool(self) -> Any:
        return self.handle

    def reset(self) -> None:
        self.ops.clear()
        self.own.clear()


class PretendTensor(torch.Tensor):
    """A tensor of the device: `inner` has its numbers, `memory` is where it lies."""

    inner: torch.Tensor
    memory: Memory

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory) -> PretendTensor:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner, made.memory = inner, memory
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_composite(func):
            # In inference mode operators come whole that otherwise come in their parts.
            return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"pretended on {DEVICE}: {self.inner!r}"

    # With these two a module that moves puts the moved tensor in its parameter's place, so that
    # tied parameters stay tied, as they do on a GPU.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], self.memory

    @staticmethod
    def __tensor_unflatten__(inner: Any, memory: Any, size: Any, stride: Any) -> PretendTensor:
        return PretendTensor(inner["inner"], memory)


class PretendGenerator(torch.Generator):
    """A generator that knows whether it was made for the device."""

    ours: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> PretendGenerator:
        made: Any = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            # Operators are handed another Python object around the same generator.
            cls.ours.add(made._cdata)
            weakref.finalize(made, cls.ours.discard, made._cdata)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass


_CURRENT: list[Gpu] = []
_KEPT: list[Any] = []
"""The guard, once made: torch may ask it at any time from then on."""


def _gpu() -> Gpu:
    return _CURRENT[-1]


@cache
def _is_composite(func: Any) -> bool:
    """Whether torch makes the operator of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _merge(known: dict[int, int], more: dict[int, int]) -> None:
    for number, tick in more.items():
        known[number] = max(known.get(number, 0), tick)


def _tensors(found: Any) -> list[torch.Tensor]:
    """The tensors among what an operator gives."""
    every = found if isinstance(found, list | tuple) else (found,)
    return [one for one in every if isinstance(one, torch.Tensor)]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _wrap(inner: torch.Tensor, near: dict[int, Memory] | None = None) -> PretendTensor:
    """A tensor of the device around a processor's, in the memory it shares with others."""
    where = inner.untyped_storage()
    memory = (near or {}).get(where._cdata)
    if memory is None:
        gpu = _gpu()
        memory = Memory(gpu, where.nbytes(), gpu.records)
    return PretendTensor(inner, memory)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that met a tensor of the device."""
    gpu, name = _gpu(), func.overloadpacket.__name__
    if name in _CROSSES:
        return _copy(func, args, kwargs)
    if name == "record_stream":
        return None
    ours: list[PretendTensor] = []
    args = tuple(_inner(one, func, ours) for one in args)
    kwargs = {key: _inner(value, func, ours) for key, value in kwargs.items()}
    if name in _PRODUCTS and not ours[0].dtype.is_floating_point:
        raise NotImplementedError(f'"{name}_cuda" not implemented for {ours[0].dtype}')
    if name in _WAITS or (
        name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])
    ):
        gpu.wait(name, gpu.stream.come)
    asked = kwargs.get("device")
    if asked is not None:
        if torch.device(asked).type != "cuda":
            return func(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
    return _launch(func, args, kwargs, ours)


def _inner(one: Any, func: Any, ours: list[PretendTensor]) -> Any:
    """A value as the processor gets it; what the device would not take is refused."""
    if isinstance(one, PretendTensor):
        ours.append(one)
        return one.inner
    if isinstance(one, list | tuple):
        return type(one)(_inner(part, func, ours) for part in one)
    if isinstance(one, torch.Tensor) and one.dim() > 0 and not one.is_meta:
        if func.overloadpacket.__name__ not in _TAKE_HOST_INDICES:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and {one.device}! (when checking arguments of {func})"
            )
        _gpu().wait("an index on the host", _gpu().stream.come)
    if isinstance(one, torch._C.Generator) and one._cdata not in PretendGenerator.ours:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    return one


@cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operator writes to, by place and name."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _is_view(func: Any) -> bool:
    """Whether an operator only looks at memory in another way."""
    found = func._schema.returns
    return not _writes(func) and bool(found) and found[0].alias_info is not None


def _launch(func: Any, args: Any, kwargs: Any, ours: list[PretendTensor]) -> Any:
    """Put an operator on the current stream and wrap what it gives."""
    gpu, name, is_view = _gpu(), func.overloadpacket.__name__, _is_view(func)
    graph = gpu.records
    written: set[int] = set()
    for place, argument in _writes(func):
        value = args[place] if place < len(args) else kwargs.get(argument)
        written.update(map(id, value if isinstance(value, list | tuple) else (value,)))
    near = {one.inner.untyped_storage()._cdata: one.memory for one in ours}
    known = {id(one.inner): one for one in ours}
    if graph is not None:
        for one in ours:
            graph.meets(one, id(one.inner) in written)
    elif not is_view:
        gpu.stream.tick += 1
        for one in ours:
            one.memory.meet(id(one.inner) in written)
    if name in _PRODUCTS:
        func, args = _in_single, (func, *args)
    elif name == "_varlen_attn":
        func = _paged_attention
    found = func(*args, **kwargs)
    if graph is not None and not is_view and name not in _ALLOCATES:
        graph.ops.append((func, args, kwargs, found, bool(written)))

    return _outer(found, known, near)


def _outer(one: Any, known: dict[int, PretendTensor], near: dict[int, Memory]) -> Any:
    """What an operator gave as the device's tensors; what it was given comes back itself."""
    if isinstance(one, list | tuple):
        return type(one)(_outer(part, known, near) for part in one)
    if not isinstance(one, torch.Tensor):
        return one
    return known[id(one)] if id(one) in known else _wrap(one, near)


def _in_single(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A product with its sums in single precision, as a GPU has them.

    A processor without units for 16 bits is slow in them.
    """
    wide = [one.float() if isinstance(one, torch.Tensor) else one for one in args]
    found: torch.Tensor = func(*wide, **kwargs).to(args[0].dtype)
    return found


def _paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_ends: torch.Tensor,
    key_ends: Any,
    longest_new: int,
    longest: int,
    is_causal: bool,
    scale: float,
    window: list[int],
    enable_gqa: bool,
    lengths: torch.Tensor,
    blocks: torch.Tensor,
    num_splits: int,
) -> tuple[torch.Tensor, ...]:
    """What torch's `varlen_attn` computes of blocks, row by row."""
    if query.dtype not in (torch.bfloat16, torch.float16) or key.shape[1] % 256:
        raise RuntimeError("FlashAttention only supports 16 bits, and blocks of 256 tokens.")
    if any(one.dtype is not torch.int32 for one in (row_ends, lengths, blocks)):
        raise RuntimeError("row ends, lengths and blocks must have dtype int32")
    assert is_causal and window == [-1, 0] and key_ends is None and num_splits == 1
    assert longest <= blocks.shape[1] * key.shape[1]
    found = torch.empty_like(query)
    for row, (begin, end) in enumerate(pairwise(row_ends.tolist())):
        length, count = int(lengths[row]), end - begin
        assert count <= longest_new and length <= longest
        held = [
            store[blocks[row].long()].flatten(0, 1)[:length].float().transpose(0, 1)
            for store in (key, value)
        ]
        mask = torch.arange(length) <= torch.arange(length - count, length)[:, None]
        new = query[begin:end].float().transpose(0, 1)
        found[begin:end] = torch.nn.functional.scaled_dot_product_attention(
            new, *held, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        ).transpose(0, 1)
    return found, torch.zeros(query.shape[1], query.shape[0]), torch.zeros(2)


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Copies, within the device and across."""
    gpu, graph = _gpu(), _gpu().records
    if func.overloadpacket.__name__ == "_to_copy":
        (source,), wanted = args, dict(kwargs)
        target = wanted.pop("device", None)
        wanted.pop("pin_memory", None)
        waits = not wanted.pop("non_blocking", False)
        if target is None or torch.device(target).type == "cuda":
            return _launch(func, (source.inner,), wanted, [source])
        if torch.device(target).type == "meta":
            return func(source.inner, **wanted, device=target)
        del waits  # Into memory that is not page-locked a copy is waited for in any case.
        _read_by_host(source)
        return func(source.inner, **wanted)
    target, source = args[0], args[1]
    if isinstance(target, PretendTensor) and isinstance(source, PretendTensor):
        return _launch(func, (target.inner, source.inner), {}, [target, source])
    if isinstance(source, PretendTensor):
        _read_by_host(source)
        target.copy_(source.inner)
        return target
    pinned = gpu.is_pinned(source)
    if graph is not None and not pinned and source.dim() > 0:
        graph.fail("A copy from host memory that is not page-locked was asked for")
    if graph is not None and source.dim() > 0:
        # The graph reads the host's memory at each replay.
        return _launch(func, (target.inner, source), {}, [target])
    found = _launch(func, (target.inner, source), {}, [target])
    if pinned and (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
        gpu.copies.append((gpu.stream, gpu.stream.tick, source, source.clone()))
    elif graph is None:
        gpu.wait("a copy from the host", gpu.stream.come)
    return found


def _read_by_host(source: PretendTensor) -> None:
    """The host waits for the current stream and reads a tensor."""
    gpu = _gpu()
    if gpu.records is not None:
        gpu.records.fail("A copy to the host was asked for")
    gpu.stream.tick += 1
    source.memory.meet(False)
    gpu.wait("a copy to the host", gpu.stream.come)


def _pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    gpu = _gpu()
    if isinstance(tensor, PretendTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")
    if gpu.records is not None:
        gpu.records.fail("Page-locked memory was asked for")
    made = tensor.clone(memory_format=torch.contiguous_format)
    gpu.pinned[made.data_ptr()] = made.nbytes
    weakref.finalize(made, gpu.pinned.pop, made.data_ptr(), None)
    return made


class _Runtime:
    """What `torch.cuda.cudart()` gives."""

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:
        gpu = _gpu()
        if gpu.refuses_to_register or num_bytes <= 0:
            return gpu.refuses_to_register or 1
        gpu.pinned[pointer] = num_bytes
        gpu.registered.append(pointer)
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        if _CURRENT:
            _gpu().pinned.pop(pointer, None)
        return 0


def _empty(func: Any) -> Any:
    """A factory of the device, of the processor's."""

    def make(*args: Any, **kwargs: Any) -> Any:
        if not _CURRENT:
            raise RuntimeError("No CUDA GPUs are available")
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        found = func(*args, **kwargs)
        gpu = _gpu()
        if found.is_floating_point() and func is not torch.ops.aten.arange.start_step:
            found.fill_(float("nan"))
        made = _wrap(found)
        if gpu.records is not None and func is torch.ops.aten.arange.start_step:
            gpu.records.ops.append((func, args, kwargs, found, False))
        return made

    return make


def _library() -> Any:
    """Factories of tensors on the device, for every thread."""
    made = torch.library.Library("aten", "IMPL")
    aten = torch.ops.aten
    for name, func in (
        ("empty.memory_format", aten.empty.memory_format),
        ("empty_strided", aten.empty_strided.default),
        ("arange.start_step", aten.arange.start_step),
    ):
        made.impl(name, _empty(func), "CUDA")
    # `torch.tensor` fills what it makes past the tensors' own dispatch.
    made.impl("copy_", lambda *args: _run(aten.copy_.default, args, {}), "CUDA")
    return made


def _table(address: int, count: int, answers: dict[int, Any]) -> Any:
    """The table of a C++ object's virtual functions with some of them replaced."""
    entry = ctypes.c_void_p
    theirs = ctypes.cast(address, ctypes.POINTER(ctypes.POINTER(entry)))[0]
    table = (entry * count)(*(theirs[place] for place in range(count)))
    for place, answer in answers.items():
        table[place] = ctypes.cast(answer, entry)
    _KEPT.append((table, answers))
    return ctypes.addressof(table)


@contextmanager
def _in_torch() -> Iterator[None]:
    """Let torch's C++ side believe in a device.

    A wheel for processors has neither its guard, which says what device is current, nor hooks that
    say that it is there. Both are objects with virtual functions. The guard is the one of "meta",
    which does nothing, with the device's name in its answers; the hooks are torch's stand-in,
    which denies.
    """
    folder = Path(torch.__file__).parent / "lib"
    guards = (ctypes.c_void_p * 32).in_dll(
        ctypes.CDLL(str(folder / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    find_hooks = ctypes.CDLL(str(folder / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    find_hooks.restype = ctypes.c_void_p
    hooks = ctypes.cast(find_hooks(), ctypes.POINTER(ctypes.c_void_p))
    if not _KEPT:
        this, pair = ctypes.c_void_p, ctypes.c_uint16
        guard_answers = {
            0: ctypes.CFUNCTYPE(ctypes.c_uint8, this)(lambda _: _CUDA_TYPE),
            1: ctypes.CFUNCTYPE(pair, this, pair)(lambda *_: _CUDA_TYPE),
            2: ctypes.CFUNCTYPE(pair, this)(lambda _: _CUDA_TYPE),
            **dict.fromkeys(_OF_STREAMS, _default_stream()),
        }
        says_yes = ctypes.CFUNCTYPE(ctypes.c_bool, this)(lambda _: True)
        says_no = ctypes.CFUNCTYPE(ctypes.c_bool, this, ctypes.c_int8)(lambda *_: False)
        hook_answers = {**dict.fromkeys(_IS_THERE, says_yes), _HAS_CONTEXT: says_no}
        made = (ctypes.c_void_p * 2)(
            _table(guards[_META_TYPE], 26, guard_answers),
            _table(ctypes.addressof(hooks.contents), 64, hook_answers),
        )
        _KEPT.append(made)
    before = hooks[0]
    guards[_CUDA_TYPE], hooks[0] = ctypes.addressof(_KEPT[-1]), _KEPT[-1][1]
    try:
        yield
    finally:
        guards[_CUDA_TYPE], hooks[0] = None, before


def _default_stream() -> Any:
    """A function that answers with the device's default stream.

    A stream comes back in two registers, which ctypes cannot fill.
    """
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_DEFAULT_STREAM[platform.machine()])
    _KEPT.append(code)
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(code)))


@contextmanager
def pretending() -> Iterator[Gpu]:
    """Let torch find the pretended device within the block; ends with an error for `problems`."""
    with pytest.MonkeyPatch.context() as patch:
        yield from pretend(patch)


def pretend(patch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Let torch find the pretended device until the generator goes on."""
    gpu = Gpu()
    _CURRENT.append(gpu)
    library = _library()
    _forget_streams()
    for name, value in _functions(gpu).items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.cuda.graph, "default_capture_stream", None)
    patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    patch.setattr(torch, "Generator", PretendGenerator)
    patch.setattr(torch.Tensor, "pin_memory", _pin_memory)
    patch.setattr(torch.Tensor, "is_pinned", lambda tensor, device=None: gpu.is_pinned(tensor))
    try:
        # The engine's threads for devices start with the first backward pass of the process,
        # which another test may have made.
        with _in_torch(), torch.autograd.set_multithreading_enabled(False):
            yield gpu
    finally:
        library._destroy()
        _CURRENT.remove(gpu)
        _forget_streams()
    assert not gpu.problems, gpu.problems


def _forget_streams() -> None:
    """Let no stream that the program keeps outlive its device."""
    for kept in (capture_stream, warm_loads, loading_stream):
        kept.cache_clear()


def _functions(gpu: Gpu) -> dict[str, Any]:
    """What stands in for `torch.cuda`'s own."""

    def set_stream(stream: Stream) -> None:
        gpu.local.stream = stream

    def pool_handle() -> Any:
        gpu.last_pool += 1
        return (0, gpu.last_pool)

    def empty_cache() -> None:
        gpu.reserved = gpu.allocated

    def reset_peak(device: Any = None) -> None:
        gpu.peak = gpu.allocated

    properties = SimpleNamespace(
        name="Pretended GPU",
        total_memory=TOTAL_BYTES,
        major=9,
        minor=0,
        multi_processor_count=132,
        uuid="00000000-0000-0000-0000-000000000000",
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda callable, **_: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "current_stream": lambda device=None: gpu.stream,
        "default_stream": lambda device=None: gpu.default,
        "set_stream": set_stream,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "is_current_stream_capturing": lambda: gpu.records is not None,
        "graph_pool_handle": pool_handle,
        "empty_cache": empty_cache,
        "mem_get_info": lambda device=None: (
            TOTAL_BYTES - CONTEXT_BYTES - gpu.reserved,
            TOTAL_BYTES,
        ),
        "memory_allocated": lambda device=None: gpu.allocated,
        "memory_reserved": lambda device=None: gpu.reserved,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": reset_peak,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "cudart": _Runtime,
    }
