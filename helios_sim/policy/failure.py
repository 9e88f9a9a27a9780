"""A mistake in a user's own policy, as one sentence that names its line."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path

from helios_sim.errors import TRACEBACK, InputError
from helios_sim.policy.options import nearest


def failure_of(policy_class: type, name: str, where: str, error: Exception) -> InputError:
    """The error of a policy that raised one in `where`; raise it from the one it raised."""
    said = f"{type(error).__name__}: {error}".rstrip(".")
    hint = ""
    if isinstance(error, AttributeError) and error.obj is not None:
        hint = nearest(str(error.name), dir(error.obj))
    return InputError(
        f"Policy {name!r} failed in {where}: {said}{_line_of(policy_class, error)}.{hint} "
        f"{TRACEBACK}=1 shows the way there.",
        f"policy {name}",
    )


def _line_of(policy_class: type, error: Exception) -> str:
    """The last line of the policy's own file that the error came through; empty if none did."""
    try:
        own = inspect.getsourcefile(policy_class)
    except TypeError:
        return ""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own
    ]
    return f", {Path(own).name} line {lines[-1]}" if own and lines else ""
