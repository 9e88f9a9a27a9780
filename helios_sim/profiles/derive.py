"""A profile of a device that nobody measured: another profile's numbers, scaled to it.

What bounds a number says how it scales. Bytes go by the memory bandwidth, flops by the peak,
kernel launches by the launch floor, joules by what the board may draw for its bytes and flops;
what the host does, and what is a matter of the model alone, stays. Every number of the device says
in its source what was done to it, and its grade is never better than `derived`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from helios_sim.errors import InputError
from helios_sim.profile import (
    GRADES,
    STAND_INS,
    TRACES_FILE,
    UNAVAILABLE,
    Profile,
    TraceExits,
    quantity,
)
from helios_sim.profiles.files import save_profile, shipped_names
from helios_sim.profiles.roofline import (
    BOARDS,
    COMPUTE_EFFICIENCY,
    MEMORY_EFFICIENCY,
    Work,
    work_of,
)
from helios_sim.wording import listed

Rule = Literal[
    "bytes", "flops", "both", "launch", "launches", "fixed", "host", "active power", "power limit"
]

RULES: Final[Mapping[str, Rule]] = {
    "decode.launch_s": "launch",
    "decode.memory_s_per_layer": "bytes",
    "decode.memory_s_per_row": "bytes",
    "decode.memory_s_per_context_token": "bytes",
    "decode.memory_s_per_padded_token": "bytes",
    "decode.compute_s_per_layer": "flops",
    "decode.compute_s_per_row": "flops",
    "decode.compute_s_per_context_token": "flops",
    "decode.compute_s_per_padded_token": "flops",
    "prefill.launch_s": "launch",
    "prefill.memory_s_per_layer": "bytes",
    "prefill.memory_s_per_token": "bytes",
    "prefill.memory_s_per_context_token": "bytes",
    "prefill.compute_s_per_layer": "flops",
    "prefill.compute_s_per_token": "flops",
    "prefill.compute_s_per_pair": "flops",
    "decode.fixed_s": "fixed",
    "prefill.fixed_s": "fixed",
    "decode.fixed_s_per_row": "host",
    "prefill.fixed_s_per_prompt": "host",
    "head.floor_s": "launches",
    "head.base_s": "bytes",
    "head.s_per_row": "both",
    "check.floor_s": "launches",
    "check.base_s": "bytes",
    "check.s_per_row": "both",
    "kv_fill.floor_s_per_layer": "launches",
    "kv_fill.base_s_per_layer": "bytes",
    "kv_fill.s_per_row_layer": "both",
    "rebatch.overhead_s": "launches",
    "rebatch.overhead_s_per_row": "host",
    "capture.s_per_graph": "host",
    "capture.s_per_exit": "host",
    "capture.s_per_layer": "host",
    "capture.s_per_filled_layer": "host",
    "power.active_w": "active power",
    "power.limit_w": "power limit",
    "decode.j_per_layer": "bytes",
    "decode.j_per_row_layer": "both",
    "decode.j_per_context_token_layer": "both",
    "decode.j_per_padded_token_layer": "both",
    "prefill.j_per_layer": "bytes",
    "prefill.j_per_token_layer": "both",
    "prefill.j_per_pair_layer": "flops",
    "head.j_base": "bytes",
    "head.j_per_row": "both",
    "check.j_base": "bytes",
    "check.j_per_row": "both",
    "kv_fill.j_per_layer": "bytes",
    "kv_fill.j_per_row_layer": "both",
}
"""What bounds each coefficient, and so what it scales by; joules also scale by the power."""


@dataclass(frozen=True)
class Part:
    """A part of a model's work that coefficients are counted in, in words; bytes and flops of it.

    A number of the part grows with the bytes where they bound it, with the flops where those do.
    """

    words: str
    num_bytes: int
    flops: int


def part_of(key: str, work: Work) -> Part:
    """The part of a model's work that a coefficient is the price of."""
    where, _, what = key.partition(".")
    is_weights = what in ("base_s", "j_base") or what.endswith(("s_per_layer", "j_per_layer"))
    if where in ("head", "check"):
        if is_weights:
            return Part("the output head's weights", work.head_bytes, work.head_row_flops)
        return Part("a row of the output head", work.head_row_bytes, work.head_row_flops)
    if where == "kv_fill":
        if is_weights:
            return Part("the weights of keys and values", work.fill_bytes, work.fill_row_flops)
        return Part("a row's keys and values", work.fill_row_bytes, work.fill_row_flops)
    if is_weights:
        return Part("a layer's weights", work.layer_bytes, work.row_flops)
    if any(word in what for word in ("context", "padded", "pair")):
        return Part("a KV token", work.kv_bytes, work.pair_flops)
    return Part("a row", work.row_bytes, work.row_flops)


