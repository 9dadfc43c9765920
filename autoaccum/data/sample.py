"""Infer a sample for a model, and change a sample's length.

The first batch rarely has the longest sequence, and memory follows the length.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import BatchError, UsageError
from ..torch_compat import ConvNd
from ..workload import Batch, Workload
from . import tree
from .collated import Collated, elements, is_cut_by_rows
from .entry_names import refuse_unknown
from .groups import Grouped
from .loaders import is_map_style
from .split import batch_size

INFERRED_SAMPLES = 2
LOADED_SAMPLES = 8  # as many as the test of exactness needs
INFERRED_TOKENS = 1024  # at most; a model's own context is often longer than its data


def with_sample(workload: Workload) -> tuple[Workload, str]:
    """Return the workload with a sample, and what was assumed.

    Without one it comes from the loader, or else from the model. Where a batch isn't cut along dimension 0, and there
    is a map-style loader, the sample becomes the samples of its dataset with its collate function. Arrays become
    tensors.

    Raises:
        UsageError: There is none, and none can be inferred.
    """
    floats, sample, text = float_type(workload.model), workload.sample, ""
    if sample is None or (not isinstance(sample, (Collated, Grouped)) and not _is_cut(workload)):
        batch, text = from_loader(workload)
        sample = batch if batch is not None else sample
    if sample is None:
        sample, text = infer_sample(workload.model)
    sample = tree.as_tensors(sample, floats)
    refuse_unknown(sample, shared=workload.shared, per_sample=workload.per_sample)
    return replace(workload, sample=sample), text


def _is_cut(workload: Workload) -> bool:
    """Return whether the sample is to be cut by rows."""
    if workload.largest is not None:
        return False
    try:
        batch_size(tree.as_tensors(workload.sample), shared=workload.shared, per_sample=workload.per_sample)
    except BatchError:
        return not is_map_style(workload.loader)
    return True


def from_loader(workload: Workload) -> tuple[Any, str]:
    """Return a batch of the loader's data, and which it is.

    None where it gives none. Random states are as before: nothing is drawn from the loader's own sampler.
    """
    loader: Any = workload.loader() if callable(workload.loader) else workload.loader
    with kept_random_states():
        if is_map_style(loader):
            return _of_dataset(workload, loader)
        if isinstance(loader, (DataLoader, list, tuple)):
            return next(iter(loader), None), "the loader's first batch"
    return None, ""  # an iterator, which would be one batch shorter afterwards


def _of_dataset(workload: Workload, loader: DataLoader[Any]) -> tuple[Any, str]:
    """Return a few samples of a loader's dataset, the largest first."""
    items, which = _items(workload, loader)
    collate = loader.collate_fn
    try:
        collate(items)
    except (RuntimeError, TypeError, ValueError, AssertionError):  # of several sizes, which it doesn't pad
        items, which = items[:1] * len(items), f"{which}, the largest of them"
    names = {"shared": workload.shared, "per_sample": workload.per_sample}
    if is_cut_by_rows(items, collate, lambda batch: batch_size(batch, **names)):
        return collate(items), f"{len(items)} {which}"
    return Collated(tuple(items), collate, float_type(workload.model)), f"{len(items)} {which}, by its collate_fn"


