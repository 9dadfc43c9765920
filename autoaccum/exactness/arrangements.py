"""The arrangements of a sample in which a window's gradient has to be the whole batch's before it is called exact.

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
from . import advice, compare, test_batches
from .compare import FunctionalCopy, Gradients
from .loss_trace import Look
from .test_batches import IGNORING, SORTED, WIDE, TestBatch

SPREADS = (1.0, 2.0, 4.0, 2.0, 4.0, 8.0)  # of the outputs, where samples meet in the loss
WIDER = 10  # times as far may gradients be off for rounding where the last layer is larger

_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AutoaccumError)  # a loss doesn't take such a batch


class Untestable(Exception):
    """The batch can't be tested on: the loss doesn't take it, or its gradient is zero or not finite."""


@dataclass(frozen=True, eq=False)
class CheckCase:
    """A batch and what it gave.

    Attributes:
        trial: The batch.
        sample: The workload's own rows, as they were before they were made hard.
        found: The gradients.
        within: How far they may differ for rounding.
        counted: Whether the workload says `count=`.
        look: What a forward of the sample showed.
        device: Where it was tried.
        wide: Whether the last layer was larger.
        exact_unignored: Whether the gradient is the whole batch's where no target is ignored, which was tried.
    """

    trial: TestBatch
    sample: TestBatch
    found: Gradients
    within: float
    counted: bool
    look: Look
    device: torch.device
    wide: bool = False
    exact_unignored: bool = False

    @property
    def holds(self) -> bool:
        """Whether the window's gradient is the whole batch's, up to rounding."""
        return self.found.agrees(self.within)


@dataclass(frozen=True, eq=False)
class _Bench:
    """What arrangements are tried with."""

    workload: Workload
    twin: FunctionalCopy
    look: Look

    @property
    def device(self) -> torch.device:
        return next(iter(self.twin.copies.values())).device

    def freedom(self, path: str) -> str:
        return self.look.uses.freedom(path, self.device)


def tried(workload: Workload, twin: FunctionalCopy, most_rows: int) -> list[CheckCase]:
    """What each arrangement gave, up to the first in which the gradients differ.

    Args:
        workload: What is trained.
        twin: What stands in for its model.
        most_rows: Samples that fit at once, at least 2.

    Raises:
        Untestable: None of them has a gradient to compare with.
    """
    least = least_micro_batch(find_norms(workload.model), workload.batchnorm)
    if most_rows < 2 * least:
        raise Untestable(f"batch statistics need {2 * least} samples at once to test")
    plain = test_batches.plain(workload, most_rows, least)
    together = plain.rows <= most_rows
    first = plain if together else test_batches.groups(plain, most_rows, least)[0]
    bench = _Bench(workload, twin, twin.look(lambda: context_of(workload), first.batch, first.rows))
    easy = test_batches.easy(plain, bench.freedom)
    if together:
        samples = [easy, test_batches.other_mix(easy, bench.look.keys())]
    else:
        samples = test_batches.groups(easy, most_rows, least)
    found: list[CheckCase] = []
    for index, sample in enumerate(samples):
        if not index:
            found.append(_hardest(bench, sample))
        elif (other := _otherwise(bench, sample, found[0].trial.hardness, mixed=index % 2 == 1)) is not None:
            found.append(other)
        if not found[-1].holds:
            break
    if found[-1].holds and any(each.found.depends for each in found):
        found += _more(bench, easy, min(most_rows, easy.rows), least, found[0].trial.hardness)
    return found


def closer(workload: Workload, twin: FunctionalCopy, seen: CheckCase) -> CheckCase:
    """The same batch in three parts, where it has enough rows: three tell more of what is wrong than two."""
    sizes = seen.trial.sizes
    if len(sizes) == len(seen.found.sizes):
        return seen
    found = compare.compare(
        twin, lambda: context_of(workload), seen.trial.batch, seen.trial.pieces(), sizes, seen.found.one
    )
    return seen if found.agrees(seen.within) else replace(seen, found=found)


def holds_unignored(workload: Workload, twin: FunctionalCopy, seen: CheckCase) -> bool:
    """Whether the gradient is the whole batch's where no target is ignored."""
    if not seen.trial.ignored or seen.trial.hardness is None or _has_ignored(seen):
        return False
    bench = _Bench(workload, twin, seen.look)
    hardness = tuple(each for each in seen.trial.hardness if each not in (IGNORING, WIDE))
    with contextlib.suppress(*_REFUSALS, Untestable):
        trial = test_batches.harder(seen.sample, hardness, _ignorable(bench, seen.sample), bench.freedom)
        return _try(bench, trial, seen.sample).holds
    return False


