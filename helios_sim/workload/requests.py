"""The requests of a run: arrivals, lengths and domains become columns, one row a request."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator
from scipy.special import ndtri

from helios_sim.errors import InputError, did_you_mean
from helios_sim.settings.strict import Numbers, Pairs, StrictSettings, as_tuple
from helios_sim.streams import Floats, stream
from helios_sim.workload.arrivals import (
    MAX_REQUESTS,
    ArrivalSettings,
    ClosedArrivals,
    TraceArrivals,
    closed_arrivals,
    open_arrivals,
)
from helios_sim.workload.trace import MAX_TOKENS, Trace, TraceSettings
from helios_sim.workload.traces import read_trace

OverContext = Literal["refuse", "truncate", "error"]

MAX_SPAN_S = 1e9
"""Arrivals later than this would lose their nanoseconds."""

Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
TokenMean = Annotated[float, Field(ge=1, le=1e8)]
TokenList = Annotated[tuple[Tokens, ...], BeforeValidator(as_tuple)]

_Z90 = 1.2815515655446004
"""The standard normal distribution's 90th percentile."""


@dataclass(frozen=True)
class Requests:
    """Columns of requests in order of arrival; what an engine knows of a workload.

    `arrival_s` counts from the start of the run. `domain` indexes `domains`. `trace_start` is a
    31-bit hash of seed and row, taken modulo the exit trace's length by the engine (or the place
    itself, when a run is replayed). `num_users` is there in a closed loop only: `arrival_s` is then
    when a user starts in the first `num_users` rows, one a user. The others are sent in their order
    by whichever user has been answered, and `arrival_s` is how long that user thinks before it.
    `num_dropped` counts trace rows that are no requests, `skipped` those that cannot be used, by
    what is wrong with them. `replays_text` says that requests have the text that
    they had in another run, whatever the seed.
    """

    arrival_s: Floats
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    domain: NDArray[np.int16]
    trace_start: NDArray[np.int32]
    domains: tuple[str, ...]
    num_users: int | None = None
    num_dropped: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    replays_text: bool = False

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Seconds from the run's start to the last arrival; 0 in a closed loop, which has none."""
        return float(self.arrival_s[-1]) if len(self) and self.num_users is None else 0.0

    @property
    def left_out(self) -> dict[str, Any]:
        """What a summary says of the rows of a trace that are not among the requests."""
        skipped = {"skipped_rows": dict(self.skipped)} if self.skipped else {}
        return {"num_dropped": self.num_dropped, **skipped}

    @property
    def mean_prompt_tokens(self) -> float:
        """Prompt tokens of a request, on average."""
        return float(self.prompt_tokens.mean())

    @property
    def mean_output_tokens(self) -> float:
        """Output tokens of a request, on average."""
        return float(self.output_tokens.mean())


class _Clamped(StrictSettings):
    """Lengths outside the two bounds take the nearer bound."""

    min_tokens: Tokens = 1
    max_tokens: Tokens | None = None

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} but min_tokens is {self.min_tokens}; "
                "max_tokens must be at least min_tokens."
            )
        return self

    def clamp(self, tokens: Floats | NDArray[np.int32]) -> NDArray[np.int32]:
        """Whole token counts within the bounds."""
        highest = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return np.clip(tokens, self.min_tokens, highest).astype(np.int32)


class ConstantTokens(_Clamped):
    """Every length the same."""

    kind: Literal["constant"]
    tokens: Tokens

    def quantile(self, uniforms: Floats, base_dir: Path) -> Floats:
        """Lengths by inverse transform."""
        return np.full(uniforms.size, float(self.tokens))


class UniformTokens(_Clamped):
    """Whole numbers from `min_tokens` to `max_tokens`, both included, equally likely."""

    kind: Literal["uniform"]
    min_tokens: Tokens
    max_tokens: Tokens

    def quantile(self, uniforms: Floats, base_dir: Path) -> Floats:
        """Lengths by inverse transform."""
        return np.floor(self.min_tokens + uniforms * (self.max_tokens - self.min_tokens + 1))


