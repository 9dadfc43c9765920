"""Add up a window's gradients over ranks: once, in place, and asynchronously.

Large gradients are summed where they are, small ones in one flat tensor of each dtype. What needs memory is made by
`prepare`, before the ranks say that they have their gradients: until then running out of memory is private to a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UsageError

SMALL_BYTES = 1 << 20

Tensors = list[torch.Tensor]


class Reduction:
    """Sums of the gradients of some parameters.

    Args:
        parameters: What the optimizer trains, in the same order on all ranks.
        buffers: What every rank takes from one: the first, or the first that trained the window in lanes.

    Attributes:
        missing: Places of the parameters that had no gradient here.
        reduced_elements: Elements of gradients that were reduced so far.
        source: The rank whose buffers all take.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor] = ()) -> None:
        self.parameters = list(parameters)
        self.large = [i for i, p in enumerate(self.parameters) if p.nbytes >= SMALL_BYTES and _is_dense(p)]
        large = set(self.large)
        groups: dict[torch.dtype, list[int]] = {}
        for i, parameter in enumerate(self.parameters):
            if i not in large:
                groups.setdefault(parameter.dtype, []).append(i)
        self.small = list(groups.values())
        by_kind: dict[tuple[torch.dtype, torch.device], Tensors] = {}
        for buffer in filter(_is_dense, buffers):
            by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        self.buffers = list(by_kind.values())
        self.missing: list[int] = []
        self._flat: Tensors = []
        self._flat_buffers: Tensors = []
        self.reduced_elements = self.source = 0

    def prepare(self, wide: Sequence[torch.Tensor]) -> None:
        """Make what is missing of the gradients, and the flat tensors.

        Args:
            wide: Parameters whose gradients add up in fp32.

        Raises:
            UsageError: A gradient is sparse.
        """
        in_fp32 = set(map(id, wide))
        self.missing = []
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                self.missing.append(i)
                _set_zero(parameter, wide=id(parameter) in in_fp32)
            elif parameter.grad.layout is not torch.strided:
                raise UsageError(
                    "A gradient is sparse.",
                    "Gradients are summed over ranks where they are, and sparse ones have other places on each.",
                    "Use nn.Embedding(..., sparse=False).",
                )
        for i in self.large:
            parameter = self.parameters[i]
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter, dtype=parameter.grad.dtype).copy_(parameter.grad)
        self._flat = [torch.cat([self._gradient(i).reshape(-1) for i in group]) for group in self.small]
        self._flat_buffers = [torch.cat([each.reshape(-1) for each in group]) for group in self.buffers]

    def run(self, wait: Callable[[Any], None]) -> None:
        """Replace gradients by their sums, and buffers by one rank's.

        Args:
            wait: Waits for a collective.
        """
        with torch.no_grad():
            works: list[Any] = [
                dist.all_reduce(_in_memory_order(self._gradient(i)), async_op=True) for i in reversed(self.large)
            ]
            works += [dist.all_reduce(flat, async_op=True) for flat in self._flat]
            works += [dist.broadcast(flat.view(torch.uint8), self.source, async_op=True) for flat in self._flat_buffers]
            for work in works:
                wait(work)
        self.reduced_elements += sum(self._gradient(i).numel() for i in self.large) + sum(
            flat.numel() for flat in self._flat
        )
        self.put_back()

    def put_back(self) -> None:
        """Copy the flat tensors' parts to where they belong."""
        with torch.no_grad():
            for group, flat in zip(self.small, self._flat, strict=True):
                gradients = [self._gradient(i) for i in group]
                _scatter(flat, gradients)
            for buffers, flat in zip(self.buffers, self._flat_buffers, strict=True):
                _scatter(flat, buffers)
        self.release()

    def drop(self) -> None:
        """Drop what gradients there are."""
        for parameter in self.parameters:
            parameter.grad = None

    def release(self) -> None:
        """Drop the flat tensors."""
        self._flat, self._flat_buffers = [], []

    def missing_everywhere(self, sum_over_ranks: Callable[[torch.Tensor], None]) -> list[int]:
        """Return the parameters that no rank had a gradient of."""
        there = torch.ones(len(self.parameters), dtype=torch.float64, device="cpu")
        there[self.missing] = 0
        sum_over_ranks(there)
        return [i for i, ranks in enumerate(there.tolist()) if not ranks]

    def _gradient(self, index: int) -> torch.Tensor:
        gradient = self.parameters[index].grad
        assert gradient is not None
        return gradient


def _scatter(flat: torch.Tensor, tensors: Tensors) -> None:
    for tensor, part in zip(tensors, torch.split(flat, [each.numel() for each in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _set_zero(parameter: torch.Tensor, *, wide: bool) -> None:
    """Give a parameter the gradient 0; in fp32 if it is wide."""
    if not wide:
        parameter.grad = torch.zeros_like(parameter)
    elif hasattr(parameter, "grad_dtype"):
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    else:  # before torch 2.11 only assigning a gradient checks its dtype
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.data = torch.zeros_like(parameter, dtype=torch.float32)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor fills its memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor as one dimension: collectives take contiguous ones only."""
    return tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
