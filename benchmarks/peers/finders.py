"""The finders, each a function from a job to the batch size it found. The real packages, called as documented."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoaccum import Workload, step

from .accounting import watch
from .cases import CASES, Case

START = 1024  # for those that have to be told where to begin: a power of two above every answer here
WINDOWS = 3  # optimizer steps of a trial, where the caller decides; Lightning's default too


@dataclass(frozen=True)
class Job:
    """A case, and the model and optimizer that are at stake."""

    name: str
    case: Case
    workload: Workload
    parts: step.Parts

    @property
    def model(self) -> nn.Module:
        return self.workload.model


def train(parts: step.Parts, case: Case, n: int, *, windows: int = WINDOWS, steps: int = 1) -> None:
    """The loop that all callers' functions and all checks share: autoaccum's own."""
    for _ in range(windows):
        pieces = [case.batch(n) for _ in range(steps)]
        step.train_window(parts, pieces, (n,) * steps)


def autoaccum(job: Job, target_batch: int | None) -> int:
    """target_batch=None: the micro-batch is the batch. A large target: the largest that accumulates."""
    from autoaccum import fit_plan

    plan = fit_plan(job.workload, target_batch=target_batch)
    return plan.micro_batch if target_batch is None else plan.largest_micro_batch


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
        **quiet,
        **trainer,
    )


def lightning(job: Job, mode: str, **how: Any) -> int | None:
    """Lightning's BatchSizeFinder, through its Tuner."""
    from lightning.pytorch.tuner import Tuner

    module, trainer = _lightning_parts(job.model, job.case, 2)
    return Tuner(trainer).scale_batch_size(module, mode=mode, steps_per_trial=WINDOWS, **how)


def train_by_lightning(model: nn.Module, case: Case, n: int, windows: int, steps: int) -> None:
    """Lightning's own loop, which keeps other things alive than a plain one."""
    module, trainer = _lightning_parts(model, case, n, max_steps=windows, accumulate_grad_batches=steps)
    trainer.fit(module)


def accelerate(job: Job, halving: bool) -> int:
    """The whole training function is called again; it makes its model anew, as the docs ask for."""
    from accelerate.utils import find_executable_batch_size

    size = START

    def half() -> int:
        nonlocal size
        size //= 2
        return size

    how = {"reduce_batch_size_fn": half} if halving else {}

    @find_executable_batch_size(starting_batch_size=START, **how)
    def run(batch_size: int) -> int:
        workload = job.case.workload()
        watch(workload.model)
        train(step.open_parts(workload), job.case, batch_size)
        return batch_size

    return int(run())


def toma(job: Job) -> int:
    """toma.simple.batch around a training function."""
    from toma import simple

    def run(batch_size: int) -> int:
        job.model.zero_grad()  # what a try that failed left behind
        train(job.parts, job.case, batch_size)
        return batch_size

    return int(simple.batch(run, START))


class Autocast(nn.Module):
    """For finders that only call the model: it does its own autocast."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The model's, under autocast where the case has it."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.precision == "bf16"):
            output: torch.Tensor = self.model(x)
            return output


def batch_probe(job: Job) -> int:
    """It calls the model with keywords, takes the mean of the output and steps an AdamW."""
    from batch_probe import probe_batch_size

    model = Autocast(job.model, job.case.precision)
    return int(probe_batch_size(model, lambda n: {"x": job.case.inputs(n, "cuda")}, verbose=False))


def batch_finder_model() -> nn.Module:
    """What batch-finder makes anew for each trial; at module level, since it is pickled by name."""
    case = CASES[os.environ["AUTOACCUM_SEARCH_CASE"]]
    model = case.make()
    watch(model)
    return Autocast(model, case.precision)


def batch_finder(job: Job) -> int | None:
    """It makes the inputs, takes the sum of the output, and runs no optimizer."""
    from batch_finder import find_max_minibatch

    os.environ["AUTOACCUM_SEARCH_CASE"] = job.name
    shape = ", ".join(["b", *map(str, job.case.sample_shape)])
    kind = "float" if job.case.images else "int"
    found = find_max_minibatch(batch_finder_model, input_shapes={"x": f"({shape}), {kind}", "#constraints": "b=-1"})
    return found if isinstance(found, int) else None


def autotrainer(job: Job) -> int:
    """`sample_batch_fn(bs) must run one forward+backward pass`: no optimizer step."""
    from autotrainer import find_batch_size

    def run(n: int) -> None:
        inputs, classes = job.case.batch(n, "cuda")
        logits = Autocast(job.model, job.case.precision)(inputs)
        nn.functional.cross_entropy(logits.flatten(0, -2), classes.flatten()).backward()
        job.model.zero_grad()

    return int(find_batch_size(job.model, run))


def ultralytics(job: Job) -> int | None:
    """For images alone; what it reads off a YOLO model is put beside the model."""
    from ultralytics.utils.autobatch import check_train_batch_size

    if not job.case.images:
        return None
    model: Any = job.model
    model.yaml, model.stride, model.names = {"channels": 3}, torch.tensor([32.0]), {0: "one"}
    amp = torch.bfloat16 if job.case.precision == "bf16" else False
    return int(check_train_batch_size(model, imgsz=job.case.sample_shape[-1], amp=amp))


@dataclass(frozen=True)
class Finder:
    """A finder and the package it needs."""

    package: str
    find: Callable[[Job], int | None]


_F = functools.partial
FINDERS = {
    "autoaccum, accumulating": Finder("autoaccum", _F(autoaccum, target_batch=4096)),
    "autoaccum, one micro-batch": Finder("autoaccum", _F(autoaccum, target_batch=None)),
    "Lightning power": Finder("lightning", _F(lightning, mode="power")),
    "Lightning binsearch (5 % margin)": Finder("lightning", _F(lightning, mode="binsearch")),
    "Lightning binsearch, margin 0": Finder("lightning", _F(lightning, mode="binsearch", margin=0.0)),
    "Accelerate x0.9 (default)": Finder("accelerate", _F(accelerate, halving=False)),
    "Accelerate halving": Finder("accelerate", _F(accelerate, halving=True)),
    "toma": Finder("toma", toma),
    "batch-finder": Finder("batch_finder", batch_finder),
    "batch-probe": Finder("batch_probe", batch_probe),
    "autotrainer": Finder("autotrainer", autotrainer),
    "Ultralytics autobatch": Finder("ultralytics", ultralytics),
}
