"""The two sides of a comparison: real runs of one scenario, repeated, and the simulated one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError

from helios_sim.errors import InputError
from helios_sim.policy.registry import settled_options
from helios_sim.profiles.files import ASSUMED
from helios_sim.runs.latencies import columns_of
from helios_sim.runs.metrics import summarise
from helios_sim.runs.records import (
    MEASURED,
    SCENARIO_FILE,
    TOTALS_FILE,
    RunData,
    flat_items,
    read_run,
)
from helios_sim.scenario import PolicySettings, Scenario, of_a_run
from helios_sim.settings.strict import first_flaw

SIMULATED: Final = "simulated"
REPEAT: Final = re.compile(r"repeat-(\d+)")

_ASKED: Final = ("workload", "serving", "fleet", "slo")
"""Tables of a scenario in which both sides must agree; the rest says how it is measured or told."""
_MAY_DIFFER: Final = ("fleet.profile", "fleet.assume.")
"""Beginnings of keys that tell one side which numbers to predict with, and no more."""


@dataclass(frozen=True)
class Side:
    """A run with its figures, both sides' computed alike."""

    path: Path
    run: RunData
    summary: dict[str, Any]

    @property
    def slowdown(self) -> float | None:
        """How many times slower the machine was than its profile says; None where nobody looked."""
        return self._told("slowdown")

    @property
    def core_during_s(self) -> float | None:
        """What known arithmetic took between iterations, on average; None where nobody looked."""
        found = self.run.environment.get("pace_during")
        seconds = found.get("core_s") if isinstance(found, Mapping) else None
        return float(seconds) if isinstance(seconds, int | float) else None

    @property
    def pace_factor(self) -> float | None:
        """How many times longer known arithmetic took beside serving than beside measuring.

        None where nobody looked during the run, or while the profile was measured.
        """
        return self._told("pace_factor")

    def _told(self, name: str) -> float | None:
        found = self.run.environment.get(name)
        return float(found) if isinstance(found, int | float) else None


