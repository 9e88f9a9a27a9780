"""A scenario may take any number of its profile otherwise; what hangs on it is then seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.experiment import prepare, run_policy
from helios_sim.profiles.files import load_profile
from helios_sim.report.page import render
from helios_sim.report.words import serving
from helios_sim.scenario import load_scenario, of_a_run, parse_scenario, resolved
from helios_sim.settings.toml_writer import toml_text
from tests.test_cli import run

SCENARIO = Path(__file__).parents[2] / "scenarios" / "helios_opt.toml"
FILL = "models.*.coefficients.kv_fill.floor_s_per_layer"


def test_a_number_is_replaced_and_says_what_it_was() -> None:
    plain = load_profile("opt-a100-40gb")
    taken = load_profile("opt-a100-40gb", None, {"exits.stickiness": 0.5})
    number = taken.quantities["exits.stickiness"]
    assert (number.value, number.grade, number.error) == (0.5, "assumed", None)
    assert "0.768448 in the profile (assumed)" in number.source
    assert [one.said() for one in taken.assumptions] == [
        "exits.stickiness = 0.5 (profile: 0.768448, assumed)"
    ]
    assert taken.hash != plain.hash
    assert taken.hash != load_profile("opt-a100-40gb", None, {"exits.stickiness": 0.6}).hash
    assert load_profile("opt-a100-40gb", None, {}).hash == plain.hash
    assert not plain.assumptions


def test_a_star_stands_for_every_model_and_names_may_hold_dots() -> None:
    taken = load_profile("opt-a100-40gb", None, {FILL: 0.0})
    places = {place.replace("*", name) for place in [FILL] for name in taken.models}
    assert {one.place for one in taken.assumptions} == places
    assert all(taken.quantities[place].value == 0.0 for place in places)
    shares = "exits.candidates.opt-1.3b.exit_shares.chat"
    one = load_profile("opt-a100-40gb", None, {shares: (0.5, 0.25, 0.25)})
    assert one.quantities[f"{shares}[1]"].value == 0.25
    assert [made.said() for made in one.assumptions] == [
        f"{shares} = [0.5, 0.25, 0.25] (profile: [0.73, 0.047, 0.223], published)"
    ]


def test_a_coefficient_that_the_profile_leaves_out_may_be_assumed() -> None:
    place = "models.*.coefficients.decode.fixed_s_per_row"
    plain = load_profile("opt-a100-40gb")
    taken = load_profile("opt-a100-40gb", None, {place: 5e-5})
    assert [one.said() for one in taken.assumptions] == [
        f"{place.replace('*', name)} = 5e-05 (profile: 0, left out)" for name in plain.models
    ]
    for name, model in plain.models.items():
        assert model.coefficients["decode.fixed_s_per_row"] == 0.0
        assert taken.models[name].coefficients == {
            **model.coefficients,
            "decode.fixed_s_per_row": 5e-5,
        }
    assert "decode.fixed_s_per_row" not in plain.document["models"]["opt-1.3b"]["coefficients"]


def test_a_number_that_no_meter_read_may_be_assumed() -> None:
    place = "device.idle_w"
    assert load_profile("small-family-cpu").quantities[place].value is None
    taken = load_profile("small-family-cpu", None, {place: 20.0})
    assert taken.quantities[place].value == 20.0
    assert taken.assumptions[0].said() == "device.idle_w = 20 (profile: unavailable, unavailable)"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("exits.stickines", 0.5, "Did you mean 'exits.stickiness'?"),
        ("models.*.launch_s", 0.5, "has no number at 'models.*.launch_s'"),
        ("name", 0.5, "has no number at 'name'"),
        ("exits", 0.5, "has no number at 'exits'"),
        ("exits.stickiness", 2.0, "at most 0.999 allowed"),
        ("exits.stickiness", (0.5, 0.6), "exits.stickiness is one number in the profile"),
        ("models.opt-1.3b.exit_layers", 6.0, "is an array of numbers in the profile"),
        ("device.memory_bytes", 1.5, "must be whole"),
        (FILL, -1.0, "must be at least 0"),
    ],
)
def test_a_place_or_value_that_cannot_be_is_told(place: str, value: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_profile("opt-a100-40gb", None, {place: value})
    assert said in str(caught.value)


def test_a_place_of_its_own_has_the_last_word_over_a_star_in_whichever_order() -> None:
    one = FILL.replace("*", "opt-1.3b")
    for given in ({FILL: 0.0, one: 0.001}, {one: 0.001, FILL: 0.0}):
        taken = load_profile("opt-a100-40gb", None, given)
        assert taken.quantities[one].value == 0.001
        assert taken.quantities[FILL.replace("*", "opt-6.7b")].value == 0.0
        assert sorted(made.said() for made in taken.assumptions) == [
            f"{one} = 0.001 (profile: 0.00012, assumed)",
            f"{FILL.replace('*', 'opt-6.7b')} = 0 (profile: 0.00012, assumed)",
        ]
    with pytest.raises(InputError, match=r"is meant by .* too; give one of the two"):
        load_profile("opt-a100-40gb", None, {FILL: 0.0, one.replace("models", "*"): 0.001})


@pytest.mark.parametrize("value", ["true", '"a"', "[]", "nan", '["a"]', "[[1.0]]"])
def test_only_numbers_and_arrays_of_them_replace_numbers(value: str) -> None:
    with pytest.raises(InputError, match="a number of the profile is replaced by a number"):
        load_scenario(SCENARIO, [f"fleet.assume.exits.stickiness={value}"])


def test_quoted_places_and_nested_tables_mean_the_same_and_the_command_line_comes_last(
    tmp_path: Path,
) -> None:
    by_table = load_scenario(SCENARIO, ["fleet.assume.exits.stickiness=0.5"])
    assert by_table.fleet.assume == {"exits.stickiness": 0.5}
    written = tmp_path / "written.toml"
    written.write_text(toml_text(resolved(by_table)))
    assert '"exits.stickiness" = 0.5' in written.read_text()
    assert load_scenario(written).fleet.assume == by_table.fleet.assume
    again = load_scenario(written, ["fleet.assume.exits.stickiness=0.6"])
    assert again.fleet.assume == {"exits.stickiness": 0.6}
    assert load_scenario(SCENARIO).fleet.assume is None
    assert "assume" not in resolved(load_scenario(SCENARIO))["fleet"]


def played(*changes: str) -> Any:
    scenario = load_scenario(SCENARIO, ["workload.num_requests=40", *changes])
    early = next(one for one in scenario.policy if one.name == "early exits OPT-1.3B")
    return run_policy(prepare(scenario, SCENARIO.parent), early)


def test_a_run_follows_the_assumption_and_names_it_on_its_page() -> None:
    """Filling the KV of skipped layers costs early exits a tenth of their time here."""
    plain, taken = played(), played(f"fleet.assume.{FILL}=0")
    assert taken.summary["output_throughput"] > 1.05 * plain.summary["output_throughput"]
    said = taken.run.environment["assumed"]
    assert len(said) == 2
    assert "assumed" not in plain.run.environment
    assert said[0] in render([taken.run], [taken.summary])
    again = parse_scenario(of_a_run(taken.run.scenario), "again", SCENARIO.parent)
    assert again.fleet.assume == {FILL: 0}


@pytest.mark.parametrize("place", ["device.active_w", "device.*"])
def test_a_number_that_nothing_goes_by_is_not_assumed(place: str) -> None:
    """Each model's active power counts; the device's stands beside it for who reads a profile."""
    scenario = load_scenario(SCENARIO, [f"fleet.assume.{place}=250"])
    with pytest.raises(InputError, match=r"assume models\.\*\.coefficients\.power\.active_w"):
        prepare(scenario, SCENARIO.parent)


def test_an_assumption_is_blamed_for_itself_and_not_on_a_file_of_the_profile() -> None:
    for place, said in (("stickiness=2", "at most 0.999"), ("stick=0.5", "has no number at")):
        with pytest.raises(InputError, match=said) as caught:
            prepare(load_scenario(SCENARIO, [f"fleet.assume.exits.{place}"]), SCENARIO.parent)
        assert "fleet.assume, profile opt-a100-40gb, exits.stick" in str(caught.value)
        assert "profile.json, exits" not in str(caught.value)


def test_where_one_of_two_runs_assumes_it_is_named(tmp_path: Path) -> None:
    plain, taken = played(), played(f"fleet.assume.{FILL}=0")
    told = [plain.summary | {"label": "plain"}, taken.summary | {"label": "taken"}]
    said = serving([plain.run.environment, taken.run.environment], told)
    assert [text for text in said if text.startswith("Assumed: ")] == [
        f"Assumed: {FILL.replace('*', 'opt-1.3b')} = 0 (profile: 0.00012, assumed) and "
        f"{FILL.replace('*', 'opt-6.7b')} = 0 (profile: 0.00012, assumed) (taken)."
    ]


def test_the_terminal_names_what_was_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("--set", "workload.num_requests=5", "--set", "fleet.assume.exits.stickiness=0.5")
    assert run("simulate", SCENARIO, "--policy", "helios", *changes, "--out", tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Assumed: exits.stickiness = 0.5 (profile: 0.768448, assumed)." in printed
