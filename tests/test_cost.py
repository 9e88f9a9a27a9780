"""Laws of the cost functions: what an iteration carries never makes it shorter, and padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_sim import cost
from helios_sim.cost import COEFFICIENTS, OPTIONAL_COEFFICIENTS

amounts = st.floats(0.0, 1e6)
costs = st.lists(
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    min_size=len(COEFFICIENTS),
    max_size=len(COEFFICIENTS),
).map(np.array)


def coefficients(**values: float) -> np.ndarray:
    """Coefficients by name, with underscores for dots; those not named are 0."""
    named = {name.replace(".", "_"): place for place, name in enumerate(COEFFICIENTS)}
    array = np.zeros(len(COEFFICIENTS))
    for name, value in values.items():
        array[named[name]] = value
    return array


def without_the_optional(c: np.ndarray) -> np.ndarray:
    """The coefficients of a profile that leaves the optional ones out."""
    plain = c.copy()
    plain[[COEFFICIENTS.index(name) for name in OPTIONAL_COEFFICIENTS]] = 0.0
    return plain


def test_every_coefficient_is_read_from_its_own_place_in_the_array() -> None:
    places = [getattr(cost, name.replace(".", "_").upper()) for name in COEFFICIENTS]
    assert places == list(range(len(COEFFICIENTS)))


@given(c=costs, rows=st.integers(1, 64), context=amounts, padding=amounts)
def test_without_its_coefficients_padding_changes_no_bit(
    c: np.ndarray, rows: int, context: float, padding: float
) -> None:
    plain = without_the_optional(c)
    padded = context + padding
    for prefill in ((0.0, 0.0, 0.0), (7.0, 3.0, 28.0)):
        assert cost.layer_seconds(plain, rows, context, padded, *prefill) == cost.layer_seconds(
            plain, rows, context, context, *prefill
        )
    work = (4.0, 1.0, 1.0, 2.0, rows, rows, 1.25)
    assert cost.decode_seconds(plain, rows, context, padded, *work) == cost.decode_seconds(
        plain, rows, context, context, *work
    )


@pytest.mark.parametrize("regime", ["memory", "compute"])
@given(rows=st.integers(1, 64), longest=st.integers(1, 4096))
def test_equal_rows_cost_the_same_by_their_context_or_by_the_padded_one(
    regime: str, rows: int, longest: int
) -> None:
    by_context = coefficients(**{f"decode_{regime}_s_per_context_token": 0.125})
    by_padding = coefficients(**{f"decode_{regime}_s_per_padded_token": 0.125})
    tokens = float(rows * longest)
    same = (rows, tokens, tokens, 0.0, 0.0, 0.0)
    assert cost.layer_seconds(by_context, *same) == cost.layer_seconds(by_padding, *same)


@given(lengths=st.lists(st.integers(1, 4096), min_size=2, max_size=16))
def test_a_ragged_batch_costs_as_much_as_one_whose_rows_all_have_the_longest_context(
    lengths: list[int],
) -> None:
    c = coefficients(decode_memory_s_per_padded_token=0.125, decode_memory_s_per_row=0.5)
    rows, padded = float(len(lengths)), float(len(lengths) * max(lengths))
    ragged, _ = cost.layer_seconds(c, rows, float(sum(lengths)), padded, 0.0, 0.0, 0.0)
    even, _ = cost.layer_seconds(c, rows, padded, padded, 0.0, 0.0, 0.0)
    assert ragged == even


@given(c=costs, rows=st.integers(1, 64), context=amounts, padded=amounts, more=amounts)
def test_context_and_padding_never_shorten_a_layer(
    c: np.ndarray, rows: int, context: float, padded: float, more: float
) -> None:
    before, _ = cost.layer_seconds(c, rows, context, padded, 0.0, 0.0, 0.0)
    assert cost.layer_seconds(c, rows, context + more, padded, 0.0, 0.0, 0.0)[0] >= before
    assert cost.layer_seconds(c, rows, context, padded + more, 0.0, 0.0, 0.0)[0] >= before


def test_padding_without_decode_rows_is_nothing() -> None:
    c = coefficients(decode_memory_s_per_padded_token=1.0, decode_compute_s_per_padded_token=1.0)
    assert cost.layer_seconds(c, 0.0, 0.0, 512.0, 4.0, 0.0, 10.0)[0] == 0.0


def test_the_fixed_part_grows_with_rows_or_with_prompts_whichever_takes_longer() -> None:
    c = coefficients(
        decode_fixed_s=1.0,
        decode_fixed_s_per_row=0.5,
        prefill_fixed_s=2.0,
        prefill_fixed_s_per_prompt=0.25,
    )
    assert cost.fixed_seconds(c, 0.0, 4.0) == 3.0
    assert cost.fixed_seconds(c, 1.0, 4.0) == 3.0
    assert cost.fixed_seconds(c, 8.0, 4.0) == 5.0


def test_a_decode_pays_its_fixed_part_by_the_rows_that_emit_not_by_those_fed_again() -> None:
    c = coefficients(decode_fixed_s=1.0, decode_fixed_s_per_row=0.5)
    assert cost.decode_seconds(c, 40.0, 9.0, 9.0, 4.0, 0.0, 1.0, 0.0, 2.0, 2.0, 1.0)[0] == 2.0


def test_rows_that_go_on_from_an_exit_cost_by_how_many_they_are() -> None:
    c = coefficients(rebatch_overhead_s=2.0, rebatch_overhead_s_per_row=0.25)
    assert cost.going_on_seconds(c, 4.0) == 3.0


def test_rows_that_a_graph_adds_are_computed_and_asked_nothing() -> None:
    c = coefficients(
        decode_fixed_s_per_row=0.5,
        decode_memory_s_per_row=1.0,
        check_s_per_row=2.0,
        head_s_per_row=4.0,
        kv_fill_s_per_row_layer=8.0,
    )
    # Three rows in a graph of four: one layer, one check, one head, one layer filled.
    found, _ = cost.decode_seconds(c, 4.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 4.0, 3.0, 1.0)
    assert found == 3 * 0.5 + 4 * 1.0 + 3 * 2.0 + 3 * 4.0 + 4 * 8.0


def test_a_prefill_pays_its_fixed_part_by_the_prompts_in_it() -> None:
    c = coefficients(prefill_fixed_s=2.0, prefill_fixed_s_per_prompt=0.25)
    prompt = (0.0, 0.0, 0.0, 30.0, 0.0, 99.0, 4.0, 0.0)
    assert cost.mixed_seconds(c, *prompt, 1.0, 3.0, 1.0)[0] == 2.75
    # A chunk that completes no prompt emits nothing, and is a prompt's all the same.
    assert cost.mixed_seconds(c, *prompt, 0.0, 1.0, 1.0)[0] == 2.25


def test_the_residual_of_a_prefill_stretches_its_layers_alone() -> None:
    c = coefficients(prefill_launch_s=0.5, prefill_fixed_s=1.0, head_base_s=4.0)
    prompt = (0.0, 0.0, 0.0, 30.0, 0.0, 99.0, 4.0, 0.0, 1.0, 1.0)
    assert cost.mixed_seconds(c, *prompt, 1.0)[0] == 1.0 + 4 * 0.5 + 4.0
    assert cost.mixed_seconds(c, *prompt, 2.0)[0] == 1.0 + 4 * 0.5 * 2 + 4.0


def test_joules_of_checks_and_head_are_drawn_by_rows_that_emit_not_by_those_fed_again() -> None:
    c = coefficients(check_j_per_row=1.0, head_j_per_row=10.0, power_limit_w=1000.0)
    # Six rows of which two emit, with one check and one head.
    assert cost.decode_joules(c, 6.0, 9.0, 9.0, 4.0, 1.0, 1.0, 0.0, 2.0, 1.0) == 2 * 1.0 + 2 * 10.0


def test_joules_of_padding_are_drawn_by_decode_rows_alone() -> None:
    c = coefficients(decode_j_per_padded_token_layer=0.5)
    assert cost.layer_joules(c, 2.0, 7.0, 10.0, 0.0, 0.0) == 5.0
    assert cost.layer_joules(c, 0.0, 0.0, 10.0, 4.0, 10.0) == 0.0


def test_what_a_decode_begins_with_and_what_its_rows_add_are_its_fixed_part() -> None:
    """A split batch begins twice, and every row is told its token once."""
    c = coefficients(decode_fixed_s=1.0, decode_fixed_s_per_row=0.5)
    whole, _ = cost.decode_seconds(c, 8.0, 9.0, 9.0, 4.0, 0.0, 1.0, 0.0, 8.0, 8.0, 1.0)
    assert whole == cost.begin_seconds(c) + cost.told_seconds(c, 8.0)
    passes = [cost.begin_seconds(c) + cost.told_seconds(c, rows) for rows in (3.0, 5.0)]
    assert sum(passes) - whole == cost.begin_seconds(c)


def test_capturing_is_paid_by_the_graph_and_by_the_layers_in_it() -> None:
    c = coefficients(
        capture_s_per_graph=1.0,
        capture_s_per_exit=0.5,
        capture_s_per_layer=0.25,
        capture_s_per_filled_layer=0.125,
    )
    assert cost.capture_seconds(c, 3.0, 1.0, 4.0, 2.0) == 4.75
    assert cost.capture_seconds(c, 0.0, 0.0, 0.0, 0.0) == 0.0


WORK = coefficients(
    decode_fixed_s=1.0,
    decode_fixed_s_per_row=0.5,
    decode_launch_s=2.0,
    prefill_launch_s=4.0,
    prefill_fixed_s=5.0,
    check_base_s=10.0,
    check_s_per_row=1.0,
    head_base_s=100.0,
    head_s_per_row=10.0,
    kv_fill_base_s_per_layer=20.0,
    kv_fill_s_per_row_layer=2.0,
    decode_j_per_layer=1.0,
    decode_j_per_row_layer=0.5,
    prefill_j_per_token_layer=2.0,
    check_j_base=10.0,
    check_j_per_row=1.0,
    head_j_base=100.0,
    head_j_per_row=10.0,
    kv_fill_j_per_layer=20.0,
    kv_fill_j_per_row_layer=2.0,
    power_active_w=3.0,
    power_limit_w=1000.0,
)


def test_a_decode_by_pencil() -> None:
    """Six rows through 3 of 8 layers, asked twice; four are filled, and three are not padding.

    1 + 3 x 0.5, 3 x 2 x 1.5, 2 x (10 + 3), 100 + 3 x 10 for the head, 5 x (20 + 4 x 2).
    """
    for heads, seconds in ((1.0, 307.5), (0.0, 177.5)):
        work = (6.0, 9.0, 9.0, 3.0, 2.0, heads, 5.0, 4.0, 3.0, 1.5)
        assert cost.decode_seconds(WORK, *work)[0] == seconds


def test_joules_of_a_decode_by_pencil() -> None:
    """3 x (1 + 6 x 0.5), 2 x (10 + 4), 100 + 4 x 10, 5 x (20 + 4 x 2), and 3 W for two seconds."""
    for heads, joules in ((1.0, 326.0), (0.0, 186.0)):
        assert cost.decode_joules(WORK, 6.0, 9.0, 9.0, 3.0, 2.0, heads, 5.0, 4.0, 2.0) == joules


@pytest.mark.parametrize(
    ("rows", "head_rows", "seconds", "joules"),
    [(2.0, 4.0, 199.0, 206.0), (0.0, 4.0, 163.0, 164.0), (2.0, 0.0, 59.0, 66.0)],
)
def test_a_mixed_iteration_by_pencil(
    rows: float, head_rows: float, seconds: float, joules: float
) -> None:
    """Three prompt tokens: 5, 3 x 4 x 1.5, 3 x (10 + 2), 100 + 4 x 10.

    Without rows nothing is asked, and without a token there is no head. Joules are 3 x 6 of the
    prompt, 3 x (1 + 2 x 0.5) of the rows, 3 x (10 + 2), 100 + 4 x 10, and 3 W for two seconds.
    """
    work = (rows, 9.0, 9.0, 3.0)
    told = cost.mixed_seconds(WORK, *work, 0.0, 6.0, 3.0, 3.0, head_rows, 1.0, 1.5)
    assert told[0] == seconds
    assert cost.mixed_joules(WORK, *work, 6.0, 3.0, 3.0, head_rows, 2.0) == joules


def test_checks_head_and_filling_take_their_floor_at_least() -> None:
    """2 s and one for each row, from the seventh on above nine."""
    c = coefficients(
        check_floor_s=9.0,
        check_base_s=2.0,
        check_s_per_row=1.0,
        head_floor_s=9.0,
        head_base_s=2.0,
        head_s_per_row=1.0,
        kv_fill_floor_s_per_layer=9.0,
        kv_fill_base_s_per_layer=2.0,
        kv_fill_s_per_row_layer=1.0,
    )
    for rows, seconds in ((4.0, 9.0), (8.0, 10.0)):
        assert cost.check_seconds(c, rows) == cost.head_seconds(c, rows) == seconds
        assert cost.kv_fill_seconds(c, rows, 3.0) == 3.0 * seconds


def test_capturing_draws_active_power() -> None:
    assert cost.capture_joules(WORK, 2.0) == 6.0


def test_rows_and_prompts_of_one_iteration_read_the_weights_once() -> None:
    """A layer's weights take 2 s and 5 J; eight prompt tokens beside a row add theirs alone."""
    c = coefficients(
        decode_memory_s_per_layer=2.0,
        decode_memory_s_per_row=0.5,
        prefill_memory_s_per_layer=2.0,
        prefill_memory_s_per_token=0.25,
        decode_j_per_layer=5.0,
        prefill_j_per_layer=5.0,
        prefill_j_per_token_layer=0.125,
    )
    alone, none = (8.0, 0.0, 36.0), (0.0, 0.0, 0.0)
    assert cost.layer_seconds(c, 1.0, 9.0, 9.0, *none)[0] == 2.5
    assert cost.layer_seconds(c, 0.0, 0.0, 0.0, *alone)[0] == 4.0
    assert cost.layer_seconds(c, 1.0, 9.0, 9.0, *alone)[0] == 4.5
    assert cost.layer_joules(c, 0.0, 0.0, 0.0, 8.0, 36.0) == 6.0
    assert cost.layer_joules(c, 1.0, 9.0, 9.0, 8.0, 36.0) == 6.0


def test_a_board_draws_no_more_than_its_limit() -> None:
    """100 W and 50 J of work are 150 J in a second; 500 J of work would be 600, and 300 W bound."""
    c = coefficients(power_active_w=100.0, power_limit_w=300.0, decode_j_per_layer=50.0)
    work = (1.0, 9.0, 9.0)
    assert cost.decode_joules(c, *work, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0) == 150.0
    assert cost.decode_joules(c, *work, 10.0, 0.0, 0.0, 0.0, 1.0, 1.0) == 300.0
    assert cost.mixed_joules(c, *work, 0.0, 0.0, 10.0, 0.0, 0.0, 1.0) == 300.0
