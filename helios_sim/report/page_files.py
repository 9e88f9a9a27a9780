"""Where pages may be written: under a new name, or in the place of an earlier page of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from helios_sim.errors import InputError
from helios_sim.folders import write_whole
from helios_sim.report.document import is_own_page

SUFFIXES: Final = (".html", ".htm")


def is_page(target: Path) -> bool:
    """Whether a name is that of a page; any other is a folder's."""
    return target.suffix.lower() in SUFFIXES


class UnwrittenPage(InputError):
    """A page that the disk does not take; it can be drawn anew from its runs."""


def write_page_text(text: str, target: Path) -> None:
    """Write a page under a temporary name and move it into place."""
    check_page_target(target)
    try:
        write_whole(target, text.encode())
    except OSError as error:
        said = f"The page cannot be written: {error.strerror}."
        raise UnwrittenPage(said, str(target)) from error


def check_page_target(target: Path) -> None:
    """Raise `InputError` unless a page may be written here: a new .html file, or one of ours."""
    if not is_page(target):
        raise InputError("A page's name ends in .html.", str(target))
    if not target.parent.is_dir():
        raise InputError("There is no such folder to write the page to.", str(target.parent))
    if target.is_dir():
        raise InputError("It is a folder; allowed is a file.", str(target))
    check_own(target)


def check_own(page: Path) -> None:
    """Raise `InputError` where a file is there that is no page of ours, nor empty."""
    if (
        page.exists()
        and not is_own_page(page)
        and not (page.is_file() and page.stat().st_size == 0)
    ):
        raise InputError(
            "It is no page of this program, so it is not replaced; give another name, or remove "
            "it by hand.",
            str(page),
        )