def share_of_bytes(part: Part, peaks: tuple[float, float]) -> float:
    """The share of a part's time that bytes take on a device, by its roofline.

    `peaks` are its bytes and flops a second; both are reached to the shares that the shipped
    profiles assume.
    """
    memory_s = part.num_bytes / (peaks[0] * MEMORY_EFFICIENCY)
    compute_s = part.flops / (peaks[1] * COMPUTE_EFFICIENCY)
    return memory_s / (memory_s + compute_s)


MOST: Final = 1000.0
"""How many times another device may differ: beyond it a unit was forgotten."""

_POSSIBLE: Final[Mapping[str, tuple[float, float, str]]] = {
    "launch_s": (1e-7, 5e-3, "a layer's floor is some 34 launches, of about 0.01 ms each eagerly"),
    "fixed_s": (1e-7, 0.05, "an iteration takes about 1 ms beside its layers"),
    **{
        key: (0.5, 5000.0, "boards draw from a few watts to a few kilowatts")
        for key in ("limit_w", "idle_w", "active_w", "load_w")
    },
}
"""Between which values a device can be at all, and why; watts are of one GPU.

Milliseconds taken for seconds, or kilowatts for watts, lie outside, though not a thousand times
from the given profile. The upper bar of launches is ten times what eager PyTorch needs.
"""

_DECIMAL: Final = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY: Final = {f"{prefix}i": 2.0 ** (10 * at) for at, prefix in enumerate("KMGT", start=1)}
_UNITS: Final[dict[str, dict[str, float]]] = {
    "bytes": {f"{prefix}B": size for prefix, size in (_DECIMAL | _BINARY).items()},
    "bytes/s": {f"{prefix}B/s": size for prefix, size in (_DECIMAL | _BINARY).items()},
    "flops": {f"{prefix}FLOP/s": size for prefix, size in _DECIMAL.items()},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "watts": {"W": 1.0, "kW": 1e3},
}
_WORDS: Final = {"G": "giga", "T": "tera", "P": "peta"}
_SPELT: Final[dict[str, dict[str, float]]] = {
    "bytes": {
        said: size
        for unit, size in _UNITS["bytes"].items()
        for said in (unit.lower(), unit.upper())
    },
    "flops": {
        f"{said}{flops}": size
        for prefix, size in _DECIMAL.items()
        for said in (prefix, prefix.lower(), _WORDS.get(prefix, prefix))
        for flops in ("FLOPS", "FLOPs", "flops", "FLOP/s", "flop/s")
    },
    "watts": {"w": 1.0, "kw": 1e3, "KW": 1e3},
}
"""How data sheets spell units too. `Gb` is left out, which are bits, and so are rates in `gb/s`."""
_EXAMPLES: Final = {
    "bytes": "bytes, such as 48GiB",
    "bytes/s": "bytes a second, such as 864GB/s or 864e9",
    "flops": "flops a second, such as 362TFLOP/s or 362e12",
    "seconds": "seconds, such as 0.1ms or 1e-4",
    "watts": "watts, such as 350",
}
_AMOUNT: Final = re.compile(r"\s*([-+]?[\d._]+(?:[eE][-+]?\d+)?)\s*([A-Za-z/]*)\s*")


