"""What is worth bringing home, in a few archives of bounded size, and back into a folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios_sim.errors import InputError

MANIFEST: Final = "manifest.json"
MOST_FILES: Final = 8
MOST_BYTES: Final = 15_000_000
MOST_TOGETHER: Final = 60_000_000
"""Bytes of all archives: a machine that is lent for minutes may give no more back."""

_LEFT_BEHIND: Final = frozenset({"discarded", "__pycache__", "tmp"})
_FIRST: Final = ("steps.json", "logs", "points", "profile", "study", "family", "shapes")
_LEVEL: Final = 6
_HEADERS: Final = 2048
"""Bytes that a member's headers and padding take at most, compressed."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_REPEAT: Final = re.compile(r"repeat-(\d+)")
_PIECE: Final = re.compile(r"(.+)\.piece-\d+-of-([1-9]\d{0,2})")


@dataclass(frozen=True)
class Piece:
    """A file or a stretch of one, under the name that it has in an archive."""

    path: Path
    name: str
    begin: int
    end: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.begin)
            return file.read(self.end - self.begin)


def pack(
    source: Path,
    folder: Path,
    *,
    most_bytes: int = MOST_BYTES,
    most_together: int = MOST_TOGETHER,
) -> list[str]:
    """Write archives of the files worth keeping and a manifest; returns what found no room.

    A file larger than an archive goes in pieces. Weights, discarded runs and pages of single runs
    stay behind. The same files give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[Piece]] = [[] for _ in range(MOST_FILES - 1)]
    room = [most_bytes - _HEADERS] * len(parts)
    left_out: list[str] = []
    for path in worth_keeping(source):
        name, free = path.relative_to(source).as_posix(), list(room)
        pieces = list(_pieces(path, name, most_bytes))
        places = [at for piece in pieces if (at := _place(piece, free)) is not None]
        taken = len(parts) * most_bytes - sum(free)
        if len(places) < len(pieces) or taken > most_together:
            left_out.append(name)
            continue
        room = free
        for place, piece in zip(places, pieces, strict=True):
            parts[place].append(piece)
    # Whoever is killed while they are made leaves those of an earlier call as they were.
    made = {
        f"part-{number}.tar.gz": _archive(pieces)
        for number, pieces in enumerate(filter(None, parts), 1)
    }
    for old in folder.glob("part-[0-9].tar.gz"):
        old.unlink()
    files = {}
    for name, data in made.items():
        (folder / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    told = {"schema_version": 1, "files": files, "left_out": left_out}
    (folder / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return left_out


def worth_keeping(source: Path) -> list[Path]:
    """Files in order of worth: what cannot be had again without the device comes first.

    Repeats of a serving beyond the first come last. Pages of single runs are megabytes each and
    can be made again from the files beside them.
    """

    def order(path: Path) -> tuple[int, int, str]:
        inside = path.relative_to(source)
        top = inside.parts[0]
        repeats = [int(found[1]) for part in inside.parts if (found := _REPEAT.fullmatch(part))]
        first = _FIRST.index(top) if top in _FIRST else len(_FIRST)
        return (max([1, *repeats]), first, inside.as_posix())

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


def _pieces(path: Path, name: str, most_bytes: int) -> Iterator[Piece]:
    """A file in stretches of which each finds room in an archive, whatever it holds."""
    size = path.stat().st_size
    # Compressing adds a little to what it cannot shrink.
    stretch = most_bytes - most_bytes // 1000 - 2 * _HEADERS
    number = max(1, -(-size // stretch))
    for at in range(number):
        named = name if number == 1 else f"{name}.piece-{at + 1}-of-{number}"
        yield Piece(path, named, at * stretch, min(size, (at + 1) * stretch))


def _place(piece: Piece, free: list[int]) -> int | None:
    """The first archive with room for a piece, which it takes from what is free there."""
    size = len(zlib.compress(piece.read(), _LEVEL)) + _HEADERS
    for at, left in enumerate(free):
        if size <= left:
            free[at] -= size
            return at
    return None


def _archive(pieces: Sequence[Piece]) -> bytes:
    """A compressed archive that holds names and contents, and nothing of when or whose."""
    target = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", _LEVEL, target, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for piece in pieces:
            data = piece.read()
            member = tarfile.TarInfo(piece.name)
            member.size, member.mode = len(data), 0o644
            archive.addfile(member, io.BytesIO(data))
    return target.getvalue()


def unpack(folder: Path, target: Path) -> tuple[int, list[str]]:
    """Restore what `pack` wrote and is there; returns how many archives, and what is missing.

    Every archive is held to the manifest. Missing are archives, and files of which pieces lie in
    them: their other pieces wait for these in `target`. Raises `InputError` for a changed archive,
    and for a member that would leave `target`.
    """
    if not hasattr(tarfile, "data_filter"):
        raise InputError(
            f"This is Python {platform.python_version()}, which cannot keep members of an archive "
            "within a folder; unpack with Python 3.11.4 or later."
        )
    manifest = folder / MANIFEST
    try:
        told = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        files = {str(name): str(facts["sha256"]) for name, facts in told.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"The manifest cannot be read ({error}).", str(manifest)) from error
    missing = []
    for name, sha256 in files.items():
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name of an archive.", str(manifest))
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            missing.append(name)
            continue
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
    return len(files) - len(missing), missing + _joined(target)


def _joined(target: Path) -> list[str]:
    """Make files of their pieces; returns those that lack some."""
    incomplete = []
    found = (_PIECE.fullmatch(str(path)) for path in sorted(target.rglob("*.piece-*-of-*")))
    for name, number in sorted({(one[1], int(one[2])) for one in found if one}):
        pieces = [Path(f"{name}.piece-{at}-of-{number}") for at in range(1, number + 1)]
        if not all(piece.is_file() for piece in pieces):
            incomplete.append(Path(name).relative_to(target).as_posix())
            continue
        with Path(name).open("wb") as file:
            for piece in pieces:
                file.write(piece.read_bytes())
        for piece in pieces:
            piece.unlink()
    return incomplete
