"""Seconds of one model: readings become the coefficients of the simulator's cost model.

A decode layer is linear in (1, rows, context tokens, padded context tokens), a prefill layer in
(1, tokens, pairs); each may be bounded from below by a launch floor or by a second plane, and a
decode layer has factors by batch and by loaded depth. All of these are kept only where they clearly
lower the error on readings left out. What a stack of layers takes beside its layers is its
intercept over k; what a whole iteration takes is a start, and more for every row or prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from calibration.fitting import joint, regression
from calibration.fitting.fit_exits import Leaving, fit_leaving
from calibration.fitting.joint import BATCH, DEPTH, Growth, Knots, Loads
from calibration.fitting.points import (
    CAPTURES,
    EXIT_ITERATION,
    FIT,
    HELD_OUT,
    LEAVING,
    PREFILL_ITERATION,
    of_quantity,
    standing_mode,
)
from calibration.fitting.predict import Predictor, prefill_load
from calibration.fitting.regression import Chosen, Equations, Floats, MaxFit
from helios_sim import cost
from helios_sim.errors import InputError
from helios_sim.model import EarlyExitModel
from helios_sim.profile import Confidence, Hull, ModelProfile, curve

LAUNCH: Final = 0
MEMORY: Final = 1
COMPUTE: Final = 2
_DECODE_OPTIONS: Final = ((MEMORY,), (LAUNCH, MEMORY), (MEMORY, COMPUTE), (0, 1, 2))
_PREFILL_OPTIONS: Final = ((COMPUTE,), (LAUNCH, COMPUTE), (MEMORY, COMPUTE), (0, 1, 2))
_DECODE_NAMES: Final = (
    ("decode.launch_s",),
    (
        "decode.memory_s_per_layer",
        "decode.memory_s_per_row",
        "decode.memory_s_per_context_token",
        "decode.memory_s_per_padded_token",
    ),
    (
        "decode.compute_s_per_layer",
        "decode.compute_s_per_row",
        "decode.compute_s_per_context_token",
        "decode.compute_s_per_padded_token",
    ),
)
_PREFILL_NAMES: Final = (
    ("prefill.launch_s",),
    (
        "prefill.memory_s_per_layer",
        "prefill.memory_s_per_token",
        "prefill.memory_s_per_context_token",
    ),
    ("prefill.compute_s_per_layer", "prefill.compute_s_per_token", "prefill.compute_s_per_pair"),
)
_LEAST_POINTS: Final = {"decode_layers": 3, "prefill_layers": 2, "head": 1}
_LEAST_COUNTS: Final = {"iteration": 3, PREFILL_ITERATION: 2}
"""Counts of rows or prompts among whole iterations that tell what each adds to the start."""

TIMES: Final = (
    "decode_layers",
    "iteration",
    "prefill_layers",
    PREFILL_ITERATION,
    "head",
    "check",
    "kv_fill",
    *LEAVING,
    *CAPTURES,
)

_WITHIN_ITERATIONS: Final = "within iterations"
"""Stands for the mode of what was timed alone too, and then told better by iterations."""


@dataclass(frozen=True)
class Number:
    """A number on its way into a profile: value, grade, source, standard error."""

    value: float | None
    grade: str
    source: str
    error: float | None = None


_NO_OVERHEAD: Final = Number(
    0.0,
    "derived",
    "rows that stay keep their states by one short copy, and the pass they make later is charged "
    "its own decode.fixed_s",
)


@dataclass(frozen=True)
class TimesFit:
    """The times of one model: numbers by coefficient, and how they were come by.

    `record` is what the profile keeps of the fit under `measurement`.
    """

    numbers: Mapping[str, Number]
    batch_residual: Knots
    depth_residual: Knots
    buckets: tuple[int, ...]
    hull: Hull
    overheads: Mapping[str, float]
    modes: Mapping[str, str]
    record: Mapping[str, Any]

    @property
    def padded_share(self) -> float:
        """Share of a context token's time that goes by padded tokens; 0 where nothing tells."""
        own, padded = (
            self.numbers[name].value or 0.0 if name in self.numbers else 0.0
            for name in _DECODE_NAMES[MEMORY][2:]
        )
        return padded / (own + padded) if own + padded > 0.0 else 0.0


