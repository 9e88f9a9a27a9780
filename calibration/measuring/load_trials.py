"""Trials of loading: what is loaded, how often, and until every stage of it has been read."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from calibration.measuring.loading import PartsFile, StageTime, parts_file, time_checkpoint
from calibration.measuring.readings import Purpose, Reading
from calibration.measuring.sources import Source

LOAD_TRIALS: Final = 3


@dataclass(frozen=True)
class Load:
    """A checkpoint to a depth, or a stand-in file of so many bytes."""

    purpose: Purpose
    source: Source | None = None
    depth: int | None = None
    num_bytes: int | None = None

    def reading(self, found: StageTime, trial: int) -> Reading:
        """The reading of one of its stages."""
        return Reading(
            found.quantity,
            self.source.name if self.source else "",
            layers=self.depth,
            bytes=found.num_bytes,
            predicted_bytes=self.num_bytes,
            seconds=found.seconds,
            repetitions=1,
            trial=trial,
            purpose=self.purpose,
            note=found.note,
        )

    def is_of(self, reading: Reading, trial: int) -> bool:
        """Whether a reading is of this load's trial."""
        name = self.source.name if self.source else ""
        return (reading.model, reading.layers, reading.predicted_bytes) == (
            name,
            self.depth,
            self.num_bytes,
        ) and (reading.trial, reading.purpose) == (trial, self.purpose)


def checkpoint_loads(sources: Sequence[Source]) -> list[Load]:
    """Each checkpoint to each of its exits; the middle one of every model is held out."""
    loads = []
    for source in sources:
        if source.folder is None:
            continue
        middle = source.exit_layers[len(source.exit_layers) // 2]
        for depth in source.exit_layers:
            held_out = len(source.exit_layers) > 2 and depth == middle
            loads.append(Load("held-out" if held_out else "fit", source, depth))
    return loads


def stand_in_loads(sizes: Sequence[int]) -> list[Load]:
    """Files of these sizes, and of one between the largest two that is held out."""
    between = round((sizes[0] * sizes[1]) ** 0.5)
    return [
        *(Load("fit", num_bytes=size) for size in sizes),
        Load("held-out", num_bytes=between),
    ]


@dataclass
class Loading:
    """Loads on one device, with the stand-in files that they need in `folder` until it closes."""

    device: torch.device
    dtype: torch.dtype
    folder: Path
    files: ExitStack = field(default_factory=ExitStack)
    _made: dict[int, PartsFile] = field(default_factory=dict)

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    @property
    def quantities(self) -> set[str]:
        """The stages that a trial consists of."""
        found = {"load_open", "load_disk", "load_host", "unload"}
        return found | {"load_host_pinned"} if self.device.type == "cuda" else found

    def missing(
        self, loads: Sequence[Load], readings: Sequence[Reading], seed: int
    ) -> Iterator[tuple[Load, int]]:
        """Loads and trials of which a stage was not read, trial by trial in random order."""
        for trial in range(LOAD_TRIALS):
            order = list(loads)
            random.Random(f"{seed}-load-{trial}").shuffle(order)
            for load in order:
                read = {one.quantity for one in readings if load.is_of(one, trial)}
                if not self.quantities <= read:
                    yield load, trial

    def stages(self, load: Load) -> Iterator[StageTime]:
        """Load and let go, stage by stage; raises `TooLittleMemory` where one lacks room."""
        if load.source is not None and load.source.folder is not None and load.depth is not None:
            yield from time_checkpoint(
                load.source.folder,
                load.depth,
                exits=load.source.exit_layers,
                device=self.device,
                dtype=self.dtype,
            )
        elif load.num_bytes is not None:
            self.prepare(load)
            yield from self._made[load.num_bytes].stages(self.device)

    def prepare(self, load: Load) -> None:
        """Make the file that a load needs, if it does; raises OSError where the disk lacks room."""
        if load.num_bytes is not None and load.num_bytes not in self._made:
            made = parts_file(self.folder, load.num_bytes, self.dtype)
            self._made[load.num_bytes] = self.files.enter_context(made)
