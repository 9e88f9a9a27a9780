"""The compiled batch loop: runs a replica until its next decision and not a token further.

Between two decisions a replica's future is fixed: only its own queue, pool and profile matter.
`advance` carries it from event to event: an iteration ends, requests arrive, the next iteration
starts. Cutting the advance at any time changes nothing, because whatever starts is finished by a
later call exactly as by the same one. The rules come from `policy.rules` and the costs from
`cost`, compiled here as they stand.

`w` is the world, `r` the number of a replica and `rep` its record, `i` the number of a request, and
`k` the place of a row among the replica's running ones. What is counted by ticks is told in `rows`.
"""

from __future__ import annotations

import math
from typing import Any

from helios_sim import cost
from helios_sim.loop.captures import capture
from helios_sim.loop.companies import (
    choose_company,
    company_size,
    held_level,
    num_confident,
    num_starting,
    sit_out,
    split_company,
)
from helios_sim.loop.compiled import compilable, compiled, compiled_rule
from helios_sim.loop.memory import blocks_for, give_back_blocks, take_blocks, used_blocks
from helios_sim.loop.queues import (
    next_inbox,
    pop_waiting,
    push_inbox,
    push_waiting_first,
    send_next,
    take_arrivals,
)
from helios_sim.loop.rows import (
    account_token,
    block_offset,
    full_rows,
    join,
    leave,
    longest_context,
    row_context,
    settle,
)
from helios_sim.loop.state import (
    AT_HORIZON,
    BETWEEN,
    BREACHED,
    CHUNKED,
    CONTINUOUS,
    DECODING,
    DRAINED,
    DRAINING_STATE,
    EVALUATING_STATE,
    FINISHED,
    IDLE_STATE,
    ITL_BINS_PER_OCTAVE,
    ITL_OCTAVES,
    ITL_SMALLEST_EXPONENT,
    MIXED,
    NEVER,
    NOBODY,
    OUT_OF_WORK,
    PAUSED,
    PREFILLING,
    REASSESS_DUE,
    REBATCH,
    REFUSED,
    RUNNING,
    SERVING_STATE,
    SOLO,
    STATIC,
    TIMELINE_CAPACITY,
    TUMBLING,
    WAIT,
    Parking,
    World,
)
from helios_sim.policy import rules

may_join = compiled_rule(rules.may_join)
rebatch_pays = compiled_rule(rules.rebatch_pays)
watch_tumbling = compiled_rule(rules.watch_tumbling)
watch_sliding = compiled_rule(rules.watch_sliding)


@compiled
def never_fits(w: World, rep: Any, i: int) -> bool:
    """Whether a request exceeds the model's context or the whole pool."""
    total = w.requests[i].prompt + w.requests[i].output
    if total > w.max_positions[rep.model]:
        return True
    return blocks_for(total - 1, rep.block_tokens) > rep.pool_blocks


@compiled
def refuse(w: World, r: int, rep: Any, i: int) -> None:
    """Turn a request away for good."""
    w.requests[i].status = REFUSED
    w.requests[i].replica = r
    rep.num_refused += 1
    send_next(w, r, rep)


@compiled
def admit(w: World, r: int, rep: Any, i: int) -> None:
    """Give a request a row and the blocks of all tokens it has so far."""
    req = w.requests[i]
    tokens = req.prompt + req.generated
    take_blocks(rep, blocks_for(tokens, rep.block_tokens))
    row = w.rows[r, w.order[r, rep.num_rows]]
    first = req.domain * w.trace_length
    row.request = i
    row.context = 0
    row.remaining = req.output - req.generated
    row.place = first + (req.trace_start + req.generated) % w.trace_length
    row.wrap = first + w.trace_length
    row.to_prefill = tokens
    row.chunk = 0
    row.held = 0
    row.leaves_at = 0
    row.last_token_s = req.last_token_s
    if req.admitted_s != req.admitted_s:
        req.admitted_s = rep.now_s
    req.status = RUNNING
    req.replica = r
    req.model = rep.model
    req.depth = rep.depth
    if rep.evaluating:
        req.evaluated = 1
    rep.num_rows += 1
    rep.quota -= 1
    if rep.num_rows > rep.max_rows:
        rep.max_rows = rep.num_rows


