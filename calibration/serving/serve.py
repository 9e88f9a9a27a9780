"""A scenario served for real: its requests on this machine, in wall-clock time, into a run folder.

Prompts are pieces of held-out text, output lengths are the workload's, the policy is live. The run
has the schema of a simulated one, so that the two can be laid side by side.
"""

from __future__ import annotations

import gc
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, cast, get_args

import torch

from calibration.device import DTYPES, device_name, device_of, dtype_name
from calibration.measuring.board import board_of
from calibration.measuring.meters import Absence, Meter, NoMeter, best_meter
from calibration.measuring.timing import measure_pace
from calibration.model.checkpoint import Checkpoint, Guard, named_folders, open_checkpoint
from calibration.model.confidence import ALL_DOMAINS, Confidence
from calibration.model.family import shape_of
from calibration.serving.energy import RunEnergy
from calibration.serving.host import Host, check_policy, lives_of
from calibration.serving.judge import Reread, judge, reread, served_traces
from calibration.serving.prompts import Prompts, read_prompts, shared_tokenizer
from calibration.serving.record import run_data, write_extras
from calibration.serving.slowdown import slowdown_facts, waited_s
from calibration.serving.weights import (
    CheckpointWeights,
    KvChoice,
    KvKind,
    WeightSettings,
    choose_kv,
)
from calibration.training.thresholds import name_of
from helios_sim import __version__
from helios_sim.cards import Room, check_room, expecting, policy_slo, room_of
from helios_sim.command import Interrupted
from helios_sim.errors import InputError
from helios_sim.exits import load_traces, write_traces
from helios_sim.folder_names import folder_names
from helios_sim.garbage import uncollected
from helios_sim.laws import check_run
from helios_sim.metrics import summarise, user_figures
from helios_sim.model import ModelShape
from helios_sim.policy.contract import Policy
from helios_sim.policy.registry import make_policy
from helios_sim.profile import PROFILE_FILE, TRACES_FILE, Profile, assumed_in
from helios_sim.records import REPORT_FILE, TOKENIZERS, TOTALS_FILE, check_target, write_run
from helios_sim.report import render
from helios_sim.scenario import (
    PolicySettings,
    Scenario,
    check_warmup,
    load_scenario,
    of_one_policy,
)
from helios_sim.wording import counted
from helios_sim.workload import Requests, fit_context, generate

_PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy", "polars")
_SPIN_S: Final = 0.0005
"""The last stretch of a wait is spent looking at the clock: sleeping overshoots by as much."""

_DTYPES: Final = {4: torch.float32, 2: torch.bfloat16}
"""What bytes a parameter are where a profile does not name its type."""

_COMPARED_KERNELS: Final = ("fusion", "flash", "telling")

