"""The tables of a run: each column with its type and meaning, and frames held to them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl
from polars.exceptions import PolarsError

from helios_sim.errors import InputError

_LEAST_FREE_BYTES: Final = 2**16
"""A disk with less is full: no table is smaller than some of its pages."""

STATUSES: Final = ("finished", "refused", "running", "waiting")


class Column(NamedTuple):
    """A column of a table: the type it is kept in, and what it means."""

    dtype: pl.DataType
    meaning: str


REQUEST_COLUMNS: Final = {
    "request_id": Column(pl.Int64(), "position in the workload, from 0"),
    "replica": Column(pl.Int32(), "replica that served it"),
    "domain": Column(pl.String(), "domain of its text"),
    "arrival_s": Column(pl.Float64(), "when it was sent"),
    "admitted_s": Column(pl.Float64(), "when its first prefill began; null if never"),
    "first_token_s": Column(pl.Float64(), "when its first token was emitted; null if never"),
    "finished_s": Column(pl.Float64(), "when its last token was emitted; null if never"),
    "prompt_tokens": Column(pl.Int32(), "tokens of the prompt as served"),
    "output_tokens": Column(pl.Int32(), "tokens asked for"),
    "generated_tokens": Column(pl.Int32(), "tokens emitted"),
    "trace_start": Column(pl.Int32(), "place in its domain's exit trace where it starts"),
    "status": Column(pl.String(), "finished, refused, running or waiting at the end of the run"),
    "model": Column(pl.String(), "model that emitted its last token; null if never admitted"),
    "depth": Column(pl.Int32(), "loaded layers of that model"),
    "evaluated": Column(pl.Boolean(), "whether it was served in an evaluation"),
    "num_preemptions": Column(pl.Int32(), "times it was preempted or recomputed"),
    "decoded_tokens": Column(
        pl.Int32(), "tokens emitted by decode iterations (all but those a prefill emits)"
    ),
    "executed_layers": Column(pl.Int64(), "layers executed for its decoded tokens"),
    "agree_tokens": Column(pl.Int32(), "emitted tokens equal to the full model's"),
    "nll_nats": Column(
        pl.Float64(), "negative log-likelihood of the emitted tokens' true text, summed"
    ),
    "breaches": Column(
        pl.Int32(),
        "tokens emitted below the confidence threshold at a loaded depth under full depth",
    ),
    "breaches_relative": Column(
        pl.Int32(), "those of them that a deeper exit of the same model would have satisfied"
    ),
}
TIMELINE_COLUMNS: Final = {
    "replica": Column(pl.Int32(), "replica"),
    "time_s": Column(pl.Float64(), "end of the interval"),
    "interval_s": Column(pl.Float64(), "length of the interval"),
    "mean_running": Column(pl.Float64(), "running requests, averaged over the interval"),
    "waiting": Column(pl.Int32(), "waiting requests at its end"),
    "kv_blocks_used": Column(pl.Int64(), "KV blocks in use at its end"),
    "kv_blocks": Column(pl.Int64(), "KV blocks of the pool at its end"),
    "model": Column(pl.String(), "model loaded at its end; null before the first one is"),
    "depth": Column(pl.Int32(), "layers loaded at its end"),
    "state": Column(pl.String(), "serving, evaluating, draining, loading or idle at its end"),
    "power_w": Column(pl.Float64(), "mean power over the interval"),
    "tokens": Column(pl.Int64(), "tokens emitted in the interval"),
    "breaches": Column(pl.Int64(), "confidence breaches in the interval"),
}
DECISION_COLUMNS: Final = {
    "time_s": Column(pl.Float64(), "when the policy was asked"),
    "replica": Column(pl.Int32(), "replica it was asked for"),
    "event": Column(pl.String(), "why it was asked"),
    "decision": Column(
        pl.String(), "what it decided: keep, evaluate, serve, load-layers or switch"
    ),
    "model": Column(pl.String(), "model that serves from then on"),
    "depth": Column(pl.Int32(), "layers loaded from then on"),
    "exit_mode": Column(pl.String(), "how tokens leave from then on"),
    "reason": Column(pl.String(), "the policy's own words"),
    "ready_s": Column(
        pl.Float64(), "when the decision was carried out; null if the run ended before"
    ),
    "moved_bytes": Column(pl.Int64(), "weight bytes brought in for it"),
    "snapshot": Column(
        pl.String(),
        "the snapshot the policy saw, as JSON, without what it shares with the replica's last one",
    ),
}
ITL_COLUMNS: Final = {
    "lower_s": Column(pl.Float64(), "lower edge of the bin"),
    "upper_s": Column(pl.Float64(), "upper edge of the bin, the next one's lower"),
    "count": Column(pl.Int64(), "gaps between consecutive tokens that fall into it"),
}


def conform(frame: pl.DataFrame, columns: Mapping[str, Column], table: str) -> pl.DataFrame:
    """The frame with exactly these columns and their types, in its order.

    Narrower or wider numbers and categorical text are converted when no value changes; a missing
    or unknown column, or a value that does not fit, is an `InputError` that names it.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(
            f"The columns {', '.join(missing)} are missing; needed are {', '.join(columns)}.",
            table,
        )
    unknown = [name for name in frame.columns if name not in columns]
    if unknown:
        raise InputError(
            f"The columns {', '.join(unknown)} are unknown; allowed are {', '.join(columns)}.",
            table,
        )
    fitted = []
    for name, (dtype, _) in columns.items():
        try:
            fitted.append(frame[name].cast(dtype))
        except PolarsError:
            raise InputError(
                f"The column {name} is of type {frame.schema[name]} and holds a value that does "
                f"not fit {dtype}; needed is {dtype}.",
                table,
            ) from None
    return pl.DataFrame(fitted)


def write_table(frame: pl.DataFrame, path: Path, **options: Any) -> None:
    """Write a table as parquet; whatever keeps it from the disk is an OSError.

    polars has an error of its own for that, in words that do not always say what it was.
    """
    try:
        frame.write_parquet(path, **options)
    except PolarsError as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        is_full = shutil.disk_usage(path.parent).free < _LEAST_FREE_BYTES
        number = int(told[1]) if told else errno.ENOSPC if is_full else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
