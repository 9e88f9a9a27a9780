"""A run on disk is whole or absent, the same bytes each time, and comes back as it was."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios_sim.errors import InputError
from helios_sim.runs.laws import IntegrityError, check_run, run_violations
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import (
    MEASURED,
    RUN_FILES,
    SUMMARY_KINDS,
    RunData,
    read_run,
    read_summary,
    write_run,
)
from helios_sim.settings.slo import SloSpec, parse_slo
from helios_sim.settings.toml_writer import toml_text
from tests.factories import make_run

SLO = parse_slo("ttft:p95<500 tpot:24")
SUMMARY = summarise(make_run(), SLO)


def names_in(folder: Path) -> set[str]:
    """Names of everything in a folder, hidden ones too."""
    return {entry.name for entry in folder.iterdir()}


def assert_same_run(a: RunData, b: RunData) -> None:
    """Every field of two runs is equal, tables cell by cell."""
    for table in ("requests", "decisions", "timeline"):
        assert getattr(a, table).equals(getattr(b, table)), table
    plain = ("requests", "decisions", "timeline")
    for name in a.__dataclass_fields__:
        if name not in plain:
            assert getattr(a, name) == getattr(b, name), name


@pytest.mark.parametrize("policy", ["vanilla", "ee-single", "helios"])
def test_a_run_comes_back_as_it_was(policy: str, tmp_path: Path) -> None:
    """Writing and reading a run changes nothing."""
    run = make_run(policy, num_refused=3, num_replicas=2, closed_loop=True)
    folder = write_run(run, SUMMARY, tmp_path / "out" / "run")
    assert names_in(folder) == set(RUN_FILES)
    assert_same_run(read_run(folder), run)
    assert read_summary(folder) == SUMMARY
    assert names_in(tmp_path / "out") == {"run"}


def test_a_run_that_was_served_for_real_is_replaced_only_where_asked_to(tmp_path: Path) -> None:
    """One that was simulated is, since it can be computed again."""
    run = make_run()
    real = replace(run, origin=MEASURED)
    write_run(run, SUMMARY, tmp_path / "run")
    folder = write_run(real, SUMMARY, tmp_path / "run")
    for next_one in (run, real):
        with pytest.raises(InputError, match=r"served for real.*run; give another folder"):
            write_run(next_one, SUMMARY, tmp_path / "run")
    assert read_run(folder).origin == MEASURED
    write_run(run, SUMMARY, tmp_path / "run", overwrite=True)
    assert read_run(folder).origin == "simulated"


def test_energy_that_no_meter_saw_stays_unknown(tmp_path: Path) -> None:
    """A NaN energy is null on disk and NaN again when read, never zero."""
    run = make_run()
    unknown = replace(run, totals=replace(run.totals, energy_j=math.nan))
    folder = write_run(unknown, SUMMARY, tmp_path / "run")
    assert json.loads((folder / "totals.json").read_text())["totals"]["energy_j"] is None
    assert math.isnan(read_run(folder).totals.energy_j)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two writes of one run agree byte for byte in every file."""
    a = write_run(make_run("helios"), SUMMARY, tmp_path / "a")
    b = write_run(make_run("helios"), SUMMARY, tmp_path / "b")
    for name in RUN_FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_run_is_replaced_whole(tmp_path: Path) -> None:
    """Writing over a run, its report included, leaves only the new one."""
    target = tmp_path / "run"
    write_run(make_run("helios"), SUMMARY, target, lambda f: _put(f / "report.html", "old"))
    write_run(make_run("vanilla"), SUMMARY, target)
    assert read_run(target).policy == "vanilla"
    assert names_in(target) == set(RUN_FILES)
    assert names_in(tmp_path) == {"run"}


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_things_as_they_were(error: BaseException, tmp_path: Path) -> None:
    """A failure or an interrupt leaves no partial run, and keeps the run that was there."""

    def fail(folder: Path) -> None:
        assert names_in(folder) == set(RUN_FILES)
        raise error

    with pytest.raises(type(error)):
        write_run(make_run(), SUMMARY, tmp_path / "run", fail)
    assert names_in(tmp_path) == set()
    write_run(make_run("helios"), SUMMARY, tmp_path / "run")
    with pytest.raises(type(error)):
        write_run(make_run(), SUMMARY, tmp_path / "run", fail)
    assert names_in(tmp_path) == {"run"}
    assert read_run(tmp_path / "run").policy == "helios"


