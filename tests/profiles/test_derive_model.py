"""A model derived from its shape: what each number grows with, and that nothing claims more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helios_sim import cost
from helios_sim.errors import InputError
from helios_sim.exits import load_traces
from helios_sim.model import PUBLIC_SHAPES, ModelShape
from helios_sim.profile import GRADES
from helios_sim.profiles.derive import RULES, Device
from helios_sim.profiles.derive_model import (
    Wanted,
    derive_with_models,
    figures_of,
    wanted_of,
    write_with_models,
)
from helios_sim.profiles.files import load_profile
from tests.profiles.test_derive import coefficients, run

ROOT = Path(__file__).parents[2]
H100 = "layerskip-h100-80gb"
QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
}


def config_of(shape: ModelShape, **changes: Any) -> dict[str, Any]:
    """The configuration of a Llama or OPT shape."""
    is_opt = shape.family == "opt"
    own = {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return {
        "model_type": shape.family,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "ffn_dim" if is_opt else "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied_head,
        **({} if is_opt else own),
        **changes,
    }


def written(folder: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def same_device(profile: str) -> Device:
    return Device(load_profile(profile).device.name)


@pytest.mark.parametrize(
    ("base", "like"),
    [(H100, "llama3-8b"), ("opt-a100-40gb", "opt-6.7b"), ("small-family-cpu", "code-8l")],
)
def test_a_model_of_the_same_shape_has_the_same_numbers_to_the_last_bit(
    base: str, like: str, tmp_path: Path
) -> None:
    given = load_profile(base)
    file = written(tmp_path, config_of(given.models[like].model.shape))
    wanted = Wanted("twin", file, like)
    derived = write_with_models(given, "twins", same_device(base), [wanted], tmp_path / "twins")
    own, there = derived.models["twin"], given.models[like]
    assert own.coefficient_array().tobytes() == there.coefficient_array().tobytes()
    assert own.residual(8, 4).tobytes() == there.residual(8, 4).tobytes()
    assert own.model.shape == there.model.shape
    assert own.model.exit_layers == there.model.exit_layers
    assert own.model.exit_head_params == there.model.exit_head_params
    assert (own.workspace_bytes, own.confidence) == (there.workspace_bytes, there.confidence)
    for name, one in given.models.items():
        kept = derived.models[name]
        assert kept.coefficient_array().tobytes() == one.coefficient_array().tobytes()
    assert (derived.device, derived.loading) == (given.device, given.loading)
    assert derived.is_of_processor == given.is_of_processor


def test_a_7b_derived_from_the_13b_is_the_7b_that_is_shipped_but_for_its_splits(
    tmp_path: Path,
) -> None:
    given = load_profile(H100)
    file = written(tmp_path, config_of(PUBLIC_SHAPES["llama2-7b"]))
    wanted = Wanted("seven", file, "llama2-13b")
    document = derive_with_models(given, "again", same_device(H100), [wanted])
    derived, shipped = coefficients(document, "seven"), coefficients(document, "llama2-7b")
    apart = {
        name: derived[name] / shipped[name] - 1.0
        for name in shipped
        if derived[name] != pytest.approx(shipped[name], rel=1e-4)
    }
    assert set(apart) == {"rebatch.overhead_s"}
    assert 0.0 < apart["rebatch.overhead_s"] < 0.03
    section = (ROOT / "docs" / "derive.md").read_text(encoding="utf-8")
    assert "0.01 %" in section.split("## A model that is not here")[1].split("\n## ")[0]


def test_numbers_grow_with_what_they_are_the_price_of(tmp_path: Path) -> None:
    """Twice the feed-forward and half the KV heads, of one model whose counts a pencil makes."""
    given = load_profile(H100)
    there = given.models["llama2-7b"].model.shape
    config = config_of(there, intermediate_size=2 * there.ffn, num_key_value_heads=16)
    wanted = Wanted("wide", written(tmp_path, config), "llama2-7b")
    document = derive_with_models(given, "wider", same_device(H100), [wanted])
    after, before = coefficients(document, "wide"), coefficients(document, "llama2-7b")
    # Queries, keys, values and output 4 x 4096^2, feed-forward 3 x 4096 x 11008, two norms.
    layer_before = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    layer_after = 3 * 4096**2 + 2 * 3 * 4096 * 11008 + 2 * 4096
    by_layer = layer_after / layer_before
    for name in ("decode.memory_s_per_layer", "decode.compute_s_per_row", "prefill.j_per_layer"):
        assert after[name] == pytest.approx(by_layer * before[name], rel=1e-9)
    for name in ("decode.memory_s_per_context_token", "kv_fill.base_s_per_layer"):
        assert after[name] == pytest.approx(0.5 * before[name], rel=1e-9)
    for name, value in before.items():
        part = name.split(".")[0]
        if part in ("head", "check", "power") or RULES[name] not in ("bytes", "flops", "both"):
            assert after[name] == value
    assert after["prefill.compute_s_per_pair"] == before["prefill.compute_s_per_pair"]


def test_no_number_of_a_derived_model_is_better_than_derived_and_each_says_from_which(
    tmp_path: Path,
) -> None:
    given = load_profile("small-family-cpu")
    shape = given.models["code-8l"].model.shape
    file = written(tmp_path, config_of(shape, num_hidden_layers=16))
    wanted = Wanted("deep", file, "code-8l", (4, 8, 12))
    derived = write_with_models(
        given, "deeper", same_device("small-family-cpu"), [wanted], tmp_path / "deeper"
    )
    for place, number in derived.quantities.items():
        if not place.startswith("models.deep."):
            assert number == given.quantities[place]
        elif ".shape." in place:
            assert number.grade == "published"
        else:
            assert number.grade in ("derived", "assumed", "unavailable")
            assert number.error is None
            there = given.quantities.get(place.replace("models.deep.", "models.code-8l."))
            if there is not None and "given as --exits" not in number.source:
                assert GRADES.index(number.grade) >= GRADES.index(there.grade)
        if place.startswith("models.deep.coefficients.") and number.grade != "unavailable":
            assert number.source.startswith("from code-8l of small-family-cpu, ")
    assert derived.stand_ins == {"deep": "code-8l"}
    assert "ASSUMED to be those of code-8l after 2, 4, 6, 8" in derived.provenance.notes[0]
    assert derived.provenance.origin == "derived"
    assert "measurement" not in derived.document


def test_measured_traces_are_taken_over_exit_by_exit(tmp_path: Path) -> None:
    given = load_profile("small-family-cpu")
    shape = given.models["code-8l"].model.shape
    file = written(tmp_path, config_of(shape, num_hidden_layers=16))
    wanted = Wanted("deep", file, "code-8l", (4, 8, 12))
    derived = write_with_models(
        given, "deeper", same_device("small-family-cpu"), [wanted], tmp_path / "deeper"
    )
    before, after = load_traces(given), load_traces(derived)
    assert after.exit_layers["deep"] == (4, 8, 12, 16)
    for field in ("confidence", "agrees", "nll_nats"):
        arrays, there = getattr(after, field), getattr(before, field)
        assert np.array_equal(arrays["deep"], there["code-8l"])
        assert np.array_equal(arrays["prose-8l"], there["prose-8l"])


def test_generated_traces_have_the_shares_of_the_model_that_they_are_like(tmp_path: Path) -> None:
    given = load_profile("opt-a100-40gb")
    file = written(tmp_path, config_of(PUBLIC_SHAPES["opt-6.7b"], num_hidden_layers=40))
    wanted = Wanted("opt-8b", file, "opt-6.7b", tokenizer="opt")
    derived = write_with_models(
        given, "more", same_device("opt-a100-40gb"), [wanted], tmp_path / "more"
    )
    model = derived.models["opt-8b"].model
    # 9 x 40 / 32 = 11.25, 17 x 40 / 32 = 21.25; a norm of 2 x 4096 weights for each exit.
    assert (model.exit_layers, model.tokenizer) == ((11, 21, 40), "opt")
    assert model.exit_head_params == 2 * 4096
    shares = load_traces(derived, ["opt-8b"]).share_by_exit("opt-8b", 0.5, "chat")
    assert shares == pytest.approx([0.736, 0.048, 0.216], abs=1e-3)
    grades = {
        number.grade
        for place, number in derived.quantities.items()
        if place.startswith("exits.candidates.opt-8b.")
    }
    assert grades == {"assumed"}


def test_a_model_and_a_device_are_derived_in_one_step(tmp_path: Path) -> None:
    given = load_profile(H100)
    file = written(tmp_path, QWEN2)
    wanted = Wanted("qwen2-7b", file)
    half = Device("half", bytes_per_s=1675e9)
    both = derive_with_models(given, "half", half, [wanted])
    alone = derive_with_models(given, "same", same_device(H100), [wanted])
    name = "decode.memory_s_per_layer"
    there = coefficients(alone, "qwen2-7b")[name]
    assert coefficients(both, "qwen2-7b")[name] == pytest.approx(2.0 * there, rel=1e-9)
    assert both["device"]["name"] == "half"
    assert alone["device"] == given.document["device"]


def test_stand_ins_are_remembered_when_a_device_is_derived_from_them(tmp_path: Path) -> None:
    given = load_profile(H100)
    wanted = Wanted("qwen2-7b", written(tmp_path, QWEN2))
    first = write_with_models(given, "first", same_device(H100), [wanted], tmp_path / "first")
    second = tmp_path / "second"
    assert (
        run(
            *("profiles", "derive", "--from", first.folder, "--bandwidth", "2TB/s", "--out", second)
        )
        == 0
    )
    assert load_profile(second).stand_ins == {"qwen2-7b": "llama3-8b"}


SCENARIO = f"""
name = "derived"
[workload]
num_requests = 30
arrivals = {{ kind = "poisson", rate_per_s = 2.0 }}
prompt = {{ kind = "constant", tokens = 50 }}
output = {{ kind = "constant", tokens = 10 }}
[fleet]
profile = "{H100}"
candidates = ["llama3-8b"]
[[policy]]
use = "helios"
"""


def test_the_command_says_what_it_made_and_the_answers_say_what_is_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file, out = written(tmp_path, QWEN2), tmp_path / "mine"
    command = ("profiles", "derive", "--from", H100, "--model", f"qwen2-7b={file}", "--out", out)
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert "qwen2-7b is like llama3-8b, whose layers are nearest in bytes" in said
    assert "Exits, perplexity and agreement are assumed: qwen2-7b leaves as llama3-8b does" in said
    assert re.search(r"qwen2-7b +7 11 14 18 21 25 28 +14.2 GiB +57,344 +14.35 +4.23 ", said)
    (tmp_path / "s.toml").write_text(SCENARIO, encoding="utf-8")
    chosen = ("--set", f"fleet.profile={out}", "--set", 'fleet.candidates=["qwen2-7b"]')
    assert run("simulate", tmp_path / "s.toml", *chosen, "--out", tmp_path / "runs") == 0
    assert (
        "Exits, perplexity and agreement are assumed: qwen2-7b leaves as llama3-8b does"
        in capsys.readouterr().out
    )
    page = next((tmp_path / "runs").rglob("*.html")).read_text(encoding="utf-8")
    assert "Exits, perplexity and agreement are assumed: qwen2-7b leaves as llama3-8b does" in page
    chosen = ("--set", f"fleet.profile={out}", "--set", 'fleet.candidates=["llama3-8b"]')
    assert run("simulate", tmp_path / "s.toml", *chosen, "--out", tmp_path / "other") == 0
    assert "are assumed: qwen2-7b" not in capsys.readouterr().out


def test_the_worked_example_in_the_documentation_is_what_the_profile_says(
    tmp_path: Path,
) -> None:
    given = load_profile(H100)
    wanted = Wanted("qwen2-7b", written(tmp_path, QWEN2))
    derived = write_with_models(given, "mine", same_device(H100), [wanted], tmp_path / "mine")
    page = (ROOT / "docs" / "derive.md").read_text(encoding="utf-8")
    section = page.split("## A model that is not here")[1].split("\n## ")[0]
    for one in figures_of(derived, ["llama3-8b", "qwen2-7b"]):
        own = derived.models[one.name]
        assert one.bytes_s is not None
        figures = (
            f"{1e-6 * own.model.layer_weight_bytes():.1f} MB",
            f"{1e3 * (own.coefficients['decode.memory_s_per_layer'] or 0.0):.5f} ms",
            f"{1e3 * cost.head_seconds(own.coefficient_array(), 1.0):.3f} ms",
            f"= {1e3 * one.decode_s:.2f} ms",
            f"= {1e3 * one.bytes_s:.2f} ms",
            f"= {one.kv_bytes_per_token:,} B",
        )
        assert [figure for figure in figures if figure not in section] == []


def test_numbers_of_a_model_whose_name_goes_on_are_none_of_its_own(tmp_path: Path) -> None:
    given = load_profile(H100)
    config = written(tmp_path, QWEN2)
    counts = []
    for names in (("qwen2",), ("qwen2", "qwen2.5-7b")):
        wanted = [Wanted(name, config) for name in names]
        folder = tmp_path / names[-1]
        derived = write_with_models(given, "mine", same_device(H100), wanted, folder)
        counts += [one.grade_counts for one in figures_of(derived, names)]
    alone, beside, longer = counts
    assert alone == beside == longer


def test_a_model_that_no_profile_has_is_answered_with_the_way_to_add_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO, encoding="utf-8")
    assert run("simulate", tmp_path / "s.toml", "--set", 'fleet.candidates=["opt-13b"]') == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"helios profiles derive --from {H100} --model opt-13b=config.json" in error
    assert run("simulate", tmp_path / "s.toml", "--set", 'fleet.candidates=["opt-6.7b"]') == 2
    assert "'opt-a100-40gb' has it." in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("exits", "kept"), [("8,16,24", "8,20,28,32"), ("20,24,26", "20,24,28,32"), ("28", "32")]
)
def test_fewer_exits_than_those_that_stand_in_are_answered_with_two_steps_that_work(
    exits: str, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exits to keep are those of the nearest relative depths, with room for the others."""
    file = written(tmp_path, QWEN2)
    model = ("--model", f"q={file}", "--like", "llama3-8b", "--exits", exits)
    out, step = tmp_path / "new", tmp_path / "step"
    assert run("profiles", "derive", "--from", H100, "--out", out, *model) == 2
    said = " ".join(capsys.readouterr().err.split())
    named = re.search(r"first with (--keep-exits) (llama3-8b=[\d,]+) and --out alone, then", said)
    assert named is not None
    assert run("profiles", "derive", "--from", H100, "--out", step, *named.groups()) == 0
    assert run("profiles", "derive", "--from", step, "--out", out, *model) == 0
    asked = (*(int(layer) for layer in exits.split(",")), 28)
    assert load_profile(str(out)).models["q"].model.exit_layers == tuple(sorted({*asked}))
    assert named[2] == f"llama3-8b={kept}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "qwen2-7b"], "'qwen2-7b' was given; allowed is NAME=FILE"),
        (["--model", "a|b={file}"], "with a name of letters, digits, dots"),
        (["--model", "q={missing}"], "There is no such file; give the config.json"),
        (["--model", "q={file}", "--model", "q={file}"], "'q' is given twice"),
        (["--model", "llama3-8b={file}"], "is a model of 'layerskip-h100-80gb' already; give"),
        (["--model", "q={file}", "--like", "llama3-8"], "Did you mean 'llama3-8b'?"),
        (["--model", "q={file}", "--like", "r=llama3-8b"], "no --model is named 'r'"),
        (["--model", "q={file}", "--like", "a", "--like", "b"], "'a' and 'b' were given for all"),
        (["--model", "q={file}", "--exits", "8,4"], "'8,4' was given; allowed are whole numbers"),
        (["--model", "q={file}", "--exits", "0,4"], "'0,4' was given; allowed are whole numbers"),
        (["--model", "q={file}", "--exits", "a"], "'a' was given; allowed are whole numbers"),
        (["--model", "q={file}", "--exits", "8,16,24"], "4 exits were given with the full depth"),
        (
            ["--model", "q={file}", "--exits", "2,4,6,8,10,12,16,24"],
            "are 7 (8, 12, 16, 20, 24, 28, 32); give as many, or another --like.",
        ),
        (
            ["--model", "q={file}", "--exits", "8,30"],
            "An exit after layer 30 was given; 'q' has 28",
        ),
        (["--model", "q={file}", "--tokenizer", " "], "An empty text was given"),
        (["--model", "q={shallow}"], "'q' has 3 layers, too few for 7 exits at the relative"),
        (["--model", "q={file}", "--device-name", "x"], "Nothing was given that tells the device"),
        (["--model", "q={file}", "--name", "opt-a100-40gb"], "is the name of an existing profile"),
        (["--bandwidth", "2TB/s", "--like", "llama3-8b"], "--like is of models; give a --model"),
        (["--bandwidth", "2TB/s", "--replace"], "--replace is of models; give a --model too."),
    ],
)
def test_nonsense_is_refused_in_words_and_leaves_no_folder(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "file": written(tmp_path, QWEN2),
        "shallow": written(tmp_path, {**QWEN2, "num_hidden_layers": 3}, "shallow.json"),
        "missing": tmp_path / "none.json",
    }
    out = tmp_path / "new"
    words = [option.format(**places) for option in options]
    assert run("profiles", "derive", "--from", H100, "--out", out, *words) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error
    assert not out.exists()


