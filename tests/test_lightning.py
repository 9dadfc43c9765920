"""`ExactAccumulation` with the real Trainer: in windows as in one big batch, step for step."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import FP64, IGNORED, NAIVE, Gradients, Rows, distance, one_thread, pad, sequence, tagger, vectors  # noqa: F401
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from autoaccum import UsageError

pl = pytest.importorskip("lightning.pytorch")
from autoaccum.integrations.lightning import ExactAccumulation  # noqa: E402

OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
QUICK = {"check": False, "budget": "6GiB"}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield


class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
    """Keeps the gradient of each step, before clipping."""

    def __init__(self, lr: float = 0.05, schedule: str | None = None, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        extra = [nn.BatchNorm1d(8)] if norm else []
        self.net = nn.Sequential(nn.Linear(6, 8), *extra, nn.Tanh(), nn.Linear(8, 5)).double()
        self.lr, self.schedule, self.events = lr, schedule, list[str]()
        self.seen: list[Gradients] = []
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return {"loss": loss, "samples": len(batch[0])}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in self.parameters() if p.grad is not None])
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.schedule is None:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        kinds = {
            "step": lambda: {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total),
                "interval": "step",
            },
            "epoch": lambda: {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)},
            "plateau": lambda: {
                "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=9.0),
                "monitor": "val_loss",
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": kinds[self.schedule]()}


def data(n: int = 47) -> TensorDataset:
    return TensorDataset(*vectors(n))


def fit(module: Any, batch: int, *callbacks: Any, ckpt: Any = None, n: int = 47, val: bool = True, **how: Any) -> Any:
    trainer = pl.Trainer(callbacks=list(callbacks), **{"max_epochs": 2, **OPTIONS, **how})
    torch.manual_seed(7)  # the order of the samples
    loader = DataLoader(data(n), batch, shuffle=True)
    trainer.fit(module, loader, DataLoader(data(9), 4) if val else None, ckpt_path=ckpt)
    return trainer


def same(module: Any, reference: Any) -> None:
    assert len(module.seen) == len(reference.seen) > 0
    for got, want in zip(module.seen, reference.seen, strict=True):
        assert distance(got, want) <= 1e-11  # of parameters that AdamW's steps, of like gradients, let drift apart
    assert module.rates == reference.rates


class Exact(ExactAccumulation):  # type: ignore[misc]
    def __init__(self, target: int | None = 20, micro: int = 7, **how: Any) -> None:
        super().__init__(target, max_micro_batch=micro, **{**QUICK, **how})


@pytest.mark.parametrize("schedule", [None, "step", "epoch", "plateau"])
def test_windows_train_as_one_big_batch_does(schedule: str | None) -> None:
    reference, module = Module(schedule=schedule), Module(schedule=schedule)
    want = fit(reference, 20)
    got = fit(module, 4, Exact(), accumulate_grad_batches=3)
    assert got.global_step == want.global_step == 6
    assert distance(module.seen[0], reference.seen[0]) <= FP64
    same(module, reference)
    for name in ("train_loss", "val_loss"):
        assert float(got.callback_metrics[name]) == pytest.approx(float(want.callback_metrics[name]), rel=1e-9)
    assert got.accumulate_grad_batches == 3 and type(got.fit_loop.epoch_loop.automatic_optimization).__name__[0] == "_"


def test_every_gradient_is_the_whole_window_s_where_lightning_s_own_is_not() -> None:
    """With lr=0 all gradients are of one model: 1e-12, the tail of 7 included."""
    reference, module, plain = Module(lr=0.0), Module(lr=0.0), Module(lr=0.0)
    fit(reference, 20, max_epochs=1)
    fit(module, 4, Exact(), max_epochs=1)
    fit(plain, 4, max_epochs=1, accumulate_grad_batches=5)
    errors = [[distance(a, b) for a, b in zip(m.seen, reference.seen, strict=True)] for m in (module, plain)]
    assert max(errors[0]) <= FP64 and errors[1][-1] > NAIVE


def test_the_target_is_what_the_trainer_s_arguments_multiply_to() -> None:
    reference, module = Module(), Module()
    exact = Exact(None, 7)
    fit(reference, 20)
    fit(module, 4, exact, accumulate_grad_batches=5)
    assert exact.plan is not None and exact.plan.target_batch == 20
    same(module, reference)


class Tagger(Module):
    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net = tagger()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def tokens() -> list[dict[str, torch.Tensor]]:
    samples = [sequence(length, seed=i) for i, length in enumerate((50, 50, 48, 41, 50, 3, 2, 1, 50, 7))]
    samples[9]["labels"].fill_(IGNORED)
    samples[8]["labels"].fill_(IGNORED)  # the tail: nothing counts
    samples[2]["labels"].fill_(IGNORED)  # one micro-batch of the first window
    return samples


def test_ragged_labels_are_weighted_by_count_and_a_window_of_none_takes_no_step() -> None:
    loader = DataLoader(Rows(tokens()), 2, collate_fn=pad)
    module = Tagger()
    exact = Exact(4, 1, count=lambda batch: (batch["labels"] != IGNORED).sum())
    trainer = pl.Trainer(max_epochs=1, callbacks=[exact], **OPTIONS)
    trainer.fit(module, loader)
    assert trainer.global_step == len(module.seen) == 2
    for got, start in zip(module.seen, (0, 4), strict=True):
        twin = Tagger()
        twin.training_step(pad(tokens()[start : start + 4]), 0).backward()
        assert distance(got, [p.grad for p in twin.parameters()]) <= FP64


def test_the_exactness_test_warns_where_a_count_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    module = Tagger()
    samples = [sequence(length, seed=i) for i, length in enumerate((9, 3, 7, 5, 8, 2))]
    with caplog.at_level(logging.WARNING):
        pl.Trainer(max_steps=1, callbacks=[Exact(4, 2, check=True)], **OPTIONS).fit(
            module, DataLoader(Rows(samples), 2, collate_fn=pad)
        )
    assert any("not exact" in record.getMessage() for record in caplog.records)


def test_clipping_is_of_the_whole_window() -> None:
    reference, module = Module(), Module()
    fit(reference, 20, gradient_clip_val=0.01)
    fit(module, 4, Exact(), gradient_clip_val=0.01)
    same(module, reference)
    assert all(
        torch.allclose(a, b, rtol=1e-9) for a, b in zip(module.parameters(), reference.parameters(), strict=True)
    )


class Watcher(pl.Callback):  # type: ignore[misc,name-defined]
    """What another callback sees."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.events.append(("batch", batch_idx, len(batch[0])))

    def on_before_zero_grad(self, *args: Any) -> None:
        self.events.append("zero")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.events.append(round(float(outputs["loss"]), 9))

    def on_validation_end(self, *args: Any) -> None:
        self.events.append("validated")


