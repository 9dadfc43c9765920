"""Define the twenty models, each as a workload on the host.

The command line loads this file by its path, so its imports are absolute: `--workload benchmarks/on_gpu/models.py:mlp`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoaccum import Workload
from benchmarks import models as small
from benchmarks.on_gpu import nets
from benchmarks.truth_models import Mlp, UNet

GIB = 1 << 30


@dataclass(frozen=True)
class Model:
    """A model of the test.

    Attributes:
        make: Makes its workload, the model on the host; a function of this file.
        limit_gib: What torch's allocator may reserve, by memory fraction.
        target: Samples in an optimizer step: far more than fit.
        seconds: A guess of what planning and the truth take on an H100, to fit trials into the time that is left.
        is_compiled: Whether it is compiled, which needs a C compiler and Python's headers.
    """

    make: Callable[[], Workload]
    limit_gib: float
    target: int
    seconds: float = 40
    is_compiled: bool = False

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.limit_gib * GIB)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5)


def _fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


def _images(side: int = 224, classes: int = 1000, samples: int = 8) -> Any:
    chance = torch.Generator().manual_seed(0)
    return torch.randn(samples, 3, side, side, generator=chance), torch.randint(classes, (samples,), generator=chance)


def _ids(length: int, vocabulary: int, samples: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def _vision(name: str, **workload: Any) -> Workload:
    import torchvision

    return Workload(getattr(torchvision.models, name)(weights=None), _images(), **workload)


def resnet50_fp32() -> Workload:
    return _vision("resnet50", optimizer=_sgd)


def resnet50_bf16() -> Workload:
    return _vision("resnet50", optimizer=_sgd, precision="bf16")


def resnet50_channels_last() -> Workload:
    made = resnet50_bf16()
    made.model.to(memory_format=torch.channels_last)
    return made


def convnext_bf16() -> Workload:
    return _vision("convnext_tiny", optimizer=_fused, precision="bf16")


def vit_bf16() -> Workload:
    return _vision("vit_b_16", optimizer=_fused, precision="bf16")


def swin_fp16() -> Workload:
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    return _vision("swin_t", optimizer=_adamw, precision="fp16", scaler=scaler, clip_grad_norm=1.0)


def efficientnet_bf16() -> Workload:
    return _vision("efficientnet_b0", optimizer=_sgd, precision="bf16")


def regnet_fp32() -> Workload:
    return _vision("regnet_y_1_6gf", optimizer=_sgd)


def densenet_bf16() -> Workload:
    return _vision("densenet121", optimizer=_adamw, precision="bf16")


def unet_bf16() -> Workload:
    return Workload(UNet(), _images(256, classes=4), optimizer=_adamw, precision="bf16")


def lstm_fp32() -> Workload:
    ids = torch.randint(1000, (8, 128), generator=torch.Generator().manual_seed(0))
    return Workload(small.Recurrent(nn.LSTM, False), (ids, ids % 50), optimizer=_adamw)


def mlp_fp32() -> Workload:
    chance = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 32, 1024, generator=chance), torch.randint(100, (8,), generator=chance)
    return Workload(Mlp(), batch, optimizer=_sgd)


def _gpt2(**workload: Any) -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Workload(GPT2LMHeadModel(GPT2Config(n_positions=512)), _ids(512, 50257), **workload)


def gpt2_bf16() -> Workload:
    return _gpt2(optimizer=_fused, precision="bf16")


def gpt2_fp32_clipped() -> Workload:
    return _gpt2(optimizer=_adamw, clip_grad_norm=1.0)


def bert_fp32() -> Workload:
    from transformers import BertConfig, BertForMaskedLM

    return Workload(BertForMaskedLM(BertConfig()), _ids(256, 30522), optimizer=_adamw)


def t5_bf16() -> Workload:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=512, d_ff=1024, num_layers=8, num_heads=6, d_kv=64, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Workload(T5ForConditionalGeneration(config), _ids(256, 32128), optimizer=_fused, precision="bf16")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=18, num_attention_heads=16,
        max_position_embeddings=1024, use_cache=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def llama_bf16() -> Workload:
    return Workload(_llama(), _ids(1024, 32_000, samples=4), optimizer=_fused)


def llama_checkpointed() -> Workload:
    model: Any = _llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Workload(model, _ids(1024, 32_000, samples=4), optimizer=_fused)


def llama_compiled() -> Workload:
    made = llama_bf16()
    made.model.compile()
    return made


def lora_bf16() -> Workload:
    model = nets.add_low_rank(_llama(), ("q_proj", "v_proj"))
    return Workload(model, _ids(1024, 32_000, samples=4), optimizer=_adamw)


# In order of importance: where time runs short, the last ones are skipped.
MODELS: dict[str, Model] = {
    "llama-300m-bf16-compiled": Model(llama_compiled, 16, 64, seconds=110, is_compiled=True),
    "resnet50-fp32": Model(resnet50_fp32, 12, 1024, seconds=45),
    "gpt2-bf16": Model(gpt2_bf16, 16, 256, seconds=50),
    "llama-300m-bf16": Model(llama_bf16, 16, 64, seconds=60),
    "vit-b16-bf16": Model(vit_bf16, 12, 1024, seconds=45),
    "bert-fp32": Model(bert_fp32, 12, 512, seconds=45),
    "resnet50-bf16-channels-last": Model(resnet50_channels_last, 12, 1024),
    "lstm-fp32": Model(lstm_fp32, 8, 8192, seconds=45),
    "unet-bf16": Model(unet_bf16, 12, 1024, seconds=70),
    "llama-300m-bf16-checkpointed": Model(llama_checkpointed, 20, 256, seconds=70),
    "swin-t-fp16-scaler": Model(swin_fp16, 10, 1024, seconds=100),
    "convnext-t-bf16": Model(convnext_bf16, 12, 1024, seconds=95),
    "lora-llama-300m-bf16": Model(lora_bf16, 12, 64, seconds=60),
    "t5-bf16": Model(t5_bf16, 12, 512, seconds=70),
    "mlp-fp32": Model(mlp_fp32, 8, 16384),
    "regnet-fp32": Model(regnet_fp32, 10, 1024, seconds=50),
    "efficientnet-b0-bf16": Model(efficientnet_bf16, 8, 1024, seconds=50),
    "resnet50-bf16": Model(resnet50_bf16, 8, 1024),
    "gpt2-fp32-clipped": Model(gpt2_fp32_clipped, 16, 256),
    "densenet121-bf16": Model(densenet_bf16, 8, 1024, seconds=60),
}


@functools.cache
def made(name: str) -> Workload:
    """Make a workload once, always with the same parameters."""
    torch.manual_seed(0)
    return MODELS[name].make()


def on_device(name: str) -> Workload:
    """Move the model that `made` returns to the GPU."""
    work = made(name)
    work.model.cuda()
    return work
