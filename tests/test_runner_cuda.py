"""The Runner on CUDA, by the real allocator of a virtual GPU: copies, running out of memory, the scaler.

Kernels compute nothing there, so gradients are compared on the CPU (test_oom.py, test_runner.py); what is shown here is
what the device adds: a real `torch.OutOfMemoryError`, blocks, streams. Each case is a process of its own, forked from
one that runs this file.
"""

from __future__ import annotations

import collections
import functools
import gc
import json
import logging
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_process import run_forked
from torch import nn

from autoaccum import PlanMismatch, Runner, Workload, fit_plan
from autoaccum.devices.registry import get_device
from autoaccum.devices.virtual import VirtualGpu, available, control
from autoaccum.phases import LATER
from autoaccum.planning.evidence import Evidence
from autoaccum.planning.record import record_first_step, record_window
from autoaccum.planning.target import RecordingTarget
from autoaccum.torch_compat import TorchDispatchMode
from autoaccum.window import step
from autoaccum.window.hugging_face import Denominator
from autoaccum.window.loss_form import LossForm, LossKind

REASON = available()
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
MIB = 2**20
WIDTH, TARGET, MICRO = 256, 12, 4
PLACES = [(micro_batch, phase) for micro_batch in (1, 2, 3) for phase in ("forward", "backward")]
CASES: dict[str, Callable[[], None]] = {}


def case(check: Callable[[], None]) -> Callable[[], None]:
    CASES[check.__name__] = check
    return check


def on_virtual_gpu(name: str, *arguments: object, gpu: VirtualGpu | None = None) -> str:
    gpu = gpu or VirtualGpu(memory_bytes=4 * 2**30)
    done = run_forked(Path(__file__), name, json.dumps(arguments), gpu=gpu)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


TOGETHER = (
    "a_count_waits_for_nothing",
    "a_loop_reserves_what_the_runner_does",
    "a_loss_counted_on_it",
    "copies_overlap",
    "everything_is_recovered_from",
    "narrower_samples_find_the_planned_segments",
    "the_scaler_works_once_a_window",
)


@functools.cache
def outcomes() -> dict[str, str]:
    """What went wrong in each case, "" where nothing did."""
    return dict(json.loads(on_virtual_gpu("all_of", *TOGETHER).splitlines()[-1]))


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", TOGETHER)
def test_on_the_virtual_gpu(name: str) -> None:
    assert not outcomes()[name], outcomes()[name]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.slow
def test_a_plan_for_one_gpu_is_refused_on_another() -> None:
    plan = on_virtual_gpu("makes_a_plan", gpu=VirtualGpu(name="Virtual A", memory_bytes=2 * 2**30)).splitlines()[-1]
    on_virtual_gpu("takes_a_plan", plan, gpu=VirtualGpu(name="Virtual A", memory_bytes=2 * 2**30))
    with pytest.raises(AssertionError, match=r"PlanMismatch.*device"):
        on_virtual_gpu("takes_a_plan", plan, gpu=VirtualGpu(name="Virtual B", memory_bytes=2 * 2**30))


# --- in a process on the virtual GPU ---------------------------------------------------------------------------------


def workload(**how: Any) -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, 8)).cuda()
    data = torch.utils.data.TensorDataset(*batch(TARGET))
    loader = torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True)
    return Workload(model, batch(4), **{"loader": loader} | how)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 64, WIDTH).mean(1), torch.zeros(n, dtype=torch.long)


def plan_for(work: Workload) -> Any:
    return fit_plan(work, target_batch=TARGET, max_micro_batch=MICRO)


class _HostCopies(TorchDispatchMode):
    """Counts what is copied from the host to the device: of pageable memory each waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_cuda and args and isinstance(args[-1], torch.Tensor):
            self.shapes += [each.shape for each in args if isinstance(each, torch.Tensor) and not each.is_cuda]
        elif isinstance(out, torch.Tensor) and out.is_cuda and func.name() == "aten::_to_copy":
            self.shapes += [args[0].shape] if not args[0].is_cuda else []
        return out


class _Divides(nn.Module):
    """Divides by what the window counts, moved to the device as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> dict[str, Any]:
        summed = nn.functional.cross_entropy(self.linear(x), labels, reduction="sum")
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return {"loss": summed / (count.to(summed.device) if isinstance(count, torch.Tensor) else count)}


@case
def a_count_waits_for_nothing() -> None:
    pieces = [{"x": torch.randn(n, 8), "labels": torch.randint(4, (n,))} for n in (3, 2)]
    context = step.open_context(Workload(_Divides().cuda(), pieces[0]))
    divides = Denominator(shifted=False, passed=True)
    context.loss_form = LossForm(LossKind.LABELS, divides.count, divides)  # kernels compute nothing: it can't be asked
    step.train_window(context, pieces, (3, 2))  # makes the optimizer's state
    with _HostCopies() as copied:
        step.train_window(context, pieces, (3, 2))
    assert [tuple(shape) for shape in copied.shapes] == [(3, 8), (3,), (2, 8), (2,)]


