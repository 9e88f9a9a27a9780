"""What may vary, what is best and what must hold: read strictly, in words of the user's file."""

from __future__ import annotations

import math
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_sim.errors import InputError
from helios_sim.profiles.files import load_profile
from helios_sim.scenario import PolicySettings, Scenario, parse_scenario
from helios_sim.search.goals import parse_constraints, parse_goal
from helios_sim.search.pareto import best_first, dominates, front, ranks
from helios_sim.search.prices import Cost, Prices, check_prices, cost_of, load_prices
from helios_sim.search.samplers import sobol_shares
from helios_sim.search.space import Range, read_space
from helios_sim.search.whatif import parse_vary, whatif_studies


def scenario(ranges: dict[str, Any], **search: Any) -> Scenario:
    data = {
        "name": "small",
        "workload": {
            "num_requests": 50,
            "arrivals": {"kind": "poisson", "rate_per_s": 2.0},
            "prompt": {"kind": "constant", "tokens": 50},
            "output": {"kind": "constant", "tokens": 20},
        },
        "fleet": {"profile": "opt-a100-40gb"},
        "policy": [{"use": "helios"}],
        "search": {"ranges": ranges, **search},
    }
    return parse_scenario(data, "x.toml", Path())


def told(ranges: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        read_space(scenario(ranges), Path(), "x.toml")
    return str(error.value)


def test_an_unknown_option_names_the_nearest_and_the_range() -> None:
    text = told({"policy.breach_limt": {"low": 1, "high": 9}})
    assert "search.ranges.policy.breach_limt" in text
    assert "'breach_limit'" in text


def test_an_unknown_setting_names_the_nearest() -> None:
    assert "Did you mean 'max_batch'?" in told({"serving.max_bach": [1, 2]})


PICKY = """
from helios_sim.policy.baselines import Vanilla

class Picky(Vanilla):
    def __init__(self, place=2):
        if place < 2:
            raise IndexError("no options: an unknown option goes into no index")
"""
"""A policy of the user's own that chooses words of ours for a value it does not take."""


def picky(folder: Path, ranges: dict[str, Any]) -> Scenario:
    (folder / "picky.py").write_text(PICKY)
    policy = PolicySettings(use="picky:Picky")
    return scenario(ranges).model_copy(update={"policy": (policy,)})


def test_a_value_that_is_refused_in_any_words_is_no_unknown_setting(tmp_path: Path) -> None:
    """The first value cannot be and the others can, so that the range stands."""
    base = picky(tmp_path, {"policy.place": {"low": 1, "high": 9}})
    assert [one.key for one in read_space(base, tmp_path, "x.toml").ranges] == ["policy.place"]
    with pytest.raises(InputError, match="could not be built from the options"):
        whatif_studies(base, tmp_path, "x.toml", base.policy, {"policy.place": [1]}, 1)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("policy.breach_limit.deeper", "goes into 'policy.0.breach_limit', which is a plain value"),
        ("policy.7.breach_limit", "needs an index from 0 to 0 in place of '7'"),
    ],
)
def test_a_path_that_leads_nowhere_is_told_at_its_range(key: str, said: str) -> None:
    data = scenario({key: [1, 2]})
    policy = PolicySettings(use="helios", breach_limit=10)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=said) as error:
        read_space(data.model_copy(update={"policy": (policy,)}), Path(), "x.toml")
    assert error.value.where == f"x.toml, search.ranges.{key}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"low": 9, "high": 1}, "The range is empty: low is 9 and high is 1"),
        ([], "The range is empty: choices holds no value"),
        ({"low": 1, "hihg": 2}, "Did you mean 'high'?"),
        ({"low": 0, "high": 9, "log": True}, "a logarithmic range is above 0"),
        ({"low": 1, "high": 9, "step": 0}, "it must be positive"),
        ("many", "allowed is a list of choices"),
        ({"low": 1, "high": 10**400}, "allowed is a number"),
        (reduce(lambda inner, _: {"a": inner}, range(3000), {"low": 1}), "nested too deeply"),
    ],
)
def test_a_range_that_cannot_be_says_why(given: Any, said: str) -> None:
    assert said in told({"policy.breach_limit": given})


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("serving.max_batch", {"low": 8, "high": 100_000}, "high is 100000, "),
        ("serving.max_batch", {"low": 0, "high": 64}, "low is 0, "),
        ("serving.max_batch", {"low": 8, "high": 8192, "log": True}, "high is 8192, "),
        ("serving.max_batch", [8, 100_000, 16], "a choice is 100000, "),
        ("serving.watermark", {"low": 0, "high": 2}, "high is 2.0, "),
        ("workload.arrivals.rate_per_s", {"low": 1e-9, "high": 9, "log": True}, "low is 1e-09, "),
        ("serving.batching", ["chunked", "chunky"], "a choice is chunky, "),
        ("policy.depth_quantile", {"low": 0.5, "high": 1.5}, "high is 1.5, "),
        ("policy.breach_limit", {"low": -5, "high": 50}, "low is -5, "),
        ("policy.window_kind", ["sliding", "slidng"], "a choice is slidng, "),
    ],
)
def test_a_range_beyond_what_its_setting_takes_is_refused_at_either_end_and_at_any_choice(
    key: str, given: Any, said: str
) -> None:
    """With the range's key, what was given and what is allowed."""
    text = told({key: given})
    assert text.startswith(f"x.toml, search.ranges.{key}: {said}which the setting never takes: ")
    assert re.search(r"input should be|it must be", text)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("fleet.assume.exits.stickiness", "nobody chooses what is assumed"),
        ("workload.first_trace_row", "it chooses the traffic"),
    ],
)
def test_what_nobody_may_choose_is_no_setting_to_be_tuned(key: str, said: str) -> None:
    text = told({key: {"low": 0.1, "high": 0.9}})
    assert text.startswith(f"x.toml, search.ranges.{key}: {key} is no setting to be tuned: {said}")


