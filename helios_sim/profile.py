"""The profile: what is known of models on a device, with what stands behind each number.

A profile is a folder with `profile.json`, and for a measured one `points.parquet` (every raw
reading) and `exits.parquet` (exit traces). Every number in it is a quantity: a value, its unit,
a grade and a source. What a simulation needs is read into frozen dataclasses; the file itself
stays available as `Profile.document`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from helios_sim.cost import CAPTURE_COEFFICIENTS, COEFFICIENTS
from helios_sim.errors import InputError, did_you_mean, listed
from helios_sim.model import EarlyExitModel
from helios_sim.profiles.assumptions import Assumption

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
PROFILE_FILE: Final = "profile.json"
POINTS_FILE: Final = "points.parquet"
TRACES_FILE: Final = "exits.parquet"
PROFILE_FILES: Final = (PROFILE_FILE, POINTS_FILE, TRACES_FILE)
"""All that `save_profile` writes."""
STAND_INS: Final = "stand_ins"
"""Where a profile's environment names the models that leave as another one does."""

Array: TypeAlias = NDArray[np.float64]


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
    if len(knots) == 1:
        return np.full(len(at), float(knots[0][1]), dtype=np.float64)
    inside = np.clip(at, knots[0][0], knots[-1][0])
    return np.asarray(_through(tuple(map(tuple, knots)))(inside), dtype=np.float64)


@lru_cache(maxsize=256)
def _through(knots: tuple[tuple[float, float], ...]) -> Callable[[Array], Any]:
    """The curve through some knots: made once, since each run asks for the same ones again."""
    # Most profiles have no residual, and listing them should not wait for this import.
    from scipy.interpolate import PchipInterpolator

    places, factors = (np.array(column) for column in zip(*knots, strict=True))
    curve_of: Callable[[Array], Any] = PchipInterpolator(places, factors)
    return curve_of


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

    def pace_factor(self, core_s: float) -> float | None:
        """How many times longer known arithmetic took than around the readings; None unknown.

        `core_s` are the seconds that it took elsewhere, such as beside a run.
        """
        usual_s = self.provenance.environment.get("reference_s")
        if not isinstance(usual_s, int | float) or usual_s <= 0.0:
            return None
        return core_s / usual_s

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
