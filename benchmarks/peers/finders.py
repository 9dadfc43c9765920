"""The finders, each a function from a job to its batch size.

The real packages, called as they document.

All are asked for the largest micro-batch that trains in windows of two, since that is what accumulation needs: by
training functions that accumulate where the caller writes the training, by the finder's own option where it has one.
The others search as always, and the check in a fresh process shows whether the result trains.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoaccum import Workload
from autoaccum.window import step

from .accounting import watch
from .cases import CASES, Case

STEPS = 2  # micro-batches of a window
WINDOWS = 3  # optimizer steps of a trial, where the caller decides; Lightning's default too


@dataclass(frozen=True)
class Job:
    """A case, and the model and optimizer that some finders are given."""

    name: str
    case: Case
    workload: Workload | None
    context: step.TrainingContext | None

    @property
    def model(self) -> nn.Module:
        """What the finder is given, and may not change."""
        assert self.workload is not None
        return self.workload.model


def train(context: step.TrainingContext, case: Case, n: int, windows: int = WINDOWS) -> None:
    """Train by autoaccum's window, which all functions and checks share."""
    for _ in range(windows):
        step.train_window(context, [case.batch(n) for _ in range(STEPS)], (n,) * STEPS)


def train_anew(job: Job, n: int) -> int:
    """Train a model made inside, as Accelerate's guide asks for.

    Model and optimizer are freed at its end.
    """
    workload = job.case.workload()
    watch(workload.model)
    train(step.open_context(workload), job.case, n)
    return n


# -- autoaccum


def autoaccum(job: Job) -> int:
    """Find the largest micro-batch of a plan for a far larger target."""
    from autoaccum import fit_plan

    assert job.workload is not None
    return fit_plan(job.workload, target_batch=4 * job.case.start).largest_micro_batch


# -- Lightning: Tuner(trainer).scale_batch_size(model, mode=...)


def _lightning_parts(model: nn.Module, case: Case, batch_size: int, **trainer: Any) -> tuple[Any, Any]:
    import lightning.pytorch as pl

    class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 50_000

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            return tuple(tensor[0] for tensor in case.batch(1))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = model, batch_size

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Data(), self.batch_size)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, classes = batch
            return nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), classes.flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return case.optimizer(self.parameters())

    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar", "enable_autolog_hparams"),
        False,
    )
    return Module(), pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        default_root_dir=tempfile.mkdtemp(),
        precision="bf16-mixed" if case.precision == "bf16" else "32-true",  # type: ignore[arg-type]
        accumulate_grad_batches=STEPS,
        **quiet,
        **trainer,
    )


def lightning(job: Job, mode: str, **how: Any) -> int | None:
    """Lightning's BatchSizeFinder, through its Tuner, with the trainer's own accumulation."""
    from lightning.pytorch.tuner import Tuner

    module, trainer = _lightning_parts(job.model, job.case, 2)
    return Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=WINDOWS, **how)


def train_by_lightning(model: nn.Module, case: Case, n: int, windows: int) -> None:
    """Lightning's own loop, which keeps other things alive than a plain one."""
    module, trainer = _lightning_parts(model, case, n, max_steps=windows)
    trainer.fit(module)


# -- those that call a training function


def accelerate(job: Job, halving: bool) -> int:
    """Search by the decorator of Accelerate's guide "Memory utilities".

    Its reducer takes no arguments, so it remembers the size.
    """
    from accelerate.utils import find_executable_batch_size

    size = job.case.start

    def half() -> int:
        nonlocal size
        size //= 2
        return size

    how = {"reduce_batch_size_fn": half} if halving else {}

    @find_executable_batch_size(starting_batch_size=size, **how)
    def run(batch_size: int) -> int:
        return train_anew(job, batch_size)

    return int(run())


def toma(job: Job) -> int:
    """Search by the decorator of toma's README."""
    from toma import toma as decorators

    @decorators.batch(initial_batchsize=job.case.start)
    def run(batchsize: int) -> int:
        return train_anew(job, batchsize)

    return int(run())


