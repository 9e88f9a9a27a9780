"""A kernel for products of few rows, tried beside torch's; `reports.gpu.kernels` times both.

No part of the backend: whether it is worth its place there is what a GPU has to say. Decoding few
rows reads weights and does little else, so what counts is that memory never waits. A kernel that
begins early has its weights on their way to the cache while the kernel before it still runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from calibration.model.launches import can_compile

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

MOST_ROWS: Final = 16
"""Rows that matrix units take at once, at least and here at most."""

OUTS: Final = 16
"""Outputs of a program: few, so that a product of 2,048 outputs keeps every multiprocessor busy."""

DEEP: Final = 256
"""Inputs that a program reads at once; 8 KiB of weights."""

STAGES: Final = 5
WARPS: Final = 4

MOST_AHEAD: Final = 32
"""Cache lines of 128 bytes that a program fetches ahead of each of its outputs' weights."""


def product_kernel(  # type: ignore[no-untyped-def]
    given,
    weight,
    output,
    rows,
    wide,
    deep,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    DEEP: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Some outputs of all rows: [rows, deep] times the weights [wide, deep] of these outputs.

    With `EARLY` the next kernel may begin at once, and nothing that another kernel has written is
    touched before all kernels in front are done.
    """
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    begins = weight + out.to(tl.int64)[:, None] * deep
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        line = begins + tl.arange(0, AHEAD)[None, :] * 64
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [line.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.extra.cuda.gdc_wait()
    row = tl.arange(0, ROWS)
    there = row[:, None] < rows
    total = tl.zeros([ROWS, OUTS], tl.float32)
    for at in range(0, deep, DEEP):
        unit = at + tl.arange(0, DEEP)[None, :]
        read = tl.load(given + row[:, None] * deep + unit, mask=there, other=0.0)
        weights = tl.load(begins + unit)
        total += tl.dot(read, tl.trans(weights), input_precision="ieee")
    target = output + row[:, None] * wide + out[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=there)


@lru_cache(maxsize=1)
def compiled() -> Any:
    """The kernel as Triton runs it."""
    return triton.jit(product_kernel, do_not_specialize=["rows"])


def why_not(given: Tensor, weight: Tensor) -> str:
    """Why these cannot be multiplied here; empty if they can."""
    (rows, deep), wide = given.shape, weight.shape[0]
    if not can_compile():
        return "Triton is not installed"
    if rows > MOST_ROWS or wide % OUTS or deep % DEEP:
        return f"{rows} rows, {wide} x {deep}"
    return ""


def product(given: Tensor, weight: Tensor, early: bool = False) -> Tensor:
    """[rows, deep] times the transpose of [wide, deep], both without gaps; `early` on a GPU.

    Raises `ValueError` for sizes that do not divide into tiles.
    """
    if why := why_not(given, weight):
        raise ValueError(f"This product is not for the kernel: {why}.")
    (rows, deep), wide = given.shape, weight.shape[0]
    output = torch.empty((rows, wide), dtype=given.dtype, device=given.device)
    lines = deep // 64
    options = {"launch_pdl": True} if early else {}
    compiled()[(wide // OUTS,)](
        given,
        weight,
        output,
        rows,
        wide,
        deep,
        ROWS=MOST_ROWS,
        OUTS=OUTS,
        DEEP=DEEP,
        EARLY=early,
        AHEAD=min(MOST_AHEAD, 1 << (lines.bit_length() - 1)),
        num_warps=WARPS,
        num_stages=STAGES,
        **options,
    )
    return output
