"""What the cases of a study amount to: errors beside their spread, gains, and the files of it.

A study's results are plain data, so that what was served once can be judged again when the model
that simulates it has changed.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from helios_sim.errors import InputError
from helios_sim.folders import write_whole
from helios_sim.runs.metrics import rounded_figures
from reports.fidelity.cases import case_named
from reports.fidelity.figures import BESIDE, JUDGED
from reports.fidelity.summary import WITHIN_BAR

SCHEMA_VERSION: Final = 3

Data: TypeAlias = Mapping[str, Any]
"""A study, a case or a figure as `results.json` has it."""

GAINS: Final = (
    ("output_throughput", "throughput", True),
    ("mean_e2el_ms", "mean E2E", False),
    ("p50_ttft_ms", "median TTFT", False),
    ("mean_tpot_ms", "mean TPOT", False),
    ("energy_per_output_token", "energy per token", False),
    ("mean_batch_size", "batch size", True),
    ("perplexity", "perplexity", False),
)
"""Figures in which HELIOS is set against the baselines, and whether more is better."""

_SWAPS: Final = ("nothing", "pace", "everything")
"""What is taken from the typical real run for the further errors in the table."""

_MIDDLE_ERRORS: Final = "middle_errors"
"""Where a case keeps the errors of the middle of several texts."""

_AGAINST_SPREAD: Final = ("within", "above", "below")
"""Verdicts of a figure whose run-to-run spread is known."""


def results_of(facts: Data, cases: Sequence[Data]) -> dict[str, Any]:
    """A study as plain data: what is known of the whole, its cases, and what they amount to."""
    # Rounded first, so that the same comes of a study that was written and read again.
    cases = rounded_figures(cases)
    found: dict[str, Any] = rounded_figures(
        {
            "schema_version": SCHEMA_VERSION,
            **facts,
            "num_discarded": sum(case["num_discarded"] for case in cases),
            "targets": targets(cases),
            "same_saturation": sum(
                _figure(case, "saturation")["verdict"] == "same" for case in cases
            ),
            "gains": gains(cases),
            "groups": groups(cases),
            "cases": cases,
        }
    )
    return found


def targets(cases: Sequence[Data]) -> list[dict[str, Any]]:
    """For each figure with a target: absolute errors, run-to-run spreads, and what lies beyond.

    `within_twice` counts the cases whose error is within twice the run-to-run spread, `beyond`
    lists the others with their likely cause. `median_spread` is half the width of a spread over
    the real figure. `typical` holds errors against the typical real runs.
    """
    found = []
    for key, figure in JUDGED.items():
        target = figure.target
        rows = [(case, row) for case in cases if (row := _found(case, key)) is not None]
        errors = sorted(abs(row["error"]) for _, row in rows if row["error"] is not None)
        if not errors:
            found.append({"key": key, "target": target, "num_cases": 0})
            continue
        median = statistics.median(errors)
        judged = [(case, row) for case, row in rows if row["verdict"] in _AGAINST_SPREAD]
        spreads = [row["error_in_spreads"] for _, row in judged]
        widths = [width for _, row in judged if (width := _half_width(row)) is not None]
        found.append(
            {
                "key": key,
                "target": target,
                "num_cases": len(errors),
                "median_error": median,
                "worst_error": errors[-1],
                "met": median <= target,
                **_typical(cases, key),
                "median_spread": statistics.median(widths) if widths else None,
                "num_judged": len(spreads),
                "within": sum(1 for one in spreads if one is not None and one <= 1.0),
                "within_twice": sum(1 for one in spreads if one is not None and one <= 2.0),
                "beyond": [
                    _beyond(case, row, target)
                    for case, row in judged
                    if row["error_in_spreads"] is None or row["error_in_spreads"] > 2.0
                ],
            }
        )
    return found


def _typical(cases: Sequence[Data], key: str) -> dict[str, Any]:
    """Absolute errors against the typical real runs: as they are, at their pace, of other texts.

    Only of cases of which all is known that any case has, so that the kinds compare; nothing where
    no case has more than the first.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in ("plain", "paced", "text")}
    for place, case in enumerate(cases):
        told = (_error_with("nothing", case, key), _error_with("pace", case, key))
        for name, error in zip(found, (*told, _by_chance(_MIDDLE_ERRORS, case, key)), strict=True):
            if error is not None:
                found[name][place] = abs(error)
    known = [name for name in found if found[name]]
    places = set(range(len(cases))).intersection(*(found[name] for name in known))
    if known in ([], ["plain"]) or not places:
        return {}
    typical: dict[str, Any] = {"num_cases": len(places)}
    for name in known:
        errors = [found[name][place] for place in places]
        typical |= {f"{name}_median": statistics.median(errors), f"{name}_worst": max(errors)}
    return {"typical": typical}


