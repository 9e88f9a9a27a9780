"""An early-exit model that is loaded as deep as it is needed: grown, shrunk and asked at exits.

Weights come part by part (what is always resident, then layer after layer) into one flat block of
memory each, so that a part is one allocation and one copy, and measured bytes are planned bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from calibration.device import dtype_name
from calibration.model import checkpoint as files
from calibration.model import fused, launches
from calibration.model.checkpoint import (
    Checkpoint,
    EarlyExitSettings,
    Guard,
    Heads,
    LogitsSums,
)
from calibration.model.confidence import Confidence
from calibration.model.exit_heads import ExitHead, head_shapes, head_weights, one_head_shapes
from calibration.model.family import Backbone, LlamaBackbone, backbone_of, empty_backbone, shape_of
from calibration.model.graphs import CAPTURING
from calibration.model.host_copy import HostCopy
from calibration.model.kv import KvDims
from calibration.model.loading import (
    CheckpointSource,
    Loader,
    LoadReport,
    MemorySource,
    Plan,
    Source,
    assign,
    layout_of,
)
from calibration.model.memory import require
from calibration.model.projection import NUM_SUMS, distance, project
from helios_sim.errors import InputError
from helios_sim.folders import file_in_place
from helios_sim.model import EarlyExitModel, ModelShape

GUARD_TOKENS: Final = 64
"""Tokens of a new guard: each covers its row of the embedding."""
GUARD_PIECE: Final = 16
"""Tokens whose logits are summed at once, so that large vocabularies take little memory."""


class Decision(NamedTuple):
    """What an exit says of each row, on the device: tokens [N], confidence [N], logits."""

    tokens: Tensor
    confidence: Tensor
    logits: Tensor

    def nll(self, targets: Tensor | None = None) -> Tensor:
        """Negative log-likelihood [N] in nats of target tokens, or of the tokens themselves."""
        logits = self.logits.float()
        wanted = self.tokens if targets is None else targets
        return logits.logsumexp(-1) - logits.gather(-1, wanted[:, None]).squeeze(-1)


class EarlyExitLM:
    """A model with exits, its first `depth` layers loaded.

    Made by `load`, `from_stock` or `random_model`. Layers are loaded and dropped in place: the
    layers that stay keep their memory and addresses.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: EarlyExitModel,
        source: Source,
        *,
        device: torch.device,
        dtype: torch.dtype,
        heads: Heads = "shared",
        confidence: Confidence | None = None,
        host_copy: bool = False,
        pinned: bool = False,
    ) -> None:
        self.backbone = backbone
        self.spec = spec
        self.source = source
        self.device = device
        self.dtype = dtype
        self.heads_kind: Heads = heads
        self.confidence = confidence or Confidence()
        self.exit_heads: dict[int, ExitHead] = {}
        self.opened: Checkpoint | None = None
        self.guard: Guard | None = None
        self.guard_note = "no guard: the weights are not from a checkpoint"
        self.generation = 0
        """Counts the times that layers were dropped: captured graphs are then void."""
        self.is_resident = False
        self._backbone_layout = layout_of(_resident_shapes(backbone))
        self._layer_layout = layout_of(backbone.layer_shapes())
        self._heads_layout = layout_of(self._head_shapes())
        self._host: HostCopy | None = None
        self._staging: HostCopy | None = None
        self._shells: dict[int, nn.Module] = {}
        """Layers that were loaded once, kept without weights: building one anew takes longer than
        its weights do."""
        self._checked_depth = 0
        """Layers whose weights in host memory the guard has agreed to."""
        if host_copy or pinned:
            parts = [self._backbone_layout.num_elements, self._heads_layout.num_elements]
            parts += [self._layer_layout.num_elements] * spec.shape.layers
            self._host = HostCopy(parts, dtype, pinned, device)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers after which a token may leave, counted from 1; the last is the full depth."""
        return self.spec.exit_layers

    @property
    def num_layers(self) -> int:
        """Layers of the full model."""
        return self.spec.shape.layers

    @property
    def depth(self) -> int:
        """Layers that are loaded."""
        return len(self.backbone.layers)

    @property
    def depth_level(self) -> int:
        """The exit at the loaded depth, as an index of `exit_layers`."""
        if self.depth not in self.exit_layers:
            raise ValueError(
                f"{self.name} is loaded to layer {self.depth}, which is no exit; exits are after "
                f"{list(self.exit_layers)}."
            )
        return self.exit_layers.index(self.depth)

    @property
    def kv_dims(self) -> KvDims:
        """What a token's keys and values are in one layer."""
        shape = self.spec.shape
        return KvDims(shape.kv_heads, shape.head_dim, self.dtype, self.device)

    @property
    def loaded_bytes(self) -> int:
        """Measured bytes of the weights that are loaded: their memory, each piece once."""
        modules: list[nn.Module] = [self.backbone.model, *self.exit_heads.values()]
        storages = {}
        for module in modules:
            for weight in module.parameters():
                if not weight.is_meta:
                    storage = weight.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    @property
    def host_copy(self) -> HostCopy | None:
        """The copy in host memory, None where none is kept."""
        return self._host

    def plan(self, depth: int) -> Plan:
        """Bytes of the weights at a depth; nothing is touched."""
        self._check_depth(depth)
        size = self.dtype.itemsize
        return Plan(
            depth=depth,
            resident_bytes=self._backbone_layout.num_elements * size,
            exit_head_bytes=self._heads_layout.num_elements * size,
            layer_bytes=self._layer_layout.num_elements * size,
        )

    def grow(self, depth: int) -> LoadReport:
        """Load the layers up to `depth`, and what is always resident if it is not there.

        Raises InputError before touching memory if there is too little, and after loading if the
        logits are not the checkpoint's; the model is then as it was before. What comes from a copy
        in host memory that was checked before is not checked again.
        """
        before, was_resident = self.depth, self.is_resident
        plan = self.plan(depth)
        if depth < before:
            raise ValueError(
                f"{self.name} has {before} layers and cannot grow to {depth}; shrink it."
            )
        resident = 0 if was_resident else plan.resident_bytes + plan.exit_head_bytes
        needed = resident + (depth - before) * plan.layer_bytes
        require(
            self.device,
            needed,
            f"Loading {self.name} from layer {before} to {depth}",
            "load fewer layers, choose a smaller model, or free memory on the device",
        )
        began_s = time.perf_counter()
        checked = depth <= self._checked_depth and self._is_held(before, depth, was_resident)
        loader = Loader(self.source, self._host, self._staging, self.dtype, self.device)
        try:
            if not was_resident:
                self._assign_resident(
                    loader.part(0, self._backbone_layout), loader.part(1, self._heads_layout)
                )
            layers = list(self.backbone.layers)
            for index in range(before, depth):
                prefix = f"{self.backbone.layer_prefix}{index}."
                if index not in self._shells:
                    self._shells[index] = self.backbone.new_layer(index)
                assign(self._shells[index], loader.part(2 + index, self._layer_layout, prefix))
                layers.append(self._shells[index])
            loader.finish()
            self._staging = loader.staging
            self.backbone.set_layers(layers)
            seconds = time.perf_counter() - began_s
            if not checked:
                self._check_guard(before if was_resident else 0)
                self._checked_depth = max(self._checked_depth, depth)
        except BaseException:
            loader.finish()
            if was_resident:
                self.shrink(before)
                # Layers that were not put in yet hold weights too.
                self._drop_layers(before)
                self._give_back()
            else:
                self.unload()
            raise
        return LoadReport(
            bytes=needed,
            seconds=seconds,
            read_s=loader.read_s,
            copy_s=loader.copy_s,
            source=loader.origin,
        )

    def read_to_host(self) -> float:
        """Read the whole model into its copy in host memory; returns the seconds.

        Parts that are there are not read again, and nothing comes onto the device.
        """
        assert self._host is not None
        loader = Loader(self.source, self._host, None, self.dtype, self.device)
        loader.read_part(0, self._backbone_layout)
        loader.read_part(1, self._heads_layout)
        for index in range(self.num_layers):
            prefix = f"{self.backbone.layer_prefix}{index}."
            loader.read_part(2 + index, self._layer_layout, prefix)
        return loader.read_s

    def forget_host_copy(self) -> None:
        """Let weights be read from their source again; the copy's memory stays for them.

        What the guard has agreed to it agrees to when it is read again: the source is the same.
        """
        if self._host is not None:
            self._host.held.clear()

    def shrink(self, depth: int) -> float:
        """Drop the layers beyond `depth` and give their memory back; returns the seconds."""
        self._check_depth(depth)
        if depth > self.depth:
            raise ValueError(f"{self.name} has {self.depth} layers; grow it to {depth}.")
        began_s = time.perf_counter()
        if depth < self.depth:
            self._wait()
            self.generation += 1
            self._drop_layers(depth)
            self._give_back()
        return time.perf_counter() - began_s

    def unload(self) -> float:
        """Drop all weights; a copy in host memory stays. Returns the seconds."""
        began_s = time.perf_counter()
        self._wait()
        self.generation += 1
        self._drop_layers(0)
        self._assign_resident(
            {n: torch.empty(s, device="meta") for n, s in self._backbone_layout.shapes.items()},
            {n: torch.empty(s, device="meta") for n, s in self._heads_layout.shapes.items()},
        )
        self.exit_heads = {}
        self.is_resident = False
        self._give_back()
        return time.perf_counter() - began_s

    def logits(self, hidden: Tensor, level: int) -> Tensor:
        """Logits [N, vocab] of states [N, hidden] at an exit (an index of `exit_layers`)."""
        head = self.exit_heads.get(self.exit_layers[level])
        with torch.no_grad():
            if head is not None:
                answer: Tensor = head(hidden)
                return answer
            return self.backbone.head(self.backbone.final_norm(hidden))

    def decide(self, logits: Tensor, level: int | None = None) -> Decision:
        """Token and confidence of logits [N, vocab]; everything stays on the device.

        With a `level` the confidence is calibrated where the model holds a map for that exit,
        without one it is raw.
        """
        layer = 0 if level is None else self.exit_layers[level]
        return Decision(logits.argmax(-1), self.confidence.of(logits, layer), logits)

    @property
    def telling(self) -> fused.Fusion:
        """Whether one kernel of our own says what logits say, and why."""
        kind = self.confidence.kind
        if kind != "max-softmax":
            return fused.Fusion(False, f"the kernel says max-softmax, and confidence is {kind}")
        return fused.choose_telling(self.device, self.dtype)

    @property
    def tells_at_once(self) -> bool:
        """Whether one kernel of our own says what logits say."""
        return self.telling.usable

    def tell(self, logits: Tensor, level: int, targets: Tensor | None = None) -> Tensor:
        """Token, confidence and nats [3, N] of logits [N, vocab] at an exit, on the device.

        The nats are those of `targets` [N], or of the token itself. Confidence is calibrated where
        the model holds a map. For the host to fetch at once.
        """
        if self.tells_at_once:
            found = self.confidence.map_of(self.exit_layers[level])
            return launches.tell(logits, targets, None if found is None else found.on(self.device))
        decided = self.decide(logits, level)
        nats = decided.nll(targets)
        return torch.stack([decided.tokens.double(), decided.confidence.double(), nats.double()])

    def logits_sums(
        self, token_ids: Sequence[int], layers: Iterable[int]
    ) -> list[LogitsSums | None]:
        """What logits add up to at exit layers; None for those that are not loaded."""
        with torch.no_grad():
            ids = torch.tensor([list(token_ids)], device=self.device)
            states = self.backbone.forward_dense(ids)
            return [
                None if layer > self.depth else self._sums(states[layer - 1][0], layer)
                for layer in layers
            ]

    def _sums(self, states: Tensor, layer: int) -> LogitsSums:
        """What the logits of states [N, hidden] after an exit layer add up to."""
        head = self.exit_heads.get(layer)
        magnitude = torch.zeros((), dtype=torch.float64, device=self.device)
        signed = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.device)
        for first in range(0, len(states), GUARD_PIECE):
            piece = states[first : first + GUARD_PIECE]
            if head is not None:
                logits = head(piece).double()
            else:
                logits = self.backbone.head(self.backbone.final_norm(piece)).double()
            magnitude += logits.abs().sum()
            signed += project(logits, first)
        return LogitsSums(float(magnitude), tuple(signed.tolist()))

    def new_guard(self) -> Guard:
        """A guard of the model as it is loaded, over tokens spread through the vocabulary."""
        guard = self._unknown_guard(self.exit_layers)
        return guard.completed(self.logits_sums(guard.token_ids, self.exit_layers))

    def _unknown_guard(self, layers: Sequence[int]) -> Guard:
        """A guard of exit layers that holds no sums yet."""
        vocab = self.spec.shape.vocab
        count = min(GUARD_TOKENS, vocab, self.backbone.max_positions)
        ids = [place * vocab // count for place in range(count)]
        # Sums that 16 bits gave are no closer than that where another device or type checks them.
        tolerance = files.ROUGH_TOLERANCE if self._is_rough else Guard.tolerance
        return Guard.unknown(ids, len(layers), tolerance)

    def _is_held(self, before: int, depth: int, was_resident: bool) -> bool:
        """Whether all that a load brings is in the copy in host memory."""
        parts = [2 + index for index in range(before, depth)]
        if not was_resident:
            parts += [0, 1] if self._heads_layout.shapes else [0]
        return self._host is not None and all(self._host.holds(part) for part in parts)

    def _check_guard(self, checked_depth: int) -> None:
        """Compare the logits of exits deeper than `checked_depth` with the stored sums.

        Sums the guard does not know yet are added, and stored where the folder allows it.
        """
        opened, guard = self.opened, self.guard
        if opened is None or opened.settings is None:
            return
        layers = opened.settings.exit_layers
        if guard is None:
            guard = self._unknown_guard(layers)
        # An auxiliary head of an exit that was not asked for is not there to be compared.
        told = layers if self.heads_kind == "shared" else self.exit_layers
        new = [
            layer if checked_depth < layer and layer in told else self.num_layers + 1
            for layer in layers
        ]
        sums = self.logits_sums(guard.token_ids, new)
        tolerance = max(guard.tolerance, files.ROUGH_TOLERANCE if self._is_rough else 0.0)
        signed = guard.signed_sums or (None,) * len(layers)
        for layer, stored, pattern, found in zip(layers, guard.sums, signed, sums, strict=True):
            if found is not None:
                self._check_sums(layer, found, stored, pattern, tolerance)
        known = guard.completed(sums)
        if known != guard:
            guard = known
            self.guard_note = (
                f"the guard was stored in {files.SETTINGS_FILE}"
                if opened.store_guard(guard)
                else f"{files.SETTINGS_FILE} does not take the guard, which holds for this process "
                "alone"
            )
        else:
            self.guard_note = "the logits agree with the stored guard"
        self.guard = guard

    def _check_sums(
        self,
        layer: int,
        found: LogitsSums,
        stored: float | None,
        pattern: Sequence[float] | None,
        tolerance: float,
    ) -> None:
        """Refuse logits of an exit that are no numbers, or not those that the guard knows."""
        assert self.opened is not None
        total = found.magnitude
        if not math.isfinite(total):
            raise InputError(
                f"The logits at exit layer {layer} add up to {total} in "
                f"{dtype_name(self.dtype)}: the weights are corrupt, or too large for that type. "
                "Load them in bfloat16 or float32, or download or train the checkpoint again.",
                self.opened.where,
            )
        file = files.SETTINGS_FILE
        if stored is not None and not files.is_close(stored, total, tolerance):
            differs = f"add up to {total:.6g} and the guard in {file} says {stored:.6g}"
        elif pattern is not None and not files.is_alike(pattern, found.signed, tolerance):
            off = distance(pattern, found.signed)
            differs = f"lie {off:.2g} of their size away from those of the guard in {file}"
        else:
            return
        raise InputError(
            f"The logits at exit layer {layer} {differs}: "
            "these are not the weights the guard was made of. Download or train the "
            "checkpoint again, or remove the guard if the weights were changed on purpose.",
            self.opened.where,
        )

    @property
    def _is_rough(self) -> bool:
        return self.dtype.itemsize < 4

    def _check_depth(self, depth: int) -> None:
        if not 1 <= depth <= self.num_layers:
            raise InputError(
                f"{self.name} was asked for {depth} loaded layers; allowed are 1 to "
                f"{self.num_layers}."
            )

    def _drop_layers(self, depth: int) -> None:
        """Let go of the weights of the layers beyond `depth`."""
        self.backbone.set_layers(list(self.backbone.layers)[:depth])
        for index, shell in self._shells.items():
            # To assign what is not there takes longer than loading a shallow model.
            if index >= depth and not next(shell.parameters()).is_meta:
                shapes = self._layer_layout.shapes
                assign(shell, {n: torch.empty(s, device="meta") for n, s in shapes.items()})

    def _head_shapes(self) -> dict[str, tuple[int, ...]]:
        layers = self.exit_layers[:-1] if self.heads_kind == "auxiliary" else ()
        return head_shapes(self.backbone, layers)

    def _assign_resident(
        self, weights: Mapping[str, Tensor], head_weights_: Mapping[str, Tensor]
    ) -> None:
        assign(self.backbone.model, weights)
        self.backbone.tie()
        heads: dict[int, ExitHead] = {}
        for layer in self.exit_layers[:-1] if self.heads_kind == "auxiliary" else ():
            with torch.device("meta"):
                head = ExitHead(self.backbone)
            prefix = f"exit.{layer}."
            assign(
                head.eval(),
                {
                    n.removeprefix(prefix): w
                    for n, w in head_weights_.items()
                    if n.startswith(prefix)
                },
            )
            heads[layer] = head
        self.exit_heads = heads
        self.is_resident = True

    def _wait(self) -> None:
        """Let the device finish with weights that are about to go."""
        if self.device.type == "cuda":
            # A load that fails lets go of its weights while another thread serves.
            with CAPTURING:
                torch.cuda.synchronize(self.device)

    def _give_back(self) -> None:
        """Return memory that nothing holds any more to the device."""
        if self.device.type == "cuda":
            with CAPTURING:
                torch.cuda.empty_cache()


def load(
    folder: str | Path,
    *,
    depth: int | None = None,
    exits: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    pinned: bool = False,
    host_copy: bool = False,
    name: str | None = None,
) -> EarlyExitLM:
    """Load the first `depth` layers (all unless given) of a local checkpoint folder.

    `exits` replaces, for this model alone, the exit layers of early_exit.json, or the default of a
    quarter, half and all layers; `dtype` is float32 on a CPU and bfloat16 on a GPU unless given.
    `host_copy` keeps every part that was read in host memory, `pinned` in one page-locked buffer.
    Loads compare the logits with the guard, but for what comes from a copy in host memory that was
    compared before; a folder without a guard gets it at its first load.
    """
    where = torch.device(device)
    opened = files.open_checkpoint(folder)
    config = opened.config
    layers = int(config.num_hidden_layers)
    settings = opened.settings
    if settings is None:
        # Exits of one load are not the checkpoint's: others are to find the usual ones.
        settings = EarlyExitSettings(opened.name, files.default_exits(layers), exits_chosen=True)
        opened = replace(opened, settings=settings)
    exit_layers = settings.exit_layers if exits is None else files.check_exits(exits, layers)
    if settings.heads == "auxiliary" and not set(exit_layers) <= set(settings.exit_layers):
        raise InputError(
            f"The exits {list(exit_layers)} were asked for and the checkpoint has heads for "
            f"{list(settings.exit_layers)}; choose among these.",
            opened.where,
        )
    loaded = layers if depth is None else depth
    if loaded not in exit_layers:
        raise InputError(
            f"The depth {loaded} is no exit layer; allowed are {list(exit_layers)}, or give other "
            "exits.",
            opened.where,
        )
    kind = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    model = _empty(
        config,
        EarlyExitModel(
            name=name or settings.name,
            shape=shape_of(config),
            exit_layers=exit_layers,
            tokenizer=opened.tokenizer,
            bytes_per_param=kind.itemsize,
            bytes_per_kv_element=kind.itemsize,
        ),
        CheckpointSource(opened),
        device=where,
        dtype=kind,
        heads=settings.heads,
        confidence=settings.confidence,
        host_copy=host_copy,
        pinned=pinned,
    )
    prefix = model.backbone.layer_prefix
    expected = dict(model._backbone_layout.shapes)
    for index in range(layers):
        expected.update({f"{prefix}{index}.{n}": s for n, s in model._layer_layout.shapes.items()})
    heads = settings.exit_layers[:-1] if settings.heads == "auxiliary" else ()
    every_head = head_shapes(model.backbone, heads)
    opened.check_names({**expected, **every_head}, every_head)
    model.opened = opened
    model.guard = settings.guard
    model.grow(loaded)
    return model


def from_stock(
    stock: Any,
    exits: Sequence[int] | None = None,
    *,
    name: str = "stock",
    tokenizer: str = files.UNKNOWN,
    exit_heads: Mapping[int, ExitHead] | None = None,
    confidence: Confidence | None = None,
) -> EarlyExitLM:
    """Wrap a stock model that is in memory, at full depth, on its own device and in its dtype."""
    backbone = backbone_of(stock)
    layers = len(backbone.layers)
    chosen = files.default_exits(layers) if exits is None else files.check_exits(exits, layers)
    weight = backbone.embedding_weight
    if weight.dtype.itemsize < 4:
        # Casting a model rounds its rotary frequencies too, which far positions do not bear.
        backbone.rebuild_buffers(weight.device)
    heads: Heads = "auxiliary" if exit_heads else "shared"
    known = {n: w.detach() for n, w in stock.state_dict().items()}
    known.update(head_weights(exit_heads or {}))
    one_head = (
        sum(w.numel() for w in next(iter(exit_heads.values())).parameters()) if exit_heads else 0
    )
    model = EarlyExitLM(
        backbone,
        EarlyExitModel(
            name=name,
            shape=shape_of(backbone.config),
            exit_layers=chosen,
            tokenizer=tokenizer,
            bytes_per_param=weight.dtype.itemsize,
            bytes_per_kv_element=weight.dtype.itemsize,
            exit_head_params=one_head,
        ),
        MemorySource(known),
        device=weight.device,
        dtype=weight.dtype,
        heads=heads,
        confidence=confidence,
    )
    model.exit_heads = dict(exit_heads or {})
    model.is_resident = True
    return model


def save(model: EarlyExitLM, folder: str | Path, settings: EarlyExitSettings | None = None) -> None:
    """Write a whole model as a checkpoint folder, with early_exit.json and a guard.

    Settings may add a corpus and a calibration; exits, heads and guard are the model's. Writing
    needs all layers loaded.
    """
    if model.depth != model.num_layers:
        raise InputError(
            f"{model.name} has {model.depth} of {model.num_layers} layers loaded; grow it to its "
            "full depth before saving."
        )
    path = Path(folder)
    try:
        _write(model, path, settings)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The checkpoint cannot be written: {error}. Free space or choose another folder.",
            str(path),
        ) from error


