"""Turn a target in tokens into samples.

A sample's tokens are read off the workload's sample: its longest, which memory is planned for.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..data import tree
from ..errors import UsageError
from ..workload import Batch, Workload
from .request import PlanRequest


def tokens_to_samples(request: PlanRequest, workload: Workload) -> tuple[PlanRequest, str]:
    """Return a request with its target in samples, and a note.

    Args:
        request: The request; without a target in tokens it comes back as it is.
        workload: The workload, with a sample.

    Raises:
        UsageError: A sample's tokens can't be read, or the target is less than one sample.
    """
    if request.target_tokens is None:
        return request, ""
    tokens = tokens_of(workload.sample)
    if tokens is None or workload.lengths:
        raise UsageError(
            f"A target of {request.target_tokens:,} tokens needs samples of one length.",
            "The samples of this workload have different ones."
            if tokens is not None
            else "Its sample has no tensor of whole numbers with a second dimension, like token ids.",
            "Give the target in samples: --target-batch 512.",
        )
    samples = round(request.target_tokens / tokens)
    if samples < 1:
        raise UsageError(
            f"A target of {request.target_tokens:,} tokens is less than half a sample of {tokens:,}.",
            hint=f"Give at least {tokens:,} tokens.",
        )
    rest = "" if samples * tokens == request.target_tokens else f", the nearest to {request.target_tokens:,}"
    note = f"{samples:,} samples of {tokens:,} tokens are {samples * tokens:,} tokens{rest}."
    return replace(request, target_batch=samples, target_tokens=None), note


def tokens_of(sample: Batch) -> int | None:
    """Return the tokens of one sample of a batch, or None."""
    whole = (torch.int64, torch.int32, torch.int16, torch.uint8)
    leaves = (leaf for _, leaf in tree.leaves(sample) if isinstance(leaf, torch.Tensor))
    lengths = [leaf.shape[1] for leaf in leaves if leaf.dtype in whole and leaf.dim() == 2]
    return max(lengths, default=None)
