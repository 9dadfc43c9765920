"""milabench's training loops, unchanged in what they keep alive.

What a loop keeps alive, and until when, is part of its memory.

Source: mila-iqia/milabench at dc0617d1 (17 March 2025, "H100 py2.6", whose measurements these are), files
benchmarks/{huggingface/bench/__main__.py, torchvision/main.py, lightning/main.py} and
benchmate/benchmate/dataloader.py; for timm, train.py and timm/data/loader.py of pytorch-image-models 1.0.3
(cb0e4391), which its benchfile checks out.

Each is a generator that trains one step a `next`; it keeps its local variables meanwhile, as the loop does.
Batches come from the host. Their values don't matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
Steps = Iterator[None]


def set_tf32(precision: str) -> None:
    """As torchcompat's set_enable_tf32 for CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "tf32" in precision


def hugging_face(make_model: Callable[[], nn.Module], host_batch: Batch, precision: str) -> Steps:
    """Train as `Runner.train` does.

    Gradients are never zeroed, and `outputs` lives through the backward pass and the step.
    """
    set_tf32(precision)
    model = make_model().to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    half = "fp16" in precision
    scaler = torch.amp.GradScaler("cuda", enabled=half)

    def step(data: Batch) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.float16) if half else nullcontext():
            outputs = model(**data)
        loss: torch.Tensor = outputs.loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    losses = []
    for _ in itertools.count():
        data = dict(host_batch)  # the loader's batch takes the place of the one before on the device
        data = {name: value.to("cuda") for name, value in data.items()}
        loss = step(data)
        losses.append(loss.detach())  # BenchObserver.record_loss
        yield


def torchvision(
    make_model: Callable[[], nn.Module], n: int, precision: str, *, channels_last: bool = False, fixed: bool = False
) -> Steps:
    """Train as `trainbench` does, by plain SGD.

    Inputs are cast to fp16 on the way, and the backward pass runs under autocast too.

    Args:
        make_model: Makes the model on the host.
        n: Samples in a batch.
        precision: Like "tf32-fp16".
        channels_last: `--optim channel_last`.
        fixed: `--loader synthetic_fixed`: one batch of 244 pixels in fp32 stays on the device, and its targets,
            probabilities, were made by a forward pass in fp32 that kept its graph.
    """
    set_tf32(precision)
    dtype = torch.float16 if "fp16" in precision else torch.float32
    model = make_model().to("cuda").train()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss().to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = _fixed_batches(model, n) if fixed else _host_images(n)
    scaler = torch.amp.GradScaler("cuda", enabled="fp16" in precision)
    placed: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    if channels_last:
        placed["memory_format"] = torch.channels_last
    losses = []
    for inp, target in loader:
        inp = inp.to(**placed)
        target = target.to("cuda")
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):  # of fp32, autocast says that it is disabled
            output = model(inp)
            loss = criterion(output, target)
            losses.append(loss.detach())  # BenchObserver.criterion
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        yield


def timm(make_model: Callable[[], nn.Module], n: int) -> Steps:
    """Train as `train_one_epoch --amp --amp-dtype bfloat16` does.

    The loader keeps the next batch on the device.
    """
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = make_model().to("cuda").train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    loss_fn = LabelSmoothingCrossEntropy(smoothing=0.1).to("cuda")

    def forward(inp: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = model(inp)
            loss: torch.Tensor = loss_fn(output, target)
        return loss

    losses = []
    optimizer.zero_grad()
    for inp, target in _prefetched(n):
        loss = forward(inp, target)
        losses.append(loss.detach())  # BenchObserver.criterion
        loss.backward()
        optimizer.step()
        loss.item()
        optimizer.zero_grad()
        yield


def lightning(make_model: Callable[[], nn.Module], n: int, steps: int) -> None:
    """`Trainer.fit` of lightning itself, precision bf16-mixed.

    Its closure zeroes the gradients between the forward and the backward pass.
    """
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            p = self.model(x)
            return nn.functional.cross_entropy(p, y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    set_tf32("tf32")
    quiet: Mapping[str, Any] = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        num_nodes=1,
        strategy="auto",
        max_epochs=10,
        precision="bf16-mixed",
        enable_checkpointing=False,
        reload_dataloaders_every_n_epochs=1,
        max_steps=steps,
        **quiet,
    )
    trainer.fit(model=Module(), train_dataloaders=_Images(n, steps))


def _host_images(n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a DataLoader: fp32 images of 224 pixels, and classes."""
    images, classes = torch.empty(n, 3, 224, 224), torch.zeros(n, dtype=torch.int64)
    while True:
        yield images, classes


class _Images:
    """The same for lightning, which wants a length."""

    def __init__(self, n: int, steps: int) -> None:
        self.n, self.steps = n, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return itertools.islice(_host_images(self.n), self.steps)


def _fixed_batches(model: nn.Module, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`synthetic_fixed`. Called before the first step, as there."""
    images = torch.randn((n, 3, 244, 244), device="cuda")
    targets = torch.rand_like(model(images))
    return itertools.repeat((images, targets))


def _prefetched(n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches as timm's `PrefetchLoader` does.

    Bytes from the host are made fp32 and normalised on a separate stream.
    """
    mean, std = (torch.tensor([123.0, 116.0, 103.0], device="cuda").view(1, 3, 1, 1) for _ in range(2))
    stream = torch.cuda.Stream()
    host = torch.empty(n, 3, 224, 224, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
    first = True
    inp = target = torch.empty(0)
    while True:
        next_inp, next_target = host
        with torch.cuda.stream(stream):
            next_inp = next_inp.to(device="cuda", non_blocking=True)
            next_target = next_target.to(device="cuda", non_blocking=True)
            next_inp = next_inp.to(torch.float32).sub_(mean).div_(std)
        if not first:
            yield inp, target
        first = False
        torch.cuda.current_stream().wait_stream(stream)
        inp, target = next_inp, next_target
