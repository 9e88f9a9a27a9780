"""Predicted against measured: a profile held to its own raw readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting.anchors import anchor_lines, beside_anchors
from calibration.fitting.points import (
    CAPTURES,
    EXIT_ITERATION,
    FIT,
    HELD_OUT,
    PREFILL_ITERATION,
    SPLIT_ITERATION,
    gather,
    neighbours,
    read_points,
    sound,
)
from calibration.fitting.predict import predictor_of
from calibration.measuring.readings import POINTS_FILE, held_back_readings
from helios_sim.errors import InputError
from helios_sim.profile import PROFILE_FILE, Profile
from helios_sim.wording import number

MEDIAN_BAR: Final = 0.03
P95_BAR: Final = 0.08
"""What held-out times on CUDA are held to; elsewhere they are stated beside the noise."""

MEMORY: Final = ("memory_weights", "memory_kv", "memory_workspace")
NAMES: Final = {
    "decode_layers": "decode, stacks of layers",
    "iteration": "decode, whole iteration",
    EXIT_ITERATION: "decode, all leaving at an exit",
    SPLIT_ITERATION: "decode, half leaving at an exit",
    "prefill_layers": "prefill, stacks of layers",
    PREFILL_ITERATION: "prefill, whole iteration",
    "head": "output head",
    "check": "exit check",
    "kv_fill": "KV filling",
    "capture_embed": "capturing a graph of embedding",
    "capture_run": "capturing a graph of layers",
    "capture_tell": "capturing a graph of an exit",
    "capture_fill": "capturing a graph of KV filling",
    "load_disk": "loading from disk",
    "load_host": "loading from host memory",
    "load_host_pinned": "loading from pinned memory",
    "decode_energy": "decode, energy",
    "prefill_energy": "prefill, energy",
    "head_energy": "output head, energy",
    "iteration_energy": "decode, whole iteration, energy",
    "prefill_iteration_energy": "prefill, whole iteration, energy",
    "memory_weights": "memory of weights",
    "memory_kv": "memory of KV",
    "memory_workspace": "memory of workspace",
}
"""Quantities that a profile predicts, in words."""


@dataclass(frozen=True)
class CheckRow:
    """One quantity of one model: sizes of relative errors, as shares.

    `median` and `p95` are of the held-out points, or of the fitted ones (`purpose`) where none
    were held out; `left_out_*` are from fits that did not see the point. `worst` is the largest
    error, at `where`. `noise` is the deviation among trials of one point.
    """

    model: str
    quantity: str
    mode: str
    purpose: str
    n: int
    median: float
    p95: float
    worst: float
    where: str
    left_out_median: float | None
    noise: float | None

    @property
    def within_bars(self) -> bool:
        """Whether median and 95th percentile lie under the bars."""
        return self.median < MEDIAN_BAR and self.p95 < P95_BAR

    @property
    def has_bars(self) -> bool:
        """Whether it is a time that the bars are for.

        Capturing is no part of a steady iteration, and each graph is captured and timed once.
        """
        others = (*MEMORY, *CAPTURES)
        return not self.quantity.endswith("_energy") and self.quantity not in others


def has_readings(profile: Profile) -> bool:
    """Whether raw readings travel with the profile."""
    return (profile.folder / POINTS_FILE).is_file()


def measurement_of(profile: Profile) -> Mapping[str, Any]:
    """What a profile keeps of its fit; raises `InputError` where no fit can have written it."""
    found = profile.document.get("measurement") or {}
    nodes = [("measurement", found)]
    if isinstance(found, Mapping):
        models, loading = found.get("models", {}), found.get("loading", {})
        nodes += [("measurement.models", models), ("measurement.loading", loading)]
        if isinstance(models, Mapping):
            nodes += [(f"measurement.models.{name}", node) for name, node in models.items()]
        if isinstance(loading, Mapping):
            nodes += [(f"measurement.loading.{k}", loading.get(k, {})) for k in ("disk", "host")]
    for place, node in nodes:
        if not isinstance(node, Mapping):
            raise InputError(
                "This must hold an object, as fit writes it; fit the readings again.",
                f"{profile.folder / PROFILE_FILE}, {place}",
            )
    return found


def compare(profile: Profile, points: pl.DataFrame | None = None) -> pl.DataFrame:
    """Every point of a profile's own readings with what the profile predicts for it.

    `points` are those readings, `sound` and gathered, where they were read already.
    Columns `measured`, `predicted` (seconds, joules or bytes) and `error` (relative) are added to
    those of `points.gather`; points of which nothing is predicted are left out, and so are windows
    that the fit leaves out.
    """
    measurement = measurement_of(profile)
    points = gather(sound(read_points(profile.folder))) if points is None else points
    predictors = {name: predictor_of(profile, name) for name in profile.models}
    kept_modes = {
        name: node.get("modes", {}) for name, node in measurement.get("models", {}).items()
    }
    host = measurement.get("loading", {}).get("host", {}).get("stands_for", "load_host")
    rows = []
    for row in points.iter_rows(named=True):
        quantity, name = row["quantity"], row["model"]
        found: tuple[float | None, float | None] = (None, None)
        if quantity in MEMORY:
            found = row["bytes"], row["predicted_bytes"]
        elif quantity.startswith("load_"):
            if quantity in ("load_disk", host):
                found = row["seconds"], next(iter(predictors.values())).seconds(row)
        elif name in predictors and quantity.endswith("_energy"):
            found = row["joules"], predictors[name].joules(row)
        elif name in predictors and row["mode"] == kept_modes.get(name, {}).get(quantity, ""):
            found = row["seconds"], predictors[name].seconds(row) if row["seconds"] else None
        measured, predicted = found
        if measured and predicted is not None:
            error = (predicted - measured) / measured
            rows.append(
                row | {"measured": float(measured), "predicted": float(predicted), "error": error}
            )
    extra = {"measured": pl.Float64(), "predicted": pl.Float64(), "error": pl.Float64()}
    return pl.DataFrame(rows, schema={**points.schema, **extra})


def check_rows(profile: Profile, compared: pl.DataFrame | None = None) -> list[CheckRow]:
    """Errors by model and quantity, in the order of `NAMES`."""
    compared = compare(profile) if compared is None else compared
    measurement = measurement_of(profile)
    order = {name: place for place, name in enumerate(NAMES)}
    rows = []
    for (model, quantity, mode), part in compared.group_by("model", "quantity", "mode"):
        purpose = HELD_OUT if (part["purpose"] == HELD_OUT).any() else FIT
        judged = part.filter(pl.col("purpose") == purpose)
        sizes = judged["error"].abs().to_numpy()
        at = int(np.argmax(sizes))
        left_out = _left_out(measurement, str(model), str(quantity))
        noise = part["noise"].drop_nulls()
        rows.append(
            CheckRow(
                model=str(model),
                quantity=str(quantity),
                mode=str(mode),
                purpose=purpose,
                n=len(sizes),
                median=float(np.median(sizes)),
                p95=float(np.quantile(sizes, 0.95)),
                worst=float(judged["error"][at]),
                where=place_of(judged.row(at, named=True)),
                left_out_median=left_out.get("median"),
                noise=float(noise.median()) if len(noise) else None,  # type: ignore[arg-type]
            )
        )
    return sorted(rows, key=lambda row: (row.model, order.get(row.quantity, 99), row.mode))


def _left_out(measurement: Mapping[str, Any], model: str, quantity: str) -> Mapping[str, Any]:
    """The left-out errors that the fit kept for a quantity."""
    if quantity.startswith("load_"):
        link = "disk" if quantity == "load_disk" else "host"
        node = measurement.get("loading", {}).get(link, {}).get("errors", {})
    else:
        kept = measurement.get("models", {}).get(model, {})
        if quantity.endswith("_energy"):
            node = kept.get("energy", {}).get("errors", {})
        else:
            node = kept.get("errors", {}).get(quantity, {})
    found = node.get("left_out") or {}
    return found if isinstance(found, Mapping) else {}


def place_of(row: Mapping[str, Any]) -> str:
    """Where a point lies, in words."""
    longest = row["longest_context_tokens"] or 0
    ragged = longest > (row["context_tokens"] or 0) and (row["batch"] or 1) > 1
    context = f"tokens of context (longest {longest:,})" if ragged else "tokens of context"
    parts = [
        f"{row[key]:,} {word}"
        for key, word in (
            ("layers", "layers"),
            ("batch", "rows"),
            ("context_tokens", context),
            ("prompt_tokens", "prompt tokens"),
        )
        if row[key] is not None and (row[key] or key == "batch")
    ]
    if not parts and row["bytes"]:
        return f"{row['bytes']:,} bytes"
    return ", ".join(parts)


def on_cuda(profile: Profile) -> bool:
    """Whether the readings were taken on a CUDA device, to which the bars apply."""
    device = profile.provenance.environment.get("device")
    return isinstance(device, Mapping) and device.get("kind") == "cuda"


def verdict(rows: Sequence[CheckRow], cuda: bool) -> str:
    """Whether the held-out times lie under the bars, in a sentence."""
    times = [row for row in rows if row.has_bars and row.purpose == HELD_OUT]
    if not times:
        return "No times were held out, so nothing can be said of new points."
    missed = [row for row in times if not row.within_bars]
    bars = f"median under {MEDIAN_BAR:.0%}, 95th percentile under {P95_BAR:.0%}"
    if not missed:
        return f"All {len(times)} kinds of held-out times meet the bars ({bars})."
    said = f"{len(missed)} of {len(times)} kinds of held-out times miss the bars ({bars})."
    if not cuda:
        said += " The bars are meant for a GPU of one's own; on a shared CPU see the noise beside."
    return said


def check_text(profile: Profile) -> str:
    """The check as text: one line a quantity, and the verdict."""
    if not has_readings(profile):
        return (
            f"No readings: {profile.name} is {profile.provenance.origin}, so there is nothing of "
            "its own to hold it to."
        )
    rows = check_rows(profile)
    titles = (
        "model", "quantity", "mode", "points", "n", "median", "p95", "left out", "noise", "bars",
        "worst", "where",
    )  # fmt: skip
    cells = [titles] + [
        (
            row.model or "device",
            NAMES[row.quantity],
            row.mode,
            row.purpose,
            str(row.n),
            percent(row.median),
            percent(row.p95),
            percent(row.left_out_median),
            percent(row.noise),
            "" if not row.has_bars or row.purpose != HELD_OUT else _passed(row),
            ("+" if row.worst >= 0 else "") + percent(row.worst),
            row.where,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    readings = read_points(profile.folder)
    said = [f"{one}." for one in (held_back_readings(readings), neighbours(readings)) if one]
    beside = anchor_lines(beside_anchors(profile))
    return "\n".join((*lines, verdict(rows, on_cuda(profile)), *said, *beside))


def _passed(row: CheckRow) -> str:
    return "pass" if row.within_bars else "miss"


def percent(share: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    if share is None:
        return "-"
    return f"{number(100 * share, 2 if abs(share) < 0.1 else 3)} %"
