"""The controller's memory, its rounds, its oracle boundary and the decisions it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.policy import Controller, Helios, make_policy, snapshot_from_json, snapshot_to_json
from helios_sim.policy.contract import (
    Assignment,
    Candidate,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Serve,
    Snapshot,
    Switch,
    Telemetry,
)
from helios_sim.policy.contract_suite import (
    ScriptedHost,
    example_candidates,
    example_evaluation,
)
from helios_sim.policy.snapshot_json import SnapshotLog, SnapshotReader, read_snapshots

SMALL, LARGE, MIDDLE, OTHER = example_candidates()
PAIR = (SMALL, LARGE)
PARTIAL = ExitMode.LOADED_DEPTH


def test_a_shipped_policy_that_fails_is_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its error stays what it is, and so does a refusal that a policy of one's own words."""

    def fail(*_: object) -> Decision:
        raise KeyError("ours")

    monkeypatch.setattr(Helios, "decide", fail)
    with pytest.raises(KeyError, match="ours"):
        consult(Controller(Helios(), PAIR))

    class Mine(Helios):
        def decide(self, snapshot: Snapshot) -> Decision:
            raise InputError("Not this model.")

    with pytest.raises(InputError, match=r"^Not this model\.$"):
        consult(Controller(Mine(), PAIR))


def consult(
    controller: Controller,
    event: Event = Event.START,
    telemetry: Telemetry | None = None,
    assignment: Assignment | None = None,
    **other: Any,
) -> tuple[Decision, Snapshot]:
    arguments: dict[str, Any] = {
        "now_s": 0.0,
        "load_s": {c.name: [1.0] * len(c.exit_layers) for c in controller.candidates},
        "num_waiting": 0,
        "num_running": 0,
        "max_batch": 8,
        "expected_tokens": 100.0,
    }
    return controller.consult(
        event=event, telemetry=telemetry, assignment=assignment, **{**arguments, **other}
    )


def evaluation_of(candidate: Candidate) -> Telemetry:
    return example_evaluation(candidate, (70, 5, 25))


def test_a_round_grows_with_evaluations_and_begins_anew_with_a_reassessment() -> None:
    """Breaches leave the round alone; START and REASSESS empty it; the table stays."""
    controller = Controller(Helios(), PAIR)
    now = Assignment(SMALL.name, 6, PARTIAL)
    rounds = []
    for event, telemetry, assignment in (
        (Event.START, None, None),
        (Event.EVALUATED, evaluation_of(SMALL), now),
        (Event.EVALUATED, evaluation_of(LARGE), now),
        (Event.BREACHED, None, now),
        (Event.REASSESS, None, now),
        (Event.EVALUATED, evaluation_of(SMALL), now),
    ):
        _, seen = consult(controller, event, telemetry, assignment)
        rounds.append(seen.round_evaluated)
    small, both = (SMALL.name,), (SMALL.name, LARGE.name)
    assert rounds == [(), small, both, both, (), small]
    assert [len(rows) for rows in seen.history.values()] == [2, 1]


def test_a_model_that_is_evaluated_twice_is_named_once_in_its_round() -> None:
    controller = Controller(Helios(), PAIR)
    consult(controller)
    for _ in range(2):
        now = Assignment(SMALL.name, 24, ExitMode.WAIT)
        _, seen = consult(controller, Event.EVALUATED, evaluation_of(SMALL), now)
    assert seen.round_evaluated == (SMALL.name,)


def test_the_table_keeps_the_latest_evaluations_oldest_first() -> None:
    """Of six evaluations four are kept."""
    controller = Controller(Helios(), PAIR)
    evaluations = [replace(evaluation_of(SMALL), duration_s=float(n)) for n in range(6)]
    for evaluation in evaluations:
        controller.record_evaluation(evaluation)
    _, seen = consult(controller)
    assert seen.history == {SMALL.name: tuple(evaluations[2:]), LARGE.name: ()}


def test_a_snapshot_does_not_change_after_it_was_handed_out() -> None:
    """Later evaluations, and the host's own dictionaries, do not reach it."""
    controller = Controller(Helios(), PAIR)
    load_s = {c.name: [1.0, 2.0, 3.0] for c in PAIR}
    _, before = consult(controller, load_s=load_s)
    load_s[SMALL.name][0] = 99.0
    consult(controller, Event.EVALUATED, evaluation_of(SMALL))
    assert before.history == {SMALL.name: (), LARGE.name: ()}
    assert before.load_s[SMALL.name] == (1.0, 2.0, 3.0)


