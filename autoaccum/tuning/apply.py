"""A workload as a configuration says, and afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..configuration import AS_IT_IS, Configuration
from ..errors import UsageError
from ..plan import Plan
from ..window.context import open_context
from ..workload import Workload
from .blocks import Undo, checkpoint_blocks

Apply = Callable[[Workload, Any], Workload]  # a choice of the user's own: the workload, changed
Extra = Mapping[str, Apply]
FLAG_NAMES = ("foreach", "fused")
FLAGS = {"loop": (False, False), "foreach": (True, False), "fused": (False, True)}


@contextlib.contextmanager
def configured(workload: Workload, configuration: Configuration, extra: Extra | None = None) -> Iterator[Workload]:
    """The workload as the configuration says, while it is entered; its model is afterwards as it was, bit for bit.

    What a user's own choice changes beside the workload it returns is for the user to put back.

    Args:
        workload: What is trained.
        configuration: What to make of it. Its micro-batch is the plan's affair.
        extra: How each of its own choices is applied, by name.

    Raises:
        UsageError: The workload doesn't allow it.
    """
    with ExitStack() as stack:
        yield _entered(stack, workload, configuration, extra or {})


def configure(workload: Workload, plan: Plan | Configuration, extra: Extra | None = None) -> Workload:
    """The workload as a tuned plan says, for good: what its `Runner` is given.

    Args:
        workload: What is trained; its model is changed.
        plan: A plan that `tune` made, or a configuration.
        extra: How choices of your own are applied, by name, where the search space had some.

    Returns:
        The workload to train.

    Raises:
        UsageError: The workload doesn't allow it.
    """
    if isinstance(plan, Plan):
        if not plan.configuration:
            return workload
        plan = Configuration.from_values(plan.configuration)
    return _entered(ExitStack(), workload, plan, extra or {})  # callbacks that nobody will call


def _entered(stack: ExitStack, workload: Workload, configuration: Configuration, extra: Extra) -> Workload:
    unknown = [name for name in configuration.extra if name not in extra]
    if unknown:
        raise UsageError(
            f"The configuration has choices of your own ({', '.join(unknown)}), and how they are applied isn't known.",
            "A plan file holds their values, not the functions of the search space that applied them.",
            "Train in Python: Runner(configure(workload, plan, extra={name: function}), plan).",
        )
    for name, value in configuration.extra.items():
        workload = extra[name](workload, value)
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
    """Autocast, and for fp16 a scaler, without which small gradients are lost."""
    if precision == AS_IT_IS:
        return workload
    scaler = None
    if precision == "fp16":
        device = next(workload.model.parameters()).device.type
        scaler = workload.scaler or torch.amp.GradScaler(device)
    return replace(workload, precision=precision, scaler=scaler)


def lay_out_channels_last(model: nn.Module) -> Undo:
    """Lays out four-dimensional tensors with their channels last; images then follow by themselves."""
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
    """Compiles calls of the model, in place."""
    before = vars(model).get("_compiled_call_impl")
    model.compile()

    def undo() -> None:
        if before is None:
            del model._compiled_call_impl
        else:
            model._compiled_call_impl = before

    return undo


def implementations(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What the optimizer's step can be: what its class takes, and what its parameters' device has."""
    defaults, kinds = optimizer.defaults, {p.device.type for group in optimizer.param_groups for p in group["params"]}
    found = ["loop"] if {"foreach", "fused"} & defaults.keys() else []
    found += ["foreach"] if "foreach" in defaults else []
    if "fused" in defaults and kinds <= {"cpu", "cuda", "mps", "xpu"}:
        found.append("fused")
    return tuple(found)


def implementation(optimizer: torch.optim.Optimizer) -> str:
    """What it is now; torch's own choice, where it is left to it, is a loop on the CPU and foreach on CUDA."""
    group = optimizer.param_groups[0]
    if not {"foreach", "fused"} & group.keys():
        return AS_IT_IS
    if group.get("fused"):
        return "fused"
    foreach = group.get("foreach")
    if foreach is None and group.get("fused") is None:
        foreach = "foreach" in group and all(p.is_cuda for p in group["params"])
    return "foreach" if foreach else "loop"


def _implemented(stack: ExitStack, workload: Workload, how: str) -> Any:
    """The optimizer, or the function that makes one, with its step implemented like that."""
    given = workload.optimizer
    if isinstance(given, torch.optim.Optimizer):
        stack.callback(_set_flags(given, how))
        return given
    make = given or torch.optim.AdamW

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = make(parameters)
        if isinstance(made, torch.optim.Optimizer):
            _flag(made, how)
        return made

    return optimizer


def _set_flags(optimizer: torch.optim.Optimizer, how: str) -> Undo:
    if optimizer.state:
        raise UsageError(
            f"The optimizer has state already, so its implementation can't become {how!r} any more.",
            "Each implementation keeps its state in its own way.",
            "Give a function of the parameters: optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3).",
        )
    groups = (*optimizer.param_groups, optimizer.defaults)
    before: list[dict[str, Any]] = [{name: group[name] for name in FLAG_NAMES if name in group} for group in groups]
    _flag(optimizer, how)

    def undo() -> None:
        for group, flags in zip(groups, before, strict=True):
            group.update(flags)

    return undo


def _flag(optimizer: torch.optim.Optimizer, how: str) -> None:
    if how not in implementations(optimizer):
        could = ", ".join(implementations(optimizer)) or "none can be chosen"
        raise UsageError(f"{type(optimizer).__name__} has no {how!r} implementation.", hint=f"It has: {could}.")
    for group in (*optimizer.param_groups, optimizer.defaults):
        for name, value in zip(FLAG_NAMES, FLAGS[how], strict=True):
            if name in group:
                group[name] = value


def _with_workers(stack: ExitStack, loader: Any, workers: int) -> Any:
    """The loader, or the function that makes one, with so many processes."""
    if not isinstance(loader, torch.utils.data.DataLoader):
        make = loader

        def made() -> Any:
            found = make()
            return _with_workers(ExitStack(), found, workers) if found is not make else found

        if callable(make):
            return made
        raise UsageError(
            f"loader_workers={workers}, but the workload's loader is {type(loader).__name__}, no DataLoader.",
            hint="Give loader=DataLoader(...) or a function that makes one, or leave loader_workers out.",
        )
    before = loader.num_workers, loader.prefetch_factor

    def put(numbers: tuple[int, int | None]) -> None:
        loader.num_workers, loader.prefetch_factor = numbers

    put((workers, (loader.prefetch_factor or 2) if workers else None))
    stack.callback(put, before)
    return loader


def plain(workload: Workload) -> Configuration:
    """What the workload is as it stands, in a configuration's terms."""
    return Configuration(
        precision=workload.precision or "fp32",
        optimizer=implementation(open_context(replace(workload, scheduler=None)).optimizer),
        compile=workload.model._compiled_call_impl is not None,
    )
