"""One thread for every test: several share a machine, and small models gain nothing from more."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported whether it compiles kernels or walks through them.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
