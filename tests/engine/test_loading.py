"""Weights on their way: a disk and a link are shared by the replicas of a host."""

from __future__ import annotations

import polars as pl
import pytest

from helios_sim.policy.registry import make_policy
from helios_sim.profile import Link
from tests.engine.factories import (
    DOMAINS,
    both_models,
    drifting_requests,
    drifting_setup,
    play,
    play_policy,
    requests_of,
    snapshots_of,
)

HELD = (("small", 4), ("large", 8))
"""The two models with all their layers."""


def ready_times(replicas_per_host: int, weights_start: str) -> tuple[list[float], float, float]:
    """When each of two replicas' first weights are there, and the seconds on disk and link."""
    fleet = {
        "num_replicas": 2,
        "replicas_per_host": replicas_per_host,
        "weights_start": weights_start,
    }
    run, _ = play(drifting_setup(fleet=fleet), drifting_requests(20), "vanilla")
    served = run.decisions[0].assignment
    num_bytes = run.setup.profile.model(served.model).model.weight_bytes(served.depth)
    loading = run.setup.profile.loading
    disk_s = loading.disk.alpha_s + num_bytes / loading.disk.bytes_per_s
    link_s = loading.host.alpha_s + num_bytes / loading.host.bytes_per_s
    ready = [entry.ready_s for entry in sorted(run.decisions, key=lambda e: e.replica)]
    return [float(at) for at in ready if at is not None], disk_s, link_s


def test_one_read_from_disk_serves_both_replicas_and_the_link_takes_them_in_turn() -> None:
    """The second replica waits for the first one's read, and then for the link."""
    ready, disk_s, link_s = ready_times(2, "disk")
    assert ready == pytest.approx([disk_s + link_s, disk_s + 2 * link_s])


def test_replicas_on_hosts_of_their_own_do_not_wait_for_each_other() -> None:
    ready, disk_s, link_s = ready_times(1, "disk")
    assert ready == pytest.approx([disk_s + link_s, disk_s + link_s])


def test_weights_in_host_memory_need_the_link_alone() -> None:
    ready, _, link_s = ready_times(2, "host")
    assert ready == pytest.approx([link_s, 2 * link_s])


def test_two_models_are_read_from_one_disk_one_after_the_other() -> None:
    """The large model waits for the small one's read, while the link is free by then."""
    fleet = {"num_replicas": 2, "replicas_per_host": 2}
    # The run asks one policy what all have in common, and then each replica has its own.
    models = iter(["small", "small", "large"])
    setup = drifting_setup(fleet=fleet, profile=both_models(host=Link(0.01, 1e9)))
    run, _ = play_policy(
        setup, drifting_requests(20), lambda: make_policy("vanilla", {"model": next(models)})
    )
    loading, profile = setup.profile.loading, setup.profile
    num_bytes = [profile.model(name).model.weight_bytes(depth) for name, depth in HELD]
    read_s = [loading.disk.alpha_s + one / loading.disk.bytes_per_s for one in num_bytes]
    moved_s = [loading.host.alpha_s + one / loading.host.bytes_per_s for one in num_bytes]
    small, large = sorted(run.decisions, key=lambda entry: entry.replica)
    assert small.ready_s == pytest.approx(read_s[0] + moved_s[0])
    assert large.ready_s == pytest.approx(read_s[0] + read_s[1] + moved_s[1])


@pytest.mark.parametrize("weights_start", ["disk", "host"])
def test_a_policy_is_told_of_the_whole_read_and_of_the_layers_that_the_link_takes(
    weights_start: str,
) -> None:
    """A model is read whole, however few of its layers are loaded, unless memory holds it."""
    setup = drifting_setup(fleet={"weights_start": weights_start})
    run, _ = play(setup, drifting_requests(20), "vanilla")
    told, loading = snapshots_of(run.decisions)[0], run.setup.profile.loading
    for candidate in told.candidates:
        read_s = loading.disk.alpha_s + candidate.weight_bytes[-1] / loading.disk.bytes_per_s
        if weights_start == "host":
            read_s = 0.0
        expected = [
            read_s + loading.host.alpha_s + one / loading.host.bytes_per_s
            for one in candidate.weight_bytes
        ]
        assert told.load_s[candidate.name] == pytest.approx(expected)


@pytest.mark.parametrize("weights_start", ["disk", "host"])
def test_the_timeline_names_no_model_before_one_is_loaded(weights_start: str) -> None:
    """While the first weights come in, it says so and does not name a candidate."""
    setup = drifting_setup(fleet={"num_replicas": 2, "weights_start": weights_start})
    run, data = play(setup, drifting_requests(20), "vanilla")
    for replica in range(2):
        entry = next(entry for entry in run.decisions if entry.replica == replica)
        mine = data.timeline.filter(pl.col("replica") == replica)
        before = mine.filter(pl.col("time_s") <= entry.ready_s)
        after = mine.filter(pl.col("time_s") > entry.ready_s)
        assert before["state"].to_list() == ["loading"]
        assert before["model"].to_list() == [None]
        assert set(after["model"]) == {entry.assignment.model}
        assert after["depth"].min() == entry.assignment.depth


def test_the_timeline_shows_who_waits_for_the_first_weights() -> None:
    """Three requests are there before the weights are, a fourth comes a minute later."""
    requests = requests_of([0.0, 0.0, 1e-3, 60.0], [5] * 4, [2] * 4, domains=DOMAINS)
    _, data = play(drifting_setup(fleet={"weights_start": "disk"}), requests, "vanilla")
    loading = data.timeline.filter(pl.col("state") == "loading")
    assert loading["waiting"].to_list() == [3]


def test_the_timeline_counts_who_came_within_the_iteration_that_ends_an_interval() -> None:
    """One runs alone, another comes while it does."""
    requests = requests_of([1.0, 1.0 + 1e-6], [5] * 2, [3] * 2, domains=DOMAINS)
    _, data = play(drifting_setup(timeline_interval_s=1e-4), requests, "vanilla")
    assert data.timeline.filter(pl.col("tokens") > 0)["waiting"][0] == 1
