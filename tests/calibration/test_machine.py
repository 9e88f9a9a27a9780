"""Rows come to a machine's pool, leave gaps in it, and others fill them or close up."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.model.decode import Decoder
from calibration.model.early_exit import from_stock
from calibration.model.kv import PagedPool, Pool, PoolExhausted, SlotPool
from calibration.serving.batching import Row
from calibration.serving.iteration import Answer, Captures
from calibration.serving.machine import ModelMachine
from helios_sim.errors import InputError
from tests.calibration.serving import lives_for, model_of
from tests.calibration.tiny import stock_model

ROWS, TOKENS = 5, 24
MODEL = model_of("one", (2, 3))


def pool_of(kind: str) -> Pool:
    if kind == "slots":
        return SlotPool(MODEL.kv_dims, 3, ROWS, TOKENS)
    return PagedPool(MODEL.kv_dims, 3, ROWS * TOKENS // 4, 4, max_rows=ROWS)


def machine_of(pool: Pool) -> ModelMachine:
    return ModelMachine(MODEL, pool, Decoder(MODEL, pool), depth=3, free_running=False)


def new_row(number: int, prompt_tokens: int = 6) -> Row:
    (life,) = lives_for([(prompt_tokens, TOKENS - prompt_tokens)], seed=number)
    return Row(life, to_prefill=prompt_tokens, blocks=0)


def prefill(machine: ModelMachine, rows: list[Row]) -> list[Any]:
    machine.prefill(rows)
    told = machine.read(1)
    for row in rows:
        row.context, row.to_prefill = row.to_prefill, 0
        row.life.emitted.append(0)
    return told


def decode(machine: ModelMachine, rows: list[Row]) -> list[Any]:
    machine.begin(rows, 0, ())
    machine.run_to(1)
    told = machine.read(1)
    for row in rows:
        row.context += 1
        row.life.emitted.append(0)
    return told


@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_new_rows_fill_the_gaps_and_nothing_is_copied(kind: str, monkeypatch: Any) -> None:
    pool = pool_of(kind)
    machine = machine_of(pool)
    rows = [new_row(number) for number in range(ROWS)]
    prefill(machine, rows)
    monkeypatch.setattr(pool, "swap", lambda *_: pytest.fail("tokens were moved"))
    machine.release(rows[1])
    machine.release(rows[3])
    pool.check()
    assert pool.num_rows == ROWS
    newer = [new_row(10), new_row(11)]
    prefill(machine, newer)
    assert [row.slot for row in newer] == [1, 3]
    decode(machine, [rows[0], newer[0], rows[2], newer[1], rows[4]])


@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_gaps_that_nobody_fills_are_closed_before_the_next_decode(kind: str) -> None:
    pool = pool_of(kind)
    machine = machine_of(pool)
    rows = [new_row(number) for number in range(ROWS)]
    prefill(machine, rows)
    for leaving in (rows[0], rows[3], rows[4]):
        machine.release(leaving)
    assert pool.num_rows == 3
    decode(machine, rows[1:3])
    assert pool.num_rows == 2
    assert machine.occupants == [rows[2], rows[1]]
    assert sorted(row.slot for row in rows[1:3]) == [0, 1]
    for leaving in rows[1:3]:
        machine.release(leaving)
    assert pool.num_rows == 0


@pytest.mark.parametrize("kind", ["slots", "pages"])
@given(data=st.data())
@settings(max_examples=25)
def test_a_row_is_told_the_same_however_others_come_and_go(kind: str, data: Any) -> None:
    pool = pool_of(kind)
    machine = machine_of(pool)
    running: list[Row] = []
    told: dict[Row, list[float]] = {}
    for turn in range(data.draw(st.integers(1, 10))):
        for row in list(running):
            if row.life.generated >= TOKENS - 7 or data.draw(st.booleans()):
                running.remove(row)
                machine.release(row)
        pool.check()
        new = [
            new_row(10 * turn + place)
            for place in range(data.draw(st.integers(0, ROWS - len(running))))
        ]
        if new:
            for row, one in zip(new, prefill(machine, new), strict=True):
                told[row] = [one.nll_nats]
            running += new
        if running:
            for row, one in zip(running, decode(machine, running), strict=True):
                told[row].append(one.nll_nats)
        pool.check()
        assert [row for row in machine.occupants if row is not None] == sorted(
            running, key=lambda row: row.slot
        )
    for row, found in told.items():
        row.life.emitted.clear()
        single = machine_of(SlotPool(MODEL.kv_dims, 3, 1, TOKENS))
        alone = Row(row.life, to_prefill=6, blocks=0)
        expected = [prefill(single, [alone])[0].nll_nats]
        expected += [decode(single, [alone])[0].nll_nats for _ in found[1:]]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_with_what_to_do(broken: float) -> None:
    machine = machine_of(pool_of("slots"))
    rows = [new_row(0), new_row(1)]
    prefill(machine, rows)
    machine.begin(rows, 0, ())
    machine.run_to(1)
    assert machine._hidden is not None
    machine._hidden[1] = broken
    with pytest.raises(InputError, match=r"'one' at the exit of layer 3 are not finite in float32"):
        machine.read(1)


def test_in_float16_the_remedy_is_another_precision() -> None:
    stock = stock_model("llama", 3)
    with torch.no_grad():
        stock.lm_head.weight.mul_(1e6)
    model = from_stock(stock.to(torch.float16), (2, 3), name="steep", tokenizer="bytes")
    pool = SlotPool(model.kv_dims, 3, ROWS, TOKENS)
    machine = ModelMachine(model, pool, Decoder(model, pool), depth=3, free_running=False)
    with pytest.raises(InputError, match="float16; measure and serve it in bfloat16 or float32"):
        prefill(machine, [new_row(0)])


def test_what_padding_rows_say_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of(pool_of("slots"))
    tell = machine.decoder.tell

    def padded(*arguments: Any) -> torch.Tensor:
        said = torch.nn.functional.pad(tell(*arguments), (0, 2))
        said[1:, -2:] = math.nan
        return said

    monkeypatch.setattr(machine.decoder, "tell", padded)
    assert len(prefill(machine, [new_row(0), new_row(1)])) == 2


@pytest.mark.parametrize("broken", [1, 2])
def test_a_confidence_or_a_likelihood_alone_that_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    machine = machine_of(pool_of("slots"))
    tell = machine.decoder.tell

    def said(*arguments: Any) -> torch.Tensor:
        found = tell(*arguments)
        found[broken, 0] = math.nan
        return found

    monkeypatch.setattr(machine.decoder, "tell", said)
    with pytest.raises(InputError, match="not finite"):
        prefill(machine, [new_row(0), new_row(1)])


def test_what_rounding_puts_beyond_a_share_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_of(pool_of("slots"))
    told = torch.tensor([[7.0, 8.0], [1.25, -0.25], [-0.25, 2.0]])
    monkeypatch.setattr(machine.decoder, "tell", lambda *_: told)
    found = prefill(machine, [new_row(0), new_row(1)])
    assert found == [Answer(7, 1.0, 0.0), Answer(8, 0.0, 2.0)]


def test_answers_come_in_the_order_of_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand in the pool, and without those that are done."""
    machine = machine_of(pool_of("slots"))
    rows = [new_row(number) for number in range(3)]
    prefill(machine, rows)
    monkeypatch.setattr(machine.decoder, "tell", lambda *_: torch.tensor([[5.0, 6.0, 7.0]] * 3))
    for wanted, ghosts in (([2, 0, 1], []), ([2, 0], [1]), ([1], [0, 2])):
        machine.begin([rows[one] for one in wanted], 0, [rows[one] for one in ghosts])
        machine.run_to(1)
        # Nobody's word is a likelihood or a confidence here: all that counts is whose it is.
        assert [answer.token for answer in machine.read(1)] == [5 + one for one in wanted]


