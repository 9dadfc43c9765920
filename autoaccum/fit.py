"""fit_plan: from a workload to a plan. The page to read first.

    record   the window at small sizes              observe.py, record_cpu.py
    lift     its sizes, as functions of the batch   program.py
    replay   any window by the allocator's rules    allocator.py
    solve    for the fewest steps that fit          solve.py
    verify   by running that window for real        here

On the way the model is really trained, so all of it is put back afterwards (restore.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from . import assemble, cpu, observe, restore, step, tree
from . import split as cutting
from .allocator import Start
from .budget import Budget
from .errors import DoesNotFit, UsageError
from .infer import infer_sample
from .observe import Observed, Subject
from .plan import Plan
from .recording import Phase, kept_blocks, live_peak
from .solve import Solution, Split, balanced, largest_micro_batch, share_of, smallest_steps
from .workload import Workload

CAPACITY_MARGIN = 0.02  # a plan still fits when there turns out to be this much less
DEFAULT_MALLOC_SLACK = 0.25  # of what training takes: how far the default malloc's fragmentation was seen to go
MALLOCS = ("fixed", "default")
AGREES_WITHIN = 0.02  # of the whole peak: a verification that differs by more teaches instead of confirming
ATTEMPTS = 4
VERIFIED_STEPS = 3  # micro-batches of a verified window: a fourth repeats the third
SEARCH_LIMIT = 1 << 20  # where to stop looking for the largest micro-batch when nothing asks for more


@dataclass(frozen=True)
class Wish:
    """What a plan is asked for."""

    target_batch: int | None
    samples: int | None  # this rank's share of it
    world_size: int
    budget: str | int | None
    headroom: str | int | None
    least: int
    most: int
    histories: tuple[str, ...] = ("fresh", "here")


@dataclass
class Outlook:
    """What is there to be used, and what is known so far."""

    subject: Subject
    wish: Wish
    observed: Observed
    base_bytes: int  # of a fresh process before it trains, holes in its heap included
    fresh: Start
    start: Start
    budget: Budget
    sample_bytes: int

    @property
    def usable_bytes(self) -> int:
        """What the peak may come to, so that it still fits with a little less."""
        return int(self.budget.bytes * (1 - CAPACITY_MARGIN))

    def data_bytes(self, samples: int) -> int:
        """What the samples of a window take on the device before they are used."""
        size: int = self.subject.device.data_bytes(samples * self.sample_bytes)
        return size

    def peak_bytes(self, split: Split, history: str) -> int:
        """What the process comes to with that window, in a fresh process or in this one."""
        held = self.base_bytes + self.data_bytes(sum(split))
        if history == "fresh":
            return held + observe.peak_of(self.subject, self.observed, split, self.fresh).peak_bytes
        inside = self.start.heap_free_bytes - self.fresh.heap_free_bytes
        return held + inside + observe.peak_of(self.subject, self.observed, split, self.start).peak_bytes

    @property
    def slack(self) -> float:
        """Part of what training takes that may come on top, unpredictably."""
        return 0.0 if self.subject.mmap_threshold_bytes is not None else DEFAULT_MALLOC_SLACK

    def worst_bytes(self, split: Split) -> int:
        """The same for the worse of the histories that the plan is for."""
        worst = max(self.peak_bytes(split, history) for history in self.wish.histories)
        return worst + int(self.slack * (worst - self.base_bytes))

    def fits(self, split: Split) -> bool:
        """Whether that window fits, with a little less than there is."""
        try:
            return self.worst_bytes(split) <= self.usable_bytes
        except LookupError:
            return False

    def floor(self, n: int) -> int:
        """Bytes without which no window whose first micro-batch is n can run."""
        return self._floor(n, later=False)

    def later_floor(self, n: int) -> int:
        """Bytes without which no window that has a later micro-batch of n can run."""
        return self._floor(n, later=True)

    def _floor(self, n: int, *, later: bool) -> int:
        data = self.data_bytes(self.wish.samples or n)
        base = self.base_bytes - self.fresh.heap_free_bytes  # which small blocks may fill
        return base + int((1 + self.slack) * (data + observe.floor_of(self.observed, n, later=later)))


def fit_plan(
    workload: Workload | torch.nn.Module,
    sample: Any = None,
    *,
    target_batch: int | None = None,
    device: str | torch.device | None = None,
    budget: str | int | None = None,
    headroom: str | int | None = None,
    max_micro_batch: int | None = None,
    min_micro_batch: int | None = None,
    verify: bool = True,
    rank: int = 0,
    world_size: int = 1,
    elsewhere: bool = False,
    malloc: str = "fixed",
    progress: Callable[[str], None] | None = None,
    **how: Any,
) -> Plan:
    """Finds the fewest accumulation steps whose window fits, and checks them by running one.

    Afterwards parameters, buffers, optimizer, gradients, modes, random states and plain attributes are bitwise as
    before, also after an exception or Ctrl-C. On the CPU one thing stays: malloc's mmap threshold is fixed, which the
    plan holds for (see `Plan.mmap_threshold_bytes`).

    Args:
        workload: What is trained; or the model alone, with the rest of `Workload`'s arguments beside it.
        sample: A small batch of real data, where a model is given. Left out, it is inferred where the model tells.
        target_batch: Samples in an optimizer step, over all ranks. Left out: one micro-batch, the largest that fits.
        device: Where to train; left out, where the model is.
        budget: What the whole process may use, in bytes or like "2GiB". Left out: what the machine has free.
        headroom: Bytes or percent of that to keep free.
        max_micro_batch: The largest micro-batch allowed.
        min_micro_batch: The smallest allowed. Left out: 2 where the model takes batch statistics, else 1.
        verify: Whether to run the plan's window for real.
        rank: This process's rank.
        world_size: Ranks that share the target.
        elsewhere: Whether another process will train, so that what planning leaves behind in this one doesn't matter.
        malloc: On the CPU. "fixed": blocks from 128 KiB on become mappings, so that memory can be predicted to a
            percent, at the price of fresh pages; "default": the C library's own way, faster, and a quarter is kept
            free for its fragmentation.
        progress: Called with what is being done.
        **how: `Workload`'s own arguments, where a model is given.

    Returns:
        The plan.

    Raises:
        UsageError: An argument that can't be used.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    started = time.perf_counter()
    workload, assumed = _as_workload(workload, sample, how)
    wish = _wish(workload, target_batch, budget, headroom, max_micro_batch, min_micro_batch, rank, world_size)
    if malloc not in MALLOCS:
        raise UsageError(f"malloc {malloc!r} is not known.", hint="Use malloc='fixed' or malloc='default'.")
    if elsewhere:
        wish = replace(wish, histories=("fresh",))
    module = _device_module(workload.model, device)
    threshold = module.prepare(malloc)
    with _as_it_was(workload) as snapshot:
        parts = step.open_parts(replace(workload, scheduler=None))  # it may have few steps, and takes no memory
        subject = Subject(parts, workload, module, threshold, progress or (lambda text: None))

        def start_over() -> None:
            snapshot.restore()
            _make_ready(parts, owns_optimizer=parts.optimizer is not workload.optimizer)
            module.clean()

        start_over()
        outlook = _look(subject, wish, snapshot.host_bytes, start_over)
        solution, measured = _solve_and_verify(outlook, start_over, verify=verify)
        plan = assemble.plan(outlook, solution, measured, workload, assumed)
    return replace(plan, seconds=time.perf_counter() - started)


