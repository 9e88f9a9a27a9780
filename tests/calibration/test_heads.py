"""Auxiliary exit heads: trained on a frozen backbone, saved beside it, loaded with it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from calibration.cli import main
from calibration.model.checkpoint import open_checkpoint, update_settings, write_settings
from calibration.model.confidence import Confidence, PiecewiseLinear
from calibration.model.early_exit import from_stock, load, save
from calibration.model.exit_heads import new_exit_heads
from calibration.serving.prompts import tokenizer_of
from calibration.training import heads
from calibration.training.heads import HeadOptions, train_heads
from calibration.training.text import DOMAINS, Corpus, corpus
from calibration.training.thresholds import own_domains
from calibration.training.trace import TraceOptions, trace_checkpoints
from helios_sim.errors import InputError
from helios_sim.folders import folder_in_place
from tests.calibration.tiny import stock_model

OPTIONS = HeadOptions(
    domains=("code",),
    iterations=40,
    rows=2,
    window_tokens=64,
    learning_rate=1e-2,
    text_bytes=40_000,
    held_out_positions=512,
)


def checkpoint(
    folder: Path, family: str = "opt", settings: bool = False, vocab_size: int = 256
) -> Path:
    """A tiny stock model's folder, with or without early_exit.json."""
    stock = stock_model(family, vocab_size=vocab_size)
    save(from_stock(stock, (2, 4), name="stock", tokenizer="bytes"), folder)
    if not settings:
        (folder / "early_exit.json").unlink()
    return folder


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_heads_improve_their_exits_and_leave_the_backbone_alone(
    tmp_path: Path, family: str
) -> None:
    folder = checkpoint(tmp_path / "model", family)
    before = weights_hash(folder)
    report = train_heads(folder, (1, 2), OPTIONS)
    own, shared = report["held_out_nll_nats"]["code"], report["held_out_nll_nats_shared_head"]
    assert own[0] < shared["code"][0] - 0.3
    assert own[1] < shared["code"][1] - 0.3
    assert own[-1] == shared["code"][-1]
    assert weights_hash(folder) == before
    model = load(folder)
    assert model.exit_layers == (1, 2, 4)
    assert set(model.exit_heads) == {1, 2}
    assert model.spec.tokenizer == "bytes"
    assert json.loads((folder / "heads.json").read_text()) == report


def test_heads_of_a_copy_leave_the_checkpoint_as_it_was(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", settings=True)
    before = sorted(path.name for path in folder.iterdir())
    train_heads(folder, (2,), OPTIONS, out=tmp_path / "copy")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert load(tmp_path / "copy").heads_kind == "auxiliary"
    assert load(folder).heads_kind == "shared"


def test_text_goes_through_the_folders_own_tokenizer(tmp_path: Path) -> None:
    tokenizers: Any = pytest.importorskip("tokenizers")
    folder = checkpoint(tmp_path / "model")
    stock = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "def": 1}, unk_token="?"))
    stock.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    stock.save(str(folder / "tokenizer.json"))
    report = train_heads(folder, (2,), OPTIONS)
    assert np.isfinite(report["held_out_nll_nats"]["code"]).all()
    held = (folder / "tokenizer.json").read_bytes()
    named = f"sha256:{hashlib.sha256(held).hexdigest()[:16]}"
    assert json.loads((folder / "early_exit.json").read_text())["tokenizer"] == named


