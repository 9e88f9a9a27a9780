"""Builds the shipped profiles from published tables.

`python -m helios_sim.profiles.published` writes the folders anew, byte for byte the same;
`--compare` prints what the profiles predict beside what was published. Nothing here is tuned to
meet a published result: a coefficient follows from a data sheet, a table or an assumption that
its `source` states.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from helios_sim import cost
from helios_sim.exits import share_leaving_by
from helios_sim.model import PUBLIC_SHAPES, EarlyExitModel
from helios_sim.profile import PROFILE_FILE, ModelProfile, Profile, quantity
from helios_sim.profiles.files import document_text, load_profile
from helios_sim.profiles.parsing import SCHEMA_VERSION
from helios_sim.profiles.roofline import (
    A100,
    COMPUTE_EFFICIENCY,
    H100,
    MEMORY_EFFICIENCY,
    Board,
    Number,
    decode,
    work_of,
)

HELIOS: Final = "HELIOS, arXiv 2504.10724"
LAYERSKIP: Final = "LayerSkip, arXiv 2404.16710"
FLEXEE: Final = "FlexEE, Table 1, exits allowed from the named layer"
DREX: Final = "DREX, arXiv 2512.15705"
SPECEE: Final = "SpecEE, from reading notes"
GPTQ: Final = (
    "full-precision perplexity on WikiText-2 as the quantisation literature quotes it "
    "(OPT: GPTQ, arXiv 2210.17323); quoted from memory, not re-read in the source"
)
ROOFLINE: Final = "roofline"

NOMINAL_THRESHOLD: Final = 0.5
KV_FILL_KERNELS: Final = 3 / 20
SMALL_KERNELS_S: Final = 0.05e-3
DISAGREEMENT_PENALTY_NATS: Final = 1.0
WORKSPACE_BYTES: Final = 2**30
NUM_POSITIONS: Final = 32768
SEED: Final = 2504
HELIOS_TABLE_4: Final = {
    "opt-1.3b": (0.730, 0.047, 0.223),
    "opt-6.7b": (0.736, 0.048, 0.216),
}
"""Share of tokens leaving at each exit, each model alone."""

ASSUMED_CODE_SHARES: Final = {
    "opt-1.3b": (0.40, 0.10, 0.50),
    "opt-6.7b": (0.736, 0.048, 0.216),
}

DEEP_NEEDS_FEW: Final = 0.57
"""Of the tokens that go deep in OPT-1.3B, the share that need only 9 layers of OPT-6.7B."""

NEAR_LAST_FIVE: Final = 0.80
NEAR_BY_CHANCE: Final = 0.32
UNCHANGED_CONFIDENT: Final = 0.921
UNCHANGED_OVERALL: Final = 0.85
UNCHANGED_STEP: Final = 0.2

FLEXEE_MEAN_LAYER: Final = {
    "wikitext": {"llama2-7b": 22.16, "llama2-13b": 27.36, "llama3-8b": 24.15},
    "alpaca": {"llama2-7b": 23.36, "llama2-13b": 28.45, "llama3-8b": 26.29},
    "mmlu": {"llama2-7b": 20.55, "llama2-13b": 25.51, "llama3-8b": 22.27},
    "triviaqa": {"llama2-7b": 22.28, "llama2-13b": 32.85, "llama3-8b": 23.92},
    "mbpp": {"llama2-7b": 24.42, "llama2-13b": 29.38, "llama3-8b": 20.79},
}
"""Mean exit layer by data set; exits from layer 8 (7B, 8B) and from layer 16 (13B)."""

PERPLEXITY: Final = {
    "opt-1.3b": 14.62,
    "opt-6.7b": 10.86,
    "llama2-7b": 5.47,
    "llama2-13b": 4.88,
    "llama3-8b": 6.14,
}

DREX_FULL_S: Final = 55.0e-3
DREX_OVERHEAD_S: Final = 29.0e-3 + 42.3e-3 - 55.0e-3
"""c = shallow + deep - full iteration of Llama-2-13B at batch 8."""


@dataclass(frozen=True)
class EnergyAnchor:
    """A published load: its batch, joules a token, tokens a second, and watts where printed."""

    batch: int
    joules: float
    tokens_per_s: float
    watts: float | None = None


ENERGY_ANCHORS: Final = (
    EnergyAnchor(8, 0.455, 1070.0, 486.0),
    EnergyAnchor(32, 0.165, 3391.0),
    EnergyAnchor(128, 0.095, 7037.0, 669.0),
    EnergyAnchor(256, 0.077, 9010.0),
    EnergyAnchor(512, 0.070, 9806.0),
)
"""ML.ENERGY, Llama-3.1-8B in bf16 on one H100."""


@dataclass(frozen=True)
class Eager:
    """What launching kernels costs before any of them does work."""

    launch_s: Number
    fixed_s: Number


EAGER_A100: Final = Eager(
    launch_s=Number(
        0.8e-3,
        "derived",
        f"{LAYERSKIP}, A100 fp16: Llama2-7B 25.83 ms a token over 32 layers is 0.81 ms, what is "
        "fixed included",
    ),
    fixed_s=Number(1.0e-3, "assumed", "about one layer, as LayerSkip's other tables show"),
)
EAGER_H100: Final = Eager(
    launch_s=Number(
        0.48e-3,
        "derived",
        f"{LAYERSKIP}, H100: Llama2-7B 62.7 tok/s at 32 layers, 232.4 at 8",
    ),
    fixed_s=Number(
        0.5e-3,
        "derived",
        f"{LAYERSKIP}, H100: what the two depths leave, 0.4 to 0.6 ms",
    ),
)


@dataclass(frozen=True)
class Recipe:
    """What makes a shipped profile."""

    name: str
    description: str
    board: Board
    eager: Eager
    models: tuple[EarlyExitModel, ...]
    exit_layers_grade: tuple[str, str]
    exit_head_grade: tuple[str, str]
    domains: tuple[str, ...]
    sources: tuple[str, ...]
    notes: tuple[str, ...]


def solve_stickiness(near: float, by_chance: float, last: int = 5) -> float:
    """Probability that a position keeps the exit of the one before.

    `near` is the share of exits that lie near one of the `last` exits before, `by_chance` the
    share if they were independent. By chance one earlier exit is near with probability h, where
    1 - (1 - h)^last = by_chance. In a chain that keeps its state with probability rho, a token is
    near none of them if it was drawn anew, misses the latest, and misses each older one that was
    drawn anew too: 1 - near = (1 - rho)(1 - h)(1 - (1 - rho) h)^(last - 1).

    This reads `by_chance` as independence, which it cannot quite be: over 32 layers two independent
    exits lie within 2 layers of each other at least once in eleven, and h is less than that.
    """
    h: float = 1.0 - (1.0 - by_chance) ** (1.0 / last)

    def excess(rho: float) -> float:
        anew = 1.0 - rho
        none_near: float = anew * (1.0 - h) * (1.0 - anew * h) ** (last - 1)
        return none_near - (1.0 - near)

    return float(brentq(excess, 0.0, 1.0, xtol=1e-14))


def early_given_deep(correlation: float, early_share: float, deep_share: float) -> float:
    """Chance to leave one model early for tokens that go deep in the other (Gaussian copula).

    P(Z2 <= Phi^-1(early) | Z1 > Phi^-1(1 - deep)) for standard normals of that correlation.
    """
    early, deep = ndtri(early_share), ndtri(1.0 - deep_share)

    def density(z: float) -> float:
        inner = ndtr((early - correlation * z) / math.sqrt(1.0 - correlation**2))
        return math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) * float(inner)

    return float(quad(density, deep, 12.0, epsabs=1e-13, epsrel=1e-12)[0]) / deep_share


def solve_correlation(early_share: float, deep_share: float, wanted: float) -> float:
    """The correlation at which `early_given_deep` is as wanted."""
    return float(
        brentq(
            lambda r: early_given_deep(r, early_share, deep_share) - wanted, 0.0, 0.999, xtol=1e-12
        )
    )


def solve_agreement_below(early_share: float) -> float:
    """Agreement of early tokens under the step, so that all early tokens agree as published."""
    confident = share_leaving_by(early_share, UNCHANGED_STEP, NOMINAL_THRESHOLD)
    return (UNCHANGED_OVERALL - UNCHANGED_CONFIDENT * confident) / (1.0 - confident)


def tilted_shares(exit_layers: Sequence[int], mean_layer: float) -> tuple[float, ...]:
    """The histogram of greatest entropy over the exits with the given mean layer."""
    layers = np.array(exit_layers, dtype=np.float64)
    span = layers[-1] - layers[0]

    def shares(tilt: float) -> Any:
        weights = np.exp(tilt * (layers - layers[-1 if tilt > 0 else 0]) / span)
        return weights / weights.sum()

    tilt = brentq(lambda t: float(shares(t) @ layers) - mean_layer, -200.0, 200.0, xtol=1e-13)
    return tuple(float(share) for share in shares(float(tilt)))


def recipes() -> tuple[Recipe, ...]:
    """The shipped profiles."""
    opt = tuple(
        EarlyExitModel(
            name=name,
            shape=PUBLIC_SHAPES[name],
            exit_layers=exits,
            tokenizer="opt",
            exit_head_params=2 * PUBLIC_SHAPES[name].hidden,
        )
        for name, exits in (("opt-1.3b", (6, 12, 24)), ("opt-6.7b", (9, 17, 32)))
    )
    layerskip = tuple(
        EarlyExitModel(
            name=name,
            shape=PUBLIC_SHAPES[name],
            exit_layers=tuple(range(first, PUBLIC_SHAPES[name].layers + 1, 4)),
            tokenizer=name.split("-")[0],
        )
        for name, first in (("llama2-7b", 8), ("llama2-13b", 16), ("llama3-8b", 8))
    )
    layerskip_notes = (
        "FlexEE prints a mean exit layer by data set and no histogram: the shape is the one of "
        "greatest entropy with that mean, over exits every four layers. Its mode is always the "
        "first exit or the last: which exit most tokens take, and so the depth that HELIOS loads, "
        "rests on this assumption.",
        "FlexEE let tokens leave at every layer from the first exit on; the grid of four layers "
        "keeps the mean.",
        "llama2-7b and llama2-13b share a tokenizer; the perplexity of llama3-8b counts other "
        "tokens and does not compare with theirs.",
        "The joint behaviour of the candidates is not published: the correlation is the one "
        "solved for the OPT pair.",
    )
    return (
        Recipe(
            name="opt-a100-40gb",
            description="The paper's OPT-1.3B and OPT-6.7B pair on one A100-40GB, exits of "
            "Table 4.",
            board=A100,
            eager=EAGER_A100,
            models=opt,
            exit_layers_grade=("published", f"{HELIOS}: exit heads at 1/4, 1/2 and full depth"),
            exit_head_grade=(
                "assumed",
                "a norm of its own (gain and bias) and the tied output head shared by all exits",
            ),
            domains=("chat", "code"),
            sources=(HELIOS, LAYERSKIP, DREX, SPECEE, "vendor data sheet of the A100"),
            notes=(
                "Only the aggregate histogram of Table 4 is published; domain 'chat' carries it.",
                "Domain 'code' is ASSUMED: a harder text on which OPT-1.3B goes deep and OPT-6.7B "
                "does not change, so that a drift of the mix gives a policy a reason to switch.",
            ),
        ),
        *(
            Recipe(
                name=f"layerskip-{label}",
                description="LayerSkip Llama2-7B, Llama2-13B and Llama3-8B on one "
                f"{label.split('-')[0].upper()}-{label.split('-')[1].upper()}, exits at "
                "FlexEE's depths.",
                board=board,
                eager=eager,
                models=layerskip,
                exit_layers_grade=("assumed", "every four layers from FlexEE's first exit on"),
                exit_head_grade=("published", f"{LAYERSKIP}: norm and head are shared"),
                domains=tuple(FLEXEE_MEAN_LAYER),
                sources=(LAYERSKIP, FLEXEE, DREX, SPECEE, HELIOS, f"vendor data sheet, {sheet}"),
                notes=layerskip_notes,
            )
            for label, board, eager, sheet in (
                ("h100-80gb", H100, EAGER_H100, "H100"),
                ("a100-40gb", A100, EAGER_A100, "A100"),
            )
        ),
    )


def build(recipe: Recipe) -> dict[str, Any]:
    """The document of a shipped profile."""
    board = recipe.board
    return {
        "schema_version": SCHEMA_VERSION,
        "name": recipe.name,
        "description": recipe.description,
        "device": {
            "name": board.name,
            "num_gpus": 1,
            "memory_bytes": _number("memory_bytes", board.memory_bytes),
            "idle_w": _number("idle_w", board.idle_w),
            "active_w": _number("active_w", board.active_w),
            "load_w": _number("load_w", board.load_w),
        },
        "loading": {
            "disk": {
                "alpha_s": quantity("alpha_s", 0.05, "assumed", "opening files, reading headers"),
                "bytes_per_s": _number("bytes_per_s", board.disk_bytes_per_s),
            },
            "host": {
                "alpha_s": quantity("alpha_s", 0.005, "assumed", "starting pinned copies"),
                "bytes_per_s": _number("bytes_per_s", board.host_bytes_per_s),
            },
        },
        "models": {model.name: _model_entry(recipe, model) for model in recipe.models},
        "exits": _exits_entry(recipe),
        "provenance": {
            "origin": "published",
            "sources": list(recipe.sources),
            "notes": [
                "No number was tuned to reproduce a published result.",
                *recipe.notes,
                "Decode is eager: the launch floor binds at small batch, as in the paper's own "
                "measurements.",
            ],
        },
    }


def write_profiles(folder: Path) -> list[Path]:
    """Write every shipped profile under `folder`; returns the files."""
    written = []
    for recipe in recipes():
        path = folder / recipe.name / PROFILE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document_text(build(recipe)), encoding="utf-8", newline="\n")
        written.append(path)
    return written


def _rounded(value: float) -> float:
    """Six significant digits: more than any of these numbers is known to."""
    return float(f"{value:.6g}")


def _number(name: str, number: Number) -> dict[str, Any]:
    value = int(number.value) if number.value == int(number.value) else number.value
    return quantity(name, value, number.grade, number.source)


def _model_entry(recipe: Recipe, model: EarlyExitModel) -> dict[str, Any]:
    return {
        "shape": {
            **model.shape.as_table(),
            "grade": "published",
            "source": "public model configuration",
        },
        "exit_layers": quantity("exit_layers", list(model.exit_layers), *recipe.exit_layers_grade),
        "tokenizer": model.tokenizer,
        "bytes_per_param": model.bytes_per_param,
        "bytes_per_kv_element": model.bytes_per_kv_element,
        "exit_head_params": quantity(
            "exit_head_params", model.exit_head_params, *recipe.exit_head_grade
        ),
        "workspace_bytes": quantity(
            "workspace_bytes", WORKSPACE_BYTES, "assumed", "1 GiB of activations and libraries"
        ),
        "confidence": {
            "kind": "max-softmax",
            "default_threshold": quantity(
                "default_threshold",
                NOMINAL_THRESHOLD,
                "assumed",
                "the threshold of the published histograms is not printed",
            ),
        },
        "batch_buckets": [],
        "batch_residual": None,
        "hull": None,
        "coefficients": _coefficients(recipe.board, recipe.eager, model),
    }


def _coefficients(board: Board, eager: Eager, model: EarlyExitModel) -> dict[str, Any]:
    """Every coefficient, from the data sheet's roofline and the launch floor."""
    shape = model.shape
    byte_s = 1.0 / (board.memory_bytes_per_s.value * MEMORY_EFFICIENCY)
    flop_s = 1.0 / (board.flops_per_s.value * COMPUTE_EFFICIENCY)
    span_w = board.limit_w.value - board.active_w.value
    byte_j, flop_j = span_w * byte_s, span_w * flop_s

    work = work_of(model)
    layer_bytes, kv_bytes, head_bytes = work.layer_bytes, work.kv_bytes, work.head_bytes
    row_bytes, row_flops, pair_flops = work.row_bytes, work.row_flops, work.pair_flops
    head_row_bytes, head_row_flops = work.head_row_bytes, work.head_row_flops
    fill_bytes = work.fill_bytes
    fill_row_bytes, fill_row_flops = work.fill_row_bytes, work.fill_row_flops

    memory = (
        "derived",
        f"{ROOFLINE}: bytes at {MEMORY_EFFICIENCY:.0%} (assumed) of {board.name} bandwidth",
    )
    compute = (
        "derived",
        f"{ROOFLINE}: flops at {COMPUTE_EFFICIENCY:.0%} (assumed) of {board.name} fp16 peak",
    )
    both = (
        "derived",
        f"{ROOFLINE}: memory time plus compute time, efficiencies assumed, no overlap assumed",
    )
    joules = (
        "derived",
        "board limit less active power, spent when bytes or flops run at their roof; all of it "
        "assumed to go into them",
    )
    launch = (eager.launch_s.grade, eager.launch_s.source)
    fixed = (eager.fixed_s.grade, eager.fixed_s.source)
    small = ("assumed", "a handful of kernels to launch, about 0.05 ms")
    none = ("derived", "nothing beyond what grows with tokens")
    head = {
        "floor_s": (SMALL_KERNELS_S, *small),
        "base_s": (head_bytes * byte_s, *memory),
        "s_per_row": (head_row_flops * flop_s + head_row_bytes * byte_s, *both),
        "j_base": (head_bytes * byte_j, *joules),
        "j_per_row": (head_row_flops * flop_j + head_row_bytes * byte_j, *joules),
    }
    launches_s = eager.launch_s.value * shape.layers
    values: dict[str, tuple[float, str, str]] = {
        "decode.launch_s": (eager.launch_s.value, *launch),
        "decode.memory_s_per_layer": (layer_bytes * byte_s, *memory),
        "decode.memory_s_per_row": (row_bytes * byte_s, *memory),
        "decode.memory_s_per_context_token": (kv_bytes * byte_s, *memory),
        "decode.compute_s_per_layer": (0.0, *none),
        "decode.compute_s_per_row": (row_flops * flop_s, *compute),
        "decode.compute_s_per_context_token": (pair_flops * flop_s, *compute),
        "prefill.launch_s": (eager.launch_s.value, *launch),
        "prefill.memory_s_per_layer": (layer_bytes * byte_s, *memory),
        "prefill.memory_s_per_token": (row_bytes * byte_s, *memory),
        "prefill.memory_s_per_context_token": (kv_bytes * byte_s, *memory),
        "prefill.compute_s_per_layer": (0.0, *none),
        "prefill.compute_s_per_token": (row_flops * flop_s, *compute),
        "prefill.compute_s_per_pair": (pair_flops * flop_s, *compute),
        "decode.fixed_s": (eager.fixed_s.value, *fixed),
        "prefill.fixed_s": (eager.fixed_s.value, *fixed),
        "kv_fill.floor_s_per_layer": (
            KV_FILL_KERNELS * eager.launch_s.value,
            "assumed",
            "three kernels (keys, values, cache write) of about twenty in a layer, so 3/20 of its "
            "launch floor",
        ),
        "kv_fill.base_s_per_layer": (fill_bytes * byte_s, *memory),
        "kv_fill.s_per_row_layer": (fill_row_flops * flop_s + fill_row_bytes * byte_s, *both),
        "rebatch.overhead_s": (
            max(0.0, DREX_OVERHEAD_S / DREX_FULL_S * launches_s - eager.fixed_s.value),
            "derived",
            f"{DREX}: 29.0 + 42.3 - 55.0 = 16.3 ms on Llama-2-13B at batch 8, 30 % of its full "
            "iteration; scaled (assumed) to this model's launch floor times its layers, without "
            "the fixed part with which the pass of those who stay begins",
        ),
        "power.active_w": (board.active_w.value, board.active_w.grade, board.active_w.source),
        "power.limit_w": (board.limit_w.value, board.limit_w.grade, board.limit_w.source),
        "decode.j_per_layer": (layer_bytes * byte_j, *joules),
        "decode.j_per_row_layer": (row_flops * flop_j + row_bytes * byte_j, *joules),
        "decode.j_per_context_token_layer": (kv_bytes * byte_j + pair_flops * flop_j, *joules),
        "prefill.j_per_layer": (layer_bytes * byte_j, *joules),
        "prefill.j_per_token_layer": (row_flops * flop_j + row_bytes * byte_j, *joules),
        "prefill.j_per_pair_layer": (pair_flops * flop_j, *joules),
        "kv_fill.j_per_layer": (fill_bytes * byte_j, *joules),
        "kv_fill.j_per_row_layer": (fill_row_flops * flop_j + fill_row_bytes * byte_j, *joules),
        **{f"head.{key}": value for key, value in head.items()},
        **{f"check.{key}": value for key, value in head.items()},
    }
    return {
        name: quantity(name, _rounded(values[name][0]), *values[name][1:])
        for name in cost.COEFFICIENTS
        if name not in cost.OPTIONAL_COEFFICIENTS
    }


