"""How many samples the very first window can have on a CUDA device, known before the allocator runs out of memory.

Recording begins with a window of two samples. Where not even that fits, trying it would cost an out-of-memory, with
torch's lines about it. So one forward without gradients is weighed first: all that it makes is more than what it saves
for a backward. Where a window made of that may come near the device's end, it is rehearsed operation by operation: what
each makes is known from its arguments' shapes, and where the allocator would have no place for it, the rehearsal ends.

Nothing of this is recorded, since operations that are watched hand their gradients on in other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..devices import oom
from ..devices.cuda.device import CudaDevice
from ..phases import FIRST
from ..simulation.cuda_allocator.replay import replay_cuda
from ..simulation.cuda_allocator.settings import LARGE_SEGMENT_BYTES
from ..simulation.recording import Event, Phase
from ..simulation.solver import CAPACITY_MARGIN
from ..torch_compat import TorchDispatchMode, storage_id, tree_leaves, tree_map
from ..units import show_bytes
from ..window import step
from ..window.compiled import uncompiled
from ..window.forward_only import forward_only
from .record import FIRST_STEP_SAMPLES
from .target import RecordingTarget

WINDOWS = 2  # the first makes the optimizer's state, the second has it
BACKWARD = 4  # times its largest block, in what a backward has beside what was saved for it: gradients of that size
STATE_BYTES = 8  # for each parameter: an Adam's two averages in fp32
SMALL = 1 << 20  # what is no larger shares segments of 2 MiB, for which the margin has room


def samples_to_begin_with(subject: RecordingTarget, least: int, start_over: Callable[[], None]) -> int:
    """The samples of the first window: two, or fewer where two run out of memory.

    Args:
        subject: What is planned.
        least: The smallest micro-batch allowed.
        start_over: Puts all back as it was.

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
    """Whether the first window, at worst, takes more than there is."""
    context, device = subject.context, subject.device
    assert isinstance(device, CudaDevice)
    watch = Watch(device)
    piece = subject.tile(least)
    try:
        with watch:
            forward_only(context, lambda: step.forward(context, piece))
    except RuntimeError as error:
        if not oom.is_out_of_memory(error):
            return False  # what goes wrong is the recorded window's to say
        oom.drop_frames(error)
        return True
    except Exception:
        return False
    finally:
        subject.device.clean()
        subject.remove_appended()
    trained = [p for p in context.model.parameters() if p.requires_grad]
    state = STATE_BYTES * sum(p.numel() for p in trained) if not context.optimizer.state else 0
    kept = device.allocated_bytes() + sum(p.nbytes for p in trained) + state
    worst = kept + (watch.made_bytes + BACKWARD * watch.largest_bytes) * -(-most // least)
    return worst > watch.capacity_bytes - watch.margin_bytes


def _rehearsed(subject: RecordingTarget, n: int) -> str:
    """What was asked for in vain in windows of n samples; empty where they fit, or where that can't be seen."""
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
    """The allocator would have no place for a block; it wasn't asked."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operations make on a device, and stops one that the allocator would have no place for.

    Args:
        device: The CUDA device.

    Attributes:
        made_bytes: What was made so far, whatever has become of it.
        largest_bytes: The largest block among that.
        capacity_bytes: What the allocator can have, what it holds included.
        margin_bytes: What has to be left, for what kernels take for themselves.
    """

    supports_higher_order_operators = True

    def __init__(self, device: CudaDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.made_bytes = self.largest_bytes = 0
        self._known: dict[Any, tuple[int, ...]] = {}
        self._room = 0  # what surely can be had from the driver still
        self.margin_bytes = 0
        self.capacity_bytes = device.held_bytes() + device.obtainable_bytes()
        self.margin_bytes = int(CAPACITY_MARGIN * self.capacity_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Asks for the operation's outputs, then runs it."""
        for size in self._made_by(func, args, kwargs or {}):
            self.made_bytes += size
            self.largest_bytes = max(self.largest_bytes, size)
            if size > SMALL:
                self._ask(size)
        return func(*args, **(kwargs or {}))

    def _ask(self, size: int) -> None:
        """Raises where the allocator would have no place for a block of that size."""
        self._room -= size + LARGE_SEGMENT_BYTES
        if self._room >= 0:
            return
        room = self.device.obtainable_bytes() - self.margin_bytes
        if size + LARGE_SEGMENT_BYTES <= room:
            self._room = room - size - LARGE_SEGMENT_BYTES
            return
        reserved = self.device.held_bytes()
        rules = replace(self.device.read_rules(), capacity_bytes=reserved + max(0, room))
        found = replay_cuda([Phase(FIRST, (Event(1 << 60, size),))], rules, self.device.read_allocator())
        if found.out_of_memory is not None:
            used, whole = self.device.allocated_bytes(), self.capacity_bytes
            raise NoPlace(
                f"{show_bytes(size)} more would be needed, where {show_bytes(used)} of {show_bytes(whole)} are in use"
            )

    def _made_by(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """The sizes of what an operation makes on the device; none where that can't be known beforehand."""
        leaves = tree_leaves((args, kwargs))
        if not self._is_here(leaves, kwargs):
            return ()
        key = (func, *map(_description, leaves), *kwargs)
        try:
            if key not in self._known:
                self._known[key] = _sizes(func, args, kwargs)
            return self._known[key]
        except Exception:  # no rule for its shapes, or one that hangs on values
            return ()

    def _is_here(self, leaves: list[Any], kwargs: dict[str, Any]) -> bool:
        device = kwargs.get("device")
        if device is not None:
            return torch.device(device).type == "cuda"
        return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in leaves)


def _description(leaf: Any) -> Any:
    """Equal for arguments with which an operation makes equally large blocks."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    return type(leaf), leaf


def _sizes(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The sizes of an operation's new blocks, by running it on tensors without data."""
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
