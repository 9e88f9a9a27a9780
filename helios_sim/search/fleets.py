"""What a plan compares and asks: fleets, the traffic they meet, and what has to be carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final, get_args

from helios_sim.errors import InputError, did_you_mean
from helios_sim.experiment import choose_policies
from helios_sim.profile import Profile
from helios_sim.profiles.files import load_profile, where_to_find
from helios_sim.report.words import device_of_all
from helios_sim.scenario import PolicySettings, Router, Scenario
from helios_sim.search.goals import Constraints, Judge, check_countable, parse_constraints
from helios_sim.search.prices import Prices, check_prices, load_prices
from helios_sim.search.traffic import Traffic
from helios_sim.settings.questions import PlanSettings
from helios_sim.settings.slo import SloSpec

MAX_WHOLE_REQUESTS: Final = 2_000_000
"""Requests of a workload that is played whole, at most: some seconds each time it is played."""
MIN_REQUESTS: Final = 2000
"""Requests of a sample for each replica, at least, where no number is asked for."""


@dataclass(frozen=True)
class Fleet:
    """One way to serve: which devices, which models, who decides, who routes.

    Its name says what tells it from the other fleets of a plan.
    """

    name: str
    profile: str
    device: str
    gpus_per_replica: int
    candidates: tuple[str, ...]
    policy: PolicySettings
    router: str
    is_of_processor: bool = False


@dataclass(frozen=True)
class PlanQuestion:
    """A scenario's plan with all it names read: what every study needs to know."""

    scenario: Scenario
    settings: PlanSettings
    base_dir: Path
    where: str
    slo: SloSpec
    traffic: Traffic
    prices: Prices | None
    constraints: Constraints
    fleets: tuple[Fleet, ...]
    profiles: Mapping[str, Profile]
    skipped: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """What the fleets stand on: GPU, processor, or device where they differ."""
        return device_of_all(one.is_of_processor for one in self.fleets)

    @property
    def context_tokens(self) -> int:
        """Tokens that every fleet has a place for: to so many a longer request is shortened."""
        given = self.scenario.workload.context_tokens
        least = min(_contexts(self.fleets, self.profiles))
        return least if given is None else min(given, least)

    @property
    def target_per_s(self) -> float | None:
        """The rate to carry, at the peak where one is given; None where the highest is asked."""
        return self.settings.target

    def mean_per_s(self, rate_per_s: float) -> float:
        """What users send on average where a fleet is planned for a rate: a peak lies above it."""
        mean = self.settings.mean_target
        return rate_per_s if mean is None or rate_per_s != self.target_per_s else mean

    def judge(self, rate_per_s: float) -> Judge:
        """What says which constraints figures break that are of so many requests per second."""
        where = f"{self.where}, plan.prices"
        return Judge((), self.constraints, self.prices, where, rate_per_s)

    @property
    def has_floor(self) -> bool:
        """Whether a constraint says how often tokens have to equal those at full depth."""
        return any(bound.goal.name == "agreement" for bound in self.constraints.bounds)


def read_plan(scenario: Scenario, base_dir: Path, where: str) -> PlanQuestion:
    """Read what the `[plan]` table names; without the table its defaults hold."""
    settings = scenario.plan or PlanSettings()
    slo = scenario.slo_spec
    if slo is None:
        raise InputError(
            "A plan asks what is carried under an SLO; give the scenario one, such as text = "
            '"ttft:p99<500ms;tpot:p95<50ms".',
            f"{where}, slo",
        )
    place = f"{where}, plan"
    constraints = parse_constraints(settings.constraints, f"{place}.constraints")
    goals = [bound.goal for bound in constraints.bounds]
    check_countable(goals, True, settings.prices is not None, where, "plan")
    fleets, skipped = _fleets(scenario, settings, base_dir, where)
    assumed = scenario.fleet.assume
    profiles = {fleet.profile: load_profile(fleet.profile, base_dir, assumed) for fleet in fleets}
    scenario = _with_one_context(scenario, _contexts(fleets, profiles))
    prices = None
    if settings.prices is not None:
        prices = load_prices(settings.prices, base_dir, f"{place}.prices")
        for profile in profiles.values():
            check_prices(prices, profile, f"{place}.prices")
    traffic = Traffic(
        scenario,
        base_dir,
        where,
        settings.num_requests or MIN_REQUESTS,
        settings.windows,
        settings.warmup_share,
        most_samples=settings.max_replications,
    )
    # A number of requests that is asked for is kept to; so is a workload that changes with time.
    grows = traffic.replays or not (traffic.is_shaped or settings.num_requests)
    traffic = replace(traffic, grows=grows)
    if traffic.num_samples is not None:
        settings = _within_windows(settings)
    if traffic.num_samples is not None and settings.max_replications > traffic.num_samples:
        raise InputError(
            f"max_replications is {settings.max_replications} but the trace is cut into "
            f"{settings.windows} windows, and a replication takes one; give at least as many "
            "windows, or leave it out.",
            f"{place}.windows",
        )
    traffic.check()
    question = PlanQuestion(
        scenario=scenario,
        settings=settings,
        base_dir=base_dir,
        where=where,
        slo=slo,
        traffic=traffic,
        prices=prices,
        constraints=constraints,
        fleets=fleets,
        profiles=profiles,
        skipped=skipped,
    )
    _check_playable(question)
    return question


