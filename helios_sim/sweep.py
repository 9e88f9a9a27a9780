"""Many scenarios over several processes: in order, the same bytes for any number of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.scenario import Scenario
from helios_sim.search.executors import is_death, open_workers, usable_cpus

Summaries = list[dict[str, Any]]


def run_sweep(
    scenarios: Sequence[Scenario],
    base_dir: Path,
    num_processes: int | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Summaries]:
    """The summaries of every scenario's policies, in the order of the scenarios.

    Without `num_processes` one process a core is used. A process reads each profile and its exit
    traces once and keeps them. `on_done` is told how many scenarios of how many are done. The
    first scenario that cannot run ends the sweep with its `InputError`.
    """
    processes = min(num_processes or usable_cpus(), max(1, len(scenarios)))
    results: list[Summaries] = []
    for summaries in _summaries(scenarios, base_dir, processes):
        results.append(summaries)
        if on_done is not None:
            on_done(len(results), len(scenarios))
    return results


def run_point(scenario: Scenario, base_dir: Path) -> Summaries:
    """The summaries of one scenario's policies."""
    experiment = prepare(scenario, base_dir, scenario.name)
    return [run_policy(experiment, policy).summary for policy in scenario.policy]


def _summaries(
    scenarios: Sequence[Scenario], base_dir: Path, processes: int
) -> Iterator[Summaries]:
    with open_workers(processes) as workers:
        running: deque[Future[Summaries]] = deque()
        try:
            for scenario in scenarios:
                if len(running) == workers.max_in_flight:
                    yield running.popleft().result()
                running.append(workers.executor.submit(run_point, scenario, base_dir))
            while running:
                yield running.popleft().result()
        except Exception as error:
            if not is_death(error):
                raise
            raise InputError(
                "A process of the sweep died, perhaps for lack of memory; give fewer processes "
                "or smaller scenarios.",
                "sweep",
            ) from error
