"""The benchmarks measure what they say: cases parse, the reference engines agree, tables print."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import cases, measure, results, tables
from benchmarks.floor import FloorWork, check_finished, floor_work, run_floor
from benchmarks.simpy_engine import run_simpy
from benchmarks.worker import ROOT, experiment_from, play_and_record, scenario_from, work_off
from benchmarks.worker import Stopwatch as Watch
from helios_sim.search import studies
from helios_sim.search.executors import Workers
from helios_sim.workload.requests import Requests

CASES = cases.all_cases()
RUNS = [case for case in CASES if case.kind not in ("call", "sweep")]


def scenario(name: str, rate_per_s: float = 20.0) -> dict[str, Any]:
    """A case's scenario at a given rate."""
    case = next(case for case in CASES if case.name == name)
    return cases.scenario_of(case, rate_per_s, 5.5)


def small(name: str, num_requests: int = 200) -> dict[str, Any]:
    """A Poisson case cut down to a few requests."""
    data = scenario(name)
    data["workload"]["num_requests"] = num_requests
    return data


@pytest.fixture(scope="module")
def work() -> FloorWork:
    """200 requests for the reference engines, some of them long."""
    experiment = experiment_from(small("floor 10,000"))
    requests: Requests = experiment.requests(1)[0]
    work = floor_work(experiment, requests, cases.FLOOR_MODEL)
    work.output_tokens[::7] = 1
    work.output_tokens[::5] = 400
    return work


def test_every_case_is_a_scenario_of_its_own_size() -> None:
    """Each parses, warm-up and probe too, and its fleet and policy are what its name says."""
    assert len({case.name for case in CASES}) == len(CASES)
    for case in RUNS:
        data = cases.scenario_of(case, 20.0, 5.5)
        parsed = scenario_from(data)
        assert parsed.policy[0].name == case.load.policy
        assert parsed.fleet.num_replicas == case.num_replicas
        assert case.name.endswith(f"{case.num_requests:,}")
        if case.load.workload == "poisson":
            assert parsed.workload.num_requests == case.num_requests
        assert scenario_from(cases.warm_up_of(data)).policy == parsed.policy
        assert scenario_from(cases.probe_of(case.load)).policy == parsed.policy


def test_a_repeated_trace_has_the_size_and_rate_that_it_was_asked_for() -> None:
    """The compressed trace brings the wanted rate, up to the gap between two copies."""
    name = f"azure helios {cases.AZURE_REQUESTS:,}"
    native, _ = experiment_from(cases.native_azure()).requests(1)
    case = next(case for case in CASES if case.name == name)
    data = cases.scenario_of(case, 11.0, len(native) / native.span_s)
    requests, _ = experiment_from(data).requests(1)
    assert len(requests) == case.num_requests
    assert len(requests) / requests.span_s == pytest.approx(11.0, rel=1e-3)


def test_the_arrival_rate_grows_with_the_replicas() -> None:
    name = cases.fleet_name("helios", 64, "least-outstanding")
    assert scenario(name, 2.0)["workload"]["arrivals"]["rate_per_s"] == 128.0


def test_the_floor_and_the_simpy_engine_finish_every_request_at_the_same_time(
    work: FloorWork,
) -> None:
    """Two loops written apart agree on the batching, the exits and the costs."""
    floor_s, simpy_s = run_floor(work), run_simpy(work)
    check_finished(work, floor_s)
    np.testing.assert_allclose(floor_s, simpy_s, rtol=1e-9)


@pytest.mark.parametrize("engine", [run_floor, run_simpy])
def test_tokens_that_exit_early_finish_earlier(engine: Any, work: FloorWork) -> None:
    """With all tokens at the first exit the same requests take much less time than at the last."""
    early = replace(work, leaving_level=np.zeros_like(work.leaving_level))
    last = np.full_like(work.leaving_level, len(work.exit_layers) - 1)
    late = replace(work, leaving_level=last)
    early_s, late_s = (np.mean(engine(one) - one.arrival_s) for one in (early, late))
    assert early_s < 0.7 * late_s


def test_a_request_that_never_finishes_is_noticed(work: FloorWork) -> None:
    finished_s = run_floor(work)
    finished_s[3] = np.nan
    with pytest.raises(RuntimeError, match="did not finish"):
        check_finished(work, finished_s)


@pytest.mark.parametrize("records", [True, False])
def test_a_job_gives_figures_of_all_its_requests(records: bool) -> None:
    """Tokens are counted from what was served, and the parts add up to the time."""
    data = small(f"helios continuous {'records' if records else 'play'} 10,000")
    job = {"kind": "simulate", "records": records, "scenario": data, "started_at_s": 0.0}
    figures = work_off(job | {"warm_up": cases.warm_up_of(data)})
    assert figures["num_requests"] == 200
    assert figures["output_tokens"] == 200 * cases.OUTPUT_TOKENS
    assert figures["num_decisions"] > 1
    parts_s = figures["parts_s"]
    assert ("write" in parts_s) == records
    timed_s = sum(parts_s.values()) if records else parts_s["play"]
    assert figures["seconds"] == pytest.approx(timed_s)


