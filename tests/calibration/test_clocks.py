"""Clocks that a board holds back are waited for, but not for long, and are told of readings."""

from __future__ import annotations

import pytest

from calibration.measuring import clocks
from calibration.measuring.board import BoardState, NoBoard
from calibration.measuring.clocks import Clocks, is_held_back


class Board:
    """Says one state after the other, each for a look, and the last one for good."""

    def __init__(self, *states: BoardState) -> None:
        self._states = list(states)

    def state(self) -> BoardState:
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]


class Clock:
    """Stands for the module `time`: only sleeping takes any."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


FULL = BoardState(sm_clock_mhz=2000.0, throttle_reasons=())
SLOW = BoardState(sm_clock_mhz=1700.0, throttle_reasons=("software-power-cap",))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clocks, "time", made)
    return made


def test_a_trial_waits_for_full_clocks_and_no_longer(clock: Clock) -> None:
    """Full as it begins, slow at the first three looks: three looks of 20 ms until it is full."""
    waits = Clocks(Board(FULL, SLOW, SLOW, SLOW, FULL), allowed_s=10.0)  # type: ignore[arg-type]
    waits.settle()
    assert clock.now_s == pytest.approx(0.06)
    waits.settle()
    assert clock.now_s == pytest.approx(0.06)
    assert waits.said() == "1 trial waited for the board's clocks, 0.1 s in all"


def test_a_board_that_stays_slow_is_waited_for_half_a_second_a_trial_and_within_the_budget(
    clock: Clock,
) -> None:
    waits = Clocks(Board(FULL, SLOW), allowed_s=0.8)  # type: ignore[arg-type]
    waits.settle()
    assert clock.now_s == pytest.approx(0.5)
    for _ in range(3):
        waits.settle()
    assert clock.now_s == pytest.approx(0.8)
    assert str(waits.said()) == (
        "2 trials waited for the board's clocks, 0.8 s in all; before 2 of them they were still "
        "held back"
    )


def test_full_clocks_and_no_board_at_all_wait_for_nothing(clock: Clock) -> None:
    for board in (Board(FULL), NoBoard("none here")):
        waits = Clocks(board, allowed_s=10.0)  # type: ignore[arg-type]
        waits.settle()
        assert (clock.now_s, waits.said()) == (0.0, None)


@pytest.mark.parametrize(
    ("clock_mhz", "reasons", "held_back"),
    [
        (2000.0, (), False),
        (1950.0, (), False),
        (1930.0, (), True),
        (1930.0, None, True),
        (1990.0, ("software-power-cap",), True),
        (None, ("hardware-thermal",), True),
        (None, None, False),
        (2000.0, ("application-clocks",), False),
        (300.0, ("idle",), False),
    ],
)
def test_a_board_is_held_back_by_its_word_or_3_percent_below_its_highest_clock(
    clock_mhz: float | None, reasons: tuple[str, ...] | None, held_back: bool
) -> None:
    state = BoardState(sm_clock_mhz=clock_mhz, throttle_reasons=reasons)
    assert is_held_back(state, 2000.0) == held_back