def test_an_interrupted_move_puts_the_old_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the new run cannot be moved into place, the old one is there again."""
    target = write_run(make_run("helios"), SUMMARY, tmp_path / "run")
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(make_run(), SUMMARY, target)
    assert names_in(tmp_path) == {"run"}
    assert read_run(target).policy == "helios"


def test_what_is_no_run_is_never_overwritten(tmp_path: Path) -> None:
    """A file, a folder of other things, or a run with a stranger's file in it is refused."""
    _put(tmp_path / "file", "x")
    (tmp_path / "other").mkdir()
    _put(tmp_path / "other" / "notes.txt", "mine")
    _put(write_run(make_run(), SUMMARY, tmp_path / "run") / "notes.txt", "mine")
    for name, says in (("file", "is a file"), ("other", r"notes\.txt"), ("run", r"notes\.txt")):
        with pytest.raises(InputError, match=says):
            write_run(make_run(), SUMMARY, tmp_path / name)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write_run(make_run(), SUMMARY, tmp_path / "empty")


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _edit_totals(folder: Path, **changes: Any) -> None:
    path = folder / "totals.json"
    _put(path, json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_total(folder: Path, **changes: Any) -> None:
    totals = json.loads((folder / "totals.json").read_text())["totals"]
    _edit_totals(folder, totals={**totals, **changes})


def _drop_column(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).drop("status").write_parquet(path)


def _empty(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).clear().write_parquet(path)


def _retype(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).with_columns(pl.col("depth").cast(pl.Float64)).write_parquet(path)


def _text_for_numbers(folder: Path) -> None:
    path = folder / "requests.parquet"
    words = pl.read_parquet(path).with_columns(prompt_tokens=pl.lit("many"))
    words.write_parquet(path)


def _spoil_snapshot(folder: Path, text: str | None) -> None:
    path = folder / "decisions.parquet"
    decisions = pl.read_parquet(path)
    texts = [*decisions["snapshot"][:-1], text]
    decisions.with_columns(pl.Series("snapshot", texts, pl.String)).write_parquet(path)


def _back_in_time(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).with_columns(pl.col("admitted_s") - 5.0).write_parquet(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "timeline.parquet").unlink(), "timeline.parquet is missing"),
        (lambda f: _edit_totals(f, schema_version=99), "schema version 99"),
        (lambda f: _edit_totals(f, schema_version=True), "schema version true"),
        (lambda f: _edit_totals(f, label=3), "label is 3; allowed is text."),
        (lambda f: _edit_totals(f, seed=1.5), "seed is 1.5; allowed is a whole number."),
        (lambda f: _edit_totals(f, closed_loop=0), "closed_loop is 0; allowed is true or false."),
        (lambda f: _edit_totals(f, environment=[1]), "environment is [1]; allowed is an object."),
        (lambda f: _edit_totals(f, totals=3), "totals is 3; allowed is an object."),
        (lambda f: _edit_totals(f, totals={"end_s": 1.0}), "lack"),
        (lambda f: _edit_total(f, end_s=None), "end_s is null; allowed is a finite number."),
        (lambda f: _edit_total(f, energy_j="abc"), "allowed is a finite number, or null."),
        (lambda f: _edit_total(f, num_replicas="x"), 'num_replicas is "x"; allowed is a whole'),
        (lambda f: _edit_total(f, depth_seconds=3), "depth_seconds is 3; allowed is an object of"),
        (lambda f: _edit_total(f, exit_counts=[1]), "is [1]; allowed is an object of lists of who"),
        (lambda f: _edit_total(f, exit_counts={"a": ["x"]}), 'exit_counts is {"a": ["x"]}'),
        (lambda f: _edit_total(f, exit_layers={}), "needed is one for each of its exit_layers"),
        (lambda f: _put(f / "totals.json", "{"), "not JSON"),
        (lambda f: _put(f / "scenario.toml", "a = ="), "not valid TOML"),
        (lambda f: _put(f / "requests.parquet", "x"), "not a Parquet table"),
        (_drop_column, "columns status are missing"),
        (_empty, "run is empty"),
        (_retype, "column depth is of type Float64"),
        (_text_for_numbers, "column prompt_tokens is of type String; needed is Int32"),
        (lambda f: _spoil_snapshot(f, '{"num_'), "allowed is a JSON object"),
        (lambda f: _spoil_snapshot(f, "7"), "The snapshot of row"),
        (lambda f: _spoil_snapshot(f, None), "is null; allowed is a JSON object"),
        (_back_in_time, "admitted at or after its arrival"),
    ],
)
def test_a_spoilt_run_is_refused_with_the_reason(spoil: Any, says: str, tmp_path: Path) -> None:
    """Missing files and columns, foreign versions, broken text and broken laws are named."""
    folder = write_run(make_run(), SUMMARY, tmp_path / "run")
    spoil(folder)
    with pytest.raises(InputError) as caught:
        read_run(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    """Writing a table with a value outside its column's type names column and both types."""
    run = make_run(num_requests=60)
    wide = run.requests.with_columns(prompt_tokens=pl.lit(2**40, pl.Int64))
    with pytest.raises(InputError) as caught:
        write_run(replace(run, requests=wide), SUMMARY, tmp_path / "run")
    assert "column prompt_tokens is of type Int64" in str(caught.value)
    assert "needed is Int32" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "slo", "num_requests"), [("vanilla", None, 10), ("helios", SLO, 60)]
)
def test_the_kinds_are_those_of_a_summary(
    policy: str, slo: SloSpec | None, num_requests: int, tmp_path: Path
) -> None:
    """Every key of a summary has a kind and no other has; any summary is read back as it was."""
    run = make_run(policy, num_requests=num_requests)
    summary = summarise(run, slo)
    assert set(SUMMARY_KINDS) == set(summary)
    extra = {**summary, "num_shortened": 3, "replications": {"figures": {}}, "own": "x"}
    assert read_summary(write_run(run, extra, tmp_path / "run")) == extra


