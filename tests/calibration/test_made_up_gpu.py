"""From what is measured a fit tells what is served, on a GPU that is no sum of its terms."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from calibration.fitting.fit_energy import EnergyFit, fit_energy
from calibration.fitting.fit_times import Number, fit_times, model_profile
from calibration.fitting.points import LEAVING
from calibration.fitting.predict import Predictor
from calibration.measuring.grid import Job, plan_energy, plan_latency
from helios_sim import cost
from reports.made_up_gpu import device as made_up_gpu
from reports.made_up_gpu.device import BUCKETS, IDLE_W, MadeUpGpu
from tests.calibration import planted
from tests.calibration.made_up import LARGE, SMALL, model_of, points_of

MEDIAN_BAR, P95_BAR = 0.03, 0.08
COARSE_S, FINE_S = 1.0, 20.0
"""Budgets that give the coarsest grid, and a finer one."""


def latency_jobs(gpu: MadeUpGpu, allowed_s: float) -> list[Job]:
    """A grid of so many seconds, each stack of which takes a twentieth."""
    bounds = made_up_gpu.bounds_of(gpu.model)
    plan = plan_latency(bounds, lambda job: 0.05 * len(job.depths or (1,)), allowed_s, 1000.0, 0)
    # Capturing is timed otherwise, and ragged rows cost nothing more here.
    return list(plan.jobs)


def predictor_of(gpu: MadeUpGpu, jobs: list[Job], seed: int = 0) -> Predictor:
    """A fit to noisy readings."""
    found = fit_times(points_of(gpu, jobs, 0.004, seed), gpu.model, buckets=BUCKETS)
    profile = model_profile(
        gpu.model,
        found.numbers,
        found.buckets,
        found.batch_residual,
        found.hull,
        found.depth_residual,
    )
    return Predictor(profile, stack_overhead_s=found.overheads)


def errors(gpu: MadeUpGpu, predictor: Predictor) -> Mapping[str, np.ndarray]:
    """Relative errors of served iterations at loads off the grid, by kind."""
    draw = random.Random(5)
    found: dict[str, list[float]] = {}
    for _ in range(60):
        batch, mean = (round(np.exp(draw.uniform(*np.log(ends)))) for ends in ((1, 64), (40, 1500)))
        depth = draw.choice(gpu.exits)
        decode = {"mode": "graph", "batch": batch, "context_tokens": mean}
        prompts = {"mode": "eager", "batch": min(batch, 4), "context_tokens": 0}
        loads = [("iteration", decode), ("exit_iteration", decode)]
        if batch > 1 and depth < gpu.exits[-1]:
            loads.append(("split_iteration", decode))
        loads.append(("prefill_iteration", prompts | {"prompt_tokens": min(1000, mean)}))
        for quantity, load in loads:
            job = Job(quantity.removeprefix("prefill_"), depths=(depth,), **load)
            row = {"prompt_tokens": None, **load, "layers": depth, "quantity": quantity}
            seconds, _ = gpu.measured(job, depth)
            predicted = predictor.seconds(row)
            assert predicted is not None
            found.setdefault(quantity, []).append(abs(predicted / seconds - 1.0))
    return {quantity: np.array(off) for quantity, off in found.items()}


@pytest.mark.parametrize("allowed_s", [COARSE_S, FINE_S])
@pytest.mark.parametrize("slowness", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_a_planned_grid_tells_every_kind_of_iteration_within_the_bars(
    shape, slowness, allowed_s
) -> None:
    gpu = MadeUpGpu(model_of(shape), slowness)
    found = errors(gpu, predictor_of(gpu, latency_jobs(gpu, allowed_s)))
    for quantity, off in found.items():
        assert np.median(off) < MEDIAN_BAR, quantity
        assert np.quantile(off, 0.95) < P95_BAR, quantity


def test_parts_alone_do_not_tell_what_leaving_costs() -> None:
    """Why iterations whose rows leave are measured: filling beside the host, and splits."""
    gpu = MadeUpGpu(model_of(SMALL))
    parts = [job for job in latency_jobs(gpu, FINE_S) if job.quantity not in LEAVING]
    found = errors(gpu, predictor_of(gpu, parts))
    assert np.median(found["iteration"]) < MEDIAN_BAR
    assert np.median(found["split_iteration"]) > P95_BAR
    assert np.quantile(found["exit_iteration"], 0.95) > 0.05


def energy_jobs(gpu: MadeUpGpu, count: int) -> list[Job]:
    """The first windows of a plan."""
    bounds = made_up_gpu.bounds_of(gpu.model)
    return list(plan_energy(bounds, window_s=1.0, allowed_s=float(count), seed=0).jobs)


def energy_of(gpu: MadeUpGpu, jobs: list[Job], seed: int = 0) -> EnergyFit:
    """What a meter with noise makes of windows."""
    limit = Number(None, "unavailable", "no board")
    return fit_energy(points_of(gpu, jobs, 0.01, seed), gpu.model, IDLE_W, limit, "no meter")


def joule_errors(gpu: MadeUpGpu, jobs: list[Job]) -> np.ndarray:
    """Relative errors of decode iterations off the windows' loads, their seconds known."""
    off = []
    for seed in range(6):
        numbers = energy_of(gpu, jobs, seed).numbers
        values = {name: number.value or 0.0 for name, number in numbers.items()}
        c = planted.array(values | {"power.limit_w": 700.0})
        for depth in gpu.exits:
            for rows in (1, 2, 8, 32, 64):
                for mean in (40, 200, 900):
                    job = Job("iteration", mode="graph", batch=rows, context_tokens=mean)
                    seconds, joules = gpu.measured(job, depth)
                    held = rows * mean
                    told = cost.decode_joules(c, rows, held, held, depth, 0, 1, 0, rows, seconds)
                    off.append(told / joules - 1.0)
    return np.array(off)


