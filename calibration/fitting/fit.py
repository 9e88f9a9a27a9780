"""Raw points become a profile: every number with its grade, source and error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting import regression
from calibration.fitting.fit_energy import EnergyFit, fit_energy, no_energy, unavailable
from calibration.fitting.fit_times import Number, TimesFit, fit_times, spread
from calibration.fitting.joint import Knots
from calibration.fitting.points import (
    FIT,
    HELD_OUT,
    gather,
    neighbours,
    of_quantity,
    read_environment,
    read_points,
    sound,
)
from calibration.measuring.readings import (
    ENVIRONMENT_FILE,
    MEMORY_KINDS,
    POINTS_FILE,
    READ,
    held_back_readings,
)
from calibration.training.trace_report import REPORT_FILE, is_of
from helios_sim.cost import COEFFICIENTS
from helios_sim.errors import InputError, listed
from helios_sim.exits import load_traces
from helios_sim.model import SHAPE_COUNTS, EarlyExitModel, ModelShape
from helios_sim.profile import (
    PROFILE_FILE,
    STAND_INS,
    TRACES_FILE,
    MarkovExits,
    Profile,
    quantity,
)
from helios_sim.profiles.files import check_target, load_profile, save_profile
from helios_sim.profiles.parsing import CONFIDENCE_KINDS, FAMILIES, SCHEMA_VERSION
from helios_sim.runs.columns import write_table
from helios_sim.wording import counted

MODES: Final = ("auto", "graph", "eager")
_ASSUMED_RATE_BYTES_PER_S: Final = 3e9


@dataclass(frozen=True)
class FitSettings:
    """What is asked of a fit.

    `mode`: what the profile's times stand for; "auto" takes CUDA graphs where they were
    measured. `models`: those to keep, all by default. `exits`: a trace file, or a profile (folder
    or shipped name) whose exit statistics stand in; by default exits.parquet beside the points.
    """

    name: str | None = None
    mode: str = "auto"
    models: tuple[str, ...] = ()
    exits: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"The mode {self.mode!r} is unknown; allowed are {', '.join(MODES)}.")


@dataclass(frozen=True)
class _Measured:
    """One model as the measurement described it."""

    model: EarlyExitModel
    confidence_kind: str
    threshold: float
    buckets: tuple[int, ...]
    random_weights: bool
    exits_chosen: bool


def fit_profile(folder: Path, out: Path, settings: FitSettings | None = None) -> Profile:
    """Fit the readings of a folder into a profile folder, and return it as loaded.

    The raw readings travel with the profile. Errors on left-out and held-out points are kept
    under `measurement`.
    """
    settings = settings or FitSettings()
    if folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"The readings in {folder} lie there, and a profile would take their place; give a "
            "folder for the profile that does not hold them.",
            where=str(out),
        )
    check_target(out, settings.overwrite)
    readings = read_points(folder)
    _check_mode(readings, settings.mode, folder)
    environment = read_environment(folder)
    where = str(folder / ENVIRONMENT_FILE)
    measured = {
        name: _measured_model(name, node, where)
        for name, node in _object(environment, "models", where).items()
        if not settings.models or name in settings.models
    }
    for name in settings.models:
        if name not in measured:
            known = ", ".join(_object(environment, "models", where))
            raise InputError(f"Model {name!r} was not measured; there are {known}.", where)
    document = _document(readings, environment, measured, settings, folder, out.name)
    document, traces = _with_exits(document, measured, settings, folder)
    report = _trace_report(traces)
    if report is not None:
        _check_confidence(report, measured, folder)
        document["measurement"]["exit_traces"] = report
    with TemporaryDirectory() as place:
        points = Path(place) / POINTS_FILE
        write_table(readings, points)
        return save_profile(
            document,
            out,
            points=points,
            traces=traces,
            overwrite=settings.overwrite,
            # Traces that do not fit the models leave no profile behind.
            check=load_traces,
        )


def _check_confidence(
    report: Mapping[str, Any], measured: Mapping[str, _Measured], folder: Path
) -> None:
    """Refuse traces of another confidence than the one that the models have now."""
    candidates = report.get("candidates")
    for name, model in measured.items():
        said = candidates.get(name) if isinstance(candidates, Mapping) else None
        kind = said.get("confidence") if isinstance(said, Mapping) else None
        if kind is not None and kind != model.confidence_kind:
            raise InputError(
                f"The exits of {name} were traced with the confidence {kind}, and it has "
                f"{model.confidence_kind} now; trace them again with helios-calibrate measure "
                "--resume.",
                str(folder),
            )


def _check_mode(readings: pl.DataFrame, mode: str, folder: Path) -> None:
    """Refuse a mode that no decode was timed in."""
    decodes = readings.filter(pl.col("quantity") == "decode_layers")
    modes = sorted(set(decodes["mode"]) - {"", None})
    if mode != "auto" and modes and mode not in modes:
        raise InputError(
            f"Decodes were asked for in mode {mode!r} and were timed in {listed(modes)} alone; "
            "give --mode auto, or measure them so.",
            str(folder),
        )


def _object(node: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = node.get(key)
    if not isinstance(found, dict) or not found:
        raise InputError(f"The key {key!r} must hold an object that is not empty.", where)
    return found


def _measured_model(name: str, node: Any, where: str) -> _Measured:
    """A model from the measurement's environment."""
    place = f"{where}, models.{name}"
    try:
        shape = node["shape"]
        if shape["family"] not in FAMILIES:
            raise InputError(f"The family {shape['family']!r} is unknown.", place)
        model = EarlyExitModel(
            name=name,
            shape=ModelShape(
                family=shape["family"],
                tied_head=bool(shape["tied_head"]),
                final_norm=bool(shape.get("final_norm", True)),
                **{key: int(shape[key]) for key in SHAPE_COUNTS},
            ),
            exit_layers=tuple(int(layer) for layer in node["exit_layers"]),
            tokenizer=str(node["tokenizer"]),
            bytes_per_param=int(node["bytes_per_param"]),
            bytes_per_kv_element=int(node["bytes_per_kv_element"]),
            exit_head_params=int(node.get("exit_head_params", 0)),
        )
        confidence = node.get("confidence") or {}
        kind = confidence.get("kind", "max-softmax")
        if confidence.get("calibrated") and not kind.startswith("calibrated-"):
            kind = f"calibrated-{kind}"
        if kind not in CONFIDENCE_KINDS:
            raise InputError(f"The confidence kind {kind!r} is unknown.", place)
        return _Measured(
            model,
            kind,
            float(confidence.get("threshold", 0.5)),
            tuple(int(batch) for batch in node.get("batch_buckets") or ()),
            node.get("weights") == "random",
            bool(node.get("exits_chosen", node.get("weights") == "random")),
        )
    except KeyError as error:
        raise InputError(f"The key {error} is missing; measure again.", place) from error
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"The model's description cannot be used: {error}.", place) from error


