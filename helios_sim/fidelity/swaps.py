"""Where an error comes from: one ingredient at a time is taken from the real run, and simulated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from helios_sim.cards import candidate_card
from helios_sim.engine import Run, Setup
from helios_sim.errors import InputError
from helios_sim.exits import ExitTraces
from helios_sim.experiment import Experiment, prepare
from helios_sim.fidelity.figures import Value, relative_error, scaled
from helios_sim.fidelity.recordings import (
    EXITS_FILE,
    ITERATIONS_FILE,
    Iterations,
    read_exits,
    read_iterations,
)
from helios_sim.fidelity.replayed import replayed_run
from helios_sim.fidelity.sides import Side, Sides, hash_of, policy_of
from helios_sim.fidelity.timing import (
    Predicted,
    Statistic,
    factors,
    loads,
    paced,
    predict,
    reloaded,
    retimed,
)
from helios_sim.outcome import run_data
from helios_sim.policy.contract import Policy
from helios_sim.profile import Profile
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import RunData, conformed
from helios_sim.scenario import PolicySettings
from helios_sim.steward import Steward
from helios_sim.workload.requests import Requests, drawn_starts

INGREDIENTS: Final[dict[str, str]] = {
    "arrivals": "recorded arrivals",
    "exits": "recorded exits",
    "pace": "the machine's pace",
    "times": "recorded iteration times",
    "slow": "slow iterations",
    "loads": "recorded loading times",
    "decisions": "recorded decisions",
}
"""What can be taken from the real run, in words.

`pace` is how much longer known arithmetic took beside the run than beside the profile's readings;
all but loading times of the profile are stretched by it, whatever iterations took. `times` are the
median times of an iteration of its kind, `slow` is by how much the mean exceeds the median, `loads`
the time of loads for which serving waited.
"""
BY_CHANCE: Final = "; within chance"
"""Said after a cause where the real figure lies among those of other texts."""
NOTHING: Final = "nothing"
EVERYTHING: Final = "everything"

OTHER_TEXTS: Final = 8
"""Simulations on other text, which show what chance does."""

HEADLINES: Final = (
    "output_throughput",
    "mean_tpot_ms",
    "p50_e2el_ms",
    "p90_ttft_ms",
    "mean_batch_size",
    "total_gpu_energy",
    "mean_executed_layers",
    "breach_rate",
    "perplexity",
    "num_switches",
    "num_loads",
    "switch_time_s",
)
"""Figures whose errors are attributed."""

SMALL: Final = 0.005
"""A relative error within this share needs no cause."""
EFFECT: Final = 0.001
"""A swap that moves every error by less than this share changes nothing."""
EXPLAINS: Final = 0.3
"""A cause takes away at least this share of the error."""


@dataclass(frozen=True)
class Swap:
    """The simulation with one ingredient taken from the real run.

    `figures` holds the headline figures of that simulation; it is empty, and `missing` says why,
    where the real run did not record the ingredient.
    """

    name: str
    title: str
    figures: dict[str, Value]
    missing: str | None = None


@dataclass(frozen=True)
class Cause:
    """What explains the error of one figure best.

    Errors are relative. `ingredient` is None where the error is small or nothing takes away
    enough of it; `remainder` is the error with everything swapped at once. `by_chance` says that
    the real figure lies among what the simulation gives on the given text and others, at its pace,
    and that the error is not that pace's.
    """

    key: str
    error: float | None
    ingredient: str | None
    error_without: float | None
    remainder: float | None
    said: str
    by_chance: bool = False


@dataclass(frozen=True)
class Chance:
    """What the simulation gives where the same requests have other text of the profile's traces.

    `ends` are the least and the most of each headline figure, `middles` the median, on `num_texts`
    texts and the given one; both at the pace of the real run, where that is known. `foreseen` are
    the medians without it, as anybody could have predicted them before the run. A policy that
    decides on few tokens may decide differently on each.
    """

    num_texts: int
    ends: dict[str, tuple[float, float]]
    middles: dict[str, float] = field(default_factory=dict)
    foreseen: dict[str, float] = field(default_factory=dict)

    def spans(self, key: str, value: float) -> bool:
        """Whether a real figure lies within what texts give, where they make a difference."""
        least, most = self.ends.get(key, (math.nan, math.nan))
        return least <= value <= most and most - least > SMALL * abs(value)


@dataclass(frozen=True)
class Attribution:
    """Errors against one real run, with nothing, each ingredient and everything swapped."""

    repeat: str
    real: dict[str, Value]
    swaps: tuple[Swap, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]
    chance: Chance = Chance(0, {})

    @property
    def telling(self) -> tuple[Swap, ...]:
        """Nothing, everything, and the ingredients that change some headline figure."""
        first, last = self.swaps[0], self.swaps[-1]
        found = [first]
        for swap in self.swaps[1:-1]:
            moved = [
                abs(ours - before)
                for key in swap.figures
                if (ours := self.error(swap, key)) is not None
                and (before := self.error(first, key)) is not None
            ]
            if any(one > EFFECT for one in moved):
                found.append(swap)
        return (*found, last)

    @property
    def without_effect(self) -> tuple[Swap, ...]:
        """Ingredients that were recorded and change nothing."""
        return tuple(
            swap for swap in self.swaps if swap.missing is None and swap not in self.telling
        )

    def error(self, swap: Swap, key: str) -> float | None:
        """The relative error of a figure under a swap."""
        return self._error_of(swap.figures.get(key), key)

    def chance_errors(self, key: str) -> tuple[float | None, float | None]:
        """The least and the most relative error of a figure on all texts, at the pace if known."""
        least, most = self.chance.ends.get(key, (None, None))
        return self._error_of(least, key), self._error_of(most, key)

    def middle_error(self, key: str) -> float | None:
        """The relative error of a figure's median over all texts, at the pace if known."""
        return self._error_of(self.chance.middles.get(key), key)

    def _error_of(self, ours: Value, key: str) -> float | None:
        theirs = self.real.get(key)
        if not isinstance(ours, float) or not isinstance(theirs, float):
            return None
        return relative_error(ours, theirs)


