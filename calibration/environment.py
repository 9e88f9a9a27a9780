"""What this machine offers a calibration: packages, accelerators and energy meters."""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors", "nvidia-ml-py")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; `has_energy_counter` says whether it counts joules."""

    name: str
    memory_bytes: int
    driver: str
    has_energy_counter: bool


@dataclass(frozen=True)
class Environment:
    """Package versions (None where missing), CUDA and the GPUs, or the reason for none."""

    python: str
    packages: dict[str, str | None]
    cuda: str | None
    gpus: tuple[Gpu, ...]
    no_gpu_reason: str | None

    @property
    def missing_packages(self) -> list[str]:
        """Packages of the extra `calibration` that are not installed."""
        return [name for name, found in self.packages.items() if found is None]


def inspect_environment() -> Environment:
    """Look at this machine; nothing is set and nothing is started on a device."""
    packages = {name: _version(name) for name in PACKAGES}
    gpus, reason = _gpus() if packages["nvidia-ml-py"] else ((), "nvidia-ml-py is not installed")
    return Environment(
        python=platform.python_version(),
        packages=packages,
        cuda=_cuda() if packages["torch"] else None,
        gpus=gpus,
        no_gpu_reason=reason,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> str | None:
    torch: Any = importlib.import_module("torch")
    return str(torch.version.cuda) if torch.cuda.is_available() else None


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return (), f"the NVIDIA driver does not answer: {error}"
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            try:
                nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                counts = True
            except nvml.NVMLError:
                counts = False
            memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append(Gpu(str(nvml.nvmlDeviceGetName(handle)), memory, driver, counts))
        return tuple(found), None if found else "the driver lists no GPU"
    finally:
        nvml.nvmlShutdown()
