"""A model that no profile has: another model's numbers on the same device, scaled to its shape.

A number grows with the bytes or flops of what it is the price of, as `helios_sim.profiles.derive`
names them; kernels to launch and the host's part stay. What nobody can tell from a shape is taken
over: tokens leave as those of the other model do, exit by exit, and that is graded as assumed.
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError, did_you_mean, listed
from helios_sim.exits import read_traces, write_traces
from helios_sim.model import EarlyExitModel
from helios_sim.profile import (
    GRADES,
    STAND_INS,
    TRACES_FILE,
    UNAVAILABLE,
    Profile,
    TraceExits,
    quantity,
)
from helios_sim.profiles.derive import (
    RULES,
    Device,
    check_name,
    derive,
    exit_layers_of,
    layers_said,
    part_of,
    peaks_of,
    same_device_document,
    share_of_bytes,
    tells_a_device,
)
from helios_sim.profiles.files import save_profile
from helios_sim.profiles.model_config import StatedShape, read_config
from helios_sim.profiles.roofline import REFERENCE_CONTEXT_TOKENS, decode, work_of

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Wanted:
    """A model to add to a profile: its name and configuration, and what its shape cannot tell.

    `like` is the model whose numbers are scaled (None: the one whose layers are nearest in
    bytes), `exit_layers` are ascending and end at the full depth (None: the relative depths of
    `like`), `tokenizer` is shared by models whose perplexities compare (None: its own).
    """

    name: str
    config: Path
    like: str | None = None
    exit_layers: tuple[int, ...] | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class ModelFigures:
    """What lets a user judge a model of a profile, derived or not.

    `decode_s` is an iteration of one row at full depth and `context_tokens` of KV, `bytes_s` what
    its bytes alone take at the whole bandwidth; None where nobody says the bandwidth.
    """

    name: str
    like: str | None
    exit_layers: tuple[int, ...]
    weight_bytes: int
    kv_bytes_per_token: int
    decode_s: float
    bytes_s: float | None
    context_tokens: int
    grade_counts: Mapping[str, int]


def wanted_of(
    models: Sequence[str], like: Sequence[str], exits: Sequence[str], tokenizers: Sequence[str]
) -> tuple[Wanted, ...]:
    """The models that the command line describes.

    `models` are texts NAME=FILE; the others are a value for all of them, or NAME=VALUE for one.
    """
    files: dict[str, Path] = {}
    for text in models:
        name, sign, file = text.partition("=")
        if not sign or not file.strip() or not _NAME.fullmatch(name):
            raise InputError(
                f"{text!r} was given; allowed is NAME=FILE, such as qwen2-7b=config.json, with a "
                "name of letters, digits, dots, dashes and underscores.",
                "--model",
            )
        if name in files:
            raise InputError(f"{name!r} is given twice; give each model once.", "--model")
        files[name] = Path(file)
    likes = _by_name(like, "--like", files)
    layers = {
        name: exit_layers_of(text, "--exits")
        for name, text in _by_name(exits, "--exits", files).items()
    }
    kinds = _by_name(tokenizers, "--tokenizer", files)
    return tuple(
        Wanted(name, file, likes.get(name), layers.get(name), kinds.get(name))
        for name, file in files.items()
    )


def derive_with_models(
    profile: Profile, name: str, device: Device, models: Sequence[Wanted], replacing: bool = False
) -> dict[str, Any]:
    """The document of a profile with further models, on the given device or on another.

    A `device` that has the name of the profile's and no numbers beside its peaks is the same one.
    A model of the profile is given up for one of that name only if `replacing`.
    """
    check_name(name, profile)
    peaks = peaks_of(profile, device)
    found = [_Derived(profile, wanted) for wanted in models]
    names = [one.name for one in found]
    for one in found:
        one.check(replacing, names)
    if tells_a_device(device) or device.name != profile.device.name:
        document = derive(profile, name, device)
        if peaks is not None:
            peaks = (device.bytes_per_s or peaks[0], device.flops_per_s or peaks[1])
    else:
        document = same_device_document(profile, name, peaks)
    before = copy.deepcopy({key: document[key] for key in ("models", "exits")})
    for one in found:
        document["models"][one.name] = one.entry(before["models"][one.like], peaks)
        if document["exits"]["kind"] == "markov":
            there = before["exits"]["candidates"][one.like]
            document["exits"]["candidates"][one.name] = one.exits(there)
    told = document["provenance"]
    told["environment"].setdefault(STAND_INS, {}).update({one.name: one.observed for one in found})
    told["sources"] += [f"{one.name}: {one.stated.source}" for one in found]
    told["notes"] = [*(one.note() for one in found), *told["notes"]]
    document["description"] = f"{document['description']} Derived from shapes: {', '.join(names)}."
    return document


def write_with_models(
    profile: Profile,
    name: str,
    device: Device,
    models: Sequence[Wanted],
    folder: Path,
    *,
    overwrite: bool = False,
    replacing: bool = False,
) -> Profile:
    """Derive a profile with further models and write its folder, with exit traces for them."""
    document = derive_with_models(profile, name, device, models, replacing)
    if not isinstance(profile.exits, TraceExits):
        return save_profile(document, folder, overwrite=overwrite)
    likes: Mapping[str, str] = document["provenance"]["environment"][STAND_INS]
    with tempfile.TemporaryDirectory() as drafts:
        traces = Path(drafts) / TRACES_FILE
        added = {
            one.name: (likes[one.name], tuple(_layers_of(document["models"][one.name])))
            for one in models
        }
        _write_traces(profile.exits.path, added, traces)
        return save_profile(document, folder, traces=traces, overwrite=overwrite)


def _owner(place: str, profile: Profile) -> str | None:
    """The model that a number is of; names may hold dots, and one may go on where another ends."""
    for prefix in ("models.", "exits.candidates."):
        if place.startswith(prefix):
            told = place.removeprefix(prefix)
            names = [name for name in profile.models if told.startswith(f"{name}.")]
            return max(names, key=len, default=None)
    return None


def figures_of(profile: Profile, names: Sequence[str]) -> list[ModelFigures]:
    """What lets a user judge these models of a profile."""
    peaks = peaks_of(profile, Device(profile.device.name))
    context = REFERENCE_CONTEXT_TOKENS
    found = []
    for name in names:
        own = profile.models[name]
        model, layers = own.model, own.model.shape.layers
        # Of the embedding a token reads one row; of the head it reads all.
        read = layers * model.layer_weight_bytes() + work_of(model).head_bytes
        read += context * model.kv_bytes_per_token(layers)
        grades = [
            quantity.grade
            for place, quantity in profile.quantities.items()
            if _owner(place, profile) == name
        ]
        found.append(
            ModelFigures(
                name=name,
                like=profile.stand_ins.get(name),
                exit_layers=model.exit_layers,
                weight_bytes=model.weight_bytes(layers),
                kv_bytes_per_token=model.kv_bytes_per_token(layers),
                decode_s=decode(own, layers)[0],
                bytes_s=None if peaks is None else read / peaks[0],
                context_tokens=context,
                grade_counts={grade: grades.count(grade) for grade in GRADES},
            )
        )
    return found


class _Derived:
    """One model, from its configuration and the model that it is like."""

    def __init__(self, profile: Profile, wanted: Wanted) -> None:
        self.profile = profile
        self.wanted = wanted
        self.name = wanted.name
        self.stated: StatedShape = read_config(wanted.config)
        self.like = wanted.like if wanted.like is not None else self._nearest()
        if self.like not in profile.models:
            raise InputError(
                f"{self.like!r} was given.{did_you_mean(self.like, profile.models)} Allowed are "
                f"the models of {profile.name!r}: {', '.join(profile.models)}.",
                "--like",
            )
        self.there = profile.models[self.like].model
        self.model = self._model()
        self.work = work_of(self.model)
        self.work_there = work_of(self.there)

    @property
    def observed(self) -> str:
        """The model whose exits these really are, where the like one stands on another too."""
        return self.profile.stand_ins.get(self.like, self.like)

    def check(self, replacing: bool, names: Sequence[str]) -> None:
        """Refuse to take the place of a model unasked, or of one on which a model stands.

        `names` are those of all models that are derived at once.
        """
        if self.observed in names:
            raise InputError(
                f"The exits of {self.name!r} would be those of {self.observed!r}, which is derived "
                "here itself. Give another --like, or another name.",
                "--like",
            )
        leaning = [one for one, like in self.profile.stand_ins.items() if like == self.name]
        if leaning:
            raise InputError(
                f"{self.name!r} cannot be replaced: its exits stand in for those of "
                f"{listed(leaning)}. Give another name.",
                "--model",
            )
        if self.name in self.profile.models and not replacing:
            raise InputError(
                f"{self.name!r} is a model of {self.profile.name!r} already; give another name, or "
                "--replace to put this one in its place.",
                "--model",
            )

    def entry(self, there: Mapping[str, Any], peaks: tuple[float, float] | None) -> dict[str, Any]:
        """The model as a profile holds it, from the entry of the model that it is like."""
        entry = copy.deepcopy(dict(there))
        shape = self.stated.shape.as_table()
        entry["shape"] = {**shape, "grade": "published", "source": self.stated.source}
        entry["tokenizer"] = self.model.tokenizer
        layers = list(self.model.exit_layers)
        if self.wanted.exit_layers is not None:
            told = ("derived", "given as --exits")
        else:
            told = ("assumed", f"at the relative depths of those of {self.like}")
        entry["exit_layers"] = quantity("exit_layers", layers, *told)
        self._set(
            entry,
            "exit_head_params",
            self.model.exit_head_params,
            "with the width and the output head (assumed)",
        )
        self._set(entry, "workspace_bytes", entry["workspace_bytes"]["value"], _KEPT)
        threshold = entry["confidence"]["default_threshold"]
        self._assume(entry["confidence"], "default_threshold", threshold["value"])
        if entry.get("batch_residual") is not None:
            self._set(entry, "batch_residual", entry["batch_residual"]["value"], _KEPT)
        if entry.get("depth_residual") is not None:
            knots = self._knots(entry["depth_residual"]["value"])
            self._set(entry, "depth_residual", knots, "by the bytes of the layers (assumed)")
        for key, number in entry["coefficients"].items():
            if number["grade"] != UNAVAILABLE:
                factor, how = self._growth(key, peaks)
                value = number["value"]
                if factor != 1.0:
                    value = float(f"{value * factor:.12g}")
                self._set(entry["coefficients"], key, value, how)
        return entry

    def exits(self, there: Mapping[str, Any]) -> dict[str, Any]:
        """Statistics of exits: those of the model that it is like, level by level."""
        entry = copy.deepcopy(dict(there))
        self._assume(entry, "perplexity", entry["perplexity"]["value"])
        for domain, shares in entry["exit_shares"].items():
            self._assume(entry["exit_shares"], domain, shares["value"], "exit_shares")
        return entry

    def note(self) -> str:
        """What a reader of the profile has to know of the model."""
        here, there = layers_said(self.model.exit_layers), layers_said(self.there.exit_layers)
        return (
            f"{self.name} is derived from its shape ({self.stated.source}) and the numbers of "
            f"{self.like}; nobody ran it. Its exits after the layers {here} are ASSUMED to be "
            f"those of {self.like} after {there}, with that model's confidence, agreement and "
            "perplexity."
        )

    def _nearest(self) -> str:
        """The model of the profile whose layers are nearest in bytes, by their ratio.

        One that stands on another itself is not asked, nor the one to be replaced.
        """

        def apart(name: str) -> float:
            there = self.profile.models[name].model.shape.layer_params()
            return abs(math.log(self.stated.shape.layer_params() / there))

        own = [
            name
            for name in self.profile.models
            if name != self.name and name not in self.profile.stand_ins
        ]
        return min(own or self.profile.models, key=apart)

    def _model(self) -> EarlyExitModel:
        shape, there = self.stated.shape, self.there
        head_there = there.shape.vocab * there.shape.hidden
        heads, norms = divmod(there.exit_head_params, head_there)
        params = heads * shape.vocab * shape.hidden + norms * shape.hidden // there.shape.hidden
        return replace(
            there,
            name=self.name,
            shape=shape,
            exit_layers=self._exits(),
            tokenizer=self.wanted.tokenizer or self.name,
            exit_head_params=params,
        )

    def _exits(self) -> tuple[int, ...]:
        """The exits given, or those at the relative depths of the model that it is like."""
        depth, there = self.stated.shape.layers, self.there.exit_layers
        given = self.wanted.exit_layers
        if given is None:
            found = tuple(math.floor(layer * depth / there[-1] + 0.5) for layer in there)
            if list(found) != sorted(set(found)) or found[0] < 1:
                raise InputError(
                    f"{self.name!r} has {depth} layers, too few for {len(there)} exits at the "
                    f"relative depths of those of {self.like!r} ({layers_said(there)}); give "
                    "--exits, or another --like.",
                    "--model",
                )
            return found
        if given[-1] > depth:
            raise InputError(
                f"An exit after layer {given[-1]} was given; {self.name!r} has {depth} layers.",
                "--exits",
            )
        found = given if given[-1] == depth else (*given, depth)
        if len(found) != len(there):
            way = "give as many, or another --like."
            if len(found) < len(there):
                kept = ",".join(map(str, _nearest_exits(found, there)))
                way = (
                    f"give as many, or derive in two steps: first with --keep-exits "
                    f"{self.like}={kept} and --out alone, then --from the profile that this makes, "
                    f"with --like {self.like} and the same --model and --exits."
                )
            raise InputError(
                f"{len(found)} exits were given with the full depth ({layers_said(found)}), and "
                f"the exits of {self.like!r}, which stand in for them, are {len(there)} "
                f"({layers_said(there)}); {way}",
                "--exits",
            )
        return found

    def _growth(self, key: str, peaks: tuple[float, float] | None) -> tuple[float, str]:
        """The factor from the other model's coefficient to this one's, and how in words."""
        rule = RULES[key]
        if key == "rebatch.overhead_s":
            layers, layers_there = self.model.shape.layers, self.there.shape.layers
            return layers / layers_there, f"by the layers, {layers} / {layers_there} (assumed)"
        if rule not in ("bytes", "flops", "both"):
            return 1.0, _KEPT
        here, there = part_of(key, self.work), part_of(key, self.work_there)
        by_bytes, by_flops = here.num_bytes / there.num_bytes, here.flops / there.flops
        told_bytes = f"{here.num_bytes:,} / {there.num_bytes:,} bytes"
        told_flops = f"{here.flops:,} / {there.flops:,} flops"
        if rule == "bytes":
            return by_bytes, f"by {here.words}, {told_bytes} ({_SAME})"
        if rule == "flops":
            return by_flops, f"by {here.words}, {told_flops} ({_SAME})"
        if peaks is None:
            return by_flops, (
                f"by {here.words}, {told_flops} (all taken for flops, since nobody says the peaks; "
                "assumed)"
            )
        share = share_of_bytes(there, peaks)
        return share * by_bytes + (1.0 - share) * by_flops, (
            f"by {here.words}, {share:.0%} as {told_bytes} and {1.0 - share:.0%} as {told_flops} "
            "(roofline, assumed)"
        )

    def _knots(self, knots: Sequence[Sequence[float]]) -> list[list[float]]:
        """The factor by loaded depth, where as many bytes are loaded as in the other model."""
        ratio = self.work_there.layer_bytes / self.work.layer_bytes
        if ratio == 1.0:
            return [list(knot) for knot in knots]
        moved = [[float(f"{at * ratio:.12g}"), factor] for at, factor in knots]
        return [knot for knot in moved if knot[0] >= 1.0] or [[1.0, knots[-1][1]]]

    def _set(self, table: dict[str, Any], key: str, value: Any, how: str) -> None:
        """A number of this model, graded `derived` or as the other model's where that is lower."""
        there = table[key]
        source = f"from {self.like} of {self.profile.name}, {how}; there: {there['source']}"
        grade = max("derived", there["grade"], key=GRADES.index)
        table[key] = quantity(key, value, grade, source)

    def _assume(
        self, table: dict[str, Any], key: str, value: Any, number: str | None = None
    ) -> None:
        """A number that is the other model's, which nothing says of this one."""
        source = f"assumed to be that of {self.like}; there: {table[key]['source']}"
        table[key] = quantity(number or key, value, "assumed", source)


