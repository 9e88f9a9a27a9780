"""What the small family can be: its models, their sizes, and how long each preset trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from calibration.training.text import DOMAINS
from helios_sim.errors import InputError


@dataclass(frozen=True)
class ModelPlan:
    """One model of a family: its domains with their share of the text, its size, its exits.

    `share` is the part of the family's time that it may use, in processes times seconds.
    """

    name: str
    domains: Mapping[str, float]
    layers: int
    hidden: int
    heads: int
    ffn: int
    exit_layers: tuple[int, ...]
    share: float

    def __post_init__(self) -> None:
        unknown = sorted(set(self.domains) - set(DOMAINS))
        if unknown or not self.domains:
            raise InputError(
                f"The model {self.name!r} names the domains {sorted(self.domains)}; there are "
                f"{', '.join(map(repr, DOMAINS))}."
            )


@dataclass(frozen=True)
class Preset:
    """How a family is trained: its models, the text, the windows and the time.

    An iteration is `rows` windows of `window_tokens`; a `long_share` of the iterations, evenly
    spread, uses `long_rows` windows of `long_window_tokens`, the longest sequences the models are
    made for. They are spread because a model that meets long windows only at the end loses half
    a nat there and has no time left to make it good.
    Training ends after `iterations` or with the budget, whichever comes first, and the learning
    rate has fallen to its end in either case.
    """

    name: str
    models: tuple[ModelPlan, ...]
    iterations: int
    window_tokens: int
    rows: int
    long_window_tokens: int
    long_rows: int
    long_share: float
    learning_rate: float
    early_weight: float
    budget_s: float
    held_out_tokens: int
    max_train_bytes: int | None = None
    packages: tuple[str, ...] = ()


def _family(
    specialist: tuple[int, int, int], generalist: tuple[int, int, int]
) -> tuple[ModelPlan, ...]:
    """The code, prose and general models, of (hidden, heads, ffn) each."""

    def model(
        name: str,
        domains: Mapping[str, float],
        layers: int,
        size: tuple[int, int, int],
        share: float,
    ) -> ModelPlan:
        quarters = tuple(layers * quarter // 4 for quarter in range(1, 5))
        return ModelPlan(name, domains, layers, *size, exit_layers=quarters, share=share)

    mix = {"code": 0.45, "prose": 0.45, "tables": 0.1}
    return (
        model("code-8l", {"code": 1.0}, 8, specialist, 0.25),
        model("prose-8l", {"prose": 1.0}, 8, specialist, 0.25),
        model("general-12l", mix, 12, generalist, 0.5),
    )


PRESETS: Final[Mapping[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tiny",
            models=_family((48, 4, 128), (64, 4, 176)),
            iterations=220,
            window_tokens=96,
            rows=4,
            long_window_tokens=256,
            long_rows=2,
            long_share=0.25,
            learning_rate=1e-2,
            early_weight=0.5,
            budget_s=120.0,
            held_out_tokens=4096,
            max_train_bytes=400_000,
        ),
        Preset(
            name="cpu",
            models=_family((96, 4, 256), (128, 4, 344)),
            iterations=3000,
            window_tokens=128,
            rows=4,
            long_window_tokens=512,
            long_rows=1,
            long_share=0.3,
            learning_rate=6e-3,
            early_weight=0.5,
            budget_s=540.0,
            held_out_tokens=16384,
        ),
        Preset(
            name="cuda",
            models=_family((512, 8, 1408), (768, 12, 2048)),
            iterations=6000,
            window_tokens=512,
            rows=32,
            long_window_tokens=2048,
            long_rows=8,
            long_share=0.25,
            learning_rate=3e-3,
            early_weight=0.5,
            budget_s=480.0,
            held_out_tokens=32768,
            max_train_bytes=12_000_000,
            # What the calibration itself needs is installed wherever this preset runs.
            packages=("torch", "transformers", "numpy", "scipy"),
        ),
    )
}


def preset_of(name: str) -> Preset:
    """The preset of a name, or an `InputError` that lists them."""
    if name not in PRESETS:
        raise InputError(
            f"The preset {name!r} was given; there are {', '.join(map(repr, PRESETS))}."
        )
    return PRESETS[name]
