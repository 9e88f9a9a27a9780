"""Models to measure as a user names them: checkpoint folders, and public shapes by name."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.model.checkpoint import (
    check_exits,
    checkpoint_folders,
    default_exits,
    open_checkpoint,
)
from calibration.model.early_exit import EarlyExitLM, load
from calibration.model.family import shape_of
from calibration.model.shapes import random_model
from helios_sim.errors import InputError, did_you_mean
from helios_sim.model import PUBLIC_SHAPES, EarlyExitModel, ModelShape


@dataclass(frozen=True)
class Source:
    """A model that can be loaded to any of its exits; `folder` is None for a public shape.

    `exits_chosen` where the exits are not the model's own.
    """

    name: str
    folder: Path | None
    shape: ModelShape
    exit_layers: tuple[int, ...]
    tokenizer: str
    exits_chosen: bool = False

    def weight_bytes(self, depth: int, dtype: torch.dtype) -> int:
        """Bytes of the weights with the first `depth` layers, auxiliary exit heads left out."""
        size = dtype.itemsize
        spec = EarlyExitModel(self.name, self.shape, self.exit_layers, self.tokenizer, size, size)
        return spec.weight_bytes(depth)

    def load(self, depth: int, device: torch.device, dtype: torch.dtype) -> EarlyExitLM:
        """The model with its first `depth` layers, an exit; random weights for a shape."""
        if self.folder is not None:
            return load(
                self.folder,
                depth=depth,
                exits=self.exit_layers,
                device=device,
                dtype=dtype,
                name=self.name,
            )
        return random_model(
            self.name, depth=depth, exits=self.exit_layers, device=device, dtype=dtype, seed=0
        )


def find_sources(models: Sequence[str], exits: Sequence[int] | None = None) -> tuple[Source, ...]:
    """Checkpoints and shapes of these names, in order, each once.

    A folder without config.json stands for the checkpoints in it. `exits` replaces the exit
    layers of every model. Raises `InputError` naming what is neither a folder nor a shape.
    """
    found: list[Source] = []
    for model in models:
        path = Path(model)
        if path.is_dir():
            found += [_checkpoint(folder, exits) for folder in checkpoint_folders(path)]
        elif model in PUBLIC_SHAPES:
            found.append(_shape(model, exits))
        else:
            raise InputError(
                f"{model!r} is neither a folder nor a public shape."
                f"{did_you_mean(model, PUBLIC_SHAPES)} Shapes are {', '.join(PUBLIC_SHAPES)}.",
                "MODEL",
            )
    if not found:
        raise InputError("No model was named; give checkpoint folders or shapes.", "MODEL")
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"Two models are called {name!r}; measure them apart.", "MODEL")
    return tuple(found)


def sample_tokens(vocab: int, count: int = 65536) -> list[int]:
    """Token ids of the interpreter's own sources, as many as asked for.

    Bytes where the vocabulary is one of bytes; else words by their hash, which repeat as words
    of real text do.
    """
    folder = Path(os.__file__).parent
    ids: list[int] = []
    for file in sorted(folder.glob("*.py")):
        content = file.read_bytes()
        if vocab == 256:
            ids += content.replace(b"\0", b" ")
        else:
            ids += [zlib.crc32(word) % vocab for word in content.split()]
        if len(ids) >= count:
            break
    if not ids:
        raise InputError("The interpreter ships no sources to take text from.", str(folder))
    return [ids[place % len(ids)] for place in range(count)]


def _checkpoint(folder: Path, exits: Sequence[int] | None) -> Source:
    opened = open_checkpoint(folder)
    shape = shape_of(opened.config)
    settings = opened.settings
    standing = settings.exit_layers if settings else default_exits(shape.layers)
    exit_layers = check_exits(exits, shape.layers, str(folder)) if exits else standing
    return Source(
        name=opened.name,
        folder=folder,
        shape=shape,
        exit_layers=exit_layers,
        tokenizer=opened.tokenizer,
        exits_chosen=settings is None or settings.exits_chosen or exit_layers != standing,
    )


def _shape(name: str, exits: Sequence[int] | None) -> Source:
    shape = PUBLIC_SHAPES[name]
    return Source(
        name=name,
        folder=None,
        shape=shape,
        exit_layers=check_exits(exits, shape.layers, name)
        if exits
        else default_exits(shape.layers),
        tokenizer="random",
        exits_chosen=True,
    )
