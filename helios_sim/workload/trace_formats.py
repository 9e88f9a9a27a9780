"""The kinds of trace files that are known, and how each is told and read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from helios_sim.errors import InputError
from helios_sim.workload.trace import (
    FORMATS,
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    Trace,
    TraceColumns,
    TraceSettings,
)
from helios_sim.workload.trace_flaws import Flaw
from helios_sim.workload.trace_rows import TraceRows
from helios_sim.workload.trace_tables import (
    LINE,
    Column,
    as_csv,
    calendar_s,
    count_column,
    csv_table,
    first_bad,
    header_of,
    is_calendar,
    json_number,
    name_column,
    parquet_table,
    plain_s,
    readable,
)

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")

# What a Parquet column must hold: "whole numbers", "numbers" or "text".
_HELIOS = {
    "request_id": "whole numbers",
    "arrival_s": "numbers",
    "prompt_tokens": "whole numbers",
    "output_tokens": "whole numbers",
    "domain": "text",
    "trace_start": "whole numbers",
}


def recognise(path: Path, settings: TraceSettings) -> tuple[str, bytes]:
    """The format by content, checked against the one asked for, with a text file's bytes."""
    asked = "csv" if settings.columns else settings.format
    raw = _content(path)
    if raw[:4] != b"PAR1":
        found = _text_format(raw, asked)
    elif settings.columns is not None:
        return "csv", as_csv(path, settings.columns)
    else:
        found = _parquet_format(path)
    if found and asked in ("auto", found):
        return found, raw
    allowed = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
    if asked == "auto":
        raise InputError(f"The trace's format is unknown; allowed are: {allowed}.", str(path))
    seen = f"looks like {found}" if found else "is of no known format"
    raise InputError(
        f"The trace was named {asked} ({FORMATS[asked]}) but its content {seen}; "
        f"allowed are: {allowed}.",
        where=str(path),
    )


