"""Finished points on disk: one file each, whole or absent, found again by content."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError
from helios_sim.folders import write_whole
from helios_sim.search.points import POINT_SCHEMA, Figures

POINTS: Final = "points"
EARLIER: Final = "earlier-until-done"
"""Where the results of an earlier search in the folder are until there are new ones."""
_OWN: Final = re.compile(r"[0-9a-f]{64}\.json|\..*\.partial")
"""Names that a store gives to files: finished points, and those that a kill leaves half written."""


def own_files(folder: Path) -> list[Path]:
    """The files that stores have written of a folder of points; none where it is not there."""
    return [one for one in folder.glob("*") if _OWN.fullmatch(one.name)]


def finished_points(folder: Path) -> list[Path]:
    """The files of the finished points of a folder."""
    return [one for one in own_files(folder) if one.suffix == ".json"]


def kept_in(folder: Path) -> str:
    """What a later run will find beside and in a folder of points, as sentences."""
    num = len(finished_points(folder))
    said = f"{num:,} finished point{'s are' if num != 1 else ' is'} kept."
    earlier = folder.parent / EARLIER
    return f"{said} Results of an earlier search are in {earlier}." if earlier.is_dir() else said


class Store:
    """The points of one folder; without a folder they are kept in memory alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Figures] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"No points can be kept there: {error.strerror}.", str(folder)
                ) from error

    def get(self, key: str) -> Figures | None:
        """The figures of a finished point; a file that is not whole counts as absent."""
        if key in self._known:
            return self._known[key]
        figures = None if self.folder is None else _read(self.folder / f"{key}.json", key)
        if figures is not None:
            self._known[key] = figures
        return figures

    def put(self, key: str, figures: Figures) -> Figures:
        """Keep a point's figures; they come back as a later run will read them."""
        text = json.dumps(
            {"schema_version": POINT_SCHEMA, "key": key, **figures},
            separators=(",", ":"),
            allow_nan=False,
        )
        if self.folder is not None:
            try:
                write_whole(self.folder / f"{key}.json", text.encode())
            except OSError as error:
                raise InputError(
                    f"A finished point cannot be written: {error.strerror}. {self.kept()} Make "
                    "room and run the command again with --resume.",
                    str(self.folder),
                ) from error
        kept: Figures = json.loads(text)
        self._known[key] = kept
        return kept

    def kept(self) -> str:
        """What a later run will find, as sentences."""
        if self.folder is None:
            return "No points were kept, since no folder was given."
        return kept_in(self.folder)


def _read(path: Path, key: str) -> Figures | None:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("key") != key or "judged" not in data:
        return None
    return data if data.get("schema_version") == POINT_SCHEMA else None
