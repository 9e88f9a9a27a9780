"""A policy's own hot rules: the loop asks them, compiled or interpreted, with equal results."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from helios_sim.experiment import Result, prepare, run_policy
from helios_sim.loop import hot_rules
from helios_sim.loop.hot_rules import InterpretedRuleWarning, fingerprint, loop_with
from helios_sim.loop.queues import push_waiting_last
from helios_sim.loop.state import SLIDING, World
from helios_sim.loop.world import build_world, trace_tables
from helios_sim.policy import rules
from helios_sim.policy.baselines import Vanilla
from helios_sim.policy.contract import Watching
from helios_sim.scenario import parse_scenario
from tests.engine.factories import drifting_requests, drifting_setup, play, play_policy

POLICIES = Path(__file__).parents[1] / "policies"

Rule = Callable[[float, float], bool]

POLICY = """
from helios_sim.policy.helios import Helios

LIMITS = {"batch": 1000}

def may_join(num_running, max_batch, needed_blocks, free_blocks, watermark_blocks):
    max_batch = min(max_batch, LIMITS.get("batch", 1))
    if num_running >= max_batch:
        return False
    if num_running == 0:
        return needed_blocks <= free_blocks
    return needed_blocks + watermark_blocks <= free_blocks

class Own(Helios):
    hot_rules = {"may_join": may_join}
"""


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


def test_a_compiled_rule_that_admits_fewer_is_obeyed_and_changes_nothing_else(
    tmp_path: Path,
) -> None:
    """As if the scenario allowed no more; one loop is compiled, which takes its time."""
    ours = run(tmp_path, "helios", max_batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InterpretedRuleWarning)
        theirs = run(POLICIES, "at_most_two:AtMostTwo")
    assert theirs.run.totals.max_running == 2
    assert theirs.run.requests.equals(ours.run.requests)


def test_a_loop_with_own_rules_is_found_on_disk_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that has not met the rules yet takes the loop from the cache, compiling nothing."""
    first = run(POLICIES, "at_most_two:AtMostTwo")
    monkeypatch.setattr(hot_rules, "_loops", {})
    second = run(POLICIES, "at_most_two:AtMostTwo")
    (loop,) = hot_rules._loops.values()
    assert sum(loop.advance.stats.cache_hits.values()) > 0
    assert not loop.advance.stats.cache_misses
    assert second.run.requests.equals(first.run.requests)


def test_a_rule_numba_cannot_compile_runs_interpreted_with_equal_results(tmp_path: Path) -> None:
    ours = run(tmp_path, "helios")
    (tmp_path / "uncompilable.py").write_text(POLICY, encoding="utf-8")
    with pytest.warns(InterpretedRuleWarning, match="may_join"):
        theirs = run(tmp_path, "uncompilable:Own")
    assert theirs.run.requests.equals(ours.run.requests)
    assert theirs.run.timeline.equals(ours.run.timeline)


LIMIT = 3
SCALES = {"half": 0.5}


def below_limit(confidence: float, threshold: float) -> bool:
    """Refers to a number and to a built-in function."""
    return abs(confidence - threshold) < LIMIT


def through_another(confidence: float, threshold: float) -> bool:
    """Refers to a function that refers to a number."""
    return below_limit(confidence, threshold)


def by_table(confidence: float, threshold: float) -> bool:
    """Refers to a table, whose contents its code does not tell."""
    return confidence >= threshold * SCALES["half"]


def closing_over(scale: Any) -> Rule:
    def leaves_here(confidence: float, threshold: float) -> bool:
        return confidence >= threshold * scale

    return leaves_here


def with_default(scale: float) -> Rule:
    def leaves_here(confidence: float, threshold: float, *, scale: float = scale) -> bool:
        return confidence >= threshold * scale

    return leaves_here


