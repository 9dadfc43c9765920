"""Find the installed torch and its CUDA headers.

Nothing of torch is imported.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError

# What the wheels of each major version of CUDA are called, and a header of each: CUDA first, cuDNN last
_WHEELS = {
    13: (("cu13", "cuda_runtime_api.h"), ("cudnn", "cudnn.h")),
    12: (
        ("cuda_runtime", "cuda_runtime_api.h"),
        ("cublas", "cublas_v2.h"),
        ("cufft", "cufft.h"),
        ("cusolver", "cusolverDn.h"),
        ("cusparse", "cusparse.h"),
        ("cudnn", "cudnn.h"),
    ),
}
_WORDS = re.compile(r"^(__version__|cuda)\b[^=\n]*=\s*(?:'([^']*)'|None)", re.MULTILINE)


@dataclass(frozen=True)
class TorchBuild:
    """A CUDA build of torch.

    Attributes:
        version: Like "2.14.1+cu130".
        cuda: The CUDA version it was built with, like "13.0".
        lib: The folder of torch's own libraries.
        includes: The folders of CUDA's headers, and of cuDNN's, which come last.
        cuda_libs: The folders of CUDA's and cuDNN's libraries.
    """

    version: str
    cuda: str
    lib: Path
    includes: tuple[Path, ...]
    cuda_libs: tuple[Path, ...]


def find_torch() -> TorchBuild:
    """Find the torch that this interpreter would import.

    Raises:
        UsageError: There is none, it has no CUDA or another one, its headers are missing, or this isn't Linux.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise _unusable(
            f"is for Linux on x86_64 or aarch64; this is {sys.platform} on {platform.machine()}",
            "It is a library that is preloaded under the CUDA wheels of torch for Linux.",
            "Run it in a Linux container.",
        )
    folder = _torch_folder()
    version, cuda = _versions(folder)
    if cuda is None:
        raise _unusable(
            f"needs a CUDA build of torch; {version} here has no CUDA",
            "It stands in for CUDA's libraries, under the parts of torch that call them.",
            "Install one: pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    major = int(cuda.split(".")[0])
    if major not in _WHEELS:
        raise _unusable(
            f"knows CUDA 12 and 13; torch {version} here is built for CUDA {cuda}",
            "Each major version of CUDA has other functions and other layouts.",
            "Install one: pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    return TorchBuild(version, cuda, folder / "lib", *_folders(version, major))


def _unusable(what: str, why: str, hint: str) -> UsageError:
    return UsageError(f"The virtual GPU {what}.", why, hint)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise _unusable(
            "needs torch, which isn't installed here", f"The interpreter is {sys.executable}.", "pip install torch"
        )
    return Path(spec.origin).parent


def _versions(folder: Path) -> tuple[str, str | None]:
    words = _WORDS.findall((folder / "version.py").read_text(encoding="utf-8"))
    found = {name: value or None for name, value in words}
    return found.get("__version__") or "unknown", found.get("cuda")


def _folders(version: str, major: int) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    spec = importlib.util.find_spec("nvidia")  # a namespace: each of NVIDIA's wheels adds a folder to it
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    parts = _WHEELS[major]
    found = [root / part for part, header in parts for root in roots if (root / part / "include" / header).is_file()]
    if len(found) != len(parts):
        where = ", ".join(f"nvidia/{part}/include/{header}" for part, header in parts)
        raise _unusable(
            f"needs the CUDA headers that torch {version}'s wheels bring, and doesn't find them",
            f"It looked for {where} beside torch.",
            "Install torch with pip, its dependencies included (a conda or a system build has them elsewhere).",
        )
    return tuple(folder / "include" for folder in found), tuple(folder / "lib" for folder in found)
