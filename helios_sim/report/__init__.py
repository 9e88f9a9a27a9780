"""A run, or several compared, becomes one self-contained page a person can look at."""

from __future__ import annotations

from helios_sim.report.page import render

__all__ = ["render"]
