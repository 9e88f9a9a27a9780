"""The profile: what is known of models on a device, its file format, loading and saving.

A profile is a folder with `profile.json`, and for a measured one `points.parquet` (every raw
reading) and `exits.parquet` (exit traces). Every number in it is a quantity: a value, its unit,
a grade and a source. What a simulation needs is read into frozen dataclasses; the file itself
stays available as `Profile.document`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from helios_sim.assumptions import Assumed, Assumption, assume, hash_with
from helios_sim.cost import CAPTURE_COEFFICIENTS, COEFFICIENTS, OPTIONAL_COEFFICIENTS
from helios_sim.errors import InputError, did_you_mean, listed, shown
from helios_sim.folders import folder_in_place
from helios_sim.model import SHAPE_COUNTS, EarlyExitModel, Family, ModelShape

SCHEMA_VERSION: Final = 1
UNAVAILABLE: Final = "unavailable"
GRADES: Final = ("measured", "published", "derived", "assumed", UNAVAILABLE)
"""What stands behind a number, best first.

`measured`: read off this device. `published`: printed by its source. `derived`: our arithmetic on
measured or published figures. `assumed`: chosen by us, nothing stands behind it but plausibility.
`unavailable`: nobody could read it, so there is no number (null), only the reason; allowed for
joules and watts.
"""

ORIGINS: Final = ("published", "measured", "derived")
"""What a profile as a whole is made from: sources, readings, or another profile."""

CONFIDENCE_KINDS: Final = (
    "max-softmax",
    "top2-margin",
    "entropy",
    "calibrated-max-softmax",
    "calibrated-top2-margin",
    "calibrated-entropy",
)
FAMILIES: Final = ("opt", "llama")
PROFILE_FILE: Final = "profile.json"
POINTS_FILE: Final = "points.parquet"
TRACES_FILE: Final = "exits.parquet"
PROFILE_FILES: Final = (PROFILE_FILE, POINTS_FILE, TRACES_FILE)
"""All that `save_profile` writes."""
MAX_NUMBER: Final = 1e18
"""The largest number of a profile, in any unit: what is multiplied with it stays finite."""
STAND_INS: Final = "stand_ins"
"""Where a profile's environment names the models that leave as another one does."""
ASSUMED: Final = "assumed"
"""Where a run's environment says which numbers its scenario takes otherwise than the profile."""

Array: TypeAlias = NDArray[np.float64]

_WATTS: Final = ("idle_w", "active_w", "load_w")
_SHIPPED: Final = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Quantity:
    """A number of a profile with what stands behind it; `error` is its standard error.

    `value` is None for a joule or a watt that could not be read (grade `unavailable`).
    """

    value: float | None
    unit: str
    grade: str
    source: str
    error: float | None = None


@dataclass(frozen=True)
class Device:
    """The GPUs of one replica; memory and watts are summed over its `num_gpus`.

    `idle_w` is drawn by an idle replica, `active_w` is the floor while it works (idle included),
    `load_w` is drawn while weights move and nothing else runs. Where watts are unavailable they
    are 0 here, so that times can be computed; `Profile.has_energy` says whether to believe them.
    """

    name: str
    memory_bytes: int
    num_gpus: int
    idle_w: float
    active_w: float
    load_w: float


