"""What every table of a settings file is made of, and what is wrong with one in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from helios_sim.errors import InputError, UnknownSetting, did_you_mean


class StrictSettings(BaseModel):
    """A table of a scenario: unknown keys, loose types and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def as_tuple(value: Any) -> Any:
    """TOML arrays become tuples, so that frozen settings hold nothing that can change."""
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
Pairs = Annotated[tuple[Pair, ...], BeforeValidator(as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]

_TOML_RULES: Final = {
    "tuple_type": "it must be an array",
    "list_type": "it must be an array",
    "model_type": "it must be a table",
    "dict_type": "it must be a table",
    "model_attributes_type": "it must be a table",
}
"""Rules in the words of TOML where the checker speaks of Python's types."""


def first_flaw(
    error: ValidationError, settings: type[BaseModel], data: Mapping[str, Any], where: str
) -> InputError:
    """The first thing wrong with data that is not of these settings, said in one sentence."""
    errors = error.errors(include_url=False)
    # A misspelt key is also a missing one; the spelling is what to mend.
    unknown_keys = [one for one in errors if one["type"] == "extra_forbidden"]
    first = [*unknown_keys, *errors][0]
    location = _place(first["loc"], data)
    place = ".".join(str(part) for part in location) or "the file"
    kind = first["type"]
    given = first.get("input")
    if kind == "extra_forbidden":
        unknown = str(location[-1])
        allowed = _allowed_keys(settings, first["loc"][:-1])
        hint = did_you_mean(unknown, allowed)
        listed = f" Allowed are {', '.join(allowed)}." if allowed else ""
        return UnknownSetting(f"Unknown key {unknown!r}.{hint}{listed}", f"{where}, {place}")
    if kind == "missing":
        return InputError(f"The key {str(location[-1])!r} is required.", f"{where}, {place}")
    if kind == "value_error":
        return InputError(str(first["ctx"]["error"]), f"{where}, {place}")
    if kind == "union_tag_not_found":
        return InputError("The key 'kind' is required.", f"{where}, {place}")
    if kind == "union_tag_invalid":
        tag, allowed_tags = str(first["ctx"]["tag"]), str(first["ctx"]["expected_tags"])
        hint = did_you_mean(tag, re.findall(r"'([^']+)'", allowed_tags))
        return InputError(
            f"The kind {tag!r} is unknown.{hint} Allowed are {allowed_tags}.", f"{where}, {place}"
        )
    shown = f" was given {_shown(given)};"
    rule = _TOML_RULES.get(kind, first["msg"][0].lower() + first["msg"][1:])
    if isinstance(given, str):
        rule = _in_toml(given, kind, place) or rule
    return InputError(f"{place}{shown} {rule}.", f"{where}, {place}")


_SIZE: Final = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kKMGT]?)(i?)[bB]")
"""Bytes as people write them: the number, the prefix and whether it is a binary one."""


def _in_toml(given: str, kind: str, place: str) -> str:
    """The rule with an example of how the text is to be written; empty where there is none."""
    if kind == "tuple_type" and len(given) <= 60:
        words = [word.strip(" \"'") for word in given.strip(" []").split(",")]
        array = f"[{', '.join(json.dumps(word, ensure_ascii=False) for word in words)}]"
        return f"it must be an array, such as {array}; in a shell --set '{place}={array}'"
    size = _SIZE.fullmatch(given.strip())
    if kind == "int_type" and place.endswith("_bytes") and size is not None:
        prefix, binary = size[2].upper(), bool(size[3])
        unit = (1024 if binary else 1000) ** (" KMGT".index(prefix) if prefix else 0)
        return f"it must be a whole number of bytes, such as {round(float(size[1]) * unit)}"
    return ""


def _shown(given: Any) -> str:
    """A value as an error names it."""
    if isinstance(given, Mapping):
        return "a table"
    if isinstance(given, (list, tuple)):
        return "an array"
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(location: tuple[int | str, ...], data: Any) -> tuple[int | str, ...]:
    """The part of pydantic's location that exists in the file: union tags are left out."""
    node = data
    place: list[int | str] = []
    for index, part in enumerate(location):
        if isinstance(node, Mapping) and part in node:
            node = node[str(part)]
        elif isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif index < len(location) - 1:
            continue
        place.append(part)
    return tuple(place)


def _allowed_keys(settings: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that a table within settings may have; with a kind, the keys of that kind."""
    models = [settings]
    is_name = False
    for part in location:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        of_kind = [model for model in models if part in _kinds_of(model)]
        if of_kind:
            models = of_kind
            continue
        fields = [model.model_fields.get(str(part)) for model in models]
        held = [field.annotation for field in fields if field is not None]
        # The keys of tables by name are the user's own.
        is_name = any(get_origin(annotation) is dict for annotation in held)
        models = [model for annotation in held for model in _models_in(annotation)]
    return sorted({name for model in models for name in model.model_fields})


def _kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of `kind` that choose this table among others."""
    field = model.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings tables that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = getattr(annotation, "__value__", None)
    parts = get_args(annotation) if inner is None else (inner,)
    return [model for part in parts for model in _models_in(part)]
