"""Models, losses and loops that are less common: exact, put back, or refused with words that help."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_cases import tagger, tokens
from helpers_train import Capture, cut, distance, mlp, one_thread, plan_for, runner_for, vectors  # noqa: F401
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from autoaccum import BatchError, Runner, UsageError, Workload, fit_plan, windows
from autoaccum.data import split as cutting
from autoaccum.data.sample import with_sample
from autoaccum.exactness import check
from autoaccum.planning.request import PlanRequest
from autoaccum.runner import compatibility
from autoaccum.runner.loop import train
from autoaccum.window import norms
from autoaccum.window.step import open_context, train_window
from autoaccum.workload import default_loss

NARROW = [torch.bfloat16, torch.float16, torch.uint8, torch.bool]


def gradient_of(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


# --- counts and losses in types that don't add up


@pytest.mark.parametrize("by_loss", [True, False], ids=["sum and count", "count="])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_counts_in_a_narrow_type_add_up(dtype: torch.dtype, *, by_loss: bool) -> None:
    model, samples, each = nn.Linear(6, 5).double(), 640, 2
    x = torch.randn(samples, 6, dtype=torch.float64)
    batch = x, torch.randint(5, (samples,)), torch.ones(samples, dtype=dtype)

    def sum_and_count(m: nn.Module, b: Any) -> Any:
        kept = b[2].sum(dtype=dtype) if dtype is not torch.bool else b[2].any()
        number = kept * each if dtype is torch.bool else kept
        return F.cross_entropy(m(b[0]), b[1], reduction="sum"), number

    def mean(m: nn.Module, b: Any) -> Any:
        return F.cross_entropy(m(b[0]), b[1])

    count = None if by_loss else lambda b: b[2].sum(dtype=dtype)
    context = open_context(
        Workload(model, batch, loss=sum_and_count if by_loss else mean, count=count, optimizer=Capture)
    )
    result = train_window(context, list(cut(batch, (each,) * (samples // each))), (each,) * (samples // each))
    whole = mean(model, batch)
    assert isinstance(context.optimizer, Capture)
    assert distance(context.optimizer.seen[-1], gradient_of(model, whole)) < 1e-12
    assert torch.allclose(result.loss.double(), whole.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_many_micro_batches_in_half_precision_is_reported_as_it_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).to(dtype)
    batch = torch.randn(600, 6, dtype=dtype), torch.randint(5, (600,))
    context = open_context(Workload(model, batch, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer=Capture))
    result = train_window(context, list(cut(batch, (1,) * 600)), (1,) * 600)
    whole = float(F.cross_entropy(model(batch[0]).double(), batch[1]))
    assert abs(float(result.loss) - whole) < 0.01 * whole  # 39 % off where bf16 adds up


# --- the default loss


@pytest.mark.parametrize(("channels", "height", "width"), [(6, 4, 6), (6, 6, 6), (5, 4, 6)])
def test_logits_of_pictures_have_their_classes_in_dimension_1_and_are_refused(
    channels: int, height: int, width: int
) -> None:
    batch = torch.randn(2, 3, height, width), torch.zeros(2, height, width, dtype=torch.long)
    with pytest.raises(UsageError, match=r"loss=torch\.nn\.CrossEntropyLoss\(\)"):
        default_loss(nn.Conv2d(3, channels, 1), batch)


@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 4, 1)])
def test_classes_of_tokens_may_be_flat(shape: tuple[int, ...]) -> None:
    ids, classes = torch.randn(2, 4, 6), torch.randint(4, shape)
    loss = default_loss(nn.Linear(6, 4), (ids, classes))  # as many classes as tokens
    assert loss.isfinite()


# --- batches that nobody has collated


@pytest.mark.parametrize(
    "samples",
    [
        [{"image": torch.randn(6), "y": torch.tensor(i % 5)} for i in range(8)],
        [(torch.randn(6), i % 5) for i in range(8)],
        ((torch.randn(3, 4), torch.tensor(1)), (torch.randn(3, 4), torch.tensor(0))),
    ],
    ids=["dicts", "tuples", "pairs in a tuple"],
)
def test_samples_that_were_not_collated_are_refused(samples: Any) -> None:
    with pytest.raises(BatchError, match="default_collate"):
        cutting.batch_size(samples)


def test_lists_of_a_models_inputs_are_cut() -> None:
    features = [{"ids": torch.zeros(4, 7), "mask": torch.ones(4, 7)} for _ in range(2)]
    assert cutting.batch_size(features) == 4
    assert cutting.batch_size((torch.zeros(4, 7), torch.tensor(3))) == 4
    assert cutting.batch_size([(torch.zeros(4, 7), 1.0)]) == 4


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(*vectors(16), strict=True)


def test_a_loader_of_single_samples_is_refused_as_such() -> None:
    runner = runner_for(Workload(mlp(), vectors(8)), 8, 4)
    with pytest.raises(BatchError, match="single samples"):
        next(iter(runner.epoch(DataLoader(Rows(), batch_size=None))))


# --- what planning puts back


class Projection:
    def __init__(self) -> None:
        self.basis, self.updates = torch.zeros(3), 0

    def update(self) -> None:
        self.updates += 1
        self.basis += 1


class Projecting(torch.optim.SGD):
    """Keeps an object of its own class for each parameter, as GaLore keeps its projection."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("projection", Projection()).update()
        return super().step(closure)