@dataclass(frozen=True)
class _Layers:
    """Decode or prefill layers fitted: the choice of planes, and the fixed parts."""

    chosen: Chosen
    readings: Equations
    points: pl.DataFrame
    knots: Mapping[str, Knots] = field(default_factory=dict)
    scores: Mapping[joint.Factors, float] = field(default_factory=dict)

    @property
    def stack_s(self) -> float:
        """What a timed stack takes beside its layers."""
        return float(self.chosen.fit.overheads[0])

    @property
    def iteration_s(self) -> float | None:
        """What an iteration takes beside layers and head; None where none was timed."""
        return float(self.chosen.fit.overheads[1]) if self.num_iterations else None

    @property
    def each_s(self) -> float | None:
        """What every row or prompt adds to that; None where the readings cannot tell."""
        return float(self.chosen.fit.overheads[2]) if self.readings.overheads.shape[1] > 2 else None

    @property
    def num_iterations(self) -> int:
        """Whole iterations among the points."""
        return int(self.readings.overheads[:, 1].sum())


def fit_times(
    points: pl.DataFrame,
    model: EarlyExitModel,
    *,
    mode: str = "auto",
    buckets: Sequence[int] = (),
    where: str = "points.parquet",
) -> TimesFit:
    """Fit the times of one model from its gathered points.

    `mode` names what the profile stands for ("graph", "eager", or "auto": graph where it was
    measured); `buckets` are the batches that graphs pad to, by default those the real backend
    captures.
    """
    modes = {quantity: standing_mode(points, quantity, mode) for quantity in TIMES}
    fitted = {quantity: of_quantity(points, quantity, modes[quantity], FIT) for quantity in TIMES}
    _check_points(fitted, model, where)
    if modes["decode_layers"] != "graph":
        buckets = ()
    elif not buckets:
        buckets = _captured_buckets(int(points["batch"].max() or 1))  # type: ignore[arg-type]
    said = _Said(modes)
    lines = {
        quantity: _floor_line(fitted[quantity])
        for quantity in ("head", "check", "kv_fill")
        if fitted[quantity].height
    }
    numbers = _head_numbers(lines, said, fitted)
    head = lines["head"]
    hull = _hull(points, modes["decode_layers"])
    decode = _decode(fitted, head, buckets, hull)
    prefill = _prefill(fitted, head)
    numbers |= _decode_numbers(decode, said)
    numbers |= _prefill_numbers(prefill, decode, said)
    numbers |= _fill_numbers(lines, numbers, model, said, fitted)
    captures = pl.concat([fitted[quantity] for quantity in CAPTURES])
    capture = _capture(captures) if modes["decode_layers"] == "graph" and captures.height else None
    numbers |= _capture_numbers(capture, captures, modes["decode_layers"])
    numbers |= dict.fromkeys(("rebatch.overhead_s", "rebatch.overhead_s_per_row"), _NO_OVERHEAD)
    overheads = {"decode": decode.stack_s, "prefill": prefill.stack_s}
    batch_residual = _stairs(decode.knots.get(BATCH, ()), buckets)
    depth_residual = decode.knots.get(DEPTH, ())
    kept = model_profile(model, numbers, tuple(buckets), batch_residual, hull, depth_residual)
    predictor = Predictor(kept, stack_overhead_s=overheads)
    left_out = {name: line.left_out.errors for name, line in lines.items()}
    left_out |= _errors_by_quantity(decode.points, decode.chosen)
    left_out |= _errors_by_quantity(prefill.points, prefill.chosen)
    if capture is not None:
        left_out |= _errors_by_quantity(captures, capture)
    leaving = None
    if modes[EXIT_ITERATION] == modes["decode_layers"]:
        leaving = fit_leaving(points, modes[EXIT_ITERATION], predictor.with_coefficients)
        numbers |= _leaving_numbers(leaving, said, fitted)
        modes |= dict.fromkeys(leaving.replaced, _WITHIN_ITERATIONS)
        left_out |= leaving.left_out
        predictor = predictor.with_coefficients(
            {name: value for name, (value, _) in leaving.values.items()}
        )
        kept = predictor.model
    else:
        # Those of another mode are nothing that this profile predicts.
        modes |= dict.fromkeys(LEAVING, "")
    record = {
        "modes": modes,
        "stack_overhead_s": overheads,
        "planes": {"decode": _planes_said(decode), "prefill": _planes_said(prefill)},
        "batch_residual": _factor_said(decode, BATCH),
        "depth_residual": _factor_said(decode, DEPTH),
        "errors": _errors(points, modes, predictor, left_out, captured=capture is not None),
        "leaving": leaving.record if leaving is not None else {},
        "launch_bound_share": launch_bound_share(points),
        "falls": falling_time(kept),
    }
    return TimesFit(
        numbers, batch_residual, depth_residual, tuple(buckets), hull, overheads, modes, record
    )


