"""plan, tune and whatif from a file to a folder: the same bytes whoever runs them and what dies."""

from __future__ import annotations

import html
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from helios_sim.cli import main
from helios_sim.console.command import Interrupted
from helios_sim.errors import InputError
from helios_sim.experiment import prepare
from helios_sim.profiles.files import load_profile, save_profile
from helios_sim.scenario import load_scenario
from helios_sim.search.commands import Running, plan, tune, whatif
from helios_sim.search.store import EARLIER
from helios_sim.search.tune import read_tune, samples_of
from tests.search.asking import A100, H100, inline, results, write


def test_words_of_a_search_follow_the_kind_of_the_device(tmp_path: Path) -> None:
    """On a processor no page speaks of GPUs."""
    fleet = {"profile": "small-family-cpu", "candidates": ["general-12l"], "weights_start": "host"}
    asked = {"target_rate_per_s": 0.5, "num_requests": 60, "replications": 2, "precision": 0.5}
    path = write(
        tmp_path,
        fleet=fleet,
        slo={"text": "ttft:5000"},
        policy=[{"use": "vanilla"}],
        plan={**asked, "max_replications": 2},
        search={"num_trials": 2, "batch": 2, "ranges": {"serving.max_batch": [4, 8]}},
    )
    told = (
        plan(path, [], inline(tmp_path / "plan")),
        tune(path, ["search.replications=1"], inline(tmp_path / "tune")),
        whatif(path, [], ["serving.max_batch=1,8"], [], 1, inline(tmp_path / "whatif")),
    )
    assert "take 1 processor: " in told[0].sentences[0]
    assert "processors" in told[0].tables[0][0][0]
    for said in told:
        page = (said.folder / "report.html").read_text()
        shown = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
        assert "GPU" not in shown
        assert "tokens/s per processor" in shown


UNMEASURED = "read ratios between {}, not absolute figures."


def test_every_answer_says_what_the_numbers_behind_it_are(tmp_path: Path) -> None:
    """In the terminal and on the page; of a profile without a measured number, how to read it."""
    path = write(tmp_path, policy=[{"use": "never"}], search={"num_trials": 4})
    told = {
        "fleets": plan(path, [], inline(tmp_path / "plan")),
        "settings": tune(
            path, ["search.ranges={'serving.max_batch'=[8,64]}"], inline(tmp_path / "tune")
        ),
        "cells": whatif(path, [], ["serving.max_batch=8,64"], [], 1, inline(tmp_path / "whatif")),
    }
    for compared, said in told.items():
        (worth,) = [one for one in said.sentences if one.startswith("Profile opt-a100-40gb has ")]
        assert worth.endswith(f" numbers. None is measured: {UNMEASURED.format(compared)}")
        assert worth in html.unescape((said.folder / "report.html").read_text())


def test_prices_of_energy_are_refused_where_it_is_unavailable(tmp_path: Path) -> None:
    """Energy that no meter read would be priced at nothing."""
    (tmp_path / "prices.toml").write_text(
        f'[gpu."{load_profile("small-family-cpu").device.name}"]\nper_gpu_hour = 1.0\n'
        'grade = "assumed"\n[energy]\nper_kwh = 0.1\ngrade = "assumed"\n'
    )
    asked = {"prices": "prices.toml"}
    search = {"ranges": {"serving.max_batch": [4, 8]}, "objectives": ["cost"], **asked}
    path = write(
        tmp_path,
        fleet={"profile": "small-family-cpu", "candidates": ["general-12l"]},
        plan=asked,
        search=search,
    )
    for command, table in ((plan, "plan"), (tune, "search")):
        with pytest.raises(InputError, match=rf"{table}\.prices: .*energy of profile 'small-fa"):
            command(path, [], inline(tmp_path / "out"))


