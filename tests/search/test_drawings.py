"""Frontiers on pencil figures: which axes are logarithmic."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from helios_sim.scenario import PolicySettings
from helios_sim.search.bench import FleetAnswer, Load
from helios_sim.search.drawings import plan_frontiers
from helios_sim.search.fleets import Fleet
from helios_sim.search.verdict import BACKLOG, Criterion, Verdict


def answer(energies_mj: Sequence[float | None]) -> FleetAnswer:
    """A fleet at rates of 1, 2 and so on, with so many millijoules a token at each."""
    policy = PolicySettings(use="never")
    fleet = Fleet("never", "opt-a100-40gb", "X", 1, ("opt-1.3b",), policy, "round-robin")
    verdict = Verdict((Criterion(BACKLOG, 1.0, 1.0, 1.0, 0.5),), 3)
    loads = tuple(
        Load(1, float(rate), verdict, {"energy_per_output_token": energy, "num_gpus": 1.0})
        for rate, energy in enumerate(energies_mj, 1)
    )
    return FleetAnswer(fleet, 1, loads=loads)


@pytest.mark.parametrize(
    ("energies_mj", "kind"), [([9000.0, 1000.0], None), ([11_000.0, 1000.0], "log")]
)
def test_the_energies_of_a_plan_stand_on_a_logarithmic_axis_beyond_a_decade(
    energies_mj: list[float], kind: str | None
) -> None:
    layout = plan_frontiers([answer(energies_mj)], "GPU")["layout"]
    assert layout["xaxis"].get("type") == kind
    assert layout["xaxis2"].get("type") is None
    if kind is not None:
        assert layout["xaxis"]["ticktext"] == ["1", "2", "5", "10"]


def test_a_plan_whose_profiles_know_no_energy_draws_none() -> None:
    figure = plan_frontiers([answer([None, None])], "GPU")
    assert figure["layout"]["xaxis"]["title"]["text"] == "tokens/s per user"
    assert "xaxis2" not in figure["layout"]
    assert [(one["xaxis"], one["showlegend"]) for one in figure["data"]] == [("x", True)]
