"""A batch loop with a policy's own hot rules: compiled where they allow it, interpreted elsewhere.

numba binds a rule when the loop is compiled, so a loop with other rules is the same source executed
once more with those rules in place of ours.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numba

from helios_sim import batch
from helios_sim.compiled import compiling
from helios_sim.errors import InputError
from helios_sim.policy import rules

SIGNATURES: Final = {
    "may_join": "boolean(int64, int64, int64, int64, int64)",
    "leaves_here": "boolean(float64, float64)",
    "is_breach": "boolean(float64, float64, boolean)",
    "rebatch_pays": "boolean(int64, int64, float64, float64, float64)",
    "watch_tumbling": "Tuple((int64, int64, boolean))(int64, int64, boolean, int64, int64)",
    "watch_sliding": "Tuple((int64, int64, boolean))(uint8[:], int64, int64, boolean, int64)",
}
"""How the loop calls each rule."""


class InterpretedRuleWarning(UserWarning):
    """A policy's rule cannot be compiled, so its whole loop runs interpreted."""


def loop_with(replaced: Mapping[str, Callable[..., Any]]) -> Any:
    """The module `batch`, or one like it that follows the replaced rules."""
    if not replaced:
        return batch
    uncompilable = [name for name, rule in replaced.items() if not _compiles(name, rule)]
    if uncompilable:
        warnings.warn(
            f"The hot rule {uncompilable[0]!r} cannot be compiled by numba; the simulation runs "
            "interpreted, some hundred times slower, with the same results.",
            InterpretedRuleWarning,
            stacklevel=2,
        )
    spec = importlib.util.spec_from_file_location("helios_sim.batch_with_own_rules", batch.__file__)
    assert spec is not None and spec.loader is not None
    variant = importlib.util.module_from_spec(spec)
    with _in_place(replaced), compiling("interpreted" if uncompilable else "uncached"):
        spec.loader.exec_module(variant)
    return variant


def _compiles(name: str, rule: Callable[..., Any]) -> bool:
    """Whether numba can compile a rule as the loop calls it."""
    if name not in SIGNATURES:
        raise InputError(
            f"{name!r} is no hot rule; those that can be replaced are {', '.join(SIGNATURES)}."
        )
    try:
        numba.njit(SIGNATURES[name])(rule)
    except numba.core.errors.NumbaError:
        return False
    return True


@contextmanager
def _in_place(replaced: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put rules in the place of ours while a loop binds them."""
    ours = {name: getattr(rules, name) for name in replaced}
    try:
        for name, rule in replaced.items():
            setattr(rules, name, rule)
        yield
    finally:
        for name, rule in ours.items():
            setattr(rules, name, rule)