@compiled
def num_making_room(w: World, r: int, rep: Any) -> int:
    """Rows held by `rebatch` whose places in the batch others may take, all but one at most."""
    if rep.max_held == 0 or rep.exit_mode != REBATCH:
        return 0
    num_held = rep.num_ready - company_size(w, r, rep, 0)
    return max(0, min(num_held, rep.max_held, rep.num_rows - 1))


@compiled
def next_may_join(w: World, r: int, rep: Any) -> bool:
    """Whether the head of the queue may join now; refuses heads that can never fit.

    `may_join` is asked where there is a free row and where there are blocks: it may admit less.
    """
    if rep.draining or rep.quota <= 0:
        return False
    while rep.waiting_head != NOBODY and never_fits(w, rep, rep.waiting_head):
        refuse(w, r, rep, pop_waiting(w, rep))
        take_arrivals(w, rep)
    if rep.waiting_head == NOBODY:
        return False
    req = w.requests[rep.waiting_head]
    running = rep.num_rows - num_making_room(w, r, rep)
    needed = blocks_for(req.prompt + req.generated, rep.block_tokens)
    # A policy's own rule is not asked for more rows or blocks than there are.
    if running >= rep.batch_limit or needed > rep.free_blocks:
        return False
    return may_join(
        running,
        rep.batch_limit,
        needed,
        rep.free_blocks,
        int(rep.watermark * rep.pool_blocks),
    )


@compiled
def admit_prompts(w: World, r: int, rep: Any, token_budget: int) -> int:
    """Admit whole prompts, first come first served, up to a token budget; returns how many.

    A prompt larger than the budget goes alone.
    """
    count = 0
    tokens = 0
    while next_may_join(w, r, rep):
        req = w.requests[rep.waiting_head]
        size = req.prompt + req.generated
        if count > 0 and tokens + size > token_budget:
            break
        admit(w, r, rep, pop_waiting(w, rep))
        count += 1
        tokens += size
    return count


@compiled
def preempt(w: World, r: int, rep: Any) -> None:
    """Send the request admitted last back to the head of the queue; its KV is recomputed later."""
    row = leave(w, r, rep, rep.num_rows - 1)
    last_token_s = row.last_token_s
    if row.to_prefill == 0:
        if rep.num_fresh > 0:
            rep.num_fresh -= 1
        elif rep.exit_mode != REBATCH:
            last_token_s = rep.last_tick_s
    w.requests[row.request].last_token_s = last_token_s
    w.requests[row.request].preemptions += 1
    rep.num_preemptions += 1
    rep.quota += 1
    push_waiting_first(w, rep, row.request)


@compiled
def make_room(w: World, r: int, rep: Any) -> None:
    """Preempt until every decoding row whose last block is full can have another."""
    while full_rows(w, r, rep) > rep.free_blocks:
        preempt(w, r, rep)


@compiled
def retire(w: World, r: int, rep: Any, row: Any) -> None:
    """Count a request whose row has left with its last token as finished."""
    req = w.requests[row.request]
    req.finished_s = rep.now_s
    req.status = FINISHED
    rep.num_finished += 1
    rep.period_finished += 1
    rep.finish_target -= 1
    rep.ttft_sum_s += req.first_token_s - req.arrival_s
    if req.output > 1:
        rep.period_tpots += 1
        rep.tpot_sum_s += (rep.now_s - req.first_token_s) / (req.output - 1)
    send_next(w, r, rep)


@compiled
def count_gap(w: World, r: int, rep: Any, gap_s: float, count: int) -> None:
    """Add inter-token gaps of one length to the pooled histogram."""
    if count <= 0:
        return
    rep.itl_sum_s += gap_s * count
    rep.itl_sum_square_s2 += gap_s * gap_s * count
    place = 0
    if gap_s > 0.0:
        mantissa, exponent = math.frexp(gap_s)
        place = (exponent - ITL_SMALLEST_EXPONENT) * ITL_BINS_PER_OCTAVE + int(
            (mantissa - 0.5) * 2.0 * ITL_BINS_PER_OCTAVE
        )
        place = min(max(place, 0), ITL_OCTAVES * ITL_BINS_PER_OCTAVE - 1)
    w.itl_counts[r, place] += count


@compiled
def watch(w: World, r: int, rep: Any, breached: bool) -> None:
    """Count one emitted token in the breach window."""
    if rep.window_kind == TUMBLING:
        seen, breaches, tripped = watch_tumbling(
            rep.window_seen,
            rep.window_breaches,
            breached,
            rep.window_tokens,
            rep.breach_limit,
        )
    else:
        seen, breaches, tripped = watch_sliding(
            w.window[r, : rep.window_tokens],
            rep.window_seen,
            rep.window_breaches,
            breached,
            rep.breach_limit,
        )
    rep.window_seen = seen
    rep.window_breaches = breaches
    if tripped:
        rep.tripped = 1


