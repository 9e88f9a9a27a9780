"""The small family trained side by side in processes, and the report of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from calibration.device import device_of
from calibration.model.checkpoint import write_json
from calibration.training.presets import ModelPlan, Preset
from calibration.training.thresholds import (
    TARGET_AGREEMENT,
    FittingOptions,
    check_choice,
    kind_of,
    settle,
)
from calibration.training.train import Reading, train_model
from helios_sim.errors import InputError
from helios_sim.folders import write_whole

REPORT_FILE: Final = "training.json"
PAGE_FILE: Final = "training.md"
READINGS_FOLDER: Final = "readings"
DEFAULT_KIND: Final = "max-softmax"
"""The kind of confidence that a family gets unless another is asked for."""

_POLL_S: Final = 0.5

OnReading = Callable[[Reading], None]


@dataclass(frozen=True)
class FamilyOptions:
    """How a family is trained beyond its preset; None leaves the choice to the preset.

    `device` is "auto", "cpu" or "cuda". `num_processes` train models side by side, one thread
    each, on a CPU; a GPU trains one after another. `confidence` is a profile's kind, max-softmax
    unless given; a threshold that is not given is chosen for `target_agreement`
    (`calibration.training.thresholds.settle`).
    """

    seed: int = 0
    device: str = "auto"
    budget_s: float | None = None
    num_processes: int | None = None
    confidence: str | None = None
    threshold: float | None = None
    target_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.budget_s is not None and not 1.0 <= self.budget_s <= 1e6:
            raise InputError(
                f"A budget of {self.budget_s:g} s was given; allowed are 1 to 1,000,000 s.",
                "--budget",
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise InputError(
                f"{self.num_processes} processes were asked for; at least 1 is needed.",
                "--processes",
            )
        kind_of(self.kind, "--confidence")
        check_choice(self.threshold, self.agreement)
        if self.seed < 0:
            raise InputError(f"The seed {self.seed} was given; it must be 0 or more.", "--seed")

    @property
    def kind(self) -> str:
        """The kind of confidence, given or not."""
        return DEFAULT_KIND if self.confidence is None else self.confidence

    @property
    def agreement(self) -> float:
        """The target agreement, given or not."""
        return TARGET_AGREEMENT if self.target_agreement is None else self.target_agreement

    @property
    def asks_for_confidence(self) -> bool:
        """Whether anything of confidence was given."""
        given = self.confidence, self.threshold, self.target_agreement
        return any(one is not None for one in given)


def train_family(
    preset: Preset,
    out: Path,
    options: FamilyOptions,
    on_reading: OnReading | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train the models of a preset into `out/<name>` and write the report beside them.

    Models that are there already and were trained alike are kept, so an interrupted call can be
    made again; readings are appended to `out/readings/<name>.jsonl` as they are taken. A family
    that the report tells whole is left as it is, with the confidence that it has by now, unless
    the options ask for one; `tell` then gets a sentence. Returns what `out/training.json` says.
    """
    device = device_of(options.device)
    _check_target(out)
    began_s = time.perf_counter()
    usual = 1 if device.type == "cuda" else min(os.cpu_count() or 1, len(preset.models))
    processes = min(options.num_processes or usual, len(preset.models))
    budget_s = options.budget_s or preset.budget_s
    jobs = [
        _Job(
            plan, preset, out, options.seed, device.type, min(plan.share * processes, 1) * budget_s
        )
        for plan in sorted(preset.models, key=lambda plan: -plan.share)
    ]
    # A model's folder is whole or absent. Trained anew a model may be described as it was before.
    were_there = all((out / plan.name).is_dir() for plan in preset.models)
    heard = on_reading or (lambda reading: None)
    documents = _side_by_side(jobs, processes, heard) if processes > 1 else _in_turn(jobs, heard)
    earlier = _finished(out, documents) if were_there else None
    if earlier is not None and not options.asks_for_confidence:
        if tell is not None:
            tell(
                f"Every model of {out} was trained before, so nothing is changed, confidence "
                "included; to choose it anew give --confidence, --threshold or "
                "--target-agreement, or use helios-calibrate confidence."
            )
        return earlier
    positions = preset.held_out_tokens // 2
    confidence = settle(
        [out / plan.name for plan in preset.models],
        kind=options.kind,
        threshold=options.threshold,
        target_agreement=options.agreement,
        device=device,
        options=FittingOptions(positions, min(256, preset.long_window_tokens)),
    )
    report = {
        "preset": preset.name,
        "seed": options.seed,
        "device": device.type,
        "processes": processes,
        "seconds": round(time.perf_counter() - began_s, 3),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "confidence": confidence,
        "models": {plan.name: documents[plan.name] for plan in preset.models},
    }
    try:
        write_whole(out / PAGE_FILE, family_page(report).encode())
        # The last one: a later call takes it for the end of this one.
        write_json(out / REPORT_FILE, report)
    except OSError as error:
        raise InputError(
            f"The report cannot be written: {error.strerror}. The models are there; free some "
            "space and call again.",
            str(out),
        ) from error
    return report


