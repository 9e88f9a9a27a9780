"""Joules of what is served, told from few windows of a device that waits for its host."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest

from calibration.fitting.fit_energy import EnergyFit, fit_energy
from calibration.fitting.fit_times import Number
from calibration.fitting.points import WHOLE_WINDOWS, gather
from calibration.measuring.grid import Bounds, Job, plan_energy
from calibration.measuring.readings import SCHEMA
from helios_sim import cost
from tests.calibration import planted

IDLE_W, WAITING_W, WORKING_W = 120.0, 125.0, 200.0
LAYERS, NOISE = 12, 0.01
HOST_S, HOST_S_PER_ROW = 2.5e-4, 6.0e-6
BOUNDS = Bounds("planted", (3, 6, 12), 64, 1024, 64 * 1024, 2048, ("eager", "graph"))
LIMIT = Number(None, "unavailable", "no board")


def work_of(job: Job, depth: int) -> tuple[float, float, float]:
    """Seconds that the device works and waits, and joules, of a made-up GPU.

    It draws other watts at work than while it waits, and layers take the larger of a launch and
    of their bytes: no sum of the fitted terms.
    """
    batch = job.batch or 1
    working_s, waiting_s, joules = 0.0, 0.0, 0.0
    if job.prompt_tokens:
        tokens = batch * job.prompt_tokens
        working_s = depth * max(4e-5, 5e-7 * tokens)
        # Prompts are launched one operator after another.
        waiting_s = max(0.0, depth * 6e-5 - working_s)
        joules = depth * (4e-4 + 2e-5 * tokens)
    elif job.quantity != "head_energy":
        read = 3.2e6 + 2048.0 * batch * (job.context_tokens or 0)
        working_s = depth * max(2.2e-5, 6e-6 + read / 2.5e12)
        joules = depth * (4e-11 * read + 1.6e-6 * batch)
    if job.quantity in ("head_energy", "iteration_energy"):
        working_s += 8e-6
        joules += 4e-5 + 5e-7 * batch
    if job.quantity == "iteration_energy":
        waiting_s += HOST_S + HOST_S_PER_ROW * batch
    joules += WORKING_W * working_s + WAITING_W * waiting_s
    return working_s, waiting_s, joules


def fit(jobs: list[Job], seed: int) -> EnergyFit:
    """What a meter with noise makes of windows."""
    random = np.random.default_rng(seed)
    readings = []
    for job in jobs:
        (depth,) = job.depths or (0,)
        working_s, waiting_s, joules = work_of(job, depth)
        joules *= float(np.exp(NOISE * random.standard_normal()))
        readings.append(job.reading(depth or None, seconds=working_s + waiting_s, joules=joules))
    points = gather(pl.DataFrame([asdict(reading) for reading in readings], schema=SCHEMA))
    return fit_energy(points, planted.model(), IDLE_W, LIMIT, "no meter")


def errors(found: EnergyFit) -> list[float]:
    """Relative errors of decode iterations off the windows' loads, their seconds known."""
    numbers = {name: number.value or 0.0 for name, number in found.numbers.items()}
    c = planted.array(numbers | {"power.limit_w": 700.0})
    off = []
    for depth in (3, 6, 12):
        for rows in (1, 3, 10, 30, 60):
            for context in (40, 200, 900):
                job = Job("iteration_energy", batch=rows, context_tokens=context)
                working_s, waiting_s, joules = work_of(job, depth)
                held = rows * context
                told = cost.decode_joules(
                    c, rows, held, held, depth, 0, 1, 0, rows, working_s + waiting_s
                )
                off.append(told / joules - 1.0)
    return off


def planned(count: int) -> list[Job]:
    """The first windows of a plan."""
    return list(plan_energy(BOUNDS, window_s=1.0, allowed_s=float(count), seed=0).jobs)


@pytest.mark.parametrize("count", [4, 6, 10, 30])
def test_planned_windows_tell_the_joules_of_whole_iterations(count: int) -> None:
    found = np.abs([errors(fit(planned(count), seed)) for seed in range(8)])
    assert np.median(found) < 0.02
    assert np.quantile(found, 0.95) < 0.08


def test_stacks_alone_take_the_power_of_a_device_at_work_for_that_of_one_that_waits() -> None:
    """Why windows are of whole iterations: from stacks power and work are not told apart."""
    stacks = [
        replace(job, quantity=job.quantity.replace("iteration", kind))
        for job in planned(10)
        for kind in ("prefill" if job.prompt_tokens else "decode",)
    ]
    assert np.median([errors(fit(stacks, seed)) for seed in range(8)]) > 0.1


def test_a_head_in_an_iteration_counts_as_its_share_of_a_layer_where_none_was_measured() -> None:
    without = fit(planned(4), 0)
    assert {job.quantity for job in planned(4)} == {"iteration_energy"}
    head, layer = (without.numbers[name] for name in ("head.j_base", "decode.j_per_layer"))
    shape = planted.model().shape
    share = shape.vocab * shape.hidden / shape.layer_params()
    assert head.grade == "derived"
    assert head.value == pytest.approx(share * (layer.value or 0.0))
    assert fit(planned(10), 0).numbers["head.j_base"].grade == "measured"


def test_windows_that_no_fit_sees_are_planned_where_there_is_time_and_judged() -> None:
    held_out = [job for job in planned(20) if job.purpose == "held-out"]
    assert {job.quantity for job in held_out} == {"iteration_energy"}
    assert {bool(job.prompt_tokens) for job in held_out} == {False, True}
    found = fit(planned(20), 0).record["errors"]
    assert found["held_out"]["n"] == len(set(held_out))
    assert found["held_out"]["median"] < 0.1


def test_whole_iterations_with_and_without_prompts_are_two_quantities() -> None:
    readings = [job.reading(12, seconds=1.0, joules=200.0) for job in planned(6)]
    points = gather(pl.DataFrame([asdict(reading) for reading in readings], schema=SCHEMA))
    for quantity, has_prompts in zip(WHOLE_WINDOWS, (False, True), strict=True):
        tokens = points.filter(pl.col("quantity") == quantity)["prompt_tokens"]
        assert len(tokens) > 0
        assert (tokens.fill_null(0) > 0).to_list() == [has_prompts] * len(tokens)
