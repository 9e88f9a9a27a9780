"""The options of `python -m reports.gpu`, and what it says at its end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from helios_sim.console.command import Interrupted, run_app
from helios_sim.console.terminal import FittedTable
from helios_sim.errors import InputError
from reports.forked import children_can, import_ahead
from reports.gpu.campaign import Campaign, Step, Try, chosen
from reports.gpu.packing import pack, unpack
from reports.gpu.steps import IMPORTED, PRESETS, steps_of

CLOSING_S = 5.0
PACKING_S = 15.0
"""Seconds kept free at the end: for the table, and for compressing what is brought home."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def campaign(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The folder of this campaign; gone on with.")],
    budget: Annotated[str, typer.Option(help="Time for everything, such as 9m.")] = "9m",
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    preset: Annotated[
        str | None, typer.Option(help="cuda or tiny.", show_default="tiny on cpu, else cuda")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this step; may be repeated.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out this step; may be repeated.")
    ] = None,
    pack_into: Annotated[
        Path | None, typer.Option("--pack", help="Where to put what is worth bringing home.")
    ] = None,
    packed: Annotated[
        Path | None, typer.Option("--unpack", help="Restore what --pack wrote; runs nothing.")
    ] = None,
) -> None:
    """Do everything that a GPU is needed for within a time, and keep whatever was taken."""
    if packed is not None:
        number, absent = unpack(packed, out)
        typer.echo(f"{number} archives are unpacked into {out}.")
        if absent:
            typer.echo(f"Missing: {', '.join(absent)}. Copy all archives and unpack again.")
            raise typer.Exit(1)
        return
    preset = preset or ("tiny" if device == "cpu" else "cuda")
    for given, known, option in (
        (device, ("cuda", "cpu"), "--device"),
        (preset, tuple(PRESETS), "--preset"),
    ):
        if given not in known:
            raise InputError(f"{given!r} was given; there are {' and '.join(known)}.", option)
    steps = steps_of(device, preset)
    wanted = chosen(steps, only or (), skip or ())
    budget_s, margin_s = _budget(budget, wanted, pack_into is not None)
    import_ahead(IMPORTED)
    forks = device != "cuda" or _children_can_use_gpu()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"No campaign can be kept there: {error.strerror}.", str(out)) from error
    if not forks:
        typer.echo("Steps begin on their own: a child of this process cannot use the GPU.")

    def pack_so_far() -> None:
        """Let what was taken come home even if this command is killed before its end."""
        # With less time than that, all that follows is the end.
        if pack_into is not None and run.left_s > PACKING_S:
            try:
                pack(out, pack_into)
            except OSError as error:
                typer.echo(f"Nothing could be packed yet: {error}.")

    times = {"began_s": float(context.obj), "margin_s": margin_s}
    run = Campaign(
        steps, out, budget_s, **times, say=typer.echo, forks=forks, after_each=pack_so_far
    )
    interrupted = False
    try:
        run.run(wanted)
    except KeyboardInterrupt:
        interrupted = True
    Console().print(table(run.results))
    if pack_into is not None:
        left_out = pack(out, pack_into)
        typer.echo(f"Packed into {pack_into}.")
        if left_out:
            typer.echo(f"No room was left for {', '.join(left_out)}.")
    if interrupted:
        raise Interrupted(f"what was taken is kept in {out}, and the same command goes on")
    raise typer.Exit(run.exit_code())


def _budget(text: str, wanted: Sequence[Step], packs: bool) -> tuple[float, float]:
    """Seconds of the budget and those kept free at its end."""
    from calibration.options import parse_budget

    budget_s = parse_budget(text)
    margin_s = CLOSING_S + (PACKING_S if packs else 0.0)
    least_s = margin_s + min((step.least_s for step in wanted if not step.unsuited), default=0.0)
    if budget_s < least_s:
        raise InputError(
            f"A budget of {budget_s:g} s was given; {least_s:g} s is the least.", "--budget"
        )
    return budget_s, margin_s


_LOOK: Final = """
import torch
print(torch.cuda.is_available(), torch.version.cuda)
try:
    import pynvml
    pynvml.nvmlInit()
    print(pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0)))
except Exception:
    pass
"""


def _children_can_use_gpu() -> bool:
    """Whether a child can use the GPU and its meter; raises `InputError` where there is no GPU.

    Only a child that cannot calls for another process, which takes its time to import torch.
    """
    if children_can(partial(_use_gpu, meters=True)):
        return True
    return not _require() and children_can(partial(_use_gpu, meters=False))


def _require() -> bool:
    """Raise `InputError` where no GPU can be had; whether its power can be read.

    Another process looks: one that has asked for a GPU hands none on to its children.
    """
    words = [sys.executable, "-c", _LOOK]
    found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    if found[:1] == ["True"]:
        return len(found) > 2
    built = found[1] if found[1:] not in ([], ["None"]) else ""
    why = f"torch is built for CUDA {built} and finds no device" if built else "it has no CUDA"
    raise InputError(
        f"CUDA is not available to this torch ({why}). Give --device cpu for a rehearsal, or "
        "install a torch that fits the machine's driver.",
        "--device",
    )


def _use_gpu(meters: bool) -> None:
    """Raise where this process cannot use the GPU, or not read its power if that is wanted."""
    import torch

    torch.zeros(1, device="cuda").item()
    if meters:
        import pynvml

        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0))


def table(results: Sequence[Try]) -> FittedTable:
    """What came of each step."""
    rows = [
        [
            Text(one.step),
            Text(one.verdict),
            Text(f"{one.seconds:.0f}" if one.log else ""),
            Text(one.log or one.reason),
        ]
        for one in results
    ]
    return FittedTable(("step", "verdict", "seconds", "log"), rows, words=frozenset({0, 1, 3}))


def main(began_s: float, arguments: Sequence[str] | None = None) -> None:
    """Run the command; the budget counts from `began_s`."""
    run_app(app, "reports.gpu", arguments or sys.argv[1:], began_s)
