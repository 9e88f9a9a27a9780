"""A batch loop with a policy's own hot rules: compiled where they allow it, interpreted elsewhere.

numba binds a rule when the loop is compiled, so a loop with other rules is the same source executed
once more with those rules in place of ours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import Any, Final

import numba
import numpy as np

from helios_sim.errors import InputError
from helios_sim.loop import batch
from helios_sim.loop.compiled import CHECKED, Mode, compiling
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


_log = logging.getLogger(__name__)


class InterpretedRuleWarning(UserWarning):
    """A policy's rule cannot be compiled, so its whole loop runs interpreted."""


_loops: dict[str, ModuleType] = {}


def loop_with(replaced: Mapping[str, Callable[..., Any]]) -> Any:
    """The module `batch`, or one like it that follows the replaced rules.

    Rules whose whole meaning is written in them are compiled once, and found again by later runs
    and processes; others for each run.
    """
    if not replaced:
        return batch
    rules_hash = fingerprint(replaced)
    if rules_hash is None:
        return _bind(replaced, "")
    if rules_hash not in _loops:
        _loops[rules_hash] = _bind(replaced, rules_hash)
    return _loops[rules_hash]


def _bind(replaced: Mapping[str, Callable[..., Any]], rules_hash: str) -> ModuleType:
    """Execute the loop's source with these rules in place of ours."""
    uncompilable = [name for name, rule in replaced.items() if not _compiles(name, rule)]
    if uncompilable:
        warnings.warn(
            f"The hot rule {uncompilable[0]!r} cannot be compiled by numba; the simulation runs "
            "interpreted, some hundred times slower, with the same results.",
            InterpretedRuleWarning,
            stacklevel=3,
        )
    elif not rules_hash:
        _log.info(
            "The simulator is compiled with the policy's own rules, for each run, since they refer "
            "to more than numbers and functions: it takes about half a minute."
        )
    name = f"helios_sim.loop.batch_with_own_rules{rules_hash and '_'}{rules_hash}"
    spec = importlib.util.spec_from_file_location(name, batch.__file__)
    assert spec is not None and spec.loader is not None
    variant = importlib.util.module_from_spec(spec)
    # What numba keeps on disk looks its module up by name.
    sys.modules[name] = variant
    mode: Mode = "interpreted" if uncompilable else "cached" if rules_hash else "uncached"
    with _in_place(replaced), compiling(mode, rules_hash and f"rules-{rules_hash}"):
        spec.loader.exec_module(variant)
    return variant


def fingerprint(replaced: Mapping[str, Callable[..., Any]]) -> str | None:
    """A word for what these rules do; None where it cannot be told from their code.

    It can be told where all that a function refers to are numbers, Python's built-in functions,
    the modules math and numpy, and functions of which the same is true.
    """
    digest = hashlib.sha256()
    try:
        for name in sorted(replaced):
            digest.update(repr((name, _meaning(replaced[name], ()))).encode())
    except _NotToldError:
        return None
    return digest.hexdigest()[:16]


class _NotToldError(Exception):
    """What a function does depends on more than its code."""


def _meaning(value: object, within: tuple[object, ...]) -> object:
    """A value that is equal for two functions, or what they refer to, only if they do the same."""
    value = getattr(value, "py_func", value)
    if value is None or isinstance(value, (bool, int, float)):
        return type(value).__name__, repr(value)
    if _is_builtin(value) or value is math or value is np:
        return "name", getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not inspect.isfunction(value) or not _is_kept(value):
        raise _NotToldError
    if value in within:
        return "recursion", within.index(value)
    inner = (*within, value)
    names = sorted({*_names(value.__code__)} & {*value.__globals__})
    return (
        value.__module__,
        _code(value.__code__),
        [(name, _meaning(value.__globals__[name], inner)) for name in names],
        [_meaning(cell.cell_contents, inner) for cell in value.__closure__ or ()],
        [_meaning(default, inner) for default in value.__defaults__ or ()],
        [
            (name, _meaning(default, inner))
            for name, default in sorted((value.__kwdefaults__ or {}).items())
        ],
    )


def _is_builtin(value: object) -> bool:
    """Whether a value is a function of Python's own; a method of some value depends on that too."""
    return inspect.isbuiltin(value) and isinstance(value.__self__, (ModuleType, NoneType))


def _is_kept(function: FunctionType) -> bool:
    """Whether numba can keep a function on disk: it has a file, and a module to be found by."""
    return Path(function.__code__.co_filename).is_file() and function.__module__ in sys.modules


def _names(code: CodeType) -> Iterator[str]:
    """Names that a code refers to, those of functions written within it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _code(code: CodeType) -> object:
    """What a code does with what it refers to."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


def _compiles(name: str, rule: Callable[..., Any]) -> bool:
    """Whether numba can compile a rule as the loop calls it."""
    if name not in SIGNATURES:
        raise InputError(
            f"{name!r} is no hot rule; those that can be replaced are {', '.join(SIGNATURES)}."
        )
    if not inspect.isfunction(rule):
        # numba compiles nothing else: no method, no built-in function, nothing with a __call__.
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", numba.core.errors.NumbaWarning)
        try:
            numba.njit(SIGNATURES[name], **CHECKED)(rule)
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
