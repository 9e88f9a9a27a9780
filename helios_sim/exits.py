"""Exit traces: what each token would do at each exit of each candidate.

Known to the engine, never to a policy. A trace is measured (read from a profile's parquet file)
or, where only statistics are published, generated so that it reproduces them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtri

from helios_sim.errors import InputError, first_line
from helios_sim.loop.state import NLL_UNITS_PER_NAT
from helios_sim.policy.rules import leaves_here
from helios_sim.profile import MarkovCandidate, MarkovExits, Profile
from helios_sim.runs.columns import write_table
from helios_sim.streams import stream

FloatArray: TypeAlias = NDArray[np.float64]
Confidence: TypeAlias = NDArray[np.float32]
Flags: TypeAlias = NDArray[np.bool_]
Levels: TypeAlias = NDArray[np.int8]

_MAX_EXITS: Final = 127
_COLUMN: Final = re.compile(r"^(?P<candidate>.+)\|L(?P<layer>[1-9][0-9]{0,8})\|(?P<field>[a-z_]+)$")
_FIELDS: Final = ("confidence", "agrees", "nll_nats")


@dataclass(frozen=True)
class ExitTraces:
    """Exit traces of several candidates on the same positions of the same texts.

    `confidence`, `agrees` (the token equals the full model's) and `nll_nats` (negative
    log-likelihood of the true token) map a candidate to an array of shape (domains, positions,
    exits). `origin` is "trace" for measured ones and "markov" for generated ones.
    """

    domains: tuple[str, ...]
    num_positions: int
    exit_layers: Mapping[str, tuple[int, ...]]
    confidence: Mapping[str, Confidence]
    agrees: Mapping[str, Flags]
    nll_nats: Mapping[str, NDArray[np.float32]]
    origin: str

    def __post_init__(self) -> None:
        if not self.domains or self.num_positions < 1 or not self.exit_layers:
            raise InputError("Exit traces need a domain, a position and a candidate at least.")
        for name, layers in self.exit_layers.items():
            if not 1 <= len(layers) <= _MAX_EXITS:
                raise InputError(
                    f"Candidate {name!r} has {len(layers)} exits; 1 to {_MAX_EXITS} are allowed."
                )
            shape = (len(self.domains), self.num_positions, len(layers))
            for field, arrays, dtype in (
                ("confidence", self.confidence, np.float32),
                ("agrees", self.agrees, np.bool_),
                ("nll_nats", self.nll_nats, np.float32),
            ):
                self._check_array(name, field, cast(Mapping[str, Any], arrays), dtype, shape)
            confidence, nll = self.confidence[name], self.nll_nats[name]
            if not bool(np.all((confidence >= 0.0) & (confidence <= 1.0))):
                raise InputError(
                    f"The confidence of {name!r} leaves the range 0 to 1 or is not a number."
                )
            if not bool(np.all(np.isfinite(nll) & (nll >= 0.0))):
                raise InputError(f"The nll_nats of {name!r} must be finite and at least 0.")

    @staticmethod
    def _check_array(
        name: str, field: str, arrays: Mapping[str, Any], dtype: Any, shape: tuple[int, ...]
    ) -> None:
        if name not in arrays:
            raise InputError(f"Candidate {name!r} has no {field} in its exit trace.")
        array = arrays[name]
        if array.shape != shape:
            raise InputError(
                f"The {field} of {name!r} has shape {array.shape}; all candidates share their "
                f"positions, so {shape} (domains, positions, exits) is needed."
            )
        if array.dtype != dtype:
            raise InputError(
                f"The {field} of {name!r} is {array.dtype}; {np.dtype(dtype)} is needed."
            )

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the candidates."""
        return tuple(self.exit_layers)

    def domain_index(self, domain: str) -> int:
        """The place of a domain in the arrays."""
        if domain not in self.domains:
            raise InputError(
                f"Domain {domain!r} is not in the exit traces; they hold "
                f"{', '.join(map(repr, self.domains))}."
            )
        return self.domains.index(domain)

    def exit_level_at(self, candidate: str, threshold: float) -> Levels:
        """By (domain, position) the first exit level whose confidence suffices, else the last."""
        self._check_candidate(candidate)
        leaves = _leaving(self.confidence[candidate], threshold)
        leaves[..., -1] = True
        levels: Levels = np.argmax(leaves, axis=-1).astype(np.int8)
        return levels

    def share_by_exit(
        self, candidate: str, threshold: float, domain: str | None = None
    ) -> FloatArray:
        """Share of tokens leaving at each exit, in one domain or over all."""
        levels = self.exit_level_at(candidate, threshold)
        if domain is not None:
            levels = levels[self.domain_index(domain)]
        num_exits = len(self.exit_layers[candidate])
        counts = np.bincount(levels.ravel(), minlength=num_exits)
        return counts.astype(np.float64) / levels.size

    def _check_candidate(self, candidate: str) -> None:
        if candidate not in self.exit_layers:
            raise InputError(
                f"Candidate {candidate!r} is not in the exit traces; they hold "
                f"{', '.join(map(repr, self.candidates))}."
            )


