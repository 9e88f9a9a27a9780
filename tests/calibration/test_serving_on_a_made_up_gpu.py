"""Measured, fitted, served and simulated on a made-up GPU, a run comes out as it was predicted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import typer

from calibration.fitting.fit import FitSettings, fit_profile
from calibration.model.checkpoint import find_checkpoints
from calibration.serving.prepared import ServeSettings, prepare
from calibration.serving.serve import serve_once
from helios_sim.errors import InputError
from helios_sim.experiment import prepare as prepare_simulated
from helios_sim.experiment import run_policy
from helios_sim.fidelity import assess, read_sides
from helios_sim.runs.records import RunData, read_run, write_run
from helios_sim.scenario import load_scenario
from reports.made_up_gpu import readings
from reports.made_up_gpu.__main__ import app, begin_anew
from reports.made_up_gpu.backend import NAME, MadeUpBackend
from reports.made_up_gpu.device import HOST_LINK, IDLE_W, MadeUpGpu
from tests.calibration.serving import family, first_exit_threshold, model_of, write_profile

SCENARIO = """
name = "made up"
seed = 3

[workload]
num_requests = 60
arrivals = {{ kind = "poisson", rate_per_s = {rate} }}
prompt = {{ kind = "uniform", min_tokens = 4, max_tokens = 24 }}
output = {{ kind = "uniform", min_tokens = 4, max_tokens = 20 }}
domains = [{{ name = "code", share = 0.5 }}, {{ name = "prose", share = 0.5 }}]

[fleet]
profile = "made-up-gpu"
weights_start = "host"

[serving]
max_batch = 4
block_tokens = 8
expected_prompt_tokens = 14
expected_output_tokens = 12

[[policy]]
use = "vanilla"
model = "large"

[[policy]]
use = "ee-single"
label = "rebatch"
model = "large"
exit_mode = "rebatch"

[[policy]]
use = "helios"
evaluation_requests = 2
reassess_requests = 20
breach_window_tokens = 20
breach_limit = 8
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two checkpoints, the profile that was fitted to the device, and scenarios."""
    folder = tmp_path_factory.mktemp("made-up")
    models = [model_of("small", (2, 4), seed=1), model_of("large", (2, 4, 6), seed=2)]
    threshold = first_exit_threshold(models[0])
    family(folder / "family", threshold)
    # Exits of held-out text would take most of a minute, and no time depends on them.
    write_profile(folder / "with-exits", models, threshold)
    (folder / "points").mkdir()
    shutil.copy(folder / "with-exits" / "exits.parquet", folder / "points")
    gpus = readings.gpus_of([model.spec for model in models])
    readings.measure(find_checkpoints([folder / "family"]), gpus, folder / "points", 20.0)
    fit_profile(folder / "points", folder / "made-up-gpu", FitSettings())
    for name, rate in (("saturated", 5000.0), ("calm", 20.0)):
        (folder / f"{name}.toml").write_text(SCENARIO.format(rate=rate))
    return folder


def served(place: Path, scenario: str, policy: str, out: Path) -> tuple[RunData, dict[str, Any]]:
    """A run of a policy on the made-up device."""
    settings = ServeSettings((place / "family",), device="cpu", graphs=False)
    prepared = prepare(place / f"{scenario}.toml", settings)
    chosen = next(one for one in prepared.scenario.policy if one.name == policy)
    backend = MadeUpBackend(MadeUpGpu(prepared.room.profile.model("large").model))
    one = serve_once(prepared, chosen, out, backend.meter, backend=backend)
    return read_run(out), dict(one.summary)


def simulate(place: Path, scenario: str, policy: str, out: Path) -> None:
    """Leave a run of the same, simulated."""
    path = place / f"{scenario}.toml"
    loaded = load_scenario(path)
    chosen = next(one for one in loaded.policy if one.name == policy)
    found = run_policy(prepare_simulated(loaded, path.parent, str(path)), chosen)
    write_run(found.run, found.summary, out)


@pytest.mark.parametrize("policy", ["vanilla", "rebatch"])
def test_with_the_served_exits_a_fitted_profile_predicts_the_run(
    place, tmp_path, policy: str
) -> None:
    """The profile's own exits are planted ones, so those of the served text take their place."""
    run, _ = served(place, "saturated", policy, tmp_path / "real")
    assert run.origin == "made up"
    assert run.environment["device"] == NAME
    simulate(place, "saturated", policy, tmp_path / "simulated")
    sides = read_sides([tmp_path / "real"], tmp_path / "simulated", allow_simulated=True)
    swaps = {one["name"]: one for one in assess(sides, place).data()["attribution"]["swaps"]}
    for key in ("output_throughput", "mean_tpot_ms", "p50_e2el_ms", "total_gpu_energy"):
        assert abs(swaps["exits"]["errors"][key]) < 0.03, key
        # What the host did between two iterations is in the recorded times as in the fitted ones.
        if policy == "vanilla":
            assert abs(swaps["times"]["errors"][key]) < 0.03, key


