"""Seconds of one model: readings become the coefficients of the simulator's cost model.

A decode layer is linear in (1, rows, context tokens), a prefill layer in (1, tokens, pairs); each
may be bounded from below by a launch floor or by a second plane, which are kept only where they
clearly lower the error on readings left out. What a stack of layers takes beside its layers is its
intercept over k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting import regression
from calibration.fitting.points import FIT, HELD_OUT, PREFILL_ITERATION, of_quantity, standing_mode
from calibration.fitting.predict import Predictor, prefill_load
from calibration.fitting.regression import Chosen, Floats, MaxFit, Readings
from helios_sim import cost
from helios_sim.errors import InputError
from helios_sim.model import EarlyExitModel
from helios_sim.profile import Confidence, Hull, ModelProfile

LAUNCH: Final = 0
MEMORY: Final = 1
COMPUTE: Final = 2
_DECODE_OPTIONS: Final = ((MEMORY,), (LAUNCH, MEMORY), (MEMORY, COMPUTE), (0, 1, 2))
_PREFILL_OPTIONS: Final = ((COMPUTE,), (LAUNCH, COMPUTE), (MEMORY, COMPUTE), (0, 1, 2))
_DECODE_NAMES: Final = (
    ("decode.launch_s",),
    ("decode.memory_s_per_layer", "decode.memory_s_per_row", "decode.memory_s_per_context_token"),
    (
        "decode.compute_s_per_layer",
        "decode.compute_s_per_row",
        "decode.compute_s_per_context_token",
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
_LEAST_BATCHES: Final = 3
_SHRINKS: Final = (1.0, 0.75, 0.5, 0.25)

TIMES: Final = (
    "decode_layers",
    "iteration",
    "prefill_layers",
    PREFILL_ITERATION,
    "head",
    "check",
    "kv_fill",
)


@dataclass(frozen=True)
class Number:
    """A number on its way into a profile: value, grade, source, standard error."""

    value: float | None
    grade: str
    source: str
    error: float | None = None


@dataclass(frozen=True)
class TimesFit:
    """The times of one model: numbers by coefficient, and how they were come by.

    `record` is what the profile keeps of the fit under `measurement`.
    """

    numbers: Mapping[str, Number]
    residual: tuple[tuple[float, float], ...]
    buckets: tuple[int, ...]
    hull: Hull
    overheads: Mapping[str, float]
    modes: Mapping[str, str]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Layers:
    """Decode or prefill layers fitted: the choice of planes, and the two fixed parts."""

    chosen: Chosen
    readings: Readings
    points: pl.DataFrame
    groups: regression.Groups

    @property
    def stack_s(self) -> float:
        """What a timed stack takes beside its layers."""
        return float(self.chosen.fit.overheads[0])

    @property
    def iteration_s(self) -> float | None:
        """What an iteration takes beside layers and head; None where none was timed."""
        return float(self.chosen.fit.overheads[1]) if self.num_iterations else None

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
    counts_new_token: bool = True,
    where: str = "points.parquet",
) -> TimesFit:
    """Fit the times of one model from its gathered points.

    `mode` names what the profile stands for ("graph", "eager", or "auto": graph where it was
    measured); `buckets` are the batches that graphs pad to, by default those the real backend
    captures.
    """
    modes = {quantity: standing_mode(points, quantity, mode) for quantity in TIMES}
    fitted = {quantity: of_quantity(points, quantity, modes[quantity], FIT) for quantity in TIMES}
    for quantity, least in _LEAST_POINTS.items():
        if fitted[quantity].height < least:
            raise InputError(
                f"Model {model.name!r} has {fitted[quantity].height} points of {quantity}; at "
                f"least {least} are needed. Measure again with a larger budget.",
                where=where,
            )
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
    decode = _decode(fitted, head, counts_new_token, buckets)
    prefill = _prefill(fitted, head)
    numbers |= _decode_numbers(decode, said)
    numbers |= _prefill_numbers(prefill, decode, said)
    numbers |= _fill_numbers(lines, numbers, model, said, fitted)
    numbers["rebatch.overhead_s"] = Number(
        numbers["decode.fixed_s"].value,
        "derived",
        "the second part of a split iteration begins as an iteration does: decode.fixed_s",
    )
    hull = _hull(points, modes["decode_layers"])
    overheads = {"decode": decode.stack_s, "prefill": prefill.stack_s}
    plain = model_profile(model, numbers, tuple(buckets), (), hull)
    residual, residual_record, left_out = _residual(decode, plain)
    kept = replace(plain, batch_residual=residual)
    predictor = Predictor(kept, stack_overhead_s=overheads, counts_new_token=counts_new_token)
    by_quantity = {name: line.left_out.errors for name, line in lines.items()}
    for layers, errors in ((decode, left_out), (prefill, prefill.chosen.left_out.errors)):
        for quantity in layers.points["quantity"].unique():
            by_quantity[quantity] = errors[(layers.points["quantity"] == quantity).to_numpy()]
    record = {
        "modes": modes,
        "stack_overhead_s": overheads,
        "planes": {"decode": _planes_said(decode), "prefill": _planes_said(prefill)},
        "batch_residual": residual_record,
        "errors": {
            quantity: {
                "left_out": spread(by_quantity.get(quantity, np.zeros(0))),
                "held_out": spread(
                    errors_of(predictor, of_quantity(points, quantity, modes[quantity], HELD_OUT))
                ),
                "noise": _noise(points, quantity, modes[quantity]),
            }
            for quantity in TIMES
            if of_quantity(points, quantity, modes[quantity]).height
        },
        "launch_bound_share": launch_bound_share(points),
        "falls": falling_time(kept),
    }
    return TimesFit(numbers, residual, tuple(buckets), hull, overheads, modes, record)


def model_profile(
    model: EarlyExitModel,
    numbers: Mapping[str, Number],
    buckets: tuple[int, ...],
    residual: tuple[tuple[float, float], ...],
    hull: Hull | None,
) -> ModelProfile:
    """A model profile with these times; whatever is not named is unavailable or 0."""
    values: dict[str, float | None] = dict.fromkeys(cost.COEFFICIENTS)
    values |= dict.fromkeys(cost.OPTIONAL_COEFFICIENTS, 0.0)
    values |= {name: number.value for name, number in numbers.items() if name in values}
    return ModelProfile(
        model=model,
        coefficients=values,
        batch_buckets=buckets,
        batch_residual=residual,
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
    """One group a cell of batch, context and prompt: all its depths are left out together."""
    cells = points.select(
        pl.struct("batch", "context_tokens", "prompt_tokens").rank("dense").alias("cell")
    )
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
    counts_new_token: bool,
    buckets: Sequence[int],
) -> _Layers:
    """Decode stacks and whole decode iterations together, at the rows computed."""
    points = pl.concat([fitted["decode_layers"], fitted["iteration"]])
    own = 0.0 if counts_new_token else 1.0
    batch = _column(points, "batch")
    context = batch * (_column(points, "context_tokens") + own)
    ones = np.ones(points.height)
    rows = padded(batch, buckets)
    plane = np.column_stack((ones, rows, context))
    return _fitted_layers(points, rows, head, (ones[:, None], plane, plane), _DECODE_OPTIONS)


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
    batch = np.maximum(_column(points, "batch"), 1.0)
    return _fitted_layers(points, batch, head, planes, _PREFILL_OPTIONS)


def _fitted_layers(
    points: pl.DataFrame,
    rows: Floats,
    head: Chosen,
    planes: tuple[Floats, ...],
    options: Sequence[tuple[int, ...]],
) -> _Layers:
    iterations = points["quantity"].is_in(["iteration", PREFILL_ITERATION])
    whole = iterations.to_numpy().astype(np.float64)
    readings = Readings(
        seconds=_column(points, "seconds"),
        layers=_column(points, "layers"),
        known=whole * _line_seconds(head, rows),
        overheads=np.column_stack((1.0 - whole, whole)),
        planes=planes,
    )
    groups = _groups(points)
    chosen = regression.choose_planes(readings, options, groups)
    return _Layers(_ordered(chosen), readings, points, groups)


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
        for name, value, error in zip(plane_names, *found, strict=True):
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
        for what in ("row", "context_token"):
            own = f"decode.memory_s_per_{what}"
            numbers[f"decode.compute_s_per_{what}"] = Number(
                numbers[own].value,
                "derived",
                f"one plane fits; beside a prefill its work adds to the prefill's: {own}",
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
    return numbers


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


def _residual(
    decode: _Layers, plain: ModelProfile
) -> tuple[tuple[tuple[float, float], ...], dict[str, Any], Floats]:
    """Knots of the batch residual where it lowers the left-out error, and that error."""
    without = decode.chosen.left_out.errors
    record: dict[str, Any] = {"kept": False, "left_out_mean_without": regression.score(without)}
    batch = _column(decode.points, "batch")
    if len(np.unique(batch)) < _LEAST_BATCHES:
        return (), record | {"why": "fewer than three batches were measured"}, without
    readings = decode.readings.with_planes(decode.chosen.planes)
    assigned = regression.assignment(readings, decode.chosen.fit)
    left_out = np.zeros(len(readings))
    for group in np.unique(decode.groups):
        out = decode.groups == group
        fit = regression.refit(readings.take(~out), assigned[~out])
        knots = _safe_knots(_factors(readings.take(~out), fit, batch[~out]), plain)
        rest = readings.take(out)
        whole = plain.model.shape.layers
        factors = replace(plain, batch_residual=knots).residual(int(batch.max()), whole)
        layers_s = fit.layer_seconds(rest) * factors[batch[out].astype(np.int64)]
        predicted = rest.known + rest.overheads @ fit.overheads + rest.layers * layers_s
        left_out[out] = regression.relative_errors(predicted, rest.seconds)
    record["left_out_mean_with"] = regression.score(left_out)
    if not regression.clearly_better(regression.score(left_out), regression.score(without)):
        return (), record | {"why": "it does not clearly lower the left-out error"}, without
    knots = _safe_knots(_factors(readings, decode.chosen.fit, batch), plain)
    if not knots:
        return (), record | {"why": "no factor lowers no time from batch to batch"}, without
    return knots, record | {"kept": True, "why": "it lowers the left-out error"}, left_out


def _factors(readings: Readings, fit: MaxFit, batch: Floats) -> list[tuple[float, float]]:
    """By measured batch the factor on the layers that fits best in relative error."""
    layers_s = readings.layers * fit.layer_seconds(readings)
    seen = readings.seconds - readings.known - readings.overheads @ fit.overheads
    factors = []
    for size in np.unique(batch):
        mine = batch == size
        weights = 1.0 / readings.seconds[mine] ** 2
        own = layers_s[mine]
        below = float((weights * own * own).sum())
        ratio = float((weights * own * seen[mine]).sum()) / below if below > 0.0 else 1.0
        factors.append((float(size), min(max(ratio, 0.2), 5.0)))
    return factors


def _safe_knots(
    factors: Sequence[tuple[float, float]], plain: ModelProfile
) -> tuple[tuple[float, float], ...]:
    """Knots under which no time falls as the batch grows, nearest to the factors found.

    They are raised where a time would fall; where the curve between knots still lets one fall,
    all are drawn towards 1.
    """
    batches = [batch for batch, _ in factors]
    raised = regression.monotone_factors(
        batches, [factor for _, factor in factors], lambda a, b: _least_ratio(plain, a, b)
    )
    for shrink in _SHRINKS:
        knots = [(b, 1.0 + shrink * (f - 1.0)) for b, f in zip(batches, raised, strict=True)]
        steps = _stairs(knots) if plain.batch_buckets else tuple(knots)
        if falling_time(replace(plain, batch_residual=steps)) is None:
            return steps
    return ()


def _stairs(knots: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Flat within a bucket: a batch that is padded to the next one takes that one's time."""
    stairs: list[tuple[float, float]] = []
    for batch, factor in knots:
        before = stairs[-1][0] if stairs else batch
        if batch - before > 1.0:
            stairs.append((before + 1.0, factor))
        stairs.append((batch, factor))
    return tuple(stairs)


