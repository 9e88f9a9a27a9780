"""Serve every case for real, simulate it, compare the two, and keep the figures."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.fidelity import Fidelity, assess, read_sides
from helios_sim.fidelity.assessment import FIDELITY_FILE, json_text
from helios_sim.fidelity.page import render
from helios_sim.publish import write_comparison
from helios_sim.runs.records import TOTALS_FILE, write_run
from helios_sim.scenario import load_scenario
from helios_sim.settings.toml_writer import toml_text
from reports.fidelity.cases import (
    CASES,
    Case,
    Ground,
    Planned,
    planned,
    scenario_of,
    without_drift,
)
from reports.fidelity.quality import BOUND
from reports.forked import Nursery

Server = Callable[[Path, Path, int], None]
"""Serves a scenario file for real into a folder, so many times."""
Say = Callable[[str], None]

MAX_SLOWDOWN: Final = 1.15
"""A run around or during which the machine was this much slower is served again."""
MAX_AGAIN: Final = 2
"""Times that a run is served again at most; the least slowed one is kept."""


@dataclass(frozen=True)
class Outcome:
    """A case that was run: its plan, the comparison, and how many real runs were discarded."""

    plan: Planned
    fidelity: Fidelity
    num_discarded: int = 0

    @property
    def case(self) -> Case:
        """The case."""
        return self.plan.case


@dataclass(frozen=True)
class Study:
    """All cases that were run, and those of equal quality that had no settings to be run with.

    `failed` says of each case that could not be served why; `interrupted` that others are missing.
    """

    outcomes: tuple[Outcome, ...]
    unserved: tuple[Planned, ...] = ()
    failed: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def plans(self) -> tuple[Planned, ...]:
        """Every case's plan."""
        return (*(one.plan for one in self.outcomes), *self.unserved)


def serving_command(
    checkpoints: Sequence[Path],
    device: str,
    more: Sequence[str] = (),
    nursery: Nursery | None = None,
) -> Server:
    """A server that is the command `helios-calibrate serve`, run beside this program.

    With a `nursery` it is a child of that, which begins without importing torch.
    """

    def serve(scenario: Path, out: Path, repeats: int) -> None:
        folders = [word for folder in checkpoints for word in ("--checkpoints", str(folder))]
        words = ["serve", str(scenario), *folders, "--out", str(out), "--device", device, *more]
        if repeats > 1:
            words += ["--repeat", str(repeats)]
        code, last = _ran_beside(words) if nursery is None else nursery.run("calibration", words)
        if code != 0:
            raise InputError(
                f"Serving failed with exit code {code}: {last or 'it said nothing'}",
                shlex.join(["helios-calibrate", *words]),
            )

    return serve