def test_what_hooks_and_an_optimizers_state_hold_is_as_before_after_planning() -> None:
    model, x = mlp(), vectors(8)
    optimizer = Projecting(model.parameters(), lr=0.1)
    average, seen = AveragedModel(model), torch.zeros(5)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))

    def note(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        seen.add_(out.detach().mean(0)[:5])

    model.register_forward_hook(note)
    F.cross_entropy(model(x[0]), x[1]).backward()
    optimizer.step()
    optimizer.zero_grad()

    def state() -> list[torch.Tensor]:
        kept = [s["projection"] for s in optimizer.state.values()]
        numbers = torch.tensor([k.updates for k in kept])
        return [v.clone() for v in (*average.state_dict().values(), seen, numbers, *(k.basis for k in kept))]

    before = state()
    fit_plan(Workload(model, x, optimizer=optimizer), target_batch=8, max_micro_batch=3, verify=False, check=False)
    assert all(map(torch.equal, before, state()))


class KeepsItsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRU(6, 5, batch_first=True), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, state = self.cell(x, self.state)
        self.state = state.detach()
        return out[:, -1]


def test_a_state_of_the_batchs_size_is_named_where_another_size_fails() -> None:
    work = Workload(KeepsItsState(), (torch.randn(8, 3, 6), torch.randint(5, (8,))))
    with pytest.raises(RuntimeError, match="hidden size") as caught:
        fit_plan(work, target_batch=8, max_micro_batch=4, verify=False, check=False)
    assert "micro-batches of several sizes" in "".join(caught.value.__notes__)
    assert work.model.state is None


def test_a_target_may_be_a_whole_number_of_another_library() -> None:
    assert PlanRequest(target_batch=np.int64(8), max_micro_batch=torch.tensor(4)) == PlanRequest(8, max_micro_batch=4)
    for wrong in (8.0, "8", True, torch.tensor(8.0)):
        assert PlanRequest(target_batch=wrong).target_batch is wrong


def test_an_iterator_is_refused_before_the_first_of_several_epochs() -> None:
    work = Workload(mlp(), vectors(8), loader=iter([vectors(8)]))
    with pytest.raises(UsageError, match="for 2 epochs"):
        train(work, plan_for(work, 8, 4), progress=print, epochs=2)


# --- arguments


LENGTHS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(
    "given",
    [np.array(LENGTHS), torch.tensor(LENGTHS), [np.int64(each) for each in LENGTHS], map(float, LENGTHS)],
    ids=["array", "tensor", "numpy's", "floats"],
)
def test_lengths_may_be_of_any_kind(given: Any) -> None:
    assert Workload(mlp(), vectors(8), lengths=given).lengths == LENGTHS


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"lengths": ["3"] * 8}, "no whole number"),
        ({"lengths": {0: 3}}, "lengths= is"),
        ({"lengths": [3, -1] * 4}, "-1, at 1"),
        ({"lengths": [3] * 7}, "7 entries"),
        ({"largest": 8}, "largest is 8"),
        ({"lengths": [3] * 8, "max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"samples_per_group": "2"}, "samples_per_group is '2'"),
        ({"shared": 5}, "shared is"),
    ],
)
def test_numbers_that_say_nothing_are_refused_by_name(wrong: dict[str, Any], match: str) -> None:
    loader = DataLoader(TensorDataset(*vectors(8)), batch_size=4)
    with pytest.raises(UsageError, match=match):
        Workload(mlp(), vectors(8), loader=loader, **wrong)
    assert Workload(mlp(), vectors(8), loader=loader, largest=np.int64(7), samples_per_group=np.int64(2)).largest == 7


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), "3", None, torch.ones(2)], ids=str)
def test_counts_that_can_weigh_nothing_are_refused(count: Any) -> None:
    loss, batch = (lambda m, b: F.cross_entropy(m(b[0]), b[1])), vectors(8)
    context = open_context(Workload(mlp(), batch, loss=loss, count=lambda b: count, optimizer=Capture))
    with pytest.raises(UsageError, match="count"):
        train_window(context, list(cut(batch, (4, 4))), (4, 4))
    assert isinstance(context.optimizer, Capture)
    assert not context.optimizer.seen


