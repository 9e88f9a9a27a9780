"""Who runs next on a replica: the queue, admission by KV blocks, room, and who decodes together.

`docs/engine.md` defines it; the simulated loop follows the same sentences. Nothing here knows a
model, a device or a clock: times come in, plans go out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from helios_sim.loop.state import NEVER
from helios_sim.policy.contract import Policy
from helios_sim.policy.failure import asked_rules
from helios_sim.policy.registry import HOT_RULES, hot_rules_of

Rule = Callable[..., Any]
Status = Literal["unsent", "waiting", "running", "finished", "refused"]


@dataclass(frozen=True)
class HotRules:
    """The rules asked for every iteration or token, as a policy wants them."""

    may_join: Rule
    leaves_here: Rule
    is_breach: Rule
    rebatch_pays: Rule
    watch_tumbling: Rule
    watch_sliding: Rule

    @classmethod
    def of(cls, policy: Policy) -> HotRules:
        """The shipped rules with those that a policy replaces."""
        rules = HOT_RULES | asked_rules(policy, hot_rules_of(policy))
        return cls(**{one.name: rules[one.name] for one in fields(cls)})


@dataclass(eq=False)
class Life:
    """A request and what becomes of it.

    `text` holds the token ids of its prompt and of the true continuation; `emitted` the tokens it
    was given. `think_s` is how long a user thinks before it in a closed loop, None where it arrives
    by itself. `ids` is the text as an array: making one of a long prompt takes longer than a GPU
    takes for some of its layers.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    text: list[int] = field(default_factory=list)
    think_s: float | None = None
    status: Status = "unsent"
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    emitted: list[int] = field(default_factory=list)
    model: str | None = None
    depth: int | None = None
    evaluated: bool = False
    num_preemptions: int = 0
    ids: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.text, dtype=np.int64)

    @property
    def generated(self) -> int:
        """Tokens emitted so far."""
        return len(self.emitted)

    @property
    def num_tokens(self) -> int:
        """Tokens it has: its prompt and what it emitted, before a preemption too."""
        return self.prompt_tokens + self.generated


@dataclass(eq=False)
class Row:
    """A running request: what is in its KV cache, the blocks it holds, where its token stands.

    `pending` counts tokens since its last pass through all loaded layers; `held` the exits its
    token has passed while it waits for company; `slot` and `hidden` belong to whoever executes.
    """

    life: Life
    to_prefill: int
    blocks: int
    context: int = 0
    pending: int = 0
    held: int = 0
    slot: int = -1
    hidden: Any = None

    @property
    def fresh(self) -> bool:
        """Whether it starts a new token when it decodes next."""
        return self.to_prefill == 0 and self.held == 0


