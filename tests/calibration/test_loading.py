"""Loading by stage, the device's floors and what a process takes: on a processor, for real."""

from __future__ import annotations

import errno
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calibration.measuring import floors, load_trials, loading, occupancy
from calibration.measuring.board import NoBoard, open_board
from calibration.measuring.floors import (
    count_launches,
    launch_chain,
    time_copy,
    time_launch,
    time_read,
)
from calibration.measuring.load_trials import (
    LOAD_TRIALS,
    Load,
    Loading,
    checkpoint_loads,
    stand_in_loads,
)
from calibration.measuring.loading import StageTime, load_sizes, parts_file, time_checkpoint
from calibration.measuring.occupancy import (
    peak_bytes,
    reserve_bytes,
    reserved_bytes,
    taken_bytes,
)
from calibration.measuring.readings import CACHED, Reading
from calibration.measuring.sources import Source, find_sources
from calibration.measuring.timing import Sample, Timing, WallTimer, Work, timed
from calibration.model import file_cache, launches, memory
from calibration.model.early_exit import EarlyExitLM, from_stock, save
from calibration.model.file_cache import cached_share, forget, read_through
from calibration.model.host_copy import HostCopy
from helios_sim.errors import InputError
from tests.calibration.fake_nvml import FakeNvml
from tests.calibration.tiny import stock_model

CPU = torch.device("cpu")


def test_a_stand_in_file_goes_through_every_stage_and_is_gone_afterwards(tmp_path: Path) -> None:
    with parts_file(tmp_path, 2**20, torch.float32) as file:
        assert file.num_bytes == 2**20
        found = {stage.quantity: stage for stage in file.stages(CPU)}
    assert list(found) == ["load_open", "load_disk", "load_host", "unload"]
    assert all(stage.seconds > 0.0 for stage in found.values())
    assert all(stage.num_bytes == 2**20 for stage in found.values())
    assert list(tmp_path.iterdir()) == []


IN_MEMORY = Path("/dev/shm")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what it holds of a file")
def test_a_file_is_forgotten_only_where_its_pages_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "some"
    file.write_bytes(bytes(2**20))
    read_through([file])
    assert cached_share(file) == 1.0
    for share, gone in ((0.0, True), (0.005, True), (0.5, False), (None, False)):
        monkeypatch.setattr(file_cache, "cached_share", lambda _, share=share: share)
        assert forget([file]) == gone
    file.write_bytes(b"")
    assert cached_share(file) == 0.0


@pytest.mark.skipif(not IN_MEMORY.is_dir(), reason="this system has no file system in memory")
def test_loads_from_a_file_system_in_memory_are_said_to_be_of_the_cache() -> None:
    """There the system takes the wish to forget a file, and keeps all of it."""
    with (
        tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder,
        parts_file(Path(folder), 2**16, torch.float32) as file,
    ):
        notes = {stage.quantity: stage.note for stage in file.stages(CPU)}
    assert notes["load_open"] == notes["load_disk"] == CACHED


def test_a_load_is_taken_again_until_every_stage_of_it_is_read(tmp_path: Path) -> None:
    loads = stand_in_loads((2**14, 2**12))
    assert [(load.purpose, load.num_bytes) for load in loads] == [
        ("fit", 2**14),
        ("fit", 2**12),
        ("held-out", 2**13),
    ]
    taken: list[Reading] = []
    with Loading(CPU, torch.float32, tmp_path) as loading:
        asked = list(loading.missing(loads, taken, seed=0))
        assert len(asked) == 3 * LOAD_TRIALS
        assert [trial for _, trial in asked] == sorted(trial for _, trial in asked)
        assert list(tmp_path.iterdir()) == []
        for load, trial in asked:
            taken += [load.reading(found, trial) for found in loading.stages(load)]
        assert len(list(tmp_path.iterdir())) == 3
        assert list(loading.missing(loads, taken, seed=0)) == []
        last = taken.pop()
        assert last.quantity == "unload"
        assert list(loading.missing(loads, taken, seed=0)) == asked[-1:]
    assert list(tmp_path.iterdir()) == []
    assert len({reading.key for reading in taken}) == len(taken)
    with_a_gpu = Loading(torch.device("cuda"), torch.float32, tmp_path)
    assert len(list(with_a_gpu.missing(loads, [*taken, last], seed=0))) == len(asked)