@dataclass(frozen=True)
class Ingredients:
    """What a real run recorded; None where it did not."""

    arrival_s: Any
    exits: ExitTraces | None
    trace_start: Any
    iterations: Iterations | None
    predicted: Predicted | None
    load_factor: float | None
    pace_factor: float | None


def experiment_of(sides: Sides, base_dir: Path) -> Experiment:
    """The simulated run's scenario with the profile it was simulated with."""
    where = str(sides.simulated.path / "scenario.toml")
    experiment = prepare(sides.scenario, base_dir, where)
    used = hash_of(sides.simulated.run)
    found = experiment.setup.profile.hash
    if used and found != used:
        raise InputError(
            f"The profile {sides.scenario.fleet.profile!r} found here has the hash {found[:12]} "
            f"and the run was simulated with {used[:12]}; simulate anew, or name the folder of "
            "the right one with --files.",
            where,
        )
    return experiment


def ingredients_of(side: Side, setup: Setup) -> Ingredients:
    """All that a real run recorded."""
    requests = side.run.requests.sort("request_id")
    iterations = read_iterations(side.path, side.run)
    return Ingredients(
        arrival_s=requests["arrival_s"].to_numpy(),
        exits=read_exits(side.path, setup.profile, setup.candidates),
        trace_start=requests["trace_start"].to_numpy(),
        iterations=iterations,
        predicted=None
        if iterations is None
        else predict(iterations, setup.profile, setup.serving.max_batch),
        load_factor=loads(side.run, setup.profile),
        pace_factor=_pace_factor(side, setup.profile),
    )


def _pace_factor(side: Side, profile: Profile) -> float | None:
    """How much longer known arithmetic took beside a run than beside a profile's readings.

    The profile is the simulated one, which need not be the one that the run was served with.
    """
    return None if side.core_during_s is None else profile.pace_factor(side.core_during_s)


