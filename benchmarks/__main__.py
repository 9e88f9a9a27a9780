"""The command `python -m benchmarks`: measure, print the tables, write JSON.

It imports nothing of the simulator: the processes it starts are what is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.cases import all_cases, chosen
from benchmarks.measure import MeasurementError, measure, probe
from benchmarks.results import gather, read_baseline, write_document
from benchmarks.tables import page

BASELINE = Path(__file__).resolve().parent / "baseline.json"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.add_argument(
        "--quick", action="store_true", help="One repetition, up to 100,000 requests, fewer cases."
    )
    options.add_argument(
        "--only", metavar="SUBSTRING", default="", help="Only cases whose name holds this."
    )
    options.add_argument("--repetitions", type=_positive, help="Repetitions (3; 1 with --quick).")
    options.add_argument("--json", metavar="FILE", type=Path, help="Write the figures here.")
    options.add_argument(
        "--baseline",
        metavar="FILE",
        type=Path,
        default=BASELINE,
        help="A file that --json wrote, to compare with (benchmarks/baseline.json).",
    )
    options.add_argument("--list", action="store_true", help="List the cases and stop.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if a case could not be measured, 2 if none was asked for."""
    given = parser().parse_args(arguments)
    picked = chosen(all_cases(), given.quick, given.only)
    if not picked:
        print(f"No case holds {given.only!r}; --list names them all.", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(case.name for case in picked))
        return 0
    if not given.baseline.is_file() and given.baseline != BASELINE:
        print(f"There is no baseline {given.baseline}.", file=sys.stderr)
        return 2
    if given.json is not None and (given.json.is_dir() or not given.json.parent.is_dir()):
        print(f"The figures cannot be written to {given.json}: give a file.", file=sys.stderr)
        return 2
    try:
        baseline = read_baseline(given.baseline)
    except (OSError, ValueError) as error:
        print(f"The baseline {given.baseline} cannot be read: {error}.", file=sys.stderr)
        return 2
    started_s = time.monotonic()
    repetitions = given.repetitions or (1 if given.quick else 3)
    notes = Console(stderr=True, highlight=False)
    say = notes.print if notes.is_terminal else _silent
    say("probing capacities and compiling")
    try:
        conditions = probe(picked)
    except MeasurementError as error:
        print(f"The capacities could not be probed: {error}", file=sys.stderr)
        return 1
    measured = measure(picked, repetitions, conditions, say)
    results = gather(measured, conditions, baseline, given.quick, repetitions)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150
    console.print(page(results))
    console.print(f"The run took {time.monotonic() - started_s:.0f} s.")
    if given.json is not None:
        write_document(results, given.json)
        console.print(f"Figures: {given.json}")
    return 1 if results.failures else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given; a whole number of at least 1 is needed."
        )
    return int(text)


def _silent(_words: str) -> None:
    """Where nobody watches, the tables are enough."""


if __name__ == "__main__":
    sys.exit(main())
