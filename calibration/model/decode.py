"""Prefill, decode and KV filling of an early-exit model over a pool, segment by segment.

Rows, positions and counts are host integers: a host that batches knows them, and asking the
device would wait for it. Everything else stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from operator import add
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from calibration.model import fused, graphs, launches, varlen
from calibration.model.attention import (
    Attend,
    DecodeAttend,
    ExtendAttend,
    PoolWriter,
    Span,
    span_mask,
)
from calibration.model.kv import Indices, PagedPool, Pool, SlotPool, to_device
from helios_sim.errors import InputError

if TYPE_CHECKING:
    from calibration.model.early_exit import EarlyExitLM

Found = TypeVar("Found")

KEPT_PLACES: Final = 8
"""Places remembered, so that the segments of an iteration compute theirs once."""

USABLE: Final = "usable"
NOT_USABLE: Final = "not usable"
"""What `kernels_of` says before the colon and its reason."""


@dataclass
class Place:
    """Where the new tokens of some rows go, packed row after row.

    `rows`, `starts` (tokens a row holds already) and `counts` (new ones) are host integers;
    `addresses_host`, `positions_host` and `located_host` say on the host what the tensors say on
    the device, as `targets_host` says the token that truly follows in each row, if anybody knows.
    `context_tokens` is the width that attention reads of every row, `by_graphs` says whether graphs
    may serve it, where there are any.
    """

    rows: Indices
    starts: Indices
    counts: Indices
    positions_host: Indices
    addresses_host: Indices
    located_host: Indices | None
    context_tokens: int
    device: torch.device
    targets_host: Indices | None = None
    by_graphs: bool = True
    _positions: Tensor | None = None
    _addresses: Tensor | None = None
    _targets: Tensor | None = None
    attend: Attend | None = field(default=None, repr=False)

    @property
    def is_decode(self) -> bool:
        """Whether each row has exactly one new token."""
        return self.num_tokens == len(self.rows)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return len(self.positions_host)

    @property
    def ends(self) -> list[int]:
        """Where each row's last token stands among the packed ones."""
        return [end - 1 for end in accumulate(self.counts.tolist())]

    @property
    def positions(self) -> Tensor:
        """Positions [N] of the packed tokens."""
        if self._positions is None:
            self._positions = to_device(self.positions_host, self.device)
        return self._positions

    @property
    def addresses(self) -> Tensor:
        """Where in the pool's stores the packed tokens go, [N]."""
        if self._addresses is None:
            self._addresses = to_device(self.addresses_host, self.device)
        return self._addresses

    @property
    def targets(self) -> Tensor | None:
        """The tokens that truly follow, [rows], None where nobody knows them."""
        if self._targets is None and self.targets_host is not None:
            self._targets = to_device(self.targets_host, self.device)
        return self._targets