def test_other_callbacks_see_windows_as_they_see_big_batches() -> None:
    watchers = [Watcher(), Watcher()]
    fit(Module(), 20, watchers[0], val_check_interval=2)
    fit(Module(), 4, Exact(), watchers[1], val_check_interval=2)
    assert watchers[0].events == watchers[1].events and "validated" in watchers[0].events


def test_a_checkpoint_in_the_middle_is_gone_on_with(tmp_path: Path) -> None:
    how = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    whole = Module(schedule="epoch")
    fit(whole, 4, Exact(), max_epochs=3)
    half = Module(schedule="epoch")
    first = fit(half, 4, Exact(), pl.callbacks.ModelCheckpoint(tmp_path, save_last=True), max_epochs=2, **how)
    assert first.global_step == 6
    rest = Module(schedule="epoch")
    exact = Exact()
    torch.manual_seed(3)
    again = fit(rest, 4, exact, max_epochs=3, ckpt=tmp_path / "last.ckpt", **how)
    assert again.global_step == 9 and len(rest.seen) == 3 and exact.micro_batch == 7
    assert rest.rates == whole.rates[6:]


class Short(Module):
    """Runs out of memory in some micro-batch's backward, by its number over all attempts."""

    fails_at: tuple[int, ...] = ()

    def on_before_backward(self, loss: Any) -> None:
        SEEN[0] += 1
        if SEEN[0] in self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")


SEEN = [0]


class Scales(pl.Callback):  # type: ignore[misc,name-defined]
    """Changes gradients after a backward, and counts how often."""

    calls = 0

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.calls += 1
        for p in module.parameters():
            p.grad.mul_(0.5)


class ClipsItself(Module):
    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


