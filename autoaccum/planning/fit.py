"""Plan a workload: the main path, to read first.

    record   the window at small sizes              planning/schedule.py, record.py, rehearsal.py; devices/*/
    lift     its sizes, as functions of the batch   simulation/program.py
    replay   any window by the allocator's rules    simulation/malloc.py, simulation/cuda_allocator/allocator.py
    solve    for the fewest steps that fit          simulation/solver.py
    verify   by running that window for real        planning/verify.py, trial.py (compiled models: window/compiled.py)
    time     smaller ones, for the knee             planning/fastest.py, timing.py, simulation/knee.py
    check    that its gradient is the large batch's exactness/check.py

Planning trains the model for a few windows, so its state is restored afterwards (state/snapshot.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..data.sample import at_longest, with_sample
from ..devices import oom
from ..devices.base import CACHING_ALLOCATOR, MALLOC, Device
from ..devices.registry import get_device
from ..errors import UsageError
from ..exactness import check as exact
from ..plan import FASTEST, FEWEST_STEPS, Plan
from ..ranks.exchange import Alone
from ..ranks.group import are_absent, place_here
from ..ranks.sharded import device_of, drop_unfinished, reduce_always, settle_shards
from ..ranks.wrapped import refuse_unsupported, unwrapped
from ..simulation.recording import Event
from ..simulation.solver import Solution
from ..state import snapshot as restore
from ..state.appended import keeper
from ..state.closures import Holdings, holdings
from ..torch_compat import hooks_of_users
from ..window import compiled, step
from ..window.over_ranks import reduction_of
from ..window.trained_parameters import left_out_note
from ..workload import Workload, as_workload
from . import build_plan, failures, lanes, predictor_cpu, schedule
from .absent_ranks import absent_ranks
from .evidence import Evidence
from .fastest import fastest, time_smaller
from .follow import DONE, Procession
from .groups import plan_in_groups
from .over_ranks import plan_over_ranks, request_here
from .predictor import MemoryPredictor
from .record import FIRST_STEP_SAMPLES, train_before_recording
from .request import PlanRequest
from .resolved_request import SEARCH_LIMIT, ResolvedRequest, resolve
from .short_rows import most_short_rows
from .solution import guess
from .target import RecordingTarget, one_after_the_other
from .target_tokens import tokens_to_samples
from .trial import compile_at_answer
from .verify import solve_and_verify

if TYPE_CHECKING:
    from .kept_plans import KeptPlans


@dataclass(frozen=True)
class PlanningEnvironment:
    """Hold the device and the functions that planning uses.

    Attributes:
        device: The device.
        make_predictor: Makes the memory predictor for it.
        model_events: The allocations of the model as a new process makes them; None where they were not recorded.
        keep: Whether the workload's state must be restored; False in a process that ends with the plan.
        progress: Called with progress messages.
        subject: The recording target's class, which makes the batches.
        procession: The ranks that plan a sharded model together.
    """

    device: Device
    make_predictor: Callable[..., MemoryPredictor]
    model_events: tuple[Event, ...] | None = None
    keep: bool = True
    progress: Callable[[str], None] = lambda text: None
    subject: type[RecordingTarget] = RecordingTarget
    procession: Procession | None = None


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
    check: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
    shares: str | tuple[int, ...] | None = None,
    train_in_new_process: bool = False,
    malloc: str = "cached",
    objective: str = FEWEST_STEPS,
    timing_seconds: float | None = None,
    uniform: bool = False,
    host_memory: str | int | None = None,
    progress: Callable[[str], None] | None = None,
    **workload_kwargs: Any,
) -> Plan:
    """Find the fewest accumulation steps that fit, and verify them.

    Afterwards, or after an exception, parameters, buffers, optimizer, modes and random states are bitwise as before.

    Args:
        workload: The workload; or its model, with `Workload`'s other arguments as keywords.
        sample: A small batch of real data, if a model is given; None to infer it from the model.
        target_batch: Samples in an optimizer step, over all ranks; None for one micro-batch, the largest that fits.
        device: The device that the model must be on; None for any.
        budget: Memory that the whole process may use, in bytes or like "2GiB"; None for all free memory.
        headroom: Bytes or percent of the budget to keep free.
        max_micro_batch: The largest micro-batch allowed, in samples.
        min_micro_batch: The smallest allowed; None for 2 if the model uses batch statistics, else 1.
        verify: Whether to run the plan's window.
        check: Whether to test on the sample that the window's gradient is the large batch's (`Plan.exactness`).
        rank: This process's rank; None for that of the initialised process group, all of whose ranks call this.
        world_size: Number of ranks that share the target; likewise.
        shares: "equal", "speed", "memory", or each rank's samples; None: equal on equal devices, else by speed.
        train_in_new_process: Whether another process will train, so that the plan need not hold in this one.
        malloc: On the CPU, "cached": freed pages are kept; "fixed": large blocks are mapped; "default" (docs/cpu.md).
        objective: "fewest-steps", the largest micro-batches; "fastest", the smallest within 1 % of the fastest step.
        timing_seconds: Seconds to time smaller micro-batches for; None for 15 % of planning, at most 3 (30: fastest).
        uniform: Whether all micro-batches must have one size, for trainers that know only one.
        host_memory: What lanes on a GPU may keep on the host, like "24GiB"; None for 90 % of what is available.
        progress: Called with progress messages.
        **workload_kwargs: `Workload`'s other arguments, if a model is given.

    Raises:
        UsageError: An argument is invalid.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    request = PlanRequest(target_batch, budget, headroom, max_micro_batch, min_micro_batch,
        *request_here(rank, world_size), objective, timing_seconds, verify, check, malloc, train_in_new_process,
        uniform=uniform, shares=shares, host_memory=host_memory,
    )  # fmt: skip
    return plan_workload(as_workload(workload, sample, workload_kwargs), request, device=device, progress=progress)


