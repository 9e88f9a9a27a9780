"""Work in processes of its own gives what it gives in this one, in order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from calibration.training import workers
from calibration.training.workers import MOST_PROCESSES, processes_for, workers_for


def with_process(item: int) -> tuple[int, int]:
    return 2 * item, os.getpid()


def test_two_processes_answer_in_order_and_one_is_this_one() -> None:
    items = list(range(40))
    for processes in (1, 2):
        with workers_for(with_process, processes) as doubled:
            found = [*doubled(items), *doubled(items[:1])]
        assert [double for double, _ in found] == [2 * item for item in items] + [0]
        assert (os.getpid() in {process for _, process in found}) == (processes == 1)


@pytest.mark.parametrize(("cpus", "processes"), [(1, 1), (4, 4), (64, MOST_PROCESSES)])
def test_few_items_take_one_process_and_many_one_a_processor(
    monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int
) -> None:
    usable = set(range(cpus))
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: usable, raising=False)
    assert processes_for(99, 100) == 1
    assert processes_for(100, 100) == processes


PIPED = """
import os
from calibration.training.workers import workers_for
with workers_for(abs, 2) as absolute:
    print(absolute([-1, -2, 3]))
"""


def test_a_program_that_no_process_can_read_again_works_by_itself() -> None:
    """Processes begin by reading the program, which came through a pipe; they end at once."""
    ran = subprocess.run(
        [sys.executable, "-"], input=PIPED, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[1, 2, 3]\n"
