"""Read workload traces: Mooncake, Azure, BurstGPT, ServeGen, any table, and our own runs."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from helios_sim.arrivals import MAX_RATE_PER_S, MAX_REQUESTS, Renewal
from helios_sim.errors import InputError, did_you_mean
from helios_sim.settings import StrictSettings
from helios_sim.streams import Floats, stream, whole_ns

FORMATS: dict[str, str] = {
    "mooncake": "JSON lines with timestamp (ms), input_length and output_length",
    "azure": "CSV with TIMESTAMP (a calendar time), ContextTokens and GeneratedTokens",
    "burstgpt": "CSV with Timestamp (seconds), Request tokens and Response tokens",
    "csv": "any CSV or Parquet file, whose columns trace.columns names",
    "servegen": "two Parquet files, NAME_trace.parquet and NAME_dataset.parquet",
    "helios": "requests.parquet of a run, or the run's folder",
}

MAX_TOKENS = 2**31 - 1
"""Tokens of one prompt or output: what a 32-bit column holds."""

MAX_ARRIVAL_S = 1e9
"""The latest arrival of a trace, some 32 years; beyond, a double no longer holds microseconds."""

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
_SERVEGEN_TRACE = {
    "client_id": "whole numbers",
    "window_start_s": "whole numbers",
    "rate_rps": "numbers",
    "pattern": "text",
    "arg1": "numbers",
}
_SERVEGEN_DATASET = {
    "client_id": "whole numbers",
    "window_start_s": "whole numbers",
    "field": "text",
    "value": "numbers",
    "prob": "numbers",
}

# Shapes of coefficients of variation of about 50 down to 0.01, as for other arrivals: beyond,
# nearly all intervals are 0 and sampling does not end.
_GAMMA_SHAPES = (4e-4, 1e4)
_WEIBULL_SHAPES = (0.15, 130.0)

Ints = NDArray[np.int64]


ColumnName = Annotated[str, Field(min_length=1)]


class TraceColumns(StrictSettings):
    """How the header of a CSV, or of a Parquet file, calls what a trace holds."""

    arrival: ColumnName
    prompt: ColumnName
    output: ColumnName

    @property
    def names(self) -> tuple[str, str, str]:
        """The three names."""
        return self.arrival, self.prompt, self.output


class TraceSettings(StrictSettings):
    """Which trace, which part of it, and how it is stretched."""

    file: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "mooncake", "azure", "burstgpt", "csv", "servegen", "helios"] = "auto"
    columns: TraceColumns | None = None
    start_s: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    end_s: Annotated[float | None, Field(gt=0, le=1e9)] = None
    rate_scale: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    repeat: Annotated[int, Field(ge=1, le=100_000)] = 1
    max_requests: Annotated[int | None, Field(ge=1, le=MAX_REQUESTS)] = None
    sort: bool = False
    spread: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ValueError(
                f"The trace window ends at {self.end_s:g} s but starts at {self.start_s:g} s; "
                "end_s must be greater than start_s."
            )
        if self.columns is None and self.format == "csv":
            raise ValueError(
                "A trace of format csv needs columns = { arrival = ..., prompt = ..., output = ... "
                "}, the names that its header gives to them."
            )
        if self.columns is not None:
            if self.format not in ("auto", "csv"):
                raise ValueError(
                    f"columns are given for a trace of format {self.format}, which has names of "
                    "its own; leave them out, or set format = 'csv'."
                )
            if len(set(self.columns.names)) < 3:
                raise ValueError(
                    f"columns names {', '.join(map(repr, self.columns.names))}; arrival, prompt "
                    "and output must be three columns."
                )
        return self


@dataclass(frozen=True)
class Trace:
    """The requests of a trace, sorted by arrival.

    `domain` (an index into `domains`) and `trace_start` are there only for a run of our own;
    `num_dropped` counts rows of the file that are no requests (an answer of no tokens).
    `latest` is the last time that a file of plain numbers gives, before its first is taken for 0.
    """

    format: str
    file: Path
    arrival_s: Floats
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    domain: NDArray[np.int16] | None = None
    domains: tuple[str, ...] = ()
    trace_start: NDArray[np.int32] | None = None
    num_dropped: int = 0
    latest: float = 0.0

    def __len__(self) -> int:
        return len(self.arrival_s)

    def take(self, rows: Ints | slice, arrival_s: Floats) -> Trace:
        """These rows, arriving at these times."""
        return replace(
            self,
            arrival_s=arrival_s,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            domain=None if self.domain is None else self.domain[rows],
            trace_start=None if self.trace_start is None else self.trace_start[rows],
        )


@dataclass(frozen=True)
class _Rows:
    """What a reader found: one row a request, in the order and with the lines of the file."""

    time_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    line: Ints
    num_dropped: int = 0


def read_trace(settings: TraceSettings, base_dir: Path, seed: int) -> Trace:
    """The trace's requests after window, rate scale, repetition and cut.

    A relative path is looked up from `base_dir`. Times count from the trace's first request (from
    the start of a run or of a day for formats that have one), then from `start_s`. The seed
    matters to ServeGen alone, whose file holds distributions instead of requests.
    """
    path = _locate(base_dir / settings.file)
    name, raw = _recognise(path, settings)
    if name in ("helios", "servegen"):
        try:
            trace = _read_helios(path) if name == "helios" else _read_servegen(path, settings, seed)
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"The columns cannot be read ({_first_line(error)}).", str(path)
            ) from error
    else:
        read = _any_csv(settings.columns) if settings.columns else _TEXT_READERS[name]
        trace = _trace_of(name, path, read(raw, path), settings)
    return _stretch(_cut(trace, settings), settings)


def is_drawn(settings: TraceSettings, base_dir: Path) -> bool:
    """Whether the file holds distributions, so that every seed brings requests of its own."""
    path = _locate(base_dir / settings.file)
    return _recognise(path, settings)[0] == "servegen"


_EPOCHS: Final = (
    (1e17, "nanoseconds", 1e9),
    (1e14, "microseconds", 1e6),
    (1e11, "milliseconds", 1e3),
)
"""From what number on a time since 1970 is of which unit, and how many of it are a second.

