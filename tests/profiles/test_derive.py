"""A derived profile: what bounds a number says how it scales, and nothing claims to be read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from helios_sim import cost
from helios_sim.cli import main, profiles_app
from helios_sim.errors import InputError
from helios_sim.profile import GRADES
from helios_sim.profiles import published
from helios_sim.profiles.derive import OPTIONS, RULES, Device, amount, derive, write_derived
from helios_sim.profiles.files import load_profile, shipped_names
from helios_sim.profiles.roofline import decode

ROOT = Path(__file__).parents[2]
A100 = {"bytes_per_s": 1555e9, "flops_per_s": 312e12}
L40S = Device(
    "NVIDIA L40S",
    memory_bytes=48 * 2**30,
    bytes_per_s=864e9,
    flops_per_s=362e12,
    launch_s=0.1e-3,
    fixed_s=0.5e-3,
    limit_w=350.0,
)


def coefficients(document: dict[str, Any], model: str) -> dict[str, float]:
    """The coefficients of a model by name."""
    entries = document["models"][model]["coefficients"]
    return {name: entry["value"] for name, entry in entries.items()}


def run(*arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", shipped_names())
def test_a_device_of_the_same_figures_takes_the_same_seconds_to_the_last_bit(
    name: str, tmp_path: Path
) -> None:
    given = load_profile(name)
    alike = Device("another", 1.0 * given.device.memory_bytes, 1555e9, 312e12)
    alike = replace(alike, from_bytes_per_s=1555e9, from_flops_per_s=312e12)
    derived = write_derived(given, "alike", alike, tmp_path / "alike")
    for model, own in given.models.items():
        there = derived.models[model]
        assert there.coefficient_array().tobytes() == own.coefficient_array().tobytes()
        assert decode(there, 4, 3) == decode(own, 4, 3)
        assert there.residual(8, 4).tobytes() == own.residual(8, 4).tobytes()
        assert (there.model, there.hull) == (own.model, own.hull)
    assert (derived.loading, derived.has_energy) == (given.loading, given.has_energy)


def test_half_the_bandwidth_doubles_what_is_bound_by_bytes_and_nothing_else() -> None:
    given = load_profile("opt-a100-40gb")
    before = coefficients(dict(given.document), "opt-6.7b")
    after = coefficients(derive(given, "half", Device("half", bytes_per_s=777.5e9)), "opt-6.7b")
    for name, rule in RULES.items():
        if name not in before:
            continue
        if rule == "bytes":
            assert after[name] == pytest.approx(2.0 * before[name], rel=1e-11)
        elif rule == "both":
            assert before[name] < after[name] < 2.0 * before[name]
        else:
            assert after[name] == before[name]


@pytest.mark.parametrize("model", ["llama2-7b", "llama2-13b", "llama3-8b"])
def test_a_profile_of_a_roofline_becomes_the_roofline_of_the_other_data_sheet(model: str) -> None:
    """Scaling gives what the recipe gives for the board, but for what its launches leave."""
    recipe = next(one for one in published.recipes() if one.name == "layerskip-h100-80gb")
    eager = replace(recipe.eager, launch_s=published.EAGER_A100.launch_s)
    built = coefficients(published.build(replace(recipe, eager=eager)), model)
    h100 = Device("H100", 80 * 2**30, 3350e9, 989e12, limit_w=700.0, idle_w=75.0, active_w=150.0)
    h100 = replace(h100, load_w=120.0, fixed_s=0.5e-3)
    derived = coefficients(derive(load_profile("layerskip-a100-40gb"), "h100", h100), model)
    assert set(derived) == set(built)
    apart = {
        name for name in built if derived[name] != pytest.approx(built[name], rel=1e-5, abs=1e-30)
    }
    assert apart == {"rebatch.overhead_s"}


def test_no_grade_is_better_than_it_was_and_none_of_the_device_is_better_than_derived(
    tmp_path: Path,
) -> None:
    given = load_profile("small-family-cpu")
    assert given.grade_counts()["measured"] > 0
    document = derive(given, "fast", Device("fast", launch_s=1e-5, memory_bytes=2.0**34))
    text = json.dumps(document)
    assert '"measured"' not in text
    assert '"error"' not in text
    a100 = load_profile("opt-a100-40gb")
    derived = write_derived(a100, "other", L40S, tmp_path / "other")
    for place, number in derived.quantities.items():
        before = a100.quantities[place]
        assert GRADES.index(number.grade) >= GRADES.index(before.grade) or "given" in number.source
        of_the_device = place.startswith(("device.", "loading.")) or ".coefficients." in place
        if of_the_device:
            assert number.grade in ("derived", "assumed")
            assert number.source.startswith(("from opt-a100-40gb, ", "given as --"))
        elif number.grade == "published":
            assert number == before


def test_the_source_of_a_number_says_what_was_done_to_it(tmp_path: Path) -> None:
    given = load_profile("layerskip-a100-40gb")
    found = write_derived(given, "other", L40S, tmp_path / "other").quantities
    place = "models.llama2-7b.coefficients.decode"
    assert found[f"{place}.memory_s_per_layer"].source == (
        "from layerskip-a100-40gb, by memory bandwidth, 1555 / 864 GB/s (the same share assumed); "
        "there: roofline: bytes at 80% (assumed) of NVIDIA A100-SXM4-40GB bandwidth"
    )
    assert "by the power above active, 253.75 / 290 W" in found[f"{place}.j_per_layer"].source
    assert found[f"{place}.launch_s"].source == "given as --launch"
    assert "unchanged" in found["loading.host.bytes_per_s"].source


def test_every_coefficient_has_a_rule_and_stands_under_it_in_the_documentation() -> None:
    assert set(RULES) == set(cost.COEFFICIENTS)
    page = (ROOT / "docs" / "derive.md").read_text(encoding="utf-8")
    section = page.split("## A device that is not here")[1].split("\n## ")[0]
    told = {
        rule: set(re.findall(r"`([a-z_]+\.[a-z_]+)`", names))
        for rule, names in re.findall(r"^\| ([a-z ]+) \| .* \| (.*) \|$", section, re.MULTILINE)
    }
    for rule in set(RULES.values()):
        assert told[rule] == {name for name, own in RULES.items() if own == rule}
    assert not [option for option, _ in OPTIONS.values() if f"`{option}`" not in section]


def test_the_worked_example_in_the_documentation_is_what_the_profile_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "derive.md").read_text(encoding="utf-8")
    section = page.split("## A device that is not here")[1].split("\n## ")[0]
    command = next(
        line
        for line in section.replace("\\\n", " ").splitlines()
        if line.startswith("helios profiles derive")
    )
    out = tmp_path / "l40s"
    assert run(*command.replace("profiles/l40s", str(out)).split()[1:]) == 0
    for name, folder in (("layerskip-a100-40gb", None), ("l40s", out)):
        profile = load_profile(folder or name)
        model = profile.models["llama2-7b"]
        c = model.coefficient_array()
        layer_s, _ = cost.layer_seconds(c, 1.0, 512.0, 512.0, 0.0, 0.0, 0.0)
        seconds, _ = decode(model, 32)
        left = int(0.9 * profile.device.memory_bytes) - model.model.weight_bytes(32)
        left -= model.workspace_bytes
        blocks = left // (16 * model.model.kv_bytes_per_token(32))
        figures = (
            f"{1e3 * layer_s:.3f} ms",
            f"{1e3 * cost.head_seconds(c, 1.0):.3f} ms",
            f"{1e3 * seconds:.2f} ms",
            f"{blocks:,} blocks",
            f"{blocks / 32:.1f} requests",
        )
        assert [figure for figure in figures if figure not in section] == []


SCENARIO = """
name = "derived"
[workload]
num_requests = 30
arrivals = { kind = "poisson", rate_per_s = 2.0 }
prompt = { kind = "constant", tokens = 50 }
output = { kind = "constant", tokens = 10 }
[fleet]
profile = "l40s"
candidates = ["llama2-7b"]
[[policy]]
use = "helios"
"""


def test_each_number_of_a_device_is_taken_by_the_option_that_its_errors_name() -> None:
    group: Any = typer.main.get_command(profiles_app)
    flags = {one.name: one.opts for one in group.commands["derive"].params}
    assert {key: flags[key] for key in OPTIONS} == {key: [OPTIONS[key][0]] for key in OPTIONS}


def test_a_derived_profile_loads_simulates_and_can_be_derived_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO, encoding="utf-8")
    first = ("profiles", "derive", "--from", "layerskip-a100-40gb", "--bandwidth", "864GB/s")
    assert run(*first, "--out", tmp_path / "l40s") == 0
    assert "Profile: " in capsys.readouterr().out
    assert run("simulate", tmp_path / "s.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["completed"] == 30
    again = ("profiles", "derive", "--from", tmp_path / "l40s", "--bandwidth", "1555e9")
    assert run(*again, "--out", tmp_path / "back") == 0
    back, given = load_profile(tmp_path / "back"), load_profile("layerskip-a100-40gb")
    for model, own in given.models.items():
        assert back.models[model].coefficient_array() == pytest.approx(own.coefficient_array())


def test_exit_traces_travel_with_the_profile_and_its_readings_do_not(tmp_path: Path) -> None:
    given = load_profile("small-family-cpu")
    derived = write_derived(given, "big", Device("big", memory_bytes=2.0**36), tmp_path / "big")
    assert {path.name for path in derived.folder.iterdir()} == {"profile.json", "exits.parquet"}
    assert (derived.folder / "exits.parquet").read_bytes() == (
        given.folder / "exits.parquet"
    ).read_bytes()
    assert derived.is_of_processor
    assert derived.provenance.origin == "derived"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Nothing was given that tells the device from that of 'layerskip-a100-40gb'"),
        (["--bandwidth", "-1"], "--bandwidth: '-1' was given; allowed is a number above 0"),
        (["--bandwidth", "nan"], "allowed is a number above 0 of bytes a second, such as 864GB/s"),
        (["--bandwidth", "864"], "allowed is up to 1000 times more or less"),
        (["--memory", "48 gigs"], "'48 gigs' was given; allowed is a number above 0 of bytes, "),
        (["--memory", "48"], "--memory: 48 B was given, and 'layerskip-a100-40gb' has 4.29497e+10"),
        (["--launch", "0"], "--launch: '0' was given; allowed is a number above 0 of seconds"),
        (["--fixed", "0.5"], "--fixed: 0.5 s was given, which no device has: an iteration takes"),
        (
            ["--launch", "0.1"],
            "allowed is 1e-07 to 0.005 s, so give seconds, such as 0.1ms or 1e-4",
        ),
        (["--launch", "1e-8"], "--launch: 1e-08 s was given, which no device has: a layer's floor"),
        (["--watts", "0.35"], "--watts: 0.35 W was given, which no device has: boards draw from"),
        (["--watts", "350000"], "allowed is 0.5 to 5000 W, so give watts, such as 350"),
        (["--idle-watts", "0.05"], "--idle-watts: 0.05 W was given, which no device has"),
        (["--memory", "48Gb"], "--memory: '48Gb' was given; allowed is a number above 0 of bytes"),
        (["--bandwidth", "864gb/s"], "'864gb/s' was given; allowed is a number above 0 of bytes a"),
        (["--watts", "350mW"], "'350mW' was given; allowed is a number above 0 of watts"),
        (["--watts", "100", "--active-watts", "110"], "110 W is not below the power limit of 100"),
        (["--idle-watts", "200"], "The idle power of 200 W is above the active power of 110 W"),
        (["--load-watts", "10"], "is above the power while weights move of 10 W"),
        (
            ["--bandwidth", "864GB/s", "--name", "opt-a100-40gb"],
            "is the name of an existing",
        ),
        (["--bandwidth", "864GB/s", "--name", "a/b"], "'a/b' was given; allowed is a name without"),
        (["--flops", "1PFLOP/s", "--name", " "], "' ' was given; allowed is a name without"),
    ],
)
def test_nonsense_is_refused_in_words_and_leaves_no_folder(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("profiles", "derive", "--from", "layerskip-a100-40gb", "--out", tmp_path / "new")
    assert run(*command, *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bandwidth", "100GB/s"], "give --from-bandwidth and --from-flops too"),
        (["--watts", "100"], "'small-family-cpu' has no energy to scale"),
    ],
)
def test_what_a_profile_does_not_say_cannot_be_scaled(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("profiles", "derive", "--from", "small-family-cpu", "--out", tmp_path / "new")
    assert run(*command, *options) == 2
    assert said in capsys.readouterr().err
    given = ["--from-bandwidth", "50GB/s", "--from-flops", "1TFLOP/s", "--bandwidth", "100GB/s"]
    assert run(*command, *given) == 0


def test_a_folder_is_replaced_only_if_asked_and_only_if_it_is_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    command = ("profiles", "derive", "--from", "opt-a100-40gb", "--out", out)
    assert run(*command, "--bandwidth", "2TB/s") == 0
    assert run(*command, "--bandwidth", "3TB/s") == 2
    assert "--overwrite to replace the profile" in capsys.readouterr().err
    assert run(*command, "--bandwidth", "3TB/s", "--overwrite") == 0
    assert "1555 / 3000 GB/s" in (out / "profile.json").read_text(encoding="utf-8")
    (out / "letter.txt").write_text("kept", encoding="utf-8")
    assert run(*command, "--bandwidth", "4TB/s", "--overwrite") == 2
    assert "it holds letter.txt" in capsys.readouterr().err
    assert (out / "letter.txt").exists()


def test_an_amount_has_a_unit_or_is_in_the_base_unit() -> None:
    assert amount("48GiB", "--memory", "bytes") == 48 * 2**30
    assert amount(" 864 GB/s", "--bandwidth", "bytes/s") == amount("864e9", "", "bytes/s") == 864e9
    assert amount("0.1ms", "--launch", "seconds") == pytest.approx(1e-4)
    for text in ("48gb", "48GB", "48 GB", "48e9"):
        assert amount(text, "--memory", "bytes") == 48e9
    assert amount("48gib", "--memory", "bytes") == 48 * 2**30
    for text in ("362TFLOPS", "362 TFLOPs", "362teraFLOPS", "362tflops", "0.362 PFLOP/s"):
        assert amount(text, "--flops", "flops") == pytest.approx(362e12)
    assert amount("362e12FLOPS", "--flops", "flops") == 362e12
    for text in ("0.35kW", "0.35 kw", "350W", "350"):
        assert amount(text, "--watts", "watts") == pytest.approx(350.0)
    for text in ("", "GiB", "1e999", "48GB/s", "4_8_", "inf", "0"):
        with pytest.raises(InputError, match="was given; allowed is a number above 0"):
            amount(text, "--memory", "bytes")


def test_every_figure_that_changed_is_told_with_what_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what follows another figure; what stayed is left out, and two models share a line."""
    command = ("profiles", "derive", "--from", "layerskip-a100-40gb", "--out", tmp_path / "new")
    told = ("--launch", "0.1ms", "--watts", "0.2kW", "--flops", "362TFLOPS", "--memory", "48GiB")
    assert run(*command, *told, "--load-bandwidth", "10GB/s") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "where layerskip-a100-40gb has" in line] == [
        "Peak: 362 TFLOP/s, where layerskip-a100-40gb has 312 TFLOP/s.",
        "Memory: 48 GiB, where layerskip-a100-40gb has 40 GiB.",
        "Link from the host: 10 GB/s, where layerskip-a100-40gb has 20 GB/s.",
        "Launch floor of a layer: 0.1 ms, where layerskip-a100-40gb has 0.8 ms.",
        "Power limit: 200 W, where layerskip-a100-40gb has 400 W.",
        "Idle power: 27.5 W, where layerskip-a100-40gb has 55 W.",
        "Active power: 55 W, where layerskip-a100-40gb has 110 W.",
        "Power while weights move: 45 W, where layerskip-a100-40gb has 90 W.",
    ]


