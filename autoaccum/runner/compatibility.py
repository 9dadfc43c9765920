"""What a model or an optimizer does besides, that goes wrong when a window has several micro-batches.

Looked for when a Runner is made, by what is attached to parameters and modules and by what their source does; and once
more in its first window of several micro-batches, by what that left changed. What would spoil the gradient without a
word is refused, what may is said.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..window.context import TrainingContext
from .own_counts import own_counts

_DEPTH = 3  # containers inside of containers that are looked through for an optimizer
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def refuse(context: TrainingContext, steps: int) -> None:
    """Refuses what can't be trained in windows of so many micro-batches.

    Raises:
        UsageError: Names what it is, and says what to do.
    """
    if steps < 2:
        return
    for name, hook in _accumulation_hooks(context.model):
        what = _in_backward(hook)
        if what is not None:
            raise UsageError(
                f"The hook {_title(hook)} on {name} {what}, and a window has {steps} micro-batches.",
                "It would run after every micro-batch, so each would be a step of its own with a part of the gradient.",
                "Remove it and give optimizer= to the Workload; or plan for one micro-batch: fit_plan without "
                "target_batch=.",
            )
    if context.device.type == "cuda":
        _refuse_graphs(context.model, steps)


def steps_in_backward(model: nn.Module) -> bool:
    """Whether a hook updates parameters while a backward is under way."""
    return any(_in_backward(hook) is not None for _, hook in _accumulation_hooks(model))


def warnings(context: TrainingContext, steps: int) -> list[str]:
    """What may be meant otherwise in windows of so many micro-batches; a sentence for each."""
    if steps < 2:
        return []
    found = []
    after = [(name, hook) for name, hook in _accumulation_hooks(context.model) if _in_backward(hook) is None]
    if after:
        found.append(
            f"The hook {_title(after[0][1])} on {after[0][0]}{_more(after)} runs after every micro-batch, {steps} "
            "times a window, and sees the gradient as far as it has added up. What it keeps or counts is of parts. "
            "optimizer.register_step_pre_hook runs once, with the whole gradient."
        )
    before = [(name, h) for name, p in context.model.named_parameters() for h in (p._backward_hooks or {}).values()]
    if before:
        found.append(
            f"The hook {_title(before[0][1])} on {before[0][0]}{_more(before)} runs on every micro-batch's gradient by "
            "itself. Unless it is linear (a factor, a mask), the sum is not what it would make of the whole. "
            "optimizer.register_step_pre_hook runs once, with the whole gradient."
        )
    found.append(told_of_changes(own_counts(context.model, context.held.modules), context, steps))
    return [text for text in found if text]


def told_of_changes(changed: Sequence[str], context: TrainingContext, steps: int, said: Sequence[str] = ()) -> str:
    """What to say of modules that forwards change: they count, or average, by micro-batch.

    Args:
        changed: Names of what forwards change: by their source, or as `Snapshot.differences` saw it after a window.
        context: What is trained.
        steps: Micro-batches of a window.
        said: Names that were told of before.

    Returns:
        A warning; empty where only what is known of (batch statistics, power iterations, random states) changed.
    """
    prefixes = [f"{name}." if name else "" for name in (*context.norms.batch, *context.norms.instance)]
    known = {prefix + statistic for prefix in prefixes for statistic in _STATISTICS} | set(said)
    spectral = bool(context.norms.spectral)
    kept = tuple(
        f"{name}[" for name, thing in context.held.things if not isinstance(thing, nn.Module)
    )  # lists of losses
    mine = [
        name
        for name in (each.removeprefix("module attribute ").removeprefix("model.") for each in changed)
        if not name.endswith("RNG") and "RNG of" not in name and name not in known
        and not name.startswith("gradient of") and not name.startswith(kept)
        and not (spectral and name.endswith(("._u", "._v", "_u", "_v")))
    ]  # fmt: skip
    if not mine:
        return ""
    shown = ", ".join(mine[:3]) + (f" and {len(mine) - 3} more" if len(mine) > 3 else "")
    return (
        f"The forward changes {shown}: {steps} times a window, not once. A module that counts its own steps "
        "(a warm-up, a moving average, an annealed temperature) then runs ahead of the optimizer. "
        "Let it count optimizer steps: in between=, or by the number in Runner's results."
    )


def _accumulation_hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Hooks that run when a gradient has been added to, with the parameters' names."""
    for name, parameter in model.named_parameters():
        hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        yield from ((name, hook) for hook in hooks.values())
        for optimizer in getattr(parameter, "_in_backward_optimizers", ()):  # torch.distributed.optim
            yield name, optimizer


