"""Policies by name: the shipped ones, and a user's own class in a module or file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final, get_args, get_type_hints

from helios_sim.errors import InputError, UnfitValue, UnknownOption, did_you_mean, listed
from helios_sim.policy import rules
from helios_sim.policy.baselines import (
    Always,
    Clairvoyant,
    EeSingle,
    LoadOnly,
    Never,
    StaticDepth,
    SwitchOnly,
    Vanilla,
)
from helios_sim.policy.contract import MAX_WINDOW_TOKENS, Policy, Watching, WindowKind
from helios_sim.policy.failure import failure_of
from helios_sim.policy.helios import Helios
from helios_sim.policy.options import OFF

SHIPPED: Final[dict[str, type[Any]]] = {
    policy.name: policy
    for policy in (
        Helios,
        Vanilla,
        EeSingle,
        StaticDepth,
        SwitchOnly,
        LoadOnly,
        Clairvoyant,
        Never,
        Always,
    )
}
"""Shipped policies by the name a scenario uses."""

HOT_RULES: Final[dict[str, Callable[..., Any]]] = {
    name: rule
    for name, rule in vars(rules).items()
    if inspect.isfunction(rule) and rule.__module__ == rules.__name__ and name[0] != "_"
}
"""The hot rules a policy may replace, by name."""


def policy_names() -> tuple[str, ...]:
    """The shipped policies."""
    return tuple(SHIPPED)


def make_policy(
    use: str,
    options: Mapping[str, Any] | None = None,
    *,
    search_path: str | Path | None = None,
    where: str | None = None,
) -> Policy:
    """The policy that `use` names, with its options.

    `use` is a shipped name, or "module:Class" where the module is importable or a .py file under
    `search_path`. `where` is the place that errors name.
    """
    given = dict(options or {})
    try:
        policy_class = _find_class(use, search_path)
        if use not in SHIPPED:
            _check_types(use, policy_class, given)
        policy = _build(use, policy_class, given)
        _check_protocol(use, policy)
        hot_rules_of(policy)
    except InputError as error:
        raise error.at(where or error.where or f"policy {use}") from error
    return policy


def policy_source(use: str, *, search_path: str | Path | None = None) -> Path | None:
    """The file that holds a policy's class; None where it is no Python source."""
    try:
        file = inspect.getsourcefile(_find_class(use, search_path))
    except TypeError:
        return None
    return None if file is None else Path(file)


def policy_options(
    use: str, *, search_path: str | Path | None = None
) -> dict[str, tuple[Any, str]]:
    """Options of a policy: name to (default, meaning); `inspect.Parameter.empty` if required."""
    policy_class = _find_class(use, search_path)
    target, fixed = _settings_of(policy_class)
    meanings = (
        {f.name: str(f.metadata.get("doc", "")) for f in dataclasses.fields(target)}
        if dataclasses.is_dataclass(target)
        else {}
    )
    return {
        name: (parameter.default, meanings.get(name, ""))
        for name, parameter in _keyword_parameters(target).items()
        if name not in fixed
    }


def settled_options(
    use: str, given: Mapping[str, Any], *, search_path: str | Path | None = None
) -> dict[str, Any]:
    """Options as a scenario writes them: those given, and the defaults of those that are not.

    A default that means unset stays out, or is "off" where the option can be off. So does one of a
    user's class that would not come back from a file as what it is, such as an object.
    """
    target, fixed = _settings_of(_find_class(use, search_path))
    declared = _types_of(target)
    is_ours = target in {_settings_of(shipped)[0] for shipped in SHIPPED.values()}
    can_be_off = _can_be_off(target)
    found: dict[str, Any] = {}
    chosen = {n: one.default for n, one in _keyword_parameters(target).items() if n not in fixed}
    for name, default in chosen.items():
        if name in given:
            found[name] = given[name]
        elif default is None and name in can_be_off:
            found[name] = OFF
        elif is_ours and default is not None:
            # Our settings take the text of a word and the list of a tuple.
            found[name] = list(default) if isinstance(default, tuple) else default
        elif _comes_back(default) and _is_of(default, declared.get(name)):
            found[name] = default
    return found | dict(given)


def option_types(use: str, *, search_path: str | Path | None = None) -> dict[str, Any]:
    """What a policy declares its options to be; empty where it does not, or not readably."""
    target, _ = _settings_of(_find_class(use, search_path))
    return _types_of(target)


def _types_of(target: type[Any]) -> dict[str, Any]:
    """The types that a class gives its arguments; empty where it gives none, or not readably."""
    try:
        return get_type_hints(vars(target).get("__init__", target.__init__))
    except Exception:
        # A type that only a type checker can look up tells nothing here.
        return {}