Progress = Callable[[str, float], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ServeSettings:
    """How a scenario is served.

    `checkpoints` are checkpoint folders, or folders of several. `limit` and `duration_s` cut the
    workload to its first requests. `repeat` serves each policy so often. Without `threads` a
    processor gets as many as the profile was measured with.
    """

    checkpoints: tuple[Path, ...]
    policies: tuple[str, ...] = ()
    device: str = "auto"
    kv: KvChoice = "auto"
    graphs: bool = True
    free_running: bool = False
    limit: int | None = None
    duration_s: float | None = None
    repeat: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class Served:
    """A written run: its folder and its figures.

    `slowdown` says how many times slower the machine was than while the profile was measured, None
    where nothing tells. `other_kernels` are sentences, as `other_kernels` finds them.
    """

    folder: Path
    summary: Mapping[str, Any]
    slowdown: float | None = None
    other_kernels: tuple[str, ...] = ()


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

    origin = "measured"
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


@dataclass(frozen=True)
class Prepared:
    """A scenario with everything it needs, checked and ready to be served.

    `kv_said` is what its user should know of the KV cache, empty where there is nothing.
    `versions` are those of the packages at work, for the run's record.
    """

    scenario: Scenario
    base_dir: Path
    where: str
    room: Room
    requests: Requests
    num_shortened: int
    texts: list[list[int]]
    prompts: Prompts
    folders: Mapping[str, Path]
    device: torch.device
    dtype: torch.dtype
    settings: ServeSettings
    kv: KvKind
    kv_said: str
    versions: Mapping[str, str]

    def policy(self, chosen: PolicySettings) -> Policy:
        """A fresh policy of the scenario."""
        return make_policy(chosen.use, chosen.options, search_path=self.base_dir)


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

    `tell` hears in sentences what the user did not ask for and should know.

    One policy served once is written to `out` itself. Otherwise `out` gets a folder a policy, and
    with `repeat` above 1 folders repeat-1, repeat-2, ... within. A run is whole or absent.
    """
    prepared = prepare(scenario_path, settings, changes)
    chosen = _choose(prepared.scenario, settings.policies)
    meter = best_meter(prepared.device.type, board_of(prepared.device))
    for policy in chosen:
        check_policy(prepared.policy(policy), not isinstance(meter, NoMeter), policy.name)
    places = places_of(out, [policy.name for policy in chosen], settings.repeat)
    if places != [out] and (out / TOTALS_FILE).exists():
        raise InputError(
            "This is a run, and several runs are to be written into folders within it; give "
            "another folder.",
            str(out),
        )
    for place in places:
        check_target(place)
    threads_before = torch.get_num_threads()
    threads, why = threads_of(settings, prepared.room.profile, prepared.device)
    for said in (why, prepared.kv_said):
        if said:
            (tell or _unheard)(said)
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
                (tell or _unheard)(f"Warning: {said}")
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

    def say(text: str) -> None:
        print(text, flush=True)

    def wrote(one: Served) -> None:
        written.append(one.folder)
        say(line_of(one))

    try:
        serve(scenario_path, out, settings, changes, progress_line(), wrote, say)
    except KeyboardInterrupt:
        runs = (
            f"{counted(len(written), 'run')} before it {'is' if len(written) == 1 else 'are'} kept"
        )
        kept = runs if written else "none was before"
        raise Interrupted(f"the run under way was not written, {kept}") from None


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


def prepare(scenario_path: Path, settings: ServeSettings, changes: Sequence[str] = ()) -> Prepared:
    """Read a scenario and all it names; whatever cannot be served says so here."""
    scenario = load_scenario(scenario_path, changes)
    base_dir, where = scenario_path.parent, str(scenario_path)
    room = room_of(scenario, base_dir, where)
    _check_serving(scenario, where)
    device = device_of(settings.device)
    folders = named_folders(settings.checkpoints)
    chosen = {name: open_checkpoint(_folder_of(name, folders)) for name in room.candidates}
    for name, found in chosen.items():
        check_checkpoint(name, found, room.profile)
    dtype = _dtype(room)
    domains = load_traces(room.profile, room.candidates).domains
    scenario, requests = cut_workload(scenario, base_dir, domains, settings)
    check_warmup(scenario.measure, requests, where)
    requests, num_shortened = fit_context(
        requests, room.context_tokens, scenario.workload.over_context
    )
    serving = expecting(scenario.serving, requests, room.context_tokens)
    scenario = scenario.model_copy(update={"serving": serving})
    room = replace(room, serving=serving)
    check_room(room, where)
    prompts = read_prompts(requests.domains, shared_tokenizer(list(chosen.values())))
    texts = prompts.pieces(requests, _longest_context(room))
    kv, kv_said = choose_kv(settings.kv, room, _longest_row(texts))
    return Prepared(
        scenario=scenario,
        base_dir=base_dir,
        where=where,
        room=room,
        requests=requests,
        num_shortened=num_shortened,
        texts=texts,
        prompts=prompts,
        folders={name: found.folder for name, found in chosen.items()},
        device=device,
        dtype=dtype,
        settings=settings,
        kv=kv,
        kv_said=kv_said,
        versions=versions_here(),
    )


def threads_of(
    settings: ServeSettings, profile: Profile, device: torch.device
) -> tuple[int | None, str]:
    """Threads of the processor to serve with, None for torch's own number, and a sentence why."""
    if settings.threads is not None:
        return settings.threads, f"Serving with {_threads(settings.threads)}, as asked."
    measured = profile.provenance.environment.get("threads")
    if isinstance(measured, int) and measured >= 1:
        return measured, (
            f"Serving with {_threads(measured)}, as profile {profile.name!r} was measured; "
            "--threads sets another number."
        )
    here = _threads(torch.get_num_threads())
    if device.type != "cpu":
        return None, f"Serving with {here} of the processor, torch's own number."
    return None, (
        f"Warning: profile {profile.name!r} does not say with how many threads it was measured; "
        f"serving with {here}, torch's own number, which --threads changes."
    )


def versions_here() -> dict[str, str]:
    """Versions of the packages at work; a run could not say what made it without them."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise InputError(
                f"The package {name} is not installed here, so the run could not say which "
                "version served it; install this project with its extra 'calibration'.",
                "serve",
            ) from None
    python = ".".join(platform.python_version_tuple()[:2])
    return {"helios-sim": __version__, **found, "python": python}


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
    )
    facts = _play(prepared, host, energy, clock, backend)
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
        energy.at,
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
        "num_dropped": prepared.requests.num_dropped,
        "num_shortened": prepared.num_shortened,
        TOKENIZERS: [prepared.prompts.tokenizer],
        **user_figures(run, prepared.requests.num_users, prepared.requests.arrival_s),
    }
    traces = served_traces(
        judged,
        {card.name: card.exit_layers for card in host.steward.cards.values()},
        host.lives,
        domains,
        prepared.requests.domains,
    )

    def finish(folder: Path) -> None:
        write_extras(host, judgement, folder)
        write_traces(traces, folder / TRACES_FILE)
        (folder / REPORT_FILE).write_text(render([run], [summary]), encoding="utf-8", newline="\n")

    return Served(
        write_run(run, summary, out, finish),
        summary,
        facts.get("slowdown"),
        tuple(other_kernels(prepared.room.profile, weights.kernels)),
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


def check_checkpoint(name: str, found: Checkpoint, profile: Profile) -> None:
    """Refuse a checkpoint that is another model than the profile's of that name."""
    expected = profile.model(name)
    model = expected.model
    settings = found.settings
    # Exits that a checkpoint does not name itself go where they are asked for, and confidence that
    # it does not name is the default.
    confidence = Confidence() if settings is None else settings.confidence
    if confidence.is_calibrated:
        _check_maps(found, confidence)
    facts: list[tuple[str, object, object]] = [
        ("shape", *_differences(shape_of(found.config), model.shape)),
        ("tokenizer", found.tokenizer, model.tokenizer),
        ("confidence", name_of(confidence), expected.confidence.kind),
    ]
    if settings is not None and not settings.exits_chosen:
        facts.append(("exit_layers", tuple(settings.exit_layers), tuple(model.exit_layers)))
    for what, have, want in facts:
        if have != want:
            raise InputError(
                f"The checkpoint's {what} is {_plain(have)} and that of {name!r} in profile "
                f"{profile.name!r} is {_plain(want)}; serve the checkpoint that was measured, or "
                "measure this one.",
                str(found.folder),
            )
    _check_weights(name, found, profile)


def _check_weights(name: str, found: Checkpoint, profile: Profile) -> None:
    """Refuse weights that are not those measured, as far as the guards of both tell."""
    models = profile.document.get("measurement", {}).get("models", {})
    kept = models.get(name, {}).get("guard")
    own = found.settings.guard if found.settings is not None else None
    if kept is None or own is None:
        return
    try:
        measured = Guard.from_json(kept)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            "This is no guard as fit writes it; fit the readings again.",
            f"{profile.folder / PROFILE_FILE}, measurement.models.{name}.guard",
        ) from error
    if not own.contradicts(measured):
        return
    raise InputError(
        f"The logits of these weights are not those of the weights of {name!r} that profile "
        f"{profile.name!r} was measured with, so its exits are others; serve the checkpoint that "
        "was measured, or measure this one.",
        str(found.folder),
    )


