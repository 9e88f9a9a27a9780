"""Watts and joules: energy windows become the coefficients of the simulator's energy model.

A window's joules are idle power and, where the device works, power above it over the window's
seconds, and joules of layers, rows, tokens and pairs; none of them negative. Windows of whole
iterations, in which the device waits for the host between its work, tell power from work: in
stacks that run one after another both grow alike. Without a meter every one of these numbers is
unavailable, which is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl

from calibration.fitting.fit_times import Number, kv_share, spread
from calibration.fitting.points import (
    DECODE_WINDOWS,
    FIT,
    HEAD_WINDOW,
    HELD_OUT,
    PREFILL_WINDOWS,
    WHOLE_WINDOWS,
)
from calibration.fitting.predict import prefill_load
from calibration.fitting.regression import Floats, jackknife, relative_errors, relative_nnls
from calibration.measuring.readings import LEAST_DECODE_WINDOWS
from helios_sim.cost import COEFFICIENTS
from helios_sim.model import EarlyExitModel
from helios_sim.profile import UNAVAILABLE, unit_of
from helios_sim.wording import counted

_COLUMNS: Final = (
    "power.active_w",
    "decode.j_per_layer",
    "decode.j_per_row_layer",
    "decode.j_per_context_token_layer",
    "prefill.j_per_layer",
    "prefill.j_per_token_layer",
    "prefill.j_per_pair_layer",
    "head.j_base",
    "head.j_per_row",
)
ENERGY_COEFFICIENTS: Final = tuple(name for name in COEFFICIENTS if unit_of(name)[0] in "JW")
"""Coefficients in joules or watts; the power limit is among them."""


@dataclass(frozen=True)
class EnergyFit:
    """The energy of one model: numbers by coefficient; `record` is what the profile keeps."""

    numbers: Mapping[str, Number]
    record: Mapping[str, Any]


def unavailable(why: str) -> Number:
    """A number that nobody could read."""
    return Number(None, UNAVAILABLE, why)


def no_energy(why: str, limit: Number) -> EnergyFit:
    """A model without energy: every joule unavailable, for the reason given."""
    numbers = {name: unavailable(why) for name in ENERGY_COEFFICIENTS}
    return EnergyFit(numbers | {"power.limit_w": limit}, {"available": False, "why": why})


def fit_energy(
    points: pl.DataFrame,
    model: EarlyExitModel,
    idle_w: float | None,
    limit: Number,
    why_not: str,
    padded_share: float = 0.0,
    short_left_out: int = 0,
) -> EnergyFit:
    """Fit the energy of one model from its gathered points.

    `idle_w` is the device's measured idle power, the floor under the active one. `why_not` is
    said where there is nothing to fit. Windows hold rows of equal contexts; `padded_share` is what
    the times say of ragged ones, the share of a context token's cost that goes by padded tokens.
    `short_left_out` counts the windows that the points lack because longer ones suffice.
    """
    windows = points.filter(
        pl.col("quantity").is_in((*DECODE_WINDOWS, *PREFILL_WINDOWS, HEAD_WINDOW))
        & (pl.col("joules") > 0.0)
        & (pl.col("seconds") > 0.0)
    )
    fitted = windows.filter(pl.col("purpose") == FIT)
    if idle_w is None or not fitted.height:
        return no_energy(why_not, limit)
    num_decode = fitted.filter(pl.col("quantity").is_in(DECODE_WINDOWS)).height
    if num_decode < LEAST_DECODE_WINDOWS:
        return no_energy(
            f"{num_decode} energy windows of decode were read; {LEAST_DECODE_WINDOWS} are needed",
            limit,
        )
    head_layers = None if HEAD_WINDOW in set(fitted["quantity"]) else head_share(model)
    features = _features(fitted, head_layers)
    joules = fitted["joules"].to_numpy()
    above_idle = joules - idle_w * fitted["seconds"].to_numpy()
    solved = relative_nnls(features, above_idle, joules)
    left_out, errors = _leave_one_out(features, above_idle, joules)
    source = f"regression over {fitted.height} energy windows"
    if short_left_out:
        source += f", {counted(short_left_out, 'short window')} left out"
    numbers = {
        name: Number(float(value), "measured", source, float(error))
        for name, value, error in zip(_COLUMNS, solved, errors, strict=True)
    }
    active = numbers["power.active_w"]
    # A board's sensor may read a little beyond the limit that the board keeps to.
    numbers["power.active_w"] = Number(
        min((active.value or 0.0) + idle_w, limit.value or math.inf),
        "measured",
        f"{source}, above idle",
        active.error,
    )
    present = set(fitted["quantity"])
    numbers |= _derived(numbers, model, present)
    numbers |= _by_padding(numbers["decode.j_per_context_token_layer"], padded_share)
    numbers["power.limit_w"] = limit
    held_out = windows.filter(pl.col("purpose") == HELD_OUT)
    return EnergyFit(
        numbers,
        {
            "available": True,
            "windows": fitted.height,
            "errors": {
                "left_out": spread(left_out),
                "held_out": spread(
                    _errors(
                        held_out,
                        _features(held_out, head_layers) @ solved,
                        idle_w,
                    )
                ),
            },
        },
    )


def _by_padding(each: Number, padded_share: float) -> dict[str, Number]:
    """Joules of a context token as those of one that a row has and of one that is read for it."""
    own, padded = (share * (each.value or 0.0) for share in (1.0 - padded_share, padded_share))
    why = f"{each.source}; {padded_share:.3g} of it, as the times of ragged rows say"
    return {
        "decode.j_per_context_token_layer": replace(each, value=own),
        "decode.j_per_padded_token_layer": Number(padded, "derived", why),
    }


def head_share(model: EarlyExitModel) -> float:
    """The output head's weights beside a layer's."""
    shape = model.shape
    return shape.vocab * shape.hidden / shape.layer_params()


def _features(windows: pl.DataFrame, head_layers: float | None) -> Floats:
    """What each window carried, in the order of `_COLUMNS`.

    Where no window is of the head, `head_layers` says how many layers the one in an iteration
    counts as.
    """
    rows = np.zeros((windows.height, len(_COLUMNS)))
    for at, row in enumerate(windows.iter_rows(named=True)):
        quantity = row["quantity"]
        layers, batch = float(row["layers"] or 0), float(row["batch"] or 0)
        rows[at, 0] = row["seconds"]
        if quantity in DECODE_WINDOWS:
            context = batch * (row["context_tokens"] or 0)
            rows[at, 1:4] = layers, layers * batch, layers * context
        elif quantity in PREFILL_WINDOWS:
            tokens, _, pairs = prefill_load(row)
            rows[at, 4:7] = layers, layers * tokens, layers * pairs
        if quantity in (HEAD_WINDOW, *WHOLE_WINDOWS):
            if head_layers is None:
                rows[at, 7:9] = 1.0, batch
            else:
                rows[at, 1:3] += head_layers, head_layers * batch
    return rows


def _leave_one_out(features: Floats, above_idle: Floats, joules: Floats) -> tuple[Floats, Floats]:
    """Relative error of each window left out, and the jackknife's standard errors."""
    count = len(joules)
    errors, moved = np.zeros(count), []
    for at in range(count):
        keep = np.arange(count) != at
        found = relative_nnls(features[keep], above_idle[keep], joules[keep])
        errors[at] = (features[at] @ found - above_idle[at]) / joules[at]
        moved.append(found)
    return errors, jackknife(moved)