def batch_probe_function(job: Job, headroom: float) -> int:
    """`probe`, for "any GPU workload", up to where the others begin."""
    from batch_probe import probe

    def run(n: int) -> None:
        train_anew(job, n)

    return int(probe(run, high=job.case.start, headroom=headroom, backend="torch", verbose=False))


def autotrainer(job: Job) -> int:
    """`sample_batch_fn(bs) must run one forward+backward pass`: no optimizer step."""
    from autotrainer import find_batch_size

    def run(n: int) -> None:
        inputs, classes = job.case.batch(n, "cuda")
        logits = Autocast(job.model, job.case.precision)(inputs)
        nn.functional.cross_entropy(logits.flatten(0, -2), classes.flatten()).backward()
        job.model.zero_grad()

    return int(find_batch_size(job.model, run))


# -- those that call the model


class Autocast(nn.Module):
    """For finders that only call the model: it does its own autocast."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model, under autocast where the case has it."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.precision == "bf16"):
            output: torch.Tensor = self.model(x)
            return output


def batch_probe_model(job: Job, **how: Any) -> int:
    """Search by `probe_batch_size`.

    It calls the model with keywords, takes the mean of the output and steps an AdamW.
    """
    from batch_probe import probe_batch_size

    model = Autocast(job.model, job.case.precision)
    return int(probe_batch_size(model, lambda n: {"x": job.case.inputs(n, "cuda")}, verbose=False, **how))


def batch_finder_model(name: str) -> nn.Module:
    """Make batch-finder's model anew for each trial; it can be pickled."""
    case = CASES[name]
    return Autocast(watch(case.model()), case.precision)


def batch_finder(job: Job) -> int | None:
    """Search by batch-finder.

    It makes the inputs, takes the sum of the output, and runs no optimizer.
    """
    from batch_finder import find_max_minibatch

    shape = ", ".join(["b", *map(str, job.case.sample_shape)])
    shapes = {"x": f"({shape}), {'int' if job.case.tokens else 'float'}", "#constraints": "b=-1"}
    found = find_max_minibatch(functools.partial(batch_finder_model, job.name), input_shapes=shapes)
    return None if found is None else int(found)


def ultralytics(job: Job, **how: Any) -> int | None:
    """Search by Ultralytics' check, made for its own image models.

    What it reads off one of these is put beside the model.
    """
    from ultralytics.utils.autobatch import check_train_batch_size

    if not job.case.images:
        return None
    model: Any = job.model
    model.yaml, model.stride, model.names = {"channels": 3}, torch.tensor([32.0]), {0: "one"}
    amp = torch.bfloat16 if job.case.precision == "bf16" else False
    return int(check_train_batch_size(model, imgsz=job.case.sample_shape[-1], amp=amp, **how))


@dataclass(frozen=True)
class Finder:
    """A finder, its package, and whether it is given a model.

    The others make theirs anew.
    """

    package: str
    find: Callable[[Job], int | None]
    given_model: bool = True


_F = functools.partial
FINDERS = {
    "autoaccum": Finder("autoaccum", autoaccum),
    "Lightning power": Finder("lightning", _F(lightning, mode="power")),
    "Lightning binsearch": Finder("lightning", _F(lightning, mode="binsearch")),
    "Lightning binsearch, margin=0": Finder("lightning", _F(lightning, mode="binsearch", margin=0.0)),
    "Accelerate": Finder("accelerate", _F(accelerate, halving=False), False),
    "Accelerate, halving": Finder("accelerate", _F(accelerate, halving=True), False),
    "toma": Finder("toma", toma, False),
    "batch-finder": Finder("batch_finder", batch_finder, False),
    "batch-probe of the model": Finder("batch_probe", batch_probe_model),
    "batch-probe of the model, headroom=0": Finder("batch_probe", _F(batch_probe_model, headroom=0.0)),
    "batch-probe of the training": Finder("batch_probe", _F(batch_probe_function, headroom=0.2), False),
    "batch-probe of the training, headroom=0": Finder("batch_probe", _F(batch_probe_function, headroom=0.0), False),
    "autotrainer": Finder("autotrainer", autotrainer),
    "Ultralytics autobatch": Finder("ultralytics", ultralytics),
    "Ultralytics autobatch, batch=0.95": Finder("ultralytics", _F(ultralytics, batch=0.95)),
}
