"""What only a GPU takes, part by part on a pretended one: waiting, page-locking, giving back."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.measuring import timing
from calibration.measuring.loading import parts_file, pinned_copies, time_checkpoint
from calibration.measuring.pace import Pace
from calibration.measuring.timing import (
    CUDA_SAMPLE_S,
    CudaTimer,
    Sample,
    WallTimer,
    Work,
    measure_pace,
    timer_for,
)
from calibration.model import host_copy
from calibration.model.early_exit import from_stock, save
from calibration.model.host_copy import HostCopy
from calibration.model.kv import KvDims, SlotPool, to_device
from tests.calibration.pretend_cuda import TORCH, Gpu, pretending
from tests.calibration.tiny import stock_model

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="a torch built for CUDA has no need of a pretended"
    ),
    pytest.mark.skipif(
        not torch.__version__.startswith(TORCH) or sys.platform != "linux",
        reason=f"the pretended device knows the inside of torch {TORCH} on Linux",
    ),
]

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretending() as made:
        yield made


def test_indices_reach_the_device_from_page_locked_memory_without_a_wait(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, pin = [], torch.Tensor.pin_memory

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return pin(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", counted)
    before = gpu.syncs.total()
    there = to_device(np.arange(3), DEVICE)
    assert len(pinned) == 1
    assert gpu.syncs.total() == before
    assert there.tolist() == [0, 1, 2]


def test_memory_of_layers_that_go_is_given_back_to_the_device_at_once(gpu: Gpu) -> None:
    pool = SlotPool(KvDims(2, 4, torch.float32, DEVICE), 2, 4, 16)
    held = gpu.reserved
    pool.resize(1)
    assert gpu.reserved == held // 2


def test_events_lie_around_all_repetitions_on_a_device_that_was_idle(gpu: Gpu) -> None:
    seen: list[tuple[int, int]] = []

    def work() -> None:
        seen.append((gpu.syncs["synchronize"], gpu.syncs["Event.synchronize"]))

    found = CudaTimer().sample(work, 3)
    assert seen == [(1, 0)] * 3
    assert gpu.syncs["Event.synchronize"] == 1
    assert found.seconds > 0.0


def test_the_wall_clock_waits_for_the_device_before_the_first_repetition_and_after_the_last(
    gpu: Gpu,
) -> None:
    seen: list[int] = []
    found = WallTimer(DEVICE).sample(lambda: seen.append(gpu.syncs["synchronize"]), 3)
    assert seen == [1, 1, 1]
    assert gpu.syncs["synchronize"] == 2
    assert found.lost_share == 0.0


def test_on_a_device_a_sample_is_of_a_hundredth_of_a_second_and_nobody_looks_at_the_host(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "reference", lambda: pytest.fail("the host was looked at"))
    assert isinstance(timer_for(DEVICE), CudaTimer)
    for timer in (CudaTimer(), WallTimer(DEVICE)):
        assert timer.min_sample_s == CUDA_SAMPLE_S
        assert timer.sample_s(1e-3) == pytest.approx(1.1 * CUDA_SAMPLE_S)
        assert timer.sample_s(1.0) == 1.0


def test_the_wall_clock_of_a_device_counts_what_the_host_waited(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WallTimer, "_timed", lambda self, work, times: (2.0 * times, 0.5 * times))
    assert WallTimer(DEVICE).sample(lambda: None, 3) == Sample(6.0)


def test_a_devices_pace_is_of_its_products_and_of_its_memory(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch, "mm", lambda *_: done.append("mm"))

    def sample(self: CudaTimer, work: Work, repetitions: int) -> Sample:
        done.clear()
        work()
        # One launch from an idle stream would be a good part of one copy.
        assert repetitions > 1
        return Sample(repetitions * (1.0 if done == ["mm"] else 2.0))

    monkeypatch.setattr(CudaTimer, "sample", sample)
    assert measure_pace(DEVICE) == Pace(1.0, 2.0)


def test_a_buffer_is_page_locked_whole_and_let_go_with_its_copy(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = HostCopy([3, 5], torch.bfloat16, True, DEVICE)
    assert (copy.is_pinned, copy.note) == (True, "")
    assert gpu.pinned == {copy.buffer.data_ptr(): 16}
    del copy
    gc.collect()
    assert gpu.pinned == {}


def test_a_buffer_that_was_not_page_locked_is_not_unlocked(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.refuses_to_register = 2
    undone: list[Any] = []
    monkeypatch.setattr(host_copy, "_unpin", lambda *given: undone.append(given))
    asked: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *sizes, **named: asked.append(1) or zeros(*sizes, **named)
    )
    copy = HostCopy([3, 5], torch.float32, True, DEVICE)
    assert not copy.is_pinned
    assert "refused to page-lock 32 bytes (CUDA error 2)" in copy.note
    # The error is fetched here, so that no later kernel is blamed for it.
    assert asked == [1]
    del copy
    gc.collect()
    assert undone == []
    said = pinned_copies(64, torch.float32, DEVICE)
    assert isinstance(said, str)
    assert "refused to page-lock 64 bytes" in said


def test_copies_over_the_link_are_of_so_many_bytes_and_waited_for(gpu: Gpu) -> None:
    work = pinned_copies(64, torch.bfloat16, DEVICE)
    assert not isinstance(work, str)
    assert list(gpu.pinned.values()) == [64]
    before = gpu.syncs["synchronize"]
    work()
    assert gpu.syncs["synchronize"] == before + 1


def test_a_stand_in_file_reaches_the_device_from_either_kind_of_memory(
    gpu: Gpu, tmp_path: Path
) -> None:
    from_pinned: list[bool] = []
    to_device = torch.Tensor.copy_

    def copied(target: torch.Tensor, source: torch.Tensor, *given: Any, **named: Any) -> Any:
        if target.device.type == "cuda":
            from_pinned.append(gpu.is_pinned(source))
        return to_device(target, source, *given, **named)

    with parts_file(tmp_path, 2**12, torch.float32) as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copied)
        stages = file.stages(DEVICE)
        seen = {}
        for stage in stages:
            seen[stage.quantity] = (list(from_pinned), gpu.syncs["synchronize"])
            from_pinned.clear()
    assert list(seen) == ["load_open", "load_disk", "load_host", "load_host_pinned", "unload"]
    assert [seen[name][0] for name in ("load_host", "load_host_pinned")] == [
        [False] * 2,
        [True] * 2,
    ]
    # What was loaded before, letting it go, and the load in its place.
    waits = [seen[name][1] for name in seen]
    assert waits[2] == waits[1] + 3
    assert waits[3] == waits[2] + 3
    assert gpu.reserved == gpu.allocated == 0


def test_a_stand_in_file_says_where_memory_could_not_be_page_locked(
    gpu: Gpu, tmp_path: Path
) -> None:
    gpu.refuses_to_register = 1
    with parts_file(tmp_path, 2**12, torch.float32) as file:
        notes = {stage.quantity: stage.note for stage in file.stages(DEVICE)}
    assert "refused to page-lock" in notes["load_host_pinned"]
    assert notes["load_host"] == ""


def test_a_checkpoint_reaches_the_device_from_either_kind_of_memory(
    gpu: Gpu, tmp_path: Path
) -> None:
    save(from_stock(stock_model("opt"), (2, 4), name="tiny"), tmp_path / "tiny")
    locked = {}
    for stage in time_checkpoint(
        tmp_path / "tiny", 2, exits=(2, 4), device=DEVICE, dtype=torch.float32
    ):
        locked[stage.quantity] = len(gpu.registered)
    assert list(locked) == ["load_open", "unload", "load_disk", "load_host", "load_host_pinned"]
    # The buffer that files are read into is page-locked, once for all loads of a model.
    once, *others, twice = locked.values()
    assert others == [once] * 3
    assert twice == once + 1
