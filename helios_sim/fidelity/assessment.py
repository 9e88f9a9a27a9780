"""The whole comparison of real and simulated runs, as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError
from helios_sim.experiment import Experiment
from helios_sim.fidelity.figures import FigureRow, RequestRow, figure_rows, request_rows
from helios_sim.fidelity.recordings import read_iterations
from helios_sim.fidelity.sides import Side, Sides
from helios_sim.fidelity.swaps import Attribution, attribute, experiment_of
from helios_sim.fidelity.timing import TimingRow, predict, timing_rows
from helios_sim.runs.metrics import rounded_figures

SCHEMA_VERSION: Final = 2
FIDELITY_FILE: Final = "fidelity.json"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Fidelity:
    """How well a simulated run predicts real runs of its scenario.

    `timing` holds recorded beside predicted iteration times of one repeat, the typical one where
    it recorded any; empty where none did. `attribution` is None where it was not asked for.
    """

    sides: Sides
    figures: tuple[FigureRow, ...]
    requests: tuple[RequestRow, ...]
    timing: tuple[TimingRow, ...]
    attribution: Attribution | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know beside the figures."""
        more = () if self.attribution is None else self.attribution.notes
        return (*self.sides.notes, *more)

    def row(self, key: str) -> FigureRow | None:
        """The row of a figure; None where neither side has it."""
        return next((row for row in self.figures if row.key == key), None)

    def verdicts(self) -> dict[str, int]:
        """How many figures got each verdict."""
        told = [row.verdict for row in self.figures]
        return {verdict: told.count(verdict) for verdict in dict.fromkeys(told)}

    def data(self) -> dict[str, Any]:
        """The comparison as plain data, for JSON."""
        found: dict[str, Any] = rounded_figures(
            {
                "schema_version": SCHEMA_VERSION,
                "scenario": self.sides.scenario.name,
                "real": [_identity(side) for side in self.sides.reals],
                "simulated": _identity(self.sides.simulated),
                "num_repeats": len(self.sides.reals),
                "verdicts": self.verdicts(),
                "figures": [asdict(row) for row in self.figures],
                "requests": [asdict(row) for row in self.requests],
                "timing": [asdict(row) for row in self.timing],
                "attribution": _attribution(self.attribution),
                "notes": list(self.notes),
            }
        )
        return found


def assess(
    sides: Sides,
    base_dir: Path,
    *,
    attribution: bool = True,
    report: Progress | None = None,
) -> Fidelity:
    """Compare two sides; with attribution the scenario is simulated anew with each ingredient.

    `base_dir` is the folder that the scenario's files are relative to. Without attribution a
    profile that is not found is no error: iteration times are then left out.
    """
    experiment: Experiment | None = None
    try:
        experiment = experiment_of(sides, base_dir)
    except InputError as error:
        if attribution:
            raise InputError(
                f"{error.message} Attribution simulates the scenario again: name the folder that "
                "its files are relative to with --files, or leave it out with --no-attribution.",
                error.where,
            ) from error
    return Fidelity(
        sides=sides,
        figures=tuple(figure_rows(sides)),
        requests=tuple(request_rows(sides)),
        timing=() if experiment is None else _timing(sides, experiment),
        attribution=None
        if experiment is None or not attribution
        else attribute(sides, experiment, report),
    )


def json_text(fidelity: Fidelity) -> str:
    """The content of `fidelity.json`."""
    return json.dumps(fidelity.data(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _timing(sides: Sides, experiment: Experiment) -> tuple[TimingRow, ...]:
    """Iteration times of the typical repeat, or of the first that recorded any."""
    for side in (sides.typical, *sides.reals):
        iterations = read_iterations(side.path, side.run)
        if iterations is not None:
            setup = experiment.setup
            predicted = predict(iterations, setup.profile, setup.serving.max_batch)
            return tuple(timing_rows(iterations, predicted))
    return ()


def _identity(side: Side) -> dict[str, Any]:
    run = side.run
    return {
        "path": str(side.path),
        "label": run.label,
        "policy": run.policy,
        "origin": run.origin,
        "seed": run.seed,
        "profile_hash": run.environment.get("profile_hash"),
        "slowdown": side.slowdown,
        "pace_factor": side.pace_factor,
    }


def _attribution(attribution: Attribution | None) -> dict[str, Any] | None:
    if attribution is None:
        return None
    return {
        "repeat": attribution.repeat,
        "real": attribution.real,
        "swaps": [
            {
                **asdict(swap),
                "errors": {key: attribution.error(swap, key) for key in swap.figures},
            }
            for swap in attribution.swaps
        ],
        "chance": {
            **asdict(attribution.chance),
            "errors": {key: attribution.chance_errors(key) for key in attribution.chance.ends},
            "middle_errors": {
                key: attribution.middle_error(key) for key in attribution.chance.middles
            },
        },
        "causes": [asdict(cause) for cause in attribution.causes],
    }
