"""A search space: `[search.ranges]` over the settings of one policy's scenario."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, get_args

from helios_sim.errors import InputError, UnfitValue, UnknownSetting, did_you_mean
from helios_sim.experiment import choose_policies
from helios_sim.policy.registry import option_types
from helios_sim.scenario import Scenario, apply_value, parse_scenario, resolved
from helios_sim.search.samplers import Values, sobol_shares

_RANGE_KEYS: Final = ("low", "high", "log", "step", "points", "choices")
BOUND_SHARE: Final = 1e-3
"""How much of a range of any numbers may lie beyond what its setting takes: a bound left out."""
TOLD_APART: Final = 1e-3
"""How much of a range of any numbers a rounded one may be off: trials do not tell less apart."""
GRID_TOLERANCE: Final = 5e-10
"""How much of a step a rounded number may be off: no more than sums of floats are."""
GRID_POINTS: Final = 5
"""Values that a grid takes of a range which does not say how many."""


@dataclass(frozen=True)
class Range:
    """What one setting may be: a number between two bounds, or one of `choices`."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    points: int | None = None
    choices: tuple[Any, ...] = ()
    is_whole: bool = False

    def at(self, share: float) -> Any:
        """The value a share (0 up to below 1) of the way through the range."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        if self.step is not None:
            value = self.low + int(share * self.num_steps) * self.step
        elif self.is_whole:
            low, high = self.low - 0.5, self.high + 0.5
            if self.log:
                low = max(low, 0.5)
                value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
            else:
                value = low + share * (high - low)
        elif self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high / self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return self.fitted(value)

    def grid(self, most: int | None = None) -> list[Any]:
        """Evenly spread values, both ends included."""
        if self.choices:
            return list(self.choices)
        num = most or self.points or GRID_POINTS
        if self.step is not None:
            if self.points is None and most is None:
                num = self.num_steps
            num = min(num, self.num_steps)
        if num == 1 or self.low == self.high:
            return [self.fitted(self.low)]
        values = []
        for place in range(num):
            share = place / (num - 1)
            if self.step is not None:
                value = self.low + round(share * (self.num_steps - 1)) * self.step
            elif self.log:
                value = self.low * (self.high / self.low) ** share
            else:
                value = self.low + share * (self.high - self.low)
            values.append(self.fitted(value))
        return list(dict.fromkeys(values))

    @property
    def num_steps(self) -> int:
        """Values that a range with a step holds."""
        assert self.step is not None
        return int((self.high - self.low) / self.step + 1e-9) + 1

    def step_of(self, value: float) -> int:
        """The place of a value among those that a range with a step holds, or of the nearest."""
        assert self.step is not None
        return min(self.num_steps - 1, max(0, round((value - self.low) / self.step)))

    def fitted(self, value: float) -> Any:
        """The number of the range that a value stands for, to no more digits than tell it apart.

        Six are enough wherever the range is not narrow against its numbers, and on a grid of steps
        wherever they are all that its numbers have.
        """
        if self.is_whole:
            return min(int(self.high), max(int(self.low), round(value)))
        if self.step is not None:
            value = self.low + self.step_of(value) * self.step
            tolerated = GRID_TOLERANCE * self.step
        elif value in (self.low, self.high):
            return value
        else:
            tolerated = TOLD_APART * (self.high - self.low)
        for digits in range(6, 17):
            rounded = float(f"{value:.{digits}g}")
            if self.low <= rounded <= self.high and abs(rounded - value) <= tolerated:
                return rounded
        return min(self.high, max(self.low, value))


@dataclass(frozen=True)
class Space:
    """Ranges over the settings of a scenario with one policy."""

    base: Scenario
    base_dir: Path
    where: str
    ranges: tuple[Range, ...]

    def scenario(self, values: Mapping[str, Any]) -> Scenario:
        """The scenario with these settings; `InputError` where they do not go together."""
        return with_settings(self.base, values, self.base_dir, self.where)

    def own(self, key: str) -> Any:
        """What the scenario itself says of a setting; None where it leaves it out."""
        node: Any = resolved(self.base)
        for part in _path(key):
            if isinstance(node, list):
                node = node[int(part)] if int(part) < len(node) else None
            else:
                node = node.get(part) if isinstance(node, dict) else None
        return node

    def grid(self) -> Iterator[Values]:
        """Every combination of the ranges' grids."""
        for values in product(*(one.grid() for one in self.ranges)):
            yield dict(zip((one.key for one in self.ranges), values, strict=True))

    @property
    def grid_size(self) -> int:
        """How many combinations the grid has."""
        return math.prod(len(one.grid()) for one in self.ranges)

    def at(self, shares: Sequence[float]) -> Values:
        """The settings at a point of the unit cube."""
        return {
            one.key: one.at(float(share)) for one, share in zip(self.ranges, shares, strict=True)
        }


