"""The run on disk: one schema for simulated and real runs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

import numpy as np
import polars as pl
from polars.exceptions import PolarsError

from helios_sim.errors import InputError, first_line, shown
from helios_sim.folders import check_writable, folder_in_place
from helios_sim.runs.columns import (
    DECISION_COLUMNS,
    ITL_COLUMNS,
    REQUEST_COLUMNS,
    TIMELINE_COLUMNS,
    Column,
    conform,
    write_table,
)
from helios_sim.runs.laws import run_violations
from helios_sim.settings.toml import read_toml
from helios_sim.settings.toml_writer import toml_text

SCHEMA_VERSION = 1
MEASURED: Final = "measured"
"""The origin of a run that was served for real."""

Kind = Literal["text", "whole", "number", "flag", "list", "numbers", "tables", "wholes", "object"]

_LATENCY_STATISTICS: Final = ("mean", "median", "std", "p50", "p90", "p95", "p99")
SUMMARY_KINDS: Final[dict[str, tuple[Kind, bool]]] = {
    **dict.fromkeys(("label", "policy", "objective", "origin", "saturation"), ("text", False)),
    "slo": ("text", True),
    **dict.fromkeys(
        (
            *("schema_version", "seed", "num_replicas", "num_gpus", "num_requests", "completed"),
            *("failed", "num_refused", "num_unfinished", "num_preemptions", "warmup_requests"),
            *("num_measured", "total_input_tokens", "total_output_tokens", "num_breach_events"),
            *("max_concurrent_requests", "max_batch_size", "weight_bytes_peak", "num_switches"),
            *("num_loads", "num_evaluations"),
        ),
        ("whole", False),
    ),
    "warmup_s": ("number", False),
    **{
        f"{statistic}_{name}_ms": ("number", True)
        for name in ("ttft", "tpot", "itl", "e2el")
        for statistic in _LATENCY_STATISTICS
    },
    **dict.fromkeys(
        (
            *("duration", "request_throughput", "request_goodput", "output_throughput"),
            *("total_token_throughput", "mean_running", "mean_wait_ms", "slo_attainment"),
            *("total_gpu_energy", "average_gpu_power", "energy_per_output_token"),
            *("energy_per_request", "output_tokens_per_joule", "energy_idle_j", "energy_load_j"),
            *("mean_executed_layers", "agreement", "perplexity", "breach_rate"),
            *("breach_rate_observed", "mean_batch_size", "max_batch_size_supported"),
            *("weight_bytes_loaded", "mean_kv_use", "switch_time_s", "backlog_growth_per_s"),
            "drain_after_arrivals_s",
        ),
        ("number", True),
    ),
    "slo_passed": ("flag", True),
    "slo_limits": ("list", True),
    **dict.fromkeys(
        ("slo_attainment_by_metric", "depth_share", "regime", "time_shares"), ("numbers", True)
    ),
    "exit_histogram": ("tables", True),
    "intervals": ("tables", False),
}
"""The kind of each key that every summary has, and whether it may be null."""

_KIND_WORDS: Final[dict[Kind, str]] = {
    "text": "text",
    "whole": "a whole number",
    "number": "a finite number",
    "flag": "true or false",
    "list": "a list of limits, each an object with the text limit, the number or null percentile "
    "and passed, which is true, false or null",
    "numbers": "an object of numbers",
    "tables": "an object of objects of numbers",
    "wholes": "an object of lists of whole numbers",
    "object": "an object",
}

SCENARIO_FILE: Final = "scenario.toml"
SUMMARY_FILE: Final = "summary.json"
TOTALS_FILE: Final = "totals.json"
REPORT_FILE: Final = "report.html"
RUN_FILES: Final = (
    SCENARIO_FILE,
    SUMMARY_FILE,
    TOTALS_FILE,
    "requests.parquet",
    "decisions.parquet",
    "timeline.parquet",
    "itl.parquet",
)
"""Files every run has; the report is drawn from them and may be absent."""

TOKENIZERS: Final = "tokenizers"
"""A summary's key for the tokenizers of the models that served."""