@dataclass(frozen=True)
class Device:
    """The device that a profile is derived for; None is what the given profile says.

    Memory and watts are those of all GPUs of a replica, bandwidth and flops those of one.
    `fixed_s` is the part of an iteration beside its layers, `from_...` are the peaks of the device
    that the given profile is of, where neither it nor a data sheet at hand says them.
    """

    name: str
    memory_bytes: float | None = None
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    launch_s: float | None = None
    fixed_s: float | None = None
    limit_w: float | None = None
    idle_w: float | None = None
    active_w: float | None = None
    load_w: float | None = None
    host_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    from_bytes_per_s: float | None = None
    from_flops_per_s: float | None = None


OPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "memory_bytes": ("--memory", "bytes"),
    "bytes_per_s": ("--bandwidth", "bytes/s"),
    "flops_per_s": ("--flops", "flops"),
    "launch_s": ("--launch", "seconds"),
    "fixed_s": ("--fixed", "seconds"),
    "limit_w": ("--watts", "watts"),
    "idle_w": ("--idle-watts", "watts"),
    "active_w": ("--active-watts", "watts"),
    "load_w": ("--load-watts", "watts"),
    "host_bytes_per_s": ("--load-bandwidth", "bytes/s"),
    "disk_bytes_per_s": ("--disk-bandwidth", "bytes/s"),
    "from_bytes_per_s": ("--from-bandwidth", "bytes/s"),
    "from_flops_per_s": ("--from-flops", "flops"),
}
"""The option of each number of a device, and what it is an amount of."""


def device_of(name: str, given: Mapping[str, str | None]) -> Device:
    """The device that the command line describes, its numbers by their keys in `OPTIONS`."""
    amounts = {key: amount(text, *OPTIONS[key]) for key, text in given.items() if text is not None}
    return Device(name, **amounts)


def amount(text: str, option: str, kind: str) -> float:
    """A number above 0 with or without a unit, in the unit that its kind is counted in."""
    found = _AMOUNT.fullmatch(text)
    units = _UNITS[kind]
    try:
        value = float(found[1]) * _size(found[2], kind) if found and found[2] else float(text)
    except (KeyError, ValueError):
        value = math.nan
    if not 0.0 < value < math.inf:
        raise InputError(
            f"{text!r} was given; allowed is a number above 0 of {_EXAMPLES[kind]} (units: "
            f"{', '.join(units)}).",
            option,
        )
    return value


def _size(unit: str, kind: str) -> float:
    """How many base units a unit is; KeyError where it is none of its kind."""
    return (_UNITS[kind] | _SPELT.get(kind, {}))[unit]


def derive(profile: Profile, name: str, device: Device) -> dict[str, Any]:
    """The document of a profile of another device, from that of a given one."""
    return _Derivation(profile, name, device).document()


