"""Measuring for real, with tiny models: what is there at the end, and what ends it early."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.cli import main
from calibration.measuring import clocks, load_trials, timing
from calibration.measuring import measure as measuring
from calibration.measuring.bench import Bench
from calibration.measuring.board import BoardState
from calibration.measuring.grid import REACH, RICHNESS, SAMPLES, WARMUPS, Job, Probe
from calibration.measuring.measure import MeasureSettings, measure
from calibration.measuring.meters import Absence, Measurement, Replayed, to_json
from calibration.measuring.pace import Pace
from calibration.measuring.plan_file import PLAN_FILE, check_same, earlier_plan
from calibration.measuring.readings import (
    ENVIRONMENT_FILE,
    READINGS_FILE,
    Reading,
    alone_in,
    read_points,
    usual_reference_s,
)
from calibration.measuring.served import ServedLoad
from calibration.measuring.sources import find_sources, sample_tokens
from calibration.model.checkpoint import SETTINGS_FILE, WEIGHTS_FILE
from calibration.model.decode import Decoder
from calibration.model.early_exit import EarlyExitLM, from_stock, save
from calibration.model.fused import Fusion
from calibration.model.kv import SlotPool
from calibration.model.loading import LoadReport
from calibration.model.memory import TooLittleMemory
from calibration.options import parse_budget, parse_exits
from calibration.serving.iteration import Stepper
from calibration.serving.machine import ModelMachine
from helios_sim.errors import InputError
from helios_sim.policy.contract import ExitMode
from tests.calibration.serving import model_of
from tests.calibration.test_graphs import FakeRecorder
from tests.calibration.tiny import stock_model
from tests.shared_machine import undisturbed

BUDGET_S = 600.0
"""More than is used, so that a busy machine leaves nothing out: the coarsest grid is soon done."""

TURNS = 2 * REACH + 1
"""Iterations in which contexts grow before they are set back, where rows have room to grow."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The coarsest grid, samples of a fraction of a millisecond, nothing taken again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.measuring.grid.RICHNESS", RICHNESS[-1:])
        patch.setattr("calibration.measuring.timing.CPU_SAMPLE_S", 2e-4)
        patch.setattr("calibration.measuring.timing.DISTURBED_SHARE", 1.0)
        for module in ("pace", "timing"):
            patch.setattr(f"calibration.measuring.{module}.MOST_SETTLING", 1)
        patch.setitem(measuring.COPY_BYTES, "cpu", 2**20)
        patch.setattr(load_trials, "LOAD_TRIALS", 1)
        patch.setattr(measuring, "MOST_LOST_SHARE", 1.0)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "tiny-4l"
    save(from_stock(stock_model("llama"), (1, 2, 4), name="tiny-4l", tokenizer="bytes"), folder)
    return folder


def settings(checkpoint: Path, out: Path, **changes: Any) -> MeasureSettings:
    asked: dict[str, Any] = {
        "budget_s": BUDGET_S,
        "max_batch": 4,
        "max_context": 64,
        "traces": False,
    }
    return MeasureSettings((str(checkpoint),), out, **(asked | changes))


