"""The real host of a policy: one replica that asks it, carries its decisions out and serves.

It does what the simulated replica does (`docs/engine.md`), with a wall clock and real weights:
bring candidates in, partially or whole, drain or recompute at a change, watch breaches, and report
telemetry. Controller and hot rules are the very same code.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from calibration.serving.batching import Decode, Life, Prefill, Row
from calibration.serving.iteration import EXITS_ACTIVE, Machine, Stepper, split_pays
from calibration.serving.replica import Clock, Replica
from calibration.serving.tally import NLL_UNITS_PER_NAT, Sample
from helios_sim.cards import Room, candidate_card
from helios_sim.errors import InputError
from helios_sim.policy.contract import (
    USUAL_REASSESS_REQUESTS,
    Assignment,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Policy,
    Slo,
    Snapshot,
    Telemetry,
)
from helios_sim.policy.controller import Controller
from helios_sim.state import NEVER
from helios_sim.workload import Requests


class Transfer(Protocol):
    """Weights on their way while requests run on."""

    def done(self) -> bool:
        """Whether they have arrived; raises what went wrong on the way."""

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
    def overlaps(self) -> bool:
        """Whether weights can move while requests run on."""

    @property
    def loaded_bytes(self) -> int:
        """Measured bytes of the weights that are loaded."""

    def bring_in(self, name: str, depth: int) -> None:
        """Load a candidate's missing layers now; another candidate makes way for it first."""

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


@dataclass
class _Mark:
    """Running sums at the moment the last decision was carried out."""

    time_s: float = 0.0
    num_tokens: int = 0
    exit_counts: tuple[int, ...] = ()
    executed_layers: int = 0
    num_breaches: int = 0
    nll_units: int = 0
    num_decode_iterations: int = 0
    decode_rows: int = 0
    num_spans: int = 0


DrawnJ = Callable[[Sequence[tuple[float, float]]], float]
"""Joules that a meter counted within spans of the run's time, from and to."""


