"""The verdict on losses whose answer is known, on easy and on hard samples; and that finding it leaves no trace."""

from __future__ import annotations

import copy
import functools
import json
import queue
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact_cases import CASES, CHANCE, COUNT, COUPLED, EXACT, Case, classes, mlp, regression, tokens, vectors
from helpers_train import Capture, base_plan, cut, distance, drained, gradients, mean_of, one_thread  # noqa: F401
from plan_fields import changed_plan
from prepared_process import run_forked
from torch import nn
from typer.testing import CliRunner

from autoaccum import LossTerms, Workload, fit_plan
from autoaccum.cli import app, tasks
from autoaccum.devices import virtual
from autoaccum.exactness import check, functional_copy
from autoaccum.exactness.advice import percent
from autoaccum.exactness.recheck import counts_differ, recheck
from autoaccum.exactness.test_batches import HARDNESSES, easy, harder, plain, uneven
from autoaccum.state import snapshot
from autoaccum.state.closures import modules_of
from autoaccum.window import step

SAMPLES = pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
MSE = Case("mse", EXACT, lambda m, b: F.mse_loss(m(b[0]), b[1]), regression, mlp)


def work(case: Case, hard: bool = False, **more: Any) -> Workload:
    return Workload(case.model(), case.sample(hard), loss=case.loss, count=case.count, **more)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@SAMPLES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_loss_gets_its_verdict_and_none_is_called_exact_that_is_not(
    case: Case, hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, backward = list[int](), torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **how: (passes.append(1), backward(*args, **how)))
    found = check.check(work(case, hard), isolated=False)
    assert len(passes) <= (6 + 3 * bool(case.easy) if found.exact else 12)  # three where ignored targets may matter
    assert found.kind == (case.kind if hard else case.easy or case.kind), found
    assert found.samples == 12
    assert (case.module or "") in (found.module or ""), found
    assert (found.module is None) == (case.module is None)
    if found.exact:
        assert found.error < 1e-5 and found.worst_tensor_error < 1e-5 and "tested on 12 samples" in found.words
    else:
        assert found.error > 1e-3 and found.advice and "not exact" in found.words
        assert percent(found.error) in found.words
    assert (case.advice or "") in " ".join(found.advice), found


@pytest.mark.parametrize("case", [c for c in CASES if c.kind != CHANCE], ids=lambda case: case.name)
def test_the_verdicts_are_those_of_plain_autograd(case: Case) -> None:
    """The same losses on parts that autoaccum didn't choose, by deepcopy and backward: nothing of it is used."""
    single = "label smoothing" in case.name  # its class weights are
    model, batch, sizes = case.model(), case.sample(True), (7, 3, 2)
    if not single:
        model, batch = model.double(), to_double(batch)
    loss = case.loss or (lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    pieces = list(cut(batch, sizes))
    whole, context = gradients(model, loss, batch), [gradients(model, loss, piece) for piece in pieces]
    outs = [loss(model, piece) for piece in pieces]
    counts = [float(out[1]) if isinstance(out, tuple) else float(size) for out, size in zip(outs, sizes, strict=True)]
    if case.count is not None:
        counts = [float(case.count(piece)) for piece in pieces]
    if case.loss is None:
        counts = [float((piece[1] != -100).sum()) for piece in pieces]
    total = float(loss(model, batch)[1]) if isinstance(outs[0], tuple) else sum(counts)
    off = distance(mean_of(context, [count / total for count in counts]), whole)
    assert off < (1e-5 if single else 1e-12) if case.kind == EXACT else off > 1e-3


def to_double(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: to_double(leaf) for name, leaf in batch.items()}
    if isinstance(batch, tuple):
        return tuple(to_double(leaf) for leaf in batch)
    return batch.double() if batch.is_floating_point() else batch


# --- what it costs, and that it leaves no trace


@pytest.mark.parametrize("name", ["mse", "class weights", "weight penalty in a sum", "count=", "sum and count", "dice"])
def test_six_small_passes_for_what_is_exact_and_three_more_to_tell_what_is_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, backward = list[int](), torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **how: (passes.append(1), backward(*args, **how)))
    case, calls = named(name), queue.SimpleQueue[int]()
    model = case.model()

    def loss(m: nn.Module, b: Any) -> Any:
        calls.put(len(next(iter(b.values())) if isinstance(b, dict) else b[0]))
        assert case.loss is not None
        return case.loss(m, b)

    found = check.check(Workload(model, case.sample(False), loss=loss, count=case.count), isolated=False)
    assert found.kind == case.kind
    # Three more for what is wrong; where targets were ignored, three that ask whether that is what is wrong.
    assert len(passes) == {"class weights": 9, "weight penalty in a sum": 6, "dice": 6}.get(name, 6)
    # One looks at what the loss calls; only a pair without count= is counted, by one for each part; two find a module.
    counts = {"sum and count": 4, "weight penalty in a sum": 2 + 3, "dice": 2}
    rows = drained(calls)
    assert len(rows) - len(passes) == 1 + counts.get(name, 0)
    assert max(rows) <= 16