def _errors(
    points: pl.DataFrame,
    modes: Mapping[str, str],
    predictor: Predictor,
    left_out: Mapping[str, Floats],
    *,
    captured: bool,
) -> dict[str, Any]:
    """By quantity that was timed: errors of points left out and held out, and the noise.

    Graphs are judged only where they were captured for the mode that the profile stands for.
    """
    found = {}
    for quantity in TIMES:
        mode = modes[quantity]
        if quantity in CAPTURES and not captured:
            continue
        if not of_quantity(points, quantity, mode).height:
            continue
        held_out = of_quantity(points, quantity, mode, HELD_OUT)
        found[quantity] = {
            "left_out": spread(left_out.get(quantity, np.zeros(0))),
            "held_out": spread(errors_of(predictor, held_out)),
            "noise": _noise(points, quantity, mode),
        }
    return found


def _check_points(fitted: Mapping[str, pl.DataFrame], model: EarlyExitModel, where: str) -> None:
    """Refuse too few points, and rows that left where the model has no exit."""
    lacking = [
        f"{fitted[quantity].height} points of {quantity} instead of {least}"
        for quantity, least in _LEAST_POINTS.items()
        if fitted[quantity].height < least
    ]
    if lacking:
        raise InputError(
            f"Too little of model {model.name!r} was measured: {', '.join(lacking)}, at least. Go "
            "on measuring with --resume, or measure again with a larger budget.",
            where=where,
        )
    exits = pl.concat([fitted[quantity] for quantity in LEAVING])["layers"].unique().to_list()
    if strange := sorted(set(exits) - set(model.exit_layers)):
        raise InputError(
            f"Rows of model {model.name!r} left at layer {strange[0]}, which is none of its exits "
            f"{list(model.exit_layers)}; measure again with these exits.",
            where=where,
        )


def _errors_by_quantity(points: pl.DataFrame, chosen: Chosen) -> dict[str, Floats]:
    """Left-out errors of points that were fitted together, by what they are points of."""
    of = points["quantity"].to_numpy()
    return {quantity: chosen.left_out.errors[of == quantity] for quantity in np.unique(of)}


def model_profile(
    model: EarlyExitModel,
    numbers: Mapping[str, Number],
    buckets: tuple[int, ...],
    batch_residual: Knots,
    hull: Hull | None,
    depth_residual: Knots = (),
) -> ModelProfile:
    """A model profile with these times; whatever is not named is unavailable or 0."""
    values: dict[str, float | None] = dict.fromkeys(cost.COEFFICIENTS)
    values |= dict.fromkeys(cost.OPTIONAL_COEFFICIENTS, 0.0)
    values |= {name: number.value for name, number in numbers.items() if name in values}
    return ModelProfile(
        model=model,
        coefficients=values,
        batch_buckets=buckets,
        batch_residual=batch_residual,
        depth_residual=depth_residual,
        hull=hull,
        workspace_bytes=0,
        confidence=Confidence("max-softmax", 0.5),
    )


@dataclass(frozen=True)
class _Said:
    """Sources of measured numbers, in words."""

    modes: Mapping[str, str]

    def source(self, quantity: str, count: int, more: str = "") -> str:
        mode = f"{self.modes[quantity]} " if self.modes.get(quantity) else ""
        return f"fitted to {count} {mode}points of {quantity}{more}"


def _groups(points: pl.DataFrame) -> regression.Groups:
    """One group a cell of batch, contexts and prompt: all its depths are left out together."""
    cell = pl.struct("batch", "context_tokens", "longest_context_tokens", "prompt_tokens")
    cells = points.select(cell.rank("dense").alias("cell"))
    return cells["cell"].to_numpy().astype(np.int64)


def _column(points: pl.DataFrame, name: str) -> Floats:
    return points[name].cast(pl.Float64).fill_null(0.0).to_numpy().copy()


def _floor_line(points: pl.DataFrame) -> Chosen:
    """Head, check or KV filling: a floor and a line over rows, per layer where layers count."""
    layers = np.maximum(_column(points, "layers"), 1.0)
    if points["quantity"][0] != "kv_fill":
        layers = np.ones(points.height)
    return regression.fit_floor_line(_column(points, "batch"), _column(points, "seconds") / layers)


