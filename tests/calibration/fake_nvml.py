"""An object with the functions of pynvml that the calibration asks, and a board of our making."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any


class FakeNvml:
    """A board that draws `watts` and whose counter ticks every `tick_s`.

    `without` names functions that answer with an error, as boards without a sensor do. `count`
    boards are listed, and `divided` says whether they are in parts.
    """

    NVML_FI_DEV_POWER_INSTANT = 186

    class NVMLError(Exception):
        """What every function of pynvml raises."""

    def __init__(
        self,
        watts: float = 200.0,
        tick_s: float = 0.01,
        without: tuple[str, ...] = (),
        count: int = 1,
        divided: bool = False,
    ) -> None:
        self.count = count
        self.divided = divided
        self.watts = watts
        self.tick_s = tick_s
        self.without = without
        self.set_calls: list[str] = []
        self._start_s = time.perf_counter()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceSet"):
            object.__getattribute__(self, "set_calls").append(name)
        if name.startswith("nvml") and name in object.__getattribute__(self, "without"):

            def refuse(*_: Any) -> Any:
                raise FakeNvml.NVMLError("Not Supported")

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.0"

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        return [int(self.divided), 1]

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle-{uuid}"

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "Imaginary Board"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        ticks = int((time.perf_counter() - self._start_s) / self.tick_s)
        return int(1e6 + ticks * self.tick_s * self.watts * 1e3)

    def nvmlDeviceGetFieldValues(self, handle: str, field_ids: list[int]) -> list[Any]:
        value = SimpleNamespace(uiVal=int(self.watts * 1.1 * 1e3))
        return [SimpleNamespace(nvmlReturn=0, value=value) for _ in field_ids]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self.watts * 1e3)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 41

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return 0x4 | 0x400

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=600 * 2**20, total=80 * 2**30)