def test_the_middle_exit_of_a_checkpoint_is_held_out(tmp_path: Path) -> None:
    save(from_stock(stock_model("opt"), (1, 2, 4), name="tiny"), tmp_path / "tiny")
    loads = checkpoint_loads(find_sources([str(tmp_path / "tiny"), "opt-1.3b"]))
    assert [(load.depth, load.purpose) for load in loads] == [
        (1, "fit"),
        (2, "held-out"),
        (4, "fit"),
    ]


def test_a_checkpoint_is_loaded_by_the_real_loader(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    save(from_stock(stock_model("opt"), (2, 4), name="tiny"), folder)
    stages = {
        depth: {
            stage.quantity: stage
            for stage in time_checkpoint(
                folder, depth, exits=(2, 4), device=CPU, dtype=torch.float32
            )
        }
        for depth in (2, 4)
    }
    for depth in (2, 4):
        assert list(stages[depth]) == ["load_open", "unload", "load_disk", "load_host"]
        moved = {stage.num_bytes for stage in stages[depth].values()}
        assert max(moved) < 1.02 * min(moved)
    assert stages[4]["load_disk"].num_bytes > stages[2]["load_disk"].num_bytes


def test_sizes_to_load_fall_by_fourths() -> None:
    assert load_sizes(2**30) == (2**30, 2**28, 2**26, 2**24)
    assert min(load_sizes(1)) == 4096


def test_launches_are_counted_without_views() -> None:
    value = torch.ones(4, 4)

    def work() -> object:
        return (value.view(16) + 1.0).reshape(4, 4).mm(value).transpose(0, 1)

    assert count_launches(work) == 2
    assert count_launches(launch_chain(7, CPU)) == 7


def test_kernels_of_ours_count_from_where_the_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.ones(4)
    monkeypatch.setitem(launches._launched, "earlier", 3)

    def work() -> object:
        launches._launched["earlier"] += 1
        return value + 1.0

    assert [count_launches(work) for _ in range(2)] == [2, 2]


def test_a_launch_is_a_share_of_a_chain_and_graphs_are_declined_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer = WallTimer(CPU, 0.002)
    chains: list[Timing] = []

    def kept(*given: Any, **named: Any) -> list[Timing]:
        chains.extend(found := timed(*given, **named))
        return found

    monkeypatch.setattr(floors, "timed", kept)
    found = time_launch(CPU, timer, "eager", 3)
    assert not isinstance(found, str)
    (chain,) = chains
    assert found.seconds == pytest.approx(chain.seconds / floors.CHAIN_LAUNCHES)
    # An operator on one number takes microseconds where nobody disturbs.
    assert 1e-8 < found.seconds < 1e-2
    assert "CUDA" in str(time_launch(CPU, timer, "graph", 3))


def test_memory_is_read_at_a_speed_that_memory_can_have() -> None:
    read = time_read(2**24, CPU, WallTimer(CPU, 0.002), 3)
    assert 1e6 < 2**24 / read.seconds < 1e13


def test_as_many_bytes_are_read_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class SecondTimer:
        """A timer by which every repetition takes a second."""

        min_sample_s = 0.5

        def sample(self, work: Work, repetitions: int) -> Sample:
            work()
            return Sample(float(repetitions))

        def sample_s(self, pass_s: float) -> float:
            return pass_s

    read: set[int] = set()
    monkeypatch.setattr(torch, "sum", lambda source: read.add(source.nbytes))
    assert time_read(4096, CPU, SecondTimer(), 1).seconds == 1.0
    assert read == {4096}


def test_floors_take_disturbed_samples_where_their_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short budget would else be spent on them, where others never rest."""
    asked: list[float] = []
    take = timed

    def watched(works: Any, timer: Any, **given: Any) -> list[Timing]:
        asked.append(given["patience_s"])
        return take(works, timer, **given)

    monkeypatch.setattr(floors, "timed", watched)
    timer = WallTimer(CPU, 0.001)
    time_copy(2**16, CPU, timer, 1, 1.5)
    time_read(2**16, CPU, timer, 1, 2.5)
    time_launch(CPU, timer, "eager", 1, 3.5)
    assert asked == [1.5, 2.5, 3.5]


def test_a_copy_counts_bytes_read_and_written() -> None:
    timing, moved = time_copy(2**22, CPU, WallTimer(CPU, 0.002), 3)
    assert moved == 2**23
    # Slower than a network or faster than any memory would be no copy.
    assert 1e6 < moved / timing.seconds < 1e13


def test_the_peak_of_work_is_the_same_whatever_the_process_held_before(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        first = torch.ones(2**20)
        second = first + first
        del first
        torch.cat([second, second])

    expected = 4 * (2**20 + 2**21)
    taken = peak_bytes(CPU, work)
    if taken is None:
        pytest.skip("this torch does not tell what is allocated")
    assert taken == expected
    # Freed blocks that stay with the process are taken anew without a rise.
    held = [torch.ones(2**18) for _ in range(64)]
    del held
    assert [peak_bytes(CPU, work) for _ in range(2)] == [expected, expected]
    assert peak_bytes(CPU, lambda: None) == 0
    assert capfd.readouterr().err == ""


def test_a_peak_that_nobody_counts_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "kineto_available", lambda: False)
    assert peak_bytes(CPU, lambda: None) is None


def test_the_reserve_is_the_process_without_models() -> None:
    reserve = reserve_bytes(CPU, NoBoard("a processor has no board"))
    assert reserve is None or reserve > 2**24
    assert reserved_bytes(CPU) == 0
    assert open_board(nvml=FakeNvml()).state().memory_used_bytes == 600 * 2**20


def test_bytes_of_a_gpu_are_told_apart_by_who_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 bytes 700 are free; torch holds 100, of which 50 are in use and were 90 at most."""
    told = {
        "init": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "mem_get_info": (700, 1000),
        "memory_reserved": 100,
        "memory_allocated": 50,
        "max_memory_allocated": 90,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    gpu = torch.device("cuda")
    assert taken_bytes(gpu) == 300
    assert reserve_bytes(gpu, NoBoard("none answers")) == 200
    assert peak_bytes(gpu, lambda: None) == 40


def test_the_system_tells_resident_memory_in_units_of_1024_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t      3 kB\n")
    monkeypatch.setattr(occupancy, "_STATUS", status)
    assert reserve_bytes(CPU, NoBoard("a processor has no board")) == 3072


def test_each_stage_of_a_checkpoint_has_its_own_seconds_and_its_own_word_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    save(from_stock(stock_model("opt"), (2, 4), name="tiny"), folder)
    grow, gone = EarlyExitLM.grow, iter((False, True))

    def grown(model: EarlyExitLM, depth: int) -> Any:
        return replace(grow(model, depth), read_s=1.0, seconds=2.0)

    unload = EarlyExitLM.unload
    monkeypatch.setattr(EarlyExitLM, "grow", grown)
    monkeypatch.setattr(EarlyExitLM, "unload", lambda model: 0.0 * unload(model) + 0.5)
    monkeypatch.setattr(loading, "forget", lambda files: next(gone))
    stages = time_checkpoint(folder, 2, exits=(2, 4), device=CPU, dtype=torch.float32)
    found = {stage.quantity: stage for stage in stages}
    assert next(gone, None) is None
    # A switch lets the weights before go, and so does a load from host memory here.
    assert (found["load_disk"].seconds, found["load_host"].seconds) == (1.0, 2.5)
    assert found["unload"].seconds == 0.5
    assert (found["load_open"].note, found["load_disk"].note) == (CACHED, "")


def test_a_stand_in_file_is_read_part_by_part_and_says_what_the_cache_may_have_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[HostCopy] = []

    def kept(*given: Any) -> HostCopy:
        copies.append(HostCopy(*given))
        return copies[-1]

    gone = iter((True, False))
    monkeypatch.setattr(loading, "PART_BYTES", 2**10)
    monkeypatch.setattr(loading, "HostCopy", kept)
    monkeypatch.setattr(loading, "forget", lambda files: next(gone))
    with parts_file(tmp_path, 2**12, torch.float32) as file:
        notes = {stage.quantity: stage.note for stage in file.stages(CPU)}
        parts = load_file(file.file)
    assert len(parts) == 4
    (copy,) = copies
    for number, name in enumerate(sorted(parts)):
        assert torch.equal(copy.part(number), parts[name])
    assert (notes["load_open"], notes["load_disk"]) == ("", CACHED)


def test_a_disk_that_is_full_is_what_a_stand_in_file_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading, "save_file", full)
    with (
        pytest.raises(OSError, match="No space left"),
        parts_file(tmp_path, 2**12, torch.float32),
    ):
        pass


def test_a_copy_that_host_memory_lacks_room_for_is_refused_with_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 31)
    with pytest.raises(InputError, match=r"in host memory needs 32 bytes"):
        HostCopy([3, 5], torch.float32, False, CPU)