@dataclass(frozen=True)
class Link:
    """A way weights take: seconds = alpha + bytes / rate."""

    alpha_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Seconds to move so many bytes; nothing takes no time."""
        return self.alpha_s + num_bytes / self.bytes_per_s if num_bytes > 0 else 0.0


@dataclass(frozen=True)
class Loading:
    """Where weights come from: from disk the first time, from host memory afterwards."""

    disk: Link
    host: Link


@dataclass(frozen=True)
class Hull:
    """The measured range; beyond it a prediction extrapolates."""

    max_batch: int
    max_context_tokens: int


@dataclass(frozen=True)
class Confidence:
    """How confidence at an exit is computed, and the threshold used unless another is set."""

    kind: str
    default_threshold: float


@dataclass(frozen=True)
class ModelProfile:
    """An early-exit model on the profile's device.

    `batch_residual` holds knots (batch, factor) by which the predicted time of a decode layer is
    multiplied, `depth_residual` knots (loaded layers, factor): layers of which few are loaded may
    stay in a cache. Empty means 1. `batch_buckets` are the batch sizes a backend pads to; empty
    means none. A coefficient of energy or power is None where it is unavailable.
    """

    model: EarlyExitModel
    coefficients: Mapping[str, float | None]
    batch_buckets: tuple[int, ...]
    batch_residual: tuple[tuple[float, float], ...]
    hull: Hull | None
    workspace_bytes: int
    confidence: Confidence
    depth_residual: tuple[tuple[float, float], ...] = ()

    @property
    def has_energy(self) -> bool:
        """Whether every coefficient of energy is known; the power limit may be missing."""
        return all(
            value is not None
            for name, value in self.coefficients.items()
            if name != "power.limit_w"
        )

    def coefficient_array(self) -> Array:
        """The coefficients as `helios_sim.cost` reads them.

        Unavailable joules and watts count as 0, so that seconds can be computed; an unavailable
        power limit beside known joules limits nothing.
        """
        values = {name: value or 0.0 for name, value in self.coefficients.items()}
        if self.coefficients["power.limit_w"] is None and self.has_energy:
            values["power.limit_w"] = sys.float_info.max
        return np.array([values[name] for name in COEFFICIENTS], dtype=np.float64)

    @property
    def graph_rows(self) -> int:
        """The largest batch for which a graph is captured while requests wait; 0 where none is."""
        costs = sum(self.coefficients[name] or 0.0 for name in CAPTURE_COEFFICIENTS)
        return self.batch_buckets[-1] if self.batch_buckets and costs > 0.0 else 0

    def beyond_hull(self, max_batch: int, max_context_tokens: int) -> str | None:
        """What of a run lies outside the measured range, as a clause; None where nothing does.

        `max_batch` is the largest batch run, `max_context_tokens` the longest request in it.
        """
        if self.hull is None:
            return None
        parts = [
            f"{what} up to {given} where {measured} was the largest measured"
            for what, given, measured in (
                ("batches", max_batch, self.hull.max_batch),
                ("contexts", max_context_tokens, self.hull.max_context_tokens),
            )
            if given > measured
        ]
        return f"{self.model.name}: {' and '.join(parts)}" if parts else None

    def padded_rows(self, max_batch: int) -> Array:
        """For each batch from 0 to `max_batch` the rows computed: the next bucket, or itself."""
        rows = np.arange(max_batch + 1, dtype=np.float64)
        if self.batch_buckets:
            buckets = np.array(self.batch_buckets, dtype=np.float64)
            place = np.searchsorted(buckets, rows, side="left")
            inside = (place < len(buckets)) & (rows > 0)
            rows[inside] = buckets[place[inside]]
        return rows

    def residual(self, max_batch: int, loaded_layers: int) -> Array:
        """For each batch from 0 to `max_batch` the factor on the time of a decode layer.

        Both residuals multiplied, at the depth that is loaded, however many layers run.
        """
        batches = np.arange(max_batch + 1, dtype=np.float64)
        depth = np.array([loaded_layers], dtype=np.float64)
        return curve(self.batch_residual, batches) * curve(self.depth_residual, depth)


def curve(knots: Sequence[tuple[float, float]], at: Array) -> Array:
    """The factors of a residual at some places: 1 without knots, else through all of them.

    Monotone between knots (PCHIP) and constant beyond the first and the last.
    """
    if not knots:
        return np.ones(len(at), dtype=np.float64)
    places, factors = (np.array(column) for column in zip(*knots, strict=True))
    if len(places) == 1:
        return np.full(len(at), factors[0], dtype=np.float64)
    # Most profiles have no residual, and listing them should not wait for this import.
    from scipy.interpolate import PchipInterpolator

    inside = np.clip(at, places[0], places[-1])
    return np.asarray(PchipInterpolator(places, factors)(inside), dtype=np.float64)


@dataclass(frozen=True)
class Agreement:
    """How likely an early token equals the full model's: a step in the confidence."""

    step_confidence: float
    below: float
    at_or_above: float


@dataclass(frozen=True)
class MarkovCandidate:
    """A candidate's published exit histogram by domain, and the full model's perplexity."""

    exit_layers: tuple[int, ...]
    exit_shares: Mapping[str, tuple[float, ...]]
    perplexity: float


@dataclass(frozen=True)
class MarkovExits:
    """What `helios_sim.exits` needs to generate traces where only statistics are published."""

    domains: tuple[str, ...]
    num_positions: int
    seed: int
    nominal_threshold: float
    stickiness: float
    correlation: float
    agreement: Agreement
    disagreement_penalty_nats: float
    candidates: Mapping[str, MarkovCandidate]


@dataclass(frozen=True)
class TraceExits:
    """Measured exit traces, in a file of the profile's folder."""

    path: Path


@dataclass(frozen=True)
class Provenance:
    """Where a profile comes from, in words; `environment` holds versions and settings."""

    origin: str
    sources: tuple[str, ...]
    notes: tuple[str, ...]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class ProfileSummary:
    """One line about a profile."""

    name: str
    device: str
    models: tuple[str, ...]
    grade_counts: Mapping[str, int]
    description: str


