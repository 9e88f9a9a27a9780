"""Readings of a planted cost model become a profile that has the planted numbers again."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.cli import main
from calibration.fitting.check import check_rows, compare
from calibration.fitting.fit import (
    FitSettings,
    _device_node,
    _floors,
    _idle,
    _links,
    device_floors,
    fit_profile,
)
from calibration.fitting.fit_energy import EnergyFit, _leave_one_out, fit_energy
from calibration.fitting.fit_times import (
    Number,
    falling_time,
    fit_times,
    launch_bound_share,
    model_profile,
)
from calibration.fitting.points import CAPTURES, LEAVING, PREFILL_ITERATION, gather
from calibration.measuring.readings import CACHED, POINTS_FILE, SCHEMA, Reading
from helios_sim.cost import COEFFICIENTS, OPTIONAL_COEFFICIENTS, decode_seconds
from helios_sim.errors import InputError
from helios_sim.exits import load_traces
from helios_sim.profile import Profile, unit_of
from helios_sim.profiles.files import load_profile
from tests.calibration import planted
from tests.calibration.planted import GPU_LIKE, Plan

PADDED = dict(GPU_LIKE) | {
    "decode.launch_s": 0.0,
    "decode.memory_s_per_context_token": 4.0e-10,
    "decode.memory_s_per_padded_token": 1.2e-9,
    "decode.fixed_s_per_row": 3.0e-6,
    "prefill.fixed_s_per_prompt": 5.0e-5,
}
"""A backend that reads rows to the longest one's end, and whose host pays for every row."""
FEW_BATCHES = pl.col("batch").is_null() | pl.col("batch").is_in((1, 8, 64))
"""Enough for a fit whose exactness is not what is asked."""
SHALLOW_IS_QUICK = {3: 0.75, 6: 0.9}
ONE_ROW_IS_QUICK = {1: 0.7}

PLANTED_TIMES = [name for name in GPU_LIKE if unit_of(name)[0] == "s"]


def fitted(tmp_path: Path, plan: Plan | None = None, **more: Any) -> Profile:
    """A profile fitted from a planted folder."""
    folder = planted.folder(tmp_path / "points", plan or Plan(), **more)
    return fit_profile(folder, tmp_path / "profile")