@compiled
def begin(rep: Any, phase: int, seconds: float, joules: float, regime: int) -> None:
    """Start an iteration whose cost is known."""
    rep.phase = phase
    rep.iteration_start_s = rep.now_s
    rep.end_s = rep.now_s + seconds
    rep.iteration_j = joules
    rep.regime = regime


@compiled
def count_decode(rep: Any, rows: int, seconds: float) -> None:
    """Count an iteration in which so many rows decode."""
    rep.num_decode_iterations += 1
    rep.decode_rows += rows
    rep.decode_s += seconds


@compiled
def count_pace(rep: Any, tokens: int, rows: int, computed_rows: int, layers: int) -> None:
    """Add the iteration that has begun, without prompts and with so many tokens, to the pace.

    Its seconds are those between two instants, as a clock would tell them. Iterations that capture
    graphs are no part of the pace: the candidate serves without once it is chosen.
    """
    rep.paced_tokens += tokens
    rep.paced_rows += rows
    rep.paced_row_s += rows * (rep.end_s - rep.iteration_start_s)
    rep.paced_row_layers += rows * layers
    rep.paced_row_rows += rows * computed_rows


@compiled
def start_prefill(w: World, r: int, rep: Any, count: int) -> None:
    """Start an iteration that prefills the `count` rows admitted last, whole."""
    tokens = 0
    pairs = 0.0
    for k in range(rep.num_rows - count, rep.num_rows):
        row = w.rows[r, w.order[r, k]]
        row.chunk = row.to_prefill
        tokens += row.chunk
        pairs += row.chunk * (row.chunk + 1.0) * 0.5
    c = w.coefficients[rep.model]
    seconds, regime = cost.mixed_seconds(
        c,
        0.0,
        0.0,
        0.0,
        float(tokens),
        0.0,
        pairs,
        float(rep.depth),
        0.0,
        float(count),
        float(count),
        1.0,
    )
    joules = cost.mixed_joules(
        c, 0.0, 0.0, 0.0, float(tokens), pairs, float(rep.depth), 0.0, float(count), seconds
    )
    begin(rep, PREFILLING, seconds, joules, regime)


@compiled
def count_exits(w: World, r: int, rep: Any) -> int:
    """Count the exits at which the decoding rows' next tokens leave; returns the deepest."""
    deepest = 0
    ticks = rep.ticks
    levels = w.leaving_level[rep.model, rep.column]
    lanes = w.lanes[r]
    counts = w.exit_counts[r, rep.model]
    for k in range(rep.num_ready):
        level = levels[lanes[k] + ticks]
        counts[level] += 1
        deepest = max(deepest, level)
    return deepest


@compiled
def start_decode(w: World, r: int, rep: Any) -> None:
    """Start an iteration in which every row emits one token.

    With exits active the batch runs to its deepest token; the KV of the layers beyond is filled,
    or those tokens are fed again until a full pass has covered them.
    """
    count = rep.num_rows
    model = rep.model
    take_blocks(rep, full_rows(w, r, rep))
    deepest = rep.level
    pending = rep.pending_sum
    num_checks = 0
    num_heads = 1
    if rep.exit_mode == WAIT or rep.exit_mode == SOLO:
        deepest = count_exits(w, r, rep)
        num_checks = min(deepest + 1, rep.level)
        num_heads = 1 if deepest == rep.level else 0
    else:
        w.exit_counts[r, model, rep.level] += count
    layers = w.exit_layers[model, deepest]
    filled = 0 if rep.recompute_kv else rep.depth - layers
    batch = rep.static_rows if rep.batching == STATIC else count
    padded = w.padded[model, batch]
    context = float(rep.context_sum + count)
    # Tokens fed again are read to each row's own end.
    padded_context = context if pending > 0 else padded * longest_context(w, r, rep)
    c = w.coefficients[model]
    seconds, regime = cost.decode_seconds(
        c,
        padded + pending,
        context,
        padded_context,
        float(layers),
        float(num_checks),
        float(num_heads),
        float(filled),
        padded,
        float(batch),
        w.residual[model, rep.level, batch],
    )
    joules = cost.decode_joules(
        c,
        padded + pending,
        context,
        padded_context,
        float(layers),
        float(num_checks),
        float(num_heads),
        float(filled),
        padded,
        seconds,
    )
    captured = 0
    # Tokens fed again take several places a row, which no graph serves.
    if pending == 0:
        asked = rep.level if num_checks == 0 else 0
        filled_rows = 0.0 if filled == 0 else padded
        captured, captured_s = capture(w, r, rep, 0, asked, deepest, padded, filled_rows)
        if captured_s > 0.0:
            seconds += captured_s
            joules += cost.capture_joules(c, captured_s)
            regime = cost.LAUNCH
    rep.iteration_layers = layers
    count_decode(rep, count, seconds)
    begin(rep, DECODING, seconds, joules, regime)
    if captured == 0:
        count_pace(rep, count, count, batch, layers)


