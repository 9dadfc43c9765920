"""Plan one rank of a fake process group.

torch's fake process group has a rank and a world size, and its collectives wait for nobody. A model that is sharded or
wrapped on it allocates what it would allocate among real ranks: its shards, gathered blocks and buckets. Rank 0 has the
largest shards, so what fits there fits everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ..errors import UsageError
from ..ranks import sharded
from ..ranks.group import absent_allowed, are_absent
from .request import PlanRequest


@contextlib.contextmanager
def absent_ranks(model: nn.Module, request: PlanRequest) -> Iterator[PlanRequest]:
    """Allow planning on a fake process group while this is entered.

    Args:
        model: The model, sharded or wrapped, or bare.
        request: The request.

    Yields:
        The request with the group's rank and world size; unchanged where there is no such group.

    Raises:
        UsageError: The request names another number of ranks.
    """
    if not are_absent():
        yield request
        return
    ranks = torch.distributed.get_world_size()
    if request.world_size not in (1, ranks):
        raise UsageError(
            f"The request is for {request.world_size} ranks, and the fake process group has {ranks}.",
            "The model is spread over the group's.",
            f"Ask for world_size={ranks}, or leave it out.",
        )
    with absent_allowed(), sharded.unreduced(model):
        yield replace(request, world_size=ranks, rank=torch.distributed.get_rank())
