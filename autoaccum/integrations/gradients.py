"""Find the tensors that a loop's backward reaches, and their gradients.

A window's gradient must begin at nothing: what an aborted window left, or a backward before the loop, would be added to
it without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import UsageError
from ..torch_compat import write_count


class LoopGradients:
    """The gradients that a loop's windows add up.

    Args:
        parameters: Tensors known to be trained; the first backward adds those that its loss reaches.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        self._tensors = {id(p): p for p in parameters if p.requires_grad}
        self._walked = False
        self._noted: tuple[torch.Tensor, int, int] | None = None  # one that has a gradient, and both versions

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
        self._noted = None
        old = [p for p in self._tensors.values() if p.grad is not None and bool(p.grad.any())]
        if old:
            raise UsageError(
                f"{len(old)} of {len(self._tensors)} tensors have a gradient before the window's first backward.",
                "It would be added to the window's: of a window that was broken off, or of a backward before it.",
                "Call optimizer.zero_grad() before the loop; add a penalty by window.backward(loss, extra=penalty).",
            )

    def note(self) -> None:
        """Note a tensor and its gradient as a backward left them."""
        found = next((p for p in self._tensors.values() if p.grad is not None), None)
        self._noted = None if found is None else (found, write_count(found), _version_of(found.grad))

    def forget(self) -> None:
        """Forget what was noted, once the window has ended."""
        self._noted = None

    def refuse_changed(self) -> None:
        """Refuse what loops do between two backwards, and a window must not.

        Raises:
            UsageError: An optimizer stepped, or gradients were cleared, since the last `note`.
        """
        if self._noted is None:
            return
        tensor, version, gradients = self._noted
        if write_count(tensor) != version:
            raise UsageError(
                "A parameter was changed between two micro-batches of a window.",
                "An optimizer that steps there has a part of the gradient, and the rest is of other parameters.",
                "Take optimizer.step() out of the loop: window.step(optimizer) after it steps once.",
            )
        cleared = tensor.grad is None or (_version_of(tensor.grad) != gradients and not bool(tensor.grad.any()))
        if cleared:
            raise UsageError(
                "The gradients of a window's micro-batches were cleared in the middle of it.",
                "What the micro-batches before had added would be missing.",
                "Take optimizer.zero_grad() out of the loop: window.step(optimizer) clears them after its step.",
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
        self._noted = None
        for tensor in self._tensors.values():
            tensor.grad = None


def _version_of(gradient: torch.Tensor | None) -> int:
    return -1 if gradient is None else write_count(gradient)


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
