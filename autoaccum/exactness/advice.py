"""Explain a verdict: what is wrong, why, and what to do.

A proposed count has been tried: with it, the parts' gradients add up to the whole batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data import tree
from ..data.collated import materialized
from ..torch_compat import gradient_hooks
from ..workload import IGNORED, Batch
from . import batch_leaves, test_batches
from .determinism import ClassLoss, RandomOps

if TYPE_CHECKING:
    from .case import CheckCase

UNIGNORED = "exact on data without ignored targets"
COUNT_TOLERANCE = 1e-3  # between a proposed count's weights and those of least squares


@dataclass(frozen=True)
class Count:
    """Hold something that a loss may average over.

    Attributes:
        what: Its name in a message.
        code: A Python expression of `batch`.
        function: The same as a function.
    """

    what: str
    code: str
    function: Callable[[Batch], float]


def ignorable(draws: RandomOps, batch: Batch) -> dict[str, int]:
    """Return the leaves with classes, by path, and the class each ignores."""
    leaves = dict(tree.leaves(batch))
    named = [path for path in batch_leaves.target_paths(batch) if not leaves[path].is_floating_point()]
    found: dict[str, int] = {}
    for call in draws.class_losses:
        for path in [call.path] if call.path is not None else named:
            found.setdefault(path, call.ignore_index)
    return found


def untested_targets(case: CheckCase) -> str | None:
    """Describe the averaging cross-entropy not tested with ignored classes; or None.

    Classes that are a leaf of the batch were tested; if that failed, the model refuses them. This leaves classes that
    the loss computes; in-batch negatives use the sample's own place, which is never ignored.
    """
    if case.gradients.is_pair or case.counted or case.test_batch.ignored:
        return None
    calls = [call for call in case.gradients.draws.class_losses if call.averages and _may_be_ignored(case, call)]
    averaging = [call for call in calls if not _are_places(call.targets)]
    if not averaging:
        return None
    return f"its cross-entropy averages over classes other than {averaging[0].ignore_index}"


def _may_be_ignored(case: CheckCase, call: ClassLoss) -> bool:
    """Return whether its classes may be ignored elsewhere and weren't tested so."""
    if call.path is None:
        return True
    uses, few = case.forward_trace.uses, case.test_batch.rows < test_batches.MIN_ROWS_TO_IGNORE
    unsafe = not uses.invents(call.path, case.device)
    return (few or unsafe) and not uses.indexes(call.path)


def _are_places(targets: torch.Tensor) -> bool:
    return targets.dim() == 1 and torch.equal(targets, torch.arange(len(targets)).to(targets))


def for_untested() -> tuple[str, ...]:
    """Return advice for ignored classes that could not be tested."""
    return (
        "The loss averages a cross-entropy over the classes that it doesn't ignore. They were not found in the batch, "
        "so it wasn't tested with some ignored.",
        "Return (sum, count) with reduction='sum', or give Workload(..., count=lambda batch: ...).",
    )


def one_target_a_sample(case: CheckCase) -> bool:
    """Return whether each sample has one class, as in image classification.

    Tokens are padded, so some of their classes are ignored sooner or later; a sample's one class rarely is.
    """
    calls = [call for call in case.gradients.draws.class_losses if call.averages]
    parts = {case.test_batch.rows, *case.gradients.sizes}
    return bool(calls) and all(call.targets.dim() == 1 and len(call.targets) in parts for call in calls)