class Decoder:
    """Runs a model's loaded layers over the rows of a KV pool.

    The pool must hold as many layers as are to run. Prompts longer than the model's positions,
    or rows the pool has no place for, raise InputError and PoolExhausted.
    """

    def __init__(self, model: EarlyExitLM, pool: Pool) -> None:
        self.model = model
        self.pool = pool
        self.num_heads = int(model.backbone.config.num_attention_heads)
        self.fusion = fused.choose(pool, self.num_heads)
        """Whether our kernels are used, and why."""
        self.choice = varlen.choose(pool, self.num_heads)
        """The attention over a paged pool of what our kernels do not take, and why."""
        self._rotary: launches.Rotary | None = None
        self.graphs: graphs.DecodeGraphs | None = None
        self.graphs_off_reason = "graphs were not asked for"
        self._places: dict[object, Place] = {}

    def place(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
    ) -> Place:
        """Find (and reserve) the place of new tokens; one token a row unless `counts` is given.

        `targets` are the tokens that truly follow, one a row.
        """
        new = [1] * len(rows) if counts is None else list(counts)
        if (
            not len(rows) == len(starts) == len(new) > 0
            or min(new) < 1
            or len(set(rows)) < len(rows)
        ):
            raise ValueError(
                f"Rows {list(rows)}, starts {list(starts)} and counts {new} must be equally many, "
                "at least one, without a row twice, and every row needs a new token."
            )
        ends = list(map(add, starts, new))
        longest = max(ends)
        if longest > self.model.backbone.max_positions:
            raise InputError(
                f"A row would hold {longest} tokens; the model allows "
                f"{self.model.backbone.max_positions} positions. Give shorter prompts or ask for "
                "fewer tokens."
            )
        self.pool.reserve_each(rows, ends)
        following = None if targets is None else tuple(targets)
        where = (tuple(rows), tuple(starts), tuple(new), following)
        key = (*where, self.pool.edition, self.pool.generation)
        found = self._places.get(key)
        if found is None:
            while len(self._places) >= KEPT_PLACES:
                del self._places[next(iter(self._places))]
            found = self._new_place(rows, starts, new, longest)
            if following is not None:
                found.targets_host = np.asarray(following, dtype=np.int64)
            self._places[key] = found
        return found

    def embed(self, place: Place, ids: Tensor | Sequence[int] | Indices) -> Tensor:
        """Hidden states [N, hidden] before the first layer, of packed token ids.

        With graphs states are theirs: they are overwritten by what next embeds or runs.
        """
        if len(ids) != place.num_tokens:
            raise ValueError(f"{place.num_tokens} token ids belong here, not {len(ids)}.")
        if not isinstance(ids, Tensor):
            given = ids
            embedded = self._replayed(lambda captured: captured.embed(place, given))
            if embedded is not None:
                return embedded
            ids = to_device(np.asarray(ids, dtype=np.int64), self.pool.dims.device)
        with torch.no_grad():
            return self.model.backbone.embed(ids, place.positions)

    def run(self, place: Place, hidden: Tensor, first: int, last: int) -> Tensor:
        """Take hidden states [N, hidden] through layers first..last-1, writing their KV."""
        replayed = self._replayed(lambda captured: captured.run(place, hidden, first, last))
        if replayed is not None:
            return replayed
        with torch.no_grad():
            attend = self._attend(place)
            return self.model.backbone.run(hidden, first, last, attend, place.positions)

    def tell(self, place: Place, hidden: Tensor, level: int) -> Tensor:
        """What an exit says of each row's last token: token, confidence and nats, on the device.

        [3, rows] of states [N, hidden]; there may be more columns, which say nothing. The nats are
        those of the place's targets, or of the token itself.
        """
        exit_layer = self.model.exit_layers[level]
        replayed = self._replayed(lambda captured: captured.tell(place, hidden, exit_layer))
        if replayed is not None:
            return replayed
        logits = self.model.logits(self.last(place, hidden), level)
        return self.model.tell(logits, level, place.targets)

    def fill_place(self, place: Place, hidden: Tensor, first: int, last: int) -> None:
        """Fill the KV of skipped layers first..last-1 from the exit's states [N, hidden]."""
        for piece in self._pieces(first, last):
            fill = partial(graphs.DecodeGraphs.fill, place=place, hidden=hidden, piece=piece)
            if not self._replayed(fill):
                # Only here the device needs the place's integers in tensors of their own.
                writer = self._decode_writer()(place.addresses, place.positions)
                with torch.no_grad():
                    self.model.backbone.fill(hidden, place.positions, *piece, writer)

    def rotary(self) -> launches.Rotary | None:
        """Cosines and sines of all positions that a row of the pool may have."""
        if self._rotary is None:
            with torch.no_grad():
                self._rotary = self.model.backbone.rotary_table(self.pool.max_tokens)
        return self._rotary

    def extend(
        self,
        rows: Sequence[int],
        ids: Sequence[Sequence[int] | Indices],
        starts: Sequence[int],
        last: int | None = None,
    ) -> Tensor:
        """Feed several tokens to each row: a prompt, a chunk of one, or tokens fed again.

        Returns the states [rows, hidden] of each row's last token after layer `last` (the loaded
        depth unless given). Tokens attend to the row's first `starts` tokens and to each other.
        """
        place = self.place(rows, starts, [len(given) for given in ids])
        packed = np.concatenate([np.asarray(given, dtype=np.int64) for given in ids])
        depth = self.model.depth if last is None else last
        hidden = self.run(place, self.embed(place, packed), 0, depth)
        return self.last(place, hidden)

    def last(self, place: Place, hidden: Tensor) -> Tensor:
        """States [rows, hidden] of each row's last new token, of packed states [N, hidden]."""
        if place.is_decode:
            return hidden
        if len(place.rows) == 1:
            return hidden[-1:]
        ends = to_device(np.asarray(place.ends, dtype=np.int64), hidden.device)
        return hidden.index_select(0, ends)

    def segment(
        self,
        rows: Sequence[int],
        hidden: Tensor,
        positions: Sequence[int],
        first: int,
        last: int,
    ) -> Tensor:
        """Take one token a row at `positions` through layers first..last-1; [rows, hidden]."""
        return self.run(self.place(rows, positions), hidden, first, last)

    def fill(
        self,
        rows: Sequence[int],
        hidden: Tensor,
        positions: Sequence[int],
        first: int,
        last: int,
    ) -> None:
        """Fill the KV of skipped layers for one token a row."""
        self.fill_place(self.place(rows, positions), hidden, first, last)

    def begin(
        self, rows: Sequence[int], ids: Tensor | Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """Embed one token a row at `positions`; [rows, hidden]."""
        return self.embed(self.place(rows, positions), ids)

    def use_graphs(
        self,
        batch_buckets: Sequence[int] | None = None,
        max_context: int | None = None,
        *,
        subsets: bool = False,
        targeted: bool = True,
        on_demand: bool = False,
        recorder: graphs.Recorder | None = None,
    ) -> bool:
        """Capture CUDA graphs of all that decoding does, for each batch bucket.

        Segments, the layers between exits up to the loaded depth, are captured for each context
        bucket too; `targeted` has exits say the nats of given tokens;
        `subsets` also captures them for rows that are not the pool's first ones, as where some
        rows wait at an exit while others begin a token (our attention finds rows one by one
        anyway); `on_demand` captures each only when it is first wanted.
        Where graphs cannot be had this says why in `graphs_off_reason`, returns False, and the
        eager path goes on giving the same tokens.
        """
        self.graphs = None
        if recorder is None:
            made = graphs.cuda_recorder(self.pool.dims.device)
            if isinstance(made, str):
                self.graphs_off_reason = made
                return False
            recorder = made
        rows = min(self.pool.max_rows, max(batch_buckets or (self.pool.max_rows,)))
        longest = min(max_context or self.pool.max_tokens, self.pool.max_tokens)
        # Our attention and torch's paged one read what a row holds, however wide the bucket.
        reads_own = self.fusion.usable or self.choice.varlen is not None
        widths = (longest,) if reads_own else graphs.context_buckets(longest)
        settings = graphs.GraphSettings(
            segments=tuple(self.segments()),
            batch_buckets=graphs.buckets_up_to(rows, batch_buckets),
            context_buckets=tuple(sorted({self.pool.context_tokens(w) for w in widths})),
            exits=self._askable_exits(),
            targeted=targeted,
            subsets=subsets,
            finds_rows=self.fusion.usable,
            on_demand=on_demand,
        )
        makers = self._decode_attend(), self._decode_writer()
        try:
            self.graphs = graphs.DecodeGraphs(self.model, self.pool, *makers, settings, recorder)
        except graphs.CaptureError as error:
            self.graphs_off_reason = f"capturing failed: {error}"
            return False
        self.graphs_off_reason = ""
        return True

    def drop_graphs(self, reason: str = "graphs were dropped") -> None:
        """Give the graphs and their memory back."""
        self.graphs = None
        self.graphs_off_reason = reason

    def segments(self) -> list[tuple[int, int]]:
        """The layer ranges between the exits up to the loaded depth."""
        depth = self.model.depth
        bounds = [0, *(layer for layer in self.model.exit_layers if layer < depth), depth]
        return list(pairwise(bounds))

    def _replayed(self, work: Callable[[graphs.DecodeGraphs], Found]) -> Found | None:
        """What the graphs have for it; None where there are none, now or any more."""
        if self.graphs is None:
            return None
        if not self.graphs.is_valid:
            self.drop_graphs("layers or KV stores were dropped after the graphs were captured")
            return None
        try:
            return work(self.graphs)
        except graphs.CaptureError as error:
            self.drop_graphs(f"capturing failed: {error}")
            return None

    def _askable_exits(self) -> tuple[int, ...]:
        """Exits up to the loaded depth whose word a graph may hold: a kernel's of our own.

        Its maps of confidence come to the device here, since nothing does during a capture.
        """
        dims, confidence = self.pool.dims, self.model.confidence
        if not self.model.tells_at_once:
            return ()
        exits = tuple(layer for layer in self.model.exit_layers if layer <= self.model.depth)
        for layer in exits:
            found = confidence.map_of(layer)
            if found is not None:
                found.on(dims.device)
        return exits

    def _pieces(self, first: int, last: int) -> list[tuple[int, int]]:
        """Skipped layers by segment, as graphs fill them; as one where they are not whole ones."""
        segments = () if self.graphs is None else self.graphs.settings.segments
        inside = [piece for piece in segments if first <= piece[0] and piece[1] <= last]
        whole = sum(end - begin for begin, end in inside) == last - first
        return inside if whole else [(first, last)]

    def _new_place(
        self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], longest: int
    ) -> Place:
        rows_, starts_, counts_ = (np.asarray(v, dtype=np.int64) for v in (rows, starts, counts))
        ends = np.cumsum(counts_)
        within = np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - counts_, counts_)
        positions = np.repeat(starts_, counts_) + within
        width = self.pool.context_tokens(longest)
        return Place(
            rows=rows_,
            starts=starts_,
            counts=counts_,
            positions_host=positions,
            addresses_host=self.pool.addresses(np.repeat(rows_, counts_), positions),
            located_host=self.pool.locate(rows_, width),
            context_tokens=width,
            device=self.pool.dims.device,
        )

    def _attend(self, place: Place) -> Attend:
        if place.attend is None:
            place.attend = self._new_attend(place)
        return place.attend

    def _decode_attend(self) -> graphs.DecodeAttends:
        """What makes the attention of one token a row, as graphs may keep it.

        It holds the pool and not the decoder: graphs that held what holds them would outlive both
        while the garbage collector is kept out. Rotary tables are made here: what is made during a
        capture belongs to the graph, and others would read it unwritten.
        """
        rotary = self.rotary() if self.fusion.usable else None
        return partial(decode_attend, self.pool, self.fusion, self.choice, rotary)

    def _decode_writer(self) -> graphs.DecodeWriters:
        """What makes the writer of one token a row, as graphs may keep it."""
        rotary = self.rotary() if self.fusion.usable else None
        return partial(decode_writer, self.pool, self.fusion, rotary)

    def _new_attend(self, place: Place) -> Attend:
        pool, host = self.pool, place.located_host
        located = None if host is None else to_device(host, pool.dims.device)
        if place.is_decode:
            return self._decode_attend()(
                place.addresses, place.positions, located, place.context_tokens
            )
        if self.fusion.usable and self.fusion.flash is not None:
            return fused.extend(
                self.fusion,
                pool,
                place.addresses,
                place.positions,
                self.rotary(),
                place.rows,
                place.starts,
                place.counts,
            )
        if self.choice.varlen is not None and isinstance(pool, PagedPool) and located is not None:
            return varlen.extend_attend(
                self.choice.varlen, pool, place.addresses, place.starts, place.counts, located
            )
        return ExtendAttend(pool, place.addresses, self._spans(place))

    def _spans(self, place: Place) -> list[Span]:
        pool = self.pool
        groups = self.num_heads // pool.dims.kv_heads
        spans, begin = [], 0
        for row, start, count in zip(
            place.rows.tolist(), place.starts.tolist(), place.counts.tolist(), strict=True
        ):
            if start == 0:
                spans.append(Span(begin, count, True))
            else:
                width = pool.context_tokens(start + count)
                where = pool.locate(np.asarray([row], dtype=np.int64), width)
                located = None if where is None else to_device(where, pool.dims.device)
                mask = span_mask(start, count, width, groups, pool)
                spans.append(Span(begin, count, False, located, width, mask))
            begin += count
        return spans