def plan_workload(
    workload: Workload,
    request: PlanRequest,
    *,
    device: str | torch.device | None = None,
    progress: Callable[[str], None] | None = None,
    kept: KeptPlans | None = None,
    procession: Procession | None = None,
) -> Plan:
    """Plan a workload on its model's device.

    The same as `fit_plan`, with a request in place of arguments.

    Args:
        workload: The workload; without a sample, one is inferred from the model if possible.
        request: The request.
        device: The device that the model must be on; None for any.
        progress: Called with progress messages.
        kept: Where an earlier plan may be found, and this one is kept; None for nowhere.
        procession: The ranks that plan a sharded model together.

    Raises:
        UsageError: The request cannot be met, whatever the memory.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    if (place := place_here()) is not None:
        here = partial(plan_workload, device=device, progress=progress)
        return plan_over_ranks(place, workload, request, here)
    started = time.perf_counter()
    workload, text = with_sample(workload if are_absent() else unwrapped(workload)[0])
    assumed = f"Assumed, as no sample was given: {text}." if text else ""
    environment = replace(_environment_of(workload.model, device), procession=procession)
    if progress is not None:
        environment = replace(environment, progress=progress)

    def make() -> Plan:
        with contextlib.nullcontext() if procession is None else procession.telling_the_end():
            plan = plan_in(environment, workload, request, assumed=assumed)
        return replace(plan, provenance=replace(plan.provenance, planning_seconds=time.perf_counter() - started))

    return make() if kept is None else kept.answer(environment.device, workload, request, make)


def plan_in(
    environment: PlanningEnvironment, workload: Workload, plan_request: PlanRequest, *, assumed: str = ""
) -> Plan:
    """Record, solve and verify in an environment.

    Args:
        environment: The environment.
        workload: The workload, with a sample.
        plan_request: The request.
        assumed: A remark on an assumed sample, for the plan's notes.

    Raises:
        UsageError: The request cannot be met, whatever the memory.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    plan_samples = partial(_plan_samples, environment, assumed=assumed)
    plan_request, remark = tokens_to_samples(plan_request, workload)
    with absent_ranks(workload.model, plan_request) as request:
        make = partial(plan_in_groups, plan_samples) if workload.samples_per_group > 1 else plan_samples
        return build_plan.with_note(make(workload, request), remark)


