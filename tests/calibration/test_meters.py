"""Energy meters: what a window yields, from which source, and what absence says."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from calibration.measuring.board import Board, BoardState, NoBoard, open_board
from calibration.measuring.meters import (
    Absence,
    CounterMeter,
    CrossChecked,
    Measurement,
    MeterUnavailable,
    NoMeter,
    NvmlCounter,
    NvmlPower,
    Rapl,
    RaplCounter,
    Replayed,
    Window,
    best_meter,
    probe_ticks,
    to_json,
    window_of,
)
from helios_sim.errors import InputError
from tests.calibration import scripted_time
from tests.calibration.fake_nvml import FakeNvml
from tests.calibration.scripted_time import ScriptedTime
from tests.shared_machine import undisturbed

SHORT: dict[str, Any] = {"min_window_s": 0.2, "min_ticks": 5}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ScriptedTime:
    return scripted_time.of_meters(monkeypatch)


def board(**settings: Any) -> Board:
    found = open_board(nvml=FakeNvml(**settings))
    assert isinstance(found, Board)
    return found


def measured(outcome: Measurement | Absence) -> Measurement:
    assert isinstance(outcome, Measurement), outcome
    return outcome


def test_the_tick_of_a_counter_is_found_not_assumed(clock: ScriptedTime) -> None:
    probe = probe_ticks(board(tick_s=0.02).energy_j)
    assert probe is not None
    assert probe.period_s == pytest.approx(0.02, rel=0.05)


def test_a_counter_that_stands_still_is_no_meter(clock: ScriptedTime) -> None:
    with pytest.raises(MeterUnavailable, match="did not move"):
        CounterMeter("still", lambda: 5.0, "A counter")


def test_a_counter_window_runs_from_tick_to_tick_and_finds_the_watts(clock: ScriptedTime) -> None:
    meter = NvmlCounter(board(watts=300.0, tick_s=0.03), **SHORT)
    window = meter.open()
    clock.sleep(0.31)
    found = measured(window.close(busy_s=0.2))
    assert found.source == "nvml-counter"
    assert found.aligned
    assert not found.short
    assert found.wall_s == pytest.approx(0.31)
    assert found.ticks in (8, 9, 10)
    assert found.seconds == pytest.approx(found.ticks * 0.03, abs=0.004)
    assert found.watts == pytest.approx(300.0, rel=0.02)
    assert found.idle_share == pytest.approx(1 - 0.2 / 0.31)


def test_a_window_below_the_minimum_says_so(clock: ScriptedTime) -> None:
    meter = NvmlCounter(board(tick_s=0.01))
    assert meter.min_window_s == pytest.approx(5.0)
    for seconds, short in ((4.9, True), (5.1, False)):
        window = meter.open()
        clock.sleep(seconds)
        assert measured(window.close()).short is short


def test_fifty_ticks_make_the_window_longer_where_ticks_are_slow(clock: ScriptedTime) -> None:
    meter = NvmlCounter(board(tick_s=0.15))
    assert meter.min_window_s == pytest.approx(7.5, rel=0.01)


def test_power_is_integrated_by_trapezoids() -> None:
    meter = NvmlPower(board(watts=100.0), min_window_s=0.05)
    assert meter.source == "nvml-power-instant"
    window = meter.open()
    time.sleep(0.1)
    found = measured(window.close())
    assert found.joules == pytest.approx(110.0 * found.seconds, rel=1e-6)


def test_rising_power_is_integrated_by_the_mean_of_every_two_samples(
    clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 100 W to 200 W over a second."""
    found, begin_s = board(), clock.perf_counter()
    monkeypatch.setattr(
        found, "instant_power_w", lambda: 100.0 * (1.0 + clock.perf_counter() - begin_s)
    )
    window = NvmlPower(found).open()
    clock.sleep(1.0)
    joules = measured(window.close()).joules
    assert joules == pytest.approx(150.0)
    assert window.curve()[-1][1] == pytest.approx(joules)