class LognormalTokens(_Clamped):
    """Lognormal lengths, by median or mean and sigma, or by two percentiles."""

    kind: Literal["lognormal"]
    median_tokens: TokenMean | None = None
    mean_tokens: TokenMean | None = None
    sigma: Annotated[float | None, Field(ge=0, le=5)] = None
    p50_tokens: TokenMean | None = None
    p90_tokens: TokenMean | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.model_dump(exclude_none=True).keys() - {"kind", "min_tokens", "max_tokens"}
        if given not in (
            {"median_tokens", "sigma"},
            {"mean_tokens", "sigma"},
            {"p50_tokens", "p90_tokens"},
        ):
            raise ValueError(
                f"The lognormal was given by {', '.join(sorted(given)) or 'nothing'}; allowed are "
                "median_tokens and sigma, mean_tokens and sigma, or p50_tokens and p90_tokens."
            )
        if self.p50_tokens and self.p90_tokens and self.p90_tokens < self.p50_tokens:
            raise ValueError(
                f"p90_tokens is {self.p90_tokens:g} but p50_tokens is {self.p50_tokens:g}; "
                "p90_tokens must be at least p50_tokens."
            )
        return self

    def quantile(self, uniforms: Floats, base_dir: Path) -> Floats:
        """Lengths by inverse transform."""
        if self.p50_tokens is not None and self.p90_tokens is not None:
            median, sigma = self.p50_tokens, math.log(self.p90_tokens / self.p50_tokens) / _Z90
        else:
            sigma = self.sigma or 0.0
            # The mean lies above the median by exp(sigma^2 / 2).
            median = self.median_tokens or (self.mean_tokens or 1.0) / math.exp(sigma * sigma / 2)
        normal = np.asarray(ndtri(np.maximum(uniforms, 2.0**-54)), dtype=np.float64)
        return np.round(median * np.exp(sigma * normal))


class GeometricTokens(_Clamped):
    """Geometric lengths from 1 on: each further token is as likely as the one before."""

    kind: Literal["geometric"]
    mean_tokens: TokenMean

    def quantile(self, uniforms: Floats, base_dir: Path) -> Floats:
        """Lengths by inverse transform."""
        if self.mean_tokens == 1:
            return np.ones(uniforms.size)
        return 1 + np.floor(np.log1p(-uniforms) / math.log1p(-1 / self.mean_tokens))


class CdfTokens(_Clamped):
    """An empirical distribution [[tokens, share up to it], ...], from a file or in place.

    Between points the share rises in a straight line, from 0 tokens and 0 on.
    """

    kind: Literal["cdf"]
    file: str | None = None
    points: Pairs | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.file is None) == (self.points is None):
            raise ValueError("A cdf needs exactly one of file and points.")
        if self.points is not None and (fault := _cdf_fault(self.points)):
            raise ValueError(fault)
        return self

    def quantile(self, uniforms: Floats, base_dir: Path) -> Floats:
        """Lengths by inverse transform."""
        points = self.points if self.file is None else read_cdf(base_dir / self.file)
        tokens = np.array([0.0] + [point[0] for point in points or ()])
        share = np.array([0.0] + [point[1] for point in points or ()])
        # The piece whose upper share is the first above u: pieces of no share are never met.
        piece = np.minimum(np.searchsorted(share, uniforms, side="right"), share.size - 1)
        low, high = share[piece - 1], share[piece]
        into = (uniforms - low) / (high - low)
        lengths: Floats = np.ceil(tokens[piece - 1] + into * (tokens[piece] - tokens[piece - 1]))
        return lengths