def _by_chance(told: str, case: Data, key: str) -> float | None:
    """What a case's simulations on several texts tell of a figure; None unknown."""
    chance = (case["attribution"] or {}).get("chance", {})
    found: float | None = chance.get(told, {}).get(key)
    return found


def _error_with(swap: str, case: Data, key: str) -> float | None:
    """A figure's error against the typical real run with an ingredient swapped; None unknown."""
    swaps = case["attribution"]["swaps"] if case["attribution"] else ()
    told: Data = next((one["errors"] for one in swaps if one["name"] == swap), {})
    error: float | None = told.get(key)
    return error


def _found(case: Data, key: str) -> Data | None:
    """A figure of a case, None where neither side has it."""
    return next((row for row in case["figures"] if row["key"] == key), None)


def _figure(case: Data, key: str) -> Data:
    """A figure that every case has."""
    found = _found(case, key)
    assert found is not None, f"Every run has the figure {key}."
    return found


def _half_width(row: Data) -> float | None:
    """Half the width of the run-to-run spread, over the real figure."""
    if row["low"] is None or row["high"] is None or not row["median"]:
        return None
    return float((row["high"] - row["low"]) / 2 / abs(row["median"]))


def _beyond(case: Data, row: Data, target: float) -> dict[str, Any]:
    """By how much a case lies beyond its spread, and what the swaps say of it.

    Repeats that hardly differ leave no spread; an error that a GPU may have needs no cause.
    """
    attribution = case["attribution"]
    causes = () if attribution is None else attribution["causes"]
    cause = next((one for one in causes if one["key"] == row["key"]), None)
    said = "not told" if cause is None else cause["said"]
    if row["error"] is not None and abs(row["error"]) <= target:
        said = WITHIN_BAR
    return {
        "case": case["name"],
        "error": row["error"],
        "error_in_spreads": row["error_in_spreads"],
        "half_width": _half_width(row),
        "cause": said,
        "error_without": None if cause is None else cause["error_without"],
        "remainder": None if cause is None else cause["remainder"],
    }


def gains(cases: Sequence[Data]) -> list[dict[str, Any]]:
    """HELIOS against each baseline on the same requests; above 1 is better.

    Real, simulated, and by the middle of several texts, as it could be foreseen and at the paces of
    the runs; None where that is not known of a figure.
    """
    found = []
    for group, members in _groups(cases):
        plain = [case for case in members if not case["equal_quality"]]
        ours = next((case for case in plain if case["policy"] == "helios"), None)
        if ours is None:
            continue
        for other in plain:
            if other is ours:
                continue
            for key, name, more in GAINS:
                own, base = _found(ours, key), _found(other, key)
                if own is None or base is None:
                    continue
                foreseen, middles = (
                    [_by_chance(told, case, key) for case in (ours, other)]
                    for told in ("foreseen", "middles")
                )
                found.append(
                    {
                        "group": group,
                        "against": other["policy"],
                        "key": key,
                        "name": name,
                        "real": _gain(own["median"], base["median"], more),
                        "simulated": _gain(own["simulated"], base["simulated"], more),
                        "middle_text": _gain(foreseen[0], foreseen[1], more),
                        "middle_text_at_pace": _gain(middles[0], middles[1], more),
                    }
                )
    return found


