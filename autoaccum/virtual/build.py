"""Compiles the virtual GPU's library, once for each torch, and keeps it in the user's cache."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import UsageError
from .torch_build import TorchBuild, find_torch

LIBRARY = "libautoaccum-gpu.so"
ALIASES = ("libcuda.so.1", "libnvidia-ml.so.1")  # the names by which the driver and NVML are looked for
_HERE = Path(__file__).parent
_SOURCES = _HERE / "source"
_FLAGS = ("-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-builtin", "-Wall", "-Wno-unused-parameter")
_LAST_LINES = 12


def built_library() -> Path:
    """The library for the torch that is installed here; compiled if it isn't in the cache.

    Raises:
        UsageError: It can't be built; why, in words.
    """
    torch = find_torch()
    folder = _cached(torch)
    library = folder / LIBRARY
    if not library.is_file():
        _build(torch, folder)
    return library


def reason_against() -> str | None:
    """Why it can't be had here, in one sentence; None where it is built or looks as if it could be."""
    try:
        torch = find_torch()
        if not (_cached(torch) / LIBRARY).is_file():
            _compiler()
    except UsageError as error:
        return error.what
    return None


def _cached(torch: TorchBuild) -> Path:
    """Where it lies: by torch, CUDA, machine, and all that goes into it, cuDNN's version included."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parts = [*sorted(_SOURCES.rglob("*.[ch]")), *(_HERE / name for name in ("build.py", "elf.py", "stubs.py"))]
    digest = hashlib.sha256()
    for path in (*parts, torch.includes[-1] / "cudnn_version.h"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    key = f"{torch.version}-{torch.cuda}-{platform.machine()}-{digest.hexdigest()[:12]}"
    return cache / "autoaccum" / "virtual" / key


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise UsageError(
        f"The virtual GPU needs a C compiler, and there is no {named[0] if named else 'cc, gcc or clang'} on the PATH.",
        "Its library is compiled against the CUDA headers of the torch that is installed.",
        "Install one (apt install gcc), or name it: CC=/path/to/cc",
    )


def _build(torch: TorchBuild, folder: Path) -> None:
    """Compiles in a folder beside and renames it, so that nobody ever sees half a library; two may do so at once."""
    compiler = _compiler()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise UsageError(
            f"The virtual GPU's library can't be kept in {folder.parent}: {error.strerror}.",
            "It is compiled once and kept in the user's cache.",
            "Name a folder that can be written: XDG_CACHE_HOME=DIR",
        ) from error
    try:
        _compile(compiler, torch, making)
        _move(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _move(making: Path, folder: Path) -> None:
    try:
        making.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (folder / LIBRARY).is_file():
            raise  # else another process was quicker, and its library is the same


def _compile(compiler: list[str], torch: TorchBuild, making: Path) -> None:
    from .stubs import write_stubs

    stubs = making / "stubs.c"
    stubs.write_text(write_stubs(torch.lib, torch.cuda_libs, torch.includes[0] / "cuda.h"), encoding="utf-8")
    includes = [f"-I{_SOURCES}", *(word for path in torch.includes for word in ("-isystem", str(path)))]
    sources = [*map(str, sorted(_SOURCES.glob("*.c"))), str(stubs)]
    command = [*compiler, *_FLAGS, *includes, "-shared", "-o", str(making / LIBRARY), *sources, "-ldl", "-lpthread"]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:]
        raise UsageError(
            f"The virtual GPU's library doesn't compile: {shlex.join(compiler)} gave exit code {done.returncode}.",
            "\n".join(["The last it said:", *lines]),
            f"Built against torch {torch.version}; CC=/path/to/cc tries another compiler.",
        )
    for alias in ALIASES:
        (making / alias).symlink_to(LIBRARY)
