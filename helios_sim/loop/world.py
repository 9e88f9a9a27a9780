"""The world of a run in arrays: requests, profile and exit traces become the loop's state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from helios_sim.cost import COEFFICIENTS
from helios_sim.errors import InputError
from helios_sim.exits import ExitTraces
from helios_sim.loop.state import (
    AGREE,
    BATCHING,
    GRAPH_KINDS,
    ITL_BINS_PER_OCTAVE,
    ITL_OCTAVES,
    NEVER,
    NLL,
    NLL_UNITS_PER_NAT,
    NOBODY,
    OBSERVED_BREACH,
    RELATIVE_BREACH,
    REPLICA,
    REQUEST,
    ROW,
    SAMPLE,
    SLIDING,
    TIMELINE_CAPACITY,
    TUMBLING,
    Parking,
    World,
)
from helios_sim.policy import rules
from helios_sim.policy.contract import Watching
from helios_sim.profile import ModelProfile, Profile
from helios_sim.scenario import MeasureSettings, ServingSettings
from helios_sim.workload.requests import Requests

_NO_RULES: Mapping[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class TraceTables:
    """Exit traces under one confidence threshold per model, as the batch loop looks them up."""

    leaving_level: NDArray[np.uint8]
    breach: NDArray[np.uint8]
    prefix: NDArray[np.int32]
    trace_length: int
    domains: tuple[str, ...]


def records(shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Zeroed records whose fields are attributes, in compiled and in plain code."""
    return np.zeros(shape, dtype).view(np.recarray)


def trace_tables(
    traces: ExitTraces,
    names: Sequence[str],
    thresholds: Mapping[str, float],
    replaced: Mapping[str, Callable[..., Any]] = _NO_RULES,
) -> TraceTables:
    """Look-up tables of all models, loaded levels and ways of leaving.

    Column c < K holds what happens when all tokens leave at level c, column K + c when tokens
    leave at their own exits but not beyond level c; models with fewer exits repeat their last.
    `replaced` holds a policy's own hot rules.

    The last ones are kept for as long as their traces are, since runs on the same traces follow
    one another; nobody writes into them.
    """
    if replaced:
        return _trace_tables(traces, names, thresholds, replaced)
    key = id(traces), tuple(names), tuple(thresholds[name] for name in names)
    kept = _KEPT.pop(key, None)
    if kept is None:
        tables = _trace_tables(traces, names, thresholds, replaced)
        # An identity is given anew only when its owner is gone, and its tables go with it.
        kept = weakref.ref(traces, lambda _gone: _KEPT.pop(key, None)), tables
    _KEPT[key] = kept
    keep_tables(_most_kept)
    return kept[1]


def keep_tables(most: int) -> int:
    """Keep the tables of so many policies for later runs, 10 to 100 MB each; 0 releases all.

    Returns how many were to be kept before.
    """
    global _most_kept
    before, _most_kept = _most_kept, most
    while len(_KEPT) > most:
        del _KEPT[next(iter(_KEPT))]
    return before


_most_kept = 1

_TablesKey: TypeAlias = tuple[int, tuple[str, ...], tuple[float, ...]]
_KEPT: dict[_TablesKey, tuple[weakref.ref[ExitTraces], TraceTables]] = {}
"""Tables by the identity of their traces, the last used at the end."""


def _trace_tables(
    traces: ExitTraces,
    names: Sequence[str],
    thresholds: Mapping[str, float],
    replaced: Mapping[str, Callable[..., Any]],
) -> TraceTables:
    leaves_here = on_arrays("leaves_here", replaced)
    is_breach = on_arrays("is_breach", replaced)
    num_levels = max(len(traces.exit_layers[name]) for name in names)
    num_domains, length = len(traces.domains), traces.num_positions
    positions = num_domains * length
    leaving = np.zeros((len(names), 2 * num_levels, positions), np.uint8)
    breach = np.zeros_like(leaving)
    prefix = np.zeros((len(names), 2 * num_levels, positions + num_domains, 4), np.int32)
    for m, name in enumerate(names):
        threshold = thresholds[name]
        last = len(traces.exit_layers[name]) - 1
        confidence = traces.confidence[name].reshape(positions, last + 1).astype(np.float64)
        confident = leaves_here(confidence, threshold)
        deeper = _any_deeper(confident)
        own = np.where(confident.any(axis=1), confident.argmax(axis=1), last)
        nll = np.rint(traces.nll_nats[name].astype(np.float64) * NLL_UNITS_PER_NAT)
        per_level = {
            AGREE: traces.agrees[name].reshape(positions, last + 1).astype(np.int64),
            NLL: nll.reshape(positions, last + 1).astype(np.int64),
        }
        for column in range(2 * num_levels):
            top = min(column % num_levels, last)
            level = np.full(positions, top) if column < num_levels else np.minimum(own, top)
            everywhere = np.arange(positions)
            # Who leaves before the loaded level is none to be asked about.
            at_top = level == top
            observed = np.zeros(positions, np.bool_)
            observed[at_top] = is_breach(confidence[at_top, top], threshold, top == last)
            leaving[m, column] = level
            breach[m, column] = observed
            values = np.zeros((positions, 4), np.int64)
            for quantity, table in per_level.items():
                values[:, quantity] = table[everywhere, level]
            values[:, OBSERVED_BREACH] = observed
            values[:, RELATIVE_BREACH] = np.logical_and(observed, deeper[everywhere, level])
            sums = np.cumsum(values.reshape(num_domains, length, 4), axis=1)
            if sums.max(initial=0) > np.iinfo(np.int32).max:
                raise InputError(
                    f"The exit trace of {name!r} is too long to be summed: {length} positions a "
                    "domain."
                )
            column_sums = prefix[m, column].reshape(num_domains, length + 1, 4)
            column_sums[:, 1:] = sums
    return TraceTables(leaving, breach, prefix, length, traces.domains)


