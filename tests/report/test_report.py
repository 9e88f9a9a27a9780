"""The page stands alone: it answers the question, opens offline, and draws in both themes."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

from helios_sim.errors import InputError
from helios_sim.publish import write_page
from helios_sim.report import render
from helios_sim.report.document import add_figure, document
from helios_sim.report.figures import (
    MAX_CURVE_POINTS,
    MAX_REPLICA_ROWS,
    attainment_figure,
    cumulative_curve,
    exits_figure,
    latency_figure,
    model_colours,
    segments,
    timeline_figure,
)
from helios_sim.report.plotting import log_ticks
from helios_sim.report.thinning import MAX_TIMELINE_POINTS
from helios_sim.report.words import (
    device_of_all,
    headline,
    judged_by,
    labels_apart,
    large_batches,
    launch_bound,
    mean_batches,
    none_alone,
    one_seed,
    range_over_seeds,
    remarks,
    serving,
    slo_verdicts,
    taken_otherwise,
    waited_for_start,
    worth,
)
from helios_sim.runs.comparison import ratios_over_seeds
from helios_sim.runs.latencies import columns_of
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import REPORT_FILE, RunData, write_run
from helios_sim.search.drawings import sensitivity_figure
from helios_sim.search.tune import Sensitivity
from helios_sim.settings.slo import parse_slo
from helios_sim.wording import limits, number, span, times
from tests.factories import make_run

SLO = parse_slo("ttft:p95<500 tpot:24 e2e:30s")
POLICIES = {"vanilla": 0.020, "ee-single": 0.016, "static-depth": 0.0105, "helios": 0.0085}


def make_runs(**settings: Any) -> list[RunData]:
    """Four policies on the same requests, the first two of them overloaded."""
    settings = {"num_requests": 600, "rate_per_s": 8.0, "slots": 12} | settings
    return [make_run(name, tpot_s=tpot_s, **settings) for name, tpot_s in POLICIES.items()]


def make_page(runs: list[RunData], notes: Sequence[str] = ()) -> str:
    """The page of runs, judged by one SLO after a warm-up."""
    summaries = [summarise(run, SLO, warmup_requests=20) for run in runs]
    said = {"name": "Opt pair", "question": "Who carries the load?", "notes": list(notes)}
    return render([replace(run, scenario=run.scenario | said) for run in runs], summaries)


def text_of(page: str) -> str:
    """What a reader reads: the page without scripts, styles and tags."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body)))


def figures_of(page: str) -> dict[str, Any]:
    """The figures embedded in a page."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures


def test_the_page_answers_with_numbers() -> None:
    """Headline, overload, quality, notes, decisions and provenance are there to read."""
    text = text_of(make_page(make_runs(num_refused=2), notes=["Exits are <assumed>."]))
    assert "Who carries the load?" in text
    assert re.search(r"helios serves .* requests/s within the SLO", text)
    assert "Overloaded: vanilla and ee-single." in text
    assert "TTFT p95 ≤ 500 ms, TPOT ≤ 24 ms, E2E ≤ 30 s" in text
    assert "Exits are <assumed>." in text
    assert "51 of 100 breached; 0.4 s < 0.9 s." in text
    assert "31 published" in text
    assert "rate_per_s = 8.0" in text
    assert "leave out the first 20 requests" in text


@pytest.mark.parametrize(
    ("published", "ratio"),
    [(2.0, r"[\d.]+"), (0.0, "\N{EN DASH}"), (-0.0, "\N{EN DASH}"), (5e-324, "\N{EN DASH}")],
)
def test_a_published_figure_has_a_ratio_unless_no_number_says_it(
    published: float, ratio: str
) -> None:
    run = make_run()
    entry = {
        "figure": "request_throughput",
        "policy": run.label,
        "published": published,
        "source": "a paper",
    }
    run = replace(run, scenario={**run.scenario, "published": [entry]})
    cells = re.search(r'<table class="published">.*?</table>', make_page([run]), re.DOTALL)
    assert cells is not None
    assert re.search(rf"<td>{ratio}</td><td>a paper</td>", cells[0])


def test_a_processor_is_not_called_a_gpu() -> None:
    """The records say what the device is; those of a real run by its name."""
    run = make_run(num_replicas=2)
    for said, called in (
        ({}, "GPU"),
        ({"device": "NVIDIA H100", "device_kind": "GPU"}, "GPU"),
        ({"device": "AMD EPYC, 2 cores", "device_kind": "processor"}, "processor"),
        ({"device": "cpu (x86_64)"}, "processor"),
    ):
        told = replace(run, environment=run.environment | said)
        assert f"to 2 replicas (2 {called}s)." in text_of(make_page([told]))
    assert [device_of_all(kinds) for kinds in ([False], [True, True], [True, False])] == [
        "GPU",
        "processor",
        "device",
    ]


def test_a_closed_loop_tells_the_time_of_every_policy() -> None:
    """Its users send as answers come, so no policy's time speaks for all."""
    runs = [
        make_run("vanilla", closed_loop=True),
        make_run("helios", closed_loop=True, rate_per_s=8.0),
    ]
    spans = [span(float(np.ptp(run.requests["arrival_s"].to_numpy()))) for run in runs]
    assert spans[0] != spans[1]
    assert (
        f"400 requests sent by a closed loop within {spans[1]} to {spans[0]}, depending on the "
        "policy, to 1 replica (1 GPU)."
    ) in text_of(make_page(runs))
    alone = text_of(make_page(runs[:1]))
    assert f"400 requests sent by a closed loop within {spans[0]} to 1 replica" in alone
    assert f"400 requests sent within {spans[0]} to 1 replica" in text_of(make_page([make_run()]))


@pytest.mark.parametrize("runs", [make_runs(), [make_run("helios", num_replicas=3)]])
def test_every_figure_is_valid_and_has_its_place(runs: list[RunData]) -> None:
    """Each figure passes the drawing library's own validation and has a captioned element."""
    page = make_page(runs)
    figures = figures_of(page)
    assert {"latency", "attainment", "exits", "time", "timeline0"} <= set(figures)
    for name, figure in figures.items():
        text = re.sub(r'"@[a-z]+[0-9]*(/[0-9.]+)?"', '"#123456"', json.dumps(figure))
        assert go.Figure(json.loads(text)).data, name
        assert page.count(f'id="{name}"') == 1
    assert page.count("<figcaption>") == len(figures)


def test_colours_of_figures_are_variables_of_the_style_sheet() -> None:
    """Every colour name a figure uses is defined for the light and for the dark theme."""
    page = make_page(make_runs())
    used = set(re.findall(r'"@([a-z]+[0-9]*)', json.dumps(figures_of(page))))
    assert {"ink", "c1", "m1", "t1"} <= used
    for name in used:
        assert len(re.findall(rf"--{name}: #[0-9a-fA-F]{{6}};", page)) == 2, name


def test_the_page_asks_nothing_of_the_network() -> None:
    """No element names a source elsewhere, and the content policy forbids every request."""
    page = make_page([make_run()])
    head = page[: page.index("<style>")]
    assert "default-src 'none'" in head
    html = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=", html)
    assert "@import" not in html
    assert "url(" not in html


def figure_of(
    mean: float,
    low: float | None,
    high: float | None,
    num: int = 3,
    apart: float = 0.0,
    values: Sequence[float | None] = (),
) -> dict[str, Any]:
    """A figure over replications, as `aggregate` gives it, runs `apart` to either side."""
    ends = {"least": mean - apart, "most": mean + apart}
    known = {"mean": mean, "low": low, "high": high, "std": 0.1, **ends, "num": num}
    return {**known, "values": list(values)}


