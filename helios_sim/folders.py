"""Folders and files written whole or not at all: under a temporary name, then moved into place."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from helios_sim.errors import InputError

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Why a disk takes nothing more: it is full, or its user has had their share."""


@contextmanager
def folder_in_place(target: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `target` once it is whole, or is gone.

    What had the name before is removed after the move, whatever it holds: who calls checks first.
    Raises InputError where no folder can be made or the disk is full; errors from within name
    `target`, not the draft.
    """
    folder = target.resolve()
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Not `tempfile.mkdtemp`, which keeps everybody else out whatever the umask says.
        draft.mkdir()
    except OSError as error:
        why = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        raise InputError(f"No folder can be made there: {why}.", str(target)) from error
    try:
        yield draft
        move_into_place(draft, folder)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, InputError) and str(draft) in (error.where or ""):
            raise error.at(str(error.where).replace(str(draft), str(target))) from error
        if isinstance(error, OSError) and error.errno in FULL:
            raise InputError("It cannot be written: the disk is full.", str(target)) from error
        raise


def check_writable(target: Path) -> None:
    """Raise `InputError` where nothing can be written, as far as can be told before."""
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{above} is a file, so that no folder can be in it.", str(target))
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"Nothing can be written to {above}.", str(target))


def move_into_place(partial: Path, target: Path) -> None:
    """Give a finished folder its name; what had the name before is removed, or kept on failure.

    Where it cannot get its name back either, it is kept aside, and the error says where.
    """
    if not target.exists():
        partial.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    kept = aside / target.name
    try:
        target.rename(kept)
        partial.rename(target)
    except BaseException as error:
        if kept.exists() and not target.exists():
            try:
                kept.rename(target)
            except OSError as stuck:
                raise OSError(
                    stuck.errno,
                    f"What had this name cannot be given it back ({stuck.strerror}), and is kept "
                    f"as {kept}",
                    str(target),
                ) from error
        raise
    finally:
        if not kept.exists() or target.exists():
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_in_place(target: Path) -> Iterator[Path]:
    """A name beside `target` to write a file under, which is then moved into place, or is gone."""
    # Two commands that write one file do not mix their bytes, on whichever machines they run.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(target: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with file_in_place(target) as partial:
        partial.write_bytes(content)
