"""Laws that hold of the compiled batch loop at every instant, whatever it serves."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from helios_sim.loop import batch, state
from helios_sim.loop.memory import blocks_for, used_blocks
from helios_sim.loop.queues import next_inbox
from helios_sim.loop.rows import full_rows, row_context
from tests.worlds import (
    CAUSES,
    CompiledReplica,
    Scenario,
    inbox_of,
    linked,
    many_examples,
    play,
    scenarios,
    world_bytes,
)


class SteppedReplica(CompiledReplica):
    """A compiled replica stopped after every event and, once, within every iteration."""

    share = 0.5
    """How far into an iteration it is stopped."""

    def advance(self, horizon_s: float) -> str:
        cause = state.AT_HORIZON
        while cause == state.AT_HORIZON:
            self.start_what_may_start(horizon_s)
            self.before_event()
            cut_s = min(self.next_event_s(), horizon_s)
            if self.in_iteration():
                start_s, end_s = float(self.record.now_s), float(self.record.end_s)
                self.cut_at(min(start_s + self.share * (end_s - start_s), cut_s))
            cause = self.cut_at(cut_s)
            self.after_event(cause, cut_s)
            if max(cut_s, self.now_s()) >= horizon_s:
                break
        return CAUSES[cause]

    def cut_at(self, cut_s: float) -> int:
        """Advance to a cut and look at the world there."""
        cause = int(batch.advance(self.world, 0, cut_s))
        self.at_cut()
        return cause

    def start_what_may_start(self, horizon_s: float) -> None:
        """Let work that waits at this instant begin."""
        if not self.in_iteration():
            self.cut_at(min(math.nextafter(float(self.record.now_s), math.inf), horizon_s))

    def next_event_s(self) -> float:
        """Just after the next iteration's end or, idle, the next arrival."""
        record = self.record
        if self.in_iteration():
            return math.nextafter(float(record.end_s), math.inf)
        if record.num_inbox == 0:
            return math.inf
        arrival_s = float(self.world.requests[next_inbox(self.world, record)].arrival_s)
        return math.nextafter(arrival_s, math.inf)

    def before_event(self) -> None:
        """Called before the next event takes place."""

    def after_event(self, cause: int, cut_s: float) -> None:
        """Called once it has, or once `cut_s` has come."""


class CountedReplica(SteppedReplica):
    """Counts every request at every cut."""

    def at_cut(self) -> None:
        record, requests = self.record, self.world.requests
        waiting = linked(requests, record.waiting_head)
        to_come = inbox_of(requests, record)
        running = self.world.rows[0][self.world.order[0, : record.num_rows]].request.tolist()
        numbers = {
            state.WAITING: record.num_waiting,
            state.RUNNING: record.num_rows,
            state.FINISHED: record.num_finished,
            state.REFUSED: record.num_refused,
        }
        for status, number in numbers.items():
            assert np.count_nonzero(requests.status == status) == number
        assert sorted(waiting) == np.flatnonzero(requests.status == state.WAITING).tolist()
        assert sorted(running) == np.flatnonzero(requests.status == state.RUNNING).tolist()
        assert len(to_come) == record.num_inbox
        queued = [requests[i] for i in waiting + to_come]
        needed = [
            blocks_for(int(one.prompt + one.generated), int(record.block_tokens)) for one in queued
        ]
        assert sum(needed) == record.queued_blocks
        unsent, dealt = list(to_come), int(record.dealt_head)
        while dealt != state.NOBODY:
            unsent.append(dealt)
            dealt = int(requests.next[dealt])
        assert sorted(unsent) == np.flatnonzero(requests.status == state.UNSENT).tolist()
        assert len(requests) == len(unsent) + sum(int(number) for number in numbers.values())


class TimedReplica(SteppedReplica):
    """Checks the order of every request's times at every cut."""

    def at_cut(self) -> None:
        requests, now_s = self.world.requests, float(self.record.now_s)
        times = [
            requests[name] for name in ("arrival_s", "admitted_s", "first_token_s", "finished_s")
        ]
        sent = requests.status != state.UNSENT
        assert np.all(requests.arrival_s[sent] <= now_s)
        for earlier, later in itertools.pairwise(times):
            known = ~np.isnan(later)
            assert np.all(earlier[known] <= later[known])
            assert np.all(later[known] <= now_s)
        finished = requests.status == state.FINISHED
        assert np.array_equal(finished, ~np.isnan(requests.finished_s))
        assert np.array_equal(requests.generated[finished], requests.output[finished])
        assert np.all(requests.generated <= requests.output)


class BlockReplica(SteppedReplica):
    """Adds up the blocks of all rows at every cut."""

    def at_cut(self) -> None:
        record = self.record
        all_decode = record.phase in (state.DECODING, state.MIXED)
        all_decode = all_decode and record.exit_mode != state.REBATCH
        held_blocks = num_full = 0
        for row in self.world.rows[0][self.world.order[0, : record.num_rows]]:
            # A token under way has its place in the KV cache from its start.
            ready = row.to_prefill == 0
            under_way = (all_decode and ready) or row.held > 0 or row.leaves_at > 0
            context = int(row_context(record, row))
            tokens = context + int(row.to_prefill) + int(under_way)
            held_blocks += blocks_for(tokens, int(record.block_tokens))
            num_full += int(ready and row.held == 0 and context % record.block_tokens == 0)
        assert full_rows(self.world, 0, record) == num_full
        assert used_blocks(record) == held_blocks
        assert record.free_blocks >= 0
        assert record.staged_blocks >= 0
        assert record.free_blocks + record.staged_blocks + held_blocks == record.pool_blocks
        assert record.num_rows <= record.max_batch + record.max_held


