"""Losses to judge: each with the verdict that is right, on an easy sample and on a hard one.

The easy sample has nothing that tells: equal lengths, equal weights, no ignored class. The hard one has what data has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

EXACT, CHANCE, SUM, COUNT = "exact", "same distribution", "sum", "wrong denominator"
TERM, COUPLED = "additive term", "not decomposable"
ROWS, WIDE, CLASSES, LONG = 12, 6, 5, 8
IGNORED = -100
WEIGHTS = torch.linspace(0.1, 10, CLASSES)


@dataclass(frozen=True)
class Case:
    """A loss, what it is given, and the verdict."""

    name: str
    kind: str
    loss: Callable[[nn.Module, Any], Any] | None
    sample: Callable[[bool], Any]
    model: Callable[[], nn.Module]
    count: Callable[[Any], Any] | None = None
    module: str | None = None  # part of the name of the module that has to be named
    advice: str | None = None  # what the advice has to say
    easy: str | None = None  # the verdict on the easy sample, where it is another one


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 16), *extra, nn.Tanh(), nn.Linear(16, CLASSES))


def vectors(hard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and one class each; hard: sorted, a third ignored, inputs of unlike size."""
    x = torch.randn(ROWS, WIDE, generator=generator())
    y = torch.arange(ROWS) % CLASSES
    if hard:
        x, y = x * torch.linspace(0.3, 3, ROWS)[:, None], y.sort().values
        y[1:5] = IGNORED
    return x, y


