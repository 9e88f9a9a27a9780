"""Tiny stock models with random weights, the same for the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

FAMILIES = ("llama", "llama-gqa", "opt", "opt-post-norm")
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.cuda),
)


def need(device: str) -> torch.device:
    """The device, or a skip that says why."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch finds none")
    return torch.device(device)


def config(family: str, layers: int = 4, **changes: Any) -> LlamaConfig | OPTConfig:
    """A tiny configuration of one of FAMILIES."""
    common: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.1,
        "init_std": 0.1,
    }
    if family.startswith("llama"):
        kv_heads = 2 if family == "llama-gqa" else 4
        settings = {**common, "intermediate_size": 128, "num_key_value_heads": kv_heads}
        return LlamaConfig(**{**settings, **changes})
    settings = {
        **common,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "do_layer_norm_before": family != "opt-post-norm",
    }
    return OPTConfig(**{**settings, **changes})


def stock_model(family: str, layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """A stock model in float32 on the CPU, ready to run."""
    torch.manual_seed(seed)
    made = config(family, layers, **changes)
    build: Any = LlamaForCausalLM if isinstance(made, LlamaConfig) else OPTForCausalLM
    model = build(made).eval()
    # Biases and norms start at constants, which would hide a forgotten one.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            del name
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


def stock_tokens(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    """What the stock `generate` makes greedily of a prompt, the prompt left out."""
    device = next(model.parameters()).device
    given = torch.tensor([ids], device=device)
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens
