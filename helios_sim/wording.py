"""Numbers, lists and limits as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from helios_sim.settings.slo import parse_slo


def number(value: float | str | None, digits: int = 3) -> str:
    """A figure with about so many significant digits; a dash where it is undefined."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, str):
        return value
    if value == int(value):
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 1:
        whole_digits = len(str(int(size)))
        return f"{value:,.{max(0, digits - whole_digits)}f}"
    return f"{value:.{digits}g}" if size >= 1e-3 else f"{value:.1e}"


def times(ratio: float | None) -> str:
    """A ratio in five places, such as 1.32x or <.01x; empty where it is undefined."""
    if ratio is None:
        return ""
    if 0 < ratio < 0.00995:
        return "<.01\N{MULTIPLICATION SIGN}"
    digits = 0 if ratio >= 99.95 else 1 if ratio >= 9.995 else 2
    return f"{ratio:.{digits}f}\N{MULTIPLICATION SIGN}"


def between(least: float, most: float, digits: int = 3) -> str:
    """The ends of a range, such as 1.43 to 1.48; one number where they look alike."""
    return " to ".join(dict.fromkeys(number(end, digits) for end in (least, most)))


def span(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if 0.0 < seconds < 1.0:
        return f"{number(1e3 * seconds)} ms"
    if seconds < 120.0:
        return f"{number(seconds)} s"
    if seconds < 7200.0:
        return f"{number(seconds / 60.0)} min"
    return f"{number(seconds / 3600.0)} h"


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024.0:
            return f"{number(num_bytes)} {unit}"
        num_bytes /= 1024.0
    return f"{number(num_bytes)} GiB"


def counted(num: int | float, noun: str) -> str:
    """A number of things: '1 GPU', '3 processors'."""
    return f"{number(num)} {noun}{'' if num == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Names as 'a, b and c'."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def limits(text: str) -> str:
    """An SLO's text as people read it: 'TTFT p95 at most 500 ms, ...', with the sign for it.

    Limits have all their digits: a rounded one is another.
    """
    said = []
    for limit in parse_slo(text).limits:
        at = "" if limit.percentile is None else f" p{limit.percentile:g}"
        short = limit.limit_s < 1.0
        value = f"{1e3 * limit.limit_s:.12g} ms" if short else f"{limit.limit_s:.12g} s"
        said.append(f"{limit.metric.upper()}{at} \N{LESS-THAN OR EQUAL TO} {value}")
    return ", ".join(said)
