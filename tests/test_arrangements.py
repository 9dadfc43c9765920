"""Losses that one unlucky batch makes look exact: each on samples that are balanced, sorted and mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_train import base_plan, distance, gradients, mean_of, one_thread  # noqa: F401
from plan_fields import changed_plan
from torch import nn

from autoaccum import LossTerms, Workload, fit_plan
from autoaccum.exactness import arrangements, check, test_batches
from autoaccum.exactness.functional_copy import FunctionalCopy
from autoaccum.plan import PeakRow

Loss = Callable[[nn.Module, Any], Any]
ROWS, WEIGHTS = 64, torch.tensor([0.2, 3.0])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def labels(how: str) -> torch.Tensor:
    y = torch.arange(ROWS) % 2
    if how == "sorted":
        return y.sort().values
    return y if how == "alternating" else y[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]


def sample(how: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1)), labels(how)


def each(m: nn.Module, b: Any) -> torch.Tensor:
    return F.cross_entropy(m(b[0]), b[1], reduction="none")


def balanced(m: nn.Module, b: Any) -> torch.Tensor:
    n = torch.bincount(b[1], minlength=2).clamp(min=1)
    return F.cross_entropy(m(b[0]), b[1], weight=(len(b[1]) / (2.0 * n)).to(b[0]))


def positives(m: nn.Module, b: Any) -> torch.Tensor:
    y = b[1].to(b[0])
    return F.binary_cross_entropy_with_logits(m(b[0])[:, 0], y, pos_weight=(len(y) - y.sum()) / y.sum().clamp(min=1))


def by_prior(m: nn.Module, b: Any) -> torch.Tensor:
    n = torch.bincount(b[1], minlength=2).clamp(min=1).to(b[0])
    return F.cross_entropy(m(b[0]) + (n / n.sum()).log(), b[1], reduction="none").mean()


def by_maximum(m: nn.Module, b: Any) -> torch.Tensor:
    return F.mse_loss(m(b[0] / b[0].abs().max())[:, 0], b[1].to(b[0]))


def by_largest_loss(m: nn.Module, b: Any) -> torch.Tensor:
    found = each(m, b)
    return (found / found.detach().max()).mean()


def by_quantile(m: nn.Module, b: Any) -> torch.Tensor:
    most = b[0].abs().quantile(0.99)
    return each(m, (b[0].clamp(-most, most), b[1])).mean()


def hardest_half(m: nn.Module, b: Any) -> torch.Tensor:
    return each(m, b).topk(max(1, len(b[1]) // 2)).values.mean()


def margin(m: nn.Module, b: Any) -> torch.Tensor:
    out = m(b[0])
    return F.relu(out.detach().mean() + 1 - out.gather(1, b[1][:, None])).mean()


def margin_of_difference(m: nn.Module, b: Any) -> torch.Tensor:
    out = m(b[0])
    score = out[:, 1] - out[:, 0]
    return F.relu(score.detach().mean() + 0.5 - score).mean()


def far_ones(m: nn.Module, b: Any) -> torch.Tensor:
    far = m(b[0]).pow(2).sum(1)
    return F.relu(far - far.detach().mean() + 0.2).mean()


def classes_there(m: nn.Module, b: Any) -> torch.Tensor:
    return each(m, b).mean() / len(b[1].unique())


def hinge(m: nn.Module, b: Any) -> torch.Tensor:
    out = m(b[0])
    return F.relu(1 - out.gather(1, b[1][:, None])).mean()


def focal(m: nn.Module, b: Any) -> torch.Tensor:
    log = m(b[0]).log_softmax(-1).gather(1, b[1][:, None])
    return -((1 - log.exp()) ** 2 * log).mean()


def kept_hard(m: nn.Module, b: Any) -> torch.Tensor:
    found = each(m, b)
    return (found * (found.detach() > 0.7)).mean()


COUPLED = [
    balanced,
    positives,
    by_prior,
    by_maximum,
    by_largest_loss,
    by_quantile,
    hardest_half,
    classes_there,
    margin,
    margin_of_difference,
    far_ones,
]
HONEST: dict[str, Loss] = {
    "weighted, counted": lambda m, b: (
        F.cross_entropy(m(b[0]), b[1], WEIGHTS.to(b[0]), reduction="sum"),
        WEIGHTS.to(b[0])[b[1]].sum(),
    ),
    "weighted mean over samples": lambda m, b: (each(m, b) * WEIGHTS.to(b[0])[b[1]]).mean(),
    "positives' weight": lambda m, b: F.binary_cross_entropy_with_logits(
        m(b[0])[:, 0], b[1].to(b[0]), pos_weight=torch.tensor(4.0).to(b[0])
    ),
    "hinge": hinge,
    "focal": focal,
    "a fixed threshold": kept_hard,
    "smoothed": lambda m, b: (F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1, reduction="sum"), len(b[1])),
    "a penalty apart": lambda m, b: LossTerms(each(m, b).sum(), len(b[1]), sum(p.norm() for p in m.parameters())),
    "huber": lambda m, b: F.huber_loss(m(b[0])[:, 0], b[1].to(b[0]), delta=0.3),
    "a maximum that cancels out": lambda m, b: (
        -((m(b[0]) - m(b[0]).detach().max()).log_softmax(-1).gather(1, b[1][:, None]).mean())
    ),
    "maximum over classes": lambda m, b: (m(b[0]).amax(1) - b[1]).abs().mean(),
}


@pytest.mark.parametrize("how", ["alternating", "sorted", "mixed"])
@pytest.mark.parametrize("loss", COUPLED, ids=lambda loss: loss.__name__)
def test_what_depends_on_the_batch_is_never_called_exact(loss: Loss, how: str) -> None:
    found = check.check(Workload(classifier(), sample(how), loss=loss), isolated=False)
    assert found.kind in ("not decomposable", "wrong denominator") and found.error > 1e-4, found


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_loss_stays_exact_however_its_outputs_lie(name: str) -> None:
    for how in ("alternating", "sorted"):
        found = check.check(Workload(classifier(), sample(how), loss=HONEST[name]), isolated=False)
        assert found.kind == "exact" and found.error < 1e-12, found


def test_where_samples_meet_without_a_trace_in_the_gradient_more_is_tried() -> None:
    """Only there: it takes three passes for each further arrangement."""
    for name, depends in (("a maximum that cancels out", True), ("hinge", False), ("a penalty apart", False)):
        work = Workload(classifier(), sample("mixed"), loss=HONEST[name])
        found = arrangements.run_cases(work, FunctionalCopy(work.model, work.loss, dtype=torch.float64), 16)
        assert any(each.gradients.depends for each in found) == depends
        assert len(found) == 2 + len(arrangements.OUTPUT_SPREADS) * depends and found[-1].holds


@pytest.mark.parametrize("most", [2, 4, 7])
def test_a_margin_is_seen_where_few_samples_fit_at_once(most: int) -> None:
    seen = [check.check(Workload(classifier(), sample(how), loss=margin), max_rows=most, isolated=False).exact
            for how in ("alternating", "sorted", "mixed")]  # fmt: skip
    assert not any(seen)


def test_balanced_class_weights_are_off_where_the_classes_are_not_balanced() -> None:
    """What the verdict is about, by plain autograd: balanced parts of a balanced batch agree, others don't."""
    model, (x, y) = classifier().double(), sample("alternating")
    for rows, holds in ((torch.arange(64), True), (torch.cat([torch.arange(0, 64, 2), torch.arange(1, 27, 2)]), False)):
        batch = x[rows].double(), y[rows]
        parts = [tuple(leaf[cut] for leaf in batch) for cut in (slice(0, 32), slice(32, None))]
        sizes = [len(part[0]) / len(rows) for part in parts]
        found = mean_of([gradients(model, balanced, part) for part in parts], sizes)
        off = distance(found, gradients(model, balanced, batch))
        assert off < 1e-12 if holds else off > 0.1


