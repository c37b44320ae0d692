"""Slow twins of the load generator's kernels."""

from __future__ import annotations

import random
import struct
from typing import Any

_LOW31 = 0x7FFFFFFF


def _pattern(sector: int, generation: int, salt: int) -> int:
    h = (sector * 0x1E3779B1 + generation * 0x05EBCA77 + salt * 0x02B2AE3D) & _LOW31
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


def load(disk: Any, ledger: Any, requests: int, seed: int) -> int:
    """What a compiled load does in verify mode, one request at a time through the public API; blocks that differed."""
    chance = random.Random(seed)
    sectors = ledger.block_size // 512
    wrong = 0
    for _ in range(requests):
        block = chance.randrange(ledger.blocks)
        at = ledger.offset + block * ledger.block_size
        generation = int(ledger.generations[block])
        if chance.random() < 0.5:
            ledger.generations[block] = generation + 1
            disk.write(at, stamp(sectors, at // 512, generation + 1, ledger.salt, True))
        elif generation:
            wrong += disk.read(at, ledger.block_size) != stamp(sectors, at // 512, generation, ledger.salt, True)
    return wrong