As seconds the least of them is 3,000 years, and now is 2e9.
"""


def doubtful_times(settings: TraceSettings, base_dir: Path) -> str | None:
    """That times read as seconds look like those of a smaller unit since 1970; None otherwise."""
    path = _locate(base_dir / settings.file)
    name, _ = _recognise(path, settings)
    if name not in ("csv", "burstgpt"):
        return None
    latest = read_trace(settings, base_dir, 0).latest
    unit, per_s = next((found[1:] for found in _EPOCHS if latest >= found[0]), ("", 1.0))
    if not unit or settings.rate_scale >= per_s / 10:
        return None
    scaled = f"or set rate_scale = {per_s:.0f}" if per_s <= 1e6 else "and write the file anew"
    return (
        f"The trace's times look like {unit} since 1970 and are read as seconds: the last is "
        f"{latest:,.0f}. Divide them by {per_s:,.0f}, {scaled}."
    )


def _locate(path: Path) -> Path:
    """The file to read: of a folder, a run's requests or the one ServeGen trace."""
    if path.is_dir():
        if (path / "requests.parquet").is_file():
            return path / "requests.parquet"
        found = sorted(path.glob("*_trace.parquet"))
        if len(found) == 1:
            return found[0]
        raise InputError(
            f"The trace is a folder with {len(found)} files *_trace.parquet and no "
            "requests.parquet; name one file, a run's folder or a folder with one ServeGen trace.",
            where=str(path),
        )
    if not path.is_file():
        raise InputError(
            "The trace file does not exist; give an absolute path or one relative to the "
            "scenario's folder.",
            where=str(path),
        )
    return path


def _recognise(path: Path, settings: TraceSettings) -> tuple[str, bytes]:
    """The format by content, checked against the one asked for, with a text file's bytes."""
    asked = "csv" if settings.columns else settings.format
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
    if raw[:4] == b"PAR1" and settings.columns is not None:
        return "csv", _as_csv(path, settings.columns)
    if raw[:4] == b"PAR1":
        columns = set(_parquet(path, {}).columns)
        if "rate_rps" in columns:
            found = "servegen"
        elif "arrival_s" in columns:
            found = "helios"
        else:
            found = ""
    else:
        head, names = _header(raw[:4096])
        if asked == "csv" and not head.startswith("{"):
            found = "csv"
        elif head.startswith("{"):
            found = "mooncake"
        elif "ContextTokens" in names:
            found = "azure"
        elif "Request tokens" in names:
            found = "burstgpt"
        else:
            found = ""
    if asked in ("auto", found) and found:
        return found, raw
    if raw[:4] == b"PAR1" and not found:
        raise InputError(
            "This is a Parquet file that is neither of ServeGen nor of a run; its columns are "
            f"{', '.join(sorted(columns))}. Name those of arrivals, prompt and output in "
            "trace.columns.",
            where=str(path),
        )
    allowed = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
    if asked == "auto":
        raise InputError(f"The trace's format is unknown; allowed are: {allowed}.", str(path))
    seen = f"looks like {found}" if found else "is of no known format"
    raise InputError(
        f"The trace was named {asked} ({FORMATS[asked]}) but its content {seen}; "
        f"allowed are: {allowed}.",
        where=str(path),
    )


