"""`autoaccum.windows` in a loop of one's own: the gradient of one whole batch, and what a misuse says."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import (
    FP64,
    IGNORED,
    NAIVE,
    Capture,
    Gradients,
    Rows,
    cut,
    distance,
    gradients,
    mlp,
    one_thread,  # noqa: F401
    pad,
    plan_for,
    recoveries,
    same_tensors,
    sequence,
    state_of,
    tagger,
    token_count,
    token_sum,
    vectors,
)
from plan_fields import changed_plan
from torch import nn
from torch.utils.data import DataLoader

import autoaccum
from autoaccum import BatchError, LossTerms, OutOfMemory, Plan, PlanMismatch, UsageError, Workload, fit_plan, windows
from autoaccum.runner.runner import StepResult
from autoaccum.workload import default_loss

Pair = tuple[torch.Tensor, torch.Tensor]


def plan(target: int, micro: int, average: str = "samples", sample: Any = None) -> Plan:
    made = plan_for(Workload(mlp(), vectors(4) if sample is None else sample, loss=default_loss), target, micro)
    return changed_plan(made, loss_average=average)


def token_plan(target: int, micro: int, average: str) -> Plan:
    made = plan_for(Workload(tagger(), pad([sequence(60, 0)]), loss=token_sum), target, micro)
    return changed_plan(made, loss_average=average)


def mean(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def token_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def trained(
    model: nn.Module, loss: Callable[[nn.Module, Any], Any], found: autoaccum.integrations.windows.Windows, **how: Any
) -> tuple[list[StepResult], list[Gradients]]:
    """One epoch of the loop that the documentation shows."""
    optimizer = Capture(model.parameters())
    results = []
    for window in found:
        for micro in window:
            window.backward(loss(model, micro.batch))
        results.append(window.step(optimizer, **how))
    return results, optimizer.seen


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "target", "micro"), [(97, 30, 7), (65, 64, 16), (33, 16, 5), (63, 64, 64)])
@pytest.mark.parametrize("kind", ["map-style", "list"])
def test_every_window_has_the_gradient_of_its_real_samples(kind: str, samples: int, target: int, micro: int) -> None:
    model, batch = mlp(), vectors(samples)
    loader: Any = DataLoader(Rows(list(zip(*batch, strict=True))), batch_size=9)
    found = windows(loader if kind == "map-style" else list(loader), plan(target, micro))
    full, rest = divmod(samples, target)
    assert len(found) == full + 1
    for _ in range(2):  # epochs
        results, got = trained(model, mean, found)
        assert [result.samples for result in results] == [target] * full + [rest]
        for result, gradient, start in zip(results, got, range(0, samples, target), strict=True):
            whole = tuple(v[start : start + target] for v in batch)
            assert max(result.split) <= micro and result.stepped and result.grad_norm is None
            assert distance(gradient, gradients(model, mean, whole)) <= FP64
            assert float(result.loss) == pytest.approx(mean(model, whole).item(), rel=1e-12)
    assert found.steps_taken == 2 * (full + 1)


RAGGED = (50, 50, 48, 41, 50, 3, 2, 1, 50, 7)


@pytest.mark.parametrize("kind", ["map-style", "list"])
@pytest.mark.parametrize("counted", ["count=", "by the plan", "(sum, count)"])
def test_ragged_labels_are_weighted_by_what_counts(kind: str, counted: str) -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate(RAGGED)]
    loader: Any = DataLoader(Rows(samples), batch_size=2, collate_fn=pad)
    loader = loader if kind == "map-style" else list(loader)
    model = tagger()
    made = token_plan(4, 2, "labels" if counted == "by the plan" else "(sum, count)")
    found = windows(loader, made, count=None if counted == "by the plan" else token_count)
    _, got = trained(model, token_sum if counted == "(sum, count)" else token_mean, found)
    for gradient, start in zip(got, range(0, 10, 4), strict=True):
        whole = pad(samples[start : start + 4])
        assert distance(gradient, gradients(model, token_mean, whole)) <= FP64
    _, wrong = trained(model, token_mean, windows(loader, made, count="samples"))
    assert distance(wrong[1], gradients(model, token_mean, pad(samples[4:8]))) > NAIVE


def test_shifted_labels_of_the_plan_are_counted_shifted() -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate(RAGGED)]
    found = windows(DataLoader(Rows(samples), 2, collate_fn=pad), token_plan(4, 2, "shifted labels"))
    window, weights = next(iter(found)), []
    for micro in window:
        window.backward((nn.Parameter(torch.ones(())) * micro.batch["ids"].sum()).double())
        weights.append(micro.weight)
    tokens = [sum(RAGGED[:2]) - 2, sum(RAGGED[2:4]) - 2]
    assert weights == [tokens[0] / sum(tokens), tokens[1] / sum(tokens)]


def test_the_plan_says_what_its_loss_averages_over() -> None:
    small = {"target_batch": 8, "budget": "4GiB", "verify": False, "check": False}
    assert fit_plan(Workload(mlp(), vectors(4)), **small).evidence.loss_average == "classes"
    by_mean = fit_plan(Workload(mlp(), vectors(4), loss=mean), **small)
    assert by_mean.evidence.loss_average == "samples"
    assert Plan.from_json(by_mean.to_json()) == by_mean
    sample = pad([sequence(8, 0), sequence(8, 1)])
    assert fit_plan(Workload(tagger(), sample, loss=token_sum), **small).evidence.loss_average == "(sum, count)"
    counted = Workload(tagger(), sample, loss=token_mean, count=token_count)
    assert fit_plan(counted, **small).evidence.loss_average == "count="


def test_a_window_in_which_nothing_counts_changes_nothing() -> None:
    samples = [sequence(6, seed=i) for i in range(8)]
    for sample in samples[:4]:
        sample["labels"].fill_(IGNORED)
    samples[5]["labels"].fill_(IGNORED)  # and one micro-batch: its mean is 0 / 0
    model = tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, results = state_of(model), []
    for window in windows([pad(samples[i : i + 1]) for i in range(8)], token_plan(4, 1, "labels")):
        for micro in window:
            window.backward(token_mean(model, micro.batch))
        results.append(window.step(optimizer, scheduler=scheduler))
        if len(results) == 1:
            assert same_tensors(before, state_of(model)) and not optimizer.state and scheduler.last_epoch == 0
    assert [result.stepped for result in results] == [False, True] and scheduler.last_epoch == 1
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_a_penalty_counts_once_a_window() -> None:
    model, batch = mlp(), vectors(20)

    def penalty(model: nn.Module) -> torch.Tensor:
        return sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]

    optimizer = Capture(model.parameters())
    for window in windows([batch], plan(20, 7)):
        for micro in window:
            window.backward(mean(model, micro.batch), extra=0.1 * penalty(model))
        window.step(optimizer)
    want = gradients(model, lambda m, b: mean(m, b) + 0.1 * penalty(m), batch)
    assert distance(optimizer.seen[0], want) <= FP64
    terms = Capture(model.parameters())
    for window in windows([batch], plan(20, 7), count=lambda b: len(b[1])):
        for micro in window:
            total = F.cross_entropy(model(micro.batch[0]), micro.batch[1], reduction="sum")
            window.backward(LossTerms(total, len(micro.batch[1]), 0.1 * penalty(model)))
        window.step(terms)
    assert distance(terms.seen[0], want) <= FP64


def test_clipping_and_schedulers_act_once_a_window() -> None:
    model, batch = mlp(), vectors(50)
    optimizer = Capture(model.parameters(), lr=1.0)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for number, window in enumerate(windows([batch], plan(20, 7))):
        whole = gradients(model, mean, tuple(v[20 * number : 20 * number + 20] for v in batch))
        for micro in window:
            window.backward(mean(model, micro.batch))
        result = window.step(optimizer, scheduler=[steps, plateau], max_grad_norm=0.01)
        norm = torch.cat([g.flatten() for g in whole]).norm()
        assert result.grad_norm is not None and torch.allclose(result.grad_norm, norm, rtol=1e-12)
        assert distance(optimizer.seen[-1], [g * 0.01 / (norm + 1e-6) for g in whole]) <= FP64
    assert steps.last_epoch == plateau.last_epoch == 3


def test_two_optimizers_share_a_loss() -> None:
    model, batch = mlp(), vectors(20)
    pair = [Capture(model[0].parameters()), Capture(model[2:].parameters())]  # type: ignore[index]
    for window in windows([batch], plan(20, 7)):
        for micro in window:
            window.backward(mean(model, micro.batch))
        window.step(pair)
    assert distance(pair[0].seen[0] + pair[1].seen[0], gradients(model, mean, batch)) <= FP64


def test_a_scaler_scales_each_micro_batch_and_steps_once() -> None:
    model, batch = mlp(torch.float32), vectors(20, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    made = plan_for(Workload(model, vectors(4, torch.float32), loss=mean), 20, 7)
    optimizer = Capture(model.parameters())
    want = gradients(model, mean, batch)
    for window in windows([batch], made, scaler=scaler):
        for micro in window:
            window.backward(mean(model, micro.batch))
        assert window.step(optimizer, max_grad_norm=1e9).stepped
    assert distance(optimizer.seen[0], want) <= 1e-5 and scaler.get_scale() == 2048
    model[4].weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr]
    for window in windows([batch], made, scaler=scaler):
        for micro in window:
            window.backward(mean(model, micro.batch))
        assert not window.step(optimizer).stepped and len(optimizer.seen) == 1


def test_fp16_autocast_with_a_scaler_comes_near_fp32() -> None:
    model, batch = mlp(torch.float32), vectors(20, torch.float32)
    made = plan_for(Workload(model, vectors(4, torch.float32), loss=mean), 20, 7)
    optimizer = Capture(model.parameters())
    for window in windows([batch], made, scaler=torch.amp.GradScaler("cpu", init_scale=256.0)):
        for micro in window:
            with torch.autocast("cpu", torch.float16):
                loss = mean(model, micro.batch)
            window.backward(loss)
        assert window.step(optimizer).stepped
    assert distance(optimizer.seen[0], gradients(model, mean, batch)) < 0.01


def test_sequences_come_longest_first_within_a_window(tmp_path: Path) -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate(RAGGED)]
    path = tmp_path / "plan.json"
    token_plan(10, 5, "labels").save(path)
    widths = []
    for window in windows(DataLoader(Rows(samples), collate_fn=pad), path, lengths=RAGGED):
        for micro in window:
            widths.append(micro.batch["ids"].shape[1])
            window.backward(token_mean(tagger(), micro.batch))
        window.skip(torch.optim.SGD(tagger().parameters(), lr=0.1))
    assert widths == [50, 41]


# --- out of memory -----------------------------------------------------------------------------------------------


def fail(gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("at", [1, 3])
def test_an_out_of_memory_changes_nothing_but_the_split(at: int, where: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 5)).double()
    batch, calls = vectors(20), [0]
    twin = copy.deepcopy(model)

    def once(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == at and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if calls[0] == at:
            out.register_hook(fail)

    model[0].register_forward_hook(once)
    work = Workload(model, vectors(4), loss=mean)
    optimizer = Capture(model.parameters())
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        for window in windows([batch], plan_for(work, 20, 7), model=model):
            for micro in window:
                with window.recovering():
                    window.backward(mean(model, micro.batch))
            result = window.step(optimizer)
    assert result.retries == 1 and result.split == (4, 3, 4, 3, 6) and len(recoveries(caplog)) == 1
    torch.manual_seed(1)  # the same dropout and running statistics as in a window that was cut so from the start
    for piece in cut(batch, result.split):
        (mean(twin, piece) * len(piece[1]) / 20).backward()
    assert distance(optimizer.seen[0], [p.grad for p in twin.parameters() if p.grad is not None]) <= FP64
    assert same_tensors(state_of(model), state_of(twin))


def test_what_recovery_cannot_undo_it_refuses() -> None:
    model, batch = mlp(), vectors(20)
    made = plan_for(Workload(model, vectors(4), loss=mean), 20, 7)
    with pytest.raises(UsageError, match=r"recovering\(\) needs the model"):
        for window in windows([batch], made):
            for _ in window:
                with window.recovering():
                    pass
    with pytest.raises(UsageError, match="first entered in micro-batch 2"):
        for window in windows([batch], made, model=model):
            for micro in window:
                if micro.index == 1:
                    with window.recovering():
                        pass
                window.backward(mean(model, micro.batch))
    model.zero_grad()
    with pytest.raises(OutOfMemory, match="micro-batch of 1, which can't be cut"):
        for window in windows([batch], made, model=model):
            for _ in window:
                with window.recovering():
                    raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"):  # any other error is the loop's own
        for window in windows([batch], made, model=model):
            for _ in window:
                with window.recovering():
                    raise RuntimeError("shapes")


# --- misuse ------------------------------------------------------------------------------------------------------


def loop(body: Callable[[Any, Any, nn.Module, Any], None], target: int = 20, **how: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows([vectors(40)], plan(target, 7), **how):
        body(window, optimizer, model, how)


def all_but(window: Any, model: nn.Module, skipped: int) -> None:
    for micro in window:
        if micro.index != skipped:
            window.backward(mean(model, micro.batch))


def abandon(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    for micro in window:
        window.backward(mean(model, micro.batch))
        if micro.index == 1:
            break


def twice(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    for micro in window:
        window.backward(mean(model, micro.batch))
        window.backward(mean(model, micro.batch))


def step_twice(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    all_but(window, model, -1)
    window.step(optimizer)
    window.step(optimizer)


def by_hand(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    for micro in window:
        (mean(model, micro.batch) * micro.weight).backward()


def again(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    all_but(window, model, -1)
    all_but(window, model, -1)


def early(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    abandon(window, optimizer, model, how)
    window.step(optimizer)


def inside(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    for micro in window:
        window.backward(mean(model, micro.batch))
        window.step(optimizer)


def late(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    all_but(window, model, -1)
    window.step(optimizer)
    window.backward(mean(model, vectors(2)))


def foreign(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    all_but(window, model, -1)
    window.step(torch.optim.SGD(mlp().parameters(), lr=0.1))


def clears(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    """As the loop without accumulation does, which becomes one in windows."""
    for micro in window:
        optimizer.zero_grad(set_to_none=how["set_to_none"])
        window.backward(mean(model, micro.batch))


def clears_last(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    all_but(window, model, -1)
    optimizer.zero_grad()
    window.step(optimizer)


def steps_itself(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    for micro in window:
        window.backward(mean(model, micro.batch))
        optimizer.step()


def before(window: Any, optimizer: Any, model: nn.Module, how: Any) -> None:
    mean(model, vectors(3)).backward()
    all_but(window, model, -1)


def with_option(body: Callable[..., None], window: Any, optimizer: Any, model: Any, how: Any, **more: Any) -> None:
    body(window, optimizer, model, {**how, **more})


MISUSES: dict[str, tuple[Callable[..., None], str]] = {
    "no backward": (lambda w, o, m, h: all_but(w, m, 1), r"Micro-batch 2 of 3 had no window.backward\(loss\)"),
    "no backward for the last": (lambda w, o, m, h: all_but(w, m, 2), "Micro-batch 3 of 3"),
    "a backward by hand": (by_hand, "Micro-batch 1 of 3 had no window.backward"),
    "two backwards": (twice, "called twice for micro-batch 1 of 3"),
    "no step": (lambda w, o, m, h: all_but(w, m, -1), "3 of 3 micro-batches' backward and no step"),
    "an early step": (early, r"step\(\) after 2 of 3(.|\n)*of 14 samples of 20"),
    "a step in the loop": (inside, r"step\(\) after 1 of 3"),
    "a second step": (step_twice, "step was taken already"),
    "left by break": (abandon, "2 of 3 micro-batches' backward and no step"),
    "iterated twice": (again, "iterated a second time"),
    "backward after the step": (late, "outside the loop over the window"),
    "another model's optimizer": (foreign, "loss reaches none of them"),
    "cleared in the loop": (partial(with_option, clears, set_to_none=True), "cleared in the middle of it"),
    "set to 0 in the loop": (partial(with_option, clears, set_to_none=False), "cleared in the middle of it"),
    "cleared before the step": (clears_last, "cleared in the middle of it"),
    "the optimizer's own step": (steps_itself, "changed between two micro-batches"),
    "a gradient before": (before, "have a gradient before the window's first backward"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_an_error_that_says_so(name: str) -> None:
    body, message = MISUSES[name]
    with pytest.raises(UsageError, match=message):
        loop(body)


def test_an_exception_inside_a_window_is_not_forgotten() -> None:
    model, batch = mlp(), vectors(40)
    optimizer = Capture(model.parameters())
    found = windows([batch], plan(20, 7))
    with pytest.raises(ZeroDivisionError):
        for window in found:
            for micro in window:
                window.backward(mean(model, micro.batch))
                _ = 1 / 0
    with pytest.raises(UsageError, match="gradient before the window's first backward"):
        trained(model, mean, found)
    optimizer.zero_grad()
    _, seen = trained(model, mean, found)
    assert distance(seen[0], gradients(model, mean, tuple(v[:20] for v in batch))) <= FP64


def test_a_window_that_is_skipped_leaves_no_gradient() -> None:
    model, batch = mlp(), vectors(40)
    optimizer = Capture(model.parameters())
    for number, window in enumerate(windows([batch], plan(20, 7))):
        for micro in window:
            window.backward(mean(model, micro.batch))
            if number == 0:
                break
        window.skip(optimizer) if number == 0 else window.step(optimizer)
    assert distance(optimizer.seen[0], gradients(model, mean, tuple(v[20:] for v in batch))) <= FP64


def test_ignored_labels_without_a_count_are_refused_before_anything_is_trained() -> None:
    samples = [sequence(length, seed=i) for i, length in enumerate(RAGGED)]
    loader, made = DataLoader(Rows(samples), 2, collate_fn=pad), token_plan(4, 2, "samples")
    with pytest.raises(UsageError, match=r"labels of -100, in different parts(.|\n)*count=lambda"):
        list(windows(loader, made))
    for average in ("(sum, count)", "count="):
        with pytest.raises(UsageError, match="Give the same function here"):
            windows(loader, token_plan(4, 2, average))
    with pytest.raises(UsageError, match=r"compares the samples(.|\n)*Runner"):
        windows(loader, token_plan(4, 2, "representations"))
    with pytest.raises(UsageError, match="count is 'tokens'"):
        windows(loader, made, count="tokens")
    with pytest.raises(UsageError, match="gave nan"):
        next(iter(windows(loader, made, count=lambda batch: float("nan"))))


def test_a_sum_without_the_window_s_count_is_refused() -> None:
    model, batch = mlp(), vectors(20)
    for count, message in ((None, "came with a count"), (lambda b: 3, "count of 7, and the micro-batch counts 3")):
        with pytest.raises(UsageError, match=message):
            for window in windows([batch], plan(20, 7), count=count):
                for micro in window:
                    loss = F.cross_entropy(model(micro.batch[0]), micro.batch[1], reduction="sum")
                    window.backward((loss, len(micro.batch[1])))


def test_another_model_device_or_batch_than_planned_is_refused() -> None:
    made = plan(20, 7)
    with pytest.raises(PlanMismatch, match="model: planned 'Sequential"):
        windows([vectors(20)], made, model=tagger())
    with pytest.raises(PlanMismatch, match="device: planned 'cpu', here 'cuda'"):
        windows([vectors(20)], made, device="cuda")
    with pytest.raises(PlanMismatch, match="ranks: planned 2, here 1"):
        windows([vectors(20)], changed_plan(made, world_size=2))
    longer = torch.randn(20, 7, dtype=torch.float64), torch.zeros(20, dtype=torch.long)
    found = iter(windows([vectors(20), longer, vectors(20)], made))
    model = mlp()
    all_but(window := next(found), model, -1)
    window.skip(torch.optim.SGD(model.parameters()))
    with pytest.raises(BatchError, match="samples 20 to 39 of the epoch"):
        next(found)
    assert next(found).samples == 20  # the next window is there
    with pytest.raises(UsageError, match="gave no batch"):
        list(windows([], made))
    with pytest.raises(TypeError, match="can't be counted"):
        len(windows(iter([vectors(2)]), made))


def test_lowered_sizes_stay_lowered_over_epochs() -> None:
    model = mlp()
    found = windows([vectors(20)], plan_for(Workload(model, vectors(4), loss=mean), 20, 7), model=model)
    failing = [True]
    splits = []
    for _ in range(2):
        for window in found:
            for micro in window:
                with window.recovering():
                    if failing and failing.pop():
                        raise MemoryError
                    window.backward(mean(model, micro.batch))
            splits.append(window.step(Capture(model.parameters())).split)
    assert splits == [(4, 3, 4, 3, 6), (5, 5, 5, 5)]
