"""Real runs beside simulated ones: spreads, refusals, and errors traced to the ingredient."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from calibration.serving.record import iterations_table
from helios_sim import cli, cost
from helios_sim.engine import Run
from helios_sim.errors import InputError
from helios_sim.exits import ExitTraces, write_traces
from helios_sim.experiment import Experiment, prepare, run_policy
from helios_sim.fidelity import assess, charts, read_sides, run_folders, swaps
from helios_sim.fidelity.figures import figure_row, figure_rows, per_request, request_rows
from helios_sim.fidelity.page import render
from helios_sim.fidelity.recordings import (
    EXITS_FILE,
    ITERATIONS_FILE,
    Iterations,
    read_iterations,
)
from helios_sim.fidelity.replayed import replayed_run
from helios_sim.fidelity.sides import Side
from helios_sim.fidelity.swaps import (
    OTHER_TEXTS,
    Attribution,
    Chance,
    Swap,
    _pace_factor,
    attribute,
)
from helios_sim.fidelity.tables import attribution_table
from helios_sim.fidelity.timing import (
    Factors,
    factors,
    loads,
    predict,
    reloaded,
    retimed,
    timing_rows,
)
from helios_sim.fidelity.words import headline, name_of, remarks, signed_percent, spread_text
from helios_sim.outcome import run_data
from helios_sim.policy.contract import Event
from helios_sim.policy.registry import make_policy
from helios_sim.profile import ModelProfile, Profile
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import RunData, read_run, write_run
from helios_sim.scenario import parse_scenario, resolved
from helios_sim.workload.requests import Requests
from tests.calibration.clockwork import serve_by_clockwork
from tests.engine.factories import (
    PADDING,
    drifting_requests,
    drifting_setup,
    padding_models,
    play,
    policy_of,
    profile_of,
    thumbnail,
)
from tests.report.test_report import Open, in_chromium, open_page, text_of

__all__ = ["open_page"]

POLICIES: dict[str, dict[str, Any]] = {
    "static-depth": {"model": "opt-6.7b", "depth": 9},
    "ee-single": {"model": "opt-6.7b", "exit_mode": "wait"},
    "helios": {"reassess_requests": 60, "breach_limit": 20},
    # Of two candidates the other one answers every breach, whatever seconds say.
    "switch-only": {"reassess_requests": 60, "breach_limit": 20},
    "waiting": {"reassess_requests": 60, "breach_limit": 40},
}
"""Policies of the tests; `waiting` is HELIOS where serving waits for loads."""


def use_of(policy: str) -> str:
    """The shipped policy behind a name of the tests."""
    return "helios" if policy == "waiting" else policy


def question(policy: str, **changes: Any) -> dict[str, Any]:
    """A scenario of one policy at a moderate load, on chat that turns to code."""
    data: dict[str, Any] = {
        "name": f"fidelity {policy}",
        "seed": 7,
        "workload": {
            "num_requests": 240,
            "arrivals": {"kind": "gamma", "rate_per_s": 1.2, "cv": 1.5},
            "prompt": {"kind": "uniform", "min_tokens": 20, "max_tokens": 400},
            "output": {"kind": "uniform", "min_tokens": 8, "max_tokens": 120},
            "domains": [
                {"name": "chat", "shares": [[0, 1.0], [150, 0.0]]},
                {"name": "code", "shares": [[0, 0.0], [150, 1.0]]},
            ],
        },
        "fleet": {
            "profile": "opt-a100-40gb",
            "candidates": ["opt-1.3b", "opt-6.7b"],
            "weights_start": "host",
        },
        "serving": {"max_batch": 16, "overlap_loads": policy != "waiting"},
        "policy": [{"use": use_of(policy), "label": policy} | POLICIES[policy]],
    }
    return data | changes


@cache
def experiment_for(policy: str) -> Experiment:
    """The scenario of a policy, read."""
    return prepare(parse_scenario(question(policy), "test", Path()), Path())


def changed_profile(profile: Profile, change: Callable[[ModelProfile], ModelProfile]) -> Profile:
    """The profile with every model changed."""
    return replace(profile, models={name: change(one) for name, one in profile.models.items()})


def slower(model: ModelProfile) -> ModelProfile:
    """Decodes that take longer, the more so the larger the batch, and prefills that do too."""
    coefficients = {
        name: value * (1.5 if name.startswith("prefill") and "_s" in name else 1.0)
        for name, value in model.coefficients.items()
        if value is not None
    }
    knots = ((1.0, 1.15), (4.0, 1.3), (16.0, 1.5))
    return replace(model, coefficients=coefficients, batch_residual=knots)


def harder(traces: ExitTraces) -> ExitTraces:
    """Exits that are less confident, and texts that are less likely."""
    return replace(
        traces,
        confidence={name: one * np.float32(0.75) for name, one in traces.confidence.items()},
        nll_nats={name: one + np.float32(0.25) for name, one in traces.nll_nats.items()},
    )


MOVED_POSITIONS = 7


def moved(traces: ExitTraces) -> ExitTraces:
    """The same exits, each some positions later."""
    tables = ("confidence", "agrees", "nll_nats")
    return replace(
        traces,
        **{
            table: {
                name: np.roll(one, MOVED_POSITIONS, axis=1)
                for name, one in getattr(traces, table).items()
            }
            for table in tables
        },
    )


def iterations_on(profile: Profile, seed: int = 3) -> pl.DataFrame:
    """What a server on such a device would log: decodes of every batch, prefills, some slow."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows: list[dict[str, Any]] = []
    at_s = 1000.0
    for name, model in profile.models.items():
        c = model.coefficient_array()
        padded = model.padded_rows(16)
        for layers in model.model.exit_layers:
            residual = model.residual(16, layers)
            for batch in range(1, 17):
                for context in rng.integers(40, 500, 5) * batch:
                    seconds, _ = cost.decode_seconds(
                        c, padded[batch], float(context), float(context), float(layers), 0.0, 1.0,
                        0.0, padded[batch], float(batch), residual[batch],
                    )  # fmt: skip
                    rows.append(
                        {
                            "kind": "decode",
                            "rows": batch,
                            "context_tokens": int(context),
                            "longest_context_tokens": int(context) // batch,
                            "prompt_tokens": 0,
                            "seconds": float(seconds),
                        }
                        | {"model": name, "depth": layers, "layers": layers}
                    )
            for tokens in rng.integers(20, 400, 20):
                pairs = float(tokens) * (tokens + 1) / 2
                seconds, _ = cost.mixed_seconds(
                    c, 0.0, 0.0, 0.0, float(tokens), 0.0, pairs, float(layers), 0.0, 1.0, 1.0, 1.0
                )
                rows.append(
                    {
                        "kind": "prefill",
                        "rows": 1,
                        "context_tokens": 0,
                        "longest_context_tokens": 0,
                        "prompt_tokens": int(tokens),
                        "seconds": float(seconds),
                    }
                    | {"model": name, "depth": layers, "layers": layers}
                )
    for row in rows:
        # They stand after the run's end, where nobody is there: no pause is read from them.
        row["start_s"] = at_s
        at_s += row["seconds"]
    return pl.DataFrame(rows)


