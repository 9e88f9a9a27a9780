"""The steward of a replica: what a decision means, told once for both hosts of a policy.

The simulator and the real backend serve and move weights each in their own way. What the policy is
shown, which assignment follows from its answer, which bytes are missing for it and how long they
may take, when to ask again and how decisions are counted is the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from helios_sim.cards import Room
from helios_sim.loop.state import NEVER, NLL_UNITS_PER_NAT
from helios_sim.policy.contract import (
    USUAL_REASSESS_REQUESTS,
    Assignment,
    Candidate,
    Decision,
    Evaluate,
    Event,
    Keep,
    LoadLayers,
    Pace,
    Policy,
    Slo,
    Snapshot,
    Telemetry,
)
from helios_sim.policy.controller import Controller


class PaceSums(NamedTuple):
    """Iterations that decode alone: tokens emitted, rows, and rows times what each took.

    Those with prompts, or that capture graphs, are left out.
    `row_rows` are rows times the rows computed, with those of a static batch that are done.
    """

    tokens: int = 0
    rows: int = 0
    row_s: float = 0.0
    row_layers: int = 0
    row_rows: int = 0

    def since(self, before: PaceSums) -> Pace | None:
        """The pace of decoding since then; None where nothing was decoded like that."""
        tokens, rows = self.tokens - before.tokens, self.rows - before.rows
        if not tokens:
            return None
        return Pace(
            token_s=(self.row_s - before.row_s) / tokens,
            layers=(self.row_layers - before.row_layers) / tokens,
            rows=(self.row_rows - before.row_rows) / rows,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a host sees of its replica at one moment.

    Counts and sums run from the start of the run, those called `period_` from the moment the last
    decision was carried out. `exit_counts` are those of the model that is loaded, `nll_units`
    steps of 1/1024 nat. `finish_target` is how many requests may finish before the policy is asked.
    """

    now_s: float
    num_waiting: int
    num_running: int
    evaluating: bool
    finish_target: int
    num_tokens: int
    num_finished: int
    exit_counts: Sequence[int]
    executed_layers: int
    num_breaches: int
    nll_units: int
    num_decode_iterations: int
    decode_rows: int
    paced: PaceSums
    period_finished: int
    period_ttft_s: float
    period_tpots: int
    period_tpot_s: float


@dataclass(frozen=True)
class Aim:
    """How far to serve before the policy is asked again.

    `quota` is how many requests may be admitted, `finish_target` how many may finish.
    """

    evaluating: bool = False
    quota: int = NEVER
    finish_target: int = NEVER
    watching: bool = False


HOLD: Final = Aim()
"""Serve on without asking, while a decision is carried out."""


class LoggedDecision(Protocol):
    """An entry of either host's decision log."""

    @property
    def time_s(self) -> float:
        """When the policy was asked."""

    @property
    def decision(self) -> Decision:
        """What it decided."""


def event_of(*, breached: bool, evaluating: bool) -> Event:
    """Why a policy is asked: its breach window is over the limit, or enough requests finished."""
    if breached:
        return Event.BREACHED
    return Event.EVALUATED if evaluating else Event.REASSESS


def evaluation_seconds(log: Sequence[LoggedDecision], end_s: float) -> float:
    """Seconds of a replica's evaluations, each from its decision to the next one or to the end."""
    times_s = [*(entry.time_s for entry in log), end_s]
    return math.fsum(
        times_s[place + 1] - entry.time_s
        for place, entry in enumerate(log)
        if isinstance(entry.decision, Evaluate)
    )


