"""Text of several domains from what the interpreter ships, split by file so that none is shared."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.training.workers import processes_for, workers_for
from helios_sim.errors import InputError

Split = Literal["train", "calibration", "trace", "validation"]
"""Training; fitting of confidence; exit traces; prompts of real serving."""

DOMAINS: Final = ("code", "prose", "tables")
"""Python sources, English about programming, and records of the Unicode character table."""

START: Final = b"\0"
"""What stands before every document; a document never holds it."""

TokenArray = NDArray[np.int64]

_PERCENT: Final[dict[Split, int]] = {"train": 76, "calibration": 6, "trace": 10, "validation": 8}

# Tests are missing on many systems; generated tables are no code that anybody wrote; bundled
# wheels are no text; the rest is either a copy (lib2to3) or read as a module (pydoc_data).
_SKIPPED_FOLDERS: Final = frozenset(
    {"__pycache__", "encodings", "ensurepip", "idle_test", "lib2to3", "pydoc_data",
     "site-packages", "dist-packages", "test", "tests", "unittest_test"}
)  # fmt: skip
_MIN_PROSE_CHARS: Final = 80
_MIN_COMMENT_LINES: Final = 3
_MIN_DOCUMENT_BYTES: Final = 200
_CODE_POINTS_PER_TABLE: Final = 128
_LONG_LINE_CHARS: Final = 40
"""A line of so many characters that two texts have was taken from one of them."""

_FILES_AT_ONCE: Final = 256
_LEAST_FILES: Final = 3000
"""Files that processes of their own read sooner than this one: as many as large packages have."""

_SEPARATED: Final[dict[Path, tuple[str, str]]] = {}
"""Files' (code, prose); kept, since parsing takes a minute where packages join the text."""

# Scripts whose names are a number or a syllable: tens of thousands of rows that say nothing.
_NUMBERED_NAMES: Final = (
    "CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "EGYPTIAN", "ANATOLIAN", "CUNEIFORM",
    "VAI", "BAMUM", "YI", "VARIATION", "TAG",
)  # fmt: skip


class Tokenizer(Protocol):
    """What turns text into token ids of one vocabulary."""

    @property
    def name(self) -> str:
        """The name that candidates of one vocabulary share."""
        ...

    def encode(self, text: bytes) -> TokenArray:
        """Token ids of UTF-8 text, shape [tokens]."""
        ...


class ByteTokenizer:
    """One token a byte: 256 ids; 0 stands before a document and nowhere else."""

    name: Final = "bytes"
    vocab_size: Final = 256

    def encode(self, text: bytes | str) -> TokenArray:
        """Token ids of a text, shape [bytes]."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: TokenArray) -> str:
        """The text of token ids; bytes that are no UTF-8 become replacement characters."""
        return bytes(np.asarray(ids, dtype=np.uint8)).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain and split, in the order of their names' hashes.

    `data` joins them, each after `START`. `truncated` says that more text was there.
    """

    domain: str
    split: Split
    data: bytes
    num_documents: int
    truncated: bool

    @property
    def sha256(self) -> str:
        """Hash of the text, by which a reader knows whether it is the same."""
        return hashlib.sha256(self.data).hexdigest()

    def tokens(self, tokenizer: Tokenizer | None = None) -> TokenArray:
        """Token ids of the whole text, shape [tokens]; bytes unless another tokenizer is given."""
        return (tokenizer or ByteTokenizer()).encode(self.data)

    def facts(self) -> dict[str, object]:
        """What a report says of this text."""
        return {
            "domain": self.domain,
            "split": self.split,
            "bytes": len(self.data),
            "documents": self.num_documents,
            "sha256": self.sha256,
            "truncated": self.truncated,
        }


def split_of(name: str) -> Split:
    """The split of a document: from its name alone, so that code and prose of a file share it."""
    place = int.from_bytes(_digest(f"split/{name}")[:8], "big") % 100
    for split, percent in _PERCENT.items():
        if place < percent:
            return split
        place -= percent
    raise AssertionError("the shares of the splits sum to 100")


