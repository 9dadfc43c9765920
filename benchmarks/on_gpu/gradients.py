"""Part (d): compare gradients, also after a real out-of-memory.

The gradient of a window of uneven micro-batches against one whole batch's, in fp32 and in fp64; then, in fp64, of a
window that ran out of memory for real and started over in smaller micro-batches. The distance is the relative L2 of all
gradients as the optimizer step gets them. On a virtual GPU nothing is computed: then only the recovery's course counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autoaccum import Runner, Workload, fit_plan
from autoaccum.data import split as cutting
from autoaccum.data import tree
from autoaccum.window import step
from benchmarks.truth_search import count

from . import apart
from .job import Job
from .memory import limit_to
from .models import made

SAMPLES, SIZES = 13, (5, 5, 3)
TOKENS = 64  # of a sequence: logits over a vocabulary in fp64 would fill the card
OOM_SAMPLES = {"vit-b16-bf16": 32, "gpt2-bf16": 48, "lstm-fp32": 256, "mlp-fp32": 768, "t5-bf16": 64}
LIMIT_BYTES = 8 << 30
LEFT_SHARE = 0.6  # of what a window needs beyond parameters and gradients: it then runs out of memory
Gradients = dict[str, torch.Tensor]


def run(job: Job) -> None:
    """Compare one model's gradients, then those after an out-of-memory."""
    made(job.model)
    for name in ("fp32", "fp64"):
        if f"window {name}" not in job.known:
            job.emit(f"window {name}", error=apart.call(window_error, job.model, name), samples=SAMPLES, sizes=SIZES)
    if "after out of memory" not in job.known:
        job.emit("after out of memory", **apart.call(after_out_of_memory, job.model))


def exact_workload(name: str, dtype: torch.dtype, device: str = "cuda") -> Workload:
    """Move a workload to the device in one precision.

    It has no dropout, plain SGD, and sequences of at most `TOKENS`.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    work = made(name)
    model = work.model.to(device, dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # of attention, by function
            module.dropout = 0.0  # type: ignore[assignment]
    sample = tree.map_leaves(work.sample, lambda path, leaf: leaf.to(dtype) if leaf.is_floating_point() else _cut(leaf))
    return replace(work, model=model, sample=sample, precision=None, scaler=None, optimizer=_still, clip_grad_norm=None)


def _cut(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, :TOKENS].contiguous() if ids.dim() == 2 else ids


def _still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def window_error(name: str, precision: str, device: str = "cuda") -> float | None:
    """Return a window's distance from one whole batch.

    None where nothing is computed.
    """
    if device == "cuda":
        limit_to(LIMIT_BYTES)
    work = exact_workload(name, {"fp32": torch.float32, "fp64": torch.float64}[precision], device)
    context = step.open_context(work)
    batch = cutting.tile(work.sample, SAMPLES)
    found = [_gradients(context, batch, sizes) for sizes in ((SAMPLES,), SIZES)]
    return distance(*found)


def _gradients(context: step.TrainingContext, batch: Any, sizes: Sequence[int]) -> Gradients:
    with _Kept(context) as kept:
        step.train_window(context, cutting.split(batch, sizes), tuple(sizes))
    return kept.gradients


class _Kept:
    """Keep the gradients that optimizer steps get, on the host in fp64."""

    def __init__(self, context: step.TrainingContext) -> None:
        self.context = context
        self.gradients: Gradients = {}

    def __enter__(self) -> _Kept:
        self._hook = self.context.optimizer.register_step_pre_hook(lambda *_: self._keep())
        return self

    def _keep(self) -> None:
        named = self.context.model.named_parameters()
        self.gradients = {name: p.grad.detach().double().cpu() for name, p in named if p.grad is not None}

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def distance(whole: Gradients, parts: Gradients) -> float | None:
    """Return the relative L2 distance; None where the whole gradient is zero."""
    if whole.keys() != parts.keys():
        raise RuntimeError(f"gradients of other parameters: {sorted(whole.keys() ^ parts.keys())[:4]}")
    length = sum(float(each.square().sum()) for each in whole.values()) ** 0.5
    apart_by = sum(float((whole[name] - parts[name]).square().sum()) for name in whole) ** 0.5
    return apart_by / length if length else None


def after_out_of_memory(name: str) -> dict[str, Any]:
    """Train a window with less memory than planned."""
    limit_to(LIMIT_BYTES)
    work = exact_workload(name, torch.float64)
    work = replace(work, optimizer=_still(work.model.parameters()))
    plan = fit_plan(work, target_batch=OOM_SAMPLES[name], check=False)
    runner, batch = Runner(work, plan), cutting.tile(work.sample, OOM_SAMPLES[name])
    with _Kept(runner.context) as planned:
        before = runner.step(batch)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    needed = held + sum(p.nbytes for p in work.model.parameters())  # with the gradients
    left = needed + int(LEFT_SHARE * (plan.predicted_peak_bytes - needed))
    limit_to(left)
    ooms = count("num_ooms")
    with _Kept(runner.context) as recovered:
        after = runner.step(batch)
    return {
        "planned": plan.split,
        "limit": LIMIT_BYTES,
        "lowered to": left,
        "ooms before": ooms,
        "ooms": count("num_ooms") - ooms,
        "retries": after.retries,
        "split": after.split,
        "error": distance(planned.gradients, recovered.gradients),
        "loss": [float(before.loss), float(after.loss)],
        "samples": after.samples,
    }
