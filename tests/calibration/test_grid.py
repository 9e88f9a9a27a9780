"""The grid within a budget: complete, coarser where time is short, in random order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.measuring import grid
from calibration.measuring.grid import (
    LEAST_CONTEXT,
    REACH,
    RICHNESS,
    Bounds,
    Job,
    Probe,
    geometric,
    in_turn,
    job_from,
    plan_energy,
    plan_latency,
    powers_of_two,
    ragged_lengths,
    timing_s,
)
from calibration.measuring.plan_file import Grid, ModelPlan
from calibration.measuring.readings import LEAST_DECODE_WINDOWS

BOUNDS = Bounds("tiny", (3, 6, 12), 64, 1024, 64 * 1024, 2048, ("eager", "graph"))
PROBE = Probe(1e-3, 1e-5, 1e-8, 1e-3, 1e-6, 1e-4, 1e-6)


def estimate_s(job: Job) -> float:
    shares = [depth / 12 for depth in job.depths] or [1.0]
    return timing_s(
        (PROBE.pass_s(job, share) for share in shares), lambda pass_s: max(0.005, pass_s)
    )


def latency(allowed_s: float, bounds: Bounds = BOUNDS) -> tuple[Job, ...]:
    return plan_latency(bounds, estimate_s, allowed_s, 2 * allowed_s, seed=0).jobs


def decodes_eagerly(job: Job) -> bool:
    return job.mode == "eager" and not job.prompt_tokens


def test_a_longer_budget_gives_a_finer_grid_and_both_fit() -> None:
    short, long = latency(20.0), latency(300.0)
    assert len(short) < len(long)
    assert sum(map(estimate_s, short)) <= 20.0
    assert sum(map(estimate_s, long)) <= 300.0


def test_every_round_covers_the_whole_grid_once() -> None:
    jobs = latency(300.0)
    rounds: dict[int, set[Job]] = {}
    for job in jobs:
        rounds.setdefault(job.trial, set()).add(job_from({**job.as_dict(), "trial": 0}))
    assert len(rounds) > 1
    eager = {job for found in rounds.values() for job in found if decodes_eagerly(job)}
    assert eager < rounds[len(rounds) - 1]
    assert len({frozenset(found - eager) for found in rounds.values()}) == 1
    trials = [job.trial for job in jobs]
    assert trials == sorted(trials)


@pytest.mark.parametrize("allowed_s", [0.01, 300.0])
def test_where_graphs_serve_eager_decodes_are_few_and_can_be_fitted(allowed_s: float) -> None:
    eager = [job for job in latency(allowed_s) if decodes_eagerly(job)]
    assert {job.quantity for job in eager} == {"decode_layers", "iteration"}
    assert {job.purpose for job in eager} == {"fit"}
    assert all(job.context_tokens == job.longest_tokens for job in eager)
    assert len({job.batch for job in eager}) == 3
    assert len({job.context_tokens for job in eager}) >= 2
    assert len(eager) < 16
    alone = [job for job in latency(allowed_s, replace(BOUNDS, modes=("eager",)))]
    replayed = {replace(job, mode="eager") for job in latency(allowed_s) if job not in eager}
    assert allowed_s > 1.0 or set(alone) == replayed


def test_trials_are_in_random_order_and_the_same_for_one_seed() -> None:
    jobs = [job for job in latency(300.0) if job.trial == 0]
    loads = [(job.quantity, job.batch or 0) for job in jobs]
    assert loads != sorted(loads)
    assert latency(60.0) == latency(60.0)


def test_no_two_trials_share_a_reading() -> None:
    keys = [key for job in latency(300.0) for key in job.keys]
    assert len(keys) == len(set(keys))


def test_the_grid_holds_every_quantity_ragged_rows_and_held_out_loads() -> None:
    jobs = latency(100.0)
    assert {job.quantity for job in jobs} == {
        "decode_layers",
        "prefill_layers",
        "iteration",
        "head",
        "check",
        "kv_fill",
        "exit_iteration",
        "split_iteration",
    }
    assert any(job.longest_tokens != job.context_tokens for job in jobs if not job.prompt_tokens)
    held_out = [job for job in jobs if job.purpose == "held-out"]
    wanted = {"decode_layers", "prefill_layers", "exit_iteration", "split_iteration"}
    assert {job.quantity for job in held_out} >= wanted
    assert any(job.prompt_tokens and job.context_tokens for job in jobs)


@pytest.mark.parametrize("allowed_s", [0.01, 20.0, 300.0])
def test_ragged_rows_are_fitted_beside_even_ones_of_the_same_mean(allowed_s: float) -> None:
    jobs = [job for job in latency(allowed_s) if job.quantity == "decode_layers"]
    fitted = {
        (job.batch, job.context_tokens, job.longest_tokens): job.depths
        for job in jobs
        if job.purpose == "fit"
    }
    for batch in {job.batch for job in jobs if job.purpose == "fit"} - {1}:
        ragged = {
            mean: longest
            for rows, mean, longest in fitted
            if rows == batch and mean is not None and longest != mean
        }
        assert len(ragged) == 2
        assert max(ragged) == BOUNDS.max_context // 2
        for mean, longest in ragged.items():
            assert longest == 2 * mean - LEAST_CONTEXT - REACH
            for load in ((batch, mean, mean), (batch, mean, longest)):
                assert fitted[load] == BOUNDS.depths


@pytest.mark.parametrize("max_context", [2, 3, 6, 40, 64, 1024])
def test_what_is_served_has_room_to_grow_beyond_its_mean_and_to_begin_below_it(
    max_context: int,
) -> None:
    bounds = replace(BOUNDS, max_context=max_context, pool_tokens=BOUNDS.max_batch * max_context)
    energy = plan_energy(bounds, window_s=5.0, allowed_s=700.0, seed=0).jobs
    jobs = [job for job in (*latency(300.0, bounds), *energy) if not job.prompt_tokens]
    served = [job for job in jobs if "iteration" in job.quantity]
    assert served
    for job in served:
        mean, longest = job.context_tokens or 0, job.longest_tokens or 0
        assert mean >= LEAST_CONTEXT
        assert longest <= max(LEAST_CONTEXT, max_context - REACH)
        if longest > mean:
            assert 2 * mean - longest >= LEAST_CONTEXT + REACH
    assert max(job.longest_tokens or 0 for job in jobs) == max_context


@pytest.mark.parametrize("allowed_s", [0.01, 300.0])
def test_several_prompts_are_fitted_shallow_and_deep_beside_their_layers(allowed_s: float) -> None:
    jobs = [job for job in latency(allowed_s) if job.prompt_tokens and job.purpose == "fit"]
    loads = {
        quantity: {
            (job.batch, job.prompt_tokens, job.depths) for job in jobs if job.quantity == quantity
        }
        for quantity in ("iteration", "prefill_layers")
    }
    assert loads["iteration"] <= loads["prefill_layers"]
    assert {batch for batch, _, _ in loads["iteration"]} >= {1, 2, 4, 8}
    assert all(depths == (3, 12) for _, _, depths in loads["iteration"])


@pytest.mark.parametrize("allowed_s", [0.01, 300.0])
def test_even_the_coarsest_grid_holds_out_enough(allowed_s: float) -> None:
    jobs = [job for job in latency(allowed_s) if job.purpose == "held-out" and job.trial == 0]
    decodes = [job for job in jobs if not job.prompt_tokens and job.mode == "graph"]
    assert len(decodes) >= 12
    assert sum(job.longest_tokens != job.context_tokens for job in decodes) >= 4
    assert len([job for job in jobs if job.prompt_tokens]) >= 6


def test_the_pool_bounds_every_load() -> None:
    small = Bounds("tiny", (3, 6), 64, 1024, 4096, 512)
    for job in latency(100.0, small):
        if not job.prompt_tokens:
            assert (job.batch or 0) * (job.longest_tokens or 0) <= 4096
        else:
            assert (job.batch or 0) * job.prompt_tokens <= 512


def test_energy_windows_of_the_longest_rows_have_only_as_many_as_the_pool_holds() -> None:
    small = replace(BOUNDS, max_batch=8, max_context=500, pool_tokens=1000)
    jobs = plan_energy(small, window_s=5.0, allowed_s=700.0, seed=0).jobs
    loads = {(job.batch or 0, job.longest_tokens or 0) for job in jobs if not job.prompt_tokens}
    assert (2, 500) in loads
    assert max(batch * longest for batch, longest in loads) <= 1000


def test_a_point_that_would_eat_the_budget_is_left_out_and_told() -> None:
    plan = plan_latency(
        BOUNDS,
        lambda job: 1000.0 if (job.batch or 0) >= 64 else 0.1,
        allowed_s=100.0,
        budget_s=200.0,
        seed=0,
    )
    assert all((job.batch or 0) < 64 for job in plan.jobs)
    assert any("batch 64" in note for note in plan.notes)


def test_a_budget_of_nothing_still_gets_the_coarsest_grid() -> None:
    jobs = latency(0.01)
    assert jobs
    assert max(job.trial for job in jobs) == RICHNESS[-1].trials - 1


def test_energy_windows_fill_the_time_and_separate_layers_rows_and_context() -> None:
    plan = plan_energy(BOUNDS, window_s=5.0, allowed_s=70.0, seed=0)
    assert plan.seconds <= 70.0
    decodes = [job for job in plan.jobs if not job.prompt_tokens and job.depths]
    assert {job.quantity for job in decodes} == {"iteration_energy", "decode_energy"}
    assert len({job.depths for job in decodes}) >= 2
    assert len({job.batch for job in decodes}) >= 2
    assert len({job.context_tokens for job in decodes}) >= 2
    assert all(len(job.depths) <= 1 for job in plan.jobs)
    thrice = plan_energy(BOUNDS, window_s=5.0, allowed_s=700.0, seed=0)
    assert max(job.trial for job in thrice.jobs) == 2


@given(
    allowed_s=st.floats(0.0, 200.0),
    max_batch=st.sampled_from((4, 16, 64)),
    depths=st.sampled_from(((8,), (4, 8), (2, 4, 6, 8))),
)
def test_windows_that_find_room_are_enough_for_a_fit(
    allowed_s: float, max_batch: int, depths: tuple[int, ...]
) -> None:
    """However short the time, there are four different decodes among them, or none at all."""
    bounds = replace(BOUNDS, max_batch=max_batch, depths=depths)
    jobs = plan_energy(bounds, window_s=4.0, allowed_s=allowed_s, seed=0).jobs
    decodes = {
        (job.quantity, job.depths, job.batch, job.context_tokens)
        for job in jobs
        if job.depths and not job.prompt_tokens
    }
    assert bool(jobs) == (allowed_s >= 16.0)
    assert not jobs or len(decodes) >= LEAST_DECODE_WINDOWS


def test_energy_windows_come_before_timings() -> None:
    energy = plan_energy(BOUNDS, window_s=5.0, allowed_s=300.0, seed=0).jobs
    timings = latency(60.0)
    planned = in_turn(energy, timings, 0)
    assert sorted(map(str, planned)) == sorted(map(str, (*energy, *timings)))
    first = sum(job.trial == 0 and job.purpose == "fit" for job in energy)
    assert all(job.quantity.endswith("_energy") for job in planned[:first])
    assert planned[first].trial == 0
    trials = [job.trial for job in planned[first:]]
    assert trials == sorted(trials)


def test_a_first_round_that_is_cut_short_has_every_quantity() -> None:
    """One job of each comes before a second of any; what is held out comes after all of them."""
    planned = in_turn((), latency(60.0), 0)
    first = [job for job in planned if job.trial == 0]
    fitted = [job.quantity for job in first if job.purpose == "fit"]
    assert [job.purpose for job in first[: len(fitted)]] == ["fit"] * len(fitted)
    kinds = set(fitted)
    for turn in range(3):
        for quantity in kinds:
            wanted = min(turn + 1, fitted.count(quantity))
            assert fitted[: (turn + 1) * len(kinds)].count(quantity) >= wanted


@pytest.mark.parametrize("allowed_s", [0.01, 300.0])
def test_decodes_that_are_timed_eagerly_beside_graphs_come_last(allowed_s: float) -> None:
    """What is held out comes before them: without it nobody knows whether a fit keeps its bars."""
    planned = in_turn((), latency(allowed_s), 0)
    eager = [job for job in planned if decodes_eagerly(job)]
    assert eager and planned[-len(eager) :] == tuple(eager)
    alone = in_turn((), latency(0.01, replace(BOUNDS, modes=("eager",))), 0)
    assert alone[-1].purpose == "held-out"


@pytest.mark.parametrize("max_batch", [1, 2, 4, 64])
def test_splits_have_three_batches_where_there_are_as_many(max_batch: int) -> None:
    bounds = replace(BOUNDS, max_batch=max_batch, pool_tokens=max_batch * 1024)
    jobs = latency(0.01, bounds)
    split = {job.batch for job in jobs if job.quantity == "split_iteration"} - {None}
    fitted = {
        job.batch for job in jobs if job.quantity == "split_iteration" and job.purpose == "fit"
    }
    assert len(fitted) == min(3, max_batch - 1)
    assert all(1 < batch <= max_batch for batch in split)
    without = latency(0.01, replace(bounds, can_split=False))
    assert not any(job.quantity == "split_iteration" for job in without)


def test_too_little_time_for_energy_is_said() -> None:
    plan = plan_energy(BOUNDS, window_s=5.0, allowed_s=10.0, seed=0)
    assert plan.jobs == ()
    assert "no time for energy" in plan.notes[0]


def test_ragged_rows_have_exactly_the_mean_and_the_longest_asked_for() -> None:
    for batch in (2, 3, 8, 33):
        lengths = ragged_lengths(batch, 100, 180, seed=batch)
        assert len(lengths) == batch
        assert sum(lengths) == 100 * batch
        assert max(lengths) == 180
        assert min(lengths) >= 1
    assert ragged_lengths(1, 7, 12, seed=0) == [7]
    with pytest.raises(ValueError, match="cannot be ragged"):
        ragged_lengths(2, 10, 20, seed=0)


def test_timing_takes_the_samples_wanted_two_to_find_repetitions_and_the_warm_ups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grid, "SAMPLES", 3)
    monkeypatch.setattr(grid, "WARMUPS", 1)
    assert timing_s((1.0, 2.0), lambda pass_s: 10.0 * pass_s) == 5 * (10.0 + 20.0) + 1.0 + 2.0


def test_axes_hold_both_ends() -> None:
    assert geometric(32, 1024, 6) == (32, 64, 128, 256, 512, 1024)
    assert geometric(32, 32, 4) == (32,)
    assert powers_of_two(64, 8) == (1, 2, 4, 8, 16, 32, 64)
    assert powers_of_two(48, 3) == (1, 8, 48)


def test_a_job_survives_its_file() -> None:
    for job in latency(20.0):
        assert job_from(job.as_dict()) == job


def test_a_pass_takes_its_share_of_the_layers_and_what_an_iteration_has_beside() -> None:
    probe = Probe(
        decode_s=1.0,
        decode_s_per_row=0.1,
        decode_s_per_context_token=0.01,
        prefill_s=2.0,
        prefill_s_per_token=0.001,
        head_s=0.3,
        head_s_per_row=0.03,
        host_s=0.5,
        host_s_per_row=0.05,
    )
    load = {"batch": 2, "context_tokens": 10, "longest_tokens": 20}
    layers_s, asked_s, host_s = 1.0 + 0.2 + 0.4, 0.36, 0.6
    for quantity, expected_s in (
        ("decode_layers", 0.25 * layers_s),
        ("iteration", 0.25 * layers_s + asked_s + host_s),
        ("exit_iteration", 0.25 * layers_s + asked_s + host_s),
        # Both halves together run all layers, in two passes.
        ("split_iteration", layers_s + 2 * (asked_s + host_s)),
        ("head", asked_s),
    ):
        assert probe.pass_s(Job(quantity, **load), 0.25) == pytest.approx(expected_s), quantity
    prompts = Job("prefill_layers", batch=2, context_tokens=0, prompt_tokens=100)
    assert probe.pass_s(prompts, 0.5) == pytest.approx(0.5 * (2.0 + 0.2))


def test_a_plan_needs_as_many_layers_as_its_deepest_trial() -> None:
    jobs = (Job("decode_layers", depths=(3, 12)), Job("kv_fill", depths=(6,)), Job("head"))
    assert ModelPlan((3, 6, 12), Grid(4, 64), Grid(4, 64), jobs).deepest == 12
    assert ModelPlan((3, 6, 12), Grid(4, 64), Grid(4, 64), jobs[2:]).deepest == 0
