"""Iterations of one load over and over, carried out and booked by the code that serves.

What is timed is a turn of the serving loop: the batch plans, the stepper runs the model, the books
are kept, tokens go to their requests. The policy is not asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Final

from calibration.measuring.timing import Work
from calibration.serving.batching import NEVER, Life, Row
from calibration.serving.iteration import Stepper
from calibration.serving.machine import ModelMachine
from calibration.serving.replica import Replica
from helios_sim.policy.contract import Assignment, ExitMode
from helios_sim.policy.registry import make_policy
from helios_sim.scenario import ServingSettings

TURNS: Final = 8
"""Iterations in which contexts grow before they are set back; their mean is the load's."""

_BLOCK_TOKENS: Final = 16

Text = Callable[[int, int], list[int]]
"""So many token ids, of a row."""


class ServedLoad:
    """A replica that meets the same load in every iteration.

    `machine` is to run its model at `depth`; its pool holds the rows of the load, or none where
    they are prefilled. `text` gives the rows' tokens.
    """

    def __init__(self, machine: ModelMachine, exit_layers: Sequence[int], text: Text) -> None:
        self.machine = machine
        self.pool = machine.pool
        self.text = text
        name = machine.model.spec.name
        # Helios watches every token, and leaves no exit before the loaded depth.
        policy = make_policy("helios")
        max_rows = self.pool.max_rows
        self.replica = Replica(
            serving=ServingSettings(
                max_batch=max_rows,
                block_tokens=_BLOCK_TOKENS,
                max_prefill_tokens=max_rows * self.pool.max_tokens,
                watermark=0.0,
            ),
            policy=policy,
            clock=_Clock(),
            max_batch=max_rows,
            timeline_interval_s=1.0,
        )
        level = list(exit_layers).index(machine.depth)
        replica = self.replica
        replica.machine = machine
        replica.assignment = Assignment(name, machine.depth, ExitMode.LOADED_DEPTH)
        replica.stepper = Stepper(
            machine,
            exit_layers=exit_layers,
            level=level,
            exit_mode=ExitMode.LOADED_DEPTH,
            threshold=0.5,
            rules=replica.rules,
            recompute_kv=False,
            pays=lambda *_: False,
        )
        replica.tally.exit_counts = {name: [0] * len(exit_layers)}
        replica.window.watching = True
        replica.batch.take_up(
            pool_blocks=max_rows * (1 + replica.batch.blocks_for(self.pool.max_tokens)),
            max_positions=self.pool.max_tokens + 1,
            solo=False,
            rebatches=False,
            levels=level + 1,
            max_rows=max_rows,
        )

    def decoding(self, lengths: Sequence[int]) -> Work:
        """A decode of rows that read so many tokens on average, their new one included."""
        highest = min(max(lengths) + TURNS // 2, self.pool.max_tokens)
        back = TURNS - (highest - max(lengths))
        starts = [max(0, length - back) for length in lengths]
        rows = [self._running(start, place) for place, start in enumerate(starts)]
        self.machine.occupants = list(rows)
        self.replica.batch.rows = list(rows)
        turns = cycle(range(min(TURNS, self.pool.max_tokens - max(starts))))

        def iteration() -> None:
            if next(turns) == 0:
                self._set_back(rows, starts)
            self._turn()

        return iteration

    def prefilling(self, prompts: int, tokens: int) -> Work:
        """Requests that come, are prefilled together, are told their only token and go."""
        lives = [self._life(tokens, row, output_tokens=1) for row in range(prompts)]
        batch, tally = self.replica.batch, self.replica.tally

        def iteration() -> None:
            for life in lives:
                life.emitted.clear()
                life.first_token_s = None
                batch.enter(life)
            self._turn()
            tally.iterations.clear()
            tally.tokens.clear()

        return iteration

    def _turn(self) -> None:
        replica = self.replica
        plan = replica.batch.next_iteration(replica.tally.booked_s)
        assert plan is not None
        replica.run(plan)

    def _set_back(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        """Let the contexts be what they were at first; slots keep the tokens they hold."""
        tally = self.replica.tally
        for books in (tally.iterations, tally.tokens, tally.gaps_s):
            books.clear()
        for row, start in zip(rows, starts, strict=True):
            self.pool.vacate(row.slot)
            self.pool.reserve(row.slot, start)
            row.context = start
            del row.life.emitted[1:]

    def _running(self, context: int, slot: int) -> Row:
        """A row that has been told its first token and has not read it."""
        life = self._life(context, slot, output_tokens=NEVER)
        life.status, life.emitted = "running", [0]
        life.first_token_s = life.last_token_s = 0.0
        blocks = self.replica.batch.blocks_for(self.pool.max_tokens)
        self.replica.batch.free_blocks -= blocks
        return Row(life, to_prefill=0, blocks=blocks, context=context, slot=slot)

    def _life(self, prompt_tokens: int, place: int, output_tokens: int) -> Life:
        text = self.text(self.pool.max_tokens + 2, place)
        return Life(place, 0.0, prompt_tokens, output_tokens, text)


class _Clock:
    """The wall clock, for nobody waits here."""

    def now_s(self) -> float:
        return time.perf_counter()

    def sleep_until(self, time_s: float) -> None:
        raise AssertionError("there is always work")