def _ran_beside(words: Sequence[str]) -> tuple[int, str]:
    """Run `helios-calibrate` in a process of its own: its exit code and its last error.

    As a module, it is of the tree that this study is of; the command is of what is installed.
    """
    program = [sys.executable, "-m", "calibration"]
    done = subprocess.run([*program, *words], stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def run_study(
    ground: Ground,
    work: Path,
    server: Server,
    *,
    cases: tuple[Case, ...] = CASES,
    fresh: bool = False,
    most_again: int = MAX_AGAIN,
    allow_simulated: bool = False,
    say: Say = print,
) -> Study:
    """Run all cases; real runs that `work` holds of the same scenario are not served again.

    `allow_simulated` takes what the server leaves for real though it says that it is not.

    A case that cannot be served ends none but itself, and an interruption leaves those before it.
    Raises `InputError` where no case could be served.
    """
    if not ground.can_drift:
        # Nothing drifts with one kind of text; the case is run all the same and says so.
        cases = tuple(map(without_drift, cases))
    plans = planned(cases, ground)
    profile = os.path.relpath(ground.profile.folder.resolve(), (work / "scenarios").resolve())
    outcomes: list[Outcome] = []
    unserved: list[Planned] = []
    failed: list[str] = []
    interrupted = False
    for number, plan in enumerate(plans, 1):
        case = plan.case
        if not plan.is_served:
            say(f"{number} of {len(plans)}: {case.name}: no settings keep the quality, not served")
            unserved.append(plan)
            continue
        data = scenario_of(case, ground, plan.rate_per_s, plan.num_requests, profile, plan.options)
        say(
            f"{number} of {len(plans)}: {case.name}, {plan.num_requests} requests at "
            f"{plan.rate_per_s:g}/s ({plan.rate_per_s / plan.capacity_per_s:.2f} of its capacity)"
        )
        repeats = ground.settings.repeats
        try:
            outcomes.append(
                run_case(plan, data, work, server, repeats, fresh, most_again, allow_simulated, say)
            )
        except InputError as error:
            say(f"{case.name}: {error}")
            failed.append(f"{case.name}: {error}")
        except KeyboardInterrupt:
            interrupted = True
            break
    if failed and not outcomes:
        raise InputError(failed[0])
    return Study(tuple(outcomes), tuple(unserved), tuple(failed), interrupted)


def run_case(
    plan: Planned,
    data: dict[str, Any],
    work: Path,
    server: Server,
    repeats: int,
    fresh: bool,
    most_again: int,
    allow_simulated: bool,
    say: Say,
) -> Outcome:
    """Serve, simulate and compare one case."""
    path = work / "scenarios" / f"{plan.case.name}.toml"
    folder = work / plan.case.name
    text = toml_text(data)
    real, discarded = folder / "real", folder / "discarded"
    if fresh:
        # What was discarded goes first, since it may lend a run to a folder that misses one.
        shutil.rmtree(discarded, ignore_errors=True)
        shutil.rmtree(real, ignore_errors=True)
    elif path.is_file() and path.read_text(encoding="utf-8") != text:
        place = put_aside(folder, path)
        if place is not None:
            say(f"{plan.case.name}: its scenario has changed; what was served before is in {place}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    finish_exchange(real, discarded)
    runs = served(real, path, repeats, server)
    for run in runs:
        serve_until_quiet(run, path, discarded, server, most_again, say)
    simulated = folder / "simulated"
    scenario = load_scenario(path)
    experiment = prepare(scenario, path.parent, str(path))
    result = run_policy(experiment, scenario.policy[0])
    write_run(result.run, result.summary, simulated)
    sides = read_sides(runs, simulated, allow_simulated=allow_simulated, base_dir=path.parent)
    fidelity = assess(sides, path.parent)
    write_comparison(render(fidelity), json_text(fidelity), folder / "fidelity", FIDELITY_FILE)
    return Outcome(plan, fidelity, len(_earlier(discarded)))


def served(real: Path, scenario: Path, repeats: int, server: Server) -> list[Path]:
    """The repeats of a case, of which only those are served that are missing.

    Those of an earlier study with more repeats stay, and are not used.
    """
    places = [real / f"repeat-{number}" for number in range(1, repeats + 1)]
    missing = [place for place in places if not (place / TOTALS_FILE).is_file()]
    for place in missing:
        shutil.rmtree(place, ignore_errors=True)
    if missing == places and repeats > 1:
        # One process serves them all, so that kernels and checkpoints are loaded once.
        server(scenario, real, repeats)
        return places
    for place in missing:
        server(scenario, place, 1)
    return places


def put_aside(folder: Path, scenario: Path) -> Path | None:
    """Move a case's runs of another scenario into a folder of their own; None if there are none."""
    found = [one for name in ("discarded", "real") if (one := folder / name).exists()]
    if not found:
        return None
    names = (folder / f"earlier-{number}" for number in itertools.count(1))
    place = next(one for one in names if not one.exists())
    place.mkdir()
    shutil.copy2(scenario, place / scenario.name)
    # What was discarded goes first, since it may lend a run to a folder that misses one.
    for one in found:
        one.rename(place / one.name)
    return place


def serve_until_quiet(
    run: Path, scenario: Path, discarded: Path, server: Server, most_again: int, say: Say
) -> None:
    """Serve a run again that a busy machine disturbed, and keep the one least slowed.

    Only the machine's pace around and during a run counts, never its figures. What is not kept
    goes into `discarded`, so that nothing is lost and a study that is resumed does not try for
    ever.
    """
    for attempt in range(len(_earlier(discarded, run.name)) + 1, most_again + 1):
        before = slowdown_of(run)
        if before is None or before <= MAX_SLOWDOWN:
            return
        again = discarded / "again"
        shutil.rmtree(again, ignore_errors=True)
        server(scenario, again, 1)
        after = slowdown_of(again)
        say(f"{run.name}: slowdown {before:.3g}; served again: {after or math.nan:.3g}")
        place = discarded / f"{run.name}-{attempt}"
        if after is not None and after < before:
            run.rename(place)
            again.rename(run)
        else:
            again.rename(place)


def finish_exchange(real: Path, discarded: Path) -> None:
    """Put what was served again in its run's place, where a kill came between the two renames."""
    again = discarded / "again"
    for place in _earlier(discarded):
        run = real / place.name.rpartition("-")[0]
        if not run.exists() and (again / TOTALS_FILE).is_file():
            again.rename(run)


def slowdown_of(run: Path) -> float | None:
    """How much slower the machine was around or during a run; None where neither is known."""
    facts = json.loads((run / TOTALS_FILE).read_text(encoding="utf-8"))
    found = [facts["environment"].get(key) for key in ("slowdown", "pace_factor")]
    return max((float(one) for one in found if isinstance(one, int | float)), default=None)


def _earlier(discarded: Path, name: str = "*") -> list[Path]:
    """Runs that were discarded, of one repeat or of all."""
    return [one for one in discarded.glob(f"{name}-[0-9]*") if (one / TOTALS_FILE).is_file()]


def facts_of(study: Study, ground: Ground, command: str) -> dict[str, Any]:
    """What is known of the study as a whole, beside its cases."""
    settings = ground.settings
    return {
        "command": command,
        "profile": ground.profile.name,
        "profile_hash": ground.profile.hash,
        "device": ground.profile.device.name,
        "device_kind": "cpu" if ground.profile.is_of_processor else "gpu",
        "candidates": list(ground.candidates),
        "max_batch": settings.max_batch,
        "overlap_loads": settings.overlap_loads,
        "num_repeats": settings.repeats,
        "environment": study.outcomes[0].fidelity.sides.typical.run.environment,
        "max_slowdown": MAX_SLOWDOWN,
        "equal_quality": [_choice(plan) for plan in study.plans if plan.choice is not None],
        "simulated_anew": None,
    }


def case_data(outcome: Outcome) -> dict[str, Any]:
    """One case: its plan, figures, requests, and causes."""
    plan, data = outcome.plan, outcome.fidelity.data()
    return {
        "name": plan.case.name,
        "policy": plan.case.label,
        "load": plan.case.load,
        "arrivals": plan.case.arrivals,
        "texts": plan.case.texts,
        "group": plan.case.group,
        "equal_quality": plan.case.equal_quality,
        "rate_per_s": plan.rate_per_s,
        "capacity_per_s": plan.capacity_per_s,
        "num_requests": plan.num_requests,
        "options": plan.options,
        "slowdowns": [side.slowdown for side in outcome.fidelity.sides.reals],
        "pace_factors": [side.pace_factor for side in outcome.fidelity.sides.reals],
        "num_discarded": outcome.num_discarded,
        "figures": data["figures"],
        "requests": data["requests"],
        "attribution": data["attribution"],
        "notes": data["notes"],
    }


def _choice(plan: Planned) -> dict[str, Any]:
    """What was tried for equal quality before anything was served, and what was taken."""
    choice = plan.choice
    assert choice is not None
    return {
        "case": plan.case.name,
        "group": plan.case.group,
        "policy": plan.case.policy,
        "bound": BOUND,
        "chosen": None if choice.chosen is None else asdict(choice.chosen),
        "nearest": asdict(choice.nearest),
        "tried": [asdict(one) for one in choice.tried],
    }
