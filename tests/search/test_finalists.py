"""Which trial is recommended: figures by pencil, traffic to tune, to choose and to report on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.policy.registry import policy_options
from helios_sim.scenario import parse_scenario
from helios_sim.search.drawings import against_energy, tune_frontiers
from helios_sim.search.goals import Broken
from helios_sim.search.page import tune_page
from helios_sim.search.points import Point
from helios_sim.search.samplers import Listed, Sampler
from helios_sim.search.space import Space
from helios_sim.search.tables import setting_rows, trial_records, trial_rows, tune_front
from helios_sim.search.tune import (
    Trial,
    Tuned,
    few_rounds,
    read_tune,
    recommended,
    tune_study,
)
from helios_sim.search.tune_words import tune_headline, tune_remarks

BATCHES = (8, 16, 32, 64)
TUNED, FINALS, HELD_OUT = (0, 1), (2, 3), (4, 5)
"""Samples of the traffic."""
MEASURED = 54
"""Requests of a sample after its warm-up."""
OWN = 256
"""The batch of the scenario as it stands."""

Answer = Callable[[int, int], tuple[float, float, float]]
"""Joules a token, agreement and TPOT p90 in ms of a batch on a sample."""


def tuned(
    answer: Answer,
    policy: str = "helios",
    workload: dict[str, Any] | None = None,
    folder: Path | None = None,
    filled: float = 0.0,
    **search: Any,
) -> Tuned:
    """A search over batches for the least energy, with these figures for answers.

    `filled` is the share of the largest batch that decodes together on average.
    """
    data = {
        "name": "pencil",
        "seed": 1,
        "workload": {
            "num_requests": 60,
            "arrivals": {"kind": "poisson", "rate_per_s": 4.0},
            "prompt": {"kind": "constant", "tokens": 100},
            "output": {"kind": "constant", "tokens": 40},
            **(workload or {}),
        },
        "fleet": {"profile": "opt-a100-40gb"},
        "policy": [{"use": policy}],
        "search": {
            "sampler": "grid",
            "replications": 2,
            "finals": 2,
            "held_out": 2,
            "held_out_rates": [1.0],
            "go_on_share": 1.0,
            "objectives": ["energy"],
            "constraints": "agreement>=0.9",
            "ranges": {"serving.max_batch": list(BATCHES)},
            **search,
        },
    }
    base_dir = folder or Path()
    question = read_tune(parse_scenario(data, "x.toml", base_dir), base_dir, "x.toml")

    def figures(point: Point) -> dict[str, Any]:
        sample = point.scenario.seed - 1
        energy, agreement, tpot_ms = answer(point.scenario.serving.max_batch, sample)
        return {
            "summary": {
                "energy_per_output_token": 1e3 * energy,
                "output_throughput": 100.0,
                "agreement": agreement,
                "p99_ttft_ms": 300.0,
                "num_measured": MEASURED,
                "num_requests": 60,
                "mean_batch_size": filled * point.scenario.serving.max_batch,
                "num_replicas": point.scenario.fleet.num_replicas,
                "p99_tpot_ms": 2 * tpot_ms,
            },
            "device": "",
            "judged": [{"limit": "", "share": 1.0, "value_ms": tpot_ms}],
            "together": None,
        }

    steps = tune_study(question).steps
    asked = next(steps)
    while True:
        try:
            asked = steps.send([figures(point) for point in asked])
        except StopIteration as end:
            found: Tuned = end.value
            return found


def joules(batch: int, sample: int) -> float:
    """The larger the batch the more, 1 % from one to the next; the scenario's own most of all."""
    return (2.0 if batch == OWN else 1.0 + 0.01 * BATCHES.index(batch)) + 0.1 * sample


def batch_of(found: Tuned) -> int:
    assert found.winner is not None
    return int(found.winner.values["serving.max_batch"])


