"""The shipped measured profile: its readings travel with it, and every exit means something."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from helios_sim.exits import ExitTraces, load_traces, stickiness_of
from helios_sim.profile import POINTS_FILE, Profile
from helios_sim.profiles.files import load_profile

OWN = {
    "code-8l": ("code",),
    "prose-8l": ("prose",),
    "general-12l": ("code", "prose", "tables"),
}
"""The domains each model was trained on."""


@cache
def measured() -> Profile:
    """The family measured on a processor."""
    return load_profile("small-family-cpu")


@cache
def traces() -> ExitTraces:
    """What its models do on held-out text."""
    return load_traces(measured())


def test_only_the_thresholds_are_choices_and_nothing_is_published() -> None:
    assert measured().provenance.origin == "measured"
    chosen = [name for name, one in measured().quantities.items() if one.grade == "assumed"]
    assert {name.rpartition(".")[2] for name in chosen} == {"default_threshold"}
    assert measured().grade_counts()["published"] == 0


def test_without_a_meter_its_energy_is_unavailable() -> None:
    assert not measured().has_energy


def test_its_raw_readings_travel_with_it() -> None:
    points = pl.read_parquet(measured().folder / POINTS_FILE)
    assert set(measured().models) <= set(points["model"].unique())
    assert {"fit", "held-out"} <= set(points["purpose"].unique())


@pytest.mark.parametrize("name", OWN)
def test_on_its_own_text_every_exit_is_better_than_the_one_before(name: str) -> None:
    for domain in OWN[name]:
        place = traces().domain_index(domain)
        nll = traces().nll_nats[name][place].mean(axis=0)
        agrees = traces().agrees[name][place].mean(axis=0)
        assert all(later < earlier for earlier, later in pairwise(nll))
        assert all(later > earlier for earlier, later in pairwise(agrees))
        assert agrees[-1] == 1.0


def test_each_specialist_beats_the_other_on_its_own_text() -> None:
    def full_depth(name: str, domain: str) -> float:
        return float(traces().nll_nats[name][traces().domain_index(domain), :, -1].mean())

    assert full_depth("code-8l", "code") < full_depth("prose-8l", "code")
    assert full_depth("prose-8l", "prose") < full_depth("code-8l", "prose")


def test_candidates_complement_each_other() -> None:
    """Of the tokens that go deep in the general model, many leave a specialist at once."""
    threshold = measured().model("general-12l").confidence.default_threshold
    deep = traces().exit_level_at("general-12l", threshold) == 3
    early = traces().exit_level_at("code-8l", threshold) == 0
    code = traces().domain_index("code")
    share = np.mean(early[code][deep[code]])
    assert 0.02 < share < 1.0


def test_exits_bunch_on_code_and_on_prose_as_the_document_of_profiles_says() -> None:
    def sticks(domain: str) -> list[float]:
        found = []
        for name, model in measured().models.items():
            levels = traces().exit_level_at(name, model.confidence.default_threshold)
            found.append(stickiness_of(levels[traces().domain_index(domain)]) or 0.0)
        return [round(min(found), 2), round(max(found), 2)]

    assert sticks("code") == [0.19, 0.27]
    assert sticks("prose") == [0.06, 0.10]
