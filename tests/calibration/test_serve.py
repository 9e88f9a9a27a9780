"""A scenario served for real becomes a run folder that keeps the laws and can be replayed."""

from __future__ import annotations

import errno
import json
import math
import pkgutil
import shutil
import threading
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tokenizers
import torch

from calibration.cli import main
from calibration.measuring.board import Board, open_board
from calibration.measuring.meters import (
    Absence,
    CrossChecked,
    Measurement,
    NoMeter,
    NvmlCounter,
    NvmlPower,
)
from calibration.measuring.pace import Pace
from calibration.model import checkpoint
from calibration.model.checkpoint import open_checkpoint, update_settings
from calibration.model.confidence import Confidence, PiecewiseLinear
from calibration.model.early_exit import EarlyExitLM, from_stock, save
from calibration.serving.batching import Row
from calibration.serving.energy import RunEnergy
from calibration.serving.host import Host
from calibration.serving.prepared import ServeSettings, check_checkpoint, prepare, threads_of
from calibration.serving.prompts import Prompts, read_prompts, tokenizer_of
from calibration.serving.serve import line_of, other_kernels, places_of, serve
from calibration.serving.slowdown import Companion, measured_pace, slowdown_facts, waited_s
from calibration.serving.weights import KvChoice
from calibration.training.text import ByteTokenizer, corpus
from helios_sim.cli import main as simulator
from helios_sim.errors import InputError
from helios_sim.exits import read_traces
from helios_sim.policy import Controller, make_policy, read_snapshots
from helios_sim.policy.contract import DECISION_NAMES
from helios_sim.profiles.files import load_profile, save_profile
from helios_sim.profiles.keep_exits import write_with_exits
from helios_sim.runs.records import read_run, read_summary
from tests.calibration.fake_nvml import FakeNvml
from tests.calibration.serving import DOMAINS, family, first_exit_threshold, model_of, write_profile
from tests.calibration.tiny import stock_model
from tests.engine.factories import profile_of, requests_of, thumbnail

HELIOS = """
[[policy]]
use = "helios"
evaluation_requests = 2
reassess_requests = 12
breach_window_tokens = 20
breach_limit = 8
"""
SCENARIO = """
name = "tiny"
seed = 3

[workload]
num_requests = 30
arrivals = {{ kind = "poisson", rate_per_s = 60.0 }}
prompt = {{ kind = "uniform", min_tokens = 4, max_tokens = 24 }}
output = {{ kind = "geometric", mean_tokens = 8, max_tokens = 20 }}
domains = [{{ name = "code", share = 0.5 }}, {{ name = "prose", share = 0.5 }}]

[fleet]
profile = "profile"

[serving]
max_batch = 4
block_tokens = 8
expected_prompt_tokens = 14
expected_output_tokens = 8

[measure]
timeline_interval_s = 0.05
{policies}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two checkpoints, their profile and a scenario of two policies."""
    folder = tmp_path_factory.mktemp("serving")
    models = [model_of("small", (2, 4), seed=1), model_of("large", (2, 4, 6), seed=2)]
    threshold = first_exit_threshold(models[0])
    family(folder / "family", threshold)
    write_profile(folder / "profile", models, threshold)
    wait = '[[policy]]\nuse = "ee-single"\nexit_mode = "wait"\n'
    (folder / "tiny.toml").write_text(SCENARIO.format(policies=HELIOS + wait))
    return folder


@pytest.fixture(scope="module")
def served(place) -> Path:
    """A run of HELIOS on the real backend."""
    settings = ServeSettings((place / "family",), ("helios",), device="cpu")
    serve(place / "tiny.toml", place / "run", settings)
    return place / "run"


def told(capsys, *arguments: str) -> tuple[int, str]:
    """The exit code of a command line and what it said on standard error."""
    with pytest.raises(SystemExit) as end:
        main(["serve", *arguments])
    return int(end.value.code or 0), capsys.readouterr().err


def test_a_served_run_keeps_every_law_and_says_that_it_was_measured(served) -> None:
    run = read_run(served)
    summary = read_summary(served)
    assert run.origin == summary["origin"] == "measured"
    assert summary["completed"] == 30
    assert summary["tokenizers"] == ["bytes"]
    assert run.requests["generated_tokens"].sum() == run.requests["output_tokens"].sum()
    totals = run.totals
    assert totals.busy_s + totals.idle_s + totals.load_s == pytest.approx(totals.end_s)
    assert totals.load_s > 0.0
    assert run.timeline["interval_s"].sum() == pytest.approx(totals.end_s)
    assert (run.timeline["model"].is_not_null() == (run.timeline["depth"] > 0)).all()
    assert run.timeline["model"].null_count() > 0
    assert 0.0 <= summary["agreement"] <= 1.0
    assert summary["perplexity"] > 1.0
    assert run.environment["tokens"] == "teacher-forced"
    assert run.environment["host_copies"] == ["large", "small"]


def test_energy_is_null_where_no_meter_is_and_never_zero(served) -> None:
    run = read_run(served)
    if run.environment["meter"] != "none":
        pytest.skip("this machine has an energy meter")
    assert math.isnan(run.totals.energy_j)
    assert read_summary(served)["total_gpu_energy"] is None
    assert run.timeline["power_w"].null_count() == run.timeline.height


def test_recorded_telemetry_gives_the_same_decisions_in_the_simulators_controller(served) -> None:
    run = read_run(served)
    log = run.decisions
    snapshots = read_snapshots(log["replica"], log["snapshot"])
    options = {key: value for key, value in run.scenario["policy"][0].items() if key != "use"}
    controller = Controller(make_policy("helios", options), snapshots[0].candidates)
    assert log.height >= 4
    for row, seen in zip(log.iter_rows(named=True), snapshots, strict=True):
        decision, snapshot = controller.consult(
            now_s=seen.now_s,
            event=seen.event,
            assignment=seen.assignment,
            telemetry=seen.telemetry,
            load_s=seen.load_s,
            num_waiting=seen.num_waiting,
            num_running=seen.num_running,
            max_batch=seen.max_batch,
            expected_tokens=seen.expected_tokens,
            slo=seen.slo,
        )
        assert (DECISION_NAMES[type(decision)], decision.reason) == (row["decision"], row["reason"])
        assert snapshot == seen


def test_iterations_and_tokens_add_up_to_the_run(served) -> None:
    run = read_run(served)
    iterations = pl.read_parquet(served / "iterations.parquet")
    tokens = pl.read_parquet(served / "tokens.parquet")
    totals = run.totals
    assert iterations.height == totals.num_iterations
    assert iterations["seconds"].sum() == pytest.approx(totals.busy_s)
    assert iterations["emitted"].sum() == tokens.height == run.requests["generated_tokens"].sum()
    assert (iterations["host_s"] <= iterations["seconds"]).all()
    starts, ends = iterations["start_s"], iterations["start_s"] + iterations["seconds"]
    assert (starts[1:] >= ends[:-1] - 1e-9).all()
    decodes = iterations.filter(pl.col("kind") == "decode")
    assert decodes["rows"].sum() == totals.decode_rows
    assert (decodes["layers"] <= decodes["depth"]).all()
    by_request = tokens.group_by("request_id").agg(
        pl.col("agrees").sum(), pl.col("breached").sum(), pl.col("breached_relative").sum()
    )
    joined = run.requests.with_columns(pl.col("request_id").cast(pl.Int32)).join(
        by_request, "request_id"
    )
    assert (joined["agrees"] == joined["agree_tokens"]).all()
    assert (joined["breached"] == joined["breaches"]).all()
    assert (joined["breached_relative"] == joined["breaches_relative"]).all()