def _line_numbers(line: Chosen, names: tuple[str, str, str], source: str) -> dict[str, Number]:
    floor, base_and_slope = line.plane(regression.FLOOR), line.plane(regression.LINE)
    assert base_and_slope is not None
    (base, slope), (base_error, slope_error) = base_and_slope
    floor_name, base_name, slope_name = names
    numbers = {
        base_name: Number(float(base), "measured", source, float(base_error)),
        slope_name: Number(float(slope), "measured", source, float(slope_error)),
    }
    if floor is None:
        numbers[floor_name] = Number(0.0, "derived", f"no floor shows in the readings: {source}")
    else:
        numbers[floor_name] = Number(float(floor[0][0]), "measured", source, float(floor[1][0]))
    return numbers


def _head_numbers(
    lines: Mapping[str, Chosen], said: _Said, fitted: Mapping[str, pl.DataFrame]
) -> dict[str, Number]:
    names = ("head.floor_s", "head.base_s", "head.s_per_row")
    numbers = _line_numbers(lines["head"], names, said.source("head", fitted["head"].height))
    checks = ("check.floor_s", "check.base_s", "check.s_per_row")
    if "check" in lines:
        source = said.source("check", fitted["check"].height)
        return numbers | _line_numbers(lines["check"], checks, source)
    return numbers | {
        check: Number(numbers[name].value, "derived", f"not measured; as {name}")
        for check, name in zip(checks, names, strict=True)
    }


def _fill_numbers(
    lines: Mapping[str, Chosen],
    numbers: Mapping[str, Number],
    model: EarlyExitModel,
    said: _Said,
    fitted: Mapping[str, pl.DataFrame],
) -> dict[str, Number]:
    names = ("kv_fill.floor_s_per_layer", "kv_fill.base_s_per_layer", "kv_fill.s_per_row_layer")
    if "kv_fill" in lines:
        source = said.source("kv_fill", fitted["kv_fill"].height)
        return _line_numbers(lines["kv_fill"], names, source)
    share = kv_share(model)
    source = f"not measured; key and value projections are {share:.3g} of a layer's weights"
    layer = ("decode.launch_s", "decode.memory_s_per_layer", "decode.memory_s_per_row")
    return {
        name: Number(share * (numbers[whole].value or 0.0), "derived", source)
        for name, whole in zip(names, layer, strict=True)
    }


def _leaving_numbers(
    leaving: Leaving, said: _Said, fitted: Mapping[str, pl.DataFrame]
) -> dict[str, Number]:
    """Numbers that iterations tell; floors that stand for nothing any more are derived."""
    numbers = {}
    for name, (value, error) in leaving.values.items():
        quantity = leaving.sources[name]
        source = said.source(quantity, fitted[quantity].height, ", within iterations")
        grade = "derived" if ".floor_s" in name else "measured"
        numbers[name] = Number(value, grade, source, error if grade == "measured" else None)
    return numbers


def _capture(points: pl.DataFrame) -> Chosen:
    """Seconds of capturing: a graph, an exit's, each layer that is run, each that is filled."""
    layers = _column(points, "layers")
    kinds = points["quantity"]
    tells, runs, fills = (
        (kinds == f"capture_{kind}").to_numpy() for kind in ("tell", "run", "fill")
    )
    plane = np.column_stack((~tells, tells, layers * runs, layers * fills)).astype(np.float64)
    batches = _column(points, "batch")
    return regression.fit_plane(plane, _column(points, "seconds"), alike=batches)


def _capture_numbers(capture: Chosen | None, points: pl.DataFrame, mode: str) -> dict[str, Number]:
    count, kinds = points.height, set(points["quantity"])
    if capture is None:
        graphs = mode == "graph"
        why = "capturing was not timed" if graphs else "no graphs: decodes were timed eagerly"
        return {name: Number(0.0, "derived", why) for name in cost.CAPTURE_COEFFICIENTS}
    found = capture.plane(0)
    assert found is not None
    source = f"fitted to {count} points of capturing single graphs"
    numbers = {
        name: Number(float(value), "measured", source, float(error))
        for name, value, error in zip(cost.CAPTURE_COEFFICIENTS, *found, strict=True)
    }
    if "capture_tell" not in kinds:
        why = "no graph of what an exit says was captured: it is computed eagerly"
        numbers["capture.s_per_exit"] = Number(0.0, "derived", why)
    if "capture_fill" not in kinds:
        why = "no graph that fills was captured: one exit skips nothing"
        numbers["capture.s_per_filled_layer"] = Number(0.0, "derived", why)
    return numbers


