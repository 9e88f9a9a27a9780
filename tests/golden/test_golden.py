"""Golden runs: small scenarios whose summaries are kept, and the laws that say why they must be so.

A golden file notices a change and cannot say whether it is right; each has law tests below that
compute what can be known of its run from the workload, the exit traces and the profile alone.
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest

from helios_sim.engine import Setup
from helios_sim.experiment import Result
from helios_sim.workload.requests import Requests
from tests.golden.regenerate import NAMES, experiment_of, golden, play, text_of

played = cache(play)
"""A golden scenario's run, played once."""


def flat(node: Any, place: str = "") -> dict[str, Any]:
    """Every figure of a summary by its place."""
    if isinstance(node, dict):
        pairs = list(node.items())
    elif isinstance(node, list):
        pairs = list(enumerate(node))
    else:
        return {place: node}
    return {
        name: value for key, one in pairs for name, value in flat(one, f"{place}.{key}").items()
    }


def given(name: str) -> tuple[Setup, Requests]:
    """What a golden run starts from."""
    experiment = experiment_of(name)
    requests, _ = experiment.requests(experiment.scenario.seed)
    return experiment.setup, requests


def own_levels(setup: Setup, requests: Requests, model: str) -> list[np.ndarray]:
    """By request, the exit level of each token, looked up in the trace."""
    threshold = setup.profile.model(model).confidence.default_threshold
    levels = setup.traces.exit_level_at(model, threshold)
    length = setup.traces.num_positions
    return [
        levels[
            setup.traces.domain_index(requests.domains[requests.domain[i]]),
            (int(requests.trace_start[i]) + np.arange(requests.output_tokens[i])) % length,
        ]
        for i in range(len(requests))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_its_golden_summary(name: str) -> None:
    """If it is meant to differ: python -m tests.golden.regenerate, and say why."""
    found = flat(json.loads(text_of(played(name).summary)))
    expected = flat(golden(name))
    assert sorted(found) == sorted(expected)
    differing = {
        place: (value, found[place])
        for place, value in expected.items()
        if found[place] != value
        and not (isinstance(value, float) and math.isclose(found[place], value, rel_tol=1e-9))
    }
    assert not differing


@pytest.mark.parametrize("name", NAMES)
def test_requests_and_tokens_are_those_of_the_workload(name: str) -> None:
    """The warm-up cuts latencies; tokens and throughput are those of the whole run."""
    summary, table = golden(name), played(name).run.requests
    _, requests = given(name)
    assert summary["num_requests"] == len(requests)
    assert table["generated_tokens"].to_list() == requests.output_tokens.tolist()
    assert summary["total_output_tokens"] == int(requests.output_tokens.sum())
    assert summary["total_input_tokens"] == int(requests.prompt_tokens.sum())
    assert summary["completed"] == len(requests)
    assert summary["num_measured"] == len(requests) - summary["warmup_requests"]
    assert summary["duration"] >= requests.span_s


@pytest.mark.parametrize("name", NAMES)
def test_energy_lies_between_idling_and_the_most_that_iterations_can_draw(name: str) -> None:
    """Never under the idle watts; iterations between the active watts and the board's limit."""
    setup, _ = given(name)
    totals, device = played(name).run.totals, setup.profile.device
    seconds = totals.end_s * totals.num_replicas
    assert totals.energy_j > device.idle_w * seconds
    busy_j = totals.energy_j - totals.energy_idle_j - totals.energy_load_j
    limit_w = max(
        setup.profile.model(name).coefficients["power.limit_w"] for name in setup.candidates
    )
    assert device.active_w * totals.busy_s < busy_j <= limit_w * totals.busy_s
    assert totals.energy_idle_j == pytest.approx(device.idle_w * totals.idle_s)
    assert totals.busy_s + totals.idle_s + totals.load_s == pytest.approx(seconds)


def mean_layers(result: Result) -> float:
    requests = result.run.requests
    return float(requests["executed_layers"].sum() / requests["decoded_tokens"].sum())


def test_the_full_depth_run_executes_every_layer_for_every_token() -> None:
    summary, setup = golden("full-depth"), given("full-depth")[0]
    assert summary["exit_histogram"]["opt-1.3b"] == {"6": 0.0, "12": 0.0, "24": 1.0}
    assert summary["mean_executed_layers"] == 24.0
    assert summary["agreement"] == 1.0
    assert summary["breach_rate"] == 0.0
    assert summary["num_switches"] == summary["num_loads"] == summary["num_evaluations"] == 0
    model = setup.profile.model("opt-1.3b")
    assert summary["weight_bytes_peak"] == model.model.weight_bytes(24)
    floor_s = model.coefficients["decode.fixed_s"] + 24 * model.coefficients["decode.launch_s"]
    assert summary["p50_tpot_ms"] >= 1000 * floor_s


def test_the_full_depth_run_has_the_perplexity_of_the_tokens_it_met() -> None:
    setup, requests = given("full-depth")
    nll = setup.traces.nll_nats["opt-1.3b"][..., -1]
    met = [
        nll[0, (int(requests.trace_start[i]) + np.arange(requests.output_tokens[i])) % nll.shape[1]]
        for i in range(len(requests))
    ]
    expected = math.exp(float(np.concatenate(met).astype(np.float64).mean()))
    assert golden("full-depth")["perplexity"] == pytest.approx(expected, rel=1e-9)


def test_the_waiting_run_leaves_where_its_tokens_are_confident() -> None:
    """Decoded tokens, all but the first of each request, leave at their own exits, looked up."""
    setup, requests = given("waiting")
    levels = np.concatenate([own[1:] for own in own_levels(setup, requests, "opt-6.7b")])
    shares = np.bincount(levels, minlength=3) / len(levels)
    found = golden("waiting")["exit_histogram"]["opt-6.7b"]
    assert set(found) == {"9", "17", "32"}
    assert [found[layer] for layer in ("9", "17", "32")] == pytest.approx(shares.tolist())


def test_the_waiting_run_executes_more_layers_than_its_tokens_need() -> None:
    """A batch runs to its deepest token, and beside a prompt to the end, but never beyond it."""
    setup, requests = given("waiting")
    layers = np.array(setup.profile.model("opt-6.7b").model.exit_layers)
    needed = np.concatenate([layers[own[1:]] for own in own_levels(setup, requests, "opt-6.7b")])
    assert needed.mean() < golden("waiting")["mean_executed_layers"] < 32
    assert mean_layers(played("waiting")) == pytest.approx(
        golden("waiting")["mean_executed_layers"]
    )
    assert golden("waiting")["breach_rate"] == 0.0
    assert 0.8 < golden("waiting")["agreement"] < 1.0


def test_the_drifting_run_follows_the_paper_step_by_step() -> None:
    """Two candidates a round, five requests an evaluation, a round every 150 served requests."""
    summary, result = golden("drifting"), played("drifting")
    decisions = result.run.decisions
    rounds = decisions.filter(pl.col("event").is_in(["start", "reassess"])).height
    assert rounds == 2
    assert summary["num_evaluations"] == 2 * rounds
    assert result.run.requests["evaluated"].sum() == 5 * summary["num_evaluations"]
    assert summary["num_breach_events"] == decisions.filter(pl.col("event") == "breached").height
    greedy = decisions.filter(pl.col("decision") == "serve")
    assert set(zip(greedy["model"], greedy["depth"], strict=True)) <= {
        ("opt-1.3b", 6),
        ("opt-1.3b", 24),
        ("opt-6.7b", 9),
    }


def test_the_drifting_run_trades_agreement_for_layers() -> None:
    """Tokens leave before anybody is sure: fewer layers than full depth, breaches, disagreement."""
    summary = golden("drifting")
    setup, _ = given("drifting")
    assert 6 < summary["mean_executed_layers"] < 32
    assert summary["mean_executed_layers"] == pytest.approx(mean_layers(played("drifting")))
    assert summary["breach_rate"] > 0.05
    assert summary["agreement"] < 1.0
    assert summary["weight_bytes_peak"] == setup.profile.model("opt-6.7b").model.weight_bytes(32)
    assert summary["weight_bytes_loaded"] < summary["weight_bytes_peak"]
    shares = [share for exits in summary["exit_histogram"].values() for share in exits.values()]
    assert sum(shares) == pytest.approx(1.0)