def on_arrays(name: str, replaced: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A hot rule for whole arrays: ours compare arrays as they are, others go by the element."""
    if name in replaced:
        return np.vectorize(replaced[name], otypes=[bool])
    ours: Callable[..., Any] = getattr(rules, name)
    return ours


def _any_deeper(confident: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether some deeper level than this one is confident."""
    deeper = np.zeros_like(confident)
    for level in range(confident.shape[1] - 2, -1, -1):
        deeper[:, level] = deeper[:, level + 1] | confident[:, level + 1]
    return deeper


def build_world(
    requests: Requests,
    profile: Profile,
    names: Sequence[str],
    tables: TraceTables,
    serving: ServingSettings,
    measure: MeasureSettings,
    watching: Watching,
    num_replicas: int,
) -> World:
    """An empty fleet before its first event; requests are unsent and in nobody's inbox."""
    models = [profile.model(name) for name in names]
    num_levels = max(model.model.num_exits for model in models)
    window_tokens = watching.breach_window_tokens or 1
    num_rows = serving.max_batch + serving.max_held
    padded = np.array([model.padded_rows(serving.max_batch) for model in models])
    world = World(
        replicas=records(num_replicas, REPLICA),
        rows=records((num_replicas, num_rows), ROW),
        order=np.tile(np.arange(num_rows, dtype=np.int32), (num_replicas, 1)),
        lanes=np.zeros((num_replicas, num_rows), np.int64),
        block_offsets=np.zeros((num_replicas, serving.block_tokens), np.int64),
        requests=request_records(requests, tables),
        coefficients=np.array([model.coefficient_array() for model in models]).reshape(
            len(models), len(COEFFICIENTS)
        ),
        padded=padded,
        residual=np.array(
            [
                [model.residual(serving.max_batch, depth) for depth in _levels(model, num_levels)]
                for model in models
            ]
        ),
        exit_layers=np.array([_levels(model, num_levels) for model in models], np.int64),
        graph_rows=np.array([model.graph_rows for model in models], np.int64),
        captured=np.zeros((num_replicas, GRAPH_KINDS, num_levels, int(padded.max()) + 1), np.uint8),
        max_positions=np.array([model.model.shape.max_positions for model in models], np.int64),
        leaving_level=tables.leaving_level,
        breach=tables.breach,
        prefix=tables.prefix,
        trace_length=tables.trace_length,
        exit_counts=np.zeros((num_replicas, len(models), num_levels), np.int64),
        itl_counts=np.zeros((num_replicas, ITL_OCTAVES * ITL_BINS_PER_OCTAVE), np.int64),
        window=np.zeros(
            (num_replicas, window_tokens if watching.window_kind == "sliding" else 1), np.uint8
        ),
        samples=records((num_replicas, TIMELINE_CAPACITY), SAMPLE),
    )
    for rep in world.replicas:
        rep.waiting_head = rep.waiting_tail = NOBODY
        rep.inbox_head = rep.inbox_tail = rep.inbox_heap = rep.dealt_head = NOBODY
        rep.idle_w = profile.device.idle_w
        rep.batching = BATCHING[serving.batching]
        rep.max_batch = serving.max_batch
        rep.batch_limit = serving.max_batch
        rep.max_held = serving.max_held
        rep.max_prefill_tokens = serving.max_prefill_tokens
        rep.chunk_tokens = serving.chunk_tokens
        rep.watermark = serving.watermark
        rep.recompute_kv = int(serving.skipped_kv == "recomputed")
        rep.block_tokens = serving.block_tokens
        rep.quota = NEVER
        rep.finish_target = NEVER
        rep.window_kind = TUMBLING if watching.window_kind == "tumbling" else SLIDING
        rep.window_tokens = window_tokens
        rep.breach_limit = watching.breach_limit
        rep.sample_interval_s = measure.timeline_interval_s
    return world


def parking_lot(num_replicas: int) -> Parking:
    """A place for every replica, none of them parked."""
    return Parking(
        np.zeros(num_replicas, np.bool_),
        np.zeros(num_replicas, np.float64),
        np.zeros(num_replicas, np.int64),
    )


def request_records(requests: Requests, tables: TraceTables) -> Any:
    """One record a request, nothing of it served yet."""
    table = records(len(requests), REQUEST)
    table["arrival_s"] = requests.arrival_s
    table["prompt"] = requests.prompt_tokens
    table["output"] = requests.output_tokens
    places = np.array([tables.domains.index(domain) for domain in requests.domains])
    table["domain"] = places[requests.domain]
    table["trace_start"] = requests.trace_start % tables.trace_length
    for unset in ("admitted_s", "first_token_s", "finished_s", "last_token_s"):
        table[unset] = np.nan
    for nobody in ("next", "replica", "model", "depth"):
        table[nobody] = NOBODY
    if requests.num_users is not None:
        table["think_s"] = requests.arrival_s
    return table


def deal(world: World, num_users: int) -> None:
    """Deal the requests of a closed loop, beyond its users' first ones, to the users' replicas."""
    num_replicas = len(world.replicas)
    rows = np.arange(num_users, len(world.requests))
    replica = rows % num_users % num_replicas
    for r in range(min(num_replicas, num_users)):
        mine = rows[replica == r]
        if len(mine):
            world.replicas.dealt_head[r] = mine[0]
            world.requests.next[mine[:-1]] = mine[1:]


def _levels(model: ModelProfile, num_levels: int) -> list[int]:
    """Exit layers padded with the full depth."""
    exits = list(model.model.exit_layers)
    return exits + exits[-1:] * (num_levels - len(exits))
