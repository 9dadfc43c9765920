"""Plan windows whose micro-batches run in lanes.

Micro-batches one after the other are recorded first. Lanes need other memory: on a GPU the inputs of each normalization
are there for all lanes, and on a CPU all that is saved for the backward. So

    on a CPU    a window in lanes is planned as one micro-batch of all its samples: lanes save no memory there
    on a GPU    short windows in lanes are recorded and lifted, and each split's own is replayed (lane_predictor.py)

Where windows in lanes can't be lifted, they are run: from the steps on that micro-batches one after the other would
need, until one fits; then fewer steps are tried between the last that didn't and that one. The plan says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..devices.base import MALLOC
from ..errors import DoesNotFit, OutOfMemory, UsageError
from ..phases import FIRST, LATER, PHASE_TITLES
from ..plan import FASTEST, Plan
from ..simulation.lane_windows import NotRegular
from ..simulation.solver import Solution, Split, balanced, uniform_sizes
from ..units import parse_bytes, show_bytes
from ..window.lanes.host_buffers import host_limit
from ..window.lanes.host_store import THRESHOLD_BYTES
from ..window.step import TrainingContext
from . import failures
from .predictor import MemoryPredictor
from .request import PlanRequest
from .solution import solve
from .trial import run_for_real
from .verify import solve_and_verify

MEET = "Micro-batches run in lanes that meet where samples interact"
STEPS_FACTOR = 1.25  # from a number of lanes that doesn't fit to the next one that is tried
TRIES = 8  # windows that are run between the most lanes that didn't fit and the fewest that did


@dataclass(frozen=True)
class LanesFound:
    """What was found out by running windows in lanes.

    Attributes:
        solution: The split.
        measured: What its windows used; None where it wasn't run.
        peak_bytes: The peak that the plan states.
        phases: The peak of each phase.
        host_bytes: Most bytes that waited on the host.
        moved_bytes: What a window moves there.
        stayed_bytes: What it could move there, and keeps on the device.
        recomputed_bytes: What its backward computes again.
        spared_bytes: What it would move more otherwise.
        host_binds: Whether fewer lanes fit the device, and would move more than the host may hold.
        tried: How each other number of lanes failed.
        method: How lanes were predicted; empty where they were run instead.
        fallback_reason: Why they were run.
        predicted: The peak in the process that planned; None where it is `peak_bytes`.
        retries: How often the allocator gives its cache back, by window.
    """

    solution: Solution
    measured: Any
    peak_bytes: int
    phases: dict[str, int]
    host_bytes: int = 0
    moved_bytes: int = 0
    stayed_bytes: int = 0
    recomputed_bytes: int = 0
    spared_bytes: int = 0
    host_binds: bool = False
    tried: tuple[str, ...] = ()
    method: str = ""
    fallback_reason: str = ""
    predicted: int | None = None
    retries: tuple[int, ...] = ()


def host_limit_bytes(request: PlanRequest) -> int | None:
    """Return the host memory that saved tensors may use, if named."""
    return None if request.host_memory is None else parse_bytes(request.host_memory, what="an amount of host memory")


def solve_in_lanes(predictor: MemoryPredictor, start_over: Callable[[], None], *, verify: bool) -> LanesFound:
    """Find the fewest lanes whose window fits.

    Args:
        predictor: What is known of micro-batches one after the other.
        start_over: Puts back what training changed.
        verify: Whether windows may be run.

    Raises:
        DoesNotFit: No window in lanes fits.
        UsageError: The request needs windows to be run, and forbids it.
    """
    request = predictor.request
    if request.objective == FASTEST:
        raise UsageError(
            "The fastest micro-batch is not searched for in lanes.",
            "Fewer lanes are faster, and the plan has the fewest that fit.",
            "Leave objective out, or use batchnorm='frozen'.",
        )
    if predictor.subject.device.memory_model == MALLOC:
        return _on_host(predictor, start_over, verify=verify)
    return _on_device(predictor, start_over, verify=verify)


def _on_host(predictor: MemoryPredictor, start_over: Callable[[], None], *, verify: bool) -> LanesFound:
    """Plan lanes as one micro-batch of the whole window."""
    request = predictor.request
    samples = request.samples
    if samples is None:
        solution, measured = solve_and_verify(predictor, start_over, verify=verify, compiles=False)
        split = solution.split
        return LanesFound(solution, measured, predictor.worst_bytes(split), dict(predictor.phases(split)))
    whole = (samples,)
    if not predictor.fits_surely(whole):
        raise _lanes_need_more(predictor, whole)
    split = next(splits_of(predictor))
    solution = Solution(split, 1)
    measured = None
    if verify:
        measured, failure = run_for_real(predictor, split)
        if failure is not None:
            raise _lanes_need_more(predictor, whole)
    phases = {name: size for name, size in predictor.phases(whole).items() if name != LATER}
    return LanesFound(solution, measured, predictor.worst_bytes(whole), phases)


def _lanes_need_more(predictor: MemoryPredictor, whole: Split) -> DoesNotFit:
    try:
        needed = predictor.needed_bytes(whole)
    except LookupError:  # no recording is that large
        needed = predictor.budget.bytes + 1
    missing = max(1, needed - predictor.budget.bytes)
    needs = f"needs {show_bytes(needed)}" if missing > 1 else "needs more than was recorded"
    return DoesNotFit(
        f"A window of {whole[0]} samples in lanes {needs}; the budget is {show_bytes(predictor.budget.bytes)}.",
        "On a CPU lanes save no memory: what they save for the backward stays in it, as that of one micro-batch does.",
        "What would help: a smaller target, batchnorm='frozen' (exact, any micro-batch), or torch.nn.GroupNorm.",
        missing_bytes=missing,
    )


def splits_of(predictor: MemoryPredictor, fewest: int = 1) -> Iterator[Split]:
    """Yield the splits of the target, fewest steps first.

    Args:
        predictor: What is asked for.
        fewest: Steps to begin with.
    """
    request = predictor.request
    assert request.samples is not None
    samples = request.samples
    if request.uniform:
        sizes = uniform_sizes(samples, min_size=request.least, max_size=request.most)
        yield from ((size,) * (samples // size) for size in reversed(sizes) if samples // size >= fewest)
        return
    for steps in range(max(fewest, -(-samples // request.most)), samples // request.least + 1):
        yield balanced(samples, steps)


def _on_device(predictor: MemoryPredictor, start_over: Callable[[], None], *, verify: bool) -> LanesFound:
    """Find the fewest lanes that fit, by predicting or running them."""
    request, context = predictor.request, predictor.subject.context
    plain = solve(predictor)
    if plain is not None and len(plain.split) == 1:
        solution, measured = solve_and_verify(predictor, start_over, verify=verify, compiles=False)
        if len(solution.split) == 1:
            split = solution.split
            return LanesFound(solution, measured, predictor.worst_bytes(split), dict(predictor.phases(split)))
        plain = solution
    guess = plain.split[0] if plain is not None else request.least
    try:
        return _replayed(predictor, start_over, guess, verify=verify)
    except NotRegular as error:
        reason = f"{error}"
    predictor.subject.progress(f"lanes are not predicted: {reason}")
    context.moved_bytes_per_sample = context.moved_parts = None
    context.recomputes = False
    if plain is None:
        raise failures.does_not_fit(predictor, (request.least,), None)
    if not verify:
        raise UsageError(
            "A window in lanes can't be planned without running it: verify=False.",
            f"It isn't predicted: {reason}.",
            "Let planning verify, or use batchnorm='frozen' or 'merged'.",
        )
    found = _Search(predictor, start_over, list(splits_of(predictor, len(plain.split)))).run()
    return replace(found, fallback_reason=reason)


def _replayed(
    predictor: MemoryPredictor, start_over: Callable[[], None], micro_batch: int, *, verify: bool
) -> LanesFound:
    """Predict windows in lanes.

    Raises:
        NotRegular: They can't be predicted.
        DoesNotFit: No number of lanes fits the device, or what they move doesn't fit the host.
    """
    from .lane_predictor import LanePredictor  # CUDA's rules aren't loaded for a CPU
    from .lanes_replayed import solve_by_replay
    from .predictor_cuda import THIS_PROCESS, CudaPredictor

    assert isinstance(predictor, CudaPredictor)
    limit = host_limit(predictor.subject.context.host_memory_bytes)
    start = LanePredictor(predictor, start_over, THRESHOLD_BYTES, host_limit_bytes=limit)
    splits = list(splits_of(predictor, 2))
    try:
        solved = solve_by_replay(start, splits, micro_batch, verify=verify)
    except OutOfMemory as error:  # of the host, whatever the number of lanes
        raise DoesNotFit(error.what, error.why, error.hint, missing_bytes=1) from None
    lanes, split = solved.predictor, solved.split
    lanes.settle()
    return LanesFound(
        Solution(split, 1),
        solved.measured,
        lanes.worst_bytes(split),
        lanes.phases(split),
        lanes.host_bytes(split),
        sum(lanes.moved_sizes(split)),
        solved.stayed_bytes,
        lanes.recomputed_bytes(split) if lanes.recomputes else 0,
        solved.spared_bytes,
        solved.host_binds,
        method=lanes.words,
        predicted=lanes.peak_bytes(split, THIS_PROCESS),
        retries=lanes.within(split, THIS_PROCESS).retries,
    )


@dataclass
class _Search:
    """The search for the fewest lanes that fit, by running them.

    Attributes:
        predictor: What is asked for, and the budget.
        start_over: Puts back what training changed.
        splits: What may be tried, fewest steps first.
    """

    predictor: MemoryPredictor
    start_over: Callable[[], None]
    splits: list[Split]

    def run(self) -> LanesFound:
        """Try more lanes until a window fits, then fewer."""
        failures_found: dict[int, str] = {}
        at, best = 0, None
        while best is None:
            found, failure = self._tried(self.splits[at])
            if found is not None:
                best = at, found
                break
            failures_found[at] = failure
            if at == len(self.splits) - 1:
                raise self._nothing_fits(failure)
            wanted = STEPS_FACTOR * len(self.splits[at])
            later = (i for i in range(at + 1, len(self.splits)) if len(self.splits[i]) >= wanted)
            at = next(later, len(self.splits) - 1)
        for _ in range(TRIES):
            low = max((i for i in failures_found if i < best[0]), default=best[0])
            if best[0] - low <= 1:
                break
            middle = (low + best[0]) // 2
            found, failure = self._tried(self.splits[middle])
            if found is not None:
                best = middle, found
            else:
                failures_found[middle] = failure
        tried = tuple(f"{len(self.splits[i])} lanes {text}" for i, text in sorted(failures_found.items()))
        return replace(best[1], tried=tried)

    def _tried(self, split: Split) -> tuple[LanesFound | None, str]:
        predictor = self.predictor
        self.start_over()
        try:
            measured, failure = run_for_real(predictor, split)
        except OutOfMemory as error:  # of the host, whatever the number of lanes
            raise DoesNotFit(error.what, error.why, error.hint, missing_bytes=1) from None
        if failure is not None:
            return None, failure
        peak = int(measured.peak_bytes)  # type: ignore[union-attr]
        if not predictor.holds(measured) or peak > predictor.usable_bytes:
            return None, f"reserved {show_bytes(peak)}, with a margin of 2 % to keep"
        phases = dict(predictor.phases(split))
        phases.pop(LATER, None)
        store = predictor.subject.context.host_store
        used = (0, 0) if store is None else (store.bytes, store.saved_bytes)
        return LanesFound(Solution(split, 1), measured, peak, {**phases, FIRST: peak}, *used), ""

    def _nothing_fits(self, failure: str) -> DoesNotFit:
        split, budget = self.splits[-1], self.predictor.budget
        return DoesNotFit(
            f"Not even {len(split)} lanes of {split[0]} fit: their window {failure}; the budget is "
            f"{show_bytes(budget.bytes)}.",
            "At each normalization its input is on the device for all lanes.",
            "What would help: a larger budget, a smaller target, or batchnorm='frozen', which is exact, too.",
            missing_bytes=1,
        )


def with_lanes(plan: Plan, found: LanesFound, context: TrainingContext) -> Plan:
    """State in a plan what recording or running windows in lanes showed.

    Args:
        plan: The plan.
        found: What was found.
        context: What was trained: what may move to the host, and what does.
    """
    if plan.accumulation_steps == 1:
        return plan
    reasons, note = _reasons(plan, found)
    peak = max(found.phases, key=lambda name: found.phases[name])
    memory = replace(
        plan.memory,
        predicted_peak_bytes=found.peak_bytes,
        phases=found.phases,
        binding_constraint=f"{PHASE_TITLES[peak]}, this process",
        history_bytes=0,
        plain_loop_peak_bytes=None,
        host_bytes=found.host_bytes,
        host_limit_bytes=context.host_memory_bytes,
        moved_bytes_per_sample=context.moved_bytes_per_sample,
        moved_parts=context.moved_parts,
        moved_bytes=found.moved_bytes,
        stayed_bytes=found.stayed_bytes,
        recomputes=context.recomputes,
        recomputed_bytes=found.recomputed_bytes,
        spared_bytes=found.spared_bytes,
        retries=found.retries,
        composition={},
        timeline=(),
    )
    schedule = replace(
        plan.schedule,
        largest_micro_batch=plan.micro_batch,
        largest_without_retries=None,
        largest_with_expandable_segments=None,
    )
    plan = replace(plan, schedule=schedule)
    provenance = replace(plan.provenance, reasons={**plan.provenance.reasons, **reasons}, notes=(note, *plan.notes))
    if not plan.on_cuda:
        return replace(plan, memory=memory, provenance=provenance)
    peak_here = found.peak_bytes if found.predicted is None else found.predicted
    evidence = replace(
        plan.evidence, method="replayed" if found.method else "bracketed", this_process_peak_bytes=peak_here
    )
    device = replace(plan.device, keeps_workspaces=False) if found.method else plan.device
    return replace(plan, memory=memory, evidence=evidence, provenance=provenance, device=device)


def _reasons(plan: Plan, found: LanesFound) -> tuple[dict[str, str], str]:
    """Return the reasons by field, and a note on lanes."""
    if not plan.on_cuda:
        method = "a window in lanes is planned as one micro-batch of all its samples"
        fewer = "fewer steps need no less memory on a CPU, and are not slower"
        return {"method": method, "fewer_steps": fewer}, f"{MEET}: {method}."
    if found.method:
        fewer = "fewer lanes, each with more samples, need more than the budget"
        if found.host_binds:
            fewer = "fewer lanes leave less room for what they save, and the host may not hold the rest"
        reasons = {
            "method": found.method,
            "accumulation_steps": "the fewest lanes whose window fits the budget, and 2 % less",
            "fewer_steps": fewer,
        }
        return reasons, f"{MEET}."
    method = "windows in lanes were run, each number of steps separately"
    tried = f"; {', '.join(found.tried)}" if found.tried else ""
    reasons = {
        "method": method,
        "accumulation_steps": f"the fewest lanes that fit by running them{tried}",
        "fewer_steps": f"fewer lanes were not found to fit{tried}",
    }
    why = f" They could not be predicted: {found.fallback_reason}." if found.fallback_reason else ""
    return reasons, f"{MEET}: {method}.{why}"
