"""A measured profile is held to its own readings; a published one has none."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from calibration.cli import main
from calibration.fitting import anchors
from calibration.fitting.anchors import _beside, beside_anchors
from calibration.fitting.check import (
    CheckRow,
    check_rows,
    check_text,
    compare,
    place_of,
    verdict,
)
from calibration.fitting.fit import fit_profile
from calibration.fitting.fit_times import Number, model_profile
from calibration.fitting.page import render
from calibration.fitting.points import gather
from calibration.measuring.readings import (
    CONFIGURATION,
    SCHEMA,
    Reading,
    busy_machine,
    usual_reference_s,
)
from helios_sim.cost import decode_joules, decode_seconds
from helios_sim.errors import InputError
from helios_sim.profile import ModelProfile, Profile
from helios_sim.profiles.files import load_profile
from helios_sim.profiles.published import ENERGY_ANCHORS
from tests.calibration import planted
from tests.calibration.planted import Plan


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of readings with one per cent of noise."""
    root = tmp_path_factory.mktemp("check")
    folder = planted.folder(root / "points", Plan(noise=0.01, trials=3))
    return fit_profile(folder, root / "profile")


def test_every_planted_quantity_is_predicted(profile: Profile) -> None:
    quantities = {row.quantity for row in check_rows(profile)}
    assert quantities >= {
        "decode_layers",
        "iteration",
        "prefill_layers",
        "prefill_iteration",
        "head",
        "check",
        "kv_fill",
        "load_disk",
        "load_host_pinned",
        "decode_energy",
        "prefill_energy",
        "iteration_energy",
        "prefill_iteration_energy",
        "memory_weights",
    }


def test_errors_are_of_the_held_out_points_where_there_are_some(profile: Profile) -> None:
    rows = {row.quantity: row for row in check_rows(profile)}
    decode = rows["decode_layers"]
    assert (decode.purpose, decode.n) == ("held-out", 18)
    assert decode.median < 0.02
    assert decode.within_bars
    assert rows["head"].purpose == "fit"


def test_the_worst_point_is_named_with_its_place(profile: Profile) -> None:
    compared = compare(profile)
    decode = compared.filter(
        (pl.col("quantity") == "decode_layers") & (pl.col("purpose") == "held-out")
    )
    row = next(row for row in check_rows(profile) if row.quantity == "decode_layers")
    assert abs(row.worst) == pytest.approx(decode["error"].abs().max())
    assert "rows" in row.where
    assert "tokens of context" in row.where


def test_noise_is_the_deviation_among_trials(profile: Profile) -> None:
    row = next(row for row in check_rows(profile) if row.quantity == "decode_layers")
    assert row.noise is not None
    assert 0.001 < row.noise < 0.02


def gathered(*readings: Reading) -> pl.DataFrame:
    """The points of these readings."""
    return gather(pl.DataFrame([asdict(one) for one in readings], schema=SCHEMA))


def test_the_95th_percentile_lies_between_the_two_largest_of_twenty_errors(
    profile: Profile,
) -> None:
    heads = [Reading("head", "planted", batch=rows, seconds=1.0) for rows in range(1, 21)]
    compared = gathered(*heads).with_columns(error=pl.int_range(20) / -100.0)
    (row,) = check_rows(profile, compared)
    assert row.median == pytest.approx(0.095)
    assert row.p95 == pytest.approx(0.1805)
    assert row.worst == -0.19
    assert row.where == "20 rows"


@pytest.mark.parametrize(
    ("median", "p95", "within"),
    [(0.01, 0.2, False), (0.05, 0.06, False), (0.03, 0.06, False), (0.01, 0.06, True)],
)
def test_bars_are_met_by_the_median_and_by_the_95th_percentile(
    median: float, p95: float, within: bool
) -> None:
    row = CheckRow("planted", "head", "", "held-out", 9, median, p95, p95, "", None, None)
    assert row.within_bars is within


