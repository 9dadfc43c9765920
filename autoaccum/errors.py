"""Errors: what happened, why, and how to fix it.

    AutoaccumError
    |-- UsageError         an argument or an input that can't be used         exit code 2
    |   |-- BatchError     a batch that can't be cut, or isn't what was planned
    |   `-- PlanFileError  a plan file that is missing, half-written, foreign or newer
    |-- DoesNotFit         not even the smallest micro-batch fits             exit code 3
    |-- NotConfirmed       what was run for real kept differing from what was predicted
    |-- PlanMismatch       the plan was made for another model, optimizer or device
    |-- OutOfMemory        the Runner could not finish a window, however small its micro-batches
    |-- NotFinite          a window's gradient isn't finite, and the workload asked to stop there
    |-- RanksFailed        a rank gave up, was killed or stopped answering; raised on all ranks
    `-- RestoreError       something that planning changed could not be put back

Every message has up to three parts: what happened, with its numbers; why; what to do next.
"""

from __future__ import annotations

__all__ = [
    "AutoaccumError",
    "BatchError",
    "DoesNotFit",
    "NotConfirmed",
    "NotFinite",
    "OutOfMemory",
    "PlanFileError",
    "PlanMismatch",
    "RanksFailed",
    "RestoreError",
    "UsageError",
]


class AutoaccumError(Exception):
    """Carry what happened, why, and what to do next.

    Args:
        what: What happened, with its numbers, in one sentence.
        why: Why, in one sentence; left out where `what` says it.
        hint: What to do or type next.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", hint: str = "") -> None:
        super().__init__(what, why, hint)
        self.what, self.why, self.hint = what, why, hint

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.hint) if part)


class UsageError(AutoaccumError):
    """Report an argument or an input that can't be used."""

    exit_code = 2


class BatchError(UsageError):
    """Report a batch that can't be split, or differs from the plan's."""


class PlanFileError(UsageError):
    """Report a plan file that is missing, incomplete, foreign or newer."""


class DoesNotFit(AutoaccumError):
    """Report that not even the smallest micro-batch fits the budget.

    Attributes:
        missing_bytes: How many bytes the smallest window lacks.
    """

    exit_code = 3

    def __init__(self, what: str, why: str = "", hint: str = "", *, missing_bytes: int = 0) -> None:
        super().__init__(what, why, hint)
        self.missing_bytes = missing_bytes


class NotConfirmed(AutoaccumError):
    """Report that real runs kept differing from the prediction."""


class PlanMismatch(AutoaccumError):
    """Report a plan for another model, optimizer, precision or device."""


class OutOfMemory(AutoaccumError):
    """Report that no micro-batch, however small, finishes a window."""


class NotFinite(AutoaccumError):
    """Report a non-finite gradient under `on_nonfinite="raise"`; no step was taken."""


class RanksFailed(AutoaccumError):
    """Report on every rank that one gave up or stopped answering.

    Attributes:
        rank: The rank; the first of several.
        phase: What it was doing.
        reason: Why it failed.
    """

    def __init__(
        self, what: str, why: str = "", hint: str = "", *, rank: int = -1, phase: str = "", reason: str = ""
    ) -> None:
        super().__init__(what, why, hint)
        self.rank, self.phase, self.reason = rank, phase, reason


class RestoreError(AutoaccumError):
    """Report what planning couldn't restore; the message names it."""