def serve(
    folder: Path,
    policy: str,
    *,
    profile: Profile | None = None,
    traces: ExitTraces | None = None,
    options: dict[str, Any] | None = None,
    change: Callable[[Requests], Requests] | None = None,
    iterations: pl.DataFrame | None = None,
    origin: str = "measured",
) -> Path:
    """Serve a scenario 'for real': simulate it on another device, and log what a server would."""
    experiment = experiment_for(policy)
    setup = experiment.setup
    setup = replace(setup, profile=profile or setup.profile, traces=traces or setup.traces)
    setup = replace(setup, seed=experiment.scenario.seed)
    requests, _ = experiment.requests(experiment.scenario.seed)
    requests = change(requests) if change is not None else requests
    given = POLICIES[policy] | (options or {})
    run = Run(setup, requests, lambda: make_policy(use_of(policy), given))
    run.play()
    plain = resolved(experiment.scenario) | {"seed": experiment.scenario.seed}
    data = run_data(run, policy, use_of(policy), experiment.scenario.seed, plain)
    data = replace(data, origin=origin)
    write_run(data, summarise(data), folder)
    write_traces(setup.traces, folder / EXITS_FILE)
    log = iterations_on(setup.profile) if iterations is None else iterations
    log.write_parquet(folder / ITERATIONS_FILE)
    return folder


@cache
def simulated_data(policy: str) -> RunData:
    """The simulated run of a policy's scenario."""
    experiment = experiment_for(policy)
    return run_policy(experiment, experiment.scenario.policy[0]).run


def simulate(folder: Path, policy: str) -> Path:
    """The simulated side, on disk."""
    run = simulated_data(policy)
    write_run(run, summarise(run), folder)
    return folder


PERTURBED: dict[str, dict[str, Any]] = {
    "times": {"profile": slower},
    "exits": {
        "traces": lambda traces: moved(harder(traces)),
        "change": lambda requests: replace(
            requests, trace_start=requests.trace_start + np.int32(MOVED_POSITIONS)
        ),
    },
    "arrivals": {"change": lambda requests: replace(requests, arrival_s=requests.arrival_s * 0.8)},
    "decisions": {"options": {"breach_limit": 60, "reassess_requests": 40}},
    "loads": {"loading": 3.0},
}


def perturbed(folder: Path, policy: str, ingredient: str) -> Path:
    """A real run that differs from the simulated one in one ingredient alone."""
    setup = experiment_for(policy).setup
    how = dict(PERTURBED[ingredient])
    if "profile" in how:
        how["profile"] = changed_profile(setup.profile, how["profile"])
    if "loading" in how:
        how["profile"] = reloaded(setup.profile, how.pop("loading"))
    if "traces" in how:
        how["traces"] = how["traces"](setup.traces)
    return serve(folder, policy, **how)


def attribution_of(real: Path, simulated: Path) -> Attribution:
    """What the error of a simulated run comes from."""
    found = assess(read_sides([real], simulated), Path()).attribution
    assert found is not None
    assert found.notes == ()
    return found


def errors(attribution: Attribution, swap: str) -> dict[str, float]:
    """The errors that a swap leaves."""
    chosen = next(one for one in attribution.swaps if one.name == swap)
    found = {key: attribution.error(chosen, key) for key in attribution.real}
    return {key: error for key, error in found.items() if error is not None}


@pytest.mark.parametrize(
    ("policy", "ingredient", "left"),
    [
        ("static-depth", "times", 0.05),
        ("ee-single", "times", 0.04),
        ("switch-only", "times", 0.02),
        ("ee-single", "exits", 1e-9),
        ("helios", "exits", 1e-9),
        ("static-depth", "arrivals", 1e-9),
        ("helios", "decisions", 1e-9),
        ("waiting", "loads", 1e-9),
    ],
)
def test_an_error_goes_away_with_the_ingredient_it_came_from(
    policy: str, ingredient: str, left: float, tmp_path: Path
) -> None:
    """One ingredient of the real run is changed: swapping it, and no other, removes the error."""
    real = perturbed(tmp_path / "real", policy, ingredient)
    found = attribution_of(real, simulate(tmp_path / "simulated", policy))
    before = errors(found, "nothing")
    wrong = {key for key, error in before.items() if abs(error) > 0.02}
    assert len(wrong) >= 2
    after = errors(found, ingredient)
    assert all(abs(error) <= left for error in after.values())
    for cause in found.causes:
        assert cause.ingredient == ingredient or cause.key not in wrong
    others = {"arrivals", "exits", "times"} - {ingredient}
    for other in others:
        kept = errors(found, other)
        assert sum(abs(kept[key]) for key in wrong) > 0.6 * sum(abs(before[key]) for key in wrong)


def stretched(model: ModelProfile) -> ModelProfile:
    """Every number of seconds a quarter longer, by the names that they have."""
    coefficients = {
        name: value * (1.25 if "s" in name.rpartition(".")[2].split("_") else 1.0)
        for name, value in model.coefficients.items()
        if value is not None
    }
    return replace(model, coefficients=coefficients)