def stickiness_of(levels: NDArray[np.integer[Any]]) -> float | None:
    """How often a position's exit level, [positions], is that of the one before, beyond chance.

    Of the pairs that chance would not make equal, the share that is: 0 for independent exits, 1
    where all are alike but for few changes, below 0 where exits alternate. It is the `stickiness`
    of generated traces. None where all leave at one exit, or there are no pairs.
    """
    if levels.size < 2:
        return None
    shares = np.bincount(levels) / levels.size
    by_chance = float(shares @ shares)
    if by_chance == 1.0:
        return None
    return (float((levels[1:] == levels[:-1]).mean()) - by_chance) / (1.0 - by_chance)


def load_traces(profile: Profile, candidates: Sequence[str] | None = None) -> ExitTraces:
    """The exit traces of a profile's models, or of the named ones among them."""
    names = tuple(profile.models) if candidates is None else tuple(candidates)
    for name in names:
        profile.model(name)
    if isinstance(profile.exits, MarkovExits):
        return generate_markov_traces(profile.exits, names)
    traces = read_traces(profile.exits.path, names)
    for name in names:
        expected = profile.models[name].model.exit_layers
        if traces.exit_layers[name] != expected:
            raise InputError(
                f"The trace of {name!r} holds the exits {list(traces.exit_layers[name])}; "
                f"the profile names {list(expected)}.",
                where=str(profile.exits.path),
            )
    return traces


def generate_markov_traces(spec: MarkovExits, candidates: Sequence[str]) -> ExitTraces:
    """Traces that reproduce published statistics: exit histograms, joint exits, autocorrelation.

    A position keeps the exit levels of the one before with probability `stickiness`; else all
    candidates draw anew from a Gaussian copula with pairwise correlation `correlation` (one
    shared difficulty). Draws become levels by rank, weighted with the run's length, so the
    histogram at the nominal threshold is met to half a run. Within its level's band a token's
    own difficulty is redrawn at every position, evenly spread over the band, which gives the
    share at any other threshold in closed form (`share_leaving_by`).

    A candidate's trace does not depend on which other candidates are asked for.
    """
    for name in candidates:
        if name not in spec.candidates:
            raise InputError(
                f"Candidate {name!r} has no exit statistics; there are "
                f"{', '.join(map(repr, spec.candidates))}."
            )
    parts: dict[str, list[tuple[Confidence, Flags, NDArray[np.float32]]]] = {
        name: [] for name in candidates
    }
    for domain in spec.domains:
        text = _SharedText(spec, domain)
        for name in candidates:
            parts[name].append(_candidate_trace(spec, spec.candidates[name], name, text))
    return ExitTraces(
        domains=spec.domains,
        num_positions=spec.num_positions,
        exit_layers={name: spec.candidates[name].exit_layers for name in candidates},
        confidence={name: np.stack([part[0] for part in parts[name]]) for name in candidates},
        agrees={name: np.stack([part[1] for part in parts[name]]) for name in candidates},
        nll_nats={name: np.stack([part[2] for part in parts[name]]) for name in candidates},
        origin="markov",
    )


