"""Describe and compare a plan's batch form, model, optimizer and device."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch

from .. import __version__
from ..data import tree
from ..data.collated import COLLATED, Collated, tensor_bytes
from ..data.groups import Grouped
from ..devices.registry import get_device
from ..errors import BatchError, PlanMismatch
from ..plan import LeafForm
from ..units import show_bytes
from .step import TrainingContext

Signature = tuple[LeafForm, ...]


def signature(batch: Any) -> Signature:
    """Return a batch's form: every tensor's place, dtype and trailing shape.

    A batch that isn't cut by rows has no such places; its form is the bytes of its largest sample.
    """
    if isinstance(batch, Collated):
        return (LeafForm(COLLATED, "bytes", (tensor_bytes(batch.tiled(1)),)),)
    if isinstance(batch, Grouped):
        return signature(batch.rows)
    return tuple(
        LeafForm(path, str(leaf.dtype), tuple(leaf.shape[1:]))
        for path, leaf in tree.leaves(batch)
        if isinstance(leaf, torch.Tensor)
    )


def is_collated(planned: Signature) -> bool:
    """Return whether a plan's batches are made by their loader alone."""
    return len(planned) == 1 and planned[0].path == COLLATED


def check_signature(batch: Any, planned: Signature, rows: int | None = None) -> None:
    """Refuses a micro-batch that could need more memory than the plan knows.

    A trailing dimension may be shorter than planned (a padded sequence), never longer. A picture, in floating point
    with several trailing dimensions, may have other sides, as long as it has no more elements.

    Args:
        batch: The micro-batch.
        planned: The plan's form.
        rows: Its samples, where they are known.

    Raises:
        BatchError: Another structure or dtype, or a longer dimension.
    """
    if is_collated(planned):
        _check_bytes(batch, planned[0].trailing_shape[0], rows)
        return
    found = signature(batch)
    if [leaf.path for leaf in found] != [leaf.path for leaf in planned]:
        raise BatchError(
            f"The batch holds {_names(found)}; the plan was made for {_names(planned)}.",
            "Another structure needs other memory, and maybe another model.",
            "Plan again with a sample like this batch.",
        )
    _refuse_single_samples(found, planned)
    pictures = {leaf.trailing_shape[-2:] for leaf in found if _is_picture(leaf)}
    for leaf, plan in zip(found, planned, strict=True):
        fits = _fits(leaf, plan, pictures)
        if leaf.dtype != plan.dtype or not fits:
            raise BatchError(
                f"{leaf.path} is {leaf.dtype} of {leaf.trailing_shape} a sample; "
                f"the plan knows {plan.dtype} of at most {plan.trailing_shape}.",
                "It could need more memory than was planned, so it is refused before its forward.",
                "Plan again with a sample of the longest sequence, or the largest picture, of the data.",
            )


def _refuse_single_samples(found: Signature, planned: Signature) -> None:
    """Refuse a loader's samples that were given in the place of batches."""
    pairs = [(leaf, plan) for leaf, plan in zip(found, planned, strict=True) if plan.trailing_shape]
    if pairs and all(leaf.trailing_shape == plan.trailing_shape[1:] for leaf, plan in pairs):
        leaf, plan = pairs[0]
        raise BatchError(
            f"{leaf.path} has {len(leaf.trailing_shape) + 1} dimensions, and the plan's sample has "
            f"{len(plan.trailing_shape) + 1}: the loader gives single samples, it seems, and not batches.",
            "Cut along dimension 0, each sample would be cut apart.",
            "Give the DataLoader a batch_size; any will do.",
        )


def is_narrower(batch: Any, planned: Signature, rows: int) -> bool:
    """Return whether a micro-batch's samples are smaller than planned, or others."""
    if is_collated(planned):
        return tensor_bytes(batch) < rows * planned[0].trailing_shape[0]
    return [leaf.trailing_shape for leaf in signature(batch)] != [leaf.trailing_shape for leaf in planned]


def _check_bytes(batch: Any, sample_bytes: int, rows: int | None) -> None:
    if rows is not None and (found := tensor_bytes(batch)) > rows * sample_bytes:
        raise BatchError(
            f"A micro-batch of {rows} samples has {show_bytes(found)}; the plan knows at most "
            f"{show_bytes(sample_bytes)} a sample.",
            "It could need more memory than was planned, so it is refused before its forward.",
            "Plan again with the index of the dataset's largest sample: Workload(..., largest=index).",
        )


