"""What every table of a settings file is made of: strict keys and types, and frozen lists."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class StrictSettings(BaseModel):
    """A table of a scenario: unknown keys, loose types and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def as_tuple(value: Any) -> Any:
    """TOML arrays become tuples, so that frozen settings hold nothing that can change."""
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
Pairs = Annotated[tuple[Pair, ...], BeforeValidator(as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