def _document(
    readings: pl.DataFrame,
    environment: Mapping[str, Any],
    measured: Mapping[str, _Measured],
    settings: FitSettings,
    folder: Path,
    name: str,
) -> dict[str, Any]:
    """The content of profile.json without its exits."""
    kept = sound(readings)
    points = gather(kept)
    left_out = _count_by_model(readings)
    left_out.subtract(_count_by_model(kept))
    device = _object(environment, "device", str(folder / ENVIRONMENT_FILE))
    why_not = _why_no_energy(environment)
    idle = _idle(readings, why_not)
    times = {
        one: fit_times(
            points.filter(pl.col("model") == one),
            found.model,
            mode=settings.mode,
            buckets=found.buckets,
            where=str(folder / POINTS_FILE),
        )
        for one, found in measured.items()
    }
    energy = _energies(points, measured, times, idle.value, _limit(device), why_not, left_out)
    links, link_record = _links(points)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": settings.name or name,
        "description": f"{', '.join(measured)} measured on {device['name']}",
        "device": _device_node(device, idle, energy, points),
        "loading": links,
        "models": {
            one: _model_node(found, times[one], energy[one], points)
            for one, found in measured.items()
        },
        "provenance": {
            "origin": "measured",
            "sources": [f"readings of {device['name']}"],
            "notes": [
                *_notes(
                    times, energy, left_out, neighbours(readings), held_back_readings(readings)
                ),
                *_cached_note(link_record["disk"]),
            ],
            "environment": {key: node for key, node in environment.items() if key != "models"},
        },
        "measurement": _measurement(points, environment, measured, times, energy, link_record),
    }


