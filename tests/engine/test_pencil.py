"""The run worked out by hand in docs/pencil.md: the page's arithmetic and the engine agree."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helios_sim.engine import Run, Setup
from helios_sim.loop import batch, state
from helios_sim.loop.memory import used_blocks
from helios_sim.loop.state import BETWEEN, DECODING, PREFILLING
from helios_sim.runs.laws import check_run
from helios_sim.runs.records import RunData
from helios_sim.workload.requests import Requests
from tests.engine.factories import (
    play,
    profile_of,
    requests_of,
    setup_of,
    thumbnail,
    traces_from,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pencil.md"
POLICIES = {
    "ee-single, wait": ("ee-single", {"exit_mode": "wait"}),
    "static-depth, 2 layers": ("static-depth", {"depth": 2}),
}
CUT_S = 0.0005
"""Advances are cut so finely that no iteration is missed; cuts change no result."""

Row = dict[str, str]


def tables_of(section: str) -> list[list[Row]]:
    """The tables under a heading of the page, each a list of rows by column."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    tables: list[list[Row]] = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return tables


def worked_out(sum_text: str) -> tuple[float, float]:
    """Both sides of "10 + 4 x 11 + 5 = 59", the left one computed."""
    left, _, right = sum_text.partition(" = ")
    total = 0.0
    for sign, term in re.findall(r"(^|[+-] )([0-9. x]+)", left):
        value = math.prod(float(factor) for factor in term.split(" x "))
        total += -value if sign == "- " else value
    return total, float(right)


def the_setup() -> tuple[Setup, Requests]:
    """The page's model, requests and exit trace, read from its own tables."""
    _, asked, trace = tables_of("The set-up")
    profile = profile_of(thumbnail("small", (2, 4)), memory_bytes=9_600)
    confidence = [[float(cell) for cell in list(row.values())[1:]] for row in trace]
    requests = requests_of(
        [float(row["arrives s"]) for row in asked],
        [int(row["prompt tokens"]) for row in asked],
        [int(row["output tokens"]) for row in asked],
        trace_start=[int(row["its tokens stand at"].split(",")[0]) for row in asked],
    )
    setup = setup_of(
        profile,
        traces_from({"small": confidence}, {"small": (2, 4)}),
        expected_prompt_tokens=8,
        expected_output_tokens=4,
    )
    return setup, requests


Iteration = tuple[float, float, str, list[int], int, int, float]


def iterations_in(monkeypatch: pytest.MonkeyPatch) -> list[Iteration]:
    """A list that fills with every iteration of the next run."""
    seen: dict[float, Iteration] = {}
    advance = batch.advance
    names = {PREFILLING: "prefill", DECODING: "decode"}

    def step_by_step(w: state.World, r: int, horizon_s: float) -> int:
        rep = w.replicas[r]
        cut_s = float(rep.now_s)
        while True:
            cut_s += CUT_S
            cause = advance(w, r, min(cut_s, horizon_s))
            if rep.phase != BETWEEN:
                rows = [w.rows[r, w.order[r, k]] for k in range(rep.num_rows)]
                decodes = rep.phase == DECODING
                seen[float(rep.iteration_start_s)] = (
                    float(rep.iteration_start_s),
                    float(rep.end_s),
                    names[int(rep.phase)],
                    [int(row.request) for row in rows if decodes or row.chunk > 0],
                    int(rep.iteration_layers if decodes else rep.depth),
                    int(used_blocks(rep)),
                    float(rep.iteration_j),
                )
                listed[:] = [seen[start_s] for start_s in sorted(seen)]
            if cause != state.AT_HORIZON or cut_s >= horizon_s:
                return int(cause)

    listed: list[Iteration] = []
    monkeypatch.setattr(batch, "advance", step_by_step)
    return listed


