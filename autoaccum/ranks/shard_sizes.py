"""Compute sizes of a sharded model's blocks on other ranks.

FSDP2 shards each parameter along one dimension, padded to as many rows on each rank: of a parameter of 1,000 rows on 24
ranks, each has 42. A module's own parameters are gathered and reduced together, in one flat block of padded shards of
all ranks, from and into one of this rank's (torch/distributed/fsdp/_fully_shard, `foreach_all_gather`,
`foreach_reduce`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .sharded import sharded_modules

OTHER_ELEMENT_BYTES = (2, 4)  # beside a parameter's own: gathered in bf16, reduced in fp32


class Sizes(NamedTuple):
    """Hold blocks' bytes on other ranks, by their bytes here.

    One size may be in both: on two ranks, what is gathered in bf16 is as large as its shard in fp32.

    Attributes:
        shards: Of this rank's shards.
        gathered: Of the shards of all ranks.
    """

    shards: dict[int, int]
    gathered: dict[int, int]


def sizes_on(model: nn.Module, ranks: int) -> Sizes:
    """Return the sizes of blocks that shards fill, on other ranks.

    Args:
        model: A model that `fully_shard` was applied to, on a mesh of one dimension.
        ranks: The other number of ranks.
    """
    found = Sizes({}, {})
    taken: set[int] = set()
    for module in reversed(sharded_modules(model)):  # inner ones first: a parameter belongs to the innermost
        own = [p for p in module.parameters() if id(p) not in taken]
        taken |= {id(p) for p in own}
        here = world_of(own[0]) if own else 1
        for parts in (own, *([p] for p in own)):
            entries = sum(_entries(p, here) for p in parts), sum(_entries(p, ranks) for p in parts)
            for width in {*OTHER_ELEMENT_BYTES, *(p.element_size() for p in parts)}:
                found.shards[width * entries[0]] = width * entries[1]
                found.gathered[width * entries[0] * here] = width * entries[1] * ranks
    return found


def world_of(parameter: Any) -> int:
    """Return over how many ranks a parameter is sharded."""
    return int(parameter.device_mesh.size())


def _entries(parameter: Any, ranks: int) -> int:
    """Return the entries of one padded shard."""
    dimension = parameter.placements[-1].dim
    rows = int(parameter.shape[dimension])
    return -(-rows // ranks) * (int(parameter.numel()) // rows)