def _at(path: Path, line: int) -> str:
    return f"{path}, line {line}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _header(raw: bytes) -> tuple[str, list[str]]:
    """The first line that is not blank, and the names it gives to columns."""
    head = raw.lstrip().decode("utf-8", errors="replace").splitlines()[0]
    return head, [name.strip().strip('"') for name in head.split(",")]


def _csv(raw: bytes, path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """The named columns as text with a column "line"; blank lines are left out."""
    try:
        frame = pl.read_csv(io.BytesIO(raw), infer_schema=False)
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise _ragged(raw, path, columns, error) from error
    names = [name.strip() for name in frame.columns]
    missing = [name for name in columns if name not in names]
    if missing:
        raise _without(missing, raw, path, columns)
    # Polars gives the second of two columns of one name another name.
    _, given = _header(raw)
    twice = [name for name in columns if given.count(name) > 1]
    if twice:
        raise InputError(
            f"The header names {', '.join(twice)} twice; it must name each of "
            f"{', '.join(columns)} once.",
            where=_at(path, 1),
        )
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    if blank.any():
        # A line of commas alone is such a row too, but no blank line.
        for number, text in enumerate(raw.splitlines(), 1):
            if b"," in text and not text.strip(b', \t"'):
                raise _malformed(text.decode(), len(frame.columns), path, number)
    # The header is line 1, so row 0 is line 2; polars keeps a blank line as a row of nulls.
    wanted = pl.DataFrame([frame.to_series(names.index(name)).alias(name) for name in columns])
    wanted = wanted.with_row_index("line", offset=2).with_columns(pl.col("line").cast(pl.Int64))
    return wanted.filter(~blank)


def _without(
    missing: Sequence[str], raw: bytes, path: Path, columns: tuple[str, ...]
) -> InputError:
    """That the header lacks names, what it has instead, and what the mistake may be."""
    head, given = _header(raw)
    where = _at(path, 1)
    wanted = f"it must name {', '.join(columns)}"
    separator = next((one for one in ";\t|" if one in head), "")
    if len(given) == 1 and separator:
        return InputError(
            f"The header {head[:80]!r} is one column, since {separator!r} stands where commas are "
            f"expected; {wanted}, with commas between them.",
            where,
        )
    by_case = {name.casefold(): name for name in given}
    alike = [by_case[name.casefold()] for name in missing if name.casefold() in by_case]
    hint = did_you_mean(missing[0], [name for name in given if name not in columns])
    if alike:
        hint = f" Did you mean {', '.join(map(repr, alike))}? Upper and lower case differ."
    shown = given if len(given) <= 12 else [*given[:12], f"{len(given) - 12} more"]
    return InputError(
        f"The header names {', '.join(shown)[:400]}, and lacks {', '.join(missing)}; {wanted}."
        f"{hint}",
        where,
    )


def _malformed(line: str, width: int, path: Path, number: int) -> InputError:
    return InputError(
        f"The line {line[:80]!r} is malformed; {width} comma-separated fields of plain "
        "text are expected, as in the header.",
        where=_at(path, number),
    )


def _ragged(raw: bytes, path: Path, columns: tuple[str, ...], error: Exception) -> InputError:
    """What is wrong with a CSV that cannot be read, with its line.

    A byte that is no UTF-8, a header that is one column, or the first line whose number of fields
    differs from the header's.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as wrong:
        number = raw.count(b"\n", 0, wrong.start) + 1
        return InputError(
            f"The line holds the byte 0x{raw[wrong.start]:02x}, which is no UTF-8; the file must "
            "be text in UTF-8.",
            where=_at(path, number),
        )
    if len(_header(raw)[1]) == 1:
        return _without(columns, raw, path, columns)
    lines = text.splitlines()
    width = lines[0].count(",") + 1
    for number, line in enumerate(lines, 1):
        if '"' in line or (line.strip() and line.count(",") + 1 != width):
            return _malformed(line, width, path, number)
    return InputError(f"The file is not readable as CSV: {_first_line(error)}.", where=str(path))


def _column(
    frame: pl.DataFrame, name: str, parsed: pl.Series, expected: str, path: Path
) -> pl.Series:
    """`parsed`, or an error at the first line whose text could not be parsed."""
    bad = parsed.is_null().arg_true()
    if len(bad):
        row = int(bad[0])
        text = frame[name][row]
        said = f"{text!r}" if text and text.strip() else "an empty cell"
        raise InputError(
            f"{name} is {said}; the column must hold {expected}.",
            where=_at(path, int(frame["line"][row])),
        )
    return parsed


def _count_column(frame: pl.DataFrame, name: str, path: Path) -> Ints:
    parsed = frame[name].str.strip_chars().cast(pl.Int64, strict=False)
    return _column(frame, name, parsed, "whole numbers of tokens", path).to_numpy()


def _azure(raw: bytes, path: Path) -> _Rows:
    """Azure LLM inference traces of 2023 and 2024: naive or UTC timestamps of up to 100 ns."""
    frame = _csv(raw, path, _AZURE)
    text = frame["TIMESTAMP"].str.strip_chars().str.strip_suffix("+00:00")
    return _Rows(
        time_s=_calendar_s(frame, "TIMESTAMP", text, "times such as", path),
        prompt_tokens=_count_column(frame, "ContextTokens", path),
        output_tokens=_count_column(frame, "GeneratedTokens", path),
        line=frame["line"].to_numpy(),
    )


def _calendar_s(
    frame: pl.DataFrame, name: str, text: pl.Series, expected: str, path: Path
) -> Floats:
    """Seconds from the first of the times, which are naive or UTC."""
    stamp = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    stamp = _column(frame, name, stamp, f"{expected} 2023-11-16 18:15:46.680", path)
    ns = stamp.to_physical().to_numpy()
    # Differences are taken in whole nanoseconds: seconds since 1970 would lose digits.
    seconds: Floats = (ns - (ns.min() if ns.size else 0)) / 1e9
    return seconds


def _plain_s(frame: pl.DataFrame, name: str, expected: str, path: Path) -> Floats:
    """Times given as numbers of seconds."""
    seconds = frame[name].str.strip_chars().cast(pl.Float64, strict=False)
    seconds = seconds.set(~(seconds.is_finite() & (seconds >= 0)).fill_null(False), None)
    return _column(frame, name, seconds, expected, path).to_numpy()


def _any_csv(columns: TraceColumns) -> Callable[[bytes, Path], _Rows]:
    """The reader of a CSV with columns of these names; its first row tells how time is given."""

    def read(raw: bytes, path: Path) -> _Rows:
        frame = _csv(raw, path, columns.names)
        name = columns.arrival
        text = frame[name].str.strip_chars()
        is_calendar = len(text) > 0 and "-" in (text[0] or "")[1:] and ":" in (text[0] or "")
        if is_calendar:
            text = text.str.strip_suffix("Z").str.strip_suffix("+00:00").str.replace("T", " ")
            time_s = _calendar_s(frame, name, text, "naive or UTC times such as", path)
        else:
            expected = "seconds of at least 0, or of times such as 2023-11-16 18:15:46.680"
            time_s = _plain_s(frame, name, expected, path)
        return _answered(frame, time_s, columns.names, path)

    return read


def _burstgpt(raw: bytes, path: Path) -> _Rows:
    """BurstGPT: seconds; rows answered with no token are failures and are left out."""
    frame = _csv(raw, path, _BURSTGPT)
    expected = "finite numbers of seconds of at least 0"
    return _answered(frame, _plain_s(frame, "Timestamp", expected, path), _BURSTGPT, path)


def _answered(
    frame: pl.DataFrame, time_s: Floats, names: tuple[str, str, str], path: Path
) -> _Rows:
    """The rows that were answered with a token or more; the others are counted."""
    prompt = _count_column(frame, names[1], path)
    output = _count_column(frame, names[2], path)
    kept = output != 0
    line = frame["line"].to_numpy()
    dropped = int((~kept).sum())
    return _Rows(time_s[kept], prompt[kept], output[kept], line[kept], dropped)


def _mooncake(raw: bytes, path: Path) -> _Rows:
    """Mooncake: JSON lines with milliseconds; other keys (prefix blocks) are not used."""
    times: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    lines: list[int] = []
    for number, text in enumerate(raw.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"The line {text[:80].decode('utf-8', errors='replace')!r} is no JSON object; "
                f"the file must hold {FORMATS['mooncake']}.",
                where=_at(path, number),
            ) from error
        times.append(_json_number(row, "timestamp", (int, float), path, number) / 1000)
        prompts.append(int(_json_number(row, "input_length", (int,), path, number)))
        outputs.append(int(_json_number(row, "output_length", (int,), path, number)))
        lines.append(number)
    return _Rows(np.array(times), np.array(prompts), np.array(outputs), np.array(lines))


def _json_number(row: Any, key: str, types: tuple[type, ...], path: Path, line: int) -> int | float:
    value: Any = row.get(key) if isinstance(row, dict) else None
    # The bound also shuts out infinities and NaN.
    if type(value) in types and abs(value) < 2**53:
        number: int | float = value
        return number
    what = "a whole number" if types == (int,) else "a finite number"
    raise InputError(f"{key} is {value!r}; it must be {what}.", where=_at(path, line))


_TEXT_READERS: dict[str, Callable[[bytes, Path], _Rows]] = {
    "azure": _azure,
    "burstgpt": _burstgpt,
    "mooncake": _mooncake,
}


def _trace_of(name: str, path: Path, rows: _Rows, settings: TraceSettings) -> Trace:
    """Check a text trace's rows and bring them in order, from 0 s on."""
    if not len(rows.time_s):
        dropped = f" ({rows.num_dropped} rows have no output)" if rows.num_dropped else ""
        raise InputError(f"The trace holds no request{dropped}; one at least is needed.", str(path))
    for what, tokens in (("prompt", rows.prompt_tokens), ("output", rows.output_tokens)):
        bad = np.flatnonzero((tokens < 1) | (tokens > MAX_TOKENS))
        if bad.size:
            raise InputError(
                f"The request has {tokens[bad[0]]} {what} tokens; allowed are 1 to {MAX_TOKENS}.",
                where=_at(path, int(rows.line[bad[0]])),
            )
    time_s = rows.time_s
    order = np.argsort(time_s, kind="stable")
    back = np.flatnonzero(np.diff(time_s) < 0)
    if back.size and not settings.sort:
        raise InputError(
            f"The timestamp lies {time_s[back[0]] - time_s[back[0] + 1]:g} s before the one of the "
            "request above it; a trace must be sorted by time: set sort = true to sort it.",
            where=_at(path, int(rows.line[back[0] + 1])),
        )
    time_s = time_s[order] - time_s[order[0]]
    if time_s[-1] > MAX_ARRIVAL_S * max(1.0, settings.rate_scale):
        raise InputError(
            f"The request lies {time_s[-1]:g} s after the first; arrivals of up to "
            f"{MAX_ARRIVAL_S:g} s, after division by rate_scale = {settings.rate_scale:g}, "
            "are allowed.",
            where=_at(path, int(rows.line[order[-1]])),
        )
    if settings.spread or (settings.spread is None and name == "mooncake"):
        time_s = spread_equal(time_s)
    return Trace(
        format=name,
        file=path,
        arrival_s=whole_ns(time_s),
        prompt_tokens=rows.prompt_tokens[order].astype(np.int32),
        output_tokens=rows.output_tokens[order].astype(np.int32),
        num_dropped=rows.num_dropped,
        latest=float(rows.time_s.max()),
    )


def spread_equal(time_s: Floats) -> Floats:
    """Spread each run of equal times evenly up to the next distinct one.

    The last run takes the width of the one before; a trace of one time only stays as it is.
    """
    distinct, first, count = np.unique(time_s, return_index=True, return_counts=True)
    if distinct.size < 2:
        return time_s
    widths = np.diff(distinct)
    widths = np.append(widths, widths[-1])
    place = np.arange(time_s.size) - np.repeat(first, count)
    spread: Floats = time_s + place * np.repeat(widths / count, count)
    return spread


def _parquet(path: Path, columns: dict[str, str]) -> pl.DataFrame:
    """The named columns of a Parquet file, of these types; without names, its header alone."""
    try:
        present = pl.read_parquet_schema(path)
        missing = [name for name in columns if name not in present]
        if missing:
            raise InputError(
                f"The file lacks the columns {', '.join(missing)}; it must hold "
                f"{', '.join(columns)}.",
                where=str(path),
            )
        for name, expected in columns.items():
            if not _holds(present[name], expected):
                raise InputError(
                    f"The column {name} has the type {present[name]}; it must hold {expected}.",
                    where=f"{path}, column {name}",
                )
        if not columns:
            return pl.DataFrame(schema=present)
        return pl.read_parquet(path, columns=list(columns))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"The file is not whole Parquet data ({_first_line(error)}).", str(path)
        ) from error


