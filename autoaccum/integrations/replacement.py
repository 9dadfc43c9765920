"""Replace one object's method for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(holder: Any, name: str, function: Any) -> Iterator[None]:
    """Replace a method of one object, whatever class has it."""
    assigned = vars(holder)
    before = {name: assigned[name]} if name in assigned else {}
    assigned[name] = function
    try:
        yield
    finally:
        del assigned[name]
        assigned.update(before)
