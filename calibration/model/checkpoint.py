"""A local checkpoint folder: safetensors read by key, strictly, and planned before it is loaded.

Every file's header is checked against the file before a byte of weights is read, and every key
and shape against the model that config.json describes. Pickles are never opened. Beside the
stock files a folder may hold `early_exit.json` (exits, confidence, guard) and
`exit_heads.safetensors` (auxiliary exit heads).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, OPTConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calibration.model.confidence import Confidence, confidence_from_json
from calibration.model.family import check_supported, unsupported
from calibration.model.projection import NUM_SUMS, distance
from helios_sim.errors import InputError
from helios_sim.folders import write_whole

CONFIG_FILE: Final = "config.json"
SETTINGS_FILE: Final = "early_exit.json"
HEADS_FILE: Final = "exit_heads.safetensors"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_PARTS: Final = ("vocab.json", "merges.txt")
"""What holds the same in a folder that has no such file, as OPT's own repositories do."""
UNKNOWN: Final = "unknown"
"""The tokenizer of a checkpoint that names none."""
SCHEMA_VERSION: Final = 1

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HEADER_LIMIT_BYTES: Final = 100_000_000
"""The limit of the safetensors format."""

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

Config = LlamaConfig | OPTConfig
Heads = Literal["shared", "auxiliary"]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its bytes [begin, end) there, its type and shape."""

    path: Path
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


_PIECE_BYTES: Final = 2**24

_LFS: Final = b"version https://git-lfs"


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, checked against the file's size; no weights are read."""
    where = str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begun = file.read(8)
            length = int.from_bytes(begun, "little")
            if begun and begun + file.read(len(_LFS) - 8) == _LFS:
                raise InputError(
                    "This is a pointer of Git LFS in place of the weights; fetch them with "
                    "git lfs pull.",
                    where,
                )
            file.seek(8)
            if size < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
                raise InputError(
                    f"The header claims {length:,} bytes and the file has {size:,}: it is corrupt "
                    "or was cut short. Download or convert it again.",
                    where,
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"The file cannot be read: {error.strerror or error}.", where) from error
    try:
        document = json.loads(text)
        tensors = {
            str(name): _entry(path, 8 + length, entry)
            for name, entry in document.items()
            if name != "__metadata__"
        }
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "The header is not what a safetensors file begins with: it is corrupt. Download or "
            "convert the file again.",
            where,
        ) from error
    last = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
        if entry.begin < last or entry.end > size:
            raise InputError(
                f"The tensor {name!r} claims bytes {entry.begin:,} to {entry.end:,} of a file of "
                f"{size:,}, or bytes of another tensor: it is corrupt or was cut short. Download "
                "or convert it again.",
                where,
            )
        last = entry.end
    return tensors


def _entry(path: Path, data: int, entry: Mapping[str, Any]) -> Entry:
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"The type {entry['dtype']!r} is not supported; allowed are {', '.join(DTYPES)}. Of a "
            "quantised model take the weights that it was made from.",
            str(path),
        )
    begin, end = entry["data_offsets"]
    found = Entry(
        path,
        data + int(begin),
        data + int(end),
        DTYPES[entry["dtype"]],
        tuple(int(length) for length in entry["shape"]),
    )
    if begin < 0 or math.prod(found.shape) * found.dtype.itemsize != found.num_bytes:
        raise ValueError("a tensor's bytes differ from its shape's")
    return found


def read_into(entry: Entry, target: Tensor) -> None:
    """Fill a CPU tensor of the entry's shape from the file, converting the type if it differs."""
    same = target.dtype == entry.dtype and target.is_contiguous()
    raw = target if same else torch.empty(entry.shape, dtype=entry.dtype)
    octets: Any = raw.detach().reshape(-1).view(torch.uint8).numpy()
    view = memoryview(octets)
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            done = 0
            while done < len(view):
                # One call reads at most about 2 GiB on Linux.
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(
                        "The file ended before its tensors did: it changed while it was read.",
                        str(entry.path),
                    )
                done += count
    except OSError as error:
        raise InputError(
            f"The file cannot be read: {error.strerror or error}.", str(entry.path)
        ) from error
    if not same:
        target.copy_(raw)