def test_all_seeds_are_shown_with_their_intervals() -> None:
    """What all seeds agree on has no interval, and a figure that no seed has no value."""
    runs = make_runs()
    summaries = [summarise(run) for run in runs]
    assert "Over all seeds" not in render(runs, summaries)
    for place, summary in enumerate(summaries):
        figures = {
            "slo_attainment": figure_of(0.9, 0.85, 0.95, apart=0.03),
            "num_refused": figure_of(0.0, 0.0, 0.0),
            "agreement": {"mean": 0.99622, "low": 0.99612, "high": 0.99632, "num": 3},
            "perplexity": figure_of(3.5, None, None, num=1),
        }
        if place == 0:
            del figures["slo_attainment"]
        said = ["stable", "backlogged", "stable"] if place else [None] * 3
        summary["replications"] = {"seeds": [4, 5, 6], "saturation": said, "figures": figures}
    page = render(runs, summaries)
    section = page.split("<h2>Over all seeds</h2>")[1].split("</section>")[0]
    assert "Means over the 3 seeds 4 to 6" in section
    assert (
        "<td>\N{EN DASH}</td><td>90 <span class='unit'>[85, 95]</span> "
        "<span class='unit'><br>87 to 93</span></td>"
    ) in section
    assert "<td>0</td><td>0</td>" in section
    # Of a run that does not say them, the ends are left out.
    assert "<td>99.62 <span class='unit'>[99.61, 99.63]</span></td>" in section
    assert "<td>3.500 <span class='unit'>in 1 of 3</span></td>" in section
    assert "<td>\N{EN DASH}</td><td>stable 2, backlogged 1</td>" in section
    assert "means over the 3 seeds 4 to 6 stand below" in page


@pytest.mark.parametrize("seeds", [[7, 8], None])
def test_runs_of_other_seeds_have_no_table_of_all(seeds: list[int] | None) -> None:
    runs = make_runs()[:2]
    summaries = [summarise(run) for run in runs]
    for summary, own in zip(summaries, ([1, 2, 3], seeds), strict=True):
        if own is not None:
            figures = {"num_refused": figure_of(0.0, 0.0, 0.0)}
            summary["replications"] = {"seeds": own, "saturation": [], "figures": figures}
    page = render(runs, summaries)
    assert "Over all seeds" not in page
    assert "stand below" not in page


def test_models_that_only_a_choosing_policy_serves_are_named() -> None:
    """What it gains over policies of the large model may be what the small one gives alone."""
    large = {"label": "vanilla", "num_evaluations": 0, "depth_share": {"large@8": 1.0}}
    small = {"label": "small", "num_evaluations": 0, "depth_share": {"small@4": 1.0}}
    choosing = {
        "label": "helios",
        "num_evaluations": 3,
        "depth_share": {"large@4": 0.5, "small@2": 0.3, "small@4": 0.2},
    }
    (said,) = none_alone([large, choosing])
    assert said.startswith("No other policy here serves small, as helios may: ")
    assert said.endswith('vanilla with model = "small" shows one alone.')
    assert none_alone([large, small, choosing]) == []
    # Alone on a page nothing is gained over others, and without it nothing is chosen.
    assert none_alone([choosing]) == none_alone([large, small]) == []
    assert none_alone([large, {**choosing, "depth_share": {"large@8": 1.0}}]) == []


def test_one_seed_of_a_policy_that_evaluates_is_said_to_be_one_of_many() -> None:
    """Policies that evaluate nothing go the same way with every seed."""
    fixed, deciding = summary("vanilla", 800.0, 70.0), summary("helios", 900.0, 60.0)
    deciding |= {"num_evaluations": 3, "origin": "simulated"}
    assert one_seed([fixed]) == one_seed([{**deciding, "origin": "measured"}]) == []
    assert one_seed([{**deciding, "replays_text": True}]) == []
    (said,) = one_seed([fixed, deciding])
    assert said.startswith("One seed: helios decides on few evaluated requests")
    assert "--set measure.replications=8" in said
    assert said in remarks([fixed, deciding])
    deciding["replications"] = {"seeds": [1, 2], "figures": {"num_refused": figure_of(0, 0, 0)}}
    assert one_seed([fixed, deciding]) == []


def test_how_far_seeds_lie_apart_is_said_of_each_policy() -> None:
    summaries = [summary("vanilla", 800.0, 70.0), summary("helios", 900.0, 60.0)]
    for one, apart in zip(summaries, (0.0, 400.0), strict=True):
        figures = {"output_throughput": figure_of(1000.0, 900.0, 1100.0, apart=apart)}
        one["replications"] = {"seeds": [3, 4], "figures": figures}
    assert range_over_seeds(summaries) == [
        "Tokens/s over the 2 seeds 3 to 4: 1,000 (vanilla); 600 to 1,400 (helios)."
    ]


def test_a_published_figure_has_our_range_over_seeds_beside_it() -> None:
    """A plain figure in its unit, and a gain that is worked out seed by seed."""
    runs = make_runs()[:2]
    first, second = (run.label for run in runs)
    energy = {"figure": "energy_per_output_token", "policy": second, "published": 1.0}
    entries = [
        energy | {"source": "paper", "scale": 1e-3, "unit": "J"},
        energy | {"source": "paper", "against": first},
    ]
    runs = [replace(run, scenario={**run.scenario, "published": entries}) for run in runs]
    summaries = [summarise(run) for run in runs]
    assert "Seeds " not in render(runs, summaries)
    for one, values in zip(summaries, ((2000.0, 6000.0), (1000.0, 4000.0)), strict=True):
        figure = figure_of(3000.0, 0.0, 9000.0, values=values)
        one["replications"] = {"seeds": [4, 5], "figures": {"energy_per_output_token": figure}}
    page = render(runs, summaries)
    table = page.split("<h2>Beside the published figures</h2>")[1].split("</table>")[0]
    assert "Seeds 4 to 5" in table
    assert "<td>1 to 4</td>" in table
    assert "<td>1.50 to 2</td>" in table
    for one, values in zip(summaries, ((2000.0, 1e308), (1000.0, 1e-308)), strict=True):
        figure = figure_of(3000.0, 0.0, 9000.0, values=values)
        one["replications"] = {"seeds": [4, 5], "figures": {"energy_per_output_token": figure}}
    assert "<td>2 in 1 of 2</td>" in render(runs, summaries)


def test_policies_are_compared_seed_by_seed() -> None:
    """Means of 1.5 and 4 over two seeds: the ratios of one seed are 4 and 2, not 2.67."""
    runs = make_runs()[:2]
    summaries = [summarise(run) for run in runs]
    for one, values in zip(summaries, ((1.0, 2.0), (4.0, 4.0)), strict=True):
        mean = sum(values) / 2
        figure = figure_of(mean, 0.0, 9.0, values=values)
        one["replications"] = {
            "seeds": [4, 5],
            "saturation": ["stable"] * 2,
            "figures": {"output_throughput": figure, "mean_batch_size": figure},
        }
    ratios = "2.00\N{MULTIPLICATION SIGN} to 4.00\N{MULTIPLICATION SIGN}"
    said = range_over_seeds(summaries)[0]
    assert said.endswith(f"Ratios to {summaries[0]['label']}, seed by seed: {ratios}.")
    section = render(runs, summaries).split("<h2>Over all seeds</h2>")[1].split("</section>")[0]
    assert "Ratios are to the run of vanilla under the same seed" in section
    # A batch size is neither better nor worse, and the first policy is compared with nobody.
    assert section.count(f"<br>{ratios}") == 1


