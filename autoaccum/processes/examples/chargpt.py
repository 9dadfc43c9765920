"""A small character GPT on the English text of Python's `help()`."""

from __future__ import annotations

from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ...workload import Workload

# Shapes: B samples, T characters, C channels, H heads, V characters in the alphabet.
CONTEXT, CHANNELS, HEADS, LAYERS = 128, 192, 6, 4
SEED = 1


class Block(nn.Module):
    """Attention and a feed-forward net, each on a normalized residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attend, self.project = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.widen, self.narrow = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        B, T, C = x_BTC.shape
        q, k, v = self.attend(self.norm1(x_BTC)).view(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.project(seen.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.narrow(F.gelu(self.widen(self.norm2(x_BTC))))  # type: ignore[no-any-return]


class CharGPT(nn.Module):
    """(B, T) characters to (B, T, V) logits of the next one."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(alphabet, CHANNELS), nn.Embedding(CONTEXT, CHANNELS)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, alphabet)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits."""
        x_BTC = self.embed(ids_BT) + self.place.weight[: ids_BT.shape[1]]
        return self.head(self.norm(self.blocks(x_BTC)))  # type: ignore[no-any-return]


class Text(Dataset[tuple[Tensor, Tensor]]):
    """Disjoint pieces of the text, each with its successor characters."""

    def __init__(self) -> None:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        self.alphabet = sorted(set(text))
        place = {character: index for index, character in enumerate(self.alphabet)}
        self.ids = torch.tensor([place[character] for character in text])

    def __len__(self) -> int:
        return (len(self.ids) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        piece = self.ids[index * CONTEXT : (index + 1) * CONTEXT + 1]
        return piece[:-1], piece[1:]


def workload() -> Workload:
    """Make the workload: cross-entropy of the next character, AdamW."""
    torch.manual_seed(SEED)
    text = Text()
    sample = torch.utils.data.default_collate([text[i] for i in range(8)])
    return Workload(
        CharGPT(len(text.alphabet)),
        sample,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        loader=lambda: DataLoader(text, batch_size=64, shuffle=True),
        name="chargpt",
    )