class ValueTokens(_Clamped):
    """A list of lengths, drawn with the given weights or all alike."""

    kind: Literal["values"]
    values: Annotated[TokenList, Field(min_length=1)]
    weights: Numbers | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is None:
            return self
        if len(self.weights) != len(self.values):
            raise ValueError(
                f"{len(self.weights)} weights were given for {len(self.values)} values; "
                "each value needs one."
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(
                f"The weights are {list(self.weights)}; none may be negative and at least one "
                "must be positive."
            )
        return self

    def quantile(self, uniforms: Floats, base_dir: Path) -> Floats:
        """Lengths by inverse transform."""
        weights = np.ones(len(self.values)) if self.weights is None else np.array(self.weights)
        cumulative = np.cumsum(weights)
        place = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
        values = np.array(self.values, dtype=np.float64)
        drawn: Floats = values[np.minimum(place, weights.size - 1)]
        return drawn


class TraceTokens(_Clamped):
    """The lengths of the workload's trace."""

    kind: Literal["trace"]


SampledTokens = (
    ConstantTokens | UniformTokens | LognormalTokens | GeometricTokens | CdfTokens | ValueTokens
)
TotalSettings = Annotated[SampledTokens, Field(discriminator="kind")]
LengthSettings = Annotated[SampledTokens | TraceTokens, Field(discriminator="kind")]


class DomainSettings(StrictSettings):
    """One domain of text and its share of the requests, fixed or drifting.

    Shares are relative: at every time the mix is divided by its sum. Between the points of
    `shares` ([at_s, share]) a share changes in a straight line; outside it stays.
    """

    name: Annotated[str, Field(min_length=1)]
    share: Annotated[float | None, Field(ge=0, le=1e6)] = None
    shares: Pairs | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.share is None) == (self.shares is None):
            raise ValueError(f"Domain {self.name!r} needs exactly one of share and shares.")
        if self.shares is not None:
            times = [at_s for at_s, _ in self.shares]
            if not times or any(b <= a for a, b in pairwise(times)):
                raise ValueError(
                    f"The shares of domain {self.name!r} are given at {times} s; at least one "
                    "time is needed, and times must be strictly ascending."
                )
            for at_s, share in self.shares:
                if share < 0:
                    raise ValueError(
                        f"The share of domain {self.name!r} at {at_s:g} s is {share:g}; "
                        "it must be 0 or more."
                    )
        return self

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The share over time; a fixed share is a single point."""
        return ((0.0, self.share or 0.0),) if self.shares is None else self.shares

    def share_at(self, time_s: Floats) -> Floats:
        """The share, not yet divided by the sum of all, at each time."""
        times, shares = zip(*self.points, strict=True)
        return np.asarray(np.interp(time_s, times, shares), dtype=np.float64)


class WorkloadSettings(StrictSettings):
    """The `[workload]` table of a scenario.

    With a trace, arrivals and lengths are the trace's unless given. Trace lengths under other
    arrivals are taken row by row from `first_trace_row` on (from the top again at the end) or,
    with `trace_rows = "random"`, drawn by row, so that a prompt keeps its output.
    """

    arrivals: ArrivalSettings | None = None
    num_requests: Annotated[int | None, Field(ge=1, le=MAX_REQUESTS)] = None
    duration_s: Annotated[float | None, Field(gt=0, le=1e9)] = None
    prompt: LengthSettings | None = None
    output: LengthSettings | None = None
    total: TotalSettings | None = None
    prompt_share: Annotated[float | None, Field(gt=0, lt=1)] = None
    trace: TraceSettings | None = None
    trace_rows: Literal["in-order", "random"] = "in-order"
    first_trace_row: Annotated[int | None, Field(ge=0, lt=MAX_REQUESTS)] = None
    domains: Annotated[tuple[DomainSettings, ...], BeforeValidator(as_tuple)] = ()
    block_requests: Annotated[int, Field(ge=1, le=MAX_REQUESTS)] = 1
    over_context: OverContext = "refuse"
    context_tokens: Annotated[int | None, Field(ge=2, le=2**31 - 1)] = None

    @property
    def replays_arrivals(self) -> bool:
        """Whether requests arrive when the trace's did."""
        return isinstance(self.arrivals, TraceArrivals) or self.arrivals is None

    @property
    def takes_rows_in_order(self) -> bool:
        """Whether other arrivals take their lengths from the trace row by row."""
        return (
            self.trace is not None and not self.replays_arrivals and self.trace_rows == "in-order"
        )

    @property
    def prompt_lengths(self) -> SampledTokens | TraceTokens:
        """The prompt's lengths, the trace's by default."""
        return TraceTokens(kind="trace") if self.prompt is None else self.prompt

    @property
    def output_lengths(self) -> SampledTokens | TraceTokens:
        """The output's lengths, the trace's by default."""
        return TraceTokens(kind="trace") if self.output is None else self.output

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.context_tokens is not None and self.over_context != "truncate":
            raise ValueError(
                "context_tokens says to how many tokens longer requests are shortened, and "
                f'over_context is "{self.over_context}"; give over_context = "truncate".'
            )
        self._check_trace()
        self._check_lengths()
        self._check_size()
        self._check_domains()
        return self

    def _check_trace(self) -> None:
        if self.first_trace_row is not None and not self.takes_rows_in_order:
            raise ValueError(
                f"first_trace_row is {self.first_trace_row}, but no lengths are taken from a trace "
                "in order; leave it out, or give lengths from a trace to arrivals of another kind "
                'with trace_rows = "in-order".'
            )
        wants_lengths = self.total is None and (
            isinstance(self.prompt_lengths, TraceTokens)
            or isinstance(self.output_lengths, TraceTokens)
        )
        if self.trace is not None:
            if not (self.replays_arrivals or wants_lengths):
                raise ValueError(
                    "A trace is given but neither arrivals nor lengths use it; leave one of them "
                    'out, give it kind = "trace", or remove the trace.'
                )
            return
        if self.arrivals is None:
            raise ValueError("The workload has no arrivals; give arrivals or a trace.")
        if self.arrivals.kind == "trace":
            raise ValueError('Arrivals of kind "trace" need a trace; give [workload.trace].')
        if self.total is None:
            for name, lengths in (("prompt", self.prompt), ("output", self.output)):
                if lengths is None:
                    raise ValueError(
                        f"The workload has no {name} lengths; give {name}, total with "
                        "prompt_share, or a trace."
                    )
                if lengths.kind == "trace":
                    raise ValueError(
                        f'Lengths of kind "trace" for {name} need a trace; give [workload.trace].'
                    )

    def _check_lengths(self) -> None:
        if (self.total is None) != (self.prompt_share is None):
            raise ValueError("total and prompt_share must be given together.")
        if self.total is not None and not (self.prompt is None and self.output is None):
            raise ValueError("total with prompt_share takes the place of prompt and output.")

    def _check_size(self) -> None:
        given = (self.num_requests is not None) + (self.duration_s is not None)
        if isinstance(self.arrivals, ClosedArrivals):
            if self.num_requests is None or self.duration_s is not None:
                raise ValueError(
                    "A closed loop needs num_requests and takes no duration_s: how long it lasts "
                    "depends on how fast it is served."
                )
            if self.num_requests < self.arrivals.num_users:
                raise ValueError(
                    f"num_requests is {self.num_requests} but num_users is "
                    f"{self.arrivals.num_users}; each user needs at least one request."
                )
        elif not self.replays_arrivals and given != 1:
            raise ValueError(
                f"{'Both' if given else 'Neither'} of num_requests and duration_s "
                f"{'were' if given else 'was'} given; exactly one is needed."
            )

    def _check_domains(self) -> None:
        names = [domain.name for domain in self.domains]
        if names and self.trace is not None and self.trace.tells_domains:
            raise ValueError(
                f"domains gives shares of {', '.join(map(repr, names))}, and a column of the trace "
                "(trace.columns.domain) says of each request which text it is of; leave one of "
                "them out."
            )
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Domain {name!r} is given {names.count(name)} times; once only.")
        if isinstance(self.arrivals, ClosedArrivals) and any(
            domain.shares is not None for domain in self.domains
        ):
            raise ValueError(
                "Drifting shares need arrival times, which a closed loop does not know in "
                "advance; give each domain a fixed share."
            )
        # A mix of straight lines that are never negative is 0 somewhere only if it is 0 at a point.
        for at_s in sorted({at_s for domain in self.domains for at_s, _ in domain.points}):
            if all(domain.share_at(np.array([at_s]))[0] == 0 for domain in self.domains):
                raise ValueError(
                    f"Every domain's share is 0 at {at_s:g} s; at least one must be positive."
                )