ROUGH_TOLERANCE: Final = 2e-2
"""Relative tolerance of a guard's sums where weights are held in 16 bits."""

SIGNED_LEEWAY: Final = 10.0
"""Times the tolerance that signed sums may differ by: errors that cancel in a sum stay in them."""


class LogitsSums(NamedTuple):
    """What logits add up to in float64: without their signs, and under the signs of `projection`.

    The first hardly depends on rounding; the others tell which logit belongs to which entry.
    """

    magnitude: float
    signed: tuple[float, ...]


@dataclass(frozen=True)
class Guard:
    """What the logits of fixed tokens add up to at every exit: proof that weights are the ones.

    `sums` are those of |logits|, one an exit, `signed_sums` a projection for each, both None where
    no load has reached the exit yet. A guard may have no signed sums at all, and is then compared
    by the others alone. `tolerance` is relative.
    """

    token_ids: tuple[int, ...]
    sums: tuple[float | None, ...]
    tolerance: float = 1e-3
    signed_sums: tuple[tuple[float, ...] | None, ...] | None = None

    @classmethod
    def unknown(cls, token_ids: Sequence[int], num_exits: int, tolerance: float) -> Guard:
        """A guard that no load has reached an exit of."""
        nothing = (None,) * num_exits
        return cls(tuple(token_ids), nothing, tolerance, nothing)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        document: dict[str, Any] = {
            "token_ids": list(self.token_ids),
            "logits_sums": list(self.sums),
            "tolerance": self.tolerance,
        }
        if self.signed_sums is not None:
            document["signed_sums"] = [one and list(one) for one in self.signed_sums]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Guard:
        """What `to_json` wrote; of anything else a KeyError, TypeError, ValueError or overflow."""
        signed = document.get("signed_sums")
        read = cls(
            tuple(int(token) for token in document["token_ids"]),
            tuple(map(known_sum, document["logits_sums"])),
            float(document["tolerance"]),
            None if signed is None else tuple(map(known_signed, signed)),
        )
        if read.signed_sums is not None and len(read.signed_sums) != len(read.sums):
            raise ValueError("a guard has signed sums for each exit or none at all")
        return read

    def completed(self, found: Sequence[LogitsSums | None]) -> Guard:
        """With sums that were found in the place of those unknown, one an exit."""
        sums = tuple(
            stored if one is None or stored is not None else known_sum(one.magnitude)
            for stored, one in zip(self.sums, found, strict=True)
        )
        signed = self.signed_sums
        if signed is not None:
            signed = tuple(
                stored if one is None or stored is not None else known_signed(one.signed)
                for stored, one in zip(signed, found, strict=True)
            )
        return replace(self, sums=sums, signed_sums=signed)

    def contradicts(self, other: Guard) -> bool:
        """Whether sums of the same tokens differ, so that the weights of both are not the same.

        The tolerance is the one of 16 bits: sums may come from other devices and types.
        """
        if self.token_ids != other.token_ids or len(self.sums) != len(other.sums):
            return False
        if any(
            one is not None and another is not None and not is_close(one, another, ROUGH_TOLERANCE)
            for one, another in zip(self.sums, other.sums, strict=True)
        ):
            return True
        # Of which either may have none.
        signed = zip(self.signed_sums or (), other.signed_sums or (), strict=False)
        return any(
            one is not None and another is not None and not is_alike(one, another, ROUGH_TOLERANCE)
            for one, another in signed
        )


@dataclass(frozen=True)
class EarlyExitSettings:
    """What early_exit.json says of a checkpoint.

    `exits_chosen` where the exits are the usual ones of a checkpoint that named none.
    """

    name: str
    exit_layers: tuple[int, ...]
    exits_chosen: bool = False
    heads: Heads = "shared"
    tokenizer: str = UNKNOWN
    confidence: Confidence = field(default_factory=Confidence)
    guard: Guard | None = None
    corpus: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "exit_layers": list(self.exit_layers),
            "exits_chosen": self.exits_chosen,
            "heads": self.heads,
            "tokenizer": self.tokenizer,
            "confidence": self.confidence.to_json(),
            "guard": None if self.guard is None else self.guard.to_json(),
            "corpus": None if self.corpus is None else dict(self.corpus),
        }


