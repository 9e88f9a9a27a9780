"""Recorded iterations beside predicted ones, and a profile whose costs are as recorded.

A model's time has two factors on the profile's prediction: one for decoding by batch, one for
prefills. A factor on a whole iteration becomes a factor on every coefficient of its kind, and what
is left of it by batch a factor on the layers alone, which is where a profile can hold it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from helios_sim import cost
from helios_sim.fidelity.recordings import Bools, Iterations
from helios_sim.profile import (
    Link,
    Loading,
    ModelProfile,
    Profile,
    unit_of,
)
from helios_sim.runs.records import RunData

Floats = npt.NDArray[np.float64]
Statistic = Literal["typical", "slow", "mean"]

_LEAST: Final = 0.02
"""No recorded time makes the layers take less than this share of what the profile says."""
_SAME_INSTANT_S: Final = 1e-6
_DECODING: Final = ("decode", "head", "check", "kv_fill", "rebatch")


@dataclass(frozen=True)
class Predicted:
    """Seconds that a profile predicts for each iteration: layers, graphs captured, and the rest.

    Layers and the rest are NaN where the profile does not have the model.
    """

    layers_s: Floats
    rest_s: Floats
    capture_s: Floats

    @property
    def seconds(self) -> Floats:
        """Whole iterations."""
        return self.steady_s + self.capture_s

    @property
    def steady_s(self) -> Floats:
        """Without capturing."""
        return self.layers_s + self.rest_s


@dataclass(frozen=True)
class Factors:
    """Recorded over predicted seconds of one model's iterations.

    `decode` maps a batch to its factor, of iterations that captured nothing; `shares` holds for
    each such batch the predicted seconds of the layers and of the rest, summed. `prefill` is None
    where no prefill was recorded, `capture` where nothing was captured.
    """

    decode: Mapping[int, float]
    shares: Mapping[int, tuple[float, float]]
    prefill: float | None
    capture: float | None = None
    prefill_s: float = 0.0
    prefill_head_s: float = 0.0


def predict(iterations: Iterations, profile: Profile, max_batch: int) -> Predicted:
    """What the profile predicts for each recorded iteration, as the simulated loop charges it."""
    layers_s = np.full(len(iterations), math.nan)
    rest_s, capture_s = layers_s.copy(), np.zeros(len(iterations))
    for name in np.unique(iterations.model):
        if str(name) not in profile.models:
            continue
        model = profile.models[str(name)]
        # A backend may compute more rows than may run, and a table must reach them.
        rows_up_to = max(max_batch, int(iterations.batch.max(initial=1)))
        padded = model.padded_rows(rows_up_to)
        c = model.coefficient_array()
        mine = np.flatnonzero(iterations.model == name)
        residual = {
            depth: model.residual(rows_up_to, int(depth))
            for depth in np.unique(iterations.depth[mine])
        }
        for i in mine:
            one = _decode if iterations.is_decode[i] else _prefill
            layers_s[i], rest_s[i] = one(
                iterations, int(i), c, padded, residual[iterations.depth[i]]
            )
            if iterations.is_decode[i]:
                capture_s[i] = _capture(iterations, int(i), c)
    return Predicted(layers_s, rest_s, capture_s)


def _decode(
    its: Iterations, i: int, c: Floats, padded: Floats, residual: Floats
) -> tuple[float, float]:
    batch = int(its.batch[i])
    rows = float(padded[batch])
    context, pending = float(its.context_tokens[i]), float(its.pending_tokens[i])
    # Tokens fed again are read to each row's own end.
    padded_context = context if pending > 0.0 else rows * float(its.longest_context_tokens[i])
    layer_s, _ = cost.layer_seconds(c, rows + pending, context, padded_context, 0.0, 0.0, 0.0)
    filled = float(padded[int(its.filled_rows[i])])
    # Of a batch that was split those who left were told their token, and KV was filled for them.
    told = float(its.filled_rows[i]) if its.overheads[i] > 0 else float(batch)
    rest = cost.begin_seconds(c) + cost.told_seconds(c, told)
    rest += float(its.checks[i]) * cost.check_seconds(c, float(batch))
    rest += float(its.heads[i]) * cost.head_seconds(c, float(batch))
    rest += cost.kv_fill_seconds(c, filled, float(its.filled_layers[i]))
    if its.first_layer[i] > 0:
        rest += cost.going_on_seconds(c, float(batch))
    layers = float(its.layers[i] - its.first_layer[i])
    return layers * layer_s * float(residual[batch]), rest


def _capture(its: Iterations, i: int, c: Floats) -> float:
    counts = (
        its.captured_graphs[i],
        its.captured_exits[i],
        its.captured_layers[i],
        its.captured_filled_layers[i],
    )
    return float(cost.capture_seconds(c, *map(float, counts)))


def _prefill(
    its: Iterations, i: int, c: Floats, padded: Floats, residual: Floats
) -> tuple[float, float]:
    layer_s, _ = cost.layer_seconds(
        c, 0.0, 0.0, 0.0, float(its.prompt_tokens[i]), 0.0, float(its.prompt_pairs[i])
    )
    prompts = float(its.rows[i])
    head = cost.head_seconds(c, prompts)
    return float(its.layers[i]) * layer_s + cost.fixed_seconds(c, 0.0, prompts), head


def factors(
    iterations: Iterations, predicted: Predicted, statistic: Statistic
) -> dict[str, Factors]:
    """Recorded over predicted seconds by model.

    "typical" is the median ratio, "mean" the ratio of sums, and "slow" the mean over the typical:
    what iterations that take much longer than their kind add.
    """
    found = {}
    whole = predicted.steady_s
    known = np.isfinite(whole) & (whole > 0.0)
    captures = iterations.captured_graphs + iterations.captured_exits > 0.0
    for name in np.unique(iterations.model[known]):
        mine = known & (iterations.model == name)
        decodes = mine & iterations.is_decode & ~captures
        by_batch: dict[int, float] = {}
        shares: dict[int, tuple[float, float]] = {}
        for batch in np.unique(iterations.batch[decodes]):
            at = decodes & (iterations.batch == batch)
            by_batch[int(batch)] = _factor(iterations.seconds[at], whole[at], statistic)
            shares[int(batch)] = (
                float(predicted.layers_s[at].sum()),
                float(predicted.rest_s[at].sum()),
            )
        at = mine & ~iterations.is_decode & ~captures
        found[str(name)] = Factors(
            decode=by_batch,
            shares=shares,
            capture=_capture_factor(iterations, predicted, mine & captures, by_batch, statistic),
            prefill=_factor(iterations.seconds[at], whole[at], statistic) if at.any() else None,
            prefill_s=float(predicted.layers_s[at].sum()),
            prefill_head_s=float(predicted.rest_s[at].sum()),
        )
    return found


def _capture_factor(
    iterations: Iterations,
    predicted: Predicted,
    captures: Bools,
    by_batch: Mapping[int, float],
    statistic: Statistic,
) -> float | None:
    """Of what iterations took beyond what their batch takes otherwise.

    None where nothing was captured, or none was predicted, and where slow iterations are asked for:
    each graph is captured once.
    """
    at = captures & (predicted.capture_s > 0.0)
    if statistic == "slow" or not at.any():
        return None
    usual = statistics.median(by_batch.values()) if by_batch else 1.0
    steady = np.array([by_batch.get(int(batch), usual) for batch in iterations.batch[at]])
    beyond = np.maximum(iterations.seconds[at] - steady * predicted.steady_s[at], 0.0)
    return max(_factor(beyond, predicted.capture_s[at], statistic), _LEAST)


def _factor(recorded: Floats, predicted: Floats, statistic: Statistic) -> float:
    typical = float(np.median(recorded / predicted))
    mean = float(recorded.sum() / predicted.sum())
    if statistic == "typical":
        return typical
    return mean if statistic == "mean" else (mean / typical if typical > 0.0 else 1.0)


def retimed(profile: Profile, by_model: Mapping[str, Factors]) -> Profile:
    """The profile with iterations as long as the factors say."""
    models = {
        name: _retimed(model, by_model[name]) if name in by_model else model
        for name, model in profile.models.items()
    }
    return replace(profile, models=models)


def _retimed(model: ModelProfile, factors: Factors) -> ModelProfile:
    overall = 1.0
    if factors.decode:
        weights = [sum(factors.shares[batch]) for batch in factors.decode]
        overall = math.fsum(
            factor * weight for factor, weight in zip(factors.decode.values(), weights, strict=True)
        ) / math.fsum(weights)
        overall = max(overall, _LEAST)
    knots = []
    if factors.decode:
        # A factor of all depths: only the one by batch is replaced.
        before = replace(model, depth_residual=()).residual(max(factors.decode), 1)
        for batch, factor in sorted(factors.decode.items()):
            layers_s, rest_s = factors.shares[batch]
            wanted = (factor * (layers_s + rest_s) / overall - rest_s) / layers_s
            knots.append((float(batch), float(before[batch]) * max(wanted, _LEAST)))
    scales = dict.fromkeys(_DECODING, overall)
    scales["capture"] = 1.0 if factors.capture is None else factors.capture
    if factors.prefill is not None and factors.prefill_s > 0.0:
        head_s = factors.prefill_head_s
        wanted = factors.prefill * (factors.prefill_s + head_s) - overall * head_s
        scales["prefill"] = max(wanted / factors.prefill_s, _LEAST)
    coefficients = {
        name: value
        if value is None or not _is_time(name)
        else value * scales.get(name.split(".")[0], 1.0)
        for name, value in model.coefficients.items()
    }
    residual = tuple(knots) or model.batch_residual
    return replace(model, coefficients=coefficients, batch_residual=residual)


def paced(profile: Profile, factor: float) -> Profile:
    """The profile of a machine on which every iteration takes so many times as long."""
    models = {
        name: replace(
            model,
            coefficients={
                key: value if value is None or not _is_time(key) else value * factor
                for key, value in model.coefficients.items()
            },
        )
        for name, model in profile.models.items()
    }
    return replace(profile, models=models)


def _is_time(coefficient: str) -> bool:
    """Whether a coefficient is of seconds, not of joules or watts."""
    return unit_of(coefficient).split("/")[0] == "s"


def loads(run: RunData, profile: Profile) -> float | None:
    """Recorded over predicted seconds of the loads for which serving waited; None without any.

    Those are the decisions that moved weights and left a loading interval in the timeline, which
    loads beside running requests do not.
    """
    waiting = run.timeline.filter(pl.col("state") == "loading")
    predicted_s = 0.0
    in_memory: set[tuple[int, str]] = set()
    from_disk = run.scenario.get("fleet", {}).get("weights_start", "disk") == "disk"
    moves = run.decisions.filter((pl.col("moved_bytes") > 0) & pl.col("ready_s").is_not_null())
    for move in moves.sort("time_s").iter_rows(named=True):
        if move["model"] not in profile.models:
            continue
        waited = waiting.filter(
            (pl.col("replica") == move["replica"])
            & (pl.col("time_s") > move["time_s"])
            & (pl.col("time_s") <= move["ready_s"] + _SAME_INSTANT_S)
        ).height
        first = (move["replica"], move["model"]) not in in_memory
        in_memory.add((move["replica"], move["model"]))
        if not waited:
            continue
        predicted_s += profile.loading.host.seconds(move["moved_bytes"])
        if from_disk and first:
            whole = profile.models[move["model"]].model
            predicted_s += profile.loading.disk.seconds(whole.weight_bytes(whole.shape.layers))
    recorded_s = run.totals.load_s
    return recorded_s / predicted_s if predicted_s > 0.0 and recorded_s > 0.0 else None


def reloaded(profile: Profile, factor: float) -> Profile:
    """The profile with loads that take a factor as long."""
    links = (profile.loading.disk, profile.loading.host)
    disk, host = (Link(link.alpha_s * factor, link.bytes_per_s / factor) for link in links)
    return replace(profile, loading=Loading(disk, host))


@dataclass(frozen=True)
class TimingRow:
    """Iterations of one model and kind at one batch: recorded and predicted milliseconds.

    `low_ms` to `high_ms` hold the middle 80 % of the recorded ones. For a prefill `batch` is the
    upper end of a class of prompt tokens, for a decode the rows that were computed.
    """

    model: str
    kind: Literal["decode", "prefill"]
    batch: int
    num_iterations: int
    recorded_ms: float
    low_ms: float
    high_ms: float
    predicted_ms: float
    recorded_s: float
    predicted_s: float


def timing_rows(iterations: Iterations, predicted: Predicted) -> list[TimingRow]:
    """Recorded and predicted times of decodes by batch and of prefills by prompt tokens."""
    rows = []
    known = np.isfinite(predicted.seconds)
    # Classes of prompt tokens double, so that few prompts make few rows.
    tokens = 2.0 ** np.ceil(np.log2(np.maximum(iterations.prompt_tokens, 1.0)))
    for name in np.unique(iterations.model):
        for kind, of_kind, classes in (
            ("decode", iterations.is_decode, iterations.batch),
            ("prefill", ~iterations.is_decode, tokens),
        ):
            mine = known & (iterations.model == name) & of_kind
            for batch in np.unique(classes[mine]):
                at = mine & (classes == batch)
                recorded, ours = 1e3 * iterations.seconds[at], 1e3 * predicted.seconds[at]
                low, middle, high = np.quantile(recorded, [0.1, 0.5, 0.9])
                rows.append(
                    TimingRow(
                        model=str(name),
                        kind="decode" if kind == "decode" else "prefill",
                        batch=int(batch),
                        num_iterations=int(at.sum()),
                        recorded_ms=float(middle),
                        low_ms=float(low),
                        high_ms=float(high),
                        predicted_ms=float(np.median(ours)),
                        recorded_s=float(recorded.sum()) / 1e3,
                        predicted_s=float(ours.sum()) / 1e3,
                    )
                )
    return rows