def same_device_document(
    profile: Profile, name: str, peaks: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The document of a profile under another name, its models and device as they are."""
    document: dict[str, Any] = copy.deepcopy(dict(profile.document))
    document.pop("measurement", None)
    document["name"] = name
    if document["exits"]["kind"] == "trace":
        document["exits"]["file"] = TRACES_FILE
    told = document["provenance"]
    environment = {
        **told.get("environment", {}),
        "derived_from": {"profile": profile.name, "hash": profile.hash},
    }
    if peaks is not None:
        environment["peaks"] = {"memory_bytes_per_s": peaks[0], "flops_per_s": peaks[1]}
    document["provenance"] = {
        "origin": "derived",
        "sources": [f"profile {profile.name}", *told["sources"]],
        "notes": [f"{profile.name}: {note}" for note in told["notes"]],
        "environment": environment,
    }
    return document


def exit_layers_of(text: str, option: str) -> tuple[int, ...]:
    """Exit layers from a text such as 8,16,24, given as an option."""
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        layers = []
    if not layers or layers != sorted(set(layers)) or layers[0] < 1:
        raise InputError(
            f"{text!r} was given; allowed are whole numbers that ascend from 1 or more, such as "
            "8,16,24.",
            option,
        )
    return tuple(layers)


def layers_said(layers: Sequence[int]) -> str:
    """Exit layers in words: "8, 16, 24"."""
    return ", ".join(map(str, layers))


def check_name(name: str, profile: Profile) -> None:
    """Refuse a name that a profile derived from this one cannot have."""
    if not name.strip() or "/" in name:
        raise InputError(f"{name!r} was given; allowed is a name without a slash.", "--name")
    if name == profile.name or name in shipped_names():
        raise InputError(
            f"{name!r} is the name of an existing profile; give another one.", "--name"
        )


def tells_a_device(device: Device) -> bool:
    """Whether any number of a device is given, beside what is said of the given profile's."""
    return any(getattr(device, key) is not None for key in OPTIONS if not key.startswith("from_"))


def peaks_of(profile: Profile, device: Device) -> tuple[float, float] | None:
    """Bytes and flops a second of a profile's device; None where nobody says both."""
    said = profile.provenance.environment.get("peaks")
    board = BOARDS.get(profile.device.name)
    bytes_per_s = flops_per_s = None
    if isinstance(said, Mapping):
        bytes_per_s, flops_per_s = said.get("memory_bytes_per_s"), said.get("flops_per_s")
    elif board is not None:
        bytes_per_s, flops_per_s = board.memory_bytes_per_s.value, board.flops_per_s.value
    bytes_per_s = device.from_bytes_per_s or bytes_per_s
    flops_per_s = device.from_flops_per_s or flops_per_s
    return (float(bytes_per_s), float(flops_per_s)) if bytes_per_s and flops_per_s else None


def write_derived(
    profile: Profile, name: str, device: Device, folder: Path, overwrite: bool = False
) -> Profile:
    """Derive a profile and write its folder, with the exit traces of the given one."""
    document = derive(profile, name, device)
    traces = profile.exits.path if isinstance(profile.exits, TraceExits) else None
    return save_profile(document, folder, traces=traces, overwrite=overwrite)


_SHOWN: Final = {
    "bytes": ("GiB", 2.0**30),
    "bytes/s": ("GB/s", 1e9),
    "flops": ("TFLOP/s", 1e12),
    "seconds": ("ms", 1e-3),
    "watts": ("W", 1.0),
}
"""The unit in which a kind of amount is told, and its size."""


def changes(given: Profile, derived: Profile, device: Device) -> list[str]:
    """What each figure of the device was and what it is now; what stayed is left out.

    Of a device whose bandwidth or peak is another, a floor that stayed and binds is told too.
    """
    told: list[tuple[str, str, float | None, float | None]] = []
    was = _Derivation(given, derived.name, device).peaks
    if was is not None:
        told.append(("memory bandwidth", "bytes/s", was[0], device.bytes_per_s or was[0]))
        told.append(("peak", "flops", was[1], device.flops_per_s or was[1]))
    told.append(
        ("memory", "bytes", float(given.device.memory_bytes), float(derived.device.memory_bytes))
    )
    for what, link in (("link from the host", "host"), ("disk", "disk")):
        rates = [getattr(one.loading, link).bytes_per_s for one in (given, derived)]
        told.append((what, "bytes/s", rates[0], rates[1]))
    for what, key, kind in (
        ("launch floor of a layer", "decode.launch_s", "seconds"),
        ("fixed part of an iteration", "decode.fixed_s", "seconds"),
        ("power limit", "power.limit_w", "watts"),
    ):
        for model, entry in given.models.items():
            if model in derived.models:
                there = derived.models[model].coefficients[key]
                told.append((what, kind, entry.coefficients[key], there))
    told += [
        ("idle power", "watts", given.device.idle_w, derived.device.idle_w),
        ("active power", "watts", given.device.active_w, derived.device.active_w),
        ("power while weights move", "watts", given.device.load_w, derived.device.load_w),
    ]
    # Models whose figures are alike share a line.
    return list(
        dict.fromkeys(
            f"{what[0].upper()}{what[1:]}: {_shown(own, kind)}, where {given.name} has "
            f"{_shown(there, kind)}."
            for what, kind, there, own in told
            if own != there
        )
    ) + _binding_floor(given, derived, device)


def _binding_floor(given: Profile, derived: Profile, device: Device) -> list[str]:
    """That a layer takes its launch floor at batch 1, whatever bandwidth or peak were given."""
    if device.launch_s is not None or (device.bytes_per_s, device.flops_per_s) == (None, None):
        return []
    here = [derived.models[name].coefficients for name in given.models if name in derived.models]
    pairs = [
        (one["decode.launch_s"] or 0.0, one["decode.memory_s_per_layer"] or 0.0) for one in here
    ]
    bound = [(launch, moving) for launch, moving in pairs if launch > moving]
    if not bound:
        return []
    floors = listed(list(dict.fromkeys(_shown(launch, "seconds") for launch, _ in bound)))
    weights = max(moving for _, moving in bound)
    return [
        f"Launch floor of a layer: {floors}, as in {given.name}. Weights take at most "
        f"{_shown(weights, 'seconds')}, so in small batches decoding is no faster; --launch gives "
        "another floor."
    ]


def _shown(value: float | None, kind: str) -> str:
    unit, size = _SHOWN[kind]
    return "none" if value is None else f"{value / size:.5g} {unit}"


@dataclass(frozen=True)
class _Scaled:
    """What becomes of a number: a factor or a value given, and how in words."""

    how: str
    factor: float = 1.0
    given: float | None = None


class _Derivation:
    """One profile becoming that of another device."""

    def __init__(self, profile: Profile, name: str, device: Device) -> None:
        self.profile = profile
        self.name = name
        self.device = device
        self.where = f"profile {profile.name}"
        self._check()
        self.peaks = self._peaks()
        self.by_bytes, self.by_flops = self._roofs()
        self.watts = self._watts()
        self._check_watts()
        self.span = self._span()

    def document(self) -> dict[str, Any]:
        """The new document."""
        given, device = self.profile, self.device
        document: dict[str, Any] = copy.deepcopy(dict(given.document))
        document.pop("measurement", None)
        document["name"] = self.name
        document["description"] = f"{device.name}, derived from {given.name}: {given.description}"
        self._of_the_device(document["device"])
        for key, rate in (("disk", device.disk_bytes_per_s), ("host", device.host_bytes_per_s)):
            link = document["loading"][key]
            self._set(link, "alpha_s", _UNCHANGED)
            self._set(link, "bytes_per_s", self._as_given(f"{key}_bytes_per_s", rate))
        for model_name, entry in document["models"].items():
            self._of_a_model(model_name, entry)
        _lower_measured(document["exits"], given.name)
        if document["exits"]["kind"] == "trace":
            document["exits"]["file"] = TRACES_FILE
        document["provenance"] = self._provenance()
        return document

    def _check(self) -> None:
        """Refuse what makes no profile."""
        check_name(self.name, self.profile)
        if not tells_a_device(self.device):
            allowed = ", ".join(
                option for key, (option, _) in OPTIONS.items() if not key.startswith("from_")
            )
            raise InputError(
                f"Nothing was given that tells the device from that of {self.profile.name!r}; "
                f"allowed are {allowed}.",
                "helios profiles derive",
            )
        for key in _POSSIBLE:
            self._check_possible(key)
        for model in self.profile.models.values():
            self._check_near("fixed_s", model.coefficients["decode.fixed_s"] or 0.0)
        self._check_near("memory_bytes", self.profile.device.memory_bytes)
        self._check_near("host_bytes_per_s", self.profile.loading.host.bytes_per_s)
        self._check_near("disk_bytes_per_s", self.profile.loading.disk.bytes_per_s)

    def _check_possible(self, key: str) -> None:
        """Refuse a number that no device has, whatever the given profile says."""
        value = getattr(self.device, key)
        option, kind = OPTIONS[key]
        least, most, why = _POSSIBLE[key]
        if kind == "watts":
            num = self.profile.device.num_gpus
            least, most = least * num, most * num
        if value is None or least <= value <= most:
            return
        unit = _base_unit(kind)
        raise InputError(
            f"{value:g} {unit} was given, which no device has: {why}; allowed is {least:g} to "
            f"{most:g} {unit}, so give {_EXAMPLES[kind]}.",
            option,
        )

    def _check_near(self, key: str, there: float) -> None:
        """Refuse a number that is out of all proportion to that of the given profile."""
        value = getattr(self.device, key)
        if value is None or there == 0.0 or 1.0 / MOST <= value / there <= MOST:
            return
        option, kind = OPTIONS[key]
        raise InputError(
            f"{value:g} {_base_unit(kind)} was given, and {self.profile.name!r} has {there:g}; "
            f"allowed is up to {MOST:g} times more or less, so give {_EXAMPLES[kind]}.",
            option,
        )

    def _peaks(self) -> tuple[float, float] | None:
        """The peaks of the given profile's device, which are needed where others are given."""
        device = self.device
        peaks = peaks_of(self.profile, device)
        if peaks is not None:
            return peaks
        for key in ("bytes_per_s", "flops_per_s"):
            if getattr(device, key) is not None:
                raise InputError(
                    f"Neither {self.profile.name!r} nor a known data sheet states the peaks of "
                    f"its device {self.profile.device.name!r}, so there is nothing to scale "
                    "from; give --from-bandwidth and --from-flops too.",
                    OPTIONS[key][0],
                )
        return None

    def _roofs(self) -> tuple[_Scaled, _Scaled]:
        """What becomes of the seconds of bytes, and of those of flops."""
        found: list[_Scaled] = []
        for at, (key, what, size, unit) in enumerate(
            (
                ("bytes_per_s", "memory bandwidth", 1e9, "GB/s"),
                ("flops_per_s", "peak", 1e12, "TFLOP/s"),
            )
        ):
            own = getattr(self.device, key)
            if own is None or self.peaks is None or own == self.peaks[at]:
                found.append(_UNCHANGED)
                continue
            there = self.peaks[at]
            self._check_near(key, there)
            how = f"by {what}, {there / size:g} / {own / size:g} {unit} (the same share assumed)"
            found.append(_Scaled(how, there / own))
        return found[0], found[1]

    def _watts(self) -> dict[str, _Scaled]:
        """What becomes of each power: given, or scaled with the board's limit."""
        device, profile = self.device, self.profile
        asked = [key for key in ("limit_w", "idle_w", "active_w", "load_w") if _has(device, key)]
        if asked and not profile.has_energy:
            raise InputError(
                f"{profile.name!r} has no energy to scale, since no meter could be read; "
                "leave the watts out.",
                OPTIONS[asked[0]][0],
            )
        limit = self._limit_w()
        found = {"limit_w": self._as_given("limit_w", device.limit_w)}
        by_limit = _UNCHANGED
        if device.limit_w is not None and device.limit_w != limit:
            if limit is None:
                raise InputError(
                    f"{profile.name!r} names no power limit to scale from; leave it out.",
                    "--watts",
                )
            self._check_near("limit_w", limit)
            by_limit = _Scaled(
                f"by the power limit, {device.limit_w:g} / {limit:g} W (assumed)",
                device.limit_w / limit,
            )
        for key in ("idle_w", "active_w", "load_w"):
            own = getattr(device, key)
            found[key] = by_limit if own is None else self._as_given(key, own)
        return found

    def _check_watts(self) -> None:
        """Refuse powers below the idle power, which each of them includes."""
        there = self.profile.device
        idle_w = self._watt("idle_w", there.idle_w)
        for key, what in (("active_w", "active power"), ("load_w", "power while weights move")):
            power_w = self._watt(key, getattr(there, key))
            if idle_w > power_w:
                given = "idle_w" if getattr(self.device, key) is None else key
                raise InputError(
                    f"The idle power of {idle_w:g} W is above the {what} of {power_w:g} W, which "
                    "includes it; give both.",
                    OPTIONS[given][0],
                )

    def _limit_w(self) -> float | None:
        """The power limit that the given profile names; None where it names none."""
        limits = {one.coefficients["power.limit_w"] for one in self.profile.models.values()}
        known = [limit for limit in limits if limit is not None]
        return max(known) if known else None

    def _span(self) -> _Scaled:
        """What becomes of the joules of bytes and flops at a roof, where time stays the same.

        There the board is taken to draw what lies between its active power and its limit.
        """
        limit, active = self._limit_w(), self.profile.device.active_w
        if not self.profile.has_energy or limit is None:
            return _UNCHANGED
        own_limit, own_active = self._watt("limit_w", limit), self._watt("active_w", active)
        if own_active >= own_limit:
            raise InputError(
                f"The active power of {own_active:g} W is not below the power limit of "
                f"{own_limit:g} W; give --active-watts, or another limit.",
                "--watts" if self.device.active_w is None else "--active-watts",
            )
        if limit <= active or (own_limit, own_active) == (limit, active):
            return _UNCHANGED
        return _Scaled(
            f"by the power above active, {own_limit - own_active:g} / {limit - active:g} W",
            (own_limit - own_active) / (limit - active),
        )

    def _watt(self, key: str, there: float) -> float:
        scaled = self.watts[key]
        return there * scaled.factor if scaled.given is None else scaled.given

    def _as_given(self, key: str, value: float | None) -> _Scaled:
        """A number of the device that the user gave, or the given profile's."""
        return _UNCHANGED if value is None else _Scaled(f"given as {OPTIONS[key][0]}", given=value)

    def _of_the_device(self, entry: dict[str, Any]) -> None:
        entry["name"] = self.device.name
        memory = self.device.memory_bytes
        self._set(
            entry,
            "memory_bytes",
            self._as_given("memory_bytes", None if memory is None else int(memory)),
        )
        for key in ("idle_w", "active_w", "load_w"):
            self._set(entry, key, self.watts[key])

    def _of_a_model(self, name: str, entry: dict[str, Any]) -> None:
        if entry["shape"]["grade"] == "measured":
            entry["shape"]["grade"] = "derived"
            entry["shape"]["source"] = _told(self.profile.name, _UNCHANGED, entry["shape"])
        _lower_measured(entry, self.profile.name)
        for key in ("workspace_bytes", "batch_residual", "depth_residual"):
            if entry.get(key) is not None:
                self._set(entry, key, _UNCHANGED)
        launch_s = float(entry["coefficients"]["decode.launch_s"]["value"])
        for key in entry["coefficients"]:
            self._set(entry["coefficients"], key, self._of_a_coefficient(name, key, launch_s))

    def _of_a_coefficient(self, model: str, key: str, launch_s: float) -> _Scaled:
        """What becomes of one coefficient, by its rule; `launch_s` is the model's launch floor."""
        rule, device = RULES[key], self.device
        if rule == "launch":
            return self._as_given("launch_s", device.launch_s)
        if rule == "launches":
            return self._by_launches(launch_s)
        if rule == "fixed":
            return self._as_given("fixed_s", device.fixed_s)
        if rule == "active power":
            return self.watts["active_w"]
        if rule == "power limit":
            return self.watts["limit_w"]
        if rule == "host":
            return _UNCHANGED
        roofs = {"bytes": self.by_bytes, "flops": self.by_flops}
        scaled = roofs.get(rule) or self._by_both(model, key)
        if ".j_" not in key or self.span.factor == 1.0:
            return scaled
        how = self.span.how if scaled.factor == 1.0 else f"{scaled.how} and {self.span.how}"
        return _Scaled(how, scaled.factor * self.span.factor)

    def _by_launches(self, launch_s: float) -> _Scaled:
        """What takes kernels to launch goes by the launch floor, where there is one."""
        own = self.device.launch_s
        if own is None or launch_s == 0.0 or own == launch_s:
            return _UNCHANGED
        self._check_near("launch_s", launch_s)
        how = f"by the launch floor, {1e3 * own:g} / {1e3 * launch_s:g} ms (assumed)"
        return _Scaled(how, own / launch_s)

    def _by_both(self, model: str, key: str) -> _Scaled:
        """A number that bytes and flops add up to, split as the given device's roofline does."""
        by_bytes, by_flops = self.by_bytes, self.by_flops
        if self.peaks is None or (by_bytes.factor == 1.0 and by_flops.factor == 1.0):
            return _UNCHANGED
        part = part_of(key, work_of(self.profile.models[model].model))
        share = share_of_bytes(part, self.peaks)
        told = [one.how for one in (by_bytes, by_flops) if one.factor != 1.0]
        return _Scaled(
            f"{share:.0%} bytes and {1.0 - share:.0%} flops (roofline, assumed) "
            + " and ".join(told),
            share * by_bytes.factor + (1.0 - share) * by_flops.factor,
        )

    def _set(self, table: dict[str, Any], key: str, scaled: _Scaled) -> None:
        """Put the scaled number in its place, with its grade and where it comes from."""
        entry = table[key]
        if entry["grade"] == UNAVAILABLE:
            return
        value = entry["value"]
        if scaled.given is not None:
            value = int(scaled.given) if key == "memory_bytes" else scaled.given
        elif scaled.factor != 1.0:
            value = float(f"{value * scaled.factor:.12g}")
        grade = "derived"
        if scaled.given is None:
            grade = max("derived", entry["grade"], key=GRADES.index)
        table[key] = quantity(key, value, grade, _told(self.profile.name, scaled, entry))

    def _provenance(self) -> dict[str, Any]:
        given = self.profile
        environment: dict[str, Any] = {
            "derived_from": {"profile": given.name, "hash": given.hash},
        }
        if self.peaks is not None:
            environment["peaks"] = {
                "memory_bytes_per_s": self.device.bytes_per_s or self.peaks[0],
                "flops_per_s": self.device.flops_per_s or self.peaks[1],
            }
        if given.stand_ins:
            environment[STAND_INS] = dict(given.provenance.environment[STAND_INS])
        if given.is_of_processor:
            environment["device"] = {"name": self.device.name, "kind": "cpu"}
        return {
            "origin": "derived",
            "sources": [f"profile {given.name}", *given.provenance.sources],
            "notes": [
                f"Derived from the profile {given.name} of {given.device.name}; no number was read "
                f"off {self.device.name}.",
                *(f"{given.name}: {note}" for note in given.provenance.notes),
            ],
            "environment": environment,
        }


_UNCHANGED: Final = _Scaled("unchanged")


def _has(device: Device, key: str) -> bool:
    return getattr(device, key) is not None


def _base_unit(kind: str) -> str:
    return next(unit for unit, size in _UNITS[kind].items() if size == 1.0)


def _told(name: str, scaled: _Scaled, entry: Mapping[str, Any]) -> str:
    """The source of a derived number: from where, what was done, and what stood there."""
    if scaled.given is not None:
        return scaled.how
    return f"from {name}, {scaled.how}; there: {entry['source']}"


def _lower_measured(node: Any, name: str) -> None:
    """Grade every measured number below a place as derived, without its error."""
    if isinstance(node, list):
        for one in node:
            _lower_measured(one, name)
        return
    if not isinstance(node, dict):
        return
    if "value" in node and node.get("grade") == "measured":
        node["grade"] = "derived"
        node["source"] = _told(name, _UNCHANGED, node)
        node.pop("error", None)
        return
    for one in node.values():
        _lower_measured(one, name)