class Steward:
    """Keeps what one replica of either host knows of its decisions.

    `assignment` is what it runs, None before anything is loaded; `weight_bytes` are those held for
    it, as the host counts or measures them.
    """

    def __init__(self, room: Room, policy: Policy, cards: Sequence[Candidate], slo: Slo) -> None:
        self.room = room
        self.policy = policy
        self.slo = slo
        self.cards = {card.name: card for card in cards}
        self.controller = Controller(
            policy,
            cards,
            shortage=room.shortage,
            recomputes_kv=room.serving.skipped_kv == "recomputed",
        )
        self.assignment: Assignment | None = None
        self.weight_bytes = 0
        self.until_reassessment = policy.watching.reassess_requests
        self.num_switches = self.num_loads = self.num_evaluations = self.num_breach_events = 0
        self.switch_time_s = 0.0
        self.peak_weight_bytes = 0
        self.weight_byte_seconds = 0.0
        self.depth_seconds: dict[str, float] = {}
        self._served_model: str | None = None
        self._since: View | None = None
        self._weights_since_s = 0.0
        self._load_s: dict[
            tuple[Assignment | None, frozenset[str]], dict[str, tuple[float, ...]]
        ] = {}

    def ask(
        self,
        event: Event,
        view: View,
        *,
        in_memory: Collection[str],
        energy_j: float | None,
        idle_energy_j: float | None,
        foresight: Mapping[str, tuple[float, ...]] | None = None,
    ) -> tuple[Decision, Assignment, Snapshot]:
        """Show the policy a snapshot; returns its decision and what is to run after it.

        Joules are those drawn since the last decision was carried out, all of them and those of
        idle times; None where nobody could read them. `in_memory` names the candidates whose
        weights are in the host's memory, so that no disk is needed for them.
        """
        if event is Event.REASSESS or event is Event.START:
            self.until_reassessment = self.policy.watching.reassess_requests
        elif self.until_reassessment is not None and not view.evaluating:
            self.until_reassessment = max(1, view.finish_target)
        if event is Event.BREACHED:
            self.num_breach_events += 1
        decision, snapshot = self.controller.consult(
            now_s=view.now_s,
            event=event,
            assignment=self.assignment,
            telemetry=self._telemetry(view, energy_j, idle_energy_j),
            load_s=self._load_seconds(in_memory),
            num_waiting=view.num_waiting,
            num_running=view.num_running,
            max_batch=self.room.serving.max_batch,
            expected_tokens=self._expected_tokens(view),
            slo=self.slo,
            foresight=foresight,
        )
        return decision, self._target(decision), snapshot

    def aim(self, decision: Decision) -> Aim:
        """How far to serve after a decision."""
        if isinstance(decision, Evaluate):
            return Aim(
                evaluating=True, quota=decision.num_requests, finish_target=decision.num_requests
            )
        return Aim(
            finish_target=NEVER if self.until_reassessment is None else self.until_reassessment,
            watching=self.policy.watching.breach_window_tokens is not None,
        )

    def missing_bytes(self, name: str, depth: int) -> int:
        """Weight bytes that a model at a depth needs and the replica does not hold."""
        needed = self._bytes_of(name, depth)
        held = self.assignment
        if held is None or held.model != name:
            return needed
        return max(0, needed - self._bytes_of(name, held.depth))

    def stage(self, num_bytes: int) -> None:
        """Note weights that arrive beside those that are held."""
        self.peak_weight_bytes = max(self.peak_weight_bytes, self.weight_bytes + num_bytes)

    def take_up(self, assignment: Assignment, weight_bytes: int, now_s: float) -> None:
        """Note what is loaded from `now_s` on, and its bytes."""
        self.close(now_s)
        self.assignment = assignment
        self.weight_bytes = weight_bytes
        self.stage(0)

    def carried_out(self, decision: Decision, asked_s: float, view: View) -> None:
        """Count a decision that was asked for at `asked_s`, and see the next period from here."""
        self._since = view
        if isinstance(decision, Keep):
            return
        if isinstance(decision, Evaluate):
            self.num_evaluations += 1
            return
        assert self.assignment is not None
        if isinstance(decision, LoadLayers):
            self.num_loads += 1
        elif self._served_model not in (None, self.assignment.model):
            self.num_switches += 1
        self._served_model = self.assignment.model
        self.switch_time_s += view.now_s - asked_s

    def close(self, now_s: float) -> None:
        """Book the time spent so far with the weights that are held."""
        if self.assignment is not None:
            seconds = now_s - self._weights_since_s
            name = f"{self.assignment.model}@{self.assignment.depth}"
            self.depth_seconds[name] = self.depth_seconds.get(name, 0.0) + seconds
            self.weight_byte_seconds += self.weight_bytes * seconds
        self._weights_since_s = now_s

    def _target(self, decision: Decision) -> Assignment:
        if isinstance(decision, Evaluate):
            layers = self.cards[decision.model].num_layers
            return Assignment(decision.model, layers, decision.exit_mode)
        if isinstance(decision, (Keep, LoadLayers)):
            assert self.assignment is not None
            if isinstance(decision, Keep):
                return self.assignment
            return Assignment(self.assignment.model, decision.depth, decision.exit_mode)
        return Assignment(decision.model, decision.depth, decision.exit_mode)

    def _bytes_of(self, name: str, depth: int) -> int:
        card = self.cards[name]
        return card.weight_bytes[card.level_of(depth)]

    def _load_seconds(self, in_memory: Collection[str]) -> dict[str, tuple[float, ...]]:
        """Seconds to bring each candidate in at each exit, on an idle link."""
        key = self.assignment, frozenset(in_memory)
        if key not in self._load_s:
            self._load_s[key] = {
                card.name: self._load_seconds_of(card, card.name not in in_memory)
                for card in self.cards.values()
            }
        return self._load_s[key]

    def _load_seconds_of(self, card: Candidate, from_disk: bool) -> tuple[float, ...]:
        loading = self.room.profile.loading
        disk_s = loading.disk.seconds(card.weight_bytes[-1]) if from_disk else 0.0
        missing = [self.missing_bytes(card.name, depth) for depth in card.exit_layers]
        return tuple(
            disk_s + loading.host.seconds(num_bytes) if num_bytes else 0.0 for num_bytes in missing
        )

    def _expected_tokens(self, view: View) -> float:
        """Tokens until the next reassessment, as far as experience tells."""
        if view.num_finished:
            per_request = view.num_tokens / view.num_finished
        else:
            per_request = float(self.room.expected_output_tokens)
        requests = self.until_reassessment
        return (USUAL_REASSESS_REQUESTS if requests is None else requests) * per_request

    def _telemetry(
        self, view: View, energy_j: float | None, idle_energy_j: float | None
    ) -> Telemetry | None:
        """What the replica saw since its last decision was carried out."""
        if self.assignment is None:
            return None
        since = self._since
        assert since is not None
        iterations = view.num_decode_iterations - since.num_decode_iterations
        return Telemetry(
            assignment=self.assignment,
            duration_s=view.now_s - since.now_s,
            num_finished=view.period_finished,
            num_tokens=view.num_tokens - since.num_tokens,
            exit_counts=tuple(
                count - before
                for count, before in zip(view.exit_counts, since.exit_counts, strict=True)
            ),
            executed_layers=view.executed_layers - since.executed_layers,
            num_breaches=view.num_breaches - since.num_breaches,
            nll_nats=(view.nll_units - since.nll_units) / NLL_UNITS_PER_NAT,
            mean_ttft_s=_mean(view.period_ttft_s, view.period_finished),
            mean_tpot_s=_mean(view.period_tpot_s, view.period_tpots),
            mean_batch=(view.decode_rows - since.decode_rows) / max(1, iterations),
            energy_j=energy_j,
            is_evaluation=view.evaluating,
            pace=view.paced.since(since.paced),
            idle_energy_j=idle_energy_j,
        )


def held_by(name: str) -> tuple[str, int]:
    """The model and the layers of a key of `depth_seconds`; a model's name may have an @ too."""
    model, _, depth = name.rpartition("@")
    return model, int(depth)


def _mean(total: float, count: int) -> float | None:
    """A mean, or None of nothing."""
    return total / count if count else None
