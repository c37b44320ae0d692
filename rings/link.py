"""A linker for one object file of ours: machine code that runs wherever it is mapped.

The object (ELF64, x86-64, ET_REL) holds code and constants that reach each other relative to the instruction, so that
all is known once they lie side by side. The few libc functions that LLVM calls are reached through a table in the page
after the code; a stub for each jumps there.

    code:  .text .rodata ... stub stub stub | page of zeros, to be filled with addresses

Everything else is refused: data that can be written, absolute addresses, and functions that are not in EXTERNALS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

EXTERNALS = frozenset({"memcpy", "memmove", "memset", "memcmp", "bcmp", "clock_gettime"})
"""What compiled code may call: of libc, without errno, without locks, without Python."""
PAGE = 4096

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
_EM_X86_64, _ET_REL = 62, 1
_SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 2, 4, 8
_SHF_WRITE, _SHF_ALLOC = 1, 2
_R_PC32, _R_PLT32 = 2, 4
_STUB = b"\xff\x25"  # jmp *displacement(%rip)


class LinkError(Exception):
    """The object has something in it that this linker does not do."""


@dataclass
class Linked:
    """`code` fills whole pages; `entries` and `externals` are offsets: of functions, and of words to fill behind it."""

    code: bytes
    entries: dict[str, int]
    externals: dict[str, int]


@dataclass
class _Section:
    name: str
    kind: int
    flags: int
    data: bytes
    link: int
    info: int
    align: int
    at: int = -1


@dataclass
class _Symbol:
    name: str
    section: int
    value: int


def link(obj: bytes, entries: Iterable[str]) -> Linked:
    """Lay out an object. Raises LinkError for what is refused, or when an entry is not in it."""
    sections = _sections(obj)
    code = bytearray()
    for section in sections:
        # Nobody unwinds this code: an exception cannot leave it.
        if section.flags & _SHF_ALLOC and section.name != ".eh_frame" and section.data:
            if section.flags & _SHF_WRITE or section.kind == _SHT_NOBITS:
                raise LinkError(f"section {section.name}: data that can be written")
            code += b"\xcc" * (-len(code) % max(section.align, 1))
            section.at = len(code)
            code += section.data
    symbols = _symbols(obj, sections)
    called = sorted({symbol.name for _, _, symbol, _ in _relocations(sections, symbols) if symbol.section == 0})
    if strangers := [name for name in called if name not in EXTERNALS]:
        raise LinkError(f"calls {', '.join(strangers)}, which compiled code may not")
    code += b"\xcc" * (-len(code) % 16)
    stubs = {name: len(code) + 8 * n for n, name in enumerate(called)}
    size = -(-(len(code) + 8 * len(called)) // PAGE) * PAGE
    table = {name: size + 8 * n for n, name in enumerate(called)}
    for name, at in stubs.items():
        code += _STUB + struct.pack("<i", table[name] - (at + 6)) + b"\xcc\xcc"
    for section, (offset, kind, addend), symbol, known in _relocations(sections, symbols):
        if kind not in (_R_PC32, _R_PLT32):
            raise LinkError(f"relocation {kind} of {symbol.name or 'a section'}: only relative ones are known here")
        target = known if symbol.section else stubs[symbol.name]
        if target < 0:
            raise LinkError(f"{symbol.name}: in section {sections[symbol.section].name}, which is left out")
        at = section.at + offset
        struct.pack_into("<i", code, at, target + addend - at)
    found = {symbol.name: _address(sections, symbol) for symbol in symbols if symbol.section and symbol.name}
    wanted = list(entries)
    if lacking := [name for name in wanted if found.get(name, -1) < 0]:
        raise LinkError(f"not in the object: {', '.join(lacking)}")
    return Linked(bytes(code.ljust(size, b"\xcc")), {name: found[name] for name in wanted}, table)


def _sections(obj: bytes) -> list[_Section]:
    if len(obj) < _HEADER.size or obj[:6] != b"\x7fELF\x02\x01":
        raise LinkError("not an object file: no ELF64 header, little endian")
    _, kind, machine, _, _, _, at, _, _, _, _, size, count, names = _HEADER.unpack_from(obj)
    if (kind, machine, size) != (_ET_REL, _EM_X86_64, _SECTION.size):
        raise LinkError(f"not a relocatable object for x86-64: type {kind}, machine {machine}")
    rows = [_SECTION.unpack_from(obj, at + n * size) for n in range(count)]
    strings = obj[rows[names][4] : rows[names][4] + rows[names][5]]
    found = []
    for name, kind, flags, _, offset, length, link, info, align, _ in rows:
        data = bytes(length) if kind == _SHT_NOBITS else obj[offset : offset + length]
        found.append(_Section(_string(strings, name), kind, flags, data, link, info, align))
    return found


def _string(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def _symbols(obj: bytes, sections: list[_Section]) -> list[_Symbol]:
    tables = [section for section in sections if section.kind == _SHT_SYMTAB]
    if len(tables) != 1:
        raise LinkError(f"{len(tables)} tables of symbols")
    strings = sections[tables[0].link].data
    return [
        _Symbol(_string(strings, name), section, value)
        for name, _, _, section, value, _ in _SYMBOL.iter_unpack(tables[0].data)
    ]


def _address(sections: list[_Section], symbol: _Symbol) -> int:
    """Where a symbol lies in the code, -1 if nowhere."""
    if symbol.section >= len(sections) or sections[symbol.section].at < 0:
        return -1
    return sections[symbol.section].at + symbol.value


def _relocations(
    sections: list[_Section], symbols: list[_Symbol]
) -> list[tuple[_Section, tuple[int, int, int], _Symbol, int]]:
    """For each: what it is in, its offset, kind and addend, what it is of, and where that is."""
    found = []
    for table in sections:
        if table.kind == _SHT_RELA and sections[table.info].at >= 0:
            for offset, info, addend in _RELA.iter_unpack(table.data):
                symbol = symbols[info >> 32]
                place = (offset, info & 0xFFFFFFFF, addend)
                found.append((sections[table.info], place, symbol, _address(sections, symbol)))
    return found
