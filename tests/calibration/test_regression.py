"""Regression with physics: what is planted is found, and a knee is kept only where it shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.fitting.regression import (
    FLOOR,
    HUBER_EDGE,
    LINE,
    Equations,
    choose_planes,
    clearly_better,
    fit_floor_line,
    fit_max,
    isotonic,
    jackknife,
    leave_out,
    relative_nnls,
    simplest,
    trust_in,
    tryable,
)

SMALL = st.floats(1e-7, 1e-3)


def two_planes(floor: float, base: float, slope: float) -> Equations:
    """Stacks of 1, 3 and 9 layers of max(floor, base + slope x rows), and 0.1 ms beside them."""
    rows = np.repeat([1.0, 2, 4, 8, 16, 32, 64, 128], 3)
    layers = np.tile([1.0, 3, 9], 8)
    ones = np.ones(len(rows))
    seconds = 1e-4 + layers * np.maximum(floor, base + slope * rows)
    planes = (ones[:, None], np.column_stack((ones, rows)))
    return Equations(seconds, layers, 0 * ones, ones[:, None], planes)


@given(st.lists(SMALL, min_size=3, max_size=3))
def test_non_negative_least_squares_find_what_was_planted_at_any_scale(
    planted: list[float],
) -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(1, 100, (20, 3)) * np.array([1.0, 1e3, 1e6])
    found = relative_nnls(features, features @ np.array(planted))
    assert found == pytest.approx(planted, rel=1e-6)


def test_a_coefficient_that_would_be_negative_is_zero() -> None:
    rows = np.arange(1.0, 9.0)
    found = relative_nnls(np.column_stack((np.ones(8), rows)), 10.0 - rows)
    assert found[1] == 0.0


def test_a_floor_and_a_plane_are_told_apart() -> None:
    readings = two_planes(5e-5, 1e-5, 3e-6)
    fit = fit_max(readings)
    assert fit.overheads == pytest.approx([1e-4], rel=1e-6)
    assert fit.planes[0] == pytest.approx([5e-5], rel=1e-6)
    assert fit.planes[1] == pytest.approx([1e-5, 3e-6], rel=1e-6)


def test_three_planes_are_found_though_most_starts_lead_astray() -> None:
    """Some of the ends that starts lead to are several times off."""
    rows = np.repeat([1.0, 2, 4, 8, 16, 32, 64, 128], 2)
    context = np.tile([100.0, 1000], 8) * rows
    ones = np.ones(len(rows))
    by_context = 3e-5 + 1e-6 * rows + 1e-9 * context
    seconds = np.maximum(np.maximum(5e-5, by_context), 1e-6 + 4e-6 * rows)
    planes = (
        ones[:, None],
        np.column_stack((ones, rows, context)),
        np.column_stack((ones, rows)),
    )
    readings = Equations(seconds, ones, 0 * ones, np.zeros((len(rows), 0)), planes)
    assert fit_max(readings).seconds(readings) == pytest.approx(seconds, rel=0.02)


def test_what_is_explained_already_is_part_of_what_is_predicted() -> None:
    """The 0.1 ms beside the layers, known beforehand and not to be fitted."""
    readings = two_planes(5e-5, 1e-5, 3e-6)
    known = replace(readings, known=np.full(len(readings), 1e-4), overheads=np.zeros((24, 0)))
    fit = fit_max(known)
    assert fit.planes[0] == pytest.approx([5e-5], rel=1e-6)
    assert fit.seconds(known) == pytest.approx(readings.seconds, rel=1e-6)


def test_a_knee_is_kept_only_where_it_clearly_lowers_the_left_out_error() -> None:
    options = ((1,), (0, 1))
    assert choose_planes(two_planes(5e-5, 1e-5, 3e-6), options, np.arange(24)).planes == (0, 1)
    plain = two_planes(0.0, 1e-5, 3e-6)
    noisy = Equations(
        plain.seconds * np.exp(0.01 * np.random.default_rng(3).standard_normal(24)),
        plain.layers,
        plain.known,
        plain.overheads,
        plain.planes,
    )
    assert choose_planes(noisy, options, np.arange(24)).planes == (1,)


def test_left_out_errors_are_of_points_the_fit_did_not_see() -> None:
    readings = two_planes(0.0, 1e-5, 3e-6).with_planes((1,))
    spoilt = readings.seconds.copy()
    spoilt[5] *= 1.5
    wrong = Equations(spoilt, readings.layers, readings.known, readings.overheads, readings.planes)
    errors = leave_out(wrong, fit_max(wrong), np.arange(24)).errors
    assert int(np.argmax(np.abs(errors))) == 5
    assert errors[5] == pytest.approx(1 / 1.5 - 1, abs=0.01)


def test_the_jackknife_widens_with_the_noise() -> None:
    widths = []
    for noise in (0.01, 0.05):
        plain = two_planes(0.0, 1e-5, 3e-6).with_planes((1,))
        factor = np.exp(noise * np.random.default_rng(1).standard_normal(24))
        noisy = Equations(
            plain.seconds * factor, plain.layers, plain.known, plain.overheads, plain.planes
        )
        widths.append(leave_out(noisy, fit_max(noisy), np.arange(24)).standard_errors[-1])
    assert 0.0 < widths[0] < widths[1]


def test_a_line_without_a_floor_has_none() -> None:
    rows = np.array([1.0, 2, 4, 8, 16, 32])
    chosen = fit_floor_line(rows, 1e-4 + 1e-6 * rows)
    assert chosen.plane(FLOOR) is None
    line = chosen.plane(LINE)
    assert line is not None
    assert line[0] == pytest.approx([1e-4, 1e-6], rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(0.1, 10.0)), min_size=1, max_size=8),
)
def test_values_that_fall_are_pooled_to_the_nearest_that_do_not(
    found: list[tuple[float, float]],
) -> None:
    values, weights = (np.array(column) for column in zip(*found, strict=True))
    rising = isotonic(values, weights)
    assert (np.diff(rising) >= 0.0).all()
    assert weights @ rising == pytest.approx(weights @ values)
    assert isotonic(rising, weights) == pytest.approx(rising)
    for other in (np.maximum.accumulate(values), np.full(len(values), values.mean())):
        assert weights @ (rising - values) ** 2 <= weights @ (other - values) ** 2 + 1e-12


def test_values_without_weight_follow_their_neighbours() -> None:
    """A batch of which every reading is another plane's says nothing of its factor."""
    assert isotonic([1.0, 0.5, 2.0], np.array([1.0, 0.0, 1.0])).tolist() == [1.0, 1.0, 2.0]
    assert isotonic([2.0, 2.0, 1.0], np.array([0.0, 1.0, 1.0])).tolist() == [1.5, 1.5, 1.5]
    assert isotonic([1.0, 2.0], np.zeros(2)).tolist() == [1.0, 2.0]


