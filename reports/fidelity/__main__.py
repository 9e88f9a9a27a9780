"""Regenerate the fidelity study: `python -m reports.fidelity --profile ... --checkpoints ...`."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from helios_sim.console.command import Interrupted, run_app
from helios_sim.errors import InputError
from reports.fidelity.cases import StudySettings, cases_named, read_ground
from reports.fidelity.page import render
from reports.fidelity.results import check_target, results_of, write_results
from reports.fidelity.study import MAX_AGAIN, case_data, facts_of, run_study, serving_command
from reports.fidelity.summary import summary_text
from reports.forked import Nursery

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    profile: Annotated[Path, typer.Option(help="The measured profile: a folder.")],
    checkpoints: Annotated[
        list[Path], typer.Option(help="Checkpoint folders of its models; may be repeated.")
    ],
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Seconds that a real run takes, about.")] = 20.0,
    repeats: Annotated[int, typer.Option(min=1, help="Real runs of each case.")] = 3,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests running at once.")] = 16,
    overlap_loads: Annotated[
        bool, typer.Option("--overlap-loads", help="Load weights beside serving.")
    ] = False,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="A model that takes part; may be repeated. All of the profile's."),
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Run only this case; may be repeated. All of them.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for scenarios and runs.")] = Path(
        "runs/fidelity"
    ),
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the page and the results.", show_default="here, by profile"),
    ] = None,
    note: Annotated[
        list[str] | None, typer.Option(help="A sentence for the page; may be repeated.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Serve again what was served.")] = False,
    again: Annotated[
        int, typer.Option(min=0, help="Times that a disturbed run is served again, at most.")
    ] = MAX_AGAIN,
    forked: Annotated[
        bool, typer.Option("--forked", help="Import torch once for all servings.")
    ] = False,
    more: Annotated[
        str, typer.Option("--serve", help="Further options for helios-calibrate serve.")
    ] = "",
) -> None:
    """Serve, simulate and compare every case, and write the page."""
    # First of all: what runs later begins threads, which a child would not have.
    imported = ("calibration.serving.serve",)
    with closing(Nursery(imported, Path.cwd())) if forked else nullcontext() as nursery:
        chosen = cases_named(case or ())
        settings = StudySettings(
            profile=profile,
            candidates=tuple(candidate or ()),
            seconds=seconds,
            repeats=repeats,
            max_batch=max_batch,
            overlap_loads=overlap_loads,
        )
        ground = read_ground(settings)
        target = out or Path(__file__).parent / ground.profile.name
        check_target(target)
        server = serving_command(checkpoints, device, shlex.split(more), nursery)
        found = run_study(
            ground, work, server, cases=chosen, fresh=fresh, most_again=again, say=typer.echo
        )
    if found.interrupted and not found.outcomes:
        raise Interrupted("no case was served yet")
    command = shlex.join(["python", "-m", "reports.fidelity", *sys.argv[1:]])
    cases = [case_data(one) for one in found.outcomes]
    results = results_of(facts_of(found, ground, command), cases)
    write_results(results, render(results, note or ()), target)
    typer.echo(f"{summary_text(results)}\nPage: {target / 'report.html'}")
    if found.interrupted:
        raise Interrupted("the page holds the cases that were served, and the same command goes on")
    if found.failed:
        raise InputError(f"{len(found.failed)} cases could not be served; {found.failed[0]}")


if __name__ == "__main__":
    run_app(app, "reports.fidelity", None)
