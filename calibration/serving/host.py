"""The real host of a policy: one replica that asks it, carries its decisions out and serves.

It does what the simulated replica does (`docs/engine.md`), with a wall clock and real weights:
bring candidates in, partially or whole, drain or recompute at a change, watch breaches, and report
telemetry. What a decision means is told by the very same code, the steward
(`helios_sim/steward.py`), and so are the controller and the hot rules.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from calibration.serving.batching import Decode, Life, Prefill, Row
from calibration.serving.iteration import Machine, Stepper, split_pays
from calibration.serving.replica import Clock, Replica
from calibration.serving.tally import Sample
from helios_sim.cards import Room, candidate_card, confidence_thresholds
from helios_sim.errors import InputError
from helios_sim.loop.state import NEVER
from helios_sim.policy.contract import (
    Assignment,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    Policy,
    Slo,
    Snapshot,
)
from helios_sim.policy.objective import objective_of
from helios_sim.steward import HOLD, Aim, Steward, View, event_of
from helios_sim.workload.requests import Requests


class NoRoomBeside(Exception):
    """Weights on their way found too little memory beside what the device holds."""


class Transfer(Protocol):
    """Weights on their way while requests run on."""

    def done(self) -> bool:
        """Whether they have arrived; raises what went wrong on the way.

        `NoRoomBeside` leaves what runs as it was, so that they can be brought in without it.
        """

    def wait(self, until_s: float) -> None:
        """Wait until they have arrived, or until a time."""

    @property
    def arrived_s(self) -> float:
        """When they arrived; meant once they have."""


class Weights(Protocol):
    """Where candidates come from, and what is loaded now."""

    @property
    def in_memory(self) -> frozenset[str]:
        """Candidates whose weights are in host memory, so that the disk is not needed again."""

    @property
    def loaded_bytes(self) -> int:
        """Measured bytes of the weights that are loaded."""

    def bring_in(self, name: str, depth: int) -> None:
        """Load a candidate's missing layers now; another candidate makes way for it first."""

    def fits_beside(self, num_bytes: int) -> bool:
        """Whether so many bytes can come while requests run on, beside all that is held."""

    def begin(self, name: str, depth: int) -> Transfer:
        """Start loading a candidate's missing layers beside what runs."""

    def take_up(self, name: str, depth: int, level: int, pool_blocks: int) -> Machine:
        """The machine that runs what was brought in, at exactly this depth, with an empty pool."""


class Cause(Enum):
    """Why the replica stopped serving."""

    TARGET = "finish target"
    BREACHED = "breach window"
    DRAINED = "drained"
    ARRIVED = "weights arrived"
    OUT_OF_WORK = "out of work"


@dataclass
class DecisionEntry:
    """A decision in the log; `ready_s` is filled when it has been carried out."""

    time_s: float
    event: Event
    decision: Decision
    assignment: Assignment
    snapshot: Snapshot
    moved_bytes: int = 0
    ready_s: float | None = None


DrawnJ = Callable[[Sequence[tuple[float, float]], float | None], float | None]
"""Joules that a meter counted within spans of the run's time, from and to; None if unknown.

The second argument are watts that short spans draw at most, where these are known.
"""


