"""A model with fewer of its exits: what the others would cost, and what they bring.

Every exit that is asked costs its check, and rows that leave at different exits part. A token
that would have left at an exit given up leaves at the next one kept where it is confident.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError, did_you_mean
from helios_sim.exits import ExitTraces, read_traces, write_traces
from helios_sim.profile import GRADES, TRACES_FILE, Profile, TraceExits, quantity
from helios_sim.profiles.derive import (
    check_name,
    exit_layers_of,
    layers_said,
    same_device_document,
)
from helios_sim.profiles.files import save_profile

OPTION: Final = "--keep-exits"


def kept_of(texts: Sequence[str], profile: Profile) -> dict[str, tuple[int, ...]]:
    """Exit layers to keep by model, from texts MODEL=LAYERS; the full depth is always among them.

    Raises InputError where a model or an exit is not the profile's, or none would be given up.
    """
    kept: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, sign, layers = text.partition("=")
        if not sign:
            raise InputError(
                f"{text!r} was given; allowed is MODEL=LAYERS, such as llama2-13b=20,40.", OPTION
            )
        if name not in profile.models:
            raise InputError(
                f"{name!r} was given.{did_you_mean(name, profile.models)} Allowed are the models "
                f"of {profile.name!r}: {', '.join(profile.models)}.",
                OPTION,
            )
        if name in kept:
            raise InputError(f"{name!r} is given twice; give it once.", OPTION)
        there = profile.models[name].model.exit_layers
        asked = {*exit_layers_of(layers, OPTION), there[-1]}
        if unknown := sorted(asked - {*there}):
            raise InputError(
                f"{name!r} has no exit after layer {unknown[0]}; allowed are some of "
                f"{layers_said(there)}.",
                OPTION,
            )
        if asked == {*there}:
            raise InputError(
                f"{layers_said(there)} are all exits of {name!r}; leave out those to be given up.",
                OPTION,
            )
        kept[name] = tuple(sorted(asked))
    return kept


def document_with_exits(
    profile: Profile, name: str, kept: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The document of a profile whose models keep these exits of theirs, and no others."""
    check_name(name, profile)
    document = same_device_document(profile, name)
    if facts := _facts_of(profile):
        document["measurement"] = facts
    notes = []
    for model, layers in kept.items():
        there = profile.models[model].model.exit_layers
        told = f"of {layers_said(there)} in {profile.name}, those to keep"
        entry = document["models"][model]
        _set(entry, "exit_layers", list(layers), told)
        if document["exits"]["kind"] == "markov":
            shares = document["exits"]["candidates"][model]["exit_shares"]
            for domain, number in shares.items():
                summed = _summed(number["value"], there, layers)
                how = "a token that left at an exit given up leaves at the next one kept"
                _set(shares, domain, summed, f"from {profile.name}, {how}", "exit_shares")
        notes.append(f"{model} has the exits after layers {layers_said(layers)}, {told}.")
    document["provenance"]["notes"] = [*notes, *document["provenance"]["notes"]]
    before = str(document["description"]).rstrip(".")
    document["description"] = f"{before}. With fewer exits: {', '.join(kept)}."
    return document


def _facts_of(profile: Profile) -> dict[str, Any]:
    """What serving compares with the models that were measured, which these are."""
    measurement = profile.document.get("measurement", {})
    traced = measurement.get("exit_traces", {}).get("candidates", {})
    models = _only(("guard", "kernels"), measurement.get("models", {}))
    candidates = _only(("maps_sha256",), traced)
    facts = {"models": models} if models else {}
    return facts | ({"exit_traces": {"candidates": candidates}} if candidates else {})


def _only(keys: tuple[str, ...], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Objects by name with these of their keys alone; without any they are left out."""
    found = {
        name: {key: node[key] for key in keys if node.get(key) is not None}
        for name, node in nodes.items()
    }
    return {name: node for name, node in found.items() if node}


def write_with_exits(
    profile: Profile,
    name: str,
    kept: Mapping[str, tuple[int, ...]],
    folder: Path,
    *,
    overwrite: bool = False,
) -> Profile:
    """Write the folder of a profile whose models keep these exits, its exit traces included."""
    document = document_with_exits(profile, name, kept)
    if not isinstance(profile.exits, TraceExits):
        return save_profile(document, folder, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as drafts:
        traces = Path(drafts) / TRACES_FILE
        write_traces(_with_exits(read_traces(profile.exits.path), kept), traces)
        return save_profile(document, folder, traces=traces, overwrite=overwrite)


def _with_exits(traces: ExitTraces, kept: Mapping[str, tuple[int, ...]]) -> ExitTraces:
    """The same text with the columns of the exits that are kept."""

    def thinned(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {**arrays, **{name: arrays[name][..., places] for name, places in levels.items()}}

    levels = {
        name: [traces.exit_layers[name].index(layer) for layer in layers]
        for name, layers in kept.items()
    }
    return replace(
        traces,
        exit_layers={**traces.exit_layers, **kept},
        confidence=thinned(traces.confidence),
        agrees=thinned(traces.agrees),
        nll_nats=thinned(traces.nll_nats),
    )


def _summed(shares: Sequence[float], there: Sequence[int], kept: Sequence[int]) -> list[float]:
    """The share of tokens that leave at each exit kept."""
    found, before = [], 0
    for layer in kept:
        found.append(sum(s for s, at in zip(shares, there, strict=True) if before < at <= layer))
        before = layer
    return [float(f"{share:.12g}") for share in found]


def _set(table: dict[str, Any], key: str, value: Any, how: str, number: str | None = None) -> None:
    """A number of the new model, graded `derived` or as it was where that is lower."""
    grade = max("derived", table[key]["grade"], key=GRADES.index)
    table[key] = quantity(number or key, value, grade, f"{how}; there: {table[key]['source']}")