@pytest.mark.parametrize("policy", ["static-depth", "ee-single", "helios"])
def test_a_slower_machine_is_told_from_iterations_that_are_predicted_wrongly(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All takes 1.25 times as long, and so did known arithmetic: its pace removes the error."""
    profile = changed_profile(experiment_for(policy).setup.profile, stretched)
    real = serve(tmp_path / "real", policy, profile=profile)
    simulated = simulate(tmp_path / "simulated", policy)
    unseen = attribution_of(real, simulated)
    (missing,) = (one.missing for one in unseen.swaps if one.name == "pace")
    assert missing is not None
    assert "nobody looked at the pace" in missing
    monkeypatch.setattr("helios_sim.fidelity.swaps._pace_factor", lambda side, profile: 1.25)
    found = attribution_of(real, simulated)
    before = errors(found, "nothing")
    assert sum(abs(error) > 0.02 for error in before.values()) >= 2
    assert all(abs(error) <= 1e-9 for error in errors(found, "pace").values())
    # Recorded times hold the pace already.
    assert errors(found, "everything") == errors(unseen, "everything")
    causes = {cause.ingredient for cause in found.causes if abs(cause.error or 0.0) > 0.02}
    assert causes == {"pace"}
    if policy == "static-depth":
        # Times hang on no text here, and other texts are simulated at that pace too.
        assert found.middle_error("mean_tpot_ms") == pytest.approx(0.0, abs=1e-9)
        assert len(set(found.chance.ends["mean_tpot_ms"])) == 1
        assert unseen.middle_error("mean_tpot_ms") == pytest.approx(before["mean_tpot_ms"])
    # Without the pace a middle is what could be foreseen, whether the pace was seen or not.
    assert found.chance.foreseen == unseen.chance.foreseen == unseen.chance.middles
    faster = found.chance.middles["mean_tpot_ms"] / found.chance.foreseen["mean_tpot_ms"]
    assert faster == pytest.approx(1.25, rel=0.2)


def test_the_pace_is_held_against_the_profile_that_is_simulated(base: Path) -> None:
    """A run may have been served with another one, whose own factor then says nothing."""
    run = read_run(base / "real")
    known = {"pace_during": {"core_s": 5.0, "looks": 9}, "pace_factor": 7.0}
    seen = Side(base, replace(run, environment=run.environment | known), {})
    profile = experiment_for("static-depth").setup.profile
    told = {"reference_s": 4.0}
    measured = replace(profile, provenance=replace(profile.provenance, environment=told))
    assert _pace_factor(seen, measured) == 1.25
    assert _pace_factor(seen, profile) is None
    assert _pace_factor(Side(base, run, {}), measured) is None


def test_a_perfect_simulation_has_no_error_and_needs_no_cause(tmp_path: Path) -> None:
    """The same run on both sides: every figure is the same, every request, and so is the replay."""
    real = serve(tmp_path / "real", "helios")
    sides = read_sides([real], simulate(tmp_path / "simulated", "helios"))
    found = assess(sides, Path())
    assert {row.error for row in found.figures} <= {0.0, None}
    assert {row.verdict for row in found.figures} == {"unknown", "same"}
    assert [row.mape for row in found.requests] == [0.0, 0.0, 0.0]
    assert [row.spearman for row in found.requests] == pytest.approx([1.0, 1.0, 1.0])
    assert found.attribution is not None
    assert set(errors(found.attribution, "decisions").values()) == {0.0}
    assert {cause.ingredient for cause in found.attribution.causes} == {None}


def test_the_arrivals_of_a_closed_loop_are_those_of_the_order_of_time() -> None:
    """Sent when they were sent, the requests of users make the very run that they made."""
    arrivals = {"kind": "closed", "num_users": 4, "think_s": 0.5}
    data = question("static-depth")
    data["workload"] |= {"arrivals": arrivals, "num_requests": 60, "domains": []}
    closed = prepare(parse_scenario(data, "closed", Path()), Path())
    result = run_policy(closed, closed.scenario.policy[0])
    sent = result.run.requests.sort("request_id")["arrival_s"].to_numpy()
    assert not np.all(np.diff(sent) >= 0.0)
    found = swaps.Ingredients(
        arrival_s=sent,
        exits=None,
        trace_start=None,
        iterations=None,
        predicted=None,
        load_factor=None,
        pace_factor=None,
    )
    scene = swaps._Scene(closed, closed.scenario.policy[0], 7, result.run, found)
    as_it_was, swapped = (scene.play(frozenset(taken)) for taken in ((), ("arrivals",)))
    for figure in ("output_throughput", "p90_ttft_ms", "mean_batch_size", "duration"):
        assert swapped[figure] == pytest.approx(as_it_was[figure], rel=1e-9), figure


@pytest.mark.parametrize("warm_up", [{"warmup_s": 20.0}, {"warmup_requests": 20}])
def test_a_run_with_a_warm_up_is_simulated_again_with_the_same_figures(
    warm_up: dict[str, Any], tmp_path: Path
) -> None:
    data = question("static-depth", measure=warm_up)
    data["workload"]["num_requests"] = 60
    experiment = prepare(parse_scenario(data, "test", Path()), Path())
    given = run_policy(experiment, experiment.scenario.policy[0])
    write_run(given.run, given.summary, tmp_path / "simulated")
    write_run(replace(given.run, origin="measured"), given.summary, tmp_path / "real")
    sides = read_sides([tmp_path / "real"], tmp_path / "simulated")
    assert sides.simulated.summary["mean_tpot_ms"] != summarise(given.run)["mean_tpot_ms"]
    assert attribute(sides, experiment).notes == ()


@pytest.mark.parametrize(
    ("left", "together", "ingredient", "said"),
    [
        (6.0, 6.0, "times", "mostly recorded iteration times"),
        (-6.0, 6.0, "times", "mostly recorded iteration times"),
        (8.0, 6.0, None, "several ingredients together"),
        (8.0, 8.0, None, "no ingredient: physics that the model does not have, or noise"),
    ],
)
def test_a_cause_takes_away_three_tenths_of_an_error(
    left: float, together: float, ingredient: str | None, said: str
) -> None:
    """The simulated TPOT is 10 % off; recorded times, the best of two ingredients, leave less."""
    off = {"nothing": 10.0, "exits": 9.0, "times": left, "everything": together}
    swapped = tuple(Swap(name, name, {"mean_tpot_ms": 100.0 + one}) for name, one in off.items())
    (cause,) = swaps._causes(Attribution("real", {"mean_tpot_ms": 100.0}, swapped, (), ()))
    assert (cause.ingredient, cause.said) == (ingredient, said)


@pytest.mark.parametrize(
    ("ends", "by_chance"),
    [
        ((95.0, 111.0), True),
        ((100.0, 110.0), True),
        ((101.0, 111.0), False),
        ((99.9, 100.1), False),
    ],
)
def test_a_real_figure_among_those_of_other_texts_is_within_chance(
    ends: tuple[float, float], by_chance: bool
) -> None:
    """Texts that hardly differ make no chance of an error."""
    off = {"nothing": 10.0, "times": 6.0, "everything": 6.0}
    swapped = tuple(Swap(name, name, {"mean_tpot_ms": 100.0 + one}) for name, one in off.items())
    chance = Chance(8, {"mean_tpot_ms": ends}, {"mean_tpot_ms": 103.0})
    found = Attribution("real", {"mean_tpot_ms": 100.0}, swapped, (), (), chance)
    (cause,) = swaps._causes(found)
    assert (cause.by_chance, cause.ingredient) == (by_chance, "times")
    assert cause.said == "mostly recorded iteration times" + ("; within chance" * by_chance)
    assert found.chance_errors("mean_tpot_ms") == pytest.approx([one / 100 - 1 for one in ends])
    assert found.chance_errors("total_gpu_energy") == (None, None)
    assert found.middle_error("mean_tpot_ms") == pytest.approx(0.03)
    assert found.middle_error("total_gpu_energy") is None


def test_an_error_that_the_pace_takes_away_is_not_by_chance() -> None:
    """Simulations on all texts lie around the real figure once they have its pace."""
    chance = Chance(8, {"mean_tpot_ms": (95.0, 111.0)}, {"mean_tpot_ms": 103.0})
    for left, by_chance in ((1.0, False), (9.0, True)):
        off = {"nothing": 10.0, "pace": left, "times": 6.0, "everything": 6.0}
        swapped = tuple(Swap(name, name, {"mean_tpot_ms": 100 + one}) for name, one in off.items())
        real = {"mean_tpot_ms": 100.0}
        (cause,) = swaps._causes(Attribution("real", real, swapped, (), (), chance))
        assert cause.by_chance is by_chance


def test_the_middle_text_is_the_median_of_all_texts() -> None:
    """A figure that some text lacks has neither ends nor a middle."""
    texts = [{"mean_tpot_ms": one, "perplexity": None} for one in (9.0, 1.0, 5.0, 4.0)]
    found = swaps._chance([*texts, {"mean_tpot_ms": 2.0, "perplexity": 3.0}], {})
    assert (found.num_texts, found.ends) == (4, {"mean_tpot_ms": (1.0, 9.0)})
    assert found.middles == {"mean_tpot_ms": 4.0}


def test_chance_is_what_the_simulation_gives_on_other_texts(tmp_path: Path) -> None:
    """Where all leave at one depth only quality hangs on the text; HELIOS may go another way."""
    found = {}
    for use in ("static-depth", "helios"):
        sides = read_sides(
            [simulate(tmp_path / f"{use}-real", use)],
            simulate(tmp_path / use, use),
            allow_simulated=True,
        )
        result = assess(sides, Path())
        assert result.attribution is not None
        found[use] = result.attribution.chance
        ours = result.attribution.swaps[0].figures
        for key, (least, most) in found[use].ends.items():
            assert least <= ours[key] <= most
        assert not any(cause.by_chance for cause in result.attribution.causes)
        drawn = charts.attribution_figure(result, result.attribution)["data"]
        assert len({one["marker"]["color"] for one in drawn}) == len(drawn)
    least, most = found["static-depth"].ends["mean_tpot_ms"]
    assert (found["static-depth"].num_texts, least) == (OTHER_TEXTS, most)
    least, most = found["helios"].ends["mean_tpot_ms"]
    assert least < most


def test_the_page_and_the_terminal_tell_the_error_of_the_middle_text(tmp_path: Path) -> None:
    sides = read_sides(
        [simulate(tmp_path / "real", "helios")],
        simulate(tmp_path / "simulated", "helios"),
        allow_simulated=True,
    )
    found = assess(sides, Path())
    assert found.attribution is not None
    real = found.attribution.real["mean_tpot_ms"]
    assert isinstance(real, float)
    chance = replace(found.attribution.chance, middles={"mean_tpot_ms": 1.4321 * real})
    attribution = replace(found.attribution, chance=chance)
    assert "+43.2 %" in text_of(render(replace(found, attribution=attribution)))
    lines = "\n".join(one.plain for one in attribution_table(found, attribution).lines(200))
    assert "middle text" in lines
    assert "+43.2 %" in lines


def test_what_the_real_run_did_not_record_is_said(tmp_path: Path) -> None:
    """Without its extra files the swaps that need them are left out, with the reason."""
    real = serve(tmp_path / "real", "static-depth")
    (real / ITERATIONS_FILE).unlink()
    (real / EXITS_FILE).unlink()
    sides = read_sides([real], simulate(tmp_path / "simulated", "static-depth"))
    found = assess(sides, Path())
    assert found.attribution is not None
    missing = {swap.name: swap.missing for swap in found.attribution.swaps if swap.missing}
    assert set(missing) == {"exits", "pace", "times", "slow"}
    assert "loads" in {swap.name for swap in found.attribution.without_effect}
    assert missing["exits"] == "not recorded: the real run has no exits.parquet"
    assert found.timing == ()
    text = " ".join(remarks(found))
    assert "Recorded exits: not recorded: the real run has no exits.parquet." in text
    assert "repeat the real run" in text


def times_scaled(run: RunData, factor: float) -> RunData:
    """The run with all its latencies longer by a factor."""
    columns = ("admitted_s", "first_token_s", "finished_s")
    requests = run.requests.with_columns(
        (pl.col("arrival_s") + (pl.col(name) - pl.col("arrival_s")) * factor).alias(name)
        for name in columns
    )
    totals = replace(run.totals, end_s=run.totals.end_s * max(factor, 1.0))
    return replace(run, requests=requests, totals=totals, origin="measured")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real and a simulated run to spoil copies of."""
    folder = tmp_path_factory.mktemp("base")
    serve(folder / "real", "static-depth")
    simulate(folder / "simulated", "static-depth")
    return folder


def repeats(base: Path, folder: Path, factors: Sequence[float]) -> Path:
    """Real runs of one scenario whose latencies differ by factors."""
    run = read_run(base / "simulated")
    for number, factor in enumerate(factors, 1):
        one = times_scaled(run, factor)
        write_run(one, summarise(one), folder / f"repeat-{number}")
    return folder


def test_the_spread_is_the_wider_of_range_and_two_deviations(base: Path, tmp_path: Path) -> None:
    """Latencies 10 % apart have a deviation of 10 %: the spread is 20 % to either side."""
    real = repeats(base, tmp_path / "real", (0.9, 1.0, 1.1))
    found = assess(read_sides([real], base / "simulated"), Path(), attribution=False)
    row = found.row("mean_e2el_ms")
    assert row is not None and row.median is not None
    assert row.simulated == pytest.approx(row.median)
    assert (row.low, row.high) == pytest.approx((0.8 * row.median, 1.2 * row.median))
    assert row.verdict == "within"
    assert row.error_in_spreads == pytest.approx(0.0, abs=1e-9)
    e2e = found.requests[2]
    assert e2e.mape == pytest.approx(0.0, abs=1e-9)
    pairs = (0.1 / 0.95, 0.1 / 1.05, 0.2 / 1.0)
    assert e2e.noise_mape == pytest.approx(sum(pairs) / 3)


def test_one_disturbed_repeat_is_no_error_of_any_request(base: Path, tmp_path: Path) -> None:
    """Two of three repeats are as simulated, and all takes four times as long in the third."""
    real = repeats(base, tmp_path / "real", (1.0, 1.0, 4.0))
    found = request_rows(read_sides([real], base / "simulated"))
    assert [row.mape for row in found] == pytest.approx([0.0] * 3, abs=1e-9)
    assert {row.num_requests for row in found} == {240}


def test_iteration_times_are_those_of_the_typical_repeat_or_of_the_first_that_has_any(
    base: Path, tmp_path: Path
) -> None:
    real = repeats(base, tmp_path / "real", (1.2, 1.0, 0.9))
    iteration = pl.read_parquet(base / "real" / ITERATIONS_FILE).head(1)
    for number, seconds in enumerate((0.1, 0.2, 0.3), 1):
        log = iteration.with_columns(seconds=pl.lit(seconds))
        log.write_parquet(real / f"repeat-{number}" / ITERATIONS_FILE)
    sides = read_sides([real], base / "simulated")
    assert sides.typical.path.name == "repeat-2"
    for recorded_ms in (200.0, 100.0):
        (row,) = assess(sides, Path(), attribution=False).timing
        assert row.recorded_ms == pytest.approx(recorded_ms)
        (sides.typical.path / ITERATIONS_FILE).unlink(missing_ok=True)


def test_the_page_says_that_causes_are_told_against_one_real_run(
    base: Path, tmp_path: Path
) -> None:
    """The errors above it are against the median of all; with one run these are the same."""
    said = " Errors here are against that one run, above against the median of all."
    for paces in ((1.24, 1.25, 1.26), (1.25,)):
        real = repeats(base, tmp_path / str(len(paces)), paces)
        found = assess(read_sides([real], base / "simulated"), Path())
        assert found.attribution is not None
        page = render(found)
        assert f"Errors are against {found.attribution.repeat}: the first bar as the " in page
        assert (said in page) == (len(paces) > 1)


def test_how_much_slower_the_machine_was_is_said_where_it_is_known(
    base: Path, tmp_path: Path
) -> None:
    run = times_scaled(read_run(base / "simulated"), 1.1)
    for number, slowdown in enumerate((1.02, 1.1, None), 1):
        known = {} if slowdown is None else {"slowdown": slowdown, "pace_factor": slowdown - 0.01}
        one = replace(run, environment=run.environment | known)
        write_run(one, summarise(one), tmp_path / f"repeat-{number}")
    found = assess(read_sides([tmp_path], base / "simulated"), Path(), attribution=False)
    assert [one["slowdown"] for one in found.data()["real"]] == [1.02, 1.1, None]
    assert [one["pace_factor"] for one in found.data()["real"]] == [1.01, 1.09, None]
    assert (
        "The machine was 1.02 to 1.10 times as slow around the real runs as while the profile was "
        "measured."
    ) in remarks(found)
    assert (
        "Known arithmetic took 1.01 to 1.09 times as long between the iterations of the real runs "
        "as around the profile's readings."
    ) in remarks(found)
    without = assess(read_sides([base / "real"], base / "simulated"), Path(), attribution=False)
    assert "as slow" not in " ".join(remarks(without))
    assert "arithmetic" not in " ".join(remarks(without))


def test_a_difference_beyond_the_spread_is_told_from_one_within(base: Path, tmp_path: Path) -> None:
    """Real runs 25 % slower, 1 % apart: the simulation is 20 % below, ten half-spreads away."""
    real = repeats(base, tmp_path / "real", (1.24, 1.25, 1.26))
    found = assess(read_sides([real], base / "simulated"), Path(), attribution=False)
    row = found.row("mean_e2el_ms")
    assert row is not None
    assert row.verdict == "below"
    assert row.error == pytest.approx(-0.2)
    assert row.error_in_spreads == pytest.approx(0.25 / 0.02)
    assert found.requests[2].bias == pytest.approx(-0.2)
    throughput = found.row("perplexity")
    assert throughput is not None and throughput.verdict == "within"
    assert "figures" in remarks(found)[0]


@pytest.mark.parametrize(
    ("loaded_bytes", "unit", "shown"), [(4.88e6, "MiB", 4.654), (9.76e9, "GiB", 9.090)]
)
def test_weights_of_models_below_a_gib_are_set_beside_each_other_in_mib(
    base: Path, loaded_bytes: float, unit: str, shown: float
) -> None:
    sides = read_sides([base / "real"], base / "simulated")
    real, simulated = (
        replace(side, summary=side.summary | {"weight_bytes_loaded": loaded_bytes})
        for side in (*sides.reals, sides.simulated)
    )
    rows = {row.key: row for row in figure_rows(replace(sides, reals=(real,), simulated=simulated))}
    row = rows["weight_bytes_loaded"]
    assert (row.unit, row.real, row.simulated) == (
        unit,
        (pytest.approx(shown, abs=1e-3),),
        pytest.approx(shown, abs=1e-3),
    )


def test_repeats_are_found_in_order_and_the_middle_one_is_typical(
    base: Path, tmp_path: Path
) -> None:
    real = repeats(
        base, tmp_path / "real", (1.2, 0.9, 1.0, 1.1, 1.3, 1.4, 0.8, 1.05, 1.5, 1.6, 1.7)
    )
    assert [one.name for one in run_folders(real)] == [f"repeat-{k}" for k in range(1, 12)]
    assert read_sides([real], base / "simulated").typical.path.name == "repeat-1"


def spoil_requests(run: RunData, *columns: pl.Expr) -> RunData:
    return replace(run, requests=run.requests.with_columns(*columns))


def another_rate(run: RunData) -> RunData:
    workload = run.scenario["workload"] | {"arrivals": {"kind": "poisson", "rate_per_s": 9.0}}
    return replace(run, scenario=run.scenario | {"workload": workload})


def another_depth(run: RunData) -> RunData:
    policy = [{"use": "static-depth", "model": "opt-6.7b", "depth": 17}]
    return replace(run, scenario=run.scenario | {"policy": policy})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: replace(run, seed=8), "seed 8 and the simulated one has 7"),
        (another_rate, "scenarios differ in workload.arrivals"),
        (another_depth, "scenarios differ in policy.depth: 17 in the real run and 9"),
        (
            lambda run: spoil_requests(run, pl.col("prompt_tokens") + 1),
            r"column prompt_tokens differs .* first in row 0",
        ),
        (
            lambda run: spoil_requests(run, pl.lit("code").alias("domain")),
            "column domain differs",
        ),
        (lambda run: replace(run, origin="simulated"), "the real side must be 'measured'"),
        (
            lambda run: replace(run, scenario={"name": "mine"}),
            r"toml, workload: .* required",
        ),
    ],
)
def test_runs_of_different_questions_are_refused(
    spoil: Callable[[RunData], RunData], says: str, base: Path, tmp_path: Path
) -> None:
    run = spoil(read_run(base / "real"))
    write_run(run, summarise(run), tmp_path / "real")
    with pytest.raises(InputError, match=says):
        read_sides([tmp_path / "real"], base / "simulated")


