"""What is worth bringing home, in a few archives of bounded size, and back into a folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from helios_sim.errors import InputError

MANIFEST: Final = "manifest.json"
MOST_FILES: Final = 8
MOST_BYTES: Final = 15_000_000
_LEFT_BEHIND: Final = frozenset({"discarded", "__pycache__", "tmp"})
_FIRST: Final = ("steps.json", "logs", "points", "profile", "study", "family", "shapes")
_LEVEL: Final = 6
_HEADERS: Final = 2048
"""Bytes that a member's headers and padding take at most, compressed."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def pack(source: Path, folder: Path, *, most_bytes: int = MOST_BYTES) -> list[str]:
    """Write archives of the files worth keeping and a manifest; returns what found no room.

    Weights, discarded runs and pages of single runs stay behind. The same files give the same
    bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-[0-9].tar.gz"):
        old.unlink()
    parts: list[list[Path]] = [[] for _ in range(MOST_FILES - 1)]
    room = [most_bytes - _HEADERS] * len(parts)
    left_out: list[str] = []
    for path in worth_keeping(source):
        size = len(zlib.compress(path.read_bytes(), _LEVEL)) + _HEADERS
        place = next((at for at, free in enumerate(room) if size <= free), None)
        if place is None:
            left_out.append(path.relative_to(source).as_posix())
            continue
        parts[place].append(path)
        room[place] -= size
    files = {}
    for number, paths in enumerate(filter(None, parts), 1):
        data = _archive(source, paths)
        name = f"part-{number}.tar.gz"
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    told = {"schema_version": 1, "files": files, "left_out": left_out}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return left_out


def worth_keeping(source: Path) -> list[Path]:
    """Files in order of worth: what cannot be had again without the device comes first.

    Pages of single runs are megabytes each and can be made again from the files beside them.
    """

    def order(path: Path) -> tuple[int, str]:
        inside = path.relative_to(source)
        top = inside.parts[0]
        return (_FIRST.index(top) if top in _FIRST else len(_FIRST), inside.as_posix())

    found = (
        path
        for path in source.rglob("*")
        if path.is_file()
        and not path.is_symlink()
        and path.suffix != ".safetensors"
        and _LEFT_BEHIND.isdisjoint(path.relative_to(source).parts)
        and not (path.suffix == ".html" and "study/runs/" in path.as_posix())
    )
    return sorted(found, key=order)


def _archive(source: Path, paths: Sequence[Path]) -> bytes:
    """A compressed archive that holds names and contents, and nothing of when or whose."""
    target = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", _LEVEL, target, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in paths:
            data = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(source).as_posix())
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


def unpack(folder: Path, target: Path) -> int:
    """Restore what `pack` wrote, every archive held to the manifest; returns how many archives.

    Raises `InputError` for a changed archive, and for a member that would leave `target`.
    """
    manifest = folder / MANIFEST
    try:
        told = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        files = {str(name): str(facts["sha256"]) for name, facts in told.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The manifest cannot be read ({error}).", str(manifest)) from error
    for name, sha256 in files.items():
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name of an archive.", str(manifest))
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise InputError(f"It cannot be read: {error.strerror}.", str(folder / name)) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError("It is not what the manifest says; copy it anew.", str(folder / name))
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
                archive.extractall(target, filter="data")
        except tarfile.TarError as error:
            raise InputError(f"It is refused: {error}.", str(folder / name)) from error
        except OSError as error:
            raise InputError(f"It cannot be unpacked: {error.strerror}.", str(target)) from error
    return len(files)