MEASURED_FILES: Final = ("iterations.parquet", "tokens.parquet", "exits.parquet")
"""Files that only a run on a real backend has beside them."""

_IDENTITY: Final[dict[str, Kind]] = {
    "schema_version": "whole",
    "label": "text",
    "policy": "text",
    "objective": "text",
    "seed": "whole",
    "origin": "text",
    "closed_loop": "flag",
}
"""What names a run, and the kind of each."""
_ITL_COLUMNS_OF: Final = ("itl_bins_s", "itl_counts")
_UNMETERED: Final = ("energy_j", "energy_idle_j", "energy_load_j")
"""Totals that are null where no meter was there."""

_TOTALS_KINDS: Final[dict[Any, Kind]] = {
    float: "number",
    int: "whole",
    dict[str, float]: "numbers",
    dict[str, tuple[int, ...]]: "wholes",
}
"""The kind of a total in JSON by its type here."""


@dataclass(frozen=True)
class RunTotals:
    """What a run adds up to beside its request rows; all replicas summed unless named a mean.

    Energies are NaN where no meter was there: unavailable is not zero. `busy_s`, `idle_s` and
    `load_s` do not overlap: seconds in iterations, without work, and waiting for weights;
    `drain_s` and `evaluation_s` are seconds spent in those states, whatever else went on. Weight
    bytes are of one replica: the most at once, and the mean over time and replicas.
    `decode_rows` counts the running requests of every decode iteration; `batch_seconds`
    integrates the running requests over time. `max_batch_size_supported` counts requests of the
    workload's mean length that fit on one replica beside the weights, at the model and depth that
    served longest.

    `exit_counts` maps a model to its decoded tokens by exit level (see `exit_layers`), by the
    exit at which each token left; `depth_seconds` maps "model@depth" to seconds spent serving
    there; `regime_s` are busy seconds by the bound of the layer time. `itl_bins_s` are the
    edges of the pooled inter-token gaps' histogram (geometric bins about 1 % wide; one edge more
    than there are counts) and `itl_counts` its counts; the sums are exact.
    """

    end_s: float
    num_replicas: int
    num_gpus: int
    energy_j: float
    energy_idle_j: float
    energy_load_j: float
    busy_s: float
    idle_s: float
    load_s: float
    drain_s: float
    evaluation_s: float
    num_iterations: int
    num_decode_iterations: int
    decode_rows: int
    decode_s: float
    batch_seconds: float
    max_running: int
    max_batch_size_supported: float
    peak_weight_bytes: int
    mean_weight_bytes: float
    num_switches: int
    num_loads: int
    num_evaluations: int
    num_breach_events: int
    switch_time_s: float
    regime_s: dict[str, float]
    exit_layers: dict[str, tuple[int, ...]]
    exit_counts: dict[str, tuple[int, ...]]
    depth_seconds: dict[str, float]
    kv_block_tokens: int
    mean_kv_use: float
    itl_bins_s: tuple[float, ...]
    itl_counts: tuple[int, ...]
    itl_sum_s: float
    itl_sum_square_s2: float


@dataclass(frozen=True)
class RunData:
    """A finished run in memory: who ran, what was asked, what happened.

    `scenario` is the resolved scenario as plain data (TOML types), `environment` names versions
    and profile hashes. `closed_loop` says that arrivals depend on finishes, so that they differ
    between policies on the same workload.
    """

    label: str
    policy: str
    objective: str
    seed: int
    scenario: dict[str, Any]
    environment: dict[str, Any]
    requests: pl.DataFrame
    decisions: pl.DataFrame
    timeline: pl.DataFrame
    totals: RunTotals
    origin: str = "simulated"
    closed_loop: bool = False
    schema_version: int = SCHEMA_VERSION


