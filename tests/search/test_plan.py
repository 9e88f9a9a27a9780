"""Which fleet is recommended and what its day looks like, from answers worked out by pencil."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.experiment import prepare
from helios_sim.scenario import load_scenario, resolved
from helios_sim.search import commands
from helios_sim.search.bench import FleetAnswer, Load, _Bench, planned_scenario
from helios_sim.search.capacity import Capacity
from helios_sim.search.fleets import PlanQuestion, fleet_scenario, read_plan
from helios_sim.search.goals import Broken
from helios_sim.search.means import mean_figures
from helios_sim.search.plan import make_plan, ranked
from helios_sim.search.plan_words import _constraints, plan_remarks
from helios_sim.search.points import point_of, run_point
from helios_sim.search.prices import Cost, steadily
from helios_sim.search.verdict import Verdict
from helios_sim.settings.toml_writer import toml_text
from tests.search.asking import inline, write

CARRIED = Verdict((), 3)
TRACE = (
    Path(__file__).parents[2] / "scenarios/traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
)
DAY = [2.0, 1.0, 0.0, *[0.5] * 21]
"""Weights of the hours: the first is the busiest."""


def question_of(folder: Path, **settings: Any) -> PlanQuestion:
    """A plan of one fleet."""
    return read_plan(load_scenario(write(folder, plan=settings)), folder, "small.toml")


def answer_of(
    question: PlanQuestion,
    num_replicas: int,
    *,
    name: str = "mine",
    rate_per_s: float = 30.0,
    capacity_per_s: float = 10.0,
    joules: float = 1.0,
    cost: Cost | None = None,
) -> FleetAnswer:
    """A fleet of GPUs that carries a rate; its capacity is that of one replica."""
    fleet = replace(question.fleets[0], name=name)
    capacity = Capacity(capacity_per_s, capacity_per_s, capacity_per_s, ())
    planned = Load(num_replicas, rate_per_s, CARRIED, {})
    figures = {"energy_per_output_token": joules}
    return FleetAnswer(fleet, 1, capacity, planned=planned, figures=figures, cost=cost)


def names(answers: tuple[FleetAnswer, ...]) -> list[str]:
    return [one.fleet.name for one in answers]


@pytest.mark.parametrize(
    ("together_per_s", "replicas"),
    [
        pytest.param(36.0, [4, 2, 1, 1, 2, 2], id="four carry nine each, one alone carries ten"),
        pytest.param(60.0, [4, 2, 1, 1, 1, 2], id="one alone carries ten, four carry fifteen each"),
        pytest.param(
            28.0, [4, 2, 1, 1, 2, 2], id="four are known to carry the target all the same"
        ),
    ],
)
def test_each_hour_has_the_replicas_for_its_rate_at_the_less_that_one_surely_carries(
    tmp_path: Path, together_per_s: float, replicas: list[int]
) -> None:
    """30, 15, 0, 7.5, 9.75 and 12 requests/s; an hour costs its replicas' part of the peak's 8.

    The capacities themselves, half as much again, count for nothing; and the busiest hour has the
    fleet that is recommended, even where three such replicas would do by this reckoning.
    """
    day = [2.0, 1.0, 0.0, 0.5, 0.65, 0.8, *[0.5] * 18]
    question = question_of(tmp_path, target_rate_per_s=30.0, hourly_weights=day)
    alone = answer_of(question, 4, cost=Cost(8.0, 1.0))
    alone = replace(alone, capacity=Capacity(15.0, 10.0, 20.0, ()))
    together = Capacity(1.5 * together_per_s, together_per_s, 2.0 * together_per_s, ())
    best = replace(alone, capacity=together, capacity_replicas=4)
    plan = make_plan(question, [alone], best)
    assert [hour.rate_per_s for hour in plan.hours[:6]] == [30.0, 15.0, 0.0, 7.5, 9.75, 12.0]
    assert [hour.num_replicas for hour in plan.hours[:6]] == replicas
    assert [hour.cost_per_hour for hour in plan.hours[:6]] == [2.0 * num for num in replicas]
    assert plan.headroom == pytest.approx(1.5 * together_per_s / 30.0 - 1.0)


def test_a_day_has_its_own_cost_a_token_beside_that_of_its_busiest_hour(tmp_path: Path) -> None:
    """The busiest hour gives 4 million tokens and the day 6.75 times that, with 28 replica hours.

    A replica hour costs 2.
    """
    (tmp_path / "prices.toml").write_text(
        '[gpu."NVIDIA A100-SXM4-40GB"]\nper_gpu_hour = 2.0\ngrade = "paid"\n'
    )
    asked = {"target_rate_per_s": 30.0, "hourly_weights": DAY, "prices": "prices.toml"}
    question = question_of(tmp_path, **asked)
    alone = answer_of(question, 4, cost=Cost(8.0, 2.0))
    together = Capacity(40.0, 40.0, 40.0, (), "all carried")
    plan = make_plan(question, [alone], replace(alone, capacity=together, capacity_replicas=4))
    replicas = [hour.num_replicas for hour in plan.hours]
    assert replicas == [4, 2, *[1] * 22]
    tokens_m = 4.0 * (1 + 1 / 2 + 0 + 21 / 4)
    cost, day = (one for one in plan_remarks(plan) if " USD" in one)
    assert cost == (
        "Cost at 30 requests/s: 8 USD an hour, 2 USD a million output tokens, at the paid prices "
        "of prices.toml."
    )
    assert day == (
        "Over the day: 56 USD instead of 192 with the fleet always on, 71 % less; "
        f"{56 / tokens_m:.2f} USD a million output tokens."
    )


def test_where_one_replica_surely_carries_no_rate_every_hour_has_the_whole_fleet(
    tmp_path: Path,
) -> None:
    question = question_of(tmp_path, target_rate_per_s=30.0, hourly_weights=DAY)
    alone = replace(answer_of(question, 4), capacity=Capacity(10.0, 0.0, 20.0, ()))
    best = replace(alone, capacity=Capacity(40.0, 36.0, 44.0, ()), capacity_replicas=4)
    plan = make_plan(question, [alone], best)
    assert {hour.num_replicas for hour in plan.hours} == {4}


def test_no_hour_has_more_replicas_than_the_busiest(tmp_path: Path) -> None:
    """At five that one surely carries alone, 28.5 requests/s would take six; four carry 30."""
    question = question_of(tmp_path, target_rate_per_s=30.0, hourly_weights=[2.0, 1.9, *[1.0] * 22])
    alone = replace(answer_of(question, 4), capacity=Capacity(10.0, 5.0, 20.0, ()))
    best = replace(alone, capacity=Capacity(40.0, 36.0, 44.0, ()), capacity_replicas=4)
    plan = make_plan(question, [alone], best)
    assert [hour.num_replicas for hour in plan.hours[:3]] == [4, 4, 3]


def test_under_a_target_the_cheapest_fleet_wins_then_the_fewest_gpus_then_the_least_energy(
    tmp_path: Path,
) -> None:
    question = question_of(tmp_path, target_rate_per_s=30.0)
    dear = answer_of(question, 2, name="dear", cost=Cost(9.0, 1.0))
    cheap = answer_of(question, 6, name="cheap", cost=Cost(6.0, 9.0))
    smaller = answer_of(question, 5, name="smaller", joules=2.0, cost=Cost(6.0, 9.0))
    thrifty = answer_of(question, 5, name="thrifty", cost=Cost(6.0, 9.0))
    order = ranked(question, [dear, cheap, smaller, thrifty])
    assert names(order) == ["thrifty", "smaller", "cheap", "dear"]


def test_without_a_target_what_carries_most_for_each_gpu_or_for_its_money_wins(
    tmp_path: Path,
) -> None:
    question = question_of(tmp_path)
    large = answer_of(question, 4, name="large", rate_per_s=40.0)
    small = answer_of(question, 1, name="small", rate_per_s=12.0)
    assert names(ranked(question, [large, small])) == ["small", "large"]
    cheap = replace(large, cost=Cost(8.0, 1.5))
    dear = replace(small, cost=Cost(2.0, 2.5))
    assert names(ranked(question, [dear, cheap])) == ["large", "small"]


def test_a_fleet_that_carries_comes_before_those_that_do_not_and_of_these_the_nearest(
    tmp_path: Path,
) -> None:
    question = question_of(tmp_path, target_rate_per_s=30.0)
    carrying = answer_of(question, 60, name="carrying", capacity_per_s=0.5)
    near = replace(answer_of(question, 1, name="near", capacity_per_s=2.0), planned=None)
    far = replace(answer_of(question, 1, name="far", capacity_per_s=1.0), planned=None)
    refused = replace(far, fleet=replace(far.fleet, name="refused"), capacity=None)
    order = ranked(question, [refused, far, near, carrying])
    assert names(order) == ["carrying", "near", "far", "refused"]


@pytest.mark.parametrize("asked", [{}, {"target_rate_per_s": 30.0}])
def test_a_fleet_that_breaks_a_constraint_comes_after_all_that_keep_them(
    tmp_path: Path, asked: dict[str, float]
) -> None:
    """However few GPUs it takes, and before those that carry nothing."""
    question = question_of(tmp_path, **asked)
    keeping = answer_of(question, 60, name="keeping")
    broken = (Broken("agreement >= 0.9", 0.5, 0.4),)
    breaking = replace(answer_of(question, 1, name="breaking"), broken=broken)
    idle = replace(answer_of(question, 1, name="idle"), planned=None)
    assert names(ranked(question, [idle, breaking, keeping])) == ["keeping", "breaking", "idle"]


def test_one_replica_is_given_its_requests_by_turns_and_several_as_the_fleet_says(
    tmp_path: Path,
) -> None:
    question = question_of(tmp_path, routers=["least-kv"])
    (fleet,) = question.fleets
    assert fleet_scenario(question, fleet, 1).fleet.router == "round-robin"
    assert fleet_scenario(question, fleet, 2).fleet.router == "least-kv"


TWO_CONTEXTS: dict[str, Any] = {
    "fleet": {"profile": "layerskip-a100-40gb", "weights_start": "host"},
    "workload": {"prompt": {"kind": "constant", "tokens": 6000}, "over_context": "truncate"},
    "policy": [{"use": "vanilla"}],
    "plan": {"candidates": [["llama2-7b"], ["llama3-8b"]]},
}
"""Prompts of 6,000 tokens, for contexts of 4,096 and of 8,192."""


def test_fleets_of_several_contexts_meet_the_same_shortened_requests(tmp_path: Path) -> None:
    """Cut for one fleet alone, they would ask less of it."""
    path = write(tmp_path, **TWO_CONTEXTS)
    question = read_plan(load_scenario(path), tmp_path, "small.toml")
    met = []
    for fleet in question.fleets:
        planned = planned_scenario(question, fleet, Load(1, 4.0, CARRIED, {}))
        requests, num_shortened = prepare(planned, tmp_path).requests(planned.seed)
        assert num_shortened == len(requests)
        assert (requests.prompt_tokens + requests.output_tokens == 4096).all()
        met.append(requests)
    assert (met[0].prompt_tokens == met[1].prompt_tokens).all()


@pytest.mark.parametrize(("given", "kept"), [(3000, 3000), (6000, 4096)])
def test_a_context_that_is_given_is_shortened_to_where_a_fleet_has_less(
    tmp_path: Path, given: int, kept: int
) -> None:
    path = write(tmp_path, **TWO_CONTEXTS)
    scenario = load_scenario(path, [f"workload.context_tokens={given}"])
    question = read_plan(scenario, tmp_path, "small.toml")
    assert question.scenario.workload.context_tokens == kept


def test_a_fleet_s_scenario_has_its_models_and_its_policy_alone(tmp_path: Path) -> None:
    question = read_plan(load_scenario(write(tmp_path, **TWO_CONTEXTS)), tmp_path, "small.toml")
    for fleet, model in zip(question.fleets, ("llama2-7b", "llama3-8b"), strict=True):
        scenario = fleet_scenario(question, fleet, 3)
        assert scenario.fleet.candidates == (model,)
        assert (scenario.policy, scenario.fleet.num_replicas) == ((fleet.policy,), 3)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param('plan.candidates=[["llama3-8b"]]', id="one context"),
        pytest.param('workload.over_context="refuse"', id="nothing is shortened"),
    ],
)
def test_requests_are_left_to_the_context_where_no_fleet_would_meet_others(
    tmp_path: Path, change: str
) -> None:
    path = write(tmp_path, **TWO_CONTEXTS)
    question = read_plan(load_scenario(path, [change]), tmp_path, "small.toml")
    assert question.scenario.workload.context_tokens is None


@pytest.mark.parametrize(
    ("num_requests", "num_samples", "rows", "told"),
    [
        pytest.param(6000.0, 3, "in-order", False, id="three samples of a third of the trace"),
        pytest.param(7000.0, 3, "in-order", True, id="three samples of more than a third"),
        pytest.param(6000.0, 6, "in-order", True, id="six samples of a third"),
        pytest.param(90_000.0, 6, "random", False, id="rows are drawn"),
    ],
)
def test_samples_that_share_rows_of_a_short_trace_are_said_to(
    tmp_path: Path, num_requests: float, num_samples: int, rows: str, told: bool
) -> None:
    """The trace has 19,366 rows; samples begin at three or six places of it."""
    trace = {"file": str(TRACE)}
    arrivals = {"kind": "poisson", "rate_per_s": 4.0}
    workload = {"num_requests": 60, "arrivals": arrivals, "trace": trace, "trace_rows": rows}
    path = tmp_path / "short.toml"
    data = tomllib.loads(write(tmp_path, plan={"max_replications": 6}).read_text())
    path.write_text(toml_text({**data, "workload": workload}))
    question = read_plan(load_scenario(path), tmp_path, "short.toml")
    load = Load(1, 4.0, Verdict((), num_samples), {"num_requests": num_requests})
    capacity = Capacity(4.0, 4.0, math.inf, (), "all carried")
    best = replace(answer_of(question, 1), loads=(load,), capacity=capacity)
    said = [one for one in plan_remarks(make_plan(question, [best], best)) if "share some" in one]
    assert bool(said) == told
    if told:
        assert f"Samples of up to {num_requests:,.0f} requests take the 19,366 rows" in said[0]


TWO_FAMILIES = ["layerskip-a100-40gb", "opt-a100-40gb"]


def test_a_profile_without_the_scenario_s_models_is_left_out_by_name(tmp_path: Path) -> None:
    """Its other models are not what was asked about."""
    fleet = {"profile": "layerskip-a100-40gb", "candidates": ["llama2-7b"]}
    path = write(tmp_path, fleet=fleet, plan={"profiles": TWO_FAMILIES})
    question = read_plan(load_scenario(path), tmp_path, "small.toml")
    assert [fleet.profile for fleet in question.fleets] == ["layerskip-a100-40gb"]
    assert question.skipped == ("opt-a100-40gb has no llama2-7b",)
    assert read_plan(load_scenario(path, ["fleet.candidates=[]"]), tmp_path, "x").skipped == ()
    with pytest.raises(InputError, match=r"^small\.toml, fleet\.candidates: No profile has the"):
        read_plan(load_scenario(path, ['plan.profiles=["opt-a100-40gb"]']), tmp_path, "small.toml")


def test_a_fleet_s_scenario_can_be_read_again_whatever_was_published(tmp_path: Path) -> None:
    """A published figure of a policy that the fleet does not have stands in its way otherwise."""
    published = [
        {"figure": "output_throughput", "policy": name, "published": 1.0, "source": "a paper"}
        for name in ("helios", "vanilla")
    ]
    path = write(tmp_path, policy=[{"use": "helios"}, {"use": "vanilla"}], published=published)
    question = read_plan(load_scenario(path), tmp_path, "small.toml")
    for fleet in question.fleets:
        planned = planned_scenario(question, fleet, Load(1, 4.0, CARRIED, {}))
        file = tmp_path / "found.toml"
        file.write_text(toml_text(resolved(planned)))
        assert load_scenario(file) == planned


@pytest.mark.parametrize(
    ("own", "left_out"),
    [
        pytest.param(0, 6, id="a tenth of sixty requests, as of samples"),
        pytest.param(20, 20, id="what the scenario leaves out, where that is more"),
    ],
)
def test_the_planned_run_leaves_out_the_share_that_samples_do(
    tmp_path: Path, own: int, left_out: int
) -> None:
    path = write(tmp_path, measure={"warmup_requests": own})
    question = read_plan(load_scenario(path), tmp_path, "small.toml")
    scenario = planned_scenario(question, question.fleets[0], Load(2, 8.0, CARRIED, {}))
    assert scenario.measure.warmup_requests == left_out


def test_seconds_of_warm_up_that_outlast_the_planned_run_are_dropped(tmp_path: Path) -> None:
    """60 requests take 15 s at 4 a second and 1.5 s at 40, of which ten are all warm-up."""
    scenario = load_scenario(write(tmp_path, measure={"warmup_s": 10.0}))
    question = read_plan(scenario, tmp_path, "small.toml")
    fleet = question.fleets[0]
    own, fast = (planned_scenario(question, fleet, Load(1, at, CARRIED, {})) for at in (4.0, 40.0))
    assert (own.measure.warmup_s, own.measure.warmup_requests) == (10.0, 6)
    assert (fast.measure.warmup_s, fast.measure.warmup_requests) == (0.0, 6)
    run_point(point_of(fast, tmp_path))


ANSWER_S = {"short": 1.0, "long": 20.0}
"""Of a run of 100 s at the rate of a load, 20 answers are a fifth, or four times as much."""


@pytest.mark.parametrize(("answer", "num_times", "left_out"), [("short", 1, 40), ("long", 4, 160)])
def test_a_trace_that_is_short_for_its_answers_is_played_again_for_its_figures(
    tmp_path: Path, answer: str, num_times: int, left_out: int
) -> None:
    """400 requests at 4 a second, a tenth of them warm-up."""
    lines = [f'{{"timestamp":{500 * i},"input_length":50,"output_length":20}}' for i in range(400)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    scenario = load_scenario(write(tmp_path), ['workload={trace={file="t.jsonl"}}'])
    question = read_plan(scenario, tmp_path, "small.toml")
    load = Load(1, 4.0, CARRIED, {}, sample_s=1e4, answer_s=ANSWER_S[answer])
    (point,) = next(_Bench(question, question.fleets[0]).as_served(load))
    trace = point.scenario.workload.trace
    assert trace is not None
    assert (trace.repeat, point.scenario.measure.warmup_requests) == (num_times, left_out)
    assert trace.rate_scale == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("answer", "num_points"), [("short", 1), ("long", 3)])
def test_samples_take_the_place_of_a_draw_that_is_short_for_its_answers(
    tmp_path: Path, answer: str, num_points: int
) -> None:
    scenario = load_scenario(write(tmp_path), ["workload.num_requests=400"])
    question = read_plan(scenario, tmp_path, "small.toml")
    load = Load(1, 4.0, CARRIED, {}, sample_s=1e4, answer_s=ANSWER_S[answer])
    points = next(_Bench(question, question.fleets[0]).as_served(load))
    assert len(points) == num_points


def test_cost_is_of_a_fleet_that_is_never_empty() -> None:
    """100 requests with 20 tokens and 50 J each, ten a second: 200 tokens/s and 500 W."""
    summary = {"num_requests": 100, "total_output_tokens": 2000, "total_gpu_energy": 5000.0}
    assert steadily(summary, 10.0) == (500.0, 200.0)
    assert steadily({**summary, "total_gpu_energy": None}, 10.0) == (None, 200.0)


def test_a_figure_that_one_run_lacks_has_no_mean() -> None:
    runs = [
        {"summary": {"p99_ttft_ms": 10.0, "energy": 4, "completed": None, "label": "a"}},
        {"summary": {"p99_ttft_ms": 20.0, "energy": None, "completed": 3, "label": "b"}},
    ]
    assert mean_figures(runs) == {"p99_ttft_ms": 15.0, "energy": None, "completed": None}


def test_a_fleet_whose_whole_run_is_refused_plans_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has judged it by the constraints, nor priced it."""
    found: list[FleetAnswer] = []
    kept = commands.check_answerable

    def refuse(self: object, planned: Load) -> Any:
        raise InputError("Request 9 is too long.")
        yield

    def seen(question: PlanQuestion, answers: list[FleetAnswer]) -> FleetAnswer:
        found.extend(answers)
        return kept(question, answers)

    monkeypatch.setattr("helios_sim.search.bench._Bench.as_served", refuse)
    monkeypatch.setattr(commands, "check_answerable", seen)
    path = write(tmp_path)
    with pytest.raises(InputError, match="Request 9 is too long"):
        commands.plan(path, [], inline(tmp_path / "out"))
    (answer,) = found
    assert answer.planned is None
    assert answer.capacity is not None and answer.capacity.rate_per_s > 0.0
    assert not answer.figures and answer.cost is None and answer.loads


