"""Options of a policy: declared with a default, a meaning and a grade, and checked as sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from helios_sim.errors import InputError, UnfitValue, did_you_mean, listed
from helios_sim.policy.contract import ExitMode

Grade = Literal["paper", "open", "ours"]
"""Where a default comes from: published by the paper, left open by the paper, or our own."""

OFF: Final = "off"
"""How a scenario writes None for an option that can be switched off."""


def about(doc: str, grade: Grade, *, can_be_off: bool = False) -> dict[str, object]:
    """The metadata of a settings field: its meaning and grade.

    `can_be_off` lets a scenario write "off", since TOML cannot write None.
    """
    return {"doc": doc, "grade": grade, "can_be_off": can_be_off}


def refused(name: str, value: object, allowed: str) -> InputError:
    """The error for an option whose value is not allowed."""
    return InputError(f"Option {name!r} was given {value!r}; it must be {allowed}.")


def unfit(name: str, value: object, allowed: str) -> UnfitValue:
    """The error for an option whose value is not allowed beside any others."""
    error = refused(name, value, allowed)
    return UnfitValue(error.message)


def check_whole_number(
    name: str,
    value: object,
    minimum: int,
    *,
    off_means: str | None = None,
    unset_means: str | None = None,
) -> None:
    """Refuse anything but a whole number of at least `minimum` (or None where it has a meaning).

    The error says how a scenario has it: "off" with `off_means`, left out with `unset_means`.
    """
    if value is None and (off_means or unset_means):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        none = f', or "{OFF}" ({off_means})' if off_means else _or_left_out(unset_means)
        raise unfit(name, value, f"a whole number of at least {minimum}{none}")


def check_share(
    name: str, value: object, *, zero_allowed: bool, unset_means: str | None = None
) -> None:
    """Refuse anything but a number from 0 to 1 (or None where it has a meaning)."""
    if value is None and unset_means:
        return
    # Not a number fails every comparison, so NaN is refused with the rest.
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (0 < value <= 1 or (zero_allowed and value == 0))
    ):
        return
    bounds = "a number from 0 to 1" if zero_allowed else "a number above 0 and at most 1"
    raise unfit(name, value, bounds + _or_left_out(unset_means))


def _or_left_out(unset_means: str | None) -> str:
    return f", or left out ({unset_means})" if unset_means else ""


def check_threshold(value: object) -> None:
    """Refuse anything but a confidence, or None for the profile's own threshold."""
    check_share(
        "confidence_threshold", value, zero_allowed=True, unset_means="the profile's own threshold"
    )


def check_flag(name: str, value: object) -> None:
    """Refuse anything but true or false."""
    if not isinstance(value, bool):
        raise unfit(name, value, "true or false")


def check_model_name(value: object) -> None:
    """Refuse anything but a model's name or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise unfit("model", value, "the name of a candidate model")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse anything but one of the `allowed` words."""
    if not isinstance(value, str) or value not in allowed:
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise UnfitValue(
            f"Option {name!r} was given {value!r}; it must be one of {listed(allowed)}.{hint}"
        )


def as_exit_mode(name: str, value: object, allowed: Sequence[ExitMode]) -> ExitMode:
    """The exit mode that `value` names, one of `allowed`."""
    check_choice(name, value, [mode.value for mode in allowed])
    return ExitMode(str(value))
