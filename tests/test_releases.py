"""The releases that the program says it runs with are those that are tried."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_least_releases_allowed_are_the_ones_that_are_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    tried = [line for line in lines if not line.startswith("#")]
    assert [one.replace(">=", "==") for one in project["dependencies"]] == tried
