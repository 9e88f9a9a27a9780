"""How much slower a machine is around and during a run than while its profile was measured.

None of the signs depends on what is served. Around a run a known piece of work is timed right
before and right after it, and the serving thread counts how long it had to wait for a processor
that others held. During it, on a processor, a short piece of arithmetic is timed between
iterations: that tells the pace at which the run was served, not just the worst moment seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from calibration.measuring.pace import Pace, Reference, reference
from helios_sim.profile import Profile

_SCHEDULED: Final = Path("/proc/thread-self/schedstat")
_NS: Final = 1e-9
_MOST_WAITED: Final = 0.99
"""Share of its work for which a thread is taken to have waited at most."""

_EVERY_S: Final = 0.1
"""Between two looks: one takes about a four-hundredth of that."""


class Companion:
    """Looks at a processor's known arithmetic between iterations."""

    def __init__(self, known: Reference | None = None) -> None:
        self._reference = known or reference()
        self._due_s = 0.0
        self.looks_s: list[float] = []

    def between_iterations(self) -> None:
        """Take a look where the last one is long enough ago."""
        now_s = time.perf_counter()
        if now_s >= self._due_s:
            self.looks_s.append(self._reference.core_look_s())
            self._due_s = now_s + _EVERY_S

    def facts(self, profile: Profile) -> dict[str, Any]:
        """What a run's record says of the looks; nothing without any.

        `pace_factor` is their mean over what the same arithmetic took around the profile's
        readings, where it tells. The mean, since time spent at each pace adds up.
        """
        if not self.looks_s:
            return {}
        mean_s = statistics.fmean(self.looks_s)
        facts: dict[str, Any] = {"pace_during": {"core_s": mean_s, "looks": len(self.looks_s)}}
        factor = profile.pace_factor(mean_s)
        return facts if factor is None else facts | {"pace_factor": factor}


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
