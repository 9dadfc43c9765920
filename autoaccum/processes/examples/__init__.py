"""Provide the built-in workloads."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ...workload import Workload

BUILT_IN = {
    "chargpt": "a small GPT on the English text that Python itself ships (pydoc_data.topics)",
    "digits": "a convolutional net with BatchNorm on scikit-learn's handwritten digits",
}
DEFAULT = "chargpt"


def built_in(name: str) -> Callable[[], Workload]:
    """Return the function that makes a built-in workload."""
    make: Callable[[], Workload] = import_module("." + name, __name__).workload
    return make
