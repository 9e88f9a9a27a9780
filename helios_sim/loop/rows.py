"""The rows of a replica: what a running request holds, and what its tokens came to.

A row is a running request. Its *slot* in `w.rows` never changes; its place `k` among the running
ones, in order of admission, does: those that decode come first. A *tick* is an iteration that
decodes, and what would grow by one with each is kept less the ticks, so that nothing is written:
a row's *lane* is its place in the exit trace, its *lead* the tokens in its KV cache, its *block
offset* where these stand in their last block. A *turn* is the tick at which some row ends or
reaches the end of its domain's trace.
"""

from __future__ import annotations

from typing import Any

from helios_sim.loop.compiled import compiled
from helios_sim.loop.memory import blocks_for, give_back_blocks
from helios_sim.loop.state import (
    AGREE,
    NLL,
    OBSERVED_BREACH,
    REBATCH,
    RELATIVE_BREACH,
    UNKNOWN,
    World,
)


@compiled
def settle(w: World, rep: Any, row: Any) -> None:
    """Write what a decoding row's tokens came to into its request, up to its latest token.

    Quality follows from where the tokens stand in the exit trace: a difference of running sums.
    """
    req = w.requests[row.request]
    tokens = rep.ticks - row.joined_tick
    req.generated = req.output - row.remaining + tokens
    if tokens <= 0:
        return
    req.decoded += tokens
    start = row.place
    place = start + tokens
    while place >= row.wrap:
        place -= w.trace_length
    if rep.exit_mode != REBATCH:
        layers = rep.cumulative_layers - row.layers_mark
        req.executed_layers += layers
        rep.executed_layers += layers
        # Running sums have one entry more than positions in every domain.
        domain = (row.wrap - w.trace_length) // w.trace_length
        sums = w.prefix[rep.model, rep.column]
        agree = 0
        nll = 0
        observed = 0
        relative = 0
        left = tokens
        while left > 0:
            stop = min(start + left, row.wrap)
            agree += sums[stop + domain, AGREE] - sums[start + domain, AGREE]
            nll += sums[stop + domain, NLL] - sums[start + domain, NLL]
            observed += sums[stop + domain, OBSERVED_BREACH] - sums[start + domain, OBSERVED_BREACH]
            relative += sums[stop + domain, RELATIVE_BREACH] - sums[start + domain, RELATIVE_BREACH]
            left -= stop - start
            start = row.wrap - w.trace_length
        req.agree += agree
        req.nll += nll
        req.breaches += observed
        req.relative_breaches += relative
        rep.nll += nll
    row.place = place
    row.remaining -= tokens
    row.context += tokens
    row.joined_tick = rep.ticks
    row.layers_mark = rep.cumulative_layers


@compiled
def account_token(
    w: World, rep: Any, row: Any, place: int, column: int, counts_breach: bool
) -> None:
    """Write the quality of the single token at `place`, left under `column`."""
    req = w.requests[row.request]
    at = place + (row.wrap - w.trace_length) // w.trace_length
    sums = w.prefix[rep.model, column]
    nll = sums[at + 1, NLL] - sums[at, NLL]
    req.agree += sums[at + 1, AGREE] - sums[at, AGREE]
    req.nll += nll
    rep.nll += nll
    if counts_breach:
        observed = sums[at + 1, OBSERVED_BREACH] - sums[at, OBSERVED_BREACH]
        req.breaches += observed
        req.relative_breaches += sums[at + 1, RELATIVE_BREACH] - sums[at, RELATIVE_BREACH]
        rep.num_breaches += observed


@compiled
def row_context(rep: Any, row: Any) -> int:
    """Tokens in the KV cache of a row."""
    if row.to_prefill > 0:
        return row.context
    return row.context + rep.ticks - row.joined_tick


@compiled
def lead(row: Any) -> int:
    """Tokens in the KV cache of a decoding row, less the ticks: so they never change."""
    return row.context - row.joined_tick


@compiled
def count_lead(rep: Any, row: Any) -> None:
    """Let a row that joins the decoding ones be the longest of them."""
    if rep.num_ready == 0:
        rep.longest_lead = lead(row)
    elif rep.longest_lead != UNKNOWN:
        rep.longest_lead = max(rep.longest_lead, lead(row))


@compiled
def forget_lead(rep: Any, row: Any) -> None:
    """Look the longest row up again when this one leaves or changes, if it may have been it."""
    if lead(row) == rep.longest_lead:
        rep.longest_lead = UNKNOWN


@compiled
def longest_context(w: World, r: int, rep: Any) -> int:
    """KV tokens that the longest decoding row reads, its own new one included.

    It is looked up only after the longest has gone, so that finding it costs a row's leaving.
    """
    if rep.longest_lead == UNKNOWN:
        for k in range(rep.num_ready):
            rep.longest_lead = max(rep.longest_lead, lead(w.rows[r, w.order[r, k]]))
    return rep.longest_lead + rep.ticks + 1


@compiled
def row_blocks(rep: Any, row: Any) -> int:
    """Blocks a row holds between iterations; a held row has room for the token under way."""
    started = 1 if row.held > 0 else 0
    return blocks_for(row_context(rep, row) + row.to_prefill + started, rep.block_tokens)


@compiled
def block_offset(rep: Any, row: Any) -> int:
    """Where a decoding row's KV stands in its last block, less the ticks: so it never moves."""
    return lead(row) % rep.block_tokens


@compiled
def full_rows(w: World, r: int, rep: Any) -> int:
    """Decoding rows that begin a token now and whose last block is full."""
    return w.block_offsets[r, -rep.ticks % rep.block_tokens]


@compiled
def join(w: World, r: int, rep: Any, row: Any, k: int) -> None:
    """Let a prefilled row decode from the next iteration on."""
    row.joined_tick = rep.ticks
    row.first_tick = rep.ticks
    row.layers_mark = rep.cumulative_layers
    w.lanes[r, k] = row.place - rep.ticks
    w.block_offsets[r, block_offset(rep, row)] += 1
    rep.context_sum += row.context
    count_lead(rep, row)
    rep.num_ready += 1
    rep.num_fresh += 1
    rep.next_turn = min(rep.next_turn, rep.ticks + row.remaining, rep.ticks + row.wrap - row.place)


@compiled
def leave(w: World, r: int, rep: Any, k: int) -> Any:
    """Take the `k`-th row out of the running ones; returns it, settled, its blocks given back."""
    order = w.order[r]
    lanes = w.lanes[r]
    slot = order[k]
    row = w.rows[r, slot]
    give_back_blocks(rep, row_blocks(rep, row))
    if row.to_prefill == 0:
        settle(w, rep, row)
        rep.context_sum -= row.context
        forget_lead(rep, row)
        rep.num_ready -= 1
        if row.held == 0:
            w.block_offsets[r, block_offset(rep, row)] -= 1
        if rep.recompute_kv:
            rep.pending_sum -= min(rep.ticks - row.first_tick, rep.partial_ticks)
    rep.num_rows -= 1
    for j in range(k, rep.num_rows):
        order[j] = order[j + 1]
        lanes[j] = lanes[j + 1]
    order[rep.num_rows] = slot
    return row
