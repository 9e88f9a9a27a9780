"""Every shipped policy keeps the policy contract, and the suite catches those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.policy import make_policy, policy_names
from helios_sim.policy.contract import (
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    Policy,
    Serve,
    Snapshot,
    Switch,
    Watching,
)
from helios_sim.policy.contract_suite import PolicyContract


class TestHelios(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("helios")


class TestHeliosOtherwise(PolicyContract):
    """Every choice that is left open, taken the other way."""

    def make_policy(self) -> Policy:
        return make_policy(
            "helios",
            {
                "top_k": 2,
                "objective": "quality",
                "depth_rule": "quantile",
                "overhead_rule": "transfer",
                "evaluation_exit_mode": "solo",
                "after_load_exit_mode": "full",
                "evaluate_at_start": False,
                "window_kind": "sliding",
            },
        )


class TestHeliosFixedDepth(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy(
            "helios", {"depth_rule": "fixed", "fixed_depth": 10, "objective": "memory"}
        )


class TestHeliosResponseTime(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy(
            "helios", {"objective": "response-time", "after_load_exit_mode": "rebatch"}
        )


class TestHeliosEnergy(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("helios", {"objective": "energy", "after_load_exit_mode": "solo"})


class TestVanilla(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("vanilla")


class TestEeSingle(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("ee-single", {"exit_mode": "rebatch", "confidence_threshold": 0.5})


class TestStaticDepth(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("static-depth", {"model": "opt-1.3b", "depth": 12})


class TestSwitchOnly(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("switch-only")


class TestLoadOnly(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("load-only")


class TestNever(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("never")


class TestAlways(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("always")


class TestClairvoyant(PolicyContract):
    def make_policy(self) -> Policy:
        return make_policy("clairvoyant")


def test_every_shipped_policy_inherits_the_suite() -> None:
    """A policy added to the registry without a suite here fails this test."""
    covered = {
        value().make_policy().name
        for value in globals().values()
        if isinstance(value, type) and issubclass(value, PolicyContract)
        if value is not PolicyContract
    }
    assert covered == set(policy_names())


class _Flawed:
    """A policy with one flaw, given as its decision function."""

    name = "flawed"
    watching = Watching(reassess_requests=150)
    confidence_threshold = None

    def __init__(
        self, flaw: Callable[[Any, Snapshot], Decision], *, sees_future: bool = False
    ) -> None:
        self.flaw = flaw
        self.sees_future = sees_future
        self.asked = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        return self.flaw(self, snapshot)


def _serve(snapshot: Snapshot, reason: str = "Because.") -> Decision:
    first = snapshot.candidates[0]
    return Serve(first.name, first.exit_layers[0], ExitMode.LOADED_DEPTH, reason)


def _counts(policy: Any, snapshot: Snapshot) -> Decision:
    policy.asked += 1
    return _serve(snapshot, f"Asked {policy.asked} times.")


def _writes(_: Any, snapshot: Snapshot) -> Decision:
    snapshot.history.clear()  # type: ignore[attr-defined]
    return _serve(snapshot)


def _peeks(_: Any, snapshot: Snapshot) -> Decision:
    if snapshot.foresight is not None and "other" in snapshot.foresight:
        return _serve(snapshot, "I know.")
    return _serve(snapshot)


def _evaluates_for_ever(_: Any, snapshot: Snapshot) -> Decision:
    return Evaluate(snapshot.candidates[0].name, 5, ExitMode.WAIT, "Again.")


def _switches_to_itself(_: Any, snapshot: Snapshot) -> Decision:
    if snapshot.event is Event.START or snapshot.assignment is None:
        return _serve(snapshot)
    now = snapshot.assignment
    return Switch(now.model, now.depth, now.exit_mode, "Once more.")


@pytest.mark.parametrize(
    ("flaw", "check", "error"),
    [
        (_counts, "test_the_same_snapshot_gives_the_same_decision", AssertionError),
        (_writes, "test_leaves_the_snapshot_as_it_was", AssertionError),
        (_peeks, "test_sees_the_future_only_if_it_says_so", AssertionError),
        (_evaluates_for_ever, "test_every_round_of_evaluations_ends", AssertionError),
        (_switches_to_itself, "test_every_decision_can_be_carried_out", InputError),
        (lambda _, s: _serve(s, " "), "test_every_decision_gives_its_reason", InputError),
        (lambda _, s: Keep("No."), "test_every_decision_can_be_carried_out", InputError),
    ],
)
def test_the_suite_catches_a_policy_with_one_flaw(
    flaw: Callable[[Any, Snapshot], Decision], check: str, error: type[Exception]
) -> None:
    """For each sentence of the contract, a policy that breaks it does not pass."""

    class Suite(PolicyContract):
        def make_policy(self) -> Policy:
            return _Flawed(flaw)

    with pytest.raises(error):
        getattr(Suite(), check)()


def _reads_breaches(_: Any, snapshot: Snapshot) -> Decision:
    if snapshot.event is Event.START or snapshot.telemetry is None:
        assert snapshot.event is Event.START, "only the first snapshot lacks telemetry"
        return _serve(snapshot)
    return Keep(f"{snapshot.telemetry.num_breaches} breaches.")


def test_a_policy_may_read_telemetry_whenever_something_has_been_served() -> None:
    class Suite(PolicyContract):
        def make_policy(self) -> Policy:
            return _Flawed(_reads_breaches)

    Suite().test_every_decision_can_be_carried_out()