def test_the_median_of_several_seeds_stands_beside_their_ends() -> None:
    """Of the ratios of one seed 4, 2 and 3; of seeds that are level nothing but their level."""
    runs = make_runs()[:2]
    summaries = [summarise(run) for run in runs]
    for one, values in zip(summaries, ((1.0, 1.0, 1.0), (4.0, 2.0, 3.0)), strict=True):
        ends = {"least": min(values), "most": max(values)}
        figure = figure_of(2.0, 0.0, 9.0, values=values) | ends
        figures = {"output_throughput": figure}
        one["replications"] = {"seeds": [4, 5, 6], "figures": figures}
    first, second = (run.label for run in runs)
    times_sign = "\N{MULTIPLICATION SIGN}"
    assert range_over_seeds(summaries) == [
        f"Tokens/s over the 3 seeds 4 to 6: 1 ({first}); 2 to 4, median 3 ({second}). "
        f"Ratios to {first}, seed by seed: "
        f"2.00{times_sign} to 4.00{times_sign}, median 3.00{times_sign}."
    ]


def test_ratios_over_seeds_need_a_base_and_one_tokenizer() -> None:
    def replicated(values: Sequence[float | None], tokenizer: str = "bytes") -> dict[str, Any]:
        figures = {"perplexity": {"values": values}, "switch_time_s": {"values": values}}
        seeds = list(range(len(values)))
        return {"tokenizers": [tokenizer], "replications": {"seeds": seeds, "figures": figures}}

    base = replicated([0.0, 2.0])
    assert ratios_over_seeds("perplexity", replicated([3.0, 3.0]), replicated([2.0, 4.0])) == (
        0.75,
        1.125,
        1.5,
    )
    # A seed without a ratio may be the one that matters.
    assert ratios_over_seeds("perplexity", replicated([1.0, 3.0]), base) is None
    assert ratios_over_seeds("perplexity", replicated([1.0, None]), replicated([1.0, 2.0])) is None
    assert ratios_over_seeds("perplexity", replicated([1.0, math.inf]), replicated([1, 2])) is None
    assert ratios_over_seeds("perplexity", replicated([1.0, 3.0], "words"), base) is None
    assert ratios_over_seeds("switch_time_s", replicated([1.0, 3.0]), base) is None
    assert ratios_over_seeds("perplexity", {}, base) is None


def test_text_of_users_is_escaped() -> None:
    """Titles, labels and reasons with markup are shown, never run."""
    evil = "</script><script>alert(1)</script>"
    run = make_run("helios", label=evil)
    scenario = run.scenario | {"name": evil, "question": evil, "notes": [evil]}
    run = replace(run, scenario=scenario, decisions=run.decisions.with_columns(reason=pl.lit(evil)))
    page = render([run], [summarise(run)])
    assert "<script>alert" not in page
    assert evil in text_of(page)


def test_the_page_is_the_same_each_time() -> None:
    """One run gives one page, byte for byte."""
    assert make_page(make_runs()) == make_page(make_runs())


def test_long_runs_stay_small() -> None:
    """Four policies with a long timeline on three replicas give a page under 8 MB."""
    runs = make_runs(num_requests=20_000, rate_per_s=2.0, num_replicas=3)
    assert min(run.timeline.height for run in runs) > 25_000
    page = make_page(runs)
    assert len(page.encode()) < 8_000_000
    for name, figure in figures_of(page).items():
        for trace in figure["data"]:
            if trace["type"] == "scatter" and trace["mode"] == "lines":
                assert len(trace["x"]) <= max(MAX_CURVE_POINTS, MAX_TIMELINE_POINTS), name


def test_thinned_timeline_keeps_averages_and_peaks() -> None:
    """Thinning keeps the energy under the power line and the highest queue."""
    run = make_run("vanilla", num_requests=6000, rate_per_s=4.0, tpot_s=0.1, slots=20)
    traces = {trace["name"]: trace for trace in timeline_figure(run, {"opt-6.7b": "@m1"})["data"]}
    assert run.timeline.height > 2 * MAX_TIMELINE_POINTS
    assert max(traces["waiting"]["y"]) == run.timeline["waiting"].max()
    power = np.array(traces["power"]["y"])
    mean_w = run.totals.energy_j / run.totals.end_s
    assert float(power.mean()) == pytest.approx(mean_w, rel=0.02)


def test_curves_keep_the_tail() -> None:
    """A thinned distribution still ends at its largest value and rises throughout."""
    values = np.exp(np.linspace(0.0, 5.0, 50_000))
    seconds, shares = cumulative_curve(values)
    assert len(seconds) <= MAX_CURVE_POINTS
    assert (seconds[-1], shares[-1]) == (values[-1], 1.0)
    assert np.all(np.diff(seconds) >= 0.0)
    assert np.all(np.diff(shares) > 0.0)
    assert cumulative_curve([]) == ([], [])


def test_segments_join_equal_neighbours() -> None:
    """Stretches of one model at one depth follow one another from start to end."""
    run = make_run("helios")
    parts = segments(run.timeline, 0, ("model", "depth"))
    assert parts["depth"].to_list() == [24, 6, 9, 12]
    assert parts["start_s"][0] == 0.0
    assert parts["end_s"][-1] == pytest.approx(run.totals.end_s)
    assert parts["start_s"][1:].to_list() == parts["end_s"][:-1].to_list()


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("written", [None, "", "opt-1.3b"])
def test_nothing_loaded_is_in_no_legend(written: str | None, num_replicas: int) -> None:
    """A timeline that begins without layers names the models loaded later, and no other."""
    run = make_run("vanilla", num_replicas=num_replicas)
    early = pl.col("time_s") < 5.0
    timeline = run.timeline.with_columns(
        model=pl.when(early).then(pl.lit(written, pl.String)).otherwise("model"),
        depth=pl.when(early).then(0).otherwise("depth"),
    )
    run = replace(run, timeline=timeline)
    colours = model_colours([run])
    assert list(colours) == ["opt-6.7b"]
    named = [trace["name"] for trace in timeline_figure(run, colours)["data"]]
    assert "opt-6.7b" in named
    assert not {"", "opt-1.3b"} & set(named)


def test_a_timeline_is_as_high_as_the_replicas_that_it_draws() -> None:
    runs = [make_run("vanilla", num_replicas=num) for num in (MAX_REPLICA_ROWS, 40)]
    heights = {timeline_figure(run, {"opt-6.7b": "@m1"})["layout"]["height"] for run in runs}
    assert len(heights) == 1


def test_exits_of_one_model_in_two_profiles_keep_their_layers() -> None:
    """Shares stand at the layer of the run that they are of, in either order of the runs."""
    run = make_run("vanilla")
    (name,) = run.totals.exit_layers
    totals = replace(run.totals, exit_layers={name: (8, 32)}, exit_counts={name: (30, 10)})
    fine = replace(run, totals=totals)
    totals = replace(run.totals, exit_layers={name: (16, 24, 32)}, exit_counts={name: (1, 1, 2)})
    coarse = replace(run, totals=totals)
    wanted = {8: (0.75, 0.0), 16: (0.0, 0.25), 24: (0.0, 0.25), 32: (0.25, 0.5)}
    for turned in (False, True):
        runs = [coarse, fine] if turned else [fine, coarse]
        found = {}
        for trace in exits_figure(runs, model_colours(runs))["data"]:
            if "hovertemplate" in trace:
                layer = re.search(r"layer (\d+) of 32", trace["hovertemplate"])
                assert layer is not None
                found[int(layer[1])] = tuple(trace["x"])
        assert found == {k: shares[::-1] if turned else shares for k, shares in wanted.items()}


def test_runs_of_one_name_are_told_apart() -> None:
    """Two runs of one policy get a number in tables and figures."""
    page = make_page([make_run("vanilla"), make_run("vanilla", tpot_s=0.02)])
    assert "vanilla (2)" in text_of(page)


def test_runs_are_told_apart_by_what_differs() -> None:
    """By their labels, else by profile or device, else by their folders."""
    same = {"profile": "a", "device": "A"}
    folders = ["x/vanilla", "y/vanilla"]
    assert labels_apart(["vanilla", "helios"], [same, same], folders) == ["vanilla", "helios"]
    alike = ["vanilla", "vanilla"]
    other = {"profile": "l40s", "device": "L40S"}
    assert labels_apart(alike, [same, other], folders) == ["vanilla on a", "vanilla on l40s"]
    board = {"profile": "a", "device": "B"}
    assert labels_apart(alike, [same, board], folders) == ["vanilla on A", "vanilla on B"]
    assert labels_apart(alike, [same, same], folders) == folders
    assert labels_apart(alike, [same, {}], folders) == folders


