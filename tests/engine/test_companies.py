"""Who runs with whom under `rebatch`, by pencil: exits after two layers and four, three to a pass.

Prompts of four tokens are sent at once. A request is sure of every token at the first exit, or of
none; where companies count, a split costs next to nothing, so that the sure always leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from helios_sim.engine import Setup
from tests.engine.factories import (
    play,
    profile_of,
    requests_of,
    setup_of,
    thumbnail,
    traces_from,
)

SURE, UNSURE = (0.9, 0.9), (0.1, 0.9)
FREE = {"rebatch.overhead_s": 0.0, "rebatch.overhead_s_per_row": 0.0, "decode.fixed_s": 0.0}


def setup() -> Setup:
    tokens = [SURE] * 20 + [UNSURE] * 20
    traces = traces_from({"small": tokens}, {"small": (2, 4)})
    return setup_of(profile_of(thumbnail(costs=FREE)), traces, max_batch=3, max_held=3)


def order_of_ends(outputs: Sequence[int], sure: str) -> list[int]:
    """Requests, named by their places, in the order in which they end."""
    starts = [0 if who == "s" else 20 for who in sure]
    requests = requests_of([0.0] * len(outputs), [4] * len(outputs), outputs, trace_start=starts)
    _, data = play(setup(), requests, "ee-single", exit_mode="rebatch")
    ends = data.requests.sort("finished_s", "request_id")
    return [int(one) for one in ends["request_id"]]


def test_of_more_rows_held_at_an_exit_than_a_pass_has_those_admitted_first_run() -> None:
    """The third is sure and goes on; two are held each time, and then four, of which three run.

    The pass before ended with the third row, so that turns would begin with the fourth.
    """
    assert order_of_ends([2, 2, 9, 2, 2, 9], "uusuus")[:3] == [0, 1, 3]


def test_going_on_is_paid_by_those_who_go_on() -> None:
    """One of two leaves after two of four layers; the other's pass begins later, at a price.

    Layers take 10 ms, a check 2 ms, the head 5 ms, filling a layer 1 ms, a beginning 1 ms, and
    going on 3 ms.
    """
    costs = {"rebatch.overhead_s_per_row": 0.0, "decode.fixed_s": 0.001}
    traces = traces_from({"small": [SURE] * 20 + [UNSURE] * 20}, {"small": (2, 4)})
    requests = requests_of([0.0, 0.0], [4, 4], [2, 2], trace_start=[0, 20])
    together = setup_of(profile_of(thumbnail(costs=costs)), traces, max_batch=2)
    _, data = play(together, requests, "ee-single", exit_mode="rebatch")
    first, second = data.requests.sort("request_id").iter_rows(named=True)
    left_s = first["finished_s"] - first["first_token_s"]
    assert left_s == pytest.approx(0.001 + 2 * 0.010 + 0.002 + 2 * 0.001)
    later_s = second["finished_s"] - first["finished_s"]
    assert later_s == pytest.approx(0.001 + 0.003 + 2 * 0.010 + 0.005)


def test_a_split_pays_only_if_it_saves_more_than_filling_takes() -> None:
    """A deep pass takes 29 ms: two of four save half of it, less 4 ms for going on and beginning.

    Filling two layers must take less than the 10.5 ms that are left.
    """
    tokens = [SURE] * 20 + [UNSURE] * 20
    traces = traces_from({"small": tokens}, {"small": (2, 4)})
    requests = requests_of([0.0] * 4, [4] * 4, [2] * 4, trace_start=[0, 0, 20, 20])

    def first_leave_s(fill_s: float) -> float:
        costs = {"rebatch.overhead_s_per_row": 0.0, "decode.fixed_s": 0.001}
        costs |= {"kv_fill.base_s_per_layer": fill_s}
        together = setup_of(profile_of(thumbnail(costs=costs)), traces, max_batch=4)
        _, data = play(together, requests, "ee-single", exit_mode="rebatch")
        first, *_ = data.requests.sort("request_id").iter_rows(named=True)
        return float(first["finished_s"] - first["first_token_s"])

    assert first_leave_s(0.005) == pytest.approx(0.001 + 2 * 0.010 + 0.002 + 2 * 0.005)
    assert first_leave_s(0.0055) == pytest.approx(0.001 + 4 * 0.010 + 0.002 + 0.005)


@pytest.mark.parametrize("share_sure", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_with_passes_as_full_as_a_batch_rebatching_loses_nothing_to_waiting(
    share_sure: float,
) -> None:
    """Others take the places of those held; only the last few passes are not full.

    Going on costs a fifth of a whole pass, and rows add nothing to a pass.
    """
    chances = np.random.default_rng(3).random(4000)
    tokens = [SURE if chance < share_sure else UNSURE for chance in chances]
    traces = traces_from({"small": tokens}, {"small": (2, 4)})
    many = 128
    starts = [100 * one for one in range(many)]
    requests = requests_of([0.0] * many, [1] * many, [200] * many, trace_start=starts)
    costs = {"rebatch.overhead_s": 0.012, "rebatch.overhead_s_per_row": 0.0}
    costs |= {"prefill.fixed_s": 0.0, "prefill.launch_s": 0.0, "prefill.compute_s_per_token": 0.0}
    profile = profile_of(thumbnail(costs=costs), memory_bytes=10_000_000)
    setup = setup_of(profile, traces, max_batch=8, max_held=8)
    took_s = {}
    for mode in ("wait", "rebatch"):
        _, data = play(setup, requests, "ee-single", exit_mode=mode)
        took_s[mode] = data.requests["finished_s"].max()
    print(share_sure, took_s)
    assert took_s["rebatch"] <= 1.01 * took_s["wait"]
