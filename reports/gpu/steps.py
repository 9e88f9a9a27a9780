"""The steps of a campaign on a GPU and of its rehearsal on a processor, as commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from reports.gpu.campaign import GRACE_S, Call, Step

IMPORTED: Final = (
    "calibration.cli",
    "calibration.doctor",
    "calibration.measuring.measure",
    "calibration.training.small_family",
    "calibration.fitting.fit",
    "calibration.serving.serve",
    "reports.fidelity.study",
    "pytest",
)
"""What steps import."""

CUDA_TESTS: Final = (
    "decode",
    "early_exit",
    "fused",
    "graphs",
    "measure",
    "shapes",
    "timing",
    "varlen",
)
"""Test files of the real backend that have tests for a GPU; `doctor` is a step of its own. The
others need more packages to be collected."""

SHAPES: Final = ("llama3-8b", "opt-1.3b", "opt-6.7b")

CASES: Final = (
    "helios-saturating-steady-stable",
    "vanilla-saturating-steady-stable",
    "ee-single-wait-saturating-steady-stable",
    "helios-70-bursty-drifting",
    "vanilla-light-steady-drifting",
    "static-depth-70-steady-drifting",
    "ee-single-rebatch-light-bursty-stable",
    "ee-single-wait-70-bursty-drifting",
    "helios-saturating-bursty-drifting",
    "vanilla-saturating-bursty-drifting",
    "vanilla-smallest-saturating-steady-stable",
    "ee-single-rebatch-saturating-steady-stable",
    "static-depth-saturating-steady-stable",
)
"""Cases of the study in order of worth: any first part crosses policies, loads and texts."""

_COMPILE: Final = (
    "from pathlib import Path; from reports.fidelity.cases import *; "
    "planned(CASES[:10], read_ground(StudySettings(Path('small-family-cpu'))))"
)
"""What compiles the simulator's loop, so that the study finds it compiled."""


@dataclass(frozen=True)
class Preset:
    """How large a campaign is.

    `models` are folders of checkpoints that are measured and served. Training and measuring get
    these shares of the budget. A serving takes `serving_s` beside its requests: starting, models,
    graphs, comparison; before the first the study takes `study_s`. Other options come as words.
    """

    train: tuple[str, ...]
    measure: tuple[str, ...]
    models: str
    train_share: float
    measure_share: float
    max_batch: int
    least_cases: int
    most_cases: int
    serving_s: float
    study_s: float
    least_seconds: float
    most_seconds: float


PRESETS: Final = {
    "cuda": Preset(
        train=("--preset", "cuda"),
        measure=(),
        models="family",
        train_share=0.12,
        measure_share=0.28,
        max_batch=64,
        least_cases=8,
        most_cases=len(CASES),
        serving_s=18.0,
        study_s=20.0,
        least_seconds=3.0,
        most_seconds=15.0,
    ),
    "tiny": Preset(
        train=("--preset", "tiny", "--processes", "1"),
        measure=("--max-batch", "4", "--max-context", "128"),
        models="family/general-12l",
        train_share=0.04,
        measure_share=0.2,
        max_batch=4,
        least_cases=2,
        most_cases=2,
        serving_s=14.0,
        study_s=10.0,
        least_seconds=2.0,
        most_seconds=2.0,
    ),
}


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _calibrate(*words: str) -> list[str]:
    return _python("calibration", *words)


