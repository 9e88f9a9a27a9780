"""Where a decode layer's microseconds go: `python -m reports.gpu.kernels`, 90 s on a GPU.

Five tables: layers of real widths, from the stock modules and in few launches, beside the larger of
their launches and their bytes, with the kernels of ours by time; a layer's products beside reading
their weights; what an exit says; attention of one new token a row in several ways, which compiles
most; and products by a kernel that is no part of the backend.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from types import ModuleType
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from calibration.measuring.capture import Captured, capture
from calibration.measuring.floors import (
    COPY_BYTES,
    count_launches,
    time_copy,
    time_launch,
    time_read,
)
from calibration.measuring.timing import timed, timer_for
from calibration.model import launches
from calibration.model.attention import DecodeAttend
from calibration.model.decode import Decoder, slot_pool
from calibration.model.early_exit import EarlyExitLM
from calibration.model.fused import TOLERANCE, FusedAttend, Fusion
from calibration.model.kv import KvDims, SlotPool
from calibration.model.launches import splits_for
from calibration.model.shapes import random_model
from calibration.training.presets import preset_of
from helios_sim.model import PUBLIC_SHAPES, ModelShape
from helios_sim.wording import counted
from reports.gpu import products

LAYERS: Final = 4
LOADS: Final = ((1, 128), (1, 2048), (16, 512), (64, 128), (64, 1024))
"""Rows and the tokens that each of them holds."""

CACHE_BYTES: Final = 2e8
"""More than a GPU's cache holds."""

ATTENDING: Final = ((32, 4), (128, 4), (64, 8), (128, 8))
"""Tokens that a program of our attention reads at once, and its warps, beside those in use."""

TILES: Final = {1: ((32, 256), (16, 512), (32, 128)), 8: ((32, 256), (32, 128))}
"""Outputs and inputs of a program of our products, beside those in use, by rows.

With 8 rows each program reads half as many bytes of inputs as of weights for 16 outputs.
"""

TRIED_AT: Final = ((1, 2048), (64, 1024))
"""Loads at which these are tried: each is compiled first."""

BEST_SHOWN: Final = 8
SAMPLES: Final = 3