@pytest.fixture(params=list(POLICIES))
def section(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def play_section(section: str) -> tuple[Run, RunData]:
    use, options = POLICIES[section]
    return play(*the_setup(), use, **options)


def test_the_sums_on_the_page_are_right(section: str) -> None:
    events, _, totals = tables_of(section)
    for row in events:
        for column in ("ms", "J"):
            computed, written = worked_out(row[column])
            assert computed == pytest.approx(written, abs=1e-9), row[column]
        _, milliseconds = worked_out(row["ms"])
        assert float(row["to s"]) - float(row["from s"]) == pytest.approx(milliseconds / 1000)
    for before, after in pairwise(events):
        assert before["to s"] == after["from s"]
    total_j = sum(worked_out(row["J"])[1] for row in events)
    written_j = next(row["value"] for row in totals if row["total"] == "energy J")
    assert total_j == pytest.approx(float(written_j))


def test_every_event_happens_as_on_the_page(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events, _, _ = tables_of(section)
    iterations = iterations_in(monkeypatch)
    run, _ = play_section(section)
    expected = [row for row in events if row["what"] in ("prefill", "decode")]
    assert len(iterations) == len(expected)
    for found, row in zip(iterations, expected, strict=True):
        start_s, end_s, what, requests, layers, blocks, joules = found
        assert start_s == pytest.approx(float(row["from s"]), abs=1e-12)
        assert end_s == pytest.approx(float(row["to s"]), abs=1e-12)
        assert what == row["what"]
        assert requests == [int(one) for one in row["requests"].split(",")]
        assert layers == int(row["layers"])
        assert blocks == int(row["blocks"])
        assert joules == pytest.approx(worked_out(row["J"])[1], abs=1e-12)
    loading = events[0]
    (decision,) = run.decisions
    assert decision.time_s == float(loading["from s"])
    assert decision.ready_s == pytest.approx(float(loading["to s"]), abs=1e-12)
    assert decision.assignment.depth == int(loading["layers"])


def test_every_request_fares_as_on_the_page(section: str) -> None:
    _, fates, _ = tables_of(section)
    _, data = play_section(section)
    check_run(data)
    for row, found in zip(fates, data.requests.iter_rows(named=True), strict=True):
        assert found["request_id"] == int(row["request"])
        assert found["admitted_s"] == pytest.approx(float(row["admitted s"]), abs=1e-12)
        assert found["first_token_s"] == pytest.approx(float(row["first token s"]), abs=1e-12)
        assert found["finished_s"] == pytest.approx(float(row["finished s"]), abs=1e-12)
        ttft_s = found["first_token_s"] - found["arrival_s"]
        assert ttft_s == pytest.approx(float(row["TTFT s"]), abs=1e-12)
        assert found["executed_layers"] == int(row["layers of its decoded tokens"])
        assert found["agree_tokens"] == int(row["agreeing tokens"])
        assert found["breaches"] == int(row["breaches"])
        assert found["breaches_relative"] == int(row["a deeper exit would have done"])


def test_every_total_is_as_on_the_page(section: str) -> None:
    _, _, rows = tables_of(section)
    run, data = play_section(section)
    totals: Any = data.totals
    found = {
        "end s": totals.end_s,
        "busy s": totals.busy_s,
        "idle s": totals.idle_s,
        "loading s": totals.load_s,
        "energy J": totals.energy_j,
        "idle energy J": totals.energy_idle_j,
        "loading energy J": totals.energy_load_j,
        "weights B": totals.peak_weight_bytes,
        "KV blocks": int(run.world.replicas[0].pool_blocks),
        "largest batch": totals.max_running,
        "iterations": totals.num_iterations,
        "left after layer 2": totals.exit_counts["small"][0],
        "left after layer 4": totals.exit_counts["small"][1],
    }
    written = {row["total"]: float(row["value"]) for row in rows}
    assert found == pytest.approx(written, abs=1e-9)


def test_the_closing_remark_quotes_the_runs() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## What it shows")[1]
    waits, agreeing = [], []
    for section in POLICIES:
        _, data = play_section(section)
        last = data.requests.row(2, named=True)
        waits.append(last["admitted_s"] - last["arrival_s"])
        agreeing.append(data.requests["agree_tokens"].sum())
    assert f"waits {waits[1]:.3f} s instead of {waits[0]:.3f} s" in text
    assert agreeing[0] - agreeing[1] == 2
    assert "two tokens that differ" in text
