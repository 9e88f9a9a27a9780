"""A cell of a grid, answered by pencil figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_sim.scenario import load_scenario
from helios_sim.search.studies import Outcome
from helios_sim.search.whatif import Cell, whatif_studies
from tests.search.test_commands import write


@pytest.mark.parametrize(
    ("saturations", "told"),
    [
        (["stable", "stable", "stable"], "stable"),
        (["stable", "backlogged", "stable"], "backlogged"),
        (["backlogged", "overloaded", "stable"], "overloaded"),
    ],
)
def test_a_cell_is_as_saturated_as_the_worst_of_its_seeds(
    tmp_path: Path, saturations: list[str], told: str
) -> None:
    """Each replication has a seed of its own, and the figures are their means."""
    base = load_scenario(write(tmp_path))
    (study,) = whatif_studies(base, tmp_path, "x.toml", base.policy, {}, 3)
    points = next(study.steps)
    assert [point.scenario.seed for point in points] == [base.seed, base.seed + 1, base.seed + 2]
    figures: list[Outcome] = [
        {"summary": {"saturation": one, "mean_ttft_ms": 10.0 * place}}
        for place, one in enumerate(saturations)
    ]
    with pytest.raises(StopIteration) as end:
        study.steps.send(figures)
    cell: Cell = end.value.value
    assert cell.saturation == told
    assert cell.means is not None
    assert cell.means["mean_ttft_ms"] == 10.0
