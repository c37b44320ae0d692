"""Slow twins of the load generator's kernels."""

from __future__ import annotations

import struct

_LOW31 = 0x7FFFFFFF


def _pattern(sector: int, generation: int, salt: int) -> int:
    h = (sector * 0x9E3779B1 + generation * 0x85EBCA77 + salt * 0xC2B2AE3D) & _LOW31
    h ^= h >> 15
    h = h * 0x2C1B3C6D & _LOW31
    return h ^ h >> 12


def _words(sector: int, generation: int, salt: int, whole: bool) -> list[int]:
    h = _pattern(sector, generation, salt)
    words = [sector, generation, salt]
    words += [((h << 31) ^ (i * 0x9E3779B97F4A7)) if whole or i == 63 else 0 for i in range(3, 64)]
    return words


def stamp(sectors: int, sector: int, generation: int, salt: int, whole: bool) -> bytes:
    """What load_kernels.stamp writes over zeroes."""
    return b"".join(struct.pack("<64q", *_words(sector + i, generation, salt, whole)) for i in range(sectors))


def first_bad(data: bytes, sector: int, generation: int, salt: int, whole: bool) -> int:
    """What load_kernels.first_bad finds: the first word that differs, of those that are looked at."""
    for i in range(len(data) // 512):
        found = struct.unpack_from("<64q", data, i * 512)
        for j, word in enumerate(_words(sector + i, generation, salt, whole)):
            if found[j] != word and (whole or j < 3 or j == 63):
                return i * 64 + j
    return -1