def test_arrangements_differ_in_order_counts_and_spread_of_outputs() -> None:
    work = Workload(classifier(), sample("alternating"), loss=focal)
    model_copy = FunctionalCopy(work.model, focal, dtype=torch.float64)
    one, two = arrangements.run_cases(work, model_copy, 16)
    assert one.test_batch.rows == 16 and one.test_batch.batch[1].bincount().tolist() == [8, 8]
    assert (
        one.test_batch.batch[1].tolist() == sorted(one.test_batch.batch[1].tolist()) != two.test_batch.batch[1].tolist()
    )
    few, many = two.test_batch.batch[1].bincount().tolist()
    assert few < many and two.test_batch.pair != one.test_batch.pair
    assert two.wide and test_batches.WIDE in (two.test_batch.hardness or ())
    with arrangements.as_in_case(model_copy, two):
        wide = model_copy.run(lambda: model_copy.model(model_copy.cast(two.test_batch.batch)[0])).std()
    narrow = model_copy.run(lambda: model_copy.model(model_copy.cast(two.test_batch.batch)[0])).std()
    assert wide > 2 and wide > 5 * narrow
    assert all(
        torch.equal(model_copy.copies[name], p)
        for name, p in zip(model_copy.trained, work.model.double().parameters(), strict=True)
    )


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_sample_of_few_rows_is_tested_on_eight(rows: int) -> None:
    few = tuple(leaf[:rows] for leaf in sample("alternating"))
    assert check.check(Workload(classifier(), few, loss=focal), isolated=False).words == "exact (tested on 8 samples)"
    found = check.check(Workload(classifier(), few, loss=by_largest_loss), isolated=False)
    assert not found.exact and found.kind != "unknown"