def test_foresight_reaches_only_a_policy_that_declares_it() -> None:
    """The oracle boundary: the host passes the future, HELIOS gets None."""
    future: Mapping[str, tuple[float, ...]] = {c.name: (1.0, 0.0, 0.0) for c in PAIR}
    _, blind = consult(Controller(Helios(), PAIR), foresight=future)
    assert blind.foresight is None
    clairvoyant = Controller(make_policy("clairvoyant"), PAIR)
    _, seeing = consult(clairvoyant, foresight=future)
    assert seeing.foresight == future
    with pytest.raises(ValueError, match="the host gave no foresight"):
        consult(clairvoyant)


NOW = Assignment(SMALL.name, 12, PARTIAL)


@pytest.mark.parametrize(
    ("decision", "assignment", "sentence"),
    [
        (Keep(""), None, "decided Keep at the start; it must serve or evaluate"),
        (None, NOW, "decided None; it must return Keep, Evaluate, Serve, LoadLayers or Switch"),
        (Serve("opt-13b", 6, PARTIAL, ""), NOW, "Serve of model 'opt-13b'; it must name one of"),
        (Serve(SMALL.name, 7, PARTIAL, ""), NOW, r"depth 7; .* exit layers \[6, 12, 24\]"),
        (Serve(SMALL.name, 6.0, PARTIAL, ""), NOW, "at depth 6.0"),  # type: ignore[arg-type]
        (Serve(SMALL.name, 6, "wait", ""), NOW, "give an ExitMode"),  # type: ignore[arg-type]
        (Evaluate(LARGE.name, 0, PARTIAL, ""), NOW, "Evaluate with 0 requests"),
        (Evaluate("opt-13b", 5, PARTIAL, ""), NOW, "Evaluate of model 'opt-13b'"),
        (LoadLayers(24, PARTIAL, ""), None, "decided LoadLayers; .* nothing is loaded yet"),
        (LoadLayers(12, PARTIAL, ""), NOW, "go deeper than the 12 layers already loaded"),
        (LoadLayers(6, PARTIAL, ""), NOW, "use Serve to give layers up"),
        (LoadLayers(20, PARTIAL, ""), NOW, "at depth 20"),
        (Switch(SMALL.name, 24, PARTIAL, ""), NOW, "name another candidate"),
        (Switch(LARGE.name, 9, PARTIAL, ""), None, "decided Switch; .* nothing is loaded yet"),
        (Switch(LARGE.name, 10, PARTIAL, ""), NOW, r"exit layers \[9, 17, 32\]"),
        (Switch("opt-13b", 9, PARTIAL, ""), NOW, "Switch of model 'opt-13b'"),
        (Serve("tight", 24, PARTIAL, ""), NOW, "choose what fits"),
        (Evaluate("tight", 5, PARTIAL, ""), NOW, "choose what fits"),
        (Keep(""), NOW, "decided Keep with the reason ''; it must give a text that says why"),
        (Serve(SMALL.name, 6, PARTIAL, " "), NOW, "Serve with the reason ' '; .* a text"),
        (Evaluate(LARGE.name, 5, PARTIAL, 5), NOW, "with the reason 5"),  # type: ignore[arg-type]
        (LoadLayers(24, PARTIAL, None), NOW, "with the reason None"),  # type: ignore[arg-type]
        (Switch(LARGE.name, 9, PARTIAL, b"x"), NOW, "reason b'x'"),  # type: ignore[arg-type]
    ],
)
def test_a_decision_that_cannot_be_carried_out_is_refused_in_a_sentence(
    decision: Decision, assignment: Assignment | None, sentence: str
) -> None:
    """What was decided, what is allowed, and whose policy it was."""
    tight = replace(SMALL, name="tight", batch_limit=(9, 1, 0))
    controller = Controller(Helios(), (*PAIR, tight))
    with pytest.raises(InputError, match=sentence) as error:
        controller.check(decision, assignment)
    assert error.value.where == "policy helios"


def test_a_host_that_knows_its_memory_says_what_is_needed_and_what_is_there() -> None:
    tight = replace(SMALL, name="tight", batch_limit=(9, 1, 0))
    told = Controller(
        Helios(), (tight,), shortage=lambda name, depth: f"{name} at {depth} needs 9 of 8 bytes"
    )
    with pytest.raises(InputError, match=r"choose what fits: tight at 24 needs 9 of 8 bytes\."):
        told.check(Serve("tight", 24, PARTIAL, ""), NOW)
    with pytest.raises(InputError, match=r"at least one must; for 'tight' tight at 24 needs 9"):
        consult(told)


