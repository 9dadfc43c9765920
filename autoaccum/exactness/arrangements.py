"""Try a sample in several arrangements before its gradient is called exact.

One arrangement may hide an error: class weights computed from the batch's own counts cancel out if each part has one
class. So the rows are tested sorted, and again in another mix with other counts and wider outputs, each time as two
uneven parts. If fewer than eight rows fit at once, they are tested in groups, alternating between the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from ..errors import AutoaccumError
from ..window.context import TrainingContext, open_context
from ..window.norms import chosen_norms, find_norms, least_micro_batch
from ..workload import Workload
from . import advice, batch_leaves, compare, test_batches
from .case import CheckCase
from .functional_copy import FunctionalCopy, GradientRecorder
from .loss_trace import ForwardTrace
from .test_batches import IGNORING, SORTED, WIDE, TestBatch

OUTPUT_SPREADS = (1.0, 2.0, 4.0, 2.0, 4.0, 8.0)  # standard deviations of the outputs, if samples interact in the loss
WIDE_TOLERANCE_FACTOR = 10  # rounding grows with the last layer

_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AutoaccumError)  # how a loss refuses a batch


class Untestable(Exception):
    """Report a batch that the loss refuses, or without a gradient."""


@dataclass(frozen=True, eq=False)
class _Bench:
    """Hold what arrangements are tried with."""

    workload: Workload
    model_copy: FunctionalCopy
    forward_trace: ForwardTrace

    @property
    def device(self) -> torch.device:
        return next(iter(self.model_copy.copies.values())).device

    def freedom(self, path: str) -> str:
        return self.forward_trace.uses.freedom(path, self.device)


def run_cases(
    workload: Workload,
    model_copy: FunctionalCopy,
    max_rows: int,
    tracing: AbstractContextManager[object] | None = None,
) -> list[CheckCase]:
    """Run arrangements up to the first in which the gradients differ.

    Args:
        workload: What is trained.
        model_copy: Its model on copied parameters.
        max_rows: Samples that fit at once, at least 2.
        tracing: Entered for the first forward.

    Raises:
        Untestable: No arrangement has a usable gradient.
    """
    how = chosen_norms(workload.batchnorm, workload.batch_interactions)
    least = least_micro_batch(find_norms(workload.model), how)
    if max_rows < 2 * least:
        raise Untestable(f"batch statistics need {2 * least} samples at once to test")
    plain = test_batches.plain(workload, max_rows, least)
    together = plain.rows <= max_rows
    first = plain if together else test_batches.groups(plain, max_rows, least)[0]
    with tracing or contextlib.nullcontext():
        trace = model_copy.trace_forward(lambda: context_of(workload), first.batch, first.rows)
    bench = _Bench(workload, model_copy, trace)
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
    """Split the same batch in three if it has enough rows."""
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


def without_ignored(workload: Workload, model_copy: FunctionalCopy, seen: CheckCase) -> CheckCase | None:
    """Return the same case without ignored targets, if it is exact then."""
    if not seen.test_batch.ignored or seen.test_batch.hardness is None or _has_ignored(seen):
        return None
    bench = _Bench(workload, model_copy, seen.forward_trace)
    hardness = tuple(each for each in seen.test_batch.hardness if each not in (IGNORING, WIDE))
    with contextlib.suppress(*_REFUSALS, Untestable):
        trial = test_batches.harder(seen.sample, hardness, _ignorable(bench, seen.sample), bench.freedom)
        found = _try(bench, trial, seen.sample)
        return found if found.holds else None
    return None


@contextlib.contextmanager
def as_in_case(model_copy: FunctionalCopy, seen: CheckCase) -> Iterator[None]:
    """Set the model up as in a case until exit."""
    with model_copy.wider(seen.forward_trace) if seen.wide else contextlib.nullcontext():
        yield


def context_of(workload: Workload) -> TrainingContext:
    """Open the workload without parts that change it or need a device."""
    plain = replace(
        workload,
        optimizer=GradientRecorder,
        precision=None,
        on_nonfinite=None,
        scaler=None,
        scheduler=None,
        clip_grad_norm=None,
        between_steps=None,
        metric=None,
    )
    return open_context(plain)


def _hardest(bench: _Bench, easy: TestBatch) -> CheckCase:
    """Test the hardest batch the loss accepts; else the plain sample."""
    found = _first(bench, easy, test_batches.HARDNESSES, wide=False)
    return found if found is not None else _try(bench, easy, easy)


def _otherwise(bench: _Bench, easy: TestBatch, known: Sequence[str] | None, *, mixed: bool) -> CheckCase | None:
    """Test another arrangement, as hard as the loss accepts; None if none.

    Args:
        bench: Workload, model copy and forward trace.
        easy: The rows.
        known: The hardness that the loss accepted before.
        mixed: Whether classes stay mixed and outputs are spread.
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

    Args:
        bench: Workload, model copy and forward trace.
        easy: All rows.
        rows: Number of rows at once.
        least: The fewest samples in a part.
        known: The hardness that the loss accepted before.
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
    """Test the first hardness the loss accepts; None if none."""
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
    if test_batches.all_alike(trial.batch, trial.batch_keys):
        raise Untestable("its samples are all alike and cannot be altered safely")
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
    """Return whether the sample itself has ignored targets."""
    return any(
        bool((batch_leaves.leaf_of(seen.sample.batch, path) == out).any())
        for path, out in advice.ignorable(seen.forward_trace.draws, seen.sample.batch).items()
    )