def _energies(
    points: pl.DataFrame,
    measured: Mapping[str, _Measured],
    times: Mapping[str, TimesFit],
    idle_w: float | None,
    limit: Number,
    why_not: str,
    left_out: Mapping[str, int],
) -> dict[str, EnergyFit]:
    """The energy of every model, or of none: candidates must compare."""
    energy = {
        one: fit_energy(
            points.filter(pl.col("model") == one),
            found.model,
            idle_w,
            limit,
            why_not,
            times[one].padded_share,
            left_out[one],
        )
        for one, found in measured.items()
    }
    missing = [one for one, fit in energy.items() if not fit.record["available"]]
    if not missing:
        return energy
    why = energy[missing[0]].record["why"]
    if len(missing) < len(energy):
        why = f"not every model's energy was read: {', '.join(missing)} ({why})"
        energy = dict.fromkeys(energy, no_energy(why, limit))
    return energy


def _measurement(
    points: pl.DataFrame,
    environment: Mapping[str, Any],
    measured: Mapping[str, _Measured],
    times: Mapping[str, TimesFit],
    energy: Mapping[str, EnergyFit],
    link_record: Mapping[str, Any],
) -> dict[str, Any]:
    """What a profile keeps of how it was come by."""
    floors = _floors(points)
    return {
        "floors": floors,
        "loading": link_record,
        "memory": _memory_record(points, measured),
        "graph_capture": _median_seconds(points, "graph_capture"),
        "unload": _median_seconds(points, "unload"),
        "models": {
            one: {
                **times[one].record,
                "energy": energy[one].record,
                **_described(environment["models"][one]),
                "against_floor": _against_floor(points, found.model, times[one], floors),
            }
            for one, found in measured.items()
        },
    }


def _count_by_model(readings: pl.DataFrame) -> Counter[str]:
    return Counter(readings["model"].to_list())


def _notes(
    times: Mapping[str, TimesFit],
    energy: Mapping[str, EnergyFit],
    left_out: Mapping[str, int],
    busy: str | None,
    held_back: str | None,
) -> list[str]:
    modes = sorted(
        {fit.modes["decode_layers"] or "the one mode measured" for fit in times.values()}
    )
    notes = [f"Decode times stand for: {', '.join(modes)}."]
    for name, fit in times.items():
        hull = fit.hull
        notes.append(
            f"{name}: measured up to batch {hull.max_batch} and {hull.max_context_tokens} tokens "
            "of context; beyond it a prediction extrapolates."
        )
    reasons = {fit.record["why"] for fit in energy.values() if not fit.record["available"]}
    notes += [f"Energy is unavailable: {why}." for why in sorted(reasons)]
    notes += [
        f"{name}: {counted(left_out[name], 'short energy window')} left out, since longer ones "
        "suffice."
        for name in energy
        if left_out[name]
    ]
    notes += [f"{said}." for said in (held_back, busy) if said]
    return notes


def _described(described: Mapping[str, Any]) -> dict[str, Any]:
    """Which kernels its times and which weights its exits stand for, as far as it is known."""
    kept = {key: described.get(key) for key in ("kernels", "guard")}
    return {key: value for key, value in kept.items() if value is not None}


def _cached_note(disk: Mapping[str, Any]) -> list[str]:
    """That loads may have met the system's memory in place of the disk, where they may."""
    if "cached" not in disk:
        return []
    cached, points = disk["cached"]
    return [
        f"Loading from disk: {cached} of {points} points may be of the system's cache, so that a "
        "load that meets the disk may take longer."
    ]


