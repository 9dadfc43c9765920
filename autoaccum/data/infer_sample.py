"""A sample for a model that tells its own input, where nobody gave one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..torch_compat import ConvNd

SAMPLES = 2
LONGEST = 1024


def infer_sample(model: nn.Module) -> tuple[Any, str]:
    """A small batch for `model`, and what was assumed to make it.

    Args:
        model: A module whose first leaf is a Linear, or a Hugging Face model with a configuration of a language model.

    Returns:
        The batch, and the assumption in words.

    Raises:
        UsageError: The model doesn't tell; with the line to write.
    """
    config = getattr(model, "config", None)
    if _is_language_model(model, config):
        return _tokens(config)
    first = next((m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False))), None)
    if isinstance(first, nn.Linear):
        return _features(model, first)
    raise UsageError(
        f"{type(model).__name__} doesn't tell what it is fed: its first layer is {type(first).__name__}.",
        "The shape of a sample decides how much memory it takes, so it isn't guessed.",
        f"Give a small batch: fit_plan(model, {_line(first, config)}, target_batch=...)",
    )


def _is_language_model(model: nn.Module, config: Any) -> bool:
    """Whether it takes `input_ids` and `labels` alike: a causal or masked language model, one class per token.

    A vocabulary alone doesn't tell: an encoder has one and no loss, a classifier has one and a label per sample, an
    encoder-decoder has one and two sequences.
    """
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or getattr(config, "is_encoder_decoder", False):
        return False
    try:
        taken = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    if not {"input_ids", "labels"} <= set(taken):
        return False
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and getattr(head, "out_features", vocabulary) >= vocabulary


def _line(first: nn.Module | None, config: Any) -> str:
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int):
        return f'{{"input_ids": torch.randint({vocabulary}, (2, length)), "labels": labels}}'
    if isinstance(first, ConvNd):
        sides = ", ".join(["224"] * len(first.kernel_size))
        return f"(torch.randn(2, {first.in_channels}, {sides}), torch.randint(classes, (2,)))"
    if isinstance(first, nn.Embedding):
        return f"(torch.randint({first.num_embeddings}, (2, length)), torch.randint(classes, (2, length)))"
    return "(inputs, classes)"


def _tokens(config: Any) -> tuple[Any, str]:
    context = next(
        (
            getattr(config, name)
            for name in ("max_position_embeddings", "n_positions", "n_ctx")
            if hasattr(config, name)
        ),
        LONGEST,
    )
    length = min(int(context), LONGEST)
    ids = _ours(lambda: torch.randint(0, int(config.vocab_size), (SAMPLES, length)))
    told = f"{length} tokens a sample, labels for all: min(the model's context of {context}, {LONGEST})"
    return {"input_ids": ids, "labels": ids.clone()}, told


def _features(model: nn.Module, first: nn.Linear) -> tuple[Any, str]:
    inputs = _ours(lambda: torch.randn(SAMPLES, first.in_features)).to(first.weight)
    last = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), first)
    classes = torch.zeros(SAMPLES, dtype=torch.long, device=inputs.device)
    told = f"{first.in_features} features a sample, from the first Linear; one of {last.out_features} classes"
    return (inputs, classes), told


def _ours(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Makes random data without moving the user's random state."""
    with torch.random.fork_rng(devices=[]):
        return make()
