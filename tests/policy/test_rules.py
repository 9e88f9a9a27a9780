"""Hot rules by pencil: admission, exits, breaches, windows and the DREX inequality."""

from __future__ import annotations

import math
from collections import defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_sim.policy.rules import (
    is_breach,
    leaves_here,
    may_join,
    rebatch_pays,
    watch_sliding,
    watch_tumbling,
)

WINDOW = 100
LIMIT = 50


def trip_probability(breach_rate: float) -> float:
    """Probability that a fresh tumbling window trips, summed over every path of the rule."""
    alive: dict[tuple[int, int], float] = {(0, 0): 1.0}
    tripped_mass = 0.0
    for token in range(WINDOW):
        following: dict[tuple[int, int], float] = defaultdict(float)
        for (seen, breaches), mass in alive.items():
            for breached, share in ((True, breach_rate), (False, 1 - breach_rate)):
                seen_now, breaches_now, tripped = watch_tumbling(
                    seen, breaches, breached, WINDOW, LIMIT
                )
                if tripped:
                    tripped_mass += mass * share
                else:
                    following[(seen_now, breaches_now)] += mass * share
        alive = following
        assert tripped_mass == 0 or token >= LIMIT
    assert set(alive) == {(0, 0)}
    return tripped_mass


@pytest.mark.parametrize(
    ("breach_rate", "published"),
    [
        (0.26, 8e-8),
        (0.30, 9e-6),
        (0.40, 0.017),
        (0.45, 0.135),
        (0.50, 0.460),
        (0.55, 0.817),
        (0.60, 0.973),
    ],
)
def test_a_tumbling_window_trips_with_the_binomial_tail(
    breach_rate: float, published: float
) -> None:
    """More than 50 of 100 independent tokens: the exact tail, and the rounded reference figures."""
    tail = math.fsum(
        math.comb(WINDOW, k) * breach_rate**k * (1 - breach_rate) ** (WINDOW - k)
        for k in range(LIMIT + 1, WINDOW + 1)
    )
    assert trip_probability(breach_rate) == pytest.approx(tail, rel=1e-9)
    assert f"{tail:.0e}" == f"{published:.0e}" or round(tail, 3) == published


def test_a_tumbling_window_trips_on_the_breach_that_exceeds_the_limit() -> None:
    """Fifty breaches are tolerated; the fifty-first trips at once and the count starts anew."""
    seen = breaches = 0
    for _ in range(50):
        seen, breaches, tripped = watch_tumbling(seen, breaches, True, WINDOW, LIMIT)
        assert not tripped
    assert (seen, breaches) == (50, 50)
    assert watch_tumbling(seen, breaches, True, WINDOW, LIMIT) == (0, 0, True)


def test_a_tumbling_window_forgets_at_its_end_and_a_sliding_one_does_not() -> None:
    """Four breaches astride the boundary of two windows trip the sliding window alone."""
    tokens = [False, False, True, True, True, True, False, False]
    seen = breaches = 0
    tumbling = []
    for breached in tokens:
        seen, breaches, tripped = watch_tumbling(seen, breaches, breached, 4, 2)
        tumbling.append(tripped)
    assert not any(tumbling)
    ring, seen, breaches = [0] * 4, 0, 0
    sliding = []
    for breached in tokens:
        seen, breaches, tripped = watch_sliding(ring, seen, breaches, breached, 2)
        sliding.append(tripped)
    assert [place for place, tripped in enumerate(sliding) if tripped] == [4]


@settings(max_examples=200)
@given(
    tokens=st.lists(st.booleans(), max_size=60),
    window=st.integers(1, 8),
    limit=st.integers(0, 7),
)
def test_a_sliding_window_equals_a_plain_queue(tokens: list[bool], window: int, limit: int) -> None:
    """The ring trips exactly when the last tokens since the last trip hold too many breaches."""
    ring, seen, breaches = [0] * window, 0, 0
    last: deque[bool] = deque(maxlen=window)
    for breached in tokens:
        seen, breaches, tripped = watch_sliding(ring, seen, breaches, breached, limit)
        last.append(breached)
        assert tripped == (sum(last) > limit)
        if tripped:
            last.clear()


@pytest.mark.parametrize(
    ("full_ms", "shallow_ms", "deep_ms"),
    [(55.0, 29.0, 42.3), (52.1, 28.6, 42.8), (54.0, 29.5, 44.4)],
)
def test_rebatching_the_published_drex_rows_pays_from_four_of_eight(
    full_ms: float, shallow_ms: float, deep_ms: float
) -> None:
    """With c / t_d x 8 at 3.08, 3.61 and 3.59 in the three rows, three leavers are too few."""
    assert 3 < (shallow_ms + deep_ms - full_ms) / deep_ms * 8 < 4
    for leaving in range(9):
        pays = rebatch_pays(leaving, 8, shallow_ms / 1e3, deep_ms / 1e3, full_ms / 1e3)
        assert pays == (leaving >= 4)


def test_rebatching_at_equal_cost_does_not_pay() -> None:
    """The inequality is strict: 2 of 4 leave, and splitting costs just half the deep part."""
    assert not rebatch_pays(2, 4, 2.0, 2.0, 3.0)
    assert rebatch_pays(3, 4, 2.0, 2.0, 3.0)


def test_splitting_that_costs_nothing_pays_for_any_leaver() -> None:
    """With t_s + t_d = t_f one leaver is enough, and none is not."""
    assert rebatch_pays(1, 8, 1.0, 2.0, 3.0)
    assert not rebatch_pays(0, 8, 1.0, 2.0, 3.0)


def test_a_token_leaves_at_or_above_the_threshold_and_breaches_below() -> None:
    """Equality leaves; at full depth nothing breaches because nothing is left to load."""
    assert leaves_here(0.8, 0.8)
    assert not leaves_here(0.79, 0.8)
    assert is_breach(0.79, 0.8, False)
    assert not is_breach(0.8, 0.8, False)
    assert not is_breach(0.1, 0.8, True)


def test_a_request_joins_only_with_a_row_and_blocks_beyond_the_watermark() -> None:
    """Seven blocks needed beside three kept need ten free; an empty replica keeps none back."""
    assert may_join(1, 2, 7, 10, 3)
    assert not may_join(1, 2, 7, 9, 3)
    assert not may_join(2, 2, 7, 100, 3)
    assert may_join(0, 2, 7, 7, 3)
    assert not may_join(0, 2, 7, 6, 3)
