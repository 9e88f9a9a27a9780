"""Random models have the public dimensions, only the layers asked for, and fit or are refused."""

from __future__ import annotations

import pytest
import torch

from calibration.model import memory
from calibration.model.decode import Decoder, generate, slot_pool
from calibration.model.early_exit import empty_model
from calibration.model.family import shape_of
from calibration.model.shapes import ROPE_THETA, RandomSource, config_of, random_model
from helios_sim.errors import InputError
from helios_sim.model import PUBLIC_SHAPES, ModelShape
from tests.calibration import tiny
from tests.factories import total_params

SMALL = ModelShape("llama", 6, 64, 4, 2, 16, 128, 256, 128, True)
PARAMETERS_IN_BILLIONS = {
    "opt-1.3b": 1.316,
    "opt-6.7b": 6.658,
    "llama2-7b": 6.738,
    "llama2-13b": 13.016,
    "llama2-70b": 68.977,
    "llama3-8b": 8.030,
    "llama3.2-1b": 1.236,
    "codellama-34b": 33.744,
}


@pytest.mark.parametrize("name", PUBLIC_SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    billions = total_params(PUBLIC_SHAPES[name]) / 1e9
    assert billions == pytest.approx(PARAMETERS_IN_BILLIONS[name], abs=6e-4)


@pytest.mark.parametrize("name", PUBLIC_SHAPES)
def test_configurations_state_their_shape(name):
    assert shape_of(config_of(PUBLIC_SHAPES[name])) == PUBLIC_SHAPES[name]
    assert set(ROPE_THETA) <= set(PUBLIC_SHAPES)


def test_a_shape_without_a_final_norm_is_that_of_a_model_that_normalises_after_its_blocks():
    shape = shape_of(tiny.config("opt-post-norm"))
    assert not shape.final_norm
    assert shape_of(config_of(shape)) == shape
    model = random_model(shape, 2)
    assert model.loaded_bytes == model.spec.weight_bytes(2)


@pytest.mark.parametrize("device", tiny.DEVICES)
def test_only_the_layers_asked_for_take_memory(device):
    model = random_model(SMALL, 2, device=tiny.need(device), dtype=torch.float32)
    assert (model.depth, model.exit_layers) == (2, (2, 6))
    assert model.loaded_bytes == model.plan(2).total_bytes == model.spec.weight_bytes(2)
    model.grow(6)
    assert model.loaded_bytes == model.spec.weight_bytes(6)


def test_a_layer_has_the_same_weights_however_it_was_reached():
    whole, grown = random_model(SMALL, 6, seed=3), random_model(SMALL, 1, seed=3)
    grown.grow(3)
    grown.shrink(1)
    grown.grow(6)
    held = whole.backbone.model.state_dict()
    for name, weight in grown.backbone.model.state_dict().items():
        assert torch.equal(weight, held[name])
    other = random_model(SMALL, 6, seed=4).backbone.model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(other[name], held[name])
    assert held[name].std().item() == pytest.approx(0.02, rel=0.05)
    layers = [held[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_random_layers_come_back_from_host_memory():
    config, source = config_of(SMALL), RandomSource(0)
    model = empty_model(
        config,
        SMALL,
        name="random",
        exits=(4, 6),
        source=source,
        device=torch.device("cpu"),
        dtype=torch.float32,
        host_copy=True,
    )
    model.grow(4)
    before = generate(Decoder(model, slot_pool(model, 1, 32)), [tiny.prompt(5)], 8)
    model.unload()
    assert model.grow(4).source == "host"
    assert generate(Decoder(model, slot_pool(model, 1, 32)), [tiny.prompt(5)], 8) == before


def test_a_shape_too_large_is_refused_before_memory_is_touched(monkeypatch):
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 8 * 2**30)
    with pytest.raises(
        InputError,
        match=r"Loading llama2-70b from layer 0 to 80 needs 275,906,592,768 bytes \(256.96 GiB\) "
        r"on cpu and 8,589,934,592 bytes \(8.00 GiB\) are available; load fewer layers",
    ):
        random_model("llama2-70b", 80)


def test_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'gpt-5' is unknown; allowed are codellama-34b, llama2"):
        random_model("gpt-5", 1)
