"""The compiled batch loop agrees with the naive reference engine to the last bit."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_sim.loop import batch, state
from helios_sim.loop.hot_rules import loop_with
from helios_sim.policy import rules
from tests import worlds
from tests.naive_engine import NaiveReplica
from tests.worlds import CompiledReplica, Scenario, many_examples, play, scenarios, world_bytes

STATUS = {
    state.UNSENT: "unsent",
    state.WAITING: "waiting",
    state.RUNNING: "running",
    state.FINISHED: "finished",
    state.REFUSED: "refused",
}


def compiled_lives(world: state.World) -> list[tuple[Any, ...]]:
    """What became of each request in the compiled loop."""

    def time(value: float) -> float | None:
        return None if math.isnan(value) else float(value)

    return [
        (
            STATUS[int(request.status)],
            float(request.arrival_s),
            time(request.admitted_s),
            time(request.first_token_s),
            time(request.finished_s),
            *(
                int(request[name])
                for name in (
                    "generated",
                    "preemptions",
                    "agree",
                    "nll",
                    "breaches",
                    "relative_breaches",
                    "decoded",
                    "executed_layers",
                )
            ),
        )
        for request in world.requests
    ]


def naive_lives(replica: NaiveReplica) -> list[tuple[Any, ...]]:
    """What became of each request in the naive engine."""
    return [
        (
            life.status,
            life.arrival_s,
            life.admitted_s,
            life.first_token_s,
            life.finished_s,
            life.generated,
            life.preemptions,
            life.agree,
            life.nll,
            life.breaches,
            life.relative_breaches,
            life.decoded,
            life.executed_layers,
        )
        for life in replica.lives
    ]


def gap_bin(gap_s: float) -> int:
    """The pooled histogram's bin of an inter-token gap: even steps within each octave."""
    if gap_s <= 0.0:
        return 0
    octave = math.floor(math.log2(gap_s))
    while 2.0**octave > gap_s:
        octave -= 1
    while 2.0 ** (octave + 1) <= gap_s:
        octave += 1
    step = int((gap_s / 2.0**octave - 1.0) * state.ITL_BINS_PER_OCTAVE)
    place = (octave + 1 - state.ITL_SMALLEST_EXPONENT) * state.ITL_BINS_PER_OCTAVE + step
    return min(max(place, 0), state.ITL_BINS_PER_OCTAVE * state.ITL_OCTAVES - 1)


@many_examples
@given(scenario=scenarios())
def test_both_engines_agree_to_the_last_bit(scenario: Scenario) -> None:
    """Stops, every request's life, energy, times and counts are equal, not merely close."""
    check_agreement(scenario)


@many_examples
@given(scenario=scenarios(splitting=True))
def test_both_engines_agree_where_batches_split(scenario: Scenario) -> None:
    """The same holds where rebatching holds rows back, carries tokens on and preempts both."""
    check_agreement(scenario)


def whoever_comes(num_running: int, max_batch: int, needed: int, free: int, watermark: int) -> bool:
    """A rule that looks at nothing a replica has, and that numba cannot compile."""
    return bool({"anybody": True}.get("anybody", needed))


@settings(many_examples, max_examples=20)
@given(scenario=scenarios())
@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
def test_both_engines_agree_on_what_there_is_where_a_rule_would_admit_more(
    scenario: Scenario,
) -> None:
    """The loop runs interpreted, where rows that are not there end it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "batch", loop_with({"may_join": whoever_comes}))
        patch.setattr(rules, "may_join", whoever_comes)
        # Only compiled sums of 32 and 64 bits have 64.
        length = len(scenario.models[0].traces[0])
        sent = (replace(one, trace_start=one.trace_start % length) for one in scenario.requests)
        check_agreement(replace(scenario, requests=tuple(sent)))


def nearly(confidence: float, threshold: float, at_full_depth: bool) -> bool:
    """A rule that also counts the confident, which numba cannot compile."""
    return {True: True}.get(confidence < threshold + 0.2, False)


@settings(many_examples, max_examples=20)
@given(scenario=scenarios())
@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
def test_both_engines_ask_a_rule_of_breaches_for_the_same_tokens(scenario: Scenario) -> None:
    """At full depth too, and nowhere before the loaded depth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "batch", loop_with({"is_breach": nearly}))
        patch.setattr(rules, "is_breach", nearly)
        # Only compiled sums of 32 and 64 bits have 64.
        length = len(scenario.models[0].traces[0])
        sent = (replace(one, trace_start=one.trace_start % length) for one in scenario.requests)
        check_agreement(replace(scenario, requests=tuple(sent)))