def with_settings(
    base: Scenario, values: Mapping[str, Any], base_dir: Path, where: str
) -> Scenario:
    """A scenario of one policy with settings changed, checked like a file."""
    data = resolved(base)
    for key, value in values.items():
        apply_value(data, _path(key), value, where)
    return parse_scenario(data, where, base_dir)


def _path(key: str) -> list[str]:
    """A key's path; `policy.option` means the one policy that is there."""
    parts = key.split(".")
    if parts[0] == "policy" and len(parts) > 1 and not parts[1].isdecimal():
        return ["policy", "0", *parts[1:]]
    return parts


def alone(scenario: Scenario, policy: str | None, where: str) -> Scenario:
    """The scenario with the one policy that is searched over."""
    if policy is None:
        if len(scenario.policy) > 1:
            names = ", ".join(repr(one.name) for one in scenario.policy)
            raise InputError(
                f"The scenario has {len(scenario.policy)} policies and nothing says which is "
                f"meant; give the name of one of {names}.",
                f"{where}.policy",
            )
        chosen = scenario.policy
    else:
        try:
            chosen = choose_policies(scenario, [policy])[:1]
        except InputError as error:
            raise error.at(f"{where}.policy") from error
    update = {"policy": chosen, "plan": None, "search": None, "published": ()}
    return scenario.model_copy(update=update)


_NO_SETTINGS: Final = {
    "fleet.assume": "nobody chooses what is assumed; helios whatif --vary shows what depends on it",
    "workload.first_trace_row": "it chooses the traffic, which samples do",
}


def read_space(scenario: Scenario, base_dir: Path, where: str) -> Space:
    """The space of a scenario's `[search]` table, with every key known to be a setting."""
    settings = scenario.search
    if settings is None:
        raise InputError(
            "The scenario has no [search] table, which says what may vary; see docs/tune.md.",
            where,
        )
    place = f"{where}, search"
    base = alone(scenario, settings.policy, place)
    try:
        ranges = tuple(_ranges(settings.ranges, f"{place}.ranges"))
    except RecursionError as error:
        raise InputError("The values are nested too deeply.", f"{place}.ranges") from error
    if not ranges:
        raise InputError(
            'It names no setting that may vary; give some, such as "policy.breach_limit" = '
            "{ low = 10, high = 90 }.",
            f"{place}.ranges",
        )
    space = Space(base, base_dir, where, ranges)
    for one in ranges:
        _check_key(space, one, f"{place}.ranges.{one.key}")
    typed = tuple(_typed(space, one, f"{place}.ranges.{one.key}") for one in ranges)
    for one in typed:
        _check_values(space, one, f"{place}.ranges.{one.key}")
    space = replace(space, ranges=typed)
    _check_some_work(space, place)
    return space


