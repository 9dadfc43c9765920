"""Turn a criterion for `(input, target)` into a loss.

torch's criteria average over something that their class and their arguments determine: labels that aren't ignored, each
with its class's weight; elements; or samples. So a window's micro-batches are weighted by that, and no test is needed
to find it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .errors import UsageError
from .torch_compat import Loss

_OF_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_ELEMENTS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.KLDivLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss, nn.SoftMarginLoss,
)  # fmt: skip
_NOT_OF_PAIRS = (
    nn.CTCLoss, nn.GaussianNLLLoss, nn.CosineEmbeddingLoss, nn.MarginRankingLoss, nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
)  # fmt: skip
_MODELS = frozenset({"model", "module", "net", "network", "m", "student"})
_TARGETS = frozenset({"target", "targets", "label", "labels", "y", "y_true", "truth", "ground_truth", "gt", "true"})


class Criterion:
    """Compute a criterion's loss of a model on an `(input, target)` batch.

    Args:
        criterion: The criterion: a module or a function of the model's output and the target.

    Attributes:
        adds_up: Whether it is a sum over the batch (`reduction="sum"`), so that micro-batches add up unweighted.
        count: `count(batch)`, what its mean is divided by; None where that is the samples.
        average: What that is, in a plan's word: "samples", "classes" that aren't ignored (-100), or else "count=".
    """

    def __init__(self, criterion: Callable[[Any, Any], Any]) -> None:
        self.criterion = criterion
        self.__qualname__ = getattr(criterion, "__qualname__", type(criterion).__qualname__)  # in a plan's fingerprint
        reduction = getattr(criterion, "reduction", "mean")
        self.adds_up = reduction == "sum"
        self.count: Callable[[Any], Any] | None = None
        self.average = "samples"
        if reduction == "mean" and isinstance(criterion, _OF_CLASSES):
            plain = criterion.ignore_index == -100 and criterion.weight is None
            self.count, self.average = self._count_classes, "classes" if plain else "count="
        elif reduction == "mean" and isinstance(criterion, _OF_ELEMENTS):
            self.count = _count_elements

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss of a batch."""
        inputs, target = _pair_of(batch, self.criterion)
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
        if not isinstance(output, torch.Tensor) and isinstance(getattr(output, "logits", None), torch.Tensor):
            output = output.logits
        return self.criterion(output, target)

    def _count_classes(self, batch: Any) -> Any:
        """Return the denominator of a mean over classes.

        torch's documentation of CrossEntropyLoss has it: the weights of the classes that aren't ignored; with
        probabilities as targets, their number without the dimension of the classes.
        """
        target = batch[1]
        if target.is_floating_point():
            return target.numel() / target.shape[1 if target.dim() > 1 else 0]
        kept = target != self.criterion.ignore_index  # type: ignore[attr-defined]
        weight = self.criterion.weight  # type: ignore[attr-defined]
        return kept.sum() if weight is None else weight.to(target.device)[target[kept]].sum()


def as_loss(given: Any) -> Any:
    """Return a loss of a model and a batch for a criterion.

    Raises:
        UsageError: It can't be one: a class, a name, one without a reduction or for more than two arguments.
    """
    if given is None or isinstance(given, Criterion):
        return given
    found = _module_of(given)
    _refuse(found)
    if isinstance(found, Loss) or _takes_a_pair(found):
        if getattr(found, "reduction", "mean") == "none":
            raise UsageError(
                f"{_name(found)} has reduction='none': one loss for each element, not a scalar.",
                hint="Use reduction='mean'; or return what you make of them: loss=lambda model, batch: ...",
            )
        return Criterion(found)
    return given


def check_loss(given: Any, sample: Any) -> None:
    """Refuse what is no loss for the sample.

    Raises:
        UsageError: With what to write.
    """
    loss = as_loss(given)
    if isinstance(loss, Criterion) and isinstance(sample, (tuple, list, Mapping, torch.Tensor)):
        _pair_of(sample, loss.criterion)


def _module_of(given: Any) -> Any:
    """Return the criterion of a function of torch.nn.functional."""
    if isinstance(given, functools.partial) and not given.args and given.func in _OF_FUNCTIONS:
        return _OF_FUNCTIONS[given.func](**given.keywords)
    if inspect.isroutine(given) and given in _OF_FUNCTIONS:
        return _OF_FUNCTIONS[given]()
    return given


def _refuse(given: Any) -> None:
    if isinstance(given, str):
        raise UsageError(
            f"loss is {given!r}, a name.", hint="Give the loss: loss=torch.nn.CrossEntropyLoss(), or a function."
        )
    if isinstance(given, type):
        raise UsageError(f"loss is the class {given.__name__}.", hint=f"Call it: loss={given.__name__}().")
    if not callable(given):
        raise UsageError(
            f"loss is of type {type(given).__name__}, which cannot be called.",
            hint="Give a criterion, torch.nn.CrossEntropyLoss(), or a function: loss=lambda model, batch: ...",
        )
    if isinstance(given, _NOT_OF_PAIRS):
        raise UsageError(
            f"{_name(given)} takes more than an output and a target.",
            "What it is to be given follows from your batch.",
            "Write it: loss=lambda model, batch: criterion(model(batch[0]), batch[1], ...).",
        )
    required = [] if isinstance(given, nn.Module) else _required(given)
    if len(required) > 2:
        raise UsageError(
            f"loss takes {len(required)} arguments ({', '.join(required)}), and is called with two.",
            "A loss gets the model and the whole batch; a criterion the model's output and the target.",
            "Take the batch apart within it: loss=lambda model, batch: criterion(model(batch[0]), batch[1]).",
        )


def _required(function: Any) -> list[str]:
    """Return the names of the positional parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in parameters if each.kind in kinds and each.default is inspect.Parameter.empty]


def _takes_a_pair(function: Any) -> bool:
    """Return whether a callable is called with an output and a target.

    By the names of its parameters. A module is no `loss(model, batch)` unless its first parameter is a model's name.
    """
    inner = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(inner).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [each.name.lower() for each in parameters if each.kind in kinds]
    if len(names) < 2 or names[0] in _MODELS:
        return False
    return names[1] in _TARGETS


def _pair_of(batch: Any, criterion: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    keys = [repr(key) for key in batch] if isinstance(batch, Mapping) else []
    example = [f"batch[{key}]" for key in [*keys[:1], *keys[-1:]]] if len(keys) > 1 else ["batch[0]", "batch[-1]"]
    what = f"a {type(batch).__name__} of {', '.join(keys) if keys else _length(batch)}"
    raise UsageError(
        f"loss={_name(criterion)} is for batches of (input, target), and the batch is {what}.",
        "Which part goes to the model, and which to the criterion, isn't guessed.",
        f"Write it: loss=lambda model, batch: criterion(model({example[0]}), {example[1]}).",
    )


def _length(batch: Any) -> str:
    return f"{len(batch)}" if isinstance(batch, (tuple, list)) else "another form"


def _name(criterion: Any) -> str:
    return getattr(criterion, "__name__", None) or f"{type(criterion).__name__}()"


def _count_elements(batch: Any) -> int:
    return batch[1].numel()  # type: ignore[no-any-return]