def kv_share(model: EarlyExitModel) -> float:
    """Share of a layer's weights that project keys and values."""
    shape = model.shape
    return 2 * shape.hidden * shape.kv_heads * shape.head_dim / shape.layer_params()


def _captured_buckets(largest: int) -> tuple[int, ...]:
    # The graphs' module needs torch, which fitting can do without elsewhere.
    from calibration.model.graphs import buckets_up_to

    return buckets_up_to(largest)


def _decode(
    fitted: Mapping[str, pl.DataFrame],
    head: Chosen,
    buckets: Sequence[int],
    hull: Hull,
) -> _Layers:
    """Decode stacks and whole decode iterations together, at the rows computed."""
    points = pl.concat([fitted["decode_layers"], fitted["iteration"]])
    batch = _column(points, "batch")
    mean = _column(points, "context_tokens")
    longest = np.maximum(mean, _column(points, "longest_context_tokens"))
    ragged = (longest > mean) & (batch > 1.0)
    rows = padded(batch, buckets)
    tells = bool(ragged.any())
    planes = _decode_planes(rows, batch * mean, rows * longest, tells)
    readings = _readings(points, batch, head, planes)
    loads = Loads(readings, rows, _growth(hull, buckets, tells))
    found = joint.choose(loads, _DECODE_OPTIONS, _groups(points))
    chosen = _one_split(_ordered(found.chosen), readings, ragged)
    return _Layers(chosen, readings, points, found.knots, found.scores)


def _decode_planes(
    rows: Floats, context: Floats, padded_context: Floats, tells_padding: bool
) -> tuple[Floats, ...]:
    """Features by plane; all context counts as the rows' own where no ragged rows tell more."""
    ones = np.ones_like(rows)
    columns = (ones, rows, context) + ((padded_context,) if tells_padding else ())
    plane = np.stack(columns, axis=-1)
    return ones[..., None], plane, plane


def _growth(hull: Hull, buckets: Sequence[int], tells_padding: bool) -> Growth:
    """Features before and after a row of one token joins rows of equal contexts."""
    batches = np.arange(1.0, hull.max_batch + 2.0)
    rows = padded(batches, buckets)
    each = np.array(_contexts(hull))[:, None]
    held = each * batches[:-1]
    wide = [np.broadcast_to(part, held.shape) for part in (rows[:-1], rows[1:])]
    before, after = (
        _decode_planes(part, held + joined, part * each, tells_padding)
        for part, joined in zip(wide, (0.0, 1.0), strict=True)
    )
    return Growth(rows, before, after)


def padded(batch: Floats, buckets: Sequence[int]) -> Floats:
    """The rows computed for each batch: the next bucket, or the batch itself."""
    if not buckets:
        return batch
    known = np.array(sorted(buckets), dtype=np.float64)
    place = np.searchsorted(known, batch)
    inside = np.minimum(place, len(known) - 1)
    return np.where(place < len(known), known[inside], batch)


def _prefill(fitted: Mapping[str, pl.DataFrame], head: Chosen) -> _Layers:
    """Prefill stacks and whole prefill iterations together."""
    points = pl.concat([fitted["prefill_layers"], fitted[PREFILL_ITERATION]])
    loads = np.array([prefill_load(row) for row in points.iter_rows(named=True)])
    ones = np.ones(points.height)
    tokens, cached, pairs = loads.T
    planes = (
        ones[:, None],
        np.column_stack((ones, tokens, cached)),
        np.column_stack((ones, tokens, pairs)),
    )
    prompts = np.maximum(_column(points, "batch"), 1.0)
    readings = _readings(points, prompts, head, planes)
    chosen = regression.choose_planes(readings, _PREFILL_OPTIONS, _groups(points))
    return _Layers(_ordered(chosen), readings, points)


def _readings(
    points: pl.DataFrame, rows: Floats, head: Chosen, planes: tuple[Floats, ...]
) -> Equations:
    """Stacks and whole iterations of `rows` rows or prompts, each with its fixed parts.

    What a row or prompt adds to an iteration's start has a column where enough counts were timed.
    """
    iterations = points["quantity"].is_in(list(_LEAST_COUNTS)).to_numpy()
    whole = iterations.astype(np.float64)
    columns = [1.0 - whole, whole]
    kinds = set(points["quantity"]) & set(_LEAST_COUNTS)
    if kinds and len(np.unique(rows[iterations])) >= min(_LEAST_COUNTS[kind] for kind in kinds):
        columns.append(whole * rows)
    return Equations(
        seconds=_column(points, "seconds"),
        layers=_column(points, "layers"),
        known=whole * _line_seconds(head, rows),
        overheads=np.column_stack(columns),
        planes=planes,
    )


