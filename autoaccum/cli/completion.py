"""Complete an option's value in the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from ..processes.examples import BUILT_IN


def choices(*values: str) -> Callable[[str], list[str]]:
    """Return a function that completes one of these values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def gpus(incomplete: str) -> list[str]:
    """Complete a GPU's name, or its number: 4090 for rtx-4090.

    A shell takes only what begins with the typed letters.
    """
    from ..devices.cuda.gpu_specs import GPUS

    names = [gpu.name for gpu in GPUS]
    numbers = [name.removeprefix("rtx-") for name in names if name.startswith("rtx-")]
    return [name for name in [*names, *numbers] if name.startswith(incomplete)] if incomplete else names


def workloads(incomplete: str) -> list[str]:
    """Complete a built-in workload, or a file and its functions."""
    if ":" in incomplete:
        return _functions(incomplete)
    files = [*Path().glob(f"{incomplete}*.py"), *Path().glob(f"{incomplete}*/")] if "*" not in incomplete else []
    found = [f"{path}/" if path.is_dir() else f"{path}:" for path in sorted(files) if not path.name.startswith(".")]
    return [name for name in BUILT_IN if name.startswith(incomplete)] + found


def _functions(incomplete: str) -> list[str]:
    from ..processes.source_check import workload_functions

    file, _, begun = incomplete.partition(":")
    try:
        names = workload_functions(Path(file).read_text())
    except (OSError, UnicodeDecodeError, UsageError):
        return []
    return [f"{file}:{name}" for name in names if name.startswith(begun)]
