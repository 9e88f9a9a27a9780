"""What to measure within a time budget: a grid of trials, coarser where time is short.

Pure planning: it knows estimates, not devices. A trial is one `Job`; the trials of a round cover
the whole grid once, in random order, so that a run cut short still has a grid, and drift of the
device falls on all points alike.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from calibration.measuring.readings import LEAST_DECODE_WINDOWS, Key, Purpose, Reading

SAMPLES: Final = 3
"""Samples of one trial; its reading is their median."""

WARMUPS: Final = 2

LEAST_CONTEXT: Final = 2
"""Tokens that a decode reads at the least: one that is held and its new one."""

REACH: Final = 4
"""Tokens by which the contexts of a load that is served begin below their mean and end above it."""

ENERGY_SHARE: Final = 0.45
"""Of the budget, where there is a meter: windows of seconds are what takes long."""

LOADING_SHARE: Final = 0.12
USED_SHARE: Final = 0.9
"""Of the budget that is planned for; estimates err."""

LARGEST_JOB_SHARE: Final = 0.04
"""Of the budget that one trial may take; a point that takes longer is left out."""

SMALL_JOB_S: Final = 2.0
"""A trial is never too long that takes no longer than this."""


@dataclass(frozen=True)
class Job:
    """One trial: which quantity, of which model, at which load.

    `depths` are stacks of layers timed in turns, one reading each: a stack that runs over and over
    is what a model loaded to that depth runs. `context_tokens` is the mean per row; where
    `longest_tokens` differs the rows are ragged. `prompt_tokens` are the new tokens of each row of
    a prefill.
    """

    quantity: str
    model: str = ""
    mode: str = ""
    depths: tuple[int, ...] = ()
    batch: int | None = None
    context_tokens: int | None = None
    longest_tokens: int | None = None
    prompt_tokens: int | None = None
    trial: int = 0
    purpose: Purpose = "fit"

    def reading(self, layers: int | None, **found: Any) -> Reading:
        """A reading of this trial."""
        values: dict[str, Any] = {
            "quantity": self.quantity,
            "model": self.model,
            "mode": self.mode,
            "layers": layers,
            "batch": self.batch,
            "context_tokens": self.context_tokens,
            "longest_context_tokens": self.longest_tokens,
            "prompt_tokens": self.prompt_tokens,
            "trial": self.trial,
            "purpose": self.purpose,
        }
        return Reading(**(values | found))

    @property
    def keys(self) -> tuple[Key, ...]:
        """Keys of its readings."""
        return tuple(self.reading(layers).key for layers in self.depths or (None,))

    def as_dict(self) -> dict[str, Any]:
        """A JSON object that `job_from` reads back."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "", ())}


def job_from(found: Mapping[str, Any]) -> Job:
    """A job from `Job.as_dict`; raises TypeError for unknown names."""
    return Job(**{**found, "depths": tuple(found.get("depths", ()))})


@dataclass(frozen=True)
class Probe:
    """Rough seconds of one pass at full depth, from a few looks before planning.

    decode: base + per row + per context token; prefill: base + per token.
    """

    decode_s: float
    decode_s_per_row: float
    decode_s_per_context_token: float
    prefill_s: float
    prefill_s_per_token: float
    head_s: float
    head_s_per_row: float
    samples_per_quiet_one: float = 1.0
    """Samples to take for one that nothing disturbs."""

    host_s: float = 0.0
    host_s_per_row: float = 0.0
    """What an iteration takes beside its layers and its head."""

    def pass_s(self, job: Job, share: float) -> float:
        """Seconds of one repetition of a job with this share of the layers."""
        batch = job.batch or 1
        asked_s = self.head_s + batch * self.head_s_per_row
        if job.quantity in ("head", "check", "head_energy"):
            return asked_s
        beside_s = 0.0
        if job.quantity in ("iteration", "exit_iteration"):
            beside_s = asked_s + self.host_s + batch * self.host_s_per_row
        elif job.quantity == "split_iteration":
            share, beside_s = 1.0, 2.0 * (asked_s + self.host_s + batch * self.host_s_per_row)
        if job.prompt_tokens:
            layers_s = self.prefill_s + batch * job.prompt_tokens * self.prefill_s_per_token
        else:
            context = job.longest_tokens or job.context_tokens or 0
            layers_s = (
                self.decode_s
                + batch * self.decode_s_per_row
                + batch * context * self.decode_s_per_context_token
            )
        return share * layers_s + beside_s


