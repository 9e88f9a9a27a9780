"""What a reader found in a trace in text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from helios_sim.streams import Floats
from helios_sim.workload.trace import Ints
from helios_sim.workload.trace_flaws import Flaw


@dataclass(frozen=True)
class TraceRows:
    """What a reader found: one row a request, in the order and with the lines of the file.

    Rows of `flaws` are not among them, nor are the `num_dropped` that are no requests. `domain` is
    the text's name in the file, where a column tells it.
    """

    time_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    line: Ints
    domain: pl.Series | None = None
    num_dropped: int = 0
    flaws: tuple[Flaw, ...] = ()

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def num_in_file(self) -> int:
        """Rows of the file, whatever became of them."""
        return len(self) + self.num_dropped + sum(len(flaw.lines) for flaw in self.flaws)

    def take(self, kept: NDArray[np.bool_]) -> TraceRows:
        """These rows alone."""
        return replace(
            self,
            time_s=self.time_s[kept],
            prompt_tokens=self.prompt_tokens[kept],
            output_tokens=self.output_tokens[kept],
            line=self.line[kept],
            domain=None if self.domain is None else self.domain.filter(kept),
        )