@pytest.mark.parametrize("count", [4, 6, 10, 16])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_planned_windows_tell_the_joules_of_whole_iterations(shape, count: int) -> None:
    gpu = MadeUpGpu(model_of(shape))
    found = np.abs(joule_errors(gpu, energy_jobs(gpu, count)))
    assert np.median(found) < 0.02
    assert np.quantile(found, 0.95) < P95_BAR


def as_stacks(jobs: list[Job]) -> list[Job]:
    """The same windows of stacks of layers alone."""
    return [
        replace(job, quantity="prefill_energy" if job.prompt_tokens else "decode_energy")
        if job.quantity == "iteration_energy"
        else job
        for job in jobs
    ]


def test_stacks_alone_take_the_power_of_a_device_at_work_for_that_of_one_that_waits() -> None:
    """Why windows are of whole iterations: from stacks power and work are not told apart."""
    gpu = MadeUpGpu(model_of(SMALL))
    assert np.median(joule_errors(gpu, as_stacks(energy_jobs(gpu, 4)))) > 0.1


def test_a_head_in_an_iteration_counts_as_its_share_of_a_layer_where_none_was_measured() -> None:
    gpu = MadeUpGpu(model_of(SMALL))
    assert {job.quantity for job in energy_jobs(gpu, 4)} == {"iteration_energy"}
    numbers = energy_of(gpu, energy_jobs(gpu, 4)).numbers
    head, layer = numbers["head.j_base"], numbers["decode.j_per_layer"]
    share = SMALL.vocab * SMALL.hidden / SMALL.layer_params()
    assert head.grade == "derived"
    assert head.value == pytest.approx(share * (layer.value or 0.0))
    assert energy_of(gpu, energy_jobs(gpu, 10)).numbers["head.j_base"].grade == "measured"


def test_windows_that_no_fit_sees_are_planned_where_there_is_time_and_judged() -> None:
    gpu = MadeUpGpu(model_of(SMALL))
    jobs = energy_jobs(gpu, 20)
    held_out = [job for job in jobs if job.purpose == "held-out"]
    assert {job.quantity for job in held_out} == {"iteration_energy"}
    assert {bool(job.prompt_tokens) for job in held_out} == {False, True}
    found = energy_of(gpu, jobs).record["errors"]
    assert found["held_out"]["n"] == len(set(held_out))
    assert found["held_out"]["median"] < 0.1


def test_whole_iterations_with_and_without_prompts_are_two_quantities() -> None:
    gpu = MadeUpGpu(model_of(SMALL))
    points = points_of(gpu, energy_jobs(gpu, 6), 0.0)
    prompts = dict(zip(points["quantity"], points["prompt_tokens"].fill_null(0), strict=True))
    assert prompts.keys() == {"iteration_energy", "prefill_iteration_energy"}
    assert prompts["iteration_energy"] == 0
    assert prompts["prefill_iteration_energy"] > 0


def main() -> None:
    """Print medians and 95th percentiles of all kinds, in per cent."""
    for shape, slowness, allowed_s in product((SMALL, LARGE), (0.5, 1.0, 2.0), (COARSE_S, FINE_S)):
        gpu = MadeUpGpu(model_of(shape), slowness)
        jobs = latency_jobs(gpu, allowed_s)
        said = ", ".join(
            f"{quantity} {100 * np.median(off):.1f} {100 * np.quantile(off, 0.95):.1f}"
            for quantity, off in errors(gpu, predictor_of(gpu, jobs)).items()
        )
        print(f"{shape.layers} layers, host {slowness:g}, {len(jobs)} trials: {said}")
    gpu = MadeUpGpu(model_of(SMALL))
    windows = energy_jobs(gpu, 4)
    for kind, some in (("planned", windows), ("of stacks", as_stacks(windows))):
        off = 100 * np.abs(joule_errors(gpu, some))
        print(f"Joules, four windows {kind}: {np.median(off):.1f} {np.quantile(off, 0.95):.1f}")


if __name__ == "__main__":
    main()