@pytest.mark.parametrize("own", ["opt-6.7b", "opt-1.3b"])
def test_a_winner_of_a_poorer_model_has_its_perplexity_beside_the_better_one(
    tmp_path: Path, own: str
) -> None:
    """That of the scenario as it stands, or where that is no better of another trial."""
    search = {
        "objectives": ["energy"],
        "constraints": "agreement>=0.99",
        "sampler": "grid",
        "go_on_share": 1.0,
        "ranges": {"policy.model": ["opt-6.7b", "opt-1.3b"]},
    }
    path = write(tmp_path, policy=[{"use": "vanilla", "model": own}], search=search)
    said = tune(path, [], inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if one.startswith("Quality: ")]
    asked = re.fullmatch(
        r"Quality: perplexity is (\S+) with trial 1, and (\S+) with (.*)\. Agreement does not show "
        r'it: it compares each model with itself\. search\.constraints = "(\S+)" asks for the '
        r"better one\.",
        told,
    )
    assert asked is not None
    assert asked[3] == ("trial 0" if own == "opt-1.3b" else "the scenario as it stands")
    assert told in html.unescape((tmp_path / "out" / "report.html").read_text())
    titles, rows = said.tables[0][0]
    shown = {row[0]: row[titles.index("perplexity")] for row in rows}
    assert (shown["1"], shown["0"]) == asked.groups()[:2]
    change = f'search.constraints="{asked[4]}"'
    better = tune(path, [change], inline(tmp_path / "better"))
    assert not any(one.startswith("Quality: ") for one in better.sentences)
    assert better.tables[0][0][1][0][0] == "0"


@pytest.mark.parametrize("command", ["plan", "tune"])
def test_what_is_recommended_runs_as_it_is(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    {"plan": plan, "tune": tune}[command](path, [], inline(tmp_path / "out"))
    with pytest.raises(SystemExit) as end:
        main(["scenario", "check", str(tmp_path / "out" / "scenario.toml")])
    assert end.value.code == 0
    assert "is good" in capsys.readouterr().out
    data = tomllib.loads((tmp_path / "out" / "scenario.toml").read_text())
    assert len(data["policy"]) == 1
    assert not {"plan", "search"} & set(data)


def test_simulate_runs_a_scenario_with_questions_and_leaves_them_out_of_the_run(
    tmp_path: Path,
) -> None:
    path = write(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["simulate", str(path), "--out", str(tmp_path / "run")])
    assert end.value.code == 0
    data = tomllib.loads((tmp_path / "run" / "helios" / "scenario.toml").read_text())
    assert not {"plan", "search"} & set(data)


def test_checking_a_scenario_checks_its_questions_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, said in (
        ({"search": {"ranges": {"policy.breach_limt": [1]}}}, "breach_limit"),
        ({"plan": {"routers": ["least-kw"]}}, "least-kv"),
        ({}, "is good"),
    ):
        with pytest.raises(SystemExit):
            main(["scenario", "check", str(write(tmp_path, **more))])
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


def test_constraints_that_no_trial_keeps_are_told_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, search={"constraints": "tpot:p99<1ms", "num_trials": 4})
    with pytest.raises(InputError, match=r"nearest and breaks tpot:p99<=1ms \(reached") as error:
        tune(path, [], inline(tmp_path / "out"))
    assert str(error.value).endswith(f"\nPage: {tmp_path / 'out' / 'report.html'}")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The trials that break the constraints least, and the scenario as it stands" in page
    assert pl.read_parquet(tmp_path / "out" / "results.parquet").height == 5


def test_a_search_none_of_whose_trials_can_be_run_is_ended_and_says_what_the_first_lacks(
    tmp_path: Path,
) -> None:
    """OPT-1.3B has no exit at layer 7; the same folder takes the corrected search."""
    policy = [{"use": "static-depth", "model": "opt-1.3b", "depth": 24}]
    search = {"sampler": "grid", "ranges": {"policy.depth": [7]}, "constraints": ""}
    path, out = write(tmp_path, policy=policy, search=search), tmp_path / "out"
    with pytest.raises(InputError, match=r"None of 1 trial can be run; the first says: .*'depth'"):
        tune(path, [], inline(out))
    page = html.unescape((out / "report.html").read_text())
    assert "None of 1 trial can be run; the first says:" in page
    assert not (out / "scenario.toml").exists()
    said = tune(path, ["search.ranges={policy={depth=[24]}}"], inline(out))
    assert "1 trial by grid: 1 on all samples" in said.sentences[1]


