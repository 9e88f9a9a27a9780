"""What a profile predicts for a raw reading, through the simulator's own cost functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.points import (
    CAPTURES,
    DECODE_WINDOWS,
    EXIT_ITERATION,
    HEAD_WINDOW,
    LEAVING,
    PREFILL_ITERATION,
    PREFILL_WINDOWS,
    SPLIT_ITERATION,
    WHOLE_WINDOWS,
)
from helios_sim import cost
from helios_sim.profile import Loading, ModelProfile, Profile

Row = Mapping[str, Any]


@dataclass(frozen=True)
class LeavingWork:
    """Exits asked before the loaded depth and at it, and layers whose KV is filled."""

    checks: float
    heads: float
    filled_layers: float


@dataclass(frozen=True)
class Predictor:
    """A model's times as its profile has them, for readings of that model.

    `stack_overhead_s` is what a timed stack of layers took beside the layers ("decode",
    "prefill"): launching and stopping the clock, no part of a served iteration.
    """

    model: ModelProfile
    loading: Loading | None = None
    stack_overhead_s: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def coefficients(self) -> NDArray[np.float64]:
        """The array `helios_sim.cost` reads."""
        return self.model.coefficient_array()

    def rows(self, batch: int, mode: str) -> float:
        """Rows computed: a graph pads to its bucket."""
        return float(self.model.padded_rows(batch)[batch]) if mode == "graph" else float(batch)

    def factor(self, row: Row) -> float:
        """The residual at the batch and the loaded layers; all are, where no depth is named."""
        whole = self.model.model.shape.layers
        layers = whole if row.get("quantity") in LEAVING else int(row.get("layers") or whole)
        return float(self.model.residual(row["batch"], layers)[row["batch"]])

    def read_tokens(self, row: Row) -> float:
        """KV tokens read by a decode of these rows, their own new ones included."""
        return float(row["batch"] * (row["context_tokens"] or 0))

    def padded_tokens(self, row: Row) -> float:
        """KV tokens read where every computed row is read to the longest one's end.

        Rows of which no longest is named are equally long.
        """
        longest = max(row["context_tokens"] or 0, row.get("longest_context_tokens") or 0)
        return self.rows(row["batch"], row["mode"]) * float(longest)

    def without_depth(self) -> Predictor:
        """The same without the factor by loaded depth."""
        return replace(self, model=replace(self.model, depth_residual=()))

    def with_coefficients(self, values: Mapping[str, float]) -> Predictor:
        """The same with other values of some coefficients."""
        coefficients = {**self.model.coefficients, **values}
        return replace(self, model=replace(self.model, coefficients=coefficients))

    def layer_seconds(self, row: Row) -> float:
        """Seconds of one decode layer with the residual."""
        rows = self.rows(row["batch"], row["mode"])
        seconds, _ = cost.layer_seconds(
            self.coefficients,
            rows,
            self.read_tokens(row),
            self.padded_tokens(row),
            0.0,
            0.0,
            0.0,
        )
        return float(seconds) * self.factor(row)

    def seconds(self, row: Row) -> float | None:
        """Predicted seconds of a reading; None where the profile predicts no such thing."""
        found = self._SECONDS.get(row["quantity"])
        return None if found is None else found(self, row)

    def _decode_layers(self, row: Row) -> float:
        overhead_s = self.stack_overhead_s.get("decode", 0.0)
        return overhead_s + float(row["layers"] or 0) * self.layer_seconds(row)

    def _prefill_layers(self, row: Row) -> float:
        tokens, cached, pairs = prefill_load(row)
        seconds, _ = cost.layer_seconds(self.coefficients, 0.0, 0.0, 0.0, tokens, cached, pairs)
        overhead_s = self.stack_overhead_s.get("prefill", 0.0)
        return overhead_s + float(row["layers"] or 0) * float(seconds)

    def _prefill_iteration(self, row: Row) -> float:
        tokens, cached, pairs = prefill_load(row)
        layers, batch = float(row["layers"] or 0), float(row["batch"] or 0)
        seconds, _ = cost.mixed_seconds(
            self.coefficients,
            0.0,
            0.0,
            0.0,
            tokens,
            cached,
            pairs,
            layers,
            0.0,
            batch,
            batch,
            1.0,
        )
        return float(seconds)

    def _decode_iteration(self, row: Row) -> float:
        """A decode of all its rows: through its layers, or leaving at an exit they all ask for."""
        plain = row["quantity"] == "iteration"
        work = LeavingWork(0.0, 1.0, 0.0) if plain else self.leaving_work(row)
        rows = self.rows(row["batch"], row["mode"])
        seconds, _ = cost.decode_seconds(
            self.coefficients,
            rows,
            self.read_tokens(row),
            self.padded_tokens(row),
            float(row["layers"] or 0),
            work.checks,
            work.heads,
            work.filled_layers,
            rows,
            float(row["batch"]),
            self.factor(row),
        )
        return float(seconds)

    def _head(self, row: Row) -> float:
        return float(cost.head_seconds(self.coefficients, float(row["batch"] or 0)))

    def _check(self, row: Row) -> float:
        return float(cost.check_seconds(self.coefficients, float(row["batch"] or 0)))

    def _kv_fill(self, row: Row) -> float:
        layers, batch = float(row["layers"] or 0), float(row["batch"] or 0)
        return float(cost.kv_fill_seconds(self.coefficients, batch, layers))

    def _capture(self, row: Row) -> float | None:
        """Of one graph; where nothing is captured there is nothing to predict."""
        if not self.model.graph_rows:
            return None
        layers = float(row["layers"] or 0)
        kind = row["quantity"]
        tells, runs, fills = (kind == f"capture_{name}" for name in ("tell", "run", "fill"))
        counts = (float(not tells), float(tells), layers * runs, layers * fills)
        return float(cost.capture_seconds(self.coefficients, *counts))

    def _load(self, row: Row) -> float | None:
        if self.loading is None or not row["bytes"]:
            return None
        link = self.loading.disk if row["quantity"] == "load_disk" else self.loading.host
        return link.seconds(row["bytes"])

    def _split_iteration(self, row: Row) -> float:
        """A token of every row: half of them leave at an exit, the others go on by themselves."""
        c, work = self.coefficients, self.leaving_work(row)
        leaving = row["batch"] // 2
        staying = {**row, "batch": row["batch"] - leaving}
        seconds = self._pass_seconds(row, row["layers"], work.checks, 0.0)
        seconds += float(cost.told_seconds(c, float(row["batch"])))
        seconds += float(cost.going_on_seconds(c, float(staying["batch"])))
        filled_rows = self.rows(leaving, row["mode"])
        seconds += float(cost.kv_fill_seconds(c, filled_rows, work.filled_layers))
        last = len(self.model.model.exit_layers) - 1.0
        return seconds + self._pass_seconds(staying, work.filled_layers, last - work.checks, 1.0)

    def _pass_seconds(self, row: Row, layers: float, checks: float, heads: float) -> float:
        """Some of a decode's layers with the exits on the way, its start included."""
        c, batch = self.coefficients, float(row["batch"])
        seconds = cost.begin_seconds(c) + layers * self.layer_seconds(row)
        seconds += checks * cost.check_seconds(c, batch) + heads * cost.head_seconds(c, batch)
        return float(seconds)

    def leaving_work(self, row: Row) -> LeavingWork:
        """What rows that leave at an exit ask for beside its layers."""
        exits = self.model.model.exit_layers
        level, last = exits.index(row["layers"]), len(exits) - 1
        return LeavingWork(
            float(min(level + 1, last)), float(level == last), float(exits[-1] - row["layers"])
        )

    _SECONDS: ClassVar[Mapping[str, Callable[[Predictor, Row], float | None]]] = {
        "decode_layers": _decode_layers,
        "prefill_layers": _prefill_layers,
        "iteration": _decode_iteration,
        PREFILL_ITERATION: _prefill_iteration,
        EXIT_ITERATION: _decode_iteration,
        SPLIT_ITERATION: _split_iteration,
        "head": _head,
        "check": _check,
        "kv_fill": _kv_fill,
        **dict.fromkeys(CAPTURES, _capture),
        **dict.fromkeys(("load_disk", "load_host", "load_host_pinned"), _load),
    }
    """How a quantity's seconds come about."""

    def joules(self, row: Row) -> float | None:
        """Predicted joules of an energy reading of known seconds; None without energy."""
        if not self.model.has_energy or row["seconds"] is None:
            return None
        c = self.coefficients
        layers, batch = float(row["layers"] or 0), float(row["batch"] or 0)
        quantity = row["quantity"]
        work = 0.0
        if quantity in DECODE_WINDOWS:
            work = layers * cost.layer_joules(
                c, batch, self.read_tokens(row), self.padded_tokens(row), 0.0, 0.0
            )
        elif quantity in PREFILL_WINDOWS:
            tokens, _, pairs = prefill_load(row)
            work = layers * cost.layer_joules(c, 0.0, 0.0, 0.0, tokens, pairs)
        elif quantity != HEAD_WINDOW:
            return None
        if quantity in (HEAD_WINDOW, *WHOLE_WINDOWS):
            work += cost.head_joules(c, batch)
        return float(cost.iteration_joules(c, row["seconds"], work))


def prefill_load(row: Row) -> tuple[float, float, float]:
    """Tokens, cached tokens read back and query-key pairs of a batch of equal prompts."""
    batch = float(row["batch"] or 1)
    tokens, cached = float(row["prompt_tokens"] or 0), float(row["context_tokens"] or 0)
    return batch * tokens, batch * cached, batch * tokens * (cached + (tokens + 1.0) / 2.0)


def predictor_of(profile: Profile, name: str) -> Predictor:
    """The predictor of a profile's model, with what its measurement remembers."""
    measurement = profile.document.get("measurement") or {}
    kept = measurement.get("models", {}).get(name, {})
    return Predictor(
        model=profile.models[name],
        loading=profile.loading,
        stack_overhead_s=kept.get("stack_overhead_s", {}),
    )
