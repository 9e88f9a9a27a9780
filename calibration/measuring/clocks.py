"""Waiting, before a trial, for clocks that a board holds back."""

from __future__ import annotations

import time
from typing import Final

from calibration.measuring.board import Board, BoardState, NoBoard
from calibration.measuring.readings import SLOWING
from helios_sim.wording import counted

FULL_SHARE: Final = 0.97
"""Of the highest clock seen, from which on a clock is not held back: boosts differ by a step."""

LONGEST_WAIT_S: Final = 0.5
"""Before one trial. A board that stays slow for longer is hot, or slow for good."""

WAITING_SHARE: Final = 0.02
"""Of the budget that all waits together may take."""

_LOOK_EVERY_S: Final = 0.02


class Clocks:
    """Waits until a board no longer holds its clocks back for the work before.

    A large prefill can meet the board's limit of power, and what is timed right after it would be
    timed at its clock. `allowed_s` bounds all waits together.
    """

    def __init__(self, board: Board | NoBoard, allowed_s: float) -> None:
        self._board = board
        self._left_s = allowed_s
        self._highest_mhz = 0.0
        self._num_waits = 0
        self._waited_s = 0.0
        self._num_in_vain = 0
        self._is_held_back()

    def settle(self) -> None:
        """Wait for full clocks, for a while; without a board, or at full clocks, not at all."""
        if not self._is_held_back() or self._left_s <= 0.0:
            return
        begin_s = time.monotonic()
        until_s = begin_s + min(LONGEST_WAIT_S, self._left_s)
        held_back = True
        while held_back and time.monotonic() < until_s:
            time.sleep(_LOOK_EVERY_S)
            held_back = self._is_held_back()
        waited_s = time.monotonic() - begin_s
        self._left_s -= waited_s
        self._waited_s += waited_s
        self._num_waits += 1
        self._num_in_vain += held_back

    def said(self) -> str | None:
        """How often trials were waited with, as a sentence without its full stop; None if never."""
        if not self._num_waits:
            return None
        sentence = (
            f"{counted(self._num_waits, 'trial')} waited for the board's clocks, "
            f"{self._waited_s:.1f} s in all"
        )
        if self._num_in_vain:
            sentence += f"; before {self._num_in_vain} of them they were still held back"
        return sentence

    def _is_held_back(self) -> bool:
        state = self._board.state()
        self._highest_mhz = max(self._highest_mhz, state.sm_clock_mhz or 0.0)
        return is_held_back(state, self._highest_mhz)


def is_held_back(state: BoardState, highest_mhz: float) -> bool:
    """Whether a board says that it slows down, or is well below the highest clock seen of it.

    A board without work lowers its clock, and waiting would only let it sleep.
    """
    reasons = state.throttle_reasons or ()
    if "idle" in reasons:
        return False
    if any(reason in SLOWING for reason in reasons):
        return True
    return state.sm_clock_mhz is not None and state.sm_clock_mhz < FULL_SHARE * highest_mhz