def test_the_same_run_takes_the_same_time_to_the_last_bit(place, tmp_path) -> None:
    first, second = (
        served(place, "saturated", "helios", tmp_path / name)[0] for name in ("first", "second")
    )
    assert first.requests.equals(second.requests)
    assert first.decisions.equals(second.decisions)
    assert first.totals.energy_j == second.totals.energy_j


def test_loads_take_the_links_time_and_every_joule_is_accounted_for(place, tmp_path) -> None:
    run, summary = served(place, "calm", "helios", tmp_path / "run")
    totals = run.totals
    assert totals.busy_s + totals.idle_s + totals.load_s == pytest.approx(totals.end_s)
    moved = run.decisions.filter(pl.col("moved_bytes") > 0)
    loaded_s = moved["ready_s"] - moved["time_s"]
    alpha_s, bytes_per_s = HOST_LINK
    assert (loaded_s >= alpha_s + moved["moved_bytes"] / bytes_per_s - 1e-12).all()
    assert totals.load_s >= moved.height * alpha_s
    watts = summary["total_gpu_energy"] / totals.end_s
    assert IDLE_W < watts < 1.2 * IDLE_W


def test_graphs_are_captured_once_after_every_load(place, tmp_path) -> None:
    served(place, "saturated", "vanilla", tmp_path / "run")
    iterations = pl.read_parquet(tmp_path / "run" / "iterations.parquet")
    decodes = iterations.filter(pl.col("kind") == "decode")
    captured = decodes["captured_graphs"] + decodes["captured_exits"]
    # Embedding, three segments and the last exit's word; three rows run as four.
    assert captured.sum() == 5 * len({1, 2, 4})
    slow, quick = (
        decodes.filter((captured > 0) == is_first)["seconds"].median() for is_first in (True, False)
    )
    assert slow > 5.0 * quick


def test_what_the_planned_grid_leaves_is_read_back_as_it_was_taken(place) -> None:
    found = pl.read_parquet(place / "points" / "points.parquet")
    assert {"iteration", "exit_iteration", "split_iteration", "capture_run"} <= set(
        found["quantity"]
    )
    loads = found.filter(pl.col("quantity") == "load_host_pinned")
    rate = np.diff(loads["bytes"].to_numpy()) / np.diff(loads["seconds"].to_numpy())
    assert rate == pytest.approx(HOST_LINK[1])


def told(*arguments: str) -> InputError:
    """What the study's command line has against its arguments."""
    with pytest.raises(InputError) as refused:
        typer.main.get_command(app).main(list(arguments), standalone_mode=False)
    return refused.value


def test_a_study_begins_anew_and_removes_nothing_but_an_earlier_one(place, tmp_path) -> None:
    checkpoints = ["--checkpoints", str(place / "family"), "--out", str(tmp_path / "out")]
    assert "There is no case 'fast'" in told(*checkpoints, "--case", "fast").message
    kept = tmp_path / "mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert "holds something else" in told(*checkpoints, "--work", str(kept.parent)).message
    assert kept.read_text() == "mine"
    shutil.copytree(place / "points", tmp_path / "earlier" / "points")
    begin_anew(tmp_path / "earlier")
    assert not (tmp_path / "earlier").exists()
