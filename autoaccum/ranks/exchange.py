"""What a window exchanges with other ranks: two words, one reduction.

    count      what the window counts, in samples and in what its loss averages over, summed before the first forward
    (meet)     only for a loss over representations: all ranks bring theirs together (representations.py)
    (private)  forward and backward of all micro-batches: as often, and in as small ones, as this rank's memory takes
    reduce     the loss; that every rank has its gradient. Then gradients are summed, once
    (private)  the optimizer step: alike on all ranks

A failure before a word is said in that word, and raised on all ranks. `Alone` is the same for planning: it uses the
same memory at the same places, and talks to nobody.

Once representations have met, a rank that runs out of memory can't start over alone: it would draw other random numbers
than those that the others' loss was computed with. It says so in the next word, and all ranks start the window over.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import BatchError
from .reduction import Reduction
from .representations import Described, Meeting, Met, describe, require_alike
from .words import EQUAL_BELOW, TITLES, Control, Kind, failed_rank

TOO_FEW_VALUES = "Expected more than 1 value per channel when training, got {} in the window"


class StartOver(Exception):
    """Start the window over, as another rank ran out of memory."""


@dataclass(frozen=True)
class Totals:
    """A window over all ranks.

    Attributes:
        samples: Its samples.
        count: What its loss averages over; None where micro-batches are weighted by samples.
    """

    samples: int
    count: float | None


class Alone:
    """The exchange of a rank that plans, with the same memory.

    Args:
        reduction: Of what is trained.
        world: Number of ranks.

    Attributes:
        trains: Whether the other ranks are here.
        in_step: Whether forward and backward are collectives, so that all ranks run them together (FSDP2).
        loss_factor: What the loss is multiplied by for what others divide gradients by.
        calls: How often each normalization whose statistics are merged was called, on the rank that did most often.
        rank: This one's place among those that meet.
    """

    in_step = trains = False
    loss_factor = 1.0
    calls: tuple[int, ...] = ()
    rank = 0

    def __init__(self, reduction: Reduction, world: int) -> None:
        self.reduction, self.world = reduction, world
        self.is_private = True
        self.retries = 0

    def count(self, count: Any, samples: int, passes: int = 0) -> tuple[Any, int]:
        """Return what the window counts, and its samples."""
        self.is_private = True
        return count, samples

    def level(self, pieces: Sequence[Any], sizes: Sequence[int]) -> tuple[Sequence[Any], Sequence[int]]:
        """Return the micro-batches to run; those of size 0 add nothing."""
        return pieces, sizes

    def reduce(self, wide: Sequence[torch.Tensor], loss: torch.Tensor, calls: Sequence[int] = ()) -> torch.Tensor:
        """Prepare a reduction and undo it; return the loss."""
        self.calls = tuple(calls)
        self.reduction.prepare(wide)
        self.is_private = False
        self.reduction.put_back()
        for i in self.reduction.missing:
            self.reduction.parameters[i].grad = None
        return loss

    def ask_to_start_over(self) -> None:
        """Ask nobody."""

    def bring(self, place: str, count: int, payload: torch.Tensor, least: int = 0) -> list[tuple[int, torch.Tensor]]:
        """Return what all ranks bring to a meeting: this one alone.

        Raises:
            ValueError: They bring fewer values than statistics can be taken of.
        """
        if count < least:  # as torch.nn.functional.batch_norm
            raise ValueError(TOO_FEW_VALUES.format(count))
        return [(count, payload)]

    def end_forward(self, count: Any) -> Any:
        """Return what the losses of the window's lanes count."""
        return count

    def end_backward(self) -> None:
        """Go on with the reduction."""

    def attend(self) -> Any:
        """Return None: there is nobody to meet."""
        return None

    def add_up(self, numbers: torch.Tensor) -> None:
        """Leave numbers as they are."""

    def average(self, figure: Any) -> Any:
        """Return a figure."""
        return figure


