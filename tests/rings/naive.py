"""The slow twins: the same results by the shortest way to write them down."""

from __future__ import annotations

import struct

WRAP = 1 << 32


def legal(prod: int, cons: int, prod_pvt: int, nr_ents: int, *, back: bool) -> bool:
    """Whether a peer's producer index can be an honest one."""
    waiting = (prod - cons) % WRAP
    if back:
        # Requests taken and not answered still hold their slots.
        return waiting + (cons - prod_pvt) % WRAP <= nr_ents
    # Nothing is answered that was not asked.
    return waiting <= (prod_pvt - cons) % WRAP


def entries(size: int, entry_size: int) -> int:
    """The largest power of two of slots behind 64 bytes of header."""
    n = 1
    while 64 + n * entry_size <= size:
        n *= 2
    return n // 2


def in_range(start: int, count: int, limit: int) -> bool:
    """With integers that have no end."""
    return start >= 0 and count >= 0 and start + count <= limit


def page_span(offset: int, nbytes: int) -> int:
    """By counting."""
    return len({byte // 4096 for byte in range(offset, offset + nbytes)})


def request_32_to_64(data: bytes) -> bytes:
    """Field by field, by what kind of request it is, from blkif.h."""
    op = data[0]
    if op == 5:
        op, flag, handle, id, sector, count = struct.unpack_from("<BBHQQQ", data)
        return struct.pack("<BBH4xQQQ", op, flag, handle, id, sector, count)
    if op == 6:
        op, inner, nr, id, sector, handle, *grefs = struct.unpack_from("<BBHQQHxx8I", data)
        return struct.pack("<BBH4xQQHxx8I", op, inner, nr, id, sector, handle, *grefs)
    op, nr, handle, id, sector = struct.unpack_from("<BBHQQ", data)
    out = struct.pack("<BBH4xQQ", op, nr, handle, id, sector)
    for i in range(11):
        gref, first, last = struct.unpack_from("<IBB", data, 20 + 8 * i)
        out += struct.pack("<IBBxx", gref, first, last)
    return out


def response(abi: int, id: int, operation: int, status: int) -> bytes:
    """With its padding, which must be zero."""
    if abi == 64:
        return struct.pack("<QBxh4x", id, operation, status)
    return struct.pack("<QBxh", id, operation, status)
