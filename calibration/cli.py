"""The command `helios-calibrate`: early-exit models made, measured, fitted and served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from helios_sim.console.command import WithVersion, run_app
from helios_sim.errors import install_command

app = typer.Typer(
    name="helios-calibrate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MAX_THREADS: Final = 1024
"""Beyond what any processor has; of far more a library takes the process down."""

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16.", show_default="float32 on cpu, bfloat16 on cuda"
    ),
]


@app.callback()
def options(version: WithVersion = False) -> None:
    """Make, measure, fit and serve real early-exit models."""


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
        typer.echo(f"What is missing is installed with {install_command('calibration')}.")


@app.command()
def doctor(device: Device = "auto") -> None:
    """Run small models in every way this machine can, within seconds; they must agree."""
    from calibration.device import device_of
    from calibration.doctor import command

    if not command(device_of(device), typer.echo):
        raise typer.Exit(1)


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="The folder for readings; new, or with --resume.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoint folders, folders of them, or public shapes such as llama3-8b.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Precision = None,
    budget: Annotated[
        str,
        typer.Option(help="Time to spend, such as 90s, 10m or 1h30m; a plain number is seconds."),
    ] = "10m",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the plan and readings of the folder.")
    ] = False,
    exits: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help="Exit layers instead of the models' own."),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Most rows.", show_default="16 on cpu, 64 on cuda")
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(min=2, help="Longest context.", show_default="512 on cpu, 2048 on cuda"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_THREADS, help="Threads to use on a processor.", show_default="1 on cpu"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the order of trials and of held-out loads.")
    ] = 0,
    traces: Annotated[
        bool, typer.Option(help="Trace the exits of checkpoints at the end, beyond the budget.")
    ] = True,
) -> None:
    """Measure what models cost on this device: seconds, joules and bytes, as raw readings."""
    from calibration.measuring.measure import command

    command(
        models or [],
        out,
        device=device,
        dtype=dtype,
        budget=budget,
        resume=resume,
        exits=exits,
        max_batch=max_batch,
        max_context=max_context,
        threads=threads,
        seed=seed,
        traces=traces,
    )


TARGET_HELP = "Share of early tokens to equal the full model's; sets the threshold."
Threshold = Annotated[
    float | None,
    typer.Option(help="One threshold for all models.", show_default="chosen on held-out text"),
]
KIND_HELP = "max-softmax, top2-margin or entropy; prefix calibrated- to fit it on text."
Domains = Annotated[
    list[str] | None,
    typer.Option(help="code, prose or tables; may be repeated.", show_default="all"),
]
CheckpointFolders = Annotated[
    list[Path], typer.Argument(help="Checkpoint folders, or folders of several.")
]


def _given(context: typer.Context) -> list[str]:
    """The parameters that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="The folder for the models.")] = None,
    preset: Annotated[str, typer.Option(help="tiny, cpu or cuda.")] = "cpu",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the weights and of the order of the text.")
    ] = 0,
    device: Device = "auto",
    budget: Annotated[
        str | None,
        typer.Option(help="Most time, such as 9m.", show_default="the preset's"),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Models side by side.", show_default="cores; one on a GPU"),
    ] = None,
    confidence: Annotated[
        str | None, typer.Option(help=KIND_HELP, show_default="max-softmax")
    ] = None,
    threshold: Threshold = None,
    target_agreement: Annotated[
        float | None, typer.Option(help=TARGET_HELP, show_default="0.9")
    ] = None,
    heads_for: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT", help="Train exit heads of this frozen checkpoint instead."
        ),
    ] = None,
    exits: Annotated[
        str | None, typer.Option(metavar="K,K,...", help="Layers that get a head of their own.")
    ] = None,
    domain: Domains = None,
    iterations: Annotated[
        int, typer.Option(min=1, help="Training iterations of exit heads.")
    ] = 400,
) -> None:
    """Train a small family of early-exit models on text that ships with Python."""
    from calibration.training import training_commands as commands

    commands.check_belong_together(heads_for, _given(context))
    if heads_for is not None:
        commands.heads(
            heads_for,
            out,
            exits=exits,
            domains=domain or (),
            iterations=iterations,
            seed=seed,
            device=device,
        )
        return
    commands.train(
        out,
        preset=preset,
        seed=seed,
        device=device,
        budget=budget,
        processes=processes,
        confidence=confidence,
        threshold=threshold,
        target_agreement=target_agreement,
    )


@app.command()
def confidence(
    checkpoints: CheckpointFolders,
    kind: Annotated[str, typer.Option(help=KIND_HELP)] = "max-softmax",
    threshold: Threshold = None,
    target_agreement: Annotated[float, typer.Option(help=TARGET_HELP)] = 0.9,
    device: Device = "auto",
) -> None:
    """Choose what counts as confident, fit it on held-out text and store it in the checkpoints."""
    from calibration.training import training_commands as commands

    commands.confidence(
        checkpoints,
        kind=kind,
        threshold=threshold,
        target_agreement=target_agreement,
        device=device,
    )