def classes(hard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vectors`, with all classes kept: for losses that have none to ignore."""
    x, y = vectors(hard)
    return x, (torch.arange(ROWS) % CLASSES).sort().values if hard else y


def pairs_of(hard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of which each comes several times: for losses that look for partners."""
    x, _ = vectors(hard)
    return x, (torch.arange(ROWS) % 2).sort().values if hard else torch.arange(ROWS) % 2


def regression(hard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = vectors(hard)
    return x, x[:, :CLASSES].sin() + (torch.randn(ROWS, 1, generator=generator(1)) if hard else 0)


def masks(hard: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = vectors(hard)
    return x, (torch.rand(ROWS, CLASSES, generator=generator(2)) < 0.4).float()


def weighted(hard: bool) -> dict[str, torch.Tensor]:
    """Inputs, classes and a weight for each sample."""
    x, y = classes(hard)
    return {"x": x, "y": y, "w": torch.linspace(0.1, 2, ROWS) if hard else torch.ones(ROWS)}


class Tagger(nn.Module):
    """Classes for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(self.embedding(ids))))


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tagger()


def tokens(hard: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 11, (ROWS, LONG), generator=generator())
    labels = torch.randint(CLASSES, (ROWS, LONG), generator=generator(1))
    mask = torch.ones(ROWS, LONG, dtype=torch.long)
    if hard:
        behind = torch.arange(LONG)[None] >= torch.tensor([8, 8, 8, 4, 2, 1] * 2).sort(descending=True).values[:, None]
        labels[behind], mask[behind], ids[behind] = IGNORED, 0, 0
    return {"ids": ids, "labels": labels, "mask": mask}


def padding(hard: bool) -> dict[str, torch.Tensor]:
    """The same with a mask that marks what is padded, as torch's attention takes it."""
    batch = tokens(hard)
    return {"ids": batch["ids"], "goal": batch["labels"].clamp(min=0).float(), "padding_mask": batch["mask"] == 0}


def token_ce(m: nn.Module, b: Any, **how: Any) -> torch.Tensor:
    return F.cross_entropy(m(b["ids"]).flatten(0, 1), b["labels"].flatten(), **how)


def token_count(b: Any) -> torch.Tensor:
    return (b["labels"] != IGNORED).sum()


def kept(y: torch.Tensor) -> torch.Tensor:
    return y[y != IGNORED]


# --- losses


def ctc(m: nn.Module, b: Any) -> torch.Tensor:
    log_probs = m(b["ids"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, b["target"], b["input_lengths"], b["target_lengths"], zero_infinity=True)


def ctc_batch(hard: bool) -> dict[str, torch.Tensor]:
    target = torch.randint(1, CLASSES, (ROWS, 3), generator=generator(3))
    lengths = torch.tensor([LONG, 7, 6, 5] * 3) if hard else torch.full((ROWS,), LONG)
    short = torch.tensor([3, 2, 1] * 4) if hard else torch.full((ROWS,), 3)
    ids = torch.randint(1, 11, (ROWS, LONG), generator=generator())
    return {"ids": ids, "target": target, "input_lengths": lengths, "target_lengths": short}


class Experts(nn.Module):
    """A router and two experts; keeps the share of each for the balancing loss."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDE, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDE, CLASSES) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shares = self.router(x).softmax(-1)
        return sum(self.shares[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


def experts() -> nn.Module:
    torch.manual_seed(0)
    return Experts()


def moe(m: nn.Module, b: Any) -> torch.Tensor:
    main = F.mse_loss(m(b[0]), b[1])
    hard = F.one_hot(m.shares.argmax(-1), 2).to(m.shares.dtype).mean(0)
    return main + 0.02 * 2 * (hard * m.shares.mean(0)).sum()


def auc(m: nn.Module, b: Any) -> torch.Tensor:
    score, positive = m(b[0])[:, 0], b[1] == 1
    return torch.sigmoid(score[~positive][None] - score[positive][:, None]).mean()


def correlation(m: nn.Module, b: Any) -> torch.Tensor:
    return -torch.corrcoef(torch.stack([m(b[0])[:, 0], b[0][:, 0]]))[0, 1]


def barlow(m: nn.Module, b: Any) -> torch.Tensor:
    one, two = (m(x) for x in (b[0], b[0].flip(1)))
    one, two = ((z - z.mean(0)) / z.std(0) for z in (one, two))
    cross = one.T @ two / len(one)
    return ((cross - torch.eye(CLASSES).to(cross)) ** 2).sum()


def infonce(m: nn.Module, b: Any) -> torch.Tensor:
    one, two = (F.normalize(m(x), dim=-1) for x in (b[0], b[0] + 0.1))
    return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))


def dice(m: nn.Module, b: Any) -> torch.Tensor:
    p = m(b[0]).sigmoid()
    return 1 - (2 * (p * b[1]).sum() + 1) / (p.sum() + b[1].sum() + 1)


def batch_hard(m: nn.Module, b: Any) -> torch.Tensor:
    z, y = m(b[0]), b[1]
    far, same = torch.cdist(z, z), y[:, None] == y[None]
    hardest = (far * same).max(1).values
    nearest = far.masked_fill(same, 1e3).min(1).values
    return F.relu(hardest - nearest.clamp(max=10) + 5).mean()


def supcon(m: nn.Module, b: Any) -> torch.Tensor:
    z, y = F.normalize(m(b[0]), dim=-1), b[1]
    off = ~torch.eye(len(z), dtype=torch.bool)
    same = (y[:, None] == y[None]) & off
    log = (z @ z.T / 0.1).masked_fill(~off, -1e4).log_softmax(-1)
    return -((log * same).sum(1) / same.sum(1).clamp(min=1)).mean()


def vicreg(m: nn.Module, b: Any) -> torch.Tensor:
    return F.mse_loss(m(b[0]), b[1]) + F.relu(3 - m(b[0]).std(0)).mean()


def penalty(m: nn.Module) -> torch.Tensor:
    return 0.1 * sum((p**2).sum() for p in m.parameters())


def vae(m: nn.Module, b: Any) -> torch.Tensor:
    mean = m(b[0])
    return F.mse_loss(mean + torch.randn_like(mean), b[1])


def focal(m: nn.Module, b: Any) -> torch.Tensor:
    log = m(b[0]).log_softmax(-1).gather(1, b[1][:, None])
    return -((1 - log.exp()) ** 2 * log).mean()


class Centred(nn.Module):
    """Takes the batch's mean away: a batch statistic that no class name tells of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def frozen() -> nn.Module:
    """BatchNorm with frozen statistics: Module.train() is called on the whole model only if it isn't in it already."""
    model = mlp(nn.BatchNorm1d(16))
    model[1].eval()
    return model


CE, NLL = nn.CrossEntropyLoss(), nn.NLLLoss()
SMOOTH = {"weight": WEIGHTS, "label_smoothing": 0.1, "reduction": "sum"}

CASES = [
    # the fifteen, and BatchNorm
    Case("cross-entropy by default", EXACT, None, vectors, mlp),
    Case("mse", EXACT, lambda m, b: F.mse_loss(m(b[0]), b[1]), regression, mlp),
    Case("ctc", EXACT, ctc, ctc_batch, tagger),
    Case("class weights", COUNT, lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=WEIGHTS.to(b[0])), vectors, mlp,
         advice="count=lambda batch: class_weights[batch[1][batch[1] != -100]].sum()"),
    Case("ignore_index", COUNT, token_ce, tokens, tagger, advice="count=lambda batch: (batch['labels'] != -100).sum()"),
    Case("rmse", COUNT, lambda m, b: F.mse_loss(m(b[0]), b[1]).sqrt(), regression, mlp, advice="a root"),
    Case("mixture of experts", COUPLED, moe, regression, experts),
    Case("auc", COUPLED, auc, pairs_of, mlp),
    Case("correlation", COUPLED, correlation, vectors, mlp),
    Case("barlow twins", COUPLED, barlow, vectors, mlp),
    Case("infonce", COUPLED, infonce, vectors, mlp, advice="encode="),
    Case("sum", SUM, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum"), vectors, mlp, advice="(sum, count)"),
    Case("dice", COUPLED, dice, masks, mlp),
    Case("batch-hard", COUPLED, batch_hard, pairs_of, mlp),
    Case("supcon", COUPLED, supcon, pairs_of, mlp),
    Case("batchnorm", COUPLED, None, vectors, lambda: mlp(nn.BatchNorm1d(16)), module="1 (BatchNorm1d)",
         advice="batchnorm='frozen'"),
    # and more
    Case("cross-entropy, user's", COUNT, lambda m, b: F.cross_entropy(m(b[0]), b[1]), vectors, mlp,
         advice="count=lambda batch: (batch[1] != -100).sum()", easy=EXACT),
    Case("CrossEntropyLoss in a closure", COUNT, lambda m, b: CE(m(b[0]), b[1]), vectors, mlp, easy=EXACT),
    Case("NLLLoss in a closure", COUNT, lambda m, b: NLL(m(b[0]).log_softmax(-1), b[1]), vectors, mlp, easy=EXACT),
    Case("sum and count", EXACT, lambda m, b: (token_ce(m, b, reduction="sum"), token_count(b)), tokens, tagger),
    Case("count=", EXACT, token_ce, tokens, tagger, count=token_count),
    Case("count= of samples", COUNT, token_ce, tokens, tagger, count=lambda b: len(b["labels"]),
         advice="weighted by what count= gives"),
    Case("shifted labels", COUNT,
         lambda m, b: F.cross_entropy(m(b["ids"])[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten()), tokens, tagger,
         advice="count=lambda batch: (batch['labels'][:, 1:] != -100).sum()"),
    Case("masked mean", COUNT, lambda m, b: ((m(b["ids"]) ** 2).mean(-1) * b["mask"]).sum() / b["mask"].sum(), tokens,
         tagger, advice="count=lambda batch: batch['mask'].sum()"),
    Case("mean over what is not padded", COUNT,
         lambda m, b: ((m(b["ids"])[..., 0] - b["goal"]) ** 2)[~b["padding_mask"]].mean(), padding, tagger,
         advice="count=lambda batch: (batch['padding_mask'] == 0).sum()"),
    Case("sample weights", COUNT,
         lambda m, b: (F.cross_entropy(m(b["x"]), b["y"], reduction="none") * b["w"]).sum() / b["w"].sum(), weighted,
         mlp, advice="count=lambda batch: batch['w'].sum()"),
    Case("sample weights, mean", EXACT, lambda m, b: ((m(b["x"]) ** 2).mean(-1) * b["w"]).mean(), weighted, mlp),
    Case("binary cross-entropy", EXACT, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), masks, mlp),
    Case("binary cross-entropy of probabilities", EXACT, lambda m, b: F.binary_cross_entropy(m(b[0]).sigmoid(), b[1]),
         masks, mlp),
    Case("huber", EXACT, lambda m, b: F.huber_loss(m(b[0]), b[1]), regression, mlp),
    Case("focal", EXACT, focal, classes, mlp),
    Case("kl, batchmean", EXACT,
         lambda m, b: F.kl_div(m(b[0]).log_softmax(-1), b[1].softmax(-1), reduction="batchmean"), regression, mlp),
    Case("probabilities as targets, class weights", EXACT,
         lambda m, b: F.cross_entropy(m(b[0]), b[1].softmax(-1), weight=WEIGHTS.to(b[0])), regression, mlp),
    Case("label smoothing, class weights, counted", EXACT,
         lambda m, b: (F.cross_entropy(m(b[0]), b[1], **SMOOTH), WEIGHTS[kept(b[1])].sum()), vectors, mlp),
    Case("mean in place of the sum", COUNT, lambda m, b: (token_ce(m, b), token_count(b)), tokens, tagger,
         advice="reduction='sum'"),
    Case("logarithm of a mean", COUNT, lambda m, b: F.mse_loss(m(b[0]), b[1]).log(), regression, mlp),
    Case("weight penalty on a mean", EXACT, lambda m, b: F.mse_loss(m(b[0]), b[1]) + penalty(m), regression, mlp),
    Case("weight penalty in a sum", TERM,
         lambda m, b: (F.mse_loss(m(b[0]), b[1], reduction="sum") + penalty(m), b[1].numel()), regression, mlp,
         advice="LossTerms(sum, count, extra=term)"),
    Case("vicreg", COUPLED, vicreg, regression, mlp),
    Case("centred batch", COUPLED, lambda m, b: F.mse_loss(m(b[0]), b[1]), regression, lambda: mlp(Centred()),
         module="1 (Centred)"),
    Case("layernorm", EXACT, lambda m, b: F.mse_loss(m(b[0]), b[1]), regression, lambda: mlp(nn.LayerNorm(16))),
    Case("groupnorm", EXACT, lambda m, b: F.mse_loss(m(b[0]), b[1]), regression, lambda: mlp(nn.GroupNorm(4, 16))),
    Case("frozen batchnorm", EXACT, lambda m, b: F.mse_loss(m(b[0]), b[1]), regression, frozen),
    Case("dropout", CHANCE, None, vectors, lambda: mlp(nn.Dropout(0.3))),
    Case("noise", CHANCE, vae, regression, mlp),
]  # fmt: skip
