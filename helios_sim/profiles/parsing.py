"""The document of a profile, checked value by value, as frozen dataclasses."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from helios_sim.cost import COEFFICIENTS, OPTIONAL_COEFFICIENTS
from helios_sim.errors import InputError, did_you_mean, listed, shown
from helios_sim.model import SHAPE_COUNTS, EarlyExitModel, Family, ModelShape
from helios_sim.profile import (
    GRADES,
    ORIGINS,
    PROFILE_FILE,
    UNAVAILABLE,
    Agreement,
    Confidence,
    Device,
    Hull,
    Link,
    Loading,
    MarkovCandidate,
    MarkovExits,
    ModelProfile,
    Profile,
    Provenance,
    Quantity,
    TraceExits,
    unit_of,
)

SCHEMA_VERSION: Final = 1

CONFIDENCE_KINDS: Final = (
    "max-softmax",
    "top2-margin",
    "entropy",
    "calibrated-max-softmax",
    "calibrated-top2-margin",
    "calibrated-entropy",
)
FAMILIES: Final = ("opt", "llama")
MAX_NUMBER: Final = 1e18
"""The largest number of a profile, in any unit: what is multiplied with it stays finite."""

_WATTS: Final = ("idle_w", "active_w", "load_w")

_KNOT_PLACES: Final = {"batch_residual": "batch", "depth_residual": "loaded layers"}


class _Reader:
    """Reads a profile document with checks, and keeps every quantity it met by its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quantities: dict[str, Quantity] = {}

    def fail(self, place: str, message: str) -> InputError:
        """The error for a place in the file."""
        return InputError(message, where=f"{self.path}, {place}" if place else str(self.path))

    def table(
        self, node: Any, place: str, required: Sequence[str], optional: Sequence[str] = ()
    ) -> dict[str, Any]:
        """An object with exactly the keys allowed."""
        if not isinstance(node, dict):
            raise self.fail(place, f"An object was expected, {shown(node)} was given.")
        known = [*required, *optional]
        for key in node:
            if key not in known:
                hint = did_you_mean(key, known)
                raise self.fail(place, f"The key {key!r} is unknown.{hint} {_allowed(known)}.")
        for key in required:
            if key not in node:
                raise self.fail(place, f"The key {key!r} is missing.")
        return cast(dict[str, Any], node)

    def named(self, node: Any, place: str) -> dict[str, Any]:
        """An object whose keys are names, at least one."""
        if not isinstance(node, dict) or not node:
            raise self.fail(place, f"An object by name was expected, {shown(node)} was given.")
        return cast(dict[str, Any], node)

    def text(self, node: Any, place: str, allowed: Sequence[str] = ()) -> str:
        """A text that is not empty, one of `allowed` if any are named."""
        if not isinstance(node, str) or not node.strip():
            raise self.fail(place, f"A text was expected, {shown(node)} was given.")
        if allowed and node not in allowed:
            hint = did_you_mean(node, allowed)
            raise self.fail(place, f"{node!r} was given.{hint} Allowed are {listed(allowed)}.")
        return node

    def texts(self, node: Any, place: str) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(node, list):
            raise self.fail(place, f"A list of texts was expected, {shown(node)} was given.")
        return tuple(self.text(item, f"{place}[{index}]") for index, item in enumerate(node))

    def whole(self, node: Any, place: str, minimum: int = 0) -> int:
        """A whole number."""
        if isinstance(node, bool) or not isinstance(node, int) or node < minimum:
            raise self.fail(
                place,
                f"A whole number of at least {minimum} was expected, {shown(node)} was given.",
            )
        return node

    def number(self, node: Any, place: str, minimum: float = 0.0) -> float:
        """A finite number of at least `minimum`."""
        if isinstance(node, bool) or not isinstance(node, (int, float)):
            raise self.fail(place, f"A number was expected, {shown(node)} was given.")
        # The bound leaves out NaN, infinities and whole numbers that no float holds.
        if not abs(node) <= sys.float_info.max:
            raise self.fail(place, f"The value {node} was given; it must be finite.")
        if node > MAX_NUMBER:
            raise self.fail(
                place, f"The value {node:g} was given; at most {MAX_NUMBER:g} is allowed."
            )
        if node < minimum:
            raise self.fail(place, f"The value {node} was given; it must be at least {minimum:g}.")
        return float(node)

    def _entry(self, node: Any, place: str, name: str) -> tuple[Any, str, str, str, float | None]:
        table = self.table(node, place, ("value", "unit", "grade", "source"), ("error",))
        unit = unit_of(name)
        if table["unit"] != unit:
            raise self.fail(place, f"The unit {table['unit']!r} was given; {unit!r} is needed.")
        grade = self.text(table["grade"], f"{place}.grade", GRADES)
        source = self.text(table["source"], f"{place}.source")
        error = table.get("error")
        if error is not None:
            error = self.number(error, f"{place}.error")
        value = table["value"]
        if grade == UNAVAILABLE and unit[0] not in "JW":
            raise self.fail(
                f"{place}.grade",
                "'unavailable' was given; only joules and watts may be: without seconds and "
                "bytes nothing can be simulated. Measure the number, or give one with the "
                "grade 'assumed'.",
            )
        if (value is None) != (grade == UNAVAILABLE):
            raise self.fail(
                f"{place}.value",
                f"The value {shown(value)} was given with the grade {grade!r}; null and "
                "'unavailable' belong together.",
            )
        return value, unit, grade, source, error

    def quantity(
        self,
        node: Any,
        place: str,
        name: str,
        minimum: float = 0.0,
        maximum: float = math.inf,
        above_zero: bool = False,
    ) -> float:
        """The value of a quantity, within its bounds."""
        value, unit, grade, source, error = self._entry(node, place, name)
        number = self.number(value, f"{place}.value", minimum)
        if number > maximum:
            raise self.fail(place, f"The value {number:g} was given; at most {maximum:g} allowed.")
        if above_zero and number == 0.0:
            raise self.fail(place, "The value 0 was given; it must be greater.")
        self.quantities[place] = Quantity(number, unit, grade, source, error)
        return number

    def energy(self, node: Any, place: str, name: str) -> float | None:
        """The joules or watts of a quantity, None where they are unavailable."""
        value, unit, grade, source, error = self._entry(node, place, name)
        if value is not None:
            return self.quantity(node, place, name)
        self.quantities[place] = Quantity(None, unit, grade, source, error)
        return None

    def quantities_list(self, node: Any, place: str, name: str) -> tuple[float, ...]:
        """The values of a quantity that is a list."""
        values, unit, grade, source, error = self._entry(node, place, name)
        if not isinstance(values, list) or not values:
            raise self.fail(place, f"A list of numbers was expected, {shown(values)} was given.")
        numbers = []
        for index, value in enumerate(values):
            spot = f"{place}[{index}]"
            numbers.append(self.number(value, spot))
            self.quantities[spot] = Quantity(numbers[-1], unit, grade, source, error)
        return tuple(numbers)

    def knots(self, node: Any, place: str, name: str) -> tuple[tuple[float, float], ...]:
        """The knots (place, factor) of a quantity that is a curve."""
        place_name = _KNOT_PLACES[name]
        values, unit, grade, source, error = self._entry(node, place, name)
        if not isinstance(values, list):
            raise self.fail(place, f"A list of knots was expected, {shown(values)} was given.")
        knots: list[tuple[float, float]] = []
        for index, pair in enumerate(values):
            spot = f"{place}[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.fail(
                    spot, f"A knot [{place_name}, factor] was expected, not {shown(pair)}."
                )
            at = self.number(pair[0], spot, 1.0)
            factor = self.number(pair[1], spot)
            if factor == 0.0:
                raise self.fail(spot, "The factor 0 was given; it must be greater.")
            if knots and at <= knots[-1][0]:
                raise self.fail(
                    spot,
                    f"{place_name.capitalize()} {at:g} follows {knots[-1][0]:g}; they must rise.",
                )
            knots.append((at, factor))
            self.quantities[spot] = Quantity(factor, unit, grade, source, error)
        return tuple(knots)

    def count(self, node: Any, place: str, name: str, above_zero: bool = False) -> int:
        """The value of a quantity that is a whole number."""
        value = self.quantity(node, place, name, above_zero=above_zero)
        if value != int(value):
            raise self.fail(place, f"The value {value} was given; it must be whole.")
        return int(value)


