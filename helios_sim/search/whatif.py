"""What if: a small grid of settings, every policy of the scenario, side by side."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from helios_sim.errors import InputError, UnknownOption, did_you_mean
from helios_sim.policy.registry import policy_names, policy_options
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile
from helios_sim.runs.comparison import carry_alike, nearly_equal
from helios_sim.scenario import PolicySettings, Scenario
from helios_sim.search.goals import Goal
from helios_sim.search.means import Means, clauses_beyond, mean_figures, mix_of, models_served
from helios_sim.search.points import Point, point_of
from helios_sim.search.space import with_settings
from helios_sim.search.studies import Outcome, Study, figures_of
from helios_sim.search.verdict import half_width
from helios_sim.settings.toml import toml_value

MAX_CELLS: Final = 1000
GOODPUT: Final = Goal("goodput", "request_goodput", "higher", "requests/s")
MAIN: Final = (
    GOODPUT,
    Goal("throughput", "output_throughput", "higher", "tokens/s"),
    Goal("TTFT p99", "p99_ttft_ms", "lower", "ms"),
    Goal("TPOT p50", "median_tpot_ms", "lower", "ms"),
    Goal("energy a token", "energy_per_output_token", "lower", "J", 1e-3),
)
"""The figures by which cells are compared; throughput only where there is no goodput."""


@dataclass(frozen=True)
class Cell:
    """Settings, a policy, and what they give.

    `why` says what cannot be, `beyond` what the profile can only extrapolate. `runs` are the main
    figures of each seed, which is the same in every cell; `models` served in them. `mix` has
    the share of the requests that each domain of text has.
    """

    values: dict[str, Any]
    policy: str
    means: Means = field(default_factory=dict)
    saturation: str = ""
    why: str = ""
    beyond: tuple[str, ...] = ()
    runs: tuple[Means, ...] = ()
    models: tuple[str, ...] = ()
    mix: dict[str, float] = field(default_factory=dict)

    @property
    def can_be(self) -> bool:
        """Whether the settings go together and were run."""
        return not self.why

    @property
    def name(self) -> str:
        """A heading: the settings that vary, and the policy."""
        settings = ", ".join(
            f"{key.split('.')[-1]} {in_short(value)}" for key, value in self.values.items()
        )
        return f"{self.policy}: {settings}" if settings else self.policy


def in_short(value: Any, left_out: Collection[str] = ()) -> str:
    """A setting's value as TOML has it, without quotes and some keys of a table.

    A large float has an exponent where that tells all of it.
    """
    if isinstance(value, Mapping):
        parts = (f"{key}={in_short(one)}" for key, one in value.items() if key not in left_out)
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_short, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and abs(value) >= 1e6 and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def values_in_short(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """The values of each cell in short, tables without what they have in common in all cells."""
    found: list[dict[str, str]] = [{} for _ in cells]
    for key in dict.fromkeys(key for cell in cells for key in cell.values):
        values = [cell.values[key] for cell in cells if key in cell.values]
        common: set[str] = set()
        if all(isinstance(one, Mapping) for one in values):
            common = {
                part for part in values[0] if all(_has_same(values[0], one, part) for one in values)
            }
        if any(common.issuperset(one) for one in values if isinstance(one, Mapping)):
            common = set()
        for told, cell in zip(found, cells, strict=True):
            if key in cell.values:
                told[key] = in_short(cell.values[key], common)
    return found


def _has_same(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return key in other and one[key] == other[key]


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
    """One study a cell of the grid; a value that no cell can have is refused at once."""
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
    able: list[Cell] = []
    refused: list[tuple[Cell, InputError]] = []
    studies = []
    for combination in product(*vary.values()):
        values = dict(zip(vary, combination, strict=True))
        for policy in policies:
            own = scenario.model_copy(
                update={"policy": (policy,), "plan": None, "search": None, "published": ()}
            )
            mine = {}
            for key, value in values.items():
                if not _is_for(key, own, base_dir, value):
                    continue
                taken[key] = True
                mine[key] = value
            cell = Cell(mine, policy.name)
            if cell in cells:
                continue
            cells.append(cell)
            try:
                changed = with_settings(own, mine, base_dir, where)
            except InputError as error:
                refused.append((cell, error))
                steps = _refused(replace(cell, why=str(error)))
            else:
                able.append(cell)
                steps = _steps(cell, changed, base_dir, replications)
            studies.append(Study(steps, replications))
    _check_values(able, refused)
    for key, known in taken.items():
        if not known:
            option = key.partition(".")[2]
            raise InputError(
                f"None of the policies {', '.join(one.name for one in policies)} has the option "
                f"{option!r}.{did_you_mean(option, _options(policies))}",
                f"--vary {key}",
            )
    return studies


def _check_values(able: Sequence[Cell], refused: Sequence[tuple[Cell, InputError]]) -> None:
    """Raise what is wrong with a value that no cell can have: it is a mistake, not an answer."""
    for cell, error in refused:
        for key, value in cell.values.items():
            if all(one.values.get(key) != value for one in able):
                raise error


def profiles_of(scenario: Scenario, base_dir: Path, cells: Sequence[Cell]) -> list[Profile]:
    """The profiles that the cells of a grid stand on."""
    own = scenario.fleet.profile
    names = {str(one.values.get("fleet.profile", own)) for one in cells if one.can_be}
    return [load_profile(name, base_dir, scenario.fleet.assume) for name in sorted(names)]


def _is_for(key: str, own: Scenario, base_dir: Path, value: Any) -> bool:
    """Whether a policy's option is one of this policy's; other settings are everybody's."""
    if not key.startswith("policy."):
        return True
    try:
        with_settings(own, {key: value}, base_dir, "--vary")
    except InputError as error:
        # What is wrong with the value of an option is said where the cell is made.
        return not isinstance(error, UnknownOption)
    return True


