"""Energy meters: what a window yields, from which source, and what absence says."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from calibration.measuring.board import Board, BoardError, BoardState, NoBoard, open_board
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
    for seconds, short in ((4.9, True), (5.0, False), (5.1, False)):
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


def slow(read: Callable[[], float], clock: ScriptedTime, seconds: float) -> Callable[[], float]:
    """A reading that takes so long, and is of its middle."""

    def taken() -> float:
        clock.work(seconds / 2)
        value = read()
        clock.work(seconds / 2)
        return value

    return taken


def stepping(clock: ScriptedTime, gaps_s: Sequence[float]) -> Callable[[], float]:
    """A counter that goes up by a joule after each of some gaps, and then stands."""
    at_s = [clock.perf_counter() + passed_s for passed_s in itertools.accumulate(gaps_s)]
    return lambda: float(sum(moved_s <= clock.perf_counter() for moved_s in at_s))


@pytest.mark.parametrize("moves", [2, 3])
def test_a_counter_that_moves_three_times_in_three_seconds_is_one(
    clock: ScriptedTime, moves: int
) -> None:
    begin_s = clock.perf_counter()
    probe = probe_ticks(stepping(clock, [0.5] * moves))
    assert clock.perf_counter() - begin_s == pytest.approx(3.0, abs=0.01)
    assert (probe is None) is (moves == 2)


def test_the_tick_is_the_median_of_eleven_gaps_and_its_spread_how_far_they_lie_from_it(
    clock: ScriptedTime,
) -> None:
    gaps_s = [0.01, 0.1, 0.1, 0.1, 0.1, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02]
    probe = probe_ticks(stepping(clock, gaps_s))
    assert probe is not None
    assert probe.period_s == pytest.approx(0.02, abs=0.001)
    assert probe.mad_s == pytest.approx(0.0, abs=0.001)
    meter = CounterMeter("some", stepping(clock, gaps_s), "It counts")
    assert meter.tick_s == pytest.approx(0.02, abs=0.001)
    assert re.match(
        r"It counts; the counter ticks every (19|20)\.\d ms \(spread 0\.\d ms\)", meter.explanation
    )


@pytest.mark.parametrize("error", [BoardError("lost"), OSError("lost"), ValueError("lost")])
def test_a_counter_that_cannot_be_read_is_no_meter_and_says_which(error: Exception) -> None:
    def read() -> float:
        raise error

    with pytest.raises(MeterUnavailable, match=r"^some: lost$"):
        CounterMeter("some", read, "It counts")


@pytest.mark.parametrize(
    ("tick_s", "sparing", "interval_s"),
    [
        (0.004, False, 0.001),
        (0.03, False, 0.003),
        (0.2, False, 0.01),
        (0.01, True, 0.01),
        (0.1, True, 0.025),
    ],
)
def test_a_counter_is_read_so_often_in_a_tick_and_no_oftener_than_is_of_use(
    clock: ScriptedTime, tick_s: float, sparing: bool, interval_s: float
) -> None:
    found, times = board(tick_s=tick_s), 0

    def read() -> float:
        nonlocal times
        times += 1
        return found.energy_j()

    meter = CounterMeter("some", read, "It counts", **SHORT)
    times = 0
    window = meter.open(sparing)
    clock.sleep(1.0)
    window.close()
    assert times == pytest.approx(2 + 1.0 / interval_s, rel=0.03)


def test_power_is_read_a_hundred_times_a_second(clock: ScriptedTime) -> None:
    window = NvmlPower(board()).open()
    clock.sleep(1.0)
    found = measured(window.close())
    # The first and the last of a window, and those of its second.
    assert len(window.curve()) == pytest.approx(2 + 100, abs=1)
    assert found.ticks == len(window.curve()) - 1


@pytest.mark.parametrize("make", [NvmlCounter, NvmlPower])
def test_a_reading_is_of_the_middle_of_the_time_it_takes_and_a_window_holds_all_of_them(
    clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    found = board(watts=100.0)
    meter = make(found)
    monkeypatch.setattr(meter, "_read", slow(meter._read, clock, 0.004))
    begin_s = clock.perf_counter()
    window = meter.open()
    clock.sleep(1.0)
    outcome = measured(window.close())
    assert outcome.wall_s == pytest.approx(clock.perf_counter() - begin_s)
    first_s, last_s = (window.curve()[place][0] for place in (0, -1))
    if make is NvmlPower:
        assert first_s == pytest.approx(begin_s + 0.002)
        assert last_s == pytest.approx(clock.perf_counter() - 0.002)
    assert outcome.seconds == pytest.approx(last_s - first_s)


def test_the_curve_of_a_counter_begins_at_its_first_tick_as_the_window_does(
    clock: ScriptedTime,
) -> None:
    window = NvmlCounter(board(watts=300.0, tick_s=0.03), **SHORT).open()
    clock.sleep(0.2)
    first_s = window.curve()[0][0]
    found = measured(window.close())
    curve = window.curve()
    assert len(curve) == found.ticks + 1
    assert curve[0] == (first_s, 0.0)
    assert curve[-1][1] == pytest.approx(found.joules)


def test_one_change_of_a_counter_gives_the_whole_window_and_says_it_is_not_aligned(
    clock: ScriptedTime,
) -> None:
    meter = NvmlCounter(board(watts=300.0, tick_s=0.03), **SHORT)
    window = meter.open()
    clock.sleep(0.04)
    found = measured(window.close())
    assert (found.aligned, found.ticks) == (False, 0)
    assert found.seconds == pytest.approx(0.04)
    assert found.joules == pytest.approx(300.0 * 0.03)


def test_a_counter_that_did_not_move_has_not_counted_and_is_no_zero(clock: ScriptedTime) -> None:
    found = board()
    meter = NvmlCounter(found, **SHORT)
    stood_j = found.energy_j()
    meter._read = lambda: stood_j
    window = meter.open()
    clock.sleep(6.0)
    outcome = window.close()
    assert outcome == Absence("nvml-counter", "the counter did not move while the window was open")


def test_a_counter_that_began_anew_has_not_counted(clock: ScriptedTime) -> None:
    meter = NvmlCounter(board(), **SHORT)
    values = iter([50.0, 60.0, *[2.0] * 1000])
    meter._read = lambda: next(values)
    window = meter.open()
    clock.sleep(0.1)
    outcome = window.close()
    assert isinstance(outcome, Absence)
    assert outcome.source == "nvml-counter"
    assert "fell" in outcome.reason


def test_a_window_that_is_closed_at_once_has_measured_no_power(clock: ScriptedTime) -> None:
    found = NvmlPower(board()).open().close()
    assert isinstance(found, Absence)
    assert found.source == "nvml-power-instant"
    assert "too short for two samples of power" in found.reason


def test_what_a_window_of_power_says_of_itself(clock: ScriptedTime) -> None:
    for seconds, short in ((0.9, True), (1.1, False)):
        window = NvmlPower(board(watts=100.0), min_window_s=1.0).open()
        clock.sleep(seconds)
        found = measured(window.close(busy_s=0.45))
        assert found.short is short
        assert not found.aligned
        assert found.wall_s == pytest.approx(seconds)
        assert found.idle_share == pytest.approx(1.0 - 0.45 / seconds)
        assert found.watts == pytest.approx(110.0)


def test_a_power_sensor_that_stops_answering_is_named(clock: ScriptedTime) -> None:
    nvml = FakeNvml()
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    window = NvmlPower(found).open()
    nvml.without = ("nvmlDeviceGetFieldValues",)
    clock.sleep(0.1)
    outcome = window.close()
    assert isinstance(outcome, Absence)
    assert outcome.source == "nvml-power-instant"
    assert outcome.reason.startswith("the power sensor stopped answering: nvmlDeviceGetFieldValues")


def test_an_nvidia_package_without_instantaneous_power_leaves_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(FakeNvml, "NVML_FI_DEV_POWER_INSTANT")
    assert NvmlPower(board(watts=100.0)).source == "nvml-power-mean"


def test_nobody_reads_on_once_a_reading_has_failed() -> None:
    nvml = FakeNvml()
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    meter, before = NvmlPower(found), sample_threads()
    nvml.without = ("nvmlDeviceGetFieldValues",)
    window = meter.open()
    end_s = time.monotonic() + 120.0
    while sample_threads() > before:
        assert time.monotonic() < end_s
        time.sleep(0.001)
    nvml.without = ()
    assert isinstance(window.close(), Absence)


def test_a_processors_counter_that_is_gone_ends_its_window_in_words(
    clock: ScriptedTime, tmp_path: Path
) -> None:
    root, begin_s = powercap(tmp_path, 0), clock.perf_counter()
    file = root / "intel-rapl:0" / "energy_uj"
    reads = Path.read_text

    def counted(path: Path, *arguments: Any, **named: Any) -> str:
        if path == file and file.exists():
            return str(int(1e6 * 50.0 * (clock.perf_counter() - begin_s)) // 1000 * 1000)
        return reads(path, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", counted)
        window = Rapl(root, min_window_s=0.1, min_ticks=5).open()
        clock.sleep(0.1)
        assert window.curve()
        file.unlink()
        clock.sleep(0.1)
        assert window.curve() == []
        outcome = window.close()
    assert isinstance(outcome, Absence)
    assert outcome.source == "rapl"
    assert outcome.reason.startswith("the counter stopped answering")
    assert str(file) in outcome.reason


def test_rapl_wraps_each_of_its_counters_at_its_own_range(tmp_path: Path) -> None:
    root = powercap(tmp_path, 900_000)
    (root / "intel-rapl:0:1" / "max_energy_range_uj").write_text("1000000")
    counter = RaplCounter(root)
    (root / "intel-rapl:0:1" / "energy_uj").write_text("100000")
    assert counter.read_j() == pytest.approx(0.2)


@pytest.mark.parametrize("broken", ["missing", "empty"])
def test_rapl_whose_counters_make_no_sense_is_absent_in_words(tmp_path: Path, broken: str) -> None:
    root = powercap(tmp_path, 1)
    file = root / "intel-rapl:0" / "max_energy_range_uj"
    file.unlink() if broken == "missing" else file.write_text("")
    with pytest.raises(MeterUnavailable, match=r"the counters under .* cannot be read"):
        RaplCounter(root)


def test_rapl_says_how_many_zones_it_adds_up_and_keeps_to_the_window_asked_for(
    clock: ScriptedTime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_s = clock.perf_counter()
    monkeypatch.setattr(
        RaplCounter, "read_j", lambda _: round(100.0 * (clock.perf_counter() - begin_s))
    )
    meter = best_meter("cpu", NoBoard("none"), powercap=powercap(tmp_path, 1), min_window_s=0.7)
    assert meter.source == "rapl"
    assert "(2 zones, the whole machine)" in meter.explanation
    assert meter.min_window_s == 0.7


@pytest.mark.parametrize(
    "without", ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues"]
)
def test_the_best_meter_keeps_to_the_window_asked_for(clock: ScriptedTime, without: str) -> None:
    silent = ("nvmlDeviceGetPowerUsage", without)
    assert best_meter("cuda", board(without=silent), min_window_s=0.7).min_window_s == 0.7
    assert best_meter("cuda", board(), min_window_s=0.7).min_window_s == 0.7


def test_two_sources_are_told_apart_and_the_first_ones_tick_counts(clock: ScriptedTime) -> None:
    first, second = NvmlCounter(board(tick_s=0.02), **SHORT), NvmlPower(board())
    both = CrossChecked(first, second)
    assert (both.source, both.tick_s) == (first.source, first.tick_s)
    assert both.explanation.startswith(first.explanation)
    assert both.explanation.endswith(
        "Beside it: the board's instantaneous power, sampled and integrated"
    )


@pytest.mark.parametrize(
    "gone", ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues"]
)
def test_where_one_of_two_sources_fails_the_others_word_counts_with_what_was_busy(
    clock: ScriptedTime, gone: str
) -> None:
    nvml = FakeNvml()
    found = open_board(nvml=nvml)
    assert isinstance(found, Board)
    window = CrossChecked(NvmlCounter(found, **SHORT), NvmlPower(found)).open()
    clock.sleep(0.5)
    nvml.without = (gone,)
    clock.sleep(0.5)
    outcome = measured(window.close(busy_s=0.25))
    counter_left = gone == "nvmlDeviceGetFieldValues"
    assert outcome.source == ("nvml-counter" if counter_left else "nvml-power-instant")
    assert outcome.cross_source is outcome.cross_watts is None
    assert outcome.idle_share == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("busy_s", "wall_s", "share"),
    [(1.0, 4.0, 0.75), (5.0, 4.0, 0.0), (-1.0, 4.0, 1.0), (1.0, 0.0, None), (None, 4.0, 0.125)],
)
def test_a_replayed_window_is_as_idle_as_who_closes_it_says(
    tmp_path: Path, busy_s: float | None, wall_s: float, share: float | None
) -> None:
    recorded = Measurement("rapl", 10.0, 2.0, 5.0, wall_s, 20, True, False, idle_share=0.125)
    file = tmp_path / "windows.jsonl"
    file.write_text(to_json(recorded))
    assert measured(Replayed(file).open().close(busy_s)).idle_share == share


@pytest.mark.parametrize("line", ["{", "5", "[]", '{"reason": "none"}'])
def test_a_line_that_is_no_measurement_is_refused_in_a_sentence(tmp_path: Path, line: str) -> None:
    file = tmp_path / "windows.jsonl"
    file.write_text(line)
    with pytest.raises(InputError, match="This is no measurement"):
        Replayed(file)


def test_a_file_of_bytes_that_are_no_text_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "windows.jsonl"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        Replayed(file)
