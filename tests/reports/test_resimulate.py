"""A recorded study is simulated anew with another profile, and nothing else of it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from reports.fidelity.page import render
from reports.fidelity.resimulate import changes, simulated_anew, summary
from reports.fidelity.results import read_results, results_of
from tests.report.test_report import text_of

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "reports" / "fidelity" / "small-family-cpu" / "results.json"
PROFILE = ROOT / "helios_sim" / "profiles" / "small-family-cpu"
SATURATED, LIGHT = "vanilla-saturating-steady-stable", "vanilla-light-steady-drifting"


def results(*names: str) -> dict[str, Any]:
    """The recorded study with some of its cases only."""
    found = read_results(STUDY)
    return results_of(found, [case for case in found["cases"] if case["name"] in names])


def figures_of(study: dict[str, Any], name: str) -> dict[str, Any]:
    case = next(case for case in study["cases"] if case["name"] == name)
    return {row["key"]: row for row in case["figures"]}


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """The profile of a device that takes twice as long for everything."""
    folder = tmp_path / "slow"
    shutil.copytree(PROFILE, folder)
    document = json.loads((folder / "profile.json").read_text())
    for model in document["models"].values():
        for entry in model["coefficients"].values():
            if entry["unit"].startswith("s") and entry["value"]:
                entry["value"] *= 2.0
    (folder / "profile.json").write_text(json.dumps(document))
    return folder


def test_the_recorded_results_are_what_its_cases_amount_to() -> None:
    found = read_results(STUDY)
    assert results_of(found, found["cases"]) == found


def test_the_recorded_study_is_what_this_program_simulates() -> None:
    """Its page would speak of another model otherwise."""
    study = results(SATURATED, LIGHT, "static-depth-70-steady-drifting")
    assert changes(study, simulated_anew(study, PROFILE)) == []


def test_a_case_whose_policy_decides_otherwise_since_stays_as_it_was(slow: Path) -> None:
    """The page says which; the others are simulated anew."""
    study = results(SATURATED, LIGHT)
    found = simulated_anew(study, slow, keep=[SATURATED])
    assert figures_of(found, SATURATED) == figures_of(study, SATURATED)
    assert figures_of(found, LIGHT) != figures_of(study, LIGHT)
    assert f"{SATURATED} stays as simulated with the policy that was served" in text_of(
        render(found)
    )


def test_weights_that_a_study_shows_in_gib_are_simulated_anew_in_gib() -> None:
    """Studies show them in MiB where models are small; one recorded in GiB keeps to GiB."""
    in_mib = results(SATURATED)
    (row,) = (one for one in in_mib["cases"][0]["figures"] if one["key"] == "weight_bytes_loaded")
    assert row["unit"] == "MiB"
    in_gib = results(SATURATED)
    (other,) = (one for one in in_gib["cases"][0]["figures"] if one["key"] == "weight_bytes_loaded")
    other |= {"unit": "GiB", "simulated": row["simulated"] / 1024.0}
    for study, value in ((in_mib, row["simulated"]), (in_gib, other["simulated"])):
        found = figures_of(simulated_anew(study, PROFILE), SATURATED)["weight_bytes_loaded"]
        assert found["simulated"] == pytest.approx(value, rel=1e-9)


def test_a_slower_device_is_simulated_slower_beside_the_same_real_runs(slow: Path) -> None:
    study = results(SATURATED, LIGHT)
    usual, slowed = simulated_anew(study, PROFILE), simulated_anew(study, slow, "the command")
    before, after = figures_of(usual, SATURATED), figures_of(slowed, SATURATED)
    for key, factor in (("output_throughput", 0.5), ("mean_tpot_ms", 2.0)):
        assert after[key]["simulated"] == pytest.approx(factor * before[key]["simulated"], rel=0.02)
        assert after[key]["real"] == figures_of(study, SATURATED)[key]["real"]
    by_key = {one["key"]: one for one in slowed["targets"]}
    assert by_key["output_throughput"]["worst_error"] == pytest.approx(
        abs(after["output_throughput"]["error"])
    )


def test_what_the_errors_of_a_changed_case_come_from_is_not_told(slow: Path) -> None:
    """Neither by the results nor by the page, which says that the simulation is newer."""
    study = results(SATURATED)
    slowed = simulated_anew(study, slow, "the command")
    assert slowed["simulated_anew"]["changed"] == [SATURATED]
    (case,) = slowed["cases"]
    assert case["attribution"] is None
    beyond = [one for target in slowed["targets"] for one in target.get("beyond", ())]
    assert {one["cause"] for one in beyond} == {"not told"}
    text = text_of(render(slowed))
    assert f"{SATURATED} changed, and what their errors come from was not told anew" in text
    assert "the command" in text
    assert "Simulated anew" not in text_of(render(study | {"simulated_anew": None}))
    again = simulated_anew(slowed, slow)
    assert again["simulated_anew"]["changed"] == [SATURATED]
    assert again["cases"] == slowed["cases"]


def test_the_summary_has_a_row_for_each_figure_with_errors_then_and_now(slow: Path) -> None:
    study = results(LIGHT)
    slowed = simulated_anew(study, slow)
    rows = [[cell.plain for cell in row] for row in summary(study, slowed)]
    assert [row[0] for row in rows] == [
        "Throughput",
        "TPOT, mean",
        "E2E, p50",
        "TTFT, p90",
        "Batch size",
    ]
    assert all(row[-1] in ("0 of 1", "1 of 1") for row in rows)
    changed = [[cell.plain for cell in row] for row in changes(study, slowed)]
    assert {row[0] for row in changed} == {LIGHT}
    assert "TPOT, mean" in {row[1] for row in changed}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "no results of a study"),
        ("{}", "no results of a study"),
        ('{"schema_version": 2, "cases": []}', "schema version 2; this program reads 3"),
        ('{"schema_version": 3, "cases": [{"name": "gone"}]}', "no case 'gone'"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(path)
    with pytest.raises(InputError, match="no results of a study"):
        read_results(tmp_path / "nothing.json")
