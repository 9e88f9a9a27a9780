"""Iterations as they are served beside the same ones as they are measured, in turns.

`python -m reports.fidelity.paired --profile PROFILE --checkpoints FOLDER` tells whether timing an
iteration on the bench adds to what it takes in serving, or hides part of it: no fit and no
simulation has a part in it. Both sides alternate within seconds, so that a machine
that others use slows both alike.

Rows are equal: as many requests as rows arrive at once, with prompts of one length, and decode in
step. What counts are the iterations in which they read `PROMPT_TOKENS + MIDDLE` tokens on average.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.console import Console
from rich.text import Text

from calibration.measuring.bench import Bench
from calibration.measuring.grid import REACH, Job
from calibration.measuring.sources import find_sources, sample_tokens
from calibration.serving.host import Host, lives_of
from calibration.serving.prepared import Prepared, ServeSettings, prepare, threads_of
from calibration.serving.serve import Backend, WallClock
from calibration.serving.weights import CheckpointWeights
from helios_sim.cards import policy_slo
from helios_sim.console.command import run_app
from helios_sim.console.terminal import FittedTable
from helios_sim.errors import InputError
from helios_sim.garbage import uncollected
from helios_sim.profiles.files import load_profile
from helios_sim.settings.toml_writer import toml_text
from helios_sim.wording import counted

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PROMPT_TOKENS: Final = 100
OUTPUT_TOKENS: Final = 40
MIDDLE: Final = OUTPUT_TOKENS // 2
WAVES: Final = 3
"""Times that all rows arrive, in each turn."""

PATIENCE_S: Final = 2.0

TITLES: Final = ("turn", "served, ms", "measured, ms", "served/measured")


@dataclass(frozen=True)
class Pair:
    """Median seconds of an iteration, served and measured within the same few seconds."""

    served_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        """Below 1 where measuring takes longer than serving."""
        return self.served_s / self.measured_s


@app.command()
def paired(
    profile: Annotated[Path, typer.Option(help="A profile that has the model: a folder.")],
    checkpoints: Annotated[list[Path], typer.Option(help="Its checkpoint folders.")],
    model: Annotated[
        str | None, typer.Option(help="The model.", show_default="the deepest of the profile")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Layers to load; all by default.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that decode together.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Pairs that are taken.")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Serve and measure the same decode iterations in turns."""
    models = load_profile(profile).models
    name = model or max(models, key=lambda one: models[one].model.shape.layers)
    pairs = list(pairs_of(profile, checkpoints, name, depth, rows, turns, device))
    console = Console()
    lines = []
    for turn, one in enumerate(pairs):
        figures = 1e3 * one.served_s, 1e3 * one.measured_s, one.ratio
        lines.append([Text(str(turn)), *(Text(f"{figure:.3f}") for figure in figures)])
    console.print(FittedTable(TITLES, lines))
    middle = statistics.median(one.ratio for one in pairs)
    said = f"{name}, {counted(rows, 'row')}: served over measured is {middle:.3f} (median)."
    console.print(said, soft_wrap=True)


def pairs_of(
    profile: Path,
    checkpoints: list[Path],
    model: str,
    depth: int | None,
    rows: int,
    turns: int,
    device: str,
) -> Iterator[Pair]:
    """Pairs of one load, one after the other."""
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "paired.toml"
        path.write_text(toml_text(_scenario(profile, model, depth, rows)), encoding="utf-8")
        prepared = prepare(path, ServeSettings(tuple(checkpoints), device=device))
        threads, _ = threads_of(prepared.settings, prepared.room.profile, prepared.device)
        if threads is not None:
            held.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        (source,) = find_sources([str(prepared.folders[model])])
        loaded = depth or source.shape.layers
        network = source.load(loaded, prepared.device, prepared.dtype)
        held.callback(network.unload)
        most = min(source.shape.max_positions, 2 * (PROMPT_TOKENS + OUTPUT_TOKENS))
        tokens = sample_tokens(source.shape.vocab)
        bench = Bench(network, tokens, max_batch=rows, max_context=most)
        held.callback(bench.close)
        if prepared.device.type == "cuda":
            bench.capture_graphs()
        job = Job(
            "iteration",
            model,
            bench.modes[-1],
            (loaded,),
            batch=rows,
            context_tokens=PROMPT_TOKENS + MIDDLE,
        )
        backend = Backend()
        clock = backend.clock()
        weights = backend.weights(prepared, clock)
        weights.prepare()
        for _ in range(turns):
            found = _served(prepared, weights, clock, rows)
            if not found:
                raise InputError(
                    f"{counted(rows, 'row')} never decoded together; memory holds fewer.", "--rows"
                )
            served_s = statistics.median(found)
            (reading,) = bench.time(job, PATIENCE_S)
            assert reading.seconds is not None
            yield Pair(served_s, reading.seconds)


def _scenario(profile: Path, model: str, depth: int | None, rows: int) -> dict[str, object]:
    """Waves of equal requests for one model at one depth."""
    policy: dict[str, object] = {"use": "vanilla", "model": model}
    if depth is not None:
        policy = {"use": "static-depth", "model": model, "depth": depth}
    return {
        "schema_version": 1,
        "name": "paired",
        "seed": 1,
        "workload": {
            "num_requests": WAVES * rows,
            "arrivals": {"kind": "constant", "rate_per_s": 1e6},
            "prompt": {"kind": "constant", "tokens": PROMPT_TOKENS},
            "output": {"kind": "constant", "tokens": OUTPUT_TOKENS},
        },
        "fleet": {
            "profile": str(profile.resolve()),
            "candidates": [model],
            "weights_start": "host",
        },
        "serving": {"max_batch": rows, "overlap_loads": False},
        "policy": [policy],
    }


def _served(
    prepared: Prepared, weights: CheckpointWeights, clock: WallClock, rows: int
) -> list[float]:
    """Seconds of decode iterations of all rows, around the middle of their answers."""
    host = Host(
        room=prepared.room,
        policy=prepared.policy(prepared.scenario.policy[0]),
        slo=policy_slo(prepared.scenario.slo_spec),
        lives=lives_of(prepared.requests, prepared.texts),
        weights=weights,
        clock=clock,
        timeline_interval_s=prepared.scenario.measure.timeline_interval_s,
        on_progress=None,
        drawn_j=None,
    )
    with uncollected():
        clock.restart()
        host.play()
    found, since_prefill = [], 0
    for entry in host.tally.iterations:
        since_prefill = 0 if entry.is_prefill else since_prefill + 1
        if entry.running == rows and abs(since_prefill - MIDDLE) <= REACH:
            found.append(entry.seconds)
    weights.drop()
    return found


if __name__ == "__main__":
    run_app(app, "reports.fidelity.paired", None)
