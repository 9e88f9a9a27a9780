"""Rows come to a machine's pool, leave gaps in it, and others fill them or close up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.model.decode import Decoder
from calibration.model.early_exit import from_stock
from calibration.model.kv import PagedPool, Pool, SlotPool
from calibration.serving.batching import Row
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
