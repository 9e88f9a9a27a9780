"""A simulated replica that does what a recorded decision log says, when it says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from helios_sim.engine import HostLinks, Process, Replica, Run
from helios_sim.loop.state import AT_HORIZON, BETWEEN, OUT_OF_WORK
from helios_sim.policy.contract import (
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Policy,
    Serve,
    Snapshot,
    Switch,
    Watching,
)
from helios_sim.runs.records import RunData

_LOOKS: Final = 50
"""How often a replica looks, on the way to a decision, whether any work is left."""


@dataclass(frozen=True)
class Recorded:
    """A decision of the log: when and why the policy was asked, what it said, when it was done.

    `num_finished` requests had finished since the decision before it was carried out.
    """

    time_s: float
    num_finished: int
    ready_s: float
    event: Event
    decision: Decision


class Replayed:
    """A policy that hands out the decisions of a log in order, whatever it sees.

    Unlike other policies it has a state: its place in the log. At the log's end it keeps what is
    there.
    """

    sees_future = False
    watching = Watching()

    def __init__(self, replaced: Policy, log: Sequence[Recorded]) -> None:
        self.name = replaced.name
        self.confidence_threshold = replaced.confidence_threshold
        self.hot_rules = getattr(replaced, "hot_rules", {})
        self.log = log
        self.place = 0

    def decide(self, snapshot: Snapshot) -> Decision:
        """The next decision of the log."""
        if self.place >= len(self.log):
            return Keep("There are no more recorded decisions.")
        self.place += 1
        return self.log[self.place - 1].decision


class ReplayedReplica(Replica):
    """A replica whose policy is asked at the recorded times, not when the simulation would ask.

    What follows an evaluation is asked when the evaluation is over, here as there, and a
    reassessment after as many requests as there: asked a moment later it would find others admitted
    and wait for them. All else comes at its time. Where carrying a decision out takes longer than
    it did, the next one comes later by as much, so that the replica serves between them as long as
    it did; else two would follow each other with nothing served. A time that falls into an
    iteration waits for its end.
    """

    def __init__(self, index: int, run: Run, host: HostLinks, policy: Replayed) -> None:
        super().__init__(index, run, host, policy)
        self.log = policy.log

    def live(self) -> Process:
        """Ask and carry out at the recorded times, then serve what is left."""
        late_s = 0.0
        for place, step in enumerate(self.log):
            if place and (yield from self.reach(step, late_s)) == OUT_OF_WORK:
                return
            yield from self.carry_out(self.ask(step.event))
            late_s = max(0.0, self.record.now_s - step.ready_s)
        if not self.log:
            yield from self.carry_out(self.ask(Event.START))
        while (yield from self.serve(math.inf)) != OUT_OF_WORK:
            yield from self.carry_out(self.ask(Event.REASSESS))

    def reach(self, step: Recorded, late_s: float) -> Process:
        """Serve until a recorded decision is due; says whether any work is left then."""
        if step.event is Event.EVALUATED:
            return (yield from self.serve(math.inf))
        if step.event is Event.REASSESS and step.num_finished > 0:
            self.record.finish_target = step.num_finished
            return (yield from self.serve(math.inf))
        due_s = step.time_s + late_s
        last_s = float(self.run.requests.arrival_s[-1])
        while self.record.now_s < due_s:
            now_s = self.record.now_s
            look_s = max(last_s, now_s + (due_s - max(last_s, now_s)) / _LOOKS)
            until_s = min(due_s, look_s) if look_s > now_s else due_s
            yield from self.serve(until_s)
            yield from self.end_iteration()
            done = self.record.num_rows == 0 and self.record.num_waiting == 0
            if done and self.record.now_s >= last_s:
                return OUT_OF_WORK
        return AT_HORIZON

    def end_iteration(self) -> Process:
        """Serve to the end of the iteration under way."""
        if self.record.phase != BETWEEN:
            self.record.pausing = 1
            yield from self.serve(math.inf)
            self.record.pausing = 0


def replayed_run(
    make: Callable[[Callable[[], Policy]], Run], policy: Callable[[], Policy], real: RunData
) -> Run:
    """A run, as `make` builds it from a maker of policies, that follows a real run's decisions."""
    logs = recorded(real)
    run = make(lambda: Replayed(policy(), ()))
    run.replicas = [
        ReplayedReplica(one.index, run, one.host, Replayed(policy(), logs.get(one.index, ())))
        for one in run.replicas
    ]
    return run


def recorded(run: RunData) -> dict[int, tuple[Recorded, ...]]:
    """The decisions of each replica in order; an evaluation serves as many requests as it did."""
    logs: dict[int, tuple[Recorded, ...]] = {}
    for (replica,), rows in run.decisions.group_by("replica"):
        told = list(rows.sort("time_s", maintain_order=True).iter_rows(named=True))
        mine = run.requests.filter(pl.col("replica") == replica)["finished_s"].drop_nulls()
        finished_s = np.sort(mine.to_numpy())
        until = [row["time_s"] for row in told[1:]] + [math.inf]
        since = [0.0] + [math.inf if row["ready_s"] is None else row["ready_s"] for row in told]
        logs[int(str(replica))] = tuple(
            Recorded(
                time_s=row["time_s"],
                num_finished=_num_between(finished_s, since_s, row["time_s"]),
                ready_s=math.inf if row["ready_s"] is None else row["ready_s"],
                event=Event(row["event"]),
                decision=_decision(row, finished_s, until_s),
            )
            for row, since_s, until_s in zip(told, since[:-1], until, strict=True)
        )
    return logs


def _decision(row: dict[str, Any], finished_s: Any, until_s: float) -> Decision:
    kind, reason = row["decision"], row["reason"]
    mode, model, depth = ExitMode(row["exit_mode"]), str(row["model"]), int(row["depth"])
    if kind == "evaluate":
        since_s = row["time_s"] if row["ready_s"] is None else row["ready_s"]
        return Evaluate(model, max(1, _num_between(finished_s, since_s, until_s)), mode, reason)
    if kind == "serve":
        return Serve(model, depth, mode, reason)
    if kind == "load-layers":
        return LoadLayers(depth, mode, reason)
    if kind == "switch":
        return Switch(model, depth, mode, reason)
    return Keep(reason)


def _num_between(finished_s: Any, after_s: float, until_s: float) -> int:
    """How many finished after a time, and by another."""
    ends = np.searchsorted(finished_s, [after_s, until_s], side="right")
    return int(ends[1] - ends[0])
