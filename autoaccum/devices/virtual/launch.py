"""Start processes on a virtual GPU. Nothing here imports torch."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..compiled_library import put_first
from .build import LIBRARY, built_library
from .gpu import VirtualGpu


def environment(gpu: VirtualGpu, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process on a virtual GPU.

    Its library is compiled first if need be.

    Args:
        gpu: What it is like.
        base: The environment to start from; left out: this process's.

    Raises:
        UsageError: The library cannot be built or loaded.
    """
    library = built_library()
    variables = dict(os.environ if base is None else base)
    variables |= gpu.settings()
    variables["LD_LIBRARY_PATH"] = put_first(str(library.parent), variables.get("LD_LIBRARY_PATH", ""))
    variables["LD_PRELOAD"] = put_first(LIBRARY.preloaded(library), variables.get("LD_PRELOAD", ""))
    # An autograd thread that waits for the process's end (source/ending.c) isn't waited for: torch's limit, in seconds
    variables.setdefault("TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT", "0.5")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        variables.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")  # Triton compiles its launcher against it, on any GPU
    return variables


def launch(command: Sequence[str], gpu: VirtualGpu, **popen_kwargs: Any) -> subprocess.Popen[Any]:
    """Start a command on a virtual GPU.

    `env` among the keywords of `subprocess.Popen` is the environment to start from.
    """
    variables = environment(gpu, popen_kwargs.pop("env", None))
    return subprocess.Popen(list(command), env=variables, **popen_kwargs)