def _as_workload(workload: Any, sample: Any, how: dict[str, Any]) -> tuple[Workload, str | None]:
    """The workload, and what was assumed where no sample was given."""
    if not isinstance(workload, Workload):
        if not isinstance(workload, torch.nn.Module):
            raise UsageError(
                f"fit_plan was given {type(workload).__name__}, neither a Workload nor a torch.nn.Module.",
                hint="fit_plan(Workload(model, sample, ...), target_batch=512) or fit_plan(model, sample, ...)",
            )
        try:
            workload = Workload(workload, sample, **how)
        except TypeError as error:
            raise UsageError(
                f"{error}.".replace("Workload.__init__()", "fit_plan"), hint="See help(Workload)."
            ) from None
    elif sample is not None or how:
        given = ", ".join(["sample"] * (sample is not None) + list(how))
        raise UsageError(f"{given}: given beside a Workload.", hint="Give it to the Workload itself.")
    if workload.sample is not None:
        return workload, None
    inferred, assumed = infer_sample(workload.model)
    return replace(workload, sample=inferred), assumed


def _wish(
    workload: Workload,
    target_batch: int | None,
    budget: str | int | None,
    headroom: str | int | None,
    most: int | None,
    least: int | None,
    rank: int,
    world_size: int,
) -> Wish:
    for name, value in (("target_batch", target_batch), ("max_micro_batch", most), ("min_micro_batch", least)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}: a number of samples, at least 1.", hint=f"Give {name}=512, say.")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} of {world_size} ranks.", hint="Ranks count from 0 to world_size - 1.")
    if target_batch is not None and target_batch < world_size:
        raise UsageError(
            f"A target batch of {target_batch} can't be shared by {world_size} ranks.",
            "Each needs at least one sample.",
            f"Give a target of at least {world_size}, or fewer ranks.",
        )
    _sample_size(workload)
    samples = None if target_batch is None else share_of(target_batch, world_size, rank)
    least = least or (2 if _takes_batch_statistics(workload.model) else 1)
    most = min(most or SEARCH_LIMIT, samples or SEARCH_LIMIT)
    if least > most:
        raise UsageError(
            f"The smallest micro-batch allowed, {least}, is above the largest, {most}.",
            "Batch normalization in train mode needs 2 samples." if least == 2 else "",
            "Raise the target, or max_micro_batch.",
        )
    if samples is not None and samples // least < -(-samples // most):
        raise UsageError(
            f"{samples} samples can't be cut into micro-batches of at least {least} and at most {most}.",
            "Batch normalization in train mode needs 2 samples." if least == 2 else "",
            f"Allow micro-batches of {most + 1}, or change the target by one.",
        )
    return Wish(target_batch, samples, world_size, budget, headroom, least, most)


