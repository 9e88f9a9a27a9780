"""The real host does what the simulated replica does, decision by decision and token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.calibration.clockwork import ClockworkHost, serve_by_clockwork
from tests.engine.factories import (
    drifting_requests,
    drifting_setup,
    play,
    policy_of,
)

POLICIES = [
    ("vanilla", {}),
    ("ee-single", {"exit_mode": "wait"}),
    ("ee-single", {"exit_mode": "solo"}),
    ("ee-single", {"exit_mode": "rebatch"}),
    ("static-depth", {"model": "large", "depth": 4}),
    ("helios", {}),
    ("helios", {"window_kind": "sliding"}),
    ("always", {}),
    ("never", {}),
]
SERVING = [
    {},
    {"batching": "static"},
    {"on_change": "recompute"},
    {"skipped_kv": "recomputed"},
    {"overlap_loads": False, "max_prefill_tokens": 20, "watermark": 0.1},
]


def comparable(host: ClockworkHost, run, frame) -> None:
    """The host's requests and decisions are the simulator's, to the last bit."""
    lives = host.lives
    columns = {
        "arrival_s": [life.arrival_s for life in lives],
        "admitted_s": [life.admitted_s for life in lives],
        "first_token_s": [life.first_token_s for life in lives],
        "finished_s": [life.finished_s for life in lives],
        "status": [life.status for life in lives],
        "generated_tokens": [life.generated for life in lives],
        "evaluated": [life.evaluated for life in lives],
        "model": [life.model for life in lives],
        "depth": [life.depth for life in lives],
        "num_preemptions": [life.num_preemptions for life in lives],
        "decoded_tokens": [life.decoded for life in lives],
        "executed_layers": [life.executed_layers for life in lives],
        "breaches": [life.breaches for life in lives],
        "nll_nats": [life.nll_units / 1024 for life in lives],
    }
    for name, column in columns.items():
        assert column == frame[name].to_list(), name
    assert len(host.decisions) == len(run.decisions)
    for mine, simulated in zip(host.decisions, run.decisions, strict=True):
        assert (mine.time_s, mine.event, mine.decision, mine.assignment) == (
            simulated.time_s,
            simulated.event,
            simulated.decision,
            simulated.assignment,
        )
        assert mine.moved_bytes == simulated.moved_bytes
        assert mine.ready_s == simulated.ready_s
        assert seen(mine.snapshot) == seen(simulated.snapshot)


def seen(snapshot):
    """A snapshot without what rests on a meter and on the order in which seconds are summed."""

    def plain(telemetry):
        return replace(telemetry, energy_j=0.0, duration_s=round(telemetry.duration_s, 9))

    return replace(
        snapshot,
        telemetry=plain(snapshot.telemetry) if snapshot.telemetry else None,
        history={name: tuple(map(plain, rows)) for name, rows in snapshot.history.items()},
    )


@pytest.mark.parametrize("serving", SERVING, ids=lambda s: " ".join(map(str, s.values())) or "-")
@pytest.mark.parametrize(("use", "options"), POLICIES, ids=lambda o: str(o))
def test_the_host_takes_the_simulators_decisions_at_its_times(use, options, serving) -> None:
    if serving.get("skipped_kv") == "recomputed" and options.get("exit_mode") == "rebatch":
        pytest.skip("recomputed KV does not go with rebatching")
    setup = drifting_setup(**serving)
    requests = drifting_requests(120)
    run, data = play(setup, requests, use, **options)
    host = serve_by_clockwork(setup, setup.traces, requests, policy_of(use, **options))
    comparable(host, run, data.requests)
    totals = data.totals
    tally = host.tally
    assert host.end_s == totals.end_s
    for mine, simulated in (
        (tally.spent_s["busy"], totals.busy_s),
        (tally.spent_s["idle"], totals.idle_s),
        (tally.spent_s["load"], totals.load_s),
        (tally.drain_s, totals.drain_s),
        (tally.switch_time_s, totals.switch_time_s),
        (tally.batch_seconds, totals.batch_seconds),
        (tally.decode_s, totals.decode_s),
        (sum(tally.gaps_s), totals.itl_sum_s),
        (tally.weight_byte_seconds / host.end_s, totals.mean_weight_bytes),
    ):
        assert mine == pytest.approx(simulated, rel=1e-9, abs=1e-9)
    assert tally.decode_rows == totals.decode_rows
    assert tally.num_decode_iterations == totals.num_decode_iterations
    assert tally.num_iterations == totals.num_iterations
    assert {name: tuple(counts) for name, counts in tally.exit_counts.items()} == (
        totals.exit_counts
    )
    assert (tally.num_switches, tally.num_loads, tally.num_evaluations) == (
        totals.num_switches,
        totals.num_loads,
        totals.num_evaluations,
    )
    assert host.batch.max_running == totals.max_running
