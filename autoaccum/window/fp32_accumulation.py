"""Gradients that add up in fp32 where parameters are in half precision.

A bf16 sum stops growing when what is added is below a 256th of it: a thousand ones come to 256. So within a window of
several micro-batches such parameters get fp32 gradients, which are cast once, after clipping, for the optimizer. That
takes 4 bytes a parameter in place of 2 while micro-batches run, which the plan names; a workload that says
`accumulate="as_parameters"` does without.

`Tensor.grad_dtype` asks autograd for that. torch before 2.11 lacks it, and refuses to assign a gradient of another
dtype; there a hook exchanges the data of the gradient that the first micro-batch left, and autograd adds the later
ones to it in place, in fp32. The sum over micro-batches is the same. Within one micro-batch, autograd adds up the
gradients of a parameter that is used several times in fp32 with `grad_dtype`, in the parameter's dtype without: there
as in a plain backward of the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..torch_compat import is_traceable_wrapper_subclass

_HALF = (torch.bfloat16, torch.float16)
HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")

Parameters = Sequence[torch.Tensor]


def half_parameters(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return parameters whose gradients would sum in half precision.

    Without those whose gradients' dtype was chosen, and without sharded ones: FSDP2 adds their gradients up itself, in
    the parameters' dtype.
    """
    own = (p for p in parameters if p.requires_grad and p.dtype in _HALF and not is_traceable_wrapper_subclass(p))
    return [p for p in own if _dtype_of_gradients(p) == p.dtype]


def wide_parameters(parameters: Iterable[torch.Tensor], accumulate: str, steps: int) -> list[torch.Tensor]:
    """Return parameters whose gradients sum in fp32 in such a window."""
    return half_parameters(parameters) if steps > 1 and accumulate == "fp32" else []


def widening_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Return the extra bytes of fp32 gradients of half-precision parameters."""
    return sum(4 * p.numel() - p.nbytes for p in half_parameters(parameters))


@contextlib.contextmanager
def wide_gradients(parameters: Parameters) -> Iterator[None]:
    """Accumulates the gradients of these parameters in fp32 while it is entered.

    `narrow` casts them, after clipping; those that it hasn't cast by the end are dropped.

    Args:
        parameters: In half precision, without gradients.
    """
    with contextlib.ExitStack() as hooks:
        for parameter in parameters:
            parameter.grad = None  # also where it is zero: a gradient that is there has its dtype
            if HAS_GRAD_DTYPE:
                parameter.grad_dtype = torch.float32
            else:
                hooks.callback(parameter.register_post_accumulate_grad_hook(_widen).remove)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for parameter in parameters:
                if _dtype_of_gradients(parameter) != parameter.dtype:
                    _set(parameter, None)


def narrow(parameters: Parameters) -> None:
    """Convert gradients to the parameters' dtype, one at a time.

    The optimizer expects that; one at a time saves memory.
    """
    for parameter in parameters:
        _set(parameter, parameter.grad)


def _dtype_of_gradients(parameter: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that the next gradient will add up in."""
    if HAS_GRAD_DTYPE:
        return parameter.grad_dtype
    return parameter.dtype if parameter.grad is None else parameter.grad.dtype


def _widen(parameter: torch.Tensor) -> None:
    """Convert the first backward's gradient, to which later ones are added."""
    gradient = parameter.grad
    if gradient is not None and gradient.dtype == parameter.dtype:
        gradient.data = gradient.float()  # only assigning `parameter.grad` checks the dtype


def _set(parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
    parameter.grad = None  # the dtype can't be changed while there is one
    if HAS_GRAD_DTYPE:
        parameter.grad_dtype = parameter.dtype
    if gradient is not None:
        parameter.grad = gradient.to(parameter.dtype)
