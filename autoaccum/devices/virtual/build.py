"""Compile the virtual GPU's library, once for each torch."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from ...errors import UsageError
from ...files.private import cache_folder, private_folder
from ..compiled_library import CompiledLibrary
from .torch_build import TorchBuild, find_torch

ALIASES = ("libcuda.so.1", "libnvidia-ml.so.1")  # the names by which the driver and NVML are looked for
_STUBS = "stubs.c"
LIBRARY = CompiledLibrary(
    title="The virtual GPU's library",
    user="The virtual GPU",
    why="Its library is compiled against the CUDA headers of the torch that is installed.",
    name="libautoaccum-gpu.so",
    extras=(_STUBS,),
    aliases=ALIASES,
)
_HERE = Path(__file__).parent
_SOURCES = _HERE / "source"
_FLAGS = ("-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-builtin", "-Wall", "-Wno-unused-parameter")


def built_library() -> Path:
    """Return the library for the installed torch; compile it if needed.

    Raises:
        UsageError: It can't be built, or the cache isn't the user's own; why, in words.
    """
    torch = find_torch()
    folder = private_folder(cache_folder(), "autoaccum", "virtual") / _key(torch)
    return LIBRARY.built(folder, lambda making: _compile(torch, making))


def reason_against() -> str | None:
    """Return why no virtual GPU is available, in one sentence.

    None where it is built or can probably be built.
    """
    try:
        torch = find_torch()
        if not LIBRARY.is_whole(cache_folder() / "autoaccum" / "virtual" / _key(torch)):
            LIBRARY.compiler()
    except UsageError as error:
        return error.what
    return None


def _key(torch: TorchBuild) -> str:
    """Return the library's folder name.

    By torch, CUDA, machine, and all that goes into it, cuDNN's version included.
    """
    scripts = (*(_HERE / name for name in ("build.py", "elf.py", "stubs.py")), _HERE.parent / "compiled_library.py")
    parts = [*sorted(_SOURCES.rglob("*.[ch]")), *scripts]
    digest = hashlib.sha256()
    for path in (*parts, torch.includes[-1] / "cudnn_version.h"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{torch.version}-{torch.cuda}-{platform.machine()}-{digest.hexdigest()[:12]}"


def _compile(torch: TorchBuild, making: Path) -> None:
    from .stubs import write_stubs

    compiler, stubs = LIBRARY.compiler(), making / _STUBS
    stubs.write_text(write_stubs(torch.lib, torch.cuda_libs, torch.includes[0] / "cuda.h"), encoding="utf-8")
    includes = [f"-I{_SOURCES}", *(word for path in torch.includes for word in ("-isystem", str(path)))]
    sources = [*map(str, sorted(_SOURCES.glob("*.c"))), str(stubs)]
    against = f"Built against torch {torch.version}; "
    LIBRARY.compile(compiler, [*_FLAGS, *includes, *sources], making, against)
