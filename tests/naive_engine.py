"""The naive reference engine: one replica, one event an iteration, plain Python, from the text.

It follows `docs/engine.md` sentence by sentence and shares with the compiled loop only the cost
functions and the hot rules, called as they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from helios_sim import cost
from helios_sim.policy import rules
from tests.worlds import Assignment, Model, Orders, Request, Scenario, Token

NEVER = math.inf


@dataclass(eq=False)
class Life:
    """What becomes of one request."""

    request_id: int
    sent: Request
    arrival_s: float
    status: str = "unsent"
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    generated: int = 0
    decoded: int = 0
    preemptions: int = 0
    agree: int = 0
    nll: int = 0
    breaches: int = 0
    relative_breaches: int = 0
    executed_layers: int = 0

    @property
    def num_tokens(self) -> int:
        """The tokens it has: its prompt and what was generated before a preemption."""
        return self.sent.prompt + self.generated


@dataclass(eq=False)
class Row:
    """A running request: tokens in its KV cache, tokens still to prefill, blocks it holds."""

    life: Life
    to_prefill: int
    blocks: int
    context: int = 0
    pending: int = 0
    held: int = 0

    @property
    def decoding(self) -> bool:
        """Whether all its prompt is prefilled."""
        return self.to_prefill == 0

    @property
    def fresh(self) -> bool:
        """Whether it starts a new token when it runs next."""
        return self.decoding and self.held == 0


@dataclass
class Iteration:
    """What is under way: its end, its energy, and what becomes of each row it carries."""

    start_s: float
    seconds: float
    joules: float
    chunks: dict[Row, int] = field(default_factory=dict)
    leaves_at: dict[Row, int] = field(default_factory=dict)
    held_at: dict[Row, int] = field(default_factory=dict)
    executed_layers: int = 0

    @property
    def end_s(self) -> float:
        """When it ends."""
        return self.start_s + self.seconds


class NaiveReplica:
    """One replica and its requests."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.lives = [Life(i, sent, sent.arrival_s) for i, sent in enumerate(scenario.requests)]
        self.to_come = [life for life in self.lives if not life.sent.dealt]
        self.dealt = deque(life for life in self.lives if life.sent.dealt)
        self.queue: deque[Life] = deque()
        self.rows: list[Row] = []
        self.iteration: Iteration | None = None
        self.clock_s = 0.0
        self.draining = self.pausing = self.tripped = False
        self.static_size = 0
        self.next_row = 0
        self.free_blocks = 0
        self.energy_j = self.idle_energy_j = self.idle_s = self.busy_s = 0.0
        self.batch_seconds = self.kv_block_seconds = 0.0
        self.num_iterations = self.num_breaches = self.num_emitted = self.max_running = 0
        self.exit_counts = [[0] * len(model.exit_layers) for model in scenario.models]
        self.gaps_s: list[float] = []
        self.last_token_s: dict[Life, float] = {}
        self.assign(scenario.assignment)
        self.order(scenario.orders)

    # What a host does

    def now_s(self) -> float:
        return self.clock_s

    def num_running(self) -> int:
        return len(self.rows)

    def num_waiting(self) -> int:
        return len(self.queue)

    def in_iteration(self) -> bool:
        return self.iteration is not None

    def pause(self, wanted: bool) -> None:
        self.pausing = wanted

    def drain(self, wanted: bool) -> None:
        self.draining = wanted

    def preempt_all(self) -> None:
        while self.rows:
            self.preempt_last()

    def assign(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.pool_blocks = self.free_blocks = assignment.pool_blocks
        self.graphs: set[tuple[str, int, float]] = set()

    def order(self, orders: Orders) -> None:
        self.orders = orders
        self.quota = orders.quota
        self.to_finish = orders.finish_target
        self.window: deque[bool] = deque()
        self.tripped = False

    def stage(self, num_blocks: int) -> None:
        self.free_blocks -= num_blocks

    def num_free_blocks(self) -> int:
        return self.free_blocks

    def idle_until(self, until_s: float) -> None:
        joules = self.scenario.idle_w * (until_s - self.clock_s)
        self.energy_j += joules
        self.idle_energy_j += joules
        self.idle_s += until_s - self.clock_s
        self.clock_s = until_s

    def advance(self, horizon_s: float) -> str:
        """Go from event to event until somebody must decide, or just before the horizon."""
        while True:
            if self.iteration is not None:
                if self.iteration.end_s >= horizon_s:
                    return "at-horizon"
                self.end_iteration(self.iteration)
                self.enter_arrivals()
                cause = self.who_must_decide()
                if cause is not None:
                    return cause
            elif self.clock_s >= horizon_s:
                return "at-horizon"
            self.enter_arrivals()
            self.iteration = self.next_iteration()
            if self.iteration is None:
                if self.draining:
                    return "drained"
                if not self.to_come:
                    return "out-of-work"
                if self.next_to_come().arrival_s >= horizon_s:
                    return "at-horizon"
                self.idle_until(self.next_to_come().arrival_s)

    # At a boundary

    def next_to_come(self) -> Life:
        return min(self.to_come, key=lambda life: (life.arrival_s, life.request_id))

    def enter_arrivals(self) -> None:
        while self.to_come and self.next_to_come().arrival_s <= self.clock_s:
            life = self.next_to_come()
            self.to_come.remove(life)
            life.status = "waiting"
            self.queue.append(life)

    def who_must_decide(self) -> str | None:
        if self.to_finish <= 0:
            self.tripped = False
            return "reassess"
        if self.tripped:
            self.tripped = False
            return "breached"
        if self.draining and not self.rows:
            return "drained"
        return "paused" if self.pausing else None

    def next_iteration(self) -> Iteration | None:
        """The next iteration, unless there is nothing to run."""
        while True:
            had_rows = bool(self.rows)
            if self.scenario.batching == "chunked":
                iteration = self.next_chunked()
            else:
                iteration = self.next_whole()
            if iteration is not None or not had_rows:
                return iteration

    def next_whole(self) -> Iteration | None:
        """Prompts that join are prefilled whole, before anybody decodes on."""
        if self.scenario.batching == "continuous":
            joined = self.admit_prompts(self.scenario.max_prefill_tokens)
        else:
            joined = self.admit_prompts(NEVER) if not self.rows else []
            self.static_size = len(joined) or self.static_size
        if joined:
            return self.prefill(joined)
        self.make_room()
        return self.decode() if self.rows else None

    def next_chunked(self) -> Iteration | None:
        """Prompts are prefilled in chunks beside those that decode."""
        self.make_room()
        passed = self.company()
        if passed > 0:
            return self.decode_rebatched(passed)
        decoding = [row for row in self.rows if row.fresh]
        self.give_room(decoding)
        chunks = self.share_chunks(self.scenario.chunk_tokens - len(decoding))
        if chunks:
            return self.mixed(decoding, chunks)
        return self.decode() if self.rows else None

    # Admission

    def may_join(self) -> bool:
        """Whether the head of the queue may join; a head that can never fit is refused."""
        if self.draining or self.quota <= 0:
            return False
        while self.queue and self.never_fits(self.queue[0]):
            self.refuse(self.queue.popleft())
            self.enter_arrivals()
        if not self.queue:
            return False
        running = len(self.rows) - self.making_room()
        most = 1 if self.assignment.exit_mode == "solo" else self.scenario.max_batch
        needed = self.blocks_for(self.queue[0].num_tokens)
        watermark = int(self.scenario.watermark * self.pool_blocks)
        has_room = running < most and needed <= self.free_blocks
        return has_room and rules.may_join(running, most, needed, self.free_blocks, watermark)

    def making_room(self) -> int:
        """Rows held by `rebatch` whose places in the batch others may take."""
        if self.assignment.exit_mode != "rebatch":
            return 0
        num_held = sum(row.held > 0 for row in self.rows)
        return max(0, min(num_held, self.scenario.max_held, len(self.rows) - 1))

    def never_fits(self, life: Life) -> bool:
        whole = life.sent.prompt + life.sent.output
        return whole > self.model.max_positions or self.blocks_for(whole - 1) > self.pool_blocks

    def refuse(self, life: Life) -> None:
        life.status = "refused"
        self.send_next()

    def admit(self) -> Row:
        life = self.queue.popleft()
        life.status = "running"
        if life.admitted_s is None:
            life.admitted_s = self.clock_s
        blocks = self.blocks_for(life.num_tokens)
        self.free_blocks -= blocks
        self.quota -= 1
        self.rows.append(Row(life, life.num_tokens, blocks))
        self.max_running = max(self.max_running, len(self.rows))
        return self.rows[-1]

    def admit_prompts(self, token_budget: float) -> list[Row]:
        """Prompts join until the budget is spent; the first may exceed it alone."""
        joined: list[Row] = []
        tokens = 0
        while self.may_join():
            tokens += self.queue[0].num_tokens
            if joined and tokens > token_budget:
                break
            joined.append(self.admit())
        return joined

    def share_chunks(self, token_budget: int) -> dict[Row, int]:
        """The budget goes to unfinished prompts in order of admission, then to new ones."""
        chunks: dict[Row, int] = {}
        for row in self.rows:
            if not row.decoding and token_budget > 0:
                chunks[row] = min(row.to_prefill, token_budget)
                token_budget -= chunks[row]
        while token_budget > 0 and self.may_join():
            row = self.admit()
            chunks[row] = min(row.to_prefill, token_budget)
            token_budget -= chunks[row]
        return chunks

    # Room

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.scenario.block_tokens)

    def needs_block(self, row: Row) -> bool:
        return row.fresh and row.context == row.blocks * self.scenario.block_tokens

    def make_room(self) -> None:
        """Preempt the last admitted until every decoding row can have the block it needs."""
        while sum(map(self.needs_block, self.rows)) > self.free_blocks:
            self.preempt_last()

    def give_room(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self.needs_block(row):
                row.blocks += 1
                self.free_blocks -= 1

    def preempt_last(self) -> None:
        row = self.rows.pop()
        self.free_blocks += row.blocks
        self.quota += 1
        row.life.preemptions += 1
        row.life.status = "waiting"
        self.queue.appendleft(row.life)

    # Iterations

    @property
    def model(self) -> Model:
        return self.scenario.models[self.assignment.model]

    @property
    def depth(self) -> int:
        return self.model.exit_layers[self.assignment.level]

    def residual(self, batch: int) -> float:
        """The factor on a decode layer's time at the loaded depth."""
        return self.model.residual[self.assignment.level][batch]

    @property
    def exits_active(self) -> bool:
        return self.assignment.exit_mode in ("solo", "wait", "rebatch")

    def token(self, life: Life) -> Token:
        """What the next token of a request does at each exit."""
        trace = self.model.traces[life.sent.domain]
        return trace[(life.sent.trace_start + life.generated) % len(trace)]

    def own_exit(self, row: Row) -> int:
        """Where a row's next token leaves by its own word, no deeper than the loaded level."""
        level = self.assignment.level
        if not self.exits_active:
            return level
        for exit_level, confidence in enumerate(self.token(row.life).confidence[:level]):
            if rules.leaves_here(confidence, self.model.threshold):
                return exit_level
        return level

    def fed_again(self, rows: Sequence[Row]) -> int:
        """Tokens without KV in the deeper layers, where that is recomputed."""
        return sum(row.pending for row in rows) if self.scenario.recompute_kv else 0

    def read_tokens(self, rows: Sequence[Row], padded: float) -> tuple[float, float]:
        """KV tokens that the rows read, and those read where all are padded to the longest."""
        reads = [row.context + 1 for row in rows]
        context = float(sum(reads))
        if self.fed_again(rows) > 0:
            return context, context
        return context, padded * max(reads, default=0)

    def prefill(self, joined: list[Row]) -> Iteration:
        return self.mixed([], {row: row.to_prefill for row in joined})

    def mixed(self, decoding: list[Row], chunks: dict[Row, int]) -> Iteration:
        """Prompt tokens, alone or beside decoding rows, through all loaded layers."""
        c = self.model.coefficients
        padded = self.model.padded_rows[len(decoding)]
        rows = padded + self.fed_again(decoding)
        context, padded_context = self.read_tokens(decoding, padded)
        tokens = float(sum(chunks.values()))
        reread = float(sum(row.context for row in chunks))
        pairs = sum(chunk * (row.context + (chunk + 1) / 2) for row, chunk in chunks.items())
        checks = self.assignment.level if self.exits_active else 0
        head_rows = padded + sum(row.to_prefill == chunk for row, chunk in chunks.items())
        residual = self.residual(len(decoding)) if decoding else 1.0
        prompt_work = (tokens, reread, pairs)
        seconds, _ = cost.mixed_seconds(
            c,
            rows,
            context,
            padded_context,
            *prompt_work,
            self.depth,
            checks,
            head_rows,
            len(chunks),
            residual,
        )
        joules = cost.mixed_joules(
            c, rows, context, padded_context, tokens, pairs, self.depth, checks, head_rows, seconds
        )
        leaves_at = {row: self.own_exit(row) for row in decoding}
        return Iteration(self.clock_s, seconds, joules, chunks, leaves_at, {}, self.depth)

    def decode(self) -> Iteration:
        """Every row emits a token, or with `rebatch` a company of them runs."""
        if self.assignment.exit_mode == "rebatch":
            return self.decode_rebatched(self.company())
        self.give_room(self.rows)
        c = self.model.coefficients
        static = self.scenario.batching == "static"
        batch = self.static_size if static else len(self.rows)
        padded, residual = self.model.padded_rows[batch], self.residual(batch)
        leaves_at = {row: self.own_exit(row) for row in self.rows}
        deepest = max(leaves_at.values())
        layers = self.model.exit_layers[deepest]
        at_loaded_level = deepest == self.assignment.level
        checks = deepest + (not at_loaded_level) if self.exits_active else 0
        heads = int(at_loaded_level)
        again = self.fed_again(self.rows)
        filled = 0 if self.scenario.recompute_kv else self.depth - layers
        context, padded_context = self.read_tokens(self.rows, padded)
        read = (padded + again, context, padded_context)
        passed = (layers, checks, heads, filled, padded)
        seconds, _ = cost.decode_seconds(c, *read, *passed, batch, residual)
        joules = cost.decode_joules(c, *read, *passed, seconds)
        if again == 0:
            asked = range(deepest + 1) if self.exits_active else [deepest]
            captured_s = self.capture(0, deepest, asked, padded, padded if filled else None)
            seconds += captured_s
            joules += cost.capture_joules(c, captured_s)
        return Iteration(self.clock_s, seconds, joules, {}, leaves_at, {}, layers)

    def capture(
        self, passed: int, last: int, asked: Sequence[int], rows: float, filled_rows: float | None
    ) -> float:
        """Seconds of capturing the graphs that a decode wants and that are not there yet."""
        wanted = [("embed", 0, rows)] if passed == 0 else []
        for level in range(passed, self.assignment.level + 1):
            if level <= last:
                wanted.append(("run", level, rows))
                wanted += [("tell", level, rows)] if level in asked else []
            elif filled_rows is not None:
                wanted.append(("fill", level, filled_rows))
        bounds = (0, *self.model.exit_layers)
        new = [
            (kind, bounds[level + 1] - bounds[level])
            for kind, level, of_rows in wanted
            if of_rows <= self.model.graph_rows and (kind, level, of_rows) not in self.graphs
        ]
        self.graphs.update(wanted)
        exits = sum(kind == "tell" for kind, _ in new)
        ran_layers = sum(layers for kind, layers in new if kind == "run")
        filled_layers = sum(layers for kind, layers in new if kind == "fill")
        counts = (len(new) - exits, exits, ran_layers, filled_layers)
        return cost.capture_seconds(self.model.coefficients, *map(float, counts))

    # Rebatching

    def company(self) -> int:
        """How many exits those rows have passed that run next."""
        if self.assignment.exit_mode != "rebatch":
            return 0
        num_fresh = min(sum(row.fresh for row in self.rows), self.scenario.max_batch)
        for passed in range(self.assignment.level, 0, -1):
            num_held = sum(row.held == passed for row in self.rows)
            if num_held >= max(1, num_fresh):
                return passed
        return 0

    def next_company(self, passed: int) -> list[Row]:
        """As many rows as a pass has; of more fresh ones each has its turn."""
        rows = [row for row in self.rows if row.decoding]
        first = self.next_row if passed == 0 and self.next_row < len(rows) else 0
        places = [*range(first, len(rows)), *range(first)]
        chosen = [k for k in places if rows[k].held == passed][: self.scenario.max_batch]
        if passed == 0:
            self.next_row = chosen[-1] + 1
        return [rows[k] for k in sorted(chosen)]

    def decode_rebatched(self, passed: int) -> Iteration:
        """A company runs from the exit it has passed to the first that lets anybody leave."""
        company = self.next_company(passed)
        if passed == 0:
            self.give_room(company)
        c, exit_layers = self.model.coefficients, self.model.exit_layers
        loaded, batch = self.assignment.level, len(company)
        rows, residual = self.model.padded_rows[batch], self.residual(batch)
        context, padded_context = self.read_tokens(company, rows)
        own = {row: self.own_exit(row) for row in company}
        layer_s = cost.layer_seconds(c, rows, context, padded_context, 0.0, 0.0, 0.0)[0] * residual
        layer_j = cost.layer_joules(c, rows, context, padded_context, 0.0, 0.0)
        head_s, check_s = cost.head_seconds(c, batch), cost.check_seconds(c, batch)
        begin_s, going_on_s = cost.begin_seconds(c), cost.going_on_seconds(c, batch)
        seconds, joules = begin_s, 0.0
        if passed > 0:
            seconds += going_on_s
        for level in range(passed, loaded + 1):
            layers = exit_layers[level] - (exit_layers[level - 1] if level else 0)
            seconds += layers * layer_s
            joules += layers * layer_j
            if level == loaded:
                seconds += head_s
                joules += cost.head_joules(c, rows)
                leavers = company
                break
            seconds += check_s
            joules += cost.check_joules(c, rows)
            leavers = [row for row in company if own[row] <= level]
            if len(leavers) == batch:
                break
            rest_s = (self.depth - exit_layers[level]) * layer_s + head_s
            rest_s += (loaded - (level + 1)) * check_s
            padded = self.model.padded_rows[len(leavers)]
            fill_s = cost.kv_fill_seconds(c, padded, self.depth - exit_layers[level])
            shallow_s, deep_s = seconds + fill_s, begin_s + going_on_s + rest_s
            if leavers and rules.rebatch_pays(
                len(leavers), batch, shallow_s, deep_s, seconds + rest_s
            ):
                break
        beyond, padded = self.depth - exit_layers[level], self.model.padded_rows[len(leavers)]
        seconds += cost.told_seconds(c, len(leavers))
        seconds += cost.kv_fill_seconds(c, padded, beyond)
        joules += cost.kv_fill_joules(c, padded, beyond)
        joules = cost.iteration_joules(c, seconds, joules)
        captured_s = self.capture(passed, level, range(passed, level + 1), rows, padded)
        seconds += captured_s
        joules += cost.capture_joules(c, captured_s)
        leaves_at = {row: level for row in leavers}
        held_at = {row: level + 1 for row in company if row not in leaves_at}
        return Iteration(self.clock_s, seconds, joules, {}, leaves_at, held_at, exit_layers[level])

    # At the end of an iteration

    def end_iteration(self, iteration: Iteration) -> None:
        """Charge it, emit its tokens in order of admission, let the finished leave."""
        self.iteration = None
        self.clock_s = iteration.end_s
        self.energy_j += iteration.joules
        seconds = iteration.end_s - iteration.start_s
        self.busy_s += seconds
        self.batch_seconds += seconds * len(self.rows)
        self.kv_block_seconds += seconds * sum(row.blocks for row in self.rows)
        self.num_iterations += 1
        for row in list(self.rows):
            if row in iteration.chunks:
                row.context += iteration.chunks[row]
                row.to_prefill -= iteration.chunks[row]
                if row.decoding:
                    self.emit(row, self.assignment.level)
            elif row in iteration.leaves_at:
                row.context += 1
                row.held = 0
                full_pass = iteration.executed_layers == self.depth
                row.pending = 0 if full_pass else row.pending + 1
                level = iteration.leaves_at[row]
                row.life.decoded += 1
                row.life.executed_layers += iteration.executed_layers
                self.exit_counts[self.assignment.model][level] += 1
                carried = self.exits_active and level > self.own_exit(row)
                self.emit(row, level, carried)
            elif row in iteration.held_at:
                row.held = iteration.held_at[row]

    def emit(self, row: Row, level: int, carried: bool = False) -> None:
        """A token leaves at an exit level, perhaps carried past its own; it may be the last."""
        life, token = row.life, self.token(row.life)
        may_breach = level == self.assignment.level and not carried
        full = level == len(self.model.exit_layers) - 1
        breached = may_breach and rules.is_breach(
            token.confidence[level], self.model.threshold, full
        )
        deeper = token.confidence[level + 1 :]
        life.agree += token.agrees[level]
        life.nll += token.nll[level]
        life.breaches += breached
        life.relative_breaches += breached and any(
            rules.leaves_here(confidence, self.model.threshold) for confidence in deeper
        )
        self.num_breaches += breached
        self.num_emitted += 1
        if self.orders.watching:
            self.watch(breached)
        life.generated += 1
        if life in self.last_token_s:
            self.gaps_s.append(self.clock_s - self.last_token_s[life])
        else:
            life.first_token_s = self.clock_s
        self.last_token_s[life] = self.clock_s
        if life.generated == life.sent.output:
            self.finish(row)

    def watch(self, breached: bool) -> None:
        """Count a token in the breach window: it trips on the breach that exceeds the limit."""
        self.window.append(breached)
        if self.orders.sliding and len(self.window) > self.orders.window_tokens:
            self.window.popleft()
        if sum(self.window) > self.orders.breach_limit:
            self.tripped = True
            self.window.clear()
        elif not self.orders.sliding and len(self.window) == self.orders.window_tokens:
            self.window.clear()

    def finish(self, row: Row) -> None:
        self.rows.remove(row)
        self.free_blocks += row.blocks
        row.life.status = "finished"
        row.life.finished_s = self.clock_s
        self.to_finish -= 1
        self.send_next()

    def send_next(self) -> None:
        """In a closed loop, whoever has been answered thinks and sends the next request."""
        if self.dealt:
            after = self.dealt.popleft()
            after.arrival_s = self.clock_s + after.sent.think_s
            self.to_come.append(after)
