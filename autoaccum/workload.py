"""Define a workload: model, sample, loss, optimizer and data.

Planning and training read the same workload; it holds no memory figures and no plan.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .workload_arguments import (
    PRECISIONS,
    check_functions,
    check_model,
    check_names,
    check_number,
    make_scaler,
    read_largest,
    read_lengths,
    read_optimization,
    read_precision,
    read_sample,
    read_whole,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

Batch = Any  # a pytree of tensors whose first dimension is the samples
Loss = Callable[["nn.Module", Batch], Any]

__all__ = ["PRECISIONS", "Batch", "Loss", "Workload", "as_workload", "class_count", "default_loss", "is_pair"]

ON_NONFINITE = ("raise", "skip", "warn")
ACCUMULATE = ("fp32", "as_parameters")
INTERVALS = ("step", "epoch")
IGNORED = -100  # cross_entropy's ignore_index, and Hugging Face's


@dataclass(frozen=True, eq=False)
class Workload:
    """Hold a model and all that its optimizer step needs.

    Attributes:
        model: The module to train, on the device where it is to be trained.
        sample: One small batch of real data, a pytree of tensors or arrays with the samples in dimension 0.
            Sequences should have the longest length that training will see: memory follows it (or give `lengths`).
            A DataLoader or a dataset is taken for `loader` as well; one item of a dataset becomes a batch of one.
        loss: A criterion for `(input, target)` batches, like `nn.CrossEntropyLoss()`; or `loss(model, batch)`,
            returning the mean over the batch as a scalar, or `(sum, count)`, or `LossTerms(sum, count, extra)` where
            something is added that belongs to the window once: a penalty on the weights, a mixture of experts'
            auxiliary loss; or a dictionary with one of these as "loss". Left out: `model(**batch).loss` for mappings,
            cross-entropy for an `(input, class)` pair.
        encode: `encode(model, batch)`, for a loss over the representations of all samples (contrastive losses, mined
            triplets, Dice): a tree of tensors with the samples in dimension 0, labels included where the loss needs
            them. `loss(model, representations)` then gets those of the whole window, at the price of one more
            forward, and its gradient is the whole batch's.
        optimizer: An optimizer over the model's parameters, or a function that makes one from a list of
            parameters; the name of one of torch.optim's ("adamw"), with its defaults; or what Lightning's
            `configure_optimizers()` returns, if that is one optimizer. Left out: AdamW with torch's defaults.
        precision: "fp32", "bf16" or "fp16" autocast (or torch.bfloat16, "bf16-mixed"); left out: fp32, as the model is.
        scaler: A `torch.amp.GradScaler`, for fp16; True for one with torch's defaults.
        scheduler: A learning rate scheduler, or a function that makes one from the optimizer; stepped once a window.
            One that asks for a metric (ReduceLROnPlateau) gets `metric`, or else the window's loss. One of timm's gets
            `step_update(updates)` after each window, and `step(epoch)` at the end of each `Runner.epoch`.
        scheduler_interval: "step", or "epoch" for a scheduler that is stepped at the end of each `Runner.epoch`, as
            Lightning does unless its dictionary says "step".
        metric: `metric(model)`, a figure for such a scheduler: a validation loss, say. Called after each optimizer
            step; where it returns None, the scheduler isn't stepped. Recorded, as it needs memory.
        clip_grad_norm: The largest norm of the whole window's gradient; left out: no clipping.
        batchnorm: How batch normalization is treated within a window: "per_micro_batch", each micro-batch's own
            statistics (another gradient than the whole batch's; the default, with a warning); "merged", the same
            gradient, but running statistics merged over the window; "frozen", running statistics as they are: exact;
            "exact", the whole batch's statistics and gradient: micro-batches run in lanes that meet at each layer.
        batch_interactions: "exact" lets the micro-batches of a window run in such lanes even without batch
            normalization, for a model or a loss that calls `autoaccum.gather_window`.
        on_nonfinite: The reaction to a window's gradient that isn't finite: "raise" `NotFinite`, "skip" the step, or
            "warn". A scaler skips it anyway. Left out: not checked, as in a plain loop.
        accumulate: How gradients of bf16 or fp16 parameters add up over a window: in "fp32", cast once for the
            optimizer (the default; 2 bytes a parameter more while micro-batches run), or "as_parameters", in their own
            precision, as in a plain loop: what is below a 256th of a bf16 sum is lost.
        between_steps: Called between windows, with the model (an evaluation, say); recorded, as it needs memory too.
        count: `count(batch)`, what the loss averages over or counts, read off the batch alone. A mean is then weighted
            by it instead of by samples; a `(sum, count)` loss is spared a forward pass that only counts. Left out for
            the default cross-entropy: the classes that aren't ignored.
        samples_per_group: Samples that belong together and come behind one another: 2 for pairs, 3 for triplets, the
            generations of a prompt. No group is cut apart, and the target is a multiple of it.
        shared: Names of tensors that each micro-batch gets whole, if their shape doesn't show it.
        per_sample: Names of tensors with a row for each sample, if their shape doesn't show it.
        loader: Training data: a DataLoader, an iterable of batches, or a function that makes one.
            Planning loads nothing from it; if its size is known (a DataLoader, a list), planning without a target
            tries no larger micro-batch. `autoaccum run` reads it.
        largest: Index of the largest sample of a map-style loader's data set, which planning then makes its batches of.
            Left out: the largest of a few that it looks at, or of `lengths`.
        lengths: For sequences from a map-style loader: the length of each sample of its data set, in what the batch's
            dimension 1 counts. A window's samples then come longest first, so that each micro-batch is padded little;
            its gradient is the same. Planning lengthens a shorter sample to the longest.
        max_tokens: With lengths: the most tokens in a micro-batch, padding included, as well as its most samples. The
            longest samples then come few at a time, as planned, and shorter ones in as many rows as planning tried.
        name: Name of this workload in a plan.
        configuration: The choices that `autoaccum.configure` applied, as text; part of a plan's fingerprint.
    """

    model: nn.Module
    sample: Batch = None
    loss: Loss | None = field(default=None, kw_only=True)
    encode: Callable[[nn.Module, Batch], Any] | None = field(default=None, kw_only=True)
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = field(default=None, kw_only=True)
    precision: str | None = field(default=None, kw_only=True)
    scaler: Any = field(default=None, kw_only=True)
    scheduler: Any = field(default=None, kw_only=True)
    scheduler_interval: str = field(default="step", kw_only=True)
    metric: Callable[[nn.Module], float | torch.Tensor | None] | None = field(default=None, kw_only=True)
    clip_grad_norm: float | None = field(default=None, kw_only=True)
    batchnorm: str | None = field(default=None, kw_only=True)
    batch_interactions: str | None = field(default=None, kw_only=True)
    on_nonfinite: str | None = field(default=None, kw_only=True)
    accumulate: str = field(default="fp32", kw_only=True)
    between_steps: Callable[[nn.Module], object] | None = field(default=None, kw_only=True)
    count: Callable[[Batch], float | torch.Tensor] | None = field(default=None, kw_only=True)
    samples_per_group: int = field(default=1, kw_only=True)
    shared: Collection[str] = field(default=(), kw_only=True)
    per_sample: Collection[str] = field(default=(), kw_only=True)
    loader: Iterable[Batch] | Callable[[], Iterable[Batch]] | None = field(default=None, kw_only=True)
    largest: int | None = field(default=None, kw_only=True)
    lengths: Sequence[int] | None = field(default=None, kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    configuration: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_model(self.model)
        self._accept_other_forms()
        self._check_choices()
        if self.loss is not None and self.encode is None:
            from .criterion import check_loss

            check_loss(self.loss, self.sample)
        check_functions(
            loss=self.loss, encode=self.encode, metric=self.metric, between_steps=self.between_steps, count=self.count
        )
        check_number("clip_grad_norm", self.clip_grad_norm)
        check_names(shared=self.shared, per_sample=self.per_sample)

    def _accept_other_forms(self) -> None:
        """Replace what was given in another form by what it stands for."""
        optimizer, scheduler, interval = read_optimization(self.optimizer, self.scheduler)
        sample, loader = read_sample(self.sample, self.loader)
        accepted = {
            "optimizer": optimizer,
            "scheduler": scheduler,
            "scheduler_interval": interval if scheduler is not self.scheduler else self.scheduler_interval,
            "precision": read_precision(self.precision),
            "scaler": make_scaler(self.scaler, self.model),
            "sample": sample,
            "loader": loader,
            "lengths": read_lengths(self.lengths, loader),
            "largest": read_largest(self.largest, loader),
            **{name: read_whole(name, getattr(self, name)) for name in ("max_tokens", "samples_per_group")},
        }
        for name, value in accepted.items():
            object.__setattr__(self, name, value)  # the class is frozen for everybody else

    def _check_choices(self) -> None:
        choices = (
            ("on_nonfinite", self.on_nonfinite, (None, *ON_NONFINITE)),
            ("accumulate", self.accumulate, ACCUMULATE),
            ("scheduler_interval", self.scheduler_interval, INTERVALS),
        )
        for name, value, known in choices:
            if value not in known:
                raise UsageError(
                    f"{name} {value!r} is not known.", hint=f"Use one of {', '.join(filter(None, known))}."
                )
        if self.max_tokens is not None and (self.lengths is None or self.max_tokens < 1):
            raise UsageError(
                f"max_tokens is {self.max_tokens}, and lengths are {'not ' if self.lengths is None else ''}given.",
                "A budget of tokens needs the length of each sample, and at least 1.",
                "Give lengths=[len(sample) for each sample of the data set].",
            )
        if self.encode is not None and self.loss is None:
            raise UsageError(
                "encode= was given without loss=.",
                "encode makes the representations that loss(model, representations) is computed from.",
                "Give loss=lambda model, representations: ...",
            )


def as_workload(given: Any, sample: Batch, keywords: Mapping[str, Any], *, caller: str = "fit_plan") -> Workload:
    """Return the workload that the arguments of `fit_plan` or Runner describe.

    Args:
        given: A workload, or a model.
        sample: The sample for a model; None for none.
        keywords: `Workload`'s other arguments for a model.
        caller: Who was given them.

    Raises:
        UsageError: They don't go together.
    """
    if isinstance(given, Workload):
        if sample is not None or keywords:
            names = ", ".join(["sample"] * (sample is not None) + list(keywords))
            meant = "" if sample is not None else _meant(keywords, _OF_PLANNING if caller == "fit_plan" else {})
            raise UsageError(f"{names} cannot be combined with a Workload.", hint=meant or "Give it to the Workload.")
        return given
    if not hasattr(given, "parameters"):
        raise UsageError(
            f"{caller} was given {type(given).__name__}, neither a Workload nor a torch.nn.Module.",
            hint="fit_plan(Workload(model, sample, ...), target_batch=512) or fit_plan(model, sample, ...)"
            if caller == "fit_plan"
            else "Runner(Workload(model, sample, ...), plan) or Runner(model, plan, loss=..., optimizer=...)",
        )
    try:
        return Workload(given, sample, **keywords)
    except TypeError as error:
        raise UsageError(
            _unexpected(str(error), caller), hint=_meant(keywords, _MEANT) or "See help(Workload)."
        ) from None


def _unexpected(error: str, caller: str) -> str:
    return f"{error}.".replace("Workload.__init__()", caller)


_OF_PLANNING = {
    "batch_size": "target_batch", "effective_batch": "target_batch", "memory": "budget", "max_memory": "budget",
    "micro_batch": "max_micro_batch", "max_batch_size": "max_micro_batch",
}  # fmt: skip
_MEANT = {**_OF_PLANNING, "criterion": "loss", "max_grad_norm": "clip_grad_norm"}


def _meant(keywords: Mapping[str, Any], others: Mapping[str, str]) -> str:
    """Return the hint for a keyword that isn't known; "" for none."""
    known = [each.name for each in fields(Workload)]
    for name in keywords:
        near = [others[name]] if name in others else difflib.get_close_matches(name, known, n=1)
        if name not in known and near:
            return f"Did you mean {near[0]}=?"
    return ""


def default_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the loss of a workload without a `loss`.

    Args:
        model: The module to train.
        batch: A mapping that the model takes as keywords and answers with `.loss`; or a pair of
            input and integer classes, whose logits have their classes in the last dimension.

    Returns:
        The mean loss, a scalar.

    Raises:
        UsageError: The batch or the model's output has another form.
    """
    import torch.nn.functional as F

    if isinstance(batch, Mapping):
        try:
            out = model(**batch)
        except TypeError as error:
            if takes_keywords(model, batch):
                raise
            names = ", ".join(map(repr, batch))
            raise _no_loss(model, f"was called with the batch's {names}: {error}") from None
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if loss is None:
            raise _no_loss(model, f"returned {type(out).__name__} without a .loss")
        return loss  # type: ignore[no-any-return]
    if not is_pair(batch):
        what = f"is given a {type(batch).__name__}, neither a mapping nor an (input, class) pair"
        items = isinstance(batch, list) and len(batch) > 0 and isinstance(batch[0], (tuple, list, Mapping))
        raise _no_loss(model, what, "Collate the items: torch.utils.data.default_collate(items). " if items else "")
    inputs, classes = batch
    logits = model(inputs)
    if not hasattr(logits, "dim"):
        raise _no_loss(model, f"returned {type(logits).__name__}, not a tensor of logits")
    if classes.is_floating_point() or not _are_of_last_dimension(logits, classes):
        shapes = f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(classes.shape)}"
        hint = "torch.nn.CrossEntropyLoss() takes them: loss=torch.nn.CrossEntropyLoss(). "
        taken = not classes.is_floating_point() and _are_of_dimension_1(logits, classes)
        what = f"gives {shapes} ({classes.dtype}), which cross-entropy cannot pair"
        raise _no_loss(model, f"{what} with classes in the last dimension", hint if taken else "")
    # Not reduction="mean": where all classes are ignored it is 0 / 0, and NaN times a weight of 0 is still NaN.
    return F.cross_entropy(logits.flatten(0, -2), classes.flatten(), reduction="sum") / class_count(batch).clamp(min=1)


def _are_of_last_dimension(logits: torch.Tensor, classes: torch.Tensor) -> bool:
    """Return whether the logits' last dimension holds the classes.

    Not by their number alone: logits of pictures, (samples, classes, height, width), with as many classes as columns
    have as many rows as there are pixels.
    """
    if logits.shape[:-1].numel() != classes.numel():
        return False
    if logits.dim() <= 2 or classes.dim() == 1 or classes.shape == (*logits.shape[:-1], 1):
        return True
    return classes.shape == logits.shape[:-1] and not (logits.dim() > 3 and _are_of_dimension_1(logits, classes))


def _are_of_dimension_1(logits: torch.Tensor, classes: torch.Tensor) -> bool:
    return logits.dim() > 2 and classes.shape == (*logits.shape[:1], *logits.shape[2:])


def class_count(batch: Batch) -> torch.Tensor:
    """Count the labels that aren't ignored (-100), as the default cross-entropy does."""
    _, classes = batch
    return (classes != IGNORED).sum()  # type: ignore[no-any-return]


def is_pair(batch: Batch) -> bool:
    """Return whether a batch is a pair of input and classes."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def takes_keywords(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a model takes a batch's entries as keywords."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _no_loss(model: nn.Module, what: str, hint: str = "") -> UsageError:
    return UsageError(
        f"No loss was given, and {type(model).__name__} {what}.",
        hint=f"{hint}Give the loss: Workload(model, sample, loss=lambda model, batch: ...), a mean or (sum, count).",
    )