def test_runs_of_one_policy_are_called_runs() -> None:
    runs = [
        summary("vanilla on a", 100.0, 20.0, policy="vanilla", num_refused=1),
        summary("vanilla on l40s", 100.0, 10.0, policy="vanilla", num_refused=1),
    ]
    assert headline(runs, 100.0, 1).startswith("Both runs carry the load of 100 tokens/s; ")
    assert any(text.startswith("Every run refuses the same 1 req") for text in remarks(runs, 1))
    for one in runs:
        one["saturation"] = "overloaded"
    assert headline(runs).startswith("Neither run carries the whole load")


def test_runs_of_different_workloads_are_shown_unpaired() -> None:
    """A page of runs that met different requests says why it pairs none."""
    text = text_of(make_page([make_run(), make_run("helios", seed=2)]))
    assert "No paired differences" in text
    assert "Every policy met the same requests" not in text


def test_summaries_must_match_runs() -> None:
    """No run at all, or fewer summaries than runs, is an error."""
    with pytest.raises(InputError, match="0 runs"):
        render([], [])
    with pytest.raises(InputError, match="1 runs with 0 summaries"):
        render([make_run()], [])


def test_a_page_without_energy_slo_or_timeline_is_drawn() -> None:
    """What was not measured or asked is left out, not invented."""
    run = make_run()
    run = replace(
        run,
        timeline=run.timeline.clear(),
        decisions=run.decisions.clear(),
        totals=replace(run.totals, energy_j=float("nan")),
    )
    text = text_of(render([run], [summarise(run)]))
    assert "sets no SLO" in text
    assert "No timeline recorded" in text
    assert "Energy per output token J" not in text


def test_the_page_is_written_with_its_run(tmp_path: Path) -> None:
    """The report moves into place together with the run's files."""
    run = make_run()
    summary = summarise(run)
    write_page([run], [summary], tmp_path / "alone.html")
    folder = write_run(
        run, summary, tmp_path / "run", lambda at: write_page([run], [summary], at / REPORT_FILE)
    )
    assert (folder / REPORT_FILE).read_bytes() == (tmp_path / "alone.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.html", "run"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (number(None), "\N{EN DASH}"),
        (number(0.04251), "0.0425"),
        (number(1234.5), "1,234"),
        (number(12.345), "12.3"),
        (number(10.104, 4), "10.10"),
        (number(3.0), "3"),
        (times(1.3249), "1.32\N{MULTIPLICATION SIGN}"),
        (times(9.997), "10.0\N{MULTIPLICATION SIGN}"),
        (times(0.0004), "<.01\N{MULTIPLICATION SIGN}"),
        (times(None), ""),
        (span(0.05), "50 ms"),
        (span(90.0), "90 s"),
        (span(5400.0), "90 min"),
        (limits("ttft:p99<=450ms;e2e<=30s"), "TTFT p99 ≤ 450 ms, E2E ≤ 30 s"),
    ],
)
def test_numbers_read_well(said: str, expected: str) -> None:
    """Figures, ratios, durations and limits are written as people read them."""
    assert said == expected


def summary(label: str, tokens: float, tpot_ms: float, **more: Any) -> dict[str, Any]:
    """The few figures a headline needs."""
    return {
        "label": label,
        "output_throughput": tokens,
        "request_throughput": tokens / 100,
        "median_ttft_ms": 40.0,
        "median_tpot_ms": tpot_ms,
        "saturation": "stable",
        "num_refused": 0,
        "num_requests": 400,
        **more,
    }


@pytest.mark.parametrize(
    ("summaries", "expected"),
    [
        (
            [summary("vanilla", 100.0, 20.0), summary("helios", 132.0, 10.0)],
            "helios serves 1.32\N{MULTIPLICATION SIGN} the tokens of vanilla: 132 against 100 "
            "tokens/s.",
        ),
        (
            [summary("vanilla", 100.0, 20.0), summary("helios", 80.0, 10.0)],
            "vanilla serves the most tokens, 100 tokens/s; helios comes next with 80 "
            "(0.80\N{MULTIPLICATION SIGN}).",
        ),
        (
            [summary("vanilla", 100.0, 20.0), summary("helios", 100.5, 10.0)],
            "Both policies carry the load of 100 tokens/s; helios answers fastest, with a median "
            "TPOT of 10 ms, 0.50\N{MULTIPLICATION SIGN} that of vanilla (20 ms).",
        ),
        (
            [summary("vanilla", 100.0, 20.0), summary("helios", 100.0, 30.0)],
            "Both policies carry the load of 100 tokens/s, and none is faster than vanilla: "
            "median TPOT 20 ms.",
        ),
        (
            [
                summary("vanilla", 100.0, 20.0, request_goodput=0.1),
                summary("helios", 100.0, 20.0, request_goodput=4.0),
            ],
            "helios serves 4 requests/s within the SLO; vanilla only 0.1.",
        ),
        (
            [summary("vanilla", 100.0, 20.0)],
            "vanilla serves 100 tokens/s (1 requests/s) at a median TTFT of 40 ms and TPOT of "
            "20 ms; the system is stable.",
        ),
    ],
)
def test_headlines_say_who_carries_the_load(summaries: list[dict[str, Any]], expected: str) -> None:
    """The headline follows the figures: more load, the baseline ahead, or equal load but faster."""
    assert headline(summaries) == expected


@pytest.mark.parametrize(
    ("summaries", "expected"),
    [
        (
            [
                summary("vanilla", 300.0, 20.0, saturation="overloaded"),
                summary("helios", 301.0, 10.0, saturation="overloaded"),
            ],
            "Neither policy carries the whole load of 500 tokens/s offered: vanilla and helios are "
            "overloaded; they serve 300 to 301 tokens/s.",
        ),
        (
            [
                summary("vanilla", 300.0, 20.0, saturation="overloaded"),
                summary("ee-single", 300.0, 20.0, num_refused=4),
                summary("helios", 300.0, 10.0, saturation="overloaded", num_refused=4),
            ],
            "ee-single carries the load of 300 tokens/s (but for 4 of 400 requests); vanilla is "
            "overloaded and helios is overloaded and refuses 4 of 400 requests.",
        ),
        (
            [summary(name, 0.0, 1.0, num_refused=400) for name in ("vanilla", "helios")],
            "Neither policy carries the whole load of 500 tokens/s offered: vanilla and helios "
            "refuse every request; they serve 0 tokens/s.",
        ),
        (
            [
                summary("vanilla", 300.0, 20.0, saturation="overloaded"),
                summary("helios", 450.0, 10.0, saturation="overloaded"),
            ],
            "helios serves 1.50\N{MULTIPLICATION SIGN} the tokens of vanilla: 450 against 300 "
            "tokens/s; neither policy carries the whole load of 500 tokens/s offered.",
        ),
        (
            [
                summary("vanilla", 100.0, 20.0, saturation="overloaded"),
                summary("helios", 101.0, 10.0),
            ],
            "helios carries the load of 101 tokens/s; vanilla is overloaded.",
        ),
        (
            [
                summary("vanilla", 100.0, 20.0),
                summary("helios", 100.0, 30.0, saturation="backlogged"),
            ],
            "Both policies carry the load of 100 tokens/s (helios with a backlog), and none is "
            "faster than vanilla: median TPOT 20 ms.",
        ),
        (
            [
                summary("vanilla", 100.0, 20.0, saturation="backlogged"),
                summary("helios", 100.0, 30.0, saturation="backlogged", num_refused=4),
            ],
            "Both policies carry the load of 100 tokens/s (all with a backlog and helios but for 4 "
            "of 400 requests), and none is faster than vanilla: median TPOT 20 ms.",
        ),
        (
            [
                summary("vanilla", 300.0, 20.0, saturation="overloaded"),
                summary("helios", 303.0, 20.0, saturation="backlogged", num_refused=4),
            ],
            "helios carries the load of 303 tokens/s (with a backlog and but for 4 of 400 "
            "requests); vanilla is overloaded.",
        ),
        (
            [summary("vanilla", 0.0, 0.0, num_refused=400)],
            "vanilla refuses every one of 400 requests.",
        ),
        (
            [summary("vanilla", 300.0, 20.0, saturation="overloaded", median_ttft_ms=None)],
            "vanilla serves 300 tokens/s (3 requests/s) at a median TPOT of 20 ms; the system is "
            "overloaded by the 500 tokens/s offered.",
        ),
    ],
)
def test_headlines_consult_the_verdict_of_each_run(
    summaries: list[dict[str, Any]], expected: str
) -> None:
    """Nobody carries a load that overloads it or that it all refuses, however alike all are."""
    assert headline(summaries, 500.0) == expected


