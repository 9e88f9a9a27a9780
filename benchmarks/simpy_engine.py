"""The floor's loop as a plain SimPy model: one event an iteration, nothing compiled.

It is how such a simulator is usually written first, and serves the same requests at the same
times as the floor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from benchmarks.floor import FloorWork, decode_seconds, prefill_seconds

Process = Generator[simpy.Event, Any, None]


@dataclass
class _Row:
    """A running request."""

    request: int
    place: int
    remaining: int


class _Server:
    """One replica and the queue before it."""

    def __init__(self, env: simpy.Environment, work: FloorWork) -> None:
        self.env = env
        self.max_batch = work.max_batch
        self.max_prefill_tokens = work.max_prefill_tokens
        # Plain lists are what plain Python reads fastest.
        self.arrival_s: list[float] = work.arrival_s.tolist()
        self.prompt: list[int] = work.prompt_tokens.tolist()
        self.output: list[int] = work.output_tokens.tolist()
        self.place: list[int] = work.place.tolist()
        self.leaving_level: list[int] = work.leaving_level.tolist()
        self.exit_layers: list[int] = work.exit_layers.tolist()
        self.coefficients: list[float] = work.coefficients.tolist()
        self.finished_s = [float("nan")] * len(self.arrival_s)
        self.waiting: deque[int] = deque()
        self.rows: list[_Row] = []
        self.woken = env.event()

    def arrive(self) -> Process:
        """Requests join the queue at their times."""
        for request, arrival_s in enumerate(self.arrival_s):
            yield self.env.timeout(max(0.0, arrival_s - self.env.now))
            self.waiting.append(request)
            if not self.woken.triggered:
                self.woken.succeed()

    def serve(self) -> Process:
        """Prompts first, then one token of every running request, and again."""
        while True:
            joined = self.admit()
            if joined:
                lengths = [self.prompt[row.request] for row in joined]
                pairs = sum(n * (n + 1) / 2 for n in lengths)
                seconds = prefill_seconds(
                    self.coefficients, self.exit_layers[-1], len(joined), sum(lengths), pairs
                )
            elif self.rows:
                deepest = max(self.leaving_level[row.place] for row in self.rows)
                seconds = decode_seconds(
                    self.coefficients, self.exit_layers, deepest, len(self.rows), self.context()
                )
            else:
                self.woken = self.env.event()
                yield self.woken
                continue
            yield self.env.timeout(seconds)
            for row in joined or self.rows:
                self.emit(row)
            self.rows = [row for row in self.rows if row.remaining]

    def admit(self) -> list[_Row]:
        """The head of the queue, up to the batch's size and the tokens of one prefill."""
        joined: list[_Row] = []
        tokens = 0
        while self.waiting and len(self.rows) < self.max_batch:
            request = self.waiting[0]
            tokens += self.prompt[request]
            if joined and tokens > self.max_prefill_tokens:
                break
            self.waiting.popleft()
            row = _Row(request, self.place[request], self.output[request])
            self.rows.append(row)
            joined.append(row)
        return joined

    def context(self) -> float:
        """KV tokens that a decode reads, those it writes included."""
        return float(
            sum(
                self.prompt[row.request] + self.output[row.request] - row.remaining
                for row in self.rows
            )
        )

    def emit(self, row: _Row) -> None:
        """One token of a row."""
        row.remaining -= 1
        row.place = (row.place + 1) % len(self.leaving_level)
        if not row.remaining:
            self.finished_s[row.request] = self.env.now


def run_simpy(work: FloorWork) -> list[float]:
    """When each request finishes."""
    env = simpy.Environment()
    server = _Server(env, work)
    env.process(server.arrive())
    env.process(server.serve())
    env.run()
    return server.finished_s