def _sample_size(workload: Workload) -> int:
    return cutting.batch_size(workload.sample, shared=workload.shared, per_sample=workload.per_sample)


def _takes_batch_statistics(model: torch.nn.Module) -> bool:
    kind = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, kind) and (module.training or not model.training) for module in model.modules())


def _device_module(model: torch.nn.Module, device: str | torch.device | None) -> ModuleType:
    here = next(model.parameters()).device
    wanted = torch.device(device) if device is not None else here
    if wanted.type != here.type:
        raise UsageError(f"The model is on {here}, not on {wanted}.", hint=f"Move it first: model.to({str(wanted)!r})")
    if wanted.type != "cpu":
        raise UsageError(
            f"Planning for {wanted.type} is not there yet: this version plans for the CPU.",
            hint="Plan with the model on the CPU, or follow the project's CHANGELOG.",
        )
    return cpu


@contextmanager
def _as_it_was(workload: Workload) -> Iterator[restore.Snapshot]:
    """Puts back, whatever happens, all that training changes."""
    optimizer, scheduler = workload.optimizer, workload.scheduler
    with restore.kept(
        model=workload.model,
        optimizer=optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
        scaler=workload.scaler,
        scheduler=scheduler if hasattr(scheduler, "step") else None,
    ) as snapshot:
        yield snapshot


def _make_ready(parts: step.Parts, *, owns_optimizer: bool) -> None:
    """Train mode, no gradients, and no state in an optimizer that was made for the occasion."""
    if not parts.model.training:
        parts.model.train()
    parts.model.zero_grad(set_to_none=True)
    parts.optimizer.zero_grad(set_to_none=True)
    if owns_optimizer:
        parts.optimizer.state.clear()


def _look(subject: Subject, wish: Wish, snapshot_bytes: int, start_over: Callable[[], None]) -> Outlook:
    """Records until the answer is predicted, then reads what there is to be used."""
    sample_bytes = bytes_per_sample(subject)
    before = subject.device.read_heap()

    def outlook(observed: Observed, state_bytes: int) -> Outlook:
        base = subject.device.read_base(before)
        base_bytes = base.bytes - snapshot_bytes - state_bytes
        budget = subject.device.read_budget(wish.budget, wish.headroom)
        return Outlook(subject, wish, observed, base_bytes, base.fresh, base.here, budget, sample_bytes)

    def answer(observed: Observed) -> int:
        solution = _solve(outlook(observed, observed.state_bytes))
        return solution.split[0] if solution is not None else 0

    def allowed(observed: Observed, n: int) -> bool:
        return _is_sure_to_fit(outlook(observed, observed.state_bytes), n)

    observed = observe.observe(subject, answer, allowed, wish.least)
    if observed.doubt is not None:
        observe.bracket(subject, observed, allowed, min(wish.most, SEARCH_LIMIT))
    start_over()
    return outlook(observed, state_bytes=0)


