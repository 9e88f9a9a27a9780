"""A run that does not fit in memory is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_sim import footprint
from helios_sim.cli import main
from helios_sim.loop.state import (
    ITL_BINS_PER_OCTAVE,
    ITL_OCTAVES,
    REPLICA,
    ROW,
    SAMPLE,
    TIMELINE_CAPACITY,
)

SCENARIO = Path(__file__).parents[1] / "scenarios" / "azure_chat.toml"


def test_the_estimate_grows_with_requests_decisions_replicas_and_their_batches() -> None:
    plain = footprint.estimated_bytes(1_000_000, None, 2, 1, 100)
    assert plain == 300_000_000 + 250_000_000 + 300_000 + 8_400
    assert footprint.estimated_bytes(1_000_000, 150, 2, 1, 100) - plain == 6667 * 3 * 2_500
    assert footprint.estimated_bytes(1_000_000, None, 2, 1001, 100) - plain == 308_400_000


def test_the_state_of_a_replica_is_no_larger_than_the_estimate() -> None:
    counts = 8 * ITL_OCTAVES * ITL_BINS_PER_OCTAVE
    state = TIMELINE_CAPACITY * SAMPLE.itemsize + counts + REPLICA.itemsize
    assert 0.8 * footprint.BYTES_PER_REPLICA < state < footprint.BYTES_PER_REPLICA
    assert ROW.itemsize + 4 + 8 == footprint.BYTES_PER_ROW


@pytest.mark.parametrize(
    "command", [("simulate", "--json", "--policy", "vanilla"), ("scenario", "check")]
)
def test_a_run_beyond_memory_is_refused_with_the_estimate_and_the_setting_that_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(footprint, "available_bytes", lambda: 200_000_000)
    with pytest.raises(SystemExit) as end:
        main([*command, str(SCENARIO)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "19,366 requests" in error
    assert "0.3 GiB" in error
    assert "max_requests" in error
    assert "fleet.num_replicas" in error
    assert "serving.max_batch" in error


def test_where_the_system_does_not_say_the_run_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "available_bytes", lambda: None)
    footprint.check_fits(10**12, None, 1, 1, 1)
