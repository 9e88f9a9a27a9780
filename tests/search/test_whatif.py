"""A cell of a grid, answered by pencil figures."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import pytest

from helios_sim.errors import InputError
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile
from helios_sim.scenario import load_scenario
from helios_sim.search.commands import whatif
from helios_sim.search.drawings import MAX_LABELS, cells_figure
from helios_sim.search.means import mean_figures
from helios_sim.search.page import whatif_page
from helios_sim.search.studies import Outcome
from helios_sim.search.tables import whatif_best, whatif_rows
from helios_sim.search.whatif import (
    GOODPUT,
    Cell,
    in_short,
    leaders,
    short_keys,
    short_names,
    whatif_studies,
)
from helios_sim.search.whatif_words import whatif_answer, whatif_remarks
from tests.search.asking import inline, write


@pytest.mark.parametrize(
    ("saturations", "told"),
    [
        (["stable", "stable", "stable"], "stable"),
        (["stable", "backlogged", "stable"], "backlogged"),
        (["backlogged", "overloaded", "stable"], "overloaded"),
    ],
)
def test_a_cell_is_as_saturated_as_the_worst_of_its_seeds(
    tmp_path: Path, saturations: list[str], told: str
) -> None:
    """Each replication has a seed of its own, and the figures are their means."""
    base = load_scenario(write(tmp_path))
    (study,) = whatif_studies(base, tmp_path, "x.toml", base.policy, {}, 3)
    points = next(study.steps)
    assert [point.scenario.seed for point in points] == [base.seed, base.seed + 1, base.seed + 2]
    figures: list[Outcome] = [
        {"summary": {"saturation": one, "mean_ttft_ms": 10.0 * place}}
        for place, one in enumerate(saturations)
    ]
    with pytest.raises(StopIteration) as end:
        study.steps.send(figures)
    cell: Cell = end.value.value
    assert cell.saturation == told
    assert cell.means is not None
    assert cell.means["mean_ttft_ms"] == 10.0


def cell(batching: str, goodputs: list[float], ttft_ms: float, agreement: float = 1.0) -> Cell:
    """A cell of so many runs, which differ in goodput alone."""
    runs = tuple({"request_goodput": one, "p99_ttft_ms": ttft_ms} for one in goodputs)
    means = {
        "request_goodput": sum(goodputs) / len(goodputs),
        "p99_ttft_ms": ttft_ms,
        "agreement": agreement,
        "slo_attainment": 0.5,
        "output_throughput": 100.0,
    }
    values = {"policy.model": "opt-1.3b", "serving.batching": batching}
    return Cell(values, "vanilla", means, "stable", runs=runs)


def test_a_setting_is_said_in_short_where_that_tells_all_of_it() -> None:
    values = (2e10, 123456789.0, 0.768448, 4, "filled")
    assert [in_short(one) for one in values] == ["2e+10", "123456789.0", "0.768448", "4", "filled"]
    assert Cell({"loading.host.bytes_per_s": 2e10}, "helios").name == "helios: bytes_per_s 2e+10"


def test_values_that_are_tables_are_told_as_toml_by_what_differs() -> None:
    values: list[object] = [
        {"kind": "lognormal", "p50_tokens": 250, "max_tokens": 1800},
        {"kind": "lognormal", "p50_tokens": 500, "max_tokens": 1800},
    ]
    key = "workload.prompt"
    cells = [Cell({key: one}, "vanilla", {}) for one in values]
    assert short_names(cells) == ["prompt {p50_tokens=250}", "prompt {p50_tokens=500}"]
    assert [row[1] for row in whatif_rows(cells)[1]] == ["{p50_tokens=250}", "{p50_tokens=500}"]
    # Neither a table with nothing of its own nor one alone is left empty.
    cells = [*cells, Cell({key: {"kind": "lognormal", "max_tokens": 1800}}, "vanilla", {})]
    assert short_names(cells)[2] == "prompt {kind=lognormal, max_tokens=1800}"
    assert [row[1] for row in whatif_rows(cells[2:])[1]] == ["{kind=lognormal, max_tokens=1800}"]
    assert cells[0].name == "vanilla: prompt {kind=lognormal, p50_tokens=250, max_tokens=1800}"
    assert (in_short(["a", True]), in_short({"a": [1.5]})) == ("[a, true]", "{a=[1.5]}")


def test_the_conclusion_names_the_best_cell_of_each_figure_and_who_is_level_with_it() -> None:
    """Goodputs differ by 0.1, 0.3 and -0.1 seed by seed: 0.1 with an interval of +-0.5."""
    cells = [
        cell("static", [1.0, 1.0, 1.0], 90.0),
        cell("chunked", [5.0, 6.0, 7.0], 20.0),
        cell("continuous", [4.9, 5.7, 7.1], 30.0),
    ]
    assert whatif_answer(cells, 3) == [
        "Level at the top in goodput (6 requests/s): batching chunked and batching continuous.",
        "Best in TTFT p99 (20 ms): batching chunked.",
    ]
    # Columns: policy, model, batching, tok/s, goodput, SLO met, TTFT.
    assert whatif_best(cells) == {(1, 4), (2, 4), (1, 6)}


def test_seeds_of_a_cell_that_lie_far_apart_are_told(tmp_path: Path) -> None:
    """Twice the tokens with another seed: the mean of 75 is what no run has."""
    cells = [cell("static", [1.0, 1.0], 90.0), cell("chunked", [1.0, 1.0], 90.0)]
    for place, tokens in enumerate(((100.0, 110.0), (50.0, 100.0))):
        runs = zip(cells[place].runs, tokens, strict=True)
        told = tuple({**run, "output_throughput": one} for run, one in runs)
        cells[place] = replace(cells[place], runs=told)
    asked = load_scenario(write(tmp_path))
    said = whatif_remarks(asked, cells, 2, [])
    assert "Seeds lie far apart with batching chunked: 50 to 100 tokens/s." in said
    assert not any("far apart" in one for one in whatif_remarks(asked, cells[:1], 2, []))


def test_cells_that_differ_by_no_more_than_their_intervals_are_said_not_to_differ(
    tmp_path: Path,
) -> None:
    """There is nothing to mark then, and nothing to draw."""
    cells = [cell("chunked", [5.0, 6.0, 7.0], 20.0), cell("static", [4.9, 5.7, 7.1], 20.0)]
    said = (
        "The 2 cells do not differ beyond their 95 % intervals in goodput (6 requests/s) and "
        "TTFT p99 (20 ms)."
    )
    assert whatif_answer(cells, 3) == [said]
    assert not whatif_best(cells)
    page = whatif_page(load_scenario(write(tmp_path)), cells, 3, [])
    assert "<h2>Frontiers</h2>" not in page
    assert f'<p class="headline">{said}' in page


def test_cells_that_carry_the_same_load_are_level_in_goodput_though_one_drains_faster() -> None:
    """60 requests within 60 s, all good: 1 a second, 0.5 to the end of the slow cell."""
    cells = []
    for batching, drain_s in (("static", 60.0), ("chunked", 15.0)):
        given = cell(batching, [60.0 / (60.0 + drain_s)], 20.0)
        carried = {"duration": 60.0 + drain_s, "drain_after_arrivals_s": drain_s}
        cells.append(replace(given, means={**(given.means or {}), **carried}))
    assert leaders(cells, GOODPUT) == [1, 0]
    assert whatif_answer(cells, 1) == [
        "The 2 cells do not differ in goodput (up to 0.8 requests/s, of the same load) and TTFT "
        "p99 (20 ms)."
    ]
    assert not whatif_best(cells)


def test_whoever_is_better_than_a_cell_that_is_level_is_level_too() -> None:
    """Within 60 s all are good; the third answers the last late, the second not 2 % of them."""
    cells = []
    for goodput, good, drain_s in ((1.0, 1.0, 0.0), (0.98, 0.98, 0.0), (0.9, 1.0, 6.6)):
        given = cell("static", [goodput], 20.0)
        carried = {"duration": 60.0 + drain_s, "drain_after_arrivals_s": drain_s}
        means = {**given.means, **carried, "slo_attainment": good}
        cells.append(replace(given, means=means))
    assert leaders(cells, GOODPUT) == [0, 1, 2]
    assert leaders(cells[:2], GOODPUT) == [0]
    told = {**cells[1].means, "request_goodput": 0.9995}
    assert leaders([cells[0], replace(cells[1], means=told)], GOODPUT) == [0, 1]
    assert whatif_answer(cells, 1)[0].startswith(
        "The 3 cells do not differ in goodput (up to 1 req"
    )


def test_cells_of_one_run_are_ranked_by_it_and_a_remark_says_that_it_may_be_chance(
    tmp_path: Path,
) -> None:
    cells = [cell("chunked", [5.0], 20.0), cell("static", [4.9], 20.0)]
    rest = "The 2 cells do not differ in TTFT p99 (20 ms)."
    assert whatif_answer(cells, 1) == ["Best in goodput (5 requests/s): batching chunked.", rest]
    answered, first, *_ = whatif_remarks(load_scenario(write(tmp_path)), cells, 1, [])
    assert answered == rest
    assert first.startswith("2 cells, one run each: what is chance shows only over several")


def test_a_grid_of_one_cell_or_of_none_that_can_be_says_so() -> None:
    one = cell("chunked", [5.0], 20.0)
    assert whatif_answer([one], 1) == [
        "vanilla: model opt-1.3b, batching chunked has goodput 5 requests/s and TTFT p99 20 ms; "
        "there is no other to compare it with."
    ]
    assert whatif_answer([Cell({}, "vanilla", why="No.")], 1) == ["None of 1 cell can be run."]


def test_the_remarks_of_a_grid_say_its_slo_unless_that_is_what_varies(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path))
    said = "SLO: TTFT \N{LESS-THAN OR EQUAL TO} 1 s, TPOT \N{LESS-THAN OR EQUAL TO} 30 ms; "
    remarks = whatif_remarks(scenario, [cell("chunked", [5.0], 20.0)], 1, [])
    assert [one.startswith(said) for one in remarks] == [False, True]
    varied = [Cell({"slo.text": "ttft:9"}, "vanilla", {"agreement": 1.0})]
    assert not any("SLO" in one for one in whatif_remarks(scenario, varied, 1, []))


def test_a_grid_says_which_cells_have_users_who_rest(tmp_path: Path) -> None:
    cells = [cell("chunked", [5.0], 20.0), cell("static", [4.0], 20.0)]
    for one, active in zip(cells, (7.9, 6.0), strict=True):
        assert isinstance(one.means, dict)
        one.means.update(num_users=8.0, mean_active_users=active)
    told = whatif_remarks(load_scenario(write(tmp_path)), cells, 1, [])
    (said,) = [one for one in told if "Active" in one]
    assert said.startswith(f"Active on average: 6 of 8 users ({cells[1].name}). Users rest")


def test_a_grid_says_which_cells_a_published_launch_floor_decides(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path))
    cells = [cell("chunked", [5.0], 20.0), cell("static", [4.0], 20.0)]
    for one, share in zip(cells, (0.3, 0.7), strict=True):
        assert isinstance(one.means, dict)
        one.means["regime.launch"] = share
    published = [load_profile("opt-a100-40gb")]
    (said,) = [one for one in whatif_remarks(scenario, cells, 1, published) if "Launching" in one]
    assert f"busy time of {cells[1].name}. An" in said
    measured = [load_profile("small-family-cpu")]
    assert "Launching" not in " ".join(whatif_remarks(scenario, cells, 1, measured))


def test_a_grid_says_which_cells_decode_more_rows_than_anybody_published(tmp_path: Path) -> None:
    """A cell that assumes what a request costs the host is left out, and all are if all do."""
    scenario = load_scenario(write(tmp_path))
    cost = "models.*.coefficients.decode.fixed_s_per_row"
    cells = [cell("chunked", [5.0], 20.0), cell("static", [4.0], 20.0), cell("chunked", [3.0], 9.0)]
    for one, batch in zip(cells, (40.0, 90.0, 200.0), strict=True):
        assert isinstance(one.means, dict) and isinstance(one.values, dict)
        one.means["mean_batch_size"] = batch
    assert isinstance(cells[2].values, dict)
    cells[2].values[f"fleet.assume.{cost}"] = 5e-5
    published = load_profile("opt-a100-40gb")
    paid = load_profile("opt-a100-40gb", assumed={cost: 5e-5})

    def said(profiles: list[Profile]) -> list[str]:
        told = whatif_remarks(scenario, cells, 1, profiles)
        return [one for one in told if "decode together" in one]

    (one,) = said([published, paid])
    assert one.startswith(f"Up to 90 requests decode together on average ({cells[1].name}).")
    assert said([paid]) == said([load_profile("small-family-cpu")]) == []


def test_the_mean_share_of_launching_is_that_of_the_samples_that_were_busy() -> None:
    busy = [{"summary": {"regime": {"launch": share}}} for share in (0.2, 0.6)]
    assert mean_figures(busy) == {"regime.launch": pytest.approx(0.4)}
    assert mean_figures([*busy, {"summary": {"regime": None}}])["regime.launch"] == 0.4
    assert "regime.launch" not in mean_figures([{"summary": {"regime": None}}])


def test_a_grid_whose_cells_differ_in_quality_says_so(tmp_path: Path) -> None:
    cells = [cell("chunked", [5.0], 20.0, 0.75), cell("static", [4.0], 20.0)]
    (said,) = [
        one
        for one in whatif_remarks(load_scenario(write(tmp_path)), cells, 1, [])
        if one.startswith("Quality differs: ")
    ]
    assert said.endswith(
        "75 % of the tokens equal those of the same model at full depth with batching chunked, "
        "100 % with batching static."
    )


def test_cells_of_models_that_share_a_tokenizer_are_said_to_differ_in_perplexity(
    tmp_path: Path,
) -> None:
    """Each agrees with itself in every token; of two tokenizers perplexities do not compare."""
    for profile, others, is_said in (
        ("opt-a100-40gb", ("opt-1.3b", "opt-6.7b"), True),
        ("layerskip-a100-40gb", ("llama2-7b", "llama2-13b"), True),
        ("layerskip-a100-40gb", ("llama2-7b", "llama3-8b"), False),
    ):
        cells = []
        for batching, model, perplexity in zip(
            ("chunked", "static"), others, (14.62, 10.83), strict=True
        ):
            given = cell(batching, [5.0], 20.0)
            means = {**(given.means or {}), "perplexity": perplexity}
            cells.append(replace(given, means=means, models=(model,)))
        remarks = whatif_remarks(load_scenario(write(tmp_path)), cells, 1, [load_profile(profile)])
        said = (
            "Quality differs: perplexity is 10.83 with batching static, 14.62 with batching "
            "chunked."
        )
        assert (said in remarks) is is_said
        assert any("Quality" in one for one in remarks) is is_said


def test_cells_that_meet_other_texts_are_told_though_only_the_rate_varies(tmp_path: Path) -> None:
    """Chat gives way to code after 10 s; at four times the rate the 20 s of a run are 5."""
    drifting = [
        {"name": "chat", "shares": [[10, 1.0], [10.05, 0.0]]},
        {"name": "code", "shares": [[10, 0.0], [10.05, 1.0]]},
    ]
    workload = {"num_requests": 200, "arrivals": {"kind": "constant", "rate_per_s": 10.0}}
    path = write(tmp_path, workload={**workload, "domains": drifting})
    asked, policies, out = load_scenario(path), ["vanilla"], inline(tmp_path / "out")

    def texts(vary: str) -> list[str]:
        said = whatif(path, [], [vary], policies, 1, out).sentences
        return [one for one in said if one.startswith("Texts differ")]

    (said,) = texts("workload.arrivals.rate_per_s=10.0,40.0")
    assert (
        "code has 0 % of the requests with rate per s 40.0 and 49.5 % with rate per s 10.0" in said
    )
    assert "Shares over time are in seconds of the run: give workload.domains fixed" in said
    assert texts("serving.max_batch=8,16") == []
    cells = [
        Cell({"workload.domains": place}, "vanilla", {"agreement": 1.0}, mix={"code": 0.1 * place})
        for place in range(2)
    ]
    assert not any("Texts" in one for one in whatif_remarks(asked, cells, 1, []))


def test_cells_that_cannot_be_have_their_reasons_in_the_answer_and_on_the_page(
    tmp_path: Path,
) -> None:
    """OPT-1.3B has no exit at layer 7 and has 24 layers."""
    path = write(tmp_path, policy=[{"use": "static-depth", "model": "opt-1.3b"}])
    said = whatif(path, [], ["policy.depth=7,24"], [], 2, inline(tmp_path / "out"))
    assert said.sentences[0].startswith("static-depth: depth 24 has goodput ")
    (why,) = [one for one in said.sentences if "cannot be" in one]
    assert why.startswith("static-depth: depth 7 cannot be run: ")
    assert why in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_a_cell_whose_settings_contradict_each_other_leaves_the_others_alone(
    tmp_path: Path,
) -> None:
    """A limit of 200 breaches is beyond a window of 100 tokens, and within one of 300."""
    path = write(tmp_path, policy=[{"use": "helios"}])
    vary = ["policy.breach_limit=50,200", "policy.breach_window_tokens=100,300"]
    said = whatif(path, [], vary, [], 1, inline(tmp_path / "out"))
    (why,) = [one for one in said.sentences if "cannot be run" in one]
    assert (
        "breach_limit 200, breach_window_tokens 100" in why
        and "must be below the 100 tokens" in why
    )
    with pytest.raises(InputError, match="must be below the 100 tokens"):
        whatif(path, [], ["policy.breach_limit=150,200"], [], 1, inline(tmp_path / "none"))


def test_the_best_of_a_grid_is_marked_and_its_marks_are_labelled_on_the_page(
    tmp_path: Path,
) -> None:
    cells = [cell("chunked", [5.0, 5.0], 20.0), cell("static", [4.0, 4.0], 20.0)]
    page = whatif_page(load_scenario(write(tmp_path)), cells, 2, [])
    assert page.count('<td class="best">') == 1
    assert '<td class="best">5<span class="hidden"> (best)</span></td>' in page
    (users,) = cells_figure(cells, "GPU")["data"]
    assert users["text"] == ["batching chunked", "batching static"]
    metered = [
        replace(one, means={**(one.means or {}), "energy_per_output_token": 1e3 * joules})
        for one, joules in zip(cells, (1.0, 2.0), strict=True)
    ]
    for trace in cells_figure(metered, "GPU")["data"]:
        assert trace["text"] == ["batching chunked", "batching static"]


@pytest.mark.parametrize(
    ("heights", "labelled"),
    [
        ([100.0, 100.0], True),
        ([100.0, 100.0, 100.0], False),
        ([100.0, 60.0, 20.0], True),
        (list(range(10, 10 * MAX_LABELS + 1, 10)), True),
        (list(range(MAX_LABELS + 1)), False),
    ],
)
def test_marks_have_labels_only_where_these_do_not_cover_one_another(
    heights: list[float], labelled: bool
) -> None:
    """Two labels fit at one height, above and below their marks; twelve marks are 8 % apart."""
    cells = [
        Cell({"serving.max_batch": at}, "vanilla", {"output_throughput": one, "num_gpus": 1.0})
        for at, one in enumerate(heights)
    ]
    (trace,) = cells_figure(cells, "GPU")["data"]
    assert (trace["mode"] == "markers+text") == ("text" in trace) == labelled


def test_without_an_energy_the_panel_against_it_is_left_out(tmp_path: Path) -> None:
    cells = [cell("chunked", [5.0, 5.0], 20.0), cell("static", [4.0, 4.0], 20.0)]
    scenario = load_scenario(write(tmp_path))
    page = whatif_page(scenario, cells, 2, [])
    assert '<p class="lead">What users see against what a GPU gives. Energy is not known.' in page
    layout = cells_figure(cells, "GPU")["layout"]
    assert (layout["xaxis"]["title"]["text"], "xaxis2" in layout) == ("tokens/s per user", False)
    cells[0] = replace(cells[0], means={**(cells[0].means or {}), "energy_per_output_token": 1e3})
    page = whatif_page(scenario, cells, 2, [])
    assert "What throughput costs in energy, and what users see against what a " in page
    assert "xaxis2" in cells_figure(cells, "GPU")["layout"]


def test_a_cell_is_told_by_its_policy_where_several_are_compared() -> None:
    cells = [Cell({"serving.max_batch": 8}, "vanilla"), Cell({"serving.max_batch": 8}, "helios")]
    assert short_names(cells) == ["vanilla", "helios"]


def test_behind_a_cell_that_is_not_level_with_the_best_nobody_is() -> None:
    """Steady gaps of 0.2 are told from chance; the gaps of 0, 3 and 6 behind them are not."""
    cells = [
        cell("continuous", [5.0, 6.0, 7.0], 20.0),
        cell("chunked", [4.8, 5.8, 6.8], 20.0),
        cell("static", [5.0, 3.0, 1.0], 20.0),
    ]
    assert leaders(cells, GOODPUT) == [0]


def test_settings_of_one_name_are_told_apart_by_their_tables() -> None:
    cells = [
        Cell({"workload.prompt.tokens": one, "workload.output.tokens": other}, policy, {})
        for policy in ("helios", "vanilla")
        for one, other in ((100, 40), (200, 40), (200, 80))
    ]
    assert short_names(cells)[:2] == [
        "helios / prompt tokens 100 / output tokens 40",
        "helios / prompt tokens 200 / output tokens 40",
    ]
    assert short_keys(["policy.model", "serving.max_batch"]) == {
        "policy.model": "model",
        "serving.max_batch": "max batch",
    }


def test_the_best_of_cells_is_named_with_what_speaks_against_it() -> None:
    cells = [
        replace(cell("static", [5.0], 90.0), saturation="overloaded"),
        cell("chunked", [4.0], 20.0),
    ]
    assert whatif_answer(cells, 1) == [
        "Best in goodput (5 requests/s): batching static (overloaded).",
        "Best in TTFT p99 (20 ms): batching chunked.",
    ]


def test_exits_that_stand_in_are_told_of_models_that_may_take_part(tmp_path: Path) -> None:
    """The profile's models are all candidates where the scenario names none."""
    given = load_profile("opt-a100-40gb")
    environment = {"stand_ins": {"opt-6.7b": "opt-1.3b"}}
    profile = replace(given, provenance=replace(given.provenance, environment=environment))
    cells = [cell("static", [5.0], 90.0)]
    for named, told in (((), True), (("opt-1.3b",), False), (("opt-6.7b",), True)):
        scenario = load_scenario(write(tmp_path))
        fleet = scenario.fleet.model_copy(update={"candidates": named})
        scenario = scenario.model_copy(update={"fleet": fleet})
        said = whatif_remarks(scenario, cells, 1, [profile])
        assert any("opt-6.7b leaves as opt-1.3b does" in one for one in said) is told


def test_a_grid_of_which_nothing_can_be_run_leaves_its_page_and_is_no_answer(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, policy=[{"use": "static-depth", "model": "opt-1.3b"}])
    with pytest.raises(InputError, match=r"None of 2 cells can be run\. .*depth"):
        whatif(path, [], ["policy.depth=7,8"], [], 1, inline(tmp_path / "out"))
    assert "None of 2 cells can be run" in (tmp_path / "out" / "report.html").read_text()
