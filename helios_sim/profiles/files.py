"""Profiles on disk: found by name, read strictly, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from helios_sim.cost import OPTIONAL_COEFFICIENTS
from helios_sim.errors import InputError, did_you_mean, listed
from helios_sim.folders import folder_in_place
from helios_sim.profile import (
    POINTS_FILE,
    PROFILE_FILE,
    PROFILE_FILES,
    TRACES_FILE,
    Profile,
    ProfileSummary,
    quantity,
)
from helios_sim.profiles.assumptions import Assumed, assume, hash_with
from helios_sim.profiles.parsing import parse_profile

ASSUMED: Final = "assumed"
"""Where a run's environment says which numbers its scenario takes otherwise than the profile."""
_SHIPPED: Final = Path(__file__).parent


def list_profiles() -> list[ProfileSummary]:
    """The profiles that come with the package, by name."""
    return [load_profile(_SHIPPED / name).summary() for name in shipped_names()]


def shipped_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{PROFILE_FILE}"))


def is_shipped(profile: Profile) -> bool:
    """Whether a profile is one that comes with the package, not a user's of the same name."""
    return profile.folder.parent == _SHIPPED


def where_to_find(model: str, profile: str) -> str:
    """A space and where a model is that a profile lacks: in a shipped one, or in its shape."""
    holding = [one.name for one in list_profiles() if model in one.models]
    if holding:
        return f" {listed(holding)} {'has' if len(holding) == 1 else 'have'} it."
    return (
        f" A model that no profile has can be added from its config.json: helios profiles derive "
        f"--from {profile} --model {model}=config.json --out FOLDER."
    )


def load_profile(
    name_or_path: str | Path,
    search_path: Path | None = None,
    assumed: Mapping[str, Assumed] | None = None,
) -> Profile:
    """Read a profile: a folder, or the name of a shipped one.

    A relative folder is looked for under `search_path` (the scenario's folder, say), then under
    the current one; a folder found there goes before a shipped profile of the same name. `assumed`
    are values by the places of numbers that are taken otherwise than the profile has them.
    """
    folder = _find(name_or_path, search_path)
    profile = _parsed(folder, folder_hash(folder))
    return with_assumptions(profile, assumed) if assumed else profile


@lru_cache(maxsize=8)
def _parsed(folder: Path, content_hash: str) -> Profile:
    """The profile of a folder of that content; a search reads the same few for every point."""
    return parse_profile(_read_json(folder / PROFILE_FILE), folder, content_hash)


def with_assumptions(profile: Profile, assumed: Mapping[str, Assumed]) -> Profile:
    """A profile some of whose numbers are taken otherwise, by their places.

    Raises `InputError` for a place without a number and for a value that is not allowed there.
    """
    try:
        left_out = {key: quantity(key, 0.0, "left out", "") for key in OPTIONAL_COEFFICIENTS}
        document, made = assume(profile.document, assumed, left_out)
        found = parse_profile(document, profile.folder, hash_with(profile.hash, assumed))
    except InputError as error:
        # What is wrong stands in no file of the profile.
        place = (error.where or "").removeprefix(f"{profile.folder / PROFILE_FILE}, ")
        raise InputError(error.message, f"assume, profile {profile.name}, {place}") from error
    return replace(found, assumptions=made)


def assumed_in(profile: Profile) -> dict[str, Any]:
    """The entry of a run's environment that says what was assumed; empty where nothing was."""
    said = [one.said() for one in profile.assumptions]
    return {ASSUMED: said} if said else {}