def _content(path: Path) -> bytes:
    """The bytes of a file that holds something: unpacked, without a byte order mark."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"The file cannot be read ({error.strerror}).", str(path)) from error
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"The file is not whole gzip data ({error}); compress it again.", where=str(path)
            ) from error
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise InputError("The trace file is empty; it must hold at least one request.", str(path))
    # Lines may end with a carriage return alone.
    return raw if b"\n" in raw else raw.replace(b"\r", b"\n")


def _text_format(raw: bytes, asked: str) -> str:
    """The format that a text looks like, empty where it is none; any table may be a CSV."""
    head, names = header_of(raw[:4096])
    if head.startswith("{"):
        return "mooncake"
    if asked == "csv":
        return "csv"
    if "ContextTokens" in names:
        return "azure"
    return "burstgpt" if "Request tokens" in names else ""


def _parquet_format(path: Path) -> str:
    """The format that the columns of a Parquet file are of; others have to be named."""
    columns = set(parquet_table(path, {}).columns)
    if "rate_rps" in columns:
        return "servegen"
    if "arrival_s" in columns:
        return "helios"
    raise InputError(
        "This is a Parquet file that is neither of ServeGen nor of a run; its columns are "
        f"{', '.join(sorted(columns))}. Name those of arrivals, prompt and output in "
        "trace.columns.",
        where=str(path),
    )


def azure(raw: bytes, path: Path) -> TraceRows:
    """Azure LLM inference traces of 2023 and 2024: calendar times of up to 100 ns."""
    frame = csv_table(raw, path, _AZURE)
    return _rows(frame, calendar_s(frame, "TIMESTAMP", path), _AZURE)


def any_csv(columns: TraceColumns) -> Callable[[bytes, Path], TraceRows]:
    """The reader of a CSV with columns of these names; its first row tells how time is given."""

    def read(raw: bytes, path: Path) -> TraceRows:
        frame = csv_table(raw, path, columns.names)
        name = columns.arrival
        if is_calendar(frame[name]):
            time_s = calendar_s(frame, name, path)
        else:
            expected = "seconds of at least 0, or of times such as 2023-11-16 18:15:46.680"
            time_s = plain_s(frame, name, expected)
        return _answered(_rows(frame, time_s, columns.names))

    return read


def _burstgpt(raw: bytes, path: Path) -> TraceRows:
    """BurstGPT: seconds; rows answered with no token are failures and are left out."""
    frame = csv_table(raw, path, _BURSTGPT)
    expected = "finite numbers of seconds of at least 0"
    return _answered(_rows(frame, plain_s(frame, "Timestamp", expected), _BURSTGPT))


def _rows(frame: pl.DataFrame, time_s: Column, names: Sequence[str]) -> TraceRows:
    """The rows that can be read, and what is wrong with the others.

    The names are those of arrival, prompt and output, and of the domain where a column tells it.
    """
    prompt = count_column(frame, "prompt", names[1])
    output = count_column(frame, "output", names[2])
    domains = [name_column(frame, "domain", name) for name in names[3:]]
    good, flaws = readable(frame, (time_s, prompt, output, *domains))
    return TraceRows(
        time_s=time_s.values.filter(good).to_numpy(),
        prompt_tokens=prompt.values.filter(good).to_numpy(),
        output_tokens=output.values.filter(good).to_numpy(),
        line=frame[LINE].filter(good).to_numpy(),
        domain=domains[0].values.filter(good) if domains else None,
        flaws=tuple(flaws),
    )


def _answered(rows: TraceRows) -> TraceRows:
    """The rows that were answered with a token or more; the others are counted."""
    kept = rows.output_tokens != 0
    return replace(rows.take(kept), num_dropped=int((~kept).sum()))


def _mooncake(raw: bytes, path: Path) -> TraceRows:
    """Mooncake: JSON lines with milliseconds; other keys (prefix blocks) are not used."""
    times: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    lines: list[int] = []
    flaws: list[Flaw] = []
    for number, text in enumerate(raw.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            time_s = json_number(row, "timestamp", (int, float), path, number) / 1000
            prompt = int(json_number(row, "input_length", (int,), path, number))
            output = int(json_number(row, "output_length", (int,), path, number))
        except InputError as error:
            flaws.append(Flaw("unreadable line", np.array([number]), error.message))
            continue
        except (ValueError, RecursionError):
            said = (
                f"The line {text[:80].decode('utf-8', errors='replace')!r} is no JSON object; "
                f"the file must hold {FORMATS['mooncake']}."
            )
            flaws.append(Flaw("unreadable line", np.array([number]), said))
            continue
        times.append(time_s)
        prompts.append(prompt)
        outputs.append(output)
        lines.append(number)
    return TraceRows(
        time_s=np.array(times, dtype=np.float64),
        prompt_tokens=np.array(prompts, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        line=np.array(lines, dtype=np.int64),
        flaws=tuple(flaws),
    )


TEXT_READERS: dict[str, Callable[[bytes, Path], TraceRows]] = {
    "azure": azure,
    "burstgpt": _burstgpt,
    "mooncake": _mooncake,
}


def read_helios(path: Path) -> Trace:
    """A run's own requests, exactly as they arrived; rows that never arrived are left out."""
    frame = parquet_table(path, _HELIOS)
    arrived = frame.filter(pl.col("arrival_s").is_not_null()).sort("arrival_s", "request_id")
    if not arrived.height:
        raise InputError("The run holds no request; one at least is needed.", str(path))
    in_range = (
        pl.col("arrival_s").is_between(0, MAX_ARRIVAL_S)
        & pl.col("prompt_tokens").is_between(1, MAX_TOKENS)
        & pl.col("output_tokens").is_between(1, MAX_TOKENS)
        & pl.col("trace_start").is_between(0, MAX_TOKENS)
        & pl.col("domain").is_not_null()
    )
    bad = first_bad(arrived, in_range)
    names = arrived["domain"].cast(pl.String)
    if bad is not None:
        raise InputError(
            f"The request is {arrived.row(bad, named=True)}; its arrival must be 0 to "
            f"{MAX_ARRIVAL_S:g} s, its trace start 0 to {MAX_TOKENS}, its token counts 1 to "
            f"{MAX_TOKENS} and its domain a name.",
            where=f"{path}, request_id {arrived['request_id'][bad]}",
        )
    domains = tuple(names.unique(maintain_order=True).to_list())
    index = names.replace_strict({name: i for i, name in enumerate(domains)}, return_dtype=pl.Int16)
    return Trace(
        format="helios",
        file=path,
        arrival_s=arrived["arrival_s"].cast(pl.Float64).to_numpy(writable=True),
        prompt_tokens=arrived["prompt_tokens"].cast(pl.Int32).to_numpy(writable=True),
        output_tokens=arrived["output_tokens"].cast(pl.Int32).to_numpy(writable=True),
        domain=index.to_numpy(writable=True),
        domains=domains,
        trace_start=arrived["trace_start"].cast(pl.Int32).to_numpy(writable=True),
        num_dropped=frame.height - arrived.height,
    )