class Busy(nn.Module):
    """Changes whatever a module can change in a forward, and draws from three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, max_norm=0.5)
        self.norm, self.dropout, self.out = nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log = 0, [torch.zeros(2)]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        self.log.append(ids.detach())
        self.noise = random.random() + np.random.rand()
        self.out.register_forward_hook(lambda *args: None)
        return self.out(self.dropout(self.norm(self.embedding(ids).mean(1))))


@pytest.mark.parametrize("large", [False, True], ids=["copies", "views"])
def test_the_check_leaves_everything_bitwise_as_it_was(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(check, "MAX_DOUBLE_PARAMETERS", 0)
        monkeypatch.setattr(functional_copy, "MAX_COPIED_PARAMETERS", 0)
    torch.manual_seed(0)
    model, criterion = Busy().eval(), nn.CrossEntropyLoss(weight=torch.ones(5))
    head = nn.Linear(5, 5)  # trained with the loss, and not in the model
    batch = {"ids": torch.randint(11, (8, 4)), "y": torch.randint(5, (8,)), "spare": torch.ones(8)}
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    before, sample = snapshot.take(model=model, optimizer=optimizer), copy.deepcopy(batch)
    outside = snapshot.take(model=nn.ModuleList([head, criterion]))

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        out = criterion(head(m(b["ids"])), b.pop("y"))
        b["spare"].zero_()
        return out

    found = check.check(Workload(model, batch, loss=loss, optimizer=optimizer))
    assert found.kind != "unknown", found
    assert not before.differences() and not outside.differences()
    assert all(torch.equal(batch[name], sample[name]) for name in sample)


def test_an_interrupt_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Busy(), (torch.randint(11, (8, 4)), torch.randint(5, (8,)))
    before = snapshot.take(model=model)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.check(Workload(model, batch))
    assert not before.differences()


# --- precisions, large models, models of all kinds


def test_a_loss_with_single_precision_inside_is_judged_in_single_precision() -> None:
    weights = torch.linspace(0.1, 10, 5)

    def loss(m: nn.Module, b: Any) -> Any:
        kept = b[1][b[1] != -100]
        return F.cross_entropy(m(b[0]), b[1], weight=weights, reduction="sum"), weights[kept].sum()

    found = check.check(Workload(mlp(), vectors(True), loss=loss))
    assert found.kind == EXACT and 1e-9 < found.error < 1e-5


def test_bf16_parameters_are_judged_in_single_or_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("layernorm")
    batch = tuple(leaf.bfloat16() for leaf in regression(False))
    for doubles in (1 << 20, 0):
        monkeypatch.setattr(check, "MAX_DOUBLE_PARAMETERS", doubles)
        found = check.check(Workload(case.model().bfloat16(), batch, loss=case.loss))
        assert found.kind == EXACT and found.error < 1e-6


@pytest.mark.parametrize("name", ["mse", "class weights", "dice", "batchnorm", "weight penalty in a sum", "sum", "ctc"])
def test_a_large_model_gets_the_same_verdict_from_a_part_of_its_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MAX_DOUBLE_PARAMETERS", 0)
    monkeypatch.setattr(functional_copy, "MAX_COPIED_PARAMETERS", 0)
    monkeypatch.setattr(functional_copy, "MAX_ENTRIES", 60)
    monkeypatch.setattr(functional_copy, "MIN_TENSOR_ENTRIES", 8)
    assert check.check(work(named(name), True)).kind == named(name).kind


def test_weights_that_are_computed_from_others_are_no_obstacle() -> None:
    """deepcopy refuses them: "Only Tensors created explicitly by the user support the deepcopy protocol"."""
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 16)), nn.Tanh(), nn.Linear(16, 5))
    model(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert check.check(Workload(model, vectors(True))).kind == EXACT


class Attentive(nn.Module):
    """Dropout in an LSTM and in attention, where no Dropout module shows it; parameters shared by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.out, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)[0]
        return self.tied(self.out(self.attend(h, h, h)[0])).mean(1)