class Host(Replica):
    """One replica serving a workload under a policy until no work is left.

    `drawn_j` asks a meter while the host plays. None: no meter.
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
        max_batch: int,
        timeline_interval_s: float,
        on_progress: Callable[[float], None] | None = None,
        drawn_j: DrawnJ | None = None,
    ) -> None:
        check_policy(policy, drawn_j is not None, policy.name)
        super().__init__(
            serving=room.serving,
            policy=policy,
            clock=clock,
            max_batch=max_batch,
            timeline_interval_s=timeline_interval_s,
        )
        self.room = room
        self.policy = policy
        self.slo = slo
        self.lives = list(lives)
        self.weights = weights
        self.on_progress = on_progress
        self.drawn_j = drawn_j
        self.cards = tuple(candidate_card(room, name) for name in room.candidates)
        self.card_of = {card.name: card for card in self.cards}
        chosen = policy.confidence_threshold
        self.thresholds = {
            name: room.profile.model(name).confidence.default_threshold
            if chosen is None
            else chosen
            for name in room.candidates
        }
        self.controller = Controller(
            policy,
            self.cards,
            shortage=room.shortage,
            recomputes_kv=room.serving.skipped_kv == "recomputed",
        )
        self.tally.exit_counts = {card.name: [0] * len(card.exit_layers) for card in self.cards}
        followers = {life.successor for life in self.lives if life.successor is not None}
        sent = [life for life in self.lives if life not in followers]
        self.to_come = deque(sorted(sent, key=_order_of_arrival))
        self.decisions: list[DecisionEntry] = []
        self.served_model: str | None = None
        self.weight_bytes = 0
        self.finish_target = NEVER
        self.until_reassessment = policy.watching.reassess_requests
        self.mark = _Mark()
        self.transfer: Transfer | None = None
        self.num_ended = 0
        self.end_s = 0.0

    def play(self) -> None:
        """Ask, carry out, serve, and ask again, until no work is left."""
        event = Event.START
        while True:
            self.carry_out(self.ask(event))
            cause = self.serve()
            if cause is Cause.OUT_OF_WORK:
                break
            event = self.event_of(cause)
        self.end_s = self.tally.booked_s
        self.sample(self.state())
        self.account_weights(self.end_s)

    def event_of(self, cause: Cause) -> Event:
        """What the reason to stop means to the policy."""
        if cause is Cause.BREACHED:
            return Event.BREACHED
        return Event.EVALUATED if self.evaluating else Event.REASSESS

    def ask(self, event: Event) -> DecisionEntry:
        """Show the policy a snapshot and log what it decides."""
        now_s = self.tally.booked_s
        telemetry = self.telemetry(now_s)
        if event is Event.REASSESS or event is Event.START:
            self.until_reassessment = self.policy.watching.reassess_requests
        elif self.until_reassessment is not None and not self.evaluating:
            self.until_reassessment = max(1, self.finish_target)
        decision, snapshot = self.controller.consult(
            now_s=now_s,
            event=event,
            assignment=self.assignment,
            telemetry=telemetry,
            load_s=self.load_seconds(),
            num_waiting=len(self.batch.queue),
            num_running=len(self.batch.rows),
            max_batch=self.batch.max_batch,
            expected_tokens=self.expected_tokens(),
            slo=self.slo,
        )
        entry = DecisionEntry(now_s, event, decision, self.target(decision), snapshot)
        self.decisions.append(entry)
        if event is Event.BREACHED:
            self.tally.num_breach_events += 1
        return entry

    def target(self, decision: Decision) -> Assignment:
        """What the replica is to run after a decision."""
        if isinstance(decision, Keep):
            assert self.assignment is not None
            return self.assignment
        if isinstance(decision, Evaluate):
            depth = self.card_of[decision.model].num_layers
            return Assignment(decision.model, depth, decision.exit_mode)
        if isinstance(decision, LoadLayers):
            assert self.assignment is not None
            return Assignment(self.assignment.model, decision.depth, decision.exit_mode)
        return Assignment(decision.model, decision.depth, decision.exit_mode)

    def carry_out(self, entry: DecisionEntry) -> None:
        """Bring the weights in, clear the rows that cannot stay, and take the assignment up."""
        decision = entry.decision
        if not isinstance(decision, Keep):
            entry.moved_bytes = self.missing_bytes(entry.assignment.model, entry.assignment.depth)
            arrived_s = self.bring_in(entry)
            if self.assignment != entry.assignment or isinstance(decision, Evaluate):
                self.clear_rows(arrived_s)
            if self.assignment != entry.assignment:
                self.take_up(entry.assignment)
            self.count(entry, self.tally.booked_s - entry.time_s)
        self.aim(decision)
        entry.ready_s = self.tally.booked_s
        self.mark = self.marked()

    def bring_in(self, entry: DecisionEntry) -> float:
        """Move the missing weights, beside the running requests if there is room for both.

        Returns when they arrived, which may be within the last iteration, or between its end and
        the look at them.
        """
        if entry.moved_bytes == 0:
            return self.tally.booked_s
        name, depth = entry.assignment.model, entry.assignment.depth
        staged = math.ceil(entry.moved_bytes / self.block_bytes())
        overlaps = (
            self.room.serving.overlap_loads
            and self.weights.overlaps
            and self.assignment is not None
            and bool(self.batch.rows)
            and staged <= self.batch.free_blocks
        )
        if not overlaps:
            self.clear_rows(self.tally.booked_s)
            self.sample(self.state())
            # The old pool and graphs go before the new weights come.
            self.machine = self.stepper = None
            self.weights.bring_in(name, depth)
            self.tally.book("load", self.clock.now_s())
            self.sample("loading")
            return self.tally.booked_s
        self.note_weights(self.weight_bytes + entry.moved_bytes)
        self.batch.stage(staged)
        self.hold_questions()
        self.transfer = transfer = self.weights.begin(name, depth)
        try:
            self.serve()
        finally:
            self.transfer = None
        self.batch.unstage()
        return transfer.arrived_s

    def clear_rows(self, since_s: float) -> None:
        """Let no request run on: finish them, or send them back to be prefilled anew.

        `since_s` is when that was wanted, perhaps within the last iteration, or right after it.
        """
        self.hold_questions()
        if self.room.serving.on_change == "recompute":
            self.batch.preempt_all()
        elif self.batch.rows:
            self.batch.draining = True
            self.serve()
            self.batch.draining = False
        self.tally.drain_s += max(0.0, self.tally.booked_s - since_s)

    def hold_questions(self) -> None:
        """Serve on without asking while a decision is carried out."""
        self.window.watching = self.window.tripped = False
        self.evaluating = False
        self.batch.quota = NEVER
        self.finish_target = NEVER

    def take_up(self, assignment: Assignment) -> None:
        """Run a model at a depth from now on, with a pool of what its weights leave free."""
        name, depth, mode = assignment.model, assignment.depth, assignment.exit_mode
        pool = self.room.pool_blocks(name, depth)
        if pool == 0:
            raise self.room.no_room(name, depth)
        profile = self.room.profile.model(name)
        level = profile.model.exit_layers.index(depth)
        self.account_weights(self.tally.booked_s)
        # The old machine goes first: two pools need not fit.
        self.machine = self.stepper = None
        self.machine = self.weights.take_up(name, depth, level, pool)
        self.tally.book("load", self.clock.now_s())
        self.stepper = Stepper(
            self.machine,
            exit_layers=profile.model.exit_layers,
            level=level,
            exit_mode=mode,
            threshold=self.thresholds[name],
            rules=self.rules,
            recompute_kv=self.room.serving.skipped_kv == "recomputed" and mode in EXITS_ACTIVE,
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
        self.assignment = assignment
        self.weight_bytes = self.weights.loaded_bytes
        self.note_weights(self.weight_bytes)

    def note_weights(self, num_bytes: int) -> None:
        """Keep the most bytes of weights that were on the device at once."""
        self.tally.peak_weight_bytes = max(self.tally.peak_weight_bytes, num_bytes)

    def aim(self, decision: Decision) -> None:
        """Say when the policy is to be asked again."""
        self.evaluating = isinstance(decision, Evaluate)
        if isinstance(decision, Evaluate):
            self.batch.quota = self.finish_target = decision.num_requests
            self.window.watching = False
            return
        watching = self.policy.watching
        self.batch.quota = NEVER
        self.finish_target = NEVER if self.until_reassessment is None else self.until_reassessment
        self.window.watching = watching.breach_window_tokens is not None

    def serve(self) -> Cause:
        """Serve until somebody must decide, weights under way arrive, or the work runs out."""
        while True:
            self.enter_arrivals()
            if self.transfer is not None and self.transfer.done():
                return Cause.ARRIVED
            plan = self.batch.next_iteration(self.tally.booked_s)
            if plan is not None:
                self.run(plan)
                self.enter_arrivals()
                cause = self.who_must_decide()
                if cause is not None:
                    return cause
            elif self.to_come:
                self.idle_until(self.to_come[0].arrival_s)
            elif self.transfer is not None:
                self.idle_until(math.inf)
            else:
                return Cause.OUT_OF_WORK

    def who_must_decide(self) -> Cause | None:
        """Whether somebody has to decide at the end of an iteration, and why."""
        if self.finish_target <= 0:
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
        """Carry an iteration out; now and then write a line of the timeline."""
        super().run(plan)
        if self.tally.booked_s >= self.tally.next_sample_s:
            self.sample(self.state())
            if self.on_progress is not None:
                self.on_progress(self.num_ended / len(self.lives))

    def finish(self, row: Row, now_s: float) -> None:
        """Retire a request with its last token; its user's next one is under way."""
        super().finish(row, now_s)
        self.finish_target -= 1
        self.send_successor(row.life)

    def send_successor(self, life: Life) -> None:
        """In a closed loop the user's next request comes after the think time."""
        self.num_ended += 1
        after = life.successor
        if after is not None:
            after.arrival_s = self.tally.booked_s + after.think_s
            self.to_come = deque(sorted([*self.to_come, after], key=_order_of_arrival))

    def refused(self, life: Life) -> None:
        """Let the next request of a user come whose request was turned away."""
        self.send_successor(life)
        self.enter_arrivals()

    def count(self, entry: DecisionEntry, seconds: float) -> None:
        """Add a decision that was carried out to the totals."""
        tally, decision = self.tally, entry.decision
        if isinstance(decision, Evaluate):
            tally.num_evaluations += 1
            return
        if isinstance(decision, LoadLayers):
            tally.num_loads += 1
        elif self.served_model not in (None, entry.assignment.model):
            tally.num_switches += 1
        self.served_model = entry.assignment.model
        tally.switch_time_s += seconds

    def missing_bytes(self, name: str, depth: int) -> int:
        """Weight bytes that a model at a depth needs and the replica does not hold."""
        card = self.card_of[name]
        needed = card.weight_bytes[card.level_of(depth)]
        if self.assignment is None or self.assignment.model != name:
            return needed
        return max(0, needed - card.weight_bytes[card.level_of(self.assignment.depth)])

    def block_bytes(self) -> int:
        """Bytes of a KV block of the present pool."""
        if self.assignment is None:
            return 1
        return self.room.block_bytes(self.assignment.model, self.assignment.depth)

    def load_seconds(self) -> dict[str, tuple[float, ...]]:
        """Predicted seconds to bring each candidate in at each exit, on an idle link."""
        loading = self.room.profile.loading
        estimates = {}
        for card in self.cards:
            disk_s = 0.0
            if card.name not in self.weights.in_memory:
                disk_s = loading.disk.seconds(card.weight_bytes[-1])
            missing = [self.missing_bytes(card.name, depth) for depth in card.exit_layers]
            estimates[card.name] = tuple(
                disk_s + loading.host.seconds(num_bytes) if num_bytes else 0.0
                for num_bytes in missing
            )
        return estimates

    def expected_tokens(self) -> float:
        """Tokens until the next reassessment, as far as experience tells."""
        tally = self.tally
        if tally.num_finished:
            per_request = tally.num_tokens / tally.num_finished
        else:
            per_request = float(self.room.expected_output_tokens)
        requests = self.until_reassessment
        return (USUAL_REASSESS_REQUESTS if requests is None else requests) * per_request

    def marked(self) -> _Mark:
        """The running sums as they stand, to take differences from."""
        tally = self.tally
        tally.clear_period()
        assert self.assignment is not None
        return _Mark(
            time_s=tally.booked_s,
            num_tokens=tally.num_tokens,
            exit_counts=tuple(tally.exit_counts[self.assignment.model]),
            executed_layers=tally.executed_layers,
            num_breaches=tally.num_breaches,
            nll_units=tally.nll_units,
            num_decode_iterations=tally.num_decode_iterations,
            decode_rows=tally.decode_rows,
            num_spans=len(tally.spans),
        )

    def telemetry(self, now_s: float) -> Telemetry | None:
        """What the replica saw since its last decision was carried out."""
        if self.assignment is None:
            return None
        tally, mark = self.tally, self.mark
        counts = tally.exit_counts[self.assignment.model]
        iterations = tally.num_decode_iterations - mark.num_decode_iterations
        since = tally.spans[mark.num_spans :]
        idle_spans = [(start_s, stop_s) for spent, start_s, stop_s in since if spent == "idle"]
        return Telemetry(
            assignment=self.assignment,
            duration_s=now_s - mark.time_s,
            num_finished=tally.period_finished,
            num_tokens=tally.num_tokens - mark.num_tokens,
            exit_counts=tuple(
                count - before for count, before in zip(counts, mark.exit_counts, strict=True)
            ),
            executed_layers=tally.executed_layers - mark.executed_layers,
            num_breaches=tally.num_breaches - mark.num_breaches,
            nll_nats=(tally.nll_units - mark.nll_units) / NLL_UNITS_PER_NAT,
            mean_ttft_s=_mean(tally.ttft_sum_s, tally.period_finished),
            mean_tpot_s=_mean(tally.tpot_sum_s, tally.period_tpots),
            mean_batch=(tally.decode_rows - mark.decode_rows) / max(1, iterations),
            energy_j=self.drawn_j([(mark.time_s, now_s)]) if self.drawn_j else None,
            is_evaluation=self.evaluating,
            idle_energy_j=self.drawn_j(idle_spans) if self.drawn_j else None,
        )

    def account_weights(self, now_s: float) -> None:
        """Book the time spent with the weights that are about to change."""
        tally = self.tally
        if self.assignment is not None:
            seconds = now_s - tally.weights_since_s
            name = f"{self.assignment.model}@{self.assignment.depth}"
            tally.depth_seconds[name] = tally.depth_seconds.get(name, 0.0) + seconds
            tally.weight_byte_seconds += self.weight_bytes * seconds
        tally.weights_since_s = now_s

    def state(self) -> str:
        """What the replica is doing, for the timeline."""
        if not self.batch.rows and not self.batch.queue:
            return "idle"
        if self.batch.draining:
            return "draining"
        return "evaluating" if self.evaluating else "serving"

    def sample(self, state: str) -> None:
        """Write a line of the timeline as of the last booked moment."""
        tally, batch = self.tally, self.batch
        tally.sample(
            Sample(
                time_s=tally.booked_s,
                batch_seconds=tally.batch_seconds,
                tokens=tally.num_tokens,
                breaches=tally.num_breaches,
                waiting=len(batch.queue),
                used_blocks=batch.used_blocks,
                pool_blocks=batch.pool_blocks,
                model=self.assignment.model if self.assignment else "",
                depth=self.assignment.depth if self.assignment else 0,
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
    settings = getattr(policy, "settings", policy)
    if getattr(settings, "objective", None) == "energy" and not metered:
        raise InputError(
            f"Policy {name!r} chooses by energy, and there is no energy meter here; give it "
            "another objective, or serve where a meter can be read.",
            f"policy {name}, objective",
        )


def lives_of(requests: Requests, texts: Sequence[list[int]]) -> list[Life]:
    """The requests of a workload with their texts; a user's requests follow each other."""
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
    if requests.user is not None:
        last: dict[int, Life] = {}
        for life, user in zip(lives, requests.user.tolist(), strict=True):
            if user in last:
                life.think_s = life.arrival_s
                last[user].successor = life
            last[user] = life
    return lives


def _order_of_arrival(life: Life) -> tuple[float, int]:
    return life.arrival_s, life.request_id


def _mean(total: float, count: float) -> float | None:
    """A mean, or None of nothing."""
    return total / count if count else None