def test_a_model_takes_the_place_of_another_only_if_asked(tmp_path: Path) -> None:
    given = load_profile(H100)
    wanted = Wanted("llama3-8b", written(tmp_path, QWEN2))
    with pytest.raises(InputError, match="--replace to put this one in its place"):
        derive_with_models(given, "new", same_device(H100), [wanted])
    document = derive_with_models(given, "new", same_device(H100), [wanted], replacing=True)
    assert list(document["models"]) == list(given.models)
    assert document["models"]["llama3-8b"]["shape"]["layers"] == 28


def test_a_strangers_folder_is_not_replaced(tmp_path: Path) -> None:
    given = load_profile(H100)
    wanted = [Wanted("q", written(tmp_path, QWEN2))]
    out = tmp_path / "new"
    out.mkdir()
    (out / "letter.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(InputError):
        write_with_models(given, "new", same_device(H100), wanted, out, overwrite=True)
    assert (out / "letter.txt").exists()


def test_values_are_for_all_models_or_for_the_one_that_is_named() -> None:
    found = wanted_of(["a=1.json", "b=2.json"], ["llama2-7b", "b=llama3-8b"], ["b=8,16"], ["a=own"])
    assert [one.like for one in found] == ["llama2-7b", "llama3-8b"]
    assert [one.exit_layers for one in found] == [None, (8, 16)]
    assert [one.tokenizer for one in found] == ["own", None]
    assert found[0].config == Path("1.json")


def test_a_model_like_one_that_stands_on_another_stands_on_that_other(tmp_path: Path) -> None:
    """Neither itself nor one that nobody observed is what a model's exits are said to be."""
    file = written(tmp_path, QWEN2)
    given = load_profile(H100)
    wanted = [Wanted("a", file, "llama3-8b")]
    first = write_with_models(given, "first", same_device(H100), wanted, tmp_path / "first")
    device = Device(first.device.name)
    near = derive_with_models(first, "b", device, [Wanted("b", file)])
    asked = derive_with_models(first, "b", device, [Wanted("b", file, "a")])
    for document in (near, asked):
        told = document["provenance"]["environment"]["stand_ins"]
        assert told == {"a": "llama3-8b", "b": "llama3-8b"}
    again = derive_with_models(first, "c", device, [Wanted("a", file)], replacing=True)
    assert again["provenance"]["environment"]["stand_ins"] == {"a": "llama3-8b"}


@pytest.mark.parametrize(
    ("name", "like", "said"),
    [
        ("a", "a", None),
        ("llama3-8b", "a", "The exits of 'llama3-8b' would be those of 'llama3-8b'"),
        ("llama3-8b", "llama2-7b", "cannot be replaced: its exits stand in for those of 'a'"),
        ("llama2-7b", "llama2-7b", "The exits of 'llama2-7b' would be those of 'llama2-7b'"),
    ],
)
def test_no_model_stands_on_itself_nor_on_one_that_is_gone(
    name: str, like: str, said: str | None, tmp_path: Path
) -> None:
    file = written(tmp_path, QWEN2)
    wanted = [Wanted("a", file, "llama3-8b")]
    given = load_profile(H100)
    first = write_with_models(given, "first", same_device(H100), wanted, tmp_path / "first")
    device, asked = Device(first.device.name), [Wanted(name, file, like)]
    if said is None:
        derive_with_models(first, "next", device, asked, replacing=True)
        return
    with pytest.raises(InputError, match=said):
        derive_with_models(first, "next", device, asked, replacing=True)
