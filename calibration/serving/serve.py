"""A scenario served for real: its requests on this machine, in wall-clock time, into a run folder.

Prompts are pieces of held-out text, output lengths are the workload's, the policy is live. The run
has the schema of a simulated one, so that the two can be laid side by side.
"""

from __future__ import annotations

import gc
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

import torch

from calibration.device import device_name, dtype_name
from calibration.measuring.board import board_of
from calibration.measuring.meters import Absence, Measurement, Meter, NoMeter, best_meter
from calibration.measuring.timing import measure_pace
from calibration.serving.energy import RunEnergy
from calibration.serving.host import Host, check_policy, lives_of
from calibration.serving.judge import Reread, judge, reread, served_traces
from calibration.serving.prepared import (
    Prepared,
    ServeSettings,
    chosen_policies,
    prepare,
    threads_of,
    weight_settings,
)
from calibration.serving.record import run_data, write_extras
from calibration.serving.slowdown import Companion, slowdown_facts, waited_s
from calibration.serving.weights import CheckpointWeights, KvChoice
from helios_sim.cards import policy_slo
from helios_sim.console.command import Interrupted
from helios_sim.errors import InputError
from helios_sim.exits import write_traces
from helios_sim.folder_names import folder_names
from helios_sim.garbage import uncollected
from helios_sim.profile import TRACES_FILE, Profile
from helios_sim.profiles.files import assumed_in
from helios_sim.report import render
from helios_sim.report.page_files import UnwrittenPage, write_page_text
from helios_sim.runs.laws import check_run
from helios_sim.runs.metrics import start_figures, summarise, user_figures
from helios_sim.runs.records import (
    MEASURED,
    REPORT_FILE,
    TOKENIZERS,
    TOTALS_FILE,
    check_computed,
    check_target,
    write_run,
)
from helios_sim.scenario import PolicySettings, of_one_policy
from helios_sim.wording import counted

_SPIN_S: Final = 0.0005
"""The last stretch of a wait is spent looking at the clock: sleeping overshoots by as much."""

_COMPARED_KERNELS: Final = ("fusion", "flash", "telling")

