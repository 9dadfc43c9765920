"""Compile the virtual GPU's library and keep it in the user's cache.

Once for each torch.

It is preloaded into every process on a virtual GPU, so what lies in the cache is used only where it is the user's own
(files/private.py) and, byte for byte, what was compiled: the folder holds its SHA-256. Else it is compiled anew.
"""

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

from ...errors import UsageError
from ...files.private import cache_folder, check_own, private_folder
from .torch_build import TorchBuild, find_torch

LIBRARY = "libautoaccum-gpu.so"
ALIASES = ("libcuda.so.1", "libnvidia-ml.so.1")  # the names by which the driver and NVML are looked for
DIGEST = "sha256"
_STUBS = "stubs.c"
_HERE = Path(__file__).parent
_SOURCES = _HERE / "source"
_FLAGS = ("-std=gnu11", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-builtin", "-Wall", "-Wno-unused-parameter")
_LAST_LINES = 12


def built_library() -> Path:
    """Return the library for the installed torch; compile it if needed.

    Raises:
        UsageError: It can't be built, or the cache isn't the user's own; why, in words.
    """
    torch = find_torch()
    folder = private_folder(cache_folder(), "autoaccum", "virtual") / _key(torch)
    if not _is_whole(folder):
        _build(torch, folder)
    return folder / LIBRARY


def reason_against() -> str | None:
    """Return why no virtual GPU is available, in one sentence.

    None where it is built or can probably be built.
    """
    try:
        torch = find_torch()
        if not _is_whole(cache_folder() / "autoaccum" / "virtual" / _key(torch)):
            _compiler()
    except UsageError as error:
        return error.what
    return None


def _key(torch: TorchBuild) -> str:
    """Return the library's folder name.

    By torch, CUDA, machine, and all that goes into it, cuDNN's version included.
    """
    parts = [*sorted(_SOURCES.rglob("*.[ch]")), *(_HERE / name for name in ("build.py", "elf.py", "stubs.py"))]
    digest = hashlib.sha256()
    for path in (*parts, torch.includes[-1] / "cudnn_version.h"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{torch.version}-{torch.cuda}-{platform.machine()}-{digest.hexdigest()[:12]}"


def _is_whole(folder: Path) -> bool:
    """Return whether a folder holds the library as it was compiled.

    And nothing else that a loader could find there.

    Raises:
        UsageError: Something in it isn't this user's own.
    """
    if not os.path.lexists(folder):
        return False
    check_own(folder, is_folder=True)
    if {path.name for path in folder.iterdir()} != {LIBRARY, DIGEST, _STUBS, *ALIASES}:
        return False
    for name in (LIBRARY, DIGEST):
        check_own(folder / name)
    if any(not (folder / alias).is_symlink() or os.readlink(folder / alias) != LIBRARY for alias in ALIASES):  # noqa: PTH115
        return False
    return (folder / DIGEST).read_text(errors="replace").strip() == _digest(folder / LIBRARY)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Compile in a folder beside it, then rename that.

    So nobody ever sees half a library, and two processes may compile simultaneously.
    """
    compiler = _compiler()
    try:
        making = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise _cant_be_kept(folder, error) from error
    try:
        _compile(compiler, torch, making)
        _move(making, folder)
    except OSError as error:  # the disk is full, above all
        raise _cant_be_kept(folder, error) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _cant_be_kept(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"The virtual GPU's library can't be kept in {folder.parent}: {error.strerror}.",
        "It is compiled once and kept in the user's cache.",
        "Name a folder that can be written, on a disk with room: XDG_CACHE_HOME=DIR",
    )


def _move(making: Path, folder: Path) -> None:
    try:
        making.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _is_whole(folder):
            return  # another process was quicker, and its library is the same
        aside = Path(tempfile.mkdtemp(prefix=".broken-", dir=folder.parent))  # who has loaded it keeps its file
        try:
            folder.rename(aside / "was")
            making.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _compile(compiler: list[str], torch: TorchBuild, making: Path) -> None:
    from .stubs import write_stubs

    stubs = making / _STUBS
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
    _seal(making)


def _seal(making: Path) -> None:
    """Add to a compiled library what `_is_whole` checks."""
    (making / DIGEST).write_text(_digest(making / LIBRARY) + "\n")
    for name in (LIBRARY, DIGEST, _STUBS):
        (making / name).chmod(0o600)  # whatever the umask says
    for alias in ALIASES:
        (making / alias).symlink_to(LIBRARY)
