"""Serve every case for real, simulate it, compare the two, and keep the figures."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.fidelity import Fidelity, assess, read_sides, run_folders
from helios_sim.fidelity.figures import FigureRow
from helios_sim.fidelity.publish import write_fidelity
from helios_sim.metrics import rounded_figures
from helios_sim.records import TOTALS_FILE, toml_text, write_run
from helios_sim.scenario import load_scenario
from reports.fidelity.cases import CASES, Case, Ground, Planned, planned, scenario_of
from reports.fidelity.quality import BOUND
from reports.fidelity.summary import WITHIN_BAR

Server = Callable[[Path, Path, int], None]
"""Serves a scenario file for real into a folder, so many times."""
Say = Callable[[str], None]

MAX_SLOWDOWN: Final = 1.15
"""A run around which the machine was slower than this, against the profile's, is served again."""
MAX_AGAIN: Final = 2
"""Times that a run is served again at most; the least slowed one is kept."""

TARGETS: Final = {
    "output_throughput": 0.03,
    "mean_tpot_ms": 0.03,
    "p50_e2el_ms": 0.05,
    "p90_ttft_ms": 0.10,
    "total_gpu_energy": 0.05,
    "mean_batch_size": 0.03,
}
"""Median absolute errors that a GPU is held to."""

GAINS: Final = (
    ("output_throughput", "throughput", True),
    ("mean_e2el_ms", "mean E2E", False),
    ("p50_ttft_ms", "median TTFT", False),
    ("mean_tpot_ms", "mean TPOT", False),
    ("energy_per_output_token", "energy per token", False),
    ("mean_batch_size", "batch size", True),
    ("perplexity", "perplexity", False),
)
"""Figures in which HELIOS is set against the baselines, and whether more is better."""

BESIDE: Final = (
    "output_throughput",
    "mean_e2el_ms",
    "p50_ttft_ms",
    "mean_batch_size",
    "perplexity",
)
"""Figures of every policy of a group, laid beside vanilla's."""


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


def serving_command(checkpoints: Sequence[Path], device: str, more: Sequence[str] = ()) -> Server:
    """A server that is the command `helios-calibrate serve`, run beside this program."""

    def serve(scenario: Path, out: Path, repeats: int) -> None:
        beside = Path(sys.executable).with_name("helios-calibrate")
        program = [str(beside)] if beside.is_file() else [sys.executable, "-m", "calibration"]
        folders = [word for folder in checkpoints for word in ("--checkpoints", str(folder))]
        words = [*program, "serve", str(scenario), *folders, "--out", str(out)]
        words += ["--device", device, *more]
        if repeats > 1:
            words += ["--repeat", str(repeats)]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise InputError(
                f"Serving failed with exit code {done.returncode}: {last}", " ".join(words)
            )

    return serve


def run_study(
    ground: Ground,
    work: Path,
    server: Server,
    *,
    cases: tuple[Case, ...] = CASES,
    fresh: bool = False,
    most_again: int = MAX_AGAIN,
    say: Say = print,
) -> Study:
    """Run all cases; real runs that `work` holds of the same scenario are not served again.

    A case that cannot be served ends none but itself, and an interruption leaves those before it.
    Raises `InputError` where no case could be served.
    """
    if not ground.can_drift:
        # Nothing drifts with one kind of text; the case is run all the same and says so.
        cases = tuple(replace(case, texts="stable") for case in cases)
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
            outcomes.append(run_case(plan, data, work, server, repeats, fresh, most_again, say))
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
    say: Say,
) -> Outcome:
    """Serve, simulate and compare one case."""
    path = work / "scenarios" / f"{plan.case.name}.toml"
    folder = work / plan.case.name
    text = toml_text(data)
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    path.parent.mkdir(parents=True, exist_ok=True)
    real, discarded = folder / "real", folder / "discarded"
    if real.exists() and (fresh or not same or not _is_whole(real, repeats)):
        shutil.rmtree(real)
    path.write_text(text, encoding="utf-8")
    if not real.exists():
        shutil.rmtree(discarded, ignore_errors=True)
        server(path, real, repeats)
    for run in run_folders(real):
        serve_until_quiet(run, path, discarded, server, most_again, say)
    simulated = folder / "simulated"
    scenario = load_scenario(path)
    experiment = prepare(scenario, path.parent, str(path))
    result = run_policy(experiment, scenario.policy[0])
    write_run(result.run, result.summary, simulated)
    fidelity = assess(read_sides([real], simulated), path.parent)
    write_fidelity(fidelity, folder / "fidelity")
    return Outcome(plan, fidelity, len(_earlier(discarded)))


