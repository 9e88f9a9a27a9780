"""Measure, fit, serve, simulate and compare on a made-up GPU: `python -m reports.made_up_gpu`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Final

import torch
import typer

from calibration.fitting.fit import FitSettings, fit_profile
from calibration.fitting.points import read_environment
from calibration.model.checkpoint import find_checkpoints
from calibration.model.early_exit import load
from calibration.serving.prepared import ServeSettings, prepare
from calibration.serving.serve import serve_once
from helios_sim.console.command import run_app
from helios_sim.errors import InputError
from reports.fidelity.cases import StudySettings, cases_named, read_ground
from reports.fidelity.page import render
from reports.fidelity.results import check_target, results_of, write_results
from reports.fidelity.study import case_data, facts_of, run_study
from reports.fidelity.summary import summary_text
from reports.made_up_gpu.backend import NAME, MadeUpBackend
from reports.made_up_gpu.device import MadeUpGpu
from reports.made_up_gpu.readings import gpus_of, measure

PROFILE: Final = "made-up-gpu"
SAID: Final = (
    "No device was measured. Real models were served by the real backend and its live policy, and "
    "a made-up device said what each step takes; that is what is called real below. It tells what "
    "fitting and simulating get wrong where nothing else disturbs, and nothing of any GPU's speed."
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def circle(
    checkpoints: Annotated[
        list[Path], typer.Option(help="Checkpoint folders of small models; may be repeated.")
    ],
    seconds: Annotated[float, typer.Option(help="The device's seconds that a run takes.")] = 0.5,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests running at once.")] = 32,
    budget: Annotated[float, typer.Option(help="The device's seconds of measuring.")] = 60.0,
    case: Annotated[list[str] | None, typer.Option(help="Run only this case.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for readings and runs.")] = Path(
        "runs/made-up-gpu"
    ),
    out: Annotated[Path, typer.Option(help="Folder for the page and the results.")] = (
        Path(__file__).parent / "study"
    ),
) -> None:
    """Close the circle on a device that is known, and write the study's page."""
    check_target(out)
    chosen = cases_named(case or ())
    found = find_checkpoints(checkpoints)
    models = [load(one.folder, dtype=torch.float32, name=name).spec for name, one in found.items()]
    gpus = gpus_of(models)
    points, profile = work / "points", work / PROFILE
    begin_anew(work)
    measure(found, gpus, points, budget)
    fit_profile(points, profile, FitSettings(name=PROFILE, overwrite=True))

    def server(scenario: Path, folder: Path, repeats: int) -> None:
        prepared = prepare(scenario, ServeSettings(tuple(checkpoints), device="cpu", graphs=False))
        backend = MadeUpBackend(MadeUpGpu(models[0]))
        policy = prepared.scenario.policy[0]
        serve_once(prepared, policy, folder, backend.meter, backend=backend)

    settings = StudySettings(profile=profile, seconds=seconds, repeats=1, max_batch=max_batch)
    ground = read_ground(settings)
    study = run_study(
        ground, work / "study", server, cases=chosen, say=typer.echo, allow_simulated=True
    )
    command = shlex.join(["python", "-m", "reports.made_up_gpu", *sys.argv[1:]])
    cases = [case_data(one) for one in study.outcomes]
    results = results_of(facts_of(study, ground, command) | {"made_up": SAID}, cases)
    write_results(results, render(results, ()), out)
    typer.echo(f"{summary_text(results)}\nPage: {out / 'report.html'}")


def begin_anew(work: Path) -> None:
    """Make way: what an earlier study left goes, since the device may have changed since.

    Raises `InputError` for a folder that holds anything else.
    """
    if not work.exists() or not any(work.iterdir()):
        return
    try:
        found = read_environment(work / "points").get("device")
    except InputError:
        found = None
    if not isinstance(found, dict) or found.get("name") != NAME:
        raise InputError(
            "The folder holds something else than an earlier study of the made-up GPU, which would "
            "be removed; give another one.",
            str(work),
        )
    shutil.rmtree(work)


if __name__ == "__main__":
    run_app(app, "reports.made_up_gpu", None)
