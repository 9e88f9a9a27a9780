"""Llama and OPT behind one adapter: the stock transformers classes, run layer by layer.

A `Backbone` holds a stock model and calls its own modules; it never subclasses them, so weights
keep their names and the stock `forward` and `generate` go on working. Layers are 0-based and
half-open here ([first, last)), exit layers elsewhere count from 1 and mean "after that layer".
Packed tokens are [N, hidden]: the tokens of several requests one after another.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    rotate_half,
)
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from calibration.model import attention
from calibration.model.attention import Attend, DenseAttend
from calibration.model.fused import FusedReader, FusedWriter
from calibration.model.launches import Rotary, add_and_norm, gated, project
from helios_sim.errors import InputError
from helios_sim.model import Family, ModelShape

SUPPORTED: Final = ("LlamaForCausalLM", "OPTForCausalLM")
"""Architectures (as config.json names them) that have an adapter."""

CHANGING_ROPE: Final = ("dynamic", "longrope")
"""Rotary embeddings that change with the length, so that cached keys would be out of date."""


class Backbone(ABC):
    """A stock model, whole or with its first layers only, as early exits need it.

    `model` is the stock model. Loading and dropping layers changes `layers` in place.
    """

    family: Family
    layer_class: type[nn.Module]
    layer_prefix: str
    """Start of a layer's weight names; the layer's number and a dot follow."""

    stacks: tuple[tuple[str, ...], ...]
    """Modules of a layer that read the same input: as one product where their weights lie so."""

    def __init__(self, model: Any) -> None:
        check_supported(model.config)
        self.model = model
        self.config = model.config
        self._cache_argument = cache_argument(self.layer_class)
        model.set_attn_implementation(attention.NAME)

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The stock module that holds the embedding, the layers and the final norm."""

    @property
    def layers(self) -> nn.ModuleList:
        """The stock decoder layers that are there, in order."""
        found: nn.ModuleList = self.decoder.layers
        return found

    @property
    def embedding_weight(self) -> Tensor:
        """The token embedding's weight [vocab, hidden]."""
        weight: Tensor = self.decoder.embed_tokens.weight
        return weight

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight [vocab, hidden]."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    @property
    def max_positions(self) -> int:
        """Tokens a sequence may have."""
        return int(self.config.max_position_embeddings)

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [..., hidden] before the first layer, of token ids at their positions."""

    @abstractmethod
    def position_embeddings(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary (cos, sin), each [..., head_dim], or None where positions are learned."""

    @abstractmethod
    def norm(self) -> nn.Module | None:
        """The final norm's module, None where a model has none."""

    @abstractmethod
    def new_norm(self) -> nn.Module:
        """A fresh norm like the final one, for an auxiliary exit head."""

    @abstractmethod
    def keys_and_values(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [1, kv_heads, N, head_dim] of its input [1, N, hidden]."""

    @property
    @abstractmethod
    def is_fusible(self) -> bool:
        """Whether `fused_layers` do what the stock layers do, as the configuration has it."""

    @abstractmethod
    def fused_layers(self, layers: Sequence[Any], hidden: Tensor, attend: FusedReader) -> Tensor:
        """New tokens [N, hidden] through layers in few launches; `hidden` stays as it is."""

    @abstractmethod
    def fused_fill(self, layer: Any, hidden: Tensor, writer: FusedWriter) -> None:
        """Write a layer's keys and values of states [N, hidden] in few launches."""

    @abstractmethod
    def new_layer(self, index: int) -> nn.Module:
        """A stock layer of this configuration on the meta device, without memory."""

    @abstractmethod
    def rebuild_buffers(self, device: torch.device) -> None:
        """Compute the buffers that no checkpoint holds, on `device`."""

    def run(
        self, hidden: Tensor, first: int, last: int, attend: Attend, positions: Tensor
    ) -> Tensor:
        """Take packed hidden states [N, hidden] through layers first..last-1.

        `positions` [N] are the tokens' places in their own sequences; `attend` keeps the keys
        and values and says what each token attends to.
        """
        layers = self._layers(first, last)
        if isinstance(attend, FusedReader) and self.is_fusible:
            return self.fused_layers(layers, hidden, attend)
        rotary = self.position_embeddings(positions[None])
        hidden = hidden[None]
        handed = {self._cache_argument: attend, "attend": attend}
        for layer in layers:
            hidden = layer(hidden, position_embeddings=rotary, **handed)
        return hidden[0]

    def fill(
        self, hidden: Tensor, positions: Tensor, first: int, last: int, writer: Attend
    ) -> None:
        """Write keys and values of skipped layers first..last-1 from an exit's hidden states.

        The state [N, hidden] at the exit stands in for the input of every skipped layer: its
        norm and projections are taken, its attention and feed-forward are not.
        """
        layers = self._layers(first, last)
        if isinstance(writer, FusedWriter) and self.is_fusible:
            for layer in layers:
                self.fused_fill(layer, hidden, writer)
            return
        rotary = self.position_embeddings(positions[None])
        hidden = hidden[None]
        for index, layer in zip(range(first, last), layers, strict=True):
            key, value = self.keys_and_values(layer, hidden, rotary)
            writer.update(key, value, index)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Hidden states through the model's final norm, any leading shape."""
        norm = self.norm()
        normed: Tensor = hidden if norm is None else norm(hidden)
        return normed

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of normed hidden states, in the model's dtype."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def forward_dense(self, ids: Tensor) -> list[Tensor]:
        """Hidden states [B, T, hidden] after every layer, of whole sequences ids [B, T].

        Causal and teacher-forced; the states are not normed; gradients flow.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
        hidden = self.embed(ids, positions)
        rotary = self.position_embeddings(positions)
        attend = DenseAttend()
        handed = {self._cache_argument: attend, "attend": attend}
        states = []
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, **handed)
            states.append(hidden)
        return states

    def set_layers(self, layers: Sequence[nn.Module]) -> None:
        """Replace the layers; the stock model then runs exactly these."""
        self.decoder.layers = nn.ModuleList(layers)
        self.config.num_hidden_layers = len(layers)

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's weights by their names within the layer, in the order of memory.

        Weights of a stack stand one behind another, so that one product can read them all.
        """
        held = self.new_layer(0).state_dict()
        stacked = [
            f"{module}.{kind}"
            for stack in self.stacks
            for kind in ("weight", "bias")
            for module in stack
        ]
        first = [name for name in stacked if name in held]
        names = [*first, *sorted(set(held) - set(first))]
        return {name: tuple(held[name].shape) for name in names}

    def rotary_table(self, num_positions: int) -> Rotary | None:
        """Rotary (cos, sin) of the first positions, [positions, head_dim]; None where learned."""
        positions = torch.arange(num_positions, device=self.embedding_weight.device)
        found = self.position_embeddings(positions[None])
        return None if found is None else (found[0][0].contiguous(), found[1][0].contiguous())

    def resident_names(self) -> list[str]:
        """Names of the weights outside the layers, sorted; a tied head is left out."""
        tied = "lm_head.weight" if self.config.tie_word_embeddings else ""
        names = self.model.state_dict()
        return sorted(n for n in names if not n.startswith(self.layer_prefix) and n != tied)

    def tie(self) -> None:
        """Let the head use the embedding's weight where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.model.lm_head.weight = self.decoder.embed_tokens.weight

    def _layers(self, first: int, last: int) -> list[nn.Module]:
        layers = self.layers
        if not 0 <= first <= last <= len(layers):
            raise ValueError(
                f"Layers {first} to {last} were asked for; {len(layers)} layers are loaded."
            )
        return [layers[index] for index in range(first, last)]


class LlamaBackbone(Backbone):
    """Llama: rotary positions, RMS norms, key heads shared by query heads."""

    family: Family = "llama"
    layer_class = LlamaDecoderLayer
    layer_prefix = "model.layers."
    stacks = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    has_fused_norms = False

    @property
    def decoder(self) -> Any:
        """The stock LlamaModel."""
        return self.model.model

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings; positions come in with the rotary embedding."""
        hidden: Tensor = self.decoder.embed_tokens(ids)
        return hidden

    def position_embeddings(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary (cos, sin) of positions [B, T], each [B, T, head_dim] in the model's dtype."""
        rotary: tuple[Tensor, Tensor] = self.decoder.rotary_emb(
            self.embedding_weight, position_ids=positions
        )
        return rotary

    def norm(self) -> nn.Module | None:
        """The final RMS norm."""
        module: nn.Module = self.decoder.norm
        return module

    def new_norm(self) -> nn.Module:
        """An RMS norm with unit weights."""
        return LlamaRMSNorm(self.config.hidden_size, eps=self.config.rms_norm_eps)

    def keys_and_values(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Norm, projections and the keys' rotation, as the stock attention does them."""
        stock = layer.self_attn
        normed = layer.input_layernorm(hidden)
        heads = (*hidden.shape[:-1], -1, stock.head_dim)
        key = stock.k_proj(normed).view(heads).transpose(1, 2)
        value = stock.v_proj(normed).view(heads).transpose(1, 2)
        if rotary is None:
            raise ValueError("Llama keys need the rotary embedding of their positions.")
        cos, sin = (part.unsqueeze(1) for part in rotary)
        rotate: Callable[[Tensor], Tensor] = rotate_half
        return key * cos + rotate(key) * sin, value

    @property
    def is_fusible(self) -> bool:
        """With silu gates and without biases, as all of Llama's own checkpoints."""
        config = self.config
        return config.hidden_act == "silu" and not (config.attention_bias or config.mlp_bias)

    def fused_layers(self, layers: Sequence[Any], hidden: Tensor, attend: FusedReader) -> Tensor:
        """Layer after layer.

        Sums are rounded once where a stock layer rounds a product and then its sum with the
        residual.
        """
        for number, layer in enumerate(layers):
            hidden = self._fused_layer(layer, hidden, attend, is_ours=number > 0)
        return hidden

    def _fused_layer(
        self, layer: Any, hidden: Tensor, attend: FusedReader, is_ours: bool
    ) -> Tensor:
        """Two norms, four products, and a launch each for storing, attending and gating."""
        stock, mlp = layer.self_attn, layer.mlp
        normed = layer.input_layernorm(hidden)
        query, key, value = project(normed, (stock.q_proj, stock.k_proj, stock.v_proj))
        asked = attend.store(query, key, value, stock.layer_idx)
        mixed = attend.read(asked, stock.layer_idx, stock.scaling)
        hidden = _add_product(hidden, mixed, stock.o_proj, is_ours)
        normed = layer.post_attention_layernorm(hidden)
        opened = gated(*project(normed, (mlp.gate_proj, mlp.up_proj)))
        return _add_product(hidden, opened, mlp.down_proj, is_ours=True)

    def fused_fill(self, layer: Any, hidden: Tensor, writer: FusedWriter) -> None:
        """A norm, a product, and a launch for storing."""
        stock = layer.self_attn
        key, value = project(layer.input_layernorm(hidden), (stock.k_proj, stock.v_proj))
        writer.store(None, key, value, stock.layer_idx)

    def new_layer(self, index: int) -> nn.Module:
        """A stock LlamaDecoderLayer on the meta device."""
        with torch.device("meta"):
            layer = LlamaDecoderLayer(self.config, index).train(self.model.training)
        if self.has_fused_norms:
            replace_norms(layer)
        return layer

    def rebuild_buffers(self, device: torch.device) -> None:
        """The rotary frequencies, in float32 whatever the model's dtype."""
        with torch.device(device):
            self.decoder.rotary_emb = LlamaRotaryEmbedding(self.config)

    def fuse_norms(self) -> None:
        """Let torch's fused RMS norm do what the stock module does in eight kernels.

        It multiplies by the weight before it rounds, so bf16 results differ in the last place
        from the stock norm's. Weight names stay as they are.
        """
        self.has_fused_norms = True
        replace_norms(self.model)


def _add_product(hidden: Tensor, other: Tensor, module: nn.Linear, is_ours: bool) -> Tensor:
    """A module's product of `other` added to `hidden`, in place where that is ours; no bias."""
    if is_ours:
        return hidden.addmm_(other, module.weight.t())
    return torch.addmm(hidden, other, module.weight.t())


def cache_argument(layer_class: type[nn.Module]) -> str:
    """The name under which a stock layer takes its cache; transformers 5.24 renamed it."""
    known = inspect.signature(layer_class.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def replace_norms(root: nn.Module) -> None:
    """Put torch's RMS norm, with the same weight and epsilon, in the place of each stock one."""
    for module in list(root.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                with torch.device("meta"):
                    fused = nn.RMSNorm(child.weight.shape[0], eps=float(child.variance_epsilon))
                fused.weight = child.weight
                setattr(module, name, fused.train(child.training))


class OptBackbone(Backbone):
    """OPT: learned positions (two rows in front are unused), layer norms, biases."""

    family: Family = "opt"
    layer_class = OPTDecoderLayer
    layer_prefix = "model.decoder.layers."
    stacks = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),)

    @property
    def decoder(self) -> Any:
        """The stock OPTDecoder."""
        return self.model.model.decoder

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token plus position embeddings; the stock module adds its offset of two."""
        stock = self.decoder
        hidden: Tensor = stock.embed_tokens(ids)
        # The mask only serves to infer positions, which are given.
        where: Tensor = stock.embed_positions(None, 0, position_ids=positions)
        return hidden + where

    def position_embeddings(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: positions are part of the embedding."""
        return None

    def norm(self) -> nn.Module | None:
        """The final layer norm, None where layers normalise after their blocks."""
        module: nn.Module | None = self.decoder.final_layer_norm
        return module

    def new_norm(self) -> nn.Module:
        """A layer norm with unit weights and no bias yet."""
        affine = bool(self.config.layer_norm_elementwise_affine)
        return nn.LayerNorm(self.config.hidden_size, elementwise_affine=affine)

    def keys_and_values(
        self, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Norm (where it comes before attention) and projections."""
        stock = layer.self_attn
        normed = layer.self_attn_layer_norm(hidden) if layer.do_layer_norm_before else hidden
        heads = (*hidden.shape[:-1], stock.num_heads, stock.head_dim)
        key = stock.k_proj(normed).view(heads).transpose(1, 2)
        value = stock.v_proj(normed).view(heads).transpose(1, 2)
        return key, value

    @property
    def is_fusible(self) -> bool:
        """With norms before the blocks, as all sizes but 350M have them, relu and biases."""
        config = self.config
        return bool(
            config.do_layer_norm_before
            and config.layer_norm_elementwise_affine
            and config.enable_bias
            and config.activation_function == "relu"
        )

    def fused_layers(self, layers: Sequence[Any], hidden: Tensor, attend: FusedReader) -> Tensor:
        """Four products with their biases, and a launch each for what is between two of them.

        A sum with the residual and the norm after it are one launch, over the end of a layer too.
        """
        if not layers:
            return hidden
        normed = layers[0].self_attn_layer_norm(hidden)
        for number, (layer, after) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
            stock, fc1 = layer.self_attn, layer.fc1
            query, key, value = project(normed, (stock.q_proj, stock.k_proj, stock.v_proj))
            attend.store(None, key, value, stock.layer_idx)
            mixed = stock.out_proj(attend.read(query, stock.layer_idx, stock.scaling))
            hidden, normed = add_and_norm(hidden, mixed, layer.final_layer_norm, number > 0)
            # A product with its bias and relu, which is one launch where the library can.
            opened = layer.fc2(torch._addmm_activation(fc1.bias, normed, fc1.weight.t()))
            if after is not None:
                hidden, normed = add_and_norm(hidden, opened, after.self_attn_layer_norm, True)
        return hidden.add_(opened)

    def fused_fill(self, layer: Any, hidden: Tensor, writer: FusedWriter) -> None:
        """A norm, a product, and a launch for storing."""
        stock = layer.self_attn
        key, value = project(layer.self_attn_layer_norm(hidden), (stock.k_proj, stock.v_proj))
        writer.store(None, key, value, stock.layer_idx)

    def new_layer(self, index: int) -> nn.Module:
        """A stock OPTDecoderLayer on the meta device."""
        with torch.device("meta"):
            return OPTDecoderLayer(self.config, layer_idx=index).train(self.model.training)

    def rebuild_buffers(self, device: torch.device) -> None:
        """Nothing: every OPT tensor is in the checkpoint."""


def backbone_of(model: Any) -> Backbone:
    """The adapter of a stock model.

    From here on the stock model attends through the registered function, which is SDPA for its
    own `forward` and `generate`. An unsupported class is an InputError.
    """
    if isinstance(model, LlamaForCausalLM):
        return LlamaBackbone(model)
    if isinstance(model, OPTForCausalLM):
        return OptBackbone(model)
    raise unsupported(type(model).__name__)


def unsupported(architecture: str, where: str | None = None) -> InputError:
    """The error for an architecture without an adapter."""
    return InputError(
        f"The architecture {architecture!r} has no adapter; supported are "
        f"{' and '.join(SUPPORTED)}.",
        where,
    )


def check_supported(config: LlamaConfig | OPTConfig, where: str | None = None) -> None:
    """Raise `InputError` for a model of a known architecture that early exits cannot run."""
    if isinstance(config, OPTConfig):
        if config.word_embed_proj_dim != config.hidden_size:
            raise InputError(
                f"This OPT model projects embeddings of width {config.word_embed_proj_dim} to "
                f"{config.hidden_size} (as OPT-350M does), which early exits here do not "
                "support; use a size with word_embed_proj_dim equal to hidden_size.",
                where,
            )
        return
    rope = str((config.rope_parameters or {}).get("rope_type", "default"))
    if rope in CHANGING_ROPE:
        raise InputError(
            f"The rotary embedding {rope!r} changes with the length of the text, so cached keys "
            "would be out of date; use a checkpoint with another rope_type.",
            where,
        )


def empty_backbone(config: LlamaConfig | OPTConfig, device: torch.device) -> Backbone:
    """A stock model on the meta device, without layers: no weight takes memory yet.

    `config` is copied; only the buffers that are computed live on `device`.
    """
    bare = copy.deepcopy(config)
    bare.num_hidden_layers = 0
    build: Callable[[Any], Any] = (
        LlamaForCausalLM if isinstance(config, LlamaConfig) else OPTForCausalLM
    )
    with torch.device("meta"):
        model = build(bare)
    backbone = backbone_of(model.eval())
    backbone.rebuild_buffers(device)
    return backbone


def shape_of(config: LlamaConfig | OPTConfig) -> ModelShape:
    """The dimensions a configuration states, at its full depth."""
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    is_llama = isinstance(config, LlamaConfig)
    has_norm = is_llama or (
        config.do_layer_norm_before and not getattr(config, "_remove_final_layer_norm", False)
    )
    return ModelShape(
        family="llama" if is_llama else "opt",
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.num_key_value_heads or heads) if is_llama else heads,
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        ffn=int(config.intermediate_size if is_llama else config.ffn_dim),
        vocab=int(config.vocab_size or 0),
        max_positions=int(config.max_position_embeddings),
        tied_head=bool(config.tie_word_embeddings),
        final_norm=bool(has_norm),
    )
