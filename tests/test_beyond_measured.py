"""A run that leaves the range its profile was measured in says so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from helios_sim.experiment import prepare, run_policy
from helios_sim.profile import load_profile, save_profile
from helios_sim.report.words import remarks
from helios_sim.scenario import load_scenario

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
[[policy]]
use = "vanilla"
model = "opt-1.3b"
"""


def summary_with(tmp_path: Path, hull: dict[str, int] | None) -> dict[str, Any]:
    """The summary of a small run on a profile with this hull."""
    document = copy.deepcopy(dict(load_profile("opt-a100-40gb").document))
    document["models"]["opt-1.3b"]["hull"] = hull
    save_profile(document, tmp_path / "mine", overwrite=True)
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    scenario = load_scenario(path)
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
