"""Pass pages between ranks whose lanes meet.

Between its two words a window in lanes has as many collectives as lanes meet, and a rank that runs out of memory, fails
or has no samples has to come to each of them, too. So all of them are alike, one all-gather: every rank sends a page of
the same size, whatever it has to say. Its header says what the rank is at; what doesn't fit the page follows once all
have read that they are at the same.

Pages go by the host, in the group of the control words: they need no memory of the device, so that a rank runs out of
it between two pages and never within one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from .words import TITLES, Control, Kind

PAGE_BYTES = 8192
HEADER_BYTES = 40
_ROOM = PAGE_BYTES - HEADER_BYTES


class Status(IntEnum):
    """What a rank is at."""

    HERE = 1  # at a meeting of its lanes
    WITHOUT = 2  # it has no samples, and comes to whatever meeting the others are at
    OVER = 3  # it ran out of memory, and asks all to start the window over
    FAILED = 4  # it gives up; the reason is in the store


@dataclass(frozen=True, eq=False)
class Page:
    """What a rank said.

    Attributes:
        status: What it is at.
        place: Where it meets, as `place_number` of its name.
        count: Values, samples or rows that it brings.
        least: The fewest that all ranks may bring together.
        payload: What it brings, as bytes on the host.
    """

    status: Status
    place: int = 0
    count: int = 0
    least: int = 0
    payload: torch.Tensor = torch.empty(0, dtype=torch.uint8, device="cpu")  # noqa: RUF009


def place_number(name: str) -> int:
    """Return a number below 2**63 for the name of a place."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def is_agreed(pages: Sequence[Page]) -> bool:
    """Return whether all ranks with samples are at the same meeting."""
    at = {page.place for page in pages if page.status is Status.HERE}
    return len(at) <= 1 and all(page.status in (Status.HERE, Status.WITHOUT) for page in pages)


def turn(control: Control, own: Page) -> list[Page]:
    """Give all ranks this one's page; return everybody's, by rank.

    Where ranks aren't at the same meeting, pages have the beginning of their payload only.

    Raises:
        RanksFailed: A rank was killed, or doesn't answer in time.
    """
    sheet, size = torch.zeros(PAGE_BYTES, dtype=torch.uint8, device="cpu"), own.payload.numel()
    numbers = (int(own.status), own.place, own.count, own.least, size)
    sheet[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    first = min(size, _ROOM)
    sheet[HEADER_BYTES : HEADER_BYTES + first] = own.payload[:first]
    sheets = control.all_gather(sheet, TITLES[Kind.REDUCE])
    headers = [each[:HEADER_BYTES].view(torch.int64).tolist() for each in sheets]
    found = [
        Page(Status(status), place, count, least, each[HEADER_BYTES : HEADER_BYTES + min(length, _ROOM)])
        for each, (status, place, count, least, length) in zip(sheets, headers, strict=True)
    ]
    sizes = [header[-1] for header in headers]
    more = max(sizes) - _ROOM
    if more <= 0 or not is_agreed(found):
        return found
    rest = torch.zeros(more, dtype=torch.uint8, device="cpu")
    rest[: max(0, size - _ROOM)] = own.payload[_ROOM:]
    rests = control.all_gather(rest, TITLES[Kind.REDUCE])
    parts = [each[: max(0, length - _ROOM)] for each, length in zip(rests, sizes, strict=True)]
    return [
        Page(page.status, page.place, page.count, page.least, torch.cat([page.payload, part]))
        for page, part in zip(found, parts, strict=True)
    ]
