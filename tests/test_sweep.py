"""Sweeps over processes: in order, the same for any number of them, errors as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_sim.errors import InputError
from helios_sim.scenario import Scenario, parse_scenario
from helios_sim.sweep import run_sweep


def point(folder: Path, rate_per_s: float, profile: str = "opt-a100-40gb") -> Scenario:
    """A short scenario at one arrival rate."""
    data = {
        "name": f"rate {rate_per_s:g}",
        "workload": {
            "num_requests": 50,
            "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
            "prompt": {"kind": "constant", "tokens": 50},
            "output": {"kind": "constant", "tokens": 20},
        },
        "fleet": {"profile": profile},
        "policy": [{"use": "helios"}, {"use": "vanilla"}],
    }
    return parse_scenario(data, "sweep", folder)


def test_any_number_of_processes_gives_the_same_summaries_in_order(tmp_path: Path) -> None:
    points = [point(tmp_path, rate) for rate in (1.0, 4.0, 16.0)]
    done: list[tuple[int, int]] = []
    alone = run_sweep(points, tmp_path, 1, lambda number, of: done.append((number, of)))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert run_sweep(points, tmp_path, 2) == alone
    assert [[summary["label"] for summary in row] for row in alone] == [["helios", "vanilla"]] * 3
    spans = [row[0]["duration"] for row in alone]
    assert spans == sorted(spans, reverse=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_point_that_cannot_run_ends_the_sweep_with_its_error(
    tmp_path: Path, processes: int
) -> None:
    points = [point(tmp_path, 1.0), point(tmp_path, 2.0, "opt-a100-40g")]
    with pytest.raises(InputError, match="opt-a100-40gb") as error:
        run_sweep(points, tmp_path, processes)
    assert str(error.value.where).startswith("rate 2, fleet.profile")
