"""Simulate a study's cases anew, beside the real figures that it recorded: what a change is worth.

`python -m reports.fidelity.resimulate RESULTS --profile PROFILE` needs no device and serves
nothing. Rates, requests and settings are those the study served.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.text import Text

from helios_sim.console.command import run_app
from helios_sim.console.terminal import FittedTable
from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.fidelity.figures import figure_row, scaled
from helios_sim.scenario import load_scenario
from helios_sim.settings.toml_writer import toml_text
from reports.fidelity.cases import Ground, StudySettings, case_named, read_ground, scenario_of
from reports.fidelity.figures import JUDGED
from reports.fidelity.page import render
from reports.fidelity.results import Data, check_target, read_results, results_of, write_results
from reports.fidelity.summary import percent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TITLES: Final = ("figure", "median error", "before", "worst", "before", "in spread", "in twice")
CASE_TITLES: Final = ("case", "figure", "real", "before", "now", "error", "in spreads")


@app.command()
def resimulate(
    results: Annotated[Path, typer.Argument(help="results.json of a study.")],
    profile: Annotated[Path, typer.Option(help="The profile to simulate with: a folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page and the results as they are now.")
    ] = None,
    note: Annotated[
        list[str] | None, typer.Option(help="A sentence for the page; may be repeated.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A case to leave as it was: its policy decides otherwise since it was served."
        ),
    ] = None,
) -> None:
    """Simulate every case anew and compare it with the real runs that the study recorded."""
    before = read_results(results)
    known = [case["name"] for case in before["cases"]]
    for name in keep or ():
        if name not in known:
            raise InputError(
                f"The study has no case {name!r}; it has {', '.join(known)}.", "--keep"
            )
    if out is not None:
        check_target(out)
    command = shlex.join(["python", "-m", "reports.fidelity.resimulate", *sys.argv[1:]])
    now = simulated_anew(before, profile, command, keep or ())
    console = Console()
    console.print(FittedTable(TITLES, summary(before, now)))
    rows = changes(before, now)
    if rows:
        console.print(
            f"Changed in {len({row[0].plain for row in rows})} of {len(now['cases'])} cases; the "
            "others are as the study had them, to the last bit.",
            soft_wrap=True,
        )
        console.print(FittedTable(CASE_TITLES, rows))
    else:
        console.print("Every figure is simulated as the study had it, to the last bit.")
    if out is not None:
        write_results(now, render(now, note or ()), out)
        console.print(f"Page: {out / 'report.html'}", soft_wrap=True)


def simulated_anew(
    results: Data, profile: Path, command: str = "", keep: Sequence[str] = ()
) -> dict[str, Any]:
    """A study's results with its cases simulated with a profile, beside the real runs it had.

    Those to `keep` stay as they were: another policy is no prediction of the one that was served.
    """
    settings = StudySettings(
        profile=profile,
        candidates=tuple(results["candidates"]),
        max_batch=results["max_batch"],
        overlap_loads=results["overlap_loads"],
    )
    ground = read_ground(settings)
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            case if case["name"] in keep else _case(case, ground, profile, Path(folder))
            for case in results["cases"]
        ]
    earlier = (results["simulated_anew"] or {"changed": []})["changed"]
    changed = [
        case["name"]
        for before, case in zip(results["cases"], cases, strict=True)
        if case is not before or case["name"] in earlier
    ]
    anew = {
        "command": command,
        "profile": ground.profile.name,
        "profile_hash": ground.profile.hash,
        "changed": changed,
        "kept": list(keep),
    }
    return results_of({**results, "simulated_anew": anew}, cases)


def _case(case: Data, ground: Ground, profile: Path, folder: Path) -> Data:
    """A case simulated anew, or the case itself where no figure has changed.

    What changed errors come from is unknown: that takes the runs themselves.
    """
    wanted = case_named(case["name"])
    assert wanted is not None, "Results of other cases are not read."
    where = str(profile.resolve())
    served = (case["rate_per_s"], case["num_requests"], where, case["options"])
    path = folder / f"{wanted.name}.toml"
    path.write_text(toml_text(scenario_of(wanted, ground, *served)), encoding="utf-8")
    scenario = load_scenario(path)
    ours = run_policy(prepare(scenario, folder, str(path)), scenario.policy[0]).summary
    figures = [_figure(row, ours) for row in case["figures"]]
    if [row["simulated"] for row in figures] == [row["simulated"] for row in case["figures"]]:
        return case
    return {**case, "figures": figures, "attribution": None, "requests": []}


def _figure(row: Data, ours: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with what is simulated now."""
    value = scaled(row["key"], ours.get(row["key"]), row["unit"])
    if isinstance(value, float):
        # Rounded as the study rounds them, so that what did not change is equal.
        value = float(f"{value:.12g}")
    titles = (row["key"], row["title"], row["unit"], row["group"], tuple(row["real"]))
    return asdict(figure_row(*titles, value))


def summary(before: Data, now: Data) -> list[list[Text]]:
    """A row a figure: errors now and before, and the cases within the run-to-run spread now."""
    rows = []
    for then, one in zip(before["targets"], now["targets"], strict=True):
        if not one["num_cases"]:
            continue
        errors = [side[key] for key in ("median_error", "worst_error") for side in (one, then)]
        told = [percent(error) for error in errors]
        told += [f"{one[key]} of {one['num_judged']}" for key in ("within", "within_twice")]
        rows.append([Text(word) for word in (JUDGED[one["key"]].name, *told)])
    return rows


def changes(before: Data, now: Data) -> list[list[Text]]:
    """A row for each figure with a bar that is simulated otherwise than before."""
    rows = []
    for then, case in zip(before["cases"], now["cases"], strict=True):
        for old, row in zip(then["figures"], case["figures"], strict=True):
            if row["key"] in JUDGED and row["simulated"] != old["simulated"]:
                values = [_told(one) for one in (row["median"], old["simulated"], row["simulated"])]
                error = "" if row["error"] is None else f"{row['error']:+.1%}"
                spreads = row["error_in_spreads"]
                words = (
                    case["name"],
                    JUDGED[row["key"]].name,
                    *values,
                    error,
                    _told(spreads, ".2f"),
                )
                rows.append([Text(word) for word in words])
    return rows


def _told(value: float | None, how: str = ".4g") -> str:
    return "" if value is None else format(value, how)


if __name__ == "__main__":
    run_app(app, "reports.fidelity.resimulate", None)