def _allowed(known: Sequence[str]) -> str:
    return f"Allowed are {listed(known)}" if known else "None is allowed"


def parse_profile(document: Any, folder: Path, content_hash: str) -> Profile:
    """A checked profile from its document."""
    reader = _Reader(folder / PROFILE_FILE)
    if isinstance(document, dict) and document.get("schema_version") != SCHEMA_VERSION:
        given = shown(document.get("schema_version"))
        raise reader.fail(
            "schema_version",
            f"Version {given} was given; this release reads version {SCHEMA_VERSION}.",
        )
    top = reader.table(
        document,
        "",
        (
            "schema_version",
            "name",
            "description",
            "device",
            "loading",
            "models",
            "exits",
            "provenance",
        ),
        ("measurement",),
    )
    models = {
        name: _parse_model(reader, name, node, f"models.{name}")
        for name, node in reader.named(top["models"], "models").items()
    }
    device = _parse_device(reader, top["device"])
    for name, model in models.items():
        _check_power(reader, f"models.{name}.coefficients.power", device, model)
    return Profile(
        name=reader.text(top["name"], "name"),
        description=reader.text(top["description"], "description"),
        device=device,
        models=models,
        loading=_parse_loading(reader, top["loading"]),
        exits=_parse_exits(reader, top["exits"], models, folder),
        provenance=_parse_provenance(reader, top["provenance"]),
        quantities=reader.quantities,
        document=top,
        folder=folder,
        hash=content_hash,
    )


