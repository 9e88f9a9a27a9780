"""Real traces found, read, cut to a window and stretched in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from helios_sim.errors import InputError, first_line
from helios_sim.streams import Floats, whole_ns
from helios_sim.workload.arrivals import MAX_REQUESTS
from helios_sim.workload.servegen import read_servegen
from helios_sim.workload.trace import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    Ints,
    Trace,
    TraceSettings,
    nothing_in_window,
)
from helios_sim.workload.trace_flaws import Flaw, at_line, by_reason, counts_said, refuse_flaws
from helios_sim.workload.trace_formats import TEXT_READERS, any_csv, read_helios, recognise
from helios_sim.workload.trace_rows import TraceRows


def read_trace(settings: TraceSettings, base_dir: Path, seed: int) -> Trace:
    """The trace's requests after window, scales of length and rate, repetition and cut.

    A relative path is looked up from `base_dir`. Times count from the trace's first request (from
    the start of a run or of a day for formats that have one), then from `start_s`. The seed
    matters to ServeGen alone, whose file holds distributions instead of requests.
    """
    path = _locate(base_dir / settings.file)
    name, raw = recognise(path, settings)
    if name in ("helios", "servegen"):
        try:
            trace = read_helios(path) if name == "helios" else read_servegen(path, settings, seed)
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"The columns cannot be read ({first_line(error)}).", str(path)
            ) from error
    else:
        read = any_csv(settings.columns) if settings.columns else TEXT_READERS[name]
        trace = _trace_of(name, path, read(raw, path), settings)
    return _stretch(_lengthen(_cut(trace, settings), settings), settings)


def is_drawn(settings: TraceSettings, base_dir: Path) -> bool:
    """Whether the file holds distributions, so that every seed brings requests of its own."""
    path = _locate(base_dir / settings.file)
    return recognise(path, settings)[0] == "servegen"


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
    name, _ = recognise(path, settings)
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


def _trace_of(name: str, path: Path, rows: TraceRows, settings: TraceSettings) -> Trace:
    """Check a text trace's rows and bring them in order, from 0 s on."""
    rows = _of_lengths_in_range(rows)
    if not settings.skip_bad_rows:
        refuse_flaws(rows.flaws, rows.num_in_file, path)
    skipped = by_reason(rows.flaws)
    if not len(rows):
        left_out = [f"{rows.num_dropped} rows have no output"] if rows.num_dropped else []
        left_out += [f"rows that cannot be used: {counts_said(skipped)}"] if skipped else []
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise InputError(f"The trace holds no request{why}; one at least is needed.", str(path))
    time_s = rows.time_s
    order = np.argsort(time_s, kind="stable")
    back = np.flatnonzero(np.diff(time_s) < 0)
    if back.size and not settings.sort:
        raise InputError(
            f"The timestamp lies {time_s[back[0]] - time_s[back[0] + 1]:g} s before the one of the "
            "request above it; a trace must be sorted by time: set sort = true to sort it.",
            where=at_line(path, int(rows.line[back[0] + 1])),
        )
    time_s = time_s[order] - time_s[order[0]]
    if time_s[-1] > MAX_ARRIVAL_S * max(1.0, settings.rate_scale):
        raise InputError(
            f"The request lies {time_s[-1]:g} s after the first; arrivals of up to "
            f"{MAX_ARRIVAL_S:g} s, after division by rate_scale = {settings.rate_scale:g}, "
            "are allowed.",
            where=at_line(path, int(rows.line[order[-1]])),
        )
    domain, domains = _domains_of(rows, order, settings, path)
    if settings.spread or (settings.spread is None and name == "mooncake"):
        time_s = spread_equal(time_s)
    return Trace(
        format=name,
        file=path,
        arrival_s=whole_ns(time_s),
        prompt_tokens=rows.prompt_tokens[order].astype(np.int32),
        output_tokens=rows.output_tokens[order].astype(np.int32),
        domain=domain,
        domains=domains,
        num_dropped=rows.num_dropped,
        skipped=skipped,
        latest=float(rows.time_s.max()),
    )


_MOST_DOMAINS: Final = 1000
"""Names of domains in a trace; a column of more is one of something else, such as users."""


def _domains_of(
    rows: TraceRows, order: Ints, settings: TraceSettings, path: Path
) -> tuple[NDArray[np.int16] | None, tuple[str, ...]]:
    """Each request's domain, as an index into names that are the profile's where told so."""
    if rows.domain is None:
        return None, ()
    given = rows.domain.gather(order)
    own = given.unique(maintain_order=True).to_list()
    if len(own) > _MOST_DOMAINS:
        raise InputError(
            f"The column {rows.domain.name} holds {len(own):,} names, such as {own[0]!r} and "
            f"{own[1]!r}; allowed are {_MOST_DOMAINS:,}: columns.domain must be a column that "
            "names domains of text.",
            where=str(path),
        )
    meant = {name: (settings.domains or {}).get(name, name) for name in own}
    domains = tuple(dict.fromkeys(meant.values()))
    place = {name: domains.index(domain) for name, domain in meant.items()}
    index = given.replace_strict(place, return_dtype=pl.Int16)
    return index.to_numpy(writable=True), domains


def _of_lengths_in_range(rows: TraceRows) -> TraceRows:
    """The rows whose lengths are some that a request may have; the others are flaws."""
    good = np.ones(len(rows), dtype=np.bool_)
    flaws = list(rows.flaws)
    for what, tokens in (("prompt", rows.prompt_tokens), ("output", rows.output_tokens)):
        for reason, out in (
            (f"{what} below 1 token", tokens < 1),
            (f"{what} above {MAX_TOKENS} tokens", tokens > MAX_TOKENS),
        ):
            bad = np.flatnonzero(good & out)
            if bad.size:
                said = (
                    f"The request has {tokens[bad[0]]} {what} tokens; allowed are 1 to "
                    f"{MAX_TOKENS}."
                )
                flaws.append(Flaw(reason, rows.line[bad], said))
                good[bad] = False
    return rows if good.all() else replace(rows.take(good), flaws=tuple(flaws))


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


def _cut(trace: Trace, settings: TraceSettings) -> Trace:
    """The requests of the window, their times counted from its start."""
    times = trace.arrival_s
    low = int(np.searchsorted(times, settings.start_s))
    high = len(times) if settings.end_s is None else int(np.searchsorted(times, settings.end_s))
    if low >= high:
        raise nothing_in_window(trace.file, settings, float(times[0]), float(times[-1]))
    return trace.take(slice(low, high), times[low:high] - settings.start_s)


def _lengthen(trace: Trace, settings: TraceSettings) -> Trace:
    """Prompts and outputs of so many times their tokens, rounded to whole ones, at least 1."""
    prompt = _scaled("prompt", trace.prompt_tokens, settings.prompt_scale, trace.file)
    output = _scaled("output", trace.output_tokens, settings.output_scale, trace.file)
    return replace(trace, prompt_tokens=prompt, output_tokens=output)


def _scaled(what: str, tokens: NDArray[np.int32], scale: float, path: Path) -> NDArray[np.int32]:
    """Lengths multiplied by a scale; of two nearest whole numbers the even one is taken."""
    if scale == 1.0:
        return tokens
    longest = int(tokens.max()) * scale
    if longest > MAX_TOKENS:
        raise InputError(
            f"The longest {what} has {tokens.max():,} tokens, {longest:,.0f} with {what}_scale = "
            f"{scale:g}; at most {MAX_TOKENS} are allowed: give a lower scale.",
            where=str(path),
        )
    return np.maximum(np.round(tokens * scale), 1.0).astype(np.int32)


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
