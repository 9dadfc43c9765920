"""Hugging Face models' own losses: the gradient of the whole batch, whatever each of them averages over."""

from __future__ import annotations

import copy
import functools
from typing import Any

import helpers_train
import pytest
import torch
import torch.nn.functional as F
from helpers_train import FP32, IGNORED, NAIVE, Capture, cut, gradients, mean_of, one_thread  # noqa: F401
from torch import nn

from autoaccum import Workload
from autoaccum.window.hugging_face import Denominator
from autoaccum.window.loss_form import LossKind
from autoaccum.window.step import open_context, train_window

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 32, 12
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@functools.cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    llama = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    elif name.startswith("mixtral"):
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": "auxiliary" in name}
        config = transformers.MixtralConfig(**llama, **experts, router_aux_loss_coef=0.5)
        model = transformers.MixtralForCausalLM(config)
    elif name == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))
    elif name in ("bert", "bert classes", "bert tokens"):
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**SMALL, intermediate_size=32, **off, num_labels=5)
        kind = {"bert": "MaskedLM", "bert classes": "SequenceClassification", "bert tokens": "TokenClassification"}
        model = getattr(transformers, f"BertFor{kind[name]}")(config)
    else:
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config)
    return model.train()


def ragged(name: str, samples: int = 16) -> dict[str, torch.Tensor]:
    """Lengths from 12 down to 2, so that the last micro-batches have few labels; the rest is padding, ignored."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (samples, LENGTH), generator=g)
    lengths = torch.linspace(LENGTH, 2, samples).int()
    mask = torch.arange(LENGTH)[None] < lengths[:, None]
    labels = torch.randint(5, (samples, LENGTH), generator=g) if name == "bert tokens" else ids
    labels = labels.masked_fill(~mask, IGNORED)
    if name == "bert classes":
        labels = torch.arange(samples) % 5
        labels[: samples // 2 : 2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def whole_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    return model(**batch).loss


def window_of(model: nn.Module, batch: Any, sizes: tuple[int, ...]) -> tuple[Any, Any]:
    context = open_context(Workload(model, batch, optimizer=Capture))
    context.optimizer = FilledCapture(list(model.parameters()))
    result = train_window(context, list(cut(batch, sizes)), sizes)
    return context, result


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """As the shared one, without tensors whose gradient is rounding alone: a bias of attention's keys has none."""
    whole = torch.cat([g.flatten() for g in want]).norm()
    kept = [index for index, g in enumerate(want) if g.norm() > 1e-5 * whole]
    assert len(kept) > len(want) / 2 and len(got) == len(want)
    return helpers_train.distance([got[i] for i in kept], [want[i] for i in kept])


class FilledCapture(Capture):
    """Keeps only the gradients that there are: some models have unused parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append([p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None])


MODELS = {
    "llama": Denominator(shifted=True, passed=True),
    "gpt2": Denominator(shifted=True, passed=True),
    "mixtral": Denominator(shifted=True, passed=True),
    "bert": Denominator(shifted=False, passed=False),
    "bert tokens": Denominator(shifted=False, passed=False),
    "bert classes": Denominator(shifted=False, passed=False),
    "t5": Denominator(shifted=False, passed=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_ragged_labels_give_the_gradient_of_the_whole_batch(name: str) -> None:
    model, batch, sizes = made(name), ragged(name), (5, 5, 4, 2)
    want = gradients(model, whole_loss, batch)
    context, result = window_of(copy.deepcopy(model), batch, sizes)
    assert distance(context.optimizer.seen[-1], want) <= FP32
    assert float(result.loss) == pytest.approx(float(whole_loss(model, batch).detach()), rel=1e-5)
    assert context.loss_form.denominator == MODELS[name]
    naive = mean_of([gradients(model, whole_loss, piece) for piece in cut(batch, sizes)], [s / 16 for s in sizes])
    assert distance(naive, want) > NAIVE


class Divides(nn.Module):
    """Divides by `num_items_in_batch` as transformers' models do, in its own type; notes what it was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY, dtype=dtype)
        self.given: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> dict[str, Any]:
        logits = self.table(input_ids)[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        if num_items_in_batch is None:
            return {"loss": F.cross_entropy(logits, targets)}
        self.given.append(num_items_in_batch)
        return {"loss": F.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, FP32)])
