"""Compile our kernels for a GPU of compute capability 9.0 and print what each takes of it.

In a process of its own: where Triton interprets kernels it compiles none.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from calibration.model import launches
from reports.gpu import products

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTEGERS = {"addresses": "*i64", "positions": "*i64", "places": "*i64", "targets": "*i64"}
UNMARKED = ("places_stride", "place_tokens", "num_knots", "rows")
"""Integers by which nothing is compiled anew."""
FLOATS = {"parts": "*fp32", "weights": "*fp32", "knots": "*fp32", "said": "*fp32"}


def variants():
    """Kernel names with what is fixed when they are compiled, their warps and their stages."""
    for head_dim, groups in ((64, 1), (128, 4)):
        lanes = launches.power_of_two(head_dim)
        sizes = {"GROUPS": groups, "HEAD_DIM": head_dim, "LANES": lanes}
        for rotates in (False, True):
            yield "store_kernel", sizes | {"ROTATE": rotates}, 1, 3
        blocks = {
            "GROUP_BLOCK": launches.group_block(groups),
            "TOKENS": launches.tokens_at_once(lanes),
        }
        for (placed, paged), split in product(((0, 0), (1, 0), (0, 1)), (False, True)):
            found = {"PLACED": bool(placed), "PAGED": bool(paged), "SPLIT": split}
            stages = launches.PAGED_STAGES if paged else launches.SLOT_STAGES
            yield "attend_kernel", sizes | blocks | found, launches.ATTEND_WARPS, stages
    yield "merge_kernel", {"HEAD_DIM": 128, "LANES": 128, "SPLITS": 32}, 4, 3
    yield "gate_kernel", {"BLOCK": 1024}, 4, 3
    for hidden in (2048, 4096, 5120):
        block = launches.power_of_two(hidden)
        yield "add_norm_kernel", {"BLOCK": block}, launches.norm_warps(block), 3
    telling = {"BLOCK": launches.TELL_BLOCK, "STAGES": launches.TELL_STAGES}
    yield "tell_kernel", {"TARGETED": True, "KNOTS": launches.LEAST_KNOTS} | telling, 8, 3
    for early in (False, True):
        sizes = {"OUTS": products.OUTS, "DEEP": products.DEEP, "AHEAD": products.MOST_AHEAD}
        fixed = {"ROWS": products.MOST_ROWS, "EARLY": early} | sizes
        yield "product_kernel", fixed, products.WARPS, products.STAGES


def compiled(name: str, fixed: dict[str, object], warps: int, stages: int) -> str:
    """The resources of one kernel, as the disassembler tells them."""
    kernel = (launches.compiled() | {"product_kernel": products.compiled()})[name]
    signature = {}
    for argument in kernel.arg_names:
        kind = INTEGERS.get(argument, FLOATS.get(argument, "*bf16"))
        if argument in fixed:
            kind = "constexpr"
        elif argument in ("scale", "epsilon"):
            kind = "fp32"
        elif argument.endswith(
            ("stride", "width", "place_tokens", "vocab", "num_knots", "rows", "wide", "deep")
        ):
            kind = "i32"
        elif argument == "output" and fixed.get("SPLIT"):
            kind = "*fp32"
        signature[argument] = kind
    # As at a launch: sizes of real models are multiples of 16, and these loads take 16 bytes.
    whole = {
        argument
        for argument, kind in signature.items()
        if (kind.startswith("*") and argument not in INTEGERS)
        or (kind == "i32" and argument not in UNMARKED)
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument in whole
    }
    constants = {(kernel.arg_names.index(argument),): value for argument, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": bool(fixed.get("EARLY"))}
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        words = [TOOL, "-res-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", said)[0]
    return f"{name} {registers} {stack} {made.metadata.shared}"


if __name__ == "__main__":
    for name, fixed, warps, stages in variants():
        print(compiled(name, fixed, warps, stages), fixed)