@compiled
def remaining_seconds(w: World, rep: Any, next_level: int, batch: float, layer_s: float) -> float:
    """Seconds from after the exit before `next_level` to the loaded depth, head included."""
    c = w.coefficients[rep.model]
    layers = rep.depth - w.exit_layers[rep.model, next_level - 1]
    seconds = layers * layer_s + cost.head_seconds(c, batch)
    return seconds + (rep.level - next_level) * cost.check_seconds(c, batch)


@compiled
def start_rebatched(w: World, r: int, rep: Any, passed: int) -> None:
    """Start an iteration of the rows that have passed `passed` exits, up to the first split.

    At each exit those who are confident may leave; where the DREX inequality says it pays they
    do, and the others are held after that exit until their company is large enough to go on.
    """
    model = rep.model
    batch, context, longest = choose_company(w, r, rep, passed)
    c = w.coefficients[model]
    padded = w.padded[model, batch]
    layer_s, regime = cost.layer_seconds(c, padded, float(context), padded * longest, 0.0, 0.0, 0.0)
    layer_s = layer_s * w.residual[model, rep.level, batch]
    layer_j = cost.layer_joules(c, padded, float(context), padded * longest, 0.0, 0.0)
    begin_s = cost.begin_seconds(c)
    seconds = begin_s
    if passed > 0:
        seconds = seconds + cost.going_on_seconds(c, float(batch))
    joules = 0.0
    before = 0 if passed == 0 else w.exit_layers[model, passed - 1]
    level = passed
    while True:
        segment = w.exit_layers[model, level] - before
        before = w.exit_layers[model, level]
        seconds = seconds + segment * layer_s
        joules = joules + segment * layer_j
        if level == rep.level:
            seconds = seconds + cost.head_seconds(c, float(batch))
            joules = joules + cost.head_joules(c, padded)
            leaving = batch
        else:
            seconds = seconds + cost.check_seconds(c, float(batch))
            joules = joules + cost.check_joules(c, padded)
            leaving = num_confident(w, r, rep, level)
        if leaving == batch:
            break
        if leaving > 0:
            rest_s = remaining_seconds(w, rep, level + 1, float(batch), layer_s)
            skipped = float(rep.depth - w.exit_layers[model, level])
            fill_s = cost.kv_fill_seconds(c, w.padded[model, leaving], skipped)
            shallow_s = seconds + fill_s
            deep_s = begin_s + cost.going_on_seconds(c, float(batch)) + rest_s
            if rebatch_pays(leaving, batch, shallow_s, deep_s, seconds + rest_s):
                break
        level += 1
    skipped = float(rep.depth - w.exit_layers[model, level])
    leavers = w.padded[model, leaving]
    seconds = seconds + cost.told_seconds(c, float(leaving))
    seconds = seconds + cost.kv_fill_seconds(c, leavers, skipped)
    joules = joules + cost.kv_fill_joules(c, leavers, skipped)
    split_company(w, r, rep, passed, level)
    joules = cost.iteration_joules(c, seconds, joules)
    captured, captured_s = capture(w, r, rep, passed, passed, level, padded, leavers)
    if captured_s > 0.0:
        seconds += captured_s
        joules += cost.capture_joules(c, captured_s)
        regime = cost.LAUNCH
    count_decode(rep, batch, seconds)
    begin(rep, DECODING, seconds, joules, regime)
    if captured == 0:
        first = 0 if passed == 0 else w.exit_layers[model, passed - 1]
        count_pace(rep, leaving, batch, batch, w.exit_layers[model, level] - first)