@contextlib.contextmanager
def as_tried(twin: FunctionalCopy, seen: CheckCase) -> Iterator[None]:
    """The model as it was in an arrangement."""
    with twin.wider(seen.look) if seen.wide else contextlib.nullcontext():
        yield


def context_of(workload: Workload) -> TrainingContext:
    """The workload's parts, without what would change them or belongs to a device."""
    plain = replace(
        workload,
        optimizer=compare.GradientRecorder,
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
    """The hardest batch that the loss takes; the sample as it is where it takes no other."""
    found = _first(bench, easy, test_batches.HARDNESSES, wide=False)
    return found if found is not None else _try(bench, easy, easy)


def _otherwise(bench: _Bench, easy: TestBatch, known: Sequence[str] | None, *, mixed: bool) -> CheckCase | None:
    """Another arrangement, as hard as the loss takes it; None where it takes none, which the first has shown enough.

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
    """Further arrangements, up to the first that differs, for where samples meet though gradients don't show it.

    Args:
        bench: What they are tried with.
        easy: All rows.
        rows: How many of them at once.
        least: Samples that a part needs at least.
        known: What was hard about the arrangement that the loss took before.
    """
    for seed, wanted in enumerate(SPREADS if rows == easy.rows else SPREADS * 2):
        look, some = replace(bench.look, wanted=wanted), easy
        if rows < easy.rows:
            order = torch.randperm(easy.rows, generator=torch.Generator().manual_seed(seed))
            some = test_batches.taken(easy, order[:rows].tolist(), least)
        other = _otherwise(replace(bench, look=look), test_batches.other_mix(some, look.keys(seed)), known, mixed=True)
        if other is not None:
            yield other
            if not other.holds:
                return


def _first(bench: _Bench, easy: TestBatch, hardnesses: Sequence[tuple[str, ...]], *, wide: bool) -> CheckCase | None:
    """The first of these that the loss takes."""
    ignorable = _ignorable(bench, easy)
    for hardness in hardnesses:
        hard = test_batches.harder(easy, hardness, ignorable, bench.freedom, seed=4 if wide else 2)
        if IGNORING in hardness and not hard.ignored:
            continue
        with contextlib.suppress(*_REFUSALS, Untestable):
            if not wide:
                return _try(bench, hard, easy)
            with bench.twin.wider(bench.look):
                spread = replace(hard, hardness=(*(hard.hardness or ()), *[WIDE] * (bench.look.larger > 1)))
                return replace(_try(bench, spread, easy, WIDER), wide=True)
    return None


def _ignorable(bench: _Bench, easy: TestBatch) -> dict[str, int]:
    return advice.ignorable(bench.look.draws, easy.batch)


def _try(bench: _Bench, trial: TestBatch, sample: TestBatch, times: int = 1) -> CheckCase:
    if test_batches.all_alike(trial.batch, trial.names):
        raise Untestable("its samples are all alike, and can't be altered safely")
    found = compare.compare(
        bench.twin, lambda: context_of(bench.workload), trial.batch, trial.pieces(trial.pair), trial.pair
    )
    if not found.finite:
        raise Untestable("the gradient of the sample is zero or not finite")
    within = bench.twin.within * times
    return CheckCase(trial, sample, found, within, bench.workload.count is not None, bench.look, bench.device)


def _has_ignored(seen: CheckCase) -> bool:
    """Whether the sample has ignored targets of its own."""
    return any(
        bool((test_batches.leaf_of(seen.sample.batch, path) == out).any())
        for path, out in advice.ignorable(seen.look.draws, seen.sample.batch).items()
    )
