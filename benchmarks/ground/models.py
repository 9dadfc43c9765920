"""The models of milabench's benchmarks, made without weights; and which loop trains which.

Source: benchmarks/huggingface/bench/{models,synth}.py and config/base.yaml of mila-iqia/milabench at dc0617d1.
Configurations that it takes from the hub (t5-small, openai/whisper-tiny) are transformers' defaults of their kinds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import nn

from . import loops

BERT, T5, REFORMER, WHISPER = "bert", "t5", "reformer", "whisper"
_TOKENS = {BERT: 512, T5: 1024, REFORMER: 4096}


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Parameters keep whatever their memory holds: nobody reads them, and pages nobody touched cost nothing."""
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        for name in ("normal_", "uniform_", "trunc_normal_"):
            if hasattr(torch.Tensor, name):
                stack.enter_context(mock.patch.object(torch.Tensor, name, lambda tensor, *_, **__: tensor))
        yield


def _hugging_face(name: str) -> nn.Module:
    import transformers

    kinds = {
        BERT: ("AutoModelForMaskedLM", transformers.BertConfig),
        T5: ("AutoModelForSeq2SeqLM", transformers.T5Config),
        REFORMER: ("AutoModelForMaskedLM", transformers.ReformerConfig),
        WHISPER: ("AutoModelForAudioClassification", transformers.WhisperConfig),
    }
    category, kind = kinds[name]
    config = kind()
    if name == REFORMER:
        config.num_buckets = 128
    with uninitialised():
        model: nn.Module = getattr(transformers, category).from_config(config)
    return model.train()


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    with uninitialised():
        model: nn.Module = getattr(models, name)()
    return model


def _timm(name: str) -> nn.Module:
    import timm

    with uninitialised():
        model: nn.Module = timm.create_model(name)
    return model


def _batch(name: str, n: int) -> loops.Batch:
    if name == WHISPER:
        return {"input_features": torch.empty(n, 80, 3000), "labels": torch.zeros(n, dtype=torch.int64)}
    tokens = torch.zeros(n, _TOKENS[name], dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens.clone()}


def _text(name: str, precision: str = "tf32-fp16") -> Callable[[int], loops.Steps]:
    return lambda n: loops.hugging_face(partial(_hugging_face, name), _batch(name, n), precision)


def _images(name: str, precision: str = "tf32-fp16", **options: bool) -> Callable[[int], loops.Steps]:
    return lambda n: loops.torchvision(partial(_torchvision, name), n, precision, **options)


BENCHMARKS: dict[str, Callable[[int], loops.Steps]] = {
    **{f"bert-{precision}": _text(BERT, precision) for precision in ("fp32", "tf32", "fp16", "tf32-fp16")},
    "t5": _text(T5),
    "reformer": _text(REFORMER),
    "whisper": _text(WHISPER),
    **{
        f"convnext_large-{precision}": _images("convnext_large", precision)
        for precision in ("fp32", "tf32", "fp16", "tf32-fp16")
    },
    "regnet_y_128gf": _images("regnet_y_128gf"),
    "resnet50": _images("resnet50", channels_last=True),
    "resnet50-noio": _images("resnet50", channels_last=True, fixed=True),
    "focalnet": lambda n: loops.timm(partial(_timm, "focalnet_base_lrf"), n),
}
LIGHTNING = "lightning"  # not a generator: lightning runs the loop
lightning_model = partial(_torchvision, "resnet152")
