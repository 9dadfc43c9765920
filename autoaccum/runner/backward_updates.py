"""Refuse hooks that update parameters in the backward of a micro-batch.

An optimizer step in backward (`register_post_accumulate_grad_hook`, LOMO, layer-wise GaLore) is exact with one
micro-batch. With several, each would be a separate step with a part of the gradient. Nothing is read off a hook's code:
while a micro-batch runs, every step of an optimizer is looked at before it is taken, and every parameter with hooks
after these have run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import AutoaccumError, OutOfMemory, UsageError
from ..torch_compat import accumulation_hooks, write_count
from ..window.context import TrainingContext

Named = tuple[str, nn.Parameter]


class BackwardUpdates:
    """Watches the parameters of a model while a micro-batch runs.

    Args:
        context: What is trained.
    """

    def __init__(self, context: TrainingContext) -> None:
        self._parameters: list[Named] = list(context.model.named_parameters())
        self._trained = {id(p) for group in context.optimizer.param_groups for p in group["params"]}

    def hooked(self) -> list[Named]:
        """Return the parameters that have post-accumulation hooks now."""
        return [(name, p) for name, p in self._parameters if accumulation_hooks(p)]

    @contextlib.contextmanager
    def refused(self, steps: int, failure: str) -> Iterator[None]:
        """Refuse updates while it is entered.

        Args:
            steps: Micro-batches of the window; with one, an update in backward is exact.
            failure: The out-of-memory that cut a window into so many; empty where it was planned so.

        Raises:
            UsageError: Names the hook; OutOfMemory where the plan had one micro-batch.
        """
        if steps < 2:
            yield
            return
        hooked = self.hooked()

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            concerned = self._trained | {id(p) for _, p in hooked}
            name = next((name for name, p in self._parameters if id(p) in own & concerned), None)
            if name is not None:
                what = f"steps {type(optimizer).__name__} in backward"
                raise _refusal(f"{_hook_on(name, hooked)} {what}", "No parameter has changed yet.", steps, failure)

        def after_hooks(name: str, version: int, parameter: torch.Tensor) -> None:
            if write_count(parameter) != version:
                why = f"{name} has changed by a part of the gradient: create the model again, or load a checkpoint."
                raise _refusal(f"{_hook_on(name, hooked)} updates it in backward", why, steps, failure)
            if parameter.grad is None:
                why = "The next micro-batch's gradient would not be added to it."
                raise _refusal(f"{_hook_on(name, hooked)} drops its gradient in backward", why, steps, failure)

        with contextlib.ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(before_step).remove)
            for name, parameter in hooked:  # registered last, so it runs after the hooks that are there
                check = functools.partial(after_hooks, name, write_count(parameter))
                handle = parameter.register_post_accumulate_grad_hook(check)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            yield


def hook_title(hook: Any) -> str:
    """Return the name of a hook's function, as its author knows it."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return str(name).replace("<locals>.", "")


def _hook_on(name: str, hooked: list[Named]) -> str:
    hooks = next((accumulation_hooks(p) for each, p in hooked if each == name), [])
    return f"The hook {hook_title(hooks[0])} on {name}" if hooks else f"A hook on {name}"


def _refusal(what: str, changed: str, steps: int, failure: str) -> AutoaccumError:
    if failure:
        return OutOfMemory(
            f"{what}, so a window that ran out of memory ({failure}) can't be cut into {steps} micro-batches.",
            f"Each would be a separate step with a part of the gradient. {changed}",
            "Load the last checkpoint and plan again with less memory (budget=).",
        )
    return UsageError(
        f"{what}, and a window has {steps} micro-batches.",
        f"It would run after every micro-batch: each would be a separate step with a part of the gradient. {changed}",
        "Remove it and give optimizer= to the Workload; or plan for one micro-batch: fit_plan without target_batch=.",
    )