def small_folder(path: Path, plan: Plan | None = None, **more: Any) -> Path:
    """A planted folder of few batches."""
    folder = planted.folder(path, plan or Plan(), **more)
    points = pl.read_parquet(folder / POINTS_FILE).filter(FEW_BATCHES)
    points.write_parquet(folder / POINTS_FILE)
    return folder


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The profile of readings without noise."""
    return fitted(tmp_path_factory.mktemp("exact"))


def test_without_noise_every_planted_second_is_found(exact: Profile) -> None:
    found = exact.models["planted"].coefficients
    for name in PLANTED_TIMES:
        assert found[name] == pytest.approx(GPU_LIKE[name], rel=1e-4), name


def test_without_noise_every_planted_joule_and_watt_is_found(exact: Profile) -> None:
    found = exact.models["planted"].coefficients
    for name in GPU_LIKE:
        if unit_of(name)[0] in "JW":
            assert found[name] == pytest.approx(GPU_LIKE[name], rel=1e-4), name
    assert exact.has_energy
    assert exact.device.idle_w == planted.IDLE_W
    assert exact.device.active_w == pytest.approx(140.0)
    assert exact.device.load_w == planted.LOAD_W


def test_loading_is_a_start_and_a_rate(exact: Profile) -> None:
    for link, (alpha_s, rate) in (
        (exact.loading.disk, planted.DISK),
        (exact.loading.host, planted.HOST),
    ):
        assert link.alpha_s == pytest.approx(alpha_s, rel=1e-4)
        assert link.bytes_per_s == pytest.approx(rate, rel=1e-4)


def test_measured_numbers_name_their_points_and_their_error(exact: Profile) -> None:
    number = exact.quantities["models.planted.coefficients.decode.memory_s_per_row"]
    assert number.grade == "measured"
    assert "points of decode_layers" in number.source
    assert number.error is not None
    assert exact.provenance.origin == "measured"
    derived = exact.quantities["models.planted.coefficients.rebatch.overhead_s"]
    assert derived.grade == "derived"


def test_readings_and_traces_travel_with_the_profile(exact: Profile) -> None:
    assert pl.read_parquet(exact.folder / "points.parquet").height > 100
    assert load_traces(exact).candidates == ("planted",)
    assert sorted(path.name for path in exact.folder.iterdir()) == [
        "exits.parquet",
        "points.parquet",
        "profile.json",
    ]


def test_the_measured_range_is_the_hull(exact: Profile) -> None:
    hull = exact.models["planted"].hull
    assert hull is not None
    assert (hull.max_batch, hull.max_context_tokens) == (128, 1000)


# Where noise is drawn, every bound is met with luck: the same draws each time tell of a change.
@settings(
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    launch=st.floats(0.0, 8e-5),
    memory=st.floats(5e-6, 5e-5),
    per_row=st.floats(1e-7, 2e-6),
    per_token=st.floats(1e-10, 1e-8),
    fixed=st.floats(1e-4, 1e-3),
    seed=st.integers(0, 1000),
)
def test_under_noise_the_planted_times_are_predicted_within_it(
    launch: float, memory: float, per_row: float, per_token: float, fixed: float, seed: int
) -> None:
    coefficients = dict(GPU_LIKE) | {
        "decode.launch_s": launch,
        "decode.memory_s_per_layer": memory,
        "decode.memory_s_per_row": per_row,
        "decode.memory_s_per_context_token": per_token,
        "decode.fixed_s": fixed,
    }
    noise = 0.01
    points = planted.points(Plan(coefficients, noise=noise, seed=seed, energy=False))
    found = fit_times(points, planted.model())
    own = model_profile(
        planted.model(), found.numbers, (), found.batch_residual, found.hull, found.depth_residual
    )
    c, truth = own.coefficient_array(), planted.array(coefficients)
    errors = []
    for batch in (1, 6, 20, 100):
        for context in (20, 300, 900):
            work = (batch, batch * context, batch * context, 9, 0, 1, 0, batch, batch, 1.0)
            right = decode_seconds(truth, *work)[0]
            errors.append(abs(decode_seconds(c, *work)[0] - right) / right)
    # Where two planes meet, noise may hide which of them bounds a load.
    assert max(errors) < 10 * noise
    assert statistics.median(errors) < 2 * noise
    assert falling_time(own) is None


def test_a_floor_that_does_not_show_is_not_kept(tmp_path: Path) -> None:
    coefficients = dict(GPU_LIKE) | {"decode.launch_s": 0.0, "prefill.launch_s": 0.0}
    profile = fitted(tmp_path, Plan(coefficients, noise=0.01))
    kept = profile.document["measurement"]["models"]["planted"]["planes"]
    assert kept["decode"]["kept"] == ["memory"]
    assert kept["prefill"]["kept"] == ["compute"]
    number = profile.quantities["models.planted.coefficients.decode.launch_s"]
    assert (number.value, number.grade) == (0.0, "derived")


def test_beside_a_prefill_a_lone_plane_adds_its_work_and_reads_the_weights_once(
    exact: Profile,
) -> None:
    found = exact.models["planted"].coefficients
    assert found["decode.compute_s_per_layer"] == 0.0
    assert found["decode.compute_s_per_row"] == found["decode.memory_s_per_row"]


def test_a_bump_over_batch_is_kept_where_it_lowers_the_left_out_error(tmp_path: Path) -> None:
    factor = dict.fromkeys((16, 32), 1.25)
    coefficients = dict(GPU_LIKE) | {"decode.launch_s": 0.0}
    profile = fitted(tmp_path, Plan(coefficients, noise=0.005, factor=factor))
    record = profile.document["measurement"]["models"]["planted"]["batch_residual"]
    assert record["kept"]
    assert record["left_out_mean_with"] < record["left_out_mean_without"]
    assert falling_time(profile.models["planted"]) is None


def test_padding_rows_on_the_host_and_both_factors_are_found_again() -> None:
    plan = Plan(
        PADDED,
        factor=ONE_ROW_IS_QUICK,
        depth_factor=SHALLOW_IS_QUICK,
        ragged=True,
        prompts=(1, 2, 8),
        energy=False,
    )
    found = fit_times(planted.points(plan), planted.model())
    for name in PLANTED_TIMES:
        assert found.numbers[name].value == pytest.approx(PADDED[name], rel=1e-3), name
    for name in OPTIONAL_COEFFICIENTS:
        if name in PADDED:
            assert found.numbers[name].value == pytest.approx(PADDED[name], rel=1e-3), name
            assert found.numbers[name].grade == "measured"
    assert dict(found.depth_residual) == pytest.approx({3: 0.75, 6: 0.9, 12: 1.0}, rel=1e-3)
    batches = dict.fromkeys(planted.BATCHES, 1.0) | ONE_ROW_IS_QUICK
    assert dict(found.batch_residual) == pytest.approx(batches, rel=1e-3)
    assert found.overheads["decode"] == pytest.approx(planted.STACK_S, rel=1e-3)
    lent = found.numbers["decode.compute_s_per_padded_token"]
    assert (lent.value, lent.grade) == (
        found.numbers["decode.memory_s_per_padded_token"].value,
        "derived",
    )


@pytest.mark.parametrize("floor_s", [0.0, 3.0e-5])
def test_under_noise_factors_are_kept_and_new_points_met(floor_s: float) -> None:
    plan = Plan(
        PADDED | {"decode.launch_s": floor_s},
        noise=0.01,
        factor=ONE_ROW_IS_QUICK,
        depth_factor=SHALLOW_IS_QUICK,
        ragged=True,
        energy=False,
    )
    found = fit_times(planted.points(plan), planted.model())
    assert found.record["falls"] is None
    assert found.record["batch_residual"]["kept"]
    assert found.record["depth_residual"]["kept"]
    assert dict(found.depth_residual) == pytest.approx({3: 0.75, 6: 0.9, 12: 1.0}, rel=0.02)
    for quantity in ("decode_layers", "iteration"):
        errors = found.record["errors"][quantity]
        assert errors["held_out"]["median"] < 0.015
        assert errors["left_out"]["median"] < 0.015


def test_disturbed_cells_hardly_move_the_factors() -> None:
    plan = Plan(PADDED, noise=0.01, depth_factor=SHALLOW_IS_QUICK, ragged=True, energy=False)
    points = planted.points(plan)
    disturbed = (pl.col("batch") * 7 + pl.col("context_tokens") * 3) % 11 == 0
    spoilt = points.with_columns(
        seconds=pl.when(disturbed.fill_null(False) & (pl.col("purpose") == "fit"))
        .then(pl.col("seconds") * 1.9)
        .otherwise("seconds")
    )
    assert 0.03 < (spoilt["seconds"] != points["seconds"]).mean() < 0.2
    found = fit_times(spoilt, planted.model())
    assert dict(found.depth_residual) == pytest.approx({3: 0.75, 6: 0.9, 12: 1.0}, rel=0.03)
    assert found.record["errors"]["decode_layers"]["held_out"]["median"] < 0.03


def test_without_ragged_rows_all_context_is_charged_to_the_rows_own() -> None:
    found = fit_times(planted.points(Plan(PADDED, energy=False)), planted.model())
    both = PADDED["decode.memory_s_per_context_token"] + PADDED["decode.memory_s_per_padded_token"]
    context = found.numbers["decode.memory_s_per_context_token"]
    assert context.value == pytest.approx(both, rel=1e-4)
    for plane in ("memory", "compute"):
        padded = found.numbers[f"decode.{plane}_s_per_padded_token"]
        assert (padded.value, padded.grade) == (0.0, "derived")
        assert "no ragged rows" in padded.source


def test_a_plane_without_ragged_rows_splits_its_context_as_the_other_does() -> None:
    coefficients = PADDED | {
        "decode.compute_s_per_row": 1.5e-6,
        "decode.compute_s_per_context_token": 5.0e-10,
        "decode.compute_s_per_padded_token": 1.5e-9,
    }
    points = planted.points(Plan(coefficients, ragged=True, energy=False))
    ragged = (pl.col("longest_context_tokens") > pl.col("context_tokens")).fill_null(False)
    points = points.filter(~ragged | (pl.col("batch") <= 8) | (pl.col("purpose") != "fit"))
    found = fit_times(points, planted.model())
    for name in coefficients:
        if name.startswith(("decode.memory", "decode.compute")):
            assert found.numbers[name].value == pytest.approx(coefficients[name], rel=1e-3), name
    assert found.record["errors"]["decode_layers"]["held_out"]["p95"] < 1e-3


def test_what_a_row_adds_is_not_guessed_from_one_batch() -> None:
    points = planted.points(Plan(PADDED, energy=False))
    one = (pl.col("quantity") != "iteration") | (pl.col("batch") == 4)
    found = fit_times(points.filter(one), planted.model())
    for name, few in (
        ("decode.fixed_s_per_row", "fewer than 3 batches"),
        ("prefill.fixed_s_per_prompt", "fewer than 2 numbers of prompts"),
    ):
        assert (found.numbers[name].value, found.numbers[name].grade) == (0.0, "derived")
        assert few in found.numbers[name].source


def test_times_rise_with_loaded_depth_and_a_fall_is_said(tmp_path: Path) -> None:
    factor = {3: 2.5, 6: 1.1}
    plan = Plan(dict(GPU_LIKE) | {"decode.launch_s": 0.0}, noise=0.005, depth_factor=factor)
    model = fitted(tmp_path, plan).models["planted"]
    assert falling_time(model) is None
    said = falling_time(replace(model, depth_residual=((3.0, 2.5), (6.0, 1.0))))
    assert said is not None
    assert "loaded layers" in said


def test_both_factors_stand_in_the_profile(tmp_path: Path) -> None:
    plan = Plan(
        PADDED,
        noise=0.003,
        factor=ONE_ROW_IS_QUICK,
        depth_factor=SHALLOW_IS_QUICK,
        ragged=True,
        energy=False,
    )
    profile = fitted(tmp_path, plan)
    model = profile.models["planted"]
    assert [depth for depth, _ in model.depth_residual] == [3.0, 6.0, 12.0]
    assert model.residual(1, 3)[1] == pytest.approx(0.7 * 0.75, rel=0.03)
    knot = profile.quantities["models.planted.depth_residual[0]"]
    assert (knot.unit, knot.grade) == ("1", "measured")


def test_no_factor_lets_a_time_fall_as_rows_join(tmp_path: Path) -> None:
    factor = {1: 2.5, 2: 2.0, 4: 0.6, 8: 0.5}
    coefficients = dict(GPU_LIKE) | {"decode.launch_s": 0.0}
    profile = fitted(tmp_path, Plan(coefficients, noise=0.005, factor=factor))
    assert falling_time(profile.models["planted"]) is None


def test_a_falling_time_is_found_and_said_where(exact: Profile) -> None:
    model = replace(exact.models["planted"], batch_residual=((8.0, 1.0), (9.0, 0.3)))
    said = falling_time(model)
    assert said is not None
    assert "from batch 8 to 9" in said


def test_fitting_needs_no_torch() -> None:
    """A profile is fitted, checked and drawn where there is none."""
    modules = "calibration.fitting.fit, calibration.fitting.check, calibration.fitting.page"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_graphs_stand_for_the_profile_where_measured_and_eager_is_a_choice(
    tmp_path: Path,
) -> None:
    plan = Plan(modes=("graph", "eager"), eager_slowdown_s=6e-5)
    folder = planted.folder(tmp_path / "points", plan)
    graph = fit_profile(folder, tmp_path / "graph")
    eager = fit_profile(folder, tmp_path / "eager", FitSettings(mode="eager"))
    name = "decode.launch_s"
    assert graph.models["planted"].coefficients[name] == pytest.approx(3e-5, rel=1e-3)
    slow = eager.models["planted"].coefficient_array()
    assert decode_seconds(slow, 1, 512, 512, 12, 0, 1, 0, 1, 1, 1.0)[0] == pytest.approx(
        decode_seconds(planted.array(GPU_LIKE), 1, 512, 512, 12, 0, 1, 0, 1, 1, 1.0)[0] + 12 * 6e-5,
        rel=1e-2,
    )
    assert graph.models["planted"].batch_buckets == planted.BATCHES
    assert eager.models["planted"].batch_buckets == ()
    assert "Decode times stand for: graph." in graph.provenance.notes
    assert "Decode times stand for: eager." in eager.provenance.notes
    shares = graph.document["measurement"]["models"]["planted"]["launch_bound_share"]["by_batch"]
    assert shares[0][1] > shares[-1][1] > 0.0


@pytest.mark.parametrize(
    ("mode", "captures", "why"),
    [
        ("graph", True, "fitted to 30 points of capturing single graphs"),
        ("graph", False, "capturing was not timed"),
        ("eager", True, "no graphs: decodes were timed eagerly"),
    ],
)
def test_capturing_is_charged_where_graphs_stand_for_the_times(
    tmp_path: Path, mode: str, captures: bool, why: str
) -> None:
    plan = Plan(modes=("graph", "eager"), captures=captures, noise=0.01, trials=3)
    folder = planted.folder(tmp_path / "points", plan)
    profile = fit_profile(folder, tmp_path / "profile", FitSettings(mode=mode))
    model = profile.models["planted"]
    measured = mode == "graph" and captures
    for name, planted_s in planted.CAPTURE.items():
        found = profile.quantities[f"models.planted.coefficients.{name}"]
        assert found.source == why
        assert found.grade == ("measured" if measured else "derived")
        assert found.value == pytest.approx(planted_s if measured else 0.0, rel=0.02)
    assert model.graph_rows == (planted.BATCHES[-1] if measured else 0)
    errors = profile.document["measurement"]["models"]["planted"]["errors"]
    assert [row for row in check_rows(profile) if row.quantity in CAPTURES and row.has_bars] == []
    assert ("capture_run" in errors) == measured
    if measured:
        assert errors["capture_run"]["held_out"]["n"] == 6
        assert 0.0 < errors["capture_run"]["held_out"]["p95"] < 0.03
        assert 0.0 < errors["capture_fill"]["left_out"]["p95"] < 0.03


def test_decode_is_set_beside_the_floors_of_the_same_run(exact: Profile) -> None:
    kept = exact.document["measurement"]["models"]["planted"]["against_floor"]
    batch, _, layer_s, floor_s, ratio = kept[0]
    assert batch == 1
    assert layer_s == pytest.approx(3e-5)
    assert ratio == pytest.approx(layer_s / floor_s)


def test_without_a_meter_energy_is_unavailable_and_says_why(tmp_path: Path) -> None:
    profile = fitted(
        tmp_path,
        Plan(energy=False),
        meter={"source": "none", "explanation": "no NVIDIA driver answers"},
    )
    assert not profile.has_energy
    number = profile.quantities["device.idle_w"]
    assert number.grade == "unavailable"
    assert number.source == "no NVIDIA driver answers"
    assert profile.models["planted"].coefficients["decode.launch_s"] == pytest.approx(3e-5)


@pytest.mark.parametrize(("watts", "error"), [((60.0, 70.0), 5.0), ((66.0,), None)])
def test_idle_power_is_as_sure_as_its_windows_agree(
    tmp_path: Path, watts: tuple[float, ...], error: float | None
) -> None:
    folder = small_folder(tmp_path / "points")
    points = pl.read_parquet(folder / POINTS_FILE).filter(pl.col("quantity") != "idle_power")
    windows = [
        asdict(Reading("idle_power", seconds=5.0, joules=5.0 * each, watts=each, trial=trial))
        for trial, each in enumerate(watts)
    ]
    idle = pl.DataFrame(windows, schema=points.schema)
    pl.concat([points, idle]).write_parquet(folder / POINTS_FILE)
    found = fit_profile(folder, tmp_path / "profile").quantities["device.idle_w"]
    assert found.error == error
    assert f"median of {len(watts)} idle windows" in found.source


def table(*readings: Reading) -> pl.DataFrame:
    """Some readings as a table."""
    return pl.DataFrame([asdict(one) for one in readings], schema=SCHEMA)


def test_one_idle_window_that_was_not_idle_does_not_move_the_idle_power() -> None:
    windows = [Reading("idle_power", watts=watts) for watts in (50.0, 50.0, 110.0)]
    found = _idle(table(*windows), "")
    assert found.value == 50.0
    assert found.error == pytest.approx(20.0)


def test_the_active_power_is_the_least_that_a_model_was_seen_to_draw() -> None:
    energy = {
        name: EnergyFit({"power.active_w": Number(watts, "measured", "windows")}, {})
        for name, watts in (("small", 100.0), ("large", 140.0))
    }
    device = {"name": "Planted GPU", "memory_bytes": 2**30}
    found = _device_node(device, Number(50.0, "measured", "idle"), energy, gather(table()))
    assert found["active_w"]["value"] == 100.0
    assert found["load_w"]["value"] == 100.0


def test_power_while_weights_move_is_never_below_idle_and_says_what_was_read(
    tmp_path: Path,
) -> None:
    folder = small_folder(tmp_path / "points")
    low_w = planted.IDLE_W - 3.0
    is_load = pl.col("quantity") == "load_energy"
    points = pl.read_parquet(folder / POINTS_FILE)
    points = points.with_columns(watts=pl.when(is_load).then(low_w).otherwise("watts"))
    points.write_parquet(folder / POINTS_FILE)
    profile = fit_profile(folder, tmp_path / "profile")
    number = profile.quantities["device.load_w"]
    assert number.value == planted.IDLE_W
    assert number.grade == "derived"
    assert f"read {low_w:g} W, below idle_w" in number.source


def test_workspace_is_the_most_that_was_measured(exact: Profile) -> None:
    assert exact.models["planted"].workspace_bytes == 3_000_000
    assert exact.quantities["models.planted.workspace_bytes"].grade == "measured"


def test_held_out_points_take_no_part_in_the_fit(tmp_path: Path) -> None:
    folder = planted.folder(tmp_path / "points", Plan())
    path = folder / "points.parquet"
    spoilt = pl.read_parquet(path).with_columns(
        seconds=pl.when(pl.col("purpose") == "held-out")
        .then(pl.col("seconds") * 2)
        .otherwise(pl.col("seconds"))
    )
    spoilt.write_parquet(path)
    profile = fit_profile(folder, tmp_path / "profile")
    assert profile.models["planted"].coefficients["decode.launch_s"] == pytest.approx(3e-5)
    errors = profile.document["measurement"]["models"]["planted"]["errors"]["decode_layers"]
    assert errors["held_out"]["median"] == pytest.approx(0.5, abs=0.01)
    assert errors["left_out"]["median"] < 1e-6


def test_exits_of_another_profile_can_stand_in(tmp_path: Path) -> None:
    statistics = dict(load_profile("opt-a100-40gb").document)
    plan = Plan(name="opt-1.3b", leaving=False)
    folder = small_folder(tmp_path / "points", plan, with_traces=False)
    with pytest.raises(InputError, match=r"give --exits"):
        fit_profile(folder, tmp_path / "profile")
    environment = json.loads((folder / "environment.json").read_text())
    environment["models"]["opt-1.3b"]["exit_layers"] = [6, 12]
    (folder / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(InputError, match=r"which was measured with the exits \[6, 12\]"):
        fit_profile(folder, tmp_path / "profile", FitSettings(exits="opt-a100-40gb"))
    environment["models"]["opt-1.3b"]["exit_layers"] = [6, 12, 24]
    environment["models"]["opt-1.3b"]["shape"]["layers"] = 24
    (folder / "environment.json").write_text(json.dumps(environment))
    profile = fit_profile(folder, tmp_path / "profile", FitSettings(exits="opt-a100-40gb"))
    assert profile.document["exits"]["domains"] == statistics["exits"]["domains"]
    assert any("opt-a100-40gb" in note for note in profile.provenance.notes)


def test_borrowed_traces_are_told_and_bring_what_they_stand_in_for(tmp_path: Path) -> None:
    """With the confidence that their tokens leave at, which a model of random weights has not."""
    lender = fit_profile(small_folder(tmp_path / "lent"), tmp_path / "lender")
    document = json.loads((tmp_path / "lender" / "profile.json").read_text())
    document["models"]["planted"]["confidence"]["default_threshold"]["value"] = 0.625
    document["provenance"]["environment"]["stand_ins"] = {"planted": "another"}
    (tmp_path / "lender" / "profile.json").write_text(json.dumps(document))
    folder = small_folder(tmp_path / "points", with_traces=False)
    settings = FitSettings(exits=str(tmp_path / "lender"))
    profile = fit_profile(folder, tmp_path / "profile", settings)
    assert profile.stand_ins == {"planted": "another"}
    assert any(f"those of the profile {lender.name!r}" in one for one in profile.provenance.notes)
    assert profile.models["planted"].confidence.default_threshold == 0.625


@pytest.mark.parametrize(
    ("told", "grade"),
    [
        ({"weights": "checkpoint", "exits_chosen": False}, "measured"),
        ({"weights": "checkpoint", "exits_chosen": True}, "assumed"),
        ({"weights": "random"}, "assumed"),
    ],
)
def test_exits_that_were_chosen_are_nobody_s_measurement(
    tmp_path: Path, told: dict[str, Any], grade: str
) -> None:
    folder = small_folder(tmp_path / "points", Plan(energy=False, leaving=False))
    environment = json.loads((folder / "environment.json").read_text())
    environment["models"]["planted"] |= told
    (folder / "environment.json").write_text(json.dumps(environment))
    profile = fit_profile(folder, tmp_path / "profile")
    assert profile.document["models"]["planted"]["exit_layers"]["grade"] == grade


def test_what_kernels_and_which_weights_were_measured_stays_with_the_profile(
    tmp_path: Path,
) -> None:
    folder = small_folder(tmp_path / "points", Plan(energy=False, leaving=False))
    environment = json.loads((folder / "environment.json").read_text())
    told = {"kernels": {"fusion": "usable: it agrees"}, "guard": {"token_ids": [7]}}
    environment["models"]["planted"] |= told
    (folder / "environment.json").write_text(json.dumps(environment))
    kept = fit_profile(folder, tmp_path / "profile").document["measurement"]["models"]["planted"]
    assert {key: kept[key] for key in told} == told


def test_loads_of_one_size_tell_no_start_from_a_rate(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "points", Plan(energy=False, leaving=False))
    points = pl.read_parquet(folder / POINTS_FILE)
    disk = pl.col("quantity") == "load_disk"
    largest = points.filter(disk)["bytes"].max()
    points.filter(~disk | (pl.col("bytes") == largest)).write_parquet(folder / POINTS_FILE)
    profile = fit_profile(folder, tmp_path / "profile")
    start, rate = (profile.quantities[f"loading.disk.{one}"] for one in ("alpha_s", "bytes_per_s"))
    assert (start.grade, rate.grade) == ("derived", "derived")
    assert start.value == 0.0
    assert start.error is None and rate.error is None
    assert profile.quantities["loading.host.bytes_per_s"].grade == "measured"


def disk_loads(seconds: tuple[float, ...], unit: int, held_out_s: float) -> pl.DataFrame:
    """Loads of 1, 2, 3, ... units, and one of two and a half that is held out."""
    fit = [
        Reading("load_disk", "planted", bytes=unit * n, seconds=one)
        for n, one in enumerate(seconds, 1)
    ]
    new = replace(fit[0], purpose="held-out", bytes=unit * 5 // 2, seconds=held_out_s)
    return gather(table(*fit, new))


def test_a_held_out_load_is_predicted_with_its_start() -> None:
    """A start of a second and a second a gigabyte."""
    nodes, record = _links(disk_loads((2.0, 3.0, 4.0, 5.0), 10**9, 3.5))
    assert nodes["disk"]["alpha_s"]["value"] == pytest.approx(1.0)
    assert nodes["disk"]["bytes_per_s"]["value"] == pytest.approx(1e9)
    assert record["disk"]["errors"]["held_out"]["p95"] == pytest.approx(0.0, abs=1e-9)


def test_twice_the_bytes_in_the_same_time_are_twice_the_rate_and_twice_its_error() -> None:
    seconds = (2.0, 3.02, 3.97, 5.01)
    rates = [
        _links(disk_loads(seconds, unit, 3.5))[0]["disk"]["bytes_per_s"]
        for unit in (10**9, 2 * 10**9)
    ]
    assert 1e6 < rates[0]["error"] < 1e8
    assert rates[1]["value"] == pytest.approx(2 * rates[0]["value"])
    assert rates[1]["error"] == pytest.approx(2 * rates[0]["error"], rel=0.01)


def test_the_fastest_copy_is_the_floor_of_copying() -> None:
    copies = [
        Reading("copy_bandwidth", bytes=size, seconds=size / rate)
        for size, rate in ((2**20, 8e9), (2**22, 1e10), (2**24, 9e9))
    ]
    assert _floors(gather(table(*copies)))["copy_bytes_per_s"] == {"": pytest.approx(1e10)}


def test_an_existing_profile_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "points")
    fit_profile(folder, tmp_path / "profile")
    with pytest.raises(InputError, match="--overwrite"):
        fit_profile(folder, tmp_path / "profile")
    fit_profile(folder, tmp_path / "profile", FitSettings(overwrite=True))


def test_nothing_but_a_profile_is_replaced_by_one(tmp_path: Path) -> None:
    folder = planted.folder(tmp_path / "study" / "points", Plan())
    before = sorted(entry.name for entry in folder.iterdir())
    for out in (folder, folder.parent):
        with pytest.raises(InputError, match="give a folder for the profile that does not hold"):
            fit_profile(folder, out, FitSettings(overwrite=True))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    # What cannot be written is refused before any reading is looked at.
    for readings in (folder, tmp_path / "none"):
        with pytest.raises(InputError, match=r"it holds notes\.txt; allowed is a new folder"):
            fit_profile(readings, mine, FitSettings(overwrite=True))
    assert (mine / "notes.txt").read_text() == "mine"
    assert sorted(entry.name for entry in folder.iterdir()) == before


def spoil(folder: Path, how: str) -> None:
    """Damage a folder of readings."""
    points, environment = folder / "points.parquet", folder / "environment.json"
    frame = pl.read_parquet(points)
    if how == "truncated":
        points.write_bytes(points.read_bytes()[:200])
    elif how == "negative":
        frame.with_columns(seconds=-pl.col("seconds")).write_parquet(points)
    elif how == "too few":
        frame.filter(pl.col("quantity") != "head").write_parquet(points)
    elif how == "unknown quantity":
        frame.with_columns(quantity=pl.lit("colour")).write_parquet(points)
    elif how == "no environment":
        environment.unlink()
    elif how == "no models":
        environment.write_text('{"device": {"name": "a", "memory_bytes": 1}}')
    elif how == "a model without a shape":
        environment.write_text('{"device": {"name": "a"}, "models": {"planted": {}}}')
    elif how == "traces of other exits":
        planted.traces(("other",)).write_parquet(folder / "exits.parquet")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "no readable Parquet file"),
        ("negative", "a finite number of at least 0"),
        ("too few", "0 points of head instead of 1, at least"),
        ("unknown quantity", "'colour' is unknown"),
        ("no environment", "cannot be read"),
        ("no models", "'models' must hold"),
        ("a model without a shape", "'shape' is missing"),
        ("traces of other exits", "planted"),
    ],
)
def test_readings_that_cannot_be_used_are_refused_and_leave_nothing(
    tmp_path: Path, how: str, message: str
) -> None:
    folder = small_folder(tmp_path / "points")
    spoil(folder, how)
    with pytest.raises(InputError, match=message):
        fit_profile(folder, tmp_path / "profile")
    assert [path.name for path in tmp_path.iterdir()] == ["points"]


@dataclass(frozen=True)
class Noisy:
    """Readings with noise, and what the command made and said of them."""

    folder: Path
    profile: Path
    said: str


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Noisy:
    place = tmp_path_factory.mktemp("noisy")
    folder = planted.folder(place / "points", Plan(noise=0.01))
    with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit) as end:
        main(["fit", str(folder), "--out", str(place / "profile"), "--name", "planted"])
    assert not end.value.code
    return Noisy(folder, place / "profile", said.getvalue())


def test_the_command_fits_says_the_errors_and_draws_the_page(noisy: Noisy) -> None:
    assert "decode, stacks of layers" in noisy.said
    assert noisy.profile.with_name("profile.calibration.html").is_file()


def test_two_fits_of_the_same_readings_are_one_profile(noisy: Noisy, tmp_path: Path) -> None:
    """Up to the last bits, which linear algebra on several threads leaves open."""
    first = load_profile(noisy.profile)
    second = fit_profile(noisy.folder, tmp_path / "second", FitSettings(name="planted"))
    assert first.name == second.name == "planted"
    assert first.provenance == second.provenance
    assert list(first.quantities) == list(second.quantities)
    for key, quantity in first.quantities.items():
        other = second.quantities[key]
        assert (quantity.grade, quantity.source) == (other.grade, other.source)
        assert quantity.value == pytest.approx(other.value, rel=1e-9)


def test_every_coefficient_of_the_cost_model_gets_a_number(exact: Profile) -> None:
    assert set(exact.models["planted"].coefficients) == set(COEFFICIENTS)


def test_rows_that_left_where_no_exit_is_are_refused() -> None:
    model = replace(planted.model(), exit_layers=(4, 12))
    with pytest.raises(InputError, match=r"left at layer 3, which is none of its exits \[4, 12\]"):
        fit_times(planted.points(Plan(energy=False)), model)


WITHIN = {
    "check.base_s": 9.0e-5,
    "check.s_per_row": 9.0e-7,
    "kv_fill.base_s_per_layer": 4.0e-6,
    "kv_fill.s_per_row_layer": 5.0e-8,
    "rebatch.overhead_s": 2.0e-4,
    "rebatch.overhead_s_per_row": 4.0e-6,
}
"""As where the host hears an exit's word while the device waits, and fills while it works."""


