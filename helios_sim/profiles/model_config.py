"""The shape that a Hugging Face `config.json` states, read without the libraries that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from helios_sim.errors import InputError, did_you_mean, listed, shown
from helios_sim.model import ModelShape

CONFIG_FILE: Final = "config.json"
MOST: Final = 10**8
"""The largest count that a configuration may state: beyond it something else was written."""

_COMMON: Final = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_KEYS: Final[Mapping[str, Mapping[str, str]]] = {
    "llama": {**_COMMON, "ffn": "intermediate_size"},
    "mistral": {**_COMMON, "ffn": "intermediate_size", "kv_heads": "num_key_value_heads"},
    "qwen2": {**_COMMON, "ffn": "intermediate_size", "kv_heads": "num_key_value_heads"},
    "qwen3": {
        **_COMMON,
        "ffn": "intermediate_size",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    },
    "opt": {**_COMMON, "ffn": "ffn_dim"},
}
"""What each kind of model must state, by the field of its shape; others have defaults."""

MODEL_TYPES: Final = tuple(_KEYS)
"""Kinds of models, as `model_type` names them, whose shape is that of Llama or OPT."""

_NEGLECTED: Final = {
    "qwen2": "the biases of queries, keys and values are neglected",
    "qwen3": "the norms of queries and keys are neglected",
}
_EXPERTS: Final = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_intermediate_size",
)


@dataclass(frozen=True)
class StatedShape:
    """A shape with the words for where it comes from and what was left out of it."""

    shape: ModelShape
    source: str


def read_config(path: Path) -> StatedShape:
    """The shape that a configuration file states, or the one in a checkpoint's folder.

    Counts are of layers, heads, tokens and elements of a vector. Raises `InputError` for what is
    no such file, for architectures that have another shape, and for numbers that make no model.
    Source of the keys: `config.json` as the transformers library writes it.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"There is no such file; give the {CONFIG_FILE} of a model, or the folder with one.",
            str(file),
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"This is not valid JSON: {error.msg}.",
            f"{file}, line {error.lineno}, column {error.colno}",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"The file cannot be read: {error}.", str(file)) from error
    if not isinstance(config, dict):
        raise InputError(
            f"An object with the keys of a {CONFIG_FILE} was expected, {shown(config)} was given.",
            str(file),
        )
    return shape_of(config, str(file))


def shape_of(config: Mapping[str, Any], where: str = CONFIG_FILE) -> StatedShape:
    """The shape that a configuration states; `where` names it in errors."""
    model_type = _model_type(config, where)
    keys = _KEYS[model_type]
    lacking = [key for key in keys.values() if config.get(key) is None]
    if lacking:
        raise InputError(
            f"{listed(lacking)} {'is' if len(lacking) == 1 else 'are'} missing; a model of type "
            f"{model_type!r} needs {listed(keys.values())}.",
            where,
        )
    counts = {field: _count(config, key, where) for field, key in keys.items()}
    is_opt = model_type == "opt"
    heads, hidden = counts["heads"], counts["hidden"]
    if "kv_heads" not in counts:
        given = None if is_opt else config.get("num_key_value_heads")
        counts["kv_heads"] = (
            heads if given is None else _count(config, "num_key_value_heads", where)
        )
    if "head_dim" not in counts:
        if not is_opt and config.get("head_dim") is not None:
            counts["head_dim"] = _count(config, "head_dim", where)
        elif hidden % heads:
            raise InputError(
                f"A 'hidden_size' of {hidden} was given with {heads} 'num_attention_heads'; "
                "without a 'head_dim' the heads must divide it.",
                where,
            )
        else:
            counts["head_dim"] = hidden // heads
    if heads % counts["kv_heads"]:
        raise InputError(
            f"{counts['kv_heads']} 'num_key_value_heads' were given with {heads} "
            "'num_attention_heads'; the former must divide the latter.",
            where,
        )
    if is_opt:
        _check_opt(config, hidden, where)
    shape = ModelShape(
        family="opt" if is_opt else "llama",
        tied_head=_flag(config, "tie_word_embeddings", is_opt, where),
        final_norm=not is_opt
        or (
            _flag(config, "do_layer_norm_before", True, where)
            and not _flag(config, "_remove_final_layer_norm", False, where)
        ),
        **counts,
    )
    remarks = [_NEGLECTED[model_type]] if model_type in _NEGLECTED else []
    remarks += _window(config, shape)
    return StatedShape(
        shape, "; ".join([f"its {CONFIG_FILE}, model_type {model_type!r}", *remarks])
    )


def _model_type(config: Mapping[str, Any], where: str) -> str:
    """The kind of model, once it is known to be one whose shape can be told."""
    for key, reason in (
        (
            "quantization_config",
            "its weights take fewer bytes than the profile's; give the "
            "configuration of the model as it was before it was quantised",
        ),
        ("text_config", "it reads more than text; give the configuration of its language model"),
    ):
        if config.get(key):
            raise InputError(f"It has a {key!r}: {reason}.", where)
    if any(config.get(key) for key in _EXPERTS):
        key = next(key for key in _EXPERTS if config.get(key))
        raise InputError(
            f"It has {key!r}: a mixture of experts reads other weights for every token, which no "
            f"profile knows; {_ALLOWED}.",
            where,
        )
    if config.get("is_encoder_decoder") or config.get("encoder_layers"):
        raise InputError(
            f"It has an encoder and a decoder; a profile is of decoders alone: {_ALLOWED}.", where
        )
    given = config.get("model_type")
    if given is None:
        raise InputError(f"'model_type' is missing; {_ALLOWED}.", where)
    if not isinstance(given, str) or given not in _KEYS:
        hint = did_you_mean(given, MODEL_TYPES) if isinstance(given, str) else ""
        raise InputError(
            f"The 'model_type' {shown(given)} was given, and only layers like those of Llama and "
            f"OPT can be counted.{hint} {_ALLOWED[0].upper()}{_ALLOWED[1:]}.",
            where,
        )
    return given


_ALLOWED: Final = f"allowed is a model_type of {', '.join(MODEL_TYPES)}"


def _check_opt(config: Mapping[str, Any], hidden: int, where: str) -> None:
    """Refuse OPT models that project their embeddings, which the shape does not count."""
    width = config.get("word_embed_proj_dim")
    if width is not None and width != hidden:
        raise InputError(
            f"A 'word_embed_proj_dim' of {shown(width)} was given with a 'hidden_size' of "
            f"{hidden}; embeddings of another width than the layers are not counted.",
            where,
        )


def _window(config: Mapping[str, Any], shape: ModelShape) -> list[str]:
    """What is left out where only a window of the context is attended to."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or not config.get("use_sliding_window", True):
        return []
    if window >= shape.max_positions:
        return []
    return [f"its sliding window of {window} tokens is neglected, all KV is kept and read"]


def _count(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise InputError(
            f"{shown(value)} was given for {key!r}; allowed is a whole number from 1 to {MOST:,}.",
            where,
        )
    return value


def _flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{shown(value)} was given for {key!r}; allowed is true or false.", where)
    return value