def test_a_simulation_with_other_numbers_of_the_profile_may_be_held_to_a_real_run(
    base: Path, tmp_path: Path
) -> None:
    ours = read_run(base / "simulated")
    fleet = ours.scenario["fleet"] | {"assume": {"exits.stickiness": 0.5}, "profile": "elsewhere"}
    assumed = replace(ours, scenario=ours.scenario | {"fleet": fleet})
    write_run(assumed, summarise(assumed), tmp_path / "assumed")
    assert read_sides([base / "real"], tmp_path / "assumed").scenario.fleet.assume


def policy_told(run: RunData, **entry: Any) -> RunData:
    """The run with an entry of its policy as a file has it."""
    return replace(run, scenario=run.scenario | {"policy": [entry]})


def test_a_run_that_leaves_options_out_was_asked_what_one_that_says_their_defaults_was(
    tmp_path: Path,
) -> None:
    """On either side; what was given otherwise is another question."""
    ours = replace(simulated_data("helios"), label="helios")
    given = {"use": "helios", **POLICIES["helios"]}
    runs = {
        "settled": ours,
        "given": policy_told(ours, **given),
        "other": policy_told(ours, **given, depth_rule="quantile"),
    }
    for name, run in runs.items():
        real = replace(run, origin="measured")
        write_run(real, summarise(real), tmp_path / "real" / name)
        write_run(run, summarise(run), tmp_path / "simulated" / name)
    assert len(ours.scenario["policy"][0]) > len(given)
    for real, simulated in (("given", "settled"), ("settled", "given"), ("given", "given")):
        read_sides([tmp_path / "real" / real], tmp_path / "simulated" / simulated)
    with pytest.raises(InputError, match=r"policy\.depth_rule: quantile in the real run and domin"):
        read_sides([tmp_path / "real" / "other"], tmp_path / "simulated" / "settled")


