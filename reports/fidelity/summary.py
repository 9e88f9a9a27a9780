"""The study's summary: for each figure its errors, the run-to-run spread, and what lies beyond."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from helios_sim.fidelity.swaps import BY_CHANCE
from helios_sim.wording import listed, number, times
from reports.fidelity.figures import JUDGED

TITLES: Final = (
    "Figure",
    "Bar of a GPU",
    "Median error",
    "Worst",
    "Median spread",
    "In spread",
    "In twice",
    "Beyond twice, likely from",
)
_TYPICAL: Final = {
    "plain": ("As it is", "as they are"),
    "paced": (
        "At its pace",
        "at its pace, with all times but those of loading stretched by what known arithmetic took "
        "between its iterations, over what it took around the profile's readings",
    ),
    "text": (
        "Middle text",
        "of the middle of simulations of the same requests on the given text and others, at its "
        "pace where that was seen: what a policy decides on few tokens depends on the text, so "
        "that neither one real run nor one simulated one is typical of it",
    ),
}
"""Kinds of errors against the typical real runs: the title of each, and what is said of it."""
WITHIN_BAR: Final = "within the bar of a GPU all the same"
"""Said of an error beyond twice the spread that a GPU may have."""
_DASH: Final = "\N{EN DASH}"


def summary_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a figure, in words."""
    return [_row(one) for one in results["targets"]]


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    name, bar = JUDGED[one["key"]].name, f"{100 * one['target']:g} %"
    if not one["num_cases"]:
        return (name, bar, "not measured", *[_DASH] * 5)
    judged = one["num_judged"]
    return (
        name,
        f"{bar}, {'met' if one['met'] else 'missed'}",
        percent(one["median_error"]),
        percent(one["worst_error"]),
        _DASH
        if one["median_spread"] is None
        else f"\N{PLUS-MINUS SIGN}{percent(one['median_spread'])}",
        f"{one['within']} of {judged}" if judged else "unknown",
        f"{one['within_twice']} of {judged}" if judged else "unknown",
        causes(one["beyond"]) or (_DASH if judged else "unknown"),
    )


def typical_table(results: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Titles, and a row for each figure whose errors are known in more ways than one; else none."""
    told = [(one, typical) for one in results["targets"] if (typical := one.get("typical"))]
    if not told:
        return ()
    kinds = _kinds(results)
    titles = ("Figure", "Cases", *(word for kind in kinds for word in (_TYPICAL[kind][0], "Worst")))
    columns = [f"{kind}_{part}" for kind in kinds for part in ("median", "worst")]
    rows = [
        (
            JUDGED[one["key"]].name,
            f"{typical['num_cases']} of {one['num_cases']}",
            *(percent(typical.get(column)) for column in columns),
        )
        for one, typical in told
    ]
    return (titles, *rows)


def typical_said(results: Mapping[str, Any]) -> str:
    """What the table of errors against the typical real runs shows."""
    return (
        "Errors against the typical real run of each case, the one that causes are told against: "
        f"{'; '.join(_TYPICAL[kind][1] for kind in _kinds(results))}."
    )


def _kinds(results: Mapping[str, Any]) -> list[str]:
    """The kinds of errors against the typical real runs that some figure has."""
    known = [one.get("typical", {}) for one in results["targets"]]
    return [kind for kind in _TYPICAL if any(f"{kind}_median" in one for one in known)]


def causes(beyond: Sequence[Mapping[str, Any]]) -> str:
    """Likely causes with how many cases each has, the commonest first.

    Which of them are within chance stands in the list of the cases.
    """
    told = Counter(str(one["cause"]).removesuffix(BY_CHANCE) for one in beyond).most_common()
    return listed([f"{said} ({num})" for said, num in told])


def measure_of(results: Mapping[str, Any]) -> str:
    """What the errors are held to, by the kind of device."""
    if results["device_kind"] == "cpu":
        return (
            "On a processor that others may use too the measure is twice the run-to-run spread of "
            "the real runs; the bars are those of a GPU. Spreads are half widths."
        )
    return (
        "Median errors are held to the bars; beside them the run-to-run spread of the real runs, "
        "half its width."
    )


def percent(share: float | None) -> str:
    """A share without its sign, in per cent."""
    return _DASH if share is None else f"{number(100.0 * abs(share))} %"


def equal_quality_said(one: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What came of a policy at equal quality: its settings, and its real gain if it has one."""
    where = _where(one, results)
    chosen = one["chosen"]
    if chosen is None:
        near = one["nearest"]
        return (
            f"{one['policy']}, {where}: no setting that was tried keeps the quality in simulation, "
            f"so none was served. The nearest ({_options(near)}) has {times(near['perplexity'])} "
            f"vanilla's perplexity at {times(near['throughput'])} its throughput."
        )
    said = (
        f"{one['policy']}, {where}, with {_options(chosen)}: simulated before serving, "
        f"{times(chosen['throughput'])} vanilla's throughput at {times(chosen['perplexity'])} its "
        "perplexity"
    )
    served = _served(one, results)
    if served is None:
        return f"{said}; not served beside vanilla here."
    speed, quality = (
        served[key]["real_over_vanilla"] for key in ("output_throughput", "perplexity")
    )
    verdict = _verdict(speed, quality, one["bound"])
    return f"{said}; really {times(speed)} at {times(quality)}, {verdict}."


def _verdict(speed: float, quality: float, bound: float) -> str:
    if quality > bound:
        return "so the quality is not kept for real"
    return "a gain at equal quality" if speed > 1.0 else "no gain"


def _served(one: Mapping[str, Any], results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The figures of the case that was served, with those over vanilla's; None without."""
    group = group_of(results, one["group"])
    label = f"{one['policy']} at equal quality"
    members = [] if group is None else group["policies"]
    found: Mapping[str, Any] = next(
        (each["figures"] for each in members if each["policy"] == label), {}
    )
    known = [
        found.get(key, {}).get("real_over_vanilla") for key in ("output_throughput", "perplexity")
    ]
    return None if None in known else found


def _where(one: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    group = group_of(results, one["group"])
    return str(one["case"]) if group is None else f"{group['texts']} texts"


def group_of(results: Mapping[str, Any], name: str | None) -> Mapping[str, Any] | None:
    """Policies that met the same requests, by the name of their group."""
    return next((one for one in results["groups"] if one["group"] == name), None)


def _options(tried: Mapping[str, Any]) -> str:
    return listed([f"{name} {value}" for name, value in tried["options"].items()])


def summary_text(results: Mapping[str, Any]) -> str:
    """The summary for a terminal, columns aligned."""
    lines = [*_aligned([TITLES, *summary_rows(results)]), measure_of(results)]
    typical = typical_table(results)
    if typical:
        lines += [*_aligned(typical), typical_said(results)]
    said = [equal_quality_said(one, results) for one in results["equal_quality"]]
    return "\n".join([*lines, *said])


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
