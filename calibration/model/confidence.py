"""How sure a model is of its token at an exit, raw or calibrated, always within [0, 1].

Three kinds: the largest softmax probability (EE-LLM), the margin between the two largest (DREX,
arXiv 2512.15705), and the entropy H as 1 - H / ln(vocabulary). A calibration maps raw confidence
to the probability of being right, piecewise linear and non-decreasing, one map per exit layer,
for all domains or for each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from helios_sim.errors import InputError

Kind = Literal["max-softmax", "top2-margin", "entropy"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
ALL_DOMAINS: Final = "all"
"""Name of the maps that serve every domain without its own."""


def confidence_of(logits: Tensor, kind: Kind) -> Tensor:
    """Confidence [N] in float32 of logits [N, vocab]; stays on the device, no synchronisation."""
    logits = logits.float()
    if kind == "max-softmax":
        return (logits.amax(-1) - logits.logsumexp(-1)).exp()
    if kind == "top2-margin":
        top = (logits.topk(2, dim=-1).values - logits.logsumexp(-1, keepdim=True)).exp()
        return top[..., 0] - top[..., 1]
    if kind == "entropy":
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return (1.0 - entropy / math.log(logits.shape[-1])).clamp(0.0, 1.0)
    raise InputError(f"The confidence kind {kind!r} is unknown; allowed are {', '.join(KINDS)}.")


@lru_cache(maxsize=256)
def _knots(
    x: tuple[float, ...], y: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A map's knots on a device; kept there, since bringing them would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor([x, y], dtype=dtype, device=device)


@dataclass(frozen=True)
class PiecewiseLinear:
    """A non-decreasing map of [0, 1] into itself, constant beyond its first and last knot."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y):
            raise InputError(
                f"A calibration map was given {len(self.x)} x and {len(self.y)} y; "
                "it needs as many of the one as of the other, at least one."
            )
        if any(not 0.0 <= value <= 1.0 for value in (*self.x, *self.y)):
            raise InputError("A calibration map holds a value outside [0, 1].")
        if any(b <= a for a, b in pairwise(self.x)) or any(b < a for a, b in pairwise(self.y)):
            raise InputError("A calibration map must rise in x and never fall in y.")

    def on(self, device: torch.device) -> Tensor:
        """The knots [2, K] on a device: x, then y."""
        return _knots(self.x, self.y, torch.float32, device)

    def of_tensor(self, values: Tensor) -> Tensor:
        """The map of each value, on the values' device."""
        x, y = _knots(self.x, self.y, values.dtype, values.device).unbind()
        if len(self.x) == 1:
            return y.expand(values.shape).clone()
        right = torch.searchsorted(x, values.contiguous()).clamp(1, len(self.x) - 1)
        left = right - 1
        # Knots may meet in a narrower type: the map then has a step.
        gap = (x[right] - x[left]).clamp(min=torch.finfo(values.dtype).tiny)
        share = ((values - x[left]) / gap).clamp(0.0, 1.0)
        return y[left] + share * (y[right] - y[left])


@dataclass(frozen=True)
class Confidence:
    """What counts as confident at an exit.

    `maps` holds a calibration per domain (or "all") and exit layer; empty means raw confidence.
    """

    kind: Kind = "max-softmax"
    threshold: float = 0.5
    maps: Mapping[str, Mapping[int, PiecewiseLinear]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"The confidence kind {self.kind!r} is unknown; allowed are {', '.join(KINDS)}."
            )
        if not 0.0 <= self.threshold <= 1.0:
            raise InputError(
                f"The confidence threshold {self.threshold} is not allowed; it lies in [0, 1]."
            )

    @property
    def is_calibrated(self) -> bool:
        """Whether any map is held."""
        return bool(self.maps)

    @property
    def maps_sha256(self) -> str | None:
        """A hash that tells two calibrations apart; None for raw confidence."""
        if not self.maps:
            return None
        told = json.dumps(self.to_json()["calibration"], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def of(self, logits: Tensor, exit_layer: int, domain: str = ALL_DOMAINS) -> Tensor:
        """Confidence [N] of logits [N, vocab] at an exit, calibrated where a map is held."""
        raw = confidence_of(logits, self.kind)
        found = self.map_of(exit_layer, domain)
        return raw if found is None else found.of_tensor(raw)

    def map_of(self, exit_layer: int, domain: str = ALL_DOMAINS) -> PiecewiseLinear | None:
        """The map of a domain at an exit, else that of all domains, else None."""
        for name in (domain, ALL_DOMAINS):
            found = self.maps.get(name, {}).get(exit_layer)
            if found is not None:
                return found
        return None

    def to_json(self) -> dict[str, Any]:
        """As it stands in early_exit.json."""
        calibration = {
            domain: {str(layer): [list(m.x), list(m.y)] for layer, m in sorted(maps.items())}
            for domain, maps in sorted(self.maps.items())
        }
        return {
            "kind": self.kind,
            "threshold": self.threshold,
            "calibration": calibration or None,
        }


def confidence_from_json(document: Mapping[str, Any], where: str | None = None) -> Confidence:
    """Read what `Confidence.to_json` wrote; anything else is an InputError."""
    unknown = sorted(set(document) - {"kind", "threshold", "calibration"})
    if unknown:
        raise InputError(
            f"The confidence has unknown keys {unknown}; allowed are kind, threshold, calibration.",
            where,
        )
    try:
        maps = {
            str(domain): {
                int(layer): PiecewiseLinear(tuple(map(float, x)), tuple(map(float, y)))
                for layer, (x, y) in by_layer.items()
            }
            for domain, by_layer in (document.get("calibration") or {}).items()
        }
        kind, threshold = document.get("kind", "max-softmax"), document.get("threshold", 0.5)
        return Confidence(kind, float(threshold), maps)
    except InputError as error:
        raise error.at(where) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            "The confidence's calibration must map domains to exit layers to [x, y] lists of "
            "numbers.",
            where,
        ) from error
