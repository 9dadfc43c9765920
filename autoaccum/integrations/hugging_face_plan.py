"""Describe a Trainer's training as a workload, and plan it.

The model, its collator, its optimizer, its precision and its loss are the Trainer's own, as they are after the Trainer
prepared them; so is the evaluation during training.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data import tree
from ..devices.registry import get_device
from ..errors import AutoaccumError
from ..exactness import check as exact
from ..plan import Plan
from ..planning.fit import plan_workload
from ..planning.request import PlanRequest
from ..ranks.group import apart
from ..state.rng import put_rng, take_rng
from ..torch_compat import tree_map
from ..workload import Workload
from .hugging_face_items import longest_items
from .hugging_face_loss import Average, evaluating, find_average, hard_batches, samples_of
from .hugging_face_window import Batch, HostWindow, WindowCollator, can_be_cut, collated

log = logging.getLogger("autoaccum")

_ROW = "row"  # the samples of a batch that can't be cut, by their numbers


@dataclass(frozen=True)
class TrainerWorkload:
    """A Trainer's training as planning sees it.

    Attributes:
        workload: Model, longest samples, loss, optimizer, evaluation.
        average: What the loss averages over.
    """

    workload: Workload
    average: Average


def describe(trainer: Any, loader: Any, batchnorm: str | None) -> TrainerWorkload:
    """Describe a Trainer's training; ask its loss what it averages over.

    Args:
        trainer: A Trainer whose model and optimizer are prepared.
        loader: Its training loader, which collates by a `WindowCollator`.
        batchnorm: As for `Workload`.
    """
    collator = loader.collate_fn
    assert isinstance(collator, WindowCollator)
    items = longest_items(loader.dataset)
    batch = collated(collator.collate, items)
    if can_be_cut(batch, len(items)):
        sample, make = batch, None
    else:
        make = _maker(collator, items)
        sample = {_ROW: torch.arange(len(items))}
    average = _ask(trainer, sample, make)
    loss = _loss_of(trainer, make, average)
    count = None if average.count is None or average.count is samples_of else average.count
    if count is not None and make is not None:
        count = _of_rows(count, make)
    workload = Workload(
        trainer.model,
        sample,
        loss=loss,
        count=count,
        optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
        scaler=getattr(trainer.accelerator, "scaler", None),
        clip_grad_norm=trainer.args.max_grad_norm or float("inf"),  # the Trainer takes the norm in any case
        between_steps=_evaluation(trainer),
        batchnorm=batchnorm,
        name=f"{type(trainer).__name__} of {type(trainer.model).__name__}",
    )
    return TrainerWorkload(workload, average)


def make_plan(trainer: Any, described: TrainerWorkload, request: PlanRequest, *, check: bool) -> Plan:
    """Plan a Trainer's training.

    Over several ranks the first one plans, without collectives, and the others wait for its plan.

    Raises:
        UsageError: The request can't be met, whatever the memory.
        DoesNotFit: Not even the smallest micro-batch fits.
    """
    if request.world_size == 1:
        return _plan_here(trainer, described, request, check=check)
    message: list[Any] = [None]
    if request.rank == 0:
        try:
            message = [_plan_here(trainer, described, _of_one_rank(trainer, request), check=False).to_json()]
        except AutoaccumError as error:
            message = [(type(error), error.what, error.why, error.hint)]
    torch.distributed.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        return Plan.from_json(message[0], source="the first rank's plan")
    kind, *texts = message[0]
    raise kind(*texts)


def _plan_here(trainer: Any, described: TrainerWorkload, request: PlanRequest, *, check: bool) -> Plan:
    workload = described.workload
    with quietly(trainer):
        plan = plan_workload(workload, replace(request, check=False))
        if check:
            with _forward_of_the_model(workload.model):
                plan = exact.check_plan(plan, workload, planning_seconds=plan.provenance.planning_seconds)
    return plan


def _of_one_rank(trainer: Any, request: PlanRequest) -> PlanRequest:
    """Share a host's memory among its ranks.

    Where they train on the CPU.
    """
    if request.budget is not None or trainer.args.device.type != "cpu":
        return request
    here = int(os.environ.get("LOCAL_WORLD_SIZE", request.world_size))
    return replace(request, budget=get_device(trainer.args.device).read_budget(headroom=0).limit_bytes // here)


@contextlib.contextmanager
def quietly(trainer: Any) -> Iterator[None]:
    """Run a Trainer's functions without ranks, and restore its counters.

    Random states too.
    """
    rng, before = take_rng(), {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value)}
    try:
        with apart(), alone(trainer.accelerator):
            yield
    finally:
        vars(trainer).update(before)
        put_rng(rng)


@contextlib.contextmanager
def alone(accelerator: Any) -> Iterator[None]:
    """Answer collectives as if all ranks held the same.

    A loss that gathers figures to log them would wait for ranks with fewer micro-batches.
    """
    ranks = accelerator.num_processes

    def gathered(data: Any, *_: Any, **__: Any) -> Any:
        return tree_map(
            lambda leaf: torch.cat([leaf.reshape(leaf.shape or (1,))] * ranks) if torch.is_tensor(leaf) else leaf, data
        )

    names = ("gather", "gather_for_metrics") if ranks > 1 else ()
    before = {name: vars(accelerator).get(name) for name in names}
    for name in names:
        setattr(accelerator, name, gathered)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name) if before[name] is None else setattr(accelerator, name, before[name])


@contextlib.contextmanager
def _forward_of_the_model(model: Any) -> Iterator[None]:
    """Take accelerate's autocast off: exactness is tested in double precision."""
    wrapped = vars(model).get("forward")
    original = getattr(model, "_original_forward", None)
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def num_items_of(trainer: Any, batch: Batch) -> Any:
    """Return what the Trainer counts in a batch of this rank.

    None for nothing.
    """
    args, average = trainer.args, trainer.args.average_tokens_across_devices
    args.average_tokens_across_devices = False  # or it would ask the other ranks
    try:
        device = next((leaf.device for leaf in batch.values() if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
        return trainer.count_items(batch, device)
    finally:
        args.average_tokens_across_devices = average


def _loss_of(
    trainer: Any, make: Callable[[Any], Batch] | None, average: Average
) -> Callable[[torch.nn.Module, Batch], Any]:
    """Return the Trainer's loss of a batch on the device.

    A mean, or (sum, count).
    """
    computing = _Computing(trainer)
    held = getattr(trainer, "loss", None), trainer.compute_loss_func

    def trainer_loss(model: torch.nn.Module, batch: Batch) -> Any:
        assert len(held) == 2  # in the closure, where planning looks for what a loss holds
        given = batch if make is None else tree.to_device(make(batch[_ROW]), batch[_ROW].device)
        items = num_items_of(computing.trainer, given)
        if average.passes:
            return computing.loss(model, given, torch.ones_like(items)), items
        return computing.loss(model, given, items)

    trainer_loss.adds_up = average.adds_up  # type: ignore[attr-defined]
    return trainer_loss


class _Computing:
    """Keep a Trainer out of the search for what a loss holds.

    It holds everything.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def loss(self, model: torch.nn.Module, batch: Batch, items: Any) -> torch.Tensor:
        """Compute a batch's loss as the Trainer does."""
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            loss: torch.Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        return loss


def _ask(trainer: Any, sample: Batch, make: Callable[[Any], Batch] | None) -> Average:
    model, device = trainer.model, trainer.args.device
    if not get_device(device).computes:
        return _assumed(trainer, make(sample[_ROW]) if make else sample)
    computing = _Computing(trainer)
    half = trainer.accelerator.mixed_precision != "no" or any(p.element_size() < 4 for p in model.parameters())
    batches = (
        hard_batches(sample) if make is None else [[make(torch.arange(a, b)) for a, b in ((0, 5), (0, 3), (3, 5))]]
    )
    with quietly(trainer), evaluating(model) as put_back:

        def loss_of(batch: Batch, items: Any) -> float:
            put_back()
            moved = items.to(device) if isinstance(items, torch.Tensor) else items
            return float(computing.loss(model, tree.to_device(dict(batch), device), moved))

        return find_average(loss_of, lambda batch: num_items_of(trainer, batch), batches, half=half)


def _assumed(trainer: Any, batch: Batch) -> Average:
    """Return the Trainer's own count where no loss can be asked."""
    if num_items_of(trainer, batch) is None:
        return Average("its samples, assumed", samples_of)
    count = lambda piece: num_items_of(trainer, piece)  # noqa: E731
    return Average("the labels that num_items_in_batch counts, assumed", count, passes=True)


def _maker(collator: WindowCollator, items: list[Any]) -> Callable[[Any], Batch]:
    def make(rows: torch.Tensor) -> Batch:
        batch = collated(collator.collate, [items[abs(row) % len(items)] for row in rows.tolist()])
        return HostWindow(batch, len(rows))

    return make


def _of_rows(count: Callable[[Batch], Any], make: Callable[[Any], Batch]) -> Callable[[Batch], Any]:
    return lambda batch: count(make(batch[_ROW]))


def _evaluation(trainer: Any) -> Callable[[torch.nn.Module], None] | None:
    """Return an evaluation of the longest batch, where training evaluates."""
    if (
        str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy)) == "no"
        or not trainer.eval_dataset
    ):
        return None
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, Mapping) else [None]
    batches = []
    for name in names:
        loader = trainer.get_eval_dataloader(name) if name is not None else trainer.get_eval_dataloader()
        items = longest_items(loader.dataset)
        total = len(loader.dataset) if hasattr(loader.dataset, "__len__") else trainer.args.eval_batch_size
        rows = min(trainer.args.eval_batch_size, total)
        batches.append((loader.collate_fn([items[i % len(items)] for i in range(rows)]), rows, total))

    def evaluate(model: torch.nn.Module) -> None:
        model.eval()
        for batch, rows, total in batches:
            _evaluate_batch(trainer, model, dict(batch), rows, total)
        model.train()

    return evaluate