def _parse_device(reader: _Reader, node: Any) -> Device:
    keys = ("name", "num_gpus", "memory_bytes", "idle_w", "active_w", "load_w")
    table = reader.table(node, "device", keys)
    watts = {key: reader.energy(table[key], f"device.{key}", key) for key in _WATTS}
    idle_w = watts["idle_w"]
    for key in ("active_w", "load_w"):
        power_w = watts[key]
        if idle_w is not None and power_w is not None and power_w < idle_w:
            raise reader.fail(
                f"device.{key}",
                f"The value {power_w:g} was given; it includes the idle power, so it must "
                f"be at least idle_w ({idle_w:g}).",
            )
    return Device(
        name=reader.text(table["name"], "device.name"),
        num_gpus=reader.whole(table["num_gpus"], "device.num_gpus", 1),
        memory_bytes=reader.count(
            table["memory_bytes"], "device.memory_bytes", "memory_bytes", above_zero=True
        ),
        **{key: value or 0.0 for key, value in watts.items()},
    )


def _check_power(reader: _Reader, place: str, device: Device, model: ModelProfile) -> None:
    """Refuse a model that draws less than an idle device, or less at its limit than below it."""
    active_w, limit_w = (model.coefficients[f"power.{key}"] for key in ("active_w", "limit_w"))
    if active_w is not None and active_w < device.idle_w:
        raise reader.fail(
            f"{place}.active_w",
            f"The value {active_w:g} was given; it includes the idle power, so it must be at "
            f"least device.idle_w ({device.idle_w:g}).",
        )
    if active_w is not None and limit_w is not None and limit_w < active_w:
        raise reader.fail(
            f"{place}.limit_w",
            f"The value {limit_w:g} was given; it must be at least power.active_w ({active_w:g}).",
        )


def _parse_loading(reader: _Reader, node: Any) -> Loading:
    table = reader.table(node, "loading", ("disk", "host"))
    links = {}
    for key in ("disk", "host"):
        place = f"loading.{key}"
        link = reader.table(table[key], place, ("alpha_s", "bytes_per_s"))
        links[key] = Link(
            alpha_s=reader.quantity(link["alpha_s"], f"{place}.alpha_s", "alpha_s"),
            bytes_per_s=reader.quantity(
                link["bytes_per_s"], f"{place}.bytes_per_s", "bytes_per_s", above_zero=True
            ),
        )
    return Loading(**links)


def _parse_model(reader: _Reader, name: str, node: Any, place: str) -> ModelProfile:
    keys = (
        "shape",
        "exit_layers",
        "tokenizer",
        "bytes_per_param",
        "bytes_per_kv_element",
        "exit_head_params",
        "workspace_bytes",
        "confidence",
        "batch_buckets",
        "batch_residual",
        "hull",
        "coefficients",
    )
    table = reader.table(node, place, keys, ("depth_residual",))
    confidence = reader.table(
        table["confidence"], f"{place}.confidence", ("kind", "default_threshold")
    )
    needed = [key for key in COEFFICIENTS if key not in OPTIONAL_COEFFICIENTS]
    coefficients = reader.table(
        table["coefficients"], f"{place}.coefficients", needed, OPTIONAL_COEFFICIENTS
    )
    return ModelProfile(
        model=_parse_early_exit_model(reader, name, table, place),
        coefficients={
            key: reader.energy(coefficients[key], f"{place}.coefficients.{key}", key)
            if key in coefficients
            else 0.0
            for key in COEFFICIENTS
        },
        batch_buckets=_parse_buckets(reader, table["batch_buckets"], f"{place}.batch_buckets"),
        batch_residual=_parse_residual(reader, table, place, "batch_residual"),
        depth_residual=_parse_residual(reader, table, place, "depth_residual"),
        hull=_parse_hull(reader, table["hull"], f"{place}.hull"),
        workspace_bytes=reader.count(
            table["workspace_bytes"], f"{place}.workspace_bytes", "workspace_bytes"
        ),
        confidence=Confidence(
            kind=reader.text(confidence["kind"], f"{place}.confidence.kind", CONFIDENCE_KINDS),
            default_threshold=reader.quantity(
                confidence["default_threshold"],
                f"{place}.confidence.default_threshold",
                "default_threshold",
                maximum=1.0,
            ),
        ),
    )


