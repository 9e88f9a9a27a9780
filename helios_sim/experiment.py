"""From a scenario to its runs: every policy on the same requests, replicated where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl

from helios_sim.cards import Room, check_room, expecting, policy_slo, room_of
from helios_sim.engine import Run, Setup, simulate
from helios_sim.errors import InputError, did_you_mean
from helios_sim.exits import ExitTraces, load_traces
from helios_sim.footprint import check_fits
from helios_sim.outcome import run_data
from helios_sim.policy.contract import Policy
from helios_sim.policy.registry import make_policy
from helios_sim.profile import Profile
from helios_sim.runs.laws import check_run
from helios_sim.runs.metrics import aggregate, start_figures, summarise, user_figures
from helios_sim.runs.records import SUMMARY_KINDS, TOKENIZERS, RunData
from helios_sim.scenario import (
    EXPECTED_LENGTHS,
    PolicySettings,
    Scenario,
    ServingSettings,
    check_warmup,
    of_one_policy,
)
from helios_sim.workload.requests import Requests, fit_context, generate

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Result:
    """A policy's run with its figures; those of more seeds are under `replications`."""

    run: RunData
    summary: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A scenario with everything it names read and checked, ready to run."""

    scenario: Scenario
    base_dir: Path
    setup: Setup
    where: str = "scenario"

    def requests(self, seed: int) -> tuple[Requests, int]:
        """The workload of one seed, and how many requests were shortened to the context."""
        setup = self.setup
        return _requests(self.scenario, seed, self.base_dir, setup, setup.traces, self.where)

    def refusals(self, requests: Requests) -> tuple[int, int]:
        """How many requests nobody can ever take, and how many more not all who may serve can."""
        least, most = self.setup.longest_requests
        tokens = requests.prompt_tokens.astype(np.int64) + requests.output_tokens
        num_by_all = int((tokens > most).sum())
        return num_by_all, int((tokens > least).sum()) - num_by_all

    def policy(self, settings: PolicySettings) -> Policy:
        """A fresh policy of the scenario."""
        return make_policy(settings.use, settings.options, search_path=self.base_dir)


def prepare(scenario: Scenario, base_dir: Path, where: str = "scenario") -> Experiment:
    """Read the profile and the exit traces that a scenario names; fill its expectations in."""
    room = room_of(scenario, base_dir, where)
    traces = _traces_of(room.profile, room.candidates)
    serving = _expecting(scenario, base_dir, room, traces, where)
    scenario = scenario.model_copy(update={"serving": serving})
    room = replace(room, serving=serving)
    check_room(room, where)
    _check_published(scenario, where)
    setup = Setup(
        profile=room.profile,
        traces=traces,
        candidates=room.candidates,
        fleet=room.fleet,
        serving=room.serving,
        measure=scenario.measure,
        slo=policy_slo(scenario.slo_spec),
        seed=scenario.seed,
    )
    return Experiment(scenario, base_dir, setup, where)


def expected_serving(scenario: Scenario, base_dir: Path, where: str) -> ServingSettings:
    """A scenario's settings with the lengths that a policy reckons with under its own workload."""
    room = room_of(scenario, base_dir, where)
    traces = _traces_of(room.profile, room.candidates)
    return _expecting(scenario, base_dir, room, traces, where)


def _expecting(
    scenario: Scenario, base_dir: Path, room: Room, traces: ExitTraces, where: str
) -> ServingSettings:
    """Settings with every expected length; the workload is drawn only where one is unset."""
    serving = scenario.serving
    if all(getattr(serving, key) is not None for key in EXPECTED_LENGTHS):
        return serving
    # Lengths hang on no domain, and one that the profile lacks is for others to find.
    workload = scenario.workload.model_copy(update={"domains": ()})
    plain = scenario.model_copy(update={"workload": workload})
    requests, _ = _requests(plain, scenario.seed, base_dir, room, traces, where)
    return expecting(serving, requests, room.context_tokens)


def _requests(
    scenario: Scenario, seed: int, base_dir: Path, room: Room, traces: ExitTraces, where: str
) -> tuple[Requests, int]:
    """The workload of one seed, and how many requests were shortened to the context."""
    workload = scenario.workload
    try:
        requests = generate(workload, seed, base_dir, traces.domains)
        context = min(room.context_tokens, workload.context_tokens or room.context_tokens)
        return fit_context(requests, context, workload.over_context)
    except InputError as error:
        # An error in the scenario names a key; an error in a file has named the file.
        if error.where and error.where.split(".")[0] == "workload":
            raise error.at(f"{where}, {error.where}") from error
        raise


MAX_TRACES: Final = 8
"""Exit traces that are kept for later scenarios: 4 to 20 MB each."""

_TRACES: dict[tuple[str, tuple[str, ...]], ExitTraces] = {}


def _traces_of(profile: Profile, candidates: tuple[str, ...]) -> ExitTraces:
    """Exit traces, the last ones kept for the next scenario on the same profile."""
    key = profile.hash, candidates
    traces = _TRACES.pop(key, None) or load_traces(profile, candidates)
    _TRACES[key] = traces
    while len(_TRACES) > MAX_TRACES:
        del _TRACES[next(iter(_TRACES))]
    return traces


def forget_traces() -> None:
    """Let go of the exit traces kept for later scenarios, and so of the tables made of them."""
    _TRACES.clear()


