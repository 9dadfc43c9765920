"""Train a case by each trainer as documented; return optimizer steps' gradients.

`how` is None for what one writes first, or names what the trainer has for the case; `ways` lists these.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .peer_gradient_cases import Batch, Case, collate, flat, loss_of, outputs_of


class Capture(torch.optim.SGD):
    """Store gradients without stepping, so every window starts from equal parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(list(parameters), lr=0.0)
        self.seen: list[Tensor] = []

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Copy the gradients; run the closure that Lightning trains in."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.seen.append(flat([p.grad for group in self.param_groups for p in group["params"]]))


@dataclass(frozen=True)
class Done:
    """What a trainer did with a case.

    Attributes:
        gradients: That each optimizer step was given, flat.
        said: The verdict of the trainer's own test, if it has one.
    """

    gradients: list[Tensor]
    said: str = ""


def loader_of(case: Case) -> DataLoader[Batch]:
    """Load samples in order, the last micro-batch as it comes.

    Whole windows where they are cut in the loop.
    """
    size = case.micro_batch * (case.steps if case.cut_inside else 1)
    return DataLoader(list(case.samples), size, shuffle=False, collate_fn=collate)  # type: ignore[arg-type]


# -- Accelerate

_ITS_GUIDE = 'its guide "training samples of variable size"'
_NO_SYNC = "sync_with_dataloader=False"


def accelerate_ways(case: Case) -> list[str | None]:
    """Return the ways to ask Accelerate.

    The usual one; and where the loss has a count, one's own loop that divides by the window's count.
    """
    return [None, *([_ITS_GUIDE] if case.counted else []), *([_NO_SYNC] if case.cut_inside else [])]


def by_accelerate(case: Case, how: str | None) -> Done:
    """Train by Accelerate's guide "Performing gradient accumulation".

    Or by its section on samples of variable size.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import GradientAccumulationPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=case.steps, sync_with_dataloader=how != _NO_SYNC)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    capture = Capture((module := case.make().train()).parameters())
    model, optimizer, loader = accelerator.prepare(module, capture, loader_of(case))
    train = _accelerate_counted if how == _ITS_GUIDE else _accelerate_usual
    train(accelerator, case, model, optimizer, loader)
    return Done(capture.seen)


def _accelerate_usual(accelerator: Any, case: Case, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for batch in _cut(case, loader):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(case, model, batch))
            if case.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()


def _cut(case: Case, loader: Iterable[Batch]) -> Iterator[Batch]:
    for batch in loader:
        if case.cut_inside:
            pieces = zip(*(value.split(case.micro_batch) for value in batch.values()), strict=True)
            yield from (dict(zip(batch, piece, strict=True)) for piece in pieces)
        else:
            yield batch


def _accelerate_counted(accelerator: Any, case: Case, model: nn.Module, optimizer: Any, loader: Any) -> None:
    assert case.counted is not None
    batches = iter(loader)
    for _ in range(math.ceil(len(loader) / case.steps)):
        window = [batch for _, batch in zip(range(case.steps), batches, strict=False)]
        with torch.no_grad():
            count = sum(case.counted(outputs_of(model, batch), batch["labels"])[1] for batch in window)
        for batch in window:
            total, _ = case.counted(outputs_of(model, batch), batch["labels"])
            accelerator.backward(total * case.steps * accelerator.num_processes / count)
        optimizer.step()
        optimizer.zero_grad()


# -- Lightning


def lightning_ways(case: Case) -> list[str | None]:
    """Return the usual way only.

    What Lightning has besides is manual optimization, where the loop is one's own.
    """
    return [] if case.cut_inside else [None]


def by_lightning(case: Case, how: str | None) -> Done:
    """`Trainer(accumulate_grad_batches=...)`, automatic optimization."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.make()
            self.capture = Capture(self.model.parameters())

        def training_step(self, batch: Batch, index: int) -> Tensor:
            return loss_of(case, self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.capture

    module = Module()
    dtype = next(module.parameters()).dtype
    precision = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float32: "32-true"}[dtype]
    off = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    with tempfile.TemporaryDirectory() as folder, _default_dtype():
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=case.steps,
            gradient_clip_val=case.clip,
            precision=precision,  # type: ignore[arg-type]
            default_root_dir=folder,
            **dict.fromkeys(off, False),
        ).fit(module, loader_of(case))
    return Done(module.capture.seen)


