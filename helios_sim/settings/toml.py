"""TOML read from files and from the command line, with every flaw as an error in words."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from helios_sim.errors import InputError


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    where = str(path)
    try:
        # Editors on Windows put a byte order mark first, which TOML does not know.
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        _check_sayable(data)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"This is not valid TOML: {error}.", where) from error
    except UnicodeDecodeError as error:
        raise InputError("This is not UTF-8 text.", where) from error
    except RecursionError as error:
        raise InputError("The values are nested too deeply.", where) from error
    except IsADirectoryError as error:
        raise InputError("It is a folder; allowed is a TOML file.", where) from error
    except OSError as error:
        raise InputError(f"The file cannot be read: {error.strerror}.", where) from error
    except ValueError as error:
        # What follows the semicolon is advice to programmers.
        said = str(error).partition(";")[0]
        raise InputError(f"The file cannot be read ({said}).", where) from error
    return data


def toml_value(text: str) -> Any:
    """A value in TOML syntax; what cannot be read as one is the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        _check_sayable(value)
    except (ValueError, RecursionError):
        return text
    return value


def _check_sayable(value: Any) -> None:
    """Raise unless the value can be written out: errors in words name what was given.

    Python reads hexadecimal numbers of any length, but writes none of more than some thousand
    digits.
    """
    repr(value)