def test_differences_of_a_search_have_one_kind_of_minus_and_say_of_what_they_are(
    tmp_path: Path,
) -> None:
    path, out = write(tmp_path, search={"num_trials": 4}), tmp_path / "out"
    said = tune(path, [], inline(out))
    page = (out / "report.html").read_text()
    table = page.split("<h2>On traffic it was not tuned on</h2>")[1].split("</section>")[0]
    assert not re.search(r"[>\[ ]-\d", table)
    (told,) = [one for one in said.sentences if one.startswith("On held-out traffic goodput")]
    assert re.search(
        r"it is \S+ times that, (as much as|\d+ % (more|less) than) the \S+ times that the tuning "
        r"traffic promised\.",
        told,
    )


def test_a_trace_too_short_for_its_windows_names_them_before_anything_runs(
    tmp_path: Path,
) -> None:
    lines = [f'{{"timestamp":{50 * i},"input_length":9,"output_length":5}}\n' for i in range(300)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    path = write(tmp_path)
    changes = ['workload={trace={file="t.jsonl"}}']
    for command, table in ((plan, "plan"), (tune, "search")):
        with pytest.raises(InputError) as error:
            command(path, [*changes, f"{table}.windows=9"], inline(tmp_path / "out"))
        assert str(error.value).startswith(f"{path}, {table}.windows: The trace holds 300 requests")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "sobol", "grid"])
def test_every_sampler_searches_and_tries_the_winner_on_other_traffic(
    tmp_path: Path, sampler: str
) -> None:
    more: dict[str, Any] = {"sampler": sampler, "objectives": ["throughput", "energy"]}
    if sampler == "grid":
        more["ranges"] = {"policy.breach_limit": [20, 60], "serving.max_batch": [8, 64]}
    tune(write(tmp_path, search=more), [], inline(tmp_path / "out"))
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert frame.height == 1 + (4 if sampler == "grid" else 12)
    assert frame.filter(pl.col("winner")).height == 1
    assert {"full", "stopped"} >= set(frame["state"])
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Settings", "On traffic it was not tuned on", "Frontier", "Sensitivity"):
        assert f"<h2>{title}</h2>" in page
    front = pl.read_csv(tmp_path / "out" / "pareto.csv")
    assert set(front["trial"]) <= set(frame.filter(pl.col("feasible"))["trial"])


def priced(folder: Path, devices: dict[str, float]) -> Path:
    """A scenario whose device is searched for the least cost, at so much an hour of each."""
    (folder / "prices.toml").write_text(
        "".join(
            f'[gpu."{name}"]\nper_gpu_hour = {price}\ngrade = "assumed"\n'
            for name, price in devices.items()
        )
    )
    search = {
        "objectives": ["cost"],
        "constraints": "",
        "prices": "prices.toml",
        "sampler": "grid",
        "replications": 1,
        "held_out": 1,
        "ranges": {"fleet.profile": ["layerskip-a100-40gb", "layerskip-h100-80gb"]},
    }
    fleet = {"profile": "layerskip-a100-40gb", "candidates": ["llama2-7b"]}
    return write(folder, policy=[{"use": "never"}], fleet=fleet, search=search)


def test_a_trial_on_another_device_costs_what_that_device_does(tmp_path: Path) -> None:
    """An hour of either costs 3,600, so a token costs 1 / throughput, here 2 on the other one."""
    tune(priced(tmp_path, {A100: 3600.0, H100: 7200.0}), [], inline(tmp_path / "out"))
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet").filter(pl.col("trial") >= 0)
    costs = dict(zip(frame["setting fleet.profile"], frame["cost"] / 1e6, strict=True))
    rates = dict(zip(frame["setting fleet.profile"], frame["output_throughput"], strict=True))
    assert costs["layerskip-a100-40gb"] == pytest.approx(1 / rates["layerskip-a100-40gb"])
    assert costs["layerskip-h100-80gb"] == pytest.approx(2 / rates["layerskip-h100-80gb"])


