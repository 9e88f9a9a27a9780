"""Probe and bisection: by pencil, by law, and against queues that theory knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from helios_sim.search.capacity import Capacity, find_capacity, find_fleet
from helios_sim.search.verdict import Criterion, Verdict, criterion
from helios_sim.streams import stream
from tests.engine.factories import arrivals_of
from tests.engine.test_queueing import ITERATION_S, erlang_c, waits_of


def verdict(mean: float, half: float = 0.0, running: float = 1.0) -> Verdict:
    """One criterion that needs 0.95."""
    one = Criterion("ttft<=1s", mean, mean - half, mean + half, 0.95)
    return Verdict((one,), 3, running)


def answered(search: Generator[Any, Verdict, Any], measure: Callable[[Any], Verdict]) -> Any:
    """What a search returns when it is answered by a function."""
    at = next(search)
    while True:
        try:
            at = search.send(measure(at))
        except StopIteration as end:
            return end.value


def test_a_capacity_found_by_pencil() -> None:
    """True capacity 10, start 3: 3, 6, 12, then bisection of 6 to 12 until 5 % are left."""
    found: Capacity = answered(
        find_capacity(3.0, 0.05), lambda rate: verdict(1.0 if rate <= 10.0 else 0.5)
    )
    rates = [probe.rate_per_s for probe in found.probes]
    assert {3.0, 6.0, 12.0, 8.485} <= set(rates)
    assert found.rate_per_s <= 10.0 < found.first_missed.rate_per_s
    assert found.first_missed.rate_per_s / found.rate_per_s <= 1.05
    assert (found.low_per_s, found.outcome) == (found.rate_per_s, "found")


@given(
    st.floats(min_value=0.01, max_value=1000.0),
    st.floats(min_value=0.01, max_value=1000.0),
    st.sampled_from([0.01, 0.05, 0.3]),
    st.floats(min_value=0.0, max_value=0.4),
)
def test_the_bracket_holds_the_true_capacity_and_doubt_widens_it(
    true: float, start: float, precision: float, doubt: float
) -> None:
    """Verdicts within a share `doubt` of the true rate are unsure, and turn at the true rate."""

    def measure(rate: float) -> Verdict:
        half = 0.5 if abs(rate / true - 1.0) <= doubt else 0.0
        return verdict(1.0 if rate <= true else 0.8, half)

    found: Capacity = answered(find_capacity(start, precision), measure)
    assert found.outcome == "found"
    # Rates have four digits, so the bisection may end a last digit early.
    assert found.rate_per_s <= true < found.first_missed.rate_per_s
    assert found.first_missed.rate_per_s / found.rate_per_s <= 1.0 + precision + 2e-3
    assert found.low_per_s <= found.rate_per_s < found.high_per_s
    assert not any(
        found.low_per_s < probe.rate_per_s < found.high_per_s and probe.verdict.is_sure
        for probe in found.probes
        if doubt > 0.0 and abs(probe.rate_per_s / true - 1.0) <= doubt
    )


def test_bounds_are_looked_for_beyond_the_rates_that_bracket_a_capacity() -> None:
    """Below 4 surely carried, from 30 on surely missed, in doubt between; it turns at 10."""

    def measure(rate: float) -> Verdict:
        half = 0.3 if 4.0 < rate < 30.0 else 0.0
        return verdict(1.0 if rate <= 10.0 else 0.8, half)

    found: Capacity = answered(find_capacity(8.0, 0.05), measure)
    assert found.low_per_s <= 4.0 < 1.16 * found.low_per_s
    assert found.high_per_s >= 30.0 > found.high_per_s / 1.16


def test_where_no_rate_is_carried_the_search_ends_once_requests_hardly_meet() -> None:
    found: Capacity = answered(
        find_capacity(8.0, 0.05), lambda rate: verdict(0.2, running=rate / 50.0)
    )
    assert (found.outcome, found.rate_per_s, found.low_per_s) == ("none carried", 0.0, 0.0)
    assert [probe.rate_per_s for probe in found.probes] == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert found.first_missed.rate_per_s == 0.5


def test_where_every_rate_is_carried_the_bound_above_is_open() -> None:
    found: Capacity = answered(find_capacity(1.0, 0.05), lambda rate: verdict(1.0))
    assert found.outcome == "all carried"
    assert math.isinf(found.high_per_s)
    assert found.rate_per_s == found.probes[-1].rate_per_s


def test_a_rate_that_is_missed_below_one_that_is_carried_bounds_the_capacity() -> None:
    """Up to 7 all is carried, in doubt above 2.5, but for 2.828: what lies above it is luck."""

    def measure(rate: float) -> Verdict:
        if rate == 2.828:
            return verdict(0.5)
        return verdict(1.0 if rate <= 7.0 else 0.5, 0.0 if rate < 2.5 else 0.1)

    found: Capacity = answered(find_capacity(2.0, 0.1), measure)
    assert 6.727 in [probe.rate_per_s for probe in found.probes]
    assert (found.rate_per_s, found.low_per_s, found.high_per_s) == (2.378, 2.378, 2.828)
    assert found.first_missed.rate_per_s == 2.828


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 250))
def test_the_smallest_fleet_is_found_from_any_guess(needed: int, guess: int, most: int) -> None:
    asked: list[int] = []

    def measure(num: int) -> Verdict:
        asked.append(num)
        return verdict(1.0 if num >= needed else 0.0)

    found = answered(find_fleet(guess, most), measure)
    assert found == (needed if needed <= most else None)
    assert len(set(asked)) == len(asked)
    assert all(1 <= num <= most for num in asked)


def test_a_fleet_that_is_carried_in_doubt_is_not_enough() -> None:
    doubtful = {3: verdict(0.97, 0.1)}
    found = answered(
        find_fleet(3, 10), lambda num: doubtful.get(num, verdict(1.0 if num > 3 else 0.0))
    )
    assert found == 4


SEEDS = range(4)
NUM_REQUESTS = 12_000
CONFIDENCE = 0.99


def geometric(seed: int, mean: float) -> np.ndarray:
    """Lengths that are nearly exponential."""
    uniforms = stream(seed, "lengths").random(NUM_REQUESTS)
    return 1 + np.floor(np.log1p(-uniforms) / math.log1p(-1 / mean))


@pytest.mark.parametrize("num_servers", [1, 3])
def test_the_capacity_of_m_m_c_under_a_wait_bound_is_bracketed(num_servers: int) -> None:
    """P(W > t) = C(c, a) exp(-(c mu - lambda) t): 95 % of the requests wait at most t.

    Lengths of mean 100 tokens are exponential up to 1 %, and a batch of c starts a request up to
    one iteration late: both shift the rate by less than the bracket is wide.
    """
    mean = 100.0
    service_s = mean * ITERATION_S
    bound_s = service_s if num_servers > 1 else 4 * service_s

    def excess(rate: float) -> float:
        busy = erlang_c(num_servers, rate * service_s)
        return busy * math.exp(-(num_servers / service_s - rate) * bound_s) - 0.05

    exact = float(brentq(excess, 0.1 / service_s, 0.999 * num_servers / service_s))

    def measure(rate: float) -> Verdict:
        shares = []
        for seed in SEEDS:
            arrival_s = arrivals_of(NUM_REQUESTS, rate, seed=100 + seed)
            waits_s = waits_of(arrival_s, geometric(seed, mean), num_servers)
            shares.append(float((waits_s[1000:] <= bound_s).mean()))
        return Verdict((criterion("wait", shares, 0.95, CONFIDENCE),), len(SEEDS))

    found: Capacity = answered(find_capacity(0.4 * exact, 0.03), measure)
    assert found.low_per_s < exact < found.high_per_s
    assert found.high_per_s / found.low_per_s < 1.25
    assert found.rate_per_s == pytest.approx(exact, rel=0.06)


def test_the_capacity_of_m_g_1_under_a_mean_wait_bound_is_bracketed() -> None:
    """E[W] = lambda E[S^2] / (2 (1 - rho)) (Pollaczek and Khinchine), solved for lambda."""
    mean, second = 10.0 * ITERATION_S, 676.0 * ITERATION_S**2
    bound_s = 0.05
    exact = 2 * bound_s / (second + 2 * bound_s * mean)

    def measure(rate: float) -> Verdict:
        waits = []
        for seed in SEEDS:
            uniforms = stream(seed, "lengths").random(NUM_REQUESTS)
            tokens = np.where(uniforms < 0.9, 2, 82)
            arrival_s = arrivals_of(NUM_REQUESTS, rate, seed=200 + seed)
            waits.append(-float(waits_of(arrival_s, tokens, 1)[1000:].mean()))
        return Verdict((criterion("mean wait", waits, -bound_s, CONFIDENCE),), len(SEEDS))

    found: Capacity = answered(find_capacity(0.3 * exact, 0.03), measure)
    assert found.low_per_s < exact < found.high_per_s
    assert found.high_per_s / found.low_per_s < 1.4
    assert found.rate_per_s == pytest.approx(exact, rel=0.08)
