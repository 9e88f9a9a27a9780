"""What a run adds up to, on paper: a prefill of two requests and two decodes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calibration.serving.batching import Life, Row
from calibration.serving.iteration import Answer, Captures, Emitted, Outcome
from calibration.serving.tally import IterationEntry, Sample, Tally, gap_counts, nll_units, paced
from helios_sim.policy.contract import Assignment, ExitMode
from helios_sim.steward import PaceSums

SERVED = Assignment("m", 6, ExitMode.WAIT)
"""Exits at the layers 2, 4 and 6."""


def row(request: int) -> Row:
    return Row(Life(request, 0.0, 4, 8), to_prefill=0, blocks=1)


FIRST, SECOND = row(0), row(1)


def iteration(
    start_s: float, end_s: float, outcome: Outcome, breached: tuple[bool, ...], **named: bool
) -> IterationEntry:
    """An iteration that began to be planned half a second before; four requests are running."""
    return IterationEntry(
        start_s=start_s,
        end_s=end_s,
        seconds=end_s - start_s,
        host_s=0.5,
        assignment=SERVED,
        evaluating=False,
        is_prefill=named.get("is_prefill", False),
        running=4,
        outcome=outcome,
        breached=breached,
    )


def told(of: Row, level: int, nll_nats: float) -> Emitted:
    return Emitted(of, level, Answer(7, 0.25, nll_nats))


PREFILL = iteration(
    1.0,
    3.0,
    Outcome((told(FIRST, 2, 1.0), told(SECOND, 2, 2.0)), rows=2, first_layer=0, layers=6),
    (True, True),
    is_prefill=True,
)
SPLIT = iteration(
    3.0,
    6.0,
    Outcome((told(SECOND, 1, 0.5),), rows=3, first_layer=2, layers=4, ghosts=1),
    (False,),
)
"""One row of three leaves."""

LAST = iteration(
    8.0,
    12.0,
    Outcome((told(FIRST, 2, 0.25), told(SECOND, 0, 4.0)), rows=2, first_layer=0, layers=6),
    (True, False),
)


@pytest.fixture
def tally() -> Tally:
    made = Tally(timeline_interval_s=1.0, exit_counts={"m": [0, 0, 0]})
    for entry, used_blocks in ((PREFILL, 10), (SPLIT, 20), (LAST, 30)):
        made.count_iteration(entry, used_blocks)
    return made


def test_iterations_are_summed_and_only_decodes_tell_of_layers_and_exits(tally: Tally) -> None:
    assert (tally.num_iterations, tally.num_decode_iterations) == (3, 2)
    assert tally.batch_seconds == 4 * (2.0 + 3.0 + 4.0)
    assert tally.kv_block_seconds == 10 * 2.0 + 20 * 3.0 + 30 * 4.0
    assert (tally.num_tokens, tally.num_breaches) == (2 + 1 + 2, 2 + 0 + 1)
    assert tally.nll_units == 1024 * (1 + 2 + 4) + 512 + 256
    assert (tally.decode_rows, tally.decode_s) == (3 + 2, 3.0 + 4.0)
    assert tally.executed_layers == 1 * 4 + 2 * 6
    assert tally.exit_counts == {"m": [1, 1, 1]}


def test_the_pace_goes_by_the_layers_an_iteration_ran_and_the_rows_beside_each_row() -> None:
    found = paced(paced(PaceSums(), SPLIT), LAST)
    assert found == PaceSums(
        tokens=1 + 2,
        rows=3 + 2,
        row_s=3 * 3.0 + 2 * 4.0,
        row_layers=3 * (4 - 2) + 2 * 6,
        row_rows=3 * (3 + 1) + 2 * 2,
    )


def test_a_decode_in_which_graphs_were_captured_is_none_of_the_pace() -> None:
    tally = Tally(1.0, exit_counts={"m": [0, 0, 0]})
    capturing = replace(LAST, outcome=replace(LAST.outcome, captured=Captures(graphs=1)))
    tally.count_iteration(capturing, 0)
    assert tally.paced == PaceSums()
    assert tally.num_decode_iterations == 1


def test_tokens_are_numbered_within_their_request_and_told_at_the_end_of_an_iteration(
    tally: Tally,
) -> None:
    assert [
        (one.request_id, one.place, one.time_s, one.level, one.prefilled, one.breached)
        for one in tally.tokens
    ] == [
        (0, 0, 3.0, 2, True, True),
        (1, 0, 3.0, 2, True, True),
        (1, 1, 6.0, 1, False, False),
        (0, 1, 12.0, 2, False, True),
        (1, 2, 12.0, 0, False, False),
    ]
    last = tally.tokens[-1]
    assert (last.model, last.depth) == ("m", 6)
    assert (last.token, last.confidence, last.nll_nats) == (7, 0.25, 4.0)
    assert tally.gaps_s == [6.0 - 3.0, 12.0 - 3.0, 12.0 - 6.0]


def test_a_request_has_the_sums_of_its_own_tokens(tally: Tally) -> None:
    found = tally.request_sums(3)
    assert found.decoded == [1, 2, 0]
    assert found.executed_layers == [6, 4 + 6, 0]
    assert found.nll_units == [1024 + 256, 2048 + 512 + 4096, 0]
    assert found.breaches == [1 + 1, 1, 0]


def test_time_is_booked_once_and_what_is_not_busy_is_remembered_as_a_span() -> None:
    tally = Tally(1.0)
    booked = [
        tally.book(spent, until_s)
        for spent, until_s in (
            ("idle", 2.0),
            ("busy", 5.0),
            ("load", 5.0),
            ("load", 9.0),
            ("idle", 10.0),
        )
    ]
    assert booked == [2.0, 3.0, 0.0, 4.0, 1.0]
    assert tally.spent_s == {"busy": 3.0, "idle": 2.0 + 1.0, "load": 4.0}
    assert tally.spans == [("idle", 0.0, 2.0), ("load", 5.0, 9.0), ("idle", 9.0, 10.0)]


def test_a_period_counts_who_finished_and_one_token_has_no_time_between_tokens() -> None:
    tally = Tally(1.0)
    for output_tokens in (1, 2, 5):
        life = Life(0, 10.0, 4, output_tokens, admitted_s=11.0, first_token_s=12.0)
        tally.count_finished(life, 20.0)
    assert (tally.period_finished, tally.ttft_sum_s) == (3, 3 * 2.0)
    assert (tally.period_tpots, tally.tpot_sum_s) == (2, 8.0 / 1 + 8.0 / 4)
    tally.clear_period()
    assert (tally.period_finished, tally.ttft_sum_s) == (0, 0.0)
    assert (tally.period_tpots, tally.tpot_sum_s) == (0, 0.0)
    assert tally.num_finished == 3


def test_the_next_line_of_the_timeline_is_due_at_a_whole_interval() -> None:
    """However late the last one came."""
    tally = Tally(timeline_interval_s=2.0)
    for time_s, next_s in ((0.0, 2.0), (3.5, 4.0), (4.0, 6.0), (9.9, 10.0)):
        tally.sample(Sample(time_s, 0.0, 0, 0, 0, 0, 0, "", 0, "idle"))
        assert tally.next_sample_s == next_s


def test_likelihoods_are_rounded_to_the_nearest_step_and_not_down() -> None:
    assert [nll_units(Answer(0, 0.0, nats / 1024)) for nats in (1.25, 1.75, 2.0)] == [1, 2, 2]


def test_gaps_beyond_the_bins_are_in_the_outer_ones() -> None:
    counts = gap_counts([0.0, 1e-12, 1e12, 1e12, 1e12])
    assert (counts[0], counts[-1], sum(counts)) == (2, 3, 5)
