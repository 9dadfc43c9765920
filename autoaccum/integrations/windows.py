"""Give a plan's windows to a loop of the user's own.

for window in autoaccum.windows(loader, plan):
    for micro in window:
        window.backward(criterion(model(micro.batch[0]), micro.batch[1]))
    window.step(optimizer)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..data import bad_batches
from ..data.groups import check_groups
from ..data.loaders import loader_length
from ..data.prefetch import Copies
from ..data.resplit import counted
from ..data.window import Window, widest_first
from ..data.windows import windows as data_windows
from ..devices.cpu import page_cache
from ..devices.registry import get_device
from ..errors import BatchError, PlanMismatch, UsageError
from ..plan import Plan
from ..ranks.group import ranks_here
from ..runner.compatibility import hook_warnings
from ..runner.sizing import Sizing
from ..simulation.solver import rank_share
from ..window import norms
from ..window.fingerprint import check_signature, describe_model, is_collated
from ..window.widths import watch_widths
from ..workload import Batch
from ..workload_arguments import read_lengths
from .counts import Count, counter_for
from .gradients import LoopGradients
from .loop_backend import LoopBackend
from .loop_window import LoopState, LoopWindow
from .ranks import agree

log = logging.getLogger("autoaccum")


def windows(
    loader: Iterable[Batch],
    plan: Plan | str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    accelerator: Any = None,
    scaler: Any = None,
    count: Count | str | None = None,
    device: torch.device | str | None = None,
    lengths: Sequence[int] | None = None,
    shared: Collection[str] = (),
    per_sample: Collection[str] = (),
) -> Windows:
    """Return a loader's windows, each with the plan's samples and micro-batches.

    Each iteration over the result is one epoch. No sample is lost; the last window has its real size.

    Args:
        loader: A DataLoader, or any iterable of batches; its own batch size doesn't matter.
        plan: The plan, or the name of its file.
        model: The model in the loop. Needed on several ranks (the DistributedDataParallel module) and for
            `window.recovering()`; else it is compared with the plan's.
        accelerator: An `accelerate.Accelerator`, whose backward, clipping and stepping are then used.
        scaler: A `torch.amp.GradScaler`, for fp16.
        count: `count(batch)`, what the loop's loss averages over: tokens that aren't ignored, say. "samples" where each
            sample counts alike. None for what the plan's loss averages over.
        device: Where micro-batches are trained. None for the accelerator's, the model's, or the plan's.
        lengths: The length of each sample of a map-style loader's data set, as for `Workload`.
        shared: Keys of what each micro-batch gets whole, as for `Workload`.
        per_sample: Keys of what has a row for each sample, as for `Workload`.

    Raises:
        UsageError: The loader isn't one, or the window's count can't be known.
        PlanMismatch: The plan is for another model, device or number of ranks.
    """
    backend = _backend(loader, model, accelerator, scaler)
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    check_groups(plan.request.samples_per_group, loader, has_lengths=lengths is not None)
    where = _device(plan, backend.model, device or getattr(accelerator, "device", None))
    _check_plan(plan, backend.model, where)
    _warn(backend.model, plan.accumulation_steps)
    sizing = Sizing(plan, plan.request.min_micro_batch, shared=shared, per_sample=per_sample)
    state = LoopState(
        plan=plan,
        device=where,
        backend=backend,
        counter=counter_for(plan, count),
        sizing=sizing,
        gradients=LoopGradients(backend.model.parameters() if backend.model is not None else ()),
        copies=Copies(where, ahead=bool(getattr(loader, "pin_memory", False))),
        widths=watch_widths(where, plan),
    )
    return Windows(loader, state, read_lengths(lengths, loader))


class Windows:
    """The windows of a loader; each iteration is one epoch.

    Make it once, before the loop over epochs: sizes that an out-of-memory lowered stay lowered. `len` is the number of
    windows of an epoch, where the loader knows its samples.

    Args:
        loader: The loader.
        state: What the windows share.
        lengths: The length of each sample, or None.
    """

    def __init__(self, loader: Iterable[Batch], state: LoopState, lengths: Sequence[int] | None) -> None:
        self._loader, self._state, self._lengths = loader, state, lengths
        self._samples = rank_share(state.plan.target_batch, ranks_here(), _rank())

    @property
    def steps_taken(self) -> int:
        """Optimizer steps so far; a skipped one doesn't count."""
        return self._state.steps_taken

    def __len__(self) -> int:
        sizing = self._state.sizing
        length = loader_length(self._loader, self._samples, least=sizing.least, **sizing.batch_keys)
        if length is None:
            raise TypeError("the loader doesn't know its number of samples, so its windows can't be counted")
        return length

    def __iter__(self) -> Iterator[LoopWindow]:
        """Begin an epoch.

        A `BatchError` names the samples of a batch that can't be cut; the next window follows it.
        """
        return bad_batches.Surviving(self._epoch())

    def _epoch(self) -> Iterator[LoopWindow | BatchError]:
        state = self._state
        sizing = state.sizing
        found = data_windows(
            self._loader,
            self._samples,
            sizing.sizes,
            lengths=self._lengths,
            split_of_lengths=sizing.sizes_of_lengths,
            least=sizing.least,
            collates=is_collated(state.plan.provenance.signature),
            group=state.plan.request.samples_per_group,
            **sizing.batch_keys,
        ).items
        if state.steps_taken == 0:
            get_device(state.device).release_cache()
        while True:
            item = next(found, None)
            try:
                window = Window((), ()) if item is None else self._checked(item)
            except BatchError as error:
                yield error
                continue
            counts = state.counter.counts(window)
            totals = agree(window.sizes, counts, state.device)
            if not totals.samples:
                return
            current = LoopWindow(state, window, counts, totals)
            del item, window
            yield current
            current.require_closed()

    def _checked(self, window: Window | BatchError) -> Window:
        """Check the form of each micro-batch before any is trained.

        Raises:
            BatchError: One has another form than the plan's, with its samples.
        """
        if isinstance(window, BatchError):
            raise window
        try:
            for piece, rows in zip(window.pieces, window.sizes, strict=True):
                check_signature(piece, self._state.plan.provenance.signature, rows)
            fitted = self._state.sizing.fitted(counted(window, self._state.sizing.batch_keys))
            return fitted if self._state.widths is None else widest_first(fitted)
        except BatchError as error:
            raise bad_batches.of_samples(error, window.samples, window.origin) from None


