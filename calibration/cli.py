"""The command `helios-calibrate`: what a measurement could use here, and what a profile holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from helios_sim.command import run_app

app = typer.Typer(
    name="helios-calibrate",
    help="Prepare the measuring of early-exit models on real hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def environment() -> None:
    """Say which packages, GPUs and energy meters this machine offers."""
    from calibration.environment import inspect_environment

    found = inspect_environment()
    typer.echo(f"Python {found.python}")
    for name, version in found.packages.items():
        typer.echo(f"{name} {version or 'is not installed'}")
    typer.echo(f"CUDA {found.cuda}" if found.cuda else "CUDA is not available to torch")
    for gpu in found.gpus:
        meter = "with" if gpu.has_energy_counter else "without"
        typer.echo(f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, {meter} an energy counter")
    if found.no_gpu_reason:
        typer.echo(f"No GPU: {found.no_gpu_reason}.")
    if found.missing_packages:
        typer.echo("Install what is missing with: pip install 'helios-sim[calibration]'")


@app.command()
def check(
    profile: Annotated[str, typer.Argument(help="A profile folder, or a shipped profile's name.")],
) -> None:
    """Read a profile strictly and say what it holds and how far each number is known."""
    from helios_sim.profile import load_profile

    loaded = load_profile(profile)
    typer.echo(f"{loaded.name}: {loaded.description}")
    typer.echo(f"Device: {loaded.device.name}, {loaded.device.num_gpus} GPU(s)")
    typer.echo(f"Models: {', '.join(loaded.models)}")
    grades = ", ".join(f"{count} {grade}" for grade, count in loaded.grade_counts().items())
    typer.echo(f"Numbers: {grades}")
    typer.echo(f"Hash: {loaded.hash}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    run_app(app, "helios-calibrate", arguments)
