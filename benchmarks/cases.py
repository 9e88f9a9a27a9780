"""What is measured: the cases, the scenarios they run, and where each arrival rate comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

Kind = Literal["simulate", "floor", "simpy", "call", "sweep"]
Workload = Literal["poisson", "azure"]

PROMPT_TOKENS: Final = 512
OUTPUT_TOKENS: Final = 128
LOAD: Final = 0.75
"""Arrival rate over capacity."""

SIZES: Final = (10_000, 100_000, 1_000_000)
HEADLINE_SIZE: Final = SIZES[-1]
FLEET_REQUESTS: Final = 100_000
NUM_PROBE_REQUESTS: Final = 5_000
SATURATING_RATE_PER_S: Final = 1e6
"""All requests of a probe arrive within a few milliseconds."""

AZURE_COPIES: Final = 5
AZURE_REQUESTS: Final = 19_366 * AZURE_COPIES
AZURE_FILE: Final = "traces/azure_llm_2023/AzureLLMInferenceTrace_conv.csv.gz"

CANDIDATES: Final = ("opt-1.3b", "opt-6.7b")
FLOOR_MODEL: Final = "opt-1.3b"
"""The floor serves the model that carries the rate of `helios` without its other means."""

POLICIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "vanilla": {"use": "vanilla"},
    "ee-single wait": {"use": "ee-single", "exit_mode": "wait"},
    "ee-single rebatch": {"use": "ee-single", "exit_mode": "rebatch"},
    "helios": {"use": "helios"},
    "never": {"use": "never"},
}
"""Policies by label; everything not named is the policy's default."""


@dataclass(frozen=True)
class Load:
    """What decides the capacity of one replica, and with it the arrival rate of a case."""

    policy: str = "helios"
    batching: str = "continuous"
    workload: Workload = "poisson"

    def __str__(self) -> str:
        return f"{self.policy} {self.batching} {self.workload}"


@dataclass(frozen=True)
class Case:
    """One line of the table. `repetitions` is the most that are made; unset means all."""

    name: str
    kind: Kind
    num_requests: int
    load: Load = field(default_factory=Load)
    records: bool = True
    num_replicas: int = 1
    router: str = "round-robin"
    quick: bool = False
    repetitions: int | None = None


def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of the table; `quick` ones make the short run."""
    return (*_references(), *_single_replica(), *_azure(), *_fleets(), *_calls(), *_sweeps())


def single_name(policy: str, batching: str, records: bool, num_requests: int) -> str:
    """The name of a case with Poisson arrivals at one replica."""
    return f"{policy} {batching} {'records' if records else 'play'} {num_requests:,}"


def floor_name(num_requests: int) -> str:
    """The name of a floor case."""
    return f"floor {num_requests:,}"


def fleet_name(policy: str, num_replicas: int, router: str) -> str:
    """The name of a case with several replicas."""
    plural = "" if num_replicas == 1 else "s"
    return f"{policy} {num_replicas} replica{plural} {router} {FLEET_REQUESTS:,}"


FIRST_CALL: Final = "first call, nothing compiled"
LATER_CALL: Final = "later call"
PAGE_CALL: Final = "later call with its page"
SWEEP_PROCESSES: Final = 2
NUM_SWEEP_POINTS: Final = 16
SWEEP: Final = f"sweep over {SWEEP_PROCESSES} processes"


def _references() -> list[Case]:
    floors = [Case(floor_name(n), "floor", n, quick=n < HEADLINE_SIZE) for n in SIZES]
    return [*floors, Case("SimPy engine 2,000", "simpy", 2_000, quick=True)]


def _single_replica() -> list[Case]:
    return [
        _single(policy, batching, records, n)
        for policy in POLICIES
        for batching in ("continuous", "chunked")
        for records in (True, False)
        for n in SIZES
    ]


def _single(policy: str, batching: str, records: bool, num_requests: int) -> Case:
    """A case at one replica; only what the bars speak of is repeated where that takes long."""
    helios = policy == "helios"
    smallest, largest = num_requests == SIZES[0], num_requests == HEADLINE_SIZE
    headline = helios and records and batching == "continuous"
    return Case(
        single_name(policy, batching, records, num_requests),
        "simulate",
        num_requests,
        Load(policy, batching),
        records,
        quick=(helios or records) if smallest else (helios and records and not largest),
        repetitions=None if headline or (not largest and (helios or records)) else 1,
    )


def _azure() -> list[Case]:
    return [
        Case(
            f"azure {policy} {AZURE_REQUESTS:,}",
            "simulate",
            AZURE_REQUESTS,
            Load(policy, workload="azure"),
            quick=policy == "helios",
        )
        for policy in POLICIES
    ]


def _fleets() -> list[Case]:
    fleets = [(n, router) for n in (1, 8, 64) for router in ("round-robin", "least-outstanding")]
    return [
        Case(
            fleet_name(policy, num_replicas, router),
            "simulate",
            FLEET_REQUESTS,
            Load(policy),
            num_replicas=num_replicas,
            router=router,
            quick=policy == "helios",
        )
        for policy in ("helios", "vanilla")
        for num_replicas, router in fleets
        if policy == "helios" or (num_replicas > 1 and router == "least-outstanding")
    ]


def _calls() -> list[Case]:
    return [
        Case(FIRST_CALL, "call", 10, quick=True, repetitions=1),
        Case(LATER_CALL, "call", 10, quick=True),
        Case(PAGE_CALL, "call", 10, quick=True),
    ]


def _sweeps() -> list[Case]:
    return [Case(SWEEP, "sweep", 100_000, quick=True, repetitions=1)]


def sweep_points(scenario: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a sweep: one scenario under many seeds, so that all are equally long."""
    return [dict(scenario) | {"seed": seed} for seed in range(1, NUM_SWEEP_POINTS + 1)]


