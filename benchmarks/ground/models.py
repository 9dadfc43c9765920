"""milabench's models without weights, and the loop that trains each.

Source: benchmarks/huggingface/bench/{models,synth}.py and config/base.yaml of mila-iqia/milabench at dc0617d1.
Configurations that it takes from the hub (t5-small, openai/whisper-tiny) are transformers' defaults of their kinds.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import nn

from . import loops

BERT, T5, REFORMER, WHISPER = "bert", "t5", "reformer", "whisper"
TEXT = {BERT, T5, REFORMER, WHISPER}
_TOKENS = {BERT: 512, T5: 1024, REFORMER: 4096}


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Leave parameters uninitialised.

    Nobody reads them, and pages that nobody writes to use no memory.
    """
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        for name in ("normal_", "uniform_", "trunc_normal_"):
            if hasattr(torch.Tensor, name):
                stack.enter_context(mock.patch.object(torch.Tensor, name, lambda tensor, *_, **__: tensor))
        yield


def make_text_model(name: str) -> nn.Module:
    """One of transformers' (whisper is of audio), without weights."""
    import transformers

    kinds = {
        BERT: ("AutoModelForMaskedLM", transformers.BertConfig),
        T5: ("AutoModelForSeq2SeqLM", transformers.T5Config),
        REFORMER: ("AutoModelForMaskedLM", transformers.ReformerConfig),
        WHISPER: ("AutoModelForAudioClassification", transformers.WhisperConfig),
    }
    category, kind = kinds[name]
    config = kind()
    kept = {}  # as it was in transformers 4.49, which was measured
    if name == T5:
        config.decoder_start_token_id = 0
        kept["attn_implementation"] = "eager"  # its only attention there
    if name == REFORMER:
        config.num_buckets = 128
    if name == BERT:
        _answer_for_the_mask()
    with uninitialised():
        model: nn.Module = getattr(transformers, category).from_config(config, **kept)
    return model.train()


def _answer_for_the_mask() -> None:
    """Make BERT skip its attention mask on a virtual GPU.

    Transformers 4 makes the mask of ones, then asks the device whether all are; a virtual GPU reads 0, which
    means no.
    """
    from transformers.models.bert import modeling_bert

    def none_needed(mask: torch.Tensor, *_: object, **__: object) -> None:
        torch.all(mask == 1)

    if hasattr(modeling_bert, "_prepare_4d_attention_mask_for_sdpa"):
        modeling_bert._prepare_4d_attention_mask_for_sdpa = none_needed


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
    return lambda n: loops.hugging_face(partial(make_text_model, name), _batch(name, n), precision)


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


def missing_package(name: str) -> str | None:
    """Return why a benchmark can't run here, or None."""
    if name not in (*BENCHMARKS, LIGHTNING):
        return "unknown benchmark"
    wanted = {"focalnet": "timm", LIGHTNING: "lightning"}.get(name)
    if wanted is not None and importlib.util.find_spec(wanted) is None:
        return f"{wanted} is not installed"
    return None
