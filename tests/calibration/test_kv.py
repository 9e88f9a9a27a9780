"""The KV pools keep what was written, give places back, and never give one away twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.model import kv, memory
from calibration.model.kv import KvDims, KvMemory, PagedPool, Pool, PoolExhausted, SlotPool
from helios_sim.errors import InputError

DIMS = KvDims(2, 4, torch.float32, torch.device("cpu"))


def pools() -> list[Pool]:
    return [SlotPool(DIMS, 2, 4, 20), PagedPool(DIMS, 2, 20, 4, max_rows=4, max_tokens=20)]


def write(pool: Pool, layer: int, row: int, positions: list[int], seed: int) -> torch.Tensor:
    values = torch.randn(len(positions), 2, 4, generator=torch.Generator().manual_seed(seed))
    where = np.asarray(positions, dtype=np.int64)
    addresses = pool.addresses(np.full(len(positions), row, dtype=np.int64), where)
    pool.write(layer, torch.from_numpy(addresses), values, -values)
    return values


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_what_was_written_is_read_layer_by_layer(pool):
    written = {}
    for row, length in enumerate((3, 11, 7)):
        assert pool.admit(length) == row
        for layer in range(2):
            values = write(pool, layer, row, list(range(length)), 10 * row + layer)
            written[row, layer] = values
    for rows in ([0, 1, 2], [1], [2, 0]):
        key, value = pool.read(1, rows, 11)
        assert key.shape == (len(rows), 2, 11, 4)
        for index, row in enumerate(rows):
            expected = written[row, 1]
            length = len(expected)
            assert torch.equal(key[index, :, :length].transpose(0, 1), expected)
            assert torch.equal(value[index, :, :length].transpose(0, 1), -expected)


def test_the_first_slots_are_a_view_and_others_a_copy():
    pool = SlotPool(DIMS, 1, 4, 20)
    for _ in range(3):
        pool.admit(5)
    key, _ = pool.read(0, [0, 1], 5)
    assert key.data_ptr() == pool.keys[0].data_ptr()
    key, _ = pool.read(0, [1, 2], 5)
    assert key.untyped_storage().data_ptr() != pool.keys[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("make", [0, 1], ids=["slots", "paged"])
@given(data=st.data())
@settings(max_examples=60)
def test_rows_keep_their_tokens_through_any_coming_and_going(make, data):
    pool = pools()[make]
    contents: list[torch.Tensor] = []
    for turn in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(["admit", "grow", "vacate", "release", "swap"]))
        if kind == "admit":
            length = data.draw(st.integers(0, 20))
            try:
                row = pool.admit(length)
            except PoolExhausted:
                continue
            contents.append(write(pool, 1, row, list(range(length)), turn))
        elif kind == "grow" and contents:
            row = data.draw(st.integers(0, len(contents) - 1))
            held = len(contents[row])
            length = data.draw(st.integers(held, 20))
            try:
                pool.reserve(row, length)
            except PoolExhausted:
                continue
            more = write(pool, 1, row, list(range(held, length)), turn)
            contents[row] = torch.cat((contents[row], more))
        elif kind == "vacate" and contents:
            row = data.draw(st.integers(0, len(contents) - 1))
            pool.vacate(row)
            contents[row] = contents[row][:0]
        elif kind == "release" and contents:
            row = data.draw(st.integers(0, len(contents) - 1))
            moved = pool.release(row)
            last = contents.pop()
            assert moved == (None if row == len(contents) else len(contents))
            if moved is not None:
                contents[row] = last
        elif kind == "swap" and contents:
            one, other = (data.draw(st.integers(0, len(contents) - 1)) for _ in range(2))
            pool.swap(one, other)
            contents[one], contents[other] = contents[other], contents[one]
        pool.check()
        assert pool.lengths == [len(held) for held in contents]
        for row, held in enumerate(contents):
            if len(held):
                key, value = pool.read(1, [row], len(held))
                assert torch.equal(key[0].transpose(0, 1), held)
                assert torch.equal(value[0].transpose(0, 1), -held)


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_rows_that_find_no_place_leave_those_before_them_theirs(pool):
    """Rows of 3, 11 and 7 tokens: 2 are there already, 12 fit, and 21 are more than a row holds."""
    for length in (3, 11, 7):
        pool.admit(length)
    with pytest.raises(PoolExhausted, match="asked to hold 21 tokens; the pool allows 20"):
        pool.reserve_each([0, 1, 2], [2, 12, 21])
    assert pool.lengths == [3, 12, 7]
    for row in (-1, 3):
        with pytest.raises(ValueError, match=f"Row {row} is not in use"):
            pool.reserve_each([0, row], [20, 1])
    assert pool.lengths == [3, 12, 7]
    pool.check()


def test_blocks_go_out_and_come_back():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(9)
    assert len(pool.free) == 2
    with pytest.raises(PoolExhausted, match="needs 3 more blocks and 2 of 5 are free"):
        pool.admit(9)
    assert pool.num_rows == 1
    pool.admit(8)
    pool.release(0)
    assert len(pool.free) == 3
    pool.check()
    pool.clear()
    assert len(pool.free) == 5


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_a_vacated_row_keeps_its_number_for_another(pool):
    for _ in range(pool.max_rows):
        pool.admit(5)
    kept = write(pool, 0, 2, list(range(5)), 1)
    edition = pool.edition
    pool.vacate(1)
    pool.check()
    assert pool.edition > edition
    assert pool.num_rows == pool.max_rows
    assert pool.lengths[1] == 0
    pool.reserve(1, 5)
    write(pool, 0, 1, list(range(5)), 2)
    pool.check()
    assert torch.equal(pool.read(0, [2], 5)[0][0].transpose(0, 1), kept)
    pool.vacate(1)
    assert pool.release(1) == pool.max_rows - 1
    with pytest.raises(ValueError, match="is not in use"):
        pool.vacate(pool.max_rows - 1)


def test_a_vacated_rows_blocks_are_free_at_once():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(9)
    pool.admit(4)
    pool.vacate(0)
    assert len(pool.free) == 4


def test_all_rows_in_use_is_said():
    pool = SlotPool(DIMS, 1, 1, 20)
    pool.admit()
    with pytest.raises(PoolExhausted, match="All 1 rows"):
        pool.admit()


def test_the_check_finds_a_block_that_two_rows_hold():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(4)
    pool.admit(4)
    pool.table[1, 0] = pool.table[0, 0]
    with pytest.raises(RuntimeError, match="Two rows own the same token"):
        pool.check()


def test_the_check_finds_a_lost_block():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(4)
    pool.free.pop()
    with pytest.raises(RuntimeError, match="3 free and 1 held blocks are not the pool's 5"):
        pool.check()


def test_the_check_finds_a_token_behind_the_pool():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(1)
    pool.table[0, 0] = 5
    assert pool.addresses(np.array([0]), np.array([0])) == [pool.scratch_address]
    with pytest.raises(RuntimeError, match="a token outside the pool"):
        pool.check()


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_resizing_keeps_rows_and_counts_bytes(pool):
    pool.admit(6)
    values = write(pool, 0, 0, list(range(6)), 1)
    planned = pool.planned_bytes(2)
    assert pool.bytes == planned
    store, generation = pool.keys[0], pool.generation
    pool.resize(5)
    assert pool.num_layers == 5
    assert pool.bytes == pool.planned_bytes(5)
    assert pool.keys[0] is store
    assert pool.generation == generation
    pool.resize(1)
    assert pool.generation == generation + 1
    assert pool.bytes == planned // 2
    assert torch.equal(pool.read(0, [0], 6)[0][0].transpose(0, 1), values)


def test_a_pool_too_large_for_the_device_is_refused_with_needed_and_available(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1000)
    with pytest.raises(
        InputError, match=r"needs 6,144 bytes .* on cpu and 1,000 bytes .* use fewer rows"
    ):
        SlotPool(DIMS, 1, 4, 20)


def test_a_released_row_cannot_be_used():
    pool = SlotPool(DIMS, 1, 2, 20)
    with pytest.raises(ValueError, match="Row 0 is not in use"):
        pool.reserve(0, 1)


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_padding_writes_where_no_row_reads(pool):
    assert pool.capacity_tokens <= pool.scratch_address < pool.keys[0].shape[0]
    assert pool.keys[0].shape[0] == pool.capacity_tokens + kv.SCRATCH_TOKENS


@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_pools_of_one_memory_are_cut_from_the_same_place(kind):
    shared = KvMemory()

    def pool(layers, rows):
        if kind == "slots":
            return SlotPool(DIMS, layers, rows, 16, shared)
        return PagedPool(DIMS, layers, 2 * rows, 8, memory=shared)

    first = pool(3, 4)
    place = first.keys[0].data_ptr()
    first.keys[0].fill_(7.0)
    smaller = pool(2, 5)
    assert smaller.keys[0].data_ptr() == place
    stores = [*smaller.keys, *smaller.values]
    spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in stores)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert shared.bytes == first.bytes
    larger = pool(4, 9)
    assert float(larger.keys[0].abs().sum()) == 0.0
    larger.resize(5)
    assert larger.num_layers == 5
    larger.check()


def test_a_pool_cut_from_memory_that_is_held_needs_no_more_of_the_device(monkeypatch):
    shared = KvMemory()
    first = SlotPool(DIMS, 2, 4, 16, shared)
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 0)
    assert SlotPool(DIMS, 2, 4, 16, shared).keys[0].data_ptr() == first.keys[0].data_ptr()
    # Of a larger pool only what is beyond the memory held is asked for.
    beyond = 16 * 2 * DIMS.bytes_per_token_layer
    with pytest.raises(InputError, match=f"needs {beyond:,} bytes"):
        SlotPool(DIMS, 2, 5, 16, shared)


def test_memory_of_another_type_is_not_cut_from():
    shared = KvMemory()
    SlotPool(DIMS, 1, 4, 16, shared)
    halves = KvDims(2, 4, torch.bfloat16, torch.device("cpu"))
    pool = SlotPool(halves, 1, 2, 16, shared)
    assert pool.keys[0].dtype == pool.values[0].dtype == torch.bfloat16
    assert shared.bytes == pool.bytes


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_a_row_holds_as_many_tokens_as_the_pool_allows_and_no_more(pool):
    row = pool.admit(pool.max_tokens)
    assert pool.lengths[row] == 20
    with pytest.raises(PoolExhausted, match="to hold 21 tokens; the pool allows 20"):
        pool.reserve(row, 21)


@pytest.mark.parametrize("pool", pools(), ids=["slots", "paged"])
def test_known_addresses_are_void_exactly_when_tokens_change_hands(pool):
    def changes(work):
        before = pool.edition
        work()
        return pool.edition > before

    assert changes(lambda: pool.admit(3))
    assert changes(lambda: pool.admit(5))
    assert changes(lambda: pool.reserve(0, 4))
    assert not changes(lambda: pool.reserve(0, 4))
    assert not changes(lambda: pool.reserve(0, 2))
    assert changes(lambda: pool.swap(0, 1))
    assert changes(lambda: pool.release(1))


def test_attention_reads_slots_in_granules_and_never_beyond_them():
    pool = SlotPool(DIMS, 1, 4, 20)
    widths = [pool.context_tokens(count) for count in (1, 16, 17, 20)]
    assert widths == [16, 16, 20, 20]


def test_a_row_of_pages_may_end_within_its_last_block():
    pool = PagedPool(DIMS, 1, 20, 4, max_tokens=18)
    row = pool.admit(18)
    assert pool.addresses(np.array([row]), np.array([17])) == [17]
    pool.check()
    assert PagedPool(DIMS, 1, 5, 4, max_tokens=1000).max_tokens == 20


def test_the_table_names_no_block_beyond_what_a_row_holds():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(4)
    pool.admit(12)
    pool.vacate(1)
    assert not pool.table[1].any()


def test_rows_of_pages_are_never_a_plain_view():
    pool = PagedPool(DIMS, 1, 5, 4)
    pool.admit(4)
    with pytest.raises(ValueError, match="found by their blocks"):
        pool.gather(0, None, 1, 4)


def broken(pool, how):
    """A pool of two rows whose books are wrong."""
    for _ in range(2):
        pool.admit(4)
    how(pool)
    return pool


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda pool: setattr(pool, "max_rows", 1), "2 rows are in use of 1"),
        (lambda pool: setattr(pool, "max_tokens", 3), "Row 0 holds 4 of 3 tokens"),
        (lambda pool: pool.lengths.__setitem__(1, -1), "Row 1 holds -1 of 20 tokens"),
        (lambda pool: pool.table.__setitem__((0, 0), -1), "a token outside the pool"),
        (lambda pool: pool.lengths.__setitem__(1, 0), "Row 1 holds 1 blocks, 0 tokens"),
        (lambda pool: pool.values.__setitem__(0, pool.values[0][:-1]), "store's size differs"),
    ],
)
def test_the_check_finds_every_kind_of_wrong_book(how, said):
    with pytest.raises(RuntimeError, match=said):
        broken(PagedPool(DIMS, 1, 5, 4, max_rows=4, max_tokens=20), how).check()


@pytest.fixture
def unwritten_is_no_number():
    """Memory that nobody has written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("memory_of", [lambda: None, KvMemory], ids=["own", "shared"])
def test_new_stores_hold_zeros_since_what_is_masked_is_multiplied_too(
    memory_of, unwritten_is_no_number
):
    pool = SlotPool(DIMS, 1, 2, 16, memory_of())
    pool.resize(2)
    assert not any(store.any() for store in (*pool.keys, *pool.values))


def test_memory_that_grows_gives_the_old_back_first(monkeypatch):
    shared, zeros = KvMemory(), torch.zeros
    SlotPool(DIMS, 1, 2, 16, shared)
    held = []

    def watched(*arguments, **named):
        held.append(shared.bytes)
        return zeros(*arguments, **named)

    monkeypatch.setattr(torch, "zeros", watched)
    SlotPool(DIMS, 1, 9, 16, shared)
    assert held == [0]


def test_layers_that_come_to_a_pool_of_shared_memory_are_asked_of_the_device(monkeypatch):
    """They are not cut from what the pool's own layers lie in."""
    pool = SlotPool(DIMS, 2, 4, 16, KvMemory())
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 0)
    with pytest.raises(InputError, match=f"needs {pool.bytes // 2:,} bytes"):
        pool.resize(3)
