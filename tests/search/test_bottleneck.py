"""What gives way first, on figures by pencil: a replica that is half busy and half empty."""

from __future__ import annotations

from typing import Any

import pytest

from helios_sim.scenario import ServingSettings
from helios_sim.search.bottleneck import find_bottleneck

SHARES = {"busy": 0.5, "idle": 0.5, "loading": 0.0, "draining": 0.0, "evaluating": 0.0}
REGIME = {"launch": 0.2, "memory": 0.7, "compute": 0.1}
CALM: dict[str, Any] = {
    "time_shares": SHARES,
    "regime": REGIME,
    "mean_kv_use": 0.2,
    "num_preemptions": 0,
    "num_requests": 100,
    "mean_wait_ms": 10.0,
    "mean_ttft_ms": 100.0,
    "mean_batch_size": 2.0,
    "max_batch_size": 4,
}
SERVING = ServingSettings(max_batch=8)


def shares(**changes: float) -> dict[str, Any]:
    return {"time_shares": SHARES | changes}


@pytest.mark.parametrize(
    ("changes", "cause", "evidence"),
    [
        pytest.param({}, "queueing", "busy only 50 %", id="nothing is short"),
        pytest.param(
            shares(loading=0.1, draining=0.1, evaluating=0.1),
            "loading",
            "10 % loading, 10 % draining, 10 % evaluating",
            id="loads, drains and evaluations add up to more than a quarter",
        ),
        pytest.param(
            shares(loading=0.1, draining=0.1, evaluating=0.04),
            "queueing",
            "busy only",
            id="they add up to less than a quarter",
        ),
        pytest.param(
            {"mean_kv_use": 0.4},
            "KV memory",
            "40 % of the KV blocks",
            id="while busy four fifths of the blocks are in use",
        ),
        pytest.param(
            {"mean_kv_use": 0.35}, "queueing", "busy only", id="while busy seven tenths are in use"
        ),
        pytest.param(
            {"num_preemptions": 2},
            "KV memory",
            "2.0 % of the requests are preempted",
            id="two in a hundred are preempted",
        ),
        pytest.param({"num_preemptions": 1}, "queueing", "busy only", id="one in a hundred is"),
        pytest.param(
            {"mean_wait_ms": 50.0, "mean_kv_use": 0.3},
            "KV memory",
            "50 % of the time to the first token",
            id="admission is blocked with places left and most blocks in use",
        ),
        pytest.param(
            {"mean_wait_ms": 50.0, "mean_kv_use": 0.2},
            "queueing",
            "busy only",
            id="requests wait with places and blocks left",
        ),
        pytest.param(
            {"mean_wait_ms": 50.0, "mean_kv_use": 0.3, "max_batch_size": 8},
            "queueing",
            "50 % of the time to the first token is waiting for a place",
            id="requests wait for a place",
        ),
        pytest.param(
            {"max_batch_size": 8}, "queueing", "busy only", id="places run out and nobody waits"
        ),
        pytest.param(
            {"mean_batch_size": 6.5, "max_batch_size": 8},
            "queueing",
            "max_batch lets 8 requests run, 6.5 do",
            id="most places are taken on average",
        ),
        pytest.param(
            shares(busy=0.85),
            "memory bandwidth",
            "70 % of that is bound by memory",
            id="the device is busy, its memory most of all",
        ),
        pytest.param(
            shares(busy=0.9) | {"regime": {"launch": 0.2, "memory": 0.3, "compute": 0.5}},
            "compute",
            "busy 90 %",
            id="the device is busy, its arithmetic most of all",
        ),
    ],
)
def test_the_rarest_cause_that_the_figures_show_is_named_with_them(
    changes: dict[str, Any], cause: str, evidence: str
) -> None:
    found = find_bottleneck([CALM | changes], SERVING, tokens_are_late=False)
    assert found.cause == cause
    assert evidence in found.evidence


@pytest.mark.parametrize("places", [4, 8])
def test_where_tokens_are_late_waiting_to_be_admitted_is_not_the_reason(places: int) -> None:
    """Requests wait for blocks or for places, but what broke is the time between their tokens."""
    waiting = CALM | {"mean_wait_ms": 90.0, "mean_kv_use": 0.3, "max_batch_size": places}
    busy = waiting | shares(busy=0.9) | {"mean_kv_use": 0.5}
    assert find_bottleneck([busy], SERVING, tokens_are_late=True).cause == "memory bandwidth"
    assert find_bottleneck([busy], SERVING, tokens_are_late=False).cause != "memory bandwidth"


def test_the_figures_of_several_runs_count_by_their_mean() -> None:
    """Of two runs one preempts three in a hundred, which is more than one in a hundred."""
    runs = [CALM, CALM | {"num_preemptions": 3}]
    assert find_bottleneck(runs, SERVING, tokens_are_late=False).cause == "KV memory"
    runs = [CALM, CALM | {"num_preemptions": 2}]
    assert find_bottleneck(runs, SERVING, tokens_are_late=False).cause == "queueing"