def generate(
    settings: WorkloadSettings, seed: int, base_dir: Path, available_domains: tuple[str, ...]
) -> Requests:
    """The requests of a workload: a function of settings, seed and the files they name.

    Relative files are looked up from `base_dir`. `available_domains` are those that the profile
    has exit traces for; the first is the default. Arrivals, lengths, domains and trace places
    come from streams of their own: changing one leaves the others as they are.
    """
    trace = None if settings.trace is None else read_trace(settings.trace, base_dir, seed)
    num_users = None
    arrivals = settings.arrivals
    if trace is not None and settings.replays_arrivals:
        trace = first_of(trace, settings)
        arrival_s = trace.arrival_s
    elif isinstance(arrivals, ClosedArrivals):
        num_users = arrivals.num_users
        arrival_s = closed_arrivals(arrivals, seed, settings.num_requests or 0)
    else:
        assert arrivals is not None and not isinstance(arrivals, TraceArrivals)
        arrival_s = open_arrivals(arrivals, seed, settings.num_requests, settings.duration_s)
    if not arrival_s.size:
        raise InputError(
            f"No request arrives within duration_s = {settings.duration_s}; give a longer "
            "duration or a higher rate.",
            where="workload",
        )
    if num_users is None and arrival_s[-1] > MAX_SPAN_S:
        raise InputError(
            f"The last of {arrival_s.size} requests arrives after {arrival_s[-1]:g} s; at most "
            f"{MAX_SPAN_S:g} s are allowed. Give fewer requests or a higher rate.",
            where="workload",
        )
    rows = _rows(settings, seed, arrival_s.size, trace)
    prompt_tokens, output_tokens = _lengths(settings, seed, base_dir, arrival_s.size, trace, rows)
    domain, domains = _domains(settings, seed, arrival_s, trace, rows, available_domains)
    given = trace.trace_start if trace is not None and settings.replays_arrivals else None
    return Requests(
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        domain=domain,
        trace_start=drawn_starts(seed, arrival_s.size) if given is None else given,
        domains=domains,
        num_users=num_users,
        num_dropped=0 if trace is None else trace.num_dropped,
        skipped={} if trace is None else trace.skipped,
        replays_text=given is not None,
    )


