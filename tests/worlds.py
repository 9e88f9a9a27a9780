"""Worlds of one replica: a small plain description, the compiled replica made of it, and scenarios.

A `Scenario` describes requests, models and a script of what a host does, in plain tuples. `play`
drives any replica through it: the compiled one here, or the naive reference engine.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from helios_sim.cost import COEFFICIENTS
from helios_sim.loop import batch, state
from helios_sim.loop.memory import resize_pool, stage_blocks
from helios_sim.loop.queues import push_inbox
from helios_sim.loop.world import deal
from helios_sim.policy import rules
from helios_sim.policy.rules import is_breach, leaves_here

many_examples = settings(
    max_examples=int(os.environ.get("HELIOS_HYPOTHESIS_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
BATCHING = ("static", "continuous", "chunked")
EXIT_MODES = ("full", "solo", "wait", "loaded-depth", "rebatch")
UNLIMITED = 1 << 60
REQUEST_TIMES = ("admitted_s", "first_token_s", "finished_s", "last_token_s")
CAUSES = {
    state.AT_HORIZON: "at-horizon",
    state.REASSESS_DUE: "reassess",
    state.BREACHED: "breached",
    state.DRAINED: "drained",
    state.OUT_OF_WORK: "out-of-work",
    state.PAUSED: "paused",
}


@dataclass(frozen=True)
class Request:
    """What is sent at `arrival_s`, or, where it is dealt, `think_s` after some other has ended."""

    arrival_s: float
    prompt: int
    output: int
    domain: int = 0
    trace_start: int = 0
    think_s: float = 0.0
    dealt: bool = False


@dataclass(frozen=True)
class Token:
    """A position of an exit trace: by exit level, confidence, agreement and likelihood units."""

    confidence: tuple[float, ...]
    agrees: tuple[int, ...]
    nll: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """An early-exit model: costs, exits and what its tokens do.

    `traces` is by domain, `residual` by loaded level and batch; graphs are captured for batches up
    to `graph_rows`.
    """

    coefficients: tuple[float, ...]
    exit_layers: tuple[int, ...]
    max_positions: int
    threshold: float
    padded_rows: tuple[float, ...]
    graph_rows: int
    residual: tuple[tuple[float, ...], ...]
    traces: tuple[tuple[Token, ...], ...]

    def __repr__(self) -> str:
        return f"Model(exit_layers={self.exit_layers}, trace_length={len(self.traces[0])}, ...)"


@dataclass(frozen=True)
class Assignment:
    """What a replica runs, and the pool it has beside it."""

    model: int
    level: int
    exit_mode: str
    pool_blocks: int


@dataclass(frozen=True)
class Orders:
    """When a replica admits and when it asks: quota, finish target and the breach window."""

    quota: int = UNLIMITED
    finish_target: int = UNLIMITED
    watching: bool = False
    sliding: bool = False
    window_tokens: int = 1
    breach_limit: int = 0


@dataclass(frozen=True)
class Step:
    """What a host does at the next stop, or once `at_s` has come: at the first boundary then.

    It stages a share of the free blocks, as for weights that arrive within `stage_s`, until the
    assignment changes; then it lets the running requests end (`drain`), preempts them (`recompute`)
    or keeps them and the assignment (`keep`, which stages nothing), idles for `load_s` and gives
    new orders.
    """

    at_s: float
    staged_share: float
    stage_s: float
    way: str
    assignment: Assignment
    load_s: float
    orders: Orders


@dataclass(frozen=True)
class Scenario:
    """One replica's whole run."""

    requests: tuple[Request, ...]
    models: tuple[Model, ...]
    batching: str
    max_batch: int
    max_held: int
    max_prefill_tokens: int
    chunk_tokens: int
    recompute_kv: bool
    block_tokens: int
    watermark: float
    idle_w: float
    assignment: Assignment
    orders: Orders
    steps: tuple[Step, ...] = ()


class Replica(Protocol):
    """What a host does with a replica, whichever engine runs it."""

    def advance(self, horizon_s: float) -> str: ...
    def now_s(self) -> float: ...
    def num_running(self) -> int: ...
    def num_waiting(self) -> int: ...
    def in_iteration(self) -> bool: ...
    def pause(self, wanted: bool) -> None: ...
    def drain(self, wanted: bool) -> None: ...
    def preempt_all(self) -> None: ...
    def num_free_blocks(self) -> int: ...
    def stage(self, num_blocks: int) -> None: ...
    def idle_until(self, until_s: float) -> None: ...
    def assign(self, assignment: Assignment) -> None: ...
    def order(self, orders: Orders) -> None: ...