def test_the_winner_is_the_best_that_keeps_the_constraints_on_samples_of_their_own() -> None:
    """The best on the tuning traffic misses the bound there; the next takes 1 % more joules."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), 0.89 if batch == 8 and sample in FINALS else 0.95, 1.0

    found = tuned(answer)
    assert [one.keeps for one in found.finalists] == [False, True, True, True]
    assert batch_of(found) == 16
    assert found.verdict == "better"
    assert recommended(found).serving.max_batch == 16
    assert any("where 3 of them keep the constraints" in one for one in tune_remarks(found))
    records = {row["trial"]: row for row in trial_records(found)}
    assert records[0]["broken_in_finals"].startswith("agreement>=0.9 (reached 0.89")
    assert [row["finalist"] for row in records.values()] == [False, True, True, True, True]


def test_what_is_reported_of_the_winner_comes_from_samples_that_did_not_choose_it() -> None:
    """Samples 4 and 5 add 0.4 and 0.5 to the 1.01 of the second batch, those that chose 0.25."""
    lucky = {8: 0.0, 16: -0.3, 32: 0.0, 64: 0.0, OWN: 0.0}

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample) + (lucky[batch] if sample in FINALS else 0.0), 0.95, 1.0

    found = tuned(answer)
    assert batch_of(found) == 16
    assert found.own_rate is not None
    assert found.own_rate.tuned[0] == pytest.approx(1.01 + 0.45)


def test_settings_that_keep_the_constraints_are_better_than_a_scenario_that_breaks_them() -> None:
    """They take more joules."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return 0.5 if batch == OWN else joules(batch, sample), 0.5 if batch == OWN else 0.95, 1.0

    found = tuned(answer)
    assert found.verdict == "better"
    assert "Trial 0 keeps the constraints on traffic not tuned on" in tune_headline(found)
    assert "as it stands breaks agreement>=0.9 (reached 0.5, 44 % off)" in tune_headline(found)


@pytest.mark.parametrize(
    ("held_out", "why"),
    [
        (2, "the 95 % interval of the gain holds 0"),
        (1, "one sample tells no interval (give search.held_out 2 or more)"),
    ],
)
def test_settings_that_are_not_shown_to_be_better_are_written_and_nowhere_called_so(
    held_out: int, why: str
) -> None:
    """On one sample they take 0.5 J less than the scenario does, on the other 0.1 J."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        mine = 1.0 + 0.01 * BATCHES.index(min(batch, 64))
        return {4: 1.5, 5: 1.1}.get(sample, 2.0) if batch == OWN else mine, 0.95, 1.0

    found = tuned(answer, held_out=held_out)
    assert found.verdict == "unsure"
    said = tune_headline(found)
    assert said.startswith("Trial 0 takes energy from 1.")
    assert f"but is not shown to be better: {why}. Its settings are written" in said
    assert any("which shows no difference" in one for one in tune_remarks(found))
    scenario = recommended(found)
    assert scenario.serving.max_batch == BATCHES[0]
    assert "not shown to be better than the scenario as it stood: serving.max" in scenario.notes[-1]
    page = tune_page(found, scenario)
    assert "The scenario with the winner&#x27;s settings, not shown to be better" in page
    assert "The recommended scenario" not in page


def test_several_objectives_are_judged_by_their_gains_together() -> None:
    """They take half the joules of the scenario, and agree by 1 % of it less."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return (2.0, 1.0, 1.0) if batch == OWN else (1.0, 0.99, 1.0)

    found = tuned(answer, objectives=["energy", "agreement"])
    assert found.verdict == "better"
    assert any("add up to +49 % [+49, +49]." in one for one in tune_remarks(found))


