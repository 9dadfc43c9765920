"""What a window in lanes exchanges: a page at each meeting.

    count      as in any window (exchange.py)
    meetings   where lanes meet, in the forward and in the backward, those of all ranks do
    ends       of the forward, with what the losses count; of the backward
    reduce     as in any window

No rank is ever left waiting in a meeting, as every rank comes to every page:

    without samples      it brings nothing to whatever the others meet at, until they have ended
    out of memory        it asks all to start the window over; they do, and it runs smaller micro-batches
    failed               all ranks end with its reason
    at another meeting   all ranks end, with the names of both
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .exchange import TOO_FEW_VALUES, Exchange, StartOver
from .lane_pages import Page, Status, is_agreed, place_number, turn
from .reduction import Reduction
from .words import TITLES, Control, Kind, failed_rank

END_FORWARD, END_BACKWARD = "the end of its forward passes", "the end of its backward pass"


class LaneExchange(Exchange):
    """The exchange of a rank whose micro-batches run in lanes.

    Args:
        control: The words.
        reduction: Of what is trained.

    Attributes:
        in_lanes: Whether pages come next, and no word.
    """

    def __init__(self, control: Control, reduction: Reduction) -> None:
        super().__init__(control, reduction)
        self.rank = control.rank
        self.in_lanes = False
        self._failure = ""

    def begin(self, digest: int = 0) -> None:
        """Begin a window."""
        super().begin(digest)
        self.in_lanes = False

    def count(self, count: Any, samples: int, passes: int = 0) -> tuple[float | None, int]:
        """Return what all ranks count, and their samples; pages follow."""
        found = super().count(count, samples, passes)
        self.in_lanes = True
        return found

    def bring(self, place: str, count: int, payload: torch.Tensor, least: int = 0) -> list[tuple[int, torch.Tensor]]:
        """Meet the other ranks' lanes; return what each rank brings.

        Args:
            place: The meeting's name: equal on all ranks.
            count: Values, samples or rows that this rank brings.
            payload: What it brings, as bytes on the host.
            least: The fewest values that statistics can be taken of.

        Raises:
            StartOver: A rank ran out of memory.
            RanksFailed: A rank failed, or is at another meeting.
            ValueError: All ranks together bring fewer values; on all.
        """
        pages = self._turned(Page(Status.HERE, place_number(place), count, least, payload), place)
        return [(page.count, page.payload) for page in pages]

    def end_forward(self, count: Any) -> Any:
        """End the forward; return what the losses of all ranks count.

        Args:
            count: What this rank's count; None where that is known already.
        """
        own = [] if count is None else [float(count)]
        payload = torch.tensor(own, dtype=torch.float64, device="cpu")
        found = self.bring(END_FORWARD, 0, payload.view(torch.uint8))
        return None if count is None else _counted([payload for _, payload in found])

    def end_backward(self) -> None:
        """End the backward: words come next."""
        self._ended(self._turned(Page(Status.HERE, place_number(END_BACKWARD)), END_BACKWARD))

    def attend(self) -> Any:
        """Take part in all meetings of a window without samples here.

        Returns:
            What the losses of the others count; None where that is known already.
        """
        count = None
        while True:
            pages = self._turned(Page(Status.WITHOUT), "no meeting, as it has no samples")
            here = [page for page in pages if page.status is Status.HERE]
            if not here or here[0].place == place_number(END_BACKWARD):
                self._ended(pages)
                return count
            if here[0].place == place_number(END_FORWARD) and here[0].payload.numel():
                count = _counted([page.payload for page in here])

    def ask_to_start_over(self) -> None:
        """Let all ranks start this window over."""
        if not self.in_lanes:
            super().ask_to_start_over()
            return
        with contextlib.suppress(StartOver):
            self._turned(Page(Status.OVER), "")

    def give_up(self, error: Exception) -> Exception:
        """Say that this rank failed; return the error."""
        if not self.in_lanes:
            return super().give_up(error)
        text = str(error).partition("\n")[0] or type(error).__name__
        self._failure = f"{type(error).__name__}: {text}"
        self.control.post(Kind.REDUCE, self._failure)
        try:
            self._turned(Page(Status.FAILED), "")
        except Exception as failed:  # RanksFailed, on all ranks
            return failed
        return error

    def _begin_again(self) -> None:
        super()._begin_again()
        self.in_lanes = True

    def _ended(self, pages: list[Page]) -> None:
        """Go on with words; take buffers from a rank that has trained."""
        self.in_lanes, self.has_met, self.next_word = False, True, Kind.REDUCE
        here = [rank for rank, page in enumerate(pages) if page.status is Status.HERE]
        self.reduction.source = here[0] if here else 0

    def _turned(self, own: Page, place: str) -> list[Page]:
        pages = turn(self.control, own)
        if any(page.status is Status.FAILED for page in pages):
            self.in_lanes = False
            raise self.control.why(Kind.REDUCE, self._failure, gave_up=True)
        if any(page.status is Status.OVER for page in pages):
            self._begin_again()
            raise StartOver
        if not is_agreed(pages):
            self.in_lanes = False
            raise self._apart(place)
        count, least = sum(page.count for page in pages), max(page.least for page in pages)
        if count < least:  # as torch.nn.functional.batch_norm
            self.in_lanes, self.next_word = False, Kind.COUNT
            raise ValueError(TOO_FEW_VALUES.format(count))
        return pages

    def _apart(self, place: str) -> Exception:
        """Return the error about ranks at other meetings, on all of them."""
        said: list[str] = self.control.gather(place)
        first = next(text for text in said if not text.startswith("no meeting"))
        rank = next(rank for rank, text in enumerate(said) if text != first and not text.startswith("no meeting"))
        reason = (
            f"its lanes are at {said[rank]}, and rank {said.index(first)}'s at {first}. Statistics of all ranks need "
            "every micro-batch at the same layer: let the path through the model depend on nothing in the batch, or "
            "use batchnorm='frozen' or 'merged'"
        )
        return failed_rank(rank, TITLES[Kind.REDUCE], reason, self.control.rank)


def _counted(payloads: list[torch.Tensor]) -> float:
    """Return the sum of what ranks count."""
    return sum(float(each.view(torch.float64)) for each in payloads if each.numel())