def _finished(out: Path, documents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The report of an earlier call that trained these very models and came to its end.

    Confidence is settled before the report is written, so without one it may not be.
    """
    try:
        report: Any = json.loads((out / REPORT_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("models") != documents:
        return None
    return report


def family_page(report: Mapping[str, Any]) -> str:
    """The report as a short Markdown page."""
    lines = [
        f"# A small family, preset {report['preset']}",
        "",
        f"Seed {report['seed']}, {report['processes']} process(es) on {report['device']}, "
        f"{report['seconds']:.0f} s in all; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + ".",
        "",
        "Loss in nats a byte at each exit on held-out text (the calibration split); it falls with "
        "depth wherever a model was trained on the domain.",
        "",
        "| model | parameters | tokens seen | seconds | ended by | domain | loss by exit | "
        "right at full depth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in report["models"].items():
        exits = model["settings"]["plan"]["exit_layers"]
        for domain, found in model["held_out"].items():
            own = " (own)" if domain in model["text"] else ""
            losses = ", ".join(
                f"L{layer} {nll:.3f}" for layer, nll in zip(exits, found["nll_nats"], strict=True)
            )
            lines.append(
                f"| {name} | {model['parameters']:,} | {model['tokens']:,} | "
                f"{model['seconds']:.0f} | {model['ended_by']} | {domain}{own} | {losses} | "
                f"{found['accuracy'][-1]:.1%} |"
            )
    confidence = report["confidence"]
    target = confidence["target_agreement"]
    why = "as given" if target is None else f"for an agreement of {target:.0%} in every model"
    early = ", ".join(
        f"{name} {share:.1%} of tokens, {confidence['early_agreement'][name]:.1%} agree"
        for name, share in confidence["early_share"].items()
    )
    lines += [
        "",
        f"Confidence: {confidence['kind']}, threshold {confidence['threshold']:g}, {why}. Leaving "
        f"early on the domains a model was trained on: {early}.",
    ]
    lines += ["", "| model | text | bytes | SHA-256 |", "|---|---|---|---|"]
    for name, model in report["models"].items():
        for domain, text in model["text"].items():
            lines.append(f"| {name} | {domain} | {text['bytes']:,} | `{text['sha256'][:16]}` |")
        lines.append(f"| {name} | weights | | `{model['weights_sha256'][:16]}` |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Job:
    """One model to train."""

    plan: ModelPlan
    preset: Preset
    out: Path
    seed: int
    device: str
    budget_s: float

    @property
    def readings_path(self) -> Path:
        """Where its readings are appended."""
        return self.out / READINGS_FOLDER / f"{self.plan.name}.jsonl"


def _run(job: _Job, on_reading: OnReading) -> dict[str, Any]:
    def keep(reading: Reading) -> None:
        try:
            job.readings_path.parent.mkdir(exist_ok=True)
            with job.readings_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(reading)) + "\n")
        except OSError as error:
            raise InputError(
                f"A reading cannot be written: {error.strerror}. Free some space, or give another "
                "--out.",
                str(job.readings_path),
            ) from error
        on_reading(reading)

    return train_model(
        job.plan,
        job.preset,
        job.out,
        seed=job.seed,
        device=torch.device(job.device),
        budget_s=job.budget_s,
        on_reading=keep,
    )


def _in_turn(jobs: Sequence[_Job], on_reading: OnReading) -> dict[str, dict[str, Any]]:
    return {job.plan.name: _run(job, on_reading) for job in jobs}


def _run_quietly(job: _Job) -> dict[str, Any]:
    """A job in its own process: one thread, readings in the file alone."""
    # The parent ends its workers; an interrupt that reached them too would be told twice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    return _run(job, lambda reading: None)


def _side_by_side(
    jobs: Sequence[_Job], processes: int, on_reading: OnReading
) -> dict[str, dict[str, Any]]:
    # Workers start afresh: a forked one would inherit the locks of this process's threads.
    context = multiprocessing.get_context("spawn")
    # Waiting threads of the workers must sleep: they share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running: dict[Future[dict[str, Any]], _Job] = {
            pool.submit(_run_quietly, job): job for job in jobs
        }
        followed = [_Follower(job.readings_path, on_reading) for job in jobs]
        documents = {}
        try:
            while running:
                done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for follower in followed:
                    follower.tell_new()
                for future in done:
                    documents[running.pop(future).plan.name] = future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "A training process died, perhaps for lack of memory; give fewer --processes. "
                "Models that are finished are kept.",
                "train",
            ) from error
        except BaseException:
            # Nobody waits for what they train; models that are finished are in place.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return documents


class _Follower:
    """Tells the readings that a process appends to a file."""

    def __init__(self, path: Path, on_reading: OnReading) -> None:
        self._path = path
        self._on_reading = on_reading
        self._place = path.stat().st_size if path.exists() else 0

    def tell_new(self) -> None:
        """Tell what came since the last call."""
        with suppress(FileNotFoundError), self._path.open(encoding="utf-8") as file:
            file.seek(self._place)
            for line in _whole_lines(file):
                self._place += len(line.encode())
                self._on_reading(Reading(**json.loads(line)))


def _whole_lines(file: TextIO) -> list[str]:
    return [line for line in file if line.endswith("\n")]


def _check_target(out: Path) -> None:
    """Raise `InputError` unless the folder can be made and written, before minutes are spent."""
    if out.exists() and not out.is_dir():
        raise InputError("It is a file; allowed is a folder.", str(out))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"No models can be written there: {error.strerror}.", str(out)) from error