@pytest.mark.parametrize(
    ("summary", "says"),
    [
        ({}, "has schema version null; this program reads 1"),
        ({**SUMMARY, "schema_version": 9}, "has schema version 9; this program reads 1"),
        ({**SUMMARY, "schema_version": True}, "has schema version true"),
        ({"schema_version": 1}, "are missing; a summary has all"),
        ({k: v for k, v in SUMMARY.items() if k != "label"}, "The keys label are missing"),
        ({**SUMMARY, "mean_ttft_ms": "x"}, 'mean_ttft_ms is "x"; allowed is a finite number, or'),
        ({**SUMMARY, "mean_ttft_ms": math.inf}, "mean_ttft_ms is Infinity"),
        ({**SUMMARY, "duration": True}, "duration is true"),
        ({**SUMMARY, "duration": 10**400}, "duration is 1000"),
        ({**SUMMARY, "num_requests": 1.5}, "num_requests is 1.5; allowed is a whole number."),
        ({**SUMMARY, "num_requests": None}, "num_requests is null; allowed is a whole number."),
        ({**SUMMARY, "label": 3}, "label is 3; allowed is text."),
        ({**SUMMARY, "slo_passed": 1}, "slo_passed is 1; allowed is true or false, or null"),
        ({**SUMMARY, "exit_histogram": 5}, "exit_histogram is 5; allowed is an object of objects"),
        ({**SUMMARY, "exit_histogram": {"a": {"6": "x"}}}, "exit_histogram is {"),
        ({**SUMMARY, "time_shares": {"busy": None}}, "time_shares is {"),
        ({**SUMMARY, "intervals": []}, "intervals is []; allowed is an object of objects"),
        ({**SUMMARY, "slo_limits": {}}, "slo_limits is {}; allowed is a list"),
        ({**SUMMARY, "slo_limits": [{"limit": "ttft<=1s"}]}, "slo_limits is [{"),
        ({**SUMMARY, "slo_limits": None}, "One of slo and slo_limits is null"),
    ],
)
def test_a_spoilt_summary_is_refused_with_the_reason(
    summary: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """A foreign version, a missing key or a value of another kind is named with its file."""
    _put(tmp_path / "summary.json", json.dumps(summary))
    with pytest.raises(InputError) as caught:
        read_summary(tmp_path)
    assert says in str(caught.value)
    assert caught.value.where == str(tmp_path / "summary.json")


def test_reading_nothing_is_refused(tmp_path: Path) -> None:
    """A folder that is not there, or holds no run, is an error and no traceback."""
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(InputError, match="not a run"):
        read_summary(tmp_path)
    _put(tmp_path / "file", "x")
    for read in (read_run, read_summary):
        with pytest.raises(InputError, match="It is a file; allowed is the folder of a run"):
            read(tmp_path / "file")


def _first(name: str, value: Any) -> pl.Expr:
    """A column with its first row replaced."""
    return (
        pl.when(pl.col("request_id") == 1).then(pl.lit(value)).otherwise(pl.col(name)).alias(name)
    )


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("status", "lost", "Every status is one of"),
        ("status", "refused", "never admitted"),
        ("status", "running", "Only a finished request has a finish time"),
        ("finished_s", None, "admitted, emitted and ended"),
        ("admitted_s", 0.0, "at or after its arrival"),
        ("first_token_s", 0.0, "follows its admission"),
        ("finished_s", 1e9, "after the end of the run"),
        ("arrival_s", -1.0, "before the start"),
        ("generated_tokens", 10**6, "No request emits more than was asked for"),
        ("decoded_tokens", -1, "Decoded tokens"),
        ("executed_layers", 0, "at least one layer"),
        ("agree_tokens", 10**6, "Agreeing tokens"),
        ("breaches_relative", 10**6, "Relative breaches"),
        ("nll_nats", -1.0, "Negative log-likelihoods"),
        ("request_id", 0, "repeated"),
    ],
)
def test_each_law_of_a_request_is_checked(column: str, value: Any, says: str) -> None:
    """One broken row is found and named by the law it breaks."""
    run = make_run(num_requests=60)
    assert run_violations(run) == []
    broken = replace(run, requests=run.requests.with_columns(_first(column, value)))
    with pytest.raises(IntegrityError) as caught:
        check_run(broken)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"energy_j": -1.0}, "Energies are not negative"),
        ({"energy_j": 1.0}, "sum of its intervals"),
        ({"exit_counts": {"opt-6.7b": (1, 2, 3)}}, "Exits count every decoded token"),
        ({"itl_counts": (1,), "itl_bins_s": (0.1, 0.2)}, "Gaps lie between tokens"),
    ],
)
def test_each_law_of_the_totals_is_checked(changes: dict[str, Any], says: str) -> None:
    """Totals that do not add up with the rows are found."""
    run = make_run(num_requests=60)
    broken = replace(run, totals=replace(run.totals, **changes))
    with pytest.raises(IntegrityError, match=says):
        check_run(broken)