def test_every_device_that_is_searched_needs_a_price_before_anything_runs(tmp_path: Path) -> None:
    path = priced(tmp_path, {A100: 1.0})
    with pytest.raises(InputError, match=rf"search\.prices: The prices file has no.*{H100}"):
        tune(path, [], inline(tmp_path / "out"))
    change = 'search.ranges={"fleet.profile"=["layerskip-a100-40gb","layerskip-h100-80g"]}'
    with pytest.raises(InputError, match=r"ranges\.fleet\.profile: .*layerskip-h100-80gb"):
        tune(path, [change], inline(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_search_over_gpus_and_processors_speaks_of_devices(tmp_path: Path) -> None:
    change = 'search.ranges={"fleet.profile"=["layerskip-a100-40gb","small-family-cpu"]}'
    path = priced(tmp_path, {A100: 1.0})
    changes = [change, 'search.objectives=["goodput"]']
    question = read_tune(load_scenario(path, changes), tmp_path, "x.toml")
    assert question.device == "device"


@pytest.mark.parametrize("own", ["refuse", "truncate"])
def test_a_scenario_without_a_value_of_the_objective_is_worse_than_one_with(
    tmp_path: Path, own: str
) -> None:
    """Every prompt is longer than the context: refused, no request has a TTFT."""
    search = {
        "objectives": ["ttft:p99"],
        "constraints": "",
        "sampler": "grid",
        "replications": 1,
        "ranges": {"workload.over_context": ["refuse", "truncate"]},
    }
    workload = {"prompt": {"kind": "constant", "tokens": 4000}, "over_context": own}
    path = write(tmp_path, workload=workload, policy=[{"use": "never"}], search=search)
    said = tune(path, [], inline(tmp_path / "out"))
    found = load_scenario(tmp_path / "out" / "scenario.toml")
    assert found.workload.over_context == "truncate"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nan" not in " ".join(said.sentences)
    assert ">nan" not in page
    if own == "refuse":
        assert "Trial 1 takes ttft:p99 from no value to" in said.sentences[0]
        assert any("the scenario as it stands gave no value" in one for one in said.sentences)


def test_each_replica_of_a_trial_sees_as_many_requests(tmp_path: Path) -> None:
    """Three replicas meet 180 requests, of which the first 60 are those that one would meet."""
    path = write(tmp_path, search={"ranges": {"fleet.num_replicas": [1, 3]}})
    question = read_tune(load_scenario(path), tmp_path, "x.toml")
    met = []
    for num in (1, 3):
        scenario = question.space.scenario({"fleet.num_replicas": num})
        (point,) = samples_of(question, scenario, [0])
        requests, _ = prepare(point.scenario, tmp_path).requests(point.scenario.seed)
        met.append(requests)
    assert [len(one) for one in met] == [60, 180]
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert (getattr(met[0], column) == getattr(met[1], column)[:60]).all()


def test_held_out_rates_multiply_the_pace_of_each_stretch_of_a_trace(tmp_path: Path) -> None:
    """The second half of the trace is four times as slow, so one rate for all would speed it up."""
    at_ms = [100 * i for i in range(100)] + [10_000 + 400 * i for i in range(100)]
    lines = [f'{{"timestamp":{at},"input_length":9,"output_length":5}}\n' for at in at_ms]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    changes = ['workload={trace={file="t.jsonl"}}', "search.windows=4", "search.finalists=1"]
    path = write(tmp_path)
    question = read_tune(load_scenario(path, changes), tmp_path, "x.toml")
    for scale in (0.5, 1.0, 1.2):
        points = samples_of(question, question.space.base, range(4), scale)
        scales = [point.scenario.workload.trace.rate_scale for point in points]  # type: ignore[union-attr]
        assert scales == pytest.approx([scale] * 4)


def test_a_rate_that_a_trace_does_not_go_down_to_is_told_before_anything_runs(
    tmp_path: Path,
) -> None:
    lines = [f'{{"timestamp":{100 * i},"input_length":9,"output_length":5}}\n' for i in range(200)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    changes = ['workload={trace={file="t.jsonl"}}', "search.windows=4", "search.finalists=1"]
    path = write(tmp_path)
    scenario = load_scenario(path, [*changes, "search.held_out_rates=[1e-9, 1.0]"])
    with pytest.raises(InputError) as error:
        read_tune(scenario, tmp_path, "x.toml")
    assert error.value.message == "A rate of 1e-08 per second is too low for the trace."
    assert error.value.where == "x.toml, search.held_out_rates"


def test_the_number_of_workers_changes_no_byte_of_a_search(tmp_path: Path) -> None:
    path = write(tmp_path, search={"num_trials": 8})
    tune(path, [], inline(tmp_path / "one"))
    tune(path, [], Running(tmp_path / "two", num_processes=2))
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_a_dask_cluster_of_two_workers_gives_the_bytes_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster runs in processes of its own, in a folder of its own, as a real one does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("helios_sim.search.executors.CONNECT_S", 600)
    path = write(tmp_path, search={"num_trials": 8}).relative_to(tmp_path)
    tune(path, [], inline(tmp_path / "here"))
    scheduler_file = tmp_path / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    (tmp_path / "elsewhere").mkdir()
    quiet["cwd"] = tmp_path / "elsewhere"
    # Whatever is installed, workers are of the tree under test.
    quiet["env"] = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    scheduler = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--no-jupyter",
            "--scheduler-file",
            str(scheduler_file),
        ],
        **quiet,
    )
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                "--scheduler-file",
                str(scheduler_file),
                "--nthreads",
                "1",
                "--no-nanny",
                "--no-dashboard",
                "--local-directory",
                str(tmp_path / f"worker{number}"),
            ],
            **quiet,
        )
        for number in range(2)
    ]
    try:
        end_s = time.monotonic() + 600.0
        while not scheduler_file.is_file() or not scheduler_file.read_text():
            assert scheduler.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.1)
        address = json.loads(scheduler_file.read_text())["address"]
        from distributed import Client

        with Client(address, timeout=600) as client:  # type: ignore[no-untyped-call]
            client.wait_for_workers(2, timeout=600)  # type: ignore[no-untyped-call]
        tune(path, [], Running(tmp_path / "there", scheduler=address))
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
    assert results(tmp_path / "here") == results(tmp_path / "there")