@pytest.mark.parametrize("modes", [("eager",), ("eager", "graph")])
def test_iterations_have_the_last_word_on_what_leaving_costs(
    tmp_path: Path, modes: tuple[str, ...]
) -> None:
    plan = Plan(within=WITHIN, noise=0.003, modes=modes, energy=False)
    profile = fitted(tmp_path, plan)
    found = profile.models["planted"].coefficients
    for name, value in WITHIN.items():
        assert found[name] == pytest.approx(value, rel=0.15), name
    number = profile.quantities["models.planted.coefficients.check.base_s"]
    assert "points of exit_iteration, within iterations" in number.source
    kept = profile.document["measurement"]["models"]["planted"]
    assert all(kept["leaving"][quantity]["kept"] for quantity in LEAVING)
    rows = {row.quantity: row for row in check_rows(profile)}
    # What was timed alone stands for nothing any more.
    assert not {"check", "kv_fill"} & set(rows)
    assert all(rows[quantity].purpose == "held-out" for quantity in LEAVING)
    assert all(rows[quantity].within_bars for quantity in LEAVING)


def test_two_batches_tell_what_a_split_adds_and_not_what_a_row_does() -> None:
    points = planted.points(Plan(within={"rebatch.overhead_s": 4e-4}, energy=False))
    some = (pl.col("quantity") != "split_iteration") | pl.col("batch").is_in((8, 64))
    numbers = fit_times(points.filter(some), planted.model()).numbers
    assert numbers["rebatch.overhead_s"].value == pytest.approx(4e-4, rel=0.05)
    assert numbers["rebatch.overhead_s_per_row"].grade == "derived"


