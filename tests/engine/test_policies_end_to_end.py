"""Every policy, in every kind of world, serves a drifting workload to the end and by the laws."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.policy.contract import USUAL_REASSESS_REQUESTS, Event
from helios_sim.policy.registry import make_policy, policy_names
from helios_sim.runs.laws import check_run
from helios_sim.runs.records import RunData
from helios_sim.scenario import load_scenario, parse_scenario
from tests.engine.factories import (
    DOMAINS,
    QUICK,
    both_models,
    drifting_requests,
    drifting_setup,
    play,
    play_policy,
    profile_of,
    snapshots_of,
    thumbnail,
)

ROUTERS = ("round-robin", "random", "least-outstanding", "least-kv")
HOSTS = [
    {
        "batching": batching,
        "on_change": on_change,
        "overlap_loads": overlap,
        "fleet": {"num_replicas": num_replicas, "router": router, "replicas_per_host": 2},
    }
    for (batching, on_change, overlap, num_replicas), router in zip(
        product(("static", "continuous", "chunked"), ("drain", "recompute"), (True, False), (1, 3)),
        ROUTERS * 6,
        strict=True,
    )
]
"""Every way to batch, to change and to load, with one replica or three; routers take turns."""

MODES = {
    "ee-single": [{"exit_mode": mode} for mode in ("solo", "wait", "rebatch")],
    "helios": [
        {"evaluation_exit_mode": mode, "after_load_exit_mode": after}
        for mode, after in (("wait", "full"), ("solo", "rebatch"), ("rebatch", "solo"))
    ],
}
CASES = [(use, options) for use in policy_names() for options in MODES.get(use, [{}])]


def check_whole(data: RunData, num_requests: int) -> None:
    """Everybody was served, and the records break no law."""
    check_run(data)
    assert data.requests["status"].to_list() == ["finished"] * num_requests
    assert data.requests["generated_tokens"].equals(data.requests["output_tokens"])
    assert data.totals.energy_j > data.totals.energy_idle_j + data.totals.energy_load_j > 0.0
    assert data.decisions["ready_s"].null_count() == 0
    assert data.decisions["reason"].str.len_chars().min() > 10


@pytest.mark.parametrize(("use", "options"), CASES)
@pytest.mark.parametrize("num_users", [0, 9])
def test_every_policy_serves_everybody_whatever_the_host(
    use: str, options: dict[str, Any], num_users: int
) -> None:
    """Two dozen hosts each, in an open and in a closed loop."""
    requests = drifting_requests(70, rate_per_s=12.0, num_users=num_users)
    for host in HOSTS:
        _, data = play(drifting_setup(**host), requests, use, **options)
        check_whole(data, 70)


@pytest.mark.parametrize(("use", "options"), CASES)
def test_every_policy_serves_everybody_with_preemptions(use: str, options: dict[str, Any]) -> None:
    """The pool is so small that growing requests push each other out."""
    setup = drifting_setup(profile=both_models(memory_bytes=33_000))
    requests = drifting_requests(60, rate_per_s=50.0)
    _, data = play(setup, requests, use, **options)
    check_whole(data, 60)
    if use in ("vanilla", "ee-single"):
        alone = options.get("exit_mode") == "solo"
        assert (int(data.requests["num_preemptions"].sum()) > 0) == (not alone)


@pytest.mark.parametrize(
    "use", [use for use, options in CASES if "rebatch" not in options.values()]
)
def test_every_policy_serves_everybody_where_skipped_kv_is_recomputed(use: str) -> None:
    setup = drifting_setup(skipped_kv="recomputed")
    _, data = play(setup, drifting_requests(70), use)
    check_whole(data, 70)


@pytest.mark.parametrize(
    "objective", ["throughput", "response-time", "energy", "quality", "memory"]
)
@pytest.mark.parametrize("use", ["helios", "clairvoyant"])
def test_every_objective_can_be_served(use: str, objective: str) -> None:
    _, data = play(drifting_setup(), drifting_requests(100), use, objective=objective)
    check_whole(data, 100)
    assert data.objective == objective


def last_choice(fleet: dict[str, Any], workload: dict[str, Any], **policy: Any) -> Any:
    """What a policy chose last of a shipped profile's models, with its reason; and its figures."""
    data = {
        "name": "choice",
        "workload": {
            "prompt": {"kind": "geometric", "mean_tokens": 512, "max_tokens": 1400},
            "output": {"kind": "geometric", "mean_tokens": 128, "max_tokens": 600},
            **workload,
        },
        "fleet": {**fleet, "weights_start": "host"},
        "policy": [policy],
    }
    question = parse_scenario(data, "choice", Path())
    result = run_policy(prepare(question, Path()), question.policy[0])
    return result.run.decisions.row(-1, named=True), result.summary


