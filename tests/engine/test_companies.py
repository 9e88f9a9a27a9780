"""Who runs with whom under `rebatch`, by pencil: exits after two layers and four, three to a pass.

Prompts of four tokens are sent at once. A request is sure of every token at the first exit, or of
none; the cost of a split is next to nothing, so that the sure always leave.
"""

from __future__ import annotations

from collections.abc import Sequence

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
