"""The small steps of decoding as single Triton kernels: one launch each, where torch needs many.

The kernels are plain functions that `launches` hands to Triton, so that this module can be imported
where Triton is not. Triton reads their source: Python's types mean nothing in it, and what is
annotated as `tl.constexpr` is fixed when a kernel is compiled. Rounding is that of the stock
modules, which round after every step.
"""

from __future__ import annotations

try:
    import triton.language as tl
except ImportError:
    tl = None


def store_kernel(
    query,
    key,
    value,
    cosine,
    sine,
    rotated,
    keys,
    values,
    addresses,
    positions,
    query_stride,
    key_stride,
    value_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """One key head of one token: rotate its queries and key, and put key and value in the pool.

    `cosine` and `sine` have a row for each position. There may be no queries.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    lane = tl.arange(0, LANES)
    there = lane < HEAD_DIM
    place = tl.load(addresses + token) * (kv_heads * HEAD_DIM) + head * HEAD_DIM + lane
    found = tl.load(value + token * value_stride + head * HEAD_DIM + lane, mask=there)
    tl.store(values + place, found, mask=there)
    source = key + token * key_stride + head * HEAD_DIM
    found = tl.load(source + lane, mask=there)
    if ROTATE:
        kind = keys.dtype.element_ty
        half = HEAD_DIM // 2
        partner = tl.where(lane < half, lane + half, lane - half)
        sign = tl.where(lane < half, -1.0, 1.0)
        turn = tl.load(positions + token) * HEAD_DIM + lane
        cos = tl.load(cosine + turn, mask=there).to(tl.float32)
        sin = tl.load(sine + turn, mask=there).to(tl.float32) * sign
        other = tl.load(source + partner, mask=there)
        straight = (found.to(tl.float32) * cos).to(kind).to(tl.float32)
        crossed = (other.to(tl.float32) * sin).to(kind).to(tl.float32)
        found = (straight + crossed).to(kind)
        for group in tl.static_range(GROUPS):
            begin = (head * GROUPS + group) * HEAD_DIM
            asking = query + token * query_stride + begin
            one = tl.load(asking + lane, mask=there)
            other = tl.load(asking + partner, mask=there)
            straight = (one.to(tl.float32) * cos).to(kind).to(tl.float32)
            crossed = (other.to(tl.float32) * sin).to(kind).to(tl.float32)
            target = rotated + token * (kv_heads * GROUPS * HEAD_DIM) + begin + lane
            tl.store(target, (straight + crossed).to(kind), mask=there)
    tl.store(keys + place, found, mask=there)


def attend_kernel(
    query,
    keys,
    values,
    positions,
    places,
    output,
    weights,
    scale,
    query_stride,
    places_stride,
    place_tokens,
    GROUPS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACED: tl.constexpr,
    PAGED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One key head of one row, one share of its tokens: the queries that share the head attend.

    Programs that run side by side read the heads of the same tokens, which lie side by side.
    """
    head = tl.program_id(0)
    kv_heads = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(positions + row).to(tl.int32) + 1
    # By the row's own length: short rows in a wide bucket are divided as evenly as long ones.
    share = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    begin = split * share
    end = tl.minimum(begin + share, length)

    lane = tl.arange(0, LANES)
    group = tl.arange(0, GROUP_BLOCK)
    inside = lane < HEAD_DIM
    asked = (group[:, None] < GROUPS) & inside[None, :]
    where = (head * GROUPS + group)[:, None] * HEAD_DIM + lane[None, :]
    asking = tl.load(query + row * query_stride + where, mask=asked, other=0.0)
    first = row * place_tokens
    if PLACED:
        first = tl.load(places + row * places_stride) * place_tokens

    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    mixed = tl.zeros([GROUP_BLOCK, LANES], tl.float32)
    for at in range(begin, end, TOKENS):
        token = at + tl.arange(0, TOKENS)
        held = token < end
        if PAGED:
            place = tl.load(
                places + row * places_stride + token // place_tokens, mask=held, other=0
            )
            address = place * place_tokens + token % place_tokens
        else:
            address = first + token
        spot = address[:, None] * (kv_heads * HEAD_DIM) + head * HEAD_DIM + lane[None, :]
        seen = held[:, None] & inside[None, :]
        key = tl.load(keys + spot, mask=seen, other=0.0)
        value = tl.load(values + spot, mask=seen, other=0.0)
        # Also for a single query: only loads that feed matrix units are fetched ahead.
        score = tl.dot(asking, tl.trans(key), input_precision="ieee")
        score = tl.where(held[None, :], score * scale, float("-inf"))
        peak = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.exp2(score - peak[:, None])
        fade = tl.exp2(highest - peak)
        total = total * fade + tl.sum(weight, axis=1)
        more = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        mixed = mixed * fade[:, None] + more
        highest = peak

    nothing = total == 0.0
    divisor = tl.where(nothing, 1.0, total)
    answer = mixed / divisor[:, None]
    number = (row * kv_heads + head) * GROUPS + group
    if SPLIT:
        part = number * splits + split
        tl.store(output + part[:, None] * HEAD_DIM + lane[None, :], answer, mask=asked)
        weighed = tl.where(nothing, float("-inf"), highest + tl.log2(divisor))
        tl.store(weights + part, weighed, mask=group < GROUPS)
    else:
        target = output + number[:, None] * HEAD_DIM + lane[None, :]
        tl.store(target, answer.to(output.dtype.element_ty), mask=asked)


def merge_kernel(
    parts,
    weights,
    output,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One query head of one row: the answers of its shares by their weights."""
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    split = tl.arange(0, SPLITS)
    inside = lane < HEAD_DIM
    weight = tl.load(weights + number * SPLITS + split)
    share = tl.exp2(weight - tl.max(weight, axis=0))
    share = share / tl.sum(share, axis=0)
    spot = (number * SPLITS + split)[:, None] * HEAD_DIM + lane[None, :]
    part = tl.load(parts + spot, mask=inside[None, :], other=0.0)
    answer = tl.sum(part * share[:, None], axis=0)
    target = output + number * HEAD_DIM + lane
    tl.store(target, answer.to(output.dtype.element_ty), mask=inside)


def gate_kernel(
    gate,
    up,
    output,
    stride,
    width,
    BLOCK: tl.constexpr,
):
    """A stretch of one token's gated units: silu of the gate times the other projection."""
    token = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = unit < width
    kind = output.dtype.element_ty
    opened = tl.load(gate + token * stride + unit, mask=there, other=0.0).to(tl.float32)
    opened = (opened / (1.0 + tl.exp(-opened))).to(kind).to(tl.float32)
    other = tl.load(up + token * stride + unit, mask=there, other=0.0).to(tl.float32)
    tl.store(output + token * width + unit, (opened * other).to(kind), mask=there)


def add_norm_kernel(
    hidden,
    product,
    weight,
    bias,
    total,
    normed,
    width,
    epsilon,
    BLOCK: tl.constexpr,
):
    """One token: its state with a product added, rounded as it is kept, and the sum's norm."""
    unit = tl.arange(0, BLOCK)
    there = unit < width
    place = tl.program_id(0).to(tl.int64) * width + unit
    kind = total.dtype.element_ty
    found = tl.load(hidden + place, mask=there, other=0.0).to(tl.float32)
    found += tl.load(product + place, mask=there, other=0.0).to(tl.float32)
    found = found.to(kind)
    tl.store(total + place, found, mask=there)
    found = found.to(tl.float32)
    off = tl.where(there, found - tl.sum(found, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(off * off, axis=0) / width + epsilon)
    times = tl.load(weight + unit, mask=there, other=0.0).to(tl.float32)
    plus = tl.load(bias + unit, mask=there, other=0.0).to(tl.float32)
    tl.store(normed + place, (off * scale * times + plus).to(kind), mask=there)


def tell_kernel(
    logits,
    targets,
    knots,
    said,
    stride,
    vocab,
    num_knots,
    TARGETED: tl.constexpr,
    KNOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What one row's logits say: the likeliest token, its confidence, the nats of a token.

    `knots` holds the x and then the y of a piecewise linear map of confidence; with `KNOTS` 0
    there is none.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    # Each lane keeps its own until the end. Finite, since nothing is known of -inf less -inf.
    peaks = tl.full([BLOCK], -3.0e38, tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    tokens = tl.zeros([BLOCK], tl.int32)
    for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        unit = at + lane
        read = tl.load(logits + row * stride + unit, mask=unit < vocab, other=float("-inf"))
        read = read.to(tl.float32)
        tokens = tl.where(read > peaks, unit, tokens)
        higher = tl.maximum(peaks, read)
        totals = totals * tl.exp(peaks - higher) + tl.exp(read - higher)
        peaks = higher
    peak = tl.max(peaks, axis=0)
    total = tl.sum(totals * tl.exp(peaks - peak), axis=0)
    token = tl.min(tl.where(peaks == peak, tokens, vocab - 1), axis=0)
    sure = 1.0 / total
    if KNOTS > 0:
        knot = tl.arange(0, KNOTS)
        inner = knot < num_knots - 1
        left = tl.load(knots + knot, mask=inner, other=0.0)
        right = tl.load(knots + knot + 1, mask=inner, other=1.0)
        low = tl.load(knots + num_knots + knot, mask=inner, other=0.0)
        high_ = tl.load(knots + num_knots + knot + 1, mask=inner, other=0.0)
        # Knots may meet in 32 bits: the map then has a step.
        gap = tl.where(right > left, right - left, 1.0)
        share = tl.where(sure > right, 1.0, tl.maximum(sure - left, 0.0) / gap)
        rise = tl.where(inner, share * (high_ - low), 0.0)
        sure = tl.load(knots + num_knots) + tl.sum(rise, axis=0)
    wanted = token.to(tl.int64)
    if TARGETED:
        wanted = tl.load(targets + row)
    nats = peak + tl.log(total) - tl.load(logits + row * stride + wanted).to(tl.float32)
    tl.store(said + row, token.to(tl.float32))
    tl.store(said + rows + row, sure)
    tl.store(said + 2 * rows + row, nats)
