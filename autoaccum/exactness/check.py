"""Check whether the Runner's accumulated gradient is the large batch's.

    sample        the workload's own rows, made hard                  test_batches.py
    arrangements  in which the gradients must agree                   arrangements.py
    gradients     of a window of uneven parts and of the whole        compare.py, by step.train_window
    verdict       from their difference, and how least squares explains it
    advice        what is wrong and what to do                        advice.py

A verdict holds for the tested samples; its words name their number.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.groups import Grouped
from ..devices.oom import drop_frames, is_out_of_memory
from ..devices.registry import get_device
from ..plan import Plan
from ..process_memory import available_bytes
from ..processes import crash_guard
from ..ranks.group import apart, are_absent, ranks_here
from ..ranks.sharded import device_of
from ..ranks.wrapped import is_trained_sharded, quiet, refuse_unsupported, unwrapped
from ..window import norms as batchnorm
from ..window.context import forward, held_in_window
from ..window.isolated import as_it_trains
from ..workload import Workload
from . import advice, arrangements, compare, coupling, test_batches
from .arrangements import Untestable
from .case import CheckCase
from .compare import Gradients
from .determinism import without_tf32
from .functional_copy import HALF_PRECISION_TOLERANCE, MAX_DOUBLE_PARAMETERS, FunctionalCopy
from .recheck import counts_differ, recheck
from .time_limit import DOUBLE_PART, LEAST_SECONDS, TRACED_PART, OutOfTime, TimeLimit

log = logging.getLogger("autoaccum")

MIN_ENTRIES_PER_PART = 8  # of the gradient: with fewer, least squares explains anything

EXACT, SAME_DISTRIBUTION, SUM, COUNT = "exact", "same distribution", "sum", "wrong denominator"
TERM, COUPLED, STATEFUL = "additive term", "not decomposable", "changes with each forward"
INEXACT, UNKNOWN = "not exact", "unknown"
UNIGNORED = advice.UNIGNORED

__all__ = ["Verdict", "check", "check_plan", "counts_differ", "recheck", "unknown", "with_verdict"]


@dataclass(frozen=True)
class Verdict:
    """Hold whether a window's gradient is the whole batch's, and why not.

    Attributes:
        kind: "exact"; "same distribution": exact but for what is drawn at random; "sum": micro-batches would have to be
            added, not averaged; "wrong denominator": they would have to be weighted by something else than samples;
            "additive term": a term that doesn't depend on the samples is counted for each micro-batch; "not
            decomposable": no weights would do; "changes with each forward": what a forward leaves in a module changes
            the gradient of the next one; "not exact": there are too few parameters to tell which of these;
            "unknown": it could not be tested.
        words: The verdict in one line.
        error: Relative L2 distance of the window's gradient from the whole batch's, on the worst tested batch; NaN if
            unknown.
        worst_tensor: The parameter with the largest relative error.
        worst_tensor_error: That error.
        samples: Number of tested samples.
        module: The module whose output rows depend on other samples; None if there is none.
        advice: What is wrong, why, and what to do; notes on the test if it is exact.
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
        """Whether accumulation is exact, up to rounding and random draws."""
        return self.kind in (EXACT, SAME_DISTRIBUTION)


