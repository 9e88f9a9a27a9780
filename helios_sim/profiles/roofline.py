"""The roofline: bytes and flops of a model's parts, peaks of boards, a decode at one context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helios_sim import cost
from helios_sim.model import EarlyExitModel
from helios_sim.profile import ModelProfile

MEMORY_EFFICIENCY: Final = 0.8
COMPUTE_EFFICIENCY: Final = 0.5
"""The shares of a board's peaks that published profiles, and profiles derived, assume reached."""

REFERENCE_CONTEXT_TOKENS: Final = 512
"""KV tokens of a request in the comparisons with published figures, which do not print theirs."""


@dataclass(frozen=True)
class Number:
    """A number with what stands behind it."""

    value: float
    grade: str
    source: str


@dataclass(frozen=True)
class Board:
    """A GPU as its data sheet has it, with what is assumed around it."""

    name: str
    memory_bytes: Number
    memory_bytes_per_s: Number
    flops_per_s: Number
    limit_w: Number
    idle_w: Number
    active_w: Number
    load_w: Number
    disk_bytes_per_s: Number
    host_bytes_per_s: Number


A100: Final = Board(
    name="NVIDIA A100-SXM4-40GB",
    memory_bytes=Number(40 * 2**30, "published", "40 GiB, as the board reports its capacity"),
    memory_bytes_per_s=Number(1555e9, "published", "vendor data sheet, 1555 GB/s"),
    flops_per_s=Number(312e12, "published", "vendor data sheet, 312 TFLOP/s fp16 dense"),
    limit_w=Number(400.0, "published", "vendor data sheet, board limit 400 W"),
    idle_w=Number(55.0, "assumed", "A100 idle with a context open, about 55 W"),
    active_w=Number(110.0, "assumed", "clocks up and kernels launching, no work in them"),
    load_w=Number(90.0, "assumed", "copying weights, between idle and active"),
    disk_bytes_per_s=Number(3e9, "assumed", "one local NVMe drive, 3 GB/s sequential"),
    host_bytes_per_s=Number(20e9, "assumed", "PCIe 4 x16, 20 of about 25 GB/s reachable"),
)
H100: Final = Board(
    name="NVIDIA H100-SXM5-80GB",
    memory_bytes=Number(80 * 2**30, "published", "80 GiB, the nominal capacity"),
    memory_bytes_per_s=Number(3350e9, "published", "vendor data sheet, 3350 GB/s"),
    flops_per_s=Number(989e12, "published", "vendor data sheet, 989 TFLOP/s fp16 dense"),
    limit_w=Number(700.0, "published", "vendor data sheet, board limit 700 W"),
    idle_w=Number(75.0, "assumed", "H100 idle with a context open, about 75 W"),
    active_w=Number(150.0, "assumed", "clocks up and kernels launching, no work in them"),
    load_w=Number(120.0, "assumed", "copying weights, between idle and active"),
    disk_bytes_per_s=Number(3e9, "assumed", "one local NVMe drive, 3 GB/s sequential"),
    host_bytes_per_s=Number(40e9, "assumed", "PCIe 5 x16, 40 of about 50 GB/s reachable"),
)

BOARDS: Final = {board.name: board for board in (A100, H100)}
"""The boards whose data sheets are at hand, by the name of the device."""


@dataclass(frozen=True)
class Work:
    """Bytes and flops of a model's parts: a layer, the output head, and filling a layer's KV.

    `row` is a token row in a layer, `kv` and `pair` a KV token that it reads and attends to.
    """

    layer_bytes: int
    row_bytes: int
    row_flops: int
    kv_bytes: int
    pair_flops: int
    head_bytes: int
    head_row_bytes: int
    head_row_flops: int
    fill_bytes: int
    fill_row_bytes: int
    fill_row_flops: int


def work_of(model: EarlyExitModel) -> Work:
    """What a model's parts move and compute."""
    shape = model.shape
    kv_width = shape.kv_heads * shape.head_dim
    kv_bytes = model.kv_bytes_per_token(1)
    weight = model.bytes_per_param
    return Work(
        layer_bytes=model.layer_weight_bytes(),
        # What a token's activations move in a layer: read and written by norms, projections,
        # attention and residuals, about sixteen times its width and four times the feed-forward's.
        row_bytes=weight * (16 * shape.hidden + 4 * shape.ffn) + kv_bytes,
        row_flops=2 * shape.layer_params(),
        kv_bytes=kv_bytes,
        pair_flops=4 * shape.heads * shape.head_dim,
        head_bytes=weight * shape.vocab * shape.hidden,
        # Logits in fp32 are passed over about three times by softmax, maximum and sampling.
        head_row_bytes=12 * shape.vocab,
        head_row_flops=2 * shape.vocab * shape.hidden,
        fill_bytes=weight * 2 * shape.hidden * kv_width,
        fill_row_bytes=kv_bytes + weight * shape.hidden,
        fill_row_flops=2 * 2 * shape.hidden * kv_width,
    )


def decode(
    profile: ModelProfile,
    layers: int,
    rows: int = 1,
    num_checks: int = 0,
    num_heads: int = 1,
    filled_layers: int = 0,
    launch_free: bool = False,
) -> tuple[float, float]:
    """Seconds and joules of a decode iteration at the reference context, all charges included.

    `launch_free` leaves out every launch floor, as a backend that replays graphs would.
    """
    c = profile.coefficient_array()
    if launch_free:
        for name in ("decode.launch_s", "decode.fixed_s", "head.floor_s", "check.floor_s"):
            c[cost.COEFFICIENTS.index(name)] = 0.0
    context = rows * REFERENCE_CONTEXT_TOKENS
    charged = (layers, num_checks, num_heads, filled_layers, rows)
    seconds, _ = cost.decode_seconds(c, rows, context, context, *charged, rows, 1.0)
    return seconds, cost.decode_joules(c, rows, context, context, *charged, seconds)
