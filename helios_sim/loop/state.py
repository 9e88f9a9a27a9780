"""The typed state of a simulated fleet: one record a replica, a row and a request, in one world.

The batch loop works on nothing else. Records keep a call from Python cheap and the loop's memory
close together; integers that name things (models, levels, requests) are indices.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np

NOBODY: Final = -1
"""The end of a linked list of requests."""

NEVER: Final = 1 << 60
"""A tick, a quota, a target or a budget that is never reached."""

UNKNOWN: Final = -NEVER
"""The longest row's lead where it has to be looked up."""

UNSENT: Final = 0
WAITING: Final = 1
RUNNING: Final = 2
FINISHED: Final = 3
REFUSED: Final = 4

STATIC: Final = 0
CONTINUOUS: Final = 1
CHUNKED: Final = 2
BATCHING: Final = {"static": STATIC, "continuous": CONTINUOUS, "chunked": CHUNKED}

FULL: Final = 0
SOLO: Final = 1
WAIT: Final = 2
REBATCH: Final = 3
LOADED_DEPTH: Final = 4
EXIT_MODES: Final = {
    "full": FULL,
    "solo": SOLO,
    "wait": WAIT,
    "rebatch": REBATCH,
    "loaded-depth": LOADED_DEPTH,
}

AT_HORIZON: Final = 0
REASSESS_DUE: Final = 1
BREACHED: Final = 2
DRAINED: Final = 3
OUT_OF_WORK: Final = 4
PAUSED: Final = 5

BETWEEN: Final = 0
PREFILLING: Final = 1
DECODING: Final = 2
MIXED: Final = 3

EMBEDS: Final = 0
RUNS: Final = 1
TELLS: Final = 2
FILLS: Final = 3
GRAPH_KINDS: Final = 4
"""What a captured graph of a decode does."""

TUMBLING: Final = 0
SLIDING: Final = 1

AGREE: Final = 0
NLL: Final = 1
OBSERVED_BREACH: Final = 2
RELATIVE_BREACH: Final = 3

NLL_UNITS_PER_NAT: Final = 1024
"""Likelihoods are traced and summed as whole units, so that no order of summation shows."""

ITL_BINS_PER_OCTAVE: Final = 64
ITL_OCTAVES: Final = 40
ITL_SMALLEST_EXPONENT: Final = -20
"""The histogram of gaps between tokens: octaves, each cut into equal steps of the mantissa."""

TIMELINE_CAPACITY: Final = 4096

REQUEST = np.dtype(
    [
        ("arrival_s", "f8"),
        ("admitted_s", "f8"),
        ("first_token_s", "f8"),
        ("finished_s", "f8"),
        ("last_token_s", "f8"),
        ("think_s", "f8"),
        ("nll", "i8"),
        ("executed_layers", "i8"),
        ("prompt", "i4"),
        ("output", "i4"),
        ("generated", "i4"),
        ("decoded", "i4"),
        ("domain", "i4"),
        ("trace_start", "i4"),
        ("next", "i4"),
        ("later", "i4"),
        ("agree", "i4"),
        ("breaches", "i4"),
        ("relative_breaches", "i4"),
        ("preemptions", "i4"),
        ("replica", "i2"),
        ("model", "i2"),
        ("depth", "i2"),
        ("status", "i1"),
        ("evaluated", "i1"),
    ],
    align=True,
)

ROW = np.dtype(
    [
        ("last_token_s", "f8"),
        ("layers_mark", "i8"),
        ("joined_tick", "i8"),
        ("first_tick", "i8"),
        ("request", "i4"),
        ("context", "i4"),
        ("remaining", "i4"),
        ("place", "i4"),
        ("wrap", "i4"),
        ("to_prefill", "i4"),
        ("chunk", "i4"),
        ("held", "i2"),
        ("leaves_at", "i2"),
        ("runs", "i2"),
    ],
    align=True,
)
"""A running request. Decoding rows emit a token a tick of their replica's counter, so a row only
remembers how it stood at `joined_tick`: tokens in its KV cache (`context`), tokens still to emit
(`remaining`) and where in the exit trace its next token stood (`place`; the domain's trace ends at
`wrap`). A row that sits a tick out moves its `joined_tick` on. `first_tick` is the tick at which it
began to decode, `to_prefill` counts prompt tokens still to be prefilled and `chunk` those of the
iteration under way; `last_token_s` is when it emitted the last token that came alone (a prefill's,
or any of `rebatch`); `held` counts the exits it has passed while it waits for company (0: it starts
a new token); `leaves_at` is the exit level at which it leaves the iteration under way, plus 1 (0:
it does not leave); `runs` says that `rebatch` has it in the pass under way."""