Stop = tuple[str, float, int, int]
"""Why a replica stopped, when, and how many requests ran and waited."""


def play(replica: Replica, scenario: Scenario) -> list[Stop]:
    """Drive a replica through a scenario's steps and then to the end of its work."""
    stops: list[Stop] = []

    def advance(horizon_s: float) -> str:
        cause = replica.advance(horizon_s)
        stops.append((cause, replica.now_s(), replica.num_running(), replica.num_waiting()))
        return cause

    def reach_boundary(at_s: float) -> None:
        if replica.in_iteration():
            replica.pause(True)
            advance(math.inf)
            replica.pause(False)
        elif replica.now_s() < at_s < math.inf:
            replica.idle_until(at_s)

    for step in scenario.steps:
        if advance(step.at_s) in ("at-horizon", "out-of-work"):
            reach_boundary(step.at_s)
        if step.stage_s > 0.0:
            replica.order(Orders())
            staged = int(step.staged_share * replica.num_free_blocks())
            ready_s = replica.now_s() + step.stage_s
            replica.stage(staged)
            advance(ready_s)
            reach_boundary(ready_s)
        if step.way == "drain":
            replica.drain(True)
            while replica.num_running() > 0:
                if advance(math.inf) == "reassess":
                    replica.order(Orders())
            replica.drain(False)
        if step.way == "recompute":
            replica.preempt_all()
        if step.way != "keep":
            replica.assign(step.assignment)
        replica.idle_until(replica.now_s() + step.load_s)
        replica.order(step.orders)
    last = scenario.steps[-1].orders if scenario.steps else scenario.orders
    replica.order(replace(last, quota=UNLIMITED, finish_target=UNLIMITED))
    while advance(math.inf) != "out-of-work":
        pass
    return stops


class CompiledReplica:
    """The compiled batch loop behind the host's interface; `cuts` interrupt its advances."""

    def __init__(self, scenario: Scenario, cuts: Sequence[float] = ()) -> None:
        self.scenario = scenario
        self.world = build_world(scenario)
        self.record = self.world.replicas[0]
        self.cuts = sorted(cuts)

    def at_cut(self) -> None:
        """Called whenever an advance was cut; tests look at the world here."""

    def advance(self, horizon_s: float) -> str:
        for cut_s in self.cuts:
            if cut_s < horizon_s:
                cause = batch.advance(self.world, 0, cut_s)
                self.at_cut()
                if cause not in (state.AT_HORIZON, state.OUT_OF_WORK):
                    return CAUSES[cause]
        cause = batch.advance(self.world, 0, horizon_s)
        self.at_cut()
        return CAUSES[cause]

    def now_s(self) -> float:
        return float(self.record.now_s)

    def num_running(self) -> int:
        return int(self.record.num_rows)

    def num_waiting(self) -> int:
        return int(self.record.num_waiting)

    def in_iteration(self) -> bool:
        return bool(self.record.phase != state.BETWEEN)

    def pause(self, wanted: bool) -> None:
        self.record.pausing = int(wanted)

    def drain(self, wanted: bool) -> None:
        self.record.draining = int(wanted)

    def preempt_all(self) -> None:
        batch.preempt_all(self.world, 0)

    def num_free_blocks(self) -> int:
        return int(self.record.free_blocks)

    def stage(self, num_blocks: int) -> None:
        stage_blocks(self.record, num_blocks)

    def idle_until(self, until_s: float) -> None:
        batch.pass_idle_time(self.record, until_s)

    def assign(self, assignment: Assignment) -> None:
        record = self.record
        num_levels = self.world.exit_layers.shape[1]
        at_loaded_depth = assignment.exit_mode in ("full", "loaded-depth")
        record.model = assignment.model
        record.level = assignment.level
        record.depth = self.world.exit_layers[assignment.model, assignment.level]
        record.column = assignment.level + (0 if at_loaded_depth else num_levels)
        record.exit_mode = state.EXIT_MODES[assignment.exit_mode]
        record.batch_limit = 1 if assignment.exit_mode == "solo" else record.max_batch
        resize_pool(record, assignment.pool_blocks)
        self.world.captured[:] = 0

    def order(self, orders: Orders) -> None:
        record = self.record
        record.quota = orders.quota
        record.finish_target = orders.finish_target
        record.watching = int(orders.watching)
        record.window_kind = state.SLIDING if orders.sliding else state.TUMBLING
        record.window_tokens = orders.window_tokens
        record.breach_limit = orders.breach_limit
        record.window_seen = record.window_breaches = record.tripped = 0