def source_of(exits: tuple[int, ...]) -> Source:
    shape: Any = None
    return Source("tiny", Path("tiny"), shape, exits, "bytes")


def test_a_reading_says_of_which_load_and_which_purpose_it_is() -> None:
    source = source_of((1, 2))
    stage = StageTime("load_disk", 0.5, 96, CACHED)
    load = Load("fit", source, 2)
    reading = load.reading(stage, 1)
    assert (reading.model, reading.layers, reading.bytes, reading.predicted_bytes) == (
        "tiny",
        2,
        96,
        None,
    )
    assert (reading.note, reading.seconds) == (CACHED, 0.5)
    assert load.is_of(reading, 1)
    assert not load.is_of(reading, 0)
    assert not replace(load, purpose="held-out").is_of(reading, 1)
    assert not replace(load, depth=1).is_of(reading, 1)
    stand_in = Load("fit", num_bytes=100).reading(stage, 0)
    assert (stand_in.bytes, stand_in.predicted_bytes) == (96, 100)
    # Of two exits neither is between others.
    assert [one.purpose for one in checkpoint_loads([source])] == ["fit", "fit"]


def test_the_held_out_file_lies_between_the_two_largest() -> None:
    loads = stand_in_loads((2**14, 2**12, 2**10))
    assert (loads[-1].purpose, loads[-1].num_bytes) == ("held-out", 2**13)