def _one_split(chosen: Chosen, readings: Equations, ragged: NDArray[np.bool_]) -> Chosen:
    """A plane that bounds no ragged reading takes its padded share of context from the other.

    Context and padded context are the same on it, so that only their sum was fitted.
    """
    full = [chosen.planes.index(place) for place in (MEMORY, COMPUTE) if place in chosen.planes]
    if len(full) < 2 or not ragged.any():
        return chosen
    bounds = regression.assignment(readings.with_planes(chosen.planes), chosen.fit)
    told = [at for at in full if (ragged & (bounds == at)).any()]
    if len(told) != 1:
        return chosen
    (teller,) = told
    (other,) = set(full) - {teller}
    planes = list(chosen.fit.planes)
    context, beyond = planes[teller][2:]
    share = beyond / (context + beyond) if context + beyond > 0.0 else 1.0
    both = planes[other][2:].sum()
    planes[other] = np.array([*planes[other][:2], (1.0 - share) * both, share * both])
    return replace(chosen, fit=replace(chosen.fit, planes=tuple(planes)))


def _line_seconds(line: Chosen, rows: Floats) -> Floats:
    """Seconds of a floor and a line."""
    floor, base_and_slope = line.plane(regression.FLOOR), line.plane(regression.LINE)
    assert base_and_slope is not None
    base, slope = base_and_slope[0]
    least = float(floor[0][0]) if floor is not None else 0.0
    return np.asarray(np.maximum(least, base + slope * rows), dtype=np.float64)


def _ordered(chosen: Chosen) -> Chosen:
    """Of two full planes the one with the larger constant is memory: it reads the weights."""
    if MEMORY not in chosen.planes or COMPUTE not in chosen.planes:
        return chosen
    memory, compute = chosen.planes.index(MEMORY), chosen.planes.index(COMPUTE)
    planes = chosen.fit.planes
    if planes[memory][0] >= planes[compute][0]:
        return chosen
    order = list(range(len(planes)))
    order[memory], order[compute] = compute, memory
    errors = chosen.fit.like(chosen.left_out.standard_errors)

    def swapped(fit: MaxFit) -> MaxFit:
        return MaxFit(fit.overheads, tuple(fit.planes[at] for at in order))

    return replace(
        chosen,
        fit=swapped(chosen.fit),
        left_out=replace(chosen.left_out, standard_errors=swapped(errors).flat()),
    )


def _plane_numbers(
    layers: _Layers, names: Sequence[tuple[str, ...]], source: str
) -> dict[str, Number]:
    """The numbers of the planes that were kept."""
    numbers: dict[str, Number] = {}
    for place, plane_names in enumerate(names):
        found = layers.chosen.plane(place)
        if found is None:
            continue
        # A feature that the readings cannot tell has no coefficient; it would be the last.
        for name, value, error in zip(plane_names, *found, strict=False):
            numbers[name] = Number(float(value), "measured", source, float(error))
    return numbers


def _decode_numbers(decode: _Layers, said: _Said) -> dict[str, Number]:
    source = said.source("decode_layers", decode.points.height - decode.num_iterations)
    numbers = _plane_numbers(decode, _DECODE_NAMES, source)
    if LAUNCH not in decode.chosen.planes:
        numbers["decode.launch_s"] = Number(
            0.0, "derived", "no floor below the plane shows in the readings"
        )
    if COMPUTE not in decode.chosen.planes:
        numbers["decode.compute_s_per_layer"] = Number(
            0.0, "derived", "one plane fits; beside a prefill the weights are read once"
        )
        for own, lent in zip(_DECODE_NAMES[MEMORY][1:], _DECODE_NAMES[COMPUTE][1:], strict=True):
            if own in numbers:
                numbers[lent] = Number(
                    numbers[own].value,
                    "derived",
                    f"one plane fits; beside a prefill its work adds to the prefill's: {own}",
                )
    for names in _DECODE_NAMES[MEMORY:]:
        numbers.setdefault(
            names[-1],
            Number(0.0, "derived", "no ragged rows were timed; all is charged to context"),
        )
    errors = decode.chosen.fit.like(decode.chosen.left_out.standard_errors).overheads
    if decode.iteration_s is not None:
        numbers["decode.fixed_s"] = Number(
            decode.iteration_s,
            "measured",
            said.source("iteration", decode.num_iterations, ", beside layers and head"),
            float(errors[1]),
        )
    else:
        numbers["decode.fixed_s"] = Number(
            decode.stack_s,
            "measured",
            "intercept of the stacks over their layers; no whole iteration was timed",
            float(errors[0]),
        )
    numbers["decode.fixed_s_per_row"] = _each_number(decode, "iteration", "batches", said)
    return numbers


