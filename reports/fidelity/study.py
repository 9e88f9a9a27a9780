"""Serve every case for real, simulate it, compare the two, and keep the figures."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.fidelity import Fidelity, assess, read_sides, run_folders
from helios_sim.fidelity.publish import write_fidelity
from helios_sim.metrics import rounded_figures
from helios_sim.records import TOTALS_FILE, toml_text, write_run
from helios_sim.scenario import load_scenario
from reports.fidelity.cases import CASES, Case, Ground, Planned, planned, scenario_of

Server = Callable[[Path, Path, int], None]
"""Serves a scenario file for real into a folder, so many times."""
Say = Callable[[str], None]

TARGETS: Final = {
    "output_throughput": 0.03,
    "mean_tpot_ms": 0.03,
    "p50_e2el_ms": 0.05,
    "p90_ttft_ms": 0.10,
    "total_gpu_energy": 0.05,
    "mean_batch_size": 0.03,
}
"""Median absolute errors aimed at on a GPU."""

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


@dataclass(frozen=True)
class Outcome:
    """A case that was run: its plan and the comparison."""

    plan: Planned
    fidelity: Fidelity

    @property
    def case(self) -> Case:
        """The case."""
        return self.plan.case


def serving_command(checkpoints: Sequence[Path], device: str, more: Sequence[str] = ()) -> Server:
    """A server that is the command `helios-calibrate serve`, run beside this program."""

    def serve(scenario: Path, out: Path, repeats: int) -> None:
        beside = Path(sys.executable).with_name("helios-calibrate")
        program = str(beside) if beside.is_file() else "helios-calibrate"
        folders = [word for folder in checkpoints for word in ("--checkpoints", str(folder))]
        words = [program, "serve", str(scenario), *folders, "--out", str(out)]
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
    say: Say = print,
) -> list[Outcome]:
    """Run all cases; real runs that `work` holds of the same scenario are not served again."""
    if not ground.can_drift:
        # Nothing drifts with one kind of text; the case is run all the same and says so.
        cases = tuple(replace(case, texts="stable") for case in cases)
    plans = planned(cases, ground)
    profile = os.path.relpath(ground.profile.folder.resolve(), (work / "scenarios").resolve())
    outcomes = []
    for number, plan in enumerate(plans, 1):
        case = plan.case
        data = scenario_of(case, ground, plan.rate_per_s, plan.num_requests, profile)
        say(
            f"{number} of {len(plans)}: {case.name}, {plan.num_requests} requests at "
            f"{plan.rate_per_s:g}/s ({plan.rate_per_s / plan.capacity_per_s:.2f} of its capacity)"
        )
        outcomes.append(run_case(plan, data, work, server, ground.settings.repeats, fresh))
    return outcomes


def run_case(
    plan: Planned, data: dict[str, Any], work: Path, server: Server, repeats: int, fresh: bool
) -> Outcome:
    """Serve, simulate and compare one case."""
    path = work / "scenarios" / f"{plan.case.name}.toml"
    folder = work / plan.case.name
    text = toml_text(data)
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    path.parent.mkdir(parents=True, exist_ok=True)
    real = folder / "real"
    if real.exists() and (fresh or not same or not _is_whole(real, repeats)):
        shutil.rmtree(real)
    path.write_text(text, encoding="utf-8")
    if not real.exists():
        server(path, real, repeats)
    simulated = folder / "simulated"
    scenario = load_scenario(path)
    experiment = prepare(scenario, path.parent, str(path))
    result = run_policy(experiment, scenario.policy[0])
    write_run(result.run, result.summary, simulated)
    fidelity = assess(read_sides([real], simulated), path.parent)
    write_fidelity(fidelity, folder / "fidelity")
    return Outcome(plan, fidelity)


def _is_whole(real: Path, repeats: int) -> bool:
    """Whether a folder holds all repeats of a case."""
    found = [folder for folder in run_folders(real) if (folder / TOTALS_FILE).is_file()]
    return len(found) == repeats


def results_of(outcomes: Sequence[Outcome], ground: Ground, command: str) -> dict[str, Any]:
    """The study as plain data: every case with its figures and causes, and what they amount to."""
    found: dict[str, Any] = rounded_figures(
        {
            "schema_version": 1,
            "command": command,
            "profile": ground.profile.name,
            "profile_hash": ground.profile.hash,
            "device": ground.profile.device.name,
            "candidates": list(ground.candidates),
            "num_repeats": ground.settings.repeats,
            "environment": outcomes[0].fidelity.sides.typical.run.environment,
            "targets": medians(outcomes),
            "same_saturation": sum(
                1 for one in outcomes if _row(one, "saturation")["verdict"] == "same"
            ),
            "gains": gains(outcomes),
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
        "policy": plan.case.policy,
        "load": plan.case.load,
        "arrivals": plan.case.arrivals,
        "texts": plan.case.texts,
        "group": plan.case.group,
        "rate_per_s": plan.rate_per_s,
        "capacity_per_s": plan.capacity_per_s,
        "num_requests": plan.num_requests,
        "figures": data["figures"],
        "requests": data["requests"],
        "attribution": attribution,
        "notes": data["notes"],
    }


def _row(outcome: Outcome, key: str) -> dict[str, Any]:
    row = outcome.fidelity.row(key)
    return {} if row is None else vars(row)


def medians(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each figure with a target: median and worst absolute error, and how many in the spread.

    `within_twice` counts the cases whose error is within twice the run-to-run spread.
    """
    found = []
    for key, target in TARGETS.items():
        rows = [row for one in outcomes if (row := one.fidelity.row(key)) is not None]
        errors = sorted(abs(row.error) for row in rows if row.error is not None)
        if not errors:
            found.append({"key": key, "target": target, "num_cases": 0})
            continue
        half = len(errors) // 2
        median = errors[half] if len(errors) % 2 else (errors[half - 1] + errors[half]) / 2
        spreads = [row.error_in_spreads for row in rows if row.verdict in _JUDGED]
        found.append(
            {
                "key": key,
                "target": target,
                "num_cases": len(errors),
                "median_error": median,
                "worst_error": errors[-1],
                "met": median <= target,
                "num_judged": len(spreads),
                "within": sum(1 for one in spreads if one is not None and one <= 1.0),
                "within_twice": sum(1 for one in spreads if one is not None and one <= 2.0),
            }
        )
    return found


_JUDGED: Final = ("within", "above", "below")


def gains(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """HELIOS against each baseline on the same requests, real and simulated; above 1 is better."""
    found = []
    for group in dict.fromkeys(one.case.group for one in outcomes if one.case.group is not None):
        members = [one for one in outcomes if one.case.group == group]
        ours = next((one for one in members if one.case.policy == "helios"), None)
        if ours is None:
            continue
        for other in members:
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
