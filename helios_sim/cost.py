"""Seconds and joules of an iteration: plain functions over one array of coefficients.

Written in the subset of Python that numba compiles; the batch loop compiles them, everyone else
calls them as they are, and both get the same bits. A layer takes the largest of three times
(launch floor, memory, compute), each linear in what the iteration carries. A token row is one
running request in decode; `context` is the number of KV tokens those rows have, and
`padded_context` the number read by a backend that reads every computed row to the longest one's
end: rows computed times the longest context, the token under way included. A prefill carries
tokens, the KV tokens they read back (`prefill_context`, zero for a whole prompt) and the query-key
pairs they attend to (`prefill_pairs`).
"""

from __future__ import annotations

from typing import Any, Final

from helios_sim.loop.compiled import compilable

LAUNCH: Final = 0
MEMORY: Final = 1
COMPUTE: Final = 2
REGIMES: Final = ("launch", "memory", "compute")

COEFFICIENTS: Final = (
    "decode.launch_s",
    "decode.memory_s_per_layer",
    "decode.memory_s_per_row",
    "decode.memory_s_per_context_token",
    "decode.compute_s_per_layer",
    "decode.compute_s_per_row",
    "decode.compute_s_per_context_token",
    "prefill.launch_s",
    "prefill.memory_s_per_layer",
    "prefill.memory_s_per_token",
    "prefill.memory_s_per_context_token",
    "prefill.compute_s_per_layer",
    "prefill.compute_s_per_token",
    "prefill.compute_s_per_pair",
    "decode.fixed_s",
    "prefill.fixed_s",
    "head.floor_s",
    "head.base_s",
    "head.s_per_row",
    "check.floor_s",
    "check.base_s",
    "check.s_per_row",
    "kv_fill.floor_s_per_layer",
    "kv_fill.base_s_per_layer",
    "kv_fill.s_per_row_layer",
    "rebatch.overhead_s",
    "power.active_w",
    "decode.j_per_layer",
    "decode.j_per_row_layer",
    "decode.j_per_context_token_layer",
    "prefill.j_per_layer",
    "prefill.j_per_token_layer",
    "prefill.j_per_pair_layer",
    "head.j_base",
    "head.j_per_row",
    "check.j_base",
    "check.j_per_row",
    "kv_fill.j_per_layer",
    "kv_fill.j_per_row_layer",
    "power.limit_w",
    "decode.memory_s_per_padded_token",
    "decode.compute_s_per_padded_token",
    "decode.fixed_s_per_row",
    "prefill.fixed_s_per_prompt",
    "decode.j_per_padded_token_layer",
    "capture.s_per_graph",
    "capture.s_per_exit",
    "capture.s_per_layer",
    "capture.s_per_filled_layer",
    "rebatch.overhead_s_per_row",
)
"""Names of the coefficients, in the order of the array; units are in the names.

All are per layer unless they say `fixed`, `head`, `check`, `rebatch` or `capture`.
"""

