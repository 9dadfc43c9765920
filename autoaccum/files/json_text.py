"""JSON that every program reads: null in place of NaN and Infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(data: Any, indent: int | None = None) -> str:
    """Return the data as JSON, in ASCII."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:  # rare, and looking at each figure takes longer than all else
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(each) for key, each in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(each) for each in data]
    return data