@pytest.mark.parametrize(("timed", "asked"), [("eager", "graph"), ("graph", "eager")])
def test_a_mode_that_no_decode_was_timed_in_is_refused(
    tmp_path: Path, timed: str, asked: str
) -> None:
    folder = planted.folder(tmp_path / "points", Plan(modes=(timed,), energy=False))
    with pytest.raises(InputError, match=f"mode '{asked}' and were timed in '{timed}' alone"):
        fit_profile(folder, tmp_path / "profile", FitSettings(mode=asked))
    assert not (tmp_path / "profile").exists()


def test_rows_that_left_in_graphs_are_nothing_of_an_eager_profile(tmp_path: Path) -> None:
    plan = Plan(modes=("eager", "graph"), eager_slowdown_s=3e-5, energy=False)
    folder = planted.folder(tmp_path / "points", plan)
    profile = fit_profile(folder, tmp_path / "profile", FitSettings(mode="eager"))
    assert not set(LEAVING) & {row.quantity for row in check_rows(profile)}
    assert profile.document["measurement"]["models"]["planted"]["leaving"] == {}


def test_parts_stand_where_iterations_are_made_of_them(tmp_path: Path) -> None:
    profile = fitted(tmp_path, Plan(noise=0.01, energy=False))
    kept = profile.document["measurement"]["models"]["planted"]["leaving"]
    assert [kept[quantity]["kept"] for quantity in LEAVING] == [False, False]
    assert profile.models["planted"].coefficients["rebatch.overhead_s"] == 0.0
    rows = {row.quantity: row for row in check_rows(profile)}
    assert {"check", "kv_fill", *LEAVING} <= set(rows)
    assert rows["exit_iteration"].median < 0.03


