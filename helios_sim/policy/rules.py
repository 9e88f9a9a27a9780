"""Hot rules: asked for every iteration or token, by both hosts.

Plain functions over numbers, written in the subset of Python that numba compiles: the simulator
compiles these very functions into its batch loop and the GPU backend calls them as they are.
"""

from __future__ import annotations

from typing import Any


def may_join(
    num_running: int,
    max_batch: int,
    needed_blocks: int,
    free_blocks: int,
    watermark_blocks: int,
) -> bool:
    """Whether the request at the head of the queue may join the batch now.

    It needs a free row and, beyond the watermark kept for growing requests, free KV blocks. An
    empty replica ignores the watermark: whatever fits at all is served.
    """
    if num_running >= max_batch:
        return False
    if num_running == 0:
        return needed_blocks <= free_blocks
    return needed_blocks + watermark_blocks <= free_blocks


def leaves_here(confidence: float, threshold: float) -> bool:
    """Whether a token leaves at an exit of this confidence (EE-LLM, LayerSkip: at or above)."""
    return confidence >= threshold


def is_breach(confidence: float, threshold: float, at_full_depth: bool) -> bool:
    """Whether a token emitted at the loaded depth counts as a confidence breach.

    At full depth nothing is left to load, so no token breaches there.
    """
    return (not at_full_depth) and confidence < threshold


def rebatch_pays(
    num_leaving: int, batch: int, shallow_s: float, deep_s: float, full_s: float
) -> bool:
    """Whether letting `num_leaving` of `batch` tokens leave beats carrying all on.

    The inequality of DREX (arXiv 2512.15705): b' > (c / t_d) b with c = t_s + t_d - t_f, in
    seconds: the saved share of the deep part must exceed the overhead of splitting the batch.
    `shallow_s` is up to the exit, the KV of those who leave filled; `deep_s` is a later pass in
    which a whole batch goes on from the exit, `full_s` one that carries all on at once.
    """
    overhead_s = shallow_s + deep_s - full_s
    return num_leaving * deep_s > overhead_s * batch


def watch_tumbling(
    num_seen: int, num_breaches: int, breached: bool, window_tokens: int, breach_limit: int
) -> tuple[int, int, bool]:
    """Count one token in a tumbling window; returns (seen, breaches, tripped).

    Trips on the breach that exceeds `breach_limit`; a window that ends without tripping starts
    anew.
    """
    num_seen += 1
    if breached:
        num_breaches += 1
    if num_breaches > breach_limit:
        return 0, 0, True
    if num_seen >= window_tokens:
        return 0, 0, False
    return num_seen, num_breaches, False


def watch_sliding(
    ring: Any, num_seen: int, num_breaches: int, breached: bool, breach_limit: int
) -> tuple[int, int, bool]:
    """Count one token in a sliding window; returns (seen, breaches, tripped).

    `ring` holds the last `len(ring)` tokens as 0 or 1 and is overwritten in place; `num_seen`
    counts all tokens since the window was last cleared.
    """
    place = num_seen % len(ring)
    if num_seen >= len(ring) and ring[place]:
        num_breaches -= 1
    ring[place] = 1 if breached else 0
    if breached:
        num_breaches += 1
    if num_breaches > breach_limit:
        return 0, 0, True
    return num_seen + 1, num_breaches, False
