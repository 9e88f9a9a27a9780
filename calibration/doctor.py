"""A first look at a machine: small models run in every way there is, in seconds, and must agree.

Each check stands for a part of the calibration: layers one by one, KV pools, graphs, loading,
training, the bench, meters. One that fails names what would go wrong in a measurement of minutes;
one that cannot be had here is skipped with its reason.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, OPTForCausalLM

from calibration.device import dtype_name
from calibration.measuring.bench import Bench
from calibration.measuring.board import board_of
from calibration.measuring.floors import COPY_BYTES, time_copy, time_launch, time_read
from calibration.measuring.grid import Job
from calibration.measuring.meters import Absence, NoMeter, best_meter, window_of
from calibration.measuring.sources import sample_tokens
from calibration.measuring.timing import synchronise, timer_for
from calibration.model import fused
from calibration.model.decode import Decoder, generate, paged_pool, slot_pool
from calibration.model.early_exit import EarlyExitLM, from_stock, load, save
from calibration.model.kv import PagedPool
from calibration.model.loading import side_stream
from calibration.model.shapes import config_of, random_model
from calibration.model.varlen import BLOCK_GRANULE_TOKENS, choose
from calibration.training.presets import ModelPlan, Preset
from calibration.training.train import train_model
from helios_sim.model import PUBLIC_SHAPES, ModelShape

Verdict = Literal["pass", "fail", "skip"]

SHAPES: Final = {
    "llama": ModelShape("llama", 4, 128, 4, 2, 64, 256, 512, 512, False),
    "opt": ModelShape("opt", 4, 128, 2, 2, 64, 256, 512, 512, True),
}
"""Heads as wide as real ones, since kernels are chosen by that; all else small."""

EXITS: Final = (1, 2, 4)
PROMPT_TOKENS: Final = (5, 290, 17)
"""Ragged, one of them beyond the first context bucket."""

FED_TOKENS: Final = 3
ALLOWED: Final = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative distance of logits that differ in the order of their sums alone."""

_WINDOW_S: Final = 1.0

LAYERS: Final = {
    name: replace(PUBLIC_SHAPES[name], layers=4, vocab=512, max_positions=2048)
    for name in ("llama3-8b", "opt-1.3b")
}
"""Layers of real size, without their vocabularies."""

LAYER_ROWS: Final = (1, 16, 64)
LAYER_CONTEXT: Final = 1024


class Skipped(Exception):
    """A check that cannot be made here; the message is the reason."""


class Disagreement(Exception):
    """A check that failed; the message says by how much."""


@dataclass(frozen=True)
class Finding:
    """What a check came to."""

    name: str
    verdict: Verdict
    said: str
    seconds: float

    @property
    def line(self) -> str:
        """One line for a reader."""
        return f"{self.verdict}  {self.name}: {self.said} ({self.seconds:.1f} s)"


Check = Callable[[torch.device], str]


def examine(device: torch.device, tell: Callable[[Finding], None]) -> list[Finding]:
    """Make every check on a device and tell of each at once; a failure ends none but its own."""
    findings = []
    for name, check in checks():
        began_s = time.perf_counter()
        verdict, said = _verdict(check, device)
        findings.append(Finding(name, verdict, said, time.perf_counter() - began_s))
        tell(findings[-1])
        gc.collect()
    return findings


def command(device: torch.device, echo: Callable[[str], None]) -> bool:
    """What `helios-calibrate doctor` does; whether nothing failed."""
    threads = torch.get_num_threads()
    # Models this small gain nothing from threads, and on a shared machine they wait for each other.
    torch.set_num_threads(1)
    try:
        findings = examine(device, lambda finding: echo(finding.line))
    finally:
        torch.set_num_threads(threads)
    counts = {v: sum(one.verdict == v for one in findings) for v in ("pass", "fail", "skip")}
    echo(
        f"{counts['pass']} checks passed, {counts['fail']} failed, {counts['skip']} were skipped "
        f"on {device}."
    )
    return not counts["fail"]


