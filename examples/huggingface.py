"""Fine-tune a small GPT-2 on sequences of unequal length with Hugging Face's Trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from autoaccum.integrations.transformers import ExactTrainer

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64))
dataset = [{"ids": torch.arange(n) % 9 + 1} for n in torch.randint(4, 40, (90,)).tolist()]


def collate(rows):
    """Pad sequences; ignore the labels of what is padding."""
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.where(ids > 0, ids, -100)}


args = TrainingArguments(
    "output", per_device_train_batch_size=8, gradient_accumulation_steps=4, learning_rate=1e-2, num_train_epochs=2,
    remove_unused_columns=False, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = ExactTrainer(model=model, args=args, train_dataset=dataset, data_collator=collate)
print(f"loss {trainer.train().training_loss:.3f}")
