"""What a played run amounts to: its timeline line by line, and its sums over replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helios_sim import outcome
from helios_sim.loop.state import TIMELINE_CAPACITY
from tests.engine.factories import (
    DOMAINS,
    both_models,
    drifting_requests,
    drifting_setup,
    play,
    profile_of,
    requests_of,
    setup_of,
    thumbnail,
    traces_from,
)


def test_a_timeline_tells_after_each_iteration_what_waits_runs_and_is_drawn() -> None:
    """Three requests one after the other, each a prefill of 5 tokens and 3 decodes, in blocks of 4.

    All wait while the weights come. With its last token a request has left, and the next one has
    not joined yet.
    """
    setup = drifting_setup(max_batch=1, timeline_interval_s=0.001)
    requests = requests_of([0.0] * 3, [5] * 3, [4] * 3, domains=DOMAINS)
    _, data = play(setup, requests, "vanilla")
    timeline = data.timeline
    assert timeline["state"].to_list() == ["loading", *["serving"] * 11, "idle"]
    assert timeline["waiting"].to_list() == [3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]
    assert timeline["kv_blocks_used"].to_list() == [0, *[2, 2, 2, 0] * 3]
    assert timeline["kv_blocks"].to_list() == [0, *[setup.pool_blocks("large", 8)] * 12]
    assert timeline["tokens"].to_list() == [0, *[1] * 12]
    assert timeline["mean_running"].to_list() == pytest.approx([0.0, *[1.0] * 12])
    ends_s = timeline["time_s"].to_list()
    assert ends_s[1::4] == data.requests["first_token_s"].to_list()
    assert ends_s[4::4] == data.requests["finished_s"].to_list()
    # Loading draws 80 W; a decode takes 10 + 8 x 10 + 5 ms at 100 W, 1.5 J a layer and 0.5 J.
    powers_w = timeline["power_w"].to_list()
    assert powers_w[0] == pytest.approx(80.0)
    assert powers_w[2] == pytest.approx(100.0 + (8 * 1.5 + 0.5) / 0.095)
    assert sum(
        power_w * seconds for power_w, seconds in zip(powers_w, timeline["interval_s"], strict=True)
    ) == pytest.approx(data.totals.energy_j)
    # Whoever runs holds two blocks from the prompt on.
    served_s = data.totals.depth_seconds["large@8"]
    use = 2 * data.totals.busy_s / (setup.pool_blocks("large", 8) * served_s)
    assert data.totals.mean_kv_use == pytest.approx(use)


def test_versions_are_looked_up_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a package's version takes as long as a short run does."""
    asked: list[str] = []
    look_up = outcome.version

    def counting(name: str) -> str:
        asked.append(name)
        return look_up(name)

    monkeypatch.setattr(outcome, "version", counting)
    outcome._versions.cache_clear()
    environments = [
        play(drifting_setup(), drifting_requests(2), "vanilla")[1].environment for _ in range(2)
    ]
    assert environments[0]["versions"] == environments[1]["versions"]
    assert environments[0]["versions"]["polars"] == look_up("polars")
    assert len(asked) == len(set(asked)) > 0


def test_of_the_lines_of_one_instant_the_last_is_kept() -> None:
    """An iteration ends, then its rows are preempted, and weights come in place of them."""
    setup = drifting_setup(on_change="recompute", overlap_loads=False, timeline_interval_s=0.001)
    _, data = play(setup, drifting_requests(60, rate_per_s=20.0), "always", reassess_requests=10)
    timeline = data.timeline
    assert timeline["time_s"].is_unique().all()
    before = [place - 1 for place in (timeline["state"] == "loading").arg_true()[1:]]
    assert sum(timeline["waiting"][place] > 0 for place in before) > 1
    assert [timeline["kv_blocks_used"][place] for place in before] == [0] * len(before)


def test_a_full_timeline_goes_on_at_half_its_resolution() -> None:
    """A decode takes 55 ms, so that a line is due after each; then one is due every 80 ms."""
    model = thumbnail("small", (2, 4), max_positions=10_000)
    setup = setup_of(
        profile_of(model, memory_bytes=3_000_000),
        traces_from({"small": [[0.9, 0.9]] * 2}, {"small": (2, 4)}),
        timeline_interval_s=0.04,
    )
    num_tokens = TIMELINE_CAPACITY + 404
    _, data = play(setup, requests_of([0.0], [5], [num_tokens]), "vanilla")
    timeline = data.timeline
    # Of two lines the later one stays, so that what loading drew is still a line of its own.
    assert timeline["state"].to_list().index("serving") == 1
    assert timeline["power_w"][0] == pytest.approx(80.0)
    assert timeline["tokens"].sum() == num_tokens
    assert timeline["time_s"][-1] == data.totals.end_s
    halved, later = timeline[1 : TIMELINE_CAPACITY // 2], timeline[TIMELINE_CAPACITY // 2 :]
    assert set(halved["tokens"]) == {2}
    assert timeline["tokens"][TIMELINE_CAPACITY // 2] == 1
    assert set(later["tokens"]) == {1, 2}
    assert later["interval_s"].mean() == pytest.approx(0.08, rel=0.02)


def test_a_fleet_s_gpus_are_those_of_all_its_replicas() -> None:
    profile = both_models()
    of_two = replace(profile, device=replace(profile.device, num_gpus=2))
    setup = drifting_setup(profile=of_two, fleet={"num_replicas": 3})
    _, data = play(setup, drifting_requests(6), "vanilla")
    assert (data.totals.num_replicas, data.totals.num_gpus) == (3, 6)