def _check_published(scenario: Scenario, where: str) -> None:
    """Published figures stand beside numbers of a summary, so they must be some."""
    for index, entry in enumerate(scenario.published):
        key, dot, _ = entry.figure.partition(".")
        kind, _ = SUMMARY_KINDS.get(key, ("text", False))
        if kind not in (("numbers", "tables") if dot else ("whole", "number")):
            numbers = [name for name, (kind, _) in SUMMARY_KINDS.items() if kind == "number"]
            raise InputError(
                f"{entry.figure!r} is no number of a summary.{did_you_mean(key, numbers)}",
                f"{where}, published.{index}.figure",
            )


def rehearse(experiment: Experiment, policy: PolicySettings) -> None:
    """Let a policy serve the first request alone: what cannot start at all says so here.

    So does a run that memory is too small for.
    """
    requests, _ = experiment.requests(experiment.scenario.seed)
    _check_fits(experiment, policy, requests)
    first = replace(
        requests,
        **{
            name: getattr(requests, name)[:1]
            for name in ("arrival_s", "prompt_tokens", "output_tokens", "domain", "trace_start")
        },
        num_users=None if requests.num_users is None else 1,
    )
    _play(experiment, policy, experiment.scenario.seed, first, None)


def _check_fits(experiment: Experiment, policy: PolicySettings, requests: Requests) -> None:
    """Refuse a run of a policy that memory is too small for."""
    serving = experiment.scenario.serving
    check_fits(
        len(requests),
        experiment.policy(policy).watching.reassess_requests,
        len(experiment.setup.candidates),
        experiment.scenario.fleet.num_replicas,
        serving.max_batch + serving.max_held,
    )


def _play(
    experiment: Experiment,
    policy: PolicySettings,
    seed: int,
    requests: Requests,
    report: Callable[[float], None] | None,
) -> Run:
    """Play a policy; its mistakes name the scenario."""
    try:
        return simulate(
            replace(experiment.setup, seed=seed),
            requests,
            lambda: experiment.policy(policy),
            report,
        )
    except InputError as error:
        place = error.where or f"policy {policy.name}"
        raise error.at(f"{experiment.where}, {place}") from error


def choose_policies(scenario: Scenario, names: Sequence[str]) -> tuple[PolicySettings, ...]:
    """The scenario's policies of these labels or names; an unlisted shipped name gets defaults."""
    if not names:
        return scenario.policy
    chosen: list[PolicySettings] = []
    for name in names:
        matching = scenario.policies_called(name)
        if not matching:
            make_policy(name, {}, where=f"--policy {name}")
            matching = (PolicySettings(use=name),)
        chosen += [policy for policy in matching if policy not in chosen]
    return tuple(chosen)


def run_policy(
    experiment: Experiment, policy: PolicySettings, progress: Progress | None = None
) -> Result:
    """Run one policy, over all replications, and summarise it."""
    scenario = experiment.scenario
    measure = scenario.measure
    plain = of_one_policy(scenario, policy, experiment.base_dir)
    results: list[Result] = []
    for replication in range(measure.replications):
        seed = scenario.seed + replication
        requests, num_shortened = experiment.requests(seed)

        def report(share: float, done: int = replication) -> None:
            if progress is not None:
                progress(policy.name, (done + share) / measure.replications)

        report(0.0)
        check_warmup(measure, requests, experiment.where)
        _check_fits(experiment, policy, requests)
        played = _play(experiment, policy, seed, requests, report)
        run = run_data(played, policy.name, policy.use, seed, plain | {"seed": seed})
        users, left_out = (requests.num_users, requests.arrival_s), requests.left_out
        replays_text = requests.replays_text
        # The world is as large as the records made of it, and nobody needs it any more.
        played.disband()
        del played, requests
        check_run(run)
        summary = summarise(run, scenario.slo_spec, measure.warmup_s, measure.warmup_requests)
        summary |= {**left_out, "num_shortened": num_shortened}
        summary[TOKENIZERS] = _tokenizers(experiment.setup.profile, run)
        summary |= start_figures(run, measure.warmup_s, measure.warmup_requests)
        summary |= user_figures(run, *users)
        beyond = _beyond_measured(experiment.setup.profile, run, scenario.serving.max_batch)
        if beyond:
            summary["beyond_measured"] = beyond
        if replays_text:
            summary["replays_text"] = True
        results.append(Result(run, summary))
        report(1.0)
    first = results[0]
    if len(results) > 1:
        first.summary["replications"] = aggregate([result.summary for result in results])
    return first


def _tokenizers(profile: Profile, run: RunData) -> list[str]:
    """The tokenizers of the models that served, each once: perplexities compare within one."""
    served = run.requests["model"].drop_nulls().unique().cast(pl.String)
    return sorted({profile.models[name].model.tokenizer for name in served})


def _beyond_measured(profile: Profile, run: RunData, max_batch: int) -> list[str]:
    """What of a run a measured profile can only extrapolate, a clause for each model served.

    A pass has at most `max_batch` of the rows that ran.
    """
    lengths = (
        run.requests.filter(pl.col("model").is_not_null())
        .group_by("model")
        .agg((pl.col("prompt_tokens") + pl.col("generated_tokens")).max().alias("tokens"))
        .sort(pl.col("model").cast(pl.String))
    )
    clauses = [
        profile.models[name].beyond_hull(min(run.totals.max_running, max_batch), tokens)
        for name, tokens in lengths.iter_rows()
    ]
    return [clause for clause in clauses if clause]
