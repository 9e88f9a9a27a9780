"""Planes and factors fitted together: neither takes what is the other's, and no time falls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.fitting.joint import BATCH, DEPTH, Growth, Loads, choose, fit_joint
from calibration.fitting.regression import Equations, Floats

BATCHES = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
CONTEXTS = np.array([32.0, 128.0, 512.0])
DEPTHS = np.array([2.0, 4.0, 8.0])


def features(rows: Floats, context: Floats) -> tuple[Floats, ...]:
    """One plane in (1, rows, context)."""
    return (np.stack((np.ones_like(rows), rows, context), axis=-1),)


def loads(
    by_batch: dict[float, float],
    by_depth: dict[float, float],
    noise: float = 0.0,
    intercept_s: float = 1e-4,
) -> Loads:
    """Stacks of an intercept and 0.2 ms + 10 us a row + 0.1 us a token a layer, two factors."""
    rows, each, layers = (part.ravel() for part in np.meshgrid(BATCHES, CONTEXTS, DEPTHS))
    planes = features(rows, rows * each)
    factor = np.array([by_batch.get(row, 1.0) for row in rows])
    factor *= np.array([by_depth.get(depth, 1.0) for depth in layers])
    seconds = intercept_s + layers * factor * (planes[0] @ np.array([2e-4, 1e-5, 1e-7]))
    seconds = seconds * np.exp(noise * np.random.default_rng(1).standard_normal(len(seconds)))
    ones = np.ones(len(rows))
    readings = Equations(seconds, layers, 0.0 * ones, ones[:, None], planes)
    counts = np.arange(1.0, 18.0)
    held = CONTEXTS[:, None] * counts[:-1]
    few, many = (np.broadcast_to(part, held.shape) for part in (counts[:-1], counts[1:]))
    return Loads(readings, rows, Growth(counts, features(few, held), features(many, held + 1.0)))


def cells(found: Loads) -> np.ndarray:
    """Groups: all depths of one load."""
    context = found.readings.planes[0][:, 2]
    return np.unique(context + 1e6 * found.rows, return_inverse=True)[1].astype(np.int64)


def test_an_intercept_does_not_take_what_belongs_to_the_depth() -> None:
    found = fit_joint(loads({}, {2.0: 0.8, 4.0: 0.95}), frozenset({DEPTH}))
    assert found.fit.overheads == pytest.approx([1e-4], rel=1e-3)
    assert dict(found.knots[DEPTH]) == pytest.approx({2.0: 0.8, 4.0: 0.95, 8.0: 1.0}, rel=1e-4)


def test_the_price_of_a_row_does_not_take_what_belongs_to_the_batch() -> None:
    found = fit_joint(loads({1.0: 0.7}, {}), frozenset({BATCH}))
    assert found.fit.planes[0] == pytest.approx([2e-4, 1e-5, 1e-7], rel=2e-3)
    assert dict(found.knots[BATCH])[1.0] == pytest.approx(0.7, rel=2e-3)


def test_a_factor_is_kept_only_where_it_clearly_lowers_the_left_out_error() -> None:
    noisy = loads({}, {2.0: 0.8, 4.0: 0.95}, noise=0.01)
    chosen = choose(noisy, ((0,),), cells(noisy))
    assert set(chosen.knots) == {DEPTH}
    assert chosen.scores[frozenset({DEPTH})] < 0.5 * chosen.scores[frozenset()]
    assert len(chosen.scores) == 4
    plain = loads({}, {}, noise=0.01)
    assert choose(plain, ((0,),), cells(plain)).knots == {}


@given(
    st.lists(st.floats(0.4, 2.5), min_size=5, max_size=5),
    st.lists(st.floats(0.4, 2.5), min_size=3, max_size=3),
)
def test_whatever_was_measured_no_time_falls(batch: list[float], depth: list[float]) -> None:
    spoilt = loads(
        dict(zip(BATCHES.tolist(), batch, strict=True)),
        dict(zip(DEPTHS.tolist(), depth, strict=True)),
    )
    found = fit_joint(spoilt, frozenset({BATCH, DEPTH}))
    assert not spoilt.growth.falls(found.fit, found.knots[BATCH])
    deep = [factor for _, factor in found.knots[DEPTH]]
    assert deep == sorted(deep)
    assert deep[-1] == 1.0


def test_beside_a_factor_by_depth_an_intercept_is_kept_only_where_it_helps() -> None:
    for intercept_s, kept in ((0.0, False), (1.5e-4, True)):
        noisy = loads({}, {2.0: 0.8, 4.0: 0.95}, noise=0.02, intercept_s=intercept_s)
        chosen = choose(noisy, ((0,),), cells(noisy))
        assert set(chosen.knots) == {DEPTH}
        assert (chosen.chosen.fit.overheads[0] > 0.0) == kept
