"""A checkpoint folder is read by key, and everything wrong with it is named before it is loaded."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.model.checkpoint import (
    HEADS_FILE,
    INDEX_FILE,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    checkpoint_folders,
    default_exits,
    named_folders,
    open_checkpoint,
    read_header,
    read_into,
    update_settings,
)
from calibration.model.confidence import Confidence
from calibration.model.early_exit import EarlyExitLM, from_stock, load, save
from calibration.model.exit_heads import new_exit_heads
from helios_sim.errors import InputError
from tests.calibration import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a tiny Llama with a guard, made once."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save(from_stock(tiny.stock_model("llama-gqa"), (1, 2, 4), name="tiny"), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "tiny")


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def resave(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def shard(folder):
    """Two shards and an index, as large models come."""
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": []}
    files["model-00002-of-00002.safetensors"] = names[10:]
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_model_comes_back_whole(family, tmp_path):
    stock = tiny.stock_model(family)
    ids = torch.tensor([tiny.prompt(10)])
    with torch.no_grad():
        expected = stock(ids).logits
    save(from_stock(stock, (1, 2, 4), name="tiny", tokenizer="bytes"), tmp_path / "tiny")
    model = load(tmp_path / "tiny")
    assert (model.name, model.exit_layers, model.spec.tokenizer) == ("tiny", (1, 2, 4), "bytes")
    assert model.guard_note == "the logits agree with the stored guard"
    with torch.no_grad():
        assert torch.equal(model.backbone.model(ids).logits, expected)


def test_stock_transformers_reads_what_was_saved(saved):
    from transformers import AutoModelForCausalLM

    stock, ids = tiny.stock_model("llama-gqa"), torch.tensor([tiny.prompt(10)])
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, stock(ids).logits)


def test_headers_say_where_every_tensor_lies(saved):
    tensors = load_file(saved / WEIGHTS_FILE)
    entries = read_header(saved / WEIGHTS_FILE)
    assert set(entries) == set(tensors)
    for name, entry in entries.items():
        target = torch.empty(entry.shape)
        read_into(entry, target)
        assert torch.equal(target, tensors[name])
        half = torch.empty(entry.shape, dtype=torch.bfloat16)
        read_into(entry, half)
        assert torch.equal(half, tensors[name].bfloat16())


def test_shards_are_found_through_their_index(folder):
    before = load(folder).logits_sums([1, 2, 3], [4])
    shard(folder)
    assert load(folder).logits_sums([1, 2, 3], [4]) == before


def test_a_missing_key_is_named(folder):
    resave(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"it misses 1 keys \(model.layers.2.mlp.up_proj.weight\)"):
        load(folder)


def test_an_extra_key_is_named(folder):
    resave(folder, lambda t: t.update({"model.layers.2.mlp.third.weight": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"it has 1 keys \(model.layers.2.mlp.third.weight\) too"):
        load(folder)


def test_old_rotary_buffers_and_tied_heads_are_not_extra(tmp_path):
    save(from_stock(tiny.stock_model("llama", tie_word_embeddings=True), (2, 4)), tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    resave(tmp_path, add)
    model = load(tmp_path)
    assert model.backbone.head_weight is model.backbone.embedding_weight


@pytest.mark.parametrize("change", [lambda head: head + 1.0, lambda head: head.half()])
def test_a_head_of_its_own_that_is_called_the_embedding_is_refused(tmp_path, change):
    save(from_stock(tiny.stock_model("llama", tie_word_embeddings=True), (2, 4)), tmp_path)
    embedding = "model.embed_tokens.weight"
    resave(tmp_path, lambda t: t.update({"lm_head.weight": change(t[embedding])}))
    with pytest.raises(InputError, match=r"differs from model\.embed_tokens\.weight"):
        load(tmp_path)


def test_a_pointer_of_git_lfs_is_told_from_weights(folder):
    (folder / WEIGHTS_FILE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(InputError, match="git lfs pull"):
        load(folder)


def test_a_folder_that_is_given_twice_is_one_checkpoint(folder):
    assert list(named_folders([folder, folder.parent / "." / folder.name]).values()) == [folder]


def test_a_different_shape_is_named(folder):
    edit(folder / "config.json", lambda c: c.update(intermediate_size=96))
    with pytest.raises(InputError, match=r"\[128, 64\] and config.json asks for \[96, 64\]"):
        load(folder)


def test_a_configuration_with_more_layers_than_weights_is_refused(folder):
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=5))
    edit(folder / SETTINGS_FILE, lambda s: s.update(exit_layers=[1, 2, 5]))
    with pytest.raises(InputError, match=r"it misses 9 keys .* and 3 more"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 400, 5000, -1])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="corrupt") as caught:
        load(folder)
    assert caught.value.where == str(path)


def test_a_header_that_is_no_header_is_named(folder):
    path = folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)
    with pytest.raises(InputError, match="not what a safetensors file begins with"):
        load(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 400]}, "begins with"),
        ({"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}, "claims bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "begins with"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "type 'F8_E4M3' is not"),
        ({"dtype": "F32"}, "begins with"),
        ([], "begins with"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path, entry, message):
    text = json.dumps({"weight": entry}).encode()
    path = tmp_path / "lying.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"one": entry, "two": entry}).encode()
    path = tmp_path / "shared.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match="bytes of another tensor"):
        read_header(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_folder_of_pickles_is_refused_with_the_remedy(folder, name):
    (folder / WEIGHTS_FILE).rename(folder / name)
    with pytest.raises(InputError, match=rf"pickles \({name}\).*convert them with safetensors"):
        load(folder)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds neither model.safetensors nor"):
        load(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        load(tmp_path / "nowhere")


def test_an_unsupported_architecture_is_named(folder):
    edit(folder / "config.json", lambda c: c.update(architectures=["MistralForCausalLM"]))
    with pytest.raises(InputError, match="'MistralForCausalLM' has no adapter; supported are"):
        load(folder)


OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "hope"}, "hidden_act is 'hope'; transformers has .*silu"),
        ({"rope_parameters": {"rope_type": "hope"}}, "rope_type is 'hope'; transformers has"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "changes with the length"),
        ({"architectures": 5}, "'5' has no adapter"),
        (OPT | {"word_embed_proj_dim": 32}, "width 32 to 64"),
        ({"num_hidden_layers": "x"}, r"^[^\n]*not accepted[^\n]*$"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number of 1"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"max_position_embeddings": None}, "max_position_embeddings|not accepted"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a whole number of 1"),
        ({"num_key_value_heads": 3}, "is 3; allowed are divisors of num_attention_heads, .* is 4"),
        ({"head_dim": 0}, "head_dim is 0; it must be a whole number of 1"),
        (OPT | {"num_attention_heads": 5}, "is 5; allowed are divisors of hidden_size, .* is 64"),
        ({"pad_token_id": 256}, "pad_token_id is 256; allowed are null and -256 to 255"),
        (OPT | {"pad_token_id": -257}, "pad_token_id is -257; allowed are null and -256 to 255"),
        (
            {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; allowed are 1 and none"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters is .* are not finite"),
        ({"rope_parameters": {"rope_theta": "x"}}, "of which no rotary embedding can be made"),
    ],
)
def test_a_configuration_that_no_layer_can_be_built_of_is_named(folder, change, message):
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "'mistral' and architectures says Llama.* is 'llama'"),
        ({"model_type": "opt"}, "'opt' and architectures says LlamaForCausalLM"),
        ({"sliding_window": 8}, "sliding_window is 8; allowed is null"),
        ({"sliding_window": 8, "use_sliding_window": True}, "use_sliding_window is True; allowed"),
        ({"layer_types": [*["full_attention"] * 3, "sliding_attention"]}, "layer_types is .*full"),
        ({"layer_types": 5}, "layer_types is 5; allowed is full_attention for every layer"),
        ({"rope_parameters": {"full_attention": YARN}}, "allowed is one rotary embedding for all"),
    ],
)
def test_a_model_that_stock_layers_would_compute_otherwise_is_refused(folder, change, message):
    """The layers pass over what they do not know, and logits would be wrong without a word."""
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": None},
        {"layer_types": ["full_attention"] * 4},
        {"sliding_window": None, "use_sliding_window": False},
        {"sliding_window": 8, "use_sliding_window": False},
        {"quantization_config": None},
        {"pad_token_id": -1},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_fields_that_change_nothing_are_no_matter(folder, change):
    edit(folder / "config.json", lambda c: c.update(change))
    assert load(folder).guard_note == "the logits agree with the stored guard"


@pytest.mark.parametrize(
    ("said", "named"), [({"quant_method": "gptq"}, "'gptq'"), ({"a": 1}, "None")]
)
def test_quantised_weights_are_refused_with_their_method_and_the_remedy(folder, said, named):
    edit(folder / "config.json", lambda c: c.update(quantization_config=said))
    with pytest.raises(InputError, match=rf"quant_method {named}\).* weights that they were made"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert caught.value.where == str(folder / "config.json")


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="not in the folder: model-00002-of-00002"):
        load(folder)


def test_a_shard_outside_the_folder_is_refused(folder):
    shard(folder)
    edit(
        folder / INDEX_FILE,
        lambda d: d["weight_map"].update({"model.norm.weight": "../other.safetensors"}),
    )
    with pytest.raises(InputError, match=r"not in the folder: \.\./other"):
        load(folder)


GUARD = {"token_ids": [1], "logits_sums": [1.0] * 3, "tolerance": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layers": [1, 2]}, "end with the full depth of 4"),
        ({"exit_layers": [2, 1, 4]}, "ascend"),
        ({"exit_layers": "all"}, "must be there and of their kinds"),
        ({"schema_version": 2}, "schema_version is 2"),
        ({"heads": "none"}, "heads is 'none'"),
        ({"exits_chosen": "yes"}, "exits_chosen is 'yes'; allowed are true, false"),
        ({"exits": [1]}, "Unknown keys"),
        ({"guard": {"token_ids": [1], "logits_sums": [1.0], "tolerance": 0.1}}, "one sum for each"),
        ({"guard": GUARD | {"token_ids": [1, 999]}}, r"\[1, 999\]; they must be some of 0 to"),
        ({"guard": GUARD | {"token_ids": []}}, "they must be some of 0 to"),
        (
            {"guard": GUARD | {"token_ids": [1] * 129}},
            "has 129 token_ids and max_pos.* is 128; set",
        ),
        ({"guard": GUARD | {"signed_sums": [[1.0] * 16]}}, "16 signed_sums an exit or none"),
        ({"guard": GUARD | {"signed_sums": [[1.0]] * 3}}, "16 signed_sums an exit or none"),
        ({"guard": GUARD | {"signed_sums": 5}}, "16 signed_sums an exit or none"),
        ({"exit_layers": [float("inf")]}, "must be there and of their kinds"),
        ({"corpus": ["code"]}, "corpus must be an object"),
        ({"corpus": {"train": ["code"]}}, "map domains to facts"),
        ({"corpus": {"heads": ["code"]}}, "map domains to facts"),
        ({"confidence": {"kind": "hope"}}, "'hope' is unknown"),
    ],
)
def test_settings_that_cannot_be_are_named(folder, change, message):
    edit(folder / SETTINGS_FILE, lambda s: s.update(change))
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert caught.value.where == str(folder / SETTINGS_FILE)


def test_the_guard_notices_other_weights(folder):
    def spoil(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"].normal_()

    resave(folder, spoil)
    with pytest.raises(InputError, match=r"exit layer 4 add up to .* not the weights the guard"):
        load(folder)
    # What is spoilt lies beyond the second layer, and is noticed when it is reached.
    model = load(folder, depth=2)
    with pytest.raises(InputError, match="exit layer 4"):
        model.grow(4)
    assert model.depth == 2


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def negate(tensors):
    tensors[HEAD].neg_()


def permute(tensors):
    tensors[HEAD] = tensors[HEAD].roll(1, 0).contiguous()


def swap_two_halves(tensors):
    tensors[HEAD] = tensors[HEAD].roll(128, 0).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [negate, permute, swap_two_halves])
def test_the_guard_notices_logits_of_the_same_size_in_other_places(folder, change, dtype):
    resave(folder, change)
    with pytest.raises(InputError, match=r"exit layer 1 lie .* of their size away .* not the weig"):
        load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_guard_notices_an_embedding_of_which_few_rows_are_left(folder, dtype):
    def spoil(tensors):
        """All rows but a sixteenth, which lie as a guard of few tokens might have chosen them."""
        rows = tensors[EMBEDDING]
        spoilt = torch.ones(len(rows), dtype=torch.bool)
        spoilt[[(7 + 977 * place) % len(rows) for place in range(16)]] = False
        rows[spoilt] = rows.std() * torch.randn_like(rows[spoilt])

    resave(folder, spoil)
    with pytest.raises(InputError, match="not the weights the guard was made of"):
        load(folder, dtype=dtype)


def without_signs(settings):
    settings["guard"].pop("signed_sums")


def test_a_guard_without_signed_sums_is_compared_as_it_is_and_stays_so(folder):
    edit(folder / SETTINGS_FILE, without_signs)
    edit(folder / SETTINGS_FILE, lambda s: s["guard"]["logits_sums"].__setitem__(2, None))
    model = load(folder)
    assert model.guard_note == f"the guard was stored in {SETTINGS_FILE}"
    guard = json.loads((folder / SETTINGS_FILE).read_text())["guard"]
    assert set(guard) == {"token_ids", "logits_sums", "tolerance"}
    assert None not in guard["logits_sums"]
    # It says nothing of signs.
    resave(folder, negate)
    assert load(folder).guard_note == "the logits agree with the stored guard"
    resave(folder, lambda tensors: tensors[HEAD].mul_(1.01))
    with pytest.raises(InputError, match=r"exit layer 1 add up to .* not the weights the guard"):
        load(folder)


def test_signed_sums_are_filled_in_as_exits_are_reached(folder):
    whole = json.loads((folder / SETTINGS_FILE).read_text())["guard"]
    edit(folder / SETTINGS_FILE, lambda s: s.update(guard=None))
    model = load(folder, depth=2)
    known = json.loads((folder / SETTINGS_FILE).read_text())["guard"]["signed_sums"]
    assert [one is None for one in known] == [False, False, True]
    model.grow(4)
    grown = json.loads((folder / SETTINGS_FILE).read_text())["guard"]
    assert grown["token_ids"] == whole["token_ids"]
    for one, other in zip(grown["signed_sums"], whole["signed_sums"], strict=True):
        assert one == pytest.approx(other)


def test_guards_contradict_each_other_by_signs_where_both_have_them(folder):
    own = load(folder).guard
    assert own is not None and own.signed_sums is not None
    turned = tuple(one and tuple(-value for value in one) for one in own.signed_sums)
    assert own.contradicts(replace(own, signed_sums=turned))
    assert not own.contradicts(replace(own, signed_sums=None))
    assert not replace(own, signed_sums=None).contradicts(replace(own, signed_sums=turned))
    assert not own.contradicts(replace(own, signed_sums=(None,) * 3))
    assert not own.contradicts(replace(own, signed_sums=turned, token_ids=own.token_ids[::-1]))
    near = tuple(one and tuple(1.1 * value for value in one) for one in own.signed_sums)
    assert not own.contradicts(replace(own, signed_sums=near))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("positions", [1, 9])
def test_a_model_of_few_positions_has_a_guard_of_as_many_tokens(family, positions, tmp_path):
    stock = tiny.stock_model(family, max_position_embeddings=positions)
    save(from_stock(stock, (2, 4)), tmp_path)
    model = load(tmp_path)
    assert model.guard_note == "the logits agree with the stored guard"
    assert model.guard is not None
    assert len(set(model.guard.token_ids)) == positions


def test_a_copy_in_host_memory_is_checked_once_and_a_file_at_every_load(folder, monkeypatch):
    read: list[int] = []
    sums = EarlyExitLM.logits_sums

    def counted(model, token_ids, layers):
        read.append(model.depth)
        return sums(model, token_ids, layers)

    monkeypatch.setattr(EarlyExitLM, "logits_sums", counted)
    model = load(folder, depth=2, host_copy=True)
    model.unload()
    model.grow(1)
    model.grow(2)
    assert read == [2]
    model.grow(4)
    assert read == [2, 4]
    model.shrink(1)
    model.grow(4)
    assert read == [2, 4]
    plain = load(folder)
    plain.unload()
    plain.grow(4)
    assert read == [2, 4, 4, 4]


def test_a_spoilt_copy_in_host_memory_is_noticed_whenever_it_is_reached(folder):
    resave(folder, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].normal_())
    model = load(folder, depth=2, host_copy=True)
    for _ in range(2):
        with pytest.raises(InputError, match="exit layer 4"):
            model.grow(4)


def test_a_folder_without_settings_gets_them_with_a_guard_at_its_first_load(folder):
    (folder / SETTINGS_FILE).unlink()
    model = load(folder, depth=2)
    assert model.exit_layers == (1, 2, 4)
    assert model.guard_note == f"the guard was stored in {SETTINGS_FILE}"
    sums = json.loads((folder / SETTINGS_FILE).read_text())["guard"]["logits_sums"]
    assert sums[0] > 0
    assert sums[1] > 0
    assert sums[2] is None
    model.grow(4)
    sums = json.loads((folder / SETTINGS_FILE).read_text())["guard"]["logits_sums"]
    assert sums[2] > 0
    assert load(folder).guard_note == "the logits agree with the stored guard"


def test_exits_of_one_load_do_not_become_the_checkpoints_own(folder):
    (folder / SETTINGS_FILE).unlink()
    assert load(folder, exits=(3, 4)).exit_layers == (3, 4)
    written = json.loads((folder / SETTINGS_FILE).read_text())
    assert (written["exit_layers"], written["exits_chosen"]) == ([1, 2, 4], True)
    assert None not in written["guard"]["logits_sums"]
    assert load(folder).exit_layers == (1, 2, 4)


def test_a_guard_that_grows_leaves_what_others_have_written_meanwhile(folder):
    (folder / SETTINGS_FILE).unlink()
    model = load(folder, depth=2)
    sure = Confidence("entropy", 0.75)
    update_settings(folder, confidence=sure)
    model.grow(4)
    settings = open_checkpoint(folder).settings
    assert settings is not None
    assert settings.confidence == sure
    assert settings.guard == model.guard
    assert None not in settings.guard.sums


def test_a_guard_of_exits_that_the_file_no_longer_has_is_not_stored(folder):
    edit(folder / SETTINGS_FILE, lambda s: s.update(guard=None))
    model = load(folder, depth=2)
    update_settings(folder, exit_layers=(3, 4), guard=None)
    model.grow(4)
    assert (
        model.guard_note
        == f"{SETTINGS_FILE} does not take the guard, which holds for this process alone"
    )
    assert load(folder).guard_note == f"the guard was stored in {SETTINGS_FILE}"


def test_settings_that_are_not_there_cannot_be_changed(folder):
    (folder / SETTINGS_FILE).unlink()
    with pytest.raises(InputError, match=r"no early_exit\.json to change"):
        update_settings(folder, tokenizer="bytes")


def test_the_guard_holds_in_sixteen_bits(folder):
    assert load(folder, dtype=torch.bfloat16).guard_note == "the logits agree with the stored guard"


def test_logits_beyond_a_type_are_refused_and_leave_the_guard_to_a_wider_one(folder):
    resave(folder, lambda tensors: tensors["lm_head.weight"].mul_(1e5))
    edit(folder / SETTINGS_FILE, lambda s: s.update(guard=None))
    with pytest.raises(InputError, match=r"exit layer 1 add up to inf in float16: .* too large"):
        load(folder, dtype=torch.float16)
    assert json.loads((folder / SETTINGS_FILE).read_text())["guard"] is None
    load(folder)
    assert load(folder).guard_note == "the logits agree with the stored guard"


def test_a_sum_that_is_no_number_is_none_that_weights_agree_with(folder):
    edit(folder / SETTINGS_FILE, lambda s: s["guard"]["logits_sums"].__setitem__(2, float("inf")))
    model = load(folder)
    assert model.guard_note == f"the guard was stored in {SETTINGS_FILE}"
    assert model.guard is not None
    (found,) = model.logits_sums(model.guard.token_ids, [4])
    assert found is not None
    assert model.guard.sums[2] == pytest.approx(found.magnitude)
    with torch.no_grad():
        model.backbone.head_weight.fill_(torch.inf)
    save(model, folder)
    assert json.loads((folder / SETTINGS_FILE).read_text())["guard"]["logits_sums"] == [None] * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_guard_made_in_sixteen_bits_holds_where_more_are_used(seed, tmp_path):
    stock = tiny.stock_model("llama", layers=12, seed=seed).to(torch.bfloat16)
    save(from_stock(stock, (3, 6, 12)), tmp_path)
    model = load(tmp_path, dtype=torch.float32)
    assert model.guard_note == "the logits agree with the stored guard"
    assert model.guard is not None
    assert model.guard.tolerance == pytest.approx(0.02)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_auxiliary_heads_come_from_their_own_file(family, tmp_path):
    stock = tiny.stock_model(family)
    heads = new_exit_heads(from_stock(stock, (1, 2, 4)).backbone, (1, 2, 4))
    with torch.no_grad():
        heads[1].head.weight.normal_()
        heads[2].norm.weight.mul_(2)
    made = from_stock(stock, (1, 2, 4), exit_heads=heads)
    save(made, tmp_path)
    names = {f"exit.{layer}.{name}" for layer in (1, 2) for name in ("norm.weight", "head.weight")}
    if family == "opt":
        names |= {"exit.1.norm.bias", "exit.2.norm.bias"}
    assert set(load_file(tmp_path / HEADS_FILE)) == names
    model = load(tmp_path, depth=2)
    hidden = torch.randn(3, 64)
    for level, layer in enumerate((1, 2)):
        with torch.no_grad():
            assert torch.equal(model.logits(hidden, level), heads[layer](hidden))
    assert model.spec.exit_head_params == sum(w.numel() for w in heads[1].parameters())
    head_bytes = 2 * 4 * model.spec.exit_head_params
    assert model.plan(2).exit_head_bytes == head_bytes
    with pytest.raises(InputError, match="has heads for"):
        load(tmp_path, exits=(1, 3, 4))
    resaved = load_file(tmp_path / HEADS_FILE)
    resaved.pop("exit.2.head.weight")
    save_file(resaved, tmp_path / HEADS_FILE)
    with pytest.raises(InputError, match=r"it misses 1 keys \(exit.2.head.weight\)") as caught:
        load(tmp_path)
    assert caught.value.where == str(tmp_path / HEADS_FILE)


@pytest.mark.parametrize("exits", [(2, 4), (1, 4), (4,)])
def test_some_of_the_exits_with_heads_are_compared_with_their_own_sums(exits, tmp_path):
    """A sum that is not known yet stays so where its exit was not asked for."""
    stock = tiny.stock_model("llama")
    heads = new_exit_heads(from_stock(stock, (1, 2, 4)).backbone, (1, 2, 4))
    with torch.no_grad():
        for head in heads.values():
            head.head.weight.normal_()
    save(from_stock(stock, (1, 2, 4), exit_heads=heads), tmp_path)
    sums = json.loads((tmp_path / SETTINGS_FILE).read_text())["guard"]["logits_sums"]
    assert load(tmp_path, exits=exits).guard_note == "the logits agree with the stored guard"
    edit(tmp_path / SETTINGS_FILE, lambda s: s["guard"].update(logits_sums=[None] * 3))
    load(tmp_path, exits=exits)
    found = json.loads((tmp_path / SETTINGS_FILE).read_text())["guard"]["logits_sums"]
    assert found == [
        one if layer in exits else None for layer, one in zip((1, 2, 4), sums, strict=True)
    ]
    load(tmp_path)
    assert json.loads((tmp_path / SETTINGS_FILE).read_text())["guard"]["logits_sums"] == sums


def test_missing_heads_are_named(folder):
    edit(folder / SETTINGS_FILE, lambda s: s.update(heads="auxiliary"))
    with pytest.raises(
        InputError, match=r'no such file, and heads .* set heads to "shared"'
    ) as caught:
        open_checkpoint(folder)
    assert caught.value.where == str(folder / HEADS_FILE)


def test_exits_default_to_a_quarter_half_and_all():
    assert default_exits(32) == (8, 16, 32)
    assert default_exits(2) == (1, 2)
    assert default_exits(1) == (1,)


def test_weights_may_be_read_by_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        save(from_stock(tiny.stock_model("opt")), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert modes == {0o640}


def test_the_draft_of_a_command_that_was_killed_is_no_checkpoint(tmp_path):
    save(from_stock(tiny.stock_model("opt"), name="a"), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / ".a.ab12cd34.partial")
    assert checkpoint_folders(tmp_path) == [tmp_path / "a"]