def _as_csv(path: Path, columns: TraceColumns) -> bytes:
    """The named columns of a Parquet file as the CSV of the same table: one reader judges both."""
    header = _parquet(path, {})
    if missing := [name for name in columns.names if name not in header.columns]:
        raise _without(missing, header.write_csv().encode(), path, columns.names)
    zoned = [n for n in columns.names if getattr(header.schema[n], "time_zone", None)]
    try:
        frame = pl.read_parquet(path, columns=list(columns.names))
        frame = frame.with_columns(pl.col(zoned).dt.convert_time_zone("UTC"))
        return frame.write_csv(datetime_format="%Y-%m-%d %H:%M:%S%.f").encode()
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"The columns cannot be read ({_first_line(error)}).", str(path)
        ) from error


def _holds(dtype: pl.DataType, expected: str) -> bool:
    """Whether a column holds what is expected; one of nulls alone passes, its rows do not."""
    if dtype == pl.Null:
        return True
    if expected == "text":
        return isinstance(dtype, pl.String | pl.Categorical | pl.Enum)
    return dtype.is_integer() if expected == "whole numbers" else dtype.is_numeric()


def _first_bad(frame: pl.DataFrame, good: pl.Expr) -> int | None:
    """The first row where `good` does not hold; a null is not good."""
    bad = frame.select((~good).fill_null(True)).to_series().arg_true()
    return int(bad[0]) if len(bad) else None


