"""Numbers of a profile that a scenario takes otherwise, to see whether its answer holds."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from helios_sim.errors import InputError, did_you_mean

EVERY: Final = "*"
"""A part of a place that stands for all names there."""

_DESCRIBED: Final = "device.active_w"
_COUNTED: Final = "models.*.coefficients.power.active_w"
"""Power while working: of the device, for who reads its profile, and of each model that works."""

Assumed = float | tuple[float, ...]


@dataclass(frozen=True)
class Assumption:
    """A number of a profile as a scenario takes it, and as the profile has it."""

    place: str
    value: Any
    of_the_profile: Any
    grade: str

    def said(self) -> str:
        """The number, what it is taken for and what it is in the profile."""
        return (
            f"{self.place} = {_shown(self.value)} (profile: {_shown(self.of_the_profile)}, "
            f"{self.grade})"
        )


def flattened(given: Mapping[str, Any]) -> dict[str, Assumed]:
    """Values by their dotted places; quoted places and nested tables mean the same.

    Of a place that is given twice the later one counts: what the command line sets comes last.
    Raises ValueError where a value is neither a number nor an array of numbers.
    """
    found: dict[str, Assumed] = {}
    for place, value in _items(given, ""):
        parts = value if isinstance(value, list | tuple) else [value]
        if not parts or not all(_is_number(part) for part in parts):
            raise ValueError(
                f"{place} was given {json.dumps(value, default=str)}; a number of the profile is "
                "replaced by a number, and a list of numbers by an array of them."
            )
        found[place] = tuple(value) if isinstance(value, list | tuple) else value
    return found


def _items(given: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def assume(
    document: Any, assumed: Mapping[str, Assumed], optional: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Any], tuple[Assumption, ...]]:
    """A profile's document with other numbers, graded `assumed`, and what was replaced.

    `optional` are the coefficients that a model may leave out, as they are then; they can be
    assumed too. Of a number that a place with a star and one without it mean, the latter has the
    say. Raises `InputError` for a place at which the document has no number, and for two with
    stars that mean the same.
    """
    changed, own = copy.deepcopy(document), dict(_numbers(document, ""))
    taken: dict[str, str] = {}
    made: dict[str, Assumption] = {}
    # Those with a star come first, so that one without it has the last word on its number.
    for place in sorted(assumed, key=lambda one: EVERY not in one.split(".")):
        value = assumed[place]
        own |= _put_in(changed, place, optional)
        entries = list(_entries(changed, place.split("."), ""))
        if not entries:
            raise InputError(
                f"The profile has no number at {place!r}.{did_you_mean(place, own)} Places are "
                f"those of its profile.json, such as {next(iter(own))}; {EVERY} stands for all "
                "names.",
                place,
            )
        for name, entry in entries:
            other = taken.setdefault(name, place)
            if other != place and EVERY in place.split("."):
                raise InputError(f"{name} is meant by {other!r} too; give one of the two.", place)
            if name == _DESCRIBED:
                raise InputError(
                    f"{name} describes the device, and energy goes by each model's own active "
                    f"power: assume {_COUNTED} instead.",
                    place,
                )
            was, grade = own[name]["value"], str(own[name]["grade"])
            if isinstance(was, list) != isinstance(value, tuple):
                kind = "an array of numbers" if isinstance(was, list) else "one number"
                raise InputError(f"{name} is {kind} in the profile; give as much.", place)
            entry["value"] = list(value) if isinstance(value, tuple) else value
            entry["grade"] = "assumed"
            entry["source"] = f"assumed by the scenario; {_shown(was)} in the profile ({grade})"
            entry.pop("error", None)
            made[name] = Assumption(name, entry["value"], was, grade)
    return changed, tuple(made.values())


def _put_in(
    document: Any, place: str, optional: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Put in the coefficients that a place means and a profile leaves out, by their places."""
    put: dict[str, dict[str, Any]] = {}
    models = document.get("models") if isinstance(document, dict) else None
    for model, table in (models if isinstance(models, dict) else {}).items():
        held = table.get("coefficients") if isinstance(table, dict) else None
        if not isinstance(held, dict):
            continue
        for key, entry in optional.items():
            name = f"models.{model}.coefficients.{key}"
            if key not in held and means(place, name):
                held[key] = dict(entry)
                put[name] = entry
    return put


def means(place: str, name: str) -> bool:
    """Whether a place means the number of that name, or a table that it is in."""
    parts = (".*" if part == EVERY else re.escape(part) for part in place.split("."))
    return re.fullmatch(rf"{'[.]'.join(parts)}([.].*)?", name) is not None


def hash_with(content_hash: str, assumed: Mapping[str, Assumed]) -> str:
    """What identifies a profile's content with these numbers replaced."""
    said = json.dumps([content_hash, sorted(assumed.items())])
    return hashlib.sha256(said.encode()).hexdigest()


def _entries(node: Any, parts: list[str], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers meant by a place; names in a document may themselves hold dots."""
    if not isinstance(node, dict):
        return
    if not parts:
        if _is_entry(node):
            yield prefix, node
        return
    if parts[0] == EVERY:
        for key, inner in node.items():
            yield from _entries(inner, parts[1:], _under(prefix, key))
        return
    for length in range(1, len(parts) + 1):
        key = ".".join(parts[:length])
        if key in node:
            yield from _entries(node[key], parts[length:], _under(prefix, key))


def _numbers(node: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number of a document by its place."""
    if isinstance(node, dict):
        if _is_entry(node):
            yield prefix, node
        else:
            for key, inner in node.items():
                yield from _numbers(inner, _under(prefix, key))


def _under(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _is_entry(node: dict[str, Any]) -> bool:
    return {"value", "unit", "grade", "source"} <= node.keys()


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    return "unavailable" if value is None else f"{value:g}"
