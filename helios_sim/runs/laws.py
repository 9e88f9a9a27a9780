"""The laws that a run keeps, whoever recorded it: of status, time, tokens and energy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import polars as pl

from helios_sim.runs.columns import STATUSES

if TYPE_CHECKING:
    from helios_sim.runs.records import RunData, RunTotals


class IntegrityError(ValueError):
    """A run that breaks one of its own laws: the host that recorded it is wrong."""


def run_violations(run: RunData) -> list[str]:
    """What is wrong with a run, one sentence a law; empty for a sound run."""
    return [
        *_status_violations(run.requests),
        *_time_violations(run.requests, run.totals),
        *_token_violations(run.requests, run.totals),
        *_energy_violations(run.timeline, run.totals),
    ]


def check_run(run: RunData) -> None:
    """Raise `IntegrityError` unless the run obeys the laws of status, time, tokens and energy."""
    violations = run_violations(run)
    if violations:
        raise IntegrityError(f"The run breaks its own laws: {' '.join(violations)}")


def _broken(frame: pl.DataFrame, laws: Mapping[str, pl.Expr]) -> list[str]:
    """For each law the number of rows that break it and the first of them; nulls break nothing."""
    counts = frame.select(
        (~law).fill_null(value=False).sum().alias(sentence) for sentence, law in laws.items()
    ).row(0, named=True)
    found = []
    for sentence, count in counts.items():
        if count:
            first = frame.filter((~laws[sentence]).fill_null(value=False)).row(0, named=True)
            place = first.get("request_id", first.get("time_s"))
            found.append(f"{sentence} ({count} rows do not, the first at {place}).")
    return found


def _status_violations(requests: pl.DataFrame) -> list[str]:
    status = pl.col("status")
    found = _broken(
        requests,
        {
            f"Every status is one of {', '.join(STATUSES)}": status.is_in(list(STATUSES)),
            "A finished request was admitted, emitted and ended": (status != "finished")
            | (
                pl.col("admitted_s").is_not_null()
                & pl.col("first_token_s").is_not_null()
                & pl.col("finished_s").is_not_null()
            ),
            "Only a finished request has a finish time": (status == "finished")
            | pl.col("finished_s").is_null(),
            # One that was preempted may meet another model, or a pool of other weights.
            "A refused request was never admitted, or was preempted": (status != "refused")
            | (pl.col("admitted_s").is_null() & (pl.col("generated_tokens") == 0))
            | (pl.col("num_preemptions") > 0),
            "A running request was admitted": (status != "running")
            | pl.col("admitted_s").is_not_null(),
        },
    )
    if requests["request_id"].n_unique() != requests.height:
        found.append("Every request is recorded once (a request_id is repeated).")
    return found


def _time_violations(requests: pl.DataFrame, totals: RunTotals) -> list[str]:
    end_s = totals.end_s
    return _broken(
        requests,
        {
            "A request is admitted at or after its arrival": pl.col("arrival_s")
            <= pl.col("admitted_s"),
            "A first token follows its admission": pl.col("admitted_s") <= pl.col("first_token_s"),
            "A finish follows the first token": pl.col("first_token_s") <= pl.col("finished_s"),
            "Nothing finishes after the end of the run": pl.col("finished_s") <= end_s + 1e-9,
            "Nothing arrives before the start of the run": pl.col("arrival_s") >= 0.0,
        },
    )


def _token_violations(requests: pl.DataFrame, totals: RunTotals) -> list[str]:
    generated = pl.col("generated_tokens")
    found = _broken(
        requests,
        {
            "A finished request emitted what was asked for": (pl.col("status") != "finished")
            | (generated == pl.col("output_tokens")),
            "No request emits more than was asked for": generated <= pl.col("output_tokens"),
            "A request emits a token exactly if it has a first-token time": (generated > 0)
            == pl.col("first_token_s").is_not_null(),
            "Decoded tokens are among the emitted ones": pl.col("decoded_tokens").is_between(
                0, generated
            ),
            "A decoded token executes at least one layer": pl.col("executed_layers")
            >= pl.col("decoded_tokens"),
            "Agreeing tokens are among the emitted ones": pl.col("agree_tokens").is_between(
                0, generated
            ),
            "Breaches are among the emitted tokens": pl.col("breaches").is_between(0, generated),
            "Relative breaches are among the breaches": pl.col("breaches_relative").is_between(
                0, pl.col("breaches")
            ),
            "Negative log-likelihoods are not negative": pl.col("nll_nats") >= 0.0,
        },
    )
    decoded = int(requests["decoded_tokens"].sum())
    left = sum(sum(counts) for counts in totals.exit_counts.values())
    if left != decoded:
        found.append(f"Exits count every decoded token ({left} counted, {decoded} decoded).")
    gaps = int((requests["generated_tokens"] - 1).clip(lower_bound=0).sum())
    if sum(totals.itl_counts) != gaps:
        found.append(f"Gaps lie between tokens ({sum(totals.itl_counts)} counted, {gaps} there).")
    if totals.itl_counts and len(totals.itl_bins_s) != len(totals.itl_counts) + 1:
        found.append("A gap histogram has one edge more than counts.")
    return found


def _energy_violations(timeline: pl.DataFrame, totals: RunTotals) -> list[str]:
    found = []
    for name in ("energy_j", "energy_idle_j", "energy_load_j"):
        if getattr(totals, name) < 0.0:
            found.append(f"Energies are not negative ({name} is {getattr(totals, name)}).")
    found += _broken(
        timeline,
        {
            "Power is not negative": pl.col("power_w") >= 0.0,
            "Used KV blocks are within the pool": pl.col("kv_blocks_used").is_between(
                0, pl.col("kv_blocks")
            ),
            "An interval has a length": pl.col("interval_s") >= 0.0,
        },
    )
    covered_s = float(timeline["interval_s"].sum())
    whole = math.isclose(covered_s, totals.end_s * totals.num_replicas, rel_tol=1e-9)
    if whole and math.isfinite(totals.energy_j) and timeline["power_w"].null_count() == 0:
        summed_j = float((timeline["power_w"] * timeline["interval_s"]).sum())
        if not math.isclose(summed_j, totals.energy_j, rel_tol=1e-6, abs_tol=1e-6):
            found.append(
                f"The run's energy is the sum of its intervals ({totals.energy_j} J against "
                f"{summed_j} J)."
            )
    return found
