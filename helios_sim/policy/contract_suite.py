"""The tests every policy must pass; inherit `PolicyContract` and give it `make_policy`.

    from helios_sim.policy.contract_suite import PolicyContract

    class TestMyPolicy(PolicyContract):
        def make_policy(self):
            return MyPolicy()

pytest then runs the inherited tests. They ask the policy what a host would ask, over several
hardware limits, transfer costs, loads and token streams.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from helios_sim.policy.contract import (
    Assignment,
    Candidate,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    LoadLayers,
    Pace,
    Policy,
    Serve,
    Slo,
    Snapshot,
    Switch,
    Telemetry,
)
from helios_sim.policy.controller import Controller

MEMORY_BYTES = 40_000_000_000
TYPICAL_TOKENS = 1000


def example_candidate(
    name: str,
    exit_layers: tuple[int, ...],
    layer_bytes: int,
    kv_layer_bytes: int,
    *,
    layer_s: float = 0.001,
    tokenizer: str = "opt",
    memory_bytes: int = MEMORY_BYTES,
) -> Candidate:
    """A candidate of round numbers: every layer takes the same bytes, seconds and joules.

    An iteration takes as long for many rows as for one.
    """
    weights = tuple(4 * layer_bytes + k * layer_bytes for k in exit_layers)
    kv = tuple(k * kv_layer_bytes for k in exit_layers)
    return Candidate(
        name=name,
        tokenizer=tokenizer,
        exit_layers=exit_layers,
        weight_bytes=weights,
        kv_bytes_per_token=kv,
        batch_limit=tuple(
            max(0, (memory_bytes - w) // (b * TYPICAL_TOKENS))
            for w, b in zip(weights, kv, strict=True)
        ),
        batches=(1,),
        decode_iteration_s=tuple((k * layer_s,) for k in exit_layers),
        decode_iteration_j=tuple((k * layer_s * 200,) for k in exit_layers),
        prefill_s=tuple(k * layer_s * 2 for k in exit_layers),
        typical_tokens=TYPICAL_TOKENS,
    )


def example_candidates(memory_bytes: int = MEMORY_BYTES) -> tuple[Candidate, ...]:
    """A small and a large model of one tokenizer, a middle one, and one of another tokenizer."""

    def of(name: str, exits: tuple[int, ...], layer: int, kv: int, tokenizer: str) -> Candidate:
        return example_candidate(
            name, exits, layer, kv, tokenizer=tokenizer, memory_bytes=memory_bytes
        )

    return (
        of("opt-1.3b", (6, 12, 24), 100_000_000, 8_192, "opt"),
        of("opt-6.7b", (9, 17, 32), 400_000_000, 16_384, "opt"),
        of("opt-2.7b", (8, 16, 32), 160_000_000, 10_240, "opt"),
        of("other", (4, 8, 16), 200_000_000, 8_192, "other"),
    )


def example_evaluation(
    candidate: Candidate,
    exit_counts: tuple[int, ...],
    *,
    token_s: float | None = None,
    nll_nats: float = 0.0,
    energy_j: float | None = None,
    num_finished: int = 5,
) -> Telemetry:
    """An evaluation whose tokens each ran to their own exit, by default at the card's pace."""
    num_tokens = sum(exit_counts)
    layers = sum(n * k for n, k in zip(exit_counts, candidate.exit_layers, strict=True))
    card_s = sum(
        n * s for n, (s, *_) in zip(exit_counts, candidate.decode_iteration_s, strict=True)
    )
    by_exit_j = candidate.decode_iteration_j or ((0.0,),) * len(exit_counts)
    card_j = sum(n * j for n, (j, *_) in zip(exit_counts, by_exit_j, strict=True))
    pace = None
    if num_tokens:
        pace = Pace(card_s / num_tokens if token_s is None else token_s, layers / num_tokens, 1.0)
    return Telemetry(
        assignment=Assignment(candidate.name, candidate.num_layers, ExitMode.WAIT),
        duration_s=card_s,
        num_finished=num_finished,
        num_tokens=num_tokens,
        exit_counts=exit_counts,
        executed_layers=layers,
        num_breaches=0,
        nll_nats=nll_nats,
        mean_ttft_s=0.05,
        mean_tpot_s=pace.token_s if pace else None,
        mean_batch=1.0,
        energy_j=card_j if energy_j is None else energy_j,
        is_evaluation=True,
        pace=pace,
    )


