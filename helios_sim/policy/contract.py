"""What passes between a host and a policy: snapshots in, decisions out.

A host is the simulator or the real backend. Everything here is data: immutable, without a clock,
holding nothing of the future.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, Protocol

MAX_WINDOW_TOKENS: Final = 10_000_000
"""Tokens in a breach window, at most: a sliding one remembers each of them."""
USUAL_REASSESS_REQUESTS: Final = 150
"""The paper's interval; as far as expectations reach where nobody reassesses."""

Objective = Literal["throughput", "response-time", "energy", "quality", "memory"]


class ExitMode(StrEnum):
    """How a batch treats the exits up to its loaded depth."""

    FULL = "full"
    """No token leaves early."""
    SOLO = "solo"
    """Each token leaves at its own exit; the batch is limited to one request."""
    WAIT = "wait"
    """Each token takes its own exit's word, but the batch runs on to its deepest token."""
    REBATCH = "rebatch"
    """Leavers leave where the DREX inequality says it pays; survivors go on as a new batch."""
    LOADED_DEPTH = "loaded-depth"
    """Every token leaves at the loaded depth, confident or not (HELIOS)."""

    @property
    def leaves_early(self) -> bool:
        """Whether exits before the loaded depth are asked, and tokens leave there."""
        return self in (ExitMode.SOLO, ExitMode.WAIT, ExitMode.REBATCH)


class Event(StrEnum):
    """Why a policy is asked."""

    START = "start"
    EVALUATED = "evaluated"
    BREACHED = "breached"
    REASSESS = "reassess"


