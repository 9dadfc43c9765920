"""Read the dynamic symbols of a shared library from its file.

Without `nm`, and nothing is loaded.

Layouts: System V ABI, chapters 4 and 5 (gabi), and the GNU symbol versioning extension, both 64-bit little-endian,
which x86_64 and aarch64 are.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, alignment, entry size
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_NEED = struct.Struct("<HHIII")  # version, count, file, aux, next
_NEED_AUX = struct.Struct("<IHHII")  # hash, flags, index, name, next
_DYNSYM, _VERNEED, _VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF
_FUNCTION, _UNDEFINED = 2, 0


@dataclass(frozen=True)
class Symbols:
    """What a library imports and exports.

    Attributes:
        imported: Name -> the version it is asked for in ("libcudart.so.13"), "" where it has none.
        exported: The functions that it defines.
    """

    imported: dict[str, str]
    exported: frozenset[str]


def read_symbols(path: Path) -> Symbols:
    """Read the dynamic symbols of a 64-bit little-endian ELF library.

    Raises:
        ValueError: It is no such file.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
        return _symbols(data)


def _symbols(data: mmap.mmap) -> Symbols:
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [_SECTION.unpack_from(data, start + i * size) for i in range(count)]
    by_type = {section[1]: section for section in sections}
    if _DYNSYM not in by_type:
        return Symbols({}, frozenset())
    table = by_type[_DYNSYM]
    names = sections[table[6]][4]  # the string table that it links to begins there
    versions = _needed(data, by_type[_VERNEED], sections) if _VERNEED in by_type else {}
    indices = _contents(data, by_type[_VERSYM]) if _VERSYM in by_type else b""
    imported: dict[str, str] = {}
    exported: set[str] = set()
    for i, (name, info, _, section, _, _) in enumerate(_SYMBOL.iter_unpack(_contents(data, table))):
        if section == _UNDEFINED:
            index = int.from_bytes(indices[2 * i : 2 * i + 2], "little") & 0x7FFF
            imported[_text(data, names + name)] = versions.get(index, "")
        elif info & 0xF == _FUNCTION:
            exported.add(_text(data, names + name))
    return Symbols(imported, frozenset(exported))


def _contents(data: mmap.mmap, section: tuple[int, ...]) -> bytes:
    return data[section[4] : section[4] + section[5]]


def _text(data: mmap.mmap, offset: int) -> str:
    return data[offset : data.find(b"\0", offset)].decode()


def _needed(data: mmap.mmap, section: tuple[int, ...], sections: list[tuple[int, ...]]) -> dict[int, str]:
    return dict(_versions(data, section[4], sections[section[6]][4]))


def _versions(data: mmap.mmap, offset: int, names: int) -> Iterator[tuple[int, str]]:
    """Yield each version that is needed, with its index.

    Two linked lists: the libraries, and each one's versions with the index that symbols name.
    """
    while True:
        _, count, _, aux, following = _NEED.unpack_from(data, offset)
        at = offset + aux
        for _ in range(count):
            _, _, index, name, step = _NEED_AUX.unpack_from(data, at)
            yield index, _text(data, names + name)
            at += step
        if not following:
            return
        offset += following
