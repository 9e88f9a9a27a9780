"""What HELIOS is compared with: systems without it, its ablations, and references for its parts.

`never` shows what watching and reassessing are worth, `always` what choosing is, `clairvoyant` what
knowing the exits would be. None of them bounds speed: few layers are fast, and cost perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from helios_sim.errors import InputError, did_you_mean, listed
from helios_sim.policy.contract import (
    USUAL_REASSESS_REQUESTS,
    Candidate,
    Decision,
    Event,
    ExitMode,
    Keep,
    LoadLayers,
    Objective,
    Serve,
    Snapshot,
    Switch,
    Watching,
)
from helios_sim.policy.depth import (
    DepthRule,
    check_depth_options,
    fixed_level,
    greedy_level,
)
from helios_sim.policy.helios import Helios
from helios_sim.policy.objective import OBJECTIVES, describe, meets_slo, score
from helios_sim.policy.options import (
    about,
    as_exit_mode,
    check_choice,
    check_model_name,
    check_threshold,
    check_whole_number,
    refused,
)
from helios_sim.policy.shortlist import (
    deepest,
    fitting,
    ranked,
    shallowest,
    sharing_a_tokenizer,
)

DEFAULT_MODEL = "Model to serve; the one with the largest weights that fits where unset."
THRESHOLD = "Confidence at which a token leaves; the profile's own where unset."


def single_model(
    snapshot: Snapshot, name: str | None, level_of: Callable[[Candidate], int] = deepest
) -> Candidate:
    """The named candidate, or of those that fit at a level that with the most weights in all."""
    if name is None:
        return max(fitting(snapshot.candidates, level_of), key=lambda c: c.weight_bytes[-1])
    for candidate in snapshot.candidates:
        if candidate.name == name:
            return candidate
    names = [c.name for c in snapshot.candidates]
    raise InputError(
        f"Option 'model' was given {name!r}; it must be one of the candidates {listed(names)}."
        f"{did_you_mean(name, names)}"
    )


def only_at_start(snapshot: Snapshot, serve: Serve) -> Decision:
    """Serve at the start of a run and leave it at that."""
    if snapshot.event is Event.START:
        return serve
    return Keep("This policy decides once, at the start.")


@dataclass(frozen=True, kw_only=True)
class Vanilla:
    """One model at full depth, no exits."""

    model: str | None = field(default=None, metadata=about(DEFAULT_MODEL, "ours"))

    name = "vanilla"
    sees_future = False
    watching = Watching()
    confidence_threshold = None

    def __post_init__(self) -> None:
        check_model_name(self.model)

    def decide(self, snapshot: Snapshot) -> Decision:
        """Serve the model at full depth."""
        model = single_model(snapshot, self.model)
        reason = f"One model at its full depth of {model.num_layers} layers, without exits."
        return only_at_start(snapshot, Serve(model.name, model.num_layers, ExitMode.FULL, reason))


@dataclass(frozen=True, kw_only=True)
class EeSingle:
    """One early-exit model, all layers loaded, tokens leave where they are confident."""

    model: str | None = field(default=None, metadata=about(DEFAULT_MODEL, "ours"))
    exit_mode: ExitMode = field(
        default=ExitMode.WAIT,
        metadata=about("How a batch treats exits: solo, wait or rebatch.", "ours"),
    )
    confidence_threshold: float | None = field(default=None, metadata=about(THRESHOLD, "open"))

    name = "ee-single"
    sees_future = False
    watching = Watching()

    def __post_init__(self) -> None:
        check_model_name(self.model)
        allowed = (ExitMode.SOLO, ExitMode.WAIT, ExitMode.REBATCH)
        mode = as_exit_mode("exit_mode", self.exit_mode, allowed)
        object.__setattr__(self, "exit_mode", mode)
        check_threshold(self.confidence_threshold)

    def decide(self, snapshot: Snapshot) -> Decision:
        """Serve the model with all layers and exits."""
        model = single_model(snapshot, self.model)
        reason = f"One model with all layers loaded and its exits in mode {self.exit_mode}."
        return only_at_start(snapshot, Serve(model.name, model.num_layers, self.exit_mode, reason))


@dataclass(frozen=True, kw_only=True)
class StaticDepth:
    """One model loaded to one depth for the whole run; every token leaves there."""

    model: str | None = field(default=None, metadata=about(DEFAULT_MODEL, "ours"))
    depth: int | None = field(
        default=None,
        metadata=about(
            "Layers to load, an exit of the model; its shallowest exit where unset.", "ours"
        ),
    )
    confidence_threshold: float | None = field(
        default=None,
        metadata=about(
            "Confidence below which a token counts as a breach; the profile's own.", "open"
        ),
    )

    name = "static-depth"
    sees_future = False
    watching = Watching()

    def __post_init__(self) -> None:
        check_model_name(self.model)
        check_whole_number("depth", self.depth, 1, unset_means="the shallowest exit")
        check_threshold(self.confidence_threshold)

    def decide(self, snapshot: Snapshot) -> Decision:
        """Serve the model at the depth."""
        model = single_model(snapshot, self.model, self._level)
        depth = model.exit_layers[0] if self.depth is None else self.depth
        if depth not in model.exit_layers:
            allowed = f"an exit layer of {model.name!r}: one of {list(model.exit_layers)}"
            raise refused("depth", depth, allowed)
        reason = f"One depth for the whole run: {depth} of {model.num_layers} layers."
        return only_at_start(snapshot, Serve(model.name, depth, ExitMode.LOADED_DEPTH, reason))

    def _level(self, candidate: Candidate) -> int:
        return fixed_level(candidate.exit_layers, self.depth or 1)


class SwitchOnly(Helios):
    """HELIOS that answers breaches by switching alone."""

    name = "switch-only"
    fixed_settings: Mapping[str, Any] = {"actions": ("switch",)}


class LoadOnly(Helios):
    """HELIOS that answers breaches by loading the remaining layers alone."""

    name = "load-only"
    fixed_settings: Mapping[str, Any] = {"actions": ("load",)}


class Never(Helios):
    """HELIOS that evaluates once at the start and never acts again."""

    name = "never"
    fixed_settings: Mapping[str, Any] = {
        "reassess_requests": None,
        "breach_window_tokens": None,
        "breach_limit": 0,
        "window_kind": "tumbling",
        "overhead_rule": "expected",
        "after_load_exit_mode": ExitMode.WAIT,
        "evaluate_at_start": True,
        "actions": (),
    }

    def decide(self, snapshot: Snapshot) -> Decision:
        """The first round of HELIOS, then nothing."""
        if snapshot.event in (Event.BREACHED, Event.REASSESS):
            return Keep("This policy never acts after its first choice.")
        return super().decide(snapshot)


@dataclass(frozen=True, kw_only=True)
class Always:
    """Switches to the next candidate, partially loaded, at every reassessment."""

    reassess_requests: int = field(
        default=USUAL_REASSESS_REQUESTS,
        metadata=about("Requests finished between two switches.", "ours"),
    )
    confidence_threshold: float | None = field(default=None, metadata=about(THRESHOLD, "open"))

    name = "always"
    sees_future = False

    def __post_init__(self) -> None:
        check_whole_number("reassess_requests", self.reassess_requests, 1)
        check_threshold(self.confidence_threshold)

    @property
    def watching(self) -> Watching:
        """Reassessments alone."""
        return Watching(reassess_requests=self.reassess_requests)

    def decide(self, snapshot: Snapshot) -> Decision:
        """Serve the first candidate at its shallowest exit, then the next one, and round again."""
        circle = sharing_a_tokenizer(fitting(snapshot.candidates, shallowest))
        names = [c.name for c in circle]
        now = snapshot.assignment
        if snapshot.event is Event.START or now is None:
            first = circle[0]
            reason = "The first candidate in order, at its shallowest exit."
            return Serve(first.name, first.exit_layers[0], ExitMode.LOADED_DEPTH, reason)
        if snapshot.event is not Event.REASSESS:
            return Keep("This policy acts at reassessments alone.")
        place = names.index(now.model) + 1 if now.model in names else 0
        following = circle[place % len(circle)]
        if following.name == now.model:
            return Keep("There is no other candidate to switch to.")
        reason = "The next candidate in order, whatever it costs."
        return Switch(following.name, following.exit_layers[0], ExitMode.LOADED_DEPTH, reason)


@dataclass(frozen=True, kw_only=True)
class Clairvoyant:
    """Knows the exits of the coming tokens: picks model and depth without evaluating anything."""

    objective: Objective = field(
        default="throughput", metadata=about("What the best candidate is best at.", "ours")
    )
    reassess_requests: int = field(
        default=USUAL_REASSESS_REQUESTS,
        metadata=about("Requests finished between two choices.", "ours"),
    )
    depth_rule: DepthRule = field(
        default="dominant",
        metadata=about("Layers to load, from the coming exits, as for helios.", "ours"),
    )
    depth_quantile: float = field(
        default=0.9, metadata=about('Share of tokens that depth_rule = "quantile" covers.', "ours")
    )
    fixed_depth: int | None = field(
        default=None, metadata=about('Layers of depth_rule = "fixed".', "ours")
    )
    confidence_threshold: float | None = field(default=None, metadata=about(THRESHOLD, "open"))

    name = "clairvoyant"
    sees_future = True

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_whole_number("reassess_requests", self.reassess_requests, 1)
        check_depth_options(self.depth_rule, self.depth_quantile, self.fixed_depth)
        check_threshold(self.confidence_threshold)

    @property
    def watching(self) -> Watching:
        """Reassessments alone: breaches are no news to it."""
        return Watching(reassess_requests=self.reassess_requests)

    def decide(self, snapshot: Snapshot) -> Decision:
        """The best model and depth for the coming tokens."""
        if snapshot.event not in (Event.START, Event.REASSESS):
            return Keep("This policy acts at the start and at reassessments alone.")
        foresight = snapshot.foresight or {}
        choices = []
        for candidate in self._comparable(snapshot):
            level = greedy_level(
                self.depth_rule,
                foresight.get(candidate.name),
                candidate.exit_layers,
                self.depth_quantile,
                self.fixed_depth,
            )
            keeps_slo = meets_slo(candidate, level, None, snapshot.slo)
            value = score(self.objective, candidate, level, None, snapshot.max_batch)
            choices.append((keeps_slo, value, candidate, level))
        # max takes the first of equals: the one that ranks higher by its card.
        keeps_slo, value, best, level = max(choices, key=lambda choice: choice[:2])
        return _go_to(snapshot, best, level, self._reason(value, keeps_slo))

    def _comparable(self, snapshot: Snapshot) -> tuple[Candidate, ...]:
        """Candidates of one tokenizer that fit, best by their cards first, whatever is coming.

        A candidate too slow for the SLO at its shallowest exit keeps it nowhere, so the tokenizer
        is that of the candidates that may keep it, where there are any.
        """
        fit = fitting(snapshot.candidates)
        may_keep_slo = [c for c in fit if meets_slo(c, 0, None, snapshot.slo)]
        comparable = sharing_a_tokenizer(may_keep_slo or fit)
        return ranked(comparable, self.objective, snapshot.max_batch)

    def _reason(self, value: float, keeps_slo: bool) -> str:
        warning = "" if keeps_slo else " No candidate keeps the SLO at its depth."
        # Without evaluations nothing is known of quality but that the larger model leads the list.
        if math.isinf(value):
            return f"First by its card for {self.objective}.{warning}"
        served = describe(self.objective, value)
        return f"The coming tokens are served best here: {served}.{warning}"


def _go_to(snapshot: Snapshot, model: Candidate, level: int, reason: str) -> Decision:
    """The decision that gets from what is loaded now to `model` at `level`."""
    now, depth, mode = snapshot.assignment, model.exit_layers[level], ExitMode.LOADED_DEPTH
    if snapshot.event is Event.START or now is None:
        return Serve(model.name, depth, mode, reason)
    if now.model != model.name:
        return Switch(model.name, depth, mode, reason)
    if now.depth < depth:
        return LoadLayers(depth, mode, reason)
    if now.depth > depth:
        return Serve(model.name, depth, mode, reason)
    return Keep(reason)