def test_names_of_no_entry_are_refused() -> None:
    batch = {"x": torch.zeros(4, 6), "class_weight": torch.ones(5), "boxes": [{"of": torch.zeros(4, 2)}]}
    with pytest.raises(UsageError, match="Did you mean class_weight"):
        with_sample(Workload(mlp(), batch, shared={"class_wieght"}))
    for known in ("class_weight", "boxes", "of", "batch['boxes']", "batch"):
        with_sample(Workload(mlp(), batch, shared={"class_weight", known}))


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    model = mlp()
    one, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    with pytest.raises(UsageError, match="another optimizer"):
        open_context(Workload(model, vectors(8), optimizer=one, scheduler=scheduler))
    open_context(Workload(model, vectors(8), optimizer=other, scheduler=scheduler))
    one.param_groups = other.param_groups  # a wrapper shares its optimizer's groups
    open_context(Workload(model, vectors(8), optimizer=one, scheduler=scheduler))


# --- what a Runner says


def test_parameters_that_are_trained_from_now_on_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    work = Workload(model, vectors(8), optimizer=optimizer)
    runner = Runner(work, plan_for(work, 8, 4))
    runner.step(vectors(8))
    assert "weren't trained" not in caplog.text
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    for _ in range(2):
        runner.step(vectors(8))
    assert not torch.equal(before, model[0].weight)
    assert caplog.text.count("weren't trained when the Runner was made") == 1
    assert "0.weight, 0.bias" in caplog.text


class Margin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 5))

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output @ self.centres, target)


@pytest.mark.parametrize("given", [True, False])
def test_a_criterions_own_tensors_that_nothing_trains_are_said(given: bool) -> None:
    model, margin = nn.Linear(6, 5), Margin()
    parameters = [*model.parameters(), *(margin.parameters() if given else ())]
    sample = torch.randn(8, 6), torch.randint(5, (8,))
    work = Workload(model, sample, loss=margin, optimizer=torch.optim.SGD(parameters, lr=0.1))
    note = compatibility.left_out_note(open_context(work))
    assert ("centres" in note) is not given


def test_a_batch_normalization_that_stays_in_evaluation_mode_is_not_warned_of() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    found = norms.find_norms(model)
    assert "1" in norms.warning(found, None, training=True)
    model[1].eval()
    assert norms.warning(found, None, training=True) == ""
    assert norms.warning(found, None, training=False) != ""  # the whole model is set to train


