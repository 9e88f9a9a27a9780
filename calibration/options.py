"""Options that several commands take, read from what was typed."""

from __future__ import annotations

import re
from typing import Final

from helios_sim.errors import InputError

_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_budget(text: str) -> float:
    """Seconds of a duration such as 90s, 10m, 1h30m or 45; raises `InputError` otherwise."""
    found = _DURATION.fullmatch(text.strip())
    parts = found.groups() if found else ()
    if not any(parts):
        raise InputError(
            f"The budget {text!r} is no duration; write it like 90s, 10m or 1h30m.", "--budget"
        )
    hours, minutes, seconds = (float(part or 0) for part in parts)
    return 3600 * hours + 60 * minutes + seconds


def parse_exits(text: str) -> tuple[int, ...]:
    """Exit layers of a text such as 8,16,32; raises `InputError` otherwise."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"The exits {text!r} are not layer numbers; write them like 8,16,32.", "--exits"
        ) from None
