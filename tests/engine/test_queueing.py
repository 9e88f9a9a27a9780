"""With one server and simple service times the engine is a queue that theory knows.

A thumbnail whose every iteration takes the same time turns output lengths into service times:
a request of n tokens needs n iterations. With `max_batch` 1 the replica is one server, first come
first served; constant, geometric and mixed lengths make it M/D/1, M/Geo/1 and M/G/1. With
`max_batch` c and chunked batching (a prompt rides along with the decodes) c requests are served
side by side, each at its own pace: c servers with one queue.

Statistics: waits are averaged over batches of consecutive requests, long against the queue's
memory. The batch means are nearly independent, so their mean lies within Student's t of the truth.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from scipy import stats

from helios_sim.profile import Link
from helios_sim.streams import stream
from tests.engine.factories import (
    arrivals_of,
    play,
    profile_of,
    requests_of,
    setup_of,
    thumbnail,
    traces_from,
)

ITERATION_S = 0.001
NUM_REQUESTS = 60_000
NUM_BATCHES = 30
CONFIDENCE = 0.999
"""Of the two-sided intervals; the seeds are fixed, so a test passes always or never."""

Floats = np.ndarray


def waits_of(arrival_s: Floats, tokens: Floats, num_servers: int) -> Floats:
    """The engine's waits from arrival to admission, in order of arrival."""
    costs = dict.fromkeys(thumbnail().coefficients, 0.0)
    costs["decode.fixed_s"] = costs["prefill.fixed_s"] = ITERATION_S
    at_once = Link(0.0, 1e15)
    profile = profile_of(
        thumbnail(max_positions=100_000, costs=costs),
        memory_bytes=2_000_000_000,
        disk=at_once,
        host=at_once,
    )
    setup = setup_of(
        profile,
        traces_from({"small": [[0.9, 0.9]] * 2}, {"small": (2, 4)}),
        max_batch=num_servers,
        batching="continuous" if num_servers == 1 else "chunked",
        watermark=0.0,
        timeline_interval_s=1000.0,
    )
    ones = np.ones(len(tokens), np.int64)
    _, data = play(setup, requests_of(arrival_s, ones, tokens), "vanilla")
    assert set(data.requests["status"]) == {"finished"}
    waited: Floats = (data.requests["admitted_s"] - data.requests["arrival_s"]).to_numpy()
    return waited


def starts_of(arrival_s: Floats, service_s: Floats, num_servers: int) -> Floats:
    """When service starts on c servers, first come first served (Kiefer and Wolfowitz)."""
    free = [0.0] * num_servers
    starts = []
    for at_s, lasts_s in zip(arrival_s.tolist(), service_s.tolist(), strict=True):
        start_s = max(at_s, heapq.heappop(free))
        heapq.heappush(free, start_s + lasts_s)
        starts.append(start_s)
    return np.array(starts)


def interval_of(waits: Floats) -> tuple[float, float]:
    """The mean wait by batch means, and half the width of its confidence interval."""
    means = waits.reshape(NUM_BATCHES, -1).mean(axis=1)
    t = stats.t.ppf((1 + CONFIDENCE) / 2, NUM_BATCHES - 1)
    return float(means.mean()), float(t * means.std(ddof=1) / math.sqrt(NUM_BATCHES))


def tokens_by(lengths: str, seed: int) -> tuple[Floats, float, float]:
    """Drawn lengths with the mean and the second moment of their distribution."""
    if lengths == "constant":
        return np.full(NUM_REQUESTS, 10), 10.0, 100.0
    uniforms = stream(seed, "lengths").random(NUM_REQUESTS)
    if lengths == "geometric":
        mean = 20.0
        drawn = 1 + np.floor(np.log1p(-uniforms) / math.log1p(-1 / mean))
        return drawn, mean, 2 * mean * mean - mean
    # Nine short requests for every long one: a squared coefficient of variation of 5.4.
    return np.where(uniforms < 0.9, 2, 82), 10.0, 0.9 * 2**2 + 0.1 * 82**2


def erlang_c(num_servers: int, offered: float) -> float:
    """The share of arrivals that find all servers of an M/M/c busy."""
    below = math.fsum(offered**k / math.factorial(k) for k in range(num_servers))
    full = offered**num_servers / math.factorial(num_servers)
    waiting = full * num_servers / (num_servers - offered)
    return waiting / (below + waiting)


@pytest.mark.parametrize("load", [0.3, 0.65])
@pytest.mark.parametrize("lengths", ["constant", "geometric", "mixed"])
def test_one_server_waits_as_pollaczek_and_khinchine_say(lengths: str, load: float) -> None:
    """E[W] = rate x E[S^2] / (2 (1 - load)); with constant service this is M/D/1."""
    tokens, mean, second = tokens_by(lengths, seed=11)
    rate_per_s = load / (mean * ITERATION_S)
    waits = waits_of(arrivals_of(NUM_REQUESTS, rate_per_s, seed=12), tokens, 1)
    expected_s = rate_per_s * second * ITERATION_S**2 / (2 * (1 - load))
    found_s, half_width_s = interval_of(waits)
    assert found_s == pytest.approx(expected_s, abs=half_width_s)
    assert half_width_s < 0.2 * expected_s


