"""Size a window's micro-batches within limits, which an out-of-memory lowers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..data.groups import group_sizes
from ..data.resplit import cut_one, recut
from ..data.tokens import split_by_tokens
from ..data.window import Window
from ..plan import Plan
from ..simulation.solver import split_like, split_within

SHRINK_FACTOR = 0.9  # after an out-of-memory, a limit becomes at most this part of the size that failed

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """The largest micro-batch that is allowed now.

    Attributes:
        micro_batch: Samples in a micro-batch.
        max_tokens: Tokens in a micro-batch, padding included; None for no such limit.
        max_short_samples: Samples in a micro-batch of short sequences, within `max_tokens`; None for `micro_batch`.
    """

    micro_batch: int
    max_tokens: int | None
    max_short_samples: int | None

    @property
    def max_samples(self) -> int:
        """The most samples that any micro-batch may have."""
        return max(self.micro_batch, self.max_short_samples or 0)

    def as_dict(self) -> dict[str, int | None]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    def lowered_to(self, kept: Mapping[str, Any]) -> Limits:
        """Return the smaller of these limits and those of a checkpoint.

        A new plan may be for less memory than what an out-of-memory left of the limits of an older one.
        """
        short = kept["max_short_samples"]
        return Limits(
            min(kept["micro_batch"], self.micro_batch),
            _smaller(self.max_tokens, kept["max_tokens"]),
            None if short is None else _smaller(self.max_short_samples, short),
        )


def _smaller(planned: int | None, kept: int | None) -> int | None:
    return planned if planned is None or kept is None else min(planned, kept)


class Sizing:
    """Sizes of micro-batches: the plan's split, within the limits now.

    Args:
        plan: The plan.
        least: The fewest samples that a micro-batch may have.
        max_tokens: Tokens in a micro-batch, where the plan has no such limit.
        shared: Keys of what each micro-batch gets whole, as for `data.split`.
        per_sample: Keys of what has a row for each sample.

    Attributes:
        limits: The limits now.
        least: The fewest samples that a micro-batch may have.
        batch_keys: `shared` and `per_sample`, as `data.split` takes them.
    """

    def __init__(
        self,
        plan: Plan,
        least: int,
        *,
        max_tokens: int | None = None,
        shared: Collection[str] = (),
        per_sample: Collection[str] = (),
    ) -> None:
        self.plan, self.least = plan, least
        limit = max_tokens if plan.schedule.max_tokens is None else plan.schedule.max_tokens
        self.limits = Limits(plan.micro_batch, limit, plan.schedule.max_rows)
        self.batch_keys: dict[str, Any] = {"shared": shared, "per_sample": per_sample}

    def sizes(self, samples: int) -> Sizes:
        """Return the sizes of the micro-batches for a number of samples."""
        group = self.plan.request.samples_per_group
        if group > 1:
            return group_sizes(samples, group, self._sizes_of_groups)
        planned, largest = self.plan.split, self.limits.micro_batch
        if largest == self.plan.micro_batch:
            return split_like(planned, samples, self.least)
        return split_within(samples, largest, self.least)

    def _sizes_of_groups(self, groups: int) -> Sizes:
        """Return the groups of each micro-batch for a number of groups."""
        size, largest = self.plan.request.samples_per_group, self.limits.micro_batch
        if largest == self.plan.micro_batch:
            return split_like(tuple(each // size for each in self.plan.split), groups)
        return split_within(groups, max(1, largest // size))

    def sizes_of_lengths(self, lengths: Sequence[int]) -> Sizes:
        """Return sizes for sequences of these lengths, longest first.

        They keep within the limit of tokens too.
        """
        if self.limits.max_tokens is None:
            return self.sizes(len(lengths))
        return split_by_tokens(lengths, self.limits.max_samples, self.limits.max_tokens, self.least)

    def fitted(self, window: Window) -> Window:
        """Cut a window again that was loaded before limits were lowered."""
        if max(window.sizes, default=0) <= self.limits.max_samples or window.sizes == self.sizes(sum(window.sizes)):
            return window
        return self._cut_again(window)

    def shrink(self, window: Window, micro_batches_begun: int) -> tuple[Window, int]:
        """Lower the limit that was exceeded, and cut the window again.

        With a limit of tokens only the failed micro-batch is cut: a long one lowers that limit, one with more short
        samples than `micro_batch` lowers the limit for those. In all other cases every micro-batch gets smaller.

        Args:
            window: The window that ran out of memory.
            micro_batches_begun: Its micro-batches begun until then; 0 before the first.

        Returns:
            The same samples in smaller micro-batches (in the same ones where they can't be cut), and the samples that
            the failed one is lowered to.
        """
        failed = failed_samples(window, micro_batches_begun, self.limits)
        lowered = max(self.least, min(failed - 1, int(SHRINK_FACTOR * failed)))
        limits, position = self.limits, micro_batches_begun - 1
        if limits.max_tokens is not None and failed < limits.micro_batch:
            self.limits = replace(limits, max_tokens=max(1, int(SHRINK_FACTOR * limits.max_tokens)))
        elif limits.max_short_samples is not None and position >= 0 and failed > limits.micro_batch:
            self.limits = replace(limits, max_short_samples=lowered)
        else:
            largest = min(limits.micro_batch, lowered)
            self.limits = replace(limits, micro_batch=largest, max_short_samples=None)
            return self._cut_again(window), lowered
        return cut_one(window, position, split_within(failed, lowered, self.least), self.batch_keys), lowered

    def _cut_again(self, window: Window) -> Window:
        return recut(window, self.sizes, self.limits.micro_batch, self.batch_keys, joins=self.least > 1)


def failed_samples(window: Window, micro_batches_begun: int, limits: Limits) -> int:
    """Return the samples of the micro-batch that ran out of memory.

    Without a limit of tokens it is taken to be the largest.
    """
    if limits.max_tokens is not None and micro_batches_begun:
        return window.sizes[micro_batches_begun - 1]
    return max(window.sizes, default=0)
