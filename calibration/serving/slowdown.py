"""How much slower a machine is around a run than it was while its profile was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from calibration.measuring.timing import Pace
from helios_sim.profile import Profile


def pace_facts(profile: Profile, before: Pace, after: Pace) -> dict[str, Any]:
    """The paces right before and after a run, and the slowdown where the profile tells its own.

    The slowdown is the larger of the two against the profile's: it is known without looking at
    what was served, so that a run may be discarded for it.
    """
    facts: dict[str, Any] = {"pace_before": asdict(before), "pace_after": asdict(after)}
    measured = measured_pace(profile)
    if measured is not None:
        facts["slowdown"] = max(before.against(measured), after.against(measured))
    return facts


def measured_pace(profile: Profile) -> Pace | None:
    """The machine's pace while the profile was measured; None where it does not say."""
    found = profile.provenance.environment.get("pace")
    if not isinstance(found, Mapping):
        return None
    parts = [found.get(name) for name in ("core_s", "memory_s")]
    seconds = [float(part) for part in parts if isinstance(part, int | float) and part > 0.0]
    return Pace(*seconds) if len(seconds) == len(parts) else None
