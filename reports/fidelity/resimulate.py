"""Simulate a study's cases anew, beside the real figures that it recorded: what a change is worth.

`python -m reports.fidelity.resimulate RESULTS --profile PROFILE` needs no device and serves
nothing. Rates, requests and settings are those the study served.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from helios_sim.command import run_app
from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.fidelity.figures import FigureRow, figure_row, scaled
from helios_sim.records import toml_text
from helios_sim.scenario import load_scenario
from helios_sim.terminal import FittedTable
from reports.fidelity.cases import CASES, Ground, StudySettings, read_ground, scenario_of
from reports.fidelity.study import TARGETS
from reports.fidelity.summary import NAMES, percent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Resimulated:
    """A figure of a case: as the study had it, and as it is simulated now."""

    case: str
    before: FigureRow
    now: FigureRow


@app.command()
def resimulate(
    results: Annotated[Path, typer.Argument(help="results.json of a study.")],
    profile: Annotated[Path, typer.Option(help="The profile to simulate with: a folder.")],
    max_batch: Annotated[int, typer.Option(min=1, help="As the study had it.")] = 16,
    overlap_loads: Annotated[
        bool, typer.Option("--overlap-loads", help="As the study had it.")
    ] = False,
) -> None:
    """Simulate every case anew and compare it with the real runs that the study recorded."""
    found = resimulated(read_results(results), profile, max_batch, overlap_loads)
    console = Console()
    console.print(FittedTable(TITLES, summary(found)))
    changed = [one for one in found if one.now.simulated != one.before.simulated]
    if not changed:
        console.print("Every figure is simulated as the study had it, to the last bit.")
        return
    num_cases = len({one.case for one in found})
    console.print(
        f"Changed in {len({one.case for one in changed})} of {num_cases} cases; the others are as "
        "the study had them, to the last bit.",
        soft_wrap=True,
    )
    console.print(FittedTable(CASE_TITLES, [_case_row(one) for one in changed]))


TITLES = ("figure", "median error", "before", "worst", "before", "in spread", "in twice")
CASE_TITLES = ("case", "figure", "real", "before", "now", "error", "in spreads")


def read_results(path: Path) -> dict[str, Any]:
    """A study's results; raises `InputError` for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {case["name"] for case in found["cases"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"These are no results of a study ({error}).", str(path)) from error
    unknown = sorted(known - {case.name for case in CASES})
    if unknown:
        raise InputError(f"The study has no case {unknown[0]!r} any more.", str(path))
    return dict(found)


def resimulated(
    results: Mapping[str, Any], profile: Path, max_batch: int = 16, overlap_loads: bool = False
) -> list[Resimulated]:
    """Every figure that has a bar, of every case, simulated with a profile."""
    settings = StudySettings(
        profile=profile,
        candidates=tuple(results["candidates"]),
        max_batch=max_batch,
        overlap_loads=overlap_loads,
    )
    ground = read_ground(settings)
    with tempfile.TemporaryDirectory() as folder:
        return [
            one for case in results["cases"] for one in _case(case, ground, profile, Path(folder))
        ]


def _case(
    case: Mapping[str, Any], ground: Ground, profile: Path, folder: Path
) -> Sequence[Resimulated]:
    wanted = next(one for one in CASES if one.name == case["name"])
    where = str(profile.resolve())
    served = (case["rate_per_s"], case["num_requests"], where, case["options"])
    path = folder / f"{wanted.name}.toml"
    path.write_text(toml_text(scenario_of(wanted, ground, *served)), encoding="utf-8")
    scenario = load_scenario(path)
    figures = run_policy(prepare(scenario, folder, str(path)), scenario.policy[0]).summary
    found = []
    for node in case["figures"]:
        key, real = node["key"], tuple(node["real"])
        value = scaled(key, figures.get(key))
        if key not in TARGETS or None in (node["simulated"], node["median"], value):
            continue
        titles = (key, node["title"], node["unit"], node["group"], real)
        before = figure_row(*titles, node["simulated"])
        # Rounded as the study rounds them, so that what did not change is equal.
        now = figure_row(*titles, float(f"{value:.12g}"))
        found.append(Resimulated(wanted.name, before, now))
    return found


def summary(found: Sequence[Resimulated]) -> list[list[Text]]:
    """A row a figure: errors now and before, and the cases within the run-to-run spread now."""
    rows = []
    for key in TARGETS:
        mine = [one for one in found if one.now.key == key]
        if not mine:
            continue
        now, before = (
            sorted(abs(row.error or 0.0) for row in rows)
            for rows in ([one.now for one in mine], [one.before for one in mine])
        )
        spreads = [one.now.error_in_spreads for one in mine]
        within = [sum(s is not None and s <= most for s in spreads) for most in (1.0, 2.0)]
        errors = (statistics.median(now), statistics.median(before), now[-1], before[-1])
        told = [percent(error) for error in errors]
        told += [f"{number} of {len(mine)}" for number in within]
        rows.append([Text(word) for word in (NAMES[key], *told)])
    return rows


def _case_row(one: Resimulated) -> list[Text]:
    now, before = one.now, one.before
    values = [f"{value:.4g}" for value in (now.median, before.simulated, now.simulated)]
    error = "" if now.error is None else f"{now.error:+.1%}"
    spreads = "" if now.error_in_spreads is None else f"{now.error_in_spreads:.2f}"
    return [Text(word) for word in (one.case, NAMES[now.key], *values, error, spreads)]


if __name__ == "__main__":
    run_app(app, "reports.fidelity.resimulate", None)