class LongestReplica(SteppedReplica):
    """Looks for the longest decoding row at every cut."""

    def at_cut(self) -> None:
        record = self.record
        rows = self.world.rows[0][self.world.order[0, : record.num_ready]]
        contexts = [int(row_context(record, row)) for row in rows]
        assert sum(contexts) == record.context_sum
        if contexts and record.longest_lead != state.UNKNOWN:
            assert record.longest_lead + record.ticks == max(contexts)


class BusyReplica(SteppedReplica):
    """Looks at the head of the queue whenever the replica idles."""

    def after_event(self, cause: int, cut_s: float) -> None:
        record = self.record
        asks = cause not in (state.AT_HORIZON, state.OUT_OF_WORK)
        if asks or self.in_iteration() or record.now_s >= cut_s:
            return
        assert record.num_rows == 0
        if record.num_waiting > 0 and record.quota > 0 and not record.draining:
            head = self.world.requests[record.waiting_head]
            tokens = int(head.prompt + head.generated)
            assert blocks_for(tokens, int(record.block_tokens)) > record.free_blocks


class MeteredReplica(SteppedReplica):
    """Meters every interval on its own."""

    def before_event(self) -> None:
        record = self.record
        self.before = (float(record.energy_j), float(record.idle_s), float(record.now_s))
        self.interval_j = float(record.iteration_j) if self.in_iteration() else None
        self.interval_end_s = float(record.end_s)

    def after_event(self, cause: int, cut_s: float) -> None:
        record = self.record
        energy_j, idle_s, now_s = self.before
        if record.now_s == now_s:
            assert record.energy_j == energy_j
            return
        if self.interval_j is None:
            gap_s = float(record.now_s) - now_s
            self.interval_j = float(record.idle_w) * gap_s
            assert record.idle_s == idle_s + gap_s
        else:
            assert record.now_s == self.interval_end_s
            assert record.idle_s == idle_s
        assert self.interval_j >= 0.0
        assert record.energy_j == energy_j + self.interval_j


splitting_or_not = scenarios() | scenarios(splitting=True)
"""What rows hold while they wait at an exit shows only where batches split."""


@many_examples
@given(scenario=scenarios(), share=st.floats(0.0, 1.0))
def test_every_request_is_in_one_place_at_every_cut(scenario: Scenario, share: float) -> None:
    """Submitted = finished + running + waiting + refused + not yet arrived."""
    replica = CountedReplica(scenario)
    replica.share = share
    play(replica, scenario)


@many_examples
@given(scenario=scenarios())
def test_causes_come_before_effects_at_every_cut(scenario: Scenario) -> None:
    """Arrival, admission, first token and end follow one another, and none lies ahead of now."""
    play(TimedReplica(scenario), scenario)


@many_examples
@given(scenario=splitting_or_not, share=st.floats(0.0, 1.0))
def test_free_and_used_blocks_make_the_pool_at_every_cut(scenario: Scenario, share: float) -> None:
    """Used blocks are the sum over the rows; none are negative."""
    replica = BlockReplica(scenario)
    replica.share = share
    play(replica, scenario)


@many_examples
@given(scenario=splitting_or_not)
def test_the_contexts_summed_and_the_longest_are_those_of_the_rows(scenario: Scenario) -> None:
    """The longest is known or said to be unknown, never wrong."""
    play(LongestReplica(scenario), scenario)


@many_examples
@given(scenario=scenarios())
def test_no_replica_idles_while_the_head_of_its_queue_may_run(scenario: Scenario) -> None:
    """An idle replica runs nothing, and whoever waits is held back by quota or by memory."""
    play(BusyReplica(scenario), scenario)


@many_examples
@given(scenario=scenarios(with_steps=False))
def test_left_alone_a_replica_works_whenever_a_request_is_in_it(scenario: Scenario) -> None:
    """Busy time is exactly the time at which a request that it serves has arrived and not ended."""
    replica = CompiledReplica(scenario)
    assert play(replica, scenario)[-1][0] == "out-of-work"
    requests = replica.world.requests
    served = requests[requests.status == state.FINISHED]
    covered_s, until_s = 0.0, 0.0
    for request in served[np.argsort(served.arrival_s, kind="stable")]:
        start_s = max(until_s, float(request.arrival_s))
        covered_s += max(0.0, float(request.finished_s) - start_s)
        until_s = max(until_s, float(request.finished_s))
    assert math.isclose(float(replica.record.busy_s), covered_s, rel_tol=1e-9, abs_tol=1e-9)


@many_examples
@given(scenario=scenarios())
def test_energy_is_the_sum_of_its_intervals(scenario: Scenario) -> None:
    """Every iteration and every idle gap adds its own energy to the meter and nothing else does."""
    replica = MeteredReplica(scenario)
    play(replica, scenario)
    record = replica.record
    assert 0.0 <= record.idle_energy_j <= record.energy_j
    assert math.isclose(
        float(record.busy_s + record.idle_s), float(record.now_s), rel_tol=1e-9, abs_tol=1e-12
    )


@many_examples
@given(scenario=scenarios())
def test_the_same_scenario_gives_the_same_bytes(scenario: Scenario) -> None:
    """Two runs of one scenario end in worlds equal byte by byte."""
    first, second = CompiledReplica(scenario), CompiledReplica(scenario)
    assert play(first, scenario) == play(second, scenario)
    assert world_bytes(first.world) == world_bytes(second.world)
