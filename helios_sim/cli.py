"""The command `helios`: simulate, plan and tune scenarios, compare and report runs.

Heavy modules are imported inside the commands, so that `helios --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helios_sim.console.command import WithVersion, run_app
from helios_sim.errors import InputError

if TYPE_CHECKING:
    from helios_sim.experiment import Progress, Result
    from helios_sim.fidelity import Sides
    from helios_sim.scenario import Scenario
    from helios_sim.search.commands import Output
    from helios_sim.workload.requests import Requests

app = typer.Typer(
    name="helios",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
scenario_app = typer.Typer(help="Check scenario files; print their schema.", no_args_is_help=True)
app.add_typer(scenario_app, name="scenario")
profiles_app = typer.Typer(invoke_without_command=True)
app.add_typer(profiles_app, name="profiles")


@app.callback()
def options(version: WithVersion = False) -> None:
    """Simulate how early-exit language models are served, and what HELIOS makes of it."""


ScenarioFile = Annotated[Path, typer.Argument(help="A scenario file (TOML).", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as fleet.num_replicas=2 or policy.0.breach_limit=30 (lists "
        "count from 0); KEY= removes one; may be repeated.",
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="Run only this policy, by its label or name; may be repeated. A shipped one that the "
        "scenario lacks runs with its defaults.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]

Resume = Annotated[
    bool, typer.Option("--resume", help="Use the finished points that the folder holds.")
]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Worker processes.", show_default="one a processor"),
]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Run on the dask cluster of this scheduler instead."),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Run only this part of the points, and stop; tune takes it with grid or sobol.",
    ),
]
SearchFolder = Annotated[
    Path | None,
    typer.Option(
        help="Folder for points and results.", show_default="runs/NAME-plan, -tune, -whatif"
    ),
]


@app.command()
def simulate(
    scenario: ScenarioFile,
    policy: Policies = None,
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
    from helios_sim.experiment import choose_policies, prepare, run_policy
    from helios_sim.folder_names import folder_name

    all_changes = [*(changes or []), *([] if seed is None else [f"seed={seed}"])]
    question = _load(scenario, all_changes)
    experiment = prepare(question, scenario.parent, str(scenario))
    policies = choose_policies(question, policy or [])
    usual = Path("runs") / folder_name(question.name)
    target = out if out is not None else (None if as_json else usual)
    if target is not None:
        from helios_sim.publish import check_results_target, write_results

        check_results_target(target)
    before, unwritten = _entries(target), None
    with _progress(quiet=as_json) as progress:
        results = [run_policy(experiment, chosen, progress) for chosen in policies]
        if target is not None:
            progress("writing", 0.0)
            unwritten = write_results(results, target)
    if as_json:
        summaries = [result.summary for result in results]
        _print_json(summaries[0] if len(summaries) == 1 else summaries)
    else:
        _show(results)
    if unwritten is not None:
        raise InputError(unwritten, str(target))
    if target is not None and not as_json:
        _say(f"Page: {target / 'report.html'}{_replaced(before, _entries(target))}")


@app.command()
def plan(
    scenario: ScenarioFile,
    changes: Changes = None,
    out: SearchFolder = None,
    resume: Resume = False,
    processes: Processes = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    as_json: AsJson = False,
) -> None:
    """Find the highest rate that fleets carry under the SLO, or the fleet that a rate needs."""
    from helios_sim.search.commands import Running
    from helios_sim.search.commands import plan as plan_command

    running = Running(out, resume, processes, scheduler, shard)
    _show_search(plan_command(scenario, changes or [], running), as_json)


@app.command()
def tune(
    scenario: ScenarioFile,
    changes: Changes = None,
    out: SearchFolder = None,
    resume: Resume = False,
    processes: Processes = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    as_json: AsJson = False,
) -> None:
    """Search the ranges that the scenario declares, and try the best on traffic not tuned on."""
    from helios_sim.search.commands import Running
    from helios_sim.search.commands import tune as tune_command

    running = Running(out, resume, processes, scheduler, shard)
    _show_search(tune_command(scenario, changes or [], running), as_json)


@app.command()
def whatif(
    scenario: ScenarioFile,
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="KEY=A,B,C", help="Settings to vary; may be repeated."),
    ],
    policy: Policies = None,
    replications: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Runs a cell.", show_default="the scenario's"),
    ] = None,
    changes: Changes = None,
    out: SearchFolder = None,
    resume: Resume = False,
    processes: Processes = None,
    scheduler: Scheduler = None,
    shard: Shard = None,
    as_json: AsJson = False,
) -> None:
    """Compare a small grid of settings side by side."""
    from helios_sim.search.commands import Running
    from helios_sim.search.commands import whatif as whatif_command

    running = Running(out, resume, processes, scheduler, shard)
    output = whatif_command(scenario, changes or [], vary, policy or [], replications, running)
    _show_search(output, as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one workload.")],
    simulated: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="The simulated run; the others are real runs of its scenario."
        ),
    ] = None,
    attribution: Annotated[
        bool,
        typer.Option(
            "--attribution/--no-attribution",
            help="Simulate again with parts of the real run, to see what an error comes from.",
        ),
    ] = True,
    files: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder that the scenario's files are relative to.",
            show_default="the current one",
        ),
    ] = None,
    allow_simulated: Annotated[
        bool,
        typer.Option("--allow-simulated", help="Take simulated runs for real ones."),
    ] = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write a page here (a name in .html), or a folder with the page and its figures."
        ),
    ] = None,
) -> None:
    """Compare runs of the same requests, figure by figure; or real runs with the simulated one."""
    from helios_sim.fidelity.sides import sides_given

    if allow_simulated and simulated is None:
        raise InputError(
            "--allow-simulated takes the runs beside the simulated one for real ones, and none is "
            "named; name it with --simulated, or leave --allow-simulated out to compare policies.",
            "compare",
        )
    given = sides_given(runs, simulated)
    if given is not None:
        from helios_sim.fidelity import read_sides

        sides = read_sides(*given, allow_simulated=allow_simulated, base_dir=files or Path())
        _compare_sides(sides, files or Path(), attribution, as_json, out)
        return
    for option, is_given in (("--files", files is not None), ("--no-attribution", not attribution)):
        if is_given:
            raise InputError(
                f"{option} applies to real runs beside a simulated one, and the runs given are all "
                f"of one origin; name the simulated one with --simulated, or leave {option} out to "
                "compare policies.",
                "compare",
            )
    _compare_policies(runs, as_json, out)


def _compare_policies(runs: list[Path], as_json: bool, out: Path | None) -> None:
    """Runs of the same requests beside each other, in a table and on a page."""
    from dataclasses import asdict, replace

    from helios_sim.report.words import labels_apart
    from helios_sim.runs.comparison import compare as compare_runs
    from helios_sim.runs.records import read_run, read_summary

    if len(runs) < 2:
        raise InputError(f"{len(runs)} run was given; a comparison needs at least two.", "compare")
    if out is not None:
        from helios_sim.publish import check_comparison_target

        check_comparison_target(out)
    data = [read_run(path) for path in runs]
    summaries = [read_summary(path) for path in runs]
    rows = compare_runs(data, summaries, [str(path) for path in runs])
    labels = labels_apart(
        [run.label for run in data], [run.environment for run in data], [str(path) for path in runs]
    )
    told = [{**one, "label": label} for one, label in zip(summaries, labels, strict=True)]
    figures = [asdict(row) for row in rows]
    page = None
    if out is not None:
        from helios_sim.publish import write_comparison
        from helios_sim.report import render

        named = [replace(run, label=label) for run, label in zip(data, labels, strict=True)]
        page = write_comparison(render(named, told), f"{_json_text(figures)}\n", out)
    if as_json:
        _print_json(figures)
        return
    from helios_sim.console.terminal import comparison_table

    _say_serving([run.environment for run in data], told)
    _console().print(comparison_table(rows, labels))
    _say_changed(told)
    _say_extrapolated(labels, summaries)
    if page is not None:
        _say(f"Page: {page}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Write a run's page anew."""
    from helios_sim.publish import write_page
    from helios_sim.runs.records import read_run, read_summary

    target = out or run / "report.html"
    write_page([read_run(run)], [read_summary(run)], target)
    _say(f"Page: {target}")