def _items(workload: Workload, loader: Any) -> tuple[list[Any], str]:
    """Return samples of the dataset, the largest first, and which they are."""
    count, lengths = len(loader.dataset), workload.lengths
    few = min(count, LOADED_SAMPLES)
    if lengths:
        longest = sorted(range(min(count, len(lengths))), key=lambda index: -lengths[index])[:few]
        return [loader.dataset[index] for index in longest], "longest samples of the loader's dataset"
    items = [loader.dataset[number * count // few] for number in range(few)]
    items.sort(key=lambda item: -elements(item))
    if workload.samples_per_group > 1:
        return _whole_groups(loader, workload.samples_per_group), "samples of the loader's dataset, in whole groups"
    if workload.largest is None:
        return items, "samples of the loader's dataset"
    return [
        loader.dataset[workload.largest],
        *items[: few - 1],
    ], f"samples of the loader's dataset, {workload.largest} first"


def _whole_groups(loader: Any, size: int) -> list[Any]:
    groups = max(1, len(loader.dataset) // size)
    few = min(groups, LOADED_SAMPLES)
    first = [number * groups // few * size for number in range(few)]
    return [loader.dataset[start + row] for start in first for row in range(size)]


def float_type(model: nn.Module) -> torch.dtype | None:
    """Return what floating-point arrays become for a model; None to keep them."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return None if torch.float64 in found or not found else torch.float32


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's random states at exit."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def infer_sample(model: nn.Module) -> tuple[Any, str]:
    """Return a small batch for a model, and what was assumed.

    Args:
        model: A module whose first leaf is a Linear, or a Hugging Face model with a configuration of a language model.

    Returns:
        The batch, and the assumption in words.

    Raises:
        UsageError: Its input can't be inferred; with the line to write.
    """
    config = getattr(model, "config", None)
    if _is_language_model(model, config):
        return _tokens(config)
    first = next((m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False))), None)
    if isinstance(first, nn.Linear):
        return _features(model, first)
    raise UsageError(
        f"{type(model).__name__} has no input that can be inferred: its first layer is {type(first).__name__}.",
        "The shape of a sample determines how much memory it needs, so it isn't guessed.",
        f"Give a small batch: fit_plan(model, {_line(first, config)}, target_batch=...)",
    )


def _is_language_model(model: nn.Module, config: Any) -> bool:
    """Return whether a model has a class per token.

    A causal or masked language model does. A vocabulary alone is no sign: an encoder has one and no loss, a classifier
    has one and a label per sample, an encoder-decoder has one and two sequences.
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
        INFERRED_TOKENS,
    )
    length = min(int(context), INFERRED_TOKENS)
    ids = _without_rng_changes(lambda: torch.randint(0, int(config.vocab_size), (INFERRED_SAMPLES, length)))
    assumed = f"{length} tokens a sample, labels for all: min(the model's context of {context}, {INFERRED_TOKENS})"
    return {"input_ids": ids, "labels": ids.clone()}, assumed


def _features(model: nn.Module, first: nn.Linear) -> tuple[Any, str]:
    inputs = _without_rng_changes(lambda: torch.randn(INFERRED_SAMPLES, first.in_features)).to(first.weight)
    last = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), first)
    classes = torch.zeros(INFERRED_SAMPLES, dtype=torch.long, device=inputs.device)
    assumed = f"{first.in_features} features a sample, from the first Linear; one of {last.out_features} classes"
    return (inputs, classes), assumed


def _without_rng_changes(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Create random data without changing the user's random state."""
    with torch.random.fork_rng(devices=[]):
        return make()


def positions(batch: Batch) -> int | None:
    """Return the length that a batch's sequences are padded to.

    It is the size of dimension 1 that its tensors agree on.

    Args:
        batch: A tree of tensors of shape (samples, length, ...). Integers, which tokens are, decide it where there are
            some; pictures and features don't.

    Returns:
        The length; None where it has no sequences, or of several lengths.
    """
    leaves = [leaf for _, leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() >= 2]
    integers = [leaf for leaf in leaves if not leaf.is_floating_point() and not leaf.is_complex()]
    found = Counter(leaf.shape[1] for leaf in integers or leaves)
    return next(iter(found)) if len(found) == 1 else None


def at_longest(workload: Workload) -> tuple[Batch, str]:
    """Lengthen a workload's sample to the longest of `lengths=`.

    Its own positions are repeated.

    Returns:
        The sample, and a note; empty where it is long enough, or `lengths=` was not given.

    Raises:
        UsageError: It is shorter, and which of its dimensions are the length is ambiguous.
    """
    sample, longest = workload.sample, max(workload.lengths or [0], default=0)
    if isinstance(sample, (Collated, Grouped)):  # of the longest samples already, or without lengths
        return sample, ""
    known = positions(sample)
    if longest <= (known or _largest(sample)):
        return sample, ""
    ambiguous = [path for path, leaf in tree.leaves(sample) if known is not None and _is_ambiguous(leaf, known)]
    if known is None or ambiguous:
        where = f"{ambiguous[0]} has that length twice" if ambiguous else "its tensors have several lengths"
        raise UsageError(
            f"The longest sample has {longest} positions by lengths=, the sample has {known or _largest(sample)}, and "
            f"{where}.",
            "Memory follows the length, so training must be planned at the longest.",
            f"Give a sample with {longest} positions: Workload(model, sample=..., lengths=...).",
        )
    note = f"The sample has {known} positions, the longest by lengths= has {longest}: planned at {longest}"
    return tree.map_leaves(sample, lambda _, leaf: _lengthened(leaf, known, longest)), f"{note}."


def shortened(sample: Batch, length: int) -> Batch:
    """Return the first positions of a sample."""
    known = positions(sample)
    return tree.map_leaves(sample, lambda _, leaf: leaf[:, :length] if _has(leaf, known) else leaf)


def _largest(batch: Batch) -> int:
    """Return the largest of all dimensions but the first."""
    shapes = [leaf.shape[1:] for _, leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor)]
    return max((size for shape in shapes for size in shape), default=0)


def _is_ambiguous(leaf: Any, length: int) -> bool:
    """Return whether a leaf has its length twice.

    A mask of pairs has, and so has a leaf with as many features.
    """
    return isinstance(leaf, torch.Tensor) and list(leaf.shape[1:]).count(length) > 1


def _lengthened(leaf: Any, length: int, longest: int) -> Any:
    return leaf[:, torch.arange(longest, device=leaf.device) % length] if _has(leaf, length) else leaf


def _has(leaf: Any, length: int | None) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and leaf.shape[1] == length
