"""Write the golden summaries anew: `python -m tests.golden.regenerate`.

Do it when a figure is meant to change, look at what changed, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helios_sim.experiment import Experiment, Result, prepare, run_policy
from helios_sim.scenario import load_scenario

FOLDER = Path(__file__).resolve().parent
NAMES = ("full-depth", "waiting", "drifting")


def experiment_of(name: str) -> Experiment:
    """A golden scenario with all it names."""
    path = FOLDER / f"{name}.toml"
    return prepare(load_scenario(path), FOLDER, str(path))


def play(name: str) -> Result:
    """A golden scenario's run."""
    experiment = experiment_of(name)
    return run_policy(experiment, experiment.scenario.policy[0])


def golden(name: str) -> dict[str, Any]:
    """The summary as it was when last written."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def text_of(summary: dict[str, Any]) -> str:
    """A summary as its file holds it."""
    return json.dumps(summary, indent=2, sort_keys=True, allow_nan=False) + "\n"


def main() -> None:
    """Write all summaries."""
    for name in NAMES:
        path = FOLDER / f"{name}.json"
        path.write_text(text_of(play(name).summary), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
