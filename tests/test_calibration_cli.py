"""The calibration command: what a machine offers, and what a profile holds."""

from __future__ import annotations

import pytest

from calibration.cli import main
from calibration.environment import PACKAGES, inspect_environment


def run(*arguments: str) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def test_environment_names_every_package_and_says_why_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("environment") == 0
    said = capsys.readouterr().out
    assert all(package in said for package in PACKAGES)
    found = inspect_environment()
    assert bool(found.gpus) == (found.no_gpu_reason is None)
    assert ("No GPU" in said) == (not found.gpus)


def test_check_says_how_far_each_number_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "opt-a100-40gb") == 0
    said = capsys.readouterr().out
    assert "0 measured" in said
    assert "opt-6.7b" in said


def test_an_unknown_profile_is_refused_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("check", "opt-a100-40g") == 2
    assert "opt-a100-40gb" in capsys.readouterr().err