def _differences(have: ModelShape, want: ModelShape) -> tuple[str, str]:
    """What of two shapes differs, of each by name; nothing of equal ones."""
    names = [one.name for one in fields(have) if getattr(have, one.name) != getattr(want, one.name)]
    told = (", ".join(f"{name} {getattr(one, name)}" for name in names) for one in (have, want))
    return next(told), next(told)


def _check_maps(found: Checkpoint, confidence: Confidence) -> None:
    """Refuse a calibration that is of single domains only."""
    if ALL_DOMAINS not in confidence.maps:
        raise InputError(
            f"Its confidence is calibrated for {', '.join(sorted(confidence.maps))} alone, and a "
            "server does not know which text it meets; calibrate it for all domains with "
            "helios-calibrate confidence.",
            str(found.folder),
        )


def cut_workload(
    scenario: Scenario, base_dir: Path, domains: tuple[str, ...], settings: ServeSettings
) -> tuple[Scenario, Requests]:
    """The scenario with its workload cut to what is asked for, and its requests.

    The cut stands in the run's scenario, so that simulating that one meets the same requests.
    """
    requests = generate(scenario.workload, scenario.seed, base_dir, domains)
    keep = len(requests)
    if settings.limit is not None:
        keep = min(keep, settings.limit)
    if settings.duration_s is not None:
        if requests.num_users is not None:
            raise InputError(
                "When a closed loop's requests arrive is not known before it is served, so "
                "seconds cannot cut it; give --limit instead.",
                "--duration",
            )
        keep = min(keep, int((requests.arrival_s < settings.duration_s).sum()))
    if keep == len(requests):
        return scenario, requests
    if keep == 0:
        raise InputError(
            f"No request arrives within {settings.duration_s:g} s; the first comes at "
            f"{requests.arrival_s[0]:g} s.",
            "--duration",
        )
    if requests.num_users is not None and keep < requests.num_users:
        raise InputError(
            f"{keep} requests are fewer than the closed loop's {requests.num_users} users, "
            "each of whom sends at least one; give a higher --limit, or fewer num_users.",
            "--limit",
        )
    workload = scenario.workload.model_copy(update={"num_requests": keep, "duration_s": None})
    cut = scenario.model_copy(update={"workload": workload})
    return cut, generate(workload, cut.seed, base_dir, domains)