def _ranges(table: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[Range]:
    """Ranges of a table; one of tables, or without any of a range's keys, is a key TOML split."""
    for name, given in table.items():
        key = f"{prefix}{name}"
        if isinstance(given, Mapping) and (
            not set(given) & set(_RANGE_KEYS)
            or any(isinstance(one, Mapping) for one in given.values())
        ):
            if not given:
                raise InputError(
                    "The range is empty; give low and high, or choices.", f"{where}.{key}"
                )
            if all(isinstance(one, Mapping | list) for one in given.values()):
                yield from _ranges(given, where, f"{key}.")
                continue
        yield _range(key, given, f"{where}.{key}")


def _range(key: str, given: Any, where: str) -> Range:
    if isinstance(given, list):
        given = {"choices": given}
    if not isinstance(given, Mapping):
        raise InputError(
            f"It was given {given!r}; allowed is a list of choices, or a table with low and high.",
            where,
        )
    for name in given:
        if name not in _RANGE_KEYS:
            raise InputError(
                f"Unknown key {name!r}.{did_you_mean(name, _RANGE_KEYS)} Allowed are "
                f"{', '.join(_RANGE_KEYS)}.",
                where,
            )
    if "choices" in given:
        choices = given["choices"]
        if len(given) > 1 or not isinstance(choices, list):
            raise InputError("choices is a list, and stands alone.", where)
        if not choices:
            raise InputError(
                "The range is empty: choices holds no value; give at least one.", where
            )
        return Range(key, choices=tuple(_frozen(one) for one in choices))
    low, high = given.get("low"), given.get("high")
    for name, value in (("low", low), ("high", high), ("step", given.get("step", 1))):
        if not _is_number(value):
            raise InputError(f"{name} was given {value!r}; allowed is a number.", where)
    assert low is not None and high is not None
    if low > high:
        raise InputError(
            f"The range is empty: low is {low} and high is {high}; low must be at most high.", where
        )
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise InputError(f"log was given {log!r}; allowed is true or false.", where)
    step = given.get("step")
    if step is not None and (step <= 0 or log):
        raise InputError(
            f"step was given {step}; it must be positive, and does not go with log.", where
        )
    if log and low <= 0:
        raise InputError(f"low is {low}; a logarithmic range is above 0.", where)
    points = given.get("points")
    if points is not None and (
        isinstance(points, bool) or not isinstance(points, int) or points < 1
    ):
        raise InputError(
            f"points was given {points!r}; allowed is a whole number from 1 on.", where
        )
    is_whole = isinstance(low, int) and isinstance(high, int)
    return Range(key, low, high, log, step, points, is_whole=is_whole)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # The bound leaves out NaN, infinities and whole numbers that no float holds.
    return abs(value) <= sys.float_info.max


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


def _check_key(space: Space, one: Range, where: str) -> None:
    """Raise `InputError` if no setting has this key; a value may still need others beside it."""
    for beginning, why in _NO_SETTINGS.items():
        if one.key == beginning or one.key.startswith(f"{beginning}."):
            raise InputError(f"{one.key} is no setting to be tuned: {why}.", where)
    try:
        space.scenario({one.key: one.grid()[0]})
    except UnknownSetting as error:
        raise error.at(where) from error
    except InputError:
        return


def _check_values(space: Space, one: Range, where: str) -> None:
    """Raise `InputError` for an end, or a choice, that the setting takes beside no others.

    An end may be a bound that the setting itself leaves out: all between are taken.
    """
    if one.choices:
        tried = [("a choice", value, value) for value in one.choices]
    else:
        low, high = one.low, one.high
        if not one.is_whole:
            anywhere = replace(one, step=None)
            low, high = anywhere.at(BOUND_SHARE), anywhere.at(1.0 - BOUND_SHARE)
        tried = [("low", one.low, low), ("high", one.high, high)]
    for name, value, within in tried:
        error = _own_error(space, one.key, value)
        if error is not None and _own_error(space, one.key, within) is not None:
            raise InputError(
                f"{name} is {value}, which the setting never takes: {error.message}", where
            ) from error


def _own_error(space: Space, key: str, value: Any) -> InputError | None:
    """What is wrong with a setting's value whatever the others are; None where nothing is."""
    try:
        space.scenario({key: value})
    except InputError as error:
        own = f"{space.where}, {'.'.join(_path(key))}"
        if isinstance(error, UnfitValue) or f"{error.where}.".startswith(f"{own}."):
            return error
    return None


def _typed(space: Space, one: Range, where: str) -> Range:
    """The range as one of the numbers that its setting takes, whole or any.

    Where the setting does not tell, whole bounds mean whole numbers.
    """
    if one.choices:
        return one
    kind = _kind_of(space, one)
    if kind is int and not one.is_whole:
        raise InputError(
            f"low is {one.low} and high is {one.high}; this setting takes whole numbers, so give "
            "whole bounds.",
            where,
        )
    is_whole = one.is_whole if kind is None else kind is int
    if is_whole and one.step is not None and not isinstance(one.step, int):
        raise InputError(f"step was given {one.step}; a whole range takes a whole step.", where)
    if is_whole:
        return replace(one, is_whole=True)
    return replace(one, low=float(one.low), high=float(one.high), is_whole=False)


def _kind_of(space: Space, one: Range) -> type[int] | type[float] | None:
    """`int` or `float` where a setting is known to take whole numbers alone, or any; else None."""
    path = _path(one.key)
    if path[0] == "policy":
        declared = option_types(space.base.policy[0].use, search_path=space.base_dir)
        hint = declared.get(path[-1])
        found = {part for part in (*get_args(hint), hint) if part in (int, float)}
    else:
        try:
            held = replace(space, base=space.scenario({one.key: one.grid()[0]})).own(one.key)
        except InputError:
            # The value needs others beside it; what the scenario itself says is of the same kind.
            held = space.own(one.key)
        # A checked scenario holds a float wherever it takes any number.
        found = {type(held)} & {int, float}
    if float in found:
        return float
    return int if found else None


def _check_some_work(space: Space, where: str) -> None:
    """Raise the first error if none of 64 spread combinations is a scenario."""
    first: InputError | None = None
    for shares in sobol_shares(len(space.ranges), 64, seed=0):
        try:
            space.scenario(space.at(shares))
            return
        except InputError as error:
            first = first or error
    assert first is not None
    raise InputError(
        f"Of 64 combinations spread over the ranges none is a scenario; the first says: "
        f"{first.message}",
        f"{where}.ranges",
    )