@pytest.mark.parametrize("rule", [below_limit, through_another])
def test_a_number_that_a_rule_refers_to_is_part_of_what_it_means(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint({"leaves_here": rule})
    assert before is not None and before == fingerprint({"leaves_here": rule})
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert fingerprint({"leaves_here": rule}) not in (before, None)


def test_rules_of_one_code_that_close_over_other_numbers_differ() -> None:
    prints = {fingerprint({"leaves_here": closing_over(scale)}) for scale in (0.5, 0.5, 0.9)}
    assert len(prints) == 2 and None not in prints


def test_rules_of_one_code_whose_arguments_by_name_have_other_defaults_differ() -> None:
    prints = {fingerprint({"leaves_here": with_default(scale)}) for scale in (0.5, 0.5, 0.9)}
    assert len(prints) == 2 and None not in prints


def test_a_method_of_a_value_does_not_tell_what_the_value_is() -> None:
    for table in ({1.0: True}, {1.0: False}):
        assert fingerprint({"leaves_here": closing_over(table.get)}) is None


def test_the_same_function_for_another_rule_is_another_loop() -> None:
    names = ("leaves_here", "is_breach")
    assert len({fingerprint({name: below_limit}) for name in names}) == 2


def test_a_rule_that_refers_to_a_table_is_compiled_for_each_run() -> None:
    assert fingerprint({"leaves_here": by_table}) is None


def beyond_the_ring(
    ring: Any, num_seen: int, num_breaches: int, breached: bool, breach_limit: int
) -> tuple[int, int, bool]:
    """Forgets that the ring has an end."""
    ring[num_seen] = breached
    return num_seen + 1, num_breaches, False


def hot_rule_world() -> World:
    """A replica of the toy models that has done nothing yet, with a breach window of five."""
    setup = drifting_setup()
    names = setup.candidates
    tables = trace_tables(setup.traces, names, dict.fromkeys(names, 0.5))
    watching = Watching(breach_window_tokens=5, breach_limit=9, window_kind="sliding")
    requests = drifting_requests(2)
    return build_world(
        requests, setup.profile, names, tables, setup.serving, setup.measure, watching, 1
    )


def test_a_compiled_rule_that_writes_beyond_the_ring_is_stopped() -> None:
    """Unchecked it would write into whatever lies behind."""
    loop = loop_with({"watch_sliding": beyond_the_ring})
    world = hot_rule_world()
    rep = world.replicas[0]
    rep.window_kind, rep.window_tokens = SLIDING, 3
    for _ in range(3):
        loop.watch(world, 0, rep, True)
    assert loop.watch.signatures, "the rule is compiled"
    with pytest.raises(IndexError):
        loop.watch(world, 0, rep, True)
    assert world.window[0, :4].tolist() == [1, 1, 1, 0]


def dividing(
    ring: Any, num_seen: int, num_breaches: int, breached: bool, breach_limit: int
) -> tuple[int, int, bool]:
    """Has no share of the first token."""
    return num_seen + 1, num_breaches, breach_limit / num_seen > 99.0


def dividing_by_lists(
    ring: Any, num_seen: int, num_breaches: int, breached: bool, breach_limit: int
) -> tuple[int, int, bool]:
    """The same, in a way that nobody compiles."""
    return num_seen + 1, num_breaches, sum([breach_limit / num_seen]) > 99.0


@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
@pytest.mark.parametrize("rule", [dividing, dividing_by_lists])
def test_a_rule_that_divides_by_zero_is_stopped_as_in_python(rule: Any) -> None:
    """Compiled as the loop is, it would decide by infinity; so would numpy's own numbers."""
    loop = loop_with({"watch_sliding": rule})
    world = hot_rule_world()
    rep = world.replicas[0]
    rep.window_kind, rep.window_tokens = SLIDING, 3
    with pytest.raises(ArithmeticError):
        loop.watch(world, 0, rep, True)


def everybody(
    num_running: int,
    max_batch: int,
    needed_blocks: int,
    free_blocks: int,
    watermark_blocks: int,
) -> bool:
    return True


def test_a_compiled_rule_is_not_asked_for_rows_or_blocks_that_there_are_not() -> None:
    loop = loop_with({"may_join": everybody})
    world = hot_rule_world()
    rep = world.replicas[0]
    rep.quota, rep.batch_limit, rep.pool_blocks, rep.free_blocks = 9, 4, 50, 50
    push_waiting_last(world, rep, 0)
    assert loop.next_may_join(world, 0, rep)
    rep.num_rows = 4
    assert not loop.next_may_join(world, 0, rep)
    rep.num_rows, rep.free_blocks = 3, 0
    assert not loop.next_may_join(world, 0, rep)


def counts_in_a_list(
    num_running: int,
    max_batch: int,
    needed_blocks: int,
    free_blocks: int,
    watermark_blocks: int,
) -> bool:
    return sum([num_running, 1]) <= max_batch


def test_a_rule_that_needs_memory_which_the_loop_does_not_manage_runs_interpreted() -> None:
    """A list compiles alone, but not within a loop that counts no references."""
    with pytest.warns(InterpretedRuleWarning, match="may_join"):
        loop_with({"may_join": counts_in_a_list})


def test_what_numba_does_not_take_for_a_function_runs_interpreted() -> None:
    with pytest.warns(InterpretedRuleWarning, match="leaves_here"):
        loop_with({"leaves_here": operator.ge})


def seldom_sure(confidence: float, threshold: float, at_full_depth: bool) -> bool:
    """Breaches at full depth too; numba cannot compile it."""
    return {True: True}.get(confidence < threshold + 0.2, False)


class Doubtful(Vanilla):
    """Serves at full depth and counts what it finds doubtful there."""

    hot_rules: ClassVar[dict[str, Any]] = {"is_breach": seldom_sure}


@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
def test_what_a_rule_finds_in_breach_at_full_depth_is_counted_token_by_token() -> None:
    """Of ours nothing breaches there; the timeline counts what the requests do."""
    requests = drifting_requests(20)
    _, ours = play(drifting_setup(), requests, "vanilla")
    assert ours.requests["breaches"].sum() == ours.timeline["breaches"].sum() == 0
    _, theirs = play_policy(drifting_setup(), requests, Doubtful)
    breaches = theirs.requests["breaches"].sum()
    assert 0 < breaches < theirs.requests["generated_tokens"].sum()
    assert theirs.timeline["breaches"].sum() == breaches


def test_our_rules_are_back_in_place_afterwards() -> None:
    before = rules.watch_sliding
    loop_with({"watch_sliding": lambda ring, seen, breaches, breached, limit: (0, 0, False)})
    assert rules.watch_sliding is before