def _is_sure_to_fit(outlook: Outlook, n: int) -> bool:
    """Whether recording at n can't go over the budget, by the most pessimistic of what is known."""
    observed = outlook.observed
    room = outlook.usable_bytes - outlook.base_bytes - outlook.data_bytes(2 * n)
    if observed.recordings and observed.doubt is None and len(observed.recordings) > 1:
        return observe.peak_of(outlook.subject, observed, (n, n)).peak_bytes <= room
    gradients = sum(p.nbytes for p in outlook.subject.parts.model.parameters() if p.requires_grad)
    steady = gradients + observed.state_bytes  # it is there whatever the batch
    if observed.recordings:
        known, peak = observed.recordings[-1].micro_batch, observed.notes[-1].measured_bytes
    else:
        # The first step makes the gradients and the state itself: only what comes on top of them is of the batch.
        kept = {event.block for event in kept_blocks(observed.prelude)}
        passing = tuple(event for event in observed.prelude if event.block not in kept)
        known = observe.SCOUT
        peak = steady + max(0, live_peak([Phase(observe.PRELUDE, passing)]) - gradients)
    scaling = max(peak - steady, peak // 10)  # all the rest growing with the batch is the worst there is
    return peak + scaling * max(0, n - known) // known <= room


def bytes_per_sample(subject: Subject) -> int:
    """What one sample more adds to a batch; what all samples share adds nothing."""
    one, two = (
        sum(leaf.nbytes for _, leaf in tree.leaves(subject.tile(n)) if isinstance(leaf, torch.Tensor)) for n in (1, 2)
    )
    return two - one


def _solve(outlook: Outlook) -> Solution | None:
    wish, budget = outlook.wish, outlook.usable_bytes
    if wish.samples is not None:
        return smallest_steps(
            outlook.fits,
            outlook.floor,
            samples=wish.samples,
            budget_bytes=budget,
            least=wish.least,
            most=wish.most,
            later_floor=outlook.later_floor,
        )
    most = wish.most if outlook.observed.doubt is None else outlook.observed.recordings[-1].micro_batch
    size = largest_micro_batch(outlook.fits, outlook.floor, budget_bytes=budget, most=most, steps=1)
    return Solution((size,), 1) if size >= wish.least else None


def _solve_and_verify(
    outlook: Outlook, start_over: Callable[[], None], *, verify: bool
) -> tuple[Solution, cpu.Measured | None]:
    """Solves, runs the answer for real, and where that was another than predicted, learns and solves again."""
    for attempt in range(ATTEMPTS):
        solution = _solve(outlook)
        if solution is None:
            raise _does_not_fit(outlook)
        if not verify:
            return solution, None
        split = solution.split[:VERIFIED_STEPS]
        if attempt:
            start_over()
        measured = _run_for_real(outlook.subject, split)
        present = outlook.base_bytes - outlook.fresh.heap_free_bytes + outlook.start.heap_free_bytes
        predicted = outlook.peak_bytes(split, "here") - present
        whole = outlook.base_bytes + predicted
        if abs(measured.increment_bytes - predicted) <= AGREES_WITHIN * whole + outlook.slack * predicted:
            return solution, measured
        if outlook.observed.doubt and outlook.base_bytes + measured.increment_bytes <= outlook.usable_bytes:
            return solution, measured  # without a program, that it fits for real is all there is to know
        outlook.subject.say(f"took {measured.increment_bytes:,} bytes, not {predicted:,}: learning from it")
        _learn(outlook, split[0], last=attempt >= 1)
    raise DoesNotFit(
        f"No plan could be confirmed in {ATTEMPTS} attempts: windows of one size take different amounts of memory.",
        "What a window allocates seems to depend on chance or on the data.",
        "Plan with more headroom (--headroom 20%), or with verify=False.",
    )


def _learn(outlook: Outlook, n: int, *, last: bool) -> None:
    """Records at the size that surprised; where that is a surprise too, or the second one, gives up on predicting."""
    observed = outlook.observed
    if observed.doubt is not None:  # it took more than its own recording: leave it out
        observed.recordings = [r for r in observed.recordings if r.micro_batch < n] or observed.recordings[:1]
        observed.notes = [note for note in observed.notes if note.micro_batch < n] or observed.notes[:1]
        return
    known = [recording.micro_batch for recording in observed.recordings]
    near = next((size for size in (observe.prime_near(n), n) if size > known[-1]), None)
    if near is not None:
        observe.add(outlook.subject, observed, near)
    observed.doubt = observe.doubt_of_last(observed)
    if last and observed.doubt is None:
        observed.doubt = "windows took another amount of memory than their recordings, so each size was tried by itself"
    if observed.doubt is not None:
        observe.bracket(outlook.subject, observed, lambda _, size: _is_sure_to_fit(outlook, size), outlook.wish.most)


def _run_for_real(subject: Subject, split: Split) -> cpu.Measured:
    """The first optimizer step and two windows, as the Runner would run them, watched."""
    subject.say(f"verifying {len(split)} micro-batches of {split[0]}")

    def work() -> None:
        for sizes in (split[:1], split, split):
            pieces = [subject.tile(size) for size in sizes]
            step.train_window(subject.parts, pieces, sizes)
            step.run_between(subject.parts)

    measured: cpu.Measured = subject.device.measure(work)
    return measured


def _does_not_fit(outlook: Outlook) -> DoesNotFit:
    wish = outlook.wish
    samples = wish.samples or wish.least
    split = balanced(samples, samples // wish.least)
    try:
        needed = outlook.worst_bytes(split)
    except LookupError:
        needed = outlook.usable_bytes + 1
    return assemble.does_not_fit(outlook, split, int(needed / (1 - CAPACITY_MARGIN)))
