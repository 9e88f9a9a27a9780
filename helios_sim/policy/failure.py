"""A mistake in a user's own policy, as one sentence that names its line."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from helios_sim.errors import TRACEBACK, InputError, did_you_mean


def failure_of(own: Any, name: str, where: str, error: Exception) -> InputError:
    """The error of a policy that raised one in `where`; raise it from the one it raised.

    `own` is its class or its function: what was written in the same file is named by its line.
    """
    said = f"{type(error).__name__}: {error}".rstrip(".")
    hint = ""
    if isinstance(error, AttributeError) and error.obj is not None:
        hint = did_you_mean(str(error.name), dir(error.obj))
    return InputError(
        f"Policy {name!r} failed in {where}: {said}{_line_of(own, error)}.{hint} "
        f"{TRACEBACK}=1 shows the way there.",
        f"policy {name}",
    )


def asked_rules(
    policy: object, replaced: Mapping[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """A policy's own hot rules as a host asks them in Python: they answer as ours, or in words."""
    return {name: _asked(policy, name, rule) for name, rule in replaced.items()}


def _asked(policy: object, name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """A hot rule whose answer is of the kind that the compiled loop takes it for."""

    def ask(*arguments: Any) -> Any:
        answer = rule(*arguments)
        if name in ("watch_tumbling", "watch_sliding"):
            seen, breaches, tripped = answer
            return int(seen), int(breaches), bool(tripped)
        return bool(answer)

    return failures_in_words(policy, {name: rule}, ask)


def failures_in_words(
    policy: object, replaced: Mapping[str, Callable[..., Any]], asks: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that asks a policy's own hot rules; what they raise becomes a sentence."""

    @wraps(asks)
    def asked(*arguments: Any) -> Any:
        try:
            return asks(*arguments)
        except InputError:
            raise
        except Exception as error:
            names = ", ".join(map(repr, replaced))
            where = f"its hot rule {names}" if len(replaced) == 1 else f"a hot rule ({names})"
            own = next((rule for rule in replaced.values() if _line_of(rule, error)), type(policy))
            raise failure_of(own, str(getattr(policy, "name", "")), where, error) from error

    return asked


def _line_of(own: Any, error: Exception) -> str:
    """The last line of the policy's own file that the error came through; empty if none did."""
    try:
        file = inspect.getsourcefile(own)
    except TypeError:
        return ""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    return f", {Path(file).name} line {lines[-1]}" if file and lines else ""
