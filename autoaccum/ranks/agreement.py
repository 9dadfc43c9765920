"""Do something on every rank, and fail alike on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .. import errors
from ..errors import AutoaccumError, UsageError
from .words import TITLES, Control, Kind, failed_rank

Result = TypeVar("Result")

_Packed = tuple[str, str, str, str]


def together(control: Control, action: Callable[[], Result], kind: Kind = Kind.PLAN) -> list[Result]:
    """Return what an action gives on each rank.

    Args:
        control: The words.
        action: Run on this rank; without collectives.
        kind: The word that ends it.

    Raises:
        AutoaccumError: It raised one on some rank; the same on all ranks.
        RanksFailed: It raised something else.
    """
    mine: tuple[Any, _Packed | None]
    caught: Exception | None = None
    try:
        mine = action(), None
    except Exception as error:
        mine, caught = (None, _packed(error)), error
    said = control.gather(mine, kind=kind)
    failed = {rank: packed for rank, (_, packed) in enumerate(said) if packed is not None}
    if failed:
        raise _error(failed, kind, control) from caught
    return [result for result, _ in said]


def require_equal(claims: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ranks that mean different things.

    Args:
        claims: What each rank says, by name.

    Raises:
        UsageError: Names what differs, with every rank's value.
    """
    names = [name for name in claims[0] if any(each.get(name) != claims[0][name] for each in claims)]
    if not names:
        return
    shown = "; ".join(f"{name}: {_by_rank([each.get(name) for each in claims])}" for name in names)
    raise UsageError(
        f"Ranks differ in what they train ({shown}).",
        "One plan is made for all ranks, and each trains its part of the same windows.",
        "Build the workload alike on every rank, from the same arguments and versions.",
    )


def _by_rank(values: list[Any]) -> str:
    """Return values with the ranks that have them."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(repr(value), []).append(rank)
    parts = []
    for value, of in ranks.items():
        listed = ", ".join(map(str, of[:4])) + (", ..." if len(of) > 4 else "")
        parts.append(f"{value} on rank{'s' * (len(of) > 1)} {listed}")
    return ", ".join(parts)


def _packed(error: Exception) -> _Packed:
    if isinstance(error, AutoaccumError):
        return type(error).__name__, error.what, error.why, error.hint
    text = str(error).partition("\n")[0]
    return "", f"{type(error).__name__}: {text}", "", ""


def _error(failed: Mapping[int, _Packed], kind: Kind, control: Control) -> AutoaccumError:
    rank, (name, what, why, hint) = next(iter(failed.items()))
    if not name:
        return failed_rank(rank, TITLES[kind], what, control.rank)
    everywhere = len(failed) == control.world and len(set(failed.values())) == 1
    made: AutoaccumError = getattr(errors, name, AutoaccumError)(
        what if everywhere else f"Rank {rank}: {what}", why, hint
    )
    return made
