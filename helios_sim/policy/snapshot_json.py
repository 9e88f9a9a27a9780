"""Snapshots as JSON: what the decision log keeps, and what replays it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from helios_sim.policy.contract import (
    Assignment,
    Candidate,
    Event,
    ExitMode,
    Slo,
    Snapshot,
    Telemetry,
)


def snapshot_to_json(snapshot: Snapshot) -> str:
    """One line of strict JSON; an infinite load time becomes null."""
    load_s = {
        name: [seconds if math.isfinite(seconds) else None for seconds in times]
        for name, times in snapshot.load_s.items()
    }
    # Candidates and evaluations come back in many snapshots, so their texts are kept.
    known = {
        "candidates": f"[{','.join(map(_text, snapshot.candidates))}]",
        "history": "{" + ",".join(_history(snapshot.history)) + "}",
    }
    rest = {name: value for name, value in vars(snapshot).items() if name not in known}
    written = _json(rest | {"load_s": load_s})
    return written[:-1] + "".join(f',"{name}":{text}' for name, text in known.items()) + "}"


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=vars)


@lru_cache(maxsize=256)
def _text(known: Candidate | Telemetry) -> str:
    return _json(known)


def _history(table: Mapping[str, tuple[Telemetry, ...]]) -> list[str]:
    return [f"{_json(name)}:[{','.join(map(_text, rows))}]" for name, rows in table.items()]


def snapshot_from_json(text: str) -> Snapshot:
    """The snapshot that `snapshot_to_json` wrote, equal to the last bit."""
    data = json.loads(text)
    data["event"] = Event(data["event"])
    data["assignment"] = _assignment(data["assignment"]) if data["assignment"] else None
    data["telemetry"] = _telemetry(data["telemetry"]) if data["telemetry"] else None
    data["candidates"] = tuple(_candidate(row) for row in data["candidates"])
    data["history"] = {
        name: tuple(_telemetry(row) for row in rows) for name, rows in data["history"].items()
    }
    data["round_evaluated"] = tuple(data["round_evaluated"])
    data["load_s"] = {
        name: tuple(math.inf if seconds is None else seconds for seconds in times)
        for name, times in data["load_s"].items()
    }
    data["slo"] = Slo(**data["slo"])
    if data["foresight"] is not None:
        data["foresight"] = {name: tuple(row) for name, row in data["foresight"].items()}
    return Snapshot(**data)


def _assignment(data: dict[str, Any]) -> Assignment:
    return Assignment(data["model"], data["depth"], ExitMode(data["exit_mode"]))


def _telemetry(data: dict[str, Any]) -> Telemetry:
    data["assignment"] = _assignment(data["assignment"])
    data["exit_counts"] = tuple(data["exit_counts"])
    return Telemetry(**data)


def _candidate(data: dict[str, Any]) -> Candidate:
    lists_as_tuples: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
    return Candidate(**lists_as_tuples)