def test_a_request_that_nobody_can_take_is_a_remark_and_no_overload() -> None:
    """What every policy refuses tells none from another; what one alone refuses is said of it."""
    runs = [
        summary("vanilla", 100.0, 20.0, num_refused=1),
        summary("helios", 100.0, 10.0, num_refused=1),
    ]
    assert headline(runs, 100.0, 1).startswith("Both policies carry the load of 100 tokens/s; ")
    alike = "Every policy refuses the same 1 request of 400, longer than the context or than memory"
    assert [text for text in remarks(runs, 1) if "refuse" in text.lower()] == [
        f"{alike} holds; no SLO forgives a refusal."
    ]
    runs[1]["num_refused"] = 3
    assert "carry the load of 100 tokens/s (helios but for 3 of 400 requests); " in (
        headline(runs, 100.0, 1)
    )
    assert remarks(runs, 1)[-1] == "Refused requests, which no SLO forgives: helios 3."


@pytest.mark.parametrize("num_refused", [0, 3])
def test_the_page_finds_the_requests_that_every_run_refuses(num_refused: int) -> None:
    settings: dict[str, Any] = {"num_requests": 600, "rate_per_s": 2.0, "num_refused": num_refused}
    text = text_of(make_page([make_run("vanilla", **settings), make_run("helios", **settings)]))
    assert ("Every policy refuses the same 3 requests of 600" in text) == bool(num_refused)
    assert "carries the whole load" not in text


def test_the_best_two_are_compared_where_the_first_is_the_best() -> None:
    """Not the policy with the lowest TPOT, which an overloaded run of one row at a time has."""
    runs = [
        summary("vanilla", 1000.0, 38.0, request_goodput=5.3),
        summary("wait", 999.0, 41.0, request_goodput=4.97),
        summary("rebatch", 800.0, 70.0, request_goodput=0.2, saturation="overloaded"),
        summary("solo", 48.0, 21.0, request_goodput=0.1, saturation="overloaded"),
    ]
    assert remarks(runs)[0].startswith("Latency of wait against vanilla: ")


def test_of_runs_that_serve_alike_the_fastest_that_keeps_up_is_compared() -> None:
    runs = [
        summary("vanilla", 100.0, 20.0),
        summary("ee-single", 100.0, 5.0, saturation="overloaded"),
        summary("static-depth", 100.0, 9.0),
        summary("helios", 100.2, 10.0),
    ]
    assert remarks(runs)[0].startswith("Latency of static-depth against vanilla: ")


@pytest.mark.parametrize(
    ("summaries", "expected"),
    [
        (
            [
                summary("vanilla", 100.0, 20.0, request_goodput=3.931),
                summary("static-depth", 60.0, 20.0, request_goodput=2.0),
                summary("helios", 100.0, 19.0, request_goodput=3.934, p99_ttft_ms=70.0),
            ],
            "vanilla and helios are level at 3.93 requests/s within the SLO and differ most in "
            "median TPOT: 19 ms of helios against 20 ms of vanilla.",
        ),
        (
            [
                summary("vanilla", 50.0, 20.0),
                summary("ee-single", 100.0, 20.0, energy_per_output_token=3000.0),
                summary("helios", 100.4, 19.0, energy_per_output_token=1500.0),
            ],
            "ee-single and helios are level at 100 tokens/s (2.01\N{MULTIPLICATION SIGN} the "
            "tokens of vanilla) and differ most in energy per output token: 1.50 J of helios "
            "against 3 J of ee-single.",
        ),
        (
            [summary("vanilla", 100.0, 20.0), summary("helios", 100.0, 20.01)],
            "Both policies carry the load of 100 tokens/s.",
        ),
        (
            [
                summary("vanilla", 100.0, 20.0, p99_ttft_ms=900.0),
                summary("helios", 100.0, 20.01, p99_ttft_ms=300.0),
            ],
            "Both policies carry the load of 100 tokens/s and differ most in p99 TTFT: 300 ms of "
            "helios against 900 ms of vanilla.",
        ),
        (
            [
                summary("vanilla", 100.0, 20.0),
                summary("static-depth", 100.0, 10.0),
                summary("helios", 100.0, 10.001),
            ],
            "All 3 policies carry the load of 100 tokens/s; static-depth and helios answer "
            "fastest, with a median TPOT of 10 ms, 0.50\N{MULTIPLICATION SIGN} that of vanilla "
            "(20 ms).",
        ),
    ],
)
def test_headlines_name_no_winner_by_rounding(
    summaries: list[dict[str, Any]], expected: str
) -> None:
    """Where figures read the same, runs are level, and what tells them apart is named."""
    assert headline(summaries) == expected


def drained(label: str, drain_s: float, tpot_ms: float, **more: Any) -> dict[str, Any]:
    """40,000 tokens of 400 requests that arrive within 400 s, and the drain behind them."""
    duration = 400.0 + drain_s
    timed = {"duration": duration, "drain_after_arrivals_s": drain_s, "total_output_tokens": 40_000}
    met = {"slo_attainment": 0.99, "request_goodput": 396 / duration}
    return summary(label, 40_000 / duration, tpot_ms, **timed, **met, **more)


def test_a_drain_is_no_throughput() -> None:
    """100 tokens/s are asked for and served, whether the last answers take 4 s or 80 s."""
    slow, quick = drained("vanilla", 80.0, 20.0), drained("helios", 4.0, 10.0)
    fastest = (
        "helios answers fastest, with a median TPOT of 10 ms, 0.50\N{MULTIPLICATION SIGN} that of "
        "vanilla (20 ms)."
    )
    within = ", with 99 % of the requests within the SLO"
    assert headline([slow, quick], 100.0) == (
        f"Both policies carry the load of 100 tokens/s offered{within}; {fastest}"
    )
    assert headline([slow, quick]) == f"Both policies carry the load{within}; {fastest}"
    no_slo = [one | {"request_goodput": None} for one in (slow, quick)]
    assert headline(no_slo, 100.0) == (
        f"Both policies carry the load of 100 tokens/s offered; {fastest}"
    )
    late = quick | {"slo_attainment": 0.5, "request_goodput": 200 / 404}
    assert headline([slow, late], 100.0).startswith("vanilla serves the most goodput, ")


def test_those_who_carry_a_load_alike_share_the_lead_over_one_that_does_not() -> None:
    poor = {"saturation": "overloaded", "slo_attainment": 0.1, "request_goodput": 0.1}
    runs = [
        drained("vanilla", 200.0, 40.0) | poor,
        drained("static", 80.0, 20.0),
        drained("helios", 4.0, 10.0),
    ]
    assert headline(runs, 100.0) == (
        "static and helios carry the load alike, at up to 0.98 requests/s within the SLO "
        "(9.80\N{MULTIPLICATION SIGN} the goodput of vanilla) and differ most in median TPOT: "
        "10 ms of helios against 20 ms of static."
    )
    assert remarks(runs)[0].startswith("Latency of helios against vanilla: ")


