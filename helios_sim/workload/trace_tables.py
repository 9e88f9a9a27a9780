"""Tables of traces in text and Parquet, every flaw named by its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from helios_sim.errors import InputError, did_you_mean, first_line
from helios_sim.workload.trace import TraceColumns
from helios_sim.workload.trace_flaws import Flaw, at_line

# Where a table keeps the line of each row, and how far its clock is ahead: no column of a file has
# such a name, since the names of a header are stripped.
LINE = " line"
_AHEAD = " offset"


def header_of(raw: bytes) -> tuple[str, list[str]]:
    """The first line that is not blank, and the names it gives to columns."""
    head = raw.lstrip().decode("utf-8", errors="replace").splitlines()[0]
    return head, [name.strip().strip('"') for name in head.split(",")]


def csv_table(raw: bytes, path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """The named columns as text, beside the line of each row; blank lines are left out."""
    header_line = _header_line(raw)
    try:
        frame = pl.read_csv(io.BytesIO(raw.lstrip()), infer_schema=False)
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise _ragged(raw, path, columns, error) from error
    names = [name.strip() for name in frame.columns]
    missing = [name for name in columns if name not in names]
    if missing:
        raise _no_utf8(raw, path) or _without(missing, raw, path, columns)
    # Polars gives the second of two columns of one name another name.
    _, given = header_of(raw)
    twice = [name for name in columns if given.count(name) > 1]
    if twice:
        raise InputError(
            f"The header names {', '.join(twice)} twice; it must name each of "
            f"{', '.join(columns)} once.",
            where=at_line(path, header_line),
        )
    # Polars keeps a blank line behind the header as a row of nulls.
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series().to_numpy()
    wanted = pl.DataFrame([frame.to_series(names.index(name)).alias(name) for name in columns])
    lines = np.arange(frame.height, dtype=np.int64) + header_line + 1
    wanted = wanted.with_columns(pl.Series(LINE, lines))
    if blank.any():
        # A line of commas alone is such a row too, but no blank line.
        commas = [
            number
            for number, text in enumerate(raw.splitlines(), 1)
            if b"," in text and not text.strip(b', \t"')
        ]
        blank &= ~np.isin(lines, commas)
    return wanted.filter(~blank)


def _without(
    missing: Sequence[str], raw: bytes, path: Path, columns: tuple[str, ...]
) -> InputError:
    """That the header lacks names, what it has instead, and what the mistake may be."""
    head, given = header_of(raw)
    where = at_line(path, _header_line(raw))
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
        where=at_line(path, number),
    )


def _ragged(raw: bytes, path: Path, columns: tuple[str, ...], error: Exception) -> InputError:
    """What is wrong with a CSV that cannot be read, with its line.

    A byte that is no UTF-8, a header that is one column, or the first line whose number of fields
    differs from the header's.
    """
    if (no_text := _no_utf8(raw, path)) is not None:
        return no_text
    if len(header_of(raw)[1]) == 1:
        return _without(columns, raw, path, columns)
    width = _num_fields(header_of(raw)[0])
    for number, line in enumerate(raw.decode().splitlines(), 1):
        if line.count('"') % 2 or (line.strip() and _num_fields(line) != width):
            return _malformed(line, width, path, number)
    return InputError(f"The file is not readable as CSV: {first_line(error)}.", where=str(path))


@dataclass(frozen=True)
class Column:
    """A column as what it must hold, null where it does not; `what` and `expected` are words."""

    what: str
    name: str
    values: pl.Series
    expected: str


def readable(
    frame: pl.DataFrame, columns: Sequence[Column]
) -> tuple[NDArray[np.bool_], list[Flaw]]:
    """Which rows hold what they must in every column, and what is wrong with the others.

    A row with several flaws counts to the first column's.
    """
    lines = frame[LINE].to_numpy()
    good = np.ones(frame.height, dtype=np.bool_)
    flaws = []
    for column in columns:
        bad = good & column.values.is_null().to_numpy()
        if not bad.any():
            continue
        good &= ~bad
        text = frame[column.name].fill_null("").str.strip_chars()
        empty = (text == "").to_numpy()
        must = f"the column must hold {column.expected}."
        for reason, rows in (
            (f"empty {column.what}", np.flatnonzero(bad & empty)),
            (f"unreadable {column.what}", np.flatnonzero(bad & ~empty)),
        ):
            if rows.size:
                cell = frame[column.name][int(rows[0])]
                said = "an empty cell" if reason.startswith("empty") else repr(cell)
                flaws.append(Flaw(reason, lines[rows], f"{column.name} is {said}; {must}"))
    return good, flaws


def count_column(frame: pl.DataFrame, what: str, name: str) -> Column:
    """A column of whole numbers of tokens, which may be written as 812.0."""
    text = frame[name].str.strip_chars()
    counts = text.cast(pl.Int64, strict=False)
    if counts.null_count():
        number = text.cast(pl.Float64, strict=False)
        # The bound leaves out what a float no longer holds exactly, infinities and NaN.
        is_whole = ((number == number.floor()) & (number.abs() < 2.0**53)).fill_null(False)
        counts = counts.fill_null(number.set(~is_whole, None).cast(pl.Int64))
    return Column(what, name, counts, "whole numbers of tokens")


def name_column(frame: pl.DataFrame, what: str, name: str) -> Column:
    """A column of names: whatever is no empty cell."""
    text = frame[name].str.strip_chars()
    return Column(what, name, text.set(text == "", None), "names")


_OFFSET: Final = r"(Z|[+-](?:[01]\d|2[0-3])(?::?[0-5]\d)?)$"
"""How a time ends that says how far its clock is ahead of UTC: Z, +02:00, -0530 or +02."""


def calendar_s(frame: pl.DataFrame, name: str, path: Path) -> Column:
    """Seconds from the first of the times, which all have an offset from UTC or all have none."""
    text = frame[name].str.strip_chars()
    offset = text.str.extract(_OFFSET)
    text = text.str.replace(_OFFSET, "").str.strip_chars_end().str.replace("T", " ")
    stamp = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="ns", strict=False)
    _check_offsets(frame.with_columns(offset.alias(_AHEAD)).filter(stamp.is_not_null()), name, path)
    ns = stamp.to_physical() - _ahead_ns(offset)
    # Differences are taken in whole nanoseconds: seconds since 1970 would lose digits.
    seconds = (ns - ns.min()) / 1e9
    return Column("time", name, seconds, "times such as 2023-11-16 18:15:46.680")


def _check_offsets(frame: pl.DataFrame, name: str, path: Path) -> None:
    """Refuse times of which some have an offset: nobody says on which clock the others are."""
    has = frame[_AHEAD].is_not_null()
    if has.all() or not has.any():
        return
    row = int((has != has[0]).arg_true()[0])
    with_it, without = (row, 0) if has[row] else (0, row)
    raise InputError(
        f"{name} is {frame[name][row]!r} here, but {frame[name][0]!r} in line {frame[LINE][0]}; "
        f"{frame[name][with_it]!r} has an offset from UTC and {frame[name][without]!r} has none: "
        "give all times with an offset, or all without.",
        where=at_line(path, int(frame[LINE][row])),
    )


def _ahead_ns(offset: pl.Series) -> pl.Series | int:
    """Nanoseconds that clocks of these offsets are ahead of UTC; 0 without an offset."""
    if offset.null_count() == len(offset):
        return 0
    digits = offset.str.replace_all("[Z:+-]", "")
    hours = digits.str.slice(0, 2).cast(pl.Int64, strict=False).fill_null(0)
    minutes = digits.str.slice(2).cast(pl.Int64, strict=False).fill_null(0)
    sign = pl.select(pl.when(offset.str.starts_with("-")).then(-1).otherwise(1)).to_series()
    return sign * (hours * 60 + minutes) * 60_000_000_000


def plain_s(frame: pl.DataFrame, name: str, expected: str) -> Column:
    """Times given as numbers of seconds."""
    seconds = frame[name].str.strip_chars().cast(pl.Float64, strict=False)
    seconds = seconds.set(~(seconds.is_finite() & (seconds >= 0)).fill_null(False), None)
    return Column("time", name, seconds, expected)


def is_calendar(times: pl.Series) -> bool:
    """Whether times are given by the calendar: the first that can be read either way tells."""
    text = times.str.strip_chars()
    looks = (text.str.contains(".-") & text.str.contains(":", literal=True)).fill_null(False)
    told = (looks | text.cast(pl.Float64, strict=False).is_not_null()).arg_true()
    return bool(looks[int(told[0])]) if len(told) else False


def json_number(row: Any, key: str, types: tuple[type, ...], path: Path, line: int) -> int | float:
    """A number of a JSON line, of one of the types."""
    value: Any = row.get(key) if isinstance(row, dict) else None
    # The bound also shuts out infinities and NaN.
    if type(value) in (int, float) and abs(value) < 2**53:
        number: int | float = value
        # A count may be written as 812.0.
        if float in types or number == int(number):
            return number
    what = "a whole number" if types == (int,) else "a finite number"
    raise InputError(f"{key} is {value!r}; it must be {what}.", where=at_line(path, line))


def parquet_table(path: Path, columns: dict[str, str]) -> pl.DataFrame:
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
            f"The file is not whole Parquet data ({first_line(error)}).", str(path)
        ) from error


def as_csv(path: Path, columns: TraceColumns) -> bytes:
    """The named columns of a Parquet file as the CSV of the same table: one reader judges both."""
    header = parquet_table(path, {})
    if missing := [name for name in columns.names if name not in header.columns]:
        raise _without(missing, header.write_csv().encode(), path, columns.names)
    zoned = [n for n in columns.names if getattr(header.schema[n], "time_zone", None)]
    try:
        frame = pl.read_parquet(path, columns=list(columns.names))
        frame = frame.with_columns(pl.col(zoned).dt.convert_time_zone("UTC"))
        return frame.write_csv(datetime_format="%Y-%m-%d %H:%M:%S%.f").encode()
    except pl.exceptions.PolarsError as error:
        raise InputError(f"The columns cannot be read ({first_line(error)}).", str(path)) from error


def _holds(dtype: pl.DataType, expected: str) -> bool:
    """Whether a column holds what is expected; one of nulls alone passes, its rows do not."""
    if dtype == pl.Null:
        return True
    if expected == "text":
        return isinstance(dtype, pl.String | pl.Categorical | pl.Enum)
    return dtype.is_integer() if expected == "whole numbers" else dtype.is_numeric()


def first_bad(frame: pl.DataFrame, good: pl.Expr) -> int | None:
    """The first row where `good` does not hold; a null is not good."""
    bad = frame.select((~good).fill_null(True)).to_series().arg_true()
    return int(bad[0]) if len(bad) else None


def _header_line(raw: bytes) -> int:
    """The line of the header: the first that is not blank."""
    return raw.count(b"\n", 0, len(raw) - len(raw.lstrip())) + 1


def _no_utf8(raw: bytes, path: Path) -> InputError | None:
    """That a file is no text in UTF-8, with the line of the first byte that is none."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as wrong:
        number = raw.count(b"\n", 0, wrong.start) + 1
        return InputError(
            f"The line holds the byte 0x{raw[wrong.start]:02x}, which is no UTF-8; the file must "
            "be text in UTF-8.",
            where=at_line(path, number),
        )
    return None


def _num_fields(line: str) -> int:
    """Fields of one line of a CSV, in quotes or not."""
    return len(next(csv.reader([line])))
