"""The cases of the study: which policy meets which load, arrivals and texts, as scenarios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from helios_sim.cards import room_of
from helios_sim.errors import InputError
from helios_sim.exits import load_traces
from helios_sim.experiment import prepare, run_policy
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile
from helios_sim.scenario import parse_scenario
from reports.fidelity.quality import Choice, choose

Load = Literal["light", "70 %", "saturating"]
Arrivals = Literal["steady", "bursty"]
Texts = Literal["stable", "drifting"]

SHARE_OF_CAPACITY: Final[Mapping[Load, float]] = {"light": 0.25, "70 %": 0.7, "saturating": 1.25}
"""Arrival rates, as shares of what the simulated policy can carry."""

POLICIES: Final = ("vanilla", "ee-single wait", "ee-single rebatch", "static-depth", "helios")
SMALLEST: Final = "vanilla smallest"
"""The smallest candidate at full depth: what a policy that chooses among models has to beat too."""

BURSTY_CV: Final = 2.5
CAPACITY_REQUESTS: Final = 300
MOST_SECONDS: Final = 86_400.0


@dataclass(frozen=True)
class Case:
    """A scenario of the study.

    Cases of one `group` share their requests, so that their policies can be compared; their rate is
    relative to the policy that carries most. With `equal_quality` the policy gets settings that
    keep vanilla's quality on these requests, as far as a simulation tells. A policy of one model
    takes the largest, `SMALLEST` the smallest.
    """

    policy: str
    load: Load
    arrivals: Arrivals
    texts: Texts
    group: str | None = None
    equal_quality: bool = False

    @property
    def label(self) -> str:
        """The policy as tables call it."""
        return f"{self.policy} at equal quality" if self.equal_quality else self.policy

    @property
    def name(self) -> str:
        """A short name, fit for a folder."""
        kept = "equal quality " if self.equal_quality else ""
        words = f"{self.policy} {kept}{self.load} {self.arrivals} {self.texts}"
        return words.replace(" %", "").replace(" ", "-")


CASES: Final[tuple[Case, ...]] = (
    *(Case(policy, "saturating", "steady", "stable", "gain") for policy in POLICIES),
    Case("vanilla", "light", "steady", "drifting"),
    Case("ee-single wait", "70 %", "bursty", "drifting"),
    Case("ee-single rebatch", "light", "bursty", "stable"),
    Case("static-depth", "70 %", "steady", "drifting"),
    Case("helios", "70 %", "bursty", "drifting"),
    Case("helios", "saturating", "bursty", "drifting", "drift"),
    Case("vanilla", "saturating", "bursty", "drifting", "drift"),
    Case("helios", "saturating", "bursty", "drifting", "drift", equal_quality=True),
    Case("helios", "saturating", "steady", "stable", "gain", equal_quality=True),
    Case("ee-single", "saturating", "steady", "stable", "gain", equal_quality=True),
    Case(SMALLEST, "saturating", "steady", "stable", "gain"),
    Case(SMALLEST, "saturating", "bursty", "drifting", "drift"),
)
"""All five policies at saturation on the same requests, and each of them elsewhere.

What HELIOS gains is read twice: on a mix of all texts, which no specialist knows, and on one kind
that gives way to another; each time over the largest model and over the smallest alone. Cases of
equal quality whose policy cannot keep it are not served.
"""


def cases_named(names: Sequence[str]) -> tuple[Case, ...]:
    """The cases of these names in the study's order, all without any."""
    known = [case.name for case in CASES]
    for name in names:
        if name not in known:
            raise InputError(f"There is no case {name!r}; there are {', '.join(known)}.", "--case")
    return tuple(case for case in CASES if not names or case.name in names)


def without_drift(case: Case) -> Case:
    """The case as it is run on a profile of one kind of text, where nothing drifts."""
    return replace(case, texts="stable")


def case_named(name: str) -> Case | None:
    """The case that a study recorded under a name, whatever texts its profile had."""
    every = (*CASES, *map(without_drift, CASES))
    return next((case for case in every if case.name == name), None)


@dataclass(frozen=True)
class StudySettings:
    """What the study runs on and how long.

    `profile` is a profile folder or a shipped name, `candidates` its models that take part (all of
    them where empty). A real run takes about `seconds`; every case is served `repeats` times. Loads
    beside serving need a backend that can (`overlap_loads`).
    """

    profile: Path
    candidates: tuple[str, ...] = ()
    seconds: float = 20.0
    repeats: int = 3
    max_batch: int = 16
    seed: int = 20
    overlap_loads: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.seconds <= MOST_SECONDS:
            raise InputError(
                f"Real runs of {self.seconds:g} s were asked for; allowed are more than 0 and up "
                f"to {MOST_SECONDS:,.0f} s.",
                "--seconds",
            )


