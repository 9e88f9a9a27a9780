"""Our kernels do what the stock steps do, in few launches; here in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from calibration.measuring.floors import count_launches
from calibration.model import fused, launches
from calibration.model.confidence import Confidence, PiecewiseLinear
from calibration.model.decode import Decoder, generate, paged_pool, slot_pool
from calibration.model.early_exit import from_stock, load, save
from calibration.model.fused import Fusion, choose, self_test
from calibration.model.kv import KvDims
from calibration.model.launches import project, splits_for
from tests.calibration import tiny
from tests.calibration.test_graphs import FakeRecorder

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="compiled for the GPU that is here"
)
FUSIBLE = ("llama", "llama-gqa", "opt")
OURS = Fusion(True, "the test says so", 3)


def plain(query, keys, values, packed, scaling, wrong=0.0):
    """What torch's flash attention promises, row by row."""
    groups = query.shape[1] // keys.shape[1]
    ends, begins = packed.row_ends.tolist(), packed.begins.tolist()
    assert packed.row_ends.dtype == packed.begins.dtype == packed.lengths.dtype == torch.int32
    outputs = []
    for row, length in enumerate(packed.lengths.tolist()):
        new = query[ends[row] : ends[row + 1]]
        assert len(new) <= packed.longest_new and length <= packed.longest
        k, v = (
            kept[begins[row] : begins[row] + length].repeat_interleave(groups, 1)
            for kept in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", new.float(), k.float()) * scaling
        seen = torch.arange(length) <= torch.arange(length - len(new), length)[:, None]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v.float()).to(query.dtype) + wrong)
    return torch.cat(outputs)


WITH_FLASH = Fusion(True, "the test says so", 3, plain)


def dims(kv_heads: int, head_dim: int, dtype=torch.float32, device="cpu") -> KvDims:
    return KvDims(kv_heads, head_dim, dtype, torch.device(device))


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "is_paged", "dtype", "allowed"),
    [
        (2, 2, 16, False, torch.float16, 2e-3),
        (2, 2, 16, True, torch.float32, 1e-5),
        (6, 2, 24, False, torch.float32, 1e-5),
        (4, 1, 32, True, torch.float16, 2e-3),
    ],
)
def test_every_kernel_agrees_with_the_stock_steps(
    heads, kv_heads, head_dim, is_paged, dtype, allowed
):
    # A row whole, divided, and divided so often that some shares are empty.
    assert self_test(dims(kv_heads, head_dim, dtype), heads, is_paged, (1, 2, 8)) < allowed


@interpreted
def test_the_self_test_finds_a_kernel_that_reads_one_token_too_many(monkeypatch):
    right = launches.attend
    monkeypatch.setattr(
        launches,
        "attend",
        lambda query, keys, values, positions, *rest: right(
            query, keys, values, positions + 1, *rest
        ),
    )
    assert self_test(dims(1, 16), 1, False, (2,)) > fused.TOLERANCE


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("heads", [2, 8])
def test_what_attends_from_prompts_is_tested_too(heads, is_paged):
    assert fused.flash_self_test(plain, dims(2, 16), heads, is_paged) < 1e-5
    off = fused.flash_self_test(
        lambda *given: plain(*given, wrong=0.1), dims(2, 16), heads, is_paged
    )
    assert off > fused.TOLERANCE