def _options(policies: Sequence[PolicySettings]) -> list[str]:
    names: list[str] = []
    for policy in policies:
        if policy.use in policy_names():
            names += policy_options(policy.use)
    return names


def _refused(cell: Cell) -> Generator[Sequence[Point], list[Outcome], Cell]:
    """A cell whose settings cannot be, which asks for nothing."""
    yield from ()
    return cell


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
            return replace(cell, why=str(outcome))
    figures = figures_of(outcomes)
    worst = max(
        (one["summary"]["saturation"] for one in figures),
        key=("stable", "backlogged", "overloaded").index,
    )
    return replace(
        cell,
        means=mean_figures(figures),
        saturation=worst,
        beyond=clauses_beyond(figures),
        runs=tuple({goal.key: one["summary"].get(goal.key) for goal in MAIN} for one in figures),
        models=models_served(figures),
        mix=mix_of(figures),
    )


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key in words, with as many of its last parts as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            end = parts[-count:]
            if not any(other != key and other.split(".")[-count:] == end for other in keys):
                break
        names[key] = " ".join(end).replace("_", " ")
    return names


def short_names(cells: Sequence[Cell]) -> list[str]:
    """The cells by what tells them apart alone."""
    keys = list(dict.fromkeys(key for cell in cells for key in cell.values))
    differing = [key for key in keys if len({str(cell.values.get(key)) for cell in cells}) > 1]
    words = short_keys(keys)
    has_policies = len({cell.policy for cell in cells}) > 1
    names = []
    for cell, told in zip(cells, values_in_short(cells), strict=True):
        parts = [cell.policy] if has_policies else []
        parts += [f"{words[key]} {told[key]}" for key in differing if key in told]
        names.append(" / ".join(parts) or cell.name)
    return names


def compared_by(cells: Sequence[Cell]) -> list[Goal]:
    """The main figures that some cell has."""
    known = [goal for goal in MAIN if any(cell.means.get(goal.key) is not None for cell in cells)]
    return [goal for goal in known if goal.name != "throughput" or GOODPUT not in known]


def leaders(cells: Sequence[Cell], goal: Goal) -> list[int]:
    """The places of the best cell by a figure and, behind it, of those level with it.

    Level is who is within 0.1 % of the best, or differs from it by no more than the 95 % interval
    of the differences seed by seed. Behind one that is not, nobody is, but for cells that carry the
    same load as the best and those before them: who beats a level cell is level.
    """
    known = [(place, cell.means.get(goal.key)) for place, cell in enumerate(cells)]
    costs = {place: goal.cost(mean) for place, mean in known if mean is not None}
    if not costs:
        return []
    best, *others = sorted(costs, key=lambda place: costs[place])
    num = sum(1 for _ in takewhile(lambda one: _is_level(cells[one], cells[best], goal), others))
    carrying = [at for at, one in enumerate(others, 1) if carries_as(cells[one], cells[best], goal)]
    return [best, *others[: max([num, *carrying])]]


def carries_as(one: Cell, other: Cell, goal: Goal) -> bool:
    """Whether two cells carry the same load, so that a rate differs by the drain alone."""
    summaries = ({**cell.means, "saturation": cell.saturation} for cell in (one, other))
    return carry_alike(goal.key, *summaries)


def _is_level(other: Cell, best: Cell, goal: Goal) -> bool:
    mean, least = other.means.get(goal.key), best.means.get(goal.key)
    if mean is not None and least is not None and nearly_equal(mean, least):
        return True
    pairs = [(one[goal.key], own[goal.key]) for one, own in zip(other.runs, best.runs, strict=True)]
    gaps = [goal.cost(one) - goal.cost(own) for one, own in pairs if None not in (one, own)]  # type: ignore[arg-type]
    return len(gaps) > 1 and fmean(gaps) <= half_width(gaps, 0.975)
