"""List the operations that are cheaper to repeat than to keep.

Each takes one pass over its tensors, draws nothing and gives the same bits again: what it returned need not be kept
where its arguments are. Convolutions, matrix products, pooling and random draws are not among them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from .torch_internals import Signature, signature_of

CHEAP = frozenset(
    (
        "relu", "hardtanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "gelu", "elu", "leaky_relu",
        "softplus", "mish", "threshold", "clamp", "clamp_min", "clamp_max", "add", "sub", "rsub", "mul", "div", "neg",
        "square", "exp", "abs", "addcmul", "lerp", "where", "masked_fill", "_to_copy", "clone", "cat",
        "native_batch_norm", "native_layer_norm", "native_group_norm", "constant_pad_nd", "upsample_nearest2d",
    )
)  # fmt: skip
TRAINING_ARGUMENT = 5  # of native_batch_norm


class Operation(NamedTuple):
    """What is known of an operation.

    Attributes:
        repeat: Computes its result from the same arguments, without writing to them; None where that isn't cheap.
        write_over: Computes the same over its first argument; None where nothing does.
        written: The positions of the arguments that it writes to.
        written_names: The names of those that it takes by name.
    """

    repeat: Any
    write_over: Any
    written: tuple[int, ...]
    written_names: tuple[str, ...]

    @property
    def in_place(self) -> bool:
        """Whether its result is its first argument, written to."""
        return bool(self.written)


@cache
def operation_of(func: Any) -> Operation | None:
    """Return what is known of an operation.

    None where it is neither cheap nor writes.

    Args:
        func: What a dispatch mode sees: an overload of `torch.ops.aten`, or anything else that can be called.
    """
    signature = signature_of(func)
    if signature is None:
        return None
    repeat = _repeat(func, signature)
    if repeat is None and not signature.written and not signature.written_names:
        return None
    over = func if signature.written else _overload(f"{signature.name}_", signature)
    return Operation(repeat, over if repeat is not None else None, signature.written, signature.written_names)


def _repeat(func: Any, signature: Signature) -> Any:
    """Return what computes the same without writing, of cheap operations.

    Of one in place that is its namesake, which takes the same arguments.
    """
    name = signature.name
    if name in CHEAP and not signature.written and not signature.written_names:
        return func
    if name.removesuffix("_") in CHEAP and signature.written == (0,) and not signature.written_names:
        return _overload(name.removesuffix("_"), signature)
    return None


def _overload(name: str, signature: Signature) -> Any:
    """Return an operation that takes the same arguments, if any."""
    return getattr(getattr(torch.ops.aten, name, None), signature.overload or "default", None)


def can_repeat(operation: Operation, args: tuple[Any, ...]) -> bool:
    """Return whether a call has no effect but its result."""
    if operation.repeat is torch.ops.aten.native_batch_norm.default:
        return not args[TRAINING_ARGUMENT]
    return operation.repeat is not None