@interpreted
@pytest.mark.parametrize("pool", ["slots", "paged"])
@pytest.mark.parametrize("family", [*FUSIBLE, "opt-post-norm"])
def test_prompts_whole_and_in_parts_through_them_leave_what_stock_layers_leave(family, pool):
    model = model_of(family)
    found = []
    for fusion in (Decoder(model, slot_pool(model, 3, 64)).fusion, WITH_FLASH):
        made = slot_pool(model, 3, 64) if pool == "slots" else paged_pool(model, 24, 8)
        decoder = Decoder(model, made)
        decoder.fusion = fusion
        rows = [decoder.pool.admit() for _ in range(3)]
        prompts = [tiny.prompt(length, seed) for seed, length in enumerate((21, 5, 12))]
        states = [decoder.extend(rows[:2], [prompts[0][:9], prompts[1]], [0, 0])]
        states.append(decoder.extend([rows[2], rows[0]], [prompts[2], prompts[0][9:]], [0, 9]))
        kept = [decoder.pool.read(layer, [0, 1, 2], 5) for layer in range(4)]
        found.append([*states, *(part for pair in kept for part in pair)])
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def model_of(family: str, tmp_path=None):
    """A tiny model; from a folder its layers' weights lie as loading lays them."""
    model = from_stock(tiny.stock_model(family), (1, 2, 4))
    if tmp_path is None:
        return model
    save(model, tmp_path / family)
    return load(tmp_path / family)


@interpreted
@pytest.mark.parametrize("pool", ["slots", "paged"])
@pytest.mark.parametrize("family", [*FUSIBLE, "opt-post-norm"])
def test_decoding_through_them_gives_the_stock_tokens(family, pool, tmp_path):
    model = model_of(family, tmp_path)
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 17))]
    expected = [tiny.stock_tokens(model.backbone.model, ids, 4) for ids in prompts]
    made = slot_pool(model, 3, 64) if pool == "slots" else paged_pool(model, 24, 8)
    decoder = Decoder(model, made)
    decoder.fusion = OURS
    assert generate(decoder, prompts, 4) == expected


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_a_head_says_is_what_torch_says_of_its_logits(dtype):
    assert fused.telling_self_test(torch.device("cpu"), dtype) < 1e-4


@interpreted
@pytest.mark.parametrize("maps", [{}, {"all": {2: PiecewiseLinear((0.02, 0.05), (0.1, 0.9))}}])
def test_a_model_says_the_same_through_it(maps, monkeypatch):
    model = model_of("llama")
    model.confidence = Confidence(maps=maps)
    logits = model.logits(torch.randn(3, 64), 1)
    targets = torch.tensor([5, 200, 0])
    stock = model.tell(logits, 1, targets)
    monkeypatch.setattr(fused, "choose_telling", lambda device, dtype: OURS)
    ours = model.tell(logits, 1, targets)
    torch.testing.assert_close(ours.double(), stock, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.tell(logits, 1)[0].double(), stock[0])


@interpreted
def test_knots_that_meet_in_32_bits_are_a_step():
    map_ = PiecewiseLinear((0.2, 0.99999999, 1.0), (0.1, 0.7, 0.9))
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 60.0]])
    found = launches.tell(logits, None, map_.on(logits.device))[1]
    torch.testing.assert_close(found, map_.of_tensor(logits.softmax(-1).amax(-1)))


@interpreted
def test_a_vocabulary_may_begin_with_tokens_that_are_ruled_out():
    logits = torch.randn(2, 4500)
    logits[:, :4096] = float("-inf")
    found = launches.tell(logits, None, None)
    torch.testing.assert_close(found[1], logits.softmax(-1).amax(-1))
    torch.testing.assert_close(found[2], -logits.log_softmax(-1).amax(-1))


