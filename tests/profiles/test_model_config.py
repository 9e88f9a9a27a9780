"""A shape from config.json: what is read, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helios_sim.errors import InputError
from helios_sim.model import PUBLIC_SHAPES
from helios_sim.profiles.model_config import MODEL_TYPES, read_config, shape_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "ffn_dim": 8192,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 2048,
    "do_layer_norm_before": True,
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_a_small_llama_has_the_parameters_that_a_pencil_counts() -> None:
    shape = shape_of(LLAMA).shape
    assert (shape.family, shape.head_dim, shape.kv_heads, shape.tied_head) == ("llama", 2, 2, False)
    # Queries and output 8 x 8 each, keys and values 8 x 4 each; three matrices 8 x 16; two norms.
    assert shape.layer_params() == 2 * 64 + 2 * 32 + 3 * 128 + 2 * 8
    assert shape.embedding_params() == 80
    assert shape.head_params() == 8 + 80


def test_an_opt_configuration_states_the_shape_that_is_shipped() -> None:
    assert shape_of(OPT).shape == PUBLIC_SHAPES["opt-1.3b"]
    after = {**OPT, "do_layer_norm_before": False}
    assert not shape_of(after).shape.final_norm
    assert not shape_of({**OPT, "_remove_final_layer_norm": True}).shape.final_norm


def test_a_llama_without_kv_heads_has_as_many_as_heads_and_a_given_head_dim_stands() -> None:
    assert shape_of(without(LLAMA, "num_key_value_heads")).shape.kv_heads == 4
    assert shape_of({**LLAMA, "head_dim": None}).shape.head_dim == 2
    odd = {**LLAMA, "hidden_size": 9, "head_dim": 3, "tie_word_embeddings": True}
    assert shape_of(odd).shape.head_dim == 3
    assert shape_of(odd).shape.tied_head


def test_the_source_names_the_kind_and_what_is_neglected() -> None:
    assert shape_of(LLAMA).source == "its config.json, model_type 'llama'"
    assert "biases of queries, keys and values" in shape_of({**LLAMA, "model_type": "qwen2"}).source
    window = {**LLAMA, "model_type": "mistral", "sliding_window": 32}
    assert "sliding window of 32 tokens is neglected" in shape_of(window).source
    assert "window" not in shape_of({**window, "sliding_window": 64}).source
    assert "window" not in shape_of({**window, "use_sliding_window": False}).source


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            without(LLAMA, "hidden_size", "vocab_size"),
            "'hidden_size', 'vocab_size' are missing; a model of type 'llama' needs",
        ),
        ({**LLAMA, "vocab_size": None}, "'vocab_size' is missing"),
        (without({**LLAMA, "model_type": "qwen2"}, "num_key_value_heads"), "is missing"),
        ({**LLAMA, "num_hidden_layers": 0}, "0 was given for 'num_hidden_layers'; allowed is a"),
        ({**LLAMA, "hidden_size": -8}, "-8 was given for 'hidden_size'"),
        ({**LLAMA, "hidden_size": 8.0}, "8.0 was given for 'hidden_size'"),
        ({**LLAMA, "hidden_size": True}, "true was given for 'hidden_size'"),
        ({**LLAMA, "hidden_size": "8"}, "\"8\" was given for 'hidden_size'"),
        ({**LLAMA, "vocab_size": 10**9}, "allowed is a whole number from 1 to 100,000,000"),
        ({**LLAMA, "hidden_size": 9}, "A 'hidden_size' of 9 was given with 4"),
        ({**LLAMA, "num_key_value_heads": 3}, "3 'num_key_value_heads' were given with 4"),
        ({**LLAMA, "tie_word_embeddings": 1}, "allowed is true or false"),
        ({**LLAMA, "num_local_experts": 8}, "a mixture of experts reads other weights for every"),
        ({**LLAMA, "is_encoder_decoder": True}, "It has an encoder and a decoder"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "as it was before it was quantised"),
        ({**LLAMA, "text_config": {"hidden_size": 8}}, "it reads more than text"),
        (without(LLAMA, "model_type"), "'model_type' is missing; allowed is a model_type of llama"),
        ({**LLAMA, "model_type": "lama"}, "Did you mean 'llama'?"),
        ({**LLAMA, "model_type": ["llama"]}, "The 'model_type' [\"llama\"] was given"),
        ({**OPT, "word_embed_proj_dim": 512}, "embeddings of another width than the layers"),
    ],
)
def test_what_is_no_shape_of_a_known_kind_is_refused_with_the_reason(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError) as found:
        read_config(file)
    assert said in str(found.value)
    assert found.value.where == str(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "This is not valid JSON: "),
        ("[1]", "An object with the keys of a config.json was expected, [1] was given."),
        ("\xff", "The file cannot be read: "),
        ("[" * 100_000, "The file cannot be read: "),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as found:
        read_config(file)
    assert said in str(found.value)


def test_a_folder_stands_for_the_configuration_in_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no such file; give the"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert read_config(tmp_path) == shape_of(LLAMA)


def test_every_kind_of_model_is_named_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "derive.md").read_text(encoding="utf-8")
    section = page.split("## A model that is not here")[1].split("\n## ")[0]
    assert not [kind for kind in MODEL_TYPES if f"`{kind}`" not in section]