def check_agreement(scenario: Scenario) -> None:
    """Run a scenario in both engines and compare all there is to see."""
    compiled, naive = CompiledReplica(scenario), NaiveReplica(scenario)
    assert play(compiled, scenario) == play(naive, scenario)
    batch.settle_all(compiled.world, 0)
    assert compiled_lives(compiled.world) == naive_lives(naive)
    record = compiled.record
    assert float(record.energy_j) == naive.energy_j
    assert float(record.idle_energy_j) == naive.idle_energy_j
    assert float(record.idle_s) == naive.idle_s
    assert float(record.busy_s) == naive.busy_s
    assert int(record.num_iterations) == naive.num_iterations
    assert int(record.num_breaches) == naive.num_breaches
    assert int(record.num_tokens) == naive.num_emitted
    assert int(record.free_blocks) == naive.free_blocks
    assert int(record.nll) == sum(life.nll for life in naive.lives)
    assert int(record.executed_layers) == sum(life.executed_layers for life in naive.lives)
    counts = compiled.world.exit_counts[0]
    for model, expected in enumerate(naive.exit_counts):
        assert counts[model, : len(expected)].tolist() == expected
    bins = Counter(gap_bin(gap_s) for gap_s in naive.gaps_s)
    assert dict(enumerate(compiled.world.itl_counts[0])) == {
        place: bins[place] for place in range(compiled.world.itl_counts.shape[1])
    }
    assert math.isclose(float(record.itl_sum_s), math.fsum(naive.gaps_s), rel_tol=1e-9)
    squares = math.fsum(gap_s * gap_s for gap_s in naive.gaps_s)
    assert math.isclose(float(record.itl_sum_square_s2), squares, rel_tol=1e-9)
    check_sums(record, naive)


def check_sums(record: Any, naive: NaiveReplica) -> None:
    """What the compiled loop adds up over time and over requests is what the naive lives say."""
    assert float(record.batch_seconds) == naive.batch_seconds
    assert float(record.kv_block_seconds) == naive.kv_block_seconds
    assert int(record.max_rows) == naive.max_running
    statuses = Counter(life.status for life in naive.lives)
    assert int(record.num_finished) == int(record.period_finished) == statuses["finished"]
    assert int(record.num_refused) == statuses["refused"]
    assert int(record.num_preemptions) == sum(life.preemptions for life in naive.lives)
    ttfts_s, tpots_s = [], []
    for life in naive.lives:
        if life.finished_s is not None and life.first_token_s is not None:
            ttfts_s.append(life.first_token_s - life.arrival_s)
            if life.sent.output > 1:
                tpots_s.append((life.finished_s - life.first_token_s) / (life.sent.output - 1))
    assert int(record.period_tpots) == len(tpots_s)
    assert math.isclose(float(record.ttft_sum_s), math.fsum(ttfts_s), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(float(record.tpot_sum_s), math.fsum(tpots_s), rel_tol=1e-9, abs_tol=1e-9)


class SettlingReplica(CompiledReplica):
    """A compiled replica whose requests are brought up to date at every cut."""

    def at_cut(self) -> None:
        batch.settle_all(self.world, 0)


def random_cuts(seed: int, end_s: float) -> list[float]:
    """Times to cut a run at, some of them on the grid on which events may coincide."""
    rng = random.Random(seed)
    cuts = [rng.uniform(0.0, 1.1 * end_s) for _ in range(rng.randint(1, 60))]
    return cuts + [round(64.0 * cut_s) / 64.0 for cut_s in cuts[::2]]


@many_examples
@given(scenario=scenarios(), seed=st.integers(0, 2**32 - 1))
def test_cutting_the_advance_anywhere_changes_no_bit(scenario: Scenario, seed: int) -> None:
    """Advancing to random horizons one after the other ends in the same bytes as one advance."""
    whole = CompiledReplica(scenario)
    stops = play(whole, scenario)
    parts = CompiledReplica(scenario, random_cuts(seed, whole.now_s()))
    assert play(parts, scenario) == stops
    assert world_bytes(parts.world) == world_bytes(whole.world)


@many_examples
@given(scenario=scenarios(), seed=st.integers(0, 2**32 - 1))
def test_settling_at_any_cut_changes_no_result(scenario: Scenario, seed: int) -> None:
    """Requests may be brought up to date at any time; what becomes of them is the same."""
    whole = CompiledReplica(scenario)
    stops = play(whole, scenario)
    parts = SettlingReplica(scenario, random_cuts(seed, whole.now_s()))
    assert play(parts, scenario) == stops
    for replica in (whole, parts):
        batch.settle_all(replica.world, 0)
    assert compiled_lives(parts.world) == compiled_lives(whole.world)
    for name in ("nll", "executed_layers", "num_breaches"):
        assert parts.record[name] == whole.record[name]