_KEPT: Final = "unchanged (assumed)"
_SAME: Final = "the same share of the peak assumed"


def _nearest_exits(wanted: Sequence[int], there: Sequence[int]) -> list[int]:
    """As many exits of another model, in order, each the nearest by relative depth that is left.

    The last of both are their full depths.
    """
    kept: list[int] = []
    begin = 0
    for place, layer in enumerate(wanted):
        end = len(there) - (len(wanted) - place - 1)
        share = layer / wanted[-1]
        at = min(range(begin, end), key=lambda one: abs(there[one] / there[-1] - share))
        kept.append(there[at])
        begin = at + 1
    return kept


def _write_traces(
    there: Path, added: Mapping[str, tuple[str, tuple[int, ...]]], path: Path
) -> None:
    """A trace file with further candidates, each with another's columns at exits of its own.

    `added` maps a candidate to the one whose traces it takes and to its exit layers.
    """
    traces = read_traces(there)

    def with_added(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {**arrays, **{name: arrays[like] for name, (like, _) in added.items()}}

    write_traces(
        replace(
            traces,
            exit_layers={
                **traces.exit_layers,
                **{name: layers for name, (_, layers) in added.items()},
            },
            confidence=with_added(traces.confidence),
            agrees=with_added(traces.agrees),
            nll_nats=with_added(traces.nll_nats),
        ),
        path,
    )


def _layers_of(entry: Mapping[str, Any]) -> list[int]:
    layers: list[int] = entry["exit_layers"]["value"]
    return layers


def _by_name(texts: Sequence[str], option: str, names: Mapping[str, Any]) -> dict[str, str]:
    """What an option says of each model: a value for all of them, or NAME=VALUE for one."""
    if texts and not names:
        raise InputError(f"{option} is of models; give a --model too.", option)
    found: dict[str, str] = {}
    for_all: str | None = None
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            if for_all is not None:
                raise InputError(
                    f"{for_all!r} and {text!r} were given for all models; allowed is one, or "
                    "NAME=VALUE for each model.",
                    option,
                )
            for_all = text
        elif name not in names:
            raise InputError(
                f"{text!r} was given, and no --model is named {name!r}."
                f"{did_you_mean(name, names)} Allowed are {', '.join(names)}.",
                option,
            )
        elif name in found:
            raise InputError(f"{name!r} is given twice; give it once.", option)
        else:
            found[name] = value
    rest = {} if for_all is None else dict.fromkeys(names, for_all)
    said = {**rest, **found}
    for value in said.values():
        if not value.strip():
            raise InputError("An empty text was given; give a value or leave it out.", option)
    return said
