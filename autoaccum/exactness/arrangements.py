"""Arrange a sample in the ways that must agree before "exact".

The window's gradient has to be the whole batch's in each.

One unlucky arrangement proves nothing: class weights taken from the batch's own counts cancel out where each part has
one class. So the rows are tried sorted, and again in another mix with other counts and with outputs further apart,
each as two uneven parts. Where fewer than eight rows fit at once, they are tried a few at a time, by turns this way and
that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import AutoaccumError
from ..window.context import TrainingContext, open_context
from ..window.norms import find_norms, least_micro_batch
from ..workload import Workload
from . import advice, batch_leaves, compare, test_batches
from .case import CheckCase
from .functional_copy import FunctionalCopy, GradientRecorder
from .loss_trace import ForwardTrace
from .test_batches import IGNORING, SORTED, WIDE, TestBatch

OUTPUT_SPREADS = (1.0, 2.0, 4.0, 2.0, 4.0, 8.0)  # of the outputs, where samples meet in the loss
WIDE_TOLERANCE_FACTOR = 10  # times as far may gradients be off for rounding where the last layer is larger

_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AutoaccumError)  # a loss doesn't take such a batch


class Untestable(Exception):
    """The batch can't be tested on.

    The loss doesn't accept it, or its gradient is zero or not finite.
    """


@dataclass(frozen=True, eq=False)
class _Bench:
    """What arrangements are tried with."""

    workload: Workload
    model_copy: FunctionalCopy
    forward_trace: ForwardTrace

    @property
    def device(self) -> torch.device:
        return next(iter(self.model_copy.copies.values())).device

    def freedom(self, path: str) -> str:
        return self.forward_trace.uses.freedom(path, self.device)


def run_cases(workload: Workload, model_copy: FunctionalCopy, max_rows: int) -> list[CheckCase]:
    """Return each arrangement's result, up to the first difference.

    Args:
        workload: What is trained.
        model_copy: What stands in for its model.
        max_rows: Samples that fit at once, at least 2.

    Raises:
        Untestable: None of them has a gradient to compare with.
    """
    least = least_micro_batch(find_norms(workload.model), workload.batchnorm)
    if max_rows < 2 * least:
        raise Untestable(f"batch statistics need {2 * least} samples at once to test")
    plain = test_batches.plain(workload, max_rows, least)
    together = plain.rows <= max_rows
    first = plain if together else test_batches.groups(plain, max_rows, least)[0]
    bench = _Bench(
        workload, model_copy, model_copy.trace_forward(lambda: context_of(workload), first.batch, first.rows)
    )
    easy = test_batches.easy(plain, bench.freedom)
    if together:
        samples = [easy, test_batches.other_mix(easy, bench.forward_trace.keys())]
    else:
        samples = test_batches.groups(easy, max_rows, least)
    found: list[CheckCase] = []
    for index, sample in enumerate(samples):
        if not index:
            found.append(_hardest(bench, sample))
        elif (other := _otherwise(bench, sample, found[0].test_batch.hardness, mixed=index % 2 == 1)) is not None:
            found.append(other)
        if not found[-1].holds:
            break
    if found[-1].holds and any(each.gradients.depends for each in found):
        found += _more(bench, easy, min(max_rows, easy.rows), least, found[0].test_batch.hardness)
    return found


def in_three_parts(workload: Workload, model_copy: FunctionalCopy, seen: CheckCase) -> CheckCase:
    """Return the batch in three parts, where it has enough rows.

    Three tell more of what is wrong than two.
    """
    sizes = seen.test_batch.sizes
    if len(sizes) == len(seen.gradients.sizes):
        return seen
    found = compare.compare(
        model_copy,
        lambda: context_of(workload),
        seen.test_batch.batch,
        seen.test_batch.pieces(),
        sizes,
        seen.gradients.one,
    )
    return seen if found.agrees(seen.tolerance) else replace(seen, gradients=found)


def holds_unignored(workload: Workload, model_copy: FunctionalCopy, seen: CheckCase) -> bool:
    """Whether the gradient is the whole batch's where no target is ignored."""
    if not seen.test_batch.ignored or seen.test_batch.hardness is None or _has_ignored(seen):
        return False
    bench = _Bench(workload, model_copy, seen.forward_trace)
    hardness = tuple(each for each in seen.test_batch.hardness if each not in (IGNORING, WIDE))
    with contextlib.suppress(*_REFUSALS, Untestable):
        trial = test_batches.harder(seen.sample, hardness, _ignorable(bench, seen.sample), bench.freedom)
        return _try(bench, trial, seen.sample).holds
    return False


@contextlib.contextmanager
def as_in_case(model_copy: FunctionalCopy, seen: CheckCase) -> Iterator[None]:
    """Set the model as in an arrangement, within this context."""
    with model_copy.wider(seen.forward_trace) if seen.wide else contextlib.nullcontext():
        yield