def fit_context(requests: Requests, max_positions: int, mode: OverContext) -> tuple[Requests, int]:
    """Treat requests of more than `max_positions` tokens; returns them and how many were changed.

    "refuse" changes none (the engine refuses and counts them), "truncate" shortens the prompt
    (and an output that leaves no room for one token of it), "error" refuses the whole workload.
    """
    if max_positions < 2:
        raise InputError(
            f"The context holds {max_positions} positions; at least 2 are needed, one for a "
            "prompt and one for an output."
        )
    total = requests.prompt_tokens.astype(np.int64) + requests.output_tokens
    over = np.flatnonzero(total > max_positions)
    if mode == "refuse" or not over.size:
        return requests, 0
    if mode == "error":
        row = int(over[0])
        raise InputError(
            f"Request {row} has {requests.prompt_tokens[row]} prompt and "
            f"{requests.output_tokens[row]} output tokens, together more than the "
            f"{max_positions} positions of the context; shorten them, or set over_context to "
            f'"refuse" or "truncate" ({over.size} requests are too long).',
            where="workload",
        )
    output_tokens = np.minimum(requests.output_tokens, max_positions - 1).astype(np.int32)
    prompt_tokens = np.minimum(requests.prompt_tokens, max_positions - output_tokens)
    fitted = replace(
        requests, prompt_tokens=prompt_tokens.astype(np.int32), output_tokens=output_tokens
    )
    return fitted, int(over.size)