def test_a_range_whose_end_needs_another_setting_beside_it_stands() -> None:
    """A breach limit of 150 needs a longer window than the default of 100."""
    ranges = {
        "policy.breach_limit": {"low": 10, "high": 150},
        "policy.breach_window_tokens": {"low": 50, "high": 500},
        "policy.fixed_depth": {"low": 8, "high": 16},
        "policy.depth_rule": ["fixed", "dominant"],
    }
    space = read_space(scenario(ranges), Path(), "x.toml")
    assert [one.key for one in space.ranges] == list(ranges)


def test_a_search_without_ranges_or_without_a_table_says_so() -> None:
    assert "names no setting" in told({})
    plain = scenario({}).model_copy(update={"search": None})
    with pytest.raises(InputError, match=r"no \[search\] table"):
        read_space(plain, Path(), "x.toml")


def test_ranges_of_which_no_combination_is_a_scenario_say_what_the_first_lacks() -> None:
    text = told({"policy.breach_limit": {"low": 500, "high": 900}})
    assert "Of 64 combinations" in text
    assert "breach_window_tokens" in text


def test_an_option_called_as_an_end_of_a_range_may_vary(tmp_path: Path) -> None:
    """TOML makes policy.low = { low = 0 } a table that looks like a range without numbers."""
    (tmp_path / "steps.py").write_text(
        PICKY.replace("place=2", "low=2, choices=0").replace("place < 2", "low < 0")
    )
    nested = {"policy": {"low": {"low": 0, "high": 4}, "choices": [1, 2]}}
    base = scenario(nested).model_copy(update={"policy": (PolicySettings(use="steps:Picky"),)})
    ranges = read_space(base, tmp_path, "x.toml").ranges
    assert [one.key for one in ranges] == ["policy.low", "policy.choices"]


def test_a_dotted_key_may_stand_without_quotes() -> None:
    nested = {"policy": {"breach_limit": {"low": 10, "high": 90}}, "serving": {"max_batch": [8, 9]}}
    space = read_space(scenario(nested), Path(), "x.toml")
    assert [one.key for one in space.ranges] == ["policy.breach_limit", "serving.max_batch"]
    changed = space.scenario({"policy.breach_limit": 33, "serving.max_batch": 9})
    assert changed.policy[0].options["breach_limit"] == 33
    assert changed.serving.max_batch == 9
    assert space.own("serving.max_batch") == 256