def test_where_nothing_fits_the_bytes_are_those_of_the_depth_that_was_to_be_loaded() -> None:
    """The model of fewer bytes at its first exit is named, though it is the larger one in all."""
    front = replace(SMALL, weight_bytes=(9 * 10**9, 9 * 10**9, 10**10), batch_limit=(0, 0, 0))
    large = replace(LARGE, batch_limit=(0, 0, 0))
    for use, named in (("static-depth", f"{LARGE.name} at 9"), ("vanilla", f"{SMALL.name} at 24")):
        controller = Controller(
            make_policy(use), (front, large), shortage=lambda name, depth: f"{name} at {depth}"
        )
        with pytest.raises(InputError, match=named):
            consult(controller)


@pytest.mark.parametrize(
    "decision",
    [
        Keep("Why."),
        Serve(SMALL.name, 6, PARTIAL, "Why."),
        Evaluate(LARGE.name, 1, ExitMode.WAIT, "Why."),
        LoadLayers(24, ExitMode.WAIT, "Why."),
        Switch(LARGE.name, 17, PARTIAL, "Why."),
    ],
)
def test_a_decision_that_can_be_carried_out_passes(decision: Decision) -> None:
    """One of each kind, from 12 layers of the small model."""
    Controller(Helios(), PAIR).check(decision, NOW)


def test_a_host_that_forgets_something_is_told() -> None:
    """Times for every exit level, finite expectations, telemetry of a true evaluation."""
    controller = Controller(Helios(), PAIR)
    with pytest.raises(ValueError, match=r"3 exit levels of 'opt-6\.7b'"):
        consult(controller, load_s={SMALL.name: [1, 1, 1], LARGE.name: [1, 1]})
    with pytest.raises(ValueError, match="expected_tokens = inf"):
        consult(controller, expected_tokens=math.inf)
    with pytest.raises(ValueError, match="needs the telemetry"):
        consult(controller, Event.EVALUATED)
    serving = replace(evaluation_of(SMALL), is_evaluation=False)
    with pytest.raises(ValueError, match="takes evaluations only"):
        controller.record_evaluation(serving)
    with pytest.raises(ValueError, match="2 exit counts"):
        controller.record_evaluation(replace(evaluation_of(SMALL), exit_counts=(1, 2)))
    _, seen = consult(controller)
    assert seen.history == {SMALL.name: (), LARGE.name: ()}


def test_candidates_have_distinct_names_and_there_is_one() -> None:
    """A repeated name would make every decision ambiguous."""
    for candidates in ((), (SMALL, SMALL)):
        with pytest.raises(InputError, match="at least one, and no name twice"):
            Controller(Helios(), candidates)


def test_a_line_of_the_log_holds_what_the_one_before_does_not() -> None:
    """Candidates stand in the first line alone; an evaluation in the history is a line's number."""
    walked = [seen for _, seen in ScriptedHost(make_policy("helios"), example_candidates()).walk()]
    log, reader = SnapshotLog(), SnapshotReader()
    lines = [log.write(seen) for seen in walked]
    assert [reader.read(line) for line in lines] == walked
    told = [json.loads(line) for line in lines]
    assert set(told[0]) == {field.name for field in fields(Snapshot)}
    assert not any({"candidates", "slo", "max_batch"} & set(line) for line in told[1:])
    evaluated = [k for k, seen in enumerate(walked) if seen.event is Event.EVALUATED]
    for k in evaluated:
        assert walked[k].telemetry is not None
        assert told[k]["history"][walked[k].telemetry.assignment.model][-1] == k


def test_logs_of_several_replicas_are_told_apart() -> None:
    walked = [seen for _, seen in ScriptedHost(make_policy("helios"), example_candidates()).walk()]
    logs = SnapshotLog(), SnapshotLog()
    order = [(replica, seen) for seen in walked for replica in (1, 0)]
    lines = [logs[replica].write(seen) for replica, seen in order]
    assert read_snapshots([replica for replica, _ in order], lines) == [seen for _, seen in order]


def test_a_logged_snapshot_replays_to_the_same_decision() -> None:
    """Written as strict JSON and read back, snapshots are equal and give equal decisions."""
    for name in ("helios", "clairvoyant"):
        policy = make_policy(name)
        for decision, seen in ScriptedHost(policy, example_candidates()).walk():
            unreachable = {**seen.load_s, OTHER.name: (1.0, 2.0, math.inf)}
            for snapshot in (seen, replace(seen, load_s=unreachable)):
                assert snapshot_from_json(snapshot_to_json(snapshot)) == snapshot
            assert policy.decide(snapshot_from_json(snapshot_to_json(seen))) == decision
