"""Run passes without randomness: dropout off, other draws at their expectation.

Gradients of parts and of a whole are comparable only with equal draws: each draw becomes one constant for every
element. Calls of class losses are recorded too, since they show what the loss averages over.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..torch_compat import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_ATTENTION = "scaled_dot_product_attention"
_SCALED_DOT_PRODUCT_ATTENTION = F.scaled_dot_product_attention
_SEEDED = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class ClassLoss:
    """Hold a call of cross-entropy or NLL with integer classes.

    Attributes:
        targets: The classes it was given.
        ignore_index: The class that it leaves out.
        weights: A weight for each class, or None.
        averages: Whether the result is a mean.
        path: The leaf of the batch that holds the classes; None if unknown.
    """

    targets: torch.Tensor
    ignore_index: int
    weights: torch.Tensor | None
    averages: bool
    path: str | None = None


@dataclass
class RandomOps:
    """Hold the random operators and class losses seen in a pass.

    Attributes:
        replaced: Names of the random draws that a constant stood in for.
        kept: Names of those that could not be replaced, and drew.
        class_losses: The calls of cross-entropy, in order.
    """

    replaced: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    class_losses: list[ClassLoss] = field(default_factory=list)


@contextmanager
def without_randomness() -> Iterator[RandomOps]:
    """Replace random draws and dropout until exit."""
    draws = RandomOps()
    with ExitStack() as stack:
        stack.enter_context(_Constants(draws))
        stack.enter_context(_dropout_replaced(draws))
        stack.enter_context(_Functions(draws))
        yield draws


@contextmanager
def _dropout_replaced(draws: RandomOps) -> Iterator[None]:
    """Replace torch.nn.functional's dropouts by name until exit.

    Checkpointing computes forwards again inside a backward, where modes of functions are off: a dropout that draws
    there saves other tensors than the first pass, and checkpointing refuses that.
    """
    before = {name: getattr(F, name) for name in (*(each.__name__ for each in _DROPOUTS), _ATTENTION)}

    def without(function: Callable[..., Any]) -> Callable[..., Any]:
        def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
            if training and p > 0:
                draws.replaced.add("dropout")
            return function(input, p, False, inplace)

        return dropout

    def attention(*args: Any, **kwargs: Any) -> Any:
        return before[_ATTENTION](*args, **_attending_to_all(draws, kwargs))

    try:
        for name, function in before.items():
            setattr(F, name, attention if name == _ATTENTION else without(function))
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _attending_to_all(draws: RandomOps, keywords: dict[str, Any]) -> dict[str, Any]:
    if not keywords.get("dropout_p"):
        return keywords
    draws.replaced.add("dropout")
    return {**keywords, "dropout_p": 0.0}


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute single precision in full until exit.

    A GPU's convolutions round their inputs to TF32 (cuDNN's default in PyTorch), to 10 bits of 23: of values that
    differ in their last bit, as those of another micro-batch do, some are then rounded apart.
    """
    cudnn, precision, allowed = torch.backends.cudnn, None, None
    with suppress(RuntimeError):  # set by fp32_precision, torch 2.9's other way: it stays
        precision, allowed = torch.get_float32_matmul_precision(), cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
    try:
        yield
    finally:
        with suppress(RuntimeError):
            if precision is not None and allowed is not None:
                torch.set_float32_matmul_precision(precision)
                cudnn.allow_tf32 = allowed


class _Functions(TorchFunctionMode):
    """Intercept functions of torch.nn.functional before dispatch."""

    def __init__(self, draws: RandomOps) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._without_dropout(func, *args, **kwargs)
        if func is _SCALED_DOT_PRODUCT_ATTENTION:
            kwargs = _attending_to_all(self.draws, kwargs)
        if func in (F.cross_entropy, F.nll_loss):
            self._note(*args, **kwargs)
        return func(*args, **kwargs)

    def _without_dropout(
        self,
        func: Callable[..., Any],
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        if training and p > 0:
            self.draws.replaced.add("dropout")
        return func(input, p, False, inplace)  # type: ignore[no-any-return]

    def _note(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        if not target.is_floating_point() and _has_storage(target):
            self.draws.class_losses.append(ClassLoss(target.detach(), ignore_index, weight, reduction == "mean"))


class _Constants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercept random operators at dispatch, also those inside attention or LSTMs."""

    def __init__(self, draws: RandomOps) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = draws

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _SEEDED not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        before = torch.default_generator.get_state()
        out = func(*args, **kwargs)
        if torch.equal(before, torch.default_generator.get_state()) and _on_cpu(out):
            return out  # an attention kernel without dropout
        constant = _expectation(name, args, kwargs)
        if constant is None:
            self.draws.kept.add(name)
            return out
        self.draws.replaced.add("dropout" if name.startswith("bernoulli") else name)
        return constant(out)


def _has_storage(tensor: torch.Tensor) -> bool:
    """Return whether a tensor can be read later; not inside torch.func's transforms."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return False
    return True


def _on_cpu(out: Any) -> bool:
    return not isinstance(out, torch.Tensor) or out.device.type == "cpu"


def _expectation(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], Any] | None:
    """Return what replaces a draw: the same value for every element."""
    if name == "randperm":  # reversed for every batch: an identity would hide the mixing
        return lambda out: out.copy_(torch.arange(len(out) - 1, -1, -1, device=out.device))
    if name == "bernoulli":
        p = args[1] if len(args) > 1 else args[0]
        return lambda out: out.copy_(p) if isinstance(p, torch.Tensor) else out.fill_(p)
    if name == "bernoulli_":
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        return lambda out: out.copy_(p) if isinstance(p, torch.Tensor) else out.fill_(p)
    if name.startswith("randint"):
        bounds = [value for value in args if isinstance(value, int)][:2]
        middle = sum(bounds) // 2 if bounds else 0
        return lambda out: out.fill_(middle)
    if name in ("rand", "rand_like", "uniform_"):
        low, high = (*args[1:3], *(0.0, 1.0)[len(args[1:3]) :]) if name == "uniform_" else (0.0, 1.0)
        return lambda out: out.fill_((low + high) / 2)
    if name in ("randn", "randn_like", "normal_", "normal"):
        numbers = [value for value in args[:2] if isinstance(value, (int, float))] if name.startswith("normal") else []
        mean = numbers[0] if numbers else 0.0
        return lambda out: out.fill_(mean)
    if name == "exponential_":
        return lambda out: out.fill_(1.0)
    return None