def share_leaving_by(cumulative_share: float, threshold: float, nominal: float) -> float:
    """Share of tokens confident at an exit, at any threshold, in a generated trace.

    `cumulative_share` is the share at the nominal threshold.
    """
    if threshold >= nominal:
        return cumulative_share * (1.0 - threshold) / (1.0 - nominal)
    return 1.0 - (1.0 - cumulative_share) * threshold / nominal


def write_traces(traces: ExitTraces, path: Path) -> None:
    """Write traces as parquet: one row a position, columns "candidate|L<layer>|<field>"."""
    num_domains, num_positions = len(traces.domains), traces.num_positions
    columns: dict[str, Any] = {
        "domain": np.repeat(np.array(traces.domains), num_positions),
        "position": np.tile(np.arange(num_positions, dtype=np.int32), num_domains),
    }
    for name, layers in traces.exit_layers.items():
        for level, layer in enumerate(layers):
            for field, arrays in zip(
                _FIELDS, (traces.confidence, traces.agrees, traces.nll_nats), strict=True
            ):
                array = cast(Any, arrays[name])
                columns[f"{name}|L{layer}|{field}"] = np.ascontiguousarray(
                    array[:, :, level]
                ).ravel()
    write_table(pl.DataFrame(columns), path, compression="zstd")


def read_traces(path: Path, candidates: Sequence[str] | None = None) -> ExitTraces:
    """Read traces in the layout of `write_traces`; of all candidates or of some."""
    frame = _read_parquet(path)
    layers = _trace_layers(frame, path)
    names = tuple(layers) if candidates is None else tuple(candidates)
    for name in names:
        if name not in layers:
            raise InputError(
                f"The trace holds no candidate {name!r}; it holds "
                f"{', '.join(map(repr, layers)) or 'none'}.",
                where=str(path),
            )
    domains, num_positions = _trace_positions(frame, path)
    shape = (len(domains), num_positions)
    try:
        arrays = {
            field: {
                name: np.stack(
                    [
                        _column(frame, f"{name}|L{layer}|{field}", path).reshape(shape)
                        for layer in layers[name]
                    ],
                    axis=-1,
                )
                for name in names
            }
            for field in _FIELDS
        }
        _check_full_depth(arrays["agrees"], layers, path)
        return ExitTraces(
            domains=domains,
            num_positions=num_positions,
            exit_layers={name: layers[name] for name in names},
            confidence={name: a.astype(np.float32) for name, a in arrays["confidence"].items()},
            agrees={name: a.astype(np.bool_) for name, a in arrays["agrees"].items()},
            nll_nats={name: a.astype(np.float32) for name, a in arrays["nll_nats"].items()},
            origin="trace",
        )
    except InputError as error:
        raise error.at(str(path)) from error


def _leaving(confidence: Confidence, threshold: float) -> Flags:
    """The shared hot rule over a whole array."""
    # The rule is written for one token; being one comparison, it holds for arrays as it stands.
    # A plain Python float would be compared in single precision here, but in double precision by
    # the compiled loop.
    rule = cast(Any, leaves_here)
    return cast(Flags, rule(confidence, np.float64(threshold)))


def _stream(spec: MarkovExits, *names: str) -> Generator:
    """The random numbers of a named stream."""
    return stream(spec.seed, "/".join(("exit-trace", *names)))


def _normal(uniform: FloatArray) -> FloatArray:
    """Standard normal draws by inversion."""
    return np.asarray(ndtri(np.clip(uniform, 2.0**-53, 1.0 - 2.0**-53)), dtype=np.float64)


