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
from helios_sim.records import (
    DECISION_COLUMNS,
    DECISION_SCHEMA,
    REQUEST_COLUMNS,
    REQUEST_SCHEMA,
    RUN_FILES,
    TIMELINE_COLUMNS,
    TIMELINE_SCHEMA,
    IntegrityError,
    RunData,
    check_run,
    read_run,
    read_summary,
    run_violations,
    toml_text,
    write_run,
)
from tests.factories import make_run

SUMMARY = {"duration": 1.5, "nothing": None}


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


def test_documented_columns_are_the_schema() -> None:
    """Every column has a meaning and a type, in one order."""
    assert list(REQUEST_COLUMNS) == list(REQUEST_SCHEMA)
    assert list(TIMELINE_COLUMNS) == list(TIMELINE_SCHEMA)
    assert list(DECISION_COLUMNS) == list(DECISION_SCHEMA)


@pytest.mark.parametrize("policy", ["vanilla", "ee-single", "helios"])
def test_a_run_comes_back_as_it_was(policy: str, tmp_path: Path) -> None:
    """Writing and reading a run changes nothing."""
    run = make_run(policy, num_refused=3, num_replicas=2, closed_loop=True)
    folder = write_run(run, SUMMARY, tmp_path / "out" / "run")
    assert names_in(folder) == set(RUN_FILES)
    assert_same_run(read_run(folder), run)
    assert read_summary(folder) == SUMMARY
    assert names_in(tmp_path / "out") == {"run"}


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


def _drop_column(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).drop("status").write_parquet(path)


def _empty(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).clear().write_parquet(path)


def _retype(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).with_columns(pl.col("depth").cast(pl.Float64)).write_parquet(path)


def _back_in_time(folder: Path) -> None:
    path = folder / "requests.parquet"
    pl.read_parquet(path).with_columns(pl.col("admitted_s") - 5.0).write_parquet(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "timeline.parquet").unlink(), "timeline.parquet is missing"),
        (lambda f: _edit_totals(f, schema_version=99), "schema version 99"),
        (lambda f: _edit_totals(f, totals={"end_s": 1.0}), "lack"),
        (lambda f: _put(f / "totals.json", "{"), "not JSON"),
        (lambda f: _put(f / "scenario.toml", "a = ="), "not TOML"),
        (lambda f: _put(f / "requests.parquet", "x"), "not a Parquet table"),
        (_drop_column, "columns status are missing"),
        (_empty, "run is empty"),
        (_retype, "column depth is of type Float64"),
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


def test_reading_nothing_is_refused(tmp_path: Path) -> None:
    """A folder that is not there, or holds no run, is an error and no traceback."""
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(InputError, match="not a run"):
        read_summary(tmp_path)


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