def check(
    workload: Workload,
    *,
    max_rows: int = test_batches.MAX_ROWS,
    progress: Callable[[str], None] = lambda text: None,
    isolated: bool = True,
    limit_seconds: float | None = None,
) -> Verdict:
    """Test on the sample whether accumulation gives the large batch's gradient.

    Two arrangements must agree: classes sorted, and another mix with wider outputs. That takes six passes forward and
    backward of 8 to 16 samples (fewer at once if fewer fit), and three to six more to explain an error. In addition:
    one traced forward, and one for each part if a `(sum, count)` loss has no `count=`. The model stays bitwise as it
    was.

    Args:
        workload: What is trained, with a sample.
        max_rows: Samples that fit at once, in the precision of the test.
        progress: Called with messages.
        isolated: Whether to test in a copy of this process if possible, so that a crash becomes a verdict.
        limit_seconds: How long the test may take; None for as long as it needs. Where double precision would take
            more than half of it, the test runs in the model's own.

    Raises:
        UsageError: The forward of the workload talks to other ranks.
    """
    if is_trained_sharded(workload.model):
        return unknown(
            "the model is sharded over ranks",
            "Check the same model in one process, before it is sharded: autoaccum check.",
        )
    if are_absent():
        return unknown(
            "the model is spread over ranks that are not here",
            "Check the same model in one process, before it is sharded or wrapped: autoaccum check.",
        )
    workload = unwrapped(workload)[0]
    refuse_unsupported(workload, ranks_here())
    if workload.samples_per_group > 1 and not isinstance(workload.sample, Grouped):
        workload = replace(workload, sample=Grouped(workload.sample, workload.samples_per_group))
    if not get_device(device_of(next(workload.model.parameters()))).computes:
        return unknown("a virtual GPU computes nothing", "Check on a CPU or on a real GPU: autoaccum check.")
    if max_rows < test_batches.MIN_ROWS_AT_ONCE:
        fewest = test_batches.MIN_ROWS_AT_ONCE
        return unknown(f"the test needs {fewest} samples at once", "Run autoaccum check, which plans no memory.")
    bound = "" if limit_seconds is None else f", for {limit_seconds:.0f} s at most"
    progress(f"testing whether the gradient is the large batch's{bound}")
    limit = TimeLimit.of(limit_seconds)
    if not isolated:
        with apart(), quiet(None, workload.model):
            return _check(workload, max_rows, limit)
    try:
        with apart(), quiet(None, workload.model):  # the test is this rank's alone
            return crash_guard.run(lambda: _check(workload, max_rows, limit), is_out_of_memory)
    except crash_guard.Crashed as crash:
        return unknown(
            f"the test crashed ({crash})",
            "It ran in a copy of this process, on parts of the sample: does loss(model, part) run?",
        )


def _check(workload: Workload, max_rows: int, limit: TimeLimit) -> Verdict:
    with as_it_trains(workload.model, held_in_window(workload), everything=True), without_tf32():
        try:
            model_copy, cases = _run(workload, max_rows, limit)
            if not cases[-1].holds:
                return _explained(workload, model_copy, cases[-1], limit)
        except OutOfTime:
            return unknown(
                f"the test takes longer than {limit.seconds:.0f} s",
                "Run autoaccum check, which takes the time that it needs.",
            )
        except Untestable as error:
            return unknown(str(error), "Give a sample of real data: a batch whose loss is finite and not at its best.")
        except Exception as error:  # from the user's code; a plan is usable without a verdict
            log.debug("the exactness test failed", exc_info=True)
            return unknown(
                f"the test itself failed ({drop_frames(error)})", "Does one step run on the sample? loss(model, sample)"
            )
    verdict = _holds(cases, settled=workload.encode is not None)
    return replace(verdict, advice=(*verdict.advice, *advice.on_gradient_hooks(workload.model)))


def check_plan(
    plan: Plan,
    workload: Workload,
    progress: Callable[[str], None] = lambda text: None,
    planning_seconds: float = 0.0,
) -> Plan:
    """Add a verdict to a plan, tested on samples that fit it.

    Args:
        plan: The plan.
        workload: What it is for.
        progress: Called with messages.
        planning_seconds: How long planning took; the test takes no longer, or 20 seconds.
    """
    rows, limit = _rows_at_once(plan, workload), max(LEAST_SECONDS, planning_seconds)
    return with_verdict(plan, check(workload, max_rows=rows, progress=progress, limit_seconds=limit))


def _rows_at_once(plan: Plan, workload: Workload) -> int:
    """Return the samples that fit at once in the test's precision."""
    least, most = plan.memory.peaks[0], plan.memory.peaks[-1]
    more = most.micro_batch - least.micro_batch
    each = (most.first_bytes - least.first_bytes) / more if more else least.first_bytes / least.micro_batch
    small = _is_small(workload)
    if small and plan.device.name != "cpu":  # tested in double precision on the host, which keeps half free
        fit = int((available_bytes() or 0) / 2 / max(each, 1))
    else:
        room = plan.budget_bytes - plan.memory.baseline_bytes - least.first_bytes
        fit = max(least.micro_batch + int(room / max(each, 1)), plan.micro_batch)
    if small or workload.precision is not None or _is_half(workload.model):
        fit //= 2  # the test's precision is twice the plan's
    return min(fit, test_batches.MAX_ROWS if small else test_batches.MIN_ROWS)  # each further one costs as much again


def with_verdict(plan: Plan, verdict: Verdict) -> Plan:
    """Add a verdict's words and its advice to a plan."""
    notes = verdict.advice
    if plan.accumulation_steps == 1 and not verdict.exact and verdict.kind != UNKNOWN:
        notes = ("This plan's one micro-batch is the whole batch, so that its gradient is exact all the same.", *notes)
    evidence = replace(plan.evidence, exactness=verdict.words)
    provenance = replace(plan.provenance, notes=(*plan.notes, *notes))
    return replace(plan, evidence=evidence, provenance=provenance)


