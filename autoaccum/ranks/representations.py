"""Bring all ranks' representations together, for a loss over all of them.

Every rank has encoded its own samples. All representations are brought to every rank, which computes the whole loss of
them, and backpropagates its own rows. A tensor of all rows is 0 where other ranks' are, and its bytes are summed: any
type's bytes come out as they were, on any backend, with any number of rows on each.

What the loss itself draws is drawn alike on all ranks, and gradients of parameters that only the loss uses are the
first rank's: on each they are those of the whole loss, and a sum over ranks would count them as often.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..data import tree
from ..errors import UsageError
from ..state.rng import put_rng, take_rng

_Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Described:
    """A rank's representations without their values.

    Attributes:
        rows: Their samples.
        layout: Path, dtype and shape of one sample, for each tensor that has rows.
        tree: The representations, with a path in the place of each of these; None where there are none.
        seed: A number that this rank drew.
    """

    rows: int
    layout: _Layout
    tree: Any
    seed: int


@dataclass(frozen=True)
class Met:
    """The representations of all ranks.

    Attributes:
        together: A tree whose tensors take gradients; in the order of ranks.
        own: This rank's rows.
        is_first: Whether this rank keeps what only the loss's own parameters get, and the loss.
        seed: A number that is the same on all ranks, and another one in each window.
    """

    together: Any
    own: slice
    is_first: bool
    seed: int

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of this rank's rows, by path."""
        leaves = [(path, leaf) for path, leaf in tree.leaves(self.together) if isinstance(leaf, torch.Tensor)]
        return {path: leaf.grad[self.own].clone() for path, leaf in leaves if leaf.grad is not None}


def describe(own: Any, rows: int) -> Described:
    """Describe a rank's representations; draws one number."""
    seed = int(torch.randint(1 << 31, (), device="cpu"))
    if own is None:
        return Described(0, (), None, seed)
    cut = [(path, leaf) for path, leaf in tree.leaves(own) if _has_rows(leaf, rows)]
    names = {path for path, _ in cut}
    skeleton = tree.map_leaves(own, lambda path, leaf: path if path in names else _on(leaf, torch.device("cpu")))
    return Described(rows, tuple((path, leaf.dtype, tuple(leaf.shape[1:])) for path, leaf in cut), skeleton, seed)


def require_alike(said: Sequence[Described]) -> None:
    """Refuse representations that can't be joined over ranks.

    Raises:
        UsageError: Names what differs; the same on all ranks.
    """
    there = [(rank, each) for rank, each in enumerate(said) if each.rows]
    for rank, each in there[1:]:
        first = there[0][1]
        if each.layout != first.layout:
            raise UsageError(
                f"The representations of ranks {there[0][0]} and {rank} can't be joined: {_shown(first.layout)} there, "
                f"{_shown(each.layout)} here.",
                "A loss over the representations of all ranks needs tensors that differ in their samples only.",
                "Let encode= return such tensors: pooled over the sequence, or padded to one length.",
            )


class Meeting:
    """Bring the rows of all ranks to each; making it needs memory.

    Args:
        said: What each rank has.
        rank: This one.
        own: Its representations; None for none.
        device: Where they are.
    """

    def __init__(self, said: Sequence[Described], rank: int, own: Any, device: torch.device) -> None:
        self._model, self._device = next((each for each in said if each.rows), said[0]), device
        self._rank, self._seed = rank, said[0].seed
        total, first = sum(each.rows for each in said), sum(each.rows for each in said[:rank])
        self._own = slice(first, first + said[rank].rows)
        mine = {} if own is None else dict(tree.leaves(own))
        self._whole = dict[str, torch.Tensor]()
        for path, dtype, shape in self._model.layout:
            self._whole[path] = torch.zeros(total, *shape, dtype=dtype, device=device)
            if path in mine:
                self._whole[path][self._own] = mine.pop(path).detach()

    def run(self, wait: Callable[[Any], None]) -> Met:
        """Fill in the rows of other ranks.

        Args:
            wait: Waits for a collective.
        """
        whole, device = self._whole, self._device
        as_bytes = [tensor.view(-1).view(torch.uint8) for tensor in whole.values()]
        for work in [dist.all_reduce(each, async_op=True) for each in as_bytes]:
            wait(work)
        for tensor in whole.values():
            tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())
        filled = tree.map_leaves(
            self._model.tree, lambda path, leaf: whole[path] if path in whole else _on(leaf, device)
        )
        return Met(filled, self._own, self._rank == 0, self._seed)


@contextlib.contextmanager
def drawing_alike(seed: int) -> Iterator[None]:
    """Draw the same random numbers on all ranks; restore each rank's own."""
    before = take_rng()
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed(seed)
    try:
        yield
    finally:
        put_rng(before)


def _has_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows


def _on(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf


def _shown(layout: _Layout) -> str:
    return ", ".join(f"{path}: {dtype} {shape}" for path, dtype, shape in layout) or "no tensor with its samples"