def test_one_server_with_many_tokens_a_request_is_nearly_m_m_1() -> None:
    """Geometric lengths of mean m are exponential up to 1/m: SCV 1 - 1/m instead of 1.

    So M/M/1's load / (1 - load) x E[S] is too long by the share 1 / (2 m), which is added to the
    tolerance.
    """
    load = 0.6
    tokens, mean, _ = tokens_by("geometric", seed=71)
    waits = waits_of(arrivals_of(NUM_REQUESTS, load / (mean * ITERATION_S), seed=72), tokens, 1)
    expected_s = load / (1 - load) * mean * ITERATION_S
    found_s, half_width_s = interval_of(waits)
    assert found_s == pytest.approx(expected_s, abs=half_width_s + expected_s / (2 * mean))


@pytest.mark.parametrize("lengths", ["constant", "geometric", "mixed"])
def test_one_server_starts_each_request_when_the_one_before_has_ended(lengths: str) -> None:
    """Lindley's recursion, request by request."""
    tokens, mean, _ = tokens_by(lengths, seed=21)
    arrival_s = arrivals_of(NUM_REQUESTS, 0.9 / (mean * ITERATION_S), seed=22)
    waits = waits_of(arrival_s, tokens, 1)
    starts_s = starts_of(arrival_s, tokens * ITERATION_S, 1)
    np.testing.assert_allclose(waits, starts_s - arrival_s, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_servers", [2, 5])
def test_a_batch_of_c_serves_like_c_servers_request_by_request(num_servers: int) -> None:
    """A request starts when it would on c servers, or up to one iteration later.

    Whoever finds a free row while others are under way joins at the next boundary, less than an
    iteration away; whoever waits for a row gets it at a boundary. So the batch is the c-server
    queue with arrivals moved to boundaries, by less than an iteration each, and in a queue served
    in order no start moves by more than the arrivals do.
    """
    tokens, mean, _ = tokens_by("geometric", seed=31)
    arrival_s = arrivals_of(NUM_REQUESTS, 0.8 * num_servers / (mean * ITERATION_S), seed=32)
    waits = waits_of(arrival_s, tokens, num_servers)
    late_s = waits - (starts_of(arrival_s, tokens * ITERATION_S, num_servers) - arrival_s)
    assert late_s.min() > -1e-6
    assert late_s.max() < ITERATION_S + 1e-6
    assert late_s.max() > 0.9 * ITERATION_S


@pytest.mark.parametrize(("num_servers", "load"), [(2, 0.7), (5, 0.75)])
def test_a_batch_of_c_waits_as_erlang_c_says(num_servers: int, load: float) -> None:
    """E[W] = C(c, a) E[S] / (c (1 - load)) for M/M/c, from which the batch may differ in two ways.

    It starts a request up to one iteration late (never early), and geometric lengths of mean m
    have SCV 1 - 1/m, which shortens waits by at most a share 1/m (half of it in the
    approximation of Lee and Longton). Both are added to the confidence interval, on their sides.
    """
    tokens, mean, _ = tokens_by("geometric", seed=41)
    rate_per_s = load * num_servers / (mean * ITERATION_S)
    waits = waits_of(arrivals_of(NUM_REQUESTS, rate_per_s, seed=42), tokens, num_servers)
    busy = erlang_c(num_servers, load * num_servers)
    expected_s = busy * mean * ITERATION_S / (num_servers * (1 - load))
    found_s, half_width_s = interval_of(waits)
    assert found_s > expected_s * (1 - 1 / mean) - half_width_s
    assert found_s < expected_s + ITERATION_S + half_width_s
    assert half_width_s < 0.2 * expected_s


def test_requests_outstanding_are_the_rate_times_their_time_in_the_system() -> None:
    """Little's law, from two books kept apart: the timeline's integral and the requests' times."""
    profile = profile_of(thumbnail())
    setup = setup_of(
        profile,
        traces_from({"small": [[0.9, 0.9]] * 2}, {"small": (2, 4)}),
        batching="continuous",
    )
    draws = stream(61, "lengths").random((2, 400))
    requests = requests_of(
        arrivals_of(400, 5.0, seed=62), 1 + np.floor(20 * draws[0]), 1 + np.floor(20 * draws[1])
    )
    _, data = play(setup, requests, "vanilla")
    timeline = data.timeline
    running_s = float((timeline["mean_running"] * timeline["interval_s"]).sum())
    in_service_s = float((data.requests["finished_s"] - data.requests["admitted_s"]).sum())
    assert running_s == pytest.approx(in_service_s, rel=1e-9)
    assert data.totals.batch_seconds == pytest.approx(in_service_s, rel=1e-9)