def _each_number(layers: _Layers, quantity: str, counts: str, said: _Said) -> Number:
    """What every row or prompt adds to the fixed part."""
    if layers.each_s is None:
        few = f"whole iterations were timed at fewer than {_LEAST_COUNTS[quantity]} {counts}"
        return Number(0.0, "derived", few)
    errors = layers.chosen.fit.like(layers.chosen.left_out.standard_errors).overheads
    source = said.source(quantity, layers.num_iterations, ", beside layers and head")
    return Number(layers.each_s, "measured", source, float(errors[2]))


def _prefill_numbers(prefill: _Layers, decode: _Layers, said: _Said) -> dict[str, Number]:
    source = said.source("prefill_layers", prefill.points.height - prefill.num_iterations)
    numbers = _plane_numbers(prefill, _PREFILL_NAMES, source)
    if LAUNCH not in prefill.chosen.planes:
        numbers["prefill.launch_s"] = Number(
            0.0, "derived", "no floor below the plane shows in the readings"
        )
    if MEMORY not in prefill.chosen.planes:
        for name in _PREFILL_NAMES[MEMORY]:
            numbers[name] = Number(
                0.0, "derived", "one plane fits, and it is the one that counts pairs"
            )
    errors = prefill.chosen.fit.like(prefill.chosen.left_out.standard_errors).overheads
    if prefill.iteration_s is not None:
        source = said.source(PREFILL_ITERATION, prefill.num_iterations, ", beside layers and head")
        numbers["prefill.fixed_s"] = Number(
            prefill.iteration_s, "measured", source, float(errors[1])
        )
    else:
        host_s = max(0.0, (decode.iteration_s or decode.stack_s) - decode.stack_s)
        numbers["prefill.fixed_s"] = Number(
            prefill.stack_s + host_s,
            "derived",
            "intercept of the prefill stacks, and what a decode iteration has beyond its stack",
            float(errors[0]),
        )
    numbers["prefill.fixed_s_per_prompt"] = _each_number(
        prefill, PREFILL_ITERATION, "numbers of prompts", said
    )
    return numbers


def _planes_said(layers: _Layers) -> dict[str, Any]:
    return {
        "kept": [cost.REGIMES[place] for place in layers.chosen.planes],
        "left_out_mean": {
            "+".join(cost.REGIMES[place] for place in planes): score
            for planes, score in layers.chosen.considered
        },
    }


def _hull(points: pl.DataFrame, mode: str) -> Hull:
    """The largest batch and the longest context among the decode readings."""
    decode = of_quantity(points, "decode_layers", mode)
    longest = decode.select(
        pl.max_horizontal("context_tokens", "longest_context_tokens").max()
    ).item()
    return Hull(int(decode["batch"].max() or 1), int(longest or 1))  # type: ignore[arg-type]


def _factor_said(decode: _Layers, factor: str) -> dict[str, Any]:
    """Whether a factor was kept, why, and the left-out errors with and without it.

    Beside whatever else is kept.
    """
    others = frozenset(decode.knots) - {factor}
    without, found = decode.scores.get(others), decode.scores.get(others | {factor})
    kept = factor in decode.knots
    if found is None:
        why = f"too few {'batches' if factor == BATCH else 'depths'} were measured"
    elif kept:
        why = "it lowers the left-out error"
    else:
        why = "it does not clearly lower the left-out error"
    errors = {"left_out_mean_without": without, "left_out_mean_with": found}
    return {"kept": kept, "why": why, **errors}


