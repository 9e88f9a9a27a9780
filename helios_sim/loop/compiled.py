"""Compilation of plain functions, with a cache that notices every changed source.

numba's own on-disk cache looks only at the file of the cached function: a loop would go on using
an old rule after the rule's module changed. The cache folder is therefore named by a hash of all
sources that take part, of numba and of numpy.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

import numba
import numpy as np
from numba.core.runtime.nrt import rtsys

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "cost.py",
    "loop/batch.py",
    "loop/captures.py",
    "loop/companies.py",
    "loop/compiled.py",
    "loop/memory.py",
    "loop/queues.py",
    "loop/rows.py",
    "loop/state.py",
    "policy/rules.py",
)

F = TypeVar("F", bound=Callable[..., Any])


def source_hash() -> str:
    """Hash of every compiled source and of the compiler's version."""
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__}".encode())
    for name in _SOURCES:
        digest.update((_PACKAGE / name).read_bytes())
    return digest.hexdigest()[:16]


def _cache_dir() -> Path:
    """A writable folder: $HELIOS_CACHE_DIR, the user's cache, or a temporary one."""
    chosen = os.environ.get("HELIOS_CACHE_DIR")
    base = Path(chosen) if chosen else Path.home() / ".cache" / "helios-sim"
    folder = base / source_hash()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_temporary_folder() / source_hash()


def _own_temporary_folder() -> Path:
    """A folder among the temporary ones: this user's, since what is in a cache is run."""
    user = os.getuid()
    usual = Path(tempfile.gettempdir()) / f"helios-sim-{user}"
    with suppress(OSError):
        usual.mkdir(mode=0o700, exist_ok=True)
        found = usual.lstat()
        others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not others_write:
            return usual
    return Path(tempfile.mkdtemp(prefix="helios-sim-"))


numba.config.CACHE_DIR = str(_cache_dir())  # type: ignore[attr-defined]


OPTIONS: Final[dict[str, Any]] = {"error_model": "numpy", "_nrt": False, "forceinline": True}
"""How numba compiles the loop and all that it calls."""

CHECKED: Final[dict[str, Any]] = OPTIONS | {"error_model": "python", "boundscheck": True}
"""How it compiles rules where a policy has its own.

A place outside an array raises an IndexError, and dividing by zero a ZeroDivisionError, as in
Python: the one would corrupt memory, and the other decide by infinity.
"""

Mode = Literal["cached", "uncached", "interpreted"]

_mode: Mode = "cached"
_has_own_rules = False
_log = logging.getLogger(__name__)
_is_announced = False


@contextmanager
def compiling(mode: Mode, folder: str = "") -> Iterator[None]:
    """Let a loop with own rules be compiled: not at all, uncached, or in a cache of its own.

    `folder` lies within the usual cache; what is compiled from other functions under the same
    names has to lie elsewhere.
    """
    global _mode, _has_own_rules
    before, _mode, _has_own_rules = _mode, mode, True
    usual = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(Path(usual) / folder)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _mode, _has_own_rules = before, False
        numba.config.CACHE_DIR = usual  # type: ignore[attr-defined]


def compiled(function: F, *, options: Mapping[str, Any] = OPTIONS) -> F:
    """Compile a function with numba, cached on disk, without reordering any arithmetic.

    Counting references to the world's arrays at every call would take four fifths of the loop's
    time; the loop allocates nothing and Python holds the arrays while it runs, so numba's
    reference counting is left out. Handing the whole world over at every call would take two
    thirds of what is left, so functions are compiled into their callers.
    """
    if _mode == "interpreted":
        return function
    cache = _mode == "cached"
    dispatcher: Any = numba.njit(cache=cache, **options)(function)
    if cache:
        load_at_once(dispatcher)
    return dispatcher  # type: ignore[no-any-return]


def compiled_rule(rule: F) -> F:
    """Compile a hot rule; where a loop has a policy's own, they are checked."""
    if not _has_own_rules:
        return compiled(rule)
    if _mode == "interpreted":
        return _dividing(rule)
    return compiled(rule, options=CHECKED)


def _dividing(rule: F) -> F:
    """Let a rule that meets numpy's numbers not divide by zero, as Python's would not."""

    @functools.wraps(rule)
    def checked(*given: Any) -> Any:
        with np.errstate(divide="raise", invalid="raise"):
            return rule(*given)

    return cast(F, checked)


def load_at_once(dispatcher: Any) -> None:
    """Let what is cached be loaded without the declarations that only compiling needs.

    numba reads in all it knows of Python and numpy before it looks into its cache, which takes
    longer than a short run. Compiling still reads them. A numba whose cache is not laid out like
    this one's is left as it is.
    """
    cache = dispatcher._cache
    find = getattr(cache, "_load_overload", None)
    if find is None:
        return
    whole = cache.load_overload

    def load(signature: Any, target: Any) -> Any:
        rtsys.initialize(target)
        found = None
        with cache._guard_against_spurious_io_errors():
            found = find(signature, target)
        if found is None:
            _announce()
            return whole(signature, target)
        return found

    cache.load_overload = load


def _announce() -> None:
    """Say once why what takes an instant otherwise takes a while."""
    global _is_announced
    if not _is_announced:
        _is_announced = True
        _log.info("The simulator is compiled for this machine, once: it takes about half a minute.")


def compilable(function: F) -> F:
    """Leave a function as it is, and let compiled functions call it compiled."""
    return numba.extending.register_jitable(function)
