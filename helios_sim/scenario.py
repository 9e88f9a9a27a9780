"""A scenario file becomes frozen settings: strict keys, checked values, errors with their place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from helios_sim.errors import InputError, UnknownSetting
from helios_sim.policy.controller import rebatches_recomputed
from helios_sim.policy.registry import (
    make_policy,
    policy_names,
    policy_options,
    settled_options,
)
from helios_sim.profiles.assumptions import Assumed, flattened
from helios_sim.runs.records import TOTALS_FILE
from helios_sim.settings.questions import PlanSettings, Replicas, SearchSettings
from helios_sim.settings.slo import SloSpec, slo_from_table
from helios_sim.settings.strict import StrictSettings, as_tuple, first_flaw
from helios_sim.settings.toml import read_toml, toml_value
from helios_sim.workload.arrivals import ClosedArrivals
from helios_sim.workload.requests import Requests, WorkloadSettings

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Bytes = Annotated[int, Field(ge=0, le=10**15)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Router = Literal["round-robin", "random", "least-outstanding", "least-kv"]
DEFAULT_ROUTER: Final = "round-robin"


def _flat(given: Any) -> Any:
    return flattened(given) if isinstance(given, Mapping) else given


class FleetSettings(StrictSettings):
    """The `[fleet]` table: which profile, which candidates, how many replicas, how routed.

    `memory_bytes` overrides the profile's device; `reserve_bytes` is kept free of weights and KV.
    `assume` are values by the places of numbers in the profile that are taken otherwise.
    With `weights_start = "disk"` the first load of each model on a host comes from disk, later
    ones from host memory. Replicas of one host share its disk and its link.
    """

    profile: str
    candidates: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    num_replicas: Replicas = 1
    replicas_per_host: Count = 8
    router: Router = DEFAULT_ROUTER
    memory_bytes: Annotated[int | None, Field(ge=1, le=10**15)] = None
    memory_utilisation: Share = 0.9
    reserve_bytes: Bytes = 0
    weights_start: Literal["disk", "host"] = "disk"
    assume: Annotated[dict[str, Assumed] | None, BeforeValidator(_flat)] = None


EXPECTED_LENGTHS: Final = ("expected_prompt_tokens", "expected_output_tokens")
"""What a policy reckons with; unset keys of `[serving]` that the workload fills in."""


class ServingSettings(StrictSettings):
    """The `[serving]` table: how a replica batches, caches and changes its assignment.

    A pass has at most `max_batch` rows; rows that `rebatch` holds leave their places in it to
    others, up to `max_held` of them.
    `on_change` says what becomes of running requests when the model or its depth changes:
    `drain` finishes them first, `recompute` sends them back and prefills them again. The
    expected lengths size the batch limits and the predictions that a policy is told; a policy
    never sees the true ones. Unset ones become the workload's means once that is known.
    """

    batching: Literal["static", "continuous", "chunked"] = "continuous"
    max_batch: Annotated[int, Field(ge=1, le=4096)] = 256
    max_held: Annotated[int, Field(ge=0, le=4096)] = 0
    block_tokens: Annotated[int, Field(ge=1, le=4096)] = 16
    max_prefill_tokens: Count = 8192
    chunk_tokens: Count = 512
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.01
    skipped_kv: Literal["filled", "recomputed"] = "filled"
    on_change: Literal["drain", "recompute"] = "drain"
    overlap_loads: bool = True
    expected_prompt_tokens: Count | None = None
    expected_output_tokens: Count | None = None

    @model_validator(mode="after")
    def _check_chunk(self) -> Self:
        if self.batching == "chunked" and self.chunk_tokens < self.max_batch:
            raise ValueError(
                f"chunk_tokens is {self.chunk_tokens} but max_batch is {self.max_batch}; the token "
                "budget of chunked batching must be at least max_batch, or prompts would starve."
            )
        if self.max_held and self.batching != "continuous":
            raise ValueError(
                f"max_held is {self.max_held} with {self.batching} batching; places of held rows "
                "are given to others in continuous batches alone, otherwise max_held must be 0."
            )
        return self


class MeasureSettings(StrictSettings):
    """The `[measure]` table: what is cut as warm-up and how often the run is repeated."""

    warmup_s: Seconds = 0.0
    warmup_requests: Annotated[int, Field(ge=0, le=50_000_000)] = 0
    replications: Annotated[int, Field(ge=1, le=1000)] = 1
    timeline_interval_s: Annotated[float, Field(gt=0, le=1e6)] = 1.0


class PolicySettings(BaseModel):
    """One `[[policy]]`: the policy's name, a label for tables, and the policy's own options."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    use: Annotated[str, Field(min_length=1)]
    label: Annotated[str | None, Field(min_length=1, max_length=100)] = None

    @property
    def name(self) -> str:
        """The label, or the policy's name without one."""
        return self.label or self.use

    @property
    def options(self) -> dict[str, Any]:
        """The policy's own options, as given."""
        return dict(self.model_extra or {})