def groups(cases: Sequence[Data]) -> list[dict[str, Any]]:
    """Policies that met the same requests, beside each other: real and simulated figures."""
    found = []
    for group, members in _groups(cases):
        if len(members) < 2:
            continue
        vanilla = next((case for case in members if case["policy"] == "vanilla"), None)
        found.append(
            {
                "group": group,
                "arrivals": members[0]["arrivals"],
                "texts": members[0]["texts"],
                "policies": [_beside(case, vanilla) for case in members],
            }
        )
    return found


def _groups(cases: Sequence[Data]) -> list[tuple[str, list[Data]]]:
    """Cases that met the same requests, by the name of their group."""
    names = dict.fromkeys(case["group"] for case in cases if case["group"] is not None)
    return [(name, [case for case in cases if case["group"] == name]) for name in names]


def _beside(case: Data, vanilla: Data | None) -> dict[str, Any]:
    """A policy's figures, and as multiples of vanilla's."""
    figures = {}
    for figure in BESIDE:
        own = _found(case, figure.key)
        base = None if vanilla is None else _found(vanilla, figure.key)
        if own is None:
            continue
        real, ours = own["median"], own["simulated"]
        figures[figure.key] = {
            "real": real,
            "simulated": ours,
            "real_over_vanilla": None if base is None else _gain(real, base["median"], True),
            "simulated_over_vanilla": None
            if base is None
            else _gain(ours, base["simulated"], True),
        }
    return {
        "policy": case["policy"],
        "equal_quality": case["equal_quality"],
        "options": case["options"],
        "figures": figures,
    }


def _gain(own: Any, base: Any, more_is_better: bool) -> float | None:
    if not isinstance(own, float) or not isinstance(base, float) or own == 0.0 or base == 0.0:
        return None
    return own / base if more_is_better else base / own


def read_results(path: Path) -> dict[str, Any]:
    """A study's results; raises `InputError` for another file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["schema_version"]
        known = {case["name"] for case in found["cases"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"These are no results of a study ({error}).", str(path)) from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"The results have schema version {version}; this program reads {SCHEMA_VERSION}. "
            "Make the study's page anew from its runs.",
            str(path),
        )
    unknown = sorted(name for name in known if case_named(name) is None)
    if unknown:
        raise InputError(f"The study has no case {unknown[0]!r} any more.", str(path))
    return dict(found)


def check_target(out: Path) -> None:
    """Raise `InputError` unless files can be written there, before an hour is spent on them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"No study can be written there: {error.strerror}.", str(out)) from error


def write_results(results: Data, page: str, out: Path) -> None:
    """Write `results.json`, `results.csv` and the page, each whole or not at all."""
    check_target(out)
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    files = {"results.json": text + "\n", "report.html": page, "results.csv": _table(results)}
    for name, content in files.items():
        try:
            write_whole(out / name, content.encode())
        except OSError as error:
            raise InputError(
                f"It cannot be written: {error.strerror}. The runs are kept; free some space and "
                "give the same command.",
                str(out / name),
            ) from error


def _table(results: Data) -> str:
    """A row a case and figure, as CSV."""
    columns = ("real_median", "low", "high", "simulated", "error", "error_in_spreads", "verdict")
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    swapped = (*(f"error_with_{one}" for one in _SWAPS), "error_of_middle_text")
    writer.writerow(("case", "figure", "unit", *columns, *swapped))
    for case in results["cases"]:
        for row in case["figures"]:
            real = row["median"] if row["median"] is not None else "/".join(map(str, row["real"]))
            values = [real, *(row[name] for name in columns[1:])]
            values += [_error_with(one, case, row["key"]) for one in _SWAPS]
            values.append(_by_chance(_MIDDLE_ERRORS, case, row["key"]))
            writer.writerow((case["name"], row["key"], row["unit"], *values))
    return file.getvalue()
