"""Prices from the user's file: money per GPU hour and per kilowatt hour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from helios_sim.errors import InputError, did_you_mean
from helios_sim.profile import Profile
from helios_sim.settings.strict import StrictSettings, first_flaw
from helios_sim.settings.toml import read_toml

Grade = Literal["assumed", "quoted", "paid"]


class GpuPrice(StrictSettings):
    """What one GPU costs an hour, and where that number comes from."""

    per_gpu_hour: Annotated[float, Field(ge=0, le=1e9)]
    grade: Grade
    source: str = ""


class EnergyPrice(StrictSettings):
    """What energy costs, where the GPU's hour does not include it.

    `overhead` is the building's factor on the GPUs' own energy (its PUE).
    """

    per_kwh: Annotated[float, Field(ge=0, le=1e9)]
    overhead: Annotated[float, Field(ge=1, le=10)] = 1.0
    grade: Grade
    source: str = ""


class Prices(StrictSettings):
    """A prices file: a currency, a price a device by the profile's device name, energy."""

    currency: str = "USD"
    gpu: dict[str, GpuPrice]
    energy: EnergyPrice | None = None


@dataclass(frozen=True)
class Cost:
    """What serving costs: an hour of it, and a million output tokens."""

    per_hour: float
    per_million_tokens: float | None


def load_prices(name: str, base_dir: Path, where: str) -> Prices:
    """Read a prices file, strictly; `where` names the key that asked for it."""
    if not name.strip():
        raise InputError(
            'It names no file; give the name of a prices file, such as "prices.toml", or leave it '
            "out.",
            where,
        )
    path = base_dir / name
    try:
        data = read_toml(path)
    except InputError as error:
        raise error.at(f"{where}, {error.where}") from error
    try:
        return Prices.model_validate(data)
    except ValidationError as error:
        raise first_flaw(error, Prices, data, str(path)) from error


def check_prices(prices: Prices, profile: Profile, where: str) -> None:
    """Raise `InputError` where prices do not say what a fleet on a profile costs.

    Energy that no meter read costs something all the same.
    """
    _gpu_price(prices, profile.device.name, where)
    if prices.energy is not None and not profile.has_energy:
        raise InputError(
            f"The prices file has a price of energy, and the energy of profile {profile.name!r} is "
            "unavailable: what it costs is unknown. Leave [energy] out of the prices, to count "
            "GPU hours alone, or take a profile with watts and joules.",
            where,
        )


def _gpu_price(prices: Prices, device: str, where: str) -> GpuPrice:
    """The price of a device."""
    if device not in prices.gpu:
        raise InputError(
            f"The prices file has no [gpu.{device!r}].{did_you_mean(device, prices.gpu)} It has "
            f"{', '.join(map(repr, prices.gpu)) or 'none'}.",
            where,
        )
    return prices.gpu[device]


def cost_of(
    prices: Prices,
    device: str,
    num_gpus: int,
    power_w: float | None,
    tokens_per_s: float | None,
    where: str,
) -> Cost | None:
    """The cost of GPUs that draw a power and give tokens, at a steady rate.

    None where energy has a price and the power is unknown.
    """
    per_hour = num_gpus * _gpu_price(prices, device, where).per_gpu_hour
    if prices.energy is not None:
        if power_w is None:
            return None
        per_hour += power_w / 1e3 * prices.energy.overhead * prices.energy.per_kwh
    if not tokens_per_s:
        return Cost(per_hour, None)
    return Cost(per_hour, per_hour / (tokens_per_s * 3600.0) * 1e6)


def steadily(summary: Mapping[str, Any], rate_per_s: float) -> tuple[float | None, float | None]:
    """Watts of all devices and output tokens per second while so many requests arrive a second.

    A run lasts until its last answer, and the shorter it is the more of it is spent on few of
    them: its own means are less than what a fleet gives that is never empty. A refused request
    gives no token.
    """
    num = summary.get("num_requests")
    energy_j, tokens = summary.get("total_gpu_energy"), summary.get("total_output_tokens")
    each_s = rate_per_s / num if num else 0.0
    return (
        None if energy_j is None else energy_j * each_s,
        None if tokens is None else tokens * each_s,
    )


def grades_of(prices: Prices, devices: Iterable[str]) -> list[str]:
    """The grades of what a fleet on these devices is charged, each named once."""
    used = [prices.gpu[device].grade for device in sorted(devices)]
    if prices.energy is not None:
        used.append(prices.energy.grade)
    return list(dict.fromkeys(used))


def words_of(prices: Prices) -> str:
    """What the prices are, with their grades, for a page."""
    parts = [
        f"{device} {one.per_gpu_hour:g} {prices.currency} an hour and GPU ({one.grade}"
        f"{': ' + one.source if one.source else ''})"
        for device, one in prices.gpu.items()
    ]
    if prices.energy is not None:
        one = prices.energy
        parts.append(
            f"energy {one.per_kwh:g} {prices.currency} a kWh times {one.overhead:g} ({one.grade}"
            f"{': ' + one.source if one.source else ''})"
        )
    return "; ".join(parts)
