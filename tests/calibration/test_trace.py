"""Traces and fitted confidence: the model's own word, on the same positions for all."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.cli import main
from calibration.model.checkpoint import (
    EarlyExitSettings,
    open_checkpoint,
    update_settings,
    write_json,
)
from calibration.model.confidence import Confidence, confidence_of
from calibration.model.early_exit import from_stock, load, save
from calibration.model.exit_heads import new_exit_heads
from calibration.training import thresholds, trace
from calibration.training.exit_quality import expected_calibration_error
from calibration.training.scoring import PIECES, Windows, score
from calibration.training.small_family import FamilyOptions, train_family
from calibration.training.text import Corpus, corpus
from calibration.training.thresholds import (
    FittingOptions,
    choose_threshold,
    confidence_at_exits,
    early_agreement,
    exit_levels,
    fit_map,
    fitting_scores,
    kind_of,
    settle,
)
from calibration.training.trace import TraceOptions, trace_checkpoints, traced_as_now
from helios_sim.errors import InputError
from helios_sim.exits import read_traces, stickiness_of
from helios_sim.loop.state import NLL_UNITS_PER_NAT
from tests.calibration.small import FAMILY
from tests.calibration.tiny import stock_model

OPTIONS = TraceOptions(
    num_positions=512,
    window_tokens=64,
    domains=("code", "prose"),
    fitting=FittingOptions(num_positions=512, window_tokens=64),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("family")
    preset = replace(FAMILY, iterations=120)
    train_family(preset, out, FamilyOptions(device="cpu", num_processes=1))
    return [out / plan.name for plan in FAMILY.models]


@pytest.fixture(scope="module")
def traced(
    folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trace")
    return out, trace_checkpoints(folders, out, OPTIONS)


def test_windows_cover_every_position_once_with_context() -> None:
    windows = Windows(window_tokens=8, traced_tokens=3, num_positions=7)
    cut = windows.cut(np.arange(100))
    assert cut.shape == (3, 9)
    targets = cut[:, 1:][:, -3:].reshape(-1)
    assert targets.tolist() == list(range(6, 15))
    assert windows.min_context_tokens == 6
    assert windows.needed_tokens == 15
    with pytest.raises(InputError, match="Ask for fewer positions"):
        windows.cut(np.arange(14))


def test_pieces_lie_at_even_distances_over_the_whole_text_and_share_no_position() -> None:
    """Ten windows of four tokens, two of them scored, in three pieces of a text of 101 tokens."""
    windows = Windows(4, 2, 20, 3)
    cut = windows.cut(np.arange(101))
    gap = (101 - windows.needed_tokens) // 2
    places = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    piece = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    starts = [2 * place + gap * which for place, which in zip(places, piece, strict=True)]
    assert cut[:, 0].tolist() == starts
    assert cut[-1, -1] <= 100 < cut[-1, -1] + 3
    scored = cut[:, 1:][:, -2:].flatten().tolist()
    assert len(set(scored)) == 20 and scored == sorted(scored)
    assert (cut.diff(dim=1) == 1).all()
    # Of a text that is just long enough there are no gaps, and of one window no pieces.
    short = windows.cut(np.arange(windows.needed_tokens))
    assert torch.equal(short, Windows(4, 2, 20).cut(np.arange(101)))
    assert Windows(4, 2, 1, 3).cut(np.arange(50)).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(InputError, match="one position is needed"):
        Windows(4, 2, 20, 0)


def test_scores_are_those_of_the_stock_model_at_full_depth() -> None:
    stock = stock_model("llama")
    model = from_stock(stock, (2, 4))
    tokens = corpus("code", "trace", max_bytes=400).tokens()
    windows = Windows(32, 16, 40)
    scores = score(model, tokens, windows)
    batch = windows.cut(tokens)
    with torch.no_grad():
        logits = stock(batch[:, :-1]).logits[:, -16:].reshape(-1, 256)[:40]
    wanted = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(scores.target), reduction="none"
    )
    np.testing.assert_allclose(scores.nll_nats[:, -1], wanted.numpy(), rtol=2e-4, atol=2e-4)
    assert (scores.predicted[:, -1] == logits.argmax(-1).numpy()).all()
    for kind, found in scores.confidence.items():
        np.testing.assert_allclose(found[:, -1], confidence_of(logits, kind).numpy(), atol=2e-4)
    assert scores.agrees[:, -1].all()


def test_the_trace_file_is_one_that_the_simulator_reads(traced: Any, folders: list[Path]) -> None:
    out, _ = traced
    traces = read_traces(out / "exits.parquet")
    assert traces.domains == OPTIONS.domains
    assert traces.num_positions == OPTIONS.num_positions
    assert dict(traces.exit_layers) == {plan.name: plan.exit_layers for plan in FAMILY.models}
    for name in traces.candidates:
        assert traces.agrees[name][..., -1].all()
        steps = traces.nll_nats[name].astype(np.float64) * 1024
        assert (steps == np.round(steps)).all()


def test_shares_of_the_report_are_those_the_simulator_finds(traced: Any) -> None:
    out, report = traced
    traces = read_traces(out / "exits.parquet")
    for name, found in report["candidates"].items():
        for domain, figures in found["domains"].items():
            shares = traces.share_by_exit(name, found["threshold"], domain)
            np.testing.assert_allclose(figures["share"], shares, atol=1e-4)


def test_depth_helps_every_exit_on_the_domains_a_model_was_trained_on(traced: Any) -> None:
    _, report = traced
    for found in report["candidates"].values():
        for domain in found["own_domains"]:
            nll = found["domains"][domain]["nll_nats"]
            assert nll == sorted(nll, reverse=True)


def test_the_page_prints_what_its_words_mean(traced: Any) -> None:
    out, report = traced
    page = (out / "trace.md").read_text()
    assert all(text in page for text in report["definitions"].values())
    assert json.loads((out / "trace.json").read_text()) == report
    assert report["dtype"] == "float32"
    assert "computed in float32" in page
    for variant in ("raw", "calibrated"):
        pairs = report["complementarity"][variant]["pairs"]
        assert len(pairs) == 2 * len(OPTIONS.domains)


def test_tracing_twice_writes_the_same_bytes(
    traced: Any, folders: list[Path], tmp_path: Path
) -> None:
    out, _ = traced
    trace_checkpoints(folders, tmp_path, OPTIONS)
    first, second = (path / "exits.parquet" for path in (out, tmp_path))
    assert first.read_bytes() == second.read_bytes()


def test_traces_are_of_the_precision_that_was_asked_for(
    traced: Any, folders: list[Path], tmp_path: Path
) -> None:
    out, _ = traced
    report = trace_checkpoints(folders, tmp_path, OPTIONS, dtype=torch.bfloat16)
    assert report["dtype"] == "bfloat16"
    whole, rough = (read_traces(path / "exits.parquet") for path in (out, tmp_path))
    for name, nats in whole.nll_nats.items():
        assert 0.0 < np.abs(rough.nll_nats[name] - nats).max() < 1.0


@pytest.mark.parametrize(
    "kind", ["max-softmax", "top2-margin", "entropy", "calibrated-max-softmax"]
)
def test_settled_confidence_is_stored_and_used(
    folders: list[Path], tmp_path: Path, kind: str
) -> None:
    chosen = settle(
        folders, kind=kind, target_agreement=0.8, options=FittingOptions(512, 64, ("code",))
    )
    for folder in folders:
        confidence = load(folder).confidence
        assert confidence.threshold == chosen["threshold"]
        assert confidence.is_calibrated == kind.startswith("calibrated-")
    assert min(chosen["early_agreement"].values()) >= 0.8 or chosen["threshold"] == 1.0
    assert not traced_as_now(folders, tmp_path)
    report = trace_checkpoints(folders, tmp_path, OPTIONS)
    assert {found["confidence"] for found in report["candidates"].values()} == {kind}
    assert traced_as_now(folders, tmp_path)
    if kind.startswith("calibrated-"):
        fewer = FittingOptions(256, 64, ("code",))
        settle(folders, kind=kind, threshold=chosen["threshold"], options=fewer)
        assert not traced_as_now(folders, tmp_path), "the maps are others"
    settle(folders, kind=kind, threshold=0.123)
    assert not traced_as_now(folders, tmp_path)
    (tmp_path / "trace.json").unlink()
    assert traced_as_now(folders, tmp_path), "traces without a report are taken for theirs"


def test_a_checkpoint_that_cannot_be_written_is_told_before_it_is_scored(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios_sim.folders.os.access", lambda *_: False)
    with pytest.raises(InputError, match="Nothing can be written to"):
        settle(folders, threshold=0.5)


def test_a_map_of_biased_confidence_brings_the_error_down() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    confidence = rng.random(8000).astype(np.float32)
    right = rng.random(8000) < 0.4 * confidence**2
    found = fit_map(confidence[:4000], right[:4000])
    before = expected_calibration_error(confidence[4000:], right[4000:])
    mapped = found.of_tensor(torch.from_numpy(confidence[4000:])).numpy()
    after = expected_calibration_error(mapped, right[4000:])
    assert before > 0.3
    assert after < 0.05
    assert list(found.y) == sorted(found.y)


def test_a_map_of_one_value_is_one_knot() -> None:
    found = fit_map(np.full(100, 0.7, dtype=np.float32), np.arange(100) % 4 == 0)
    assert found.x == pytest.approx((0.7,))
    assert found.y == pytest.approx((0.25,))


def test_the_threshold_is_the_lowest_that_every_candidate_can_bear() -> None:
    confidence = np.array([[0.9, 0.5], [0.6, 0.5], [0.3, 0.5]], dtype=np.float32)
    agrees = np.array([[True, True], [False, True], [False, True]])
    assert early_agreement(confidence, agrees, 0.5) == 0.5
    assert exit_levels(confidence, 0.5).tolist() == [0, 0, 1]
    assert choose_threshold([confidence], [agrees], 1.0) == 0.61
    assert choose_threshold([confidence], [agrees], 0.5) == 0.31
    sure = np.array([[0.995, 0.5]], dtype=np.float32)
    assert choose_threshold([sure], [np.array([[False, True]])], 0.9) == 1.0


def test_where_nothing_can_be_written_nothing_is_traced(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, so that no folder can be in it"):
        trace_checkpoints(folders, tmp_path / "file", OPTIONS)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="Nothing can be written to"):
        trace_checkpoints(folders, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(
    ("file", "what"),
    [("profile.json", "profile"), ("totals.json", "run"), ("config.json", "checkpoint")],
)
def test_traces_replace_none_of_a_profile_a_run_or_a_checkpoint(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, what: str
) -> None:
    """Refused before anything is computed."""
    monkeypatch.setattr(trace, "load", None)
    (tmp_path / file).write_text("{}")
    (tmp_path / "exits.parquet").write_text("theirs")
    with pytest.raises(InputError, match=f"It holds {file}, so it is a {what}, and traces would"):
        trace_checkpoints(folders, tmp_path, OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("exits.parquet", file))
    assert (tmp_path / "exits.parquet").read_text() == "theirs"


def test_readings_and_earlier_traces_may_be_where_traces_go(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "points.parquet").write_text("readings")
    for num_positions in (64, 128):
        trace_checkpoints([folder], tmp_path, replace(OPTIONS, num_positions=num_positions))
        assert read_traces(tmp_path / "exits.parquet").num_positions == num_positions
    assert (tmp_path / "points.parquet").read_text() == "readings"


@pytest.mark.parametrize("failing", ["write_json", "write_whole", "file_in_place"])
def test_an_earlier_report_is_not_believed_of_traces_that_were_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Nor does a new one stand beside the traces before it, wherever the writing ends."""
    folder, out = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    trace_checkpoints([folder], out, OPTIONS)
    report, traces = (out / "trace.json").read_bytes(), (out / "exits.parquet").read_bytes()
    assert traced_as_now([folder], out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trace, failing, full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        trace_checkpoints([folder], out, replace(OPTIONS, num_positions=64))
    is_moved = failing != "file_in_place"
    assert (out / "trace.json").read_bytes() == report
    assert ((out / "exits.parquet").read_bytes() != traces) == is_moved
    assert traced_as_now([folder], out) != is_moved


def test_a_report_without_a_hash_is_believed(tmp_path: Path) -> None:
    """As tracing wrote it before it told one."""
    folder, out = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    report = trace_checkpoints([folder], out, OPTIONS)
    held = hashlib.sha256((out / "exits.parquet").read_bytes()).hexdigest()
    assert report.pop("traces_sha256") == held
    (out / "trace.json").write_text(json.dumps(report))
    assert traced_as_now([folder], out)


def test_candidates_of_several_tokenizers_or_one_name_are_refused(
    folders: list[Path], tmp_path: Path
) -> None:
    other = from_stock(stock_model("llama"), (2, 4), name="other", tokenizer="pieces")
    save(other, tmp_path / "other")
    with pytest.raises(InputError, match=r"several tokenizers: 'bytes' .* 'pieces'"):
        trace_checkpoints([folders[0], tmp_path / "other"], tmp_path / "out", OPTIONS)
    for name in ("one", "two"):
        save(from_stock(stock_model("llama"), (2, 4), name=name), tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(name)
    with pytest.raises(InputError, match=r"several tokenizers: 'sha256:\w{16}' .*copy one's tok"):
        trace_checkpoints([tmp_path / "one", tmp_path / "two"], tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match="Two checkpoints are named 'code-2l'"):
        trace_checkpoints([folders[0], folders[0]], tmp_path / "out", OPTIONS)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        trace_checkpoints([tmp_path / "other"], tmp_path / "out", OPTIONS)


def test_a_tokenizer_of_more_ids_than_a_candidate_has_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, vocab in (("large", 256), ("small", 100)):
        stock = stock_model("llama", vocab_size=vocab)
        save(from_stock(stock, (2, 4), name=name, tokenizer="bytes"), tmp_path / name)
    said = r"'bytes' gives the id \d+ and the model knows 100; use the tokenizer that belongs"
    with pytest.raises(InputError, match=said):
        settle([tmp_path / "small"], options=OPTIONS.fitting)
    monkeypatch.setattr(trace, "load", None)
    with pytest.raises(InputError, match=said) as refusal:
        trace_checkpoints([tmp_path / "large", tmp_path / "small"], tmp_path / "out", OPTIONS)
    assert refusal.value.where == str(tmp_path / "small")


def test_windows_longer_than_a_model_and_unknown_kinds_are_refused(
    folders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the smallest candidate takes 96"):
        trace_checkpoints(folders, tmp_path, replace(OPTIONS, window_tokens=512))
    with pytest.raises(InputError, match="name some of 'code', 'prose', 'tables'"):
        TraceOptions(domains=("poems",))
    with pytest.raises(InputError, match="allowed are max-softmax"):
        kind_of("calibrated-calibrated-entropy")


def test_auxiliary_heads_are_traced_through_their_own_heads(tmp_path: Path) -> None:
    model = from_stock(stock_model("opt"), (2, 4), name="opt", tokenizer="bytes")
    model.exit_heads = new_exit_heads(model.backbone, (2, 4))
    with torch.no_grad():
        model.exit_heads[2].head.weight.zero_()
    scores = score(model, corpus("code", "trace", max_bytes=400).tokens(), Windows(32, 16, 32))
    np.testing.assert_allclose(scores.nll_nats[:, 0], np.log(256), rtol=1e-5)
    assert scores.nll_nats[:, 1].std() > 0


def test_the_commands_fit_and_trace(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = str(folders[0].parent)
    for arguments in (
        ["confidence", family, "--threshold", "0.25", "--device", "cpu"],
        [
            "trace",
            family,
            "--out",
            str(tmp_path),
            "--positions",
            "256",
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
        ],
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert not end.value.code
    said = capsys.readouterr().out
    assert "threshold 0.25" in said
    assert json.loads((tmp_path / "trace.json").read_text())["dtype"] == "bfloat16"
    assert "code-2l on code, nats: L1" in said
    assert read_traces(tmp_path / "exits.parquet").domains == ("code", "prose", "tables")
    assert load(folders[0]).confidence == Confidence("max-softmax", 0.25)


def asked_of(monkeypatch: pytest.MonkeyPatch, module: Any) -> set[tuple[str, str]]:
    """The domains and splits of the text that a module asks for from now on."""
    asked: set[tuple[str, str]] = set()

    def told(domain: str, split: Any, **bounds: Any) -> Corpus:
        asked.add((domain, split))
        return corpus(domain, split, **bounds)

    monkeypatch.setattr(module, "corpus", told)
    return asked


def tiny_checkpoint(folder: Path, name: str = "tiny") -> Path:
    """An untrained model's folder that says it was trained on code."""
    model = from_stock(stock_model("llama"), (2, 4), name=name, tokenizer="bytes")
    facts = {"train": {"code": {"sha256": "0"}}}
    save(model, folder, EarlyExitSettings(name, (2, 4), tokenizer="bytes", corpus=facts))
    return folder


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What an interrupted command says."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 130
    return capsys.readouterr().err


@pytest.mark.parametrize("num_stored", [0, 1, 2])
def test_an_interruption_names_the_checkpoints_whose_confidence_was_stored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_stored: int,
) -> None:
    for name in ("one", "two"):
        tiny_checkpoint(tmp_path / name, name)
    stored: list[Path] = []

    def interrupted(folder: Path, **changed: Any) -> None:
        if len(stored) < num_stored:
            update_settings(folder, **changed)
            stored.append(folder)
        if len(stored) == num_stored:
            raise KeyboardInterrupt

    monkeypatch.setattr(thresholds, "update_settings", interrupted)
    said = ended(
        ["confidence", str(tmp_path), "--kind", "entropy", "--threshold", "0.3", "--device", "cpu"],
        capsys,
    )
    told = (
        "interrupted; no checkpoint's confidence was changed.",
        "the confidence of 'one' was stored and that of 'two' is as it was, and the same command",
        "the confidence of 'one', 'two' was stored, so of every checkpoint",
    )
    assert told[num_stored] in said
    held = [open_checkpoint(tmp_path / name).settings for name in ("one", "two")]
    kinds = [settings and settings.confidence.kind for settings in held]
    assert kinds == ["entropy"] * num_stored + ["max-softmax"] * (2 - num_stored)


@pytest.mark.parametrize(
    ("interrupted", "told"),
    [
        ("_traces", "no traces were written"),
        ("trace_page", "without their report; the same command writes both"),
        ("write_json", "the traces and their report are in"),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_an_interruption_says_which_traces_are_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interrupted: str,
    told: str,
    is_there: bool,
) -> None:
    """Whether or not there were some before."""
    folder, out = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    if is_there:
        trace_checkpoints([folder], out, OPTIONS)

    def stopped(*given: Any) -> None:
        if interrupted == "write_json":
            write_json(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, interrupted, stopped)
    said = ended(
        ["trace", str(folder), "--out", str(out), "--positions", "64", "--device", "cpu"], capsys
    )
    assert told in said
    assert "nothing was written" not in said
    assert (out / "exits.parquet").exists() == (is_there or interrupted != "_traces")
    assert (out / "trace.json").exists() == (is_there or interrupted == "write_json")


def test_confidence_is_fitted_on_other_text_than_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    fitted, traced = asked_of(monkeypatch, thresholds), asked_of(monkeypatch, trace)
    settle([folder], threshold=0.5, options=OPTIONS.fitting)
    assert {split for _, split in fitted} == {"calibration"}
    fitted.clear()
    trace_checkpoints([folder], tmp_path / "out", OPTIONS)
    assert fitted == {(domain, "calibration") for domain in OPTIONS.domains}
    assert traced == {(domain, "trace") for domain in OPTIONS.domains}


def test_no_more_calibration_text_is_read_than_positions_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def told(model: Any, folder: Path, options: FittingOptions, kinds: Any) -> Any:
        asked.append(options.num_positions)
        return fitting_scores(model, folder, options, kinds)

    monkeypatch.setattr(trace, "fitting_scores", told)
    folder = tiny_checkpoint(tmp_path / "tiny")
    for num_positions in (64, 1024):
        trace_checkpoints([folder], tmp_path, replace(OPTIONS, num_positions=num_positions))
    assert asked == [64, 512]


def test_a_batch_of_windows_has_as_many_logits_as_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits are those of the scored half alone; what stands before it meets no head."""
    model = from_stock(stock_model("llama"), (2, 4), tokenizer="bytes")
    tokens = corpus("code", "trace", max_bytes=2000).tokens()
    windows = Windows(32, 16, 160)
    whole, taken = score(model, tokens, windows), []

    def counted(hidden: torch.Tensor, level: int) -> torch.Tensor:
        taken.append(len(hidden))
        return type(model).logits(model, hidden, level)

    monkeypatch.setattr(model, "logits", counted)
    monkeypatch.setattr("calibration.training.scoring.MAX_LOGITS", 4 * 16 * 256)
    parts = score(model, tokens, windows)
    assert taken == [64, 64, 64, 64, 32, 32]
    assert (parts.predicted == whole.predicted).all()
    np.testing.assert_allclose(parts.nll_nats, whole.nll_nats, rtol=1e-4)


def test_confidence_that_is_settled_leaves_what_others_have_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, choose = tiny_checkpoint(tmp_path / "tiny"), thresholds.choose_threshold

    def meanwhile(*given: Any) -> float:
        update_settings(folder, tokenizer="another")
        return choose(*given)

    monkeypatch.setattr(thresholds, "choose_threshold", meanwhile)
    chosen = settle([folder], kind="entropy", options=OPTIONS.fitting)
    settings = open_checkpoint(folder).settings
    assert settings is not None
    assert settings.confidence == Confidence("entropy", chosen["threshold"])
    assert settings.tokenizer == "another"


@pytest.mark.parametrize("kind", ["max-softmax", "calibrated-max-softmax"])
def test_what_leaves_early_is_counted_as_it_is_served_on_a_models_own_domains(
    tmp_path: Path, kind: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    options = FittingOptions(512, 64, ("code", "prose"))
    found = fitting_scores(load(folder), folder, options, ("max-softmax",))

    def early_share(domain: str, threshold: float) -> float:
        levels = exit_levels(confidence_at_exits(found[domain], load(folder).confidence), threshold)
        return round(float((levels == 0).mean()), 4)

    settle([folder], kind=kind, threshold=0.5, options=options)
    first = confidence_at_exits(found["code"], load(folder).confidence)[:, 0]
    middle = float(np.median(first))
    told = settle([folder], kind=kind, threshold=middle, options=options)
    assert told["early_share"] == {"tiny": early_share("code", middle)}
    assert 0.0 < early_share("code", middle) != early_share("prose", middle)


def test_pairs_are_those_that_the_scores_of_the_traced_text_tell(
    traced: Any, folders: list[Path]
) -> None:
    out, report = traced
    windows = Windows(64, 32, 512, PIECES)
    text = corpus("code", "trace").tokens()
    found = report["complementarity"]["raw"]
    scores, levels = {}, {}
    for folder in folders:
        model = load(folder)
        scores[model.name] = score(model, text, windows, (model.confidence.kind,))
        raw = Confidence(model.confidence.kind)
        own = confidence_at_exits(scores[model.name], raw)
        levels[model.name] = exit_levels(own, found["threshold"])
        told = report["candidates"][model.name]
        assert told["confidence"] == model.confidence.kind
        nll = scores[model.name].nll_nats[np.arange(512), exit_levels(own, told["threshold"])]
        assert told["domains"]["code"]["perplexity_at_own_exit"] == pytest.approx(
            np.exp(nll.mean()), rel=1e-3
        )
        sticks = stickiness_of(exit_levels(own, told["threshold"]))
        assert told["domains"]["code"]["stickiness"] == (sticks and round(sticks, 4))
    for pair in found["pairs"]:
        if pair["domain"] != "code":
            continue
        a, b = pair["deep_in"], pair["early_in"]
        deep = levels[a] == len(scores[a].exit_layers) - 1
        early = deep & (levels[b] == 0)
        assert pair["deep_share"] == round(float(deep.mean()), 4)
        right = scores[b].right[early, 0]
        assert pair["right_of_early"] == (round(float(right.mean()), 4) if len(right) else None)
    steps = read_traces(out / "exits.parquet").nll_nats["code-2l"].astype(np.float64)
    steps *= NLL_UNITS_PER_NAT
    np.testing.assert_array_equal(steps, np.round(steps))


def test_a_bin_that_many_fall_into_weighs_more_in_a_map() -> None:
    """Hundreds say 0.2, a few dozen 0.8, and the few are right less often: one pool for all."""
    sure = np.repeat(np.float32([0.2, 0.8]), [640, 32])
    right = np.concatenate([np.arange(640) % 2 == 0, np.zeros(32, np.bool_)])
    found = fit_map(sure, right)
    assert found.y == pytest.approx([320 / 672] * len(found.y))
