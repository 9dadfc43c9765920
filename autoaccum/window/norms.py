"""Normalizations: modules whose forward depends on more than one sample.

Or changes more, and what happens to them within a window.

*Batch normalization* takes the mean and variance of the samples it is given, so those of a micro-batch. Four choices:

    per_micro_batch   as torch does it: another gradient than the whole batch's, and one update of the running
                      statistics per micro-batch
    merged            the same gradient, but the running statistics become those of the whole window, updated once
    frozen            the running statistics normalize and stay as they are: exact
    exact             micro-batches run in lanes that meet at each normalization (window/lanes/): the whole batch's
                      statistics, gradient and running statistics, for the memory of what lanes hold meanwhile

*Instance normalization* takes each sample's own, so its gradient is exact; `merged` covers its running statistics.
*Spectral normalization* runs its power iteration in each forward; within a window it runs in the first micro-batch
only, and the window is exact. *Synchronized batch normalization* is a batch normalization over ranks: not over time;
with `exact` it meets like any other (ranks/synchronized.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import UsageError
from ..torch_compat import (
    BatchNorm,
    InstanceNorm,
    NormBase,
    forward_pre_hooks,
    is_compiled_wrapper,
    unbatched_dimensions,
)
from ..torch_compat import SpectralNorm as ParametrizedSpectralNorm
from .lanes.limits import refuse_one_by_one

PER_MICRO_BATCH, MERGED, FROZEN, EXACT = CHOICES = ("per_micro_batch", "merged", "frozen", "exact")


@dataclass(frozen=True)
class Norms:
    """The modules of a model that this is about.

    Attributes:
        batch: Batch normalizations, by name.
        instance: Instance normalizations with running statistics, by name.
        spectral: Spectral normalizations: parametrizations, and hooks of the older kind.
    """

    batch: dict[str, BatchNorm] = field(default_factory=dict)
    instance: dict[str, InstanceNorm] = field(default_factory=dict)
    spectral: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.batch or self.instance or self.spectral)


def find_norms(model: nn.Module, held: Mapping[str, nn.Module] | None = None) -> Norms:
    """Find the batch, instance and spectral normalizations of a window.

    Args:
        model: The model, which is trained.
        held: Modules that the loss holds, by name. Nobody switches their mode: of these, those that are in train mode
            now. A teacher in evaluation mode is about single samples.
    """
    named = dict(model.named_modules())
    own = set(map(id, named.values()))
    for root, other in (held or {}).items():
        inner = {f"{root}.{name}" if name else root: module for name, module in other.named_modules()}
        named |= {name: module for name, module in inner.items() if module.training and id(module) not in own}
        own |= set(map(id, inner.values()))
    hooks = [hook for module in named.values() for hook in forward_pre_hooks(module)]
    return Norms(
        {name: module for name, module in named.items() if isinstance(module, BatchNorm)},
        {name: m for name, m in named.items() if isinstance(m, InstanceNorm) and m.running_mean is not None},
        (
            *(module for module in named.values() if isinstance(module, ParametrizedSpectralNorm)),
            *(hook for hook in hooks if isinstance(hook, SpectralNorm)),
        ),
    )


def least_micro_batch(norms: Norms, how: str | None) -> int:
    """Return the smallest micro-batch allowed: batch statistics need two samples."""
    return 2 if norms.batch and how not in (FROZEN, EXACT) else 1


def chosen_norms(batchnorm: str | None, batch_interactions: str | None) -> str | None:
    """Return the choice for batch normalizations; exact with exact interactions.

    Raises:
        UsageError: The two contradict each other, or the second isn't known.
    """
    if batch_interactions not in (None, EXACT):
        raise UsageError(
            f"batch_interactions {batch_interactions!r} is not known.", hint=f"Leave it out, or use {EXACT!r}."
        )
    return batchnorm or batch_interactions


def check_choice(norms: Norms, how: str | None, model: nn.Module) -> None:
    """Refuse an unknown or unsupported choice.

    Raises:
        UsageError: It isn't known, or one of the modules doesn't allow it.
    """
    if how is not None and how not in CHOICES:
        raise UsageError(f"batchnorm {how!r} is not known.", hint=f"Use one of {', '.join(CHOICES)}.")
    without = [name for name, module in norms.batch.items() if module.running_mean is None]
    if how == FROZEN and without:
        raise UsageError(
            f"batchnorm='frozen', but {_list(without)} keeps no running statistics (track_running_stats=False).",
            "It always normalizes by the samples it is given, so there is nothing to freeze.",
            "Use batchnorm='per_micro_batch', or replace it: torch.nn.GroupNorm depends on single samples only.",
        )
    compiled = next((n or "the model" for n, m in model.named_modules() if is_compiled_wrapper(m)), None)
    if how == MERGED and compiled is not None and (norms.batch or norms.instance):
        raise UsageError(
            f"batchnorm='merged', but {compiled} is compiled.",
            "Statistics are collected by hooks, which compiled code may leave out without a word.",
            "Use batchnorm='frozen' or 'per_micro_batch', or train without torch.compile.",
        )


def warning(norms: Norms, how: str | None, *, training: bool = False) -> str:
    """Return what to warn of, or "" where all is exact.

    In windows of several micro-batches.

    Args:
        norms: The normalizations.
        how: The choice for batch normalizations.
        training: Whether the model is in train mode already, so that a module which isn't stays so.
    """
    if training:
        batch = {name: module for name, module in norms.batch.items() if module.training}
        norms = replace(norms, batch=batch, instance={n: m for n, m in norms.instance.items() if m.training})
    return " ".join(filter(None, (_batch_warning(norms, how), _instance_warning(norms, how))))


def _instance_warning(norms: Norms, how: str | None) -> str:
    if not norms.instance or how in (MERGED, EXACT):
        return ""
    return (
        f"Instance normalization ({_list(list(norms.instance))}) is exact in its gradient, but its running statistics "
        "are updated once per micro-batch, and end nearer the last ones; batchnorm='merged' updates them once a window."
    )


def _batch_warning(norms: Norms, how: str | None) -> str:
    if not norms.batch or how in (FROZEN, EXACT):
        return ""
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in norms.batch.values())
    running = (
        "Running statistics are merged over the window. "
        if how == MERGED
        else "Running statistics are updated once per micro-batch. "
    )
    return (
        f"Batch normalization ({_list(list(norms.batch))}) takes the statistics of micro-batches, so the gradient is "
        f"not that of the whole batch. {'SyncBatchNorm takes them over ranks, not over time. ' * synced}{running}"
        "batchnorm='exact' is, and so are batchnorm='frozen' and torch.nn.GroupNorm; "
        + ("" if how == MERGED else "batchnorm='merged' makes the running statistics exact; ")
        + f"batchnorm={how or PER_MICRO_BATCH!r} accepts it."
    )


class Window:
    """The normalizations of one window.

    Enter it around the micro-batches, and `forward` around each forward. Where it `waits` for other ranks' statistics,
    running ones are as before until `commit`.
    """

    def __init__(self, norms: Norms, how: str | None, steps: int, *, waits: bool = False) -> None:
        self.norms, self.waits = norms, waits
        self.merges = how == MERGED and steps > 1
        self.merges |= how == MERGED and waits  # other ranks' windows may have more
        self.freezes = how == FROZEN
        self.meets = how == EXACT and steps > 1
        self.steps = steps
        self.collecting = False
        self.merged: list[_Merging] = []
        self._iterated: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Freezes, collects, and puts back what doesn't last."""
        trained = [module for module in self.norms.batch.values() if module.training]
        if self.freezes:
            for module in trained:
                module.training = False
        if self.merges:
            found = [*trained, *(module for module in self.norms.instance.values() if module.training)]
            self.merged = [_Merging(self, module) for module in found if module.running_mean is not None]
        done = False
        try:
            yield
            done = True
        finally:
            for merging in self.merged:
                merging.end(commit=done and not self.waits)
            for module in trained if self.freezes else ():
                module.training = True
            for module, before in self._iterated:
                _set_iterating(module, before)

    @contextlib.contextmanager
    def forward(self, *, again: bool = False) -> Iterator[None]:
        """Collect statistics around a forward.

        What runs outside, checkpointing's second forward in a backward, isn't collected.

        Args:
            again: It repeats a forward whose statistics were collected.
        """
        if self.meets:
            refuse_one_by_one()
        for merging in self.merged if not again else ():
            merging.calls = 0
        self.collecting = not again
        try:
            yield
        finally:
            self.collecting = False
        if self.norms.spectral and not self._iterated and self.steps > 1:
            self._iterated = [(module, _set_iterating(module, False)) for module in self.norms.spectral]

    def commit(self, found: Sequence[Sequence[Statistics]]) -> None:
        """Update running statistics by those of all ranks, by module."""
        for merging, calls in zip(self.merged, found, strict=True):
            for statistics in calls:
                _update(merging.module, statistics)

    def iterate(self, iterates: bool) -> None:
        """Switch spectral normalizations' iteration: on in the first lane only."""
        for module in self.norms.spectral:
            before = _set_iterating(module, iterates)
            if len(self._iterated) < len(self.norms.spectral):
                self._iterated.append((module, before))


