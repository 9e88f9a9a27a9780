"""Which packages the steps need, and how to get those that are missing; imports none of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Final

from helios_sim.errors import install_command

BAD_INPUT: Final = 2
BASE: Final = (
    "typer",
    "rich",
    "numpy",
    "scipy",
    "polars",
    "numba",
    "pydantic",
    "torch",
    "transformers",
    "safetensors",
)
"""Without these no step but `environment` runs."""


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed, by the names they are imported as."""
    return [name for name in packages if find_spec(name) is None]


def how_to_install(absent: list[str]) -> str:
    """A sentence that names them and what brings them."""
    verb, them = ("is", "it") if len(absent) == 1 else ("are", "them")
    return (
        f"{', '.join(absent)} {verb} not installed; {install_command('calibration', 'dev')} "
        f"brings {them}, or pip install --no-index --find-links WHEELS {' '.join(absent)} from "
        "wheels."
    )
