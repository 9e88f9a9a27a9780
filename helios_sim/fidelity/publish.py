"""A comparison of real and simulated runs written where the user asked: whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from helios_sim.errors import InputError
from helios_sim.fidelity.assessment import FIDELITY_FILE, Fidelity, json_text
from helios_sim.fidelity.page import render
from helios_sim.publish import check_page_target, check_writable, write_page_text
from helios_sim.records import REPORT_FILE, move_into_place

PAGES: Final = (".html", ".htm")


def check_fidelity_target(target: Path) -> None:
    """Raise `InputError` unless a comparison may be written here.

    Allowed are a page (a name that ends in .html) and a new folder, an empty one or an earlier
    comparison to replace.
    """
    if target.suffix.lower() in PAGES:
        check_page_target(target)
        return
    check_writable(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError("It is a file; allowed is a folder or a name in .html.", str(target))
    present = {entry.name for entry in target.iterdir()}
    foreign = sorted(present - {FIDELITY_FILE, REPORT_FILE})
    if foreign:
        raise InputError(
            f"The folder holds {foreign[0]!r}, which is no comparison of ours; allowed is a new "
            "folder, an empty one, or an earlier comparison to replace.",
            str(target),
        )


def write_fidelity(fidelity: Fidelity, target: Path) -> Path:
    """Write the page, and `fidelity.json` beside it where the target is a folder; gives the page.

    A folder is written under a temporary name and moved into place.
    """
    check_fidelity_target(target)
    if target.suffix.lower() in PAGES:
        write_page_text(render(fidelity), target)
        return target
    folder = target.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        (draft / REPORT_FILE).write_text(render(fidelity), encoding="utf-8", newline="\n")
        (draft / FIDELITY_FILE).write_text(json_text(fidelity), encoding="utf-8", newline="\n")
        draft.chmod(0o755)
        move_into_place(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target / REPORT_FILE