@pytest.mark.parametrize(
    "key",
    [
        "policy.confidence_threshold",
        "serving.watermark",
        "fleet.memory_utilisation",
        "workload.arrivals.rate_per_s",
    ],
)
def test_whole_bounds_of_a_setting_that_takes_any_number_hold_all_between(key: str) -> None:
    """A utilisation of 0 is refused, which leaves its kind to be told by the scenario's own."""
    (one,) = read_space(scenario({key: {"low": 0, "high": 1}}), Path(), "x.toml").ranges
    assert one.grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {type(value) for value in one.grid()} == {float}
    stepped = {key: {"low": 0, "high": 1, "step": 0.5}}
    (one,) = read_space(scenario(stepped), Path(), "x.toml").ranges
    assert one.grid() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("key", ["policy.breach_limit", "serving.max_batch", "seed"])
def test_a_setting_of_whole_numbers_takes_whole_bounds_and_gives_whole_values(key: str) -> None:
    (one,) = read_space(scenario({key: {"low": 10, "high": 90}}), Path(), "x.toml").ranges
    assert one.grid() == [10, 30, 50, 70, 90]
    said = told({key: {"low": 10.5, "high": 90.0}})
    assert "low is 10.5 and high is 90.0; this setting takes whole numbers" in said
    assert "a whole range takes a whole step" in told({key: {"low": 1, "high": 9, "step": 0.5}})


def test_bounds_tell_the_kind_of_an_option_that_declares_none(tmp_path: Path) -> None:
    for low, values in ((2, [2, 3, 4]), (2.0, [2.0, 2.5, 3.0, 3.5, 4.0])):
        base = picky(tmp_path, {"policy.place": {"low": low, "high": 4}})
        (one,) = read_space(base, tmp_path, "x.toml").ranges
        assert one.grid() == values
        assert {type(value) for value in one.grid()} == {type(low)}


ranges = st.one_of(
    st.tuples(st.integers(1, 50), st.integers(0, 500), st.booleans()).map(
        lambda t: Range("k", t[0], t[0] + t[1], t[2], is_whole=True)
    ),
    st.tuples(st.floats(0.01, 5.0), st.floats(0.0, 100.0), st.booleans()).map(
        lambda t: Range("k", t[0], t[0] + t[1], t[2])
    ),
    st.lists(st.integers(), min_size=1, unique=True).map(lambda c: Range("k", choices=tuple(c))),
)


@given(ranges, st.floats(0.0, 1.0, exclude_max=True))
def test_every_share_of_a_range_lies_in_it(one: Range, share: float) -> None:
    value = one.at(share)
    if one.choices:
        assert value in one.choices
    else:
        assert one.low <= value <= one.high
        assert isinstance(value, int) == one.is_whole


@given(ranges)
def test_a_grid_ascends_from_one_end_to_the_other(one: Range) -> None:
    values = one.grid()
    if one.choices:
        assert values == list(one.choices)
        return
    assert values == sorted(set(values))
    assert values[0] == pytest.approx(one.low, rel=1e-5)
    assert values[-1] == pytest.approx(one.high, rel=1e-5)


def test_sobol_points_are_the_same_again_and_fill_every_tenth_of_each_axis() -> None:
    points = sobol_shares(3, 200, seed=5)
    assert points == sobol_shares(3, 200, seed=5)
    assert points != sobol_shares(3, 200, seed=6)
    for axis in zip(*points, strict=True):
        counts = [sum(int(10 * x) == tenth for x in axis) for tenth in range(10)]
        assert min(counts) >= 15