@compiled
def plan_chunks(w: World, r: int, rep: Any) -> tuple[int, int, float]:
    """Share the token budget that decoding rows leave among prompts, admitting new ones.

    Returns the prefill tokens of the iteration, the KV tokens they read back and the query-key
    pairs they attend to.
    """
    budget = rep.chunk_tokens - num_starting(w, r, rep)
    tokens = 0
    reread = 0
    pairs = 0.0
    k = rep.num_ready
    while budget > tokens:
        if k == rep.num_rows:
            if not next_may_join(w, r, rep):
                break
            admit(w, r, rep, pop_waiting(w, rep))
        row = w.rows[r, w.order[r, k]]
        k += 1
        row.chunk = min(row.to_prefill, budget - tokens)
        tokens += row.chunk
        reread += row.context
        pairs += row.chunk * (float(row.context) + (row.chunk + 1.0) * 0.5)
    return tokens, reread, pairs


@compiled
def start_fresh_to_the_end(w: World, r: int, rep: Any) -> tuple[int, int]:
    """Let fresh rows of `rebatch` ride through all layers beside prompts.

    Returns their summed context and that of the longest.
    """
    context = 0
    longest = 0
    levels = w.leaving_level[rep.model, rep.column]
    for k in range(rep.num_ready):
        row = w.rows[r, w.order[r, k]]
        if row.held == 0:
            context += row_context(rep, row) + 1
            longest = max(longest, row_context(rep, row) + 1)
            level = levels[w.lanes[r, k] + rep.ticks]
            row.leaves_at = level + 1
            w.exit_counts[r, rep.model, level] += 1
    return context, longest


@compiled
def start_mixed(w: World, r: int, rep: Any, tokens: int, reread: int, pairs: float) -> None:
    """Start an iteration of prompt chunks beside the decoding rows, through all loaded layers."""
    model = rep.model
    decoding = num_starting(w, r, rep)
    context = rep.context_sum + decoding
    longest = 0
    if decoding > 0 and rep.exit_mode != REBATCH:
        longest = longest_context(w, r, rep)
    num_checks = 0
    if rep.exit_mode == REBATCH:
        context, longest = start_fresh_to_the_end(w, r, rep)
        num_checks = rep.level
    elif rep.exit_mode == WAIT or rep.exit_mode == SOLO:
        count_exits(w, r, rep)
        num_checks = rep.level
    else:
        w.exit_counts[r, model, rep.level] += decoding
    prompts = 0
    emitting = 0
    for k in range(rep.num_ready, rep.num_rows):
        row = w.rows[r, w.order[r, k]]
        if row.chunk > 0:
            prompts += 1
        if row.chunk == row.to_prefill:
            emitting += 1
    pending = rep.pending_sum
    c = w.coefficients[model]
    padded = w.padded[model, decoding]
    padded_context = float(context) if pending > 0 else padded * longest
    residual = w.residual[model, rep.level, decoding] if decoding > 0 else 1.0
    seconds, regime = cost.mixed_seconds(
        c,
        padded + pending,
        float(context),
        padded_context,
        float(tokens),
        float(reread),
        pairs,
        float(rep.depth),
        float(num_checks),
        padded + emitting,
        float(prompts),
        residual,
    )
    joules = cost.mixed_joules(
        c,
        padded + pending,
        float(context),
        padded_context,
        float(tokens),
        pairs,
        float(rep.depth),
        float(num_checks),
        padded + emitting,
        seconds,
    )
    rep.iteration_layers = rep.depth
    if decoding > 0:
        count_decode(rep, decoding, seconds)
    begin(rep, MIXED, seconds, joules, regime)


@compiled
def start_iteration(w: World, r: int, rep: Any) -> bool:
    """Start the next iteration, if there is one to start: prompts first, or chunks, then decode."""
    while True:
        if rep.batching == CHUNKED:
            make_room(w, r, rep)
            passed = held_level(w, r, rep) if rep.exit_mode == REBATCH else 0
            if passed > 0:
                start_rebatched(w, r, rep, passed)
                return True
            growing = full_rows(w, r, rep)
            take_blocks(rep, growing)
            tokens, reread, pairs = plan_chunks(w, r, rep)
            if tokens > 0:
                start_mixed(w, r, rep, tokens, reread, pairs)
                return True
            give_back_blocks(rep, growing)
        elif rep.batching == CONTINUOUS:
            count = admit_prompts(w, r, rep, rep.max_prefill_tokens)
            if count > 0:
                start_prefill(w, r, rep, count)
                return True
        elif rep.num_rows == 0:
            count = admit_prompts(w, r, rep, NEVER)
            rep.static_rows = count
            if count > 0:
                start_prefill(w, r, rep, count)
                return True
        if rep.num_rows == 0:
            return False
        make_room(w, r, rep)
        if rep.num_rows > 0:
            break
    if rep.exit_mode == REBATCH:
        start_rebatched(w, r, rep, held_level(w, r, rep))
    else:
        start_decode(w, r, rep)
    return True