@case
def copies_overlap() -> None:
    """On a stream of their own, ordered by events, within the planned peak; a plain copy on the CPU."""
    work = workload()
    pinned = tuple(leaf.pin_memory() for leaf in batch(TARGET))
    context = step.open_context(work)
    subject = RecordingTarget(context, work, get_device(context.device), None)
    record_first_step(subject, Evidence())
    recording = record_window(subject, MICRO, 3)
    last = [phase for phase in recording.phases if phase.name == LATER][-1]
    side = [event for event in last.events if event.stream]
    assert len(side) == 4, "two leaves come, and the two of the micro-batch before go"
    assert [event.bytes > 0 for event in side] == [True, True, False, False], "in this order: nothing is overwritten"

    orders: list[str] = []
    real_wait, real_copy = torch.cuda.Stream.wait_event, torch.Tensor.to

    def wait(self: Any, event: Any) -> None:
        orders.append("waits")
        real_wait(self, event)

    def copy(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_cuda and kwargs.get("non_blocking"):
            beside = torch.cuda.current_stream() != torch.cuda.default_stream()
            orders.append("copies" if beside else "copies on the computing stream")
        return real_copy(self, *args, **kwargs)

    torch.cuda.Stream.wait_event, torch.Tensor.to = wait, copy  # type: ignore[method-assign]
    try:
        plan = plan_for(work)
        runner = Runner(work, plan)
        orders.clear()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        runner.step(pinned)
        runner.step(pinned)
    finally:
        torch.cuda.Stream.wait_event, torch.Tensor.to = real_wait, real_copy  # type: ignore[method-assign]
    # `wait_stream` waits for an event, too: for the copies, once they are issued.
    micro_batch = ["waits", "copies", "copies", "waits"]
    assert orders == micro_batch[1:] + 5 * micro_batch, orders
    assert torch.cuda.max_memory_reserved() <= plan.predicted_peak_bytes
    plain = workload(loader=None)  # nothing to overlap with, so no memory for it
    with pytest.raises(PlanMismatch, match="copies ahead"):
        Runner(plain, plan)
    orders.clear()
    Runner(plain, plan_for(plain)).step(pinned)
    assert not step.open_context(plain).copies.ahead


class Fault:
    """Runs out of memory for real, at a place: the driver refuses, the allocator gives up.

    No module: a window that starts over puts a module's attributes back, this count among them.
    """

    def __init__(self) -> None:
        self.forwards, self.at = 0, (0, "")
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.alive_at_retry: int | None = None

    def before(self, *_: Any) -> None:
        if self.forwards == self.at[0]:
            self.alive_at_retry = sum(ref() is not None for ref in self.alive)

    def after(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        out = out * 2
        self.alive.append(weakref.ref(out))
        if self.at == (self.forwards, "forward"):
            run_out()
        if self.at == (self.forwards, "backward"):
            out.register_hook(lambda grad: run_out())
        return out


def run_out() -> None:
    control.fail_next(2)  # the allocator asks again once it has emptied its cache
    torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")


@case
def everything_is_recovered_from() -> None:
    fault = Fault()
    work = workload(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    plan = plan_for(work)
    at_start: list[int] = []
    work.model.register_forward_pre_hook(fault.before)
    work.model[1].register_forward_hook(fault.after)
    for place in PLACES:
        runner = Runner(work, plan)
        runner.step(batch(TARGET))
        bring = runner.context.copies.bring

        def noted(piece: Any, bring: Any = bring) -> Any:
            at_start.append(torch.cuda.memory_allocated())
            return bring(piece)

        runner.context.copies.bring = noted  # type: ignore[method-assign]
        fault.forwards, fault.at = 0, place
        fault.alive.clear()
        at_start.clear()
        gc.disable()  # nothing is freed by chance
        result = runner.step(batch(TARGET))
        gc.enable()
        assert result.retries == 1 and result.stepped and runner.number == 2, place
        assert max(result.split) < MICRO and sum(result.split) == TARGET, result.split
        assert at_start[place[0]] == at_start[0], (place, at_start, "more is allocated where the window starts over")
        assert fault.alive_at_retry == 0, (place, "activations of what failed were alive when it started over")


class _Tall(nn.Module):
    """Takes pictures of any height; keeps what is large for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.wide(x).sin().mean((2, 3)))
        return out


@case
def narrower_samples_find_the_planned_segments() -> None:
    """Reserved before the first window, where that is narrower; a window that runs out once starts over as it is."""
    labels = torch.zeros(MICRO, dtype=torch.long)
    work = Workload(_Tall().cuda(), (torch.zeros(MICRO, 3, 256, 256), labels), loss=nn.CrossEntropyLoss())
    plan = plan_for(work)
    planned = sum(row.bytes * row.count for row in plan.memory.segments)
    assert planned > 100 * MIB and planned <= plan.predicted_peak_bytes
    device, allocated = get_device(torch.device("cuda", 0)), [torch.cuda.memory_allocated()]
    for _ in range(2):  # cuBLAS's workspaces, of two threads; kept, so that none is made a second time
        device.make_workspaces()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] == allocated[2] and (allocated[1] - allocated[0] > 16 * MIB) == (VERSION < (2, 15)), allocated
    device.release_workspaces()
    pictures = [(torch.zeros(MICRO, 3, height, 256), labels) for height in (64, 128, 96)]
    widest = [(torch.zeros(MICRO, 3, 256, 256), labels)] * 3
    held: list[int] = []
    for batches, early in ((pictures, True), (widest, False)):
        torch.cuda.empty_cache()
        runner, before = Runner(work, plan), torch.cuda.memory_reserved()
        held.clear()
        hook = work.model.register_forward_pre_hook(lambda *_: held.append(torch.cuda.memory_reserved()))
        list(runner.epoch(batches))
        hook.remove()
        assert (held[0] - before >= planned) == early, (held, before, planned)
        assert torch.cuda.memory_reserved() <= plan.predicted_peak_bytes
    fault = Fault()
    work.model.last.register_forward_hook(fault.after)
    runner = Runner(work, plan)
    fault.at = 2, "forward"
    heights: list[int] = []
    held.clear()
    work.model.register_forward_pre_hook(lambda _, args: heights.append(args[0].shape[2]))
    work.model.register_forward_pre_hook(lambda *_: held.append(torch.cuda.memory_reserved()))
    (result,) = runner.epoch(pictures)
    assert result.retries == 1 and result.split == (MICRO,) * 3, "as it was, not smaller"
    assert heights == [128, 96, 128, 96, 64], "the widest first"
    assert held[2] >= planned, "reserved again, where the window starts over"


@case
def the_scaler_works_once_a_window() -> None:
    calls: collections.Counter[str] = collections.Counter()
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    work = workload(precision="fp16", scaler=scaler, clip_grad_norm=1.0, on_nonfinite=None)
    plan = plan_for(work)
    runner = Runner(work, plan)
    for name in ("scale", "unscale_", "step", "update"):
        real = getattr(scaler, name)

        def counted(*args: Any, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            if name == "scale":
                assert args[0].is_cuda
            return real(*args)

        setattr(scaler, name, counted)
    result = runner.step(batch(TARGET))
    assert len(result.split) == 3
    assert calls == {"scale": 3, "unscale_": 1, "step": 1, "update": 1}, calls
    dtypes = set()
    work.model[0].register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    runner.step(batch(TARGET))
    assert dtypes == {torch.float16}


@case
def all_of(*names: str) -> None:
    """Each in a process forked from this one, which has imported all that a training loop imports."""
    import torch._dynamo  # noqa: F401  as the first optimizer does

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks.truth_search import forked

    gc.freeze()
    found = {}
    for name in names:
        try:
            forked(CASES[name])
            found[name] = ""
        except RuntimeError as error:
            found[name] = str(error)
    print(json.dumps(found))


@case
def makes_a_plan() -> None:
    print(json.dumps(plan_for(workload()).to_json()))


@case
def takes_a_plan(text: str) -> None:
    from autoaccum import Plan

    try:
        Runner(workload(), Plan.from_json(json.loads(text))).step(batch(TARGET))
    except PlanMismatch as error:
        raise SystemExit(f"PlanMismatch: {error}") from None


@case
def a_loss_counted_on_it() -> None:
    """Scalars read as 0 there; a window whose count is one takes its step for all that, in the plan's memory."""

    def peak(loss: Callable[..., Any]) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 65536), nn.ReLU(), nn.Linear(65536, 4)).cuda()
        work = Workload(model, (torch.randn(4, 64), torch.randint(4, (4,))), loss=loss)
        plan = fit_plan(work, target_batch=16, max_micro_batch=8, verify=False, check=False)
        return plan.predicted_peak_bytes

    def mean(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def total(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), (batch[1] != -100).sum()

    assert abs(peak(total) - peak(mean)) <= 2 * MIB


@case
def a_loop_reserves_what_the_runner_does() -> None:
    """`autoaccum.windows` and the Runner, each twice over the same loader; the plan's figure to the byte."""
    import autoaccum

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(500, 784), torch.randint(10, (500,)))
    loader = torch.utils.data.DataLoader(data, 64)
    model = nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)).cuda()
    plan = fit_plan(Workload(model, data[:8]), target_batch=200, max_micro_batch=60, check=False)
    optimizer = torch.optim.AdamW(model.parameters())
    for window in autoaccum.windows(loader, plan, model=model):
        for micro in window:
            window.backward(nn.functional.cross_entropy(model(micro.batch[0]), micro.batch[1]))
        window.step(optimizer)
    assert torch.cuda.max_memory_reserved() <= plan.predicted_peak_bytes
    assert torch.cuda.max_memory_reserved() > 0.9 * plan.predicted_peak_bytes


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    CASES[sys.argv[1]](*json.loads(sys.argv[2]))