def test_where_nobody_left_what_leaving_costs_is_made_of_parts(tmp_path: Path) -> None:
    profile = fitted(tmp_path, Plan(leaving=False, energy=False))
    assert profile.document["measurement"]["models"]["planted"]["leaving"] == {}
    assert "check" in {row.quantity for row in check_rows(profile)}


def test_joules_of_context_are_padded_as_the_times_say() -> None:
    """Windows hold equal rows, so only ragged times tell what is read for the longest row."""
    points = planted.points(Plan(PADDED, ragged=True))
    times = fit_times(points, planted.model())
    own, beyond = (PADDED[f"decode.memory_s_per_{kind}_token"] for kind in ("context", "padded"))
    assert times.padded_share == pytest.approx(beyond / (own + beyond), rel=1e-3)
    limit = Number(None, "unavailable", "no board")
    known = (points, planted.model(), planted.IDLE_W, limit, "")
    plain, found = (fit_energy(*known, share) for share in (0.0, times.padded_share))
    each = plain.numbers["decode.j_per_context_token_layer"].value
    parts = [found.numbers[f"decode.j_per_{kind}_token_layer"] for kind in ("context", "padded")]
    assert sum(part.value for part in parts) == pytest.approx(each)
    assert parts[1].value == pytest.approx(each * times.padded_share)
    assert [part.grade for part in parts] == ["measured", "derived"]


