"""Which trials go on, what breaks a constraint and what is recommended, by pencil."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helios_sim.scenario import load_scenario
from helios_sim.search.goals import Broken, Judge, in_words, parse_constraints, parse_goal
from helios_sim.search.tune import (
    Finalist,
    First,
    HeldOut,
    Trial,
    Tuned,
    _hold_out,
    _promising,
    nearest_miss,
    read_tune,
)
from tests.search.asking import write

OBJECTIVES = (parse_goal("throughput", "here"), parse_goal("ttft:p95", "here"))


def judge_of(constraints: str = "") -> Judge:
    return Judge(OBJECTIVES, parse_constraints(constraints, "here"), None, "here")


def trial(number: int, first: tuple[float, float], violation: float = 0.0) -> Trial:
    """A trial that ran on the first sample."""
    broken = (Broken("ttft<=1ms", 2.0, violation),) if violation else ()
    return Trial(number, {}, "stopped", First(first, violation), first, broken)


def figures(throughput: float, ttft_ms: float, agreement: float = 1.0) -> dict[str, Any]:
    """A run whose latencies meet no request that never finishes."""
    return {
        "summary": {
            "output_throughput": throughput,
            "p95_ttft_ms": ttft_ms,
            "agreement": agreement,
        },
        "judged": [{"share": 1.0, "value_ms": ttft_ms}],
    }


def test_the_share_that_goes_on_is_of_the_best_fronts_among_all_trials_so_far() -> None:
    """Of six trials three go on: one of an earlier batch is among them and takes a place."""
    before = [trial(0, (90.0, 5.0)), trial(1, (10.0, 90.0))]
    batch = {
        0: trial(2, (100.0, 10.0)),
        1: trial(3, (20.0, 80.0)),
        2: trial(4, (80.0, 6.0)),
        3: trial(5, (30.0, 70.0)),
    }
    assert _promising(judge_of(), batch, before, 0.5) == [0, 2]
    assert _promising(judge_of(), batch, (), 0.5) == [0, 2]
    assert _promising(judge_of(), batch, (), 0.51) == [0, 2, 3]


def test_of_equals_the_earlier_goes_on_and_who_breaks_less_before_who_is_better() -> None:
    equals = {0: trial(1, (50.0, 5.0)), 1: trial(2, (50.0, 5.0))}
    assert _promising(judge_of(), equals, [trial(0, (50.0, 5.0))], 0.6) == [0]
    broken = {
        0: trial(0, (90.0, 1.0), 0.2),
        1: trial(1, (10.0, 9.0), 0.1),
        2: trial(2, (1.0, 99.0)),
    }
    assert _promising(judge_of(), broken, (), 0.3) == [2]
    assert _promising(judge_of(), broken, (), 0.6) == [1, 2]


def test_trials_rank_by_what_they_break_on_the_sample_that_all_have_met() -> None:
    """The earlier trial breaks nothing on the first sample and much on the others."""
    later = (Broken("ttft<=1ms", 9.0, 8.0),)
    before = [replace(trial(0, (50.0, 5.0)), state="full", broken=later)]
    batch = {0: trial(1, (40.0, 6.0)), 1: trial(2, (60.0, 4.0))}
    assert _promising(judge_of(), batch, before, 0.6) == [1]


def test_what_cannot_be_run_never_goes_on() -> None:
    batch = {0: Trial(0, {}, "impossible"), 1: trial(1, (1.0, 1.0))}
    assert _promising(judge_of(), batch, [Trial(2, {}, "impossible")], 1.0) == [1]


def test_a_constraint_is_broken_on_average_and_by_how_much_of_its_limit() -> None:
    """150 ms against 100 is half of it; 0.72 against 0.9 a fifth; the worst comes first."""
    judge = judge_of("agreement>=0.9;ttft:p95<100ms")
    runs = [figures(1.0, 100.0, 0.70), figures(1.0, 200.0, 0.74)]
    found = judge.broken(runs)
    assert [one.constraint for one in found] == ["ttft:p95<=100ms", "agreement>=0.9"]
    assert [one.reached for one in found] == pytest.approx([150.0, 0.72])
    assert [one.violation for one in found] == pytest.approx([0.5, 0.2])
    assert judge.broken([figures(1.0, 80.0, 0.86), figures(1.0, 120.0, 0.96)]) == ()


def test_a_limit_without_a_percentile_says_that_every_request_is_held_to_it() -> None:
    (found,) = judge_of("ttft<100ms").broken([figures(1.0, 150.0)])
    assert in_words(found) == "ttft<=100ms by every request (reached 150, 50 % off)"


def test_a_mean_that_misses_its_bound_by_rounding_keeps_it() -> None:
    runs = [figures(1.0, 1.0, share) for share in (0.8, 0.9, 1.0, 0.9)]
    judge = judge_of("agreement>=0.9")
    assert judge.broken(runs) == ()
    assert judge.broken([figures(1.0, 1.0, 0.9 - 1e-15)]) == ()
    assert judge.broken([figures(1.0, 1.0, 0.9 - 1e-9)]) != ()


def test_requests_that_never_finish_break_a_limit_more_than_any_that_are_late() -> None:
    """The fewer of them meet the limit, the more it is broken."""
    judge = judge_of("ttft:p95<100ms")
    late = judge.broken([figures(1.0, 1000.0)])[0].violation
    runs = [figures(1.0, 1.0), figures(1.0, 1.0)]
    violations = []
    for share in (0.9, 0.1):
        runs[1]["judged"] = [{"share": share, "value_ms": None}]
        violations.append(judge.broken(runs)[0].violation)
    assert late < violations[0] < violations[1]


def tuned(held: HeldOut | None) -> Tuned:
    """A search with a winner; of its question nothing is needed."""
    nothing: Any = None
    first = trial(0, (1.0, 1.0))
    others = () if held is None else (replace(held, rate_scale=2.0), held)
    return Tuned(nothing, first, (first,), first, others, ())


def held_out(mean: float, half: float, **changes: Any) -> HeldOut:
    """A winner whose gains add up to so much, give or take."""
    worth = (mean, mean - half, mean + half)
    return replace(HeldOut(1.0, (100.0,), (110.0,), (), (), (worth,), worth), **changes)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (0.1, 0.09, "better"),
        (0.1, 0.11, "unsure"),
        (0.1, math.inf, "unsure"),
        (0.0, 0.0, "no better"),
        (-0.1, 0.3, "no better"),
    ],
)
def test_a_winner_is_better_where_the_whole_interval_of_its_gains_is_a_gain(
    mean: float, half: float, verdict: str
) -> None:
    assert tuned(held_out(mean, half)).verdict == verdict


def test_who_keeps_the_constraints_is_better_than_who_does_not() -> None:
    broken = (Broken("ttft<=1ms", 2.0, 1.0),)
    assert tuned(held_out(0.1, 0.0, tuned_broken=broken)).verdict == "no better"
    assert tuned(held_out(-0.1, 0.0, base_broken=broken)).verdict == "better"
    both = held_out(0.1, 0.0, tuned_broken=broken, base_broken=broken)
    assert tuned(both).verdict == "no better"
    assert tuned(None).verdict == "no better"


def test_who_was_chosen_though_it_breaks_the_constraints_is_no_better() -> None:
    """Whatever held-out traffic says."""
    found = tuned(held_out(0.1, 0.0))
    assert found.winner is not None
    broken = (Broken("ttft<=1ms", 2.0, 1.0),)
    for breaks, verdict in (((), "better"), (broken, "no better")):
        finalists = (Finalist(found.winner, (1.0, 1.0), breaks),)
        assert replace(found, finalists=finalists).verdict == verdict


def test_held_out_gains_are_paired_and_positive_where_the_winner_is_better(tmp_path: Path) -> None:
    """Tokens gain 10 and 20 a second; the TTFT rises by 2 and 4 ms: mean gains of 15 and -3.

    Two pairs have a quantile of 12.706, so that the bounds are 12.706 x 5 and 12.706 x 1 away. Of
    means of 105 and 11 the gains are 10/105 - 2/11 and 20/105 - 4/11, or -0.0866 and twice that.
    The traffic comes after the two samples of the tuning and the two of the finals.
    """
    changes = {"objectives": ["throughput", "ttft:p95"], "constraints": "agreement>=0.5"}
    path = write(tmp_path, search=changes)
    question = read_tune(load_scenario(path), tmp_path, "small.toml")
    winner = replace(trial(0, (1.0, 1.0)), values={"serving.max_batch": 8})
    steps = _hold_out(question, winner, 1.0)
    scenarios = [point.scenario for point in next(steps)]
    seed = question.space.base.seed
    assert [one.seed for one in scenarios] == [seed + 4, seed + 5] * 2
    own = question.space.base.serving.max_batch
    assert [one.serving.max_batch for one in scenarios] == [own, own, 8, 8]
    base = [figures(100.0, 10.0), figures(110.0, 12.0, 0.4)]
    won = [figures(110.0, 12.0, 0.4), figures(130.0, 16.0, 0.5)]
    with pytest.raises(StopIteration) as end:
        steps.send([*base, *won])
    held: HeldOut = end.value.value
    assert (held.base, held.tuned) == ((105.0, 11.0), (120.0, 14.0))
    assert held.gains[0] == pytest.approx((15.0, 15.0 - 63.531, 15.0 + 63.531), abs=1e-3)
    assert held.gains[1] == pytest.approx((-3.0, -3.0 - 12.706, -3.0 + 12.706), abs=1e-3)
    assert held.worth == pytest.approx((-0.1299, -0.1299 - 0.5501, -0.1299 + 0.5501), abs=1e-4)
    assert held.base_broken == ()
    assert [one.constraint for one in held.tuned_broken] == ["agreement>=0.5"]


def test_the_nearest_miss_is_the_trial_whose_violations_add_up_to_least() -> None:
    """Of those that ran on all samples: one that was stopped has met the first alone."""
    nothing: Any = None
    two = Trial(
        1, {}, "full", broken=(Broken("ttft<=1ms", 1.2, 0.2), Broken("agreement>=0.9", 0.7, 0.2))
    )
    near = replace(trial(2, (1.0, 1.0), 0.3), state="full")
    trials = (
        replace(trial(0, (1.0, 1.0), 0.5), state="full"),
        two,
        near,
        trial(3, (1.0, 1.0), 0.1),
    )
    said = nearest_miss(Tuned(nothing, two, trials, None, (), ()))
    assert said.startswith("trial 2 comes nearest and breaks ttft<=1ms (reached 2, 30 % off)")
