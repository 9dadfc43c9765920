"""An out-of-memory of the Trainer outside of its windows: in an evaluation, and in the optimizer's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
from hugging_face_cases import CHEAP, arguments, collate, dataset, make

from autoaccum import OutOfMemory
from autoaccum.integrations.transformers import ExactTrainer


def trainer(folder: Path, model: Any, **args: Any) -> ExactTrainer:
    return ExactTrainer(
        model=model, args=arguments(folder, per_device_train_batch_size=2, max_steps=2, **args),
        data_collator=collate, train_dataset=dataset(), eval_dataset=dataset("language", 13), target_batch=10,
        max_micro_batch=4, **CHEAP,
    )  # fmt: skip


def fail_above(model: Any, samples: int, failed: list[int]) -> None:
    """Have forwards of more samples run out of memory outside of training."""

    def look(module: Any, args: Any, kwargs: Any) -> None:
        size = len(kwargs["input_ids"])
        if not module.training and size > samples:
            failed.append(size)
            assert len(failed) < 10, f"it starts over and over in batches of {failed}"
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(look, with_kwargs=True)


def test_an_evaluation_starts_over_in_smaller_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = {"per_device_eval_batch_size": 8, "dataloader_num_workers": 0}
    whole, failing = (
        trainer(tmp_path, make("llama").double(), **args),
        trainer(tmp_path, make("llama").double(), **args),
    )
    small = trainer(tmp_path, make("llama").double(), per_device_eval_batch_size=2)
    failed: list[int] = []
    fail_above(failing.model, 3, failed)
    assert failing.evaluate()["eval_loss"] == pytest.approx(small.evaluate()["eval_loss"], rel=1e-12)
    assert failed == [8, 4] and failing.args.per_device_eval_batch_size == 2
    assert "starts over with 4" in caplog.text and "starts over with 2" in caplog.text
    expected, found = whole.predict(dataset("language", 5)), failing.predict(dataset("language", 5))
    assert failed == [8, 4] and found.predictions.shape == expected.predictions.shape
    assert whole.args.per_device_eval_batch_size == 8


def test_an_evaluation_of_one_sample_that_does_not_fit_is_named(tmp_path: Path) -> None:
    failing = trainer(tmp_path, make("llama"), per_device_eval_batch_size=2)
    failed: list[int] = []
    fail_above(failing.model, 0, failed)
    with pytest.raises(OutOfMemory, match=r"per_device_eval_batch_size=1 \(.*CUDA out of memory") as error:
        failing.evaluate()
    assert failed == [2, 1] and "eval_accumulation_steps=1" in error.value.hint
    another = trainer(tmp_path, make("llama"))
    another.model.register_forward_pre_hook(raises)
    with pytest.raises(ValueError, match="another error"):
        another.evaluate()


def raises(*_: Any) -> None:
    raise ValueError("another error")


def test_training_goes_on_after_an_evaluation_that_ran_out_of_memory(tmp_path: Path) -> None:
    args = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    calm, failing = trainer(tmp_path, make("llama").double(), **args), trainer(tmp_path, make("llama").double(), **args)
    failed: list[int] = []
    calm.train()
    fail_above(failing.model, 5, failed)  # a mean's denominator is looked for with 5
    failing._given_plan = calm.plan  # whose planning evaluated without a failure
    failing.train()
    assert failed == [8] and failing.state.global_step == 2
    assert all(torch.equal(a, b) for a, b in zip(calm.model.parameters(), failing.model.parameters(), strict=True))


def test_an_optimizer_that_runs_out_of_memory_is_named(tmp_path: Path) -> None:
    failing = trainer(tmp_path, make("llama"))
    callbacks = list(failing.callback_handler.callbacks)

    def step(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    failing.create_optimizer()
    planned = failing._plan_once

    def plan_then_fail() -> Any:
        windows = planned()
        failing.optimizer.optimizer.step = step  # accelerate's wrapper holds it
        return windows

    failing._plan_once = plan_then_fail  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="optimizer step ran out of memory") as error:
        failing.train()
    assert "load the last checkpoint" in error.value.hint
    assert failing.callback_handler.callbacks == callbacks