def test_the_runs_own_exit_traces_hold_what_each_served_token_would_do(served) -> None:
    run = read_run(served)
    traces = read_traces(served / "exits.parquet")
    tokens = pl.read_parquet(served / "tokens.parquet")
    assert set(traces.domains) == set(DOMAINS)
    assert traces.exit_layers == {"small": (2, 4), "large": (2, 4, 6)}
    starts = dict(run.requests.select("request_id", "trace_start").iter_rows())
    domains = dict(run.requests.select("request_id", "domain").iter_rows())
    for one in tokens.filter(pl.col("exit_level") == 0).iter_rows(named=True):
        at = (
            traces.domain_index(domains[one["request_id"]]),
            starts[one["request_id"]] + one["place"],
            0,
        )
        # Layers before the first exit are never skipped, so serving and rereading agree there.
        assert traces.confidence[one["model"]][at] == pytest.approx(one["confidence"], abs=1e-4)
        assert bool(traces.agrees[one["model"]][at]) == one["agrees"]


def test_serving_again_gives_the_same_tokens_but_not_the_same_times(place, capsys) -> None:
    main_arguments = [
        str(place / "tiny.toml"),
        "--checkpoints",
        str(place / "family"),
        "--out",
        str(place / "twice"),
        "--policy",
        "ee-single",
        "--limit",
        "6",
        "--repeat",
        "2",
        "--device",
        "cpu",
        "--kv",
        "pages",
    ]
    code, _ = told(capsys, *main_arguments)
    assert code == 0
    first, second = (
        pl.read_parquet(place / "twice" / f"repeat-{k}/tokens.parquet") for k in (1, 2)
    )
    both = [
        frame.sort("request_id", "place").select("request_id", "place", "exit_level")
        for frame in (first, second)
    ]
    assert both[0].height == both[1].height
    run = read_run(place / "twice" / "repeat-1")
    assert run.requests.height == run.scenario["workload"]["num_requests"] == 6


def test_a_run_whose_requests_are_all_refused_has_tables_of_the_same_columns(
    place, served, tmp_path
) -> None:
    settings = ServeSettings((place / "family",), ("ee-single",), device="cpu", limit=2)
    changes = ["workload.prompt={kind='constant',tokens=256}"]
    (one,) = serve(place / "tiny.toml", tmp_path / "run", settings, changes)
    assert one.summary["num_refused"] == 2
    for name in ("iterations.parquet", "tokens.parquet"):
        found = pl.read_parquet(one.folder / name)
        assert found.height == 0
        assert found.schema == pl.read_parquet(served / name).schema


def test_free_running_feeds_a_model_its_own_tokens(place) -> None:
    settings = ServeSettings(
        (place / "family" / "large", place / "family" / "small"),
        ("ee-single",),
        device="cpu",
        free_running=True,
        duration_s=0.1,
    )
    (one,) = serve(place / "tiny.toml", place / "free", settings)
    run = read_run(one.folder)
    assert run.environment["tokens"] == "free-running"
    assert 0 < run.requests.height < 30
    tokens = pl.read_parquet(one.folder / "tokens.parquet")
    # The likelihood of a model's own most likely token is never below that of an even guess.
    assert (tokens["nll_nats"] <= math.log(256) + 1e-6).all()


def test_a_static_batch_in_blocks_finds_room_however_many_of_its_rows_leave_one_by_one(
    place, tmp_path
) -> None:
    """Memory runs dry for eight rows, then for seven, and so on to the last."""
    spec = model_of("small", (2, 4), seed=1).spec
    blocks = 24
    memory = spec.weight_bytes(4) + blocks * spec.kv_bytes_per_token(4)
    changes = [
        "serving.batching=static",
        "serving.block_tokens=1",
        "serving.max_batch=8",
        "serving.watermark=0.0",
        "serving.expected_prompt_tokens=1",
        "fleet.candidates=['small']",
        f"fleet.memory_bytes={memory}",
        "fleet.memory_utilisation=1.0",
        "workload.num_requests=8",
        "workload.arrivals.rate_per_s=1e6",
        "workload.prompt={kind='constant',tokens=1}",
        f"workload.output={{kind='constant',tokens={blocks}}}",
    ]
    settings = ServeSettings((place / "family",), ("ee-single",), device="cpu", kv="pages")
    (one,) = serve(place / "tiny.toml", tmp_path / "run", settings, changes)
    assert one.summary["completed"] == 8
    assert one.summary["num_preemptions"] >= 7


def test_a_served_run_has_the_folder_of_the_simulated_one(tmp_path) -> None:
    labels = ["early_exit", "HELIOS, RI 600", "helios ri 600"]
    names = ["early_exit", "helios-ri-600", "helios-ri-600-2"]
    assert places_of(tmp_path, labels, 1) == [tmp_path / name for name in names]
    assert places_of(tmp_path, labels[:1], 2) == [tmp_path / f"repeat-{k}" for k in (1, 2)]


def test_every_exit_is_asked_before_the_clock_starts(place, monkeypatch) -> None:
    asked = set()
    tell = EarlyExitLM.tell

    def noted(model, logits, level, targets=None):
        asked.add((model.name, level, targets is None))
        return tell(model, logits, level, targets)

    def started(host) -> None:
        raise InputError("The clock starts.")

    monkeypatch.setattr(EarlyExitLM, "tell", noted)
    monkeypatch.setattr("calibration.serving.host.Host.play", started)
    for kv in ("slots", "pages"):
        asked.clear()
        settings = ServeSettings((place / "family",), ("helios",), device="cpu", kv=kv)
        with pytest.raises(InputError, match="The clock starts"):
            serve(place / "tiny.toml", place / "begun", settings)
        exits = [("small", level) for level in range(2)] + [("large", level) for level in range(3)]
        assert asked == {(*one, without) for one in exits for without in (False, True)}


def test_pages_are_taken_where_slots_would_hold_fewer_rows_than_may_run(place, tmp_path) -> None:
    """A slot has room for the longest request, and blocks are admitted by what a request has."""
    short = ["fleet.memory_bytes=1790000"]
    said: list[str] = []
    choices: tuple[KvChoice, ...] = ("auto", "slots")
    batches = {}
    for kv in choices:
        settings = ServeSettings((place / "family",), ("ee-single",), device="cpu", kv=kv)
        faster = [*short, "workload.arrivals.rate_per_s=2000.0"]
        (one,) = serve(place / "tiny.toml", tmp_path / kv, settings, faster, tell=said.append)
        run = read_run(one.folder)
        assert run.environment["kv"] == {"auto": "pages"}.get(kv, kv)
        batches[kv] = one.summary["mean_batch_size"]
    assert any(told.startswith("Serving from pages: ") for told in said)
    assert any(told.startswith("Warning: only ") for told in said)
    assert batches["slots"] < batches["auto"]


def test_slots_are_taken_where_they_hold_all_rows(served) -> None:
    assert read_run(served).environment["kv"] == "slots"