def test_a_pool_is_never_overfull() -> None:
    """A timeline with more KV blocks used than there are breaks a law."""
    run = make_run(num_requests=60)
    overfull = run.timeline.with_columns(kv_blocks_used=pl.col("kv_blocks") + 1)
    with pytest.raises(IntegrityError, match="within the pool"):
        check_run(replace(run, timeline=overfull))


values = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text('abé ."-\\\n', max_size=3), inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abc d", min_size=1, max_size=4), values, max_size=4))
def test_toml_text_reads_back(data: dict[str, Any]) -> None:
    """Whatever plain data is written as TOML is read back equal by the standard reader."""
    assert tomllib.loads(toml_text(data)) == data


@pytest.mark.parametrize("data", [{"a": None}, {"a": {"b": [object()]}}, {"a": {3: 4}}])
def test_types_toml_does_not_have_are_refused(data: dict[str, Any]) -> None:
    """None, objects and keys that are no text are a TypeError that names the place."""
    with pytest.raises(TypeError, match="a"):
        toml_text(data)


def test_a_folder_of_runs_says_which_run_could_be_meant(tmp_path: Path) -> None:
    (tmp_path / "helios").mkdir()
    (tmp_path / "helios" / "totals.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds runs and is none itself: helios\. Name one of"):
        read_run(tmp_path)