def checks() -> Iterator[tuple[str, Check]]:
    """The checks by name, what others rest on first."""
    yield "device", _device
    yield "products", _products
    for dtype in ALLOWED:
        for family in SHAPES:
            name = f"{family} in {dtype_name(dtype)}"
            yield f"{name}, layer by layer", _on(_layers, family, dtype)
            yield f"{name}, pages", _on(_pages, family, dtype)
            yield f"{name}, graphs", _on(_graphs, family, dtype)
    yield "our kernels", _kernels
    yield "paged attention", _paged_attention
    yield "checkpoint", _checkpoint
    yield "loading beside decoding", _loading_beside
    yield "training", _training
    yield "launches from a graph", _launches
    yield "bench", _bench
    yield "time per layer", _time_per_layer
    yield "energy", _energy


def _on(check: Callable[..., str], family: str, dtype: torch.dtype) -> Check:
    return lambda device: check(family, dtype, device)


def _verdict(check: Check, device: torch.device) -> tuple[Verdict, str]:
    try:
        said = check(device)
        synchronise(device)
    except Skipped as reason:
        return "skip", str(reason)
    except Disagreement as error:
        return "fail", str(error)
    except Exception as error:  # Whatever a check meets is what it reports.
        first = (str(error) or "no message").splitlines()[0]
        return "fail", f"{type(error).__name__}: {first}"
    return "pass", said


def _device(device: torch.device) -> str:
    """What the device is and what it has free."""
    if device.type != "cuda":
        return f"torch {torch.__version__} with {torch.get_num_threads()} thread(s)"
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, "
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, torch {torch.__version__}"
    )


def _products(device: torch.device) -> str:
    """Products of matrices against double precision on the processor."""
    said = []
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(192, 192, generator=generator).to(dtype) for _ in range(2))
        found = (a.to(device) @ b.to(device)).double().cpu()
        off = _distance(found, a.double() @ b.double())
        said.append(f"{dtype_name(dtype)} off by {_within(off, allowed)}")
    return ", ".join(said)


def _layers(family: str, dtype: torch.dtype, device: torch.device) -> str:
    """Prompts in two parts and tokens one by one against the stock model's whole passes."""
    model = _model(family, dtype, device)
    texts = _texts()
    with torch.no_grad():
        whole = [
            model.backbone.model(torch.tensor([text], device=device)).logits[0] for text in texts
        ]
        states = model.backbone.forward_dense(torch.tensor([texts[1]], device=device))
        dense = model.logits(states[-1][0], model.depth_level)
    expected = torch.stack(
        [one[len(text) - FED_TOKENS - 1 :] for one, text in zip(whole, texts, strict=True)]
    )
    off = max(
        _distance(_said(Decoder(model, slot_pool(model, 3, 512))), expected),
        _distance(dense, whole[1]),
    )
    return f"off the stock model by {_within(off, ALLOWED[dtype])}"


def _pages(family: str, dtype: torch.dtype, device: torch.device) -> str:
    """Blocks of two sizes against slots; the larger is what torch's paged attention takes."""
    model = _model(family, dtype, device)
    slots = _said(Decoder(model, slot_pool(model, 3, 512)))
    off = 0.0
    for blocks, block_tokens in ((32, 16), (8, BLOCK_GRANULE_TOKENS)):
        decoder = Decoder(model, paged_pool(model, blocks, block_tokens))
        off = max(off, _distance(_said(decoder), slots))
    return f"off slots by {_within(off, ALLOWED[dtype])}"


