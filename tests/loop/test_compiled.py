"""Compiling says so, what is cached loads in silence, and a changed source is compiled anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helios_sim.loop import compiled

ROOT = Path(__file__).parents[2]

PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from helios_sim.loop.compiled import compiled

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


def test_a_temporary_cache_is_in_no_folder_that_another_user_may_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HELIOS_CACHE_DIR", str(Path(__file__)))
    own = tmp_path / f"helios-sim-{os.getuid()}"
    for _ in range(2):
        assert compiled._cache_dir().parent == own
        assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    other = compiled._cache_dir().parent
    assert other != own
    assert other.stat().st_mode & 0o777 == 0o700


def test_every_module_with_compiled_functions_takes_part_in_the_name_of_the_cache() -> None:
    package = ROOT / "helios_sim"
    compiling = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^@compil|^\w+ = compiled_rule\(", path.read_text(), re.MULTILINE)
    }
    assert "loop/batch.py" in compiling
    assert compiling | {"loop/compiled.py", "loop/state.py", "policy/rules.py"} == {
        *compiled._SOURCES
    }