@profiles_app.callback()
def profiles(context: typer.Context, as_json: AsJson = False) -> None:
    """List the profiles that are shipped, with where their numbers come from; derive others."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise InputError("--json applies only to the list of profiles.", "helios profiles")
        return
    from dataclasses import asdict

    from helios_sim.profiles.files import list_profiles

    listed = list_profiles()
    if as_json:
        _print_json([asdict(profile) for profile in listed])
        return
    from helios_sim.console.terminal import profiles_table

    _console().print(profiles_table(listed))


def _amount(option: str, help_text: str) -> Any:
    """An option that takes a number with or without a unit."""
    return typer.Option(option, metavar="AMOUNT", help=help_text, show_default=False)


@profiles_app.command("derive")
def derive(
    context: typer.Context,
    source: Annotated[
        str, typer.Option("--from", metavar="PROFILE", help="The profile to start from.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new profile.", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the new profile.", show_default="that of the folder"),
    ] = None,
    device_name: Annotated[
        str | None,
        typer.Option(help="Name of the device.", show_default="that of the profile"),
    ] = None,
    memory_bytes: Annotated[str | None, _amount("--memory", "Memory, such as 48GiB.")] = None,
    bytes_per_s: Annotated[
        str | None, _amount("--bandwidth", "Memory bandwidth, such as 864GB/s.")
    ] = None,
    flops_per_s: Annotated[
        str | None, _amount("--flops", "Peak at the models' width, such as 362TFLOP/s.")
    ] = None,
    launch_s: Annotated[
        str | None, _amount("--launch", "Launch floor of a layer, such as 0.1ms.")
    ] = None,
    fixed_s: Annotated[
        str | None, _amount("--fixed", "Fixed part of an iteration, such as 0.5ms.")
    ] = None,
    limit_w: Annotated[str | None, _amount("--watts", "Power limit, such as 350.")] = None,
    idle_w: Annotated[
        str | None, _amount("--idle-watts", "Idle power; scaled with the power limit unless given.")
    ] = None,
    active_w: Annotated[str | None, _amount("--active-watts", "Least power while working.")] = None,
    load_w: Annotated[
        str | None, _amount("--load-watts", "Power while weights are loaded.")
    ] = None,
    host_bytes_per_s: Annotated[
        str | None, _amount("--load-bandwidth", "Bandwidth of the link from host memory.")
    ] = None,
    disk_bytes_per_s: Annotated[
        str | None, _amount("--disk-bandwidth", "Bandwidth of the disk.")
    ] = None,
    from_bytes_per_s: Annotated[
        str | None, _amount("--from-bandwidth", "Memory bandwidth of the given device.")
    ] = None,
    from_flops_per_s: Annotated[
        str | None, _amount("--from-flops", "Peak of the given device.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME=FILE",
            help="A model that no profile has, from its config.json; repeatable.",
        ),
    ] = None,
    like: Annotated[
        list[str] | None,
        typer.Option(
            "--like",
            metavar="[NAME=]MODEL",
            help="The model whose numbers are scaled and whose exits stand in.",
            show_default="the nearest by bytes of a layer",
        ),
    ] = None,
    exits: Annotated[
        list[str] | None,
        typer.Option(
            "--exits",
            metavar="[NAME=]LAYERS",
            help="Exit layers, such as 8,16,24.",
            show_default="the relative depths of the model that it is like",
        ),
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            "--tokenizer",
            metavar="[NAME=]TOKENIZER",
            help="Models of one tokenizer are compared by perplexity.",
            show_default="its own",
        ),
    ] = None,
    replacing: Annotated[
        bool, typer.Option("--replace", help="Let --model replace a model of the profile.")
    ] = False,
    keep_exits: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-exits",
            metavar="MODEL=LAYERS",
            help="Exits that a model of the profile keeps, such as llama2-13b=20,40; repeatable.",
            show_default="all",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a profile that is there.")
    ] = False,
) -> None:
    """Make a profile of a device or of models that are not here, or of a model with fewer exits."""
    from dataclasses import replace

    from helios_sim.console.terminal import model_figures_table, profiles_table
    from helios_sim.profiles.derive import (
        OPTIONS,
        changes,
        device_of,
        tells_a_device,
        write_derived,
    )
    from helios_sim.profiles.derive_model import figures_of, wanted_of, write_with_models
    from helios_sim.profiles.files import load_profile
    from helios_sim.profiles.keep_exits import kept_of, write_with_exits
    from helios_sim.report.words import standing_in

    own_name = name if name is not None else out.resolve().name
    wanted = wanted_of(model or [], like or [], exits or [], tokenizer or [])
    if replacing and not wanted:
        raise InputError("--replace is of models; give a --model too.", "--replace")
    # The amounts are parameters by the names that a device's numbers have.
    amounts = {key: context.params[key] for key in OPTIONS}
    device = device_of(device_name if device_name is not None else own_name, amounts)
    given = load_profile(source)
    tables: list[Any] = []
    texts: list[str] = []
    if keep_exits:
        if wanted or device_name is not None or any(map(bool, amounts.values())):
            raise InputError(
                "--keep-exits goes alone; derive from the new profile to change more.",
                "--keep-exits",
            )
        kept = kept_of(keep_exits, given)
        derived = write_with_exits(given, own_name, kept, out, overwrite=overwrite)
    elif wanted:
        if device_name is None and not tells_a_device(device):
            device = replace(device, name=given.device.name)
        derived = write_with_models(
            given, own_name, device, wanted, out, overwrite=overwrite, replacing=replacing
        )
        likes = {one.name: derived.stand_ins[one.name] for one in wanted}
        figures = figures_of(derived, list(dict.fromkeys([*likes, *likes.values()])))
        tables = [model_figures_table(figures)]
        texts = changes(given, derived, device) if tells_a_device(device) else []
        texts += [
            f"{one.name} is like {likes[one.name]}, whose layers are nearest in bytes; --like "
            "names another."
            for one in wanted
            if one.like is None
        ]
        texts.append(standing_in(likes))
    else:
        derived = write_derived(given, own_name, device, out, overwrite)
        texts = changes(given, derived, device)
    for table in (profiles_table([derived.summary()]), *tables):
        _console().print(table)
    for text in (*texts, f"Profile: {out}"):
        _say(text)


@scenario_app.command("check")
def check(scenario: ScenarioFile, changes: Changes = None) -> None:
    """Read a scenario and everything it names, and say what it would run."""
    from helios_sim.experiment import prepare, rehearse
    from helios_sim.wording import counted, limits
    from helios_sim.workload.trace_flaws import counts_said

    question = _load(scenario, changes or [])
    experiment = prepare(question, scenario.parent, str(scenario))
    requests, shortened = experiment.requests(question.seed)
    for chosen in question.policy:
        rehearse(experiment, chosen)
    if question.plan is not None:
        from helios_sim.search.fleets import read_plan

        read_plan(question, scenario.parent, str(scenario))
    if question.search is not None:
        from helios_sim.search.tune import read_tune

        read_tune(question, scenario.parent, str(scenario))
    policies = ", ".join(f"{policy.name!r}" for policy in question.policy)
    _say(f"{scenario} is good: {counted(len(requests), 'request')}, policies {policies}.")
    _say(_arrivals(requests))
    if question.slo_spec is not None:
        _say(f"SLO: {limits(str(question.slo_spec))}.")
    if question.workload.trace is not None and question.workload.replays_arrivals:
        from helios_sim.workload.traces import doubtful_times

        doubt = doubtful_times(question.workload.trace, scenario.parent)
        if doubt is not None:
            _say(doubt)
    if requests.num_dropped:
        _say(f"Rows of the trace left out because they hold no request: {requests.num_dropped:,}.")
    if requests.skipped:
        _say(f"Rows of the trace left out by skip_bad_rows: {counts_said(requests.skipped)}.")
    if shortened:
        _say(
            f"{shortened:,} of {len(requests):,} requests are shortened to "
            f"{experiment.setup.context_tokens:,} tokens."
        )
    setup = experiment.setup
    _say(
        f"Policies expect prompts of {setup.expected_prompt_tokens:,} and outputs of "
        f"{setup.expected_output_tokens:,} tokens; the workload's means are "
        f"{requests.mean_prompt_tokens:,.1f} and {requests.mean_output_tokens:,.1f}."
    )
    by_all, by_some = experiment.refusals(requests)
    least, most = experiment.setup.longest_requests
    if by_all:
        _say(
            f"{by_all:,} of {len(requests):,} requests will be refused: they are longer than the "
            f"{most:,} tokens that any candidate can hold."
        )
    if by_some:
        _say(
            f"Up to {by_some:,}{' more' if by_all else ''} will be refused where a candidate or a "
            f"depth serves that cannot hold them; the least holds {least:,} tokens."
        )


def _arrivals(requests: Requests) -> str:
    """Within what time requests arrive and how many a second, which shows a mistaken unit."""
    from helios_sim.wording import number, span

    if requests.num_users is not None:
        return "Users send them in a closed loop, as they are answered."
    if requests.span_s <= 0.0:
        return "They arrive at one moment."
    rate = number(len(requests) / requests.span_s)
    return f"They arrive within {span(requests.span_s)}, {rate} requests/s on average."


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


def _compare_sides(
    sides: Sides, files: Path, attribution: bool, as_json: bool, out: Path | None
) -> None:
    """Compare real runs with the simulated one."""
    from helios_sim.fidelity import assess
    from helios_sim.fidelity.assessment import FIDELITY_FILE, json_text
    from helios_sim.fidelity.page import render
    from helios_sim.fidelity.tables import attribution_table, figures_table, requests_table
    from helios_sim.fidelity.words import headline, remarks
    from helios_sim.publish import check_comparison_target, write_comparison

    if out is not None:
        check_comparison_target(out, FIDELITY_FILE)
    with _progress(quiet=as_json) as progress:
        found = assess(sides, files, attribution=attribution, report=progress)
    page = None
    if out is not None:
        page = write_comparison(render(found), json_text(found), out, FIDELITY_FILE)
    if as_json:
        _print_json(found.data())
        return
    _say(headline(found))
    for table in (figures_table(found), requests_table(found)):
        _say("")
        _console().print(table)
    if found.attribution is not None:
        _say("")
        _console().print(attribution_table(found, found.attribution))
    _say("")
    for text in remarks(found):
        _say(text)
    if page is not None:
        _say(f"Page: {page}")


def _show_search(output: Output, as_json: bool) -> None:
    if as_json:
        from helios_sim.runs.metrics import rounded_figures

        _print_json(rounded_figures(output.rows))
        return
    from helios_sim.search.tables import terminal_table

    for sentence in output.sentences:
        _say(sentence)
    for cells, best_first in output.tables:
        _say("")
        _console().print(terminal_table(cells, best_first))
    if output.has_page:
        _say(f"\nPage: {output.folder / 'report.html'}")


def _entries(folder: Path | None) -> set[str]:
    """The names of what a folder holds; nothing where there is none."""
    return {entry.name for entry in folder.iterdir()} if folder and folder.is_dir() else set()


def _replaced(before: set[str], now: set[str]) -> str:
    """What became of the results that the folder held before, in brackets."""
    gone = sorted(before - now)
    if gone:
        return f" (the folder was replaced; gone are the earlier runs {', '.join(gone)})"
    return " (the folder was replaced)" if before else ""


def _show(results: Sequence[Result]) -> None:
    from helios_sim.console.terminal import summary_table
    from helios_sim.profile import STAND_INS
    from helios_sim.report.words import (
        grades_of,
        large_batches,
        launch_bound,
        mean_batches,
        none_alone,
        one_seed,
        range_over_seeds,
        standing_in,
        taken_otherwise,
        worth,
    )

    summaries = [result.summary for result in results]
    environments = [result.run.environment for result in results]
    _say_serving(environments, summaries)
    grades = grades_of(environments)
    large = large_batches(grades, mean_batches(summaries), taken_otherwise(environments))
    for text in [worth(grades, "policies"), *launch_bound(grades, summaries), *large]:
        _say(text)
    assumed = {name: like for one in environments for name, like in one.get(STAND_INS, {}).items()}
    if assumed:
        _say(standing_in(assumed))
    _console().print(summary_table(summaries))
    replications = summaries[0].get("replications")
    if replications is not None:
        first, *_, last = replications["seeds"]
        _say(
            f"These are the runs of seed {first}; means and 95 % intervals over the seeds {first} "
            f"to {last} are on the page and under replications in the summary.json of each run."
        )
    for text in [*none_alone(summaries), *one_seed(summaries), *range_over_seeds(summaries)]:
        _say(text)
    _say_changed(summaries)
    _say_extrapolated([str(summary["label"]) for summary in summaries], summaries)


def _say_changed(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Say below a table which SLO was missed, and which requests or users were not as usual."""
    from helios_sim.report.words import changed_requests, idle_users, slo_verdicts, waited_for_start

    for said in (slo_verdicts, waited_for_start, changed_requests, idle_users):
        for text in said(summaries):
            _say(text)


def _say_serving(
    environments: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]
) -> None:
    """Say above a table on which device its runs are, of which models, and judged by what."""
    from helios_sim.report.words import judged_by, serving

    for text in serving(environments, summaries):
        _say(text)
    slo = judged_by(summaries)
    if slo is not None:
        _say(slo)


def _say_extrapolated(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> None:
    """Say below a table which of its figures no measurement stands behind."""
    from helios_sim.report.words import beyond_measured

    for text in beyond_measured(names, summaries):
        _say(text)


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
    typer.echo(_json_text(data))


def _json_text(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False)
