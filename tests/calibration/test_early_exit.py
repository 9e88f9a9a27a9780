"""Models are loaded as deep as asked, grow and shrink in place, and take the planned bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from calibration.model import early_exit, memory
from calibration.model.confidence import Confidence, PiecewiseLinear
from calibration.model.decode import Decoder, generate, slot_pool
from calibration.model.early_exit import from_stock, load, save
from calibration.model.exit_heads import new_exit_heads
from calibration.model.host_copy import HostCopy
from helios_sim.errors import InputError
from tests.calibration import tiny


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request, tmp_path_factory):
    """A checkpoint of each family."""
    path = tmp_path_factory.mktemp(request.param)
    save(from_stock(tiny.stock_model(request.param), (1, 2, 4), name=request.param), path)
    return path


def tokens(model, num_tokens=12):
    return generate(Decoder(model, slot_pool(model, 2, 64)), [tiny.prompt(9)], num_tokens)


@pytest.mark.parametrize("device", tiny.DEVICES)
def test_a_grown_model_equals_one_loaded_whole(folder, device):
    where = tiny.need(device)
    whole = load(folder, device=where, dtype=torch.float32)
    grown = load(folder, depth=1, device=where, dtype=torch.float32)
    first = grown.backbone.layers[0].self_attn.q_proj.weight
    assert grown.depth == 1
    report = grown.grow(2)
    assert (grown.depth, report.bytes) == (2, grown.plan(2).layer_bytes)
    assert report.source == "disk"
    grown.grow(4)
    assert grown.backbone.layers[0].self_attn.q_proj.weight is first
    assert tokens(grown) == tokens(whole)
    held = whole.backbone.model.state_dict()
    for name, weight in grown.backbone.model.state_dict().items():
        assert torch.equal(weight, held[name])


def test_a_shrunk_model_equals_one_loaded_to_that_depth(folder):
    shrunk = load(folder)
    generation = shrunk.generation
    shrunk.shrink(2)
    assert shrunk.generation == generation + 1
    assert shrunk.depth == 2
    assert tokens(shrunk) == tokens(load(folder, depth=2))
    shrunk.grow(4)
    assert tokens(shrunk) == tokens(load(folder))


@pytest.mark.parametrize("device", tiny.DEVICES)
def test_measured_bytes_are_planned_bytes_at_every_depth(folder, device):
    model = load(folder, depth=1, device=tiny.need(device), dtype=torch.float32)
    for depth in (1, 2, 4):
        before = model.loaded_bytes
        report = model.grow(depth)
        plan = model.plan(depth)
        assert model.loaded_bytes == plan.total_bytes == before + report.bytes
    model.shrink(1)
    assert model.loaded_bytes == model.plan(1).total_bytes
    assert model.unload() >= 0
    assert model.loaded_bytes == 0


def test_layers_that_hold_no_weights_are_not_let_go_again(folder, monkeypatch):
    """A switch to a shallow model would wait for its deep layers, which it never loaded."""
    model = load(folder)
    layers = [id(layer) for layer in model.backbone.layers]
    model.shrink(2)
    touched = []
    assign = early_exit.assign

    def assigned(module, weights):
        touched.append(id(module))
        assign(module, weights)

    monkeypatch.setattr(early_exit, "assign", assigned)
    model.unload()
    assert [one for one in layers if one in touched] == layers[:2]
    model.grow(1)
    touched.clear()
    model.unload()
    assert [one for one in layers if one in touched] == layers[:1]
    assert model.loaded_bytes == 0


def test_auxiliary_heads_count_where_the_whole_model_comes_in(tmp_path, monkeypatch):
    stock = tiny.stock_model("llama")
    heads = new_exit_heads(from_stock(stock, (1, 2, 4)).backbone, (1, 2, 4))
    save(from_stock(stock, (1, 2, 4), exit_heads=heads), tmp_path)
    model = load(tmp_path, depth=1)
    model.unload()
    needed = model.plan(2).total_bytes
    monkeypatch.setattr(memory, "available_host_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match=f"needs {needed:,} bytes"):
        model.grow(2)
    monkeypatch.setattr(memory, "available_host_bytes", lambda: needed)
    assert model.grow(2).bytes == model.loaded_bytes == needed


def test_planned_bytes_are_those_the_simulator_counts(folder):
    model = load(folder, depth=1)
    for depth in (1, 2, 4):
        assert model.plan(depth).total_bytes == model.spec.weight_bytes(depth)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("device", tiny.DEVICES)
def test_evicted_layers_come_back_from_host_memory(folder, device, pinned):
    where = tiny.need(device)
    model = load(folder, device=where, dtype=torch.float32, host_copy=True, pinned=pinned)
    before = tokens(model)
    model.shrink(1)
    assert model.grow(4).source == "host"
    assert tokens(model) == before
    model.unload()
    assert model.depth == 0
    assert model.grow(2).source == "host"
    model.grow(4)
    assert tokens(model) == before
    copy = model.host_copy
    assert copy is not None
    assert copy.bytes == model.plan(4).total_bytes
    assert copy.is_pinned == (pinned and device == "cuda")
    if pinned and device == "cpu":
        assert copy.note == "memory is page-locked for a CUDA GPU only, not for cpu"


def test_a_stock_model_in_memory_can_shrink_and_grow():
    model = from_stock(tiny.stock_model("llama-gqa"), (1, 2, 4))
    before = tokens(model)
    model.shrink(1)
    assert model.grow(4).source == "memory"
    assert tokens(model) == before


def test_too_little_memory_is_refused_before_it_is_touched(folder, monkeypatch):
    model = load(folder, depth=1)
    bytes_before = model.loaded_bytes
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 5000)
    with pytest.raises(
        InputError, match=r"from layer 1 to 4 needs .* bytes .* 5,000 bytes .* load fewer layers"
    ):
        model.grow(4)
    assert (model.depth, model.loaded_bytes) == (1, bytes_before)


def test_a_depth_that_is_no_exit_is_refused(folder):
    with pytest.raises(InputError, match=r"depth 3 is no exit layer; allowed are \[1, 2, 4\]"):
        load(folder, depth=3)
    assert load(folder, depth=3, exits=(3, 4)).depth_level == 0


@pytest.mark.parametrize("depth", [0, 5])
def test_a_depth_the_model_does_not_have_is_refused(folder, depth):
    model = load(folder, depth=1)
    with pytest.raises(InputError, match=f"asked for {depth} loaded layers; allowed are 1 to 4"):
        model.grow(depth)


def test_growing_downwards_is_a_mistake_of_the_caller(folder):
    model = load(folder, depth=2)
    with pytest.raises(ValueError, match="cannot grow to 1"):
        model.grow(1)
    with pytest.raises(ValueError, match="grow it to 4"):
        model.shrink(4)


def test_a_decision_holds_token_confidence_and_likelihood():
    maps = {"all": {2: PiecewiseLinear((0.0,), (0.25,))}}
    model = from_stock(
        tiny.stock_model("llama"), (1, 2, 4), confidence=Confidence("max-softmax", 0.5, maps)
    )
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    p = logits.softmax(-1)
    raw = model.decide(logits)
    assert raw.tokens.tolist() == [0, 2]
    torch.testing.assert_close(raw.confidence, p.amax(-1))
    torch.testing.assert_close(raw.nll(), -p.amax(-1).log())
    torch.testing.assert_close(raw.nll(torch.tensor([1, 1])), -p[:, 1].log())
    assert model.decide(logits, level=1).confidence.tolist() == [0.25, 0.25]
    torch.testing.assert_close(model.decide(logits, level=0).confidence, p.amax(-1))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="The checkpoint cannot be written") as caught:
        save(from_stock(tiny.stock_model("opt")), tmp_path / "taken")
    assert caught.value.where == str(tmp_path / "taken")


def test_a_disk_that_fills_leaves_no_half_a_file(tmp_path, monkeypatch):
    def fills(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(early_exit, "save_file", fills)
    with pytest.raises(InputError, match="No space left on device"):
        save(from_stock(tiny.stock_model("opt")), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_needs_every_layer(folder, tmp_path):
    with pytest.raises(InputError, match="1 of 4 layers loaded; grow it"):
        save(load(folder, depth=1), tmp_path / "half")


def test_a_model_cast_to_sixteen_bits_keeps_its_rotary_frequencies():
    stock = tiny.stock_model("llama")
    exact = stock.model.rotary_emb.inv_freq.clone()
    stock.to(torch.bfloat16)
    assert stock.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    model = from_stock(stock, (1, 2, 4))
    assert torch.equal(model.backbone.decoder.rotary_emb.inv_freq, exact)


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(monkeypatch):
    """CUDA's error is asked for, so that no kernel is blamed for it."""
    asked = []

    def zeros(*shape, device):
        asked.append(device)
        raise RuntimeError("CUDA error: out of memory")

    runtime = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", zeros)
    device = torch.device("cuda")
    copy = HostCopy([4, 8], torch.float32, True, device)
    assert not copy.is_pinned
    assert copy.note == "the system refused to page-lock 48 bytes (CUDA error 2)"
    assert asked == [device]