@pytest.mark.parametrize("most", [1, 2, 4, 6])
def test_a_plan_of_small_micro_batches_is_tested_on_eight_samples(most: int) -> None:
    """A micro-batch may be small because somebody wants it so; what counts is the memory."""
    work = Workload(classifier(), sample("alternating"), loss=focal)
    plan = fit_plan(work, target_batch=12, budget="4GiB", verify=False, max_micro_batch=most)
    assert plan.micro_batch <= most and plan.exactness == "exact (tested on 16 samples)"
    peaks = PeakRow(1, 1500, 1600, 1400), PeakRow(9, 9500, 9600, 1400)  # twice as much in double precision
    tight = changed_plan(
        plan, peaks=peaks, budget=replace(plan.memory.budget, bytes=plan.memory.baseline_bytes + 500 + 2000 * most)
    )
    few = check.check_plan(changed_plan(tight, notes=()), work)
    assert few.exactness == "exact (tested on 8 samples)" if most > 1 else "2 samples at once" in few.exactness


def plain_classes(m: nn.Module, b: Any) -> torch.Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def test_a_loss_that_could_ignore_targets_is_exact_on_data_that_has_none() -> None:
    found = check.check(Workload(classifier(), sample("mixed"), loss=plain_classes), isolated=False)
    assert found.exact and found.words == "exact (tested on 16 samples, none with an ignored target)"
    assert any("count=lambda batch: (batch[1] != -100).sum()" in line for line in found.advice)
    some = sample("mixed")
    some[1][:20] = -100
    found = check.check(Workload(classifier(), some, loss=plain_classes), isolated=False)
    assert found.words.startswith("not exact: the loss averages over the classes in batch[1]")
    both = check.check(
        Workload(classifier(), sample("mixed"), loss=lambda m, b: plain_classes(m, b) + hardest_half(m, b)),
        isolated=False,
    )
    assert both.words.startswith("not exact: ") and "without ignored" not in both.words
    message = check.with_verdict(base_plan(), found)
    assert message.exactness == found.words
