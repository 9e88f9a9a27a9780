"""What a bench makes of a trial: whose load is put on, what is timed, and what is written down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from calibration.measuring import bench as module
from calibration.measuring.bench import Bench
from calibration.measuring.grid import Bounds, Job
from calibration.measuring.meters import Absence, Measurement
from calibration.measuring.sources import sample_tokens
from calibration.measuring.timing import Sample, Timing
from helios_sim.errors import InputError
from helios_sim.policy.contract import ExitMode
from tests.calibration.scripted_time import ScriptedTime
from tests.calibration.serving import model_of
from tests.calibration.test_graphs import FakeRecorder

MODEL = model_of("small", (1, 2, 4))


def bench_of(tokens: Sequence[int] = (), max_context: int = 64) -> Bench:
    return Bench(MODEL, tokens or sample_tokens(256), max_batch=4, max_context=max_context)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Four rows of 64 tokens in a model of exits at the layers 1, 2 and 4."""
    made = bench_of()
    yield made
    made.close()


@pytest.mark.parametrize(("most", "allowed"), [(4096, 4 * 64), (100, 100), (40, 64)])
def test_the_bounds_are_those_of_the_pool_and_a_prompt_fits_whatever_is_taken_in_chunks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, most: int, allowed: int
) -> None:
    monkeypatch.setattr(module, "MAX_PREFILL_TOKENS", most)
    assert bench.bounds == Bounds(
        "small", (1, 2, 4), 4, 64, 4 * 64, allowed, ("eager",), True, True
    )


def test_a_model_loaded_in_part_has_the_exits_that_are_there_and_is_not_whole() -> None:
    part = model_of("part", (1, 2, 4))
    part.shrink(2)
    bounds = Bench(part, sample_tokens(256), max_batch=1, max_context=8).bounds
    assert (bounds.depths, bounds.is_whole) == ((1, 2), False)


@pytest.mark.parametrize("can", [{"subsets": True}, {"finds_rows": True}])
def test_graphs_that_serve_any_rows_can_split(bench: Bench, can: dict[str, bool]) -> None:
    bench.capture_graphs(FakeRecorder())
    assert not bench.bounds.can_split
    graphs = bench.decoders["graph"].graphs
    assert graphs is not None
    graphs.settings = replace(graphs.settings, **can)
    assert bench.bounds.can_split


def test_graphs_take_the_ways_to_attend_of_the_eager_path(bench: Bench) -> None:
    eager = bench.decoders["eager"]
    eager.choice = replace(eager.choice, reason="it found no room for the self-test")
    bench.capture_graphs(FakeRecorder())
    assert bench.decoders["graph"].choice is eager.choice


def test_every_row_holds_the_tokens_of_a_text_longer_than_one_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_PREFILL_TOKENS", 24)
    pool = bench_of().pool
    for store in (*pool.keys, *pool.values):
        held = store[: pool.capacity_tokens].view(4, 64, -1)
        assert bool((held.abs().sum(-1) > 0.0).all())
        assert bool((held == held[0]).all())
        # Whoever repeats the first piece would hold its values again.
        assert not torch.equal(pool.values[0][:24], pool.values[0][24:48])


def test_a_text_is_read_from_somewhere_and_again_where_it_ends(bench: Bench) -> None:
    assert len({tuple(bench._ids(8, place)) for place in range(4)}) == 4
    assert bench._ids(8, 1) == bench._ids(8, 1)
    assert bench_of([5, 6, 7])._ids(7, 1) == [5, 6, 7, 5, 6, 7, 5]


def test_a_closed_bench_holds_neither_graphs_nor_keys(bench: Bench) -> None:
    bench.capture_graphs(FakeRecorder())
    graphed = bench.decoders["graph"]
    bench.close()
    assert graphed.graphs is None
    assert bench.modes == ()
    assert (bench.pool.num_rows, bench.pool.num_layers) == (0, 0)


