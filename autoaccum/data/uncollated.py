"""Recognize a list of samples that nobody has collated to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch

from ..errors import BatchError
from . import tree


def refuse_samples(batch: Any) -> None:
    """Refuse a list of samples.

    Each has a number of its own (a class) beside its tensors, whose dimension 0 isn't that of the samples: a list of
    a model's inputs, which is cut, has only tensors with rows.

    Raises:
        BatchError: It is one.
    """
    if type(batch) not in (list, tuple) or len(batch) < 2 or not all(map(_is_sample, batch)):
        return
    if len({(type(each), len(tree.leaves(each))) for each in batch}) > 1:
        return
    raise BatchError(
        f"The batch is a {type(batch).__name__} of {len(batch)} {type(batch[0]).__name__}s, each with tensors and a "
        "number: samples, it seems, that were not collated.",
        "Cut along dimension 0 of their tensors, each sample would be cut apart.",
        "Collate them: torch.utils.data.default_collate(samples); or give the Workload loader=, a DataLoader whose "
        "collate_fn makes each micro-batch.",
    )


def _is_sample(each: Any) -> bool:
    """Return whether it holds a number beside tensors with dimensions."""
    if not isinstance(each, (Mapping, tuple, list)):
        return False
    values = list(each.values() if isinstance(each, Mapping) else each)
    numbers = [v for v in values if isinstance(v, Number) or (isinstance(v, torch.Tensor) and not v.dim())]
    return bool(numbers) and any(isinstance(v, torch.Tensor) and v.dim() for v in values)