def _parse_residual(
    reader: _Reader, table: dict[str, Any], place: str, name: str
) -> tuple[tuple[float, float], ...]:
    node = table.get(name)
    return () if node is None else reader.knots(node, f"{place}.{name}", name)


def _parse_early_exit_model(
    reader: _Reader, name: str, table: dict[str, Any], place: str
) -> EarlyExitModel:
    spot = f"{place}.shape"
    shape_table = reader.table(
        table["shape"],
        spot,
        ("family", *SHAPE_COUNTS, "tied_head", "grade", "source"),
        ("final_norm",),
    )
    for key in ("tied_head", "final_norm"):
        if not isinstance(shape_table.get(key, True), bool):
            raise reader.fail(f"{spot}.{key}", "true or false was expected.")
    family = reader.text(shape_table["family"], f"{spot}.family", FAMILIES)
    grade = reader.text(shape_table["grade"], f"{spot}.grade", GRADES)
    source = reader.text(shape_table["source"], f"{spot}.source")
    counts = {}
    for key in SHAPE_COUNTS:
        counts[key] = reader.whole(shape_table[key], f"{spot}.{key}", 1)
        reader.quantities[f"{spot}.{key}"] = Quantity(float(counts[key]), "1", grade, source)
    if counts["heads"] % counts["kv_heads"]:
        raise reader.fail(
            f"{spot}.kv_heads",
            f"{counts['kv_heads']} was given with {counts['heads']} heads; it must divide them, "
            "since each serves as many of them.",
        )
    shape = ModelShape(
        family=cast(Family, family),
        tied_head=shape_table["tied_head"],
        final_norm=shape_table.get("final_norm", True),
        **counts,
    )
    exits_place = f"{place}.exit_layers"
    exits = reader.quantities_list(table["exit_layers"], exits_place, "exit_layers")
    for layer in exits:
        if layer != int(layer):
            raise reader.fail(exits_place, f"Exit layer {layer} was given; it must be whole.")
        if layer > shape.layers:
            raise reader.fail(
                exits_place,
                f"An exit after layer {layer:g} was given; the model has {shape.layers} layers.",
            )
    try:
        return EarlyExitModel(
            name=name,
            shape=shape,
            exit_layers=tuple(int(layer) for layer in exits),
            tokenizer=reader.text(table["tokenizer"], f"{place}.tokenizer"),
            bytes_per_param=reader.whole(table["bytes_per_param"], f"{place}.bytes_per_param", 1),
            bytes_per_kv_element=reader.whole(
                table["bytes_per_kv_element"], f"{place}.bytes_per_kv_element", 1
            ),
            exit_head_params=reader.count(
                table["exit_head_params"], f"{place}.exit_head_params", "exit_head_params"
            ),
        )
    except InputError:
        raise
    except ValueError as error:
        raise reader.fail(exits_place, str(error)) from error


def _parse_buckets(reader: _Reader, node: Any, place: str) -> tuple[int, ...]:
    if not isinstance(node, list):
        raise reader.fail(place, f"A list of batch sizes was expected, {shown(node)} was given.")
    buckets = tuple(reader.whole(item, f"{place}[{index}]", 1) for index, item in enumerate(node))
    if list(buckets) != sorted(set(buckets)):
        raise reader.fail(place, f"The batch sizes {list(buckets)} were given; they must rise.")
    return buckets


def _parse_hull(reader: _Reader, node: Any, place: str) -> Hull | None:
    if node is None:
        return None
    table = reader.table(node, place, ("max_batch", "max_context_tokens"))
    return Hull(
        max_batch=reader.whole(table["max_batch"], f"{place}.max_batch", 1),
        max_context_tokens=reader.whole(
            table["max_context_tokens"], f"{place}.max_context_tokens", 1
        ),
    )


