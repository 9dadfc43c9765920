"""Yield a plan's micro-batches as lists of a dataset's indices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import UsageError
from ..plan import Plan
from ..simulation.solver import Split, balanced, split_like


class PlanBatchSampler:
    """Sample micro-batches as a plan cuts them, for `DataLoader(batch_sampler=...)`.

    Args:
        plan: The plan.
        samples: Samples in the dataset.
        shuffle: Whether each epoch has another order.
        seed: Seed of the order, the same on all ranks.
        rank: This process's rank.
        drop_last: Whether an incomplete last window is left out.

    Attributes:
        epoch: The epoch whose order is next; `set_epoch` changes it.

    Raises:
        UsageError: The rank is invalid, or several ranks would train unequal last windows.
    """

    def __init__(
        self, plan: Plan, samples: int, *, shuffle: bool = True, seed: int = 0, rank: int = 0, drop_last: bool = False
    ) -> None:
        ranks = plan.world_size
        if not 0 <= rank < ranks:
            raise UsageError(f"rank is {rank}, of {ranks} rank{'s' * (ranks > 1)}.", hint=f"Give 0 to {ranks - 1}.")
        rest = samples % plan.target_batch
        if ranks > 1 and rest and not drop_last:
            raise UsageError(
                f"The last window of {samples} samples has {rest} of {plan.target_batch}, for {ranks} ranks.",
                "Ranks wait for each other in every micro-batch, so that they need equal windows.",
                "plan.batch_sampler(dataset, rank=rank, drop_last=True)",
            )
        self.plan, self.samples, self.shuffle, self.seed, self.rank = plan, samples, shuffle, seed, rank
        self.drop_last, self.epoch = drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    @property
    def windows(self) -> list[Split]:
        """Micro-batch sizes of each optimizer step of an epoch, on this rank."""
        whole, rest = divmod(self.samples, self.plan.target_batch)
        own = balanced(self.plan.target_batch, self.plan.world_size)[self.rank]
        cut = self.plan.split if own == sum(self.plan.split) else balanced(own, self.plan.accumulation_steps)
        tail = [] if self.drop_last or not rest else [self._tail(rest)]
        return [cut] * whole + tail

    def __len__(self) -> int:
        """Return the number of micro-batches in an epoch."""
        return sum(map(len, self.windows))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield each micro-batch's indices."""
        order = self._order()
        start = 0
        for sizes in self.windows:
            share = balanced(self.plan.target_batch, self.plan.world_size)
            place = start + sum(share[: self.rank])
            for size in sizes:
                yield order[place : place + size].tolist()
                place += size
            start += self.plan.target_batch

    def _tail(self, rest: int) -> Split:
        return split_like(self.plan.split, rest, self.plan.request.min_micro_batch)

    def _order(self) -> torch.Tensor:
        """Return the epoch's order: 8 bytes a sample, as `RandomSampler` has it."""
        if not self.shuffle:
            return torch.arange(self.samples)
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + self.epoch))
