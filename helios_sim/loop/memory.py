"""The KV block pool of a replica: blocks are taken and given back, never more than there are.

Functions over the replica's record; numba compiles them. Law: free + used = pool, none negative.
"""

from __future__ import annotations

from typing import Any

from helios_sim.loop.compiled import compilable


@compilable
def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold the KV of `tokens` tokens."""
    return (tokens + block_tokens - 1) // block_tokens


@compilable
def take_blocks(rep: Any, num_blocks: int) -> None:
    """Take blocks out of the pool; the caller has checked that they are free."""
    rep.free_blocks -= num_blocks


@compilable
def give_back_blocks(rep: Any, num_blocks: int) -> None:
    """Give blocks back to the pool."""
    rep.free_blocks += num_blocks


@compilable
def used_blocks(rep: Any) -> int:
    """Blocks held by running requests (staged weights are not counted)."""
    return rep.pool_blocks - rep.staged_blocks - rep.free_blocks


@compilable
def resize_pool(rep: Any, num_blocks: int) -> None:
    """Give an empty replica a pool of another size."""
    rep.pool_blocks = num_blocks
    rep.staged_blocks = 0
    rep.free_blocks = num_blocks


@compilable
def stage_blocks(rep: Any, num_blocks: int) -> None:
    """Set free blocks aside, until the pool is resized, for weights that arrive beside requests."""
    rep.staged_blocks += num_blocks
    rep.free_blocks -= num_blocks
