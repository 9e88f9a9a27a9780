"""A point: one policy on one sample of traffic, named by the content of all that decides it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.policy.registry import policy_source
from helios_sim.profiles.files import load_profile
from helios_sim.runs.latencies import Columns, Floats, columns_of, meets, meets_all
from helios_sim.runs.metrics import gap_percentile_s, gap_share_met, rounded_figures
from helios_sim.runs.records import SCHEMA_VERSION, RunData
from helios_sim.scenario import Scenario, resolved
from helios_sim.settings.slo import SloLimit, SloSpec, needed, parse_slo

POINT_SCHEMA: Final = 4
"""Version of a point's file."""

_PACKAGE: Final = Path(__file__).parent.parent
_NO_PART: Final = (
    "console",
    "fidelity",
    "report",
    "search",
    "__main__.py",
    "cli.py",
    "folder_names.py",
    "folders.py",
    "profiles/derive.py",
    "profiles/derive_model.py",
    "profiles/model_config.py",
    "profiles/published.py",
    "profiles/roofline.py",
    "publish.py",
    "runs/comparison.py",
    "wording.py",
)
"""Sources that change no figure of a point: what proposes points, what shows results, and what
makes profiles, whose content takes part itself.
"""
_JUDGES: Final = "search/points.py"
"""The one source among them that makes figures: it judges a point's limits."""

Figures = dict[str, Any]
"""What a point gave: `summary` and the `device` it is of, for each judged limit its share and its
percentile in `judged`, and in `together` the share of the requests that meets all limits without a
percentile; None without any. `answer_s` is how long answers take from admission to their last
token, the 99th percentile of those that finished; None where none did. `domains` has the share of
the requests that each domain of text has.
"""