def unknown(why: str, *advice: str) -> Verdict:
    """Return the verdict for an impossible test."""
    nan = float("nan")
    return Verdict(UNKNOWN, f"unknown: {why}", nan, None, nan, 0, advice=advice)


def _run(workload: Workload, max_rows: int, limit: TimeLimit) -> tuple[FunctionalCopy, list[CheckCase]]:
    """Test in double precision on the CPU, or in the model's own."""
    if _is_small(workload):
        host, part = torch.device("cpu"), DOUBLE_PART
        with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError, Untestable, OutOfTime):
            model_copy = FunctionalCopy(workload.model, workload.loss, dtype=torch.float64, device=host)
            with limit.held(host, part):
                tracing = limit.held(host, part * TRACED_PART)
                return model_copy, arrangements.run_cases(workload, model_copy, max_rows, tracing)
    # Without room for copies: on views, and in half precision if that is the model's.
    parameters = list(workload.model.parameters())
    single = sum(4 * p.numel() for p in parameters)  # copies in single precision, and their gradients as well
    has_room = 2 * single < get_device(parameters[0].device).free_bytes()
    model_copy = FunctionalCopy(workload.model, workload.loss, alias=not has_room, widens=has_room)
    with limit.held(parameters[0].device):
        return model_copy, arrangements.run_cases(workload, model_copy, max_rows)


def _is_half(model: torch.nn.Module) -> bool:
    return any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())


def _is_small(workload: Workload) -> bool:
    """Return whether the model is tested in double precision."""
    return sum(p.numel() for p in workload.model.parameters()) <= MAX_DOUBLE_PARAMETERS


def _holds(cases: Sequence[CheckCase], *, settled: bool) -> Verdict:
    """Return the verdict exact; `settled` if the loss isn't averaged over micro-batches."""
    first = cases[0]
    rows = first.sample.rows if len(cases) < 2 or first.sample.rows >= test_batches.MIN_ROWS else _rows(cases)
    found = max((each.gradients for each in cases), key=Gradients.error)
    blind = advice.untested_targets(first)
    if blind is not None and not settled and advice.one_target_a_sample(first):
        words = f"exact (tested on {rows} samples, none with an ignored target)"
        return Verdict(EXACT, words, found.error(), *found.worst(), rows, advice=advice.if_some_are_ignored())
    if blind is not None and not settled:
        words = f"{UNIGNORED} (tested on {rows} samples); not exact where some are: {blind}"
        return Verdict(COUNT, words, found.error(), *found.worst(), rows, advice=advice.for_untested())
    made = f"{first.test_batch.made_up} of the {rows} tested samples were derived from the sample's own."
    notes: tuple[str, ...] = (made,) if first.test_batch.made_up else ()
    if first.test_batch.hardness is None:
        notes += ("The loss accepts only batches like the sample, so nothing harder was tested.",)
    if first.tolerance >= HALF_PRECISION_TOLERANCE[torch.float16]:
        notes += ("Memory was short, so the test ran in half precision, which detects only errors of percents.",)
    if any(each.gradients.is_random for each in cases):
        names = {name for each in cases for name in each.gradients.draws.replaced | each.gradients.draws.kept}
        drawn = ", ".join(sorted(names)) or "Python's or NumPy's draws"
        words = f"same distribution (exact with {drawn} off, tested on {rows} samples)"
        return Verdict(SAME_DISTRIBUTION, words, found.error(), *found.worst(), rows, advice=notes)
    return Verdict(EXACT, f"exact (tested on {rows} samples)", found.error(), *found.worst(), rows, advice=notes)


def _rows(cases: Sequence[CheckCase]) -> int:
    return sum(each.sample.rows for each in cases)


def _explained(workload: Workload, model_copy: FunctionalCopy, pair: CheckCase, limit: TimeLimit) -> Verdict:
    """Explain a difference, or say that time was too short."""
    try:
        with limit.held(next(iter(model_copy.copies.values())).device):
            return _verdict(workload, model_copy, pair)
    except OutOfTime:
        found, rows = pair.gradients, pair.test_batch.rows
        if found.draws.kept:
            raise  # the difference may be chance
        off = f"off by {advice.percent(found.error())} on {rows} samples"
        words = f"not exact: {off}; there was no time to determine why"
        why = "Run autoaccum check, which takes the time that it needs to say why."
        return Verdict(INEXACT, words, found.error(), *found.worst(), rows, advice=(why,))


