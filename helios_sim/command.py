"""A command line run to its exit: what a user got wrong is one sentence and exit code 2."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from helios_sim.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130


class Interrupted(SystemExit):
    """An interruption after which something is there; `kept` says what and where."""

    def __init__(self, kept: str) -> None:
        super().__init__(INTERRUPTED)
        self.kept = kept


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Look for garbage less often: what a command imports and reads stays, and is a lot."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run_app(commands: typer.Typer, name: str, arguments: Sequence[str] | None) -> None:
    """Run a command line to its exit, with a user's mistake in words on standard error."""
    # What the process still holds at its end goes with it; looking for garbage in it would take a
    # sixth of a short run.
    atexit.register(gc.freeze)
    try:
        with rarely_collected():
            commands(args=None if arguments is None else list(arguments))
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except SystemExit as end:
        # Typer ends an interrupted command with this code and without a word.
        if end.code == INTERRUPTED:
            kept = end.kept if isinstance(end, Interrupted) else "nothing was written"
            print(f"{name}: interrupted; {kept}.", file=sys.stderr)
        raise