def test_memory_is_looked_at_under_the_largest_prefill_and_decode_with_the_graphs_beside(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts of 64 tokens two are prefilled at once where 128 tokens are the most."""
    ran: list[Job] = []
    monkeypatch.setattr(module, "MAX_PREFILL_TOKENS", 128)
    monkeypatch.setattr(bench, "work", lambda job, depth: lambda: ran.append(job))
    monkeypatch.setattr(module, "peak_bytes", lambda device, work: work() or 1000)
    bench._graph_bytes = 24
    kv, prefill, decode = bench.memory()
    per_token = MODEL.spec.kv_bytes_per_token(4)
    assert (kv.quantity, kv.layers, kv.batch, kv.context_tokens) == ("memory_kv", 4, 4, 64)
    assert (kv.bytes, kv.predicted_bytes) == (bench.pool.bytes, 4 * 64 * per_token)
    assert {prefill.quantity, decode.quantity} == {"memory_workspace"}
    assert (prefill.batch, prefill.prompt_tokens, prefill.layers) == (2, 64, 4)
    assert (decode.batch, decode.context_tokens, decode.layers) == (4, 64, 4)
    assert prefill.bytes == decode.bytes == 1024
    # Once before, so that libraries have made what they keep.
    assert [job.quantity for job in ran] == ["prefill_layers"] * 2 + ["iteration"] * 2


class Served:
    """Stands for a served load; its works say what they are of."""

    def __init__(self, machine: Any, exits: Any, text: Any, exit_mode: ExitMode) -> None:
        assert not machine.free_running
        self.depth, self.mode = machine.depth, exit_mode
        self.graphed = machine.decoder.graphs is not None

    def __getattr__(self, name: str) -> Any:
        return lambda *given: (name, self.depth, self.mode, self.graphed, *given)


LENGTHS = [30, 30]


@pytest.mark.parametrize(
    ("job", "depth", "expected"),
    [
        ({"quantity": "iteration"}, 2, ("decoding", 2, ExitMode.LOADED_DEPTH, LENGTHS)),
        ({"quantity": "iteration_energy"}, 2, ("decoding", 2, ExitMode.LOADED_DEPTH, LENGTHS)),
        (
            {"quantity": "iteration", "prompt_tokens": 16},
            2,
            ("prefilling", 2, ExitMode.LOADED_DEPTH, 2, 16),
        ),
        ({"quantity": "exit_iteration"}, 2, ("decoding", 4, ExitMode.WAIT, LENGTHS, 1)),
        ({"quantity": "split_iteration"}, 1, ("decoding", 4, ExitMode.REBATCH, LENGTHS, 0)),
        ({"quantity": "head"}, 4, ("asking", 4, ExitMode.LOADED_DEPTH, LENGTHS, 2)),
        ({"quantity": "head_energy"}, 4, ("asking", 4, ExitMode.LOADED_DEPTH, LENGTHS, 2)),
        ({"quantity": "check"}, 4, ("asking", 4, ExitMode.WAIT, LENGTHS, 0)),
        ({"quantity": "kv_fill"}, 3, ("filling", 4, ExitMode.WAIT, LENGTHS, 0)),
        ({"quantity": "kv_fill"}, 2, ("filling", 4, ExitMode.WAIT, LENGTHS, 1)),
    ],
    ids=lambda one: "-".join(map(str, one.values())) if isinstance(one, dict) else "",
)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_what_is_served_is_the_loop_s_own_step_in_the_mode_in_which_it_is_one(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    job: dict[str, Any],
    depth: int,
    expected: tuple[Any, ...],
) -> None:
    """Rows of prompts come to an empty pool; all others are there."""
    bench.capture_graphs(FakeRecorder())
    monkeypatch.setattr(module, "ServedLoad", Served)
    found: Any = bench.work(Job(mode=mode, batch=2, context_tokens=30, **job), depth)
    name, depth_run, exit_mode, graphed, *given = found
    assert (name, depth_run, exit_mode, *given) == expected
    assert graphed == (mode == "graph")
    assert bench.pool.num_rows == (0 if name == "prefilling" else 4)


@pytest.mark.parametrize(
    ("load", "lengths"),
    [
        ({"batch": 3, "context_tokens": 20}, [20, 20, 20]),
        ({"batch": 2, "context_tokens": 20, "longest_tokens": 30}, [10, 30]),
        ({"batch": None}, [32]),
    ],
)
def test_a_load_has_the_contexts_asked_for_or_32_tokens(
    bench: Bench, load: dict[str, Any], lengths: list[int]
) -> None:
    assert sorted(bench._lengths(Job("decode_layers", **load))) == lengths
    assert bench_of(max_context=8)._lengths(Job("head")) == [8]


def test_a_stack_decodes_each_row_s_last_token_whatever_was_replayed_since(bench: Bench) -> None:
    """The new token is one of the context, and the states of rows are the trial's own."""
    bench.capture_graphs(FakeRecorder())
    load = bench._load(Job("decode_layers", mode="graph", batch=2, context_tokens=20))
    assert load.positions == [19, 19]
    before = load.hidden.clone()
    bench.decoders["graph"].begin([0, 1], [1, 2], [19, 19])
    assert torch.equal(load.hidden, before)


def test_prompts_are_prefilled_to_the_depth_behind_the_tokens_that_are_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        bench.decoders["eager"], "extend", lambda *args, **named: given.append((args, named))
    )
    job = Job("prefill_layers", batch=2, context_tokens=8, prompt_tokens=16)
    bench.work(job, 2)()
    (((rows, ids, starts), named),) = given
    assert (rows, starts, named) == ([0, 1], [8, 8], {"last": 2})
    assert [len(one) for one in ids] == [16, 16]
    assert list(ids[0]) != list(ids[1])


