"""What a workload trace is, and how a scenario asks for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from helios_sim.errors import InputError
from helios_sim.settings.strict import StrictSettings
from helios_sim.streams import Floats
from helios_sim.workload.arrivals import MAX_REQUESTS

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

Ints = NDArray[np.int64]

Scale = Annotated[float, Field(ge=1e-6, le=1e6)]

ColumnName = Annotated[str, Field(min_length=1)]


class TraceColumns(StrictSettings):
    """How the header of a CSV, or of a Parquet file, calls what a trace holds."""

    arrival: ColumnName
    prompt: ColumnName
    output: ColumnName
    domain: ColumnName | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of arrival, prompt and output, and that of the domain where it is given."""
        domain = () if self.domain is None else (self.domain,)
        return self.arrival, self.prompt, self.output, *domain


class TraceSettings(StrictSettings):
    """Which trace, which part of it, and how it is stretched."""

    file: Annotated[str, Field(min_length=1)]
    format: Literal["auto", "mooncake", "azure", "burstgpt", "csv", "servegen", "helios"] = "auto"
    columns: TraceColumns | None = None
    domains: dict[ColumnName, ColumnName] | None = None
    start_s: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    end_s: Annotated[float | None, Field(gt=0, le=1e9)] = None
    rate_scale: Scale = 1.0
    prompt_scale: Scale = 1.0
    output_scale: Scale = 1.0
    repeat: Annotated[int, Field(ge=1, le=100_000)] = 1
    max_requests: Annotated[int | None, Field(ge=1, le=MAX_REQUESTS)] = None
    sort: bool = False
    spread: bool | None = None
    skip_bad_rows: bool = False

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
            if len(set(self.columns.names)) < len(self.columns.names):
                raise ValueError(
                    f"columns names {', '.join(map(repr, self.columns.names))}; arrival, prompt "
                    "and output must be three columns, and domain another."
                )
        if self.domains is not None and not self.tells_domains:
            raise ValueError(
                "domains says which of the profile's domains the names in a column are, and no "
                "column is given: give columns.domain, or leave domains out."
            )
        return self

    @property
    def tells_domains(self) -> bool:
        """Whether a column says of each request which text it is of."""
        return self.columns is not None and self.columns.domain is not None


@dataclass(frozen=True)
class Trace:
    """The requests of a trace, sorted by arrival.

    `domain` (an index into `domains`) is there for a run of our own and where a column tells it,
    `trace_start` only for a run of our own;
    `num_dropped` counts rows of the file that are no requests (an answer of no tokens), and
    `skipped` those that cannot be used, by what is wrong with them.
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
    skipped: Mapping[str, int] = field(default_factory=dict)
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


def nothing_in_window(
    path: Path, settings: TraceSettings, first_s: float, last_s: float
) -> InputError:
    """The error for a window that holds no request."""
    end = "its end" if settings.end_s is None else f"{settings.end_s:g} s"
    return InputError(
        f"No request lies in the window from {settings.start_s:g} s to {end}; the trace reaches "
        f"from {first_s:g} s to {last_s:g} s.",
        where=str(path),
    )
