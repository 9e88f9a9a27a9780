"""A recorded study is simulated anew with another profile, and nothing else of it changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from reports.fidelity.resimulate import read_results, resimulated, summary

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "reports" / "fidelity" / "small-family-cpu" / "results.json"
PROFILE = ROOT / "helios_sim" / "profiles" / "small-family-cpu"


def results(*cases: str) -> dict[str, Any]:
    found = read_results(STUDY)
    return found | {"cases": [case for case in found["cases"] if case["name"] in cases]}


def test_a_slower_device_is_simulated_slower_beside_the_same_real_runs(tmp_path: Path) -> None:
    name = "vanilla-saturating-steady-stable"
    slow = tmp_path / "slow"
    shutil.copytree(PROFILE, slow)
    document = json.loads((slow / "profile.json").read_text())
    for model in document["models"].values():
        for entry in model["coefficients"].values():
            if entry["unit"].startswith("s") and entry["value"]:
                entry["value"] *= 2.0
    (slow / "profile.json").write_text(json.dumps(document))
    usual, slowed = (
        {one.now.key: one for one in resimulated(results(name), where)} for where in (PROFILE, slow)
    )
    throughput, tpot = "output_throughput", "mean_tpot_ms"
    assert slowed[throughput].now.simulated == pytest.approx(
        usual[throughput].now.simulated / 2, rel=0.02
    )
    assert slowed[tpot].now.simulated == pytest.approx(2 * usual[tpot].now.simulated, rel=0.02)
    for key in (throughput, tpot):
        assert slowed[key].now.real == slowed[key].before.real == usual[key].now.real
        assert slowed[key].before == usual[key].before


def test_the_summary_has_a_row_for_each_figure_with_errors_then_and_now() -> None:
    found = resimulated(results("vanilla-light-steady-drifting"), PROFILE)
    rows = [[cell.plain for cell in row] for row in summary(found)]
    assert [row[0] for row in rows] == [
        *("Throughput", "TPOT, mean", "E2E, p50", "TTFT, p90", "Batch size")
    ]
    assert all(row[-1] in ("0 of 1", "1 of 1") for row in rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "no results of a study"),
        ("{}", "no results of a study"),
        ('{"cases": [{"name": "gone"}]}', "no case 'gone'"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(path)
    with pytest.raises(InputError, match="no results of a study"):
        read_results(tmp_path / "nothing.json")
