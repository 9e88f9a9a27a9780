"""HELIOS: shortlist, evaluate, serve greedily, watch, react, reassess (arXiv 2504.10724)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from helios_sim.errors import listed
from helios_sim.policy.contract import (
    USUAL_REASSESS_REQUESTS,
    Candidate,
    Decision,
    Evaluate,
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
from helios_sim.policy.depth import DepthRule, check_depth_options, greedy_level
from helios_sim.policy.history import exit_shares, latest
from helios_sim.policy.objective import OBJECTIVES, brief, describe, meets_slo, score
from helios_sim.policy.options import (
    about,
    as_exit_mode,
    check_choice,
    check_flag,
    check_threshold,
    check_whole_number,
    refused,
)
from helios_sim.policy.overhead import (
    OVERHEAD_RULES,
    Overhead,
    OverheadRule,
    overhead_of_load,
    overhead_of_switch,
)
from helios_sim.policy.shortlist import Shortlist, make_shortlist

Action = Literal["load", "switch"]
ACTIONS = ("load", "switch")


@dataclass(frozen=True, kw_only=True)
class HeliosSettings:
    """Every choice of HELIOS: the paper's defaults, and a name for what the paper leaves open."""

    top_k: int = field(default=3, metadata=about("Candidates on the shortlist.", "paper"))
    evaluation_requests: int = field(
        default=5, metadata=about("Requests a candidate serves when evaluated.", "paper")
    )
    reassess_requests: int | None = field(
        default=USUAL_REASSESS_REQUESTS,
        metadata=about(
            'Requests finished after an evaluation until the next round; "off" never reassesses.',
            "paper",
            can_be_off=True,
        ),
    )
    breach_window_tokens: int | None = field(
        default=100,
        metadata=about(
            'Tokens in the window that counts breaches; "off" never watches.',
            "paper",
            can_be_off=True,
        ),
    )
    breach_limit: int = field(
        default=50,
        metadata=about("Breaches in a window (CBCmax) that are still tolerated.", "paper"),
    )
    window_kind: Literal["tumbling", "sliding"] = field(
        default="tumbling",
        metadata=about("Whether the window starts anew when full, or slides.", "open"),
    )
    confidence_threshold: float | None = field(
        default=None,
        metadata=about(
            "Confidence at which a token leaves; the profile's own where unset.", "open"
        ),
    )
    objective: Objective = field(
        default="throughput", metadata=about("What the best candidate is best at.", "ours")
    )
    depth_rule: DepthRule = field(
        default="dominant",
        metadata=about(
            "Layers to load: the exit where most tokens leave, the shallowest exit that covers "
            "depth_quantile of them, or fixed_depth.",
            "open",
        ),
    )
    depth_quantile: float = field(
        default=0.9, metadata=about('Share of tokens that depth_rule = "quantile" covers.', "ours")
    )
    fixed_depth: int | None = field(
        default=None,
        metadata=about(
            'Layers of depth_rule = "fixed": the shallowest exit of at least so many.', "ours"
        ),
    )
    overhead_rule: OverheadRule = field(
        default="expected",
        metadata=about(
            "Seconds compared after breaches: transfer plus serving the expected tokens, or "
            "transfer alone.",
            "open",
        ),
    )
    evaluation_exit_mode: ExitMode = field(
        default=ExitMode.WAIT,
        metadata=about("How tokens leave while a candidate is evaluated.", "open"),
    )
    after_load_exit_mode: ExitMode = field(
        default=ExitMode.WAIT,
        metadata=about("How tokens leave once the remaining layers were loaded.", "open"),
    )
    evaluate_at_start: bool = field(
        default=True,
        metadata=about(
            "Whether the first round comes before any other request is served.", "paper"
        ),
    )
    actions: tuple[Action, ...] = field(
        default=("load", "switch"),
        metadata=about("Reactions to breaches that are allowed.", "paper"),
    )

    def __post_init__(self) -> None:
        never = "never"
        check_whole_number("top_k", self.top_k, 1)
        check_whole_number("evaluation_requests", self.evaluation_requests, 1)
        check_whole_number("reassess_requests", self.reassess_requests, 1, off_means=never)
        check_whole_number("breach_window_tokens", self.breach_window_tokens, 1, off_means=never)
        check_whole_number("breach_limit", self.breach_limit, 0)
        if self.breach_window_tokens is not None and self.breach_limit >= self.breach_window_tokens:
            raise refused(
                "breach_limit",
                self.breach_limit,
                f"below the {self.breach_window_tokens} tokens of breach_window_tokens, or no "
                "window could exceed it",
            )
        check_choice("window_kind", self.window_kind, ("tumbling", "sliding"))
        check_threshold(self.confidence_threshold)
        check_choice("objective", self.objective, OBJECTIVES)
        check_depth_options(self.depth_rule, self.depth_quantile, self.fixed_depth)
        check_choice("overhead_rule", self.overhead_rule, OVERHEAD_RULES)
        active = tuple(mode for mode in ExitMode if mode.leaves_early)
        for name, allowed in (
            ("evaluation_exit_mode", active),
            ("after_load_exit_mode", (*active, ExitMode.FULL)),
        ):
            object.__setattr__(self, name, as_exit_mode(name, getattr(self, name), allowed))
        check_flag("evaluate_at_start", self.evaluate_at_start)
        self._check_actions()

    def _check_actions(self) -> None:
        given: object = self.actions
        if (
            not isinstance(given, (list, tuple))
            or any(action not in ACTIONS for action in given)
            or len(set(given)) != len(given)
        ):
            raise refused("actions", given, f"a list of distinct names out of {listed(ACTIONS)}")
        object.__setattr__(self, "actions", tuple(given))


