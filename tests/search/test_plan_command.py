"""plan from a file to a folder: what it recommends, shows and says, and what it refuses."""

from __future__ import annotations

import html
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from helios_sim.cli import main
from helios_sim.errors import InputError
from helios_sim.scenario import MeasureSettings, load_scenario
from helios_sim.search.bench import FleetAnswer, Load
from helios_sim.search.capacity import Capacity
from helios_sim.search.commands import plan
from helios_sim.search.fleets import read_plan
from helios_sim.search.plan import Plan
from helios_sim.search.plan_words import _as_it_stands
from helios_sim.search.points import point_of, run_point
from helios_sim.search.verdict import Criterion, Verdict
from helios_sim.search.words import TIMES
from helios_sim.settings.questions import PlanSettings
from helios_sim.settings.toml_writer import toml_text
from helios_sim.workload.arrivals import PoissonArrivals
from tests.search.asking import A100, H100, inline, write


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


ROUGH = {"max_replications": 2, "precision": 0.5}
"""As few runs as a plan takes, where what it finds need not be exact."""

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
    target = {"users": 120, "requests_per_user_per_min": 1.5, "peak_factor": 2, **ROUGH}
    path, out = write(tmp_path, policy=policies, plan=target), tmp_path / "out"
    said = plan(path, [], inline(out))
    assert said.sentences[0].startswith("3 requests/s on average, 6 at the peak, take ")
    assert said.sentences[1:4] == [
        f"Device: {A100}, profile opt-a100-40gb.",
        "Serving: opt-1.3b of 2 candidates (static-depth); opt-6.7b of 2 candidates (vanilla).",
        "Target: 120 users with 1.5 requests a minute each, or 3 requests/s, times the peak "
        "factor of 2, which is 6 requests/s. Fleets are sized for that peak; scenario.toml, energy "
        "and cost are of the mean of 3.",
    ]
    page = html.unescape((out / "report.html").read_text())
    assert all(one in page for one in said.sentences[1:4])
    change = "fleet.candidates=['opt-6.7b']"
    alone = "policy=[{use='vanilla'}]"
    told = plan(path, [change, alone, "plan.peak_factor=1"], inline(tmp_path / "one")).sentences
    assert told[2] == "Serving: opt-6.7b."
    assert told[3] == "Target: 120 users with 1.5 requests a minute each, which is 3 requests/s."
    profiles = {"profiles": ["layerskip-a100-40gb", "layerskip-h100-80gb"], **ROUGH}
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
    floor = {"target_rate_per_s": 20.0, "constraints": "agreement>=0.99", **ROUGH}
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
    path, out = (
        write(tmp_path, policy=policy, plan=TOO_SMALL | ROUGH | {"target_rate_per_s": 30.0}),
        tmp_path / "out",
    )
    with pytest.raises(InputError, match="Raise max_replicas"):
        plan(path, [], inline(out))
    said = plan(path, ["plan.max_replicas=64"], inline(out))
    assert said.sentences[0].startswith("30 requests/s take ")
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
    tokens_per_s = planned["rate_per_s"] * figures["total_output_tokens"] / figures["num_requests"]
    assert planned["cost_per_million_tokens"] == pytest.approx(1e3 / tokens_per_s)


