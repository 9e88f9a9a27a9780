"""The product that is tried beside torch's gives what torch's gives, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from reports.gpu import products
from reports.gpu.kernels import TILES, under
from reports.gpu.products import DEEP, MOST_ROWS, OUTS, product

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compiled for the GPU that is here"
)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
def test_it_gives_torchs_product(rows: int) -> None:
    given = torch.randn(rows, 2 * DEEP, dtype=torch.float16)
    weight = torch.randn(3 * OUTS, 2 * DEEP, dtype=torch.float16)
    right = given.float() @ weight.float().t()
    found = product(given, weight)
    assert found.shape == right.shape
    assert (found.float() - right).norm() <= 1e-3 * right.norm()


@interpreted
@pytest.mark.parametrize(
    ("rows", "outs", "at_once"),
    [(rows, *tile) for rows, tiles in TILES.items() for tile in tiles],
)
def test_it_gives_it_in_every_tile_that_is_tried(rows: int, outs: int, at_once: int) -> None:
    given = torch.randn(rows, 2 * at_once, dtype=torch.float16)
    weight = torch.randn(3 * outs, 2 * at_once, dtype=torch.float16)
    right = given.float() @ weight.float().t()
    found = under(lambda: product(given, weight), products, OUTS=outs, DEEP=at_once)
    assert (found.float() - right).norm() <= 1e-3 * right.norm()


@pytest.mark.parametrize(
    ("rows", "wide", "deep"),
    [(MOST_ROWS + 1, OUTS, DEEP), (1, OUTS + 1, DEEP), (1, OUTS, DEEP + 64)],
)
def test_sizes_that_are_no_tiles_are_refused(rows: int, wide: int, deep: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows, {wide} x {deep}"):
        product(torch.zeros(rows, deep), torch.zeros(wide, deep))