@dataclass(frozen=True)
class Prefill:
    """An iteration that prefills these rows whole, in order of admission."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Decode:
    """An iteration in which these rows decode, from after the exit they have all passed.

    `ghosts` have left a static batch that is still computed at its first size.
    """

    rows: tuple[Row, ...]
    passed: int = 0
    ghosts: tuple[Row, ...] = ()


class Batch:
    """The queue, the running rows and the block pool of one replica.

    Law: free + used + staged = pool, none negative. `on_left` is told of every row whose place
    in the KV cache is no longer needed, `on_refused` of every request turned away for good.
    """

    def __init__(
        self,
        *,
        batching: Literal["static", "continuous"],
        max_batch: int,
        max_held: int,
        block_tokens: int,
        max_prefill_tokens: int,
        watermark: float,
        rules: HotRules,
        on_left: Callable[[Row], None],
        on_refused: Callable[[Life], None],
    ) -> None:
        self.batching = batching
        self.max_batch = max_batch
        self.max_held = max_held
        self.block_tokens = block_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.watermark = watermark
        self.rules = rules
        self.on_left = on_left
        self.on_refused = on_refused
        self.queue: deque[Life] = deque()
        self.rows: list[Row] = []
        self.ghosts: list[Row] = []
        self.pool_blocks = self.free_blocks = self.staged_blocks = 0
        self.max_positions = 0
        self.batch_limit = max_batch
        self.held_limit = max_held
        self.next_row = 0
        self.levels = 1
        self.rebatches = False
        self.draining = False
        self.quota = NEVER
        self.max_running = 0

    def take_up(
        self,
        *,
        pool_blocks: int,
        max_positions: int,
        solo: bool,
        rebatches: bool,
        levels: int,
        max_rows: int,
    ) -> None:
        """Serve with another pool from now on; nothing may be running.

        `max_rows` is what the KV cache holds at once, whatever its blocks would allow.
        """
        assert not self.rows
        self.pool_blocks = self.free_blocks = pool_blocks
        self.staged_blocks = 0
        self.max_positions = max_positions
        self.batch_limit = 1 if solo else min(self.max_batch, max_rows)
        self.held_limit = min(self.max_held, max_rows - self.batch_limit)
        self.rebatches = rebatches
        self.levels = levels

    @property
    def used_blocks(self) -> int:
        """Blocks that rows hold; those staged for weights are not counted."""
        return self.pool_blocks - self.staged_blocks - self.free_blocks

    def stage(self, num_blocks: int) -> None:
        """Set free blocks aside for weights that arrive while requests run on."""
        self.staged_blocks += num_blocks
        self.free_blocks -= num_blocks

    def unstage(self) -> None:
        """Return the blocks set aside."""
        self.free_blocks += self.staged_blocks
        self.staged_blocks = 0

    def enter(self, life: Life) -> None:
        """Let a request wait behind all others."""
        life.status = "waiting"
        self.queue.append(life)

    def next_iteration(self, now_s: float) -> Prefill | Decode | None:
        """Plan the next iteration and take its blocks; None if there is nothing to run."""
        while True:
            joined = self._admit_prompts(now_s)
            if joined:
                return Prefill(tuple(joined))
            if not self.rows:
                return None
            self._make_room()
            if self.rows:
                return self._decode()

    def leave(self, row: Row) -> None:
        """Take a row out of the running ones and give its blocks back."""
        self.rows.remove(row)
        self.free_blocks += row.blocks
        row.blocks = 0
        # A static batch is computed at its first size until all of it is done.
        if self.batching == "static" and not self.rebatches:
            self.ghosts.append(row)
            if not self.rows:
                for ghost in self.ghosts:
                    self.on_left(ghost)
                self.ghosts.clear()
        else:
            self.on_left(row)

    def preempt_all(self) -> None:
        """Send every running request back to the queue in its order."""
        while self.rows:
            self._preempt_last()

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold the KV of so many tokens."""
        return -(-tokens // self.block_tokens)

    def _admit_prompts(self, now_s: float) -> list[Row]:
        """First come, first served, up to the token budget; the first prompt may exceed it."""
        joined: list[Row] = []
        if self.batching == "static" and self.rows:
            return joined
        budget = NEVER if self.batching == "static" else self.max_prefill_tokens
        tokens = 0
        while self._next_may_join():
            tokens += self.queue[0].num_tokens
            if joined and tokens > budget:
                break
            joined.append(self._admit(now_s))
        return joined

    def _next_may_join(self) -> bool:
        """Whether the head of the queue may join now; heads that can never fit are refused.

        `may_join` is asked where there is a free row and where there are blocks: it may admit less.
        """
        if self.draining or self.quota <= 0:
            return False
        while self.queue and self._never_fits(self.queue[0]):
            refused = self.queue.popleft()
            refused.status = "refused"
            self.on_refused(refused)
        if not self.queue:
            return False
        running = len(self.rows) - self._num_making_room()
        needed = self.blocks_for(self.queue[0].num_tokens)
        # A policy's own rule is not asked for more rows or blocks than there are.
        if running >= self.batch_limit or needed > self.free_blocks:
            return False
        watermark = int(self.watermark * self.pool_blocks)
        return bool(
            self.rules.may_join(running, self.batch_limit, needed, self.free_blocks, watermark)
        )

    def _num_making_room(self) -> int:
        """Held rows whose places in the batch others may take, all but one at most."""
        if not self.rebatches or not self.rows:
            return 0
        num_held = sum(row.held > 0 for row in self.rows)
        return min(num_held, self.held_limit, len(self.rows) - 1)

    def _never_fits(self, life: Life) -> bool:
        whole = life.prompt_tokens + life.output_tokens
        return whole > self.max_positions or self.blocks_for(whole - 1) > self.pool_blocks

    def _admit(self, now_s: float) -> Row:
        life = self.queue.popleft()
        life.status = "running"
        if life.admitted_s is None:
            life.admitted_s = now_s
        row = Row(life, life.num_tokens, self.blocks_for(life.num_tokens))
        self.free_blocks -= row.blocks
        self.quota -= 1
        self.rows.append(row)
        self.max_running = max(self.max_running, len(self.rows))
        return row

    def _in_need(self, rows: Iterable[Row]) -> list[Row]:
        """Those that need another block for the token they begin."""
        size = self.block_tokens
        return [row for row in rows if row.context == row.blocks * size and row.fresh]

    def _make_room(self) -> None:
        """Preempt the last admitted until every row whose last block is full can have another."""
        while len(self._in_need(self.rows)) > self.free_blocks:
            self._preempt_last()

    def _preempt_last(self) -> None:
        row = self.rows[-1]
        self.leave(row)
        self.quota += 1
        row.life.num_preemptions += 1
        row.life.status = "waiting"
        self.queue.appendleft(row.life)

    def _decode(self) -> Decode:
        passed = self._company() if self.rebatches else 0
        rows = self._chosen(passed) if self.rebatches else tuple(self.rows)
        if passed == 0:
            for row in self._in_need(rows):
                row.blocks += 1
                self.free_blocks -= 1
        return Decode(rows, passed, tuple(self.ghosts))

    def _chosen(self, passed: int) -> tuple[Row, ...]:
        """As many rows as a pass has; of more fresh ones each has its turn."""
        count = len(self.rows)
        first = self.next_row if passed == 0 and self.next_row < count else 0
        turns = (*range(first, count), *range(first))
        chosen = [at for at in turns if self.rows[at].held == passed][: self.batch_limit]
        if passed == 0:
            self.next_row = chosen[-1] + 1
        return tuple(self.rows[at] for at in sorted(chosen))

    def _company(self) -> int:
        """The exits passed by those who run next: the deepest company as large as the fresh one.

        No company is larger than a pass.
        """
        sizes = [0] * self.levels
        for row in self.rows:
            sizes[row.held] += 1
        sizes[0] = min(sizes[0], self.batch_limit)
        for passed in range(self.levels - 1, 0, -1):
            if sizes[passed] > 0 and sizes[passed] >= sizes[0]:
                return passed
        return 0