def test_a_vocabulary_and_merges_are_the_tokenizer_where_no_single_file_holds_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in OPT's own repositories; they give the ids that tokenizer.json does."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = split
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=split.alphabet(), show_progress=False
    )
    text = corpus("code", "train", max_bytes=20_000).data
    whole.train_from_iterator([text.decode(errors="replace")], trainer)
    one, two = (checkpoint(tmp_path / name, vocab_size=300) for name in ("one", "two"))
    whole.save(str(one / "tokenizer.json"))
    whole.model.save(str(two))
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64}
    (two / "tokenizer_config.json").write_text(json.dumps(settings))
    in_one, in_two = (
        corpus("prose", "trace", max_bytes=4000).tokens(tokenizer_of("any", folder, 300))
        for folder in (one, two)
    )
    assert in_one.tolist() == in_two.tolist()
    assert not capfd.readouterr().err
    assert len(in_one) < 4000

    report = train_heads(two, (2,), replace(OPTIONS, iterations=1))
    assert np.isfinite(report["held_out_nll_nats"]["code"]).all()
    held = b"".join((two / name).read_bytes() for name in ("vocab.json", "merges.txt"))
    named = f"sha256:{hashlib.sha256(held).hexdigest()[:16]}"
    assert json.loads((two / "early_exit.json").read_text())["tokenizer"] == named
    options = TraceOptions(num_positions=64, domains=("code",))
    assert trace_checkpoints([two], tmp_path / "out", options)["tokenizer"] == named
    with pytest.raises(InputError, match=r"or name one tokenizer in every early_exit\.json"):
        trace_checkpoints([one, two], tmp_path / "out", options)


def test_a_faulty_tokenizer_file_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("words")
    with pytest.raises(InputError, match=r"'any' cannot be read: expected .*belong to the weights"):
        tokenizer_of("any", tmp_path, 256)