class _SharedText:
    """What all candidates share in a domain: the runs of positions and how hard each is."""

    def __init__(self, spec: MarkovExits, domain: str) -> None:
        num_positions = spec.num_positions
        starts = _stream(spec, domain, "runs").random(num_positions) >= spec.stickiness
        starts[0] = True
        self.domain = domain
        self.num_positions = num_positions
        self.run = np.cumsum(starts) - 1
        self.run_length = np.bincount(self.run).astype(np.float64)
        # Runs draw from one low-discrepancy sequence, dealt out at random among runs of one
        # length: joint shares are met far closer than by independent draws, and runs that follow
        # each other stay independent.
        order = _stream(spec, domain, "order").random(len(self.run_length))
        self._place = np.empty(len(self.run_length), dtype=np.float64)
        self._place[np.lexsort((order, self.run_length))] = np.arange(len(self.run_length))
        self._shifts = _stream(spec, domain, "shifts").random(1 + len(spec.candidates))
        self.difficulty = self.normal_of_runs(0)
        # Half of a token's surprise is its run's difficulty, half its own.
        own = _normal(_stream(spec, domain, "surprise").random(num_positions))
        self.surprise = -np.log1p(-_even_ranks(self.difficulty[self.run] + own))
        """Exponential with mean 1, evenly spread."""

    def normal_of_runs(self, dimension: int) -> FloatArray:
        """Standard normal draws, one a run; 0 is the shared difficulty, others the candidates' own.

        Points are those of the additive recurrence whose steps are powers of the root of
        x^(d+1) = x + 1, d being the number of dimensions (M. Roberts, 2018).
        """
        dimensions = len(self._shifts)
        root = 2.0
        for _ in range(64):
            root = (1.0 + root) ** (1.0 / (dimensions + 1))
        step = root ** -(dimension + 1.0)
        return _normal((self._shifts[dimension] + step * self._place) % 1.0)


def _even_ranks(values: FloatArray) -> FloatArray:
    """Ranks spread evenly over (0, 1)."""
    ranks = np.empty(len(values), dtype=np.float64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values)) + 0.5
    return ranks / max(len(values), 1)


def _candidate_trace(
    spec: MarkovExits, candidate: MarkovCandidate, name: str, text: _SharedText
) -> tuple[Confidence, Flags, NDArray[np.float32]]:
    """Confidence, agreement and negative log-likelihood of one candidate in one domain."""
    shares = np.array(candidate.exit_shares[text.domain], dtype=np.float64)
    cumulative = np.cumsum(shares / shares.sum())
    cumulative[-1] = 1.0
    draws = _stream(spec, text.domain, name)
    own = text.normal_of_runs(1 + list(spec.candidates).index(name))
    z = math.sqrt(spec.correlation) * text.difficulty + math.sqrt(1 - spec.correlation) * own
    level = _levels_of_runs(z, text.run_length, cumulative)[text.run]
    u = _difficulty_in_band(level, cumulative, draws.random(text.num_positions))

    confidence = _confidence(u, cumulative, spec.nominal_threshold)
    agreement = spec.agreement
    likely = np.where(
        confidence >= np.float64(agreement.step_confidence),
        agreement.at_or_above,
        agreement.below,
    )
    # One uniform a token for all exits: a token that agrees early agrees later too.
    agrees = draws.random(text.num_positions)[:, None] < likely
    agrees[:, -1] = True
    nll = text.surprise[:, None] * math.log(candidate.perplexity)
    nll = nll + np.where(agrees, 0.0, spec.disagreement_penalty_nats)
    # Whole units, as the engine sums them.
    nll = np.round(nll * NLL_UNITS_PER_NAT) / NLL_UNITS_PER_NAT
    return confidence, agrees, nll.astype(np.float32)


def _levels_of_runs(
    z: FloatArray, run_length: FloatArray, cumulative: FloatArray
) -> NDArray[np.intp]:
    """The exit level of each run, so that the histogram over positions is met."""
    order = np.argsort(z, kind="stable")
    before = np.cumsum(run_length[order])
    middle = (before - 0.5 * run_length[order]) / before[-1]
    levels = np.empty(len(z), dtype=np.intp)
    levels[order] = np.searchsorted(cumulative, middle, side="left")
    return levels


def _difficulty_in_band(
    level: NDArray[np.intp], cumulative: FloatArray, uniform: FloatArray
) -> FloatArray:
    """Each position's difficulty within the band of its exit level, evenly spread."""
    u = np.empty(len(level), dtype=np.float64)
    for place, upper in enumerate(cumulative):
        lower = cumulative[place - 1] if place else 0.0
        inside = np.flatnonzero(level == place)
        u[inside] = lower + (upper - lower) * _even_ranks(uniform[inside])
    return u