Progress = Callable[[str, float], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """A written run: its folder and its figures.

    `slowdown` says how many times slower the machine was than while the profile was measured, None
    where nothing tells. `other_kernels` are sentences, as `other_kernels` finds them. `unwritten`
    says why the run has no page, where the disk did not take it.
    """

    folder: Path
    summary: Mapping[str, Any]
    slowdown: float | None = None
    other_kernels: tuple[str, ...] = ()
    unwritten: str | None = None


class WallClock:
    """Seconds since the clock was started, by `time.perf_counter`."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()

    def restart(self) -> None:
        """Begin at zero."""
        self.start_s = time.perf_counter()

    def now_s(self) -> float:
        """The present."""
        return time.perf_counter() - self.start_s

    def sleep_until(self, time_s: float) -> None:
        """Wait until a time, within microseconds of it."""
        left_s = time_s - self.now_s()
        if left_s > _SPIN_S:
            time.sleep(left_s - _SPIN_S)
        while self.now_s() < time_s:
            pass


class Backend:
    """What a run is served with: weights and a host on this machine, by its wall clock.

    A made-up device overrides what it has of its own, and the origin that its runs are to name.
    """

    origin: str = MEASURED
    host_class: type[Host] = Host
    is_this_machine = True
    """Whether how fast this machine is bears on the run."""

    def clock(self) -> WallClock:
        """The clock that the run goes by."""
        return WallClock()

    def weights(self, prepared: Prepared, clock: WallClock) -> CheckpointWeights:
        """Where the candidates' weights come from."""
        settings = weight_settings(prepared)
        return CheckpointWeights(prepared.folders, prepared.room, settings, clock)

    def device_name(self, prepared: Prepared) -> str:
        """The device as the run names it."""
        return device_name(prepared.device)


def serve(
    scenario_path: Path,
    out: Path,
    settings: ServeSettings,
    changes: Sequence[str] = (),
    progress: Progress | None = None,
    on_served: Callable[[Served], None] | None = None,
    tell: Tell | None = None,
) -> list[Served]:
    """Serve a scenario's policies and write their runs; `on_served` hears of each at once.

    `tell` hears in sentences what the user did not ask for and should know. A run that was served
    for real is replaced only if the settings say so.

    One policy served once is written to `out` itself. Otherwise `out` gets a folder a policy, and
    with `repeat` above 1 folders repeat-1, repeat-2, ... within. A run is whole or absent.
    """
    say = tell or _unheard
    prepared = prepare(scenario_path, settings, changes)
    chosen = chosen_policies(prepared.scenario, settings.policies)
    places = places_of(out, [policy.name for policy in chosen], settings.repeat)
    if places != [out] and (out / TOTALS_FILE).exists():
        raise InputError(
            "This is a run, and several runs are to be written into folders within it; give "
            "another folder.",
            str(out),
        )
    for place in places:
        check_target(place)
    if not settings.overwrite:
        check_computed(places, "give another --out, or --overwrite to replace it", out)
    meter = best_meter(prepared.device.type, board_of(prepared.device))
    for policy in chosen:
        check_policy(prepared.policy(policy), not isinstance(meter, NoMeter), policy.name)
    threads_before = torch.get_num_threads()
    threads, why = threads_of(settings, prepared.room.profile, prepared.device)
    for said in (why, prepared.kv_said):
        if said:
            say(said)
    if threads is not None:
        torch.set_num_threads(threads)
    served = []
    try:
        turns = [policy for policy in chosen for _ in range(settings.repeat)]
        for policy, place in zip(turns, places, strict=True):
            one = serve_once(prepared, policy, place, meter, progress)
            served.append(one)
            if on_served is not None:
                on_served(one)
            for said in one.other_kernels:
                say(f"Warning: {said}")
    finally:
        torch.set_num_threads(threads_before)
    return served


def command(
    scenario_path: Path, out: Path, changes: Sequence[str], *, kv: str, **options: Any
) -> None:
    """What `helios-calibrate serve` does: serve, and say a line of each run that was written.

    An interrupt ends with the runs that were whole by then; the one under way is not written.
    """
    if kv not in get_args(KvChoice):
        allowed = ", ".join(get_args(KvChoice))
        raise InputError(f"{kv!r} was given; allowed are {allowed}.", "--kv")
    settings = ServeSettings(kv=cast(KvChoice, kv), **options)
    written: list[Path] = []
    without_page: list[Served] = []

    def say(text: str) -> None:
        print(text, flush=True)

    def wrote(one: Served) -> None:
        written.append(one.folder)
        say(line_of(one))
        if one.unwritten is not None:
            without_page.append(one)

    try:
        serve(scenario_path, out, settings, changes, progress_line(), wrote, say)
    except KeyboardInterrupt:
        runs = (
            f"{counted(len(written), 'run')} before it {'is' if len(written) == 1 else 'are'} kept"
        )
        kept = runs if written else "none was before"
        raise Interrupted(f"the run under way was not written, {kept}") from None
    if without_page:
        first = without_page[0]
        raise InputError(
            f"{first.unwritten} {counted(len(without_page), 'run')} of {len(written)} "
            f"{'is' if len(without_page) == 1 else 'are'} kept without a page; later, helios "
            f"report {shlex.quote(str(first.folder))} draws it.",
            str(first.folder),
        )


def line_of(one: Served) -> str:
    """A run's most asked for figures in one line."""
    summary = one.summary

    def figure(key: str, unit: str) -> str:
        value = summary[key]
        return "none" if value is None else f"{value:.4g}{unit}"

    slowed = "unknown" if one.slowdown is None else f"{one.slowdown:.3g}"
    return (
        f"{one.folder}: {summary['label']}, {summary['completed']} of {summary['num_requests']} "
        f"requests in {figure('duration', ' s')}, {figure('output_throughput', ' tok/s')}, TTFT "
        f"{figure('mean_ttft_ms', ' ms')}, TPOT {figure('mean_tpot_ms', ' ms')}, batch "
        f"{figure('mean_batch_size', '')}, agreement {figure('agreement', '')}, energy "
        f"{figure('total_gpu_energy', ' J')}, slowdown {slowed}"
    )


def progress_line() -> Progress:
    """A line on a terminal's standard error that shows how much is served.

    Nothing redraws it but the run itself, once a sample of the timeline: a thread that did would
    take its time from what is measured.
    """
    shows = sys.stderr.isatty()

    def show(doing: str, share: float) -> None:
        if shows:
            print(f"\r\x1b[K{doing} {share:.0%}\r", end="", file=sys.stderr, flush=True)

    return show


def serve_once(
    prepared: Prepared,
    chosen: PolicySettings,
    out: Path,
    meter: Meter,
    progress: Progress | None = None,
    backend: Backend | None = None,
) -> Served:
    """Serve one policy once and write its run; on this machine unless another backend is given."""
    backend = backend or Backend()
    say = progress or _silence
    scenario = prepared.scenario
    asked = of_one_policy(scenario, chosen, prepared.base_dir) | {"seed": scenario.seed}
    clock = backend.clock()
    weights = backend.weights(prepared, clock)
    say(f"{chosen.name}: preparing", 0.0)
    weights.prepare()
    energy = RunEnergy(meter)
    # A GPU's pace is not that of the processor beside it, nor that of threads one core's.
    on_a_core = prepared.device.type == "cpu" and torch.get_num_threads() == 1
    beside = Companion() if backend.is_this_machine and on_a_core else None
    host = backend.host_class(
        room=prepared.room,
        policy=prepared.policy(chosen),
        slo=policy_slo(prepared.scenario.slo_spec),
        lives=lives_of(prepared.requests, prepared.texts),
        weights=weights,
        clock=clock,
        timeline_interval_s=prepared.scenario.measure.timeline_interval_s,
        on_progress=lambda share: say(f"{chosen.name}: serving", share),
        drawn_j=energy.drawn_so_far_j if energy.measures else None,
        between=None if beside is None else beside.between_iterations,
    )
    facts = _play(prepared, host, energy, clock, backend)
    if beside is not None:
        facts |= beside.facts(prepared.room.profile)
    say(f"{chosen.name}: reading the served text again", 0.0)
    weights.drop()
    judged = _reread_all(prepared, host, weights)
    domains = prepared.requests.domain.tolist()
    judgement = judge(
        judged,
        host.lives,
        host.tally.tokens,
        host.thresholds,
        domains,
        recomputed_kv=prepared.room.serving.skipped_kv == "recomputed",
        leaves=host.rules.leaves_here,
    )
    facts |= {
        "full_depth_tokens": judgement.num_whole,
        "full_depth_tokens_reread_otherwise": judgement.num_reread_otherwise,
    }
    run = run_data(
        host,
        prepared.requests,
        judgement,
        energy,
        label=chosen.name,
        policy=chosen.use,
        seed=scenario.seed,
        scenario=asked,
        environment=environment(prepared, host, weights, meter, backend) | facts,
        origin=backend.origin,
    )
    check_run(run)
    measure = scenario.measure
    summary = summarise(run, scenario.slo_spec, measure.warmup_s, measure.warmup_requests)
    summary |= {
        **prepared.requests.left_out,
        "num_shortened": prepared.num_shortened,
        TOKENIZERS: [prepared.prompts.tokenizer],
        **start_figures(run, measure.warmup_s, measure.warmup_requests),
        **user_figures(run, prepared.requests.num_users, prepared.requests.arrival_s),
    }
    traces = served_traces(
        judged,
        {card.name: card.exit_layers for card in host.steward.cards.values()},
        host.lives,
        domains,
        prepared.requests.domains,
    )

    unwritten: list[str] = []

    def finish(folder: Path) -> None:
        write_extras(host, judgement, folder)
        write_traces(traces, folder / TRACES_FILE)
        try:
            write_page_text(render([run], [summary]), folder / REPORT_FILE)
        except UnwrittenPage as error:
            # A run that took its time to serve is not given up for a page that can be drawn again.
            unwritten.append(error.message)

    return Served(
        write_run(run, summary, out, finish, prepared.settings.overwrite),
        summary,
        facts.get("slowdown"),
        tuple(other_kernels(prepared.room.profile, weights.kernels)),
        unwritten[0] if unwritten else None,
    )


def _play(
    prepared: Prepared, host: Host, energy: RunEnergy, clock: WallClock, backend: Backend
) -> dict[str, Any]:
    """Serve while the clock runs; what the meter and the machine were seen to do meanwhile."""
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    pace_before = measure_pace(prepared.device)
    gc.collect()
    with uncollected(), energy:
        energy.open()
        waited_before_s = waited_s()
        clock.restart()
        energy.started(clock.start_s)
        host.play()
        waited_after_s = waited_s()
        outcome = energy.close(host.tally.spent_s["busy"])
    facts = {"started_at": started_at, "energy": _said(outcome)}
    if not backend.is_this_machine:
        return facts
    spent_s = host.tally.spent_s
    machine = slowdown_facts(
        prepared.room.profile,
        pace_before,
        measure_pace(prepared.device),
        None
        if waited_before_s is None or waited_after_s is None
        else waited_after_s - waited_before_s,
        spent_s["busy"] + spent_s["load"],
    )
    return facts | machine


def environment(
    prepared: Prepared, host: Host, weights: CheckpointWeights, meter: Meter, backend: Backend
) -> dict[str, Any]:
    """Versions, device, checkpoints and how the run was served."""
    profile, settings = prepared.room.profile, prepared.settings
    return {
        "versions": dict(prepared.versions),
        "profile": profile.name,
        "profile_hash": profile.hash,
        "profile_origin": profile.provenance.origin,
        "profile_grades": profile.grade_counts(),
        **assumed_in(profile),
        "exit_traces": "served",
        "confidence_thresholds": dict(host.thresholds),
        "device": backend.device_name(prepared),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(prepared.dtype),
        "checkpoints": {name: folder.name for name, folder in prepared.folders.items()},
        "tokens": "free-running" if settings.free_running else "teacher-forced",
        "tokenizer": prepared.prompts.tokenizer,
        "text_sha256": dict(prepared.prompts.hashes),
        "kv": prepared.kv,
        "kv_pools": dict(weights.notes),
        "kernels": dict(weights.kernels),
        "host_copies": list(weights.copies),
        "in_system_cache": list(weights.remembered),
        "loads": "beside serving" if weights.overlaps else "serving waits",
        "loads_waited_for": host.num_loads_waited_for,
        "rebatch_times": "predicted from the profile",
        "meter": meter.source,
        "meter_explanation": meter.explanation,
    }


def other_kernels(profile: Profile, kernels: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Where a run took kernels that its profile was not measured with, or went without, and why.

    `kernels` are those by candidate and depth. Nothing is found where the profile does not say; it
    is measured from slots, so that kernels for pages are not compared.
    """
    measured = profile.document.get("measurement", {}).get("models", {})
    found = []
    for taken_up, said in kernels.items():
        before = measured.get(taken_up.rpartition("@")[0], {}).get("kernels", {})
        found += [
            f"{taken_up} was served with the kernel {kernel!r} {now}; while profile "
            f"{profile.name!r} was measured it was {before[kernel]}."
            for kernel, now in said.items()
            if kernel in _COMPARED_KERNELS
            and kernel in before
            and now.partition(":")[0] != before[kernel].partition(":")[0]
        ]
    return found


def _reread_all(prepared: Prepared, host: Host, weights: CheckpointWeights) -> dict[str, Reread]:
    """Every candidate's word on the served text, one candidate in memory at a time."""
    found = {}
    for name in prepared.room.candidates:
        model = weights.whole(name)
        found[name] = reread(model, host.lives, prepared.settings.free_running)
        model.unload()
    return found


def places_of(out: Path, labels: Sequence[str], repeat: int) -> list[Path]:
    """A folder for every run, in order, called as `helios simulate` calls it."""
    folders = [out / name for name in folder_names(labels)] if len(labels) > 1 else [out]
    if repeat == 1:
        return folders
    return [folder / f"repeat-{k}" for folder in folders for k in range(1, repeat + 1)]


def _said(outcome: Measurement | Absence) -> dict[str, Any]:
    """What the meter's window came to, as plain data."""
    if isinstance(outcome, Absence):
        return {"absent": outcome.reason}
    return {
        name: value
        for name, value in vars(outcome).items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }


def _silence(doing: str, share: float) -> None:
    """Tell nobody."""


def _unheard(text: str) -> None:
    """Tell nobody."""