def _graphs(family: str, dtype: torch.dtype, device: torch.device) -> str:
    """Replays of padded batches, of all rows and of some, against the eager path.

    Embedding, segments, exits' words and filled KV. Graphs are captured beforehand, as measuring
    does, and as they are wanted, as serving does.
    """
    model = _model(family, dtype, device)
    eager: dict[bool, list[Tensor]] = {}
    off, num_graphs, capture_s = 0.0, 0, 0.0
    for on_demand in (None, False, True):
        for paged in (False, True):
            pool = paged_pool(model, 40, 16) if paged else slot_pool(model, 4, 512)
            decoder = Decoder(model, pool)
            if on_demand is not None:
                decoder.use_graphs((2, 4), 512, subsets=True, on_demand=on_demand)
            said = [_said(decoder), *_some_rows(decoder)]
            if on_demand is None:
                eager[paged] = said
                continue
            if decoder.graphs is None:
                if device.type == "cuda":
                    raise Disagreement(decoder.graphs_off_reason)
                raise Skipped(decoder.graphs_off_reason)
            num_graphs += decoder.graphs.num_graphs
            capture_s += decoder.graphs.capture_s
            off = max([off, *map(_distance, said, eager[paged])])
    return (
        f"off the eager path by {_within(off, ALLOWED[dtype])}; {num_graphs} graphs captured in "
        f"{capture_s:.2f} s"
    )


def _kernels(device: torch.device) -> str:
    """Whether decoding and prompts take few launches, over slots and over pages, and why."""
    said = []
    for family in SHAPES:
        model = _model(family, torch.bfloat16, device)
        for pool in (slot_pool(model, 1, 16), paged_pool(model, 1, 16)):
            found = fused.choose(pool, SHAPES[family].heads)
            if not found.usable:
                if found.failed:
                    raise Disagreement(found.reason)
                raise Skipped(found.reason)
            if found.flash is None:
                raise Disagreement(found.flash_reason)
            said += [found.reason, found.flash_reason]
    telling = fused.choose_telling(device, torch.bfloat16)
    if not telling.usable:
        raise Disagreement(telling.reason)
    return "; ".join([*sorted(set(said)), telling.reason])


def _paged_attention(device: torch.device) -> str:
    """Which attention reads pages, and why."""
    model = _model("llama", torch.bfloat16, device)
    pool = PagedPool(model.kv_dims, 1, 4, BLOCK_GRANULE_TOKENS)
    chosen = choose(pool, SHAPES["llama"].heads)
    if chosen.varlen is None:
        raise Skipped(chosen.reason)
    return chosen.reason


def _checkpoint(device: torch.device) -> str:
    """A model written, loaded through page-locked memory, dropped, and brought back from it."""
    dtype = _usual_dtype(device)
    with _folder("llama", dtype, device) as (folder, expected):
        model = load(folder, depth=1, device=device, dtype=dtype, host_copy=True, pinned=True)
        model.grow(4)
        off = _distance(_said(Decoder(model, slot_pool(model, 3, 512))), expected)
        model.shrink(1)
        model.grow(4)
        model.unload()
        report = model.grow(4)
        again = _distance(_said(Decoder(model, slot_pool(model, 3, 512))), expected)
        said = f"off what was written by {_within(max(off, again), ALLOWED[dtype])}"
        if report.source != "host":
            raise Disagreement(f"the weights came from {report.source}, not from host memory")
        copy = model.host_copy
        if device.type == "cuda" and copy is not None and not copy.is_pinned:
            raise Disagreement(copy.note)
        # What a GPU wrote in 16 bits is checked by its guard on a processor too.
        note = load(folder, device="cpu").guard_note
    return f"{said}; on the processor {note}"


