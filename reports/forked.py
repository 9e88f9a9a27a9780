"""Commands as children of a process that has imported what they import: they begin at once.

Importing torch, transformers and what the calibration needs takes ten seconds and more, a campaign
has ten steps, and its study serves a dozen times. The parent must not touch the GPU, since a child
cannot use one that its parent has begun to use.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

_POLL_S: Final = 0.02
_GRACE_S: Final = 0.5
"""For a child to end by itself: an interruption may have reached it too."""


def import_ahead(names: Sequence[str]) -> None:
    """Import modules, once for all children; what is missing is said by those that need it."""
    for name in names:
        # Whatever an import raises is for the child to say.
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

    It looks like a `subprocess.Popen`, in a group of its own unless it is to stay in this one's.
    It does without the sockets that are `shut`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        own_group: bool = True,
        shut: Sequence[socket.socket] = (),
    ) -> None:
        self.args = [module, *arguments]
        self.returncode: int | None = None
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = _fork()
        if self.pid == 0:
            os.close(read)
            for one in shut:
                one.close()
            _become(module, arguments, folder, environment, write, own_group)
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


class Nursery:
    """A process that runs modules as its children, whatever this one does meanwhile.

    It is made before this process has threads that a child would miss, and imports `imported`
    beside it. It ends when it is closed, and with this process.
    """

    def __init__(self, imported: Sequence[str], folder: Path) -> None:
        self._ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = _fork()
        if self.pid == 0:
            try:
                self._ours.close()
                # An interruption reaches its children too, and ends them.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                children: list[Child] = []
                signal.signal(signal.SIGTERM, lambda *_: _end(children))
                import_ahead(imported)
                _tend(theirs, folder, children)
            finally:
                os._exit(0)
        theirs.close()
        self._answers = self._ours.makefile("rb")

    def run(self, module: str, arguments: Sequence[str]) -> tuple[int, str]:
        """Run a module as `python -m` would: its exit code, and the last line that it said."""
        answer = b""
        with suppress(ConnectionError):
            self._ours.sendall(json.dumps([module, *arguments]).encode() + b"\n")
            answer = self._answers.readline()
        if not answer:
            return 1, "the process that begins others is gone"
        code, said = json.loads(answer)
        return int(code), str(said)

    def close(self) -> None:
        """End it, and what it runs."""
        self._answers.close()
        self._ours.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)


def _end(children: Sequence[Child]) -> None:
    """End this process and, unless they end by themselves at once, its children."""
    for child in children:
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            # Who sees this process gone may take the child for gone too.
            child.wait()
    os._exit(0)


def _tend(asked: socket.socket, folder: Path, children: list[Child]) -> None:
    """Run what is asked for, one after another, until nobody is there to ask."""
    with asked, asked.makefile("rb") as lines:
        for line in lines:
            module, *arguments = json.loads(line)
            # An end asked for between the two would miss the child.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            child = Child(module, arguments, folder, {}, own_group=False, shut=(asked,))
            children[:] = [child]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            said = ""
            for part in child.stdout:
                text = part.decode(errors="replace")
                # Nobody may be there any more to read it.
                with suppress(OSError):
                    print(text, end="", flush=True)
                said = text.strip() or said
            asked.sendall(json.dumps([child.wait(), said]).encode() + b"\n")


def _become(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: int,
    own_group: bool,
) -> None:
    """Be the module's process from here to its end."""
    code = 1
    try:
        if own_group:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
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
