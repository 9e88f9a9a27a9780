"""The arithmetic of an iteration on a real model: rows over its KV pool, exit by exit."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.device import dtype_name
from calibration.model.decode import Decoder, Place
from calibration.model.early_exit import EarlyExitLM
from calibration.model.kv import Pool, to_device
from calibration.serving.batching import Row
from calibration.serving.iteration import NOTHING_CAPTURED, Answer, Captures
from helios_sim.errors import InputError


class ModelMachine:
    """One model at one loaded depth over one pool: the `Machine` of `iteration.py`.

    Teacher-forced, a row is fed its true text; free-running, the tokens it emitted. A row's place
    in the pool is `row.slot`, and `occupants` are the rows by it. A batch that runs whole is read
    in place where there are no gaps between its places: new rows fill those that rows left, and
    what is left of them is closed before the next decode.
    """

    def __init__(
        self, model: EarlyExitLM, pool: Pool, decoder: Decoder, *, depth: int, free_running: bool
    ) -> None:
        self.model = model
        self.pool = pool
        self.decoder = decoder
        self.depth = depth
        self.free_running = free_running
        self.exit_layers = model.exit_layers
        self.occupants: list[Row | None] = []
        """None where a row left its place and nobody came."""
        self._gaps: list[int] = []
        """Those places, ascending; the last place is never one."""
        self._place: Place | None = None
        self._hidden: Tensor | None = None
        self._layer = 0
        self._order: list[Row] = []
        self._wanted: list[int] = []

    @property
    def max_rows(self) -> int:
        """Requests that the pool holds at once."""
        return self.pool.max_rows

    @property
    def captures(self) -> Captures:
        """What it has captured so far."""
        graphs = self.decoder.graphs
        if graphs is None:
            return NOTHING_CAPTURED
        exits = graphs.num_exits
        return Captures(graphs.num_graphs - exits, exits, graphs.ran_layers, graphs.filled_layers)

    def prefill(self, rows: Sequence[Row]) -> None:
        """Take new rows in and run all their tokens through the loaded layers."""
        for row in rows:
            self._take_in(row)
        prompts = [self._prompt(row) for row in rows]
        self._start(rows, (), [0] * len(rows), list(map(len, prompts)), np.concatenate(prompts))
        self._run(self.depth)

    def begin(self, rows: Sequence[Row], passed: int, ghosts: Sequence[Row]) -> None:
        """Start a decode with the rows' last tokens, or go on from after the exit they passed."""
        self._close_gaps()
        for ghost in ghosts:
            self._keep_one_token(ghost)
        fed = {row: row.context for row in rows}
        # A row that is done is computed again at its first place, since it has no other any more.
        fed |= dict.fromkeys(ghosts, 0)
        order = sorted(fed, key=lambda row: row.slot)
        starts = [fed[row] for row in order]
        if passed == 0:
            ids = [self._tokens(row, fed[row], fed[row] + 1)[0] for row in order]
            self._start(order, rows, starts, [1] * len(order), ids)
            return
        self._arrange(order, rows)
        self._place = self._place_of(order, starts)
        self._hidden = torch.stack([row.hidden for row in order])
        self._layer = self.exit_layers[passed - 1]

    def begin_again(self, rows: Sequence[Row]) -> None:
        """Start a decode that feeds each row's pending tokens again before its last token."""
        self._close_gaps()
        order = sorted(rows, key=lambda row: row.slot)
        starts = [row.context - row.pending for row in order]
        ids = [
            self._tokens(row, start, row.context + 1)
            for row, start in zip(order, starts, strict=True)
        ]
        packed = [token for one in ids for token in one]
        self._start(order, rows, starts, list(map(len, ids)), packed)

    def run_to(self, level: int) -> None:
        """Run the layers from where the rows stand to the exit, segment by segment."""
        self._run(self.exit_layers[level])

    def read(self, level: int) -> list[Answer]:
        """What the exit's head says of each row, fetched from the device at once.

        Raises InputError where it says what is no number.
        """
        assert self._place is not None and self._hidden is not None
        said = self.decoder.tell(self._place, self._hidden, level)
        tokens, confidences, nlls = said.cpu().tolist()
        # What is no number would be confined below to a confidence and to nats like any other.
        rows = len(self._order)
        if not math.isfinite(sum(confidences[:rows]) + sum(nlls[:rows])):
            raise self._not_finite(level)
        shares = map(min, repeat(1.0), map(max, repeat(0.0), confidences))
        found = list(map(Answer, map(int, tokens), shares, map(max, repeat(0.0), nlls)))
        if self._wanted == list(range(len(found))):
            return found
        return [found[place] for place in self._wanted]

    def fill(self, rows: Sequence[Row], level: int) -> None:
        """Fill the KV of the layers beyond the exit for these rows, from where they stand."""
        assert self._place is not None and self._hidden is not None
        first = self.exit_layers[level]
        if len(rows) == len(self._wanted):
            self.decoder.fill_place(self._place, self._hidden, first, self.depth)
            return
        wanted = set(rows)
        places = [place for place, row in enumerate(self._order) if row in wanted]
        chosen = to_device(np.asarray(places, dtype=np.int64), self._hidden.device)
        hidden = self._hidden.index_select(0, chosen)
        leaving = [self._order[place] for place in places]
        self.decoder.fill(
            [row.slot for row in leaving],
            hidden,
            [row.context for row in leaving],
            first,
            self.depth,
        )

    def hold(self, rows: Sequence[Row]) -> None:
        """Keep where these rows stand, to go on from later."""
        assert self._hidden is not None
        for row in self._order:
            row.hidden = None
        if not rows:
            return
        staying = set(rows)
        places = [place for place, row in enumerate(self._order) if row in staying]
        chosen = to_device(np.asarray(places, dtype=np.int64), self._hidden.device)
        kept = self._hidden.index_select(0, chosen)
        for place, hidden in zip(places, kept, strict=True):
            self._order[place].hidden = hidden

    def release(self, row: Row) -> None:
        """Give a row's tokens in the pool back; its place may stay as a gap until the next decode.

        Closing the gap copies the last row's tokens, which is for nothing where a new row comes.
        """
        self.pool.vacate(row.slot)
        self.occupants[row.slot] = None
        insort(self._gaps, row.slot)
        self._drop_last_gaps()
        row.slot = -1
        row.hidden = None

    def _not_finite(self, level: int) -> InputError:
        dtype = self.model.dtype
        remedy = (
            "measure and serve it in bfloat16 or float32, which hold larger numbers"
            if dtype == torch.float16
            else "its weights are not sound, so serve another checkpoint"
        )
        return InputError(
            f"The logits of {self.model.spec.name!r} at the exit of layer "
            f"{self.exit_layers[level]} are not finite in {dtype_name(dtype)}; {remedy}."
        )

    def _take_in(self, row: Row) -> None:
        """Give a new row the first gap, or a place behind all others."""
        if not self._gaps:
            row.slot = self.pool.admit(row.to_prefill)
            self.occupants.append(row)
            return
        self.pool.reserve(self._gaps[0], row.to_prefill)
        row.slot = self._gaps.pop(0)
        self.occupants[row.slot] = row

    def _keep_one_token(self, ghost: Row) -> None:
        """Leave the room of all but one token of a row that is done to those who are not."""
        if self.pool.lengths[ghost.slot] > 1:
            self.pool.vacate(ghost.slot)
            self.pool.reserve(ghost.slot, 1)

    def _close_gaps(self) -> None:
        """Let the last rows move into the gaps."""
        while self._gaps:
            gap = self._gaps.pop(0)
            self.pool.release(gap)
            last = self.occupants.pop()
            assert last is not None
            self.occupants[gap] = last
            last.slot = gap
            self._drop_last_gaps()

    def _drop_last_gaps(self) -> None:
        """Release the gaps behind the last row, which moves nobody."""
        while self.occupants and self.occupants[-1] is None:
            self.pool.release(self._gaps.pop())
            self.occupants.pop()

    def _tokens(self, row: Row, start: int, stop: int) -> list[int]:
        life = row.life
        if not self.free_running:
            return life.text[start:stop]
        prompt = life.prompt_tokens
        if start >= prompt:
            return life.emitted[start - prompt : stop - prompt]
        return (life.text[:prompt] + life.emitted)[start:stop]

    def _prompt(self, row: Row) -> NDArray[np.int64]:
        """The tokens that a new row is fed."""
        if not self.free_running:
            return row.life.ids[: row.to_prefill]
        return np.asarray(self._tokens(row, 0, row.to_prefill), dtype=np.int64)

    def _start(
        self,
        order: Sequence[Row],
        wanted: Sequence[Row],
        starts: list[int],
        counts: list[int],
        packed: list[int] | NDArray[np.int64],
    ) -> None:
        self._arrange(order, wanted or order)
        self._place = self._place_of(order, starts, counts)
        self._hidden = self.decoder.embed(self._place, packed)
        self._layer = 0

    def _arrange(self, order: Sequence[Row], wanted: Sequence[Row]) -> None:
        """Remember how the rows stand in the tensors."""
        self._order = list(order)
        places = {row: place for place, row in enumerate(order)}
        self._wanted = [places[row] for row in wanted]

    def _place_of(
        self, order: Sequence[Row], starts: list[int], counts: list[int] | None = None
    ) -> Place:
        """Where the rows' tokens go, with the true tokens that come next."""
        targets = None
        if not self.free_running:
            # A row that is done has no next token; any will do, since nobody reads it.
            lives = [row.life for row in order]
            targets = [one.text[min(one.num_tokens, len(one.text) - 1)] for one in lives]
        place = self.decoder.place([row.slot for row in order], starts, counts, targets)
        # Prompts of one token are prefilled as all others are; only a row that is done begins anew
        # in a decode.
        place.by_graphs = max(starts) > 0
        return place

    def _run(self, last: int) -> None:
        """Run to a layer by the segments between exits, which is how graphs are captured."""
        assert self._place is not None and self._hidden is not None
        for layer in (*self.exit_layers, last):
            if self._layer < layer <= last:
                self._hidden = self.decoder.run(self._place, self._hidden, self._layer, layer)
                self._layer = layer
