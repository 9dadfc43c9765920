"""Hugging Face's Trainer in windows: the same training as the plain Trainer's in one big batch, step by step."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_loop_pages as pages
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
from hugging_face_cases import (
    CHEAP,
    KINDS,
    VOCABULARY,
    Keep,
    arguments,
    collate,
    dataset,
    difference,
    losses,
    make,
    trained,
)
from transformers import (
    DataCollatorWithFlattening,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
)

from autoaccum import Plan, PlanMismatch, UsageError
from autoaccum.integrations import hugging_face_training
from autoaccum.integrations.hugging_face_loss import find_average, hard_batches
from autoaccum.integrations.hugging_face_window import HostWindow, trimmed
from autoaccum.integrations.transformers import ExactTrainer, ExactTrainerMixin

TARGET = 10


def in_windows(folder: Path, model: Any, data: Any, **more: Any) -> tuple[Any, Any]:
    args = arguments(folder, per_device_train_batch_size=2, **more.pop("args", {}))
    chosen = {"target_batch": TARGET, "max_micro_batch": 4, **CHEAP, **more}
    return trained(ExactTrainer, model, args, data, chosen.pop("data_collator", collate), **chosen)


def in_one_batch(folder: Path, model: Any, data: Any, **more: Any) -> tuple[Any, Any]:
    args = arguments(folder, per_device_train_batch_size=TARGET, **more.pop("args", {}))
    return trained(Trainer, model, args, data, more.pop("data_collator", collate), **more)


FAST = ("gpt2", "llama", "bert tokens", "t5", "vit")
OTHERS = ("bert classes", "bert regression", "opt", "gpt-neox", "mistral")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_step_has_the_gradient_of_one_big_batch(name: str, tmp_path: Path) -> None:
    """Windows of 10, 10 and the tail of 3, with ragged lengths and labels, in micro-batches of at most 4."""
    data = dataset(KINDS.get(name, "language"))
    plain, expected = in_one_batch(tmp_path, make(name).double(), data)
    ours, found = in_windows(tmp_path, make(name).double(), data)
    assert ours.plan.split == (4, 3, 3)
    assert len(found.gradients) == 3
    assert difference(found, expected) < 1e-12
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)  # the Trainer adds them up in single precision
    again = {p: q for p, q in zip(ours.model.parameters(), plain.model.parameters(), strict=True)}
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-9) for p, q in again.items())


def test_single_precision_is_within_its_rounding(tmp_path: Path) -> None:
    _, expected = in_one_batch(tmp_path, make("llama"), dataset())
    _, found = in_windows(tmp_path, make("llama"), dataset())
    assert difference(found, expected) < 1e-6


def test_label_smoothing_clipping_and_checkpointing_are_the_trainers_own(tmp_path: Path) -> None:
    args = {"label_smoothing_factor": 0.1, "max_grad_norm": 0.1, "gradient_checkpointing": True}
    plain, expected = in_one_batch(tmp_path, make("llama").double(), dataset(), args=args)
    ours, found = in_windows(tmp_path, make("llama").double(), dataset(), args=args)
    assert all(float(gradient.norm()) == pytest.approx(0.1, rel=1e-4) for gradient in found.gradients)  # clipped
    assert difference(found, expected) < 1e-12
    names = ("grad_norm", "learning_rate", "epoch", "loss")
    logged = [
        [{name: entry.get(name) for name in names} for entry in t.state.log_history if "loss" in entry]
        for t in (ours, plain)
    ]
    for mine, theirs in zip(*logged, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("takes_count", [True, False])
def test_a_loss_function_of_the_users(takes_count: bool, tmp_path: Path) -> None:
    """One that divides by the count it is given, and one that takes its micro-batch's mean whatever it is given."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        return each.sum() / (num_items_in_batch if takes_count else (labels[:, 1:] != -100).sum())

    _, expected = in_one_batch(tmp_path, make("llama").double(), dataset(), compute_loss_func=loss)
    ours, found = in_windows(tmp_path, make("llama").double(), dataset(), compute_loss_func=loss)
    assert difference(found, expected) < 1e-12
    assert ours._windows.average.passes is takes_count


class OwnLoss(Trainer):
    """A Trainer as people write them: a loss of its own, which doesn't look at `num_items_in_batch`."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class SumLoss(OwnLoss):
    """A sum over the batch, as CTC's is by default in speech models."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = (inputs["labels"][:, 1:] != -100).sum()
        return super().compute_loss(model, inputs) * labels


class SumInASubclass(ExactTrainerMixin, SumLoss):
    pass


class OwnStep(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLoader(ExactTrainer):
    """A loader as people write one, with samples in their order."""

    batch_size: int | None = None

    def get_train_dataloader(self) -> Any:
        size = self.batch_size or self._train_batch_size
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=size, collate_fn=self.data_collator)