def test_a_scheduler_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios_sim.search.executors.CONNECT_S", 1)
    with pytest.raises(InputError, match="No scheduler of a cluster answers"):
        tune(write(tmp_path), [], Running(tmp_path / "out", scheduler="tcp://127.0.0.1:9"))


def test_a_search_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    """SIGKILL after a random number of further points, then --resume, until it is done."""
    path = write(tmp_path)
    tune(path, [], inline(tmp_path / "calm"))
    command = [sys.executable, "-c", "from helios_sim.cli import main; main()", "tune", str(path)]
    command += ["--out", str(tmp_path / "torn"), "--processes", "1", "--resume"]
    points = tmp_path / "torn" / "points"
    draw = random.Random(7)
    kept = num_kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = kept + draw.randrange(1, 40)
        while process.poll() is None and sum(1 for _ in points.glob("[0-9a-f]*.json")) < enough:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        num_kills += 1
        now = sum(1 for _ in points.glob("[0-9a-f]*.json"))
        assert now >= kept
        kept = now
    assert process.returncode == 0
    assert num_kills > 1
    for left in (tmp_path / "torn").rglob("*.partial"):
        left.unlink()
    assert results(tmp_path / "torn") == results(tmp_path / "calm")


def test_an_unfinished_search_is_not_thrown_away_without_a_word(tmp_path: Path) -> None:
    path = write(tmp_path)
    out = tmp_path / "out"
    tune(path, [], inline(out))
    before = results(out)
    (out / "results.parquet").unlink()
    with pytest.raises(InputError, match=r"finished points of a search.*--resume"):
        tune(path, [], inline(out))
    tune(path, [], inline(out, resume=True))
    assert results(out) == before


