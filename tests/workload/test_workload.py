"""A workload table becomes the requests it describes, the same ones every time."""

from __future__ import annotations

import cProfile
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helios_sim.errors import InputError
from helios_sim.workload.requests import Requests, WorkloadSettings, fit_context, generate

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ROOT / "scenarios"
CONV = "traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"
LMSYS = "traces/lmsys_cdf/lmsys_cdf.json"
DOMAINS = ("prose", "code")

POISSON = {"kind": "poisson", "rate_per_s": 5.0}
TEN = {"kind": "constant", "tokens": 10}


def make(
    table: dict[str, Any] | None = None,
    seed: int = 11,
    base_dir: Path = SCENARIOS,
    **keys: Any,
) -> Requests:
    """Requests of a table over a plain default one; None removes a key."""
    default = {"arrivals": POISSON, "num_requests": 1000, "prompt": TEN, "output": TEN}
    merged = {**default, **(table or {}), **keys}
    merged = {key: value for key, value in merged.items() if value is not None}
    return generate(WorkloadSettings.model_validate(merged), seed, base_dir, DOMAINS)


def prompts(length: dict[str, Any], num: int = 100_000) -> np.ndarray:
    """Prompt tokens drawn from a length table."""
    return make(prompt=length, num_requests=num).prompt_tokens


def test_columns_have_the_types_an_engine_reads() -> None:
    """Eight-byte times, four-byte counts, two-byte domains, all writable and contiguous."""
    requests = make()
    types = {
        "arrival_s": np.float64,
        "prompt_tokens": np.int32,
        "output_tokens": np.int32,
        "domain": np.int16,
        "trace_start": np.int32,
    }
    for name, dtype in types.items():
        column = getattr(requests, name)
        assert column.dtype == dtype, name
        assert column.shape == (1000,)
        assert column.flags.c_contiguous and column.flags.writeable, name
    assert requests.num_users is None
    assert requests.domains == ("prose",)
    assert np.all(np.diff(requests.arrival_s) >= 0)
    assert len(requests) == 1000
    assert requests.span_s == requests.arrival_s[-1]
    assert requests.mean_prompt_tokens == requests.mean_output_tokens == 10


def test_the_same_settings_and_seed_give_the_same_bytes() -> None:
    """Twice the same table is the same; another seed differs in every random column."""
    table = {
        "prompt": {"kind": "geometric", "mean_tokens": 100},
        "output": {"kind": "geometric", "mean_tokens": 100},
        "domains": [{"name": "prose", "share": 1}, {"name": "code", "share": 1}],
    }
    one, same, other = make(table), make(table), make(table, seed=12)
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "domain", "trace_start"):
        assert getattr(one, name).tobytes() == getattr(same, name).tobytes(), name
        assert getattr(one, name).tobytes() != getattr(other, name).tobytes(), name
    assert not np.array_equal(one.prompt_tokens, one.output_tokens)


CHANGES = [
    ({"arrivals": {"kind": "gamma", "rate_per_s": 2.0, "cv": 3.0}}, {"arrival_s"}),
    ({"prompt": {"kind": "uniform", "min_tokens": 1, "max_tokens": 99}}, {"prompt_tokens"}),
    ({"output": {"kind": "uniform", "min_tokens": 1, "max_tokens": 99}}, {"output_tokens"}),
    (
        {"domains": [{"name": "code", "share": 1}, {"name": "prose", "share": 2}]},
        {"domain"},
    ),
]


@pytest.mark.parametrize(("change", "changed"), CHANGES)
def test_streams_are_independent(change: dict[str, Any], changed: set[str]) -> None:
    """Changing arrivals, a length or the domains changes that column and no other."""
    base = {
        "prompt": {"kind": "geometric", "mean_tokens": 50},
        "output": {"kind": "geometric", "mean_tokens": 50},
    }
    before, after = make(base), make({**base, **change})
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "domain", "trace_start"):
        equal = np.array_equal(getattr(before, name), getattr(after, name))
        assert equal == (name not in changed), name


