"""Compile a library of C once, and keep it in a cache.

It is preloaded into processes, so what lies in the cache is used only where it is the user's own (files/private.py)
and, byte for byte, what was compiled: its folder holds its SHA-256. Else it is compiled anew. No torch here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..files.private import check_own

DIGEST = "sha256"
_LAST_LINES = 12


@dataclass(frozen=True)
class CompiledLibrary:
    """Describe a library that is compiled once and kept.

    Attributes:
        title: What it is called where a message begins, as "The virtual GPU's library".
        user: What needs a compiler, where a message begins.
        why: Why it isn't shipped compiled; a sentence.
        name: Its file.
        extras: Other files in its folder.
        aliases: Links to it in its folder.
    """

    title: str
    user: str
    why: str
    name: str
    extras: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def built(self, folder: Path, compile_in: Callable[[Path], None]) -> Path:
        """Return the library in its folder; compile it if it isn't whole.

        Args:
            folder: Its folder, within a private one that exists.
            compile_in: Compiles into a folder, and seals it.

        Raises:
            UsageError: It can't be built, or the cache isn't the user's own; why, in words.
        """
        if not self.is_whole(folder):
            self._build(folder, compile_in)
        return folder / self.name

    def is_whole(self, folder: Path) -> bool:
        """Return whether a folder holds the library as it was compiled.

        And nothing else that a loader could find there.

        Raises:
            UsageError: Something in it isn't this user's own.
        """
        if not os.path.lexists(folder):
            return False
        check_own(folder, is_folder=True)
        if {path.name for path in folder.iterdir()} != {self.name, DIGEST, *self.extras, *self.aliases}:
            return False
        for name in (self.name, DIGEST):
            check_own(folder / name)
        links = [folder / alias for alias in self.aliases]
        if any(not link.is_symlink() or os.readlink(link) != self.name for link in links):  # noqa: PTH115
            return False
        return (folder / DIGEST).read_text(errors="replace").strip() == _digest(folder / self.name)

    def compiler(self) -> list[str]:
        """Return the C compiler's command.

        Raises:
            UsageError: There is none on the PATH, or CC names none.
        """
        named = shlex.split(os.environ.get("CC", ""))
        for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
            if shutil.which(command[0]):
                return command
        raise UsageError(
            f"{self.user} needs a C compiler, and there is no {named[0] if named else 'cc, gcc or clang'} on the PATH.",
            self.why,
            "Install one (apt install gcc), or name it: CC=/path/to/cc",
        )

    def compile(self, compiler: Sequence[str], arguments: Iterable[str], making: Path, against: str = "") -> None:
        """Run the compiler for a shared library, and seal the folder.

        Args:
            compiler: Its command.
            arguments: Flags and sources.
            making: The folder to compile into.
            against: What the hint of a failure begins with: what it was built against.

        Raises:
            UsageError: It doesn't compile.
        """
        command = [*compiler, *arguments, "-shared", "-o", str(making / self.name), "-ldl", "-lpthread"]
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()[-_LAST_LINES:]
            raise UsageError(
                f"{self.title} doesn't compile: {shlex.join(compiler)} gave exit code {done.returncode}.",
                "\n".join(["The last it said:", *lines]),
                f"{against}CC=/path/to/cc tries another compiler.",
            )
        self.seal(making)

    def seal(self, making: Path) -> None:
        """Add to a compiled library what `is_whole` checks."""
        (making / DIGEST).write_text(_digest(making / self.name) + "\n")
        for name in (self.name, DIGEST, *self.extras):
            (making / name).chmod(0o600)  # whatever the umask says
        for alias in self.aliases:
            (making / alias).symlink_to(self.name)

    def preloaded(self, library: Path) -> str:
        """Return the library's entry in LD_PRELOAD.

        The loader splits it at spaces and colons; a bare name is found along LD_LIBRARY_PATH.

        Raises:
            UsageError: No entry can name its folder.
        """
        if ":" in str(library) or ";" in str(library):
            raise UsageError(
                f"{self.title} can't be loaded from {library.parent}.",
                "The loader takes a colon or a semicolon for the end of a folder's name.",
                "Name another folder: XDG_CACHE_HOME=DIR",
            )
        return library.name if " " in str(library) else str(library)

    def _build(self, folder: Path, compile_in: Callable[[Path], None]) -> None:
        """Compile in a folder beside it, then rename that.

        So nobody ever sees half a library, and two processes may compile simultaneously.
        """
        try:
            making = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        except OSError as error:
            raise self._cant_be_kept(folder, error) from error
        try:
            compile_in(making)
            self._move(making, folder)
        except OSError as error:  # the disk is full, above all
            raise self._cant_be_kept(folder, error) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def _cant_be_kept(self, folder: Path, error: OSError) -> UsageError:
        return UsageError(
            f"{self.title} can't be kept in {folder.parent}: {error.strerror}.",
            "It is compiled once and kept in the user's cache.",
            "Name a folder that can be written, on a disk with room: XDG_CACHE_HOME=DIR",
        )

    def _move(self, making: Path, folder: Path) -> None:
        try:
            making.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.is_whole(folder):
                return  # another process was quicker, and its library is the same
            aside = Path(tempfile.mkdtemp(prefix=".broken-", dir=folder.parent))  # who has loaded it keeps its file
            try:
                folder.rename(aside / "was")
                making.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def put_first(entry: str, path: str) -> str:
    """Return a path of the loader's with an entry first."""
    return ":".join([entry, *(other for other in path.split(":") if other and other != entry)])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
