"""Say control words: small sums over all ranks.

Every rank comes to every word, whatever happened to it.

The rule that makes one rank's out-of-memory its own affair: between two words a rank does nothing that another rank
waits for. A word is 17 numbers in one all-reduce of a gloo group of its own, on the host: no GPU memory, no stream.

All ranks can tell by the sums that all said the same. `W * sum(x**2) == sum(x)**2` holds exactly where `x` is equal on
all W ranks (Cauchy and Schwarz), and numbers below 2**16 keep both sides below 2**53 for up to 1,024 ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RanksFailed
from ..torch_compat import default_store
from .group import Place

POLL_SECONDS = 0.5
ANSWER_SECONDS = 3.0  # after a word broke off: how long the last rank has to say that it is alive
MOST_ANSWER_SECONDS = 20.0  # and several of them
EQUAL_BELOW = 1 << 16
_SUMS, _EQUALS = 6, 4
_made = itertools.count()


class Kind(IntEnum):
    """What a word is about, which must be equal on all ranks."""

    START = 1
    PLAN = 2
    COUNT = 3
    REDUCE = 4
    ORDER = 5
    STATUS = 6
    MEET = 7
    JOIN = 8


TITLES = {
    Kind.START: "start",
    Kind.PLAN: "planning",
    Kind.COUNT: "optimizer step, loading or counting",  # what lies before this word
    Kind.REDUCE: "forward and backward",
    Kind.ORDER: "start of an epoch",
    Kind.STATUS: "checkpoint",
    Kind.MEET: "encoding of representations",
    Kind.JOIN: "meeting of representations",
}


class Control:
    """The words of all ranks; every rank makes one together.

    Args:
        place: This process's place.
        timeout_seconds: How long the others are waited for in a word.

    Attributes:
        words: Words said so far.
        name: A name for these words in the store.
    """

    def __init__(self, place: Place, timeout_seconds: float) -> None:
        self.rank, self.world, self.timeout_seconds = place.rank, place.world, timeout_seconds
        self._id = self.name = f"autoaccum/{next(_made)}"
        self._store = default_store()
        limit = datetime.timedelta(seconds=timeout_seconds + ANSWER_SECONDS)
        self._group: Any = dist.new_group(backend="gloo", timeout=limit)
        self.words = 0

    def say(
        self, kind: Kind, sums: Sequence[float] = (), *, equal: Sequence[int] = (), failure: str = ""
    ) -> tuple[list[float], bool]:
        """Sum all ranks' numbers; raise on all ranks where one failed.

        Args:
            kind: What the word is about.
            sums: At most 6 numbers to be added up.
            equal: At most 4 numbers below 2**16 that are to be the same on all ranks.
            failure: Why this rank gives up; empty for not.

        Returns:
            The sums, and whether the others were the same on all ranks.

        Raises:
            RanksFailed: A rank gave up, is in another word, was killed, or doesn't answer in time.
        """
        self.words += 1
        if failure:
            self.post(kind, failure)
        numbers = [*sums, *[0.0] * (_SUMS - len(sums)), float(bool(failure))]
        for number in (int(kind), *equal, *[0] * (_EQUALS - len(equal))):
            numbers += [float(number), float(number * number)]
        word = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        # After the last window no word follows, so that a rank that fails then may wait for others in vain.
        seconds = ANSWER_SECONDS if failure and kind is Kind.COUNT else None
        self.wait(dist.all_reduce(word, group=self._group, async_op=True), TITLES[kind], seconds)
        found: list[float] = word.tolist()
        pairs = list(zip(found[_SUMS + 1 :: 2], found[_SUMS + 2 :: 2], strict=True))
        differs = [self.world * square != total * total for total, square in pairs]
        if differs[0] or found[_SUMS]:
            raise self.why(kind, failure, gave_up=found[_SUMS] > 0)
        return found[: len(sums)], not any(differs)

    def gather(self, mine: Any, failure: str = "", kind: Kind = Kind.PLAN) -> list[Any]:
        """Return what each rank says, once all of them can."""
        self.say(kind, failure=failure)
        return self._gathered(mine)

    def add_up(self, numbers: torch.Tensor) -> None:
        """Replace numbers on the host by their sums over ranks."""
        self.wait(dist.all_reduce(numbers, group=self._group, async_op=True), TITLES[Kind.REDUCE])

    def all_gather(self, own: torch.Tensor, phase: str) -> list[torch.Tensor]:
        """Return all ranks' tensors on the host, alike in shape and type.

        Args:
            own: This rank's.
            phase: What lies before it.

        Raises:
            RanksFailed: A rank was killed, or doesn't answer in time.
        """
        found = [torch.empty_like(own) for _ in range(self.world)]
        self.wait(dist.all_gather(found, own, group=self._group, async_op=True), phase)
        return found

    def from_first(self, mine: Any, kind: Kind) -> Any:
        """Return what the first rank says."""
        self.say(kind)
        message = [mine if self.rank == 0 else None]
        try:
            dist.broadcast_object_list(message, src=0, group=self._group, device=torch.device("cpu"))
        except RuntimeError as error:
            raise self._lost(TITLES[kind], str(error)) from None
        return message[0]

    def wait(self, work: Any, phase: str, seconds: float | None = None) -> None:
        """Wait for a collective until it ends or a rank is lost.

        Args:
            work: The collective.
            phase: What lies before it.
            seconds: How long to wait; None for `timeout_seconds`.

        Raises:
            RanksFailed: A rank was killed, gave up meanwhile, or doesn't answer in time.
        """
        deadline = time.monotonic() + (self.timeout_seconds if seconds is None else seconds)
        while True:
            try:
                work.wait(datetime.timedelta(seconds=min(POLL_SECONDS, self.timeout_seconds)))
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise self._lost(phase, str(error)) from None
            late, posted = time.monotonic() >= deadline, self._posted()
            if posted is not None and (late or posted.rank != self.rank):
                raise self._heard() or posted
            if late or self._is_broken():
                raise self._lost(phase, "" if late else "another rank lost it")

    def _gathered(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as error:
            raise self._lost(TITLES[Kind.PLAN], str(error)) from None
        return found

    def why(self, kind: Kind, failure: str, *, gave_up: bool) -> RanksFailed:
        """Return the error that all ranks raise about a failed word.

        Args:
            kind: The word that this rank was in.
            failure: Why it gave up; empty for not.
            gave_up: Whether some rank did.
        """
        posted = self._heard(ANSWER_SECONDS if gave_up else 0.0)
        if posted is not None:
            return posted
        said = self._gathered((int(kind), failure))
        failed = [(rank, text) for rank, (_, text) in enumerate(said) if text]
        if failed:
            rank = failed[0][0]
            reason = "; ".join(dict.fromkeys(text for _, text in failed))
            return failed_rank(rank, TITLES[Kind(said[rank][0])], reason, self.rank)
        rank = next(rank for rank, each in enumerate(said) if each[0] != said[0][0])
        there, first = (TITLES[Kind(each[0])] for each in (said[rank], said[0]))
        return failed_rank(rank, there, f"it is in the word after {there}, and rank 0 after {first}", self.rank)

    def post(self, kind: Kind, failure: str) -> None:
        """Leave this rank's failure in the store, for ranks that come later."""
        with contextlib.suppress(RuntimeError):  # the store's process is gone: the word itself says it
            if self._store.add(f"{self._id}/failures", 1) == 1:  # the first one is everybody's error
                self._store.set(f"{self._id}/failure", json.dumps([self.rank, TITLES[kind], failure]))

    def _posted(self) -> RanksFailed | None:
        """Return the error about a rank that gave up, or None."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([f"{self._id}/failure"]):
                rank, phase, reason = json.loads(self._store.get(f"{self._id}/failure"))
                return failed_rank(rank, phase, reason, self.rank)
        return None

    def _heard(self, seconds: float = 0.0) -> RanksFailed | None:
        """Return the posted failure; stay until all ranks have it.

        Args:
            seconds: How long to wait for it.
        """
        deadline = time.monotonic() + seconds
        while (posted := self._posted()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if posted is not None:
            deadline = time.monotonic() + ANSWER_SECONDS
            with contextlib.suppress(RuntimeError):
                heard = self._store.add(f"{self._id}/heard", 1)
                while self.rank == 0 and heard < self.world and time.monotonic() < deadline:
                    time.sleep(0.05)  # its process may hold the store, which ends with it
                    heard = self._store.add(f"{self._id}/heard", 0)
        return posted

    def _is_broken(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return bool(self._store.check([f"{self._id}/broken"]))
        return False

    def _silent_rank(self, keys: list[str]) -> int:
        """Return the first rank that isn't alive; -1 for none.

        All ranks return the same: the first to find out says it.
        """
        store, verdict, begun = self._store, f"{self._id}/verdict", time.monotonic()
        while not store.check([verdict]):
            silent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            waited = time.monotonic() - begun
            patience = ANSWER_SECONDS if len(silent) == 1 else MOST_ANSWER_SECONDS  # others may only be slow
            if not silent or waited > patience:
                store.set(verdict, str(silent[0] if silent else -1).encode())
            time.sleep(0.05)
        found = int(store.get(verdict))
        store.set(f"{self._id}/read/{self.rank}", b"1")
        read = [key.replace("/alive/", "/read/") for key in keys if store.check([key])]
        deadline = time.monotonic() + ANSWER_SECONDS
        while self.rank == 0 and not store.check(read) and time.monotonic() < deadline:
            time.sleep(0.05)  # its process may hold the store, which ends with it
        return found

    def _lost(self, phase: str, error: str) -> RanksFailed:
        """Find out which rank doesn't answer any more, and return the error."""
        posted = self._heard()
        if posted is not None:
            return posted
        store, mine = self._store, f"{self._id}/alive/{self.rank}"
        keys = [f"{self._id}/alive/{rank}" for rank in range(self.world)]
        try:
            store.set(mine, b"1")
            store.set(f"{self._id}/broken", b"1")
            rank = self._silent_rank(keys)
        except RuntimeError:  # the store's own process is gone: the first rank's, or the launcher's
            rank = 0
        gone = "closed" in error or "reset" in error or "refused" in error
        if rank < 0:
            return failed_rank(self.rank, phase, error.partition("\n")[0] or "a collective broke off", self.rank)
        reason = (
            "its process ended, or its connection was lost"
            if gone
            else f"it didn't answer within {self.timeout_seconds:g} s, or its process ended"
        )
        return failed_rank(rank, phase, reason, self.rank)


def failed_rank(rank: int, phase: str, reason: str, here: int) -> RanksFailed:
    """Return the error about a rank that failed."""
    return RanksFailed(
        f"Rank {rank} failed in the {phase}: {reason}",
        "A window needs every rank's gradient, so all ranks end here." + (" This is that rank." * (rank == here)),
        "Start all ranks again: torchrun --max-restarts, or by hand; training goes on from the last checkpoint.",
        rank=rank,
        phase=phase,
        reason=reason,
    )