class OfEight(OwnLoader):
    batch_size = 8


class OfLists(ExactTrainer):
    def get_train_dataloader(self) -> Any:
        return [collate(dataset())]


class InASubclass(OwnLoader):
    compute_loss = OwnLoss.compute_loss


class AfterTheMixin(ExactTrainerMixin, OwnLoss):
    pass


class StepAfterTheMixin(ExactTrainerMixin, OwnStep):
    pass


class StepInASubclass(ExactTrainer):
    training_step = OwnStep.training_step


@pytest.mark.parametrize(
    ("plain", "ours"),
    [
        (OwnLoss, InASubclass),
        pytest.param(OwnLoss, AfterTheMixin, marks=pytest.mark.slow),
        pytest.param(SumLoss, SumInASubclass, marks=pytest.mark.slow),
        pytest.param(OwnStep, StepAfterTheMixin, marks=pytest.mark.slow),
    ],
)
def test_what_a_users_trainer_overrides_is_weighted(plain: Any, ours: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=TARGET)
    _, expected = trained(plain, make("llama").double(), args, dataset())
    args = arguments(tmp_path, per_device_train_batch_size=2)
    windows = {"target_batch": TARGET, "max_micro_batch": 4, **CHEAP}
    _, found = trained(ours, make("llama").double(), args, dataset(), **windows)
    assert difference(found, expected) < 1e-12


def test_a_loader_of_the_users_is_refused_where_its_batches_are_no_windows(tmp_path: Path) -> None:
    """With a batch size of its own it would have another effective batch, without a word."""
    args = arguments(tmp_path, per_device_train_batch_size=2)
    for cls, said in ((OfEight, "batches of 8, and a window has 10 samples"), (OfLists, "returned a list")):
        with pytest.raises(UsageError, match=said):
            trained(cls, make("llama"), args, dataset(), target_batch=TARGET, **CHEAP)
    ours = OwnLoader(make("llama"), args, collate, dataset(), target_batch=TARGET)
    assert isinstance(next(iter(ours.get_train_dataloader())), dict)  # outside of training it is the Trainer's own
    with pytest.raises(UsageError, match="is no window"):
        ours.training_step(ours.model, collate(dataset()[:4]))


@pytest.mark.parametrize("kind", ["mean", "sum", "equal", "coupled"])
def test_a_loss_is_asked_what_it_averages_over(kind: str) -> None:
    """Where all samples have the same loss every count fits, but for rounding: then it is samples."""

    def loss(batch: dict[str, torch.Tensor], items: Any) -> float:
        x = batch["x"].double()
        return float({"mean": x.mean, "sum": x.sum, "equal": lambda: x.mean() * 0 + 2 / 3, "coupled": x.std}[kind]())

    rows = torch.arange(1, 6, dtype=torch.float32) ** 2
    mask = (torch.arange(7) < torch.tensor([[7], [2], [3], [5], [1]])).long()
    (batches,) = hard_batches({"x": rows, "attention_mask": mask})
    found = find_average(loss, lambda batch: None, [batches], half=False)
    assert (found.adds_up, found.can_be_cut) == (kind == "sum", kind != "coupled")
    assert (found.words == "its samples") == (kind in ("mean", "equal"))


def resnet() -> Any:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic", "num_labels": 5}
    return ResNetForImageClassification(ResNetConfig(**sizes)).double()


@pytest.mark.slow
def test_batch_normalization_is_as_it_was_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frozen is exact, which the plan's own test says; what isn't is warned of; "exact" is the Runner's."""
    args, data = {"learning_rate": 0.0, "max_steps": 1}, dataset("images")
    frozen, _ = in_windows(tmp_path, resnet(), data, batchnorm="frozen", check=True, args=args)
    assert frozen.plan.exactness.startswith("exact") and "not exact" not in caplog.text
    merged, _ = in_windows(tmp_path, resnet(), data, batchnorm="merged", check=True, args=args)
    assert merged.plan.exactness.startswith("not exact") and merged.plan.exactness in caplog.text
    plain, _ = in_one_batch(tmp_path, resnet(), data, args=args)
    first = [each.model.resnet.embedder.embedder.normalization.running_var for each in (merged, plain)]
    assert torch.allclose(*first, rtol=1e-12, atol=0)
    with pytest.raises(UsageError, match="runs them one after the other"):
        in_windows(tmp_path, resnet(), data, batchnorm="exact")


def test_a_step_in_the_place_of_the_windows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"class Mine\(ExactTrainerMixin, YourTrainer\)"):
        args = arguments(tmp_path)
        trained(StepInASubclass, make("llama"), args, dataset(), target_batch=TARGET, **CHEAP)