def _plan_samples(
    environment: PlanningEnvironment, workload: Workload, plan_request: PlanRequest, *, assumed: str
) -> Plan:
    """Plan; where the sample is grouped, a group counts as one sample."""
    request = resolve(plan_request, workload, computes=environment.device.computes)
    refuse_unsupported(workload, ranks=1)  # before any forward: its collectives would wait for ranks that don't plan
    started, threshold = time.perf_counter(), environment.device.prepare(plan_request.malloc)
    sample, lengthened = at_longest(workload)
    longest, held = replace(workload, sample=sample), _held(workload)
    with contextlib.ExitStack() as stack:
        environment.device.clean()
        filled_bytes = stack.enter_context(environment.device.holes_filled(threshold))
        snapshot = stack.enter_context(_as_it_was(workload, held)) if environment.keep else None
        stack.callback(drop_unfinished, workload.model)
        context = _context_of(workload, request, plan_request)
        left_out, makes_state = left_out_note(context), not context.optimizer.state
        subject = environment.subject(
            context, longest, environment.device, threshold, environment.progress, environment.model_events
        )
        subject = replace(subject, remove_appended=keeper(held))

        def start_over() -> None:
            subject.remove_appended()
            drop_unfinished(workload.model)
            if snapshot is not None:
                snapshot.restore()
            _make_ready(context, makes_state=makes_state)
            environment.device.clean()

        procession = environment.procession
        if procession is not None:
            subject, start_over = procession.target(subject), procession.starting_over(start_over)
            if not procession.leads:
                return procession.follow(subject, start_over)
        start_over()
        recording = stack.enter_context(contextlib.ExitStack())
        recording.enter_context(one_after_the_other(context))
        filled_bytes += stack.enter_context(environment.device.holes_filled(threshold))  # where gradients were
        subject = replace(subject, heap_before=environment.device.read_heap(), filled_bytes=filled_bytes)
        compiles = plan_request.verify and compiled.runs_compiled(context)
        predictor = _record_and_predict(
            environment, subject, request, snapshot.host_bytes if snapshot else 0, start_over, compiles=compiles
        )
        recording.close()
        solution, measured, in_lanes = _solve(predictor, start_over, plan_request, compiles=compiles)
        timeable = None if in_lanes else measured
        timed = time_smaller(predictor, solution, timeable, time.perf_counter() - started, start_over)
        if request.objective == FASTEST:
            solution, measured = fastest(predictor, solution, measured, timed, start_over)
        tries_rows = measured is not None and not compiles and in_lanes is None
        rows = most_short_rows(predictor, solution, start_over) if tries_rows else None
        plan = build_plan.plan(predictor, solution, measured, longest, [assumed, lengthened, left_out], timed, rows)
        plan = plan if in_lanes is None else lanes.with_lanes(plan, in_lanes, context)
        if plan_request.check:  # before the state is restored: a forward may change any state
            start_over()
            plan = exact.check_plan(plan, workload, environment.progress, time.perf_counter() - started)
        start_over()  # the plan's figures for this process hold for its state before planning, its cache empty
        if procession is not None:
            procession.say(DONE, plan.to_json())
        return plan


def _context_of(workload: Workload, request: ResolvedRequest, plan_request: PlanRequest) -> step.TrainingContext:
    """Return the context of what is recorded."""
    context = step.open_context(replace(workload, scheduler=None))  # it may allow few steps, and uses no memory
    exchanges = plan_request.exchanges  # then a loss over representations has those of all ranks
    context.window_samples = plan_request.target_batch if exchanges else request.samples
    if exchanges:
        context.exchange = Alone(reduction_of(context), plan_request.world_size)
    return context


def _solve(
    predictor: MemoryPredictor, start_over: Callable[[], None], request: PlanRequest, *, compiles: bool
) -> tuple[Solution, Any, lanes.LanesFound | None]:
    """Return the solution and its measurement, and what lanes showed."""
    if not predictor.subject.context.runs_in_lanes:
        return (*solve_and_verify(predictor, start_over, verify=request.verify, compiles=compiles), None)
    predictor.subject.context.host_memory_bytes = lanes.host_limit_bytes(request)
    found = lanes.solve_in_lanes(predictor, start_over, verify=request.verify)
    return found.solution, found.measured, found