def test_a_profile_that_is_off_misses_the_bars(profile: Profile, tmp_path: Path) -> None:
    folder = tmp_path / "off"
    folder.mkdir()
    for path in profile.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    points = pl.read_parquet(folder / "points.parquet")
    points.with_columns(seconds=pl.col("seconds") * 1.2).write_parquet(folder / "points.parquet")
    rows = check_rows(load_profile(folder))
    assert "miss the bars" in verdict(rows, cuda=True)
    assert "shared CPU" not in verdict(rows, cuda=True)
    assert "shared CPU" in verdict(rows, cuda=False)


def test_a_profile_that_fits_meets_the_bars(profile: Profile) -> None:
    assert "meet the bars" in check_text(profile)


def test_energy_stands_beside_published_figures_of_the_same_model(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "published" not in check_text(profile)
    assert beside_anchors(profile) == []
    monkeypatch.setitem(anchors.PUBLIC_SHAPES, anchors.ANCHORED, planted.SHAPE)
    found = beside_anchors(profile)
    assert [one.anchor.batch for one in found] == [8, 32, 128, 256, 512]
    # Rows of 512 tokens were measured up to a batch of 128.
    assert [one.beyond for one in found] == [False, False, False, True, True]
    c = planted.array(planted.GPU_LIKE)
    seconds, _ = decode_seconds(c, 32, 32 * 512, 32 * 512, 12, 0, 1, 0, 32, 32, 1.0)
    joules = decode_joules(c, 32, 32 * 512, 32 * 512, 12, 0, 1, 0, 32, seconds)
    assert found[1].joules == pytest.approx(joules / 32, rel=0.02)
    assert found[1].tokens_per_s == pytest.approx(32 / seconds, rel=0.02)
    said = f"({found[1].joules / 0.165:.2f} times the published 0.165 J)"
    assert said in check_text(profile)
    assert "Published rate" in render(profile)


def model_with(coefficients: dict[str, float], **named: Any) -> ModelProfile:
    """The planted model with these coefficients and no others."""
    numbers = {name: Number(value, "assumed", "") for name, value in coefficients.items()}
    given: dict[str, Any] = {"buckets": (), "batch_residual": (), "hull": None} | named
    return model_profile(planted.model(), numbers, **given)


def test_beside_an_anchor_every_padded_row_is_read_to_the_longest_ones_end() -> None:
    """Three rows in a graph of four, 12 layers, 512 tokens of context."""
    model = model_with({"decode.memory_s_per_padded_token": 1e-6}, buckets=(4,))
    found = _beside("planted", model, replace(ENERGY_ANCHORS[0], batch=3))
    assert 3 / found.tokens_per_s == pytest.approx(12 * 4 * 512 * 1e-6)


def test_without_joules_nothing_stands_beside_published_ones() -> None:
    h100 = load_profile("layerskip-h100-80gb")
    assert {one.model for one in beside_anchors(h100)} == {"llama3-8b"}
    assert beside_anchors(load_profile("small-family-cpu")) == []


def test_a_published_profile_says_that_it_holds_no_readings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", "opt-a100-40gb"])
    assert not end.value.code
    assert "No readings: opt-a100-40gb is published" in capsys.readouterr().out


def test_readings_that_are_corrupt_are_refused_in_a_sentence(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corrupt"
    folder.mkdir()
    for path in profile.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "points.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="no readable Parquet file"):
        check_text(load_profile(folder))
    with pytest.raises(SystemExit) as end:
        main(["check", str(folder)])
    assert end.value.code == 2
    assert "Parquet" in capsys.readouterr().err


def copied(profile: Profile, folder: Path) -> Path:
    """A profile's folder, to be spoilt."""
    folder.mkdir()
    for path in profile.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("measurement",), [1]),
        (("measurement", "models"), "none"),
        (("measurement", "models", "planted"), None),
        (("measurement", "loading"), [1, 2]),
    ],
)
def test_what_no_fit_has_written_is_named_by_the_check(
    keys: tuple[str, ...], value: object, profile: Profile, tmp_path: Path
) -> None:
    folder = copied(profile, tmp_path / "edited")
    document = json.loads((folder / "profile.json").read_text())
    node = document
    for key in keys[:-1]:
        node = node[key]
    assert keys[-1] in node
    node[keys[-1]] = value
    (folder / "profile.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="must hold an object") as caught:
        check_text(load_profile(folder))
    assert caught.value.where == f"{folder / 'profile.json'}, {'.'.join(keys)}"


def test_exit_traces_are_read_by_the_check(
    profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(profile, tmp_path / "cut")
    for said in ("positions of each of", "cannot be read as parquet"):
        with pytest.raises(SystemExit):
            main(["check", str(folder)])
        told = capsys.readouterr()
        assert said in told.out + told.err
        exits = (folder / "exits.parquet").read_bytes()
        (folder / "exits.parquet").write_bytes(exits[:-100])


def test_an_absent_meter_is_said_by_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted.folder(
        tmp_path / "points", Plan(energy=False), meter={"source": "none", "explanation": "no meter"}
    )
    fit_profile(folder, tmp_path / "profile")
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "profile")])
    assert "Energy: unavailable (no meter)" in capsys.readouterr().out