class ScriptedHost:
    """A host without time of its own: it asks, obeys at once, and makes its telemetry up.

    `shift` turns the exit histograms round, so that another exit dominates; `seconds_per_byte` is
    the speed of weight transfers.
    """

    def __init__(
        self,
        policy: Policy,
        candidates: Sequence[Candidate],
        *,
        slo: Slo | None = None,
        max_batch: int = 16,
        seconds_per_byte: float = 1e-10,
        num_waiting: int = 0,
        shift: int = 0,
    ) -> None:
        self.controller = Controller(policy, candidates)
        self.candidates = {c.name: c for c in candidates}
        self.slo = slo
        self.max_batch = max_batch
        self.seconds_per_byte = seconds_per_byte
        self.num_waiting = num_waiting
        self.shift = shift
        self.assignment: Assignment | None = None
        self.step = 0

    def ask(
        self,
        event: Event,
        telemetry: Telemetry | None = None,
        foresight: Mapping[str, tuple[float, ...]] | None = None,
    ) -> tuple[Decision, Snapshot]:
        """One consultation; the decision is carried out at once."""
        self.step += 1
        if foresight is None:
            foresight = {
                name: tuple(n / 100 for n in self._counts(c)) for name, c in self.candidates.items()
            }
        decision, snapshot = self.controller.consult(
            now_s=float(self.step),
            event=event,
            assignment=self.assignment,
            telemetry=telemetry,
            load_s={name: self._load_s(c) for name, c in self.candidates.items()},
            num_waiting=self.num_waiting,
            num_running=0 if event is Event.START else 1,
            max_batch=self.max_batch,
            expected_tokens=30_000.0,
            slo=self.slo,
            foresight=foresight,
        )
        self._obey(decision)
        return decision, snapshot

    def round(
        self, event: Event, telemetry: Telemetry | None = None
    ) -> Iterator[tuple[Decision, Snapshot]]:
        """An event and the evaluations it leads to; refuses more of them than candidates."""
        decision, snapshot = self.ask(event, telemetry)
        yield decision, snapshot
        for _ in range(len(self.candidates)):
            if not isinstance(decision, Evaluate):
                return
            evaluation = self.evaluation(self.candidates[decision.model])
            decision, snapshot = self.ask(Event.EVALUATED, evaluation)
            yield decision, snapshot
        assert not isinstance(decision, Evaluate), (
            f"The policy still evaluates after {len(self.candidates) + 1} events of one round "
            f"over {len(self.candidates)} candidates."
        )

    def walk(self, num_cycles: int = 3) -> list[tuple[Decision, Snapshot]]:
        """A start, then breaches and reassessments as far as the policy watches for them."""
        watching = self.controller.policy.watching
        seen = list(self.round(Event.START))
        for _ in range(num_cycles):
            now = self.assignment
            watches = watching.breach_window_tokens is not None
            if watches and now is not None and now.depth < self.candidates[now.model].num_layers:
                seen.append(self.ask(Event.BREACHED, self._serving(now)))
            if watching.reassess_requests is not None:
                now = self.assignment
                telemetry = None if now is None else self._serving(now)
                seen.extend(self.round(Event.REASSESS, telemetry))
        return seen

    def evaluation(self, candidate: Candidate) -> Telemetry:
        """The telemetry of an evaluation of `candidate` now."""
        return example_evaluation(candidate, self._counts(candidate), nll_nats=200.0 + self.step)

    def _counts(self, candidate: Candidate) -> tuple[int, ...]:
        exits = len(candidate.exit_layers)
        favourite = (len(candidate.name) + self.step + self.shift) % exits
        return tuple(100 - 10 * (exits - 1) if e == favourite else 10 for e in range(exits))

    def _serving(self, now: Assignment) -> Telemetry:
        counts = tuple(100 if k == now.depth else 0 for k in self.candidates[now.model].exit_layers)
        evaluation = example_evaluation(self.candidates[now.model], counts)
        return replace(evaluation, assignment=now, num_breaches=51, is_evaluation=False)

    def _load_s(self, candidate: Candidate) -> tuple[float, ...]:
        loaded = 0
        now = self.assignment
        if now is not None and now.model == candidate.name:
            loaded = candidate.weight_bytes[candidate.level_of(now.depth)]
        return tuple(max(0, w - loaded) * self.seconds_per_byte for w in candidate.weight_bytes)

    def _obey(self, decision: Decision) -> None:
        if isinstance(decision, Evaluate):
            depth = self.candidates[decision.model].num_layers
            self.assignment = Assignment(decision.model, depth, decision.exit_mode)
        elif isinstance(decision, (Serve, Switch)):
            self.assignment = Assignment(decision.model, decision.depth, decision.exit_mode)
        elif isinstance(decision, LoadLayers):
            assert self.assignment is not None
            self.assignment = Assignment(self.assignment.model, decision.depth, decision.exit_mode)


