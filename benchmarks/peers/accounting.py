"""Count a search's passes, samples, out-of-memory errors and changed state."""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn

LOG = "AUTOACCUM_SEARCH_LOG"  # a file: a finder may try sizes in processes that it starts


def note(*words: object) -> None:
    """Append a line to the log, in one write."""
    with open(os.environ[LOG], "a") as log:  # noqa: PTH123
        log.write(" ".join(map(str, words)) + "\n")


def watch(model: nn.Module) -> nn.Module:
    """Count passes of the model and its copies, and out-of-memory errors."""
    model.register_forward_pre_hook(_forward)
    model.register_forward_hook(_backward)
    _watch_memory()
    return model


@functools.cache  # one observer a process, however many models
def _watch_memory() -> None:
    torch._C._cuda_attach_out_of_memory_observer(_out_of_memory)


def _forward(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    note("forward", len(inputs[0]) if inputs else 0)


def _backward(model: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda _: note("backward"))


def _out_of_memory(*_: object) -> None:
    note("out_of_memory")


@dataclass
class Cost:
    """What the log says.

    Attributes:
        forward: Forward passes, those that failed included.
        backward: Backward passes that began.
        samples: Samples in forward passes.
        ooms: Out-of-memory errors that torch raised.
    """

    forward: int = 0
    backward: int = 0
    samples: int = 0
    ooms: int = 0


def cost_of(log: str) -> Cost:
    """Sum a log's lines."""
    cost = Cost()
    for line in log.splitlines():
        kind, *rest = line.split()
        if kind == "forward":
            cost.forward += 1
            cost.samples += int(rest[0])
        elif kind == "backward":
            cost.backward += 1
        elif kind == "out_of_memory":
            cost.ooms += 1
    return cost


def make_changes_real() -> None:
    """Let optimizer steps and batch norms change a value on virtual GPUs.

    A virtual GPU's kernels compute nothing, but copies from the host are real. So what a finder restores, it restores;
    what it doesn't, is seen.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def stepped(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _mark(parameter)

    def forwarded(module: nn.Module, *_: object) -> None:
        if module.training and isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            _mark(module.running_mean)

    register_optimizer_step_post_hook(stepped)
    nn.modules.module.register_module_forward_hook(forwarded)


_marks = 0


def _mark(tensor: torch.Tensor) -> None:
    global _marks
    _marks += 1
    # .data has a separate version counter: a batch norm's backward refuses statistics that were changed in place
    tensor.data.view(-1)[:1].copy_(torch.tensor([float(_marks)], dtype=tensor.dtype))


@dataclass
class State:
    """The state of a model, an optimizer and the random generators.

    Copied to the host.
    """

    tensors: dict[str, torch.Tensor]
    gradients: tuple[str, ...]
    optimizer: bool
    modes: tuple[bool, ...]
    randomness: dict[str, Any] = field(default_factory=dict)

    def changed_since(self, before: State) -> list[str]:
        """Return the kinds of state that aren't bitwise as before."""
        found = []
        for kind in ("parameters", "buffers"):
            names = [name for name in before.tensors if name.startswith(kind)]
            if any(not _same(self.tensors[name], before.tensors[name]) for name in names):
                found.append(kind)
        if self.gradients != before.gradients:
            found.append(".grad left")
        if self.optimizer != before.optimizer:
            found.append("optimizer state")
        if self.modes != before.modes:
            found.append("train/eval mode")
        moved = [name for name, value in self.randomness.items() if not _same(value, before.randomness[name])]
        return found + [f"{name} RNG" for name in moved]


def state_of(model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> State:
    """Copy the state to the host; without a model, only random states."""
    model = model or nn.Module()
    tensors = {f"parameters {name}": p.detach().cpu() for name, p in model.named_parameters()}
    tensors |= {f"buffers {name}": b.detach().cpu() for name, b in model.named_buffers()}
    return State(
        tensors,
        tuple(name for name, p in model.named_parameters() if p.grad is not None),
        bool(optimizer is not None and optimizer.state),
        tuple(module.training for module in model.modules()),
        {
            "torch": torch.get_rng_state(),
            "CUDA": torch.cuda.get_rng_state(),
            "Python": random.getstate(),
            "NumPy": numpy.random.get_state()[1],  # type: ignore[index]
        },
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        flat = [t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (one, other)]
        return torch.equal(*flat)
    if isinstance(one, numpy.ndarray):
        return bool((one == other).all())
    return bool(one == other)