def context_of(workload: Workload) -> TrainingContext:
    """Return the workload's context, without device-specific parts.

    Nor what would change it.
    """
    plain = replace(
        workload,
        optimizer=GradientRecorder,
        precision=None,
        on_nonfinite=None,
        scaler=None,
        scheduler=None,
        clip_grad_norm=None,
        between=None,
        metric=None,
    )
    return open_context(plain)


def _hardest(bench: _Bench, easy: TestBatch) -> CheckCase:
    """Return the hardest batch the loss accepts, else the sample."""
    found = _first(bench, easy, test_batches.HARDNESSES, wide=False)
    return found if found is not None else _try(bench, easy, easy)


def _otherwise(bench: _Bench, easy: TestBatch, known: Sequence[str] | None, *, mixed: bool) -> CheckCase | None:
    """Return another arrangement, as hard as accepted; None for none.

    None where the loss accepts no other, which the first has shown enough.

    Args:
        bench: What it is tried with.
        easy: The rows.
        known: What was hard about the arrangement that the loss took before.
        mixed: Whether classes are left mixed and outputs are spread.
    """
    able = tuple(each for each in known or () if each in (SORTED, IGNORING) or each == test_batches.RAGGED)
    sorts = able if not mixed else tuple(each for each in able if each != SORTED)
    hardnesses = [sorts, tuple(each for each in sorts if each != IGNORING), ()]
    for wide in (True, False) if mixed else (False,):
        found = _first(bench, easy, list(dict.fromkeys(hardnesses)), wide=wide)
        if found is not None:
            return found
    with contextlib.suppress(*_REFUSALS, Untestable):
        return _try(bench, easy, easy)
    return None


def _more(bench: _Bench, easy: TestBatch, rows: int, least: int, known: Sequence[str] | None) -> Iterator[CheckCase]:
    """Yield further arrangements up to the first that differs.

    For where samples meet though gradients don't show it.

    Args:
        bench: What they are tried with.
        easy: All rows.
        rows: How many of them at once.
        least: Samples that a part needs at least.
        known: What was hard about the arrangement that the loss took before.
    """
    for seed, target_spread in enumerate(OUTPUT_SPREADS if rows == easy.rows else OUTPUT_SPREADS * 2):
        forward_trace, some = replace(bench.forward_trace, target_spread=target_spread), easy
        if rows < easy.rows:
            order = torch.randperm(easy.rows, generator=torch.Generator().manual_seed(seed))
            some = test_batches.taken(easy, order[:rows].tolist(), least)
        other = _otherwise(
            replace(bench, forward_trace=forward_trace),
            test_batches.other_mix(some, forward_trace.keys(seed)),
            known,
            mixed=True,
        )
        if other is not None:
            yield other
            if not other.holds:
                return


def _first(bench: _Bench, easy: TestBatch, hardnesses: Sequence[tuple[str, ...]], *, wide: bool) -> CheckCase | None:
    """Return the first of these that the loss accepts."""
    ignorable = _ignorable(bench, easy)
    for hardness in hardnesses:
        hard = test_batches.harder(easy, hardness, ignorable, bench.freedom, seed=4 if wide else 2)
        if IGNORING in hardness and not hard.ignored:
            continue
        with contextlib.suppress(*_REFUSALS, Untestable):
            if not wide:
                return _try(bench, hard, easy)
            with bench.model_copy.wider(bench.forward_trace):
                spread = replace(
                    hard, hardness=(*(hard.hardness or ()), *[WIDE] * (bench.forward_trace.layer_scale > 1))
                )
                return replace(_try(bench, spread, easy, WIDE_TOLERANCE_FACTOR), wide=True)
    return None


def _ignorable(bench: _Bench, easy: TestBatch) -> dict[str, int]:
    return advice.ignorable(bench.forward_trace.draws, easy.batch)


def _try(bench: _Bench, trial: TestBatch, sample: TestBatch, times: int = 1) -> CheckCase:
    if test_batches.all_alike(trial.batch, trial.names):
        raise Untestable("its samples are all alike, and can't be altered safely")
    found = compare.compare(
        bench.model_copy, lambda: context_of(bench.workload), trial.batch, trial.pieces(trial.pair), trial.pair
    )
    if not found.finite:
        raise Untestable("the gradient of the sample is zero or not finite")
    tolerance = bench.model_copy.tolerance * times
    return CheckCase(
        trial, sample, found, tolerance, bench.workload.count is not None, bench.forward_trace, bench.device
    )


def _has_ignored(seen: CheckCase) -> bool:
    """Whether the sample has ignored targets of its own."""
    return any(
        bool((batch_leaves.leaf_of(seen.sample.batch, path) == out).any())
        for path, out in advice.ignorable(seen.forward_trace.draws, seen.sample.batch).items()
    )
