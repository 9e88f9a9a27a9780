"""Which windows tell of joules, how many are needed, and what stands where one kind is missing."""

from __future__ import annotations

import polars as pl
import pytest

from calibration.fitting.fit_energy import EnergyFit, fit_energy
from calibration.fitting.fit_times import Number
from tests.calibration import planted
from tests.calibration.planted import GPU_LIKE, Plan

DECODE = pl.col("quantity").is_in(("decode_energy", "iteration_energy"))
PREFILL = pl.col("quantity").is_in(("prefill_energy", "prefill_iteration_energy"))
HEAD = pl.col("quantity") == "head_energy"


def points() -> pl.DataFrame:
    """Windows of the planted model, in their order."""
    return planted.points(Plan()).filter(DECODE | PREFILL | HEAD)


def energy_of(windows: pl.DataFrame, padded_share: float = 0.0) -> EnergyFit:
    limit = Number(None, "unavailable", "no board")
    return fit_energy(windows, planted.model(), planted.IDLE_W, limit, "no meter", padded_share)


def test_four_windows_of_decode_are_enough_and_others_do_not_stand_in() -> None:
    decode, others = points().filter(DECODE), points().filter(~DECODE)
    assert energy_of(pl.concat((decode.head(4), others))).record["available"]
    found = energy_of(pl.concat((decode.head(3), others)))
    assert found.record["why"] == "3 energy windows of decode were read; 4 are needed"


@pytest.mark.parametrize("column", ["joules", "seconds"])
@pytest.mark.parametrize("nothing", [None, 0.0])
def test_windows_in_which_nothing_was_counted_take_no_part(
    column: str, nothing: float | None
) -> None:
    whole = points()
    empty = whole.with_columns(pl.lit(nothing, pl.Float64).alias(column))
    assert energy_of(pl.concat((whole, empty))).numbers == energy_of(whole).numbers
    assert energy_of(empty).record == {"available": False, "why": "no meter"}


def test_active_power_that_was_read_beyond_the_boards_limit_is_the_limit() -> None:
    """A sensor's few watts too many give no profile that contradicts itself."""
    windows, active = points(), "power.active_w"
    assert energy_of(windows).numbers[active].value == pytest.approx(GPU_LIKE[active], rel=1e-3)
    limit = Number(0.99 * GPU_LIKE[active], "measured", "the board's")
    held = fit_energy(windows, planted.model(), planted.IDLE_W, limit, "no meter")
    assert held.numbers[active].value == limit.value


def test_without_windows_of_prompts_a_pair_costs_what_a_context_token_does_padded_or_not() -> None:
    numbers = energy_of(points().filter(~PREFILL), padded_share=0.25).numbers
    for name, other in (
        ("prefill.j_per_layer", "decode.j_per_layer"),
        ("prefill.j_per_token_layer", "decode.j_per_row_layer"),
        ("prefill.j_per_pair_layer", "decode.j_per_context_token_layer"),
    ):
        assert numbers[name].value == pytest.approx(GPU_LIKE[other], rel=1e-3), name
        assert numbers[name].grade == "derived"
    own = numbers["decode.j_per_context_token_layer"].value
    assert own == pytest.approx(0.75 * (numbers["prefill.j_per_pair_layer"].value or 0.0))


def test_a_head_that_only_judges_is_none_that_was_fitted_and_checks_follow_it() -> None:
    share = 256 * 64 / planted.SHAPE.layer_params()
    like_layers = {
        "head.j_base": share * GPU_LIKE["decode.j_per_layer"],
        "head.j_per_row": share * GPU_LIKE["decode.j_per_row_layer"],
    }
    windows = planted.points(Plan({**GPU_LIKE, **like_layers})).with_columns(
        purpose=pl.when(HEAD).then(pl.lit("held-out")).otherwise("purpose")
    )
    numbers = energy_of(windows).numbers
    for name in ("decode.j_per_layer", "decode.j_per_row_layer"):
        assert numbers[name].value == pytest.approx(GPU_LIKE[name], rel=1e-3)
    for name in like_layers:
        assert numbers[name].grade == "derived"
        assert numbers[name].value == pytest.approx(like_layers[name], rel=1e-3)
        check = name.replace("head.", "check.")
        assert numbers[check].value == numbers[name].value
