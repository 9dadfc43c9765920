"""How the sizes of a phase follow the micro-batch, told by size alone.

A size that the recorded prime divides scales with the batch; what it doesn't divide is constant, saturated, stepping,
or rounded up from something that scales, and recordings at other primes tell which. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import NamedTuple

from .recording import Event

EVERY = (2, 4, 8, 16, 32, 64, 128)  # samples to a step, where a size steps: powers of two, as blocks of threads are
TINY = 1 << 16  # the counters beside a reduction's buffer are of fewer bytes
ROUNDED_WITHIN = 0.03  # a size rounded up from something proportional (rows padded to 16) is that far off at most


class Rule(NamedTuple):
    """Bytes of a block at n samples: `constant + (per_sample * n + per_pair * n * n) // divisor`.

    Where `every` is more than 1, n counts in whole steps of so many samples, the last one begun; where `unit` is, the
    bytes are rounded up to whole units. `most` is where it saturates; 0 for nowhere.
    """

    constant: int
    per_sample: int = 0
    per_pair: int = 0
    divisor: int = 1
    every: int = 1
    most: int = 0
    unit: int = 1

    def at(self, n: int) -> int:
        """The bytes at a micro-batch of n samples, at least 1."""
        n = -(-n // self.every)
        size = max(1, self.constant + (self.per_sample * n + self.per_pair * n * n) // self.divisor)
        size = -(-size // self.unit) * self.unit
        return min(size, self.most) if self.most else size


Sized = tuple[int, Sequence[int]]  # a micro-batch, and the sizes of a phase recorded at it


def size_rules(
    sizes: Sequence[int], n: int, other_sizes: Sequence[int], m: int, further: Sequence[Sized] = ()
) -> dict[int, Rule]:
    """Sorts the sizes of a phase recorded at n by those of the same phase recorded at m.

    Args:
        sizes: Bytes of each allocation at n samples, a prime.
        n: The prime.
        other_sizes: The same phase's at m samples, another prime.
        m: The other prime.
        further: Smaller recordings of the phase: their micro-batches, and their sizes.

    Returns:
        A rule for each distinct size.
    """
    here, there = Counter(sizes), Counter(other_sizes)
    rules = {size: _plain_rule(size, n, here[size], there, m) for size in here}
    unsure = [size for size in dict.fromkeys(sizes) if rules[size] is None]
    explained = {rule.at(m) for rule in rules.values() if rule is not None}
    rest = [size for size in dict.fromkeys(other_sizes) if size not in explained]
    seen = [(m, set(rest)), *((each, set(theirs)) for each, theirs in further)]
    scales = {rule.per_sample // n for rule in rules.values() if rule and rule.per_sample and rule.per_sample % n == 0}
    laws = {size: law for size in unsure if (law := _confirmed_law(size, n, seen, scales)) is not None}
    unsure = [size for size in unsure if size not in laws]
    explained = {law.at(m) for law in laws.values()}
    rest = [size for size in rest if size not in explained]
    settled = _paired_by_order(unsure, n, rest, m) or {size: _rounded_rule(size, n, rest, m) for size in unsure}
    return {size: rule or laws.get(size) or settled[size] for size, rule in rules.items()}


def _confirmed_law(size: int, n: int, seen: Sequence[tuple[int, set[int]]], scales: Iterable[int]) -> Rule | None:
    """The law that most other recordings bear out exactly, the nearest among them; None where there is none.

    Args:
        size: Bytes at n samples.
        n: The recording that is lifted.
        seen: The other recordings, the nearest first: their micro-batches and sizes.
        scales: Bytes per sample of what scales in this phase.
    """
    m, sizes = seen[0]

    def best(laws: Iterable[Rule]) -> tuple[int, Rule | None]:
        counts = {law: sum(law.at(each) in theirs for each, theirs in seen) for law in laws if law.at(m) in sizes}
        found = max(counts, key=lambda law: (counts[law], law.at(2 * n)), default=None)  # of equals the safer
        return (counts[found], found) if found is not None else (0, None)

    affine, line = best(_affine_laws(size, n, m, sizes))
    stepping, steps = best(_step_laws(size, n, m, sizes, scales))
    if affine > 1 and affine >= stepping:
        return line
    return steps


def _affine_laws(size: int, n: int, m: int, sizes: set[int]) -> Iterator[Rule]:
    """A + b n: workspaces of convolutions."""
    for partner in sizes:
        slope, uneven = divmod(size - partner, n - m)
        if slope > 0 and not uneven and slope * n < size:
            yield Rule(size - slope * n, per_sample=slope)


def _step_laws(size: int, n: int, m: int, sizes: set[int], scales: Iterable[int]) -> Iterator[Rule]:
    """What grows in steps of so many samples, or in whole units of something else that scales.

    A sum over rows keeps a partial result for each block of rows (aten/src/ATen/native/cuda/Reduce.cuh: ctas_per_output
    is rounded up); scratch comes in tiles, so many for each so many bytes of an input. A unit divides what was seen at
    both sizes, and what scales is one of the phase's own.
    """
    for every in EVERY:
        if size % -(-n // every) == 0 and every < n:
            yield Rule(0, per_sample=size // -(-n // every), every=every)
    if size <= TINY:
        return
    units = {gcd(size, partner) // part for partner in sizes if TINY < partner < size for part in range(1, 9)}
    for unit in units:
        if unit > TINY and not size % unit:
            for scale in scales:
                if -(-scale * n // unit) * unit == size and -(-scale * m // unit) * unit < size:
                    yield Rule(0, per_sample=scale, unit=unit)


def _plain_rule(size: int, n: int, times: int, there: Counter[int], m: int) -> Rule | None:
    """Constant, proportional or quadratic, where the other recording bears it out; None where it has to be guessed."""
    candidates = [Rule(size)]
    if size % n == 0:
        candidates.append(Rule(0, per_sample=size, divisor=n))
    if size % (n * n) == 0:
        candidates.append(Rule(0, per_pair=size, divisor=n * n))
    seen = [rule for rule in candidates if there[rule.at(m)]]
    if not seen:
        return candidates[1] if size % n == 0 else None
    # Two explanations: the one that stands there as often as here; else that which scales, to be on the safe side.
    return max(seen, key=lambda rule: (there[rule.at(m)] == times, rule.per_sample > 0, rule.per_pair > 0))


def _paired_by_order(unsure: Sequence[int], n: int, rest: Sequence[int], m: int) -> dict[int, Rule]:
    """Workspaces of the form a + b n: as many here as there, so the i-th distinct one is the same in both."""
    if len(unsure) != len(rest):
        return {}
    rules = {}
    for size, partner in zip(unsure, rest, strict=True):
        slope, per = size - partner, n - m
        if not 0 <= slope * n <= size * per * (1 + ROUNDED_WITHIN):  # falls with n, or rises faster than n does
            return {}
        rules[size] = Rule(size - slope * n // per, per_sample=slope, divisor=per)
    return rules


def _rounded_rule(size: int, n: int, rest: Sequence[int], m: int) -> Rule:
    """Saturated where something there grew faster than this one stands for; else it scales, on the safe side."""
    expected = [partner * n / m for partner in rest if partner <= size]
    if any(abs(each - size) <= ROUNDED_WITHIN * size for each in expected):
        return Rule(0, per_sample=size, divisor=n)  # rounded up from something proportional
    return Rule(size) if any(each > size for each in expected) else Rule(0, per_sample=size, divisor=n)


def saturating(events: Sequence[Event], rules: Mapping[int, Rule], others: Sequence[Sequence[int]]) -> dict[int, Rule]:
    """Buffers of reductions that grow up to a size that others of them have reached.

    A reduction over rows allocates a buffer for partial results and counters right after it, and frees both
    (aten/src/ATen/native/cuda/Reduce.cuh). The buffer grows with the rows until there are as many blocks as the device
    runs at once: that many bytes are the same for all. It is known where one is that large here, and fewer were so in a
    smaller recording.
    """
    buffers = _reduction_buffers(events, rules)
    here = Counter(event.bytes for event in events)
    reached = [
        size for size in buffers if not rules[size].per_sample and any(here[size] > each.count(size) for each in others)
    ]
    most = max(reached, default=0)
    found = {}
    for size in buffers:
        rule = rules[size]
        if rule.per_sample and size < most:
            whole = rule.per_sample if rule.every > 1 else rule.unit  # blocks are counted up to whole ones
            found[size] = rule._replace(most=-(-most // whole) * whole)
    return found


def _reduction_buffers(events: Sequence[Event], rules: Mapping[int, Rule]) -> set[int]:
    """Sizes that are followed by a tiny constant each time, and freed within four events."""
    buffers: set[int] = set()
    others: set[int] = set()
    for index, event in enumerate(events):
        if event.bytes <= TINY:
            continue
        beside = next((other for other in events[index + 1 : index + 2] if 0 < other.bytes <= TINY), None)
        freed = any(other.block == event.block for other in events[index + 1 : index + 5])
        counters = beside is not None and rules[beside.bytes] == Rule(beside.bytes)
        (buffers if counters and freed else others).add(event.bytes)
    return buffers - others
