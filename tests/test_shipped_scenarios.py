"""The scenarios that come with the program: all can be run; the paper's keeps its direction."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from helios_sim.experiment import prepare, run_policy
from helios_sim.fidelity.sides import scenario_of
from helios_sim.runs.records import write_run
from helios_sim.scenario import load_scenario

SCENARIOS = Path(__file__).parents[1] / "scenarios"


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_scenario_asks_a_question_and_can_be_prepared(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.name == path.stem
    assert scenario.question.endswith("?")
    requests, _ = prepare(scenario, path.parent).requests(scenario.seed)
    assert len(requests) >= 1000


def test_a_run_of_a_scenario_with_published_figures_is_its_own_question(tmp_path: Path) -> None:
    scenario = load_scenario(SCENARIOS / "helios_opt.toml", ["workload.num_requests=30"])
    policy = scenario.policy[0]
    assert any(entry.policy != policy.name for entry in scenario.published)
    first = run_policy(prepare(scenario, SCENARIOS), policy)
    write_run(first.run, first.summary, tmp_path / "first")
    again = load_scenario(tmp_path / "first" / "scenario.toml")
    second = run_policy(prepare(again, SCENARIOS), again.policy[0])
    assert second.summary == first.summary
    assert scenario_of(first.run, tmp_path / "first") == again


@cache
def paper_experiment() -> dict[str, dict[str, Any]]:
    """The paper's experiment at batch 1, summaries by policy."""
    path = SCENARIOS / "helios_opt.toml"
    scenario = load_scenario(path)
    experiment = prepare(scenario, path.parent)
    return {policy.name: run_policy(experiment, policy).summary for policy in scenario.policy}


def test_helios_gains_over_every_single_model_at_batch_1() -> None:
    """Throughput, response time, TPOT and energy: the direction of the paper's comparison."""
    summaries = paper_experiment()
    helios = summaries["helios"]
    for other in ("early exits OPT-1.3B", "early exits OPT-6.7B", "vanilla OPT-6.7B"):
        assert helios["output_throughput"] > summaries[other]["output_throughput"]
        assert helios["median_ttft_ms"] < summaries[other]["median_ttft_ms"]
        assert helios["mean_tpot_ms"] < summaries[other]["mean_tpot_ms"]
        assert helios["energy_per_output_token"] < summaries[other]["energy_per_output_token"]


def test_the_reason_is_that_fewer_layers_run_and_every_layer_is_launch_bound() -> None:
    summaries = paper_experiment()
    layers = {name: summary["mean_executed_layers"] for name, summary in summaries.items()}
    assert layers["helios"] < layers["early exits OPT-1.3B"] < layers["early exits OPT-6.7B"]
    assert all(summary["regime"]["launch"] > 0.95 for summary in summaries.values())


def test_single_models_leave_where_table_4_says() -> None:
    histogram = paper_experiment()["early exits OPT-1.3B"]["exit_histogram"]["opt-1.3b"]
    assert histogram["6"] == pytest.approx(0.730, abs=0.01)
    assert histogram["24"] == pytest.approx(0.223, abs=0.01)


def test_the_ablation_orders_as_the_paper_does() -> None:
    """Switch-only is the fastest and loses quality; load-only is accurate and slow."""
    summaries = paper_experiment()
    switch, load = summaries["switch-only"], summaries["load-only"]
    assert switch["output_throughput"] > load["output_throughput"]
    assert switch["agreement"] < load["agreement"]


def test_unloaded_layers_become_room_for_requests() -> None:
    """The batch that fits grows at least as the KV of a token shrinks."""
    summaries = paper_experiment()
    ratio = (
        summaries["helios"]["max_batch_size_supported"]
        / summaries["early exits OPT-6.7B"]["max_batch_size_supported"]
    )
    assert ratio > 32 / 9
