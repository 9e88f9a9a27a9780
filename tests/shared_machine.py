"""Tests of real time, on machines that others use too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

TRIES = 4


def undisturbed(test: Callable[P, None]) -> Callable[P, None]:
    """Let a test fail only if it fails every time: what others do meanwhile is no fault of it.

    The test is to begin anew each time, whatever the last one left.
    """

    @functools.wraps(test)
    def tried(*arguments: P.args, **named: P.kwargs) -> None:
        for _ in range(TRIES - 1):
            try:
                return test(*arguments, **named)
            except AssertionError:
                continue
        return test(*arguments, **named)

    return tried
