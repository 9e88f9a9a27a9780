"""Raw readings on disk: appended as they are taken, never lost, exported to points.parquet."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import polars as pl

from helios_sim.errors import InputError
from helios_sim.folders import FULL, file_in_place, write_whole
from helios_sim.runs.columns import write_table
from helios_sim.wording import counted

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from calibration.measuring.timing import Timing

READINGS_FILE: Final = "readings.jsonl"
POINTS_FILE: Final = "points.parquet"
ENVIRONMENT_FILE: Final = "environment.json"

QUANTITIES: Final = (
    "decode_layers",
    "prefill_layers",
    "iteration",
    "head",
    "exit_iteration",
    "split_iteration",
    "check",
    "kv_fill",
    "copy_bandwidth",
    "launch_floor",
    "load_open",
    "load_disk",
    "load_host",
    "load_host_pinned",
    "load_energy",
    "unload",
    "graph_capture",
    "capture_embed",
    "capture_run",
    "capture_tell",
    "capture_fill",
    "memory_weights",
    "memory_kv",
    "memory_workspace",
    "memory_reserve",
    "idle_power",
    "decode_energy",
    "prefill_energy",
    "head_energy",
    "iteration_energy",
    "counter_probe",
)
"""What a reading may be of; docs/measuring.md says how each is taken."""

LEAST_DECODE_WINDOWS: Final = 4
"""Energy windows of different decodes that a fit needs: it has as many unknowns."""

LINK: Final = "link"
"""The mode of a copy from page-locked host memory to the device."""

READ: Final = "read"
"""The mode of a copy that is read only, as decoding reads weights and KV."""

CACHED: Final = "the file may have been in the system's cache"
"""The note of a load from a disk that nobody knows to have been met."""

Purpose = Literal["fit", "held-out"]

MOVED: Final = (
    "copy_bandwidth",
    "load_open",
    "load_disk",
    "load_host",
    "load_host_pinned",
    "load_energy",
    "unload",
)
"""Quantities whose bytes are chosen rather than measured, so that they belong to the key."""

CONFIGURATION: Final = (
    "quantity",
    "model",
    "mode",
    "layers",
    "batch",
    "context_tokens",
    "longest_context_tokens",
    "prompt_tokens",
)
"""Columns that say what was measured, whatever was read; where bytes are moved, they too."""

MEMORY_KINDS: Final = ("memory_weights", "memory_kv", "memory_workspace", "memory_reserve")
"""What memory is taken by; each is measured beside what the model arithmetic says."""

Key = tuple[object, ...]


_ENOUGH_QUIET: Final = 10
"""Undisturbed trials that tell a usual pace, at least."""

SLOWING: Final = (
    "software-power-cap",
    "hardware-slowdown",
    "software-thermal",
    "hardware-thermal",
    "hardware-power-brake",
)
"""Reasons to lower clocks that come and go with load and heat; others are settings, or idleness."""

MOST_LOST_SHARE: Final = 0.1
"""Of a trial's time that other processes may take before it counts as disturbed."""


@dataclass(frozen=True)
class Reading:
    """One row of points.parquet: one trial of one quantity; None where it does not apply.

    `layers` is the depth of the stack, `context_tokens` the mean per row and
    `longest_context_tokens` the longest row's, `prompt_tokens` the new tokens per row of a
    prefill. `seconds` is the median of one repetition and `mad_s` its spread. `joules` are those
    of one repetition, None without a meter; `watts` is the mean over the window, `cross_watts`
    a second source's word on it. `short_window` marks an energy window below the meter's minimum.
    `idle_share` is the part of a window, or of a processor's samples, in which no work ran.
    `reference_s` are the seconds that a processor's known arithmetic took around the samples.
    `bytes` are measured (memory) or moved (copies, loads); `predicted_bytes` is what the model
    arithmetic says of them.
    """

    quantity: str
    model: str = ""
    mode: str = ""
    layers: int | None = None
    batch: int | None = None
    context_tokens: int | None = None
    longest_context_tokens: int | None = None
    prompt_tokens: int | None = None
    bytes: int | None = None
    predicted_bytes: int | None = None
    trial: int = 0
    seconds: float | None = None
    mad_s: float | None = None
    repetitions: int | None = None
    joules: float | None = None
    watts: float | None = None
    meter: str | None = None
    cross_watts: float | None = None
    cross_meter: str | None = None
    idle_share: float | None = None
    reference_s: float | None = None
    short_window: bool | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttle_reasons: str | None = None
    started_at: str = ""
    purpose: Purpose = "fit"
    note: str = ""

    def timed(self, timing: Timing) -> Reading:
        """The same reading with a timing's figures."""
        return replace(
            self,
            seconds=timing.seconds,
            mad_s=timing.mad_s,
            repetitions=timing.repetitions * timing.samples,
            idle_share=timing.lost_share,
            reference_s=timing.reference_s,
        )

    @property
    def key(self) -> Key:
        """What makes it the reading it is, whatever was read."""
        return (
            *(getattr(self, name) for name in CONFIGURATION),
            self.bytes if self.quantity in MOVED else None,
            self.trial,
            self.purpose,
        )