def test_weights_arrive_beside_serving_where_the_device_allows_it(place, monkeypatch) -> None:
    monkeypatch.setattr("calibration.serving.weights.CheckpointWeights.overlaps", True)
    (one,) = serve(
        place / "tiny.toml",
        place / "beside",
        ServeSettings((place / "family",), ("helios",), device="cpu"),
        ["workload.arrivals.rate_per_s=2000.0"],
    )
    run = read_run(one.folder)
    assert run.environment["loads"] == "beside serving"
    assert (run.requests["generated_tokens"] == run.requests["output_tokens"]).all()
    ready = run.decisions["ready_s"] - run.decisions["time_s"]
    assert (ready >= 0.0).all()


def test_a_load_that_fails_beside_serving_ends_the_run_with_its_reason(place, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise InputError("The disk went away.")

    # All requests are there from the start, so that some run whenever weights are asked for.
    monkeypatch.setattr("calibration.serving.weights.CheckpointWeights.overlaps", True)
    monkeypatch.setattr("calibration.serving.weights.CheckpointWeights.load_beside", broken)
    with pytest.raises(InputError, match="The disk went away"):
        serve(
            place / "tiny.toml",
            place / "broken",
            ServeSettings((place / "family",), ("helios",), device="cpu"),
            ["workload.arrivals.rate_per_s=1e6"],
        )
    assert not (place / "broken").exists()


def test_threads_are_those_the_profile_was_measured_with_unless_others_are_asked_for() -> None:
    shipped = load_profile("small-family-cpu")
    cpu = torch.device("cpu")
    number, why = threads_of(ServeSettings(()), shipped, cpu)
    assert number == shipped.provenance.environment["threads"] == 1
    assert why.startswith("Serving with 1 thread, as profile 'small-family-cpu' was measured")
    assert threads_of(ServeSettings((), threads=3), shipped, cpu)[0] == 3
    unsaid = load_profile("opt-a100-40gb")
    number, why = threads_of(ServeSettings(()), unsaid, cpu)
    assert number is None
    assert why.startswith("Warning: profile 'opt-a100-40gb' does not say")
    assert "Warning" not in threads_of(ServeSettings(()), unsaid, torch.device("cuda"))[1]


def test_serving_says_its_threads_and_gives_torch_back_its_own(place, tmp_path) -> None:
    before, told_of = torch.get_num_threads(), []
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=2, threads=1)
    (one,) = serve(place / "tiny.toml", tmp_path / "run", settings, tell=told_of.append)
    assert told_of[0] == "Serving with 1 thread, as asked."
    assert read_run(one.folder).environment["threads"] == 1
    assert torch.get_num_threads() == before


def test_a_processor_short_of_memory_keeps_no_copy_of_the_weights(
    place, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("calibration.serving.weights.available_bytes", lambda _: 1 << 20)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=4)
    (one,) = serve(place / "tiny.toml", tmp_path / "run", settings)
    assert read_run(one.folder).environment["host_copies"] == []


def test_a_run_names_candidates_whose_first_load_may_not_meet_the_disk(
    place, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        "calibration.serving.weights.forget", lambda files: "large" not in str(files[0])
    )
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=4)
    for start, named in (("disk", ["large"]), ("host", [])):
        change = (f"fleet.weights_start={start}",)
        (one,) = serve(place / "tiny.toml", tmp_path / start, settings, change)
        assert read_run(one.folder).environment["in_system_cache"] == named


def test_within_the_clock_a_first_load_reads_the_file_once_and_copies(
    place, tmp_path, monkeypatch
) -> None:
    """Memory for it, its modules and the guard's consent are there before, as a link charges it."""
    serving: list[str] = []
    seen: list[str] = []
    read: dict[tuple[str, int], int] = {}

    def noted(where: str) -> None:
        owner, _, name = where.rpartition(".")
        original = getattr(pkgutil.resolve_name(owner), name)

        def note(*arguments, **named):
            if serving:
                seen.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(where, note)

    def read_into(entry, target) -> None:
        if serving:
            at = entry.path.parent.name, entry.begin
            read[at] = read.get(at, 0) + 1
        return original_read(entry, target)

    def play(host) -> None:
        serving.append("now")
        original_play(host)
        serving.clear()

    original_read, original_play = checkpoint.read_into, Host.play
    monkeypatch.setattr(checkpoint, "read_into", read_into)
    monkeypatch.setattr(Host, "play", play)
    for where in (
        "calibration.model.checkpoint.open_checkpoint",
        "calibration.model.early_exit.EarlyExitLM._check_guard",
        "calibration.model.family.LlamaBackbone.new_layer",
        "calibration.model.host_copy.HostCopy.__init__",
        "calibration.serving.weights.read_through",
    ):
        noted(where)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=12)
    (one,) = serve(place / "tiny.toml", tmp_path / "run", settings)
    assert set(read_run(one.folder).decisions["model"]) == {"small", "large"}
    assert seen == []
    entries = {
        (name, entry.begin)
        for name in ("small", "large")
        for entry in checkpoint.read_header(place / "family" / name / "model.safetensors").values()
    }
    assert read == dict.fromkeys(entries, 1)


def test_a_run_keeps_the_machines_pace_around_it_and_how_much_slower_it_is(
    place, served, tmp_path, monkeypatch
) -> None:
    environment = read_run(served).environment
    assert set(environment["pace_before"]) == set(environment["pace_after"])
    assert min(environment["pace_before"].values()) > 0.0

    document = json.loads((place / "profile" / "profile.json").read_text())
    document["provenance"].setdefault("environment", {})["pace"] = {"core_s": 2.0, "memory_s": 4.0}
    told = save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    assert measured_pace(told) == Pace(2.0, 4.0)
    paces = iter([Pace(2.0, 4.4), Pace(2.5, 4.0)])
    monkeypatch.setattr("calibration.serving.serve.measure_pace", lambda _: next(paces))
    monkeypatch.setattr("calibration.serving.serve.waited_s", lambda: None)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=2)
    scenario = tmp_path / "tiny.toml"
    scenario.write_text((place / "tiny.toml").read_text())
    (one,) = serve(scenario, tmp_path / "run", settings)
    assert one.slowdown == read_run(one.folder).environment["slowdown"] == 1.25
    assert line_of(one).endswith("slowdown 1.25")
    assert "waited_s" not in read_run(one.folder).environment


def test_the_slowdown_counts_what_the_thread_waited_for_a_processor_too(place) -> None:
    quiet = Pace(2.0, 4.0)
    profile = load_profile("opt-a100-40gb")
    facts = slowdown_facts(profile, quiet, quiet, waited=2.0, worked_s=10.0)
    assert (facts["waited_s"], facts["slowdown"]) == (2.0, 1.25)
    assert "slowdown" not in slowdown_facts(profile, quiet, quiet, None, 10.0)
    assert slowdown_facts(profile, quiet, quiet, 9.0, 3.0)["slowdown"] == pytest.approx(100.0)
    environment = {"pace": {"core_s": 1.0, "memory_s": 4.0}}
    told = replace(profile, provenance=replace(profile.provenance, environment=environment))
    assert slowdown_facts(told, quiet, quiet, 2.0, 10.0)["slowdown"] == 2.0
    assert waited_s() is None or waited_s() >= 0.0


def test_a_run_keeps_the_pace_it_was_served_at(served) -> None:
    """The profile of these tests was not measured, so that it has no pace to hold against it."""
    environment = read_run(served).environment
    assert environment["pace_during"]["looks"] >= 1
    assert environment["pace_during"]["core_s"] > 0.0
    assert "pace_factor" not in environment


def test_where_threads_share_the_work_nobody_looks_at_a_core(place, tmp_path) -> None:
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=2, threads=2)
    (one,) = serve(place / "tiny.toml", tmp_path / "run", settings)
    assert "pace_during" not in read_run(one.folder).environment


