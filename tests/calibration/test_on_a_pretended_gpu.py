"""What only runs on a GPU runs on a pretended one, which refuses what a GPU would."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
import torch

from calibration import doctor
from calibration.measuring import grid, load_trials
from calibration.measuring import measure as measuring
from calibration.measuring.bench import Bench
from calibration.measuring.capture import Captured, NotCaptured, capture
from calibration.measuring.floors import COPY_BYTES
from calibration.measuring.measure import MeasureSettings, Outcome, measure
from calibration.measuring.pace import Pace
from calibration.measuring.readings import READINGS_FILE, Reading, read_points
from calibration.measuring.sources import sample_tokens
from calibration.model import launches
from calibration.model.confidence import Confidence
from calibration.model.decode import Decoder, generate, slot_pool
from calibration.model.early_exit import EarlyExitLM, from_stock, load, save
from calibration.model.graphs import WARM_UPS, CaptureError, CudaRecorder
from calibration.model.host_copy import HostCopy
from calibration.model.memory import available_bytes
from calibration.serving.host import Host
from calibration.serving.prepared import ServeSettings
from calibration.serving.serve import serve
from helios_sim.profiles.files import load_profile
from helios_sim.runs.records import read_run
from reports.fidelity.paired import pairs_of
from reports.gpu import kernels
from tests.calibration import tiny
from tests.calibration.fake_nvml import FakeNvml
from tests.calibration.pretend_cuda import TORCH, Gpu, pretending
from tests.calibration.serving import family, model_of, write_profile

CUDA = torch.device("cuda")
SCENARIO = """
name = "tiny"
seed = 3

[workload]
num_requests = 5
arrivals = { kind = "poisson", rate_per_s = 1e6 }
prompt = { kind = "uniform", min_tokens = 4, max_tokens = 12 }
output = { kind = "geometric", mean_tokens = 5, max_tokens = 8 }
domains = [{ name = "code", share = 1.0 }]

[fleet]
profile = "profile"

[serving]
max_batch = 2
block_tokens = 8
expected_prompt_tokens = 8
expected_output_tokens = 5

[[policy]]
use = "helios"
evaluation_requests = 1
reassess_requests = 4

[[policy]]
use = "vanilla"

[[policy]]
use = "ee-single"
label = "ee-wait"
exit_mode = "wait"
"""

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="a torch built for CUDA runs the tests marked cuda"
    ),
    pytest.mark.skipif(
        not torch.__version__.startswith(TORCH) or sys.platform != "linux",
        reason=f"the pretended device knows the inside of torch {TORCH} on Linux",
    ),
]

serves = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 24),
    reason="in inference mode earlier releases ask for a view that the pretended device lacks",
)


@contextmanager
def on_a_gpu(patch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The pretended GPU, with a board, and without the seconds its pace would take to find."""
    patch.setitem(sys.modules, "pynvml", FakeNvml())
    for module in ("measuring.measure", "serving.serve"):
        patch.setattr(f"calibration.{module}.measure_pace", lambda device: Pace(1e-3, 1e-3))
    # Triton's interpreter writes where a pretended capture does not look.
    patch.setattr(launches, "triton", None)
    patch.setitem(COPY_BYTES, "cuda", 2**20)
    patch.setattr("calibration.measuring.timing.CUDA_SAMPLE_S", 1e-4)
    with pretending() as made:
        yield made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with on_a_gpu(monkeypatch) as made:
        yield made


def stock() -> EarlyExitLM:
    return from_stock(tiny.stock_model("llama-gqa").to(CUDA), (1, 2, 4))