def test_defaults_of_an_own_policy_are_known_where_its_class_is(tmp_path: Path) -> None:
    (tmp_path / "own_of_two_runs.py").write_text(
        "class Own:\n    def __init__(self, patience: int = 3): pass\n", encoding="utf-8"
    )
    entry = {"use": "own_of_two_runs:Own", "label": "helios"}
    ours = policy_told(simulated_data("helios"), **entry, patience=3)
    real = replace(policy_told(ours, **entry), origin="measured")
    write_run(ours, summarise(ours), tmp_path / "simulated")
    write_run(real, summarise(real), tmp_path / "real")
    read_sides([tmp_path / "real"], tmp_path / "simulated", base_dir=tmp_path)
    with pytest.raises(InputError, match=r"policy\.patience: unset in the real run and 3"):
        read_sides([tmp_path / "real"], tmp_path / "simulated")


def test_fewer_requests_are_refused(base: Path, tmp_path: Path) -> None:
    run = simulated_data("static-depth")
    fewer = {"workload": question("static-depth")["workload"] | {"num_requests": 40}}
    short = prepare(parse_scenario(question("static-depth", **fewer), "test", Path()), Path())
    other = run_policy(short, short.scenario.policy[0]).run
    other = replace(other, origin="measured", scenario=run.scenario)
    write_run(other, summarise(other), tmp_path / "real")
    with pytest.raises(InputError, match="holds 40 requests and the simulated one holds 240"):
        read_sides([tmp_path / "real"], base / "simulated")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_runs_are_refused_with_the_file_and_the_reason(base: Path, tmp_path: Path) -> None:
    """Another schema version, a missing column, an empty run, no run at all."""
    simulated = base / "simulated"

    def copy(name: str) -> Path:
        shutil.copytree(base / "real", tmp_path / name)
        return tmp_path / name

    edit_json(copy("version") / "totals.json", schema_version=2)
    requests = pl.read_parquet(base / "real" / "requests.parquet")
    requests.drop("breaches").write_parquet(copy("column") / "requests.parquet")
    requests.clear().write_parquet(copy("empty") / "requests.parquet")
    for name, says in (
        ("version", "schema version 2; this program reads 1"),
        ("column", "columns breaches are missing"),
        ("empty", "The run is empty"),
        ("nothing", "There is no such folder"),
    ):
        with pytest.raises(InputError, match=says):
            read_sides([tmp_path / name], simulated)
    with pytest.raises(InputError, match="given twice"):
        read_sides([base / "real", base / "real"], simulated)
    with pytest.raises(InputError, match="simulated side must be 'simulated'"):
        read_sides([base / "real"], base / "real")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda frame: frame.drop("layers"), "columns layers are missing"),
        (lambda frame: frame.drop("longest_context_tokens"), "serve it again"),
        (lambda frame: frame.with_columns(seconds=-1.0), "column seconds holds values"),
        (lambda frame: frame.with_columns(rows=pl.lit(None, pl.Int64)), "rows has empty cells"),
        (lambda frame: frame.with_columns(depth=pl.lit("nine")), "column depth is of type String"),
        (lambda frame: frame.with_columns(checks=pl.lit("no")), "column checks is of type String"),
    ],
)
def test_broken_recordings_are_refused(
    spoil: Callable[[pl.DataFrame], pl.DataFrame], says: str, base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base / "real", tmp_path / "real")
    log = pl.read_parquet(base / "real" / ITERATIONS_FILE)
    spoil(log).write_parquet(tmp_path / "real" / ITERATIONS_FILE)
    with pytest.raises(InputError, match=says):
        assess(read_sides([tmp_path / "real"], base / "simulated"), Path())