def _check_playable(question: PlanQuestion) -> None:
    """Refuse a workload that is played whole and holds more requests than anybody waits for."""
    traffic = question.traffic
    if not traffic.is_shaped:
        return
    rate_per_s = question.target_per_s or traffic.rate_per_s
    num = traffic.num_in_run(rate_per_s)
    if num > MAX_WHOLE_REQUESTS:
        raise InputError(
            f"At {rate_per_s:.4g} requests/s this workload holds {num:,} requests; it changes with "
            f"time and is played whole, so at most {MAX_WHOLE_REQUESTS:,} are allowed. Give fewer "
            "(workload.num_requests, workload.duration_s), or a lower target.",
            f"{question.where}, workload",
        )


def _contexts(fleets: Sequence[Fleet], profiles: Mapping[str, Profile]) -> set[int]:
    """The tokens that fleets have a place for: the smallest context among the models of each."""
    return {
        min(profiles[one.profile].model(name).model.shape.max_positions for name in one.candidates)
        for one in fleets
    }


def _with_one_context(scenario: Scenario, contexts: set[int]) -> Scenario:
    """The scenario with requests shortened alike for fleets of several contexts.

    Each would otherwise meet prompts of its own length: the shorter its context, the easier.
    """
    workload = scenario.workload
    if workload.over_context != "truncate" or len(contexts) == 1:
        return scenario
    least = min(contexts)
    tokens = least if workload.context_tokens is None else min(workload.context_tokens, least)
    shortened = workload.model_copy(update={"context_tokens": tokens})
    return scenario.model_copy(update={"workload": shortened})


def _within_windows(settings: PlanSettings) -> PlanSettings:
    """The settings with as many replications as there are windows, where defaults ask for more."""
    lowered = {
        name: min(getattr(settings, name), settings.windows)
        for name in ("replications", "max_replications")
        if name not in settings.model_fields_set
    }
    return settings.model_copy(update=lowered)


def _fleets(
    scenario: Scenario, settings: PlanSettings, base_dir: Path, where: str
) -> tuple[tuple[Fleet, ...], tuple[str, ...]]:
    """Every combination of what the lists name; model sets that a profile lacks are left out."""
    place = f"{where}, plan"
    routers = settings.routers or (scenario.fleet.router,)
    for router in routers:
        if router not in get_args(Router):
            raise InputError(
                f"{router!r} is no router.{did_you_mean(router, get_args(Router))} Allowed are "
                f"{', '.join(map(repr, get_args(Router)))}.",
                f"{place}.routers",
            )
    try:
        policies = choose_policies(scenario, settings.policies)
    except InputError as error:
        raise error.at(f"{place}.policies") from error
    found: list[Fleet] = []
    skipped: list[str] = []
    absent: list[tuple[str, str]] = []
    for name in settings.profiles or (scenario.fleet.profile,):
        try:
            profile = load_profile(name, base_dir, scenario.fleet.assume)
        except InputError as error:
            raise error.at(f"{place}.profiles, {error.where}") from error
        own = scenario.fleet.candidates or tuple(profile.models)
        for models in settings.candidates or (own,):
            lacking = [model for model in models if model not in profile.models]
            if lacking:
                skipped.append(f"{name} has no {', '.join(lacking)}")
                absent += [(model, name) for model in lacking]
                continue
            for policy, router in product(policies, routers):
                device = profile.device
                found.append(
                    Fleet(
                        name="",
                        profile=name,
                        device=device.name,
                        gpus_per_replica=device.num_gpus,
                        candidates=models,
                        policy=policy,
                        router=router,
                        is_of_processor=profile.is_of_processor,
                    )
                )
    if not found:
        asked_by = f"{place}.candidates" if settings.candidates else f"{where}, fleet.candidates"
        hint = where_to_find(*absent[0]) if absent else ""
        raise InputError(
            f"No profile has the models that are asked for: {'; '.join(skipped)}.{hint}", asked_by
        )
    return tuple(_named(found)), tuple(skipped)


def _named(fleets: Sequence[Fleet]) -> list[Fleet]:
    """The fleets under names of what differs among them; the policy is always named."""
    parts = [
        (fleet.policy.name, "+".join(fleet.candidates), fleet.profile, fleet.router)
        for fleet in fleets
    ]
    differs = [True, *(len(set(column)) > 1 for column in list(zip(*parts, strict=True))[1:])]
    return [
        replace(
            fleet, name=", ".join(part for part, named in zip(mine, differs, strict=True) if named)
        )
        for fleet, mine in zip(fleets, parts, strict=True)
    ]


def fleet_scenario(question: PlanQuestion, fleet: Fleet, num_replicas: int) -> Scenario:
    """The scenario with a fleet in place of its own."""
    settings = question.scenario.fleet.model_copy(
        update={
            "profile": fleet.profile,
            "candidates": fleet.candidates,
            "num_replicas": num_replicas,
            # One replica gets every request whoever routes.
            "router": fleet.router if num_replicas > 1 else "round-robin",
        }
    )
    return question.scenario.model_copy(
        update={
            "fleet": settings,
            "policy": (fleet.policy,),
            # It may be about policies that this fleet does not have.
            "published": (),
            "plan": None,
            "search": None,
        }
    )