@pytest.fixture(scope="module")
def measured(quick: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of readings taken within a few seconds."""
    out = tmp_path_factory.mktemp("measured") / "points"
    done = measure(settings(checkpoint, out))
    assert done.num_readings == done.num_new > 0
    return out


@pytest.fixture
def bench(checkpoint: Path) -> Iterator[Bench]:
    (source,) = find_sources([str(checkpoint)])
    model = source.load(4, torch.device("cpu"), torch.float32)
    made = Bench(model, sample_tokens(256), max_batch=4, max_context=64)
    yield made
    made.close()


def run(*arguments: str) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def test_every_quantity_a_processor_has_is_measured(measured: Path) -> None:
    found = set(read_points(measured)["quantity"])
    assert found >= {
        "decode_layers",
        "prefill_layers",
        "iteration",
        "head",
        "check",
        "kv_fill",
        "copy_bandwidth",
        "launch_floor",
        "load_open",
        "load_disk",
        "load_host",
        "unload",
        "memory_weights",
        "memory_kv",
        "memory_reserve",
    }
    assert not found & {"idle_power", "decode_energy", "load_host_pinned", "graph_capture"}


def test_memory_is_copied_and_read(measured: Path) -> None:
    points = read_points(measured).filter(pl.col("quantity") == "copy_bandwidth")
    assert points["mode"].to_list().count("") == points["mode"].to_list().count("read") == 3
    moved = {mode: part["bytes"][0] for (mode,), part in points.group_by("mode")}
    assert moved[""] == 2 * moved["read"]


def test_times_are_positive_and_energy_without_a_meter_is_null(measured: Path) -> None:
    points = read_points(measured)
    timed = points.filter(~pl.col("quantity").str.starts_with("memory"))
    assert timed["seconds"].null_count() == 0
    assert (timed["seconds"] > 0).all()
    assert points["joules"].null_count() == points.height


@undisturbed
def test_deeper_stacks_take_longer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.measuring.timing.DISTURBED_SHARE", 0.05)
    job = Job("decode_layers", "tiny-4l", "eager", (1, 4), 4, 64, 64)
    shallow, deep = bench.time(job)
    assert shallow.seconds is not None
    assert deep.seconds is not None
    assert deep.seconds > 1.2 * shallow.seconds


def test_measured_bytes_are_the_predicted_ones(measured: Path) -> None:
    memory = read_points(measured).filter(pl.col("quantity").is_in(["memory_weights", "memory_kv"]))
    assert memory.height == 4
    for row in memory.iter_rows(named=True):
        assert row["bytes"] == pytest.approx(row["predicted_bytes"], rel=0.1)


def test_some_loads_are_held_out_and_some_rows_are_ragged(measured: Path) -> None:
    points = read_points(measured)
    held_out = points.filter(pl.col("purpose") == "held-out")
    assert set(held_out["quantity"]) >= {"decode_layers", "load_disk"}
    ragged = points.filter(pl.col("longest_context_tokens") > pl.col("context_tokens"))
    assert set(ragged.filter(purpose="fit")["quantity"]) == {"iteration", "decode_layers"}


def test_the_environment_says_where_readings_come_from(measured: Path) -> None:
    found = json.loads((measured / "environment.json").read_text())
    model = found["models"]["tiny-4l"]
    assert model["exit_layers"] == [1, 2, 4]
    assert model["shape"]["hidden"] == 64
    assert model["weights"] == "checkpoint"
    assert all(total > 0.0 for total in model["guard"]["logits_sums"])
    assert model["launches_per_layer"] > 10
    assert found["device"]["memory_bytes"] > 0
    assert found["dtype"] == "float32"
    assert "No energy meter" in found["meter"]["explanation"]
    pace = Pace(**found["pace"])
    assert pace.core_s > 0.0
    assert pace.memory_s > 0.0
    assert 0.0 < found["reference_s"] == usual_reference_s(read_points(measured))


def iteration(batch: int, context: int, prompt: int | None = None, longest: int = 0) -> Job:
    longest_tokens = None if prompt else max(longest, context)
    return Job("iteration", "tiny-4l", "eager", (2,), batch, context, longest_tokens, prompt)


def test_an_iteration_is_a_turn_of_the_serving_loop(bench: Bench) -> None:
    machine = ModelMachine(
        bench.model, bench.pool, bench.decoders["eager"], depth=2, free_running=False
    )
    load = ServedLoad(machine, bench.depths, lambda count, place: [place] * count)
    work = load.decoding([20, 31, 44])
    contexts = []
    for turn in range(3 * TURNS):
        work()
        rows = load.replica.batch.rows
        contexts.append([row.context for row in rows])
        assert [bench.pool.lengths[row.slot] for row in rows] == contexts[-1]
        assert {row.life.generated for row in rows} == {2 + turn % TURNS}
        (told,) = load.replica.tally.iterations[turn % TURNS :]
        assert told.outcome.context_tokens == sum(contexts[-1])
        assert (told.outcome.rows, told.outcome.layers, told.running) == (3, 2, 3)
    assert len(load.replica.tally.tokens) == 3 * TURNS
    means = [statistics.fmean(column) for column in zip(*contexts, strict=True)]
    assert means == [20.0, 31.0, 44.0]
    assert load.replica.window.seen + load.replica.window.breaches > 0
    batch = load.replica.batch
    assert batch.free_blocks + sum(row.blocks for row in batch.rows) == batch.pool_blocks
    bench.pool.check()


def test_prompts_that_are_measured_come_are_told_a_token_and_go(bench: Bench) -> None:
    work = bench.work(iteration(3, 0, 16), 2)
    for _ in range(3):
        work()
        assert bench.pool.num_rows == 0
    bench.pool.check()


def test_prompts_that_fill_the_pool_are_prefilled_in_one_iteration() -> None:
    """No blocks are kept free for rows that grow: nobody goes on."""
    model = model_of("long", (1, 2), positions=208)
    pool = SlotPool(model.kv_dims, 2, 3, 208)
    machine = ModelMachine(model, pool, Decoder(model, pool), depth=2, free_running=False)
    load = ServedLoad(machine, (1, 2), lambda count, place: [place] * count)
    work = load.prefilling(3, 208)
    for _ in range(2):
        work()
        assert not load.replica.batch.queue
        assert not load.replica.tally.iterations
        assert pool.num_rows == 0


@pytest.mark.parametrize("context", [1, 3, 64])
def test_iterations_of_any_context_stay_within_the_pool(bench: Bench, context: int) -> None:
    work = bench.work(iteration(2, context), 2)
    for _ in range(20):
        work()
    bench.pool.check()


def leaving(bench: Bench, mode: ExitMode) -> ServedLoad:
    """Rows that may leave at the exits 1 and 2 of a model loaded to 4 layers."""
    machine = ModelMachine(
        bench.model, bench.pool, bench.decoders["eager"], depth=4, free_running=False
    )
    return ServedLoad(machine, bench.depths, lambda count, place: [place] * count, mode)


@pytest.mark.parametrize(
    ("level", "layers", "checks", "heads", "filled"),
    [(0, 1, 1, 0, 3), (1, 2, 2, 0, 2), (2, 4, 2, 1, 0)],
)
def test_rows_that_wait_leave_together_at_the_exit_asked_for(
    bench: Bench, level: int, layers: int, checks: int, heads: int, filled: int
) -> None:
    load = leaving(bench, ExitMode.WAIT)
    work = load.decoding([20, 31, 44], level)
    for _ in range(2 * TURNS + 1):
        work()
        outcome = load.replica.tally.iterations[-1].outcome
        assert [token.level for token in outcome.emitted] == [level] * 3
        assert (outcome.layers, outcome.checks, outcome.heads) == (layers, checks, heads)
        assert (outcome.filled_layers, outcome.filled_rows) == (filled, 3 if filled else 0)
    bench.pool.check()


def test_the_rule_is_asked_of_each_row_at_each_exit_whoever_is_to_leave(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As serving asks it: what that takes is part of an iteration."""
    asked: list[float] = []
    monkeypatch.setattr(Stepper, "leaves", lambda _, answer: bool(asked.append(answer.confidence)))
    leaving(bench, ExitMode.WAIT).decoding([20, 31, 44], 1)()
    assert len(asked) == 2 * 3


@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize("level", [0, 1])
def test_half_of_the_rows_leave_and_the_others_go_on_by_themselves(
    bench: Bench, level: int, batch: int
) -> None:
    load = leaving(bench, ExitMode.REBATCH)
    work = load.decoding([24] * batch, level)
    exits = (1, 2, 4)
    for _ in range(2 * TURNS + 1):
        work()
        first, second = (one.outcome for one in load.replica.tally.iterations[-2:])
        assert len(first.emitted) == batch // 2
        assert (first.layers, first.checks, first.heads) == (exits[level], level + 1, 0)
        assert (first.filled_layers, first.overheads) == (4 - exits[level], 1)
        assert len(second.emitted) == batch - batch // 2
        assert (second.first_layer, second.layers, second.checks) == (exits[level], 4, 1 - level)
        assert second.heads == 1
        assert {row.held for row in load.replica.batch.rows} == {0}
        assert len({row.context for row in load.replica.batch.rows}) == 1
    bench.pool.check()


def test_asking_an_exit_lets_nobody_leave_before_the_loaded_depth(bench: Bench) -> None:
    load = leaving(bench, ExitMode.WAIT)
    asked: list[bool] = []
    load.stepper.leaves = lambda reading: bool(asked.append(True))  # type: ignore[method-assign]
    load.asking([20, 30], 0)()
    assert asked == [True, True]
    load.asking([20, 30], 2)()
    assert len(asked) == 2


def test_filling_leaves_keys_and_values_as_serving_does(bench: Bench) -> None:
    """As when a batch leaves at the first exit: the new token's place in all layers beyond."""
    load = leaving(bench, ExitMode.WAIT)
    for store in bench.pool.keys[1:]:
        store.zero_()
    load.filling([20, 30], 0)()
    for layer in range(1, 4):
        store = bench.pool.keys[layer][: bench.pool.capacity_tokens]
        kept = store.view(bench.max_batch, bench.max_context, -1)
        written = kept.abs().sum(-1).nonzero().tolist()
        assert written == [[0, 19], [1, 29]]


def test_loads_of_all_kinds_follow_each_other_on_one_pool(bench: Bench) -> None:
    stack = Job("decode_layers", "tiny-4l", "eager", (4,), 4, 40, 50)
    expected = bench.work(stack, 4)()
    assert isinstance(expected, torch.Tensor)
    split = Job("split_iteration", "tiny-4l", "eager", (2,), 3, 30, 30)
    for job in (iteration(2, 32), split, iteration(4, 0, 16), iteration(4, 30, None, 50)):
        found = list(bench.time(job))
        assert [reading.layers for reading in found] == [2]
        again = bench.work(stack, 4)()
        assert isinstance(again, torch.Tensor)
        assert again.shape == expected.shape
        assert bool(again.isfinite().all())
        assert bench.pool.num_rows == bench.max_batch
        bench.pool.check()


def test_a_layer_launches_as_often_whenever_it_is_counted(bench: Bench) -> None:
    """What is found once for all layers is no layer's."""
    assert len({bench.launches_per_layer(3, 40) for _ in range(3)}) == 1


def test_graph_readings_run_graphs_exit_by_exit(bench: Bench) -> None:
    recorder = FakeRecorder()
    captured = bench.capture_graphs(recorder)
    assert isinstance(captured, Reading)
    assert bench.modes == ("eager", "graph")
    # Segments 0-1, 1-2 and 2-4, embedding, and the last two segments filled; 1, 2 and 4 rows.
    assert captured.repetitions == len(recorder.recordings) == 18
    assert bench.buckets == {"batch_buckets": [1, 2, 4], "context_buckets": [64]}

    def replays() -> int:
        return sum(recording.replays for recording in recorder.recordings)

    work = bench.work(Job("decode_layers", "tiny-4l", "graph", (2,), 3, 20, 20), 2)
    # The rows are embedded when the work is made.
    assert replays() == 1
    work()
    assert replays() == 3
    bench.work(Job("iteration", "tiny-4l", "graph", (4,), 3, 20, 20), 4)()
    assert replays() == 7
    # Rows are embedded and run to the first exit; both segments beyond are filled.
    fill = bench.work(Job("kv_fill", "tiny-4l", "graph", (3,), 3), 3)
    assert replays() == 9
    fill()
    assert replays() == 11
    bench.work(Job("decode_layers", "tiny-4l", "eager", (2,), 3, 20, 20), 2)()
    bench.work(Job("prefill_layers", "tiny-4l", "eager", (2,), 1, 0, None, 16), 2)()
    assert replays() == 11


def test_every_turn_of_a_ragged_iteration_is_replayed(bench: Bench) -> None:
    """Also the first after contexts are set back, where the shortest row holds one token."""
    recorder = FakeRecorder()
    bench.capture_graphs(recorder)
    assert not bench.bounds.can_split
    work = bench.work(Job("iteration", "tiny-4l", "graph", (4,), 4, 20, 39), 4)

    def replayed() -> int:
        before = sum(recording.replays for recording in recorder.recordings)
        work()
        return sum(recording.replays for recording in recorder.recordings) - before

    assert {replayed() for _ in range(2 * TURNS + 1)} == {4}


def test_capturing_is_timed_graph_by_graph_as_growing_batches_want_them(bench: Bench) -> None:
    recorder = FakeRecorder()
    found = list(bench.captures(recorder))
    assert len(found) == len(recorder.recordings) == 18
    assert [one.batch for one in found] == sorted([1, 2, 4] * 6)
    of_two = [(one.quantity, one.layers) for one in found if one.batch == 2]
    assert sorted(of_two, key=str) == [
        ("capture_embed", None),
        ("capture_fill", 1),
        ("capture_fill", 2),
        ("capture_run", 1),
        ("capture_run", 1),
        ("capture_run", 2),
    ]
    assert len({one.key for one in found}) == 18
    assert {one.batch for one in found if one.purpose == "held-out"} == {2}
    assert all(one.seconds and one.seconds > 0.0 for one in found)
    assert bench.modes == ("eager",)


def test_a_few_looks_take_apart_what_a_pass_takes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of up to 4 rows of up to 64 tokens, on a device of round costs."""
    probe = Probe(
        decode_s=10.0,
        decode_s_per_row=2.0,
        decode_s_per_context_token=0.25,
        prefill_s=100.0,
        prefill_s_per_token=5.0,
        head_s=6.0,
        head_s_per_row=3.0,
        samples_per_quiet_one=2.0,
        host_s=7.0,
        host_s_per_row=4.0,
    )

    def seconds(job: Job) -> float:
        assert job.depths == (4,)
        assert job.batch is not None
        more_rows, context = job.batch - 1, job.context_tokens or 0
        asked = 6.0 + 3.0 * more_rows
        layers = 10.0 + 2.0 * more_rows + 0.25 * job.batch * (context - 32)
        return {
            "head": asked,
            "decode_layers": layers,
            "iteration": layers + asked + 7.0 + 4.0 * more_rows,
            "prefill_layers": 100.0 + 5.0 * ((job.prompt_tokens or 0) - 32),
        }[job.quantity]

    monkeypatch.setattr(bench, "work", lambda job, depth: job)
    monkeypatch.setattr(bench, "_once", seconds)
    monkeypatch.setattr("calibration.measuring.bench.quiet_share", lambda *_: 0.5)
    assert bench.probe() == probe


def test_costs_that_do_not_grow_with_the_load_are_none_of_a_row(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what the host adds fall below nothing where a look at an iteration was quick."""
    monkeypatch.setattr(bench, "work", lambda job, depth: job)
    monkeypatch.setattr(bench, "_once", lambda job: 1.0 / (job.batch or 1))
    monkeypatch.setattr("calibration.measuring.bench.quiet_share", lambda *_: 0.1)
    found = bench.probe()
    assert found.decode_s_per_row == found.head_s_per_row == found.host_s == 0.0
    assert found.samples_per_quiet_one == timing.MAX_TRIES


def test_a_trial_is_thought_to_take_its_passes_on_the_clock_that_it_is_timed_by(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the layers take half of the time, and what is awaited goes by the wall clock."""
    device = SimpleNamespace(sample_s=lambda pass_s: 10.0 * pass_s)
    wall = SimpleNamespace(sample_s=lambda pass_s: 100.0 * pass_s)
    monkeypatch.setattr(bench, "timer", device)
    monkeypatch.setattr(bench, "_wall", wall)
    probe = Probe(8.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def trial(seconds: float, sample_s: float) -> float:
        return (SAMPLES + 2) * sample_s * seconds + WARMUPS * seconds

    stacks = Job("decode_layers", batch=1, context_tokens=32, depths=(2, 4))
    assert bench.estimate_s(stacks, probe) == trial(4.0 + 8.0, 10.0)
    for quantity, seconds in (
        ("head", 1.0),
        ("check", 1.0),
        ("iteration", 9.0),
        ("exit_iteration", 9.0),
        ("split_iteration", 10.0),
    ):
        job = Job(quantity, batch=1, context_tokens=32)
        assert bench.estimate_s(job, probe) == trial(seconds, 100.0), quantity
    assert bench.estimate_s(Job("kv_fill", batch=1), probe) == trial(8.0, 10.0)


def test_an_energy_window_gives_joules_of_one_repetition(bench: Bench, tmp_path: Path) -> None:
    window = Measurement("replayed", 10.0, 0.2, 50.0, 0.2, 20, True, False)
    file = tmp_path / "windows.jsonl"
    file.write_text(to_json(window) + "\n" + to_json(Absence("none", "the meter fell silent")))
    meter = Replayed(file)
    job = Job("decode_energy", "tiny-4l", "eager", (4,), 4, 64, 64)
    found = bench.energy(job, meter, 0.2)
    assert found.seconds is not None
    assert found.joules == pytest.approx(50.0 * found.seconds)
    assert found.watts == 50.0
    silent = bench.energy(job, meter, 0.2)
    assert silent.joules is None
    assert silent.note == "the meter fell silent"


class TwentyWatts:
    """A meter of steady power, which no delay of a reading can make another."""

    source = "made-up"
    explanation = "A meter of twenty watts"
    tick_s = 0.005
    min_window_s = 0.05

    def open(self, sparing: bool = False) -> TwentyWattsWindow:
        return TwentyWattsWindow()


class TwentyWattsWindow:
    def __init__(self) -> None:
        self.opened_s = time.perf_counter()

    def curve(self) -> list[tuple[float, float]]:
        now_s = time.perf_counter()
        return [(self.opened_s, 0.0), (now_s, 20.0 * (now_s - self.opened_s))]

    def close(self, busy_s: float | None = None) -> Measurement:
        seconds = time.perf_counter() - self.opened_s
        return Measurement("made-up", 20.0 * seconds, seconds, 20.0, seconds, 10, True, False)


def test_with_a_meter_idle_power_and_energy_are_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "best_meter", lambda *_: TwentyWatts())
    measure(settings(checkpoint, tmp_path / "out"))
    points = read_points(tmp_path / "out")
    idle = points.filter(pl.col("quantity") == "idle_power")
    assert idle["watts"].to_list() == pytest.approx([20.0, 20.0])
    decode = points.filter(pl.col("quantity") == "decode_energy")
    assert decode.height >= 4
    assert (decode["joules"] / decode["seconds"]).to_list() == pytest.approx([20.0] * decode.height)


class Forgetful(TwentyWatts):
    """A meter that falls silent in some of its windows, counted from the first."""

    def __init__(self, *silent: int) -> None:
        self.silent = silent
        self.opened = 0

    def open(self, sparing: bool = False) -> Any:
        self.opened += 1
        return SilentWindow() if self.opened in self.silent else TwentyWattsWindow()


class SilentWindow(TwentyWattsWindow):
    def close(self, busy_s: float | None = None) -> Any:
        return Absence("made-up", "the counter stopped answering")


def test_a_window_in_which_the_meter_fell_silent_is_taken_again_at_the_end(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window is of idle power; the next two are a model's first."""
    monkeypatch.setattr(measuring, "best_meter", lambda *_: Forgetful(2, 3))
    out = tmp_path / "out"
    done = measure(settings(checkpoint, out))
    assert done.left_out == 0
    windows = planned_windows(out)
    points = read_points(out).filter(pl.col("quantity").is_in({job["quantity"] for job in windows}))
    assert points.height == len(windows) >= 4
    assert points["joules"].null_count() == 0


def test_a_window_that_is_lost_twice_is_no_reading_and_resuming_takes_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "best_meter", lambda *_: Forgetful(*range(2, 1000)))
    out = tmp_path / "out"
    done = measure(settings(checkpoint, out))
    windows = planned_windows(out)
    assert done.left_out == len(windows) >= 4
    lost = "tiny-4l: a window of energy was lost twice (the counter stopped answering); "
    assert sum(note.startswith(lost) for note in done.notes) == len(windows)
    energies = pl.col("quantity").str.ends_with("_energy")
    assert read_points(out).filter(energies).height == 0
    monkeypatch.setattr(measuring, "best_meter", lambda *_: measuring.NoMeter("no driver answers"))
    without = measure(settings(checkpoint, out, resume=True))
    assert without.left_out == len(windows)
    assert f"{len(windows)} windows of energy of the plan cannot be taken: no driver answers" in (
        " ".join(without.notes)
    )
    monkeypatch.setattr(measuring, "best_meter", lambda *_: TwentyWatts())
    again = measure(settings(checkpoint, out, resume=True))
    assert again.left_out == 0
    assert read_points(out).filter(energies)["joules"].drop_nulls().len() == len(windows)


def planned_windows(out: Path) -> list[dict[str, Any]]:
    """The windows of energy that a plan has."""
    jobs = json.loads((out / PLAN_FILE).read_text())["models"]["tiny-4l"]["jobs"]
    return [job for job in jobs if job["quantity"].endswith("_energy")]


def test_a_trial_has_the_clocks_that_it_left_and_not_those_that_it_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The board is at the clock of the depth that ran last: 1,000 MHz and the trial's rows."""
    clock = [1.0]

    class Board:
        reason = "made up"

        def state(self) -> BoardState:
            return BoardState(sm_clock_mhz=clock[0])

        def driver(self) -> str:
            return "made up"

    def made_up(bench: Bench, job: Job, patience_s: float) -> Iterator[Reading]:
        clock[0] = 1000.0 + (job.batch or 0)
        for depth in job.depths or (None,):
            yield job.reading(depth, seconds=1e-3)

    monkeypatch.setattr(Bench, "time", made_up)
    monkeypatch.setattr(measuring, "board_of", lambda *_: Board())
    measure(settings(checkpoint, tmp_path / "out"))
    points = read_points(tmp_path / "out").filter(quantity="decode_layers")
    assert points["batch"].n_unique() > 1
    assert points["sm_clock_mhz"].to_list() == [1000.0 + rows for rows in points["batch"]]


def test_trials_begin_at_full_clocks_and_the_notes_say_that_they_waited(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial leaves the board slow for two looks: the trial's own, and the next one's first."""
    slow_looks = [0]
    found: list[int] = []

    class Board:
        reason = "made up"

        def state(self) -> BoardState:
            slow_looks[0] -= 1
            return BoardState(sm_clock_mhz=2000.0 if slow_looks[0] < 0 else 1000.0)

        def driver(self) -> str:
            return "made up"

    def made_up(bench: Bench, job: Job, patience_s: float) -> Iterator[Reading]:
        found.append(slow_looks[0])
        for depth in job.depths or (None,):
            yield job.reading(depth, seconds=1e-3)
        slow_looks[0] = 2

    monkeypatch.setattr(Bench, "time", made_up)
    monkeypatch.setattr(measuring, "board_of", lambda *_: Board())
    monkeypatch.setattr(clocks, "_LOOK_EVERY_S", 0.0)
    done = measure(settings(checkpoint, tmp_path / "out"))
    assert len(found) > 10
    assert max(found) < 0
    assert f"{len(found) - 1} trials waited for the board's clocks" in done.notes[-1]
    slow = read_points(tmp_path / "out").filter(quantity="head")["sm_clock_mhz"]
    assert slow.to_list() == [1000.0] * len(slow)


def test_what_others_disturbed_every_time_is_taken_again_until_it_is_not(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks are disturbed in their first two trials, all else is never."""
    taken: Counter[str] = Counter()

    def made_up(bench: Bench, job: Job, patience_s: float) -> Iterator[Reading]:
        taken[job.quantity] += 1
        lost = 0.5 if job.quantity == "check" and job.trial < 2 else 0.0
        for depth in job.depths or (None,):
            yield job.reading(depth, seconds=1e-3, idle_share=lost)

    monkeypatch.setattr(Bench, "time", made_up)
    monkeypatch.setattr(measuring, "MOST_LOST_SHARE", 0.1)
    out = tmp_path / "out"
    measure(settings(checkpoint, out))
    jobs = json.loads((out / PLAN_FILE).read_text())["models"]["tiny-4l"]["jobs"]
    planned = Counter(job["quantity"] for job in jobs)
    rounds = 1 + max(job.get("trial", 0) for job in jobs)
    assert all(taken[name] == count for name, count in planned.items() if name != "check")
    checks = read_points(out).filter(quantity="check").group_by("batch").agg(pl.col("trial").max())
    assert checks.height >= 3
    assert set(checks["trial"]) == {max(2, rounds - 1)}


def test_floors_may_take_a_two_hundredth_of_the_budget_each(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    launch, copy, read = measuring.time_launch, measuring.time_copy, measuring.time_read

    def watched(take: Any) -> Any:
        def taken(*given: Any) -> Any:
            asked.append(given[-1])
            return take(*given)

        return taken

    monkeypatch.setattr(measuring, "time_launch", watched(launch))
    monkeypatch.setattr(measuring, "time_copy", watched(copy))
    monkeypatch.setattr(measuring, "time_read", watched(read))
    measure(replace(settings(checkpoint, tmp_path / "out"), budget_s=8.0))
    assert asked == pytest.approx([0.04] * 7)


def test_what_others_go_on_disturbing_is_given_up(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(bench: Bench, job: Job, patience_s: float) -> Iterator[Reading]:
        for depth in job.depths or (None,):
            yield job.reading(depth, seconds=1e-3, idle_share=0.5)

    monkeypatch.setattr(Bench, "time", made_up)
    monkeypatch.setattr(measuring, "MOST_LOST_SHARE", 0.1)
    out = tmp_path / "out"
    measure(settings(checkpoint, out))
    jobs = json.loads((out / PLAN_FILE).read_text())["models"]["tiny-4l"]["jobs"]
    rounds = 1 + max(job.get("trial", 0) for job in jobs)
    checks = read_points(out).filter(quantity="check")
    assert checks["trial"].max() == rounds - 1 + measuring.MOST_FURTHER_TRIALS


def test_resuming_takes_only_what_is_missing(
    checkpoint: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: set[str] = set()
    take = Bench.time

    def watched(bench: Bench, job: Job, patience_s: float) -> Iterator[Reading]:
        taken.add(job.quantity)
        return take(bench, job, patience_s)

    monkeypatch.setattr(Bench, "time", watched)
    out = tmp_path / "out"
    shutil.copytree(measured, out)
    num_before = read_points(out).height
    lines = (out / READINGS_FILE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kv_fill"' not in line]
    assert len(kept) < len(lines)
    (out / READINGS_FILE).write_text("".join(kept) + lines[0][:25])
    environment = json.loads((out / ENVIRONMENT_FILE).read_text())
    quicker = {"core_s": 1e-9, "memory_s": 1e-9}
    (out / ENVIRONMENT_FILE).write_text(json.dumps(environment | {"pace": quicker}))
    again = measure(settings(checkpoint, out, resume=True))
    assert json.loads((out / ENVIRONMENT_FILE).read_text())["pace"] == quicker
    assert again.num_readings >= num_before > len(kept)
    assert len(lines) - len(kept) <= again.num_new
    assert taken == {"kv_fill"}
    keys = [reading for reading in read_points(out).iter_rows()]
    assert len(keys) == again.num_readings


def resumable(measured: Path, out: Path, quantity: str) -> dict[str, Any]:
    """A measurement that lacks the readings of a quantity; what it says of its model."""
    shutil.copytree(measured, out)
    lines = (out / READINGS_FILE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"{quantity}"' not in line]
    assert len(kept) < len(lines)
    (out / READINGS_FILE).write_text("".join(kept))
    return dict(json.loads((out / ENVIRONMENT_FILE).read_text())["models"]["tiny-4l"])


def described(out: Path, **changes: Any) -> dict[str, Any]:
    """What a measurement says of its model, after some changes."""
    environment = json.loads((out / ENVIRONMENT_FILE).read_text())
    environment["models"]["tiny-4l"] |= changes
    (out / ENVIRONMENT_FILE).write_text(json.dumps(environment))
    return dict(environment["models"]["tiny-4l"])


def test_trials_of_graphs_are_left_out_where_graphs_cannot_be_had_any_more(
    checkpoint: Path, measured: Path, tmp_path: Path
) -> None:
    """They are not taken eagerly in the name of graphs; what was read of graphs keeps its grid."""
    out = tmp_path / "out"
    resumable(measured, out, "kv_fill")
    described(out, batch_buckets=[1, 2, 4])
    plan = json.loads((out / PLAN_FILE).read_text())
    stacks = [
        job for job in plan["models"]["tiny-4l"]["jobs"] if job["quantity"] == "decode_layers"
    ]
    assert len(stacks) > 2
    for job in stacks[:2]:
        job["mode"] = "graph"
    (out / PLAN_FILE).write_text(json.dumps(plan))
    done = measure(settings(checkpoint, out, resume=True))
    points = read_points(out)
    assert "graph" not in set(points["mode"])
    assert "kv_fill" in set(points["quantity"])
    (note,) = (note for note in done.notes if "CUDA graphs" in note)
    assert note.startswith("tiny-4l: 2 trials of the plan cannot be taken")
    assert described(out)["batch_buckets"] == [1, 2, 4]


def test_readings_of_another_model_of_the_name_are_not_gone_on_with(
    checkpoint: Path, measured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = resumable(measured, out, "kv_fill")
    sums = [2.0 * one for one in before["guard"]["logits_sums"]]
    described(out, guard=before["guard"] | {"logits_sums": sums})
    with pytest.raises(InputError, match="tiny-4l was measured with other weights"):
        measure(settings(checkpoint, out, resume=True))
    described(out, guard=before["guard"], tokenizer="another")
    with pytest.raises(InputError, match="with tokenizer another and now has bytes"):
        measure(settings(checkpoint, out, resume=True))
    described(out, tokenizer="bytes")
    measure(settings(checkpoint, out, resume=True))
    assert "kv_fill" in set(read_points(out)["quantity"])


def test_kernels_are_written_down_and_a_model_is_not_measured_on_with_others(
    checkpoint: Path, measured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kernels = resumable(measured, out, "kv_fill")["kernels"]
    assert kernels["fusion"] == "not usable: our kernels need a CUDA GPU and this is cpu"
    before = read_points(measured)
    described(out, kernels=kernels | {"flash": "usable: it passed", "another": "usable: once"})
    done = measure(settings(checkpoint, out, resume=True))
    (note,) = (note for note in done.notes if "kernels" in note)
    assert "since its kernel flash was usable: it passed; now it is not usable: pro" in note
    assert "kv_fill" not in set(read_points(out)["quantity"])
    assert read_points(out).height < before.height
    assert described(out)["kernels"]["flash"] == "usable: it passed"
    described(out, kernels=kernels | {"fusion": "not usable: for another reason"})
    assert not any(
        "kernels" in note for note in measure(settings(checkpoint, out, resume=True)).notes
    )
    assert "kv_fill" in set(read_points(out)["quantity"])


def test_a_mode_that_a_bench_has_not_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("decode_layers", "tiny-4l", "graph", (2,), 3, 20, 20)
    with pytest.raises(ValueError, match=r"trial in mode 'graph'; it runs in eager\."):
        bench.work(job, 2)
    bench.capture_graphs(FakeRecorder())

    def losing(*given: Any, **named: Any) -> Any:
        bench.decoders["graph"].drop_graphs("layers were dropped")
        return timing.timed(*given, **named)

    monkeypatch.setattr("calibration.measuring.bench.timed", losing)
    with pytest.raises(InputError, match=r"lost its CUDA graphs \(layers were dropped\)"):
        list(bench.time(job))


def test_graphs_and_the_eager_path_take_the_same_kernels(bench: Bench) -> None:
    """Also where the self-test finds room only at another time."""
    bench.decoders["eager"].fusion = Fusion(False, "our kernels found no room for the self-test")
    bench.capture_graphs(FakeRecorder())
    assert bench.decoders["graph"].fusion is bench.decoders["eager"].fusion
    assert bench.kernels["fusion"] == "not usable: our kernels found no room for the self-test"


def test_a_folder_of_readings_is_not_overwritten(checkpoint: Path, measured: Path) -> None:
    with pytest.raises(InputError, match="--resume"):
        measure(settings(checkpoint, measured))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"exits": (2, 4)}, r"was measured with exits \[1, 2, 4\] and now has \[2, 4\]"),
        ({"max_batch": 8}, "at most 4 rows of 64 tokens and now has 8 rows of 64 tokens"),
        ({"seed": 3}, "readings were taken with seed 0 and 3 is asked for now"),
    ],
    ids=lambda one: str(one)[:20],
)
def test_resuming_another_measurement_is_refused(
    checkpoint: Path, measured: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        measure(settings(checkpoint, measured, resume=True, **asked))


def test_resuming_with_other_threads_is_refused(checkpoint: Path, measured: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(InputError, match=f"threads {before} and {before + 1} is asked for now"):
            measure(settings(checkpoint, measured, resume=True))
    finally:
        torch.set_num_threads(before)


def test_a_model_s_plan_outlasts_the_measuring_of_another(measured: Path) -> None:
    identity = json.loads((measured / PLAN_FILE).read_text())["identity"]
    plan = earlier_plan(measured, identity)
    (mine,) = plan.models.values()
    assert mine.exit_layers == (1, 2, 4)
    assert mine.deepest == 4
    plan.models["another"] = replace(mine, exit_layers=(3, 4))
    assert earlier_plan(measured, identity).models == {"tiny-4l": mine}
    (measured / "both").mkdir()
    (measured / "both" / PLAN_FILE).write_text(json.dumps(plan.to_json()))
    assert earlier_plan(measured / "both", identity) == plan
    with pytest.raises(InputError, match=r"another was measured with exits \[3, 4\]"):
        check_same(plan.models["another"], "another", (1, 4), mine.asked)


def test_a_plan_that_memory_lacks_for_now_is_refused_with_the_remedy(
    checkpoint: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured, out)
    lines = (out / READINGS_FILE).read_text().splitlines(keepends=True)
    (out / READINGS_FILE).write_text("".join(line for line in lines if '"check"' not in line))
    monkeypatch.setattr(measuring, "available_bytes", lambda _: 400_000)
    with pytest.raises(InputError, match=r"planned with 4 rows of 64 tokens .* Free some of it"):
        measure(settings(checkpoint, out, resume=True))


def test_an_interruption_keeps_the_readings_and_says_where(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    taken = []

    def interrupted(self: Bench, job: Job, patience_s: float) -> Iterator[Any]:
        taken.append(job)
        if len(taken) > 3:
            raise KeyboardInterrupt
        yield job.reading(job.depths[0] if job.depths else None, seconds=1.0)

    monkeypatch.setattr(Bench, "time", interrupted)
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    try:
        code = run("measure", str(checkpoint), "--out", str(out), "--budget", "60s", "--resume")
    finally:
        torch.set_num_threads(threads)
    assert code == 130
    captured = capsys.readouterr()
    assert "There is nothing to go on with in" in captured.out + captured.err
    said = captured.err
    assert "the readings so far are kept" in said
    assert "nothing was written" not in said
    assert read_points(out).height > 3
    assert (out / "points.parquet").is_file()


def test_a_folder_that_is_measured_into_is_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone_in(out):
        # The other process is in the middle of a line.
        (out / READINGS_FILE).write_text('{"quantity": "he')
        with pytest.raises(InputError, match="Another process measures into this folder"):
            measure(settings(checkpoint, out, resume=True))
        assert (out / READINGS_FILE).read_text() == '{"quantity": "he'
        assert [entry.name for entry in out.iterdir()] == [READINGS_FILE]


def test_a_disk_that_fills_ends_the_run_in_words(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from calibration.measuring.readings import Readings

    append, count = Readings.append, [0]

    def fill(self: Readings, reading: Any) -> None:
        count[0] += 1
        if count[0] == 5:
            raise self.explained(OSError(errno.ENOSPC, "No space left on device"))
        append(self, reading)

    monkeypatch.setattr(Readings, "append", fill)
    with pytest.raises(InputError, match=r"disk is full; 4 readings are kept"):
        measure(settings(checkpoint, tmp_path / "out"))
    assert read_points(tmp_path / "out").height == 4


def test_exits_are_traced_in_the_precision_that_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(measuring, "trace_checkpoints", lambda *_, **given: asked.append(given))
    monkeypatch.setattr(measuring._Session, "_model_readings", lambda *_: None)
    measure(settings(checkpoint, tmp_path / "out", dtype="bfloat16", traces=True))
    assert asked == [{"device": torch.device("cpu"), "dtype": torch.bfloat16}]


def test_checkpoints_that_cannot_be_traced_are_refused_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, tokenizer in (("words", "words"), ("bare", "unknown")):
        save(from_stock(stock_model("llama"), name=name, tokenizer=tokenizer), tmp_path / name)
    out, both = tmp_path / "out", (str(checkpoint), str(tmp_path / "words"))
    with pytest.raises(InputError, match=r"several tokenizers: 'bytes' .* 'words' .*--no-traces"):
        measure(replace(settings(checkpoint, out, traces=True), models=both))
    with pytest.raises(InputError, match=r"'unknown' .* no tokenizer\.json.*--no-traces"):
        measure(settings(tmp_path / "bare", out, traces=True))
    with pytest.raises(InputError, match=r"It holds config\.json, so it is a checkpoint"):
        measure(settings(checkpoint, tmp_path / "bare", traces=True))
    assert not (tmp_path / "bare" / "readings.jsonl").exists()
    assert not out.exists()
    monkeypatch.setattr(measuring._Session, "_model_readings", lambda *_: None)
    measure(settings(tmp_path / "bare", out, traces=False))
    measure(settings(tmp_path / "bare", tmp_path / "exits", traces=True, exits=(2, 4)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_that_is_absent_is_said_with_the_remedy(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"CUDA was asked for .* --device cpu"):
        measure(settings(checkpoint, tmp_path / "out", device="cuda"))


def spoilt(checkpoint: Path, folder: Path) -> Path:
    """A copy whose third layer holds other weights than its guard was made of."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["model.layers.2.mlp.up_proj.weight"].normal_()
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


@pytest.mark.parametrize("loading_is_timed", [True, False])
def test_weights_that_the_guard_refuses_end_the_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loading_is_timed: bool
) -> None:
    """Nothing of such a model is a measurement, not even the layers before."""
    if not loading_is_timed:
        monkeypatch.setattr(measuring._Session, "_loading", lambda _: None)
    folder = spoilt(checkpoint, tmp_path / "spoilt")
    with pytest.raises(InputError, match=r"exit layer 4 .* not the weights the guard"):
        measure(settings(folder, tmp_path / "out"))


def test_a_model_that_memory_lacks_for_is_measured_to_the_exit_that_fits(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = EarlyExitLM.grow

    def lacking(model: EarlyExitLM, depth: int) -> LoadReport:
        if depth > 2:
            raise TooLittleMemory("Layers 3 and 4 need more than there is.")
        return grow(model, depth)

    monkeypatch.setattr(EarlyExitLM, "grow", lacking)
    done = measure(settings(checkpoint, tmp_path / "out"))
    said = "tiny-4l is measured to layer 2: Layers 3 and 4 need more than there is"
    assert said in done.notes
    assert any(note.startswith("A stage of loading is not measured") for note in done.notes)


def test_too_little_memory_shrinks_the_grid_and_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pool of 4 rows of 64 tokens takes 512 KiB in 4 layers.
    monkeypatch.setattr(measuring, "available_bytes", lambda _: 400_000)
    done = measure(settings(checkpoint, tmp_path / "out"))
    assert any("shrunk from 4 rows of 64 tokens" in note for note in done.notes)
    monkeypatch.setattr(measuring, "available_bytes", lambda _: 1000)
    with pytest.raises(InputError, match="leaves room for 0 KV tokens"):
        measure(settings(checkpoint, tmp_path / "other"))


def test_a_shape_beyond_all_memory_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.model.memory.available_host_bytes", lambda: 2**30)
    with pytest.raises(InputError, match=r"llama2-70b with its first 20 layers needs .* --exits"):
        measure(MeasureSettings(("llama2-70b",), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'llama3-8b'"):
        find_sources(["llama3-8"])
    with pytest.raises(InputError, match=r"holds a config\.json"):
        find_sources([str(tmp_path)])
    with pytest.raises(InputError, match="No model was named"):
        find_sources([])


def test_a_folder_of_checkpoints_stands_for_all_of_them(checkpoint: Path) -> None:
    (source,) = find_sources([str(checkpoint.parent)])
    assert source.name == "tiny-4l"
    with pytest.raises(InputError, match="Two models are called"):
        find_sources([str(checkpoint), str(checkpoint.parent)])


def test_exits_that_a_checkpoint_does_not_name_stay_chosen_ones(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Also once a load has written them down, and whatever exits that load was given."""
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder)
    (folder / SETTINGS_FILE).unlink()
    for exits, asked in (((1, 2, 4), None), ((3, 4), (3, 4)), ((1, 2, 4), None)):
        (source,) = find_sources([str(folder)], asked)
        assert (source.exit_layers, source.exits_chosen) == (exits, True)
        source.load(4, torch.device("cpu"), torch.float32)
    for asked, chosen in ((None, False), ((1, 2, 4), False), ((3, 4), True)):
        (source,) = find_sources([str(checkpoint)], asked)
        assert source.exits_chosen == chosen


def test_public_shapes_have_default_exits() -> None:
    (source,) = find_sources(["opt-1.3b"])
    assert source.exit_layers == (6, 12, 24)
    assert source.folder is None


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"device": "tpu"}, "device 'tpu'"),
        ({"budget_s": 1.0}, "budget of 1 s"),
        ({"max_batch": 0}, "largest batch of 0"),
    ):
        with pytest.raises(InputError, match=said):
            MeasureSettings(("x",), tmp_path, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("left_out", [0, 3, 9])
def test_trials_that_were_left_out_are_said_before_what_comes_next(
    left_out: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = measuring.Outcome(12, 12, 9, left_out, ())
    monkeypatch.setattr(measuring, "measure", lambda settings, console: done)
    with pytest.raises(SystemExit) as ended:
        main(["measure", "any", "--out", str(tmp_path), "--threads", "1"])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert ("Next: helios-calibrate fit" in said) == (left_out < 9)
    assert ("3 trials were not taken in time" in said) == (left_out == 3)
    assert ("None of 9 trials was taken in time" in said) == (left_out == 9)


def test_budgets_and_exits_are_read_as_people_write_them() -> None:
    assert parse_budget("10m") == 600
    assert parse_budget("90s") == 90
    assert parse_budget("1h30m") == 5400
    assert parse_budget("45") == 45
    assert parse_exits("8,16,32") == (8, 16, 32)
    for wrong in ("", "ten minutes", "-5m"):
        with pytest.raises(InputError, match="no duration"):
            parse_budget(wrong)
    with pytest.raises(InputError, match="not layer numbers"):
        parse_exits("8;16")


def test_text_fits_the_vocabulary_and_repeats_as_text_does() -> None:
    tokens = sample_tokens(5000, 20000)
    assert len(tokens) == 20000
    assert 0 <= min(tokens) <= max(tokens) < 5000
    assert len(set(tokens)) > 500
    common = max(map(tokens.count, set(tokens[:200])))
    assert common > 20000 / 5000 * 10
    assert bytes(sample_tokens(256, 1000)).decode("utf-8", "replace").isprintable() is False


@pytest.mark.cuda
def test_the_same_on_a_gpu_with_graphs(checkpoint: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch finds none")
    measure(settings(checkpoint, tmp_path / "out", device="cuda", budget_s=30.0))
    points = read_points(tmp_path / "out")
    decode = points.filter(pl.col("quantity") == "decode_layers")
    assert set(decode["mode"]) == {"eager", "graph"}
    assert "graph_capture" in set(points["quantity"])


@pytest.mark.parametrize(
    "lengths",
    [[64, 64], [63], [61, 40], [60, 6], [9, 5], [3], [2, 64]],
    ids=lambda lengths: "+".join(map(str, lengths)),
)
def test_contexts_of_an_iteration_have_the_mean_asked_for_wherever_in_the_pool(
    bench: Bench, lengths: list[int]
) -> None:
    machine = ModelMachine(
        bench.model, bench.pool, bench.decoders["eager"], depth=2, free_running=False
    )
    load = ServedLoad(machine, bench.depths, lambda count, place: [place] * count)
    work = load.decoding(lengths)
    read: list[list[int]] = []
    # A multiple of every odd number of turns up to the most.
    for _ in range(5 * 7 * 9):
        work()
        read.append([row.context for row in load.replica.batch.rows])
    assert [statistics.fmean(column) for column in zip(*read, strict=True)] == lengths
    assert max(map(max, read)) <= bench.max_context
    bench.pool.check()


def test_a_row_that_is_to_read_one_token_reads_two(bench: Bench) -> None:
    """If it held none before its new one, it would be a prompt, which no graph serves."""
    machine = ModelMachine(
        bench.model, bench.pool, bench.decoders["eager"], depth=2, free_running=False
    )
    load = ServedLoad(machine, bench.depths, lambda count, place: [place] * count)
    work = load.decoding([1, 5])
    for _ in range(2):
        work()
        assert [row.context for row in load.replica.batch.rows] == [2, 5]


@pytest.mark.parametrize("max_context", [2, 3, 7, 33])
def test_a_grid_of_the_shortest_contexts_is_measured(
    checkpoint: Path, tmp_path: Path, max_context: int
) -> None:
    out = tmp_path / "out"
    measure(settings(checkpoint, out, max_context=max_context, max_batch=2))
    points = read_points(out)
    assert points["longest_context_tokens"].max() == max_context
    assert points.filter(pl.col("quantity") == "iteration")["context_tokens"].min() is not None


def test_a_context_of_one_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="largest context of 1 was given; 2 is the least"):
        MeasureSettings(("x",), tmp_path, max_context=1)


def test_a_model_of_one_position_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    stock = stock_model("llama", max_position_embeddings=1)
    save(from_stock(stock, (1, 2, 4), name="short", tokenizer="bytes"), tmp_path / "short")
    with pytest.raises(InputError, match="short has 1 position; 2 are the least"):
        measure(settings(tmp_path / "short", tmp_path / "out"))
    assert not (tmp_path / "out" / READINGS_FILE).exists()