def test_a_run_is_held_against_the_pace_that_its_profile_was_measured_at(
    place, tmp_path, monkeypatch
) -> None:
    document = json.loads((place / "profile" / "profile.json").read_text())
    document["provenance"].setdefault("environment", {})["reference_s"] = 4.0
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    monkeypatch.setattr("calibration.measuring.pace.Reference.core_look_s", lambda self: 5.0)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=2)
    scenario = tmp_path / "tiny.toml"
    scenario.write_text((place / "tiny.toml").read_text())
    (one,) = serve(scenario, tmp_path / "run", settings)
    assert read_run(one.folder).environment["pace_factor"] == 1.25


def test_looks_between_iterations_are_a_tenth_of_a_second_apart(monkeypatch) -> None:
    class Known:
        seconds = 2.0

        def core_look_s(self) -> float:
            self.seconds += 1.0
            return self.seconds

    now_s = iter([5.0, 5.05, 5.11, 5.2, 5.22])
    monkeypatch.setattr("calibration.serving.slowdown.time.perf_counter", lambda: next(now_s))
    companion = Companion(Known())
    profile = load_profile("opt-a100-40gb")
    assert companion.facts(profile) == {}
    for _ in range(5):
        companion.between_iterations()
    assert companion.looks_s == [3.0, 4.0, 5.0]
    assert companion.facts(profile) == {"pace_during": {"core_s": 4.0, "looks": 3}}
    provenance = replace(profile.provenance, environment={"reference_s": 3.2})
    assert companion.facts(replace(profile, provenance=provenance))["pace_factor"] == 1.25


def test_a_package_without_a_version_is_missed_before_anything_is_served(
    place, tmp_path, monkeypatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("calibration.serving.prepared.version", missing)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu")
    with pytest.raises(InputError, match="torch is not installed here"):
        prepare(place / "tiny.toml", settings)


def test_several_runs_are_not_written_into_a_run(place, served) -> None:
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", repeat=2)
    with pytest.raises(InputError, match="This is a run"):
        serve(place / "tiny.toml", served, settings)


def test_a_run_that_was_served_is_replaced_only_where_asked_to(
    place, tmp_path, capsys, monkeypatch
) -> None:
    """Without --overwrite all of them are named before anything is served."""
    out = tmp_path / "runs"
    command = (str(place / "tiny.toml"), "--checkpoints", str(place / "family"), "--out", str(out))
    command += ("--policy", "helios", "--limit", "2", "--device", "cpu", "--repeat", "2")
    assert told(capsys, *command)[0] == 0
    before = [(out / name / "totals.json").read_bytes() for name in ("repeat-1", "repeat-2")]
    with monkeypatch.context() as patched:
        patched.setattr("calibration.serving.serve.serve_once", None)
        code, said = told(capsys, *command)
    assert code == 2
    named = f"{out / 'repeat-1'}, {out / 'repeat-2'}; give another --out, or --overwrite to replace"
    assert named in said
    assert [
        (out / name / "totals.json").read_bytes() for name in ("repeat-1", "repeat-2")
    ] == before
    assert told(capsys, *command, "--overwrite")[0] == 0
    assert (out / "repeat-1" / "totals.json").read_bytes() != before[0]


def test_requests_of_a_log_are_served_with_text_of_the_domain_that_it_tells(
    place, tmp_path
) -> None:
    """Also where fewer are served than the log holds."""
    rows = [(0, "chat"), (1, "code"), (2, "chat"), (3, "code")]
    text = "".join(f"{at},{10 + at},2,{use}\n" for at, use in rows)
    (tmp_path / "log.csv").write_text(f"at,in,out,use\n{text}")
    columns = '{ arrival = "at", prompt = "in", output = "out", domain = "use" }'
    log = (
        f'{{ file = "{tmp_path / "log.csv"}", columns = {columns}, domains = {{chat = "prose"}} }}'
    )
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=3)
    prepared = prepare(place / "tiny.toml", settings, [f"workload={{ trace = {log} }}"])
    found = prepared.requests
    assert [found.domains[one] for one in found.domain.tolist()] == ["prose", "code", "prose"]
    ids = {name: corpus(name, "validation").data for name in ("prose", "code")}
    for piece, name in zip(prepared.texts, ("prose", "code", "prose"), strict=True):
        assert bytes(piece) in bytes(ids[name])


def test_a_served_run_is_kept_where_its_page_cannot_be_written(
    place, tmp_path, capsys, monkeypatch
) -> None:
    """The command that is named draws it."""

    def too_large(target: Path, content: bytes) -> None:
        raise OSError(errno.EFBIG, "File too large")

    out = tmp_path / "run"
    command = (str(place / "tiny.toml"), "--checkpoints", str(place / "family"), "--out", str(out))
    with monkeypatch.context() as patched:
        patched.setattr("helios_sim.report.page_files.write_whole", too_large)
        code, said = told(capsys, *command, "--policy", "helios", "--limit", "2", "--device", "cpu")
    assert code == 2
    assert f"{out}: The page cannot be written: File too large. 1 run of 1 is kept without" in said
    assert f"helios report {out} draws it" in said
    assert read_run(out).requests.height == 2
    assert not (out / "report.html").exists()
    with pytest.raises(SystemExit):
        simulator(["report", str(out)])
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("repeat", [1, 2])
def test_a_folder_that_cannot_be_made_is_missed_before_anything_is_served(
    place, tmp_path, monkeypatch, repeat
) -> None:
    monkeypatch.setattr("calibration.serving.serve.serve_once", None)
    (tmp_path / "file").write_text("text")
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", repeat=repeat)
    out = tmp_path / "file" / "run" if repeat == 1 else tmp_path / "file"
    with pytest.raises(InputError, match="file is a file, so that no folder can be in it"):
        serve(place / "tiny.toml", out, settings)


def test_an_interrupt_leaves_no_half_a_run(place, capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.serving.host.Host.emit", interrupted)
    code, said = told(
        capsys,
        str(place / "tiny.toml"),
        "--checkpoints",
        str(place / "family"),
        "--out",
        str(place / "never"),
        "--policy",
        "helios",
        "--device",
        "cpu",
    )
    assert code == 130
    assert "the run under way was not written" in said
    assert not (place / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "serving.batching=chunked"], 'serves "continuous" and "static"'),
        (["--set", "fleet.num_replicas=2"], "serves one replica"),
        (["--policy", "vanila"], "has no policy 'vanila'"),
        (["--device", "tpu"], "allowed are auto, cpu and cuda"),
        (["--kv", "pools"], "allowed are auto, slots, pages"),
        (["--set", "policy.0.use=clairvoyant", "--set", "policy.0.label=c"], "exits of tokens to"),
        (["--set", "workload.prompt={kind='constant',tokens=250}",
          "--set", "workload.over_context=error"], "more than the 256 positions"),
        (["--set", "workload.arrivals={kind='closed',num_users=2,think_s=1}", "--duration", "1"],
         "seconds cannot cut it; give --limit"),
        (["--set", "workload.arrivals={kind='closed',num_users=4,think_s=1}", "--limit", "3"],
         "3 requests are fewer than the closed loop's 4 users"),
        (["--set", "measure.warmup_requests=5", "--limit", "5"], "leaves none of the 5 requests"),
    ],
    ids=lambda one: str(one)[:30],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_a_sentence(place, capsys, arguments, said) -> None:
    if "policy.0.use=clairvoyant" in arguments:
        text = SCENARIO.format(policies='[[policy]]\nuse = "clairvoyant"\n')
        (place / "future.toml").write_text(text)
        arguments, scenario = [], place / "future.toml"
    else:
        scenario = place / "tiny.toml"
    out = place / "refused"
    code, error = told(
        capsys,
        str(scenario),
        "--checkpoints",
        str(place / "family"),
        "--out",
        str(out),
        *arguments,
    )
    assert code == 2
    assert said in error
    assert not out.exists()