REPLICA = np.dtype(
    [
        ("now_s", "f8"),
        ("end_s", "f8"),
        ("iteration_start_s", "f8"),
        ("iteration_j", "f8"),
        ("last_tick_s", "f8"),
        ("idle_w", "f8"),
        ("moving_w", "f8"),
        ("moving_since_s", "f8"),
        ("energy_j", "f8"),
        ("idle_energy_j", "f8"),
        ("idle_s", "f8"),
        ("busy_s", "f8"),
        ("decode_s", "f8"),
        ("paced_row_s", "f8"),
        ("batch_seconds", "f8"),
        ("kv_block_seconds", "f8"),
        ("regime_s", "f8", (3,)),
        ("itl_sum_s", "f8"),
        ("itl_sum_square_s2", "f8"),
        ("sample_interval_s", "f8"),
        ("next_sample_s", "f8"),
        ("ttft_sum_s", "f8"),
        ("tpot_sum_s", "f8"),
        ("watermark", "f8"),
        ("phase", "i8"),
        ("regime", "i8"),
        ("model", "i8"),
        ("level", "i8"),
        ("depth", "i8"),
        ("column", "i8"),
        ("exit_mode", "i8"),
        ("batching", "i8"),
        ("max_batch", "i8"),
        ("batch_limit", "i8"),
        ("max_held", "i8"),
        ("next_row", "i8"),
        ("max_prefill_tokens", "i8"),
        ("chunk_tokens", "i8"),
        ("recompute_kv", "i8"),
        ("block_tokens", "i8"),
        ("pool_blocks", "i8"),
        ("free_blocks", "i8"),
        ("staged_blocks", "i8"),
        ("draining", "i8"),
        ("pausing", "i8"),
        ("evaluating", "i8"),
        ("quota", "i8"),
        ("finish_target", "i8"),
        ("watching", "i8"),
        ("counts_at_full_depth", "i8"),
        ("window_kind", "i8"),
        ("window_tokens", "i8"),
        ("breach_limit", "i8"),
        ("window_seen", "i8"),
        ("window_breaches", "i8"),
        ("tripped", "i8"),
        ("num_rows", "i8"),
        ("num_ready", "i8"),
        ("num_fresh", "i8"),
        ("context_sum", "i8"),
        ("longest_lead", "i8"),
        ("ticks", "i8"),
        ("next_turn", "i8"),
        ("partial_ticks", "i8"),
        ("pending_sum", "i8"),
        ("static_rows", "i8"),
        ("iteration_layers", "i8"),
        ("cumulative_layers", "i8"),
        ("waiting_head", "i8"),
        ("waiting_tail", "i8"),
        ("inbox_head", "i8"),
        ("inbox_tail", "i8"),
        ("inbox_heap", "i8"),
        ("dealt_head", "i8"),
        ("num_waiting", "i8"),
        ("num_inbox", "i8"),
        ("queued_blocks", "i8"),
        ("num_finished", "i8"),
        ("num_refused", "i8"),
        ("num_preemptions", "i8"),
        ("num_iterations", "i8"),
        ("num_decode_iterations", "i8"),
        ("decode_rows", "i8"),
        ("paced_tokens", "i8"),
        ("paced_rows", "i8"),
        ("paced_row_layers", "i8"),
        ("paced_row_rows", "i8"),
        ("max_rows", "i8"),
        ("num_tokens", "i8"),
        ("num_breaches", "i8"),
        ("nll", "i8"),
        ("executed_layers", "i8"),
        ("period_finished", "i8"),
        ("period_tpots", "i8"),
        ("num_samples", "i8"),
    ],
    align=True,
)
"""A replica. `phase` is what it does until `end_s`. Its first `num_ready` rows decode, the others
are being prefilled; the last `num_fresh` of the decoding ones have not decoded yet. `ticks` counts
iterations that decoded, `last_tick_s` is when the last one ended, and at `next_turn` some row ends
or reaches the end of its domain's trace; `context_sum` adds up the tokens in the KV cache of
decoding rows, and `longest_lead` is the most that one of them has, less the ticks, or UNKNOWN.
Where skipped KV is recomputed, `partial_ticks` counts ticks since the last full pass and
`pending_sum` the tokens to be fed again; `draining` admits nobody, `pausing` stops at the next
boundary; where `rebatch` has more fresh rows than a pass, the next one begins with the row at
`next_row`; `column` selects the trace tables for its exit mode and loaded level;
`counts_at_full_depth` says that tokens decoded there may breach or move the window, as a policy's
own rules may have it, where ours need not look. The inbox is a list from `inbox_head` to
`inbox_tail`, in order of arrival, and a pairing heap under `inbox_heap` of those that were sent
later than others behind them: a request's `later` is the first of those under it, whose others
follow by `next`. In a closed loop `dealt_head` is the first of the requests that its users are
still to send, a list by `next`. `queued_blocks` are the blocks that the prompts of the queue and
the inbox will need. What is called `paced_` adds up iterations that decode alone, without prompts
and without capturing: the tokens they emitted, and their rows, alone and times the seconds, the
layers and the rows computed.
Sums run over the whole run; the host takes differences where it needs a period, except
`ttft_sum_s`, `tpot_sum_s`, `period_finished` and `period_tpots`, which the host clears at each
decision. While weights move beside requests, `moving_w` is drawn for that from `moving_since_s` on;
`energy_j` has it only once they are here."""


