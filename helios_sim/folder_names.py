"""Folders named after labels: alike for simulated and served runs."""

from __future__ import annotations

import re
from collections.abc import Sequence


def folder_name(label: str) -> str:
    """A label as the name of a folder: lower case, with hyphens for what file systems dislike."""
    name = re.sub(r"[^a-z0-9._]+", "-", label.lower()).strip("-.") or "run"
    return name[:80] if not name.endswith(".html") else f"{name[:80]}-run"


def folder_names(labels: Sequence[str]) -> list[str]:
    """A folder for each label, numbered where two labels would share one."""
    names: list[str] = []
    for label in labels:
        name = folder_name(label)
        number = 1
        while name in names:
            number += 1
            name = f"{folder_name(label)}-{number}"
        names.append(name)
    return names