def test_disturbed_trials_give_way_to_quiet_ones_of_the_same_point() -> None:
    frame = planted.frame(Plan(energy=False, trials=2))
    spoilt = frame.with_columns(
        seconds=pl.when(pl.col("trial") == 1)
        .then(pl.col("seconds") * 3)
        .otherwise(pl.col("seconds")),
        idle_share=pl.when(pl.col("trial") == 1).then(0.6).otherwise(0.0),
    )
    quiet = planted.points(Plan(energy=False))
    keys = ["quantity", "mode", "layers", "batch", "context_tokens", "prompt_tokens", "bytes"]
    both = quiet.join(gather(spoilt), on=keys, suffix="_found", nulls_equal=True)
    assert both.height == quiet.height
    assert both["seconds"].to_list() == both["seconds_found"].to_list()
    only_disturbed = spoilt.filter(pl.col("trial") == 1)
    assert gather(only_disturbed).height == quiet.filter(pl.col("seconds").is_not_null()).height


def test_trials_are_taken_to_the_pace_that_is_usual_around_them() -> None:
    """Work that slows with the arithmetic beside it gives the times of a machine that never did."""
    frame = planted.frame(Plan(energy=False, trials=3))
    moved = ("copy_bandwidth", "load_disk", "load_host_pinned")
    timed = ((pl.col("seconds") > 0.0) & ~pl.col("quantity").is_in(moved)).fill_null(False)
    factor = pl.lit(pl.Series([0.8, 1.0, 1.5])).gather(pl.col("trial") % 3)
    slowed = frame.with_columns(
        seconds=pl.when(timed).then(pl.col("seconds") * factor).otherwise("seconds"),
        # Of bytes that are moved arithmetic tells nothing, whatever it took around them.
        reference_s=pl.when(timed).then(2e-4 * factor).otherwise(9e-4),
        idle_share=pl.when((factor > 1.0) | ~timed).then(0.3).otherwise(0.0),
    )
    usual_s = usual_reference_s(slowed)
    assert usual_s == pytest.approx(1.8e-4)
    both = gather(frame).join(
        gather(slowed), on=[*CONFIGURATION, "bytes"], suffix="_found", nulls_equal=True
    )
    assert both.height == gather(frame).height
    scale = pl.when(timed).then(usual_s / 2e-4).otherwise(1.0)
    expected = both.select(pl.col("seconds") * scale)["seconds"]
    assert both["seconds_found"].to_list() == pytest.approx(expected.to_list())
    assert both.filter(timed)["noise_found"].drop_nulls().max() < 1e-9