def _verdict(workload: Workload, model_copy: FunctionalCopy, pair: CheckCase) -> Verdict:
    """Return why the window's gradient isn't the whole batch's."""
    with arrangements.as_in_case(model_copy, pair):
        case = arrangements.in_three_parts(workload, model_copy, pair)
        kind, weights = _kind(case, pair)
        found, rows = case.gradients, case.test_batch.rows
        if kind in (COUPLED, INEXACT) and found.draws.kept:
            drawn = ", ".join(sorted(found.draws.kept))
            return unknown(
                f"the loss draws random numbers by {drawn}, which can't be switched off", "Switch it off to test."
            )
        module = _coupling(workload, model_copy, case) if kind in (COUPLED, INEXACT) else None
        if module is None and kind == COUPLED and _remembers(workload, model_copy, case):
            kind, module = STATEFUL, model_copy.moving_module()
        place = model_copy.moving_place() if kind == STATEFUL else None
        unignored = None
        if kind in (COUNT, COUPLED) and module is None and not found.is_pair:
            unignored = arrangements.without_ignored(workload, model_copy, case)
            case = replace(case, exact_unignored=unignored is not None)
    words, lines = advice.explain(kind, case, weights, module, place)
    kind = COUNT if unignored is not None else kind  # the mean over the classes that aren't ignored is one of several
    if unignored is not None and advice.one_target_a_sample(case):
        own = unignored.gradients
        words = f"exact (tested on {rows} samples, none with an ignored target)"
        return Verdict(EXACT, words, own.error(), *own.worst(), rows, advice=advice.if_some_are_ignored(lines))
    return Verdict(kind, words, found.error(), *found.worst(), rows, module, lines)


def _kind(case: CheckCase, pair: CheckCase) -> tuple[str, list[float]]:
    """Return the kind of error, and the weights the parts need."""
    found = case.gradients
    if len(found.columns) != len(found.sizes):  # one backward for all: no part has a gradient of its own
        return COUPLED, []
    if found.columns.shape[1] < MIN_ENTRIES_PER_PART * len(found.sizes):
        return INEXACT, []
    if not bool(found.columns.isfinite().all()):
        return COUPLED, []
    factors, residual = found.fit()
    if residual > case.tolerance or found.error() <= case.tolerance:  # the latter: a single tensor differs
        return (TERM if found.is_pair and _is_term(case, pair) else COUPLED), []
    own = [size / sum(found.sizes) for size in found.sizes]
    weights = [factor * share for factor, share in zip(factors, own, strict=True)]
    if not found.is_pair and all(abs(weight - 1) <= min(100 * case.tolerance, 0.1) for weight in weights):
        return SUM, weights
    return COUNT, factors if found.is_pair else weights


def _is_term(case: CheckCase, pair: CheckCase) -> bool:
    """Return whether each further micro-batch adds the same excess term.

    With sums s and a term t, three parts give s1 + s2 + s3 + 3t, the whole s1 + s2 + s3 + t: an excess of 2t. The
    first two parts joined must then give t less than separately.
    """
    found = case.gradients
    if len(found.sizes) == len(pair.gradients.sizes):
        return False
    excess = found.window - found.whole
    joined = torch.stack([pair.gradients.columns[0], excess])
    factors, residual = compare.fit(joined, found.columns[0] + found.columns[1])
    return residual <= case.tolerance * 10 and abs(factors[1] - 0.5) <= 0.01


def _remembers(workload: Workload, model_copy: FunctionalCopy, case: CheckCase) -> bool:
    """Return whether the second part's gradient changes without the first."""
    if model_copy.moving_module() is None:
        return False
    sizes = case.gradients.sizes
    piece = case.test_batch.pieces(sizes)[1]
    alone = model_copy.window(lambda: arrangements.context_of(workload), [piece], [sizes[1]]).gradient
    return compare.fit(alone[None], case.gradients.columns[1])[1] > case.tolerance


def _coupling(workload: Workload, model_copy: FunctionalCopy, case: CheckCase) -> str | None:
    """Return the module that mixes samples, if one is found."""
    trial, batch = case.test_batch, model_copy.cast(case.test_batch.batch)
    parts = replace(arrangements.context_of(workload), device=next(iter(model_copy.copies.values())).device)
    norms = batchnorm.Window(parts.norms, parts.batchnorm, 1)

    def fresh_forward(piece: Any) -> None:
        with norms.entered():
            model_copy.run(lambda: forward(parts, piece))

    try:
        return coupling.coupling_module(workload.model, fresh_forward, batch, trial.batch_keys)
    except OutOfTime:
        raise
    except Exception:
        return None
