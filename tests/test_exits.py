"""Exit traces: their shape, their statistics, their file, and the helpers the engine uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios_sim.errors import InputError
from helios_sim.exits import (
    ExitTraces,
    _confidence,
    generate_markov_traces,
    load_traces,
    read_traces,
    share_leaving_by,
    stickiness_of,
    write_traces,
)
from helios_sim.policy.rules import leaves_here
from helios_sim.profile import Agreement, MarkovCandidate, MarkovExits
from helios_sim.profiles.files import load_profile, save_profile
from tests.counted_lines import lines_of


def opt_spec() -> MarkovExits:
    """The statistics of the OPT pair."""
    exits = load_profile("opt-a100-40gb").exits
    assert isinstance(exits, MarkovExits)
    return exits


@pytest.fixture(scope="module")
def opt() -> ExitTraces:
    """The traces of the OPT pair."""
    return generate_markov_traces(opt_spec(), ["opt-1.3b", "opt-6.7b"])


def tiny(**changes: Any) -> ExitTraces:
    """Two positions of one domain by hand, with some fields changed."""
    fields: dict[str, Any] = {
        "domains": ("text",),
        "num_positions": 2,
        "exit_layers": {"m": (2, 4)},
        "confidence": {"m": np.array([[[0.4, 0.9], [0.8, 0.8]]], dtype=np.float32)},
        "agrees": {"m": np.array([[[False, True], [True, True]]])},
        "nll_nats": {"m": np.array([[[2.0, 1.0], [0.5, 0.5]]], dtype=np.float32)},
        "origin": "trace",
    }
    return ExitTraces(**{**fields, **changes})


def test_a_token_leaves_at_its_first_confident_exit_or_at_the_last() -> None:
    traces = tiny()
    assert traces.exit_level_at("m", 0.5).tolist() == [[1, 0]]
    assert traces.exit_level_at("m", 0.3).tolist() == [[0, 0]]
    assert traces.exit_level_at("m", 1.0).tolist() == [[1, 1]]
    assert traces.exit_level_at("m", 0.5).dtype == np.int8


def test_a_confidence_stored_just_below_the_threshold_does_not_leave() -> None:
    """0.7 is stored in single precision as 0.69999999."""
    confidence = np.array([[[0.7, 0.9], [0.75, 0.9]]], dtype=np.float32)
    assert tiny(confidence={"m": confidence}).exit_level_at("m", 0.7).tolist() == [[1, 0]]


def test_shares_count_one_domain_or_all() -> None:
    traces = tiny(
        domains=("text", "more"),
        confidence={"m": np.array([[[0.4, 0.9], [0.8, 0.8]], [[0.9, 1], [0.9, 1]]], np.float32)},
        agrees={"m": np.ones((2, 2, 2), dtype=bool)},
        nll_nats={"m": np.zeros((2, 2, 2), dtype=np.float32)},
    )
    assert traces.share_by_exit("m", 0.5, "text").tolist() == [0.5, 0.5]
    assert traces.share_by_exit("m", 0.5, "more").tolist() == [1.0, 0.0]
    assert traces.share_by_exit("m", 0.5).tolist() == [0.75, 0.25]


def test_levels_follow_the_hot_rule_token_by_token(opt: ExitTraces) -> None:
    for threshold in (0.0, 0.3, 0.5, 0.7, 0.9):
        levels = opt.exit_level_at("opt-1.3b", threshold)[0, :200]
        for position, level in enumerate(levels):
            exits = [float(value) for value in opt.confidence["opt-1.3b"][0, position]]
            first = [place for place, value in enumerate(exits) if leaves_here(value, threshold)]
            assert level == (first[0] if first else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_positions": 3}, r"shape \(1, 2, 2\); .*\(1, 3, 2\)"),
        ({"agrees": {}}, "'m' has no agrees"),
        ({"exit_layers": {"m": (2, 4, 6)}}, "shape"),
        ({"confidence": {"m": np.full((1, 2, 2), 1.5, np.float32)}}, "range 0 to 1"),
        ({"confidence": {"m": np.full((1, 2, 2), np.nan, np.float32)}}, "not a number"),
        ({"confidence": {"m": np.full((1, 2, 2), 0.5)}}, "float64; float32 is needed"),
        ({"nll_nats": {"m": np.full((1, 2, 2), -1, np.float32)}}, "at least 0"),
        ({"confidence": {"m": np.full((1, 2, 2), -0.1, np.float32)}}, "range 0 to 1"),
        ({"nll_nats": {"m": np.full((1, 2, 2), np.inf, np.float32)}}, "finite"),
        ({"domains": ()}, "a domain"),
        ({"num_positions": 0}, "need a domain, a position and a candidate"),
        ({"exit_layers": {}}, "need a domain, a position and a candidate"),
        ({"exit_layers": {"m": ()}}, "has 0 exits"),
        ({"exit_layers": {"m": tuple(range(1, 129))}}, "has 128 exits; 1 to 127 are allowed"),
    ],
)
def test_traces_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**changes)


def test_nothing_and_all_are_confidences_too() -> None:
    confidence = np.array([[[0.0, 1.0], [0.0, 0.0]]], dtype=np.float32)
    assert tiny(confidence={"m": confidence}).exit_level_at("m", 1.0).tolist() == [[1, 1]]


def test_asking_for_what_is_not_traced_names_what_is(opt: ExitTraces) -> None:
    with pytest.raises(InputError, match=r"they hold 'opt-1\.3b', 'opt-6\.7b'"):
        opt.exit_level_at("opt-13b", 0.5)
    with pytest.raises(InputError, match="they hold 'chat', 'code'"):
        opt.share_by_exit("opt-1.3b", 0.5, "poems")


def test_generated_histograms_meet_the_published_to_a_tenth_of_a_point(opt: ExitTraces) -> None:
    spec = opt_spec()
    for name, candidate in spec.candidates.items():
        for domain, shares in candidate.exit_shares.items():
            realised = opt.share_by_exit(name, spec.nominal_threshold, domain)
            assert np.abs(realised - shares).max() < 0.001, (name, domain)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95])
def test_the_share_at_any_threshold_is_the_closed_form(opt: ExitTraces, threshold: float) -> None:
    spec = opt_spec()
    for name, candidate in spec.candidates.items():
        realised = np.cumsum(opt.share_by_exit(name, threshold, "chat"))
        cumulative = np.cumsum(candidate.exit_shares["chat"])
        for level in range(len(cumulative) - 1):
            expected = share_leaving_by(cumulative[level], threshold, spec.nominal_threshold)
            assert realised[level] == pytest.approx(expected, abs=0.001)


def test_the_two_branches_of_the_closed_form_meet_at_the_nominal_threshold() -> None:
    assert share_leaving_by(0.7, 0.5, 0.5) == 0.7
    assert share_leaving_by(0.7, 0.5 - 1e-12, 0.5) == pytest.approx(0.7)
    assert share_leaving_by(0.7, 0.0, 0.5) == 1.0
    assert share_leaving_by(0.7, 1.0, 0.5) == 0.0


def test_a_share_falls_straight_from_all_by_way_of_the_nominal_threshold_to_nobody() -> None:
    """From 1 at 0 to 0.6 at 0.2 and to 0 at 1."""
    assert share_leaving_by(0.6, 0.1, 0.2) == pytest.approx(0.8)
    assert share_leaving_by(0.6, 0.8, 0.2) == pytest.approx(0.15)


def test_confidence_never_falls_from_an_exit_to_a_deeper_one(opt: ExitTraces) -> None:
    for array in opt.confidence.values():
        assert np.diff(array, axis=-1).min() >= 0.0


def test_the_published_complementarity_is_met_within_a_point(opt: ExitTraces) -> None:
    small = opt.exit_level_at("opt-1.3b", 0.5)[0]
    large = opt.exit_level_at("opt-6.7b", 0.5)[0]
    assert np.mean(large[small == 2] == 0) == pytest.approx(0.57, abs=0.01)


@pytest.mark.parametrize("nominal", [0.7, 0.1])
def test_rounding_a_confidence_moves_no_token_across_the_nominal_threshold(nominal: float) -> None:
    """In single precision 0.7 is a little less and 0.1 a little more than what a rule compares."""
    hardest, easiest = np.array([0.5]), np.array([np.nextafter(0.5, 1.0)])
    shares = np.array([0.5, 1.0])
    assert leaves_here(float(_confidence(hardest, shares, nominal)[0, 0]), nominal)
    assert not leaves_here(float(_confidence(easiest, shares, nominal)[0, 0]), nominal)


def test_runs_keep_their_level_as_often_as_the_chain_says(opt: ExitTraces) -> None:
    spec = opt_spec()
    for name, candidate in spec.candidates.items():
        levels = opt.exit_level_at(name, spec.nominal_threshold)[0]
        by_chance = sum(share**2 for share in candidate.exit_shares["chat"])
        expected = spec.stickiness + (1.0 - spec.stickiness) * by_chance
        assert np.mean(levels[1:] == levels[:-1]) == pytest.approx(expected, abs=0.01)
        assert stickiness_of(levels) == pytest.approx(spec.stickiness, abs=0.01)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        # Chance makes half of the pairs alike; four of five are, then none.
        ([0, 0, 0, 1, 1, 1], 0.6),
        ([0, 1, 0, 1, 0, 1], -1.0),
        ([2, 2, 2, 2], None),
        ([3], None),
    ],
)
def test_exits_stick_as_often_as_they_repeat_beyond_chance(
    levels: list[int], expected: float | None
) -> None:
    assert stickiness_of(np.array(levels)) == (
        None if expected is None else pytest.approx(expected)
    )


def test_beyond_a_run_nothing_is_remembered(opt: ExitTraces) -> None:
    levels = opt.exit_level_at("opt-1.3b", 0.5)[0]
    shares = opt.share_by_exit("opt-1.3b", 0.5, "chat")
    far_apart = np.mean(levels[200:] == levels[:-200])
    assert far_apart == pytest.approx(float(np.sum(shares**2)), abs=0.02)


def test_the_full_model_agrees_with_itself_and_agreement_is_never_lost(opt: ExitTraces) -> None:
    for agrees in opt.agrees.values():
        assert agrees[..., -1].all()
        assert (agrees[..., 1:] >= agrees[..., :-1]).all()


def test_agreement_after_nine_layers_of_opt_6_7b_is_as_published(opt: ExitTraces) -> None:
    agrees = opt.agrees["opt-6.7b"][0, :, 0]
    confident = opt.confidence["opt-6.7b"][0, :, 0] >= 0.2
    assert agrees.mean() == pytest.approx(0.85, abs=0.01)
    assert agrees[confident].mean() == pytest.approx(0.921, abs=0.01)


def test_full_depth_perplexity_is_as_published_and_early_tokens_lose_by_disagreeing(
    opt: ExitTraces,
) -> None:
    spec = opt_spec()
    for name, candidate in spec.candidates.items():
        nll = opt.nll_nats[name].astype(np.float64)
        full = np.exp(nll[..., -1].mean())
        assert full == pytest.approx(candidate.perplexity, rel=0.002)
        lost = nll - nll[..., -1:]
        disagrees = ~opt.agrees[name]
        assert np.all(lost[~disagrees] == 0.0)
        assert lost[disagrees] == pytest.approx(spec.disagreement_penalty_nats, abs=1e-3)


def test_negative_log_likelihoods_are_whole_steps_so_that_sums_are_exact(opt: ExitTraces) -> None:
    for nll in opt.nll_nats.values():
        steps = nll.astype(np.float64) * 1024
        assert np.all(steps == np.round(steps))


def test_hard_text_is_hard_for_every_candidate(opt: ExitTraces) -> None:
    small, large = (opt.nll_nats[name][0, :, -1] for name in ("opt-1.3b", "opt-6.7b"))
    assert np.corrcoef(small, large)[0, 1] > 0.99
    deep = opt.exit_level_at("opt-1.3b", 0.5)[0] == 2
    assert small[deep].mean() > 1.1 * small[~deep].mean()


def test_the_same_seed_gives_the_same_trace_and_another_seed_another(opt: ExitTraces) -> None:
    again = generate_markov_traces(opt_spec(), ["opt-1.3b"])
    other = generate_markov_traces(replace(opt_spec(), seed=1), ["opt-1.3b"])
    assert np.array_equal(again.confidence["opt-1.3b"], opt.confidence["opt-1.3b"])
    assert not np.array_equal(other.confidence["opt-1.3b"], opt.confidence["opt-1.3b"])


def test_a_candidate_is_the_same_whoever_is_asked_for_beside_it(opt: ExitTraces) -> None:
    alone = generate_markov_traces(opt_spec(), ["opt-6.7b"])
    for both, one in (
        (opt.confidence, alone.confidence),
        (opt.agrees, alone.agrees),
        (opt.nll_nats, alone.nll_nats),
    ):
        assert np.array_equal(both["opt-6.7b"], one["opt-6.7b"])


def test_domains_differ_in_their_text(opt: ExitTraces) -> None:
    levels = opt.exit_level_at("opt-6.7b", 0.5)
    assert np.mean(levels[0] == levels[1]) < 0.9


def test_no_position_is_generated_by_itself() -> None:
    """A hundred times the positions are generated by as many lines of Python."""
    few, many = (
        lines_of(
            lambda count=count: generate_markov_traces(
                replace(opt_spec(), num_positions=count), ["opt-1.3b", "opt-6.7b"]
            )
        )
        for count in (1_000, 100_000)
    )
    assert many < 2 * few


def test_a_candidate_without_statistics_is_refused() -> None:
    with pytest.raises(InputError, match="'opt-13b' has no exit statistics"):
        generate_markov_traces(opt_spec(), ["opt-13b"])


@settings(max_examples=40)
@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    nominal=st.floats(0.05, 0.95),
    stickiness=st.floats(0.0, 0.9),
    correlation=st.floats(0.0, 0.9),
    num_positions=st.integers(1, 600),
)
def test_any_statistics_give_a_sound_trace_that_meets_its_histogram_to_half_a_run(
    weights: list[int],
    nominal: float,
    stickiness: float,
    correlation: float,
    num_positions: int,
) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    exit_layers = tuple(range(1, len(weights) + 1))
    spec = MarkovExits(
        domains=("text",),
        num_positions=num_positions,
        seed=7,
        nominal_threshold=nominal,
        stickiness=stickiness,
        correlation=correlation,
        agreement=Agreement(0.2, 0.3, 0.9),
        disagreement_penalty_nats=1.0,
        candidates={"m": MarkovCandidate(exit_layers, {"text": shares}, 8.0)},
    )
    traces = generate_markov_traces(spec, ["m"])
    levels = traces.exit_level_at("m", nominal)[0]
    realised = np.cumsum(traces.share_by_exit("m", nominal))
    changes = np.flatnonzero(np.diff(levels)) + 1
    longest = np.diff([0, *changes, num_positions]).max()
    assert np.abs(realised - np.cumsum(shares)).max() <= 0.5 * longest / num_positions + 1e-9


def test_a_trace_survives_its_file(tmp_path: Path, opt: ExitTraces) -> None:
    write_traces(opt, tmp_path / "exits.parquet")
    read = read_traces(tmp_path / "exits.parquet")
    assert read.domains == opt.domains
    assert read.exit_layers == opt.exit_layers
    assert read.origin == "trace"
    for name in opt.candidates:
        assert np.array_equal(read.confidence[name], opt.confidence[name])
        assert np.array_equal(read.agrees[name], opt.agrees[name])
        assert np.array_equal(read.nll_nats[name], opt.nll_nats[name])
    some = read_traces(tmp_path / "exits.parquet", ["opt-6.7b"])
    assert some.candidates == ("opt-6.7b",)


def test_exits_ascend_whatever_the_order_of_a_file_s_columns(tmp_path: Path) -> None:
    write_traces(tiny(), tmp_path / "exits.parquet")
    frame = pl.read_parquet(tmp_path / "exits.parquet")
    frame.select(reversed(frame.columns)).write_parquet(tmp_path / "turned.parquet")
    read = read_traces(tmp_path / "turned.parquet")
    assert read.exit_layers == {"m": (2, 4)}
    assert np.array_equal(read.confidence["m"], tiny().confidence["m"])


def test_a_measured_profile_is_read_from_its_own_trace(tmp_path: Path, opt: ExitTraces) -> None:
    write_traces(opt, tmp_path / "raw.parquet")
    document = {**load_profile("opt-a100-40gb").document}
    document["exits"] = {"kind": "trace", "file": "exits.parquet"}
    profile = save_profile(document, tmp_path / "mine", traces=tmp_path / "raw.parquet")
    traces = load_traces(profile, ["opt-1.3b"])
    assert traces.origin == "trace"
    assert np.array_equal(traces.confidence["opt-1.3b"], opt.confidence["opt-1.3b"])


def test_a_trace_with_other_exits_than_the_profile_is_refused(tmp_path: Path) -> None:
    traces = tiny(
        exit_layers={"opt-1.3b": (2, 24)},
        confidence={"opt-1.3b": tiny().confidence["m"]},
        agrees={"opt-1.3b": tiny().agrees["m"]},
        nll_nats={"opt-1.3b": tiny().nll_nats["m"]},
    )
    write_traces(traces, tmp_path / "raw.parquet")
    document = {**load_profile("opt-a100-40gb").document}
    document["exits"] = {"kind": "trace", "file": "exits.parquet"}
    profile = save_profile(document, tmp_path / "mine", traces=tmp_path / "raw.parquet")
    with pytest.raises(InputError, match=r"holds the exits \[2, 24\]; .*\[6, 12, 24\]"):
        load_traces(profile, ["opt-1.3b"])
    with pytest.raises(InputError, match=r"holds no candidate 'opt-6\.7b'"):
        load_traces(profile)


def test_a_shipped_profile_generates_the_positions_it_asks_for() -> None:
    traces = load_traces(load_profile("opt-a100-40gb"))
    assert traces.origin == "markov"
    assert traces.num_positions == opt_spec().num_positions
    with pytest.raises(InputError, match="Did you mean"):
        load_traces(load_profile("opt-a100-40gb"), ["opt-6.7"])


GOOD: dict[str, list[Any]] = {
    "domain": ["a", "a", "b", "b"],
    "position": [0, 1, 0, 1],
    "m|L4|confidence": [0.5] * 4,
    "m|L4|agrees": [True] * 4,
    "m|L4|nll_nats": [1.0] * 4,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": [0, 1, 0, 2]}, "same positions"),
        ({"domain": ["a", "b", "a", "b"], "position": [0, 0, 1, 1]}, "same positions"),
        ({"domain": ["a", "a", "a", "b"]}, "same positions"),
        ({"m|L4|agrees": [1, 1, 1, 1]}, "booleans are needed"),
        ({"m|L4|confidence": [True] * 4}, "floats are needed"),
        ({"m|L4|confidence": [1] * 4}, "holds Int64; floats are needed"),
        ({key: [*values, values[0]] for key, values in GOOD.items()}, "same positions"),
        ({"m|L4|confidence": [0.5, None, 0.5, 0.5]}, "empty cells"),
        ({"m|L4|confidence": [0.5, 1.5, 0.5, 0.5]}, "range 0 to 1"),
        ({"m|L4|nll_nats": None}, r"'m\|L4\|nll_nats' is missing"),
        ({"domain": None}, "'domain' is missing"),
        ({"domain": [None, None, "b", "b"]}, "'domain' has empty cells"),
        ({"domain": [["a"], ["a"], ["b"], ["b"]]}, r"'domain' holds List\(String\); names are"),
        ({"position": [0, None, 0, 1]}, "'position' has empty cells"),
        ({"m|L04|confidence": [0.5] * 4}, r"'m\|L04\|confidence' is unknown"),
        ({f"m|L{10**9}|confidence": [0.5] * 4}, r"'m\|L1000000000\|confidence' is unknown"),
        ({"m|L4|colour": [1.0] * 4}, "unknown"),
    ],
)
def test_a_broken_trace_file_is_told_what_and_where(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    columns = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = tmp_path / "exits.parquet"
    pl.DataFrame(columns, strict=False).write_parquet(path)
    with pytest.raises(InputError, match=message) as caught:
        read_traces(path)
    assert caught.value.where == str(path)


def test_a_last_exit_that_does_not_agree_with_itself_is_refused(tmp_path: Path) -> None:
    """As where somebody took agreement for being right."""
    last = max((name for name in GOOD if name.endswith("|agrees")), key=_layer_of)
    path = tmp_path / "exits.parquet"
    pl.DataFrame({**GOOD, last: [False, *GOOD[last][1:]]}, strict=False).write_parquet(path)
    with pytest.raises(InputError, match=r"holds false\. .* equals the one at full depth"):
        read_traces(path)


def _layer_of(column: str) -> int:
    return int(column.split("|")[1][1:])


def test_a_file_that_is_not_parquet_or_empty_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "exits.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_traces(path)
    pl.DataFrame(GOOD).clear().write_parquet(path)
    with pytest.raises(InputError, match="no positions"):
        read_traces(path)
