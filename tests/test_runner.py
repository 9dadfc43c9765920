"""The Runner over loaders: no sample lost, every window the gradient of its real samples; what it refuses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    NAIVE,
    Another,
    Capture,
    Rows,
    cut,
    distance,
    gradients,
    mean_of,
    mlp,
    one_thread,  # noqa: F401
    pad,
    plan_for,
    runner_for,
    same_tensors,
    seen,
    sequence,
    state_of,
    tagger,
    token_count,
    token_sum,
    vectors,
)
from plan_fields import changed_plan
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from autoaccum import BatchError, PlanMismatch, Runner, UsageError, Workload, fit_plan
from autoaccum.runner import peak_monitor
from autoaccum.state.rng import same_state, take_rng
from autoaccum.window.fingerprint import check_fingerprint
from autoaccum.workload import default_loss


def rows_of(batch: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*batch, strict=True))


def listening(ids: list[int]) -> Callable[..., Any]:
    """A mean loss that writes down which samples it trained."""

    def loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if torch.is_grad_enabled():
            ids.extend(batch[2].tolist())
        return F.cross_entropy(model(batch[0]), batch[1])

    return loss


def numbered(n: int) -> tuple[torch.Tensor, ...]:
    return (*vectors(n), torch.arange(n))


# --- loaders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "target", "micro"), [(65, 64, 16), (33, 16, 5), (100, 16, 7), (63, 64, 64)])
@pytest.mark.parametrize("kind", ["map-style", "list"])
def test_every_window_has_the_gradient_of_its_real_samples(kind: str, samples: int, target: int, micro: int) -> None:
    model, batch = mlp(), vectors(samples)
    loader: Any = DataLoader(Rows(rows_of(batch)), batch_size=9)
    loader = loader if kind == "map-style" else list(loader)
    runner = runner_for(Workload(model, vectors(2), optimizer=Capture), target, micro)
    results = list(runner.epoch(loader))
    full, rest = divmod(samples, target)
    assert [result.samples for result in results] == [target] * full + [rest]
    assert [result.number for result in results] == list(range(1, full + 2))
    steps = -(-target // micro)
    for result, got, start in zip(results, seen(runner), range(0, samples, target), strict=True):
        window = tuple(v[start : start + target] for v in batch)
        want = gradients(model, default_loss, window)
        assert max(result.split) <= micro
        assert distance(got, want) <= FP64
        if len(result.split) < steps:  # the usual mistake: divide by the configured steps
            parts = [gradients(model, default_loss, piece) for piece in cut(window, result.split)]
            assert distance(mean_of(parts, [1 / steps] * len(parts)), want) > NAIVE


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_style_loader_gives_every_sample_once_in_each_epoch(workers: int) -> None:
    batch, ids = numbered(70), []
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(Rows(rows_of(batch)), batch_size=32, shuffle=True, num_workers=workers, generator=generator)
    model = mlp()
    runner = runner_for(Workload(model, numbered(2), loss=listening(ids), optimizer=Capture), 16, 5)
    orders = []
    for epoch in range(2):
        results = list(runner.epoch(loader))
        assert [result.samples for result in results] == [16] * 4 + [6]
        assert sorted(ids) == list(range(70))
        orders.append(list(ids))
        for got, start in zip(seen(runner)[5 * epoch :], range(0, 70, 16), strict=True):
            rows = ids[start : start + 16]
            assert distance(got, gradients(model, listening([]), tuple(v[rows] for v in batch))) <= FP64
        ids.clear()
    assert orders[0] != orders[1]  # shuffled anew


class Stream(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


def test_an_iterable_loader_gives_every_sample_once_with_a_real_tail() -> None:
    batch, ids = numbered(41), []
    loader = DataLoader(Stream(rows_of(batch)), batch_size=6)
    model = mlp()
    runner = runner_for(Workload(model, numbered(2), loss=listening(ids), optimizer=Capture), 16, 5)
    for _ in range(2):
        assert [result.samples for result in runner.epoch(loader)] == [16, 16, 9]
        assert ids == list(range(41))
        ids.clear()
    for got, start in zip(seen(runner), (0, 16, 32) * 2, strict=True):
        assert distance(got, gradients(model, listening([]), tuple(v[start : start + 16] for v in batch))) <= FP64


@pytest.mark.parametrize("given", [False, True], ids=["counted by forward", "count="])
@pytest.mark.parametrize("kind", ["map-style", "batches"])
def test_dynamic_padding_gives_the_gradient_of_one_padded_batch(kind: str, given: bool) -> None:
    lengths = (50, 50, 48, 41, 50, 3, 2, 1, 50, 7)
    samples = [sequence(length, seed=i) for i, length in enumerate(lengths)]
    widths: list[int] = []

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        if torch.is_grad_enabled():
            widths.append(batch["ids"].shape[1])
        return token_sum(model, batch)

    loader: Any = DataLoader(Rows(samples), batch_size=2, collate_fn=pad)
    loader = loader if kind == "map-style" else list(loader)
    model = tagger()
    count = token_count if given else None
    runner = runner_for(Workload(model, pad(samples[:1]), loss=loss, optimizer=Capture, count=count), 4, 2)
    results = list(runner.epoch(loader))
    assert [result.samples for result in results] == [4, 4, 2]
    assert widths == [50, 48, 50, 2, 50]  # each micro-batch is padded to its own longest only
    naive = 0.0
    for got, start in zip(seen(runner), (0, 4, 8), strict=True):
        window = samples[start : start + 4]
        want = gradients(model, token_sum, pad(window))
        assert distance(got, want) <= FP64
        halves = [gradients(model, token_sum, pad(window[i : i + 2])) for i in range(0, len(window), 2)]
        naive = max(naive, distance(mean_of(halves), want))
    assert naive > NAIVE


def stack(kept: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    x, y, ids = zip(*kept, strict=True) if kept else ((), (), ())
    empty = torch.empty(0, 6, dtype=torch.float64)
    return (
        torch.stack(x) if x else empty,
        torch.tensor([int(v) for v in y], dtype=torch.int64),
        torch.tensor([int(v) for v in ids], dtype=torch.int64),
    )


def filtering(keep: Callable[[int], bool]) -> Callable[[list[tuple[torch.Tensor, ...]]], tuple[torch.Tensor, ...]]:
    return lambda samples: stack([sample for sample in samples if keep(int(sample[2]))])


@pytest.mark.parametrize("micro", [4, 5, 16])
def test_samples_that_a_collate_function_leaves_out_weigh_nothing(micro: int) -> None:
    batch, ids = numbered(48), []

    def keep(i: int) -> bool:
        return i % 3 != 0 and i != 1 and not 20 <= i < 26

    loader = DataLoader(Rows(rows_of(batch)), batch_size=8, collate_fn=filtering(keep))
    model = mlp()
    runner = runner_for(Workload(model, numbered(2), loss=listening(ids), optimizer=Capture), 16, micro)
    results = list(runner.epoch(loader))
    kept = [[i for i in range(start, start + 16) if keep(i)] for start in (0, 16, 32)]
    assert ids == [i for rows in kept for i in rows]
    assert [result.samples for result in results] == [len(rows) for rows in kept]
    for got, rows in zip(seen(runner), kept, strict=True):
        assert distance(got, gradients(model, listening([]), tuple(v[rows] for v in batch))) <= FP64


def test_a_micro_batch_that_a_collate_function_emptied_is_left_out() -> None:
    batch, ids = numbered(32), []
    loader = DataLoader(Rows(rows_of(batch)), batch_size=8, collate_fn=filtering(lambda i: not 4 <= i < 8))
    model = mlp()
    runner = runner_for(Workload(model, numbered(2), loss=listening(ids), optimizer=Capture), 16, 4)
    assert [result.split for result in runner.epoch(loader)] == [(4, 4, 4), (4, 4, 4, 4)]
    rows = [i for i in range(16) if not 4 <= i < 8]
    assert distance(seen(runner)[0], gradients(model, listening([]), tuple(v[rows] for v in batch))) <= FP64


def test_a_window_that_a_collate_function_emptied_is_refused_and_changes_nothing() -> None:
    loader = DataLoader(Rows(rows_of(numbered(16))), batch_size=8, collate_fn=filtering(lambda i: False))
    model = mlp()
    before = state_of(model)
    runner = runner_for(Workload(model, numbered(2), loss=listening([]), optimizer=Capture), 16, 4)
    with pytest.raises(BatchError, match="no sample"):
        list(runner.epoch(loader))
    assert same_tensors(state_of(model), before)
    assert seen(runner) == []


def test_skipped_windows_are_not_trained() -> None:
    batch, ids = numbered(40), []
    runner = runner_for(Workload(mlp(), numbered(2), loss=listening(ids), optimizer=Capture), 16, 4)
    results = list(runner.epoch(DataLoader(Rows(rows_of(batch)), batch_size=8), skip=2))
    assert [result.samples for result in results] == [8]
    assert ids == list(range(32, 40))


# --- what was there before the window ----------------------------------------------------------------------------


def test_gradients_left_from_before_do_not_enter_the_window() -> None:
    model, batch = mlp(), vectors(16)
    want = gradients(model, default_loss, batch)
    runner = runner_for(Workload(model, vectors(2), optimizer=Capture), 16, 4)
    for _ in range(2):
        default_loss(model, vectors(8, seed=9)).backward()  # somebody's own look at the gradient, not cleared
        runner.step(batch)
        assert distance(seen(runner)[-1], want) <= FP64


def test_a_window_that_failed_leaves_nothing_for_the_next() -> None:
    model, batch = mlp(), vectors(16)
    want = gradients(model, default_loss, batch)
    calls = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 3:
            raise ValueError("a bug in the loss")
        return default_loss(model, batch)

    runner = runner_for(Workload(model, vectors(2), loss=loss, optimizer=Capture), 16, 4)
    with pytest.raises(ValueError, match="a bug in the loss"):
        runner.step(batch)
    runner.step(batch)
    assert distance(seen(runner)[-1], want) <= FP64


# --- what is refused ---------------------------------------------------------------------------------------------


def tokens(rows: int, length: int = 8) -> dict[str, torch.Tensor]:
    return pad([sequence(length, seed=i) for i in range(rows)])


@pytest.mark.parametrize(
    ("spoil", "leaf"),
    [
        (lambda batch: tokens(8, length=9), r"batch\['ids'\]"),
        (lambda batch: {**batch, "labels": batch["labels"].int()}, r"batch\['labels'\]"),
        (lambda batch: {**batch, "labels": batch["labels"][..., None]}, r"batch\['labels'\]"),
        (lambda batch: {**batch, "extra": torch.zeros(8)}, r"batch\['extra'\]"),
        (lambda batch: {"ids": batch["ids"]}, r"batch\['labels'\]"),
        (lambda batch: (batch["ids"], batch["labels"]), r"batch\[0\]"),
    ],
    ids=["longer", "other dtype", "other rank", "one leaf more", "one leaf fewer", "other container"],
)
@pytest.mark.parametrize("through", ["step", "epoch"])
def test_another_form_is_refused_by_name_before_any_forward(
    through: str, spoil: Callable[[Any], Any], leaf: str
) -> None:
    model, forwards = tagger(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    runner = runner_for(Workload(model, tokens(2), loss=token_sum, optimizer=Capture), 8, 4)
    before, rng, bad = state_of(model), take_rng(), spoil(tokens(8))
    with pytest.raises(BatchError, match=leaf):
        runner.step(bad) if through == "step" else list(runner.epoch([bad]))
    assert not forwards
    assert same_tensors(state_of(model), before)
    assert same_state(take_rng(), rng)
    assert seen(runner) == []
    assert runner.number == 0


def test_a_window_whose_last_micro_batch_is_too_long_is_refused_before_its_first_forward() -> None:
    model, forwards = tagger(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    runner = runner_for(Workload(model, tokens(2), loss=token_sum, optimizer=Capture), 8, 4)
    with pytest.raises(BatchError, match=r"batch\['ids'\].*\(9,\).*\(8,\)"):
        list(runner.epoch([tokens(4), tokens(4, length=9)]))
    assert not forwards


def test_a_shorter_sequence_passes() -> None:
    model, batch = tagger(), tokens(8, length=3)
    runner = runner_for(Workload(model, tokens(2), loss=token_sum, optimizer=Capture), 8, 4)
    runner.step(batch)
    assert distance(seen(runner)[-1], gradients(model, token_sum, batch)) <= FP64


def other_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return default_loss(model, batch)


def test_a_plan_of_another_torch_is_refused_with_what_to_type() -> None:
    here = {"model": "M", "torch": "2.14.1+cu130", "allocator reuses": "oldest segment"}
    check_fingerprint(here, dict(here))
    for version, rule, why in (
        ("2.11.0+cu130", "lowest address", "the lowest address, this one that with the oldest segment"),
        ("2.13.0+cpu", "oldest segment", "Its memory would be another one"),
    ):
        with pytest.raises(PlanMismatch) as refused:
            check_fingerprint(here, here | {"torch": version, "allocator reuses": rule})
        text = str(refused.value)
        assert f"made under torch {version}, and this is torch 2.14.1+cu130" in text and why in text
        assert "autoaccum plan" in text and f"pip install torch=={version.split('+')[0]}" in text
    with pytest.raises(PlanMismatch, match=r"something else .*torch: planned '2\.11\.0', here"):
        check_fingerprint(here, here | {"torch": "2.11.0", "model": "N"})


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"optimizer": Another}, "optimizer: planned 'Capture', here 'Another'"),
        ({"model": mlp(width=17)}, "model: planned 'Sequential"),
        ({"loss": other_loss}, "loss: planned 'default_loss', here 'other_loss'"),
        ({"precision": "bf16"}, "precision: planned 'as the model is'"),
    ],
    ids=["optimizer", "width", "loss", "precision"],
)
def test_a_plan_for_something_else_is_refused_by_name(other: dict[str, Any], name: str) -> None:
    made = {"model": mlp(), "sample": vectors(2), "optimizer": Capture}
    plan = plan_for(Workload(**made), 16, 4)
    Runner(Workload(**made), plan)
    with pytest.raises(PlanMismatch) as refused:
        Runner(Workload(**{**made, **other}), plan)
    assert name in str(refused.value)
    assert str(refused.value).count("planned") == 1  # and only what differs


def test_the_split_that_was_planned_is_the_one_that_is_trained() -> None:
    work = Workload(mlp(), vectors(2), optimizer=Capture)
    plan = changed_plan(
        plan_for(work, 10, 2), split=(2, 2, 2, 2, 1, 1), accumulation_steps=6
    )  # where 5 times 2 doesn't fit
    runner = Runner(work, plan)
    assert runner.step(vectors(10)).split == (2, 2, 2, 2, 1, 1)
    assert [result.split for result in runner.epoch([vectors(17)])] == [(2, 2, 2, 2, 1, 1), (2, 2, 2, 1)]
    runner.micro_batch = 1
    assert runner.step(vectors(10)).split == (1,) * 10


def test_a_window_that_takes_more_than_was_planned_is_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_for(Workload(mlp(), vectors(2), optimizer=Capture), 8, 4)
    planned = runner.plan.predicted_peak_bytes
    shared = runner.peak_monitor._shared_bytes()
    peaks = iter([2 * planned, 2 * planned, 2 * planned, 3 * planned + shared])
    monkeypatch.setattr(peak_monitor.PeakMonitor, "_peak_bytes", lambda self: next(peaks))
    runner.step(vectors(8))
    assert "the plan predicts" not in caplog.text  # the peak is an older one: not of this window
    runner.step(vectors(8))
    runner.step(vectors(8))
    assert caplog.text.count("the plan predicts") == 1


def test_shared_pages_are_not_held_against_a_plan(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_for(Workload(mlp(), vectors(2), optimizer=Capture), 8, 4)
    planned = runner.plan.predicted_peak_bytes
    peaks = iter([0, int(1.01 * planned) + (1 << 30)])
    monkeypatch.setattr(peak_monitor.PeakMonitor, "_peak_bytes", lambda self: next(peaks))
    monkeypatch.setattr(peak_monitor.PeakMonitor, "_shared_bytes", lambda self: 1 << 30)
    runner.step(vectors(8))
    assert "the plan predicts" not in caplog.text


@pytest.mark.parametrize("base_part", [0.0, 0.5, 0.95])
def test_on_a_gpu_the_model_is_on_both_sides(caplog: pytest.LogCaptureFixture, base_part: float) -> None:
    """What is reserved at the peak includes the model, and so does the plan's figure."""
    plan = plan_for(Workload(mlp(), vectors(2), optimizer=Capture), 8, 4)
    planned = 1 << 30
    watch = peak_monitor.PeakMonitor(
        torch.device("cuda"), changed_plan(plan, baseline_bytes=int(base_part * planned), predicted_peak_bytes=planned)
    )
    for peak, warned in ((planned, 0), (int(1.019 * planned), 0), (int(1.03 * planned), 1)):
        peaks = iter([0, peak])
        watch._peak_bytes = lambda peaks=peaks: next(peaks)  # type: ignore[method-assign,misc]
        watch.begin()
        watch.end()
        assert caplog.text.count("A window used") == warned


