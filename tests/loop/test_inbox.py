"""The inbox of a replica: who arrives first leaves it first, and long ones cost little more."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import numpy as np
import pytest

from helios_sim.engine import Run
from helios_sim.loop import queues
from helios_sim.loop.compiled import compiling
from helios_sim.loop.hot_rules import loop_with
from helios_sim.loop.state import NOBODY
from tests.counted_lines import lines_of
from tests.engine.factories import DOMAINS, drifting_setup, policy_of, requests_of

pytestmark = pytest.mark.filterwarnings("ignore::helios_sim.loop.hot_rules.InterpretedRuleWarning")


def whoever_comes(num_running: int, max_batch: int, needed: int, free: int, watermark: int) -> bool:
    """A rule that numba cannot compile, so that the loop runs in lines that can be counted."""
    return bool({"anybody": True}.get("anybody", needed))


@pytest.fixture(scope="module")
def loop() -> Any:
    return loop_with({"may_join": whoever_comes})


@pytest.fixture(scope="module")
def line() -> Any:
    """The queues as plain Python, so that their lines can be counted."""
    assert queues.__spec__ is not None and queues.__spec__.loader is not None
    plain = importlib.util.module_from_spec(queues.__spec__)
    with compiling("interpreted"):
        queues.__spec__.loader.exec_module(plain)
    return plain


def empty_world(arrival_s: Any) -> Any:
    """A world in which these requests, of five tokens, are still in nobody's inbox."""
    num = len(arrival_s)
    requests = requests_of(arrival_s, [5] * num, [2] * num, domains=DOMAINS)
    setup = drifting_setup(fleet={"num_replicas": 2, "router": "least-kv"})
    return Run(setup, requests, lambda: policy_of("vanilla")).world


def emptied(line: Any, world: Any) -> list[int]:
    """The requests of the first replica's inbox, as they leave it."""
    record, found = world.replicas[0], []
    while record.num_inbox > 0:
        found.append(int(line.pop_inbox(world, record)))
    ends = (record.inbox_head, record.inbox_tail, record.inbox_heap)
    assert ends == (NOBODY,) * 3
    assert record.queued_blocks == 0
    return found


@pytest.mark.parametrize("seed", range(5))
def test_whoever_arrives_first_leaves_first_and_of_one_instant_the_smaller_number(
    line: Any, seed: int
) -> None:
    """Half are sent before the first leave, the others one by one as those do."""
    draws = random.Random(seed)
    arrival_s = [float(draws.randint(0, 20)) for _ in range(80)]
    world, sent = empty_world(arrival_s), draws.sample(range(80), 80)
    inbox, found, expected = [], [], []
    for i in sent[:40]:
        line.push_inbox(world, 0, i)
        inbox.append(i)
    for i in sent[40:]:
        expected.append(min(inbox, key=lambda one: (arrival_s[one], one)))
        inbox.remove(expected[-1])
        found.append(line.pop_inbox(world, world.replicas[0]))
        line.push_inbox(world, 0, i)
        inbox.append(i)
    assert found == expected
    assert emptied(line, world) == sorted(inbox, key=lambda one: (arrival_s[one], one))


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_twice_as_many_in_an_inbox_take_little_more_than_twice_the_effort(
    line: Any, order: str
) -> None:
    def effort(count: int) -> int:
        world, sent = empty_world(np.arange(float(count))), list(range(count))
        if order == "shuffled":
            random.Random(1).shuffle(sent)

        def work() -> None:
            for i in reversed(sent) if order == "backwards" else sent:
                line.push_inbox(world, 0, i)
            assert emptied(line, world) == list(range(count))

        return lines_of(work)

    assert effort(400) < 2.5 * effort(200)


def test_a_long_queue_makes_a_request_no_harder_to_route_by_kv(loop: Any, line: Any) -> None:
    """Five tokens take two blocks of four: the replica with nobody has the larger free share."""

    def effort(count: int) -> int:
        world = empty_world(np.arange(float(count)))
        for i in range(count):
            line.push_inbox(world, 0, i)
        assert world.replicas[0].queued_blocks == 2 * count

        def work() -> None:
            assert loop.least_loaded(world, True) == 1

        return lines_of(work)

    assert effort(300) == effort(3)