@dataclass(frozen=True)
class Ground:
    """What all cases share: the profile, its models and texts, and typical lengths.

    `small` and `large` are the candidates with the least and the most weights; of several as small
    it is the one that knows the texts best.
    """

    settings: StudySettings
    profile: Profile
    candidates: tuple[str, ...]
    domains: tuple[str, ...]
    prompt: tuple[int, int]
    output: tuple[int, int]
    small: str
    large: str
    middle_depth: int

    @property
    def can_drift(self) -> bool:
        """Whether there are two kinds of text to drift between."""
        return len(self.domains) > 1


def read_ground(settings: StudySettings) -> Ground:
    """Read the profile and choose lengths that fit its models' context."""
    profile = load_profile(settings.profile)
    candidates = settings.candidates or tuple(profile.models)
    probe = parse_scenario(_probe(settings, candidates), "study", Path())
    room = room_of(probe, Path(), "study")
    context = room.context_tokens
    traces = load_traces(profile, candidates)

    def weight_bytes(name: str) -> int:
        model = profile.model(name).model
        return model.weight_bytes(model.shape.layers)

    def full_depth_nats(name: str) -> float:
        return float(traces.nll_nats[name][:, :, -1].mean())

    small = min(candidates, key=lambda name: (weight_bytes(name), full_depth_nats(name)))
    large = max(candidates, key=weight_bytes)
    exits = profile.model(large).model.exit_layers
    if len(exits) < 2:
        raise InputError(
            f"{large!r} has no exit before its full depth; the study needs one.",
            str(settings.profile),
        )
    # A quarter of the context for the longest prompt and an eighth for the longest output leave
    # room for a batch in a small pool, and bound the time of a real run on long contexts.
    longest_prompt = max(2, min(context // 4, 1024))
    longest_output = max(2, min(context // 8, 192))
    return Ground(
        settings=settings,
        profile=profile,
        candidates=candidates,
        domains=traces.domains,
        prompt=(max(1, longest_prompt // 4), longest_prompt),
        output=(max(1, longest_output // 4), longest_output),
        small=small,
        large=large,
        middle_depth=exits[len(exits) // 2 if len(exits) > 2 else 0],
    )


def _probe(settings: StudySettings, candidates: tuple[str, ...]) -> dict[str, Any]:
    """The least scenario that names the profile."""
    return {
        "name": "probe",
        "workload": {
            "num_requests": 1,
            "arrivals": {"kind": "poisson", "rate_per_s": 1.0},
            "prompt": {"kind": "constant", "tokens": 2},
            "output": {"kind": "constant", "tokens": 2},
        },
        "fleet": {"profile": str(settings.profile), "candidates": list(candidates)},
        "policy": [{"use": "vanilla"}],
    }


def scenario_of(
    case: Case,
    ground: Ground,
    rate_per_s: float,
    num_requests: int,
    profile: str,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The scenario of a case as plain data; `profile` is the path that its file will name.

    `options` change the policy's own.
    """
    settings = ground.settings
    arrivals: dict[str, Any] = {"kind": "poisson", "rate_per_s": rate_per_s}
    if case.arrivals == "bursty":
        arrivals = {"kind": "gamma", "rate_per_s": rate_per_s, "cv": BURSTY_CV}
    span_s = num_requests / rate_per_s
    return {
        "schema_version": 1,
        "name": f"fidelity: {case.label}, {case.load}, {case.arrivals}, {case.texts}",
        "question": "How far is the simulation from the real backend?",
        "seed": settings.seed,
        "workload": {
            "num_requests": num_requests,
            "arrivals": arrivals,
            "prompt": _uniform(ground.prompt),
            "output": _uniform(ground.output),
            "domains": _domains(case, ground, span_s),
        },
        "fleet": {
            "profile": profile,
            "candidates": list(ground.candidates),
            "weights_start": "host",
        },
        "serving": {
            "max_batch": settings.max_batch,
            "overlap_loads": settings.overlap_loads,
            "expected_prompt_tokens": sum(ground.prompt) // 2,
            "expected_output_tokens": sum(ground.output) // 2,
        },
        "measure": {"timeline_interval_s": 0.25},
        "policy": [
            policy_of(case.policy, ground, num_requests)
            | dict(options or {})
            | {"label": case.label}
        ],
    }


def _uniform(bounds: tuple[int, int]) -> dict[str, Any]:
    return {"kind": "uniform", "min_tokens": bounds[0], "max_tokens": bounds[1]}


def _domains(case: Case, ground: Ground, span_s: float) -> list[dict[str, Any]]:
    """One mix for the whole run, or one kind of text that gives way to another."""
    if case.texts == "stable" or not ground.can_drift:
        return [{"name": name, "share": 1.0} for name in ground.domains]
    first, last = ground.domains[0], ground.domains[1]
    early, late = round(0.3 * span_s, 3), round(0.7 * span_s, 3)
    return [
        {"name": first, "shares": [[0.0, 1.0], [early, 1.0], [late, 0.0]]},
        {"name": last, "shares": [[0.0, 0.0], [early, 0.0], [late, 1.0]]},
    ]


def policy_of(name: str, ground: Ground, num_requests: int) -> dict[str, Any]:
    """A policy of the study with its options."""
    use, _, mode = name.partition(" ")
    options: dict[str, Any] = {"use": use}
    if use == "helios":
        # Several rounds in a short run, and the paper's interval in a long one.
        options["reassess_requests"] = max(20, min(150, num_requests // 4))
        return options
    options["model"] = ground.small if name == SMALLEST else ground.large
    if use == "ee-single" and mode:
        options["exit_mode"] = mode
    if use == "static-depth":
        options["depth"] = ground.middle_depth
    return options


def capacity_per_s(case: Case, ground: Ground, options: Mapping[str, Any] | None = None) -> float:
    """Requests per second that the simulated policy finishes when it never runs out of work."""
    profile = str(ground.settings.profile)
    data = scenario_of(case, ground, 1e5, CAPACITY_REQUESTS, profile, options)
    data["workload"]["domains"] = [{"name": name, "share": 1.0} for name in ground.domains]
    return float(_simulated(data)["request_throughput"])


def choice_of(case: Case, ground: Ground, rate_per_s: float, num_requests: int) -> Choice:
    """What simulations say of the policy's settings on the requests that are to be served."""

    def figures(one: Case, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        profile = str(ground.settings.profile)
        return _simulated(scenario_of(one, ground, rate_per_s, num_requests, profile, options))

    vanilla = figures(replace(case, policy="vanilla", equal_quality=False))
    return choose(case.policy, lambda options: figures(case, options), vanilla)


def _simulated(data: dict[str, Any]) -> dict[str, Any]:
    scenario = parse_scenario(data, "study", Path())
    return run_policy(prepare(scenario, Path(), "study"), scenario.policy[0]).summary


@dataclass(frozen=True)
class Planned:
    """A case with the rate and the number of requests it is run at.

    `choice` holds what was tried for a case of equal quality, None for another.
    """

    case: Case
    capacity_per_s: float
    rate_per_s: float
    num_requests: int
    choice: Choice | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the policy gets beside its own options."""
        chosen = None if self.choice is None else self.choice.chosen
        return {} if chosen is None else chosen.options

    @property
    def is_served(self) -> bool:
        """Whether there are settings to serve it with."""
        return self.choice is None or self.choice.chosen is not None


def planned(cases: tuple[Case, ...], ground: Ground) -> list[Planned]:
    """The rates of the cases, from simulated capacities.

    Nobody takes much longer than twice the asked seconds, the slowest policy of a group included.
    A group's rate is the same whichever of its cases are run.
    """
    capacity: dict[str, float] = {}

    def carried(case: Case) -> float:
        if case.policy not in capacity:
            capacity[case.policy] = capacity_per_s(case, ground)
        return capacity[case.policy]

    seconds = ground.settings.seconds
    found = []
    for case in cases:
        group = [one for one in CASES if case.group is not None and one.group == case.group]
        alike = [carried(one) for one in group or [case] if not one.equal_quality]
        rate = float(f"{SHARE_OF_CAPACITY[case.load] * max(alike):.4g}")
        num = max(10, min(round(rate * seconds), round(2.0 * seconds * min(alike))))
        if not case.equal_quality:
            found.append(Planned(case, carried(case), rate, num))
            continue
        plan = Planned(case, 0.0, rate, num, choice_of(case, ground, rate, num))
        if plan.is_served:
            plan = replace(plan, capacity_per_s=capacity_per_s(case, ground, plan.options))
        found.append(plan)
    return found
