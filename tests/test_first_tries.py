"""What people write first works, or is answered in words before anything is trained."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    Capture,
    Rows,
    distance,
    gradients,
    mlp,
    one_thread,  # noqa: F401
    plan_for,
    runner_for,
    seen,
    vectors,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from autoaccum import Plan, Runner, UsageError, Workload, fit_plan
from autoaccum.cli.flags import in_flags
from autoaccum.data.sample import with_sample
from autoaccum.devices.cuda.gpu_specs import find_gpu
from autoaccum.exactness.check import check
from autoaccum.processes.workload_source import check_source, load_workload
from autoaccum.units import check_memory

ROOT = Path(__file__).parent.parent


def planned(work: Workload, **how: Any) -> Plan:
    how = {"target_batch": 8, "max_micro_batch": 3, "budget": "4GiB", "verify": False, "check": False} | how
    return fit_plan(work, **how)


# --- criteria


def classes(n: int, ignored: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of which the first micro-batch loses more to the ignored one than the last."""
    x, y = vectors(n)
    if ignored is not None:
        y[: n // 3] = ignored
    return x, y


def numbers(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = vectors(n)
    return x, torch.rand(n, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class PerPlace(nn.Module):
    """Logits of shape (samples, classes, places), as torch's criteria take them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5 * 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).unflatten(1, (5, 4))


def places(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.randint(5, (n, 4), generator=torch.Generator().manual_seed(3))
    y[: n // 2, 1:] = 2
    return vectors(n)[0], y


def log_mlp() -> nn.Module:
    return nn.Sequential(mlp(), nn.LogSoftmax(1))


WEIGHTS = torch.linspace(0.1, 5, 5, dtype=torch.float64)
CRITERIA: dict[str, tuple[Any, Callable[[], nn.Module], Callable[[int], Any]]] = {
    "classes": (nn.CrossEntropyLoss(), mlp, classes),
    "some ignored": (nn.CrossEntropyLoss(), mlp, partial(classes, ignored=-100)),
    "another one ignored": (nn.CrossEntropyLoss(ignore_index=2), mlp, partial(classes, ignored=2)),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS), mlp, partial(classes, ignored=-100)),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHTS), mlp, partial(classes, ignored=-100)),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), mlp, partial(classes, ignored=-100)),
    "probabilities": (nn.CrossEntropyLoss(), mlp, numbers),
    "a class for each place": (nn.CrossEntropyLoss(ignore_index=2), PerPlace, places),
    "log probabilities": (nn.NLLLoss(ignore_index=1), log_mlp, classes),
    "numbers": (nn.MSELoss(), mlp, numbers),
    "a sum of numbers": (nn.SmoothL1Loss(reduction="sum"), mlp, numbers),
    "by a batch's samples": (nn.KLDivLoss(reduction="batchmean"), log_mlp, numbers),
    "margins": (nn.MultiMarginLoss(), mlp, classes),
    "a function": (F.cross_entropy, mlp, partial(classes, ignored=-100)),
    "a function with arguments": (partial(F.cross_entropy, ignore_index=3), mlp, partial(classes, ignored=3)),
    "one's own": (lambda output, target: F.mse_loss(output, target), mlp, numbers),
}  # fmt: skip


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_has_the_whole_batchs_gradient(name: str) -> None:
    criterion, make, batch_of = CRITERIA[name]
    model, batch = make(), batch_of(13)
    work = Workload(model, batch_of(6), loss=criterion, optimizer=Capture)
    want = gradients(model, lambda m, b: criterion(m(b[0]), b[1]), batch)
    runner = runner_for(work, 13, 5)
    result = runner.step(batch)
    assert result.split == (5, 4, 4)
    assert distance(seen(runner)[0], want) < FP64
    assert abs(float(result.loss) - float(criterion(model(batch[0]), batch[1]).detach())) < 1e-9 * abs(
        float(result.loss)
    )


def test_a_micro_batch_in_which_all_are_ignored_counts_nothing() -> None:
    x, y = vectors(9)
    y[:3] = -100
    runner = runner_for(Workload(mlp(), (x, y), loss=nn.CrossEntropyLoss(), optimizer=Capture), 9, 3)
    want = gradients(runner.context.model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x, y))
    assert runner.step((x, y)).stepped and distance(seen(runner)[0], want) < FP64
    assert not runner.step((x, torch.full_like(y, -100))).stepped


class Focal(nn.Module):
    """A criterion as people write them, with a reduction."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(inputs, targets, reduction="none")
        loss = (1 - torch.exp(-loss)) ** 2 * loss
        return loss.sum() if self.reduction == "sum" else loss.mean()


class Judge(nn.Module):
    """A module that is called with the model: no criterion."""

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("loss", [Focal(), Focal("sum"), Judge()])
def test_modules_of_ones_own_are_distinguished_by_their_parameters(loss: nn.Module) -> None:
    work = Workload(mlp(), vectors(4), loss=loss, optimizer=Capture)
    runner, batch = runner_for(work, 8, 3), vectors(8)
    whole = (lambda m, b: loss(m, b)) if isinstance(loss, Judge) else (lambda m, b: loss(m(b[0]), b[1]))
    want = gradients(runner.context.model, whole, batch)
    runner.step(batch)
    assert distance(seen(runner)[0], want) < FP64


@pytest.mark.parametrize(
    ("loss", "sample", "said"),
    [
        (nn.CrossEntropyLoss, None, "Call it: loss=CrossEntropyLoss()"),
        ("cross_entropy", None, "loss=torch.nn.CrossEntropyLoss()"),
        (nn.CrossEntropyLoss(reduction="none"), None, "reduction='mean'"),
        (nn.CTCLoss(), None, "more than an output and a target"),
        (nn.MSELoss(), {"image": torch.ones(2, 6), "label": torch.ones(2, 5)}, "model(batch['image']), batch['label']"),
        (nn.MSELoss(), (torch.ones(2, 6),) * 3, "a tuple of 3"),
        (3, None, "of type int"),
        (lambda m, x, y: F.cross_entropy(m(x), y), None, "takes 3 arguments (m, x, y), and is called with two"),
    ],
)
def test_what_is_no_criterion_for_the_batch_is_answered_when_the_workload_is_made(
    loss: Any, sample: Any, said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Workload(mlp(), sample or vectors(4), loss=loss)


@pytest.mark.parametrize(
    "out", [lambda loss: {"loss": loss, "accuracy": torch.ones(())}, lambda loss: {"loss": (loss * 4, 4)}]
)
def test_a_loss_may_return_a_dictionary(out: Callable[[Any], Any]) -> None:
    work = Workload(mlp(), vectors(4), loss=lambda m, b: out(F.cross_entropy(m(b[0]), b[1])), optimizer=Capture)
    runner = runner_for(work, 8, 4)
    runner.step(vectors(8))
    want = gradients(mlp(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), vectors(8))
    assert distance(seen(runner)[0], want) < FP64
    with pytest.raises(UsageError, match="of 'ce', 'l2', without a 'loss'"):
        planned(Workload(mlp(), vectors(4), loss=lambda m, b: {"ce": m(b[0]).sum(), "l2": 0.0}))


def test_a_batch_that_a_model_without_a_loss_cannot_take_is_answered() -> None:
    x, y = vectors(4)
    with pytest.raises(UsageError, match=r"Sequential was called with the batch's 'x', 'y': .*unexpected keyword"):
        planned(Workload(mlp(), {"x": x, "y": y}))
    with pytest.raises(UsageError, match=r"Collate them: torch\.utils\.data\.default_collate"):
        planned(Workload(mlp(), [(x[i], y[i]) for i in range(4)]))

    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        planned(Workload(Fails(6, 5), {"x": x, "y": y}))


def test_an_argument_by_anothers_name_is_answered_with_ours() -> None:
    work = Workload(mlp(), vectors(4))
    for name, ours in (("batch_size", "target_batch"), ("memory", "budget"), ("micro_batch", "max_micro_batch")):
        with pytest.raises(UsageError, match=f"Did you mean {ours}="):
            fit_plan(work, **{name: 8})
        with pytest.raises(UsageError, match=f"Did you mean {ours}="):
            fit_plan(mlp(), vectors(4), **{name: 8})
    with pytest.raises(UsageError, match="Give it to the Workload"):
        fit_plan(work, target_batch=8, loss=F.cross_entropy)


# --- optimizers, schedulers, scalers


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def step_rate(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


FORMS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "a list of one": (lambda o: [o], None),
    "a tuple of one": (lambda o: (o,), None),
    "Lightning's pair of lists": (lambda o: ([o], [step_rate(o)]), "epoch"),
    "a pair without schedulers": (lambda o: ([o], []), None),
    "Lightning's dictionary": (lambda o: {"optimizer": o, "lr_scheduler": step_rate(o)}, "step"),
    "its scheduler's dictionary": (
        lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_rate(o), "interval": "epoch"}}, "epoch",
    ),
    "configure_optimizers itself": (lambda o: lambda: {"optimizer": o}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_what_configure_optimizers_returns_is_an_optimizer(name: str) -> None:
    form, interval = FORMS[name]
    model = mlp()
    optimizer = sgd(model)
    work = Workload(model, vectors(4), optimizer=form(optimizer))
    assert work.optimizer is optimizer
    runner = runner_for(work, 8, 4)
    for _ in range(2):
        list(runner.epoch([vectors(16)]))
    expected = {None: 0.5, "epoch": 0.5 * 0.5**2, "step": 0.5 * 0.5**4}[interval]
    assert optimizer.param_groups[0]["lr"] == expected


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("SGD", "SGD"), ("adamw_torch", "AdamW")])
def test_an_optimizer_by_its_name(name: str, kind: str) -> None:
    runner = runner_for(Workload(mlp(), vectors(4), optimizer=name), 8, 4)  # type: ignore[arg-type]
    assert type(runner.context.optimizer).__name__ == kind


def test_what_is_no_optimizer_is_answered() -> None:
    model = mlp()
    two = [torch.optim.Adam(model[index].parameters()) for index in (0, 2)]  # type: ignore[index]
    for given, said in ((two, "docs/two-optimizers.md"), ("adammw", "Did you mean"), (0.1, "of type float")):
        with pytest.raises(UsageError, match=re.escape(said)):
            Workload(model, vectors(4), optimizer=given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Leave out one of them"):
        Workload(model, vectors(4), optimizer={"optimizer": sgd(model), "lr_scheduler": step_rate}, scheduler=step_rate)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Give a function: scheduler=lambda optimizer"):
        runner_for(Workload(model, vectors(4), scheduler=torch.optim.lr_scheduler.CosineAnnealingLR), 8, 4)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_timms_schedulers_are_stepped_as_timms_own_loop_does(by_epoch: bool) -> None:
    scheduler = pytest.importorskip("timm.scheduler").CosineLRScheduler

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return scheduler(optimizer, t_initial=7, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=by_epoch)

    model, twin = mlp(), mlp()
    optimizer, other = sgd(model), sgd(twin)
    runner = runner_for(Workload(model, vectors(4), optimizer=optimizer, scheduler=make(optimizer)), 8, 4)
    reference, updates = make(other), 0
    for epoch in range(3):
        for _ in runner.epoch([vectors(24)]):
            updates += 1
            reference.step_update(num_updates=updates)
            assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        reference.step(epoch + 1)
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    state = runner.state_dict()
    again = runner_for(Workload(mlp(), vectors(4), optimizer=sgd(mlp()) and "sgd", scheduler=make), 8, 4)  # type: ignore[arg-type]
    again.load_state_dict(state)
    assert again.context.epochs_done == 3


def test_a_scaler_by_true_and_a_precision_as_others_write_it() -> None:
    work = Workload(mlp(torch.float32), vectors(4, torch.float32), scaler=True, precision=torch.bfloat16)  # type: ignore[arg-type]
    assert isinstance(work.scaler, torch.amp.GradScaler) and work.precision == "bf16"
    assert Workload(mlp(), vectors(4), scaler=False, precision="16-mixed").precision == "fp16"
    assert runner_for(work, 8, 4).step(vectors(8, torch.float32)).stepped
    for wrong in ({"scaler": "yes"}, {"precision": "int8"}, {"clip_grad_norm": "1"}, {"count": 3}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Workload(mlp(), vectors(4), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Call it: mlp\(\.\.\.\)"):
        Workload(mlp, vectors(4))  # type: ignore[arg-type]


# --- samples and batches

ITEMS = [(torch.arange(6.0, dtype=torch.float64) * index, index % 5) for index in range(1, 20)]
TOKENS = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]}


@pytest.mark.parametrize(
    ("sample", "shape"),
    [
        (ITEMS[0], (1, 6)),
        ((ITEMS[0][0], torch.tensor(1)), (1, 6)),
        ((ITEMS[0][0].numpy(), np.int64(1)), (1, 6)),
        ({"x": ITEMS[0][0], "label": 1}, (1, 6)),
        (TOKENS, (1, 3)),
        (DataLoader(Rows(ITEMS), batch_size=4), (8, 6)),
        (Rows(ITEMS), (8, 6)),
        ((ITEMS[0][0][None].numpy(), np.array([1])), (1, 6)),
    ],
)
def test_an_item_a_loader_or_arrays_serve_as_the_sample(sample: Any, shape: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    found = with_sample(Workload(mlp(), sample))[0].sample
    first = next(iter(found.values())) if isinstance(found, dict) else found[0]
    assert isinstance(first, torch.Tensor) and first.shape == shape
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loader_as_the_sample_is_trained_too() -> None:
    work = Workload(mlp(), DataLoader(Rows(ITEMS), batch_size=4, shuffle=True), optimizer="sgd")  # type: ignore[arg-type]
    plan = planned(work)
    assert [result.samples for result in Runner(work, plan).epoch(work.loader)] == [8, 8, 3]  # type: ignore[arg-type]


def test_arrays_are_trained_in_the_models_type() -> None:
    x, y = vectors(8, torch.float32)
    arrays = {"pair": (x.double().numpy(), y.numpy())}["pair"]
    runner = runner_for(Workload(mlp(torch.float32), vectors(4, torch.float32), optimizer=Capture), 8, 3)
    want = gradients(mlp(torch.float32), lambda m, b: F.cross_entropy(m(b[0]), b[1]), (x, y))
    runner.step(arrays)
    list(runner.epoch([arrays]))
    assert all(distance(found, want) < 1e-5 for found in seen(runner))


def test_pictures_of_the_same_size_or_less_are_trained_whatever_their_sides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()

    def pictures(high: int, wide: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 3, high, wide, dtype=torch.float64), torch.arange(n) % 2

    runner = runner_for(Workload(model, pictures(12, 12), optimizer="sgd"), 4, 2)  # type: ignore[arg-type]
    assert [r.samples for r in runner.epoch([pictures(16, 9), pictures(8, 18)])] == [4, 4]
    with pytest.raises(UsageError, match="the largest picture"):
        runner.step(pictures(13, 12))


def test_a_runner_takes_the_model_and_what_fit_plan_was_given() -> None:
    model = mlp()
    plan = fit_plan(
        model, vectors(4), target_batch=8, max_micro_batch=3, budget="4GiB", verify=False, optimizer=Capture
    )
    batch = vectors(8)
    batch[1][:2] = -100
    runner = Runner(model, plan, optimizer=Capture)
    want = gradients(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    runner.step(batch)
    assert distance(seen(runner)[0], want) < FP64
    with pytest.raises(UsageError, match="Runner was given dict"):
        Runner({}, plan)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Did you mean target_batch="):
        fit_plan(model, vectors(4), batch_size=8)


# --- texts


def test_a_plan_prints_as_its_summary_and_has_a_short_repr() -> None:
    plan = plan_for(Workload(mlp(), vectors(4)), 8, 3)
    assert str(plan).startswith("device") and len(str(plan)) < 3000
    assert "8 samples as 2 x 3 + 1 x 2" in repr(plan) and len(repr(plan)) < 120


@pytest.mark.parametrize("memory", [8, "8", "24", 1.5, "1000"])
def test_a_number_without_a_unit_is_asked_about(memory: Any) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {memory}GiB"):
        check_memory(memory, None)
    check_memory(8 << 30, None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("4090", "rtx-4090"), ("RTX4090", "rtx-4090"), ("A100 80G", "a100-80gb"), ("a100-40GB", "a100-40gb"),
        ("H100 PCIe", "h100-pcie-80gb"), ("5090", "rtx-5090"), ("t4", "t4"), ("a10", "a10"),
    ],
)  # fmt: skip
def test_gpus_are_found_by_the_numbers_that_people_type(name: str, meant: str) -> None:
    assert find_gpu(name).name == meant


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a100", "a100-40gb (39.39 GiB), a100-80gb"),
        ("v100", "v100-16gb"),
        ("3050", "rtx-3060"),
        ("5060", "rtx-5070"),
    ],
)
def test_several_gpus_are_answered_with_the_candidates(name: str, shown: str) -> None:
    with pytest.raises(UsageError, match=re.escape(shown)):
        find_gpu(name)


def test_texts_advise_arguments_in_python_and_flags_on_the_command_line() -> None:
    text = 'a budget of 2GiB (budget="2GiB"), timing_seconds=13, or without verifying: verify=False.'
    assert in_flags(text) == "a budget of 2GiB (--memory 2GiB), --timing 13, or without verifying: --no-verify."
    assert in_flags("more memory (budget=), or headroom=.") == "more memory (--memory), or --headroom."


# --- a script as the workload

SCRIPTS = {
    "trains": (
        "import torch\nmodel = torch.nn.Linear(2, 2)\nfor _ in range(3):\n    loss = model(torch.ones(1, 2)).sum()\n"
        "    loss.backward()\nopen('RAN', 'w')\n",
        "no function 'workload'",
        "it trains when it is imported (line 5)",
    ),
    "trains and has it": (
        "import torch\ndef workload(): ...\ntrainer = object()\ntrainer.train()\n",
        "trains when it is imported: line 4",
        '__name__ == "__main__"',
    ),
    "another name": ("import autoaccum as a\ndef build():\n    return a.Workload()\n", "no function", "Did you mean"),
    "not Python": ("def workload(:\n", "SyntaxError", "train.py:1"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_read_before_it_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, what, more = SCRIPTS[name]
    (tmp_path / "train.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for source in ("train.py:workload", "train:workload", "train.py"):
        with pytest.raises(UsageError, match=what) as error:
            check_source(source)
        assert more in str(error.value)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize(
    "text",
    [
        "import autoaccum, torch\ndef workload():\n    return autoaccum.Workload(torch.nn.Linear(2, 2))\n"
        "if __name__ == '__main__':\n    workload().backward()\n",
        "import autoaccum, torch\nworkload = autoaccum.Workload(torch.nn.Linear(2, 2))\n",
        "from inner_training import *\n",
        "import autoaccum, torch\nclass Net(torch.nn.Linear):\n    def fit(self): self.backward()\n"
        "def make(n=2): return autoaccum.Workload(Net(n, n))\nworkload = lambda: make(2)\nworkload().model.train()\n",
    ],
)
def test_files_that_make_a_workload_are_accepted(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "some_training.py").write_text(text)
    (folder / "inner_training.py").write_text(
        "import autoaccum, torch\ndef workload(): return autoaccum.Workload(torch.nn.Linear(2, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    source = "package.some_training:workload"
    check_source(source)
    assert isinstance(load_workload(source), Workload)
    for name in ("some_training", "inner_training"):
        sys.modules.pop(name, None)


# --- exactness of what people write


class Checkpointed(nn.Module):
    """Dropout inside checkpointing that isn't reentrant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(6, 8), nn.Linear(8, 5), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = partial(F.scaled_dot_product_attention, dropout_p=0.2)

        def block(x: torch.Tensor) -> torch.Tensor:
            h = self.dropout(torch.tanh(self.first(x)))[:, None]
            return attended(h, h, h)[:, 0]

        return self.last(checkpoint(block, x, use_reentrant=False))  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), None])
def test_dropout_within_checkpointing_draws_alike_in_both_passes(loss: Any) -> None:
    verdict = check(Workload(Checkpointed(), vectors(8, torch.float32), loss=loss), isolated=False)
    assert verdict.words == "same distribution (exact with dropout off, tested on 8 samples)"
    assert F.dropout.__module__ == "torch.nn.functional"


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: nn.CrossEntropyLoss()(m(b[0]), b[1]),
        lambda m, b: F.cross_entropy(m(b[0]), b[1].long()),
        lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]),
    ],
)
def test_a_criterion_of_one_class_a_sample_is_exact_with_a_remark(loss: Any) -> None:
    verdict = check(Workload(mlp(), vectors(8), loss=loss), isolated=False)
    assert verdict.exact and verdict.words == "exact (tested on 8 samples, none with an ignored target)"
    assert any("count=lambda batch: (batch[1] != -100).sum()" in line for line in verdict.advice)
    x, y = vectors(8)
    y[1] = -100
    assert not check(Workload(mlp(), (x, y), loss=loss), isolated=False).exact


def keep_gradients(found: list[list[torch.Tensor]], optimizer: torch.optim.Optimizer, *_: Any) -> None:
    found.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])


def test_the_page_on_two_optimizers_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "two-optimizers.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    generator, critic, runners = names["generator"], names["critic"], names["runners"]
    batch = {"real": torch.randn(40, 32), "noise": torch.randn(40, 16)}
    for runner, model in zip(runners, (critic, generator), strict=True):
        optimizer = runner.context.optimizer
        found: list[list[torch.Tensor]] = []  # of this optimizer
        optimizer.register_step_pre_hook(partial(keep_gradients, found))
        want = gradients(model, names["critic_loss" if model is critic else "generator_loss"], batch)
        runner.step(batch)
        assert distance(found[0], want) < 1e-5
    work = names["work"]
    before = [p.detach().clone() for p in work.model.parameters()]
    runner_for(work, 8, 3).step((torch.randn(8, 32), torch.randint(4, (8,))))
    assert all(not torch.equal(old, new) for old, new in zip(before, work.model.parameters(), strict=True))
