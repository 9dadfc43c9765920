"""Build transformers' models from a configuration, without weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from .description import Description
from .images import SAMPLES, Made, not_installed

CAUSAL, MASKED, SEQ2SEQ, IMAGES, CLASSES = TASKS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)
_NAMES = ("torch_dtype", "dtype")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def make(description: Description) -> Made:
    """Create the configuration's model, and a sample for its task.

    Raises:
        UsageError: transformers has no such architecture, or its task is another.
    """
    try:
        import transformers
    except ImportError:
        raise not_installed("transformers", "--config") from None
    config = _config(description)
    task, name = _task(description, transformers)
    dtype = getattr(torch, _dtype(description))
    model = getattr(transformers, name)._from_config(config, dtype=dtype)
    sample, words, assumed = _sample(description, task, config, dtype)
    if description.checkpointing:
        _checkpoint(model)
    if description.lora is not None:
        model, adapters = _with_adapters(model, description.lora)
        assumed = (*assumed, adapters)
    return model, sample, words, assumed


def _config(description: Description) -> Any:
    """Return the configuration object.

    Raises:
        UsageError: transformers doesn't know the model's type, or refuses a value.
    """
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    kind = description.config["model_type"]
    if kind not in mapping:
        raise UsageError(
            f"transformers has no model type {kind!r}.",
            "Only architectures that are part of the installed transformers are built.",
            "Install a newer transformers, or write a workload: autoaccum plan --gpu NAME --workload FILE.py:FUNCTION",
        )
    try:
        config = mapping[kind].from_dict({k: v for k, v in description.config.items() if k not in _NAMES})
    except Exception as error:  # whatever its validation raises
        raise UsageError(f"{description.name} is refused by transformers: {error}.", hint="Mend the file.") from None
    config.use_cache = False  # as the Trainer sets it
    return config


def _task(description: Description, transformers: Any) -> tuple[str, str]:
    """Return the task, and the class that the configuration names for it."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = description.config["model_type"]
    named = description.config.get("architectures") or []
    known = {task: _classes(getattr(auto, task).get(kind)) for task in TASKS}
    for task, classes in known.items():
        if named and named[0] in classes and hasattr(transformers, named[0]):
            return task, named[0]
    possible = sorted({each for classes in known.values() for each in classes})
    raise UsageError(
        f"{description.name} names {named[0] if named else 'no architecture'}, whose loss is not known here.",
        "Causal, masked and sequence-to-sequence language models, and classifiers of images and texts are.",
        f'Write one of these into "architectures": {", ".join(possible)}.' if possible else
        "Write a workload: autoaccum plan --gpu NAME --workload FILE.py:FUNCTION",
    )  # fmt: skip


def _checkpoint(model: Any) -> None:
    """Compute activations again in backward, as the Trainer has it."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.24 on; the other name ends with 6
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _classes(found: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found or ())


def _dtype(description: Description) -> str:
    """Return the parameters' dtype: named, or the configuration's, as `from_pretrained` loads them."""
    if description.dtype is not None:
        return next(name for name, short in _DTYPES.items() if short == description.dtype)
    stored = next((description.config[name] for name in reversed(_NAMES) if description.config.get(name)), "float32")
    if stored not in _DTYPES:
        raise UsageError(f"{description.name} has the dtype {stored!r}.", hint="Name one: --dtype bf16")
    return str(stored)


def _sample(
    description: Description, task: str, config: Any, dtype: torch.dtype
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Return a sample, its size in words, and what was assumed."""
    if task == IMAGES:
        return _images(description, config, dtype)
    length = description.length
    if length is None:
        raise UsageError("--length is needed: memory follows it.", hint="Give the tokens of the longest sample.")
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise UsageError(f"--length {length} exceeds the model's {most} positions.", hint=f"Give at most {most}.")
    ids = torch.zeros(SAMPLES, length, dtype=torch.long, device="cpu")
    sample = {"input_ids": ids, "labels": ids if task != CLASSES else ids[:, 0].clone()}
    if not description.packed:
        sample["attention_mask"] = torch.ones_like(ids)
    if task == CLASSES and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0
    assumed = [] if description.packed else ["an attention mask, as of padded samples (--packed: none)"]
    if task == SEQ2SEQ:
        assumed.append(f"labels of {length:,} tokens")
    return sample, f"{length:,} tokens", tuple(assumed)


def _images(description: Description, config: Any, dtype: torch.dtype) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """Return images of the configuration's size, and classes."""
    if description.length is not None:
        raise UsageError("--length is for texts; this model takes images.", hint="Leave it out, or --image-size.")
    own = description.image_size or getattr(config, "image_size", None)
    sides = list(own) if isinstance(own, list | tuple) else [own or 224] * 2
    assumed = () if own else ("images of 224 x 224",)
    channels = getattr(config, "num_channels", 3)
    pixels = torch.zeros(SAMPLES, channels, *sides, dtype=dtype, device="cpu")
    labels = torch.zeros(SAMPLES, dtype=torch.long, device="cpu")
    return {"pixel_values": pixels, "labels": labels}, f"images of {sides[0]} x {sides[-1]}", assumed


def _with_adapters(model: Any, rank: int) -> tuple[nn.Module, str]:
    """Freeze a model, and add LoRA adapters to linear layers."""
    try:
        import peft
    except ImportError:
        raise not_installed("peft", "--lora") from None
    settings: Mapping[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return adapted, f"LoRA of rank {rank} on all linear layers"