# A family's models share texts, and parsing a hundred megabytes of packages takes a minute.
@lru_cache(maxsize=16)
def corpus(
    domain: str,
    split: Split,
    *,
    max_bytes: int | None = None,
    min_bytes: int = 1,
    packages: tuple[str, ...] = (),
) -> Corpus:
    """The text of one domain and split.

    Documents are read in the order of their names' hashes until `max_bytes` are there, and the
    last one is cut. `packages` are installed packages whose sources join the training text
    (held-out text is the standard library's alone, whatever is trained on). Raises `InputError`
    for an unknown domain and where less than `min_bytes` are found.
    """
    if domain not in DOMAINS:
        raise InputError(
            f"The domain {domain!r} was given; there are {', '.join(map(repr, DOMAINS))}."
        )
    parts: list[bytes] = []
    size = 0
    truncated = False
    for text in _documents(domain, split, packages if split == "train" else ()):
        if max_bytes is not None and size >= max_bytes:
            truncated = True
            break
        data = START + text.encode("utf-8", errors="replace").replace(START, b"")
        parts.append(data)
        size += len(data)
    if max_bytes is not None and size > max_bytes:
        parts[-1] = parts[-1][: len(parts[-1]) - (size - max_bytes)]
        size, truncated = max_bytes, True
    if size < max(1, min_bytes):
        raise InputError(
            f"The interpreter ships {size:,} bytes of {domain} text for the split {split!r}; "
            f"{max(1, min_bytes):,} are needed. Use a Python whose standard library is installed "
            "with its sources (on Debian the package libpython3-stdlib), or ask for less text.",
            where=str(_library()),
        )
    return Corpus(domain, split, b"".join(parts), len(parts), truncated)


def separate(source: str) -> tuple[str, str]:
    """Python source as (code, prose): docstrings and comments that read as prose leave the code.

    So the domains share no text. Source that does not parse is all code.
    """
    lines = source.splitlines(keepends=True)
    prose: list[tuple[int, int, str]] = [
        block
        for block in (*_docstrings(source, lines), *_comment_blocks(lines))
        if _reads_as_prose(block[2])
    ]
    prose.sort()
    taken = {line for first, last, _ in prose for line in range(first, last)}
    code = "".join(line for number, line in enumerate(lines) if number not in taken)
    return code, "\n\n".join(text for _, _, text in prose)


