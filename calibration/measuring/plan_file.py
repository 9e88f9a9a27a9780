"""The plan of a measurement, kept beside its readings so that a resumed run goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from calibration.measuring.grid import Job, job_from
from calibration.measuring.readings import ENVIRONMENT_FILE
from calibration.model.checkpoint import Guard
from helios_sim.errors import InputError

PLAN_FILE: Final = "plan.json"


@dataclass(frozen=True)
class Grid:
    """Most rows and tokens of context that a model is measured with."""

    max_batch: int
    max_context: int

    def __str__(self) -> str:
        return f"{self.max_batch} rows of {self.max_context} tokens"


@dataclass(frozen=True)
class ModelPlan:
    """The trials of one model; `grid` is what memory left of the `asked` one."""

    exit_layers: tuple[int, ...]
    asked: Grid
    grid: Grid
    jobs: tuple[Job, ...]

    @property
    def deepest(self) -> int:
        """The most layers that a trial needs."""
        return max((layers for job in self.jobs for layers in job.depths), default=0)


@dataclass
class Plan:
    """The trials of every model, the sizes of loads, and what they belong to.

    `identity` names what two runs must share to be one measurement.
    """

    identity: dict[str, Any]
    models: dict[str, ModelPlan] = field(default_factory=dict)
    load_sizes: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return {
            "identity": self.identity,
            "load_sizes": list(self.load_sizes),
            "models": {
                name: {
                    "exit_layers": list(model.exit_layers),
                    "asked": [model.asked.max_batch, model.asked.max_context],
                    "grid": [model.grid.max_batch, model.grid.max_context],
                    "jobs": [job.as_dict() for job in model.jobs],
                }
                for name, model in self.models.items()
            },
        }


def earlier_plan(folder: Path, identity: Mapping[str, Any]) -> Plan:
    """The plan of the run that is resumed, an empty one where it had none yet.

    Raises `InputError` where it was another measurement, or the file cannot be read.
    """
    file = folder / PLAN_FILE
    if not file.is_file():
        return Plan(dict(identity))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        plan = Plan(
            dict(found["identity"]),
            {name: _model(node) for name, node in found["models"].items()},
            tuple(int(size) for size in found["load_sizes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The plan cannot be read ({error!r}); measure into another folder.", str(file)
        ) from error
    for key, now in identity.items():
        if plan.identity.get(key) != now:
            raise InputError(
                f"The readings were taken with {key} {plan.identity.get(key)!r} and {now!r} is "
                "asked for now; measure into another folder.",
                str(file),
            )
    return plan


def check_same(plan: ModelPlan, name: str, exit_layers: tuple[int, ...], asked: Grid) -> None:
    """Refuse to go on with a model's plan for other exits or another grid."""
    for what, before, now in (
        ("exits", list(plan.exit_layers), list(exit_layers)),
        ("at most", plan.asked, asked),
    ):
        if before != now:
            raise InputError(
                f"{name} was measured with {what} {before} and now has {now}; measure into "
                "another folder.",
                PLAN_FILE,
            )


def check_same_model(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with readings of another model than the one that has the name now.

    Both are descriptions as environment.json has them. What an earlier one does not say is taken
    to be the same.
    """
    for key in ("shape", "tokenizer", "heads", "weights"):
        if key in before and before[key] != now[key]:
            raise InputError(
                f"{name} was measured with {key} {before[key]} and now has {now[key]}; measure "
                "into another folder.",
                ENVIRONMENT_FILE,
            )
    try:
        guards = [Guard.from_json(one["guard"]) for one in (before, now) if one.get("guard")]
    except (KeyError, TypeError, ValueError, OverflowError):
        return
    if len(guards) == 2 and guards[0].contradicts(guards[1]):
        raise InputError(
            f"{name} was measured with other weights, whose logits are not those of these; measure "
            "into another folder.",
            ENVIRONMENT_FILE,
        )


def _model(node: Mapping[str, Any]) -> ModelPlan:
    return ModelPlan(
        tuple(int(layer) for layer in node["exit_layers"]),
        Grid(*(int(most) for most in node["asked"])),
        Grid(*(int(most) for most in node["grid"])),
        tuple(job_from(job) for job in node["jobs"]),
    )