def test_nothing_the_doctor_looks_at_fails(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_WINDOW_S", 0.1)
    monkeypatch.setattr(doctor, "LAYERS", {"small": doctor.SHAPES["llama"]})
    monkeypatch.setattr(doctor, "LAYER_ROWS", (1, 2))
    monkeypatch.setattr(doctor, "LAYER_CONTEXT", 256)
    # One precision shows every branch, and one family what graphs do.
    left_out = ("float32", "opt in bfloat16, graphs")
    kept = [one for one in doctor.checks() if not any(name in one[0] for name in left_out)]
    monkeypatch.setattr(doctor, "checks", lambda: kept)
    told: list[str] = []
    assert doctor.command(CUDA, told.append), "\n".join(told)
    assert told[-1].startswith(f"{len(kept) - 1} checks passed, 0 failed, 1 were skipped")
    assert any("our kernels need Triton, which is not installed" in line for line in told)
    assert any("2 x 256 tokens" in line and "of its floor" in line for line in told)
    assert any("varlen_attn passed its self-test" in line for line in told)


def test_where_a_layer_spends_its_time_is_told(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "shapes", lambda: {"small": doctor.SHAPES["llama"]})
    monkeypatch.setattr(kernels, "LOADS", ((2, 64),))
    monkeypatch.setattr(kernels, "CACHE_BYTES", 1e5)
    bench = kernels.Bench()
    # No profiler looks into a pretended device.
    layer, profiled = kernels.layers(bench)
    assert profiled.startswith("    no kernels: ")
    assert layer.startswith("small 2 x 64: stock ") and layer.count("of the floor") == 2
    (attended,) = kernels.attention(bench)
    assert "masked " in attended and "ours in 32* " in attended
    found = list(kernels.multiplying(bench))
    assert len(found) == 8 and all("then added" in line for line in found)
    candidates = [line.partition(":")[0] for line in kernels.candidates(bench)]
    assert candidates[:2] == ["small qkv 1 row", "small qkv 8 rows"]
    assert len(candidates) == 2 * 4


def test_without_it_there_is_no_gpu() -> None:
    with pretending():
        assert torch.zeros(2, device="cuda").is_cuda
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_a_tensor_of_the_host_among_the_devices_is_refused(gpu: Gpu) -> None:
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    assert (there * torch.tensor(2.0)).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="on the same device"):
        there + here
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.nn.functional.embedding(torch.tensor([0]), torch.ones(4, 2, device=CUDA))
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.randn(2, device=CUDA, generator=torch.Generator())


def test_gradients_and_autocast_work_as_on_a_gpu(gpu: Gpu) -> None:
    layer = torch.nn.Linear(4, 2).to(CUDA)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        made = layer(torch.ones(3, 4, device=CUDA))
    assert made.dtype is torch.bfloat16
    made.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    assert layer.weight.grad.tolist() == [[3.0] * 4] * 2


@pytest.mark.parametrize("waits", ["tolist", "nonzero", "copy", "pin", "synchronize"])
def test_what_waits_for_the_device_is_refused_in_a_capture_and_named(gpu: Gpu, waits: str) -> None:
    values = torch.ones(3, device=CUDA)
    body = {
        "tolist": values.tolist,
        "nonzero": values.nonzero,
        "copy": lambda: torch.tensor([1.0], device=CUDA),
        "pin": lambda: torch.ones(3).pin_memory(),
        "synchronize": torch.cuda.synchronize,
    }[waits]
    serving = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        CudaRecorder(CUDA).record(lambda: (body(), values)[1], 0)
    found = capture(body, CUDA)
    assert isinstance(found, NotCaptured)
    assert "not permitted when stream is capturing" in found.reason
    assert torch.cuda.current_stream() is serving


def test_a_replay_reads_and_writes_the_buffers_that_were_captured(gpu: Gpu) -> None:
    given, total = torch.ones(2, device=CUDA), torch.zeros(2, device=CUDA)
    recording = CudaRecorder(CUDA).record(lambda: total.add_(given) * 2.0, WARM_UPS)
    assert total.tolist() == [2.0, 2.0], "the warm-ups ran, and the capture did not"
    given.fill_(5.0)
    assert recording.replay().tolist() == [14.0, 14.0]
    assert total.tolist() == [7.0, 7.0]


def test_a_later_graph_of_the_pool_loses_its_output_to_an_earlier_one(gpu: Gpu) -> None:
    recorder, given = CudaRecorder(CUDA), torch.ones(2, device=CUDA)
    first, second = (recorder.record(lambda by=by: given * by, 0) for by in (2.0, 3.0))
    kept = second.replay()
    assert kept.tolist() == [3.0, 3.0]
    first.replay()
    assert all(value != value for value in kept.tolist())


