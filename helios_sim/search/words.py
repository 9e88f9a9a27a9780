"""Sentences that the answers of several searches share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from helios_sim.profile import Profile
from helios_sim.profiles.assumptions import means
from helios_sim.report.words import standing_in
from helios_sim.scenario import Scenario
from helios_sim.search.bench import SAMPLE_ANSWERS, Load
from helios_sim.search.traffic import FEW_ROUNDS, Traffic
from helios_sim.wording import listed, number, span

FULL_AGREEMENT: Final = 0.9995
"""Agreement that is shown as 100 %."""
SAME_MODEL: Final = "same model at full depth"
"""With what agreement compares a token: a small model agrees with itself."""
ALIKE: Final = 0.03
"""By how much of it mean lengths may differ and still be alike."""
CANDIDATES: Final = "fleet.candidates"
ASSUME: Final = "fleet.assume"
TIMES = "\N{MULTIPLICATION SIGN}"


def shared_words(traffic: Traffic, num_requests: float, so: str) -> str:
    """That samples of up to so many requests share rows of the trace, and what helps."""
    return (
        f"Samples of up to {number(round(num_requests))} requests take the "
        f"{number(traffic.num_rows)} rows of the trace in order, each from another one on, and "
        f'share some: {so}. Give a longer trace, or workload.trace_rows = "random".'
    )


def short_words(traffic: Traffic, load: Load) -> str:
    """That samples are too short for what is served, and what helps."""
    return (
        f"A sample lasts {span(load.sample_s)} and an answer up to {span(load.answer_s)}: samples "
        f"begin empty and fill for too much of their time (at least {SAMPLE_ANSWERS:g} answers are "
        f"asked for), so the capacity is optimistic. Give {_longer_by(traffic)}."
    )


def few_rounds_words(traffic: Traffic, load: Load) -> str:
    """That samples are too short for what the policy does only now and then, and what helps."""
    rounds = f"{load.rounds:.1f}"
    return (
        f"A sample holds about {rounds} round{'s' * (rounds != '1.0')} of reassessment for each "
        f"replica (at least {FEW_ROUNDS} are asked for): what reassessing costs is measured on "
        f"few. Give {_longer_by(traffic)}."
    )


def _longer_by(traffic: Traffic) -> str:
    """What makes samples longer."""
    if traffic.replays:
        return "a longer trace or fewer plan.windows"
    if traffic.is_shaped:
        return "a longer workload"
    return "a larger plan.num_requests, or none"


def grades_by_name(profiles: Iterable[Profile]) -> dict[str, Mapping[str, int]]:
    """How many numbers of each profile stand at each grade."""
    return {one.name: one.grade_counts() for one in profiles}


def assumed_everywhere(profiles: Collection[Profile]) -> set[str]:
    """The numbers that every profile has from the scenario."""
    places = [{made.place for made in profile.assumptions} for profile in profiles]
    return set.intersection(*places) if places else set()


def assumed_words(
    profiles: Collection[Profile],
    used: Collection[str] | None = None,
    varied: Collection[str] = (),
) -> list[str]:
    """What is assumed: of the exits of models, of all or those used, and by the scenario.

    Settings that are `varied` say themselves what they assume.
    """
    likes = {
        name: like
        for profile in profiles
        for name, like in profile.stand_ins.items()
        if used is None or name in used
    }
    found = [standing_in(likes)] if likes else []
    places = [key.removeprefix(ASSUME).lstrip(".") for key in varied if key.startswith(ASSUME)]
    parts = dict.fromkeys(
        one.said()
        for profile in profiles
        for one in profile.assumptions
        if not any(not place or means(place, one.place) for place in places)
    )
    return [*found, *([f"The scenario assumes {listed(list(parts))}."] if parts else [])]


def candidates_of(scenario: Scenario, varied: Iterable[Iterable[str]]) -> set[str] | None:
    """The models that may take part; None for all of a profile."""
    sets = [scenario.fleet.candidates, *varied]
    return {name for models in sets for name in models} if all(sets) else None


def headroom_words(headroom: float) -> str:
    """How far a capacity lies above (or below) what is asked."""
    if headroom < 0:
        return f"{100 * -headroom:.0f} % too little"
    return f"{100 * headroom:.0f} % headroom"


def signed(value: float) -> str:
    """A difference with its sign, and a minus as wide as the plus."""
    if math.isinf(value):
        return "unknown"
    return f"{'+' if value >= 0 else chr(0x2212)}{number(abs(value))}"
