"""Sums under fixed signs lie as far apart as the logits they are of, on every machine."""

from __future__ import annotations

import math

import pytest
import torch

from calibration.model.projection import NUM_SUMS, distance, project, signs


def made_up(rows: int = 24, vocab: int = 300, seed: int = 0) -> torch.Tensor:
    """Logits [rows, vocab] with a mean, as trained models have one."""
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) - 1.0


def test_signs_stay_those_that_stored_guards_were_made_with() -> None:
    """Another sign would let every stored guard refuse its own weights."""
    told = ["".join("+" if sign > 0 else "-" for sign in row) for row in signs(3, 1)]
    assert told == ["--+--+++-+----++", "++-+------+--+-+", "+-+-+----+-++---"]
    assert (signs(3, 1) == signs(500, 1)[:3]).all()
    assert (signs(3, 1) != signs(3, 2)).any()


def test_signs_are_as_good_as_independent() -> None:
    for kind in (1, 2):
        known = torch.from_numpy(signs(20_000, kind)).double()
        assert known.abs().eq(1.0).all()
        together = known.T @ known / len(known)
        assert (together - torch.eye(NUM_SUMS)).abs().max() < 0.03
        assert known.mean(0).abs().max() < 0.03


def test_tokens_in_pieces_add_up_to_what_all_of_them_do() -> None:
    logits = made_up()
    pieces = sum(project(logits[first : first + 10], first) for first in range(0, 24, 10))
    torch.testing.assert_close(pieces, project(logits))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_projections_lie_as_far_apart_as_what_they_are_of(share: float, seed: int) -> None:
    one = made_up()
    other = one + share * torch.randn(one.shape, generator=torch.Generator().manual_seed(9 + seed))
    expected = float((one - other).norm() / one.norm())
    found = distance(project(one).tolist(), project(other).tolist())
    assert 0.5 * expected < found < 2.0 * expected


def test_a_projection_of_nothing_is_alike_to_nothing_else() -> None:
    nothing = [0.0] * NUM_SUMS
    assert distance(nothing, nothing) == 0.0
    assert distance(nothing, [1.0] * NUM_SUMS) == math.inf
