"""Check the names of a batch's entries that a workload gives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

from ..errors import UsageError
from . import tree
from .collated import Collated
from .groups import Grouped

_KEYS = re.compile(r"\['([^']+)'\]|\.(\w+)")
_SHOWN = 8  # names in a message


def refuse_unknown(batch: Any, **names: Collection[str]) -> None:
    """Refuse names that no entry of the sample has.

    A name that is spelled otherwise would leave the entry cut, or whole, without a word.

    Args:
        batch: The sample.
        **names: `shared` and `per_sample`: keys, fields or whole paths.

    Raises:
        UsageError: One is of no entry.
    """
    if isinstance(batch, Collated):
        return
    paths = [path for path, _ in tree.leaves(batch.rows if isinstance(batch, Grouped) else batch)]
    keys = {key or field for path in paths for key, field in _KEYS.findall(path)}
    for argument, given in names.items():
        for name in (given,) if isinstance(given, str) else given:
            if name in keys or name == "batch" or any(path.startswith(name) for path in paths):
                continue
            known = [*dict.fromkeys(sorted(keys) or paths)]
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"{argument}= names {name!r}, and the sample has no such entry.",
                f"It has {', '.join(known[:_SHOWN])}{', ...' if len(known) > _SHOWN else ''}.",
                f"Did you mean {near[0]}?" if near else "Give a key, a field, or a whole path such as batch[1].",
            )
