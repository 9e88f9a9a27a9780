"""The fidelity study runs from end to end on a server that simulates a slower device."""

from __future__ import annotations

import copy
import csv
import json
import math
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from helios_sim.engine import Run
from helios_sim.errors import InputError
from helios_sim.exits import load_traces, write_traces
from helios_sim.experiment import prepare
from helios_sim.fidelity.recordings import EXITS_FILE, ITERATIONS_FILE
from helios_sim.outcome import run_data
from helios_sim.profile import ModelProfile
from helios_sim.profiles.files import load_profile
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import write_run
from helios_sim.scenario import load_scenario, resolved
from helios_sim.wording import number as in_figures
from reports.fidelity import results as judging
from reports.fidelity import study
from reports.fidelity.cases import (
    CASES,
    POLICIES,
    SHARE_OF_CAPACITY,
    SMALLEST,
    Case,
    Ground,
    StudySettings,
    planned,
    policy_of,
    read_ground,
    without_drift,
)
from reports.fidelity.page import render
from reports.fidelity.quality import BOUND, THRESHOLDS, choose
from reports.fidelity.resimulate import changes, simulated_anew
from reports.fidelity.summary import causes, summary_text, typical_table
from reports.forked import Nursery
from tests.fidelity.test_fidelity import changed_profile, iterations_on
from tests.report.test_report import Open, in_chromium, open_page, text_of

__all__ = ["open_page"]
SOME = (CASES[0], CASES[4], CASES[6])


@pytest.fixture(scope="module")
def ground() -> Ground:
    """A small study on the paper's pair of models."""
    return read_ground(StudySettings(Path("opt-a100-40gb"), seconds=30.0, repeats=2))


def serve(scenario_path: Path, out: Path, repeats: int) -> None:
    """Serve on a device that is a tenth slower, each time another per cent."""
    scenario = load_scenario(scenario_path)
    policy = scenario.policy[0]
    experiment = prepare(scenario, scenario_path.parent)
    for number in range(1, repeats + 1):
        factor = 1.09 + 0.01 * number

        def slower(model: ModelProfile, factor: float = factor) -> ModelProfile:
            return replace(model, batch_residual=((1.0, factor),))

        profile = changed_profile(experiment.setup.profile, slower)
        setup = replace(experiment.setup, profile=profile, seed=scenario.seed)
        run = Run(setup, experiment.requests(scenario.seed)[0], lambda: experiment.policy(policy))
        run.play()
        plain = resolved(scenario) | {"seed": scenario.seed}
        data = run_data(run, policy.name, policy.use, scenario.seed, plain)
        data = replace(data, origin="measured")
        folder = out / f"repeat-{number}" if repeats > 1 else out
        write_run(data, summarise(data), folder)
        write_traces(setup.traces, folder / EXITS_FILE)
        iterations_on(profile).write_parquet(folder / ITERATIONS_FILE)


def test_the_cases_cross_policies_loads_arrivals_and_texts() -> None:
    """At least eight cases, every level of every factor, and all policies on shared requests."""
    assert len(CASES) >= 8
    plain = [case for case in CASES if not case.equal_quality]
    assert {case.policy for case in plain} == {*POLICIES, SMALLEST}
    assert {case.load for case in CASES} == set(SHARE_OF_CAPACITY)
    for policy in POLICIES:
        assert len({case.load for case in CASES if case.policy == policy}) >= 2
    assert {case.arrivals for case in CASES} == {"steady", "bursty"}
    assert {case.texts for case in CASES} == {"stable", "drifting"}
    assert {case.policy for case in plain if case.group == "gain"} == {*POLICIES, SMALLEST}
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({without_drift(case).name for case in CASES}) == len(CASES)


