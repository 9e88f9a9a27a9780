"""The floor: the least a compiled loop must do to batch requests and let their tokens exit early.

Continuous batching of one model with all layers loaded: prompts join first, an iteration runs to
the deepest exit of its rows, and each token looks its exit up. There is no KV memory, no policy,
no energy and no record but the time at which each request finishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from helios_sim import cost
from helios_sim.experiment import Experiment
from helios_sim.loop.compiled import compiled
from helios_sim.workload.requests import Requests

REQUEST: Final = 0
PLACE: Final = 1
REMAINING: Final = 2


@dataclass(frozen=True)
class FloorWork:
    """Requests and one model's exits and costs, as plain columns.

    `place` is where in `leaving_level` a request's first token stands.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    place: NDArray[np.int64]
    leaving_level: NDArray[np.uint8]
    exit_layers: NDArray[np.int64]
    coefficients: NDArray[np.float64]
    max_batch: int
    max_prefill_tokens: int


def floor_work(experiment: Experiment, requests: Requests, model: str) -> FloorWork:
    """What the floor needs of an experiment, all requests being of its first domain."""
    setup = experiment.setup
    profile = setup.profile.model(model)
    levels = setup.traces.exit_level_at(model, profile.confidence.default_threshold)
    domain = setup.traces.domain_index(requests.domains[0])
    return FloorWork(
        arrival_s=requests.arrival_s,
        prompt_tokens=requests.prompt_tokens.astype(np.int64),
        output_tokens=requests.output_tokens.astype(np.int64),
        place=(requests.trace_start % setup.traces.num_positions).astype(np.int64),
        leaving_level=levels[domain].astype(np.uint8),
        exit_layers=np.array(profile.model.exit_layers, np.int64),
        coefficients=profile.coefficient_array(),
        max_batch=setup.serving.max_batch,
        max_prefill_tokens=setup.serving.max_prefill_tokens,
    )


def run_floor(work: FloorWork) -> NDArray[np.float64]:
    """When each request finishes."""
    finished_s = np.full(len(work.arrival_s), np.nan)
    _serve(
        work.arrival_s,
        work.prompt_tokens,
        work.output_tokens,
        work.place,
        work.leaving_level,
        work.exit_layers,
        work.coefficients,
        work.max_batch,
        work.max_prefill_tokens,
        np.zeros((work.max_batch, 3), np.int64),
        finished_s,
    )
    return finished_s


def decode_seconds(c: Any, exit_layers: Any, deepest: int, num_rows: int, context: float) -> float:
    """Seconds of an iteration that runs to the exit `deepest`; written for both engines."""
    last = len(exit_layers) - 1
    rows = float(num_rows)
    seconds, _ = cost.decode_seconds(
        c,
        rows,
        context,
        context,
        float(exit_layers[deepest]),
        float(min(deepest + 1, last)),
        1.0 if deepest == last else 0.0,
        float(exit_layers[last] - exit_layers[deepest]),
        rows,
        rows,
        1.0,
    )
    return seconds


def prefill_seconds(c: Any, layers: int, num_rows: int, tokens: float, pairs: float) -> float:
    """Seconds of an iteration that reads whole prompts; written for both engines."""
    seconds, _ = cost.mixed_seconds(
        c,
        0.0,
        0.0,
        0.0,
        tokens,
        0.0,
        pairs,
        float(layers),
        0.0,
        float(num_rows),
        float(num_rows),
        1.0,
    )
    return seconds


_decode_seconds: Any = compiled(decode_seconds)
_prefill_seconds: Any = compiled(prefill_seconds)


def _serve_all(
    arrival_s: Any,
    prompt_tokens: Any,
    output_tokens: Any,
    place: Any,
    leaving_level: Any,
    exit_layers: Any,
    c: Any,
    max_batch: int,
    max_prefill_tokens: int,
    rows: Any,
    finished_s: Any,
) -> None:
    """Serve until nothing is left; `rows` holds the running requests, in no order."""
    num_requests = len(arrival_s)
    num_positions = len(leaving_level)
    depth = exit_layers[len(exit_layers) - 1]
    now_s = 0.0
    num_rows = 0
    context = 0.0
    head = 0
    while head < num_requests or num_rows > 0:
        if num_rows == 0 and arrival_s[head] > now_s:
            now_s = arrival_s[head]
        before = num_rows
        tokens = 0.0
        pairs = 0.0
        while head < num_requests and num_rows < max_batch and arrival_s[head] <= now_s:
            n = float(prompt_tokens[head])
            if num_rows > before and tokens + n > max_prefill_tokens:
                break
            tokens += n
            pairs += n * (n + 1.0) / 2.0
            rows[num_rows, REQUEST] = head
            rows[num_rows, PLACE] = place[head]
            rows[num_rows, REMAINING] = output_tokens[head]
            num_rows += 1
            head += 1
        if num_rows > before:
            now_s += _prefill_seconds(c, depth, num_rows - before, tokens, pairs)
            context += tokens
            first = before
        else:
            deepest = 0
            for k in range(num_rows):
                level = leaving_level[rows[k, PLACE]]
                if level > deepest:
                    deepest = level
            context += num_rows
            now_s += _decode_seconds(c, exit_layers, deepest, num_rows, context)
            first = 0
        k = first
        while k < num_rows:
            rows[k, REMAINING] -= 1
            if rows[k, REMAINING] > 0:
                rows[k, PLACE] += 1
                if rows[k, PLACE] == num_positions:
                    rows[k, PLACE] = 0
                k += 1
                continue
            request = rows[k, REQUEST]
            finished_s[request] = now_s
            context -= prompt_tokens[request] + output_tokens[request] - 1
            num_rows -= 1
            for field in range(3):
                rows[k, field] = rows[num_rows, field]


_serve: Any = compiled(_serve_all)


def check_finished(work: FloorWork, finished_s: Sequence[float] | NDArray[np.float64]) -> None:
    """Refuse a result in which a request did not finish after it had arrived."""
    if not np.all(np.asarray(finished_s) > work.arrival_s):
        raise RuntimeError("A request of the reference engine did not finish after its arrival.")
