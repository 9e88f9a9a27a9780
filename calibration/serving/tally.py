"""What a real run adds up to while it is served: sums, samples, and a log of iterations and tokens.

While it runs only what a policy may ask is summed up; the rest is kept as it came and taken apart
afterwards, so that keeping it costs the run next to nothing. `helios_sim.runs.records` has the
meaning of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from calibration.serving.batching import Life
from calibration.serving.iteration import NOTHING_CAPTURED, Answer, Outcome
from helios_sim.loop.state import (
    ITL_BINS_PER_OCTAVE,
    ITL_OCTAVES,
    ITL_SMALLEST_EXPONENT,
    NLL_UNITS_PER_NAT,
    TIMELINE_CAPACITY,
)
from helios_sim.policy.contract import Assignment
from helios_sim.steward import PaceSums

Spent = Literal["busy", "idle", "load"]


@dataclass(frozen=True)
class Sample:
    """A line of the timeline; `batch_seconds`, `tokens` and `breaches` are running sums."""

    time_s: float
    batch_seconds: float
    tokens: int
    breaches: int
    waiting: int
    used_blocks: int
    pool_blocks: int
    model: str
    depth: int
    state: str


@dataclass(frozen=True)
class IterationEntry:
    """An iteration in the log; `breached` goes by the tokens that it emitted.

    `host_s` of its seconds went into planning it and keeping books.
    """

    start_s: float
    end_s: float
    seconds: float
    host_s: float
    assignment: Assignment
    evaluating: bool
    is_prefill: bool
    running: int
    outcome: Outcome
    breached: tuple[bool, ...]


class TokenEntry(NamedTuple):
    """A token in the log; `place` counts its request's tokens from 0."""

    request_id: int
    place: int
    time_s: float
    model: str
    depth: int
    level: int
    prefilled: bool
    token: int
    confidence: float
    nll_nats: float
    breached: bool


class RequestSums(NamedTuple):
    """Sums over the tokens of each request, by its number.

    Decoded are the tokens that a prefill did not emit, and theirs are the executed layers;
    `nll_units` are negative log-likelihoods in steps of 1/1024 nat.
    """

    decoded: list[int]
    executed_layers: list[int]
    nll_units: list[int]
    breaches: list[int]


