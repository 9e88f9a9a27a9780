"""How much slower a machine is around and during a run than while its profile was measured.

Three signs are read, none of which depends on what is served: a known piece of work right before
the run, the same right after it, and how long the serving thread had to wait for a processor that
others held. The first two see clocks and memory shared with others, the last what a short look
between two turns of the scheduler does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from calibration.measuring.pace import Pace
from helios_sim.profile import Profile

_SCHEDULED: Final = Path("/proc/thread-self/schedstat")
_NS: Final = 1e-9
_MOST_WAITED: Final = 0.99
"""Share of its work for which a thread is taken to have waited at most."""


def waited_s() -> float | None:
    """Seconds for which this thread could have run and others did; None where no system tells."""
    try:
        return _NS * int(_SCHEDULED.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None


def slowdown_facts(
    profile: Profile, before: Pace, after: Pace, waited: float | None, worked_s: float
) -> dict[str, Any]:
    """What a run's record says of the machine: paces, seconds waited, and the slowdown.

    The slowdown is the largest of the two paces against the profile's, where it tells its own, and
    of the seconds worked over those that were not waited.
    """
    facts: dict[str, Any] = {"pace_before": asdict(before), "pace_after": asdict(after)}
    signs = []
    measured = measured_pace(profile)
    if measured is not None:
        signs += [before.against(measured), after.against(measured)]
    if waited is not None:
        facts["waited_s"] = waited
        if worked_s > 0.0:
            signs.append(1.0 / (1.0 - min(waited / worked_s, _MOST_WAITED)))
    if signs:
        facts["slowdown"] = max(signs)
    return facts


def measured_pace(profile: Profile) -> Pace | None:
    """The machine's pace while the profile was measured; None where it does not say."""
    found = profile.provenance.environment.get("pace")
    if not isinstance(found, Mapping):
        return None
    parts = [found.get(name) for name in ("core_s", "memory_s")]
    seconds = [float(part) for part in parts if isinstance(part, int | float) and part > 0.0]
    return Pace(*seconds) if len(seconds) == len(parts) else None
