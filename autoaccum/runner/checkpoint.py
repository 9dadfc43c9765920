"""Write and read checkpoint files, without running what they hold.

A file whose bytes aren't as they were written is refused.

A checkpoint is a file of torch.save's, which `torch.load` reads as well, with a seal: the archive's comment (ZIP's
APPNOTE.TXT, 4.3.16) holds the SHA-256 of all that stands before it. The seal notices damage. Against a file that
somebody made on purpose it is no help: there it counts that only tensors and plain values are read
(`weights_only=True`).
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import stat
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import torch

from ..errors import UsageError
from ..files.whole import write_whole

_SEAL = b"autoaccum checkpoint sha256:"
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size * 2
_END = b"PK\x05\x06"  # the end record of an archive, which is 22 bytes long where it has no comment
_END_BYTES = 22
_PIECE_BYTES = 1 << 22
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.nn.Parameter)
# What torch.load raises of files that are cut short, foreign, or name classes.
_UNREADABLE = (
    OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, ImportError, EOFError, MemoryError,
    ArithmeticError, pickle.UnpicklingError,
)  # fmt: skip


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state, whole or not at all.

    Raises:
        UsageError: It holds what couldn't be read again, or the file can't be written.
    """
    content = plain(dict(state), "the checkpoint")

    def write(file: IO[bytes]) -> None:
        sealed = _Sealed(file)
        torch.save(content, sealed)  # type: ignore[arg-type]
        sealed.end()

    write_whole(path, write)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote; tensors come to the host.

    Raises:
        UsageError: It can't be read, isn't whole, or was written by something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO isn't waited for
    except (OSError, ValueError) as error:
        raise unusable(path, f"the system says: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise unusable(path, "it is no file, but a folder, a device or a pipe")
    with os.fdopen(descriptor, "rb") as file:
        _check_seal(path, file)
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            why = "it holds something else than tensors and plain values"
            raise unusable(path, why if isinstance(error, pickle.UnpicklingError) else type(error).__name__) from error
    if not isinstance(state, dict):
        raise unusable(path, f"it holds {type(state).__name__}, not what `autoaccum run` keeps")
    return state


def unusable(path: str | os.PathLike[str], why: str) -> UsageError:
    """Return the error for an incomplete, changed or foreign file."""
    return UsageError(
        f"The checkpoint {os.fspath(path)!r} can't be read: {why}.",
        "It was cut short or changed, or something else wrote it. Nothing of it was used.",
        "Name another --checkpoint, or remove it to start from the beginning.",
    )


class _Sealed:
    """Append a checksum to the archive that torch.save writes.

    All is handed on but the archive's end, which gets its comment first.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._kept = file, hashlib.sha256(), b""

    def write(self, part: Any) -> int:
        """Write all but the last bytes so far."""
        view = memoryview(part).cast("B")
        held = self._kept + bytes(view[-_END_BYTES:])
        self._put(self._kept[: max(0, len(self._kept) + len(view) - _END_BYTES)])
        self._put(view[:-_END_BYTES])
        self._kept = held[-_END_BYTES:]
        return len(view)

    def flush(self) -> None:
        """Nothing is held back but the end."""

    def end(self) -> None:
        """Write the archive's end with the seal in it."""
        assert self._kept.startswith(_END) and self._kept.endswith(b"\0\0"), "torch.save has written no plain archive"
        self._put(self._kept[:-2] + _SEAL_BYTES.to_bytes(2, "little"))
        self._file.write(_SEAL + self._digest.hexdigest().encode())

    def _put(self, part: bytes | memoryview) -> None:
        self._digest.update(part)
        self._file.write(part)


def _check_seal(path: str | os.PathLike[str], file: IO[bytes]) -> None:
    left = file.seek(0, os.SEEK_END) - _SEAL_BYTES
    file.seek(max(0, left))
    seal = file.read()
    if left < 0 or not seal.startswith(_SEAL):
        raise unusable(path, "it doesn't end as a checkpoint of `autoaccum run` does")
    file.seek(0)
    digest = hashlib.sha256()
    while left and (part := file.read(min(left, _PIECE_BYTES))):
        digest.update(part)
        left -= len(part)
    if seal[len(_SEAL) :] != digest.hexdigest().encode():
        raise unusable(path, "its bytes aren't those that were written (its checksum is another)")


def plain(value: Any, place: str) -> Any:
    """Convert a value to tensors and plain values.

    These are read again without running anything.

    Raises:
        UsageError: It holds something else; where, in words.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) in (dict, OrderedDict):
        parts = {_plain_key(key, place): plain(each, f"{place}[{key!r}]") for key, each in value.items()}
        if all(parts.get(key) is each for key, each in value.items()):
            return value
        copied = copy.copy(value)  # a state_dict's `_metadata` goes along
        copied.clear()
        copied.update(parts)
        return copied
    if type(value) in (list, tuple):
        return type(value)(plain(each, f"{place}[{index}]") for index, each in enumerate(value))
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return _tried(value, place)


def _plain_key(key: Any, place: str) -> Any:
    return key if type(key) in (int, str) else plain(key, f"a key of {place}")


def _tried(value: Any, place: str) -> Any:
    """Keep a value of an unknown type that torch.load reads.

    Torch reads it anyway, or the user vouches for it.
    """
    try:
        content = io.BytesIO()
        torch.save(value, content)
        content.seek(0)
        torch.load(content, weights_only=True)
    except Exception:  # a class's own __reduce__ may raise anything
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UsageError(
            f"{place} is a {name}, which a checkpoint can't hold.",
            "Only tensors and plain values are read again: a checkpoint must not be able to run anything.",
            f"Keep plain values in the state_dict, or vouch for the class in your workload's file: "
            f"torch.serialization.add_safe_globals([{type(value).__qualname__}]).",
        ) from None
    return value
