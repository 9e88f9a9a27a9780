"""What a reading is predicted to take: how often each coefficient counts, on paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from calibration.fitting.fit_times import Number, model_profile
from calibration.fitting.predict import Predictor, prefill_load
from helios_sim.cost import COEFFICIENTS
from helios_sim.profile import Link, Loading
from tests.calibration import planted

COSTS: Mapping[str, float] = {
    "decode.memory_s_per_layer": 3.0,
    "decode.memory_s_per_row": 7.0,
    "decode.memory_s_per_context_token": 11.0,
    "decode.memory_s_per_padded_token": 13.0,
    "prefill.memory_s_per_layer": 3.0,
    "prefill.memory_s_per_token": 17.0,
    "prefill.memory_s_per_context_token": 19.0,
    "decode.fixed_s": 1e5,
    "decode.fixed_s_per_row": 2e5,
    "prefill.fixed_s": 3e5,
    "prefill.fixed_s_per_prompt": 5e5,
    "head.base_s": 7e5,
    "head.s_per_row": 11e5,
    "check.base_s": 13e5,
    "check.s_per_row": 17e5,
    "kv_fill.base_s_per_layer": 1e7,
    "kv_fill.s_per_row_layer": 2e7,
    "rebatch.overhead_s": 1e9,
    "rebatch.overhead_s_per_row": 2e9,
    "capture.s_per_graph": 23.0,
    "capture.s_per_exit": 29.0,
    "capture.s_per_layer": 31.0,
    "capture.s_per_filled_layer": 37.0,
}
JOULES: Mapping[str, float] = {
    **dict.fromkeys(COEFFICIENTS, 0.0),
    "power.active_w": 3.0,
    "power.limit_w": 1e9,
    "decode.j_per_layer": 10.0,
    "decode.j_per_row_layer": 20.0,
    "decode.j_per_context_token_layer": 50.0,
    "decode.j_per_padded_token_layer": 70.0,
    "prefill.j_per_layer": 110.0,
    "prefill.j_per_token_layer": 130.0,
    "prefill.j_per_pair_layer": 170.0,
    "head.j_base": 1e4,
    "head.j_per_row": 2e4,
}
STACKS = {"decode": 0.25, "prefill": 0.5}
FACTOR = 2.0
"""Of a decode layer, whatever the batch."""

LOAD = {
    "mode": "graph",
    "batch": 5,
    "context_tokens": 10,
    "longest_context_tokens": 20,
    "prompt_tokens": None,
}
"""Five rows, for which a graph of eight is replayed; half of them fit into one of four."""

PROMPTS = {
    "mode": "eager",
    "batch": 3,
    "context_tokens": 2,
    "longest_context_tokens": None,
    "prompt_tokens": 4,
}


def predictor(costs: Mapping[str, float] = COSTS, **named: Any) -> Predictor:
    """Of the planted model, whose exits are at the layers 3, 6 and 12."""
    numbers = {name: Number(value, "assumed", "") for name, value in costs.items()}
    given: dict[str, Any] = {"buckets": (4, 8), "batch_residual": ((1, FACTOR),), "hull": None}
    profile = model_profile(planted.model(), numbers, **(given | named))
    loading = Loading(disk=Link(2.0, 10.0), host=Link(1.0, 100.0))
    return Predictor(profile, loading, STACKS)


def sum_of(counts: Mapping[str, float]) -> float:
    return sum(COSTS[name] * count for name, count in counts.items())


def decode_layers(layers: int, rows: int, batch: int) -> float:
    """Layers that compute so many rows, with the factor."""
    return FACTOR * sum_of(
        {
            "decode.memory_s_per_layer": layers,
            "decode.memory_s_per_row": layers * rows,
            "decode.memory_s_per_context_token": layers * batch * 10,
            "decode.memory_s_per_padded_token": layers * rows * 20,
        }
    )


def prefill_layers(layers: int) -> float:
    return sum_of(
        {
            "prefill.memory_s_per_layer": layers,
            "prefill.memory_s_per_token": layers * 3 * 4,
            "prefill.memory_s_per_context_token": layers * 3 * 2,
        }
    )


def begun_and_told(rows: int) -> float:
    return sum_of({"decode.fixed_s": 1, "decode.fixed_s_per_row": rows})


def asked(kind: str, rows: int, times: int = 1) -> float:
    return sum_of({f"{kind}.base_s": times, f"{kind}.s_per_row": times * rows})


def filled(layers: int, rows: int) -> float:
    return sum_of({"kv_fill.base_s_per_layer": layers, "kv_fill.s_per_row_layer": layers * rows})


@pytest.mark.parametrize(
    ("reading", "seconds"),
    [
        ({"quantity": "decode_layers", "layers": 6}, 0.25 + decode_layers(6, 8, 5)),
        (
            {"quantity": "decode_layers", "layers": 6, "mode": "eager"},
            0.25 + decode_layers(6, 5, 5),
        ),
        (
            {"quantity": "iteration", "layers": 6},
            begun_and_told(5) + decode_layers(6, 8, 5) + asked("head", 5),
        ),
        (
            {"quantity": "exit_iteration", "layers": 6},
            begun_and_told(5) + decode_layers(6, 8, 5) + asked("check", 5, times=2) + filled(6, 8),
        ),
        (
            {"quantity": "exit_iteration", "layers": 12},
            begun_and_told(5)
            + decode_layers(12, 8, 5)
            + asked("check", 5, times=2)
            + asked("head", 5),
        ),
        ({"quantity": "head", "layers": None}, asked("head", 5)),
        ({"quantity": "check", "layers": None}, asked("check", 5)),
        ({"quantity": "kv_fill", "layers": 9}, filled(9, 5)),
        ({"quantity": "prefill_layers", "layers": 6, **PROMPTS}, 0.5 + prefill_layers(6)),
        (
            {"quantity": "prefill_iteration", "layers": 6, **PROMPTS},
            sum_of({"prefill.fixed_s": 1, "prefill.fixed_s_per_prompt": 3})
            + prefill_layers(6)
            + asked("head", 3),
        ),
    ],
    ids=lambda one: "-".join(map(str, one.values())) if isinstance(one, dict) else "",
)
def test_a_reading_takes_what_its_parts_do(reading: dict[str, Any], seconds: float) -> None:
    assert predictor().seconds({**LOAD, **reading}) == seconds


@pytest.mark.parametrize(
    ("layers", "checks", "later_checks"), [(3, 1, 1), (6, 2, 0)], ids=["first", "second"]
)
def test_a_split_is_two_passes_in_which_two_rows_leave_and_three_go_on(
    layers: int, checks: int, later_checks: int
) -> None:
    """Both begin, all rows are told a token once, and the two that leave are filled as four."""
    seconds = (
        begun_and_told(5)
        + decode_layers(layers, 8, 5)
        + asked("check", 5, times=checks)
        + sum_of({"rebatch.overhead_s": 1, "rebatch.overhead_s_per_row": 3})
        + filled(12 - layers, 4)
        + sum_of({"decode.fixed_s": 1})
        + decode_layers(12 - layers, 4, 3)
        + asked("check", 3, times=later_checks)
        + asked("head", 3)
    )
    assert predictor().seconds({**LOAD, "quantity": "split_iteration", "layers": layers}) == seconds


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("embed", {"graph": 1}),
        ("run", {"graph": 1, "layer": 6}),
        ("tell", {"exit": 1}),
        ("fill", {"graph": 1, "filled_layer": 6}),
    ],
)
def test_a_graph_takes_itself_and_its_layers_and_what_an_exit_says_is_one_of_its_own(
    kind: str, counts: dict[str, float]
) -> None:
    row = {**LOAD, "quantity": f"capture_{kind}", "layers": 6 if kind in ("run", "fill") else None}
    seconds = sum_of({f"capture.s_per_{name}": count for name, count in counts.items()})
    assert predictor().seconds(row) == seconds
    assert predictor(buckets=()).seconds(row) is None


def test_weights_come_from_where_the_reading_says_and_no_bytes_take_nothing() -> None:
    found = predictor()
    load = {**LOAD, "layers": None, "bytes": 1000}
    assert found.seconds({**load, "quantity": "load_disk"}) == 2.0 + 1000 / 10.0
    for quantity in ("load_host", "load_host_pinned"):
        assert found.seconds({**load, "quantity": quantity}) == 1.0 + 1000 / 100.0
    assert found.seconds({**load, "quantity": "load_disk", "bytes": None}) is None
    assert replace(found, loading=None).seconds({**load, "quantity": "load_disk"}) is None
    assert found.seconds({**load, "quantity": "launch_floor"}) is None


def test_rows_of_which_no_longest_is_named_are_equally_long() -> None:
    row = {**LOAD, "longest_context_tokens": None}
    assert predictor().padded_tokens(row) == 8 * 10


def test_rows_that_leave_or_name_no_depth_take_the_factor_of_all_layers() -> None:
    found = predictor(batch_residual=(), depth_residual=((3, 0.5), (12, 2.0)))
    for quantity in ("exit_iteration", "split_iteration"):
        assert found.factor({**LOAD, "quantity": quantity, "layers": 3}) == 2.0
    assert found.factor({**LOAD, "quantity": "iteration", "layers": 3}) == 0.5
    assert found.factor({**LOAD, "quantity": "head", "layers": None}) == 2.0
    assert found.without_depth().factor({**LOAD, "quantity": "iteration", "layers": 3}) == 1.0


DECODED_J = 6 * (10.0 + 5 * 20.0 + 5 * 10 * 50.0 + 5 * 20 * 70.0)
"""Six layers of five rows, without a graph."""

PREFILLED_J = 6 * (110.0 + 3 * 4 * 130.0 + 3 * (3 + 4 + 5 + 6) * 170.0)
"""Six layers of three prompts, whose four tokens meet two that are there."""


@pytest.mark.parametrize(
    ("quantity", "above_active_j"),
    [
        ("decode_energy", DECODED_J),
        ("iteration_energy", DECODED_J + 1e4 + 5 * 2e4),
        ("prefill_energy", PREFILLED_J),
        ("prefill_iteration_energy", PREFILLED_J + 1e4 + 3 * 2e4),
        ("head_energy", 1e4 + 5 * 2e4),
    ],
)
def test_a_window_draws_active_power_and_what_its_parts_do(
    quantity: str, above_active_j: float
) -> None:
    load = PROMPTS if quantity.startswith("prefill") else {**LOAD, "mode": "eager"}
    row = {**load, "quantity": quantity, "layers": 6, "seconds": 2.0}
    assert predictor(JOULES).joules(row) == 2.0 * 3.0 + above_active_j


def test_joules_are_of_windows_of_known_seconds_and_models_of_known_energy() -> None:
    row = {**LOAD, "quantity": "head_energy", "layers": None, "seconds": 2.0}
    assert predictor(JOULES).joules({**row, "seconds": None}) is None
    assert predictor(JOULES).joules({**row, "quantity": "idle_power"}) is None
    assert predictor(COSTS).joules(row) is None


@pytest.mark.parametrize(("cached", "pairs"), [(0, 1 + 2 + 3 + 4), (3, 4 + 5 + 6 + 7)])
def test_a_prompt_token_meets_those_before_it_and_itself(cached: int, pairs: int) -> None:
    row = {"batch": 2, "prompt_tokens": 4, "context_tokens": cached}
    assert prefill_load(row) == (8, 2 * cached, 2 * pairs)