def test_a_trial_is_timed_in_an_order_of_its_own_and_gives_a_reading_a_stack(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def timed(works: Sequence[Any], timer: Any, **named: Any) -> list[Timing]:
        asked.append({"timer": timer, **named})
        return [Timing(float(place), 0.5, 10, 3, 0.25) for place, _ in enumerate(works, 1)]

    monkeypatch.setattr(module, "timed", timed)
    stacks = Job("decode_layers", depths=(1, 4), batch=2, context_tokens=20, trial=3)
    found = list(bench.time(stacks, patience_s=7.0))
    assert [(one.layers, one.seconds, one.repetitions) for one in found] == [
        (1, 1.0, 30),
        (4, 2.0, 30),
    ]
    (one,) = bench.time(Job("head", batch=2, context_tokens=20))
    assert one.layers is None
    assert [(one["seed"], one["patience_s"]) for one in asked] == [(3, 7.0), (0, float("inf"))]
    assert asked[0]["timer"] is bench.timer
    assert asked[1]["timer"] is bench._wall


FOUND = Measurement("counter", 90.0, 4.0, 5.0, 4.5, 20, True, True, 0.125, "board", 6.0)


class OneWindow:
    """A meter whose window says what it was told to, and remembers how busy it was said to be."""

    def __init__(self, found: Measurement | Absence) -> None:
        self.found = found
        self.busy_s: float | None = None

    def open(self, sparing: bool = False) -> OneWindow:
        self.busy_s = None
        return self

    def close(self, busy_s: float | None = None) -> Measurement | Absence:
        self.busy_s = busy_s
        return self.found


@pytest.mark.parametrize(
    ("once_s", "window_s", "chunk", "steady_s"), [(0.01, 1.0, 5, 0.25), (2.0, 8.0, 1, 0.5)]
)
def test_a_window_opens_over_steady_work_and_tells_of_one_repetition(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    once_s: float,
    window_s: float,
    chunk: int,
    steady_s: float,
) -> None:
    """Three repetitions in six seconds at five watts: ten joules each."""
    repeated: list[tuple[int, float]] = []
    meter: Any = OneWindow(FOUND)

    def repeat(work: Any, chunk: int, seconds: float) -> tuple[float, int]:
        repeated.append((chunk, seconds))
        return 6.0, 3

    monkeypatch.setattr(bench, "_once", lambda work: once_s)
    monkeypatch.setattr(bench, "_repeat", repeat)
    job = Job("decode_energy", depths=(2,), batch=2, context_tokens=20)
    found = bench.energy(job, meter, window_s)
    assert repeated == [(chunk, steady_s), (chunk, window_s)]
    assert meter.busy_s == 6.0
    assert (found.layers, found.seconds, found.repetitions) == (2, 2.0, 3)
    assert (found.joules, found.watts, found.meter) == (10.0, 5.0, "counter")
    assert (found.cross_watts, found.cross_meter) == (6.0, "board")
    assert (found.idle_share, found.short_window) == (0.125, True)
    meter.found = Absence("none", "the meter fell silent")
    silent = bench.energy(replace(job, quantity="head_energy", depths=()), meter, window_s)
    assert (silent.layers, silent.seconds, silent.repetitions) == (None, 2.0, 3)
    assert (silent.joules, silent.meter, silent.note) == (None, "none", "the meter fell silent")


def test_a_window_in_which_graphs_were_lost_is_no_reading(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.capture_graphs(FakeRecorder())

    def losing(*_: Any) -> tuple[float, int]:
        bench.decoders["graph"].drop_graphs("layers were dropped")
        return 6.0, 3

    monkeypatch.setattr(bench, "_once", lambda work: 1.0)
    monkeypatch.setattr(bench, "_repeat", losing)
    job = Job("decode_energy", mode="graph", depths=(2,), batch=2, context_tokens=20)
    meter: Any = OneWindow(FOUND)
    with pytest.raises(InputError, match="lost its CUDA graphs"):
        bench.energy(job, meter, 1.0)


def test_work_is_repeated_in_chunks_until_the_time_is_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = ScriptedTime()
    monkeypatch.setattr(module, "time", time)
    assert bench._repeat(lambda: time.work(1.0), 2, 3.0) == (4.0, 4)


def test_a_rough_look_takes_the_quickest_run_after_the_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([0.5, 3.0, 1.0, 2.0])
    monkeypatch.setattr(bench._wall, "sample", lambda work, count: Sample(next(looks)))
    assert bench._once(lambda: None) == 1.0


def test_a_slope_is_that_of_two_places_and_none_of_one() -> None:
    assert module._slope(1.0, 7.0, 3) == 2.0
    assert module._slope(1.0, 3.0, 1) == 2.0
    assert module._slope(1.0, 3.0, 0) == 0.0
