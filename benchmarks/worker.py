"""One measurement in a process of its own: a job on standard input, its figures on standard output.

`started_at_s` in a job is when the process was started, so that the start-up covers the
interpreter, all imports, reading the profile and a run of ten requests, which brings in the
compiled code.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import FLOOR_MODEL, SWEEP_PROCESSES
from benchmarks.floor import check_finished, floor_work, run_floor
from helios_sim.engine import Run
from helios_sim.experiment import Experiment, prepare
from helios_sim.outcome import run_data
from helios_sim.policy.registry import make_policy
from helios_sim.runs.laws import check_run
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import RunData, write_run
from helios_sim.scenario import Scenario, parse_scenario, resolved

Job = Mapping[str, Any]
Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
SEED = 1


class Stopwatch:
    """Seconds of each part of the work, by name."""

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._since_s = time.perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap under a name."""
        now_s = time.perf_counter()
        self.parts_s[part] = now_s - self._since_s
        self._since_s = now_s


def scenario_from(data: Mapping[str, Any]) -> Scenario:
    """A case's scenario; files it names lie where the shipped scenarios look for them."""
    return parse_scenario(data, "benchmark", ROOT / "scenarios")


def experiment_from(data: Mapping[str, Any]) -> Experiment:
    """A case's experiment, ready to run."""
    return prepare(scenario_from(data), ROOT / "scenarios", "benchmark")


def play(experiment: Experiment, watch: Stopwatch) -> Run:
    """Make the requests, build the world and play it."""
    policy = experiment.scenario.policy[0]
    requests, _ = experiment.requests(SEED)
    watch.lap("requests")
    run = Run(experiment.setup, requests, lambda: make_policy(policy.use, policy.options))
    watch.lap("build")
    run.play()
    watch.lap("play")
    return run


def play_and_record(experiment: Experiment, watch: Stopwatch) -> tuple[RunData, dict[str, Any]]:
    """Play it and take its records; the world is let go, as it is when a user runs a scenario."""
    run = play(experiment, watch)
    policy = experiment.scenario.policy[0]
    data = run_data(run, policy.name, policy.use, SEED, resolved(experiment.scenario))
    run.disband()
    del run
    watch.lap("records")
    check_run(data)
    watch.lap("check")
    summary = summarise(data, None)
    watch.lap("summarise")
    return data, summary


def simulate(experiment: Experiment, records: bool, folder: Path) -> Figures:
    """Run a case: with records from the requests to the written folder, else the play alone."""
    watch = Stopwatch()
    if records:
        data, summary = play_and_record(experiment, watch)
        write_run(data, summary, folder / "run")
        watch.lap("write")
        tokens, num_requests = int(data.requests["generated_tokens"].sum()), len(data.requests)
        num_decisions = len(data.decisions)
        seconds = sum(watch.parts_s.values())
    else:
        run = play(experiment, watch)
        num_requests, num_decisions = len(run.requests), len(run.decisions)
        tokens = int(run.world.requests["generated"].sum())
        seconds = watch.parts_s["play"]
    return {
        "seconds": seconds,
        "parts_s": watch.parts_s,
        "num_requests": num_requests,
        "output_tokens": tokens,
        "num_decisions": num_decisions,
    }


def simulate_job(job: Job) -> Figures:
    """A case of the simulator."""
    experiment = experiment_from(job["scenario"])
    warm_up = replace(experiment, scenario=scenario_from(job["warm_up"]))
    with tempfile.TemporaryDirectory() as folder:
        simulate(warm_up, job["records"], Path(folder))
        startup_s = time.time() - job["started_at_s"]
        return simulate(experiment, job["records"], Path(folder)) | {"startup_s": startup_s}


def reference_job(job: Job) -> Figures:
    """The floor or the SimPy engine on the requests of a case."""
    from benchmarks.simpy_engine import run_simpy

    engine: Callable[[Any], Any] = run_floor if job["kind"] == "floor" else run_simpy
    experiment = experiment_from(job["scenario"])
    warm_up = replace(experiment, scenario=scenario_from(job["warm_up"]))
    engine(floor_work(warm_up, warm_up.requests(SEED)[0], FLOOR_MODEL))
    startup_s = time.time() - job["started_at_s"]
    watch = Stopwatch()
    work = floor_work(experiment, experiment.requests(SEED)[0], FLOOR_MODEL)
    watch.lap("requests")
    finished_s = engine(work)
    watch.lap("play")
    check_finished(work, finished_s)
    return {
        "seconds": watch.parts_s["play"],
        "parts_s": watch.parts_s,
        "num_requests": len(finished_s),
        "output_tokens": int(work.output_tokens.sum()),
        "num_decisions": 0,
        "startup_s": startup_s,
    }


def sweep_job(job: Job) -> Figures:
    """A sweep over scenarios, and the share of its processors' time that its processes used."""
    from helios_sim.search.executors import open_workers
    from helios_sim.search.points import Figures as Found
    from helios_sim.search.points import Point, point_of
    from helios_sim.search.store import Store
    from helios_sim.search.studies import Outcome, Study, carry_out, figures_of

    points = [point_of(scenario_from(data), ROOT / "scenarios") for data in job["scenarios"]]

    def steps() -> Generator[Sequence[Point], list[Outcome], list[Found]]:
        return figures_of((yield points))

    startup_s = time.time() - job["started_at_s"]
    before_s, since_s = _children_cpu_s(), time.perf_counter()
    with open_workers(SWEEP_PROCESSES) as workers:
        carry_out([Study(steps(), len(points))], workers, Store())
    seconds = time.perf_counter() - since_s
    return {
        "seconds": seconds,
        "startup_s": startup_s,
        "cpu_use": (_children_cpu_s() - before_s) / (SWEEP_PROCESSES * seconds),
    }


def _children_cpu_s() -> float:
    """Processor time of the processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def probe_job(job: Job) -> Figures:
    """The capacity of one replica under each load, and the rate of the recorded trace.

    What the other cases need compiled is compiled on the way.
    """
    capacities = {}
    for load, data in job["scenarios"].items():
        run = play(experiment_from(data), Stopwatch())
        capacities[load] = len(run.requests) / run.end_s
    experiment = experiment_from(job["native"])
    requests, _ = experiment.requests(SEED)
    run_floor(floor_work(experiment, requests, FLOOR_MODEL))
    return {
        "capacity_per_s": capacities,
        "native_rate_per_s": len(requests) / requests.span_s,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on and with; nothing that names the machine or its user."""
    import platform
    from importlib.metadata import version

    packages = ("helios-sim", "numba", "numpy", "polars", "scipy", "simpy")
    return {
        "num_cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def work_off(job: Job) -> Figures:
    """The figures of a job."""
    if job["kind"] == "probe":
        return probe_job(job) | {"machine": machine()}
    if job["kind"] == "simulate":
        return simulate_job(job)
    if job["kind"] == "sweep":
        return sweep_job(job)
    return reference_job(job)


if __name__ == "__main__":
    print(json.dumps(work_off(json.load(sys.stdin))))