# --- a real plan, and checkpoints --------------------------------------------------------------------------------


def test_a_real_plan_trains_exactly() -> None:
    model, batch = mlp(), vectors(50)
    work = Workload(model, vectors(3), optimizer=lambda params: Capture(params, lr=0.1))
    before = state_of(model)
    plan = fit_plan(work, target_batch=50, budget="4GiB", max_micro_batch=7, verify=False)
    assert same_tensors(state_of(model), before)
    want = gradients(model, default_loss, batch)
    runner = Runner(work, plan)
    result = runner.step(batch)
    assert result.split == plan.split == (7, 7, 6, 6, 6, 6, 6, 6)
    assert distance(seen(runner)[-1], want) <= FP64


def trained(scale: float = 2.0**10) -> Runner:
    model = mlp(torch.float32, seed=torch.seed() % 1000)
    work = Workload(
        model,
        vectors(2, torch.float32),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        scaler=torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        clip_grad_norm=0.5,
    )
    return runner_for(work, 16, 4)


def test_a_checkpoint_goes_on_as_though_nothing_had_happened() -> None:
    batches = [vectors(16, torch.float32, seed=i) for i in range(4)]
    first = trained()
    for batch in batches[:2]:
        first.step(batch)
    first.micro_batch = 3
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = trained(scale=4.0)
    assert not same_tensors(state_of(first.context.model), state_of(second.context.model))
    second.load_state_dict(torch.load(file))
    assert (second.number, second.micro_batch) == (2, 3)
    for batch in batches[2:]:
        ones, others = first.step(batch), second.step(batch)
        assert (ones.number, ones.split) == (others.number, others.split)
        assert torch.equal(ones.loss, others.loss)
    assert same_tensors(state_of(first.context.model), state_of(second.context.model))
    for part in ("scheduler", "scaler"):
        assert getattr(first.context, part).state_dict() == getattr(second.context, part).state_dict()
    one, other = (runner.context.optimizer.state_dict()["param_groups"] for runner in (first, second))
    assert one == other


