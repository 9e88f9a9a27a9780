"""Decode layers fitted whole: planes, and factors on them by batch and by loaded depth.

Two things no plane can say: one row is a product of a matrix and a vector, which is cheaper than
its share of a batch, and layers of which few are loaded find their weights and keys in a cache.
Planes and factors are fitted in turns, each given the others, until nothing moves. Fitted one
after the other, the intercept over the layers and the price of a row would take what belongs to
the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from calibration.fitting import regression
from calibration.fitting.regression import (
    Chosen,
    Equations,
    Floats,
    Groups,
    LeftOut,
    MaxFit,
    relative_errors,
)
from helios_sim.profile import curve

Knots: TypeAlias = tuple[tuple[float, float], ...]
"""(Place, factor), places rising; none means the factor 1."""

Factors: TypeAlias = frozenset[str]
BATCH: Final = "batch"
DEPTH: Final = "depth"
NO_FACTORS: Final[Factors] = frozenset()

_LEAST_PLACES: Final = {BATCH: 3, DEPTH: 2}
"""Batches or depths below which a factor by them says nothing."""
_MAX_TURNS: Final = 200
_STILL: Final = 1e-7
_STILL_WITHOUT: Final = 1e-5
"""Turns end where no factor moves by more than this share of itself; without a group of readings,
whose error is wanted to a thousandth of itself, they end sooner."""
_BOUNDS: Final = (0.2, 5.0)
_CIRCLE: Final = 8
"""Turns without a smaller step after which they are taken to go in circles."""
_EXTRAPOLATE_EVERY: Final = 4
_LARGEST_SHARE: Final = 0.98


@dataclass(frozen=True)
class Growth:
    """What a layer carries before and after one more row joins, at several contexts.

    Features by plane, shape (contexts, batches, features), of batches 1, 2, ... before and
    2, 3, ... after; `rows` are the rows computed at batches 1, 2, 3, ...
    """

    rows: Floats
    before: tuple[Floats, ...]
    after: tuple[Floats, ...]

    def with_planes(self, chosen: Sequence[int]) -> Growth:
        """The same with some of the planes."""
        return Growth(
            self.rows,
            tuple(self.before[i] for i in chosen),
            tuple(self.after[i] for i in chosen),
        )

    def slack(self, fit: MaxFit) -> Floats:
        """By batch 1, 2, ... the logarithm of how far factors may have fallen since batch 1."""
        before, after = _largest(fit, self.before), _largest(fit, self.after)
        ratio = np.ones_like(before)
        np.divide(before, after, out=ratio, where=(before > 0.0) & (after > 0.0))
        return np.concatenate(([0.0], np.cumsum(np.log(ratio.max(axis=0)))))

    def falls(self, fit: MaxFit, knots: Knots) -> bool:
        """Whether a layer gets shorter anywhere as a row joins."""
        factors = curve(knots, self.rows)
        before = _largest(fit, self.before) * factors[:-1]
        after = _largest(fit, self.after) * factors[1:]
        return bool((after < before * (1.0 - 1e-12)).any())


def _largest(fit: MaxFit, planes: tuple[Floats, ...]) -> Floats:
    values = [features @ own for features, own in zip(planes, fit.planes, strict=True)]
    return np.asarray(np.max(values, axis=0), dtype=np.float64)


@dataclass(frozen=True)
class Loads:
    """Decode readings with the rows each computed; the layers of a reading are the loaded ones.

    The first of the overheads is what a timed stack takes beside its layers.
    """

    readings: Equations
    rows: Floats
    growth: Growth

    def __len__(self) -> int:
        return len(self.readings)

    def take(self, places: NDArray[np.bool_]) -> Loads:
        """Some of the readings."""
        return replace(self, readings=self.readings.take(places), rows=self.rows[places])

    def with_planes(self, chosen: Sequence[int]) -> Loads:
        """The same readings with some of the planes."""
        return replace(
            self,
            readings=self.readings.with_planes(chosen),
            growth=self.growth.with_planes(chosen),
        )

    def without_intercept(self) -> Loads:
        """The same readings, stacks taking nothing beside their layers."""
        overheads = self.readings.overheads.copy()
        overheads[:, 0] = 0.0
        return replace(self, readings=replace(self.readings, overheads=overheads))

    def places(self, factor: str) -> Floats:
        """What a factor goes by, for each reading."""
        return self.rows if factor == BATCH else self.readings.layers


@dataclass(frozen=True)
class JointFit:
    """Planes and overheads, and the factors on the planes."""

    fit: MaxFit
    knots: Mapping[str, Knots] = field(default_factory=dict)

    def factors(self, loads: Loads) -> Floats:
        """The factor on each reading's layers."""
        product = np.ones(len(loads))
        for factor, knots in self.knots.items():
            product = product * curve(knots, loads.places(factor))
        return product

    def seconds(self, loads: Loads) -> Floats:
        """Predicted seconds of each reading."""
        return self.fit.seconds(loads.readings.scaled(self.factors(loads)))