def _exits_entry(recipe: Recipe) -> dict[str, Any]:
    stickiness = solve_stickiness(NEAR_LAST_FIVE, NEAR_BY_CHANCE)
    correlation = solve_correlation(
        early_share=HELIOS_TABLE_4["opt-6.7b"][0],
        deep_share=HELIOS_TABLE_4["opt-1.3b"][-1],
        wanted=DEEP_NEEDS_FEW,
    )
    is_opt = recipe.name.startswith("opt-")
    joint = (
        f"{HELIOS}: of the tokens that go deep in OPT-1.3B (taken as: reach its last exit) 57 % "
        "need only 9 layers of OPT-6.7B; Gaussian copula assumed"
    )
    if not is_opt:
        joint = f"assumed to be that of the OPT pair ({joint})"
    step_source = f"{HELIOS}, OPT-6.7B after layer 9"
    return {
        "kind": "markov",
        "domains": list(recipe.domains),
        "num_positions": NUM_POSITIONS,
        "seed": SEED,
        "nominal_threshold": quantity(
            "nominal_threshold",
            NOMINAL_THRESHOLD,
            "assumed",
            "the threshold of the published histograms is not printed; 0.5 is taken for it",
        ),
        "stickiness": quantity(
            "stickiness",
            _rounded(stickiness),
            "assumed",
            f"a chain that keeps its state or draws anew, solved from {SPECEE}: 80 % of exits lie "
            "within 2 layers of one of the last five, 32 % by chance. These models' exits do not "
            "tell it: vary it",
        ),
        "correlation": quantity(
            "correlation", _rounded(correlation), "derived" if is_opt else "assumed", joint
        ),
        "agreement": {
            "step_confidence": quantity(
                "step_confidence", UNCHANGED_STEP, "published", step_source
            ),
            "below": quantity(
                "below",
                _rounded(solve_agreement_below(HELIOS_TABLE_4["opt-6.7b"][0])),
                "derived",
                f"{step_source}: so that 85 % agree without a threshold, at the assumed nominal "
                "threshold; assumed alike at every other exit and model",
            ),
            "at_or_above": quantity(
                "at_or_above",
                UNCHANGED_CONFIDENT,
                "published",
                f"{step_source}: 92.1 % unchanged at confidence 0.2 and above; assumed alike at "
                "every other exit and model",
            ),
        },
        "disagreement_penalty_nats": quantity(
            "disagreement_penalty_nats",
            DISAGREEMENT_PENALTY_NATS,
            "assumed",
            "what an early token that differs from the full model's loses; not published",
        ),
        "candidates": {
            model.name: {
                "perplexity": quantity("perplexity", PERPLEXITY[model.name], "published", GPTQ),
                "exit_shares": {domain: _shares_entry(model, domain) for domain in recipe.domains},
            }
            for model in recipe.models
        },
    }


