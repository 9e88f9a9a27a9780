"""The folder of a search: points while it runs, results once it is done, each file whole."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import polars as pl

from helios_sim.errors import InputError
from helios_sim.folders import write_whole
from helios_sim.profiles.files import is_shipped, load_profile
from helios_sim.runs.metrics import rounded_figures
from helios_sim.runs.records import REPORT_FILE
from helios_sim.scenario import Scenario, resolved
from helios_sim.search.points import named_files
from helios_sim.search.store import POINTS, Store
from helios_sim.settings.toml_writer import toml_text

RESULTS: Final = "results.parquet"
PARETO: Final = "pareto.csv"
SCENARIO: Final = "scenario.toml"
JOURNAL: Final = "study.journal"
_log = logging.getLogger(__name__)
_OURS: Final = (RESULTS, PARETO, SCENARIO, REPORT_FILE, JOURNAL, f"{JOURNAL}.lock", POINTS)


def open_folder(out: Path, resume: bool, scenario: Scenario, base_dir: Path) -> Store:
    """The store of the folder of a scenario's search.

    Only a folder with points or with the table is a search's: names that searches use are a user's
    own elsewhere, and so is everything where the scenario itself lies.
    Results of a finished search are replaced: all of them go before anything runs, so that no
    answer stands beside points of another question. Points of an unfinished one are used with
    `resume` and never thrown away without a word.
    """
    if out.exists() and not out.is_dir():
        raise InputError("It is a file; allowed is a new folder.", str(out))
    if out.resolve() == base_dir.resolve():
        raise InputError(
            "The scenario lies there, and results would take its place; give another --out.",
            str(out),
        )
    if out.is_dir():
        is_search = (out / POINTS).is_dir() or (out / RESULTS).is_file()
        ours = {*_OURS, *(part for part, *_ in _own_modules(scenario))} if is_search else set()
        endings = (".partial", ".py") if is_search else (".partial",)
        foreign = [
            one.name
            for one in sorted(out.iterdir())
            if one.name not in ours and not one.name.endswith(endings)
        ]
        if foreign:
            raise InputError(
                f"The folder holds {foreign[0]!r}, which is no part of a search; allowed is a new "
                "folder, an empty one, or that of an earlier search.",
                str(out),
            )
        points = out / POINTS
        num_points = sum(1 for _ in points.glob("*.json")) if points.is_dir() else 0
        if num_points and not resume:
            if not (out / RESULTS).is_file():
                raise InputError(
                    f"The folder holds {num_points:,} finished points of a search that was not "
                    "ended; go on with --resume, or give another --out.",
                    str(out),
                )
            _log.info(
                "The results of an earlier search in %s are replaced; --resume uses its points.",
                out,
            )
        if points.is_dir() or (out / RESULTS).is_file():
            for name in (PARETO, SCENARIO, REPORT_FILE, JOURNAL, f"{JOURNAL}.lock"):
                (out / name).unlink(missing_ok=True)
            if num_points and not resume:
                shutil.rmtree(points)
            # The table goes last: until then the folder is that of a finished search.
            (out / RESULTS).unlink(missing_ok=True)
    return Store(out / POINTS)


def write_results(out: Path, store: Store, files: Mapping[str, bytes]) -> None:
    """Write result files one by one, each moved into place; the table comes last.

    A folder with the table is that of a finished search.
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