def test_a_longer_workload_begins_with_the_shorter_one() -> None:
    """More requests are appended; the first ones stay as they were."""
    table = {"output": {"kind": "lognormal", "mean_tokens": 200, "sigma": 1.0}}
    short, long = make(table, num_requests=300), make(table, num_requests=900)
    for name in ("arrival_s", "output_tokens", "trace_start"):
        assert np.array_equal(getattr(short, name), getattr(long, name)[:300]), name


def test_trace_starts_are_even_31_bit_hashes() -> None:
    """100,000 hashes are not negative, fill 16 bins evenly and almost never repeat."""
    starts = make(num_requests=100_000).trace_start
    assert starts.min() >= 0
    assert np.unique(starts).size > 99_980
    share = np.bincount(starts >> 27, minlength=16) / starts.size
    assert share.size == 16
    assert np.allclose(share, 1 / 16, atol=0.004)


def test_a_million_poisson_requests_are_drawn_as_arrays() -> None:
    """With lognormal and geometric lengths: Python does nothing request by request."""
    profiler = cProfile.Profile()
    made = profiler.runcall(
        make,
        num_requests=1_000_000,
        prompt={"kind": "lognormal", "p50_tokens": 1020, "p90_tokens": 2735},
        output={"kind": "geometric", "mean_tokens": 200},
    )
    assert len(made) == 1_000_000
    assert sum(entry.callcount for entry in profiler.getstats()) < 1_000


def test_a_closed_loop_has_users_and_the_lengths_of_an_open_one() -> None:
    lengths = {"prompt": {"kind": "geometric", "mean_tokens": 50}}
    closed = make(lengths, arrivals={"kind": "closed", "num_users": 7, "think_s": 1.0})
    assert closed.num_users == 7
    assert np.array_equal(closed.prompt_tokens, make(lengths).prompt_tokens)
    assert closed.span_s == 0.0


def test_uniform_lengths_reach_both_ends_evenly() -> None:
    """Each of 5 values has a fifth of the draws within 1 %."""
    share = np.bincount(prompts({"kind": "uniform", "min_tokens": 3, "max_tokens": 7})) / 100_000
    assert np.allclose(share[3:8], 0.2, atol=0.01)
    assert share[:3].sum() == 0 and share.size == 8


@pytest.mark.parametrize(
    ("table", "p50", "p90", "mean"),
    [
        ({"p50_tokens": 1020, "p90_tokens": 2735}, 1020, 2735, 1369),
        ({"median_tokens": 400, "sigma": 0.5}, 400, 759, 453),
        ({"mean_tokens": 400, "sigma": 0.5}, 353, 670, 400),
        ({"mean_tokens": 400, "sigma": 0}, 400, 400, 400),
    ],
)
def test_lognormal_lengths_have_their_percentiles_and_mean(
    table: dict[str, Any], p50: float, p90: float, mean: float
) -> None:
    """Median, 90th percentile and mean within 2 %."""
    drawn = prompts({"kind": "lognormal", **table})
    assert np.percentile(drawn, 50) == pytest.approx(p50, rel=0.02)
    assert np.percentile(drawn, 90) == pytest.approx(p90, rel=0.02)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("mean", [1, 1.5, 200])
def test_geometric_lengths_have_their_mean_and_spread(mean: float) -> None:
    """Mean within 1.5 % and variance mean (mean - 1) within 4 %."""
    drawn = prompts({"kind": "geometric", "mean_tokens": mean})
    assert drawn.min() == 1
    assert drawn.mean() == pytest.approx(mean, rel=0.015)
    assert drawn.var() == pytest.approx(mean * (mean - 1), rel=0.04)


def test_cdf_lengths_follow_the_points_in_straight_lines() -> None:
    """Shares up to each point within 0.5 %, half of a piece at its middle, none on a flat piece."""
    points = [[100, 0.25], [200, 0.25], [400, 1.0]]
    drawn = prompts({"kind": "cdf", "points": points})
    assert drawn.min() == 1 and drawn.max() == 400
    assert np.mean(drawn <= 50) == pytest.approx(0.125, abs=0.005)
    assert np.mean(drawn <= 100) == pytest.approx(0.25, abs=0.005)
    assert np.count_nonzero((drawn > 100) & (drawn <= 200)) == 0
    assert np.mean(drawn <= 300) == pytest.approx(0.625, abs=0.005)