def test_who_serves_more_than_one_that_shares_the_lead_shares_it_too() -> None:
    """The run in the middle is overloaded, so that the load is not carried by all alike."""
    poor = {"saturation": "overloaded", "slo_attainment": 0.1, "request_goodput": 0.1}
    middle = {"saturation": "overloaded", "slo_attainment": 0.95, "request_goodput": 0.9}
    runs = [
        drained("vanilla", 200.0, 40.0) | poor,
        drained("static", 80.0, 20.0),
        drained("switch-only", 80.0, 20.0) | middle,
        drained("helios", 4.0, 10.0),
    ]
    assert headline(runs, 100.0).startswith(
        "static, switch-only and helios are level at up to 0.98 requests/s within the SLO "
    )


def test_no_sentence_has_an_empty_value() -> None:
    """What a policy that refuses everything has no figure for is left out of the remarks."""
    nothing = {"median_ttft_ms": None, "median_tpot_ms": None, "num_refused": 400}
    runs = [
        summary("vanilla", 0.0, 0.0, **nothing),
        summary("helios", 10.0, 9.0, energy_per_output_token=900.0, slo="ttft:500"),
    ]
    for pair in (runs, runs[::-1], [runs[0], runs[0]]):
        said = [headline(pair), *remarks(pair)]
        assert not [text for text in said if "\N{EN DASH}" in text]
    assert "Latency" not in " ".join(remarks(runs))


def test_the_page_says_what_is_offered_to_policies_that_do_not_carry_it() -> None:
    """Of an overloaded run the headline sets the tokens asked for each second beside the served."""
    run = make_run(num_requests=600, rate_per_s=8.0, slots=4, tpot_s=0.02)
    asked = float(run.requests["output_tokens"].sum())
    offered = number(asked / float(np.ptp(run.requests["arrival_s"].to_numpy())))
    assert summarise(run)["saturation"] == "overloaded"
    assert f"overloaded by the {offered} tokens/s offered." in text_of(make_page([run]))
    closed = text_of(make_page([replace(run, closed_loop=True)]))
    assert "offered" not in closed.partition("Definitions")[0]


def test_limits_and_ticks_of_shares_have_all_their_digits() -> None:
    """A limit of 1,234.5 ms is not one of 1,234, nor is 0.5 % of the KV blocks 1 %."""
    run = make_run()
    layout = latency_figure([columns_of(run)], ["vanilla"], parse_slo("tpot:1234.5"))
    assert [one["text"] for one in layout["layout"]["annotations"]] == ["limit 1234.5 ms"]
    timeline = timeline_figure(run, model_colours([run]))["layout"]
    formats = [timeline[key].get("tickformat") for key in timeline if key.startswith("yaxis")]
    assert [one for one in formats if one] == [".2~%", ".2~%"]


@pytest.mark.parametrize(("late_s", "unit", "last"), [(0.0, "ms", None), (900.0, "s", "1,200")])
def test_latencies_of_minutes_are_drawn_in_seconds(
    late_s: float, unit: str, last: str | None
) -> None:
    run = make_run()
    late = [pl.col(name) + late_s for name in ("first_token_s", "finished_s")]
    run = replace(run, requests=run.requests.with_columns(late))
    axis = latency_figure([columns_of(run)], ["vanilla"], None)["layout"]["xaxis"]
    assert axis["title"]["text"] == f"TTFT ({unit})"
    assert last is None or axis["ticktext"][-1] == last


def test_remarks_name_the_price() -> None:
    """Lost agreement, overload and refusals are said beside the headline."""
    said = " ".join(
        remarks(
            [
                summary("vanilla", 100.0, 20.0, saturation="overloaded", perplexity=10.0),
                summary("helios", 150.0, 10.0, agreement=0.92, perplexity=10.5, num_refused=3),
            ]
        )
    )
    assert "92 % of the tokens of helios" in said
    assert "perplexity 10.50 against 10" in said
    assert "Overloaded: vanilla." in said
    assert "helios 3" in said


def test_a_perplexity_stands_alone_where_the_other_counts_other_tokens() -> None:
    runs = [
        summary("vanilla", 100.0, 20.0, perplexity=10.0, tokenizers=["llama2"]),
        summary("helios", 150.0, 10.0, agreement=0.92, perplexity=10.5, tokenizers=["llama3"]),
    ]
    assert "perplexity 10.50." in " ".join(remarks(runs))


def test_one_run_is_told_the_limits_that_it_is_judged_by() -> None:
    """Several are told them with what was met; runs of different limits are told apart."""
    run = summary("vanilla", 100.0, 20.0, slo="ttft<2000ms;tpot:p95<50ms", slo_attainment=0.5)
    assert remarks([run])[0] == "SLO: TTFT ≤ 2 s, TPOT p95 ≤ 50 ms."
    assert not [text for text in remarks([summary("vanilla", 100.0, 20.0)]) if "SLO" in text]
    other = run | {"label": "helios", "slo": "ttft<1s"}
    assert judged_by([run, other]) == (
        "SLO: TTFT ≤ 2 s, TPOT p95 ≤ 50 ms (vanilla); TTFT ≤ 1 s (helios)."
    )


def test_what_meets_other_limits_is_not_set_against_each_other() -> None:
    runs = make_runs()
    strict, loose = (parse_slo(text) for text in ("ttft:100", "ttft:500 tpot:24"))
    judged = [strict, *([loose] * (len(runs) - 1))]
    summaries = [summarise(run, slo) for run, slo in zip(runs, judged, strict=True)]
    (said,) = (text for text in remarks(summaries) if "SLO" in text)
    met = number(100 * summaries[-1]["slo_attainment"])
    assert said == (
        f"SLO of helios (TTFT ≤ 500 ms, TPOT ≤ 24 ms): met by {met} % of the requests sent."
    )
    assert "goodput" not in headline(summaries) and "SLO" not in headline(summaries)
    page = render(runs, summaries)
    labels = "ee-single, static-depth, helios"
    assert f"TTFT ≤ 100 ms (vanilla); TTFT ≤ 500 ms, TPOT ≤ 24 ms ({labels})." in page
    assert "Each run is judged by its own limits." in page
    assert "thin vertical lines are the limits" not in page
    alike = render(runs, [summarise(run, loose) for run in runs])
    assert "Each run is judged by its own limits." not in alike
    assert "thin vertical lines are the limits" in alike


def test_remarks_say_how_many_requests_were_shortened_or_left_out_and_why() -> None:
    """Once where it holds for all runs, else with the runs it holds for."""
    plain = summary("vanilla", 100.0, 20.0, num_shortened=0, num_dropped=0)
    cut = summary("helios", 100.0, 20.0, num_shortened=62, num_dropped=1)
    both = "62 of 400 requests"
    why = (
        ', longer than the context (workload.over_context = "truncate"); figures are of what is '
        "left of them."
    )
    said = remarks([cut, cut | {"label": "again"}])
    assert f"Shortened: {both}{why}" in said
    assert (
        "Left out of the trace: 1 row beside 400 requests, since a row without output tokens or "
        "without an arrival is no request (num_dropped)."
    ) in said
    assert f"Shortened: {both} (helios){why}" in remarks([plain, cut])
    assert not [one for one in remarks([plain]) if "Shortened" in one or "Left out" in one]


