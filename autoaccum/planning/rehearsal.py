"""Find how many samples the first window can have, without an out-of-memory.

Recording begins with a window of two samples. Where not even that fits, trying it would cause an out-of-memory and
torch's log of it. So the memory of one forward without gradients is added up first, which is more than what a forward
saves for its backward. Where a window of that much may come near the capacity, it is rehearsed operation by operation:
the outputs of each are known from its arguments' shapes, and the rehearsal ends where the allocator has no place for
one.

A rehearsal is not recorded: under a dispatch mode autograd adds gradients out of place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..devices import oom
from ..devices.cuda.device import CudaDevice
from ..devices.cuda.recurrent import hidden_sizes
from ..phases import FIRST
from ..simulation.cuda_allocator.replay import replay_cuda
from ..simulation.cuda_allocator.settings import LARGE_SEGMENT_BYTES
from ..simulation.recording import Event, Phase
from ..simulation.solver import CAPACITY_MARGIN
from ..torch_compat import TorchDispatchMode, local_bytes, local_tensors, storage_id, tree_leaves, tree_map
from ..units import show_bytes
from ..window import step
from ..window.compiled import uncompiled
from ..window.forward_only import forward_only
from .record import FIRST_STEP_SAMPLES
from .target import RecordingTarget

WINDOWS = 2  # the first makes the optimizer's state, the second has it
BACKWARD_BLOCKS = 4  # of the largest size, that a backward has beside saved tensors: gradients
STATE_BYTES_PER_PARAMETER = 8  # an Adam's two averages in fp32
SMALL_BYTES = 1 << 20  # smaller blocks share segments of 2 MiB, for which the margin has room


def samples_to_begin_with(subject: RecordingTarget, least: int, start_over: Callable[[], None]) -> int:
    """Return the first window's samples: two, or fewer in short memory.

    Args:
        subject: What is planned.
        least: The smallest micro-batch allowed.
        start_over: Puts back what training changed.

    Raises:
        NoPlace: Not even the fewest fit.
    """
    most = max(least, FIRST_STEP_SAMPLES)
    failure = ""
    for n in range(most, least - 1, -1) if _comes_near(subject, least, most) else ():
        found = _rehearsed(subject, n)
        start_over()
        subject.context.has_begun = False  # so that the recorded one is the first
        if not found:
            return n
        failure = f"windows of {n} don't fit: {found}"
        subject.progress(failure)
    if failure:
        raise NoPlace(failure)
    return most


def _comes_near(subject: RecordingTarget, least: int, most: int) -> bool:
    """Return whether the first window may exceed the capacity."""
    context, device = subject.context, subject.device
    assert isinstance(device, CudaDevice)
    watch = Watch(device)
    piece = subject.tile(least)
    try:
        with watch:
            forward_only(context, lambda: step.forward(context, piece))
    except RuntimeError as error:
        if not oom.is_out_of_memory(error):
            return False  # the recorded window reports the error
        oom.drop_frames(error)
        return True
    except Exception:
        return False
    finally:
        subject.device.clean()
        subject.remove_appended()
    trained = [p for p in context.model.parameters() if p.requires_grad]
    entries = sum(part.numel() for p in trained for part in local_tensors(p))
    state = STATE_BYTES_PER_PARAMETER * entries if not context.optimizer.state else 0
    kept = device.allocated_bytes() + sum(local_bytes(p) for p in trained) + state
    worst = kept + (watch.made_bytes + BACKWARD_BLOCKS * watch.largest_bytes) * -(-most // least)
    return worst > watch.capacity_bytes - watch.margin_bytes


def _rehearsed(subject: RecordingTarget, n: int) -> str:
    """Return the failure of windows of n samples, or ""."""
    assert isinstance(subject.device, CudaDevice)
    context, piece, steps = subject.context, subject.tile(n), subject.device.policy.first_step_micro_batches
    try:
        with uncompiled(), Watch(subject.device):
            for _ in range(WINDOWS):
                step.train_window(context, [piece] * steps, (n,) * steps)
                step.run_between(context)
    except Exception as error:
        return oom.drop_frames(error).split(": ", 1)[1] if oom.is_out_of_memory(error) else ""
    return ""


class NoPlace(torch.OutOfMemoryError):
    """The allocator would have no room for a block."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up operations' outputs; stop before one that does not fit.

    Args:
        device: The CUDA device.

    Attributes:
        made_bytes: Bytes of all outputs so far, freed ones included.
        largest_bytes: The largest of them.
        capacity_bytes: What the allocator can reserve, what it holds included.
        margin_bytes: What has to stay free for the memory that kernels allocate themselves.
    """

    supports_higher_order_operators = True

    def __init__(self, device: CudaDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.made_bytes = self.largest_bytes = 0
        self._known: dict[Any, tuple[int, ...]] = {}
        self._room = 0  # a lower bound of what the driver can still give
        self.margin_bytes = 0
        self.capacity_bytes = device.held_bytes() + device.obtainable_bytes()
        self.margin_bytes = int(CAPACITY_MARGIN * self.capacity_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check that the operation's outputs fit, then run it."""
        sizes = self._made_by(func, args, kwargs or {})
        self.made_bytes += sum(sizes)
        self.largest_bytes = max(self.largest_bytes, *sizes, 0)
        large = [size for size in sizes if size > SMALL_BYTES]
        if large:
            self._check(large)
        return func(*args, **(kwargs or {}))

    def _check(self, sizes: list[int]) -> None:
        """Raise where the allocator would have no place for an operation's blocks."""
        needed = sum(sizes) + LARGE_SEGMENT_BYTES * len(sizes)
        self._room -= needed
        if self._room >= 0:
            return
        room = self.device.obtainable_bytes() - self.margin_bytes
        if needed <= room:
            self._room = room - needed
            return
        reserved = self.device.held_bytes()
        rules = replace(self.device.read_rules(), capacity_bytes=reserved + max(0, room))
        events = tuple(Event((1 << 60) + index, size) for index, size in enumerate(sizes))
        found = replay_cuda([Phase(FIRST, events)], rules, self.device.read_allocator())
        if found.out_of_memory is not None:
            used, whole = self.device.allocated_bytes(), self.capacity_bytes
            raise NoPlace(
                f"{show_bytes(sum(sizes))} more are needed, where {show_bytes(used)} of {show_bytes(whole)} are in use"
            )

    def _made_by(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Return the sizes of an operation's outputs; none where unknown beforehand."""
        leaves = tree_leaves((args, kwargs))
        if not self._is_here(leaves, kwargs):
            return ()
        key = (func, *map(_description, leaves), *kwargs)
        hidden = hidden_sizes(func.name(), args)
        try:
            if key not in self._known:
                self._known[key] = _sizes(func, args, kwargs)
            return self._known[key] + hidden
        except Exception:  # no rule for its shapes, or one that hangs on values
            return hidden

    def _is_here(self, leaves: list[Any], kwargs: dict[str, Any]) -> bool:
        device = kwargs.get("device")
        if device is not None:
            return torch.device(device).type == "cuda"
        return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)


def _description(leaf: Any) -> Any:
    """Return a key that is equal for equally large outputs."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    return type(leaf), leaf


def _sizes(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return the sizes of an operation's outputs by its meta kernel."""
    args, kwargs = tree_map(_without_data, (args, kwargs))
    before = {storage_id(each.untyped_storage()) for each in _tensors((args, kwargs))}
    made = {storage_id(each.untyped_storage()): each.untyped_storage() for each in _tensors(func(*args, **kwargs))}
    return tuple(storage.nbytes() for name, storage in made.items() if name not in before)


def _without_data(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