def fit_joint(
    loads: Loads, factors: Factors, start: JointFit | None = None, still: float = _STILL
) -> JointFit:
    """Planes and the factors asked for, fitted together.

    A layer never gets shorter as a row joins, nor as more layers are loaded. Where the planes
    leave the batches' factors room to fall they may, unless the curve between the knots
    then falls too fast; they only rise in that case. Turns end where no factor moves by more than
    the share `still` of itself.
    """
    readings = loads.readings
    if start is None:
        start = JointFit(regression.fit_max(readings))
    if not factors:
        return JointFit(regression.refit(readings, regression.assignment(readings, start.fit)))
    found = _turns(loads, factors, start, still, rising=False)
    if BATCH in factors and loads.growth.falls(found.fit, found.knots[BATCH]):
        found = _turns(loads, factors, found, still, rising=True)
    return found


def _turns(loads: Loads, factors: Factors, start: JointFit, still: float, rising: bool) -> JointFit:
    readings = loads.readings
    fit = start.fit
    places = {name: np.unique(loads.places(name)) for name in factors}
    known = {name: curve(start.knots.get(name, ()), places[name]) for name in factors}
    at = {name: np.searchsorted(places[name], loads.places(name)) for name in factors}

    def product(but: str = "") -> Floats:
        parts = [known[name][at[name]] for name in factors if name != but]
        return np.prod(parts, axis=0) if parts else np.ones(len(readings))

    stride = _Stride(still)
    for _ in range(_MAX_TURNS):
        before = np.concatenate(list(known.values()))
        scaled = readings.scaled(product())
        trust = regression.trust_in(relative_errors(fit.seconds(scaled), readings.seconds))
        for name in sorted(factors):
            others = readings.scaled(product(but=name))
            seen, weights = _ratios(others, fit, at[name], len(places[name]), trust)
            if name == DEPTH:
                known[name] = regression.isotonic(seen, weights)
                known[name] /= known[name][-1]
            else:
                slack = np.zeros(len(seen)) if rising else _slack(loads, fit, places[name])
                logs = regression.isotonic(np.log(seen) - slack, weights * seen**2) + slack
                known[name] = np.exp(logs - _weighted_median(logs, weights))
        step = np.log(np.concatenate(list(known.values())) / before)
        ahead = stride.beyond(step)
        if not stride.ended and ahead is not None:
            cuts = np.cumsum([len(own) for own in known.values()])[:-1]
            for name, more in zip(known, np.split(ahead, cuts), strict=True):
                known[name] = known[name] * np.exp(more)
        scaled = readings.scaled(product())
        fit = regression.solve(scaled, regression.assignment(scaled, fit), trust)
        if stride.ended:
            break
    knots = {
        name: tuple(zip(places[name].tolist(), known[name].tolist(), strict=True))
        for name in sorted(factors)
    }
    return JointFit(fit, knots)


class _Stride:
    """The steps that factors take from turn to turn: when they end, and how far they lead.

    Planes and factors trade with each other, and turns alone approach their end slowly; where
    steps shrink by the same share every time, the rest of them is known (Aitken's extrapolation).
    """

    def __init__(self, still: float) -> None:
        self.still = still
        self.ended = False
        """Whether nothing moves any more, or turns go in circles."""
        self._last: Floats | None = None
        self._count = 0
        self._smallest = np.inf
        self._since_smallest = 0

    def beyond(self, step: Floats) -> Floats | None:
        """What to go beyond a step by; None where steps are not to be trusted yet."""
        last, self._last = self._last, step
        self._count += 1
        self._since_smallest += 1
        length = float(np.abs(step).max())
        if length < 0.9 * self._smallest:
            self._smallest, self._since_smallest = length, 0
        self.ended = length < self.still or self._since_smallest >= _CIRCLE
        if last is None or self._count % _EXTRAPOLATE_EVERY:
            return None
        share = float(last @ step) / max(float(last @ last), 1e-300)
        if not 0.0 < share < _LARGEST_SHARE:
            return None
        self._last = None
        return np.asarray(step * share / (1.0 - share), dtype=np.float64)


