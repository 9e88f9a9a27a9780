"""Served and measured iterations of one load, in turns, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from calibration.measuring.bench import Bench
from calibration.measuring.grid import Job
from calibration.measuring.readings import Reading
from reports.fidelity.paired import PROMPT_TOKENS, app, pairs_of
from tests.calibration.serving import family, first_exit_threshold, model_of, write_profile


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints and their profile."""
    folder = tmp_path_factory.mktemp("paired")
    models = [model_of("small", (2, 4), seed=1), model_of("large", (2, 4, 6), seed=2)]
    threshold = first_exit_threshold(models[0])
    family(folder / "family", threshold)
    write_profile(folder / "profile", models, threshold)
    return folder


@pytest.mark.parametrize("depth", [None, 2])
def test_each_turn_serves_the_iteration_that_it_measures(
    place: Path, monkeypatch: pytest.MonkeyPatch, depth: int | None
) -> None:
    """Both take milliseconds of the same work; on a machine that others use no more can be held."""
    measured: list[Job] = []

    take = Bench.time

    def watched(bench: Bench, job: Job, patience_s: float) -> Iterator[Reading]:
        measured.append(job)
        return take(bench, job, patience_s)

    monkeypatch.setattr(Bench, "time", watched)
    given = (place / "profile", [place / "family"], "large", depth, 3, 2, "cpu")
    pairs = list(pairs_of(*given))
    assert len(pairs) == len(measured) == 2
    assert all(one.served_s > 0.0 and one.measured_s > 0.0 for one in pairs)
    assert all(one.ratio == one.served_s / one.measured_s for one in pairs)
    for job in measured:
        assert (job.depths, job.batch) == ((depth or 6,), 3)
        assert job.context_tokens == PROMPT_TOKENS + 20


def test_the_command_says_the_median_of_its_turns(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--profile", str(place / "profile"), "--checkpoints", str(place / "family")]
    app([*words, "--rows", "2", "--turns", "1"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "served/measured" in said
    assert "large, 2 rows: served over measured is " in said