def test_dropout_without_a_dropout_module_is_seen_and_switched_off() -> None:
    torch.manual_seed(0)
    sample = torch.randn(8, 4, 8), torch.randn(8, 8)
    found = check.check(Workload(Attentive(), sample, loss=MSE.loss))
    assert found.kind == CHANCE and "dropout off" in found.words and found.error < 1e-12
    assert check.check(Workload(Attentive(), sample, loss=lambda m, b: m(b[0]).std(0).mean())).kind == COUPLED


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "NumPy"])
def test_what_python_or_numpy_draw_is_seen(draw: Callable[[], float]) -> None:
    found = check.check(Workload(mlp(), regression(False), loss=lambda m, b: F.mse_loss(m(b[0]) * draw(), b[1])))
    assert found.kind == CHANCE and found.error < 1e-12


class Running(nn.Module):
    """Divides by something that each forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x / self.scale.clone()
        self.scale.add_(0.1)
        return out


def test_a_module_that_changes_with_each_forward_is_named() -> None:
    model = mlp(Running())
    found = check.check(Workload(model, regression(False), loss=MSE.loss))
    assert found.kind == "changes with each forward" and found.module == "1 (Running)"
    assert torch.equal(model[1].scale, torch.ones(16))
    norm = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))  # iterates once in a window
    assert check.check(Workload(mlp(norm), regression(False), loss=MSE.loss)).kind == EXACT


@pytest.mark.parametrize("name", ["infonce", "dice", "barlow twins", "batch-hard", "vicreg"])
def test_a_loss_over_representations_is_exact_where_they_are_all_kept(name: str) -> None:
    case = named(name)

    def loss(model: nn.Module, representations: Any) -> Any:
        assert case.loss is not None
        return case.loss(nn.Identity(), representations)

    work = Workload(mlp(), case.sample(True), encode=lambda m, b: (m(b[0]), b[1]), loss=loss)
    if name in ("barlow twins", "infonce"):
        work = replace(work, sample=(work.sample[0],), encode=lambda m, b: (m(b[0]),))
    if name == "vicreg":
        work = replace(work, sample=regression(True))
    assert check.check(work).kind == EXACT
    assert check.check(replace(work, model=mlp(nn.Dropout(0.3)))).kind == CHANCE
    assert check.check(replace(work, model=mlp(nn.BatchNorm1d(16)))).module == "1 (BatchNorm1d)"


@pytest.mark.parametrize(("how", "kind"), [("frozen", EXACT), ("merged", COUPLED), ("per_micro_batch", COUPLED)])
def test_batch_normalization_is_exact_where_it_is_frozen(how: str, kind: str) -> None:
    found = check.check(Workload(mlp(nn.BatchNorm1d(16)), vectors(True), batchnorm=how))
    assert found.kind == kind and (found.module is None) == (kind == EXACT)
    coupled = Workload(mlp(nn.BatchNorm1d(16)), vectors(True), loss=named("infonce").loss, batchnorm="frozen")
    assert check.check(coupled).module is None  # it is the loss that couples them


def test_a_term_given_apart_is_counted_once() -> None:
    def loss(m: nn.Module, b: Any) -> LossTerms:
        return LossTerms(
            F.mse_loss(m(b[0]), b[1], reduction="sum"), b[1].numel(), sum(p.norm() for p in m.parameters())
        )

    assert check.check(Workload(mlp(), regression(True), loss=loss)).kind == EXACT


def test_next_tokens_made_of_the_inputs_need_no_count() -> None:
    """No class can be ignored there: the model doesn't take -100 for a token."""

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return F.cross_entropy(m(b)[:, :-1].flatten(0, 1), b[:, 1:].reshape(-1).clamp(max=4))

    def plain(m: nn.Module, b: Any) -> torch.Tensor:
        return F.cross_entropy(m(b)[:, :-1].flatten(0, 1), b[:, 1:].reshape(-1))

    ids = torch.randint(1, 5, (8, 6), generator=torch.Generator().manual_seed(0))
    assert check.check(Workload(named("count=").model(), ids, loss=plain)).kind == EXACT
    made = check.check(Workload(named("count=").model(), ids * 2, loss=loss))  # their parts can't be found
    assert made.kind == COUNT and "exact on data without ignored targets" in made.words and made.advice