def test_large_batches_are_said_of_the_scenario_and_of_the_winner() -> None:
    """Of at most 256 rows 102 decode together, of at most 512 205."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return 1.0 / batch, 0.95, 1.0

    def said(most: int) -> str:
        found = tuned(answer, filled=0.4, ranges={"serving.max_batch": [8, most]})
        return " ".join(one for one in tune_remarks(found) if "decode together" in one)

    assert said(16).startswith("Up to 102 requests decode together on average (the scenario as it")
    both = "(the scenario as it stands and trial 1)"
    assert said(512).startswith(f"Up to 205 requests decode together on average {both}.")


def few_in_words(ranges: dict[str, Any], policy: str = "helios") -> list[str]:
    """What is said of rounds where every trial takes as many joules."""
    found = tuned(lambda batch, sample: (1.0, 0.95, 1.0), policy, ranges=ranges)
    return [one for one in tune_remarks(found) if "rounds of reassessment" in one]


def test_a_sample_that_holds_few_rounds_of_reassessment_says_how_many() -> None:
    """Of 54 requests a round takes 20 with the first trial, the winner, and at most 108."""
    (said,) = few_in_words({"policy.reassess_requests": [20, 10, 108]})
    assert "2.70 with trial 0 and 0.5 with policy.reassess_requests = 108: what" in said
    (said,) = few_in_words({"policy.reassess_requests": [10, 27]})
    assert "for each replica, 2 with policy.reassess_requests = 27: what" in said


def test_rounds_are_those_of_each_replica_and_of_who_reassesses() -> None:
    """Ten replicas share the requests of which one has 5.4 rounds."""
    assert few_in_words({"policy.reassess_requests": [10, "off"]}) == []
    assert few_in_words({"serving.max_batch": [8]}, "vanilla") == []
    ten = {"policy.reassess_requests": [10], "fleet.num_replicas": [10]}
    (said,) = few_in_words(ten)
    assert "for each replica, 0.54 with trial 0: what" in said


@pytest.mark.parametrize(("num_rows", "told"), [(360, False), (359, True)])
def test_held_out_samples_that_share_rows_with_those_tuned_on_are_said_to(
    tmp_path: Path, num_rows: int, told: bool
) -> None:
    """Six samples of 60 requests each take 360 rows."""
    row = '{"timestamp":0,"input_length":100,"output_length":40}\n'
    (tmp_path / "t.jsonl").write_text(num_rows * row)
    workload = {"prompt": {"kind": "trace"}, "trace": {"file": "t.jsonl"}}
    found = tuned(
        lambda batch, sample: (joules(batch, sample), 0.95, 1.0),
        workload=workload,
        folder=tmp_path,
        num_requests=60,
    )
    said = [one for one in tune_remarks(found) if "what is held out is not all new" in one]
    assert bool(said) == told


def test_a_winner_that_breaks_constraints_in_some_samples_is_nowhere_said_to_keep_them_in_all() -> (
    None
):
    """Every second sample agrees in 86 %, where the mean of 90.5 % keeps the bound of 90 %."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        own, mine = 0.95 if batch != OWN else 0.8, 0.86 if batch == 8 and sample % 2 else 0.0
        return joules(batch, sample), mine or own, 1.0

    found = tuned(answer)
    assert (batch_of(found), found.verdict) == (8, "better")
    once = "(it breaks them in 1 of 2 samples)"
    said = f"Trial 0 keeps the constraints on average on traffic not tuned on {once}, where the"
    assert tune_headline(found).startswith(said)
    remarks = tune_remarks(found)
    parts = "1 of 2 tuned on, 1 of 2 chosen on and 1 of 2 held out."
    assert any(one.endswith(f"trial 0 breaks them in {parts}") for one in remarks)
    assert any("where all keep the constraints on average; trial 0" in one for one in remarks)
    assert [row[-1] for row in trial_rows(found)[1][:2]] == ["in 1 of 2 samples", "nothing"]
    records = trial_records(found)[1:3]
    assert [(row["num_breaking"], row["num_samples"]) for row in records] == [(1, 2), (0, 2)]
    page = tune_page(found, recommended(found))
    assert page.count("kept on average, broken in 1 of 2 samples") == 2


def test_a_gain_is_told_with_the_samples_in_which_it_breaks_the_constraints() -> None:
    """The scenario as it stands keeps them."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), 0.86 if batch == 8 and sample == 5 else 0.95, 1.0

    found = tuned(answer)
    end = "on traffic not tuned on (it breaks the constraints in 1 of 2 samples)."
    assert tune_headline(found).endswith(end)
    parts = "0 of 2 tuned on, 0 of 2 chosen on and 1 of 2 held out."
    assert any(one.endswith(f"trial 0 breaks them in {parts}") for one in tune_remarks(found))


def test_where_no_finalist_keeps_the_constraints_the_nearest_is_named_and_nothing_changed() -> None:
    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        agreement = 0.95 if sample in TUNED else 0.8 + 0.01 * BATCHES.index(min(batch, 64))
        return joules(batch, sample), agreement, 1.0

    found = tuned(answer)
    assert batch_of(found) == 64
    assert found.verdict == "no better"
    assert recommended(found).serving.max_batch == OWN
    said = tune_headline(found)
    assert "None of the best 4 of 4 trials keeps the constraints" in said
    assert "trial 3 comes nearest and breaks agreement>=0.9 (reached 0.83, 7.8 % off)" in said


def test_of_a_winner_and_a_scenario_that_both_break_the_constraints_the_nearer_is_named() -> None:
    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        if batch == OWN:
            return 2.0, 0.5, 1.0
        return joules(batch, sample), 0.895 if sample in HELD_OUT else 0.95, 1.0

    found = tuned(answer)
    assert found.verdict == "no better"
    said = tune_headline(found)
    assert "trial 0, the best of 4, breaks agreement>=0.9 (reached 0.895, 0.56 % off)" in said
    assert "stays as it is and breaks agreement>=0.9 (reached 0.5, 44 % off) there." in said
    assert said.endswith("Trial 0 comes nearer to keeping the constraints.")


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_sampler_learns_from_the_first_sample_alone_however_many_a_trial_met(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The second sample takes five times the joules and agrees less; half of the trials meet it.

    On the first one batch agrees in 72 % where 90 % are asked for, which is a fifth less.
    """
    told: list[tuple[Any, float]] = []

    class Learning(Listed):
        def learn(self, scores: Any, violations: Any) -> None:
            told.extend(zip(scores, violations, strict=True))

    def made(space: Space, *_: Any) -> Sampler:
        return Learning(space.grid())

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        energy = 1.0 + 0.01 * BATCHES.index(min(batch, 64))
        agreement = 0.95 if batch < 64 else 0.72
        return (5.0 * energy, 0.7, 1.0) if sample == 1 else (energy, agreement, 1.0)

    monkeypatch.setattr("helios_sim.search.tune.make_sampler", made)
    found = tuned(answer, go_on_share=share)
    full = [one for one in found.trials if one.state == "full"]
    assert len(full) == len(BATCHES) * share
    assert all(one.broken for one in full)
    scores, violations = zip(*told, strict=True)
    assert scores == tuple((pytest.approx(1.0 + 0.01 * place),) for place in range(len(BATCHES)))
    assert violations == (0.0, 0.0, 0.0, pytest.approx(0.2))