def _confidence(u: FloatArray, cumulative: FloatArray, nominal: float) -> Confidence:
    """Confidence at each exit: linear in the difficulty on either side of the nominal threshold."""
    above = np.float32(nominal)
    if float(above) < nominal:
        above = np.nextafter(above, np.float32(1.0))
    below = np.nextafter(above, np.float32(0.0))
    columns = []
    for share in cumulative:
        confident = 1.0 - (1.0 - nominal) * u / share if share > 0.0 else np.zeros_like(u)
        doubtful = nominal * (1.0 - u) / (1.0 - share) if share < 1.0 else np.zeros_like(u)
        columns.append(
            np.where(
                u <= share,
                np.maximum(confident.astype(np.float32), above),
                np.minimum(doubtful.astype(np.float32), below),
            )
        )
    return np.stack(columns, axis=-1)


def _read_parquet(path: Path) -> pl.DataFrame:
    """The trace file as a frame."""
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"The exit trace cannot be read as parquet: {first_line(error)}.", where=str(path)
        ) from error


def _trace_layers(frame: pl.DataFrame, path: Path) -> dict[str, tuple[int, ...]]:
    """The candidates of a trace file and their exit layers."""
    for needed in ("domain", "position"):
        if needed not in frame.columns:
            raise InputError(f"The column {needed!r} is missing.", where=str(path))
    found: dict[str, dict[int, set[str]]] = {}
    for column in frame.columns:
        if column in ("domain", "position"):
            continue
        match = _COLUMN.match(column)
        if match is None or match["field"] not in _FIELDS:
            raise InputError(
                f"The column {column!r} is unknown; columns are 'domain', 'position' and "
                f"'<candidate>|L<layer>|<field>' with a field of {', '.join(_FIELDS)}.",
                where=str(path),
            )
        exits = found.setdefault(match["candidate"], {})
        exits.setdefault(int(match["layer"]), set()).add(match["field"])
    for name, exits in found.items():
        for layer, fields in exits.items():
            for field in _FIELDS:
                if field not in fields:
                    raise InputError(
                        f"The column '{name}|L{layer}|{field}' is missing.", where=str(path)
                    )
    return {name: tuple(sorted(exits)) for name, exits in found.items()}


def _trace_positions(frame: pl.DataFrame, path: Path) -> tuple[tuple[str, ...], int]:
    """Domains in file order and positions of each; every domain counts 0, 1, 2 up to the same."""
    if frame.height == 0:
        raise InputError("The exit trace holds no positions.", where=str(path))
    for needed in ("domain", "position"):
        if frame[needed].null_count():
            raise InputError(f"The column {needed!r} has empty cells.", where=str(path))
    try:
        names = frame["domain"].cast(pl.String)
    except pl.exceptions.PolarsError as error:
        raise InputError(
            f"The column 'domain' holds {frame['domain'].dtype}; names are needed.", where=str(path)
        ) from error
    domains = tuple(str(name) for name in names.unique(maintain_order=True).to_list())
    num_positions = frame.height // len(domains)
    expected = np.tile(np.arange(num_positions), len(domains))
    blocks = np.repeat(np.array(domains), num_positions)
    if not (
        np.array_equal(frame["position"].to_numpy(), expected)
        and np.array_equal(names.to_numpy().astype(str), blocks)
    ):
        raise InputError(
            "Every domain must hold the same positions 0, 1, 2, ... in one block of rows.",
            where=str(path),
        )
    return domains, num_positions


def _check_full_depth(
    agrees: Mapping[str, NDArray[Any]], layers: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Refuse a last exit that does not agree with itself."""
    for name, found in agrees.items():
        if not found[..., -1].all():
            raise InputError(
                f"The column '{name}|L{layers[name][-1]}|agrees' holds false. It says whether an "
                "exit's token equals the one at full depth, which is this exit: all are true.",
                where=str(path),
            )


def _column(frame: pl.DataFrame, name: str, path: Path) -> NDArray[Any]:
    """One column without gaps."""
    series = frame[name]
    if series.null_count():
        raise InputError(f"The column {name!r} has empty cells.", where=str(path))
    wanted_bool = name.endswith("|agrees")
    if (series.dtype == pl.Boolean) != wanted_bool or not (wanted_bool or series.dtype.is_float()):
        kind = "booleans" if wanted_bool else "floats"
        raise InputError(
            f"The column {name!r} holds {series.dtype}; {kind} are needed.", where=str(path)
        )
    return series.to_numpy()