def _ratios(
    readings: Equations, fit: MaxFit, at: NDArray[np.int64], count: int, trust: Floats
) -> tuple[Floats, Floats]:
    """By place the factor on the layers that fits best in relative error, and its weight."""
    share = trust / readings.seconds
    own = share * readings.layers * fit.layer_seconds(readings)
    seen = share * (readings.seconds - readings.known - readings.overheads @ fit.overheads)
    weights = np.bincount(at, own * own, count).astype(np.float64)
    found = np.ones(count)
    np.divide(np.bincount(at, own * seen, count), weights, out=found, where=weights > 0.0)
    return np.clip(found, *_BOUNDS), weights


def _slack(loads: Loads, fit: MaxFit, rows: Floats) -> Floats:
    """The logarithm of how far factors may have fallen at some numbers of rows computed."""
    growth = loads.growth
    return np.interp(rows, growth.rows, growth.slack(fit))


def _weighted_median(values: Floats, weights: Floats) -> float:
    """The value of the middle weight, so that the coefficients speak of the usual batch."""
    order = np.argsort(values, kind="stable")
    heap = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(heap, heap[-1] / 2)])


def leave_out(loads: Loads, whole: JointFit, factors: Factors, groups: Groups) -> LeftOut:
    """Leave out group by group: planes and factors are fitted again without it."""
    errors = np.zeros(len(loads))
    moved = []
    for label in np.unique(groups):
        out = groups == label
        if out.all():
            unknown = np.full(len(loads), np.nan)
            return LeftOut(unknown, np.full(len(whole.fit.flat()), np.nan))
        found = fit_joint(loads.take(~out), factors, whole, _STILL_WITHOUT)
        rest = loads.take(out)
        errors[out] = relative_errors(found.seconds(rest), rest.readings.seconds)
        moved.append(found.fit.flat())
    return LeftOut(errors, regression.jackknife(moved))


@dataclass(frozen=True)
class ChosenJoint:
    """Planes and factors kept, and the left-out errors by which they were chosen.

    `scores` holds the left-out error by the factors tried on the same planes.
    """

    chosen: Chosen
    knots: Mapping[str, Knots]
    scores: Mapping[Factors, float]


def choose(loads: Loads, options: Sequence[tuple[int, ...]], groups: Groups) -> ChosenJoint:
    """The simplest planes and the fewest factors, unless more clearly lower the left-out error.

    Planes are chosen without factors, then factors on those planes, then the planes once more:
    a floor may have stood in for a factor. Beside a factor by depth the stacks' intercept is kept
    only where it helps clearly too, for the two trade with each other over a wide range.
    """
    plain = regression.choose_planes(loads.readings, options, groups)
    tried = [_Tried(loads, NO_FACTORS, plain.planes, JointFit(plain.fit), plain.left_out)]
    scores = {NO_FACTORS: tried[0].score}
    for factors in _factor_sets(loads):
        kinds = [loads.without_intercept(), loads] if DEPTH in factors else [loads]
        variants = [_try(kind, plain.planes, factors, groups) for kind in kinds]
        best = variants[regression.simplest([one.score for one in variants])]
        scores[factors] = best.score
        tried.append(best)
    best = tried[regression.simplest([one.score for one in tried])]
    if not best.factors:
        return ChosenJoint(plain, {}, scores)
    tried = [
        best if option == best.planes else _try(best.loads, option, best.factors, groups)
        for option in regression.tryable(loads.readings, options, groups)
    ]
    considered = tuple((one.planes, one.score) for one in tried)
    best = tried[regression.simplest([one.score for one in tried])]
    chosen = Chosen(best.planes, best.joint.fit, best.left_out, considered)
    return ChosenJoint(chosen, best.joint.knots, scores)


@dataclass(frozen=True)
class _Tried:
    """Planes and factors, their fit and how well it does without the point it predicts."""

    loads: Loads
    factors: Factors
    planes: tuple[int, ...]
    joint: JointFit
    left_out: LeftOut

    @property
    def score(self) -> float:
        return regression.score(self.left_out.errors)


def _try(loads: Loads, planes: tuple[int, ...], factors: Factors, groups: Groups) -> _Tried:
    own = loads.with_planes(planes)
    joint = fit_joint(own, factors)
    return _Tried(loads, factors, planes, joint, leave_out(own, joint, factors, groups))


def _factor_sets(loads: Loads) -> list[Factors]:
    """The factors that the readings can tell of: each alone, then both."""
    able = [
        name for name in (DEPTH, BATCH) if len(np.unique(loads.places(name))) >= _LEAST_PLACES[name]
    ]
    sets = [frozenset({name}) for name in able]
    return [*sets, frozenset(able)] if len(able) > 1 else sets