def _why_no_energy(environment: Mapping[str, Any]) -> str:
    """Why there is no energy, in the measurement's own words where it has some."""
    meter = environment.get("meter")
    meter = meter if isinstance(meter, Mapping) else {}
    if meter.get("source", "none") != "none":
        return f"the meter {meter['source']} gave no sound window of decode"
    said = meter.get("explanation") or "no energy meter was there when it was measured"
    return str(said).rstrip(".")


def _idle(readings: pl.DataFrame, why_not: str) -> Number:
    """Watts with nothing to do, by the windows at the start and at the end of each measurement."""
    watts = readings.filter(pl.col("quantity") == "idle_power")["watts"].drop_nulls().to_numpy()
    if not len(watts):
        return unavailable(why_not)
    error = float(np.std(watts, ddof=1)) / math.sqrt(len(watts)) if len(watts) > 1 else None
    source = f"median of {len(watts)} idle windows, no model loaded"
    return Number(float(np.median(watts)), "measured", source, error)


def _load_power(points: pl.DataFrame, idle_w: float, active: Number) -> Number:
    """Watts while weights move, which include the idle power whatever their windows read."""
    watts = points.filter(pl.col("quantity") == "load_energy")["watts"].drop_nulls().to_numpy()
    if not len(watts):
        return Number(active.value, "derived", "no power was read while weights moved; as active_w")
    read_w = float(np.median(watts))
    source = "a window of copies from page-locked memory"
    if read_w < idle_w:
        return Number(idle_w, "derived", f"{source} read {read_w:.4g} W, below idle_w; as idle_w")
    return Number(read_w, "measured", source)


def _limit(device: Mapping[str, Any]) -> Number:
    limit = device.get("power_limit_w")
    if limit is None:
        return unavailable("the device names no power limit")
    return Number(float(limit), "measured", "the board's enforced limit, read and not set")