class Host(Replica):
    """One replica serving a workload under a policy until no work is left.

    `drawn_j` asks a meter while the host plays. None: no meter. `between` is done between
    iterations, whose time it takes.
    """

    def __init__(
        self,
        *,
        room: Room,
        policy: Policy,
        slo: Slo,
        lives: Sequence[Life],
        weights: Weights,
        clock: Clock,
        timeline_interval_s: float,
        on_progress: Callable[[float], None] | None = None,
        drawn_j: DrawnJ | None = None,
        between: Callable[[], None] | None = None,
    ) -> None:
        check_policy(policy, drawn_j is not None, policy.name)
        super().__init__(
            serving=room.serving,
            policy=policy,
            clock=clock,
            timeline_interval_s=timeline_interval_s,
        )
        self.room = room
        self.policy = policy
        self.lives = list(lives)
        self.weights = weights
        self.on_progress = on_progress
        self.drawn_j = drawn_j
        self.between = between
        cards = tuple(candidate_card(room, name) for name in room.candidates)
        self.thresholds = confidence_thresholds(room, policy)
        self.steward = Steward(room, policy, cards, slo)
        self.tally.exit_counts = {card.name: [0] * len(card.exit_layers) for card in cards}
        by_itself = [life for life in self.lives if life.think_s is None]
        self.to_come = deque(sorted(by_itself, key=_order_of_arrival))
        self.dealt = deque(life for life in self.lives if life.think_s is not None)
        self.decisions: list[DecisionEntry] = []
        self.finish_target = NEVER
        self.period_s = 0.0
        self.period_spans = 0
        self.transfer: Transfer | None = None
        self.num_loads_waited_for = 0
        """Loads for which serving waited though as many KV blocks were free as they have bytes."""
        self.num_ended = 0
        self.end_s = 0.0

    def play(self) -> None:
        """Ask, carry out, serve, and ask again, until no work is left."""
        event = Event.START
        while True:
            self.carry_out(self.ask(event))
            cause = self.serve()
            if cause is Cause.OUT_OF_WORK or self.is_out_of_work():
                break
            event = event_of(breached=cause is Cause.BREACHED, evaluating=self.evaluating)
        self.end_s = self.tally.booked_s
        self.sample(self.state())
        self.steward.close(self.end_s)

    def is_out_of_work(self) -> bool:
        """Whether no request is here or still to come."""
        return not (self.batch.rows or self.batch.queue or self.to_come)

    def ask(self, event: Event) -> DecisionEntry:
        """Show the policy a snapshot and log what it decides."""
        now_s, energy_j, idle_energy_j = self.tally.booked_s, None, None
        if self.drawn_j is not None:
            energy_j = self.drawn_j([(self.period_s, now_s)], None)
            spans = self.tally.spans[self.period_spans :]
            idle = [(start_s, stop_s) for spent, start_s, stop_s in spans if spent == "idle"]
            # Watts that nobody measured are 0.
            idle_energy_j = self.drawn_j(idle, self.room.profile.device.idle_w or None)
        decision, assignment, snapshot = self.steward.ask(
            event,
            self.view(),
            in_memory=self.weights.in_memory,
            energy_j=energy_j,
            idle_energy_j=idle_energy_j,
        )
        entry = DecisionEntry(now_s, event, decision, assignment, snapshot)
        self.decisions.append(entry)
        return entry

    def carry_out(self, entry: DecisionEntry) -> None:
        """Bring the weights in, clear the rows that cannot stay, and take the assignment up."""
        steward, wanted = self.steward, entry.assignment
        if not isinstance(entry.decision, Keep):
            entry.moved_bytes = steward.missing_bytes(wanted.model, wanted.depth)
            arrived_s = self.bring_in(entry)
            if steward.assignment != wanted or isinstance(entry.decision, Evaluate):
                self.clear_rows(arrived_s)
            if steward.assignment != wanted:
                self.take_up(wanted)
        self.follow(steward.aim(entry.decision))
        self.begin_period()
        steward.carried_out(entry.decision, entry.time_s, self.view())
        entry.ready_s = self.tally.booked_s

    def bring_in(self, entry: DecisionEntry) -> float:
        """Move the missing weights, beside the running requests if there is room for both.

        Returns when they arrived, which may be within the last iteration, or between its end and
        the look at them.
        """
        if entry.moved_bytes == 0:
            return self.tally.booked_s
        name, depth = entry.assignment.model, entry.assignment.depth
        staged = math.ceil(entry.moved_bytes / self.block_bytes())
        if (
            self.room.serving.overlap_loads
            and self.steward.assignment is not None
            and bool(self.batch.rows)
            and staged <= self.batch.free_blocks
        ):
            # Free blocks are memory too, but the pool's: it cannot be lent to weights.
            if self.weights.fits_beside(entry.moved_bytes):
                arrived_s = self.bring_in_beside(entry, staged)
                if arrived_s is not None:
                    return arrived_s
            self.num_loads_waited_for += 1
        self.clear_rows(self.tally.booked_s)
        self.sample(self.state())
        # The old pool and graphs go before the new weights come.
        self.machine = self.stepper = None
        self.weights.bring_in(name, depth)
        self.tally.book("load", self.clock.now_s())
        self.sample("loading")
        return self.tally.booked_s

    def bring_in_beside(self, entry: DecisionEntry, staged: int) -> float | None:
        """Serve on while the weights come; returns when they arrived.

        None if the device had no room for them after all. Otherwise the blocks stay set aside until
        the weights are taken up, as in the simulator, where they lie in them.
        """
        self.batch.stage(staged)
        self.follow(HOLD)
        self.transfer = transfer = self.weights.begin(
            entry.assignment.model, entry.assignment.depth
        )
        try:
            self.serve()
        except NoRoomBeside:
            self.batch.unstage()
            return None
        finally:
            self.transfer = None
        self.steward.stage(entry.moved_bytes)
        return transfer.arrived_s

    def clear_rows(self, since_s: float) -> None:
        """Let no request run on: finish them, or send them back to be prefilled anew.

        `since_s` is when that was wanted, perhaps within the last iteration, or right after it.
        """
        self.follow(HOLD)
        if self.room.serving.on_change == "recompute":
            self.batch.preempt_all()
        elif self.batch.rows:
            self.batch.draining = True
            self.serve()
            self.batch.draining = False
        self.tally.drain_s += max(0.0, self.tally.booked_s - since_s)

    def take_up(self, assignment: Assignment) -> None:
        """Run a model at a depth from now on, with a pool of what its weights leave free."""
        name, depth, mode = assignment.model, assignment.depth, assignment.exit_mode
        pool = self.room.pool_blocks(name, depth)
        if pool == 0:
            raise self.room.no_room(name, depth)
        profile = self.room.profile.model(name)
        level = profile.model.exit_layers.index(depth)
        # The old machine goes first: two pools need not fit.
        self.machine = self.stepper = None
        self.machine = self.weights.take_up(name, depth, level, pool)
        self.tally.book("load", self.clock.now_s())
        self.stepper = Stepper(
            self.machine,
            assignment=assignment,
            exit_layers=profile.model.exit_layers,
            threshold=self.thresholds[name],
            rules=self.rules,
            recompute_kv=self.room.serving.skipped_kv == "recomputed" and mode.leaves_early,
            pays=split_pays(profile, self.rules, level, self.batch.max_batch),
        )
        self.batch.take_up(
            pool_blocks=pool,
            max_positions=profile.model.shape.max_positions,
            solo=mode is ExitMode.SOLO,
            rebatches=mode is ExitMode.REBATCH,
            levels=level + 1,
            max_rows=self.machine.max_rows,
        )
        self.window.clear()
        # As in the simulator, all of loading is time of the assignment before.
        self.steward.take_up(assignment, self.weights.loaded_bytes, self.tally.booked_s)

    def follow(self, aim: Aim) -> None:
        """Say when the policy is to be asked again."""
        self.evaluating = aim.evaluating
        self.batch.quota = aim.quota
        self.finish_target = aim.finish_target
        self.window.watching = aim.watching

    def serve(self) -> Cause:
        """Serve until somebody must decide, weights under way arrive, or the work runs out."""
        while True:
            self.enter_arrivals()
            if self.transfer is not None and self.transfer.done():
                return Cause.ARRIVED
            plan = self.batch.next_iteration(self.tally.booked_s)
            if plan is not None:
                self.run(plan)
                cause = self.who_must_decide()
                if cause is not None:
                    return cause
            elif self.batch.draining:
                # The last row was preempted, and nobody is admitted.
                return Cause.DRAINED
            elif self.to_come:
                self.idle_until(self.to_come[0].arrival_s)
            elif self.transfer is not None:
                self.idle_until(math.inf)
            else:
                return Cause.OUT_OF_WORK

    def who_must_decide(self) -> Cause | None:
        """Whether somebody has to decide at the end of an iteration, and why."""
        if self.finish_target <= 0:
            # What tripped belongs to the period that is told now.
            self.window.tripped = False
            return Cause.TARGET
        if self.window.tripped:
            self.window.tripped = False
            return Cause.BREACHED
        if self.batch.draining and not self.batch.rows:
            return Cause.DRAINED
        return None

    def enter_arrivals(self) -> None:
        """Let every request that has arrived by now wait."""
        now_s = self.tally.booked_s
        while self.to_come and self.to_come[0].arrival_s <= now_s:
            self.batch.enter(self.to_come.popleft())

    def idle_until(self, time_s: float) -> None:
        """Wait for a request, or for weights under way."""
        if self.transfer is not None:
            self.transfer.wait(time_s)
        else:
            self.clock.sleep_until(time_s)
        self.tally.book("idle", self.clock.now_s())

    def run(self, plan: Prefill | Decode) -> None:
        """Carry an iteration out, see who came; now and then write a line of the timeline."""
        super().run(plan)
        if self.between is not None:
            self.between()
        self.enter_arrivals()
        if self.tally.booked_s >= self.tally.next_sample_s:
            self.sample(self.state())
            if self.on_progress is not None:
                self.on_progress(self.num_ended / len(self.lives))

    def finish(self, row: Row, now_s: float) -> None:
        """Retire a request with its last token; its user sends the next one."""
        super().finish(row, now_s)
        self.finish_target -= 1
        self.send_next()

    def send_next(self) -> None:
        """In a closed loop a user whose request has ended thinks and sends the next one."""
        self.num_ended += 1
        if self.dealt:
            life = self.dealt.popleft()
            life.arrival_s = self.tally.booked_s + (life.think_s or 0.0)
            insort(self.to_come, life, key=_order_of_arrival)

    def refused(self, life: Life) -> None:
        """Let the user send the next request whose last one was turned away."""
        self.send_next()
        self.enter_arrivals()

    def block_bytes(self) -> int:
        """Bytes of a KV block of the present pool."""
        held = self.steward.assignment
        return 1 if held is None else self.room.block_bytes(held.model, held.depth)

    def begin_period(self) -> None:
        """Take sums anew from here, for what the policy is told next."""
        self.tally.clear_period()
        self.period_s = self.tally.booked_s
        self.period_spans = len(self.tally.spans)

    def view(self) -> View:
        """The replica as of the last booked moment."""
        tally, served = self.tally, self.steward.assignment
        return View(
            now_s=tally.booked_s,
            num_waiting=len(self.batch.queue),
            num_running=len(self.batch.rows),
            evaluating=self.evaluating,
            finish_target=self.finish_target,
            num_tokens=tally.num_tokens,
            num_finished=tally.num_finished,
            exit_counts=tuple(tally.exit_counts[served.model]) if served else (),
            executed_layers=tally.executed_layers,
            num_breaches=tally.num_breaches,
            nll_units=tally.nll_units,
            num_decode_iterations=tally.num_decode_iterations,
            decode_rows=tally.decode_rows,
            paced=tally.paced,
            period_finished=tally.period_finished,
            period_ttft_s=tally.ttft_sum_s,
            period_tpots=tally.period_tpots,
            period_tpot_s=tally.tpot_sum_s,
        )

    def state(self) -> str:
        """What the replica is doing, for the timeline."""
        if not self.batch.rows and not self.batch.queue:
            return "idle"
        if self.batch.draining:
            return "draining"
        return "evaluating" if self.evaluating else "serving"

    def sample(self, state: str) -> None:
        """Write a line of the timeline as of the last booked moment."""
        self.enter_arrivals()
        tally, batch, served = self.tally, self.batch, self.steward.assignment
        tally.sample(
            Sample(
                time_s=tally.booked_s,
                batch_seconds=tally.batch_seconds,
                tokens=tally.num_tokens,
                breaches=tally.num_breaches,
                waiting=len(batch.queue),
                used_blocks=batch.used_blocks,
                pool_blocks=batch.pool_blocks,
                model=served.model if served else "",
                depth=served.depth if served else 0,
                state=state,
            )
        )


