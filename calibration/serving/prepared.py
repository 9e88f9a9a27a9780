"""What a scenario needs to be served, checked and brought together before anything is loaded."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

from calibration.device import DTYPES, device_of
from calibration.model.checkpoint import Checkpoint, Guard, named_folders, open_checkpoint
from calibration.model.confidence import ALL_DOMAINS, Confidence
from calibration.model.family import shape_of
from calibration.serving.prompts import Prompts, read_prompts, shared_tokenizer
from calibration.serving.weights import KvChoice, KvKind, WeightSettings, choose_kv
from calibration.training.thresholds import name_of
from helios_sim import __version__
from helios_sim.cards import Room, check_room, expecting, room_of
from helios_sim.errors import InputError
from helios_sim.exits import load_traces
from helios_sim.model import ModelShape
from helios_sim.policy.contract import Policy
from helios_sim.policy.registry import make_policy
from helios_sim.profile import PROFILE_FILE, Profile
from helios_sim.scenario import PolicySettings, Scenario, check_warmup, load_scenario
from helios_sim.workload.requests import Requests, fit_context, generate

_PACKAGES: Final = ("torch", "transformers", "safetensors", "numpy", "polars")

_DTYPES: Final = {4: torch.float32, 2: torch.bfloat16}
"""What bytes a parameter are where a profile does not name its type."""


@dataclass(frozen=True)
class ServeSettings:
    """How a scenario is served.

    `checkpoints` are checkpoint folders, or folders of several. `limit` and `duration_s` cut the
    workload to its first requests. `repeat` serves each policy so often. Without `threads` a
    processor gets as many as the profile was measured with. With `overwrite` runs that were served
    for real may be replaced.
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
    overwrite: bool = False


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
    # Of the exits that it has, a profile may keep fewer.
    if settings is not None and not settings.exits_chosen:
        layers = tuple(settings.exit_layers), tuple(model.exit_layers)
        if not set(layers[1]) <= set(layers[0]):
            facts.append(("exit_layers", *layers))
    for what, have, want in facts:
        if have != want:
            raise InputError(
                f"The checkpoint's {what} is {_plain(have)} and that of {name!r} in profile "
                f"{profile.name!r} is {_plain(want)}; serve the checkpoint that was measured, or "
                "measure this one.",
                str(found.folder),
            )
    _check_same_maps(name, found, confidence, profile)
    _check_weights(name, found, profile)


def _check_same_maps(
    name: str, found: Checkpoint, confidence: Confidence, profile: Profile
) -> None:
    """Refuse maps other than those that the profile's exits were traced with, where it tells."""
    held = confidence.maps_sha256
    traces = profile.document.get("measurement", {}).get("exit_traces")
    candidates = traces.get("candidates") if isinstance(traces, Mapping) else None
    said = candidates.get(name) if isinstance(candidates, Mapping) else None
    traced = said.get("maps_sha256") if isinstance(said, Mapping) else None
    if held is None or traced is None or held == traced:
        return
    raise InputError(
        f"The calibration maps of the checkpoint's confidence are not those that the exits of "
        f"{name!r} in profile {profile.name!r} were traced with, so it leaves elsewhere; trace it "
        "again and fit the profile from these traces, or give the checkpoint the early_exit.json "
        "that was traced.",
        str(found.folder),
    )


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


def chosen_policies(scenario: Scenario, names: Sequence[str]) -> list[PolicySettings]:
    """The scenario's policies of these labels or kinds, all without any."""
    if not names:
        return list(scenario.policy)
    chosen: list[PolicySettings] = []
    for name in names:
        matching = scenario.policies_called(name)
        if not matching:
            known = ", ".join(repr(policy.name) for policy in scenario.policy)
            raise InputError(f"The scenario has no policy {name!r}; it has {known}.", "--policy")
        chosen += [policy for policy in matching if policy not in chosen]
    return chosen


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


def _plain(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number != 1 else ''}"