def _read_helios(path: Path) -> Trace:
    """A run's own requests, exactly as they arrived; rows that never arrived are left out."""
    frame = _parquet(path, _HELIOS)
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
    bad = _first_bad(arrived, in_range)
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


@dataclass(frozen=True)
class _Histogram:
    """Token counts and their cumulative probabilities."""

    tokens: NDArray[np.int32]
    cumulative: Floats

    def sample(self, uniforms: Floats) -> NDArray[np.int32]:
        place = np.searchsorted(self.cumulative, uniforms * self.cumulative[-1], side="right")
        sampled: NDArray[np.int32] = self.tokens[np.minimum(place, len(self.tokens) - 1)]
        return sampled


def _read_servegen(path: Path, settings: TraceSettings, seed: int) -> Trace:
    """Sample ServeGen's clients (arXiv 2505.09999) over the windows that are asked for.

    Each client and window has streams of its own, so a window holds the same requests whichever
    others are read. The file's shape is kept and the intervals are scaled to its rate, since the
    fitted scales do not always give the recorded rate. Prompts and outputs are independent: the
    file holds their marginal distributions only.
    """
    if not path.name.endswith("_trace.parquet"):
        raise InputError(
            "A ServeGen trace must be named NAME_trace.parquet, with NAME_dataset.parquet beside.",
            where=str(path),
        )
    dataset_path = path.with_name(path.name.removesuffix("_trace.parquet") + "_dataset.parquet")
    if not dataset_path.is_file():
        raise InputError(
            f"ServeGen's length distributions do not exist; {path.name} needs them beside it.",
            where=str(dataset_path),
        )
    windows = _servegen_windows(path)
    lengths = _servegen_lengths(dataset_path)
    starts = windows["window_start_s"].unique().sort().to_numpy()
    width_s = float(np.diff(starts).min()) if starts.size > 1 else 600.0
    end_s = math.inf if settings.end_s is None else settings.end_s
    pieces: list[tuple[Floats, NDArray[np.int32], NDArray[np.int32]]] = []
    asked = windows.filter(
        (pl.col("rate_rps") > 0)
        & (pl.col("window_start_s") + width_s > settings.start_s)
        & (pl.col("window_start_s") < end_s)
    )
    # A window's requests are drawn from its start on, so what lies beyond the end can be left out;
    # the microsecond keeps those that only rounding brings before the end.
    asked = asked.with_columns(
        (end_s - pl.col("window_start_s") + 1e-6).clip(upper_bound=width_s).alias("drawn_s")
    )
    expected = float((asked["rate_rps"] * asked["drawn_s"]).sum())
    if expected > MAX_REQUESTS:
        raise InputError(
            f"The windows asked for hold about {expected:.3g} requests; at most {MAX_REQUESTS} "
            "are allowed: set trace.end_s, or an earlier one (a window is drawn from its start).",
            where=str(path),
        )
    for client, start_s, rate, pattern, shape, drawn_s in asked.iter_rows():
        renewal = Renewal("gamma" if pattern == "Gamma" else "weibull", shape)
        units = renewal.arrivals(
            stream(seed, "servegen-arrivals", client, start_s),
            stream(seed, "servegen-arrivals-phase", client, start_s),
            before=rate * drawn_s,
        )
        columns = []
        for field in ("input_tokens", "output_tokens"):
            uniforms = stream(seed, f"servegen-{field}", client, start_s).random(units.size)
            columns.append(_lengths_at(lengths, client, start_s, field, dataset_path, uniforms))
        pieces.append((start_s + units / rate, columns[0], columns[1]))
    if not sum(piece[0].size for piece in pieces):
        raise _nothing_in_window(path, settings, float(starts[0]), float(starts[-1]) + width_s)
    arrival_s = whole_ns(np.concatenate([piece[0] for piece in pieces]))
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        format="servegen",
        file=path,
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([piece[1] for piece in pieces])[order],
        output_tokens=np.concatenate([piece[2] for piece in pieces])[order],
    )