def _errors(windows: pl.DataFrame, above_idle: Floats, idle_w: float) -> Floats:
    if not windows.height:
        return np.zeros(0)
    predicted = above_idle + idle_w * windows["seconds"].to_numpy()
    return relative_errors(predicted, windows["joules"].to_numpy())


def _derived(
    numbers: Mapping[str, Number], model: EarlyExitModel, present: set[str]
) -> dict[str, Number]:
    """Joules that were not measured by themselves, from those that were."""
    derived: dict[str, Number] = {}

    def take(name: str, factor: float, other: str, why: str) -> None:
        value = derived[other].value if other in derived else numbers[other].value
        derived[name] = Number(factor * (value or 0.0), "derived", f"{why}: {factor:.3g} x {other}")

    if not present & set(PREFILL_WINDOWS):
        why = "not measured; a prompt token computes what a row does"
        take("prefill.j_per_layer", 1.0, "decode.j_per_layer", why)
        take("prefill.j_per_token_layer", 1.0, "decode.j_per_row_layer", why)
        take("prefill.j_per_pair_layer", 1.0, "decode.j_per_context_token_layer", why)
    if HEAD_WINDOW not in present:
        share = head_share(model)
        why = "not measured; by the head's weights beside a layer's"
        take("head.j_base", share, "decode.j_per_layer", why)
        take("head.j_per_row", share, "decode.j_per_row_layer", why)
    same = "an exit check reads the head's weights too"
    take("check.j_base", 1.0, "head.j_base", same)
    take("check.j_per_row", 1.0, "head.j_per_row", same)
    share = kv_share(model)
    why = "by the key and value projections' share of a layer's weights"
    take("kv_fill.j_per_layer", share, "decode.j_per_layer", why)
    take("kv_fill.j_per_row_layer", share, "decode.j_per_row_layer", why)
    return derived