def test_the_innermost_of_nested_modules_is_named() -> None:
    block = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Sequential(nn.BatchNorm1d(16), nn.ReLU()))
    found = check.check(Workload(mlp(block, nn.BatchNorm1d(16)), vectors(False)))
    assert found.module == "1.1.0 (BatchNorm1d)"


class Images(nn.Module):
    """Positions flattened into the rows, as (samples * positions, channels)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.lift, self.norm, self.out = nn.Linear(4, 16), norm, nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.tanh(self.lift(x.flatten(0, 1))))
        return self.out(h).view(*x.shape[:2], -1).mean(1)


def test_rows_of_flattened_positions_are_distinguished() -> None:
    sample = torch.randn(8, 3, 4), torch.randint(5, (8,))
    assert check.check(Workload(Images(nn.BatchNorm1d(16)), sample)).module == "norm (BatchNorm1d)"
    assert check.check(Workload(Images(nn.LayerNorm(16)), sample)).kind == EXACT


def test_a_compiled_model_is_judged_uncompiled() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    model = torch.compile(mlp(nn.BatchNorm1d(16)), backend=backend)
    assert "BatchNorm1d" in (check.check(Workload(model, vectors(False))).module or "")
    assert check.check(Workload(torch.compile(mlp(), backend=backend), vectors(False))).kind == EXACT
    assert not compiled
    model(vectors(False)[0])
    assert compiled


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_labels_of_hugging_face_models_force_the_counted_form(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 32}
    torch.manual_seed(0)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    ids = torch.randint(3, 60, (8, 12))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    naive = Workload(model, batch, loss=lambda m, b: m(**b).loss)
    found = check.check(naive)
    code = "batch['labels']" if kind == "bert" else "batch['labels'][:, 1:]"
    assert found.kind == COUNT and found.error > 0.05
    assert found.advice[-1] == f"Workload(..., count=lambda batch: ({code} != -100).sum())"
    message = re.search(r"count=(.*)\)$", found.advice[-1])
    assert message is not None
    for mended in (
        replace(naive, count=eval(message[1])),
        replace(naive, loss=None),
    ):  # what it says to type; the default
        found = check.check(mended)
        assert found.kind == (CHANCE if kind != "llama" else EXACT) and found.error < 1e-6


class Heads(nn.Module):
    """Two heads on one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.side = mlp(), nn.Linear(5, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(self.body(x))


def test_a_small_tensor_whose_gradient_is_all_wrong_shows() -> None:
    """The whole gradient is off by less than rounding in a model with single precision inside."""
    torch.manual_seed(0)

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        return F.mse_loss(m(b[0]), b[1]) + 1e-7 * m.side(b[0]).std(0).mean()

    found = check.check(Workload(Heads(), regression(False), loss=loss))
    assert found.kind == COUPLED and found.error < 1e-6 and str(found.worst_tensor).startswith("side.")


def test_a_loss_that_writes_into_its_batch_is_judged_by_fresh_copies() -> None:
    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        b[0].mul_(2)
        return F.mse_loss(m(b[0]), b[1])

    sample = tuple(leaf.double() for leaf in regression(False))
    before = copy.deepcopy(sample)
    assert check.check(Workload(mlp().double(), sample, loss=loss)).kind == EXACT
    assert all(torch.equal(*pair) for pair in zip(sample, before, strict=True))


def test_what_a_mixture_of_experts_gets_wrong_shows_in_its_gate() -> None:
    """The balancing loss moves the whole gradient by less than a percent, and the router's by all of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.02,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    ids = torch.randint(3, 60, (8, 12))
    before = snapshot.take(model=model)
    count = lambda b: (b["labels"][:, 1:] != -100).sum()  # noqa: E731
    batch = {"input_ids": ids, "labels": ids.clone()}
    found = check.check(Workload(model, batch, loss=lambda m, b: m(**b).loss, count=count))
    assert found.kind == COUPLED and "gate" in str(found.worst_tensor)
    assert found.worst_tensor_error > 10 * found.error
    assert not before.differences()  # it adds hooks in its first forward


# --- where there is nothing to say


def test_nothing_is_claimed_where_nothing_can_be_tested() -> None:
    def message(loss: Callable[..., Any]) -> check.Verdict:
        found = check.check(Workload(mlp(), vectors(False), loss=loss))
        assert found.kind == "unknown" and found.words.startswith("unknown: ") and found.advice and not found.exact
        return found

    assert "zero or not finite" in message(lambda m, b: m(b[0]).sum() * 0).words
    assert "zero or not finite" in message(lambda m, b: m(b[0]).sum() * float("nan")).words
    assert "mat1 and mat2" in message(lambda m, b: m(b[0][:, :3]).sum()).words
    assert "multinomial" in message(lambda m, b: m(b[0])[torch.multinomial(torch.ones(len(b[0])), 2)].mean()).words


def test_with_too_few_parameters_least_squares_is_not_believed() -> None:
    model = nn.Linear(1, 1)
    batch = torch.linspace(-1, 2, 8)[:, None], torch.linspace(0, 1, 8)[:, None]
    found = check.check(Workload(model, batch, loss=lambda m, b: F.mse_loss(m(b[0]), b[1]).sqrt()))
    assert found.kind == "not exact" and "too few parameters" in found.words
    assert check.check(Workload(model, batch, loss=MSE.loss)).kind == EXACT


@pytest.mark.skipif(virtual.available() is not None, reason=str(virtual.available()))
def test_on_a_virtual_gpu_the_verdict_is_unknown() -> None:
    code = (
        "import torch; from autoaccum.exactness import check as exact; from autoaccum import Workload;"
        "m = torch.nn.Linear(4, 3).cuda();"
        "b = torch.ones(8, 4).cuda(), torch.zeros(8, dtype=torch.long).cuda();"
        "print(exact.check(Workload(m, b)).words)"
    )
    done = run_forked(code, gpu=virtual.VirtualGpu(memory_bytes=2**30))
    assert done.returncode == 0 and done.stdout == "unknown: a virtual GPU computes nothing\n", done.stderr


# --- the batches


def test_a_sample_of_one_row_is_not_repeated_but_varied() -> None:
    """Equal rows make every mean look exact: the parts would have one gradient."""
    one = tuple(leaf[:1] for leaf in classes(False))
    trial = easy(plain(Workload(mlp(), one)))
    assert trial.rows == 8 and trial.made_up == 7 and len(trial.batch[0].unique(dim=0)) == 8
    found = check.check(Workload(mlp(), tuple(leaf[:2] for leaf in regression(False)), loss=named("rmse").loss))
    assert found.kind == COUNT and found.samples == 8
    equal = (torch.ones(8, 6), torch.ones(8, 5))
    assert check.check(Workload(mlp(), equal, loss=named("rmse").loss)).kind == COUNT


@pytest.mark.parametrize("rows", range(2, 17))
def test_parts_are_uneven_and_bear_batch_statistics(rows: int) -> None:
    sizes = uneven(rows)
    assert sum(sizes) == rows and min(sizes) >= (2 if rows > 4 else 1) and (sizes[0] > sizes[1] or rows == 2)
    assert len(sizes) == (3 if rows >= 8 else 2)
    assert rows < 4 or min(uneven(rows, 2)) >= 2


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("name", ["count=", "ignore_index", "class weights", "sum", "dice", "rmse", "mse"])
def test_eight_samples_a_few_at_a_time_where_no_more_fit(name: str, rows: int) -> None:
    case, seen = named(name), queue.SimpleQueue[int]()

    def loss(m: nn.Module, b: Any) -> Any:
        seen.put(len(next(iter(b.values())) if isinstance(b, dict) else b[0]))
        assert case.loss is not None
        return case.loss(m, b)

    found = check.check(
        Workload(case.model(), case.sample(False), loss=loss, count=case.count), max_rows=rows, isolated=False
    )
    assert found.kind == case.kind and max(drained(seen)) <= rows
    assert found.samples == 8 if found.exact else 2 <= found.samples <= rows


def test_one_sample_at_a_time_tells_nothing() -> None:
    found = check.check(work(MSE), max_rows=1)
    assert found.kind == "unknown" and "2 samples at once" in found.words


def test_batch_statistics_are_reported_on_four_samples_and_not_on_three() -> None:
    norm = work(named("batchnorm"))
    assert check.check(norm, max_rows=4).module == "1 (BatchNorm1d)"
    assert "4 samples at once" in check.check(norm, max_rows=3).words


def test_the_hard_batch_is_hard_and_leaves_the_easy_one_alone() -> None:
    trial = easy(plain(Workload(mlp(), tokens(False))))
    before = copy.deepcopy(trial.batch)
    hard = harder(trial, HARDNESSES[0], {"batch['labels']": -100})
    assert hard.hardness == ("sorted classes", "unequal lengths", "ignored targets")
    kept = [(piece["labels"] != -100).sum() / size for piece, size in zip(hard.pieces(), hard.sizes, strict=True)]
    assert min(kept) / 8 > 0.1 and max(kept) > 1.2 * min(kept)
    assert (hard.batch["labels"] != -100).any(1).all()
    lengths = hard.batch["mask"].sum(1)
    assert lengths[0] == 8 and (lengths.diff() <= 0).all() and lengths[-1] <= 3
    assert all(torch.equal(trial.batch[name], before[name]) for name in before)


def test_modules_are_found_wherever_a_loss_holds_them() -> None:
    one, two, three = nn.CrossEntropyLoss(), nn.Linear(2, 2), nn.NLLLoss()

    class Holder:
        def __init__(self) -> None:
            self.criterion = one

        def loss(self, m: nn.Module, b: Any, head: nn.Module = two) -> Any:
            return three(head(b), b)

    assert set(modules_of(functools.partial(Holder().loss, b=1))) == {one, two, three}
    assert modules_of(one) == [one]


# --- in a plan, on the command line, and in the middle of training


def test_a_plan_says_whether_it_is_exact_and_what_to_type_next() -> None:
    case = named("class weights")
    plan = fit_plan(work(case, True), target_batch=64, budget="4GiB", verify=False, max_micro_batch=32)
    assert plan.exactness.startswith("not exact: the loss averages over the class weights of batch[1]")
    assert "Workload(..., count=" in plan.notes[-1] and plan.exactness in plan.explain()
    mended = check.with_verdict(base_plan(), check.check(work(named("count="))))
    assert mended.exactness == "exact (tested on 12 samples)"


def test_a_plan_of_one_micro_batch_is_exact_whatever_the_loss() -> None:
    plan = changed_plan(base_plan(), accumulation_steps=1)
    message = check.with_verdict(plan, check.check(work(named("infonce"))))
    assert "one micro-batch is the whole batch" in " ".join(message.notes)
    assert "one micro-batch" not in " ".join(check.with_verdict(plan, check.check(work(MSE))).notes)


def test_an_unchecked_plan_says_so() -> None:
    plan = fit_plan(work(MSE), target_batch=8, budget="4GiB", verify=False, check=False)
    assert plan.exactness == "unchecked"


WORKLOADS = """
import torch
from autoaccum import Workload

def workload():
    return Workload(torch.nn.Linear(6, 5), (torch.randn(8, 6), torch.randint(5, (8,))))

def wrong():
    x, y = workload().sample
    y[:2] = -100
    return Workload(torch.nn.Linear(6, 5), (x, y), loss=lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
"""


def test_the_command_prints_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the task in this process; the next test starts one."""

    def call(task: str, arguments: dict[str, Any], *, on_message: Any, **how: Any) -> dict[str, Any]:
        assert task == "cli.tasks:check"
        return tasks.check(say=on_message, **arguments)

    (tmp_path / "mine.py").write_text(WORKLOADS)
    monkeypatch.setattr("autoaccum.processes.child.call", call)
    result = CliRunner().invoke(app, ["check", "--workload", f"{tmp_path / 'mine.py'}:workload"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "exact (tested on 8 samples)"


def test_the_command_prints_what_to_type_next(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WORKLOADS)
    command = [sys.executable, "-m", "autoaccum", "check", "--workload", "mine.py:wrong", "--json"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 1, out.stderr
    found = json.loads(out.stdout)
    assert found["kind"] == COUNT and not found["exact"]
    assert found["advice"][-1] == "Workload(..., count=lambda batch: (batch[1] != -100).sum())"


def window(ignored: bool) -> tuple[list[Any], list[int]]:
    batch, sizes = tokens(False), [6, 6]
    if ignored:
        batch["labels"][:5, 1:] = -100
    return list(cut(batch, sizes)), sizes


def test_a_real_window_whose_counts_differ_is_tested_again() -> None:
    case = named("ignore_index")
    context = step.open_context(work(case, optimizer=Capture))
    before = snapshot.take(model=context.model)
    assert not counts_differ(*window(False)) and recheck(context, *window(False)) is None
    assert counts_differ(*window(True))
    message = recheck(context, *window(True))
    assert message is not None and "not that of one batch" in message and "on 3 of its samples" in message
    counted = step.open_context(work(named("count="), optimizer=Capture))
    assert recheck(counted, *window(True)) is None
    assert not before.differences()


def test_testing_again_takes_views_of_the_parameters_and_at_most_half_a_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, seen = named("ignore_index"), queue.SimpleQueue[Any]()
    context = step.open_context(work(case, optimizer=Capture))
    own = {p.data_ptr() for p in context.model.parameters()}

    def loss(m: nn.Module, b: Any) -> Any:
        seen.put((len(b["ids"]), {p.data_ptr() for p in m.parameters()}))
        return case.loss(m, b)  # type: ignore[misc]

    assert recheck(replace(context, loss=loss), *window(True)) is not None
    assert all(rows <= 3 and addresses == own for rows, addresses in drained(seen))