@dataclass(frozen=True)
class Bounds:
    """What one model allows: its depths (exit layers, the last the loaded one) and its pool.

    `pool_tokens` are the KV tokens of the pool over all rows; `modes` in which decoding runs.
    `max_prefill_tokens` bounds the tokens of one prefill. `is_whole` says that no layer is missing
    beyond the last depth, `can_split` that some of the rows can go on by themselves in each mode.
    """

    model: str
    depths: tuple[int, ...]
    max_batch: int
    max_context: int
    pool_tokens: int
    max_prefill_tokens: int
    modes: tuple[str, ...] = ("eager",)
    is_whole: bool = True
    can_split: bool = True

    @property
    def depth(self) -> int:
        """Loaded layers."""
        return self.depths[-1]

    def served(self, context: int) -> int:
        """The mean context nearest to this one that a load can be served at, and grow beyond."""
        return max(LEAST_CONTEXT, min(context, self.max_context - REACH))


@dataclass(frozen=True)
class Richness:
    """How fine a grid is: values along each axis and trials.

    `held_out` decodes lie off the grid, and half as many prefills.
    """

    batches: int
    contexts: int
    prompts: int
    held_out: int
    trials: int


RICHNESS: Final = (
    Richness(8, 6, 7, 16, 5),
    Richness(8, 5, 6, 16, 4),
    Richness(7, 5, 6, 14, 3),
    Richness(6, 4, 5, 12, 3),
    Richness(5, 4, 5, 12, 3),
    Richness(5, 3, 4, 12, 3),
    Richness(4, 3, 4, 12, 3),
    Richness(4, 3, 4, 12, 2),
    Richness(3, 2, 3, 12, 2),
    Richness(3, 2, 3, 12, 1),
    Richness(3, 2, 2, 12, 1),
)
"""From the finest grid to the coarsest that can still be fitted: what a row adds to an iteration
shows in three batches."""


@dataclass(frozen=True)
class Plan:
    """Trials of one model in their order, the seconds they may take, and what was left out."""

    jobs: tuple[Job, ...]
    seconds: float
    notes: tuple[str, ...] = ()


def plan_latency(
    bounds: Bounds,
    estimate_s: Callable[[Job], float],
    allowed_s: float,
    budget_s: float,
    seed: int,
) -> Plan:
    """The richest grid of latency trials whose estimate fits, the coarsest if none does.

    Samples taken again are not in the estimates: allow as much less as they take.
    """
    longest_s = max(SMALL_JOB_S, LARGEST_JOB_SHARE * budget_s)
    for richness in RICHNESS:
        jobs, notes = [], []
        for job in _latency_jobs(bounds, richness, seed):
            if estimate_s(job) <= longest_s or _smallest(job):
                jobs.append(job)
            elif job.trial == 0:
                notes.append(_left_out(job))
        seconds = sum(map(estimate_s, jobs))
        if seconds <= allowed_s or richness is RICHNESS[-1]:
            return Plan(shuffled_rounds(jobs, seed), seconds, tuple(notes))
    raise AssertionError("unreachable")


