"""The phases of a window: names, titles, and the callback's type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

OnPhase = Callable[[str], AbstractContextManager[Any]]
"""Called with a phase's name; what it returns is entered for as long as the phase lasts."""

BUILD, FIRST, LATER, OPTIMIZER, BETWEEN = "build", "first", "later", "optimizer", "between"
PHASES = (FIRST, LATER, OPTIMIZER, BETWEEN)
PHASE_TITLES = {
    BUILD: "build",
    FIRST: "first micro-batch",
    LATER: "later micro-batch",
    OPTIMIZER: "optimizer step",
    BETWEEN: "between windows",
}