def test_constraints_take_slo_text_in_every_dialect_and_bounds_beside_it() -> None:
    found = parse_constraints("ttft:p99<500ms; tpot:p95 < 50 ms; agreement>=0.98", "here")
    assert found.limits == "ttft:p99<=500ms;tpot:p95<=50ms"
    assert [str(bound) for bound in found.bounds] == ["agreement>=0.98"]
    other = parse_constraints("p99_ttft_ms<=500 p95_tpot_ms<=50, agreement >= 98%", "here")
    assert str(other) == str(found)
    assert str(parse_constraints(str(found), "here")) == str(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agrement>=0.9", "Did you mean 'agreement'?"),
        ("agreement", "gives no bound; write a sign and a number, such as agreement>=0.98."),
        ("energy=3", "such as energy<=10."),
        ("agreement<=0.9", "from the wrong side"),
        ("energy>=0.9", "from the wrong side"),
        ("agreement>=98", "a share above 1"),
        ("ttft>500", "lower limit"),
        ("goodput>=-1", "not positive"),
        ("throughput>=50%", "in per cent, and throughput is no share"),
    ],
)
def test_a_constraint_that_cannot_be_says_why(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        parse_constraints(text, "here")
    assert said in str(error.value)


def test_objectives_are_names_and_latencies_take_a_statistic() -> None:
    assert (parse_goal("goodput", "here").better, parse_goal("energy", "here").scale) == (
        "higher",
        1e-3,
    )
    assert parse_goal("ttft:p95", "here").key == "p95_ttft_ms"
    assert parse_goal("tpot", "here").key == "p99_tpot_ms"
    with pytest.raises(InputError, match="Did you mean 'goodput'"):
        parse_goal("goodputt", "here")
    with pytest.raises(InputError, match="no statistic"):
        parse_goal("ttft:p12", "here")


costs = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30
)


@given(costs)
def test_a_front_is_what_nobody_dominates_and_ranks_peel_it(points: list[tuple[int, ...]]) -> None:
    on = set(front(points))
    for place, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        assert (place in on) == (not beaten)
    found = ranks(points)
    assert {place for place, rank in enumerate(found) if rank == 0} == on
    for a, first in zip(points, found, strict=True):
        for b, second in zip(points, found, strict=True):
            assert not dominates(a, b) or first < second
    ordered = best_first(points, len(points))
    assert sorted(ordered) == list(range(len(points)))
    assert [found[place] for place in ordered] == sorted(found)
    assert best_first(points, 3) == ordered[:3]


def test_a_point_is_beaten_by_one_that_is_nowhere_worse_and_somewhere_better() -> None:
    assert dominates((1.0, 2.0), (1.0, 3.0))
    assert not dominates((1.0, 2.0), (1.0, 2.0))
    assert not dominates((1.0, 2.0), (2.0, 1.0))
    assert front([(1.0, 3.0), (1.0, 2.0), (2.0, 1.0), (1.0, 2.0)]) == [1, 2, 3]


def test_the_knee_is_nearest_to_the_best_of_each_objective_as_the_crow_flies() -> None:
    """Scaled, the points are (0, 1), (0.2, 0.75), (0.5, 0.5) and (1, 0): 1, 0.78, 0.71 and 1.

    By the sum of both the second would be nearer than the third. Of equals the first is taken.
    """
    points = [(0.0, 100.0), (2.0, 75.0), (5.0, 50.0), (10.0, 0.0)]
    assert best_first(points, 1) == [2]
    assert best_first([points[0], points[3]], 1) == [0]
    assert best_first([(1.0, 7.0), (1.0, 7.0)], 1) == [0]


def test_costs_by_pencil() -> None:
    """Three GPUs at 2 an hour and 1 kW at 1.5 x 0.2: 6.3 an hour; 1,000 tokens/s are 3.6 M."""
    prices = Prices.model_validate(
        {
            "gpu": {"X": {"per_gpu_hour": 2.0, "grade": "assumed"}},
            "energy": {"per_kwh": 0.2, "overhead": 1.5, "grade": "assumed"},
        }
    )
    cost = cost_of(prices, "X", 3, 1000.0, 1000.0, "here")
    assert cost is not None
    assert cost.per_hour == pytest.approx(6.3)
    assert cost.per_million_tokens == pytest.approx(6.3 / 3.6)
    with pytest.raises(InputError, match="Did you mean 'X'"):
        cost_of(prices, "XX", 1, None, None, "here")
    without = prices.model_copy(update={"energy": None})
    assert cost_of(without, "X", 3, None, None, "here") == Cost(6.0, None)


