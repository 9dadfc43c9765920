"""Share an effective batch among ranks. No torch here.

Shares are numbers of samples that sum to the batch exactly: whole numbers in proportion to weights by the method of
largest remainders (Hamilton, 1792), with a least number for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..errors import UsageError

EQUAL, SPEED, MEMORY = WAYS = ("equal", "speed", "memory")

Shares = tuple[int, ...]


def proportional(target: int, weights: Sequence[float], least: int = 1) -> Shares:
    """Return shares in proportion to weights, summing to the target.

    Args:
        target: Samples in all.
        weights: One for each rank, above 0: its speed, say.
        least: The fewest samples of a rank.

    Raises:
        UsageError: The target is too small for so many ranks.
    """
    if target < least * len(weights):
        raise too_few(target, len(weights), least)
    spare, total = target - least * len(weights), float(sum(weights))
    exact = [target * each / total - least for each in weights]  # what each gets beyond the least
    short = [max(0.0, each) for each in exact]  # a slow rank has the least, which the others make room for
    scale = spare / sum(short) if sum(short) else 0.0
    wanted = [each * scale for each in short]
    found = [int(each) for each in wanted]
    order = sorted(range(len(weights)), key=lambda i: (found[i] - wanted[i], i))
    for place in range(spare - sum(found)):
        found[order[place % len(order)]] += 1
    return tuple(least + each for each in found)


def of_window(shares: Shares, samples: int, least: int = 1, group: int = 1) -> Shares:
    """Return each rank's samples of a window of any size.

    A whole window has the plan's shares. An epoch's last has what is left, in the same proportion; a rank may get none,
    and none gets fewer than `least` unless all of the window has fewer.

    Args:
        shares: The plan's.
        samples: Samples in the window.
        least: The fewest samples that a micro-batch may have.
        group: Samples that belong together.
    """
    if samples == sum(shares):
        return shares
    groups, rest = divmod(samples, group)
    fewest = -(-least // group)
    found = list(proportional(groups, shares, 0)) if groups else [0] * len(shares)
    while any(0 < each < fewest for each in found) and sum(each > 0 for each in found) > 1:
        smallest = min((i for i, each in enumerate(found) if each), key=lambda i: (found[i], -i))
        moved, found[smallest] = found[smallest], 0
        found[max(range(len(found)), key=lambda i: (0 < found[i] < fewest, found[i]))] += moved
    sizes = [each * group for each in found]
    sizes[max(range(len(sizes)), key=lambda i: sizes[i])] += rest
    return tuple(sizes)


def slice_of(shares: Shares, rank: int) -> slice:
    """Return which of a window's samples, in their order, are a rank's."""
    ends = list(accumulate(shares))
    return slice(ends[rank] - shares[rank], ends[rank])


def check_shares(shares: Any, target: int | None, ranks: int, least: int, group: int = 1) -> None:
    """Refuse a wish for shares that can't be met.

    Args:
        shares: "equal", "speed" or "memory", samples for each rank, or None.
        target: Samples in an optimizer step.
        ranks: Number of ranks.
        least: The fewest samples of a rank.
        group: Samples that belong together.

    Raises:
        UsageError: It is something else, or doesn't sum to the target.
    """
    if target is not None and target < least * ranks:
        raise too_few(target, ranks, least)
    if shares is None or shares in WAYS:
        return
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        raise UsageError(
            f"shares is {shares!r}.", hint=f"Use one of {', '.join(map(repr, WAYS))}, or samples: shares=(384, 128)."
        )
    wrong = [each for each in shares if not isinstance(each, int) or isinstance(each, bool) or each < least]
    if len(shares) != ranks or wrong or sum(shares) != target or any(each % group for each in shares):
        each = f"multiples of {group}" if group > 1 else f"at least {least} each"
        raise UsageError(
            f"shares is {tuple(shares)}, {len(shares)} numbers that sum to {_sum(shares)}.",
            f"Each of {ranks} ranks has a share, {each}, and together they are the target batch of {target}.",
            "Give such numbers, or shares='speed' to let them be chosen.",
        )


def too_few(target: int, ranks: int, least: int) -> UsageError:
    """Return the refusal of a target below what ranks need."""
    return UsageError(
        f"A target batch of {target} cannot be shared by {ranks} ranks.",
        f"Each rank needs at least {'one sample' if least == 1 else f'{least} samples'}.",
        f"Give a target of at least {least * ranks}, or fewer ranks.",
    )


def _sum(shares: Sequence[Any]) -> Any:
    try:
        return sum(shares)
    except TypeError:
        return "nothing"