def _loading_beside(device: torch.device) -> str:
    """Layers that arrive in a thread, on a stream of its own, while another model decodes."""
    dtype = _usual_dtype(device)
    with _folder("opt", dtype, device) as (folder, expected):
        # In single precision, so that no two tokens are as likely as rounding can tell.
        serving = _model("llama", torch.float32, device)
        decoder = Decoder(serving, slot_pool(serving, 2, 512))
        alone = generate(decoder, _texts()[::2], 8)
        arriving = load(folder, depth=1, device=device, dtype=dtype, host_copy=True, pinned=True)
        failures: list[BaseException] = []

        def bring_in() -> None:
            try:
                with side_stream(device):
                    arriving.grow(4)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=bring_in)
        thread.start()
        beside = [generate(decoder, _texts()[::2], 8) for _ in range(3)]
        thread.join()
        if failures:
            raise failures[0]
        if any(tokens != alone for tokens in beside):
            raise Disagreement("tokens changed while weights were arriving")
        off = _distance(_said(Decoder(arriving, slot_pool(arriving, 3, 512))), expected)
    return f"tokens stayed the same; what arrived is off by {_within(off, ALLOWED[dtype])}"


def _training(device: torch.device) -> str:
    """A few iterations of the small family's training, written and loaded again."""
    preset = Preset(
        name="doctor",
        models=(),
        iterations=24,
        window_tokens=64,
        rows=8,
        long_window_tokens=128,
        long_rows=4,
        long_share=0.2,
        learning_rate=1e-2,
        early_weight=0.5,
        budget_s=60.0,
        held_out_tokens=2048,
        max_train_bytes=100_000,
    )
    plan = ModelPlan("doctor-2l", {"tables": 1.0}, 2, 128, 2, 256, (1, 2), 1.0)
    with tempfile.TemporaryDirectory() as folder:
        made = train_model(
            plan,
            preset,
            Path(folder),
            seed=0,
            device=device,
            budget_s=preset.budget_s,
            on_reading=lambda reading: None,
        )
        note = load(Path(folder) / plan.name, device=device).guard_note
    loss = made["held_out"]["tables"]["nll_nats"][-1]
    # An untrained model of bytes is at ln 256 = 5.5 nats.
    if not loss < 5.0:
        raise Disagreement(f"the held-out loss is {loss} nats after {made['iterations']} of them")
    return f"{made['iterations']} iterations to {loss:.2f} nats a byte; {note}"


def _launches(device: torch.device) -> str:
    """A chain of launches, eager and replayed."""
    timer = timer_for(device)
    eager = time_launch(device, timer, "eager", 3)
    replayed = time_launch(device, timer, "graph", 3)
    if isinstance(eager, str):
        raise Disagreement(eager)
    if isinstance(replayed, str):
        if device.type == "cuda":
            raise Disagreement(replayed)
        raise Skipped(replayed)
    return f"{eager.seconds * 1e6:.1f} us a launch eager, {replayed.seconds * 1e6:.1f} us replayed"


def _bench(device: torch.device) -> str:
    """One short reading of everything that is timed."""
    model = _model("llama", _usual_dtype(device), device)
    tokens = sample_tokens(SHAPES["llama"].vocab, 4096)
    bench = Bench(model, tokens, max_batch=4, max_context=256)
    if device.type == "cuda":
        captured = bench.capture_graphs()
        if isinstance(captured, str):
            raise Disagreement(captured)
    bench.probe()
    jobs = [
        job
        for mode in bench.modes
        for job in (
            Job("decode_layers", model.name, mode, (1, 4), 3, 64, 64),
            Job("iteration", model.name, mode, (2,), 3, 64, 64),
            Job("exit_iteration", model.name, mode, (2, 4), 3, 64, 64),
            Job("split_iteration", model.name, mode, (2,), 3, 64, 64),
            Job("kv_fill", model.name, mode, (2,), 3),
        )
    ]
    jobs += [
        Job("prefill_layers", model.name, "eager", (4,), 2, 32, None, 16),
        Job("iteration", model.name, "eager", (4,), 2, 0, None, 16),
        Job("head", model.name, "eager", batch=3),
        Job("check", model.name, "eager", batch=3),
    ]
    seconds = {}
    for job in jobs:
        for reading in bench.time(job):
            if reading.seconds is None or not reading.seconds > 0.0:
                raise Disagreement(f"{job.quantity} took {reading.seconds} s")
            seconds[f"{job.quantity} {job.mode}"] = reading.seconds
    found = ", ".join(
        f"{name.strip()} {one * 1e3:.2f} ms" for name, one in seconds.items() if "decode" in name
    )
    bench.close()
    return f"{len(jobs)} kinds of readings; 4 layers, {found}"


