"""The tables `[plan]` and `[search]`: what may be asked of a scenario beyond running it."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from helios_sim.settings.strict import StrictSettings, as_tuple

MAX_REPLICAS: Final = 10_000
"""Replicas of a fleet, planned or run: a request's record holds its replica in 16 bits."""

MAX_PEAK_FACTOR: Final = 100.0

DEFAULT_LEAST: Final = 3
DEFAULT_MOST: Final = 6
"""Replications of a plan's load, where it does not say: at first, and where those leave doubt."""

Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
ModelSets = Annotated[
    tuple[Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)], ...],
    BeforeValidator(as_tuple),
]
Weights = Annotated[tuple[Annotated[float, Field(ge=0, le=1e9)], ...], BeforeValidator(as_tuple)]
Share = Annotated[float, Field(gt=0, lt=1)]
Replicas = Annotated[int, Field(ge=1, le=MAX_REPLICAS)]
Runs = Annotated[int, Field(ge=1, le=1000)]
PerSecond = Annotated[float, Field(ge=1e-6, le=1e6)]
RunLength = Annotated[int, Field(ge=40, le=1_000_000)]
Windows = Annotated[int, Field(ge=2, le=1000)]

Sampler = Literal["tpe", "nsga2", "sobol", "grid"]


class PlanSettings(StrictSettings):
    """The `[plan]` table: which fleets are compared, under which target, how exactly.

    Lists that are left empty take what the scenario says. The target is `target_rate_per_s`, or
    `users` who each send `requests_per_user_per_min`; `peak_factor` multiplies either, and the
    busiest of `hourly_weights` stands for it. Without `num_requests` a sample is as long as the
    service needs.
    """

    policies: Names = ()
    profiles: Names = ()
    candidates: ModelSets = ()
    routers: Names = ()
    target_rate_per_s: PerSecond | None = None
    users: Annotated[int | None, Field(ge=1, le=10**9)] = None
    requests_per_user_per_min: Annotated[float | None, Field(gt=0, le=1e6)] = None
    peak_factor: Annotated[float, Field(ge=1, le=MAX_PEAK_FACTOR)] = 1.0
    hourly_weights: Weights = ()
    max_replicas: Replicas = 64
    constraints: str = ""
    prices: str | None = None
    attainment: Share = 0.95
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    precision: Annotated[float, Field(ge=0.001, le=0.5)] = 0.03
    replications: Annotated[int, Field(ge=2, le=1000)] = DEFAULT_LEAST
    max_replications: Annotated[int, Field(ge=2, le=1000)] = DEFAULT_MOST
    num_requests: RunLength | None = None
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    windows: Windows = 8

    @model_validator(mode="before")
    @classmethod
    def _with_enough(cls, data: Any) -> Any:
        """Either number of replications alone moves the other's default out of its way."""
        if isinstance(data, dict):
            least, most = data.get("replications"), data.get("max_replications")
            if most is None and isinstance(least, int) and least > DEFAULT_MOST:
                return {**data, "max_replications": least}
            if least is None and isinstance(most, int) and most < DEFAULT_LEAST:
                return {**data, "replications": most}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replications < self.replications:
            raise ValueError(
                f"max_replications is {self.max_replications} but replications is "
                f"{self.replications}; max_replications must be at least replications."
            )
        if (self.users is None) != (self.requests_per_user_per_min is None):
            raise ValueError("users and requests_per_user_per_min must be given together.")
        if self.users is not None and self.target_rate_per_s is not None:
            raise ValueError(
                "target_rate_per_s and users were both given; the target is one of them."
            )
        if self.peak_factor != 1.0 and self.target is None:
            raise ValueError(
                f"peak_factor is {self.peak_factor:g} and multiplies a target, of which none was "
                "given. Give target_rate_per_s, or users with requests_per_user_per_min."
            )
        if self.hourly_weights:
            if len(self.hourly_weights) != 24:
                raise ValueError(
                    f"{len(self.hourly_weights)} hourly weights were given; exactly 24 are needed."
                )
            if max(self.hourly_weights) <= 0:
                raise ValueError("Every hourly weight is 0; at least one must be positive.")
            if self.target is None:
                raise ValueError(
                    "hourly_weights need a target: the rate of the busiest hour. Give "
                    "target_rate_per_s, or users with requests_per_user_per_min."
                )
        return self

    @property
    def mean_target(self) -> float | None:
        """Requests per second that users send on average; None where none is asked."""
        if self.users is not None and self.requests_per_user_per_min is not None:
            return self.users * self.requests_per_user_per_min / 60.0
        return self.target_rate_per_s

    @property
    def target(self) -> float | None:
        """Requests per second that the fleet has to carry at its peak; None where none is asked."""
        mean = self.mean_target
        return None if mean is None else mean * self.peak_factor


class SearchSettings(StrictSettings):
    """The `[search]` table: what may vary, what is best, what must hold, how long to look.

    `batch` trials are proposed at a time and answered together, so that the number of workers
    changes nothing. `go_on_share` is the share of trials that are run on further traffic after
    the first sample of it. Of the best `finalists` trials the one that does best on `finals`
    samples of their own is tried on the `held_out` ones.
    """

    policy: str | None = None
    sampler: Sampler = "tpe"
    num_trials: Annotated[int, Field(ge=1, le=100_000)] = 100
    batch: Annotated[int, Field(ge=1, le=1000)] = 10
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1
    objectives: Annotated[
        tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=4)
    ] = ("goodput",)
    constraints: str = ""
    prices: str | None = None
    replications: Runs = 3
    go_on_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    finalists: Annotated[int, Field(ge=1, le=100)] = 5
    finals: Runs = 2
    held_out: Runs = 3
    held_out_rates: Annotated[
        tuple[Annotated[float, Field(gt=0, le=100)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (0.8, 1.0, 1.2)
    num_requests: RunLength = 2000
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    windows: Windows = 8
    ranges: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 1.0 not in self.held_out_rates:
            raise ValueError(
                f"held_out_rates are {list(self.held_out_rates)}; 1.0, the scenario's own rate, "
                "must be one of them."
            )
        return self
