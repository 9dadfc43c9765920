"""What a loss may return, and its share of a window.

A mean over samples; a sum and what it is to be divided by; and terms that come on top of either, a penalty on the
weights or a mixture of experts' auxiliary loss, which belong to the window once and not once per micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..errors import UsageError


@dataclass(frozen=True, eq=False)
class LossTerms:
    """A loss whose parts have different weights when its batch is split.

    The whole batch's loss is `sum / count + extra`. In a window of several micro-batches the sums are divided by the
    count of the whole window, and each `extra` by its micro-batch's share of the samples: a term that is the same in
    every micro-batch counts once.

    A term that depends on the batch, as a load-balancing loss does, is then the samples' mean of the micro-batches'
    terms. That is not the term of the whole batch unless it is itself a mean over samples.

    Attributes:
        sum: The sum over the batch, a scalar tensor.
        count: What the batch's sum is to be divided by; needs no gradient.
        extra: What is added, undivided: a scalar tensor, or 0.
    """

    sum: torch.Tensor
    count: torch.Tensor | float
    extra: torch.Tensor | float = 0.0


_HINT = "Return the mean over the batch as a scalar tensor, or (sum, count): return F.cross_entropy(model(x), y)."


def check(out: Any) -> Any:
    """Check that a loss is a mean, a `(sum, count)` or `LossTerms`.

    A tuple is one of these and nothing else: `(loss, logits)` would be divided by its logits without a word. Of a
    dictionary it is what "loss" names, as Lightning's `training_step` and Hugging Face's outputs have it.

    Returns:
        The loss.

    Raises:
        UsageError: It is something else.
    """
    if isinstance(out, Mapping):
        return check(_of_mapping(out))
    _check_form(out)
    _check_mean(out.sum if isinstance(out, LossTerms) else out[0] if isinstance(out, tuple) else out)
    return out


def _of_mapping(out: Mapping[Any, Any]) -> Any:
    if "loss" in out:
        return out["loss"]
    raise UsageError(
        f"The loss returned a {type(out).__name__} of {', '.join(map(repr, out)) or 'nothing'}, without a 'loss'.",
        "Which of these are to be added up isn't guessed: some may be figures to log.",
        'Return one of them, {"loss": ..., ...}, or their sum: sum(losses.values()).',
    )


@contextlib.contextmanager
def graph_is_there() -> Iterator[None]:
    """Explain, around a backward, a loss whose graph is missing or freed."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" in str(error):
            raise UsageError(
                "The loss returned a tensor without a gradient, so nothing would be trained.",
                "Something cut it off from the model: .item(), .detach(), .data, torch.no_grad(), torch.tensor(...) "
                "or argmax.",
                "Return what is computed from the model's output; to log it, detach a copy.",
            ) from error
        if "backward through the graph a second time" not in str(error):
            raise
        raise UsageError(
            "The loss was backpropagated before, or is made of what an earlier micro-batch computed.",
            "Each micro-batch's backward frees its graph, and the window runs it itself.",
            "Leave .backward() out of the loss, and detach what it keeps from one call to the next.",
        ) from error


def _check_mean(loss: Any) -> None:
    """Refuses what is no scalar tensor."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise UsageError(
                f"The loss returned a tensor of shape {tuple(loss.shape)}, not a scalar.",
                "A window's loss is one number; reduction='none' gives one for each element.",
                "Return its .mean(), or (losses.sum(), losses.numel()) where micro-batches may hold different numbers.",
            )
        return
    if loss is None:
        raise UsageError("The loss returned None.", "A function without a return gives that.", _HINT)
    if isinstance(loss, (int, float)) or not hasattr(loss, "loss"):
        shown = f" ({loss!r})" if isinstance(loss, (int, float)) else ""
        cut = "A number has no gradient: .item() or float() cut it off from the model." if shown else ""
        raise UsageError(f"The loss returned a {type(loss).__name__}{shown}, not a tensor.", cut, _HINT)
    raise UsageError(f"The loss returned a {type(loss).__name__}, not a tensor.", "", "Return its .loss.")


def _check_form(out: Any) -> None:
    """Refuses a tuple that is neither a pair nor terms."""
    numbers: tuple[Any, ...] = (out.sum, out.count, out.extra) if isinstance(out, LossTerms) else out
    if not isinstance(numbers, tuple):
        return
    if (
        (len(numbers) != 2 and out is numbers)
        or not all(map(_is_number, numbers))
        or getattr(numbers[1], "requires_grad", False)
    ):
        kinds = ", ".join(f"{tuple(p.shape)}" if isinstance(p, torch.Tensor) else type(p).__name__ for p in numbers)
        raise UsageError(
            f"The loss returned a tuple of {len(numbers)} ({kinds}), which is not (sum, count).",
            "A tuple is taken for the sum over the batch and what it is to be divided by.",
            "Return the mean alone as a scalar, (sum, count) with a count that needs no gradient, "
            "or autoaccum.LossTerms(sum, count, extra) where something is added to it.",
        )


def count_of(out: Any) -> Any:
    """Return a loss's count, `adding_up`; None where it is a mean."""
    if isinstance(out, LossTerms):
        return adding_up(out.count)
    return adding_up(out[1]) if isinstance(out, tuple) else None


def adding_up(number: Any) -> Any:
    """Return a count or a loss in a type that adds up.

    A sum in bf16 stays at 256 where ones are added, and one in uint8 begins again at 0.
    """
    if not isinstance(number, torch.Tensor):
        return number
    if number.is_floating_point():
        return number.float() if number.dtype.itemsize < 4 else number
    return number if number.is_complex() else number.long()


def whole(out: Any) -> torch.Tensor:
    """Return the loss of a window of this one batch, a scalar."""
    if isinstance(out, LossTerms):
        return cast(torch.Tensor, adding_up(out.sum) / nonzero(count_of(out)) + out.extra)
    loss: torch.Tensor = adding_up(out[0]) / nonzero(count_of(out)) if isinstance(out, tuple) else adding_up(out)
    return loss


def part(out: Any, share: float, count: Any, total: Any) -> torch.Tensor:
    """Return one micro-batch's share of its window's loss, a scalar.

    Args:
        out: What the loss returned.
        share: The micro-batch's part of the window's samples.
        count: What a mean averages over in this micro-batch, where `count=` gave it, above 0; None weights a
            mean by samples.
        total: What the window counts; None where nothing is counted.
    """
    if isinstance(out, LossTerms):
        return cast(torch.Tensor, adding_up(out.sum) / total + out.extra * share)
    if isinstance(out, tuple):
        pair: torch.Tensor = adding_up(out[0]) / total
        return pair
    out = adding_up(out)
    if count is None:
        mean: torch.Tensor = out * share
        return mean
    return cast(torch.Tensor, out * count / total)  # in this order: two integers divided would be a float32


def nonzero(count: Any) -> Any:
    """Return the count, or 1 where nothing is counted.

    The sum is 0 then, and 0 / 0 would make the gradient NaN.
    """
    return torch.where(count == 0, 1, count) if isinstance(count, torch.Tensor) else count or 1


def _is_number(part: Any) -> bool:
    return isinstance(part, (int, float)) or (isinstance(part, torch.Tensor) and part.numel() == 1)