def test_loads_are_in_an_order_by_the_seed_and_a_file_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = stand_in_loads(tuple(2**size for size in range(20, 10, -1)))
    made: list[int] = []

    def counted(folder: Path, num_bytes: int, dtype: torch.dtype) -> Any:
        made.append(num_bytes)
        return parts_file(folder, num_bytes, dtype)

    monkeypatch.setattr(load_trials, "parts_file", counted)
    with Loading(CPU, torch.float32, tmp_path) as some:
        orders = [list(some.missing(loads, [], seed)) for seed in (1, 1, 2)]
        some.prepare(loads[-2])
        some.prepare(loads[-2])
    assert orders[0] == orders[1] != orders[2]
    assert made == [2**11]


def test_a_checkpoint_is_loaded_with_the_exits_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def timed_loads(folder: Path, depth: int, *, exits: Any, **named: Any) -> list[StageTime]:
        asked.append((folder, depth, exits, named))
        return []

    monkeypatch.setattr(load_trials, "time_checkpoint", timed_loads)
    source = source_of((1, 3))
    with Loading(CPU, torch.bfloat16, tmp_path) as some:
        assert list(some.stages(Load("fit", source, 3))) == []
    assert asked == [(Path("tiny"), 3, (1, 3), {"device": CPU, "dtype": torch.bfloat16})]