def _longest_context(room: Room) -> int:
    """Positions of the candidate that has the most: beyond them a request is refused by all."""
    return max(room.profile.model(name).model.shape.max_positions for name in room.candidates)


def _check_serving(scenario: Scenario, where: str) -> None:
    serving = scenario.serving
    if serving.batching == "chunked":
        raise InputError(
            'batching is "chunked"; the real backend serves "continuous" and "static" batches, so '
            "choose one of these.",
            f"{where}, serving.batching",
        )
    if scenario.fleet.num_replicas != 1:
        raise InputError(
            f"num_replicas is {scenario.fleet.num_replicas}; the real backend serves one replica, "
            "so set it to 1 and divide the rate.",
            f"{where}, fleet.num_replicas",
        )


def _folder_of(name: str, folders: Mapping[str, Path]) -> Path:
    if name not in folders:
        given = ", ".join(map(repr, folders)) or "none"
        raise InputError(
            f"The scenario's candidate {name!r} has no checkpoint; given are {given}. Add its "
            "folder, or name in fleet.candidates those that have one.",
            "--checkpoints",
        )
    return folders[name]


def _reread_all(prepared: Prepared, host: Host, weights: CheckpointWeights) -> dict[str, Reread]:
    """Every candidate's word on the served text, one candidate in memory at a time."""
    found = {}
    for name in prepared.room.candidates:
        model = weights.whole(name)
        found[name] = reread(model, host.lives, prepared.settings.free_running)
        model.unload()
    return found