def _parse_exits(
    reader: _Reader, node: Any, models: Mapping[str, ModelProfile], folder: Path
) -> MarkovExits | TraceExits:
    if not isinstance(node, dict) or "kind" not in node:
        raise reader.fail("exits", "An object with the key 'kind' was expected.")
    kind = reader.text(node["kind"], "exits.kind", ("trace", "markov"))
    if kind == "trace":
        table = reader.table(node, "exits", ("kind", "file"))
        name = reader.text(table["file"], "exits.file")
        if Path(name).name != name:
            raise reader.fail("exits.file", f"{name!r} was given; name a file of the profile.")
        if not (folder / name).is_file():
            raise reader.fail("exits.file", f"The profile's folder holds no file {name!r}.")
        return TraceExits(folder / name)
    return _parse_markov(reader, node, models)


def _parse_markov(
    reader: _Reader, node: dict[str, Any], models: Mapping[str, ModelProfile]
) -> MarkovExits:
    plain = ("kind", "domains", "num_positions", "seed")
    numbers = ("nominal_threshold", "stickiness", "correlation", "disagreement_penalty_nats")
    table = reader.table(node, "exits", (*plain, *numbers, "agreement", "candidates"))
    domains = reader.texts(table["domains"], "exits.domains")
    if not domains or len(set(domains)) != len(domains):
        raise reader.fail("exits.domains", "Name at least one domain, and none twice.")
    agreement_keys = ("step_confidence", "below", "at_or_above")
    agreement_table = reader.table(table["agreement"], "exits.agreement", agreement_keys)
    agreement = Agreement(
        **{
            key: reader.quantity(agreement_table[key], f"exits.agreement.{key}", key, maximum=1.0)
            for key in agreement_keys
        }
    )
    if agreement.below > agreement.at_or_above:
        raise reader.fail(
            "exits.agreement", "'below' must not exceed 'at_or_above': confidence must help."
        )
    nominal = reader.quantity(
        table["nominal_threshold"],
        "exits.nominal_threshold",
        "nominal_threshold",
        maximum=0.999,
        above_zero=True,
    )
    values = {
        key: reader.quantity(table[key], f"exits.{key}", key, maximum=0.999)
        for key in ("stickiness", "correlation")
    }
    candidates = reader.named(table["candidates"], "exits.candidates")
    for name in candidates:
        if name not in models:
            raise reader.fail(
                "exits.candidates",
                f"{name!r} is not a model of this profile.{did_you_mean(name, models)}",
            )
    for name in models:
        if name not in candidates:
            raise reader.fail("exits.candidates", f"The model {name!r} is missing.")
    return MarkovExits(
        domains=domains,
        num_positions=reader.whole(table["num_positions"], "exits.num_positions", 1),
        seed=reader.whole(table["seed"], "exits.seed"),
        nominal_threshold=nominal,
        agreement=agreement,
        disagreement_penalty_nats=reader.quantity(
            table["disagreement_penalty_nats"],
            "exits.disagreement_penalty_nats",
            "disagreement_penalty_nats",
        ),
        candidates={
            name: _parse_markov_candidate(
                reader,
                candidates[name],
                f"exits.candidates.{name}",
                domains,
                profile.model.exit_layers,
            )
            for name, profile in models.items()
        },
        **values,
    )


def _parse_markov_candidate(
    reader: _Reader,
    node: Any,
    place: str,
    domains: tuple[str, ...],
    exit_layers: tuple[int, ...],
) -> MarkovCandidate:
    table = reader.table(node, place, ("perplexity", "exit_shares"))
    shares_table = reader.table(table["exit_shares"], f"{place}.exit_shares", domains)
    shares = {}
    for domain in domains:
        spot = f"{place}.exit_shares.{domain}"
        given = reader.quantities_list(shares_table[domain], spot, "exit_shares")
        if len(given) != len(exit_layers):
            raise reader.fail(
                spot,
                f"{len(given)} shares were given for the {len(exit_layers)} exits "
                f"{list(exit_layers)}.",
            )
        if abs(sum(given) - 1.0) > 1e-4:
            raise reader.fail(spot, f"The shares sum to {sum(given):.6g}; they must sum to 1.")
        shares[domain] = given
    perplexity = reader.quantity(
        table["perplexity"], f"{place}.perplexity", "perplexity", minimum=1.0
    )
    return MarkovCandidate(exit_layers, shares, perplexity)


def _parse_provenance(reader: _Reader, node: Any) -> Provenance:
    table = reader.table(node, "provenance", ("origin", "sources", "notes"), ("environment",))
    environment = table.get("environment", {})
    if not isinstance(environment, dict):
        raise reader.fail("provenance.environment", "An object was expected.")
    return Provenance(
        origin=reader.text(table["origin"], "provenance.origin", ORIGINS),
        sources=reader.texts(table["sources"], "provenance.sources"),
        notes=reader.texts(table["notes"], "provenance.notes"),
        environment=environment,
    )