def test_two_changes_of_a_counter_are_enough_for_a_window_from_tick_to_tick(
    clock: ScriptedTime,
) -> None:
    window = NvmlCounter(board(watts=300.0, tick_s=0.03), **SHORT).open()
    clock.sleep(0.07)
    found = measured(window.close())
    assert found.ticks == 1
    assert found.aligned
    assert found.watts == pytest.approx(300.0, rel=0.1)


def test_a_window_of_two_sources_is_as_long_as_the_slower_one_needs() -> None:
    quick, slow = (NoMeter("none", min_window_s=least_s) for least_s in (5.0, 8.0))
    assert CrossChecked(quick, slow).min_window_s == 8.0
    assert CrossChecked(slow, quick).min_window_s == 8.0


def test_power_falls_back_to_the_boards_mean_and_says_it_is_a_mean() -> None:
    meter = NvmlPower(board(watts=100.0, without=("nvmlDeviceGetFieldValues",)))
    assert meter.source == "nvml-power-mean"
    assert "one second" in meter.explanation


def test_what_both_sources_say_is_kept(clock: ScriptedTime) -> None:
    meter = best_meter("cuda", board(watts=200.0), min_window_s=0.1)
    assert isinstance(meter, CrossChecked)
    window = meter.open()
    clock.sleep(0.15)
    found = measured(window.close())
    assert found.source == "nvml-counter"
    assert found.cross_source == "nvml-power-instant"
    assert found.watts == pytest.approx(200.0, rel=0.02)
    assert found.cross_watts == pytest.approx(220.0)


def test_a_sparing_window_reads_four_times_a_tick_and_power_every_tenth_of_a_second(
    clock: ScriptedTime,
) -> None:
    nvml, reads = FakeNvml(tick_s=0.1), {"counter": 0, "power": 0}
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    meter = best_meter("cuda", found, min_window_s=0.1)
    tell_j, tell_w = nvml.nvmlDeviceGetTotalEnergyConsumption, nvml.nvmlDeviceGetFieldValues

    def counted(what: str, tell: Any) -> Any:
        def read(*arguments: Any) -> Any:
            reads[what] += 1
            return tell(*arguments)

        return read

    nvml.nvmlDeviceGetTotalEnergyConsumption = counted("counter", tell_j)  # type: ignore[method-assign]
    nvml.nvmlDeviceGetFieldValues = counted("power", tell_w)  # type: ignore[method-assign]
    window = meter.open(sparing=True)
    clock.sleep(0.66)
    outcome = measured(window.close())
    # The first and the last of a window, and those of its seconds.
    assert reads == {"counter": 2 + 26, "power": 2 + 6}
    assert outcome.watts == pytest.approx(200.0, rel=0.06)
    assert outcome.cross_watts == pytest.approx(220.0)


@pytest.mark.parametrize("make", [NvmlCounter, NvmlPower])
def test_a_curve_goes_on_where_it_was_asked_for_before(make: Any) -> None:
    window = make(board(tick_s=0.02)).open()
    first = grown(window, 1)
    second = grown(window, len(first))
    third = grown(window, len(second))
    assert third[: len(second)] == second
    assert second[: len(first)] == first
    assert first[0][1] == 0.0
    joules = [joules for _, joules in third]
    assert joules == sorted(joules)
    window.close()
    window.curve()
    # Asked for again, only the readings that came since are gone through.
    readings: Any = window
    samples = readings._sampler.samples = Counted(readings._sampler.samples)
    assert window.curve()
    assert samples.num_read == 0
    samples.append((samples[-1][0] + 0.01, samples[-1][1] + 1.0))
    samples.num_read = 0
    assert len(window.curve()) > len(third)
    assert 1 <= samples.num_read <= 2


def grown(window: Window, beyond: int) -> list[tuple[float, float]]:
    """The curve once it has more points than so many, however long its thread is kept waiting."""
    end_s = time.monotonic() + 120.0
    while len(curve := list(window.curve())) <= beyond:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return curve


class Counted(list[Any]):
    """A list that counts how often an item is looked up or all are walked through."""

    num_read = 0

    def __getitem__(self, place: Any) -> Any:
        self.num_read += 1
        return super().__getitem__(place)

    def __iter__(self) -> Any:
        self.num_read += len(self)
        return super().__iter__()