VARIED: list[Any] = [["serving.max_batch=8,64"], [], 1]
"""A grid of two cells, each run once: the smallest search there is."""


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [False, True])
def test_results_of_an_earlier_search_are_put_aside_until_there_are_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """The next one is killed before its first point; what it left is no finished search."""
    path, out = write(tmp_path), tmp_path / "out"
    plan(path, [], inline(out))
    before = results(out)
    with monkeypatch.context() as patched:
        patched.setattr("helios_sim.search.commands.carry_out", killed)
        with pytest.raises(Interrupted) as end:
            plan(path, ["plan.precision=0.2"], inline(out, resume=resume))
    assert sorted(file.name for file in out.iterdir()) == [EARLIER, "points"]
    assert bool(list((out / "points").iterdir())) is resume
    assert f"Results of an earlier search are in {out / EARLIER}. Go on" in end.value.kept
    points = {name for name in before if name.startswith("points/")}
    aside = before.keys() - points if resume else before.keys()
    assert results(out / EARLIER) == {name: before[name] for name in aside}
    plan(path, ["plan.precision=0.2"], inline(out, resume=resume))
    plan(path, ["plan.precision=0.2"], inline(tmp_path / "alone"))
    there, alone = results(out), results(tmp_path / "alone")
    assert {name: there[name] for name in alone} == alone
    assert there.keys() - alone.keys() <= points


def test_without_workers_a_search_leaves_an_earlier_one_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no scheduler answers, and where a user gives up waiting for one."""
    path, out = write(tmp_path), tmp_path / "out"
    whatif(path, [], *VARIED, inline(out))
    before = results(out)
    monkeypatch.setattr("helios_sim.search.executors.CONNECT_S", 1)
    with pytest.raises(InputError, match="No scheduler of a cluster answers"):
        whatif(path, [], *VARIED, Running(out, scheduler="tcp://127.0.0.1:9"))
    assert results(out) == before
    monkeypatch.setattr("helios_sim.search.commands.open_workers", killed)
    with pytest.raises(SystemExit):
        main(["whatif", str(path), "--vary", "serving.max_batch=8,64", "--out", str(out)])
    assert "helios: interrupted; nothing was written." in capsys.readouterr().err
    assert results(out) == before


@pytest.mark.parametrize("how", [{"resume": True}, {"shard": "1/2"}, {}])
def test_putting_an_earlier_search_aside_is_never_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: dict[str, Any]
) -> None:
    """Whichever options a search over a finished one is given; a shard leaves the old answer."""
    path, out = write(tmp_path), tmp_path / "out"
    whatif(path, [], *VARIED, inline(out))
    before = results(out)
    caplog.set_level(logging.INFO)
    said = whatif(path, ["seed=5"], *VARIED, inline(out, **how))
    (told,) = [one for one in caplog.messages if "earlier search" in one]
    used = "its points are used" if how else "with --resume its points would be used"
    assert told.endswith(f"put aside in its {EARLIER} until there are new ones; {used}.")
    if "shard" in how:
        assert str(out / EARLIER) in said.sentences[0]
        for name in ("report.html", "results.parquet"):
            assert (out / EARLIER / name).read_bytes() == before[name]
        whatif(path, ["seed=5"], *VARIED, inline(out, resume=True))
    assert not (out / EARLIER).exists()
    assert (out / "results.parquet").read_bytes() != before["results.parquet"]


def test_a_kill_while_results_are_put_aside_or_removed_mixes_no_two_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the table is put aside the rest follows it; beside a newer table it is out of date."""
    path, out = write(tmp_path), tmp_path / "out"
    plan(path, [], inline(out))
    before = results(out)
    (out / EARLIER).mkdir()
    for name in ("scenario.toml", "pareto.csv"):
        (out / name).rename(out / EARLIER / name)
    monkeypatch.setattr("helios_sim.search.commands.carry_out", killed)
    with pytest.raises(Interrupted):
        plan(path, [], inline(out))
    assert results(out / EARLIER) == before
    for name in ("report.html", "results.parquet"):
        shutil.copyfile(out / EARLIER / name, out / name)
    (out / "points" / f"{'0' * 64}.json").write_text("{}")
    with pytest.raises(Interrupted):
        plan(path, [], inline(out))
    assert results(out / EARLIER).keys() == {
        "report.html",
        "results.parquet",
        f"points/{'0' * 64}.json",
    }


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["points/mine.json", f"{EARLIER}/thesis.tex", "scenario.toml"])
def test_what_a_user_put_among_the_files_of_a_search_is_left_alone(
    tmp_path: Path, name: str, resume: bool
) -> None:
    """Also in its folders; whatif recommends no scenario, so that one beside it is a user's."""
    path, out = write(tmp_path), tmp_path / "out"
    whatif(path, [], *VARIED, inline(out))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("ten years of work")
    before = results(out)
    with pytest.raises(InputError, match=f"'{re.escape(name)}', which is no part of a search"):
        whatif(path, [], *VARIED, inline(out, resume=resume))
    assert results(out) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("names", [("points/a.json", "scenario.toml"), ("scenario.toml",)])