@compiled
def finish_prefill(w: World, r: int, rep: Any, row: Any) -> None:
    """Emit the token that a completed prefill yields, at the loaded depth."""
    req = w.requests[row.request]
    account_token(w, rep, row, row.place, rep.level, True)
    if rep.watching:
        watch(w, r, rep, w.breach[rep.model, rep.level, row.place] != 0)
    if req.first_token_s != req.first_token_s:
        req.first_token_s = rep.now_s
    else:
        count_gap(w, r, rep, rep.now_s - row.last_token_s, 1)
    row.last_token_s = rep.now_s
    row.remaining -= 1
    row.place += 1
    if row.place == row.wrap:
        row.place = row.wrap - w.trace_length
    req.generated = req.output - row.remaining
    rep.num_tokens += 1


@compiled
def emit_prefilled(w: World, r: int, rep: Any) -> None:
    """Emit the tokens of the prompts that are through; they decode from the next iteration on."""
    k = rep.num_ready
    while k < rep.num_rows:
        row = w.rows[r, w.order[r, k]]
        row.context += row.chunk
        row.to_prefill -= row.chunk
        row.chunk = 0
        if row.to_prefill == 0:
            finish_prefill(w, r, rep, row)
            join(w, r, rep, row, k)
            if row.remaining == 0:
                rep.num_fresh -= 1
                retire(w, r, rep, leave(w, r, rep, k))
                continue
        k += 1


@compiled
def emit_decoded(w: World, r: int, rep: Any) -> None:
    """Emit one token of every decoding row, all at once, and retire those that are done."""
    count = rep.num_ready
    if count == 0:
        return
    full_depth = w.exit_layers[rep.model, w.exit_layers.shape[1] - 1]
    if rep.depth < full_depth or rep.counts_at_full_depth:
        count_breaches(w, r, rep)
    count_gap(w, r, rep, rep.now_s - rep.last_tick_s, count - rep.num_fresh)
    for k in range(count - rep.num_fresh, count):
        row = w.rows[r, w.order[r, k]]
        count_gap(w, r, rep, rep.now_s - row.last_token_s, 1)
    rep.num_fresh = 0
    rep.last_tick_s = rep.now_s
    rep.ticks += 1
    rep.cumulative_layers += rep.iteration_layers
    rep.context_sum += count
    rep.num_tokens += count
    if rep.recompute_kv:
        if rep.iteration_layers == rep.depth:
            rep.partial_ticks = 0
            rep.pending_sum = 0
        else:
            rep.partial_ticks += 1
            rep.pending_sum += count
    if rep.ticks >= rep.next_turn:
        take_turn(w, r, rep)


@compiled
def count_breaches(w: World, r: int, rep: Any) -> None:
    """Count tokens below the threshold, in the breach window too if somebody watches."""
    ticks = rep.ticks
    breaches = w.breach[rep.model, rep.column]
    lanes = w.lanes[r]
    total = 0
    if rep.watching:
        for k in range(rep.num_ready):
            breached = breaches[lanes[k] + ticks]
            total += breached
            watch(w, r, rep, breached != 0)
    else:
        for k in range(rep.num_ready):
            total += breaches[lanes[k] + ticks]
    rep.num_breaches += total


@compiled
def take_turn(w: World, r: int, rep: Any) -> None:
    """Retire rows with no token left, start used-up traces over, and find the next turn."""
    next_turn = NEVER
    k = 0
    while k < rep.num_ready:
        row = w.rows[r, w.order[r, k]]
        last_tick = row.joined_tick + row.remaining
        if last_tick == rep.ticks:
            retire(w, r, rep, leave(w, r, rep, k))
            continue
        if w.lanes[r, k] + rep.ticks == row.wrap:
            w.lanes[r, k] -= w.trace_length
        next_turn = min(next_turn, last_tick, row.wrap - w.lanes[r, k])
        k += 1
    rep.next_turn = next_turn


