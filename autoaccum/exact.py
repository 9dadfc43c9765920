"""The verdict: is the gradient that the Runner adds up the large batch's?

    sample        the workload's own rows, made hard                  hard_batch.py
    gradients     of a window of uneven parts and of the whole        gradients.py, by step.train_window
    verdict       from their difference, and from what of it least squares explains
    advice        what is wrong and what to type next                 advice.py

A verdict is about the samples that were tried. Where it is `exact` the words say how many these were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import advice, batchnorm, gradients, hard_batch, independence
from . import split as cutting
from .as_it_trains import as_it_trains
from .errors import AutoaccumError
from .gradients import Gradients, Twin
from .hard_batch import Trial
from .oom import drop_frames
from .parts import Parts, forward, held_in_window, open_parts
from .plan import Plan
from .ranks import refuse_ranks
from .recheck import counts_differ, recheck
from .virtual.control import is_virtual
from .workload import Workload

FEW_ENTRIES = 8  # entries of the gradient for each part: with fewer, least squares explains anything

EXACT, CHANCE, SUM, COUNT = "exact", "same distribution", "sum", "wrong denominator"
TERM, COUPLED, STATEFUL = "additive term", "not decomposable", "changes with each forward"
INEXACT, UNKNOWN = "not exact", "unknown"

__all__ = ["Verdict", "check", "counts_differ", "for_plan", "recheck", "stamp", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """Whether a window's gradient is that of one whole batch, and why not.

    Attributes:
        kind: "exact"; "same distribution": exact but for what is drawn at random; "sum": micro-batches would have to be
            added, not averaged; "wrong denominator": they would have to be weighted by something else than samples;
            "additive term": a term that doesn't depend on the samples is counted for each micro-batch; "not
            decomposable": no weights would do; "changes with each forward": what a forward leaves in a module changes
            the gradient of the next one; "not exact": there are too few parameters to tell which of these;
            "unknown": it could not be tested.
        words: The same for a person, in one line.
        error: Relative L2 distance of the window's gradient from the whole batch's, on the worst batch that was tried;
            NaN where it is unknown.
        worst_tensor: The parameter whose gradient was furthest off.
        worst_tensor_error: By how much, relative to itself.
        samples: Samples tested on.
        module: The module where output rows depend on other samples, where there is one.
        advice: What is wrong, why, and what to type next; empty where it is exact.
    """

    kind: str
    words: str
    error: float
    worst_tensor: str | None
    worst_tensor_error: float
    samples: int
    module: str | None = None
    advice: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether accumulating gives the large batch's gradient, up to rounding and random draws."""
        return self.kind in (EXACT, CHANCE)


@dataclass(frozen=True, eq=False)
class Tried:
    """A batch and what it gave.

    Attributes:
        trial: The batch.
        sample: The workload's own rows, as they were before they were made hard.
        found: The gradients.
        within: How far they may differ for rounding.
        counted: Whether the workload says `count=`.
    """

    trial: Trial
    sample: Trial
    found: Gradients
    within: float
    counted: bool

    @property
    def holds(self) -> bool:
        """Whether the window's gradient is the whole batch's, up to rounding."""
        return self.found.agrees(self.within)


class _Untestable(Exception):
    """The batch can't be tested on: the loss doesn't take it, or its gradient is zero or not finite."""


def check(
    workload: Workload, *, most_rows: int = hard_batch.MOST_ROWS, progress: Callable[[str], None] = lambda text: None
) -> Verdict:
    """Tests on the sample, made as hard as the loss takes it, whether accumulating gives the large batch's gradient.

    That costs four passes forward and backward of 8 to 16 samples, and a fifth where one more part has to tell what is
    wrong; besides, a forward that looks at what the loss calls, and one for each part where a `(sum, count)` loss has
    no `count=`. The model is left bitwise as it was.

    Args:
        workload: What is trained. Its sample is needed.
        most_rows: Samples that fit at once, in the precision of the test.
        progress: Called with what is being done.

    Raises:
        UsageError: The workload is of several ranks.
    """
    refuse_ranks(workload)
    if next(workload.model.parameters()).device.type != "cpu" and is_virtual():
        return unknown("a virtual GPU computes nothing", "Check on a CPU or on a real GPU: autoaccum check.")
    if most_rows < hard_batch.FEWEST_ROWS:
        return unknown(f"it takes {hard_batch.FEWEST_ROWS} samples at once to test", "autoaccum check takes them.")
    with as_it_trains(workload.model, held_in_window(workload), everything=True):
        try:
            progress("testing whether the gradient is the large batch's")
            easy = hard_batch.easy(workload, most_rows)
            twin, tried = _tried(workload, easy)
            if not tried.holds:
                return _verdict(workload, twin, tried)
        except _Untestable as error:
            return unknown(str(error), "Give a sample of real data: a batch whose loss is finite and not at its best.")
        except Exception as error:  # whatever the user's code raises: a plan is a plan without a verdict, too
            return unknown(
                f"the test itself failed ({drop_frames(error)})", "Does one step run on the sample? loss(model, sample)"
            )
    return _holds(tried, settled=workload.encode is not None)


