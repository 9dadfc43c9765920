"""A sample is made up only where the model tells what it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoaccum import UsageError
from autoaccum.data.sample import infer_sample

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_language_model_is_fed_tokens_that_it_takes(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**TINY))
    sample, message = infer_sample(model)
    assert sample["input_ids"].shape == (2, 32) and "32 tokens" in message
    assert torch.isfinite(model(**sample).loss)


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"])
def test_a_vocabulary_alone_is_no_language_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    with pytest.raises(UsageError, match="has no input") as caught:
        infer_sample(kind(kind.config_class(**TINY)))
    assert '{"input_ids": torch.randint(50' in caught.value.hint


class Other(nn.Module):
    """Somebody's own model with a configuration that has a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(vocab_size=50)
        self.embed = nn.Embedding(50, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)


def test_a_model_of_ones_own_with_a_vocabulary_is_not_guessed_at() -> None:
    with pytest.raises(UsageError, match="Other has no input"):
        infer_sample(Other())