def _stairs(knots: Knots, buckets: Sequence[int]) -> Knots:
    """Knots over rows computed as knots over batches: flat within a bucket."""
    inside = [one for one in sorted(buckets) if knots and one <= knots[-1][0]]
    if not inside:
        return knots
    stairs: list[tuple[float, float]] = []
    places = sorted({*map(float, inside), *(place for place, _ in knots)})
    for place, factor in zip(places, curve(knots, np.array(places)).tolist(), strict=True):
        before = stairs[-1][0] if stairs else place
        if place - before > 1.0:
            stairs.append((before + 1.0, factor))
        stairs.append((place, factor))
    return tuple(stairs)


def _contexts(hull: Hull | None) -> tuple[float, ...]:
    longest = float(hull.max_context_tokens) if hull is not None else 1024.0
    return 1.0, longest / 4, longest / 2, longest


def falling_time(model: ModelProfile) -> str | None:
    """Where a predicted decode iteration gets shorter as it carries more; None if nowhere.

    Checked are one more row that brings one token, one more token of the longest row, and one
    more layer, over the whole measured range and one row beyond; and running all layers with
    more of them loaded.
    """
    c = model.coefficient_array()
    top = model.hull.max_batch + 1 if model.hull is not None else 64
    whole = model.model.shape.layers
    padded_rows, factors = model.padded_rows(top), model.residual(top, whole)

    def seconds(batch: int, context: float, longest: float, layers: float, factor: float) -> float:
        rows = float(padded_rows[batch])
        found, _ = cost.decode_seconds(
            c,
            rows,
            context,
            rows * longest,
            layers,
            0.0,
            1.0,
            0.0,
            rows,
            float(batch),
            factor,
        )
        return float(found)

    for per_row in _contexts(model.hull):
        for batch in range(1, top):
            context, factor = batch * per_row, float(factors[batch])
            least = seconds(batch, context, per_row, 2.0, factor) * (1.0 - 1e-12)
            joined = float(factors[batch + 1])
            if seconds(batch + 1, context + 1.0, per_row, 2.0, joined) < least:
                return f"from batch {batch} to {batch + 1} at {per_row:g} tokens a row"
            if seconds(batch, context + 1.0, per_row + 1.0, 2.0, factor) < least:
                return f"with context at batch {batch}, {per_row:g} tokens a row"
            if seconds(batch, context, per_row, 3.0, factor) < least:
                return f"with layers at batch {batch}, {per_row:g} tokens a row"
    for depth in range(1, whole):
        shallow, deep = (
            layers * float(model.residual(1, layers)[1]) for layers in (depth, depth + 1)
        )
        if deep < shallow * (1.0 - 1e-12):
            return f"from {depth} to {depth + 1} loaded layers"
    return None


def errors_of(predictor: Predictor, points: pl.DataFrame) -> Floats:
    """Relative errors of the points that the profile predicts."""
    errors = []
    for row in points.iter_rows(named=True):
        predicted = predictor.seconds(row)
        if predicted is not None:
            errors.append((predicted - row["seconds"]) / row["seconds"])
    return np.array(errors, dtype=np.float64)


def spread(errors: Floats) -> dict[str, Any]:
    """Number, median and 95th percentile of the sizes of relative errors."""
    sizes = np.abs(errors[np.isfinite(errors)])
    if not len(sizes):
        return {"n": 0, "median": None, "p95": None}
    return {
        "n": len(sizes),
        "median": float(np.median(sizes)),
        "p95": float(np.quantile(sizes, 0.95)),
    }


def _noise(points: pl.DataFrame, quantity: str, mode: str) -> float | None:
    """The usual relative deviation among trials of one point; None for single trials."""
    found = of_quantity(points, quantity, mode)["noise"].drop_nulls()
    return float(found.median()) if len(found) else None  # type: ignore[arg-type]


def launch_bound_share(points: pl.DataFrame) -> dict[str, Any]:
    """By batch the share of eager decode time that replaying a graph saves.

    What is saved is launching: the same kernels run. Null where one of the modes is missing.
    """
    keys = ["layers", "batch", "context_tokens", "longest_context_tokens"]
    both = of_quantity(points, "decode_layers", "eager").join(
        of_quantity(points, "decode_layers", "graph"), on=keys, suffix="_graph", nulls_equal=True
    )
    if not both.height:
        return {"by_batch": None, "why": "no point was measured both as a graph and eagerly"}
    saved = both.with_columns(
        saved=(1.0 - pl.col("seconds_graph") / pl.col("seconds")).clip(0.0, 1.0)
    )
    rows = saved.group_by("batch").agg(pl.col("saved").median()).sort("batch")
    return {"by_batch": [[int(batch), float(share)] for batch, share in rows.iter_rows()]}