_TYPES: Final[Mapping[str, Any]] = {
    "str": pl.String,
    "int | None": pl.Int64,
    "int": pl.Int64,
    "float | None": pl.Float64,
    "str | None": pl.String,
    "bool | None": pl.Boolean,
    "Purpose": pl.String,
}
SCHEMA: Final = pl.Schema({field.name: _TYPES[str(field.type)] for field in fields(Reading)})
"""Columns of points.parquet."""
_LATER: Final = ("reference_s",)
"""Columns that the readings of earlier versions lack: unknown there."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, or refuse one that another process measures into.

    The lock ends with its process. Where the system or its disk has no such locks, nothing is
    refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    "Another process measures into this folder; wait for its end, or give another.",
                    str(folder),
                ) from None
        yield
    finally:
        os.close(descriptor)


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"Readings cannot be written there: {error.strerror}.", str(folder))


class Readings:
    """The readings of one folder: those of earlier runs, and every new one flushed at once.

    Who adds to them is alone in the folder: what another process adds meanwhile is not seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / READINGS_FILE
        try:
            self._readings = _read(self._file)
            self._file.touch()
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._keys = {reading.key for reading in self._readings}

    def __len__(self) -> int:
        return len(self._readings)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @property
    def all(self) -> Sequence[Reading]:
        """Every reading, in the order taken."""
        return tuple(self._readings)

    def append(self, reading: Reading) -> None:
        """Write one reading and flush it; one whose key is there already is left out.

        Raises `InputError` on a full disk; the readings before it stay whole on disk.
        """
        if reading.quantity not in QUANTITIES:
            raise ValueError(
                f"A reading was given quantity {reading.quantity!r}; allowed are {QUANTITIES}."
            )
        if reading.key in self._keys:
            return
        line = json.dumps(asdict(reading), allow_nan=False) + "\n"
        try:
            # An earlier export lacks this reading, and would hide it if this run were killed.
            (self.folder / POINTS_FILE).unlink(missing_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise self.explained(error) from error
        self._readings.append(reading)
        self._keys.add(reading.key)

    def table(self) -> pl.DataFrame:
        """The readings as points.parquet has them."""
        return pl.DataFrame([asdict(reading) for reading in self._readings], schema=SCHEMA)

    def export(self) -> Path:
        """Write points.parquet, whole or not at all."""
        target = self.folder / POINTS_FILE
        try:
            with file_in_place(target) as partial:
                write_table(self.table(), partial)
        except OSError as error:
            raise self.explained(error) from error
        return target

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write environment.json: the provenance of the readings."""
        self.write_json(ENVIRONMENT_FILE, environment)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file beside the readings, whole or not at all."""
        text = json.dumps(content, indent=2) + "\n"
        try:
            write_whole(self.folder / name, text.encode())
        except OSError as error:
            raise self.explained(error) from error

    def explained(self, error: OSError) -> InputError:
        """What a failed write here means to the user: a full disk, or another reason."""
        kept = f"{len(self._readings)} readings are kept"
        if error.errno in FULL:
            return InputError(
                f"The disk is full; {kept} in {self._file}. Free some space and go on "
                "with --resume.",
                str(self.folder),
            )
        return InputError(f"Writing failed: {error.strerror}; {kept}.", str(self.folder))


def read_points(folder: Path) -> pl.DataFrame:
    """The readings of a folder as a table: points.parquet, or what readings.jsonl holds so far.

    Raises `InputError` if there is neither or the columns are not those of `SCHEMA`.
    """
    points = folder / POINTS_FILE
    if not points.is_file():
        readings = _read(folder / READINGS_FILE, repair=False)
        if not readings:
            raise InputError(
                f"It holds neither {POINTS_FILE} nor {READINGS_FILE}; take readings with "
                "helios-calibrate measure.",
                str(folder),
            )
        return pl.DataFrame([asdict(reading) for reading in readings], schema=SCHEMA)
    try:
        table = pl.read_parquet(points)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError("It is no readable Parquet file.", str(points)) from error
    table = table.with_columns(
        pl.lit(None, SCHEMA[name]).alias(name) for name in _LATER if name not in table.columns
    )
    missing = [name for name in SCHEMA.names() if name not in table.columns]
    if missing:
        raise InputError(f"Columns are missing: {', '.join(missing)}.", str(points))
    return table


def _read(file: Path, *, repair: bool = True) -> list[Reading]:
    """Readings of a file; a last line cut short is dropped, and cut off where `repair`."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if repair and len(whole) < len(content):
        os.truncate(file, len(whole))
    readings = []
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
        try:
            readings.append(Reading(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"Line {number} is no reading ({error}); remove the line, or measure into "
                "another folder.",
                str(file),
            ) from error
    return readings


def usual_reference_s(points: pl.DataFrame) -> float | None:
    """What a processor's known arithmetic took around trials that nobody disturbed; None unknown.

    It is the pace of what is fitted: slower than the quickest looks that a machine's pace is. With
    hardly a trial that nobody disturbed, the quickest tenth of all stands in for them.
    """
    known = points.filter(pl.col("reference_s").is_not_null())
    quiet = known.filter(pl.col("idle_share").fill_null(0.0) <= MOST_LOST_SHARE)
    if len(quiet) >= _ENOUGH_QUIET:
        return float(np.median(quiet["reference_s"]))
    return float(np.quantile(known["reference_s"], 0.1)) if len(known) else None


def busy_machine(lost_shares: Sequence[float]) -> str | None:
    """What to say where others disturbed most of the timed trials; None elsewhere.

    A sentence without its full stop. `lost_shares` are the shares of the trials' time that were
    lost to others, as far as seen.
    """
    disturbed = [share for share in lost_shares if share > MOST_LOST_SHARE]
    if len(disturbed) <= len(lost_shares) / 2:
        return None
    return (
        f"Others disturbed {len(disturbed)} of {len(lost_shares)} timed trials, half of them by "
        f"more than {statistics.median(disturbed):.0%} of their time: what is fitted to them "
        "describes a busy machine, so measure again on a quieter one"
    )


def held_back_readings(readings: pl.DataFrame) -> str | None:
    """How many timed readings were taken at clocks held back, as a sentence without its full stop.

    None where there is none, or no board told.
    """
    timed = readings.filter(
        pl.col("seconds").is_not_null() & pl.col("joules").is_null() & pl.col("watts").is_null()
    )
    reasons = pl.col("throttle_reasons").str.split("+").list.set_intersection(list(SLOWING))
    held = timed.filter(reasons.list.len() > 0).with_columns(reason=reasons)
    if held.is_empty():
        return None
    names = ", ".join(sorted(held["reason"].explode().unique().to_list()))
    clocks = ""
    if lowest := min(held["sm_clock_mhz"].drop_nulls().to_list(), default=0.0):
        highest = max(readings["sm_clock_mhz"].drop_nulls().to_list())
        clocks = f", at the lowest {lowest:,.0f} of {highest:,.0f} MHz"
    return (
        f"{held.height} of {counted(timed.height, 'timed reading')} ended at clocks that the board "
        f"held back ({names}{clocks}): large loads meet that in serving too, others only beside "
        "large ones"
    )