def serve_until_quiet(
    run: Path, scenario: Path, discarded: Path, server: Server, most_again: int, say: Say
) -> None:
    """Serve a run again that a busy machine disturbed, and keep the one least slowed.

    Only the machine's pace around a run counts, never what came of it. What is not kept goes into
    `discarded`, so that nothing is lost and a study that is resumed does not try for ever.
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


def slowdown_of(run: Path) -> float | None:
    """How much slower the machine was around a run; None where it is not known."""
    facts = json.loads((run / TOTALS_FILE).read_text(encoding="utf-8"))
    found = facts["environment"].get("slowdown")
    return float(found) if isinstance(found, int | float) else None


def _earlier(discarded: Path, name: str = "*") -> list[Path]:
    """Runs that were discarded, of one repeat or of all."""
    return [one for one in discarded.glob(f"{name}-[0-9]") if (one / TOTALS_FILE).is_file()]


def _is_whole(real: Path, repeats: int) -> bool:
    """Whether a folder holds all repeats of a case."""
    found = [folder for folder in run_folders(real) if (folder / TOTALS_FILE).is_file()]
    return len(found) == repeats


def results_of(study: Study, ground: Ground, command: str) -> dict[str, Any]:
    """The study as plain data: every case with its figures and causes, and what they amount to."""
    outcomes = study.outcomes
    found: dict[str, Any] = rounded_figures(
        {
            "schema_version": 2,
            "command": command,
            "profile": ground.profile.name,
            "profile_hash": ground.profile.hash,
            "device": ground.profile.device.name,
            "device_kind": "cpu" if ground.profile.is_of_processor else "gpu",
            "candidates": list(ground.candidates),
            "num_repeats": ground.settings.repeats,
            "environment": outcomes[0].fidelity.sides.typical.run.environment,
            "max_slowdown": MAX_SLOWDOWN,
            "num_discarded": sum(one.num_discarded for one in outcomes),
            "targets": medians(outcomes),
            "same_saturation": sum(
                1 for one in outcomes if _row(one, "saturation")["verdict"] == "same"
            ),
            "gains": gains(outcomes),
            "groups": groups(study),
            "equal_quality": [_choice(plan) for plan in study.plans if plan.choice is not None],
            "cases": [case_data(one) for one in outcomes],
        }
    )
    return found


def case_data(outcome: Outcome) -> dict[str, Any]:
    """One case: its plan, figures, requests, and causes."""
    plan, data = outcome.plan, outcome.fidelity.data()
    attribution = data["attribution"]
    return {
        "name": plan.case.name,
        "policy": plan.case.label,
        "load": plan.case.load,
        "arrivals": plan.case.arrivals,
        "texts": plan.case.texts,
        "group": plan.case.group,
        "rate_per_s": plan.rate_per_s,
        "capacity_per_s": plan.capacity_per_s,
        "num_requests": plan.num_requests,
        "options": plan.options,
        "slowdowns": [side.slowdown for side in outcome.fidelity.sides.reals],
        "num_discarded": outcome.num_discarded,
        "figures": data["figures"],
        "requests": data["requests"],
        "attribution": attribution,
        "notes": data["notes"],
    }


def _row(outcome: Outcome, key: str) -> dict[str, Any]:
    row = outcome.fidelity.row(key)
    return {} if row is None else vars(row)


def medians(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each figure with a target: absolute errors, run-to-run spreads, and what lies beyond.

    `within_twice` counts the cases whose error is within twice the run-to-run spread, `beyond`
    lists the others with their likely cause. `median_spread` is half the width of a spread over
    the real figure.
    """
    found = []
    for key, target in TARGETS.items():
        mine = [(one, row) for one in outcomes if (row := one.fidelity.row(key)) is not None]
        rows = [row for _, row in mine]
        errors = sorted(abs(row.error) for row in rows if row.error is not None)
        if not errors:
            found.append({"key": key, "target": target, "num_cases": 0})
            continue
        median = statistics.median(errors)
        judged = [(one, row) for one, row in mine if row.verdict in _JUDGED]
        spreads = [row.error_in_spreads for _, row in judged]
        widths = [width for _, row in judged if (width := _half_width(row)) is not None]
        found.append(
            {
                "key": key,
                "target": target,
                "num_cases": len(errors),
                "median_error": median,
                "worst_error": errors[-1],
                "met": median <= target,
                "median_spread": statistics.median(widths) if widths else None,
                "num_judged": len(spreads),
                "within": sum(1 for one in spreads if one is not None and one <= 1.0),
                "within_twice": sum(1 for one in spreads if one is not None and one <= 2.0),
                "beyond": [
                    _beyond(one, row, target)
                    for one, row in judged
                    if row.error_in_spreads is None or row.error_in_spreads > 2.0
                ],
            }
        )
    return found


