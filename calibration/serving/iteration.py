"""One iteration on a model: which layers run, where its exits are asked, and who leaves there.

Follows `docs/engine.md`. The arithmetic belongs to a `Machine`; the decisions are the policy's hot
rules, called as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol

from calibration.serving.batching import Decode, HotRules, Prefill, Row
from helios_sim import cost
from helios_sim.policy.contract import Assignment, ExitMode
from helios_sim.profile import ModelProfile


class Answer(NamedTuple):
    """What an exit head says of one row: its token, its confidence, the true token's likelihood.

    `nll_nats` is the negative log-likelihood of the true token where the text is known, and of
    the token itself where the model runs freely.
    """

    token: int
    confidence: float
    nll_nats: float


class Emitted(NamedTuple):
    """A token that leaves an iteration at an exit level.

    `carried` says that it was confident at an earlier exit at which nobody was let off.
    """

    row: Row
    level: int
    answer: Answer
    carried: bool = False


class Captures(NamedTuple):
    """Graphs that were captured, those of exits apart; layers that they run, and that they fill."""

    graphs: int = 0
    exits: int = 0
    layers: int = 0
    filled_layers: int = 0


NOTHING_CAPTURED: Final = Captures()


@dataclass(frozen=True)
class Outcome:
    """What an iteration did: its tokens in order of the rows, and the work behind them.

    `first_layer` and `layers` are where it began and stopped, counted from the embedding;
    `checks` and `heads` how often an exit before the loaded depth and the loaded depth itself were
    asked, `filled_layers` and `filled_rows` the KV that was filled, `pending_tokens` those fed
    again, `context_tokens` the KV tokens that the rows have, each its own new one included, and
    `longest_context_tokens` those of the longest row, to which a backend may pad the others;
    `prompt_pairs` the sum of n (n + 1) / 2 over prompts, `ghosts` the rows of a static batch that
    are done and computed all the same, `overheads` how often the batch was split, `captured` the
    graphs that were captured on the way.
    """

    emitted: tuple[Emitted, ...]
    rows: int
    first_layer: int
    layers: int
    checks: int = 0
    heads: int = 1
    filled_layers: int = 0
    filled_rows: int = 0
    pending_tokens: int = 0
    context_tokens: int = 0
    longest_context_tokens: int = 0
    prompt_tokens: int = 0
    prompt_pairs: float = 0.0
    ghosts: int = 0
    overheads: int = 0
    captured: Captures = NOTHING_CAPTURED


class Machine(Protocol):
    """The arithmetic of one model at one loaded depth over its KV cache.

    Levels index the model's exits. `read` answers in the order of the rows begun with.
    """

    @property
    def max_rows(self) -> int:
        """Requests that the KV cache holds at once."""

    @property
    def captures(self) -> Captures:
        """What it has captured so far."""

    def prefill(self, rows: Sequence[Row]) -> None:
        """Take new rows in and run all their tokens through the loaded layers."""

    def begin(self, rows: Sequence[Row], passed: int, ghosts: Sequence[Row]) -> None:
        """Start a decode with the rows' last tokens, or go on from after the exit they passed."""

    def begin_again(self, rows: Sequence[Row]) -> None:
        """Start a decode that feeds each row's pending tokens again before its last token."""

    def run_to(self, level: int) -> None:
        """Run the layers from where the rows stand to the exit."""

    def read(self, level: int) -> list[Answer]:
        """What the exit's head says of each row."""

    def fill(self, rows: Sequence[Row], level: int) -> None:
        """Fill the KV of the layers beyond the exit for these rows, from where they stand."""

    def hold(self, rows: Sequence[Row]) -> None:
        """Keep where these rows stand, to go on from later."""

    def release(self, row: Row) -> None:
        """Give a row's place in the KV cache back."""


Pays = Callable[[int, int, int, int, int, int], bool]
"""Whether a split pays: (leaving, batch, passed, level, context tokens, those of the longest)."""


def split_pays(profile: ModelProfile, rules: HotRules, loaded_level: int, max_batch: int) -> Pays:
    """The DREX inequality with a profile's predicted segment times, as the simulator asks it.

    The times are predicted rather than measured on the run, so that both hosts split alike.
    """
    c = profile.coefficient_array()
    layers_to = profile.model.exit_layers
    padded_rows = profile.padded_rows(max_batch)
    residuals = profile.residual(max_batch, layers_to[loaded_level])

    def pays(leaving: int, batch: int, passed: int, level: int, context: int, longest: int) -> bool:
        rows = float(padded_rows[batch])
        layer_s, _ = cost.layer_seconds(c, rows, float(context), rows * longest, 0.0, 0.0, 0.0)
        layer_s = layer_s * float(residuals[batch])
        asked = float(batch)
        check_s, head_s = cost.check_seconds(c, asked), cost.head_seconds(c, asked)
        begin_s = cost.begin_seconds(c)
        here_s = begin_s + (cost.going_on_seconds(c, asked) if passed else 0.0)
        before = layers_to[passed - 1] if passed else 0
        for here in range(passed, level + 1):
            here_s = here_s + (layers_to[here] - before) * layer_s + check_s
            before = layers_to[here]
        skipped = layers_to[loaded_level] - layers_to[level]
        rest_s = skipped * layer_s + head_s + (loaded_level - (level + 1)) * check_s
        fill_s = cost.kv_fill_seconds(c, float(padded_rows[leaving]), float(skipped))
        deep_s = begin_s + cost.going_on_seconds(c, asked) + rest_s
        return bool(rules.rebatch_pays(leaving, batch, here_s + fill_s, deep_s, here_s + rest_s))

    return pays


