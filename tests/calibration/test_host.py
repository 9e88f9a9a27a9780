"""The real host does what the simulated replica does, decision by decision and token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import ClassVar

import numpy as np
import pytest

from calibration.measuring.meters import NoMeter
from calibration.serving.batching import HotRules
from calibration.serving.energy import RunEnergy
from calibration.serving.host import Host, NoRoomBeside, lives_of
from calibration.serving.iteration import split_pays
from calibration.serving.record import totals
from calibration.serving.tally import Sample, Tally, gap_counts
from helios_sim import cost
from helios_sim.errors import InputError
from helios_sim.loop.state import TIMELINE_CAPACITY, itl_edges
from helios_sim.policy import Controller, read_snapshots
from helios_sim.policy.baselines import EeSingle
from helios_sim.policy.contract import (
    Assignment,
    Decision,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Serve,
    Slo,
    Snapshot,
    Switch,
    Watching,
)
from helios_sim.policy.helios import Helios
from helios_sim.runs.laws import check_run
from helios_sim.runs.metrics import summarise
from tests.calibration.clockwork import (
    Clockwork,
    ClockworkHost,
    ClockworkMachine,
    ClockworkTransfer,
    ClockworkWeights,
    serve_by_clockwork,
)
from tests.engine.factories import (
    DOMAINS,
    drifting_requests,
    drifting_setup,
    graph_models,
    padding_models,
    play,
    play_policy,
    policy_of,
    profile_of,
    requests_of,
    thumbnail,
)

POLICIES = [
    ("vanilla", {}),
    ("ee-single", {"exit_mode": "wait"}),
    ("ee-single", {"exit_mode": "solo"}),
    ("ee-single", {"exit_mode": "rebatch"}),
    ("static-depth", {"model": "large", "depth": 4}),
    ("helios", {}),
    ("helios", {"window_kind": "sliding"}),
    ("helios", {"overhead_rule": "transfer"}),
    ("always", {}),
    ("never", {}),
]
SERVING = [
    {},
    {"batching": "static"},
    {"on_change": "recompute"},
    {"skipped_kv": "recomputed"},
    {"max_batch": 3, "max_held": 4},
    {"overlap_loads": False, "max_prefill_tokens": 20, "watermark": 0.1},
]


def comparable(host: ClockworkHost, run, frame) -> None:
    """The host's requests and decisions are the simulator's, to the last bit."""
    lives = host.lives
    sums = host.tally.request_sums(len(lives))
    columns = {
        "arrival_s": [life.arrival_s for life in lives],
        "admitted_s": [life.admitted_s for life in lives],
        "first_token_s": [life.first_token_s for life in lives],
        "finished_s": [life.finished_s for life in lives],
        "status": [life.status for life in lives],
        "generated_tokens": [life.generated for life in lives],
        "evaluated": [life.evaluated for life in lives],
        "model": [life.model for life in lives],
        "depth": [life.depth for life in lives],
        "num_preemptions": [life.num_preemptions for life in lives],
        "decoded_tokens": sums.decoded,
        "executed_layers": sums.executed_layers,
        "breaches": sums.breaches,
        "nll_nats": [units / 1024 for units in sums.nll_units],
    }
    for name, column in columns.items():
        assert column == frame[name].to_list(), name
    assert len(host.decisions) == len(run.decisions)
    told = read_snapshots([0] * len(run.decisions), [one.snapshot for one in run.decisions])
    for mine, simulated, snapshot in zip(host.decisions, run.decisions, told, strict=True):
        assert (mine.time_s, mine.event, mine.decision, mine.assignment) == (
            simulated.time_s,
            simulated.event,
            simulated.decision,
            simulated.assignment,
        )
        assert mine.moved_bytes == simulated.moved_bytes
        assert mine.ready_s == simulated.ready_s
        assert seen(mine.snapshot) == seen(snapshot)


def seen(snapshot):
    """A snapshot without what rests on a meter and on the order in which seconds are summed."""

    def plain(telemetry):
        duration_s = round(telemetry.duration_s, 9)
        return replace(telemetry, energy_j=0.0, idle_energy_j=0.0, duration_s=duration_s)

    return replace(
        snapshot,
        telemetry=plain(snapshot.telemetry) if snapshot.telemetry else None,
        history={name: tuple(map(plain, rows)) for name, rows in snapshot.history.items()},
    )


@pytest.mark.parametrize("serving", SERVING, ids=lambda s: " ".join(map(str, s.values())) or "-")
@pytest.mark.parametrize(("use", "options"), POLICIES, ids=lambda o: str(o))
def test_the_host_takes_the_simulators_decisions_at_its_times(use, options, serving) -> None:
    if serving.get("skipped_kv") == "recomputed" and options.get("exit_mode") == "rebatch":
        pytest.skip("recomputed KV does not go with rebatching")
    setup = drifting_setup(**serving)
    requests = drifting_requests(120)
    run, data = play(setup, requests, use, **options)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of(use, **options))
    comparable(host, run, data.requests)
    totals = data.totals
    tally, steward = host.tally, host.steward
    assert host.end_s == totals.end_s
    for mine, simulated in (
        (tally.spent_s["busy"], totals.busy_s),
        (tally.spent_s["idle"], totals.idle_s),
        (tally.spent_s["load"], totals.load_s),
        (tally.drain_s, totals.drain_s),
        (steward.switch_time_s, totals.switch_time_s),
        (tally.batch_seconds, totals.batch_seconds),
        (tally.decode_s, totals.decode_s),
        (sum(tally.gaps_s), totals.itl_sum_s),
        (steward.weight_byte_seconds / host.end_s, totals.mean_weight_bytes),
    ):
        assert mine == pytest.approx(simulated, rel=1e-9, abs=1e-9)
    assert tally.decode_rows == totals.decode_rows
    assert tally.num_decode_iterations == totals.num_decode_iterations
    assert tally.num_iterations == totals.num_iterations
    assert {name: tuple(counts) for name, counts in tally.exit_counts.items()} == (
        totals.exit_counts
    )
    assert (steward.num_switches, steward.num_loads, steward.num_evaluations) == (
        totals.num_switches,
        totals.num_loads,
        totals.num_evaluations,
    )
    assert host.batch.max_running == totals.max_running
    assert steward.peak_weight_bytes == totals.peak_weight_bytes


@pytest.mark.parametrize(
    "serving",
    [{}, {"batching": "static"}, {"skipped_kv": "recomputed"}],
    ids=lambda s: " ".join(map(str, s.values())) or "-",
)
@pytest.mark.parametrize(("use", "options"), POLICIES, ids=lambda o: str(o))
@pytest.mark.parametrize("models", [padding_models, graph_models])
def test_both_charge_alike_what_a_profile_may_add(models, use, options, serving) -> None:
    """Padding, rows and prompts, loaded depth; graphs where they are first wanted."""
    if serving.get("skipped_kv") == "recomputed" and options.get("exit_mode") == "rebatch":
        pytest.skip("recomputed KV does not go with rebatching")
    setup = drifting_setup(profile=models(), **serving)
    requests = drifting_requests(120)
    run, data = play(setup, requests, use, **options)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of(use, **options))
    comparable(host, run, data.requests)
    assert host.end_s == data.totals.end_s
    plain, _ = play(drifting_setup(**serving), requests, use, **options)
    assert plain.world.replicas[0].energy_j != run.world.replicas[0].energy_j
    captured = [entry.outcome.captured.graphs for entry in host.tally.iterations]
    assert any(captured) == (models is graph_models)


def test_no_time_is_drained_where_weights_arrive_between_an_iteration_and_the_look_at_them(
    monkeypatch,
) -> None:
    class Late(ClockworkTransfer):
        def done(self) -> bool:
            arrived = super().done()
            if arrived:
                self.clock.time_s += 0.25
                self.arrived_s = self.clock.time_s
            return arrived

    monkeypatch.setattr("tests.calibration.clockwork.ClockworkTransfer", Late)
    setup = drifting_setup(on_change="recompute")
    host = serve_by_clockwork(setup, setup.traces, drifting_requests(120), policy_of("always"))
    assert host.steward.num_switches > 0
    assert host.tally.drain_s == 0.0


class NoRoom(ClockworkTransfer):
    """Half way there is no more memory."""

    def done(self) -> bool:
        if self.clock.time_s >= self.arrived_s / 2:
            raise NoRoomBeside("The device is full.")
        return False


@pytest.mark.parametrize("found", ["before the load", "on the way"])
def test_where_the_device_has_no_room_for_both_serving_waits_and_loads_are_counted(
    found, monkeypatch
) -> None:
    """The blocks that are free are memory of the pool, which the simulator lends to weights."""
    setup = drifting_setup()
    requests = drifting_requests(120)
    overlapped = serve_by_clockwork(setup, setup.traces, requests, policy_of("always"))
    assert overlapped.num_loads_waited_for == 0
    if found == "before the load":
        monkeypatch.setattr(ClockworkWeights, "fits_beside", lambda *_: False)
    else:
        monkeypatch.setattr("tests.calibration.clockwork.ClockworkTransfer", NoRoom)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of("always"))
    assert host.num_loads_waited_for > 0
    assert {life.status for life in host.lives} == {"finished"}
    held = [name.split("@") for name in host.steward.depth_seconds]
    models = {name: setup.profile.model(name).model for name, _ in held}
    bytes_held = [models[name].weight_bytes(int(depth)) for name, depth in held]
    assert host.steward.peak_weight_bytes == max(bytes_held)


def test_a_model_may_have_an_at_sign_in_its_name() -> None:
    profile = profile_of(thumbnail("small@main", (2, 4)), thumbnail("large@v2", (2, 4, 8)))
    setup, requests = drifting_setup(profile=profile), drifting_requests(60)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of("always"))
    _, ours = play(setup, requests, "always")
    told = totals(host, requests, RunEnergy(NoMeter("none")))
    assert told.max_batch_size_supported == ours.totals.max_batch_size_supported
    assert told.depth_seconds == ours.totals.depth_seconds


@pytest.mark.parametrize(
    ("use", "options", "serving"),
    [
        ("helios", {"breach_limit": 4}, {"max_batch": 3}),
        ("helios", {"breach_limit": 4}, {"on_change": "recompute"}),
        ("ee-single", {"exit_mode": "rebatch"}, {}),
    ],
)
def test_both_add_a_run_up_alike(use, options, serving) -> None:
    """Every total but joules, which take a meter, and what bounds layers, which is simulated."""
    setup, requests = drifting_setup(**serving), drifting_requests(120, rate_per_s=3.0)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of(use, **options))
    _, data = play(setup, requests, use, **options)
    told, ours = asdict(totals(host, requests, RunEnergy(NoMeter("none")))), asdict(data.totals)
    for name in ("energy_j", "energy_idle_j", "energy_load_j", "regime_s"):
        del told[name], ours[name]
    assert 0.0 < ours["mean_kv_use"] < 1.0
    assert ours["idle_s"] > 0.0
    for name, value in ours.items():
        # Sums are taken in another order.
        rough = isinstance(value, float) or name == "depth_seconds"
        assert told[name] == (pytest.approx(value, rel=1e-9) if rough else value), name


def test_the_time_to_build_a_machine_is_that_of_the_assignment_before(monkeypatch) -> None:
    """As all of loading is in the simulator; the first has nothing before it."""

    class Slow(ClockworkWeights):
        def take_up(self, *wanted) -> ClockworkMachine:
            self.clock.time_s += 5.0
            return super().take_up(*wanted)

    monkeypatch.setattr("tests.calibration.clockwork.ClockworkWeights", Slow)
    setup = drifting_setup(overlap_loads=False)
    host = serve_by_clockwork(setup, setup.traces, drifting_requests(60), Deeper())
    first, second = host.decisions[:2]
    held = host.steward.depth_seconds
    shallow, deep = held
    assert held[shallow] == pytest.approx(second.ready_s - first.ready_s)
    assert held[deep] == pytest.approx(host.end_s - second.ready_s)


def test_a_closed_loop_sends_its_users_next_requests_at_the_simulators_times() -> None:
    setup = drifting_setup()
    requests = drifting_requests(80, num_users=6)
    run, data = play(setup, requests, "helios")
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of("helios"))
    comparable(host, run, data.requests)


def test_requests_that_never_fit_are_refused_as_in_the_simulator() -> None:
    setup = drifting_setup(fleet={"memory_bytes": 25_000})
    requests = drifting_requests(60, max_prompt=80)
    run, data = play(setup, requests, "ee-single", exit_mode="wait")
    host = serve_by_clockwork(
        setup, setup.traces, requests, policy_of("ee-single", exit_mode="wait")
    )
    comparable(host, run, data.requests)
    assert any(life.status == "refused" for life in host.lives)
    assert any(life.num_preemptions for life in host.lives)


class Deeper:
    """Begins with few layers and soon loads them all, which leaves a smaller pool."""

    name = "deeper"
    sees_future = False
    confidence_threshold = None
    watching = Watching(reassess_requests=3)

    def decide(self, snapshot: Snapshot) -> Decision:
        model, now = snapshot.candidates[-1], snapshot.assignment
        if now is None:
            return Serve(model.name, model.exit_layers[0], ExitMode.LOADED_DEPTH, "Few layers.")
        if now.depth < model.num_layers:
            return LoadLayers(model.num_layers, ExitMode.LOADED_DEPTH, "All layers.")
        return Keep("There are no more.")


def test_a_preempted_request_that_no_longer_fits_is_refused_in_both_and_keeps_its_tokens() -> None:
    setup = drifting_setup(on_change="recompute", fleet={"memory_bytes": 25_000})
    requests = drifting_requests(60, rate_per_s=30.0)
    run, data = play_policy(setup, requests, Deeper)
    host = serve_by_clockwork(setup, setup.traces, requests, Deeper())
    comparable(host, run, data.requests)
    late = [life for life in host.lives if life.status == "refused" and life.emitted]
    assert late
    assert all(life.num_preemptions and life.model == "large" for life in late)
    check_run(data)
    assert summarise(data)["num_refused"] >= len(late)


class Grower:
    """Switches to all of the large model once a request has finished."""

    name = "grower"
    sees_future = False
    confidence_threshold = None
    watching = Watching(reassess_requests=1)

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.assignment is None:
            return Serve("small", 4, ExitMode.LOADED_DEPTH, "It is small.")
        if snapshot.assignment.model == "small":
            return Switch("large", 8, ExitMode.LOADED_DEPTH, "There is time now.")
        return Keep("There is nothing larger.")


def test_a_drain_is_over_in_both_when_the_last_row_makes_room_for_weights() -> None:
    """Of 23 blocks the weights take 17 until they run; the second request needs a seventh.

    It waits until the switch is over, and not for the third request.
    """
    setup = drifting_setup(fleet={"memory_bytes": 21_000, "memory_utilisation": 1.0})
    requests = requests_of([0.0, 0.0, 100.0], [4, 4, 4], [2, 24, 2], domains=DOMAINS)
    run, data = play_policy(setup, requests, Grower)
    host = serve_by_clockwork(setup, setup.traces, requests, Grower())
    comparable(host, run, data.requests)
    assert host.num_loads_waited_for == 0
    assert data.requests["num_preemptions"].to_list() == [0, 1, 0]
    assert data.requests["model"].to_list() == ["small", "large", "large"]
    assert run.decisions[1].ready_s < data.requests["finished_s"][1] < 10.0
    check_run(data)


class Content:
    """Keeps half a model, whatever it hears of every breach and of every request that ends."""

    name = "content"
    sees_future = False
    confidence_threshold = None
    watching = Watching(reassess_requests=1, breach_window_tokens=1, breach_limit=0)

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.assignment is None:
            return Serve("large", 4, ExitMode.LOADED_DEPTH, "Half of it.")
        return Keep("It will do.")


def test_a_breach_is_told_in_the_period_in_which_it_happened_in_both() -> None:
    """Where a request ends with a breach, both are told at once, and the breach not once more."""
    setup = drifting_setup()
    requests = drifting_requests(60, max_output=4)
    run, data = play_policy(setup, requests, Content)
    host = serve_by_clockwork(setup, setup.traces, requests, Content())
    comparable(host, run, data.requests)
    told = [one.snapshot for one in host.decisions if one.snapshot.telemetry]
    breaches = {event: [] for event in Event}
    for snapshot in told:
        breaches[snapshot.event].append(snapshot.telemetry.num_breaches)
    assert any(breaches[Event.REASSESS])
    assert breaches[Event.BREACHED]
    assert all(breaches[Event.BREACHED])


def whoever_comes(num_running, max_batch, needed_blocks, free_blocks, watermark_blocks):
    """Looks at nothing that a replica has, and uses what numba cannot compile."""
    return bool({"anybody": True}.get("anybody", needed_blocks))


@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
@pytest.mark.parametrize(
    ("serving", "options"),
    [
        ({"max_batch": 3}, {"exit_mode": "wait"}),
        ({"max_batch": 3, "max_held": 4}, {"exit_mode": "rebatch"}),
        ({"max_batch": 3, "batching": "static"}, {"exit_mode": "wait"}),
        ({"fleet": {"memory_bytes": 25_000}}, {"exit_mode": "rebatch"}),
        ({}, {"exit_mode": "solo"}),
    ],
    ids=["batch", "held", "static", "blocks", "solo"],
)
def test_a_rule_that_admits_whoever_comes_fills_what_there_is_in_both_and_no_more(
    serving, options
) -> None:
    class Open(EeSingle):
        hot_rules: ClassVar = {"may_join": whoever_comes}

    setup = drifting_setup(**serving)
    requests = drifting_requests(40, rate_per_s=60.0)
    run, data = play_policy(setup, requests, lambda: Open(**options))
    host = serve_by_clockwork(setup, setup.traces, requests, Open(**options))
    comparable(host, run, data.requests)
    check_run(data)
    mode, most = options["exit_mode"], setup.serving.max_batch + setup.serving.max_held
    assert host.batch.max_running == data.totals.max_running
    assert data.totals.max_running <= (1 if mode == "solo" else most)
    if "max_batch" in serving and mode != "rebatch":
        assert data.totals.max_running == setup.serving.max_batch


def refuses_a_third(num_running, max_batch, needed_blocks, free_blocks, watermark_blocks):
    if num_running > 1:
        raise LookupError(f"no row for the third of {max_batch}")
    return {True: True}[needed_blocks <= free_blocks]


def knows_no_exit(confidence, threshold):
    return {}[confidence]


def tells_two(num_seen, num_breaches, breached, window_tokens, breach_limit):
    return {0: (num_seen + 1, num_breaches)}[0]


@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
@pytest.mark.parametrize(
    ("name", "rule", "said"),
    [
        ("may_join", refuses_a_third, "LookupError: no row for the third of 8, test_host.py line"),
        ("leaves_here", knows_no_exit, "KeyError: "),
        ("watch_tumbling", tells_two, "ValueError: not enough values"),
    ],
)
def test_what_a_hot_rule_raises_is_told_in_one_sentence_by_both(name, rule, said) -> None:
    class Failing(Helios):
        hot_rules: ClassVar = {name: rule}

    setup = drifting_setup()
    requests = drifting_requests(20, rate_per_s=60.0)
    sentence = f"Policy 'helios' failed in its hot rule '{name}': {said}.*shows the way there"
    with pytest.raises(InputError, match=sentence):
        play_policy(setup, requests, Failing)
    with pytest.raises(InputError, match=sentence):
        serve_by_clockwork(setup, setup.traces, requests, Failing())


@dataclass
class Watcher:
    """Serves one assignment throughout, whatever it hears of breaches."""

    assignment: Assignment
    name: ClassVar = "watcher"
    sees_future: ClassVar = False
    confidence_threshold: ClassVar = None
    watching: ClassVar = Watching(
        reassess_requests=20, breach_window_tokens=9, breach_limit=4, window_kind="sliding"
    )

    def decide(self, snapshot: Snapshot) -> Decision:
        if snapshot.assignment is None:
            to = self.assignment
            return Serve(to.model, to.depth, to.exit_mode, "It is what to watch.")
        return Keep("There is nothing to do but to watch.")


def nearly(confidence, threshold, at_full_depth):
    """Also of tokens that are confident, but not by much; a table keeps it from being compiled."""
    return {True: not at_full_depth}.get(confidence < threshold + 0.2, False)


def anywhere(confidence, threshold, at_full_depth):
    """At full depth like everywhere else."""
    return {True: True}.get(confidence < threshold, False)


def every_second(ring, num_seen, num_breaches, breached, breach_limit):
    """Looks at tokens alone, of which it counts every second one."""
    return {0: (num_seen + 1, num_breaches, num_seen % 16 == 15)}[0]


@pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")
@pytest.mark.parametrize(
    ("depth", "mode"),
    [(8, "full"), *product((4, 8), ("loaded-depth", "solo", "wait", "rebatch"))],
)
@pytest.mark.parametrize(
    "own",
    [{"is_breach": nearly}, {"is_breach": anywhere}, {"watch_sliding": every_second}],
    ids=lambda own: next(iter(own.values())).__name__,
)
def test_a_policys_own_rules_see_and_count_the_same_breaches_in_both(own, depth, mode) -> None:
    """Only those at the loaded depth, full depth included, by request as by window."""

    class Own(Watcher):
        hot_rules: ClassVar = own

    assignment = Assignment("large", depth, ExitMode(mode))
    setup = drifting_setup()
    requests = drifting_requests(40, rate_per_s=30.0)
    run, data = play_policy(setup, requests, lambda: Own(assignment))
    host = serve_by_clockwork(setup, setup.traces, requests, Own(assignment))
    comparable(host, run, data.requests)
    counted = int(run.world.replicas[0].num_breaches)
    assert counted == host.tally.num_breaches == data.requests["breaches"].sum()
    check_run(data)
    if "is_breach" in own:
        assert (counted > 0) == (own["is_breach"] is anywhere or depth < 8)
    if "watch_sliding" in own:
        assert any(entry.event is Event.BREACHED for entry in host.decisions)


def test_rebatching_that_a_policy_decides_on_is_refused_by_both_where_kv_is_recomputed() -> None:
    """In the words in which a scenario is refused whose policy is told to."""

    class Splitting(Deeper):
        def decide(self, snapshot: Snapshot) -> Decision:
            return Serve(snapshot.candidates[0].name, 2, ExitMode.REBATCH, "It pays.")

    setup = drifting_setup(skipped_kv="recomputed")
    requests = drifting_requests(10)
    sentence = (
        "serving.skipped_kv: skipped_kv is \"recomputed\" but policy 'deeper' has decided Serve "
        'with exit_mode "rebatch", which fills the KV of those who leave; '
        'use skipped_kv = "filled"\\.'
    )
    with pytest.raises(InputError, match=sentence):
        play_policy(setup, requests, Splitting)
    with pytest.raises(InputError, match=sentence):
        serve_by_clockwork(setup, setup.traces, requests, Splitting())


def test_recorded_telemetry_gives_the_same_decisions_in_a_fresh_controller() -> None:
    setup = drifting_setup()
    requests = drifting_requests(160)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of("helios"))
    controller = Controller(policy_of("helios"), tuple(host.steward.cards.values()))
    assert len(host.decisions) > 10
    for entry in host.decisions:
        seen_then = entry.snapshot
        decision, snapshot = controller.consult(
            now_s=seen_then.now_s,
            event=seen_then.event,
            assignment=seen_then.assignment,
            telemetry=seen_then.telemetry,
            load_s=seen_then.load_s,
            num_waiting=seen_then.num_waiting,
            num_running=seen_then.num_running,
            max_batch=seen_then.max_batch,
            expected_tokens=seen_then.expected_tokens,
            slo=seen_then.slo,
        )
        assert decision == entry.decision
        assert snapshot == seen_then


def test_all_events_are_asked_for() -> None:
    setup = drifting_setup()
    host = serve_by_clockwork(
        setup, setup.traces, drifting_requests(240), policy_of("helios", breach_limit=4)
    )
    assert {entry.event for entry in host.decisions} == set(Event)


def host_of(use: str, drawn_j=None, **serving) -> Host:
    setup = drifting_setup(**serving)
    requests = drifting_requests(4)
    clock = Clockwork()
    return Host(
        room=setup,
        policy=policy_of(use) if isinstance(use, str) else use,
        slo=Slo(),
        lives=lives_of(requests, [[]] * 4),
        weights=ClockworkWeights(setup, setup.traces, requests, clock),
        clock=clock,
        timeline_interval_s=1.0,
        drawn_j=drawn_j,
    )


def test_a_policy_that_knows_the_future_is_refused() -> None:
    with pytest.raises(InputError, match="real backend does not"):
        host_of("clairvoyant")


def test_a_choice_by_energy_is_refused_without_a_meter_and_reads_it_otherwise() -> None:
    by_energy = policy_of("helios", objective="energy")
    with pytest.raises(InputError, match="no energy meter"):
        host_of(by_energy)
    host = host_of(by_energy, drawn_j=lambda spans, most_w: 5.0 * len(spans))
    host.play()
    told = [one.snapshot.telemetry for one in host.decisions if one.snapshot.telemetry]
    assert told
    assert all(telemetry.energy_j == 5.0 for telemetry in told)


def test_a_choice_by_energy_goes_by_the_cards_where_the_meter_stops_answering() -> None:
    host = host_of(policy_of("helios", objective="energy"), drawn_j=lambda spans, most_w: None)
    host.play()
    told = [one.snapshot.telemetry for one in host.decisions if one.snapshot.telemetry]
    assert told
    assert {(seen.energy_j, seen.working_energy_j) for seen in told} == {(None, None)}


def test_both_tell_alike_what_was_drawn_while_no_request_was_there() -> None:
    setup = drifting_setup()
    requests = drifting_requests(60, rate_per_s=0.2)
    run, _ = play(setup, requests, "helios", reassess_requests=20)
    host = serve_by_clockwork(
        setup,
        setup.traces,
        requests,
        policy_of("helios", reassess_requests=20),
        drawn_j=lambda spans, most_w: 50.0 * sum(stop_s - start_s for start_s, stop_s in spans),
    )
    assert setup.profile.device.idle_w == 50.0
    told = [
        [seen.telemetry.idle_energy_j for seen in logged if seen.telemetry]
        for logged in (
            [one.snapshot for one in host.decisions],
            read_snapshots([0] * len(run.decisions), [one.snapshot for one in run.decisions]),
        )
    ]
    assert told[0] == pytest.approx(told[1])
    assert max(told[0]) > 100.0


def test_gaps_are_counted_in_bins_about_one_percent_wide() -> None:
    edges, gaps = itl_edges(), [0.0, 1e-9, 0.01, 0.0101, 5.0, 1e9]
    counts = gap_counts(gaps)
    assert len(edges) == len(counts) + 1
    assert sum(counts) == len(gaps)
    place = int(np.searchsorted(edges, 5.0, side="right")) - 1
    assert counts[place] == 1
    assert edges[place + 1] / edges[place] < 1.02
    assert gap_counts([]) == (0,) * len(counts)


def test_both_show_alike_who_waits_while_weights_are_loaded_and_behind_an_iteration() -> None:
    setup = drifting_setup(timeline_interval_s=1e-3, max_batch=2)
    requests = drifting_requests(60, rate_per_s=40.0)
    _, data = play(setup, requests, "helios", breach_limit=4)
    host = serve_by_clockwork(
        setup,
        setup.traces,
        requests,
        policy_of("helios", breach_limit=4),
        timeline_interval_s=1e-3,
    )
    simulated = data.timeline.select("time_s", "waiting").rows()
    served = [(line.time_s, line.waiting) for line in host.tally.samples]
    assert any(waiting for _, waiting in simulated)
    assert set(simulated) <= set(served)


def test_the_timeline_halves_its_resolution_when_it_is_full() -> None:
    tally = Tally(timeline_interval_s=1.0)
    for second in range(TIMELINE_CAPACITY + 10):
        tally.sample(Sample(float(second), 0.0, 0, 0, 0, 0, 0, "", 0, "idle"))
    assert len(tally.samples) == TIMELINE_CAPACITY // 2 + 10
    assert tally.timeline_interval_s == 2.0
    assert tally.samples[0].time_s == 1.0


def test_a_split_is_weighed_with_the_times_that_the_profile_predicts() -> None:
    """Of three rows, computed as four and half as long again, one would leave at the first exit.

    Its skipped layers are filled beside the shallow pass; the deep one is of rows that go on.
    """
    told: list[tuple[float, ...]] = []

    def pays(*asked: float) -> bool:
        told.append(asked)
        return True

    rules = replace(HotRules.of(policy_of("vanilla")), rebatch_pays=pays)
    costs = {"rebatch.overhead_s": 0.25, "rebatch.overhead_s_per_row": 0.5}
    model = thumbnail(exit_layers=(1, 2, 4), buckets=(1, 4), residual=((3.0, 1.5),), costs=costs)
    assert split_pays(model, rules, 2, 4)(1, 3, 0, 0, 30, 12)
    c = model.coefficient_array()
    layer_s = 1.5 * cost.layer_seconds(c, 4.0, 30.0, 4 * 12.0, 0.0, 0.0, 0.0)[0]
    begin_s, check_s = cost.begin_seconds(c), cost.check_seconds(c, 3.0)
    here_s = begin_s + layer_s + check_s
    rest_s = 3 * layer_s + check_s + cost.head_seconds(c, 3.0)
    shallow_s = here_s + cost.kv_fill_seconds(c, 1.0, 3.0)
    deep_s = begin_s + (0.25 + 3 * 0.5) + rest_s
    (asked,) = told
    assert asked == pytest.approx((1, 3, shallow_s, deep_s, here_s + rest_s))