def _write(model: EarlyExitLM, path: Path, settings: EarlyExitSettings | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    backbone = model.backbone
    names = backbone.resident_names()
    held = backbone.model.state_dict()
    names += [name for name in held if name.startswith(backbone.layer_prefix)]
    save_tensors({name: held[name] for name in names}, path / files.WEIGHTS_FILE)
    if model.exit_heads:
        save_tensors(head_weights(model.exit_heads), path / files.HEADS_FILE)
    config = backbone.config.to_dict()
    config["architectures"] = [type(backbone.model).__name__]
    files.write_json(path / files.CONFIG_FILE, config)
    base = settings or EarlyExitSettings(
        model.name, model.exit_layers, tokenizer=model.spec.tokenizer, confidence=model.confidence
    )
    files.write_settings(
        path,
        replace(
            base,
            exit_layers=model.exit_layers,
            heads="auxiliary" if model.exit_heads else "shared",
            guard=model.new_guard(),
        ),
    )


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    # Clones, since tensors of one part share their memory, which the format does not allow.
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    with file_in_place(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(own, partial, metadata={"format": "pt"})
        # The library keeps everybody else out, whatever the umask says.
        partial.chmod(mode)


def _empty(
    config: files.Config,
    spec: EarlyExitModel,
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads = "shared",
    confidence: Confidence | None = None,
    host_copy: bool = False,
    pinned: bool = False,
) -> EarlyExitLM:
    """A model of a configuration with nothing loaded."""
    backbone = empty_backbone(config, device)
    if device.type == "cuda" and isinstance(backbone, LlamaBackbone):
        backbone.fuse_norms()
    if heads == "auxiliary":
        one = sum(torch.Size(s).numel() for s in one_head_shapes(backbone).values())
        spec = replace(spec, exit_head_params=one)
    return EarlyExitLM(
        backbone,
        spec,
        source,
        device=device,
        dtype=dtype,
        heads=heads,
        confidence=confidence,
        host_copy=host_copy,
        pinned=pinned,
    )


def empty_model(
    config: files.Config,
    shape: ModelShape,
    *,
    name: str,
    exits: Sequence[int],
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    host_copy: bool = False,
) -> EarlyExitLM:
    """A model of a configuration whose weights come from any source; nothing is loaded yet."""
    spec = EarlyExitModel(
        name=name,
        shape=shape,
        exit_layers=files.check_exits(exits, shape.layers),
        tokenizer="random",
        bytes_per_param=dtype.itemsize,
        bytes_per_kv_element=dtype.itemsize,
    )
    return _empty(config, spec, source, device=device, dtype=dtype, host_copy=host_copy)


def _resident_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    held = backbone.model.state_dict()
    return {name: tuple(held[name].shape) for name in backbone.resident_names()}