SETTINGS_KEYS: Final = frozenset(
    {
        "schema_version",
        "name",
        "exit_layers",
        "exits_chosen",
        "heads",
        "tokenizer",
        "confidence",
        "guard",
        "corpus",
    }
)


def settings_from_json(document: Any, where: str) -> EarlyExitSettings:
    """Read what `EarlyExitSettings.to_json` wrote; anything else is an InputError."""
    if not isinstance(document, dict):
        raise InputError("The file must hold a JSON object.", where)
    unknown = sorted(set(document) - SETTINGS_KEYS)
    if unknown:
        raise InputError(
            f"Unknown keys {unknown}; allowed are {', '.join(sorted(SETTINGS_KEYS))}.", where
        )
    if document.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"The schema_version is {document.get('schema_version')!r}; this version of the "
            f"software reads {SCHEMA_VERSION}.",
            where,
        )
    heads = document.get("heads", "shared")
    if heads not in ("shared", "auxiliary"):
        raise InputError(f"heads is {heads!r}; allowed are shared, auxiliary.", where)
    exits_chosen = document.get("exits_chosen", False)
    if not isinstance(exits_chosen, bool):
        raise InputError(f"exits_chosen is {exits_chosen!r}; allowed are true, false.", where)
    corpus = document.get("corpus")
    if corpus is not None and not (
        isinstance(corpus, dict)
        and all(isinstance(corpus.get(part) or {}, dict) for part in ("train", "heads"))
    ):
        raise InputError(
            "corpus must be an object whose train and heads, where there are, map domains to "
            "facts.",
            where,
        )
    try:
        layers = tuple(int(layer) for layer in document["exit_layers"])
        guard = document.get("guard")
        return EarlyExitSettings(
            name=str(document["name"]),
            exit_layers=layers,
            exits_chosen=exits_chosen,
            heads=cast(Heads, heads),
            tokenizer=str(document.get("tokenizer", UNKNOWN)),
            confidence=confidence_from_json(document.get("confidence") or {}, where),
            guard=Guard.from_json(guard) if guard else None,
            corpus=corpus,
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            "name, exit_layers (a list of layers) and guard (token_ids, logits_sums, tolerance, "
            f"and {NUM_SUMS} signed_sums an exit or none) must be there and of their kinds.",
            where,
        ) from error


def known_sum(value: float | None) -> float | None:
    """A guard's sum, None where it is unknown or none that logits could be compared with."""
    return None if value is None or not math.isfinite(float(value)) else float(value)


def known_signed(values: Sequence[float] | None) -> tuple[float, ...] | None:
    """A guard's signed sums, None where they are unknown or logits cannot be compared with them."""
    if values is None:
        return None
    known = tuple(map(float, values))
    if len(known) != NUM_SUMS:
        raise ValueError(f"a guard has {NUM_SUMS} signed sums for an exit")
    return known if all(map(math.isfinite, known)) else None


def is_close(stored: float, found: float, tolerance: float) -> bool:
    """Whether a sum is the stored one, within a relative tolerance."""
    return abs(stored - found) <= tolerance * abs(stored)


def is_alike(stored: Sequence[float], found: Sequence[float], tolerance: float) -> bool:
    """Whether signed sums are the stored ones, within the tolerance of a guard's sums."""
    return distance(stored, found) <= SIGNED_LEEWAY * tolerance


