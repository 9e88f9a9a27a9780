"""Serving in batches changes nothing of what each request is told."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from calibration.model.decode import Decoder, generate, slot_pool
from calibration.serving.judge import reread
from helios_sim.policy.contract import ExitMode
from tests.calibration.serving import (
    LENGTHS,
    first_exit_threshold,
    lives_for,
    model_of,
    serve_kept,
)

NEVER_CONFIDENT = 1.0
MODES = [
    ("vanilla", {}),
    ("ee-single", {"exit_mode": "solo"}),
    ("ee-single", {"exit_mode": "wait"}),
    ("ee-single", {"exit_mode": "rebatch"}),
]
CROWDED = {"max_batch": 2, "max_held": 2}
"""More requests in flight than a pass has rows."""
WAYS = [
    {"kv": "slots"},
    {"kv": "pages"},
    {"batching": "static"},
    {"batching": "static", "kv": "pages"},
    {"skipped_kv": "recomputed"},
]


def emitted(host) -> list[list[int]]:
    return [life.emitted for life in host.lives]


def exits(host) -> dict[tuple[int, int], int]:
    """The exit level of every decoded token, by request and place."""
    return {
        (one.request_id, one.place): one.level for one in host.tally.tokens if not one.prefilled
    }


@pytest.fixture(scope="module")
def model():
    return model_of("one", (2, 3, 5))


@pytest.fixture(scope="module")
def alone(model):
    """What each request is told when it is served by itself."""
    told = []
    for life in lives_for(LENGTHS):
        decoder = Decoder(model, slot_pool(model, 1, 64))
        told += generate(decoder, [life.text[: life.prompt_tokens]], life.output_tokens)
    return told


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
@pytest.mark.parametrize(("use", "options"), MODES, ids=lambda one: str(one))
def test_tokens_are_those_of_a_request_served_alone_when_no_exit_fires(
    model, alone, use, options, way
) -> None:
    if options.get("exit_mode") == "rebatch" and "skipped_kv" in way:
        pytest.skip("recomputed KV does not go with rebatching")
    host = serve_kept([model], use, options, threshold=NEVER_CONFIDENT, free_running=True, **way)
    assert emitted(host) == alone
    assert all(life.status == "finished" for life in host.lives)


def test_tokens_at_a_partial_depth_are_those_of_the_model_loaded_to_it(model) -> None:
    host = serve_kept([model], "static-depth", {"depth": 3}, threshold=0.5, free_running=True)
    for life in host.lives:
        text = life.text[: life.prompt_tokens]
        for token in life.emitted:
            hidden = model.backbone.forward_dense(torch.tensor([text]))[2][:, -1]
            assert int(model.logits(hidden, 1).argmax()) == token
            text = [*text, token]


def test_preempted_requests_are_told_the_same(model, alone) -> None:
    spec = model.spec
    weights = spec.weight_bytes(5)
    block = 4 * spec.kv_bytes_per_token(5)
    memory = int((weights + 11 * block) / 0.9) + 1
    host = serve_kept(
        [model],
        "vanilla",
        threshold=NEVER_CONFIDENT,
        free_running=True,
        memory_bytes=memory,
        watermark=0.0,
        kv="pages",
    )
    assert sum(life.num_preemptions for life in host.lives) > 0
    assert emitted(host) == alone


def test_a_request_beyond_the_pool_is_refused_and_the_others_are_served(model) -> None:
    spec = model.spec
    memory = int((spec.weight_bytes(5) + 8 * 4 * spec.kv_bytes_per_token(5)) / 0.9) + 1
    lives = lives_for([(9, 4), (30, 30), (5, 5)])
    host = serve_kept(
        [model], "vanilla", threshold=NEVER_CONFIDENT, lives=lives, memory_bytes=memory
    )
    assert [life.status for life in host.lives] == ["finished", "refused", "finished"]
    assert host.lives[1].admitted_s is None


@pytest.mark.parametrize("kv", ["slots", "pages"])
def test_every_mode_lets_the_same_tokens_off_at_the_first_exit(model, kv) -> None:
    """Layers up to the first exit are never skipped, so its word is the same in every mode.

    With a free split, rebatch lets a confident token off at once; deeper exits read filled KV,
    which differs between the modes.
    """
    threshold = first_exit_threshold(model)
    hosts = [
        serve_kept([model], "ee-single", {"exit_mode": mode}, threshold=threshold, kv=kv, **rows)
        for mode, rows in (("solo", {}), ("wait", {}), ("rebatch", {}), ("rebatch", CROWDED))
    ]
    firsts = [{at for at, level in exits(host).items() if level == 0} for host in hosts]
    assert 0 < len(firsts[0]) < len(exits(hosts[0]))
    assert firsts[0] == firsts[1] == firsts[2] == firsts[3]
    confident = [
        {
            (one.request_id, one.place): (one.token, round(one.confidence, 4))
            for one in host.tally.tokens
            if one.level == 0 and not one.prefilled
        }
        for host in hosts
    ]
    assert confident[0] == confident[1] == confident[2] == confident[3]
    crowded = hosts[3]
    assert max(entry.outcome.rows for entry in crowded.tally.iterations) == CROWDED["max_batch"]
    assert crowded.batch.max_running > CROWDED["max_batch"]


@pytest.mark.parametrize("mode", ["solo", "wait"])
def test_with_recomputed_kv_every_exit_says_what_the_whole_model_says(model, mode) -> None:
    threshold = first_exit_threshold(model, 0.6)
    host = serve_kept(
        [model], "ee-single", {"exit_mode": mode}, threshold=threshold, skipped_kv="recomputed"
    )
    found = reread(model, host.lives, free_running=False)
    levels = Counter()
    for one in host.tally.tokens:
        at = found.first[one.request_id] + one.place
        assert one.token == found.tokens[at, one.level]
        assert one.confidence == pytest.approx(found.confidence[at, one.level], abs=1e-4)
        assert one.nll_nats == pytest.approx(found.nll_nats[at, one.level], abs=1e-3)
        if not one.prefilled:
            sure = np.flatnonzero(found.confidence[at] >= threshold)
            assert one.level == (sure[0] if len(sure) else len(model.exit_layers) - 1)
            levels[one.level] += 1
    assert len(levels) == len(model.exit_layers)


def test_filled_kv_changes_what_deeper_exits_say_only_slightly(model) -> None:
    threshold = first_exit_threshold(model, 0.6)
    host = serve_kept([model], "ee-single", {"exit_mode": "wait"}, threshold=threshold)
    found = reread(model, host.lives, free_running=False)
    last = len(model.exit_layers) - 1
    deep = [one for one in host.tally.tokens if one.level == last and not one.prefilled]
    off = [
        abs(one.confidence - found.confidence[found.first[one.request_id] + one.place, last])
        for one in deep
    ]
    assert deep
    assert max(off) > 0.0
    assert float(np.mean(off)) < 0.1


def test_static_and_continuous_batches_tell_the_same(model) -> None:
    threshold = first_exit_threshold(model)
    runs = [
        serve_kept([model], "static-depth", {"depth": 3}, threshold=threshold, batching=batching)
        for batching in ("static", "continuous")
    ]
    assert emitted(runs[0]) == emitted(runs[1])
    sizes = [entry.outcome.rows + entry.outcome.ghosts for entry in runs[0].tally.iterations]
    assert max(sizes) == 4


def test_without_a_saving_no_batch_is_split_and_all_ride_to_the_end(model) -> None:
    host = serve_kept(
        [model],
        "ee-single",
        {"exit_mode": "rebatch"},
        threshold=first_exit_threshold(model),
        overhead_s=1e6,
    )
    for entry in host.tally.iterations:
        outcome = entry.outcome
        left_together = outcome.overheads == 0 and len(outcome.emitted) == outcome.rows
        assert left_together
    assert host.steward.assignment is not None
    assert host.steward.assignment.exit_mode is ExitMode.REBATCH


@pytest.mark.parametrize("on_change", ["drain", "recompute"])
def test_a_changing_policy_tells_every_request_all_it_asked_for(on_change) -> None:
    models = [model_of("small", (2, 4), seed=1), model_of("large", (2, 4, 6), seed=2)]
    lives = lives_for([(4 + k % 7, 3 + k % 9) for k in range(40)])
    host = serve_kept(
        models,
        "helios",
        {
            "evaluation_requests": 2,
            "reassess_requests": 12,
            "breach_window_tokens": 20,
            "breach_limit": 8,
        },
        threshold=first_exit_threshold(models[0]),
        lives=lives,
        on_change=on_change,
    )
    assert all(life.generated == life.output_tokens for life in host.lives)
    assert host.steward.num_evaluations >= 2
    assert {entry.event.value for entry in host.decisions} >= {"start", "evaluated"}


def test_no_more_requests_run_than_the_kv_cache_has_rows(model) -> None:
    """Blocks would allow all twelve; the cache here has eight slots."""
    lives = lives_for([(2, 9)] * 12)
    host = serve_kept([model], "vanilla", threshold=NEVER_CONFIDENT, lives=lives, max_batch=12)
    assert host.batch.max_running == host.machine.max_rows == 8
    assert all(life.status == "finished" for life in lives)