class Helios:
    """The policy of the paper, as a pure function of the snapshot.

    `fixed_settings` are the settings that make a variant what it is; nobody can change them.
    """

    name = "helios"
    sees_future = False
    settings_type = HeliosSettings
    fixed_settings: Mapping[str, Any] = {}

    def __init__(self, settings: HeliosSettings | None = None) -> None:
        self.settings = replace(settings or HeliosSettings(), **self.fixed_settings)

    @property
    def watching(self) -> Watching:
        """Breach window and reassessment interval of the settings."""
        s = self.settings
        return Watching(s.reassess_requests, s.breach_window_tokens, s.breach_limit, s.window_kind)

    @property
    def confidence_threshold(self) -> float | None:
        """The confidence at which tokens leave."""
        return self.settings.confidence_threshold

    def decide(self, snapshot: Snapshot) -> Decision:
        """One turn of the cycle: shortlist, evaluate, serve greedily, watch, react, reassess.

        A round begins at START and at every REASSESS: the candidates of the shortlist are
        evaluated one after another, each EVALUATED leading to the next, and after the last one
        the best serves at its greedy depth. From there on the host watches: BREACHED is answered by
        loading or switching, and that stands until it is answered again or reassessed.

        Nothing is remembered, so the shortlist is worked out wherever it is needed: from what
        changes with the hardware or the SLO alone, and so to the same candidates within a run.
        """
        if snapshot.event is Event.BREACHED:
            return self._react(snapshot)
        if snapshot.event is Event.START and not self.settings.evaluate_at_start:
            return self._serve_unmeasured(snapshot)
        return self._evaluate_next(snapshot) or self._select(snapshot)

    def _shortlist(self, snapshot: Snapshot) -> Shortlist:
        """The candidates that hardware and SLO admit, best for the objective first."""
        s = self.settings
        return make_shortlist(
            snapshot.candidates, snapshot.slo, s.objective, snapshot.max_batch, s.top_k
        )

    def _level(self, candidate: Candidate, snapshot: Snapshot) -> int:
        """The greedy depth of a candidate, from its last evaluation."""
        return greedy_level(
            self.settings.depth_rule,
            exit_shares(latest(snapshot.history, candidate.name)),
            candidate.exit_layers,
            self.settings.depth_quantile,
            self.settings.fixed_depth,
        )

    def _evaluate_next(self, snapshot: Snapshot) -> Evaluate | None:
        """The first candidate that this round lacks; None where it lacks none."""
        shortlist = self._shortlist(snapshot)
        pending = [
            candidate
            for candidate in _evaluation_order(snapshot, shortlist)
            if candidate.name not in snapshot.round_evaluated
        ]
        if not pending:
            return None
        place = len(snapshot.round_evaluated) + 1
        return Evaluate(
            pending[0].name,
            self.settings.evaluation_requests,
            self.settings.evaluation_exit_mode,
            f"Evaluation {place} of this round: {shortlist.reason}.",
        )

    def _serve_unmeasured(self, snapshot: Snapshot) -> Serve:
        """The shortlist's first at its greedy depth, which nobody has measured."""
        shortlist = self._shortlist(snapshot)
        best = shortlist.candidates[0]
        return Serve(
            best.name,
            best.exit_layers[self._level(best, snapshot)],
            ExitMode.LOADED_DEPTH,
            f"Nothing is measured before the first reassessment: {shortlist.reason}.",
        )

    def _select(self, snapshot: Snapshot) -> Serve:
        """The best candidate for the objective among those that keep the SLO at their depth."""
        s = self.settings
        choices = []
        for candidate in self._shortlist(snapshot).candidates:
            level = self._level(candidate, snapshot)
            evaluation = latest(snapshot.history, candidate.name)
            value = score(s.objective, candidate, level, evaluation, snapshot.max_batch)
            keeps_slo = meets_slo(candidate, level, evaluation, snapshot.slo)
            choices.append((keeps_slo, value, candidate, level))
        # max takes the first of equals: the one that ranks higher on the shortlist.
        keeps_slo, _, best, level = max(choices, key=lambda choice: choice[:2])
        depth = best.exit_layers[level]
        compared = "; ".join(
            f"{candidate.name} at {candidate.exit_layers[at]} layers: "
            f"{describe(s.objective, value)}"
            for _, value, candidate, at in choices
        )
        warning = "" if keeps_slo else " No evaluated candidate keeps the SLO at its depth."
        return Serve(
            best.name,
            depth,
            ExitMode.LOADED_DEPTH,
            f"{best.name} is best for {s.objective} at {depth} of {best.num_layers} layers "
            f"({s.depth_rule} exit): {compared}.{warning}",
        )

    def _react(self, snapshot: Snapshot) -> Decision:
        """The reaction of smaller overhead; loading wins a tie, since it keeps the model."""
        options = self._load_option(snapshot) + self._switch_options(snapshot)
        rule = self.settings.overhead_rule
        possible = [
            (decision, cost) for decision, cost in options if math.isfinite(cost.transfer_s)
        ]
        if not possible:
            return Keep(self._why_nothing())
        chosen, _ = min(possible, key=lambda pair: pair[1].total_s(rule))
        costs = "; ".join(
            f"{_short(decision)} {brief(cost.total_s(rule))} s"
            f"{' (chosen)' if decision is chosen else ''}"
            for decision, cost in possible
        )
        return replace(chosen, reason=f"Too many breaches. {rule.capitalize()} overhead: {costs}.")

    def _load_option(self, snapshot: Snapshot) -> list[tuple[LoadLayers | Switch, Overhead]]:
        now = snapshot.assignment
        if now is None or "load" not in self.settings.actions:
            return []
        serving = next(c for c in snapshot.candidates if c.name == now.model)
        if now.depth >= serving.num_layers or serving.batch_limit[-1] < 1:
            return []
        mode = self.settings.after_load_exit_mode
        evaluation = latest(snapshot.history, serving.name)
        cost = overhead_of_load(serving, evaluation, mode, snapshot)
        return [(LoadLayers(serving.num_layers, mode, ""), cost)]

    def _switch_options(self, snapshot: Snapshot) -> list[tuple[LoadLayers | Switch, Overhead]]:
        now = snapshot.assignment
        if now is None or "switch" not in self.settings.actions:
            return []
        options: list[tuple[LoadLayers | Switch, Overhead]] = []
        for other in self._shortlist(snapshot).candidates:
            if other.name != now.model:
                level = self._level(other, snapshot)
                evaluation = latest(snapshot.history, other.name)
                cost = overhead_of_switch(other, level, evaluation, snapshot)
                depth = other.exit_layers[level]
                options.append((Switch(other.name, depth, ExitMode.LOADED_DEPTH, ""), cost))
        return options

    def _why_nothing(self) -> str:
        actions = " and ".join(self.settings.actions) or "none"
        return (
            f"Too many breaches, but nothing can be done: allowed reactions are {actions}, and "
            "there is no layer left to load or no other candidate within reach."
        )


def _evaluation_order(snapshot: Snapshot, shortlist: Shortlist) -> list[Candidate]:
    """The shortlist, led by the serving model at a reassessment since it is already loaded."""
    order = list(shortlist.candidates)
    now = snapshot.assignment
    if snapshot.event is Event.REASSESS and now is not None:
        order.sort(key=lambda candidate: candidate.name != now.model)
    return order


def _short(decision: LoadLayers | Switch) -> str:
    """A reaction in a few words."""
    if isinstance(decision, LoadLayers):
        return f"loading to {decision.depth} layers"
    return f"switching to {decision.model} at {decision.depth} layers"
