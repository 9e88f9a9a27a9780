"""Decoding layer by layer over a pool gives the stock model's tokens, however it is batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.model.confidence import Confidence
from calibration.model.decode import Decoder, generate, kernels_of, paged_pool, slot_pool
from calibration.model.early_exit import EarlyExitLM, from_stock
from calibration.model.fused import Fusion
from calibration.model.kv import PoolExhausted
from helios_sim.errors import InputError
from tests.calibration import tiny

POOLS = ("slots", "paged")
LENGTHS = (5, 17, 9, 1)


def model_of(family: str, device: str = "cpu", exits=(1, 2, 4)) -> EarlyExitLM:
    stock = tiny.stock_model(family).to(tiny.need(device))
    return from_stock(stock, exits, name=family)


def decoder_of(model: EarlyExitLM, pool: str = "slots", rows: int = 6) -> Decoder:
    if pool == "slots":
        return Decoder(model, slot_pool(model, rows, 64))
    return Decoder(model, paged_pool(model, rows * 8, 8))


@pytest.mark.parametrize("device", tiny.DEVICES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_ragged_batch_gives_each_prompt_the_stock_tokens(family, pool, device):
    model = model_of(family, device)
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = [tiny.stock_tokens(model.backbone.model, ids, 20) for ids in prompts]
    decoder = decoder_of(model, pool)
    assert generate(decoder, prompts, 20) == expected
    assert [generate(decoder, [ids], 20)[0] for ids in prompts] == expected
    assert decoder.pool.num_rows == 0
    decoder.pool.check()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_truncated_model_answers_with_state_k_through_norm_and_head(family):
    model = model_of(family)
    ids = tiny.prompt(12)
    with torch.no_grad():
        states = model.backbone.forward_dense(torch.tensor([ids]))
        expected = model.backbone.head(model.backbone.final_norm(states[1][0, -1:]))
    model.shrink(2)
    decoder = decoder_of(model)
    hidden = decoder.extend([decoder.pool.admit()], [ids], [0])
    torch.testing.assert_close(hidden, states[1][0, -1:])
    torch.testing.assert_close(model.logits(hidden, model.depth_level), expected)
    # The stock forward of the truncated model is the same computation.
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone.model(torch.tensor([ids])).logits[0, -1:], expected
        )


@pytest.mark.parametrize("device", tiny.DEVICES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_in_chunks_leaves_what_the_whole_prompt_leaves(family, pool, device):
    model = model_of(family, device)
    ids, other = tiny.prompt(23), tiny.prompt(6, 1)
    whole, chunked = decoder_of(model, pool), decoder_of(model, pool)
    row = whole.pool.admit()
    expected = whole.extend([row], [ids], [0])
    rows = [chunked.pool.admit(), chunked.pool.admit()]
    chunked.extend(rows[1:], [other], [0])
    chunked.extend(rows[:1], [ids[:9]], [0])
    # A chunk beside another row's decode, then the rest.
    both = chunked.extend(rows, [ids[9:20], [7]], [9, 6])
    assert both.shape == (2, 64)
    found = chunked.extend(rows[:1], [ids[20:]], [20])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for layer in range(4):
        for ours, stock in zip(
            chunked.pool.read(layer, [0], 23), whole.pool.read(layer, [row], 23), strict=True
        ):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_tokens_fed_again_replace_what_was_skipped(pool):
    model = model_of("llama-gqa")
    ids = tiny.prompt(14)
    whole, refed = decoder_of(model, pool), decoder_of(model, pool)
    expected = whole.extend([whole.pool.admit()], [ids], [0])
    row = refed.pool.admit()
    refed.extend([row], [ids[:10]], [0])
    # Three tokens leave at exit 2 with nothing filled, then are fed again with the next one.
    for place in (10, 11, 12):
        hidden = refed.begin([row], [ids[place]], [place])
        refed.segment([row], hidden, [place], 0, 2)
    found = refed.extend([row], [ids[10:]], [10])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_segments_of_some_rows_leave_the_others_alone(pool):
    model = model_of("llama")
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((7, 12, 4))]
    decoder = decoder_of(model, pool)
    rows = [decoder.pool.admit() for _ in prompts]
    decoder.extend(rows, prompts, [0, 0, 0])
    positions = [7, 12, 4]
    start = decoder.begin(rows, [1, 2, 3], positions)
    middle = decoder.segment(rows, start, positions, 0, 2)
    untouched = [part.clone() for part in decoder.pool.read(3, [1], 12)]
    # Rows 2 and 0 go on in this order, row 1 has left.
    kept = [2, 0]
    end = decoder.segment(kept, middle[kept], [4, 7], 2, 4)
    for ours, before in zip(decoder.pool.read(3, [1], 12), untouched, strict=True):
        assert torch.equal(ours, before)
    alone = decoder_of(model, pool)
    for index, row in enumerate(kept):
        fresh = alone.pool.admit()
        alone.extend([fresh], [[*prompts[row], row + 1]], [0])
        expected = alone.extend([fresh], [[row + 1]], [positions[row]])
        torch.testing.assert_close(end[index : index + 1], expected, rtol=1e-4, atol=1e-5)
        alone.pool.release(fresh)


@pytest.mark.parametrize("device", tiny.DEVICES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_filling_leaves_the_keys_and_values_computed_by_hand(family, pool, device):
    model = model_of(family, device)
    decoder = decoder_of(model, pool)
    prompts = [tiny.prompt(6), tiny.prompt(9, 1)]
    rows = [decoder.pool.admit() for _ in prompts]
    decoder.extend(rows, prompts, [0, 0])
    positions = [6, 9]
    hidden = decoder.segment(rows, decoder.begin(rows, [5, 6], positions), positions, 0, 2)
    decoder.fill(rows, hidden, positions, 2, 4)
    backbone, shape = model.backbone, model.spec.shape
    for layer in (2, 3):
        stock = backbone.layers[layer]
        with torch.no_grad():
            if family.startswith("llama"):
                normed = stock.input_layernorm(hidden)
            else:
                before = stock.do_layer_norm_before
                normed = stock.self_attn_layer_norm(hidden) if before else hidden
            heads = (2, shape.kv_heads, shape.head_dim)
            value = stock.self_attn.v_proj(normed).view(heads)
            key = stock.self_attn.k_proj(normed).view(heads)
        if family.startswith("llama"):
            half = shape.head_dim // 2
            frequencies = 10000.0 ** (-torch.arange(half, device=hidden.device) / half)
            angles = torch.tensor(positions, device=hidden.device)[:, None] * frequencies
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            first, second = key[..., :half], key[..., half:]
            key = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        for index, (row, place) in enumerate(zip(rows, positions, strict=True)):
            kept_key, kept_value = decoder.pool.read(layer, [row], place + 1)
            torch.testing.assert_close(kept_key[0, :, place], key[index], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(kept_value[0, :, place], value[index])


def test_decoding_goes_on_after_a_row_was_released_and_another_moved():
    model = model_of("llama-gqa")
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 11, 8))]
    for pool in POOLS:
        decoder = decoder_of(model, pool)
        rows = [decoder.pool.admit() for _ in prompts]
        decoder.extend(rows, prompts, [0, 0, 0])
        assert decoder.pool.release(0) == 2
        decoder.pool.check()
        hidden = decoder.extend([0, 1], [[1], [2]], [8, 11])
        expected = decoder_of(model, pool)
        row = expected.pool.admit()
        alone = expected.extend([row], [[*prompts[2], 1]], [0])
        torch.testing.assert_close(hidden[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_a_place_that_was_known_is_found_anew_once_rows_exchange_their_numbers(pool):
    decoder = decoder_of(model_of("llama"), pool)
    for length in (9, 12):
        decoder.pool.admit(length)
    before = decoder.place([0], [8]).addresses_host.copy()
    assert decoder.place([0], [8]) is decoder.place([0], [8])
    decoder.pool.swap(0, 1)
    found = decoder.place([0], [8]).addresses_host
    assert (found == decoder.pool.addresses(np.array([0]), np.array([8]))).all()
    assert (found == before).all() == (pool == "slots")


def test_each_place_asks_of_the_tokens_that_truly_follow():
    decoder = decoder_of(model_of("llama"))
    decoder.pool.admit(9)
    for targets in ([5], [6], None):
        found = decoder.place([0], [8], targets=targets)
        assert decoder.place([0], [8], targets=targets) is found
        assert (None if found.targets is None else found.targets.tolist()) == targets


def test_a_row_longer_than_the_models_positions_is_refused():
    decoder = decoder_of(model_of("opt"))
    decoder.pool.admit()
    with pytest.raises(InputError, match="would hold 129 tokens; the model allows 128"):
        decoder.extend([0], [tiny.prompt(129)], [0])


def test_a_row_longer_than_its_slot_is_refused():
    decoder = decoder_of(model_of("opt"))
    decoder.pool.admit()
    with pytest.raises(PoolExhausted, match="65 tokens; the pool allows 64"):
        decoder.extend([0], [tiny.prompt(65)], [0])


@pytest.mark.parametrize(
    ("rows", "starts", "counts"),
    [([0, 0], [1, 1], None), ([0], [1, 2], None), ([], [], None), ([0], [1], [0])],
)
def test_rows_that_make_no_sense_are_refused(rows, starts, counts):
    decoder = decoder_of(model_of("llama"))
    decoder.pool.admit()
    with pytest.raises(ValueError, match="must be equally many"):
        decoder.place(rows, starts, counts)


def test_graphs_are_off_with_the_reason_without_a_gpu():
    decoder = decoder_of(model_of("llama"))
    assert not decoder.use_graphs()
    assert decoder.graphs_off_reason == "CUDA graphs need a CUDA GPU and the pool is on cpu"
    assert "slots are read in place" in decoder.choice.reason


def test_a_decoder_says_which_kernels_it_may_take_and_why():
    model = from_stock(tiny.stock_model("llama-gqa"), (1, 2, 4))
    decoder = Decoder(model, slot_pool(model, 2, 32))
    assert kernels_of(decoder) == {
        "fusion": "not usable: our kernels need a CUDA GPU and this is cpu",
        "flash": "not usable: prompts take it beside our kernels",
        "telling": "not usable: our kernels need a CUDA GPU and this is cpu",
        "varlen": "not usable: slots are read in place by SDPA",
    }
    decoder.fusion = Fusion(True, "ours passed", flash_reason="flash attention failed")
    model.confidence = Confidence("entropy", 0.5)
    found = kernels_of(decoder)
    assert found["fusion"] == "usable: ours passed"
    assert found["flash"] == "not usable: flash attention failed"
    assert found["telling"] == "not usable: the kernel says max-softmax, and confidence is entropy"
