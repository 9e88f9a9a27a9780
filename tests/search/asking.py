"""A small scenario with questions, and how the tests of the commands ask and read what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helios_sim.search.commands import Running
from helios_sim.settings.toml_writer import toml_text

A100, H100 = "NVIDIA A100-SXM4-40GB", "NVIDIA H100-SXM5-80GB"

RANGES = {
    "policy.breach_limit": {"low": 10, "high": 90},
    "policy.reassess_requests": {"low": 20, "high": 500, "log": True},
    "serving.max_batch": [8, 64],
}


def write(folder: Path, **more: Any) -> Path:
    """A small scenario file with both tables."""
    data = {
        "name": "small",
        "workload": {
            "num_requests": 60,
            "arrivals": {"kind": "poisson", "rate_per_s": 4.0},
            "prompt": {"kind": "constant", "tokens": 100},
            "output": {"kind": "geometric", "mean_tokens": 40, "max_tokens": 200},
        },
        "fleet": {"profile": "opt-a100-40gb", "weights_start": "host"},
        "slo": {"text": "ttft:1000 tpot:30"},
        "policy": [{"use": "helios"}],
        "plan": {"num_requests": 200, "max_replications": 3, "precision": 0.1},
        "search": {
            "num_trials": 12,
            "batch": 4,
            "num_requests": 60,
            "replications": 2,
            "held_out": 2,
            "held_out_rates": [1.0],
            "constraints": "agreement>=0.5",
            "ranges": RANGES,
        },
    }
    for key, value in more.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value  # type: ignore[dict-item]
    path = folder / "small.toml"
    path.write_text(toml_text(data))
    return path


def results(folder: Path) -> dict[str, bytes]:
    """Everything a search leaves but the journal, which holds clock times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith("study.journal")
    }


def inline(out: Path, **more: Any) -> Running:
    return Running(out, num_processes=1, **more)