def for_plan(plan: Plan, workload: Workload, progress: Callable[[str], None] = lambda text: None) -> Plan:
    """The plan with a verdict, found on no more samples than fit it."""
    # In double precision, or in single in place of half, a sample takes twice what it took in the plan.
    wider = workload.precision is not None or _is_small(workload)
    most = max(plan.largest_micro_batch // (2 if wider else 1), plan.micro_batch // 2)
    if not _is_small(workload):
        most = min(most, hard_batch.LEAST_ROWS)  # each further one costs as much again
    return stamp(plan, check(workload, most_rows=most, progress=progress))


def stamp(plan: Plan, verdict: Verdict) -> Plan:
    """The plan with the verdict's words, and its advice among the notes."""
    notes = verdict.advice
    if plan.accumulation_steps == 1 and not verdict.exact and verdict.kind != UNKNOWN:
        notes = ("This plan's one micro-batch is the whole batch, so that its gradient is exact all the same.", *notes)
    return replace(plan, exactness=verdict.words, notes=(*plan.notes, *notes))


def unknown(why: str, *told: str) -> Verdict:
    """The verdict where nothing could be tested."""
    nan = float("nan")
    return Verdict(UNKNOWN, f"unknown: {why}", nan, None, nan, 0, advice=told)


def _tried(workload: Workload, easy: Trial) -> tuple[Twin, Tried]:
    """In double precision on the CPU; where the model is large, or can't do that, in its own."""
    if _is_small(workload):
        with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError, _Untestable):
            twin = Twin(workload.model, workload.loss, dtype=torch.float64, device=torch.device("cpu"))
            return twin, _hardest(workload, twin, easy)
    twin = Twin(workload.model, workload.loss)
    return twin, _hardest(workload, twin, easy)


def _is_small(workload: Workload) -> bool:
    """Whether it is tested in double precision."""
    return sum(p.numel() for p in workload.model.parameters()) <= gradients.DOUBLES


def _hardest(workload: Workload, twin: Twin, easy: Trial) -> Tried:
    """The hardest batch that the loss takes; the sample as it is where it takes no other."""
    seen = twin.look(lambda: _parts(workload), easy.batch)
    ignorable = advice.ignorable(seen, easy.batch)
    for hardness in hard_batch.HARDNESSES:
        if hard_batch.IGNORING in hardness and not ignorable and not _may_ignore_unasked(twin):
            continue
        hard = hard_batch.harder(easy, hardness, ignorable)
        with contextlib.suppress(RuntimeError, ValueError, TypeError, LookupError, AutoaccumError, _Untestable):
            return _try(workload, twin, hard, easy)
    return _try(workload, twin, easy, easy)


def _may_ignore_unasked(twin: Twin) -> bool:
    """Whether a class that the loss can't take does no harm: on a GPU it ends the process's use of it."""
    return next(iter(twin.copies.values())).device.type == "cpu"


def _try(workload: Workload, twin: Twin, trial: Trial, sample: Trial) -> Tried:
    found = gradients.compare(twin, lambda: _parts(workload), trial.batch, trial.pieces(), trial.sizes)
    if not found.finite:
        raise _Untestable("the gradient of the sample is zero or not finite")
    return Tried(trial, sample, found, twin.within, counted=workload.count is not None)


def _parts(workload: Workload) -> Parts:
    """The workload's parts, without what would change them or belongs to a device."""
    plain = replace(
        workload,
        optimizer=gradients.Capture,
        precision=None,
        on_nonfinite=None,
        scaler=None,
        scheduler=None,
        clip_grad_norm=None,
        between=None,
        metric=None,
    )
    return open_parts(plain)