def steps_of(device: str, preset: str) -> list[Step]:
    """All steps in order of worth."""
    size = PRESETS[preset]
    on = ("--device", device)
    gpu = device == "cuda"
    # On a processor one small file shows that the tests can be run at all.
    tests = [f"tests/calibration/test_{name}.py" for name in (CUDA_TESTS if gpu else ("grid",))]
    marked = ("-m", "cuda" if gpu else "not cuda", *tests)

    def train(call: Call) -> Sequence[str]:
        family = str(call.out / "family")
        return _calibrate("train", *size.train, *on, *_budget(call), "--out", family)

    def measure(*models: str, out: str, more: tuple[str, ...]) -> Callable[[Call], Sequence[str]]:
        def words(call: Call) -> Sequence[str]:
            folder = call.out / out
            known = [str(call.out / one) if one == size.models else one for one in models]
            resume = ("--resume",) if (folder / "readings.jsonl").is_file() else ()
            return _calibrate(
                "measure", *known, *on, *_budget(call), *more, "--out", str(folder), *resume
            )

        return words

    def fit(points: str, profile: str) -> Callable[[Call], Sequence[str]]:
        return lambda call: _calibrate(
            "fit", str(call.out / points), "--out", str(call.out / profile), "--overwrite"
        )

    def check(call: Call) -> Sequence[str]:
        return _calibrate("check", str(call.out / "profile"))

    def fidelity(call: Call) -> Sequence[str]:
        names, seconds, repeats = study_size(call, size)
        study = call.out / "study"
        return _python(
            "reports.fidelity",
            "--profile",
            str(call.out / "profile"),
            "--checkpoints",
            str(call.out / size.models),
            *on,
            "--seconds",
            seconds,
            "--repeats",
            repeats,
            "--max-batch",
            str(size.max_batch),
            # The page says how slow the device was; there is no time to serve a run again for it.
            "--again",
            "0",
            *(("--forked",) if call.forks else ()),
            "--work",
            str(study / "runs"),
            "--out",
            str(study / "page"),
            *(word for name in names for word in ("--case", name)),
        )

    def paired(call: Call) -> Sequence[str]:
        return _python(
            "reports.fidelity.paired",
            *("--profile", str(call.out / "profile")),
            *("--checkpoints", str(call.out / size.models)),
            *on,
            *("--rows", str(size.max_batch), "--turns", "5"),
        )

    pytest = _python("pytest", "-p", "no:cacheprovider", "-W", "default", *marked)
    no_shapes = "" if gpu else "public shapes are of a GPU's size, and a rehearsal does without"
    pages = ("plotly",)
    return [
        Step("environment", lambda call: _calibrate("environment"), extra_s=40, least_s=5),
        Step("doctor", lambda call: _calibrate("doctor", *on), extra_s=90, least_s=20),
        Step(
            "train",
            train,
            # Reading the text takes a slow host a minute and a half, and confidence is fitted last.
            extra_s=160 if gpu else 40,
            least_s=45,
            share=size.train_share,
            leaves="family/*/model.safetensors",
            beside=(sys.executable, "-c", _COMPILE) if gpu else (),
        ),
        Step(
            "measure",
            measure(size.models, out="points", more=size.measure),
            extra_s=75,
            least_s=45,
            share=size.measure_share,
            after=("train",),
            leaves="points/readings.jsonl",
            resumes=True,
        ),
        Step(
            "fit",
            fit("points", "profile"),
            extra_s=60,
            least_s=10,
            packages=pages,
            after=("measure",),
            leaves="profile/profile.json",
        ),
        Step("check", check, extra_s=30, least_s=5, after=("fit",)),
        Step(
            "fidelity",
            fidelity,
            # At its limit it is asked to end so long before it is killed.
            extra_s=GRACE_S,
            least_s=40,
            share=0.5,
            packages=("simpy", *pages),
            after=("train", "fit"),
            leaves="study/page/results.json",
        ),
        Step(
            "tests",
            lambda call: pytest,
            extra_s=120,
            least_s=20 if gpu else 8,
            packages=("pytest",),
        ),
        Step(
            "kernels",
            lambda call: _python("reports.gpu.kernels"),
            extra_s=120,
            least_s=40,
            unsuited="" if gpu else "kernels are a GPU's",
        ),
        Step(
            "paired",
            paired,
            extra_s=45,
            least_s=25 if gpu else 8,
            packages=("simpy", *pages),
            after=("train", "fit"),
        ),
        Step(
            "shapes",
            measure(*SHAPES, out="shapes", more=("--dtype", "bfloat16", "--no-traces")),
            extra_s=60,
            least_s=100,
            share=1.0,
            leaves="shapes/readings.jsonl",
            unsuited=no_shapes,
            resumes=True,
        ),
        Step(
            "fit-shapes",
            fit("shapes", "shapes-profile"),
            extra_s=60,
            least_s=10,
            packages=pages,
            after=("shapes",),
            leaves="shapes-profile/profile.json",
            unsuited=no_shapes,
        ),
    ]


def _budget(call: Call) -> tuple[str, str]:
    return "--budget", f"{max(5, int(call.work_s))}s"


def study_size(call: Call, size: Preset) -> tuple[tuple[str, ...], str, str]:
    """The cases that fit into the time, the seconds of a run and the repeats.

    The least are tried where not even they seem to fit: a study that is cut short keeps its cases.
    What an earlier call began is gone on with as it was: with other seconds everything would be
    served anew.
    """
    if call.earlier:
        kept = list(zip(call.earlier, call.earlier[1:], strict=False))
        cases = tuple(value for option, value in kept if option == "--case")
        options = dict(kept)
        return cases, options["--seconds"], options["--repeats"]
    time_s = call.work_s - size.study_s
    fitting = int(time_s / (size.serving_s + size.least_seconds))
    count = max(size.least_cases, min(size.most_cases, fitting))
    wanted_s = size.serving_s + size.most_seconds
    repeats = max(1, min(3, int(time_s / (count * wanted_s))))
    seconds = time_s / (count * repeats) - size.serving_s
    seconds = max(size.least_seconds, min(size.most_seconds, seconds))
    return CASES[:count], str(int(seconds)), str(repeats)