class Exchange(Alone):
    """The exchange of a rank that trains.

    Args:
        control: The words.
        reduction: Of what is trained.
        meets: Whether all ranks' representations meet in each window.

    Attributes:
        next_word: The word that comes next, whatever happens.
        retries: How often this rank's window started over.
        ranks_retried: Ranks whose window started over; of the last window.
        digests: What the window's samples are, in numbers below 2**16 that are the same on all ranks.
        is_private: Whether this rank may still start over.
        has_met: Whether all ranks start over, if one does.
    """

    trains = True

    def __init__(self, control: Control, reduction: Reduction, *, meets: bool = False) -> None:
        super().__init__(reduction, control.world)
        self.control, self.meets, self.has_met = control, meets, False
        self.next_word = Kind.COUNT
        self.digests: tuple[int, ...] = ()
        self.ranks_retried = 0
        self._totals: Totals | None = None

    def begin(self, digest: int = 0) -> None:
        """Begin a window.

        Args:
            digest: Of all its samples, those of other ranks included.
        """
        self.digests = (digest % EQUAL_BELOW, digest // EQUAL_BELOW % EQUAL_BELOW)
        self._totals, self.retries, self.is_private, self.has_met = None, 0, True, False

    def count(self, count: Any, samples: int, passes: int = 0) -> tuple[float | None, int]:
        """Return what all ranks count, and their samples; said once a window.

        Args:
            count: What this rank counts; None where its micro-batches are weighted by samples.
            samples: Its samples.
            passes: Its micro-batches.

        Raises:
            RanksFailed: A rank failed, its data has ended, or it has other samples.
            BatchError: A rank's batch can't be used; all leave out the window.
        """
        if self._totals is None:
            own = 0.0 if count is None else float(count)
            found = self._said_count([own, float(samples), float(samples > 0 and count is None)])
            total, samples_of_all, uncounted = found[0], int(found[1]), int(found[2])
            self._totals = Totals(samples_of_all, None if uncounted else total)
            if uncounted and total:
                raise failed_rank(self.control.rank, TITLES[Kind.COUNT], _COUNTED_APART, self.control.rank)
        return self._totals.count, self._totals.samples

    def end(self) -> bool:
        """Say that this rank's data has ended; return whether all ranks' has.

        Raises:
            RanksFailed: Another rank has more windows.
        """
        self.begin()
        ended = int(self._said_count([0.0, 0.0, 0.0], ended=True)[4])
        return ended == self.world

    def leave_out(self, error: BatchError) -> None:
        """Say that this rank's batch can't be used, by any rank.

        Raises:
            BatchError: The error, with its rank; the same on all ranks.
        """
        self._said_count([0.0, 0.0, 0.0], bad=str(error))

    def meet(self, own: Any, rows: int, device: torch.device) -> Met:
        """Bring all ranks' representations together.

        Args:
            own: This rank's, a tree of detached tensors; None where it has no samples.
            rows: Their samples.
            device: Where they are.

        Raises:
            RanksFailed: A rank failed.
            StartOver: A rank has no memory for them.
            UsageError: Ranks' representations can't be joined; on all ranks.
        """
        said: list[Described] = self.control.gather(describe(own, rows), kind=Kind.MEET)
        self.has_met, self.next_word = True, Kind.JOIN
        require_alike(said)
        meeting = Meeting(said, self.control.rank, own, device)  # needs memory
        self._say_unless_over(Kind.JOIN, [0.0] * 3)
        return meeting.run(lambda work: self.control.wait(work, TITLES[Kind.JOIN]))

    def ask_to_start_over(self) -> None:
        """Let all ranks start this window over, if one can't alone."""
        if self.has_met:
            self._say(self.next_word, [0.0, 0.0, 0.0, 1.0])
            self._begin_again()

    def _begin_again(self) -> None:
        self.reduction.release()
        self.has_met, self.is_private, self.next_word = False, True, Kind.MEET

    def _say_unless_over(
        self, kind: Kind, sums: list[float], digests: tuple[int, ...] = ()
    ) -> tuple[list[float], bool]:
        """Say a word; raise StartOver where a rank asks for it."""
        found, agrees = self._say(kind, [*sums, 0.0], digests=digests)
        if found[3]:
            self._begin_again()
            raise StartOver
        return found, agrees

    def reduce(self, wide: Sequence[torch.Tensor], loss: torch.Tensor, calls: Sequence[int] = ()) -> torch.Tensor:
        """Sum gradients over ranks, and return the window's loss.

        Args:
            wide: Parameters whose gradients add up in fp32.
            loss: This rank's part of the loss.
            calls: How often each normalization whose statistics are merged was called here.

        Raises:
            RanksFailed: A rank failed.
            StartOver: A rank ran out of memory when this one couldn't be left out of it.
        """
        self.reduction.prepare(wide)
        sums = [float(loss), float(len(self.reduction.missing)), float(self.retries > 0)]
        self.is_private = False
        digest = zlib.crc32(repr(tuple(calls)).encode())
        found, agrees = self._say_unless_over(Kind.REDUCE, sums, (digest % EQUAL_BELOW, digest // EQUAL_BELOW))
        self.calls = tuple(calls) if agrees else tuple(map(max, zip(*self.control.gather(tuple(calls)), strict=True)))
        self.ranks_retried = int(found[2])
        nowhere = self.reduction.missing_everywhere(self.control.add_up) if found[1] else []
        self.reduction.run(lambda work: self.control.wait(work, "reduction of gradients"))
        for i in nowhere:  # an optimizer passes over these, as it does with one batch
            self.reduction.parameters[i].grad = None
        return torch.full_like(loss, found[0])

    def add_up(self, numbers: torch.Tensor) -> None:
        """Replace numbers on the host by their sums over ranks."""
        self.control.add_up(numbers)

    def average(self, figure: Any) -> Any:
        """Return a figure's mean over ranks; None where one has none."""
        found, _ = self.control.say(Kind.STATUS, [0.0 if figure is None else float(figure), float(figure is None)])
        return None if found[1] else found[0] / self.world

    def give_up(self, error: Exception) -> Exception:
        """Say in the next word that this rank failed; return the error."""
        text = str(error).partition("\n")[0] or type(error).__name__
        try:
            if self.next_word is Kind.COUNT:
                self.begin()
            self._say(self.next_word, [0.0] * 3, failure=f"{type(error).__name__}: {text}")
        except Exception as failed:  # RanksFailed, on all ranks
            return failed
        return error

    def _said_count(self, sums: list[float], *, ended: bool = False, bad: str = "") -> list[float]:
        """Say the first word; leave out the window where a rank asks."""
        digests = () if ended or bad else self.digests
        found, agrees = self._say(Kind.COUNT, [*sums, float(bool(bad)), float(ended)], digests=digests)
        if found[3]:
            self.next_word = Kind.COUNT
            raise self._bad_batch(self.control.gather(bad))
        if found[4]:
            self.next_word = Kind.COUNT
            if found[4] < self.world:
                who = [rank for rank, each in enumerate(self.control.gather(ended)) if each]
                raise failed_rank(who[0], "epoch", "its loader has ended, and other ranks' has not", self.control.rank)
        elif not agrees:
            said = self.control.gather(digests)
            other = self._other_samples(said)
            if other is not None:
                raise failed_rank(other, "loading of samples", _OTHER_SAMPLES, self.control.rank)
        return found

    def _other_samples(self, said: Sequence[tuple[int, ...]]) -> int | None:
        """Return a rank whose samples are not the first one's."""
        return next((rank for rank, each in enumerate(said) if each != said[0]), None)

    def _say(
        self, kind: Kind, sums: list[float], *, digests: tuple[int, ...] = (), failure: str = ""
    ) -> tuple[list[float], bool]:
        found = self.control.say(kind, sums, equal=digests, failure=failure)
        after_count = Kind.MEET if self.meets else Kind.REDUCE
        self.next_word = {Kind.COUNT: after_count, Kind.JOIN: Kind.REDUCE}.get(kind, Kind.COUNT)
        return found

    def _bad_batch(self, said: list[str]) -> BatchError:
        rank = next(rank for rank, text in enumerate(said) if text)
        what, _, rest = said[rank].partition("\n")
        return BatchError(f"Rank {rank}: {what}", rest.replace("\n", " "), "No rank has trained this window.")


_COUNTED_APART = (
    "some ranks' loss averages over what they count, and others' over samples: give count=, or a loss as (sum, count)"
)
_OTHER_SAMPLES = (
    "its loader gave other samples than rank 0's. Give the same loader on all ranks, without a DistributedSampler and "
    "not prepared by Accelerate: each rank then takes its share of every window"
)