def _in_backward(hook: Any) -> str | None:
    """What a hook does that ends a gradient in the middle of a window; None where nothing is known of it."""
    if isinstance(hook, torch.optim.Optimizer):
        return f"steps {type(hook).__name__} in backward"
    optimizer = _optimizer_in(hook, _DEPTH)
    if optimizer is not None and "step" in _names(hook):
        return f"steps {type(optimizer).__name__} in backward"
    if _sets_gradient(_function(hook)):
        return "sets the gradient in backward"
    return None


def _names(hook: Any) -> set[str]:
    """Names that a hook's code uses, and that of the functions it can call by their names."""
    function = _function(hook)
    code = getattr(function, "__code__", None)
    if function is None or code is None:
        return set()
    names = set(code.co_names)
    inner = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    inner += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    for other in filter(inspect.isfunction, inner):
        names |= set(other.__code__.co_names)
    return names


def _optimizer_in(value: Any, depth: int) -> torch.optim.Optimizer | None:
    """An optimizer that a hook can reach: as itself, bound, in its closure, among its globals, or in a container."""
    if isinstance(value, torch.optim.Optimizer):
        return value
    if depth == 0:
        return None
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())[:1]  # one optimizer for each parameter: the first will do
    elif isinstance(value, (list, tuple)):
        inner = list(value)[:8]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif inspect.ismethod(value):
        inner = [value.__self__, value.__func__]
    elif inspect.isfunction(value):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        inner += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        inner += [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
    elif not isinstance(value, (torch.Tensor, nn.Module, type)) and hasattr(value, "__dict__"):
        inner = list(vars(value).values())[:16]
    return next((found for each in inner if (found := _optimizer_in(each, depth - 1)) is not None), None)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _sets_gradient(function: Callable[..., Any] | None) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and any(
        instruction.opname == "STORE_ATTR" and instruction.argval == "grad"
        for instruction in dis.get_instructions(code)
    )


def _refuse_graphs(model: nn.Module, steps: int) -> None:
    """Refuses CUDA graphs: gradients lie in their pool, and the next replay writes over them (pytorch#96693)."""
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
    """Whether torch.compile was asked for CUDA graphs, for this module."""
    compiled = getattr(module, "_orig_mod", None)
    contexts = [getattr(module, "dynamo_ctx", None)] if compiled is not None else []
    call = getattr(module, "_compiled_call_impl", None)  # module.compile()
    backends = [getattr(context, "callback", None) for context in contexts] + ([call] if call is not None else [])
    return any(_asks_for_graphs(backend, 4) for backend in backends)


def _asks_for_graphs(backend: Any, depth: int) -> bool:
    """Whether a backend, or one inside of it, has inductor's option `triton.cudagraphs` on."""
    if backend is None or depth == 0:
        return False
    options = getattr(backend, "config", None)
    if isinstance(options, dict) and options.get("triton.cudagraphs"):
        return True
    names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn", "_inner_convert", "backend")
    inner = [getattr(backend, name, None) for name in names]
    inner += [c.cell_contents for c in getattr(backend, "__closure__", None) or () if _is_filled(c)]
    return any(_asks_for_graphs(each, depth - 1) for each in inner if each is not backend)


def _function(hook: Any) -> Any:
    if isinstance(hook, functools.partial):
        return _function(hook.func)
    if inspect.ismethod(hook):
        return hook.__func__
    if inspect.isfunction(hook):
        return hook
    return inspect.unwrap(type(hook).__call__) if callable(hook) else None


def _title(hook: Any) -> str:
    function = hook.func if isinstance(hook, functools.partial) else hook
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return str(name).replace("<locals>.", "")


def _more(found: Sequence[Any]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""
