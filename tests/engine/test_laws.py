"""The laws of the simulated world: what holds whatever the policy, the workload and the seed."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from helios_sim import cost, engine
from helios_sim.cards import candidate_card
from helios_sim.engine import Replica, Run, Setup, decided
from helios_sim.exits import ExitTraces
from helios_sim.loop import batch
from helios_sim.loop.memory import blocks_for, used_blocks
from helios_sim.loop.rows import row_blocks
from helios_sim.loop.state import AT_HORIZON, FINISHED, REFUSED, RUNNING, UNSENT, WAITING
from helios_sim.outcome import run_data
from helios_sim.policy.contract import Evaluate, ExitMode, Keep, Watching
from helios_sim.policy.controller import Controller
from helios_sim.policy.objective import slowdown
from helios_sim.policy.registry import make_policy, policy_names
from helios_sim.policy.snapshot_json import read_snapshots
from helios_sim.profile import Link, Profile
from helios_sim.runs.laws import check_run
from helios_sim.runs.records import RunData, write_run
from helios_sim.streams import stream
from helios_sim.workload.requests import Requests, WorkloadSettings, generate
from helios_sim.workload.trace import TraceSettings
from tests.engine.factories import (
    DOMAINS,
    QUICK,
    at_memory,
    both_models,
    drifting_requests,
    drifting_setup,
    drifting_traces,
    graph_models,
    padding_models,
    play,
    play_policy,
    policy_of,
    profile_of,
    requests_of,
    setup_of,
    snapshots_of,
    thumbnail,
    traces_from,
)
from tests.worlds import inbox_of, linked

WORLDS: dict[str, dict[str, Any]] = {
    "one replica": {},
    "recompute, no overlap": {"on_change": "recompute", "overlap_loads": False},
    "chunked, least outstanding": {
        "batching": "chunked",
        "fleet": {"num_replicas": 3, "router": "least-outstanding", "replicas_per_host": 2},
    },
    "static, least kv": {
        "batching": "static",
        "fleet": {"num_replicas": 2, "router": "least-kv"},
    },
    "tight memory, recomputed kv": {
        "skipped_kv": "recomputed",
        "on_change": "recompute",
        "profile": both_models(memory_bytes=17_000),
        "fleet": {"num_replicas": 2, "router": "random"},
    },
}
"""Setups that differ in everything a host may choose."""

world = pytest.mark.parametrize("world", WORLDS)


def setup_in(world: str, **changes: Any) -> Setup:
    return drifting_setup(**(WORLDS[world] | changes))


def check_books(w: Any) -> None:
    """Every request is in one place, every block in one hand."""
    status = w.requests["status"]
    listed = 0
    for r, rep in enumerate(w.replicas):
        queue, inbox = linked(w.requests, int(rep.waiting_head)), inbox_of(w.requests, rep)
        assert (len(queue), len(inbox)) == (int(rep.num_waiting), int(rep.num_inbox))
        to_prefill = w.requests["prompt"] + w.requests["generated"]
        needed = (blocks_for(int(to_prefill[i]), int(rep.block_tokens)) for i in queue + inbox)
        assert sum(needed) == rep.queued_blocks
        rows = [w.rows[r, w.order[r, k]] for k in range(rep.num_rows)]
        assert all(status[row.request] == RUNNING for row in rows)
        listed += len(queue) + len(rows)
        held = sum(int(row_blocks(rep, row)) for row in rows if row.chunk == 0)
        assert min(rep.free_blocks, rep.staged_blocks, used_blocks(rep)) >= 0
        assert used_blocks(rep) >= held
    assert listed == int(np.isin(status, (WAITING, RUNNING)).sum())
    assert int(w.replicas["num_finished"].sum()) == int((status == FINISHED).sum())
    assert int(w.replicas["num_refused"].sum()) == int((status == REFUSED).sum())
    places = np.isin(status, (UNSENT, WAITING, RUNNING, FINISHED, REFUSED))
    assert bool(places.all())


def all_bytes(data: RunData, folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a run."""
    target = write_run(data, {}, folder)
    return {path.name: path.read_bytes() for path in sorted(target.iterdir())}


def span_of(intervals: list[tuple[float, float]]) -> float:
    """Length of a union of intervals."""
    total, reached = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def play_sliced(setup: Setup, requests: Requests, use: str, slice_s: float) -> RunData:
    run = Run(setup, requests, lambda: make_policy(use, QUICK))
    run.slice_s = slice_s
    run.play()
    return run_data(run, use, use, setup.seed, {})


def watch_every_advance(monkeypatch: pytest.MonkeyPatch, instead: Any) -> None:
    """Put a function in the place of `advance`, for the engine and for the router."""
    monkeypatch.setattr(batch, "advance", instead)
    for router in ("route", "carry_on"):
        monkeypatch.setattr(batch, router, getattr(batch, router).py_func)


