"""What the commands train, confidence and trace do with their options, and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import typer

from calibration.device import device_of, dtype_of
from calibration.model.checkpoint import (
    SETTINGS_FILE,
    Checkpoint,
    EarlyExitSettings,
    find_checkpoints,
    read_settings,
)
from calibration.model.confidence import Confidence
from calibration.options import parse_budget, parse_exits
from calibration.training.heads import HeadOptions, are_in_effect, train_heads
from calibration.training.presets import preset_of
from calibration.training.small_family import PAGE_FILE as FAMILY_PAGE
from calibration.training.small_family import FamilyOptions, train_family
from calibration.training.text import DOMAINS
from calibration.training.thresholds import settle
from calibration.training.trace import PAGE_FILE as TRACE_PAGE
from calibration.training.trace import TraceOptions, trace_checkpoints
from calibration.training.trace_report import REPORT_FILE as TRACE_REPORT
from calibration.training.train import Reading
from helios_sim.console.command import Interrupted
from helios_sim.errors import InputError, listed
from helios_sim.profile import TRACES_FILE

_TOLD_EVERY_S: Final = 10.0


_OF_FAMILY: Final = frozenset(
    ("preset", "budget", "processes", "confidence", "threshold", "target_agreement")
)
_OF_HEADS: Final = frozenset(("exits", "domain", "iterations"))


def check_belong_together(heads_for: Path | None, given: Sequence[str]) -> None:
    """Raise `InputError` for an option of a family beside --heads-for, or of heads without it.

    `given` names the parameters that were typed.
    """
    if heads_for is None:
        idle, need = _OF_HEADS, "It applies to exit heads only; a family takes it from its preset"
        allowed = "leave it out, or name a checkpoint with --heads-for"
    else:
        idle, need = _OF_FAMILY, "It applies to a family only; exit heads have no use for it"
        allowed = "leave it out, or leave out --heads-for"
    for name in given:
        if name in idle:
            raise InputError(f"{need}: {allowed}.", f"--{name.replace('_', '-')}")


def train(
    out: Path | None,
    *,
    preset: str,
    seed: int,
    device: str,
    budget: str | None,
    processes: int | None,
    confidence: str | None,
    threshold: float | None,
    target_agreement: float | None,
) -> None:
    """Train a family and say how it went."""
    if out is None:
        raise InputError("The family needs a folder: give --out FOLDER.", "--out")
    options = FamilyOptions(
        seed=seed,
        device=device,
        budget_s=None if budget is None else parse_budget(budget),
        num_processes=processes,
        confidence=confidence,
        threshold=threshold,
        target_agreement=target_agreement,
    )
    chosen_preset = preset_of(preset)
    kept = f"models that were finished are kept in {out}, and the same command does the rest"
    unchanged: list[str] = []
    with _saying(lambda: kept):
        report = train_family(chosen_preset, out, options, _teller(), unchanged.append)
    for name, model in report["models"].items():
        exits = model["settings"]["plan"]["exit_layers"]
        if model["ended_by"] == "budget":
            typer.echo(
                f"{name} was ended by its budget after {model['iterations']:,} iterations; a "
                "larger --budget and a new --out train it to its end."
            )
        for domain in model["text"]:
            losses = ", ".join(
                f"L{layer} {nll:.3f}"
                for layer, nll in zip(exits, model["held_out"][domain]["nll_nats"], strict=True)
            )
            typer.echo(f"{name} on held-out {domain}, nats a byte: {losses}")
    chosen = report["confidence"]
    fitted = f"Confidence: {chosen['kind']}, threshold {chosen['threshold']:g}"
    # What the report says of confidence may have been replaced since it was written.
    for told in unchanged or [fitted]:
        typer.echo(told)
    typer.echo(f"Report: {out / FAMILY_PAGE}")


def heads(
    checkpoint: Path,
    out: Path | None,
    *,
    exits: str | None,
    domains: Sequence[str],
    iterations: int,
    seed: int,
    device: str,
) -> None:
    """Train auxiliary exit heads and say what they gain over the shared head."""
    if exits is None:
        raise InputError("Name the exits that get a head, such as --exits 6,12.", "--exits")
    layers = parse_exits(exits)
    options = HeadOptions(domains=tuple(domains) or DOMAINS, seed=seed, iterations=iterations)
    where = out or checkpoint
    had_heads = where.is_dir() and are_in_effect(where)

    def kept() -> str:
        if had_heads or not (where.is_dir() and are_in_effect(where)):
            return f"no new heads are in effect in {where}"
        return f"the heads were trained and are in effect in {where}"

    with _saying(kept):
        report = train_heads(checkpoint, layers, options, out=out, device=device_of(device))
    for domain, losses in report["held_out_nll_nats"].items():
        shared = report["held_out_nll_nats_shared_head"][domain]
        told = ", ".join(
            f"L{layer} {own:.3f} (shared head {other:.3f})"
            for layer, own, other in zip(report["exit_layers"], losses, shared, strict=True)
        )
        typer.echo(f"Held-out {domain}, nats a token: {told}")
    typer.echo(_replaced(report))
    typer.echo(
        f"Confidence was not fitted to these heads: run helios-calibrate confidence {where}, and "
        "trace and measure after it."
    )
    typer.echo(f"Heads: {where}")


def _replaced(report: Mapping[str, Any]) -> str:
    """What of a checkpoint's settings its new heads replaced."""
    exits, before = report["replaced"]["exit_layers"], report["replaced"]["confidence"]
    now = report["confidence"]
    if exits is None:
        return (
            f"{SETTINGS_FILE} was not there and is now: exits {report['exit_layers']}, confidence "
            f"{_named(now)}."
        )
    told = f"{SETTINGS_FILE}: exits {exits} are now {report['exit_layers']}, "
    if before == now:
        return f"{told}confidence is {_named(now)} as before."
    return (
        f"{told}confidence {_named(before)} is now {_named(now)}; its calibration maps are gone, "
        "since they were of other heads, and so is the threshold chosen for them."
    )