def test_rows_that_are_held_go_on_from_where_they_stood() -> None:
    """Two of three, in another order: what they are told is what all are told at once."""
    together, apart = (machine_of(pool_of("slots")) for _ in range(2))
    told = []
    for machine in (together, apart):
        rows = [new_row(number) for number in range(3)]
        prefill(machine, rows)
        machine.begin(rows, 0, ())
        machine.run_to(0)
        if machine is apart:
            machine.hold([rows[2], rows[0]])
            assert [row.hidden is not None for row in rows] == [True, False, True]
            machine.begin([rows[2], rows[0]], 1, ())
        machine.run_to(1)
        told.append([answer.nll_nats for answer in machine.read(1)])
        machine.hold([])
        assert not any(row.hidden is not None for row in rows)
    torch.testing.assert_close(told[1], [told[0][2], told[0][0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaving", [[2, 0], [0, 1, 2]])
def test_the_kv_of_rows_is_filled_at_their_places_beyond_the_exit_and_nowhere_else(
    leaving: list[int],
) -> None:
    machine = machine_of(pool_of("slots"))
    rows = [new_row(number) for number in range(3)]
    prefill(machine, rows)
    machine.begin(rows, 0, ())
    machine.run_to(0)
    before, store = machine.pool.keys[1].clone(), machine.pool.keys[2]
    store.zero_()
    machine.fill([rows[one] for one in leaving], 0)
    held = store[: machine.pool.capacity_tokens].view(ROWS, TOKENS, -1)
    assert held.abs().sum(-1).nonzero().tolist() == [[one, 6] for one in sorted(leaving)]
    assert torch.equal(machine.pool.keys[1], before)


def test_a_row_that_is_done_keeps_one_token_and_is_computed_at_its_first_place() -> None:
    machine = machine_of(pool_of("pages"))
    rows = [new_row(0, 9), new_row(1, 6), new_row(2, 2), new_row(3, 1)]
    prefill(machine, rows)
    machine.begin(rows[:1], 0, rows[1:])
    assert [machine.pool.lengths[row.slot] for row in rows] == [10, 1, 1, 1]
    machine.pool.check()


def test_a_row_that_left_has_no_place_and_no_state() -> None:
    machine = machine_of(pool_of("slots"))
    rows = [new_row(0), new_row(1)]
    prefill(machine, rows)
    machine.begin(rows, 0, ())
    machine.run_to(0)
    machine.hold(rows)
    machine.release(rows[0])
    assert (rows[0].slot, rows[0].hidden) == (-1, None)
    assert machine.pool.lengths == [0, 6 + 1]
    assert (rows[1].slot, machine.occupants) == (1, [None, rows[1]])


def test_a_free_running_row_is_fed_its_prompt_and_what_it_emitted() -> None:
    machine = machine_of(pool_of("slots"))
    machine.free_running = True
    row = new_row(0, 4)
    row.life.emitted = [91, 92, 93]
    prompt = row.life.text[:4]
    for start, stop, tokens in (
        (0, 4, prompt),
        (0, 6, [*prompt, 91, 92]),
        (3, 5, [prompt[3], 91]),
        (4, 5, [91]),
        (5, 7, [92, 93]),
    ):
        assert machine._tokens(row, start, stop) == tokens
    # As one that was preempted is: its own words are part of what is prefilled.
    row.to_prefill = 6
    assert machine._prompt(row).tolist() == [*prompt, 91, 92]
    machine.free_running = False
    assert machine._prompt(row).tolist() == row.life.text[:6]


@pytest.mark.parametrize(
    ("contexts", "by_graphs"), [([5, 6], True), ([0, 6], True), ([0, 0], False)]
)
def test_graphs_serve_a_batch_in_which_somebody_has_read_a_token(
    contexts: list[int], by_graphs: bool
) -> None:
    machine = machine_of(pool_of("slots"))
    rows = [new_row(0), new_row(1)]
    prefill(machine, rows)
    for row, context in zip(rows, contexts, strict=True):
        row.context = context
    machine.begin(rows, 0, ())
    assert machine._place is not None
    assert machine._place.by_graphs == by_graphs


def test_the_true_token_after_the_new_one_is_asked_for_and_after_the_text_the_last() -> None:
    machine = machine_of(pool_of("slots"))
    rows = [new_row(0), new_row(1)]
    prefill(machine, rows)
    places: list[Any] = []
    place = machine.decoder.place
    machine.decoder.place = lambda *given: places.append(given) or place(*given)  # type: ignore[method-assign]
    rows[1].life.emitted = [0] * (TOKENS - 6)
    machine.begin(rows, 0, ())
    ((_, _, _, targets),) = places
    assert targets == [rows[0].life.text[7], rows[1].life.text[TOKENS - 1]]


def test_what_graphs_tell_of_exits_is_counted_apart() -> None:
    machine = machine_of(pool_of("slots"))
    assert machine.captures == Captures()
    counts: Any = SimpleNamespace(num_graphs=9, num_exits=2, ran_layers=5, filled_layers=3)
    machine.decoder.graphs = counts
    assert machine.captures == Captures(graphs=7, exits=2, layers=5, filled_layers=3)


@pytest.mark.parametrize("filled", [[0, 1], [1]])
def test_nothing_is_run_or_filled_beyond_the_loaded_depth(filled: list[int]) -> None:
    model = model_of("three", (1, 2, 3))
    pool = SlotPool(model.kv_dims, 3, ROWS, TOKENS)
    machine = ModelMachine(model, pool, Decoder(model, pool), depth=2, free_running=False)
    for store in pool.keys:
        store.zero_()
    rows = [new_row(0), new_row(1)]
    prefill(machine, rows)
    machine.begin(rows, 0, ())
    machine.run_to(0)
    machine.fill([rows[one] for one in filled], 0)
    written = [[bool(store[one * TOKENS + 6].any()) for one in range(2)] for store in pool.keys]
    assert written == [[True, True], [0 in filled, 1 in filled], [False, False]]
    assert not pool.keys[2].any()


def test_pending_tokens_are_fed_again_before_the_last_one_of_their_row() -> None:
    """Into the places they have, wherever rows have moved to; nothing else is computed again."""
    plain, again = (machine_of(pool_of("slots")) for _ in range(2))
    told = []
    for machine in (plain, again):
        rows = [new_row(number) for number in range(3)]
        prefill(machine, rows)
        machine.release(rows[0])
        if machine is plain:
            machine.begin(rows[1:], 0, ())
        else:
            rows[1].pending = 2
            for store in (*machine.pool.keys, *machine.pool.values):
                store[TOKENS + 4 : TOKENS + 6] = 0.0
            machine.begin_again(rows[1:])
        assert [row.slot for row in rows[1:]] == [1, 0]
        machine.run_to(1)
        told.append([answer.nll_nats for answer in machine.read(1)])
    torch.testing.assert_close(told[1], told[0], rtol=1e-4, atol=1e-4)


def test_whoever_leaves_first_the_last_places_are_given_back_and_the_first_gap_is_filled() -> None:
    machine = machine_of(pool_of("pages"))
    rows = [new_row(number) for number in range(ROWS)]
    prefill(machine, rows)
    for one in (3, 1, 4):
        machine.release(rows[one])
    assert machine.occupants == [rows[0], None, rows[2]]
    machine.pool.check()
    longer = new_row(9)
    longer.to_prefill = ROWS * TOKENS + 1
    with pytest.raises(PoolExhausted):
        machine.prefill([longer])
    newer = new_row(10)
    prefill(machine, [newer])
    assert newer.slot == 1


def test_as_many_rows_move_as_places_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five places two are gaps: the last row moves into the first, and the other is the last."""
    machine = machine_of(pool_of("slots"))
    rows = [new_row(number) for number in range(ROWS)]
    prefill(machine, rows)
    swap, swapped = machine.pool.swap, list[tuple[int, int]]()
    monkeypatch.setattr(
        machine.pool, "swap", lambda row, other: swapped.append((row, other)) or swap(row, other)
    )
    machine.release(rows[1])
    machine.release(rows[3])
    decode(machine, [rows[0], rows[2], rows[4]])
    assert machine.occupants == [rows[0], rows[4], rows[2]]
    assert len(swapped) == 1


def test_in_bfloat16_it_is_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_model("llama", 3).to(torch.bfloat16)
    model = from_stock(stock, (2, 3), name="broken", tokenizer="bytes")
    pool = SlotPool(model.kv_dims, 3, ROWS, TOKENS)
    machine = ModelMachine(model, pool, Decoder(model, pool), depth=3, free_running=False)
    monkeypatch.setattr(machine.decoder, "tell", lambda *_: torch.full((3, 1), math.nan))
    with pytest.raises(InputError, match="bfloat16; its weights are not sound"):
        prefill(machine, [new_row(0)])