def test_the_shipped_chat_distribution_is_split_by_the_prompt_share() -> None:
    """Totals follow the file's points within 0.5 %; the prompt takes its share of each."""
    requests = make(
        prompt=None,
        output=None,
        total={"kind": "cdf", "file": LMSYS},
        prompt_share=0.7,
        num_requests=100_000,
    )
    total = requests.prompt_tokens + requests.output_tokens
    for tokens, share in json.loads((SCENARIOS / LMSYS).read_text()):
        assert np.mean(total <= tokens) == pytest.approx(share, abs=0.005)
    assert requests.prompt_tokens.min() >= 1 and requests.output_tokens.min() >= 1
    assert requests.prompt_tokens.sum() / total.sum() == pytest.approx(0.7, abs=0.001)


@pytest.mark.parametrize(
    ("total", "share", "prompt"), [(10, 0.66, 7), (10, 0.64, 6), (2, 0.9, 1), (2, 0.1, 1)]
)
def test_a_prompt_s_share_is_rounded_and_leaves_a_token_for_either(
    total: int, share: float, prompt: int
) -> None:
    lengths = {"kind": "constant", "tokens": total}
    requests = make(prompt=None, output=None, total=lengths, prompt_share=share)
    assert set(requests.prompt_tokens) == {prompt}
    assert set(requests.output_tokens) == {total - prompt}


def test_values_are_drawn_by_their_weights() -> None:
    """Without weights all alike; a weight of 0 is never drawn."""
    alike = prompts({"kind": "values", "values": [5, 9]})
    assert np.mean(alike == 5) == pytest.approx(0.5, abs=0.01)
    drawn = prompts({"kind": "values", "values": [5, 9, 7], "weights": [1, 3, 0]})
    assert set(drawn.tolist()) == {5, 9}
    assert np.mean(drawn == 9) == pytest.approx(0.75, abs=0.01)


def test_lengths_outside_the_bounds_take_the_bound() -> None:
    """Clamping moves draws to the bounds and leaves the others alone."""
    table = {"kind": "geometric", "mean_tokens": 100}
    free = prompts(table)
    held = prompts({**table, "min_tokens": 20, "max_tokens": 150})
    assert np.array_equal(held, np.clip(free, 20, 150))
    assert held.min() == 20 and held.max() == 150


def test_a_trace_alone_is_a_whole_workload() -> None:
    """The shipped conversation trace replays all its rows without another key."""
    requests = generate(
        WorkloadSettings.model_validate({"trace": {"file": CONV}}), 1, SCENARIOS, DOMAINS
    )
    assert len(requests) == 19_366
    assert requests.arrival_s[0] == 0.0
    assert requests.prompt_tokens[:2].tolist() == [374, 396]
    assert requests.output_tokens[:2].tolist() == [44, 109]


def test_a_replay_can_be_cut_by_number_and_duration() -> None:
    """Whichever ends first; requests keep their times."""
    whole = make(arrivals=None, prompt=None, output=None, num_requests=None, trace={"file": CONV})
    for keys, num in (({"num_requests": 50}, 50), ({"num_requests": 50, "duration_s": 1e6}, 50)):
        cut = make(
            {"arrivals": None, "prompt": None, "output": None, "trace": {"file": CONV}, **keys}
        )
        assert len(cut) == num
        assert np.array_equal(cut.arrival_s, whole.arrival_s[:num])
    minute = make(
        arrivals=None,
        prompt=None,
        output=None,
        num_requests=None,
        duration_s=60.0,
        trace={"file": CONV},
    )
    assert len(minute) == np.count_nonzero(whole.arrival_s < 60)


def test_who_arrives_just_when_a_replay_ends_is_not_part_of_it(tmp_path: Path) -> None:
    """Times of a log are often whole seconds: of those at 0, 1, 2 and 3 s two lie before 2 s."""
    (tmp_path / "log.csv").write_text("at,prompt,output\n0,1,1\n1,2,1\n2,3,1\n3,4,1\n")
    columns = {"arrival": "at", "prompt": "prompt", "output": "output"}
    table = {"trace": {"file": "log.csv", "columns": columns}, "duration_s": 2.0}
    requests = generate(WorkloadSettings.model_validate(table), 1, tmp_path, DOMAINS)
    assert requests.arrival_s.tolist() == [0.0, 1.0]
    assert requests.prompt_tokens.tolist() == [1, 2]


