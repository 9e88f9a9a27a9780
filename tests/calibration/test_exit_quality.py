"""Calibration error and complementarity are what their definitions say, and need no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from calibration.training.exit_quality import (
    NUM_BINS,
    deep_and_early,
    early_of_deep,
    expected_calibration_error,
    reliability,
)


def test_a_calibrated_confidence_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 40_000)
    right = rng.uniform(0, 1, 40_000) < confidence
    assert expected_calibration_error(confidence, right) < 0.02
    bins = reliability(confidence, right)
    assert len(bins) == NUM_BINS
    assert sum(count for _, _, count in bins) == 40_000


def test_the_error_is_the_distance_weighted_by_tokens() -> None:
    confidence = np.array([1.0, 1.0, 0.0], dtype=np.float32)
    assert expected_calibration_error(confidence, np.array([True, True, False])) == 0.0
    assert expected_calibration_error(confidence, np.array([True, False, False])) == pytest.approx(
        1 / 3
    )
    sure = np.full(1000, 0.9)
    assert expected_calibration_error(sure, np.zeros(1000, bool)) == pytest.approx(0.9)


def test_early_is_the_others_first_exit_and_deep_ones_own_last() -> None:
    levels, others = np.array([2, 2, 2, 0, 1]), np.array([0, 1, 0, 0, 0])
    deep, early = deep_and_early(levels, 3, others)
    assert deep.tolist() == [True, True, True, False, False]
    assert early.tolist() == [True, False, True, False, False]
    assert early_of_deep(deep, early) == pytest.approx(2 / 3)
    assert early_of_deep(*deep_and_early(levels, 4, others)) == 0.0


def test_a_page_is_drawn_without_torch() -> None:
    program = "import sys, calibration.fitting.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