def test_a_candidate_without_a_checkpoint_is_named(place, capsys) -> None:
    code, error = told(
        capsys,
        str(place / "tiny.toml"),
        "--checkpoints",
        str(place / "family" / "small"),
        "--out",
        str(place / "refused"),
    )
    assert code == 2
    assert "candidate 'large' has no checkpoint" in error


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer", "words", "tokenizer is words"),
        ("exit_layers", [1, 4], "exit_layers is [1, 4]"),
        ("confidence", {"kind": "top2-margin", "threshold": 0.5}, "confidence is top2-margin"),
    ],
)
def test_another_model_than_the_profiles_is_refused(place, tmp_path, key, value, said) -> None:
    paths = family(tmp_path / "family")
    file = paths["small"] / "early_exit.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value, "guard": None}))
    settings = ServeSettings((tmp_path / "family",), device="cpu")
    with pytest.raises(InputError, match=said.replace("[", r"\[")):
        serve(place / "tiny.toml", tmp_path / "run", settings)


@pytest.mark.parametrize(
    ("kind", "held", "said"),
    [
        ("max-softmax", "{ }", r"tokenizer is sha256:\w{16} and that of 'small' .* is sha256:"),
        ("entropy", "{}", "confidence is max-softmax and that of 'small' .* is entropy"),
        ("max-softmax", "{}", None),
    ],
)
def test_a_checkpoint_without_settings_is_compared_by_its_files_and_the_default_confidence(
    place, tmp_path, kind, held, said
) -> None:
    for path in family(tmp_path / "family").values():
        (path / "early_exit.json").unlink()
        (path / "tokenizer.json").write_text("{}")
    name = open_checkpoint(path).tokenizer
    (tmp_path / "family" / "small" / "tokenizer.json").write_text(held)
    document = json.loads((place / "profile" / "profile.json").read_text())
    for model in document["models"].values():
        model["tokenizer"] = name
        model["confidence"]["kind"] = kind
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    profile = load_profile(tmp_path / "profile")
    found = open_checkpoint(tmp_path / "family" / "small")
    with nullcontext() if said is None else pytest.raises(InputError, match=said):
        check_checkpoint("small", found, profile)


def test_a_checkpoint_that_nobody_asks_for_may_be_unsupported(place, tmp_path) -> None:
    paths = family(tmp_path / "family")
    other = tmp_path / "family" / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    settings = ServeSettings((tmp_path / "family",), device="cpu")
    assert prepare(place / "tiny.toml", settings).folders == paths
    with pytest.raises(InputError, match="holds neither model"):
        checkpoint.find_checkpoints([tmp_path / "family"])
    shutil.rmtree(paths["small"])
    with pytest.raises(InputError, match="'small' has no checkpoint; given are 'large', 'other'"):
        prepare(place / "tiny.toml", settings)


def test_exits_that_a_checkpoint_does_not_name_itself_are_the_profiles(place, tmp_path) -> None:
    file = family(tmp_path / "family")["small"] / "early_exit.json"
    chosen = {"exit_layers": [1, 4], "exits_chosen": True, "guard": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | chosen))
    settings = ServeSettings((tmp_path / "family",), device="cpu")
    assert prepare(place / "tiny.toml", settings).folders["small"] == file.parent


def test_a_model_is_served_with_fewer_of_its_exits(place, tmp_path) -> None:
    kept = {"large": (2, 6)}
    write_with_exits(load_profile(place / "profile"), "fewer", kept, tmp_path / "fewer")
    wait = '[[policy]]\nuse = "ee-single"\nmodel = "large"\nexit_mode = "wait"\n'
    scenario = SCENARIO.format(policies=wait).replace('profile = "profile"', 'profile = "fewer"')
    (tmp_path / "fewer.toml").write_text(scenario)
    serve(tmp_path / "fewer.toml", tmp_path / "run", ServeSettings((place / "family",), limit=8))
    assert read_traces(tmp_path / "run" / "exits.parquet").exit_layers["large"] == (2, 6)
    left = set(pl.read_parquet(tmp_path / "run" / "tokens.parquet")["exit_level"])
    assert left == {0, 1}


def test_of_another_shape_what_differs_is_named(place, tmp_path) -> None:
    paths = family(tmp_path / "family")
    file = paths["small"] / "config.json"
    config = json.loads(file.read_text())
    longer = 2 * config["max_position_embeddings"]
    file.write_text(json.dumps(config | {"max_position_embeddings": longer}))
    settings = ServeSettings((tmp_path / "family",), device="cpu")
    said = (
        rf"shape is max_positions {longer} and that of 'small' in profile .* is max_positions \d+;"
    )
    with pytest.raises(InputError, match=said):
        serve(place / "tiny.toml", tmp_path / "run", settings)


def test_a_profile_whose_kv_takes_other_bytes_than_its_weights_is_refused(place, tmp_path) -> None:
    """The pool that is made would take other bytes than the one that is planned."""
    folder = tmp_path / "profile"
    shutil.copytree(place / "profile", folder)
    document = json.loads((folder / "profile.json").read_text())
    document["models"]["large"]["bytes_per_kv_element"] = 2
    (folder / "profile.json").write_text(json.dumps(document))
    settings = ServeSettings((place / "family",), device="cpu")
    said = "'large' has 4 bytes a parameter and 2 bytes a KV element .* both must be alike"
    with pytest.raises(InputError, match=said):
        prepare(place / "tiny.toml", settings, [f"fleet.profile='{folder}'"])


@pytest.mark.parametrize("domain", ["all", "code"])
def test_calibrated_confidence_is_served_and_only_that_of_all_domains(
    place, tmp_path, domain
) -> None:
    """A map that says 0.75 of everything: so do tokens and traces, and 0.75 leaves at once."""
    sure = {"2": [[0.0, 1.0], [0.75, 0.75]]}
    for path in family(tmp_path / "family").values():
        file = path / "early_exit.json"
        told_by = json.loads(file.read_text())
        told_by["confidence"] |= {"calibration": {domain: sure}}
        file.write_text(json.dumps(told_by))
    document = json.loads((place / "profile" / "profile.json").read_text())
    for model in document["models"].values():
        model["confidence"]["kind"] = "calibrated-max-softmax"
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    scenario = tmp_path / "tiny.toml"
    scenario.write_text((place / "tiny.toml").read_text())
    settings = ServeSettings((tmp_path / "family",), ("ee-single",), device="cpu", limit=4)
    changes = ["policy.1.confidence_threshold=0.75"]
    if domain == "code":
        with pytest.raises(InputError, match="calibrated for code alone"):
            serve(scenario, tmp_path / "run", settings, changes)
        return
    (one,) = serve(scenario, tmp_path / "run", settings, changes)
    decoded = pl.read_parquet(one.folder / "tokens.parquet").filter(~pl.col("prefilled"))
    assert decoded.height > 0
    assert set(decoded["exit_level"]) == {0}
    assert decoded["confidence"].to_list() == pytest.approx([0.75] * decoded.height)
    traces = read_traces(one.folder / "exits.parquet")
    assert traces.confidence["small"][..., 0] == pytest.approx(0.75)
    assert not np.allclose(traces.confidence["small"][..., 1], 0.75)