def default_exits(num_layers: int) -> tuple[int, ...]:
    """A quarter, half and all of the layers."""
    return tuple(sorted({max(1, num_layers // 4), max(1, num_layers // 2), num_layers}))


def check_exits(exits: Sequence[int], num_layers: int, where: str | None = None) -> tuple[int, ...]:
    """Exit layers, ascending and ending with the full depth, or an InputError."""
    given = tuple(exits)
    right = given and list(given) == sorted(set(given)) and given[0] >= 1
    if not right or given[-1] != num_layers:
        raise InputError(
            f"The exit layers {list(given)} are not allowed; they ascend from 1 or more and end "
            f"with the full depth of {num_layers} layers.",
            where,
        )
    return given


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: what it holds and where, nothing loaded.

    `entries` has the weights by the stock model's names and `head_entries` the auxiliary heads';
    `settings` is early_exit.json, None where there is none.
    """

    folder: Path
    config: Config
    entries: Mapping[str, Entry]
    head_entries: Mapping[str, Entry]
    settings: EarlyExitSettings | None

    @property
    def name(self) -> str:
        """What its settings call it, or else its folder."""
        return _name(self.folder, self.settings)

    @property
    def tokenizer(self) -> str:
        """What identifies its tokenizer: its settings' name, or else the hash of its files."""
        named = UNKNOWN if self.settings is None else self.settings.tokenizer
        files = tokenizer_files(self.folder)
        if named != UNKNOWN or not files:
            return named
        held = hashlib.sha256()
        for file in files:
            try:
                held.update(file.read_bytes())
            except OSError as error:
                why = f"The file cannot be read: {error.strerror}."
                raise InputError(why, str(file)) from error
        return f"sha256:{held.hexdigest()[:16]}"

    @property
    def where(self) -> str:
        """The folder's name in messages."""
        return str(self.folder)

    def check_names(self, expected: Mapping[str, Sequence[int]], heads: Iterable[str] = ()) -> None:
        """Compare keys and shapes with the model's; names what is missing, extra or different.

        `expected` maps the names of all weights, auxiliary heads included, to their shapes;
        `heads` are those of the auxiliary heads.
        """
        wanted_heads = set(heads)
        for held, wanted, file in (
            (self.entries, set(expected) - wanted_heads, self.where),
            (self.head_entries, wanted_heads, str(self.folder / HEADS_FILE)),
        ):
            missing, extra = sorted(wanted - set(held)), sorted(set(held) - wanted)
            if missing or extra:
                said = [
                    f"{what} {len(names)} keys ({_some(names)})"
                    for what, names in (("it misses", missing), ("it has", extra))
                    if names
                ]
                raise InputError(
                    f"The weights do not fit config.json and {SETTINGS_FILE}: "
                    f"{' and '.join(said)}{' too many' if extra else ''}. Use a checkpoint and "
                    "a configuration that belong together.",
                    file,
                )
        every = {**self.entries, **self.head_entries}
        for name, shape in expected.items():
            if every[name].shape != tuple(shape):
                raise InputError(
                    f"The tensor {name!r} is {list(every[name].shape)} and config.json asks for "
                    f"{list(shape)}. Use a checkpoint and a configuration that belong together.",
                    str(every[name].path),
                )

    def fill(self, views: Mapping[str, Tensor]) -> None:
        """Read tensors by name into CPU tensors of their shapes."""
        for name, target in views.items():
            read_into(self.head_entries.get(name) or self.entries[name], target)

    def store_guard(self, guard: Guard) -> bool:
        """Write a guard into early_exit.json.

        False where the folder does not allow it, and where the exits that the guard has sums of are
        no longer those of the file.
        """
        opened = self.settings
        assert opened is not None
        try:
            now = read_settings(self.folder) or opened
            if (now.exit_layers, now.heads) != (opened.exit_layers, opened.heads):
                return False
            update_settings(self.folder, opened, guard=guard)
        except (OSError, InputError):
            return False
        return True


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a folder's vocabulary: one or two; none where they are missing."""
    for names in ((TOKENIZER_FILE,), TOKENIZER_PARTS):
        paths = tuple(folder / name for name in names)
        if all(path.is_file() for path in paths):
            return paths
    return ()


def read_settings(folder: Path) -> EarlyExitSettings | None:
    """What early_exit.json says now, None where there is none."""
    file = folder / SETTINGS_FILE
    return settings_from_json(_json(file), str(file)) if file.exists() else None


def update_settings(
    folder: Path, otherwise: EarlyExitSettings | None = None, **changed: Any
) -> EarlyExitSettings:
    """Change some of early_exit.json, and leave the rest as it stands there by now.

    A model may have been opened long ago, and others write the file too. `otherwise` stands in for
    a file that is not there.
    """
    now = read_settings(folder) or otherwise
    if now is None:
        raise InputError(f"There is no {SETTINGS_FILE} to change.", str(folder))
    now = replace(now, **changed)
    write_settings(folder, now)
    return now


def write_settings(folder: Path, settings: EarlyExitSettings) -> None:
    """Write the early_exit.json of a checkpoint that is made, whole or not at all."""
    write_json(folder / SETTINGS_FILE, settings.to_json())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(document, indent=2) + "\n"
    write_whole(path, text.encode())


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a folder's configuration and headers; weights stay where they are.

    Raises InputError for a folder without safetensors (naming pickles it holds), an unsupported
    architecture, corrupt headers, and missing shards.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError("This is not a folder; give a local checkpoint folder.", str(folder))
    entries = _weights(path)
    config = _config(path)
    settings_path = path / SETTINGS_FILE
    settings = read_settings(path)
    if settings is not None:
        check_exits(settings.exit_layers, int(config.num_hidden_layers), str(settings_path))
        if settings.guard and len(settings.guard.sums) != len(settings.exit_layers):
            raise InputError("The guard needs one sum for each exit layer.", str(settings_path))
        _check_guard_tokens(settings, config, str(settings_path))
    heads: dict[str, Entry] = {}
    if settings is not None and settings.heads == "auxiliary":
        if not (path / HEADS_FILE).exists():
            raise InputError(
                f'There is no such file, and heads is "auxiliary" in {SETTINGS_FILE}; copy it '
                'there, or set heads to "shared".',
                str(path / HEADS_FILE),
            )
        heads = read_header(path / HEADS_FILE)
    _check_tied(entries, config, str(path))
    return Checkpoint(path, config, _stock_names(entries, config), heads, settings)


def _check_guard_tokens(settings: EarlyExitSettings, config: Config, where: str) -> None:
    """Raise `InputError` for a guard of tokens, or of more of them, than the model has."""
    if settings.guard is None:
        return
    ids = settings.guard.token_ids
    vocab, positions = int(config.vocab_size or 0), int(config.max_position_embeddings)
    if len(ids) > positions:
        raise InputError(
            f"The guard has {len(ids)} token_ids and max_position_embeddings is {positions}; set "
            "guard to null, and the next load makes one.",
            where,
        )
    strange = [token for token in ids if not 0 <= token < vocab]
    if strange or not ids:
        raise InputError(
            f"The guard's token_ids are {list(ids)}; they must be some of 0 to {vocab - 1}.", where
        )


def checkpoint_folders(folder: Path) -> list[Path]:
    """A checkpoint's folder itself, or the checkpoints' folders in one that is none.

    Raises `InputError` where neither holds a config.json.
    """
    if not folder.is_dir():
        raise InputError("There is no such folder; give local checkpoint folders.", str(folder))
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    # Hidden ones are drafts of a command that was killed.
    inside = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG_FILE}"))
    if not inside:
        raise InputError(
            "Neither this folder nor one within it holds a config.json; give the folder of a "
            "checkpoint or of a family of them.",
            str(folder),
        )
    return inside


def named_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """The checkpoints' folders by name, each given one a checkpoint or a folder of several.

    None is opened, so that one that cannot be used is no matter where others are asked for. Raises
    `InputError` where there is none, and for two of one name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for path in checkpoint_folders(folder):
            name = _name(path, read_settings(path))
            if name in found and found[name].resolve() == path.resolve():
                continue
            if name in found:
                raise InputError(
                    f"Two checkpoints are called {name!r}; the other is {found[name]}. Give one "
                    "of them.",
                    str(path),
                )
            found[name] = path
    return found


def find_checkpoints(folders: Sequence[Path]) -> dict[str, Checkpoint]:
    """All of `named_folders`, opened."""
    return {name: open_checkpoint(path) for name, path in named_folders(folders).items()}


def _name(folder: Path, settings: EarlyExitSettings | None) -> str:
    return folder.resolve().name if settings is None else settings.name


def _weights(path: Path) -> dict[str, Entry]:
    index = path / INDEX_FILE
    if index.exists():
        return _sharded(path, index)
    if (path / WEIGHTS_FILE).exists():
        return read_header(path / WEIGHTS_FILE)
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"The folder's weights are pickles ({_some(pickles)}), which can run any code when "
            "they are opened and are refused; convert them with safetensors (save_file of the "
            f"state dict to {WEIGHTS_FILE}) or download the safetensors version.",
            str(path),
        )
    raise InputError(f"The folder holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.", str(path))


def _sharded(path: Path, index: Path) -> dict[str, Entry]:
    document = _json(index)
    try:
        weight_map = {str(name): str(file) for name, file in document["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError("The index must map names to files in weight_map.", str(index)) from error
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file or not (path / file).exists()]
    if outside:
        raise InputError(
            f"The index names files that are not in the folder: {_some(outside)}. Download them.",
            str(index),
        )
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(path / file).items():
            if weight_map.get(name) != file:
                raise InputError(
                    f"The tensor {name!r} lies in {file} and the index says "
                    f"{weight_map.get(name)}.",
                    str(index),
                )
            entries[name] = entry
    absent = sorted(set(weight_map) - set(entries))
    if absent:
        raise InputError(f"The index names tensors no file holds: {_some(absent)}.", str(index))
    return entries


def _config(path: Path) -> Config:
    file = path / CONFIG_FILE
    document = _json(file)
    named = document.get("architectures") if isinstance(document, dict) else None
    kind = document.get("model_type") if isinstance(document, dict) else None
    by_kind = {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}
    first = named[0] if isinstance(named, list) and named else named
    architecture = str(first or by_kind.get(str(kind), kind))
    classes: dict[str, Any] = {"LlamaForCausalLM": LlamaConfig, "OPTForCausalLM": OPTConfig}
    if architecture not in classes:
        raise unsupported(architecture, str(file))
    if kind is not None and by_kind.get(str(kind)) != architecture:
        allowed = next(one for one, name in by_kind.items() if name == architecture)
        raise InputError(
            f"model_type is {kind!r} and architectures says {architecture}, whose model_type is "
            f"{allowed!r}: they describe different models. Use the config.json that belongs to "
            "the weights.",
            str(file),
        )
    _check_unquantised(document, str(file))
    _check_full_attention(document, str(file))
    try:
        config: Config = classes[architecture].from_dict(document)
    except Exception as error:  # Validation differs between versions of transformers.
        said = " ".join(str(error).split())
        raise InputError(f"The configuration is not accepted: {said}", str(file)) from error
    _check_counts(config, str(file))
    _check_names_known(config, str(file))
    check_supported(config, str(file))
    if isinstance(config, LlamaConfig):
        _check_rotary(config, str(file))
    return config


def _check_unquantised(document: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` for weights that are codes of others."""
    said = document.get("quantization_config")
    if not said:
        return
    method = said.get("quant_method") if isinstance(said, dict) else said
    raise InputError(
        f"quantization_config says that the weights are quantised (quant_method {method!r}), which "
        "no adapter reads; use a checkpoint of the weights that they were made from, in 16 or 32 "
        "bits and without a quantization_config.",
        where,
    )


def _check_full_attention(document: Mapping[str, Any], where: str) -> None:
    """Raise `InputError` for layers whose tokens do not attend to all tokens before them.

    A stock layer of these families passes over such settings and computes other logits.
    """
    uses, window = document.get("use_sliding_window"), document.get("sliding_window")
    kinds = document.get("layer_types")
    rope = document.get("rope_parameters")
    ropes = list(rope.values()) if isinstance(rope, dict) else []
    for key, value, is_full, allowed in (
        ("use_sliding_window", uses, not uses, "false"),
        # A window that is said not to be used takes nothing away.
        ("sliding_window", window, window is None or uses is False, "null"),
        (
            "layer_types",
            kinds,
            kinds is None
            or (isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)),
            "full_attention for every layer",
        ),
        (
            "rope_parameters",
            rope,
            not any(isinstance(one, dict) for one in ropes),
            "one rotary embedding for all layers",
        ),
    ):
        if not is_full:
            raise InputError(
                f"{key} is {value!r}; allowed is {allowed}, since every layer here attends to all "
                "tokens before. Use a checkpoint of a model that does.",
                where,
            )


def _check_counts(config: Config, where: str) -> None:
    """Raise `InputError` for a model without layers, tokens, positions, width or whole heads."""
    is_llama = isinstance(config, LlamaConfig)
    for key in (
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        *(("intermediate_size", "num_key_value_heads", "head_dim") if is_llama else ("ffn_dim",)),
        "num_attention_heads",
        "max_position_embeddings",
    ):
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{key} is {value!r}; it must be a whole number of 1 or more.", where)
    shared = ("num_key_value_heads", "num_attention_heads")
    for part, whole in (shared,) if is_llama else (("num_attention_heads", "hidden_size"),):
        if getattr(config, whole) % getattr(config, part):
            raise InputError(
                f"{part} is {getattr(config, part)}; allowed are divisors of {whole}, which is "
                f"{getattr(config, whole)}.",
                where,
            )
    vocab, pad = int(config.vocab_size or 0), config.pad_token_id
    # As an index: a negative one counts from the end, as the -1 of Llama's first release does.
    if pad is not None and not -vocab <= pad < vocab:
        raise InputError(
            f"pad_token_id is {pad}; allowed are null and {-vocab} to {vocab - 1}, since "
            f"vocab_size is {vocab}.",
            where,
        )


def _check_names_known(config: Config, where: str) -> None:
    """Raise `InputError` for an activation or a rotary embedding that transformers does not have.

    A configuration takes any name; the layers that are built of it do not.
    """
    is_llama = isinstance(config, LlamaConfig)
    activation = "hidden_act" if is_llama else "activation_function"
    rope = (config.rope_parameters or {}) if is_llama else {}
    for key, value, known in (
        (activation, getattr(config, activation), list(ACT2FN)),
        ("rope_type", rope.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]),
    ):
        if value not in known:
            raise InputError(
                f"{key} is {value!r}; transformers has {', '.join(sorted(known))}.", where
            )


def _check_rotary(config: LlamaConfig, where: str) -> None:
    """Raise `InputError` for a rotary embedding that cannot be made, or not of whole heads."""
    rope = config.rope_parameters or {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if share not in (None, 1):
        raise InputError(
            f"partial_rotary_factor is {share!r}; allowed are 1 and none, since Llama's layers "
            "rotate whole heads. Use a checkpoint of a model that does.",
            where,
        )
    try:
        made = LlamaRotaryEmbedding(config).inv_freq
        faults = "" if bool(made.isfinite().all()) else "its frequencies are not finite"
        if 2 * len(made) != config.head_dim:
            faults = f"it rotates {2 * len(made)} numbers of heads with head_dim {config.head_dim}"
    except Exception as error:  # Each kind of embedding fails in its own way.
        faults = " ".join(str(error).split()).rstrip(".")
    if faults:
        raise InputError(
            f"rope_parameters is {dict(rope)!r}, of which no rotary embedding can be made: "
            f"{faults}. Use the config.json that belongs to the weights.",
            where,
        )


def _check_tied(entries: Mapping[str, Entry], config: Config, where: str) -> None:
    """Refuse an output head of its own that config.json says is the embedding."""
    head = entries.get("lm_head.weight")
    if head is None or not config.tie_word_embeddings:
        return
    for name, embedding in entries.items():
        if name.endswith("embed_tokens.weight") and not _same_content(head, embedding):
            raise InputError(
                f"lm_head.weight differs from {name}, and config.json says tie_word_embeddings: "
                "set that to false if the head is its own, or leave lm_head.weight out.",
                where,
            )


def _same_content(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as mine, other.path.open("rb") as its:
        mine.seek(one.begin)
        its.seek(other.begin)
        for begin in range(0, one.num_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, one.num_bytes - begin)
            if mine.read(size) != its.read(size):
                return False
    return True


def _stock_names(entries: Mapping[str, Entry], config: Config) -> dict[str, Entry]:
    """Entries under the names of the stock causal model, without what it derives itself."""
    prefix = "" if any(name.startswith("model.") for name in entries) else "model."
    found = {}
    for name, entry in entries.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                found[name] = entry
            continue
        found[prefix + name] = entry
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"The file cannot be read: {error.strerror or error}.", str(path)
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"The file is not JSON: {error}.", str(path)) from error


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