def _backend(loader: Any, model: nn.Module | None, accelerator: Any, scaler: Any) -> LoopBackend:
    if accelerator is None:
        _warn_of_repeated_samples(loader)
        return LoopBackend(model, scaler)
    if scaler is not None:
        raise UsageError(
            "scaler= and accelerator= were both given.",
            "An Accelerator has its own scaler, and a loss would be scaled twice.",
            "Leave out scaler=.",
        )
    from .accelerate import AcceleratorBackend

    return AcceleratorBackend(accelerator, model, loader)


def _rank() -> int:
    return torch.distributed.get_rank() if ranks_here() > 1 else 0


def _device(plan: Plan, model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is not None:
        return parameter.device
    if plan.on_cuda and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_plan(plan: Plan, model: nn.Module | None, device: torch.device) -> None:
    """Compare what is known of the loop with the plan.

    Raises:
        PlanMismatch: It differs.
    """
    differing = []
    if plan.on_cuda != (device.type == "cuda"):
        differing.append(f"device: planned {plan.device.name!r}, here {str(device)!r}")
    if plan.world_size not in (1, ranks_here()):
        differing.append(f"ranks: planned {plan.world_size}, here {ranks_here()}")
    if model is not None:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        planned, found = plan.provenance.fingerprint.get("model"), describe_model(inner)
        if planned != found:
            differing.append(f"model: planned {planned!r}, here {found!r}")
    if differing:
        raise PlanMismatch(
            f"The plan was made for something else ({'; '.join(differing)}).",
            "Its memory would be another one.",
            "Plan again: autoaccum plan, or fit_plan(workload).",
        )
    page_cache.apply_planned(plan.device)


def _warn(model: nn.Module | None, steps: int) -> None:
    """Warn of what works differently in several micro-batches of a model."""
    if model is None or steps < 2:
        return
    batch = [name for name, module in norms.find_norms(model).batch.items() if module.training]
    if batch:
        more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
        log.warning(
            "Batch normalization (%s%s) takes the statistics of micro-batches, so the gradient isn't that of the whole "
            "batch. Runner takes the whole window's (batchnorm='exact'); in this loop module.eval() or "
            "torch.nn.GroupNorm is exact.", batch[0], more,
        )  # fmt: skip
    for text in filter(None, hook_warnings(model, steps)):
        log.warning("%s", text)


def _warn_of_repeated_samples(loader: Any) -> None:
    """Warn where a DistributedSampler repeats samples to make ranks equal."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, torch.utils.data.DistributedSampler) or sampler.drop_last:
        return
    repeated = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
    if repeated:
        log.warning(
            "DistributedSampler repeats %d samples at the end of each epoch, so that ranks have as many: its last "
            "window counts these twice.", repeated,
        )  # fmt: skip
