"""Teacher-forced scores of text at every exit: confidence, the token predicted, its likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.model.confidence import KINDS, Kind, confidence_of
from calibration.model.early_exit import EarlyExitLM
from helios_sim.errors import InputError

PIECES: Final = 16
"""Of a text that confidence is fitted on or exits are traced of: documents differ, and a piece has
to be long enough for exits to bunch as they do."""

MAX_LOGITS: Final = 32_000_000
"""Logits held at once: 128 MB in single precision."""


@dataclass(frozen=True)
class Windows:
    """Positions of a text in order, each seen with context.

    Row i of the scores predicts the token after position i from what stands before it, in windows
    of `window_tokens` of which the last `traced_tokens` count, so that every position has at least
    window - traced tokens of context. Positions are contiguous within each of up to `pieces` pieces
    of about equal length, which lie at even distances over the whole text: its beginning alone
    would be a few documents.
    """

    window_tokens: int
    traced_tokens: int
    num_positions: int
    pieces: int = 1

    def __post_init__(self) -> None:
        least = min(self.traced_tokens, self.num_positions, self.pieces)
        if least < 1 or self.traced_tokens > self.window_tokens:
            raise InputError(
                f"Windows of {self.window_tokens} tokens with {self.traced_tokens} scored for "
                f"{self.num_positions} positions were asked for; the scored part must be at "
                "least 1 and fit the window, and one position is needed at least."
            )

    @property
    def min_context_tokens(self) -> int:
        """Tokens before a scored position that the model sees at least, with the token itself."""
        return self.window_tokens - self.traced_tokens + 1

    @property
    def num_windows(self) -> int:
        """Windows that the positions take."""
        return -(-self.num_positions // self.traced_tokens)

    @property
    def needed_tokens(self) -> int:
        """Tokens of text that the positions take."""
        return self.num_windows * self.traced_tokens + self.min_context_tokens

    def cut(self, tokens: NDArray[np.int64]) -> Tensor:
        """Windows [windows, window_tokens + 1], the last column being only predicted."""
        if len(tokens) < self.needed_tokens:
            raise InputError(
                f"The text has {len(tokens):,} tokens; {self.num_positions:,} positions with "
                f"their context need {self.needed_tokens:,}. Ask for fewer positions."
            )
        pieces = min(self.pieces, self.num_windows)
        gap = (len(tokens) - self.needed_tokens) // max(1, pieces - 1)
        windows = np.arange(self.num_windows)
        starts = windows * self.traced_tokens + windows * pieces // self.num_windows * gap
        places = starts[:, None] + np.arange(self.window_tokens + 1)
        return torch.from_numpy(tokens[places])


@dataclass(frozen=True)
class Scores:
    """What one model does at each position and exit; arrays [positions, exits].

    `confidence` is raw, by kind. `predicted` is the most likely token, `nll_nats` the negative
    log-likelihood of the true token `target` [positions].
    """

    exit_layers: tuple[int, ...]
    target: NDArray[np.int64]
    predicted: NDArray[np.int64]
    nll_nats: NDArray[np.float32]
    confidence: dict[Kind, NDArray[np.float32]]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the predicted token is the text's, [positions, exits]."""
        return np.asarray(self.predicted == self.target[:, None])

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """Whether the predicted token is the full model's, [positions, exits]."""
        return np.asarray(self.predicted == self.predicted[:, -1:])


@torch.no_grad()
def score(
    model: EarlyExitLM,
    tokens: NDArray[np.int64],
    windows: Windows,
    kinds: Sequence[Kind] = KINDS,
) -> Scores:
    """Score a text at every exit of a model loaded to its full depth, windows in batches."""
    cut = windows.cut(tokens)
    rows = max(1, MAX_LOGITS // (model.spec.shape.vocab * windows.traced_tokens))
    parts: list[list[list[Tensor]]] = []
    for first in range(0, len(cut), rows):
        batch = cut[first : first + rows].to(model.device)
        targets = batch[:, 1:][:, -windows.traced_tokens :].reshape(-1)
        states = model.backbone.forward_dense(batch[:, :-1])
        exits = []
        for level, layer in enumerate(model.exit_layers):
            traced = states[layer - 1][:, -windows.traced_tokens :].flatten(0, 1)
            logits = model.logits(traced, level).float()
            nll = logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]
            confidences = [confidence_of(logits, kind) for kind in kinds]
            exits.append([logits.argmax(-1), nll, *confidences])
        parts.append(exits)
    num = windows.num_positions

    def column(place: int) -> NDArray[np.float32]:
        """One quantity [positions, exits] of all batches."""
        batches = [torch.stack([values[place] for values in exits], -1) for exits in parts]
        joined: NDArray[np.float32] = torch.cat(batches)[:num].cpu().numpy()
        return joined

    return Scores(
        exit_layers=model.exit_layers,
        target=cut[:, -windows.traced_tokens :].reshape(-1)[:num].numpy(),
        predicted=column(0).astype(np.int64),
        # A likelihood of one may come out a rounding error above one.
        nll_nats=np.maximum(column(1), 0.0),
        confidence={kind: column(2 + place) for place, kind in enumerate(kinds)},
    )
