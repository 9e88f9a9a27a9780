"""Confidence lies in [0, 1], means what its kind says and survives its file."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.model.confidence import (
    KINDS,
    Confidence,
    PiecewiseLinear,
    confidence_from_json,
    confidence_of,
)
from helios_sim.errors import InputError

P = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])


def test_largest_probability():
    torch.testing.assert_close(
        confidence_of(P.log(), "max-softmax"), torch.tensor([0.5, 1 / 3]), rtol=1e-6, atol=1e-6
    )


def test_margin_of_the_two_largest():
    torch.testing.assert_close(
        confidence_of(P.log(), "top2-margin"), torch.tensor([0.2, 0.0]), rtol=1e-6, atol=1e-6
    )


def test_entropy_is_one_for_certainty_and_zero_for_ignorance():
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    expected = torch.tensor([1 - entropy / math.log(3), 0.0])
    torch.testing.assert_close(confidence_of(P.log(), "entropy"), expected, rtol=1e-6, atol=1e-6)
    certain = torch.tensor([[1000.0, 0.0, 0.0]])
    assert confidence_of(certain, "entropy").item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_stays_within_its_range(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(200, 50, generator=generator)).to(dtype)
    values = confidence_of(logits, kind)
    assert values.dtype == torch.float32
    assert bool(((values >= 0) & (values <= 1)).all())


def test_a_map_interpolates_and_is_constant_outside():
    found = PiecewiseLinear((0.2, 0.4, 0.8), (0.1, 0.5, 0.6))
    values = torch.tensor([0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])
    expected = torch.tensor([0.1, 0.1, 0.3, 0.5, 0.55, 0.6, 0.6])
    torch.testing.assert_close(found.of_tensor(values), expected)
    assert PiecewiseLinear((0.5,), (0.7,)).of_tensor(values).tolist() == pytest.approx([0.7] * 7)


def test_knots_that_meet_in_a_narrower_type_are_a_step():
    met = PiecewiseLinear((0.99999999, 1.0), (0.7, 0.9))
    assert met.of_tensor(torch.tensor([0.5, 1.0])).tolist() == pytest.approx([0.7, 0.7])


def test_calibration_is_by_exit_and_domain_with_a_fallback():
    low, high = PiecewiseLinear((0.0,), (0.1,)), PiecewiseLinear((0.0,), (0.9,))
    rule = Confidence("max-softmax", 0.5, {"all": {3: low}, "code": {3: high}})
    logits = P.log()
    assert rule.of(logits, 3, "code").tolist() == pytest.approx([0.9, 0.9])
    assert rule.of(logits, 3, "prose").tolist() == pytest.approx([0.1, 0.1])
    assert rule.of(logits, 6).tolist() == pytest.approx([0.5, 1 / 3])


def test_it_survives_its_file():
    maps = {"all": {3: PiecewiseLinear((0.0, 0.5), (0.1, 0.9))}}
    rule = Confidence("entropy", 0.25, maps)
    assert confidence_from_json(rule.to_json()) == rule
    assert confidence_from_json(Confidence().to_json()) == Confidence()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"kind": "guess"}, "'guess' is unknown; allowed are max-softmax"),
        ({"threshold": 1.5}, "threshold 1.5 is not allowed"),
        ({"treshold": 0.5}, "unknown keys"),
        ({"calibration": {"all": {"3": [[0.0, 1.0]]}}}, "must map domains"),
        ({"calibration": {"all": {"3": [[0.5, 0.4], [0, 1]]}}}, "must rise in x"),
        ({"calibration": {"all": {"3": [[0.4, 0.5], [0, 2]]}}}, "outside"),
    ],
)
def test_what_it_cannot_be_is_said(document, message):
    with pytest.raises(InputError, match=message) as caught:
        confidence_from_json(document, "early_exit.json")
    assert caught.value.where == "early_exit.json"