def energy_of(points: pl.DataFrame) -> EnergyFit:
    """The energy fitted to points of the planted model."""
    limit = Number(None, "unavailable", "no board")
    return fit_energy(points, planted.model(), planted.IDLE_W, limit, "")


def test_joules_that_nobody_measured_are_shares_of_those_of_layers_and_heads() -> None:
    shape, numbers = planted.SHAPE, energy_of(planted.points(Plan())).numbers
    share = 2 * 64 * 4 * 16 / shape.layer_params()
    for name, other, factor in (
        ("kv_fill.j_per_layer", "decode.j_per_layer", share),
        ("kv_fill.j_per_row_layer", "decode.j_per_row_layer", share),
        ("check.j_base", "head.j_base", 1.0),
        ("check.j_per_row", "head.j_per_row", 1.0),
    ):
        assert numbers[name].value == pytest.approx(factor * GPU_LIKE[other], rel=1e-3), name
        assert numbers[name].grade == "derived"


def test_without_a_window_of_the_head_it_counts_as_its_weights_do_beside_a_layers() -> None:
    share = 256 * 64 / planted.SHAPE.layer_params()
    like_layers = {
        "head.j_base": share * GPU_LIKE["decode.j_per_layer"],
        "head.j_per_row": share * GPU_LIKE["decode.j_per_row_layer"],
    }
    points = planted.points(Plan({**GPU_LIKE, **like_layers}))
    numbers = energy_of(points.filter(pl.col("quantity") != "head_energy")).numbers
    for name in ("head.j_base", "decode.j_per_layer", "decode.j_per_row_layer"):
        assert numbers[name].value == pytest.approx({**GPU_LIKE, **like_layers}[name], rel=1e-3)


