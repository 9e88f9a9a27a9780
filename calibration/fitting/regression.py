"""Regression with physics in it: coefficients never negative, errors relative, roofs as a max.

A layer's time is the largest of several planes (launch floor, memory, compute), each linear in
what the layer carries. Readings are stacks of k layers, so a reading is an overhead plus k times
that maximum. Which plane bounds a reading is not known beforehand: assignment and coefficients
are improved in turn, as in Magnani and Boyd, "Convex piecewise-linear fitting", Optimization and
Engineering 10 (2009), here with non-negative least squares (Lawson and Hanson) in the inner step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, nnls

Floats: TypeAlias = NDArray[np.float64]
Assignment: TypeAlias = NDArray[np.int64]
Groups: TypeAlias = NDArray[np.int64]

MAX_ROUNDS: Final = 60
TRUST_ROUNDS: Final = 3
HUBER_EDGE: Final = 2.0
"""Errors beyond so many usual ones (as standard deviations) are trusted less."""

_LEAST_WEIGHT: Final = 1e-300

REAL_GAIN: Final = 0.9
"""An extra plane must bring the left-out error below this share of what it is without."""
REAL_GAIN_ABSOLUTE: Final = 0.002
"""... and lower it by at least this much: a tenth of nothing is no reason for a knee."""


@dataclass(frozen=True)
class Equations:
    """What is fitted: seconds explained by overheads and by k layers of the largest plane.

    `planes` holds for every plane its features, shape (readings, features of that plane);
    `overheads` are columns outside the maximum, shape (readings, overheads); `layers` is k and
    `known` are seconds explained already.
    """

    seconds: Floats
    layers: Floats
    known: Floats
    overheads: Floats
    planes: tuple[Floats, ...]

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> Equations:
        """Some of the readings."""
        return Equations(
            self.seconds[places],
            self.layers[places],
            self.known[places],
            self.overheads[places],
            tuple(plane[places] for plane in self.planes),
        )

    def with_planes(self, chosen: Sequence[int]) -> Equations:
        """The same readings with some of the planes."""
        return replace(self, planes=tuple(self.planes[i] for i in chosen))

    def scaled(self, factors: Floats) -> Equations:
        """The same readings, each as if it were of so many times its layers."""
        return replace(self, layers=self.layers * factors)


@dataclass(frozen=True)
class MaxFit:
    """Coefficients of the overheads and of every plane, all at least 0."""

    overheads: Floats
    planes: tuple[Floats, ...]

    def layer_values(self, readings: Equations) -> Floats:
        """Seconds of one layer by (plane, reading), before the maximum."""
        return np.stack(
            [
                features @ coefficients
                for features, coefficients in zip(readings.planes, self.planes, strict=True)
            ]
        )

    def layer_seconds(self, readings: Equations) -> Floats:
        """Seconds of one layer of each reading."""
        return np.asarray(self.layer_values(readings).max(axis=0), dtype=np.float64)

    def seconds(self, readings: Equations) -> Floats:
        """Predicted seconds of each reading."""
        layers_s = readings.layers * self.layer_seconds(readings)
        return readings.known + readings.overheads @ self.overheads + layers_s

    def flat(self) -> Floats:
        """All coefficients in one array: overheads, then plane by plane."""
        return np.concatenate((self.overheads, *self.planes))

    def like(self, flat: Floats) -> MaxFit:
        """The same shape with other coefficients."""
        cuts = np.cumsum([len(self.overheads), *(len(plane) for plane in self.planes)])
        overheads, *planes = np.split(flat, cuts[:-1])
        return MaxFit(overheads, tuple(planes))


def relative_nnls(features: Floats, values: Floats, sizes: Floats | None = None) -> Floats:
    """Non-negative coefficients of least squares in error relative to `sizes` (the values).

    Columns are scaled to one size first, so that coefficients of a thousand seconds and of a
    nanosecond are found equally well; a column of zeros gets 0.
    """
    scale = 1.0 / (values if sizes is None else sizes)
    rows = features * scale[:, None]
    lengths = np.sqrt((rows**2).sum(axis=0))
    used = lengths > 0.0
    found = np.zeros(features.shape[1])
    if used.any():
        solved, _ = nnls(rows[:, used] / lengths[used], values * scale, maxiter=1000)
        found[used] = solved / lengths[used]
    return found


def relative_errors(predicted: Floats, measured: Floats) -> Floats:
    """(predicted - measured) / measured."""
    return np.asarray((predicted - measured) / measured, dtype=np.float64)


def fit_max(readings: Equations) -> MaxFit:
    """The max of the readings' planes that comes nearest in relative error.

    Assignment starts from splits of the readings by size of the layer, in all orders of the
    planes that are worth a try; the best end of all starts is kept. Where the assignment
    turns in circles the best of the circle is taken.
    """
    best: MaxFit | None = None
    best_loss = np.inf
    for start in _starts(readings):
        found, loss = _alternate(readings, start)
        if loss < best_loss * (1.0 - 1e-9):
            best, best_loss = found, loss
    assert best is not None
    return best


def _starts(readings: Equations) -> list[Assignment]:
    """Assignments to begin with: planes in their order along growing seconds per layer."""
    count, num_planes = len(readings), len(readings.planes)
    if num_planes == 1:
        return [np.zeros(count, np.int64)]
    per_layer = (readings.seconds - readings.known) / np.maximum(readings.layers, 1.0)
    orders = [per_layer] + [plane[:, -1] for plane in readings.planes if plane.shape[1] > 1]
    orders += [plane[:, 1] for plane in readings.planes if plane.shape[1] > 2]
    starts = []
    for order in orders:
        rank = np.argsort(np.argsort(order, kind="stable"), kind="stable") / count
        for cut in (0.25, 0.5, 0.75):
            if num_planes == 2:
                starts.append((rank >= cut).astype(np.int64))
            else:
                for second in (0.5, 0.75, 0.9):
                    if second > cut:
                        starts.append((rank >= cut).astype(np.int64) + (rank >= second))
    return starts


def _alternate(readings: Equations, start: Assignment) -> tuple[MaxFit, float]:
    assigned = start
    trust = np.ones(len(readings))
    best: MaxFit | None = None
    best_loss = np.inf
    seen: set[bytes] = set()
    for _ in range(MAX_ROUNDS):
        if assigned.tobytes() in seen:
            break
        seen.add(assigned.tobytes())
        found = solve(readings, assigned, trust)
        loss = _loss(readings, found)
        if loss < best_loss:
            best, best_loss = found, loss
        assigned = assignment(readings, found)
    assert best is not None
    for _ in range(TRUST_ROUNDS):
        trust = trust_in(relative_errors(best.seconds(readings), readings.seconds))
        if trust.min() == 1.0:
            break
        best = solve(readings, assignment(readings, best), trust)
    return best, _loss(readings, best)


def trust_in(errors: Floats) -> Floats:
    """Huber's weights: readings far beyond the usual error pull no harder than at its edge.

    Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35
    (1964). A shared machine's interruptions make times longer, now and then by half.
    """
    usual = 1.4826 * float(np.median(np.abs(errors)))
    if usual < 1e-12:
        return np.ones(len(errors))
    edge = HUBER_EDGE * usual
    return np.asarray(np.minimum(1.0, np.sqrt(edge / np.maximum(np.abs(errors), edge))))


def _loss(readings: Equations, fit: MaxFit) -> float:
    """Mean size of the relative errors: what alternatives are judged by, outliers included."""
    return score(relative_errors(fit.seconds(readings), readings.seconds))


def solve(readings: Equations, assigned: Assignment, trust: Floats) -> MaxFit:
    """Coefficients for a given assignment of readings to planes."""
    columns = [readings.overheads]
    for place, plane in enumerate(readings.planes):
        mine = (assigned == place) * readings.layers
        columns.append(plane * mine[:, None])
    unexplained = readings.seconds - readings.known
    solved = relative_nnls(np.hstack(columns), unexplained, readings.seconds / trust)
    cuts = np.cumsum([column.shape[1] for column in columns])[:-1]
    overheads, *planes = np.split(solved, cuts)
    return MaxFit(overheads, tuple(planes))


def assignment(readings: Equations, fit: MaxFit) -> Assignment:
    """The plane that bounds each reading."""
    return np.asarray(np.argmax(fit.layer_values(readings), axis=0), dtype=np.int64)


def refit(readings: Equations, start: Assignment) -> MaxFit:
    """The fit reached from one assignment: quick, where a good one is known already."""
    return _alternate(readings, start)[0]


@dataclass(frozen=True)
class LeftOut:
    """Each reading predicted by a fit that did not see it, and how far the coefficients moved.

    `errors` are relative; `standard_errors` are the jackknife's, in the order of `MaxFit.flat`.
    Both are NaN where everything is one group, so that nothing is left to fit.
    """

    errors: Floats
    standard_errors: Floats


def leave_out(readings: Equations, fit: MaxFit, groups: Groups) -> LeftOut:
    """Leave out group by group, starting from the whole fit's assignment.

    A group's readings are left out together, so that repeated trials of one point do not vouch
    for each other.
    """
    assigned = assignment(readings, fit)
    errors = np.zeros(len(readings))
    moved = []
    for label in np.unique(groups):
        out = groups == label
        if out.all():
            unknown = np.full(len(readings), np.nan)
            return LeftOut(unknown, np.full(len(fit.flat()), np.nan))
        found = refit(readings.take(~out), assigned[~out])
        rest = readings.take(out)
        errors[out] = relative_errors(found.seconds(rest), rest.seconds)
        moved.append(found.flat())
    return LeftOut(errors, jackknife(moved))


def jackknife(moved: Sequence[Floats]) -> Floats:
    """Standard errors of coefficients from those of the fits that left a group out each."""
    count = len(moved)
    spread = np.stack(moved) - np.mean(moved, axis=0)
    return np.asarray(np.sqrt((count - 1) / count * (spread**2).sum(axis=0)), dtype=np.float64)


def score(errors: Floats) -> float:
    """Mean size of the known relative errors: what a choice between models goes by."""
    known = errors[np.isfinite(errors)]
    return float(np.mean(np.abs(known))) if len(known) else 0.0


def clearly_better(new: float, old: float) -> bool:
    """Whether a left-out error is so much lower that a richer model is worth it."""
    return new < REAL_GAIN * old and old - new > REAL_GAIN_ABSOLUTE


@dataclass(frozen=True)
class Chosen:
    """The planes kept, their fit, and the left-out errors by which they were chosen.

    `considered` holds (places of the planes, score) of everything tried, simplest first.
    """

    planes: tuple[int, ...]
    fit: MaxFit
    left_out: LeftOut
    considered: tuple[tuple[tuple[int, ...], float], ...]

    def plane(self, place: int) -> tuple[Floats, Floats] | None:
        """Coefficients of a plane and their standard errors; None where it was not kept."""
        if place not in self.planes:
            return None
        at = self.planes.index(place)
        return self.fit.planes[at], self.fit.like(self.left_out.standard_errors).planes[at]


def choose_planes(
    readings: Equations, options: Sequence[tuple[int, ...]], groups: Groups
) -> Chosen:
    """The simplest set of planes, unless a richer one clearly lowers the left-out error.

    `options` name planes of the readings, simplest first; one with about as many coefficients as
    there are distinct readings is not tried.
    """
    tried = []
    for option in tryable(readings, options, groups):
        part = readings.with_planes(option)
        fit = fit_max(part)
        tried.append(Chosen(option, fit, leave_out(part, fit, groups), ()))
    scores = [score(one.left_out.errors) for one in tried]
    considered = tuple((one.planes, own) for one, own in zip(tried, scores, strict=True))
    return replace(tried[simplest(scores)], considered=considered)


def tryable(
    readings: Equations, options: Sequence[tuple[int, ...]], groups: Groups
) -> list[tuple[int, ...]]:
    """The options with clearly fewer coefficients than there are groups, and always the first."""
    most = len(np.unique(groups)) - 2
    widths = [plane.shape[1] for plane in readings.planes]
    return [
        option
        for place, option in enumerate(options)
        if not place or sum(widths[plane] for plane in option) <= most
    ]


def simplest(scores: Sequence[float]) -> int:
    """Of models that grow richer, the place of the first that none clearly betters."""
    best = 0
    for place, own in enumerate(scores):
        if clearly_better(own, scores[best]):
            best = place
    return best


def fit_plane(
    features: Floats, seconds: Floats, alike: Floats, known: Floats | float = 0.0
) -> Chosen:
    """Seconds beyond what is `known`, linear in features; readings `alike` are left out as one."""
    ones = np.ones(len(seconds))
    readings = Equations(seconds, ones, known * ones, np.zeros((len(ones), 0)), (features,))
    return choose_planes(readings, ((0,),), _groups(alike))


def _groups(values: Floats) -> Groups:
    """One group a distinct value."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


FLOOR: Final = 0
LINE: Final = 1


def fit_floor_line(rows: Floats, seconds: Floats) -> Chosen:
    """max(floor, base + slope x rows) in least relative error; the floor only where it helps.

    Planes of the result: `FLOOR` (one coefficient, perhaps absent) and `LINE` (base, slope).
    """
    ones = np.ones(len(rows))
    planes = (ones[:, None], np.column_stack((ones, rows)))
    readings = Equations(seconds, ones, 0.0 * ones, np.zeros((len(rows), 0)), planes)
    return choose_planes(readings, ((LINE,), (FLOOR, LINE)), _groups(rows))


def isotonic(values: Sequence[float] | Floats, weights: Floats) -> Floats:
    """The nearest values that never fall, in weighted least squares; weights are 0 or more."""
    # scipy asks for weights above 0; the least there are next to any other count for nothing.
    heavy = np.maximum(weights, _LEAST_WEIGHT)
    return np.asarray(isotonic_regression(values, weights=heavy).x, dtype=np.float64)
