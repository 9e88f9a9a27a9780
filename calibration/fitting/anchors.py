"""Joules and rate of decoding beside published ones of the same model, whatever the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from helios_sim import cost
from helios_sim.model import PUBLIC_SHAPES
from helios_sim.profile import ModelProfile, Profile
from helios_sim.profiles.published import ENERGY_ANCHORS, EnergyAnchor
from helios_sim.profiles.roofline import REFERENCE_CONTEXT_TOKENS

ANCHORED: Final = "llama3-8b"
SOURCE: Final = (
    "ML.ENERGY, Llama-3.1-8B in bf16 on one H100, at contexts that we did not check and perhaps "
    "with prefills in between"
)


@dataclass(frozen=True)
class Beside:
    """A published load with what a profile has for decoding it: joules a token, tokens a second.

    `beyond` says that the batch lies outside the measured range.
    """

    model: str
    anchor: EnergyAnchor
    joules: float
    tokens_per_s: float
    beyond: bool


def beside_anchors(profile: Profile) -> list[Beside]:
    """Every published load beside each model of that shape; empty without energy or such a model.

    All layers decode rows of equal contexts, padded as the backend pads.
    """
    if not profile.has_energy:
        return []
    return [
        _beside(name, model, anchor)
        for name, model in profile.models.items()
        if _is_anchored(model)
        for anchor in ENERGY_ANCHORS
    ]


def _is_anchored(model: ModelProfile) -> bool:
    """Whether it has the layers and the vocabulary of the model in the literature."""
    known, shape = PUBLIC_SHAPES[ANCHORED], model.model.shape
    return (shape.layers, shape.layer_params(), shape.vocab) == (
        known.layers,
        known.layer_params(),
        known.vocab,
    )


def _beside(name: str, model: ModelProfile, anchor: EnergyAnchor) -> Beside:
    batch, layers = anchor.batch, float(model.model.shape.layers)
    rows = float(model.padded_rows(batch)[batch])
    read = (rows, float(batch * REFERENCE_CONTEXT_TOKENS), rows * REFERENCE_CONTEXT_TOKENS)
    passed = (layers, 0.0, 1.0, 0.0, rows)
    c = model.coefficient_array()
    factor = float(model.residual(batch, model.model.shape.layers)[batch])
    seconds, _ = cost.decode_seconds(c, *read, *passed, float(batch), factor)
    joules = cost.decode_joules(c, *read, *passed, seconds)
    beyond = model.beyond_hull(batch, REFERENCE_CONTEXT_TOKENS) is not None
    return Beside(name, anchor, float(joules) / batch, batch / float(seconds), beyond)


def anchor_lines(found: Sequence[Beside]) -> list[str]:
    """A line for each load, and what the published figures are."""
    if not found:
        return []
    lines = [
        f"{one.model} at batch {one.anchor.batch}: {one.joules:.3g} J a token "
        f"({one.joules / one.anchor.joules:.2f} times the published {one.anchor.joules:g} J), "
        f"{one.tokens_per_s:,.0f} tokens a second (published {one.anchor.tokens_per_s:,.0f})"
        f"{', extrapolated' if one.beyond else ''}."
        for one in found
    ]
    ours = f"Ours: decoding alone, {REFERENCE_CONTEXT_TOKENS} tokens of context assumed."
    return [*lines, f"{ours} Published: {SOURCE}."]
