"""The SimPy world: arrivals, routing, replicas, weight transfers and the policy's decisions.

SimPy owns time and every event at which somebody decides; between two of them the compiled batch
loop carries a replica on. A replica's life reads as the paper does: ask the policy, carry its
decision out, serve until it has to be asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from simpy.events import NORMAL, URGENT

from helios_sim.cards import Room, candidate_card, confidence_thresholds
from helios_sim.exits import ExitTraces
from helios_sim.garbage import uncollected
from helios_sim.loop.hot_rules import loop_with
from helios_sim.loop.memory import resize_pool, stage_blocks
from helios_sim.loop.state import (
    AT_HORIZON,
    BETWEEN,
    BREACHED,
    EXIT_MODES,
    LOADING_STATE,
    OUT_OF_WORK,
    UNSENT,
    WAITING,
    World,
    live_record,
)
from helios_sim.loop.world import build_world, deal, parking_lot, trace_tables
from helios_sim.policy.contract import (
    Assignment,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    Policy,
    Slo,
)
from helios_sim.policy.failure import asked_rules, failures_in_words
from helios_sim.policy.registry import hot_rules_of
from helios_sim.policy.snapshot_json import SnapshotLog
from helios_sim.scenario import MeasureSettings
from helios_sim.steward import HOLD, Aim, PaceSums, Steward, View, event_of
from helios_sim.streams import stream
from helios_sim.workload.requests import Requests

Process = Generator[simpy.Event, Any, Any]

_BREACH_RULES = frozenset({"is_breach", "watch_tumbling", "watch_sliding"})
"""Rules of whose answers ours are known at full depth: nothing breaches, no window trips."""

_WAITS = (AT_HORIZON, OUT_OF_WORK)
"""Causes that ask nobody to decide."""


@dataclass(frozen=True, kw_only=True)
class Setup(Room):
    """All that a run of one policy needs to know; nothing of it changes while it runs."""

    traces: ExitTraces
    measure: MeasureSettings
    slo: Slo
    seed: int


@dataclass(frozen=True)
class Place:
    """What a model loaded to a depth is to a replica: its indices, its bytes, its pool."""

    model: int
    level: int
    num_exits: int
    weight_bytes: int
    pool_blocks: int
    block_bytes: int


@dataclass(slots=True)
class DecisionEntry:
    """A decision in the log; `ready_s` is filled when it has been carried out.

    `snapshot` is the replica's next line of a `SnapshotLog`.
    """

    time_s: float
    replica: int
    event: Event
    decision: Decision
    assignment: Assignment
    snapshot: str
    moved_bytes: int = 0
    ready_s: float | None = None


class Instant(simpy.Event):
    """An event that has already succeeded and is met at a later instant."""

    def __init__(self, env: simpy.Environment, delay_s: float, priority: Any) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, priority, delay_s)


class Clock:
    """SimPy's environment, with waiting to the exact instant."""

    def __init__(self) -> None:
        self.env = simpy.Environment()

    @property
    def now_s(self) -> float:
        """Simulated seconds."""
        return float(self.env.now)

    def at(self, time_s: float, *, first: bool = False) -> simpy.Event:
        """An event at exactly `time_s`; `first` puts it ahead of others of that instant.

        SimPy adds a delay to its clock, so the delay is nudged until the sum is exact.
        """
        now_s = self.now_s
        delay_s = time_s - now_s
        while now_s + delay_s < time_s:
            delay_s = math.nextafter(delay_s, math.inf)
        while now_s + delay_s > time_s:
            delay_s = math.nextafter(delay_s, -math.inf)
        return Instant(self.env, delay_s, URGENT if first else NORMAL)


@dataclass
class HostLinks:
    """The disk and the link to the GPUs that a machine's replicas share, first come first."""

    disk_free_s: float = 0.0
    link_free_s: float = 0.0
    in_memory_s: dict[str, float] = field(default_factory=dict)
    """When each model read so far is in host memory."""

    def in_memory(self, now_s: float) -> frozenset[str]:
        """Models that nobody needs the disk for."""
        return frozenset(name for name, time_s in self.in_memory_s.items() if time_s <= now_s)