def test_a_graph_is_not_replayed_after_its_memory_went(gpu: Gpu) -> None:
    held = [torch.ones(2, device=CUDA)]
    recording = CudaRecorder(CUDA).record(lambda: held[0] * 2.0, 0)
    recording.replay()
    held.clear()
    with pytest.raises(RuntimeError, match="memory it reads was given back"):
        recording.replay()


def test_captured_work_keeps_the_tensors_it_works_on(gpu: Gpu) -> None:
    def chain() -> Captured | NotCaptured:
        value = torch.ones(1, device=CUDA)
        return capture(lambda: value.mul_(1.0), CUDA)

    found = chain()
    assert isinstance(found, Captured)
    found.replay()


def test_work_on_another_stream_must_be_waited_for(gpu: Gpu) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        made = torch.ones(2, device=CUDA)
    with pytest.raises(RuntimeError, match="let it wait"):
        made + 1.0
    torch.cuda.current_stream().wait_stream(side)
    assert (made + 1.0).tolist() == [2.0, 2.0]


def test_host_memory_must_stay_as_it_is_until_it_is_copied(gpu: Gpu) -> None:
    copy = HostCopy([4], torch.float32, True, CUDA)
    assert copy.is_pinned
    copy.buffer.fill_(1.0)
    block = torch.empty(4, device=CUDA)
    block.copy_(copy.part(0), non_blocking=True)
    copy.buffer.fill_(2.0)
    with pytest.raises(RuntimeError, match="while it was being copied"):
        torch.cuda.synchronize()


def test_memory_that_cannot_be_page_locked_is_said_and_used_all_the_same(
    gpu: Gpu, tmp_path: Path
) -> None:
    save(from_stock(tiny.stock_model("opt"), (1, 2, 4)), tmp_path)
    gpu.refuses_to_register = 2
    model = load(tmp_path, device=CUDA, pinned=True)
    assert model.host_copy is not None
    assert "CUDA error 2" in model.host_copy.note
    assert model.depth == 4


def test_decoding_with_graphs_waits_for_the_device_only_where_tokens_are_read(gpu: Gpu) -> None:
    model = stock()
    decoder = Decoder(model, slot_pool(model, 2, 64))
    prompts = [tiny.prompt(5), tiny.prompt(9, 1)]
    eager = generate(decoder, prompts, 4)
    assert decoder.use_graphs((2,), 64), decoder.graphs_off_reason
    gpu.syncs.clear()
    assert generate(decoder, prompts, 4) == eager
    assert gpu.syncs == {"a copy to the host": 1}


def test_graphs_count_what_they_keep_and_not_what_was_idle_before(gpu: Gpu) -> None:
    model = stock()
    bench = Bench(model, sample_tokens(256), max_batch=2, max_context=32)
    idle = torch.empty(2**24, device=CUDA)
    del idle
    bench.capture_graphs()
    # Less than what was idle, and than what the device keeps for itself.
    assert all(0 < (reading.bytes or 0) < 2**24 for reading in bench.memory())
    bench.close()


@dataclass(frozen=True)
class Measurement:
    """What was asked of a measurement, and what it said when it was done."""

    settings: MeasureSettings
    done: Outcome