class PublishedFigure(StrictSettings):
    """One `[[published]]` entry: a figure somebody else printed, to stand beside ours on the page.

    `figure` is a key of the summary, dotted for nested ones. With `against` it is a gain of
    `policy` over that other policy (above 1 is better), otherwise the figure itself; `scale`
    multiplies ours to reach the published unit. `why` says what explains a difference.
    """

    figure: Annotated[str, Field(min_length=1)]
    policy: str
    against: str | None = None
    published: float
    scale: float = 1.0
    unit: str = ""
    source: Annotated[str, Field(min_length=1)]
    why: str = ""


class Scenario(StrictSettings):
    """A question to the simulator: workload, fleet, serving, objectives and policies."""

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    question: str = ""
    notes: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1
    workload: WorkloadSettings
    fleet: FleetSettings
    serving: ServingSettings = ServingSettings()
    slo: dict[str, Any] | None = None
    measure: MeasureSettings = MeasureSettings()
    policy: Annotated[tuple[PolicySettings, ...], BeforeValidator(as_tuple), Field(min_length=1)]
    published: Annotated[tuple[PublishedFigure, ...], BeforeValidator(as_tuple)] = ()
    plan: PlanSettings | None = None
    search: SearchSettings | None = None

    @model_validator(mode="after")
    def _check_router(self) -> Self:
        router = self.fleet.router
        if isinstance(self.workload.arrivals, ClosedArrivals) and router != DEFAULT_ROUTER:
            raise ValueError(
                f"fleet.router is {router!r} with closed arrivals, where no router has an effect: "
                f"user u stays on replica u modulo num_replicas. Allowed is {DEFAULT_ROUTER!r}, "
                "the default. To compare routers, replay a run of it (workload.trace of format "
                '"helios"), or give arrivals of another kind.'
            )
        return self

    @model_validator(mode="after")
    def _check_policies(self) -> Self:
        labels = [policy.name for policy in self.policy]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"Two policies are called {twice[0]!r}; give each a label of its own.")
        for entry in self.published:
            for label in (entry.policy, entry.against):
                if label is not None and label not in labels:
                    raise ValueError(
                        f"A published figure names the policy {label!r}; the scenario has "
                        f"{', '.join(map(repr, labels))}."
                    )
        return self

    @property
    def slo_spec(self) -> SloSpec | None:
        """The service level objectives, parsed; None without a table, or with an empty one."""
        return slo_from_table(self.slo, "slo") if self.slo else None

    def policies_called(self, name: str) -> tuple[PolicySettings, ...]:
        """The listed policies of this label, or else those of this kind; none where none is."""
        labelled = tuple(policy for policy in self.policy if policy.name == name)
        return labelled or tuple(policy for policy in self.policy if policy.use == name)


