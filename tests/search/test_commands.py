"""plan, tune and whatif from a file to a folder: the same bytes whoever runs them and what dies."""

from __future__ import annotations

import html
import json
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
from helios_sim.search.points import point_of, run_point
from helios_sim.search.tune import read_tune, samples_of
from helios_sim.search.words import TIMES
from helios_sim.settings.questions import PlanSettings
from helios_sim.settings.toml_writer import toml_text

A100, H100 = "NVIDIA A100-SXM4-40GB", "NVIDIA H100-SXM5-80GB"

RANGES = {
    "policy.breach_limit": {"low": 10, "high": 90},
    "policy.reassess_requests": {"low": 20, "high": 500, "log": True},
    "serving.max_batch": [8, 64],
}


def write(folder: Path, **more: Any) -> Path:
    """A small scenario file with both tables."""
    data = {
        "name": "small",
        "workload": {
            "num_requests": 60,
            "arrivals": {"kind": "poisson", "rate_per_s": 4.0},
            "prompt": {"kind": "constant", "tokens": 100},
            "output": {"kind": "geometric", "mean_tokens": 40, "max_tokens": 200},
        },
        "fleet": {"profile": "opt-a100-40gb", "weights_start": "host"},
        "slo": {"text": "ttft:1000 tpot:30"},
        "policy": [{"use": "helios"}],
        "plan": {"num_requests": 200, "max_replications": 3, "precision": 0.1},
        "search": {
            "num_trials": 12,
            "batch": 4,
            "num_requests": 60,
            "replications": 2,
            "held_out": 2,
            "held_out_rates": [1.0],
            "constraints": "agreement>=0.5",
            "ranges": RANGES,
        },
    }
    for key, value in more.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value  # type: ignore[dict-item]
    path = folder / "small.toml"
    path.write_text(toml_text(data))
    return path


def results(folder: Path) -> dict[str, bytes]:
    """Everything a search leaves but the journal, which holds clock times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith("study.journal")
    }


def inline(out: Path, **more: Any) -> Running:
    return Running(out, num_processes=1, **more)


def test_a_plan_without_a_target_finds_the_capacity_of_each_policy(tmp_path: Path) -> None:
    path = write(tmp_path, policy=[{"use": "never"}, {"use": "vanilla"}])
    said = plan(path, [], inline(tmp_path / "out"))
    assert "carries" in said.sentences[0]
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(frame["policy"]) == {"never", "vanilla"}
    # Runs of a load that is missed differ, and bounds of shares are shares all the same.
    assert frame["worst_share_low"].min() >= 0.0  # type: ignore[operator]
    assert frame["worst_share_high"].max() <= 1.0  # type: ignore[operator]
    for policy in ("never", "vanilla"):
        mine = frame.filter(pl.col("policy") == policy)
        planned = mine.filter(pl.col("planned"))
        assert planned.height == 1
        missed = mine.filter(~pl.col("carried"))["rate_per_s"].min()
        assert planned["rate_per_s"][0] < missed <= 1.1001 * planned["rate_per_s"][0]  # type: ignore[operator]
    assert (tmp_path / "out" / "pareto.csv").read_text().startswith("policy,profile")
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Attainment against rate", "Frontiers", "Evidence", "How it was found"):
        assert f"<h2>{title}</h2>" in page


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


def test_the_cost_of_a_plan_is_at_prices_of_a_named_grade(tmp_path: Path) -> None:
    """The energy's too; a device that is not recommended has no part in it."""
    (tmp_path / "prices.toml").write_text(
        f'[gpu."{A100}"]\nper_gpu_hour = 3.6\ngrade = "quoted"\n'
        f'[gpu."{H100}"]\nper_gpu_hour = 99.0\ngrade = "paid"\n'
        '[energy]\nper_kwh = 0.1\ngrade = "assumed"\n'
    )
    profiles = {"profiles": ["layerskip-a100-40gb", "layerskip-h100-80gb"]}
    path = write(
        tmp_path,
        fleet={"profile": "layerskip-a100-40gb", "candidates": ["llama3-8b"]},
        policy=[{"use": "never"}],
        plan={"prices": "prices.toml", **profiles},
    )
    said = plan(path, [], inline(tmp_path / "out"))
    (cost,) = [one for one in said.sentences if one.startswith("Cost at ")]
    assert cost.endswith("at the quoted and assumed prices of prices.toml.")


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