def write_run(
    run: RunData,
    summary: Mapping[str, Any],
    out_dir: Path,
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a run's folder, whole or not at all; returns its path.

    Everything is written under a temporary name beside the target; `finish` may add the report
    there; then the folder is moved into place. A run that is already there is put aside first
    and removed after, or put back if the move fails; anything else there is refused, and so is a
    run that was served for real unless asked to `overwrite`. The same run gives the same bytes.
    """
    target = out_dir.resolve()
    check_target(target)
    if not overwrite:
        check_computed([target], "give another folder, or remove it by hand", target)
    with folder_in_place(target) as draft:
        _write_files(run, summary, draft)
        if finish is not None:
            finish(draft)
    return target


def check_target(out_dir: Path) -> None:
    """Raise `InputError` unless a run may be written here: nothing, an empty folder or a run."""
    check_writable(out_dir)
    if not out_dir.exists() and not out_dir.is_symlink():
        return
    if not out_dir.is_dir():
        raise InputError("It is a file; allowed is a new folder or a run to replace.", str(out_dir))
    present = sorted(entry.name for entry in out_dir.iterdir())
    allowed = {*RUN_FILES, *MEASURED_FILES, REPORT_FILE}
    foreign = [name for name in present if name not in allowed]
    if foreign or (present and TOTALS_FILE not in present):
        named = ", ".join((foreign or present)[:3])
        raise InputError(
            f"The folder is not a run: it holds {named}; allowed is a new folder, an empty one or "
            "a run to replace.",
            str(out_dir),
        )


def check_computed(folders: Sequence[Path], remedy: str, where: Path) -> None:
    """Raise `InputError` with a remedy where one of the folders is a run that was served for real.

    Served again it would take its time anew, and have other figures.
    """
    served = [str(folder) for folder in folders if _is_measured(folder / TOTALS_FILE)]
    if served:
        raise InputError(
            "It would replace what was served for real and cannot be computed again: "
            f"{', '.join(served)}; {remedy}.",
            str(where),
        )


def _is_measured(totals: Path) -> bool:
    """Whether a file holds the totals of a run that was served for real."""
    try:
        return _read_json(totals).get("origin") == MEASURED
    except InputError:
        return False


def _write_files(run: RunData, summary: Mapping[str, Any], folder: Path) -> None:
    totals = {
        name: value for name, value in asdict(run.totals).items() if name not in _ITL_COLUMNS_OF
    }
    identity = {name: getattr(run, name) for name in _IDENTITY}
    _write_json(
        {**identity, "environment": run.environment, "totals": totals},
        folder / TOTALS_FILE,
    )
    _write_json(summary, folder / SUMMARY_FILE)
    header = [
        f"# The resolved scenario of the run {run.label!r}; run again, it gives this run.",
        "# Files it names are relative to the folder of the original scenario.",
        f"# seed {run.seed}, policy {run.policy}, objective {run.objective}",
        *(f"# {name}: {text}" for name, text in flat_items(run.environment)),
    ]
    comments = [re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", " ", line) for line in header]
    (folder / SCENARIO_FILE).write_text(
        "\n".join(comments) + "\n\n" + toml_text(run.scenario),
        encoding="utf-8",
        newline="\n",
    )
    itl = pl.DataFrame(
        {
            "lower_s": run.totals.itl_bins_s[:-1],
            "upper_s": run.totals.itl_bins_s[1:],
            "count": run.totals.itl_counts,
        },
        schema={name: column.dtype for name, column in ITL_COLUMNS.items()},
    )
    for name, frame, columns in (
        ("requests", run.requests, REQUEST_COLUMNS),
        ("decisions", run.decisions, DECISION_COLUMNS),
        ("timeline", run.timeline, TIMELINE_COLUMNS),
        ("itl", itl, ITL_COLUMNS),
    ):
        write_table(
            conform(frame, columns, name),
            folder / f"{name}.parquet",
            compression="zstd",
            compression_level=3,
            statistics=True,
            row_group_size=1 << 18,
        )


def _write_json(data: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(_without_nan(data), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _without_nan(value: Any) -> Any:
    """The same data with NaN as None: JSON has no NaN."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return value


def flat_items(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as dotted names and text, in order."""
    items: list[tuple[str, str]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            items += flat_items(value, f"{name}.")
        elif isinstance(value, list | tuple):
            items.append((name, ", ".join(str(one) for one in value)))
        else:
            items.append((name, str(value)))
    return items


def read_run(path: Path) -> RunData:
    """Read a run's folder back; whatever is missing, foreign or broken is an `InputError`."""
    _check_folder(path)
    missing = [name for name in RUN_FILES if not (path / name).is_file()]
    if len(missing) == len(RUN_FILES):
        runs = sorted(one.parent.name for one in path.glob(f"*/{TOTALS_FILE}"))
        if runs:
            raise InputError(
                f"The folder holds runs and is none itself: {', '.join(runs)}. Name one of them, "
                f"such as {path / runs[0]}.",
                str(path),
            )
    if missing:
        raise InputError(
            f"The folder is not a whole run: {', '.join(missing)} is missing.",
            str(path),
        )
    facts = _read_json(path / TOTALS_FILE)
    where = str(path / TOTALS_FILE)
    version = facts.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(
            f"The run has schema version {json.dumps(version)}; this program reads "
            f"{SCHEMA_VERSION}.",
            where,
        )
    kinds: dict[str, Kind] = {**_IDENTITY, "environment": "object", "totals": "object"}
    absent = [name for name in kinds if name not in facts]
    if absent:
        raise InputError(f"The keys {', '.join(absent)} are missing.", where)
    for name, kind in kinds.items():
        _check_kind(name, facts[name], kind, False, where)
    requests = _read_table(path / "requests.parquet", REQUEST_COLUMNS)
    if requests.height == 0:
        raise InputError("The run is empty: it holds no request.", str(path / "requests.parquet"))
    itl = _read_table(path / "itl.parquet", ITL_COLUMNS)
    decisions = _read_table(path / "decisions.parquet", DECISION_COLUMNS)
    _check_snapshots(decisions, str(path / "decisions.parquet"))
    run = RunData(
        **{name: facts[name] for name in _IDENTITY},
        scenario=read_toml(path / SCENARIO_FILE),
        environment=facts["environment"],
        requests=requests,
        decisions=decisions,
        timeline=_read_table(path / "timeline.parquet", TIMELINE_COLUMNS),
        totals=_read_totals(facts["totals"], itl, where),
    )
    violations = run_violations(run)
    if violations:
        raise InputError(f"The run breaks its own laws: {' '.join(violations)}", str(path))
    return run


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a run's folder; one that lacks a key or mistypes a value is refused.

    Keys that `SUMMARY_KINDS` does not have are kept as they are.
    """
    _check_folder(path)
    if not (path / SUMMARY_FILE).is_file():
        raise InputError(f"The folder is not a run: {SUMMARY_FILE} is missing.", str(path))
    where = str(path / SUMMARY_FILE)
    summary = _read_json(path / SUMMARY_FILE)
    version = summary.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(
            f"The summary has schema version {json.dumps(version)}; this program reads "
            f"{SCHEMA_VERSION}.",
            where,
        )
    missing = [name for name in SUMMARY_KINDS if name not in summary]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"The keys {', '.join(missing[:5])}{more} are missing; a summary has all "
            f"{len(SUMMARY_KINDS)} keys that docs/metrics.md lists.",
            where,
        )
    for name, (kind, optional) in SUMMARY_KINDS.items():
        _check_kind(name, summary[name], kind, optional, where)
    if (summary["slo"] is None) != (summary["slo_limits"] is None):
        raise InputError(
            "One of slo and slo_limits is null; allowed are both null or neither.", where
        )
    return summary


def _check_folder(path: Path) -> None:
    if path.is_dir():
        return
    said = "It is a file" if path.exists() else "There is no such folder"
    raise InputError(f"{said}; allowed is the folder of a run.", str(path))


def _check_kind(name: str, value: Any, kind: Kind, optional: bool, where: str) -> None:
    """Raise `InputError` unless a value out of JSON is of a kind, or null where that may be."""
    if not (optional if value is None else _is_of_kind(value, kind)):
        raise InputError(
            f"The value of {name} is {shown(value)}; allowed is {_KIND_WORDS[kind]}"
            f"{', or null' if optional else ''}.",
            where,
        )


def _is_of_kind(value: Any, kind: Kind) -> bool:
    """Whether a value out of JSON, not null, is of a kind; inner objects may be null."""
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    if kind in ("whole", "number"):
        allowed = int if kind == "whole" else int | float
        number = isinstance(value, allowed) and not isinstance(value, bool)
        # The bound leaves out NaN, infinities and whole numbers that no float holds.
        return number and abs(value) <= sys.float_info.max
    if kind == "list":
        return isinstance(value, list) and all(_is_limit(one) for one in value)
    if not isinstance(value, dict):
        return False
    if kind == "object":
        return True
    if kind == "wholes":
        return all(
            isinstance(one, list) and all(_is_of_kind(each, "whole") for each in one)
            for one in value.values()
        )
    if kind == "numbers":
        return all(_is_of_kind(one, "number") for one in value.values())
    return all(one is None or _is_of_kind(one, "numbers") for one in value.values())


def _is_limit(value: Any) -> bool:
    """Whether a value is a limit of an SLO with its verdict, as a report shows it."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("limit"), str)
        and (value.get("percentile") is None or _is_of_kind(value["percentile"], "number"))
        and "passed" in value
        and (value["passed"] is None or isinstance(value["passed"], bool))
    )


def _check_snapshots(decisions: pl.DataFrame, where: str) -> None:
    """Raise `InputError` unless every decision's snapshot is a JSON object."""
    for row, text in enumerate(decisions["snapshot"]):
        try:
            sound = text is not None and isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise InputError(
                f"The snapshot of row {row} (from 0) is {shown(text)}; allowed is a JSON object.",
                where,
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The file is not JSON: {error}", str(path)) from None
    if not isinstance(data, dict):
        raise InputError("The file holds no JSON object.", str(path))
    return data


def _read_table(path: Path, columns: Mapping[str, Column]) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
    except (PolarsError, OSError) as error:
        raise InputError(
            f"The file is not a Parquet table: {first_line(error)}.", str(path)
        ) from None
    for name, (dtype, _) in columns.items():
        if name in frame.columns and frame.schema[name] != dtype:
            raise InputError(
                f"The column {name} is of type {frame.schema[name]}; needed is {dtype}.",
                str(path),
            )
    return conform(frame, columns, str(path))


def _read_totals(data: dict[str, Any], itl: pl.DataFrame, where: str) -> RunTotals:
    """The totals with their tuples, and NaN again where an energy was not measured."""
    names = [one.name for one in fields(RunTotals) if one.name not in _ITL_COLUMNS_OF]
    missing = [name for name in names if name not in data]
    unknown = [name for name in data if name not in names]
    if missing or unknown:
        said = f"lack {', '.join(missing)}" if missing else f"hold unknown {', '.join(unknown)}"
        raise InputError(f"The totals {said}.", where)
    values: dict[str, Any] = {}
    types = get_type_hints(RunTotals)
    for name in names:
        value = data[name]
        kind = _TOTALS_KINDS[types[name]]
        _check_kind(name, value, kind, name in _UNMETERED, where)
        if kind == "number":
            value = math.nan if value is None else float(value)
        elif kind == "wholes":
            value = {key: tuple(one) for key, one in value.items()}
        values[name] = value
    for model, counts in values["exit_counts"].items():
        if len(values["exit_layers"].get(model, ())) != len(counts):
            raise InputError(
                f"The exit_counts of {model!r} are {len(counts)}; needed is one for each of its "
                "exit_layers.",
                where,
            )
    upper = itl["upper_s"].to_numpy()
    lower = itl["lower_s"].to_numpy()
    if not np.array_equal(lower[1:], upper[:-1]):
        raise InputError("The bins of itl.parquet do not follow one another.", where)
    edges = (*lower[:1].tolist(), *upper.tolist())
    return RunTotals(**values, itl_bins_s=edges, itl_counts=tuple(itl["count"].to_list()))


def conformed(run: RunData) -> RunData:
    """The run with every table in the schema's types, as reading it back gives it."""
    return replace(
        run,
        requests=conform(run.requests, REQUEST_COLUMNS, "requests"),
        decisions=conform(run.decisions, DECISION_COLUMNS, "decisions"),
        timeline=conform(run.timeline, TIMELINE_COLUMNS, "timeline"),
    )
