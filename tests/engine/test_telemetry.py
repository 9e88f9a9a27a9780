"""What a policy is told of a period is what the records of its run say of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pytest

from helios_sim.policy.contract import (
    Decision,
    Evaluate,
    Event,
    ExitMode,
    Keep,
    Serve,
    Snapshot,
    Watching,
)
from tests.engine.factories import (
    DOMAINS,
    drifting_requests,
    drifting_setup,
    play,
    play_policy,
    requests_of,
    snapshots_of,
)


@dataclass
class Content:
    """Serves one model from start to end, and is asked whenever five requests have finished."""

    exit_mode: ExitMode
    name: str = "content"
    sees_future: bool = False
    watching: Watching = field(default_factory=lambda: Watching(reassess_requests=5))
    confidence_threshold: float | None = None

    def decide(self, snapshot: Snapshot) -> Decision:
        """Serve the large model whole."""
        if snapshot.event is Event.START:
            return Serve("large", 8, self.exit_mode, "The only choice.")
        return Keep("Nothing better is known.")


def test_a_policy_is_told_of_the_requests_and_of_the_joules_of_its_period_alone() -> None:
    """Twenty requests that never meet: every five of them are a period."""
    setup = drifting_setup(timeline_interval_s=0.001)
    outputs = [1 + row % 4 for row in range(20)]
    requests = requests_of(
        10.0 + 2.0 * np.arange(20),
        [5] * 20,
        outputs,
        trace_start=7 * np.arange(20),
        domains=DOMAINS,
    )
    run, data = play_policy(setup, requests, lambda: Content(ExitMode.WAIT))
    told = [one.telemetry for one in snapshots_of(run.decisions)[1:]]
    assert len(told) == 3
    since_s = run.decisions[0].ready_s
    for period, telemetry in enumerate(told):
        assert telemetry is not None and since_s is not None
        rows = data.requests.slice(5 * period, 5)
        until_s = rows["finished_s"][-1]
        assert telemetry.duration_s == pytest.approx(until_s - since_s)
        assert telemetry.num_finished == 5
        assert telemetry.num_tokens == rows["generated_tokens"].sum()
        assert sum(telemetry.exit_counts) == rows["decoded_tokens"].sum()
        assert telemetry.executed_layers == rows["executed_layers"].sum()
        assert telemetry.nll_nats == pytest.approx(rows["nll_nats"].sum())
        assert telemetry.mean_batch == 1.0
        ttft_s = rows["first_token_s"] - rows["arrival_s"]
        assert telemetry.mean_ttft_s == pytest.approx(ttft_s.mean())
        several = rows.filter(pl.col("output_tokens") > 1)
        gaps = several["output_tokens"] - 1
        tpot_s = (several["finished_s"] - several["first_token_s"]) / gaps
        assert telemetry.mean_tpot_s == pytest.approx(tpot_s.mean())
        lines = data.timeline.filter(pl.col("time_s").is_between(since_s, until_s, closed="right"))
        drawn_j = (lines["power_w"] * lines["interval_s"]).sum()
        assert telemetry.energy_j == pytest.approx(drawn_j)
        there_s = (rows["finished_s"] - rows["arrival_s"]).sum()
        assert telemetry.idle_energy_j == pytest.approx(50.0 * (until_s - since_s - there_s))
        since_s = until_s


def test_a_policy_is_told_of_the_tokens_of_requests_that_still_run() -> None:
    """Every decoded token has run all eight layers, of whomever it is."""
    setup = drifting_setup()
    run, _ = play_policy(
        setup, drifting_requests(60, rate_per_s=30.0), lambda: Content(ExitMode.FULL)
    )
    seen = snapshots_of(run.decisions)[1:]
    assert any(snapshot.num_running for snapshot in seen)
    for snapshot in seen:
        telemetry = snapshot.telemetry
        assert telemetry is not None
        assert telemetry.executed_layers == 8 * sum(telemetry.exit_counts) > 0
        assert telemetry.mean_batch > 1.0


@dataclass
class Curious(Content):
    """Evaluates, at every reassessment, what it serves."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Evaluate the large model, and serve it on."""
        if snapshot.event is Event.REASSESS:
            return Evaluate("large", 3, self.exit_mode, "Once more.")
        return super().decide(snapshot)


@pytest.mark.parametrize("on_change", ["drain", "recompute"])
def test_an_evaluation_of_what_is_served_begins_without_the_requests_before_it(
    on_change: str,
) -> None:
    """Each of its three has one token of its prefill beside those decoded, and nobody else any."""
    setup = drifting_setup(on_change=on_change)
    requests = drifting_requests(60, rate_per_s=30.0)
    run, _ = play_policy(setup, requests, lambda: Curious(ExitMode.WAIT))
    seen = snapshots_of(run.decisions)
    assert any(one.num_running for one in seen if one.event is Event.REASSESS)
    told = [one.telemetry for one in seen if one.event is Event.EVALUATED]
    assert len(told) > 2
    for telemetry in told:
        assert telemetry is not None
        assert telemetry.num_finished == 3
        assert telemetry.num_tokens == sum(telemetry.exit_counts) + 3


def test_foresight_is_of_the_tokens_of_as_many_requests_as_all_replicas_end_in_a_round() -> None:
    """Two replicas of thirty a round: thirty easy tokens come and ninety hard ones, then easy."""
    domain = np.repeat([0, 1, 0], 30)
    requests = requests_of(
        np.zeros(90), [5] * 90, np.where(domain == 1, 3, 1), domain=domain, domains=DOMAINS
    )
    setup = drifting_setup(fleet={"num_replicas": 2})
    run, _ = play(setup, requests, "clairvoyant", reassess_requests=30)
    easy, hard = (setup.traces.share_by_exit("small", 0.5, name)[0] for name in DOMAINS)
    first = snapshots_of(run.decisions)[0]
    assert first.foresight is not None
    assert first.foresight["small"][0] == pytest.approx(0.25 * easy + 0.75 * hard)
