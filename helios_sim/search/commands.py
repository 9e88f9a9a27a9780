"""The commands plan, tune and whatif, from a scenario file to a folder and a table."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from helios_sim.console.command import Interrupted
from helios_sim.errors import InputError
from helios_sim.experiment import choose_policies
from helios_sim.folder_names import folder_name
from helios_sim.runs.records import REPORT_FILE
from helios_sim.scenario import Scenario, load_scenario
from helios_sim.search.bench import headroom_study, plan_studies
from helios_sim.search.executors import Workers, open_workers
from helios_sim.search.fleets import read_plan
from helios_sim.search.page import plan_page, tune_page, whatif_page
from helios_sim.search.plan import check_answerable, make_plan, no_plan
from helios_sim.search.plan import recommended as planned_scenario
from helios_sim.search.plan_words import plan_headline, plan_remarks
from helios_sim.search.points import Point
from helios_sim.search.results import (
    JOURNAL,
    PARETO,
    RESULTS,
    SCENARIO,
    check_folder,
    csv_bytes,
    open_folder,
    parquet_bytes,
    scenario_bytes,
    write_results,
)
from helios_sim.search.store import POINTS, Store, kept_in
from helios_sim.search.studies import OnPoint, Standing, Steps, Study, carry_out
from helios_sim.search.tables import (
    Cells,
    Rows,
    cell_records,
    fleet_rows,
    plan_front,
    plan_records,
    setting_rows,
    trial_records,
    trial_rows,
    tune_front,
    whatif_rows,
)
from helios_sim.search.tune import SAID, known_points, nearest_miss, read_tune, tune_study
from helios_sim.search.tune import recommended as tuned_scenario
from helios_sim.search.tune_words import tune_headline, tune_remarks
from helios_sim.search.whatif import parse_vary, profiles_of, whatif_studies
from helios_sim.search.whatif_words import whatif_answer, whatif_remarks
from helios_sim.wording import counted, span

T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    """How a search is run: where its folder is, by whom, and which part of it."""

    out: Path | None = None
    resume: bool = False
    num_processes: int | None = None
    scheduler: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise InputError(
                f"It was given {self.num_processes}; allowed is a number from 1 on.", "--processes"
            )

    @property
    def part(self) -> tuple[int, int] | None:
        """The shard as (place from 0, how many)."""
        if self.shard is None:
            return None
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard)
        place, num = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= place <= num:
            raise InputError(
                f"It was given {self.shard!r}; write i/n, such as 1/4, with i from 1 to n.",
                "--shard",
            )
        return place - 1, num


@dataclass(frozen=True)
class Output:
    """What a command prints: sentences, tables, and the rows behind them for programs."""

    sentences: Sequence[str]
    tables: Sequence[tuple[Cells, bool]]
    rows: Rows
    folder: Path
    has_page: bool = True


def plan(path: Path, changes: Sequence[str], running: Running) -> Output:
    """Answer how much a fleet carries, or how many devices a rate needs."""
    scenario = load_scenario(path, changes)
    question = read_plan(scenario, path.parent, str(path))
    studies = plan_studies(question)
    with _session(running, scenario, path, "plan") as session:
        if running.part is not None:
            return session.shard(studies, running.part, "fleets")
        answers = session.carry_out(studies)
        try:
            best = check_answerable(question, answers)
        except InputError as error:
            found = no_plan(question, answers, error.message)
            session.write(plan_records(found), plan_page(found))
            raise InputError(
                f"{error.message} All loads are in {session.out}.\n{session.said}", error.where
            ) from error
        (best,) = session.carry_out([headroom_study(question, best)])
        found = make_plan(question, answers, best)
        scenario = planned_scenario(found)
        header = ["Recommended by helios plan."]
        files = {
            PARETO: csv_bytes(plan_front(found)),
            SCENARIO: scenario_bytes(scenario, path.parent, session.out, header),
        }
        session.write(plan_records(found), plan_page(found, scenario), files)
    sentences = [plan_headline(found), *plan_remarks(found)]
    tables = [(fleet_rows(found, brief=True), True)]
    return Output(sentences, tables, plan_records(found), session.out)


def tune(path: Path, changes: Sequence[str], running: Running) -> Output:
    """Answer which settings are best, and whether they are on traffic they were not tuned on."""
    scenario = load_scenario(path, changes)
    question = read_tune(scenario, path.parent, str(path))
    points = known_points(question) if running.part is not None else []
    with _session(running, scenario, path, "tune") as session:
        if running.part is not None:
            return session.shard([_one_of(point) for point in points], running.part, "points")
        (found,) = session.carry_out([tune_study(question, session.out / JOURNAL)])
        scenario = tuned_scenario(found)
        ran = any(trial.state != "impossible" for trial in found.trials)
        files = {}
        if ran:
            header = [f"{SAID[found.verdict]}."]
            files = {
                PARETO: csv_bytes(tune_front(found)),
                SCENARIO: scenario_bytes(scenario, path.parent, session.out, header),
            }
        session.write(trial_records(found), tune_page(found, scenario), files)
    if not ran:
        raise InputError(f"{tune_headline(found)}\n{session.said}", f"{path}, search")
    if found.winner is None:
        raise InputError(
            f"None of {counted(len(found.trials), 'trial')} keeps the constraints "
            f"{question.judge.constraints}: {nearest_miss(found)}. All trials are in "
            f"{session.out}.\n{session.said}",
            f"{path}, search.constraints",
        )
    sentences = [tune_headline(found), *tune_remarks(found)]
    tables = [(trial_rows(found), True), (setting_rows(found), False)]
    return Output(sentences, tables, trial_records(found), session.out)


def whatif(
    path: Path,
    changes: Sequence[str],
    vary: Sequence[str],
    policies: Sequence[str],
    replications: int | None,
    running: Running,
) -> Output:
    """Compare a small grid side by side."""
    scenario = load_scenario(path, changes)
    chosen = choose_policies(scenario, policies)
    num = replications or scenario.measure.replications
    studies = whatif_studies(scenario, path.parent, str(path), chosen, parse_vary(vary), num)
    with _session(running, scenario, path, "whatif") as session:
        if running.part is not None:
            return session.shard(studies, running.part, "cells")
        cells = session.carry_out(studies)
        profiles = profiles_of(scenario, path.parent, cells)
        session.write(cell_records(cells), whatif_page(scenario, cells, num, profiles))
    headline = whatif_answer(cells, num)[0]
    if not any(cell.can_be for cell in cells):
        raise InputError(f"{headline} {cells[0].why}\n{session.said}", str(path))
    sentences = [headline, *whatif_remarks(scenario, cells, num, profiles)]
    return Output(sentences, [(whatif_rows(cells), False)], cell_records(cells), session.out)


def _one_of(point: Point) -> Study[None]:
    """A study that wants a point and concludes nothing."""

    def steps() -> Steps[None]:
        yield [point]

    return Study(steps(), 1)


@dataclass(frozen=True)
class _Session:
    """A search under way: its folder, and who runs its points."""

    out: Path
    store: Store
    workers: Workers
    on_point: OnPoint

    @property
    def said(self) -> str:
        """Where the page lies."""
        return f"Page: {self.out / REPORT_FILE}"

    def carry_out(self, studies: Sequence[Study[T]]) -> list[T]:
        """The results of studies, in their order."""
        return carry_out(studies, self.workers, self.store, self.on_point)

    def shard(self, studies: Sequence[Study[T]], part: tuple[int, int], what: str) -> Output:
        """Carry out one part of the studies, whose results whoever has all points concludes."""
        place, num = part
        mine = studies[place::num]
        self.carry_out(mine)
        sentences = [
            f"Shard {place + 1}/{num} is done: {len(mine)} of {len(studies)} {what}. "
            f"{self.store.kept()}",
            "When all shards are, bring their points folders together and run the command once "
            "more with --resume and without --shard.",
        ]
        return Output(sentences, [], [], self.out, has_page=False)

    def write(self, rows: Rows, page: str, files: Mapping[str, bytes] | None = None) -> None:
        """Write the table, the page and other files of a search that is done."""
        shown = {REPORT_FILE: page.encode(), RESULTS: parquet_bytes(rows)}
        write_results(self.out, self.store, {**(files or {}), **shown})


@contextmanager
def _session(running: Running, scenario: Scenario, path: Path, kind: str) -> Iterator[_Session]:
    """Workers, the store of the folder, and a bar; an interrupt says what is kept."""
    out = running.out or Path("runs") / f"{folder_name(scenario.name)}-{kind}"
    resume = running.resume or running.part is not None
    check_folder(out, resume, scenario, path.parent)
    is_begun = False
    try:
        # The folder is left as it is until there is somebody to run points.
        with open_workers(running.num_processes, running.scheduler) as workers:
            is_begun = True
            store = open_folder(out, resume)
            with _bar() as on_point:
                yield _Session(out, store, workers, on_point)
    except KeyboardInterrupt:
        if not is_begun:
            raise
        kept = kept_in(out / POINTS)
        raise Interrupted(f"{kept[0].lower()}{kept[1:]} Go on with --resume") from None
    except OSError as error:
        raise InputError(
            f"The search cannot go on: {error.strerror or error}. {kept_in(out / POINTS)} Run the "
            "command again with --resume.",
            str(out),
        ) from error


@contextmanager
def _bar() -> Iterator[Callable[[Standing], None]]:
    """A bar with the time left on standard error, where somebody is there to see it."""
    if not sys.stderr.isatty():
        yield lambda _standing: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=None, left="")

        def show(standing: Standing) -> None:
            left = standing.left_s
            words = "" if left is None else f"about {span(max(1.0, left))} left"
            bar.update(task, completed=standing.num_done, total=standing.num_expected, left=words)

        yield show
