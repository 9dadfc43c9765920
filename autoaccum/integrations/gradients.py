"""Find the tensors that a loop's backward reaches, and their gradients.

A window's gradient must begin at nothing: what an aborted window left, or a backward before the loop, would be added to
it without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import UsageError


class LoopGradients:
    """The gradients that a loop's windows add up.

    Args:
        parameters: Tensors known to be trained; the first backward adds those that its loss reaches.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        self._tensors = {id(p): p for p in parameters if p.requires_grad}
        self._walked = False

    def begin_backward(self, loss: torch.Tensor) -> None:
        """Note what a loss reaches, once, before the first backward."""
        if not self._walked:
            self._walked = True
            self._tensors |= {id(leaf): leaf for leaf in leaves_of(loss)}

    def refuse_old(self) -> None:
        """Refuse gradients that were there before the window.

        Raises:
            UsageError: There are some that aren't 0.
        """
        old = [p for p in self._tensors.values() if p.grad is not None and bool(p.grad.any())]
        if old:
            raise UsageError(
                f"{len(old)} of {len(self._tensors)} tensors have a gradient before the window's first backward.",
                "It would be added to the window's: of a window that was broken off, or of a backward before it.",
                "Call optimizer.zero_grad() before the loop; add a penalty by window.backward(loss, extra=penalty).",
            )

    def keep_only(self, parameters: Sequence[torch.Tensor]) -> None:
        """Look after the optimizer's tensors only, once they are known.

        Raises:
            UsageError: The loss reaches none of them.
        """
        if self._tensors and not any(id(p) in self._tensors for p in parameters):
            raise UsageError(
                f"The optimizer has {len(parameters)} tensors, and the window's loss reaches none of them.",
                "It was made for another model, or before this one was copied, moved or wrapped.",
                "Make the optimizer of the model in the loop: torch.optim.AdamW(model.parameters()).",
            )
        self._tensors = {id(p): p for p in parameters}

    def drop(self) -> None:
        """Set all gradients to None."""
        for tensor in self._tensors.values():
            tensor.grad = None


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaf tensors that a loss's backward would reach."""
    found: dict[int, torch.Tensor] = {}
    pending: list[Any] = [loss.grad_fn]
    known: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in known:
            continue
        known.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            found[id(leaf)] = leaf
        pending.extend(function for function, _ in node.next_functions)
    return list(found.values())
