"""Prompts of real text: each request is a contiguous piece of held-out text of its domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.model.checkpoint import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    Checkpoint,
    tokenizer_files,
)
from calibration.model.family import shape_of
from calibration.training.text import DOMAINS, ByteTokenizer, Tokenizer, corpus
from helios_sim.errors import InputError
from helios_sim.workload.requests import Requests

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Prompts:
    """Token ids of the held-out text of each domain, from which requests take their pieces.

    `tokenizer` names the vocabulary; `hashes` identify the texts.
    """

    tokenizer: str
    ids: Mapping[str, Ids]
    hashes: Mapping[str, str]

    def pieces(self, requests: Requests, context_tokens: int) -> list[list[int]]:
        """Prompt and true continuation of each request; where it starts follows from the request.

        The piece depends on nothing but the request, so that every policy serves the same text.
        A request that no context holds will be refused and gets none.
        """
        found: list[list[int]] = []
        for row in range(len(requests)):
            domain = requests.domains[int(requests.domain[row])]
            text = self.ids[domain]
            length = int(requests.prompt_tokens[row]) + int(requests.output_tokens[row])
            if length > context_tokens:
                found.append([])
                continue
            room = len(text) - length
            if room < 0:
                raise InputError(
                    f"Request {row} has {length} tokens of prompt and output; the held-out text "
                    f"of the domain {domain!r} has {len(text)}. Shorten the requests or serve "
                    "another domain.",
                    "workload",
                )
            start = int(requests.trace_start[row]) % (room + 1)
            found.append(text[start : start + length].tolist())
        return found


def read_prompts(domains: Sequence[str], tokenizer: Tokenizer) -> Prompts:
    """The validation text of each domain as token ids.

    It shares no document with the text of training, of calibration or of the exit traces.
    """
    ids, hashes = {}, {}
    for domain in domains:
        if domain not in DOMAINS:
            raise InputError(
                f"The workload has the domain {domain!r}, of which there is no text; the "
                f"interpreter ships {', '.join(map(repr, DOMAINS))}.",
                "workload.domains",
            )
        text = corpus(domain, "validation")
        ids[domain] = text.tokens(tokenizer)
        hashes[domain] = text.sha256
    return Prompts(tokenizer.name, ids, hashes)


def shared_tokenizer(candidates: Sequence[Checkpoint]) -> Tokenizer:
    """The tokenizer that candidates share, bounded by the smallest vocabulary among them.

    They meet the same text. It raises `InputError` where they have several.
    """
    folders: dict[str, Path] = {}
    for one in candidates:
        folders.setdefault(one.tokenizer, one.folder)
    if len(folders) > 1:
        listed = ", ".join(f"{name!r} ({folder})" for name, folder in folders.items())
        raise InputError(
            f"The candidates have several tokenizers: {listed}. They meet the same text, so they "
            f"must share one. Where only their files differ, copy one's {TOKENIZER_FILE} to the "
            f"others, or name one tokenizer in every {SETTINGS_FILE}."
        )
    smallest = min(candidates, key=lambda one: shape_of(one.config).vocab)
    return tokenizer_of(smallest.tokenizer, smallest.folder, shape_of(smallest.config).vocab)


def tokenizer_of(name: str, folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer of a checkpoint: bytes, or the one whose files lie in its folder.

    It raises `InputError` for text of which it makes ids that a model of `vocab` ids lacks.
    """
    return _Bounded(_tokenizer(name, folder), folder, vocab)


def _tokenizer(name: str, folder: Path) -> Tokenizer:
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if not tokenizer_files(folder):
        raise InputError(
            f"The checkpoint's tokenizer is {name!r} and its folder has no tokenizer.json, nor "
            "vocab.json with merges.txt; copy them there, or have transformers write the first "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...).",
            str(folder),
        )
    return _FolderTokenizer(name, folder)


class _Bounded:
    """A tokenizer whose ids a model has been found to know.

    They are looked at in the text, since a vocabulary may list ids that no text has, and before
    the embedding does, which on a GPU takes the process down.
    """

    def __init__(self, stock: Tokenizer, folder: Path, vocab: int) -> None:
        self._stock = stock
        self._folder = folder
        self._vocab = vocab

    @property
    def name(self) -> str:
        """The name that candidates of one vocabulary share."""
        return self._stock.name

    def encode(self, text: bytes) -> Ids:
        """Token ids of UTF-8 text, shape [tokens], all below the model's number of ids."""
        ids = self._stock.encode(text)
        highest = int(ids.max(initial=0))
        if highest >= self._vocab:
            raise InputError(
                f"The tokenizer {self.name!r} gives the id {highest} and the model knows "
                f"{self._vocab}; use the tokenizer that belongs to the weights.",
                str(self._folder),
            )
        return ids


class _FolderTokenizer:
    """A Hugging Face tokenizer read from a local folder."""

    def __init__(self, name: str, folder: Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self._name = name
        make: Callable[..., Any] = PreTrainedTokenizerFast
        pick: Callable[..., Any] = AutoTokenizer.from_pretrained
        try:
            self._stock = (
                make(tokenizer_file=str(folder / TOKENIZER_FILE))
                if (folder / TOKENIZER_FILE).is_file()
                # What splits words before merges do is up to the family, which config.json names.
                else pick(folder, local_files_only=True, trust_remote_code=False)
            )
        except Exception as error:  # the library raises plain exceptions of a faulty file
            why = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                f"The tokenizer {name!r} cannot be read: {why}. Copy the files that belong to "
                "the weights into the folder.",
                str(folder),
            ) from error

    @property
    def name(self) -> str:
        """The name that candidates of one vocabulary share."""
        return self._name

    def encode(self, text: bytes) -> Ids:
        """Token ids of UTF-8 text, shape [tokens], none of them a control token's."""
        plain = text.decode("utf-8", errors="replace").replace("\0", "\n\n")
        # Text about models says "</s>" and means the characters, not the end of a text. Quietly: a
        # text longer than the model's context is cut into windows later.
        found = self._stock.encode(
            plain, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return np.asarray(found, dtype=np.int64)