@contextlib.contextmanager
def _default_dtype() -> Any:
    """Restore torch's default dtype, which 64-true and bf16-true change."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- Hugging Face's Trainer

_LOSS_FUNC = "compute_loss_func"


def trainer_ways(case: Case) -> list[str | None]:
    """Return the ways to ask the Hugging Face Trainer.

    The usual one; and where the count is one of labels, the function that is given the window's count of them.

    What that function returns is not divided, so a sum can stay a sum.
    """
    if case.cut_inside:
        return []
    return [None, _LOSS_FUNC] if case.counts_labels or case.summed else [None]


def by_trainer(case: Case, how: str | None) -> Done:
    """Train by the Hugging Face Trainer.

    With an overridden `compute_loss`, or with `compute_loss_func`; a Hugging Face model as it is.
    """
    import transformers

    class Ours(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            return loss_of(case, model, inputs)

    def counted(outputs: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if case.counted is not None:
            total: Tensor = case.counted(outputs, labels)[0]
            return total / num_items_in_batch
        assert case.loss is not None
        whole: Tensor = case.loss(outputs, labels)
        return whole

    model = case.make()
    capture = Capture(model.parameters())
    kind = Ours if case.loss is not None and how is None else transformers.Trainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=case.steps,
            max_grad_norm=case.clip or 0.0,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        optimizers = (capture, torch.optim.lr_scheduler.LambdaLR(capture, lambda step: 1.0))
        more = {"compute_loss_func": counted} if how else {}
        data: Any = list(case.samples)
        kind(model, arguments, collate, data, optimizers=optimizers, **more).train()
    return Done(capture.seen)


# -- autoaccum

_COUNTED, _ENCODE = "(sum, count)", "encode="


def our_ways(case: Case) -> list[str | None]:
    """As usual; and what its documentation has for the case."""
    more = ([_COUNTED] if case.counted and case.loss else []) + ([_ENCODE] if case.encodes else [])
    return [None, *more]


def by_autoaccum(case: Case, how: str | None) -> Done:
    """Check, plan with the same micro-batch, and train by the Runner."""
    from autoaccum import Runner, Workload, fit_plan
    from autoaccum.exactness import check

    loader = loader_of(case)
    sample = collate(case.samples[:: max(1, len(case.samples) // 8)])
    arguments: dict[str, Any] = {}
    if how == _COUNTED:
        arguments["loss"] = _counted_loss(case)
    elif how == _ENCODE:
        arguments |= {"encode": lambda model, batch: (model(batch["x"]), batch["labels"]), "loss": _of_encoded(case)}
    elif case.loss is not None:
        arguments["loss"] = lambda model, batch: loss_of(case, model, batch)
    work = Workload(case.make(), sample, optimizer=Capture, clip_grad_norm=case.clip, **arguments)
    target = min(case.micro_batch * case.steps, len(case.samples))
    verdict = check.check(work)
    plan = fit_plan(
        work, target_batch=target, max_micro_batch=case.micro_batch, budget="4GiB", verify=False, check=False
    )
    runner = Runner(work, plan)
    for _ in runner.epoch(loader):
        pass
    assert isinstance(runner.context.optimizer, Capture)
    return Done(runner.context.optimizer.seen, verdict.words)


def _counted_loss(case: Case) -> Callable[[nn.Module, Batch], Any]:
    assert case.counted is not None
    counted = case.counted
    return lambda model, batch: counted(model(batch["x"]), batch["labels"])


def _of_encoded(case: Case) -> Callable[[nn.Module, Any], Any]:
    assert case.loss is not None
    loss = case.loss
    return lambda model, encoded: loss(*encoded)


@dataclass(frozen=True)
class Trainer:
    """A trainer, its package, and the ways to ask it."""

    package: str
    ways: Callable[[Case], list[str | None]]
    run: Callable[[Case, str | None], Done]


TRAINERS = {
    "Accelerate": Trainer("accelerate", accelerate_ways, by_accelerate),
    "Lightning": Trainer("lightning", lightning_ways, by_lightning),
    "Hugging Face Trainer": Trainer("transformers", trainer_ways, by_trainer),
    "autoaccum": Trainer("autoaccum", our_ways, by_autoaccum),
}