def _choose(scenario: Scenario, names: Sequence[str]) -> list[PolicySettings]:
    """The scenario's policies of these labels, all without any."""
    if not names:
        return list(scenario.policy)
    known = {policy.name: policy for policy in scenario.policy}
    for name in names:
        if name not in known:
            raise InputError(
                f"The scenario has no policy {name!r}; it has {', '.join(map(repr, known))}.",
                "--policy",
            )
    return [known[name] for name in names]


def places_of(out: Path, labels: Sequence[str], repeat: int) -> list[Path]:
    """A folder for every run, in order, called as `helios simulate` calls it."""
    folders = [out / name for name in folder_names(labels)] if len(labels) > 1 else [out]
    if repeat == 1:
        return folders
    return [folder / f"repeat-{k}" for folder in folders for k in range(1, repeat + 1)]


def _dtype(room: Room) -> torch.dtype:
    """The precision that the profile was measured in, and counts bytes in."""
    sizes = {room.profile.model(name).model.bytes_per_param for name in room.candidates}
    if len(sizes) != 1 or not sizes <= set(_DTYPES):
        raise InputError(
            f"The candidates have {sorted(sizes)} bytes a parameter in profile "
            f"{room.profile.name!r}; models of 4 (float32) or 2 (bfloat16) can be served, all "
            "candidates alike.",
            "fleet.profile",
        )
    size = sizes.pop()
    for name in room.candidates:
        kv_size = room.profile.model(name).model.bytes_per_kv_element
        if kv_size != size:
            raise InputError(
                f"{name!r} has {size} bytes a parameter and {kv_size} bytes a KV element in "
                f"profile {room.profile.name!r}; a KV cache is served in the precision of the "
                "weights, so both must be alike.",
                "fleet.profile",
            )
    named = room.profile.provenance.environment.get("dtype")
    if named is None:
        return _DTYPES[size]
    found = DTYPES.get(str(named))
    if found is None or found.itemsize != size:
        fitting = [name for name, dtype in DTYPES.items() if dtype.itemsize == size]
        raise InputError(
            f"Profile {room.profile.name!r} was measured in {named!r} and has {size} bytes a "
            f"parameter; of that size {', '.join(fitting)} can be served.",
            "fleet.profile, provenance.environment.dtype",
        )
    return found


def weight_settings(prepared: Prepared) -> WeightSettings:
    """How the candidates of a scenario are held."""
    return WeightSettings(
        device=prepared.device,
        dtype=prepared.dtype,
        kv=prepared.kv,
        max_tokens=_longest_row(prepared.texts),
        graphs=prepared.settings.graphs and prepared.device.type == "cuda",
        free_running=prepared.settings.free_running,
    )


def _longest_row(texts: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest row that is to be served."""
    return max((len(text) - 1 for text in texts if text), default=1)


def _said(outcome: Any) -> dict[str, Any]:
    """What the meter's window came to, as plain data."""
    if isinstance(outcome, Absence):
        return {"absent": outcome.reason}
    fields = {name: value for name, value in vars(outcome).items() if value is not None}
    return {
        name: value
        for name, value in fields.items()
        if not (isinstance(value, float) and math.isnan(value))
    }


def _plain(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _silence(doing: str, share: float) -> None:
    """Tell nobody."""


def _unheard(text: str) -> None:
    """Tell nobody."""


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number != 1 else ''}"