class _Merging:
    """The running statistics of one module within a window.

    With a momentum of 1 the module itself writes its batch's statistics, unbiased, where the running ones belong: no
    second pass over its input is needed, and they are just what it normalized by.
    """

    def __init__(self, window: Window, module: NormBase) -> None:
        self.module, self.window, self.momentum, self.calls = module, window, module.momentum, 0
        assert module.running_mean is not None and module.running_var is not None
        self.before = [module.running_mean.clone(), module.running_var.clone()]
        tracked = module.num_batches_tracked
        self.tracked = None if tracked is None else tracked.clone()
        self.found: list[Statistics] = []  # by call within a forward: a module may be used twice
        module.momentum = 1.0
        self.hook = module.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if not self.window.collecting:
            return
        taken = statistics_of(self.module, args[0])
        if self.calls < len(self.found):
            self.found[self.calls] = merge(self.found[self.calls], taken)
        else:
            self.found.append(taken)
        self.calls += 1

    def end(self, *, commit: bool) -> None:
        """Restore the module, and update its running statistics once where wanted."""
        module, (mean, var) = self.module, self.before
        self.hook.remove()
        module.momentum = self.momentum
        assert module.running_mean is not None and module.running_var is not None
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
        if module.num_batches_tracked is not None and self.tracked is not None:
            module.num_batches_tracked.copy_(self.tracked)
        for found in self.found if commit else ():
            _update(module, found)