@pytest.mark.parametrize("kind", ["floor", "simpy"])
def test_a_reference_job_gives_figures_of_all_its_requests(kind: str) -> None:
    data = small("floor 10,000")
    job = {"kind": kind, "scenario": data, "warm_up": cases.warm_up_of(data), "started_at_s": 0.0}
    figures = work_off(job)
    assert figures["num_requests"] == 200
    assert figures["output_tokens"] == 200 * cases.OUTPUT_TOKENS


def test_a_sweep_is_measured_by_the_processes_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All points are handed over, and the processor time of ended processes is counted."""
    seen: list[Any] = []
    used_s: list[float] = []
    code = "import time; sum(range(5_000_000)); print(time.process_time())"

    def carry_out(asked: list[Any], workers: Workers, store: Any) -> None:
        (study,) = asked
        seen.extend((point.scenario.seed, workers.max_in_flight) for point in next(study.steps))
        told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        used_s.append(float(told.stdout))

    monkeypatch.setattr(studies, "carry_out", carry_out)
    points = cases.sweep_points(scenario(f"helios continuous records {100_000:,}"))
    figures = work_off({"kind": "sweep", "scenarios": points, "started_at_s": 0.0})
    assert seen == [(seed, 2 * 2) for seed in range(1, 17)]
    assert figures["cpu_use"] * cases.SWEEP_PROCESSES * figures["seconds"] >= used_s[0] > 0.0


def test_at_the_probed_rate_a_replica_is_loaded_but_keeps_up() -> None:
    """Three quarters of the capacity of a saturated run keep a replica busy without a backlog."""
    load = cases.Load("vanilla")
    found = work_off(
        {
            "kind": "probe",
            "scenarios": {str(load): cases.probe_of(load)},
            "native": cases.native_azure(),
        }
    )
    assert found["native_rate_per_s"] == pytest.approx(5.53, abs=0.01)
    conditions = measure.Conditions({}, found["capacity_per_s"], found["native_rate_per_s"])
    case = next(one for one in RUNS if one.load == load)
    data = conditions.scenario(case)
    data["workload"]["num_requests"] = 2_000
    run, _ = play_and_record(experiment_from(data), Watch())
    span_s = float(run.requests["arrival_s"][-1])
    assert run.totals.busy_s / run.totals.end_s > 0.75
    assert run.totals.end_s < 1.1 * span_s


def test_what_is_known_of_the_machine_does_not_name_it() -> None:
    """Versions and the number of processors, no host, no user, no path."""
    from benchmarks.worker import machine

    told = machine()
    assert {"num_cpus", "python", "numba"} < told.keys()
    assert "node" not in told
    assert not [value for value in told.values() if "/" in str(value)]


def test_a_written_scenario_reads_as_it_was(tmp_path: Path) -> None:
    data = scenario(cases.fleet_name("helios", 8, "round-robin"))
    path = measure._write_scenario(data, tmp_path)
    assert tomllib.loads(path.read_text(encoding="utf-8")) == data


def test_the_measuring_process_stays_small() -> None:
    """It imports no numerical library, whose memory would count as that of what it starts."""
    code = (
        "import sys, benchmarks.__main__;"
        "print({'numpy', 'numba', 'polars', 'scipy', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_a_process_is_measured_by_itself() -> None:
    """Output, processor time and memory are those of the process that was started."""
    code = "x = bytearray(500_000_000); sum(range(3_000_000)); print(len(x))"
    finished = measure.run_process(("-c", code))
    assert finished.output.strip() == "500000000"
    assert 500e6 < finished.peak_bytes < 5e9
    assert 0.0 < finished.cpu_s < 60.0


def test_a_process_that_fails_is_reported_with_its_last_words() -> None:
    with pytest.raises(measure.MeasurementError, match="no such luck"):
        measure.run_process(("-c", "raise SystemExit('no such luck')"))


def sample(seconds: float, tokens: int | None = None, peak_bytes: float = 4e8) -> dict[str, Any]:
    """The figures of a repetition."""
    figures = {"seconds": seconds, "peak_bytes": peak_bytes}
    if tokens is not None:
        figures |= {"output_tokens": tokens, "startup_s": 0.5, "parts_s": {"play": seconds}}
    return figures


def gathered(baseline: dict[str, Any] | None = None) -> results.Results:
    """The results of a made-up run: the headline in 4, 2 and 3 s, the floor in half a second."""
    seconds = {
        "floor 1,000,000": [0.5],
        "helios continuous records 10,000": [0.03],
        "helios continuous records 100,000": [0.3],
        "helios continuous records 1,000,000": [4.0, 2.0, 3.0],
        cases.fleet_name("helios", 8, "least-outstanding"): [2.0],
        cases.fleet_name("helios", 64, "least-outstanding"): [3.6],
        cases.FIRST_CALL: [20.0],
        cases.LATER_CALL: [1.5],
    }
    measured = []
    for case in CASES:
        if case.name in seconds:
            tokens = None if case.kind == "call" else 128 * case.num_requests
            samples = [sample(one, tokens) for one in seconds[case.name]]
            measured.append(measure.Measured(case, samples))
    broken = next(case for case in CASES if case.kind == "simpy")
    measured.append(measure.Measured(broken, [], "it broke"))
    conditions = measure.Conditions({"python": "3"}, {"helios": 30.0}, 5.5)
    return results.gather(measured, conditions, baseline, False, 3)


def test_a_line_holds_medians_and_ratios() -> None:
    line = gathered().line("helios continuous records 1,000,000")
    assert line is not None
    assert line.seconds == 3.0
    assert line.requests_per_s == pytest.approx(1e6 / 3)
    assert line.tokens_per_s == pytest.approx(128e6 / 3)
    assert line.times_floor == pytest.approx(6.0)
    assert line.vs_baseline is None


def test_every_bar_is_judged_by_its_limit() -> None:
    """Met where the figure keeps to the limit, else missed by their ratio, else not measured."""
    verdicts = {bar.promise: bar.verdict for bar in results.bars(gathered())}
    headline = "helios, continuous, records, 1,000,000 requests: "
    fleet = "8 replicas, least-outstanding: at least 60,000 requests/s"
    growth = "64 replicas: seconds an arrival as with 8, least-outstanding (within 1.2x)"
    assert verdicts[f"{headline}at least 300,000 requests/s"] == "met"
    assert verdicts[f"{headline}within 4x of the floor"] == "missed by 1.50x"
    assert verdicts[f"{headline}at most 250 B a request above 300 MB"] == "met"
    assert verdicts["First call, compilation included, under 30 s"] == "met"
    assert verdicts["Later calls start in under 1 s"] == "missed by 1.50x"
    assert verdicts[fleet] == "missed by 1.20x"
    assert verdicts[growth] == "missed by 1.50x"
    linear = "Time grows linearly from 10,000 to 1,000,000 requests (within 1.2x)"
    assert verdicts[linear] == "met"
    assert list(verdicts.values()).count("not measured") == 4


def test_a_run_is_its_own_baseline(tmp_path: Path) -> None:
    """What --json writes can be read by --baseline, and against itself every case is 1."""
    path = tmp_path / "run.json"
    results.write_document(gathered(), path)
    again = gathered(results.read_baseline(path))
    assert again.baseline_machine == {"python": "3"}
    assert [line.vs_baseline for line in again.lines] == [1.0] * len(again.lines)


def test_the_tables_show_every_case_bar_and_failure() -> None:
    console = Console(width=160)
    found = gathered()
    with console.capture() as capture:
        console.print(tables.page(found))
    text = capture.get()
    for line in found.lines:
        assert line.case.name in text
    assert "missed by 1.50x" in text
    assert "it broke" in text
    assert "4 of 12 bars were not measured." in text
    assert "333,333" in text


def test_a_choice_brings_its_floor_along() -> None:
    """A case is compared with the floor of its size, so that is measured too."""
    picked = cases.chosen(CASES, quick=False, only="helios chunked play 100,000")
    assert [case.name for case in picked] == ["floor 100,000", "helios chunked play 100,000"]
    assert cases.chosen(CASES, quick=False, only="nothing like this") == []


def test_a_quick_run_is_part_of_a_whole_one_without_its_largest_cases() -> None:
    quick = cases.chosen(CASES, quick=True, only="")
    assert set(quick) < set(cases.chosen(CASES, quick=False, only=""))
    assert max(case.num_requests for case in quick) == 100_000
    assert {case.kind for case in quick} == {case.kind for case in CASES}


def test_the_stored_baseline_speaks_of_cases_that_exist() -> None:
    stored = json.loads(command.BASELINE.read_text(encoding="utf-8"))
    assert stored["cases"].keys() <= {case.name for case in CASES}
    assert stored["cases"]


def test_the_command_measures_one_case_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the file, with real processes."""
    path = tmp_path / "speed.json"
    arguments = ["--quick", "--only", "floor 10,000", "--json", str(path)]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "floor 10,000" in shown
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["cases"]["floor 10,000"]["num_requests"] == 10_000
    assert written["failures"] == {}


def test_a_choice_of_nothing_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "nothing like this"]) == 2
    assert "No case holds 'nothing like this'" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["x", "0", "-1", "1.5"])
def test_repetitions_that_none_can_make_are_said_in_words(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main([f"--repetitions={given}"])
    assert "a whole number of at least 1 is needed" in capsys.readouterr().err


def test_a_baseline_that_is_not_there_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--baseline", str(tmp_path / "none.json")]) == 2
    assert "There is no baseline" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"cases": [1]}'])
def test_a_baseline_that_is_none_is_said_before_anything_is_measured(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert command.main(["--baseline", str(path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_place_for_the_figures_is_looked_at_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path, tmp_path / "none" / "speed.json"):
        assert command.main(["--json", str(place)]) == 2
        assert "cannot be written" in capsys.readouterr().err