def _device_node(
    device: Mapping[str, Any],
    idle: Number,
    energy: Mapping[str, EnergyFit],
    points: pl.DataFrame,
) -> dict[str, Any]:
    known = [fit.numbers["power.active_w"] for fit in energy.values()]
    if all(number.value is not None for number in known):
        active = min(known, key=lambda number: number.value or 0.0)
        load = _load_power(points, idle.value or 0.0, active)
    else:
        active = load = known[0]
    try:
        memory = Number(
            float(int(device["memory_bytes"])), "measured", "as the device or its driver says"
        )
        return {
            "name": str(device["name"]),
            "num_gpus": int(device.get("num_gpus", 1)),
            "memory_bytes": _entry("memory_bytes", memory, whole=True),
            "idle_w": _entry("idle_w", idle),
            "active_w": _entry("active_w", active),
            "load_w": _entry("load_w", load),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The device's description cannot be used: {error}.") from error


def _entry(name: str, number: Number, whole: bool = False) -> dict[str, Any]:
    """A number as the file holds it, at digits that outlast its error."""

    def short(value: float | None) -> float | int | None:
        if value is None:
            return None
        return int(value) if whole else float(f"{value:.9g}")

    known = number.error is not None and math.isfinite(number.error)
    error = float(f"{number.error:.3g}") if known else None
    return quantity(name, short(number.value), number.grade, number.source, error)


def _exits_of(found: _Measured) -> tuple[str, str]:
    """The grade and the source of a model's exits."""
    if found.exits_chosen:
        return "assumed", "exits chosen for the measurement, which the model itself does not name"
    return "measured", "the checkpoint's configuration"


def _model_node(
    found: _Measured, times: TimesFit, energy: EnergyFit, points: pl.DataFrame
) -> dict[str, Any]:
    """A model's entry in the profile."""
    model, shape = found.model, found.model.shape
    numbers = {**energy.numbers, **times.numbers}
    grade = "published" if found.random_weights else "measured"
    source = (
        "public model configuration, weights random"
        if found.random_weights
        else "the checkpoint's configuration"
    )
    return {
        "shape": {**shape.as_table(), "grade": grade, "source": source},
        "exit_layers": quantity("exit_layers", list(model.exit_layers), *_exits_of(found)),
        "tokenizer": model.tokenizer,
        "bytes_per_param": model.bytes_per_param,
        "bytes_per_kv_element": model.bytes_per_kv_element,
        "exit_head_params": quantity(
            "exit_head_params",
            model.exit_head_params,
            *(_exits_of(found) if found.random_weights else (grade, source)),
        ),
        "workspace_bytes": _entry("workspace_bytes", _workspace(points, found, times), whole=True),
        "confidence": {
            "kind": found.confidence_kind,
            "default_threshold": quantity(
                "default_threshold", found.threshold, "assumed", "set with the model, not measured"
            ),
        },
        "batch_buckets": list(times.buckets),
        "batch_residual": _knots("batch_residual", times.batch_residual, "batch"),
        "depth_residual": _knots("depth_residual", times.depth_residual, "loaded depth"),
        "hull": {
            "max_batch": times.hull.max_batch,
            "max_context_tokens": times.hull.max_context_tokens,
        },
        "coefficients": {name: _entry(name, numbers[name]) for name in COEFFICIENTS},
    }


def _knots(name: str, knots: Knots, by: str) -> dict[str, Any] | None:
    """A residual as the file holds it; null where none was kept."""
    if not knots:
        return None
    short = [[float(place), float(f"{factor:.6g}")] for place, factor in knots]
    return quantity(name, short, "measured", f"factor on the decode layers, by measured {by}")


def _workspace(points: pl.DataFrame, found: _Measured, times: TimesFit) -> Number:
    mine = points.filter(
        (pl.col("quantity") == "memory_workspace")
        & pl.col("model").is_in([found.model.name, ""])
        & pl.col("bytes").is_not_null()
    )
    if mine.height:
        largest = float(mine["bytes"].max())  # type: ignore[arg-type]
        return Number(largest, "measured", f"the most over {mine.height} loads of work")
    shape = found.model.shape
    rows = times.hull.max_batch
    estimate = rows * (2 * shape.ffn + 4 * shape.hidden + shape.vocab) * found.model.bytes_per_param
    return Number(
        float(estimate), "assumed", f"not measured; activations and logits of {rows} rows"
    )


@dataclass(frozen=True)
class _Link:
    alpha: Number
    rate: Number
    record: dict[str, Any]


def _links(points: pl.DataFrame) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ways weights take, and how well a start and a rate describe them.

    Opening a file is timed by itself too; the disk's readings hold it already.
    """
    host = next(
        (
            name
            for name in ("load_host_pinned", "load_host")
            if of_quantity(points, name, purpose=FIT).height
        ),
        "load_host",
    )
    disk_link = _link(points, "load_disk", "disk to host memory")
    host_link = _link(points, host, "host memory to device")
    nodes = {
        "disk": {
            "alpha_s": _entry("alpha_s", disk_link.alpha),
            "bytes_per_s": _entry("bytes_per_s", disk_link.rate),
        },
        "host": {
            "alpha_s": _entry("alpha_s", host_link.alpha),
            "bytes_per_s": _entry("bytes_per_s", host_link.rate),
        },
    }
    return nodes, {
        "open_s": _median_seconds(points, "load_open"),
        "disk": disk_link.record,
        "host": {"stands_for": host, **host_link.record},
    }


def _link(points: pl.DataFrame, name: str, way: str) -> _Link:
    """Alpha and rate of seconds = alpha + bytes / rate, in least relative error."""
    fitted = of_quantity(points, name, purpose=FIT).filter(pl.col("bytes") > 0)
    if not fitted.height:
        assumed = f"{name} was not measured"
        return _Link(
            Number(0.0, "assumed", assumed),
            Number(_ASSUMED_RATE_BYTES_PER_S, "assumed", assumed),
            {"why": assumed},
        )
    size = fitted["bytes"].cast(pl.Float64).to_numpy()
    seconds = fitted["seconds"].to_numpy()
    line = np.column_stack((np.ones(len(size)), size))
    chosen = regression.fit_plane(line, seconds, alike=size)
    (alpha, slope), (alpha_error, slope_error) = chosen.plane(0) or (np.zeros(2), np.zeros(2))
    source, grade = f"{way}: fitted to {fitted.height} points of {name}", "measured"
    errors: tuple[float | None, float | None] = None, None
    if slope > 0.0 and len(np.unique(size)) > 1:
        errors = float(alpha_error), float(slope_error / slope**2)
    else:
        # Loads too small or too alike to tell a start from a rate.
        slope, alpha = float(np.median(seconds / size)), 0.0
        source = f"{source}: all of their time is charged to the bytes"
        grade = "derived"
    cached = int(fitted["cached"].sum())
    if cached:
        source += f", of which {cached} may be of the system's cache: assumed to be of the disk"
        grade = "derived"
    held_out = of_quantity(points, name, purpose=HELD_OUT).filter(pl.col("bytes") > 0)
    measured = held_out["seconds"].to_numpy()
    predicted = alpha + slope * held_out["bytes"].cast(pl.Float64).to_numpy()
    return _Link(
        Number(float(alpha), grade, source, errors[0]),
        Number(1.0 / float(slope), grade, source, errors[1]),
        {
            **({"cached": [cached, fitted.height]} if cached else {}),
            "errors": {
                "left_out": spread(chosen.left_out.errors),
                "held_out": spread(regression.relative_errors(predicted, measured)),
            },
        },
    )


def _median_seconds(points: pl.DataFrame, name: str) -> float | None:
    found = of_quantity(points, name)["seconds"]
    return float(found.median()) if len(found) else None  # type: ignore[arg-type]


def _floors(points: pl.DataFrame) -> dict[str, Any]:
    """What the device cannot go below, measured in the same run: copying and launching.

    By mode, since a copy within the device and one over the link are different floors.
    """
    copies = of_quantity(points, "copy_bandwidth").with_columns(
        rate=pl.col("bytes") / pl.col("seconds")
    )
    launches = of_quantity(points, "launch_floor")
    return {
        "copy_bytes_per_s": {
            str(mode): float(rate)
            for mode, rate in copies.group_by("mode").agg(pl.col("rate").max()).sort("mode").rows()
        },
        "launch_s_per_layer": {
            str(model): {
                str(mode): float(seconds)
                for mode, seconds in part.group_by("mode")
                .agg((pl.col("seconds") / pl.col("layers").fill_null(1).clip(1)).median())
                .sort("mode")
                .rows()
            }
            for (model,), part in launches.sort("model").group_by("model", maintain_order=True)
        },
    }


def device_floors(
    floors: Mapping[str, Any], model: str, mode: str
) -> tuple[float | None, float | None]:
    """Bytes per second that the device's memory gives, and seconds of launching one layer.

    The faster of copying and of only reading counts. None where it was not measured.
    """
    rates = floors.get("copy_bytes_per_s", {})
    launches = floors.get("launch_s_per_layer", {})
    own = launches.get(model, launches.get("", {}))
    known = [rates[mode] for mode in ("", READ) if mode in rates]
    return max(known, default=None), own.get(mode, own.get(""))


def _against_floor(
    points: pl.DataFrame,
    model: EarlyExitModel,
    times: TimesFit,
    floors: Mapping[str, Any],
) -> list[list[float]]:
    """By decode point at full depth: batch, context, seconds a layer, floor, their ratio.

    The floor is the larger of launching a layer and of reading its weights and KV at the measured
    memory rate. Empty where no floor was measured.
    """
    mode = times.modes["decode_layers"]
    rate, launch_s = device_floors(floors, model.name, mode)
    if not rate:
        return []
    rows = []
    decode = of_quantity(points.filter(pl.col("model") == model.name), "decode_layers", mode)
    for row in decode.filter(pl.col("layers") == pl.col("layers").max()).iter_rows(named=True):
        tokens = row["batch"] * (row["context_tokens"] or 0)
        read = model.layer_weight_bytes() + tokens * model.kv_bytes_per_token(1)
        floor_s = max(launch_s or 0.0, read / rate)
        layer_s = (row["seconds"] - times.overheads["decode"]) / row["layers"]
        rows.append([row["batch"], row["context_tokens"] or 0, layer_s, floor_s, layer_s / floor_s])
    return sorted(rows)


def _memory_record(
    points: pl.DataFrame, measured: Mapping[str, _Measured]
) -> dict[str, list[list[Any]]]:
    """By kind of memory: model, layers, batch, context, bytes measured and predicted."""
    record: dict[str, list[list[Any]]] = {}
    for kind in MEMORY_KINDS:
        found = points.filter(
            (pl.col("quantity") == kind)
            & pl.col("bytes").is_not_null()
            & pl.col("model").is_in(["", *measured])
        )
        record[kind] = [
            [
                row["model"],
                row["layers"],
                row["batch"],
                row["context_tokens"],
                row["bytes"],
                row["predicted_bytes"],
            ]
            for row in found.iter_rows(named=True)
        ]
    return record


def _with_exits(
    document: dict[str, Any],
    measured: Mapping[str, _Measured],
    settings: FitSettings,
    folder: Path,
) -> tuple[dict[str, Any], Path | None]:
    """The document with its exits, and the trace file to put beside it."""
    if settings.exits is None:
        path = folder / TRACES_FILE
        if not path.is_file():
            raise InputError(
                f"The readings have no {TRACES_FILE} beside them, and a profile needs to know "
                "where tokens leave: trace the checkpoints, or give --exits with a trace file or "
                "with a profile whose exit statistics stand in.",
                where=str(folder),
            )
        return _traced(document), path
    given = Path(settings.exits)
    if given.is_file() and given.name != PROFILE_FILE:
        return _traced(document), given
    source = load_profile(settings.exits)
    document = _with_borrowed(document, measured, source)
    if not isinstance(source.exits, MarkovExits):
        return _traced(document), source.exits.path
    node = dict(source.document["exits"])
    candidates = {}
    for name, found in measured.items():
        own = source.exits.candidates.get(name)
        if own is None or own.exit_layers != found.model.exit_layers:
            has = f"the exits {list(own.exit_layers)}" if own else "no such model"
            raise InputError(
                f"Profile {source.name!r} has {has} for {name!r}, which was measured with the "
                f"exits {list(found.model.exit_layers)}; give a profile or a trace with the same.",
                where="--exits",
            )
        candidates[name] = node["candidates"][name]
    return _in_order(document | {"exits": node | {"candidates": candidates}}), None


def _with_borrowed(
    document: dict[str, Any], measured: Mapping[str, _Measured], source: Profile
) -> dict[str, Any]:
    """The document of models whose exits are another profile's, with what belongs to these exits.

    They leave at the confidence that they were told with, and what they stand in for is said on.
    """
    provenance = dict(document["provenance"])
    provenance["notes"] = [
        *provenance["notes"],
        f"Exits were not measured: they are those of the profile {source.name!r}, at its grades.",
    ]
    stand_ins = {name: like for name, like in source.stand_ins.items() if name in measured}
    if stand_ins:
        provenance["environment"] = {**provenance["environment"], STAND_INS: stand_ins}
    models = dict(document["models"])
    for name in measured:
        if name in source.models:
            confidence = source.document["models"][name]["confidence"]
            models[name] = {**models[name], "confidence": confidence}
    return document | {"provenance": provenance, "models": models}


def _trace_report(traces: Path | None) -> dict[str, Any] | None:
    """What tracing wrote down about its texts and qualities, where it lies beside the traces."""
    if traces is None:
        return None
    path = traces.parent / REPORT_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The report on the traces cannot be read: {error}.", str(path)) from error
    if not isinstance(found, dict):
        return None
    if not is_of(found, traces):
        raise InputError(
            f"The report is of other traces than {traces.name}, as where tracing was interrupted; "
            "trace again with helios-calibrate trace, or measure --resume for those of readings.",
            str(path),
        )
    return found


def _traced(document: dict[str, Any]) -> dict[str, Any]:
    return _in_order(document | {"exits": {"kind": "trace", "file": TRACES_FILE}})


def _in_order(document: dict[str, Any]) -> dict[str, Any]:
    """Keys in the order readers expect: exits before where it all comes from."""
    last = ("exits", "provenance", "measurement")
    head = {key: value for key, value in document.items() if key not in last}
    return head | {key: document[key] for key in last}