def missing(percent: float) -> dict[str, Any]:
    """What a summary has of an SLO of which one limit is missed and one passed."""
    limits = [
        {"limit": "tpot:p99<=43ms", "metric": "tpot", "percentile": 99, "passed": False},
        {"limit": "ttft:p90<=1000ms", "metric": "ttft", "percentile": 90, "passed": True},
        {"limit": "itl:p99<=90ms", "metric": "itl", "percentile": 99, "passed": False},
    ]
    judged = [limit | {"attainment": percent / 100.0} for limit in limits]
    return {"slo": "tpot:p99<43ms", "slo_passed": False, "slo_limits": judged}


def test_a_percentile_that_is_missed_is_part_of_the_answer() -> None:
    """A run that carries its load may miss its SLO; an overloaded one says so already."""
    most = "\N{LESS-THAN OR EQUAL TO}"
    missed = summary("vanilla", 100.0, 20.0, **missing(98.97))
    passed = summary("helios", 101.0, 20.0, slo="tpot:p99<43ms", slo_passed=True)
    assert slo_verdicts([missed, passed]) == [
        f"SLO missed by vanilla (TPOT p99 {most} 43 ms: met by 98.97 % and ITL p99 {most} 90 ms); "
        "passed by helios."
    ]
    assert slo_verdicts([passed]) == ["SLO passed by helios."]
    assert slo_verdicts([summary("never", 100.0, 20.0)]) == []
    assert headline([passed, missed]).endswith("; vanilla misses the SLO.")
    assert headline([missed, missed | {"label": "again"}]).endswith("; both miss the SLO.")
    drowned = missed | {"saturation": "overloaded"}
    assert "SLO" not in headline([passed, drowned])
    assert "SLO" not in headline([passed, passed])
    alone = headline([missed | {"slo_attainment": 0.977}])
    assert "; 97.7 % of the requests sent meet the SLO, which is missed; " in alone


def test_a_start_that_many_requests_waited_for_is_told_with_the_remedy() -> None:
    """From one in 200 on, up to half; the warm-up that is named fits into the run."""
    met = {"num_measured": 400, "start_s": 9.8, "duration": 100.0}
    one = summary("vanilla", 100.0, 20.0, num_before_start=2, **met)
    few = summary("helios", 100.0, 20.0, num_before_start=1, **met)
    (said,) = waited_for_start([one, few, summary("never", 100.0, 20.0)])
    assert said == (
        "Start: 2 of 400 requests (vanilla) came in the first 9.80 s while weights were on their "
        "way; their wait counts in every latency, and measure.warmup_s = 20 leaves the start out."
    )
    assert waited_for_start([few]) == waited_for_start([one | {"num_before_start": 201}]) == []
    (said,) = waited_for_start([one | {"duration": 39.0}])
    assert "a longer run makes less of it" in said


def test_remarks_say_that_users_rest_for_a_part_of_a_closed_loop() -> None:
    """From 95 % of them on they are as good as all."""
    enough = summary("vanilla", 100.0, 20.0, num_users=40, mean_active_users=38.0)
    few = summary("helios", 100.0, 20.0, num_users=40, mean_active_users=37.9)
    open_loop = summary("never", 100.0, 20.0)
    assert not [one for one in remarks([enough, open_loop]) if "Active" in one]
    (said,) = [one for one in remarks([enough, few, open_loop]) if "Active" in one]
    assert said.startswith("Active on average: 37.9 of 40 users (helios). Users rest before ")
    assert said.endswith("give more requests (workload.num_requests).")


def test_one_limit_is_drawn_once_and_of_several_their_meeting_too() -> None:
    runs = make_runs()
    for text, rows in (
        ("ttft:500", ["TTFT"]),
        ("ttft:500 tpot:24", ["every limit", "TTFT", "TPOT"]),
    ):
        summaries = [summarise(run, parse_slo(text)) for run in runs]
        for summary, bars in zip(summaries, attainment_figure(summaries)["data"], strict=True):
            assert bars["y"] == rows
            assert bars["x"][0] == summary["slo_attainment"]
            assert len(bars["x"]) == len(bars["text"]) == len(rows)


def test_the_top_says_of_which_models_and_device_the_figures_are() -> None:
    """A policy that keeps to one of several candidates is named with it."""
    a100 = {"device": "NVIDIA A100", "device_kind": "GPU", "profile": "pair"}
    fleet = {"num_replicas": 2, "num_gpus": 2}
    both = {"exit_histogram": {"small": {}, "large": {}}, **fleet}
    runs = [
        summary("vanilla", 1.0, 1.0, depth_share={"large@32": 1.0}, **both),
        summary("solo", 1.0, 1.0, depth_share={"large@9": 0.5, "large@32": 0.5}, **both),
        summary("helios", 1.0, 1.0, depth_share={"large@9": 0.5, "small@6": 0.5}, **both),
    ]
    device = "Device: NVIDIA A100, 2 replicas (2 GPUs), profile pair."
    assert serving([a100] * 3, runs) == [
        device,
        "Serving: large of 2 candidates (vanilla, solo); small and large (helios).",
    ]
    assert serving([a100] * 2, runs[:2]) == [device, "Serving: large of 2 candidates."]
    assert serving([a100, {"device": "cpu (x86_64)"}], runs[:2])[0] == (
        "Device: NVIDIA A100, 2 replicas (2 GPUs), profile pair (vanilla); "
        "cpu (x86_64), 2 replicas (2 processors) (solo)."
    )
    assert serving([{}], [summary("vanilla", 1.0, 1.0, **fleet)]) == [
        "Device: 2 replicas (2 GPUs)."
    ]
    run = make_run()
    assert "Device: NVIDIA" in text_of(make_page([replace(run, environment=a100)]))


def test_profiles_without_a_measured_number_are_named_for_what_they_are_worth() -> None:
    """Grades that no number has are left out; of what is measured nothing more is said."""
    read = {"measured": 110, "published": 0, "derived": 39, "assumed": 3, "unavailable": 45}
    told = {"measured": 0, "published": 2, "derived": 0, "assumed": 1}
    of_read = "110 measured, 39 derived, 3 assumed and 45 unavailable numbers"
    of_told = "2 published and 1 assumed numbers"
    end = "is measured: read ratios between fleets, not absolute figures."
    assert worth({"a": read}, "fleets") == f"Profile a has {of_read}."
    assert worth({"b": told}, "fleets") == f"Profile b has {of_told}. None {end}"
    assert worth({"a": read, "b": told}, "fleets") == (
        f"Profiles: a has {of_read}; b has {of_told}. None of b {end}"
    )


def test_large_batches_on_profiles_that_nobody_measured_ask_for_a_reserve() -> None:
    read, told = {"a": {"measured": 3}}, {"b": {"measured": 0, "published": 2}}
    batches = mean_batches(
        [
            summary("vanilla", 1.0, 1.0, mean_batch_size=160.4),
            summary("helios", 1.0, 1.0, mean_batch_size=63.9),
            summary("idle", 1.0, 1.0, mean_batch_size=None),
        ]
    )
    assert batches == {"vanilla": 160.4, "helios": 63.9, "idle": 0.0}
    (said,) = large_batches(told, batches, [])
    assert said.startswith("Up to 160 requests decode together on average (vanilla). Profiles")
    (said,) = large_batches(
        told, dict.fromkeys("abcd", 64.0), ["exits.stickiness = 0.5"], "At night"
    )
    assert said.startswith("At night, up to 64 requests decode together on average. Profiles")
    assert large_batches(told, {"helios": 63.9}, []) == large_batches({"c": {}}, batches, []) == []
    assert large_batches(read | told, batches, []) == []
    paid = taken_otherwise(
        [{}, {"assumed": ["models.m.coefficients.decode.fixed_s_per_row = 5e-05 (profile: 0)"]}]
    )
    assert large_batches(told, batches, paid) == []


