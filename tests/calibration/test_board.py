"""What a board says of itself, in units of ours, and in words where it says nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibration.measuring import board
from calibration.measuring.board import Board, BoardError, NoBoard, board_of, open_board
from tests.calibration.fake_nvml import FakeNvml


class Telling(FakeNvml):
    """A board each of whose figures is another number."""

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return {0: 41}[sensor]

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return {0: "the only one"}[index]


def opened(nvml: FakeNvml | None = None) -> Board:
    found = open_board(nvml=nvml or Telling(watts=250.0))
    assert isinstance(found, Board)
    return found


def test_a_boards_figures_are_in_watts_bytes_and_degrees() -> None:
    state = opened().state()
    assert (state.power_w, state.power_limit_w) == (250.0, 700.0)
    assert (state.memory_used_bytes, state.memory_total_bytes) == (600 * 2**20, 80 * 2**30)
    assert state.temperature_c == 41
    assert opened().mean_power_w() == 250.0
    assert opened().instant_power_w() == pytest.approx(275.0)


def test_instantaneous_power_that_is_not_reported_is_no_power() -> None:
    nvml: Any = FakeNvml()
    value = SimpleNamespace(uiVal=0)
    nvml.nvmlDeviceGetFieldValues = lambda *_: [SimpleNamespace(nvmlReturn=3, value=value)]
    with pytest.raises(BoardError, match=r"not reported \(NVML 3\)"):
        opened(nvml).instant_power_w()


def test_drivers_that_call_events_throttling_are_asked_so() -> None:
    nvml: Any = FakeNvml(without=("nvmlDeviceGetCurrentClocksEventReasons",))
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x1 | 0x40
    assert opened(nvml).state().throttle_reasons == ("idle", "hardware-thermal")
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0
    assert opened(nvml).state().throttle_reasons == ()


def test_a_function_that_the_package_lacks_is_named() -> None:
    class Old(FakeNvml):
        def __getattribute__(self, name: str) -> Any:
            if name == "nvmlDeviceGetPowerUsage":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(BoardError, match="this nvidia-ml-py has no nvmlDeviceGetPowerUsage"):
        opened(Old()).mean_power_w()


@pytest.mark.parametrize(
    ("nvml", "said"),
    [
        (FakeNvml(count=0, without=("nvmlDeviceGetHandleByUUID",)), "lists no GPU"),
        (FakeNvml(without=("nvmlInit",)), r"driver does not answer \(Not Supported\)"),
    ],
)
def test_a_machine_without_a_board_says_why(nvml: FakeNvml, said: str) -> None:
    found = open_board("GPU-1", nvml)
    assert isinstance(found, NoBoard)
    assert said.replace("\\", "") in found.reason


def test_without_the_package_no_board_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(board.importlib, "import_module", missing)
    assert open_board() == NoBoard("nvidia-ml-py is not installed")


def test_a_driver_that_does_not_tell_its_version_is_said() -> None:
    with pytest.raises(BoardError, match=r"does not tell its version \(Not Supported\)"):
        opened(FakeNvml(without=("nvmlSystemGetDriverVersion",))).driver()


@pytest.mark.parametrize("uuid", ["12ab-34cd", None])
def test_the_board_torch_computes_on_is_found_by_its_uuid(
    monkeypatch: pytest.MonkeyPatch, uuid: str | None
) -> None:
    """Of the two boards here only the one that is named can be told."""
    nvml = FakeNvml(count=2)
    properties = SimpleNamespace(**({} if uuid is None else {"uuid": uuid}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(board.importlib, "import_module", lambda name: nvml)
    found = board_of(torch.device("cuda", 0))
    if uuid is None:
        assert isinstance(found, NoBoard)
        assert "torch names no UUID" in found.reason
    else:
        assert isinstance(found, Board)
        assert found._handle == "handle-GPU-12ab-34cd"


def test_a_processor_has_no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board.importlib, "import_module", lambda name: FakeNvml())
    assert board_of(torch.device("cpu")) == NoBoard("a processor has no board")
