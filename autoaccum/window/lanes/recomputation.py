"""Choose what is computed again in the backward, and compute it.

Where a saved tensor follows by cheap operations from what is kept anyway (the input of a normalization, above all), or
from less, neither the host nor the device keeps it. It is computed again when the backward asks for it: within one
stretch of a lane between two meetings, from what was kept before the stretch or in it. So what is kept of most nets are
the inputs of their normalizations. The bits are the same: the same kernels run on the same numbers.

The idea is that of Chen, Xu, Zhang and Guestrin (2016, arXiv:1604.06174) and, for activated normalizations, of Rota
Bulo, Porzi and Kontschieder (2018, arXiv:1712.02616); here the operations are found while they run, so that it needs no
function to call again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .recipes import Held, Layout, Value, Values, View, is_dense
from .torch_internals import modes_off, storage_behind
from .transfers import Kept

MOST_STEPS = 24  # operations for one saved tensor


@dataclass(eq=False)
class Recipe:
    """A saved tensor that is computed again.

    Attributes:
        value: What it is of.
        layout: Its place there.
        stretch: Where it was saved: the lane, and how many meetings that had had.
        hosts: What has to come back from the host for it.
        is_pending: Whether nobody asked for it yet.
    """

    value: Value
    layout: Layout
    stretch: tuple[int, int]
    hosts: tuple[Kept, ...]
    is_pending: bool = True


class Keeper(Protocol):
    """What keeps tensors for the backward."""

    def known(self, view: View) -> Kept | None:
        """Return what is on the host already."""

    def keep(self, tensor: torch.Tensor, view: View) -> Kept | Held:
        """Keep a tensor on the host, or where it is."""

    def owned(self, value: Value) -> torch.Tensor | None:
        """Return the parameter or buffer that a value is of."""


class Recomputation:
    """Compute again, in one window, what lanes saved.

    Args:
        keeper: Keeps what it is computed from.
        before_write: Called before something is written over that is copied to the host.

    Attributes:
        values: What the lanes' storages hold.
        bytes: What was computed again in this window.
    """

    def __init__(self, keeper: Keeper, before_write: Callable[[], None]) -> None:
        self.values = Values(self._before_write)
        self.bytes = 0
        self._keeper, self._settle = keeper, before_write
        self._found: set[Value] = set()
        self._stretch = 0, 0

    def end(self) -> None:
        """Forget the window's tensors."""
        self.values.clear()
        self._release()

    # As tensors are saved

    def recipe(self, tensor: torch.Tensor, least_bytes: int) -> Recipe | None:
        """Return how a tensor is computed again, if it is.

        Args:
            tensor: What is saved.
            least_bytes: What is smaller may be held on the device.
        """
        value, layout = self.values.of(tensor), Layout.of(tensor)
        if value is None or not self._is_made_here(value, layout):
            return None
        leaves = self._leaves(value)
        if leaves is None:
            return None
        new = [view for view, kept in leaves if kept is None]
        large = [view for view in new if not self._is_small(view, least_bytes)]
        if any(not is_dense(view.layout.shape, view.layout.stride) for view in large):
            return None
        added = sum(view.layout.bytes for view in large)
        shared = added == tensor.nbytes and any(view.value.joins > 1 for view, _ in leaves)  # and the next is for less
        if added >= tensor.nbytes and not shared:
            return None
        for view in new:
            made = _tensor_at(view, self._keeper.owned(view.value))
            view.value.kept[view.layout] = self._keeper.keep(made, view) if view in large else Held.of(made)
        value.pending += 1
        found = dict.fromkeys(view.value.kept.get(view.layout) for view, _ in leaves)
        hosts = tuple(each for each in found if isinstance(each, Kept))
        return Recipe(value, layout, self.values.stretch, hosts)

    def _leaves(self, value: Value) -> list[tuple[View, Kept | Held | None]] | None:
        """Return what a value follows from, and what of it is kept.

        None where something isn't there any more.
        """
        found: dict[tuple[int, Layout], tuple[View, Kept | Held | None]] = {}
        pending, seen = [value], {id(value)}
        while pending:
            step = pending.pop().step
            assert step is not None
            for view in step.views:
                inner = view.value
                kept = self._kept(view)
                if kept is None and self._is_made_here(inner, view.layout):
                    if id(inner) not in seen:
                        seen.add(id(inner))
                        pending.append(inner)
                    if len(seen) > MOST_STEPS:
                        return None
                elif kept is None and (not inner.is_current or inner.storage.expired()):  # type: ignore[no-untyped-call]
                    return None
                else:
                    found[id(inner), view.layout] = view, kept
        return list(found.values())

    def _is_made_here(self, value: Value, layout: Layout) -> bool:
        """Return whether a cheap operation made a value a moment ago.

        Since the meeting before the last. From further back it would take what other stretches need as well, and chains
        of residual sums would be as long as the net.
        """
        if value.step is None or value.layout is None or value.layout.dtype != layout.dtype:
            return False
        (lane, part), (here, now) = value.stretch, self.values.stretch
        return lane == here and now - part <= 1

    def _kept(self, view: View) -> Kept | Held | None:
        kept = view.value.kept.get(view.layout)
        if kept is None:
            kept = self._keeper.known(view)
            if kept is not None:
                view.value.kept[view.layout] = kept
        return kept

    def _is_small(self, view: View, least_bytes: int) -> bool:
        """Return whether the device may hold a tensor's storage."""
        if self._keeper.owned(view.value) is not None:
            return True
        return view.layout.bytes < least_bytes and storage_behind(view.value.storage).nbytes() < least_bytes

    def _before_write(self, value: Value) -> None:
        """Save what is kept on the device from being written over."""
        if any(isinstance(kept, Kept) for kept in value.kept.values()):
            self._settle()
        with torch.no_grad():
            for layout, kept in value.kept.items():
                if isinstance(kept, Held):
                    value.kept[layout] = Held.of(kept.tensor.clone())

    # As the backward asks for them

    def compute(self, recipe: Recipe, bring: Callable[[Kept], torch.Tensor]) -> torch.Tensor:
        """Return a saved tensor, computed again now or a moment ago.

        Args:
            recipe: How.
            bring: Brings back what is on the host.
        """
        value, layout = recipe.value, recipe.layout
        if recipe.stretch != self._stretch:
            self._release()
            self._stretch = recipe.stretch
        if recipe.is_pending:
            recipe.is_pending = False
            value.pending -= 1
        with torch.no_grad(), modes_off():
            base = self._computed(value, _Course(bring, _uses(value)))
        if value.pending:  # the next operation often saved the same
            value.found = base
            self._found.add(value)
        else:
            value.found = None
            self._found.discard(value)
        return base.as_strided(layout.shape, layout.stride, layout.offset)

    def _computed(self, value: Value, course: _Course) -> torch.Tensor:
        if value.found is not None:
            return value.found
        made = course.take(value)
        if made is not None:
            return made
        step = value.step
        assert step is not None and value.layout is not None
        writes_over = step.write_over is not None and self._is_spare(step.args[0], value.layout, course)
        args = [self._argument(each, course) for each in step.args]
        named = {name: self._argument(each, course) for name, each in step.kwargs.items()}
        out = (step.write_over if writes_over and step.write_over else step.repeat)(*args, **named)
        del args, named
        out = _as_made(out[value.output] if isinstance(out, (tuple, list)) else out, value.layout)
        self.bytes += out.nbytes
        course.give(value, out)
        return out

    def _argument(self, argument: Any, course: _Course) -> Any:
        if isinstance(argument, list):
            return [self._argument(each, course) for each in argument]
        if not isinstance(argument, View):
            return argument
        value, layout = argument.value, argument.layout
        kept = value.kept.get(layout)
        if isinstance(kept, Kept):
            return course.bring(kept)
        if kept is not None:
            return kept.unchanged()
        base = self._computed(value, course)
        return base if layout == value.layout else base.as_strided(layout.shape, layout.stride, layout.offset)

    def _is_spare(self, argument: Any, layout: Layout, course: _Course) -> bool:
        """Return whether a result may take an argument's place.

        It may where that is computed for it alone.
        """
        if not isinstance(argument, View) or argument.layout != layout or argument.value.layout != layout:
            return False
        value = argument.value
        return layout not in value.kept and value.found is None and course.uses[id(value)] == 1

    def _release(self) -> None:
        for value in self._found:
            value.found = None
        self._found.clear()