@dataclass(frozen=True)
class Statistics:
    """Mean and squared deviations of the values in each channel.

    Attributes:
        count: Values in each channel; samples, for an instance normalization.
        mean: Of shape (channels,), in fp64.
        deviations: Their sum of squared deviations from it; for an instance normalization, `count` times the mean of
            its samples' variances. Of shape (channels,), in fp64.
        of_instances: Whether it is of an instance normalization.
    """

    count: int
    mean: torch.Tensor
    deviations: torch.Tensor
    of_instances: bool = False


def statistics_of(module: NormBase, x: torch.Tensor) -> Statistics:
    """Return the statistics that a module with momentum 1 just wrote.

    Args:
        module: The module.
        x: What it was given: (samples, channels, ...); for an instance normalization maybe one sample alone.
    """
    assert module.running_mean is not None and module.running_var is not None
    mean, var = module.running_mean.to(wide_float(x.device)), module.running_var.to(wide_float(x.device))
    if isinstance(module, InstanceNorm):
        samples = x.shape[0] if x.dim() == unbatched_dimensions(module) + 1 else 1
        return Statistics(samples, mean.clone(), var * samples, of_instances=True)
    count = x.numel() // module.num_features
    return Statistics(count, mean.clone(), var * (count - 1))


def merge(one: Statistics, other: Statistics) -> Statistics:
    """Merge two sets of statistics.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
    (1979), equations 2.1; no difference of large squares.
    """
    count = one.count + other.count
    apart = other.mean - one.mean
    mean = one.mean + apart * (other.count / count)
    deviations = one.deviations + other.deviations
    if not one.of_instances:
        deviations = deviations + apart.square() * (one.count * other.count / count)
    return Statistics(count, mean, deviations, one.of_instances)


@torch.no_grad()
def _update(module: NormBase, found: Statistics) -> None:
    """Update running statistics once, as torch does, with unbiased variance."""
    assert module.running_mean is not None and module.running_var is not None
    factor = module.momentum
    if isinstance(module, BatchNorm) and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(module.num_batches_tracked)
    over = found.count if found.of_instances else found.count - 1
    for running, value in ((module.running_mean, found.mean), (module.running_var, found.deviations / over)):
        running.copy_(torch.lerp(running.to(value.dtype), value, factor or 0.0))


def _set_iterating(spectral: Any, iterates: Any) -> Any:
    """Switches a spectral normalization's power iteration; returns how it was."""
    name = "training" if isinstance(spectral, ParametrizedSpectralNorm) else "n_power_iterations"
    before = getattr(spectral, name)
    setattr(spectral, name, iterates if name == "training" else int(iterates))
    return before


def wide_float(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _list(names: list[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