def _environment_of(model: torch.nn.Module, device: str | torch.device | None) -> PlanningEnvironment:
    here = device_of(next(model.parameters()))
    wanted = torch.device(device) if device is not None else here
    if wanted.type != here.type:
        raise UsageError(f"The model is on {here}, not on {wanted}.", hint=f"Move it first: model.to({str(wanted)!r})")
    return environment_for(here)


def environment_for(torch_device: torch.device) -> PlanningEnvironment:
    """Make the environment for planning on a device.

    Raises:
        UsageError: There is no support for that type of device.
    """
    device = get_device(torch_device)
    if device.memory_model == MALLOC:
        return PlanningEnvironment(device, predictor_cpu.make_predictor)
    from . import predictor_cuda  # the caching allocator's rules aren't loaded for a CPU

    return PlanningEnvironment(device, predictor_cuda.make_predictor)


def _held(workload: Workload) -> Holdings:
    """Find the objects that the workload's functions and hooks hold."""
    functions = {name: getattr(workload, name) for name in ("loss", "encode", "count", "between_steps", "metric")}
    return holdings(workload.model, **functions, hooks=hooks_of_users(workload.model, workload.optimizer))


@contextlib.contextmanager
def _as_it_was(workload: Workload, held: Holdings) -> Iterator[restore.Snapshot]:
    """Restore all state that training changes at exit."""
    optimizer, scheduler = workload.optimizer, workload.scheduler
    settle_shards(workload.model)
    reduce_always(workload.model)
    with restore.kept(
        model=workload.model,
        optimizer=optimizer if isinstance(optimizer, torch.optim.Optimizer) else None,
        scaler=workload.scaler,
        scheduler=scheduler if hasattr(scheduler, "step") else None,
        held=held,
    ) as snapshot:
        yield snapshot


def _make_ready(context: step.TrainingContext, *, makes_state: bool) -> None:
    """Set train mode; drop gradients and the state that planning made."""
    if not context.model.training:
        context.model.train()
    context.model.zero_grad(set_to_none=True)
    context.optimizer.zero_grad(set_to_none=True)
    if makes_state:
        context.optimizer.state.clear()


def _record_and_predict(
    environment: PlanningEnvironment,
    subject: RecordingTarget,
    request: ResolvedRequest,
    snapshot_bytes: int,
    start_over: Callable[[], None],
    *,
    compiles: bool,
) -> MemoryPredictor:
    """Record until the answer is predicted, and return its predictor.

    A compiled model is compiled at the answer's sizes before the budget is read.
    """
    sample_bytes = subject.sample_bytes

    def predictor(evidence: Evidence) -> MemoryPredictor:
        return environment.make_predictor(subject, request, evidence, sample_bytes, snapshot_bytes)

    def chosen(evidence: Evidence) -> schedule.Guess:
        now = predictor(evidence)  # this process's present memory is planning's
        return guess(replace(now, request=replace(request, histories=("new_process",))))

    def allowed(evidence: Evidence, n: int) -> bool:
        too_many = n > begin and begin < FIRST_STEP_SAMPLES  # the next larger size failed its rehearsal
        return not too_many and predictor(evidence).is_sure_to_fit(n)

    evidence, begin = Evidence(), FIRST_STEP_SAMPLES
    try:
        if environment.device.memory_model == CACHING_ALLOCATOR:
            from .rehearsal import samples_to_begin_with  # CUDA's rules aren't loaded for a CPU

            begin = samples_to_begin_with(subject, min(request.least, FIRST_STEP_SAMPLES), start_over)
        else:
            train_before_recording(subject, evidence, request.least, start_over)
        schedule.record_towards_answer(subject, evidence, chosen, allowed, request.least, begin)
    except (RuntimeError, MemoryError) as error:
        if not oom.is_out_of_memory(error):
            raise
        failure = oom.drop_frames(error).removeprefix("NoPlace: ")
        raise failures.ran_out(predictor(Evidence()), failure) from None
    if evidence.fallback_reason is not None:
        schedule.bracket(subject, evidence, allowed, predictor, min(request.most, SEARCH_LIMIT))
    start_over()
    if compiles:
        compile_at_answer(predictor(evidence), start_over)
    return predictor(evidence)