def _time_per_layer(device: torch.device) -> str:
    """Layers as wide as real ones from graphs, beside what the device cannot go below.

    That is the larger of a layer's launches and of reading its weights and KV, as `check` has it.
    """
    if device.type != "cuda":
        raise Skipped("a processor is not asked for layers of this size")
    timer = timer_for(device)
    launch = time_launch(device, timer, "graph", 3)
    if isinstance(launch, str):
        raise Disagreement(launch)
    num_bytes = COPY_BYTES[device.type]
    copy, moved = time_copy(num_bytes, device, timer, 3)
    copies, reads = moved / copy.seconds, num_bytes / time_read(num_bytes, device, timer, 3).seconds
    said = [
        f"{copies / 1e12:.2f} TB/s copied, {reads / 1e12:.2f} TB/s read, "
        f"{launch.seconds * 1e6:.2f} us a launch"
    ]
    for name, shape in LAYERS.items():
        model = random_model(shape, 4, (2, 4), device=device)
        tokens = sample_tokens(shape.vocab, 4096)
        bench = Bench(model, tokens, max_batch=LAYER_ROWS[-1], max_context=LAYER_CONTEXT)
        captured = bench.capture_graphs()
        if isinstance(captured, str):
            raise Disagreement(captured)
        for rows in LAYER_ROWS:
            launches = bench.launches_per_layer(rows, LAYER_CONTEXT)
            load = (rows, LAYER_CONTEXT, LAYER_CONTEXT)
            job = Job("decode_layers", model.name, "graph", (2, 4), *load)
            two, four = (reading.seconds or 0.0 for reading in bench.time(job))
            read = model.plan(4).layer_bytes
            read += rows * LAYER_CONTEXT * model.kv_dims.bytes_per_token_layer
            floor_s = max(launches * launch.seconds, read / max(copies, reads))
            layer_s = (four - two) / 2
            said.append(
                f"{name} with {rows} x {LAYER_CONTEXT} tokens {layer_s * 1e6:.0f} us in "
                f"{launches} launches, {layer_s / floor_s:.2f} of its floor"
            )
        bench.close()
        model.unload()
    return "; ".join(said)


def _energy(device: torch.device) -> str:
    """A window of the best meter while the device works."""
    board = board_of(device)
    meter = best_meter(device.type, board)
    if isinstance(meter, NoMeter):
        raise Skipped(meter.reason)
    square = torch.randn(1024, 1024, device=device).to(_usual_dtype(device))
    with window_of(meter) as window:
        end_s = time.perf_counter() + _WINDOW_S
        while time.perf_counter() < end_s:
            for _ in range(50):
                torch.mm(square, square)
            synchronise(device)
        found = window.close(_WINDOW_S)
    if isinstance(found, Absence):
        raise Disagreement(found.reason)
    if not found.watts > 0.0:
        raise Disagreement(f"{found.source} says {found.watts} W of a device at work")
    said = f"{found.source}: {found.watts:.0f} W at work"
    if found.cross_watts is not None:
        said += f", {found.cross_source}: {found.cross_watts:.0f} W"
    if meter.tick_s is not None:
        said += f"; it ticks every {meter.tick_s * 1e3:.0f} ms"
    state = board.state()
    return said if state.sm_clock_mhz is None else f"{said}; {state.sm_clock_mhz:.0f} MHz"