@dataclass
class Tally:
    """Running sums of one replica; the books of its time are closed interval by interval."""

    timeline_interval_s: float
    booked_s: float = 0.0
    spent_s: dict[Spent, float] = field(
        default_factory=lambda: {"busy": 0.0, "idle": 0.0, "load": 0.0}
    )
    spans: list[tuple[Spent, float, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    iterations: list[IterationEntry] = field(default_factory=list)
    next_sample_s: float = 0.0
    num_tokens: int = 0
    num_finished: int = 0
    num_breaches: int = 0
    num_iterations: int = 0
    num_decode_iterations: int = 0
    decode_rows: int = 0
    decode_s: float = 0.0
    paced: PaceSums = field(default_factory=PaceSums)
    nll_units: int = 0
    executed_layers: int = 0
    batch_seconds: float = 0.0
    kv_block_seconds: float = 0.0
    exit_counts: dict[str, list[int]] = field(default_factory=dict)
    ttft_sum_s: float = 0.0
    tpot_sum_s: float = 0.0
    period_finished: int = 0
    period_tpots: int = 0
    drain_s: float = 0.0

    def book(self, spent: Spent, until_s: float) -> float:
        """Book the time since the last entry; returns its seconds."""
        seconds = until_s - self.booked_s
        self.spent_s[spent] += seconds
        if spent != "busy" and seconds > 0.0:
            self.spans.append((spent, self.booked_s, until_s))
        self.booked_s = until_s
        return seconds

    def count_iteration(self, entry: IterationEntry, used_blocks: int) -> None:
        """Add an iteration and its tokens."""
        outcome, emitted = entry.outcome, entry.outcome.emitted
        self.num_iterations += 1
        self.batch_seconds += entry.seconds * entry.running
        self.kv_block_seconds += entry.seconds * used_blocks
        self.iterations.append(entry)
        self.num_tokens += len(emitted)
        self.num_breaches += sum(entry.breached)
        self.nll_units += sum([nll_units(one.answer) for one in emitted])
        if entry.is_prefill:
            return
        self.num_decode_iterations += 1
        self.decode_rows += outcome.rows
        self.decode_s += entry.seconds
        # Once it is chosen, a candidate serves without what it captured while it was evaluated.
        if outcome.captured == NOTHING_CAPTURED:
            self.paced = paced(self.paced, entry)
        self.executed_layers += outcome.layers * len(emitted)
        levels = self.exit_counts[entry.assignment.model]
        for one in emitted:
            levels[one.level] += 1

    @property
    def tokens(self) -> list[TokenEntry]:
        """Every emitted token, in order of emission."""
        told: dict[int, int] = {}
        entries = []
        for entry in self.iterations:
            served = entry.assignment
            for one, breached in zip(entry.outcome.emitted, entry.breached, strict=True):
                request, answer = one.row.life.request_id, one.answer
                place = told.get(request, 0)
                told[request] = place + 1
                entries.append(
                    TokenEntry(
                        request,
                        place,
                        entry.end_s,
                        served.model,
                        served.depth,
                        one.level,
                        entry.is_prefill,
                        answer.token,
                        answer.confidence,
                        answer.nll_nats,
                        breached,
                    )
                )
        return entries

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between a request's tokens, in order of emission."""
        last_s: dict[int, float] = {}
        gaps_s = []
        for entry in self.iterations:
            for one in entry.outcome.emitted:
                request = one.row.life.request_id
                if request in last_s:
                    gaps_s.append(entry.end_s - last_s[request])
                last_s[request] = entry.end_s
        return gaps_s

    def request_sums(self, num_requests: int) -> RequestSums:
        """What the tokens of each request add up to."""
        sums = RequestSums(*([0] * num_requests for _ in RequestSums._fields))
        for entry in self.iterations:
            for one, breached in zip(entry.outcome.emitted, entry.breached, strict=True):
                request = one.row.life.request_id
                sums.nll_units[request] += nll_units(one.answer)
                sums.breaches[request] += breached
                if not entry.is_prefill:
                    sums.decoded[request] += 1
                    sums.executed_layers[request] += entry.outcome.layers
        return sums

    def count_finished(self, life: Life, now_s: float) -> None:
        """Add a finished request to the period's means."""
        assert life.first_token_s is not None
        self.num_finished += 1
        self.period_finished += 1
        self.ttft_sum_s += life.first_token_s - life.arrival_s
        if life.output_tokens > 1:
            self.period_tpots += 1
            self.tpot_sum_s += (now_s - life.first_token_s) / (life.output_tokens - 1)

    def clear_period(self) -> None:
        """Begin the means of a new period."""
        self.ttft_sum_s = self.tpot_sum_s = 0.0
        self.period_finished = self.period_tpots = 0

    def sample(self, line: Sample) -> None:
        """Write a line of the timeline, halving its resolution when it is full."""
        if len(self.samples) == TIMELINE_CAPACITY:
            self.samples = self.samples[1::2]
            self.timeline_interval_s *= 2.0
        self.samples.append(line)
        ticks = math.floor(line.time_s / self.timeline_interval_s)
        self.next_sample_s = (ticks + 1.0) * self.timeline_interval_s


def paced(sums: PaceSums, entry: IterationEntry) -> PaceSums:
    """The pace of decoding with an iteration added to it."""
    outcome = entry.outcome
    rows = outcome.rows
    return PaceSums(
        sums.tokens + len(outcome.emitted),
        sums.rows + rows,
        sums.row_s + rows * entry.seconds,
        sums.row_layers + rows * (outcome.layers - outcome.first_layer),
        sums.row_rows + rows * (rows + outcome.ghosts),
    )


def nll_units(answer: Answer) -> int:
    """A token's negative log-likelihood in steps of 1/1024 nat."""
    return round(answer.nll_nats * NLL_UNITS_PER_NAT)


def gap_counts(gaps_s: Sequence[float]) -> tuple[int, ...]:
    """How many gaps fall into each bin; those beyond the edges are in the outer ones."""
    num_bins = ITL_OCTAVES * ITL_BINS_PER_OCTAVE
    mantissa, exponent = np.frexp(np.array(gaps_s, dtype=np.float64))
    steps = ((mantissa - 0.5) * 2.0 * ITL_BINS_PER_OCTAVE).astype(np.int64)
    places = (exponent.astype(np.int64) - ITL_SMALLEST_EXPONENT) * ITL_BINS_PER_OCTAVE + steps
    places = np.where(np.array(gaps_s) > 0.0, np.clip(places, 0, num_bins - 1), 0)
    return tuple(int(count) for count in np.bincount(places, minlength=num_bins))
