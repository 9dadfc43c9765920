"""Infer sizes that grow linearly, in steps or in tiles, and saturate.

A law is accepted if other recordings confirm it to the byte. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import NamedTuple

from .recording import Event

STEP_SAMPLES = (
    2,
    4,
    8,
    16,
    32,
    64,
    128,
)  # samples per step, powers of two as thread blocks are
TILE_DIVISORS = range(1, 9)  # a tile may be the greatest common divisor of two sizes over one of these
MAX_COUNTER_BYTES = 1 << 16  # the counters beside a reduction's buffer are smaller
ALIGNMENT_BYTES = 512  # the caching allocator rounds up to it (kMinBlockSize), and libraries align parts to less


class Rule(NamedTuple):
    """Bytes at n samples, as a formula.

    `constant + (per_sample * n + per_pair * n * n) // divisor`.

    With `samples_per_step` above 1, n is rounded up to whole steps and counts steps. With `unit_bytes` above 1, the
    result is rounded up to a multiple of it. `max_bytes` is the size at which the block saturates; 0 for none.
    `is_guess` says of a constant that it was seen at one micro-batch only.
    """

    constant: int
    per_sample: int = 0
    per_pair: int = 0
    divisor: int = 1
    samples_per_step: int = 1
    max_bytes: int = 0
    unit_bytes: int = 1
    is_guess: bool = False

    @property
    def may_saturate(self) -> bool:
        """Whether it steps and its maximum is not known yet."""
        return (self.samples_per_step > 1 or self.unit_bytes > 1) and not self.max_bytes

    def at(self, n: int) -> int:
        """Return the bytes at n samples, at least 1."""
        n = -(-n // self.samples_per_step)
        size = max(1, self.constant + (self.per_sample * n + self.per_pair * n * n) // self.divisor)
        size = -(-size // self.unit_bytes) * self.unit_bytes
        return min(size, self.max_bytes) if self.max_bytes else size


def confirmed_laws(
    unsure: Sequence[int],
    here: Mapping[int, int],
    n: int,
    seen: Sequence[tuple[int, Counter[int]]],
    plain: Mapping[int, Rule],
    scales: Iterable[int],
    reductions: bool | None,
) -> dict[int, Rule]:
    """Return laws for unexplained sizes that other recordings confirm.

    Args:
        unsure: The sizes at n samples.
        here: How often each size stands there at n.
        n: The recording that is lifted.
        seen: The other recordings, the nearest first: their micro-batches, and how often each size stands there.
        plain: The rules of constant and proportional sizes; the sizes that they explain confirm no law.
        scales: Bytes per sample of this phase's proportional sizes.
        reductions: As in `size_rules`.
    """
    left = [(m, counts.copy()) for m, counts in seen]
    for size, rule in plain.items():
        _take_out(left, rule, here[size])
    laws = {}
    for size in unsure:
        law = _confirmed_law(size, n, seen, left, scales, reductions)
        if law is not None:
            laws[size] = law
            _take_out(left, law, here[size])
    return laws


def _take_out(left: Sequence[tuple[int, Counter[int]]], rule: Rule, times: int) -> None:
    """Mark what a rule explains in each recording as explained."""
    for m, counts in left:
        counts[rule.at(m)] -= times


def _confirmed_law(
    size: int,
    n: int,
    seen: Sequence[tuple[int, Counter[int]]],
    left: Sequence[tuple[int, Counter[int]]],
    scales: Iterable[int],
    reductions: bool | None,
) -> Rule | None:
    """Return the law that most recordings confirm, the nearest included; or None.

    Of laws with equally many confirmations, the one whose sizes nothing else explains; of equals the safer.
    """
    m, rest = left[0]
    partners = {partner for partner, times in rest.items() if times > 0}

    def best(laws: Iterable[Rule]) -> tuple[int, Rule | None]:
        stands = {law: sum(seen[i][1][law.at(each)] > 0 for i, (each, _) in enumerate(seen)) for law in laws}
        stands = {law: times for law, times in stands.items() if law.at(m) in partners}
        alone = {law: sum(counts[law.at(each)] > 0 for each, counts in left) for law in stands}
        found = max(stands, key=lambda law: (stands[law] + alone[law], law.at(2 * n), -law.unit_bytes), default=None)
        return (stands[found], found) if found is not None else (0, None)

    lines = list(_affine_laws(size, n, m, partners))
    affine, line = best(lines)
    stepping: list[Rule] = []
    if reductions is not False:
        stepping += _row_laws(size, n)
    stepping += _tile_laws(size, n, m, partners, _read_by_blocks(scales) if reductions else scales)
    steps, stepped = best(stepping)
    if affine > 1 and affine >= steps:
        return line
    if steps < 2 and not reductions:
        pairs = {one + other for one in scales for other in scales}
        _, copies = best(each for each in lines if each.per_sample in pairs)
        if copies is not None:
            return copies
    if stepped is not None:
        return stepped
    ends, ended = best(_ended_laws(size, n, m, partners, scales, reductions))
    return ended if ends > 1 else _nearly_affine(size, n, m, partners, left[1:])


def _affine_laws(size: int, n: int, m: int, sizes: set[int]) -> Iterator[Rule]:
    """Yield laws a + b n: workspaces of convolutions.

    cuDNN's tensor-core kernels copy a convolution's input, output and filter to channels-last, into their workspace
    (docs/ground-truth.md): b is then the bytes per sample of two of the phase's tensors, which confirms such a law
    where only two recordings chose that kernel. So it is for 102 of the 148 sizes above 1 MiB of four nets on an H200
    (torch 2.11, cuDNN 9.19; fp32 as TF32, and bf16) that neither stand still nor are proportional from one recording to
    the next; of most others the kernel changed between the two.
    """
    for partner in sizes:
        slope, uneven = divmod(size - partner, n - m)
        if slope > 0 and not uneven and slope * n < size:
            yield Rule(size - slope * n, per_sample=slope)


def _nearly_affine(
    size: int, n: int, m: int, sizes: set[int], further: Sequence[tuple[int, Counter[int]]]
) -> Rule | None:
    """Return a confirmed law a + b n of aligned parts.

    cuDNN's recurrent nets have workspaces of several parts (on an H200 34,423,072 bytes at 2 samples, 41,836,864 at 7
    and 47,767,904 at 11): the slope between two sizes is a whole number only up to what the alignment adds.
    """
    found = []
    for partner in sizes:
        slope, per = size - partner, n - m
        if slope <= 0 or slope * n > size * per:
            continue
        law = Rule(size - slope * n // per, per_sample=slope, divisor=per)
        off = [_distance(law.at(each), counts) for each, counts in further]
        confirmed = [each for each in off if each < ALIGNMENT_BYTES]
        found += [(len(confirmed), -sum(confirmed), law)] if confirmed else []
    return max(found)[-1] if found else None


def _distance(size: int, counts: Counter[int]) -> int:
    """Return how far the nearest unexplained size is."""
    return min((abs(size - each) for each, times in counts.items() if times > 0), default=size)


def _ended_laws(
    size: int, n: int, m: int, sizes: set[int], scales: Iterable[int], reductions: bool | None
) -> Iterator[Rule]:
    """Yield laws that grew in steps and saturated before n."""
    for partner in sizes:
        if not MAX_COUNTER_BYTES < partner < size:
            continue
        laws = [*_row_laws(partner, m)] if reductions else []
        units = {gcd(size, partner) // part for part in TILE_DIVISORS}
        laws += [
            Rule(0, per_sample=scale, unit_bytes=unit_bytes)
            for unit_bytes in units
            if unit_bytes > MAX_COUNTER_BYTES and not size % unit_bytes and not partner % unit_bytes
            for scale in (_read_by_blocks(scales) if reductions else scales)
        ]
        yield from (law._replace(max_bytes=size) for law in laws if law.at(m) == partner and law.at(n) > size)


def _read_by_blocks(scales: Iterable[int]) -> set[int]:
    """Return the partial-result bytes per sample if blocks read whole rows.

    A block keeps a partial result, of 4 bytes, for each of 128 columns and each output, and reads 16 values for each of
    its threads (Reduce.cuh: global_memory_size, min_values_per_thread): of rows of 4 bytes a value twice as much as it
    reads, of 2 bytes four times, and by powers of two more or less where blocks are of another shape.
    """
    return {scale * 2**power for scale in scales for power in range(5)}


def _row_laws(size: int, n: int) -> Iterator[Rule]:
    """Yield laws that grow in steps of several samples.

    A sum over rows keeps a partial result for each block of rows (aten/src/ATen/native/cuda/Reduce.cuh: ctas_per_output
    is rounded up).
    """
    for samples_per_step in STEP_SAMPLES:
        if size % -(-n // samples_per_step) == 0 and samples_per_step < n:
            yield Rule(0, per_sample=size // -(-n // samples_per_step), samples_per_step=samples_per_step)


def _tile_laws(size: int, n: int, m: int, sizes: set[int], scales: Iterable[int]) -> Iterator[Rule]:
    """Yield laws in whole tiles, proportional to an input's bytes.

    A tile divides what was seen at both sizes, and what scales is one of the phase's own.
    """
    if size <= MAX_COUNTER_BYTES:
        yield from _row_laws(size, n)
        return
    units = {
        gcd(size, partner) // part for partner in sizes if MAX_COUNTER_BYTES < partner < size for part in TILE_DIVISORS
    }
    for unit_bytes in units:
        if unit_bytes > MAX_COUNTER_BYTES and not size % unit_bytes:
            for scale in scales:
                if -(-scale * n // unit_bytes) * unit_bytes == size and -(-scale * m // unit_bytes) * unit_bytes < size:
                    yield Rule(0, per_sample=scale, unit_bytes=unit_bytes)


def saturating(
    sizes: Sequence[int], rules: Mapping[int, Rule], others: Sequence[Sequence[int]], *, reductions: bool
) -> dict[int, Rule]:
    """Return rules that saturate at a size others have reached.

    The buffer of a reduction grows with the rows until there are as many blocks as the device runs at once: that many
    bytes are the same for all, rounded up to whole rows of blocks, one block for every 32 outputs or so (Reduce.cuh:
    ctas_per_output is the rounded quotient of the two). So of those that ended nearly alike the smallest is the nearest
    to the number before rounding. Scratch in tiles has no more of them than can be in use at once, which is the same
    for all of one tile. It is known where some are that large here, and fewer were so in a smaller recording.

    Args:
        sizes: Of one kind of blocks, in a phase.
        rules: Theirs.
        others: The same kind's in smaller recordings.
        reductions: Whether they are buffers of reductions.
    """
    here = Counter(sizes)
    ended = [size for size in here if rules[size].max_bytes == size or not rules[size].per_sample]
    reached = [size for size in ended if any(here[size] > each.count(size) for each in others)]
    found = {}
    for size in here:
        rule = rules[size]
        if not rule.per_sample or rule.max_bytes or not (reductions or rule.unit_bytes > 1):
            continue
        most = max((each for each in reached if reductions or each % rule.unit_bytes == 0), default=0)
        if size < most:
            whole = _whole(rule)
            alike = max(whole, _whole(rules[most])) if reductions else 0
            least = min(each for each in reached if most - alike <= each <= most)
            found[size] = rule._replace(max_bytes=-(-least // whole) * whole)
    return found


def _whole(rule: Rule) -> int:
    """Return the bytes that a size grows by at once."""
    return rule.per_sample if rule.samples_per_step > 1 else rule.unit_bytes


def reduction_buffers(events: Sequence[Event]) -> set[int]:
    """Return the blocks that look like buffers of reductions.

    aten/src/ATen/native/cuda/Reduce.cuh: gpu_reduce_kernel, a buffer for partial results and semaphores.
    """
    found = set()
    for index, event in enumerate(events):
        counters = any(0 < other.bytes <= MAX_COUNTER_BYTES for other in events[index + 1 : index + 2])
        freed = any(other.block == event.block for other in events[index + 2 : index + 5])
        if event.bytes > MAX_COUNTER_BYTES and counters and freed:
            found.add(event.block)
    return found
