"""A run that does not fit in memory is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_sim import footprint
from helios_sim.cli import main

SCENARIO = Path(__file__).parents[1] / "scenarios" / "azure_chat.toml"


def test_the_estimate_grows_with_requests_and_with_decisions() -> None:
    plain = footprint.estimated_bytes(1_000_000, None, 2)
    assert plain == 300_000_000 + 250_000_000
    assert footprint.estimated_bytes(1_000_000, 150, 2) - plain == 6667 * 3 * 2_500


def test_a_run_beyond_memory_is_refused_with_the_estimate_and_the_setting_that_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(footprint, "available_bytes", lambda: 200_000_000)
    with pytest.raises(SystemExit) as end:
        main(["simulate", str(SCENARIO), "--json", "--policy", "vanilla"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "19,366 requests" in error
    assert "0.3 GiB" in error
    assert "max_requests" in error


def test_where_the_system_does_not_say_the_run_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "available_bytes", lambda: None)
    footprint.check_fits(10**12, None, 1)
