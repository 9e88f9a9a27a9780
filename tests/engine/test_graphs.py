"""Graphs are captured when a decode first wants them, and again once weights or pool have changed.

By pencil: a graph costs 100 ms, 10 ms for each layer it runs and 1 ms for each it fills; an exit's
costs 50 ms. The model leaves after layers 2 and 4, and graphs are captured for 1 and for 2 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helios_sim.engine import Setup
from helios_sim.workload.requests import Requests
from tests.engine.factories import (
    drifting_requests,
    drifting_setup,
    graph_models,
    play,
    profile_of,
    requests_of,
    setup_of,
    thumbnail,
    traces_from,
)

COSTS = {
    "capture.s_per_graph": 0.1,
    "capture.s_per_exit": 0.05,
    "capture.s_per_layer": 0.01,
    "capture.s_per_filled_layer": 0.001,
}
SURE, UNSURE = (0.9, 0.9), (0.1, 0.9)


def setup_with(costs: dict[str, float], tokens: Sequence[Sequence[float]], **serving: Any) -> Setup:
    model = thumbnail("small", (2, 4), buckets=(1, 2), costs=costs)
    return setup_of(profile_of(model), traces_from({"small": tokens}, {"small": (2, 4)}), **serving)


def added_s(
    tokens: Sequence[Sequence[float]], requests: Requests, use: str = "ee-single", **options: Any
) -> float:
    """Seconds by which capturing lengthens the busy time of a run."""
    serving = {"max_batch": options.pop("max_batch", 8)}
    with_costs, without = (
        play(setup_with(costs, tokens, **serving), requests, use, **options)[1].totals.busy_s
        for costs in (COSTS, {})
    )
    return with_costs - without


def one(output_tokens: int) -> Requests:
    return requests_of([0.0], [4], [output_tokens])


def test_a_run_to_the_end_captures_embedding_both_segments_and_one_answer_once() -> None:
    """0.1 + 2 x (0.1 + 2 x 0.01) + 0.05, however many tokens follow; a prefill takes no graphs."""
    for output_tokens, expected_s in ((1, 0.0), (2, 0.39), (9, 0.39)):
        found = added_s([SURE] * 8, one(output_tokens), "vanilla")
        assert found == pytest.approx(expected_s)


def test_an_early_exit_captures_its_segment_its_answer_and_the_filling_beyond() -> None:
    """0.1 + 0.12 + 0.05 and 0.1 + 2 x 0.001 for what is skipped."""
    assert added_s([SURE] * 8, one(9), exit_mode="wait") == pytest.approx(0.372)


def test_what_was_skipped_is_captured_when_a_token_goes_on() -> None:
    """The third token runs the second segment (0.12) and asks the last exit (0.05)."""
    tokens = [SURE, SURE, UNSURE, SURE, SURE]
    assert added_s(tokens, one(5), exit_mode="wait") == pytest.approx(0.372 + 0.17)


def test_each_bucket_has_graphs_of_its_own_and_a_batch_beyond_the_largest_has_none() -> None:
    """Two decode together for the second bucket; three are more than any graph is for."""
    for num, expected_s in ((1, 0.39), (2, 0.39), (3, 0.0)):
        together = requests_of([0.0] * num, [4] * num, [3] * num)
        assert added_s([SURE] * 8, together, "vanilla") == pytest.approx(expected_s)
    apart = requests_of([0.0, 0.0], [4, 4], [3, 9])
    assert added_s([SURE] * 16, apart, "vanilla") == pytest.approx(0.78)


def test_a_split_batch_fills_for_those_who_leave_and_goes_on_without_embedding() -> None:
    """Of two rows one leaves at once, for whom filling is captured for one row.

    Two rows embed, run and are asked: 0.1 + 0.12 + 0.05; one is filled: 0.102. The one that stayed
    goes on: 0.12 + 0.05 for one row, without embedding.
    """
    tokens = [SURE, SURE, SURE, SURE, UNSURE, UNSURE, SURE, SURE]
    two = requests_of([0.0, 0.0], [4, 4], [2, 2], trace_start=[0, 4])
    found = added_s(tokens, two, exit_mode="rebatch")
    assert found == pytest.approx(0.27 + 0.102 + 0.17)


def test_another_model_or_depth_begins_without_graphs() -> None:
    """Every change of what is served captures anew, so that HELIOS pays for each of its changes.

    Chosen by memory, so that no second that capturing takes changes a decision.
    """
    requests = replace(drifting_requests(60), arrival_s=10.0 * np.arange(60))
    captured = graph_models()
    uncaptured = {
        name: replace(
            model,
            coefficients={
                key: 0.0 if key.startswith("capture.") else value
                for key, value in model.coefficients.items()
            },
        )
        for name, model in captured.models.items()
    }
    added = {}
    for use, options in (("helios", {"objective": "memory"}), ("vanilla", {})):
        mine, plain = (
            play(drifting_setup(profile=profile), requests, use, **options)[1].totals
            for profile in (captured, replace(captured, models=uncaptured))
        )
        assert mine.max_running == 1
        added[use] = mine.busy_s - plain.busy_s
    assert added["helios"] > 3 * added["vanilla"] > 0.0


def test_every_switch_captures_what_the_model_before_it_had() -> None:
    """Four turns of ten requests at two layers: embedding, two layers and an answer each time."""
    requests = replace(drifting_requests(40), arrival_s=10.0 * np.arange(40))
    busy_s = []
    for costs in (COSTS, {}):
        small, large = (
            thumbnail(name, exits, buckets=(1, 2), costs=costs)
            for name, exits in (("small", (2, 4)), ("large", (2, 4, 8)))
        )
        setup = drifting_setup(profile=profile_of(small, large))
        run, data = play(setup, requests, "always", reassess_requests=10)
        busy_s.append(data.totals.busy_s)
    assert data.totals.max_running == 1
    assert [one.assignment.model for one in run.decisions[:4]] == ["small", "large"] * 2
    assert busy_s[0] - busy_s[1] == pytest.approx(4 * (0.1 + 0.12 + 0.05))


def test_seconds_of_capturing_are_bound_by_launching_and_drawn_at_active_power() -> None:
    tokens, request = [SURE] * 8, one(2)
    mine, plain = (
        play(setup_with(costs, tokens), request, "vanilla")[1].totals for costs in (COSTS, {})
    )
    assert mine.energy_j - plain.energy_j == pytest.approx(0.39 * 100.0)
    assert mine.regime_s["launch"] - plain.regime_s["launch"] == pytest.approx(0.39)


@pytest.mark.parametrize(
    ("use", "options", "captured_s"),
    [("vanilla", {}, 0.39), ("ee-single", {"exit_mode": "rebatch"}, 0.372)],
)
def test_an_iteration_that_captures_is_bound_by_launching_whatever_its_layers_wait_for(
    use: str, options: dict[str, Any], captured_s: float
) -> None:
    """The only decode of a request of two tokens; its layers wait for memory."""
    waiting = {"decode.launch_s": 0.0, "decode.memory_s_per_padded_token": 0.01}
    mine, plain = (
        play(setup_with(costs, [SURE] * 8), one(2), use, **options)[1].totals
        for costs in (COSTS | waiting, waiting)
    )
    assert plain.regime_s["memory"] > 0.0 == mine.regime_s["memory"]
    longer_s = mine.regime_s["launch"] - plain.regime_s["launch"]
    assert longer_s == pytest.approx(plain.regime_s["memory"] + captured_s)
    assert mine.energy_j - plain.energy_j == pytest.approx(100.0 * captured_s)


def test_where_exits_speak_eagerly_their_graphs_cost_nothing() -> None:
    profile = profile_of(thumbnail(buckets=(1,), costs=COSTS | {"capture.s_per_exit": 0.0}))
    setup = setup_of(profile, traces_from({"small": [SURE] * 8}, {"small": (2, 4)}))
    plain = setup_with({}, [SURE] * 8)
    added = [play(one_, one(3), "vanilla")[1].totals.busy_s for one_ in (setup, plain)]
    assert added[0] - added[1] == pytest.approx(0.34)


def test_a_batch_without_buckets_captures_nothing() -> None:
    model = thumbnail("small", (2, 4), costs=COSTS)
    assert model.graph_rows == 0
    assert thumbnail("small", (2, 4), buckets=(1, 2)).graph_rows == 0
    assert thumbnail("small", (2, 4), buckets=(1, 2), costs=COSTS).graph_rows == 2