def test_a_plan_says_which_profiles_it_left_out_and_how_many_requests_it_shortened(
    tmp_path: Path,
) -> None:
    """1,800 + 300 tokens are more than the 2,048 of an OPT model."""
    workload = {
        "prompt": {"kind": "constant", "tokens": 1800},
        "output": {"kind": "values", "values": [20, 300], "weights": [3, 1]},
        "over_context": "truncate",
    }
    asked = {"profiles": ["opt-a100-40gb", "layerskip-a100-40gb"], "candidates": [["opt-1.3b"]]}
    path = write(tmp_path, workload=workload, policy=[{"use": "never"}], slo={"text": "ttft:9000"})
    change = [f"plan.{key}={json.dumps(value)}" for key, value in asked.items()]
    said = plan(path, change, inline(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    left = "Left out: layerskip-a100-40gb has no opt-1.3b."
    assert said.sentences.count(left) == page.count(left) == 1
    (cut,) = [one for one in said.sentences if "shortened" in one]
    assert re.fullmatch(
        r"2\d(\.\d)? % of the requests are shortened to 2,048 tokens, for all fleets alike\.", cut
    )


SLOW = {
    "workload": {
        "num_requests": 60,
        "arrivals": {"kind": "poisson", "rate_per_s": 10.0},
        "prompt": {"kind": "constant", "tokens": 100},
        "output": {"kind": "geometric", "mean_tokens": 500, "max_tokens": 1500},
    },
    "serving": {"max_batch": 64},
    "slo": {"text": "ttft:p99<1s"},
    "policy": [{"use": "vanilla", "model": "opt-1.3b"}],
}
"""Answers of half a minute, waited for by those who find the batch full."""


def steady_share(path: Path, rate_per_s: float) -> float:
    """The share within the first limit over four hours, after ten minutes that are not counted."""
    changes = ["workload.num_requests=60000", f"workload.arrivals.rate_per_s={rate_per_s}"]
    scenario = load_scenario(path, [*changes, "measure.warmup_s=600"])
    figures = run_point(point_of(scenario, path.parent, "ttft:p99<1s"))
    share: float = figures["judged"][0]["share"]
    return share


def test_what_is_surely_carried_is_carried_for_hours_however_long_the_answers(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, **SLOW)
    path.write_text(path.read_text().replace("num_requests = 200\n", ""))
    said = plan(path, [], inline(tmp_path / "out"))
    low = max(row["rate_per_s"] for row in said.rows if row["worst_share_low"] >= 0.99)
    assert steady_share(path, low) >= 0.99
    assert not any("optimistic" in sentence for sentence in said.sentences)


def test_a_number_of_requests_is_kept_to_and_said_to_be_too_short_for_the_answers(
    tmp_path: Path,
) -> None:
    """200 requests fill no batch: every one of them meets a limit that is soon out of reach."""
    path = write(tmp_path, **SLOW)
    said = plan(path, [], inline(tmp_path / "out"))
    assert {row["num_requests"] for row in said.rows} == {200.0}
    low = max(row["rate_per_s"] for row in said.rows if row["worst_share_low"] >= 0.99)
    assert steady_share(path, low) < 0.95
    (told,) = [sentence for sentence in said.sentences if "optimistic" in sentence]
    assert re.match(r"A sample lasts [\d.]+ s and an answer up to [\d.]+ s: samples begin", told)
    assert told.endswith("Give a larger plan.num_requests, or none.")


REASSESSING = {
    "slo": {"text": "ttft:4000"},
    "policy": [{"use": "helios", "reassess_requests": 900}],
    "plan": {"max_replications": 2, "precision": 0.5},
}
"""Rounds of 900 requests: 2,000, of which the first tenth is not measured, hold two of them."""


def test_a_sample_holds_rounds_enough_to_show_what_reassessing_costs(tmp_path: Path) -> None:
    """Five of 900 are 4,500 measured requests, so 6,000 and not 4,000 in all."""
    path = write(tmp_path, **REASSESSING)
    path.write_text(path.read_text().replace("num_requests = 200\n", ""))
    said = plan(path, [], inline(tmp_path / "out"))
    carried = [row for row in said.rows if row["carried"]]
    assert carried
    assert all(row["num_requests"] >= 6000 for row in carried)
    assert not any("rounds of reassessment" in one for one in said.sentences)


def test_samples_of_few_rounds_are_said_to_be(tmp_path: Path) -> None:
    """Of 1,000 requests 900 are measured, which is one round."""
    path = write(tmp_path, **REASSESSING)
    said = plan(path, ["plan.num_requests=1000"], inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if "of reassessment" in one]
    assert told == (
        "A sample holds about 1.0 round of reassessment for each replica (at least 5 are asked "
        "for): what reassessing costs is measured on few. Give a larger plan.num_requests, or none."
    )
    assert told in html.unescape((tmp_path / "out" / "report.html").read_text())
    said = plan(path, ['policy=[{use="never"}]'], inline(tmp_path / "never"))
    assert not any("of reassessment" in one for one in said.sentences)


def evidence(folder: Path) -> str:
    """The text of the table of evidence on a plan's page."""
    page = (folder / "report.html").read_text()
    table = page.split("<h2>Evidence</h2>")[1].split("</section>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "|", table))


def test_the_evidence_says_why_each_load_is_missed(tmp_path: Path) -> None:
    """Late requests are named by their limit, even where no backlog is shown to grow."""
    path = write(tmp_path, policy=[{"use": "vanilla"}])
    plan(path, [], inline(tmp_path / "out"))
    text = evidence(tmp_path / "out")
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert len(re.findall(r"\|carried", text)) == frame["carried"].sum()
    assert len(re.findall(r"\|missed", text)) == (~frame["carried"]).sum()
    assert re.search(r"\|stable\|.?\|?missed[^|]*: T[TP][FO]T \N{LESS-THAN OR EQUAL TO} ", text)
    assert "keep" not in text


def test_where_the_limits_are_generous_a_growing_backlog_is_the_reason(tmp_path: Path) -> None:
    generous = {"text": "e2e:1000000000"}
    path = write(tmp_path, policy=[{"use": "vanilla"}], slo=generous)
    said = plan(path, [], inline(tmp_path / "out"))
    assert any("First to break" in one and "keeping up" in one for one in said.sentences)
    assert re.search(r"missed[^|]*: the backlog grows", evidence(tmp_path / "out"))


def test_a_plan_s_fleet_carries_its_target_and_one_replica_fewer_does_not(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(
        '[gpu."NVIDIA A100-SXM4-40GB"]\nper_gpu_hour = 2.0\ngrade = "assumed"\n'
    )
    target = {"target_rate_per_s": 60.0, "prices": "prices.toml", "hourly_weights": [1, 2] * 12}
    path = write(tmp_path, policy=[{"use": "vanilla", "model": "opt-6.7b"}], plan=target)
    said = plan(path, [], inline(tmp_path / "out"))
    found = load_scenario(tmp_path / "out" / "scenario.toml")
    num = found.fleet.num_replicas
    assert num > 1
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet")
    at = frame.filter(pl.col("rate_per_s") == 60.0)
    verdicts = {row["num_replicas"]: row["carried"] and row["sure"] for row in at.to_dicts()}
    assert verdicts[num] is True
    assert verdicts[num - 1] is False
    assert found.workload.arrivals.rate_per_s == 60.0  # type: ignore[union-attr]
    assert any(f"{num} GPUs" in sentence for sentence in said.sentences)
    planned = at.filter(pl.col("planned")).to_dicts()[0]
    assert planned["cost_per_hour"] == pytest.approx(2.0 * num)


TWO_QUALITIES = {
    "workload": {
        "num_requests": 400,
        "arrivals": {"kind": "poisson", "rate_per_s": 4.0},
        "prompt": {"kind": "constant", "tokens": 100},
        "output": {"kind": "geometric", "mean_tokens": 40, "max_tokens": 200},
    },
    "slo": {"text": "ttft:1000"},
    "fleet": {
        "profile": "layerskip-a100-40gb",
        "candidates": ["llama3-8b"],
        "weights_start": "host",
    },
    "policy": [{"use": "static-depth", "depth": 24}, {"use": "vanilla"}],
}
"""A fleet that leaves every token early, and one that never does."""


def test_without_a_floor_a_plan_says_what_its_quality_is_and_what_full_quality_takes(
    tmp_path: Path,
) -> None:
    target = {"target_rate_per_s": 6.0, "constraints": ""}
    said = plan(write(tmp_path, **TWO_QUALITIES, plan=target), [], inline(tmp_path / "out"))
    planned = {row["policy"]: row for row in said.rows if row["planned"]}
    shown = f"{100 * planned['static-depth']['agreement']:.3g} % agreement"
    assert re.fullmatch(
        rf"6 .* take \d GPUs?: . {TIMES} static-depth, at {shown}\.", said.sentences[0]
    )
    num = planned["vanilla"]["num_gpus"]
    (told,) = [one for one in said.sentences if one.startswith("At 100 % agreement")]
    assert told.startswith(f"At 100 % agreement they take {num} GPU")
    assert told.endswith(f"{num} {TIMES} vanilla.")
    titles, rows = said.tables[0][0]
    assert [row[titles.index("agree %")] for row in rows] == [shown.split()[0], "100"]


OF_TWO_SIZES = {"vanilla": "opt-6.7b", "static-depth": "opt-1.3b"}
"""Two policies and the models that they keep to."""


def test_a_plan_names_the_device_and_the_models_that_all_its_fleets_have(tmp_path: Path) -> None:
    """In their names, which say what tells them apart, neither stands."""
    policies = [{"use": name, "model": model} for name, model in OF_TWO_SIZES.items()]
    target = {"users": 120, "requests_per_user_per_min": 1.5, "peak_factor": 2}
    path, out = write(tmp_path, policy=policies, plan=target), tmp_path / "out"
    said = plan(path, [], inline(out))
    assert said.sentences[1:4] == [
        f"Device: {A100}, profile opt-a100-40gb.",
        "Serving: opt-1.3b of 2 candidates (static-depth); opt-6.7b of 2 candidates (vanilla).",
        "Target: 120 users with 1.5 requests a minute each, or 3 requests/s, times the peak "
        "factor of 2, which is 6 requests/s.",
    ]
    page = html.unescape((out / "report.html").read_text())
    assert all(one in page for one in said.sentences[1:4])
    change = "fleet.candidates=['opt-6.7b']"
    alone = "policy=[{use='vanilla'}]"
    told = plan(path, [change, alone, "plan.peak_factor=1"], inline(tmp_path / "one")).sentences
    assert told[2] == "Serving: opt-6.7b."
    assert told[3] == "Target: 120 users with 1.5 requests a minute each, which is 3 requests/s."
    profiles = {"profiles": ["layerskip-a100-40gb", "layerskip-h100-80gb"]}
    several = write(tmp_path, **TWO_QUALITIES, plan=profiles)
    told = plan(several, [], inline(tmp_path / "several")).sentences
    assert told[1] == "Serving: llama3-8b."
    assert not any(one.startswith(("Device: ", "Target: ")) for one in told)


def test_a_fleet_that_breaks_a_constraint_is_shown_and_not_recommended(tmp_path: Path) -> None:
    floor = {"target_rate_per_s": 6.0, "constraints": "agreement >= 95%"}
    said = plan(write(tmp_path, **TWO_QUALITIES, plan=floor), [], inline(tmp_path / "out"))
    assert said.sentences[0].endswith(f"{TIMES} vanilla.")
    assert load_scenario(tmp_path / "out" / "scenario.toml").policy[0].use == "vanilla"
    first, second = said.tables[0][0][1]
    assert (first[0], second[0]) == ("vanilla", "static-depth, breaks agreement>=0.95")
    assert any("which breaks agreement>=0.95 (reached 0." in one for one in said.sentences)
    assert "breaks agreement" in (tmp_path / "out" / "report.html").read_text()


TWO_SIZES = {
    "workload": {**TWO_QUALITIES["workload"], "num_requests": 400},
    "slo": {"text": "ttft:4000"},
    "policy": [
        {"use": "vanilla", "label": "large", "model": "opt-6.7b"},
        {"use": "vanilla", "label": "small", "model": "opt-1.3b"},
    ],
}
"""Two models of one tokenizer at full depth: each agrees with itself, the small one is poorer."""


def test_a_small_model_that_agrees_with_itself_is_not_passed_off_as_full_quality(
    tmp_path: Path,
) -> None:
    """Its perplexity stands beside the better one, with the constraint that asks for that."""
    floor = {"target_rate_per_s": 30.0, "constraints": "agreement>=0.99"}
    path = write(tmp_path, **TWO_SIZES, plan=floor)
    said = plan(path, [], inline(tmp_path / "out"))
    assert said.sentences[0].endswith(f"{TIMES} small.")
    found = {row["policy"]: f"{row['perplexity']:.2f}" for row in said.rows if row["planned"]}
    assert float(found["small"]) > 1.2 * float(found["large"])
    assert any(
        "100 % of the tokens equal those of the same model at full depth" in one
        for one in said.sentences
    )
    assert not any("the full model" in one for one in said.sentences)
    (told,) = [one for one in said.sentences if one.startswith("Quality: ")]
    asked = re.fullmatch(
        r"Quality: perplexity is (\S+) with small, and (\S+) with large\. Agreement does not show "
        r'it: it compares each model with itself\. plan\.constraints = "(\S+)" asks for the better '
        r"one\.",
        told,
    )
    assert asked is not None
    assert asked.groups()[:2] == (found["small"], found["large"])
    assert told in html.unescape((tmp_path / "out" / "report.html").read_text())
    titles, rows = said.tables[0][0]
    assert [row[titles.index("perplexity")] for row in rows] == [found["small"], found["large"]]
    change = f'plan.constraints="{asked[3]}"'
    better = plan(path, [change], inline(tmp_path / "better"))
    assert better.sentences[0].endswith(f"{TIMES} large.")
    assert not any(one.startswith("Quality: ") for one in better.sentences)


def test_perplexity_stands_in_no_table_of_one_model(tmp_path: Path) -> None:
    said = plan(write(tmp_path, **TWO_QUALITIES), [], inline(tmp_path / "out"))
    assert "perplexity" not in said.tables[0][0][0]
    assert not any(one.startswith("Quality: ") for one in said.sentences)


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


def test_constraints_that_no_fleet_keeps_are_told_with_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, policy=[{"use": "vanilla"}], plan={"constraints": "tpot:p99<1ms"})
    with pytest.raises(InputError, match=r"'vanilla' comes nearest and breaks tpot:p99<=1ms \(r"):
        plan(path, [], inline(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not recommended: vanilla, which breaks tpot:p99&lt;=1ms (reached" in page
    assert "kept by what is recommended" not in page


TOO_SMALL = {"target_rate_per_s": 60.0, "max_replicas": 1}
"""A target that one replica carries at no rate that a policy of the tests has."""


def test_a_plan_that_finds_no_fleet_ends_with_a_page_that_says_why_each_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line says that it found none by its exit code too."""
    policies = [{"use": "vanilla", "model": "opt-6.7b"}, {"use": "static-depth", "depth": 31}]
    path, out = write(tmp_path, policy=policies, plan=TOO_SMALL), tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["plan", str(path), "--out", str(out), "--processes", "1"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    no = "No fleet of up to 1 replica carries 60 requests/s; one replica of"
    assert told.startswith(f"helios: {path}, plan.max_replicas: {no}")
    assert told.endswith(f" All loads are in {out}.\nPage: {out / 'report.html'}\n")
    page = (out / "report.html").read_text()
    assert f'<p class="headline">{no}' in page
    for name in ("vanilla", "static-depth"):
        assert f"<li>{name} " in page
    for title in ("Attainment against rate", "Evidence", "How it was found"):
        assert f"<h2>{title}</h2>" in page
    assert "recommended" not in re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    frame = pl.read_parquet(out / "results.parquet")
    assert set(frame["policy"]) == {"vanilla", "static-depth"}
    assert not frame["planned"].any()
    assert sorted(file.name for file in out.iterdir()) == [
        *("points", "report.html", "results.parquet")
    ]


def test_a_plan_that_found_no_fleet_is_ended_and_may_be_corrected_in_its_folder(
    tmp_path: Path,
) -> None:
    policy = [{"use": "vanilla", "model": "opt-6.7b"}]
    path, out = write(tmp_path, policy=policy, plan=TOO_SMALL), tmp_path / "out"
    with pytest.raises(InputError, match="Raise max_replicas"):
        plan(path, [], inline(out))
    said = plan(path, ["plan.max_replicas=64"], inline(out))
    assert said.sentences[0].startswith("60 requests/s take ")
    assert (out / "scenario.toml").is_file()


def test_fleets_that_cannot_serve_at_all_are_on_the_page_with_their_reasons(tmp_path: Path) -> None:
    policies = [{"use": "vanilla", "model": "opt-66b"}, {"use": "static-depth", "depth": 7}]
    with pytest.raises(InputError, match="No fleet can serve this at all"):
        plan(write(tmp_path, policy=policies), [], inline(tmp_path / "out"))
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert re.search(r"<li>vanilla cannot serve this: .*'opt-66b'", page)
    assert re.search(r"<li>static-depth cannot serve this: .*'depth' was given 7", page)
    assert "<h2>Evidence</h2>" not in page


def test_a_fleet_that_fails_since_it_evaluates_is_said_to_in_one_line(tmp_path: Path) -> None:
    """Who arrives during an evaluation waits for its end: at no rate are 99 % on time."""
    target = {"target_rate_per_s": 6.0, "max_replicas": 4}
    policies = [{"use": "vanilla"}, {"use": "helios", "reassess_requests": 40}]
    path = write(tmp_path, **TWO_QUALITIES, plan=target)
    changes = [f"policy={json.dumps(policies).replace(': ', '=')}", 'slo.text="ttft:p99<1s"']
    changes[0] = re.sub(r'"(\w+)"=', r"\1=", changes[0])
    said = plan(path, changes, inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if one.startswith("helios")]
    assert "while late requests wait, a replica evaluates candidates for" in told
    assert said.sentences[0].endswith(f"{TIMES} vanilla.")


def test_figures_of_a_plan_are_those_of_its_recommended_scenario(tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(
        '[gpu."NVIDIA A100-SXM4-40GB"]\nper_gpu_hour = 3.6\ngrade = "assumed"\n'
    )
    said = plan(
        write(tmp_path, **TWO_QUALITIES, plan={"prices": "prices.toml"}),
        [],
        inline(tmp_path / "out"),
    )
    scenario = load_scenario(tmp_path / "out" / "scenario.toml")
    figures = run_point(point_of(scenario, tmp_path / "out"))["summary"]
    (planned,) = [row for row in said.rows if row["planned"] and row["rank"] == 1]
    for key in ("energy_per_output_token", "output_throughput", "request_goodput", "agreement"):
        assert planned[key] == figures[key]
    assert planned["cost_per_million_tokens"] == pytest.approx(1e3 / figures["output_throughput"])


def test_windows_whose_lengths_are_not_the_trace_s_are_shown_beside_it(tmp_path: Path) -> None:
    """Answers of 20 tokens and, in the second and fourth window of eight, of 60: 30 on average.

    Loads are measured on the first, fifth, third and seventh.
    """
    long = (*range(60, 120), *range(180, 240))
    lines = [
        f'{{"timestamp":{100 * i},"input_length":50,"output_length":{60 if i in long else 20}}}\n'
        for i in range(480)
    ]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    changes = ['workload={trace={file="t.jsonl"}}', "plan.max_replications=4"]
    said = plan(write(tmp_path, policy=[{"use": "vanilla"}]), changes, inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if "whole trace" in one]
    assert told.endswith(
        "prompts of 50 and answers of 20 tokens on average; the whole trace 50 and 30."
    )


def bursty(folder: Path, num: int = 400) -> Path:
    """A trace whose last quarter comes five times as fast as the rest."""
    slow, fast = 3 * num // 4, num // 4
    times_s = [i / 3 for i in range(slow)] + [slow / 3 + i / 15 for i in range(fast)]
    lines = [
        f'{{"timestamp":{1000 * at_s:.0f},"input_length":50,"output_length":20}}\n'
        for at_s in times_s
    ]
    (folder / "t.jsonl").write_text("".join(lines))
    return write(folder, policy=[{"use": "vanilla"}])


def test_the_peak_of_a_trace_is_said_beside_a_capacity_of_even_windows(tmp_path: Path) -> None:
    """300 requests in 100 s and 100 in 6.67 s: 3.75 a second on average, 15 in the last window."""
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=4", "plan.max_replications=3"]
    said = plan(bursty(tmp_path), changes, inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if "busiest has" in one]
    found = re.search(
        r"busiest has ([\d.]+) times the mean rate of the trace: a mean of (\S+)", told
    )
    assert found is not None
    factor, mean = map(float, found.groups())
    (carried,) = [row["rate_per_s"] for row in said.rows if row["planned"]]
    assert factor == pytest.approx(4.0, rel=0.02)
    assert factor * mean == pytest.approx(carried, rel=0.01)
    assert carried < 15.0
    (told,) = [one for one in said.sentences if "not carried" in one]
    assert re.match(r"The scenario's own rate is a mean of 3\.7\d* requests/s, at which", told)
    assert re.search(
        r"give plan\.target_rate_per_s = 3\.7\d* and plan\.peak_factor = \S+ for", told
    )


def test_a_peak_that_is_not_carried_at_the_mean_asked_for_is_said_with_what_carries_it(
    tmp_path: Path,
) -> None:
    """The busiest window has four times the mean rate: with that as peak factor it is carried."""
    path, target = bursty(tmp_path), 40.0
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=4"]
    changes.append(f"plan.target_rate_per_s={target}")
    said = plan(path, changes, inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if "not carried" in one]
    found = re.fullmatch(
        r"The target is a mean of 40 requests/s, at which the busiest window of the trace has "
        r"(\S+) and is not carried; give (plan\.peak_factor) = (\S+) for a fleet that carries that "
        r"window too\.",
        told,
    )
    assert found is not None
    busiest, key, factor = float(found[1]), found[2], float(found[3])
    assert busiest == pytest.approx(4 * target, rel=0.02)
    assert factor == pytest.approx(busiest / target, abs=0.01)
    assert told in (tmp_path / "out" / "report.html").read_text()
    said = plan(path, [*changes, f"{key}={factor}"], inline(tmp_path / "peak"))
    assert not any("not carried" in one for one in said.sentences)


@pytest.mark.parametrize("target", [None, 8.0])
def test_rates_of_a_workload_that_changes_are_said_to_be_means_and_its_peak_is_named(
    tmp_path: Path, target: float | None
) -> None:
    """3 a second but for 12 in the second of four minutes: 5.25 on average, 2.29 times as many."""
    arrivals = {"kind": "schedule", "points": [[0, 3], [60, 12], [120, 3]]}
    data: dict[str, Any] = {"policy": [{"use": "vanilla"}], "slo": {"text": "ttft:4000"}}
    path = write(tmp_path, **data, plan={} if target is None else {"target_rate_per_s": target})
    data = tomllib.loads(path.read_text())
    data["workload"] |= {"arrivals": arrivals, "duration_s": 240.0}
    del data["workload"]["num_requests"]
    path.write_text(toml_text(data))
    said = plan(path, [], inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if one.startswith("Rates are means")]
    found = re.search(
        r"its peak is (\S+) times the mean, (\S+) requests/s where .* is (\S+)\.", told
    )
    assert found is not None
    factor, peak, mean = map(float, found.groups())
    (planned,) = [row["rate_per_s"] for row in said.rows if row["planned"]]
    assert mean == pytest.approx(planned if target is None else target, rel=1e-3)
    assert factor == pytest.approx(12 / 5.25, rel=0.05)
    assert peak == pytest.approx(factor * mean, rel=2e-3)
    assert told in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_replications_nobody_asked_for_give_way_to_the_windows(tmp_path: Path) -> None:
    path = bursty(tmp_path)
    path.write_text(path.read_text().replace("max_replications = 3\n", ""))
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=2"]
    said = plan(path, changes, inline(tmp_path / "out"))
    assert {row["num_replications"] for row in said.rows} == {2}
    with pytest.raises(InputError, match="max_replications is 4 but the trace is cut into 2 win"):
        plan(path, [*changes, "plan.max_replications=4"], inline(tmp_path / "more"))


def test_one_number_of_replications_moves_the_default_of_the_other() -> None:
    assert PlanSettings(replications=8).max_replications == 8
    assert PlanSettings(max_replications=2).replications == 2
    with pytest.raises(ValueError, match="max_replications is 5 but replications is 8"):
        PlanSettings(replications=8, max_replications=5)


@pytest.mark.parametrize("router", ["least-outstanding", "round-robin"])
def test_one_recommended_replica_keeps_the_router_that_was_asked_for(
    tmp_path: Path, router: str
) -> None:
    path = write(tmp_path, policy=[{"use": "vanilla"}], plan={"routers": [router]})
    plan(path, [], inline(tmp_path / "out"))
    found = load_scenario(tmp_path / "out" / "scenario.toml").fleet
    assert (found.num_replicas, found.router) == (1, router)


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


def test_a_limit_nothing_can_meet_is_told_with_by_how_much_at_the_lowest_rate(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, slo={"text": "ttft:p99<1ms"})
    with pytest.raises(InputError) as error:
        plan(path, [], inline(tmp_path / "out"))
    text = str(error.value)
    assert re.search(r"at 0\.\d+ requests/s TTFT p99 \u2264 1 ms is met by 0\.0 %", text)
    assert re.search(r"\d+ % over 1 ms", text)
    assert list((tmp_path / "out" / "points").iterdir())


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


@pytest.mark.parametrize("given", ["", " "])
def test_prices_without_a_name_are_refused_in_a_sentence(tmp_path: Path, given: str) -> None:
    path = write(tmp_path, plan={"prices": given})
    with pytest.raises(InputError, match=r"plan\.prices: It names no file; give the name of a p"):
        plan(path, [], inline(tmp_path / "out"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"plan\.prices, .*folder: It is a folder; allowed is a T"):
        plan(path, ["plan.prices=folder"], inline(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slo": {"text": ""}}, "empty"),
        ({"plan": {"routers": ["least-kw"]}}, "Did you mean 'least-kv'"),
        ({"plan": {"policies": ["helos"]}}, "Did you mean 'helios'"),
        ({"plan": {"profiles": ["opt-a100-40g"]}}, "opt-a100-40gb"),
        ({"plan": {"candidates": [["opt-13b"]]}}, "has no opt-13b"),
        ({"plan": {"precison": 0.1}}, "Did you mean 'precision'"),
        ({"plan": {"constraints": "agreement<=0.9"}}, "bounds agreement from the wrong side"),
        ({"plan": {"constraints": "agreemnt>=0.9"}}, "Did you mean 'agreement'"),
        ({"plan": {"constraints": "cost<=1"}}, "plan.prices: cost needs a prices file"),
    ],
)
def test_a_plan_that_cannot_be_says_why(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        plan(write(tmp_path, **changes), [], inline(tmp_path / "out"))
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        ("fleet.memory_bytes=40", "fleet.memory_bytes", "No fleet can serve this at all. No cand"),
        ('workload.domains=[{name="x",share=1.0}]', "workload.domains", "The domain 'x' is"),
    ],
)
def test_no_fleet_can_serve_only_where_the_fleets_are_why(
    tmp_path: Path, change: str, place: str, said: str
) -> None:
    path = write(tmp_path)
    with pytest.raises(InputError) as error:
        plan(path, [change], inline(tmp_path / "out"))
    assert str(error.value).startswith(f"{path}, {place}: {said}")


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
    start = (sys.executable, "-c", "from helios_sim.cli import main; main()", "tune", str(path))
    subprocess.run(
        [*start, "--out", str(tmp_path / "calm"), "--processes", "1"],
        check=True,
        capture_output=True,
    )
    command = [*start, "--out", str(tmp_path / "torn"), "--processes", "1", "--resume"]
    points = tmp_path / "torn" / "points"
    draw = random.Random(7)
    kept = num_kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = kept + draw.randrange(1, 40)
        while process.poll() is None and sum(1 for _ in points.glob("[0-9a-f]*.json")) < enough:
            time.sleep(0.002)
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


@pytest.mark.parametrize("resume", [False, True])
def test_no_result_of_an_earlier_search_outlives_the_start_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """The next one is killed before its first point; what it left is no finished search."""
    path, out = write(tmp_path), tmp_path / "out"
    plan(path, [], inline(out))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("helios_sim.search.commands.carry_out", killed)
    with pytest.raises(Interrupted):
        plan(path, ["plan.precision=0.2"], inline(out, resume=resume))
    assert [file.name for file in out.iterdir()] == ["points"]
    assert bool(list((out / "points").iterdir())) is resume


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


def test_a_changing_workload_of_millions_is_refused_before_anything_is_played(
    tmp_path: Path,
) -> None:
    daily = {"kind": "daily", "mean_rate_per_s": 0.0005, "hourly_weights": [1.0] * 23 + [2.0]}
    path = write(
        tmp_path,
        workload={"arrivals": daily, "num_requests": 2000},
        plan={"target_rate_per_s": 5.0},
    )
    with pytest.raises(InputError, match=r"holds 20,\d{3},\d{3} requests; .* at most 2,000,000"):
        plan(path, [], inline(tmp_path / "out"))


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