def test_rates_are_shares_of_simulated_capacity(ground: Ground) -> None:
    """A case alone takes its own policy's capacity, a group that of its fastest policy."""
    alone = CASES[6]
    group = [case for case in CASES if case.group == "gain" and not case.equal_quality]
    *plans, plan = planned((*group, alone), ground)
    fastest = max(plan.capacity_per_s for plan in plans)
    assert len({plan.rate_per_s for plan in plans}) == 1
    assert plans[0].rate_per_s == pytest.approx(1.25 * fastest, rel=1e-3)
    assert len({plan.num_requests for plan in plans}) == 1
    assert plan.rate_per_s == pytest.approx(0.7 * plan.capacity_per_s, rel=1e-3)
    slowest = min(plan.capacity_per_s for plan in plans)
    assert plans[0].num_requests / slowest <= 2.1 * ground.settings.seconds


def test_a_policy_of_one_model_takes_the_largest_and_one_case_the_smallest(ground: Ground) -> None:
    """Of two as small it is the one that knows the texts better."""
    assert policy_of("vanilla", ground, 80) == {"use": "vanilla", "model": "opt-6.7b"}
    assert policy_of(SMALLEST, ground, 80) == {"use": "vanilla", "model": "opt-1.3b"}
    family = read_ground(StudySettings(Path("small-family-cpu")))
    traces = load_traces(family.profile)
    nats = {name: traces.nll_nats[name][:, :, -1].mean() for name in ("code-8l", "prose-8l")}
    assert family.large == "general-12l"
    assert family.small == min(nats, key=lambda name: nats[name])


def test_errors_at_the_pace_of_the_runs_stand_beside_those_of_the_same_runs(
    ground: Ground, tmp_path: Path
) -> None:
    """Of two cases one knows the pace of its runs: only its errors are compared, and it is said.

    What other texts give stands beside them; a study that knows neither has no such table.
    """
    done = study.run_study(ground, tmp_path, serve, cases=SOME[:2], say=lambda text: None)
    results = results_of(done, ground)
    cases = copy.deepcopy(results["cases"])
    assert typical_table(results)[0] == (
        *("Figure", "Cases", "As it is", "Worst", "Middle text", "Worst"),
    )
    for case in cases:
        del case["attribution"]["chance"]["middle_errors"]
    unknown = {**results, "cases": cases, "targets": judging.targets(cases)}
    assert typical_table(unknown) == ()
    assert "instead of" not in text_of(render(unknown))
    errors = {one["name"]: one["errors"] for one in cases[0]["attribution"]["swaps"]}
    plain = abs(errors["nothing"]["mean_tpot_ms"])
    errors["pace"]["mean_tpot_ms"] = -0.025
    cases[0] |= {"slowdowns": [1.2], "pace_factors": [1.25]}
    cases[1] |= {"slowdowns": [None], "pace_factors": [None]}
    for case in cases:
        case["attribution"]["chance"]["middle_errors"] = {"mean_tpot_ms": 0.0125}
    paced = {**results, "cases": cases, "targets": judging.targets(cases), "device_kind": "cpu"}
    by_key = {one["key"]: one for one in paced["targets"]}
    assert "typical" not in by_key["output_throughput"]
    assert by_key["mean_tpot_ms"]["typical"] == {
        **{"num_cases": 1, "plain_median": plain, "plain_worst": plain},
        **{"paced_median": 0.025, "paced_worst": 0.025},
        **{"text_median": 0.0125, "text_worst": 0.0125},
    }
    assert "1 of 2" in summary_text(paced)
    said = text_of(render(paced))
    instead = f"instead of {in_figures(100 * plain)} %."
    assert "At the pace of the typical real runs, median absolute errors are mean TPOT" in said
    assert f"mean TPOT 2.50 % {instead}" in said
    assert f"mean TPOT 1.25 % {instead}" in said
    assert "The machine was 1.25 times as slow around and during the real runs" in said
    assert "though for 1 it was more than 1.15 times" in said
    judging.write_results(paced, "", tmp_path / "out")
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["figure"] == "mean_tpot_ms"]
    assert [(row["error_with_pace"], row["error_of_middle_text"]) for row in rows] == [
        ("-0.025", "0.0125"),
        ("", "0.0125"),
    ]


