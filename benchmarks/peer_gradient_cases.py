"""The cases in which gradient accumulation is known to fail, as data.

Each has a model, samples in order, a micro-batch and accumulation steps; a loss of the model's outputs, as somebody
would write it for one whole batch; and where that averages over something that differs between micro-batches, the same
as `(sum, count)`. A window's gradient is held against one whole batch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
CLASSES, VOCABULARY = 5, 32
Batch = dict[str, Tensor]
LossOf = Callable[[Any, Tensor], Any]


@dataclass(frozen=True)
class Case:
    """One row of the comparison.

    Attributes:
        title: The case, in words.
        make: Makes the model, the same each time.
        samples: In the order in which they are trained.
        micro_batch: Samples in a micro-batch.
        steps: Micro-batches in a window.
        loss: Of the model's outputs and the labels; None: the model's own, a Hugging Face model's `.loss`.
        counted: The same as (sum, count), where that is another thing than a mean over samples.
        counts_labels: Whether that count is the number of labels that aren't ignored, and the model gives what the sum
            needs without being given labels.
        summed: Whether the loss is a sum over samples, so that micro-batches' gradients only have to be added.
        clip: The norm that gradients are clipped to, once per window.
        encodes: Whether the loss compares samples with one another, so that autoaccum's `encode=` is for it.
        of_micro_batches: Whether the gradient is held against the micro-batches' own, added up in double precision,
            since the whole batch's has another rounding.
        cut_inside: Whether the loader gives whole windows, and the training cuts them: who can't, isn't asked.
    """

    title: str
    make: Callable[[], nn.Module]
    samples: Sequence[Batch]
    micro_batch: int
    steps: int
    loss: LossOf | None
    counted: LossOf | None = None
    counts_labels: bool = False
    summed: bool = False
    clip: float | None = None
    encodes: bool = False
    of_micro_batches: bool = False
    cut_inside: bool = False

    @property
    def windows(self) -> list[Sequence[Batch]]:
        """The samples of each optimizer step."""
        size = self.micro_batch * self.steps
        return [self.samples[start : start + size] for start in range(0, len(self.samples), size)]


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack samples and cut them to the longest row's length.

    Samples come padded.
    """
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    if "length" in batch:
        longest = int(batch.pop("length").max())
        batch = {key: value[:, :longest] for key, value in batch.items()}
    return batch


def loss_of(case: Case, model: nn.Module, batch: Batch) -> Tensor:
    """Compute the loss as written for a whole batch."""
    outputs = outputs_of(model, batch)
    loss: Tensor = outputs.loss if case.loss is None else case.loss(outputs, batch["labels"])
    return loss


def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output: a tensor, or a Hugging Face output."""
    return model(batch["x"]) if "x" in batch else model(**batch)


def whole_gradients(case: Case) -> list[Tensor]:
    """Return each window's whole-batch gradient, flat, by plain autograd."""
    return [_of_parts(case, window) if case.of_micro_batches else _of_batch(case, window) for window in case.windows]


def _of_batch(case: Case, samples: Sequence[Batch]) -> Tensor:
    model = case.make().train()
    loss_of(case, model, collate(samples)).backward()
    if case.clip:
        nn.utils.clip_grad_norm_(model.parameters(), case.clip)
    return flat([p.grad for p in model.parameters()])


def _of_parts(case: Case, samples: Sequence[Batch]) -> Tensor:
    starts = range(0, len(samples), case.micro_batch)
    parts = [_of_batch(case, samples[start : start + case.micro_batch]) for start in starts]
    return torch.stack(parts).mean(0)


def flat(gradients: Sequence[Tensor | None]) -> Tensor:
    """One vector in double precision."""
    return torch.cat([g.detach().flatten().double() for g in gradients if g is not None])


# -- models and data