def read_cdf(path: Path) -> tuple[tuple[float, float], ...]:
    """A distribution from a JSON file [[tokens, share up to it], ...]."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            "The cdf file does not exist; give an absolute path or one relative to the "
            "scenario's folder.",
            where=str(path),
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The cdf file is not readable as JSON ({error}).", str(path)) from error
    if not isinstance(given, list) or not all(
        isinstance(point, list)
        and len(point) == 2
        # The bound leaves out NaN, infinities and whole numbers that no float holds.
        and all(type(one) in (int, float) and abs(one) <= sys.float_info.max for one in point)
        for point in given
    ):
        raise InputError(
            "The cdf file must be a list of pairs [tokens, share], both finite numbers.", str(path)
        )
    points = tuple((float(tokens), float(share)) for tokens, share in given)
    if fault := _cdf_fault(points):
        raise InputError(fault, where=str(path))
    return points


def _cdf_fault(points: tuple[tuple[float, float], ...]) -> str | None:
    """What is wrong with a distribution's points."""
    if not points:
        return "The cdf has no point; at least one is needed, the last with share 1."
    previous = (0.0, 0.0)
    for number, (tokens, share) in enumerate(points, 1):
        if tokens <= previous[0] or tokens > 1e8:
            return (
                f"Point {number} of the cdf is at {tokens:g} tokens; tokens must be above the "
                f"previous point's {previous[0]:g} and at most 1e8."
            )
        if not previous[1] <= share <= 1:
            return (
                f"Point {number} of the cdf has share {share:g}; shares must not fall (the "
                f"previous is {previous[1]:g}) and be at most 1."
            )
        previous = (tokens, share)
    if previous[1] != 1:
        return f"The cdf ends at share {previous[1]:g}; its last share must be 1."
    return None


def first_of(trace: Trace, settings: WorkloadSettings) -> Trace:
    """The part of a replayed trace within `num_requests` and `duration_s`."""
    if settings.num_requests is not None and settings.num_requests > len(trace):
        raise InputError(
            f"num_requests is {settings.num_requests} but the trace holds {len(trace)}; ask for "
            "fewer, leave it out, or raise trace.repeat.",
            where="workload.num_requests",
        )
    num = len(trace) if settings.num_requests is None else settings.num_requests
    if settings.duration_s is not None:
        num = min(num, int(np.searchsorted(trace.arrival_s, settings.duration_s)))
    return trace.take(slice(num), trace.arrival_s[:num])


def _rows(
    settings: WorkloadSettings, seed: int, num: int, trace: Trace | None
) -> NDArray[np.int64] | None:
    """The rows of a trace that requests of other arrivals take; None where they take none."""
    if trace is None or settings.replays_arrivals:
        return None
    if settings.trace_rows == "random":
        return stream(seed, "trace-rows").integers(0, len(trace), size=num)
    first = settings.first_trace_row or 0
    if first >= len(trace):
        raise InputError(
            f"first_trace_row is {first} but the trace holds {len(trace)} rows, counted from 0; "
            "give a lower one.",
            where="workload.first_trace_row",
        )
    return (first + np.arange(num)) % len(trace)