def test_a_folder_called_points_makes_no_search(
    tmp_path: Path, names: tuple[str, ...], resume: bool
) -> None:
    (tmp_path / "out" / "points").mkdir(parents=True)
    for name in names:
        (tmp_path / "out" / name).write_text("ten years of work")
    with pytest.raises(InputError, match=f"'{names[0]}', which is no part of a search"):
        whatif(write(tmp_path), [], *VARIED, inline(tmp_path / "out", resume=resume))
    assert results(tmp_path / "out") == dict.fromkeys(names, b"ten years of work")


def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years of work")
    with pytest.raises(InputError, match=r"'thesis\.tex', which is no part of a search"):
        tune(write(tmp_path), [], inline(tmp_path / "out"))


@pytest.mark.parametrize("name", ["scenario.toml", "report.html", "pareto.csv", "mine.py"])
def test_names_that_searches_use_are_a_user_s_own_where_no_search_was(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("ten years of work")
    with pytest.raises(InputError, match=rf"'{name}', which is no part of a search"):
        tune(write(tmp_path), [], inline(tmp_path / "out"))
    assert (tmp_path / "out" / name).read_text() == "ten years of work"


def test_results_never_take_the_place_of_their_own_scenario(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan(write(tmp_path), [], inline(out))
    recommended = (out / "scenario.toml").read_bytes()
    with pytest.raises(InputError, match="The scenario lies there"):
        plan(out / "scenario.toml", [], inline(out))
    assert (out / "scenario.toml").read_bytes() == recommended


def test_a_search_with_a_policy_in_a_package_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    """Its source is copied beside the scenario that is recommended, which then runs there."""
    (tmp_path / "in_a_package").mkdir()
    (tmp_path / "in_a_package" / "own.py").write_text(
        "from helios_sim.policy import Helios\n\n\nclass Own(Helios):\n    name = 'own'\n"
    )
    path = write(tmp_path, policy=[{"use": "in_a_package.own:Own"}])
    out = tmp_path / "out"
    for _ in range(2):
        plan(path, [], inline(out))
        assert (out / "in_a_package" / "own.py").is_file()
    plan(path, [], inline(out, resume=True))
    assert load_scenario(out / "scenario.toml").policy[0].use == "in_a_package.own:Own"


def test_a_recommended_scenario_runs_on_the_profile_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it one of the user's that is called like a shipped one, or found from where they are."""
    document = dict(load_profile("opt-a100-40gb").document)
    save_profile(document | {"name": "opt-a100-40gb"}, tmp_path / "opt-a100-40gb")
    plan(write(tmp_path), [], inline(tmp_path / "out"))
    found = load_scenario(tmp_path / "out" / "scenario.toml").fleet.profile
    assert found == "../opt-a100-40gb"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_profile(document | {"name": "mine"}, elsewhere / "mine")
    monkeypatch.chdir(elsewhere)
    plan(write(tmp_path), ["fleet.profile=mine"], inline(tmp_path / "other"))
    found = load_scenario(tmp_path / "other" / "scenario.toml").fleet.profile
    assert load_profile(found, tmp_path / "other").name == "mine"


def test_shards_together_are_the_whole_search(tmp_path: Path) -> None:
    path = write(tmp_path, search={"sampler": "sobol", "num_trials": 6})
    tune(path, [], inline(tmp_path / "whole"))
    parts = tmp_path / "parts"
    for shard in ("1/2", "2/2"):
        said = tune(path, [], inline(parts, shard=shard))
        assert f"Shard {shard} is done" in said.sentences[0]
        assert not said.has_page
    num = len(list((parts / "points").iterdir()))
    tune(path, [], inline(parts, resume=True))
    assert len(list((parts / "points").iterdir())) > num
    for name in ("results.parquet", "pareto.csv", "scenario.toml"):
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "²/3", "1/9999999999"])
def test_a_shard_that_cannot_be_says_how_it_is_written(tmp_path: Path, shard: str) -> None:
    with pytest.raises(InputError, match="write i/n"):
        plan(write(tmp_path), [], inline(tmp_path / "out", shard=shard))