def _servegen_windows(path: Path) -> pl.DataFrame:
    """The clients' rates and patterns, sorted by client and window and checked."""
    frame = _parquet(path, _SERVEGEN_TRACE).with_columns(pl.col("pattern").cast(pl.String))
    good = (
        (pl.col("client_id") >= 0)
        & pl.col("window_start_s").is_between(0, MAX_ARRIVAL_S)
        & pl.col("rate_rps").is_between(0, MAX_RATE_PER_S)
        & (
            (pl.col("rate_rps") == 0)
            | (
                ((pl.col("pattern") == "Gamma") & pl.col("arg1").is_between(*_GAMMA_SHAPES))
                | ((pl.col("pattern") == "Weibull") & pl.col("arg1").is_between(*_WEIBULL_SHAPES))
            )
        )
    )
    bad = _first_bad(frame, good)
    if bad is not None:
        raise InputError(
            f"The row is {frame.row(bad, named=True)}; the client must be 0 or more, the window 0 "
            f"to {MAX_ARRIVAL_S:g} s, the rate 0, or up to {MAX_RATE_PER_S:g} per second with "
            "pattern Gamma or Weibull and a shape arg1 of "
            f"{_GAMMA_SHAPES[0]:g} to {_GAMMA_SHAPES[1]:g} (Gamma) or {_WEIBULL_SHAPES[0]:g} to "
            f"{_WEIBULL_SHAPES[1]:g} (Weibull).",
            where=f"{path}, row {bad}",
        )
    if not frame.height:
        raise InputError("The trace holds no window; one at least is needed.", str(path))
    return frame.sort("client_id", "window_start_s")