DECODE_LAUNCH_S: Final = 0
DECODE_MEMORY_S_PER_LAYER: Final = 1
DECODE_MEMORY_S_PER_ROW: Final = 2
DECODE_MEMORY_S_PER_CONTEXT_TOKEN: Final = 3
DECODE_COMPUTE_S_PER_LAYER: Final = 4
DECODE_COMPUTE_S_PER_ROW: Final = 5
DECODE_COMPUTE_S_PER_CONTEXT_TOKEN: Final = 6
PREFILL_LAUNCH_S: Final = 7
PREFILL_MEMORY_S_PER_LAYER: Final = 8
PREFILL_MEMORY_S_PER_TOKEN: Final = 9
PREFILL_MEMORY_S_PER_CONTEXT_TOKEN: Final = 10
PREFILL_COMPUTE_S_PER_LAYER: Final = 11
PREFILL_COMPUTE_S_PER_TOKEN: Final = 12
PREFILL_COMPUTE_S_PER_PAIR: Final = 13
DECODE_FIXED_S: Final = 14
PREFILL_FIXED_S: Final = 15
HEAD_FLOOR_S: Final = 16
HEAD_BASE_S: Final = 17
HEAD_S_PER_ROW: Final = 18
CHECK_FLOOR_S: Final = 19
CHECK_BASE_S: Final = 20
CHECK_S_PER_ROW: Final = 21
KV_FILL_FLOOR_S_PER_LAYER: Final = 22
KV_FILL_BASE_S_PER_LAYER: Final = 23
KV_FILL_S_PER_ROW_LAYER: Final = 24
REBATCH_OVERHEAD_S: Final = 25
POWER_ACTIVE_W: Final = 26
DECODE_J_PER_LAYER: Final = 27
DECODE_J_PER_ROW_LAYER: Final = 28
DECODE_J_PER_CONTEXT_TOKEN_LAYER: Final = 29
PREFILL_J_PER_LAYER: Final = 30
PREFILL_J_PER_TOKEN_LAYER: Final = 31
PREFILL_J_PER_PAIR_LAYER: Final = 32
HEAD_J_BASE: Final = 33
HEAD_J_PER_ROW: Final = 34
CHECK_J_BASE: Final = 35
CHECK_J_PER_ROW: Final = 36
KV_FILL_J_PER_LAYER: Final = 37
KV_FILL_J_PER_ROW_LAYER: Final = 38
POWER_LIMIT_W: Final = 39
DECODE_MEMORY_S_PER_PADDED_TOKEN: Final = 40
DECODE_COMPUTE_S_PER_PADDED_TOKEN: Final = 41
DECODE_FIXED_S_PER_ROW: Final = 42
PREFILL_FIXED_S_PER_PROMPT: Final = 43
DECODE_J_PER_PADDED_TOKEN_LAYER: Final = 44
CAPTURE_S_PER_GRAPH: Final = 45
CAPTURE_S_PER_EXIT: Final = 46
CAPTURE_S_PER_LAYER: Final = 47
CAPTURE_S_PER_FILLED_LAYER: Final = 48
REBATCH_OVERHEAD_S_PER_ROW: Final = 49
"""Where each coefficient stands in the array, by its name in `COEFFICIENTS`."""

OPTIONAL_COEFFICIENTS: Final = COEFFICIENTS[DECODE_MEMORY_S_PER_PADDED_TOKEN:]
"""Those that a profile may leave out; they are 0 then."""

CAPTURE_COEFFICIENTS: Final = COEFFICIENTS[CAPTURE_S_PER_GRAPH:REBATCH_OVERHEAD_S_PER_ROW]
"""What it takes to capture graphs, in the order in which `capture_seconds` takes their counts."""


@compilable
def layer_seconds(
    c: Any,
    rows: float,
    context: float,
    padded_context: float,
    prefill_tokens: float,
    prefill_context: float,
    prefill_pairs: float,
) -> tuple[float, int]:
    """Seconds of one layer over the whole iteration, and the regime that bounds it.

    Decode rows and prefill tokens of one iteration share the reading of the weights. Where tokens
    are fed again each row is read to its own end, and `padded_context` is `context`.
    """
    launch = 0.0
    memory = 0.0
    compute = 0.0
    if rows > 0.0:
        launch = c[DECODE_LAUNCH_S]
        memory = (
            c[DECODE_MEMORY_S_PER_LAYER]
            + c[DECODE_MEMORY_S_PER_ROW] * rows
            + c[DECODE_MEMORY_S_PER_CONTEXT_TOKEN] * context
            + c[DECODE_MEMORY_S_PER_PADDED_TOKEN] * padded_context
        )
        compute = (
            c[DECODE_COMPUTE_S_PER_LAYER]
            + c[DECODE_COMPUTE_S_PER_ROW] * rows
            + c[DECODE_COMPUTE_S_PER_CONTEXT_TOKEN] * context
            + c[DECODE_COMPUTE_S_PER_PADDED_TOKEN] * padded_context
        )
    if prefill_tokens > 0.0:
        if c[PREFILL_LAUNCH_S] > launch:
            launch = c[PREFILL_LAUNCH_S]
        weights = 0.0 if rows > 0.0 else c[PREFILL_MEMORY_S_PER_LAYER]
        memory = (
            memory
            + weights
            + c[PREFILL_MEMORY_S_PER_TOKEN] * prefill_tokens
            + c[PREFILL_MEMORY_S_PER_CONTEXT_TOKEN] * prefill_context
        )
        compute = (
            compute
            + c[PREFILL_COMPUTE_S_PER_LAYER]
            + c[PREFILL_COMPUTE_S_PER_TOKEN] * prefill_tokens
            + c[PREFILL_COMPUTE_S_PER_PAIR] * prefill_pairs
        )
    if memory >= launch and memory >= compute:
        return memory, MEMORY
    if compute >= launch:
        return compute, COMPUTE
    return launch, LAUNCH