def test_one_trial_that_is_taken_too_far_does_not_drive_out_the_others() -> None:
    """Of three alike one was beside slow arithmetic: at a quarter of the time it stands alone."""
    trials = [
        Reading("head", "tiny", batch=1, trial=trial, seconds=1.0, idle_share=share, reference_s=s)
        for trial, (share, s) in enumerate([(0.2, 2e-4), (0.2, 2e-4), (0.2, 8e-4)])
    ]
    quiet = [
        Reading("check", "tiny", batch=batch, seconds=1.0, idle_share=0.0, reference_s=2e-4)
        for batch in range(1, 13)
    ]
    frame = pl.DataFrame([asdict(one) for one in [*trials, *quiet]], schema=SCHEMA)
    (found,) = gather(frame).filter(quantity="head").iter_rows(named=True)
    assert (found["seconds"], found["num_trials"]) == (pytest.approx(1.0), 3)


def test_trials_that_took_far_longer_than_the_quickest_are_left_out() -> None:
    frame = planted.frame(Plan(energy=False, trials=3))
    slowed = frame.with_columns(
        seconds=pl.when(pl.col("trial") > 0).then(pl.col("seconds") * 1.9).otherwise("seconds")
    )
    moved = ("copy_bandwidth", "load_disk", "load_host_pinned")
    timed = (pl.col("seconds") > 0.0) & ~pl.col("quantity").is_in(moved)
    quiet, found = gather(frame).filter(timed), gather(slowed).filter(timed)
    assert found["seconds"].to_list() == quiet["seconds"].to_list()
    assert found.filter(pl.col("quantity") == "decode_layers")["num_trials"].max() == 1
    loads = gather(slowed).filter(pl.col("quantity") == "load_disk")
    assert loads["num_trials"].min() == 3


def test_ragged_points_are_predicted_with_their_longest_row(tmp_path: Path) -> None:
    coefficients = dict(planted.GPU_LIKE) | {
        "decode.launch_s": 0.0,
        "decode.memory_s_per_context_token": 0.0,
        "decode.memory_s_per_padded_token": 1.6e-9,
        "decode.fixed_s_per_row": 3.0e-6,
    }
    plan = Plan(coefficients, ragged=True, energy=False, prompts=(1, 4))
    profile = fit_profile(planted.folder(tmp_path / "points", plan), tmp_path / "profile")
    compared = compare(profile)
    ragged = compared.filter(pl.col("longest_context_tokens") > pl.col("context_tokens"))
    assert set(ragged["quantity"]) == {"decode_layers", "iteration"}
    assert ragged["error"].abs().max() < 1e-3  # type: ignore[operator]
    prompts = compared.filter((pl.col("quantity") == "prefill_iteration") & (pl.col("batch") == 4))
    assert prompts["error"].abs().max() < 1e-3  # type: ignore[operator]
    longest = int(ragged["longest_context_tokens"].max())  # type: ignore[arg-type]
    assert any(f"(longest {longest})" in place_of(row) for row in ragged.iter_rows(named=True))


def test_a_profile_of_a_busy_machine_says_so(profile: Profile, tmp_path: Path) -> None:
    lost = [0.4] * 12 + [0.0] * 8
    said = "disturbed 12 of 20 timed trials, half of them by more than 40%"
    assert said in str(busy_machine(lost))
    assert busy_machine([0.4] * 10 + [0.0] * 10) is None
    assert busy_machine([]) is None
    folder = planted.folder(tmp_path / "points", Plan(energy=False))
    frame = planted.frame(Plan(energy=False)).with_columns(idle_share=pl.lit(0.3))
    frame.write_parquet(folder / "points.parquet")
    busy = fit_profile(folder, tmp_path / "profile")
    assert "measure again on a quieter one." in busy.provenance.notes[-1]
    assert check_text(busy).splitlines()[-1].startswith("Others disturbed ")
    assert "Others disturbed" not in check_text(profile)