def test_trace_arrivals_take_other_lengths() -> None:
    """Only the lengths that are given leave the trace's."""
    requests = make(arrivals={"kind": "trace"}, output=None, trace={"file": CONV})
    assert np.all(requests.prompt_tokens == 10)
    assert requests.output_tokens[:2].tolist() == [44, 109]


def test_trace_lengths_under_other_arrivals_keep_their_pairs() -> None:
    """In order from the first on and around; drawn at random each pair is one of the trace's."""
    trace = {"file": CONV, "max_requests": 10}
    table = {"prompt": None, "output": None, "trace": trace, "num_requests": 25}
    ordered = make(table)
    pairs = list(zip(ordered.prompt_tokens.tolist(), ordered.output_tokens.tolist(), strict=True))
    assert pairs[:2] == [(374, 44), (396, 109)]
    assert pairs[:10] == pairs[10:20] and pairs[20:] == pairs[:5]
    drawn = make({**table, "trace_rows": "random", "num_requests": 2000})
    seen = set(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True))
    assert seen == set(pairs)
    assert np.array_equal(drawn.arrival_s[:25], ordered.arrival_s)


def test_lengths_in_order_may_begin_at_another_row_of_the_trace() -> None:
    """From the eighth of ten on, then from the top again; arrivals stay as they are."""
    trace = {"file": CONV, "max_requests": 10}
    table = {"prompt": None, "output": None, "trace": trace, "num_requests": 15}
    plain, later = make(table), make(table, first_trace_row=7)
    for name in ("prompt_tokens", "output_tokens"):
        own, moved = getattr(plain, name), getattr(later, name)
        assert moved.tolist() == [*own[7:10], *own[:10], *own[:2]]
    assert np.array_equal(plain.arrival_s, later.arrival_s)
    with pytest.raises(InputError, match="first_trace_row is 10 but the trace holds 10 rows"):
        make(table, first_trace_row=10)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"trace": {"file": CONV}, "output": None, "trace_rows": "random"},
        {"trace": {"file": CONV}, "arrivals": {"kind": "trace"}},
    ],
)
def test_a_first_row_is_refused_where_no_lengths_are_taken_in_order(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="first_trace_row is 3, but no lengths are taken"):
        make(keys, first_trace_row=3)


def test_fixed_shares_mix_the_domains() -> None:
    """Shares are relative: 3 to 1 gives three quarters within 1 %."""
    requests = make(
        num_requests=50_000,
        domains=[{"name": "code", "share": 3}, {"name": "prose", "share": 1}],
    )
    assert requests.domains == ("code", "prose")
    assert np.mean(requests.domain == 0) == pytest.approx(0.75, abs=0.01)


def test_the_mix_drifts_in_straight_lines() -> None:
    """From all prose to all code over 1,000 s: a quarter, half and three quarters on the way."""
    requests = make(
        arrivals={"kind": "poisson", "rate_per_s": 100.0},
        num_requests=None,
        duration_s=1200.0,
        domains=[
            {"name": "prose", "shares": [[100, 1.0], [1100, 0.0]]},
            {"name": "code", "shares": [[100, 0.0], [1100, 1.0]]},
        ],
    )
    code = requests.domain == 1
    assert not code[requests.arrival_s < 100].any()
    assert code[requests.arrival_s >= 1100].all()
    for middle_s, share in ((350, 0.25), (600, 0.5), (850, 0.75)):
        near = np.abs(requests.arrival_s - middle_s) < 25
        assert code[near].mean() == pytest.approx(share, abs=0.04)