def test_the_jackknife_of_the_same_work_again_and_again_is_the_error_of_a_mean() -> None:
    ones, joules = np.ones(4), np.array([1.0, 2.0, 4.0, 7.0])
    errors, standard_errors = _leave_one_out(ones[:, None], joules, ones)
    assert standard_errors == pytest.approx([joules.std(ddof=1) / 2.0])
    assert errors == pytest.approx([(14.0 - one) / 3 - one for one in joules])


def test_held_out_windows_take_no_part_and_are_judged_with_idle_power() -> None:
    held_out = pl.col("quantity").is_in(("decode_energy", "iteration_energy")) & (
        pl.col("batch") == 32
    )
    points = planted.points(Plan()).with_columns(
        purpose=pl.when(held_out).then(pl.lit("held-out")).otherwise("purpose")
    )
    errors = energy_of(points).record["errors"]
    assert errors["held_out"]["n"] == points.filter(held_out).height > 0
    assert errors["held_out"]["p95"] < 1e-6
    spoilt = points.with_columns(joules=pl.col("joules") * pl.when(held_out).then(2).otherwise(1))
    found = energy_of(spoilt)
    assert found.record["errors"]["held_out"]["median"] == pytest.approx(0.5)
    name = "decode.j_per_layer"
    assert found.numbers[name].value == pytest.approx(GPU_LIKE[name], rel=1e-4)


def test_a_window_that_alone_tells_of_prompts_is_not_predicted_without_itself() -> None:
    points = planted.points(Plan()).filter(
        pl.col("quantity").is_in(("decode_energy", "head_energy"))
        | ((pl.col("quantity") == "prefill_energy") & (pl.col("prompt_tokens") == 256))
    )
    errors = energy_of(points.filter(pl.col("layers").fill_null(12) == 12)).record["errors"]
    assert errors["left_out"]["n"] == 12
    assert errors["left_out"]["median"] < 1e-6
    assert errors["left_out"]["p95"] > 0.1


def test_a_ragged_row_that_is_longer_than_any_even_one_belongs_to_the_hull() -> None:
    points = planted.points(Plan(PADDED, ragged=True, leaving=False, energy=False))
    short = points.filter(FEW_BATCHES & (pl.col("context_tokens").fill_null(0) <= 300))
    assert fit_times(short, planted.model()).hull.max_context_tokens == 520


def test_what_replaying_saves_is_a_share_of_the_eager_time() -> None:
    plan = Plan(modes=("graph", "eager"), eager_slowdown_s=6e-5, leaving=False, energy=False)
    one = planted.points(plan).filter(
        (pl.col("quantity") == "decode_layers")
        & (pl.col("layers") == 12)
        & (pl.col("batch") == 1)
        & (pl.col("context_tokens") == 16)
    )
    (eager_s,) = one.filter(pl.col("mode") == "eager")["seconds"]
    (found,) = launch_bound_share(one)["by_batch"]
    assert found == pytest.approx([1, 12 * 6e-5 / eager_s])


def test_without_whole_prefills_their_start_is_a_stacks_and_what_the_host_adds() -> None:
    points = planted.points(Plan(leaving=False, energy=False))
    stacks = points.filter(FEW_BATCHES & (pl.col("quantity") != PREFILL_ITERATION))
    found = fit_times(stacks, planted.model())
    start = found.numbers["prefill.fixed_s"]
    assert start.grade == "derived"
    assert start.value == pytest.approx(GPU_LIKE["decode.fixed_s"], rel=0.02)