def option_grades(use: str) -> dict[str, str]:
    """Grades of a shipped policy's options: paper, open (left open by the paper) or ours."""
    target, fixed = _settings_of(SHIPPED[use])
    return {
        f.name: str(f.metadata["grade"]) for f in dataclasses.fields(target) if f.name not in fixed
    }


def hot_rules_of(policy: object) -> dict[str, Callable[..., Any]]:
    """The hot rules a policy replaces, checked: known names, and as many arguments as ours.

    Those that are compiled already are given as the Python functions they were made of, which a
    host compiles as it needs them.
    """
    plain_rules = {}
    replaced = getattr(policy, "hot_rules", {})
    if not isinstance(replaced, Mapping):
        raise InputError(
            f"hot_rules was given {replaced!r}; it must be a mapping from rule names to functions."
        )
    for name, rule in replaced.items():
        if name not in HOT_RULES:
            raise InputError(
                f"hot_rules names {name!r}; it must be one of {listed(HOT_RULES)}."
                f"{did_you_mean(str(name), HOT_RULES)}"
            )
        if not callable(rule):
            raise InputError(f"hot_rules gives {rule!r} for {name!r}; it must be a function.")
        wanted = inspect.signature(HOT_RULES[name]).parameters
        # A function already compiled by numba keeps the Python one in py_func.
        plain: Any = getattr(rule, "py_func", rule)
        try:
            taken = str(len(inspect.signature(plain).parameters))
        except (TypeError, ValueError):
            # Some built-in functions tell nobody what they take.
            taken = "unknown"
        if taken != str(len(wanted)):
            raise InputError(
                f"hot_rules gives a function of {taken} arguments for {name!r}; it must take "
                f"{len(wanted)}: {', '.join(wanted)}."
            )
        plain_rules[name] = plain
    return plain_rules


def _find_class(use: str, search_path: str | Path | None) -> type[Any]:
    if use in SHIPPED:
        return SHIPPED[use]
    module_name, colon, class_name = use.partition(":")
    if not colon or not module_name or not class_name:
        raise InputError(
            f"Policy {use!r} is not known; it must be one of {listed(SHIPPED)}, or a class of "
            f"your own as 'module:Class'.{did_you_mean(use, SHIPPED)}"
        )
    module = _import(use, module_name, search_path)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        raise InputError(
            f"Policy {use!r} names the class {class_name!r}, which module {module_name!r} does not "
            f"have; its classes are {listed(classes)}.{did_you_mean(class_name, classes)}"
        )
    return found


def _import(use: str, module_name: str, search_path: str | Path | None) -> ModuleType:
    dotted = module_name.removesuffix(".py")
    try:
        if search_path is not None:
            file = Path(search_path).joinpath(*dotted.split(".")).with_suffix(".py")
            if file.is_file():
                return _import_file(file)
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is not None and (dotted + ".").startswith(error.name + "."):
            beside = f" and no file {dotted}.py in {search_path}" if search_path else ""
            raise InputError(
                f"Policy {use!r} names the module {dotted!r}, but there is no such module on the "
                f"Python path{beside}."
            ) from error
        raise _broken(use, dotted, error) from error
    except (Exception, SystemExit) as error:
        # A script that reads its command line, say, ends the whole program by its import.
        raise _broken(use, dotted, error) from error


def _broken(use: str, module_name: str, error: BaseException) -> InputError:
    return InputError(
        f"Policy {use!r} could not be read: importing {module_name!r} failed with "
        f"{type(error).__name__}: {error}."
    )


def _import_file(file: Path) -> ModuleType:
    """Import a file under a name of its own, so that files of one name in two folders differ."""
    key = zlib.crc32(str(file.resolve()).encode())
    name = f"_policy_{file.stem}_{key:08x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"The policy file {file} could not be read as Python source.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while it is being executed.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _settings_of(policy_class: type[Any]) -> tuple[type[Any], Mapping[str, Any]]:
    """What takes a policy's options, and those of them that are not to be chosen."""
    target: type[Any] = getattr(policy_class, "settings_type", policy_class)
    fixed: Mapping[str, Any] = getattr(policy_class, "fixed_settings", {})
    return target, fixed


def _keyword_parameters(target: type[Any]) -> dict[str, inspect.Parameter]:
    """What a class takes by name; nothing where that cannot be read, as of a C type's own."""
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    return {name: one for name, one in parameters.items() if one.kind in by_keyword}


def _build(use: str, policy_class: type[Any], given: dict[str, Any]) -> Policy:
    target, fixed = _settings_of(policy_class)
    parameters = _keyword_parameters(target)
    known = [name for name in parameters if name not in fixed]
    for name in given:
        if name not in known:
            allowed = f"its options are {listed(known)}" if known else "it has no options"
            raise UnknownOption(
                f"Policy {use!r} was given the unknown option {name!r}; {allowed}."
                f"{did_you_mean(str(name), known)}"
            )
    for name in known:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            raise InputError(f"Policy {use!r} needs the option {name!r}, which was not given.")
    values = _off_becomes_none(target, given)
    try:
        built = target(**values)
        policy: Policy = built if target is policy_class else policy_class(built)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"Policy {use!r} could not be built from the options {given!r}: "
            f"{type(error).__name__}: {error}."
        ) from error
    return policy


