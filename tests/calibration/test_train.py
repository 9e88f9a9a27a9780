"""Training: a family that loads, learns, repeats itself and is whole or absent."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibration.cli import main
from calibration.device import device_of, dtype_of
from calibration.model.checkpoint import update_settings
from calibration.model.confidence import Confidence
from calibration.model.early_exit import from_stock, load
from calibration.training import small_family, train, training_commands
from calibration.training.optimiser import Optimiser, orthogonalised
from calibration.training.presets import PRESETS, ModelPlan, preset_of
from calibration.training.small_family import FamilyOptions, train_family
from calibration.training.text import Corpus, corpus
from calibration.training.train import Reading, train_model
from helios_sim.errors import InputError
from tests.calibration.small import FAMILY
from tests.calibration.tiny import stock_model

ONE = replace(FAMILY, models=FAMILY.models[:1], iterations=12)


def train_one(out: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return train_model(
        ONE.models[0],
        replace(ONE, **changes),
        out,
        seed=seed,
        device=torch.device("cpu"),
        budget_s=60.0,
        on_reading=lambda reading: None,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Reading]]:
    out = tmp_path_factory.mktemp("family")
    told: list[Reading] = []
    options = FamilyOptions(device="cpu", num_processes=1)
    return out, train_family(FAMILY, out, options, told.append), told


def test_every_model_loads_through_the_guard_with_its_exits(family: Any) -> None:
    out, report, _ = family
    for plan in FAMILY.models:
        model = load(out / plan.name)
        assert model.exit_layers == plan.exit_layers
        assert model.spec.tokenizer == "bytes"
        assert model.confidence.threshold == report["confidence"]["threshold"]
        assert model.spec.shape.max_positions == FAMILY.long_window_tokens


def test_a_model_learns_its_own_domain(family: Any) -> None:
    _, report, told = family
    for plan in FAMILY.models:
        losses = [reading.loss for reading in told if reading.model == plan.name]
        assert report["models"][plan.name]["held_out"]["code"]["nll_nats"][-1] < 4.0 < np.log(256)
        assert losses[-1] < 4.0


def test_the_report_names_text_weights_and_versions(family: Any) -> None:
    out, report, _ = family
    assert json.loads((out / "training.json").read_text()) == report
    page = (out / "training.md").read_text()
    for name, model in report["models"].items():
        assert len(model["weights_sha256"]) == 64
        assert all(len(text["sha256"]) == 64 for text in model["text"].values())
        assert model["ended_by"] == "iterations"
        assert model["weights_sha256"][:16] in page
        readings = (out / "readings" / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(readings[-1])["iteration"] == FAMILY.iterations
    assert {"python", "torch", "transformers"} <= set(report["versions"])


def test_a_second_call_keeps_what_is_there(family: Any) -> None:
    out, report, _ = family
    before = (out / "code-2l" / "model.safetensors").stat().st_mtime_ns
    again = train_family(FAMILY, out, FamilyOptions(device="cpu", num_processes=1))
    assert (out / "code-2l" / "model.safetensors").stat().st_mtime_ns == before
    assert again["models"] == report["models"]


@pytest.mark.parametrize(
    "asked", [{}, {"confidence": "max-softmax"}, {"threshold": 0.4}, {"target_agreement": 0.9}]
)
def test_a_second_call_leaves_confidence_that_was_fitted_since_unless_one_is_asked_for(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    options = FamilyOptions(device="cpu", num_processes=1)
    report = train_family(ONE, tmp_path, options)
    model = tmp_path / "code-2l"
    fitted = Confidence("entropy", 0.123)
    update_settings(model, confidence=fitted)
    before = (tmp_path / "training.json").read_bytes()
    told: list[str] = []
    again = train_family(ONE, tmp_path, replace(options, **asked), tell=told.append)
    assert (load(model).confidence == fitted) == (not asked)
    assert ((tmp_path / "training.json").read_bytes() == before) == (not asked)
    assert len(told) == (not asked)
    if not asked:
        assert again == report
        assert "nothing is changed, confidence included" in told[0]


def test_confidence_is_settled_where_an_earlier_call_did_not_come_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FamilyOptions(device="cpu", num_processes=1)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(small_family, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_family(ONE, tmp_path, options)
    report = train_family(ONE, tmp_path, options)
    threshold = report["confidence"]["threshold"]
    assert load(tmp_path / "code-2l").confidence == Confidence("max-softmax", threshold)
    # A model that is trained again is settled again: the family has one threshold.
    shutil.rmtree(tmp_path / "code-2l")
    told: list[str] = []
    with monkeypatch.context() as patched:
        # Even where it took as long as before, so that it is described alike.
        patched.setattr(small_family, "_finished", lambda out, documents: report)
        train_family(ONE, tmp_path, options, tell=told.append)
    assert load(tmp_path / "code-2l").confidence == Confidence("max-softmax", threshold)
    assert not told


def test_the_command_says_that_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_commands, "preset_of", lambda _: ONE)
    said = []
    for more in ((), (), ("--confidence", "max-softmax"), ("--target-agreement", "0.9")):
        with pytest.raises(SystemExit) as end:
            main(["train", "--out", str(tmp_path), "--device", "cpu", *more])
        assert not end.value.code
        said.append(capsys.readouterr().out)
    assert ["nothing is changed" in one for one in said] == [False, True, False, False]
    assert ["Confidence: max-softmax" in one for one in said] == [True, False, True, True]


def test_a_folder_of_other_settings_is_not_overwritten(family: Any) -> None:
    out, _, _ = family
    with pytest.raises(InputError, match="not made by a training with these settings"):
        train_family(FAMILY, out, FamilyOptions(seed=1, device="cpu", num_processes=1))


def test_a_folder_whose_facts_are_none_of_ours_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / ONE.models[0].name
    folder.mkdir()
    (folder / "training.json").write_text("[]")
    with pytest.raises(InputError, match="not made by a training with these settings"):
        train_one(tmp_path)


def test_what_cannot_be_written_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FamilyOptions(device="cpu", num_processes=1)
    readings = tmp_path / "full" / "readings" / "code-2l.jsonl"
    readings.mkdir(parents=True)
    with pytest.raises(InputError, match="A reading cannot be written"):
        train_family(ONE, tmp_path / "full", options)
    train_family(ONE, tmp_path / "family", options)
    options = replace(options, confidence="max-softmax")
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "taken")
    for place, said in (
        ("code-2l/.early_exit.json.taken.partial", "The confidence cannot be stored"),
        (".training.json.taken.partial", "The report cannot be written"),
    ):
        # A folder stands where the file would be written.
        (tmp_path / "family" / place).mkdir()
        with pytest.raises(InputError, match=said):
            train_family(ONE, tmp_path / "family", options)
        (tmp_path / "family" / place).rmdir()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    hashes = [
        train_one(tmp_path / name, seed)["weights_sha256"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_models_trained_side_by_side_are_those_trained_in_turn(family: Any, tmp_path: Path) -> None:
    _, report, _ = family
    told: list[Reading] = []
    options = FamilyOptions(device="cpu", num_processes=2)
    beside = train_family(FAMILY, tmp_path, options, told.append)
    assert beside["processes"] == 2
    for name, model in beside["models"].items():
        assert model["weights_sha256"] == report["models"][name]["weights_sha256"]
        assert [reading.iteration for reading in told if reading.model == name][-1] == 60


def test_a_training_that_stops_leaves_no_model_behind(tmp_path: Path) -> None:
    def stop(reading: Reading) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_family(ONE, tmp_path, FamilyOptions(device="cpu", num_processes=1), stop)
    assert [entry.name for entry in tmp_path.iterdir()] == ["readings"]
    kept = (tmp_path / "readings" / "code-2l.jsonl").read_text().splitlines()
    assert json.loads(kept[0])["model"] == "code-2l"


def test_training_ends_with_its_budget_and_the_rate_has_fallen(tmp_path: Path) -> None:
    told: list[Reading] = []
    document = train_model(
        ONE.models[0],
        replace(ONE, iterations=100_000),
        tmp_path,
        seed=0,
        device=torch.device("cpu"),
        budget_s=1.5,
        on_reading=told.append,
    )
    assert document["ended_by"] == "budget"
    assert document["iterations_by_clock"] > 0
    assert told[-1].learning_rate < 0.2 * ONE.learning_rate


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="diverged"):
        train_one(tmp_path, learning_rate=float("inf"))


def test_updates_are_nearly_orthogonal() -> None:
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalised(matrices))
    assert singular.min() > 0.4
    assert singular.max() < 1.4
    assert orthogonalised(matrices.mT).shape == (3, 40, 24)


def test_the_optimiser_lowers_a_loss() -> None:
    torch.manual_seed(0)
    matrix, bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))
    optimiser = Optimiser([matrix], [bias], weight_decay=0.0)
    inputs, wanted = torch.randn(32, 8), torch.randn(32, 8)
    losses = []
    for _ in range(60):
        loss = ((inputs @ matrix + bias - wanted) ** 2).mean()
        loss.backward()
        optimiser.update(0.05)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_preset_trains_code_prose_and_a_larger_general_model() -> None:
    for preset in PRESETS.values():
        names = [plan.name for plan in preset.models]
        assert names == ["code-8l", "prose-8l", "general-12l"]
        assert sum(plan.share for plan in preset.models) == pytest.approx(1.0)
        general = preset.models[-1]
        assert general.layers * general.hidden > preset.models[0].layers * preset.models[0].hidden
        assert set(general.domains) == {"code", "prose", "tables"}


def test_bad_input_is_told_with_what_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    for call, said in (
        (lambda: preset_of("huge"), "'tiny', 'cpu', 'cuda'"),
        (lambda: FamilyOptions(num_processes=0), "at least 1"),
        (lambda: FamilyOptions(budget_s=0.0), "1 to 1,000,000"),
        (lambda: FamilyOptions(confidence="sure"), "allowed are max-softmax"),
        (lambda: FamilyOptions(threshold=1.5), "0 to 1"),
        (lambda: FamilyOptions(target_agreement=2.0), "above 0 and up to 1"),
        (lambda: device_of("tpu"), "auto, cpu and cuda"),
        (lambda: dtype_of("int8", torch.device("cpu")), "float32, bfloat16, float16"),
        (lambda: ModelPlan("x", {"poems": 1.0}, 1, 8, 1, 8, (1,), 1.0), "there are 'code'"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    for words, said in (
        ((), "--out"),
        (("--exits", "2,4"), "--exits: It applies to exit heads only"),
        (("--domain", "code"), "--domain: It applies to exit heads only"),
        (("--iterations", "3"), "--iterations: It applies to exit heads only"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["train", "--preset", "tiny", *words])
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_a_file_where_the_family_should_go_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("")
    with pytest.raises(InputError, match="It is a file"):
        train_family(ONE, target, FamilyOptions(device="cpu", num_processes=1))


def test_a_model_is_judged_on_text_that_is_neither_trained_on_nor_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[str] = set()

    def told(domain: str, split: Any, **bounds: Any) -> Corpus:
        asked.add(split)
        return corpus(domain, split, **bounds)

    monkeypatch.setattr(train, "corpus", told)
    train.held_out(from_stock(stock_model("llama"), (2, 4)), FAMILY)
    assert asked == {"calibration"}


def test_an_interruption_says_that_finished_models_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.training.training_commands.train_family", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["train", "--preset", "tiny", "--device", "cpu", "--out", str(tmp_path / "family")])
    assert end.value.code == 130
    said = capsys.readouterr().err
    assert f"finished are kept in {tmp_path / 'family'}" in said
    assert "nothing was written" not in said
