"""Runs and their pages written where the user asked: whole, or without pages, or not at all."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError
from helios_sim.experiment import Result
from helios_sim.folder_names import folder_names
from helios_sim.folders import folder_in_place
from helios_sim.report import render
from helios_sim.report.page_files import (
    UnwrittenPage,
    check_own,
    check_page_target,
    is_page,
    write_page_text,
)
from helios_sim.runs.records import (
    REPORT_FILE,
    RUN_FILES,
    TOTALS_FILE,
    RunData,
    check_computed,
    write_run,
)


def check_results_target(out_dir: Path) -> None:
    """Raise `InputError` unless results may be written here: nothing, or results to replace.

    Runs that were served for real are not replaced, since they cannot be computed again.
    """
    check_writable(out_dir)
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise InputError("It is a file; allowed is a new folder.", str(out_dir))
    found = sorted(out_dir.iterdir())
    check_computed([out_dir, *found], "give another --out, or remove it by hand", out_dir)
    for entry in found:
        if entry.name == REPORT_FILE:
            check_own(entry)
            continue
        names = {file.name for file in entry.iterdir()} if entry.is_dir() else set()
        is_run = TOTALS_FILE in names and names <= {*RUN_FILES, REPORT_FILE}
        if not is_run:
            raise InputError(
                f"The folder holds {entry.name!r}, which is no run of ours; allowed is a new "
                "folder, an empty one, or earlier results to replace.",
                str(out_dir),
            )


def check_writable(out_dir: Path) -> None:
    """Raise `InputError` unless a folder can be made beside the target, which costs no hours."""
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent)).rmdir()
    except OSError as error:
        raise InputError(
            f"No results can be written there: {error.strerror}.", str(out_dir)
        ) from error


def write_results(results: Sequence[Result], out_dir: Path) -> str | None:
    """Write one folder a policy and the page that compares them, and move all into place.

    Pages come last and can be drawn again from the runs: where one cannot be written, the runs are
    kept without it. Returns what is then to be said, or None where all is there.
    """
    check_results_target(out_dir.resolve())
    names = folder_names([result.run.label for result in results])
    with folder_in_place(out_dir) as draft:
        for result, name in zip(results, names, strict=True):
            write_run(result.run, result.summary, draft / name)
        pages = {draft / name: [result] for result, name in zip(results, names, strict=True)}
        try:
            for folder, shown in {**pages, draft: results}.items():
                runs = [result.run for result in shown]
                write_page(runs, [result.summary for result in shown], folder / REPORT_FILE)
        except UnwrittenPage as error:
            return _drawn_later(error, [out_dir / name for name in names], out_dir / REPORT_FILE)
    return None


def _drawn_later(error: UnwrittenPage, runs: Sequence[Path], page: Path) -> str:
    """Why pages are missing beside runs that are kept, and the commands that draw them."""
    folders = [shlex.quote(str(run)) for run in runs]
    target = shlex.quote(str(page))
    if len(runs) == 1:
        return (
            f"{error.message} The tables of the run are kept; later, helios report {folders[0]} "
            "draws its page from them."
        )
    return (
        f"{error.message} The tables of the runs are kept; later, helios report {folders[0]} "
        f"draws a run's page from them, and helios compare {' '.join(folders)} --out {target} the "
        "one that compares them."
    )


def write_page(
    runs: Sequence[RunData], summaries: Sequence[Mapping[str, Any]], target: Path
) -> None:
    """Write the page of one run or of several compared, under a temporary name first."""
    write_page_text(render(runs, summaries), target)


COMPARISON_FILE: Final = "comparison.json"


def check_comparison_target(target: Path, figures_file: str = COMPARISON_FILE) -> None:
    """Raise `InputError` unless a comparison may be written here.

    Allowed are a page (a name that ends in .html) and a new folder, an empty one or an earlier
    comparison of the same kind to replace.
    """
    if is_page(target):
        check_page_target(target)
        return
    check_writable(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError("It is a file; allowed is a folder or a name in .html.", str(target))
    present = {entry.name for entry in target.iterdir()}
    foreign = sorted(present - {figures_file, REPORT_FILE})
    if foreign:
        raise InputError(
            f"The folder holds {foreign[0]!r}, which is no comparison of ours; allowed is a new "
            "folder, an empty one, or an earlier comparison to replace.",
            str(target),
        )
    check_own(target / REPORT_FILE)


def write_comparison(
    page: str, figures: str, target: Path, figures_file: str = COMPARISON_FILE
) -> Path:
    """Write a comparison's page, with its figures where the target is a folder; gives the page.

    `figures` are JSON text. A folder is written under a temporary name and moved into place.
    """
    check_comparison_target(target, figures_file)
    if is_page(target):
        write_page_text(page, target)
        return target
    with folder_in_place(target) as draft:
        for name, text in ((REPORT_FILE, page), (figures_file, figures)):
            (draft / name).write_text(text, encoding="utf-8", newline="\n")
    return target / REPORT_FILE
