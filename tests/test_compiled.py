"""What compiles on a machine for the first time says so; what is cached is loaded in silence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from helios_sim.compiled import compiled

@compiled
def doubled(value):
    return 2.0 * value

@compiled
def halved(value):
    return 0.5 * value

assert halved(doubled(1.5)) == 1.5
"""


def test_compiling_is_announced_once_and_loading_what_is_cached_is_not(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = {"PYTHONPATH": str(ROOT), "HELIOS_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, program], env=path, capture_output=True, text=True, check=True
        ).stderr
        for _ in range(2)
    ]
    assert said[0].count("compiled for this machine") == 1
    assert said[1] == ""