def kernels_of(decoder: Decoder) -> dict[str, str]:
    """Which kernels a decoder may take: "usable" or "not usable", a colon, and why.

    `fusion` are ours for decoding, `flash` is torch's attention for prompts beside them, `telling`
    is ours for an exit's word, and `varlen` torch's over pages, where ours are not.
    """
    fusion, choice, telling = decoder.fusion, decoder.choice, decoder.model.telling
    flash_reason = fusion.flash_reason if fusion.usable else "prompts take it beside our kernels"
    return {
        "fusion": _usable(fusion.usable, fusion.reason),
        "flash": _usable(fusion.usable and fusion.flash is not None, flash_reason),
        "telling": _usable(telling.usable, telling.reason),
        "varlen": _usable(choice.varlen is not None, choice.reason),
    }


def _usable(usable: bool, reason: str) -> str:
    return f"{USABLE if usable else NOT_USABLE}: {reason}"


def decode_attend(
    pool: Pool,
    fusion: fused.Fusion,
    choice: varlen.Choice,
    rotary: launches.Rotary | None,
    addresses: Tensor,
    positions: Tensor,
    located: Tensor | None,
    context_tokens: int,
) -> Attend:
    """Attention of one token a row at `positions` [N], whose rows `located` finds in the pool.

    `context_tokens` bounds what any of the rows holds.
    """
    if fusion.usable:
        return fused.FusedAttend(pool, addresses, positions, located, rotary, fusion.processors)
    if choice.varlen is not None and isinstance(pool, PagedPool) and located is not None:
        return varlen.decode_attend(choice.varlen, pool, addresses, positions, located)
    return DecodeAttend(pool, addresses, positions, located, context_tokens)


