"""A step as a child of a process that has imported what steps import: it begins at once.

Importing torch, transformers and what the calibration needs takes ten seconds and more, and a
campaign has ten steps. The parent must not touch the GPU, since a child cannot use one that its
parent has begun to use.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

IMPORTED: Final = (
    "calibration.cli",
    "calibration.doctor",
    "calibration.measuring.measure",
    "calibration.training.small_family",
    "calibration.fitting.fit",
    "calibration.serving.serve",
    "reports.fidelity.study",
    "pytest",
)
"""What steps import; a package that is missing is said by the steps that need it."""

_POLL_S: Final = 0.02


def import_ahead() -> None:
    """Import what steps import, once for all of them."""
    for name in IMPORTED:
        # Whatever an import raises is for the step to say.
        with suppress(Exception):
            importlib.import_module(name)


def _fork() -> int:
    """Fork, whatever threads there are: those of imports wait for work and hold nothing."""
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, RuntimeWarning):
            warnings.simplefilter("ignore", kind)
        return os.fork()


def children_can(work: Callable[[], object], limit_s: float = 60.0) -> bool:
    """Whether a child of this process can do some work, such as using the GPU.

    An import may have begun to use it, after which no child can.
    """
    pid = _fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # Whatever it is, it cannot.
            code = 1
        finally:
            os._exit(code)
    end_s = time.monotonic() + limit_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() > end_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(_POLL_S)


class Child:
    """A module that runs as `python -m` would run it, in a child of this process.

    It looks like a `subprocess.Popen`, in a group of its own.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = _fork()
        if self.pid == 0:
            os.close(read)
            _become(module, arguments, folder, environment, write)
        os.close(write)
        self.stdout: BinaryIO = os.fdopen(read, "rb")

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises `subprocess.TimeoutExpired`."""
        end_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end_s is not None and time.monotonic() > end_s:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(_POLL_S)
        return code


def _become(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: int,
) -> None:
    """Be the module's process from here to its end."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ.update(environment)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = _code_of(ending)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # What the parent registered for its own end is not for the child to do.
        os._exit(code)


def _code_of(ending: SystemExit) -> int:
    """The exit code that the interpreter would give."""
    if ending.code is None:
        return 0
    if isinstance(ending.code, int):
        return ending.code
    print(ending.code, file=sys.stderr)
    return 1