@pytest.mark.parametrize(
    ("profile", "pair", "depth"),
    [
        ("opt-a100-40gb", {"opt-1.3b": 12, "opt-6.7b": 9}, 9),
        ("layerskip-a100-40gb", {"llama2-7b": 16, "llama2-13b": 16}, 16),
    ],
)
def test_the_throughput_told_of_a_candidate_is_what_its_depth_gives_in_full_batches(
    profile: str, pair: dict[str, int], depth: int
) -> None:
    fleet = {"profile": profile, "candidates": list(pair)}
    closed = {"kind": "closed", "num_users": 320, "think_s": 0.0}
    full = {"num_requests": 2500, "arrivals": closed}
    chosen, _ = last_choice(fleet, full, use="never", depth_rule="fixed", fixed_depth=depth)
    simulated = {
        name: last_choice(fleet, full, use="static-depth", model=name, depth=layers)[1]
        for name, layers in pair.items()
    }
    for name, layers in pair.items():
        told = re.search(rf"{name} at {layers} layers: ([\d,]+) tokens/s", chosen["reason"])
        assert told
        per_s = simulated[name]["output_throughput"]
        assert float(told[1].replace(",", "")) == pytest.approx(per_s, rel=1 / 3)
    assert chosen["model"] == max(pair, key=lambda name: simulated[name]["output_throughput"])


def test_joules_told_of_a_candidate_do_not_hang_on_how_often_requests_come() -> None:
    """Every ten seconds or twenty a second: between requests a replica idles, or it never does."""
    told = []
    for rate_per_s in (0.1, 20.0):
        poisson = {"kind": "poisson", "rate_per_s": rate_per_s}
        fleet = {"profile": "opt-a100-40gb", "candidates": ["opt-1.3b"]}
        workload = {"num_requests": 12, "arrivals": poisson}
        chosen, _ = last_choice(fleet, workload, use="never", objective="energy")
        told.append(float(re.search(r"([\d.]+) J per token", chosen["reason"])[1]))  # type: ignore[index]
    assert told[0] == pytest.approx(told[1], rel=0.4)


def test_helios_does_all_it_can_do_on_a_drifting_workload() -> None:
    """Evaluations, loads after breaches and switches all happen: the other tests test something.

    Transfers are compared alone, since over a whole interval a load hardly ever pays.
    """
    _, data = play(drifting_setup(), drifting_requests(), overhead_rule="transfer")
    assert set(data.decisions["event"]) == {"start", "evaluated", "breached", "reassess"}
    assert {"evaluate", "serve"} < set(data.decisions["decision"])
    totals = data.totals
    assert min(totals.num_evaluations, totals.num_breach_events) > 0
    assert min(totals.num_switches, totals.num_loads) > 0
    evaluated = data.requests.filter(pl.col("evaluated"))
    assert evaluated.height == 2 * totals.num_evaluations


def test_an_evaluation_serves_exactly_as_many_requests_as_it_asked_for() -> None:
    run, data = play(drifting_setup(), drifting_requests(), evaluation_requests=4)
    entries = run.decisions
    seen = snapshots_of(entries)
    for (entry, following), snapshot in zip(pairwise(entries), seen[1:], strict=True):
        if entry.event == "evaluated" or following.event != "evaluated":
            continue
        telemetry = snapshot.telemetry
        assert telemetry is not None and telemetry.is_evaluation
        assert telemetry.num_finished == 4
        assert telemetry.assignment == entry.assignment
    assert data.requests["evaluated"].sum() == 4 * data.totals.num_evaluations


def test_an_evaluation_tells_of_its_own_requests_alone() -> None:
    """Each has one token of its prefill beside those decoded, and meets only the others of it."""
    run, _ = play(drifting_setup(), drifting_requests())
    told = [one.telemetry for one in snapshots_of(run.decisions) if one.event is Event.EVALUATED]
    assert len(told) > 4
    for telemetry in told:
        assert telemetry is not None
        assert telemetry.num_finished == QUICK["evaluation_requests"]
        assert telemetry.num_tokens == sum(telemetry.exit_counts) + telemetry.num_finished
        assert telemetry.mean_batch <= telemetry.num_finished


def test_an_interval_counts_requests_since_the_last_evaluation() -> None:
    """Thirty finish between the end of a round and the next one, breaches in between or not."""
    run, _ = play(drifting_setup(), drifting_requests(300), reassess_requests=30)
    served = 0
    since: list[int] = []
    for entry, snapshot in zip(run.decisions[1:], snapshots_of(run.decisions)[1:], strict=True):
        telemetry = snapshot.telemetry
        assert telemetry is not None
        if not telemetry.is_evaluation:
            served += telemetry.num_finished
        if entry.event == "reassess":
            since.append(served)
            served = 0
    # Whoever finishes while weights arrive or rows drain is nobody's telemetry.
    assert len(since) > 3
    assert all(30 <= count < 30 + 8 for count in since)