def test_a_profile_tells_how_many_readings_were_taken_at_clocks_held_back(
    profile: Profile, tmp_path: Path
) -> None:
    """Two heads of all readings; at 1,700 and 1,900 of 2,000 MHz."""
    plan = Plan(energy=False)
    folder = planted.folder(tmp_path / "points", plan)
    heads = pl.col("quantity") == "head"
    trial = heads.cast(pl.Int64).cum_sum()
    is_slow = heads & (trial == 1)
    is_hot = heads & (trial == 2)
    frame = planted.frame(plan).with_columns(
        sm_clock_mhz=pl.when(is_slow).then(1700.0).when(is_hot).then(1900.0).otherwise(2000.0),
        throttle_reasons=pl.when(is_slow)
        .then(pl.lit("software-power-cap+other-0x400"))
        .when(is_hot)
        .then(pl.lit("software-thermal"))
        .otherwise(pl.lit("application-clocks")),
    )
    frame.write_parquet(folder / "points.parquet")
    timed = frame["seconds"].drop_nulls().len()
    held_back = fit_profile(folder, tmp_path / "profile")
    said = (
        f"2 of {timed} timed readings ended at clocks that the board held back (software-power-cap,"
        " software-thermal, at the lowest 1,700 of 2,000 MHz): large loads meet that in serving "
        "too, others only beside large ones."
    )
    assert held_back.provenance.notes[-1] == said
    assert check_text(held_back).splitlines()[-1] == said
    assert "held back" not in check_text(profile)


def of_trials(quantity: str, **values: Any) -> list[Reading]:
    """Three trials, each twice as long as the one before."""
    return [
        Reading(quantity, "planted", "graph", layers=3, batch=2, trial=trial, seconds=s, **values)
        for trial, s in enumerate((1.0, 2.0, 4.0))
    ]


def test_long_trials_of_captures_and_windows_are_no_disturbed_ones() -> None:
    """Each graph is captured once, and a window lasts as long as it is held open."""
    taken = [
        *of_trials("decode_layers"),
        *of_trials("capture_run"),
        *of_trials("decode_energy", joules=5.0, watts=5.0),
    ]
    points = gathered(*taken)
    assert dict(points.select("quantity", "num_trials").iter_rows()) == {
        "decode_layers": 1,
        "capture_run": 3,
        "decode_energy": 3,
    }


def test_a_point_is_the_median_of_its_trials_and_their_deviation_its_noise() -> None:
    trial = Reading("decode_layers", "planted", layers=3, batch=2)
    points = gathered(*(replace(trial, trial=n, seconds=1.0 + n / 10) for n in range(3)))
    assert points["seconds"].to_list() == [1.1]
    assert points["noise"].to_list() == [pytest.approx(0.1 / 1.1)]


def test_a_window_in_which_the_device_waited_is_no_disturbed_one() -> None:
    window = Reading("decode_energy", "planted", layers=3, batch=2, seconds=1.0, joules=5.0)
    waited = replace(window, trial=1, idle_share=0.3)
    assert gathered(replace(window, idle_share=0.0), waited)["num_trials"].to_list() == [2]


def test_of_several_looks_at_memory_the_most_bytes_count() -> None:
    looks = [
        Reading("memory_kv", "planted", trial=n, bytes=10 * (n + 1), predicted_bytes=9 + n)
        for n in range(2)
    ]
    points = gathered(*looks)
    assert points.select("bytes", "predicted_bytes").row(0) == (20, 10)


@pytest.mark.parametrize("order", [1, -1])
def test_a_load_that_was_measured_for_both_purposes_was_fitted(order: int) -> None:
    fit = Reading("decode_layers", "planted", layers=3, batch=2, seconds=1.0)
    both = [fit, replace(fit, purpose="held-out")][::order]
    alone = replace(fit, batch=3, purpose="held-out")
    points = gathered(*both, alone)
    assert points["purpose"].to_list() == ["fit", "held-out"]