def test_a_block_of_requests_shares_its_domain() -> None:
    """Every 8 consecutive rows agree, and the shares hold over the blocks."""
    requests = make(
        num_requests=40_003,
        block_requests=8,
        domains=[{"name": "prose", "share": 0.5}, {"name": "code", "share": 0.5}],
    )
    assert requests.domain.size == 40_003
    blocks = requests.domain[:40_000].reshape(-1, 8)
    assert np.all(blocks == blocks[:, :1])
    assert blocks[:, 0].mean() == pytest.approx(0.5, abs=0.03)


def test_a_block_takes_the_mix_at_its_first_arrival() -> None:
    """The mix turns at 5 s: the block sent from 0 to 9 s is all prose, the next all code."""
    requests = make(
        arrivals={"kind": "constant", "rate_per_s": 1.0},
        num_requests=20,
        block_requests=10,
        domains=[
            {"name": "prose", "shares": [[4.5, 1.0], [5.5, 0.0]]},
            {"name": "code", "shares": [[4.5, 0.0], [5.5, 1.0]]},
        ],
    )
    assert requests.domain.tolist() == [0] * 10 + [1] * 10


def test_an_unknown_domain_names_the_nearest() -> None:
    """The message holds what was given, the nearest and all that the profile has."""
    with pytest.raises(
        InputError, match=r"'pros' is unknown\. Did you mean 'prose'\? .* prose, code"
    ) as caught:
        make(domains=[{"name": "pros", "share": 1}])
    assert caught.value.where == "workload.domains"


def test_a_profile_without_domains_is_an_error() -> None:
    """There is nothing for a request to be about."""
    table = {"arrivals": POISSON, "num_requests": 1, "prompt": TEN, "output": TEN}
    with pytest.raises(InputError, match="profile has no domain"):
        generate(WorkloadSettings.model_validate(table), 1, SCENARIOS, ())


def rows(prompt: list[int], output: list[int]) -> Requests:
    """Requests of given lengths."""
    num = len(prompt)
    return Requests(
        np.arange(num, dtype=np.float64),
        np.array(prompt, dtype=np.int32),
        np.array(output, dtype=np.int32),
        np.zeros(num, dtype=np.int16),
        np.zeros(num, dtype=np.int32),
        ("prose",),
    )


def test_refused_requests_are_left_to_the_engine() -> None:
    """Mode "refuse" changes nothing."""
    given_rows = rows([100, 10], [10, 10])
    fitted, num = fit_context(given_rows, 64, "refuse")
    assert fitted is given_rows and num == 0


def test_truncation_shortens_the_prompt_before_the_output() -> None:
    """The prompt takes what the output leaves; an output that leaves nothing is cut too."""
    fitted, num = fit_context(rows([100, 10, 54, 5], [10, 10, 10, 100]), 64, "truncate")
    assert num == 2
    assert fitted.prompt_tokens.tolist() == [54, 10, 54, 1]
    assert fitted.output_tokens.tolist() == [10, 10, 10, 63]


def test_the_error_mode_names_the_first_long_request() -> None:
    """Row, lengths, limit, remedy and how many there are."""
    with pytest.raises(
        InputError,
        match=r"Request 1 has 100 prompt and 10 output tokens.*64 positions.*2 requests are too",
    ):
        fit_context(rows([10, 100, 5], [10, 10, 60]), 64, "error")
    assert fit_context(rows([10], [10]), 64, "error")[1] == 0


def test_a_context_of_one_position_is_an_error() -> None:
    """A request needs room for a prompt and an output."""
    with pytest.raises(InputError, match="holds 1 positions; at least 2"):
        fit_context(rows([1], [1]), 1, "truncate")


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)), min_size=1, max_size=20
    ),
    positions=st.integers(2, 5000),
)
@settings(max_examples=100)
def test_truncated_requests_always_fit(lengths: list[tuple[int, int]], positions: int) -> None:
    """Whatever the lengths, the sum fits, both stay positive and short requests stay put."""
    prompt, output = (list(column) for column in zip(*lengths, strict=True))
    fitted, num = fit_context(rows(prompt, output), positions, "truncate")
    total = fitted.prompt_tokens.astype(np.int64) + fitted.output_tokens
    assert total.max() <= positions
    assert fitted.prompt_tokens.min() >= 1 and fitted.output_tokens.min() >= 1
    fits = np.array(prompt, dtype=np.int64) + np.array(output) <= positions
    assert num == np.count_nonzero(~fits)
    assert np.array_equal(fitted.prompt_tokens[fits], np.array(prompt)[fits])
    assert np.array_equal(fitted.output_tokens[fits], np.array(output)[fits])


