"""Warn of what works differently in windows of several micro-batches.

Looked for when a Runner is created, by what is attached to parameters and modules. What windows change is compared
afterwards (runner/state_changes.py), and hooks that update parameters are refused as they do (backward_updates.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data.collated import COLLATED
from ..devices.cpu import page_cache
from ..errors import UsageError
from ..plan import Plan
from ..simulation.solver import CAPACITY_MARGIN
from ..torch_compat import accumulation_hooks, compiler_backends, gradient_hooks, wrapped_backends
from ..window import norms
from ..window.context import TrainingContext
from ..window.fingerprint import check_fingerprint, fingerprint
from ..window.trained_parameters import left_out_note
from ..workload import Workload
from .backward_updates import hook_title

log = logging.getLogger("autoaccum")

_BACKEND_DEPTH = 4  # compilers that are wrapped in one another


def open_plan(context: TrainingContext, workload: Workload, plan: Plan) -> None:
    """Prepare a process to train windows by a plan, and warn.

    Args:
        context: What is trained.
        workload: The workload, as it was planned.
        plan: The plan.

    Raises:
        PlanMismatch: The plan was made for another model, loss, optimizer, precision, device or version.
        UsageError: The model is captured in CUDA graphs.
    """
    check_fingerprint(fingerprint(context), plan.provenance.fingerprint)
    page_cache.apply_planned(plan.device)
    refuse_graphs(context, plan.accumulation_steps)
    for text in warnings(context, workload, plan):
        log.warning("%s", text)


def refuse_graphs(context: TrainingContext, steps: int) -> None:
    """Refuse CUDA graphs in windows of several micro-batches.

    Raises:
        UsageError: Names the module, and says what to do.
    """
    if steps > 1 and context.device.type == "cuda":
        _refuse_graphs(context.model, steps)


def warnings(context: TrainingContext, workload: Workload, plan: Plan) -> list[str]:
    """Return what to warn of before the first window, one text each."""
    steps = plan.accumulation_steps
    found = [_length_warning(workload, plan), left_out_note(context)]
    if steps > 1:
        found += hook_warnings(context.model, steps)
        found += [norms.warning(context.norms, context.batchnorm, training=context.model.training)]
    if context.device.type == "cuda":
        found.append(_capacity_warning(context, plan))
    return [text for text in found if text]


def hook_warnings(model: nn.Module, steps: int) -> list[str]:
    """Return what to warn of hooks on gradients; empty texts for none."""
    return [_accumulation_hook_warning(model, steps), _gradient_hook_warning(model)]


def _accumulation_hook_warning(model: nn.Module, steps: int) -> str:
    hooks = [(name, hook) for name, p in model.named_parameters() for hook in accumulation_hooks(p)]
    if not hooks:
        return ""
    return (
        f"The hook {hook_title(hooks[0][1])} on {hooks[0][0]}{_more(hooks)} runs after every micro-batch, {steps} "
        "times a window, and sees the gradient as far as it has added up. What it keeps or counts is of parts; if it "
        "updates the parameter, the first window is refused. "
        "optimizer.register_step_pre_hook runs once, with the whole gradient."
    )


def _gradient_hook_warning(model: nn.Module) -> str:
    hooks = [(name, hook) for name, p in model.named_parameters() for hook in gradient_hooks(p)]
    if not hooks:
        return ""
    return (
        f"The hook {hook_title(hooks[0][1])} on {hooks[0][0]}{_more(hooks)} runs on every micro-batch's gradient "
        "separately. Unless it is linear (a factor, a mask), the sum is not what it would make of the whole. "
        "optimizer.register_step_pre_hook runs once, with the whole gradient."
    )


def _length_warning(workload: Workload, plan: Plan) -> str:
    """Warn of data that is longer than the plan's sample.

    It would be refused in the middle of an epoch.
    """
    longest = max(workload.lengths or [0], default=0)
    shaped = [leaf for leaf in plan.provenance.signature if leaf.trailing_shape and leaf.path != COLLATED]
    tokens = [leaf for leaf in shaped if "int" in leaf.dtype] or shaped
    planned = max((leaf.trailing_shape[0] for leaf in tokens), default=longest)
    if longest <= planned:  # fit_plan plans at the longest: longer ones are other data
        return ""
    return (
        f"The longest sample has {longest} by lengths=, and the plan's own has at most {planned}. "
        "Such a micro-batch could need more memory than was planned, and is refused. "
        "Plan again with a sample of the longest data there is."
    )


def _capacity_warning(context: TrainingContext, plan: Plan) -> str:
    from ..devices.cuda.budget import read_cuda_budget, shrunk_since

    return shrunk_since(plan.memory.budget, read_cuda_budget(context.device), margin=CAPACITY_MARGIN) or ""


def _refuse_graphs(model: nn.Module, steps: int) -> None:
    """Refuse CUDA graphs.

    Gradients lie in their pool, and the next replay writes over them (pytorch#96693).
    """
    for name, module in model.named_modules():
        how = None
        if "make_graphed" in getattr(vars(module).get("forward"), "__qualname__", ""):
            how = "was captured by torch.cuda.make_graphed_callables"
        elif _compiled_with_graphs(module):
            how = "is compiled with CUDA graphs (mode='reduce-overhead' or 'max-autotune')"
        if how is not None:
            raise UsageError(
                f"{name or 'The model'} {how}, and a window has {steps} micro-batches.",
                "Gradients lie in the graph's memory, where the next micro-batch writes over them: one of "
                f"{steps} would be left, without an error.",
                "Compile with mode='default' or 'max-autotune-no-cudagraphs', or leave the graphs out.",
            )


def _compiled_with_graphs(module: nn.Module) -> bool:
    """Return whether torch.compile was asked for CUDA graphs for this module."""
    return any(_asks_for_graphs(backend, _BACKEND_DEPTH) for backend in compiler_backends(module))


def _asks_for_graphs(backend: Any, depth: int) -> bool:
    """Return whether a backend, or one it wraps, uses CUDA graphs.

    Inductor's option for it is `triton.cudagraphs`.
    """
    if backend is None or depth == 0:
        return False
    options = getattr(backend, "config", None)
    if isinstance(options, dict) and options.get("triton.cudagraphs"):
        return True
    inner = [*wrapped_backends(backend), *_closure_contents(backend)]
    return any(_asks_for_graphs(each, depth - 1) for each in inner if each is not backend)


def _closure_contents(function: Any) -> list[Any]:
    """Return what a function's closure holds, without empty cells."""
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return found


def _more(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
