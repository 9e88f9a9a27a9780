"""The profile format: what is read, how it is used, and what each mistake is told."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helios_sim.cost import COEFFICIENTS, OPTIONAL_COEFFICIENTS, iteration_joules
from helios_sim.errors import InputError
from helios_sim.profile import (
    PROFILE_FILE,
    Hull,
    Link,
    MarkovExits,
    ModelProfile,
    Profile,
    TraceExits,
    quantity,
    unit_of,
)
from helios_sim.profiles.files import (
    document_text,
    folder_hash,
    list_profiles,
    load_profile,
    save_profile,
    shipped_names,
)

Document = dict[str, Any]


@pytest.fixture
def document() -> Document:
    """The document of a shipped profile, free to be changed."""
    return copy.deepcopy(dict(load_profile("opt-a100-40gb").document))


def write(folder: Path, content: Document | str) -> Path:
    """A profile folder with that content, unchecked."""
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / PROFILE_FILE).write_text(text, encoding="utf-8")
    return folder


def set_at(document: Document, place: str, value: Any) -> None:
    """Change the node at a place written with slashes."""
    *path, last = place.split("/")
    node: Any = document
    for key in path:
        node = node[key]
    node[last] = value


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("decode.launch_s", "s"),
        ("decode.memory_s_per_context_token", "s/context_token"),
        ("decode.compute_s_per_padded_token", "s/padded_token"),
        ("prefill.fixed_s_per_prompt", "s/prompt"),
        ("kv_fill.s_per_row_layer", "s/row/layer"),
        ("decode.j_per_context_token_layer", "J/context_token/layer"),
        ("head.j_base", "J"),
        ("power.active_w", "W"),
        ("bytes_per_s", "B/s"),
        ("memory_bytes", "B"),
        ("disagreement_penalty_nats", "nat"),
        ("exit_shares", "1"),
    ],
)
def test_a_unit_follows_from_the_name_of_a_number(name: str, unit: str) -> None:
    assert unit_of(name) == unit


def test_every_coefficient_has_a_unit_of_seconds_joules_or_watts() -> None:
    assert {unit_of(name)[0] for name in COEFFICIENTS} == {"s", "J", "W"}


def test_a_profile_is_of_a_gpu_unless_its_measurement_says_processor() -> None:
    assert load_profile("small-family-cpu").is_of_processor
    assert not load_profile("opt-a100-40gb").is_of_processor


def test_a_number_without_a_known_unit_is_refused() -> None:
    with pytest.raises(KeyError, match="colour"):
        unit_of("colour")


def test_saving_and_loading_a_document_keeps_every_number(
    tmp_path: Path, document: Document
) -> None:
    saved = save_profile(document, tmp_path / "mine")
    original = load_profile("opt-a100-40gb")
    assert saved.models == original.models
    assert saved.device == original.device
    assert saved.exits == original.exits
    assert saved.quantities == original.quantities
    assert (tmp_path / "mine" / PROFILE_FILE).read_text() == document_text(document)


def test_a_refused_document_leaves_nothing_behind(tmp_path: Path, document: Document) -> None:
    set_at(document, "device/memory_bytes/value", -1)
    with pytest.raises(InputError):
        save_profile(document, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_overwritten_only_when_asked(
    tmp_path: Path, document: Document
) -> None:
    save_profile(document, tmp_path / "mine")
    with pytest.raises(InputError, match="exists already"):
        save_profile(document, tmp_path / "mine")
    document["description"] = "another"
    assert save_profile(document, tmp_path / "mine", overwrite=True).description == "another"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_holds_anything_but_a_profile_is_never_replaced(
    tmp_path: Path, document: Document
) -> None:
    save_profile(document, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "points.parquet").write_text("readings")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".git").mkdir()
    (tmp_path / "file").write_text("text")
    for name, said in (
        ("mine", "it holds notes.txt"),
        ("points", "it holds points.parquet"),
        ("work", r"it holds \.git"),
        ("file", "It is a file"),
    ):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=said):
                save_profile(document, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "work" / ".git").is_dir()
    assert (tmp_path / "points" / "points.parquet").read_text() == "readings"
    (tmp_path / "empty").mkdir()
    assert save_profile(document, tmp_path / "empty").name == document["name"]


def test_a_save_that_ends_early_keeps_the_profile_that_was_there(
    tmp_path: Path, document: Document
) -> None:
    save_profile(document, tmp_path / "mine")
    description = document["description"]
    document["description"] = "another"

    def refuse(written: Profile) -> None:
        assert written.description == "another"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_profile(document, tmp_path / "mine", overwrite=True, check=refuse)
    assert load_profile(tmp_path / "mine").description == description
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_the_hash_changes_with_any_byte_of_the_folder(tmp_path: Path, document: Document) -> None:
    first = save_profile(document, tmp_path / "mine")
    assert first.hash == folder_hash(tmp_path / "mine")
    (tmp_path / "mine" / "points.parquet").write_bytes(b"1")
    second = folder_hash(tmp_path / "mine")
    (tmp_path / "mine" / "points.parquet").write_bytes(b"2")
    third = folder_hash(tmp_path / "mine")
    assert len({first.hash, second, third}) == 3


def test_a_profile_is_read_anew_only_when_its_folder_has_changed(
    tmp_path: Path, document: Document
) -> None:
    folder = write(tmp_path / "mine", document)
    first = load_profile(folder)
    assert load_profile(folder) is first
    document["description"] = "another"
    write(folder, document)
    second = load_profile(folder)
    assert first.description != second.description == "another"
    (folder / "points.parquet").write_bytes(b"1")
    assert load_profile(folder).hash not in (first.hash, second.hash)


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError("not yours")

    folder = write(tmp_path / "mine", document)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="The file cannot be read: not yours") as error:
        load_profile(folder)
    assert error.value.where == str(folder / PROFILE_FILE)


def test_the_hash_is_that_of_the_content_not_of_the_place(
    tmp_path: Path, document: Document
) -> None:
    one = save_profile(document, tmp_path / "one")
    two = save_profile(document, tmp_path / "two")
    assert one.hash == two.hash


def test_coefficients_come_in_the_order_of_the_cost_functions() -> None:
    model = load_profile("opt-a100-40gb").models["opt-6.7b"]
    array = model.coefficient_array()
    assert array.dtype == np.float64
    assert list(array) == [model.coefficients[name] for name in COEFFICIENTS]


def test_a_link_takes_its_start_and_its_bytes_and_nothing_for_nothing() -> None:
    link = Link(alpha_s=0.5, bytes_per_s=1e9)
    assert link.seconds(2e9) == 2.5
    assert link.seconds(0) == 0.0


def model_with(**changes: Any) -> ModelProfile:
    """A shipped model profile with some fields changed."""
    return replace(load_profile("opt-a100-40gb").models["opt-1.3b"], **changes)


def test_rows_are_padded_to_the_next_bucket_and_not_beyond_the_last() -> None:
    model = model_with(batch_buckets=(1, 2, 4, 8))
    assert list(model.padded_rows(10)) == [0, 1, 2, 4, 4, 8, 8, 8, 8, 9, 10]
    assert list(model_with(batch_buckets=()).padded_rows(3)) == [0, 1, 2, 3]


def test_the_residual_meets_its_knots_stays_monotone_and_is_held_outside() -> None:
    model = model_with(batch_residual=((2.0, 1.2), (8.0, 1.0), (16.0, 0.9)))
    factors = model.residual(20, 24)
    assert factors[[2, 8, 16]] == pytest.approx([1.2, 1.0, 0.9])
    assert set(factors[:3]) == {1.2}
    assert set(factors[16:]) == {factors[16]}
    assert np.all(np.diff(factors) <= 0.0)


def test_no_knots_leave_times_as_they_are_and_one_knot_scales_all() -> None:
    assert list(model_with(batch_residual=()).residual(3, 24)) == [1.0] * 4
    assert list(model_with(batch_residual=((4.0, 1.5),)).residual(2, 24)) == [1.5] * 3


def test_both_residuals_multiply_and_the_depth_is_the_loaded_one() -> None:
    by_depth = ((2.0, 0.5), (12.0, 1.0))
    model = model_with(batch_residual=((2.0, 1.2), (8.0, 1.0)), depth_residual=by_depth)
    plain = model_with(batch_residual=((2.0, 1.2), (8.0, 1.0)))
    for depth, factor in ((1, 0.5), (2, 0.5), (12, 1.0), (24, 1.0)):
        assert list(model.residual(8, depth)) == list(plain.residual(8, depth) * factor)
    assert 0.5 < model.residual(8, 6)[8] < 1.0


def test_what_a_profile_may_leave_out_counts_as_nothing(tmp_path: Path, document: Document) -> None:
    profile = save_profile(document, tmp_path / "plain")
    assert profile.models["opt-1.3b"].depth_residual == ()
    for name in OPTIONAL_COEFFICIENTS:
        assert profile.models["opt-1.3b"].coefficients[name] == 0.0
        assert f"models.opt-1.3b.coefficients.{name}" not in profile.quantities


def test_what_a_profile_may_leave_out_is_read_where_it_is_there(
    tmp_path: Path, document: Document
) -> None:
    entry = document["models"]["opt-1.3b"]
    for place, name in enumerate(OPTIONAL_COEFFICIENTS):
        entry["coefficients"][name] = quantity(name, 1e-6 * (place + 1), "measured", "this device")
    entry["depth_residual"] = quantity(
        "depth_residual", [[6, 0.8], [24, 1.0]], "measured", "this device"
    )
    document["models"]["opt-6.7b"]["depth_residual"] = None
    profile = save_profile(document, tmp_path / "mine")
    model = profile.models["opt-1.3b"]
    given = model.coefficient_array()[-len(OPTIONAL_COEFFICIENTS) :]
    assert list(given) == [1e-6 * (place + 1) for place in range(len(OPTIONAL_COEFFICIENTS))]
    assert model.depth_residual == ((6.0, 0.8), (24.0, 1.0))
    assert profile.models["opt-6.7b"].depth_residual == ()
    assert profile.quantities["models.opt-1.3b.depth_residual[0]"].value == 0.8
    unit = profile.quantities[f"models.opt-1.3b.coefficients.{OPTIONAL_COEFFICIENTS[0]}"].unit
    assert unit == "s/padded_token"


def test_measured_settings_are_read(tmp_path: Path, document: Document) -> None:
    model = document["models"]["opt-1.3b"]
    model["hull"] = {"max_batch": 64, "max_context_tokens": 2048}
    model["batch_buckets"] = [1, 2, 4]
    model["batch_residual"] = quantity(
        "batch_residual", [[1, 1.1], [4, 1.0]], "measured", "this device"
    )
    model["coefficients"]["decode.launch_s"]["error"] = 1e-6
    document["measurement"] = {"probe": {"counter_period_s": 0.02}}
    profile = save_profile(document, tmp_path / "mine")
    read = profile.models["opt-1.3b"]
    assert read.hull == Hull(64, 2048)
    assert read.batch_residual == ((1.0, 1.1), (4.0, 1.0))
    place = "models.opt-1.3b.coefficients.decode.launch_s"
    assert profile.quantities[place].error == 1e-6
    assert profile.grade_counts()["measured"] == 2
    assert profile.document["measurement"]["probe"]["counter_period_s"] == 0.02


def test_a_trace_section_names_a_file_beside_the_profile(
    tmp_path: Path, document: Document
) -> None:
    document["exits"] = {"kind": "trace", "file": "exits.parquet"}
    with pytest.raises(InputError, match=r"holds no file 'exits\.parquet'"):
        save_profile(document, tmp_path / "mine")
    (tmp_path / "raw.parquet").write_bytes(b"")
    profile = save_profile(document, tmp_path / "mine", traces=tmp_path / "raw.parquet")
    assert profile.exits == TraceExits(tmp_path / "mine" / "exits.parquet")


def test_a_trace_file_outside_the_folder_is_refused(tmp_path: Path, document: Document) -> None:
    document["exits"] = {"kind": "trace", "file": "../exits.parquet"}
    with pytest.raises(InputError, match="name a file of the profile"):
        save_profile(document, tmp_path / "mine")


def test_a_folder_beside_the_scenario_goes_before_a_shipped_profile(
    tmp_path: Path, document: Document
) -> None:
    document["description"] = "the nearer one"
    write(tmp_path / "opt-a100-40gb", document)
    assert load_profile("opt-a100-40gb", tmp_path).description == "the nearer one"
    assert load_profile(tmp_path / "opt-a100-40gb").description == "the nearer one"
    assert load_profile("layerskip-h100-80gb", tmp_path).name == "layerskip-h100-80gb"


def test_the_list_tells_name_device_models_and_grades_of_what_is_shipped() -> None:
    summaries = list_profiles()
    assert [summary.name for summary in summaries] == shipped_names()
    opt = next(summary for summary in summaries if summary.name == "opt-a100-40gb")
    assert opt.device == "NVIDIA A100-SXM4-40GB"
    assert opt.models == ("opt-1.3b", "opt-6.7b")
    assert opt.grade_counts["measured"] == 0
    assert opt.grade_counts["assumed"] > 0


def test_an_unknown_profile_is_told_the_nearest_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'opt-a100-40gb'"):
        load_profile("opt-a100", tmp_path)


def test_a_folder_without_a_profile_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no profile\.json"):
        load_profile("empty", tmp_path)


def test_an_unknown_model_is_told_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'opt-6\.7b'"):
        load_profile("opt-a100-40gb").model("opt-6.7")


def test_broken_json_is_told_its_line_and_column(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", '{\n  "schema_version": 1,\n  "name": oops\n}')
    with pytest.raises(InputError, match=r"profile\.json, line 3, column 11: .*not valid JSON"):
        load_profile(folder)


def test_json_that_python_cannot_hold_is_told_the_file(tmp_path: Path) -> None:
    for number, content in enumerate(("[" * 200_000, "9" * 5000)):
        folder = write(tmp_path / f"mine-{number}", content)
        with pytest.raises(InputError, match=r"profile\.json: The file cannot be read"):
            load_profile(folder)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", '{"schema_version": 1, "name": "a", "name": "b"}')
    with pytest.raises(InputError, match="'name' is given twice"):
        load_profile(folder)


COEFFICIENT = "models/opt-1.3b/coefficients/decode.launch_s"

MISTAKES: list[tuple[str, str, Any, str]] = [
    ("another schema version", "schema_version", 2, "reads version 1"),
    ("an unknown key", "device/memory_byte", 1, "'memory_byte' is unknown.*'memory_bytes'"),
    ("an unknown grade", f"{COEFFICIENT}/grade", "guessed", "Allowed are 'measured'"),
    ("a nearly right grade", f"{COEFFICIENT}/grade", "asumed", "Did you mean 'assumed'"),
    ("a wrong unit", f"{COEFFICIENT}/unit", "ms", "unit 'ms' was given; 's' is needed"),
    ("a negative value", f"{COEFFICIENT}/value", -1e-3, "must be at least 0"),
    ("an infinite value", f"{COEFFICIENT}/value", math.inf, "must be finite"),
    ("a whole number that no float holds", f"{COEFFICIENT}/value", 10**400, "must be finite"),
    ("a value that is not a number", f"{COEFFICIENT}/value", math.nan, "must be finite"),
    ("a text for a number", f"{COEFFICIENT}/value", "fast", "number was expected"),
    ("truth for a number", f"{COEFFICIENT}/value", True, "number was expected"),
    ("an empty source", f"{COEFFICIENT}/source", " ", "text was expected"),
    ("a bare number for a quantity", COEFFICIENT, 1e-3, "object was expected"),
    ("an unknown coefficient", f"{COEFFICIENT}x", 1, "Did you mean 'decode.launch_s'"),
    (
        "exits beyond the layers",
        "models/opt-1.3b/exit_layers/value",
        [6, 12, 36],
        "after layer 36 was given; the model has 24 layers",
    ),
    (
        "a last exit before the full depth",
        "models/opt-1.3b/exit_layers/value",
        [6, 12, 20],
        "last exit must be its full depth",
    ),
    ("falling exits", "models/opt-1.3b/exit_layers/value", [12, 6, 24], "ascending"),
    ("half an exit", "models/opt-1.3b/exit_layers/value", [6.5, 24], "must be whole"),
    ("a number too large", "device/active_w/value", 1e300, "1e.300 was given; at most 1e.18 is"),
    ("half a byte", "device/memory_bytes/value", 1.5, "must be whole"),
    ("no memory", "device/memory_bytes/value", 0, "must be greater"),
    ("active below idle power", "device/active_w/value", 1.0, "at least idle_w"),
    ("loading below idle power", "device/load_w/value", 1.0, "at least idle_w"),
    (
        "a model that works below idle power",
        "models/opt-1.3b/coefficients/power.active_w/value",
        1.0,
        "at least device.idle_w",
    ),
    (
        "a limit below active power",
        "models/opt-1.3b/coefficients/power.limit_w/value",
        1.0,
        "at least power.active_w",
    ),
    ("a head and a half", "models/opt-1.3b/shape/kv_heads", 5, "with 32 heads; it must divide"),
    ("an unknown family", "models/opt-1.3b/shape/family", "gpt", "Allowed are 'opt', 'llama'"),
    ("no truth", "models/opt-1.3b/shape/final_norm", 0, "true or false was expected"),
    ("a threshold above 1", "models/opt-1.3b/confidence/default_threshold/value", 1.5, "at most 1"),
    ("buckets that fall", "models/opt-1.3b/batch_buckets", [4, 2], "must rise"),
    ("an empty hull", "models/opt-1.3b/hull", {}, "'max_batch' is missing"),
    ("an unknown kind of exits", "exits/kind", "guess", "Allowed are 'trace', 'markov'"),
    ("a domain named twice", "exits/domains", ["chat", "chat"], "none twice"),
    ("a domain without shares", "exits/domains", ["chat", "code", "maths"], "'maths' is missing"),
    ("a stickiness of 1", "exits/stickiness/value", 1.0, "at most 0.999"),
    ("agreement that falls", "exits/agreement/below/value", 0.99, "confidence must help"),
    (
        "too few shares",
        "exits/candidates/opt-1.3b/exit_shares/chat/value",
        [0.5, 0.5],
        "2 shares were given for the 3 exits",
    ),
    (
        "shares that do not sum to 1",
        "exits/candidates/opt-1.3b/exit_shares/chat/value",
        [0.5, 0.2, 0.2],
        "sum to 0.9",
    ),
    ("an impossible perplexity", "exits/candidates/opt-1.3b/perplexity/value", 0.5, "at least 1"),
    ("seconds that are missing", f"{COEFFICIENT}/value", None, "null and 'unavailable' belong"),
    ("seconds called unavailable", f"{COEFFICIENT}/grade", "unavailable", "only joules and watts"),
    (
        "watts called unavailable beside a value",
        "device/idle_w/grade",
        "unavailable",
        "null and 'unavailable' belong",
    ),
    ("an origin nobody knows", "provenance/origin", "hearsay", "Allowed are 'published'"),
]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [mistake[1:] for mistake in MISTAKES],
    ids=[mistake[0] for mistake in MISTAKES],
)
def test_a_mistake_is_told_what_and_where(
    tmp_path: Path, document: Document, place: str, value: Any, message: str
) -> None:
    set_at(document, place, value)
    folder = write(tmp_path / "mine", document)
    with pytest.raises(InputError, match=message) as caught:
        load_profile(folder)
    assert caught.value.where is not None
    assert str(folder / PROFILE_FILE) in caught.value.where


@pytest.mark.parametrize("place", ["loading", "device/idle_w", f"{COEFFICIENT}/grade", COEFFICIENT])
def test_a_missing_number_is_named(tmp_path: Path, document: Document, place: str) -> None:
    *path, last = place.split("/")
    node: Any = document
    for key in path:
        node = node[key]
    del node[last]
    with pytest.raises(InputError, match=f"{last!r} is missing"):
        load_profile(write(tmp_path / "mine", document))


def test_every_model_needs_exit_statistics_and_no_other(tmp_path: Path, document: Document) -> None:
    candidates = document["exits"]["candidates"]
    moved = candidates.pop("opt-6.7b")
    with pytest.raises(InputError, match=r"model 'opt-6\.7b' is missing"):
        load_profile(write(tmp_path / "mine", document))
    candidates["opt-6.7"] = moved
    with pytest.raises(InputError, match=r"Did you mean 'opt-6\.7b'"):
        load_profile(write(tmp_path / "mine", document))


@pytest.mark.parametrize("name", ["batch_residual", "depth_residual"])
def test_the_knots_of_a_residual_must_rise_and_be_positive(
    name: str, tmp_path: Path, document: Document
) -> None:
    for knots, message in (
        ([[4, 1.0], [2, 1.0]], "must rise"),
        ([[1, 0.0]], "must be greater"),
        ([1, 2], "knot"),
    ):
        entry = quantity(name, knots, "measured", "this device")
        document["models"]["opt-1.3b"][name] = entry
        with pytest.raises(InputError, match=message):
            load_profile(write(tmp_path / "mine", document))


def test_a_markov_section_is_read_into_its_statistics() -> None:
    exits = load_profile("opt-a100-40gb").exits
    assert isinstance(exits, MarkovExits)
    assert exits.domains == ("chat", "code")
    assert exits.candidates["opt-1.3b"].exit_layers == (6, 12, 24)
    assert exits.candidates["opt-1.3b"].exit_shares["chat"] == (0.730, 0.047, 0.223)


def without_energy(document: Document, keep: tuple[str, ...] = ()) -> Document:
    """The document of a device without a meter."""
    gone = {"value": None, "grade": "unavailable", "source": "no meter answered"}
    for place in ("idle_w", "active_w", "load_w"):
        document["device"][place] |= gone
    for model in document["models"].values():
        for name, entry in model["coefficients"].items():
            if entry["unit"][0] in "JW" and name not in keep:
                entry |= gone
    return document


def test_a_shipped_profile_knows_its_energy() -> None:
    profile = load_profile("opt-a100-40gb")
    assert profile.has_energy
    assert "unavailable" not in profile.grade_counts()


def test_energy_without_a_meter_is_unavailable_and_times_still_work(
    tmp_path: Path, document: Document
) -> None:
    profile = save_profile(without_energy(document), tmp_path / "mine")
    assert not profile.has_energy
    number = profile.quantities["models.opt-1.3b.coefficients.decode.j_per_layer"]
    assert number.value is None
    assert number.grade == "unavailable"
    assert number.source == "no meter answered"
    assert profile.grade_counts()["unavailable"] == 3 + 2 * 14
    model = profile.models["opt-1.3b"]
    assert model.coefficients["power.active_w"] is None
    original = load_profile("opt-a100-40gb").models["opt-1.3b"].coefficient_array()
    array = model.coefficient_array()
    for index, name in enumerate(COEFFICIENTS):
        expected = original[index] if unit_of(name)[0] == "s" else 0.0
        assert array[index] == expected, name


def test_one_missing_joule_is_enough_for_energy_to_be_unknown(
    tmp_path: Path, document: Document
) -> None:
    entry = document["models"]["opt-6.7b"]["coefficients"]["head.j_base"]
    entry |= {"value": None, "grade": "unavailable"}
    assert not save_profile(document, tmp_path / "mine").has_energy


def test_an_unknown_power_limit_beside_known_joules_limits_nothing(
    tmp_path: Path, document: Document
) -> None:
    for model in document["models"].values():
        model["coefficients"]["power.limit_w"] |= {"value": None, "grade": "unavailable"}
    profile = save_profile(document, tmp_path / "mine")
    assert profile.has_energy
    array = profile.models["opt-1.3b"].coefficient_array()
    assert iteration_joules(array, 0.01, 1e9) > 1e9
    assert iteration_joules(array, 0.0, 0.0) == 0.0


def test_leaving_the_measured_range_is_said_in_words(tmp_path: Path, document: Document) -> None:
    document["models"]["opt-1.3b"]["hull"] = {"max_batch": 64, "max_context_tokens": 2048}
    profile = save_profile(document, tmp_path / "mine")
    model = profile.models["opt-1.3b"]
    assert model.beyond_hull(64, 2048) is None
    assert model.beyond_hull(65, 100) == (
        "opt-1.3b: batches up to 65 where 64 was the largest measured"
    )
    said = model.beyond_hull(70, 4000)
    assert said is not None
    assert "batches up to 70" in said
    assert "contexts up to 4000" in said
    assert profile.models["opt-6.7b"].beyond_hull(10_000, 10_000) is None


@pytest.mark.parametrize("kind", ["entropy", "calibrated-entropy"])
def test_confidence_may_be_an_entropy(tmp_path: Path, document: Document, kind: str) -> None:
    document["models"]["opt-1.3b"]["confidence"]["kind"] = kind
    profile = save_profile(document, tmp_path / "mine")
    assert profile.models["opt-1.3b"].confidence.kind == kind
