"""Refuse, by name, what a Trainer can't train in windows."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from ..errors import PlanMismatch, UsageError
from ..plan import Plan
from ..planning.request import PlanRequest
from ..units import check_samples
from .hugging_face_loss import Average

log = logging.getLogger("autoaccum")

# Trainers that generate what they train on, and cut it themselves (trl: grpo_trainer.py:_prepare_inputs).
_GENERATING = ("GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "NashMDTrainer", "XPOTrainer", "PPOTrainer")

_COUPLED_TYPES = ("aot", "aot_unpaired")


def refuse_unsupported(trainer: Any) -> None:
    """Refuse trainers and arguments that work against windows.

    Raises:
        UsageError: Names it, and says what to do.
    """
    args, accelerator = trainer.args, trainer.accelerator
    generating = next((cls.__name__ for cls in type(trainer).__mro__ if cls.__name__ in _GENERATING), None)
    if generating is not None:
        raise UsageError(
            f"{type(trainer).__name__} is a {generating}, which generates its batches and cuts them itself.",
            "Its generations of one prompt belong together, and its own counters decide where a step ends.",
            f"Use {generating} without ExactTrainerMixin.",
        )
    if coupled := _coupled_loss(trainer):
        raise UsageError(
            f"{type(trainer).__name__} has {coupled}.",
            "Micro-batches would have others, and at the beginning, where the model is its own reference, no test sees "
            "the difference.",
            "Choose a loss that is a mean over samples (KTO's apo_zero_unpaired, DPO's sigmoid), or train it without "
            "ExactTrainerMixin.",
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    reasons = {
        "auto_find_batch_size=True": (
            args.auto_find_batch_size,
            "It starts training over with half the batch, which changes the effective batch; here a window that runs "
            "out of memory is trained again in smaller micro-batches.",
            "Leave it out.",
        ),
        "DeepSpeed": (
            trainer.is_deepspeed_enabled,
            "It counts micro-batches itself, so that their number can't follow a plan.",
            "Plan with autoaccum.fit_plan, and give DeepSpeed its three numbers.",
        ),
        "FSDP": (
            trainer.is_fsdp_enabled or sharded,
            "A window's memory is planned for one device that holds the whole model.",
            "Train without it (DDP works: torchrun).",
        ),
        f"DataParallel over {args.n_gpu} GPUs": (
            args.n_gpu > 1,
            "One process would scatter each micro-batch over several GPUs.",
            f"Start one process for each: torchrun --nproc-per-node {args.n_gpu}; or one GPU: CUDA_VISIBLE_DEVICES=0.",
        ),
        "a model over several devices (device_map)": (
            trainer.is_model_parallel,
            "A window's memory is planned for one device.",
            "Load it onto one device.",
        ),
        "context or tensor parallelism": (
            parallelism is not None and getattr(parallelism, "total_size", 1) > 1,
            "Several ranks would share a sample.",
            "Train with data parallelism only.",
        ),
    }
    for name, (there, why, hint) in reasons.items():
        if there:
            raise UsageError(f"{type(trainer).__name__} can't train with {name}.", why, hint)


def target_of(args: Any, target_batch: int | None, plan: Plan | None) -> int:
    """Return the effective batch.

    Args:
        args: The TrainingArguments.
        target_batch: What was asked for; None for the plan's, or what the arguments multiply to.
        plan: The plan that was given.

    Raises:
        UsageError: The ranks can't share it equally.
    """
    check_samples("target_batch", target_batch)
    multiplied = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    target = target_batch or (plan.target_batch if plan is not None else multiplied)
    if target % args.world_size:
        below = target - target % args.world_size
        raise UsageError(
            f"A target batch of {target} can't be shared equally by {args.world_size} ranks.",
            "The Trainer's loader gives each rank as many samples.",
            f"Use target_batch={below + args.world_size}" + (f" or {below}." if below else "."),
        )
    return int(target)


def _coupled_loss(trainer: Any) -> str:
    """Return what trl's loss takes from a whole batch; "" for nothing.

    trl 1.16: kto_trainer.py averages the KL term over the batch, and pairs its completions within batches before
    training; dpo_trainer.py sorts a batch's ratios (aot).
    """
    if getattr(trainer, "calculate_KL", False):
        return f"loss_type={trainer.args.loss_type!r}, whose KL term is a mean over a whole batch"
    kinds = getattr(trainer, "loss_types", None)
    found = [kind for kind in kinds if kind in _COUPLED_TYPES] if isinstance(kinds, (list, tuple)) else []
    return f"loss_type={found[0]!r}, which compares the pairs of a whole batch" if found else ""


def check_loader_of(trainer: Any, loader: Any) -> None:
    """Refuse a training loader whose batches can't be whole windows.

    Raises:
        UsageError: It is no DataLoader, or has another batch size.
    """
    window, name = trainer._train_batch_size, type(trainer).__name__
    if not isinstance(loader, DataLoader):
        raise UsageError(
            f"get_train_dataloader of {name} returned a {type(loader).__name__}.",
            "A window is what a DataLoader collates for one optimizer step.",
            "Return a torch.utils.data.DataLoader with batch_size=self._train_batch_size.",
        )
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is not None and size != window:
        raise UsageError(
            f"get_train_dataloader of {name} makes batches of {size}, and a window has {window} samples.",
            f"Its batches are whole windows here, so that the effective batch would be {size}.",
            "Give it batch_size=self._train_batch_size.",
        )


def warn_if_inexact(plan: Plan) -> None:
    """Warn of a plan whose gradient isn't the whole batch's."""
    if not plan.exactness.startswith(("exact", "same distribution", "unchecked", "unknown")):
        log.warning("%s", "\n".join((plan.exactness, *plan.notes)))


def no_window(trainer: Any) -> UsageError:
    """Return the refusal of a batch that no loader of windows made."""
    return UsageError(
        f"training_step of {type(trainer).__name__} was given a batch that is no window.",
        "In train() the loader's batches are windows, which are cut as the plan says; this one's effective batch "
        "isn't known.",
        "Train with train(), and let get_train_dataloader's loader yield what its collate_fn returns.",
    )


def whole_window_only(trainer: Any, request: PlanRequest, average: Average) -> PlanRequest:
    """Return a request for one micro-batch a window.

    Raises:
        UsageError: The request allows no micro-batch that large.
    """
    assert request.target_batch is not None
    window = request.target_batch // request.world_size
    if (request.max_micro_batch or window) < window:
        raise cannot_be_cut(trainer, average)
    return replace(request, min_micro_batch=window, check=False)


def check_plan_of(trainer: Any, plan: Plan, request: PlanRequest, average: Average) -> None:
    """Refuse a plan that isn't for this training.

    Raises:
        PlanMismatch: It is for another target or number of ranks.
        UsageError: The loss isn't a mean over anything that was found, and the plan has several micro-batches.
    """
    if (plan.target_batch, plan.world_size) != (request.target_batch, request.world_size):
        raise PlanMismatch(
            f"The plan is for a target batch of {plan.target_batch} on {plan.world_size} ranks; training has "
            f"{request.target_batch} on {request.world_size}.",
            "Its micro-batches sum to another effective batch.",
            "Leave plan= out to plan again.",
        )
    if plan.accumulation_steps > 1 and not average.can_be_cut:
        raise cannot_be_cut(trainer, average)


def cannot_be_cut(trainer: Any, average: Average) -> UsageError:
    """Return the refusal of a loss that compares samples with each other."""
    loss = getattr(trainer, "loss", None)
    name = type(loss).__name__ if loss is not None else f"the loss of {type(trainer).__name__}"
    return UsageError(
        f"{name} isn't a mean over samples, labels or tokens: cut in two, the parts differ from the whole by "
        f"{average.error:.1%}.",
        "A contrastive loss compares each sample with all others of its batch; micro-batches would have fewer.",
        "Use a loss that encodes in parts itself, as CachedMultipleNegativesRankingLoss does: its window is one "
        "micro-batch.",
    )