def test_settings_that_change_nothing_on_the_tuning_traffic_are_one_finalist() -> None:
    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(max(batch, 32), sample), 0.95, 1.0

    numbers = [one.trial.number for one in tuned(answer).finalists]
    assert numbers == [0, 3]


def test_a_single_finalist_is_the_winner_without_samples_of_its_own() -> None:
    seen: set[int] = set()

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        seen.add(sample)
        return joules(batch, sample), 0.95, 1.0

    found = tuned(answer, finalists=1)
    assert (batch_of(found), found.finalists, seen) == (8, (), {0, 1, 2, 3})


def test_several_objectives_send_the_front_to_the_finals_before_what_it_beats() -> None:
    """The last batch takes the most joules of all and agrees least."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), {8: 0.91, 16: 0.92, 32: 0.93}.get(batch, 0.9), 1.0

    found = tuned(answer, objectives=["energy", "agreement"], finalists=3)
    assert {one.trial.number for one in found.finalists} == {0, 1, 2}
    assert {row["trial"] for row in tune_front(found)} == {0, 1, 2}


def test_a_trace_with_too_few_windows_for_the_finals_says_which_samples_there_are(
    tmp_path: Path,
) -> None:
    lines = [f'{{"timestamp":{n * 100},"input_length":9,"output_length":5}}\n' for n in range(400)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    data = {
        "name": "short",
        "workload": {"trace": {"file": "t.jsonl"}},
        "fleet": {"profile": "opt-a100-40gb"},
        "slo": {"text": "ttft:1000"},
        "policy": [{"use": "helios"}],
        "search": {"windows": 7, "ranges": {"serving.max_batch": list(BATCHES)}},
    }
    said = "3 replications, 2 finals and 3 held out are 8 samples, but the trace is cut into 7"
    with pytest.raises(InputError, match=said):
        read_tune(parse_scenario(data, "x.toml", tmp_path), tmp_path, "x.toml")
    data["search"]["finalists"] = 1  # type: ignore[index]
    read_tune(parse_scenario(data, "x.toml", tmp_path), tmp_path, "x.toml")


def test_the_scenario_as_it_stands_has_the_defaults_of_the_policy_in_every_table() -> None:
    """It does not say how often to reassess; the default of the policy does."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), 0.95, 1.0

    key = "policy.reassess_requests"
    found = tuned(answer, ranges={"serving.max_batch": list(BATCHES), key: [100, 200]})
    default = policy_options("helios")["reassess_requests"][0]
    (settings,) = [row for row in setting_rows(found)[1] if row[0] == key]
    titles, rows = trial_rows(found, with_settings=True)
    assert settings[1] == rows[-1][list(titles).index(key)] == str(default)
    assert trial_records(found)[0][f"setting {key}"] == default


def test_each_setting_is_told_with_what_it_alone_changes_and_where_constraints_break() -> None:
    """Batches take 1.05 to 1.08 J on the two samples, 32 agrees too little; rounds change nothing.

    Combinations of rounds with what breaks a constraint do not count.
    """

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), 0.8 if batch == 32 else 0.95, 1.0

    key = "policy.reassess_requests"
    ranges = {"serving.max_batch": list(BATCHES), key: [100, 200]}
    titles, rows = setting_rows(tuned(answer, ranges=ranges))
    assert list(titles) == ["Setting", "as it stands", "winner", "energy as it varies", "breaks at"]
    assert rows == [
        ["serving.max_batch", "256", "8", "1.050 to 1.080", "32"],
        [key, "150", "100", "1.050", "none"],
    ]
    titles, rows = setting_rows(tuned(answer, ranges=ranges, constraints=""))
    assert (titles[-1], rows[1][-1]) == ("energy as it varies", "1.050")