class _Unreadable(Mapping[str, tuple[float, ...]]):
    """Foresight that nobody may look into."""

    def __getitem__(self, key: str) -> tuple[float, ...]:
        raise AssertionError("The policy reads foresight without declaring sees_future.")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("The policy reads foresight without declaring sees_future.")

    def __len__(self) -> int:
        raise AssertionError("The policy reads foresight without declaring sees_future.")


class _Watched:
    """A policy whose every snapshot is compared with a copy from before it decided."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = policy.name
        self.sees_future = policy.sees_future
        self.watching = policy.watching
        self.confidence_threshold = policy.confidence_threshold

    def decide(self, snapshot: Snapshot) -> Decision:
        before = copy.deepcopy(snapshot)
        decision = self.policy.decide(snapshot)
        assert snapshot == before, "The policy changed the snapshot it was given."
        return decision


class PolicyContract:
    """Inherit this and give it `make_policy`: pytest checks that your policy keeps the contract."""

    def make_policy(self) -> Policy:
        """A new policy; yours."""
        raise NotImplementedError("A subclass of PolicyContract defines make_policy().")

    def candidate_sets(self) -> list[tuple[Candidate, ...]]:
        """Candidates to try the policy on; override for a policy that names its models."""
        every = example_candidates()
        return [every[:1], every[:2], every, example_candidates(memory_bytes=9_000_000_000)]

    def hosts(self, policy: Policy | None = None) -> Iterator[ScriptedHost]:
        """Hosts of a new or the given policy: candidates, SLOs, transfer costs, token streams."""
        slos = (Slo(), Slo(ttft_s=0.02, tpot_s=0.02), Slo(tpot_s=1e-9))
        for candidates, slo, seconds_per_byte, shift in itertools.product(
            self.candidate_sets(), slos, (1e-10, 1.0), (0, 1, 2)
        ):
            yield ScriptedHost(
                policy or self.make_policy(),
                candidates,
                slo=slo,
                max_batch=1 if shift == 0 else 64,
                seconds_per_byte=seconds_per_byte,
                num_waiting=0 if shift == 1 else 40,
                shift=shift,
            )

    def snapshots(self) -> list[Snapshot]:
        """All that the hosts asked."""
        return [snapshot for host in self.hosts() for _, snapshot in host.walk()]

    def test_says_who_it_is_and_when_to_ask_it(self) -> None:
        """Name, foresight, threshold and watching are of the declared kinds and do not change."""
        policy = self.make_policy()
        assert isinstance(policy.name, str)
        assert policy.name
        assert isinstance(policy.sees_future, bool)
        threshold = policy.confidence_threshold
        assert threshold is None or 0 <= threshold <= 1
        watching = policy.watching
        assert watching == policy.watching
        assert watching.reassess_requests is None or watching.reassess_requests >= 1
        window = watching.breach_window_tokens
        assert window is None or 0 <= watching.breach_limit < window
        assert watching.window_kind in ("tumbling", "sliding")

    def test_every_decision_can_be_carried_out(self) -> None:
        """The controller refuses no decision of a whole walk."""
        for host in self.hosts():
            assert host.walk()

    def test_every_decision_gives_its_reason(self) -> None:
        """A decision is logged with its reason, so it must have one."""
        for host in self.hosts():
            for decision, _ in host.walk():
                assert decision.reason.strip(), f"{decision} has no reason."

    def test_the_same_snapshot_gives_the_same_decision(self) -> None:
        """Asked twice, and asked anew, a policy answers alike: it keeps no state."""
        asked = self.make_policy()
        for snapshot in self.snapshots():
            first = asked.decide(snapshot)
            assert asked.decide(copy.deepcopy(snapshot)) == first
            assert self.make_policy().decide(snapshot) == first

    def test_leaves_the_snapshot_as_it_was(self) -> None:
        """A decision changes nothing in the snapshot that is logged with it."""
        for host in self.hosts(_Watched(self.make_policy())):
            assert host.walk()

    def test_sees_the_future_only_if_it_says_so(self) -> None:
        """Foresight reaches nobody who does not declare it, and would not be looked at."""
        policy = self.make_policy()
        for snapshot in self.snapshots():
            if policy.sees_future:
                assert snapshot.foresight is not None
                continue
            assert snapshot.foresight is None
            tempted = replace(snapshot, foresight=_Unreadable())
            assert policy.decide(tempted) == policy.decide(snapshot)

    def test_every_round_of_evaluations_ends(self) -> None:
        """After as many evaluations as candidates a policy decides something else."""
        for host in self.hosts():
            for event in (Event.START, Event.REASSESS):
                *_, (last, _) = host.round(event)
                assert not isinstance(last, Evaluate)