_PLAIN: Final[dict[Any, tuple[tuple[type, ...], str]]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
}
"""What a scenario may give for an option that its class declares with a plain type."""


def _check_types(use: str, policy_class: type[Any], given: Mapping[str, Any]) -> None:
    """Refuse an option of another type than the user's class declares, where that is a plain one.

    A class that gives its options no types, or others, checks them itself.
    """
    declared = _types_of(_settings_of(policy_class)[0])
    for name, value in given.items():
        if not _is_of(value, declared.get(name)):
            _, said = _PLAIN[declared[name]]
            raise UnfitValue(f"Policy {use!r} was given {name} = {value!r}; it must be {said}.")


def _is_of(value: Any, declared: Any) -> bool:
    """Whether a value is of the plain type that is declared; of another type, anything is."""
    if declared not in _PLAIN:
        return True
    allowed, _ = _PLAIN[declared]
    return isinstance(value, allowed) and isinstance(value, bool) == (allowed == (bool,))


def _comes_back(value: Any) -> bool:
    """Whether a file gives a value back as what it is: a tuple would be a list, a word a text."""
    return type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _can_be_off(target: type[Any]) -> set[str]:
    """The options that a scenario may switch off."""
    if not dataclasses.is_dataclass(target):
        return set()
    return {f.name for f in dataclasses.fields(target) if f.metadata.get("can_be_off")}


def _off_becomes_none(target: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    can_be_off = _can_be_off(target)
    return {
        name: None if name in can_be_off and value == OFF else value
        for name, value in given.items()
    }


def _check_protocol(use: str, policy: object) -> None:
    """Refuse what is not a policy, naming every member that is missing or of the wrong kind."""
    try:
        threshold = getattr(policy, "confidence_threshold", "missing")
        watching = getattr(policy, "watching", None)
        name = getattr(policy, "name", None)
        sees_future = getattr(policy, "sees_future", None)
        decide = getattr(policy, "decide", None)
        getattr(policy, "hot_rules", None)
    except Exception as error:
        raise failure_of(type(policy), use, "what it says of itself", error) from error
    is_threshold = threshold is None or (
        isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    )
    wrong = [
        member
        for member, right in (
            ("name (a word)", isinstance(name, str) and bool(name)),
            ("sees_future (true or false)", isinstance(sees_future, bool)),
            ("watching (a Watching)", isinstance(watching, Watching)),
            ("confidence_threshold (a number or None)", is_threshold),
            ("decide (a method)", callable(decide)),
        )
        if not right
    ]
    if wrong:
        raise InputError(
            f"Policy {use!r} is not a policy: it lacks, or has of another kind, {', '.join(wrong)}."
        )
    assert isinstance(watching, Watching)
    # No confidence lies outside of this, so such a threshold would turn exits off without a word.
    if isinstance(threshold, (int, float)) and not 0.0 <= threshold <= 1.0:
        raise InputError(
            f"Policy {use!r} has confidence_threshold = {threshold!r}; it must be a number from 0 "
            "to 1, or None (the profile's)."
        )
    _check_watching(use, watching)


def _check_watching(use: str, watching: Watching) -> None:
    """Refuse a policy that asks to be asked by what is no count, or by no rule that there is."""
    for name, least, may_be_none in (
        ("reassess_requests", 1, True),
        ("breach_window_tokens", 1, True),
        ("breach_limit", 0, False),
    ):
        value = getattr(watching, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not is_whole and not (may_be_none and value is None):
            none = " or None" if may_be_none else ""
            raise InputError(
                f"Policy {use!r} watches {name} = {value!r}; it must be a whole number of at least "
                f"{least}{none}."
            )
    window = watching.breach_window_tokens
    if window is not None and window > MAX_WINDOW_TOKENS:
        raise InputError(
            f"Policy {use!r} watches breach_window_tokens = {window}; at most "
            f"{MAX_WINDOW_TOKENS:,} are allowed."
        )
    if window is not None and watching.breach_limit >= window:
        raise InputError(
            f"Policy {use!r} watches breach_limit = {watching.breach_limit!r}; it must be below "
            f"the {window} tokens of breach_window_tokens, or no window could exceed it."
        )
    if watching.window_kind not in get_args(WindowKind):
        raise InputError(
            f"Policy {use!r} watches window_kind = {watching.window_kind!r}; it must be one of "
            f"{listed(get_args(WindowKind))}."
        )