@compiled
def emit_rebatched(w: World, r: int, rep: Any) -> None:
    """Emit the tokens of the rows that leave; the others sit this tick out."""
    if rep.num_ready == 0:
        return
    rep.ticks += 1
    rep.num_fresh = 0
    k = 0
    while k < rep.num_ready:
        row = w.rows[r, w.order[r, k]]
        if row.leaves_at > 0:
            emit_one(w, r, rep, row, w.lanes[r, k] + rep.ticks - 1)
            if row.joined_tick + row.remaining == rep.ticks:
                retire(w, r, rep, leave(w, r, rep, k))
                continue
            if w.lanes[r, k] + rep.ticks == row.wrap:
                w.lanes[r, k] -= w.trace_length
        else:
            sit_out(w, r, rep, row, k)
        k += 1


@compiled
def emit_one(w: World, r: int, rep: Any, row: Any, place: int) -> None:
    """Emit the token at `place` with which a row of `rebatch` leaves the iteration."""
    level = row.leaves_at - 1
    row.leaves_at = 0
    if row.held > 0:
        row.held = 0
        w.block_offsets[r, block_offset(rep, row)] += 1
    own = w.leaving_level[rep.model, rep.column, place]
    layers = rep.depth if rep.phase == MIXED else w.exit_layers[rep.model, level]
    w.requests[row.request].executed_layers += layers
    rep.executed_layers += layers
    if level == own:
        account_token(w, rep, row, place, rep.column, True)
    else:
        account_token(w, rep, row, place, level, False)
    if rep.watching:
        watch(w, r, rep, level == own and w.breach[rep.model, rep.column, place] != 0)
    count_gap(w, r, rep, rep.now_s - row.last_token_s, 1)
    row.last_token_s = rep.now_s
    rep.context_sum += 1
    rep.num_tokens += 1


@compilable
def state_of(rep: Any) -> int:
    """What a replica is doing, for the timeline."""
    if rep.num_rows == 0 and rep.num_waiting == 0:
        return IDLE_STATE
    if rep.draining:
        return DRAINING_STATE
    if rep.evaluating:
        return EVALUATING_STATE
    return SERVING_STATE


