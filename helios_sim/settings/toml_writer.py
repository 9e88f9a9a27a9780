"""Plain data written as TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def toml_text(data: Mapping[str, Any]) -> str:
    """Plain data as TOML, in the order given; a type TOML does not have is a `TypeError`."""
    lines: list[str] = []
    _table(data, (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def _table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    """A table's own values first, then its tables: TOML's order."""
    inner: list[tuple[str, Any]] = []
    for key, value in table.items():
        if not isinstance(key, str):
            raise TypeError(f"The key {key!r} of {'.'.join(path) or 'the top'} is not text.")
        if isinstance(value, Mapping) or _is_table_array(value):
            inner.append((key, value))
        else:
            lines.append(f"{_key(key)} = {_value(value, (*path, key))}")
    for key, value in inner:
        here = (*path, key)
        name = ".".join(_key(part) for part in here)
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]"]
            _table(value, here, lines)
        else:
            for element in value:
                lines += ["", f"[[{name}]]"]
                _table(element, here, lines)


def _is_table_array(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(one, Mapping) for one in value)
    )


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    short = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    escaped = (
        short.get(one) or (f"\\u{ord(one):04X}" if ord(one) < 32 or ord(one) == 127 else one)
        for one in text
    )
    return '"' + "".join(escaped) + '"'


def _value(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(str(value))
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(one, path) for one in value) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {_value(one, path)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    raise TypeError(
        f"{'.'.join(path)} is {value!r} of type {type(value).__name__}; TOML has text, integers, "
        "floats, booleans, arrays and tables."
    )