@pytest.mark.parametrize(
    ("named", "num_bytes", "wanted"),
    [
        (None, 4, torch.float32),
        (None, 2, torch.bfloat16),
        ("bfloat16", 2, torch.bfloat16),
        ("float16", 2, torch.float16),
        ("float16", 4, "in 'float16' and has 4 bytes a parameter; of that size float32 can be"),
        ("int8", 2, "in 'int8' and has 2 bytes a parameter; of that size bfloat16, float16 can"),
    ],
)
def test_models_are_served_in_the_type_that_the_profile_was_measured_in(
    place, tmp_path, named, num_bytes, wanted
) -> None:
    document = json.loads((place / "profile" / "profile.json").read_text())
    for entry in document["models"].values():
        entry |= {"bytes_per_param": num_bytes, "bytes_per_kv_element": num_bytes}
    if named is not None:
        document["provenance"].setdefault("environment", {})["dtype"] = named
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    (tmp_path / "tiny.toml").write_text((place / "tiny.toml").read_text())
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=2)
    if isinstance(wanted, torch.dtype):
        assert prepare(tmp_path / "tiny.toml", settings).dtype is wanted
        if wanted is torch.float16:
            (one,) = serve(tmp_path / "tiny.toml", tmp_path / "run", settings)
            assert read_run(one.folder).environment["dtype"] == "float16"
            assert one.summary["completed"] == 2
        return
    with pytest.raises(InputError, match=wanted):
        prepare(tmp_path / "tiny.toml", settings)


def test_kernels_are_told_apart_of_a_model_that_has_an_at_sign_in_its_name() -> None:
    document = {
        "measurement": {"models": {"chat@v2": {"kernels": {"fusion": "usable: it agrees"}}}}
    }
    profile = replace(profile_of(thumbnail("chat@v2")), document=document)
    (note,) = other_kernels(profile, {"chat@v2@4": {"fusion": "not usable: no GPU"}})
    assert note.startswith("chat@v2@4 was served with the kernel 'fusion' not usable: no GPU")


def test_a_run_says_which_kernels_it_took_and_warns_where_the_profile_had_others(
    place, served, tmp_path
) -> None:
    kernels = read_run(served).environment["kernels"]
    assert {name.partition("@")[0] for name in kernels} == {"small", "large"}
    assert set(kernels["large@6"]) == {"fusion", "flash", "telling", "varlen"}
    document = json.loads((place / "profile" / "profile.json").read_text())
    had = kernels["large@6"] | {"fusion": "usable: it agrees", "varlen": "usable: it agrees"}
    document["measurement"] = {"models": {"large": {"kernels": had}}}
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    (tmp_path / "tiny.toml").write_text((place / "tiny.toml").read_text())
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=4)
    heard: list[str] = []
    serve(tmp_path / "tiny.toml", tmp_path / "run", settings, tell=heard.append)
    warned = [said for said in heard if "the kernel" in said]
    assert warned
    assert all(said.startswith("Warning: large@") for said in warned)
    assert all("the kernel 'fusion' not usable: " in said for said in warned)
    assert warned[0].endswith("was measured it was usable: it agrees.")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda guard: guard, None),
        (lambda guard: guard | {"logits_sums": [None, *guard["logits_sums"][1:]]}, None),
        (lambda guard: guard | {"token_ids": guard["token_ids"][::-1]}, None),
        (
            lambda guard: guard | {"logits_sums": [1.1 * one for one in guard["logits_sums"]]},
            "not those of the weights of 'small' that profile .* was measured with",
        ),
        (lambda guard: {"token_ids": 3}, "no guard as fit writes it"),
    ],
    ids=["the same", "partly known", "of other tokens", "other weights", "no guard"],
)
def test_weights_that_are_not_those_measured_are_refused(place, tmp_path, kept, said) -> None:
    found = open_checkpoint(place / "family" / "small")
    assert found.settings is not None and found.settings.guard is not None
    document = json.loads((place / "profile" / "profile.json").read_text())
    guard = kept(found.settings.guard.to_json())
    document["measurement"] = {"models": {"small": {"guard": guard}}}
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    with nullcontext() if said is None else pytest.raises(InputError, match=said):
        check_checkpoint("small", found, load_profile(tmp_path / "profile"))


@pytest.mark.parametrize("told", ["the same", "others", "none", "no candidate", "no traces"])
def test_maps_that_are_not_those_traced_are_refused_where_the_profile_tells_them(
    place, tmp_path, told
) -> None:
    path = family(tmp_path / "family")["small"]
    maps = {"all": {2: PiecewiseLinear((0.0, 1.0), (0.25, 0.75))}}
    confidence = Confidence("max-softmax", 0.5, maps)
    update_settings(path, confidence=confidence)
    found = open_checkpoint(path)
    document = json.loads((place / "profile" / "profile.json").read_text())
    document["models"]["small"]["confidence"]["kind"] = "calibrated-max-softmax"
    hashes = {"the same": confidence.maps_sha256, "others": "0" * 64, "none": None}
    said = {"small": {"maps_sha256": hashes[told]}} if told in hashes else {}
    traces = {} if told == "no traces" else {"exit_traces": {"candidates": said}}
    document["measurement"] = traces
    save_profile(document, tmp_path / "profile", traces=place / "profile" / "exits.parquet")
    refused = pytest.raises(InputError, match=r"maps .*'small' in profile .* trace it again")
    with refused if told == "others" else nullcontext():
        check_checkpoint("small", found, load_profile(tmp_path / "profile"))