@interpreted
@pytest.mark.parametrize("targeted", [True, False])
def test_a_graph_says_what_the_eager_path_says(targeted, monkeypatch):
    model = model_of("llama")
    model.confidence = Confidence(maps={"all": {2: PiecewiseLinear((0.02, 0.05), (0.1, 0.9))}})
    monkeypatch.setattr(fused, "choose_telling", lambda device, dtype: OURS)
    eager, captured = (Decoder(model, slot_pool(model, 3, 64)) for _ in range(2))
    recorder = FakeRecorder()
    assert captured.use_graphs((4,), recorder=recorder, targeted=targeted)
    assert captured.graphs.settings.exits == (1, 2, 4)
    targets = [7, 0, 255] if targeted else None
    said = []
    for decoder in (eager, captured):
        rows = [decoder.pool.admit() for _ in range(3)]
        place = decoder.place(rows, [0, 0, 0], targets=targets)
        hidden = decoder.embed(place, [3, 4, 5])
        said += [decoder.tell(place, hidden, level)[:, :3].clone() for level in range(3)]
    for ours, stock in zip(said[3:], said[:3], strict=True):
        torch.testing.assert_close(ours, stock)
    assert sum(recording.replays for recording in recorder.recordings) == 4
    # Of other tokens than its own kind it says nothing.
    unlike = captured.place([0], [0], targets=None if targeted else [7])
    assert captured.graphs.tell(unlike, captured.graphs.hidden[:1], 1) is None


def test_a_processor_says_it_in_torchs_steps():
    found = fused.choose_telling(torch.device("cpu"), torch.float32)
    assert found == Fusion(False, "our kernels need a CUDA GPU and this is cpu")


@interpreted
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_captured_they_give_the_same_tokens_from_one_bucket_of_contexts(family):
    model = model_of(family)
    prompts = [tiny.prompt(length, seed) for seed, length in enumerate((5, 17, 9))]
    expected = [tiny.stock_tokens(model.backbone.model, ids, 4) for ids in prompts]
    decoder = Decoder(model, slot_pool(model, 3, 600))
    decoder.fusion = OURS
    recorder = FakeRecorder()
    assert decoder.use_graphs((4,), recorder=recorder, on_demand=True)
    assert generate(decoder, prompts, 4) == expected
    assert decoder.graphs.settings.context_buckets == (600,)
    assert decoder.graphs.num_graphs == 3 and sum(r.replays for r in recorder.recordings) > 0


@interpreted
@pytest.mark.parametrize("family", FUSIBLE)
def test_filling_through_them_leaves_the_stock_keys_and_values(family):
    model = model_of(family)
    filled = []
    for fusion in (Decoder(model, slot_pool(model, 3, 64)).fusion, OURS):
        decoder = Decoder(model, slot_pool(model, 3, 64))
        decoder.fusion = fusion
        rows = [decoder.pool.admit(20) for _ in range(3)]
        hidden = decoder.begin(rows, [3, 4, 5], [19, 2, 7])
        decoder.fill(rows, hidden, [19, 2, 7], 1, 4)
        filled.append([*decoder.pool.keys, *decoder.pool.values])
    for ours, stock in zip(*filled, strict=True):
        torch.testing.assert_close(ours, stock)
    assert not filled[0][0].any() and all(store.any() for store in filled[0][1:4])


@interpreted
@pytest.mark.parametrize("family", FUSIBLE)
def test_states_that_are_not_ours_stay_as_they_are(family):
    model = model_of(family)
    decoder = Decoder(model, slot_pool(model, 2, 64))
    decoder.fusion = OURS
    rows = [decoder.pool.admit(9) for _ in range(2)]
    hidden = decoder.begin(rows, [3, 4], [0, 0])
    before = hidden.clone()
    decoder.run(decoder.place(rows, [0, 0]), hidden, 0, 4)
    assert torch.equal(hidden, before)


