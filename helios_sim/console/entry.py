"""Where a command begins, before what it imports, so that an interruption then is told too."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from typing import Final, NoReturn

INTERRUPTED: Final = 130
"""The exit code of what a user interrupted."""


def begin(name: str, module: str) -> None:
    """Run a command line, the `main` of a module that is imported first.

    A request to end, as a job scheduler sends it before the time is over, is an interruption.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main = import_module(module).main
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    main()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
