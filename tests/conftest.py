"""What holds for all tests."""

from __future__ import annotations

import sys

import torch


def _hide_a_torchvision_for_another_torch() -> str:
    """On a CPU build, PyPI's torchvision is one for CUDA: it can't be loaded, and takes transformers with it.

    Without it transformers works; what needs it here needs CUDA, too. Returns what is told of it.
    """
    if torch.version.cuda is not None:
        return ""
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return f"torchvision is left out: it is not for this torch ({error})"
    return ""


HIDDEN = _hide_a_torchvision_for_another_torch()


def pytest_report_header() -> list[str]:
    """Said at the top of a run."""
    return [HIDDEN] if HIDDEN else []
