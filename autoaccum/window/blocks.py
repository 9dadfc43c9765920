"""Find a model's repeated blocks by structure.

Like the layers of a transformer: neighbours of one class in a ModuleList or Sequential, made of several modules each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

MIN_BLOCKS = 2  # a single block doesn't repeat


@dataclass(frozen=True)
class Blocks:
    """Hold the repeated blocks of a model.

    Attributes:
        path: Name of the ModuleList or Sequential that contains them; empty for the model itself.
        kind: Name of their class.
        modules: The blocks in order.
    """

    path: str
    kind: str
    modules: tuple[nn.Module, ...]


def find_blocks(model: nn.Module) -> Blocks | None:
    """Find the longest run of same-class children of a container.

    Of runs of one length the one with more weights wins. Bare layers don't count: they keep little besides what enters
    and leaves them.
    """
    found = _all_blocks(model)
    weights = {blocks: sum(p.numel() for block in blocks.modules for p in block.parameters()) for blocks in found}
    return max(found, key=lambda blocks: (len(blocks.modules), weights[blocks]), default=None)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return all repeated blocks that hold parameters, in order.

    An encoder's and a decoder's; of blocks within blocks the outer ones.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for blocks in _all_blocks(model):
        for block in blocks.modules:
            if id(block) not in inside and any(True for _ in block.parameters()):
                found.append(block)
                inside |= {id(each) for each in block.modules()}
    return found


def _all_blocks(model: nn.Module) -> list[Blocks]:
    """Return all runs of blocks, outer ones first."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            found += [Blocks(path, type(run[0]).__name__, run) for run in _runs(list(module)) if len(run) >= MIN_BLOCKS]
    return found


def _runs(children: list[nn.Module]) -> Iterator[tuple[nn.Module, ...]]:
    """Yield runs of neighbouring children of one class that contain modules."""
    run: list[nn.Module] = []
    for child in children:
        if run and type(child) is not type(run[0]):
            yield tuple(run)
            run = []
        if any(True for _ in child.children()):
            run.append(child)
    if run:
        yield tuple(run)