@compilable
def layer_joules(
    c: Any,
    rows: float,
    context: float,
    padded_context: float,
    prefill_tokens: float,
    prefill_pairs: float,
) -> float:
    """Joules of one layer over the whole iteration, above the active power."""
    joules = 0.0
    if rows > 0.0:
        joules = (
            c[DECODE_J_PER_LAYER]
            + c[DECODE_J_PER_ROW_LAYER] * rows
            + c[DECODE_J_PER_CONTEXT_TOKEN_LAYER] * context
            + c[DECODE_J_PER_PADDED_TOKEN_LAYER] * padded_context
        )
    if prefill_tokens > 0.0:
        weights = 0.0 if rows > 0.0 else c[PREFILL_J_PER_LAYER]
        joules = (
            joules
            + weights
            + c[PREFILL_J_PER_TOKEN_LAYER] * prefill_tokens
            + c[PREFILL_J_PER_PAIR_LAYER] * prefill_pairs
        )
    return joules


@compilable
def begin_seconds(c: Any) -> float:
    """Seconds of the fixed part of a decode that no row adds to: a pass of its own takes them."""
    return c[DECODE_FIXED_S]


@compilable
def told_seconds(c: Any, rows: float) -> float:
    """Seconds that rows add to the fixed part of the decode in which they are told their token."""
    return c[DECODE_FIXED_S_PER_ROW] * rows


@compilable
def fixed_seconds(c: Any, decode_rows: float, prompts: float) -> float:
    """Seconds that an iteration of `prompts` takes beside its layers, head and checks.

    Prompts count that have tokens in it. Beside one another rows and prompts take the longer of
    their times.
    """
    fixed = 0.0
    if decode_rows > 0.0:
        fixed = begin_seconds(c) + told_seconds(c, decode_rows)
    return max(fixed, c[PREFILL_FIXED_S] + c[PREFILL_FIXED_S_PER_PROMPT] * prompts)


@compilable
def head_seconds(c: Any, rows: float) -> float:
    """Seconds of the final norm, output head and sampling over `rows` tokens."""
    return max(c[HEAD_FLOOR_S], c[HEAD_BASE_S] + c[HEAD_S_PER_ROW] * rows)


@compilable
def head_joules(c: Any, rows: float) -> float:
    """Joules of the final norm, output head and sampling, above the active power."""
    return c[HEAD_J_BASE] + c[HEAD_J_PER_ROW] * rows


@compilable
def check_seconds(c: Any, rows: float) -> float:
    """Seconds of one exit check: norm, exit head and confidence over `rows` tokens."""
    return max(c[CHECK_FLOOR_S], c[CHECK_BASE_S] + c[CHECK_S_PER_ROW] * rows)


@compilable
def check_joules(c: Any, rows: float) -> float:
    """Joules of one exit check, above the active power."""
    return c[CHECK_J_BASE] + c[CHECK_J_PER_ROW] * rows


@compilable
def kv_fill_seconds(c: Any, rows: float, layers: float) -> float:
    """Seconds to fill the KV cache of `layers` skipped layers for `rows` tokens."""
    return layers * max(
        c[KV_FILL_FLOOR_S_PER_LAYER],
        c[KV_FILL_BASE_S_PER_LAYER] + c[KV_FILL_S_PER_ROW_LAYER] * rows,
    )


@compilable
def kv_fill_joules(c: Any, rows: float, layers: float) -> float:
    """Joules to fill the KV cache of skipped layers, above the active power."""
    return layers * (c[KV_FILL_J_PER_LAYER] + c[KV_FILL_J_PER_ROW_LAYER] * rows)


@compilable
def going_on_seconds(c: Any, rows: float) -> float:
    """Seconds that rows held at an exit add to the pass in which they go on by themselves."""
    return c[REBATCH_OVERHEAD_S] + c[REBATCH_OVERHEAD_S_PER_ROW] * rows


