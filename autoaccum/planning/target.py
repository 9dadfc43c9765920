"""Describe what is recorded: the training context, its workload and the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..data import split as cutting
from ..data import tree
from ..devices.base import Device
from ..devices.oom import is_out_of_memory
from ..errors import AutoaccumError
from ..phases import OnPhase
from ..process_memory import Heap
from ..ranks.sharded import device_of
from ..simulation.recording import Event
from ..simulation.solver import Split
from ..torch_compat import local_bytes
from ..window import compiled, step
from ..workload import Batch, Workload

_FIRST_SAMPLES = 2  # in the micro-batches of the first window


@dataclass(frozen=True)
class RecordingTarget:
    """What is recorded: a workload, its training context, and the device.

    Attributes:
        context: What is trained.
        workload: The workload, with its longest sample.
        device: The device.
        mmap_threshold_bytes: malloc's fixed mmap threshold; None where malloc is at its default, and on CUDA.
        progress: Called with a line about what is being done.
        model_events: The allocations of the model as a new process makes them; None where they were not recorded.
        heap_before: malloc's heap before anything was trained; None on CUDA.
        remove_appended: Removes what windows appended to the user's lists.
        filled_bytes: Free blocks of malloc's heap that are kept from windows while a plan is made.
    """

    context: step.TrainingContext
    workload: Workload
    device: Device
    mmap_threshold_bytes: int | None
    progress: Callable[[str], None] = lambda text: None
    model_events: tuple[Event, ...] | None = None
    heap_before: Heap | None = None
    remove_appended: Callable[[], None] = lambda: None
    filled_bytes: int = 0

    def tile(self, n: int) -> Batch:
        """Return a batch of n samples, repeated from the workload's sample."""
        work = self.workload
        return cutting.tile(work.sample, n, shared=work.shared, per_sample=work.per_sample)

    def window(self, n: int, steps: int = 2) -> Callable[[OnPhase], None]:
        """Return a function that trains one uncompiled window."""
        piece = self.tile(n)

        def train(on_phase: OnPhase) -> None:
            with compiled.uncompiled(), _naming_size(n):
                step.train_window(self.context, [piece] * steps, (n,) * steps, on_phase=on_phase)
                step.run_between(self.context, on_phase=on_phase)

        return train

    def train(self, sizes: Split, on_phase: OnPhase | None = None) -> None:
        """Train one window of these micro-batches as the Runner does."""
        pieces = [self.tile(size) for size in sizes]
        with compiled.as_trained(self.context):
            step.train_window(self.context, pieces, sizes, on_phase=on_phase)
            step.run_between(self.context, on_phase=on_phase)

    def drop_gradients(self) -> None:
        """Set all gradients to None."""
        self.context.model.zero_grad(set_to_none=True)
        self.context.optimizer.zero_grad(set_to_none=True)

    @property
    def sample_bytes(self) -> int:
        """Bytes that each further sample adds to a batch."""
        return _tensor_bytes(self.tile(2)) - _tensor_bytes(self.tile(1))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the model's gradients on the device."""
        return self._bytes_here(p for p in self.context.model.parameters() if p.requires_grad)

    @property
    def held_state_bytes(self) -> int:
        """Bytes of the optimizer state that exists now on the device."""
        values = (value for state in self.context.optimizer.state.values() for value in state.values())
        return self._bytes_here(value for value in values if isinstance(value, torch.Tensor))

    @staticmethod
    def _bytes_here(tensors: Iterable[torch.Tensor]) -> int:
        """Return the bytes of tensors, without shards that FSDP2 keeps elsewhere."""
        return sum(local_bytes(each) for each in tensors if device_of(each).type == each.device.type)


@contextlib.contextmanager
def one_after_the_other(context: step.TrainingContext) -> Iterator[None]:
    """Run the window's micro-batches without lanes meanwhile, to record them."""
    before = context.batchnorm, context.batch_interactions
    if context.runs_in_lanes:
        context.batchnorm = context.batch_interactions = None
    try:
        yield
    finally:
        context.batchnorm, context.batch_interactions = before


def _tensor_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in tree.tensors(batch))


@contextlib.contextmanager
def _naming_size(n: int) -> Iterator[None]:
    """Note the size on an error that the first size didn't raise."""
    try:
        yield
    except Exception as error:
        if n > _FIRST_SAMPLES and not isinstance(error, AutoaccumError) and not is_out_of_memory(error):
            error.add_note(
                f"autoaccum: raised while planning, with micro-batches of {n} samples, after one of fewer had worked. "
                "Planning and training run micro-batches of several sizes, so a model can't keep something of its "
                "batch's size (a hidden state, a mask) from one forward to the next."
            )
        raise
