"""Torch's paged attention is used only where it exists and agrees with SDPA."""

from __future__ import annotations

import pytest
import torch

from calibration.model import varlen
from calibration.model.decode import Decoder, generate, paged_pool, slot_pool
from calibration.model.early_exit import from_stock
from calibration.model.kv import KvDims, PagedPool
from calibration.model.varlen import Choice, choose, self_test
from tests.calibration import tiny

CPU = KvDims(2, 16, torch.float32, torch.device("cpu"))


def plain(
    query, key, value, ends, key_ends, longest, width, *, scale, window_size, enable_gqa,
    seqused_k, block_table, num_splits, wrong=0.0,
):  # fmt: skip
    """What `varlen_attn` promises, row by row."""
    assert (key_ends, window_size, num_splits) == (None, (-1, 0), 1)
    assert block_table.dtype == seqused_k.dtype == ends.dtype == torch.int32
    groups = query.shape[1] // key.shape[2]
    assert enable_gqa == (groups > 1)
    outputs = []
    for row, length in enumerate(seqused_k.tolist()):
        new = query[ends[row] : ends[row + 1]]
        k, v = (
            pages[block_table[row].long()].flatten(0, 1)[:length].repeat_interleave(groups, 1)
            for pages in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", new, k) * scale
        seen = torch.arange(length) <= torch.arange(length - len(new), length)[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v) + wrong)
    return torch.cat(outputs)


@pytest.mark.parametrize("heads", [2, 8])
def test_the_self_test_passes_what_is_right_and_fails_what_is_not(heads):
    assert self_test(plain, CPU, heads, 256) < 1e-5
    assert self_test(lambda *a, **k: plain(*a, **k, wrong=0.1), CPU, heads, 256) > 0.09


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt"])
def test_decoding_through_it_gives_the_same_tokens(family):
    model = from_stock(tiny.stock_model(family), (1, 2, 4))
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 17, 9))]
    expected = generate(Decoder(model, slot_pool(model, 3, 64)), prompts, 12)
    decoder = Decoder(model, paged_pool(model, 40, 8))
    decoder.choice = Choice(plain, "the test says so")
    assert generate(decoder, prompts, 12) == expected


def test_slots_are_read_by_sdpa():
    model = from_stock(tiny.stock_model("llama"))
    assert choose(slot_pool(model, 2, 16), 4) == Choice(None, "slots are read in place by SDPA")


def pool_of(block_tokens=256, dtype=torch.bfloat16, device="cuda"):
    """A paged pool that believes it is on a device."""
    pool = PagedPool(CPU, 1, 4, block_tokens)
    pool.dims = KvDims(2, 16, dtype, torch.device(device))
    return pool


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ({"device": "cpu"}, "needs a CUDA GPU and the pool is on cpu"),
        ({"dtype": torch.float32}, "needs a 16-bit type and the pool holds torch.float32"),
        ({"block_tokens": 16}, "multiples of 256 tokens and the pool has 16"),
    ],
)
def test_where_it_cannot_work_it_is_not_tried(pool, reason):
    def find():
        raise AssertionError("it was looked for")

    choice = choose(pool_of(**pool), 4, find)
    assert choice.varlen is None
    assert reason in choice.reason


def test_a_torch_without_it_or_with_an_older_one_is_said(monkeypatch):
    assert choose(pool_of(), 4, lambda: "torch 2.9 has no varlen_attn").reason == (
        "torch 2.9 has no varlen_attn"
    )

    class Old:
        @staticmethod
        def varlen_attn(query, key, value, *, scale, window_size, seqused_k):
            raise AssertionError

    monkeypatch.setattr(varlen.importlib, "import_module", lambda name: Old)
    assert "knows no block_table, enable_gqa, num_splits" in str(varlen.find_varlen())


def test_one_that_raises_or_is_wrong_is_not_used(monkeypatch):
    def raises(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(varlen, "self_test", lambda function, *rest: function())
    assert choose(pool_of(), 4, lambda: raises).reason == (
        "varlen_attn failed its self-test: no kernel"
    )
    choice = choose(pool_of(), 4, lambda: lambda: 0.5)
    assert (choice.varlen, choice.reason) == (
        None,
        "varlen_attn failed its self-test: it is off by 0.5",
    )
    assert choose(pool_of(), 4, lambda: lambda: float("nan")).varlen is None
    assert choose(pool_of(), 4, lambda: lambda: 1e-3).varlen is not None


@pytest.mark.cuda
def test_on_a_gpu_the_choice_is_made_by_the_self_test():
    device = tiny.need("cuda")
    pool = PagedPool(KvDims(2, 64, torch.bfloat16, device), 1, 4, 256)
    choice = choose(pool, 8)
    assert (choice.varlen is not None) == ("passed its self-test" in choice.reason)
