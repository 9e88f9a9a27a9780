"""A model with fewer exits: who would have left at one given up leaves at the next one kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helios_sim.errors import InputError
from helios_sim.exits import load_traces
from helios_sim.profiles.files import load_profile
from helios_sim.profiles.keep_exits import document_with_exits, kept_of, write_with_exits
from tests.profiles.test_derive import run

A100 = "layerskip-a100-40gb"
MEASURED = "small-family-cpu"


def test_shares_of_exits_given_up_go_to_the_next_one_kept() -> None:
    given = load_profile(A100)
    kept = kept_of(["llama2-13b=20"], given)
    assert kept == {"llama2-13b": (20, 40)}
    document = document_with_exits(given, "one-exit", kept)
    shares = document["exits"]["candidates"]["llama2-13b"]["exit_shares"]
    before = given.document["exits"]["candidates"]["llama2-13b"]["exit_shares"]
    for domain, number in shares.items():
        sixteen, twenty, *deeper = before[domain]["value"]
        assert number["value"] == pytest.approx([sixteen + twenty, sum(deeper)])
    assert (
        document["exits"]["candidates"]["llama2-7b"]
        == (given.document["exits"]["candidates"]["llama2-7b"])
    )


def test_a_token_leaves_where_it_left_or_at_the_next_exit_kept(tmp_path: Path) -> None:
    """Token by token, in generated traces."""
    given = load_profile(A100)
    derived = write_with_exits(given, "one", {"llama2-13b": (20, 40)}, tmp_path / "one")
    layers = {}
    for profile in (given, derived):
        traces = load_traces(profile)
        exits = np.array(traces.exit_layers["llama2-13b"])
        sure = traces.confidence["llama2-13b"] >= 0.5
        sure[..., -1] = True
        layers[profile.name] = exits[sure.argmax(axis=-1)]
    assert ((layers["one"] == 20) == (layers[A100] <= 20)).all()
    assert 0.1 < (layers["one"] == 20).mean() < 0.9


def test_measured_traces_keep_the_columns_of_the_exits_kept(tmp_path: Path) -> None:
    given = load_profile(MEASURED)
    there = given.models["general-12l"].model.exit_layers
    kept = kept_of([f"general-12l={there[1]}"], given)
    derived = write_with_exits(given, "fewer", kept, tmp_path / "fewer")
    before, after = load_traces(given), load_traces(derived)
    assert derived.models["general-12l"].model.exit_layers == (there[1], there[-1])
    for field in ("confidence", "agrees", "nll_nats"):
        old, new = getattr(before, field), getattr(after, field)
        assert (new["general-12l"] == old["general-12l"][..., [1, -1]]).all()
        assert (new["code-8l"] == old["code-8l"]).all()
    own, same = derived.models["general-12l"], given.models["general-12l"]
    assert own.coefficient_array().tobytes() == same.coefficient_array().tobytes()
    assert derived.quantities["models.general-12l.exit_layers[0]"].grade == "derived"


def test_the_command_writes_a_profile_that_a_scenario_can_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one-exit"
    kept = ["--keep-exits", "llama2-13b=20,40"]
    assert run("profiles", "derive", "--from", A100, *kept, "--out", out) == 0
    assert "one-exit" in capsys.readouterr().out
    assert load_profile(str(out)).models["llama2-13b"].model.exit_layers == (20, 40)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("20,40", "allowed is MODEL=LAYERS, such as llama2-13b=20,40"),
        ("llama2-13=20", "Did you mean 'llama2-13b'?"),
        ("llama2-13b=21", "has no exit after layer 21; allowed are some of 16, 20, 24"),
        ("llama2-13b=16,20,24,28,32,36", "are all exits of 'llama2-13b'"),
        ("llama2-13b=20,16", "whole numbers that ascend"),
    ],
)
def test_what_the_profile_does_not_have_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match="(?s)" + told.replace("?", r"\?")):
        kept_of([text], load_profile(A100))


def test_a_model_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="given twice"):
        kept_of(["llama2-13b=20", "llama2-13b=24"], load_profile(A100))


@pytest.mark.parametrize(
    "more", [["--launch", "0.1ms"], ["--device-name", "other"], ["--from-flops", "312TFLOP/s"]]
)
def test_fewer_exits_go_alone(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--keep-exits", "llama2-13b=20"]
    command = ("profiles", "derive", "--from", A100, *kept, *more, "--out", tmp_path / "one")
    assert run(*command) != 0
    assert "goes alone" in capsys.readouterr().err