@app.command()
def trace(
    checkpoints: CheckpointFolders,
    out: Annotated[Path, typer.Option(help="The folder for exits.parquet and the report.")],
    positions: Annotated[int, typer.Option(min=1, help="Positions of each domain.")] = 16384,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.", show_default="up to 512")
    ] = None,
    domain: Domains = None,
    device: Device = "auto",
    dtype: Precision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report.")] = False,
) -> None:
    """Trace at which exit each token of held-out text would leave, for every checkpoint."""
    from calibration.training import training_commands as commands

    commands.trace(
        checkpoints,
        out,
        positions=positions,
        window=window,
        domains=domain or (),
        device=device,
        dtype=dtype,
        as_json=as_json,
    )


@app.command()
def fit(
    points: Annotated[Path, typer.Argument(help="The folder of readings that measure wrote.")],
    out: Annotated[Path, typer.Option(help="The profile folder to write.")],
    mode: Annotated[
        str,
        typer.Option(
            help="Which times the profile gives: graph, eager, or auto (graph if measured)."
        ),
    ] = "auto",
    model: Annotated[
        list[str] | None, typer.Option(help="A model to keep; may be repeated. All by default.")
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(help="A trace file, or a profile whose exits stand in for unmeasured ones."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The profile's name; the folder's.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the profile folder.")] = False,
) -> None:
    """Fit readings into a profile, say how far off it is, and draw its page beside it."""
    from calibration.fitting.check import check_text
    from calibration.fitting.fit import FitSettings, fit_profile
    from calibration.fitting.page import page_path, write_page
    from helios_sim.report.page_files import check_own

    check_own(page_path(out))
    settings = FitSettings(name, mode, tuple(model or ()), exits, overwrite)
    profile = fit_profile(points, out, settings)
    typer.echo(check_text(profile))
    page = write_page(profile, page_path(out), points)
    typer.echo(f"Profile: {out}\nPage: {page}")


@app.command()
def check(
    profile: Annotated[str, typer.Argument(help="A profile folder, or a shipped profile's name.")],
    page: Annotated[
        Path | None, typer.Option(help="Where to draw the calibration's page; not at all if unset.")
    ] = None,
) -> None:
    """Read a profile strictly, say what it holds, and hold it to its own readings."""
    from calibration.fitting.check import check_text
    from helios_sim.exits import load_traces
    from helios_sim.profile import MarkovExits
    from helios_sim.profiles.files import load_profile
    from helios_sim.report.page_files import check_page_target

    if page is not None:
        check_page_target(page)
    loaded = load_profile(profile)
    typer.echo(f"{loaded.name}: {loaded.description}")
    gpus = "" if loaded.is_of_processor else f", {loaded.device.num_gpus} GPU(s)"
    typer.echo(f"Device: {loaded.device.name}{gpus}")
    typer.echo(f"Models: {', '.join(loaded.models)}")
    grades = ", ".join(f"{count} {grade}" for grade, count in loaded.grade_counts().items())
    typer.echo(f"Numbers: {grades}")
    if not loaded.has_energy:
        why = loaded.quantities["device.active_w"].source
        typer.echo(f"Energy: unavailable ({why})")
    if not isinstance(loaded.exits, MarkovExits):
        traces = load_traces(loaded)
        domains = ", ".join(traces.domains)
        typer.echo(f"Exit traces: {traces.num_positions:,} positions of each of {domains}")
    typer.echo(f"Hash: {loaded.hash}")
    typer.echo(check_text(loaded))
    if page is not None:
        from calibration.fitting.page import write_page

        typer.echo(f"Page: {write_page(loaded, page)}")


@app.command()
def serve(
    scenario: Annotated[Path, typer.Argument(help="A scenario file.")],
    checkpoints: Annotated[
        list[Path],
        typer.Option(
            metavar="FOLDER", help="A checkpoint folder, or a folder of several; may be repeated."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Serve only this policy of the scenario; may be repeated."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Serve only this many requests, the first.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=0.0, help="Serve only what arrives within this many seconds."),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=100, help="Times that each policy is served.")
    ] = 1,
    kv: Annotated[str, typer.Option(help="The KV cache: auto, slots or pages.")] = "auto",
    device: Device = "auto",
    graphs: Annotated[bool, typer.Option(help="Replay CUDA graphs on a GPU.")] = True,
    free_running: Annotated[
        bool, typer.Option("--free-running", help="Feed a model its own tokens, not the true text.")
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_THREADS,
            help="Threads to use on a processor.",
            show_default="as the profile was measured",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs that were served before.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
    ] = None,
) -> None:
    """Serve a scenario for real, in wall-clock time, into a run folder like a simulated one's."""
    from calibration.serving.serve import command

    command(
        scenario,
        out,
        changes or [],
        checkpoints=tuple(checkpoints),
        policies=tuple(policy or ()),
        limit=limit,
        duration_s=duration,
        repeat=repeat,
        kv=kv,
        device=device,
        graphs=graphs,
        free_running=free_running,
        threads=threads,
        overwrite=overwrite,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    run_app(app, "helios-calibrate", arguments)