def test_where_a_published_floor_bounds_the_time_other_ratios_of_other_engines_are_said() -> None:
    read, told = {"a": {"measured": 3}}, {"b": {"measured": 0, "published": 2}}
    slow = summary("vanilla", 1.0, 1.0, regime={"launch": 0.9, "memory": 0.1, "compute": 0.0})
    fast = summary("helios", 1.0, 1.0, regime={"launch": 0.4, "memory": 0.6, "compute": 0.0})
    (said,) = launch_bound(told, [slow, fast])
    assert said.startswith("Launching kernels bounds most of the busy time of vanilla. An engine")
    assert "busy time. An" in launch_bound(told, [slow])[0]
    many = [{"label": f"fleet {n}", "regime.launch": 0.6} for n in range(4)]
    (said,) = launch_bound(told, [*many, fast], "fleets")
    assert "busy time of 4 of the 5 fleets. An" in said
    assert "ratios between fleets change" in said
    assert launch_bound(told, [slow], when="At night")[0].startswith("At night, launching kernels")
    assert launch_bound(told, [fast]) == launch_bound(told, [summary("vanilla", 1.0, 1.0)]) == []
    assert launch_bound(read, [slow]) == launch_bound({"c": {}}, [slow]) == []


def test_log_ticks_are_round_and_few() -> None:
    """A logarithmic axis has round ticks, fewer a decade the wider it is."""
    assert log_ticks(7.0, 10.0) == [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0]
    assert log_ticks(8.0, 25.0) == [7.0, 10.0, 15.0, 20.0, 30.0]
    assert log_ticks(1.0, 100.0) == [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    assert log_ticks(1.0, 1e6) == [10.0**k for k in range(7)]


CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed"
)

Open = Callable[..., tuple[str, str]]


@pytest.fixture
def open_page(tmp_path: Path) -> Open:
    """Opens a page in a headless browser; gives the document after its scripts, and the log."""

    def opened(page: str, dark: bool = False, width: int = 1280) -> tuple[str, str]:
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        assert CHROMIUM is not None
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--no-first-run",
                f"--user-data-dir={tmp_path / 'browser'}",
                f"--window-size={width},900",
                "--enable-logging=stderr",
                "--v=0",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, "\n".join(console)

    return opened


@pytest.mark.browser
@in_chromium
@pytest.mark.parametrize(
    ("dark", "ink"), [(False, "rgb(32, 36, 42)"), (True, "rgb(231, 228, 221)")]
)
def test_the_page_opens_in_both_themes_without_a_complaint(
    dark: bool, ink: str, open_page: Open
) -> None:
    """Every visible figure is drawn in the theme's ink, with no error, no request, no message."""
    page = make_page(make_runs(num_refused=2))
    document, console = open_page(page, dark)
    assert "data-errors" not in document[:2000]
    assert 'data-ready="5"' in document[:2000]
    assert console == ""
    assert document.count('class="main-svg"') >= 10
    assert f"fill: {ink}" in document


@pytest.mark.browser
@in_chromium
def test_choosing_a_policy_and_changing_the_theme_redraw(open_page: Open) -> None:
    """The page answers to its controls: another timeline is drawn, and new colours are taken."""
    listen = (
        "<script>window.matchMedia = () => ({ matches: false, addListener() {}, "
        "addEventListener: (_, changed) => { window.themeChanged = changed; } });</script>"
    )
    act = (
        "<script>const waiting = setInterval(() => {"
        "if (!document.documentElement.dataset.ready) return; clearInterval(waiting);"
        "document.querySelector('.tabs input[value=pane1]').click();"
        "document.documentElement.style.setProperty('--ink', '#010203'); window.themeChanged();"
        "}, 50);</script>"
    )
    page = make_page(make_runs())
    page = page.replace("<style>", f"{listen}<style>", 1).replace("</body>", f"{act}</body>")
    document, console = open_page(page)
    assert "data-errors" not in document[:2000]
    assert console == ""
    assert re.search(r'<div id="pane1" data-tabs="timeline">', document)
    assert re.search(r'<div id="pane3" data-tabs="timeline" hidden="">', document)
    chosen = document[document.index('id="timeline1"') : document.index('id="pane2"')]
    assert "main-svg" in chosen
    assert "fill: rgb(1, 2, 3)" in chosen


@pytest.mark.browser
@in_chromium
@pytest.mark.parametrize(("num", "fits"), [(5, True), (7, True), (9, False)])
def test_seven_policies_fit_the_page_and_more_cast_a_shadow(
    num: int, fits: bool, open_page: Open
) -> None:
    """No column of the table lies outside its box, unless a shadow at the edge says so."""
    measure = (
        "<script>const box = document.querySelector('.panel.scroll');"
        "document.documentElement.dataset.beyond = box.scrollWidth - box.clientWidth;"
        "document.documentElement.dataset.back = getComputedStyle(box).backgroundAttachment;"
        "</script>"
    )
    runs = [make_run("vanilla", label=f"policy {place}", num_requests=50) for place in range(num)]
    document, _ = open_page(make_page(runs).replace("</body>", f"{measure}</body>"))
    beyond = re.search(r'data-beyond="(\d+)"', document[:2000])
    assert beyond is not None
    assert (int(beyond[1]) == 0) is fits
    assert 'data-back="local, local, scroll, scroll' in document[:2000]


@pytest.mark.browser
@in_chromium
@pytest.mark.parametrize(("width", "columns"), [(1280, 3), (500, 1)])
def test_panels_beside_one_another_come_in_one_column_where_the_page_is_narrow(
    width: int, columns: int, open_page: Open
) -> None:
    """Of three latencies, which share a y axis, and of four settings, which do not."""
    varied = [
        Sensitivity(name, 2, (1, 2), (0.5, 0.7), (False, True)) for name in ("a", "b", "c", "d")
    ]
    columns_each = [columns_of(run, 0.0, 20) for run in make_runs()[:2]]
    shared = latency_figure(columns_each, ["one", "two"], SLO)
    own = sensitivity_figure(varied, "J")
    drawn: dict[str, Any] = {}
    places = add_figure(drawn, "shared", shared, "", "") + add_figure(drawn, "own", own, "", "")
    tell = (
        "<script>const waiting = setInterval(() => {"
        "if (!document.documentElement.dataset.ready) return; clearInterval(waiting);"
        "const told = [...document.querySelectorAll('.plot')].map((plot) => {"
        "const layout = plot._fullLayout; return layout._subplots.cartesian.map((name) => {"
        "const { xaxis, yaxis } = layout._plots[name];"
        "return [xaxis._offset, yaxis._offset, xaxis._length, yaxis._length].map(Math.round); });"
        "}); document.documentElement.dataset.told = JSON.stringify(told);}, 50);</script>"
    )
    page = document("narrow", [places], drawn).replace("</body>", f"{tell}</body>")
    shown, console = open_page(page, width=width)
    assert "data-errors" not in shown[:2000]
    assert console == ""
    told = re.search(r'data-told="([^"]*)"', shown[:3000])
    assert told is not None
    for panels, num in zip(json.loads(told[1]), (3, 4), strict=True):
        assert len(panels) == num
        assert len({left for left, *_ in panels}) == columns
        assert all(height > 80 for *_, height in panels)
        for (left, top, across, down), (left_2, top_2, *_) in itertools.pairwise(sorted(panels)):
            assert left + across < left_2 or top + down < top_2


@pytest.mark.browser
@in_chromium
@pytest.mark.parametrize(
    ("spoiled", "says"),
    [
        ('<img src="http://127.0.0.1:9/x.png">', "blocked"),
        ("<script>nonsense();</script>", "nonsense"),
    ],
)
def test_the_browser_check_would_notice(spoiled: str, says: str, open_page: Open) -> None:
    """A request or an error on the page is seen by the check that finds none."""
    page = make_page([make_run()]).replace("</main>", f"{spoiled}</main>")
    document, console = open_page(page)
    assert "data-errors" in document[:2000]
    assert says in document[:2000]
    assert console != ""