def _evaluate_batch(trainer: Any, model: torch.nn.Module, batch: Batch, rows: int, total: int) -> None:
    """Run the evaluation's last batch, beside the outputs of those before it.

    They stay on the device until the end where metrics are computed from them, unless `eval_accumulation_steps` says
    otherwise (Trainer.evaluation_loop).
    """
    from transformers.trainer_pt_utils import nested_concat

    args = trainer.args
    loss_only = True if trainer.compute_metrics is None else args.prediction_loss_only
    _, logits, labels = trainer.prediction_step(model, batch, loss_only, ignore_keys=None)
    if logits is not None and trainer.preprocess_logits_for_metrics is not None:
        logits = trainer.preprocess_logits_for_metrics(logits, labels)
    kept = total if args.eval_accumulation_steps is None else min(total, rows * args.eval_accumulation_steps)
    if kept > rows and not args.batch_eval_metrics:
        for outputs in (logits, labels):
            if outputs is not None:
                before = tree_map(lambda leaf: leaf.new_empty((kept - rows, *leaf.shape[1:])), outputs)
                nested_concat(before, outputs, padding_index=-100)  # type: ignore[no-untyped-call]


def _is_plain(value: Any, deepest: int = 4) -> bool:
    """Return whether a value is a counter, or a container of such."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, (list, tuple)):
        return deepest > 0 and all(_is_plain(each, deepest - 1) for each in value)
    if isinstance(value, dict):
        return deepest > 0 and all(_is_plain(each, deepest - 1) for each in value.values())
    return False
