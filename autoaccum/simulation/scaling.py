"""Infer from sizes alone how a phase follows the micro-batch.

A size that the recorded prime divides scales with the batch. Any other is constant, saturated, stepping, or rounded up
from something that scales; recordings at other primes decide. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from .size_laws import MAX_COUNTER_BYTES, Rule, confirmed_laws, reduction_buffers, saturating

__all__ = ["Rule", "proportional", "reduction_buffers", "saturating", "size_rules"]

ROUNDING_TOLERANCE = 0.03  # a size rounded up from something proportional (rows padded to 16) is that far off at most


Sized = tuple[int, Sequence[int]]  # a micro-batch, and the sizes of a phase recorded at it


def size_rules(
    sizes: Sequence[int],
    n: int,
    other_sizes: Sequence[int],
    m: int,
    further: Sequence[Sized] = (),
    *,
    reductions: bool | None = None,
    inputs: Iterable[int] = (),
) -> dict[int, Rule]:
    """Infer each size's rule from the phase at n and m.

    Args:
        sizes: Bytes of each allocation at n samples, a prime.
        n: The prime.
        other_sizes: The same phase's at m samples, another prime.
        m: The other prime.
        further: Smaller recordings of the phase: their micro-batches, and their sizes.
        reductions: Whether all are buffers of reductions, or none (see `reduction_buffers`); None if unknown.
        inputs: Bytes per sample of the phase's other proportional sizes.

    Returns:
        A rule for each distinct size.
    """
    here, there = Counter(sizes), Counter(other_sizes)
    rules = {size: _plain_rule(size, n, here[size], there, m) for size in here}
    unsure = [size for size in dict.fromkeys(sizes) if rules[size] is None]
    seen = [(m, there), *((each, Counter(theirs)) for each, theirs in further)]
    plain = {size: rule for size, rule in rules.items() if rule is not None}
    scales = {*inputs, *proportional(plain, n)}
    laws = confirmed_laws(unsure, here, n, seen, plain, scales, reductions)
    unsure = [size for size in unsure if size not in laws]
    explained = {rule.at(m) for rule in (*plain.values(), *laws.values())}
    rest = [size for size in dict.fromkeys(other_sizes) if size not in explained]
    settled = _paired_by_order(unsure, n, rest, m) or {
        size: _rounded_rule(size, n, rest, m, None if reductions is not False else scales) for size in unsure
    }
    return {size: rule or laws.get(size) or settled[size] for size, rule in rules.items()}


def proportional(rules: Mapping[int, Rule], n: int) -> set[int]:
    """Return the bytes per sample of the rules proportional to the batch."""
    return {
        rule.per_sample // n
        for rule in rules.values()
        if rule.per_sample and rule.divisor == n and rule.per_sample % n == 0
    }


def _plain_rule(size: int, n: int, times: int, there: Counter[int], m: int) -> Rule | None:
    """Return a constant, proportional or quadratic rule; None if unconfirmed."""
    candidates = [Rule(size)]
    if size % n == 0:
        candidates.append(Rule(0, per_sample=size, divisor=n))
    if size % (n * n) == 0:
        candidates.append(Rule(0, per_pair=size, divisor=n * n))
    seen = [rule for rule in candidates if there[rule.at(m)]]
    if not seen:
        return candidates[1] if size % n == 0 else None
    # Of several explanations: the one that occurs there as often as here; else the one that scales, for safety.
    return max(seen, key=lambda rule: (there[rule.at(m)] == times, rule.per_sample > 0, rule.per_pair > 0))


def _paired_by_order(unsure: Sequence[int], n: int, rest: Sequence[int], m: int) -> dict[int, Rule]:
    """Pair workspaces of the form a + b n by their order."""
    if len(unsure) != len(rest):
        return {}
    rules = {}
    for size, partner in zip(unsure, rest, strict=True):
        slope, per = (size - partner, n - m) if n > m else (partner - size, m - n)
        if not 0 <= slope * n <= size * per * (1 + ROUNDING_TOLERANCE):  # falls with n, or rises faster than n does
            return {}
        rules[size] = Rule(size - slope * n // per, per_sample=slope, divisor=per)
    return rules


def _rounded_rule(size: int, n: int, rest: Sequence[int], m: int, scales: Collection[int] | None) -> Rule:
    """Scale, for safety; a buffer is constant if something grew faster.

    Args:
        size: The size at n that no law explains.
        n: The recorded micro-batch.
        rest: The unexplained sizes at m samples.
        m: The other micro-batch.
        scales: Bytes per sample of the phase's proportional sizes; None where it may be a reduction's buffer, which
            saturates.
    """
    expected = [partner * n / m for partner in rest if partner <= size or m > n]
    if any(abs(each - size) <= ROUNDING_TOLERANCE * size for each in expected):
        return Rule(0, per_sample=size, divisor=n)  # rounded up from something proportional
    if scales is not None and size > MAX_COUNTER_BYTES:  # a smaller one holds no tensors' copies
        return _most_copied(size, n, scales)
    return Rule(size, is_guess=True) if any(each > size for each in expected) else Rule(0, per_sample=size, divisor=n)


def _most_copied(size: int, n: int, scales: Collection[int]) -> Rule:
    """Return the steepest law of a workspace with two tensors' copies.

    With a kernel that the smaller recordings didn't choose, the copies that it makes (size_laws.py) aren't known: the
    largest two that have room in it are no less than they are. Constant it isn't: of 20 such workspaces of four nets on
    an H200, none was of that size at the next recording.
    """
    tensors = [each for each in scales if each * n > MAX_COUNTER_BYTES]
    slope = max((one + other for one in tensors for other in tensors if (one + other) * n <= size), default=0)
    if 2 * slope * n < size:
        return Rule(0, per_sample=size, divisor=n)
    return Rule(size - slope * n, per_sample=slope)