def save_profile(
    document: Mapping[str, Any],
    folder: Path,
    *,
    points: Path | None = None,
    traces: Path | None = None,
    overwrite: bool = False,
    check: Callable[[Profile], object] | None = None,
) -> Profile:
    """Write a profile folder whole or not at all, and return it as loaded.

    `document` is the content of `profile.json`; `points` and `traces` are parquet files copied
    beside it. The document is checked as on loading before anything appears under `folder`, and
    so is what else `check` raises an error for. What may be written over, `check_target` says.
    """
    check_target(folder, overwrite)
    with folder_in_place(folder) as draft:
        (draft / PROFILE_FILE).write_text(document_text(document), encoding="utf-8")
        for source, name in ((points, POINTS_FILE), (traces, TRACES_FILE)):
            if source is not None:
                shutil.copyfile(source, draft / name)
        written = parse_profile(_read_json(draft / PROFILE_FILE), draft, "")
        if check is not None:
            check(written)
    return load_profile(folder)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` unless a profile may be written here.

    Allowed are a new folder, an empty one and, where asked to overwrite, one that holds a profile
    and nothing else.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise InputError(
            "It is a file; allowed is a new folder, an empty one or a profile to replace.",
            where=str(folder),
        )
    # Hidden files would go with the folder like any other.
    present = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in present if name not in PROFILE_FILES]
    if foreign or (present and PROFILE_FILE not in present):
        named = ", ".join((foreign or present)[:3])
        raise InputError(
            f"The folder is not a profile alone: it holds {named}; allowed is a new folder, an "
            f"empty one or one that holds {PROFILE_FILE} and at most "
            f"{' and '.join(PROFILE_FILES[1:])} beside it.",
            where=str(folder),
        )
    if present and not overwrite:
        raise InputError(
            "The profile folder exists already; give another folder, or --overwrite to replace "
            "the profile in it.",
            where=str(folder),
        )


def document_text(document: Mapping[str, Any]) -> str:
    """The text of `profile.json`: one quantity a line, the same bytes for the same document."""
    return _json_lines(document, "") + "\n"


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a profile folder's files; hidden ones are skipped."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    for name in names:
        if any(part.startswith((".", "__")) for part in name.split("/")):
            continue
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            where = str(folder / name)
            raise InputError(f"The file cannot be read: {error}.", where=where) from error
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _json_lines(node: Any, indent: str) -> str:
    """JSON with quantities and lists of plain values on one line each."""
    inner = indent + "  "
    if isinstance(node, Mapping) and node and "value" not in node:
        rows = [
            f"{inner}{json.dumps(key)}: {_json_lines(value, inner)}" for key, value in node.items()
        ]
        return "{\n" + ",\n".join(rows) + "\n" + indent + "}"
    if isinstance(node, (list, tuple)) and any(isinstance(item, str) for item in node):
        rows = [inner + json.dumps(item, ensure_ascii=False) for item in node]
        return "[\n" + ",\n".join(rows) + "\n" + indent + "]"
    return json.dumps(node, ensure_ascii=False)


def _find(name_or_path: str | Path, search_path: Path | None) -> Path:
    """The folder meant by a name or a path."""
    given = Path(name_or_path)
    places = [given] if search_path is None or given.is_absolute() else [search_path / given, given]
    for place in places:
        if (place / PROFILE_FILE).is_file():
            return place
    shipped = shipped_names()
    if str(name_or_path) in shipped:
        return _SHIPPED / str(name_or_path)
    for place in places:
        if place.is_dir():
            raise InputError(
                f"The folder holds no {PROFILE_FILE}; a profile is a folder with one.",
                where=str(place),
            )
    raise InputError(
        f"Profile {str(name_or_path)!r} was not found."
        f"{did_you_mean(str(given), [*_folders_beside(given, places), *shipped])} "
        f"Give a profile folder or one of the shipped profiles {listed(shipped)}.",
        where=str(places[0]),
    )


def _folders_beside(given: Path, places: list[Path]) -> list[str]:
    """Profiles in the folders where a path was looked up, by paths like the one that was given."""
    found: list[str] = []
    for folder in dict.fromkeys(place.parent for place in places):
        # A folder that cannot be listed, or a path without a name, has nothing near it.
        with suppress(OSError, ValueError):
            names = [entry.name for entry in folder.iterdir() if (entry / PROFILE_FILE).is_file()]
            found += [str(given.with_name(name)) for name in sorted(names)]
    return found


def _read_json(path: Path) -> Any:
    """Parse a JSON file; keys given twice are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"The key {key!r} is given twice in one object.", str(path))
            found[key] = value
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(
            f"This is not valid JSON: {error.msg}.",
            where=f"{path}, line {error.lineno}, column {error.colno}",
        ) from error
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The file cannot be read: {error}.", where=str(path)) from error