def if_some_are_ignored(lines: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the remark on a mean over classes, none ignored."""
    count = next((line for line in lines if line.startswith("Workload(")), "")
    return (
        "The cross-entropy averages over the classes that aren't ignored. If your data ignores some, "
        + (f"give their number: {count}." if count else "return (sum, count), or give count=.")
        + " loss=torch.nn.CrossEntropyLoss() counts them by itself.",
    )


def on_gradient_hooks(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the remark on hooks that the tested copies don't have."""
    hooked = [name for name, p in model.named_parameters() if gradient_hooks(p)]
    if not hooked:
        return ()
    more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
    return (
        f"The hook on the gradient of {hooked[0]}{more} was not tested. It runs on each micro-batch's gradient: unless "
        "it is linear (a factor, a mask), the sum is another one than it makes of the whole.",
    )


def explain(
    kind: str, case: CheckCase, weights: Sequence[float], module: str | None, place: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return the words and the advice of an inexact verdict.

    Args:
        kind: The verdict's kind.
        case: The case that failed.
        weights: The weights that the parts need.
        module: Name of the module at fault.
        place: That module as an expression of the user's code; None if it can't be switched separately.
    """
    found = case.gradients
    name, worst = found.worst()
    off = f"off by {percent(found.error())} on {case.test_batch.rows} samples"
    seen = f"{off} ({name}: {percent(worst)})"
    if case.test_batch.hardness:
        seen += f", with {' and '.join(case.test_batch.hardness)}"
    if kind == "sum":
        return f"not exact: the loss is a sum, and micro-batches are weighted as means; {off}", _advice_on_sum(seen)
    if kind == "wrong denominator":
        return _advice_on_count(case, weights, off, seen)
    if kind == "additive term":
        words = f"not exact: a term that doesn't depend on the samples is counted for each micro-batch; {off}"
        return words, _advice_on_term(seen)
    if kind == "not exact":
        words = f"not exact: {off}; the model has too few parameters to determine why"
        return words, (f"{seen}.", "Return (sum, count) from the loss if it averages over something else than samples.")
    if kind == "changes with each forward":
        return f"not exact: {module} changes with each forward; {off}", _advice_on_state(str(module), place, seen)
    if module is not None:
        return f"not exact: in {module} samples depend on one another; {off}", _advice_on_module(module, seen)
    if case.exact_unignored:
        words = f"{UNIGNORED}; not exact where some are: the loss adds means over different numbers; {off}"
        return words, _advice_on_several_means(seen)
    return f"not exact: the loss couples samples across micro-batches; {off}", _advice_on_coupling(seen)


def _advice_on_sum(seen: str) -> tuple[str, ...]:
    return (
        f"The parts' gradients add up to the whole's with weights of 1, not of samples/all: {seen}.",
        "Return (sum, count) from the loss, with the number of samples as the count: its gradient is the mean's, which "
        "is the sum's divided by the samples of the window. Raise the learning rate as many times if it was tuned for "
        "the sum.",
    )


def _advice_on_count(case: CheckCase, weights: Sequence[float], off: str, seen: str) -> tuple[str, tuple[str, ...]]:
    given = ", ".join(f"{size / case.test_batch.rows:.3f}" for size in case.gradients.sizes)
    if case.gradients.is_pair:
        words = f"not exact: the (sum, count) that the loss returns is not a sum and its count; {off}"
        return words, (
            f"What it returns, added up over micro-batches, is not what the whole batch returns: {seen}.",
            "The first must be a sum (reduction='sum'), the second what a mean would have divided it by.",
        )
    proposed = next(_fitting(case, weights), None)
    if proposed is None:
        wanted = ", ".join(f"{weight:.3f}" for weight in weights)
        over = "what count= gives" if case.counted else "samples"
        return f"not exact: the loss doesn't average over {over}; {off}", (
            f"The parts' gradients add up to the whole's, but with the weights {wanted}; by samples it would be "
            f"{given}: {seen}.",
            "Return (sum, count) from the loss: what it adds up, and what it divides by. A function of a mean (a root, "
            "a logarithm) has no count: only all samples in one micro-batch train it exactly.",
        )
    words = f"not exact: the loss averages over {proposed.what}, not over samples; {off}"
    if case.exact_unignored:
        words = f"{UNIGNORED}; {words.replace(':', ' where some are:', 1)}"
    return words, (
        f"It averages over {proposed.what}, and micro-batches are weighted by "
        f"{'what count= gives' if case.counted else 'samples'}: {seen}.",
        f"Workload(..., count=lambda batch: {proposed.code})",
    )


def _advice_on_term(seen: str) -> tuple[str, ...]:
    return (
        f"A weight penalty, say, is part of the sum that is returned, and k micro-batches count it k times: {seen}.",
        "Give it apart, so that it is counted once: return autoaccum.LossTerms(sum, count, extra=term).",
    )


def _advice_on_module(module: str, seen: str) -> tuple[str, ...]:
    kind = module.partition(" (")[2]
    reason = f"The output of {module} for a sample depends on the others in its micro-batch: {seen}."
    if "BatchNorm" in kind:
        return reason, (
            "Workload(..., batchnorm='exact') has the whole batch's statistics and gradient: micro-batches run in "
            "lanes that meet there. batchnorm='frozen' is exact, too, and so are GroupNorm and LayerNorm in its place. "
            "Otherwise each micro-batch is normalized separately, which trains, but differs from the large batch."
        )
    return reason, (
        "Only samples in one micro-batch meet there. Train with one accumulation step, or make the module treat each "
        "sample separately."
    )


def _advice_on_state(module: str, place: str | None, seen: str) -> tuple[str, ...]:
    fix = f"freeze it in between: {place}.eval() after model.train(), and" if place else "move it out of forward:"
    return (
        f"{module} has state that each forward changes, so a micro-batch depends on those before it: {seen}.",
        f"If the state should change once per optimizer step, {fix} update it once a step.",
    )


def _advice_on_coupling(seen: str) -> tuple[str, ...]:
    return (
        f"No weights of the micro-batches give the whole batch's gradient: {seen}. The loss compares samples "
        "(in-batch negatives, triplets, ranks), is a ratio or a statistic of the whole batch, or adds means over "
        "different numbers (tokens, samples).",
        "If it is a function of each sample's representation, Workload(..., encode=lambda model, batch: ..., "
        "loss=lambda model, representations: ...) is exact, for one more forward. Of two means, give one as (sum, "
        "count) and the other, over samples, apart: autoaccum.LossTerms(sum, count, extra=mean). Else train with one "
        "step.",
    )


def _advice_on_several_means(seen: str) -> tuple[str, ...]:
    return (
        f"It adds a mean over the classes that aren't ignored and another mean, as a penalty: {seen}. No one weight of "
        "a micro-batch is right for both.",
        "Return autoaccum.LossTerms(sum, count, extra=mean over samples).",
    )


def _fitting(case: CheckCase, weights: Sequence[float]) -> Iterator[Count]:
    """Yield the counts whose shares match the weights found."""
    pieces = [materialized(piece) for piece in case.test_batch.pieces(case.gradients.sizes)]
    for count in _candidates(case):
        try:
            values = [float(count.function(piece)) for piece in pieces]
        except (RuntimeError, IndexError, TypeError):
            continue
        total = sum(values)
        if total > 0 and all(
            abs(value / total - weight) <= COUNT_TOLERANCE for value, weight in zip(values, weights, strict=True)
        ):
            yield count


def _candidates(case: CheckCase) -> Iterator[Count]:
    batch, calls = materialized(case.test_batch.batch), case.gradients.draws.class_losses
    leaves = dict(tree.leaves(batch))
    ignored = ignorable(case.gradients.draws, batch)
    for path in dict.fromkeys([*ignored, *case.test_batch.ignored]):
        out = ignored.get(path, IGNORED)
        yield _targets(path, out)
        if leaves[path].dim() == 2:
            yield _targets(path, out, shifted=True)
        for weights in _weights(calls):
            yield _weighted(path, out, weights)
    for path in batch_leaves.mask_paths(batch):
        yield Count(f"the ones of {path}", f"{path}.sum()", lambda b, p=path: _leaf(b, p).sum())  # type: ignore[misc]
        yield Count(f"the zeros of {path}", f"({path} == 0).sum()", lambda b, p=path: (_leaf(b, p) == 0).sum())  # type: ignore[misc]
        yield Count(
            f"the ones of {path} but the first of each sample",
            f"{path}[:, 1:].sum()",
            lambda b, p=path: _leaf(b, p)[:, 1:].sum(),  # type: ignore[misc]
        )
    for path in (*batch_leaves.length_paths(batch), *batch_leaves.weight_paths(batch)):
        yield Count(f"the sum of {path}", f"{path}.sum()", lambda b, p=path: _leaf(b, p).sum())  # type: ignore[misc]
    rows = next((path for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if rows is not None:
        yield Count("samples", f"len({rows})", lambda b: len(_leaf(b, rows)))


def _targets(path: str, out: int, *, shifted: bool = False) -> Count:
    cut = "[:, 1:]" if shifted else ""
    what = f"the classes in {path}{' but the first of each sample' * shifted} that aren't {out}"

    def count(batch: Batch) -> Any:
        leaf = _leaf(batch, path)
        return ((leaf[:, 1:] if shifted else leaf) != out).sum()

    return Count(what, f"({path}{cut} != {out}).sum()", count)


def _weighted(path: str, out: int, weights: torch.Tensor) -> Count:
    """Return the sum of the class weights of classes not ignored."""

    def count(batch: Batch) -> Any:
        leaf = _leaf(batch, path).cpu()
        return weights[leaf[leaf != out]].sum()

    code = f"class_weights[{path}[{path} != {out}]].sum()"
    return Count(f"the class weights of {path}", code, count)


def _weights(calls: Sequence[ClassLoss]) -> Iterator[torch.Tensor]:
    weights = next((call.weights for call in calls if call.weights is not None), None)
    if weights is not None:
        yield weights.detach().double().cpu()


def _leaf(batch: Batch, path: str) -> Any:
    return dict(tree.leaves(batch))[path]


def percent(error: float) -> str:
    """Format a relative error."""
    if error == float("inf"):
        return "anything (not finite)"
    if error < 0.001:
        return f"{100 * error:.1g}%"
    return f"{error:.1%}" if error < 0.1 else f"{error:.0%}" if error < 10 else f"{error:.0f} times"
