"""Real runs beside the simulated one: how far apart they are, and what that comes from."""

from __future__ import annotations

from helios_sim.fidelity.assessment import Fidelity, assess
from helios_sim.fidelity.sides import Sides, read_sides, run_folders

__all__ = ["Fidelity", "Sides", "assess", "read_sides", "run_folders"]
