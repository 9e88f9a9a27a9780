"""What whole models say of the served text afterwards: agreement, breaches, places in traces."""

from __future__ import annotations

import numpy as np

from calibration.serving.batching import Life
from calibration.serving.judge import Reread, judge, reread, served_traces
from calibration.serving.tally import TokenEntry
from tests.calibration.serving import model_of


def life(request_id: int, emitted: int, asked: int | None = None) -> Life:
    """A request that was given so many tokens of those it asked for."""
    made = Life(request_id, 0.0, 4, asked or emitted, list(range(4 + (asked or emitted))))
    made.emitted = [1] * emitted
    return made


def entry(request: int, place: int, token: int, level: int, breached: bool) -> TokenEntry:
    """A token that left a model of three exits."""
    return TokenEntry(request, place, 1.0, "m", 6, level, False, token, 0.4, 1.0, breached)


READ = Reread(
    tokens=np.array([[1, 2, 9], [3, 3, 3], [5, 6, 7], [4, 4, 8], [2, 2, 2]], np.int32),
    confidence=np.array(
        [[0.9, 0.2, 0.3], [0.1, 0.9, 0.2], [0.1, 0.2, 0.5], [0.9, 0.9, 0.9], [0.1, 0.1, 0.1]],
        np.float32,
    ),
    nll_nats=np.arange(15, dtype=np.float32).reshape(5, 3),
    first=np.array([0, 2, 2]),
)
"""Of three requests: two tokens, none, and three."""
LIVES = [life(0, 2), life(1, 0, 7), life(2, 3)]


def test_a_token_agrees_that_the_whole_model_would_say_at_its_place() -> None:
    log = [
        entry(0, 0, 9, 0, False),
        entry(2, 0, 7, 1, False),
        entry(0, 1, 3, 0, False),
        entry(2, 1, 4, 0, False),
    ]
    found = judge({"m": READ}, LIVES, log, {"m": 0.5}, [0, 0, 0])
    assert found.agrees.tolist() == [True, True, True, False]


def test_a_token_of_the_whole_model_agrees_with_itself_and_the_noise_is_counted() -> None:
    """Another kernel's arithmetic may read it otherwise; filled KV is no noise."""
    whole = [entry(0, 0, 7, 2, False), entry(0, 1, 3, 2, False)]
    found = judge({"m": READ}, LIVES, whole, {"m": 0.5}, [0, 0, 0])
    assert found.agrees.tolist() == [True, True]
    assert (found.num_whole, found.num_reread_otherwise) == (2, 1)

    early = [entry(2, 0, 7, 0, False), entry(2, 1, 1, 2, False)]
    filled = judge({"m": READ}, LIVES, early, {"m": 0.5}, [0, 0, 0])
    assert filled.agrees.tolist() == [True, False]
    assert (filled.num_whole, filled.num_reread_otherwise) == (0, 0)
    fed_again = judge({"m": READ}, LIVES, early, {"m": 0.5}, [0, 0, 0], recomputed_kv=True)
    assert fed_again.agrees.tolist() == [True, True]
    # A preempted request is prefilled anew, and its KV is the whole model's from then on.
    anew = [early[0], entry(2, 1, 1, 2, False)._replace(prefilled=True), entry(2, 2, 1, 2, False)]
    again = judge({"m": READ}, LIVES, anew, {"m": 0.5}, [0, 0, 0])
    assert again.agrees.tolist() == [True, True, True]
    assert (again.num_whole, again.num_reread_otherwise) == (2, 2)


def test_a_model_is_not_asked_about_requests_beyond_its_context() -> None:
    """Another model served it: this one has no position for its last tokens."""
    model = model_of("short", (1, 2), family="opt", positions=16)
    fits, beyond = life(0, 8), life(1, 20)
    alone = reread(model, [fits], free_running=False)
    both = reread(model, [fits, beyond], free_running=False)
    assert both.confidence[:8].tolist() == alone.confidence.tolist()
    assert (both.confidence[:8] > 0.0).all()
    assert not both.confidence[8:].any()


def test_text_is_read_again_with_no_more_logits_at_once_than_are_allowed(monkeypatch) -> None:
    """A served run would be lost to a large vocabulary that takes all memory after it."""
    model = model_of()
    lives = [life(0, 8), life(1, 5), life(2, 20)]
    whole = reread(model, lives, free_running=False)
    taken = []

    def counted(hidden, level):
        taken.append(len(hidden))
        return type(model).logits(model, hidden, level)

    monkeypatch.setattr(model, "logits", counted)
    monkeypatch.setattr("calibration.serving.judge.MAX_LOGITS", 4 * 256)
    parts = reread(model, lives, free_running=False)
    assert max(taken) == 4
    assert (parts.tokens == whole.tokens).all()
    np.testing.assert_allclose(parts.confidence, whole.confidence, rtol=1e-5)
    np.testing.assert_allclose(parts.nll_nats, whole.nll_nats, rtol=1e-5)


def test_a_breach_is_relative_where_a_deeper_exit_would_have_been_sure() -> None:
    log = [
        entry(0, 0, 1, 0, True),
        entry(0, 1, 3, 0, True),
        entry(2, 0, 7, 1, True),
        entry(2, 1, 8, 2, True),
        entry(2, 1, 4, 0, False),
    ]
    found = judge({"m": READ}, LIVES, log, {"m": 0.5}, [0, 0, 0])
    # Its own exit's word is none of a deeper one, and only breaches are relative ones.
    assert found.relative.tolist() == [False, True, True, False, False]
    never = judge(
        {"m": READ}, LIVES, log, {"m": 0.5}, [0, 0, 0], leaves=lambda confidence, threshold: False
    )
    assert not never.relative.any()


def test_traces_of_a_domain_hold_what_was_emitted_request_after_request() -> None:
    lives = [LIVES[0], life(1, 0, 7), LIVES[2]]
    for domains, starts in (([0, 0, 0], [0, 2, 2]), ([0, 1, 1], [0, 0, 0])):
        found = judge({"m": READ}, lives, [], {"m": 0.5}, domains)
        assert found.trace_start.tolist() == starts
        traces = served_traces({"m": READ}, {"m": (2, 4, 6)}, lives, domains, ("code", "prose"))
        for one, domain in zip(lives, domains, strict=True):
            begin, first = found.trace_start[one.request_id], READ.first[one.request_id]
            told = traces.nll_nats["m"][domain, begin : begin + one.generated]
            assert (told == READ.nll_nats[first : first + one.generated]).all()
    assert traces.num_positions == 3
    # The shorter domain is repeated, and what the full depth says agrees with itself.
    assert traces.nll_nats["m"][0, :, 0].tolist() == [0.0, 3.0, 0.0]
    assert traces.agrees["m"][1].tolist() == [
        [False, False, True],
        [False, False, True],
        [True, True, True],
    ]
