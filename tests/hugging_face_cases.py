"""Tiny models, data and collators for the Trainer's tests; and a Trainer's gradients, step by step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers import TrainerCallback, TrainingArguments  # noqa: E402

VOCABULARY, SAMPLES = 61, 23
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**SMALL, "max_position_embeddings": 64}


def make(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **more))
    if name == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **more}
        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, **off, bos_token_id=1, eos_token_id=1, pad_token_id=0)
        )
    if name == "bert classes":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **OFF, num_labels=5))
    if name == "bert tokens":
        return transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, **OFF, num_labels=5))
    if name == "bert regression":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **OFF, num_labels=1))
    if name == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
        return transformers.T5ForConditionalGeneration(config)
    if name == "vit":
        sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
        config = transformers.ViTConfig(**sizes, **OFF, image_size=16, patch_size=4, num_labels=5)
        return transformers.ViTForImageClassification(config)
    if name == "opt":
        config = transformers.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        return transformers.OPTForCausalLM(config)
    if name == "gpt-neox":
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**DECODER))
    assert name == "mistral"
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, num_key_value_heads=2))


KINDS = {
    "bert classes": "classes", "bert tokens": "tokens", "bert regression": "regression", "t5": "translation",
    "vit": "images",
}  # fmt: skip


def dataset(kind: str = "language", samples: int = SAMPLES) -> list[dict[str, Any]]:
    """Samples of 4 to 19 tokens; of their labels some are ignored, another part of each."""
    g = torch.Generator().manual_seed(3)
    found = []
    for _ in range(samples):
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(4, 20, (1,), generator=g)),), generator=g)
        drawn = int(torch.randint(0, 5, (1,), generator=g))
        if kind == "images":
            found.append({"pixel_values": torch.randn(3, 16, 16, generator=g).double(), "labels": drawn})
            continue
        labels: Any = ids.clone()
        if kind == "classes":
            labels = drawn
        elif kind == "regression":
            labels = float(drawn)
        elif kind == "tokens":
            labels = torch.randint(0, 5, (len(ids),), generator=g)
            labels[::3] = -100
        elif kind == "translation":
            labels = torch.randint(3, VOCABULARY, (3 + drawn * 2,), generator=g)
        else:
            labels[:drawn] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for key in rows[0]:
        values = [torch.as_tensor(row[key]) for row in rows]
        if values[0].dim() != 1:
            out[key] = torch.stack(values)
            continue
        longest, fill = max(map(len, values)), 0 if key == "input_ids" else -100
        out[key] = torch.stack([torch.cat([each, each.new_full((longest - len(each),), fill)]) for each in values])
        if key == "input_ids":
            out["attention_mask"] = torch.stack([(torch.arange(longest) < len(each)).long() for each in values])
    if out["labels"].is_floating_point():
        out["labels"] = out["labels"].double()
    return out


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


class Keep(TrainerCallback):
    """Keep the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(gradient(model))


CHEAP = {"verify": False, "check": False}  # planning for gradients only


def arguments(folder: Any, kind: Any = TrainingArguments, **more: Any) -> Any:
    chosen = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "num_train_epochs": 1, "learning_rate": 1e-3,
        "max_grad_norm": 0, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "log_level": "error",
        "train_sampling_strategy": "sequential", **more,
    }  # fmt: skip
    return kind(**chosen)


def trained(cls: Any, model: Any, args: Any, data: Any, collator: Any = collate, **more: Any) -> tuple[Any, Keep]:
    """A Trainer after its training, and its gradients."""
    keep = Keep()
    if collator is not None:
        more["data_collator"] = collator
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=[keep, *more.pop("callbacks", [])], **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer, keep


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def difference(found: Keep, expected: Keep) -> float:
    """The largest relative L2 distance of a step's gradient."""
    pairs = zip(found.gradients, expected.gradients, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