def test_a_search_that_learns_has_no_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='use "grid" or "sobol"'):
        tune(write(tmp_path), [], inline(tmp_path / "out", shard="1/2"))


def test_whatif_shows_every_cell_of_the_grid_once(tmp_path: Path) -> None:
    path = write(tmp_path, policy=[{"use": "helios"}, {"use": "vanilla"}])
    vary = ["policy.breach_limit=20,60", "serving.max_batch=8,64"]
    said = whatif(path, [], vary, [], 2, inline(tmp_path / "out"))
    # Vanilla has no breach limit, so it has two cells and HELIOS four.
    assert [(row["policy"], row["setting serving.max_batch"]) for row in said.rows].count(
        ("vanilla", 8)
    ) == 1
    assert len(said.rows) == 6
    titles, rows = said.tables[0][0]
    assert len(rows) == 6
    assert all(len(row) == len(titles) for row in rows)


@pytest.mark.parametrize(
    ("varied", "told"),
    [("exits.stickiness", ()), ("exits.correlation", ("exits.stickiness = 0.5",))],
)
def test_a_grid_of_assumptions_claims_none_of_the_scenario_that_it_varies(
    tmp_path: Path, varied: str, told: tuple[str, ...]
) -> None:
    path = write(tmp_path, fleet={"assume": {"exits.stickiness": 0.5}})
    vary = [f"fleet.assume.{varied}=0.2,0.3"]
    said = whatif(path, [], vary, [], 1, inline(tmp_path / "out"))
    assumed = [one for one in said.sentences if one.startswith("The scenario assumes ")]
    assert len(assumed) == len(told)
    assert all(part in sentence for part, sentence in zip(told, assumed, strict=True))
    assert {row[f"setting fleet.assume.{varied}"] for row in said.rows} == {0.2, 0.3}


def test_only_what_is_recommended_is_called_so(tmp_path: Path) -> None:
    """A grid recommends nothing, and neither does a search that found nothing better."""
    path = write(tmp_path, search={"ranges": {"serving.max_batch": [256]}, "sampler": "grid"})
    whatif(path, [], ["serving.max_batch=8,64"], [], 1, inline(tmp_path / "whatif"))
    tune(path, [], inline(tmp_path / "tune"))
    plan(path, [], inline(tmp_path / "plan"))
    named = {
        name: re.findall(r"<summary>(.*?)</summary>", (tmp_path / name / "report.html").read_text())
        for name in ("whatif", "tune", "plan")
    }
    header = (tmp_path / "tune" / "scenario.toml").read_text().splitlines()[0]
    assert header == "# As it stood: helios tune found nothing better."
    assert named == {
        "whatif": ["As it stands, in full"],
        "tune": ["The scenario as it stands"],
        "plan": ["The recommended scenario"],
    }


def test_whatif_names_the_nearest_of_an_option_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'breach_limit'"):
        whatif(write(tmp_path), [], ["policy.breach_limt=1,2"], [], 1, inline(tmp_path / "out"))
    with pytest.raises(InputError, match="Did you mean 'max_batch'"):
        whatif(write(tmp_path), [], ["serving.max_bacth=1,2"], [], 1, inline(tmp_path / "out"))


def test_the_command_line_prints_the_answer_and_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    arguments = [str(path), "--out", str(tmp_path / "out"), "--processes", "1"]
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "carries" in printed
    assert str(tmp_path / "out" / "report.html") in printed.replace("\n", "")