class _Course:
    """What one computation has made so far.

    Args:
        bring: Brings back what is on the host.
        uses: By value, how many operations need it.
    """

    def __init__(self, bring: Callable[[Kept], torch.Tensor], uses: Counter[int]) -> None:
        self.bring, self.uses = bring, uses
        self._left = uses.copy()
        self._made: dict[int, torch.Tensor] = {}

    def give(self, value: Value, made: torch.Tensor) -> None:
        """Hold what other operations need as well."""
        self._left[id(value)] -= 1
        if self._left[id(value)] > 0:
            self._made[id(value)] = made

    def take(self, value: Value) -> torch.Tensor | None:
        """Return what was made; let it go after its last use."""
        made = self._made.get(id(value))
        if made is not None:
            self._left[id(value)] -= 1
            if self._left[id(value)] <= 0:
                del self._made[id(value)]
        return made


def _uses(value: Value) -> Counter[int]:
    """Return by value how many operations below one need it."""
    found = Counter[int]()
    pending = [value]
    while pending:
        step = pending.pop().step
        assert step is not None
        for view in step.views:
            inner = view.value
            if view.layout in inner.kept or inner.found is not None:
                continue
            if not found[id(inner)]:
                pending.append(inner)
            found[id(inner)] += 1
    return found


def _as_made(out: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return a result in the type and order that it had.

    An operation in place keeps those of its argument; computed apart it may have others.
    """
    if (out.dtype, out.shape, out.stride()) == (layout.dtype, layout.shape, layout.stride):
        return out
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=out.device).copy_(out)


def _tensor_at(view: View, owner: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor in a storage that is alive.

    Args:
        view: Its place there.
        owner: The parameter or buffer whose storage it is; None where nothing but a weak reference is known.
    """
    layout = view.layout
    if owner is not None:  # with its count of writes
        return owner.detach().as_strided(layout.shape, layout.stride, layout.offset)
    storage = storage_behind(view.value.storage)
    return torch.empty(0, dtype=layout.dtype, device=storage.device).set_(
        storage, layout.offset, layout.shape, layout.stride
    )