@world
def test_at_every_cut_each_request_is_in_one_place_and_each_block_in_one_hand(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, num_checks = batch.advance, 0

    def checked(w: Any, r: int, horizon_s: float) -> int:
        nonlocal num_checks
        cause = advance(w, r, horizon_s)
        check_books(w)
        num_checks += 1
        return int(cause)

    watch_every_advance(monkeypatch, checked)
    data = play_sliced(setup_in(world), drifting_requests(150), "helios", 0.1)
    assert num_checks > 150
    ended = data.requests["status"].is_in(["finished", "refused"])
    assert bool(ended.all())
    check_run(data)


@world
def test_at_every_decision_each_request_is_in_one_place(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Replica.ask

    def checked(self: Replica, event: Any) -> Any:
        check_books(self.run.world)
        entry = ask(self, event)
        check_books(self.run.world)
        return entry

    monkeypatch.setattr(Replica, "ask", checked)
    run, _ = play(setup_in(world), drifting_requests(150))
    assert len(run.decisions) > 5


@world
@pytest.mark.parametrize("use", ["helios", "always", "ee-single"])
def test_nothing_happens_before_its_cause(world: str, use: str) -> None:
    run, data = play(setup_in(world), drifting_requests(150), use)
    requests = data.requests.filter(pl.col("status") == "finished")
    for before, after in pairwise(("arrival_s", "admitted_s", "first_token_s", "finished_s")):
        assert bool((requests[before] <= requests[after]).all())
    ready = {replica.index: math.inf for replica in run.replicas}
    for entry in run.decisions:
        assert entry.ready_s is not None and entry.ready_s >= entry.time_s
        ready[entry.replica] = min(ready[entry.replica], entry.ready_s)
    for row in requests.iter_rows(named=True):
        assert row["admitted_s"] >= ready[row["replica"]]
    for replica in run.replicas:
        mine = [entry for entry in run.decisions if entry.replica == replica.index]
        assert all(first.ready_s <= second.time_s for first, second in pairwise(mine))


@world
def test_a_request_ends_under_the_assignment_in_force(world: str) -> None:
    run, data = play(setup_in(world), drifting_requests(150))
    for row in data.requests.filter(pl.col("status") == "finished").iter_rows(named=True):
        in_force = [
            entry.assignment
            for entry in run.decisions
            if entry.replica == row["replica"] and entry.ready_s < row["finished_s"]
        ][-1]
        assert (row["model"], row["depth"]) == (in_force.model, in_force.depth)


@world
def test_time_is_spent_in_iterations_idle_or_loading_and_nowhere_else(world: str) -> None:
    run, data = play(setup_in(world), drifting_requests(150))
    totals = data.totals
    spent_s = totals.busy_s + totals.idle_s + totals.load_s
    assert spent_s == pytest.approx(totals.end_s * totals.num_replicas, rel=1e-9)
    assert sum(totals.depth_seconds.values()) + min(
        entry.ready_s or 0.0 for entry in run.decisions
    ) <= totals.end_s * totals.num_replicas * (1 + 1e-9)


@world
def test_no_replica_idles_while_it_has_a_request(world: str) -> None:
    _, data = play(setup_in(world), drifting_requests(150, rate_per_s=2.0))
    occupied_s = sum(
        span_of(list(zip(mine["arrival_s"], mine["finished_s"], strict=True)))
        for _, mine in data.requests.filter(pl.col("status") == "finished").group_by("replica")
    )
    free_s = data.totals.end_s * data.totals.num_replicas - occupied_s
    assert data.totals.idle_s <= free_s + 1e-9


def test_a_policy_that_decides_once_idles_exactly_when_nobody_is_there() -> None:
    run, data = play(drifting_setup(), drifting_requests(150, rate_per_s=2.0), "vanilla")
    (entry,) = run.decisions
    lives = list(zip(data.requests["arrival_s"], data.requests["finished_s"], strict=True))
    occupied_s = span_of([(0.0, entry.ready_s or 0.0), *lives])
    assert data.totals.idle_s > 1.0
    assert data.totals.idle_s == pytest.approx(data.totals.end_s - occupied_s, rel=1e-9)


@world
def test_energy_is_the_sum_of_iterations_idling_and_loading(
    world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations are seen one by one; idling and loading are recomputed from watts and bytes."""
    advance = batch.advance
    iterations: dict[tuple[int, float], tuple[float, float]] = {}

    def step_by_step(w: Any, r: int, horizon_s: float) -> int:
        rep = w.replicas[r]
        cut_s = float(rep.now_s)
        while True:
            cut_s += 0.004
            cause = advance(w, r, min(cut_s, horizon_s))
            if rep.phase:
                start_s, end_s = float(rep.iteration_start_s), float(rep.end_s)
                iterations[r, start_s] = (end_s - start_s, float(rep.iteration_j))
            if cause != batch.AT_HORIZON or cut_s >= horizon_s:
                return int(cause)

    watch_every_advance(monkeypatch, step_by_step)
    setup = setup_in(world)
    run, data = play(setup, drifting_requests(100))
    totals, device = data.totals, setup.profile.device
    assert len(iterations) == totals.num_iterations
    assert math.fsum(s for s, _ in iterations.values()) == pytest.approx(totals.busy_s)

    in_memory: set[tuple[int, str]] = set()
    moving_s = 0.0
    for entry in decided(run.decisions):
        if entry.moved_bytes:
            name = entry.assignment.model
            place = (entry.replica // setup.fleet.replicas_per_host, name)
            if place not in in_memory:
                in_memory.add(place)
                model = setup.profile.model(name).model
                moving_s += setup.profile.loading.disk.seconds(
                    model.weight_bytes(model.shape.layers)
                )
            moving_s += setup.profile.loading.host.seconds(entry.moved_bytes)
    load_j = (device.load_w - device.idle_w) * moving_s + device.idle_w * totals.load_s
    idle_j = device.idle_w * totals.idle_s
    busy_j = math.fsum(joules for _, joules in iterations.values())
    assert totals.energy_load_j == pytest.approx(load_j)
    assert totals.energy_idle_j == pytest.approx(idle_j)
    assert totals.energy_j == pytest.approx(busy_j + idle_j + load_j)
    assert min(busy_j, idle_j, load_j, data.timeline["power_w"].min()) >= 0.0


@world
def test_the_same_scenario_and_seed_give_the_same_bytes(world: str, tmp_path: Path) -> None:
    requests = drifting_requests(150)
    first, second = (
        all_bytes(play(setup_in(world), requests)[1], tmp_path / name) for name in ("a", "b")
    )
    assert first == second


def digest() -> str:
    """One line for a run with every kind of decision: the hash of its tables and totals."""
    _, data = play(setup_in("chunked, least outstanding"), drifting_requests(150))
    tables = [
        frame.write_csv(float_precision=None)
        for frame in (data.requests, data.decisions, data.timeline)
    ]
    text = json.dumps([*tables, asdict(data.totals)])
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_a_fresh_process_gives_the_same_run_whatever_its_hash_seed(hash_seed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.engine.test_laws import digest; print(digest())"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()


@world
def test_slices_change_no_result(world: str, tmp_path: Path) -> None:
    setup, requests = setup_in(world), drifting_requests(100)
    whole = all_bytes(play_sliced(setup, requests, "helios", math.inf), tmp_path / "whole")
    for slice_s in (0.003, 0.7):
        name = str(slice_s)
        assert all_bytes(play_sliced(setup, requests, "helios", slice_s), tmp_path / name) == whole


def test_a_run_ends_where_iterations_and_pauses_outlast_its_slices() -> None:
    """Two arrivals of a thousand are far apart, or long iterations are cut into short slices."""
    setup = drifting_setup()
    for arrival_s in ([0.0, 1000.0, 1000.1], [0.0, 0.0, 0.0]):
        requests = requests_of(arrival_s, [5] * 3, [3] * 3, domains=DOMAINS)
        data = play_sliced(setup, requests, "helios", 0.05)
        assert set(data.requests["status"]) == {"finished"}


@pytest.mark.parametrize("router", ["random", "least-outstanding", "least-kv"])
def test_every_router_is_the_same_with_one_replica(router: str, tmp_path: Path) -> None:
    requests = drifting_requests(100)
    by_turns, other = (
        all_bytes(play(drifting_setup(fleet={"router": name}), requests)[1], tmp_path / name)
        for name in ("round-robin", router)
    )
    assert by_turns == other


def test_round_robin_sends_requests_by_turns() -> None:
    _, data = play(drifting_setup(fleet={"num_replicas": 3}), drifting_requests(100), "vanilla")
    assert data.requests["replica"].to_list() == [i % 3 for i in range(100)]


def test_a_router_that_draws_sends_each_replica_its_share() -> None:
    """Of 900 requests each of three has 300, within four standard deviations of them."""
    setup = drifting_setup(fleet={"num_replicas": 3, "router": "random"})
    _, data = play(setup, drifting_requests(900, rate_per_s=100.0), "vanilla")
    counts = np.bincount(data.requests["replica"].to_numpy())
    assert counts.tolist() == pytest.approx([300] * 3, abs=57)


@pytest.mark.parametrize("use", ["vanilla", "helios"])
def test_least_outstanding_sends_each_request_where_the_fewest_are(use: str) -> None:
    """Who is outstanding at an arrival follows from the records; the instant itself comes first."""
    fleet = {"num_replicas": 3, "router": "least-outstanding"}
    _, data = play(drifting_setup(fleet=fleet), drifting_requests(150, rate_per_s=15.0), use)
    replica, arrival_s, finished_s = (
        data.requests[name].to_numpy() for name in ("replica", "arrival_s", "finished_s")
    )
    for i in range(len(replica)):
        there = finished_s[:i] >= arrival_s[i]
        loads = [int((there & (replica[:i] == r)).sum()) for r in range(3)]
        assert replica[i] == loads.index(min(loads))


def test_least_kv_sends_each_request_where_the_least_of_the_pool_is_used_or_needed() -> None:
    """Ten blocks run on replica 0 and one on replica 1, which is sent the next, of fifteen.

    These are needed though they wait, so replica 0 is sent the two after it, against their number.
    """
    fleet = {"num_replicas": 2, "router": "least-kv"}
    arrival_s, prompts = [1.0, 1.0, 1.001, 1.001, 1.001], [40, 4, 60, 4, 4]
    requests = requests_of(arrival_s, prompts, [5] * 5, domains=DOMAINS)
    _, data = play(drifting_setup(fleet=fleet), requests, "vanilla")
    assert data.requests["replica"].to_list() == [0, 1, 1, 0, 0]


def test_two_arrivals_at_one_instant_see_each_other() -> None:
    """The second of two goes elsewhere, although the first has not been touched yet."""
    fleet = {"num_replicas": 2, "router": "least-outstanding"}
    requests = requests_of([1.0, 1.0, 1.0, 1.0], [5] * 4, [5] * 4, domains=DOMAINS)
    _, data = play(drifting_setup(fleet=fleet), requests, "vanilla")
    assert data.requests["replica"].to_list() == [0, 1, 0, 1]
    assert data.requests["admitted_s"].to_list() == [1.0] * 4


@pytest.mark.parametrize("router", ["round-robin", "least-outstanding"])
def test_whoever_arrives_as_an_iteration_ends_joins_the_next_one(router: str) -> None:
    """Arrivals come before iterations, also where SimPy brings them."""
    setup = drifting_setup(fleet={"num_replicas": 2, "router": router})
    alone = requests_of([1.0, 1.0], [5, 5], [5, 5], domains=DOMAINS)
    first_token_s = play(setup, alone, "vanilla")[1].requests["first_token_s"][0]
    joined = requests_of([1.0, 1.0, first_token_s], [5] * 3, [5] * 3, domains=DOMAINS)
    _, data = play(setup, joined, "vanilla")
    assert data.requests["replica"].to_list() == [0, 1, 0]
    assert data.requests["admitted_s"][2] == first_token_s


def test_who_arrives_as_weights_do_is_routed_by_what_was_there_before() -> None:
    """Arrivals come before decisions: the new pool counts from the next arrival on."""
    profile = both_models(disk=Link(1.0, 1e12), host=Link(0.5, 1e12))
    setup = drifting_setup(profile=profile, fleet={"num_replicas": 2, "router": "least-kv"})
    early = requests_of([0.5, 0.6], [8, 4], [5, 5], domains=DOMAINS)
    ready_s = play(setup, early, "vanilla")[0].decisions[0].ready_s
    requests = requests_of([0.5, 0.6, ready_s], [8, 4, 4], [5] * 3, domains=DOMAINS)
    _, data = play(setup, requests, "vanilla")
    # Without any pool yet, replica 0 is asked for 2 blocks and replica 1 for 1.
    assert data.requests["replica"].to_list() == [0, 1, 1]


@pytest.mark.parametrize("num_users", [0, 7])
def test_every_policy_meets_the_same_requests_and_the_same_tokens(num_users: int) -> None:
    requests = drifting_requests(120, num_users=num_users)
    given = ["request_id", "domain", "prompt_tokens", "output_tokens", "trace_start"]
    if not num_users:
        given.append("arrival_s")
    first, *others = (
        play(drifting_setup(), requests, use)[1].requests.select(given) for use in policy_names()
    )
    assert all(first.equals(other) for other in others)


def test_at_one_depth_two_hosts_emit_the_same_quality_token_by_token() -> None:
    """What a token is follows from the request and its place alone, not from when it was served."""
    requests = drifting_requests(120)
    columns = ["agree_tokens", "nll_nats", "breaches", "breaches_relative", "executed_layers"]
    busy, calm = (
        play(
            drifting_setup(max_batch=max_batch, fleet={"num_replicas": num_replicas}),
            requests,
            "static-depth",
            model="large",
            depth=4,
        )[1].requests.select(columns)
        for max_batch, num_replicas in ((1, 1), (8, 4))
    )
    assert busy.equals(calm)


def at_each_decision(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A list that fills with how many tokens each request has at each decision of the next run."""
    ask, seen = Replica.ask, []

    def noted(self: Replica, event: Any) -> Any:
        entry = ask(self, event)
        requests = self.run.world.requests
        seen.append(np.stack([requests["generated"], requests["status"] == FINISHED]))
        return entry

    monkeypatch.setattr(Replica, "ask", noted)
    return seen


def another_future(
    requests: Requests, traces: ExitTraces, time_s: float, generated: Any, finished: Any
) -> tuple[Requests, ExitTraces]:
    """The same past up to `time_s`, and other arrivals, lengths, texts and exits afterwards."""
    rng = stream(99, "another future")
    coming = requests.arrival_s > time_s
    open_ones = ~finished.astype(bool)
    output = np.where(open_ones, generated + 1 + rng.integers(0, 9, len(requests)), 0)
    shuffled = np.flatnonzero(coming)
    new = replace(
        requests,
        arrival_s=np.where(coming, requests.arrival_s + 0.25, requests.arrival_s),
        output_tokens=np.where(open_ones, output, requests.output_tokens).astype(np.int32),
        prompt_tokens=requests.prompt_tokens.copy(),
        trace_start=requests.trace_start.copy(),
        domain=requests.domain.copy(),
    )
    new.prompt_tokens[shuffled] = rng.integers(1, 24, len(shuffled))
    new.trace_start[shuffled] = rng.integers(0, 2**31, len(shuffled))
    new.domain[shuffled] = 1 - new.domain[shuffled]

    met = np.zeros((len(DOMAINS), traces.num_positions), bool)
    for i in np.flatnonzero(~coming):
        places = (int(requests.trace_start[i]) + np.arange(generated[i])) % traces.num_positions
        met[requests.domain[i], places] = True
    unmet = ~met[..., None]
    changed = {
        name: np.where(unmet, np.float32(1.0) - rows, rows)
        for name, rows in traces.confidence.items()
    }
    return new, replace(traces, confidence=changed)


@pytest.mark.parametrize("use", ["helios", "switch-only", "load-only", "never", "always"])
def test_another_future_changes_no_decision_up_to_now(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrivals, lengths and exits that have not shown yet reach no snapshot and no decision."""
    setup, requests = drifting_setup(), drifting_requests(150)
    seen = at_each_decision(monkeypatch)
    run, _ = play(setup, requests, use)
    num = len(run.decisions)
    tokens = list(seen)
    for k in sorted({1, num // 3, num // 2, num - 2}):
        time_s = run.decisions[k].time_s
        other_requests, other_traces = another_future(
            requests, setup.traces, time_s, tokens[k][0], tokens[k][1]
        )
        assert not np.array_equal(other_requests.output_tokens, requests.output_tokens)
        other, _ = play(replace(setup, traces=other_traces), other_requests, use)
        for mine, theirs in zip(run.decisions[: k + 1], other.decisions, strict=False):
            assert mine.time_s == theirs.time_s
            assert mine.snapshot == theirs.snapshot
            assert mine.decision == theirs.decision
        rest = [entry.snapshot for entry in other.decisions[k + 1 :]]
        assert rest != [entry.snapshot for entry in run.decisions[k + 1 :]]


def test_only_a_policy_that_says_so_sees_the_future() -> None:
    for use in policy_names():
        run, _ = play(drifting_setup(), drifting_requests(60), use)
        sees = {snapshot.foresight is not None for snapshot in snapshots_of(run.decisions)}
        assert sees == {use == "clairvoyant"}


@pytest.mark.parametrize("use", policy_names())
@pytest.mark.parametrize("world", ["one replica", "chunked, least outstanding"])
def test_a_fresh_policy_decides_every_logged_snapshot_alike(
    world: str, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the log holds is what the policy saw, whole, though a line leaves out what stays."""
    seen: list[Any] = []

    def consult(controller: Controller, **given: Any) -> Any:
        decision, snapshot = ask(controller, **given)
        seen.append(snapshot)
        return decision, snapshot

    ask = Controller.consult
    monkeypatch.setattr(Controller, "consult", consult)
    run, data = play(setup_in(world), drifting_requests(150), use)
    assert snapshots_of(run.decisions) == seen
    entries = decided(run.decisions)
    logged = read_snapshots(data.decisions["replica"], data.decisions["snapshot"])
    assert [snapshot.now_s for snapshot in logged] == data.decisions["time_s"].to_list()
    for snapshot, entry in zip(logged, entries, strict=True):
        assert policy_of(use).decide(snapshot) == entry.decision


@world
def test_a_run_replays_its_own_requests_to_the_last_bit(world: str, tmp_path: Path) -> None:
    setup = setup_in(world)
    _, data = play(setup, drifting_requests(120, max_prompt=60))
    folder = write_run(data, {}, tmp_path / "run")
    settings = WorkloadSettings(trace=TraceSettings(file=str(folder), format="helios"))
    again = generate(settings, seed=77, base_dir=tmp_path, available_domains=setup.traces.domains)
    _, replayed = play(setup, again)
    assert replayed.requests.equals(data.requests)
    assert replayed.decisions.equals(data.decisions)
    assert replayed.timeline.equals(data.timeline)


def test_a_closed_loop_replays_as_an_open_one(tmp_path: Path) -> None:
    """Its arrivals are in the records, so what followed from them comes about again."""
    setup = drifting_setup()
    _, data = play(setup, drifting_requests(100, num_users=5), "ee-single")
    folder = write_run(data, {}, tmp_path / "run")
    settings = WorkloadSettings(trace=TraceSettings(file=str(folder), format="helios"))
    again = generate(settings, seed=1, base_dir=tmp_path, available_domains=setup.traces.domains)
    _, replayed = play(setup, again, "ee-single")
    times = ["arrival_s", "admitted_s", "first_token_s", "finished_s"]
    assert replayed.requests.select(times).equals(data.requests.sort("arrival_s").select(times))


@pytest.mark.parametrize(("num_users", "num_replicas"), [(6, 1), (6, 2), (5, 3), (2, 4)])
def test_in_a_closed_loop_who_is_answered_first_thinks_and_sends_the_replicas_next_request(
    num_users: int, num_replicas: int
) -> None:
    requests = drifting_requests(90, num_users=num_users)
    _, data = play(drifting_setup(fleet={"num_replicas": num_replicas}), requests)
    arrival_s = data.requests["arrival_s"].to_numpy()
    finished_s = data.requests["finished_s"].to_numpy()
    assert np.array_equal(arrival_s[:num_users], requests.arrival_s[:num_users])
    rows = np.arange(90)
    replica = rows % num_users % num_replicas
    assert data.requests["replica"].to_list() == replica.tolist()
    for mine in (rows[replica == r] for r in range(min(num_users, num_replicas))):
        dealt = mine[mine >= num_users]
        answered_s = np.sort(finished_s[mine])[: len(dealt)]
        assert np.array_equal(arrival_s[dealt], answered_s + requests.arrival_s[dealt])


def test_users_of_a_closed_loop_rest_only_once_all_its_requests_are_sent() -> None:
    """One answer is forty times as long as the others, which the other user all gets."""
    requests = requests_of([0.0] * 12, [4] * 12, [80] + [2] * 11, domains=DOMAINS, num_users=2)
    _, data = play(drifting_setup(), requests, "vanilla")
    finished_s = data.requests["finished_s"].to_numpy()
    assert finished_s.argmax() == 0
    assert data.requests["arrival_s"].to_list()[2:] == finished_s[1:-1].tolist()


def test_more_memory_never_lowers_the_pool_or_the_batch_limit() -> None:
    profile = both_models()
    setups = [
        drifting_setup(profile=at_memory(profile, memory_bytes))
        for memory_bytes in range(4_000, 60_000, 1_111)
    ]
    for name, model in profile.models.items():
        for depth in model.model.exit_layers:
            pools = [setup.pool_blocks(name, depth) for setup in setups]
            assert pools == sorted(pools)
            assert pools[0] < pools[-1]
        limits = [candidate_card(setup, name).batch_limit for setup in setups]
        assert all(
            low <= high
            for before, after in pairwise(limits)
            for low, high in zip(before, after, strict=True)
        )


def test_fewer_layers_never_raise_weights_and_never_lower_the_pool() -> None:
    setup = drifting_setup()
    for name, model in setup.profile.models.items():
        card = candidate_card(setup, name)
        assert list(card.weight_bytes) == sorted(card.weight_bytes)
        assert list(card.batch_limit) == sorted(card.batch_limit, reverse=True)
        pools = [setup.pool_blocks(name, depth) for depth in model.model.exit_layers]
        assert pools == sorted(pools, reverse=True)


def test_a_card_counts_the_whole_typical_requests_that_fit() -> None:
    """Twenty-two tokens take six blocks; what is left of a pool after them serves nobody."""
    rests = set()
    for memory_bytes in range(12_000, 20_000, 500):
        setup = drifting_setup(profile=both_models(memory_bytes=memory_bytes))
        (limit, _) = candidate_card(setup, "small").batch_limit
        rests.add(setup.pool_blocks("small", 2) - 6 * limit)
    assert {0, 5} <= rests <= set(range(6))


def test_the_longest_request_that_is_taken_is_the_one_that_is_told() -> None:
    """Its last token needs no place in the pool; one token more can never fit."""
    profile = both_models(memory_bytes=17_000)
    setup = drifting_setup(profile=profile, candidates=["small"])
    longest = setup.longest_request("small", 4)
    assert longest < profile.model("small").model.shape.max_positions
    requests = requests_of([0.0, 0.0], [longest - 2, longest - 1], [2, 2], domains=DOMAINS)
    _, data = play(setup, requests, "vanilla")
    assert data.requests["status"].to_list() == ["finished", "refused"]


def test_a_candidate_s_card_pads_typical_rows_and_takes_the_factor_of_each_loaded_depth() -> None:
    """With exits it is the factor of the whole model, however early its tokens leave."""
    profile = padding_models()
    costs = {**profile.models["large"].coefficients, "decode.launch_s": 0.0}
    model = replace(profile.models["large"], coefficients=costs, batch_buckets=(1, 4, 8))
    profile = replace(profile, models={**profile.models, "large": model})
    setup = drifting_setup(profile=profile)
    serving = setup.serving
    row_tokens = serving.expected_prompt_tokens + serving.expected_output_tokens / 2
    card = candidate_card(setup, "large")
    for depth, by_batch in zip(card.exit_layers, card.decode_iteration_s, strict=True):
        for asked, seconds in zip(card.batches, by_batch, strict=True):
            rows = model.padded_rows(asked)[asked]
            layer_s = 2e-5 * rows * row_tokens * model.residual(asked, depth)[asked]
            assert seconds == pytest.approx(0.010 + asked * 0.0007 + depth * layer_s + 0.005)
    for asked, seconds in zip(card.batches, card.exiting_iteration_s[0], strict=True):
        rows = model.padded_rows(asked)[asked]
        layer_s = 2e-5 * rows * row_tokens * model.residual(asked, 8)[asked]
        assert seconds == pytest.approx(0.010 + asked * 0.0007 + 2 * layer_s + 0.002 + 6 * 0.001)
    assert 2 in card.batches and model.padded_rows(2)[2] == 4
    assert model.residual(4, 2)[4] == pytest.approx(0.6 / 1.1 * model.residual(4, 8)[4])


def test_a_candidate_s_card_tells_what_a_prompt_of_the_expected_length_takes() -> None:
    """Its tokens attend to each other and to themselves: 78 pairs of twelve."""
    costs = {"prefill.compute_s_per_pair": 0.0001, "prefill.launch_s": 0.0}
    profile = profile_of(thumbnail("small", (2, 4), costs=costs))
    setup = setup_of(profile, traces_from({"small": [[0.9, 0.9]] * 2}, {"small": (2, 4)}))
    for depth, seconds in zip((2, 4), candidate_card(setup, "small").prefill_s, strict=True):
        _, data = play(setup, requests_of([9.0], [12], [1]), "static-depth", depth=depth)
        (row,) = data.requests.iter_rows(named=True)
        assert seconds == pytest.approx(row["first_token_s"] - row["arrival_s"])
        assert seconds == pytest.approx(0.010 + depth * (12 * 0.001 + 78 * 0.0001) + 0.005)


def test_a_model_has_the_bytes_it_needs_where_its_pool_holds_a_typical_request() -> None:
    """Beside its weights and its workspace: 22 tokens take six blocks."""
    seen = set()
    for memory_bytes in range(4_000, 25_000, 100):
        profile = both_models(memory_bytes=memory_bytes)
        models = {name: replace(one, workspace_bytes=700) for name, one in profile.models.items()}
        setup = drifting_setup(profile=replace(profile, models=models))
        for depth in (2, 4, 8):
            fits = setup.needed_bytes("large", depth) <= setup.usable_bytes
            assert fits == (setup.pool_blocks("large", depth) >= 6)
            seen.add((depth, fits))
    assert len(seen) == 6


@pytest.mark.parametrize("skipped_kv", ["filled", "recomputed"])
def test_a_candidate_s_card_of_the_whole_model_charges_what_exits_ask_and_skip(
    skipped_kv: str,
) -> None:
    """Before the last exit a check for each exit met and KV beyond; at the last one its head."""
    profile = both_models()
    setup = drifting_setup(profile=profile, skipped_kv=skipped_kv)
    c = profile.models["large"].coefficient_array()
    card = candidate_card(setup, "large")
    last = len(card.exit_layers) - 1
    for level, (ending, exiting) in enumerate(
        zip(card.decode_iteration_s, card.exiting_iteration_s, strict=True)
    ):
        skipped = card.num_layers - card.exit_layers[level] if skipped_kv == "filled" else 0
        for rows, ending_s, exiting_s in zip(card.batches, ending, exiting, strict=True):
            asked_s = level * cost.check_seconds(c, rows)
            if level < last:
                asked_s += cost.check_seconds(c, rows) - cost.head_seconds(c, rows)
            filled_s = cost.kv_fill_seconds(c, rows, float(skipped))
            assert exiting_s - ending_s == pytest.approx(asked_s + filled_s)


@pytest.mark.parametrize("batching", ["static", "continuous", "chunked"])
@pytest.mark.parametrize("on_change", ["drain", "recompute"])
@pytest.mark.parametrize("models", [both_models, graph_models])
def test_an_evaluation_is_as_fast_as_its_card_whatever_its_responses_waited_for(
    batching: str, on_change: str, models: Callable[[], Profile]
) -> None:
    """Prompts of others, loads, the queue and captured graphs are no news; exits are in the card.

    A graph of theirs takes as long to capture as a whole iteration.
    """
    setup = drifting_setup(profile=models(), max_batch=6, batching=batching, on_change=on_change)
    run, data = play(setup, drifting_requests(300, rate_per_s=12.0))
    cards = {card.name: card for card in run.candidates}
    snapshots = read_snapshots(data.decisions["replica"], data.decisions["snapshot"])
    told = [one.telemetry for one in snapshots if one.telemetry]
    evaluated = [telemetry for telemetry in told if telemetry.is_evaluation]
    assert {telemetry.assignment.model for telemetry in evaluated} == set(cards)
    plain, waited = [], []
    for telemetry in evaluated:
        card = cards[telemetry.assignment.model]
        assert slowdown(card, telemetry) == pytest.approx(1.0, abs=0.004)
        plain.append(slowdown(replace(card, exiting_iteration_s=()), telemetry))
        if telemetry.mean_tpot_s and telemetry.pace:
            waited.append(telemetry.mean_tpot_s / telemetry.pace.token_s)
    assert np.mean(plain) > 1.03
    if on_change == "recompute" and batching != "static":
        assert np.mean(waited) > 1.5


def test_a_candidate_s_card_knows_few_rows_and_as_many_as_each_depth_can_run() -> None:
    """Powers of two, the reference, and the limits of depths, as far as the largest batch goes."""
    setup = drifting_setup(profile=both_models(memory_bytes=17_000), max_batch=48)
    for name in setup.candidates:
        card = candidate_card(setup, name)
        most = {min(limit, 48) for limit in card.batch_limit if limit}
        assert {1, 2, card.reference_batch, *most} <= set(card.batches)
        assert list(card.batches) == sorted(card.batches)
        assert card.batches[-1] == max(most)
        for row in card.decode_iteration_s:
            assert len(row) == len(card.batches)
            assert list(row) == sorted(row)


def test_a_candidate_s_card_knows_no_more_rows_than_a_batch_may_have() -> None:
    """Not for its reference either, where a batch is of three at most."""
    card = candidate_card(drifting_setup(max_batch=3), "large")
    assert card.batches == (1, 2, 3)
    assert card.reference_batch == 3


def test_more_memory_never_slows_a_run_whose_batch_it_limits() -> None:
    """All requests are there at once and a decode costs the same for one row or for all."""
    requests = drifting_requests(40, rate_per_s=1e6)
    ends = []
    for memory_bytes in (14_000, 18_000, 30_000, 100_000):
        profile = both_models(memory_bytes=memory_bytes)
        _, data = play(drifting_setup(profile=profile), requests, "static-depth", model="large")
        ends.append(data.totals.end_s)
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < ends[0]


@pytest.mark.parametrize(("disk_alpha_s", "switches"), [(0.0, True), (1e6, False)])
def test_helios_switches_for_nothing_and_never_at_a_prohibitive_cost(
    disk_alpha_s: float, switches: bool
) -> None:
    """Only the first model is in host memory; the rest of its layers can be had cheaply."""
    profile = both_models(disk=Link(disk_alpha_s, 1e12), host=Link(0.0, 1e9))
    options: dict[str, Any] = {"evaluate_at_start": False, "reassess_requests": "off"}
    requests = drifting_requests(150)
    hard = replace(requests, domain=np.ones_like(requests.domain))
    _, data = play(drifting_setup(profile=profile), hard, "helios", **options)
    assert data.totals.num_breach_events > 0
    assert (data.totals.num_switches > 0) == switches
    assert data.totals.num_loads > 0 or switches


@pytest.mark.parametrize("use", ["load-only", "switch-only", "never"])
def test_a_policy_only_takes_the_actions_it_is_named_for(use: str) -> None:
    run, data = play(drifting_setup(), drifting_requests(), use)
    after_breach = {
        type(entry.decision).__name__ for entry in run.decisions if entry.event == "breached"
    }
    allowed = {"load-only": {"LoadLayers", "Keep"}, "switch-only": {"Switch", "Keep"}}
    assert after_breach <= allowed.get(use, set())
    if use == "never":
        first = run.replicas[0].policy.settings.evaluation_requests
        evaluations = [entry for entry in run.decisions if entry.event != "evaluated"]
        assert first == 2 and len(evaluations) == 1
        assert data.totals.num_evaluations == 2
    else:
        assert after_breach - {"Keep"}


def drifting_back() -> Requests:
    """Hard requests first and easy ones after, all of them there at the start."""
    requests = drifting_requests(300, rate_per_s=200.0)
    return replace(requests, domain=(1 - requests.domain).astype(np.int16))


def test_the_clairvoyant_is_not_slower_than_one_who_never_changes_when_texts_grow_easier() -> None:
    """Then the best depth grows shallower; whoever stays where the hard texts put him is slow."""
    never, clairvoyant = (
        play(drifting_setup(), drifting_back(), use)[1] for use in ("never", "clairvoyant")
    )
    assert clairvoyant.totals.end_s <= never.totals.end_s
    tokens = clairvoyant.requests["generated_tokens"].sum()
    assert tokens == never.requests["generated_tokens"].sum()


def test_the_clairvoyant_breaches_no_more_than_one_who_never_changes() -> None:
    """When texts grow harder its depth follows them.

    That costs time, so speed is no bound there: whoever stays shallow is fast, and emits tokens
    that nobody is confident of.
    """
    never, clairvoyant = (
        play(drifting_setup(candidates=("small",)), drifting_requests(300), use)[1]
        for use in ("never", "clairvoyant")
    )
    assert 2 * clairvoyant.requests["breaches"].sum() < never.requests["breaches"].sum()


@pytest.mark.parametrize("batching", ["static", "continuous", "chunked"])
@pytest.mark.parametrize("on_change", ["drain", "recompute"])
def test_no_request_and_no_token_is_lost_across_switches(batching: str, on_change: str) -> None:
    setup = drifting_setup(batching=batching, on_change=on_change)
    _, data = play(setup, drifting_requests(rate_per_s=20.0), "always", reassess_requests=7)
    check_run(data)
    requests = data.requests
    assert data.totals.num_switches > 10
    assert set(requests["status"]) == {"finished"}
    assert requests["generated_tokens"].equals(requests["output_tokens"])
    preempted = int(requests["num_preemptions"].sum())
    assert (preempted > 0) == (on_change == "recompute")
    # A prefill emits the first token of every request, and one more for each time it is redone.
    prefilled = requests["generated_tokens"] - requests["decoded_tokens"]
    assert bool((prefilled >= 1).all())
    assert bool((prefilled <= 1 + requests["num_preemptions"]).all())
    assert (data.totals.drain_s > 0) == (on_change == "drain" or preempted > 0)


@pytest.mark.parametrize("memory_bytes", [15_000, 25_000, 100_000])
@pytest.mark.parametrize("overlap_loads", [True, False])
def test_weights_and_pool_stay_within_memory_also_while_weights_arrive(
    memory_bytes: int, overlap_loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arriving weights take blocks of the pool: old weights, pool and new weights fit at once.

    They do until the new ones are taken up, while running requests end too.
    """
    profile = both_models(memory_bytes=memory_bytes, host=Link(0.01, 20_000.0))
    models = {name: replace(one, workspace_bytes=300) for name, one in profile.models.items()}
    setup = drifting_setup(
        profile=replace(profile, models=models),
        overlap_loads=overlap_loads,
        fleet={"reserve_bytes": 700},
    )
    usable = int(memory_bytes * setup.fleet.memory_utilisation) - 700 - 300
    take_up, stage = Replica.take_up, engine.stage_blocks
    arriving: list[int] = []
    staged: list[int] = []
    looks: list[bool] = []

    def checked(self: Replica, assignment: Any) -> None:
        take_up(self, assignment)
        pool = int(self.record.pool_blocks) * self.block_bytes
        assert self.steward.weight_bytes + pool <= usable
        assert int(self.record.staged_blocks) == 0
        assert int(self.record.free_blocks) == int(self.record.pool_blocks)
        arriving.clear()

    def noted(rep: Any, num_blocks: int) -> None:
        stage(rep, num_blocks)
        assert rep.free_blocks >= 0
        moved_bytes = run.decisions[-1].moved_bytes
        assert num_blocks * run.replicas[0].block_bytes >= moved_bytes
        staged.append(num_blocks)
        arriving.append(moved_bytes)

    requests = drifting_requests(200, rate_per_s=12.0, max_output=60)
    run = Run(setup, requests, lambda: policy_of("helios"))
    advance = run.advance

    def looked_at(w: Any, r: int, horizon_s: float) -> int:
        """Stop every 5 ms, which is within every iteration."""
        replica = run.replicas[r]
        rep, cut_s = replica.record, -math.inf
        while True:
            cut_s = min(horizon_s, max(cut_s, rep.now_s) + 0.005)
            cause = int(advance(w, r, cut_s))
            kv_bytes = used_blocks(rep) * replica.block_bytes
            assert replica.steward.weight_bytes + sum(arriving) + kv_bytes <= usable
            looks.append(bool(arriving) and bool(rep.draining))
            if cause != AT_HORIZON or cut_s >= horizon_s:
                return cause

    monkeypatch.setattr(Replica, "take_up", checked)
    monkeypatch.setattr(engine, "stage_blocks", noted)
    monkeypatch.setattr(run, "advance", looked_at)
    run.play()
    assert sum(bool(entry.moved_bytes) for entry in run.decisions) > 1
    assert bool(staged) == overlap_loads
    assert any(looks) == overlap_loads
    check_run(run_data(run, "mine", run.policy.name, setup.seed, {}))


def test_the_peak_of_the_weights_counts_those_that_arrive_beside_running_requests() -> None:
    for overlap in (True, False):
        setup = drifting_setup(profile=both_models(), overlap_loads=overlap)
        run, data = play(setup, drifting_requests(), "always", reassess_requests=7)
        assert data.totals.num_switches > 1
        served = [entry.assignment for entry in run.decisions]
        most = max(run.place(one.model, one.depth).weight_bytes for one in served)
        assert data.totals.peak_weight_bytes == (2 * most if overlap else most)


def test_overlapping_a_load_with_serving_leaves_less_time_without_tokens() -> None:
    profile = both_models(host=Link(0.05, 20_000.0))
    loads = [
        play(
            drifting_setup(profile=profile, overlap_loads=overlap), drifting_requests(rate_per_s=20)
        )
        for overlap in (True, False)
    ]
    assert loads[0][1].totals.load_s < loads[1][1].totals.load_s


def test_without_overlap_rows_run_out_before_weights_move() -> None:
    setup = drifting_setup(overlap_loads=False, profile=both_models(host=Link(0.3, 1e9)))
    run, data = play(setup, drifting_requests())
    times_s = np.concatenate([data.requests[name] for name in ("first_token_s", "finished_s")])
    moves = [entry for entry in run.decisions if entry.moved_bytes]
    assert len(moves) > 5
    for entry in moves:
        assert entry.ready_s is not None
        start_s = entry.ready_s - setup.profile.loading.host.seconds(entry.moved_bytes)
        assert not bool(((times_s > start_s + 1e-9) & (times_s <= entry.ready_s)).any())


def test_a_replica_that_runs_out_of_rows_while_weights_arrive_idles() -> None:
    """Four come at once, and the next four after the weights of the switch are here."""
    setup = drifting_setup(profile=both_models(host=Link(5.0, 1e9)))
    requests = requests_of(
        np.repeat([1.0, 60.0, 120.0], 4), [5] * 12, [3, 3, 3, 9] * 3, domains=DOMAINS
    )
    run, data = play(setup, requests, "always", reassess_requests=3)
    assert data.totals.num_switches > 1
    totals = data.totals
    assert totals.busy_s + totals.idle_s + totals.load_s == pytest.approx(totals.end_s)
    assert totals.load_s == pytest.approx(run.decisions[0].ready_s)
    assert totals.energy_idle_j == pytest.approx(50.0 * totals.idle_s)


def test_weights_that_arrive_beside_requests_draw_their_watts_while_they_move() -> None:
    """Moving takes 30 W above idle power; without them the same run draws that much less."""
    profile = both_models(host=Link(0.3, 20_000.0))
    timelines, loads_j = [], []
    for load_w in (80.0, 50.0):
        one = replace(profile, device=replace(profile.device, load_w=load_w))
        setup = drifting_setup(profile=one, timeline_interval_s=0.01)
        run, data = play(setup, drifting_requests(80), "always", reassess_requests=10)
        assert data.totals.num_switches > 2
        assert any(entry.moved_bytes for entry in run.decisions[1:])
        timelines.append(data.timeline)
        loads_j.append(data.totals.energy_load_j)
    moving, still = timelines
    more_w = moving["power_w"] - still["power_w"]
    assert bool(more_w.is_between(-1e-6, 30.0 + 1e-6).all())
    assert float((more_w * moving["interval_s"]).sum()) == pytest.approx(loads_j[0] - loads_j[1])


@pytest.mark.parametrize(
    ("fleet", "num_users"),
    [
        ({}, 0),
        ({}, 5),
        ({"num_replicas": 2, "router": "round-robin"}, 0),
        ({"num_replicas": 2, "router": "least-outstanding"}, 0),
    ],
    ids=["one replica", "closed loop", "routed beforehand", "routed as they arrive"],
)
def test_nobody_is_asked_once_no_request_can_come_any_more(
    fleet: dict[str, Any], num_users: int
) -> None:
    """Whoever may still be sent one is asked; after the last one a load would serve nobody."""
    setup = drifting_setup(fleet=fleet)
    requests = drifting_requests(40, num_users=num_users)
    run, data = play(setup, requests, "always", reassess_requests=1)
    finished = data.requests.group_by("replica").agg(pl.col("finished_s").max())
    last_s = dict(finished.iter_rows())
    may_come_s = 0.0 if fleet.get("router") != "least-outstanding" else requests.arrival_s[-1]
    assert len(run.decisions) > 5
    for entry in run.decisions:
        assert entry.time_s < max(last_s[entry.replica], may_come_s)
    assert data.totals.end_s == max(last_s.values())


def test_replicas_of_one_host_share_its_disk_and_its_link() -> None:
    """Three that load at once are served one after the other, but not on hosts of their own.

    Two to a host, the first two share one.
    """
    profile = both_models(disk=Link(1.0, 1e12), host=Link(0.5, 1e12))
    requests = drifting_requests(30)
    ready = {
        per_host: [
            entry.ready_s
            for entry in play(
                drifting_setup(
                    profile=profile, fleet={"num_replicas": 3, "replicas_per_host": per_host}
                ),
                requests,
                "vanilla",
            )[0].decisions
        ]
        for per_host in (1, 2, 3)
    }
    assert ready[1] == pytest.approx([1.5, 1.5, 1.5])
    assert ready[2] == pytest.approx([1.5, 2.0, 1.5])
    assert ready[3] == pytest.approx([1.5, 2.0, 2.5])


def test_weights_that_start_in_host_memory_skip_the_disk() -> None:
    profile = both_models(disk=Link(1.0, 1e12), host=Link(0.5, 1e12))
    setup = drifting_setup(profile=profile, fleet={"weights_start": "host"})
    run, _ = play(setup, drifting_requests(20), "vanilla")
    assert run.decisions[0].ready_s == pytest.approx(0.5)


def test_what_can_never_fit_is_refused_and_everybody_else_is_served() -> None:
    requests = drifting_requests(60)
    requests.prompt_tokens[[3, 17, 59]] = 5_000
    _, data = play(drifting_setup(), requests)
    refused = data.requests.filter(pl.col("status") == "refused")
    assert refused["request_id"].to_list() == [3, 17, 59]
    assert data.requests.filter(pl.col("status") == "finished").height == 57
    check_run(data)


def test_a_threshold_of_zero_lets_every_token_leave_at_the_first_exit() -> None:
    _, data = play(drifting_setup(), drifting_requests(40), "ee-single", confidence_threshold=0.0)
    shallow, *deeper = data.totals.exit_counts["large"]
    assert shallow > 0
    assert set(deeper) == {0}


def test_a_mode_of_one_request_at_a_time_serves_one_at_a_time() -> None:
    _, data = play(drifting_setup(), drifting_requests(40), "ee-single", exit_mode="solo")
    assert data.totals.max_running == 1
    assert data.totals.decode_rows == data.totals.num_decode_iterations > 0


def test_keeping_costs_nothing() -> None:
    class Asked:
        """Decides at the start and keeps for ever, but wants to be asked all the time."""

        name = "asked"
        sees_future = False
        confidence_threshold = None
        watching = make_policy("helios", QUICK).watching

        def decide(self, snapshot: Any) -> Any:
            if snapshot.assignment is None:
                return make_policy("vanilla", {}).decide(snapshot)
            return Keep("As before.")

    requests = drifting_requests(100)
    asked_run, asked = play_policy(drifting_setup(), requests, Asked)
    _, plain = play(drifting_setup(), requests, "vanilla")
    assert len(asked_run.decisions) > 3
    assert asked.requests.equals(plain.requests)
    assert asked.totals.energy_j == plain.totals.energy_j


def test_after_an_evaluation_that_is_kept_nobody_is_evaluated_any_more() -> None:
    class Content:
        """Evaluates once, and keeps what it got."""

        name = "content"
        sees_future = False
        confidence_threshold = None
        watching = Watching(reassess_requests=10)

        def decide(self, snapshot: Any) -> Any:
            if snapshot.event == "start":
                return Evaluate("small", 4, ExitMode.WAIT, "See what it does.")
            return Keep("Good enough.")

    run, data = play_policy(drifting_setup(), drifting_requests(60), Content)
    assert data.requests["evaluated"].to_list() == [True] * 4 + [False] * 56
    events = [str(entry.event) for entry in run.decisions]
    assert events == ["start", "evaluated"] + ["reassess"] * 5
    told = [snapshot.telemetry for snapshot in snapshots_of(run.decisions)[1:]]
    kept = [telemetry.is_evaluation for telemetry in told if telemetry is not None]
    assert kept == [True] + [False] * 5


def test_progress_rises_from_nothing_to_all() -> None:
    shares: list[float] = []
    make: Callable[[], Any] = lambda: make_policy("vanilla", {})  # noqa: E731
    run = Run(drifting_setup(), drifting_requests(100), make, shares.append)
    run.slice_s = 0.1
    run.play()
    assert len(shares) > 20
    assert shares == sorted(shares)
    assert 0.0 <= shares[0] < shares[-1] <= 1.0


def test_traces_and_setups_are_only_read() -> None:
    profile = both_models()
    traces = drifting_traces(profile)
    before = {name: rows.copy() for name, rows in traces.confidence.items()}
    requests = drifting_requests(60)
    arrivals, outputs = requests.arrival_s.copy(), requests.output_tokens.copy()
    play(setup_of(profile, traces), requests)
    assert all(np.array_equal(traces.confidence[name], rows) for name, rows in before.items())
    assert np.array_equal(requests.arrival_s, arrivals)
    assert np.array_equal(requests.output_tokens, outputs)


@pytest.mark.parametrize("world", ["one replica", "chunked, least outstanding"])
def test_a_disbanded_run_is_freed_without_a_collection(world: str) -> None:
    run, _ = play(setup_in(world), drifting_requests(60))
    requests = weakref.ref(run.world.requests)
    collects = gc.isenabled()
    gc.disable()
    try:
        run.disband()
        del run
        assert requests() is None
    finally:
        if collects:
            gc.enable()
