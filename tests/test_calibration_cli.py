"""The calibration command: what a machine offers, and what a profile holds."""

from __future__ import annotations

import importlib

import pytest

from calibration import environment
from calibration.cli import main
from calibration.environment import PACKAGES, inspect_environment
from helios_sim.errors import InputError
from helios_sim.search.executors import open_workers


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


def test_what_is_missing_is_installed_from_the_clone_as_the_docs_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "PACKAGES", (*PACKAGES, "no-such-package"))
    assert run("environment") == 0
    assert "pip install -e '.[calibration]' in the clone" in capsys.readouterr().out
    real = importlib.import_module

    def without_dask(name: str) -> object:
        if name == "distributed":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_dask)
    with (
        pytest.raises(InputError, match=r"pip install -e '\.\[cluster\]' in the clone"),
        open_workers(scheduler="tcp://here:1"),
    ):
        pass


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