def test_where_iterations_tell_of_checks_a_floor_of_those_alone_stands_no_more() -> None:
    alone = {"check.floor_s": 4e-5, "check.base_s": 1e-5, "check.s_per_row": 2e-6}
    plan = Plan({**GPU_LIKE, **alone}, within={**WITHIN, "check.floor_s": 0.0}, energy=False)
    layers = pl.col("quantity").is_in(("decode_layers", "iteration", "prefill_layers"))
    points = planted.points(plan).filter(FEW_BATCHES | ~layers)
    numbers = fit_times(points, planted.model()).numbers
    assert numbers["check.floor_s"].value == 0.0
    assert numbers["check.base_s"].value == pytest.approx(WITHIN["check.base_s"], rel=0.05)
    stay = points.filter(~pl.col("quantity").is_in(LEAVING))
    found = fit_times(stay, planted.model()).numbers["check.floor_s"].value
    assert found == pytest.approx(4e-5, rel=0.01)


WINDOWS = pl.col("quantity").str.ends_with("_energy") & (pl.col("quantity") != "load_energy")


def resumed(path: Path, short: pl.Expr, spoilt: float = 1.0) -> Path:
    """Readings of two models, some of whose windows were `short`, and these off by a factor."""
    frames = [planted.frame(Plan(name=name, leaving=False)) for name in ("first", "second")]
    points = pl.concat([frames[0], frames[1].filter(pl.col("model") == "second")])
    off = pl.when(WINDOWS & short).then(spoilt).otherwise(1.0)
    folder = planted.folder(path, Plan(name="first", leaving=False), with_traces=False)
    points.filter(FEW_BATCHES).with_columns(
        short_window=pl.when(WINDOWS).then(short), joules=pl.col("joules") * off
    ).write_parquet(folder / POINTS_FILE)
    planted.traces(("first", "second")).write_parquet(folder / "exits.parquet")
    content = planted.environment("first", "second")
    (folder / "environment.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_short_windows_of_one_model_outlast_the_long_ones_of_another(tmp_path: Path) -> None:
    """As where a run was resumed with a larger budget between the two."""
    profile = fit_profile(
        resumed(tmp_path / "points", pl.col("model") == "second"), tmp_path / "profile"
    )
    assert profile.has_energy
    found = profile.models["second"].coefficients["decode.j_per_layer"]
    assert found == pytest.approx(GPU_LIKE["decode.j_per_layer"], rel=1e-3)
    assert not any("left out" in note for note in profile.provenance.notes)


def test_traces_of_another_confidence_than_the_models_have_are_refused(tmp_path: Path) -> None:
    folder = planted.folder(tmp_path / "points", Plan(leaving=False))
    report = {"candidates": {"planted": {"confidence": "entropy", "threshold": 0.5}}}
    (folder / "trace.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(InputError, match="traced with the confidence entropy, and it has max-soft"):
        fit_profile(folder, tmp_path / "profile")


def test_a_report_on_other_traces_than_those_beside_it_is_refused(tmp_path: Path) -> None:
    """As an interrupted tracing leaves it; the profile would tell the figures of other exits."""
    folder = planted.folder(tmp_path / "points", Plan(leaving=False))
    held = hashlib.sha256((folder / "exits.parquet").read_bytes()).hexdigest()
    for told in (held, "0" * 64):
        (folder / "trace.json").write_text(json.dumps({"traces_sha256": told}), encoding="utf-8")
        if told == held:
            profile = fit_profile(folder, tmp_path / "profile")
            assert profile.document["measurement"]["exit_traces"] == {"traces_sha256": held}
            continue
        with pytest.raises(InputError, match=r"of other traces than exits\.parquet.*trace again"):
            fit_profile(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_few_long_windows_do_not_push_out_the_short_ones(tmp_path: Path) -> None:
    long = (pl.col("batch") == 1) & (pl.col("layers") == 12) & (pl.col("context_tokens") == 128)
    folder = resumed(tmp_path / "points", ~long.fill_null(False))
    profile = fit_profile(folder, tmp_path / "profile")
    number = profile.quantities["models.first.coefficients.decode.j_per_layer"]
    assert number.value == pytest.approx(GPU_LIKE["decode.j_per_layer"], rel=1e-3)
    assert "left out" not in number.source


def test_short_windows_are_left_out_where_long_ones_suffice_and_nobody_judges_by_them(
    tmp_path: Path,
) -> None:
    folder = resumed(tmp_path / "points", pl.col("layers").fill_null(12) == 3, spoilt=2.0)
    profile = fit_profile(folder, tmp_path / "profile")
    number = profile.quantities["models.first.coefficients.decode.j_per_layer"]
    assert number.value == pytest.approx(GPU_LIKE["decode.j_per_layer"], rel=1e-3)
    assert "short windows left out" in number.source
    assert any(
        note.startswith("first: ") and "short energy windows left out" in note
        for note in profile.provenance.notes
    )
    judged = compare(profile).filter(WINDOWS & (pl.col("quantity") != "head_energy"))
    assert set(judged["layers"]) == {6, 12}
    assert judged["error"].abs().max() < 1e-3


def test_loads_that_may_have_met_the_cache_are_not_called_measured_from_the_disk(
    tmp_path: Path, exact: Profile
) -> None:
    folder = planted.folder(tmp_path / "points", Plan(energy=False, leaving=False))
    points = pl.read_parquet(folder / POINTS_FILE).filter(FEW_BATCHES)
    disk = pl.col("quantity") == "load_disk"
    noted = pl.when(disk & (pl.col("bytes") > 2**22)).then(pl.lit(CACHED)).otherwise("note")
    points.with_columns(note=noted).write_parquet(folder / POINTS_FILE)
    profile = fit_profile(folder, tmp_path / "profile")
    found = profile.quantities["loading.disk.bytes_per_s"]
    assert found.grade == "derived"
    assert "2 may be of the system's cache: assumed to be of the disk" in found.source
    assert profile.quantities["loading.host.bytes_per_s"].grade == "measured"
    assert any("disk: 2 of 4 points may be of the" in note for note in profile.provenance.notes)
    assert exact.quantities["loading.disk.alpha_s"].grade == "measured"


@pytest.mark.parametrize(
    ("rates", "rate"), [({"": 1.0, "read": 2.0, "link": 9.0}, 2.0), ({"": 1.0}, 1.0), ({}, None)]
)
def test_the_floor_of_memory_is_the_faster_of_a_copy_and_a_read(
    rates: dict[str, float], rate: float | None
) -> None:
    launches = {"a": {"graph": 3e-6}}
    floors = {"copy_bytes_per_s": rates, "launch_s_per_layer": launches}
    assert device_floors(floors, "a", "graph") == (rate, 3e-6)