def _servegen_lengths(path: Path) -> dict[tuple[int, str], list[tuple[int, _Histogram]]]:
    """For a client and field, the histograms by start of their window, ascending."""
    frame = _parquet(path, _SERVEGEN_DATASET).with_columns(pl.col("field").cast(pl.String))
    frame = frame.filter(pl.col("field").is_in(["input_tokens", "output_tokens"]))
    good = pl.col("value").is_between(1, MAX_TOKENS) & (pl.col("prob") >= 0)
    bad = _first_bad(frame, good & pl.col("prob").is_finite())
    if bad is not None:
        raise InputError(
            f"The row is {frame.row(bad, named=True)}; a token count must be at least 1 and "
            f"at most {MAX_TOKENS}, its probability at least 0 and finite.",
            where=f"{path}, row {bad} of its token counts",
        )
    keys = ("client_id", "field", "window_start_s")
    frame = frame.sort(*keys, "value")
    tokens = np.rint(frame["value"].to_numpy()).astype(np.int32)
    prob = frame["prob"].to_numpy().astype(np.float64)
    found: dict[tuple[int, str], list[tuple[int, _Histogram]]] = {}
    low = 0
    for client, field, start_s, num in frame.group_by(keys, maintain_order=True).len().iter_rows():
        rows = slice(low, low + num)
        histogram = _Histogram(tokens[rows], np.cumsum(prob[rows]))
        found.setdefault((client, field), []).append((start_s, histogram))
        low += num
    return found


