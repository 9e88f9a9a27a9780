"""Timers: medians with their spread, long enough samples, work compared in turns."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from calibration.measuring import timing
from calibration.measuring.capture import Captured, NotCaptured, capture
from calibration.measuring.pace import Pace, Reference
from calibration.measuring.timing import (
    MAX_TRIES,
    CudaTimer,
    Sample,
    WallTimer,
    Work,
    measure_pace,
    median_and_mad,
    quiet_share,
    timed,
    timer_for,
)
from tests.calibration import scripted_time
from tests.calibration.scripted_time import QuietReference, ScriptedTime
from tests.shared_machine import undisturbed

CPU = torch.device("cpu")


class CountingTimer:
    """A timer of made-up work: piece n takes n milliseconds a repetition."""

    min_sample_s = 0.02

    def __init__(self, seconds: dict[Work, float]) -> None:
        self.seconds = seconds
        self.calls: list[tuple[Work, int]] = []

    def sample(self, work: Work, repetitions: int) -> Sample:
        self.calls.append((work, repetitions))
        return Sample(self.seconds[work] * repetitions)


class BusyTimer:
    """A timer on a machine that is never quiet."""

    min_sample_s = 0.5

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, work: Work, repetitions: int) -> Sample:
        self.calls += 1
        return Sample(2.0, 0.5)


def works(count: int) -> list[Work]:
    return [lambda index=index: index for index in range(count)]  # type: ignore[misc]


def test_a_sample_holds_at_least_the_seconds_asked_for() -> None:
    short, long = works(2)
    timer = CountingTimer({short: 0.0001, long: 0.5})
    first, second = timed([short, long], timer, samples=3)
    assert first.repetitions * 0.0001 >= 0.02
    assert second.repetitions == 1
    assert first.seconds == pytest.approx(0.0001)
    assert second.seconds == pytest.approx(0.5)


def test_work_is_sampled_in_turns() -> None:
    pieces = works(3)
    timer = CountingTimer({piece: 1.0 for piece in pieces})
    timed(pieces, timer, samples=4)
    rounds = [work for work, _ in timer.calls[-12:]]
    for start in range(0, 12, 3):
        assert set(rounds[start : start + 3]) == set(pieces)


def test_an_outlier_moves_neither_median_nor_spread() -> None:
    assert median_and_mad([1.0, 1.1, 0.9, 1.0, 50.0]) == pytest.approx((1.0, 0.1))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ScriptedTime:
    return scripted_time.of_timers(monkeypatch)


def test_the_clock_finds_the_time_of_known_work(clock: ScriptedTime) -> None:
    (found,) = timed([lambda: clock.work(0.01)], WallTimer(CPU), samples=3)
    assert found.seconds == pytest.approx(0.01)
    assert found.lost_share == pytest.approx(0.0)


@undisturbed
def test_work_on_this_machine_takes_no_less_than_it_runs() -> None:
    def work() -> None:
        end_s = time.process_time() + 0.005
        while time.process_time() < end_s:
            pass

    assert WallTimer(CPU).sample(work, 2).seconds >= 2 * 0.005


def test_time_in_which_others_ran_is_no_time_of_the_work(clock: ScriptedTime) -> None:
    def work() -> None:
        clock.work(0.005)
        clock.sleep(0.01)

    found = WallTimer(CPU).sample(work, 1)
    assert found.seconds == pytest.approx(0.005)
    assert found.lost_share == pytest.approx(2 / 3)


def test_samples_in_which_others_ran_are_taken_again() -> None:
    class SharedTimer:
        min_sample_s = 0.5
        calls = 0

        def sample(self, work: Work, repetitions: int) -> Sample:
            self.calls += 1
            return Sample(5.0, 0.8) if self.calls % 2 else Sample(1.0, 0.0)

    timer = SharedTimer()
    (found,) = timed(works(1), timer, samples=3)
    assert found.seconds == 1.0
    assert found.lost_share == 0.0


def test_a_machine_that_is_never_quiet_ends_the_wait_and_says_so() -> None:
    timer = BusyTimer()
    (found,) = timed(works(1), timer, samples=3)
    assert found.lost_share == 0.5
    assert found.samples == 3
    assert timer.calls == 2 + 3 * MAX_TRIES
    hurried = BusyTimer()
    (found,) = timed(works(1), hurried, samples=3, patience_s=0.0)
    assert found.samples == 3
    assert hurried.calls == 2 + 3


def test_where_no_look_is_quiet_the_share_is_that_of_one_look() -> None:
    assert quiet_share(BusyTimer(), works(1)[0], looks=10) == 0.1


@pytest.mark.parametrize("shares", [(0.3, 0.0), (0.0, 0.3)])
def test_others_before_a_sample_disturb_it_as_those_after_it_do(
    clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, float]
) -> None:
    looks = iter(shares)

    class Visited(QuietReference):
        def lost_share(self) -> float:
            return next(looks)

    monkeypatch.setattr(timing, "reference", Visited)
    assert WallTimer(CPU).sample(lambda: clock.work(0.06), 1).lost_share == 0.3


def test_a_pace_is_held_against_another_by_its_slower_part() -> None:
    quiet = Pace(1.0, 2.0)
    assert quiet.against(quiet) == 1.0
    assert Pace(1.5, 2.0).against(quiet) == 1.5
    assert Pace(1.0, 5.0).against(quiet) == 2.5
    assert Pace(2.0, 1.0).quickest(quiet) == Pace(1.0, 1.0)


@undisturbed
def test_a_machines_pace_is_that_of_a_moment_before() -> None:
    first, second = measure_pace(CPU), measure_pace(CPU)
    assert first.core_s > 0.0
    assert first.memory_s > 0.0
    assert 0.2 < second.against(first) < 5.0


def test_a_slower_core_and_slower_memory_both_show(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Reference()
    monkeypatch.setattr(known, "look", lambda: known.quiet)
    assert known.lost_share() == 0.0
    for slower in (
        Pace(2 * known.quiet.core_s, known.quiet.memory_s),
        Pace(known.quiet.core_s, 2 * known.quiet.memory_s),
    ):
        monkeypatch.setattr(known, "look", lambda slower=slower: slower)
        assert known.lost_share() > 0.3


def test_who_is_kept_waiting_once_sees_no_slow_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle of three parts counts thrice; a core that is slow throughout shows."""
    known = Reference()
    parts = iter([9.0, 1.0, 50.0, 1.0, 9.0, 2.0, 2.5, 2.0])
    monkeypatch.setattr(known, "_compute_s", lambda times: next(parts))
    assert known.core_look_s() == 3.0
    assert known.core_look_s() == 6.0


