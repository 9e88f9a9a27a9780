"""What a user's mistake becomes: one sentence that names the place and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self

TRACEBACK = "HELIOS_TRACEBACK"
"""The environment variable that has the commands print the traceback of a mistake too."""


class InputError(ValueError):
    """A scenario, profile, trace or run that cannot be used as given.

    `where` names the file and, if known, the place in it ("scenario.toml, workload.rate_per_s").
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        self.message = message
        self.where = where
        # Whoever makes an error anew, between processes or between SimPy's, does so of `args`.
        super().__init__(message, where)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def at(self, where: str | None) -> Self:
        """The same mistake, of the same kind, at another place."""
        return type(self)(self.message, where)


class UnknownSetting(InputError):
    """A key or a path that leads to no setting, whatever value it is given."""


class UnknownOption(UnknownSetting):
    """An option that a policy does not have."""


class UnfitValue(InputError):
    """A value that its option does not take, whatever the other options are."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A space and "Did you mean ...?", or nothing where no known word is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(names: Iterable[object]) -> str:
    """Names in quotes as they appear in a sentence, or "none"."""
    return ", ".join(repr(str(name)) for name in names) or "none"


def shown(value: object) -> str:
    """A value as JSON, cut where it would fill the line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is: libraries go on for pages."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def install_command(*extras: str) -> str:
    """What installs extras of this program: no package index has it, so its clone does."""
    return f"pip install -e '.[{','.join(extras)}]' in the clone"