@compilable
def capture_seconds(
    c: Any, graphs: float, exits: float, layers: float, filled_layers: float
) -> float:
    """Seconds to capture graphs that together run so many layers and fill so many.

    Those of exits are not among `graphs`: what an exit says is a graph of its own, or none.
    """
    return (
        c[CAPTURE_S_PER_GRAPH] * graphs
        + c[CAPTURE_S_PER_EXIT] * exits
        + c[CAPTURE_S_PER_LAYER] * layers
        + c[CAPTURE_S_PER_FILLED_LAYER] * filled_layers
    )


@compilable
def capture_joules(c: Any, seconds: float) -> float:
    """Joules drawn while graphs are captured: the host works, and the device is no busier."""
    return c[POWER_ACTIVE_W] * seconds


@compilable
def iteration_joules(c: Any, seconds: float, above_active_j: float) -> float:
    """Joules of an iteration: active power and work on top, within the board's power limit.

    The work at one roof draws up to the limit; work at two roofs at once cannot draw more.
    """
    return min(c[POWER_ACTIVE_W] * seconds + above_active_j, c[POWER_LIMIT_W] * seconds)


@compilable
def decode_seconds(
    c: Any,
    rows: float,
    context: float,
    padded_context: float,
    layers: float,
    num_checks: float,
    num_heads: float,
    filled_layers: float,
    fill_rows: float,
    asked_rows: float,
    residual: float,
) -> tuple[float, int]:
    """Seconds of a decode iteration and its regime.

    `rows` carry the layers (with tokens fed again, where KV is recomputed) and `fill_rows` the KV
    filling, both as computed. `asked_rows` carry the fixed part, the exit checks and the head: a
    graph pads what its device computes, and what a row adds there is its host's.
    """
    layer_s, regime = layer_seconds(c, rows, context, padded_context, 0.0, 0.0, 0.0)
    seconds = begin_seconds(c) + told_seconds(c, asked_rows) + layers * (layer_s * residual)
    seconds = seconds + num_checks * check_seconds(c, asked_rows)
    seconds = seconds + num_heads * head_seconds(c, asked_rows)
    seconds = seconds + kv_fill_seconds(c, fill_rows, filled_layers)
    return seconds, regime


@compilable
def decode_joules(
    c: Any,
    rows: float,
    context: float,
    padded_context: float,
    layers: float,
    num_checks: float,
    num_heads: float,
    filled_layers: float,
    fill_rows: float,
    seconds: float,
) -> float:
    """Joules of a decode iteration that took `seconds`, active power included."""
    joules = layers * layer_joules(c, rows, context, padded_context, 0.0, 0.0)
    joules = joules + num_checks * check_joules(c, fill_rows)
    joules = joules + num_heads * head_joules(c, fill_rows)
    joules = joules + kv_fill_joules(c, fill_rows, filled_layers)
    return iteration_joules(c, seconds, joules)


@compilable
def mixed_seconds(
    c: Any,
    rows: float,
    context: float,
    padded_context: float,
    prefill_tokens: float,
    prefill_context: float,
    prefill_pairs: float,
    layers: float,
    num_checks: float,
    head_rows: float,
    prompts: float,
    residual: float,
) -> tuple[float, int]:
    """Seconds of an iteration that carries prefill tokens, alone or beside decode rows.

    It runs to the loaded depth, so nothing is filled; `head_rows` tokens are emitted and `prompts`
    have tokens in it.
    """
    layer_s, regime = layer_seconds(
        c, rows, context, padded_context, prefill_tokens, prefill_context, prefill_pairs
    )
    seconds = fixed_seconds(c, rows, prompts) + layers * (layer_s * residual)
    if rows > 0.0:
        seconds = seconds + num_checks * check_seconds(c, rows)
    if head_rows > 0.0:
        seconds = seconds + head_seconds(c, head_rows)
    return seconds, regime


@compilable
def mixed_joules(
    c: Any,
    rows: float,
    context: float,
    padded_context: float,
    prefill_tokens: float,
    prefill_pairs: float,
    layers: float,
    num_checks: float,
    head_rows: float,
    seconds: float,
) -> float:
    """Joules of an iteration that carries prefill tokens, active power included."""
    joules = layers * layer_joules(c, rows, context, padded_context, prefill_tokens, prefill_pairs)
    if rows > 0.0:
        joules = joules + num_checks * check_joules(c, rows)
    if head_rows > 0.0:
        joules = joules + head_joules(c, head_rows)
    return iteration_joules(c, seconds, joules)