def _docstrings(source: str, lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """(first line, line after the last, text) of docstrings on lines of their own; from 0."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold escapes that newer Pythons warn of
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node, clean=False) if isinstance(node, kinds) else None
        if text is None or not isinstance(node, kinds):
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        if last is not None and re.match(r"\s*[rRuU]?[\"']", lines[first]):
            yield first, last, inspect.cleandoc(text)


def _comment_blocks(lines: list[str]) -> Iterator[tuple[int, int, str]]:
    """(first line, line after the last, text) of comments of several lines; from 0."""
    first = 0
    block: list[str] = []
    for number, line in enumerate([*lines, ""]):
        match = re.match(r"\s*#+ ?(.*)", line)
        if match:
            if not block:
                first = number
            block.append(match[1].rstrip())
            continue
        if len(block) >= _MIN_COMMENT_LINES:
            yield first, number, "\n".join(block).strip()
        block = []


def _reads_as_prose(text: str) -> bool:
    """Whether letters and blanks make up most of it, and no interpreter session is in it."""
    if len(text) < _MIN_PROSE_CHARS or ">>>" in text:
        return False
    plain = sum(character.isalpha() or character.isspace() for character in text)
    return plain >= 0.88 * len(text)


def _documents(domain: str, split: Split, packages: tuple[str, ...]) -> Iterator[str]:
    """Texts of a domain and split in the order of their names' hashes."""
    names: list[tuple[str, Path | None]] = []
    if domain == "tables":
        names += [(name, None) for name in _table_names()]
    else:
        names += _sources()
    if domain == "prose":
        names += [*_plain_texts(), *((name, None) for name in _topics())]
    left_out = frozenset[str]() if split == "train" else _shared_topics()
    names = [entry for entry in names if split_of(entry[0]) == split and entry[0] not in left_out]
    for package in packages:
        names += _sources_of(package) if domain != "tables" else ()
    names.sort(key=lambda entry: _digest(f"order/{entry[0]}"))
    unread = sum(path is not None and path not in _SEPARATED for _, path in names)
    processes = processes_for(unread, _LEAST_FILES)
    # Whoever has enough text reads no further, so that files are not parsed long before their turn.
    at_once = 1 if processes == 1 else _FILES_AT_ONCE
    with workers_for(_separate_file, processes) as separate_all:
        for begin in range(0, len(names), at_once):
            some = names[begin : begin + at_once]
            new = [path for _, path in some if path is not None and path not in _SEPARATED]
            _SEPARATED.update(zip(new, separate_all(new), strict=True))
            for name, path in some:
                text = _read(domain, name, path)
                if len(text) >= _MIN_DOCUMENT_BYTES:
                    yield text


def _read(domain: str, name: str, path: Path | None) -> str:
    """One document's text, or none where it cannot be read."""
    if domain == "tables":
        return _table(int(name.rpartition("/")[2], 16))
    if path is None:
        return _topics()[name]
    code, prose = _SEPARATED[path]
    return code if domain == "code" else prose


def _separate_file(path: Path) -> tuple[str, str]:
    """A file's (code, prose); none where it cannot be read."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return "", ""
    return separate(text) if path.suffix == ".py" else ("", text)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _walk(root: Path, folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Files below a folder that are neither tests nor generated, with names from the root."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            # The interpreter's own build files (config-3.11-...) differ from system to system.
            if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("config-"):
                yield from _walk(root, entry, prefix)
        else:
            yield prefix + entry.relative_to(root).as_posix(), entry


@cache
def _library_files() -> tuple[tuple[str, Path], ...]:
    return tuple(_walk(_library(), _library(), ""))


def _sources() -> list[tuple[str, Path]]:
    # Names of files that a build writes for its own system begin with _sysconfigdata.
    return [
        (name, path)
        for name, path in _library_files()
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
    ]


def _plain_texts() -> list[tuple[str, Path]]:
    """Licences, notes and help texts that lie among the sources."""
    kinds = (".txt", ".rst")
    return [
        (name, path)
        for name, path in _library_files()
        if path.suffix in kinds or path.name in ("ChangeLog", "README")
    ]


@cache
def _sources_of(package: str) -> tuple[tuple[str, Path], ...]:
    """The sources of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"The package {package!r} was named as training text and is not installed; "
            "install it or leave it out."
        )
    root = Path(spec.origin).parent
    found = _walk(root, root, f"packages/{package}/")
    return tuple((name, path) for name, path in found if path.suffix == ".py")


@cache
def _topics() -> dict[str, str]:
    """The language reference's topics, as the built-in help shows them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"pydoc_data/topics/{name}": text for name, text in topics.items()}


@cache
def _shared_topics() -> frozenset[str]:
    """Topics that share a long line with one of another split: some hold others whole.

    Training keeps its own; a held-out text that a model has read would say nothing.
    """
    lines = {
        name: {line for line in map(str.strip, text.splitlines()) if len(line) >= _LONG_LINE_CHARS}
        for name, text in _topics().items()
    }
    splits: dict[str, set[Split]] = {}
    for name, own in lines.items():
        for line in own:
            splits.setdefault(line, set()).add(split_of(name))
    return frozenset(name for name, own in lines.items() if any(len(splits[x]) > 1 for x in own))


def _table_names() -> list[str]:
    return [f"unicode/{first:06X}" for first in range(0, 0x20000, _CODE_POINTS_PER_TABLE)]


def _table(first: int) -> str:
    """Rows "code point;name;category;direction;decomposition", as in Unicode's own table."""
    rows = []
    for point in range(first, first + _CODE_POINTS_PER_TABLE):
        character = chr(point)
        name = unicodedata.name(character, "")
        if not name or name.startswith(_NUMBERED_NAMES):
            continue
        category = unicodedata.category(character)
        direction = unicodedata.bidirectional(character)
        decomposition = unicodedata.decomposition(character)
        rows.append(f"{point:04X};{name};{category};{direction};{decomposition}\n")
    return "".join(rows)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