def test_energy_that_nobody_read_is_not_free() -> None:
    """A cost with a price of energy is unknown; without one it is that of the hours."""
    profile = load_profile("small-family-cpu")
    device = profile.device.name
    prices = Prices.model_validate(
        {
            "gpu": {device: {"per_gpu_hour": 2.0, "grade": "assumed"}},
            "energy": {"per_kwh": 0.2, "grade": "assumed"},
        }
    )
    assert cost_of(prices, device, 3, None, 1000.0, "here") is None
    with pytest.raises(InputError, match=r"^here: .*'small-family-cpu' is unavailable"):
        check_prices(prices, profile, "here")
    check_prices(prices.model_copy(update={"energy": None}), profile, "here")


def test_a_prices_file_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[gpu.X]\nper_gpu_hours = 1.0\ngrade = "assumed"\n')
    with pytest.raises(InputError, match="Did you mean 'per_gpu_hour'"):
        load_prices("p.toml", tmp_path, "here")
    file.write_text('[gpu.X]\nper_gpu_hour = 1.0\ngrade = "paid"\nsauce = "a bill"\n')
    says = r"p\.toml, gpu\.X\.sauce: .*'source'\? Allowed are grade, per_gpu_hour, source"
    with pytest.raises(InputError, match=says):
        load_prices("p.toml", tmp_path, "here")
    file.write_text("[gpu.X]\nper_gpu_hour = 1.0\n")
    with pytest.raises(InputError, match=r"p\.toml, gpu\.X\.grade: The key 'grade' is required"):
        load_prices("p.toml", tmp_path, "here")
    file.write_text('[gpu.X]\nper_gpu_hour = 1.0\ngrade = "rumour"\n')
    with pytest.raises(InputError, match=r"p\.toml, gpu\.X\.grade: .*'rumour'; input should be"):
        load_prices("p.toml", tmp_path, "here")
    for missing in ("q.toml", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match=r"^here, .*: The file cannot be read"):
            load_prices(missing, tmp_path, "here")
    for content, says in (
        ("a = [", "not valid TOML"),
        ("a = " + "[" * 3000, "nested too deeply"),
        ("a = " + "9" * 5000, "4300 digits"),
    ):
        (tmp_path / "p.toml").write_text(content)
        with pytest.raises(InputError, match=says):
            load_prices("p.toml", tmp_path, "here")
    (tmp_path / "p.toml").write_text("")
    with pytest.raises(InputError, match="gpu: The key 'gpu' is required"):
        load_prices("p.toml", tmp_path, "here")


def test_vary_reads_values_as_toml_and_keeps_lists_whole() -> None:
    found = parse_vary(["a.b=1,2.5,text", 'c=["x","y"],[]', "d=" + "9" * 5000, "e=" + "[" * 3000])
    assert found == {
        "a.b": [1, 2.5, "text"],
        "c": [["x", "y"], []],
        "d": ["9" * 5000],
        "e": ["[" * 3000],
    }
    for wrong in ("a.b", "=1,2", "a="):
        with pytest.raises(InputError, match="write key=a,b,c"):
            parse_vary([wrong])
    with pytest.raises(InputError, match="twice"):
        parse_vary(["a=1", "a=2"])


def test_a_plan_s_target_follows_from_users() -> None:
    """3,000 users at 0.5 requests a minute and a peak of twice that: 50 a second."""
    data = scenario({"policy.breach_limit": [1]}).model_dump(exclude_none=True)
    data["plan"] = {"users": 3000, "requests_per_user_per_min": 0.5, "peak_factor": 2.0}
    plan = parse_scenario(data, "x.toml", Path()).plan
    assert plan is not None
    assert plan.target is not None
    assert math.isclose(plan.target, 50.0)
    data["plan"]["target_rate_per_s"] = 3.0
    with pytest.raises(InputError, match="the target is one of them"):
        parse_scenario(data, "x.toml", Path())
