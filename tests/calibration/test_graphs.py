"""Captured segments give the eager path's tokens, from the bucket that fits, largest first."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from calibration.model.decode import Decoder, generate, paged_pool, slot_pool
from calibration.model.early_exit import from_stock
from calibration.model.graphs import (
    CAPTURING,
    WARM_UPS,
    CaptureError,
    CudaRecorder,
    GraphKey,
    Kind,
    bucket_of,
    buckets_up_to,
    capture_stream,
    context_buckets,
    warm_loads,
)
from helios_sim.garbage import uncollected
from tests.calibration import tiny


class FakeRecording:
    """Computes at every replay, and spoils the memory of all other outputs as one pool may."""

    def __init__(self, recorder, body, warm_ups):
        self.recorder, self.body, self.warm_ups = recorder, body, warm_ups
        self.output = body().clone()
        self.replays = 0

    def replay(self):
        self.replays += 1
        made = self.body()
        for other in self.recorder.recordings:
            other.output.fill_(float("nan"))
        return self.output.copy_(made)


class FakeRecorder:
    """Stands in for a GPU: what was captured reads its inputs where they were captured."""

    def __init__(self, fails=False):
        self.recordings, self.fails = [], fails

    def record(self, body, warm_ups):
        if self.fails:
            raise CaptureError("no memory is left")
        self.recordings.append(FakeRecording(self, body, warm_ups))
        return self.recordings[-1]


def decoder_of(family="llama-gqa", pool="slots", rows=5, exits=(1, 2, 4)):
    model = from_stock(tiny.stock_model(family), exits)
    if pool == "slots":
        return Decoder(model, slot_pool(model, rows, 48))
    return Decoder(model, paged_pool(model, rows * 6, 8))


def capture(decoder, **changes):
    recorder = FakeRecorder()
    settings = {"batch_buckets": (1, 2, 4), "max_context": 48, "recorder": recorder, **changes}
    assert decoder.use_graphs(**settings)
    return recorder


def test_graphs_go_with_their_decoder_though_nothing_is_collected():
    decoder = decoder_of()
    # A graph of CUDA's keeps its output and nothing of what made it.
    kept = SimpleNamespace(record=lambda body, warm_ups: SimpleNamespace(output=body()))
    assert decoder.use_graphs((2,), 48, recorder=kept)
    pool = weakref.ref(decoder.pool)
    with uncollected():
        del decoder
        assert pool() is None


def test_batch_buckets_are_narrow_where_it_matters_and_end_with_the_largest():
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(5) == (1, 2, 4, 5)
    assert buckets_up_to(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert buckets_up_to(6, (2, 6, 9)) == (2, 6)


def test_context_buckets_double_and_end_with_the_longest():
    assert context_buckets(100) == (100,)
    assert context_buckets(2048) == (256, 512, 1024, 2048)
    assert context_buckets(1500) == (256, 512, 1024, 1500)


def test_the_smallest_bucket_that_holds_is_taken():
    assert [bucket_of(n, (1, 4, 8)) for n in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, None]


@pytest.mark.parametrize("pool", ["slots", "paged"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_replayed_segments_give_the_tokens_of_the_eager_path(family, pool):
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 17, 9))]
    decoder = decoder_of(family, pool)
    expected = generate(decoder, prompts, 16)
    recorder = capture(decoder)
    assert generate(decoder, prompts, 16) == expected
    assert sum(recording.replays for recording in recorder.recordings) == 3 * 15
    decoder.pool.check()


def test_padding_rows_leave_other_rows_alone():
    decoder = decoder_of()
    capture(decoder, batch_buckets=(4,))
    prompts = [tiny.prompt(4 + row, row) for row in range(4)]
    rows = [decoder.pool.admit() for _ in prompts]
    decoder.extend(rows, prompts, [0] * 4)
    before = [part.clone() for part in decoder.pool.read(0, [1, 2, 3], 7)]
    hidden = decoder.begin([0], [3], [4])
    decoder.segment([0], hidden, [4], 0, 1)
    for ours, kept in zip(decoder.pool.read(0, [1, 2, 3], 7), before, strict=True):
        assert torch.equal(ours, kept)


def test_each_replay_leaves_its_states_where_the_next_one_reads_them():
    decoder = decoder_of()
    capture(decoder)
    row = decoder.pool.admit()
    decoder.extend([row], [tiny.prompt(5)], [0])
    place = decoder.place([row], [5])
    states = [decoder.embed(place, [3]), decoder.run(place, decoder.embed(place, [3]), 0, 1)]
    assert {state.data_ptr() for state in states} == {decoder.graphs.hidden.data_ptr()}
    elsewhere = decoder.run(place, states[1].clone(), 1, 2).clone()
    decoder.run(place, decoder.embed(place, [3]), 0, 1)
    assert torch.equal(decoder.run(place, decoder.graphs.hidden[:1], 1, 2), elsewhere)


def test_a_segments_graph_is_looked_for_once_as_long_as_the_place_stays(monkeypatch):
    decoder, eager = decoder_of(), decoder_of()
    capture(decoder, subsets=True)
    for one in (decoder, eager):
        for _ in range(3):
            one.pool.admit()
    asked, key_of = [], decoder.graphs.key_of
    monkeypatch.setattr(
        decoder.graphs, "key_of", lambda *given: asked.append(given[1:]) or key_of(*given)
    )
    # Of one bucket, of another, and of rows that are not the first.
    states = torch.randn(3, 64)
    for rows in ([0], [0, 1, 2], [2, 0], [0]):
        place, other = (one.place(rows, [4] * len(rows)) for one in (decoder, eager))
        asked.clear()
        for _ in range(2):
            for first, last in ((1, 2), (2, 4)):
                given = states[: len(rows)]
                found = decoder.run(place, given.clone(), first, last)
                torch.testing.assert_close(found, eager.run(other, given, first, last))
        assert asked == [(1, 2), (2, 4)]
    place.by_graphs = False
    assert decoder.graphs.run(place, states[:1], 1, 2) is None


def test_a_capture_amid_an_iteration_leaves_its_states_as_they_were():
    decoder = decoder_of()
    eager = decoder_of()
    capture(decoder, on_demand=True)
    for one in (eager, decoder):
        one.pool.admit()
        one.extend([0], [tiny.prompt(5)], [0])
    states = []
    for _ in range(3):
        place, other = decoder.place([0], [5]), eager.place([0], [5])
        hidden, wanted = decoder.embed(place, [3]), eager.embed(other, [3])
        for first, last in decoder.segments():
            hidden = decoder.run(place, hidden, first, last)
            wanted = eager.run(other, wanted, first, last)
            states.append((hidden.clone(), wanted))
    assert decoder.graphs.num_graphs == 4
    for ours, stock in states:
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("pool", ["slots", "paged"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_filling_from_graphs_leaves_what_the_eager_path_leaves(family, pool):
    filled = []
    for graphs in (False, True):
        decoder = decoder_of(family, pool)
        recorder = capture(decoder) if graphs else None
        rows = [decoder.pool.admit(20) for _ in range(3)]
        hidden = decoder.begin(rows, [3, 4, 5], [19, 2, 7])
        decoder.fill(rows, hidden, [19, 2, 7], 1, 4)
        decoder.fill(rows[1:], hidden[1:], [3, 8], 2, 4)
        if recorder is not None:
            # Embedding, two segments, and one.
            assert sum(recording.replays for recording in recorder.recordings) == 4
        filled.append([decoder.pool.read(layer, rows, 20) for layer in range(4)])
    for ours, stock in zip(*filled, strict=True):
        torch.testing.assert_close(ours, stock)
    assert all(part.any() for pair in filled[0][1:] for part in pair)


def test_filling_some_rows_leaves_the_states_of_the_others():
    decoder = decoder_of()
    capture(decoder)
    rows = [decoder.pool.admit() for _ in range(2)]
    hidden = decoder.begin(rows, [3, 4], [0, 0])
    hidden = decoder.segment(rows, hidden, [0, 0], 0, 1)
    before = hidden.clone()
    decoder.fill([1], hidden[1:], [0], 1, 4)
    assert torch.equal(hidden, before)


def test_layers_that_end_within_a_segment_are_filled_eagerly():
    decoder = decoder_of()
    recorder = capture(decoder)
    decoder.pool.admit()
    hidden = decoder.begin([0], [3], [0])
    decoder.fill([0], hidden, [0], 2, 3)
    assert sum(recording.replays for recording in recorder.recordings) == 1


def test_graphs_are_captured_largest_first():
    decoder = decoder_of(exits=(2, 4))
    capture(decoder, max_context=48, subsets=True)
    keys = list(decoder.graphs.recordings)
    runs = [key for key in keys if key.kind is Kind.RUN]
    assert runs[0] == GraphKey(0, 2, 4, 48, False)
    assert runs[-1] == GraphKey(2, 4, 1, 48, True)
    assert len(runs) == 3 * 2 * 2 and runs == keys[: len(runs)]
    # Embedding and filling the second segment, by batch; no kernel of our own says what exits say.
    assert Counter(key.kind for key in keys[len(runs) :]) == {Kind.EMBED: 3, Kind.FILL: 3}
    for some in (runs, keys[len(runs) :]):
        assert [key.rows for key in some] == sorted((key.rows for key in some), reverse=True)
    assert decoder.graphs.capture_s > 0


def test_rows_that_are_not_the_first_go_eager_or_to_a_graph_that_gathers():
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((7, 12, 4))]
    states = {}
    for subsets in (None, False, True):
        decoder = decoder_of()
        recorder = None if subsets is None else capture(decoder, subsets=subsets)
        rows = [decoder.pool.admit() for _ in prompts]
        decoder.extend(rows, prompts, [0, 0, 0])
        positions = [7, 12, 4]
        middle = decoder.segment(rows, decoder.begin(rows, [1, 2, 3], positions), positions, 0, 2)
        before = 0 if recorder is None else sum(r.replays for r in recorder.recordings)
        states[subsets] = decoder.segment([2, 0], middle[[2, 0]], [4, 7], 2, 4)
        if recorder is not None:
            after = sum(recording.replays for recording in recorder.recordings)
            assert after - before == (1 if subsets else 0)
    for found in (states[False], states[True]):
        torch.testing.assert_close(found, states[None], rtol=1e-4, atol=1e-5)


def test_a_batch_or_context_beyond_every_bucket_goes_eager():
    decoder = decoder_of()
    capture(decoder, batch_buckets=(1, 2), max_context=16)
    rows = [decoder.pool.admit() for _ in range(3)]
    graphs = decoder.graphs
    assert graphs.key_of(decoder.place([0], [15]), 0, 1) == GraphKey(0, 1, 1, 16, False)
    assert graphs.key_of(decoder.place([0], [16]), 0, 1) is None
    assert graphs.key_of(decoder.place(rows, [3, 3, 3]), 0, 1) is None
    assert graphs.key_of(decoder.place([0], [3], [2]), 0, 1) is None
    assert graphs.key_of(decoder.place([0], [3]), 0, 3) is None


def test_a_place_of_more_blocks_than_any_graph_reads_goes_eager_whatever_is_asked():
    eager, decoder = (decoder_of(pool="paged") for _ in range(2))
    recorder = capture(decoder, max_context=16)
    found = []
    for one in (eager, decoder):
        row = one.pool.admit()
        one.extend([row], [tiny.prompt(19)], [0])
        place = one.place([row], [19])
        hidden = one.run(place, one.embed(place, [3]), 0, 1)
        one.fill([row], hidden, [19], 1, 4)
        told = one.tell(place, hidden, 1)
        found.append([hidden, told, *(one.pool.read(layer, [row], 20) for layer in range(4))])
    assert not any(recording.replays for recording in recorder.recordings)
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock)


def test_graphs_are_void_once_layers_or_stores_are_dropped():
    decoder = decoder_of(exits=(2, 4))
    capture(decoder)
    decoder.model.shrink(2)
    row = decoder.pool.admit()
    decoder.segment([row], decoder.begin([row], [1], [0]), [0], 0, 2)
    assert decoder.graphs is None
    assert "dropped after the graphs were captured" in decoder.graphs_off_reason
    capture(decoder)
    decoder.pool.resize(2)
    decoder.segment([row], decoder.begin([row], [1], [1]), [1], 0, 2)
    assert decoder.graphs is None


@pytest.mark.parametrize("pool", ["slots", "paged"])
def test_on_demand_a_graph_is_captured_when_it_is_first_wanted(pool):
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 17, 9))]
    decoder = decoder_of(pool=pool)
    expected = generate(decoder, prompts, 16)
    recorder = capture(decoder, on_demand=True)
    assert decoder.graphs.num_graphs == 0
    assert generate(decoder, prompts, 16) == expected
    # Three segments of four padded rows of the one context there is, for one token and for all.
    assert decoder.graphs.num_graphs == 3
    assert (decoder.graphs.ran_layers, decoder.graphs.filled_layers) == (4, 0)
    assert sum(recording.replays for recording in recorder.recordings) == 3 * 15
    assert decoder.graphs.capture_s > 0
    decoder.pool.check()


def test_a_load_is_warmed_up_once_in_a_process_and_for_all_layers():
    warm_loads.cache_clear()
    first, second = decoder_of(), decoder_of()
    warm_ups = [
        [recording.warm_ups for recording in capture(decoder, batch_buckets=(2,)).recordings]
        for decoder in (first, second)
    ]
    # Three segments, two of them filled, and embedding.
    assert warm_ups == [[WARM_UPS, 0, 0, WARM_UPS, 0, WARM_UPS], [0] * 6]


def test_warming_up_captures_one_of_each_load_that_was_never_run():
    warm_loads.cache_clear()
    first, second = decoder_of(), decoder_of()
    capture(first, on_demand=True)
    first.graphs.warm_up()
    # Embedding, one segment and one filling for each of three buckets.
    assert first.graphs.num_graphs == 3 * 3
    recorder = capture(second, on_demand=True)
    second.graphs.warm_up()
    assert second.graphs.num_graphs == 0
    generate(second, [tiny.prompt(5)], 4)
    assert {recording.warm_ups for recording in recorder.recordings} == {0}


def test_a_capture_that_fails_while_serving_leaves_the_eager_path():
    decoder = decoder_of()
    prompts = [tiny.prompt(4), tiny.prompt(6)]
    expected = generate(decoder, prompts, 8)
    assert decoder.use_graphs((2,), 48, on_demand=True, recorder=FakeRecorder(fails=True))
    assert generate(decoder, prompts, 8) == expected
    assert decoder.graphs is None
    assert decoder.graphs_off_reason == "capturing failed: no memory is left"


def test_growing_keeps_the_graphs_of_the_layers_that_stay():
    decoder = decoder_of(exits=(2, 4))
    decoder.model.shrink(2)
    capture(decoder)
    decoder.model.grow(4)
    row = decoder.pool.admit()
    decoder.segment([row], decoder.begin([row], [1], [0]), [0], 0, 2)
    assert decoder.graphs is not None


def test_a_failed_capture_leaves_the_eager_path_and_says_why():
    decoder = decoder_of()
    assert not decoder.use_graphs((1,), 48, recorder=FakeRecorder(fails=True))
    assert decoder.graphs_off_reason == "capturing failed: no memory is left"
    assert len(generate(decoder, [tiny.prompt(4)], 3)[0]) == 3


class FakeCuda:
    """What the recorder asks of torch.cuda, with the streams that work ran on."""

    def __init__(self, monkeypatch, fails=False):
        self.serving = SimpleNamespace(wait_stream=lambda other: None)
        self.current, self.ran_on, self.made, self.fails = self.serving, [], 0, fails
        for name in (
            "CUDAGraph",
            "Stream",
            "current_device",
            "current_stream",
            "device",
            "graph_pool_handle",
            "stream",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        self.ended: list[tuple[int, str]] = []
        # A torch without CUDA lacks it.
        monkeypatch.setattr(
            torch._C,
            "_cuda_endAllocateToPool",
            lambda index, pool: self.ended.append((index, pool)),
            raising=False,
        )
        capture_stream.cache_clear()

    def Stream(self, device_index):
        self.made += 1
        return SimpleNamespace(wait_stream=lambda other: None)

    def CUDAGraph(self):
        return SimpleNamespace(
            replay=lambda: None, capture_begin=self.capture_begin, capture_end=self.capture_end
        )

    def capture_begin(self, pool, capture_error_mode):
        assert pool == "pool"
        assert capture_error_mode == "thread_local"

    def capture_end(self):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\ntrace")

    def current_device(self):
        return 0

    def current_stream(self, device=None):
        return self.current

    def graph_pool_handle(self):
        return "pool"

    def device(self, device):
        return nullcontext()

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def body(self):
        self.ran_on.append(self.current)
        return torch.zeros(1)


def test_everything_is_warmed_up_and_captured_on_one_stream(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda"))
    assert float(recorder.record(cuda.body, WARM_UPS).replay()) == 0.0
    CudaRecorder(torch.device("cuda")).record(cuda.body, WARM_UPS)
    assert cuda.made == 1
    assert len(cuda.ran_on) == 2 * (WARM_UPS + 1)
    assert len(set(map(id, cuda.ran_on))) == 1
    assert cuda.current is cuda.serving
    assert cuda.ended == []


def test_a_capture_that_fails_gives_the_stream_back_and_says_why_in_a_line(monkeypatch):
    cuda = FakeCuda(monkeypatch, fails=True)
    with pytest.raises(CaptureError, match=r"^operation not permitted when stream is capturing$"):
        CudaRecorder(torch.device("cuda")).record(cuda.body, 0)
    assert cuda.current is cuda.serving
    assert cuda.ended == [(0, "pool")]


def test_weights_that_another_thread_lets_go_of_wait_for_the_end_of_a_capture(monkeypatch):
    """A load beside serving that fails would otherwise take the capture down with it."""
    cuda, did, reached = FakeCuda(monkeypatch), [], threading.Event()
    model = from_stock(tiny.stock_model("opt"), (2, 4))
    model.device = torch.device("cuda")

    def forbidden(what):
        did.append(what)
        reached.set()

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: forbidden("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: forbidden("give back"))
    other = threading.Thread(target=model.unload)

    def body():
        other.start()
        assert not reached.wait(0.3)
        did.append("capture")
        return torch.zeros(1)

    CudaRecorder(torch.device("cuda")).record(body, 0)
    other.join(10.0)
    assert did == ["capture", "wait", "give back"]
    assert cuda.ended == []


def test_a_capture_that_fails_keeps_nobody_waiting(monkeypatch):
    cuda = FakeCuda(monkeypatch, fails=True)
    with pytest.raises(CaptureError):
        CudaRecorder(torch.device("cuda")).record(cuda.body, 0)
    assert not CAPTURING.locked()


@pytest.mark.cuda
@pytest.mark.parametrize("pool", ["slots", "paged"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cuda_graphs_give_the_tokens_of_the_eager_path(family, pool):
    device = tiny.need("cuda")
    model = from_stock(tiny.stock_model(family).to(device), (1, 2, 4))
    made = slot_pool(model, 5, 64) if pool == "slots" else paged_pool(model, 40, 8)
    decoder = Decoder(model, made)
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 17, 9))]
    expected = generate(decoder, prompts, 20)
    assert decoder.use_graphs((1, 2, 4), 64), decoder.graphs_off_reason
    assert generate(decoder, prompts, 20) == expected
    assert decoder.graphs is not None


@pytest.mark.cuda
@pytest.mark.parametrize("pool", ["slots", "paged"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_cuda_graphs_embed_tell_and_fill_as_the_eager_path(family, pool):
    device = tiny.need("cuda")
    found, apart = [], []
    for graphs in (False, True):
        stock = tiny.stock_model(family).to(device, torch.bfloat16)
        model = from_stock(stock, (1, 2, 4))
        made = slot_pool(model, 5, 64) if pool == "slots" else paged_pool(model, 40, 8)
        decoder = Decoder(model, made)
        if graphs:
            assert decoder.use_graphs((1, 2, 4), 64), decoder.graphs_off_reason
        rows = [decoder.pool.admit(20) for _ in range(3)]
        said = []
        # The same again reads what the first time left in the buffers.
        for _ in range(2):
            place = decoder.place(rows, [19, 2, 7], targets=[5, 6, 7])
            hidden = decoder.run(place, decoder.embed(place, [3, 4, 5]), 0, 1)
            said.append(decoder.tell(place, hidden, 0)[:, :3].clone())
            best = model.logits(hidden, 0).float().topk(2).values
            apart.append(best[:, 0] - best[:, 1] > 0.1)
            decoder.fill_place(place, hidden, 1, 4)
            decoder.fill(rows[1:], hidden[1:].clone(), [3, 8], 2, 4)
            said.append(decoder.tell(place, hidden, 0)[:, :3].clone())
        assert decoder.graphs is not None or not graphs
        kept = [part for layer in range(4) for part in decoder.pool.read(layer, rows, 20)]
        found.append([*said, *kept])
    # A padded product may sum in another order, and all were rounded to 16 bits on the way.
    clear = torch.stack(apart).all(0)
    assert clear.any()
    for ours, eager in zip(*found, strict=True):
        if ours.shape == (3, 3):
            assert torch.equal(ours[0][clear], eager[0][clear])
            parts = [(ours[row], eager[row]) for row in (1, 2)]
        else:
            parts = [(ours, eager)]
        for one, other in parts:
            assert float((one - other).norm()) <= 3e-2 * float(other.norm())
