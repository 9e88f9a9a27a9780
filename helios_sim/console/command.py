"""A command line run to its exit: what a user got wrong is one sentence and exit code 2."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer

from helios_sim import __version__
from helios_sim.console.entry import INTERRUPTED
from helios_sim.errors import TRACEBACK, InputError, did_you_mean
from helios_sim.folders import FULL

BAD_INPUT = 2
_UNUSABLE: Final = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS)
"""Why the system does not let a path be used that a user gave."""

_USAGE_ERROR: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)
"""A command line that cannot be read. Typer has moved the class before, but not its heirs."""
_NO_ARGUMENTS: Final = "NoArgsIsHelpError"
"""The one of them that is the help."""


def print_version(is_asked: bool) -> None:
    """Print the version and end, where `--version` was given."""
    if is_asked:
        typer.echo(f"helios-sim {__version__}")
        raise typer.Exit


WithVersion = Annotated[
    bool,
    typer.Option("--version", help="Say the version.", is_eager=True, callback=print_version),
]


class OnStandardError(logging.Handler):
    """Prints what the program says beside its results, wherever standard error is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message in a line of its own."""
        print(record.getMessage(), file=sys.stderr, flush=True)


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


def run_app(
    commands: typer.Typer, name: str, arguments: Sequence[str] | None, known: object = None
) -> None:
    """Run a command line to its exit, with a user's mistake in words on standard error.

    `known` is the `obj` of its context.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    # What the process still holds at its end goes with it; looking for garbage in it would take a
    # sixth of a short run.
    atexit.register(gc.freeze)
    program = logging.getLogger("helios_sim")
    program.setLevel(logging.INFO)
    program.handlers[:] = [OnStandardError()]
    try:
        with rarely_collected():
            code = commands(args=given, prog_name=name, standalone_mode=False, obj=known)
        # A command returns nothing; what ends one early, as --help does, returns its exit code.
        raise SystemExit(code or 0)
    except _USAGE_ERROR as error:
        is_help = type(error).__name__ == _NO_ARGUMENTS
        told = error.format_message() if is_help else f"{name}: {_in_words(error, given)}"
        # Help that was drawn in colours has been printed, and is empty here.
        if told:
            print(told, file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except InputError as error:
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            traceback.print_exception(error)
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except OSError as error:
        if error.errno in FULL:
            print(f"{name}: The disk is full; what it held before is kept.", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from None
        # Any path that a user gives may be one that the system does not even look at.
        if error.errno not in _UNUSABLE or error.filename is None:
            raise
        print(f"{name}: {error.filename}: It cannot be used: {error.strerror}.", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except Exception as error:
        if not _was_interrupted(error):
            raise
        print(f"{name}: interrupted; nothing was written.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as end:
        # Typer ends an interrupted command with this code and without a word.
        if end.code == INTERRUPTED:
            kept = end.kept if isinstance(end, Interrupted) else "nothing was written"
            print(f"{name}: interrupted; {kept}.", file=sys.stderr)
            if arguments is None:
                # What was half made complains as it goes, which tells the user nothing.
                sys.unraisablehook = lambda _: None
        raise


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an interruption is behind an error: transformers makes one of it as it imports."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _in_words(error: Any, given: Sequence[str]) -> str:
    """What is wrong with a command line: what was given, and what is allowed."""
    told = " ".join(str(error.format_message()).split()).rstrip(".")
    context = error.ctx
    if isinstance(error, typer.BadParameter) and error.param is not None:
        names = [name for name in error.param.opts if name.startswith("-")]
        value = _value_of(names, given)
        if value is not None:
            rule = str(error.message).rstrip(".")
            return f"{names[-1]}: It was given {value!r}; {rule[:1].lower()}{rule[1:]}."
    if context is None:
        return f"{told}."
    unknown = getattr(error, "option_name", None)
    if unknown is not None:
        allowed = [*_options_of(context.command), "--help"]
        hint = did_you_mean(unknown, allowed)
        return f"{error.message}.{hint} Allowed are {', '.join(allowed)}."
    commands = getattr(context.command, "commands", {})
    if commands:
        end = "" if told.endswith("?") else "."
        return f"{told}{end} Allowed are {', '.join(commands)}."
    return f"{told}; {context.command_path} --help says what is allowed."


def _value_of(names: Sequence[str], given: Sequence[str]) -> str | None:
    """What the command line gives for an option; the last one counts."""
    value = None
    for place, word in enumerate(given):
        name, equals, text = word.partition("=")
        if name in names:
            value = text if equals else next(iter(given[place + 1 :]), None)
    return value


def _options_of(command: Any) -> list[str]:
    """The options that a command takes."""
    return [
        name
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]