@pytest.fixture(scope="module")
def measurement(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """The shortest measurement of a tiny checkpoint, with a board's windows of an instant."""
    folder = tmp_path_factory.mktemp("measurement")
    save(from_stock(tiny.stock_model("llama-gqa"), (1, 2, 4), name="tiny"), folder / "tiny")
    settings = MeasureSettings(
        (str(folder / "tiny"),),
        folder / "points",
        device="cuda",
        budget_s=90.0,
        max_batch=2,
        max_context=32,
        traces=False,
    )
    with pytest.MonkeyPatch.context() as patch, on_a_gpu(patch):
        shorten(patch)
        return Measurement(settings, measure(settings))


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Let measuring take the coarsest grid, small copies and windows that wait for nothing."""
    patch.setattr(grid, "RICHNESS", grid.RICHNESS[-1:])
    patch.setattr(load_trials, "LOAD_TRIALS", 1)
    patch.setattr(measuring, "_COOL_DOWN_S", 0.0)
    patch.setattr(measuring, "_LINK_BYTES", 2**18)
    patch.setitem(measuring._LOAD_BYTES, "cuda", (2**14, 2**18))
    # The made-up counter ticks every few milliseconds.
    patch.setattr(measuring._Session, "_window_s", lambda _: 0.1)


def test_measuring_gives_eager_and_graph_readings_and_joules(measurement: Measurement) -> None:
    done, out = measurement.done, measurement.settings.out
    assert done.left_out == 0, done.notes
    points = read_points(out)
    decode = points.filter(pl.col("quantity") == "decode_layers")
    assert set(decode["mode"]) == {"eager", "graph"}
    wanted = {"graph_capture", "capture_run", "capture_fill", "load_host_pinned", "launch_floor"}
    assert wanted <= set(points["quantity"])
    metered = points.filter(pl.col("quantity") == "decode_energy")
    assert metered.height > 0 and (metered["joules"] > 0).all()
    links = points.filter((pl.col("quantity") == "copy_bandwidth") & (pl.col("mode") == "link"))
    assert links["bytes"].to_list() == [2**18] * 3
    written = json.loads((out / "environment.json").read_text())
    assert written["models"]["tiny"]["batch_buckets"] == [1, 2]
    assert written["device"]["kind"] == "cuda"
    for name, said in written["models"]["tiny"]["kernels"].items():
        assert said.startswith("not usable: "), name
    notes = [note for note in done.notes if note.startswith("tiny: the kernel ")]
    assert [note.split()[3] for note in notes] == ["fusion", "flash", "telling"]
    assert (points["bytes"].drop_nulls() >= 0).all()


def test_what_was_to_be_replayed_is_left_out_where_capturing_fails_when_resumed(
    gpu: Gpu, measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    out = tmp_path / "points"
    shutil.copytree(measurement.settings.out, out)
    lines = (out / READINGS_FILE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"quantity": "decode_layers"' not in line]
    assert len(kept) < len(lines)
    (out / READINGS_FILE).write_text("".join(kept))

    def refuse(self: CudaRecorder, body: Any, count: int) -> Any:
        raise CaptureError("no memory is left")

    monkeypatch.setattr(CudaRecorder, "record", refuse)
    done = measure(replace(measurement.settings, out=out, resume=True))
    decode = read_points(out).filter(pl.col("quantity") == "decode_layers")
    assert set(decode["mode"]) == {"eager"}
    assert any("of the plan cannot be taken: they need CUDA graphs" in note for note in done.notes)
    written = json.loads((out / "environment.json").read_text())
    assert written["models"]["tiny"]["batch_buckets"] == [1, 2]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two checkpoints, their profile and a scenario."""
    models = [model_of("small", (2, 4), seed=1), model_of("large", (2, 4, 6), seed=2)]
    family(tmp_path / "family", 0.05)
    write_profile(tmp_path / "profile", models, 0.05)
    (tmp_path / "tiny.toml").write_text(SCENARIO)
    return tmp_path


def served(place: Path, policy: str, device: str, graphs: bool = True) -> Path:
    settings = ServeSettings((place / "family",), (policy,), device=device, graphs=graphs)
    (one,) = serve(place / "tiny.toml", place / f"{policy}-{device}", settings)
    return one.folder


@serves
def test_served_tokens_are_those_of_a_processor(place: Path, gpu: Gpu) -> None:
    runs = [served(place, "vanilla", device) for device in ("cpu", "cuda")]
    found = [pl.read_parquet(run / "tokens.parquet").sort("request_id", "place") for run in runs]
    (said,) = read_run(runs[1]).environment["kv_pools"].values()
    assert re.search(r"[1-9]\d* graphs captured in", said)
    assert found[0].height > 10
    assert found[0]["token"].to_list() == found[1]["token"].to_list()


@serves
def test_served_and_measured_iterations_are_paired_from_graphs(
    place: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    take = Bench.time

    def watched(bench: Bench, job: grid.Job, patience_s: float) -> Iterator[Reading]:
        modes.append(job.mode)
        return take(bench, job, patience_s)

    monkeypatch.setattr(Bench, "time", watched)
    family_of = [place / "family"]
    (pair,) = pairs_of(place / "profile", family_of, "large", 4, rows=2, turns=1, device="cuda")
    assert pair.served_s > 0.0
    assert pair.measured_s > 0.0
    assert modes == ["graph"]


@serves
@pytest.mark.parametrize("kv", ["slots", "pages"])
def test_before_the_clock_prompts_of_every_size_and_graphs_of_every_load_have_run(
    place: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, kv: Literal["slots", "pages"]
) -> None:
    prefilled: list[int] = []
    warm_ups: list[int] = []
    begun: list[int] = []
    extend, record, play = Decoder.extend, CudaRecorder.record, Host.play

    def extending(self: Decoder, rows: Any, ids: Any, *given: Any, **named: Any) -> Any:
        prefilled.append(sum(map(len, ids)))
        return extend(self, rows, ids, *given, **named)

    def recording(self: CudaRecorder, body: Any, count: int) -> Any:
        warm_ups.append(count)
        return record(self, body, count)

    def playing(self: Host) -> None:
        begun.extend((len(prefilled), len(warm_ups)))
        play(self)

    monkeypatch.setattr(Decoder, "extend", extending)
    monkeypatch.setattr(CudaRecorder, "record", recording)
    monkeypatch.setattr(Host, "play", playing)
    settings = ServeSettings((place / "family",), ("helios",), device="cuda", kv=kv)
    serve(place / "tiny.toml", place / "run", settings)
    at_prefill, at_record = begun
    # The longest request has fewer than 16 tokens, and two are prefilled together.
    assert {1, 2, 4, 8} <= set(prefilled[:at_prefill])
    assert max(prefilled[:at_prefill]) > 16
    assert set(warm_ups[:at_record]) >= {WARM_UPS}
    assert len(warm_ups) > at_record
    assert set(warm_ups[at_record:]) == {0}


@serves
def test_a_candidate_may_have_fewer_positions_than_another_ones_requests(
    place: Path, gpu: Gpu
) -> None:
    """Before the clock no row goes beyond what its model allows."""
    models = [
        model_of("small", (2, 4), seed=1, positions=12),
        model_of("large", (2, 4, 6), seed=2),
    ]
    for model in models:
        model.confidence = Confidence("max-softmax", 0.05)
        shutil.rmtree(place / "family" / model.spec.name)
        save(model, place / "family" / model.spec.name)
    shutil.rmtree(place / "profile")
    write_profile(place / "profile", models, 0.05)
    run = read_run(served(place, "vanilla", "cuda"))
    assert run.requests["generated_tokens"].sum() > 0


@serves
def test_a_run_says_where_graphs_could_not_be_had(
    place: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: CudaRecorder, body: Any, count: int) -> Any:
        raise CaptureError("no memory is left")

    monkeypatch.setattr(CudaRecorder, "record", refuse)
    (said,) = read_run(served(place, "vanilla", "cuda")).environment["kv_pools"].values()
    assert said.endswith("eagerly: capturing failed: no memory is left")


@serves
def test_the_pace_of_the_processor_beside_a_gpu_is_not_the_gpus(place: Path, gpu: Gpu) -> None:
    assert "pace_during" not in read_run(served(place, "vanilla", "cuda")).environment


@serves
def test_prompts_of_one_token_are_prefilled_without_graphs(place: Path, gpu: Gpu) -> None:
    text = (
        (place / "tiny.toml")
        .read_text()
        .replace("min_tokens = 4, max_tokens = 12", "min_tokens = 1, max_tokens = 1")
    )
    (place / "tiny.toml").write_text(text)
    iterations = pl.read_parquet(served(place, "vanilla", "cuda") / "iterations.parquet")
    prefills = iterations.filter(pl.col("kind") == "prefill")
    assert set(prefills["prompt_tokens"]) <= {1, 2}
    assert prefills["captured_graphs"].sum() == 0
    assert iterations["captured_graphs"].sum() > 0


@serves
def test_a_row_that_is_done_leaves_the_graphs_to_its_static_batch(place: Path, gpu: Gpu) -> None:
    """Also where it was done with its only token, so that its KV is that of a prompt of one."""
    text = (place / "tiny.toml").read_text().replace("[serving]", '[serving]\nbatching = "static"')
    text = text.replace("min_tokens = 4, max_tokens = 12", "min_tokens = 1, max_tokens = 1")
    output = '{ kind = "values", values = [1, 1, 6] }'
    text = re.sub("output = .*", f"output = {output}", text).replace(
        "max_batch = 2", "max_batch = 5"
    )
    (place / "tiny.toml").write_text(text)
    folder = served(place, "vanilla", "cuda")
    decodes = pl.read_parquet(folder / "iterations.parquet").filter(pl.col("kind") == "decode")
    assert (decodes["batch"] > decodes["rows"]).any()
    assert decodes["captured_graphs"][0] > 0


@serves
@pytest.mark.parametrize("policy", ["vanilla", "ee-wait"])
def test_an_iteration_captures_what_it_wants_and_what_is_not_there(
    place: Path, gpu: Gpu, policy: str
) -> None:
    """Embedding, segments that run and segments that are filled, each once a bucket of rows.

    In 32 bits no kernel says an exit's word, so that no graph is for that.
    """
    folder = served(place, policy, "cuda")
    profile = load_profile(place / "profile")
    there: set[tuple[str, int, float]] = set()
    captured = 0
    for row in pl.read_parquet(folder / "iterations.parquet").iter_rows(named=True):
        model = profile.model(row["model"])
        rows = float(model.padded_rows(8)[row["batch"]])
        segments = list(pairwise((0, *model.model.exit_layers)))
        wanted = {("embed", 0, rows)}
        for first, last in segments:
            wanted.add(("run" if first < row["layers"] else "fill", last, rows))
        new = wanted - there if row["kind"] == "decode" else set()
        there |= new
        layers = {last: last - first for first, last in segments}
        assert (row["captured_graphs"], row["captured_exits"]) == (len(new), 0)
        for kind, column in (("run", "captured_layers"), ("fill", "captured_filled_layers")):
            assert row[column] == sum(layers[last] for which, last, _ in new if which == kind)
        captured += len(new)
    assert captured > 3


@serves
def test_weights_arrive_beside_serving(place: Path, gpu: Gpu) -> None:
    run = read_run(served(place, "helios", "cuda", graphs=False))
    assert run.environment["loads"] == "beside serving"
    assert run.environment["loads_waited_for"] == 0
    assert (run.requests["generated_tokens"] == run.requests["output_tokens"]).all()


@serves
@pytest.mark.parametrize("found", ["before the load", "on the way"])
def test_serving_waits_for_weights_that_the_device_has_no_room_for(
    place: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """The simulator would lend them free blocks; here the pool holds its memory."""

    def beside(device: torch.device) -> int | None:
        is_beside = threading.current_thread().name == "load-weights"
        return 1000 if is_beside and device.type == "cuda" else available_bytes(device)

    # Some run on whenever the other candidate is wanted.
    text = (place / "tiny.toml").read_text().replace("num_requests = 5", "num_requests = 16")
    always = '[[policy]]\nuse = "always"\nreassess_requests = 3\n'
    (place / "tiny.toml").write_text(text + always)
    if found == "before the load":
        monkeypatch.setattr("calibration.serving.weights.available_bytes", lambda _: 100_000)
    else:
        monkeypatch.setattr("calibration.model.memory.available_bytes", beside)
    run = read_run(served(place, "always", "cuda", graphs=False))
    assert run.environment["loads_waited_for"] > 0
    assert (run.requests["generated_tokens"] == run.requests["output_tokens"]).all()