def test_checkpoints_with_heads_and_one_tokenizer_file_are_traced_together(tmp_path: Path) -> None:
    """Whatever their folders are called; with another file they are refused."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    folders = [checkpoint(tmp_path / name, settings=False) for name in ("one", "two", "three")]
    for folder, word in zip(folders, ("def", "def", "class"), strict=True):
        words = tokenizers.models.WordLevel({"?": 0, word: 1}, unk_token="?")
        stock = tokenizers.Tokenizer(words)
        stock.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        stock.save(str(folder / "tokenizer.json"))
        train_heads(folder, (2,), replace(OPTIONS, iterations=1))
    options = TraceOptions(num_positions=64, domains=("code",))
    report = trace_checkpoints(folders[:2], tmp_path / "traced", options)
    assert set(report["candidates"]) == {"one", "two"}
    with pytest.raises(InputError, match="several tokenizers"):
        trace_checkpoints(folders, tmp_path / "all", options)


def test_text_of_the_heads_is_told_beside_that_of_the_model(tmp_path: Path) -> None:
    """A model stays at home where it was trained, wherever its heads were."""
    folder = checkpoint(tmp_path / "model", settings=True)
    trained = {"train": {"prose": {"bytes": 7}}}
    write_settings(folder, replace(open_checkpoint(folder).settings, corpus=trained))
    report = train_heads(folder, (2,), replace(OPTIONS, iterations=1))
    settings = open_checkpoint(folder).settings
    assert settings is not None
    assert settings.corpus == {**trained, "heads": report["text"]}
    assert own_domains(settings.corpus) == ("prose",)
    assert own_domains({"heads": report["text"]}) == ("code",)
    assert own_domains(None) == DOMAINS


def test_what_cannot_be_trained_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    with pytest.raises(InputError, match="full depth of 4 layers"):
        train_heads(folder, (2, 9), OPTIONS)
    with pytest.raises(InputError, match="name an exit before it"):
        train_heads(folder, (4,), OPTIONS)
    with pytest.raises(InputError, match="exists already"):
        train_heads(folder, (2,), OPTIONS, out=tmp_path)
    with pytest.raises(InputError, match="lies within the checkpoint"):
        train_heads(folder, (2,), OPTIONS, out=folder / "heads")
    large = from_stock(stock_model("opt", vocab_size=300), (2, 4), name="large")
    save(large, tmp_path / "large")
    with pytest.raises(InputError, match="tokenizer"):
        train_heads(tmp_path / "large", (2,), OPTIONS)
    small = from_stock(stock_model("opt", vocab_size=100), (2, 4), name="s", tokenizer="bytes")
    save(small, tmp_path / "small")
    with pytest.raises(InputError, match="the model knows 100"):
        train_heads(tmp_path / "small", (2,), OPTIONS)
    with pytest.raises(InputError, match="there are 'code'"):
        HeadOptions(domains=("poems",))


def test_a_checkpoint_with_heads_is_not_trained_again(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    train_heads(folder, (2,), HeadOptions(("code",), iterations=1, text_bytes=20_000))
    with pytest.raises(InputError, match="auxiliary heads for \\[2, 4\\] already"):
        train_heads(folder, (1,), OPTIONS)


def test_heads_that_are_there_without_being_used_are_not_overwritten(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", settings=True)
    (folder / "exit_heads.safetensors").write_text("of someone")
    options = replace(OPTIONS, iterations=1)
    with pytest.raises(InputError, match=r"holds exit_heads\.safetensors already.*or give --out"):
        train_heads(folder, (2,), options)
    train_heads(folder, (2,), options, out=tmp_path / "copy")
    assert (folder / "exit_heads.safetensors").read_text() == "of someone"
    assert load(tmp_path / "copy").heads_kind == "auxiliary"


@pytest.mark.parametrize("failing", ["save_tensors", "write_json", "write_settings"])
def test_a_disk_that_fills_leaves_the_checkpoint_without_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Whichever file it is that has no room; the same command then trains again."""
    folder = checkpoint(tmp_path / "model", settings=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = HeadOptions(("code",), iterations=1, text_bytes=20_000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(heads, failing, full)
        with pytest.raises(InputError, match="The heads cannot be written: No space left"):
            train_heads(folder, (2,), options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train_heads(folder, (2,), options)
    assert load(folder).heads_kind == "auxiliary"


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("is_written", [False, True])
def test_an_interruption_says_whether_the_heads_are_in_effect(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_copied: bool,
    is_written: bool,
) -> None:
    folder, out = checkpoint(tmp_path / "model", settings=True), tmp_path / "copy"

    @contextmanager
    def interrupted(target: Path) -> Iterator[Path]:
        with folder_in_place(target) as draft:
            yield draft
        raise KeyboardInterrupt

    def stopped(*given: Any) -> None:
        if is_written:
            write_settings(*given)
        raise KeyboardInterrupt

    if is_copied and is_written:
        monkeypatch.setattr(heads, "folder_in_place", interrupted)
    else:
        monkeypatch.setattr(heads, "write_settings", stopped)
    more = ["--out", str(out)] if is_copied else []
    command = ["train", "--heads-for", str(folder), "--exits", "2", "--domain", "code"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--iterations", "1", "--device", "cpu", *more])
    assert end.value.code == 130
    where = out if is_copied else folder
    told = "the heads were trained and are in effect" if is_written else "no new heads are in"
    said = capsys.readouterr().err
    assert f"interrupted; {told}" in said and str(where) in said
    assert load(folder).heads_kind == ("auxiliary" if is_written and not is_copied else "shared")
    assert out.exists() == (is_copied and is_written)
    assert (folder / "exit_heads.safetensors").exists() == (is_written and not is_copied)


def test_the_command_says_what_the_heads_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    raw, bare = checkpoint(tmp_path / "raw", settings=True), checkpoint(tmp_path / "bare")
    for folder in (calibrated(tmp_path / "maps"), raw, bare):
        command = ["train", "--heads-for", str(folder), "--exits", "1", "--domain", "code"]
        with pytest.raises(SystemExit) as end:
            main([*command, "--iterations", "1", "--device", "cpu"])
        assert not end.value.code
        said.append(capsys.readouterr().out)
        assert f"run helios-calibrate confidence {folder}" in said[-1]
    assert (
        "exits [2, 4] are now [1, 4], confidence calibrated-max-softmax with threshold 0.3 is"
        in (said[0])
    )
    assert "is now max-softmax with threshold 0.5; its calibration maps are gone" in said[0]
    assert "are now [1, 4], confidence is max-softmax with threshold 0.5 as before." in said[1]
    assert "early_exit.json was not there and is now: exits [1, 4], confidence max-s" in said[2]


def test_a_disk_that_fills_is_said_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise SafetensorError("No space left on device")

    folder = checkpoint(tmp_path / "model")
    monkeypatch.setattr("calibration.model.early_exit.save_file", full)
    with pytest.raises(InputError, match="The heads cannot be written: No space left"):
        train_heads(folder, (2,), HeadOptions(("code",), iterations=1, text_bytes=20_000))
    assert not [entry for entry in folder.iterdir() if entry.name.endswith("partial")]
    assert not (folder / "exit_heads.safetensors").exists()


def test_where_nothing_can_be_written_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model")
    monkeypatch.setattr(heads, "load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("os.access", lambda *_: False)
    for out in (None, tmp_path / "elsewhere"):
        with pytest.raises(InputError, match="Nothing can be written to"):
            train_heads(folder, (2,), HeadOptions(("code",), iterations=1), out=out)


def test_a_disk_that_fills_while_the_checkpoint_is_copied_is_said_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: str, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", source, None, str(target))

    folder, out = checkpoint(tmp_path / "model"), tmp_path / "heads"
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError) as caught:
        train_heads(folder, (2,), HeadOptions(("code",), iterations=1, text_bytes=20_000), out=out)
    said = str(caught.value)
    assert said.startswith(f"{out}: {folder}")
    assert said.endswith("cannot be copied: No space left on device. Free some space, or give "
                         "another --out.")  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_says_what_heads_gain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint(tmp_path / "model"))
    common = ["train", "--heads-for", folder, "--domain", "prose", "--device", "cpu"]
    for more, code, said in (
        (["--exits", "2", "--iterations", "2"], 0, "L2"),
        ([], 2, "--exits 6,12"),
        (["--exits", "2", "--budget", "9m"], 2, "--budget: It applies to a family only"),
        (["--exits", "2", "--preset", "cuda"], 2, "--preset: It applies to a family only"),
        (["--exits", "2", "--target-agreement", "7"], 2, "--target-agreement: It applies to a"),
        (["--exits", "two"], 2, "write them like 8,16,32"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*common, *more])
        assert (end.value.code or 0) == code
        captured = capsys.readouterr()
        assert said in captured.out + captured.err


def test_heads_learn_from_other_text_than_they_are_judged_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def told(domain: str, split: Any, **bounds: Any) -> Corpus:
        asked.append((domain, split))
        return corpus(domain, split, **bounds)

    monkeypatch.setattr(heads, "corpus", told)
    train_heads(checkpoint(tmp_path / "model"), (2,), replace(OPTIONS, iterations=1))
    code = [split for domain, split in asked if domain == "code"]
    assert code == ["calibration", "train", "calibration"]


def calibrated(folder: Path) -> Path:
    """A tiny model's folder whose confidence is calibrated."""
    model = from_stock(stock_model("llama"), (2, 4), name="stock", tokenizer="bytes")
    maps = {"all": {2: PiecewiseLinear((0.0, 1.0), (0.0, 0.5))}}
    model.confidence = Confidence("max-softmax", 0.3, maps)
    save(model, folder)
    return folder


def test_raw_confidence_and_its_threshold_stay_when_heads_are_trained(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", settings=True)
    update_settings(folder, confidence=Confidence("entropy", 0.3))
    train_heads(folder, (2,), replace(OPTIONS, iterations=1))
    assert load(folder).confidence == Confidence("entropy", 0.3)


def test_a_threshold_on_what_maps_say_goes_with_them(tmp_path: Path) -> None:
    folder = calibrated(tmp_path / "model")
    report = train_heads(folder, (2,), replace(OPTIONS, iterations=1))
    assert load(folder).confidence == Confidence("max-softmax")
    before, now = report["replaced"]["confidence"], report["confidence"]
    assert (before["kind"], before["threshold"]) == ("calibrated-max-softmax", 0.3)
    assert len(before["maps_sha256"]) == 64
    assert now == {"kind": "max-softmax", "threshold": 0.5, "maps_sha256": None}


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_heads_begin_by_saying_what_the_models_own_norm_and_head_say(family: str) -> None:
    model = from_stock(stock_model(family), (1, 2, 4))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for layer, head in new_exit_heads(model.backbone, (1, 2, 4)).items():
        level = model.exit_layers.index(layer)
        torch.testing.assert_close(head(hidden), model.logits(hidden, level))
