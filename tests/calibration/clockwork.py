"""A host on a clockwork machine: exits from traces, seconds from costs, no model and no waiting.

It makes the real host comparable to the simulator to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from calibration.serving.batching import Decode, Life, Prefill, Row
from calibration.serving.host import DrawnJ, Host, lives_of
from calibration.serving.iteration import Answer, Captures, Outcome
from helios_sim import cost
from helios_sim.cards import Room, candidate_card
from helios_sim.exits import ExitTraces
from helios_sim.policy.contract import Assignment, ExitMode, Policy, Slo
from helios_sim.workload.requests import Requests


class Clockwork:
    """A clock that is told how much time passes."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_until(self, time_s: float) -> None:
        self.time_s = max(self.time_s, time_s)


class ClockworkMachine:
    """Knows from traces what each exit says of a request's next token."""

    max_rows = 10**6

    def __init__(
        self, room: Room, name: str, level: int, traces: ExitTraces, requests: Requests
    ) -> None:
        self.name = name
        self.traces = traces
        self.requests = requests
        self.model = room.profile.model(name)
        self.loaded_level = level
        self.padded = self.model.padded_rows(room.serving.max_batch)
        self.graphs: dict[tuple[str, int, int], int] = {}
        self.by_graphs = False
        self.batch = 0
        self.rows: Sequence[Row] = ()
        self.level = -1
        self.slots: set[int] = set()

    @property
    def captures(self) -> Captures:
        layers = {
            which: sum(count for (kind, *_), count in self.graphs.items() if kind == which)
            for which in ("run", "fill")
        }
        exits = sum(kind == "tell" for kind, *_ in self.graphs)
        return Captures(len(self.graphs) - exits, exits, layers["run"], layers["fill"])

    def want(self, kind: str, level: int, batch: int) -> None:
        """Capture a graph where it is missing."""
        rows = int(self.padded[batch])
        if self.by_graphs and rows <= self.model.graph_rows:
            bounds = (0, *self.model.model.exit_layers)
            self.graphs[kind, level, rows] = bounds[level + 1] - bounds[level]

    def prefill(self, rows: Sequence[Row]) -> None:
        self.by_graphs = False
        for row in rows:
            row.slot = next(free for free in range(10**6) if free not in self.slots)
            self.slots.add(row.slot)
        self.rows = rows

    def begin(self, rows: Sequence[Row], passed: int, ghosts: Sequence[Row]) -> None:
        self.rows = rows
        assert all(row.hidden == (passed or None) for row in rows)
        self.by_graphs, self.batch, self.level = True, len(rows) + len(ghosts), passed - 1
        if passed == 0:
            self.want("embed", 0, self.batch)

    def begin_again(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.by_graphs = False

    def run_to(self, level: int) -> None:
        for stage in range(self.level + 1, level + 1):
            self.want("run", stage, self.batch)
        self.level = level

    def read(self, level: int) -> list[Answer]:
        self.want("tell", level, self.batch)
        return [self._reading(row.life, level) for row in self.rows]

    def fill(self, rows: Sequence[Row], level: int) -> None:
        assert level == self.level
        batch = self.batch if len(rows) == len(self.rows) else len(rows)
        for skipped in range(level + 1, self.loaded_level + 1):
            self.want("fill", skipped, batch)

    def hold(self, rows: Sequence[Row]) -> None:
        for row in self.rows:
            row.hidden = self.level + 1 if row in rows else None

    def release(self, row: Row) -> None:
        self.slots.remove(row.slot)

    def _reading(self, life: Life, level: int) -> Answer:
        requests, traces = self.requests, self.traces
        domain = traces.domains.index(requests.domains[requests.domain[life.request_id]])
        start = int(requests.trace_start[life.request_id])
        place = (start % traces.num_positions + life.generated) % traces.num_positions
        at = (domain, place, level)
        return Answer(
            token=0,
            confidence=float(traces.confidence[self.name][at]),
            nll_nats=float(traces.nll_nats[self.name][at]),
        )


class ClockworkTransfer:
    def __init__(self, clock: Clockwork, arrived_s: float) -> None:
        self.clock = clock
        self.arrived_s = arrived_s

    def done(self) -> bool:
        return self.clock.time_s >= self.arrived_s

    def wait(self, until_s: float) -> None:
        self.clock.sleep_until(min(until_s, self.arrived_s))


class ClockworkWeights:
    """Takes the profile's seconds over every load."""

    def __init__(
        self, room: Room, traces: ExitTraces, requests: Requests, clock: Clockwork
    ) -> None:
        self.room, self.traces, self.requests, self.clock = room, traces, requests, clock
        self.cards = {name: candidate_card(room, name) for name in room.candidates}
        self.read: set[str] = set(room.candidates if room.fleet.weights_start == "host" else ())
        self.held: tuple[str, int] | None = None
        self.machine: ClockworkMachine | None = None

    @property
    def in_memory(self) -> frozenset[str]:
        return frozenset(self.read)

    @property
    def loaded_bytes(self) -> int:
        assert self.held is not None
        return self._bytes(*self.held)

    def _bytes(self, name: str, depth: int) -> int:
        card = self.cards[name]
        return card.weight_bytes[card.level_of(depth)]

    def _ready_s(self, name: str, depth: int) -> float:
        loading = self.room.profile.loading
        at_s = self.clock.time_s
        if name not in self.read:
            at_s += loading.disk.seconds(self.cards[name].weight_bytes[-1])
            self.read.add(name)
        missing = self._bytes(name, depth)
        if self.held is not None and self.held[0] == name:
            missing -= self._bytes(*self.held)
        return at_s + loading.host.seconds(missing)

    def bring_in(self, name: str, depth: int) -> None:
        self.clock.sleep_until(self._ready_s(name, depth))

    def fits_beside(self, num_bytes: int) -> bool:
        return True

    def begin(self, name: str, depth: int) -> ClockworkTransfer:
        return ClockworkTransfer(self.clock, self._ready_s(name, depth))

    def take_up(self, name: str, depth: int, level: int, pool_blocks: int) -> ClockworkMachine:
        assert self.machine is None or not self.machine.slots, "a row was never released"
        self.held = name, depth
        self.machine = ClockworkMachine(self.room, name, level, self.traces, self.requests)
        return self.machine


class ClockworkHost(Host):
    """A host whose iterations take the seconds that the cost model gives for what they did."""

    clock: Clockwork

    def step(self, plan: Prefill | Decode) -> Outcome:
        outcome = super().step(plan)
        seconds = self.seconds(plan, outcome)
        if outcome.captured.graphs or outcome.captured.exits:
            c = self.room.profile.model(self.served.model).coefficient_array()
            seconds += float(cost.capture_seconds(c, *map(float, outcome.captured)))
        self.clock.time_s += seconds
        self.check_blocks(plan)
        return outcome

    @property
    def served(self) -> Assignment:
        assert self.stepper is not None
        return self.stepper.assignment

    def check_blocks(self, plan: Prefill | Decode) -> None:
        """The law of blocks, at every iteration."""
        batch = self.batch
        held = sum(row.blocks for row in batch.rows)
        assert batch.free_blocks >= 0
        assert held + batch.free_blocks + batch.staged_blocks == batch.pool_blocks
        for row in batch.rows:
            runs = isinstance(plan, Decode) and row in plan.rows
            tokens = row.to_prefill or row.context + runs
            assert batch.blocks_for(tokens) <= row.blocks

    def seconds(self, plan: Prefill | Decode, outcome: Outcome) -> float:
        profile = self.room.profile.model(self.served.model)
        c = profile.coefficient_array()
        if isinstance(plan, Prefill):
            pairs = 0.0
            for row in plan.rows:
                pairs += row.to_prefill * (row.to_prefill + 1.0) * 0.5
            tokens = float(outcome.prompt_tokens)
            depth, count = float(self.served.depth), float(len(plan.rows))
            return float(
                cost.mixed_seconds(
                    c, 0.0, 0.0, 0.0, tokens, 0.0, pairs, depth, 0.0, count, count, 1.0
                )[0]
            )
        batch = len(plan.rows) + len(plan.ghosts)
        padded = profile.padded_rows(self.batch.max_batch)
        residual = float(profile.residual(self.batch.max_batch, self.served.depth)[batch])
        rows, context = float(padded[batch]), float(outcome.context_tokens)
        if self.served.exit_mode is not ExitMode.REBATCH:
            seconds, _ = cost.decode_seconds(
                c,
                rows + outcome.pending_tokens,
                context,
                context if outcome.pending_tokens else rows * outcome.longest_context_tokens,
                float(outcome.layers),
                float(outcome.checks),
                float(outcome.heads),
                float(outcome.filled_layers),
                rows,
                float(batch),
                residual,
            )
            return float(seconds)
        return self.rebatched_seconds(plan, outcome, c, rows, residual, padded)

    def rebatched_seconds(
        self,
        plan: Decode,
        outcome: Outcome,
        c: Any,
        rows: float,
        residual: float,
        padded: Any,
    ) -> float:
        assert self.stepper is not None
        context = float(outcome.context_tokens)
        padded_context = rows * outcome.longest_context_tokens
        layer_s, _ = cost.layer_seconds(c, rows, context, padded_context, 0.0, 0.0, 0.0)
        seconds = float(cost.begin_seconds(c))
        if plan.passed:
            seconds += float(cost.going_on_seconds(c, float(len(plan.rows))))
        before = outcome.first_layer
        for level in range(plan.passed, self.stepper.exit_layers.index(outcome.layers) + 1):
            seconds += (self.stepper.exit_layers[level] - before) * (layer_s * residual)
            before = self.stepper.exit_layers[level]
            at_end = level == self.stepper.level
            asked = float(len(plan.rows))
            seconds += cost.head_seconds(c, asked) if at_end else cost.check_seconds(c, asked)
        leaving = len(outcome.emitted)
        seconds += cost.told_seconds(c, float(leaving))
        filled_rows = float(padded[leaving])
        return seconds + cost.kv_fill_seconds(c, filled_rows, float(outcome.filled_layers))


def serve_by_clockwork(
    room: Room,
    traces: ExitTraces,
    requests: Requests,
    policy: Policy,
    *,
    slo: Slo | None = None,
    timeline_interval_s: float = 1.0,
    drawn_j: DrawnJ | None = None,
) -> ClockworkHost:
    """Serve a workload to its end."""
    clock = Clockwork()
    host = ClockworkHost(
        room=room,
        policy=policy,
        slo=slo or Slo(),
        lives=lives_of(requests, [[] for _ in range(len(requests))]),
        weights=ClockworkWeights(room, traces, requests, clock),
        clock=clock,
        timeline_interval_s=timeline_interval_s,
        drawn_j=drawn_j,
    )
    host.play()
    assert math.isclose(sum(host.tally.spent_s.values()), host.end_s)
    return host
