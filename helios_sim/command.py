"""A command line run to its exit: what a user got wrong is one sentence and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from helios_sim.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130


def run_app(commands: typer.Typer, name: str, arguments: Sequence[str] | None) -> None:
    """Run a command line to its exit, with a user's mistake in words on standard error."""
    try:
        commands(args=None if arguments is None else list(arguments))
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except SystemExit as end:
        # Typer ends an interrupted command with this code and without a word.
        if end.code == INTERRUPTED:
            print(f"{name}: interrupted; nothing was written.", file=sys.stderr)
        raise