class Replica:
    """One serving replica: its controller decides, this carries out and logs."""

    def __init__(self, index: int, run: Run, host: HostLinks, policy: Policy) -> None:
        self.index = index
        self.run = run
        self.host = host
        self.record = live_record(run.world.replicas, index)
        self.exit_counts = run.world.exit_counts[index]
        self.steward = Steward(run.setup, policy, run.candidates, run.setup.slo)
        self.snapshots = SnapshotLog()
        self.policy = policy
        self.block_bytes = 1
        self.period_energy_j = self.period_idle_energy_j = 0.0
        self.wake: simpy.Event | None = None
        self.totals = _ReplicaTotals()

    def live(self) -> Process:
        """Ask, carry out, serve, and ask again, until no work is left."""
        event = Event.START
        while True:
            decision = self.ask(event)
            yield from self.carry_out(decision)
            cause = yield from self.serve(math.inf)
            if cause == OUT_OF_WORK or self.is_out_of_work():
                return
            event = event_of(breached=cause == BREACHED, evaluating=bool(self.record.evaluating))

    def is_out_of_work(self) -> bool:
        """Whether no request is here or on its way, nor any to come that may be routed here.

        In a closed loop a request that ends has the next one on its way here at once.
        """
        rep = self.record
        here = rep.num_rows + rep.num_waiting + rep.num_inbox
        return bool(here == 0 and self.run.next_arrival_s == math.inf)

    def ask(self, event: Event) -> DecisionEntry:
        """Show the policy a snapshot and log what it decides."""
        if self.record.num_ready > 0:
            self.run.loop.settle_all(self.run.world, self.index)
        rep, has_energy = self.record, self.run.has_energy
        decision, assignment, snapshot = self.steward.ask(
            event,
            self.view(),
            in_memory=self.host.in_memory(rep.now_s),
            energy_j=rep.energy_j - self.period_energy_j if has_energy else None,
            idle_energy_j=rep.idle_energy_j - self.period_idle_energy_j if has_energy else None,
            foresight=self.run.foresight() if self.policy.sees_future else None,
        )
        entry = DecisionEntry(
            snapshot.now_s,
            self.index,
            event,
            decision,
            assignment,
            self.snapshots.write(snapshot),
        )
        self.run.decisions.append(entry)
        return entry

    def carry_out(self, entry: DecisionEntry) -> Process:
        """Bring the weights in, clear the rows that cannot stay, and take the assignment up."""
        steward, wanted = self.steward, entry.assignment
        if not isinstance(entry.decision, Keep):
            entry.moved_bytes = steward.missing_bytes(wanted.model, wanted.depth)
            yield from self.bring_in(entry)
            if steward.assignment != wanted or isinstance(entry.decision, Evaluate):
                yield from self.clear_rows()
            if steward.assignment != wanted:
                self.take_up(wanted)
        self.follow(steward.aim(entry.decision))
        self.begin_period()
        steward.carried_out(entry.decision, entry.time_s, self.view())
        entry.ready_s = self.record.now_s

    def bring_in(self, entry: DecisionEntry) -> Process:
        """Move the missing weights, beside the running requests if there is room for both."""
        if entry.moved_bytes == 0:
            return
        staged = math.ceil(entry.moved_bytes / self.block_bytes)
        overlaps = (
            self.run.setup.serving.overlap_loads
            and self.steward.assignment is not None
            and self.record.num_rows > 0
            and staged <= self.record.free_blocks
        )
        if not overlaps:
            yield from self.clear_rows()
        ready_s, moving_s = self.reserve_transfer(entry)
        load_j = (self.run.setup.profile.device.load_w - self.record.idle_w) * moving_s
        self.totals.energy_load_j += load_j
        if overlaps:
            self.steward.stage(entry.moved_bytes)
            stage_blocks(self.record, staged)
            self.follow(HOLD)
            self.draw_beside(load_j, ready_s)
            # The weights stay in these blocks until the pool is cut anew beside them.
            yield from self.serve(ready_s)
            self.draw_beside(0.0, ready_s)
            self.record.energy_j += load_j
        else:
            yield from self.wait_for_weights(ready_s, load_j)

    def draw_beside(self, load_j: float, ready_s: float) -> None:
        """Draw joules of moving weights evenly until `ready_s`, as far as the timeline shows."""
        rep = self.record
        seconds = ready_s - rep.now_s
        rep.moving_since_s = rep.now_s
        rep.moving_w = load_j / seconds if seconds > 0.0 else 0.0

    def wait_for_weights(self, ready_s: float, load_j: float) -> Process:
        """Do nothing until the weights are here, at idle power beside what moving them takes."""
        rep, loop, world = self.record, self.run.loop, self.run.world
        loop.sample(world, self.index, loop.state_of(self.record))
        seconds = ready_s - rep.now_s
        waiting_j = rep.idle_w * seconds
        self.totals.load_s += seconds
        self.totals.energy_load_j += waiting_j
        rep.energy_j += waiting_j + load_j
        rep.now_s = ready_s
        yield self.run.clock.at(ready_s)
        loop.sample(world, self.index, LOADING_STATE)

    def reserve_transfer(self, entry: DecisionEntry) -> tuple[float, float]:
        """Take the host's disk and link in turn.

        Returns when the weights are here, and how many seconds they moved.
        """
        loading = self.run.setup.profile.loading
        model = entry.assignment.model
        at_s = self.record.now_s
        moving_s = 0.0
        if model in self.host.in_memory_s:
            at_s = max(at_s, self.host.in_memory_s[model])
        else:
            whole = self.run.setup.profile.model(model).model
            moving_s = loading.disk.seconds(whole.weight_bytes(whole.shape.layers))
            at_s = max(at_s, self.host.disk_free_s) + moving_s
            self.host.disk_free_s = self.host.in_memory_s[model] = at_s
        link_s = loading.host.seconds(entry.moved_bytes)
        at_s = max(at_s, self.host.link_free_s) + link_s
        self.host.link_free_s = at_s
        return at_s, moving_s + link_s

    def clear_rows(self) -> Process:
        """Let no request run on: finish them, or send them back to be prefilled anew."""
        self.follow(HOLD)
        started_s = self.run.clock.now_s
        if self.run.setup.serving.on_change == "recompute":
            self.record.pausing = 1
            if self.record.phase != BETWEEN:
                yield from self.serve(math.inf)
            self.record.pausing = 0
            self.run.loop.preempt_all(self.run.world, self.index)
        elif self.record.num_rows > 0:
            self.record.draining = 1
            yield from self.serve(math.inf)
            self.record.draining = 0
        self.totals.drain_s += self.record.now_s - started_s

    def take_up(self, assignment: Assignment) -> None:
        """Run a model at a depth from now on, with a pool of what its weights leave free."""
        place = self.run.place(assignment.model, assignment.depth)
        rep, level = self.record, place.level
        rep.model = place.model
        rep.level = level
        rep.depth = assignment.depth
        rep.exit_mode = EXIT_MODES[assignment.exit_mode]
        rep.column = (
            self.run.world.exit_layers.shape[1] + level
            if assignment.exit_mode.leaves_early
            else level
        )
        rep.batch_limit = 1 if assignment.exit_mode is ExitMode.SOLO else rep.max_batch
        resize_pool(rep, place.pool_blocks)
        # Graphs hold the addresses of the weights and of the pool they were captured over.
        self.run.world.captured[self.index] = 0
        rep.window_seen = rep.window_breaches = rep.tripped = 0
        self.block_bytes = place.block_bytes
        self.steward.take_up(assignment, place.weight_bytes, rep.now_s)

    def follow(self, aim: Aim) -> None:
        """Tell the batch loop when to come back."""
        rep = self.record
        rep.evaluating = int(aim.evaluating)
        rep.quota = aim.quota
        rep.finish_target = aim.finish_target
        rep.watching = int(aim.watching)

    def serve(self, until_s: float) -> Process:
        """Serve until somebody must decide, the work runs out, or the clock reaches `until_s`."""
        cause = yield from self.work_off(until_s)
        if cause not in _WAITS:
            yield self.run.clock.at(self.record.now_s)
            return cause
        if until_s == math.inf:
            return OUT_OF_WORK
        yield self.run.clock.at(until_s)
        if self.record.phase == BETWEEN and self.record.now_s < until_s:
            self.run.loop.pass_idle_time(self.record, until_s)
        return AT_HORIZON

    def work_off(self, until_s: float) -> Process:
        """Carry on what is here and what is routed here before `until_s`; returns what ended it."""
        run = self.run
        while True:
            cause = self.advance(min(until_s, run.next_arrival_s))
            if cause not in _WAITS or run.next_arrival_s >= until_s:
                return cause
            cause = yield from self.park(until_s)
            if cause not in _WAITS:
                return cause

    def advance(self, limit_s: float) -> int:
        """Let the loop carry this replica on to `limit_s` in slices; returns why it stopped."""
        run, rep = self.run, self.record
        cut_s = rep.now_s
        while True:
            # The cut moves on even where an iteration or an idle time outlasts the slice.
            cut_s = max(cut_s, rep.now_s) + max(run.slice_s, rep.now_s / 200)
            cause = int(run.advance(run.world, self.index, min(limit_s, cut_s)))
            if cause != AT_HORIZON or cut_s >= limit_s:
                return cause
            run.report_progress()

    def park(self, until_s: float) -> Process:
        """Let arriving requests carry this replica on, with the others; returns what stopped it."""
        parking = self.run.parking
        parking.until_s[self.index] = until_s
        parking.parked[self.index] = True
        self.wake = self.run.clock.env.event()
        cause = yield self.wake
        return cause

    def begin_period(self) -> None:
        """Take sums anew from here, for what the policy is told next."""
        rep = self.record
        rep.ttft_sum_s = rep.tpot_sum_s = 0.0
        rep.period_finished = rep.period_tpots = 0
        self.period_energy_j = rep.energy_j
        self.period_idle_energy_j = rep.idle_energy_j

    def view(self) -> View:
        """The replica as it stands."""
        rep, counts, served = self.record, self.exit_counts, self.steward.assignment
        num_exits = self.run.place(served.model, served.depth).num_exits if served else 0
        return View(
            now_s=rep.now_s,
            num_waiting=rep.num_waiting,
            num_running=rep.num_rows,
            evaluating=bool(rep.evaluating),
            finish_target=rep.finish_target,
            num_tokens=rep.num_tokens,
            num_finished=rep.num_finished,
            exit_counts=counts[rep.model, :num_exits].tolist(),
            executed_layers=rep.executed_layers,
            num_breaches=rep.num_breaches,
            nll_units=rep.nll,
            num_decode_iterations=rep.num_decode_iterations,
            decode_rows=rep.decode_rows,
            paced=PaceSums(
                rep.paced_tokens,
                rep.paced_rows,
                rep.paced_row_s,
                rep.paced_row_layers,
                rep.paced_row_rows,
            ),
            period_finished=rep.period_finished,
            period_ttft_s=rep.ttft_sum_s,
            period_tpots=rep.period_tpots,
            period_tpot_s=rep.tpot_sum_s,
        )