def test_the_effective_batch_is_what_the_arguments_multiply_to(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    ours, found = trained(ExactTrainer, make("gpt2").double(), args, dataset(), max_micro_batch=4, **CHEAP)
    plain, expected = trained(Trainer, make("gpt2").double(), args, dataset())
    assert ours.plan.target_batch == 10 and (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (
        5,
        2,
    )
    assert difference(found, expected) < 1e-12
    assert ours.state.max_steps == plain.state.max_steps == 3


def test_it_resumes_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Shuffled, with dropout: the order and the random states are the Trainer's."""
    args = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "train_sampling_strategy": "random"}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    whole, _ = in_windows(tmp_path / "whole", make("gpt2", **dropout).double(), dataset(), args=args)
    resumed = ExactTrainer(
        model=make("gpt2", **dropout).double(), args=arguments(tmp_path / "whole", **args), data_collator=collate,
        train_dataset=dataset(), target_batch=TARGET, plan=whole.plan,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


PHASES = ("forward", "backward", "end of backward")


class Fails:
    """Raise an out-of-memory once, in a phase of the second window's given micro-batch."""

    def __init__(self, model: Any, phase: str, micro_batch: int) -> None:
        self.phase, self.micro_batch, self.begun, self.armed, self.raised = phase, micro_batch, 0, False, 0
        model.register_forward_pre_hook(lambda *_: self.forward())
        first, *_, last = model.parameters()
        (first if phase == "end of backward" else last).register_hook(self.backward)

    def forward(self) -> None:
        self.begun += 1
        self.fail("forward")

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        self.fail(self.phase if "backward" in self.phase else "")
        return gradient

    def fail(self, phase: str) -> None:
        if self.armed and self.begun == self.micro_batch and phase == self.phase and not self.raised:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


class Arms(TrainerCallback):
    def __init__(self, fails: Fails) -> None:
        self.fails = fails

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.fails.armed, self.fails.begun = state.global_step == 1, 0


@pytest.mark.parametrize(
    ("phase", "micro_batch"),
    [
        ("forward", 3),
        ("end of backward", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(PHASES, (1, 2, 3))),
    ],
)
def test_an_out_of_memory_changes_nothing_but_the_split(phase: str, micro_batch: int, tmp_path: Path) -> None:
    """Bitwise what smaller micro-batches give from that window on: gradients, dropout, weights."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}

    class Shrinks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                sizing = calm._windows.sizing
                sizing.limits = replace(sizing.limits, micro_batch=3)

    model = make("gpt2", **dropout).double()
    fails = Fails(model, phase, micro_batch)
    ours, found = in_windows(tmp_path, model, dataset(), callbacks=[Arms(fails)])
    args = arguments(tmp_path, per_device_train_batch_size=2)
    keep = Keep()
    calm = ExactTrainer(
        model=make("gpt2", **dropout).double(), args=args, data_collator=collate, train_dataset=dataset(),
        target_batch=TARGET, plan=ours.plan, callbacks=[keep, Shrinks()],
    )  # fmt: skip
    calm.train()
    assert fails.raised == 1 and ours._windows.sizing.limits.micro_batch == 3
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, keep.gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), calm.model.parameters(), strict=True))


def test_a_plan_file_is_taken_and_another_training_refuses_it(tmp_path: Path) -> None:
    ours, _ = in_windows(tmp_path, make("gpt2"), dataset())
    ours.plan.save(tmp_path / "plan.json")
    again, _ = in_windows(tmp_path, make("gpt2"), dataset(), plan=tmp_path / "plan.json", target_batch=None)
    assert again.plan == Plan.load(tmp_path / "plan.json") and again._request.target_batch == TARGET
    with pytest.raises(PlanMismatch, match="20"):
        in_windows(tmp_path, make("gpt2"), dataset(), plan=tmp_path / "plan.json", target_batch=20)
    with pytest.raises(PlanMismatch, match="model"):
        in_windows(tmp_path, make("llama"), dataset(), plan=tmp_path / "plan.json")


@pytest.mark.slow
def test_the_evaluation_is_in_the_plan(tmp_path: Path) -> None:
    """Its logits stay until the end, since metrics are computed from them: far more than training's."""
    more = {"eval_dataset": dataset(samples=4000), "compute_metrics": lambda outputs: {}}
    args = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "per_device_eval_batch_size": 4}
    without, _ = in_windows(tmp_path, make("llama"), dataset(), args={"max_steps": 1})
    with_it, _ = in_windows(tmp_path, make("llama"), dataset(), args=args, **more)
    of_training, of_both = (t.plan.predicted_peak_bytes - t.plan.memory.baseline_bytes for t in (without, with_it))
    logits = 4000 * 19 * VOCABULARY * 4
    assert logits <= of_both - of_training <= 3 * logits  # the last batch's are joined to a copy of all before
    assert "eval_loss" in with_it.state.log_history[1]


def test_planning_verifies_and_checks_on_the_trainers_own(tmp_path: Path) -> None:
    """The whole of planning; random states, weights and counters are as before."""
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    args = {"learning_rate": 0.0, "max_steps": 1}
    ours, _ = in_windows(tmp_path, model, dataset(), verify=True, check=True, args=args)
    assert ours.plan.verified and ours.plan.exactness.startswith("exact")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_windows_batch_stays_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[HostWindow] = []
    train = hugging_face_training.WindowTraining.train

    def look(self: Any, model: Any, host: HostWindow) -> torch.Tensor:
        seen.append(host)
        return train(self, model, host)

    monkeypatch.setattr(hugging_face_training.WindowTraining, "train", look)
    in_windows(tmp_path, make("gpt2"), dataset(), args={"dataloader_num_workers": 1})
    assert [host.samples for host in seen] == [10, 10, 3]
    assert seen[0].to("meta") is seen[0]  # what accelerate calls to move a batch


def test_padding_is_cut_off_where_nothing_changes() -> None:
    batch = collate(dataset()[:6])
    width = int(batch["attention_mask"].sum(1).max())
    wider = {
        name: torch.nn.functional.pad(leaf, (0, 6), value=-100 if name == "labels" else 0)
        for name, leaf in batch.items()
    }
    assert {name: tuple(leaf.shape) for name, leaf in trimmed(wider).items()} == dict.fromkeys(batch, (6, width))
    left = {name: leaf.flip(1) for name, leaf in wider.items()}  # padded on the left: positions would move
    counted = {**wider, "labels": wider["labels"].clamp(min=0)}  # labels that count although they are padding
    pairs = {**wider, "pairs": torch.ones(6, 1, width + 6, width + 6)}  # a mask of pairs
    for kept in (left, counted, pairs):
        assert all(leaf is kept[name] for name, leaf in trimmed(kept).items())


@pytest.mark.parametrize(
    ("args", "said"), [({"auto_find_batch_size": True}, "auto_find_batch_size"), ({"fsdp": "full_shard"}, "fsdp|FSDP")]
)
def test_what_works_against_windows_is_refused_by_name(args: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ValueError), match=said):
        ExactTrainer(model=make("gpt2"), args=arguments(tmp_path, **args), train_dataset=dataset(), target_batch=8)