def _fits(leaf: LeafForm, plan: LeafForm, pictures: Collection[tuple[int, ...]]) -> bool:
    """Return whether a leaf needs no more memory than the planned one."""
    own, planned = leaf.trailing_shape, plan.trailing_shape
    if len(own) != len(planned):
        return False
    if _is_picture(leaf) or (len(own) == 2 and own in pictures):  # a mask of a picture's pixels
        return prod(own) <= prod(planned)
    return all(a <= b for a, b in zip(own, planned, strict=True))


def _is_picture(leaf: LeafForm) -> bool:
    return len(leaf.trailing_shape) >= 2 and leaf.dtype.startswith(("torch.float", "torch.bfloat"))


def _names(form: Signature) -> str:
    return ", ".join(leaf.path for leaf in form) or "no tensors"


def fingerprint(context: TrainingContext) -> dict[str, str]:
    """Return what a plan depends on, by name.

    The Runner compares each entry, and names those that differ.
    """
    optimizer = context.optimizer
    group = optimizer.param_groups[0]
    flags = [name for name in ("foreach", "fused", "amsgrad", "momentum", "capturable") if group.get(name)]
    device = get_device(context.device)
    return {
        "model": describe_model(context.model),
        "loss": getattr(context.loss, "__qualname__", type(context.loss).__name__),
        "optimizer": " ".join([type(optimizer).__name__, *flags]),
        "precision": str(context.autocast_dtype or "as the model is"),
        "window": _window_words(context),
        "device": device.name,
        **device.settings_words(),
        **({"configuration": context.configuration} if context.configuration is not None else {}),
        "torch": torch.__version__,
        "autoaccum": __version__,
    }


def describe_model(model: torch.nn.Module) -> str:
    """Return a model's class and a digest of its structure."""
    return f"{type(model).__name__} {_digest(_structure(model))}"


def _window_words(context: TrainingContext) -> str:
    """Describe what else a window does that needs memory."""
    does = {
        "clips": context.clip_grad_norm is not None,
        "scales": context.scaler is not None,
        "encodes apart": context.encode is not None,
        "runs between windows": context.between_steps is not None,
        "takes a metric": context.metric is not None,
        f"groups of {context.samples_per_group}": context.samples_per_group > 1,
        "copies ahead": context.copies.ahead,
        f"batchnorm {context.batchnorm}": context.batchnorm is not None,
        f"batch interactions {context.batch_interactions}": context.batch_interactions is not None,
        "adds up as parameters": context.accumulate != "fp32",
    }
    return ", ".join(word for word, true in does.items() if true) or "plain"


def check_fingerprint(found: Mapping[str, str], planned: Mapping[str, str]) -> None:
    """Refuses a plan that was made for something else.

    Raises:
        PlanMismatch: Names every entry that differs.
    """
    differing = [name for name in {**planned, **found} if found.get(name) != planned.get(name)]
    if differing and set(differing) <= {"torch", "allocator reuses"}:
        raise _other_torch(found, planned)
    if differing:
        differences = "; ".join(
            f"{name}: planned {planned.get(name)!r}, here {found.get(name)!r}" for name in differing
        )
        raise PlanMismatch(
            f"The plan was made for something else ({differences}).",
            "Its memory would be another one.",
            "Plan again: autoaccum plan, or fit_plan(workload).",
        )


def _other_torch(found: Mapping[str, str], planned: Mapping[str, str]) -> PlanMismatch:
    """Return the error for a plan of another torch and nothing else."""
    then, now = planned.get("torch", "another version"), found.get("torch", "another version")
    rule, own = planned.get("allocator reuses"), found.get("allocator reuses")
    why = "Its memory would be another one: each version has its own operators, libraries and workspaces."
    if rule != own:
        why = f"Of equal free blocks that allocator reuses the one with the {rule}, this one that with the {own}."
    return PlanMismatch(
        f"The plan was made under torch {then}, and this is torch {now}.",
        why,
        f"Plan again: autoaccum plan, or fit_plan(workload); or go back: pip install torch=={then.split('+')[0]}",
    )


def _structure(model: torch.nn.Module) -> str:
    modules = [f"{name}:{type(module).__qualname__}" for name, module in model.named_modules()]
    tensors = [
        f"{name}:{tuple(p.shape)}:{p.dtype}:{p.requires_grad}"
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    ]
    return "\n".join(modules + tensors)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