def test_a_run_is_never_written_over_something_else(place, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    settings = ServeSettings((place / "family",), ("helios",), device="cpu")
    with pytest.raises(InputError, match="not a run"):
        serve(place / "tiny.toml", tmp_path, settings)


def test_the_documentation_names_every_column_of_the_extra_files(served) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in ("iterations", "tokens"):
        columns = pl.read_parquet(served / f"{name}.parquet").columns
        assert [column for column in columns if f"`{column}`" not in page] == []


def test_prompts_are_contiguous_pieces_of_the_held_out_text(place) -> None:
    prompts = read_prompts(("code", "prose"), ByteTokenizer())
    requests = requests_of(
        [0.0, 1.0, 2.0],
        [50, 20, 900],
        [10, 30, 200],
        trace_start=[12345, 99, 7],
        domain=[0, 1, 0],
        domains=("code", "prose"),
    )
    first, second, beyond = prompts.pieces(requests, context_tokens=256)
    assert (len(first), len(second), beyond) == (60, 50, [])
    assert bytes(first) in corpus("code", "validation").data
    assert bytes(second) in corpus("prose", "validation").data
    assert prompts.pieces(requests, context_tokens=256)[0] == first


def test_prompts_longer_than_the_text_and_domains_without_one_are_refused() -> None:
    prompts = Prompts("bytes", {"code": np.zeros(40, np.int64)}, {"code": ""})
    requests = requests_of([0.0], [50], [10], domains=("code",))
    with pytest.raises(InputError, match="has 60 tokens of prompt and output"):
        prompts.pieces(requests, context_tokens=256)
    with pytest.raises(InputError, match="of which there is no text"):
        read_prompts(("poetry",), ByteTokenizer())


def test_a_tokenizer_of_more_ids_than_the_model_has_is_refused(place, tmp_path) -> None:
    """The embedding would end the run in a traceback, and on a GPU the process."""
    models = [
        from_stock(stock_model("llama", vocab_size=vocab), (2, 4), name=name, tokenizer="bytes")
        for name, vocab in (("large", 256), ("small", 100))
    ]
    for model in models:
        save(model, tmp_path / "family" / model.spec.name)
    write_profile(tmp_path / "profile", models, 0.5)
    (tmp_path / "tiny.toml").write_text((place / "tiny.toml").read_text())
    settings = ServeSettings((tmp_path / "family",), ("helios",), device="cpu")
    with pytest.raises(InputError, match=r"'bytes' gives the id 1.. and the model knows 100"):
        prepare(tmp_path / "tiny.toml", settings)


def test_candidates_of_several_tokenizers_meet_no_common_text(place, tmp_path) -> None:
    models = [
        from_stock(stock_model("llama"), (2, 4), name=name, tokenizer=tokenizer)
        for name, tokenizer in (("large", "bytes"), ("small", "words"))
    ]
    for model in models:
        save(model, tmp_path / "family" / model.spec.name)
    write_profile(tmp_path / "profile", models, 0.5)
    (tmp_path / "tiny.toml").write_text((place / "tiny.toml").read_text())
    settings = ServeSettings((tmp_path / "family",), ("helios",), device="cpu")
    with pytest.raises(InputError, match=r"several tokenizers: 'bytes' .*large.*'words' .*small"):
        prepare(tmp_path / "tiny.toml", settings)


def test_a_tokenizer_whose_files_are_missing_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        tokenizer_of("llama", tmp_path, vocab=256)


CONTROLS = ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("is_one_file", [True, False])
def test_control_tokens_that_a_text_spells_out_are_characters(tmp_path, is_one_file) -> None:
    """A prompt that speaks of the end of a text does not end there."""
    stock = tokenizers.Tokenizer(tokenizers.models.BPE())
    stock.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=list(CONTROLS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stock.train_from_iterator(["the end"], trainer)
    if is_one_file:
        stock.save(str(tmp_path / "tokenizer.json"))
    else:
        stock.model.save(str(tmp_path))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    spelt = "<s>the</s><unk>"
    ids = tokenizer_of("words", tmp_path, vocab=300).encode(spelt.encode()).tolist()
    assert not {stock.token_to_id(name) for name in CONTROLS} & set(ids)
    assert "".join(stock.id_to_token(number) for number in ids) == spelt


class Steady:
    """A meter of 10 W, with a reading every 10 ms of a clock that the test sets."""

    source, explanation, tick_s, min_window_s = "steady", "ten watts", 0.0, 0.0

    def open(self, sparing: bool = False) -> Steady:
        return self

    def curve(self) -> list[tuple[float, float]]:
        return [(100.0 + k / 100, k / 10) for k in range(1000)]

    def close(self, busy_s: float | None = None) -> Measurement:
        return Measurement("steady", 99.9, 9.99, 10.0, 10.0, 999, True, False)


@pytest.mark.parametrize("meter", [NvmlCounter, NvmlPower])
def test_a_meter_around_the_run_gives_its_energy_interval_by_interval(
    place, monkeypatch, meter
) -> None:
    board = open_board(nvml=FakeNvml(watts=200.0, tick_s=0.02))
    assert isinstance(board, Board)
    monkeypatch.setattr("calibration.serving.serve.best_meter", lambda *_: meter(board))
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=12)
    (one,) = serve(place / "tiny.toml", place / f"metered-{meter.__name__}", settings)
    run = read_run(one.folder)
    totals = run.totals
    assert totals.energy_j == pytest.approx(200.0 * totals.end_s, rel=0.15)
    assert totals.energy_idle_j + totals.energy_load_j < totals.energy_j
    assert run.timeline["power_w"].null_count() == 0
    assert one.summary["average_gpu_power"] == pytest.approx(200.0, rel=0.15)


def test_a_policy_may_choose_by_energy_where_a_meter_is(place, monkeypatch) -> None:
    board = open_board(nvml=FakeNvml(watts=200.0, tick_s=0.02))
    assert isinstance(board, Board)
    monkeypatch.setattr("calibration.serving.serve.best_meter", lambda *_: NvmlPower(board))
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=8)
    by_energy = ['policy.0.objective="energy"']
    (one,) = serve(place / "tiny.toml", place / "by-energy", settings, by_energy)
    log = read_run(one.folder).decisions
    snapshots = read_snapshots(log["replica"], log["snapshot"])
    told = [snapshot.telemetry for snapshot in snapshots if snapshot.telemetry]
    assert sum(telemetry.energy_j for telemetry in told) > 0.0


@pytest.mark.parametrize("lasting", [0, 1])
def test_a_meter_that_stops_answering_gives_the_joules_of_the_other_or_none(
    place, monkeypatch, lasting
) -> None:
    nvml = FakeNvml(watts=200.0, tick_s=0.02)
    board = open_board(nvml=nvml)
    assert isinstance(board, Board)
    meter = CrossChecked(NvmlCounter(board), NvmlPower(board))
    monkeypatch.setattr("calibration.serving.serve.best_meter", lambda *_: meter)
    sources = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues")
    finish = Host.finish

    def failing(host: Host, row: Row, now_s: float) -> None:
        finish(host, row, now_s)
        if host.num_ended == 8:
            nvml.without = sources[: 2 - lasting]

    monkeypatch.setattr(Host, "finish", failing)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=30)
    by_energy = ['policy.0.objective="energy"']
    (one,) = serve(place / "tiny.toml", place / f"lasting-{lasting}", settings, by_energy)
    run = read_run(one.folder)
    log, totals = run.decisions, run.totals
    told = [snapshot.telemetry for snapshot in read_snapshots(log["replica"], log["snapshot"])]
    if lasting:
        assert totals.energy_j == pytest.approx(220.0 * totals.end_s, rel=0.15)
        assert all(telemetry.energy_j is not None for telemetry in told if telemetry)
        return
    assert "stopped answering" in run.environment["energy"]["absent"]
    for joules in (totals.energy_j, totals.energy_idle_j, totals.energy_load_j):
        assert math.isnan(joules)
    assert run.timeline["power_w"].null_count() == run.timeline.height
    assert one.summary["total_gpu_energy"] is None
    assert told[-1].energy_j is None


def test_no_thread_reads_the_meter_after_a_run_that_failed(place, monkeypatch) -> None:
    board = open_board(nvml=FakeNvml())
    assert isinstance(board, Board)
    monkeypatch.setattr("calibration.serving.serve.best_meter", lambda *_: NvmlPower(board))

    def interrupted(host: Host) -> None:
        assert "energy-meter" in {thread.name for thread in threading.enumerate()}
        raise KeyboardInterrupt

    monkeypatch.setattr(Host, "play", interrupted)
    settings = ServeSettings((place / "family",), ("helios",), device="cpu", limit=4)
    with pytest.raises(KeyboardInterrupt):
        serve(place / "tiny.toml", place / "interrupted", settings)
    assert "energy-meter" not in {thread.name for thread in threading.enumerate()}