def plan_energy(bounds: Bounds, window_s: float, allowed_s: float, seed: int) -> Plan:
    """Energy windows of one model: the base set as often as the time allows, three times at most.

    A budget too short for the base set gets its first windows; none where those that a fit needs
    find no room.
    """
    base = list(_energy_jobs(bounds))
    number = int(allowed_s // window_s)
    if number < LEAST_DECODE_WINDOWS:
        return Plan((), 0.0, (f"{bounds.model}: no time for energy windows of {window_s:.1f} s",))
    jobs = [
        replace(job, trial=trial)
        for trial in range(max(1, min(3, number // len(base))))
        for job in base
    ][:number]
    return Plan(shuffled_rounds(jobs, seed), len(jobs) * window_s)


def in_turn(energy: Sequence[Job], latency: Sequence[Job], seed: int) -> tuple[Job, ...]:
    """All trials round by round, the energy windows of the first round before all others.

    A fit of seconds bears that a few loads are missing where time runs out, though not all of one
    quantity; one of joules needs most of its few windows. Decodes that are timed eagerly beside
    graphs come last, since neither a fit nor its check needs them.
    """
    first = [job for job in energy if job.trial == 0 and job.purpose == "fit"]
    others = [job for job in energy if job not in first]
    rounds = shuffled_rounds((*others, *latency), seed)
    return (*shuffled_rounds(first, seed), *_each_quantity_early(rounds))


def _each_quantity_early(jobs: Sequence[Job]) -> list[Job]:
    """Let the first round begin with one job of each quantity, go on with another of each, ..."""
    seen: Counter[str] = Counter()
    places = []
    replayed = any(job.mode == "graph" for job in jobs)
    for job in jobs:
        if replayed and job.mode == "eager" and not job.prompt_tokens:
            places.append(len(jobs) + 1)
            continue
        later = job.trial > 0 or job.purpose != "fit"
        places.append(len(jobs) if later else seen[job.quantity])
        seen[job.quantity] += not later
    return [job for _, job in sorted(zip(places, jobs, strict=True), key=lambda pair: pair[0])]


def shuffled_rounds(jobs: Iterable[Job], seed: int) -> tuple[Job, ...]:
    """Jobs by trial, each round in a random order of its own."""
    rounds: dict[int, list[Job]] = {}
    for job in jobs:
        rounds.setdefault(job.trial, []).append(job)
    ordered: list[Job] = []
    for trial in sorted(rounds):
        random.Random(f"{seed}-{trial}").shuffle(rounds[trial])
        ordered += rounds[trial]
    return tuple(ordered)


def timing_s(pass_s: Iterable[float], sample_s: Callable[[float], float]) -> float:
    """Estimated seconds to time passes of these lengths in turns while nobody disturbs.

    `sample_s` is what a sample of passes of some length takes; warm-up is included.
    """
    # Two samples more go into finding the repetitions.
    return sum((SAMPLES + 2) * sample_s(seconds) + WARMUPS * seconds for seconds in pass_s)


def geometric(low: int, high: int, count: int) -> tuple[int, ...]:
    """Up to `count` whole numbers from low to high, evenly spaced by ratio, both ends included."""
    if high <= low or count < 2:
        return (high,)
    ratio = (high / low) ** (1 / (count - 1))
    return tuple(sorted({round(low * ratio**place) for place in range(count)}))


def powers_of_two(high: int, count: int) -> tuple[int, ...]:
    """Up to `count` batch sizes from 1 to `high`: powers of two spread evenly, and `high`."""
    powers = [1 << place for place in range(high.bit_length()) if 1 << place < high] + [high]
    if len(powers) <= count:
        return tuple(powers)
    places = {round(place * (len(powers) - 1) / (count - 1)) for place in range(count)}
    return tuple(powers[place] for place in sorted(places))


def ragged_lengths(batch: int, mean: int, longest: int, seed: int) -> list[int]:
    """Lengths of `batch` rows with exactly this mean and maximum, in random order.

    Rows come in pairs around the mean; an odd one out has the mean. Needs mean <= longest and
    longest < 2 mean; a single row, or longest == mean, gives equal rows.
    """
    if batch < 2 or longest <= mean:
        return [mean] * batch
    if longest >= 2 * mean:
        raise ValueError(f"Rows of mean {mean} cannot be ragged up to {longest}.")
    draw = random.Random(seed)
    lengths = [mean] * (batch % 2)
    for pair in range(batch // 2):
        apart = longest - mean if pair == 0 else draw.randint(0, longest - mean)
        lengths += [mean - apart, mean + apart]
    draw.shuffle(lengths)
    return lengths


def _latency_jobs(bounds: Bounds, richness: Richness, seed: int) -> Iterator[Job]:
    """All latency trials of a grid.

    Where decodes are replayed from graphs, they are served so: eager ones are timed once and last,
    on the coarsest grid.
    """
    *others, served = bounds.modes
    for mode in others:
        for job in _decodes(bounds, RICHNESS[-1], ragged=False):
            yield replace(job, mode=mode, trial=richness.trials - 1)
    for trial in range(richness.trials):
        for job in _one_trial(bounds, richness, seed):
            # What is not replayed from a graph costs the same whatever the layers run as.
            mode = bounds.modes[0] if job.prompt_tokens else served
            yield replace(job, mode=mode, trial=trial)


def _one_trial(bounds: Bounds, richness: Richness, seed: int) -> Iterator[Job]:
    name, depths = bounds.model, bounds.depths
    batches, middle = _batches(bounds, richness), _middle(_contexts(bounds, richness))
    yield from _decodes(bounds, richness, ragged=True)
    yield from _held_out(bounds, richness, seed)
    for batch in batches:
        for quantity in ("head", "check"):
            yield Job(quantity, name, batch=batch)
        if len(depths) > 1:
            yield Job("kv_fill", name, depths=_filled(depths), batch=batch)
        if batch * middle <= bounds.pool_tokens:
            yield from _leaving(bounds, batch, middle, splits=False)
    for batch in _splitting_batches(batches):
        if batch * middle <= bounds.pool_tokens:
            yield from _splits(bounds, batch, middle)
    yield from _held_out_leaving(bounds, richness, seed)
    yield from _prefills(bounds, richness)
    yield from _held_out_prefills(bounds, richness, seed)


def _batches(bounds: Bounds, richness: Richness) -> tuple[int, ...]:
    return powers_of_two(bounds.max_batch, richness.batches)


def _contexts(bounds: Bounds, richness: Richness) -> tuple[int, ...]:
    return geometric(min(32, bounds.max_context), bounds.max_context, richness.contexts)


def _decodes(bounds: Bounds, richness: Richness, *, ragged: bool) -> Iterator[Job]:
    """Stacks of layers over rows and contexts, and whole iterations at a middle context."""
    contexts = _contexts(bounds, richness)
    middle = _middle(contexts)
    for batch in _batches(bounds, richness):
        for context, longest in _decode_loads(batch, contexts, middle, bounds):
            if ragged or context == longest:
                yield _decode("decode_layers", bounds, batch, context, longest)
        for longest in sorted({middle, _ragged_longest(middle, batch, bounds)}):
            if batch * longest <= bounds.pool_tokens and (ragged or longest == middle):
                yield _decode("iteration", bounds, batch, middle, longest)


def _leaving(bounds: Bounds, batch: int, context: int, *, splits: bool = True) -> Iterator[Job]:
    """Decodes whose rows leave at each exit, all at once and half of them.

    Only of models that are loaded whole: readings name the exit, and not what is loaded.
    """
    if len(bounds.depths) < 2 or not bounds.is_whole:
        return
    yield _decode("exit_iteration", bounds, batch, context, context)
    if splits:
        yield from _splits(bounds, batch, context)


def _splits(bounds: Bounds, batch: int, context: int) -> Iterator[Job]:
    """Decodes half of whose rows leave at each exit but the last."""
    if len(bounds.depths) < 2 or not bounds.is_whole or not bounds.can_split or batch < 2:
        return
    split = _decode("split_iteration", bounds, batch, context, context)
    yield replace(split, depths=bounds.depths[:-1])


def _splitting_batches(batches: Sequence[int]) -> tuple[int, ...]:
    """Batches that can be split, three where there are as many: they tell what a row adds."""
    found = {batch for batch in batches if batch > 1}
    for more in (2, 3, 4):
        if len(found) < 3 and more <= max(batches):
            found.add(more)
    return tuple(sorted(found))


def _decode_loads(
    batch: int, contexts: Sequence[int], middle: int, bounds: Bounds
) -> list[tuple[int, int]]:
    """Mean and longest contexts: the grid's, and a middle and a long one that is ragged too."""
    loads = [(context, context) for context in (*contexts, middle)]
    if batch > 1:
        long = (bounds.max_context + 1) // 2
        loads.append((long, long))
        loads += [(mean, _ragged_longest(mean, batch, bounds)) for mean in (middle, long)]
    return [load for load in dict.fromkeys(loads) if batch * load[1] <= bounds.pool_tokens]


def _prefills(bounds: Bounds, richness: Richness) -> Iterator[Job]:
    """Prompts of several lengths, several prompts at once, and prompts behind cached tokens."""
    prompts = geometric(
        min(16, bounds.max_context),
        min(bounds.max_context, bounds.max_prefill_tokens),
        richness.prompts,
    )
    short, middle = prompts[0], _middle(prompts)
    loads = [("prefill_layers", 1, prompt) for prompt in prompts]
    loads += [("iteration", 1, prompt) for prompt in (short, *prompts[len(prompts) // 2 :: 2])]
    # Short prompts show best what each of them costs beside its tokens.
    for rows in (2, 4, 8):
        loads += [(quantity, rows, short) for quantity in ("prefill_layers", "iteration")]
    loads += [("prefill_layers", 4, middle), ("prefill_layers", 16, middle)]
    loads += [("iteration", 4, middle)]
    # As many tokens as a prefill takes: where a GPU is bound by computing at last.
    for prompt in prompts[-3:]:
        many = max(1, min(16, bounds.max_batch, bounds.max_prefill_tokens // prompt))
        loads += [(quantity, many, prompt) for quantity in ("prefill_layers", "iteration")]
    for quantity, rows, prompt in dict.fromkeys(loads):
        if rows <= bounds.max_batch and rows * prompt <= bounds.max_prefill_tokens:
            yield _prefill(quantity, bounds, rows, prompt, 0)
    if bounds.max_context - middle >= 32:
        for cached in geometric(32, bounds.max_context - middle, 2):
            yield _prefill("prefill_layers", bounds, 1, middle, cached)


def _held_out(bounds: Bounds, richness: Richness, seed: int) -> Iterator[Job]:
    """Loads drawn between the grid's points, at a random one of the depths."""
    draw = random.Random(f"{seed}-{bounds.model}-held-out")
    for number in range(richness.held_out):
        quantity = "iteration" if number % 4 == 3 else "decode_layers"
        batch = _between(draw, 1, bounds.max_batch)
        context = _between(draw, 32, bounds.max_context)
        if quantity == "iteration":
            context = bounds.served(context)
        batch = max(1, min(batch, bounds.pool_tokens // context))
        longest = _ragged_longest(context, batch, bounds) if number % 2 else context
        if batch * longest > bounds.pool_tokens:
            longest = context
        yield Job(
            quantity,
            bounds.model,
            depths=(draw.choice(bounds.depths),),
            batch=batch,
            context_tokens=context,
            longest_tokens=longest,
            purpose="held-out",
        )


def _held_out_leaving(bounds: Bounds, richness: Richness, seed: int) -> Iterator[Job]:
    """Rows that leave at one exit each time, at loads drawn between the grid's points."""
    draw = random.Random(f"{seed}-{bounds.model}-held-out-leaving")
    for _ in range(richness.held_out // 3):
        batch = _between(draw, 1, bounds.max_batch)
        context = bounds.served(_between(draw, 32, bounds.max_context))
        batch = max(1, min(batch, bounds.pool_tokens // context))
        for job in _leaving(bounds, batch, context):
            yield replace(job, depths=(draw.choice(job.depths),), purpose="held-out")


def _held_out_prefills(bounds: Bounds, richness: Richness, seed: int) -> Iterator[Job]:
    """Prompts of lengths drawn between the grid's, a third of the times several at once."""
    draw = random.Random(f"{seed}-{bounds.model}-held-out-prefill")
    for number in range(richness.held_out // 2):
        prompt = _between(draw, 16, min(bounds.max_context, bounds.max_prefill_tokens))
        most = min(8, bounds.max_batch, bounds.max_prefill_tokens // prompt)
        rows = _between(draw, 1, most) if number % 3 == 2 else 1
        quantity = "iteration" if number % 2 else "prefill_layers"
        job = _prefill(quantity, bounds, rows, prompt, 0)
        yield replace(job, depths=(draw.choice(bounds.depths),), purpose="held-out")


def _decode(quantity: str, bounds: Bounds, batch: int, context: int, longest: int) -> Job:
    if quantity != "decode_layers":
        context, longest = bounds.served(context), bounds.served(longest)
    return Job(
        quantity,
        bounds.model,
        depths=bounds.depths,
        batch=batch,
        context_tokens=context,
        longest_tokens=longest,
    )


def _prefill(quantity: str, bounds: Bounds, rows: int, prompt: int, cached: int) -> Job:
    shallow_and_deep = tuple(sorted({bounds.depths[0], bounds.depths[-1]}))
    return Job(
        quantity,
        bounds.model,
        depths=shallow_and_deep,
        batch=rows,
        context_tokens=cached,
        prompt_tokens=prompt,
    )


def _energy_jobs(bounds: Bounds) -> Iterator[Job]:
    """Windows that separate joules per second, layer, row, context token and prompt token.

    Most are of whole iterations, since those are served, and since a device that waits for its host
    in between tells power from work. The decodes without which no joule is fitted come first, then
    prompts; the head and stacks of layers follow, and last what no fit sees.
    """
    name, depths = bounds.model, bounds.depths
    mode = bounds.modes[-1]
    full, part = depths[-1:], depths[:1] if len(depths) == 1 else depths[len(depths) // 2 - 1 :][:1]
    long, most = bounds.max_context, bounds.max_batch
    short, middle = max(1, min(64, long // 4)), max(1, long // 4)
    wide = max(1, min(most, bounds.pool_tokens // long))
    # A power of two, to which graphs pad nothing.
    few = 1 << (max(1, most // 4).bit_length() - 1)
    prompt = min(long, bounds.max_prefill_tokens)
    eighth = max(1, prompt // 8)
    stack, whole = "decode_energy", "iteration_energy"

    def decode(quantity: str, depth: tuple[int, ...], batch: int, context: int) -> Job:
        if quantity == whole:
            context = bounds.served(context)
        return Job(
            quantity,
            name,
            mode,
            depth,
            batch=batch,
            context_tokens=context,
            longest_tokens=context,
        )

    def prefill(quantity: str, depth: tuple[int, ...], tokens: int) -> Job:
        return Job(quantity, name, "eager", depth, batch=1, context_tokens=0, prompt_tokens=tokens)

    decodes = [
        decode(whole, full, 1, short),
        decode(whole, full, most, short),
        decode(whole, full, wide, long),
        decode(whole, part, most, short),
        decode(whole, full, few, middle),
        decode(whole, part, 1, short),
        decode(stack, full, 1, short),
        decode(stack, full, most, short),
        decode(stack, full, wide, long),
    ]
    needed, more = _first(decodes, LEAST_DECODE_WINDOWS)
    prompts = [prefill(whole, full, eighth), prefill(whole, full, prompt)]
    head = Job("head_energy", name, mode, batch=most)
    others = [prefill("prefill_energy", full, prompt), prefill(whole, part, eighth)]
    ordered = dict.fromkeys((*needed, *prompts, *more[:2], head, *more[2:], *others))
    yield from ordered
    for job in (decode(whole, part, few, short), prefill(whole, part, max(1, prompt // 2))):
        if job not in ordered:
            yield replace(job, purpose="held-out")


def _first(jobs: Sequence[Job], count: int) -> tuple[list[Job], list[Job]]:
    """The first different ones, and the others."""
    different = list(dict.fromkeys(jobs))
    return different[:count], different[count:]


def _filled(depths: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of skipped layers: those from each earlier exit to the loaded depth."""
    return tuple(sorted({depths[-1] - depth for depth in depths[:-1]}))


def _middle(axis: Sequence[int]) -> int:
    """A value in the middle of an axis, of the axis itself if it has one between its ends."""
    inner = axis if len(axis) > 2 else geometric(axis[0], axis[-1], 3)
    return inner[(len(inner) - 1) // 2]


def _ragged_longest(mean: int, batch: int, bounds: Bounds) -> int:
    """The longest of ragged rows, so that it and the shortest can be served around their means."""
    if batch < 2:
        return mean
    return max(mean, min(bounds.max_context, 2 * mean - LEAST_CONTEXT) - REACH)


def _between(draw: random.Random, low: int, high: int) -> int:
    """A whole number from low to high, evenly by ratio."""
    low = min(low, high)
    drawn = low * math.exp(math.log(high / low) * draw.random())
    return min(high, max(low, round(drawn)))


def _smallest(job: Job) -> bool:
    """Whether it is the smallest load of its kind, without which nothing can be fitted."""
    return (job.batch or 1) == 1 and (job.prompt_tokens or job.context_tokens or 0) <= 32


def _left_out(job: Job) -> str:
    load = f"batch {job.batch}"
    if job.prompt_tokens:
        load += f", prompt {job.prompt_tokens}"
    if job.context_tokens:
        load += f", context {job.context_tokens}"
    return f"{job.model}: {job.quantity} at {load} would take too much of the budget"