def _named(confidence: Mapping[str, Any]) -> str:
    return f"{confidence['kind']} with threshold {confidence['threshold']:g}"


def confidence(
    folders: Sequence[Path],
    *,
    kind: str,
    threshold: float | None,
    target_agreement: float,
    device: str,
) -> None:
    """Fit confidence of checkpoints and say what was chosen."""
    found = find_checkpoints(folders)
    with _saying(lambda: _stored(found)):
        chosen = settle(
            [opened.folder for opened in found.values()],
            kind=kind,
            threshold=threshold,
            target_agreement=target_agreement,
            device=device_of(device),
        )
    typer.echo(f"Confidence: {chosen['kind']}, threshold {chosen['threshold']:g}")
    for name, share in chosen["early_share"].items():
        agreement = chosen["early_agreement"][name]
        typer.echo(f"{name}: {share:.1%} of tokens leave early, {agreement:.1%} of them agree")


def _stored(found: Mapping[str, Checkpoint]) -> str:
    """Which of these checkpoints hold another confidence by now than when they were opened."""

    def of(settings: EarlyExitSettings | None) -> Confidence:
        return Confidence() if settings is None else settings.confidence

    changed = [
        name
        for name, opened in found.items()
        if of(read_settings(opened.folder)) != of(opened.settings)
    ]
    if not changed:
        return "no checkpoint's confidence was changed"
    others = [name for name in found if name not in changed]
    if not others:
        return f"the confidence of {listed(changed)} was stored, so of every checkpoint"
    return (
        f"the confidence of {listed(changed)} was stored and that of {listed(others)} is as it "
        "was, and the same command stores all"
    )


def trace(
    folders: Sequence[Path],
    out: Path,
    *,
    positions: int,
    window: int | None,
    domains: Sequence[str],
    device: str,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Trace checkpoints and say what the traces show."""
    options = TraceOptions(positions, window, tuple(domains) or DOMAINS)
    where = device_of(device)
    found = [opened.folder for opened in find_checkpoints(folders).values()]
    files = out / TRACES_FILE, out / TRACE_REPORT
    before = [_stamp(path) for path in files]

    def kept() -> str:
        is_new = [_stamp(path) != stamp for path, stamp in zip(files, before, strict=True)]
        if all(is_new):
            return f"the traces and their report are in {out}"
        if any(is_new):
            return (
                f"the traces are in {files[0]} without their report; the same command writes both"
            )
        return "no traces were written"

    with _saying(kept):
        report = trace_checkpoints(found, out, options, where, dtype_of(dtype, where))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, found in report["candidates"].items():
        for domain, figures in found["domains"].items():
            nll = ", ".join(
                f"L{layer} {value:.3f}"
                for layer, value in zip(found["exit_layers"], figures["nll_nats"], strict=True)
            )
            typer.echo(
                f"{name} on {domain}, nats: {nll}; mean exit layer {figures['mean_exit_layer']:.2f}"
            )
    typer.echo(f"Traces: {out / TRACES_FILE}\nReport: {out / TRACE_PAGE}")


@contextmanager
def _saying(kept: Callable[[], str]) -> Iterator[None]:
    """An interruption from within ends the command with what is there by then."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(kept()) from None


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that took its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _teller() -> Callable[[Reading], None]:
    """Tells a model's progress now and then, and its end."""
    told: dict[str, float] = {}

    def tell(reading: Reading) -> None:
        last = told.get(reading.model, -_TOLD_EVERY_S)
        if reading.seconds - last < _TOLD_EVERY_S and reading.progress < 1.0:
            return
        told[reading.model] = reading.seconds
        typer.echo(
            f"{reading.model}: {min(1.0, reading.progress):.0%}, {reading.tokens:,} bytes, loss "
            f"{reading.loss:.3f} nats, {reading.seconds:.0f} s"
        )

    return tell
