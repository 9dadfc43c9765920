"""Trainers built on Hugging Face's in windows: TRL's, sentence-transformers', PEFT's models; ranks; a GPU's memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
from hugging_face_cases import (
    CHEAP,
    KINDS,
    OFF,
    SMALL,
    VOCABULARY,
    arguments,
    collate,
    dataset,
    difference,
    make,
    trained,
)
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Trainer

from autoaccum import Plan, UsageError
from autoaccum.integrations.transformers import ExactTrainer, ExactTrainerMixin

WINDOWS = {"target_batch": 10, "max_micro_batch": 4, **CHEAP}


def tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_llama_with_adapters(checkpointing: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        adapted = peft.get_peft_model(make("llama"), config).double()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradients of all lora_A
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted

    args = {"gradient_checkpointing": checkpointing}
    whole = arguments(tmp_path, per_device_train_batch_size=10, **args)
    _, expected = trained(Trainer, model(), whole, dataset())
    _, found = trained(ExactTrainer, model(), arguments(tmp_path, **args), dataset(), **WINDOWS)
    assert difference(found, expected) < 1e-12


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        pytest.param({"max_length": None, "padding_free": True}, marks=pytest.mark.slow),
    ],
)
def test_trls_sft_trainer(more: dict[str, Any], tmp_path: Path) -> None:
    """Its own loss computes logits in single precision; padding-free batches have one row, which can't be cut."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class Mine(ExactTrainerMixin, trl.SFTTrainer):
        pass

    table = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in dataset()])
    fixed = {"bf16": False, "gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    results = []
    for cls, batch, windows in ((trl.SFTTrainer, 10, {}), (Mine, 2, WINDOWS)):
        args = arguments(tmp_path, trl.SFTConfig, per_device_train_batch_size=batch, **fixed, **more)
        results.append(trained(cls, make("llama").double(), args, table, None, processing_class=tokenizer(), **windows))
    (plain, expected), (ours, found) = results
    assert ours.plan.split == (4, 3, 3)
    assert difference(found, expected) < (1e-12 if "label_smoothing_factor" in more else 1e-6)
    logged = [trainer.state.log_history[0] for trainer in (plain, ours)]
    assert logged[0].keys() == logged[1].keys() and logged[0]["num_tokens"] == logged[1]["num_tokens"]


def has_mixed_mse() -> bool:
    """Whether this torch's mse_loss can be differentiated where its two arguments differ in dtype."""
    scores = torch.ones(2, dtype=torch.float64, requires_grad=True)
    try:
        torch.nn.functional.mse_loss(scores, torch.zeros(2)).backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("loss", "of"),
    [
        ("CosineSimilarityLoss", "scores"),
        pytest.param("CachedMultipleNegativesRankingLoss", "pairs", marks=pytest.mark.slow),
    ],
)
def test_sentence_transformers(loss: str, of: str, tmp_path: Path) -> None:
    """A mean over pairs is cut; a contrastive loss is one micro-batch, or refused by name."""
    pytest.importorskip("sentence_transformers"), pytest.importorskip("datasets")
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses, modules

    class Mine(ExactTrainerMixin, SentenceTransformerTrainer):
        pass

    folder = str(tmp_path / "encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL, **OFF)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    g = torch.Generator().manual_seed(1)

    def sentence() -> str:
        words = int(torch.randint(3, 20, (1,), generator=g))
        return " ".join(f"w{int(i)}" for i in torch.randint(3, VOCABULARY, (words,), generator=g))

    rows = [{"a": sentence(), "b": sentence()} for _ in range(23)]
    if of == "scores":
        rows = [{**row, "score": float(torch.rand(1, generator=g))} for row in rows]
    keywords = {"mini_batch_size": 3} if "Cached" in loss else {}

    def run(cls: Any, batch: int, **windows: Any) -> Any:
        model = SentenceTransformer(modules=[modules.Transformer(folder), modules.Pooling(16)], device="cpu").double()
        args = arguments(tmp_path, SentenceTransformerTrainingArguments, per_device_train_batch_size=batch)
        made = getattr(losses, loss)(model, **keywords)
        return trained(cls, model, args, Dataset.from_list(rows), None, loss=made, **windows)

    if loss == "CosineSimilarityLoss" and not has_mixed_mse():
        pytest.skip(f"torch {torch.__version__}: mse_loss of fp64 scores and fp32 labels has no backward pass")
    _, expected = run(SentenceTransformerTrainer, 10)
    if of == "pairs":
        with pytest.raises(UsageError, match=f"{loss} isn't a mean over samples"):
            run(Mine, 2, **WINDOWS)
    ours, found = run(Mine, 2, **{**WINDOWS, **({"max_micro_batch": None} if of == "pairs" else {})})
    assert ours.plan.split == ((10,) if of == "pairs" else (4, 3, 3))
    assert difference(found, expected) < 1e-12


def test_a_trainer_that_generates_its_batches_is_refused_by_name(tmp_path: Path) -> None:
    class GRPOTrainer(Trainer):  # the name is what counts: TRL's would generate first
        pass

    class Mine(ExactTrainerMixin, GRPOTrainer):
        pass

    with pytest.raises(UsageError, match="GRPOTrainer, which generates its batches"):
        Mine(model=make("gpt2"), args=arguments(tmp_path), train_dataset=dataset(), target_batch=8)


@pytest.mark.parametrize(
    ("kind", "loss_type", "said"),
    [
        pytest.param("KTO", "kto", "whose KL term is a mean over a whole batch", marks=pytest.mark.slow),
        pytest.param("DPO", "aot_unpaired", "which compares the pairs of a whole batch", marks=pytest.mark.slow),
        pytest.param("DPO", "sigmoid", "", marks=pytest.mark.slow),
        pytest.param("KTO", "apo_zero_unpaired", "", marks=pytest.mark.slow),
    ],
)
def test_preferences_are_cut_where_their_loss_is_a_mean(kind: str, loss_type: str, said: str, tmp_path: Path) -> None:
    """At the beginning, where the model is its own reference, a loss of the whole batch looks like a mean."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    trainer, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    mine = type("Mine", (ExactTrainerMixin, trainer), {})
    g = torch.Generator().manual_seed(1)

    def words() -> str:
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(2, 9, (1,), generator=g)),), generator=g)
        return " ".join(f"w{int(each)}" for each in ids)

    rows: list[dict[str, Any]] = [{"prompt": words(), "chosen": f" {words()}"} for _ in range(13)]
    for number, row in enumerate(rows):
        other = (
            {"rejected": f" {words()}"} if kind == "DPO" else {"completion": row["chosen"], "label": number % 2 == 0}
        )
        row |= other
        if kind == "KTO":
            del row["chosen"]
    table = datasets.Dataset.from_list(rows)
    fixed = {"bf16": False, "gradient_checkpointing": False, "remove_unused_columns": False, "max_length": 32}

    def run(cls: Any, batch: int, **windows: Any) -> Any:
        args = arguments(tmp_path, config, per_device_train_batch_size=batch, loss_type=loss_type, **fixed)
        given = {"processing_class": tokenizer(), "ref_model": make("llama").double(), **windows}
        return trained(cls, make("llama").double(), args, table, None, **given)

    if said:
        with pytest.raises(UsageError, match=said):
            run(mine, 2, **WINDOWS)
        return
    _, expected = run(trainer, 10)
    ours, found = run(mine, 2, **WINDOWS)
    assert ours.plan.split == (4, 3, 3) and ours._windows.average.words == "its samples"
    assert difference(found, expected) < 1e-6  # its head is in single precision


def _figures(*command: str, env: dict[str, str] | None = None) -> Any:
    """Run a command; return the JSON that it prints."""
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=inherited, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith('{"')))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    """Real processes, DDP over gloo; T5 takes the mean of its labels itself, whose number differs from rank to rank."""
    args = arguments(tmp_path, per_device_train_batch_size=10)
    _, expected = trained(Trainer, make(name).double(), args, dataset(KINDS.get(name, "language"), 20))
    torch.save(expected.gradients, tmp_path / "gradients.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = [__file__, "ranks", name, str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    found = _figures(*launch, *script)
    assert found["split"] == [2, 2, 1] and found["retries"] == 1 and found["steps"] == 2
    assert found["difference"] < 1e-12


def _train_on_a_rank(name: str, folder: str) -> None:
    """Train as one of two ranks; one of them runs out of memory once, in its first micro-batch."""
    from autoaccum.runner import oom_recovery

    torch.set_num_threads(1)
    retries = []
    start_over = oom_recovery.OomRecovery._start_over
    oom_recovery.OomRecovery._start_over = lambda *args: (retries.append(args), start_over(*args))[1]  # type: ignore
    model = make(name).double()
    rank = int(os.environ["RANK"])
    begun: list[bool] = []

    def fails_once(*_: Any) -> None:
        if torch.is_grad_enabled() and windows_began and not begun and rank == 0:
            begun.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    windows_began: list[bool] = []
    model.register_forward_pre_hook(fails_once)
    from transformers import TrainerCallback

    class Begins(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            windows_began.append(True)

    args = arguments(folder, per_device_train_batch_size=2, ddp_backend="gloo")
    data = dataset(KINDS.get(name, "language"), 20)
    windows = {**WINDOWS, "max_micro_batch": 2}
    trainer, found = trained(ExactTrainer, model, args, data, callbacks=[Begins()], **windows)
    if rank == 0:
        expected = torch.load(Path(folder) / "gradients.pt")
        pairs = zip(found.gradients, expected, strict=True)
        shown = {
            "difference": max(float((a - b).norm() / b.norm()) for a, b in pairs), "steps": trainer.state.global_step,
            "split": trainer.plan.split, "retries": len(retries),
        }  # fmt: skip
        print(json.dumps(shown))


@pytest.mark.slow
def test_a_gpus_memory_holds_what_was_planned_and_a_plan_too_large_is_recovered_from(tmp_path: Path) -> None:
    """On the virtual GPU, whose allocator and out-of-memory errors are real."""
    gpu = [sys.executable, "-m", "autoaccum", "virtual-gpu", "--memory", "1GiB", "--", sys.executable, __file__, "gpu"]
    planned = _figures(*gpu, str(tmp_path), "plan.json")
    assert planned["out_of_memory_errors"] == 0 and planned["steps"] == 4
    assert len(planned["split"]) > 1 and sum(planned["split"]) == 64
    assert planned["peak_bytes"] <= planned["budget_bytes"]
    plan = Plan.load(tmp_path / "plan.json")
    from dataclasses import replace

    schedule = replace(plan.schedule, micro_batch=32, accumulation_steps=2, split=(32, 32), largest_micro_batch=32)
    replace(plan, schedule=schedule).save(tmp_path / "large.json")
    large = _figures(*gpu, str(tmp_path), "large.json")
    assert large["out_of_memory_errors"] >= 1 and large["steps"] == 4
    assert large["micro_batch"] < 32


def _train_on_a_gpu(folder: str, file: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=2000, **sizes))
    tokens = [torch.randint(1, 2000, (128 + number % 128,)) for number in range(200)]
    data = [{"input_ids": each, "labels": each} for each in tokens]
    path = Path(folder) / file
    windows = {"plan": path} if path.exists() else {"target_batch": 64}
    args = arguments(folder, use_cpu=False, max_steps=4)
    trainer = ExactTrainer(model=model, args=args, train_dataset=data, data_collator=collate, **windows)
    trainer.train()
    trainer.plan.save(path)
    shown = {
        "split": trainer.plan.split, "micro_batch": trainer._windows.sizing.limits.micro_batch,
        "out_of_memory_errors": torch.cuda.memory_stats()["num_ooms"], "steps": trainer.state.global_step,
        "peak_bytes": torch.cuda.max_memory_reserved(), "budget_bytes": trainer.plan.budget_bytes,
    }  # fmt: skip
    print(json.dumps(shown))


if __name__ == "__main__":
    {"ranks": _train_on_a_rank, "gpu": _train_on_a_gpu}[sys.argv[1]](*sys.argv[2:])