def test_trials_show_what_is_bounded_and_no_figure_twice() -> None:
    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), 0.95, 40.0

    found = tuned(answer, constraints="tpot:p90<45ms; agreement>=0.9")
    titles, rows = trial_rows(found)
    assert titles == ["Trial", "energy J/token", "TPOT p90 ms", "agree %", "TTFT p99 ms", "breaks"]
    assert rows[0] == ["0", "1.050", "40", "95", "300", "nothing"]
    against = against_energy(found)
    assert (against.name, against.bound) == ("TPOT p90", 45.0)
    layout = tune_frontiers(found)["layout"]
    assert layout["xaxis"]["title"]["text"] == "energy per output token (J)"
    assert layout["yaxis"]["title"]["text"] == "TPOT p90 (ms)"
    page = tune_page(found, recommended(found))
    for title in ("Finalists", "Trials"):
        assert f"<h2>{title}</h2>" in page
    assert "<th>serving.max_batch</th>" in page.replace(' scope="col"', "")


def test_without_an_energy_the_page_says_so_and_leaves_its_panel_out() -> None:
    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return 1.0, (0.8 if batch == OWN else 0.9), 40.0

    found = tuned(answer, objectives=["agreement"])
    assert "Energy is not known" not in tune_page(found, recommended(found))

    def unread(trial: Trial) -> Trial:
        return replace(trial, means={**(trial.means or {}), "energy_per_output_token": None})

    trials = tuple(map(unread, found.trials))
    blind = replace(found, base=unread(found.base), trials=trials, winner=trials[0])
    assert "on the tuning traffic. Energy is not known." in tune_page(blind, recommended(blind))
    assert tune_frontiers(blind)["layout"]["xaxis"]["title"]["text"] == "tokens/s per user"


def test_the_winner_s_scenario_leaves_out_the_share_that_samples_do() -> None:
    """A tenth of sixty requests; the scenario as it stands is left as it is."""

    def answer(batch: int, sample: int) -> tuple[float, float, float]:
        return joules(batch, sample), 0.95, 1.0

    def worse(batch: int, sample: int) -> tuple[float, float, float]:
        return 1.0 if batch == OWN else 2.0, 0.95, 1.0

    assert recommended(tuned(answer)).measure.warmup_requests == 6
    assert recommended(tuned(worse)).measure.warmup_requests == 0


def test_a_winner_that_breaks_a_constraint_at_another_held_out_rate_is_said_to() -> None:
    """Settings are judged at the scenario's own rate; what a busier hour brings is told."""
    found = tuned(lambda batch, sample: (joules(batch, sample), 0.95, 1.0))
    broken = (Broken("ttft:p95<=2000ms", 10256.0, 4.1),)
    assert found.own_rate is not None
    busier = replace(found.own_rate, rate_scale=1.2, tuned_broken=broken)
    said = " ".join(tune_remarks(replace(found, held_out=(found.own_rate, busier))))
    assert "At 1.2 times the rate the winner breaks ttft:p95<=2000ms (reached 10,256" in said
    assert "on held-out traffic." in said
    both = replace(busier, base_broken=broken)
    said = " ".join(tune_remarks(replace(found, held_out=(found.own_rate, both))))
    assert "on held-out traffic, as the scenario as it stands does." in said
    assert "times the rate the winner" not in " ".join(tune_remarks(found))


def test_a_scenario_that_cannot_be_run_as_it_stands_met_no_sample_of_few_rounds() -> None:
    """Whoever has no figures has no rounds to count; the search ends all the same."""
    found = tuned(lambda batch, sample: (joules(batch, sample), 0.95, 1.0))
    ranges = {"serving.max_batch": [8, 16], "policy.reassess_requests": [20, 400]}
    searched = tuned(lambda batch, sample: (joules(batch, sample), 0.95, 1.0), ranges=ranges)
    names = [name for name, _ in few_rounds(searched)]
    assert "policy.reassess_requests = 400" in names
    impossible = replace(searched, base=replace(searched.base, means={}))
    assert "policy.reassess_requests = 400" not in [name for name, _ in few_rounds(impossible)]
    assert found.verdict == "better"