def test_without_a_counter_the_power_is_the_meter() -> None:
    meter = best_meter("cuda", board(without=("nvmlDeviceGetTotalEnergyConsumption",)))
    assert meter.source == "nvml-power-instant"


def test_a_board_that_counts_nothing_is_a_meter_that_says_why() -> None:
    silent = board(
        without=(
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetFieldValues",
            "nvmlDeviceGetPowerUsage",
        )
    )
    meter = best_meter("cuda", silent)
    assert isinstance(meter, NoMeter)
    found = meter.open().close()
    assert isinstance(found, Absence)
    assert "nvml-counter" in found.reason
    assert "nvml-power" in found.reason


def test_no_board_is_a_reason_and_not_a_zero() -> None:
    meter = best_meter("cuda", NoBoard("the NVIDIA driver does not answer"))
    assert meter.open().close() == Absence("none", "the NVIDIA driver does not answer")
    assert NoBoard("x").state() == BoardState()


def test_a_board_whose_counter_fails_midway_yields_an_absence() -> None:
    nvml = FakeNvml()
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    meter = NvmlCounter(found, **SHORT)
    window = meter.open()
    nvml.without = ("nvmlDeviceGetTotalEnergyConsumption",)
    time.sleep(0.02)
    outcome = window.close()
    assert isinstance(outcome, Absence)
    assert "stopped answering" in outcome.reason


def test_a_boards_state_is_read_and_nothing_is_set() -> None:
    nvml = FakeNvml()
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    state = found.state()
    assert state.temperature_c == 41
    assert state.sm_clock_mhz == 1980
    assert state.memory_clock_mhz == 2619
    assert state.throttle_reasons == ("software-power-cap", "other-0x400")
    assert state.power_limit_w == 700
    assert nvml.set_calls == []


def test_what_a_board_does_not_tell_is_none() -> None:
    state = board(
        without=(
            "nvmlDeviceGetTemperature",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetMemoryInfo",
        )
    ).state()
    assert state.temperature_c is None
    assert state.throttle_reasons is None
    assert state.memory_total_bytes is None


UNKNOWN: tuple[str, ...] = ("nvmlDeviceGetHandleByUUID",)


def test_a_uuid_that_is_not_found_is_that_of_the_only_board() -> None:
    assert isinstance(open_board("GPU-1", FakeNvml(without=UNKNOWN)), Board)
    assert isinstance(open_board(None, FakeNvml()), Board)
    assert isinstance(open_board("GPU-1", FakeNvml(count=2)), Board)


@pytest.mark.parametrize(
    ("uuid", "said"),
    [("GPU-1", r"finds no board GPU-1 \(Not Supported\)"), (None, "names no UUID")],
)
def test_of_several_boards_none_is_taken_for_another(uuid: str | None, said: str) -> None:
    found = open_board(uuid, FakeNvml(count=2, without=UNKNOWN))
    assert isinstance(found, NoBoard)
    assert re.search(said, found.reason)
    assert found.reason.endswith("which of 2 boards it is cannot be told")
    meter = best_meter("cuda", found)
    assert isinstance(meter, NoMeter)
    assert found.reason in meter.explanation


def test_a_board_in_parts_counts_joules_of_others_and_is_no_meter() -> None:
    found = open_board("GPU-1", FakeNvml(divided=True))
    assert isinstance(found, NoBoard)
    assert "divided (MIG)" in found.reason
    undivided = open_board("GPU-1", FakeNvml(without=("nvmlDeviceGetMigMode",)))
    assert isinstance(undivided, Board)


def powercap(root: Path, energy_uj: int, range_uj: int = 10_000_000) -> Path:
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
    ):
        folder = root / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return root


def test_rapl_counts_packages_and_memory_but_no_part_twice(tmp_path: Path) -> None:
    counter = RaplCounter(powercap(tmp_path, 1_000_000))
    assert counter.num_zones == 2
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3000000")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("9000000")
    assert counter.read_j() == pytest.approx(2.0)


