"""The folder of a search: points while it runs, results once it is done, each file whole."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import polars as pl

from helios_sim.errors import InputError
from helios_sim.folders import write_whole
from helios_sim.profiles.files import is_shipped, load_profile
from helios_sim.report.document import is_own_page
from helios_sim.runs.metrics import rounded_figures
from helios_sim.runs.records import REPORT_FILE
from helios_sim.scenario import Scenario, resolved
from helios_sim.search.points import named_files
from helios_sim.search.store import EARLIER, POINTS, Store, finished_points, own_files
from helios_sim.settings.toml_writer import toml_text

RESULTS: Final = "results.parquet"
PARETO: Final = "pareto.csv"
SCENARIO: Final = "scenario.toml"
JOURNAL: Final = "study.journal"
_log = logging.getLogger(__name__)
_MADE: Final = (SCENARIO, PARETO, REPORT_FILE, JOURNAL, f"{JOURNAL}.lock")
"""What a search makes beside its points and its table, in the order that it is put aside in."""


def check_folder(out: Path, resume: bool, scenario: Scenario, base_dir: Path) -> None:
    """Raise `InputError` unless a scenario's search may have the folder; it is left as it is.

    Only a folder with finished points or with the table is a search's: names that searches use are
    a user's own elsewhere, and so is everything where the scenario itself lies. Points of an
    unfinished search are used with `resume` and never thrown away without a word.
    """
    if out.exists() and not out.is_dir():
        raise InputError("It is a file; allowed is a new folder.", str(out))
    if out.resolve() == base_dir.resolve():
        raise InputError(
            "The scenario lies there, and results would take its place; give another --out.",
            str(out),
        )
    if not out.is_dir():
        return
    foreign = next(_foreign(out, scenario), None)
    if foreign is not None:
        raise InputError(
            f"The folder holds {foreign!r}, which is no part of a search; allowed is a new "
            "folder, an empty one, or that of an earlier search.",
            str(out),
        )
    num_points = len(finished_points(out / POINTS))
    if num_points and not resume and not _is_finished(out):
        raise InputError(
            f"The folder holds {num_points:,} finished points of a search that was not "
            "ended; go on with --resume, or give another --out.",
            str(out),
        )


def open_folder(out: Path, resume: bool) -> Store:
    """The store of a folder that `check_folder` allows, without results of an earlier search.

    They are put aside before anything runs, so that no answer stands beside points of another
    question, and removed once there are new ones. With `resume` the points stay where they are.
    """
    earlier = out / EARLIER
    # Asked in this order, since another shard may be putting the table aside.
    if _is_finished(earlier) and _is_finished(out):
        _forget(earlier)
    if _is_finished(out):
        _log.info(
            "The results of an earlier search in %s are put aside in its %s until there are new "
            "ones; %s.",
            out,
            EARLIER,
            "its points are used" if resume else "with --resume its points would be used",
        )
        earlier.mkdir(exist_ok=True)
        # The table goes last: until then the folder is that of a finished search.
        for name in (*_MADE, *(() if resume else (POINTS,)), RESULTS):
            with suppress(FileNotFoundError):
                (out / name).replace(earlier / name)
    else:
        # A search that was killed before its table makes them again from its points.
        for name in _MADE:
            (out / name).unlink(missing_ok=True)
    return Store(out / POINTS)


def _is_finished(folder: Path) -> bool:
    """Whether a search in a folder has come to its end."""
    return (folder / RESULTS).is_file()


def _foreign(out: Path, scenario: Scenario) -> Iterator[str]:
    """What a folder holds that no search has written, as paths from it."""
    found = {one.name: one for one in sorted(out.iterdir())}
    ours: set[str] = set()
    endings: tuple[str, ...] = (".partial",)
    if found.keys() & {POINTS, EARLIER, RESULTS}:
        ours |= {JOURNAL, f"{JOURNAL}.lock"}
    if finished_points(out / POINTS) or _is_finished(out):
        ours |= {RESULTS, PARETO, *(part for part, *_ in _own_modules(scenario))}
        endings = (".partial", ".py")
        # A scenario is written after the front and put aside before it: alone it is a user's.
        if PARETO in found:
            ours.add(SCENARIO)
        if is_own_page(out / REPORT_FILE):
            ours.add(REPORT_FILE)
    for name, one in found.items():
        if name == POINTS and one.is_dir():
            own = set(own_files(one))
            yield from (f"{name}/{inner.name}" for inner in one.iterdir() if inner not in own)
        elif name == EARLIER and one.is_dir():
            known = (*_MADE, RESULTS, POINTS)
            yield from (
                f"{name}/{inner.name}" for inner in one.iterdir() if inner.name not in known
            )
        elif name not in ours and not name.endswith(endings):
            yield name


def _forget(earlier: Path) -> None:
    """Remove what searches have written of results put aside, and the folder if that is all."""
    points = earlier / POINTS
    # The table goes last: until then they are those of a finished search.
    for one in (*own_files(points), *(earlier / name for name in (*_MADE, RESULTS))):
        one.unlink(missing_ok=True)
    for folder in (points, earlier):
        with suppress(OSError):
            folder.rmdir()


def write_results(out: Path, store: Store, files: Mapping[str, bytes]) -> None:
    """Write result files one by one, each moved into place; the table comes last.

    A folder with the table is that of a finished search, which needs no results of an earlier one.
    """
    order = sorted(files, key=lambda name: name == RESULTS)
    for name in order:
        try:
            write_whole(out / name, files[name])
        except OSError as error:
            raise InputError(
                f"{name} cannot be written: {error.strerror}. {store.kept()} Make room and run "
                "the command again with --resume.",
                str(out),
            ) from error
    # What cannot be removed now is when the folder is next used.
    with suppress(OSError):
        _forget(out / EARLIER)


def parquet_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as a Parquet table; a column of mixed kinds becomes text."""
    buffer = io.BytesIO()
    _frame(rows).write_parquet(buffer, compression="zstd", compression_level=3)
    return buffer.getvalue()


def csv_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as comma-separated text."""
    return _frame(rows).write_csv(line_terminator="\n").encode()


def _frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, list[Any]] = {}
    for name in names:
        values = [rounded_figures(row.get(name)) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1 or kinds & {list, dict}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = values
    return pl.DataFrame(columns, infer_schema_length=None)


def scenario_bytes(scenario: Scenario, base_dir: Path, out: Path, said: Sequence[str]) -> bytes:
    """A recommended scenario as a file that runs where it lies: its paths lead from `out`.

    A policy of the user's own is found beside a scenario, so its source is copied there.
    """
    data = resolved(scenario)
    for holder, name in named_files(data["workload"]):
        holder["file"] = _path_from(out, base_dir / name)
    profile = load_profile(data["fleet"]["profile"], base_dir)
    if not is_shipped(profile):
        data["fleet"]["profile"] = _path_from(out, profile.folder)
    for parts in _own_modules(scenario):
        source, target = (at.joinpath(*parts).with_suffix(".py") for at in (base_dir, out))
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    header = "".join(f"# {line}\n" for line in said)
    return f"{header}\n{toml_text(data)}".encode()


def _own_modules(scenario: Scenario) -> list[tuple[str, ...]]:
    """The modules of policies of the user's own, as the parts of their paths."""
    named = (policy.use.partition(":") for policy in scenario.policy)
    return [tuple(module.removesuffix(".py").split(".")) for module, colon, _ in named if colon]


def _path_from(out: Path, target: Path) -> str:
    """A path that leads from a folder to a file, so that both can be moved together."""
    return Path(os.path.relpath(target.resolve(), out.resolve())).as_posix()