def test_a_part_of_the_count_is_not_rounded_to_fp32(dtype: torch.dtype, bound: float) -> None:
    batch, sizes = {key: value for key, value in ragged("own").items() if key != "attention_mask"}, (5, 5, 4, 2)
    torch.manual_seed(0)
    model = Divides(dtype)
    want = gradients(model, lambda model, batch: model(**batch)["loss"], batch)
    context, result = window_of(copy.deepcopy(model), batch, sizes)
    assert context.loss_form.passes_count
    assert distance(context.optimizer.seen[-1], want) <= bound and result.loss.dtype is dtype
    assert [each.dtype for each in context.model.given[-4:]] == [dtype] * 4


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_micro_batch_whose_labels_are_all_ignored_adds_nothing(name: str) -> None:
    model, batch = made(name), ragged(name)
    batch["labels"][:4] = IGNORED  # the first, which the model can't be asked with
    want = gradients(model, whole_loss, batch)
    context, result = window_of(copy.deepcopy(model), batch, (4,) * 4)
    assert bool(result.loss.isfinite())
    assert distance(context.optimizer.seen[-1], want) <= FP32


@pytest.mark.parametrize("sizes", [(16,), (8, 8)], ids=["k = 1", "k = 2"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_window_whose_labels_are_all_ignored_takes_no_step(name: str, sizes: tuple[int, ...]) -> None:
    model, batch = copy.deepcopy(made(name)), ragged(name)
    empty = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    context = open_context(Workload(model, batch))
    for asked in (False, True):
        before = copy.deepcopy(model.state_dict())
        assert not train_window(context, list(cut(empty, sizes)), sizes).stepped
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert (context.loss_form is not None) == asked
        assert train_window(context, list(cut(batch, sizes)), sizes).stepped


def test_a_mixture_of_experts_auxiliary_loss_counts_once() -> None:
    def auxiliary(model: Any, batch: Any) -> Any:
        return 0.5 * model(**batch).aux_loss

    model, batch, sizes = made("mixtral with auxiliary loss"), ragged("mixtral"), (5, 5, 4, 2)
    pieces = list(cut(batch, sizes))
    main = gradients(model, lambda m, b: m(**b).loss - auxiliary(m, b), batch)
    routed = [gradients(model, auxiliary, piece) for piece in pieces]
    names = [name for name, _ in model.named_parameters()]
    reached = {name for name, p in _with_gradients(model, auxiliary, pieces[0])}
    padded = [_padded(names, reached, each, model) for each in routed]
    want = mean_of([main, *padded], [1, *(size / 16 for size in sizes)])
    context, _ = window_of(copy.deepcopy(model), batch, sizes)
    assert distance(context.optimizer.seen[-1], want) <= FP32
    gates = [index for index, name in enumerate(names) if "gate.weight" in name and "mlp" in name]
    wrong = mean_of([main, *padded], [1.0] * 5)  # the usual mistake: once per micro-batch
    assert gates and distance([wrong[i] for i in gates], [want[i] for i in gates]) > 1


def _with_gradients(model: nn.Module, loss: Any, batch: Any) -> list[tuple[str, torch.Tensor]]:
    twin = copy.deepcopy(model)
    loss(twin, batch).backward()
    return [(name, p) for name, p in twin.named_parameters() if p.grad is not None]


def _padded(names: list[str], reached: set[str], found: list[torch.Tensor], model: nn.Module) -> list[torch.Tensor]:
    rest, shapes = iter(found), dict(model.named_parameters())
    return [next(rest) if name in reached else torch.zeros_like(shapes[name]) for name in names]


def test_dropout_does_not_keep_a_model_from_answering() -> None:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, embd_pdrop=0.5, resid_pdrop=0.5)
    model, batch = transformers.GPT2LMHeadModel(config).train(), ragged("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)  # as it is made, all its answers are nearly alike
        losses = [float(model(**batch).loss) for _ in range(4)]
    assert max(losses) > 1.01 * min(losses)
    context, _ = window_of(model, batch, (8, 8))
    assert context.loss_form.denominator == MODELS["gpt2"]


def test_regression_is_weighted_by_samples() -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=32, num_labels=1, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)  # fmt: skip
    model = transformers.BertForSequenceClassification(config).train()
    batch = {**ragged("bert"), "labels": torch.linspace(-1, 2, 16)}
    want = gradients(model, whole_loss, batch)
    context, _ = window_of(copy.deepcopy(model), batch, (10, 6))
    assert context.loss_form.kind is LossKind.SAMPLES
    assert distance(context.optimizer.seen[-1], want) <= FP32


class Odd(nn.Module):
    """Its loss is no mean over its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, labels) ** 2, "logits": logits}


def test_a_loss_of_its_own_kind_is_asked_once_and_weighted_by_samples() -> None:
    torch.manual_seed(0)
    model, batch = Odd().double(), {"x": torch.randn(8, 6).double(), "labels": torch.arange(8) % 5}
    context, _ = window_of(model, batch, (4, 4))
    assert context.loss_form.kind is LossKind.UNKNOWN and context.loss_form.count is None