def decode_writer(
    pool: Pool,
    fusion: fused.Fusion,
    rotary: launches.Rotary | None,
    addresses: Tensor,
    positions: Tensor,
) -> PoolWriter:
    """What writes keys and values of tokens at `positions` [N] to their `addresses` [N]."""
    if fusion.usable:
        return fused.FusedWriter(pool, addresses, positions, rotary)
    return PoolWriter(pool, addresses)


def slot_pool(model: EarlyExitLM, num_slots: int, max_tokens: int) -> SlotPool:
    """A slot pool for a model's loaded layers."""
    return SlotPool(model.kv_dims, model.depth, num_slots, max_tokens)


def paged_pool(model: EarlyExitLM, num_blocks: int, block_tokens: int) -> PagedPool:
    """A paged pool for a model's loaded layers."""
    return PagedPool(model.kv_dims, model.depth, num_blocks, block_tokens)


def generate(
    decoder: Decoder, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Greedy tokens of prompts served as one batch at the loaded depth; rows are released after.

    Nothing ends early: every prompt gets `num_tokens` tokens.
    """
    pool, model = decoder.pool, decoder.model
    rows = [pool.admit(len(prompt) + num_tokens - 1) for prompt in prompts]
    hidden = decoder.extend(rows, prompts, [0] * len(rows))
    positions = [len(prompt) for prompt in prompts]
    made = [model.decide(model.logits(hidden, model.depth_level)).tokens]
    for _ in range(num_tokens - 1):
        hidden = decoder.begin(rows, made[-1], positions)
        for first, last in decoder.segments():
            hidden = decoder.segment(rows, hidden, positions, first, last)
        made.append(model.decide(model.logits(hidden, model.depth_level)).tokens)
        positions = [position + 1 for position in positions]
    for row in sorted(rows, reverse=True):
        pool.release(row)
    return [[int(token) for token in column] for column in torch.stack(made, dim=1).tolist()]
