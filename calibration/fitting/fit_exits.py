"""What leaving at an exit costs within an iteration, where that differs from its parts.

Asking an exit and filling KV are timed alone too, over and over. Within an iteration the device
may still be filling while the host goes on, may stand still while an exit's word is heard, and
finds its caches otherwise. So whole iterations whose rows leave have the last word on checks and
filling, and on what a split adds, wherever that clearly lowers the error on loads left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting import regression
from calibration.fitting.points import EXIT_ITERATION, FIT, SPLIT_ITERATION, of_quantity
from calibration.fitting.predict import Predictor
from calibration.fitting.regression import Chosen, Floats

_WITHIN: Final = (
    "check.base_s",
    "check.s_per_row",
    "kv_fill.base_s_per_layer",
    "kv_fill.s_per_row_layer",
)
_FLOORS: Final = ("check.floor_s", "kv_fill.floor_s_per_layer")
_SPLIT: Final = ("rebatch.overhead_s", "rebatch.overhead_s_per_row")
_LEAST_BATCHES: Final = 3

Predicting = Callable[[Mapping[str, float]], Predictor]
"""Makes a predictor in which some coefficients have other values."""

_Told = tuple[Floats, dict[str, Any], dict[str, tuple[float, float]]]
"""Errors of loads left out, what is said of the choice, and the coefficients where any are kept."""


@dataclass(frozen=True)
class Leaving:
    """What iterations whose rows leave tell.

    `values` and standard errors by coefficient, and the `sources` of them; `replaced` are
    quantities timed alone that no longer stand. `left_out` are relative errors of loads by
    quantity, and `record` is what the profile keeps of the choice.
    """

    values: Mapping[str, tuple[float, float]]
    sources: Mapping[str, str]
    replaced: tuple[str, ...]
    left_out: Mapping[str, Floats]
    record: Mapping[str, Any]


def fit_leaving(points: pl.DataFrame, mode: str, predicting: Predicting) -> Leaving:
    """What a model's iterations tell beyond their parts, from its gathered points in one mode."""
    values: dict[str, tuple[float, float]] = {}
    sources: dict[str, str] = {}
    left_out: dict[str, Floats] = {}
    record: dict[str, Any] = {}
    for quantity, judged in ((EXIT_ITERATION, _within), (SPLIT_ITERATION, _splitting)):
        found = of_quantity(points, quantity, mode, FIT)
        if not found.height:
            continue
        predictor = predicting({name: value for name, (value, _) in values.items()})
        left_out[quantity], record[quantity], told = judged(found, predictor)
        values |= told
        sources |= dict.fromkeys(told, quantity)
    replaced = ("check", "kv_fill") if EXIT_ITERATION in sources.values() else ()
    return Leaving(values, sources, replaced, left_out, record)


def _within(points: pl.DataFrame, predictor: Predictor) -> _Told:
    """Checks and filling by what iterations take beside their layers, start and head."""
    without = predictor.with_coefficients(dict.fromkeys((*_WITHIN, *_FLOORS), 0.0))
    work = []
    for row in points.iter_rows(named=True):
        asked, batch = predictor.leaving_work(row), row["batch"]
        checks, filled = asked.checks, asked.filled_layers
        padded = predictor.rows(batch, row["mode"])
        work.append((checks, checks * batch, filled, filled * padded))
    enough = points["batch"].n_unique() >= _LEAST_BATCHES
    chosen = _chosen(points, without, np.array(work)) if enough else None
    errors, record, told = _judged(points, predictor, chosen, _WITHIN)
    if told:
        told |= dict.fromkeys(_FLOORS, (0.0, 0.0))
    return errors, record, told


def _splitting(points: pl.DataFrame, predictor: Predictor) -> _Told:
    """What a split adds, as iterations have it."""
    batches = points["batch"].to_numpy().astype(np.float64)
    work = np.column_stack((np.ones(len(batches)), batches - batches // 2))
    # Fewer batches cannot tell what a row adds from what any split does.
    told = 2 if len(np.unique(batches)) >= _LEAST_BATCHES else 1
    chosen = _chosen(points, predictor, work[:, :told])
    return _judged(points, predictor, chosen, _SPLIT[:told])


def _chosen(points: pl.DataFrame, without: Predictor, work: Floats) -> Chosen:
    """Seconds beyond what is known, by the work that they are for; batches are left out whole."""
    seconds, batches = points["seconds"].to_numpy(), points["batch"].to_numpy()
    return regression.fit_plane(work, seconds, alike=batches, known=_predicted(points, without))


def _judged(
    points: pl.DataFrame, predictor: Predictor, chosen: Chosen | None, names: tuple[str, ...]
) -> _Told:
    """The coefficients where they clearly better the parts', whose errors stand otherwise."""
    parts = regression.relative_errors(_predicted(points, predictor), points["seconds"].to_numpy())
    parts_score = regression.score(parts)
    scores = {"left_out_mean_of_parts": parts_score}
    if chosen is None or not np.isfinite(chosen.left_out.errors).any():
        return parts, scores | {"kept": False, "why": "too few batches were timed"}, {}
    within = chosen.left_out.errors
    within_score = regression.score(within)
    scores["left_out_mean_within"] = within_score
    if not regression.clearly_better(within_score, parts_score):
        why = "it does not clearly lower the left-out error"
        return parts, scores | {"kept": False, "why": why}, {}
    found = chosen.plane(0)
    assert found is not None
    told = {
        name: (float(value), float(error)) for name, value, error in zip(names, *found, strict=True)
    }
    return within, scores | {"kept": True, "why": "it lowers the left-out error"}, told


def _predicted(points: pl.DataFrame, predictor: Predictor) -> Floats:
    found = [predictor.seconds(row) for row in points.iter_rows(named=True)]
    return np.array(found, dtype=np.float64)
