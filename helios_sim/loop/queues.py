"""The queues of a replica: what users are to send it, what is on its way, and what waits for a row.

They are lists through `w.requests`, by `next`. What arrives out of turn is on its way in a heap
beside its list, whose members' children begin at `later`.
"""

from __future__ import annotations

from typing import Any

from helios_sim.loop.compiled import compiled
from helios_sim.loop.memory import blocks_for
from helios_sim.loop.state import NOBODY, WAITING, World


@compiled
def arrives_before(w: World, i: int, j: int) -> bool:
    """Whether request `i` arrives before request `j`; at one instant the smaller id does."""
    if w.requests[i].arrival_s != w.requests[j].arrival_s:
        return w.requests[i].arrival_s < w.requests[j].arrival_s
    return i < j


@compiled
def prompt_blocks(w: World, rep: Any, i: int) -> int:
    """Blocks of all tokens that a request which is not running has so far."""
    return blocks_for(w.requests[i].prompt + w.requests[i].generated, rep.block_tokens)


@compiled
def push_inbox(w: World, r: int, i: int) -> None:
    """Hand replica `r` a request that arrives at its `arrival_s`.

    What arrives last goes behind the list, as nearly all do in an open loop, others into the heap.
    """
    rep = w.replicas[r]
    rep.num_inbox += 1
    rep.queued_blocks += prompt_blocks(w, rep, i)
    w.requests[i].next = NOBODY
    w.requests[i].later = NOBODY
    if rep.inbox_tail == NOBODY:
        rep.inbox_head = i
        rep.inbox_tail = i
    elif arrives_before(w, rep.inbox_tail, i):
        w.requests[rep.inbox_tail].next = i
        rep.inbox_tail = i
    else:
        rep.inbox_heap = meld(w, rep.inbox_heap, i)


@compiled
def next_inbox(w: World, rep: Any) -> int:
    """The request of the inbox that arrives first; NOBODY if it is empty."""
    if rep.inbox_heap == NOBODY:
        return rep.inbox_head
    if rep.inbox_head != NOBODY and arrives_before(w, rep.inbox_head, rep.inbox_heap):
        return rep.inbox_head
    return rep.inbox_heap


@compiled
def pop_inbox(w: World, rep: Any) -> int:
    """Take the request out of the inbox that arrives first."""
    i = next_inbox(w, rep)
    rep.num_inbox -= 1
    rep.queued_blocks -= prompt_blocks(w, rep, i)
    if i == rep.inbox_heap:
        rep.inbox_heap = without_first(w, i)
    else:
        rep.inbox_head = w.requests[i].next
        if rep.inbox_head == NOBODY:
            rep.inbox_tail = NOBODY
    return i


@compiled
def meld(w: World, first: int, second: int) -> int:
    """Make one of two heaps, either of which may be NOBODY; returns its first to arrive."""
    if first == NOBODY:
        return second
    if second == NOBODY:
        return first
    if arrives_before(w, second, first):
        first, second = second, first
    w.requests[second].next = w.requests[first].later
    w.requests[first].later = second
    return first


@compiled
def without_first(w: World, first: int) -> int:
    """What is left of a heap without its first: melded in pairs, then the last pairs first."""
    at = w.requests[first].later
    pairs = NOBODY
    while at != NOBODY:
        other = w.requests[at].next
        rest = NOBODY if other == NOBODY else w.requests[other].next
        pair = meld(w, at, other)
        w.requests[pair].next = pairs
        pairs = pair
        at = rest
    heap = NOBODY
    while pairs != NOBODY:
        rest = w.requests[pairs].next
        heap = meld(w, heap, pairs)
        pairs = rest
    return heap


@compiled
def push_waiting_last(w: World, rep: Any, i: int) -> None:
    """Let a request wait behind all others."""
    w.requests[i].next = NOBODY
    w.requests[i].status = WAITING
    if rep.waiting_head == NOBODY:
        rep.waiting_head = i
    else:
        w.requests[rep.waiting_tail].next = i
    rep.waiting_tail = i
    rep.num_waiting += 1
    rep.queued_blocks += prompt_blocks(w, rep, i)


@compiled
def push_waiting_first(w: World, rep: Any, i: int) -> None:
    """Let a request wait ahead of all others."""
    w.requests[i].next = rep.waiting_head
    w.requests[i].status = WAITING
    if rep.waiting_head == NOBODY:
        rep.waiting_tail = i
    rep.waiting_head = i
    rep.num_waiting += 1
    rep.queued_blocks += prompt_blocks(w, rep, i)


@compiled
def pop_waiting(w: World, rep: Any) -> int:
    """Take the request at the head of the queue."""
    i = rep.waiting_head
    rep.waiting_head = w.requests[i].next
    rep.num_waiting -= 1
    rep.queued_blocks -= prompt_blocks(w, rep, i)
    return i


@compiled
def take_arrivals(w: World, rep: Any) -> None:
    """Move every request that has arrived by now from the inbox into the queue."""
    while rep.num_inbox > 0 and w.requests[next_inbox(w, rep)].arrival_s <= rep.now_s:
        push_waiting_last(w, rep, pop_inbox(w, rep))


@compiled
def send_next(w: World, r: int, rep: Any) -> None:
    """In a closed loop, have a user whose request has ended send the next one dealt."""
    i = rep.dealt_head
    if i != NOBODY:
        rep.dealt_head = w.requests[i].next
        w.requests[i].arrival_s = rep.now_s + w.requests[i].think_s
        w.requests[i].replica = r
        push_inbox(w, r, i)