def check_policy(policy: Policy, metered: bool, name: str) -> None:
    """Refuse a policy that needs what a real backend, or this one without a meter, does not know.

    `name` is what the scenario calls it.
    """
    if policy.sees_future:
        raise InputError(
            f"Policy {name!r} knows the exits of tokens to come, and a real backend does not; "
            "serve a policy that sees telemetry only, and simulate this one beside it.",
            f"policy {name}",
        )
    if objective_of(policy) == "energy" and not metered:
        raise InputError(
            f"Policy {name!r} chooses by energy, and there is no energy meter here; give it "
            "another objective, or serve where a meter can be read.",
            f"policy {name}, objective",
        )


def lives_of(requests: Requests, texts: Sequence[list[int]]) -> list[Life]:
    """The requests of a workload with their texts; users of a closed loop think before most."""
    lives = [
        Life(
            request_id=row,
            arrival_s=float(requests.arrival_s[row]),
            prompt_tokens=int(requests.prompt_tokens[row]),
            output_tokens=int(requests.output_tokens[row]),
            text=texts[row],
        )
        for row in range(len(requests))
    ]
    if requests.num_users is not None:
        for life in lives[requests.num_users :]:
            life.think_s = life.arrival_s
    return lives


def _order_of_arrival(life: Life) -> tuple[float, int]:
    return life.arrival_s, life.request_id
