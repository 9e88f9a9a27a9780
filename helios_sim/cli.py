"""The command `helios`: simulate scenarios, compare and report runs, list profiles.

Heavy modules are imported inside the commands, so that `helios --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios_sim.command import run_app
from helios_sim.errors import InputError

if TYPE_CHECKING:
    from helios_sim.experiment import Progress, Result
    from helios_sim.scenario import Scenario

app = typer.Typer(
    name="helios",
    help="Simulate how early-exit language models are served, and what HELIOS makes of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
scenario_app = typer.Typer(help="Check scenario files; print their schema.", no_args_is_help=True)
app.add_typer(scenario_app, name="scenario")

ScenarioFile = Annotated[Path, typer.Argument(help="A scenario file (TOML).", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, such as fleet.num_replicas=2."
    ),
]


@app.command()
def simulate(
    scenario: ScenarioFile,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME", help="Run only these policies of the scenario."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Replace the scenario's seed.")] = None,
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the runs and the page.", show_default="runs/NAME"),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the summaries on standard output; write a folder only with --out."
        ),
    ] = False,
) -> None:
    """Run a scenario's policies on the same requests, compare them and write a page."""
    from helios_sim.experiment import choose_policies, folder_name, prepare, run_policy

    all_changes = [*(changes or []), *([] if seed is None else [f"seed={seed}"])]
    question = _load(scenario, all_changes)
    experiment = prepare(question, scenario.parent, str(scenario))
    policies = choose_policies(question, policy or [])
    usual = Path("runs") / folder_name(question.name)
    target = out if out is not None else (None if as_json else usual)
    if target is not None:
        from helios_sim.publish import check_results_target

        check_results_target(target)
    replaces = target is not None and target.is_dir() and any(target.iterdir())
    with _progress(quiet=as_json) as progress:
        results = [run_policy(experiment, chosen, progress) for chosen in policies]
        if target is not None:
            progress("writing", 0.0)
            _write(results, target)
    if as_json:
        summaries = [result.summary for result in results]
        _print_json(summaries[0] if len(summaries) == 1 else summaries)
        return
    _show(results)
    if target is not None:
        replaced = " (the results that were there are replaced)" if replaces else ""
        _say(f"Page: {target / 'report.html'}{replaced}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one workload.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a page with the comparison here.")] = None,
) -> None:
    """Compare runs of the same requests, figure by figure."""
    from helios_sim.metrics import compare as compare_runs
    from helios_sim.records import read_run, read_summary

    if len(runs) < 2:
        raise InputError(f"{len(runs)} run was given; a comparison needs at least two.", "compare")
    data = [read_run(path) for path in runs]
    summaries = [read_summary(path) for path in runs]
    rows = compare_runs(data, summaries)
    if out is not None:
        from helios_sim.publish import write_page

        write_page(data, summaries, out)
    if as_json:
        from dataclasses import asdict

        _print_json([asdict(row) for row in rows])
        return
    from helios_sim.terminal import comparison_table

    labels = [run.label for run in data]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in runs]
    _console().print(comparison_table(rows, labels))
    if out is not None:
        _say(f"Page: {out}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Write a run's page anew."""
    from helios_sim.publish import write_page
    from helios_sim.records import read_run, read_summary

    target = out or run / "report.html"
    write_page([read_run(run)], [read_summary(run)], target)
    _say(f"Page: {target}")


@app.command()
def profiles(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the profiles that are shipped, with where their numbers come from."""
    from dataclasses import asdict

    from helios_sim.profile import list_profiles

    listed = list_profiles()
    if as_json:
        _print_json([asdict(profile) for profile in listed])
        return
    from helios_sim.terminal import profiles_table

    _console().print(profiles_table(listed))


@scenario_app.command("check")
def check(scenario: ScenarioFile, changes: Changes = None) -> None:
    """Read a scenario and everything it names, and say what it would run."""
    from helios_sim.experiment import prepare, rehearse

    question = _load(scenario, changes or [])
    experiment = prepare(question, scenario.parent, str(scenario))
    requests, shortened = experiment.requests(question.seed)
    for chosen in question.policy:
        rehearse(experiment, chosen)
    policies = ", ".join(policy.name for policy in question.policy)
    _say(f"{scenario} is good: {len(requests):,} requests, policies {policies}.")
    if shortened:
        _say(f"{shortened:,} requests are shortened to {experiment.setup.context_tokens:,} tokens.")


@scenario_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of scenario files, for editors."""
    from helios_sim.scenario import scenario_schema

    _print_json(scenario_schema())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    run_app(app, "helios", arguments)


def _load(path: Path, changes: Sequence[str]) -> Scenario:
    from helios_sim.scenario import load_scenario

    return load_scenario(path, changes)


def _write(results: Sequence[Result], target: Path) -> None:
    from helios_sim.publish import write_results

    write_results(results, target)


def _show(results: Sequence[Result]) -> None:
    from helios_sim.terminal import summary_table

    _console().print(summary_table([result.summary for result in results]))


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A progress bar on standard error, where somebody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield lambda _name, _share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=1.0)
            bar.update(tasks[name], completed=share)

        yield advance


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    typer.echo(text)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))