def test_several_threads_tell_no_pace(clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WallTimer(CPU).sample(lambda: clock.work(0.06), 1).reference_s is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert WallTimer(CPU).sample(lambda: clock.work(0.06), 1).reference_s is None


def test_a_single_lucky_look_does_not_make_all_others_disturbed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of looks that take 1 s, one takes half; what counts is the quickest tenth."""
    looks = [0.5, 1.0]
    monkeypatch.setattr(Reference, "_compute_s", lambda self, times: looks[0] / 3)
    monkeypatch.setattr(Reference, "_read_s", lambda self, matrices: looks[0])
    known = Reference()
    assert known.quiet == Pace(0.5, 1.0)
    del looks[0]
    for _ in range(181):
        known.look()
    assert known.quiet == Pace(1.0, 2.0)
    assert known.lost_share() == 0.0
    looks[0] = 2.0
    assert known.lost_share() == pytest.approx(1.0 - 1.08 / 2.0)


def test_repetitions_in_which_caches_fill_are_not_timed(clock: ScriptedTime) -> None:
    calls: list[float] = []

    def work() -> None:
        calls.append(0.016 / 2 ** len(calls) if len(calls) < 3 else 0.002)
        clock.work(calls[-1])

    assert WallTimer(CPU).sample(work, 3).seconds == pytest.approx(0.006)
    assert len(calls) == 3 + 2 + 3


def test_a_repetition_that_is_long_anyway_needs_none_before_it(clock: ScriptedTime) -> None:
    calls: list[float] = []

    def work() -> None:
        clock.work(0.06)
        calls.append(0.0)

    timer = WallTimer(CPU)
    assert timer.sample(work, 1).seconds == pytest.approx(0.06)
    assert len(calls) == 1
    looks_s = QuietReference.quiet.core_s + 3 * QuietReference.quiet.memory_s
    assert timer.sample_s(0.06) == pytest.approx(0.06 + looks_s)
    assert timer.sample_s(0.01) > 0.02
    assert timer.sample_s(0.001) > 0.009


def test_twice_the_work_takes_twice_the_time(clock: ScriptedTime) -> None:
    def pieces(count: int) -> Work:
        def work() -> None:
            for _ in range(count):
                clock.work(0.001)

        return work

    one, two = timed([pieces(4), pieces(8)], timer_for(CPU), samples=7)
    assert two.seconds / one.seconds == pytest.approx(2.0)
    assert one.repetitions > two.repetitions


def test_no_sample_is_no_timing() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        timed(works(1), WallTimer(CPU), samples=0)


def test_without_cuda_nothing_is_captured_and_the_reason_is_told() -> None:
    found = capture(lambda: None, CPU)
    assert isinstance(found, NotCaptured)
    assert "CUDA device" in found.reason


def test_events_tell_milliseconds_and_a_sample_is_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return 20.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert CudaTimer().sample(lambda: None, 1).seconds == pytest.approx(0.02)


@pytest.mark.cuda
def test_a_captured_graph_repeats_the_work() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    total = torch.zeros(1, device=device)
    found = capture(lambda: total.add_(1.0), device)
    assert isinstance(found, Captured)
    before = float(total)
    found.replay()
    assert float(total) == before + 1.0


def test_where_several_threads_run_a_sample_is_by_the_clock_and_what_waited_is_not_seen(
    clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        clock.work(0.06)
        clock.sleep(0.02)

    assert WallTimer(CPU).sample(work, 1).seconds == pytest.approx(0.06)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert WallTimer(CPU).sample(work, 1).seconds == pytest.approx(0.08)


def test_what_other_threads_of_the_process_ran_is_no_time_of_the_work(clock: ScriptedTime) -> None:
    def work() -> None:
        clock.work(0.06)
        clock._running_s += 0.03

    found = WallTimer(CPU).sample(work, 1)
    assert found.seconds == pytest.approx(0.06)
    assert found.lost_share == 0.0


def test_work_that_takes_no_time_lost_none(clock: ScriptedTime) -> None:
    found = WallTimer(CPU).sample(lambda: None, 1)
    assert (found.seconds, found.lost_share) == (0.0, 0.0)


def test_a_trial_tells_what_known_arithmetic_took_around_it(
    clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks of 2, 4, 6, 8, ... around work that nobody disturbs: 3, 5 and 7 on average."""
    seconds = iter(range(2, 100, 2))

    class Slower(QuietReference):
        def lost_share(self) -> float:
            self.latest = Pace(float(next(seconds)), 1.0)
            return 0.0

    monkeypatch.setattr(timing, "reference", Slower)
    timer = WallTimer(CPU)
    found = [timer.sample(lambda: clock.work(0.06), 1).reference_s for _ in range(3)]
    assert found == [3.0, 5.0, 7.0]
    (whole,) = timed([lambda: clock.work(0.06)], timer, samples=3)
    assert whole.reference_s is not None
    assert whole.reference_s > 7.0
    (unknown,) = timed([lambda: None], BusyTimer(), samples=3)
    assert unknown.reference_s is None


def test_work_settles_by_the_time_it_runs_however_long_it_is_kept_waiting(
    clock: ScriptedTime,
) -> None:
    calls: list[float] = []

    def work() -> None:
        calls.append(0.001)
        clock.work(0.001)
        clock.sleep(0.2)

    WallTimer(CPU).sample(work, 1)
    assert len(calls) == 2


def test_a_look_after_a_sample_is_that_before_the_next_one(
    clock: ScriptedTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    class Seen(QuietReference):
        def lost_share(self) -> float:
            looks.append(0.0)
            return 0.0

    monkeypatch.setattr(timing, "reference", Seen)
    timer = WallTimer(CPU)
    timer.sample(lambda: clock.work(0.06), 1)
    timer.sample(lambda: clock.work(0.06), 1)
    assert len(looks) == 3
    clock.sleep(0.001)
    timer.sample(lambda: clock.work(0.06), 1)
    assert len(looks) == 5


def test_a_sample_on_a_processor_is_planned_with_headroom_settling_and_looks(
    clock: ScriptedTime,
) -> None:
    timer = WallTimer(CPU)
    looks_s = QuietReference.quiet.core_s + 3 * QuietReference.quiet.memory_s
    assert timer.sample_s(0.001) == pytest.approx(1.1 * 0.03 + 4 * 0.001 + looks_s)
    assert timer.sample_s(0.04) == pytest.approx(0.04 + 0.04 + looks_s)


def test_no_warm_up_is_no_timing() -> None:
    with pytest.raises(ValueError, match="0 warm-ups"):
        timed(works(1), WallTimer(CPU), warmups=0)


def test_nothing_is_collected_while_work_is_timed() -> None:
    seen: list[bool] = []

    class Watched(CountingTimer):
        def sample(self, work: Work, repetitions: int) -> Sample:
            seen.append(gc.isenabled())
            return super().sample(work, repetitions)

    (piece,) = works(1)
    timed([piece], Watched({piece: 1.0}))
    assert not any(seen)
    assert gc.isenabled()


def test_turns_are_shuffled_and_by_the_seed() -> None:
    pieces = works(4)

    def order(seed: int) -> list[Work]:
        timer = CountingTimer({piece: 1.0 for piece in pieces})
        timed(pieces, timer, samples=5, seed=seed)
        return [work for work, _ in timer.calls[-20:]]

    assert order(1) == order(1) != order(2)
    assert len({tuple(order(1)[start : start + 4]) for start in range(0, 20, 4)}) > 1


def test_a_sample_that_lost_a_twentieth_still_counts_as_quiet() -> None:
    class Edge(BusyTimer):
        def sample(self, work: Work, repetitions: int) -> Sample:
            self.calls += 1
            return Sample(2.0, 0.05)

    timer = Edge()
    timed(works(1), timer, samples=3)
    assert timer.calls == 2 + 3


def test_repetitions_grow_until_a_sample_is_just_long_enough_and_at_most_a_hundredfold() -> None:
    exact, none = works(2)
    timer = CountingTimer({exact: 0.02, none: 0.0})
    timed([exact], timer, samples=1, warmups=3)
    assert timer.calls == [(exact, 3), (exact, 1), (exact, 1)]
    tried: list[int] = []

    class Growing(CountingTimer):
        def sample(self, work: Work, repetitions: int) -> Sample:
            tried.append(repetitions)
            return Sample(0.02 if repetitions >= 10_000 else 0.0)

    timed([none], Growing({}), samples=1, warmups=1)
    assert tried == [1, 1, 100, 10_000, 10_000]


def test_a_processors_pace_is_the_best_of_looks_over_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Paced(QuietReference):
        def pace(self) -> Pace:
            return Pace(1.0, 2.0)

    monkeypatch.setattr(timing, "reference", Paced)
    assert measure_pace(CPU) == Pace(1.0, 2.0)
