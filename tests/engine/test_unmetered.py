"""Without an energy meter: times are simulated, energy is unavailable, never zero."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from helios_sim.errors import InputError
from helios_sim.policy.contract import Event
from helios_sim.profile import Profile
from helios_sim.report import render
from helios_sim.runs.laws import check_run
from helios_sim.runs.metrics import summarise
from tests.engine.factories import (
    both_models,
    drifting_requests,
    drifting_setup,
    play,
    snapshots_of,
)


def unmetered() -> Profile:
    """Both models, with nothing known of their joules."""
    metered = both_models()
    return replace(
        metered,
        models={
            name: replace(
                model,
                coefficients={
                    key: None if ".j_" in key or key.startswith("power.") else value
                    for key, value in model.coefficients.items()
                },
            )
            for name, model in metered.models.items()
        },
    )


def test_without_a_meter_every_energy_figure_is_null_and_every_time_is_as_before() -> None:
    _, data = play(drifting_setup(profile=unmetered()), drifting_requests())
    _, metered = play(drifting_setup(), drifting_requests())
    check_run(data)
    assert data.requests.equals(metered.requests)
    assert data.timeline["power_w"].null_count() == data.timeline.height
    assert math.isnan(data.totals.energy_j)
    summary = summarise(data)
    energies = [key for key in summary if "energy" in key or "joule" in key or "power" in key]
    assert len(energies) > 5
    assert {key: summary[key] for key in energies} == dict.fromkeys(energies)
    assert summary["output_throughput"] == summarise(metered)["output_throughput"]


def test_without_a_meter_a_policy_is_told_of_no_joules() -> None:
    run, _ = play(drifting_setup(profile=unmetered()), drifting_requests())
    for snapshot in snapshots_of(run.decisions):
        assert all(card.decode_iteration_j is None for card in snapshot.candidates)
        if snapshot.event is not Event.START:
            assert snapshot.telemetry is not None
            assert snapshot.telemetry.energy_j is None
            assert snapshot.telemetry.idle_energy_j is None


def test_without_a_meter_the_objective_energy_is_refused_with_what_helps() -> None:
    with pytest.raises(InputError, match=r"without an energy meter\. Choose another objective"):
        play(drifting_setup(profile=unmetered()), drifting_requests(), objective="energy")


def test_without_a_meter_the_page_shows_no_energy_as_a_number() -> None:
    data = play(drifting_setup(profile=unmetered()), drifting_requests())[1]
    page = render([data], [summarise(data)])
    row = next(line for line in page.splitlines() if "Energy per output token" in line)
    assert "NaN" not in row
    assert not re.search(r"\d\s*(m?J|W)\b", row)
