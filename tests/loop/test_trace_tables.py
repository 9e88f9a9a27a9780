"""Look-up tables of exit traces are made once for runs in a row, and go with their traces."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helios_sim import experiment
from helios_sim.exits import ExitTraces
from helios_sim.loop import world
from helios_sim.loop.state import OBSERVED_BREACH
from helios_sim.loop.world import TraceTables, keep_tables, trace_tables
from helios_sim.scenario import parse_scenario
from helios_sim.search.executors import open_workers
from helios_sim.search.points import Point, point_of, run_point


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Nothing is kept from other tests, which may hold their traces, nor for them."""
    experiment.forget_traces()
    keep_tables(0)
    keep_tables(1)
    yield
    keep_tables(0)
    keep_tables(1)


def traces() -> ExitTraces:
    """Ten positions of one text under a model of two exits."""
    shape = (1, 10, 2)
    return ExitTraces(
        domains=("text",),
        num_positions=10,
        exit_layers={"m": (2, 4)},
        confidence={"m": np.full(shape, 0.5, np.float32)},
        agrees={"m": np.ones(shape, np.bool_)},
        nll_nats={"m": np.ones(shape, np.float32)},
        origin="trace",
    )


def tables_of(given: ExitTraces, threshold: float = 0.4) -> TraceTables:
    return trace_tables(given, ["m"], {"m": threshold})


def test_runs_in_a_row_share_their_tables() -> None:
    given = traces()
    assert tables_of(given) is tables_of(given)
    assert tables_of(given) is not tables_of(traces())


def test_tables_go_when_their_traces_go() -> None:
    given = traces()
    tables = weakref.ref(tables_of(given))
    assert tables() is not None
    del given
    gc.collect()
    assert tables() is None


def test_no_more_tables_are_kept_than_asked_and_the_last_used_stay() -> None:
    given = traces()
    keep_tables(2)
    first, _ = tables_of(given, 0.1), tables_of(given, 0.2)
    assert tables_of(given, 0.1) is first
    third = tables_of(given, 0.3)
    assert tables_of(given, 0.1) is first
    assert tables_of(given, 0.3) is third
    keep_tables(0)
    assert not world._KEPT
    assert tables_of(given, 0.1) is not first


def a_point(folder: Path, **options: float) -> Point:
    """A run of an instant."""
    data = {
        "name": "short",
        "workload": {
            "num_requests": 20,
            "arrivals": {"kind": "poisson", "rate_per_s": 4.0},
            "prompt": {"kind": "constant", "tokens": 50},
            "output": {"kind": "constant", "tokens": 5},
        },
        "fleet": {"profile": "opt-a100-40gb"},
        "policy": [{"use": "helios", **options}],
    }
    return point_of(parse_scenario(data, "sweep", folder), folder)


def test_points_run_in_this_process_leave_nothing_behind(tmp_path: Path) -> None:
    with open_workers(1) as workers:
        workers.executor.submit(run_point, a_point(tmp_path)).result()
    gc.collect()
    assert not experiment._TRACES
    assert not world._KEPT
    given = traces()
    first = tables_of(given, 0.1)
    tables_of(given, 0.2)
    assert tables_of(given, 0.1) is not first, "one policy's tables are kept again, as before"


def test_points_that_go_back_and_forth_between_policies_share_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thresholds in turn; in this process as in a worker's."""
    made: list[dict[str, float]] = []
    make = world._trace_tables

    def counting(given: ExitTraces, names: Any, thresholds: Any, replaced: Any) -> TraceTables:
        made.append(dict(thresholds))
        return make(given, names, thresholds, replaced)

    monkeypatch.setattr(world, "_trace_tables", counting)
    points = [a_point(tmp_path, confidence_threshold=threshold) for threshold in (0.4, 0.6)]
    with open_workers(1) as workers:
        for point in points * 2:
            workers.executor.submit(run_point, point).result()
    assert [set(one.values()) for one in made] == [{0.4}, {0.6}]


def test_a_rule_of_breaches_is_asked_for_tokens_of_the_loaded_level_alone() -> None:
    """All ten tokens are confident at the first exit, and leave there if they may."""
    asked: list[bool] = []

    def whatever(confidence: float, threshold: float, at_full_depth: bool) -> bool:
        asked.append(at_full_depth)
        return True

    tables = trace_tables(traces(), ["m"], {"m": 0.4}, {"is_breach": whatever})
    assert asked == [False] * 10 + [True] * 10 + [False] * 10
    assert tables.breach[0].sum(axis=1).tolist() == [10, 10, 10, 0]
    assert tables.prefix[0, :, -1, OBSERVED_BREACH].tolist() == [10, 10, 10, 0]
