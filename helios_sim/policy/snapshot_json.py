"""Snapshots as JSON: what the decision log keeps, and what replays it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from helios_sim.policy.contract import (
    Assignment,
    Candidate,
    Event,
    ExitMode,
    Pace,
    Slo,
    Snapshot,
    Telemetry,
)

_encode: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=vars).encode


class SnapshotLog:
    """Writes a replica's snapshots one after another, each without what it shares with the last.

    A line is strict JSON and holds the keys whose values differ from those of the line before; the
    first one holds all. In the history an evaluation that is the telemetry of one of these lines
    is that line's number, from 0; an infinite load time is null.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._numbers: dict[int, int] = {}
        self._num_lines = 0

    def write(self, snapshot: Snapshot) -> str:
        """The next line."""
        last, now = self._last, vars(snapshot)
        new = {name: now[name] for name in now if name not in last or now[name] != last[name]}
        if "history" in new:
            new["history"] = self._history(snapshot.history, snapshot.telemetry)
        if "load_s" in new:
            new["load_s"] = _finite(snapshot.load_s)
        self._last = now
        self._num_lines += 1
        return _encode(new)

    def _history(
        self, table: Mapping[str, tuple[Telemetry, ...]], telemetry: Telemetry | None
    ) -> dict[str, list[int | Telemetry]]:
        """The table, with the numbers of the lines whose telemetry it holds."""
        # Evaluations are told apart by identity; the last snapshot keeps those of its table alive.
        known = self._numbers | {id(telemetry): self._num_lines}
        rows = [row for one in table.values() for row in one]
        self._numbers = {id(row): known[id(row)] for row in rows if id(row) in known}
        return {
            name: [self._numbers.get(id(row), row) for row in one] for name, one in table.items()
        }


class SnapshotReader:
    """Reads the lines of a `SnapshotLog` back in their order, equal to the last bit."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._telemetry: list[Telemetry | None] = []

    def read(self, line: str) -> Snapshot:
        """The snapshot of the next line."""
        data = json.loads(line)
        for name, read in _READERS.items():
            if data.get(name) is not None:
                data[name] = read(data[name])
        history = data.pop("history", None)
        self._values |= data
        self._telemetry.append(self._values["telemetry"])
        if history is not None:
            self._values["history"] = {
                name: tuple(
                    self._telemetry[row] if isinstance(row, int) else _telemetry(row)
                    for row in rows
                )
                for name, rows in history.items()
            }
        return Snapshot(**self._values)


def read_snapshots(replicas: Iterable[int], lines: Iterable[str]) -> list[Snapshot]:
    """The snapshots of a whole log, whose rows may be of several replicas."""
    readers: dict[int, SnapshotReader] = {}
    return [
        readers.setdefault(replica, SnapshotReader()).read(line)
        for replica, line in zip(replicas, lines, strict=True)
    ]


def snapshot_to_json(snapshot: Snapshot) -> str:
    """A snapshot alone, as the first line of a log."""
    return SnapshotLog().write(snapshot)


def snapshot_from_json(text: str) -> Snapshot:
    """The snapshot that `snapshot_to_json` wrote, equal to the last bit."""
    return SnapshotReader().read(text)


def _finite(load_s: Mapping[str, tuple[float, ...]]) -> dict[str, list[float | None]]:
    return {
        name: [seconds if math.isfinite(seconds) else None for seconds in times]
        for name, times in load_s.items()
    }


def _load_s(data: dict[str, list[float | None]]) -> dict[str, tuple[float, ...]]:
    return {
        name: tuple(math.inf if seconds is None else seconds for seconds in times)
        for name, times in data.items()
    }


def _assignment(data: dict[str, Any]) -> Assignment:
    return Assignment(data["model"], data["depth"], ExitMode(data["exit_mode"]))


def _telemetry(data: dict[str, Any]) -> Telemetry:
    assignment = _assignment(data["assignment"])
    counts = tuple(data["exit_counts"])
    pace = Pace(**data["pace"]) if data.get("pace") else None
    return Telemetry(**data | {"assignment": assignment, "exit_counts": counts, "pace": pace})


def _candidates(data: list[dict[str, Any]]) -> tuple[Candidate, ...]:
    return tuple(map(_candidate, data))


def _candidate(data: dict[str, Any]) -> Candidate:
    return Candidate(**{name: _as_tuples(value) for name, value in data.items()})


def _as_tuples(value: Any) -> Any:
    """Lists, and lists of them, as the tuples that they were."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _foresight(data: dict[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(row) for name, row in data.items()}


_READERS: Final[Mapping[str, Any]] = {
    "event": Event,
    "assignment": _assignment,
    "telemetry": _telemetry,
    "candidates": _candidates,
    "round_evaluated": tuple,
    "load_s": _load_s,
    "slo": lambda data: Slo(**data),
    "foresight": _foresight,
}