def attribute(
    sides: Sides, experiment: Experiment, report: Callable[[str, float], None] | None = None
) -> Attribution:
    """Simulate with nothing, each ingredient and everything taken from the typical real run."""
    side = sides.typical
    found = ingredients_of(side, experiment.setup)
    ours = sides.simulated.run
    scene = _Scene(experiment, policy_of(ours, sides.scenario), ours.seed, side.run, found)
    swaps: list[Swap] = []
    present: list[str] = []
    steps = (NOTHING, *INGREDIENTS, EVERYTHING)
    num_steps = len(steps) + OTHER_TEXTS
    for place, name in enumerate(steps):
        if report is not None:
            report("attribution", place / num_steps)
        why_not = _missing(name, found)
        title = INGREDIENTS.get(name, f"{name} swapped")
        if why_not is not None:
            swaps.append(Swap(name, title, {}, why_not))
            continue
        taken = {EVERYTHING: tuple(present), NOTHING: ()}.get(name, (name,))
        if name in INGREDIENTS:
            present.append(name)
        figures = scene.play(frozenset(taken))
        swaps.append(Swap(name, title, {key: scaled(key, figures.get(key)) for key in HEADLINES}))
    told = {one.name: one.figures for one in swaps}
    paces: dict[str, frozenset[str]] = {NOTHING: frozenset()}
    if "pace" in present:
        paces["pace"] = frozenset({"pace"})
    on_texts = {name: [told[name]] for name in paces}
    for text in range(1, OTHER_TEXTS + 1):
        if report is not None:
            report("attribution", (len(steps) + text - 1) / num_steps)
        for name, swapped in paces.items():
            figures = scene.play(swapped, text)
            on_texts[name].append({key: scaled(key, figures.get(key)) for key in HEADLINES})
    chance = _chance(on_texts.get("pace", on_texts[NOTHING]), _middles(on_texts[NOTHING]))
    real = {key: scaled(key, side.summary.get(key)) for key in HEADLINES}
    attribution = Attribution(side.path.name, real, tuple(swaps), (), (), chance)
    return replace(
        attribution,
        causes=tuple(_causes(attribution)),
        notes=tuple(_notes(attribution, sides)),
    )


def _chance(texts: Sequence[Mapping[str, Value]], foreseen: dict[str, float]) -> Chance:
    """The ends and the middle of each figure that the simulation has on every text."""
    found = _on_every(texts)
    ends = {key: (min(values), max(values)) for key, values in found.items()}
    return Chance(len(texts) - 1, ends, _middles(texts), foreseen)


def _middles(texts: Sequence[Mapping[str, Value]]) -> dict[str, float]:
    """The median over texts of each figure that all of them have."""
    return {key: statistics.median(values) for key, values in _on_every(texts).items()}


def _on_every(texts: Sequence[Mapping[str, Value]]) -> dict[str, list[float]]:
    """The values of each headline figure that every text has."""
    found = {
        key: [value for figures in texts if isinstance(value := figures.get(key), float)]
        for key in HEADLINES
    }
    return {key: values for key, values in found.items() if len(values) == len(texts)}


def _missing(name: str, found: Ingredients) -> str | None:
    if name == "exits" and found.exits is None:
        return f"not recorded: the real run has no {EXITS_FILE}"
    if name == "pace" and found.pace_factor is None:
        return "not recorded: nobody looked at the pace during the run, or beside the readings"
    if name in ("times", "slow") and found.iterations is None:
        return f"not recorded: the real run has no {ITERATIONS_FILE}, or an empty one"
    if name == "loads" and found.load_factor is None:
        return "not recorded: serving waited for no load in the real run"
    return None


@dataclass(frozen=True)
class _Scene:
    """A scenario that is played again with ingredients of a real run."""

    experiment: Experiment
    policy: PolicySettings
    seed: int
    real: RunData
    found: Ingredients

    def play(self, taken: frozenset[str], text: int = 0) -> dict[str, Any]:
        """The figures with these ingredients, on the given text of the traces or on another."""
        scenario, found = self.experiment.scenario, self.found
        setup = replace(self.experiment.setup, seed=self.seed)
        requests, _ = self.experiment.requests(self.seed)
        if text > 0:
            requests = replace(requests, trace_start=drawn_starts(self.seed + text, len(requests)))
        if "exits" in taken:
            assert found.exits is not None
            setup = replace(setup, traces=found.exits)
            start = np.asarray(found.trace_start % found.exits.num_positions, np.int32)
            requests = replace(requests, trace_start=start)
        if "arrivals" in taken:
            requests = _sent_at(requests, found.arrival_s)
        original = setup
        if taken & {"times", "slow"}:
            setup = replace(setup, profile=self._retimed(setup.profile, taken))
        elif "pace" in taken and found.pace_factor is not None:
            setup = replace(setup, profile=paced(setup.profile, found.pace_factor))
        if "loads" in taken and found.load_factor is not None:
            setup = replace(setup, profile=reloaded(setup.profile, found.load_factor))

        def make() -> Policy:
            return self.experiment.policy(self.policy)

        def build(maker: Callable[[], Policy]) -> Run:
            run = Run(setup, requests, maker)
            _tell(run, original)
            return run

        run = replayed_run(build, make, self.real) if "decisions" in taken else build(make)
        run.play()
        data = conformed(run_data(run, self.policy.name, self.policy.use, self.seed, {}))
        measure = scenario.measure
        return summarise(data, scenario.slo_spec, measure.warmup_s, measure.warmup_requests)

    def _retimed(self, profile: Profile, taken: frozenset[str]) -> Profile:
        iterations, predicted = self.found.iterations, self.found.predicted
        assert iterations is not None and predicted is not None
        statistic: Statistic = "typical" if "times" in taken else "slow"
        if taken >= {"times", "slow"}:
            statistic = "mean"
        return retimed(profile, factors(iterations, predicted, statistic))


