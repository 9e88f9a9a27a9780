"""A run that leaves the range its profile was measured in says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from helios_sim.cli import main
from helios_sim.experiment import prepare, run_policy
from helios_sim.profiles.files import load_profile, save_profile
from helios_sim.report.words import extrapolated, remarks
from helios_sim.scenario import load_scenario
from helios_sim.search.commands import Running, plan, tune, whatif

SCENARIO = """
schema_version = 1
name = "hull"
seed = 1
[workload]
num_requests = 60
arrivals = { kind = "poisson", rate_per_s = 50.0 }
prompt = { kind = "constant", tokens = 100 }
output = { kind = "constant", tokens = 20 }
[fleet]
profile = "mine"
candidates = ["opt-1.3b"]
[slo]
text = "ttft:1000"
[[policy]]
use = "vanilla"
model = "opt-1.3b"
[plan]
num_requests = 60
replications = 2
max_replications = 2
precision = 0.5
[search]
num_trials = 2
batch = 2
num_requests = 60
replications = 1
held_out = 2
held_out_rates = [1.0]
ranges = { "serving.max_batch" = [8, 64] }
"""


def written(tmp_path: Path, hull: dict[str, int] | None) -> Path:
    """A scenario on a profile with this hull."""
    document = copy.deepcopy(dict(load_profile("opt-a100-40gb").document))
    document["models"]["opt-1.3b"]["hull"] = hull
    save_profile(document, tmp_path / "mine", overwrite=True)
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    return path


def summary_with(tmp_path: Path, hull: dict[str, int] | None) -> dict[str, Any]:
    """The summary of a small run on a profile with this hull."""
    scenario = load_scenario(written(tmp_path, hull))
    return run_policy(prepare(scenario, tmp_path), scenario.policy[0]).summary


def test_a_run_within_the_measured_range_says_nothing(tmp_path: Path) -> None:
    hull = {"max_batch": 512, "max_context_tokens": 120}
    assert "beyond_measured" not in summary_with(tmp_path, hull)
    assert "beyond_measured" not in summary_with(tmp_path, None)


def test_a_run_beyond_it_names_the_model_and_the_range(tmp_path: Path) -> None:
    found = summary_with(tmp_path, {"max_batch": 2, "max_context_tokens": 64})
    (clause,) = found["beyond_measured"]
    assert clause.startswith("opt-1.3b: batches up to ")
    assert "where 2 was the largest measured" in clause
    assert "contexts up to 120 where 64 was the largest measured" in clause
    said = " ".join(remarks([found | {"label": "vanilla"}]))
    assert "Extrapolated beyond what was measured: vanilla (opt-1.3b: batches" in said


SMALL = {"max_batch": 2, "max_context_tokens": 64}
SAID = "Extrapolated beyond what was measured: "


@pytest.mark.parametrize("hull", [None, SMALL])
def test_the_terminal_says_so_in_one_line_below_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hull: dict[str, int] | None
) -> None:
    path, out = written(tmp_path, hull), tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["simulate", str(path), "--out", str(out)])
    simulated = capsys.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        main(["compare", str(out / "vanilla"), str(out / "vanilla")])
    compared = capsys.readouterr().out.splitlines()
    for lines, place in ((simulated, -2), (compared, -1)):
        told = [line for line in lines if line.startswith(SAID)]
        assert told == ([] if hull is None else [lines[place]])


def test_searches_say_so_in_the_terminal_and_on_their_pages(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    for told, name in (
        (plan(path, [], Running(tmp_path / "plan", num_processes=1)), "vanilla ("),
        (
            tune(path, [], Running(tmp_path / "tune", num_processes=1)),
            "the scenario as it stands (",
        ),
        (
            whatif(
                path,
                [],
                ["serving.max_batch=8,64"],
                [],
                1,
                Running(tmp_path / "whatif", num_processes=1),
            ),
            "vanilla: max_batch 8 (",
        ),
    ):
        (sentence,) = [one for one in told.sentences if one.startswith(SAID)]
        assert sentence.startswith(f"{SAID}{name}opt-1.3b: batches up to ")
        assert sentence in (told.folder / "report.html").read_text(encoding="utf-8")


def test_of_many_only_the_first_are_named() -> None:
    many = [(f"run {place}", ["m: batches up to 3"]) for place in range(9)]
    (said,) = extrapolated([("none", []), *many])
    assert said.endswith("run 2 (m: batches up to 3) and 6 more.")
    assert extrapolated([("none", [])]) == []