def test_layers_that_are_dropped_hold_no_weights_and_are_not_built_again(folder):
    """A layer's modules stay, since building them takes longer than loading their weights."""
    model = load(folder)
    expected = tokens(model)
    layers = list(model.backbone.layers)
    model.shrink(1)
    assert all(weight.is_meta for layer in layers[1:] for weight in layer.parameters())
    assert not any(weight.is_meta for weight in layers[0].parameters())
    generation = model.generation
    model.unload()
    assert model.generation == generation + 1
    assert all(weight.is_meta for layer in layers for weight in layer.parameters())
    model.grow(4)
    assert list(model.backbone.layers) == layers
    assert tokens(model) == expected


def test_layers_that_came_before_a_load_failed_hold_no_weights(folder, monkeypatch):
    model = load(folder, depth=1)
    made = []
    source, new_layer = model.source, model.backbone.new_layer

    def kept(index):
        made.append(new_layer(index))
        return made[-1]

    def fill(views):
        if any(name.startswith(f"{model.backbone.layer_prefix}3.") for name in views):
            raise InputError("The file cannot be read.")
        source.fill(views)

    monkeypatch.setattr(model.backbone, "new_layer", kept)
    model.source = SimpleNamespace(on_device=False, kind="disk", fill=fill)
    with pytest.raises(InputError, match="cannot be read"):
        model.grow(4)
    assert (model.depth, len(made)) == (1, 3)
    assert all(weight.is_meta for layer in made for weight in layer.parameters())
    assert model.loaded_bytes == model.plan(1).total_bytes


def test_what_was_read_to_host_memory_alone_is_what_a_load_copies_unchecked(folder, monkeypatch):
    model = load(folder, host_copy=True)
    wanted = tokens(model)
    model.unload()
    assert model.host_copy is not None
    model.host_copy.buffer.fill_(torch.nan)
    model.forget_host_copy()
    model.read_to_host()
    assert model.depth == 0
    monkeypatch.delattr(early_exit.EarlyExitLM, "_check_guard")
    assert model.grow(4).source == "host"
    assert tokens(model) == wanted