@dataclass(frozen=True)
class Slo:
    """Service level objectives that bound a shortlist, in seconds; None where unset."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    itl_s: float | None = None


@dataclass(frozen=True)
class Candidate:
    """What is known of an early-exit model before it serves: from its profile and the hardware.

    Tuples are indexed by exit level (position in `exit_layers`), the last being full depth.
    `batch_limit` counts requests of the workload's typical length whose KV fits beside the
    weights. `decode_iteration_s` and `decode_iteration_j` are predicted at the typical context, for
    each exit level at each of `batches`, which ascend, for rows that leave where the loaded layers
    end; `exiting_iteration_s` and `exiting_iteration_j` for rows that leave there with all layers
    loaded, having been asked at every exit before and filling the KV beyond. They are empty where
    that costs nothing. `prefill_s` is for one typical prompt.
    `typical_tokens` is the typical length itself, prompt and output together, and
    `typical_output_tokens` the output's part of it; 0 where unknown. `reference_batch` is that of a
    replica with little to do. Joules are None where nobody could read the device's energy.
    """

    name: str
    tokenizer: str
    exit_layers: tuple[int, ...]
    weight_bytes: tuple[int, ...]
    kv_bytes_per_token: tuple[int, ...]
    batch_limit: tuple[int, ...]
    batches: tuple[int, ...]
    decode_iteration_s: tuple[tuple[float, ...], ...]
    decode_iteration_j: tuple[tuple[float, ...], ...] | None
    prefill_s: tuple[float, ...]
    reference_batch: int = 1
    typical_tokens: int = 0
    typical_output_tokens: int = 0
    exiting_iteration_s: tuple[tuple[float, ...], ...] = ()
    exiting_iteration_j: tuple[tuple[float, ...], ...] | None = ()

    @property
    def num_layers(self) -> int:
        """Layers of the full model."""
        return self.exit_layers[-1]

    def level_of(self, depth: int) -> int:
        """The exit level whose depth is `depth` layers."""
        if depth not in self.exit_layers:
            raise ValueError(
                f"Model {self.name!r} has no exit after layer {depth}; "
                f"its exits are {list(self.exit_layers)}."
            )
        return self.exit_layers.index(depth)


@dataclass(frozen=True)
class Assignment:
    """What a replica runs: a model, its loaded layers and the way tokens leave."""

    model: str
    depth: int
    exit_mode: ExitMode


@dataclass(frozen=True)
class Pace:
    """How fast tokens were decoded where no prompt ran and no graph was captured, on average.

    `token_s` are the seconds of a token's iteration, `layers` those it ran, `rows` the rows that
    ran with it. Where `rebatch` takes a token on in parts, seconds and layers are those of all.
    """

    token_s: float
    layers: float
    rows: float


@dataclass(frozen=True)
class Telemetry:
    """What a replica saw since its last decision, under one assignment.

    `exit_counts` holds the decoded tokens by the exit level at which they left; TTFT and TPOT
    are means over the requests finished in the period (NaN-free: None without any).
    `nll_nats` is the summed negative log-likelihood of the emitted tokens. `energy_j` is all that
    was drawn, `idle_energy_j` the part of it drawn while no request was there to work on; None
    where no meter was. `pace` is None where nothing was decoded in iterations that do nothing else.
    """

    assignment: Assignment
    duration_s: float
    num_finished: int
    num_tokens: int
    exit_counts: tuple[int, ...]
    executed_layers: int
    num_breaches: int
    nll_nats: float
    mean_ttft_s: float | None
    mean_tpot_s: float | None
    mean_batch: float
    energy_j: float | None
    is_evaluation: bool
    pace: Pace | None = None
    idle_energy_j: float | None = None

    @property
    def working_energy_j(self) -> float | None:
        """Joules without those of waiting for requests, which no decision saves; None if unknown.

        Where nobody told the idle part, all of it.
        """
        if self.energy_j is None:
            return None
        return max(0.0, self.energy_j - (self.idle_energy_j or 0.0))


@dataclass(frozen=True)
class Snapshot:
    """All that a policy may know when it is asked.

    `history` is the Performance History Table: the evaluations of each candidate, oldest first.
    `round_evaluated` names the candidates evaluated since the last reassessment began.
    `load_s` estimates, for each candidate and exit level, the seconds to bring it in from what
    is loaded now. `expected_tokens` is the number of tokens the replica expects to emit until
    the next reassessment, in `USUAL_REASSESS_REQUESTS` requests where there is none. `foresight` is
    filled for a policy that declares `sees_future` and for no other: the true exit shares of the
    coming tokens by candidate.
    """

    now_s: float
    event: Event
    assignment: Assignment | None
    telemetry: Telemetry | None
    candidates: tuple[Candidate, ...]
    history: Mapping[str, tuple[Telemetry, ...]]
    round_evaluated: tuple[str, ...]
    load_s: Mapping[str, tuple[float, ...]]
    num_waiting: int
    num_running: int
    max_batch: int
    expected_tokens: float
    slo: Slo = field(default_factory=Slo)
    foresight: Mapping[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Keep:
    """Go on as before."""

    reason: str


@dataclass(frozen=True)
class Evaluate:
    """Bring `model` in at full depth and let it serve `num_requests` with its exits active."""

    model: str
    num_requests: int
    exit_mode: ExitMode
    reason: str


@dataclass(frozen=True)
class Serve:
    """Serve with `model` loaded to `depth` layers."""

    model: str
    depth: int
    exit_mode: ExitMode
    reason: str


@dataclass(frozen=True)
class LoadLayers:
    """Load more layers of the model that is serving, up to `depth`."""

    depth: int
    exit_mode: ExitMode
    reason: str


@dataclass(frozen=True)
class Switch:
    """Replace the serving model by another candidate loaded to `depth` layers."""

    model: str
    depth: int
    exit_mode: ExitMode
    reason: str


Decision = Keep | Evaluate | Serve | LoadLayers | Switch

DECISION_NAMES: Final = {
    Keep: "keep",
    Evaluate: "evaluate",
    Serve: "serve",
    LoadLayers: "load-layers",
    Switch: "switch",
}
"""What decisions are called in a run's log."""


WindowKind = Literal["tumbling", "sliding"]


@dataclass(frozen=True)
class Watching:
    """When a policy wants to be asked while it serves, and by which rule breaches count.

    `reassess_requests` counts requests finished since the last evaluation, without those that
    finish while a decision is carried out (drained, or served beside a load): the larger the batch
    and the more decisions change what runs, the longer a round is. None never asks.
    `breach_window_tokens` None never watches breaches.
    """

    reassess_requests: int | None = None
    breach_window_tokens: int | None = None
    breach_limit: int = 0
    window_kind: WindowKind = "tumbling"


class Policy(Protocol):
    """One decision function on a frozen snapshot; a policy performs nothing and keeps no state.

    `sees_future` asks the host for `Snapshot.foresight`, which no real host has.
    """

    name: str
    sees_future: bool

    @property
    def watching(self) -> Watching:
        """When the host should ask again."""
        ...

    @property
    def confidence_threshold(self) -> float | None:
        """The confidence at which tokens leave; None takes the profile's own."""
        ...

    def decide(self, snapshot: Snapshot) -> Decision:
        """What to do now."""
        ...
