"""Handle an out-of-memory of a Trainer outside of its windows.

In an evaluation nothing is lost: it starts over in smaller batches. In the optimizer's step nothing can be repeated, as
in a Runner (runner/oom_recovery.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from transformers import TrainerCallback

from .. import process_memory
from ..devices import oom
from ..devices.registry import get_device
from ..errors import OutOfMemory
from ..runner.oom_recovery import optimizer_step_failed

log = logging.getLogger("autoaccum")

T = TypeVar("T")


class _Stepping(TrainerCallback):
    """Notes whether the Trainer's optimizer is at work."""

    def __init__(self) -> None:
        self.is_on = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Note the begin of a step."""
        self.is_on = True

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Note its end."""
        self.is_on = False


@contextlib.contextmanager
def optimizer_step_named(trainer: Any) -> Iterator[None]:
    """Name an out-of-memory of the optimizer's step, as a Runner does.

    Raises:
        OutOfMemory: It did.
    """
    stepping = _Stepping()
    trainer.add_callback(stepping)
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not stepping.is_on or not oom.is_out_of_memory(error):
            raise
        failure = oom.drop_frames(error)
    finally:
        trainer.remove_callback(stepping)
    raise optimizer_step_failed(failure)


def in_smaller_batches(trainer: Any, run: Callable[[], T]) -> T:
    """Run an evaluation, in half the batch after each out-of-memory.

    The smaller size stays for later evaluations.

    Raises:
        OutOfMemory: One sample doesn't fit, or other ranks take part.
    """
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, OutOfMemory) or not oom.is_out_of_memory(error):
                raise
            failure = oom.drop_frames(error)
        size = trainer.args.per_device_eval_batch_size
        if size == 1 or trainer.args.world_size > 1:
            raise _does_not_fit(trainer, size, failure)
        trainer.args.per_device_eval_batch_size = size // 2
        if hasattr(trainer, "_eval_dataloaders"):  # kept where workers persist
            del trainer._eval_dataloaders
        oom.collect()
        process_memory.trim()
        get_device(trainer.args.device).release_cache()
        log.warning(
            "Out of memory in an evaluation with per_device_eval_batch_size=%d (%s). It starts over with %d, and so do "
            "later ones.",
            size, failure, size // 2,
        )  # fmt: skip


def _does_not_fit(trainer: Any, size: int, failure: str) -> OutOfMemory:
    ranks = trainer.args.world_size
    return OutOfMemory(
        f"An evaluation ran out of memory with per_device_eval_batch_size={size} ({failure}).",
        f"{ranks} ranks evaluate together, and one alone can't start over."
        if ranks > 1
        else "No batch is smaller. Predictions of all samples stay on the device until the end, unless "
        "eval_accumulation_steps moves them to the host.",
        f"Set per_device_eval_batch_size={max(1, size // 2)}, eval_accumulation_steps=1 or "
        "prediction_loss_only=True in the TrainingArguments.",
    )