@dataclass(frozen=True)
class Profile:
    """A device and its models, as read from a profile folder.

    `quantities` maps the place of every number in the file ("models.opt-1.3b.workspace_bytes",
    lists with their index) to the number and its grade; `hash` identifies the folder's content,
    and the `assumptions` with which a scenario replaced some of its numbers.
    """

    name: str
    description: str
    device: Device
    models: Mapping[str, ModelProfile]
    loading: Loading
    exits: MarkovExits | TraceExits
    provenance: Provenance
    quantities: Mapping[str, Quantity]
    document: Mapping[str, Any]
    folder: Path
    hash: str
    assumptions: tuple[Assumption, ...] = ()

    def model(self, name: str) -> ModelProfile:
        """The model of that name; an `InputError` names the nearest one otherwise."""
        if name not in self.models:
            raise InputError(
                f"Model {name!r} is not in profile {self.name!r}."
                f"{did_you_mean(name, self.models)} It has {listed(self.models)}.",
                where=str(self.folder / PROFILE_FILE),
            )
        return self.models[name]

    @property
    def has_energy(self) -> bool:
        """Whether energy is known: the device's watts and every model's joules.

        Where it is not, whatever joules a simulation adds up mean nothing and are to be shown as
        unavailable, never as zero.
        """
        unread = (
            name for name, one in self.quantities.items() if one.value is None and one.unit == "W"
        )
        return not any(name.startswith("device.") for name in unread) and all(
            model.has_energy for model in self.models.values()
        )

    @property
    def is_of_processor(self) -> bool:
        """Whether the device is a processor, as its measurement says; all others are GPUs."""
        device = self.provenance.environment.get("device")
        return isinstance(device, Mapping) and device.get("kind") == "cpu"

    @property
    def stand_ins(self) -> Mapping[str, str]:
        """Models that nobody observed, each with the one whose exits stand in for its own."""
        named = self.provenance.environment.get(STAND_INS)
        return (
            {name: str(like) for name, like in named.items() if name in self.models}
            if isinstance(named, Mapping)
            else {}
        )

    def grade_counts(self) -> dict[str, int]:
        """How many numbers stand at each grade; `unavailable` is named only where it occurs."""
        grades = [quantity.grade for quantity in self.quantities.values()]
        counts = {grade: grades.count(grade) for grade in GRADES}
        if not counts[UNAVAILABLE]:
            del counts[UNAVAILABLE]
        return counts

    def summary(self) -> ProfileSummary:
        """The profile in one line."""
        return ProfileSummary(
            name=self.name,
            device=self.device.name,
            models=tuple(self.models),
            grade_counts=self.grade_counts(),
            description=self.description,
        )


def unit_of(name: str) -> str:
    """The unit a number must carry, read from its name.

    "decode.j_per_row_layer" is in J/row/layer, "device.idle_w" in W, "decode.launch_s" in s.
    """
    if name in _UNITS:
        return _UNITS[name]
    stem, _, rest = name.rpartition(".")[2].partition("_per_")
    if stem == "bytes":
        base = "B"
    else:
        words = stem.split("_")
        base = next((_BASES[word] for word in words if word in _BASES), "")
    if not base:
        raise KeyError(f"No unit is known for the number {name!r}.")
    if not rest:
        return base
    return base + "".join(f"/{divisor}" for divisor in re.findall(_DIVISORS, rest))


_BASES: Final = {"s": "s", "j": "J", "w": "W", "bytes": "B", "nats": "nat"}
_DIVISORS: Final = r"context_token|padded_token|token|row|prompt|pair|graph|exit|layer|s(?![a-z])"
_UNITS: Final = {
    "exit_layers": "layer",
    "exit_head_params": "parameter",
    "default_threshold": "1",
    "nominal_threshold": "1",
    "batch_residual": "1",
    "depth_residual": "1",
    "stickiness": "1",
    "correlation": "1",
    "step_confidence": "1",
    "below": "1",
    "at_or_above": "1",
    "perplexity": "1",
    "exit_shares": "1",
}


def quantity(
    name: str, value: Any, grade: str, source: str, error: float | None = None
) -> dict[str, Any]:
    """A number as the file holds it; its unit follows from its name (see `unit_of`).

    A joule or a watt that could not be read is None with the grade `unavailable`; the source
    then says why.
    """
    entry: dict[str, Any] = {"value": value, "unit": unit_of(name), "grade": grade}
    entry["source"] = source
    if error is not None:
        entry["error"] = error
    return entry


def list_profiles() -> list[ProfileSummary]:
    """The profiles that come with the package, by name."""
    return [load_profile(_SHIPPED / name).summary() for name in shipped_names()]


def shipped_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{PROFILE_FILE}"))


def is_shipped(profile: Profile) -> bool:
    """Whether a profile is one that comes with the package, not a user's of the same name."""
    return profile.folder.parent == _SHIPPED


def where_to_find(model: str, profile: str) -> str:
    """A space and where a model is that a profile lacks: in a shipped one, or in its shape."""
    holding = [one.name for one in list_profiles() if model in one.models]
    if holding:
        return f" {listed(holding)} {'has' if len(holding) == 1 else 'have'} it."
    return (
        f" A model that no profile has can be added from its config.json: helios profiles derive "
        f"--from {profile} --model {model}=config.json --out FOLDER."
    )


def load_profile(
    name_or_path: str | Path,
    search_path: Path | None = None,
    assumed: Mapping[str, Assumed] | None = None,
) -> Profile:
    """Read a profile: a folder, or the name of a shipped one.

    A relative folder is looked for under `search_path` (the scenario's folder, say), then under
    the current one; a folder found there goes before a shipped profile of the same name. `assumed`
    are values by the places of numbers that are taken otherwise than the profile has them.
    """
    folder = _find(name_or_path, search_path)
    profile = _parse(_read_json(folder / PROFILE_FILE), folder, folder_hash(folder))
    return with_assumptions(profile, assumed) if assumed else profile