def chosen(cases: Sequence[Case], quick: bool, only: str) -> list[Case]:
    """The cases of a run: those whose name holds `only`, with the floor to measure them by.

    A quick run leaves the long ones out, unless they are named in full.
    """
    picked = [
        case
        for case in cases
        if only in case.name and (not quick or case.quick or case.name == only)
    ]
    floors = {
        nearest_floor(case.num_requests)
        for case in picked
        if case.kind in ("simulate", "simpy", "floor")
    }
    return [case for case in cases if case in picked or case.name in floors]


def nearest_floor(num_requests: int) -> str:
    """The floor of the same size, or of the size nearest to it."""
    return floor_name(min(SIZES, key=lambda n: max(n, num_requests) / min(n, num_requests)))


def scenario_of(case: Case, rate_per_s: float, native_rate_per_s: float) -> dict[str, Any]:
    """The case's scenario as plain data, at `rate_per_s` a replica.

    A replayed trace, which alone would bring `native_rate_per_s`, is compressed to the rate.
    """
    workload: dict[str, Any]
    if case.load.workload == "azure":
        workload = {
            "over_context": "truncate",
            "trace": {
                "file": AZURE_FILE,
                "repeat": AZURE_COPIES,
                "rate_scale": rate_per_s / native_rate_per_s,
            },
        }
    else:
        workload = _poisson(case.num_requests, rate_per_s * case.num_replicas)
    fleet = {"num_replicas": case.num_replicas, "router": case.router}
    return _scenario(case.load, workload, fleet)


def warm_up_of(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """The same scenario with ten requests: it brings in all code that the case will run."""
    workload = dict(scenario["workload"])
    if "trace" in workload:
        workload["trace"] = workload["trace"] | {"repeat": 1, "max_requests": 10}
    else:
        workload["num_requests"] = 10
    return dict(scenario) | {"workload": workload}


def probe_of(load: Load) -> dict[str, Any]:
    """A short saturated run, whose throughput is the capacity."""
    workload = _poisson(NUM_PROBE_REQUESTS, SATURATING_RATE_PER_S)
    if load.workload == "azure":
        del workload["prompt"], workload["output"]
        workload |= {"over_context": "truncate", "trace": {"file": AZURE_FILE}}
    return _scenario(load, workload, {})


def native_azure() -> dict[str, Any]:
    """The trace as it was recorded, to know its rate."""
    workload = {"over_context": "truncate", "trace": {"file": AZURE_FILE}}
    return _scenario(Load(), workload, {})


def _poisson(num_requests: int, rate_per_s: float) -> dict[str, Any]:
    return {
        "num_requests": num_requests,
        "arrivals": {"kind": "poisson", "rate_per_s": rate_per_s},
        "prompt": {"kind": "constant", "tokens": PROMPT_TOKENS},
        "output": {"kind": "constant", "tokens": OUTPUT_TOKENS},
    }


def _scenario(load: Load, workload: Mapping[str, Any], fleet: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": "benchmark",
        "seed": 1,
        "workload": dict(workload),
        "fleet": {
            "profile": "opt-a100-40gb",
            "candidates": list(CANDIDATES),
            "weights_start": "host",
            **fleet,
        },
        "serving": {"batching": load.batching, "max_batch": 256},
        "policy": [{**POLICIES[load.policy], "label": load.policy}],
    }