def test_a_profile_that_is_not_found_asks_for_its_folder(base: Path, tmp_path: Path) -> None:
    """Attribution needs the profile; without attribution its absence only costs the timing."""
    run = read_run(base / "simulated")
    fleet = run.scenario["fleet"] | {"profile": "somewhere/mine"}
    run = replace(run, scenario=run.scenario | {"fleet": fleet})
    write_run(run, summarise(run), tmp_path / "simulated")
    sides = read_sides([base / "real"], tmp_path / "simulated")
    with pytest.raises(InputError, match=r"--files, or leave it out with --no-attribution"):
        assess(sides, Path())
    assert assess(sides, Path(), attribution=False).timing == ()
    other = replace(run, scenario=read_run(base / "simulated").scenario)
    other = replace(other, environment=other.environment | {"profile_hash": "0" * 64})
    write_run(other, summarise(other), tmp_path / "other")
    with pytest.raises(InputError, match="the run was simulated with 000000000000"):
        assess(read_sides([base / "real"], tmp_path / "other"), Path())


HOSTED = [
    ("vanilla", {}, {}),
    ("ee-single", {"exit_mode": "wait"}, {}),
    ("ee-single", {"exit_mode": "rebatch"}, {}),
    ("ee-single", {"exit_mode": "wait"}, {"skipped_kv": "recomputed"}),
    ("ee-single", {"exit_mode": "wait"}, {"batching": "static"}),
    ("helios", {}, {}),
]


@pytest.mark.parametrize(("use", "options", "serving"), HOSTED)
def test_what_a_host_logs_is_predicted_to_the_last_bit(
    use: str, options: dict[str, Any], serving: dict[str, Any], tmp_path: Path
) -> None:
    """The real host on a clockwork machine logs iterations; their prediction is their time."""
    setup = drifting_setup(profile=padding_models(), **serving)
    host = serve_by_clockwork(setup, setup.traces, drifting_requests(60), policy_of(use, **options))
    iterations_table(host).write_parquet(tmp_path / ITERATIONS_FILE)
    _, run = play(setup, drifting_requests(60), use, **options)
    found = read_iterations(tmp_path, run)
    assert found is not None
    predicted = predict(found, setup.profile, setup.serving.max_batch)
    np.testing.assert_allclose(predicted.seconds, found.seconds, rtol=1e-9)
    worked_out = ["batch", "checks", "heads", "filled_layers", "filled_rows", "exit_mode"]
    if use == "helios" or serving or options.get("exit_mode") == "rebatch":
        return
    # The same without the columns that can be worked out.
    bare = iterations_table(host).drop(*worked_out, "first_layer", "pending_tokens", "overheads")
    bare.write_parquet(tmp_path / ITERATIONS_FILE)
    again = read_iterations(tmp_path, run)
    assert again is not None
    np.testing.assert_array_equal(again.checks, found.checks)
    np.testing.assert_array_equal(again.heads, found.heads)
    np.testing.assert_array_equal(again.filled_layers, found.filled_layers)


def recorded(model: str, seconds: Sequence[float], **columns: Any) -> Iterations:
    """Decodes of one row of the thumbnail at its full depth, back to back unless said otherwise."""
    num = len(seconds)
    values: dict[str, Any] = dict.fromkeys(
        (one.name for one in fields(Iterations)), np.zeros(num)
    ) | {
        "seconds": np.array(seconds),
        "start_s": np.cumsum([0.0, *seconds[:-1]]),
        "is_decode": np.ones(num, np.bool_),
        "model": np.array([model] * num),
        "depth": np.full(num, 4.0),
        "layers": np.full(num, 4.0),
        "rows": np.ones(num),
        "batch": np.ones(num),
        "heads": np.ones(num),
        "filled_rows": np.ones(num),
        "context_tokens": np.full(num, 10.0),
        "longest_context_tokens": np.full(num, 10.0),
    }
    return Iterations(**(values | {name: np.asarray(one) for name, one in columns.items()}))


def test_typical_and_slow_iterations_are_told_apart() -> None:
    """A thumbnail decodes in 55 ms: 66 ms is typically 1.2 times that; one of 198 ms is slow."""
    profile = profile_of(thumbnail())
    found = recorded("small", [0.066] * 9 + [0.198])
    predicted = predict(found, profile, 8)
    assert predicted.seconds == pytest.approx(0.055)
    assert factors(found, predicted, "typical")["small"].decode[1] == pytest.approx(1.2)
    assert factors(found, predicted, "mean")["small"].decode[1] == pytest.approx(1.44)
    assert factors(found, predicted, "slow")["small"].decode[1] == pytest.approx(1.2)


def test_iterations_are_told_by_the_middle_of_their_times_and_prompts_by_doubling_classes() -> None:
    """Decodes of 1 to 11 ms; a prompt of 5 tokens is of the class up to 8, as one of 8 is."""
    prompts = np.array([0.0] * 11 + [5.0, 8.0, 9.0])
    found = recorded(
        "small",
        [1e-3 * ms for ms in (*range(1, 12), 20, 20, 20)],
        is_decode=prompts == 0.0,
        prompt_tokens=prompts,
        prompt_pairs=prompts * (prompts + 1) / 2,
    )
    decode, *prefills = timing_rows(found, predict(found, profile_of(thumbnail()), 8))
    assert (decode.kind, decode.batch, decode.num_iterations) == ("decode", 1, 11)
    assert (decode.low_ms, decode.recorded_ms, decode.high_ms) == pytest.approx((2.0, 6.0, 10.0))
    assert [(row.kind, row.batch, row.num_iterations) for row in prefills] == [
        ("prefill", 8, 2),
        ("prefill", 16, 1),
    ]


