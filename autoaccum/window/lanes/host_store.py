"""Keep what lanes save for the backward on the host.

Saved tensors above a threshold go to buffers on the host as they are saved, and come back in the backward. So a GPU
holds one lane's stretch between two meetings, and of the others only what crosses a meeting.

Lanes go back in the reverse order of their forward (backward_order.py), so what the operation before saved is needed
next: it is brought back meanwhile. One tensor ahead, whatever the time that takes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ...torch_compat import storage_id, write_count
from .host_buffers import HostBuffers
from .recipes import Held, Layout, RecipeMode, Value, View, is_dense, overwritten
from .recomputation import Recipe, Recomputation
from .torch_internals import next_sequence_number
from .transfers import Arriving, Kept, Transfers

THRESHOLD_BYTES = 1 << 20  # what is smaller stays on the device
MOST_PASSES = 4  # other tensors that may be needed before the one that was brought back ahead


Saved = Held | Kept | Recipe


class HostStore:
    """Hold one window's saved tensors on the host.

    Args:
        device: The device that they come from.
        limit_bytes: What the buffers may use; None for all but a tenth of what is available at the first window.
        copies: Whether anything is copied; where a device computes nothing, its tensors have no values.

    Attributes:
        buffers: Where they wait.
        saved_bytes: What the last window moved to the host.
        returned_bytes: What it brought back, a tensor that two operations saved twice.
        late: How many tensors it began to bring back when they were needed, not before.
        moved: The bytes of each tensor that the last window moved to the host, in order.
        recomputation: Computes saved tensors again, where that is asked for.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None, *, copies: bool = True) -> None:
        self.buffers = HostBuffers(limit_bytes, pinned=copies and device.type == "cuda")
        self.saved_bytes = self.returned_bytes = self.late = 0
        self.moved: list[int] = []
        self._device = device
        self._transfers = Transfers(device, copies=copies)
        self.recomputation = Recomputation(self, self._transfers.settle)
        self._part = 0
        self._recomputes = False
        self._stay: dict[int, torch.Tensor] = {}
        self._casts: set[tuple[torch.Size, torch.dtype]] = set()
        self._bytes_per_sample: int | None = None
        self._parts: int | None = None
        self._gathered: set[int] = set()
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, Kept]] = {}
        self._saves: list[Kept | None] = []  # in order; None once it is back
        self._firsts: list[int] = []  # for each save, the index of its node's first one
        self._node: tuple[int, int] | None = None  # that saved last
        self._first = 0
        self._recent: list[Arriving] = []  # what arrived last, and is needed again
        self._ahead: Arriving | None = None
        self._passes = 0

    @property
    def bytes(self) -> int:
        """Return what the buffers use."""
        return self.buffers.bytes

    def begin(
        self,
        stay: Sequence[torch.Tensor],
        bytes_per_sample: int | None = None,
        cast: torch.dtype | None = None,
        parts: int | None = None,
        *,
        recomputes: bool = False,
    ) -> None:
        """Begin a window, in empty buffers.

        Args:
            stay: Tensors that are on the device anyway: parameters and buffers.
            bytes_per_sample: What moves: tensors of at least so many bytes for each sample of their lane; None for
                those of 1 MiB and more.
            cast: The type that autocast casts parameters to. Such a copy belongs to all lanes, and stays.
            parts: Of how many parts of each lane, the first ones; None for all. What is saved last is needed first.
            recomputes: Whether what follows by cheap operations is computed again, and not kept.
        """
        self.end()
        self.recomputation.bytes = 0
        self._stay = {storage_id(tensor.untyped_storage()): tensor for tensor in stay}
        shapes = {tensor.shape for tensor in stay if tensor.dtype != cast} if cast is not None else set()
        self._casts = {(each, cast) for shape in shapes for each in (shape, shape[::-1]) if cast is not None}
        self._bytes_per_sample, self._parts, self._part, self._gathered = bytes_per_sample, parts, 0, set()
        self._recomputes = recomputes
        self.moved = []
        self.saved_bytes = self.returned_bytes = self.late = 0
        self.buffers.empty()

    def end(self) -> None:
        """Forget the window's tensors; keep the buffers."""
        self._transfers.settle()
        self._release_ahead()
        self.recomputation.end()
        self._known.clear()
        self._saves.clear()
        self._firsts.clear()
        self._node = None
        self._recent.clear()

    def move_gathered(self, rows: set[int]) -> None:
        """Move what has the rows of all lanes, too, whatever its size.

        In short windows it is small and in long ones large, and both are to move alike.

        Args:
            rows: How many rows gathered tensors have; more may be added meanwhile.
        """
        self._gathered = rows

    def enter(self, lane: int, part: int) -> None:
        """Note which lane runs, and in which part: after how many meetings."""
        self._part = part
        self.recomputation.values.stretch = lane, part

    def end_forward(self) -> None:
        """Note that nothing more is saved.

        What stays on the device is freed with what needs it.
        """
        self.recomputation.values.clear()

    def moving(self, samples: int) -> AbstractContextManager[Any]:
        """Move what is saved in this thread meanwhile.

        Args:
            samples: Those of its lane. What moves then depends on none of the window's other sizes.
        """
        per_sample = self._bytes_per_sample
        least_bytes = THRESHOLD_BYTES if per_sample is None else per_sample * samples
        stack = ExitStack()
        stack.enter_context(saved_tensors_hooks(partial(self._pack, least_bytes), self._unpack))
        if self._recomputes:
            stack.enter_context(RecipeMode(self.recomputation.values))
        return stack

    # As tensors are saved

    def _pack(self, least_bytes: int, tensor: torch.Tensor) -> Saved:
        if not self._may_move(tensor, least_bytes):
            return Held.of(tensor)
        if not self._recomputes:
            return self._noted(self._kept(tensor, Layout.of(tensor), write_count(tensor)) or Held.of(tensor))
        values = self.recomputation.values
        values.paused = True
        try:
            recipe = self.recomputation.recipe(tensor, least_bytes)
            if recipe is not None:
                return self._noted(recipe)
            kept = self._kept(tensor, Layout.of(tensor), write_count(tensor))
            held = kept or Held.of(tensor)
            values.note_kept(tensor, held)
            return self._noted(held)
        finally:
            values.paused = False

    def _kept(self, tensor: torch.Tensor, layout: Layout, writes: int) -> Kept | None:
        """Move a tensor to the host, once; None where it stays."""
        if self._parts is not None and self._part >= self._parts:
            return None
        storage = tensor.untyped_storage()
        key = storage_id(storage), layout, writes
        known = self._known.get(key)
        kept = None if known is None or known[0].expired() else known[1]  # type: ignore[no-untyped-call]
        if kept is None:
            kept = Kept(self.buffers.place(tensor.nbytes), tensor.shape, tensor.stride(), tensor.dtype)
            self._transfers.send(tensor, kept)
            self.saved_bytes += tensor.nbytes
            self.moved.append(tensor.nbytes)
            self._known[key] = StorageWeakRef(storage), kept  # type: ignore[no-untyped-call]
        return kept

    # What recomputation asks for

    def known(self, view: View) -> Kept | None:
        """Return what is on the host already."""
        known = self._known.get((view.value.storage.cdata, view.layout, view.writes))
        return known[1] if known is not None else None

    def keep(self, tensor: torch.Tensor, view: View) -> Kept | Held:
        """Keep a tensor on the host, or where it is."""
        return self._kept(tensor, view.layout, view.writes) or Held.of(tensor)

    def owned(self, value: Value) -> torch.Tensor | None:
        """Return the parameter or buffer that a value is of."""
        return self._stay.get(value.storage.cdata)

    def _noted(self, saved: Saved) -> Saved:
        """Note what a node of the graph needs from the host."""
        hosts = saved.hosts if isinstance(saved, Recipe) else (saved,) if isinstance(saved, Kept) else ()
        for kept in hosts:
            self._note_save(kept)
        return saved

    def _note_save(self, kept: Kept) -> None:
        node = threading.get_ident(), next_sequence_number()  # equal for all that one node saves
        if node != self._node:
            self._node, self._first = node, len(self._saves)
        kept.saves.append(len(self._saves))
        self._saves.append(kept)
        self._firsts.append(self._first)

    def _may_move(self, tensor: torch.Tensor, least_bytes: int) -> bool:
        is_gathered = tensor.dim() > 1 and tensor.shape[0] in self._gathered
        if tensor.device.type != self._device.type or (tensor.nbytes < least_bytes and not is_gathered):
            return False
        if (tensor.shape, tensor.dtype) in self._casts:
            return False
        if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return False
        return storage_id(tensor.untyped_storage()) not in self._stay and is_dense(tensor.shape, tensor.stride())

    # As the backward asks for them

    def _unpack(self, kept: Saved) -> torch.Tensor:
        if isinstance(kept, Held):
            return kept.unchanged()
        self._transfers.settle()
        arrived: list[Arriving] = []
        if isinstance(kept, Recipe):
            found = self.recomputation.compute(kept, partial(self._bring, arrived))
            self._returned(kept.hosts, arrived)
            return found
        found = self._bring(arrived, kept)
        self._returned((kept,), arrived)
        return found

    def _bring(self, arrived: list[Arriving], kept: Kept) -> torch.Tensor:
        """Return a tensor that the computing stream can use."""
        if kept.overwritten:
            raise overwritten(kept.shape)
        of_recent = next((each for each in (*arrived, *self._recent) if each.kept is kept), None)
        arriving = of_recent or self._taken(kept)
        if arriving not in arrived:
            arrived.append(arriving)
        return self._transfers.receive(arriving)

    def _returned(self, hosts: Sequence[Kept], arrived: list[Arriving]) -> None:
        """Note that a saved tensor was needed; fetch what is next.

        Args:
            hosts: What it rests on.
            arrived: What was brought back for it.
        """
        ends = []
        for kept in hosts:
            if kept.saves:  # else an operation asks for it a second time
                ends.append(kept.saves.pop())
                self._saves[ends[-1]] = None
        recent = arrived or self._recent
        self._recent = [each for each in recent if each.kept.saves]  # the next operation often saved the same
        if ends:
            self._fetch_ahead(max(ends), hosts)

    def _taken(self, kept: Kept) -> Arriving:
        """Return a tensor that was brought back ahead, or begin to."""
        ahead = self._ahead
        if ahead is not None and ahead.kept is kept:
            self._ahead = None
            return ahead
        self._passes += 1
        self.late += 1
        return self._fetch(kept)

    def _fetch(self, kept: Kept) -> Arriving:
        arriving = self._transfers.fetch(kept)
        self.returned_bytes += arriving.tensor.nbytes
        return arriving

    def _fetch_ahead(self, at: int, now: Sequence[Kept]) -> None:
        """Begin to bring back what was saved before, if nothing is.

        Where things are computed again, what they rest on is often needed for the next one, too. Then it stays, and
        takes the place of what would be brought back: the device holds no more than without.

        Args:
            at: The index of the save that was needed.
            now: What it rests on.
        """
        if self._ahead is not None and self._passes >= MOST_PASSES:
            self._release_ahead()
        if self._ahead is not None:
            return
        skipped = () if self._recomputes else now
        expected = (self._saves[index] for index in self._expected_after(at))
        following = next((kept for kept in expected if kept is not None and kept not in skipped), None)
        is_here = self._recomputes and any(each.kept is following for each in self._recent)
        if following is not None and not is_here:
            self._ahead, self._passes = self._fetch(following), 0

    def _expected_after(self, at: int) -> Iterator[int]:
        """Yield indices of saves as the backward needs them.

        Nodes in reverse order, and what one node saved in its own.
        """
        first, end = self._firsts[at], at + 1
        while end < len(self._firsts) and self._firsts[end] == first:
            end += 1
        yield from range(at + 1, end)
        while first > 0:
            end, first = first, self._firsts[first - 1]
            yield from range(first, end)

    def _release_ahead(self) -> None:
        """Give back what was brought back ahead and isn't needed."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._transfers.receive(ahead)