def test_too_short_a_duration_is_an_error() -> None:
    """A workload without a request says what to change."""
    with pytest.raises(InputError, match="No request arrives within duration_s = 1e-06"):
        make(num_requests=None, duration_s=1e-6)


def test_more_requests_than_the_trace_holds_are_an_error() -> None:
    """The message says how many there are and how to have more."""
    with pytest.raises(InputError, match=r"is 20000 but the trace holds 19366; .*trace\.repeat"):
        make(arrivals=None, prompt=None, output=None, num_requests=20_000, trace={"file": CONV})


TRACE = {"file": CONV}
LOOP = {"kind": "closed", "num_users": 5, "think_s": 1.0}
BAD_WORKLOADS = [
    ({"arrivals": None}, "The workload has no arrivals"),
    ({"arrivals": {"kind": "trace"}}, r'Arrivals of kind "trace" need a trace'),
    ({"prompt": None}, "no prompt lengths; give prompt, total with prompt_share, or a trace"),
    ({"output": {"kind": "trace"}}, r'Lengths of kind "trace" for output need a trace'),
    ({"trace": TRACE}, "neither arrivals nor lengths use it"),
    ({"num_requests": None}, "Neither of num_requests and duration_s was given"),
    ({"duration_s": 5.0}, "Both of num_requests and duration_s were given"),
    ({"num_requests": 0}, "greater than or equal to 1"),
    ({"num_requests": None, "duration_s": -5.0}, "greater than 0"),
    ({"arrivals": LOOP, "num_requests": None, "duration_s": 9.0}, "A closed loop needs num_req"),
    ({"arrivals": LOOP, "num_requests": 4}, "num_requests is 4 but num_users is 5"),
    ({"prompt_share": 0.5}, "total and prompt_share must be given together"),
    ({"total": TEN}, "total and prompt_share must be given together"),
    ({"total": TEN, "prompt_share": 0.5}, "takes the place of prompt and output"),
    ({"total": TEN, "prompt_share": 1.5}, "less than 1"),
    ({"prompt": {"kind": "constant", "tokens": 0}}, "greater than or equal to 1"),
    ({"prompt": {"kind": "constant", "tokens": 1.5}}, "valid integer"),
    ({"prompt": {"kind": "uniform", "min_tokens": 9, "max_tokens": 3}}, "max_tokens is 3 but min"),
    ({"prompt": {"kind": "lognormal"}}, "was given by nothing; allowed are"),
    (
        {"prompt": {"kind": "lognormal", "median_tokens": 5, "mean_tokens": 5, "sigma": 1.0}},
        "given by mean_tokens, median_tokens, sigma; allowed are",
    ),
    (
        {"prompt": {"kind": "lognormal", "p50_tokens": 50, "p90_tokens": 5}},
        "p90_tokens is 5 but p50_tokens is 50",
    ),
    ({"prompt": {"kind": "cdf"}}, "exactly one of file and points"),
    ({"prompt": {"kind": "cdf", "points": []}}, "The cdf has no point"),
    ({"prompt": {"kind": "cdf", "points": [[5, 0.5], [5, 1]]}}, "Point 2 of the cdf is at 5 tok"),
    ({"prompt": {"kind": "cdf", "points": [[5, 0.5], [6, 0.4]]}}, "has share 0.4; shares must not"),
    ({"prompt": {"kind": "cdf", "points": [[5, 0.5]]}}, "ends at share 0.5; its last share must"),
    ({"prompt": {"kind": "values", "values": []}}, "at least 1 item"),
    (
        {"prompt": {"kind": "values", "values": [1], "weights": [1, 2]}},
        "2 weights were given for 1",
    ),
    (
        {"prompt": {"kind": "values", "values": [1], "weights": [0]}},
        "at least one must be positive",
    ),
    ({"domains": [{"name": "code"}]}, "'code' needs exactly one of share and shares"),
    ({"domains": [{"name": "code", "share": 0.0}]}, "Every domain's share is 0 at 0 s"),
    ({"domains": [{"name": "code", "share": -0.5}]}, "greater than or equal to 0"),
    ({"domains": [{"name": "code", "shares": [[0, 1], [0, 2]]}]}, "strictly ascending"),
    ({"domains": [{"name": "code", "shares": [[0, 1], [9, -2]]}]}, "at 9 s is -2; it must be 0"),
    ({"domains": [{"name": "code", "share": 1}] * 2}, "'code' is given 2 times"),
    (
        {"arrivals": LOOP, "domains": [{"name": "code", "shares": [[0, 1], [5, 2]]}]},
        "Drifting shares need arrival times",
    ),
    ({"block_requests": 0}, "greater than or equal to 1"),
    ({"over_context": "drop"}, "'refuse', 'truncate' or 'error'"),
    ({"context_tokens": 99}, 'over_context is "refuse"; give over_context = "truncate"'),
    ({"over_context": "truncate", "context_tokens": 1}, "greater than or equal to 2"),
    ({"rate": 5}, "Extra inputs are not permitted"),
    ({"arrivals": None, "trace": {"file": CONV, "format": "tsv"}}, "'auto', 'mooncake', 'azure'"),
    ({"arrivals": None, "trace": {"file": CONV, "rate_scale": 0.0}}, "equal to 0.000001"),
    (
        {"arrivals": None, "trace": {"file": CONV, "start_s": 9.0, "end_s": 9.0}},
        "window ends at 9 s but starts at 9 s",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_WORKLOADS)
def test_bad_workloads_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    """Each mistake is told in its own words."""
    with pytest.raises(ValidationError, match=message):
        make(change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cdf file does not exist"),
        ("[[64, 0.5", "not readable as JSON"),
        ('{"64": 1.0}', "must be a list of pairs"),
        ("[[64, true]]", "must be a list of pairs"),
        (f"[[64, 1{'0' * 400}]]", "must be a list of pairs"),
        pytest.param("[" * 200_000, "not readable as JSON", id="brackets too deep"),
        ("[[64, 0.5], [32, 1.0]]", "Point 2 of the cdf is at 32 tokens"),
    ],
)
def test_a_bad_cdf_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    """The error holds the file's path and the fault."""
    if content is not None:
        (tmp_path / "lengths.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        make(prompt={"kind": "cdf", "file": "lengths.json"}, base_dir=tmp_path)
    assert caught.value.where == str(tmp_path / "lengths.json")


def test_settings_survive_a_trip_through_plain_data() -> None:
    """What a run writes down as its resolved workload is read back as the same settings."""
    table = {
        "arrivals": {"kind": "schedule", "points": [[0, 1.0], [5, 2.0]]},
        "num_requests": 5,
        "prompt": {"kind": "values", "values": [1, 2]},
        "output": TEN,
        "domains": [{"name": "code", "shares": [[0, 1.0], [5, 2.0]]}],
    }
    given_settings = WorkloadSettings.model_validate(table)
    plain = json.loads(given_settings.model_dump_json(exclude_none=True))
    assert WorkloadSettings.model_validate(plain) == given_settings


EXAMPLES = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "workload.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_documentation_works(example: str) -> None:
    """Examples are read as they stand; what a fragment leaves out is taken from a plain table."""
    table = tomllib.loads(example)
    table = table.get("workload", table)
    if "trace" not in table:
        table.setdefault("arrivals", POISSON)
        if "duration_s" not in table:
            table.setdefault("num_requests", 1000)
        if "total" not in table:
            table.setdefault("prompt", TEN)
            table.setdefault("output", TEN)
    assert len(generate(WorkloadSettings.model_validate(table), 1, SCENARIOS, DOMAINS)) > 0


def test_a_workload_of_longer_than_a_billion_seconds_is_refused() -> None:
    arrivals = {"kind": "poisson", "rate_per_s": 1e-6}
    with pytest.raises(InputError, match=r"arrives after .* at most 1e\+09 s are allowed"):
        make(arrivals=arrivals, num_requests=5000)