def _holds(tried: Tried, *, settled: bool) -> Verdict:
    """Exact; `settled` where the loss isn't averaged over micro-batches at all."""
    found, rows = tried.found, tried.trial.rows
    blind = advice.untested_targets(tried)
    if blind is not None and not settled:
        words = f"not exact where targets are ignored: {blind}; exact otherwise (tested on {rows} samples)"
        return Verdict(COUNT, words, found.error(), *found.worst(), rows, advice=advice.for_untested())
    told = (f"{tried.trial.made_up} of the {rows} samples tested on were made of the sample's own.",)
    notes: tuple[str, ...] = told if tried.trial.made_up else ()
    if tried.trial.hardness is None:
        notes += ("The loss takes no batch but one like the sample, so nothing harder was tested.",)
    if found.chance:
        drawn = ", ".join(sorted(found.draws.replaced | found.draws.kept)) or "Python's or NumPy's draws"
        words = f"same distribution (exact with {drawn} off, tested on {rows} samples)"
        return Verdict(CHANCE, words, found.error(), *found.worst(), rows, advice=notes)
    return Verdict(EXACT, f"exact (tested on {rows} samples)", found.error(), *found.worst(), rows, advice=notes)


def _verdict(workload: Workload, twin: Twin, tried: Tried) -> Verdict:
    """Why the window's gradient isn't the whole batch's."""
    kind, weights = _kind(workload, twin, tried)
    found, rows = tried.found, tried.trial.rows
    if kind in (COUPLED, INEXACT) and found.draws.kept:
        drawn = ", ".join(sorted(found.draws.kept))
        return unknown(
            f"the loss draws random numbers by {drawn}, which can't be switched off", "Switch it off to test."
        )
    module = _coupling(workload, twin, tried) if kind in (COUPLED, INEXACT) else None
    if module is None and kind == COUPLED and _remembers(workload, twin, tried):
        kind, module = STATEFUL, twin.moving_module()
    place = twin.moving_place() if kind == STATEFUL else None
    words, told = advice.of(kind, tried, weights, module, place)
    return Verdict(kind, words, found.error(), *found.worst(), rows, module, told)


def _kind(workload: Workload, twin: Twin, tried: Tried) -> tuple[str, list[float]]:
    """What least squares says of the parts, and the weights that they should have had, relative to each other."""
    found = tried.found
    if found.columns.shape[1] < FEW_ENTRIES * len(found.sizes):
        return INEXACT, []
    if not bool(found.columns.isfinite().all()):
        return COUPLED, []
    factors, residual = found.fit()
    if residual > tried.within or found.error() <= tried.within:  # the latter: a single tensor is off, and only it
        return (TERM if found.is_pair and _is_term(workload, twin, tried) else COUPLED), []
    own = [size / sum(found.sizes) for size in found.sizes]
    weights = [factor * share for factor, share in zip(factors, own, strict=True)]
    if not found.is_pair and all(abs(weight - 1) <= 100 * tried.within for weight in weights):
        return SUM, weights
    return COUNT, factors if found.is_pair else weights


def _is_term(workload: Workload, twin: Twin, tried: Tried) -> bool:
    """Whether what is too much is one and the same for each micro-batch after the first.

    With sums s and a term t, three parts give s1 + s2 + s3 + 3t, the whole s1 + s2 + s3 + t: twice t too much. The
    first two must then be t above the whole of these two, whose own count is another.
    """
    found, (first, second, third) = tried.found, tried.trial.sizes
    names = tried.trial.names
    both, _ = cutting.split(tried.trial.batch, (first + second, third), **names)
    joined = twin.window(lambda: _parts(workload), [both], [first + second]).gradient
    excess = found.window - found.whole
    factors, residual = gradients.fit(torch.stack([joined, excess]), found.columns[0] + found.columns[1])
    return residual <= tried.within * 10 and abs(factors[1] - 0.5) <= 0.01


def _remembers(workload: Workload, twin: Twin, tried: Tried) -> bool:
    """Whether the second part's gradient is another one where no first part came before it."""
    if twin.moving_module() is None:
        return False
    piece, size = tried.trial.pieces()[1], tried.trial.sizes[1]
    alone = twin.window(lambda: _parts(workload), [piece], [size]).gradient
    return gradients.fit(alone[None], tried.found.columns[1])[1] > tried.within


def _coupling(workload: Workload, twin: Twin, tried: Tried) -> str | None:
    """The module where samples mix, if one does; a model that doesn't bear being watched names none."""
    trial, batch = tried.trial, twin.cast(tried.trial.batch)
    parts = replace(_parts(workload), device=next(iter(twin.copies.values())).device)
    norms = batchnorm.Window(parts.norms, parts.batchnorm, 1)

    def fresh_forward(piece: Any) -> None:
        with norms.entered():
            twin.run(lambda: forward(parts, piece))

    with contextlib.suppress(Exception):
        return independence.coupling_module(workload.model, fresh_forward, batch, trial.names)
    return None
