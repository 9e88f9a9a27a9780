"""A first look at a machine passes where all is well, and names what is not."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from calibration import doctor
from calibration.cli import app
from calibration.model import graphs
from calibration.model.kv import Pool
from tests.calibration import tiny
from tests.calibration.test_graphs import FakeRecorder

CPU = torch.device("cpu")


def test_on_a_processor_everything_passes_or_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("calibration.measuring.timing.CPU_SAMPLE_S", 1e-3)
    # A busy machine would have samples taken again that nobody compares.
    monkeypatch.setattr("calibration.measuring.timing.DISTURBED_SHARE", 1.0)
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == len(list(doctor.checks())) + 1
    assert {line.split()[0] for line in lines[:-1]} == {"pass", "skip"}
    skipped = [line for line in lines if line.startswith("skip")]
    assert all(": " in line for line in skipped)
    assert sum("CUDA graphs need a CUDA" in line for line in skipped) == 5
    assert " 0 failed" in lines[-1]


def test_graphs_are_compared_with_the_eager_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "cuda_recorder", lambda device: FakeRecorder())
    checks = dict(doctor.checks())
    for name in ("llama in float32", "opt in bfloat16"):
        # Segments 0-1, 1-2 and 2-4; 2 and 4 rows; two contexts; some rows or all where in slots:
        # 36. Embedding and filling the last two segments, of each pool: 12. As they are wanted 6
        # segments more of each pool, all rows at one context, some at the other, embedding, and
        # both fillings of one row: 18.
        assert "66 graphs captured" in checks[f"{name}, graphs"](CPU)

    class Late(FakeRecorder):  # type: ignore[misc]
        """Gives what was computed when capturing, as a graph that reads nothing would."""

        def record(self, body: object, warm_ups: int) -> object:
            recording = super().record(body, warm_ups)
            recording.replay = lambda: recording.output
            return recording

    monkeypatch.setattr(graphs, "cuda_recorder", lambda device: Late())
    with pytest.raises(doctor.Disagreement, match="is allowed"):
        checks["llama in float32, graphs"](CPU)


def test_a_fault_is_named_and_ends_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(self: Pool, layer: int, *rest: torch.Tensor) -> None:
        """Write nothing in the last layer."""
        if layer < 3:
            whole(self, layer, *rest)

    whole = Pool.write
    monkeypatch.setattr(Pool, "write", forgets)
    wanted = ("device", "llama in float32, layer by layer", "launches from a graph")
    kept = [one for one in doctor.checks() if one[0] in wanted]
    monkeypatch.setattr(doctor, "checks", lambda: kept)
    told: list[str] = []
    assert not doctor.command(CPU, told.append)
    assert [line.split()[0] for line in told[:-1]] == ["pass", "fail", "skip"]
    assert "off by" in told[1]
    assert told[-1] == "1 checks passed, 1 failed, 1 were skipped on cpu."


def test_a_check_that_breaks_says_what_broke() -> None:
    def breaks(device: torch.device) -> str:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    assert doctor._verdict(breaks, CPU) == (
        "fail",
        "RuntimeError: CUDA error: no kernel image is available",
    )


@pytest.mark.cuda
def test_nothing_fails_on_a_gpu() -> None:
    told: list[str] = []
    assert doctor.command(tiny.need("cuda"), told.append), "\n".join(told)