def test_a_loss_that_compares_samples_is_refused_by_name(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        each = outputs["logits"].mean(1)
        return torch.nn.functional.cross_entropy(each @ each.T * 50, torch.arange(len(each)))

    with pytest.raises(UsageError, match=r"isn't a mean over samples, labels or tokens"):
        in_windows(tmp_path, make("llama"), dataset(), compute_loss_func=loss)
    whole, found = in_windows(tmp_path, make("llama").double(), dataset(), compute_loss_func=loss, max_micro_batch=None)
    _, expected = in_one_batch(tmp_path, make("llama").double(), dataset(), compute_loss_func=loss)
    assert whole.plan.split == (10,) and difference(found, expected) < 1e-12


def test_packed_batches_are_collated_anew_for_each_micro_batch(tmp_path: Path) -> None:
    """DataCollatorWithFlattening makes one row of all samples, which can't be cut."""
    rows = [{name: value.tolist() for name, value in row.items()} for row in dataset()]
    collator = DataCollatorWithFlattening()
    args = {"remove_unused_columns": False}
    _, expected = in_one_batch(tmp_path, make("llama").double(), rows, args=args, data_collator=collator)
    ours, found = in_windows(tmp_path, make("llama").double(), rows, args=args, data_collator=collator)
    assert ours.plan.split == (4, 3, 3) and difference(found, expected) < 1e-12


def _lines(text: str) -> list[str]:
    """What a program prints, without the metrics that a Trainer prints at its end."""
    return [line for line in text.splitlines() if not line.startswith("{")]


def test_the_page_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    page, names = pages.ROOT / "docs" / "huggingface.md", {"__name__": "page"}
    for code, shown, line in pages.blocks_of(page):
        assert _lines(pages.printed_by(code, page, line, names)) == shown.splitlines(), f"{page.name}:{line}"


def test_the_example_changes_few_lines_and_trains_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = (pages.ROOT / "examples" / folder / "huggingface.py" for folder in ("before", ""))
    changed = pages.changed_lines(before.read_text(), after.read_text())
    assert len(changed) == 3, changed  # two imports and the class
    for path in (before, after):
        printed = _lines(pages.printed_by(path.read_text(), path, 0, {"__name__": "__main__"}))
        assert printed[-1].startswith("loss ") and 0.5 < float(printed[-1][5:]) < 4.5