def _contexts(hull: Hull | None) -> tuple[float, ...]:
    longest = float(hull.max_context_tokens) if hull is not None else 1024.0
    return 1.0, longest / 4, longest / 2, longest


def _least_ratio(plain: ModelProfile, smaller: float, larger: float) -> float:
    """The least factor ratio under which rows that join never shorten a layer."""
    c = plain.coefficient_array()
    ratios = []
    for context in _contexts(plain.hull):
        before, _ = cost.layer_seconds(
            c, smaller, smaller * context, smaller * context, 0.0, 0.0, 0.0
        )
        joined = smaller * context + (larger - smaller)
        after, _ = cost.layer_seconds(c, larger, joined, joined, 0.0, 0.0, 0.0)
        ratios.append(float(before) / float(after) if after > 0.0 else 1.0)
    return max(ratios)


def falling_time(model: ModelProfile) -> str | None:
    """Where a predicted decode iteration gets shorter as it carries more; None if nowhere.

    Checked are one more row that brings one token, one more token of context, and one more
    layer, over the whole measured range and one row beyond.
    """
    c = model.coefficient_array()
    top = model.hull.max_batch + 1 if model.hull is not None else 64
    padded, factors = model.padded_rows(top), model.residual(top, model.model.shape.layers)

    def seconds(batch: int, context: float, layers: float) -> float:
        rows = float(padded[batch])
        found, _ = cost.decode_seconds(
            c, rows, context, context, layers, 0.0, 1.0, 0.0, rows, float(factors[batch])
        )
        return float(found)

    for per_row in _contexts(model.hull):
        for batch in range(1, top):
            context = batch * per_row
            base = seconds(batch, context, 2.0)
            least = base * (1.0 - 1e-12)
            if seconds(batch + 1, context + 1.0, 2.0) < least:
                return f"from batch {batch} to {batch + 1} at {per_row:g} tokens a row"
            if seconds(batch, context + 1.0, 2.0) < least:
                return f"with context at batch {batch}, {per_row:g} tokens a row"
            if seconds(batch, context, 3.0) < least:
                return f"with layers at batch {batch}, {per_row:g} tokens a row"
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
    keys = ["layers", "batch", "context_tokens"]
    both = of_quantity(points, "decode_layers", "eager").join(
        of_quantity(points, "decode_layers", "graph"), on=keys, suffix="_graph"
    )
    if not both.height:
        return {"by_batch": None, "why": "no point was measured both as a graph and eagerly"}
    saved = both.with_columns(
        saved=(1.0 - pl.col("seconds_graph") / pl.col("seconds")).clip(0.0, 1.0)
    )
    rows = saved.group_by("batch").agg(pl.col("saved").median()).sort("batch")
    return {"by_batch": [[int(batch), float(share)] for batch, share in rows.iter_rows()]}
