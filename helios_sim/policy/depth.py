"""Greedy depth: how many layers to load, from the exits that tokens took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

from helios_sim.errors import InputError
from helios_sim.policy.options import check_choice, check_share, check_whole_number, refused

DepthRule = Literal["dominant", "quantile", "fixed"]
DEPTH_RULES: Final[tuple[DepthRule, ...]] = get_args(DepthRule)

ROUNDING: Final = 1e-12
"""Slack when shares are added, so that shares that add up to a quantile on paper reach it."""


def check_depth_options(rule: object, quantile: object, fixed_depth: object) -> None:
    """Refuse a depth rule that does not exist or lacks its figure."""
    check_choice("depth_rule", rule, DEPTH_RULES)
    check_share("depth_quantile", quantile, zero_allowed=False)
    if rule == "fixed" and fixed_depth is None:
        raise InputError("Option 'fixed_depth' was left out; depth_rule 'fixed' needs it.")
    if rule == "fixed":
        check_whole_number("fixed_depth", fixed_depth, 1)
    elif fixed_depth is not None:
        raise refused(
            "fixed_depth",
            fixed_depth,
            f"left out with depth_rule {rule!r}; it belongs to depth_rule 'fixed'",
        )


def dominant_level(shares: Sequence[float]) -> int:
    """The exit where most tokens leave; the shallowest of equals."""
    return max(range(len(shares)), key=lambda level: (shares[level], -level))


def quantile_level(shares: Sequence[float], quantile: float) -> int:
    """The shallowest exit by which at least `quantile` of the tokens have left."""
    for level in range(len(shares)):
        if math.fsum(shares[: level + 1]) >= quantile - ROUNDING:
            return level
    return len(shares) - 1


def fixed_level(exit_layers: Sequence[int], depth: int) -> int:
    """The shallowest exit of at least `depth` layers; full depth where there is none.

    Candidates of different size have different exits, so one figure need not be an exit of all.
    """
    for level, layers in enumerate(exit_layers):
        if layers >= depth:
            return level
    return len(exit_layers) - 1


def greedy_level(
    rule: DepthRule,
    shares: Sequence[float] | None,
    exit_layers: Sequence[int],
    quantile: float,
    fixed_depth: int | None,
) -> int:
    """The exit level a rule chooses; the shallowest exit where nothing was measured yet."""
    if rule == "fixed" and fixed_depth is not None:
        return fixed_level(exit_layers, fixed_depth)
    if shares is None:
        return 0
    return quantile_level(shares, quantile) if rule == "quantile" else dominant_level(shares)