def _usual_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _model(family: str, dtype: torch.dtype, device: torch.device) -> EarlyExitLM:
    """A small stock model of random weights, the same wherever it is made."""
    torch.manual_seed(0)
    build: Any = LlamaForCausalLM if family == "llama" else OPTForCausalLM
    stock = build(config_of(SHAPES[family])).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in stock.parameters():
            # Of a scale at which every part of a layer has a say in the logits.
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return from_stock(stock.to(device=device, dtype=dtype), EXITS, name=f"doctor-{family}")


def _texts() -> list[list[int]]:
    """Token ids of prompts with the tokens fed after them."""
    generator = torch.Generator().manual_seed(1)
    vocab = SHAPES["llama"].vocab
    return [
        torch.randint(vocab, (count + FED_TOKENS,), generator=generator).tolist()
        for count in PROMPT_TOKENS
    ]


def _said(decoder: Decoder) -> Tensor:
    """Logits [rows, fed tokens + 1, vocab] after each prompt and after each token fed then."""
    pool, model, texts = decoder.pool, decoder.model, _texts()
    rows = [pool.admit(len(text)) for text in texts]
    counts = [len(text) - FED_TOKENS for text in texts]
    halves = [count // 2 for count in counts]
    decoder.extend(rows, [t[:n] for t, n in zip(texts, halves, strict=True)], [0] * len(rows))
    rest = [t[h:n] for t, h, n in zip(texts, halves, counts, strict=True)]
    said = [model.logits(decoder.extend(rows, rest, halves), model.depth_level)]
    for fed in range(FED_TOKENS):
        positions = [count + fed for count in counts]
        ids = [text[place] for text, place in zip(texts, positions, strict=True)]
        hidden = decoder.begin(rows, ids, positions)
        for first, last in decoder.segments():
            hidden = decoder.segment(rows, hidden, positions, first, last)
        said.append(model.logits(hidden, model.depth_level))
    pool.clear()
    return torch.stack(said, dim=1)


def _some_rows(decoder: Decoder) -> list[Tensor]:
    """Two rows of three that go on alone after the first exit, one place apart.

    What the exits say of them, token by token, confidences, nats, and the keys and values that are
    filled for the row that left.
    """
    pool, model, texts = decoder.pool, decoder.model, _texts()
    rows = [pool.admit(12) for _ in texts]
    starts = [4] * len(rows)
    decoder.extend(rows, [text[:4] for text in texts], [0] * len(rows))
    place = decoder.place(rows, starts, targets=[5, 6, 7])
    hidden = decoder.run(place, decoder.embed(place, [1, 2, 3]), *decoder.segments()[0])
    said = [decoder.tell(place, hidden, 0)[:, : len(rows)].clone()]
    left, staying = hidden[1:2].clone(), hidden[[0, 2]]
    decoder.fill([1], left, [4], decoder.segments()[0][1], model.depth)
    place = decoder.place([0, 2], [4, 4], targets=[5, 7])
    for level, segment in enumerate(decoder.segments()[1:], start=1):
        staying = decoder.run(place, staying, *segment)
        said.append(decoder.tell(place, staying, level)[:, :2].clone())
    filled = [part for layer in range(model.depth) for part in pool.read(layer, [1], 5)]
    pool.clear()
    return [*(part for one in said for part in one), *filled]


@contextmanager
def _folder(family: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Path, Tensor]]:
    """A checkpoint that is gone afterwards, with what its model says."""
    with tempfile.TemporaryDirectory() as name:
        model = _model(family, dtype, device)
        expected = _said(Decoder(model, slot_pool(model, 3, 512)))
        save(model, name)
        yield Path(name), expected


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinite where a value is not finite."""
    found, expected = found.double().cpu(), expected.double().cpu()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm())


def _within(off: float, allowed: float) -> str:
    if not off <= allowed:
        raise Disagreement(f"off by {off:.1e}, {allowed:.0e} is allowed")
    return f"{off:.1e}"