def test_a_choice_by_energy_is_refused_without_a_meter_before_anything_is_loaded(
    place, monkeypatch
) -> None:
    monkeypatch.setattr("calibration.serving.serve.best_meter", lambda *_: NoMeter("none here"))
    monkeypatch.delattr("calibration.serving.weights.CheckpointWeights.prepare")
    settings = ServeSettings((place / "family",), ("helios",), device="cpu")
    with pytest.raises(InputError, match="no energy meter here; give it another objective"):
        serve(place / "tiny.toml", place / "unmetered", settings, ['policy.0.objective="energy"'])


def test_energy_is_read_at_any_time_of_the_run_between_two_readings() -> None:
    energy = RunEnergy(Steady())
    energy.open()
    energy.started(101.0)
    assert energy.drawn_so_far_j([(0.0, 0.5), (1.0, 2.0)]) == pytest.approx(15.0)
    assert energy.drawn_so_far_j([]) == 0.0
    energy.close(1.0)
    assert energy.at(2.005) - energy.at(0.0) == pytest.approx(20.05)
    without = RunEnergy(NoMeter("none here"))
    without.open()
    assert isinstance(without.close(1.0), Absence)
    assert math.isnan(without.at(0.5))


class Ticking:
    """A counter that moves every 100 ms, of a device that draws `watts` in each second by turns."""

    source, explanation, tick_s, min_window_s = "ticking", "ten ticks a second", 0.1, 0.0

    def __init__(self, *watts: float) -> None:
        self.watts = watts
        self.now_s = 0.0

    def joules(self, at_s: float) -> float:
        whole = int(at_s)
        drawn = sum(self.watts[second % len(self.watts)] for second in range(whole))
        return drawn + self.watts[whole % len(self.watts)] * (at_s - whole)

    def open(self, sparing: bool = False) -> Ticking:
        return self

    def curve(self) -> list[tuple[float, float]]:
        return [(k / 10, self.joules(k / 10)) for k in range(int(10 * self.now_s + 1e-9) + 1)]

    def close(self, busy_s: float | None = None) -> Absence:
        return Absence("ticking", "nobody asks")


@pytest.mark.parametrize("watts", [(200.0,), (100.0, 300.0)])
def test_what_a_short_period_is_told_lacks_nothing_that_was_drawn_since_the_last_tick(
    watts,
) -> None:
    meter = Ticking(*watts)
    energy = RunEnergy(meter)
    energy.open()
    energy.started(1.0)
    begin_s, told_j, drawn_j = 0.0, [], []
    for period in range(200):
        end_s = begin_s + 0.13 + 0.01 * (period % 7)
        meter.now_s = 1.0 + end_s
        told_j.append(energy.drawn_so_far_j([(begin_s, end_s)]))
        drawn_j.append(meter.joules(1.0 + end_s) - meter.joules(1.0 + begin_s))
        begin_s = end_s
    if len(watts) == 1:
        assert told_j == pytest.approx(drawn_j)
    assert sum(told_j) == pytest.approx(sum(drawn_j), rel=0.01)


class WorkingByTurns(Ticking):
    """20 ms at 300 W, then 30 ms at 120 W, over and over."""

    def joules(self, at_s: float) -> float:
        turns = int(at_s / 0.05 + 1e-9)
        since_s = at_s - 0.05 * turns
        return 9.6 * turns + 300.0 * min(since_s, 0.02) + 120.0 * max(0.0, since_s - 0.02)


def test_pauses_shorter_than_a_tick_are_told_the_joules_of_a_device_at_rest() -> None:
    """20 ms of work at 300 W and 30 ms of rest at 120 W by turns, counted every 100 ms.

    A straight line between ticks has 192 W throughout: rest would have 60 % more joules than it
    draws, and a policy would believe that much of its work for nothing.
    """
    meter = WorkingByTurns()
    energy = RunEnergy(meter)
    energy.open()
    energy.started(1.0)
    meter.now_s = 12.0
    rests = [(0.05 * k + 0.02, 0.05 * k + 0.05) for k in range(200)]
    assert energy.drawn_so_far_j(rests) == pytest.approx(192.0 * 6.0, rel=0.02)
    assert energy.drawn_so_far_j(rests, 120.0) == pytest.approx(120.0 * 6.0, rel=0.02)
    assert energy.drawn_so_far_j([(0.0, 10.0)], 120.0) == pytest.approx(1920.0, rel=0.02)
    # What is longer than two ticks is the counter's, and no more is told than was counted.
    assert energy.drawn_so_far_j([(0.0, 0.21)], 1.0) == pytest.approx(192.0 * 0.21, rel=0.05)
    assert energy.drawn_so_far_j(rests, 500.0) == energy.drawn_so_far_j(rests)


class Slower(Steady):
    tick_s = 0.05


def test_a_run_tells_the_joules_of_its_pauses_as_its_policy_was_told_them() -> None:
    energy = RunEnergy(Slower())
    energy.open()
    energy.started(101.0)
    energy.close(1.0)
    assert energy.within_j([(0.0, 0.5), (1.0, 2.0)]) == pytest.approx(15.0)
    blurred = [(0.0, 0.001), (1.0, 1.001)]
    assert energy.within_j(blurred, 4.0) == pytest.approx(0.008)
    assert energy.within_j(blurred, None) == pytest.approx(0.02)
    without = RunEnergy(NoMeter("none here"))
    without.open()
    without.close(1.0)
    assert math.isnan(without.within_j([(0.0, 1.0)]))


def test_fewer_exits_keep_what_tells_the_weights_that_were_measured(place, tmp_path) -> None:
    """Other weights of the same shape are refused, as with the profile of all exits."""
    document = json.loads((place / "profile" / "profile.json").read_text())
    paths = family(tmp_path / "family")
    guard = json.loads((paths["large"] / "early_exit.json").read_text())["guard"]
    other = guard | {"logits_sums": [one + 1e3 for one in guard["logits_sums"]]}
    document["measurement"] = {"models": {"large": {"guard": other, "kernels": {}}}}
    save_profile(document, tmp_path / "all", traces=place / "profile" / "exits.parquet")
    whole = load_profile(tmp_path / "all")
    fewer = write_with_exits(whole, "fewer", {"large": (2, 6)}, tmp_path / "fewer")
    for profile in (whole, fewer):
        with pytest.raises(InputError, match="not those of the weights of 'large'"):
            check_checkpoint("large", open_checkpoint(paths["large"]), profile)


def test_fewer_exits_keep_what_tells_the_maps_that_were_traced(place, tmp_path) -> None:
    document = json.loads((place / "profile" / "profile.json").read_text())
    paths = family(tmp_path / "family")
    confidence = Confidence("max-softmax", 0.5, {"all": {2: PiecewiseLinear((0.5,), (0.75,))}})
    update_settings(paths["large"], confidence=confidence)
    document["models"]["large"]["confidence"]["kind"] = "calibrated-max-softmax"
    told = {"maps_sha256": "0" * 64, "threshold": 0.5}
    document["measurement"] = {"exit_traces": {"candidates": {"large": told, "small": {}}}}
    save_profile(document, tmp_path / "all", traces=place / "profile" / "exits.parquet")
    whole = load_profile(tmp_path / "all")
    fewer = write_with_exits(whole, "fewer", {"large": (2, 6)}, tmp_path / "fewer")
    assert fewer.document["measurement"] == {
        "exit_traces": {"candidates": {"large": {"maps_sha256": "0" * 64}}}
    }
    for profile in (whole, fewer):
        with pytest.raises(InputError, match="maps of the checkpoint's confidence are not those"):
            check_checkpoint("large", open_checkpoint(paths["large"]), profile)