def test_tokens_of_a_short_trace_cost_what_the_fleet_does_over_what_is_asked_for(
    tmp_path: Path,
) -> None:
    """20 requests a second of 20 tokens each, for 3.60 USD an hour and GPU: 2.50 USD a GPU."""
    (tmp_path / "prices.toml").write_text(
        '[gpu."NVIDIA A100-SXM4-40GB"]\nper_gpu_hour = 3.6\ngrade = "assumed"\n'
    )
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=4", "plan.prices=prices.toml"]
    changes += ["plan.target_rate_per_s=20", "plan.constraints=cost<100"]
    said = plan(bursty(tmp_path), changes, inline(tmp_path / "out"))
    (planned,) = [row for row in said.rows if row["planned"]]
    each = planned["cost_per_million_tokens"] / planned["num_gpus"]
    assert each == pytest.approx(2.5, rel=1e-6)


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
    path, target = bursty(tmp_path), 20.0
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=4"]
    changes.append(f"plan.target_rate_per_s={target}")
    said = plan(path, changes, inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if "not carried" in one]
    found = re.fullmatch(
        r"The target is a mean of 20 requests/s, at which the busiest window of the trace has "
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
    # The written trace has its own peak: it is not multiplied once more.
    recommended = load_scenario(tmp_path / "peak" / "scenario.toml")
    assert recommended.workload.trace is not None
    assert recommended.workload.trace.rate_scale == pytest.approx(target / 3.75, rel=0.01)
    assert f"planned for a peak of {target * factor:.4g}" in recommended.notes[-1]


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
        ({"plan": {"peak_factor": 1.5}}, "peak_factor is 1.5 and multiplies a target, of which"),
    ],
)
def test_a_plan_that_cannot_be_says_why(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        plan(write(tmp_path, **changes), [], inline(tmp_path / "out"))
    assert said in str(error.value)
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


ONE_MODEL = {"fleet": {"candidates": ["opt-6.7b"]}, "policy": [{"use": "vanilla"}]}


def test_a_latency_constraint_takes_more_replicas_than_the_slo(tmp_path: Path) -> None:
    """Four replicas keep a generous SLO and break the constraint; one more keeps both."""
    asked = {"target_rate_per_s": 40.0, "constraints": "ttft:p95<100ms"}
    path = write(
        tmp_path,
        **ONE_MODEL,
        workload={"num_requests": 6000},
        slo={"text": "ttft:5000"},
        serving={"max_batch": 16},
        plan=asked,
    )
    said = plan(path, [], inline(tmp_path / "out"))
    (taken,) = (one for one in said.sentences if one.startswith("The SLO alone takes"))
    found = re.fullmatch(
        r"The SLO alone takes (\d+) replicas?; the constraints take (\d+)\.", taken
    )
    assert found is not None
    few, more = map(int, found.groups())
    assert few < more
    assert said.sentences[0].startswith(f"40 requests/s take {more} GPUs: {more} {TIMES} vanilla")
    recommended = load_scenario(tmp_path / "out" / "scenario.toml")
    assert recommended.fleet.num_replicas == more

    def slowest_ms(num_replicas: int) -> float:
        fleet = recommended.fleet.model_copy(update={"num_replicas": num_replicas})
        scenario = recommended.model_copy(update={"fleet": fleet})
        (judged,) = run_point(point_of(scenario, tmp_path, "ttft:p95<100ms"))["judged"]
        return float(judged["value_ms"])

    assert slowest_ms(more) <= 100.0 < slowest_ms(more - 1)
    # Half of it on average: the constraint holds at the peak, and the scenario is of the mean.
    changes = ["plan.target_rate_per_s=20", "plan.peak_factor=2"]
    said = plan(path, changes, inline(tmp_path / "peak"))
    assert any(one.startswith("The SLO alone takes") for one in said.sentences)
    (planned,) = [row for row in said.rows if row["planned"]]
    assert (planned["rate_per_s"], planned["mean_rate_per_s"]) == (40.0, 20.0)
    assert planned["num_replicas"] > few
    arrivals = load_scenario(tmp_path / "peak" / "scenario.toml").workload.arrivals
    assert isinstance(arrivals, PoissonArrivals)
    assert arrivals.rate_per_s == 20.0


def test_a_fleet_that_is_cold_at_first_keeps_what_it_keeps_once_warm(tmp_path: Path) -> None:
    """The first requests wait seconds for weights, and count toward no limit of either kind."""
    path = write(
        tmp_path,
        fleet={"candidates": ["opt-6.7b"], "weights_start": "disk"},
        policy=[{"use": "vanilla"}],
        workload={"num_requests": 600},
        slo={"text": "ttft:p99<1000ms"},
        plan={"target_rate_per_s": 4.0, "constraints": "ttft:p99<1000ms"},
    )
    said = plan(path, [], inline(tmp_path / "out"))
    assert said.sentences[0] == f"4 requests/s take 1 GPU: 1 {TIMES} vanilla."
    recommended = load_scenario(tmp_path / "out" / "scenario.toml")
    (limit,) = run_point(point_of(recommended, tmp_path))["summary"]["slo_limits"]
    assert limit["passed"]
    cold = recommended.model_copy(update={"measure": MeasureSettings()})
    (limit,) = run_point(point_of(cold, tmp_path))["summary"]["slo_limits"]
    assert not limit["passed"]


def test_without_a_target_a_latency_constraint_lowers_the_rate(tmp_path: Path) -> None:
    asked = {"constraints": "ttft:p95<100ms"}
    path = write(tmp_path, **ONE_MODEL, slo={"text": "ttft:5000"}, plan=asked)
    said = plan(path, [], inline(tmp_path / "out"))
    assert "under the SLO and the constraints (" in said.sentences[0]
    (lowered,) = (one for one in said.sentences if one.startswith("The SLO alone allows"))
    found = re.search(
        r"allows ([\d.]+) requests/s; the constraints lower that to ([\d.]+)\.$", lowered
    )
    assert found is not None
    alone, kept = map(float, found.groups())
    assert kept < alone
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet").filter(pl.col("planned"))
    assert frame["rate_per_s"].to_list() == pytest.approx([kept], rel=1e-3)


def test_what_more_replicas_do_not_mend_is_refused_after_one_more(tmp_path: Path) -> None:
    """Tokens agree as little in a large fleet as in a small one."""
    path = write(
        tmp_path,
        fleet={"candidates": ["opt-6.7b"]},
        policy=[{"use": "static-depth"}],
        slo={"text": "ttft:5000"},
        plan={"target_rate_per_s": 20.0, "constraints": "agreement>=0.999"},
    )
    with pytest.raises(InputError, match=r"keeps the constraints agreement>=0\.999"):
        plan(path, [], inline(tmp_path / "out"))
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet")
    sizes = sorted(set(frame.filter(rate_per_s=20.0)["num_replicas"]))
    assert sizes[-1] - frame.filter(pl.col("planned"))["num_replicas"][0] <= 1


def test_samples_that_hold_one_decision_are_as_many_as_may_be(tmp_path: Path) -> None:
    """A policy that evaluates once and never again: samples that agree by chance are no proof."""
    helios = {"use": "helios", "reassess_requests": "off"}
    asked = {"replications": 2, "max_replications": 4, "num_requests": 60}
    path = write(tmp_path, policy=[helios], plan=asked)
    plan(path, [], inline(tmp_path / "out"))
    frame = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert set(frame["num_replications"]) == {4}
    path = write(tmp_path, policy=[{"use": "vanilla"}], plan=asked)
    plan(path, [], inline(tmp_path / "other"))
    assert 2 in set(pl.read_parquet(tmp_path / "other" / "results.parquet")["num_replications"])


def test_requests_that_never_fit_are_named_as_what_breaks_the_slo(tmp_path: Path) -> None:
    path = write(tmp_path, **ONE_MODEL, workload={"prompt": {"kind": "constant", "tokens": 3000}})
    with pytest.raises(InputError, match=r"100 % are refused, since they can never fit.*No limit"):
        plan(path, [], inline(tmp_path / "out"))


def test_a_trace_that_misses_the_slo_as_it_is_says_so_and_what_plans_for_its_peak(
    tmp_path: Path,
) -> None:
    """Windows at 4 requests/s each are carried; the trace has one at four times its mean."""
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=4", 'slo.text="ttft:p95<100ms"']
    changes += ["plan.target_rate_per_s=4", "serving.max_batch=2"]
    path = bursty(tmp_path)
    said = plan(path, changes, inline(tmp_path / "out"))
    (told,) = [one for one in said.sentences if one.startswith("On the trace as it is")]
    found = re.fullmatch(
        r"On the trace as it is, at 4 requests/s on average, that fleet misses TTFT p95 . 100 ms "
        r"\(([\d,.]+) ms\): its busiest window has 4\.0\d times that rate\. (\d+) replicas meet "
        r"the SLO there\.",
        told,
    )
    assert found is not None
    (helps,) = [one for one in said.sentences if "not carried" in one]
    assert "give plan.peak_factor = 4.0" in helps
    assert told in html.unescape((tmp_path / "out" / "report.html").read_text())
    assert said.sentences[said.sentences.index(told) - 1].startswith("That fleet carries")
    recommended = load_scenario(tmp_path / "out" / "scenario.toml")

    def slowest_ms(num_replicas: int) -> float:
        fleet = recommended.fleet.model_copy(update={"num_replicas": num_replicas})
        scenario = recommended.model_copy(update={"fleet": fleet})
        point = point_of(scenario, tmp_path / "out", "ttft:p95<100ms")
        return float(run_point(point)["judged"][0]["value_ms"])

    reached = slowest_ms(recommended.fleet.num_replicas)
    assert reached == pytest.approx(float(found[1].replace(",", "")), rel=1e-3)
    enough = int(found[2])
    assert slowest_ms(enough) <= 100.0 < slowest_ms(enough - 1)


def test_a_trace_whose_windows_are_all_carried_may_miss_the_slo_as_it_is(tmp_path: Path) -> None:
    """Four times 3.75 a second is less than 20: the sentence itself says what plans for it."""
    changes = ['workload={trace={file="t.jsonl"}}', "plan.windows=4"]
    changes.append("plan.target_rate_per_s=3.75")
    question = read_plan(load_scenario(bursty(tmp_path), changes), tmp_path, "small.toml")
    missed = Criterion("ttft:p95<=1s", 0.9, 0.9, 0.9, 0.95, 1500.0, 1000.0, "ttft:p95<=1s")
    best = FleetAnswer(
        question.fleets[0],
        2,
        Capacity(20.0, 20.0, 20.0, ()),
        planned=Load(2, 3.75, Verdict((), 3), {}),
        whole=Verdict((missed,), 1),
    )
    (told,) = _as_it_stands(Plan(question, (best,), best, 0.0))
    assert re.search(
        r"that fleet misses TTFT p95 . 1 s \(1,500 ms\): its busiest window has 4\.0\d times that "
        r"rate; plan\.peak_factor = 4\.0\d plans for it\.$",
        told,
    )


def test_a_draw_that_misses_the_slo_is_said_to_be_one_run(tmp_path: Path) -> None:
    question = read_plan(load_scenario(write(tmp_path)), tmp_path, "small.toml")
    missed = Criterion("every limit", 0.9, 0.9, 0.9, 0.95, limit="ttft<=1s")
    planned = Load(2, 8.0, Verdict((), 3), {})
    best = FleetAnswer(question.fleets[0], 2, planned=planned, whole=Verdict((missed,), 1))
    assert _as_it_stands(Plan(question, (best,), best, 0.0)) == [
        "In one run of scenario.toml, at 8 requests/s, that fleet misses TTFT "
        "\N{LESS-THAN OR EQUAL TO} 1 s for 95 % of the requests (90 %); over "
        "samples it carries that rate on average."
    ]
    kept = replace(best, whole=Verdict((replace(missed, mean=0.95),), 1))
    assert _as_it_stands(Plan(question, (kept,), kept, 0.0)) == []