def linked(requests: Any, head: int) -> list[int]:
    """The requests of a linked list."""
    found = []
    while head != state.NOBODY:
        found.append(int(head))
        head = requests[head].next
    return found


def inbox_of(requests: Any, record: Any) -> list[int]:
    """The requests of a replica's inbox, in no order: those of its list and those of its heap."""
    found = linked(requests, record.inbox_head)
    heap = [] if record.inbox_heap == state.NOBODY else [int(record.inbox_heap)]
    for i in heap:
        heap += linked(requests, requests[i].later)
    return found + heap


def world_bytes(world: state.World) -> bytes:
    """Every byte of a world's state."""
    arrays = (np.asarray(part) for part in world)
    return b"".join(array.tobytes() for array in arrays)


def build_world(scenario: Scenario) -> state.World:
    """The compiled loop's state of a scenario, before anything has happened."""
    num_models = len(scenario.models)
    num_rows = scenario.max_batch + scenario.max_held
    num_levels = max(len(model.exit_layers) for model in scenario.models)
    num_domains = len(scenario.models[0].traces)
    trace_length = len(scenario.models[0].traces[0])
    num_positions = num_domains * trace_length
    exit_layers = np.zeros((num_models, num_levels), np.int64)
    residual = np.ones((num_models, num_levels, scenario.max_batch + 1))
    leaving = np.zeros((num_models, 2 * num_levels, num_positions), np.uint8)
    breach = np.zeros_like(leaving)
    prefix = np.zeros((num_models, 2 * num_levels, num_positions + num_domains, 4), np.int32)
    for m, model in enumerate(scenario.models):
        missing = num_levels - len(model.exit_layers)
        exit_layers[m] = model.exit_layers + model.exit_layers[-1:] * missing
        residual[m, : len(model.exit_layers)] = model.residual
        for level in range(len(model.exit_layers)):
            for column, at_own_exit in ((level, False), (num_levels + level, True)):
                fates = [
                    [fate_of(model, token, level, at_own_exit) for token in trace]
                    for trace in model.traces
                ]
                leaving[m, column] = [left for trace in fates for left, *_ in trace]
                breach[m, column] = [sums[2] for trace in fates for _, *sums in trace]
                for d, trace in enumerate(fates):
                    first = d * (trace_length + 1)
                    sums = np.cumsum([sums for _, *sums in trace], axis=0)
                    prefix[m, column, first + 1 : first + 1 + trace_length] = sums
    world = state.World(
        replicas=_records(1, state.REPLICA),
        rows=_records((1, num_rows), state.ROW),
        order=np.arange(num_rows, dtype=np.int32)[None, :].copy(),
        lanes=np.zeros((1, num_rows), np.int64),
        block_offsets=np.zeros((1, scenario.block_tokens), np.int64),
        requests=_requests(scenario.requests),
        coefficients=np.array([model.coefficients for model in scenario.models]),
        padded=np.array([model.padded_rows for model in scenario.models]),
        residual=residual,
        exit_layers=exit_layers,
        graph_rows=np.array([model.graph_rows for model in scenario.models]),
        captured=np.zeros((1, state.GRAPH_KINDS, num_levels, 2 * num_rows + 4), np.uint8),
        max_positions=np.array([model.max_positions for model in scenario.models]),
        leaving_level=leaving,
        breach=breach,
        prefix=prefix,
        trace_length=trace_length,
        exit_counts=np.zeros((1, num_models, num_levels), np.int64),
        itl_counts=np.zeros((1, state.ITL_OCTAVES * state.ITL_BINS_PER_OCTAVE), np.int64),
        window=np.zeros((1, 64), np.uint8),
        samples=_records((1, state.TIMELINE_CAPACITY), state.SAMPLE),
    )
    record = world.replicas[0]
    record.waiting_head = record.waiting_tail = state.NOBODY
    record.inbox_head = record.inbox_tail = record.inbox_heap = state.NOBODY
    record.dealt_head = state.NOBODY
    record.batching = state.BATCHING[scenario.batching]
    record.max_batch = scenario.max_batch
    record.max_held = scenario.max_held
    record.max_prefill_tokens = scenario.max_prefill_tokens
    record.chunk_tokens = scenario.chunk_tokens
    record.recompute_kv = int(scenario.recompute_kv)
    record.block_tokens = scenario.block_tokens
    record.watermark = scenario.watermark
    record.idle_w = scenario.idle_w
    record.sample_interval_s = 1.0
    record.counts_at_full_depth = int(rules.is_breach is not is_breach)
    num_users = sum(not request.dealt for request in scenario.requests)
    for i in range(num_users):
        push_inbox(world, 0, i)
    deal(world, num_users)
    replica = CompiledReplica.__new__(CompiledReplica)
    replica.world, replica.record = world, record
    replica.assign(scenario.assignment)
    replica.order(scenario.orders)
    return world


