"""Companies: the rows of `rebatch` that have passed as many exits of their token and run together.

Fresh rows have passed none. The others are held after an exit until their company goes on.
"""

from __future__ import annotations

from typing import Any

from helios_sim.loop.compiled import compiled
from helios_sim.loop.memory import take_blocks
from helios_sim.loop.rows import block_offset, forget_lead, row_context
from helios_sim.loop.state import REBATCH, World


@compiled
def held_level(w: World, r: int, rep: Any) -> int:
    """The exits passed by the rows that run next: the deepest company as large as the fresh one.

    No company is larger than a pass.
    """
    fresh = min(company_size(w, r, rep, 0), rep.batch_limit)
    for passed in range(rep.level, 0, -1):
        company = company_size(w, r, rep, passed)
        if company > 0 and company >= fresh:
            return passed
    return 0


@compiled
def company_size(w: World, r: int, rep: Any, passed: int) -> int:
    """Decoding rows that have passed `passed` exits of their token."""
    size = 0
    for k in range(rep.num_ready):
        if w.rows[r, w.order[r, k]].held == passed:
            size += 1
    return size


@compiled
def choose_company(w: World, r: int, rep: Any, passed: int) -> tuple[int, int, int]:
    """Choose the rows of the next pass; returns how many, their summed context and the longest.

    Of more fresh rows than a pass has, each has its turn, in order of admission.
    """
    batch = 0
    context = 0
    longest = 0
    growing = 0
    count = rep.num_ready
    k = rep.next_row if passed == 0 and rep.next_row < count else 0
    for _ in range(count):
        row = w.rows[r, w.order[r, k]]
        row.runs = 0
        if row.held == passed and batch < rep.batch_limit:
            row.runs = 1
            batch += 1
            own = row_context(rep, row)
            context += own + 1
            longest = max(longest, own + 1)
            if own % rep.block_tokens == 0:
                growing += 1
            if passed == 0:
                rep.next_row = k + 1
        k = k + 1 if k + 1 < count else 0
    if passed == 0:
        take_blocks(rep, growing)
    return batch, context, longest


@compiled
def num_confident(w: World, r: int, rep: Any, level: int) -> int:
    """Rows of the pass under way that are confident at this exit or at one before."""
    levels = w.leaving_level[rep.model, rep.column]
    leaving = 0
    for k in range(rep.num_ready):
        own = levels[w.lanes[r, k] + rep.ticks]
        if w.rows[r, w.order[r, k]].runs and own <= level:
            leaving += 1
    return leaving


@compiled
def split_company(w: World, r: int, rep: Any, passed: int, level: int) -> None:
    """Mark who leaves at this exit: at the loaded depth all do; the others are held after it."""
    levels = w.leaving_level[rep.model, rep.column]
    for k in range(rep.num_ready):
        row = w.rows[r, w.order[r, k]]
        if row.runs:
            if levels[w.lanes[r, k] + rep.ticks] <= level:
                row.leaves_at = level + 1
                w.exit_counts[r, rep.model, level] += 1
            else:
                if passed == 0:
                    w.block_offsets[r, block_offset(rep, row)] -= 1
                row.held = level + 1


@compiled
def num_starting(w: World, r: int, rep: Any) -> int:
    """Decoding rows that begin a token with the next iteration: all but those held at an exit."""
    if rep.exit_mode == REBATCH:
        return company_size(w, r, rep, 0)
    return rep.num_ready


@compiled
def sit_out(w: World, r: int, rep: Any, row: Any, k: int) -> None:
    """Let a tick pass that emits none of this row's tokens."""
    if row.held == 0:
        w.block_offsets[r, block_offset(rep, row)] -= 1
    forget_lead(rep, row)
    row.joined_tick += 1
    w.lanes[r, k] -= 1
    if row.held == 0:
        w.block_offsets[r, block_offset(rep, row)] += 1
