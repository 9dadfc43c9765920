"""A Llama of 7 billion parameters, for `autoaccum plan --gpu`.

It is far larger than the machine that plans it.

autoaccum plan --target-batch 512 --gpu h100-80gb --workload benchmarks/llama.py:bf16
autoaccum plan --target-batch 512 --gpu h100-80gb --workload benchmarks/llama.py:fp32
"""

from __future__ import annotations

import torch

from autoaccum import Workload

TOKENS = 512


def bf16() -> Workload:
    """Parameters in bf16, AdamW."""
    return _workload(torch.bfloat16, None)


def fp32() -> Workload:
    """Parameters in fp32, autocast to bf16, AdamW: 16 bytes a parameter."""
    return _workload(torch.float32, "bf16")


def _workload(dtype: torch.dtype, precision: str | None) -> Workload:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    ids = torch.zeros(2, TOKENS, dtype=torch.long)
    return Workload(model, {"input_ids": ids, "labels": ids}, precision=precision)
