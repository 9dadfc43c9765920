"""Compute losses over the representations of a whole window.

Contrastive losses, mined triplets, Dice, AUC.

Such a loss isn't a sum over micro-batches, so their gradients don't add up to its own. But it is a function of the
representations, and those can be made piece by piece:

    1. encode every micro-batch without gradients, and remember the random state that each began with
    2. the loss of all representations, and its gradient with respect to each
    3. encode every micro-batch again, from its random state, and backpropagate its representations' gradients

That is the whole batch's gradient, at the price of one more forward and of all representations at once. Without the
random states the second forward would drop out other units, and the gradient would be that of nothing.

Source: Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import split as cutting
from ..data import tree
from ..errors import UsageError
from ..ranks.representations import Met, drawing_alike
from ..state import snapshot
from ..state.closures import Holdings
from ..state.rng import put_rng, take_rng
from ..workload import Batch

Leaves = list[torch.Tensor]


@dataclass
class Cache:
    """What the first passes leave for the second ones.

    Attributes:
        loss: The window's loss, detached.
        gradients: For each micro-batch, those of its representations' tensors that have one, by place.
        states: The random states that each micro-batch's forward began with.
        after: Random states, buffers and attributes as the first passes left them.
    """

    loss: torch.Tensor
    gradients: list[dict[str, torch.Tensor]]
    states: list[dict[str, Any]]
    after: snapshot.Snapshot


def fill(
    model: nn.Module,
    encode: Callable[[Batch], Any],
    backward: Callable[[Any], torch.Tensor],
    pieces: Sequence[Batch],
    window_samples: int | None = None,
    held: Holdings | None = None,
    meet: Callable[[Any, int], Met] | None = None,
) -> Cache:
    """Encode every micro-batch, and compute the loss of all representations.

    Args:
        model: The model.
        encode: From a micro-batch to its representations, a tree of tensors with the samples in dimension 0; without
            gradients, or with some that nobody needs.
        backward: From the representations of all to their loss, backpropagated already; detached.
        pieces: The micro-batches.
        window_samples: Where planning runs a short window in place of a longer one: the samples of that one, of whose
            representations the loss is to be taken, for its memory's sake.
        held: What encoder and loss hold.
        meet: Brings these representations, and their number, together with those of other ranks.

    Raises:
        UsageError: The representations of two micro-batches can't be joined.
    """
    states, encoded = [], []
    for piece in pieces:
        states.append(take_rng())
        encoded.append(tree.map_leaves(encode(piece), _leaf))
    counts = [cutting.batch_size(each) for each in encoded]
    if meet is not None:
        with torch.no_grad():
            own = joined(encoded) if encoded else None
        met = meet(own, sum(counts))
        with drawing_alike(met.seed):
            loss = backward(met.together)
        gradients = _cut(met.gradients(), counts)
    else:
        if sum(counts) < (window_samples or 0):
            encoded = _stand_ins(encoded[0], window_samples or 0)
        loss = backward(joined(encoded))
        gradients = [_gradients(encoded[min(i, len(encoded) - 1)], count) for i, count in enumerate(counts)]
    return Cache(loss, gradients, states, snapshot.take(model=model, held=held, storages=False))


def joined(encoded: Sequence[Any]) -> Any:
    """Join the representations of micro-batches.

    Raises:
        UsageError: They differ in more than their samples.
    """
    together = cutting.join(encoded)
    if together is None:
        raise UsageError(
            "The representations of two micro-batches can't be joined: they differ in more than their samples.",
            "A loss over all of them needs tensors with the samples in dimension 0 and one shape for the rest.",
            "Let encode= return such tensors: pooled over the sequence, or padded to one length.",
        )
    return together


def _cut(gradients: dict[str, torch.Tensor], counts: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """Cut the gradients of all own representations into those of micro-batches."""
    parts = {path: torch.split(gradient, list(counts)) for path, gradient in gradients.items()}
    return [{path: part[i] for path, part in parts.items()} for i in range(len(counts))]


def _stand_ins(encoded: Any, samples: int) -> list[Any]:
    """Expand one micro-batch's representations to this many samples, in two pieces."""
    half = samples // 2
    return [cutting.tile(encoded, half), cutting.tile(encoded, samples - half)]


def repeat(cache: Cache, index: int, encode: Callable[[Batch], Any], piece: Batch) -> None:
    """Encode a micro-batch again identically, and backpropagate its representations' gradients."""
    put_rng(cache.states[index])
    gradients = cache.gradients[index]
    found = {path: leaf for path, leaf in tree.leaves(encode(piece)) if path in gradients}
    reached = [path for path, leaf in found.items() if leaf.requires_grad]
    if reached:
        torch.autograd.backward([found[path] for path in reached], [gradients[path] for path in reached])
    cache.gradients[index] = {}  # not needed any more


def _leaf(_: str, value: Any) -> Any:
    """Detach a representation from its encoder."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() or value.is_complex() else value


def _gradients(encoded: Any, count: int) -> dict[str, torch.Tensor]:
    """Return a micro-batch's representation gradients; a stand-in's first ones only."""
    leaves = [(path, leaf) for path, leaf in tree.leaves(encoded) if isinstance(leaf, torch.Tensor)]
    return {path: leaf.grad[:count] for path, leaf in leaves if leaf.grad is not None}
