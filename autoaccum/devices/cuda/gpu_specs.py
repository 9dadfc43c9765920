"""Find a real GPU by the names that people type.

No torch here.
"""

from __future__ import annotations

import difflib
import re

from ...errors import UsageError
from ...units import show_bytes
from .gpu_table import CUDNN_BYTES, GPUS, LIBRARY_BYTES, Gpu

__all__ = ["CUDNN_BYTES", "GPUS", "LIBRARY_BYTES", "Gpu", "find_gpu", "list_gpus"]


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name or the driver's.

    However it is spelled.

    Raises:
        UsageError: There is none, or several.
    """
    wanted, asked = _spelled(name), _words(name)
    exact = (
        [gpu for gpu in GPUS if wanted == gpu.name],
        [gpu for gpu in GPUS if wanted == _spelled(gpu.device_name)],
        [gpu for gpu in GPUS if asked == _words(gpu.name)],  # 4070 is no 4070 Ti
        [gpu for gpu in GPUS if asked and asked <= _words(gpu.name) | _words(gpu.device_name)],
    )
    meant = next(filter(None, exact), [])
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UsageError(
            f"{name!r} may be any of {len(meant)} GPUs.",
            f"They are: {', '.join(f'{gpu.name} ({show_bytes(gpu.total_bytes)})' for gpu in meant)}.",
            f"Name one of them: --gpu {meant[0].name}.",
        )
    names = [gpu.name for gpu in GPUS]
    near = [known for known in names if wanted and wanted in known] or _of_the_series(asked)
    near = near or difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)
    why = f"Near it are: {', '.join(near)}." if near else "Nothing in the table is near it."
    example = near[0] if near else "a100-40gb"
    raise UsageError(
        f"No GPU is known as {name!r}.",
        why,
        f"Name one like --gpu {example}, with --memory for a smaller one; `autoaccum doctor --gpus` lists all of them.",
    )


def list_gpus() -> str:
    """The table as text, with its sources."""
    lines, width = [], max(len(gpu.name) for gpu in GPUS) + 2
    for gpu in GPUS:
        sources = gpu.sources
        lines += [
            f"{gpu.name:<{width}}{gpu.device_name}: {show_bytes(gpu.total_bytes)}, compute capability {gpu.capability},"
            f" {gpu.multiprocessors} multiprocessors, context {show_bytes(gpu.context_bytes)},"
            f" libraries {show_bytes(gpu.library_bytes)}",
            f"    memory: {sources.total}",
            f"    processor: {sources.processor}",
            f"    context: {sources.context}",
            f"    libraries: {sources.library}",
        ]
    return "\n".join(lines)


def _words(name: str) -> frozenset[str]:
    """`RTX4090` -> {4090}; `4070ti` -> {4070, ti}; `A100 80G` -> {a100, 80gb}."""
    apart = re.sub(r"(\d{4})(ti|super)", r"\1 \2 ", name.strip().lower().replace("tisuper", "ti super"))
    words = (re.sub(r"^(rtx|gtx)(?=\d)", "", word) for word in re.split(r"[^a-z0-9]+", apart))
    sizes = (re.sub(r"^(\d+)(g|gb|gib)$", r"\1gb", word) for word in words)
    return frozenset(sizes) - {"", "nvidia", "tesla", "geforce", "rtx", "gtx", "quadro", "generation"}


def _of_the_series(asked: frozenset[str]) -> list[str]:
    """Return the GPUs whose number differs in its last digits: 3050, 3090."""
    series = {match[1] for word in asked if (match := re.match(r"(\d0)\d0$", word))}
    return [gpu.name for gpu in GPUS if any(word.startswith(tuple(series)) for word in _words(gpu.name)) and series]


def _spelled(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` -> rtx-4090."""
    words = re.split(r"[\s_-]+", name.strip().lower())
    return "-".join(word for word in words if word not in ("", "nvidia", "tesla", "geforce"))
