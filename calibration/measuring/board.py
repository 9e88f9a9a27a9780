"""What an NVIDIA board says of itself: energy, power, clocks, temperature; nothing is set."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Final

import torch

_THROTTLE_REASONS: Final = (
    (0x1, "idle"),
    (0x2, "application-clocks"),
    (0x4, "software-power-cap"),
    (0x8, "hardware-slowdown"),
    (0x10, "sync-boost"),
    (0x20, "software-thermal"),
    (0x40, "hardware-thermal"),
    (0x80, "hardware-power-brake"),
    (0x100, "display-clocks"),
)
"""Bits of NVML's clock event reasons (nvml.h, nvmlClocksEventReasons)."""


class BoardError(Exception):
    """A board that does not answer, or not this question; the message is a reason in words."""


@dataclass(frozen=True)
class BoardState:
    """Clocks, temperature and power as they are; None where the board does not say.

    `throttle_reasons` is None where unknown and empty where nothing holds the clocks back.
    """

    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None


class Board:
    """One GPU behind NVML. `nvml` is the module `pynvml`, or an object with the same functions."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    def driver(self) -> str:
        """The driver's version."""
        try:
            return str(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as error:
            raise BoardError(f"the driver does not tell its version ({error})") from error

    def energy_j(self) -> float:
        """Joules counted since the driver was loaded; rises in ticks of tens of milliseconds."""
        return float(self._ask("nvmlDeviceGetTotalEnergyConsumption")) / 1e3

    def instant_power_w(self) -> float:
        """Watts at this moment (NVML_FI_DEV_POWER_INSTANT)."""
        field = self._nvml.NVML_FI_DEV_POWER_INSTANT
        value = self._ask("nvmlDeviceGetFieldValues", [field])[0]
        if int(value.nvmlReturn) != 0:
            raise BoardError(f"instantaneous power is not reported (NVML {int(value.nvmlReturn)})")
        return float(value.value.uiVal) / 1e3

    def mean_power_w(self) -> float:
        """Watts averaged by the board, over one second from Ampere on (nvmlDeviceGetPowerUsage)."""
        return float(self._ask("nvmlDeviceGetPowerUsage")) / 1e3

    @property
    def is_divided(self) -> bool:
        """Whether it is in parts (MIG), so that its figures are those of all of them."""
        modes = self._tell("nvmlDeviceGetMigMode")
        return modes is not None and int(modes[0]) == 1

    def state(self) -> BoardState:
        """Everything the board tells of its present state."""
        memory = self._tell("nvmlDeviceGetMemoryInfo")
        power_mw = self._tell("nvmlDeviceGetPowerUsage")
        limit_mw = self._tell("nvmlDeviceGetEnforcedPowerLimit")
        return BoardState(
            temperature_c=_number(self._tell("nvmlDeviceGetTemperature", 0)),
            sm_clock_mhz=_number(self._tell("nvmlDeviceGetClockInfo", 1)),
            memory_clock_mhz=_number(self._tell("nvmlDeviceGetClockInfo", 2)),
            throttle_reasons=self._throttle_reasons(),
            power_w=None if power_mw is None else float(power_mw) / 1e3,
            power_limit_w=None if limit_mw is None else float(limit_mw) / 1e3,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
        )

    def _throttle_reasons(self) -> tuple[str, ...] | None:
        bits = self._tell("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._tell("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            return None
        left = int(bits)
        names = []
        for bit, name in _THROTTLE_REASONS:
            if left & bit:
                names.append(name)
                left &= ~bit
        if left:
            names.append(f"other-{left:#x}")
        return tuple(names)

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except AttributeError as error:
            raise BoardError(f"this nvidia-ml-py has no {function}") from error
        except self._nvml.NVMLError as error:
            raise BoardError(f"{function} is refused ({error})") from error

    def _tell(self, function: str, *arguments: Any) -> Any:
        """What the board answers, or None where it does not."""
        try:
            return self._ask(function, *arguments)
        except BoardError:
            return None


@dataclass(frozen=True)
class NoBoard:
    """The absence of a board; `reason` says why and `state` tells nothing."""

    reason: str

    def state(self) -> BoardState:
        """A state of which nothing is known."""
        return BoardState()


def open_board(uuid: str | None = None, nvml: Any = None) -> Board | NoBoard:
    """The board with this UUID ("GPU-..."), or the only one there is; its absence is an object.

    Raises nothing: a missing package or driver, several boards of which nobody knows the right one,
    or one that is divided, is the reason of the `NoBoard`.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return NoBoard("nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        count = int(nvml.nvmlDeviceGetCount())
        if count == 0:
            return NoBoard("the NVIDIA driver lists no GPU")
        found = _board_named(uuid, nvml)
        if isinstance(found, NoBoard):
            if count > 1:
                return NoBoard(f"{found.reason}, and which of {count} boards it is cannot be told")
            found = Board(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError as error:
        return NoBoard(f"the NVIDIA driver does not answer ({error})")
    if found.is_divided:
        return NoBoard("the GPU is divided (MIG), and its board counts the joules of all its parts")
    return found


def _board_named(uuid: str | None, nvml: Any) -> Board | NoBoard:
    """The board with this UUID, or why there is none."""
    if uuid is None:
        return NoBoard("torch names no UUID of its GPU")
    try:
        return Board(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError as error:
        return NoBoard(f"the NVIDIA driver finds no board {uuid} ({error})")


def board_of(device: torch.device) -> Board | NoBoard:
    """The board torch computes on, found by its UUID: NVML and CUDA count boards differently."""
    if device.type != "cuda":
        return NoBoard("a processor has no board")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return open_board(None if uuid is None else f"GPU-{uuid}")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