def _tell(run: Run, setup: Setup) -> None:
    """Let the policy know what it knew on the real side: the profile as it is, not as recorded."""
    if run.setup.profile is setup.profile:
        return
    known = tuple(candidate_card(setup, name) for name in setup.candidates)
    run.candidates = known
    for replica in run.replicas:
        replica.steward = Steward(setup, replica.policy, known, setup.slo)


def _sent_at(requests: Requests, arrival_s: Any) -> Requests:
    """The requests sent when they were in fact sent, in that order.

    Users of a closed loop take rows in order, and then think for different times.
    """
    order = np.argsort(arrival_s, kind="stable")
    return replace(
        requests,
        arrival_s=arrival_s[order],
        prompt_tokens=requests.prompt_tokens[order],
        output_tokens=requests.output_tokens[order],
        domain=requests.domain[order],
        trace_start=requests.trace_start[order],
        num_users=None,
    )


def _causes(attribution: Attribution) -> list[Cause]:
    """For each headline figure that both sides have, what explains its error."""
    nothing, everything = attribution.swaps[0], attribution.swaps[-1]
    swaps = [one for one in attribution.swaps[1:-1] if one.missing is None]
    causes = []
    for key in HEADLINES:
        error = attribution.error(nothing, key)
        if error is None:
            continue
        remainder = attribution.error(everything, key)
        left = {one.name: attribution.error(one, key) for one in swaps}
        known = {name: one for name, one in left.items() if one is not None}
        theirs = attribution.real[key]
        by_chance = (
            isinstance(theirs, float)
            and attribution.chance.spans(key, theirs)
            and not _takes_away(known.get("pace"), error)
        )
        best = min(known, key=lambda name: abs(known[name]), default=None)
        if abs(error) <= SMALL:
            causes.append(Cause(key, error, None, None, remainder, "no error to speak of"))
            continue
        if best is None or not _takes_away(known[best], error):
            cause = Cause(key, error, None, None, remainder, _unexplained(error, remainder))
        else:
            said = f"mostly {INGREDIENTS[best]}"
            cause = Cause(key, error, best, known[best], remainder, said)
        if by_chance:
            cause = replace(cause, said=f"{cause.said}{BY_CHANCE}", by_chance=True)
        causes.append(cause)
    return causes


def _takes_away(left: float | None, error: float) -> bool:
    """Whether what is left of an error is so much less that it was explained."""
    return left is not None and abs(error) - abs(left) >= EXPLAINS * abs(error)


def _unexplained(error: float, remainder: float | None) -> str:
    """What is said of an error that no single ingredient takes away."""
    if _takes_away(remainder, error):
        return "several ingredients together"
    return "no ingredient: physics that the model does not have, or noise"


def _notes(attribution: Attribution, sides: Sides) -> Sequence[str]:
    """Whether the simulation that nothing was swapped in is the one that was given."""
    again, given = attribution.swaps[0].figures, sides.simulated.summary
    off = []
    for key, value in again.items():
        before = scaled(key, given.get(key))
        same = (
            math.isclose(value, before, rel_tol=1e-9)
            if isinstance(value, float) and isinstance(before, float)
            else value == before
        )
        if not same:
            off.append(key)
    if not off:
        return ()
    return (
        f"Simulated again with nothing swapped, {', '.join(off)} differ from the given run: it was "
        "made by another version or profile.",
    )