def load_scenario(path: Path, changes: Iterable[str] = ()) -> Scenario:
    """Read a scenario file, with `dotted.key=value` changes applied (values in TOML syntax).

    `dotted.key=` removes a setting.
    """
    try:
        if path.is_dir():
            raise InputError("This is a folder; a scenario is a TOML file.", str(path))
        if not path.is_file():
            near = _near_scenario(path)
            hint = f"; did you mean {near!r}?" if near else "."
            raise InputError(f"There is no scenario file{hint}", str(path))
    except OSError as error:
        raise InputError(f"The file cannot be accessed: {error.strerror}.", str(path)) from error
    data = read_toml(path)
    if (path.parent / TOTALS_FILE).is_file():
        data = of_a_run(data)
    for change in changes:
        apply_change(data, change)
    return parse_scenario(data, str(path), path.parent)


def of_a_run(data: Mapping[str, Any]) -> dict[str, Any]:
    """A run's own scenario as a question of its one policy.

    A run keeps every figure its page may set beside others' runs, and a table of objectives even
    where it was served with none.
    """
    asked = dict(data)
    if asked.get("slo") == {}:
        del asked["slo"]
    labels = [one.get("label") or one.get("use") for one in _tables(asked, "policy")]
    asked["published"] = [
        entry
        for entry in _tables(asked, "published")
        if entry.get("policy") in labels and entry.get("against") in [None, *labels]
    ]
    return asked


