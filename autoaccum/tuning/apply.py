"""Configure a workload, temporarily or permanently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..configuration import AS_IT_IS, Configuration
from ..errors import UsageError
from ..plan import Plan
from ..torch_compat import compiled_call, restore_compiled_call
from ..window.context import open_context
from ..workload import Workload
from .checkpointing import Undo, checkpoint_blocks

FLAG_NAMES = ("foreach", "fused")
IMPLEMENTATION_FLAGS = {"loop": (False, False), "foreach": (True, False), "fused": (False, True)}


@contextlib.contextmanager
def configured(workload: Workload, configuration: Configuration) -> Iterator[Workload]:
    """Configure a workload until exit, then restore its model bit for bit.

    Args:
        workload: What is trained.
        configuration: The configuration; its micro-batch is left to the plan.

    Raises:
        UsageError: The workload doesn't allow it.
    """
    with ExitStack() as stack:
        yield _configured(stack, workload, configuration)


def configure(workload: Workload, plan: Plan | Configuration) -> Workload:
    """Configure a workload permanently, as a tuned plan's `Runner` requires.

    Args:
        workload: What is trained; its model is changed.
        plan: A plan from `tune`, or a configuration.

    Returns:
        The workload to train.

    Raises:
        UsageError: The workload doesn't allow it.
    """
    if isinstance(plan, Plan):
        if not plan.schedule.configuration:
            return workload
        plan = Configuration.from_values(plan.schedule.configuration)
    return _configured(ExitStack(), workload, plan)  # the callbacks that restore it are never called


def _configured(stack: ExitStack, workload: Workload, configuration: Configuration) -> Workload:
    """Return the configured workload; the stack's callbacks restore it."""
    workload = _with_precision(workload, configuration.precision)
    if configuration.channels_last:
        stack.callback(lay_out_channels_last(workload.model))
    stack.callback(checkpoint_blocks(workload.model, configuration.checkpointing))
    if configuration.optimizer != AS_IT_IS:
        workload = replace(workload, optimizer=_implemented(stack, workload, configuration.optimizer))
    if configuration.compile:
        stack.callback(compile_calls(workload.model))
    if configuration.loader_workers is not None:
        workload = replace(workload, loader=_with_workers(stack, workload.loader, configuration.loader_workers))
    words = ", ".join(text for name, text in configuration.words().items() if name != "loader_workers")
    return replace(workload, configuration=words or None)


def _with_precision(workload: Workload, precision: str) -> Workload:
    """Set autocast, and for fp16 a scaler, without which small gradients underflow."""
    if precision == AS_IT_IS:
        return workload
    scaler = None
    if precision == "fp16":
        device = next(workload.model.parameters()).device.type
        scaler = workload.scaler or torch.amp.GradScaler(device)
    return replace(workload, precision=precision, scaler=scaler)


def lay_out_channels_last(model: nn.Module) -> Undo:
    """Store four-dimensional tensors with channels last; activations of images follow."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dim() == 4]
    strides = [tensor.stride() for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)

    def undo() -> None:
        for tensor, stride in zip(tensors, strides, strict=True):
            before = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
            tensor.data = before.copy_(tensor.data)

    return undo


def compile_calls(model: nn.Module) -> Undo:
    """Compile calls of the model, in place."""
    before = compiled_call(model)
    model.compile()

    def undo() -> None:
        restore_compiled_call(model, before)

    return undo


def implementations(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the implementations that an optimizer's class and device support."""
    defaults, kinds = optimizer.defaults, {p.device.type for group in optimizer.param_groups for p in group["params"]}
    found = ["loop"] if {"foreach", "fused"} & defaults.keys() else []
    found += ["foreach"] if "foreach" in defaults else []
    if "fused" in defaults and kinds <= {"cpu", "cuda", "mps", "xpu"}:
        found.append("fused")
    return tuple(found)


def implementation(optimizer: torch.optim.Optimizer) -> str:
    """Return an optimizer's implementation.

    By default torch loops on the CPU and uses foreach on CUDA.
    """
    group = optimizer.param_groups[0]
    if not {"foreach", "fused"} & group.keys():
        return AS_IT_IS
    if group.get("fused"):
        return "fused"
    foreach = group.get("foreach")
    if foreach is None and group.get("fused") is None:
        foreach = "foreach" in group and all(p.is_cuda for p in group["params"])
    return "foreach" if foreach else "loop"


def _implemented(stack: ExitStack, workload: Workload, name: str) -> Any:
    """Return the optimizer, or its factory, with an implementation set."""
    given = workload.optimizer
    if isinstance(given, torch.optim.Optimizer):
        stack.callback(_set_flags(given, name))
        return given
    make = given or torch.optim.AdamW

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = make(parameters)
        if isinstance(made, torch.optim.Optimizer):
            _set_flag(made, name)
        return made

    return optimizer


def _set_flags(optimizer: torch.optim.Optimizer, name: str) -> Undo:
    if optimizer.state:
        raise UsageError(
            f"The optimizer has state already, so its implementation can't change to {name!r}.",
            "Each implementation stores its state differently.",
            "Give a function of the parameters: optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3).",
        )
    groups = (*optimizer.param_groups, optimizer.defaults)
    before: list[dict[str, Any]] = [{name: group[name] for name in FLAG_NAMES if name in group} for group in groups]
    _set_flag(optimizer, name)

    def undo() -> None:
        for group, flags in zip(groups, before, strict=True):
            group.update(flags)

    return undo


def _set_flag(optimizer: torch.optim.Optimizer, name: str) -> None:
    if name not in implementations(optimizer):
        available = ", ".join(implementations(optimizer)) or "none to choose from"
        raise UsageError(f"{type(optimizer).__name__} has no {name!r} implementation.", hint=f"It has: {available}.")
    for group in (*optimizer.param_groups, optimizer.defaults):
        for flag, value in zip(FLAG_NAMES, IMPLEMENTATION_FLAGS[name], strict=True):
            if flag in group:
                group[flag] = value


def _with_workers(stack: ExitStack, loader: Any, workers: int) -> Any:
    """Return the loader, or its factory, with that many workers."""
    if not isinstance(loader, torch.utils.data.DataLoader):
        make = loader

        def made() -> Any:
            found = make()
            return _with_workers(ExitStack(), found, workers) if found is not make else found

        if callable(make):
            return made
        raise UsageError(
            f"loader_workers={workers}, but the workload's loader is {type(loader).__name__}, not a DataLoader.",
            hint="Give loader=DataLoader(...) or a function that makes one, or leave loader_workers out.",
        )
    before = loader.num_workers, loader.prefetch_factor

    def put(numbers: tuple[int, int | None]) -> None:
        loader.num_workers, loader.prefetch_factor = numbers

    put((workers, (loader.prefetch_factor or 2) if workers else None))
    stack.callback(put, before)
    return loader


def plain(workload: Workload) -> Configuration:
    """Return the unchanged workload's configuration."""
    return Configuration(
        precision=workload.precision or "fp32",
        optimizer=implementation(open_context(replace(workload, scheduler=None)).optimizer),
        compile=compiled_call(workload.model) is not None,
    )