class Nothing:
    """A kernel that does nothing, since the interpreter's own copies would be counted."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


@pytest.mark.parametrize(("family", "wanted"), [("llama", 9), ("opt", 8)])
def test_a_layer_takes_few_launches(family, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "compiled", lambda: defaultdict(Nothing))
    model = model_of(family, tmp_path)
    norms = 0
    if family == "llama":
        # One launch each on a GPU; a processor's are many operators.
        for layer in model.backbone.layers:
            layer.input_layernorm = layer.post_attention_layernorm = torch.nn.Identity()
        norms = 2
    decoder = Decoder(model, slot_pool(model, 2, 64))
    # One processor is busy with a row that is not divided.
    decoder.fusion = replace(OURS, processors=1)
    row = decoder.pool.admit(9)
    hidden = decoder.begin([row], [3], [0])
    place = decoder.place([row], [0])
    decoder.run(place, hidden, 0, 1)
    one, two = (count_launches(lambda n=n: decoder.run(place, hidden, 0, n)) for n in (1, 2))
    assert two - one + norms == wanted


@pytest.mark.parametrize(
    ("rows", "kv_heads", "splits"),
    [
        (64, 12, 1),  # 768 programs are more than 264
        (1, 12, 16),  # 22 are wanted; powers of two alone
        (8, 8, 4),  # 5 are wanted
        (1, 1, 32),  # 264 are wanted, and 32 are the most
    ],
)
def test_rows_are_divided_until_the_device_is_busy(rows, kv_heads, splits):
    assert splits_for(rows, kv_heads, 132) == splits


def test_a_pool_of_short_rows_takes_the_launches_of_one_of_long_rows(monkeypatch):
    model = from_stock(tiny.stock_model("llama", max_position_embeddings=2048), (1, 2, 4))
    found = []
    monkeypatch.setattr(launches, "compiled", lambda: defaultdict(Nothing))
    launch = launches._launch

    def noted(kernel, grid, *arguments, **constants):
        found[-1].append((kernel.__name__, grid))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(launches, "_launch", noted)
    for max_tokens in (64, 2048):
        found.append([])
        decoder = Decoder(model, slot_pool(model, 2, max_tokens))
        decoder.fusion = replace(OURS, processors=132)
        assert decoder.use_graphs(recorder=FakeRecorder())
    assert found[0] == found[1]
    assert {"attend_kernel", "merge_kernel"} <= {name for name, _ in found[0]}


def test_kernels_compile_for_a_gpu_and_keep_to_its_registers(tmp_path):
    words = [sys.executable, "-m", "tests.calibration.compile_kernels"]
    changed = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        words, env=os.environ | changed, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = [line.split()[:4] for line in ran.stdout.splitlines()]
    assert len(found) == 24
    for name, registers, stack, shared in found:
        # What finds no register goes to memory, on a stack; 227 KiB are shared on a multiprocessor.
        assert int(stack) == 0, name
        assert int(registers) <= 168 and int(shared) <= 76 * 1024, name
        if name == "tell_kernel":
            # Only loads of 16 bytes are fetched ahead: that takes tiles of 16-bit logits.
            assert int(shared) >= (launches.TELL_STAGES - 1) * launches.TELL_BLOCK * 2


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt"])
def test_products_of_one_input_are_one_where_weights_lie_together(family, tmp_path):
    loaded = model_of(family, tmp_path).backbone.layers[1].self_attn
    apart = model_of(family).backbone.layers[1].self_attn
    hidden = torch.randn(3, 64)
    found = []
    for stock in (loaded, apart):
        modules = (stock.q_proj, stock.k_proj, stock.v_proj)
        counted = count_launches(lambda modules=modules: project(hidden, modules))
        assert counted == (1 if stock is loaded else 3)
        found.append(project(hidden, modules))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_processor_does_without_them():
    model = model_of("llama")
    assert choose(slot_pool(model, 2, 16), 4) == Fusion(
        False, "our kernels need a CUDA GPU and this is cpu"
    )


@pytest.mark.cuda
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 12, 64), (32, 8, 128)])
def test_on_a_gpu_they_are_compiled_and_agree(heads, kv_heads, head_dim, is_paged):
    tiny.need("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        where = dims(kv_heads, head_dim, dtype, "cuda")
        assert self_test(where, heads, is_paged) < fused.TOLERANCE
        flash = fused.find_flash()
        assert not isinstance(flash, str), flash
        assert fused.flash_self_test(flash, where, heads, is_paged) < fused.TOLERANCE
        assert fused.telling_self_test(where.device, dtype) < fused.TOLERANCE