@pytest.mark.parametrize("part", ["scheduler", "scaler"])
def test_a_checkpoint_of_another_workload_is_refused(part: str) -> None:
    runner = trained()
    before = state_of(runner.context.model)
    state = copy.deepcopy(trained().state_dict())
    state[part] = None
    with pytest.raises(UsageError, match=part):
        runner.load_state_dict(state)
    assert same_tensors(state_of(runner.context.model), before)


def test_what_runs_between_windows_has_run_when_its_window_is_handed_out() -> None:
    message: list[str] = []
    work = Workload(mlp(), vectors(4), between_steps=lambda model: message.append("between"))
    for _ in runner_for(work, 4, 2).epoch([vectors(8)]):
        message.append("result")
    assert message == ["between", "result"] * 2


def test_a_window_that_counts_otherwise_than_the_sample_is_tested_once(caplog: pytest.LogCaptureFixture) -> None:
    x, y = vectors(24)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], ignore_index=-100)

    runner = runner_for(Workload(mlp(), (x[:2], y[:2]), loss=loss, optimizer=Capture), 24, 12)
    runner.step((x, y))
    assert "is not that of one batch" not in caplog.text
    ignoring = torch.where(torch.arange(24) < 9, -100, y)
    runner.step((x, ignoring))
    runner.step((x, ignoring))
    assert caplog.text.count("is not that of one batch") == 1


@pytest.mark.parametrize(
    "change",
    [{"clip_grad_norm": 1.0}, {"between_steps": lambda m: None}, {"batchnorm": "frozen"}],
    ids=lambda c: next(iter(c)),
)
def test_a_plan_for_windows_that_do_less_is_refused(change: dict[str, Any]) -> None:
    plain = Workload(mlp(), vectors(4), optimizer=Capture)
    plan = plan_for(plain, 8, 4)
    with pytest.raises(PlanMismatch, match="window: planned 'plain'"):
        Runner(replace(plain, **change), plan)


def test_a_hugging_face_loss_with_ignored_labels_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Tells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": F.cross_entropy(self.inner(x), labels)}

    def given(ignored: int) -> dict[str, torch.Tensor]:
        x, labels = vectors(8)
        labels[:ignored] = -100
        return {"x": x, "labels": labels}

    runner = runner_for(Workload(Tells(), given(0)), 8, 4)
    runner.step(given(0))
    assert "ignored" not in caplog.text
    runner.step(given(2))
    runner.step(given(2))
    assert caplog.text.count("Some labels are ignored") == 1
