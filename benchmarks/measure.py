"""Takes the measurements: every repetition of a case in a fresh process, one after another."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks import cases
from benchmarks.cases import Case

ROOT: Final = Path(__file__).resolve().parent.parent
TIMEOUT_S: Final = 900
_RSS_BYTES: Final = 1 if sys.platform == "darwin" else 1024
_HELIOS: Final = ("-c", "from helios_sim.cli import main; main()")

Progress = Callable[[str], None]


class MeasurementError(RuntimeError):
    """A process that was to be measured failed; the message is its last words."""


@dataclass(frozen=True)
class Finished:
    """A process that has run to its end, with what it used."""

    output: str
    seconds: float
    cpu_s: float
    peak_bytes: int


@dataclass
class Measured:
    """A case with the figures of its repetitions, or with why there are none."""

    case: Case
    samples: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Conditions:
    """What a run found out before it measured: the machine, and the rates of its cases."""

    machine: Mapping[str, Any]
    capacity_per_s: Mapping[str, float]
    native_rate_per_s: float

    def scenario(self, case: Case) -> dict[str, Any]:
        """A case's scenario at its share of the capacity."""
        rate_per_s = round(cases.LOAD * self.capacity_per_s[str(case.load)], 3)
        return cases.scenario_of(case, rate_per_s, self.native_rate_per_s)


def run_process(
    arguments: Sequence[str],
    text: str = "",
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
) -> Finished:
    """Run Python with arguments to its end and say what it used.

    The parent must stay small: until a new process has become another program, the system
    counts its parent's memory as its own.
    """
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(text.encode())
        given.seek(0)
        before = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=given,
            stdout=out,
            stderr=err,
            env=os.environ | dict(environment or {}),
            cwd=folder,
        )
        status, usage = _wait(process)
        seconds = time.perf_counter() - before
        out.seek(0)
        err.seek(0)
        output, errors = out.read().decode(), err.read().decode()
    if status != 0:
        words = errors.strip().splitlines() or [f"It ended with status {status}."]
        raise MeasurementError(words[-1])
    cpu_s = usage.ru_utime + usage.ru_stime
    return Finished(output, seconds, cpu_s, usage.ru_maxrss * _RSS_BYTES)


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, resource.struct_rusage]:
    """Wait for the end of a process, or end it when it takes too long."""
    alarm = threading.Timer(TIMEOUT_S, process.kill)
    alarm.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    finally:
        alarm.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job in a fresh worker process: its figures and its peak memory."""
    text = json.dumps({**job, "started_at_s": time.time()})
    finished = run_process(("-m", "benchmarks.worker"), text)
    figures: dict[str, Any] = json.loads(finished.output.splitlines()[-1])
    return figures | {"peak_bytes": finished.peak_bytes}


def probe(chosen: Sequence[Case]) -> Conditions:
    """Find the capacity under each load that the cases need, and compile everything once."""
    loads = {str(case.load): case.load for case in chosen}
    job = {
        "kind": "probe",
        "scenarios": {name: cases.probe_of(load) for name, load in loads.items()},
        "native": cases.native_azure(),
    }
    found = run_job(job)
    return Conditions(found["machine"], found["capacity_per_s"], found["native_rate_per_s"])


def measure(
    chosen: Sequence[Case], repetitions: int, conditions: Conditions, say: Progress
) -> list[Measured]:
    """Measure the cases round by round, so that a slow minute is shared by all."""
    measured = [Measured(case) for case in chosen]
    for turn in range(repetitions):
        for number, one in enumerate(measured, 1):
            case = one.case
            if one.failure or turn >= (case.repetitions or repetitions):
                continue
            say(f"round {turn + 1} of {repetitions}, {number} of {len(measured)}: {case.name}")
            try:
                one.samples.append(_sample(case, conditions))
            except MeasurementError as error:
                one.failure = str(error)
    return measured


def _sample(case: Case, conditions: Conditions) -> dict[str, Any]:
    """One repetition of a case."""
    if case.kind == "call":
        return _call(case, conditions)
    scenario = conditions.scenario(case)
    if case.kind == "sweep":
        return run_job({"kind": case.kind, "scenarios": cases.sweep_points(scenario)})
    return run_job(
        {
            "kind": case.kind,
            "records": case.records,
            "scenario": scenario,
            "warm_up": cases.warm_up_of(scenario),
        }
    )


def _call(case: Case, conditions: Conditions) -> dict[str, Any]:
    """`helios simulate` of ten requests, as a whole process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = _write_scenario(conditions.scenario(case), folder)
        cache = {"HELIOS_CACHE_DIR": str(folder / "cache")} if case.name == cases.FIRST_CALL else {}
        result = ("--out", "run") if case.name == cases.PAGE_CALL else ("--json",)
        arguments = (*_HELIOS, "simulate", str(path), *result)
        finished = run_process(arguments, environment=cache, folder=folder)
    return {"seconds": finished.seconds, "peak_bytes": finished.peak_bytes}


def _write_scenario(scenario: Mapping[str, Any], folder: Path) -> Path:
    """The scenario as a file, in the subset of TOML that its few types need."""
    path = folder / "scenario.toml"
    lines = [f"{key} = {_inline(value)}\n" for key, value in scenario.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _inline(value: Any) -> str:
    """A value on one line of TOML; text and numbers are written as in JSON."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_inline(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)