def test_constraints_that_some_samples_break_are_said_to_be_kept_on_average(tmp_path: Path) -> None:
    question = question_of(tmp_path, target_rate_per_s=30.0, constraints="agreement>=0.9")
    best = replace(answer_of(question, 4), num_breaking=2, num_judged=10)

    def said(best: FleetAnswer) -> str:
        told = replace(make_plan(question, [best], best), hours=())
        return " ".join(_constraints(told))

    assert "mine decides on few evaluated requests" in said(best)
    assert "breaks them in 2 of 10 samples" in said(best)
    assert "decides" not in said(replace(best, num_breaking=0))


@pytest.mark.parametrize(
    ("asked", "agreement", "kept"),
    [
        ("perplexity<=99;agreement>=0.5", 0.9, "perplexity and agreement"),
        ("perplexity<=99;agreement>=0.5", 1.0, "perplexity"),
        ("agreement>=0.5", 1.0, None),
        ("energy<=99", 0.9, None),
    ],
)
def test_a_bound_on_another_model_s_quality_is_said_to_rest_on_it(
    tmp_path: Path, asked: str, agreement: float, kept: str | None
) -> None:
    """Tokens at full depth agree with themselves, and joules are scaled."""
    question = question_of(tmp_path, target_rate_per_s=30.0, constraints=asked)
    best = answer_of(question, 4)
    profile = question.profiles[best.fleet.profile]
    like = {"stand_ins": {"opt-6.7b": "opt-1.3b"}}
    lent = replace(profile, provenance=replace(profile.provenance, environment=like))
    question = replace(question, profiles={profile.name: lent})
    best = replace(best, models=("opt-6.7b",), figures={"agreement": agreement})
    (said,) = _constraints(replace(make_plan(question, [best], best), hours=()))
    rests = f" if opt-6.7b has the {kept} of opt-1.3b, which nobody observed" if kept else ""
    assert said.endswith(f"; kept by what is recommended{rests}.")