def with_assumptions(profile: Profile, assumed: Mapping[str, Assumed]) -> Profile:
    """A profile some of whose numbers are taken otherwise, by their places.

    Raises `InputError` for a place without a number and for a value that is not allowed there.
    """
    try:
        document, made = assume(profile.document, assumed)
        found = _parse(document, profile.folder, hash_with(profile.hash, assumed))
    except InputError as error:
        # What is wrong stands in no file of the profile.
        place = (error.where or "").removeprefix(f"{profile.folder / PROFILE_FILE}, ")
        raise InputError(error.message, f"assume, profile {profile.name}, {place}") from error
    return replace(found, assumptions=made)


def assumed_in(profile: Profile) -> dict[str, Any]:
    """The entry of a run's environment that says what was assumed; empty where nothing was."""
    said = [one.said() for one in profile.assumptions]
    return {ASSUMED: said} if said else {}


def save_profile(
    document: Mapping[str, Any],
    folder: Path,
    *,
    points: Path | None = None,
    traces: Path | None = None,
    overwrite: bool = False,
    check: Callable[[Profile], object] | None = None,
) -> Profile:
    """Write a profile folder whole or not at all, and return it as loaded.

    `document` is the content of `profile.json`; `points` and `traces` are parquet files copied
    beside it. The document is checked as on loading before anything appears under `folder`, and
    so is what else `check` raises an error for. What may be written over, `check_target` says.
    """
    check_target(folder, overwrite)
    with folder_in_place(folder) as draft:
        (draft / PROFILE_FILE).write_text(document_text(document), encoding="utf-8")
        for source, name in ((points, POINTS_FILE), (traces, TRACES_FILE)):
            if source is not None:
                shutil.copyfile(source, draft / name)
        written = _parse(_read_json(draft / PROFILE_FILE), draft, "")
        if check is not None:
            check(written)
    return load_profile(folder)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` unless a profile may be written here.

    Allowed are a new folder, an empty one and, where asked to overwrite, one that holds a profile
    and nothing else.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise InputError(
            "It is a file; allowed is a new folder, an empty one or a profile to replace.",
            where=str(folder),
        )
    # Hidden files would go with the folder like any other.
    present = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in present if name not in PROFILE_FILES]
    if foreign or (present and PROFILE_FILE not in present):
        named = ", ".join((foreign or present)[:3])
        raise InputError(
            f"The folder is not a profile alone: it holds {named}; allowed is a new folder, an "
            f"empty one or one that holds {PROFILE_FILE} and at most "
            f"{' and '.join(PROFILE_FILES[1:])} beside it.",
            where=str(folder),
        )
    if present and not overwrite:
        raise InputError(
            "The profile folder exists already; give another folder, or --overwrite to replace "
            "the profile in it.",
            where=str(folder),
        )


def document_text(document: Mapping[str, Any]) -> str:
    """The text of `profile.json`: one quantity a line, the same bytes for the same document."""
    return _json_lines(document, "") + "\n"


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a profile folder's files; hidden ones are skipped."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    for name in names:
        if any(part.startswith((".", "__")) for part in name.split("/")):
            continue
        content = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _json_lines(node: Any, indent: str) -> str:
    """JSON with quantities and lists of plain values on one line each."""
    inner = indent + "  "
    if isinstance(node, Mapping) and node and "value" not in node:
        rows = [
            f"{inner}{json.dumps(key)}: {_json_lines(value, inner)}" for key, value in node.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n" + indent + "}"
    if isinstance(node, (list, tuple)) and any(isinstance(item, str) for item in node):
        rows = [inner + json.dumps(item, ensure_ascii=False) for item in node]
        return "[\n" + ",\n".join(rows) + "\n" + indent + "]"
    return json.dumps(node, ensure_ascii=False)


def _find(name_or_path: str | Path, search_path: Path | None) -> Path:
    """The folder meant by a name or a path."""
    given = Path(name_or_path)
    places = [given] if search_path is None or given.is_absolute() else [search_path / given, given]
    for place in places:
        if (place / PROFILE_FILE).is_file():
            return place
    shipped = shipped_names()
    if str(name_or_path) in shipped:
        return _SHIPPED / str(name_or_path)
    for place in places:
        if place.is_dir():
            raise InputError(
                f"The folder holds no {PROFILE_FILE}; a profile is a folder with one.",
                where=str(place),
            )
    raise InputError(
        f"Profile {str(name_or_path)!r} was not found."
        f"{did_you_mean(str(given), [*_folders_beside(given, places), *shipped])} "
        f"Give a profile folder or one of the shipped profiles {listed(shipped)}.",
        where=str(places[0]),
    )


def _folders_beside(given: Path, places: list[Path]) -> list[str]:
    """Profiles in the folders where a path was looked up, by paths like the one that was given."""
    found: list[str] = []
    for folder in dict.fromkeys(place.parent for place in places):
        # A folder that cannot be listed, or a path without a name, has nothing near it.
        with suppress(OSError, ValueError):
            names = [entry.name for entry in folder.iterdir() if (entry / PROFILE_FILE).is_file()]
            found += [str(given.with_name(name)) for name in sorted(names)]
    return found


def _read_json(path: Path) -> Any:
    """Parse a JSON file; keys given twice are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"The key {key!r} is given twice in one object.", str(path))
            found[key] = value
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(
            f"This is not valid JSON: {error.msg}.",
            where=f"{path}, line {error.lineno}, column {error.colno}",
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The file cannot be read: {error}.", where=str(path)) from error


_KNOT_PLACES: Final = {"batch_residual": "batch", "depth_residual": "loaded layers"}


class _Reader:
    """Reads a profile document with checks, and keeps every quantity it met by its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quantities: dict[str, Quantity] = {}

    def fail(self, place: str, message: str) -> InputError:
        """The error for a place in the file."""
        return InputError(message, where=f"{self.path}, {place}" if place else str(self.path))

    def table(
        self, node: Any, place: str, required: Sequence[str], optional: Sequence[str] = ()
    ) -> dict[str, Any]:
        """An object with exactly the keys allowed."""
        if not isinstance(node, dict):
            raise self.fail(place, f"An object was expected, {shown(node)} was given.")
        known = [*required, *optional]
        for key in node:
            if key not in known:
                hint = did_you_mean(key, known)
                raise self.fail(place, f"The key {key!r} is unknown.{hint} {_allowed(known)}.")
        for key in required:
            if key not in node:
                raise self.fail(place, f"The key {key!r} is missing.")
        return cast(dict[str, Any], node)

    def named(self, node: Any, place: str) -> dict[str, Any]:
        """An object whose keys are names, at least one."""
        if not isinstance(node, dict) or not node:
            raise self.fail(place, f"An object by name was expected, {shown(node)} was given.")
        return cast(dict[str, Any], node)

    def text(self, node: Any, place: str, allowed: Sequence[str] = ()) -> str:
        """A text that is not empty, one of `allowed` if any are named."""
        if not isinstance(node, str) or not node.strip():
            raise self.fail(place, f"A text was expected, {shown(node)} was given.")
        if allowed and node not in allowed:
            hint = did_you_mean(node, allowed)
            raise self.fail(place, f"{node!r} was given.{hint} Allowed are {listed(allowed)}.")
        return node

    def texts(self, node: Any, place: str) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(node, list):
            raise self.fail(place, f"A list of texts was expected, {shown(node)} was given.")
        return tuple(self.text(item, f"{place}[{index}]") for index, item in enumerate(node))

    def whole(self, node: Any, place: str, minimum: int = 0) -> int:
        """A whole number."""
        if isinstance(node, bool) or not isinstance(node, int) or node < minimum:
            raise self.fail(
                place,
                f"A whole number of at least {minimum} was expected, {shown(node)} was given.",
            )
        return node

    def number(self, node: Any, place: str, minimum: float = 0.0) -> float:
        """A finite number of at least `minimum`."""
        if isinstance(node, bool) or not isinstance(node, (int, float)):
            raise self.fail(place, f"A number was expected, {shown(node)} was given.")
        # The bound leaves out NaN, infinities and whole numbers that no float holds.
        if not abs(node) <= sys.float_info.max:
            raise self.fail(place, f"The value {node} was given; it must be finite.")
        if node > MAX_NUMBER:
            raise self.fail(
                place, f"The value {node:g} was given; at most {MAX_NUMBER:g} is allowed."
            )
        if node < minimum:
            raise self.fail(place, f"The value {node} was given; it must be at least {minimum:g}.")
        return float(node)

    def _entry(self, node: Any, place: str, name: str) -> tuple[Any, str, str, str, float | None]:
        table = self.table(node, place, ("value", "unit", "grade", "source"), ("error",))
        unit = unit_of(name)
        if table["unit"] != unit:
            raise self.fail(place, f"The unit {table['unit']!r} was given; {unit!r} is needed.")
        grade = self.text(table["grade"], f"{place}.grade", GRADES)
        source = self.text(table["source"], f"{place}.source")
        error = table.get("error")
        if error is not None:
            error = self.number(error, f"{place}.error")
        value = table["value"]
        if grade == UNAVAILABLE and unit[0] not in "JW":
            raise self.fail(
                f"{place}.grade",
                "'unavailable' was given; only joules and watts may be: without seconds and "
                "bytes nothing can be simulated. Measure the number, or give one with the "
                "grade 'assumed'.",
            )
        if (value is None) != (grade == UNAVAILABLE):
            raise self.fail(
                f"{place}.value",
                f"The value {shown(value)} was given with the grade {grade!r}; null and "
                "'unavailable' belong together.",
            )
        return value, unit, grade, source, error

    def quantity(
        self,
        node: Any,
        place: str,
        name: str,
        minimum: float = 0.0,
        maximum: float = math.inf,
        above_zero: bool = False,
    ) -> float:
        """The value of a quantity, within its bounds."""
        value, unit, grade, source, error = self._entry(node, place, name)
        number = self.number(value, f"{place}.value", minimum)
        if number > maximum:
            raise self.fail(place, f"The value {number:g} was given; at most {maximum:g} allowed.")
        if above_zero and number == 0.0:
            raise self.fail(place, "The value 0 was given; it must be greater.")
        self.quantities[place] = Quantity(number, unit, grade, source, error)
        return number

    def energy(self, node: Any, place: str, name: str) -> float | None:
        """The joules or watts of a quantity, None where they are unavailable."""
        value, unit, grade, source, error = self._entry(node, place, name)
        if value is not None:
            return self.quantity(node, place, name)
        self.quantities[place] = Quantity(None, unit, grade, source, error)
        return None

    def quantities_list(self, node: Any, place: str, name: str) -> tuple[float, ...]:
        """The values of a quantity that is a list."""
        values, unit, grade, source, error = self._entry(node, place, name)
        if not isinstance(values, list) or not values:
            raise self.fail(place, f"A list of numbers was expected, {shown(values)} was given.")
        numbers = []
        for index, value in enumerate(values):
            spot = f"{place}[{index}]"
            numbers.append(self.number(value, spot))
            self.quantities[spot] = Quantity(numbers[-1], unit, grade, source, error)
        return tuple(numbers)

    def knots(self, node: Any, place: str, name: str) -> tuple[tuple[float, float], ...]:
        """The knots (place, factor) of a quantity that is a curve."""
        place_name = _KNOT_PLACES[name]
        values, unit, grade, source, error = self._entry(node, place, name)
        if not isinstance(values, list):
            raise self.fail(place, f"A list of knots was expected, {shown(values)} was given.")
        knots: list[tuple[float, float]] = []
        for index, pair in enumerate(values):
            spot = f"{place}[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.fail(
                    spot, f"A knot [{place_name}, factor] was expected, not {shown(pair)}."
                )
            at = self.number(pair[0], spot, 1.0)
            factor = self.number(pair[1], spot)
            if factor == 0.0:
                raise self.fail(spot, "The factor 0 was given; it must be greater.")
            if knots and at <= knots[-1][0]:
                raise self.fail(
                    spot,
                    f"{place_name.capitalize()} {at:g} follows {knots[-1][0]:g}; they must rise.",
                )
            knots.append((at, factor))
            self.quantities[spot] = Quantity(factor, unit, grade, source, error)
        return tuple(knots)

    def count(self, node: Any, place: str, name: str, above_zero: bool = False) -> int:
        """The value of a quantity that is a whole number."""
        value = self.quantity(node, place, name, above_zero=above_zero)
        if value != int(value):
            raise self.fail(place, f"The value {value} was given; it must be whole.")
        return int(value)


def _allowed(known: Sequence[str]) -> str:
    return f"Allowed are {listed(known)}" if known else "None is allowed"


def _parse(document: Any, folder: Path, content_hash: str) -> Profile:
    """A checked profile from its document."""
    reader = _Reader(folder / PROFILE_FILE)
    if isinstance(document, dict) and document.get("schema_version") != SCHEMA_VERSION:
        given = shown(document.get("schema_version"))
        raise reader.fail(
            "schema_version",
            f"Version {given} was given; this release reads version {SCHEMA_VERSION}.",
        )
    top = reader.table(
        document,
        "",
        (
            "schema_version",
            "name",
            "description",
            "device",
            "loading",
            "models",
            "exits",
            "provenance",
        ),
        ("measurement",),
    )
    models = {
        name: _parse_model(reader, name, node, f"models.{name}")
        for name, node in reader.named(top["models"], "models").items()
    }
    return Profile(
        name=reader.text(top["name"], "name"),
        description=reader.text(top["description"], "description"),
        device=_parse_device(reader, top["device"]),
        models=models,
        loading=_parse_loading(reader, top["loading"]),
        exits=_parse_exits(reader, top["exits"], models, folder),
        provenance=_parse_provenance(reader, top["provenance"]),
        quantities=reader.quantities,
        document=top,
        folder=folder,
        hash=content_hash,
    )


def _parse_device(reader: _Reader, node: Any) -> Device:
    keys = ("name", "num_gpus", "memory_bytes", "idle_w", "active_w", "load_w")
    table = reader.table(node, "device", keys)
    watts = {key: reader.energy(table[key], f"device.{key}", key) for key in _WATTS}
    idle_w = watts["idle_w"]
    for key in ("active_w", "load_w"):
        power_w = watts[key]
        if idle_w is not None and power_w is not None and power_w < idle_w:
            raise reader.fail(
                f"device.{key}",
                f"The value {power_w:g} was given; it includes the idle power, so it must "
                f"be at least idle_w ({idle_w:g}).",
            )
    return Device(
        name=reader.text(table["name"], "device.name"),
        num_gpus=reader.whole(table["num_gpus"], "device.num_gpus", 1),
        memory_bytes=reader.count(
            table["memory_bytes"], "device.memory_bytes", "memory_bytes", above_zero=True
        ),
        **{key: value or 0.0 for key, value in watts.items()},
    )


def _parse_loading(reader: _Reader, node: Any) -> Loading:
    table = reader.table(node, "loading", ("disk", "host"))
    links = {}
    for key in ("disk", "host"):
        place = f"loading.{key}"
        link = reader.table(table[key], place, ("alpha_s", "bytes_per_s"))
        links[key] = Link(
            alpha_s=reader.quantity(link["alpha_s"], f"{place}.alpha_s", "alpha_s"),
            bytes_per_s=reader.quantity(
                link["bytes_per_s"], f"{place}.bytes_per_s", "bytes_per_s", above_zero=True
            ),
        )
    return Loading(**links)


def _parse_model(reader: _Reader, name: str, node: Any, place: str) -> ModelProfile:
    keys = (
        "shape",
        "exit_layers",
        "tokenizer",
        "bytes_per_param",
        "bytes_per_kv_element",
        "exit_head_params",
        "workspace_bytes",
        "confidence",
        "batch_buckets",
        "batch_residual",
        "hull",
        "coefficients",
    )
    table = reader.table(node, place, keys, ("depth_residual",))
    confidence = reader.table(
        table["confidence"], f"{place}.confidence", ("kind", "default_threshold")
    )
    needed = [key for key in COEFFICIENTS if key not in OPTIONAL_COEFFICIENTS]
    coefficients = reader.table(
        table["coefficients"], f"{place}.coefficients", needed, OPTIONAL_COEFFICIENTS
    )
    return ModelProfile(
        model=_parse_early_exit_model(reader, name, table, place),
        coefficients={
            key: reader.energy(coefficients[key], f"{place}.coefficients.{key}", key)
            if key in coefficients
            else 0.0
            for key in COEFFICIENTS
        },
        batch_buckets=_parse_buckets(reader, table["batch_buckets"], f"{place}.batch_buckets"),
        batch_residual=_parse_residual(reader, table, place, "batch_residual"),
        depth_residual=_parse_residual(reader, table, place, "depth_residual"),
        hull=_parse_hull(reader, table["hull"], f"{place}.hull"),
        workspace_bytes=reader.count(
            table["workspace_bytes"], f"{place}.workspace_bytes", "workspace_bytes"
        ),
        confidence=Confidence(
            kind=reader.text(confidence["kind"], f"{place}.confidence.kind", CONFIDENCE_KINDS),
            default_threshold=reader.quantity(
                confidence["default_threshold"],
                f"{place}.confidence.default_threshold",
                "default_threshold",
                maximum=1.0,
            ),
        ),
    )


def _parse_residual(
    reader: _Reader, table: dict[str, Any], place: str, name: str
) -> tuple[tuple[float, float], ...]:
    node = table.get(name)
    return () if node is None else reader.knots(node, f"{place}.{name}", name)


def _parse_early_exit_model(
    reader: _Reader, name: str, table: dict[str, Any], place: str
) -> EarlyExitModel:
    spot = f"{place}.shape"
    shape_table = reader.table(
        table["shape"],
        spot,
        ("family", *SHAPE_COUNTS, "tied_head", "grade", "source"),
        ("final_norm",),
    )
    for key in ("tied_head", "final_norm"):
        if not isinstance(shape_table.get(key, True), bool):
            raise reader.fail(f"{spot}.{key}", "true or false was expected.")
    family = reader.text(shape_table["family"], f"{spot}.family", FAMILIES)
    grade = reader.text(shape_table["grade"], f"{spot}.grade", GRADES)
    source = reader.text(shape_table["source"], f"{spot}.source")
    counts = {}
    for key in SHAPE_COUNTS:
        counts[key] = reader.whole(shape_table[key], f"{spot}.{key}", 1)
        reader.quantities[f"{spot}.{key}"] = Quantity(float(counts[key]), "1", grade, source)
    shape = ModelShape(
        family=cast(Family, family),
        tied_head=shape_table["tied_head"],
        final_norm=shape_table.get("final_norm", True),
        **counts,
    )
    exits_place = f"{place}.exit_layers"
    exits = reader.quantities_list(table["exit_layers"], exits_place, "exit_layers")
    for layer in exits:
        if layer != int(layer):
            raise reader.fail(exits_place, f"Exit layer {layer} was given; it must be whole.")
        if layer > shape.layers:
            raise reader.fail(
                exits_place,
                f"An exit after layer {layer:g} was given; the model has {shape.layers} layers.",
            )
    try:
        return EarlyExitModel(
            name=name,
            shape=shape,
            exit_layers=tuple(int(layer) for layer in exits),
            tokenizer=reader.text(table["tokenizer"], f"{place}.tokenizer"),
            bytes_per_param=reader.whole(table["bytes_per_param"], f"{place}.bytes_per_param", 1),
            bytes_per_kv_element=reader.whole(
                table["bytes_per_kv_element"], f"{place}.bytes_per_kv_element", 1
            ),
            exit_head_params=reader.count(
                table["exit_head_params"], f"{place}.exit_head_params", "exit_head_params"
            ),
        )
    except InputError:
        raise
    except ValueError as error:
        raise reader.fail(exits_place, str(error)) from error


def _parse_buckets(reader: _Reader, node: Any, place: str) -> tuple[int, ...]:
    if not isinstance(node, list):
        raise reader.fail(place, f"A list of batch sizes was expected, {shown(node)} was given.")
    buckets = tuple(reader.whole(item, f"{place}[{index}]", 1) for index, item in enumerate(node))
    if list(buckets) != sorted(set(buckets)):
        raise reader.fail(place, f"The batch sizes {list(buckets)} were given; they must rise.")
    return buckets


def _parse_hull(reader: _Reader, node: Any, place: str) -> Hull | None:
    if node is None:
        return None
    table = reader.table(node, place, ("max_batch", "max_context_tokens"))
    return Hull(
        max_batch=reader.whole(table["max_batch"], f"{place}.max_batch", 1),
        max_context_tokens=reader.whole(
            table["max_context_tokens"], f"{place}.max_context_tokens", 1
        ),
    )


def _parse_exits(
    reader: _Reader, node: Any, models: Mapping[str, ModelProfile], folder: Path
) -> MarkovExits | TraceExits:
    if not isinstance(node, dict) or "kind" not in node:
        raise reader.fail("exits", "An object with the key 'kind' was expected.")
    kind = reader.text(node["kind"], "exits.kind", ("trace", "markov"))
    if kind == "trace":
        table = reader.table(node, "exits", ("kind", "file"))
        name = reader.text(table["file"], "exits.file")
        if Path(name).name != name:
            raise reader.fail("exits.file", f"{name!r} was given; name a file of the profile.")
        if not (folder / name).is_file():
            raise reader.fail("exits.file", f"The profile's folder holds no file {name!r}.")
        return TraceExits(folder / name)
    return _parse_markov(reader, node, models)


def _parse_markov(
    reader: _Reader, node: dict[str, Any], models: Mapping[str, ModelProfile]
) -> MarkovExits:
    plain = ("kind", "domains", "num_positions", "seed")
    numbers = ("nominal_threshold", "stickiness", "correlation", "disagreement_penalty_nats")
    table = reader.table(node, "exits", (*plain, *numbers, "agreement", "candidates"))
    domains = reader.texts(table["domains"], "exits.domains")
    if not domains or len(set(domains)) != len(domains):
        raise reader.fail("exits.domains", "Name at least one domain, and none twice.")
    agreement_keys = ("step_confidence", "below", "at_or_above")
    agreement_table = reader.table(table["agreement"], "exits.agreement", agreement_keys)
    agreement = Agreement(
        **{
            key: reader.quantity(agreement_table[key], f"exits.agreement.{key}", key, maximum=1.0)
            for key in agreement_keys
        }
    )
    if agreement.below > agreement.at_or_above:
        raise reader.fail(
            "exits.agreement", "'below' must not exceed 'at_or_above': confidence must help."
        )
    nominal = reader.quantity(
        table["nominal_threshold"],
        "exits.nominal_threshold",
        "nominal_threshold",
        maximum=0.999,
        above_zero=True,
    )
    values = {
        key: reader.quantity(table[key], f"exits.{key}", key, maximum=0.999)
        for key in ("stickiness", "correlation")
    }
    candidates = reader.named(table["candidates"], "exits.candidates")
    for name in candidates:
        if name not in models:
            raise reader.fail(
                "exits.candidates",
                f"{name!r} is not a model of this profile.{did_you_mean(name, models)}",
            )
    for name in models:
        if name not in candidates:
            raise reader.fail("exits.candidates", f"The model {name!r} is missing.")
    return MarkovExits(
        domains=domains,
        num_positions=reader.whole(table["num_positions"], "exits.num_positions", 1),
        seed=reader.whole(table["seed"], "exits.seed"),
        nominal_threshold=nominal,
        agreement=agreement,
        disagreement_penalty_nats=reader.quantity(
            table["disagreement_penalty_nats"],
            "exits.disagreement_penalty_nats",
            "disagreement_penalty_nats",
        ),
        candidates={
            name: _parse_markov_candidate(
                reader,
                candidates[name],
                f"exits.candidates.{name}",
                domains,
                profile.model.exit_layers,
            )
            for name, profile in models.items()
        },
        **values,
    )


def _parse_markov_candidate(
    reader: _Reader,
    node: Any,
    place: str,
    domains: tuple[str, ...],
    exit_layers: tuple[int, ...],
) -> MarkovCandidate:
    table = reader.table(node, place, ("perplexity", "exit_shares"))
    shares_table = reader.table(table["exit_shares"], f"{place}.exit_shares", domains)
    shares = {}
    for domain in domains:
        spot = f"{place}.exit_shares.{domain}"
        given = reader.quantities_list(shares_table[domain], spot, "exit_shares")
        if len(given) != len(exit_layers):
            raise reader.fail(
                spot,
                f"{len(given)} shares were given for the {len(exit_layers)} exits "
                f"{list(exit_layers)}.",
            )
        if abs(sum(given) - 1.0) > 1e-4:
            raise reader.fail(spot, f"The shares sum to {sum(given):.6g}; they must sum to 1.")
        shares[domain] = given
    perplexity = reader.quantity(
        table["perplexity"], f"{place}.perplexity", "perplexity", minimum=1.0
    )
    return MarkovCandidate(exit_layers, shares, perplexity)


def _parse_provenance(reader: _Reader, node: Any) -> Provenance:
    table = reader.table(node, "provenance", ("origin", "sources", "notes"), ("environment",))
    environment = table.get("environment", {})
    if not isinstance(environment, dict):
        raise reader.fail("provenance.environment", "An object was expected.")
    return Provenance(
        origin=reader.text(table["origin"], "provenance.origin", ORIGINS),
        sources=reader.texts(table["sources"], "provenance.sources"),
        notes=reader.texts(table["notes"], "provenance.notes"),
        environment=environment,
    )