def fate_of(
    model: Model, token: Token, level: int, at_own_exit: bool
) -> tuple[int, int, int, int, int]:
    """Where a token leaves under a loaded level: level, agreement, likelihood, breach, relative."""
    fits = [leaves_here(confidence, model.threshold) for confidence in token.confidence]
    left = level
    if at_own_exit and any(fits[:level]):
        left = fits.index(True)
    full = level == len(fits) - 1
    breached = left == level and rules.is_breach(token.confidence[level], model.threshold, full)
    relative = breached and any(fits[level + 1 :])
    return left, token.agrees[left], token.nll[left], int(breached), int(relative)


def _records(shape: Any, dtype: Any) -> Any:
    return np.zeros(shape, dtype).view(np.recarray)


def _requests(requests: Sequence[Request]) -> Any:
    records = _records(len(requests), state.REQUEST)
    for name in ("arrival_s", "prompt", "output", "domain", "trace_start", "think_s"):
        records[name] = [getattr(request, name) for request in requests]
    records.next = state.NOBODY
    for name in REQUEST_TIMES:
        records[name] = np.nan
    return records


@st.composite
def scenarios(draw: st.DrawFn, with_steps: bool = True, splitting: bool = False) -> Scenario:
    """Small scenarios with tight pools, wrapping traces and coinciding times among them.

    Where batches are `splitting`, all rebatch, and most have rows enough to split.
    """
    batching = draw(st.sampled_from(BATCHING))
    recompute_kv = not splitting and draw(st.booleans())
    # Rebatching needs filled KV.
    modes = EXIT_MODES[:-1] if recompute_kv else EXIT_MODES
    modes = ("rebatch",) if splitting else modes
    num_models = draw(st.integers(1, 3))
    num_requests = draw(st.sampled_from((1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 35, 40)))
    max_batch = draw(st.sampled_from((2, 3, 4, 8) if splitting else (1, 2, 3, 4, 8)))
    block_tokens = draw(st.sampled_from((1, 2, 4, 16)))
    on_grid = draw(st.booleans())
    # What need not shrink comes from a seed: drawing thousands of numbers one by one is slow.
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    models = draw_models(rng, num_models, max_batch, on_grid)
    longest = rng.choice((4, 12, 40))
    spacing_s = rng.choice((0.0, 0.1) if splitting else (0.0, 0.1, 0.3, 1.0, 3.0))
    span_s = spacing_s * num_requests
    requests = draw_requests(rng, num_requests, len(models[0].traces), longest, span_s, on_grid)

    def assignment(mode: str) -> Assignment:
        m = rng.randrange(num_models)
        deepest = len(models[m].exit_layers) - 1
        level = deepest if mode == "full" else rng.choice((deepest, rng.randint(0, deepest)))
        tokens = rng.choice((1, 2, 3, 6, 20)) * longest
        return Assignment(m, level, mode, max(2, tokens // block_tokens))

    steps: list[Step] = []
    first = assignment(draw(st.sampled_from(modes)))
    serving = first
    for _ in range(draw(st.integers(0, 5)) if with_steps else 0):
        way = draw(st.sampled_from(("keep", "drain", "recompute")))
        target = draw(st.sampled_from(modes))
        if way != "keep":
            serving = assignment(target)
        at_s = rng.uniform(0.0, 1.5) * requests[-1].arrival_s if rng.random() < 0.5 else math.inf
        stages = way != "keep" and rng.random() < 0.4
        stage_s = draw_time(rng, 8.0, on_grid) if stages else 0.0
        load_s = draw_time(rng, 2.0, on_grid) if rng.random() < 0.5 else 0.0
        steps.append(Step(at_s, rng.random(), stage_s, way, serving, load_s, draw_orders(rng)))
    return Scenario(
        requests=requests,
        models=models,
        batching=batching,
        max_batch=max_batch,
        max_held=rng.choice((0, 1, 3, 8)) if batching == "continuous" else 0,
        max_prefill_tokens=rng.choice((1, 8, 32, 128)),
        chunk_tokens=max_batch + rng.choice((0, 1, 5, 40)),
        recompute_kv=recompute_kv,
        block_tokens=block_tokens,
        watermark=rng.choice((0.0, 0.01, 0.1, 0.4)),
        idle_w=rng.choice((0.0, 17.3)),
        assignment=first,
        orders=draw_orders(rng) if with_steps else Orders(),
        steps=tuple(steps),
    )


def draw_time(rng: random.Random, largest_s: float, on_grid: bool) -> float:
    """A time, on a coarse binary grid where events are to coincide."""
    return rng.randint(0, int(64 * largest_s)) / 64.0 if on_grid else rng.uniform(0.0, largest_s)


def draw_orders(rng: random.Random) -> Orders:
    """Orders of which any may be unlimited."""
    return Orders(
        quota=rng.choice((UNLIMITED, UNLIMITED, 0, 1, 3, 10)),
        finish_target=rng.choice((UNLIMITED, 1, 2, 7)),
        watching=rng.random() < 0.7,
        sliding=rng.random() < 0.5,
        window_tokens=rng.randint(1, 20),
        breach_limit=rng.choice((0, 1, 3, 8)),
    )


def draw_models(
    rng: random.Random, num_models: int, max_batch: int, on_grid: bool
) -> tuple[Model, ...]:
    """Models with 1 to 5 exits, costs of any regime, on the same short traces."""
    trace_length = rng.randint(7, 50)
    num_domains = rng.randint(1, 3)
    models = []
    for _ in range(num_models):
        num_exits = rng.choice((1, 2, 3, 3, 4, 5, 5))
        layers = tuple(sorted(rng.sample(range(1, 13), num_exits)))
        coefficients = []
        for name in COEFFICIENTS:
            scale = 0.25 if name.endswith(("fixed_s", "floor_s", "overhead_s")) else 0.03
            scale = 0.002 if "_token" in name or "_pair" in name else scale
            value = rng.choice((0.0, 1.0, 1.0, 3.0, rng.random()))
            if on_grid:
                value = float(math.ceil(value)) * (0.0 if "_token" in name else 1.0) / 64.0
            coefficients.append(value if on_grid else value * scale * rng.random())
        active_w = coefficients[COEFFICIENTS.index("power.active_w")]
        above_w = rng.choice((0.01, 0.5, 1e9))
        coefficients[COEFFICIENTS.index("power.limit_w")] = active_w + above_w
        coefficients[COEFFICIENTS.index("rebatch.overhead_s")] = (
            rng.choice((0.0, 1.0, 8.0, 64.0)) / 64.0
        )
        coefficients[COEFFICIENTS.index("decode.fixed_s")] += 1.0 / 64.0
        coefficients[COEFFICIENTS.index("prefill.fixed_s")] += 1.0 / 64.0
        bucket = rng.choice((1, 1, 2, 4))
        models.append(
            Model(
                coefficients=tuple(coefficients),
                exit_layers=layers,
                max_positions=rng.choice((20, 50, 1000)),
                threshold=0.5,
                padded_rows=tuple(
                    float(-(-rows // bucket) * bucket) for rows in range(max_batch + 1)
                ),
                graph_rows=rng.choice((0, 2, 4, 16)),
                residual=tuple(
                    tuple(1.0 if on_grid else rng.uniform(0.5, 2.0) for _ in range(max_batch + 1))
                    for _ in layers
                ),
                traces=tuple(
                    tuple(draw_token(rng, num_exits) for _ in range(trace_length))
                    for _ in range(num_domains)
                ),
            )
        )
    return tuple(models)


def draw_token(rng: random.Random, num_exits: int) -> Token:
    """A token, confident or not as a whole, whose confidence need not grow with depth."""
    mostly, rarely = rng.choice(((0.1, 0.5), (0.5, 0.9), (0.9, 0.4)))
    return Token(
        confidence=tuple(mostly if rng.random() < 0.7 else rarely for _ in range(num_exits)),
        agrees=tuple(rng.randint(0, 1) for _ in range(num_exits)),
        nll=tuple(rng.randint(0, 5000) for _ in range(num_exits)),
    )


def draw_requests(
    rng: random.Random,
    num_requests: int,
    num_domains: int,
    longest: int,
    span_s: float,
    on_grid: bool,
) -> tuple[Request, ...]:
    """Requests in order of arrival, or, in a closed loop, of which the last ones are dealt."""
    arrivals = sorted(draw_time(rng, span_s, on_grid) for _ in range(num_requests))
    num_users = rng.choice((num_requests, num_requests, rng.randint(1, num_requests)))
    return tuple(
        Request(
            arrival_s=arrivals[i],
            prompt=rng.randint(1, longest),
            output=rng.randint(1, rng.choice((2, longest, longest))),
            domain=rng.randrange(num_domains),
            trace_start=rng.choice((0, rng.randrange(1 << 31), (1 << 31) - 1)),
            think_s=rng.choice((0.0, draw_time(rng, 3.0, on_grid))),
            dealt=i >= num_users,
        )
        for i in range(num_requests)
    )
