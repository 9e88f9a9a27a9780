"""What a decision means in either host, by a pencil: two models of bytes that are easy to add."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import pytest

from helios_sim.cards import candidate_card
from helios_sim.engine import Setup
from helios_sim.errors import InputError
from helios_sim.loop.state import NEVER
from helios_sim.policy.contract import (
    USUAL_REASSESS_REQUESTS,
    Assignment,
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Pace,
    Serve,
    Slo,
    Snapshot,
    Watching,
)
from helios_sim.steward import (
    HOLD,
    Aim,
    PaceSums,
    Steward,
    View,
    evaluation_seconds,
    held_by,
)
from tests.engine.factories import both_models, drifting_setup

FULL = ExitMode.FULL
FORESIGHT = {"small": (0.5, 0.5), "large": (0.25, 0.25, 0.5)}
NOTHING_YET = View(
    now_s=0.0,
    num_waiting=3,
    num_running=0,
    evaluating=False,
    finish_target=NEVER,
    num_tokens=0,
    num_finished=0,
    exit_counts=(),
    executed_layers=0,
    num_breaches=0,
    nll_units=0,
    num_decode_iterations=0,
    decode_rows=0,
    paced=PaceSums(),
    period_finished=0,
    period_ttft_s=0.0,
    period_tpots=0,
    period_tpot_s=0.0,
)


@dataclass
class Scripted:
    """Decides what it is told to, and keeps what it was shown."""

    script: list[Decision]
    watching: Watching
    name: str = "scripted"
    sees_future: bool = False
    confidence_threshold: float | None = None
    shown: list[Snapshot] = field(default_factory=list)

    def decide(self, snapshot: Snapshot) -> Decision:
        self.shown.append(snapshot)
        return self.script[len(self.shown) - 1]


@dataclass(frozen=True)
class Logged:
    """An entry of a decision log."""

    time_s: float
    decision: Decision


def steward_of(
    *script: Decision,
    watching: Watching | None = None,
    slo: Slo | None = None,
    sees_future: bool = False,
    memory_bytes: int = 100_000,
) -> Steward:
    setup: Setup = drifting_setup(profile=both_models(memory_bytes=memory_bytes))
    cards = tuple(candidate_card(setup, name) for name in setup.candidates)
    policy = Scripted(list(script), watching or Watching(), sees_future=sees_future)
    return Steward(setup, policy, cards, slo or Slo())


def shown_to(steward: Steward) -> Snapshot:
    assert isinstance(steward.policy, Scripted)
    return steward.policy.shown[-1]


def of_the_served(steward: Steward, view: View) -> View:
    """The view with as many exit counts as the served model has exits, where it gives none."""
    if steward.assignment is None or view.exit_counts:
        return view
    exits = len(steward.cards[steward.assignment.model].exit_layers)
    return replace(view, exit_counts=(0,) * exits)


def ask(
    steward: Steward,
    event: Event = Event.REASSESS,
    view: View = NOTHING_YET,
    in_memory: Collection[str] = (),
) -> tuple[Decision, Assignment]:
    decision, wanted, _ = steward.ask(
        event,
        of_the_served(steward, view),
        in_memory=in_memory,
        energy_j=None,
        idle_energy_j=None,
        foresight=FORESIGHT if steward.policy.sees_future else None,
    )
    return decision, wanted


def carry_out(
    steward: Steward,
    event: Event = Event.REASSESS,
    view: View = NOTHING_YET,
    ready_s: float | None = None,
) -> Assignment:
    """Ask, load what was decided, and be ready at `ready_s`, or at once."""
    decision, wanted = ask(steward, event, view)
    done = view if ready_s is None else replace(view, now_s=ready_s)
    if steward.assignment != wanted:
        card = steward.cards[wanted.model]
        num_bytes = card.weight_bytes[card.level_of(wanted.depth)]
        steward.take_up(wanted, num_bytes, done.now_s)
    steward.carried_out(decision, view.now_s, of_the_served(steward, done))
    return wanted


def test_an_evaluation_runs_the_whole_model() -> None:
    steward = steward_of(Evaluate("large", 2, ExitMode.WAIT, "see"))
    assert ask(steward)[1] == Assignment("large", 8, ExitMode.WAIT)


def test_what_does_not_fit_is_refused_with_the_bytes_that_it_needs() -> None:
    steward = steward_of(Serve("large", 8, FULL, "go"), memory_bytes=12_000)
    needed = steward.room.needed_bytes("large", 8)
    assert needed > 12_000
    with pytest.raises(InputError, match=f"need {needed:,} bytes, and there are"):
        ask(steward, Event.START)


def test_more_layers_are_those_of_the_model_that_runs_and_keeping_changes_nothing() -> None:
    steward = steward_of(
        Serve("large", 4, FULL, "go"), LoadLayers(8, ExitMode.WAIT, "deeper"), Keep("as it is")
    )
    carry_out(steward)
    assert carry_out(steward) == Assignment("large", 8, ExitMode.WAIT)
    assert carry_out(steward) == Assignment("large", 8, ExitMode.WAIT)


def test_only_bytes_that_are_not_held_are_missing() -> None:
    steward = steward_of(Serve("large", 4, FULL, "go"))
    two, four, eight = steward.cards["large"].weight_bytes
    assert steward.missing_bytes("large", 8) == eight
    carry_out(steward)
    assert [steward.missing_bytes("large", depth) for depth in (2, 4, 8)] == [0, 0, eight - four]
    # A host that measures its bytes holds some that are no layer's.
    steward.weight_bytes += 1_000
    assert steward.missing_bytes("large", 8) == eight - four
    assert steward.missing_bytes("small", 4) == steward.cards["small"].weight_bytes[-1]
    assert two < four


def test_the_disk_is_reckoned_with_until_a_model_is_in_memory_and_nothing_where_nothing_moves() -> (
    None
):
    steward = steward_of(Serve("large", 4, FULL, "go"), Keep("so"), Keep("so"))
    loading = steward.room.profile.loading
    small = steward.cards["small"].weight_bytes
    carry_out(steward)
    cold = dict(shown_to(steward).load_s)
    assert cold["small"] == pytest.approx(
        [loading.disk.seconds(small[-1]) + loading.host.seconds(one) for one in small]
    )
    ask(steward)
    held = dict(shown_to(steward).load_s)
    assert held["small"] == pytest.approx(cold["small"])
    assert held["large"][:2] == (0.0, 0.0) and held["large"][2] > loading.disk.seconds(1_000)
    ask(steward, in_memory=("small", "large"))
    warm = shown_to(steward).load_s
    assert warm["small"] == pytest.approx([loading.host.seconds(one) for one in small])
    assert warm["large"][:2] == (0.0, 0.0) and warm["large"][2] > 0.0


def test_telemetry_is_what_was_seen_since_the_last_decision_was_carried_out() -> None:
    steward = steward_of(Serve("small", 4, FULL, "go"), Keep("so"), Keep("so"))
    carry_out(steward)
    assert shown_to(steward).telemetry is None
    first = replace(
        NOTHING_YET,
        now_s=10.0,
        num_tokens=100,
        num_finished=4,
        exit_counts=(60, 30),
        executed_layers=240,
        num_breaches=7,
        nll_units=2048,
        num_decode_iterations=45,
        decode_rows=90,
        paced=PaceSums(tokens=80, rows=80, row_s=4.0, row_layers=200, row_rows=160),
        period_finished=4,
        period_ttft_s=2.0,
        period_tpots=2,
        period_tpot_s=0.5,
    )
    carry_out(steward, view=first)
    told = shown_to(steward).telemetry
    assert told is not None
    assert (told.duration_s, told.num_tokens, told.exit_counts) == (10.0, 100, (60, 30))
    assert (told.mean_ttft_s, told.mean_tpot_s, told.mean_batch) == (0.5, 0.25, 2.0)
    assert (told.nll_nats, told.num_breaches, told.energy_j) == (2.0, 7, None)
    assert (told.num_finished, told.executed_layers) == (4, 240)
    assert told.pace == Pace(token_s=0.05, layers=2.5, rows=2.0)
    second = replace(
        first,
        now_s=12.0,
        num_tokens=110,
        num_finished=5,
        exit_counts=(62, 38),
        executed_layers=272,
        nll_units=3072,
        num_decode_iterations=50,
        decode_rows=105,
        # Ten rows taken on in parts, by twos and threes, and five tokens that came of it.
        paced=PaceSums(tokens=85, rows=90, row_s=4.5, row_layers=215, row_rows=186),
        period_finished=1,
        period_ttft_s=0.75,
        period_tpots=0,
    )
    ask(steward, view=second)
    told = shown_to(steward).telemetry
    assert told is not None
    assert (told.duration_s, told.num_tokens, told.exit_counts) == (2.0, 10, (2, 8))
    assert (told.mean_ttft_s, told.mean_tpot_s, told.mean_batch) == (0.75, None, 3.0)
    assert (told.nll_nats, told.num_breaches) == (1.0, 0)
    assert (told.num_finished, told.executed_layers) == (1, 32)
    assert told.pace == Pace(token_s=0.1, layers=3.0, rows=2.6)
    assert second.paced.since(second.paced) is None


def test_an_evaluation_ends_with_its_requests_and_watches_nothing() -> None:
    steward = steward_of(watching=Watching(150, 100, 50))
    assert steward.aim(Evaluate("small", 5, FULL, "see")) == Aim(True, 5, 5, False)
    assert steward.aim(Serve("small", 4, FULL, "go")) == Aim(False, NEVER, 150, True)
    assert Aim(False, NEVER, NEVER, False) == HOLD


@pytest.mark.parametrize(("window", "limit", "watched"), [(100, 0, True), (None, 50, False)])
def test_tokens_are_watched_where_there_is_a_window_whatever_its_limit(
    window: int | None, limit: int, watched: bool
) -> None:
    steward = steward_of(watching=Watching(150, window, limit))
    assert steward.aim(Serve("small", 4, FULL, "go")).watching is watched


def test_a_policy_is_shown_what_its_host_sees_each_in_its_place() -> None:
    slo = Slo(ttft_s=0.5)
    steward = steward_of(Serve("small", 4, FULL, "go"), Keep("so"), slo=slo, sees_future=True)
    carry_out(steward, Event.START)
    steward.ask(
        Event.REASSESS,
        of_the_served(steward, replace(NOTHING_YET, now_s=9.0, num_waiting=5, num_running=2)),
        in_memory=(),
        energy_j=70.0,
        idle_energy_j=20.0,
        foresight=FORESIGHT,
    )
    shown = shown_to(steward)
    assert (shown.now_s, shown.num_waiting, shown.num_running) == (9.0, 5, 2)
    assert shown.max_batch == steward.room.serving.max_batch
    assert (shown.slo, shown.foresight) == (slo, FORESIGHT)
    assert shown.telemetry is not None
    assert (shown.telemetry.energy_j, shown.telemetry.idle_energy_j) == (70.0, 20.0)


def test_an_evaluation_lasts_until_the_next_decision_or_the_end() -> None:
    log = [
        Logged(0.0, Serve("small", 4, FULL, "go")),
        Logged(10.0, Evaluate("large", 2, FULL, "see")),
        Logged(13.0, Keep("so")),
        Logged(20.0, Evaluate("large", 2, FULL, "see")),
    ]
    assert evaluation_seconds(log, 25.0) == 8.0
    assert evaluation_seconds([], 25.0) == 0.0


def test_a_breach_leaves_the_rest_of_the_round_and_an_evaluation_takes_nothing_of_it() -> None:
    serve = Serve("small", 4, FULL, "go")
    steward = steward_of(
        Evaluate("small", 2, FULL, "see"), serve, Keep("so"), serve, watching=Watching(150, 100, 50)
    )
    carry_out(steward, Event.START)
    evaluated = replace(NOTHING_YET, evaluating=True, finish_target=0, exit_counts=(1, 1))
    carry_out(steward, Event.EVALUATED, evaluated)
    assert steward.aim(serve).finish_target == 150
    carry_out(steward, Event.BREACHED, replace(evaluated, evaluating=False, finish_target=37))
    assert steward.aim(serve).finish_target == 37
    assert steward.num_breach_events == 1
    carry_out(steward, Event.REASSESS, replace(evaluated, evaluating=False))
    assert steward.aim(serve).finish_target == 150


def test_expected_tokens_are_experience_once_there_is_some() -> None:
    """Of all that has finished, not of what did since the last decision."""
    keep = Keep("so")
    steward = steward_of(Serve("small", 4, FULL, "go"), keep, keep, keep, watching=Watching(20))
    carry_out(steward, Event.START)
    assert shown_to(steward).expected_tokens == 20 * steward.room.expected_output_tokens
    carry_out(steward, view=replace(NOTHING_YET, num_tokens=15))
    assert shown_to(steward).expected_tokens == 20 * steward.room.expected_output_tokens
    for tokens, finished in ((90, 3), (100, 4)):
        carry_out(steward, view=replace(NOTHING_YET, num_tokens=tokens, num_finished=finished))
        assert shown_to(steward).expected_tokens == 20 * tokens / finished


def test_a_policy_that_never_reassesses_expects_a_usual_round() -> None:
    steward = steward_of(Serve("small", 4, FULL, "go"), watching=Watching(None))
    carry_out(steward, Event.START)
    usual = USUAL_REASSESS_REQUESTS * steward.room.expected_output_tokens
    assert shown_to(steward).expected_tokens == usual


def test_a_switch_is_another_model_served_whatever_was_evaluated_between() -> None:
    steward = steward_of(
        Serve("small", 4, FULL, "go"),
        Evaluate("large", 2, FULL, "see"),
        Serve("small", 2, FULL, "the same"),
        Evaluate("large", 2, FULL, "see"),
        Serve("large", 8, FULL, "another"),
    )
    switches = []
    for asked_s in range(0, 50, 10):
        carry_out(steward, view=replace(NOTHING_YET, now_s=float(asked_s)), ready_s=asked_s + 1.0)
        switches.append(steward.num_switches)
    assert switches == [0, 0, 0, 0, 1]
    assert (steward.num_loads, steward.num_evaluations) == (0, 2)
    assert steward.switch_time_s == 3.0


def test_weights_are_booked_by_the_time_they_were_held() -> None:
    steward = steward_of()
    small, large = Assignment("small", 4, FULL), Assignment("large", 2, FULL)
    steward.take_up(small, 100, 2.0)
    assert steward.peak_weight_bytes == 100
    steward.stage(30)
    steward.take_up(large, 40, 5.0)
    steward.take_up(small, 100, 9.0)
    steward.close(10.0)
    assert steward.depth_seconds == {"small@4": 4.0, "large@2": 4.0}
    assert math.isclose(steward.weight_byte_seconds, 100 * 4.0 + 40 * 4.0)
    assert steward.peak_weight_bytes == 130


def test_a_depth_is_what_stands_behind_the_last_at_of_its_name() -> None:
    assert held_by("mine@home@12") == ("mine@home", 12)
