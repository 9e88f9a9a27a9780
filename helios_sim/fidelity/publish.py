"""A comparison of real and simulated runs written where the user asked: whole, or not at all."""

from __future__ import annotations

from pathlib import Path

from helios_sim.fidelity.assessment import FIDELITY_FILE, Fidelity, json_text
from helios_sim.fidelity.page import render
from helios_sim.folders import folder_in_place
from helios_sim.publish import (
    check_comparison_target,
    is_page,
    write_page_text,
)
from helios_sim.records import REPORT_FILE


def check_fidelity_target(target: Path) -> None:
    """Raise `InputError` unless such a comparison may be written here."""
    check_comparison_target(target, FIDELITY_FILE)


def write_fidelity(fidelity: Fidelity, target: Path) -> Path:
    """Write the page, and `fidelity.json` beside it where the target is a folder; gives the page.

    A folder is written under a temporary name and moved into place.
    """
    check_fidelity_target(target)
    if is_page(target):
        write_page_text(render(fidelity), target)
        return target
    with folder_in_place(target) as draft:
        (draft / REPORT_FILE).write_text(render(fidelity), encoding="utf-8", newline="\n")
        (draft / FIDELITY_FILE).write_text(json_text(fidelity), encoding="utf-8", newline="\n")
    return target / REPORT_FILE