def test_rapl_goes_on_across_a_wrap_around(tmp_path: Path) -> None:
    counter = RaplCounter(powercap(tmp_path, 9_999_999))
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500000")
    assert counter.read_j() == pytest.approx(0.500001)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("700000")
    assert counter.read_j() == pytest.approx(0.700001)


def test_rapl_says_why_it_is_absent(tmp_path: Path) -> None:
    with pytest.raises(MeterUnavailable, match="lists no processor package"):
        Rapl(tmp_path / "nothing")
    meter = best_meter("cpu", NoBoard("no board"), powercap=tmp_path / "nothing")
    assert "lists no processor package" in meter.explanation


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_rapl_that_may_not_be_read_names_the_file(tmp_path: Path) -> None:
    root = powercap(tmp_path, 1)
    (root / "intel-rapl:0" / "energy_uj").chmod(0)
    with pytest.raises(MeterUnavailable, match="energy_uj may not be read"):
        RaplCounter(root)


def test_a_replayed_meter_gives_back_what_was_recorded(tmp_path: Path) -> None:
    recorded: list[Measurement | Absence] = [
        Measurement("rapl", 10.0, 2.0, 5.0, 2.1, 20, True, False),
        Absence("none", "no meter"),
    ]
    file = tmp_path / "windows.jsonl"
    file.write_text("\n".join(map(to_json, recorded)))
    meter = Replayed(file)
    assert [meter.open().close() for _ in recorded] == recorded
    with pytest.raises(InputError, match="fewer measurements"):
        meter.open()


def test_a_file_that_holds_no_measurement_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "windows.jsonl"
    file.write_text('{"joules": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        Replayed(file)
    with pytest.raises(InputError, match="cannot be read"):
        Replayed(tmp_path / "missing.jsonl")


def sample_threads() -> int:
    """Threads that read a meter now."""
    return sum(thread.name == "energy-meter" for thread in threading.enumerate())


def window_of_two(nvml: FakeNvml) -> Window:
    """A window of both of a board's sources that has been open for a while."""
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    window = CrossChecked(NvmlCounter(found, **SHORT), NvmlPower(found)).open()
    time.sleep(0.1)
    return window


@undisturbed
def test_the_curve_of_two_sources_is_that_of_the_one_that_lasts() -> None:
    nvml = FakeNvml()
    window = window_of_two(nvml)
    failed_s = time.perf_counter()
    nvml.without = ("nvmlDeviceGetTotalEnergyConsumption",)
    time.sleep(0.1)
    while_open = list(window.curve())
    outcome = measured(window.close())
    assert outcome.source == "nvml-power-instant"
    assert while_open[0][0] < failed_s < while_open[-1][0]
    assert window.curve()[: len(while_open)] == while_open
    assert window.curve()[-1][1] == pytest.approx(outcome.joules)


@undisturbed
def test_a_curve_is_empty_once_no_source_answers() -> None:
    nvml = FakeNvml()
    window = window_of_two(nvml)
    assert window.curve()
    nvml.without = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues")
    time.sleep(0.1)
    assert window.curve() == []
    assert isinstance(window.close(), Absence)
    assert window.curve() == []


@pytest.mark.parametrize("make", [NvmlCounter, NvmlPower, CrossChecked])
def test_no_thread_reads_on_where_the_work_of_a_window_raises(make: Any) -> None:
    found = board()
    meter = make(NvmlCounter(found), NvmlPower(found)) if make is CrossChecked else make(found)
    before = sample_threads()
    with pytest.raises(KeyboardInterrupt), window_of(meter):
        assert sample_threads() > before
        raise KeyboardInterrupt
    assert sample_threads() == before


def test_no_thread_reads_on_where_the_second_of_two_sources_cannot_be_opened() -> None:
    class Shut(NvmlPower):
        def open(self, sparing: bool = False) -> Window:
            raise KeyboardInterrupt

    before = sample_threads()
    with pytest.raises(KeyboardInterrupt):
        CrossChecked(NvmlCounter(board()), Shut(board())).open()
    assert sample_threads() == before