@dataclass(frozen=True)
class Point:
    """A scenario of one policy and one replication, with latency limits to judge beside its SLO.

    Two points with one key give the same figures, whatever they are called and whoever runs them.
    """

    scenario: Scenario
    base_dir: Path
    limits: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of the settings, of the files they name, and of the code that runs them."""
        data = resolved(self.scenario)
        named = {
            "point": POINT_SCHEMA,
            "run": SCHEMA_VERSION,
            "scenario": data,
            "limits": self.limits,
            "files": dict(_files_of(data, self.base_dir)),
            "code": code_hash(),
        }
        text = json.dumps(named, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def point_of(scenario: Scenario, base_dir: Path, limits: str = "") -> Point:
    """The point of a scenario of one policy, without what changes no figure."""
    if len(scenario.policy) != 1:
        raise InputError(
            f"A point was given {len(scenario.policy)} policies; it takes one.", scenario.name
        )
    changes = {
        "name": "point",
        "question": "",
        "notes": (),
        "published": (),
        "plan": None,
        "search": None,
        "policy": (scenario.policy[0].model_copy(update={"label": None}),),
        "measure": scenario.measure.model_copy(update={"replications": 1}),
    }
    # A worker of a cluster stands in a folder of its own.
    return Point(scenario.model_copy(update=changes), base_dir.resolve(), limits)


class OtherCode(Exception):
    """A worker has other code than the command that it works for."""


def run_for(code: str, point: Point) -> Figures:
    """Play a point for a command whose code has this hash, which is part of the point's key.

    Raises `OtherCode` where this process has other code, as a cluster's worker may.
    """
    if code_hash() != code:
        raise OtherCode
    return run_point(point)


def run_point(point: Point) -> Figures:
    """Play a point; what it gives is plain data."""
    experiment = prepare(point.scenario, point.base_dir, "scenario")
    result = run_policy(experiment, point.scenario.policy[0])
    device = result.run.environment["device"]
    measure = point.scenario.measure
    columns = columns_of(result.run, measure.warmup_s, measure.warmup_requests)
    answers_s = (columns.finished_s - columns.admitted_s)[columns.measured & columns.finished]
    domains = result.run.requests["domain"]
    figures: Figures = {
        "summary": result.summary,
        "device": device,
        "judged": [],
        "together": None,
        "answer_s": rounded_figures(np.quantile(answers_s, 0.99)) if answers_s.size else None,
        "domains": {
            name: float((domains == name).mean() or 0.0) for name in sorted(domains.unique())
        },
    }
    if point.limits:
        slo = parse_slo(point.limits)
        figures["judged"] = _judged(result.run, columns, slo)
        plain = SloSpec(tuple(limit for limit in slo.limits if limit.percentile is None))
        if plain.limits:
            figures["together"] = float(meets_all(columns, plain)[columns.measured].mean())
    return figures


def _judged(run: RunData, columns: Columns, slo: SloSpec) -> list[dict[str, Any]]:
    measured = columns.measured
    found = []
    for limit in slo.limits:
        percentile = 100.0 if limit.percentile is None else limit.percentile
        if limit.metric == "itl" and limit.percentile is not None:
            share = gap_share_met(run, columns, limit.limit_s)
            value_s = gap_percentile_s(run, percentile) if sum(run.totals.itl_counts) else 0.0
            done = columns.finished[measured]
            if int(done.sum()) < needed(percentile, len(done)):
                value_s = math.inf
        else:
            sent_s = np.sort(_sent_s(columns, limit)[measured])
            place = max(0, needed(percentile, len(sent_s)) - 1)
            value_s = float(sent_s[place])
            share = float(meets(columns, limit)[measured].mean())
        found.append(
            {
                "limit": str(limit),
                "share": share,
                "value_ms": 1e3 * value_s if math.isfinite(value_s) else None,
                "late_while": rounded_figures(late_while(run, columns, limit)),
            }
        )
    return found


def late_while(run: RunData, columns: Columns, limit: SloLimit) -> dict[str, float]:
    """What replicas did while requests that miss a limit waited, as shares of that time.

    `evaluating` a candidate and `changing` to another assignment (draining and loading); they
    serve, or idle, for the rest. Empty where no measured request is late.
    """
    late = columns.measured & ~columns.refused & ~meets(columns, limit)
    begins_with_token = limit.metric in ("tpot", "itl")
    begin_s = columns.first_token_s if begins_with_token else columns.arrival_s
    end_s = columns.first_token_s if limit.metric == "ttft" else columns.finished_s
    late &= ~np.isnan(begin_s)
    if not late.any():
        return {}
    by_id = run.requests.select("request_id", "replica").sort("request_id")
    rows = np.searchsorted(by_id["request_id"].to_numpy(), columns.request_id[late])
    replicas = by_id["replica"].fill_null(-1).to_numpy()[rows]
    begin_s = begin_s[late]
    end_s = np.where(np.isnan(end_s[late]), run.totals.end_s, end_s[late])
    spent_s = {"evaluating": 0.0, "changing": 0.0}
    for replica in np.unique(replicas):
        mine = replicas == replica
        for name, (edges_s, covered_s) in _pauses(run, int(replica)).items():
            if len(edges_s):
                until_s = np.interp(end_s[mine], edges_s, covered_s)
                since_s = np.interp(begin_s[mine], edges_s, covered_s)
                spent_s[name] += float((until_s - since_s).sum())
    whole_s = float((end_s - begin_s).sum())
    return {name: value / whole_s for name, value in spent_s.items()} if whole_s > 0.0 else {}


def _pauses(run: RunData, replica: int) -> dict[str, tuple[Floats, Floats]]:
    """When a replica evaluated and changed: ends of the stretches, seconds covered by then."""
    asked = run.decisions.filter(pl.col("replica") == replica).sort("time_s", maintain_order=True)
    end_s = run.totals.end_s
    times_s = [*asked["time_s"].to_list(), end_s]
    stretches: dict[str, list[tuple[float, float]]] = {"evaluating": [], "changing": []}
    for place, (ready_s, decision) in enumerate(asked.select("ready_s", "decision").iter_rows()):
        next_s = times_s[place + 1]
        ready_s = next_s if ready_s is None else min(ready_s, next_s)
        if decision != "keep":
            stretches["changing"].append((times_s[place], ready_s))
        if decision == "evaluate":
            stretches["evaluating"].append((ready_s, next_s))
    found = {}
    for name, parts in stretches.items():
        edges_s = np.array(parts).reshape(-1)
        lengths_s = np.array([[0.0, end - begin] for begin, end in parts]).reshape(-1)
        found[name] = edges_s, np.cumsum(lengths_s)
    return found


def _sent_s(columns: Columns, limit: SloLimit) -> Floats:
    """A latency of every request sent; infinite where it did not finish."""
    return np.where(columns.finished, columns.latency_s(limit), math.inf)


def _files_of(data: Mapping[str, Any], base_dir: Path) -> Iterator[tuple[str, str]]:
    """Every file that a scenario names, with the hash of its content."""
    yield "profile", load_profile(data["fleet"]["profile"], base_dir).hash
    for name in sorted({name for _, name in named_files(data["workload"])}):
        yield name, content_hash(base_dir / name)
        beside = name.removesuffix("_trace.parquet")
        if beside != name:
            # ServeGen's lengths stand in a file of their own.
            beside += "_dataset.parquet"
            yield beside, content_hash(base_dir / beside)
    for policy in data["policy"]:
        use = str(policy["use"])
        module, colon, _ = use.partition(":")
        if colon:
            beside_it = base_dir.joinpath(*module.removesuffix(".py").split(".")).with_suffix(".py")
            source = beside_it if beside_it.is_file() else policy_source(use)
            if source is not None:
                yield module, content_hash(source)


def named_files(node: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every `file` that plain data names, with the table that holds it."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "file" and isinstance(value, str):
                yield node, value
            else:
                yield from named_files(value)
    elif isinstance(node, list):
        for value in node:
            yield from named_files(value)


def content_hash(path: Path) -> str:
    """Hash of a file, or of all files of a folder; an empty text for what is not there."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = []
    for file in files:
        if file.is_file():
            status = file.stat()
            stamps.append((file, status.st_size, status.st_mtime_ns))
    return _hash_of(tuple(stamps)) if stamps else ""


@cache
def _hash_of(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of files, read again only when their size or time changes."""
    digest = hashlib.sha256()
    for file, _, _ in stamps:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def code_files() -> list[str]:
    """Every source of the package that takes part in a point's figures."""
    inside = [path.relative_to(_PACKAGE) for path in sorted(_PACKAGE.rglob("*.py"))]
    return [
        path.as_posix()
        for path in inside
        if path.as_posix() == _JUDGES or not {path.parts[0], path.as_posix()} & {*_NO_PART}
    ]


@cache
def code_hash() -> str:
    """Hash of those sources."""
    digest = hashlib.sha256()
    for name in code_files():
        digest.update(name.encode() + b"\0" + (_PACKAGE / name).read_bytes() + b"\0")
    return digest.hexdigest()