def _half_width(row: FigureRow) -> float | None:
    """Half the width of the run-to-run spread, over the real figure."""
    if row.low is None or row.high is None or not row.median:
        return None
    return (row.high - row.low) / 2 / abs(row.median)


def _beyond(outcome: Outcome, row: FigureRow, target: float) -> dict[str, Any]:
    """By how much a case lies beyond its spread, and what the swaps say of it.

    Repeats that hardly differ leave no spread; an error that a GPU may have needs no cause.
    """
    attribution = outcome.fidelity.attribution
    causes = () if attribution is None else attribution.causes
    cause = next((one for one in causes if one.key == row.key), None)
    said = "unknown" if cause is None else cause.said
    if row.error is not None and abs(row.error) <= target:
        said = WITHIN_BAR
    return {
        "case": outcome.case.name,
        "error": row.error,
        "error_in_spreads": row.error_in_spreads,
        "half_width": _half_width(row),
        "cause": said,
        "error_without": None if cause is None else cause.error_without,
        "remainder": None if cause is None else cause.remainder,
    }


_JUDGED: Final = ("within", "above", "below")


def gains(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """HELIOS against each baseline on the same requests, real and simulated; above 1 is better."""
    found = []
    for group in dict.fromkeys(one.case.group for one in outcomes if one.case.group is not None):
        members = [one for one in outcomes if one.case.group == group]
        plain = [one for one in members if not one.case.equal_quality]
        ours = next((one for one in plain if one.case.policy == "helios"), None)
        if ours is None:
            continue
        for other in plain:
            if other is ours:
                continue
            for key, name, more in GAINS:
                own, base = ours.fidelity.row(key), other.fidelity.row(key)
                if own is None or base is None:
                    continue
                found.append(
                    {
                        "group": group,
                        "against": other.case.policy,
                        "key": key,
                        "name": name,
                        "real": _gain(own.median, base.median, more),
                        "simulated": _gain(own.simulated, base.simulated, more),
                    }
                )
    return found


def groups(study: Study) -> list[dict[str, Any]]:
    """Policies that met the same requests, beside each other: real and simulated figures."""
    found = []
    names = [one.case.group for one in study.outcomes if one.case.group is not None]
    for group in dict.fromkeys(names):
        members = [one for one in study.outcomes if one.case.group == group]
        if len(members) < 2:
            continue
        vanilla = next((one for one in members if one.case.policy == "vanilla"), None)
        found.append(
            {
                "group": group,
                "arrivals": members[0].case.arrivals,
                "texts": members[0].case.texts,
                "policies": [_beside(one, vanilla) for one in members],
            }
        )
    return found


def _beside(outcome: Outcome, vanilla: Outcome | None) -> dict[str, Any]:
    """A policy's figures, and as multiples of vanilla's."""
    figures = {}
    for key in BESIDE:
        own = outcome.fidelity.row(key)
        base = None if vanilla is None else vanilla.fidelity.row(key)
        if own is None:
            continue
        figures[key] = {
            "real": own.median,
            "simulated": own.simulated,
            "real_over_vanilla": None if base is None else _gain(own.median, base.median, True),
            "simulated_over_vanilla": None
            if base is None
            else _gain(own.simulated, base.simulated, True),
        }
    return {
        "policy": outcome.case.label,
        "equal_quality": outcome.case.equal_quality,
        "options": outcome.plan.options,
        "figures": figures,
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


def _gain(own: Any, base: Any, more_is_better: bool) -> float | None:
    if not isinstance(own, float) or not isinstance(base, float) or own == 0.0 or base == 0.0:
        return None
    return own / base if more_is_better else base / own


def write_results(results: dict[str, Any], page: str, out: Path) -> None:
    """Write `results.json`, `results.csv` (a row a case and figure) and the page."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.html").write_text(page, encoding="utf-8")
    columns = ("real_median", "low", "high", "simulated", "error", "error_in_spreads", "verdict")
    with (out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "figure", "unit", *columns))
        for case in results["cases"]:
            for row in case["figures"]:
                real = (
                    row["median"] if row["median"] is not None else "/".join(map(str, row["real"]))
                )
                values = [real, *(row[name] for name in columns[1:])]
                writer.writerow((case["name"], row["key"], row["unit"], *values))