def test_a_cause_is_counted_once_whether_or_not_chance_could_be_it_too() -> None:
    told = [{"cause": "mostly recorded exits; within chance"}, {"cause": "mostly recorded exits"}]
    assert causes(told) == "mostly recorded exits (2)"


def test_a_run_is_as_slow_as_the_worse_of_its_signs(tmp_path: Path) -> None:
    for facts, slowest in (
        ({"slowdown": 1.1, "pace_factor": 1.3}, 1.3),
        ({"slowdown": 1.2, "pace_factor": 0.9}, 1.2),
        ({"slowdown": 1.2}, 1.2),
        ({"pace_factor": 1.3, "slowdown": None}, 1.3),
        ({}, None),
    ):
        (tmp_path / "totals.json").write_text(json.dumps({"environment": facts}))
        assert study.slowdown_of(tmp_path) == slowest


@pytest.mark.browser
@in_chromium
def test_the_study_serves_simulates_compares_and_writes_its_page(
    ground: Ground, tmp_path: Path, open_page: Open
) -> None:
    """Results as JSON and CSV, a page that opens, and nothing is served twice."""
    said: list[str] = []
    done = study.run_study(ground, tmp_path / "work", serve, cases=SOME, say=said.append)
    assert len(said) == 3
    results = results_of(done, ground, "python -m reports.fidelity --profile <mine>")
    page = render(results, ["The clocks were free."])
    drawn = json.loads(page.partition('id="figures">')[2].partition("</script>")[0])["cases"]
    axes = [one for key, one in drawn["layout"].items() if key.startswith("xaxis")]
    assert {len(one["tickvals"]) for one in axes} == {3}
    assert all(one["tickvals"][-1] <= one["range"][-1] for one in axes)
    assert {"<br>" in name for trace in drawn["data"] for name in trace["y"]} == {True}
    judging.write_results(results, page, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [case["name"] for case in found["cases"]] == [case.name for case in SOME]
    by_key = {one["key"]: one for one in found["targets"]}
    assert by_key["output_throughput"]["num_cases"] == 3
    assert by_key["mean_tpot_ms"]["median_error"] > 0.05
    assert not by_key["mean_tpot_ms"]["met"]
    assert 0.0 < by_key["mean_tpot_ms"]["median_spread"] < 0.02
    assert {one["cause"] for one in by_key["mean_tpot_ms"]["beyond"]} == {
        "mostly recorded iteration times"
    }
    assert len(by_key["mean_tpot_ms"]["beyond"]) == 3 - by_key["mean_tpot_ms"]["within_twice"]
    causes = {
        cause["ingredient"]
        for case in found["cases"]
        for cause in case["attribution"]["causes"]
        if cause["key"] == "mean_tpot_ms"
    }
    assert "times" in causes
    assert {one["against"] for one in found["gains"]} == {"vanilla"}
    (gain,) = (one for one in found["gains"] if one["key"] == "output_throughput")
    ours, vanilla = (
        next(case for case in found["cases"] if case["policy"] == policy and case["group"])
        for policy in ("helios", "vanilla")
    )
    for told, name in (("foreseen", "middle_text"), ("middles", "middle_text_at_pace")):
        own, base = (
            case["attribution"]["chance"][told]["output_throughput"] for case in (ours, vanilla)
        )
        assert gain[name] == pytest.approx(own / base)
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {case.name for case in SOME}
    text = text_of(page)
    assert "Median absolute error over 3 real scenarios" in text
    assert "--profile <mine>" in text
    assert "The clocks were free." in text
    assert "How slow the machine was around the real runs is unknown" in text
    assert "Median errors are held to the bars" in text
    assert "Beyond twice the spread" in text
    summary = summary_text(results)
    assert "TPOT, mean" in summary
    assert "mostly recorded iteration times (3)" in summary
    document, console = open_page(page)
    assert "data-errors" not in document[:2000]
    assert console == ""

    def never(scenario: Path, out: Path, repeats: int) -> None:
        raise AssertionError("A case was served again.")

    study.run_study(ground, tmp_path / "work", never, cases=SOME[:1], say=said.append)
    with pytest.raises(AssertionError):
        study.run_study(
            ground, tmp_path / "work", never, cases=SOME[:1], fresh=True, say=said.append
        )


def test_a_case_that_cannot_be_served_ends_none_but_itself(ground: Ground, tmp_path: Path) -> None:
    """An interruption leaves the cases before it; only where none was served is the study over."""
    cases = (CASES[0], CASES[3], CASES[5], CASES[8])

    def failing(scenario: Path, out: Path, repeats: int) -> None:
        if scenario.stem == cases[0].name:
            raise InputError("The device is gone.")
        if scenario.stem == cases[2].name:
            raise KeyboardInterrupt
        serve(scenario, out, repeats)

    one = replace(ground, settings=replace(ground.settings, seconds=5.0))
    said: list[str] = []
    done = study.run_study(one, tmp_path, failing, cases=cases, say=said.append)
    assert [outcome.case for outcome in done.outcomes] == [cases[1]]
    assert done.failed == (f"{cases[0].name}: The device is gone.",)
    assert done.interrupted
    with pytest.raises(InputError, match="device is gone"):
        study.run_study(one, tmp_path / "b", failing, cases=cases[:1], say=said.append)


def test_a_profile_of_one_text_serves_stable_texts(ground: Ground, tmp_path: Path) -> None:
    """Nothing can drift there: the case is run with stable texts and named so."""
    one_text = replace(ground, domains=ground.domains[:1])
    served: list[str] = []

    def note(scenario: Path, out: Path, repeats: int) -> None:
        served.append(scenario.stem)
        serve(scenario, out, repeats)

    drifting = Case("static-depth", "light", "steady", "drifting")
    study.run_study(one_text, tmp_path, note, cases=(drifting,), say=lambda text: None)
    assert served == ["static-depth-light-steady-stable"]


def test_what_a_study_cannot_use_is_said_before_anything_is_served(tmp_path: Path) -> None:
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="more than 0 and up to 86,400 s"):
            StudySettings(tmp_path, seconds=seconds)
    (tmp_path / "file").write_text("")
    for place in ("file", "file/within"):
        with pytest.raises(InputError, match="No study can be written there"):
            judging.check_target(tmp_path / place)


