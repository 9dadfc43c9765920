"""The second look, in the middle of training: it takes no more memory than the window before which it comes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import one_thread  # noqa: F401
from torch import nn

from autoaccum import Workload, fit_plan
from autoaccum.devices import virtual
from autoaccum.devices.cpu import recorder
from autoaccum.devices.cpu.device import CpuDevice
from autoaccum.exactness import check
from autoaccum.exactness import recheck as second_look
from autoaccum.exactness.compare import compare
from autoaccum.exactness.functional_copy import HALF_PRECISION_TOLERANCE, FunctionalCopy
from autoaccum.exactness.recheck import counts_differ, recheck
from autoaccum.phases import FIRST, OnPhase
from autoaccum.state import snapshot
from autoaccum.window import step

WIDE, CLASSES, LONG = 192, 256, 64


class Tagger(nn.Module):
    """Classes for every token; most of its memory is parameters, as a language model's in small micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, WIDE)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDE, 4 * WIDE), nn.GELU(), nn.Linear(4 * WIDE, WIDE)) for _ in range(3)
        )
        self.out = nn.Linear(WIDE, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.table(ids)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


def mean(m: nn.Module, b: Any) -> torch.Tensor:
    return F.cross_entropy(m(b["ids"]).flatten(0, 1), b["labels"].flatten())


def counted(m: nn.Module, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total = F.cross_entropy(m(b["ids"]).flatten(0, 1), b["labels"].flatten(), reduction="sum")
    return total, (b["labels"] != -100).sum()


def pieces(rows: int) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches, of which the first has most of its labels ignored."""
    found = []
    for seed in range(2):
        ids = torch.randint(CLASSES, (rows, LONG), generator=torch.Generator().manual_seed(seed))
        found.append({"ids": ids, "labels": ids.clone()})
    found[0]["labels"][:, 3:] = -100
    return found


def peak_bytes(run: Callable[[OnPhase], object]) -> int:
    held = peak = 0
    for phase in recorder.record(run, micro_batch=1).phases:
        for event in phase.events:
            held += event.bytes
            peak = max(peak, held)
    return peak


FORMS = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, "bf16")]


@pytest.mark.parametrize("rows", [2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "precision"), FORMS, ids=["fp32", "bf16", "fp16", "autocast"])
def test_the_second_look_stays_within_the_windows_own_peak(
    dtype: torch.dtype, precision: str | None, rows: int
) -> None:
    torch.manual_seed(0)
    batches, sizes = pieces(rows), [rows, rows]
    momentum = lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)  # noqa: E731
    work = Workload(Tagger().to(dtype), batches[0], loss=mean, precision=precision, optimizer=momentum)
    context = step.open_context(work)
    step.train_window(context, batches, sizes)  # the optimizer's state is there, as in the middle of training
    context.model.zero_grad(set_to_none=True)
    before, message = snapshot.take(model=context.model), []

    def look(on_phase: OnPhase) -> None:
        with on_phase(FIRST):
            message.append(recheck(context, batches, sizes))

    assert counts_differ(batches, sizes)
    looked = peak_bytes(look)
    assert not before.differences()
    window = peak_bytes(lambda on_phase: step.train_window(context, batches, sizes, on_phase=on_phase))
    assert looked <= window, f"{looked / 2**20:.1f} MiB over {window / 2**20:.1f}"
    if precision is None or rows >= 4:  # without autocast two samples may take more than a micro-batch of two or three
        assert message[0] is not None and "not that of one batch" in message[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_no_difference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches, sizes = pieces(4), (4, 4)
    context = step.open_context(Workload(Tagger().to(dtype), batches[0], loss=counted))
    assert recheck(context, batches, sizes) is None
    model_copy = FunctionalCopy(context.model, counted, widens=False)
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    found = compare(model_copy, lambda: context, whole, batches, sizes)
    assert 0 < found.error() < model_copy.tolerance / 5 == HALF_PRECISION_TOLERANCE[dtype] / 5 and found.agrees(
        model_copy.tolerance
    )


def test_a_large_model_in_half_precision_is_judged_in_it_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoaccum.exactness.check.MAX_DOUBLE_PARAMETERS", 0)
    torch.manual_seed(0)
    model, seen = Tagger().bfloat16(), set[torch.dtype]()
    model.out.register_forward_hook(lambda module, args, out: seen.add(module.weight.dtype))
    for room, dtype in ((None, torch.float32), (4 << 20, torch.bfloat16)):
        if room is not None:
            monkeypatch.setattr(CpuDevice, "free_bytes", lambda device, room=room: room)
        for loss, kind in ((counted, "exact"), (mean, "wrong denominator")):
            seen.clear()
            found = check.check(Workload(model, pieces(8)[1], loss=loss), isolated=False)
            assert found.kind == kind and seen == {dtype}, found
            assert ("half precision" in " ".join(found.advice)) == (kind == "exact" and room is not None)


def on_a_gpu(dtype: torch.dtype, precision: str | None, rows: int) -> dict[str, int]:
    """What the window takes, and the second look; with batches on the host, as a loader gives them.

    The virtual GPU computes nothing, so the look is made to believe that it does: its memory is the same.
    """
    batches, sizes = pieces(rows), [rows, rows]
    momentum = lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)  # noqa: E731
    work = Workload(Tagger().to(dtype).cuda(), batches[0], loss=mean, precision=precision, optimizer=momentum)
    plan = fit_plan(work, target_batch=2 * rows, max_micro_batch=rows, budget="3GiB", check=False)
    context, found = step.open_context(work), {"plan": plan.predicted_peak_bytes}
    step.train_window(context, batches, sizes)
    for name, run in (("window", step.train_window), ("look", recheck)):
        context.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(context, batches, sizes)  # type: ignore[operator]
        found |= {name: torch.cuda.max_memory_reserved(), f"{name} allocated": torch.cuda.max_memory_allocated()}
    return found


def on_gpus() -> None:
    def fail(error: BaseException) -> None:
        raise AssertionError("the second look gave up") from error

    second_look.get_device = lambda device: SimpleNamespace(computes=True)  # type: ignore[attr-defined]
    second_look.drop_frames = fail  # type: ignore[attr-defined,assignment]
    print(json.dumps([on_a_gpu(dtype, precision, rows) for dtype, precision in FORMS[:2] for rows in (4, 32)]))


@pytest.mark.skipif(virtual.available() is not None, reason=str(virtual.available()))
@pytest.mark.slow
def test_on_a_gpu_it_stays_within_the_plans_peak() -> None:
    tests = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(tests)!r}); import test_recheck; test_recheck.on_gpus()"
    gpu = [sys.executable, "-m", "autoaccum", "virtual-gpu", "--memory", "4GiB", "--"]
    command = [*gpu, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        assert found["look"] <= found["window"] and found["look"] <= found["plan"], found
        assert found["window allocated"] / 3 < found["look allocated"] < found["window allocated"], found