@dataclass(frozen=True)
class Sides:
    """Real runs, in the order given, and the simulated run of the same scenario.

    `scenario` is the simulated run's; `notes` say in words what differs and is allowed to.
    """

    reals: tuple[Side, ...]
    simulated: Side
    scenario: Scenario
    notes: tuple[str, ...]

    @property
    def typical(self) -> Side:
        """The real run whose mean E2E is in the middle: the one that causes are looked for in."""
        known = [side for side in self.reals if side.summary["mean_e2el_ms"] is not None]
        ordered = sorted(known or self.reals, key=lambda side: side.summary["mean_e2el_ms"] or 0.0)
        return ordered[(len(ordered) - 1) // 2]


def run_folders(path: Path) -> tuple[Path, ...]:
    """The run that a folder is, or the runs `repeat-1`, `repeat-2`, ... that it holds."""
    if (path / TOTALS_FILE).is_file() or not path.is_dir():
        return (path,)
    repeats = {
        int(found[1]): entry
        for entry in path.iterdir()
        if entry.is_dir() and (found := REPEAT.fullmatch(entry.name))
    }
    return tuple(repeats[number] for number in sorted(repeats)) or (path,)


def sides_given(
    runs: Sequence[Path], simulated: Path | None
) -> tuple[tuple[Path, ...], Path] | None:
    """Which of the folders given are the real side and which is the simulated run.

    None where all runs are of one origin and none is named the simulated one: then they are
    policies to compare with each other, not two sides.
    """
    if simulated is not None:
        return tuple(runs), simulated
    origins = [_origin(path) for path in runs]
    ours = [path for path, origin in zip(runs, origins, strict=True) if origin != MEASURED]
    real = tuple(path for path, origin in zip(runs, origins, strict=True) if origin == MEASURED)
    if not real or not ours:
        return None
    if len(ours) > 1:
        raise InputError(
            f"Real runs and {len(ours)} simulated ones were given; real runs are compared with one "
            "simulated run, so name it with --simulated.",
            "compare",
        )
    return real, ours[0]


def _origin(path: Path) -> str:
    """Where a run, or the first of its repeats, comes from."""
    folder = run_folders(path)[0]
    try:
        facts = json.loads((folder / TOTALS_FILE).read_text(encoding="utf-8"))
        return str(facts["origin"])
    except (OSError, ValueError, TypeError, KeyError):
        # Reading the whole run says in words what is wrong with it.
        return read_run(folder).origin


def read_sides(
    reals: Sequence[Path],
    simulated: Path,
    *,
    allow_simulated: bool = False,
    base_dir: Path | None = None,
) -> Sides:
    """Read both sides and refuse, with the reason, what cannot be compared.

    `allow_simulated` takes simulated runs as the real side, to see what a changed profile does.
    `base_dir` is the folder that the scenario's files are relative to; a user's policies are there.
    """
    folders = [folder for path in reals for folder in run_folders(path)]
    if not folders:
        raise InputError("No real run was given; a comparison needs at least one.", "compare")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("A real run was given twice; repeats are runs of their own.", "compare")
    ours = read_run(simulated)
    if ours.origin != SIMULATED:
        raise InputError(
            f"The run's origin is {ours.origin!r}; the simulated side must be {SIMULATED!r}.",
            str(simulated),
        )
    scenario = scenario_of(ours, simulated)
    notes: list[str] = []
    sides = []
    for folder in folders:
        run = read_run(folder)
        if run.origin != MEASURED and not allow_simulated:
            raise InputError(
                f"The run's origin is {run.origin!r}; the real side must be {MEASURED!r}, or give "
                "--allow-simulated to take simulated runs for it.",
                str(folder),
            )
        _check_same_question(run, folder, ours, simulated, base_dir)
        _check_same_requests(run, folder, ours)
        notes += _differences(run, folder, ours)
        sides.append(_side(folder, run, scenario))
    return Sides(
        tuple(sides), _side(simulated, ours, scenario), scenario, tuple(dict.fromkeys(notes))
    )


def scenario_of(run: RunData, folder: Path) -> Scenario:
    """The scenario a run answers, as settings."""
    asked = of_a_run(run.scenario)
    try:
        return Scenario.model_validate(asked)
    except ValidationError as error:
        raise first_flaw(error, Scenario, asked, str(folder / SCENARIO_FILE)) from None


def policy_of(run: RunData, scenario: Scenario) -> PolicySettings:
    """The policy of a scenario that a run is of: by its label, else by its kind."""
    named = [one for one in scenario.policy if one.name == run.label]
    alike = [one for one in scenario.policy if one.use == run.policy]
    return (named or alike or list(scenario.policy))[0]


def _side(folder: Path, run: RunData, scenario: Scenario) -> Side:
    measure = scenario.measure
    summary = summarise(run, scenario.slo_spec, measure.warmup_s, measure.warmup_requests)
    return Side(folder, run, summary)


def _question(run: RunData, folder: Path, base_dir: Path | None) -> dict[str, str]:
    """What the run was asked, as dotted keys and texts: its policy with options, and the tables.

    An option that the run leaves out has its default, where the policy's class is there to tell.
    """
    scenario = scenario_of(run, folder)
    plain = scenario.model_dump(mode="json", exclude_none=True)
    policy = policy_of(run, scenario)
    asked: dict[str, Any] = {name: plain.get(name, {}) for name in _ASKED}
    options = policy.options
    with suppress(InputError):
        options = settled_options(policy.use, options, search_path=base_dir)
    asked["policy"] = {"use": policy.use} | options
    return dict(flat_items(asked))


def _check_same_question(
    run: RunData, folder: Path, ours: RunData, simulated: Path, base_dir: Path | None
) -> None:
    if run.seed != ours.seed:
        raise InputError(
            f"The run has seed {run.seed} and the simulated one has {ours.seed}, so their requests "
            "are not the same; simulate with the seed of the real run.",
            str(folder),
        )
    theirs, own = _question(run, folder, base_dir), _question(ours, simulated, base_dir)
    for key in sorted({*theirs, *own}):
        if theirs.get(key) != own.get(key) and not key.startswith(_MAY_DIFFER):
            raise InputError(
                f"The scenarios differ in {key}: {theirs.get(key, 'unset')} in the real run and "
                f"{own.get(key, 'unset')} in the simulated one; both sides must answer the same "
                "question.",
                str(folder),
            )


def _check_same_requests(run: RunData, folder: Path, ours: RunData) -> None:
    if run.requests.height != ours.requests.height:
        raise InputError(
            f"The run holds {run.requests.height:,} requests and the simulated one holds "
            f"{ours.requests.height:,}; both sides must serve the same requests.",
            str(folder),
        )
    names = ("request_id", "domain", "prompt_tokens", "output_tokens")
    theirs = run.requests.select(names).sort("request_id")
    own = ours.requests.select(names).sort("request_id")
    for name in names:
        if not theirs[name].equals(own[name]):
            place = int((theirs[name] != own[name]).arg_max() or 0)
            raise InputError(
                f"The column {name} differs from that of the simulated run, first in row {place} "
                f"({theirs[name][place]} against {own[name][place]}); both sides must serve the "
                "same requests.",
                str(folder / "requests.parquet"),
            )


def _differences(run: RunData, folder: Path, ours: RunData) -> list[str]:
    """What differs and is allowed to."""
    notes = []
    theirs, own = hash_of(run), hash_of(ours)
    if theirs and own and theirs != own:
        notes.append(
            f"{folder.name} knew the profile {theirs[:12]}, the simulated run used {own[:12]}: "
            "what the policy was told may differ."
        )
    for who, one in ((folder.name, run), ("the simulated run", ours)):
        if one.environment.get(ASSUMED):
            notes.append(f"Assumed in {who}: {', '.join(one.environment[ASSUMED])}.")
    if not ours.closed_loop:
        late_s = np.abs(columns_of(run).arrival_s - columns_of(ours).arrival_s)
        if float(late_s.max()) > 1e-3:
            notes.append(
                f"Requests of {folder.name} were sent up to {1e3 * float(late_s.max()):.3g} ms "
                f"away from their time, {1e3 * float(late_s.mean()):.3g} ms on average."
            )
    return notes


def hash_of(run: RunData) -> str:
    """The hash of the profile that a run was made with; empty where it does not say."""
    return str(run.environment.get("profile_hash") or "")