def test_a_study_of_one_text_is_read_back_and_simulated_anew(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cases are named after texts that no case of the list has."""
    one_text = replace(ground, domains=ground.domains[:1])
    drifting = next(case for case in CASES if case.name == "static-depth-70-steady-drifting")
    done = study.run_study(one_text, tmp_path, serve, cases=(drifting,), say=lambda text: None)
    recorded = results_of(done, one_text)
    judging.write_results(recorded, render(recorded), tmp_path / "out")
    found = judging.read_results(tmp_path / "out" / "results.json")
    assert [case["name"] for case in found["cases"]] == ["static-depth-70-steady-stable"]
    monkeypatch.setattr("reports.fidelity.resimulate.read_ground", lambda settings: one_text)
    anew = simulated_anew(found, one_text.profile.folder)
    assert changes(found, anew) == []
    assert anew["simulated_anew"]["changed"] == []


def results_of(done: study.Study, ground: Ground, command: str = "") -> dict[str, Any]:
    """A study's results, as its command has them."""
    cases = [study.case_data(one) for one in done.outcomes]
    return judging.results_of(study.facts_of(done, ground, command), cases)


class Paced:
    """A server whose runs tell the slowdowns that it is given, one after another."""

    def __init__(self, *slowdowns: float | None, sign: str = "slowdown") -> None:
        self.slowdowns = list(slowdowns)
        self.sign = sign
        self.asked: list[tuple[str, int]] = []

    def __call__(self, scenario: Path, out: Path, repeats: int) -> None:
        self.asked.append((out.name, repeats))
        serve(scenario, out, repeats)
        folders = [out / f"repeat-{k}" for k in range(1, repeats + 1)] if repeats > 1 else [out]
        for folder in folders:
            slowdown = self.slowdowns.pop(0)
            if slowdown is not None:
                facts = json.loads((folder / "totals.json").read_text())
                facts["environment"][self.sign] = slowdown
                (folder / "totals.json").write_text(json.dumps(facts))


def test_runs_beside_which_the_machine_was_slow_are_served_again_at_most_twice(
    ground: Ground, tmp_path: Path
) -> None:
    """The least slowed is kept, the others too but not counted; a resumed study tries no more."""
    server = Paced(1.3, 1.02, 1.4, 1.2)
    run = Case("static-depth", "70 %", "steady", "stable")
    done = study.run_study(ground, tmp_path, server, cases=(run,), say=lambda text: None)
    assert server.asked == [("real", 2), ("again", 1), ("again", 1)]
    assert server.slowdowns == []
    results = results_of(done, ground)
    (case,) = results["cases"]
    assert case["slowdowns"] == [1.2, 1.02]
    assert case["num_discarded"] == results["num_discarded"] == 2
    text = text_of(render(results))
    assert "2 runs were discarded, whatever came of them" in text
    assert "more than 1.15 times as slow; of those kept 1 still are." in text
    assert "1.20, 1.02 2" in text
    again = study.run_study(ground, tmp_path, server, cases=(run,), say=lambda text: None)
    assert again.outcomes[0].num_discarded == 2


def test_a_run_is_served_again_too_where_its_machine_was_slow_during_it(
    ground: Ground, tmp_path: Path
) -> None:
    server = Paced(1.1, 1.4, 1.2, 1.05, sign="pace_factor")
    run = Case("static-depth", "70 %", "steady", "stable")
    done = study.run_study(ground, tmp_path, server, cases=(run,), say=lambda text: None)
    assert server.asked == [("real", 2), ("again", 1), ("again", 1)]
    (case,) = results_of(done, ground)["cases"]
    assert case["pace_factors"] == [1.1, 1.05]
    assert case["num_discarded"] == 2


@pytest.mark.parametrize("num_repeats", [1, 2])
def test_a_study_that_is_killed_as_it_puts_a_run_in_its_place_serves_nothing_again(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_repeats: int
) -> None:
    """Between the two renames the disturbed run has gone, and the one in its stead is to come."""
    one = replace(ground, settings=replace(ground.settings, repeats=num_repeats, seconds=5.0))
    server = Paced(*[1.3, 1.02][:num_repeats], 1.01)
    run = Case("static-depth", "70 %", "steady", "stable")
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == "again":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    quiet: dict[str, Any] = {"cases": (run,), "say": lambda text: None}
    assert study.run_study(one, tmp_path, server, **quiet).interrupted
    monkeypatch.undo()
    asked = [("real", 2) if num_repeats == 2 else ("repeat-1", 1), ("again", 1)]
    assert server.asked == asked
    (outcome,) = study.run_study(one, tmp_path, server, **quiet).outcomes
    assert server.asked == asked
    slowdowns = [side.slowdown for side in outcome.fidelity.sides.reals]
    assert slowdowns == [1.01, 1.02][:num_repeats]
    assert outcome.num_discarded == 1


def test_a_run_alone_is_served_again_in_its_place(ground: Ground, tmp_path: Path) -> None:
    one = replace(ground, settings=replace(ground.settings, repeats=1))
    server = Paced(1.3, 1.01)
    run = Case("static-depth", "70 %", "steady", "stable")
    done = study.run_study(one, tmp_path, server, cases=(run,), say=lambda text: None)
    assert server.asked == [("repeat-1", 1), ("again", 1)]
    assert [side.slowdown for side in done.outcomes[0].fidelity.sides.reals] == [1.01]
    assert done.outcomes[0].num_discarded == 1
    hurried = study.run_study(
        one, tmp_path / "hurried", Paced(1.3), cases=(run,), most_again=0, say=lambda text: None
    )
    assert [side.slowdown for side in hurried.outcomes[0].fidelity.sides.reals] == [1.3]


def test_a_study_with_other_repeats_serves_what_is_missing_and_removes_nothing(
    ground: Ground, tmp_path: Path
) -> None:
    """One repeat more is one run more; one less leaves a run unused; one that broke is replaced."""
    server = Paced(*[None] * 5)
    run = Case("static-depth", "70 %", "steady", "stable")

    def repeats_of(repeats: int) -> list[str]:
        settings = replace(ground.settings, repeats=repeats, seconds=5.0)
        one = replace(ground, settings=settings)
        done = study.run_study(one, tmp_path, server, cases=(run,), say=lambda text: None)
        return [side.path.name for side in done.outcomes[0].fidelity.sides.reals]

    assert repeats_of(1) == ["repeat-1"]
    assert repeats_of(3) == ["repeat-1", "repeat-2", "repeat-3"]
    assert repeats_of(2) == ["repeat-1", "repeat-2"]
    assert server.asked == [("repeat-1", 1), ("repeat-2", 1), ("repeat-3", 1)]
    real = tmp_path / run.name / "real"
    assert sorted(one.name for one in real.iterdir()) == ["repeat-1", "repeat-2", "repeat-3"]
    (real / "repeat-2" / "totals.json").unlink()
    assert repeats_of(3) == ["repeat-1", "repeat-2", "repeat-3"]
    assert server.asked[3:] == [("repeat-2", 1)]


def test_runs_of_another_scenario_are_put_aside_and_not_removed(
    ground: Ground, tmp_path: Path
) -> None:
    """A profile fitted anew or a longer run gives another scenario; only --fresh removes runs."""
    run = Case("static-depth", "70 %", "steady", "stable")
    said: list[str] = []

    def studied(seconds: float, fresh: bool = False) -> None:
        one = replace(ground, settings=replace(ground.settings, repeats=1, seconds=seconds))
        study.run_study(one, tmp_path, serve, cases=(run,), fresh=fresh, say=said.append)

    studied(5.0)
    folder = tmp_path / run.name
    before = (tmp_path / "scenarios" / f"{run.name}.toml").read_text()
    kept = (folder / "real" / "repeat-1" / "totals.json").read_bytes()
    studied(6.0)
    earlier = folder / "earlier-1"
    assert (earlier / "real" / "repeat-1" / "totals.json").read_bytes() == kept
    assert (earlier / f"{run.name}.toml").read_text() == before
    assert f"its scenario has changed; what was served before is in {earlier}" in said[-1]
    studied(5.0)
    studied(7.0, fresh=True)
    assert sorted(one.name for one in folder.glob("earlier-*")) == ["earlier-1", "earlier-2"]


def test_equal_quality_takes_each_variants_smallest_threshold_and_then_the_fastest() -> None:
    """Only simulated figures count: those of slower variants, and larger thresholds, do not."""

    def simulated(options: dict[str, Any]) -> dict[str, float]:
        quick = options["objective"] == "throughput"
        perplexity = 12.0 - 2.0 * options["confidence_threshold"]
        return {"perplexity": perplexity, "output_throughput": 150.0 if quick else 90.0}

    vanilla = {"perplexity": 10.0, "output_throughput": 100.0}
    found = choose("helios", simulated, vanilla)
    assert len(found.tried) == 2 * len(THRESHOLDS)
    assert found.chosen is not None
    assert found.chosen.options == {"objective": "throughput", "confidence_threshold": 0.9}
    assert found.chosen.perplexity == pytest.approx(BOUND)
    assert found.chosen.throughput == pytest.approx(1.5)
    never = choose("helios", simulated, vanilla | {"perplexity": 5.0})
    assert never.chosen is None
    assert never.nearest.options["confidence_threshold"] == THRESHOLDS[-1]


def test_policies_of_equal_quality_are_laid_beside_the_others(
    ground: Ground, tmp_path: Path
) -> None:
    """What keeps the quality in simulation is served with those settings; what cannot is not."""
    group = [case for case in CASES if case.group == "gain"]
    some = tuple(case for case in group if case.policy == "vanilla" or case.equal_quality)
    done = study.run_study(ground, tmp_path, serve, cases=some, say=lambda text: None)
    served = {one.case.label for one in done.outcomes}
    assert served | {plan.case.label for plan in done.unserved} == {case.label for case in some}
    assert "ee-single at equal quality" in served
    results = results_of(done, ground)
    told = {one["policy"]: one for one in results["equal_quality"]}
    chosen = told["ee-single"]["chosen"]
    assert chosen["perplexity"] <= BOUND
    (beside,) = results["groups"]
    shown = {one["policy"]: one for one in beside["policies"]}
    ours = shown["ee-single at equal quality"]
    assert ours["options"] == chosen["options"]
    assert shown["vanilla"]["figures"]["perplexity"]["real_over_vanilla"] == 1.0
    assert ours["figures"]["perplexity"]["simulated_over_vanilla"] == pytest.approx(
        chosen["perplexity"]
    )
    scenario = load_scenario(tmp_path / "scenarios" / f"{told['ee-single']['case']}.toml")
    assert scenario.policy[0].options == chosen["options"] | {"model": ground.large}
    text = text_of(render(results))
    assert "At equal quality" in text
    assert "simulated before serving" in summary_text(results)


def test_the_server_is_the_command_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs beside this program; what it says last is the reason when it fails."""
    log = tmp_path / "log"
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@" > {log}\ncase "$*" in *bad*) echo no model >&2; exit 2;; esac\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    server = study.serving_command([tmp_path / "models"], "cpu", ["--threads", "1"])
    server(Path("one.toml"), Path("out"), 3)
    assert log.read_text().split() == [
        "-m",
        "calibration",
        "serve",
        "one.toml",
        "--checkpoints",
        str(tmp_path / "models"),
        "--out",
        "out",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--repeat",
        "3",
    ]
    with pytest.raises(InputError, match="exit code 2: no model"):
        server(Path("bad.toml"), Path("out"), 1)


class Ward:
    """What begins commands without a process of its own."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, module: str, arguments: Sequence[str]) -> tuple[int, str]:
        self.asked = [module, *arguments]
        return (2, "no model") if "bad.toml" in arguments else (0, "")


def test_the_server_may_be_a_child_of_a_process_that_has_imported_all(tmp_path: Path) -> None:
    ward = Ward()
    server = study.serving_command([tmp_path], "cuda", nursery=cast(Nursery, ward))
    server(Path("one.toml"), Path("out"), 1)
    assert ward.asked == [
        *("calibration", "serve", "one.toml", "--checkpoints", str(tmp_path)),
        *("--out", "out", "--device", "cuda"),
    ]
    with pytest.raises(InputError, match="exit code 2: no model"):
        server(Path("bad.toml"), Path("out"), 1)


def test_a_model_without_early_exits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("opt-a100-40gb")
    large = profile.models["opt-6.7b"]
    plain = replace(large, model=replace(large.model, exit_layers=(32,)))
    without = replace(profile, models=dict(profile.models) | {"opt-6.7b": plain})
    monkeypatch.setattr("reports.fidelity.cases.load_profile", lambda path: without)
    with pytest.raises(InputError, match="no exit before its full depth"):
        read_ground(StudySettings(Path("opt-a100-40gb")))