def _lengths(
    settings: WorkloadSettings,
    seed: int,
    base_dir: Path,
    num: int,
    trace: Trace | None,
    rows: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Prompt and output tokens of `num` requests."""
    if settings.total is not None:
        uniforms = stream(seed, "total-lengths").random(num)
        total = np.maximum(settings.total.clamp(settings.total.quantile(uniforms, base_dir)), 2)
        share = np.round(total * (settings.prompt_share or 0.0))
        prompt_tokens = np.clip(share, 1, total - 1).astype(np.int32)
        return prompt_tokens, total - prompt_tokens
    columns = []
    for name, lengths in (
        ("prompt", settings.prompt_lengths),
        ("output", settings.output_lengths),
    ):
        if isinstance(lengths, TraceTokens):
            assert trace is not None
            tokens = trace.prompt_tokens if name == "prompt" else trace.output_tokens
            columns.append(lengths.clamp(tokens if rows is None else tokens[rows]))
        else:
            uniforms = stream(seed, f"{name}-lengths").random(num)
            columns.append(lengths.clamp(lengths.quantile(uniforms, base_dir)))
    return columns[0], columns[1]


def _domains(
    settings: WorkloadSettings,
    seed: int,
    arrival_s: Floats,
    trace: Trace | None,
    rows: NDArray[np.int64] | None,
    available: tuple[str, ...],
) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    """The domain of each request and the names it indexes."""
    if not available:
        raise InputError("The profile has no domain; at least one is needed to serve requests.")
    if settings.trace is not None and settings.trace.tells_domains:
        assert trace is not None and trace.domain is not None
        _check_told(settings.trace, trace.domains, available)
        return trace.domain if rows is None else trace.domain[rows], trace.domains
    replayed = None
    if trace is not None and settings.replays_arrivals and not settings.domains:
        replayed = trace.domain
    if settings.domains:
        names = tuple(domain.name for domain in settings.domains)
    elif trace is not None and replayed is not None:
        names = trace.domains
    else:
        names = available[:1]
    for name in names:
        if name not in available:
            raise InputError(
                f"The domain {name!r} is unknown.{did_you_mean(name, available)} The profile has "
                f"{', '.join(available)}.",
                where="workload.domains",
            )
    if replayed is not None:
        return replayed, names
    domain = np.zeros(arrival_s.size, dtype=np.int16)
    if len(names) > 1:
        # One number a block, and the mix at the block's first arrival.
        block = settings.block_requests
        at_s = arrival_s[::block]
        shares = [domain_settings.share_at(at_s) for domain_settings in settings.domains]
        level = stream(seed, "domains").random(at_s.size) * sum(shares)
        reached = np.zeros(at_s.size)
        picked = np.zeros(at_s.size, dtype=np.int16)
        for share in shares[:-1]:
            reached = reached + share
            picked += level >= reached
        domain = np.repeat(picked, block)[: arrival_s.size]
    return domain, names


def _check_told(
    settings: TraceSettings, names: tuple[str, ...], available: tuple[str, ...]
) -> None:
    """Refuse names in a trace's column, or meant by them, that are no domains of the profile."""
    unknown = [name for name in names if name not in available]
    if not unknown:
        return
    meant = settings.domains or {}
    wrong = [f"{own!r} = {name!r}" for own, name in meant.items() if name in unknown]
    known = f"the profile has {', '.join(map(repr, available))}"
    if wrong:
        raise InputError(
            f"domains says {wrong[0]}.{did_you_mean(unknown[0], available)} There is no such "
            f"domain; {known}.",
            where="workload.trace.domains",
        )
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise InputError(
        f"The trace's domains are not all known: {', '.join(map(repr, unknown[:5]))}{more}; "
        f"{known}. Say which of them each is, such as "
        f"workload.trace.domains = {{ {json.dumps(unknown[0])} = {json.dumps(available[0])} }}.",
        where="workload.trace.columns.domain",
    )


def drawn_starts(seed: int, num: int) -> NDArray[np.int32]:
    """Where requests start in their domains' exit traces, as a 31-bit hash of seed and row."""
    key = stream(seed, "trace-start").integers(0, 2**64, dtype=np.uint64)
    # The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over a Weyl sequence.
    mixed = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(33)).astype(np.int32)