@dataclass
class _ReplicaTotals:
    """What carrying decisions out adds up to."""

    energy_load_j: float = 0.0
    load_s: float = 0.0
    drain_s: float = 0.0


class Run:
    """One policy's run over one workload: builds the fleet, plays it, keeps what happened."""

    def __init__(
        self,
        setup: Setup,
        requests: Requests,
        make: Callable[[], Policy],
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        self.setup = setup
        self.has_energy = setup.profile.has_energy
        self.requests = requests
        self.on_progress = on_progress
        self.policy = make()
        names = setup.candidates
        self.thresholds = confidence_thresholds(setup, self.policy)
        rules = hot_rules_of(self.policy)
        self.loop = loop_with(rules)
        # Only these two ask rules; ours raise nothing.
        self.advance = (
            failures_in_words(self.policy, rules, self.loop.advance) if rules else self.loop.advance
        )
        self.route = (
            failures_in_words(self.policy, rules, self.loop.route) if rules else self.loop.route
        )
        tables = trace_tables(setup.traces, names, self.thresholds, asked_rules(self.policy, rules))
        self.world: World = build_world(
            requests,
            setup.profile,
            names,
            tables,
            setup.serving,
            setup.measure,
            self.policy.watching,
            setup.fleet.num_replicas,
        )
        self.world.replicas["counts_at_full_depth"] = not _BREACH_RULES.isdisjoint(rules)
        self.candidates = tuple(candidate_card(setup, name) for name in names)
        self.places: dict[tuple[str, int], Place] = {}
        self.clock = Clock()
        self.decisions: list[DecisionEntry] = []
        self.next_arrival_s = math.inf
        self.parking = parking_lot(setup.fleet.num_replicas)
        per_host = setup.fleet.replicas_per_host
        hosts = [HostLinks() for _ in range(-(-setup.fleet.num_replicas // per_host))]
        if setup.fleet.weights_start == "host":
            for host in hosts:
                host.in_memory_s.update(dict.fromkeys(names, 0.0))
        self.replicas = [
            Replica(index, self, hosts[index // per_host], make())
            for index in range(setup.fleet.num_replicas)
        ]
        self.end_s = 0.0
        # A compiled call answers to nobody until it returns, so it is cut into slices; cuts change
        # no result.
        self.slice_s = 60.0 + requests.span_s / 200

    def place(self, name: str, depth: int) -> Place:
        """A model loaded to a depth; one that leaves no room for KV is an `InputError`."""
        if (name, depth) not in self.places:
            setup = self.setup
            model = setup.profile.model(name).model
            pool_blocks = setup.pool_blocks(name, depth)
            if pool_blocks == 0:
                raise setup.no_room(name, depth)
            self.places[name, depth] = Place(
                model=setup.candidates.index(name),
                level=model.exit_layers.index(depth),
                num_exits=model.num_exits,
                weight_bytes=model.weight_bytes(depth),
                pool_blocks=pool_blocks,
                block_bytes=setup.block_bytes(name, depth),
            )
        return self.places[name, depth]

    def play(self) -> None:
        """Run the world until no work is left."""
        self.send_requests()
        for replica in self.replicas:
            self.clock.env.process(replica.live())
        # A decision log grows in which there is nothing to collect.
        with uncollected():
            self.clock.env.run()
        self.finish()

    def send_requests(self) -> None:
        """Hand requests to replicas: at once, or as they arrive where the router needs the load."""
        sent_alone: Any = np.arange(len(self.requests))
        places: Any
        num_users = self.requests.num_users
        if num_users is not None:
            sent_alone = sent_alone[:num_users]
            places = sent_alone % len(self.replicas)
            deal(self.world, num_users)
        elif self.setup.fleet.router == "random":
            draws = stream(self.setup.seed, "router").random(len(self.requests))
            places = (draws * len(self.replicas)).astype(np.int64)
        elif self.setup.fleet.router == "round-robin" or len(self.replicas) == 1:
            places = sent_alone % len(self.replicas)
        else:
            self.next_arrival_s = float(self.requests.arrival_s[0])
            self.clock.env.process(self.traffic())
            return
        self.loop.push_all(self.world, sent_alone, places.astype(np.int64))

    def traffic(self) -> Process:
        """Route requests as they arrive, each to the replica with the least load then.

        Arrivals before the next event of anybody else are routed in one call of the loop.
        """
        arrivals = self.requests.arrival_s
        by_kv = self.setup.fleet.router == "least-kv"
        at = 0
        while at < len(arrivals):
            yield self.clock.at(float(arrivals[at]), first=True)
            before_s = min(float(self.clock.env.peek()), float(arrivals[at]) + self.slice_s)
            at = int(self.route(self.world, self.parking, by_kv, at, before_s))
            self.next_arrival_s = float(arrivals[at]) if at < len(arrivals) else math.inf
            for replica in self.replicas:
                if replica.wake is not None and not self.parking.parked[replica.index]:
                    wake, replica.wake = replica.wake, None
                    wake.succeed(int(self.parking.cause[replica.index]))
            self.report_progress()

    def report_progress(self) -> None:
        """Tell how much of the workload has ended, from 0 to 1."""
        if self.on_progress is not None:
            records = [replica.record for replica in self.replicas]
            ended = sum(record.num_finished + record.num_refused for record in records)
            self.on_progress(ended / len(self.requests))

    def finish(self) -> None:
        """Let every replica idle to the end of the run and close the books."""
        self.end_s = max(replica.record.now_s for replica in self.replicas)
        for replica in self.replicas:
            if replica.record.now_s < self.end_s:
                self.loop.pass_idle_time(replica.record, self.end_s)
            self.loop.settle_all(self.world, replica.index)
            self.loop.sample(self.world, replica.index, self.loop.state_of(replica.record))
            replica.steward.close(self.end_s)

    def disband(self) -> None:
        """Let the fleet go, once its records are taken, so that the world can be freed.

        Replicas and their run refer to each other, and a collection would search everything else
        for them.
        """
        self.replicas.clear()

    def foresight(self) -> dict[str, tuple[float, ...]]:
        """True exit shares of the requests to come, for policies that may see them."""
        coming = np.isin(self.world.requests["status"], (UNSENT, WAITING))
        horizon = self.policy.watching.reassess_requests or len(self.requests)
        upcoming = np.flatnonzero(coming)[: horizon * len(self.replicas)]
        if not len(upcoming):
            upcoming = np.arange(len(self.requests))
        weights = np.bincount(
            self.requests.domain[upcoming],
            weights=self.requests.output_tokens[upcoming],
            minlength=len(self.requests.domains),
        )
        weights = weights / weights.sum()
        shares = {}
        for name in self.setup.candidates:
            parts = [
                self.setup.traces.share_by_exit(name, self.thresholds[name], domain) * weight
                for domain, weight in zip(self.requests.domains, weights, strict=True)
            ]
            shares[name] = tuple(float(share) for share in np.sum(parts, axis=0))
        return shares


def simulate(
    setup: Setup,
    requests: Requests,
    make: Callable[[], Policy],
    on_progress: Callable[[float], None] | None = None,
) -> Run:
    """Play one policy over one workload to the end."""
    run = Run(setup, requests, make, on_progress)
    run.play()
    return run


def decided(entries: Sequence[DecisionEntry]) -> list[DecisionEntry]:
    """The decision log in order of time, ties by replica."""
    return sorted(entries, key=lambda entry: (entry.time_s, entry.replica))
