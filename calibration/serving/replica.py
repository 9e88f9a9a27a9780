"""One replica at its iterations: plans carried out and charged, tokens given, requests retired.

What is to run, and who decides it, is the host's (`host.py`). Measuring carries iterations out by
the same code, so that an iteration that was measured is one that is served.
"""

from __future__ import annotations

from typing import Protocol

from calibration.serving.batching import Batch, Decode, HotRules, Life, Prefill, Row
from calibration.serving.iteration import Machine, Outcome, Stepper
from calibration.serving.tally import IterationEntry, Tally
from helios_sim.policy.contract import Assignment, Policy
from helios_sim.scenario import ServingSettings


class Clock(Protocol):
    """Seconds since the start of the run."""

    def now_s(self) -> float:
        """The present."""

    def sleep_until(self, time_s: float) -> None:
        """Wait until a time."""


class BreachWindow:
    """Counts breaches by the policy's rule and remembers that the window has tripped."""

    def __init__(self, policy: Policy, rules: HotRules) -> None:
        watching = policy.watching
        self.tokens = watching.breach_window_tokens
        self.limit = watching.breach_limit
        self.sliding = watching.window_kind == "sliding"
        self.rules = rules
        self.ring = [0] * (self.tokens or 1)
        self.watching = self.tripped = False
        self.seen = self.breaches = 0

    def clear(self) -> None:
        """Begin a new window."""
        self.seen = self.breaches = 0
        self.tripped = False

    def count(self, breached: bool) -> None:
        """Count one emitted token."""
        if not self.watching:
            return
        if self.sliding:
            self.seen, self.breaches, tripped = self.rules.watch_sliding(
                self.ring, self.seen, self.breaches, breached, self.limit
            )
        else:
            self.seen, self.breaches, tripped = self.rules.watch_tumbling(
                self.seen, self.breaches, breached, self.tokens, self.limit
            )
        self.tripped = self.tripped or bool(tripped)


class Replica:
    """The running rows of one replica, the books on them, and the machine that computes them.

    `machine` and `stepper` are those of what is served now; None before anything is.
    """

    def __init__(
        self,
        *,
        serving: ServingSettings,
        policy: Policy,
        clock: Clock,
        timeline_interval_s: float,
    ) -> None:
        # Whoever reads a scenario refuses it in words, before anything is loaded.
        assert serving.batching != "chunked"
        self.clock = clock
        self.rules = HotRules.of(policy)
        self.batch = Batch(
            batching=serving.batching,
            max_batch=serving.max_batch,
            max_held=serving.max_held,
            block_tokens=serving.block_tokens,
            max_prefill_tokens=serving.max_prefill_tokens,
            watermark=serving.watermark,
            rules=self.rules,
            on_left=self.left,
            on_refused=self.refused,
        )
        self.window = BreachWindow(policy, self.rules)
        self.tally = Tally(timeline_interval_s)
        self.machine: Machine | None = None
        self.stepper: Stepper | None = None
        self.evaluating = False

    def run(self, plan: Prefill | Decode) -> None:
        """Carry an iteration out, charge it, emit its tokens, retire who is done."""
        assert self.stepper is not None
        assignment = self.stepper.assignment
        start_s = self.tally.booked_s
        begun_s = self.clock.now_s()
        if isinstance(plan, Prefill):
            for row in plan.rows:
                self.admitted(row.life, assignment)
        outcome = self.step(plan)
        now_s = self.clock.now_s()
        seconds = self.tally.book("busy", now_s)
        entry = IterationEntry(
            start_s=start_s,
            end_s=now_s,
            seconds=seconds,
            host_s=begun_s - start_s,
            assignment=assignment,
            evaluating=self.evaluating,
            is_prefill=isinstance(plan, Prefill),
            running=len(self.batch.rows),
            outcome=outcome,
            breached=tuple(map(self.stepper.breaches, outcome.emitted)),
        )
        self.tally.count_iteration(entry, self.batch.used_blocks)
        self.emit(entry)

    def admitted(self, life: Life, assignment: Assignment) -> None:
        """Note who serves a request from here on, be it to its end or until it is preempted."""
        life.model, life.depth = assignment.model, assignment.depth
        life.evaluated = life.evaluated or self.evaluating

    def step(self, plan: Prefill | Decode) -> Outcome:
        """What the machine makes of a plan."""
        assert self.stepper is not None
        return self.stepper.run(plan)

    def emit(self, entry: IterationEntry) -> None:
        """Give the tokens of an iteration to their requests, in order of admission."""
        assert self.stepper is not None
        outcome, now_s = entry.outcome, entry.end_s
        full_pass = outcome.layers == self.stepper.depth
        if self.window.watching:
            for breached in entry.breached:
                self.window.count(breached)
        for one in outcome.emitted:
            row = one.row
            if entry.is_prefill:
                row.context, row.to_prefill, row.pending = row.to_prefill, 0, 0
            else:
                row.context += 1
                row.held = 0
                row.pending = 0 if full_pass else row.pending + 1
            life = row.life
            if not life.emitted:
                life.first_token_s = now_s
            life.emitted.append(one.answer.token)
            if len(life.emitted) == life.output_tokens:
                self.finish(row, now_s)

    def finish(self, row: Row, now_s: float) -> None:
        """Retire a request with its last token."""
        life = row.life
        self.batch.leave(row)
        life.status = "finished"
        life.finished_s = now_s
        self.tally.count_finished(life, now_s)

    def left(self, row: Row) -> None:
        """Let the machine have back the place of a row that left the batch."""
        if self.machine is not None:
            self.machine.release(row)

    def refused(self, life: Life) -> None:
        """Hear of a request that was turned away for good."""