_C_TYPES: Final[dict[str, Any]] = {"f": ctypes.c_double, "i": ctypes.c_int64}


class _LiveRecord(ctypes.Structure):
    """A REPLICA in place, whose fields Python reads and writes as plain numbers."""

    _fields_ = [
        (name, _C_TYPES[REPLICA[name].base.kind] * math.prod(REPLICA[name].shape))
        if REPLICA[name].shape
        else (name, _C_TYPES[REPLICA[name].kind])
        for name in REPLICA.names or ()
    ]


def live_record(replicas: Any, index: int) -> Any:
    """A replica's record as Python reads and writes it, ten times faster than numpy's records do.

    It is the very memory that the compiled loop works on.
    """
    return _LiveRecord.from_buffer(replicas.view(np.uint8), index * REPLICA.itemsize)


SAMPLE = np.dtype(
    [
        ("time_s", "f8"),
        ("energy_j", "f8"),
        ("batch_seconds", "f8"),
        ("tokens", "i8"),
        ("breaches", "i8"),
        ("waiting", "i4"),
        ("used_blocks", "i4"),
        ("pool_blocks", "i4"),
        ("model", "i2"),
        ("depth", "i2"),
        ("state", "i2"),
    ],
    align=True,
)
"""A line of the timeline; energy, batch seconds, tokens and breaches are running sums."""

IDLE_STATE: Final = 0
SERVING_STATE: Final = 1
EVALUATING_STATE: Final = 2
DRAINING_STATE: Final = 3
LOADING_STATE: Final = 4
STATE_NAMES: Final = ("idle", "serving", "evaluating", "draining", "loading")


class World(NamedTuple):
    """Everything the batch loop reads and writes.

    Shapes: R replicas, S rows a replica, B rows of a batch at most, N requests, M models, K exit
    levels, P positions of all domains' traces. A trace column is a loaded level where all leave
    (0..K-1) or a level up to which tokens leave at their own exits (K..2K-1).
    """

    replicas: Any
    """REPLICA, (R,)"""
    rows: Any
    """ROW, (R, S), by slot"""
    order: Any
    """i4, (R, S): slots of the running rows in order of admission, then the free slots"""
    lanes: Any
    """i8, (R, S), in that order: a decoding row's place in the exit trace, less the ticks"""
    block_offsets: Any
    """i8, (R, block_tokens): how many decoding rows there are of each block offset"""
    requests: Any
    """REQUEST, (N,)"""
    coefficients: Any
    """f8, (M, C), in the order of cost.COEFFICIENTS"""
    padded: Any
    """f8, (M, B + 1): decode rows after padding to a graph bucket"""
    residual: Any
    """f8, (M, K, B + 1): correction of a decode layer's time at a loaded level and a batch size"""
    exit_layers: Any
    """i8, (M, K)"""
    graph_rows: Any
    """i8, (M,): the most rows for which graphs are captured at a cost; 0 where none are"""
    captured: Any
    """u1, (R, kinds, K, padded rows + 1): the graphs that a replica has by now"""
    max_positions: Any
    """i8, (M,)"""
    leaving_level: Any
    """u1, (M, 2K, P): exit level at which the token at a position leaves"""
    breach: Any
    """u1, (M, 2K, P): whether it is a confidence breach there"""
    prefix: Any
    """i4, (M, 2K, P + domains, 4): running sums of agreement, likelihood and breaches"""
    trace_length: int
    """positions of one domain's trace"""
    exit_counts: Any
    """i8, (R, M, K): decoded tokens by the level at which they left"""
    itl_counts: Any
    """i8, (R, bins)"""
    window: Any
    """u1, (R, W): the last tokens' breaches of a sliding window; W is 1 for a tumbling one"""
    samples: Any
    """SAMPLE, (R, TIMELINE_CAPACITY)"""


class Parking(NamedTuple):
    """Replicas that wait for nothing but requests: the router carries them on with each arrival."""

    parked: Any
    """bool, (R,)"""
    until_s: Any
    """f8, (R,): when a parked replica is wanted elsewhere"""
    cause: Any
    """i8, (R,): why it stopped"""


@cache
def itl_edges() -> tuple[float, ...]:
    """Edges of the gap histogram: octaves cut into equal steps of the mantissa."""
    edges = [
        math.ldexp(0.5 + step / (2 * ITL_BINS_PER_OCTAVE), ITL_SMALLEST_EXPONENT + octave)
        for octave in range(ITL_OCTAVES)
        for step in range(ITL_BINS_PER_OCTAVE)
    ]
    return (*edges, math.ldexp(0.5, ITL_SMALLEST_EXPONENT + ITL_OCTAVES))
