"""The adapters run the stock modules and give the stock model's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from calibration.model.attention import DenseAttend
from calibration.model.family import (
    LlamaBackbone,
    backbone_of,
    cache_argument,
    empty_backbone,
    shape_of,
)
from helios_sim.errors import InputError
from tests.calibration import tiny
from tests.factories import total_params


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_dense_states_are_those_of_the_stock_model(family):
    model = tiny.stock_model(family)
    ids = torch.tensor([tiny.prompt(20, 1), tiny.prompt(20, 2)])
    expected = model(ids, output_hidden_states=True)
    backbone = backbone_of(model)
    states = backbone.forward_dense(ids)
    assert len(states) == 4
    for ours, stock in zip(states[:-1], expected.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(ours, stock)
    logits = backbone.head(backbone.final_norm(states[-1]))
    torch.testing.assert_close(logits, expected.logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_wrapped_model_still_generates_as_stock(family):
    model = tiny.stock_model(family)
    ids = tiny.prompt(9)
    before = tiny.stock_tokens(model, ids, 6)
    backbone_of(model)
    assert tiny.stock_tokens(model, ids, 6) == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_packed_tokens_of_one_sequence_run_like_the_dense_pass(family):
    backbone = backbone_of(tiny.stock_model(family))
    ids = torch.tensor(tiny.prompt(12))
    positions = torch.arange(12)
    hidden = backbone.embed(ids, positions)
    middle = backbone.run(hidden, 0, 2, DenseAttend(), positions)
    end = backbone.run(middle, 2, 4, DenseAttend(), positions)
    states = backbone.forward_dense(ids[None])
    torch.testing.assert_close(middle, states[1][0])
    torch.testing.assert_close(end, states[3][0])


class Kept(DenseAttend):
    """Keeps the keys and values of every layer."""

    def __init__(self):
        self.kept = {}

    def update(self, key, value, layer, *args, **kwargs):
        self.kept[layer] = (key, value)
        return key, value


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_filling_makes_the_keys_and_values_the_stock_layer_makes_of_the_same_input(family):
    backbone = backbone_of(tiny.stock_model(family))
    positions = torch.tensor([3, 4, 5, 9])
    hidden = torch.randn(4, 64)
    filled, stock = Kept(), Kept()
    backbone.fill(hidden, positions, 1, 4, filled)
    for layer in (1, 2, 3):
        backbone.run(hidden, layer, layer + 1, stock, positions)
        for ours, expected in zip(filled.kept[layer], stock.kept[layer], strict=True):
            assert torch.equal(ours, expected)


def test_gradients_flow_through_the_dense_pass():
    backbone = backbone_of(tiny.stock_model("llama").train())
    states = backbone.forward_dense(torch.tensor([tiny.prompt(8)]))
    backbone.head(backbone.final_norm(states[1])).square().mean().backward()
    assert backbone.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert backbone.layers[2].self_attn.q_proj.weight.grad is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_model_built_on_meta_holds_no_memory_and_computes_with_assigned_weights(family):
    model = tiny.stock_model(family)
    config = tiny.config(family)
    backbone = empty_backbone(config, torch.device("cpu"))
    assert all(weight.is_meta for weight in backbone.model.parameters())
    assert config.num_hidden_layers == 4
    backbone.set_layers([backbone.new_layer(index) for index in range(4)])
    weights = {**model.state_dict()}
    names = backbone.resident_names()
    names += [f"{backbone.layer_prefix}{i}.{n}" for i in range(4) for n in backbone.layer_shapes()]
    backbone.model.load_state_dict({n: weights[n] for n in names}, assign=True, strict=False)
    backbone.tie()
    ids = torch.tensor([tiny.prompt(10)])
    torch.testing.assert_close(backbone.model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_fused_norms_agree_with_the_stock_norms_and_keep_their_names():
    model = tiny.stock_model("llama-gqa")
    names = sorted(model.state_dict())
    backbone = backbone_of(model)
    ids = torch.tensor([tiny.prompt(10)])
    before = backbone.forward_dense(ids)[-1]
    assert isinstance(backbone, LlamaBackbone)
    backbone.fuse_norms()
    assert sorted(model.state_dict()) == names
    assert type(backbone.layers[0].input_layernorm) is torch.nn.RMSNorm
    assert type(backbone.new_layer(1).post_attention_layernorm) is torch.nn.RMSNorm
    torch.testing.assert_close(backbone.forward_dense(ids)[-1], before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_shape_counts_the_weights_of_the_stock_model(family):
    model = tiny.stock_model(family)
    held = sum(weight.numel() for weight in model.parameters())
    assert total_params(shape_of(tiny.config(family))) == held


def test_an_unsupported_architecture_is_named_with_what_is_supported():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=256))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel.*LlamaForCausalLM and OPTForCausalLM"):
        backbone_of(model)


def test_projected_opt_embeddings_are_refused():
    with pytest.raises(InputError, match="projects embeddings of width 32 to 64"):
        backbone_of(tiny.stock_model("opt", word_embed_proj_dim=32))


def test_a_rotary_embedding_that_changes_with_length_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(InputError, match="'dynamic' changes with the length"):
        backbone_of(tiny.stock_model("llama", rope_parameters=rope))


def test_layers_that_are_not_loaded_cannot_run():
    backbone = backbone_of(tiny.stock_model("opt"))
    with pytest.raises(ValueError, match="Layers 2 to 5 were asked for; 4 layers are loaded"):
        backbone.run(torch.zeros(1, 64), 2, 5, DenseAttend(), torch.zeros(1, dtype=torch.long))


def test_a_layer_is_handed_its_cache_under_the_name_that_its_release_knows() -> None:
    """Release 5.24 of transformers renamed the argument; both names are in use."""

    class Earlier(nn.Module):
        def forward(self, hidden_states, past_key_values=None): ...

    class Later(nn.Module):
        def forward(self, hidden_states, cache=None): ...

    assert cache_argument(Earlier) == "past_key_values"
    assert cache_argument(Later) == "cache"