def _lengths_at(
    lengths: dict[tuple[int, str], list[tuple[int, _Histogram]]],
    client: int,
    start_s: int,
    field: str,
    path: Path,
    uniforms: Floats,
) -> NDArray[np.int32]:
    """Token counts from the histogram in force at a window's start."""
    in_force = [hist for begin_s, hist in lengths.get((client, field), []) if begin_s <= start_s]
    if not in_force or in_force[-1].cumulative[-1] <= 0:
        raise InputError(
            f"Client {client} sends requests at {start_s} s but has no distribution of {field}; "
            "every active client needs one.",
            where=str(path),
        )
    return in_force[-1].sample(uniforms)


def _nothing_in_window(
    path: Path, settings: TraceSettings, first_s: float, last_s: float
) -> InputError:
    end = "its end" if settings.end_s is None else f"{settings.end_s:g} s"
    return InputError(
        f"No request lies in the window from {settings.start_s:g} s to {end}; the trace reaches "
        f"from {first_s:g} s to {last_s:g} s.",
        where=str(path),
    )


def _cut(trace: Trace, settings: TraceSettings) -> Trace:
    """The requests of the window, their times counted from its start."""
    times = trace.arrival_s
    low = int(np.searchsorted(times, settings.start_s))
    high = len(times) if settings.end_s is None else int(np.searchsorted(times, settings.end_s))
    if low >= high:
        raise _nothing_in_window(trace.file, settings, float(times[0]), float(times[-1]))
    return trace.take(slice(low, high), times[low:high] - settings.start_s)


def _stretch(trace: Trace, settings: TraceSettings) -> Trace:
    """Compress time, repeat back to back, keep the first requests."""
    if len(trace) * settings.repeat > MAX_REQUESTS:
        raise InputError(
            f"{len(trace)} requests repeated {settings.repeat} times exceed the {MAX_REQUESTS} "
            "requests allowed; repeat fewer times.",
            where=str(trace.file),
        )
    times = trace.arrival_s / settings.rate_scale
    rows: Ints | slice = slice(None)
    if settings.repeat > 1:
        copies = np.repeat(np.arange(settings.repeat), len(trace))
        rows = np.tile(np.arange(len(trace)), settings.repeat)
        times = times[rows] + copies * (_period_s(trace, settings) / settings.rate_scale)
    late = np.flatnonzero(times[: settings.max_requests] > MAX_ARRIVAL_S)
    if late.size:
        raise InputError(
            f"Request {late[0]} of the trace would arrive at {times[late[0]]:g} s with rate_scale "
            f"= {settings.rate_scale:g} and repeat = {settings.repeat}; at most "
            f"{MAX_ARRIVAL_S:g} s are allowed: raise rate_scale, repeat fewer times, or cut the "
            "trace with end_s or max_requests.",
            where=str(trace.file),
        )
    if settings.repeat > 1 or settings.rate_scale != 1:
        times = whole_ns(times)
    return trace.take(rows, times).take(
        slice(settings.max_requests), times[: settings.max_requests]
    )


def _period_s(trace: Trace, settings: TraceSettings) -> float:
    """Seconds from one copy to the next: the window, or the trace and one mean interval."""
    if settings.end_s is not None:
        return settings.end_s - settings.start_s
    first_s, last_s = float(trace.arrival_s[0]), float(trace.arrival_s[-1])
    if first_s == last_s:
        raise InputError(
            "All requests of the trace arrive at once, so nothing tells when to repeat them; "
            "give end_s.",
            where=str(trace.file),
        )
    return last_s + (last_s - first_s) / (len(trace) - 1)
