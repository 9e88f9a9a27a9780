"""A policy's own hot rules: the loop asks them, compiled or interpreted, with equal results."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from helios_sim.experiment import Result, prepare, run_policy
from helios_sim.hot_rules import InterpretedRuleWarning, loop_with
from helios_sim.policy import rules
from helios_sim.scenario import parse_scenario

POLICY = """
from helios_sim.policy.helios import Helios

LIMITS = {{"batch": {limit}}}

def may_join(num_running, max_batch, needed_blocks, free_blocks, watermark_blocks):
    {body}

class Own(Helios):
    hot_rules = {{"may_join": may_join}}
"""
AS_OURS = """if num_running >= max_batch:
        return False
    if num_running == 0:
        return needed_blocks <= free_blocks
    return needed_blocks + watermark_blocks <= free_blocks"""
FEWER = "max_batch = min(max_batch, 2)\n    " + AS_OURS
UNCOMPILABLE = 'max_batch = min(max_batch, LIMITS.get("batch", 1))\n    ' + AS_OURS


def run(folder: Path, use: str, max_batch: int = 8) -> Result:
    """Sixty requests on the published pair, reassessed every twenty."""
    data = {
        "name": "own",
        "workload": {
            "num_requests": 60,
            "arrivals": {"kind": "poisson", "rate_per_s": 6.0},
            "prompt": {"kind": "constant", "tokens": 100},
            "output": {"kind": "uniform", "min_tokens": 5, "max_tokens": 60},
        },
        "fleet": {"profile": "opt-a100-40gb"},
        "serving": {"max_batch": max_batch},
        "policy": [{"use": use, "reassess_requests": 20}],
    }
    scenario = parse_scenario(data, "test", folder)
    return run_policy(prepare(scenario, folder), scenario.policy[0])


def own_policy(folder: Path, body: str, limit: int = 1000) -> str:
    """A policy file with a rule of its own."""
    name = f"own_{abs(hash((body, limit)))}"
    (folder / f"{name}.py").write_text(POLICY.format(body=body, limit=limit), encoding="utf-8")
    return f"{name}:Own"


def test_a_compiled_rule_that_admits_fewer_is_obeyed_and_changes_nothing_else(
    tmp_path: Path,
) -> None:
    """As if the scenario allowed no more; one loop is compiled, which takes its time."""
    ours = run(tmp_path, "helios", max_batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InterpretedRuleWarning)
        theirs = run(tmp_path, own_policy(tmp_path, FEWER))
    assert theirs.run.totals.max_running == 2
    assert theirs.run.requests.equals(ours.run.requests)


def test_a_rule_numba_cannot_compile_runs_interpreted_with_equal_results(tmp_path: Path) -> None:
    ours = run(tmp_path, "helios")
    with pytest.warns(InterpretedRuleWarning, match="may_join"):
        theirs = run(tmp_path, own_policy(tmp_path, UNCOMPILABLE))
    assert theirs.run.requests.equals(ours.run.requests)
    assert theirs.run.timeline.equals(ours.run.timeline)


def test_our_rules_are_back_in_place_afterwards() -> None:
    before = rules.watch_sliding
    loop_with({"watch_sliding": lambda ring, seen, breaches, breached, limit: (0, 0, False)})
    assert rules.watch_sliding is before