def test_an_iteration_that_captures_graphs_is_predicted_to_take_their_time() -> None:
    costs = {
        "capture.s_per_graph": 0.1,
        "capture.s_per_exit": 0.05,
        "capture.s_per_layer": 0.01,
        "capture.s_per_filled_layer": 0.001,
    }
    profile = profile_of(thumbnail(costs=costs, buckets=(1, 2)))
    counts = {
        "captured_graphs": [0.0, 0.0, 2.0, 2.0],
        "captured_exits": [0.0, 0.0, 1.0, 1.0],
        "captured_layers": [0.0, 0.0, 4.0, 4.0],
        "captured_filled_layers": [0.0, 0.0, 2.0, 2.0],
    }
    # One of the two that capture is alone at its batch.
    batches = np.array([1.0, 1.0, 1.0, 2.0])
    rows = {name: batches for name in ("batch", "rows", "filled_rows")}
    found = recorded("small", [0.066, 0.066, 0.212, 0.212], **rows, **counts)
    plain = predict(found, profile, 8)
    assert plain.seconds == pytest.approx([0.055, 0.055, 0.347, 0.347])
    by_model = factors(found, plain, "mean")
    assert by_model["small"].decode == pytest.approx({1: 1.2})
    assert by_model["small"].capture == pytest.approx(0.5)
    again = predict(found, retimed(profile, by_model), 8)
    assert again.steady_s == pytest.approx([0.066] * 4)
    assert again.seconds == pytest.approx(found.seconds)
    # Where a profile knows nothing of capturing, what captures is no steady iteration either.
    ignorant = predict(found, profile_of(thumbnail()), 8)
    assert factors(found, ignorant, "mean")["small"].decode == pytest.approx({1: 1.2})
    assert factors(found, ignorant, "mean")["small"].capture is None
    assert factors(found, plain, "slow")["small"].capture is None
    # Each graph is captured once, so nothing of it is slower than usual.
    stuttered = retimed(profile, {"small": Factors({1: 1.5}, {1: (1.0, 1.0)}, None)})
    assert stuttered.models["small"].coefficients["capture.s_per_graph"] == pytest.approx(0.1)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_a_retimed_profile_takes_the_recorded_time(factor: float) -> None:
    """By batch for decodes and in sum for prefills, whatever the shares of layers and the rest."""
    residuals = {"residual": ((1.0, 0.8), (8.0, 1.4)), "depth_residual": ((2.0, 0.5), (4.0, 1.5))}
    costs = {"costs": PADDING, **residuals}
    profile = profile_of(thumbnail(buckets=(1, 2, 4, 8), **costs), thumbnail("large", (2, 4, 8)))
    batches = np.array([1.0, 1.0, 3.0, 3.0, 6.0, 6.0, 0.0, 0.0])
    found = recorded(
        "small",
        [1.0] * 8,
        batch=np.maximum(batches, 1.0),
        rows=np.maximum(batches, 1.0),
        filled_rows=np.maximum(batches, 1.0),
        is_decode=batches > 0,
        prompt_tokens=np.where(batches > 0, 0.0, [0, 0, 0, 0, 0, 0, 20, 50]),
        prompt_pairs=np.where(batches > 0, 0.0, [0, 0, 0, 0, 0, 0, 210, 1275]),
    )
    plain = predict(found, profile, 8).seconds
    seconds = plain * factor * (1.0 + 0.05 * batches)
    found = replace(found, seconds=seconds)
    by_model = factors(found, predict(found, profile, 8), "mean")
    again = predict(found, retimed(profile, by_model), 8).seconds
    for batch in (1.0, 3.0, 6.0):
        at = batches == batch
        assert again[at].sum() == pytest.approx(seconds[at].sum())
    assert again[batches == 0].sum() == pytest.approx(seconds[batches == 0].sum())
    assert retimed(profile, by_model).models["large"] == profile.models["large"]


def test_loads_are_held_against_the_disk_once_and_only_where_serving_waited() -> None:
    """The first load waits for the disk, the second comes beside requests, the third waits."""
    run = simulated_data("waiting")
    profile = experiment_for("waiting").setup.profile
    moves = [
        ("opt-6.7b", 0.0, 10.0, 3_000),
        ("opt-1.3b", 20.0, 25.0, 2_000),
        ("opt-1.3b", 40.0, 45.0, 1_000),
    ]
    decisions = pl.concat([run.decisions.head(1)] * 3).with_columns(
        replica=pl.lit(0, pl.Int32),
        model=pl.Series([name for name, *_ in moves]),
        time_s=pl.Series([begun_s for _, begun_s, _, _ in moves]),
        ready_s=pl.Series([ready_s for _, _, ready_s, _ in moves]),
        moved_bytes=pl.Series([moved for *_, moved in moves]),
    )
    waited = pl.concat([run.timeline.head(1)] * 2).with_columns(
        replica=pl.lit(0, pl.Int32), state=pl.lit("loading"), time_s=pl.Series([10.0, 45.0])
    )
    totals = replace(run.totals, load_s=12.0)
    run = replace(run, decisions=decisions, timeline=waited, totals=totals)
    whole = profile.models["opt-6.7b"].model
    disk, host = profile.loading.disk, profile.loading.host
    moved_s = host.seconds(3_000) + host.seconds(1_000)
    assert loads(run, profile) == pytest.approx(12.0 / moved_s)
    run = replace(run, scenario=run.scenario | {"fleet": {"weights_start": "disk"}})
    whole_s = disk.seconds(whole.weight_bytes(whole.shape.layers))
    assert loads(run, profile) == pytest.approx(12.0 / (moved_s + whole_s))


def test_requests_of_the_warm_up_are_not_compared_one_by_one(base: Path) -> None:
    run = read_run(base / "real")
    numbers = [
        int(
            np.isfinite(
                per_request(Side(base, run, summarise(run, None, 0.0, skipped)))["e2e"]
            ).sum()
        )
        for skipped in (0, 100)
    ]
    assert numbers == [240, 140]


def replayed_on(experiment: Experiment, profile: Profile, real: RunData) -> Run:
    """The decisions of a run carried out on a profile."""
    setup = replace(experiment.setup, seed=real.seed, profile=profile)
    requests, _ = experiment.requests(real.seed)
    run = replayed_run(
        lambda maker: Run(setup, requests, maker),
        lambda: experiment.policy(experiment.scenario.policy[0]),
        real,
    )
    run.play()
    return run


def test_a_decision_that_takes_longer_puts_the_next_one_off_by_as_much() -> None:
    """Loads take thirty times as long, and what was served between two decisions is served."""
    experiment, real = experiment_for("waiting"), simulated_data("waiting")
    run = replayed_on(experiment, reloaded(experiment.setup.profile, 30.0), real)
    told = list(real.decisions.sort("time_s", maintain_order=True).iter_rows(named=True))
    gaps = [
        (later.time_s - before.ready_s, there["time_s"] - then["ready_s"])
        for (before, later), (then, there) in zip(
            pairwise(run.decisions), pairwise(told), strict=False
        )
        if before.ready_s is not None and later.event is Event.BREACHED
    ]
    assert sum(recorded_s > 1.0 for _, recorded_s in gaps) >= 2
    assert all(ours_s >= recorded_s - 1e-6 for ours_s, recorded_s in gaps)


def test_a_reassessment_is_replayed_after_as_many_requests_however_long_iterations_take() -> None:
    """Asked by the clock it would wait for requests that were admitted a moment before."""
    experiment, real = experiment_for("helios"), simulated_data("helios")
    profile = experiment.setup.profile
    slower = {
        name: replace(
            model,
            coefficients={
                key: value * 1.003
                if value is not None and key.endswith(("_s", "_s_per_layer"))
                else value
                for key, value in model.coefficients.items()
            },
        )
        for name, model in profile.models.items()
    }
    run = replayed_on(experiment, replace(profile, models=slower), real)
    ours = run_data(run, "helios", "helios", real.seed, {})

    def finished_before(data: RunData) -> list[int]:
        told = data.decisions.filter(pl.col("decision") != "keep")
        asked = told.filter(pl.col("event") == "reassess")["time_s"].to_list()
        ends = data.requests["finished_s"]
        return [int((ends <= at_s).sum()) for at_s in asked]

    assert len(finished_before(real)) >= 2
    assert finished_before(ours) == finished_before(real)


