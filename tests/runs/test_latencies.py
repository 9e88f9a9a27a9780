"""What is read off a run's requests: their order, what warms up, and which latency counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from helios_sim.errors import InputError
from helios_sim.runs.latencies import Columns, columns_of
from helios_sim.runs.records import RunData
from helios_sim.settings.slo import parse_slo
from tests.factories import make_run


def run_of(**columns: list[Any]) -> RunData:
    """A run whose requests have these values in these columns."""
    run = make_run(num_requests=len(next(iter(columns.values()))))
    values = [pl.Series(name, column) for name, column in columns.items()]
    return replace(run, requests=run.requests.with_columns(values))


def latency_s(columns: Columns, limit: str) -> list[float]:
    slo = parse_slo(limit)
    return columns.latency_s(slo.limits[0]).tolist()


def test_a_limit_is_of_its_own_latency_and_one_token_has_no_gap() -> None:
    """A real backend may tell of the end of a request some time after its only token."""
    columns = columns_of(
        run_of(
            arrival_s=[1.0, 2.0],
            first_token_s=[1.5, 2.25],
            finished_s=[2.5, 2.75],
            generated_tokens=[5, 1],
        )
    )
    assert latency_s(columns, "ttft:300") == [0.5, 0.25]
    assert latency_s(columns, "e2e:300") == [1.5, 0.75]
    assert latency_s(columns, "tpot:300") == latency_s(columns, "itl:300") == [0.25, 0.0]


def test_requests_are_in_order_of_arrival_and_at_one_instant_of_their_numbers() -> None:
    """Whether all of them stand the wrong way round, or one."""
    backwards = run_of(arrival_s=[3.0, 2.0, 1.0])
    assert columns_of(backwards).request_id.tolist() == [2, 1, 0]
    one = run_of(arrival_s=[3.0, 3.0, 1.0, 4.0], request_id=[7, 5, 6, 4])
    assert columns_of(one).request_id.tolist() == [6, 5, 7, 4]
    assert columns_of(one).arrival_s.tolist() == [1.0, 3.0, 3.0, 4.0]


def test_departures_are_in_order_of_time_whoever_leaves_first() -> None:
    """The first of two ends last; one is refused as it arrives, and one never leaves."""
    run = run_of(
        arrival_s=[1.0, 2.0, 2.5, 3.0],
        finished_s=[9.0, 4.0, None, None],
        status=["finished", "finished", "refused", "running"],
    )
    assert columns_of(run).departures_s.tolist() == [2.5, 4.0, 9.0, math.inf]


@pytest.mark.parametrize(
    ("warmup", "said"),
    [
        ((-1.0, 3), r"measure\.warmup_s = -1\.0 and measure\.warmup_requests = 3; allowed are 0"),
        ((math.inf, 0), r"measure\.warmup_s = inf and"),
        ((math.nan, 0), r"measure\.warmup_s = nan and"),
        ((0.0, -1), r"measure\.warmup_requests = -1; allowed are 0 or more"),
    ],
)
def test_a_warm_up_that_is_no_length_is_refused(warmup: tuple[float, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        columns_of(run_of(arrival_s=[1.0]), *warmup)


def test_a_run_without_requests_is_refused_by_its_name() -> None:
    run = make_run(num_requests=3, label="mine")
    with pytest.raises(InputError, match=r"^mine: The run is empty: it holds no request\.$"):
        columns_of(replace(run, requests=run.requests.clear()))