def shapes() -> dict[str, ModelShape]:
    """The small family's largest model and layers of public shapes, without vocabularies."""
    plan = preset_of("cuda").models[-1]
    small = (plan.hidden, plan.heads, plan.heads, plan.hidden // plan.heads, plan.ffn)
    return {
        plan.name: ModelShape("llama", LAYERS, *small, 512, 2048, True),
        **{
            name: replace(PUBLIC_SHAPES[name], layers=LAYERS, vocab=512, max_positions=2048)
            for name in ("opt-1.3b", "llama3-8b")
        },
    }


class Bench:
    """Times work from graphs, beside the device's own floors."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.timer = timer_for(self.device)
        empty = time_launch(self.device, self.timer, "graph", SAMPLES)
        if isinstance(empty, str):
            raise RuntimeError(empty)
        num_bytes = COPY_BYTES[self.device.type]
        copy, moved = time_copy(num_bytes, self.device, self.timer, SAMPLES)
        read = time_read(num_bytes, self.device, self.timer, SAMPLES)
        self.launch_s = empty.seconds
        self.bytes_per_s = max(moved / copy.seconds, num_bytes / read.seconds)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float | str:
        """Seconds of one of `times` repetitions in a graph, or why there is none."""

        def all_of_them() -> Tensor:
            for _ in range(times):
                found = work()
            assert isinstance(found, Tensor)
            return found

        captured = capture(all_of_them, self.device)
        if not isinstance(captured, Captured):
            return captured.reason
        return timed([captured.replay], self.timer, samples=SAMPLES)[0].seconds / times

    def microseconds(self, work: Callable[[], object], times: int = 1) -> str:
        """The same as a cell of a table."""
        try:
            found = self.seconds(work, times)
        except Exception as error:  # One way that cannot be had here leaves the others.
            torch.cuda.synchronize()
            found = str(error)
        return found.splitlines()[0][:30] if isinstance(found, str) else f"{found * 1e6:.1f}"


def layers(bench: Bench) -> Iterator[str]:
    """A layer at each load: stock and ours, launches and microseconds, and the floor."""
    for name, shape in shapes().items():
        model = random_model(shape, LAYERS, (LAYERS // 2, LAYERS), device=bench.device)
        for rows, context in LOADS:
            yield from layer_at(bench, f"{name} {rows} x {context}", model, rows, context)
        model.unload()


def layer_at(
    bench: Bench, title: str, model: EarlyExitLM, rows: int, context: int
) -> Iterator[str]:
    """A layer at one load, and the kernels of ours."""
    pool = slot_pool(model, rows, 2048)
    for store in (*pool.keys, *pool.values):
        store.normal_()
    numbers = [pool.admit(context) for _ in range(rows)]
    positions = [context - 1] * rows
    read = model.plan(LAYERS).layer_bytes
    read += rows * context * model.kv_dims.bytes_per_token_layer

    def layers_of(decoder: Decoder) -> Callable[[int], Tensor]:
        hidden = decoder.begin(numbers, [(7 * row) % 512 for row in numbers], positions)
        return lambda last: decoder.run(decoder.place(numbers, positions), hidden, 0, last)

    said = []
    for way in ("stock", "ours"):
        decoder = Decoder(model, pool)
        if way == "stock":
            decoder.fusion = Fusion(False, "left out")
        elif not decoder.fusion.usable:
            said.append(f"ours is stock, since {decoder.fusion.reason}")
        run = layers_of(decoder)
        run(LAYERS)
        number = count_launches(partial(run, 2)) - count_launches(partial(run, 1))
        found = bench.seconds(partial(run, LAYERS))
        if isinstance(found, str):
            said.append(f"{way} {found}")
            continue
        floor_s = max(number * bench.launch_s, read / bench.bytes_per_s)
        said.append(
            f"{way} {found / LAYERS * 1e6:.1f} us in {number} launches, "
            f"{found / LAYERS / floor_s:.2f} of the floor of {floor_s * 1e6:.1f}"
        )
    yield f"{title}: {'; '.join(said)}"
    yield from kernels_of(partial(run, LAYERS))


def kernels_of(work: Callable[[], object]) -> list[str]:
    """The kernels of some layers by the microseconds that a layer spends in them."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            work()
            torch.cuda.synchronize()
    except Exception as error:  # Without its kernels a layer's time is still worth its line.
        return [f"    no kernels: {type(error).__name__}: {str(error).splitlines()[:1]}"]
    spent: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for event in profiled.events() or ():
        if "CUDA" in str(event.device_type):
            spent[event.name] += event.device_time_total
            counted[event.name] += 1
    return [
        f"    {us / LAYERS:8.2f} us {counted[name] / LAYERS:5.2f} x {name[:90]}"
        for name, us in spent.most_common(BEST_SHOWN)
    ]


def attention(bench: Bench) -> Iterator[str]:
    """One new token a row: SDPA with a mask, without one, and ours in several divisions."""
    for name, shape in shapes().items():
        dims = KvDims(shape.kv_heads, shape.head_dim, torch.bfloat16, bench.device)
        for rows, context in LOADS:
            cells = attention_at(bench, dims, shape.heads, rows, context)
            yield f"{name} {rows} x {context}: {cells}"


def attention_at(bench: Bench, dims: KvDims, heads: int, rows: int, context: int) -> str:
    """One load in several ways, in microseconds; * marks the division that is used.

    Ours also read other numbers of tokens at once, by other numbers of warps.
    Layers are read in turns, so that it is memory that is read, but for the smallest loads.
    """
    layers = min(64, max(LAYERS, int(CACHE_BYTES / (rows * context * dims.bytes_per_token_layer))))
    pool = SlotPool(dims, layers, rows, 2048)
    for store in (*pool.keys, *pool.values):
        store.normal_()
    query = torch.randn(1, heads, rows, dims.head_dim, device=bench.device).to(dims.dtype)
    ends = torch.full((rows,), context - 1, device=bench.device)
    scale = dims.head_dim**-0.5
    turn = count()

    tokens = query[0].transpose(0, 1).reshape(rows, heads * dims.head_dim)
    masked = DecodeAttend(pool, ends, ends, None, context)

    def reading(made: FusedAttend, **shaped: object) -> Callable[[], Tensor]:
        def work() -> Tensor:
            with patched(launches, **shaped):
                return made.read(tokens, next(turn) % layers, scale)

        return work

    def unmasked() -> Tensor:
        key, value = pool.gather(next(turn) % layers, None, rows, context)
        asked = query[0].transpose(0, 1)[:, :, None]
        return scaled_dot_product_attention(asked, key, value, scale=scale, enable_gqa=True)

    processors = torch.cuda.get_device_properties(bench.device).multi_processor_count
    usual = splits_for(rows, dims.kv_heads, processors)
    ways: dict[str, Callable[[], Tensor]] = {
        "masked": lambda: masked.attend(query, query, query, next(turn) % layers, scale),
        "unmasked": unmasked,
    }
    for splits in sorted({1, max(1, usual // 2), usual, min(32, 2 * usual)}):
        made = FusedAttend(pool, ends, ends, None, None, processors)
        made.splits = splits
        ways[f"ours in {splits}{'*' if splits == usual else ''}"] = reading(made)
    made = FusedAttend(pool, ends, ends, None, None, processors)
    for at_once, warps in ATTENDING if (rows, context) in TRIED_AT else ():
        shaped = {"tokens_at_once": lambda _, n=at_once: n, "ATTEND_WARPS": warps}
        ways[f"{at_once} by {warps} warps"] = reading(made, **shaped)
    times = max(8, layers)
    cells = [f"{way} {bench.microseconds(work, times)}" for way, work in ways.items()]
    floor_s = rows * context * dims.bytes_per_token_layer / bench.bytes_per_s
    return f"{', '.join(cells)}; bytes {floor_s * 1e6:.1f}"


def multiplying(bench: Bench) -> Iterator[str]:
    """A layer's products by rows: alone, with a bias, and added to a residual."""
    for title, wide, deep in product_sizes():
        for rows in (1, 64):
            yield f"{title} {rows} rows: {product_at(bench, wide, deep, rows)}"


def candidates(bench: Bench) -> Iterator[str]:
    """Products of few rows by a kernel that begins early: one that no GPU has run comes last."""
    for title, wide, deep in product_sizes():
        for rows in TILES:
            yield f"{title} {counted(rows, 'row')}: {candidate_at(bench, wide, deep, rows)}"


def product_sizes() -> Iterator[tuple[str, int, int]]:
    """A layer's products: their names, outputs and inputs."""
    for name, shape in shapes().items():
        stacked = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        gates = 2 if shape.family == "llama" else 1
        sizes = {
            "qkv": (stacked, shape.hidden),
            "output": (shape.hidden, shape.heads * shape.head_dim),
            "up": (gates * shape.ffn, shape.hidden),
            "down": (shape.hidden, shape.ffn),
        }
        for part, (wide, deep) in sizes.items():
            yield f"{name} {part}", wide, deep


def product_at(bench: Bench, wide: int, deep: int, rows: int) -> str:
    """One product in torch's ways, in microseconds."""
    weights, times = weights_in_turns(bench, wide, deep)
    given, residual, bias = (drawn(bench, *size) for size in ((rows, deep), (rows, wide), (wide,)))
    ways: dict[str, Callable[[], Tensor]] = {
        "alone": lambda: linear(given, next(weights)),
        "bias": lambda: linear(given, next(weights), bias),
        "added": lambda: residual.addmm_(given, next(weights).t()),
        "then added": lambda: residual.add_(linear(given, next(weights))),
    }
    cells = [f"{way} {bench.microseconds(work, times)}" for way, work in ways.items()]
    return f"{', '.join(cells)}; bytes {2e6 * wide * deep / bench.bytes_per_s:.1f}"


def candidate_at(bench: Bench, wide: int, deep: int, rows: int) -> str:
    """One product of few rows by torch and by the kernel that is tried, in microseconds."""
    weights, times = weights_in_turns(bench, wide, deep)
    given = drawn(bench, rows, deep)
    if why := products.why_not(given, next(weights)):
        return why
    early = partial(_ours, given, weights, early=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: linear(given, next(weights)),
        "ours": partial(_ours, given, weights),
        "early": early,
    }
    for outs, at_once in TILES[rows]:
        ways[f"{outs} by {at_once} early"] = partial(
            under, early, products, OUTS=outs, DEEP=at_once
        )
    return ", ".join(f"{way} {bench.microseconds(work, times)}" for way, work in ways.items())


def weights_in_turns(bench: Bench, wide: int, deep: int) -> tuple[Iterator[Tensor], int]:
    """As many weights of a product as no cache holds, in turns, and how often to take one."""
    number = max(2, int(CACHE_BYTES / (2 * wide * deep)))
    return cycle([drawn(bench, wide, deep) for _ in range(number)]), max(8, number)


def drawn(bench: Bench, *shape: int) -> Tensor:
    """Random numbers in 16 bits."""
    return torch.randn(shape, device=bench.device).to(torch.bfloat16)


def _ours(given: Tensor, weights: Iterator[Tensor], early: bool = False) -> Tensor:
    """A product by the kernel that is tried; raises where it is not torch's."""
    weight = next(weights)
    found = products.product(given, weight, early)
    if not torch.cuda.is_current_stream_capturing():
        right = linear(given, weight).float()
        off = float((found.float() - right).norm() / right.norm())
        if not off <= TOLERANCE:
            raise ValueError(f"off by {off:.2g}")
    return found


def words(bench: Bench) -> Iterator[str]:
    """What an exit says of its logits: in torch's steps, by our kernel, and in other stretches."""
    for vocab in (256, 50272, 128256):
        for rows in (1, 64):
            logits = torch.randn(rows, vocab, device=bench.device).to(torch.bfloat16)
            targets = torch.arange(rows, device=bench.device)
            ours = partial(launches.tell, logits, targets, None)
            ways: dict[str, Callable[[], Tensor]] = {
                "torch": partial(said_by_torch, logits, targets),
                "ours": ours,
            }
            for stretch in (1024, 4096):
                ways[f"ours by {stretch}"] = partial(under, ours, launches, TELL_BLOCK=stretch)
            cells = [f"{way} {bench.microseconds(work, 8)}" for way, work in ways.items()]
            floor = f"bytes {1e6 * logits.nbytes / bench.bytes_per_s:.1f}"
            yield f"{rows} rows of {vocab}: {', '.join(cells)}; {floor}"


def said_by_torch(logits: Tensor, targets: Tensor) -> Tensor:
    """Token, confidence and nats in torch's own steps."""
    full = logits.float()
    nats = full.logsumexp(-1) - full.gather(-1, targets[:, None])[:, 0]
    return torch.stack([full.argmax(-1).float(), full.softmax(-1).amax(-1), nats])


def under(work: Callable[[], Tensor], module: ModuleType, **changed: object) -> Tensor:
    """Work while a module's launches are shaped otherwise."""
    with patched(module, **changed):
        return work()


@contextmanager
def patched(module: ModuleType, **changed: object) -> Iterator[None]:
    """Let a module hold other values for a while."""
    before = {name: getattr(module, name) for name in changed}
    vars(module).update(changed)
    try:
        yield
    finally:
        vars(module).update(before)


def main() -> int:
    """Print every table; one that fails leaves the others."""
    if not torch.cuda.is_available():
        print("reports.gpu.kernels: CUDA is not available to this torch.", file=sys.stderr)
        return 2
    began_s = time.monotonic()
    bench = Bench()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"{bench.bytes_per_s / 1e12:.2f} TB/s, {bench.launch_s * 1e6:.2f} us a launch"
    )
    failed = False
    for table in (layers, multiplying, words, attention, candidates):
        print(f"\n{(table.__doc__ or '').strip()}", flush=True)
        try:
            for line in table(bench):
                print(line, flush=True)
        except Exception as error:  # What was read so far is printed.
            failed = True
            print(f"failed: {type(error).__name__}: {error}")
    print(f"\n{time.monotonic() - began_s:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
