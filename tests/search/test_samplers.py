"""Whatever a sampler proposes lies in the declared range, on its grid, and is told back."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_sim.search.samplers import make_sampler
from helios_sim.search.space import Range, Space
from tests.search.test_space_and_goals import scenario

RANGES = {
    "thirds": Range("k", 0.0, 1.0, step=1 / 3),
    "more than thirds": Range("k", 0.0, 1.0, step=0.3333333333333334),
    "from seven digits": Range("k", 0.1234567, 1.0, step=0.25),
    "far from zero": Range("k", 1234567.0, 1234569.0),
    "far from zero, in steps": Range("k", 1234567.0, 1234569.0, step=0.001),
    "across zero": Range("k", -1000.0, 1000.0, step=0.1),
    "shares": Range("k", 0.1, 0.9),
    "magnitudes": Range("k", 1e-6, 1.0, log=True),
    "between magnitudes": Range("k", 1e6, 1.000001e6, log=True),
    "one number": Range("k", 0.1234567, 0.1234567),
    "whole": Range("k", 1, 9, step=3, is_whole=True),
}


def space_of(one: Range) -> Space:
    """A space of one range; no scenario is made of it here."""
    return Space(scenario({"policy.breach_limit": [10, 20]}), Path(), "x.toml", (one,))


@pytest.mark.parametrize("name", ["grid", "sobol", "tpe", "nsga2"])
@pytest.mark.parametrize("one", RANGES.values(), ids=RANGES)
def test_proposals_lie_in_the_range_and_on_its_grid_and_are_told_apart(
    one: Range, name: str
) -> None:
    space = space_of(one)
    sampler = make_sampler(space, name, 1, 24, 24, ["higher"], None)
    proposed = [values["k"] for values in sampler.propose(24)]
    for value in proposed:
        assert one.low <= value <= one.high
        if one.step is not None:
            places = (value - one.low) / one.step
            assert places == pytest.approx(round(places), abs=1e-6)
    assert len(set(proposed)) >= min(20 if one.step is None else 2, len(one.grid()))
    sampler.learn([[value] for value in proposed], [0.0] * len(proposed))


def test_numbers_have_no_more_digits_than_tell_them_apart() -> None:
    assert RANGES["thirds"].grid() == [0.0, 0.3333333333, 0.6666666667, 1.0]
    assert RANGES["from seven digits"].grid() == [0.1234567, 0.3734567, 0.6234567, 0.8734567]
    assert RANGES["across zero"].at(0.49996) == -0.1
    assert Range("k", 0.0, 1.0, step=0.1).grid() == [place / 10 for place in range(11)]
    for share in (0.1234567891, 0.5, 0.987654321):
        assert RANGES["shares"].at(share) == float(f"{0.1 + 0.8 * share:.6g}")
        assert RANGES["magnitudes"].at(share) == float(f"{1e-6 ** (1 - share):.6g}")
    assert RANGES["far from zero"].grid() == [1234567.0, 1234567.5, 1234568.0, 1234568.5, 1234569.0]
    assert Range("k", 0.1234567, 0.9).grid()[0] == 0.1234567