def test_a_few_interrupted_readings_hardly_move_the_fit() -> None:
    plain = two_planes(0.0, 1e-5, 3e-6).with_planes((1,))
    factor = np.exp(0.01 * np.random.default_rng(2).standard_normal(24))
    factor[[4, 11, 17]] *= 1.8
    noisy = Equations(
        plain.seconds * factor, plain.layers, plain.known, plain.overheads, plain.planes
    )
    assert fit_max(noisy).planes[0] == pytest.approx([1e-5, 3e-6], rel=0.05)


def test_one_point_alone_has_no_left_out_error() -> None:
    chosen = fit_floor_line(np.array([4.0]), np.array([1e-4]))
    assert np.isnan(chosen.left_out.errors).all()


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0])
    without = [np.array([np.delete(values, at).mean()]) for at in range(4)]
    assert jackknife(without)[0] == pytest.approx(values.std(ddof=1) / 2.0)


def test_a_large_share_of_a_tiny_error_is_no_reason_for_a_richer_model() -> None:
    assert clearly_better(0.010, 0.020)
    assert not clearly_better(0.019, 0.020)
    assert not clearly_better(0.095, 0.100)
    assert not clearly_better(0.0001, 0.0019)


def test_a_richer_model_has_to_better_the_simplest_clearly_and_then_that_one() -> None:
    assert simplest((0.100, 0.095, 0.091)) == 0
    assert simplest((0.100, 0.095, 0.050, 0.048)) == 2


def test_readings_of_one_group_do_not_vouch_for_each_other() -> None:
    loads = np.array([1.0, 1.0, 2.0, 2.0])
    ones = np.ones(4)
    readings = Equations(
        np.array([1.0, 1.0, 3.0, 3.0]), ones, 0.0 * ones, np.zeros((4, 0)), (loads[:, None],)
    )
    found = leave_out(readings, fit_max(readings), np.array([0, 0, 1, 1]))
    assert found.errors == pytest.approx([0.5, 0.5, -1 / 3, -1 / 3])
    assert abs(leave_out(readings, fit_max(readings), np.arange(4)).errors[0]) < 0.4


def test_trials_of_as_many_rows_do_not_vouch_for_each_other() -> None:
    """Left out together, two trials of 20 s at eight rows are predicted by the line of the rest."""
    rows = np.repeat([1.0, 2, 4, 8], 2)
    seconds = np.where(rows == 8.0, 20.0, 1.0 + rows)
    errors = fit_floor_line(rows, seconds).left_out.errors
    assert errors[-2:] == pytest.approx([(9.0 - 20.0) / 20.0] * 2)


def test_options_leave_two_readings_beyond_their_coefficients_but_for_the_first() -> None:
    ones = np.ones(6)
    planes = tuple(np.ones((6, width)) for width in (1, 3, 4))
    readings = Equations(ones, ones, 0.0 * ones, np.zeros((6, 0)), planes)
    options = ((0,), (1,), (2,))
    assert tryable(readings, options, np.array([0, 0, 1, 2, 3, 4])) == [(0,), (1,)]
    assert tryable(readings, options[::-1], np.array([0, 0, 0, 1, 1, 1])) == [(2,)]


def test_an_error_beyond_the_edge_pulls_as_one_at_the_edge() -> None:
    """Weights are squared in least squares: a pull is the error times its weight squared."""
    errors = np.array([-0.01, 0.01, -0.01, 0.01, 0.3])
    trust = trust_in(errors)
    assert trust[:4].tolist() == [1.0] * 4
    assert errors[4] * trust[4] ** 2 == pytest.approx(HUBER_EDGE * 1.4826 * 0.01)