class Tagger(nn.Module):
    """Classify every token (B, T) by the mean of its sample's tokens.

    Padding (0) is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B * T, classes)."""
        mask = (x > 0).to(self.out.weight.dtype)[..., None]
        h = torch.tanh(self.inner(self.embed(x)))
        return self.out(h + (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).flatten(0, 1)


class FrozenBatchNorm(nn.BatchNorm1d):
    """A batch norm that stays in evaluation mode after `train()`."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode."""
        return super().train(False)


class Mlp(nn.Module):
    """Logits (B, classes) of features (B, 6)."""

    def __init__(self, norm: str = "", width: int = 64) -> None:
        super().__init__()
        middle = {"": nn.Identity, "batch": nn.BatchNorm1d, "frozen": FrozenBatchNorm}[norm](width)
        self.layers = nn.Sequential(nn.Linear(6, width), middle, nn.Tanh(), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layers(x)
        return logits


def _seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


def _rows(n: int, dtype: torch.dtype = torch.float64, *, sort: bool = False) -> list[Batch]:
    """Make samples that differ much, so that a wrong weight shows."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64) * torch.linspace(0.2, 3, n)[:, None]
    labels = torch.randint(CLASSES, (n,), generator=g)
    labels = labels.sort().values if sort else labels
    return [{"x": row, "labels": label} for row, label in zip(x.to(dtype), labels, strict=True)]


def _sentences(lengths: Sequence[int], each: int = 2, ignore: Sequence[int] = ()) -> list[Batch]:
    """Make samples of each length; ignore all labels of some micro-batches."""
    g, longest, samples = torch.Generator().manual_seed(2), max(lengths), []
    for index, length in enumerate(lengths):
        for _ in range(each):
            labels = (torch.randint(3, (longest,), generator=g) + index // 2) % CLASSES
            ids = torch.randint(1, 11, (longest,), generator=g)
            ids[length:], labels[length:] = 0, IGNORED
            if index in ignore:
                labels[:] = IGNORED
            samples.append({"x": ids, "labels": labels, "length": torch.tensor(length)})
    return samples


def _texts(lengths: Sequence[int] = (12, 12, 11, 9, 6, 4, 3, 2)) -> list[Batch]:
    """For Hugging Face models: padded on the right, the padding ignored."""
    g, longest = torch.Generator().manual_seed(3), max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), longest), generator=g)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, IGNORED)
    each = zip(ids, mask.long(), labels, strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": label} for i, m, label in each]


def _hugging_face(name: str) -> nn.Module:
    """Tiny models from configurations, without dropout."""
    import transformers

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    if name == "GPT-2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return transformers.GPT2LMHeadModel(config)
    if name == "BERT":
        return transformers.BertForMaskedLM(transformers.BertConfig(**small, intermediate_size=32, **off))
    if name == "T5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
        return transformers.T5ForConditionalGeneration(config)
    llama = {**small, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
    if name == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    config = transformers.MixtralConfig(**llama, **experts, router_aux_loss_coef=0.02)
    return transformers.MixtralForCausalLM(config)


# -- losses


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)


def _token_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def _text_sum(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_sum(outputs.logits.flatten(0, 1), labels)


def _next_token_sum(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_sum(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:])


def _row_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, reduction="sum"), (labels != IGNORED).sum()


_WEIGHTS = torch.linspace(0.1, 10, CLASSES, dtype=torch.float64)


def _weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, _WEIGHTS)


def _weighted_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, labels, _WEIGHTS, reduction="sum"), _WEIGHTS[labels].sum()


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def _contrastive(outputs: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE: a sample's outputs in halves are its two views."""
    one, other = (F.normalize(half, dim=1) for half in outputs[:, :4].chunk(2, dim=1))
    return F.cross_entropy(one @ other.T * 10, torch.arange(len(one)))


def _mean_output(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.float().mean()


_F = functools.partial
_mlp64 = _F(_seeded, Mlp)
_tagger = _F(_seeded, Tagger)
_linear16 = _F(_seeded, _F(nn.Linear, 6, 1, bias=False), torch.bfloat16)
_positive = [row | {"x": row["x"].abs() + 1} for row in _rows(512, torch.bfloat16)]
_rows_counted = {"loss": F.cross_entropy, "counted": _row_sum, "counts_labels": True}
_counted = {"loss": _token_loss, "counted": _token_sum, "counts_labels": True}

CASES = [
    Case("even micro-batches, a mean loss", _mlp64, _rows(32), 8, 4, F.cross_entropy),
    Case("ragged: 8, 8, 8, 4, 2, 1, 1, 1 tokens", _tagger, _sentences((8, 8, 8, 4, 2, 1, 1, 1)), 2, 8, **_counted),
    Case("half of one micro-batch's labels ignored", _tagger, _sentences((8,) * 4, 2, ignore=(3,)), 4, 2, **_counted),
    Case("one micro-batch has all its labels ignored", _tagger, _sentences((8,) * 4, ignore=(2,)), 2, 4, **_counted),
    Case("class weights, classes sorted", _mlp64, _rows(32, sort=True), 8, 4, _weighted_loss, counted=_weighted_sum),
    Case("last micro-batch of 1 in 33", _mlp64, _rows(33), 8, 5, **_rows_counted),
    Case("last window of 1 micro-batch in 4", _mlp64, _rows(40), 8, 4, **_rows_counted),
    Case("batches of the loader cut in 4 in the loop", _mlp64, _rows(32), 8, 4, F.cross_entropy, cut_inside=True),
    Case("a summed loss", _mlp64, _rows(32), 8, 4, _summed_loss, summed=True),
    Case("clipped to a norm of 0.1, once per window", _mlp64, _rows(32), 8, 4, F.cross_entropy, clip=0.1),
    Case("BatchNorm in training mode", _F(_seeded, _F(Mlp, norm="batch")), _rows(32), 8, 4, F.cross_entropy),
    Case("BatchNorm that is frozen", _F(_seeded, _F(Mlp, norm="frozen")), _rows(32), 8, 4, F.cross_entropy),
    Case("InfoNCE", _mlp64, _rows(32), 8, 4, _contrastive, encodes=True),
    Case(
        "bf16 parameters, 512 gradients of one sign", _linear16, _positive, 1, 512, _mean_output,
        of_micro_batches=True,
    ),
    Case(
        "bf16 parameters, 64 micro-batches", _F(_seeded, Mlp, torch.bfloat16), _rows(64, torch.bfloat16), 1, 64,
        F.cross_entropy, of_micro_batches=True,
    ),
    Case("GPT-2 of transformers, ragged", _F(_hugging_face, "GPT-2"), _texts(), 2, 4, None, _next_token_sum),
    Case("Llama of transformers, ragged", _F(_hugging_face, "Llama"), _texts(), 2, 4, None, _next_token_sum),
    Case("BERT of transformers, ragged", _F(_hugging_face, "BERT"), _texts(), 2, 4, None, _text_sum, True),
    Case("T5 of transformers, ragged", _F(_hugging_face, "T5"), _texts(), 2, 4, None, _text_sum),
    Case("Mixtral of transformers, ragged, auxiliary loss", _F(_hugging_face, "Mixtral"), _texts(), 2, 4, None),
]  # fmt: skip