def test_what_changes_gradients_after_backward_gets_the_whole_window_s() -> None:
    reference, module, scales = ClipsItself(lr=0.0), ClipsItself(lr=0.0), [Scales(), Scales()]
    fit(reference, 20, scales[0], max_epochs=1)
    fit(module, 4, Exact(), scales[1], max_epochs=1)
    assert scales[0].calls == scales[1].calls == 3
    for got, want in zip(module.seen, reference.seen, strict=True):
        assert distance(got, want) <= FP64


def test_an_out_of_memory_changes_nothing_but_the_split(caplog: pytest.LogCaptureFixture) -> None:
    reference, module = Module(lr=0.0), Short(lr=0.0)
    fit(reference, 20, max_epochs=1)
    SEEN[0], module.fails_at = 0, (2, 9)
    exact = Exact()
    with caplog.at_level(logging.WARNING):
        fit(module, 4, exact, max_epochs=1)
    assert exact.micro_batch == 4 and sum("out of memory" in r.getMessage().lower() for r in caplog.records) == 2
    for got, want in zip(module.seen, reference.seen, strict=True):
        assert distance(got, want) <= FP64


def test_bf16_mixed_and_half_precision_parameters() -> None:
    for precision, dtype in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        module = Module(lr=0.0)
        module.net.float()
        wide = Module(lr=0.0)
        wide.net.float()
        for each, batch, callbacks in ((wide, 20, ()), (module, 4, (Exact(),))):
            trainer = pl.Trainer(max_epochs=1, precision=precision, callbacks=list(callbacks), **OPTIONS)
            x, y = vectors(47, torch.float32)
            trainer.fit(each, DataLoader(TensorDataset(x, y), batch))
        assert module.seen[0][0].dtype == dtype
        assert distance(module.seen[0], wide.seen[0]) < 0.05 and len(module.seen) == 3


class Stream(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class Transfers(Module):
    """Changes batches on the host and on the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]


def test_transfer_hooks_and_datamodules_and_streams() -> None:
    reference, module = Transfers(lr=0.0), Transfers(lr=0.0)

    class Data(pl.LightningDataModule):  # type: ignore[misc,name-defined]
        def train_dataloader(self) -> Any:
            return DataLoader(data(), 4)

    pl.Trainer(max_epochs=1, **OPTIONS).fit(reference, DataLoader(data(), 20))
    pl.Trainer(max_epochs=1, callbacks=[Exact()], **OPTIONS).fit(module, datamodule=Data())
    stream = Transfers(lr=0.0)
    pl.Trainer(max_epochs=1, callbacks=[Exact()], **OPTIONS).fit(stream, DataLoader(Stream(list(data())), 4))
    for each in (module, stream):
        assert max(distance(a, b) for a, b in zip(each.seen, reference.seen, strict=True)) <= FP64


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


class Nothing(Module):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        return None


def test_what_cannot_be_exact_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="Manual uses manual optimization"):
        fit(Manual(), 4, Exact())
    with pytest.raises(UsageError, match="training_step returned None"):
        fit(Nothing(), 4, Exact())
    with pytest.raises(UsageError, match="several"):
        loaders = {"a": DataLoader(data(), 4), "b": DataLoader(data(), 4)}
        pl.Trainer(callbacks=[Exact()], **{**OPTIONS, "max_epochs": 1}).fit(Module(), loaders)
    with pytest.raises(UsageError, match="is an iterator"):
        pl.Trainer(callbacks=[Exact()], **OPTIONS).fit(Module(), iter(list(DataLoader(data(), 4))))


def test_batch_normalization_keeps_two_samples_at_the_end() -> None:
    module = Module(norm=True)
    trainer = fit(module, 4, Exact(20, 7, batchnorm="merged"), n=41, max_epochs=1)
    assert trainer.global_step == 2  # 20 and 21: one sample at the end joins the window before


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightning.pytorch", "pytorch_lightning", "autoaccum.integrations.lightning"])
def test_both_packages_work_whichever_is_imported_first(first: str) -> None:
    code = f"""
import {first}
import pytorch_lightning as pl, torch
from autoaccum.integrations.lightning import ExactAccumulation
class M(pl.LightningModule):
    def __init__(self):
        super().__init__(); self.net = torch.nn.Linear(4, 3)
    def training_step(self, batch, i): return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(50, 4), torch.randint(3, (50,)))
t = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
               callbacks=[ExactAccumulation(20, max_micro_batch=7)])
t.fit(M(), torch.utils.data.DataLoader(data, 4))
print("steps", t.global_step)
"""
    assert "steps 3" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    import_module(first)