PATIENT = '''
from dataclasses import dataclass

from helios_sim.policy.contract import Event, ExitMode, Keep, Serve, Watching


@dataclass(frozen=True)
class Patient:
    """Full depth while few wait, the shallowest exit while many do."""

    patience: int = 3

    name = "patient"
    sees_future = False
    watching = Watching(reassess_requests=5)
    confidence_threshold = None

    def decide(self, snapshot):
        model = snapshot.candidates[0]
        crowded = snapshot.num_waiting > self.patience
        depth = model.exit_layers[0] if crowded else model.num_layers
        mode = ExitMode.LOADED_DEPTH if crowded else ExitMode.WAIT
        now = snapshot.assignment
        if snapshot.event is not Event.START and now is not None and now.depth == depth:
            return Keep("This depth suits the queue still.")
        return Serve(model.name, depth, mode, f"{snapshot.num_waiting} requests wait.")
'''

SCENARIO = """
name = "mine"

[workload]
num_requests = 60
arrivals = { kind = "poisson", rate_per_s = 10.0 }
prompt = { kind = "uniform", min_tokens = 100, max_tokens = 600 }
output = { kind = "geometric", mean_tokens = 30, max_tokens = 200 }

[fleet]
profile = "opt-a100-40gb"
candidates = ["opt-1.3b"]

[serving]
max_batch = 4

[[policy]]
use = "my_policy:Patient"
patience = 2
"""


def scenario_beside_a_policy(folder: Path) -> Path:
    (folder / "my_policy.py").write_text(PATIENT, encoding="utf-8")
    path = folder / "mine.toml"
    path.write_text(SCENARIO, encoding="utf-8")
    return path


def test_expectations_reach_as_far_as_usual_where_nobody_reassesses() -> None:
    never = {"reassess_requests": None, "breach_window_tokens": 20, "breach_limit": 8}
    run, _ = play(drifting_setup(), drifting_requests(), "helios", **never)
    first, *others = snapshots_of(run.decisions)
    usual = drifting_setup().serving.expected_output_tokens
    assert first.expected_tokens == USUAL_REASSESS_REQUESTS * usual
    breached = [snapshot for snapshot in others if snapshot.event is Event.BREACHED]
    assert breached
    assert all(1.0 <= seen.expected_tokens / USUAL_REASSESS_REQUESTS <= 20.0 for seen in breached)


@pytest.mark.parametrize("num_users", [0, 12])
def test_foresight_is_of_the_requests_that_nobody_has_begun(num_users: int) -> None:
    """Waiting ones among them, and in a closed loop those whose users still think."""
    easy_first = np.repeat([0, 1], 60).astype(np.int16)
    requests = replace(drifting_requests(120, num_users=num_users), domain=easy_first)
    if not num_users:
        requests = replace(requests, arrival_s=np.zeros(120))
    run, _ = play(drifting_setup(), requests, "clairvoyant", reassess_requests=30)
    seen = [snapshot.foresight["small"][0] for snapshot in snapshots_of(run.decisions)]
    easy, hard = (
        drifting_setup().traces.share_by_exit("small", 0.5, domain)[0] for domain in DOMAINS
    )
    assert easy > hard
    assert seen[0] == pytest.approx(easy)
    assert seen[-1] == pytest.approx(hard)


def test_a_policy_in_a_file_beside_the_scenario_is_played(tmp_path: Path) -> None:
    path = scenario_beside_a_policy(tmp_path)
    scenario = load_scenario(path)
    experiment = prepare(scenario, tmp_path, str(path))
    result = run_policy(experiment, scenario.policy[0])
    assert result.run.requests["status"].to_list() == ["finished"] * 60
    assert set(result.run.decisions["depth"]) == {6, 24}
    assert result.summary["completed"] == 60
    waiting = result.run.decisions["reason"].str.contains("requests wait")
    assert waiting.any() and not waiting.all()


def test_a_policy_whose_decision_cannot_be_carried_out_is_told_so() -> None:
    from helios_sim.policy.contract import ExitMode, Serve

    class Deep:
        name = "deep"
        sees_future = False
        confidence_threshold = None
        watching = make_policy("vanilla", {}).watching

        def decide(self, snapshot: Any) -> Any:
            return Serve("small", 3, ExitMode.FULL, "No exit is there.")

    with pytest.raises(InputError, match=r"depth 3; it must name one of its exit layers \[2, 4\]"):
        play_policy(drifting_setup(), drifting_requests(10), Deep)


def test_a_model_may_have_an_at_sign_in_its_name() -> None:
    profile = profile_of(thumbnail("small@main", (2, 4)), thumbnail("large@v2", (2, 4, 8)))
    _, data = play(drifting_setup(profile=profile), drifting_requests(60), "always")
    check_whole(data, 60)
    assert {name.rpartition("@")[0] for name in data.totals.depth_seconds} == set(profile.models)