def _tables(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The tables of an array, without what is none."""
    found = data.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, Sequence) else []


def _near_scenario(path: Path) -> str | None:
    """A scenario of nearly this name, in its folder or in one called scenarios."""
    for folder in (path.parent, path.parent / "scenarios", Path("scenarios")):
        # By their stems: the suffix would make any two short names alike.
        files = {file.stem: file for file in sorted(folder.glob("*.toml"))}
        for stem in difflib.get_close_matches(path.stem, files, n=len(files) or 1):
            if _looks_like_scenario(files[stem]):
                return files[stem].name if folder == path.parent else str(files[stem])
    return None


def _looks_like_scenario(path: Path) -> bool:
    """Whether a TOML file has the tables that every scenario has."""
    try:
        return {"workload", "fleet"} <= set(read_toml(path))
    except InputError:
        return False


def parse_scenario(data: Mapping[str, Any], where: str, base_dir: Path) -> Scenario:
    """Check plain data against the schema; `where` is named in errors."""
    try:
        scenario = Scenario.model_validate(data)
    except ValidationError as error:
        raise first_flaw(error, Scenario, data, where) from error
    try:
        if scenario.slo is not None:
            slo_from_table(scenario.slo, "slo")
        for index, policy in enumerate(scenario.policy):
            make_policy(
                policy.use,
                policy.options,
                search_path=base_dir,
                where=f"policy.{index} ({policy.name})",
            )
    except InputError as error:
        raise error.at(f"{where}, {error.where}") from error
    _check_together(scenario, where)
    return scenario


def _check_together(scenario: Scenario, where: str) -> None:
    """Settings that are fine alone but not together."""
    if scenario.serving.skipped_kv != "recomputed":
        return
    for policy in scenario.policy:
        for option, value in policy.options.items():
            if option.endswith("exit_mode") and value == "rebatch":
                error = rebatches_recomputed(policy.name, option)
                raise error.at(f"{where}, {error.where}")


def check_warmup(measure: MeasureSettings, requests: Requests, where: str) -> None:
    """Refuse a warm-up that leaves no request to measure, as far as one can tell before a run.

    When a closed loop's requests arrive shows only in it.
    """
    is_open = requests.num_users is None
    last_s = requests.span_s if is_open else math.inf
    if measure.warmup_requests >= len(requests) or measure.warmup_s > last_s:
        last = f"; the last arrives at {last_s:g} s" if is_open else ""
        raise InputError(
            f"A warm-up of {measure.warmup_s:g} s and {measure.warmup_requests} requests leaves "
            f"none of the {len(requests)} requests to measure{last}.",
            f"{where}, measure",
        )


def apply_change(data: dict[str, Any], change: str) -> None:
    """Apply one `dotted.key=value`; a number in the path is an index, from 0.

    `dotted.key=` removes the setting, so that its default holds. Raises InputError.
    """
    key, separator, text = change.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise InputError(
            f"{change!r} cannot be read; write dotted.key=value, such as fleet.num_replicas=2.",
            "--set",
        )
    if text.strip():
        apply_value(data, path, toml_value(text.strip()), "--set")
    else:
        _remove(data, path, "--set")


def apply_value(data: dict[str, Any], path: list[str], value: Any, where: str) -> None:
    """Put a value at a path of plain data; a number in the path is an index, from 0."""
    key = ".".join(path)
    node: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node, list):
            if not _is_index(part, len(node)):
                allowed = f"needs an index from 0 to {len(node) - 1} in place of {part!r}"
                if not node:
                    allowed = f"goes into {'.'.join(path[:depth])!r}, which is an empty list"
                raise UnknownSetting(f"{key!r} {allowed}.", where)
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        else:
            raise UnknownSetting(
                f"{key!r} goes into {'.'.join(path[:depth])!r}, which is a plain value.", where
            )


def _remove(data: dict[str, Any], path: list[str], where: str) -> None:
    """Remove what is at a path of plain data."""
    *above, last = path
    node: Any = data
    for part in (*above, last):
        holder = node
        if isinstance(holder, list) and _is_index(part, len(holder)):
            node = holder[int(part)]
        elif isinstance(holder, dict) and part in holder:
            node = holder[part]
        else:
            raise InputError(
                f"{'.'.join(path)!r} is not set, so it cannot be removed; after '=' comes a "
                "value, and '\"\"' is the empty text.",
                where,
            )
    del holder[int(last) if isinstance(holder, list) else last]


def _is_index(text: str, length: int) -> bool:
    """Whether a part of a path is a place in an array of this length."""
    # No array has a place of ten digits, and Python reads no number of some thousand.
    return text.isdecimal() and len(text) < 10 and int(text) < length


def resolved(scenario: Scenario) -> dict[str, Any]:
    """The scenario as plain data with every default filled in, without unset keys."""
    return scenario.model_dump(mode="json", exclude_none=True)


def of_one_policy(scenario: Scenario, policy: PolicySettings, base_dir: Path) -> dict[str, Any]:
    """What a run of one policy answers, as plain data with every default filled in.

    What else is asked of the scenario is not the run's business.
    """
    alone = {"policy": (settled(policy, base_dir),), "plan": None, "search": None}
    return resolved(scenario.model_copy(update=alone))


def settled(policy: PolicySettings, base_dir: Path) -> PolicySettings:
    """A policy with the defaults of its options written out, so that no later default changes it.

    An option of a user's class that is called like a key of every policy has no place in a file.
    """
    options = settled_options(policy.use, policy.options, search_path=base_dir)
    own = {name: one for name, one in options.items() if name not in PolicySettings.model_fields}
    return PolicySettings(use=policy.use, label=policy.label, **own)


def scenario_schema() -> dict[str, Any]:
    """JSON Schema of scenario files, with the options of every shipped policy."""
    schema = Scenario.model_json_schema()
    schema["title"] = "helios scenario"
    entry = schema["$defs"]["PolicySettings"]
    entry["properties"]["use"]["examples"] = list(policy_names())
    entry["allOf"] = [
        {
            "if": {"properties": {"use": {"const": name}}},
            "then": {
                "properties": {
                    option: _option_schema(default, meaning)
                    for option, (default, meaning) in policy_options(name).items()
                }
            },
        }
        for name in policy_names()
    ]
    return schema


def _option_schema(default: Any, meaning: str) -> dict[str, Any]:
    """What an editor may say of a policy's option."""
    plain = list(default) if isinstance(default, tuple) else default
    known = plain if isinstance(plain, (bool, int, float, str, list)) else None
    return {"description": meaning} | ({} if known is None else {"default": known})