def _shares_entry(model: EarlyExitModel, domain: str) -> dict[str, Any]:
    if domain == "chat":
        return quantity(
            "exit_shares",
            list(HELIOS_TABLE_4[model.name]),
            "published",
            f"{HELIOS}, Table 4, the model alone",
        )
    if domain == "code":
        return quantity(
            "exit_shares",
            list(ASSUMED_CODE_SHARES[model.name]),
            "assumed",
            "a harder text invented to exercise drift; nothing is published by domain",
        )
    mean = FLEXEE_MEAN_LAYER[domain][model.name]
    shares = [_rounded(share) for share in tilted_shares(model.exit_layers, mean)]
    return quantity(
        "exit_shares",
        shares,
        "derived",
        f"{FLEXEE}: mean exit layer {mean:g} on {domain} (published); the shape of greatest "
        "entropy is assumed",
    )


def _brief(value: float, digits: int) -> str:
    """A value to so many digits, in whole numbers from a thousand on."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Comparison:
    """A published figure and what the profile predicts for it."""

    what: str
    profile: str
    published: float
    predicted: float
    unit: str
    basis: str

    def row(self) -> str:
        """A row of a Markdown table."""
        ratio = self.predicted / self.published
        published = f"{_brief(self.published, 4)} {self.unit}".strip()
        predicted = f"{_brief(self.predicted, 3)} {self.unit}".strip()
        return (
            f"| {self.what} | {self.profile} | {published} | {predicted} | {ratio:.2f} | "
            f"{self.basis} |"
        )


def prefill_seconds(profile: ModelProfile, layers: int, tokens: int) -> float:
    """Seconds of the prefill of one prompt, alone, through so many layers."""
    c = profile.coefficient_array()
    pairs = tokens * (tokens + 1) / 2
    return cost.mixed_seconds(c, 0.0, 0.0, 0.0, tokens, 0.0, pairs, layers, 0.0, 1.0, 1.0, 1.0)[0]


def solo_decode(profile: ModelProfile, shares: Sequence[float]) -> tuple[float, float]:
    """Mean seconds and joules of a token at batch 1 that leaves at its own exit.

    Every early exit it reaches is checked, and the KV cache of the layers it skips is filled.
    """
    exits = profile.model.exit_layers
    seconds = joules = 0.0
    for level, share in enumerate(shares):
        is_last = level == len(exits) - 1
        token_s, token_j = decode(
            profile,
            exits[level],
            num_checks=level if is_last else level + 1,
            num_heads=int(is_last),
            filled_layers=exits[-1] - exits[level],
        )
        seconds += share * token_s
        joules += share * token_j
    return seconds, joules


def comparisons() -> list[Comparison]:
    """Published figures beside what the shipped profiles predict for them."""
    opt = load_profile("opt-a100-40gb")
    a100 = load_profile("layerskip-a100-40gb")
    h100 = load_profile("layerskip-h100-80gb")
    small, large = opt.models["opt-1.3b"], opt.models["opt-6.7b"]
    alone = {name: solo_decode(opt.models[name], HELIOS_TABLE_4[name]) for name in HELIOS_TABLE_4}
    # Table 4's HELIOS row by model: 78.35 % of the tokens are OPT-1.3B's.
    helios_s = helios_j = 0.0
    for model, shares in ((small, (0.7019, 0.0138, 0.0678)), (large, (0.2090, 0.0014, 0.0061))):
        for depth, share in zip(model.model.exit_layers, shares, strict=True):
            token_s, token_j = decode(model, depth)
            helios_s += share * token_s
            helios_j += share * token_j
    solo = "batch 1, own exits, checks and KV filling charged"
    deep = "batch 1, every layer"
    read_off = "; the launch floor was read off this row"
    rows = [
        Comparison("TPOT of OPT-6.7B", opt.name, 15.0, 1e3 * alone["opt-6.7b"][0], "ms", solo),
        Comparison(
            "TPOT of HELIOS", opt.name, 8.0, 1e3 * helios_s, "ms", "batch 1, at the loaded depth"
        ),
        Comparison(
            "TTFT of OPT-1.3B",
            opt.name,
            42.0,
            1e3 * prefill_seconds(small, 24, 512),
            "ms",
            "no queue, prompt of 512 tokens assumed",
        ),
        Comparison(
            "TTFT of OPT-6.7B",
            opt.name,
            69.0,
            1e3 * prefill_seconds(large, 32, 512),
            "ms",
            "no queue, prompt of 512 tokens assumed",
        ),
        Comparison(
            "energy, OPT-6.7B over OPT-1.3B",
            opt.name,
            1.01 / 0.50,
            alone["opt-6.7b"][1] / alone["opt-1.3b"][1],
            "",
            solo + ", decode only",
        ),
        Comparison(
            "energy, HELIOS over OPT-1.3B",
            opt.name,
            0.45 / 0.50,
            helios_j / alone["opt-1.3b"][1],
            "",
            "as above",
        ),
    ]
    for name, milliseconds in (("llama2-7b", 25.83), ("llama2-13b", 32.95), ("llama3-8b", 28.87)):
        model = a100.models[name]
        seconds, _ = decode(model, model.model.shape.layers)
        what = f"full depth, {name}"
        basis = deep + (read_off if name == "llama2-7b" else "")
        rows.append(Comparison(what, a100.name, milliseconds, 1e3 * seconds, "ms", basis))
    for name, depth, rate in (
        ("llama2-7b", 32, 62.7),
        ("llama2-7b", 8, 232.4),
        ("llama2-13b", 40, 37.2),
        ("llama2-13b", 15, 105.5),
    ):
        model = h100.models[name]
        what = f"layer {depth}, {name}"
        predicted = 1.0 / decode(model, depth)[0]
        basis = "batch 1, leaves at that layer, nothing filled, CNN-DM"
        basis += read_off if name == "llama2-7b" else ""
        rows.append(Comparison(what, h100.name, rate, predicted, "tok/s", basis))
    return rows + [row for anchor in ENERGY_ANCHORS for row in anchored(anchor, h100)]


def anchored(anchor: EnergyAnchor, profile: Profile) -> list[Comparison]:
    """A load of ML.ENERGY beside steady decode at full depth without launch floors.

    They print 7.3 ms between tokens at batch 8, below the eager floor of 15.9 ms: their backend
    does not launch kernel by kernel.
    """
    model = profile.models["llama3-8b"]
    seconds, joules = decode(model, model.model.shape.layers, anchor.batch, launch_free=True)
    pairs = [
        ("energy of a token", anchor.joules, joules / anchor.batch, "J"),
        ("tokens a second", anchor.tokens_per_s, anchor.batch / seconds, "tok/s"),
        ("board power", anchor.watts, joules / seconds, "W"),
    ]
    basis = "full depth, context 512 assumed, no launch floor; ML.ENERGY, Llama-3.1-8B"
    return [
        Comparison(
            f"{what} at batch {anchor.batch}, llama3-8b",
            profile.name,
            published,
            predicted,
            unit,
            basis,
        )
        for what, published, predicted, unit in pairs
        if published is not None
    ]


def comparison_table() -> str:
    """The comparison as a Markdown table."""
    head = (
        "| what | profile | published | predicted | ratio | how it is predicted |\n"
        "|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(comparison.row() for comparison in comparisons())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the shipped profiles, or print the comparison."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--compare"]:
        print(comparison_table())
        return 0
    if given in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if given:
        print(
            f"Unknown arguments {given}; allowed are --compare, --help or nothing.", file=sys.stderr
        )
        return 2
    for path in write_profiles(Path(__file__).parent):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