class Stepper:
    """Carries planned iterations out on a machine that an assignment is loaded on."""

    def __init__(
        self,
        machine: Machine,
        *,
        assignment: Assignment,
        exit_layers: Sequence[int],
        threshold: float,
        rules: HotRules,
        recompute_kv: bool,
        pays: Pays,
    ) -> None:
        self.machine = machine
        self.exit_layers = tuple(exit_layers)
        self.assignment = assignment
        self.level = self.exit_layers.index(assignment.depth)
        self.depth = assignment.depth
        self.exit_mode = assignment.exit_mode
        self.threshold = threshold
        self.rules = rules
        self.recompute_kv = recompute_kv
        self.pays = pays

    def run(self, plan: Prefill | Decode) -> Outcome:
        """Carry a plan out; the rows' contexts are left to the caller."""
        before = self.machine.captures
        if isinstance(plan, Prefill):
            outcome = self._prefill(plan)
        elif self.exit_mode is ExitMode.REBATCH:
            outcome = self._rebatched(plan)
        else:
            outcome = self._decode(plan)
        after = self.machine.captures
        if after == before:
            return outcome
        # Where capturing failed, all that was captured is gone.
        new = (max(0, now - had) for now, had in zip(after, before, strict=True))
        return replace(outcome, captured=Captures(*new))

    def ask(self, rows: Sequence[Row], level: int, leaving: dict[Row, Emitted]) -> None:
        """Hear what an exit says of each row; the confident leave there, at the last one all do.

        `leaving` holds those who do, also at exits before.
        """
        at_loaded_level = level == self.level
        for row, answer in zip(rows, self.machine.read(level), strict=True):
            if row not in leaving and (at_loaded_level or self.leaves(answer)):
                leaving[row] = Emitted(row, level, answer)

    def leaves(self, answer: Answer) -> bool:
        """Whether a token is confident enough to leave."""
        return bool(self.rules.leaves_here(answer.confidence, self.threshold))

    def breaches(self, token: Emitted) -> bool:
        """Whether an emitted token is a confidence breach."""
        if token.level != self.level or token.carried:
            return False
        full = self.level == len(self.exit_layers) - 1
        return bool(self.rules.is_breach(token.answer.confidence, self.threshold, full))

    def _prefill(self, plan: Prefill) -> Outcome:
        self.machine.prefill(plan.rows)
        answers = self.machine.read(self.level)
        return Outcome(
            emitted=tuple(
                Emitted(row, self.level, answer)
                for row, answer in zip(plan.rows, answers, strict=True)
            ),
            rows=len(plan.rows),
            first_layer=0,
            layers=self.depth,
            prompt_tokens=sum(row.to_prefill for row in plan.rows),
            prompt_pairs=sum(row.to_prefill * (row.to_prefill + 1) / 2 for row in plan.rows),
        )

    def _decode(self, plan: Decode) -> Outcome:
        """Every row emits a token; with exits active the batch runs to its deepest one."""
        rows, machine = plan.rows, self.machine
        pending = sum(row.pending for row in rows) if self.recompute_kv else 0
        if pending:
            machine.begin_again(rows)
        else:
            machine.begin(rows, 0, plan.ghosts)
        leaving: dict[Row, Emitted] = {}
        checks = heads = 0
        first = 0 if self.exit_mode.leaves_early else self.level
        deepest = first
        for level in range(first, self.level + 1):
            deepest = level
            machine.run_to(level)
            heads += level == self.level
            checks += level != self.level
            self.ask(rows, level, leaving)
            if len(leaving) == len(rows):
                break
        reads = [row.context + 1 for row in rows]
        layers = self.exit_layers[deepest]
        filled = 0 if self.recompute_kv else self.depth - layers
        if filled:
            machine.fill(rows, deepest)
        return Outcome(
            emitted=tuple(leaving[row] for row in rows),
            rows=len(rows),
            first_layer=0,
            layers=layers,
            checks=checks,
            heads=heads,
            filled_layers=filled,
            filled_rows=len(rows) if filled else 0,
            pending_tokens=pending,
            context_tokens=sum(reads),
            longest_context_tokens=max(reads),
            ghosts=len(plan.ghosts),
        )

    def _rebatched(self, plan: Decode) -> Outcome:
        """A company runs from after the exit it has passed to the first split that pays."""
        rows, machine, passed = plan.rows, self.machine, plan.passed
        batch = len(rows)
        reads = [row.context + 1 for row in rows]
        context, longest = sum(reads), max(reads)
        machine.begin(rows, passed, ())
        confident: set[Row] = set()
        checks = heads = overheads = 0
        level = passed
        while True:
            machine.run_to(level)
            answers = machine.read(level)
            if level == self.level:
                heads, leaving = 1, list(rows)
                earlier = set(confident)
                break
            checks += 1
            earlier = set(confident)
            confident |= {row for row, one in zip(rows, answers, strict=True) if self.leaves(one)}
            leaving = [row for row in rows if row in confident]
            if len(leaving) == batch:
                break
            if leaving and self.pays(len(leaving), batch, passed, level, context, longest):
                overheads = 1
                break
            level += 1
        filled = self.depth - self.exit_layers[level]
        if filled:
            machine.fill(leaving, level)
        staying = [row for row in rows if row not in set(leaving)]
        machine.hold(staying)
        for row in staying:
            row.held = level + 1
        said = dict(zip(rows, answers, strict=True))
        return Outcome(
            emitted=tuple(Emitted(row, level, said[row], row in earlier) for row in leaving),
            rows=batch,
            first_layer=self.exit_layers[passed - 1] if passed else 0,
            layers=self.exit_layers[level],
            checks=checks,
            heads=heads,
            filled_layers=filled,
            filled_rows=len(leaving) if filled else 0,
            context_tokens=context,
            longest_context_tokens=longest,
            overheads=overheads,
        )
