"""Iterations of one load over and over, carried out and booked by the code that serves.

What is timed is a turn of the serving loop: the batch plans, the stepper runs the model, the books
are kept, tokens go to their requests; or one of the loop's own steps. The policy is not asked.
Rows leave where the load says: their confidence is read and put to the rule, and overruled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, cycle, repeat
from typing import Final

from calibration.measuring.grid import LEAST_CONTEXT, REACH
from calibration.measuring.timing import Work
from calibration.serving.batching import Life, Row
from calibration.serving.iteration import Answer, Stepper
from calibration.serving.machine import ModelMachine
from calibration.serving.replica import Replica
from helios_sim.loop.state import NEVER
from helios_sim.policy.contract import Assignment, ExitMode
from helios_sim.policy.registry import make_policy
from helios_sim.scenario import ServingSettings

_BLOCK_TOKENS: Final = 16

Text = Callable[[int, int], list[int]]
"""So many token ids, of a row."""


class ScriptedStepper(Stepper):
    """A stepper whose rows leave as it is told, at the cost of asking the rule."""

    script: Iterator[bool] = repeat(False)
    """Whether the next row that is asked leaves."""

    def leaves(self, answer: Answer) -> bool:
        """What the script says; the rule's own word is heard and forgotten."""
        super().leaves(answer)
        return next(self.script)


class ServedLoad:
    """A replica that meets the same load in every iteration.

    `machine` is to run its model at `depth`; its pool holds the rows of the load, or none where
    they are prefilled. `text` gives the rows' tokens. Exits before the depth are asked in a mode
    in which they are active.
    """

    def __init__(
        self,
        machine: ModelMachine,
        exit_layers: Sequence[int],
        text: Text,
        exit_mode: ExitMode = ExitMode.LOADED_DEPTH,
    ) -> None:
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
            timeline_interval_s=1.0,
        )
        self.stepper = ScriptedStepper(
            machine,
            assignment=Assignment(name, machine.depth, exit_mode),
            exit_layers=exit_layers,
            threshold=0.5,
            rules=self.replica.rules,
            recompute_kv=False,
            pays=lambda *_: True,
        )
        replica = self.replica
        replica.machine = machine
        replica.stepper = self.stepper
        replica.tally.exit_counts = {name: [0] * len(exit_layers)}
        replica.window.watching = not exit_mode.leaves_early
        replica.batch.take_up(
            pool_blocks=max_rows * replica.batch.blocks_for(self.pool.max_tokens),
            max_positions=self.pool.max_tokens + 1,
            solo=False,
            rebatches=exit_mode is ExitMode.REBATCH,
            levels=self.stepper.level + 1,
            max_rows=max_rows,
        )

    def decoding(self, lengths: Sequence[int], leaves_at: int | None = None) -> Work:
        """A token of rows that read so many tokens on average, their new one included.

        Contexts are set back sooner where a row has no room to grow beyond its mean, or to begin
        as far below it. A row of one token reads two: if it held none, it would be a prompt, which
        no graph serves.

        With exits active all rows leave at the level `leaves_at`, those that wait having been asked
        at every exit before. Rebatching the first half leaves there, and the others go on as a
        batch of their own: two iterations.
        """
        room = min(self.pool.max_tokens - max(lengths), min(lengths) - LEAST_CONTEXT)
        reach = max(0, min(REACH, room))
        starts = [max(1, length - reach - 1) for length in lengths]
        rows = self._rows(starts)
        self.replica.batch.rows = list(rows)
        # An odd number of iterations until contexts are set back, so that one has the mean.
        turns = cycle(range(2 * reach + 1))
        level = self.stepper.level if leaves_at is None else leaves_at
        splits = self.replica.batch.rebatches
        leaving = len(rows) // 2 if splits else len(rows)

        def iteration() -> None:
            if next(turns) == 0:
                self._set_back(rows, starts)
            stay = repeat(False, level * len(rows))
            self.stepper.script = chain(stay, repeat(True, leaving), repeat(False))
            self._turn()
            if splits:
                self._turn()

        return iteration

    def asking(self, lengths: Sequence[int], level: int) -> Work:
        """What an exit says of rows, heard by the host; none leaves before the loaded depth."""
        rows = self._begun(lengths, level)
        return lambda: self.stepper.ask(rows, level, {})

    def filling(self, lengths: Sequence[int], level: int) -> Work:
        """The KV beyond an exit at which all rows leave."""
        rows = self._begun(lengths, level)
        return lambda: self.machine.fill(rows, level)

    def prefilling(self, prompts: int, tokens: int) -> Work:
        """Requests that come, are prefilled together, are told their only token and go."""
        lives = [self._life(tokens, row, output_tokens=1) for row in range(prompts)]
        batch, iterations = self.replica.batch, self.replica.tally.iterations

        def iteration() -> None:
            for life in lives:
                life.emitted.clear()
                batch.enter(life)
            self._turn()
            iterations.clear()

        return iteration

    def _turn(self) -> None:
        replica = self.replica
        plan = replica.batch.next_iteration(replica.tally.booked_s)
        assert plan is not None
        replica.run(plan)

    def _begun(self, lengths: Sequence[int], level: int) -> list[Row]:
        """Rows that have been run to an exit."""
        rows = self._rows([length - 1 for length in lengths])
        self.machine.begin(rows, 0, ())
        self.machine.run_to(level)
        return rows

    def _rows(self, contexts: Sequence[int]) -> list[Row]:
        """Rows that hold so many tokens, in the first places of the pool."""
        rows = [self._running(context, place) for place, context in enumerate(contexts)]
        self.machine.occupants = list(rows)
        return rows

    def _set_back(self, rows: Sequence[Row], starts: Sequence[int]) -> None:
        """Let the contexts be what they were at first; slots keep the tokens they hold."""
        self.replica.tally.iterations.clear()
        for row, start in zip(rows, starts, strict=True):
            self.pool.vacate(row.slot)
            self.pool.reserve(row.slot, start)
            row.context = start
            del row.life.emitted[1:]

    def _running(self, context: int, slot: int) -> Row:
        """A row that has been told its first token and has not read it."""
        life = self._life(context, slot, output_tokens=NEVER)
        life.status, life.emitted = "running", [0]
        life.first_token_s = 0.0
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
