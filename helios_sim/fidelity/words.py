"""A comparison of real and simulated runs in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from helios_sim.fidelity.assessment import Fidelity
from helios_sim.fidelity.figures import FigureRow
from helios_sim.fidelity.swaps import SMALL
from helios_sim.wording import listed, number

TOLD: Final[dict[str, str]] = {
    "within": "within the spread",
    "above": "above the spread",
    "below": "below the spread",
    "same": "the same",
    "differs": "differs",
    "unknown": "unknown: one repeat",
    "not measured": "not measured",
}
"""Verdicts as a reader meets them."""

_FIRST: Final = (
    ("output_throughput", "throughput"),
    ("mean_tpot_ms", "mean TPOT"),
    ("p50_e2el_ms", "median E2E"),
    ("p90_ttft_ms", "p90 TTFT"),
    ("mean_batch_size", "batch size"),
    ("total_gpu_energy", "energy"),
)


def signed_percent(share: float | None) -> str:
    """A relative error as '+3.1 %'; a dash where it is undefined."""
    if share is None:
        return "\N{EN DASH}"
    size = abs(100.0 * share)
    if size < 0.005:
        return "0 %"
    shown = f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 1 else f"{size:.2f}"
    return f"{'+' if share > 0 else chr(0x2212)}{shown} %"


def spanned_errors(errors: tuple[float | None, float | None]) -> str:
    """Relative errors as 'least to most', or as one where they read alike."""
    return " to ".join(dict.fromkeys(map(signed_percent, errors)))


def sentence(text: str) -> str:
    """The text with its first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


def name_of(row: FigureRow) -> str:
    """A figure as a sentence names it: 'p90 TTFT', 'mean batch size'."""
    title, _, statistic = row.title.partition(", ")
    if " " in statistic or "," in statistic:
        title, statistic = row.title, ""
    if title != "E2E" and title[:2] != title[:2].upper():
        title = title[0].lower() + title[1:]
    return f"{statistic} {title}" if statistic else title


def spread_text(row: FigureRow) -> str:
    """The run-to-run spread as 'low to high'; a dash where one repeat gives none.

    Two deviations about a median may reach where no figure can be.
    """
    if row.low is None or row.high is None:
        return "\N{EN DASH}"
    high = min(row.high, 100.0) if row.unit == "%" else row.high
    return spanned((max(0.0, row.low), high))


def spanned(values: Sequence[float]) -> str:
    """Numbers as 'least to most', or as one where they read alike."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def headline(fidelity: Fidelity) -> str:
    """The answer in one sentence."""
    errors = []
    for key, name in _FIRST:
        row = fidelity.row(key)
        if row is not None and row.error is not None:
            errors.append(f"{name} {signed_percent(row.error)}")
    said = f"Simulated against real: {', '.join(errors)}." if errors else "Nothing compares."
    row = fidelity.row("saturation")
    if row is not None:
        said += (
            f" Both sides are {row.simulated}."
            if set(row.real) == {row.simulated}
            else f" The real side is {listed(sorted({str(one) for one in row.real}))}, the "
            f"simulated one {row.simulated}."
        )
    return said


def remarks(fidelity: Fidelity) -> list[str]:
    """What has to be said beside the headline: spread, causes, what is missing."""
    found = []
    verdicts = fidelity.verdicts()
    num = len(fidelity.sides.reals)
    judged = sum(verdicts.get(name, 0) for name in ("within", "above", "below"))
    if judged:
        found.append(
            f"Of {judged} figures {verdicts.get('within', 0)} lie within the run-to-run spread of "
            f"{num} real runs."
        )
    else:
        found.append(
            "There is one real run, so whether a difference is more than the run-to-run spread is "
            "unknown; repeat the real run."
        )
    slowed = [one for side in fidelity.sides.reals if (one := side.slowdown) is not None]
    if slowed:
        found.append(
            f"The machine was {spanned(slowed)} times as slow around the real runs as while the "
            "profile was measured."
        )
    paced = [one for side in fidelity.sides.reals if (one := side.pace_factor) is not None]
    if paced:
        found.append(
            f"Known arithmetic took {spanned(paced)} times as long between the iterations of the "
            "real runs as around the profile's readings."
        )
    unmeasured = [name_of(row) for row in fidelity.figures if row.verdict == "not measured"]
    if unmeasured:
        found.append(f"Not measured on both sides: {listed(unmeasured)}.")
    attribution = fidelity.attribution
    if attribution is not None:
        wrong = [one for one in attribution.causes if one.error and abs(one.error) > SMALL]
        by_cause: dict[str, list[str]] = {}
        for cause in wrong:
            row = fidelity.row(cause.key)
            if row is not None:
                by_cause.setdefault(cause.said, []).append(name_of(row))
        found += [f"Error in {listed(names)}: {said}." for said, names in by_cause.items()]
        if any(cause.by_chance for cause in wrong):
            found.append(
                f"Within chance: among what {attribution.chance.num_texts} simulations of the same "
                "requests on other text and this one give, at the pace of the run where it was "
                "seen."
            )
        found += [
            f"{sentence(swap.title)}: {swap.missing}."
            for swap in attribution.swaps
            if swap.missing is not None
        ]
    return [*found, *fidelity.notes]