def test_a_launch_floor_that_stays_and_binds_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More bandwidth gains nothing where launching takes longer than reading the weights."""
    command = ("profiles", "derive", "--from", "layerskip-h100-80gb", "--bandwidth", "4.8TB/s")
    assert run(*command, "--out", tmp_path / "kept") == 0
    # A layer of llama2-13b is the largest: 634.4 MB at 80 % of 4.8 TB/s.
    assert (
        "Launch floor of a layer: 0.48 ms, as in layerskip-h100-80gb. Weights take at most "
        "0.16521 ms, so in small batches decoding is no faster; --launch gives another floor."
    ) in " ".join(capsys.readouterr().out.split())
    assert run(*command, "--launch", "0.03ms", "--out", tmp_path / "given") == 0
    assert "no faster" not in capsys.readouterr().out
    command = ("profiles", "derive", "--from", "layerskip-h100-80gb", "--memory", "141GB")
    assert run(*command, "--out", tmp_path / "memory") == 0
    assert "no faster" not in capsys.readouterr().out


def test_the_list_of_profiles_takes_json_and_a_derivation_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("profiles", "--json") == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == shipped_names()
    words = ("--from", "opt-a100-40gb", "--out", "x", "--flops", "1e15")
    assert run("profiles", "--json", "derive", *words) == 2
    assert "--json applies only to the list" in capsys.readouterr().err
