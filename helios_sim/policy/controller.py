"""A policy's memory in a host: the history table, the round, and the check of every decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from helios_sim.errors import InputError, listed
from helios_sim.policy.contract import (
    USUAL_REASSESS_REQUESTS,
    Assignment,
    Candidate,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Policy,
    Serve,
    Slo,
    Snapshot,
    Switch,
    Telemetry,
)
from helios_sim.policy.failure import failure_of
from helios_sim.policy.history import PerformanceHistory
from helios_sim.policy.shortlist import NothingFits


def rebatches_recomputed(policy: str, what: str) -> InputError:
    """The error of a policy that is to rebatch, by `what`, where skipped KV is recomputed."""
    return InputError(
        f'skipped_kv is "recomputed" but policy {policy!r} has {what} "rebatch", which fills the '
        'KV of those who leave; use skipped_kv = "filled".',
        "serving.skipped_kv",
    )


class Controller:
    """Asks one policy on behalf of one replica.

    It owns all that outlasts a decision: the Performance History Table and the round of
    evaluations under way. The host brings what it sees now, carries the decision out and logs it
    with the snapshot.
    `shortage` says of a model and a depth that do not fit which bytes it needs and which there
    are: the host knows its memory, a candidate's card does not. `recomputes_kv` says that the host
    feeds tokens again whose KV was skipped, which does not go with rebatching.
    """

    def __init__(
        self,
        policy: Policy,
        candidates: Sequence[Candidate],
        *,
        shortage: Callable[[str, int], str] | None = None,
        recomputes_kv: bool = False,
    ) -> None:
        names = tuple(candidate.name for candidate in candidates)
        if not names or len(set(names)) != len(names):
            raise InputError(
                f"A policy was given the candidates [{listed(names)}]; there must be at least one, "
                "and no name twice."
            )
        self.policy = policy
        self.candidates = tuple(candidates)
        self._by_name = dict(zip(names, self.candidates, strict=True))
        self._history = PerformanceHistory(names)
        self._round: tuple[str, ...] = ()
        self._shortage = shortage
        self._recomputes_kv = recomputes_kv

    def record_evaluation(self, telemetry: Telemetry) -> None:
        """Enter an evaluation into the table, for instance one of an earlier run.

        `consult` enters the evaluations of this run itself.
        """
        if not telemetry.is_evaluation:
            raise ValueError("The history table takes evaluations only; this telemetry is not one.")
        candidate = self._known(telemetry.assignment.model, "Telemetry")
        if len(telemetry.exit_counts) != len(candidate.exit_layers):
            raise ValueError(
                f"Telemetry of {candidate.name!r} has {len(telemetry.exit_counts)} exit counts; "
                f"the model has {len(candidate.exit_layers)} exits."
            )
        self._history.add(telemetry)

    def consult(
        self,
        *,
        now_s: float,
        event: Event,
        assignment: Assignment | None,
        telemetry: Telemetry | None,
        load_s: Mapping[str, Sequence[float]],
        num_waiting: int,
        num_running: int,
        max_batch: int,
        expected_tokens: float,
        slo: Slo | None = None,
        foresight: Mapping[str, tuple[float, ...]] | None = None,
    ) -> tuple[Decision, Snapshot]:
        """Ask the policy; returns its decision, checked, and the snapshot it was made on.

        A round begins with START and REASSESS; EVALUATED enters its telemetry into the table and
        its model into the round. `foresight` reaches only a policy that declares `sees_future`.
        """
        self._check_host(load_s, expected_tokens)
        self._advance_round(event, telemetry)
        sees_future = self.policy.sees_future
        if sees_future and foresight is None:
            raise ValueError(
                f"Policy {self.policy.name!r} declares sees_future, and the host gave no foresight."
            )
        snapshot = Snapshot(
            now_s=now_s,
            event=event,
            assignment=assignment,
            telemetry=telemetry,
            candidates=self.candidates,
            history=self._history.table(),
            round_evaluated=self._round,
            load_s={name: tuple(load_s[name]) for name in self._by_name},
            num_waiting=num_waiting,
            num_running=num_running,
            max_batch=max_batch,
            expected_tokens=expected_tokens,
            slo=slo or Slo(),
            foresight=dict(foresight) if sees_future and foresight is not None else None,
        )
        try:
            decision = self.policy.decide(snapshot)
        except NothingFits as error:
            raise self._with_bytes(error) from error
        except InputError:
            raise
        except Exception as error:
            # A shipped policy does not fail by what a user gave.
            if type(self.policy).__module__.startswith("helios_sim."):
                raise
            raise failure_of(type(self.policy), self._name, "decide", error) from error
        self.check(decision, assignment)
        return decision, snapshot

    def check(self, decision: object, assignment: Assignment | None) -> None:
        """Refuse a decision that no host could carry out, in a full sentence."""
        if isinstance(decision, Keep):
            if assignment is None:
                raise self._invalid("Keep at the start", "serve or evaluate: nothing is loaded yet")
            self._check_reason(decision)
            return
        if not isinstance(decision, (Evaluate, Serve, LoadLayers, Switch)):
            raise self._invalid(
                repr(decision), "return Keep, Evaluate, Serve, LoadLayers or Switch"
            )
        what = type(decision).__name__
        if not isinstance(decision.exit_mode, ExitMode):
            raise self._invalid(
                f"{what} with exit mode {decision.exit_mode!r}",
                f"give an ExitMode: one of {listed(ExitMode)}",
            )
        if decision.exit_mode is ExitMode.REBATCH and self._recomputes_kv:
            raise rebatches_recomputed(self._name, f"decided {what} with exit_mode")
        if isinstance(decision, Evaluate):
            candidate = self._known(decision.model, what)
            self._check_fits(what, candidate, candidate.num_layers)
            requests = decision.num_requests
            if isinstance(requests, bool) or not isinstance(requests, int) or requests < 1:
                raise self._invalid(
                    f"Evaluate with {requests!r} requests", "ask for a whole number of at least 1"
                )
        elif isinstance(decision, Serve):
            self._check_depth(what, self._known(decision.model, what), decision.depth)
        elif isinstance(decision, LoadLayers):
            self._check_load(decision, assignment)
        else:
            self._check_switch(decision, assignment)
        self._check_reason(decision)

    def _check_reason(self, decision: Decision) -> None:
        """Refuse a reason that is no text, or says nothing: the log and the page show it."""
        reason: object = decision.reason
        if not isinstance(reason, str) or not reason.strip():
            raise self._invalid(
                f"{type(decision).__name__} with the reason {reason!r}",
                "give a text that says why",
            )

    def _check_load(self, decision: LoadLayers, assignment: Assignment | None) -> None:
        if assignment is None:
            raise self._invalid("LoadLayers", "serve or evaluate first: nothing is loaded yet")
        self._check_depth(
            "LoadLayers", self._known(assignment.model, "The assignment"), decision.depth
        )
        if decision.depth <= assignment.depth:
            raise self._invalid(
                f"LoadLayers to {decision.depth} layers",
                f"go deeper than the {assignment.depth} layers already loaded; "
                "use Serve to give layers up",
            )

    def _check_switch(self, decision: Switch, assignment: Assignment | None) -> None:
        if assignment is None:
            raise self._invalid("Switch", "serve or evaluate first: nothing is loaded yet")
        self._check_depth("Switch", self._known(decision.model, "Switch"), decision.depth)
        if decision.model == assignment.model:
            raise self._invalid(
                f"Switch to {decision.model!r}",
                "name another candidate than the one that serves; use LoadLayers or Serve to "
                "change its depth",
            )

    def _check_depth(self, what: str, candidate: Candidate, depth: int) -> None:
        is_whole = isinstance(depth, int) and not isinstance(depth, bool)
        if not is_whole or depth not in candidate.exit_layers:
            raise self._invalid(
                f"{what} of {candidate.name!r} at depth {depth!r}",
                f"name one of its exit layers {list(candidate.exit_layers)}",
            )
        self._check_fits(what, candidate, depth)

    def _check_fits(self, what: str, candidate: Candidate, depth: int) -> None:
        if candidate.batch_limit[candidate.level_of(depth)] < 1:
            if self._shortage is None:
                why = "beside these weights no request of the workload's typical length has room"
            else:
                why = self._shortage(candidate.name, depth)
            raise self._invalid(
                f"{what} of {candidate.name!r} at depth {depth}", f"choose what fits: {why}"
            )

    def _with_bytes(self, error: NothingFits) -> InputError:
        """The error with the bytes of the smallest candidate, where the host can tell them."""
        if self._shortage is None:
            return error
        level_of = error.level_of
        smallest = min(self.candidates, key=lambda one: one.weight_bytes[level_of(one)])
        depth = smallest.exit_layers[level_of(smallest)]
        return InputError(
            f"{error.message.rstrip('.')}; for {smallest.name!r} "
            f"{self._shortage(smallest.name, depth)}.",
            error.where,
        )

    def _known(self, name: object, what: str) -> Candidate:
        if not isinstance(name, str) or name not in self._by_name:
            raise self._invalid(
                f"{what} of model {name!r}", f"name one of the candidates {listed(self._by_name)}"
            )
        return self._by_name[name]

    def _invalid(self, given: str, allowed: str) -> InputError:
        return InputError(f"The policy decided {given}; it must {allowed}.", f"policy {self._name}")

    @property
    def _name(self) -> str:
        return str(self.policy.name)

    def _advance_round(self, event: Event, telemetry: Telemetry | None) -> None:
        if event in (Event.START, Event.REASSESS):
            self._round = ()
        elif event is Event.EVALUATED:
            if telemetry is None:
                raise ValueError("An EVALUATED event needs the telemetry of the evaluation.")
            self.record_evaluation(telemetry)
            name = telemetry.assignment.model
            if name not in self._round:
                self._round = (*self._round, name)

    def _check_host(self, load_s: Mapping[str, Sequence[float]], expected_tokens: float) -> None:
        for name, candidate in self._by_name.items():
            if name not in load_s or len(load_s[name]) != len(candidate.exit_layers):
                raise ValueError(
                    f"The host gave load_s without a time for each of the "
                    f"{len(candidate.exit_layers)} exit levels of {name!r}."
                )
        if not math.isfinite(expected_tokens) or expected_tokens < 0:
            raise ValueError(
                f"The host gave expected_tokens = {expected_tokens!r}; it must be finite and at "
                "least 0. Without reassessments it is the tokens expected in the next "
                f"{USUAL_REASSESS_REQUESTS} requests."
            )