def test_a_loop_with_its_model_is_warned_of_what_micro_batches_change(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    plan = plan_for(Workload(model, vectors(8, torch.float32)), 8, 4)
    model[0].weight.register_hook(torch.clone)
    windows([vectors(8, torch.float32)], plan)
    assert not caplog.text
    windows([vectors(8, torch.float32)], plan, model=model)
    assert "Batch normalization (1)" in caplog.text and "on 0.weight" in caplog.text
    caplog.clear()
    model[1].eval()
    windows([vectors(8, torch.float32)], plan, model=model)
    assert "Batch normalization" not in caplog.text


# --- verdicts


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


class Jagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([row[: int(length)] for row, length in zip(x, lengths, strict=True)])
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        return self.layer(torch.nested.nested_tensor_from_jagged(rows, offsets)).values()


def by_sample(m: nn.Module, b: Any) -> torch.Tensor:
    def one(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(m, dict(m.named_parameters()), (x,)), y)

    return torch.func.vmap(one)(*b).mean()


def adapted(m: nn.Module, b: Any) -> torch.Tensor:
    """A step of gradient descent on one half of each sample's task, and the loss of the other."""
    parameters, found = dict(m.named_parameters()), []

    def inner(weights: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(m, weights, (x,)), y)

    for x, y in zip(*b, strict=True):
        moved = torch.func.grad(inner)(parameters, x[:2], y[:2])
        found.append(inner({name: p - 0.1 * moved[name] for name, p in parameters.items()}, x[2:], y[2:]))
    return torch.stack(found).mean()


def lengths_of(samples: int) -> torch.Tensor:
    return torch.arange(samples) % 7 + 1


SINGLE = vectors(8, torch.float32)
VERDICTS: dict[str, tuple[Any, Any, Any, str]] = {
    "complex parameters": (Complex, None, SINGLE, "exact"),
    "a jagged tensor inside": (
        Jagged,
        lambda m, b: (m(*b).square().mean(-1).sum(), b[1].sum()),
        (torch.randn(8, 7, 6), lengths_of(8)),
        "exact",
    ),
    "vmap over samples": (lambda: nn.Linear(6, 5), by_sample, SINGLE, "exact"),
    "a gradient step inside": (
        lambda: nn.Linear(6, 5),
        adapted,
        (torch.randn(8, 4, 6), torch.randint(5, (8, 4))),
        "exact",
    ),
    "a mean over classes and another over samples": (
        lambda: nn.Linear(6, 5),
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) + m(b[0]).square().mean(),
        SINGLE,
        "exact",
    ),
    "a mean over tokens and another over samples": (
        tagger,
        lambda m, b: F.cross_entropy(m(b["ids"]).flatten(0, 1), b["labels"].flatten()) + m(b["ids"]).square().mean(),
        tokens(hard=False),
        "wrong denominator",
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_on_less_common_models(name: str) -> None:
    make, loss, sample, kind = VERDICTS[name]
    torch.manual_seed(0)
    found = check.check(Workload(make(), sample, loss=loss), isolated=False)
    assert found.kind == kind, found
    if kind != "exact":
        assert found.words.startswith("exact on data without ignored targets")
        assert any("LossTerms(sum, count, extra=" in line for line in found.advice)


def of_tokens(m: nn.Module, b: Any) -> Any:
    labels = b[1].long().flatten()
    kept = labels != 255
    return (F.cross_entropy(m(b[0].float()).flatten(0, -2), labels, ignore_index=255, reduction="sum"), kept.sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("narrow_labels", [False, True], ids=["inputs", "labels too"])
def test_inputs_of_few_bits_are_tested(dtype: torch.dtype, *, narrow_labels: bool) -> None:
    inputs = (torch.rand(8, 7, 6, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    labels = torch.arange(56).reshape(8, 7) % 5
    batch = inputs, labels.to(torch.uint8) if narrow_labels else labels
    found = check.check(Workload(nn.Linear(6, 5), batch, loss=of_tokens), isolated=False)
    assert found.kind == "exact", found
    flat = check.check(
        Workload(
            nn.Linear(6, 5), (inputs[:, 0], labels[:, 0]), loss=lambda m, b: F.cross_entropy(m(b[0].float()), b[1])
        ),
        isolated=False,
    )
    assert flat.kind == "exact", flat


def test_what_a_refused_batch_left_is_not_added_to_the_next_ones_gradient() -> None:
    ignored = [False]

    def loss(m: nn.Module, b: Any) -> Any:
        ignored[0] = bool((b[1] < 0).any()) if len(b[0]) == 8 else ignored[0]
        if ignored[0] and len(b[0]) < 4:
            raise ValueError("the second part of a batch with ignored classes")
        return F.cross_entropy(m(b[0]), b[1])

    found = check.check(Workload(mlp(), vectors(8), loss=loss), isolated=False)
    assert found.kind == "exact", found


def test_the_verdict_says_that_a_hook_on_a_gradient_was_not_tested() -> None:
    model = mlp()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    found = check.check(Workload(model, vectors(8)), isolated=False)
    assert any("hook on the gradient of 0.weight was not tested" in line for line in found.advice)
