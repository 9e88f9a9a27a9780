"""What if: a small grid of settings, every policy of the scenario, side by side."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError, UnknownOption, did_you_mean
from helios_sim.policy.registry import policy_names, policy_options
from helios_sim.profile import Profile, load_profile
from helios_sim.scenario import PolicySettings, Scenario
from helios_sim.search.means import Means, clauses_beyond, mean_figures
from helios_sim.search.points import Point, point_of
from helios_sim.search.space import with_settings
from helios_sim.search.studies import Outcome, Study, figures_of
from helios_sim.toml import toml_value

MAX_CELLS: Final = 1000


@dataclass(frozen=True)
class Cell:
    """Settings, a policy, and what they give.

    `why` says what cannot be, `beyond` what the profile can only extrapolate.
    """

    values: dict[str, Any]
    policy: str
    means: Means | None = None
    saturation: str = ""
    why: str = ""
    beyond: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A heading: the settings that vary, and the policy."""
        settings = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in self.values.items())
        return f"{self.policy}: {settings}" if settings else self.policy


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=a,b,c`; values in TOML syntax, or text; commas inside brackets do not part."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, listed = text.partition("=")
        key = key.strip()
        parts = [part for part in _parts(listed) if part]
        if not separator or not key or not parts:
            raise InputError(
                f"{text!r} cannot be read; write key=a,b,c, such as fleet.num_replicas=1,2,4.",
                "--vary",
            )
        if key in found:
            raise InputError(f"{key!r} is varied twice.", "--vary")
        found[key] = [toml_value(part) for part in parts]
    return found


def _parts(text: str) -> list[str]:
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()]


def whatif_studies(
    scenario: Scenario,
    base_dir: Path,
    where: str,
    policies: Sequence[PolicySettings],
    vary: dict[str, list[Any]],
    replications: int,
) -> list[Study[Cell]]:
    """One study a cell of the grid; settings that cannot be are refused at once."""
    num = len(policies)
    for listed in vary.values():
        num *= len(listed)
    if num > MAX_CELLS:
        raise InputError(
            f"The grid has {num:,} cells; at most {MAX_CELLS:,} are allowed. helios tune searches "
            "larger spaces.",
            "--vary",
        )
    taken = dict.fromkeys(vary, False)
    cells: list[Cell] = []
    studies = []
    for combination in product(*vary.values()):
        values = dict(zip(vary, combination, strict=True))
        for policy in policies:
            own = scenario.model_copy(
                update={"policy": (policy,), "plan": None, "search": None, "published": ()}
            )
            mine = {}
            for key, value in values.items():
                if not _is_for(key, policy, own, base_dir, value):
                    continue
                taken[key] = True
                mine[key] = value
            changed = with_settings(own, mine, base_dir, where)
            cell = Cell(mine, policy.name)
            if cell in cells:
                continue
            cells.append(cell)
            studies.append(
                Study(cell.name, _steps(cell, changed, base_dir, replications), replications)
            )
    for key, known in taken.items():
        if not known:
            option = key.partition(".")[2]
            raise InputError(
                f"None of the policies {', '.join(one.name for one in policies)} has the option "
                f"{option!r}.{did_you_mean(option, _options(policies))}",
                f"--vary {key}",
            )
    return studies


def profiles_of(scenario: Scenario, base_dir: Path, cells: Sequence[Cell]) -> list[Profile]:
    """The profiles that the cells of a grid stand on."""
    own = scenario.fleet.profile
    names = {str(one.values.get("fleet.profile", own)) for one in cells if one.means is not None}
    return [load_profile(name, base_dir) for name in sorted(names)]


def _is_for(key: str, policy: PolicySettings, own: Scenario, base_dir: Path, value: Any) -> bool:
    """Whether a policy's option is one of this policy's; other settings are everybody's."""
    if not key.startswith("policy."):
        return True
    try:
        with_settings(own, {key: value}, base_dir, "--vary")
    except UnknownOption:
        return False
    except InputError:
        # The option is there; what is wrong with its value is said where the cell is made.
        return True
    return True


def _options(policies: Sequence[PolicySettings]) -> list[str]:
    names: list[str] = []
    for policy in policies:
        if policy.use in policy_names():
            names += policy_options(policy.use)
    return names


def _steps(
    cell: Cell, scenario: Scenario, base_dir: Path, replications: int
) -> Generator[Sequence[Point], list[Outcome], Cell]:
    points = [
        point_of(scenario.model_copy(update={"seed": scenario.seed + place}), base_dir)
        for place in range(replications)
    ]
    outcomes = yield points
    for outcome in outcomes:
        if isinstance(outcome, InputError):
            return Cell(cell.values, cell.policy, why=str(outcome))
    figures = figures_of(outcomes)
    worst = max(
        (one["summary"]["saturation"] for one in figures),
        key=("stable", "backlogged", "overloaded").index,
    )
    means = mean_figures(figures)
    return Cell(cell.values, cell.policy, means, worst, beyond=clauses_beyond(figures))