def test_a_policy_knows_the_profile_as_it_is_whatever_is_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[Run] = []

    def kept(run: Run, *more: Any) -> RunData:
        played.append(run)
        return run_data(run, *more)

    real = perturbed(tmp_path / "real", "static-depth", "times")
    simulated = simulate(tmp_path / "simulated", "static-depth")
    monkeypatch.setattr(swaps, "run_data", kept)
    attribution_of(real, simulated)
    first, *others = played
    assert any(run.setup.profile is not first.setup.profile for run in others)
    for run in others:
        assert run.candidates == first.candidates
        for replica in run.replicas:
            assert tuple(replica.steward.controller.candidates) == first.candidates


def run_cli(*words: str) -> int:
    """Run `helios` and give its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    return int(end.value.code or 0)


def test_the_command_tells_sides_by_their_origin(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measured run beside a simulated one is a question of fidelity; alike, of the better one."""
    real, simulated = str(base / "real"), str(base / "simulated")
    assert run_cli("compare", real, simulated, "--out", str(tmp_path / "found")) == 0
    said = capsys.readouterr().out
    assert "Simulated against real: throughput 0 %" in said
    assert "unknown: one repeat" in said
    data = json.loads((tmp_path / "found" / "fidelity.json").read_text())
    assert data["num_repeats"] == 1
    assert {row["key"] for row in data["figures"]} >= {"p90_ttft_ms", "mean_batch_size"}
    assert [swap["name"] for swap in data["attribution"]["swaps"]][:2] == ["nothing", "arrivals"]
    assert (tmp_path / "found" / "report.html").is_file()
    assert run_cli("compare", simulated, real, "--json", "--no-attribution") == 0
    assert json.loads(capsys.readouterr().out)["attribution"] is None
    assert run_cli("compare", simulated, simulated) == 0
    assert "Simulated against real" not in capsys.readouterr().out
    assert run_cli("compare", simulated, "--simulated", simulated) == 2
    assert "--allow-simulated" in capsys.readouterr().err
    assert (
        run_cli(
            "compare",
            simulated,
            "--simulated",
            simulated,
            "--allow-simulated",
            "--no-attribution",
            "--out",
            str(tmp_path / "one.html"),
        )
        == 0
    )
    assert (tmp_path / "one.html").is_file()


def test_the_command_refuses_what_it_cannot_take(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, simulated = str(base / "real"), str(base / "simulated")
    again = tmp_path / "again"
    shutil.copytree(base / "simulated", again)
    assert run_cli("compare", real, simulated, str(again)) == 2
    assert "name it with --simulated" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert run_cli("compare", real, simulated, "--out", str(tmp_path / "mine")) == 2
    assert "no comparison of ours" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run_cli("compare", real, simulated, "--out", str(tmp_path / "file" / "found")) == 2
    said = capsys.readouterr()
    assert "No results can be written there" in said.err and not said.out
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "taken")
    (tmp_path / ".page.html.taken.partial").mkdir()
    page = ("--no-attribution", "--out", str(tmp_path / "page.html"))
    assert run_cli("compare", real, simulated, *page) == 2
    assert "The page cannot be written" in capsys.readouterr().err
    assert run_cli("compare", real) == 2
    assert "needs at least two" in capsys.readouterr().err


def test_numbers_and_names_read_as_people_write_them(base: Path) -> None:
    assert [signed_percent(one) for one in (0.0123, -0.5, 12.0, 0.0, 2e-5, None)] == [
        "+1.2 %",
        "\N{MINUS SIGN}50.0 %",
        "+1,200 %",
        "0 %",
        "0 %",
        "\N{EN DASH}",
    ]
    found = assess(read_sides([base / "real"], base / "simulated"), Path(), attribution=False)
    names = {row.key: name_of(row) for row in found.figures}
    assert names["p90_ttft_ms"] == "p90 TTFT"
    assert names["mean_batch_size"] == "mean batch size"
    assert names["mean_kv_use"] == "KV blocks in use"
    assert names["switch_time_s"] == "time of serves, switches and loads"
    recorded = replace(found.figures[0], title="Serves, switches, loads")
    assert name_of(recorded) == "serves, switches, loads"


def test_both_sides_are_called_alike_where_every_repeat_is(base: Path, tmp_path: Path) -> None:
    real = repeats(base, tmp_path / "real", (1.0, 1.0))
    found = assess(read_sides([real], base / "simulated"), Path(), attribution=False)
    row = found.row("saturation")
    assert row is not None
    assert f"Both sides are {row.simulated}." in headline(found)
    mixed = replace(row, real=("overloaded", row.simulated))
    figures = tuple(mixed if one.key == "saturation" else one for one in found.figures)
    said = headline(replace(found, figures=figures))
    assert "Both sides" not in said
    assert f"The real side is overloaded and {row.simulated}" in said


def test_a_spread_is_shown_no_further_than_a_figure_can_go() -> None:
    """Repeats of 1 and 9 s have a median of 5 s and two deviations of 11 s."""
    wide = figure_row("p90_ttft_ms", "TTFT, p90", "ms", "Latency", (1.0, 9.0), 2.0)
    assert wide.low is not None and wide.low < 0.0
    assert spread_text(wide) == "0 to 16.3"
    share = figure_row("agreement", "Agreement", "%", "Exits and quality", (90.0, 99.0), 95.0)
    assert spread_text(share) == "81.8 to 100"


def test_a_spread_lies_about_the_median_and_holds_all_that_was_met() -> None:
    """Of 1, 2 and 6 s the deviation is the root of 7; of four times 0 and 10 s that of 20."""
    wide = figure_row("duration", "Duration", "s", "Load", (1.0, 2.0, 6.0), 2.0)
    assert (wide.median, wide.error) == (2.0, 0.0)
    assert (wide.low, wide.high) == pytest.approx((2 - 2 * math.sqrt(7), 2 + 2 * math.sqrt(7)))
    met = figure_row("duration", "Duration", "s", "Load", (0.0, 0.0, 0.0, 0.0, 10.0), 9.5)
    assert (met.low, met.high) == pytest.approx((-2 * math.sqrt(20), 10.0))
    assert met.verdict == "within"


@pytest.mark.browser
@in_chromium
def test_the_page_opens_without_a_complaint(tmp_path: Path, open_page: Open) -> None:
    """All of its figures are drawn, with no error, no request and no message."""
    real = repeats_of_helios(tmp_path / "real")
    sides = read_sides([real], simulate(tmp_path / "simulated", "helios"))
    document, console = open_page(render(assess(sides, Path())))
    assert "data-errors" not in document[:2000]
    assert 'data-ready="6"' in document[:2000]
    assert console == ""


def repeats_of_helios(folder: Path) -> Path:
    """Two real runs of HELIOS on a slower device."""
    for number in (1, 2):
        perturbed(folder / f"repeat-{number}", "helios", "times")
    return folder


def test_a_figure_is_within_its_spread_by_the_verdict_and_by_the_distance_alike() -> None:
    """Four repeats at 100 and one at 130: the spread ends 27 below the median and 30 above it."""
    real = (100.0, 100.0, 100.0, 100.0, 130.0)
    ends = figure_row("duration", "Duration", "s", "Load", real, 100.0)
    assert (ends.low, ends.high) == pytest.approx((100.0 - 26.83, 130.0), abs=0.01)
    for simulated, verdict in (
        (72.5, "below"),
        (74.0, "within"),
        (128.5, "within"),
        (131.0, "above"),
    ):
        row = figure_row("duration", "Duration", "s", "Load", real, simulated)
        assert row.verdict == verdict
        assert row.error_in_spreads is not None
        assert (row.error_in_spreads <= 1.0) == (verdict == "within")