@compiled
def sample(w: World, r: int, state: int) -> None:
    """Write a line of the timeline now, halving its resolution when it is full."""
    rep = w.replicas[r]
    take_arrivals(w, rep)
    lines = w.samples[r]
    if rep.num_samples == TIMELINE_CAPACITY:
        for k in range(TIMELINE_CAPACITY // 2):
            lines[k] = lines[2 * k + 1]
        rep.num_samples = TIMELINE_CAPACITY // 2
        rep.sample_interval_s *= 2.0
    line = lines[rep.num_samples]
    line.time_s = rep.now_s
    line.energy_j = rep.energy_j + rep.moving_w * (rep.now_s - rep.moving_since_s)
    line.batch_seconds = rep.batch_seconds
    line.tokens = rep.num_tokens
    line.breaches = rep.num_breaches
    line.waiting = rep.num_waiting
    line.used_blocks = used_blocks(rep)
    line.pool_blocks = rep.pool_blocks
    line.model = rep.model
    line.depth = rep.depth
    line.state = state
    rep.num_samples += 1
    rep.next_sample_s = (
        math.floor(rep.now_s / rep.sample_interval_s) + 1.0
    ) * rep.sample_interval_s


@compiled
def complete(w: World, r: int, rep: Any) -> None:
    """End the iteration under way: charge it, emit its tokens, retire who is done, see who came."""
    seconds = rep.end_s - rep.iteration_start_s
    rep.now_s = rep.end_s
    rep.energy_j += rep.iteration_j
    rep.busy_s += seconds
    rep.regime_s[rep.regime] += seconds
    rep.batch_seconds += seconds * rep.num_rows
    rep.kv_block_seconds += seconds * used_blocks(rep)
    rep.num_iterations += 1
    if rep.phase != PREFILLING:
        if rep.exit_mode == REBATCH:
            emit_rebatched(w, r, rep)
        else:
            emit_decoded(w, r, rep)
    if rep.phase != DECODING:
        emit_prefilled(w, r, rep)
    rep.phase = BETWEEN
    take_arrivals(w, rep)
    if rep.now_s >= rep.next_sample_s:
        sample(w, r, state_of(rep))


@compiled
def why_stop(rep: Any) -> int:
    """Whether somebody has to decide now, and why."""
    if rep.finish_target <= 0:
        # What tripped belongs to the period that is told now.
        rep.tripped = 0
        return REASSESS_DUE
    if rep.tripped:
        rep.tripped = 0
        return BREACHED
    if rep.draining and rep.num_rows == 0:
        return DRAINED
    if rep.pausing:
        return PAUSED
    return AT_HORIZON


@compilable
def pass_idle_time(rep: Any, until_s: float) -> None:
    """Let an idle replica's clock run, at idle power."""
    seconds = until_s - rep.now_s
    rep.idle_s += seconds
    rep.energy_j += rep.idle_w * seconds
    rep.idle_energy_j += rep.idle_w * seconds
    rep.now_s = until_s


@compiled
def advance(w: World, r: int, horizon_s: float) -> int:
    """Run replica `r` until somebody must decide, its work runs out, or just before `horizon_s`.

    What happens at the horizon itself is left for the next call: arrivals at that instant come
    first. Returns AT_HORIZON, REASSESS_DUE, BREACHED, DRAINED, PAUSED or OUT_OF_WORK.
    """
    rep = w.replicas[r]
    while True:
        if rep.phase != BETWEEN:
            if rep.end_s >= horizon_s:
                return AT_HORIZON
            complete(w, r, rep)
            cause = why_stop(rep)
            if cause != AT_HORIZON:
                return cause
        elif rep.now_s >= horizon_s:
            return AT_HORIZON
        take_arrivals(w, rep)
        if start_iteration(w, r, rep):
            continue
        # The last row may have been preempted, and nobody is admitted.
        if rep.draining:
            return DRAINED
        if rep.num_inbox == 0:
            return OUT_OF_WORK
        arrival_s = w.requests[next_inbox(w, rep)].arrival_s
        if arrival_s >= horizon_s:
            return AT_HORIZON
        pass_idle_time(rep, arrival_s)


@compiled
def preempt_all(w: World, r: int) -> None:
    """Send every running request back to the queue in its order: its KV is worth nothing now."""
    rep = w.replicas[r]
    while rep.num_rows > 0:
        preempt(w, r, rep)


@compiled
def settle_all(w: World, r: int) -> None:
    """Bring the requests' sums up to date with the tokens emitted so far."""
    rep = w.replicas[r]
    for k in range(rep.num_ready):
        settle(w, rep, w.rows[r, w.order[r, k]])


@compiled
def push_all(w: World, requests: Any, places: Any) -> None:
    """Hand requests to the replicas they were routed to beforehand."""
    for k in range(len(requests)):
        push_inbox(w, places[k], requests[k])


@compiled
def least_loaded(w: World, by_kv: bool) -> int:
    """The replica with the fewest outstanding requests, or the largest free share of its pool.

    Requests in the inbox and in the queue count as outstanding; for KV, so do the blocks that
    these will need. Ties go to the lowest number.
    """
    best = 0
    best_load = math.inf
    for r in range(len(w.replicas)):
        rep = w.replicas[r]
        load = float(rep.num_rows + rep.num_waiting + rep.num_inbox)
        if by_kv:
            load = (used_blocks(rep) + rep.queued_blocks) / max(1.0, float(rep.pool_blocks))
        if load < best_load:
            best_load = load
            best = r
    return best


@compiled
def route(w: World, parking: Parking, by_kv: bool, first: int, before_s: float) -> int:
    """Route requests from `first` on, carrying parked replicas to each next arrival.

    Stops before an arrival at or after `before_s`, at the last request, and when a parked replica
    stops: it is no longer parked then, and its cause is noted. Returns the next request to route.
    """
    at = first
    while True:
        push_inbox(w, least_loaded(w, by_kv), at)
        at += 1
        last = at == len(w.requests)
        horizon_s = math.inf if last else w.requests[at].arrival_s
        if carry_on(w, parking, horizon_s) or last or horizon_s >= before_s:
            return at


@compiled
def carry_on(w: World, parking: Parking, horizon_s: float) -> bool:
    """Advance the parked replicas to just before `horizon_s`; says whether one of them stopped."""
    stopped = False
    for r in range(len(w.replicas)):
        if parking.parked[r]:
            cause = advance(w, r, min(horizon_s, parking.until_s[r]))
            waits = cause == AT_HORIZON or cause == OUT_OF_WORK
            if not waits or parking.until_s[r] <= horizon_s or horizon_s == math.inf:
                parking.parked[r] = False
                parking.cause[r] = cause
                stopped = True
    return stopped
